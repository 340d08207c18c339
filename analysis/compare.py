"""One set of runs against another: per task and arm, the difference with its interval.

Where both sides have the same seeds, a seed's two runs are a pair (same weights at the start, same evaluation episodes)
and the interval is of the mean of their differences; else it is Welch's, of the difference of the means. Both are
Student's intervals: exact for normal scores, for any number of seeds from 2 on.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analysis.aggregate import Interval, interval, mean
from analysis.labels import Arm
from analysis.scores import Score

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What changed on one task for one arm: one row of paired.csv, one object of `--json`."""

    task: str
    suite: str
    method: str
    variant: str = ""
    """Name of the method's variant; empty where it has none."""
    selected_episodes: int = 0
    """Episodes on which each run selected how to act; 0 = it acts as it is set."""
    before_mean: float
    """Score (or return where there are no references) on the first side; NaN = a hole."""
    after_mean: float
    difference: float
    """Second side minus first: of the shared seeds where there are two or more, else of the means."""
    low: float
    """End of the 95 % interval; NaN where the seeds do not allow one."""
    high: float
    seeds: tuple[int, ...]
    """Seeds of a paired difference; empty for another."""
    is_paired: bool
    only_before: tuple[int, ...]
    """Seeds with a result on the first side alone."""
    only_after: tuple[int, ...]
    is_return: bool

    @property
    def arm(self) -> Arm:
        """The method with its variant."""
        return Arm(self.method, self.variant, self.selected_episodes)

    @property
    def verdict(self) -> str:
        """`higher` or `lower` if the interval lies on one side of 0, `?` without an interval, else `same`."""
        if math.isnan(self.low):
            return "?"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "same"


def differences(before: Sequence[Score], after: Sequence[Score]) -> list[Difference]:
    """Return one row per task and arm that either side has."""
    left = {(score.suite, score.task, score.arm): score for score in before}
    right = {(score.suite, score.task, score.arm): score for score in after}
    rows = []
    for suite, task, arm in dict.fromkeys([*left, *right]):
        one, other = left.get((suite, task, arm)), right.get((suite, task, arm))
        is_return = any(score is not None and score.is_return for score in (one, other))
        x, y = _by_seed(one, is_return), _by_seed(other, is_return)
        shared = sorted(set(x) & set(y))
        is_paired = len(shared) >= min(2, max(len(x), len(y), 1))
        if is_paired and shared:
            found = paired([x[seed] for seed in shared], [y[seed] for seed in shared])
        else:
            found = unpaired(list(x.values()), list(y.values()))
        rows.append(
            Difference(
                task=task,
                suite=suite,
                method=arm.method,
                variant=arm.variant,
                selected_episodes=arm.selected_episodes,
                before_mean=_mean(list(x.values())),
                after_mean=_mean(list(y.values())),
                difference=found.value,
                low=found.low,
                high=found.high,
                seeds=tuple(shared) if is_paired else (),
                is_paired=is_paired and bool(shared),
                only_before=tuple(sorted(set(x) - set(y))),
                only_after=tuple(sorted(set(y) - set(x))),
                is_return=is_return,
            )
        )
    return rows


def paired(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Return the mean of after minus before, seed by seed, with Student's interval."""
    gains = np.subtract(after, before)
    if len(gains) < 2:
        return Interval(value=_mean(gains.tolist()), low=math.nan, high=math.nan)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)) * float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return Interval(value=float(gains.mean()), low=float(gains.mean()) - half, high=float(gains.mean()) + half)


def unpaired(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Return the difference of the means, after minus before, with Welch's interval."""
    value = _mean(after) - _mean(before)
    if min(len(before), len(after)) < 2:
        return Interval(value=value, low=math.nan, high=math.nan)
    if not np.ptp(before) and not np.ptp(after):
        return Interval(value=value, low=value, high=value)
    found = stats.ttest_ind(after, before, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(value=value, low=float(found.low), high=float(found.high))


def overall(rows: Sequence[Difference], before: Sequence[Score], after: Sequence[Score]) -> dict[Arm, Interval]:
    """Return arm -> mean difference over the tasks, of arms that are paired on every task of the comparison.

    The interval is a stratified bootstrap over the seeds' differences.
    """
    left = {(score.task, score.arm): score for score in before}
    right = {(score.task, score.arm): score for score in after}
    found = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        of_arm = [row for row in rows if row.arm == arm]
        if all(row.is_paired and not row.is_return for row in of_arm):
            gains = []
            for row in of_arm:
                x, y = _by_seed(left[row.task, arm], False), _by_seed(right[row.task, arm], False)
                gains.append(np.array([y[seed] - x[seed] for seed in row.seeds]))
            found[arm] = interval(mean, gains)
    return found


def missing(rows: Sequence[Difference], names: tuple[str, str]) -> list[str]:
    """Return a line for each task and arm, or seed of it, that only one side has."""
    lines = []
    for row in rows:
        for here, there, mean_there, seeds in (
            (names[0], names[1], row.after_mean, row.only_before),
            (names[1], names[0], row.before_mean, row.only_after),
        ):
            if math.isnan(mean_there):
                if seeds:
                    lines.append(f"{row.task} {row.arm}: no result in {there}")
            elif seeds:
                lines.append(f"{row.task} {row.arm}: seeds {', '.join(map(str, seeds))} are in {here} alone")
    return lines


def different_data(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """Return a line for each task that the two sides trained on different data, or score by different references."""
    lines = []
    for column in ("source", "dataset_digest", "ref_min", "ref_max"):
        left, right = (
            dict(zip(known["task"], known[column], strict=True))
            for known in (frame.dropna(subset=column) for frame in (before, after))
        )
        for task in sorted(set(left) & set(right)):
            if left[task] != right[task]:
                lines.append(f"{task}: {column} {left[task]} against {right[task]}")
    return lines


def _by_seed(score: Score | None, is_return: bool) -> dict[int, float]:
    if score is None:
        return {}
    return dict(zip(score.seeds, score.returns if is_return else score.scores, strict=True))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
