"""Scores per task and method and per suite; a run without a result is counted, never averaged over."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.load import evaluations, rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one method reached on one task: one row of scores.csv, one object of `--json`."""

    task: str
    suite: str
    method: str
    score_mean: float
    """Mean of `scores`, 0 = random policy, 100 = expert; NaN without a result or references."""
    score_std: float
    """Sample standard deviation over seeds (divisor n - 1); NaN for fewer than two."""
    scores: tuple[float, ...]
    """One per finished run, in the order of `seeds`; NaN without reference scores."""
    return_mean: float
    """Mean over seeds of each run's mean return per episode, in the environment's own unit."""
    return_std: float
    """As `score_std`."""
    seeds: tuple[int, ...]
    """Seeds with a result, ascending."""
    num_episodes: int
    """Evaluation episodes, all seeds together."""
    num_failed: int
    """Planned runs without a result of this method, whatever the reason."""

    @property
    def is_return(self) -> bool:
        """Whether there is a result, but no reference scores: the return stands in for the score."""
        return math.isnan(self.score_mean) and not math.isnan(self.return_mean)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """The mean over the tasks of one suite of one method's means, or the reason why there is none."""

    suite: str
    method: str
    score_mean: float
    """NaN if `hole` is not empty."""
    hole: str
    """Why there is no average; empty if there is one."""


def task_scores(runs: pd.DataFrame) -> list[Score]:
    """Return one row per task and method, sorted by suite, task and method.

    A method that was evaluated on some task has a row on every task: where it has no result, a hole.
    """
    found = evaluations(runs[runs["status"] == "finished"])
    methods = pd.Series([*runs["method"], *found["method"]]).drop_duplicates().sort_values(key=rank)
    planned_by = {method: {method} & set(runs["method"]) for method in methods}
    for method, hosts in planned_by.items():  # what no run is of is measured by runs of other methods
        hosts |= set() if hosts else set(found["run_method"][found["method"] == method])
    rows = []
    for (suite, task), planned in runs.groupby(["suite", "task"]):
        for method in methods:
            results = found[(found["task"] == task) & (found["method"] == method)].sort_values("seed")
            scores = results["score"].to_list()
            returns = results["return_mean"].to_list()
            wanted = set(planned["seed"][planned["method"].isin(planned_by[method])]) or set(planned["seed"])
            rows.append(
                Score(
                    task=str(task),
                    suite=str(suite),
                    method=method,
                    score_mean=_mean(scores),
                    score_std=_std(scores),
                    scores=tuple(scores),
                    return_mean=_mean(returns),
                    return_std=_std(returns),
                    seeds=tuple(int(seed) for seed in results["seed"]),
                    num_episodes=int(results["num_episodes"].sum()),
                    num_failed=len(wanted - set(results["seed"])),
                )
            )
    return rows


def suite_averages(scores: Sequence[Score]) -> list[Average]:
    """Return one row per suite and method; a task that is not complete leaves a hole."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.suite, score.method), []).append(score)
    rows = []
    for (suite, method), tasks in groups.items():
        reasons = [
            f"{what}: {', '.join(names)}"
            for what, names in (
                ("not complete", [row.task for row in tasks if row.num_failed]),
                ("no reference scores", [row.task for row in tasks if row.is_return]),
            )
            if names
        ]
        mean = math.nan if reasons else _mean([row.score_mean for row in tasks])
        rows.append(Average(suite=suite, method=method, score_mean=mean, hole="; ".join(reasons)))
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
