"""Places on a node against Ray's own placement; what a run does that has none."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aepo import cli
from tests.examples import wait_for
from tune.places import places_on_node

FRACTIONS = (0.25, 0.3, 0.4, 0.6, 0.1, 0.3333)
NODES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def nodes():
    """A Ray of four nodes with 1, 2, 4 and 8 GPUs: it counts them, nothing looks for devices."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            for gpus in NODES:
                cluster.add_node(num_cpus=0, num_gpus=gpus, resources={f"node{gpus}": 1000})
            yield {gpus: node for node in ray.nodes() for gpus in NODES if f"node{gpus}" in node["Resources"]}
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_node_has_as_many_places_as_ray_finds(nodes, fraction):
    from ray.util import placement_group, placement_group_table, remove_placement_group

    for gpus, node in nodes.items():
        counted = places_on_node({**node["Resources"], "CPU": 1000.0}, cpus=1, gpus=fraction)
        bundle = {"GPU": fraction, f"node{gpus}": 1}
        groups = [placement_group([bundle]) for _ in range(counted + 2)]

        def placed(groups=groups):
            return [group for group in groups if placement_group_table(group)["state"] == "CREATED"]

        assert all(group.wait(30) for group in groups[:counted]), (gpus, counted)
        assert not groups[counted].wait(1), (gpus, counted)
        assert len(placed()) == counted == gpus * int(1 / fraction + 1e-9)
        for group in groups:
            remove_placement_group(group)
        wait_for(lambda placed=placed: not placed())


@given(st.integers(0, 64), st.sampled_from([1, 2, 3, 7, 8]))
def test_whole_devices_and_none_are_counted_too(cpus, gpus):
    have = {"CPU": float(cpus), "GPU": 8.0}
    assert places_on_node(have, cpus=1, gpus=0) == cpus
    assert places_on_node(have, cpus=1, gpus=gpus) == min(cpus, 8 // gpus)
    assert places_on_node({}, cpus=1, gpus=gpus) == 0


def test_cores_are_counted_without_errors_of_rounding():
    assert places_on_node({"CPU": 1.0}, cpus=0.1, gpus=0) == 10
    assert places_on_node({"CPU": 0.3}, cpus=0.1, gpus=0) == 3


def test_one_and_a_half_gpus_are_refused(capsys):
    assert cli.run(["sweep", "--task", "maze2d-umaze", "--gpus", "1.5", "--dry-run"]) == 2
    assert "a part of one GPU, or whole ones; got 1.5" in capsys.readouterr().err.replace("\n", " ")


SURPLUS = """
import sys
import tune.sweep
from aepo import cli
tune.sweep._slots = lambda *_: 2
sys.exit(cli.run(sys.argv[1:]))
"""
"""A sweep that believes there are two places."""


@pytest.mark.ray
def test_a_run_without_a_place_waits_and_ends_finished(make_dataset, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.01")
    words = ["sweep", "--dataset", make_dataset(), "--seeds", "0", "1", "--preset", "smoke", "--out", str(tmp_path)]
    small = [f"{stage}.{key}" for stage in ("behavior", "critic", "energy") for key in ("hidden_size=8", "steps=1200")]
    words += ["--cpus", "1.5", "--yes", "--set", *small]
    ended = subprocess.run([sys.executable, "-c", SURPLUS, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "2 at a time" in ended.stderr
    logs = [path.read_text() for path in tmp_path.glob("runs/*/log.txt")]
    assert [text.count(" starts ") for text in logs] == [1, 1]
    assert [row["status"] for row in pq.read_table(tmp_path / "runs.parquet").to_pylist()] == ["finished"] * 2
