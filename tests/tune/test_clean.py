"""What finished runs no longer need goes; nothing else does."""

import dataclasses
import json
import time

import psutil
import pytest

from aepo import cli
from aepo.errors import BusyError, ConfigError
from aepo.runs import rundir
from tune.clean import deletable, of_run
from tune.estimate import Total
from tune.plan import run_folder, write_manifest
from tune.status import sweep_lock
from tune.sweep import taken
from tune.usage import Meter

KEPT = ("config.json", "metrics.jsonl", "policy.safetensors", "result.json", "log.txt", "kernels.json", "grid.png")
GONE = ("state.ckpt", "state.previous.ckpt")


@pytest.fixture
def sweep(tmp_path, tiny_config):
    """A folder of two finished runs with all their files."""
    plan = [tiny_config(seed=seed) for seed in (0, 1)]
    write_manifest(tmp_path / "sweep", plan)
    for config in plan:
        finish(tmp_path / "sweep", config)
    for name in ("stages/a.stage", "tune/state.json", "runs.parquet", "report/report.md", "mlflow.db"):
        (tmp_path / "sweep" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sweep" / name).write_bytes(b"x" * 10)
    return tmp_path / "sweep", plan


def finish(sweep, config, status="finished"):
    folder = run_folder(sweep, config)
    (folder / "train").mkdir(parents=True)
    for name in (*KEPT, *GONE, "train/state"):
        (folder / name).write_bytes(b"x" * 1000)
    result = dataclasses.replace(rundir.describe(config, folder), status=status, error=None)
    rundir.write_result(folder, result)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_named_goes_and_it_is_shown_first(sweep, capsys):
    folder, plan = sweep
    before = names(folder)
    assert cli.run(["clean", str(folder), "--dry-run", "--json"]) == 0
    shown = {row["what"]: row for row in json.loads(capsys.readouterr().out)["items"]}
    assert shown["checkpoints"] == {"what": "checkpoints", "files": 4, "mb": 0.004}
    assert names(folder) == before
    assert cli.run(["clean", str(folder)]) == 2  # nobody to ask
    assert "give --yes to delete" in capsys.readouterr().err.replace("\n", " ")
    assert names(folder) == before
    assert cli.run(["clean", str(folder), "--yes"]) == 0
    capsys.readouterr()
    runs = [run_folder(folder, config).relative_to(folder) for config in plan]
    gone = {f"{run}/{name}" for run in runs for name in (*GONE, "train/state")} | {"stages/a.stage", "tune/state.json"}
    assert before - names(folder) == gone
    assert cli.run(["clean", str(folder), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == []


def test_runs_that_go_on_keep_everything_and_so_does_their_store(sweep, tiny_config):
    folder, plan = sweep
    (run_folder(folder, plan[1]) / "result.json").unlink()
    found = {str(item.path.relative_to(folder)) for item in deletable(folder)}
    first = run_folder(folder, plan[0]).relative_to(folder)
    assert found == {f"{first}/{name}" for name in (*GONE, "train")}
    finish(folder, tiny_config(seed=2), status="failed")
    assert not list(of_run(run_folder(folder, tiny_config(seed=2))))
    (run_folder(folder, plan[0]) / "result.json").write_text("torn")
    assert not deletable(run_folder(folder, plan[0]))


def test_a_sweep_that_is_carried_out_and_a_folder_without_runs_are_refused(sweep, tmp_path):
    with sweep_lock(sweep[0]), pytest.raises(BusyError, match="is carried out now"):
        deletable(sweep[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no run in"):
        deletable(tmp_path / "empty")


def test_a_meter_counts_this_process_and_its_children(monkeypatch):
    import subprocess
    import sys

    from tune import usage

    monkeypatch.setattr(usage, "INTERVAL_S", 0.0)
    meter = Meter()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        own, end = psutil.Process(child.pid), time.monotonic() + 60
        while sum(own.cpu_times()[:2]) < 0.5 and time.monotonic() < end:
            meter.look()
            time.sleep(0.05)
        meter.look()
        used = sum(own.cpu_times()[:2])
    finally:
        child.kill()
        child.wait()
    meter.look()  # what has ended still counts
    assert meter.core_hours * 3600 >= 0.5
    assert meter.core_hours * 3600 < used + 30
    assert meter.wall_hours > 0


def test_what_a_sweep_took_stands_beside_what_was_expected():
    meter = Meter()
    assert taken(meter, None).startswith("took 0 core hours") or "core hours" in taken(meter, None)
    expected = Total(
        core_hours=1.5,
        gpu_hours=0,
        wall_hours=0.75,
        start_hours=0.1,
        evaluation_hours=0.1,
        saved_hours=0,
        slots=2,
        disk_gb=0,
    )
    assert "estimated: 1.5 core hours, 0.75 hours on the clock, start-up and evaluation" in taken(meter, expected)
    assert "core hours" not in taken(meter, expected, on_cluster=True)
