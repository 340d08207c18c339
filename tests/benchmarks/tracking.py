"""What MLflow has of 64 runs that log at once, and when. Run by hand: python -m tests.benchmarks.tracking [STORE ...].

Processes write the runs' spools as training does; one Tracker ships them every five seconds, as a sweep does. Then all
is read back. Stores: sqlite, server-sqlite, server-postgres; the last wants PostgreSQL's programs (Debian: postgresql),
psycopg (pip install 'psycopg[binary]') and, for root, a user that may run them.
"""

import argparse
import contextlib
import dataclasses
import getpass
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from aepo import files, tasks
from aepo.presets import preset
from aepo.runs import rundir, spool
from tune.mlflow_sink import mlflow_tracker
from tune.plan import run_folder, write_manifest
from tune.sweep import SHIP_INTERVAL_S

NUM_METRICS, NUM_PROCESSES = 10, 4
STORES = ("sqlite", "server-sqlite", "server-postgres")


def write_spools(folders, num_rows, interval_s):
    """Write rows at a steady rate, a thread per run."""

    def write(folder):
        spooled = spool.Spool(folder / rundir.METRICS, preset("quick", tasks.find("maze2d-umaze"), 0))
        begin = time.monotonic()
        for step in range(num_rows):
            time.sleep(max(0.0, begin + step * interval_s - time.monotonic()))
            metrics = {f"critic/{i}": step + i / 16 for i in range(NUM_METRICS)}
            spooled.write("critic", step, metrics)
        spooled.close()

    threads = [threading.Thread(target=write, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def group(words, log, **kwargs):
    """A process and all that it starts, ended with the body."""
    with log.open("ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True, **kwargs)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, log, timeout_s=120.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.1)
    raise SystemExit(f"no answer:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def postgres(folder):
    """A PostgreSQL of its own; yields its URI. It refuses root, so root runs it as the user postgres."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or importlib.util.find_spec("psycopg") is None:
        raise SystemExit("no PostgreSQL under /usr/lib/postgresql, or no psycopg")
    is_root = getpass.getuser() == "root"
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if is_root else []
    data, log, port = folder / "data", folder / "postgres.log", free_port()
    data.mkdir()
    if is_root:
        shutil.chown(data, "postgres", "postgres")
    subprocess.run(
        [*user, programs[-1] / "initdb", "-D", data, "-A", "trust", "-U", "mlflow"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    words = [*user, programs[-1] / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", data]
    with group(words, log, cwd="/"):
        wait_for(lambda: socket.create_connection(("127.0.0.1", port), timeout=1).close() or True, log)
        ready = [programs[-1] / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        wait_for(lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, log)
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"


@contextlib.contextmanager
def server(folder, database):
    """An MLflow server with enough database connections and without its job runner; yields its URI."""
    port, log = free_port(), folder / "server.log"
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    words += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "20",
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "20",
    }
    with group(words, log, env={**os.environ, **settings}):
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200, log)
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def open_store(name, folder):
    with contextlib.ExitStack() as stack:
        database = f"sqlite:///{folder}/mlflow.db"
        if name == "server-postgres":
            database = stack.enter_context(postgres(folder))
        yield database if name == "sqlite" else stack.enter_context(server(folder, database))


def measure(name, options):
    """Return one row of the table."""
    from mlflow import MlflowClient

    calls = Counter()
    for method in ("create_run", "log_batch"):
        plain = getattr(MlflowClient, method)

        def counted(*args, plain=plain, method=method, **kwargs):
            calls[method] += 1
            return plain(*args, **kwargs)

        setattr(MlflowClient, method, counted)
    folder = Path(tempfile.mkdtemp(prefix="aepo-tracking-"))
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        uri = stack.enter_context(open_store(name, folder))
        base = preset("best-smoke", tasks.find("maze2d-umaze"), 0)
        plan = [dataclasses.replace(base, seed=seed) for seed in range(options.runs)]
        sweep = folder / "sweep"
        write_manifest(sweep, plan)
        places = [run_folder(sweep, config) for config in plan]
        for config, place in zip(plan, places, strict=True):
            place.mkdir(parents=True)
            files.write_json(place / rundir.CONFIG, dataclasses.asdict(config))
        num_rows = round(options.rows_per_s * options.seconds)
        writers = [
            multiprocessing.get_context("spawn").Process(
                target=write_spools, args=(places[i::NUM_PROCESSES], num_rows, 1 / options.rows_per_s)
            )
            for i in range(NUM_PROCESSES)
        ]
        tracker, ticks, refused = mlflow_tracker(sweep, plan, uri=uri), [], 0
        for writer in writers:
            writer.start()
        is_last = False
        while not is_last:
            is_last = not any(writer.is_alive() for writer in writers)
            begin = time.monotonic()
            refused += not tracker.ship()
            ticks.append(time.monotonic() - begin)
            if not is_last:
                time.sleep(SHIP_INTERVAL_S)
        written = sum(len(spool.read_spool(place / rundir.METRICS)[0]) for place in places) * NUM_METRICS
        last_row = max(spool.read_spool(place / rundir.METRICS)[0][-1]["time"] for place in places)
        delay = time.time() - last_row
        shipped = Counter(calls)
        client = MlflowClient(uri)
        lost = twice = disordered = 0
        for config in plan:
            for i in range(NUM_METRICS):
                rows = client.get_metric_history(tracker.run_ids[config.name], f"critic/{i}")
                steps = [metric.step for metric in rows]
                lost += len(set(range(num_rows)) - {m.step for m in rows if m.value == m.step + i / 16})
                twice += len(steps) - len(set(steps))
                disordered += steps != sorted(steps)
    return {
        "store": name,
        "runs": len(plan),
        "metrics": written,
        "lost": lost,
        "twice": twice,
        "series out of order": disordered,
        "refused shipments": refused,
        "calls": sum(shipped.values()),
        "calls per busy s": round(sum(shipped.values()) / sum(ticks), 1),
        "metrics per busy s": round(written / sum(ticks)),
        "longest shipment s": round(max(ticks), 1),
        "first shipment s": round(ticks[0], 1),
        "all there after the last row, s": round(delay, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="*", default=STORES, metavar="STORE")
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--rows-per-s", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    for name in options.stores:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # MLflow keeps engines and sessions
            print(json.dumps(pool.submit(measure, name, options).result(), indent=1), flush=True)


if __name__ == "__main__":
    main()
