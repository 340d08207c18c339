"""A report in Markdown."""

from collections.abc import Mapping, Sequence

from analysis.model import (
    AGGREGATE_NOTE,
    BEST_NOTE,
    BEST_TITLE,
    DOUBT_NOTE,
    DOUBT_TITLE,
    PAIRED_NOTE,
    SCALE_NOTE,
    Comparison,
    ReportData,
    code,
)
from analysis.tables import Cell, Results, aggregate_rows, difference_rows, mean_lines


def markdown(data: ReportData, stems: Mapping[str, str], figures: str) -> str:
    """Return report.md.

    Args:
        data: what it says.
        stems: suite -> file of its learning curves, less the suffix.
        figures: folder of the figures, from where the text will lie.
    """
    best, aggregates = data.best, data.aggregates
    blocks = [
        f"# {data.heading}",
        SCALE_NOTE,
        "## Results",
        _table(data.table),
        *(_note(*note) for note in data.table.notes),
        *(
            ["## Best on the way", f"{BEST_TITLE}.", _table(best), BEST_NOTE, *(_note(*note) for note in best.notes)]
            if best
            else []
        ),
        *(
            [
                "## Over all tasks",
                _pipe_table(aggregate_rows(aggregates)),
                AGGREGATE_NOTE,
                f"![Intervals]({figures}/intervals.png)",
                f"![Performance profiles]({figures}/profiles.png)",
            ]
            if aggregates
            else []
        ),
        *(["## Runs without a result", "\n".join(f"- {code(hole)}" for hole in data.holes)] if data.holes else []),
        *(
            [f"## {DOUBT_TITLE}", DOUBT_NOTE, "\n".join(f"- {code(doubt)}" for doubt in data.doubts)]
            if data.doubts
            else []
        ),
        "## Protocol",
        "\n".join(f"- {line}" for line in data.protocol),
        _pipe_table(data.tasks),
        "## Learning curves",
        *(f"![{escape(suite)}]({figures}/{stem}.png)" for suite, stem in stems.items()),
        "Lines are means over the runs that have ended, bands their standard errors, thin lines single runs.",
        *([f"No evaluation was recorded for: {escape(', '.join(data.without_curve))}."] if data.without_curve else []),
    ]
    return "\n\n".join(blocks) + "\n"


def paired_markdown(data: Comparison) -> str:
    """Return paired.md."""
    before, after, first, second = map(code, data.names + data.commits)
    blocks = [
        "# Paired comparison",
        f"First: {before}, commit {first}. Second: {after}, commit {second}.",
        _pipe_table(difference_rows(data.rows)),
        PAIRED_NOTE,
        *mean_lines(data.means),
        *(["## On one side alone", "\n".join(f"- {escape(note)}" for note in data.notes)] if data.notes else []),
    ]
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    for sign in "\\`|*_<>[]#&$~":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ").replace("\r", " ")


def _table(table: Results) -> str:
    """Return the table, best cells bold."""
    with_runs = any(row.runs for row in table.rows)
    lines = [["suite", "task", *(escape(column.label) for column in table.columns), *(["runs"] * with_runs)]]
    lines.append(["---"] * len(lines[0]))
    for row in table.rows:
        cells = [_cell(row.cells.get(column.key)) for column in table.columns]
        lines.append([escape(row.suite), escape(row.name), *cells, *([escape(row.runs)] * with_runs)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"**{cell.text}**" if cell.is_best else cell.text
    return text + "".join(escape(f" [{mark}]" if mark.isalpha() else mark) for mark in cell.marks)


def _note(mark: str, text: str) -> str:
    return escape(f"[{mark}] {text}" if mark.isalpha() else f"{mark} {text}".strip())


def _pipe_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines)
