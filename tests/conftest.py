"""Fixtures: a tiny Minari data set, and the settings that keep a test run to itself."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests import ROOT
from tests.examples import random_transitions, write_pendulum

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)
hypothesis.settings.register_profile("aepo", hypothesis.settings(), deadline=None)  # torch's first call imports
hypothesis.settings.load_profile("aepo")


TRAINS = """
aepo/data/test_odd_data
aepo/data/test_pointmaze
aepo/diffusion/test_sampler
aepo/methods/test_fql
aepo/methods/test_idql
aepo/methods/test_rebrac
aepo/runs/test_folders
aepo/runs/test_rounds
aepo/runs/test_run
aepo/runs/test_selection
aepo/runs/test_stage_store
aepo/stages/test_energy
aepo/stages/test_stages
aepo/stages/test_targets
aepo/test_bench
aepo/test_environments
aepo/test_golden
aepo/test_kernels
aepo/test_parallel
aepo/test_slots
aepo/test_toy
analysis/test_mlflow_source
analysis/test_page
cluster/test_local
test_extending
test_fuzz
test_learning
tune/test_growth
tune/test_places
tune/test_plan
tune/test_search
tune/test_sweep
tune/test_tracking
tune/test_trainable
tune/test_variants
"""
"""Test files that train networks, roll out policies or start servers."""


@pytest.hookimpl(tryfirst=True)  # before xdist, which writes the group into the name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run all tests that start a Ray, one after the other: they count its processes."""
    for item in items:
        if item.path.with_suffix("").as_posix().removeprefix(f"{ROOT}/tests/") in TRAINS.split():
            item.add_marker(pytest.mark.trains)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: it sees what was expected to fail
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Where AEPO_NO_SKIPS is set, as in CI, a skipped test has failed, unless it is marked `cuda`."""
    report = yield
    expected = hasattr(report, "wasxfail") or item.get_closest_marker("cuda")
    if os.environ.get("AEPO_NO_SKIPS") and report.skipped and not expected:
        report.outcome, report.longrepr = "failed", f"skipped, which is a failure here: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _subnormal_numbers():
    """A command run in this process takes them for 0; Hypothesis, which draws them, refuses to."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's data, cache or tracking server."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("AEPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # maze environments leave their XML there


@pytest.fixture
def make_dataset() -> Callable[..., str]:
    """A function that writes a small Minari data set of Pendulum-v1 with random actions and returns its id."""
    return write_pendulum


@pytest.fixture
def tiny_config() -> Callable[..., object]:
    """A function that returns a config of a few steps for a data set; dotted keys replace settings."""
    from aepo import config as configs
    from aepo import tasks
    from aepo.presets import preset

    def make(
        dataset_id: str = "tests/pendulum/random-v0", seed: int = 0, method: str = "best", **overrides: object
    ) -> object:
        base = preset(f"{method}-smoke", tasks.for_dataset(dataset_id), seed)
        small = {
            f"{stage}.{key}": value
            for stage in base.stages
            for key, value in (("steps", 60), ("batch_size", 16), ("hidden_size", 16), ("num_layers", 2))
        }
        return configs.with_overrides(
            base, {**small, **{key.replace("__", "."): value for key, value in overrides.items()}}
        )

    return make


@pytest.fixture
def transitions():
    """Random transitions, [500], S = 3, A = 2."""
    return random_transitions()
