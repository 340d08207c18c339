"""Plan, record and live status without Ray; the contract with analysis."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aepo import config as configs
from aepo import method_table
from aepo.errors import CheckpointError, ConfigError, DataError, IncompleteError, ResourceError
from aepo.runs import run, rundir
from tune import plan as plans
from tune.commands import check_complete
from tune.plan import make_plan, pending, read_manifest, run_folder, write_manifest
from tune.runs_table import collect_rows, write_rows
from tune.spec import Resources, SweepSpec
from tune.status import LiveStatus
from tune.sweep import _slots

METHODS = method_table.presets()

CPU = torch.device("cpu")


@pytest.fixture
def sweep(make_dataset, tiny_config, tmp_path):
    """A sweep folder with three planned runs, two of them finished and one failed halfway."""
    dataset_id = make_dataset()
    grid = {"evaluation__grid_beta": (1.0, 3.0), "evaluation__grid_guidance_scale": (1.0,)}
    plan = [tiny_config(dataset_id, seed=seed, **grid) for seed in range(3)]
    folder = tmp_path / "sweep"
    write_manifest(folder, plan)
    for config in plan[:2]:
        place = run_folder(folder, config)
        run.execute(config, place, run.FolderStore(place), device=CPU)
    return folder, plan


def test_the_plan_is_tasks_times_seeds_and_survives_the_manifest(tmp_path):
    plan = make_plan(
        SweepSpec(
            task=("maze2d-umaze", "maze2d-medium"),
            dataset=("x/y-v0",),
            seeds=(0, 1),
            preset=("quick",),
            set={"sampling.beta": "2"},
        )
    )
    assert [(c.task, c.seed) for c in plan] == [
        (t, s) for t in ("maze2d-umaze", "maze2d-medium", "x/y-v0") for s in (0, 1)
    ]
    assert {c.sampling.beta for c in plan} == {2.0}
    write_manifest(tmp_path, plan)
    assert read_manifest(tmp_path) == plan
    assert json.loads((tmp_path / plans.MANIFEST).read_text())["versions"]["torch"] == torch.__version__


def test_several_presets_are_columns_and_an_override_changes_those_that_have_it():
    presets = ("best-smoke", "qgpo-smoke", "iql-smoke", "td3bc-smoke")
    overrides = {"energy.steps": "7", "critic.steps": "8"}
    plan = make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(0, 1), preset=presets, set=overrides))
    assert [(c.method, c.seed) for c in plan] == [
        (method, seed) for method in ("aepo", "qgpo", "iql", "td3bc") for seed in (0, 1)
    ]
    steps = [{name: stage.steps for name, stage in c.stages.items()} for c in plan[::2]]
    guided = {"behavior": 300, "critic": 8, "energy": 7}
    assert steps == [guided, guided, {"critic": 8, "actor": 600}, {"actor_critic": 900}]
    with pytest.raises(ConfigError, match=r"did you mean energy\.steps"):
        make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(0,), preset=presets, set={"energy.step": "7"}))


@pytest.mark.parametrize("budget", ["paper", "quick", "smoke"])
def test_every_method_takes_the_same_number_of_gradient_steps_but_those_of_an_energy_that_it_lacks(budget):
    presets = [f"{method}-{budget}" for method in METHODS]
    plan = make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(0,), preset=presets))
    all_steps, of_energy = plan[0].num_steps, plan[0].stages["energy"].steps
    for config in plan:
        lacks_energy = set(config.stages) == {"behavior", "critic"}
        assert config.num_steps == all_steps - of_energy * lacks_energy


def test_names_of_runs_are_safe_folders():
    (config,) = make_plan(SweepSpec(dataset=("../../etc/passwd-v0",), seeds=(0,), preset=("smoke",)))
    assert config.name == f"etc-passwd-v0-s0-{config.fingerprint}"


def test_runs_planned_twice_and_foreign_manifests_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="planned twice"):
        make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(1, 1), preset=("quick",)))
    with pytest.raises(CheckpointError, match="not a sweep"):
        read_manifest(tmp_path)
    (tmp_path / plans.MANIFEST).write_text('{"format": 99, "runs": {}}')
    with pytest.raises(CheckpointError, match="not a sweep of this version"):
        read_manifest(tmp_path)


def test_only_what_has_not_ended_is_pending(sweep):
    folder, plan = sweep
    assert pending(folder, plan, retry_failed=False) == [plan[2]]
    place = run_folder(folder, plan[0])
    rundir.write_result(place, dataclasses.replace(rundir.read_result(place), status="failed"))
    assert pending(folder, plan, retry_failed=False) == [plan[2]]
    assert pending(folder, plan, retry_failed=True) == [plan[0], plan[2]]


def test_a_run_without_a_result_is_a_row_with_its_reason(sweep):
    folder, plan = sweep
    rows = collect_rows(folder, plan, errors={plan[2].name: "ActorDiedError: killed"})
    assert [row.status for row in rows] == ["finished", "finished", "failed"]
    with pytest.raises(IncompleteError, match=f"1 of 3 runs have no result: {plan[2].name}: ActorDiedError"):
        check_complete(rows)
    check_complete(rows[:2])


@pytest.mark.parametrize("rows_at_once", [1, 2, 200])
def test_analysis_reads_what_tune_writes(rows_at_once, sweep, capsys, monkeypatch):
    from analysis.load import load_runs

    folder, plan = sweep
    monkeypatch.setattr("tune.runs_table.ROWS_AT_ONCE", rows_at_once)
    rows = collect_rows(folder, plan, errors={plan[2].name: "killed"})
    write_rows(folder, rows)
    table = load_runs(folder)
    assert list(table["run"]) == [config.name for config in plan]
    assert list(table["score"])[:2] == [row.score for row in rows[:2]]

    from aepo import cli

    assert cli.run(["report", str(folder), "--json"]) == 3
    capsys.readouterr()
    assert cli.run(["report", str(folder), "--json", "--allow-missing"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["num_failed"]) for row in report] == [("aepo", 1), ("diffusion-bc", 1)]
    assert report[0]["scores"] == pytest.approx([row.score for row in rows[:2]])


def table_of(folder, plan):
    folder.mkdir()
    write_rows(folder, collect_rows(folder, plan))
    return folder


@settings(max_examples=30)
@given(data=st.data(), method=st.sampled_from(sorted(METHODS)), seed=st.integers(0, 3))
def test_runs_with_any_other_setting_have_no_mean_whatever_their_seeds(data, method, seed, tmp_path_factory):
    """Any number of the config, made another one: refused by its name; the seed alone is no setting."""
    from analysis.load import load_runs

    home = tmp_path_factory.mktemp("two")
    (config,) = make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(1,), preset=(f"{method}-smoke",)))
    numbers = [key for key in configs.used_settings(config) if key.endswith(("steps", "size", "rate", "episodes"))]
    key = data.draw(st.sampled_from(numbers))
    group, _, name = key.partition(".")
    value = getattr(getattr(config, group), name)
    changed = configs.with_overrides(config, {key: value / 2 if isinstance(value, float) else value + 8})
    first = table_of(home / "a", [config])
    same = table_of(home / "b", [dataclasses.replace(config, seed=2)])
    other = table_of(home / "c", [dataclasses.replace(changed, seed=seed)])
    assert len(load_runs(first, same)) == 2
    with pytest.raises(DataError, match=rf"differ in settings, .* in {re.escape(key)} \("):
        load_runs(first, other)


# -- scheduling --------------------------------------------------------------------------------------------


def node(cpus, gpus=0.0, gib=64.0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus, "memory": gib * 2**30}}


@pytest.mark.parametrize(
    ("nodes", "resources", "slots"),
    [
        ([node(2)], Resources(), 2),
        ([node(2), node(3, alive=False)], Resources(), 2),
        ([node(3), node(3)], Resources(cpus=2), 2),
        ([node(2)], Resources(cpus=0.25), 8),
        ([node(16, gpus=2)], Resources(cpus=1, gpus=0.5), 4),
        ([node(64, gib=6.5)], Resources(), 5),
    ],
)
def test_as_many_trials_run_at_once_as_fit_on_single_nodes(nodes, resources, slots):
    assert _slots(nodes, resources, 1.2) == slots


def test_a_cluster_without_room_for_one_trial_is_refused_instead_of_waiting_forever():
    with pytest.raises(ResourceError, match="one trial wants 1 CPU, 1 GPU"):
        _slots([node(8)], Resources(gpus=1), 1.2)


def test_the_board_shows_stage_step_rate_time_left_and_score(sweep):
    folder, plan = sweep
    live = LiveStatus(folder, plan)
    live.refresh()
    assert [line.split()[1] for line in live.lines()] == ["finished", "finished"]
    spool = run_folder(folder, plan[2]) / rundir.METRICS
    spool.parent.mkdir(parents=True)
    rows = [
        {
            "time": 100.0 + t,
            "stage": "critic",
            "step": 10 * t,
            "num_steps": 60,
            "metrics": {"critic/loss": 1.0},
        }
        for t in range(1, 4)
    ]
    spool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    live.refresh()
    (line,) = live.lines()
    assert "critic 30/60  10 steps/s" in line
    assert live.lines() == [], "what has not moved is not repeated"
