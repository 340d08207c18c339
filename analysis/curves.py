"""Learning curves, over the gradient steps of all stages, and heat maps over beta and guidance scale."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.labels import Arm, in_order
from analysis.load import curves, evaluations, grids, has_references
from analysis.scores import seeds

MAX_LINES = 10
"""Runs of an arm on a task that are drawn one by one; of more, only mean and band."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One arm's learning curve on one task."""

    task: str
    arm: Arm
    is_return: bool
    """Whether the values are returns: the task has no reference scores."""
    steps: NDArray[np.int64]
    """Gradient steps, all stages together, at which every finished run was evaluated."""
    mean: NDArray[np.float64]
    """Mean over the finished runs at each step."""
    stderr: NDArray[np.float64]
    """Standard error of the mean; NaN for one run."""
    runs: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float64]]]
    """Seed -> steps and values of each finished run."""
    lost: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float64]]]
    """Seed -> steps and values of each run without a result."""
    is_level: bool = False
    """Whether it was measured at the end alone: mean and stderr hold one value, to be drawn as a line across."""
    is_other: bool = False
    """Whether runs of other arms have measured it, as the clone's: to be drawn dashed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """One arm's scores on one task over the two settings that are chosen after training."""

    task: str
    arm: Arm
    strength: str
    """The setting beside beta, "guidance scale" or "nats"."""
    strengths: NDArray[np.float64]
    """Values of that setting, [S], ascending."""
    betas: NDArray[np.float64]
    """Betas, [B], ascending."""
    values: NDArray[np.float64]
    """Mean score over runs (return, without references), [B, S]; NaN where a run lacks a cell that others have."""


def learning_curves(runs: pd.DataFrame) -> list[Curve]:
    """Return one curve per task and arm that has any evaluation on the way, then levels of those that have none.

    What the runs of an arm have measured of another policy, as the clone along stage 1, is a curve of its own. It ends
    with the final evaluation, since the stages behind do not change that policy.
    """
    scored = dict(zip(runs["task"], has_references(runs), strict=True))
    scored |= dict.fromkeys(runs["task"][has_references(runs)], True)
    finished = runs[runs["status"] == "finished"]
    found = []
    points = curves(runs)
    is_own = points["method"] == points["run_method"]
    whole_seeds_of = seeds(finished)
    for (task, method, variant), group in points[is_own].groupby(["task", "run_method", "run_variant"], sort=False):
        arm = Arm(str(method), str(variant))
        measure = "score" if scored[task] else "return_mean"
        found.append(_curve(str(task), arm, group, measure, whole_seeds_of.get((str(task), arm), set())))
    measured = evaluations(finished)
    others = measured[(measured["method"] != measured["run_method"]) | (measured["selected_episodes"] > 0)]
    others = others.assign(step=others["run"].map(dict(zip(finished["run"], finished["steps"], strict=True))))
    for (task, method, variant, count), group in others.groupby(["task", "method", "variant", "selected_episodes"]):
        measure = "score" if scored[task] else "return_mean"
        on_the_way = points[~is_own & points["run"].isin(group["run"]) & (points["method"] == method)]
        names = ["seed", "step", "score", "return_mean"]
        both = pd.concat([on_the_way[names], group[names]]) if len(on_the_way) else group[names]
        arm, whole = Arm(str(method), str(variant), int(str(count))), set(map(int, group["seed"]))
        curve = _curve(str(task), arm, both, measure, whole, is_other=True)
        found.append(curve if len(curve.steps) > 1 else _level(curve, group[measure].to_numpy(float)))
    places = {arm: place for place, arm in enumerate(in_order(curve.arm for curve in found))}
    return sorted(found, key=lambda curve: (curve.task, places[curve.arm]))


def _curve(
    task: str, arm: Arm, points: pd.DataFrame, measure: str, whole_seeds: set[int], *, is_other: bool = False
) -> Curve:
    """Return the curve of points with seed, step and measure; runs of the whole seeds have ended."""
    table = points.pivot_table(index="step", columns="seed", values=measure, aggfunc="last")
    lines = {
        int(str(seed)): (line.index.to_numpy(np.int64), line.to_numpy(float))
        for seed, column in table.items()
        if len(line := column.dropna())
    }
    whole = table[[seed for seed in table if seed in whole_seeds]].dropna()
    values, count = whole.to_numpy(float), whole.shape[1]
    spread = values.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(values), np.nan)
    return Curve(
        task=task,
        arm=arm,
        is_return=measure == "return_mean",
        steps=whole.index.to_numpy(np.int64),
        mean=values.mean(axis=1) if count else np.empty(0),
        stderr=spread,
        runs={seed: line for seed, line in lines.items() if seed in whole_seeds},
        lost={seed: line for seed, line in lines.items() if seed not in whole_seeds},
        is_other=is_other,
    )


def _level(curve: Curve, ends: NDArray[np.float64]) -> Curve:
    """Return the level of what was measured at the end alone."""
    spread = ends.std(ddof=1) / math.sqrt(len(ends)) if len(ends) > 1 else math.nan
    return dataclasses.replace(
        curve,
        steps=np.empty(0, np.int64),
        mean=np.array([ends.mean()]),
        stderr=np.array([spread]),
        runs={},
        lost={},
        is_level=True,
    )


def heat_maps(runs: pd.DataFrame) -> list[HeatMap]:
    """Return one heat map per task and arm whose finished runs were evaluated over beta and guidance scale."""
    cells = grids(runs[runs["status"] == "finished"])
    maps = []
    for (task, method, variant), group in cells.groupby(["task", "run_method", "run_variant"], sort=False):
        measure = "return_mean" if group["score"].isna().all() else "score"
        strength = "nats" if (group["nats"] > 0).any() else "guidance_scale"
        table = group.pivot_table(index="beta", columns=strength, values=measure, aggfunc="mean")
        counts = group.pivot_table(index="beta", columns=strength, values=measure, aggfunc="count")
        maps.append(
            HeatMap(
                task=str(task),
                arm=Arm(str(method), str(variant)),
                strength=strength.replace("_", " "),
                strengths=table.columns.to_numpy(float),
                betas=table.index.to_numpy(float),
                values=table.where(counts == group["run"].nunique()).to_numpy(float),
            )
        )
    return maps
