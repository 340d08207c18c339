"""Trained stages that runs share: what changes a key, that nothing is trained twice, and that nothing else changes."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch

from aepo import checkpoint, cli, pipeline
from aepo import config as configs
from aepo.errors import CheckpointError, Interrupted
from aepo.runs import run, rundir, spool
from aepo.runs.stage_store import StageStore, stage_keys

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path):
    store = StageStore(tmp_path / "stages")
    yield store
    store.close()


@pytest.fixture
def steps(monkeypatch):
    """Gradient steps that were taken, by stage."""
    counted = {}
    original = pipeline._stage

    def counting(config, name, number, train_step, *rest):
        def step():
            counted[name] = counted.get(name, 0) + 1
            return train_step()

        return original(config, name, number, step, *rest)

    monkeypatch.setattr(pipeline, "_stage", counting)
    return counted


def execute(config, folder, store=None, **kwargs):
    return run.execute(config, folder, run.FolderStore(folder), device=CPU, stage_store=store, **kwargs)


# -- keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({"sampling__beta": 3.0, "sampling__guidance_scale": 2.0}, set()),
        ({"evaluation__num_episodes": 5}, set()),
        ({"energy__learning_rate": 0.01}, {"energy"}),
        ({"critic__expectile": 0.9}, {"critic", "energy"}),
        ({"behavior__steps": 70}, {"behavior", "energy"}),
        ({"seed": 1}, {"behavior", "critic", "energy"}),
    ],
)
def test_a_changed_setting_changes_the_stages_that_feel_it(change, others, tiny_config):
    base, changed = (stage_keys(config, "digest") for config in (tiny_config(), tiny_config(**change)))
    assert {stage for (stage, _), key in base.items() if key not in changed.values()} == others


def test_other_data_change_every_stage_and_a_qgpo_critic_feels_the_behaviour(tiny_config):
    one, other = (stage_keys(tiny_config(), digest) for digest in ("a", "b"))
    assert not set(one.values()) & set(other.values())
    raw = stage_keys(configs.with_overrides(tiny_config(), {"data.reward_rule": "raw"}), "a")
    assert not set(one.values()) & set(raw.values())
    one, other = (stage_keys(tiny_config(method="qgpo", behavior__steps=n), "a") for n in (60, 70))
    assert not set(one.values()) & set(other.values())


def test_methods_share_the_stages_that_are_the_same(tiny_config):
    best, analytic, qgpo = (stage_keys(tiny_config(method=m), "a") for m in ("best", "analytic", "qgpo"))
    assert best["behavior", 60] == analytic["behavior", 60] == qgpo["behavior", 60]
    assert len({best["energy", 60], analytic["energy", 60], qgpo["energy", 60]}) == 3


# -- runs --------------------------------------------------------------------------------------------------


def test_nothing_is_trained_twice_and_the_weights_are_those_without_a_store(
    make_dataset, tiny_config, store, tmp_path, steps
):
    make_dataset()
    alone = execute(tiny_config(), tmp_path / "alone")
    steps.clear()
    first = execute(tiny_config(), tmp_path / "first", store)
    assert steps == {"behavior": 60, "critic": 60, "energy": 60}
    assert first.steps_reused == 0
    again = execute(tiny_config(), tmp_path / "again", store)
    assert steps == {"behavior": 60, "critic": 60, "energy": 60}
    assert again.steps_reused == 180
    policies = [(tmp_path / name / rundir.POLICY).read_bytes() for name in ("alone", "first", "again")]
    assert policies[0] == policies[1] == policies[2]
    assert alone.evaluations == first.evaluations == again.evaluations


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"critic__expectile": 0.9}, {"critic", "energy"}),
        ({"energy__learning_rate": 0.01}, {"energy"}),
        ({"sampling__guidance_scale": 2.0}, set()),
        ({"method": "qgpo"}, {"critic", "energy"}),
        ({"seed": 1}, {"behavior", "critic", "energy"}),
    ],
)
def test_only_what_a_change_touches_is_trained(change, trained, make_dataset, tiny_config, store, tmp_path, steps):
    make_dataset()
    execute(tiny_config(), tmp_path / "first", store)
    steps.clear()
    config = tiny_config(**change)
    result = execute(config, tmp_path / "second", store)
    assert set(steps) == trained
    assert result.steps_reused == 180 - sum(steps.values())
    whole = execute(config, tmp_path / "whole")
    assert result.evaluations == whole.evaluations
    rows, expected = (spool.read_spool(tmp_path / name / rundir.METRICS)[0] for name in ("second", "whole"))
    assert [(r["stage"], r["step"]) for r in rows] == [(r["stage"], r["step"]) for r in expected]
    losses = [(r["metrics"].get(f"{r['stage']}/loss")) for r in rows]
    assert losses == [(r["metrics"].get(f"{r['stage']}/loss")) for r in expected]


def test_other_data_train_everything(make_dataset, tiny_config, store, tmp_path, steps):
    make_dataset()
    execute(tiny_config(), tmp_path / "first", store)
    steps.clear()
    other = make_dataset("tests/pendulum/other-v0", num_episodes=4)
    execute(tiny_config(other), tmp_path / "second", store)
    assert set(steps) == {"behavior", "critic", "energy"}


@pytest.mark.parametrize("stage", ["behavior", "critic", "energy"])
def test_an_interrupted_run_goes_on_and_gives_what_it_trains(stage, make_dataset, tiny_config, store, tmp_path, steps):
    make_dataset()
    config, folder = tiny_config(), tmp_path / "broken"
    with pytest.raises(Interrupted):
        execute(config, folder, store, on_progress=lambda p: (p.stage, p.step) == (stage, 50))
    assert not store._held
    execute(config, folder, store)
    assert len(store.entries()) == 3
    assert {name: count for name, count in steps.items() if count != 60} == {}
    whole = execute(config, tmp_path / "whole")
    assert rundir.read_result(folder).evaluations == whole.evaluations
    assert execute(config, tmp_path / "again", store).steps_reused == 180


def test_a_run_that_takes_every_stage_has_the_curves_of_the_one_that_trained_them(
    make_dataset, tiny_config, store, tmp_path
):
    make_dataset()
    config = tiny_config(evaluation__num_curve_points=2, evaluation__num_curve_episodes=1)
    first = execute(config, tmp_path / "first", store)
    again = execute(config, tmp_path / "again", store)
    assert again.steps_reused == 180
    assert [point.method for point in first.curve] == ["diffusion-bc"] * 3 + [""] * 3
    assert again.curve == first.curve
    assert again.diagnostics == first.diagnostics


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"sampling__guidance_scale": 2.0}, {"diffusion-bc"}),
        ({"sampling__temperature": 0.5}, set()),
        ({"evaluation__horizon": 5}, set()),
        ({"evaluation__num_curve_episodes": 2}, set()),
        ({"evaluation__num_episodes": 3}, {"diffusion-bc", ""}),
    ],
)
def test_evaluations_that_a_run_would_have_made_otherwise_are_not_taken(
    change, kept, make_dataset, tiny_config, store, tmp_path
):
    make_dataset()
    both = {"evaluation__num_curve_points": 1, "evaluation__num_curve_episodes": 1}
    first = execute(tiny_config(**both), tmp_path / "first", store)
    again = execute(tiny_config(**(both | change)), tmp_path / "again", store)
    assert again.steps_reused == 180
    assert {point.method for point in again.curve[:-1]} == kept
    assert list(again.curve[:-1]) == [point for point in first.curve[:-1] if point.method in kept]
    cost = {each.name: each.value for each in again.diagnostics}
    own = tiny_config(**(both | change)).sampling.guidance_scale
    assert cost["energy/guidance_scale"] == own, "its own, not the other's"


def test_a_curve_is_not_taken_of_a_policy_that_acts_by_another_stage_beside(make_dataset, tiny_config, store, tmp_path):
    """The closed form's policy acts by the behaviour model along the critic, which learns nothing from that model."""
    make_dataset()
    closed = {"energy__target": "analytic", "energy__expansion": "posterior_mean", "energy__steps": 0}
    short = {"evaluation__num_curve_points": 1, "evaluation__num_curve_episodes": 1}
    first = execute(tiny_config(**closed, **short), tmp_path / "first", store)
    again = execute(tiny_config(**closed, **short), tmp_path / "again", store)
    assert again.curve == first.curve
    assert [point.method for point in first.curve] == ["diffusion-bc", "diffusion-bc", "", ""]
    other = execute(tiny_config(**closed, **short, behavior__steps=70), tmp_path / "other", store)
    assert other.steps_reused == 60
    assert [point.method for point in other.curve] == ["diffusion-bc", "diffusion-bc", ""]


def test_a_stage_from_before_evaluations_were_kept_is_taken_without_them(make_dataset, tiny_config, store, tmp_path):
    make_dataset()
    config = tiny_config(evaluation__num_curve_points=1, evaluation__num_curve_episodes=1)
    execute(config, tmp_path / "first", store)
    for path in store.folder.glob("*.stage"):
        content = checkpoint.from_bytes(path.read_bytes(), path)
        path.write_bytes(checkpoint.to_bytes({key: content[key] for key in ("stage", "state", "rows")}))
    again = execute(config, tmp_path / "again", store)
    assert (again.steps_reused, len(again.curve)) == (180, 1)


# -- the store ---------------------------------------------------------------------------------------------


def test_two_that_want_a_stage_at_once_train_it_once(store):
    assert store.claim("a" * 24) is None
    other, got = StageStore(store.folder), []
    thread = threading.Thread(target=lambda: got.append(other.claim("a" * 24)))
    thread.start()
    time.sleep(0.8)
    assert got == []
    store.publish("a" * 24, {"x": 1})
    thread.join(timeout=10)
    assert got == [{"x": 1}]


def test_a_claim_goes_with_the_process_that_holds_it(store):
    code = (
        "import sys, time, pathlib; from aepo.runs.stage_store import StageStore\n"
        "StageStore(pathlib.Path(sys.argv[1])).claim('b' * 24); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    assert store.claim("b" * 24) is None


def test_a_damaged_stage_is_trained_again(store, capsys):
    store.claim("c" * 24)
    store.publish("c" * 24, {"x": 1})
    (path,) = store.folder.glob("*.stage")
    path.write_bytes(path.read_bytes()[:-1])
    assert store.claim("c" * 24) is None
    assert "is torn or changed" in capsys.readouterr().err
    assert not path.exists()


def test_pruning_deletes_what_was_used_longest_ago(store, capsys):
    for i, key in enumerate("abc"):
        store.claim(key * 24)
        store.publish(key * 24, {"x": torch.zeros(1000 + i)})
        time.sleep(0.02)
    assert store.claim("a" * 24) is not None  # used now
    assert [entry.key[0] for entry in store.entries()] == ["a", "c", "b"]
    size = store.entries()[0].num_bytes
    folder = str(store.folder)
    assert cli.run(["store", "list", folder, "--json"]) == 0
    assert [row["key"][0] for row in json.loads(capsys.readouterr().out)] == ["a", "c", "b"]
    assert cli.run(["store", "prune", folder, "--max-mb", str(1.5 * size / 1e6), "--json"]) == 0
    assert {row["key"][0] for row in json.loads(capsys.readouterr().out)} == {"b", "c"}
    assert cli.run(["store", "size", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == 1
    assert cli.run(["store", "size", folder]) == 0
    assert cli.run(["store", "size", f"{folder}/none"]) == CheckpointError.exit_status
    assert cli.run(["store", "prune", folder, "--max-mb", "-1"]) == 2


def test_a_store_that_cannot_be_written_costs_no_run(make_dataset, tiny_config, store, tmp_path, monkeypatch, capsys):
    make_dataset()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StageStore, "_path", lambda self, key: store.folder / "none" / key)
    result = execute(tiny_config(), tmp_path / "run", store)
    assert result.status == "finished"
    assert "the stage was not stored" in capsys.readouterr().err
