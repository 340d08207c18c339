"""Fixtures: a cluster of two nodes on this machine, and a folder of programs that stand in for SLURM's."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aepo.errors import ResourceError
from cluster import local, processes
from cluster.local import LocalCluster
from cluster.processes import Process


@pytest.fixture(scope="module")
def machine():
    """A cluster of two nodes, up for the tests of this module; its folder is one that PostgreSQL's account reaches."""
    try:
        local.postgres_programs()
    except ResourceError as error:
        pytest.skip(str(error))
    folder = Path(tempfile.mkdtemp(prefix="aepo-test-", dir="/tmp"))
    folder.chmod(0o711)
    environment = os.environ | {"MINARI_DATASETS_PATH": str(folder / "minari"), "AEPO_CACHE": str(folder / "cache")}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    cluster = LocalCluster(folder / "cluster")

    def aepo(*words, status=0, **more):
        command = [sys.executable, "-m", "aepo", *map(str, words)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment | more, cwd=folder)
        assert ran.returncode == status, (words, ran.stdout[-2000:], ran.stderr[-2000:])
        return ran

    try:
        aepo("data", "collect", "maze2d-open", "--steps", "3000")
        aepo("cluster", "up", "--local", "--nodes", "2", "--folder", cluster.folder)
        state = cluster.state()
        environment |= {
            "RAY_AUTH_TOKEN_PATH": str(cluster.folder / "token"),
            "RAY_API_SERVER_ADDRESS": cluster.dashboard(),
            "HOME": str(folder),
        }
        yield cluster, state, aepo
        down_leaves_nothing(cluster, aepo)
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


def down_leaves_nothing(cluster, aepo):
    """`down` ends every process and port, and keeps what is worth keeping; asked when the other tests are through."""
    now = cluster.state()
    services = [Process(entry["pid"], entry["ticks"]) for entry in now["services"].values()]
    members = {member for service in services for member in processes.process_tree(service)}
    assert len(members) > 10
    aepo("cluster", "down", "--folder", cluster.folder)
    assert not [member for member in members if processes.is_alive(member)]
    assert not processes.marked_processes(local.MARK, str(cluster.folder))
    for port in now["ports"].values():
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
    assert not Path(now["temp"]).exists()
    kept = {"artifacts", "lock", "logs", "postgres", "secrets.json", "storage"}
    assert {path.name for path in cluster.folder.iterdir()} == kept
    assert "no cluster is up" in aepo("cluster", "down", "--folder", cluster.folder).stderr
    aepo("cluster", "status", "--folder", cluster.folder, status=6)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder on PATH for SLURM's commands; what is said to them goes into its file `said`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(folder / "said"))
    (folder / "said").touch()
    return folder
