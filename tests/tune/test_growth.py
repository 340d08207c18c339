"""What a sweep's folder plans when another command comes: it grows, other settings replace the old ones."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aepo import cli
from aepo.errors import CheckpointError
from aepo.runs import run
from analysis.load import load_runs
from tests import tracked
from tune import sweep as sweeps
from tune.plan import MANIFEST, grow, make_plan, read_manifest, run_folder, write_manifest
from tune.spec import SweepSpec

pytestmark = tracked.MLFLOW_WARNINGS
CPU = torch.device("cpu")
TINY = ["critic.steps=20", "actor.steps=20", "critic.hidden_size=16", "actor.hidden_size=16"]


@pytest.fixture
def sweep(make_dataset, tmp_path, monkeypatch):
    """A function that carries `aepo sweep` of IQL out in one folder, without Ray; it returns the exit status."""
    dataset = make_dataset(num_episodes=1)

    def run_here(folder, plan, _):
        for config in plan:
            place = run_folder(folder, config)
            place.mkdir(parents=True)
            run.execute(config, place, run.FolderStore(place), device=CPU)
        return {}

    monkeypatch.setattr(sweeps, "_run_on_ray", run_here)

    def carry_out(*words, settings=()):
        words = ["sweep", "--dataset", dataset, "--preset", "iql-smoke", "--out", str(tmp_path / "sweep"), *words]
        return cli.run([*words, "--set", *TINY, *settings])

    return carry_out


def seeds(folder):
    return sorted(pq.read_table(folder / "runs.parquet")["seed"].to_pylist())


def test_one_more_seed_stands_beside_those_that_the_folder_has(sweep, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert sweep("--seeds", "0", "1") == 0
    capsys.readouterr()
    assert sweep("--seeds", "2", "--json") == 0
    out, messages = capsys.readouterr()
    assert [row["seed"] for row in json.loads(out)] == [2]
    assert "2 other runs were planned here before, 0 of them without a result" in messages
    assert seeds(folder) == [0, 1, 2]
    assert sorted(config.seed for config in read_manifest(folder)) == [0, 1, 2]
    assert cli.run(["report", str(folder)]) == 0
    capsys.readouterr()
    assert cli.run(["sweep", "--status", "--out", str(folder), "--json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"finished"}


def test_other_settings_take_the_place_of_the_old_ones_and_the_command_says_so(sweep, tmp_path, capsys):
    folder, uri = tmp_path / "sweep", f"sqlite:///{tmp_path}/sweep/mlflow.db"
    assert sweep("--seeds", "0", "1") == 0
    typed = ("--seeds", "1", "2")
    capsys.readouterr()
    assert sweep(*typed, "--dry-run", settings=["critic.expectile=0.9"]) == 0
    assert "2 runs are no longer planned in this folder" in capsys.readouterr().err
    assert seeds(folder) == [0, 1]
    assert sweep(*typed, settings=["critic.expectile=0.9"]) == 0
    assert "2 runs are no longer planned in this folder" in capsys.readouterr().err
    for source in (str(folder), "mlflow:aepo/sweep"):
        assert sorted(load_runs(source, tracking_uri=uri)["seed"]) == [1, 2]
    assert len(list((folder / "runs").iterdir())) == 4
    assert sweep("--seeds", "0", "1") == 0  # the old command again, of which nothing is repeated
    for source in (str(folder), "mlflow:aepo/sweep"):
        assert sorted(load_runs(source, tracking_uri=uri)["seed"]) == [0, 1]


def test_a_mistyped_seed_leaves_with_only(sweep, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert sweep("--seeds", "0", "22") == 0
    assert sweep("--seeds", "0", "--only") == 0
    assert "1 run is no longer planned" in capsys.readouterr().err
    assert seeds(folder) == [0]
    document = json.loads((folder / MANIFEST).read_text())
    document["runs"] = {"old": {"method": "iql"}}
    (folder / MANIFEST).write_text(json.dumps(document))
    assert sweep("--seeds", "0") == CheckpointError.exit_status
    assert "or --only for these runs alone" in capsys.readouterr().err.replace("\n", " ")
    assert sweep("--seeds", "0", "--only") == 0


TASKS, BUDGETS = ("maze2d-umaze", "maze2d-open"), ("quick", "smoke")
PLANS = st.lists(st.tuples(*map(st.sampled_from, (TASKS, BUDGETS, (0, 1)))), min_size=1, max_size=4, unique=True)


@given(plans=st.lists(PLANS, min_size=1, max_size=3))
def test_nothing_leaves_a_plan_but_other_settings_of_a_task_and_method(plans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    held = set()
    for keys in plans:
        plan = [make_plan(SweepSpec(task=(task,), seeds=(seed,), preset=(kind,)))[0] for task, kind, seed in keys]
        whole, leaving = grow(folder, plan)
        write_manifest(folder, whole)
        tasks, kinds = {key[0] for key in keys}, {key[:2] for key in keys}
        kept = {key for key in held if key[0] not in tasks or key[:2] in kinds} - set(keys)
        assert [(c.task, c.preset, c.seed) for c in whole][len(whole) - len(keys) :] == keys
        assert {(c.task, c.preset, c.seed) for c in whole} == kept | set(keys)
        assert {(c.task, c.preset, c.seed) for c in leaving} == held - kept - set(keys)
        assert len(whole) == len(kept) + len(keys)
        held = kept | set(keys)
        assert grow(folder, plan, only=True) == (plan, [c for c in whole if c not in plan])
