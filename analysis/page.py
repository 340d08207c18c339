"""One HTML page with everything of a report: it holds its own scripts and data and asks for nothing over the network.

Tables are there without a script; DataTables makes them sortable, plotly.js draws. All that comes from data is escaped,
and the page's own Content-Security-Policy forbids any request.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from analysis.aggregate import STATISTICS, Aggregate, Profile
from analysis.curves import MAX_LINES, Curve, HeatMap
from analysis.labels import Arm
from analysis.model import AGGREGATE_NOTE, BEST_NOTE, DOUBT_NOTE, DOUBT_TITLE, SCALE_NOTE, ReportData, RunRow
from analysis.tables import PARTIAL, Cell, Column, Results, Row, aggregate_rows

DIGITS = 5
"""Significant digits of the numbers that plots are drawn from."""
RUN_DIGITS = {"score": 1, "return": 1, "cloned": 1, "steps": 0, "minutes": 1}
"""Digits behind the point of numbers in the run list."""
MAX_POINTS = 300
"""Points of a line that are drawn; of more, every so manyth."""


def page(data: ReportData) -> str:
    """Return report.html."""
    panels, maps = _panels(data), [_heat_map(each) for each in data.heat_maps]
    names, rows = _runs(data)
    aggregates, best = data.aggregates, data.best
    sections = {
        "results": ("Results", _paragraph(SCALE_NOTE) + _table(data.table, runs=True)),
        "best": ("Best on the way", _paragraph(BEST_NOTE) + _table(best, runs=False)) if best else None,
        "overall": ("Over all tasks", _overall(aggregate_rows(aggregates), AGGREGATE_NOTE)) if aggregates else None,
        "curves": ("Learning curves", _curves(panels, data.arms)) if panels else None,
        "grids": ("Beta and guidance scale", _grids(maps)) if maps else None,
        "holes": ("Runs without a result", _list(data.holes)) if data.holes else None,
        "doubts": (DOUBT_TITLE, _paragraph(DOUBT_NOTE) + _list(data.doubts)) if data.doubts else None,
        "runs": ("Runs", '<table id="run-table" class="row-border hover"></table>'),
        "protocol": ("Protocol", _list(data.protocol) + _plain_table(data.tasks, "details")),
        "manifest": ("Manifest", _manifests(data.manifests)) if data.manifests else None,
    }
    found = {key: section for key, section in sections.items() if section}
    body = [f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, (name, content) in found.items()]
    document = {
        "colors": {str(arm): colour for arm, colour in data.colours.items()},
        "curves": panels,
        "profiles": [_profile(arm, profile) for arm, profile in data.profiles.items()],
        "intervals": [_statistic(name, aggregates) for name in STATISTICS.values()] if aggregates else [],
        "grids": maps,
        "runs": rows,
        "run_columns": names,
        "run_digits": RUN_DIGITS,
        "mlflow": data.run_address,
    }
    web = files("analysis").joinpath("web")
    parts = {
        "TITLE": escape(data.heading),
        "FACTS": _facts(data.runs),
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


def _facts(runs: Sequence[RunRow]) -> str:
    counts = Counter(run.status for run in runs)
    num_methods, num_arms = len({run.arm.method for run in runs}), len({run.arm for run in runs})
    facts = [("", f"{len(runs):,} runs planned")]
    facts += [
        ("" if status == "finished" else "bad", f"{count:,} {status}") for status, count in sorted(counts.items())
    ]
    facts += [("", f"{num_methods} method" + "s" * (num_methods != 1))]
    facts += [("", f"{num_arms} with their variants")] if any(run.arm.variant for run in runs) else []
    facts += [("", f"data: {source}") for source in sorted({run.source for run in runs})]
    facts += [("", f"commit {commit}") for commit in sorted({run.commit for run in runs} - {""})]
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


def _curves(panels: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> str:
    legend = "".join(
        f'<span><span class="swatch" data-method="{escape(str(arm))}"></span>{escape(arm.label)}</span>' for arm in arms
    )
    plots = "".join(
        f'<div class="plot" data-name="{escape(str(panel["task"]))} {escape(str(panel["suite"]))}">'
        f'<h3>{escape(str(panel["task"]))}</h3><div class="area" data-kind="curve" data-index="{place}"></div></div>'
        for place, panel in enumerate(panels)
    )
    note = (
        "Line: mean over the runs that have ended, at the steps that all of them have; band: its standard error; thin "
        f"lines: runs, of {MAX_LINES} at most; dashed: what runs of other methods have measured besides, along the way "
        "or at the end alone; grey: runs without a result."
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


def _panels(data: ReportData) -> list[dict[str, Any]]:
    """Return what the plot of each task with a learning curve is drawn from, in the order of suites and tasks."""
    by_task: dict[str, list[Curve]] = {}
    for curve in data.curves:
        by_task.setdefault(curve.task, []).append(curve)
    return [
        {
            "task": task,
            "suite": suite,
            "unit": "return per episode" if by_task[task][0].is_return else "normalized score",
            "series": [_series(curve) for curve in by_task[task]],
        }
        for suite, tasks in sorted(data.suites.items())
        for task in sorted(tasks)
        if any(not curve.is_level for curve in by_task.get(task, ()))
    ]


def _series(curve: Curve) -> dict[str, Any]:
    lines = {
        name: [{"x": _few(steps).tolist(), "y": _numbers(_few(values))} for steps, values in runs.values()]
        for name, runs in (("runs", curve.runs if 1 < len(curve.runs) <= MAX_LINES else {}), ("lost", curve.lost))
    }
    return {
        "method": str(curve.arm),
        "label": curve.arm.label,
        "level": curve.is_level,
        **({"dash": "dash"} if curve.is_other and not curve.is_level else {}),
        "x": _few(curve.steps).tolist(),
        "mean": _numbers(_few(curve.mean)),
        "stderr": _numbers(_few(curve.stderr)),
        **lines,
    }


def _profile(arm: Arm, profile: Profile) -> dict[str, Any]:
    ends = {name: _numbers(getattr(profile, name)) for name in ("value", "low", "high")}
    return {"method": str(arm), "label": arm.label, "x": _numbers(profile.levels), **ends}


def _statistic(name: str, aggregates: Sequence[Aggregate]) -> dict[str, Any]:
    rows = []
    for row in aggregates:
        found = getattr(row, name)
        value, low, high = _numbers(np.array([found.value, found.low, found.high]))
        rows.append({"method": str(row.arm), "label": row.arm.label, "value": value, "low": low, "high": high})
    return {"rows": rows}


def _heat_map(found: HeatMap) -> dict[str, Any]:
    return {
        "task": found.task,
        "label": found.arm.label,
        **({"strength": found.strength} if found.strength != "guidance scale" else {}),
        "x": _numbers(found.strengths),
        "y": _numbers(found.betas),
        "z": [_numbers(line) for line in found.values],
    }


def _runs(data: ReportData) -> tuple[list[str], list[list[Any]]]:
    """Return the run list: names of the columns, rows."""
    with_error, with_link = any(run.error.strip() for run in data.runs), bool(data.run_address)
    with_clone = any(not math.isnan(run.cloned) for run in data.runs)
    rows = [
        {
            "status": run.status,
            "task": run.task,
            "method": run.arm.label,
            "seed": run.seed,
            "score": _rounded(run.score, 1),
            "return": _rounded(run.return_mean, 1),
            **({"cloned": _rounded(run.cloned, 1)} if with_clone else {}),
            "steps": None if run.status == "missing" else _rounded(run.steps, None),
            "minutes": None if run.status == "missing" else _rounded(run.seconds / 60, 1),
            "started": run.started_at,
            **({"error": " ".join(run.error.split())[:300]} if with_error else {}),
            **({"MLflow": run.mlflow_run_id} if with_link else {}),
        }
        for run in data.runs
    ]
    return list(rows[0]), [list(row.values()) for row in rows]


def _rounded(value: float, digits: int | None) -> float | None:
    return None if math.isnan(value) else round(value, digits)


def _few(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return at most MAX_POINTS values, the last among them."""
    every = -(-len(values) // MAX_POINTS) or 1
    return values[::-1][::every][::-1]


def _numbers(values: "np.ndarray[Any, Any]") -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
