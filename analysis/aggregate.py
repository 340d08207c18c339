"""Aggregates over tasks with intervals: what a table of few seeds can say (Agarwal et al. 2021, arXiv 2108.13264).

A method's scores are one array per task, one number per seed; tasks may have different numbers of seeds (a matrix of
runs x tasks is `list(score_RT.T)`). Intervals resample the seeds of each task on their own (stratified bootstrap,
percentiles); the same input gives the same numbers. A score that is not finite is refused: it is a hole, and what to do
about a hole is for the caller to say.

    interval(iqm, [hopper, walker])                      interval(improvement, [*ours, *theirs])
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.labels import Arm
from analysis.scores import Score

Scores: TypeAlias = Sequence[NDArray[np.float64]]
"""Scores of each task's seeds."""
Statistic: TypeAlias = Callable[..., Any]
"""(samples, one per task, [..., seeds]; axis=-1) -> statistic [...]."""
TRIM = 0.25
"""Share of the scores at each end that the interquartile mean leaves out."""
TARGET = 100.0
"""Score that the optimality gap is measured to: expert."""
NUM_RESAMPLES, CONFIDENCE = 2_000, 0.95
STATISTICS = {"IQM": "iqm", "median": "median", "mean": "mean", "optimality gap": "optimality_gap"}
"""Title -> field of Aggregate."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A statistic of the scores, and the ends of its interval; NaN where a task has one seed."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Aggregate:
    """One arm over all tasks, of which it has every score."""

    arm: Arm
    num_tasks: int
    iqm: Interval
    """Mean of the middle half of all scores."""
    median: Interval
    """Median over tasks of the tasks' means."""
    mean: Interval
    """Mean over tasks of the tasks' means."""
    optimality_gap: Interval
    """Mean of what scores lack to 100, those above it counted as 100."""
    improvement: Interval | None
    """Probability that the first arm's score on a task is above this one's, ties counted half; None for itself."""


def iqm(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    """Return the mean of the middle half of all scores together.

    Of n scores, the lowest and the highest floor(n / 4) are left out, as scipy's `trim_mean` and rliable do.
    """
    return stats.trim_mean(np.concatenate(samples, axis=axis), TRIM, axis=axis)


def median(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    """Return the median over tasks of the mean over seeds."""
    return np.median([np.mean(sample, axis=axis) for sample in samples], axis=0)


def mean(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    """Return the mean over tasks of the mean over seeds."""
    return np.mean([np.mean(sample, axis=axis) for sample in samples], axis=0)


def optimality_gap(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    """Return the mean over tasks and seeds of max(0, 100 - score)."""
    return np.mean([np.mean(np.maximum(0.0, TARGET - sample), axis=axis) for sample in samples], axis=0)


def improvement(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    """Return P(X > Y) + P(X = Y) / 2, averaged over tasks: Mann and Whitney's U over its largest value.

    Args:
        samples: X of every task, then Y of every task.
        axis: of the seeds, the last one.
    """
    assert axis == -1
    half = len(samples) // 2
    parts = []
    for x, y in zip(samples[:half], samples[half:], strict=True):
        n, m = x.shape[-1], y.shape[-1]
        ranks = stats.rankdata(np.concatenate([x, y], axis=-1), axis=-1)[..., :n]
        parts.append((ranks.sum(axis=-1) - n * (n + 1) / 2) / (n * m))
    return np.mean(parts, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The share of a method's scores above each level, tasks weighing equally, and the ends of its interval."""

    levels: NDArray[np.float64]
    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def profile(samples: Scores, levels: NDArray[np.float64], *, seed: int = 0) -> Profile:
    """Return the performance profile: at each level, the mean over tasks of the share of seeds with a score above it.

    Args:
        samples: per task, the scores of its seeds.
        levels: scores, ascending.
        seed: of the resampling.

    Raises:
        ValueError: as `interval`.
    """
    _check(samples)
    rng = np.random.default_rng(seed)
    value, drawn = np.zeros(len(levels)), np.zeros((NUM_RESAMPLES, len(levels)))
    for sample in samples:
        above = (np.asarray(sample)[:, None] > levels).astype(float)
        value += above.mean(axis=0) / len(samples)
        times = rng.multinomial(len(sample), np.full(len(sample), 1 / len(sample)), size=NUM_RESAMPLES)
        drawn += times.astype(float) @ above / (len(sample) * len(samples))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    if min(len(sample) for sample in samples) < 2:
        low = high = np.full(len(levels), np.nan)
    return Profile(levels=levels, value=value, low=low, high=high)


def _check(samples: Scores) -> None:
    if not samples or any(np.ndim(sample) != 1 or not len(sample) for sample in samples):
        raise ValueError("wanted scores of one task or more, one array of at least one seed for each")
    if holes := sum(int(np.count_nonzero(~np.isfinite(sample))) for sample in samples):
        raise ValueError(f"{holes} of {sum(map(len, samples))} scores are not finite; leave out such runs and say so")


def interval(statistic: Statistic, samples: Scores, *, seed: int = 0) -> Interval:
    """Return a statistic with its 95 % interval by stratified bootstrap.

    Args:
        statistic: of this module.
        samples: per task, the scores of its seeds.
        seed: of the resampling.

    Raises:
        ValueError: if there are no scores, or one is not finite.
    """
    _check(samples)
    value = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    found = stats.bootstrap(
        tuple(samples),
        statistic,
        n_resamples=NUM_RESAMPLES,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value=value, low=float(found.low), high=float(found.high))


def complete_scores(scores: Sequence[Score]) -> dict[Arm, list[NDArray[np.float64]]]:
    """Return arm -> its scores of every task, of the arms that have every score of every task."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    by_arm: dict[Arm, dict[str, NDArray[np.float64]]] = {}
    for score in scores:
        complete = not score.num_failed and not score.is_return and bool(score.scores)
        by_arm.setdefault(score.arm, {})
        if complete:
            by_arm[score.arm][score.task] = np.array(score.scores)
    return {arm: [found[task] for task in tasks] for arm, found in by_arm.items() if len(found) == len(tasks)}


def aggregate(scores: Sequence[Score]) -> list[Aggregate]:
    """Return one row per arm that has every score of every task; the others have none.

    The first arm of the scores' order is the one whose improvement over the others is told.
    """
    whole = complete_scores(scores)
    first = next(iter(whole.values()), [])
    return [
        Aggregate(
            arm=arm,
            num_tasks=len(samples),
            iqm=interval(iqm, samples),
            median=interval(median, samples),
            mean=interval(mean, samples),
            optimality_gap=interval(optimality_gap, samples),
            improvement=None if samples is first else interval(improvement, [*first, *samples]),
        )
        for arm, samples in whole.items()
    ]
