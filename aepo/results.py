"""What a run says at its end: result.json, and with what its sweep adds a row of runs.parquet. No torch.

A new field here is a new key of result.json or a new column of runs.parquet, and nothing else need know of it. Every
file has the fields without a default; those with one may be absent, since files from before they were added lack them.
"""

import dataclasses
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, with_config

from aepo.config import MAX_COUNT

if TYPE_CHECKING:
    import pyarrow as pa

DIAGNOSTICS = "trust/"
"""Begins the names of a run's diagnostics in MLflow."""
SELECTED = "selected/"
"""Stands in MLflow before what was measured of a way to act that was chosen after training."""
OF_SELECTED = ("beta", "guidance_scale", "nats", "selected_episodes")
"""Numbers of an Evaluation that MLflow has only of such a way: of others the settings say them."""
SCHEMA_VERSION = 2
"""Version of runs.parquet; a column added with a default does not change it."""
STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
"""Types and finite numbers as they are written; what other versions wrote besides is passed over."""
CLONING = "diffusion-bc"
"""Name in tables of a guided method at guidance scale 0."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


@with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A policy's returns in the evaluation environment, acting in one way."""

    method: str
    """The run's own method, or what the policy becomes at guidance scale 0."""
    beta: float | None
    """Inverse temperature; None for a policy without one, which has no guidance scale either."""
    guidance_scale: float | None
    score: float | None
    """Normalised score, 0 = random and 100 = expert; None without reference returns."""
    return_mean: float
    """Mean undiscounted return of an episode."""
    return_std: float
    """Standard deviation over the episodes; 0 for one episode, nan where it is not known."""
    num_episodes: Count
    episode_returns: tuple[float, ...]
    """Return of each episode; empty where they are not known."""
    nats: float = 0.0
    """What guidance was allowed to cost an action on the mean; 0 = no bound."""
    kl: float | None = None
    """What guidance did cost in the roll-outs, KL(guided || behaviour) in nats an action; None where not known."""
    selected_episodes: Count = 0
    """Episodes, apart from these, that were spent on choosing this way to act; 0 = it was set before training."""

    def cell(self) -> "GridCell":
        """Return it as a cell of a heat map; a policy without beta has none."""
        assert self.beta is not None
        assert self.guidance_scale is not None
        return GridCell(
            beta=self.beta,
            guidance_scale=self.guidance_scale,
            nats=self.nats,
            score=self.score,
            return_mean=self.return_mean,
            num_episodes=self.num_episodes,
        )


@with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A point of the learning curve."""

    stage: str
    step: Count
    """Gradient steps of all stages until then."""
    score: float | None
    return_mean: float
    method: str = ""
    """Whose policy was evaluated where it is not the run's own (`policy_along`); empty = the run's own."""


def selected_name(name: str, episodes: int) -> str:
    """Return the name of a method whose way to act was chosen on so many episodes; of none it is the name itself."""
    return f"{name} (selected, {episodes} episodes)" if episodes else name


def policy_along(stage: str, *, has_clone: bool) -> str:
    """Return the name of the policy along a stage before the last: the clone, where there is one, else the stage."""
    return CLONING if has_clone else stage


@with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GridCell:
    """The evaluation of one cell of the heat map over beta and guidance scale."""

    beta: float
    guidance_scale: float
    score: float | None
    return_mean: float
    num_episodes: Count
    nats: float = 0.0
    """What guidance was allowed to cost; 0 = no bound."""

    @property
    def value(self) -> float:
        """The score, or the mean return where there are no references."""
        return self.return_mean if self.score is None else self.score


@with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """What was measured of a run besides its returns (aepo/trust.py)."""

    name: str
    """The metric's name, as `energy/kl`."""
    value: float
    """The metric's value at the end of the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a run's evaluation at the end of a round measured."""

    round: int
    """Number of the round, from 1."""
    score: float | None
    return_mean: float
    steps_reused: int
    """Gradient steps that the stage store has saved the run so far."""
    cells: dict[tuple[float, float], float] = dataclasses.field(default_factory=dict)
    """(beta, guidance scale or nats) -> score, or mean return without references; empty without a heat map."""

    @property
    def value(self) -> float:
        """The score, or the mean return where there are no references; with a heat map that of its best cell."""
        return self.return_mean if self.score is None else self.score


@with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A run and how it ended: result.json."""

    run: str
    """Name of the run and of its folder."""
    task: str
    suite: str
    source: str
    """Source of the data: d4rl, minari, collected or user."""
    dataset: str
    """Minari's id."""
    dataset_digest: str | None
    env_id: str | None
    """Gymnasium's id of the evaluation environment."""
    ref_min: float | None
    """Mean return of a random policy, score 0."""
    ref_max: float | None
    """Mean return of an expert, score 100."""
    seed: Count
    fingerprint: str
    """Digest of the whole config."""
    method: str
    preset: str
    status: Literal["finished", "failed", "missing"]
    """How the run ended; `missing`: planned, without an end, as only rows of runs.parquet can be."""
    error: str | None
    score: float | None
    return_mean: float | None
    num_episodes: Count | None
    steps: Annotated[int, Field(ge=0)]
    """Gradient steps of all stages."""
    steps_reused: Annotated[int, Field(ge=0)] = 0
    """Gradient steps, of these, that the stage store saved."""
    seconds: float
    evaluations: tuple[Evaluation, ...]
    """Final evaluations, the run's own method first."""
    curve: tuple[CurvePoint, ...]
    grid: tuple[GridCell, ...] = ()
    commit: str | None
    """Git commit of the code."""
    version: str = ""
    """Version of aepo."""
    machine: str = ""
    started_at: str | None
    """When the run started: UTC, ISO 8601."""
    folder: str = ""
    """Folder of the run; in runs.parquet relative to the sweep's."""
    diagnostics: tuple[Diagnostic, ...] = ()
    """What says whether to trust the run."""
    peak_memory_gb: float | None = None
    """Most memory that the process which ended the run has held since its start, GB; evaluation processes apart."""

    @classmethod
    def unended(cls, **known: Any) -> Self:
        """Return what is known of a run without an end; what is not given is None, 0 or empty."""
        hints = get_type_hints(cls)
        nothing: dict[str, Any] = {
            field.name: None if _is_nullable(hints[field.name]) else _plain(hints[field.name])()
            for field in dataclasses.fields(cls)
            if _is_required(field)
        }
        return cls(**(nothing | {"status": "missing"} | known))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Result):
    """A row of runs.parquet: a planned run, and what its sweep knows of it."""

    schema_version: int
    mlflow_run_id: str | None
    settings: str | None = None
    """The whole config but its seed, as a JSON object of texts, equal for equal settings."""
    variant: str = ""
    """Name of the method's settings where a sweep has several; empty where it has one."""


@cache
def schema() -> "pa.Schema":
    """Return the columns of runs.parquet: those of Row; null only where a value may be None or absent."""
    import pyarrow as pa

    hints = get_type_hints(Row)
    return pa.schema(
        [
            pa.field(name, _arrow(hint), nullable=name in optional() or _is_nullable(hint))
            for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(Row))
        ]
    )


@cache
def optional() -> frozenset[str]:
    """Return the columns that a runs.parquet may lack, and that are then null: the fields of Row with a default."""
    return frozenset(field.name for field in dataclasses.fields(Row) if not _is_required(field))


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_nullable(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _plain(hint: Any) -> Any:
    """Return the class of a type's values: tuple of `tuple[float, ...]`, str of a Literal of texts."""
    return str if get_origin(hint) is Literal else get_origin(hint) or hint


def _arrow(hint: Any) -> "pa.DataType":
    import pyarrow as pa

    args = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return _arrow(next(arg for arg in args if arg is not NoneType))
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return pa.struct([(field.name, _arrow(hints[field.name])) for field in dataclasses.fields(hint)])
    kind = _plain(hint)
    if kind is tuple:
        return pa.list_(_arrow(args[0]))
    return {str: pa.string(), int: pa.int64(), float: pa.float64()}[kind]
