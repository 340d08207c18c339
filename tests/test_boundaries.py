"""What may import what, what is loaded when, and who owns the names."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

PACKAGES = ("aepo", "tune", "cluster", "analysis")


def loaded(statement):
    """Top-level modules in a fresh interpreter after a statement."""
    code = (
        f"{statement}\nimport sys, json; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(out.splitlines()[-1]))


def test_importing_aepo_loads_neither_scheduler_nor_tracker():
    modules = loaded("import aepo")
    assert not modules & {"ray", "mlflow", "pandas", "torch"}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import aepo.cli, aepo.commands.runs, aepo.commands.data", {"torch", "ray", "mlflow", "mujoco"}),
        ("import aepo.runs.run, aepo.evaluate", {"ray", "mlflow", "pandas"}),
        ("import aepo.slots, aepo.data.d4rl", {"torch", "ray", "mlflow", "pandas"}),
        ("import analysis.report, analysis.load", {"torch", "ray", "mlflow"}),
        ("import tune.commands, tune.quickstart", {"torch", "ray", "mlflow"}),
        ("import cluster.doctor", {"torch", "ray"}),
        (
            "from aepo.config import EnergyConfig as E; E(steps=1, batch_size=1, hidden_size=1, num_layers=1)",
            {"torch", "numpy", "ray", "mlflow"},
        ),
    ],
)
def test_heavy_libraries_are_loaded_only_where_they_are_used(statement, forbidden):
    assert not loaded(statement) & forbidden


def test_no_other_distribution_owns_our_names():
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, ["aepo-platform"])) == {"aepo-platform"}


def test_the_only_console_script_is_aepo():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    ours = [script.name for script in scripts if script.value.partition(":")[0].split(".")[0] in PACKAGES]
    assert ours == ["aepo"]


@pytest.mark.ray
def test_tests_that_start_a_ray_share_one_process(request):
    if os.environ.get("PYTEST_XDIST_WORKER") and request.config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@ray"), "this xdist does not group with this pytest; see pyproject.toml"
