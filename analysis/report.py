"""The command `aepo report`: one folder with the scores, how they were measured, and what is missing.

Pandas and matplotlib load when a report is written, so that the help comes at once.
"""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from aepo.console import emit_json, emit_table, emit_text, err
from aepo.errors import ConfigError, IncompleteError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.scores import Average, Score

TITLE = "Normalized score: mean ± standard deviation (seeds)"
AGGREGATE_TITLE = "Over all tasks: value (95 % interval)"
AGGREGATE_NOTE = (
    "Methods with every score of every task. IQM: mean of the middle half of all scores; median and mean: of the "
    "tasks' means; optimality gap: what scores lack to 100. Intervals: stratified bootstrap over seeds, 2,000 "
    "resamples (arXiv 2108.13264)."
)
PARTIAL, AS_RETURN = "*", "†"
"""Marks behind a cell; each has its footnote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Turn the runs of one or more sweeps into tables and figures.

    Prints the scores and writes report.md, scores.csv and learning curves. If planned runs failed or are
    missing it names each, writes nothing and exits 3.

    For example:
      aepo report sweeps/mazes
      aepo report sweeps/mazes sweeps/others --json
      aepo report searches/umaze
      aepo report searches/umaze searches/umaze-random
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP...", help_behavior_hint="")]
    """Folders that `aepo sweep` wrote; their runs stand in one table. Or one that `aepo search` wrote, and if wanted
    another, compared with it at equal gradient steps."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: report, in the first sweep)"),
    ] = None
    """Folder for the report."""
    allow_missing: bool = False
    """Report all the same, each hole shown as a hole."""
    json: bool = False
    """Print one JSON list, an object per task and method, instead of the table."""

    def run(self) -> int:
        """Write the report, print its scores and return the exit status."""
        if not self.runs:
            raise ConfigError("no sweep given; wanted one folder or more: aepo report SWEEP")
        first = self.runs[0]
        out = self.out or (first if first.is_dir() else first.parent) / "report"
        from analysis.search import is_search

        if is_search(first):
            return self._report_search(first, out)
        result = write_report(self.runs, out, allow_missing=self.allow_missing)
        if self.json:
            emit_json([dataclasses.asdict(score) for score in result.scores])
        else:
            emit_table(TITLE, result.rows)
            emit_text("\n".join(result.notes))
            if result.aggregates:
                emit_table(AGGREGATE_TITLE, result.aggregates)
        err.print(f"report: {out / 'report.md'}", markup=False, soft_wrap=True)
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
    rows: list[dict[str, str]]
    """The results table: one row per task and, after each suite, its average."""
    notes: list[str]
    """Footnotes of that table."""
    aggregates: list[dict[str, str]]
    """One row per method that is complete on all of several tasks."""


def write_report(paths: Sequence[Path], out: Path, *, allow_missing: bool) -> ReportResult:
    """Write report.md, scores.csv and curves/ into `out` and return what they say; equal input, equal bytes.

    Raises:
        DataError: if the runs are no sound basis for a table; see `analysis.load.load_runs`.
        IncompleteError: if planned runs failed or are missing and not `allow_missing`; nothing is written.
        ConfigError: if `out` cannot be a folder.
    """
    from analysis.figures import draw_curves
    from analysis.load import load_runs
    from analysis.scores import suite_averages, task_scores

    runs = load_runs(*paths)
    holes = _holes(runs)
    for hole in holes:
        err.print(hole, markup=False, soft_wrap=True)
    if holes and not allow_missing:
        raise IncompleteError(
            f"{len(holes)} of {len(runs)} planned runs have no result; "
            "repeat `aepo sweep` to run them, or report with --allow-missing"
        )
    scores = task_scores(runs)
    averages = suite_averages(scores)
    rows, notes = _table(runs, scores, averages)
    aggregates = _aggregate_rows(scores)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be a folder ({error.strerror}); give another with --out") from error
    stems = draw_curves(runs, out / "curves")
    _write_csv(out / "scores.csv", scores)
    text = _markdown(runs, rows, notes, aggregates, holes, stems)
    (out / "report.md").write_text(text, encoding="utf-8", newline="\n")
    return ReportResult(scores=scores, rows=rows, notes=notes, aggregates=aggregates)


def _holes(runs: "pd.DataFrame") -> list[str]:
    """Return a line for each planned run without a result: what became of it, which it is and why."""
    lines = []
    for row in runs[runs["status"] != "finished"].to_dict("records"):
        reason = " ".join(row["error"].split()) if isinstance(row["error"], str) else ""
        reason = reason or ("never ran to an end" if row["status"] == "missing" else "no reason recorded")
        lines.append(f"{row['status']}: {row['task']} {row['method']} seed {row['seed']} ({row['run']}): {reason}")
    return lines


def _table(
    runs: "pd.DataFrame", scores: "Sequence[Score]", averages: "Sequence[Average]"
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of the results table and its footnotes."""
    from analysis.figures import LABELS

    rows, notes = [], []
    for suite in dict.fromkeys(score.suite for score in scores):
        cells: dict[str, dict[str, str]] = {}
        for score in scores:
            if score.suite == suite:
                cells.setdefault(score.task, {})[LABELS.get(score.method, score.method)] = _cell(score)
        for task, row in cells.items():
            planned = runs[runs["task"] == task]
            lost = _lost(planned)
            rows.append({"suite": suite, "task": task, **row, "runs": lost or str(len(planned))})
            if any(PARTIAL in cell for cell in row.values()):
                why = lost or "not every run was evaluated with every method"
                notes.append(f"{PARTIAL} {task}: {why}; the numbers are of the runs that have a result")
        of_suite = [average for average in averages if average.suite == suite]
        means = {LABELS.get(row.method, row.method): _number(row.score_mean) for row in of_suite}
        rows.append({"suite": suite, "task": f"average of {len(cells)}", **means, "runs": ""})
        for hole in dict.fromkeys(average.hole for average in of_suite if average.hole):
            notes.append(f"- {suite} has no average; {hole}")
    if runs["source"].nunique() > 1:
        kinds = runs.drop_duplicates("task").groupby("source", sort=False)["task"]
        named = "; ".join(f"{source}: {', '.join(tasks)}" for source, tasks in kinds)
        notes.append(f"Data of different sources, whose scores are not comparable: {named}")
    if any(score.is_return for score in scores):
        notes.append(f"{AS_RETURN} return per episode, not a score: the data set has no reference scores")
    return rows, notes


def _aggregate_rows(scores: "Sequence[Score]") -> list[dict[str, str]]:
    """Return what several tasks say together, none for one task."""
    from analysis.aggregate import aggregate
    from analysis.figures import LABELS

    if len({score.task for score in scores}) < 2:
        return []
    found = aggregate(scores)
    first = LABELS.get(found[0].method, found[0].method) if found else ""
    rows = []
    for row in found:
        cells = {
            name: f"{value.value:.1f} ({_number(value.low)} to {_number(value.high)})"
            for name, value in (
                ("IQM", row.iqm),
                ("median", row.median),
                ("mean", row.mean),
                ("optimality gap", row.optimality_gap),
            )
        }
        better = row.improvement
        chance = (
            "-" if better is None else f"{better.value:.2f} ({better.low:.2f} to {better.high:.2f})".replace("nan", "-")
        )
        label = LABELS.get(row.method, row.method)
        rows.append({"method": label, "tasks": str(row.num_tasks), **cells, f"P({first} is better)": chance})
    return rows


def _cell(score: "Score") -> str:
    mean, std = (score.return_mean, score.return_std) if score.is_return else (score.score_mean, score.score_std)
    text = f"{_number(mean)} ± {_number(std)} ({len(score.seeds)})" if score.seeds else "-"
    return text + PARTIAL * (score.num_failed > 0) + AS_RETURN * score.is_return


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _lost(planned: "pd.DataFrame") -> str:
    """Return how many of the planned runs have no result, as "1 of 2 failed"; empty if all have."""
    counts = planned["status"].value_counts()
    return ", ".join(
        f"{counts[status]} of {len(planned)} {status}" for status in ("failed", "missing") if status in counts
    )


def _write_csv(file: Path, scores: "Sequence[Score]") -> None:
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


def _markdown(
    runs: "pd.DataFrame",
    rows: Sequence[dict[str, str]],
    notes: Sequence[str],
    aggregates: Sequence[dict[str, str]],
    holes: Sequence[str],
    stems: dict[str, str],
) -> str:
    tasks = list(dict.fromkeys(runs["task"]))
    curves = [f"![{_escape(task)}](curves/{stems[task]}.png)" for task in tasks if task in stems]
    bare = [_escape(task) for task in tasks if task not in stems]
    blocks = [
        f"# AEPO: {_count(len(tasks), 'task')}, {_count(runs['seed'].nunique(), 'seed')}",
        f"{TITLE}; 0 = random policy, 100 = expert.",
        "## Results",
        _pipe_table(rows),
        *(_escape(note) for note in notes),
        *(["## Over all tasks", _pipe_table(aggregates), AGGREGATE_NOTE] if aggregates else []),
        *(["## Runs without a result", "\n".join(f"- {_code(hole)}" for hole in holes)] if holes else []),
        "## Protocol",
        "\n".join(f"- {line}" for line in _protocol(runs)),
        _pipe_table(_task_rows(runs)),
        "## Learning curves",
        *curves,
        *([f"No evaluation during stage 3 was recorded for: {', '.join(bare)}."] if bare else []),
    ]
    return "\n\n".join(blocks) + "\n"


def _protocol(runs: "pd.DataFrame") -> list[str]:
    """Return how the numbers were made, in lines."""
    from analysis.load import evaluations

    finished = runs[runs["status"] == "finished"]
    results = evaluations(finished)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(runs["status"].value_counts().items()))
    return [
        f"Runs: {len(runs)} planned ({counts}); preset {_listed(runs['preset'])}.",
        f"Seeds: {_listed(runs['seed'])}. The standard deviation is over seeds, with divisor n - 1.",
        f"Evaluation: the last policy of a run, {_listed(results['num_episodes'])} episodes for each method.",
        f"Gradient steps: {_listed(finished['steps'].dropna().astype(float))} per run, all stages together.",
        "Diffusion BC is the behaviour model of a guided run: the same networks with guidance scale 0.",
        "Score: 100 (return - random) / (expert - random), with the reference returns below.",
        f"Commit: {_listed(_code(str(commit)) for commit in finished['commit'].dropna())}.",
    ]


def _task_rows(runs: "pd.DataFrame") -> list[dict[str, str]]:
    """Return for each task its data, its reference returns and how each guided method samples."""
    from analysis.figures import LABELS
    from analysis.load import evaluations

    rows = []
    for task, planned in runs.groupby("task", sort=False):
        done = planned[planned["status"] == "finished"]
        results = evaluations(done)
        own = results[(results["method"] == results["run_method"]) & results["beta"].notna()]
        known = done if len(done) else planned
        settings = [
            f"{LABELS.get(str(method), method)}: {_listed(group['beta'])}, {_listed(group['guidance_scale'])}"
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


def _pipe_table(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    for sign in "\\|*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
