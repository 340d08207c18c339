"""A sweep of a few steps without Ray, for MLflow to hold: its fixtures, and what MLflow warns of."""

import dataclasses
import shutil

import pytest

from aepo import config as configs
from aepo import tasks
from aepo.presets import preset
from aepo.runs import run, rundir
from tests.examples import write_pendulum
from tests.training import CPU
from tune.plan import run_folder, write_manifest

MLFLOW_WARNINGS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def small_config(dataset_id, seed):
    config = preset("best-smoke", tasks.for_dataset(dataset_id), seed)
    small = {
        f"{stage}.{key}": value
        for stage in config.stages
        for key, value in (("steps", 60), ("batch_size", 16), ("hidden_size", 16))
    }
    grid = {"evaluation.grid_beta": (1.0, 3.0), "evaluation.grid_guidance_scale": (1.0,)}
    return configs.with_overrides(config, {**small, **grid, "sampling.temperature": 1.0})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of three planned runs, two of them finished and one not begun: its folder and plan."""
    home = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        patch.setenv("AEPO_CACHE", str(home / "cache"))
        dataset_id = write_pendulum()
        plan = [small_config(dataset_id, seed) for seed in range(3)]
        folder = home / "sweep"
        write_manifest(folder, plan)
        for config in plan[:2]:
            place = run_folder(folder, config)
            run.execute(config, place, run.FolderStore(place), device=CPU)
    return folder, plan


@pytest.fixture
def sweep(finished, tmp_path):
    """A copy of it, the test's own."""
    folder, plan = finished
    return shutil.copytree(folder, tmp_path / "sweep"), plan


def set_result(folder, config, **values):
    place = run_folder(folder, config)
    rundir.write_result(
        place, dataclasses.replace(rundir.read_result(place) or rundir.describe(config, place), **values)
    )
