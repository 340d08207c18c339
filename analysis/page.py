"""One HTML page with everything of a report: it holds its own scripts and data and asks for nothing over the network.

Tables are there without a script; DataTables makes them sortable, plotly.js draws. All that comes from data is escaped,
and the page's own Content-Security-Policy forbids any request.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from analysis.aggregate import Aggregate, Profile
from analysis.figures import MAX_LINES, STATISTICS, Curve, colors
from analysis.tables import PARTIAL, Cell, Column, Results, Row, label

DIGITS = 5
"""Significant ones of the numbers that plots are drawn from."""
RUN_DIGITS = {"score": 1, "return": 1, "steps": 0, "minutes": 1}
"""Of numbers in the run list."""
MAX_POINTS = 300
"""Of a line that is drawn; of more, every so manyth."""


def page(
    *,
    runs: pd.DataFrame,
    title: str,
    table: Results,
    best: Results | None,
    aggregates: Sequence[Aggregate],
    aggregate_rows: Sequence[Mapping[str, str]],
    profiles: Mapping[str, Profile],
    curves: Sequence[Curve],
    grids: pd.DataFrame,
    holes: Sequence[str],
    protocol: Sequence[str],
    tasks: Sequence[Mapping[str, str]],
    manifests: Mapping[str, Any],
    notes: Mapping[str, str],
    tracking_uri: str,
) -> str:
    """Return the page.

    Args:
        runs: of `analysis.load.load_runs`.
        title: of the page.
        table: of the last policies' scores.
        best: of the best evaluations; None = no such section.
        aggregates: over all tasks; empty = no such section.
        aggregate_rows: the same, printed.
        profiles: of the methods in `aggregates`.
        curves: of `analysis.figures.learning_curves`.
        grids: of `analysis.load.grids`.
        holes: a line for each run without a result.
        protocol: lines that say how the numbers were made.
        tasks: a row for each task, printed.
        manifests: source -> JSON document.
        notes: what stands below the headings `results`, `best` and `overall`.
        tracking_uri: MLflow's; runs are linked if it is http(s), MLFLOW_TRACKING_URI if empty.
    """
    methods = list(dict.fromkeys([*runs["method"], *(curve.method for curve in curves)]))
    methods += [column.key for column in table.columns if not column.is_published and column.key not in methods]
    panels = _panels(runs, curves)
    maps = _maps(grids)
    mlflow = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    mlflow = (
        re.sub(r"//[^/@]*@", "//", mlflow).rstrip("/") + "/#/runs/"
        if mlflow.startswith(("http://", "https://"))
        else ""
    )
    names, rows = _runs(runs, with_links=bool(mlflow))
    sections = {
        "results": ("Results", _paragraph(notes["results"]) + _table(table, runs=True)),
        "best": ("Best on the way", _paragraph(notes["best"]) + _table(best, runs=False)) if best else None,
        "overall": ("Over all tasks", _overall(aggregate_rows, notes["overall"])) if aggregates else None,
        "curves": ("Learning curves", _curves(panels, methods)) if panels else None,
        "grids": ("Beta and guidance scale", _grids(maps)) if maps else None,
        "holes": ("Runs without a result", _list(holes)) if holes else None,
        "runs": ("Runs", '<table id="run-table" class="row-border hover"></table>'),
        "protocol": ("Protocol", _list(protocol) + _plain_table(tasks, "details")),
        "manifest": ("Manifest", _manifests(manifests)) if manifests else None,
    }
    found = {key: section for key, section in sections.items() if section}
    body = [f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, (name, content) in found.items()]
    document = {
        "colors": {method: shade for method, shade in colors(methods).items() if method in methods},
        "curves": panels,
        "profiles": [_profile(method, profile) for method, profile in profiles.items()],
        "intervals": [_statistic(name, aggregates) for name in STATISTICS.values()] if aggregates else [],
        "grids": maps,
        "runs": rows,
        "run_columns": names,
        "run_digits": RUN_DIGITS,
        "mlflow": mlflow,
    }
    web = files("analysis").joinpath("web")
    parts = {
        "TITLE": escape(title),
        "FACTS": _facts(runs),
        "NAV": "".join(f'<a href="#{key}">{name}</a>' for key, (name, _) in found.items()),
        "BODY": "\n".join(body),
        "DATA": _script(json.dumps(document, separators=(",", ":"), allow_nan=False)),
        "TABLE_CSS": web.joinpath("dataTables.min.css").read_text(encoding="utf-8"),
        "PAGE_CSS": web.joinpath("page.css").read_text(encoding="utf-8"),
        "TABLE_JS": web.joinpath("dataTables.min.js").read_text(encoding="utf-8"),
        "PLOT_JS": web.joinpath("plotly-cartesian.min.js").read_text(encoding="utf-8"),
        "PAGE_JS": web.joinpath("page.js").read_text(encoding="utf-8"),
    }
    template = web.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@", lambda found: parts[found[1]], template)


def _script(text: str) -> str:
    """Return JSON that cannot end the element that it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(runs: pd.DataFrame) -> str:
    counts = runs["status"].value_counts()
    facts = [("", f"{len(runs):,} runs planned")]
    facts += [
        ("" if status == "finished" else "bad", f"{counts[status]:,} {status}") for status in sorted(counts.index)
    ]
    facts += [("", f"{runs['method'].nunique()} method" + "s" * (runs["method"].nunique() != 1))]
    facts += [("", f"data: {source}") for source in sorted(runs["source"].unique())]
    facts += [("", f"commit {commit}") for commit in sorted(runs["commit"].dropna().unique())]
    return "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in facts)


def _table(table: Results, *, runs: bool) -> str:
    heads = "".join(_head(column) for column in table.columns) + ("<th>runs</th>" if runs else "")
    body, foot = (
        "".join(_row(row, table.columns, runs) for row in table.rows if row.is_task == is_task)
        for is_task in (True, False)
    )
    notes = "".join(
        f"<li>{f'<sup>{escape(mark)}</sup> ' if mark else ''}{escape(text)}</li>" for mark, text in table.notes
    )
    return (
        f'<div class="scroll"><table class="scores row-border hover">'
        f"<thead><tr><th>suite</th><th>task</th>{heads}</tr></thead>"
        f"<tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _head(column: Column) -> str:
    swatch = "" if column.is_published else f'<span class="swatch" data-method="{escape(column.key)}"></span>'
    kind = "num published" if column.is_published else "num"
    return f'<th class="{kind}">{swatch}{escape(column.label)}</th>'


def _row(row: Row, columns: Sequence[Column], runs: bool) -> str:
    cells = "".join(_cell(row.cells.get(column.key), column) for column in columns)
    end = f"<td>{escape(row.runs)}</td>" if runs else ""
    return f"<tr><td>{escape(row.suite)}</td><td>{escape(row.name)}</td>{cells}{end}</tr>"


def _cell(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return '<td class="num" data-order="-1e300"></td>'
    kinds = (
        ["num"] + ["best"] * cell.is_best + ["published"] * column.is_published + ["partial"] * (PARTIAL in cell.marks)
    )
    order = "-1e300" if math.isnan(cell.mean) else f"{cell.mean:.6g}"
    text = escape(cell.text)
    if cell.count:
        text = re.sub(r" (\(\d+\))$", r' <span class="count">\1</span>', text)
    marks = "".join(f"<sup>{escape(mark)}</sup>" for mark in cell.marks)
    return f'<td class="{" ".join(kinds)}" data-order="{order}">{text}{marks}</td>'


def _overall(rows: Sequence[Mapping[str, str]], note: str) -> str:
    plots = "".join(
        f'<div class="plot"><h3>{title}</h3><div class="area" data-kind="interval" data-index="{place}"></div></div>'
        for place, title in enumerate(STATISTICS)
    )
    profile = '<div class="plot"><h3>Performance profiles</h3><div class="area" data-kind="profile"></div></div>'
    return (
        f'{_paragraph(note)}{_plain_table(rows, "overall")}<div class="plots small">{plots}</div>'
        f'<div class="plots wide">{profile}</div>'
        + _paragraph("Profile: the share of runs (tasks weigh equally) above each score, with its 95 % interval.")
    )


def _curves(panels: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    legend = "".join(
        f'<span><span class="swatch" data-method="{escape(method)}"></span>{escape(label(method))}</span>'
        for method in methods
    )
    plots = "".join(
        f'<div class="plot" data-name="{escape(str(panel["task"]))} {escape(str(panel["suite"]))}">'
        f'<h3>{escape(str(panel["task"]))}</h3><div class="area" data-kind="curve" data-index="{place}"></div></div>'
        for place, panel in enumerate(panels)
    )
    note = (
        "Line: mean over the runs that have ended, at the steps that all of them have; band: its standard error; thin "
        f"lines: runs, of {MAX_LINES} at most; dashed: measured at the end alone; grey: runs without a result."
    )
    return (
        '<div class="tools"><label>Filter <input type="search" id="curve-filter" placeholder="task or suite"></label>'
        f'</div><div class="legend">{legend}</div>{_paragraph(note)}<div class="plots">{plots}</div>'
    )


def _grids(maps: Sequence[Mapping[str, Any]]) -> str:
    plots = "".join(
        f'<div class="plot"><h3>{escape(str(each["task"]))}, {escape(str(each["label"]))}</h3>'
        f'<div class="area" data-kind="grid" data-index="{place}"></div></div>'
        for place, each in enumerate(maps)
    )
    note = (
        "Score (return, without references), mean over the runs that have ended, over the two settings that are chosen "
        "after training. The cell that is best here was picked on these very returns."
    )
    return f'{_paragraph(note)}<div class="plots">{plots}</div>'


def _manifests(manifests: Mapping[str, Any]) -> str:
    return "".join(
        f"<details><summary>{escape(source)}</summary><pre>{escape(json.dumps(document, indent=1))}</pre></details>"
        for source, document in manifests.items()
    )


def _list(lines: Sequence[str]) -> str:
    return '<ul class="holes">' + "".join(f"<li>{escape(line.replace('`', ''))}</li>" for line in lines) + "</ul>"


def _paragraph(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _plain_table(rows: Sequence[Mapping[str, str]], kind: str) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _panels(runs: pd.DataFrame, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return what the plot of each task with a learning curve is drawn from, in the order of suites and tasks."""
    suites = dict(zip(runs["task"], runs["suite"], strict=True))
    by_task: dict[str, list[Curve]] = {}
    for curve in curves:
        by_task.setdefault(curve.task, []).append(curve)
    return [
        {
            "task": task,
            "suite": suites[task],
            "unit": "return per episode" if by_task[task][0].is_return else "normalized score",
            "series": [_series(curve) for curve in by_task[task]],
        }
        for task in sorted(by_task, key=lambda task: (suites[task], task))
        if any(not curve.is_level for curve in by_task[task])
    ]


def _series(curve: Curve) -> dict[str, Any]:
    lines = {
        name: [{"x": _few(steps).tolist(), "y": _numbers(_few(values))} for steps, values in runs.values()]
        for name, runs in (("runs", curve.runs if 1 < len(curve.runs) <= MAX_LINES else {}), ("lost", curve.lost))
    }
    return {
        "method": curve.method,
        "label": label(curve.method),
        "level": curve.is_level,
        "x": _few(curve.steps).tolist(),
        "mean": _numbers(_few(curve.mean)),
        "stderr": _numbers(_few(curve.stderr)),
        **lines,
    }


def _profile(method: str, profile: Profile) -> dict[str, Any]:
    ends = {name: _numbers(getattr(profile, name)) for name in ("value", "low", "high")}
    return {"method": method, "label": label(method), "x": _numbers(profile.levels), **ends}


def _statistic(name: str, aggregates: Sequence[Aggregate]) -> dict[str, Any]:
    rows = []
    for row in aggregates:
        found = getattr(row, name)
        value, low, high = _numbers(np.array([found.value, found.low, found.high]))
        rows.append({"method": row.method, "label": label(row.method), "value": value, "low": low, "high": high})
    return {"rows": rows}


def _maps(grids: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a heat map per task and method: mean over runs, None where a run lacks a cell that others have."""
    maps = []
    for (task, method), group in grids.groupby(["task", "run_method"], sort=False):
        measure = "return_mean" if group["score"].isna().all() else "score"
        cells = group.pivot_table(index="beta", columns="guidance_scale", values=measure, aggfunc="mean")
        counts = group.pivot_table(index="beta", columns="guidance_scale", values=measure, aggfunc="count")
        whole = cells.where(counts == group["run"].nunique())
        maps.append(
            {
                "task": task,
                "label": label(str(method)),
                "x": _numbers(cells.columns.to_numpy(float)),
                "y": _numbers(cells.index.to_numpy(float)),
                "z": [_numbers(line) for line in whole.to_numpy(float)],
            }
        )
    return maps


def _runs(runs: pd.DataFrame, *, with_links: bool) -> tuple[list[str], list[list[Any]]]:
    """Return the run list: names of the columns, rows."""
    columns: dict[str, list[Any]] = {
        "status": runs["status"].to_list(),
        "task": runs["task"].to_list(),
        "method": [label(method) for method in runs["method"]],
        "seed": runs["seed"].to_list(),
        "score": [None if math.isnan(value) else round(value, 1) for value in runs["score"].astype(float)],
        "return": [None if math.isnan(value) else round(value, 1) for value in runs["return_mean"].astype(float)],
        "steps": [None if math.isnan(value) else int(value) for value in runs["steps"].astype(float)],
        "minutes": [None if math.isnan(value) else round(value / 60, 1) for value in runs["seconds"].astype(float)],
        "started": [value if isinstance(value, str) else "" for value in runs["started_at"]],
        "error": [" ".join(value.split())[:300] if isinstance(value, str) else "" for value in runs["error"]],
    }
    if with_links:
        columns["MLflow"] = [value if isinstance(value, str) else "" for value in runs["mlflow_run_id"]]
    if not any(columns["error"]):
        del columns["error"]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _few(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return at most MAX_POINTS values, the last among them."""
    every = -(-len(values) // MAX_POINTS) or 1
    return values[::-1][::every][::-1]


def _numbers(values: "np.ndarray[Any, Any]") -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
