"""A sweep of 8 tasks x 3 seeds that is broken in five ways, against the same sweep left alone. Run by hand.

    python -m tests.faults [--out FOLDER]

On a Ray of two local nodes, with an MLflow server, one after the other are killed (SIGKILL): a Train worker, a trial's
driver, the sweep's own process (the same command starts it again), the second node, and the tracking server (both
started again by this script). The tables must be equal, no run twice, no row missing, and what is computed again at
most what lies between two checkpoints.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from aepo.config import flatten
from aepo.runs import rundir, spool

TASKS = [f"{suite}-{maze}" for suite in ("maze2d", "pointmaze") for maze in ("open", "umaze", "medium", "large")]
SEEDS = ["0", "1", "2"]
CHECKPOINT_S = 2.0
STEPS = 2000
SETTINGS = [
    f"{stage}.{key}={value}"
    for stage in ("behavior", "critic", "energy")
    for key, value in (("steps", STEPS), ("batch_size", 32), ("hidden_size", 16))
]
FAULTS = ("worker", "trial driver", "sweep", "node", "tracking server")


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition, timeout_s: float, what: str):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise SystemExit(f"waited {timeout_s:.0f} s in vain for {what}")


def start_sweep(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "aepo", "sweep", "--task", *TASKS, "--seeds", *SEEDS, "--preset", "smoke"]
    words += ["--set", *SETTINGS, "evaluation.num_episodes=2", "--out", str(folder)]
    words += ["--checkpoint-s", str(CHECKPOINT_S), "--yes", "--json", *flags]
    output = (folder.parent / f"{folder.name}.err").open("a")
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=output, text=True)


def finish(process: "subprocess.Popen[str]", timeout_s: float) -> list[dict]:
    out, _ = process.communicate(timeout=timeout_s)
    if process.returncode != 0:
        raise SystemExit(f"the sweep ended with status {process.returncode}")
    return json.loads(out)


class Node:
    """A Ray node as a process group of its own."""

    def __init__(self, folder: Path, *flags: str):
        words = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", "1", *flags]
        words += ["--node-ip-address", "127.0.0.1", "--disable-usage-stats"]
        output = (folder / "ray.log").open("a")
        self.process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)

    def family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        for process in self.family():
            kill(process)
        self.process.wait()


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def kill_family(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            kill(member)


def start_tracking(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    output = (folder / "mlflow.log").open("a")
    process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
    wait_for(lambda: answers(port), 120, "the tracking server")
    return process


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def holders(sweep: Path) -> list[psutil.Process]:
    """Processes that train a run of the sweep now: those that hold its log open."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if any(f.path.startswith(f"{sweep}/runs/") and f.path.endswith("log.txt") for f in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def trial_drivers(family: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in family:
        try:
            if "run_trial" in " ".join(process.cmdline()) or "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def position(sweep: Path) -> int:
    """Gradient steps of all runs that the spools know."""
    stages = {"behavior": 0, "critic": STEPS, "energy": 2 * STEPS}
    total = 0
    for path in sweep.glob(f"runs/*/{rundir.METRICS}"):
        rows, _ = spool.read_spool(path)
        total += stages[rows[-1]["stage"]] + rows[-1]["step"] if rows else 0
    return total


def recomputed(sweep: Path) -> list[tuple[str, int, float]]:
    """(run, steps, seconds) that were computed again, from the logs and the times of the spooled rows."""
    found = []
    for folder in sorted((sweep / "runs").iterdir()):
        text = (folder / "log.txt").read_text()
        rows, _ = spool.read_spool(folder / rundir.METRICS)
        place = {"behavior": 0, "critic": STEPS, "energy": 2 * STEPS}
        steps = [place[row["stage"]] + row["step"] for row in rows]
        for gap in range(1, len(rows)):
            if rows[gap]["time"] - rows[gap - 1]["time"] < CHECKPOINT_S:
                continue
            reached, last_s = steps[gap - 1], rows[gap - 1]["time"]
            for match in re.finditer(r"continues behind (.*)", text):
                behind = sum(int(number.replace(",", "")) for number in re.findall(r"step ([\d,]+)", match[1]))
                assert match[1].count("step") == 3, f"a line of {folder.name}'s log is broken: {match[0]!r}"
                before = [row["time"] for row, step in zip(rows, steps, strict=True) if step <= behind]
                if behind <= reached and before and 0 <= last_s - before[-1] < 60:
                    found.append((folder.name, reached - behind, last_s - before[-1]))
    return found


def compare(whole: list[dict], broken: list[dict], sweep: Path, whole_sweep: Path, uri: str) -> list[str]:
    """Return what differs between the two, a line each."""
    faults = []
    ours = {row["run"]: row for row in broken}
    if len(broken) != len(ours):
        faults.append("a run stands twice in the table")
    if missing := {row["run"] for row in whole} ^ set(ours):
        faults.append(f"rows that only one table has: {sorted(missing)}")
    same = ("status", "score", "return_mean", "num_episodes", "steps", "evaluations", "dataset_digest", "fingerprint")
    for row in whole:
        other = ours.get(row["run"], {})
        faults += [f"{row['run']}: {key} differs" for key in same if row[key] != other.get(key)]
        policies = [(each / "runs" / row["run"] / rundir.POLICY).read_bytes() for each in (whole_sweep, sweep)]
        if policies[0] != policies[1]:
            faults.append(f"{row['run']}: the weights differ")
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    for row in broken:
        entry = client.get_run(row["mlflow_run_id"])
        if entry.info.status != "FINISHED":
            faults.append(f"{row['run']}: MLflow says {entry.info.status}")
        rows, _ = spool.read_spool(sweep / "runs" / row["run"] / rundir.METRICS)
        for key in ("behavior/loss", "critic/loss", "energy/loss"):
            wanted = [r["step"] for r in rows if key in flatten(r["metrics"])]
            sent = sorted(metric.step for metric in client.get_metric_history(row["mlflow_run_id"], key))
            if sent != wanted:
                faults.append(f"{row['run']}: {key}: MLflow has {len(sent)} rows, the spool {len(wanted)}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    folder = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="aepo-faults-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log(f"everything lies in {folder}")
    os.environ |= {
        "MINARI_DATASETS_PATH": str(folder / "minari"),
        "AEPO_CACHE": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
    }
    for task in TASKS:
        words = [sys.executable, "-m", "aepo", "data", "collect", task, "--steps", "5000", "--json"]
        subprocess.run(words, check=True, capture_output=True)
    log("the sweep left alone")
    begin = time.monotonic()
    whole = finish(start_sweep(folder / "whole"), 3600)
    log(f"took {time.monotonic() - begin:.0f} s")

    gcs, tracking_port = free_port(), free_port()
    head = Node(folder, "--head", "--port", str(gcs), "--include-dashboard", "false", "--temp-dir", "/tmp/aepo-faults")
    wait_for(lambda: answers(gcs), 120, "Ray's head")
    second = Node(folder, "--address", f"127.0.0.1:{gcs}")
    tracking = start_tracking(folder, tracking_port)
    uri = f"http://127.0.0.1:{tracking_port}"
    sweep = folder / "broken"
    flags = ("--address", f"127.0.0.1:{gcs}", "--tracking-uri", uri)
    log("the sweep that is broken")
    begin = time.monotonic()
    process = start_sweep(sweep, *flags)
    total = len(TASKS) * len(SEEDS) * 3 * STEPS
    try:
        for number, fault in enumerate(FAULTS, 1):
            share = total * number / 8
            wait_for(lambda share=share: position(sweep) > share, 1800, fault)
            victims = wait_for(lambda: holders(sweep), 300, "a worker")
            log(f"killing: {fault} (at {position(sweep):,} of {total:,} steps)")
            if fault == "worker":
                kill(victims[0])
            elif fault == "trial driver":
                kill(wait_for(lambda: trial_drivers(head.family()), 60, "a trial's driver")[0])
            elif fault == "sweep":
                process.kill()
                process.wait()
                wait_for(lambda: not holders(sweep), 120, "the end of its workers")
                process = start_sweep(sweep, *flags)
            elif fault == "node":
                inside = {p.pid for p in second.family()}
                wait_for(lambda inside=inside: inside & {p.pid for p in holders(sweep)}, 300, "a worker on that node")
                second.kill()
                second = Node(folder, "--address", f"127.0.0.1:{gcs}")
            else:
                kill_family(tracking)
                tracking.wait()
                time.sleep(20)
                tracking = start_tracking(folder, tracking_port)
        broken = finish(process, 3600)
        log(f"took {time.monotonic() - begin:.0f} s")
        faults = compare(whole, broken, sweep, folder / "whole", uri)
        for name, steps, seconds in recomputed(sweep):
            log(f"computed again: {steps:,} steps, {seconds:.1f} s of {name}")
            if seconds > 2 * CHECKPOINT_S + 1:
                faults.append(
                    f"{name}: {seconds:.1f} s were computed again, a checkpoint is stored every {CHECKPOINT_S} s"
                )
        starts = sum((f / "log.txt").read_text().count(" starts ") for f in (sweep / "runs").iterdir())
        log(f"{len(broken)} runs, {starts} starts of a worker, {len(faults)} differences")
        print("\n".join(faults) or "the tables, weights and tracked metrics are equal")
        sys.exit(1 if faults else 0)
    finally:
        process.kill()
        second.kill()
        head.kill()
        kill_family(tracking)


if __name__ == "__main__":
    main()
