"""Real sweeps on a private Ray: the happy path, a killed worker, a killed sweep."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pyarrow.parquet as pq
import pytest

from aepo.errors import ResourceError
from aepo.runs import rundir, spool
from tests.examples import wait_for
from tune.mlflow_sink import find_store

pytestmark = pytest.mark.ray


def sweep_process(folder, dataset_id, *extra, flags=()):
    """Start `aepo sweep` of two seeds in a process of its own."""
    argv = [
        sys.executable, "-m", "aepo", "sweep", "--dataset", dataset_id, "--seeds", "0", "1", "--preset", "smoke",
        "--out", str(folder), "--checkpoint-s", "0.5", "--json", *flags, "--set", *extra,
    ]  # fmt: skip
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = [f"{stage}.{key}={value}" for stage in ("behavior", "critic", "energy") for key, value in
        (("steps", 1500), ("batch_size", 16), ("hidden_size", 16))]  # fmt: skip


def workers(folder):
    """Processes that train a run of this sweep now: those that hold its log open. Not a user's own."""
    runs = f"{folder.resolve()}/runs/"
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if any(file.path.startswith(runs) and file.path.endswith("log.txt") for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def net_connections(process):
    try:
        return process.net_connections("inet")
    except psutil.Error:
        return []


def policies(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob(f"runs/*/{rundir.POLICY}")}


def stages(folder):
    rows = [row for path in folder.glob(f"runs/*/{rundir.METRICS}") for row in spool.read_spool(path)[0]]
    return {row["stage"] for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken sweep, and the environment in which it ran."""
    from tests.examples import write_pendulum

    home = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        patch.setenv("AEPO_CACHE", str(home / "cache"))
        dataset_id = write_pendulum()
        process = sweep_process(home / "whole", dataset_id, *LONG)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        yield home, dataset_id, json.loads(out)


@pytest.fixture(autouse=True)
def _same_environment(whole, monkeypatch, _own_folders):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(whole[0] / "minari"))
    monkeypatch.setenv("AEPO_CACHE", str(whole[0] / "cache"))


def test_a_sweep_ends_with_all_rows_in_the_table_and_in_mlflow(whole):
    from mlflow import MlflowClient

    home, _, rows = whole
    folder = home / "whole"
    assert [row["status"] for row in rows] == ["finished", "finished"]
    table = pq.read_table(folder / "runs.parquet").to_pylist()
    assert [row["run"] for row in table] == [row["run"] for row in rows]
    client = MlflowClient(find_store("", folder))
    for row in table:
        entry = client.get_run(row["mlflow_run_id"])
        assert entry.info.status == "FINISHED"
        assert {"behavior/loss", "critic/loss", "energy/loss", "final/aepo/score"} <= set(entry.data.metrics)


def test_the_same_command_again_recomputes_nothing(whole):
    home, dataset_id, rows = whole
    before = policies(home / "whole")
    process = sweep_process(home / "whole", dataset_id, *LONG)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out) == rows
    assert "2 ended, 0 to do" in err
    assert policies(home / "whole") == before


@pytest.mark.parametrize("stage", ["critic"])
def test_a_killed_worker_is_replaced_and_the_weights_are_those_of_the_unbroken_sweep(whole, stage):
    home, dataset_id, rows = whole
    folder = home / f"killed-{stage}"
    process = sweep_process(folder, dataset_id, *LONG)
    wait_for(lambda: stage in stages(folder))
    family = psutil.Process(process.pid).children(recursive=True)
    listening = [c.laddr.ip for p in family for c in net_connections(p) if c.status == psutil.CONN_LISTEN]
    assert listening, "Ray's servers"
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    victim = wait_for(lambda: workers(folder))[0]
    victim.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert policies(folder) == policies(home / "whole")
    results = json.loads(out)
    assert [row["evaluations"] for row in results] == [row["evaluations"] for row in rows]
    logs = [(folder / "runs" / row["run"] / "log.txt").read_text() for row in results]
    assert sorted(text.count(" starts ") for text in logs) == [1, 2], "one run was started twice"


def test_a_killed_trial_driver_leaves_no_core_reserved(whole):
    home, dataset_id, _ = whole
    folder = home / "killed-driver"
    short = [*LONG, "behavior.steps=600", "critic.steps=600", "energy.steps=40"]  # two threads may share their cores
    process = sweep_process(folder, dataset_id, *short, flags=("--cpus", "2"))
    wait_for(lambda: "behavior" in stages(folder))
    family = psutil.Process(process.pid).children(recursive=True)
    drivers = [child for child in family if "ImplicitFunc" in " ".join(child.cmdline())]
    assert len(drivers) == 1
    drivers[0].send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [row["status"] for row in json.loads(out)] == ["finished", "finished"]


def test_a_killed_sweep_goes_on_with_the_same_command(whole):
    home, dataset_id, _ = whole
    folder = home / "killed-sweep"
    process = sweep_process(folder, dataset_id, *LONG)
    wait_for(lambda: "critic" in stages(folder))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not workers(folder))
    process = sweep_process(folder, dataset_id, *LONG)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert policies(folder) == policies(home / "whole")


def test_a_sweep_that_is_asked_to_stop_ends_at_checkpoints_and_goes_on(whole):
    home, dataset_id, _ = whole
    folder = home / "stopped"
    process = sweep_process(folder, dataset_id, *LONG)
    wait_for(lambda: "critic" in stages(folder))
    looking = [sys.executable, "-m", "aepo", "sweep", "--out", str(folder)]
    subprocess.run([*looking, "--stop"], check=True, capture_output=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "stopped as asked" in err
    assert {row["status"] for row in json.loads(out)} <= {"missing", "finished"}
    assert "missing" in {row["status"] for row in json.loads(out)}
    status = subprocess.run([*looking, "--status", "--json"], capture_output=True, text=True, check=True)
    assert {row["state"] for row in json.loads(status.stdout)} <= {"interrupted", "finished"}
    process = sweep_process(folder, dataset_id, *LONG)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert policies(folder) == policies(home / "whole")
    logs = [path.read_text() for path in folder.glob("runs/*/log.txt")]
    assert any("continues behind behavior step 1,500" in text for text in logs)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--runner", "inline"), ("--workers-per-run", "2")])
def test_the_other_ways_to_run_give_the_same_rows(whole, flags):
    home, dataset_id, rows = whole
    folder = home / flags[-1]
    short = [*LONG, *(f"{stage}.steps=40" for stage in ("behavior", "critic", "energy"))]
    process = sweep_process(folder, dataset_id, *(LONG if flags[1] == "inline" else short), flags=flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    results = json.loads(out)
    assert [row["status"] for row in results] == ["finished", "finished"]
    if flags[1] == "inline":
        assert policies(folder) == policies(home / "whole")
        assert [row["evaluations"] for row in results] == [row["evaluations"] for row in rows]


def test_a_sweep_that_does_not_fit_is_refused(whole, tmp_path):
    process = sweep_process(tmp_path, whole[1], *LONG, "--cpus", "999")
    out, err = process.communicate(timeout=120)
    assert process.returncode == ResourceError.exit_status
    assert out == ""
    assert "one trial wants 999 CPU" in err
    assert not list(tmp_path.glob(f"runs/*/{rundir.RESULT}"))
