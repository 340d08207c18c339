"""A report on the terminal: the tables and their notes, on standard output."""

from rich.text import Text

from aepo.console import emit_table, emit_text
from analysis.model import (
    AGGREGATE_TITLE,
    DOUBT_NOTE,
    DOUBT_TITLE,
    PAIRED_NOTE,
    TITLE,
    Comparison,
    ReportData,
)
from analysis.tables import PARTIAL, Cell, Column, Results, aggregate_rows, difference_rows, mean_lines


def print_report(data: ReportData) -> None:
    """Print the final scores, their notes, and what several tasks say together."""
    emit_table(TITLE, _rows(data.table))
    emit_text("\n".join(f"{mark} {text}".strip() for mark, text in data.table.notes))
    if data.aggregates:
        emit_table(AGGREGATE_TITLE, aggregate_rows(data.aggregates))
    if data.doubts:
        emit_text("\n".join([f"{DOUBT_TITLE}: {DOUBT_NOTE}", *data.doubts]))


def print_comparison(data: Comparison) -> None:
    """Print the differences, their means and what either side lacks."""
    before, after = data.names
    emit_table(f"{after} less {before}", difference_rows(data.rows))
    emit_text("\n".join([PAIRED_NOTE, *mean_lines(data.means), *data.notes]))


def _rows(table: Results) -> list[dict[str, str | Text]]:
    """Return the table's rows in colours: best green, published dim, what lacks runs yellow."""
    with_runs = any(row.runs for row in table.rows)
    heads: dict[str, Column] = {}
    for column in table.columns:
        head = column.label
        while head in heads or head in ("suite", "task", "runs"):  # equal labels are columns of their own
            head += " "
        heads[head] = column
    rows = []
    for row in table.rows:
        cells: dict[str, str | Text] = {
            "suite": row.suite,
            "task": Text(row.name, style="" if row.is_task else "italic"),
        }
        cells |= {head: _cell(row.cells.get(column.key), column) for head, column in heads.items()}
        rows.append(cells | ({"runs": row.runs} if with_runs else {}))
    return rows


def _cell(cell: Cell | None, column: Column) -> Text:
    if cell is None:
        return Text("")
    marks = "".join(f" [{mark}]" if mark.isalpha() else mark for mark in cell.marks)
    style = "bold green" if cell.is_best else "yellow" if PARTIAL in cell.marks else ""
    return Text(cell.text + marks, style=style or ("dim" if column.is_published else ""))
