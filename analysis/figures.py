"""Figures as PNG and SVG: learning curves, performance profiles, intervals; the same input gives the same bytes.

A suite's tasks are panels of one figure: a figure of its own for each of 36 tasks would take most of a report's time.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from analysis.aggregate import STATISTICS, Aggregate, Profile
from analysis.curves import MAX_LINES, Curve
from analysis.labels import Arm

FAILED_COLOR = "#7F7F7F"
_PANEL = (3.6, 2.6)
"""Inches of a panel of learning curves."""
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "svg.hashsalt": "aepo",  # else random ids
    "text.parse_math": False,  # a $ in a name is a $
}


def draw_curves(
    suites: Mapping[str, Sequence[str]], found: Sequence[Curve], palette: Mapping[Arm, str], folder: Path
) -> dict[str, str]:
    """Write <suite>.png and .svg, a panel per task; return suite -> file stem, of those with any curve.

    Args:
        suites: suite -> its tasks.
        found: of `analysis.curves.learning_curves`.
        palette: arm -> its colour, #RRGGBB.
        folder: made if need be.
    """
    by_task: dict[str, list[Curve]] = {}
    for curve in found:
        by_task.setdefault(curve.task, []).append(curve)
    stems = {}
    for suite, tasks in suites.items():
        drawn = [task for task in tasks if any(not curve.is_level for curve in by_task.get(task, ()))]
        if not drawn:
            continue
        columns = min(3, len(drawn))
        count = math.ceil(len(drawn) / columns)
        with mpl.rc_context(_STYLE):
            figure, panels = _panels(count, columns)
            labels: dict[str, Any] = {}
            for place, (axes, task) in enumerate(zip(panels, drawn, strict=False)):
                _draw(axes, task, by_task[task], palette)
                if place + columns >= len(drawn):
                    axes.set_xlabel("gradient steps, all stages", fontsize=8.5)
                for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                    labels.setdefault(text, handle)
            for axes in panels[len(drawn) :]:
                axes.remove()
            across = max(1, min(3, len(labels)))
            figure.legend(list(labels.values()), list(labels), loc="lower center", ncols=across, frameon=False)
            _arrange(figure, count, columns, math.ceil(len(labels) / across))
            stem = stems[suite] = file_stem(suite)
            _save(figure, folder, stem, tight=columns < 3)  # the legend may be wider than two panels
    return stems


def draw_aggregates(
    found: Sequence[Aggregate], profiles: Mapping[Arm, Profile], palette: Mapping[Arm, str], folder: Path
) -> None:
    """Write intervals.png and .svg (four statistics with their intervals) and profiles.png and .svg."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 1.2 + 0.4 * len(found)), layout="constrained")
        FigureCanvasAgg(figure)
        names = [row.arm.label for row in found]
        for axes, (title, name) in zip(figure.subplots(1, 4, sharey=True), STATISTICS.items(), strict=True):
            axes.use_sticky_edges = False  # of bars, which leave no room for a value at the frame
            for place, row in enumerate(found):
                value = getattr(row, name)
                color = palette[row.arm]
                axes.barh(place, value.high - value.low, 0.55, value.low, color=color, alpha=0.45, lw=0)
                axes.plot([value.value] * 2, [place - 0.28, place + 0.28], color=color, lw=2.5)
            axes.set_yticks(range(len(names)), names)
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        if found:
            figure.axes[0].invert_yaxis()
        _save(figure, folder, "intervals")
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for arm, profile in profiles.items():
            axes.plot(profile.levels, profile.value, color=palette[arm], lw=2, label=arm.label)
            axes.fill_between(profile.levels, profile.low, profile.high, color=palette[arm], alpha=0.15, lw=0)
        axes.set_xlabel("normalized score")
        axes.set_ylabel("share of runs with a higher score")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False)
        _save(figure, folder, "profiles")


def file_stem(name: str) -> str:
    """Return a file name for a suite or task; where characters must go, a digest keeps two of them apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _arrange(figure: Figure, rows: int, columns: int, legend_rows: int) -> None:
    """Make the panels equal; their places are computed, as matplotlib's own layout would draw all twice."""
    more = 0.2 * max(0, legend_rows - 4)
    width, height = _PANEL[0] * columns + 0.3, _PANEL[1] * rows + 0.8 + more
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=0.65 / width,
        right=1 - 0.15 / width,
        bottom=(1.25 + more) / height,
        top=1 - 0.35 / height,
        wspace=0.65 / (_PANEL[0] - 0.65),
        hspace=0.65 / (_PANEL[1] - 0.65),
    )


def _draw(axes: Axes, task: str, found: Sequence[Curve], palette: Mapping[Arm, str]) -> None:
    """Draw one task: a line is the mean over its runs, the band its standard error, thin lines are runs."""
    for curve in found:
        color, name = palette[curve.arm], curve.arm.label
        if curve.is_level:
            axes.axhline(curve.mean[0], color=color, lw=1.8, ls="--", label=f"{name}, at the end")
            continue
        style = "--" if curve.is_other else "-"
        if 1 < len(curve.runs) <= MAX_LINES:
            for steps, values in curve.runs.values():
                axes.plot(steps, values, color=color, lw=0.7, alpha=0.3, ls=style)
        if len(curve.mean):
            marker = "o" if len(curve.mean) <= 30 else None
            axes.plot(curve.steps, curve.mean, color=color, lw=2, ls=style, marker=marker, ms=3.5, label=name)
            axes.fill_between(
                curve.steps, curve.mean - curve.stderr, curve.mean + curve.stderr, color=color, alpha=0.18, lw=0
            )
        for steps, values in curve.lost.values():
            lost = f"{name}, run without a result"
            axes.plot(steps, values, color=FAILED_COLOR, lw=1, ls=":", marker="x", markevery=[-1], label=lost)
    axes.set_title(task, loc="left", weight="bold", fontsize=10)
    axes.set_ylabel("return" if found[0].is_return else "normalized score", fontsize=8.5)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(y=0.1)


def _save(figure: Figure, folder: Path, stem: str, *, tight: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script is drawn as boxes
        box = "tight" if tight else None
        png: Any = {"dpi": 110, "metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
        figure.savefig(folder / f"{stem}.png", bbox_inches=box, **png)
        figure.savefig(folder / f"{stem}.svg", bbox_inches=box, metadata={"Date": None, "Creator": None})
