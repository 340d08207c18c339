"""Aggregates over tasks with intervals: what a table of few seeds can say (Agarwal et al. 2021, arXiv 2108.13264).

A method's scores are one array per task, one number per seed. Intervals resample the seeds of each task on their own
(stratified bootstrap, percentiles); the same input gives the same numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.scores import Score

Scores: TypeAlias = Sequence[NDArray[np.float64]]
"""Per task, the scores of its seeds."""
Statistic: TypeAlias = Callable[..., Any]
"""(samples, one per task, [..., seeds]; axis=-1) -> statistic [...]."""
TRIM = 0.25
"""Of the scores at each end, left out by the interquartile mean."""
TARGET = 100.0
"""Score that the optimality gap is measured to: expert."""
NUM_RESAMPLES, CONFIDENCE = 2_000, 0.95


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A statistic of the scores, and the ends of its interval; NaN where a task has one seed."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Aggregate:
    """One method over all tasks on which it has every score."""

    method: str
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
    """Probability that the first method's score on a task is above this one's, ties counted half; None = itself."""


def iqm(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    """Return the interquartile mean of all scores together."""
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
        difference = x[..., :, None] - y[..., None, :]
        parts.append(np.mean((difference > 0) + 0.5 * (difference == 0), axis=(-2, -1)))
    return np.mean(parts, axis=0)


def interval(statistic: Statistic, samples: Scores, *, seed: int = 0) -> Interval:
    """Return a statistic with its 95 % interval by stratified bootstrap.

    Args:
        statistic: of this module.
        samples: per task, the scores of its seeds.
        seed: of the resampling.
    """
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


def aggregate(scores: Sequence[Score]) -> list[Aggregate]:
    """Return one row per method that has every score of every task; the others have none.

    The first method of the scores' order is the one whose improvement over the others is told.
    """
    tasks = list(dict.fromkeys(score.task for score in scores))
    by_method: dict[str, dict[str, NDArray[np.float64]]] = {}
    for score in scores:
        complete = not score.num_failed and not score.is_return and bool(score.scores)
        by_method.setdefault(score.method, {})
        if complete:
            by_method[score.method][score.task] = np.array(score.scores)
    whole = {method: [found[task] for task in tasks] for method, found in by_method.items() if len(found) == len(tasks)}
    first = next(iter(whole), None)
    return [
        Aggregate(
            method=method,
            num_tasks=len(tasks),
            iqm=interval(iqm, samples),
            median=interval(median, samples),
            mean=interval(mean, samples),
            optimality_gap=interval(optimality_gap, samples),
            improvement=None if method == first else interval(improvement, [*whole[str(first)], *samples]),
        )
        for method, samples in whole.items()
    ]
