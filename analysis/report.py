"""The command `aepo report`: one folder with the scores, how they were measured, and what is missing.

Pandas and matplotlib load when a report is written, so that the help comes at once.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.text import Text

from aepo.console import emit_json, emit_table, emit_text, err
from aepo.errors import ConfigError, DataError, IncompleteError
from aepo.textfile import read_text

if TYPE_CHECKING:
    import pandas as pd

    from analysis.aggregate import Aggregate, Interval
    from analysis.compare import Difference
    from analysis.scores import Score
    from analysis.tables import Results

TITLE = "Normalized score of the last policy: mean ± standard error (seeds)"
BEST_TITLE = "Normalized score of the best evaluation on the way: mean ± standard error (seeds)"
BEST_NOTE = (
    "Best: each run's highest evaluation along its learning curve, the last one included. It is picked on the returns "
    "that it reports, so it flatters every method, the more the fewer episodes an evaluation has; the table of the "
    "last policy is the one to quote."
)
RANK_NOTE = "Bold: within one standard error of the row's highest mean."
AGGREGATE_TITLE = "Over all tasks: value (95 % interval)"
AGGREGATE_NOTE = (
    "Methods with every score of every task. IQM: mean of the middle half of all scores; median and mean: of the "
    "tasks' means; optimality gap: what scores lack to 100. Intervals: stratified bootstrap over seeds, 2,000 "
    "resamples (arXiv 2108.13264)."
)
PAIRED_NOTE = (
    "Difference: second less first, with 95 % interval (Student's; of the seeds' differences where both sides have the "
    "seeds, else Welch's). About one row in twenty is told higher or lower by chance."
)
FIGURES, MANIFEST = "figures", "sweep.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Turn the runs of one or more sweeps into tables, figures and one page that works offline.

    Prints the scores and writes report.html, report.md, report.tex, scores.csv and figures. If planned runs failed or
    are missing it names each, writes nothing and exits 3.

    For example:
      aepo report sweeps/mazes
      aepo report sweeps/mazes sweeps/others --json
      aepo report sweeps/mazes --published IQL@corl-last QGPO@qgpo     # and --published list
      aepo report mlflow:aepo/mazes --tracking-uri http://127.0.0.1:5000
      aepo report sweeps/before sweeps/after --paired
      aepo report searches/umaze
      aepo report searches/umaze searches/umaze-random
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP...", help_behavior_hint="")]
    """Folders that `aepo sweep` wrote, or mlflow:EXPERIMENT; their runs stand in one table. Or a folder that
    `aepo search` wrote, and if wanted another, compared with it at equal gradient steps."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: report, in the first sweep)"),
    ] = None
    """Folder for the report."""
    published: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN...", help_behavior_hint="")] = ()
    """Published scores to stand beside ours, as METHOD@SOURCE; `list` shows what there is."""
    paired: bool = False
    """Compare two sweeps, task by task: the second less the first."""
    tracking_uri: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: MLFLOW_TRACKING_URI)")] = ""
    """MLflow's, for mlflow:EXPERIMENT and for the page's links to runs."""
    allow_missing: bool = False
    """Report all the same, each hole shown as a hole."""
    json: bool = False
    """Print one JSON list, an object per task and method, instead of the table."""

    def run(self) -> int:
        """Write the report, print its scores and return the exit status."""
        if self.published == ("list",):
            return self._list_published()
        if not self.runs:
            raise ConfigError("no sweep given; wanted one folder or more: aepo report SWEEP")
        first = self.runs[0]
        out = self.out or _default_out(first)
        from analysis.search import is_search

        if is_search(first):
            return self._report_search(first, out)
        if self.paired:
            return self._compare(out)
        result = write_report(
            self.runs,
            out,
            allow_missing=self.allow_missing,
            published=self.published,
            tracking_uri=self.tracking_uri,
        )
        if self.json:
            emit_json([dataclasses.asdict(score) for score in result.scores])
        else:
            emit_table(TITLE, _terminal_rows(result.table))
            emit_text("\n".join(f"{mark} {text}".strip() for mark, text in result.table.notes))
            if result.aggregates:
                emit_table(AGGREGATE_TITLE, result.aggregates)
        err.print(f"report: {out / 'report.html'} and {out / 'report.md'}", markup=False, soft_wrap=True)
        return 0

    def _list_published(self) -> int:
        from analysis.published import column_rows

        if self.json:
            emit_json(column_rows())
        else:
            emit_table("published scores", column_rows())
        return 0

    def _compare(self, out: Path) -> int:
        if len(self.runs) != 2 or self.published:
            raise ConfigError(f"--paired compares two sweeps and no published column; got {len(self.runs)} sweeps")
        rows, notes, overall = write_comparison(
            self.runs[0], self.runs[1], out, allow_missing=self.allow_missing, tracking_uri=self.tracking_uri
        )
        if self.json:
            emit_json([dataclasses.asdict(row) | {"verdict": row.verdict} for row in rows])
        else:
            emit_table(f"{self.runs[1]} less {self.runs[0]}", _difference_rows(rows))
            emit_text("\n".join([PAIRED_NOTE, *overall, *notes]))
        err.print(f"report: {out / 'paired.md'}", markup=False, soft_wrap=True)
        return 0

    def _report_search(self, search: Path, out: Path) -> int:
        from analysis.search import write_search_report

        if len(self.runs) > 2:
            raise ConfigError(f"a search is reported alone or against one other; got {len(self.runs)} folders")
        result = write_search_report(search, out, against=self.runs[1] if len(self.runs) == 2 else None)
        if self.json:
            emit_json(dataclasses.asdict(result))
        else:
            emit_table("trials", result.trials)
            if result.confirmed:
                emit_table("found against default, on fresh seeds", result.confirmed)
            emit_text("\n".join(result.notes))
        err.print(f"report: {out / 'report.md'}", markup=False, soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportResult:
    """What a report says, for printing."""

    scores: "list[Score]"
    table: "Results"
    aggregates: list[dict[str, str]]
    """One row per method that is complete on all of several tasks."""


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    allow_missing: bool,
    published: Sequence[str] = (),
    tracking_uri: str = "",
) -> ReportResult:
    """Write report.html, .md and .tex, scores.csv and figures/ into `out` and return what they say.

    Equal input gives equal bytes.

    Raises:
        DataError: if the runs are no sound basis for a table; see `analysis.load.load_runs`.
        IncompleteError: if planned runs failed or are missing and not `allow_missing`; nothing is written.
        ConfigError: if `out` cannot be a folder, or a published column is unknown.
    """
    from analysis.aggregate import aggregate, complete_scores, profile
    from analysis.figures import draw_aggregates, draw_curves, learning_curves
    from analysis.load import grids
    from analysis.page import page
    from analysis.published import find_columns
    from analysis.scores import suite_averages, task_scores
    from analysis.tables import best_results, results

    columns = find_columns(published)
    runs, holes = _load(paths, tracking_uri, allow_missing)
    scores = task_scores(runs)
    table = results(runs, scores, suite_averages(scores), columns)
    best = best_results(scores)
    num_tasks = runs["task"].nunique()
    aggregates = aggregate(scores) if num_tasks > 1 else []
    complete = complete_scores(scores) if aggregates else {}
    levels = _levels(scores)
    profiles = {method: profile(samples, levels) for method, samples in complete.items()}
    _make(out)
    found = learning_curves(runs)
    suites = {str(suite): list(dict.fromkeys(group["task"])) for suite, group in runs.groupby("suite")}
    stems = draw_curves(suites, found, out / FIGURES)
    if aggregates:
        draw_aggregates(aggregates, profiles, out / FIGURES)
    _write_csv(out / "scores.csv", scores)
    protocol, tasks = _protocol(runs), _task_rows(runs)
    rows = _aggregate_rows(aggregates)
    _write(out / "report.md", _markdown(runs, table, best, rows, holes, stems, protocol, tasks))
    _write(out / "report.tex", _latex(table, best))
    _write(
        out / "report.html",
        page(
            runs=runs,
            title=_heading(runs),
            table=table,
            best=best,
            aggregates=aggregates,
            aggregate_rows=rows,
            profiles=profiles,
            curves=found,
            grids=grids(runs[runs["status"] == "finished"]),
            holes=holes,
            protocol=protocol,
            tasks=tasks,
            manifests=_manifests(paths),
            notes={
                "results": f"{TITLE}; 0 = random policy, 100 = expert. {RANK_NOTE}",
                "best": BEST_NOTE,
                "overall": AGGREGATE_NOTE,
            },
            tracking_uri=tracking_uri,
        ),
    )
    return ReportResult(scores=scores, table=table, aggregates=rows)


def write_comparison(
    before: Path, after: Path, out: Path, *, allow_missing: bool, tracking_uri: str = ""
) -> "tuple[list[Difference], list[str], list[str]]":
    """Write paired.md and paired.csv; return the differences, what either side lacks, and the means over all tasks.

    Raises:
        DataError: as `write_report`; if a task's data or references differ between the sides.
        IncompleteError: if either side is incomplete, or has what the other has not, and not `allow_missing`.
        ConfigError: if `out` cannot be a folder.
    """
    from analysis import compare
    from analysis.scores import task_scores
    from analysis.tables import label, number

    sides = [_load([path], tracking_uri, allow_missing) for path in (before, after)]
    if other := compare.different_data(sides[0][0], sides[1][0]):
        raise DataError(f"the two sides do not have the same data: {'; '.join(other)}; compare runs of equal data")
    scores = [task_scores(runs) for runs, _ in sides]
    rows = compare.differences(*scores)
    notes = compare.missing(rows, (str(before), str(after)))
    if notes and not allow_missing:
        for note in notes:
            err.print(note, markup=False, soft_wrap=True)
        raise IncompleteError(f"{len(notes)} differences between what the sides hold; compare with --allow-missing")
    means = [
        f"{label(method)}, mean over its tasks: {_signed(found.value)} "
        f"({number(found.low)} to {number(found.high)}, stratified bootstrap over seeds)"
        for method, found in compare.overall(rows, *scores).items()
    ]
    commits = [_listed(runs["commit"].dropna()) for runs, _ in sides]
    _make(out)
    blocks = [
        "# Paired comparison",
        f"First: {_code(str(before))}, commit {_code(commits[0])}. Second: {_code(str(after))}, commit "
        f"{_code(commits[1])}.",
        _pipe_table(_difference_rows(rows)),
        PAIRED_NOTE,
        *means,
        *(["## On one side alone", "\n".join(f"- {_escape(note)}" for note in notes)] if notes else []),
    ]
    _write(out / "paired.md", "\n\n".join(blocks) + "\n")
    _write_csv(out / "paired.csv", rows)
    return rows, notes, means


def _load(paths: Sequence[Path], tracking_uri: str, allow_missing: bool) -> "tuple[pd.DataFrame, list[str]]":
    """Return the runs and a line for each without a result."""
    from analysis.load import load_runs

    runs = load_runs(*paths, tracking_uri=tracking_uri, allow_missing=allow_missing)
    holes = _holes(runs)
    for hole in holes:
        err.print(hole, markup=False, soft_wrap=True)
    if holes and not allow_missing:
        raise IncompleteError(
            f"{len(holes)} of {len(runs)} planned runs have no result; "
            "repeat `aepo sweep` to run them, or report with --allow-missing"
        )
    return runs, holes


def _default_out(first: Path) -> Path:
    from analysis.load import MLFLOW

    if str(first).startswith(MLFLOW):
        from analysis.figures import file_stem

        return Path(f"report-{file_stem(str(first).removeprefix(MLFLOW))}")
    return (first if first.is_dir() else first.parent) / "report"


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be a folder ({error.strerror}); give another with --out") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _levels(scores: "Sequence[Score]") -> "Any":
    """Return the scores at which profiles are told: the range of all, 0 to 100 at least."""
    import numpy as np

    found = [value for score in scores for value in score.scores if math.isfinite(value)]
    return np.linspace(min(0.0, *found, 0.0), max(100.0, *found, 100.0), 101)


def _manifests(paths: Sequence[Path]) -> dict[str, Any]:
    """Return source -> its manifest, of the runs' settings the first of each method alone."""
    found = {}
    for path in paths:
        file = (path if path.is_dir() else path.parent) / MANIFEST
        try:
            document = json.loads(read_text(file))
            methods: dict[str, Any] = {}
            for name, settings in document["runs"].items():
                methods.setdefault(settings["method"], {"run": name, **settings})
            found[str(path)] = {**document, "runs": len(document["runs"]), "first run of each method": methods}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a table may stand alone
    return found


def _holes(runs: "pd.DataFrame") -> list[str]:
    """Return a line for each planned run without a result: what became of it, which it is and why."""
    lines = []
    for row in runs[runs["status"] != "finished"].to_dict("records"):
        reason = " ".join(row["error"].split()) if isinstance(row["error"], str) else ""
        reason = reason or ("never ran to an end" if row["status"] == "missing" else "no reason recorded")
        lines.append(f"{row['status']}: {row['task']} {row['method']} seed {row['seed']} ({row['run']}): {reason}")
    return lines


def _terminal_rows(table: "Results") -> list[dict[str, Any]]:
    """Return the table's rows in colours: best green, published dim, what lacks runs yellow."""
    from analysis.tables import PARTIAL

    rows = []
    for row in table.rows:
        cells: dict[str, Any] = {"suite": row.suite, "task": Text(row.name, style="" if row.is_task else "italic")}
        for column in table.columns:
            cell = row.cells.get(column.key)
            if cell is None:
                cells[column.label] = ""
                continue
            marks = "".join(f" [{mark}]" if mark.isalpha() else mark for mark in cell.marks)
            style = "bold green" if cell.is_best else "yellow" if PARTIAL in cell.marks else ""
            cells[column.label] = Text(cell.text + marks, style=style or ("dim" if column.is_published else ""))
        rows.append(cells | ({"runs": row.runs} if any(each.runs for each in table.rows) else {}))
    return rows


def _aggregate_rows(found: "Sequence[Aggregate]") -> list[dict[str, str]]:
    """Return what several tasks say together, none for one task."""
    from analysis.figures import STATISTICS
    from analysis.tables import label

    first = label(found[0].method) if found else ""
    rows = []
    for row in found:
        cells = {title: _interval(getattr(row, name), 1) for title, name in STATISTICS.items()}
        chance = "-" if row.improvement is None else _interval(row.improvement, 2)
        rows.append(
            {"method": label(row.method), "tasks": str(row.num_tasks), **cells, f"P({first} is better)": chance}
        )
    return rows


def _interval(found: "Interval", digits: int) -> str:
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})".replace("nan", "-")


def _difference_rows(rows: "Sequence[Difference]") -> list[dict[str, str]]:
    from analysis.tables import AS_RETURN, label, number

    return [
        {
            "suite": row.suite,
            "task": row.task,
            "method": label(row.method),
            "first": number(row.before_mean) + AS_RETURN * row.is_return,
            "second": number(row.after_mean),
            "difference": _signed(row.difference),
            "95 % interval": "-" if math.isnan(row.low) else f"{_signed(row.low)} to {_signed(row.high)}",
            "seeds": f"{len(row.seeds)} pairs" if row.is_paired else "not paired",
            "verdict": row.verdict,
        }
        for row in rows
    ]


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.1f}"


def _write_csv(file: Path, scores: Sequence[Any]) -> None:
    """Write one row per task and method; a list is joined with spaces; a hole is empty, in a list "nan"."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        for count, score in enumerate(scores):
            fields = dataclasses.asdict(score)
            if count == 0:
                writer.writerow(fields)
            writer.writerow([_csv_field(value) for value in fields.values()])


def _csv_field(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if isinstance(value, float) and math.isnan(value) else str(value)


def _heading(runs: "pd.DataFrame") -> str:
    return f"AEPO: {_count(runs['task'].nunique(), 'task')}, {_count(runs['seed'].nunique(), 'seed')}"


def _markdown(
    runs: "pd.DataFrame",
    table: "Results",
    best: "Results | None",
    aggregates: Sequence[dict[str, str]],
    holes: Sequence[str],
    stems: Mapping[str, str],
    protocol: Sequence[str],
    tasks: Sequence[dict[str, str]],
) -> str:
    from analysis.tables import markdown

    without = [task for task, group in runs.groupby("task") if not any(map(bool, group["curve"].dropna().map(len)))]
    blocks = [
        f"# {_heading(runs)}",
        f"{TITLE}; 0 = random policy, 100 = expert. {RANK_NOTE}",
        "## Results",
        markdown(table),
        *(_note(mark, text) for mark, text in table.notes),
        *(
            ["## Best on the way", f"{BEST_TITLE}.", markdown(best), BEST_NOTE, *(_note(*note) for note in best.notes)]
            if best
            else []
        ),
        *(
            [
                "## Over all tasks",
                _pipe_table(aggregates),
                AGGREGATE_NOTE,
                f"![Intervals]({FIGURES}/intervals.png)",
                f"![Performance profiles]({FIGURES}/profiles.png)",
            ]
            if aggregates
            else []
        ),
        *(["## Runs without a result", "\n".join(f"- {_code(hole)}" for hole in holes)] if holes else []),
        "## Protocol",
        "\n".join(f"- {line}" for line in protocol),
        _pipe_table(tasks),
        "## Learning curves",
        *(f"![{_escape(suite)}]({FIGURES}/{stem}.png)" for suite, stem in stems.items()),
        "Lines are means over the runs that have ended, bands their standard errors, thin lines single runs.",
        *([f"No evaluation was recorded for: {_escape(', '.join(map(str, without)))}."] if without else []),
    ]
    return "\n\n".join(blocks) + "\n"


def _note(mark: str, text: str) -> str:
    return _escape(f"[{mark}] {text}" if mark.isalpha() else f"{mark} {text}".strip())


def _latex(table: "Results", best: "Results | None") -> str:
    from analysis.tables import latex, latex_document, latex_text

    parts = [latex(table, caption=latex_text(f"{TITLE}. {RANK_NOTE}"))]
    if best:
        parts.append(latex(best, caption=latex_text(f"{BEST_TITLE}. {BEST_NOTE}")))
    return latex_document(*parts, num_columns=len(table.columns))


def _protocol(runs: "pd.DataFrame") -> list[str]:
    """Return how the numbers were made, in lines."""
    from analysis.load import evaluations

    finished = runs[runs["status"] == "finished"]
    results = evaluations(finished)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(runs["status"].value_counts().items()))
    return [
        f"Runs: {len(runs)} planned ({counts}); preset {_listed(runs['preset'])}.",
        f"Seeds: {_listed(runs['seed'])}. The standard error is that of the mean over seeds: their standard deviation "
        "(divisor n - 1) over the root of their number.",
        f"Evaluation: the last policy of a run, {_listed(results['num_episodes'])} episodes for each method.",
        f"Gradient steps: {_listed(finished['steps'].dropna().astype(float))} per run, all stages together.",
        "Diffusion BC is the behaviour model of a guided run: the same networks with guidance scale 0.",
        "Score: 100 (return - random) / (expert - random), with the reference returns below.",
        f"Commit: {_listed(_code(str(commit)) for commit in finished['commit'].dropna())}.",
    ]


def _task_rows(runs: "pd.DataFrame") -> list[dict[str, str]]:
    """Return for each task its data, its reference returns and how each guided method samples."""
    from analysis.load import evaluations
    from analysis.tables import label

    rows = []
    for task, planned in runs.groupby("task", sort=False):
        done = planned[planned["status"] == "finished"]
        results = evaluations(done)
        own = results[(results["method"] == results["run_method"]) & results["beta"].notna()]
        known = done if len(done) else planned
        settings = [
            f"{label(str(method))}: {_listed(group['beta'])}, {_listed(group['guidance_scale'])}"
            for method, group in own.groupby("method", sort=False)
        ]
        rows.append(
            {
                "task": str(task),
                "source": _listed(planned["source"]),
                "data set": _listed(planned["dataset"]),
                "environment": _listed(known["env_id"].dropna()) or "-",
                "random": _listed(known["ref_min"].dropna()),
                "expert": _listed(known["ref_max"].dropna()),
                "beta, guidance scale": "; ".join(settings) or "-",
                "digest": _listed(known["dataset_digest"].dropna()),
            }
        )
    return rows


def _listed(values: Iterable[object]) -> str:
    """Return the different values, sorted; a dash if there are none."""
    kinds = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    return ", ".join(f"{kind:,.10g}" if isinstance(kind, float) else str(kind) for kind in kinds) or "-"


def _pipe_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def _escape(text: str) -> str:
    from analysis.tables import escape

    return escape(text)


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
