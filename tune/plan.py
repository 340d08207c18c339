"""What ought to exist: tasks x seeds -> configs, written to sweep.json before anything starts.

The manifest is the truth, Ray's own state a cache: a repeated command does what the manifest lists and the
run folders lack.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aepo import config as configs
from aepo import run, tasks
from aepo.config import RunConfig
from aepo.errors import CheckpointError, ConfigError

MANIFEST = "sweep.json"
FORMAT = 1
PACKAGES = ["torch", "ray", "mlflow", "minari", "gymnasium", "gymnasium-robotics", "mujoco", "numpy", "pandas"]


def make_plan(
    task_names: Sequence[str],
    datasets: Sequence[str],
    seeds: Sequence[int],
    *,
    preset: str,
    overrides: Mapping[str, Any],
) -> list[RunConfig]:
    """Return one config per (task or data set) and seed, seeds innermost.

    Raises:
        ConfigError: for no or unknown tasks, no seeds, or the same run twice.
    """
    rows = [tasks.find(name) for name in task_names] + [tasks.for_dataset(name) for name in datasets]
    if not rows or not seeds:
        raise ConfigError("a sweep wants at least one task and one seed; `aepo data list` shows the tasks")
    plan = [configs.with_overrides(configs.preset(preset, row, seed), overrides) for row in rows for seed in seeds]
    names = [config.name for config in plan]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"planned twice: {', '.join(twice)}")
    return plan


def run_folder(sweep: Path, config: RunConfig) -> Path:
    """Return the folder of one run of a sweep."""
    return sweep / "runs" / config.name


def write_manifest(sweep: Path, plan: Sequence[RunConfig]) -> None:
    """Write sweep.json atomically: every run's config, the commit, versions and machine."""
    sweep.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": run.commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": platform.platform(),
        "runs": {config.name: dataclasses.asdict(config) for config in plan},
    }
    run.write_json(sweep / MANIFEST, document)


def read_manifest(sweep: Path) -> list[RunConfig]:
    """Return the planned runs of a sweep folder.

    Raises:
        CheckpointError: if there is no manifest or it is not of this version.
    """
    path = sweep / MANIFEST
    try:
        document = json.loads(path.read_text())
        assert document["format"] == FORMAT
        return [configs.from_dict(values) for values in document["runs"].values()]
    except FileNotFoundError:
        raise CheckpointError(f"{sweep} is not a sweep: it has no {MANIFEST}") from None
    except (ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a manifest of this version: {error}") from error


def pending(sweep: Path, plan: Sequence[RunConfig], *, retry_failed: bool) -> list[RunConfig]:
    """Return the runs that have not ended yet, and with `retry_failed` those that failed."""
    wanted = []
    for config in plan:
        result = run.read_result(run_folder(sweep, config))
        if result is None or (retry_failed and result["status"] == "failed"):
            wanted.append(config)
    return wanted
