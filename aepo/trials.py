"""The trials of a search, as search.json holds them: what `aepo search` writes and `aepo report` reads. No torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from aepo.documents import first_fault, read_document
from aepo.errors import CheckpointError

SEARCH = "search.json"
FORMAT: Final = 1
State = Literal["running", "waiting", "finished", "stopped", "failed"]
"""State of a trial; `waiting`: for a promotion; `stopped`: never promoted."""
OPEN: tuple[State, ...] = ("running", "waiting")
"""States of a trial that may still train."""
Sampler = Literal["tpe", "random"]
_STRICT = ConfigDict(strict=True, extra="ignore")


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """What a search is; a continued one must have the same, except for the number of trials and confirming seeds."""

    tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    """Minari ids of data sets without a task of their own."""
    source: str
    """Source of the tasks' data; empty = each task's first."""
    preset: str
    overrides: dict[str, str]
    trials: int
    """Settings to try, at most."""
    sampler: Sampler
    seed: int
    """Training seed of every trial; draws and episodes follow from it."""
    rounds: int
    """Evaluations of a trial: after reduction^-(rounds-1), ..., reduction^-1 and all of its steps."""
    reduction: int
    """One in so many of the trials at a rung goes on."""
    grace: int
    """Round after which trials first wait for a promotion; 0 = none ever does."""
    num_episodes: int
    """Episodes per evaluation and pair of beta and guidance scale."""
    select_seeds: tuple[int, ...]
    """Training seeds on which the best trial must beat the preset."""
    confirm_seeds: tuple[int, ...]
    """Training seeds for the final comparison of found and default settings; no decision uses them."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the budget that is spent at the end of each round."""
        return tuple(float(self.reduction) ** (number - self.rounds + 1) for number in range(self.rounds))

    @property
    def names(self) -> list[str]:
        """Names of the tasks, then of the data sets without a task."""
        return [*self.tasks, *self.datasets]


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceText:
    """What a search varies, as text: equal for equal spaces."""

    varied: dict[str, str]
    """Dotted key -> an Optuna distribution as JSON."""
    grid: dict[str, tuple[float, ...]]
    """sampling.beta and sampling.guidance_scale -> values tried on every policy."""


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """What a trial had at the end of a round."""

    round: int
    """Number of the round, from 1."""
    score: float
    """Mean over the tasks of the score, or of the mean return where there are no references."""
    scores: dict[str, float]
    """Task or data set -> its score."""
    beta: float | None
    """Beta of the grid with which the score was best over all tasks, as `guidance_scale`; None without a grid."""
    guidance_scale: float | None
    steps_reused: int
    """Gradient steps that the stage store has saved the trial so far."""
    at: float
    """When the round ended, in seconds since the epoch."""


@with_config(_STRICT)
@dataclasses.dataclass(kw_only=True)
class Trial:
    """Settings that a search tries, and how far they have come."""

    number: int
    """Place among the trials, from 0."""
    params: dict[str, Any]
    """Dotted key -> value drawn."""
    used: dict[str, Any]
    """Drawn settings that the trial's target and learner have."""
    runs: list[str]
    """Names of its runs, one per task."""
    steps: list[int]
    """Gradient steps of all its runs at the end of each round."""
    state: State = "running"
    rounds: list[Round] = dataclasses.field(default_factory=list)
    """Rounds that have ended."""
    error: str | None = None

    @property
    def score(self) -> float:
        """Score of the last round that has ended.

        Raises:
            IndexError: if none has.
        """
        return self.rounds[-1].score

    @property
    def rank(self) -> tuple[int, float]:
        """Rounds and last score: the higher, the better."""
        return len(self.rounds), self.score if self.rounds else 0.0

    @property
    def steps_taken(self) -> list[int]:
        """Gradient steps that the trial itself had taken at the end of each of its rounds."""
        return [total - row.steps_reused for total, row in zip(self.steps, self.rounds, strict=False)]


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run of the best, found or default settings; its fields are those of a Result."""

    task: str
    seed: int
    status: Literal["finished", "failed", "missing"]
    score: float | None
    return_mean: float | None
    num_episodes: int | None
    steps: int | None
    steps_reused: int | None
    error: str | None

    @property
    def value(self) -> float | None:
        """The score, or the mean return where there are no references; None without an end."""
        return self.return_mean if self.score is None else self.score


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The best trial against the preset, on seeds of their own."""

    trial: int
    """Number of the best trial."""
    settings: dict[str, Any]
    """Settings of that trial as overrides of the preset."""
    wins: bool
    best: list[Outcome]
    preset: list[Outcome]


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The found settings against the preset's, on fresh seeds."""

    settings: dict[str, Any]
    """Found settings as overrides of the preset; empty if no trial beat it."""
    found: list[Outcome]
    default: list[Outcome]


@with_config(_STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFile:
    """What search.json holds."""

    format: Literal[1] = FORMAT
    commit: str | None
    spec: SearchSpec
    shares: tuple[float, ...]
    """Share of the budget at the end of each round."""
    space: SpaceText
    trials: list[Trial]
    select: Selection | None = None
    confirm: Confirmation | None = None


def read_search(search: Path) -> SearchFile:
    """Return what the search.json of a folder holds.

    Raises:
        CheckpointError: if there is none of this version.
    """
    path = search / SEARCH
    read_document(path, kind="search", version=FORMAT, field="trials")
    try:
        return TypeAdapter(SearchFile).validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is not a search of this version: {first_fault(error)}; "
            "bring it again, or search into another folder"
        ) from None


def count_steps(trials: Sequence[Trial]) -> tuple[int, int, int]:
    """Return the gradient steps that were taken, those that the stage store saved, and those of all trials in full."""
    begun = [trial for trial in trials if trial.rounds]
    taken = sum(trial.steps_taken[-1] for trial in begun)
    return taken, sum(trial.rounds[-1].steps_reused for trial in begun), sum(trial.steps[-1] for trial in trials)


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, str]]:
    """Return one row of text per trial for printing, the best first."""
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.rank, reverse=True):
        last = trial.rounds[-1] if trial.rounds else None
        stopped = f"stopped after round {len(trial.rounds)}" if trial.state == "stopped" else trial.state
        rows.append(
            {
                "trial": str(trial.number),
                "state": stopped + (f": {trial.error}" if trial.error else ""),
                "scores by round": "  ".join(f"{row.score:.1f}" for row in trial.rounds),
                "beta": "" if last is None or last.beta is None else f"{last.beta:g}",
                "scale": "" if last is None or last.guidance_scale is None else f"{last.guidance_scale:g}",
                "settings": words_of(trial.used),
            }
        )
    return rows


def words_of(settings: dict[str, Any]) -> str:
    """Return settings in a few words."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )
