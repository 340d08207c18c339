"""`python -m cluster.probe NONCE`, a job: look at every node from within and print what was found, as one line of JSON.

It only looks; what is good or bad is said by `cluster.fitness`, where the command was given.
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tune.plan import PACKAGES

FACTS = "aepo-facts"
"""Beginning of the line that holds the facts."""
NODE_TIMEOUT_S = 90.0


def look(nonce: str) -> dict[str, Any]:
    """Return what the node of this process has: versions, storage, tracking server, data sets, GPUs, disk, ports."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "storage": _storage(nonce),
        "tracking": _tracking(),
        "data": _data_sets(),
        "gpus": _gpus(),
        "disk": _disk(),
        "ports": _open_ports(),
        "addresses": _addresses(),
    }


def _now() -> float:
    return time.time()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _storage(nonce: str) -> dict[str, Any]:
    """Say whether the shared folder shows the head's file and takes one of this node."""
    folder = os.environ.get("AEPO_STORAGE", "")
    if not folder:
        return {"path": "", "sees": False, "writes": "AEPO_STORAGE is not set"}
    mine = Path(folder, f".doctor-{nonce}-{socket.gethostname()}-{os.getpid()}")
    try:
        mine.write_text(nonce)
        mine.unlink()
        writes = ""
    except OSError as error:
        writes = f"{error.strerror}"
    return {"path": folder, "sees": Path(folder, f".doctor-{nonce}").exists(), "writes": writes}


def _tracking() -> dict[str, Any]:
    """Say what the tracking server answers with this node's password, and without one."""
    import requests

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        return {"uri": uri, "status": "MLFLOW_TRACKING_URI names no server", "open": None}
    user = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        status = requests.get(url, auth=user if user[0] else None, timeout=10).status_code
        return {"uri": uri, "status": status, "open": requests.get(url, timeout=10).status_code == 200}
    except requests.RequestException as error:
        return {"uri": uri, "status": type(error).__name__, "open": None}


def _data_sets() -> list[str]:
    with contextlib.suppress(Exception):  # none, or a folder that cannot be read, which is as good as none
        from minari import list_local_datasets

        return sorted(list_local_datasets())
    return []


def _gpus() -> dict[str, float]:
    import torch

    return {"torch": torch.cuda.device_count() if torch.cuda.is_available() else 0}


def _disk() -> dict[str, float]:
    places = {"/tmp", os.environ.get("AEPO_STORAGE", ""), str(Path.cwd())}
    return {place: round(shutil.disk_usage(place).free / 2**30, 1) for place in sorted(places) if Path(place).is_dir()}


def _open_ports() -> list[str]:
    """Return the listeners of this Ray, not of another one on the same machine, that are not on a loopback address."""
    import psutil
    from ray._private.worker import global_worker

    node: Any = global_worker.node
    session, pids = Path(node.get_session_dir_path()).name, set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(session in word for word in process.cmdline()):
                pids |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    found = set()
    for connection in psutil.net_connections("inet"):
        is_outer = connection.laddr and connection.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN and is_outer:
            with contextlib.suppress(psutil.Error):
                found.add(f"{psutil.Process(connection.pid).name()} {connection.laddr.port}")
    return sorted(found)


def _addresses() -> list[str]:
    import psutil

    kinds = (socket.AF_INET, socket.AF_INET6)
    return sorted(
        {a.address.partition("%")[0] for each in psutil.net_if_addrs().values() for a in each if a.family in kinds}
    )


def main(nonce: str) -> None:
    """Look at every node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    folder = os.environ.get("AEPO_STORAGE", "")
    mark = Path(folder, f".doctor-{nonce}") if folder else None
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(nonce)
    looker, clock = ray.remote(num_cpus=0)(look), ray.remote(num_cpus=0)(_now)
    facts = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not node["Alive"]:
            continue
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        row: dict[str, Any] = {
            "node": node.get("NodeName") or node["NodeManagerAddress"],
            "ray_gpus": node["Resources"].get("GPU", 0),
        }
        try:
            found: Any = ray.get(looker.options(scheduling_strategy=here).remote(nonce), timeout=NODE_TIMEOUT_S)
            row |= found
            trips = []
            for _ in range(3):
                begin = time.time()
                there = ray.get(clock.options(scheduling_strategy=here).remote(), timeout=NODE_TIMEOUT_S)
                trips.append((time.time() - begin, there - (begin + time.time()) / 2))
            trip, offset = min(trips)
            row |= {"clock_s": offset, "clock_error_s": trip / 2}
        except Exception as error:  # a node that cannot be asked is the finding
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        facts.append(row)
    if mark is not None:
        mark.unlink(missing_ok=True)
    print(FACTS, json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
