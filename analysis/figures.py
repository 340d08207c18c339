"""Learning curves, one figure per task; the same input gives the same bytes."""

import hashlib
import re
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from analysis.load import HEADLINE, curves, evaluations, has_references

STAGE = "energy"
"""Stage 3: the guided policy changes only here."""
BASELINE = "diffusion-bc"
COLORS = {HEADLINE: "#0072B2", BASELINE: "#D55E00"}
"""Okabe and Ito's palette, told apart by colour-blind readers; a method has the same colour everywhere."""
FAILED_COLOR = "#7F7F7F"


def draw_curves(runs: pd.DataFrame, folder: Path) -> dict[str, str]:
    """Write <task>.png and <task>.svg for every task with a curve; return the file stem of each such task."""
    points = curves(runs)
    points = points[points["stage"] == STAGE]
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
    """Draw one task: thin lines are runs, the thick line is their mean at the steps that all of them have."""
    finished = runs[runs["status"] == "finished"]
    measure, label = "score", "normalized score"
    if not has_references(runs).any():
        measure, label = "return_mean", "return (no reference scores)"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seeds = points.pivot(index="step", columns="seed", values=measure)
    done = seeds[[seed for seed in seeds if seed in set(finished["seed"])]]
    if len(done.columns) > 1:
        for count, seed in enumerate(done.columns):
            name = "AEPO, each seed" if count == 0 else None
            axes.plot(done.index, done[seed], color=COLORS[HEADLINE], lw=1, alpha=0.4, label=name)
    if len(done.columns):
        mean = done.dropna().mean(axis=1)
        name = f"AEPO, mean of {len(done.columns)} seeds" if len(done.columns) > 1 else "AEPO, one seed"
        axes.plot(mean.index, mean, color=COLORS[HEADLINE], lw=2.5, marker="o", ms=4.5, label=name)
    results = evaluations(finished)
    baseline = results[results["method"] == BASELINE][measure]
    if len(baseline):
        axes.axhline(baseline.mean(), color=COLORS[BASELINE], lw=2, ls="--", label="diffusion BC, mean")
    for count, seed in enumerate(seeds.columns.difference(done.columns)):
        line = seeds[seed].dropna()
        name = "AEPO, run without a result" if count == 0 else None
        axes.plot(line.index, line, color=FAILED_COLOR, ls=":", marker="x", markevery=[-1], label=name)
    axes.set_title(task, loc="left", weight="bold")
    axes.set_xlabel("gradient steps of stage 3 (energy)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return figure
