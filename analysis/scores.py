"""Scores per task and arm and per suite; a run without a result is counted, never averaged over."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.labels import Arm, in_order
from analysis.load import arms, curves, evaluations


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one arm reached on one task: one row of scores.csv, one object of `--json`."""

    task: str
    suite: str
    method: str
    variant: str = ""
    """Name of the method's variant; empty where it has none."""
    selected_episodes: int = 0
    """Episodes on which each run selected how to act, besides those of the scores; 0 = it acts as it is set."""
    score_mean: float
    """Mean of `scores`, 0 = random policy, 100 = expert; NaN without a result or references."""
    score_std: float
    """Sample standard deviation over seeds (divisor n - 1); NaN for fewer than two."""
    score_stderr: float
    """Standard error of `score_mean`: `score_std` over the root of the number of seeds."""
    scores: tuple[float, ...]
    """Score of each finished run, in the order of `seeds`; NaN without reference scores."""
    returns: tuple[float, ...]
    """Mean return per episode of each finished run, in the order of `seeds`."""
    return_mean: float
    """Mean over seeds of each run's mean return per episode, in the environment's own unit."""
    return_std: float
    """Sample standard deviation of the returns over seeds (divisor n - 1); NaN for fewer than two."""
    return_stderr: float
    """Standard error of `return_mean`; NaN for fewer than two seeds."""
    best_scores: tuple[float, ...]
    """Highest evaluation on the learning curve of each finished run, the last one included, in the order of `seeds`.
    It is picked on the very returns that it reports, so it flatters; empty if a run has no curve."""
    best_mean: float
    """Mean of `best_scores`."""
    best_stderr: float
    """Standard error of `best_mean`; NaN for fewer than two seeds."""
    seeds: tuple[int, ...]
    """Seeds with a result, ascending."""
    num_episodes: int
    """Evaluation episodes, all seeds together."""
    num_failed: int
    """Planned runs without a result of this arm, whatever the reason."""

    @property
    def arm(self) -> Arm:
        """The method with its variant, selected or not."""
        return Arm(self.method, self.variant, self.selected_episodes)

    @property
    def is_return(self) -> bool:
        """Whether there is a result, but no reference scores: the return stands in for the score."""
        return math.isnan(self.score_mean) and not math.isnan(self.return_mean)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """The mean over the tasks of one suite of one arm's means, or the reason why there is none."""

    suite: str
    """Name of the suite; empty = all tasks of all suites, as in the tables' last row."""
    arm: Arm
    total: float
    """Sum of the tasks' means, as D4RL tables have it."""
    score_mean: float
    """Mean of the tasks' means; NaN if `hole` is not empty."""
    score_stderr: float
    """Standard error of `score_mean`: the root of the sum of the tasks' squared standard errors, over their number."""
    hole: str
    """Why there is no average; empty if there is one."""


def task_scores(runs: pd.DataFrame) -> list[Score]:
    """Return one row per task and arm, sorted by suite, task and arm.

    An arm that was evaluated on some task has a row on every task: where it has no result, a hole.
    """
    found = evaluations(runs[runs["status"] == "finished"])
    hosts = {arm: {arm} for arm in arms(runs)}
    measured = list(zip(arms(found), arms(found, "run_"), strict=True))
    for arm in {arm for arm, _ in measured} - set(hosts):  # what no run is of is measured by runs of other arms
        hosts[arm] = {host for each, host in measured if each == arm}
    seeds_of = seeds(runs)
    of_arm = dict(iter(found.groupby(["task", "method", "variant", "selected_episodes"])))
    highest = _highest(runs[runs["status"] == "finished"])
    rows = []
    for (suite, task), planned in runs.groupby(["suite", "task"]):
        for arm in in_order(hosts):
            results = of_arm.get((task, *arm), found[:0]).sort_values("seed")
            scores = results["score"].to_list()
            returns = results["return_mean"].to_list()
            measured_seeds = [int(seed) for seed in results["seed"]]
            of_curves = [highest.get((str(task), arm, seed), math.nan) for seed in measured_seeds]
            best = [] if any(map(math.isnan, of_curves)) else list(map(max, of_curves, scores))
            wanted = set().union(*(seeds_of.get((str(task), host), ()) for host in hosts[arm])) or set(planned["seed"])
            rows.append(
                Score(
                    task=str(task),
                    suite=str(suite),
                    method=arm.method,
                    variant=arm.variant,
                    selected_episodes=arm.selected_episodes,
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
                    seeds=tuple(measured_seeds),
                    num_episodes=int(results["num_episodes"].sum()),
                    num_failed=len(wanted - set(results["seed"])),
                )
            )
    return rows


def seeds(runs: pd.DataFrame) -> dict[tuple[str, Arm], set[int]]:
    """Return (task, arm) -> the seeds of its runs."""
    found: dict[tuple[str, Arm], set[int]] = {}
    for task, arm, seed in zip(runs["task"], arms(runs), runs["seed"], strict=True):
        found.setdefault((task, arm), set()).add(int(seed))
    return found


def suite_averages(scores: Sequence[Score]) -> list[Average]:
    """Return one row per suite and arm, then those over all suites; a task that is not complete leaves a hole."""
    groups: dict[tuple[str, Arm], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.suite, score.arm), []).append(score)
    for score in scores:
        groups.setdefault(("", score.arm), []).append(score)
    rows = []
    for (suite, arm), tasks in groups.items():
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
                arm=arm,
                total=mean * len(tasks),
                score_mean=mean,
                score_stderr=math.nan if reasons else math.hypot(*errors) / len(errors),
                hole="; ".join(reasons),
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _highest(finished: pd.DataFrame) -> dict[tuple[str, Arm, int], float]:
    """Return (task, arm, seed) -> the highest score of the run's curve."""
    points = curves(finished).dropna(subset="score")
    points = points[points["method"] == points["run_method"]]
    keys = ["task", "run_method", "run_variant", "seed"]
    found = points.groupby(keys, sort=False)["score"].max().reset_index()
    return dict(zip(zip(found["task"], arms(found, "run_"), found["seed"], strict=True), found["score"], strict=True))


def _stderr(values: Sequence[float]) -> float:
    return _std(values) / math.sqrt(len(values)) if values else math.nan


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
