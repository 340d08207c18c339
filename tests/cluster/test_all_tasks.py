"""All 36 tasks from a server of files to the table, by the commands of docs/benchmark.md, on a cluster of two nodes."""

import json
from threading import Thread

import pyarrow.parquet as pq
import pytest

from aepo import cli, tasks
from aepo.data import fetch
from tests.families import D4RL, record_file
from tests.file_server import Server

PLAN = f"""
task = {json.dumps(D4RL)}
source = "d4rl"
preset = ["best-smoke", "iql-smoke"]
seeds = [0]
out = "all"
keep = "policies"
reuse_stages = true
[set]
evaluation.num_episodes = 1
evaluation.horizon = 25
[method.aepo.set]
behavior.steps = 20
critic.steps = 20
energy.steps = 20
[method.iql.set]
critic.steps = 20
actor.steps = 20
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_the_table_of_all_tasks(machine, tmp_path, monkeypatch):
    cluster, _, aepo = machine
    work = cluster.folder.parent
    monkeypatch.setattr(fetch, "known_files", dict)  # the files are not D4RL's own
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name in D4RL:
            content = record_file(tmp_path / "made.hdf5", name).read_bytes()
            server.files[fetch.address(tasks.find(name, "d4rl"), "/d4rl")] = content
        flags = ["--folder", str(work / "files"), "--mirror", server.url]
        assert cli.run(["benchmark", "d4rl", "fetch", *flags]) == 0
        server.shutdown()
    aepo("benchmark", "d4rl", "import", "files")
    verified = json.loads(aepo("benchmark", "d4rl", "verify", "--json").stdout)
    assert [(row["task"], row["problems"]) for row in verified] == [(name, []) for name in D4RL]

    (work / "all.toml").write_text(PLAN)
    aepo("benchmark", "all.toml", "submit", "--cluster", cluster.dashboard())
    folder = cluster.folder / "storage" / "all"
    rows = pq.read_table(folder / "runs.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished"] * 72, [row["error"] for row in rows if row["error"]]
    assert {(row["task"], row["method"]) for row in rows} == {(name, method) for name in D4RL for method in METHODS}
    assert len({row["machine"] for row in rows}) == 1  # two nodes of one machine
    assert all(0.1 < row["peak_memory_gb"] < 4 for row in rows)

    table = json.loads(aepo("benchmark", "all.toml", "report", "--out", folder, "--json").stdout)
    assert {row["task"] for row in table} == set(D4RL)
    report = (folder / "report" / "report.md").read_text()
    assert all(f"| {name} |" in report for name in D4RL)


METHODS = ("aepo", "iql")
