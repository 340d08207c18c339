"""The command `aepo report`: one folder with the scores, how they were measured, and what is missing.

Pandas and matplotlib load when a report is written, so that the help comes at once.
"""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aepo.console import emit_json, emit_table, emit_text, err
from aepo.errors import ConfigError, DataError, IncompleteError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.compare import Difference
    from analysis.model import Comparison, ReportData
    from analysis.scores import Score

FIGURES = "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Turn the runs of one or more sweeps into tables, figures and one page that works offline.

    Prints the scores and writes report.html, report.md, report.tex, scores.csv and figures. If planned runs failed or
    are missing it names each, writes nothing and exits 3.

    For example:
      aepo report sweeps/mazes
      aepo report sweeps/mazes sweeps/others --json
      aepo report sweeps/mazes --published IQL@corl-last TD3+BC@corl-last     # and --published list
      aepo report sweeps/mazes --published AEPO mine.csv
      aepo report mlflow:aepo/mazes --tracking-uri http://127.0.0.1:5000
      aepo report sweeps/before sweeps/after --paired
      aepo report searches/umaze
      aepo report searches/umaze searches/umaze-random
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP...", help_behavior_hint="")]
    """Folders that `aepo sweep` wrote, or mlflow:EXPERIMENT; their runs stand in one table.
    Or a folder that `aepo search` wrote, and if wanted another, compared with it at equal gradient steps."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: report, in the first sweep)"),
    ] = None
    """Folder for the report."""
    published: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN...", help_behavior_hint="")] = ()
    """Published scores to stand beside ours, as METHOD@SOURCE; `list` shows what there is.
    Or a table of your own, FILE.csv with the columns method, task, score, spread, source."""
    paired: bool = False
    """Compare two sweeps, task by task: the second less the first."""
    tracking_uri: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: MLFLOW_TRACKING_URI)")] = ""
    """Address of MLflow, for mlflow:EXPERIMENT and for the page's links to runs."""
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
        from analysis.search_report import is_search

        if is_search(first):
            return self._report_search(first, out)
        if self.paired:
            return self._compare(out)
        data = write_report(
            self.runs,
            out,
            allow_missing=self.allow_missing,
            published=self.published,
            tracking_uri=self.tracking_uri,
        )
        if self.json:
            emit_json(_records(data.scores))
        else:
            from analysis.terminal import print_report

            print_report(data)
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
        data = write_comparison(
            self.runs[0], self.runs[1], out, allow_missing=self.allow_missing, tracking_uri=self.tracking_uri
        )
        if self.json:
            verdicts = [{"verdict": row.verdict} for row in data.rows]
            emit_json([record | verdict for record, verdict in zip(_records(data.rows), verdicts, strict=True)])
        else:
            from analysis.terminal import print_comparison

            print_comparison(data)
        err.print(f"report: {out / 'paired.md'}", markup=False, soft_wrap=True)
        return 0

    def _report_search(self, search: Path, out: Path) -> int:
        from analysis.search_report import write_search_report

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


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    allow_missing: bool,
    published: Sequence[str] = (),
    tracking_uri: str = "",
) -> "ReportData":
    """Write report.html, .md and .tex, scores.csv and figures/ into `out` and return what they say.

    Equal input gives equal bytes.

    Raises:
        DataError: if the runs are no sound basis for a table; see `analysis.load.load_runs`.
        IncompleteError: if planned runs failed or are missing and not `allow_missing`; nothing is written.
        ConfigError: if `out` cannot be a folder, or a published column is unknown.
    """
    from analysis.figures import draw_aggregates, draw_curves
    from analysis.latex import latex
    from analysis.markdown import markdown
    from analysis.model import build_report
    from analysis.page import page
    from analysis.published import find_columns

    columns = find_columns(published)
    runs = _load(paths, tracking_uri, allow_missing)
    data = build_report(runs, sources=paths, published=columns, tracking_uri=tracking_uri)
    _make(out)
    stems = draw_curves(data.suites, data.curves, data.colours, out / FIGURES)
    if data.aggregates:
        draw_aggregates(data.aggregates, data.profiles, data.colours, out / FIGURES)
    _write_csv(out / "scores.csv", data.scores)
    _write(out / "report.md", markdown(data, stems, FIGURES))
    _write(out / "report.tex", latex(data))
    _write(out / "report.html", page(data))
    return data


def write_comparison(
    before: Path, after: Path, out: Path, *, allow_missing: bool, tracking_uri: str = ""
) -> "Comparison":
    """Write paired.md and paired.csv and return what they say.

    Raises:
        DataError: as `write_report`; if a task's data or references differ between the sides.
        IncompleteError: if either side is incomplete, or has what the other has not, and not `allow_missing`.
        ConfigError: if `out` cannot be a folder.
    """
    from analysis.compare import different_data
    from analysis.markdown import paired_markdown
    from analysis.model import build_comparison

    sides = [_load([path], tracking_uri, allow_missing) for path in (before, after)]
    if other := different_data(*sides):
        raise DataError(f"the two sides do not have the same data: {'; '.join(other)}; compare runs of equal data")
    data = build_comparison((str(before), str(after)), sides)
    if data.notes and not allow_missing:
        for note in data.notes:
            err.print(note, markup=False, soft_wrap=True)
        raise IncompleteError(
            f"{len(data.notes)} differences between what the sides hold; compare with --allow-missing"
        )
    _make(out)
    _write(out / "paired.md", paired_markdown(data))
    _write_csv(out / "paired.csv", data.rows)
    return data


def _load(paths: Sequence[Path], tracking_uri: str, allow_missing: bool) -> "pd.DataFrame":
    """Return the runs, after a line on standard error for each without a result."""
    from analysis.load import load_runs
    from analysis.model import hole_lines

    runs = load_runs(*paths, tracking_uri=tracking_uri, allow_missing=allow_missing)
    holes = hole_lines(runs)
    for hole in holes:
        err.print(hole, markup=False, soft_wrap=True)
    if holes and not allow_missing:
        raise IncompleteError(
            f"{len(holes)} of {len(runs)} planned runs have no result; "
            "repeat `aepo sweep` to run them, or report with --allow-missing"
        )
    return runs


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


def _records(found: "Sequence[Score | Difference]") -> list[dict[str, Any]]:
    """Return the fields of each; what tells arms of one method apart is there if any has it."""
    left_out = {name for name in ("variant", "selected_episodes") if not any(getattr(each, name) for each in found)}
    return [{k: v for k, v in dataclasses.asdict(each).items() if k not in left_out} for each in found]


def _write_csv(file: Path, found: "Sequence[Score | Difference]") -> None:
    """Write one row per task and arm; a list is joined with spaces; a hole is empty, in a list "nan"."""
    records = _records(found)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(records[0])
        writer.writerows([_csv_field(value) for value in record.values()] for record in records)


def _csv_field(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if isinstance(value, float) and math.isnan(value) else str(value)
