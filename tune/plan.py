"""What ought to exist: tasks x presets x variants x seeds -> configs, written to sweep.json before anything starts.

The manifest is the truth, Ray's own state a cache: a repeated command does what the manifest lists and the
run folders lack.
"""

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aepo import config as configs
from aepo import documents, files, method_table, methods
from aepo.config import RunConfig
from aepo.errors import CheckpointError, ConfigError
from aepo.presets import preset
from aepo.runs import rundir
from tune.spec import SweepSpec, Variant, is_manifest

MANIFEST = "sweep.json"
RUN_FOLDERS, STAGES, STOP = "runs", "stages", "stop"
"""Names in a sweep's folder: of the runs' own folders, the stages that they share, the file that asks it to stop."""
FORMAT = 1
NAMED = 5
"""Runs that a message names."""
PACKAGES = ["torch", "ray", "mlflow", "minari", "gymnasium", "gymnasium-robotics", "mujoco", "numpy", "pandas"]


def make_plan(spec: SweepSpec) -> list[RunConfig]:
    """Return one config per task or data set, preset, variant and seed, seeds innermost.

    Raises:
        ConfigError: for no or unknown tasks, suites, seeds or methods, a setting that no run uses, two variants of one
            name or of equal settings, or the same run twice.
    """
    rows = spec.rows()
    if not rows or not spec.seeds or not spec.preset:
        raise ConfigError("a sweep wants at least one task, preset and seed; `aepo data list` shows the tasks")
    bases = [preset(name, row, spec.seeds[0]) for row in rows for name in spec.preset]
    settings = _Settings(spec, bases)
    kinds = [(base, variant) for base in bases for variant in settings.variants[base.method]]
    settings.check_used(kinds)
    plan = []
    for base, variant in kinds:
        try:
            config = configs.with_overrides(
                dataclasses.replace(base, variant="" if variant is None else variant.name), settings.of(base, variant)
            )
        except ConfigError as error:
            where = "" if variant is None else f", variant {variant.name!r}"
            raise ConfigError(f"{base.method} on {base.task}{where}: {error}") from None
        plan += [dataclasses.replace(config, seed=seed) for seed in spec.seeds]
    names = [config.name for config in plan]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"planned twice: {', '.join(twice)}")
    _check_different(plan)
    return plan


class _Settings:
    """Which settings the runs of a spec get above their presets.

    They come from the spec's `set`, from their method, their task and their variant: the last of these that has a
    setting counts. A setting changes the runs that use it.
    """

    def __init__(self, spec: SweepSpec, bases: Sequence[RunConfig]):
        """Find each method's variants, among runs as their presets have them."""
        self._spec = spec
        self._methods = method_table.presets() | {method: method for method in method_table.presets().values()}
        self._of_method: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for name, settings in spec.method_set.items():
            where, method = f"[method.{name}.set]", self._method(name)
            if method in self._of_method:
                raise ConfigError(f"{where} and {self._of_method[method][0]} are of one method; make them one table")
            self._of_method[method] = where, settings
        self.variants: dict[str, Sequence[Variant | None]] = {base.method: [] for base in bases}
        """Method -> its variants; [None] of one that has none, and is run as it is."""
        names = [variant.name for variant in spec.variant]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two variants are called {twice[0]!r}; give each a name of its own")
        for variant in spec.variant:
            named = {self._method(name) for name in variant.methods}
            having = {base.method for base in bases if not variant.set or self._used(base, variant) & {*variant.set}}
            if not (having or named):
                self._refuse(f"variant {variant.name!r}", next(iter(variant.set)), bases)
            for method in self.variants:
                if method in (named or having):
                    self.variants[method] = [*self.variants[method], variant]
        self.variants = {method: own or [None] for method, own in self.variants.items()}

    def of(self, base: RunConfig, variant: Variant | None) -> dict[str, Any]:
        """Return the settings that a run uses."""
        used = self._used(base, variant)
        return {k: v for settings in self._layers(base, variant).values() for k, v in settings.items() if k in used}

    def check_used(self, kinds: Sequence[tuple[RunConfig, Variant | None]]) -> None:
        """Raise a ConfigError for a setting that none of the runs uses, or a variant that changes nothing of one."""
        asked: dict[tuple[str, str], list[RunConfig]] = {}
        used = set()
        for base, variant in kinds:
            own = self._used(base, variant)
            for where, settings in self._layers(base, variant).items():
                for key in settings:
                    asked.setdefault((where, key), []).append(base)
                    used |= {(where, key)} if key in own else set()
        for (where, key), bases in asked.items():
            if (where, key) not in used:
                self._refuse(where, key, bases)
        for base, variant in kinds:
            if variant is not None and variant.set and not self._used(base, variant) & {*variant.set}:
                raise ConfigError(
                    f"variant {variant.name!r} changes nothing of {base.method} on {base.task}, which does not use "
                    f"{', '.join(variant.set)}; leave that task out of the sweep or that method out of its `methods`"
                )

    def _layers(self, base: RunConfig, variant: Variant | None) -> dict[str, Mapping[str, Any]]:
        """Return where settings of a run stand -> the settings, the weakest first."""
        layers = {"set": self._spec.set}
        if base.method in self._of_method:
            layers |= [self._of_method[base.method]]
        for name in (base.task, base.data.dataset):
            if name in self._spec.task_set:
                layers[f'[task."{name}".set]'] = self._spec.task_set[name]
        if variant is not None:
            layers[f"variant {variant.name!r}"] = variant.set
        return layers

    def _used(self, base: RunConfig, variant: Variant | None) -> set[str]:
        keys = {key for settings in self._layers(base, variant).values() for key in settings}
        return set(configs.used_settings(base, keys))

    def _method(self, name: str) -> str:
        """Return a method by its name in tables, or by that of its preset."""
        if name not in self._methods:
            near = get_close_matches(name, self._methods, n=1) or self._methods
            raise ConfigError(f"no method {name!r}; did you mean {' or '.join(near)}?")
        return self._methods[name]

    @staticmethod
    def _refuse(where: str, key: str, bases: Sequence[RunConfig]) -> None:
        known = list(dict.fromkeys(key for base in bases for key in configs.settings(base)))
        methods = ", ".join(dict.fromkeys(base.method for base in bases))
        if key in known:
            raise ConfigError(f"{where}: {methods} does not use {key} with its learner and target; leave {key} out")
        near = get_close_matches(key, known, n=3) or configs.groups_of(known)
        raise ConfigError(f"{where}: {methods} has no setting {key!r}; did you mean {' or '.join(near)}?")


def _check_different(plan: Sequence[RunConfig]) -> None:
    """Raise a ConfigError for two variants that are the same run but for their names."""
    names: dict[RunConfig, str] = {}
    for config in plan:
        other = names.setdefault(dataclasses.replace(config, variant=""), config.variant)
        if other != config.variant:
            raise ConfigError(
                f"variants {other!r} and {config.variant!r} give {config.method} on {config.task} the same settings; "
                "leave one out, or give it `methods` that have different ones"
            )


def describe_variants(spec: SweepSpec, plan: Sequence[RunConfig]) -> str:
    """Return a line that names the methods of a plan without a variant; empty if there are none, or no variants."""
    plain = list(dict.fromkeys(config.method for config in plan if not config.variant))
    if not spec.variant or not plain:
        return ""
    return f"{', '.join(plain)}: run once, without a variant (none has a setting of it, or none is for it)"


def planned_runs(file: Path | None, spec: SweepSpec) -> list[RunConfig]:
    """Return the runs of a spec, or those of a manifest if that is the file, of which a spec may say nothing.

    Raises:
        ConfigError: as `make_plan`, or if the spec says something beside a manifest.
        CheckpointError: if the manifest is not of this version.
    """
    if file is None or not is_manifest(file):
        return make_plan(spec)
    said = [field.name for field in dataclasses.fields(spec) if getattr(spec, field.name)]
    if said:
        raise ConfigError(f"{file} says which runs there are; leave out {', '.join(f'--{name}' for name in said)}")
    return read_manifest(file)


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
    files.write_json(sweep / MANIFEST, document)


def read_manifest(sweep: Path) -> list[RunConfig]:
    """Return the planned runs of a sweep folder, or of a manifest file.

    Raises:
        CheckpointError: if there is no manifest or it is not of this version.
    """
    try:
        return [methods.from_dict(values) for values in _document(sweep)["runs"].values()]
    except ConfigError as error:
        raise CheckpointError(
            f"{sweep} holds a run that is not of this version: {error}; bring {MANIFEST} again, or repeat the sweep"
        ) from error


def grow(sweep: Path, plan: Sequence[RunConfig], *, only: bool = False) -> tuple[list[RunConfig], list[RunConfig]]:
    """Return the runs that a folder plans when a plan comes to those that it holds, and the runs that then leave it.

    A folder keeps what it has planned before, in front of the plan. Those runs leave it whose task, method and variant
    the plan has with other settings: a table has one setting of each, whatever the seeds. So do runs whose settings the
    plan has under another variant's name. With `only` all others leave it.

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
    kinds = {(config.task, config.method, config.variant) for config in plan}
    settings = {dataclasses.replace(config, seed=0) for config in plan}
    unnamed = {dataclasses.replace(config, variant="") for config in settings}
    others = [config for config in held if config.name not in names]

    def stays(config: RunConfig) -> bool:
        if (config.task, config.method, config.variant) in kinds:
            return not only and dataclasses.replace(config, seed=0) in settings
        return not only and dataclasses.replace(config, seed=0, variant="") not in unnamed

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
        raise CheckpointError(
            f"{sweep} holds a run that is not of this version: {error}; bring {MANIFEST} again, or repeat the sweep"
        ) from error


def read_digests(sweep: Path) -> dict[str, str]:
    """Return data set -> digest of the data that a manifest's runs were trained on; empty where there is no manifest.

    Raises:
        CheckpointError: if the manifest is not of this version.
    """
    path = sweep if sweep.suffix == ".json" else sweep / MANIFEST
    return dict(_document(sweep)["data"]) if path.exists() else {}


def _document(sweep: Path) -> dict[str, Any]:
    path = sweep if sweep.suffix == ".json" else sweep / MANIFEST
    document = documents.read_document(path, kind="sweep", version=FORMAT, field="runs")
    digests = document.setdefault("data", {})
    if not isinstance(document["runs"], dict) or not isinstance(digests, dict):
        raise CheckpointError(
            f"{path} is not a sweep of this version: runs and data are objects with names; bring it again"
        )
    if odd := [name for name, digest in digests.items() if not isinstance(digest, str)]:
        raise CheckpointError(
            f"{path} is not a sweep of this version: the digest of {odd[0]!r} is no text; bring it again"
        )
    return document


def pending(sweep: Path, plan: Sequence[RunConfig], *, retry_failed: bool) -> list[RunConfig]:
    """Return the runs that have not ended yet, and with `retry_failed` those that failed."""
    wanted = []
    for config in plan:
        result = rundir.read_result(run_folder(sweep, config))
        if result is None or (retry_failed and result.status == "failed"):
            wanted.append(config)
    return wanted
