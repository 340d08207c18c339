"""How every command talks: results on standard output, everything else on standard error.

With `--json` standard output holds one JSON document and nothing else.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

err = Console(stderr=True, highlight=False, emoji=False)
"""Progress, hints and messages."""


def say(text: str) -> None:
    """Print a message on standard error, brackets as they are: it may hold names and paths that users gave."""
    err.print(text, markup=False, soft_wrap=True)


def warn(text: str, *, kind: str = "warning", style: str = "yellow") -> None:
    """Print a message behind a coloured word on standard error, brackets and backslashes as they are."""
    err.print(Text.assemble((f"{kind}:", style), " ", text), soft_wrap=True)


_results: TextIO | None = None
"""Standard output while `results_only` holds it."""


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Keep standard output for the `emit_...` functions; what libraries print goes to standard error."""
    global _results
    _results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = None


def emit_json(document: Any) -> None:
    """Print one JSON document on standard output; NaN and infinity become null, as JSON has neither."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False), file=_results, flush=True)


def emit_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Print rows as a table on standard output, never cutting a cell; the columns are the first row's keys.

    A cell may be a rich Text, which keeps its style.
    """
    columns = list(columns or (rows[0].keys() if rows else []))
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for column in columns:
        numeric = bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row[column]) for column in columns))
    console = Console(file=_results, highlight=False, emoji=False, soft_wrap=True)
    console.width = console.width if console.is_terminal else 200
    console.print(table)


def emit_text(text: str) -> None:
    """Print plain text on standard output."""
    print(text, file=_results, flush=True)


def _shown(value: Any) -> Text:
    return value if isinstance(value, Text) else Text(_cell(value))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
