"""What a sweep runs (`SweepSpec`) apart from where and how runs are carried out (`Execution`).

Both are filled by a sweep file, by flags, or by a program; `tune.plan.make_plan` makes a spec's runs. A value of a file
keeps its type up to the config. Only words of a command line are text.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import tyro
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from aepo import config as configs
from aepo import method_table, tasks
from aepo.documents import read_toml
from aepo.errors import AEPOError, ConfigError

Runner = Literal["train", "inline"]
Keep = Literal["all", "policies"]
MAX_CPUS = 10_000
"""Cores of a run at most."""
Parsed = TypeVar("Parsed")


class WordError(AEPOError):
    """A word of a command line that cannot be read; no ValueError, of which tyro prints a page instead of a line."""

    exit_status = ConfigError.exit_status


def _by_words(
    nargs: Literal[1, "*"],
    metavar: str,
    parse: Callable[[Sequence[str]], Parsed],
    show: Callable[[Parsed], list[str]],
    kind: type,
) -> PrimitiveConstructorSpec[Parsed]:
    """Return how tyro reads a flag's words as an object, and shows the flag's default."""

    def read(words: list[str]) -> Parsed:
        try:
            return parse(words)
        except ConfigError as error:
            raise WordError(str(error)) from None

    return PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=show,
    )


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _flat(value: object) -> dict[str, Any]:
    """Return dotted keys and values from tables of a file, nested or not, or from words as on a command line."""
    if isinstance(value, Mapping):
        return configs.flatten(value)
    if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        return dict(configs.parse_overrides(value))
    raise ConfigError(f'wanted a table of settings, as in {{ "critic.expectile" = 0.9 }}; got {str(value)[:40]!r}')


Settings: TypeAlias = Annotated[
    Mapping[str, Any],
    BeforeValidator(_flat),
    _by_words("*", "[KEY=VALUE [KEY=VALUE ...]]", configs.parse_overrides, _words, Mapping),
]
"""Dotted keys and their values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A name for settings: the methods of a sweep are run once with the settings of each variant."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    """Name, which heads a column of the tables: 1 to 40 characters."""
    set: Settings = dataclasses.field(default_factory=dict)
    """Settings of the variant; {} = those of the sweep."""
    methods: tuple[str, ...] = ()
    """Methods that have this variant; () = each that has one of its settings."""

    def __post_init__(self) -> None:
        configs.check_variant(self.name)


def parse_variant(words: Sequence[str]) -> Variant:
    """Return the variant that the one word of a flag is, as in `w 3: sampling.guidance_scale=3`.

    Raises:
        ConfigError: if it is none.
    """
    name, colon, settings = words[0].partition(":")
    if not colon:
        raise ConfigError(
            f"--variant wants 'NAME: KEY=VALUE ...', as in 'w 3: sampling.guidance_scale=3'; got {name!r}"
        )
    return Variant(name=name.strip(), set=configs.parse_overrides(settings.split()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """Which data: flags of a sweep and of a search."""

    task: tuple[str, ...] = ()
    """Names of tasks (`aepo data list` shows them)."""
    suite: tuple[str, ...] = ()
    """All tasks of these suites: gym-mujoco, maze2d, antmaze, adroit, kitchen, pointmaze."""
    source: str = ""
    """Source of the tasks' data: d4rl (the original files), minari (what Farama regenerated);
    none = each task's first, which is d4rl for the benchmark's tasks."""
    dataset: tuple[str, ...] = ()
    """Ids of local Minari data sets of your own."""

    def rows(self) -> list[tasks.Task]:
        """Return the rows of all tasks: those named, those of the suites that are not named, the data sets.

        Raises:
            ConfigError: for an unknown task or suite.
        """
        found = [tasks.find(name, self.source) for name in self.task]
        for suite in self.suite:
            found += [row for row in tasks.of_suite(suite, self.source) if row.task not in self.task]
        return found + [tasks.for_dataset(name) for name in self.dataset]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSpec(TaskChoice):
    """What is run: tasks x methods x variants x seeds."""

    seeds: tuple[int, ...] = (0,)
    """Seeds; every task is run with each."""
    preset: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"{method_table.preset_help('best')} Of several each is a column of the table."),
    ] = ("quick",)
    set: Settings = dataclasses.field(default_factory=dict)
    """Settings that differ from the preset, as in: critic.expectile=0.9 sampling.beta=1.
    Methods without them keep theirs."""
    variant: tyro.conf.UseAppendAction[
        tuple[
            Annotated[
                Variant,
                _by_words(1, "'NAME: KEY=VALUE ...'", parse_variant, lambda variant: [variant.name], Variant),
            ],
            ...,
        ]
    ] = ()
    """A name and settings, as in "w 3: sampling.guidance_scale=3".
    Every method that has one of the settings gets a column of the table for each variant; others are run once."""
    method_set: tyro.conf.Suppress[Mapping[str, Settings]] = dataclasses.field(default_factory=dict)
    """Method -> settings of its runs, as in a file's [method.aepo.set]."""
    task_set: tyro.conf.Suppress[Mapping[str, Settings]] = dataclasses.field(default_factory=dict)
    """Task or data set -> settings of its runs, as in a file's [task."hopper-medium-v2".set]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Where runs are carried out, and what each takes there: flags of a sweep and of a search."""

    address: str = ""
    """Address of a Ray cluster; none = a private Ray on this machine as long as the command runs."""
    cpus: float = 1.0
    """CPU cores per run, or per worker of a run."""
    gpus: float = 0.0
    """GPUs per run, or per worker of a run; a fraction shares one."""
    max_concurrent: int = 0
    """Runs at the same time, at most; 0 = as many as fit."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints of a run."""
    tracking_uri: str = ""
    """MLflow store or server; none = MLFLOW_TRACKING_URI, or else a SQLite file in the folder of --out."""

    def check(self) -> None:
        """Raise a ConfigError unless the numbers are finite and in their ranges."""
        others = (self.gpus, self.max_concurrent, self.checkpoint_s)
        if not (0 < self.cpus <= MAX_CPUS and all(0 <= value < math.inf for value in others)):
            raise ConfigError(
                f"--cpus must be a number above 0, at most {MAX_CPUS:,}; --gpus, --max-concurrent and --checkpoint-s "
                "numbers not below it; "
                f"got {self.cpus:g}, {self.gpus:g}, {self.max_concurrent} and {self.checkpoint_s:g}"
            )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ConfigError(f"--gpus must be a part of one GPU, or whole ones; got {self.gpus:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources(Compute):
    """How the trials of a sweep or a search run there."""

    runner: Runner = "train"
    """How a trial runs. train: as a Ray Train run, whose worker is replaced if it dies;
    inline: in Tune's own process, cheaper for many short runs."""
    workers_per_run: int = 1
    """Train workers per run, each of which takes its part of every batch.
    The weights are those of one worker but for the order of additions."""
    stages: tyro.conf.Suppress[Path | None] = None
    """Store of the stages that runs have alike; none = every run trains its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(Resources):
    """Where and how a sweep is carried out."""

    out: Path = Path("sweeps/default")
    """Folder of the sweep; on a cluster one that all nodes see."""
    reuse_stages: bool = False
    """Train a stage that several runs have alike (data, settings, seed, stages before it) once.
    The folder's stages/ keeps them."""
    retry_failed: bool = False
    """Run again what failed before."""
    keep: Keep = "all"
    """What stays on the disk of a finished run beside its result and metrics: all, or policies, without checkpoints."""
    only: bool = False
    """Let --out plan these runs alone; files of runs that are no longer planned stay.
    Without it the folder keeps what it has planned before, but for other settings of a task, method and variant."""

    def check(self) -> None:
        """Raise a ConfigError unless the numbers are finite, in their ranges, and go together."""
        Resources.check(self)
        alone = self.runner == "inline" or self.reuse_stages
        if self.workers_per_run < 1 or (self.workers_per_run > 1 and alone):
            raise ConfigError(
                "--workers-per-run must be at least 1, and 1 with --runner inline or --reuse-stages; "
                f"got {self.workers_per_run}"
            )


def is_manifest(file: Path) -> bool:
    """Return whether a file is the sweep.json of a sweep, whose runs are then planned again, and no sweep file."""
    return file.suffix == ".json"


def read_sweep_file(file: Path) -> tuple[SweepSpec, Execution]:
    """Return what a TOML file says; of a manifest, which has its runs, an empty spec.

    The names are those of the flags. `task` and `dataset` may be tables, whose keys are then the names and whose `set`
    is settings of that task alone; [method.NAME.set] is settings of a method.

    Raises:
        ConfigError: if the file cannot be read, or has an unknown or mistyped name.
    """
    if is_manifest(file):
        return SweepSpec(seeds=(), preset=()), Execution()
    values = {name.replace("-", "_"): value for name, value in read_toml(file, kind="sweep file").items()}
    of_spec, of_execution = _names(SweepSpec, "method_set", "task_set"), _names(Execution, "stages")
    known = [*of_spec, *of_execution, "method"]
    if unknown := [name for name in values if name not in known]:
        near = get_close_matches(unknown[0], known, n=1) or known
        raise ConfigError(f"{file}: no setting {unknown[0]!r}; did you mean {' or '.join(near)}?")
    try:
        task_set: dict[str, Any] = {}
        for kind in ("task", "dataset"):
            if isinstance(values.get(kind), dict):
                task_set |= _sets(kind, values[kind])
                values[kind] = list(values[kind])
        method = values.pop("method", {})
        if not isinstance(method, dict):
            raise ConfigError("method: wanted tables, as [method.aepo.set]; `preset` says which methods are run")
        spec = {name: value for name, value in values.items() if name in of_spec}
        spec |= {"task_set": task_set, "method_set": _sets("method", method)}
        execution = {name: value for name, value in values.items() if name in of_execution}
        return TypeAdapter(SweepSpec).validate_python(spec), TypeAdapter(Execution).validate_python(execution)
    except ValidationError as error:
        raise ConfigError(f"{file}: {configs.validation_message(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _names(kind: type, *hidden: str) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.name not in hidden]


def _sets(kind: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> settings from the tables [task.NAME.set] of a file."""
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) - {"set"}:
            raise ConfigError(f'{kind}.{name}: wanted [{kind}."{name}".set] and its settings; got {str(table)[:60]}')
    return {name: table["set"] for name, table in tables.items() if "set" in table}
