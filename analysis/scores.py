"""Scores per task and method and per suite; a run without a result is counted, never averaged over."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.load import curves, evaluations, rank


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
    score_stderr: float
    """Standard error of `score_mean`: `score_std` over the root of the number of seeds."""
    scores: tuple[float, ...]
    """One per finished run, in the order of `seeds`; NaN without reference scores."""
    returns: tuple[float, ...]
    """As `scores`: each run's mean return per episode."""
    return_mean: float
    """Mean over seeds of each run's mean return per episode, in the environment's own unit."""
    return_std: float
    """As `score_std`."""
    return_stderr: float
    """As `score_stderr`."""
    best_scores: tuple[float, ...]
    """One per finished run, in the order of `seeds`: the highest evaluation of its learning curve, the last one
    included. It is picked on the very returns that it reports, so it flatters; empty if a run has no curve."""
    best_mean: float
    """Mean of `best_scores`."""
    best_stderr: float
    """As `score_stderr`."""
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
    """Empty = over all tasks of all suites, as the tables' last row."""
    method: str
    total: float
    """Sum of the tasks' means, as D4RL tables have it."""
    score_mean: float
    """NaN if `hole` is not empty."""
    score_stderr: float
    """Of `score_mean`: the root of the sum of the tasks' squared standard errors, over their number."""
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
    highest = _highest(runs[runs["status"] == "finished"])
    rows = []
    for (suite, task), planned in runs.groupby(["suite", "task"]):
        for method in methods:
            results = found[(found["task"] == task) & (found["method"] == method)].sort_values("seed")
            scores = results["score"].to_list()
            returns = results["return_mean"].to_list()
            seeds = [int(seed) for seed in results["seed"]]
            of_curves = [highest.get((str(task), method, seed), math.nan) for seed in seeds]
            best = [] if any(map(math.isnan, of_curves)) else list(map(max, of_curves, scores))
            wanted = set(planned["seed"][planned["method"].isin(planned_by[method])]) or set(planned["seed"])
            rows.append(
                Score(
                    task=str(task),
                    suite=str(suite),
                    method=method,
                    score_mean=_mean(scores),
                    score_std=_std(scores),
                    score_stderr=_stderr(scores),
                    scores=tuple(scores),
                    returns=tuple(returns),
                    return_mean=_mean(returns),
                    return_std=_std(returns),
                    return_stderr=_stderr(returns),
                    best_scores=tuple(best),
                    best_mean=_mean(best),
                    best_stderr=_stderr(best),
                    seeds=tuple(seeds),
                    num_episodes=int(results["num_episodes"].sum()),
                    num_failed=len(wanted - set(results["seed"])),
                )
            )
    return rows


def suite_averages(scores: Sequence[Score]) -> list[Average]:
    """Return one row per suite and method, then those over all suites; a task that is not complete leaves a hole."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.suite, score.method), []).append(score)
    for score in scores:
        groups.setdefault(("", score.method), []).append(score)
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
        errors = [row.score_stderr for row in tasks]
        rows.append(
            Average(
                suite=suite,
                method=method,
                total=mean * len(tasks),
                score_mean=mean,
                score_stderr=math.nan if reasons else math.hypot(*errors) / len(errors),
                hole="; ".join(reasons),
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _highest(finished: pd.DataFrame) -> dict[tuple[str, str, int], float]:
    """Return (task, method, seed) -> the highest score of the run's curve."""
    points = curves(finished).dropna(subset="score")
    found = points.groupby(["task", "run_method", "seed"], sort=False)["score"].max().reset_index()
    keys = zip(found["task"], found["run_method"], found["seed"], strict=True)
    return dict(zip(keys, found["score"], strict=True))


def _stderr(values: Sequence[float]) -> float:
    return _std(values) / math.sqrt(len(values)) if values else math.nan


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
