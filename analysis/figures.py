"""Learning curves, one figure per task; the same input gives the same bytes."""

import hashlib
import re
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from analysis.load import curves, evaluations, has_references, rank

LABELS = {
    "aepo": "AEPO",
    "aepo-analytic": "AEPO analytic",
    "qgpo": "QGPO",
    "iql": "IQL",
    "td3bc": "TD3+BC",
    "diffusion-bc": "diffusion BC",
}
"""Method -> its name in tables and figures."""
COLORS = dict(zip(LABELS, ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00"), strict=True))
"""Okabe and Ito's palette, told apart by colour-blind readers; a method has the same colour everywhere."""
OTHER_COLOR = "#000000"
FAILED_COLOR = "#7F7F7F"


def draw_curves(runs: pd.DataFrame, folder: Path) -> dict[str, str]:
    """Write <task>.png and <task>.svg for every task with a curve; return the file stem of each such task."""
    points = curves(runs)
    stems = {}
    with mpl.rc_context(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E5E5E5",
            "svg.hashsalt": "aepo",  # else random ids
            "text.parse_math": False,  # a $ in a name is a $
        }
    ):
        for task, of_task in points.groupby("task"):
            figure = _draw(str(task), runs[runs["task"] == task], of_task)
            stem = stems[str(task)] = file_stem(str(task))
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{stem}.png", dpi=150, metadata={"Software": None})
            figure.savefig(folder / f"{stem}.svg", metadata={"Date": None, "Creator": None})
    return stems


def file_stem(task: str) -> str:
    """Return a file name for a task; where characters must go, a digest keeps two tasks apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-.")
    return safe if safe == task else f"{safe}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


def _draw(task: str, runs: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Draw one task: thin lines are runs, a thick line is a method's mean at the steps that all its runs have."""
    finished = runs[runs["status"] == "finished"]
    measure, unit = "score", "normalized score"
    if not has_references(runs).any():
        measure, unit = "return_mean", "return (no reference scores)"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method in points["run_method"].drop_duplicates().sort_values(key=rank):
        color, label = COLORS.get(method, OTHER_COLOR), LABELS.get(method, method)
        seeds = points[points["run_method"] == method].pivot(index="step", columns="seed", values=measure)
        ended = set(finished["seed"][finished["method"] == method])
        done = seeds[[seed for seed in seeds if seed in ended]]
        if len(done.columns) > 1:
            axes.plot(done.index, done, color=color, lw=1, alpha=0.3)
        if len(done.columns):
            mean = done.dropna().mean(axis=1)
            count = f"mean of {len(done.columns)} seeds" if len(done.columns) > 1 else "one seed"
            axes.plot(mean.index, mean, color=color, lw=2.5, marker="o", ms=4.5, label=f"{label}, {count}")
        for lost, seed in enumerate(seeds.columns.difference(done.columns)):
            line = seeds[seed].dropna()
            name = f"{label}, run without a result" if lost == 0 else None
            axes.plot(line.index, line, color=FAILED_COLOR, ls=":", marker="x", markevery=[-1], label=name)
    results = evaluations(finished)
    for method, group in results[results["method"] != results["run_method"]].groupby("method"):
        color, label = COLORS.get(str(method), OTHER_COLOR), LABELS.get(str(method), str(method))
        axes.axhline(group[measure].mean(), color=color, lw=2, ls="--", label=f"{label}, mean")
    axes.set_title(task, loc="left", weight="bold")
    axes.set_xlabel("gradient steps, all stages")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return figure
