"""What ought to exist: tasks x presets x seeds -> configs, written to sweep.json before anything starts.

The manifest is the truth, Ray's own state a cache: a repeated command does what the manifest lists and the
run folders lack.
"""

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aepo import config as configs
from aepo import methods, rundir, tasks
from aepo.config import RunConfig
from aepo.errors import CheckpointError, ConfigError
from aepo.presets import preset

MANIFEST = "sweep.json"
RUN_FOLDERS, STAGES, STOP = "runs", "stages", "stop"
"""In a sweep's folder: the runs' own; the stages that they share; and the file that asks the sweep to stop."""
FORMAT = 1
NAMED = 5
"""Runs that a message names."""
PACKAGES = ["torch", "ray", "mlflow", "minari", "gymnasium", "gymnasium-robotics", "mujoco", "numpy", "pandas"]


def make_plan(
    task_names: Sequence[str],
    datasets: Sequence[str],
    seeds: Sequence[int],
    *,
    presets: Sequence[str],
    overrides: Mapping[str, Any],
    source: str = "",
    suites: Sequence[str] = (),
) -> list[RunConfig]:
    """Return one config per (task or data set), preset and seed, seeds innermost.

    An override changes the runs whose method uses that setting; one that no method of the plan uses is refused.
    `source` holds for all tasks; empty = each task's first. `suites` adds all tasks that a suite has of it.

    Raises:
        ConfigError: for no or unknown tasks or suites, no seeds, a setting that none has, or the same run twice.
    """
    rows = [tasks.find(name, source) for name in task_names] + [tasks.for_dataset(name) for name in datasets]
    for suite in suites:
        rows += tasks.of_suite(suite, source)
    if not rows or not seeds or not presets:
        raise ConfigError("a sweep wants at least one task, preset and seed; `aepo data list` shows the tasks")
    bases = [preset(name, row, seed) for row in rows for name in presets for seed in seeds]
    known = {key for base in bases for key in configs.used_settings(base, overrides)}
    plan = []
    for base in bases:
        own = configs.used_settings(base, overrides)
        heeded = {key: value for key, value in overrides.items() if key in own or key not in known}
        plan.append(configs.with_overrides(base, heeded))
    names = [config.name for config in plan]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"planned twice: {', '.join(twice)}")
    return plan


def run_folder(sweep: Path, config: RunConfig) -> Path:
    """Return the folder of one run of a sweep."""
    return sweep / RUN_FOLDERS / config.name


def write_manifest(sweep: Path, plan: Sequence[RunConfig], digests: Mapping[str, str] | None = None) -> None:
    """Write sweep.json atomically: every run's config, the digests of the data, the commit, versions and machine."""
    sweep.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": rundir.commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": platform.platform(),
        "data": dict(digests or {}),
        "runs": {config.name: dataclasses.asdict(config) for config in plan},
    }
    rundir.write_json(sweep / MANIFEST, document)


def read_manifest(sweep: Path) -> list[RunConfig]:
    """Return the planned runs of a sweep folder, or of a manifest file.

    Raises:
        CheckpointError: if there is no manifest or it is not of this version.
    """
    try:
        return [methods.from_dict(values) for values in _document(sweep)["runs"].values()]
    except ConfigError as error:
        raise CheckpointError(f"{sweep} holds a run that is not of this version: {error}") from error


def grow(sweep: Path, plan: Sequence[RunConfig], *, only: bool = False) -> tuple[list[RunConfig], list[RunConfig]]:
    """Return the runs that a folder plans when a plan comes to those that it holds, and the runs that then leave it.

    A folder keeps what it has planned before, in front of the plan. Only runs of which the plan has the task and method
    with other settings leave it: a table has one setting of each, whatever the seeds. With `only` all others leave it.

    Raises:
        CheckpointError: if the folder's manifest is not of this version; with `only` its runs need not be.
    """
    try:
        held = read_manifest(sweep) if (sweep / MANIFEST).exists() else []
    except CheckpointError as error:
        if not only:
            raise CheckpointError(f"{error}; give another folder with --out, or --only for these runs alone") from error
        held = []
    names = {config.name for config in plan}
    kinds = {(config.task, config.method) for config in plan}
    settings = {dataclasses.replace(config, seed=0) for config in plan}
    others = [config for config in held if config.name not in names]

    def stays(config: RunConfig) -> bool:
        kind = (config.task, config.method)
        return not only and (kind not in kinds or dataclasses.replace(config, seed=0) in settings)

    return [*filter(stays, others), *plan], [config for config in others if not stays(config)]


def describe_leaving(leaving: Sequence[RunConfig]) -> str:
    """Return a line that names runs which a folder plans no more, the first few of many."""
    names = ", ".join(config.name for config in leaving[:NAMED]) + (", ..." if len(leaving) > NAMED else "")
    return (
        f"{len(leaving)} run{'s are' if len(leaving) > 1 else ' is'} no longer planned in this folder: {names}; files "
        f"stay in {RUN_FOLDERS}/, the command that planned them takes them in again, and another --out keeps both"
    )


def read_planned(sweep: Path, name: str) -> RunConfig:
    """Return one planned run of a sweep folder.

    Raises:
        CheckpointError: if it is not planned, or there is no manifest of this version.
    """
    runs = _document(sweep)["runs"]
    if name not in runs:
        raise CheckpointError(f"{sweep / MANIFEST} plans no run {name}")
    try:
        return methods.from_dict(runs[name])
    except ConfigError as error:
        raise CheckpointError(f"{sweep} holds a run that is not of this version: {error}") from error


def read_digests(sweep: Path) -> dict[str, str]:
    """Return data set -> digest of the data that a manifest's runs were trained on; empty where there is no manifest.

    Raises:
        CheckpointError: if the manifest is not of this version.
    """
    path = sweep if sweep.suffix == ".json" else sweep / MANIFEST
    return dict(_document(sweep)["data"]) if path.exists() else {}


def _document(sweep: Path) -> dict[str, Any]:
    path = sweep if sweep.suffix == ".json" else sweep / MANIFEST
    document = rundir.read_document(path, kind="sweep", version=FORMAT, field="runs")
    digests = document.setdefault("data", {})
    if not isinstance(document["runs"], dict) or not isinstance(digests, dict):
        raise CheckpointError(f"{path} is not a sweep of this version: runs and data are objects with names")
    if odd := [name for name, digest in digests.items() if not isinstance(digest, str)]:
        raise CheckpointError(f"{path} is not a sweep of this version: the digest of {odd[0]!r} is no text")
    return document


def pending(sweep: Path, plan: Sequence[RunConfig], *, retry_failed: bool) -> list[RunConfig]:
    """Return the runs that have not ended yet, and with `retry_failed` those that failed."""
    wanted = []
    for config in plan:
        result = rundir.read_result(run_folder(sweep, config))
        if result is None or (retry_failed and result.status == "failed"):
            wanted.append(config)
    return wanted
