"""Scores that others have published, and what to keep in mind beside each; nothing in here was measured by us.

published.csv has one row per task, method and source; published_sources.csv says of each source which checkpoint it
reports, which method is its own, and what its spread is. What a source does not say stands there as unknown.
AEPO's published scores were not at hand: no cell of theirs is filled.
"""

import csv
import dataclasses
import functools
import io
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from aepo.errors import ConfigError, DataError
from aepo.files import read_text

SCORES, SOURCES = "published.csv", "published_sources.csv"
OWN = ("method", "task", "score", "spread", "source")
"""Columns of a table of the user's own."""
UNKNOWN = "AEPO"
"""A column that is always blank: its numbers are unknown here."""
CHECKPOINTS = {
    "last": "",
    "best": "best checkpoint, picked on evaluation returns; ours is the last: not ranked together",
    "offline": "checkpoint picked by an offline criterion; ours is the last",
    "unknown": "the source, as quoted here, does not say which checkpoint",
}
"""Checkpoint whose scores a source reports -> what that means beside ours."""
OTHERS = {
    "requoted": "quoted by a third party",
    "rerun": "rerun by a third party",
    "unknown": "from a third party's table",
}
"""Origin of a source's numbers of others' methods -> how a note says it."""
SPREADS = ("std", "stderr")
NOTE = (
    "Published scores are of D4RL's files, in the simulator that their authors had (mujoco-py); ours are of the "
    "environments named under Protocol."
)
D4RL = "d4rl"
"""Source of data on which all published scores were measured."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTable:
    """A published table."""

    key: str
    """Name on the command line, behind the @."""
    checkpoint: str
    """A key of CHECKPOINTS."""
    own: str
    """Method that the source proposes; empty if it tells only of others'."""
    others: str
    """A key of OTHERS."""
    spread: str
    """What stands behind the ±: `std` or `stderr` over seeds."""
    seeds: int
    """Number of seeds; 0 = not said."""
    source: str
    """Citation of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PublishedScore:
    """One cell: what a source says of a method on a task."""

    suite: str
    task: str
    """D4RL's name with its version."""
    method: str
    mean: float
    """Normalized score, 0 = random policy, 100 = expert."""
    std: float
    """Spread of the source's kind, > 0; NaN where it gives none."""
    source: PublishedTable

    @property
    def column(self) -> str:
        """Name of its column on the command line."""
        return f"{self.method}@{self.source.key}"


@functools.cache
def published() -> tuple[PublishedScore, ...]:
    """Return all cells.

    Raises:
        DataError: if a cell has no source, a number that is none, or stands there twice.
    """
    sources = {}
    for number, row in _rows(SOURCES, PublishedTable):
        checks = (row["checkpoint"] in CHECKPOINTS, row["others"] in OTHERS, row["spread"] in SPREADS, row["key"])
        if not all(checks) or row["source"] in sources:
            raise DataError(f"{SOURCES}, line {number}: {row} is no source, or stands there twice")
        sources[row["source"]] = PublishedTable(**{**row, "seeds": int(row["seeds"] or 0)})  # type: ignore[arg-type]
    cells: dict[tuple[str, str], PublishedScore] = {}
    for number, row in _rows(SCORES, PublishedScore):
        place = f"{SCORES}, line {number}: {row['task']} {row['method']}"
        if row["source"] not in sources:
            raise DataError(f"{place}: {SOURCES} has no source {row['source']!r}")
        try:
            mean, std = float(row["mean"]), float(row["std"] or "nan")
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        if not math.isfinite(mean) or std < 0 or math.isinf(std):
            raise DataError(f"{place}: mean {mean} and spread {std}, wanted finite ones and no spread below 0")
        cell = PublishedScore(**{**row, "mean": mean, "std": std, "source": sources[row["source"]]})  # type: ignore[arg-type]
        if not re.fullmatch(r"[a-z0-9-]+-v\d", cell.task) or (cell.task, cell.column) in cells:
            raise DataError(f"{place}: stands there twice, or the task has no version")
        cells[cell.task, cell.column] = cell
    return tuple(cells.values())


def find_columns(names: Sequence[str]) -> dict[str, list[PublishedScore]]:
    """Return column -> its cells for names as METHOD@SOURCE, or METHOD if it has one source; UNKNOWN has no cell.

    A name that ends in .csv is a table of the user's own.

    Raises:
        ConfigError: for a name that is unknown or has several sources.
    """
    found: dict[str, list[PublishedScore]] = {}
    for name in names:
        if name.endswith(".csv"):
            found |= own_columns(Path(name))
            continue
        if name.lower() == UNKNOWN.lower():
            found[UNKNOWN] = []
            continue
        method, _, key = name.lower().partition("@")
        cells = [cell for cell in published() if cell.method.lower() == method and key in ("", cell.source.key)]
        columns = list(dict.fromkeys(cell.column for cell in cells))
        if len(columns) != 1:
            known = columns or list(dict.fromkeys(cell.column for cell in published() if cell.method.lower() == method))
            told = f"wanted one of {', '.join(known)}" if known else "`aepo report --published list` shows what exists"
            raise ConfigError(f"no published column {name!r}, or several; {told}")
        found[columns[0]] = cells
    return found


def own_columns(file: Path) -> dict[str, list[PublishedScore]]:
    """Return column -> its cells from a user's table: columns method, task, score, spread, source.

    A spread is a standard deviation, or empty; the source says where the number is from, in words.

    Raises:
        DataError: if it is no such table; names the line.
    """
    if not file.is_file():
        raise DataError(f"no table {file}; wanted CSV with the columns {', '.join(OWN)}")
    reader = csv.DictReader(io.StringIO(read_text(file)), strict=True)
    if set(reader.fieldnames or ()) != set(OWN):
        raise DataError(f"{file} has columns {reader.fieldnames}, wanted {', '.join(OWN)}")
    found: dict[str, dict[str, PublishedScore]] = {}
    for row in reader:
        place = f"{file}, line {reader.line_num}"
        if None in row or None in row.values():
            raise DataError(f"{place}: wanted {len(OWN)} fields")
        try:
            mean, std = float(row["score"]), float(row["spread"] or "nan")
        except ValueError as error:
            raise DataError(f"{place}: {error}; wanted numbers, or no spread") from error
        if not math.isfinite(mean) or std < 0 or math.isinf(std) or not (row["method"] and row["task"]):
            raise DataError(f"{place}: wanted a method, a task, a finite score and no spread below 0; got {row}")
        source = PublishedTable(
            key=file.stem, checkpoint="unknown", own=row["method"], others="unknown", spread="std", seeds=0,
            source=row["source"] or file.name,
        )  # fmt: skip
        cell = PublishedScore(suite="", task=row["task"], method=row["method"], mean=mean, std=std, source=source)
        if found.setdefault(cell.column, {}).setdefault(cell.task, cell) is not cell:
            raise DataError(f"{place}: {cell.method} on {cell.task} stands there twice")
    return {column: list(cells.values()) for column, cells in found.items()}


def column_rows() -> list[dict[str, str]]:
    """Return one row per column: what `--published` takes, where it comes from, and its cautions."""
    rows: dict[str, dict[str, str]] = {}
    counts: dict[str, dict[str, int]] = {}
    for cell in published():
        of_suite = counts.setdefault(cell.column, {})
        of_suite[cell.suite] = of_suite.get(cell.suite, 0) + 1
        rows[cell.column] = {"column": cell.column, "checkpoint": cell.source.checkpoint}
        rows[cell.column]["tasks"] = ", ".join(f"{suite} {count}" for suite, count in of_suite.items())
        rows[cell.column]["source"] = cell.source.source
    return [rows[name] for name in sorted(rows, key=str.lower)]


def match(cells: Sequence[PublishedScore], task: str) -> PublishedScore | None:
    """Return a column's cell for a task of ours: of the same version of the data, else of another one."""
    same = [cell for cell in cells if cell.task == task]
    other = [cell for cell in cells if _base(cell.task) == _base(task)]
    return next(iter(same or other), None)


def cautions(cell: PublishedScore, task: str, data_source: str) -> list[str]:
    """Return what a reader must know to compare a cell with ours, as clauses for a footnote.

    Args:
        cell: the published one.
        task: ours.
        data_source: of our task's data, as in runs.parquet.
    """
    found = []
    if data_source != D4RL:
        found.append(f"our data are not D4RL's (source: {data_source}): not ranked together")
    if _version(cell.task) != _version(task):
        found.append(f"{_version(cell.task)} data, ours {_version(task) or 'another set'}: not ranked together")
    found += [CHECKPOINTS[cell.source.checkpoint]] if CHECKPOINTS[cell.source.checkpoint] else []
    found += [OTHERS[cell.source.others]] if cell.method != cell.source.own else []
    if math.isnan(cell.std):
        found.append("no spread given")
    elif cell.source.spread == "std" and not cell.source.seeds:
        found.append("± is a standard deviation, over a number of seeds that is not said")
    return found


def is_comparable(cell: PublishedScore, task: str, data_source: str) -> bool:
    """Return whether a cell may be ranked with ours: the same data, and no best checkpoint against a last one."""
    return data_source == D4RL and _version(cell.task) == _version(task) and cell.source.checkpoint != "best"


def stderr(cell: PublishedScore) -> float:
    """Return the standard error of a cell, NaN where the source does not let it be computed."""
    if cell.source.spread == "stderr":
        return cell.std
    return cell.std / math.sqrt(cell.source.seeds) if cell.source.seeds else math.nan


def _base(task: str) -> str:
    return re.sub(r"-v\d+$", "", task)


def _version(task: str) -> str:
    found = re.search(r"-(v\d+)$", task)
    return found[1] if found else ""


def _rows(name: str, kind: type) -> list[tuple[int, dict[str, str]]]:
    wanted = {field.name for field in dataclasses.fields(kind)}
    text = read_text(Path(str(files("analysis").joinpath(name))))
    reader = csv.DictReader(io.StringIO(text), strict=True)
    if set(reader.fieldnames or ()) != wanted:
        raise DataError(f"{name} has columns {reader.fieldnames}, wanted {sorted(wanted)}")
    rows = [(reader.line_num, row) for row in reader]
    if broken := [number for number, row in rows if None in row or None in row.values()]:
        raise DataError(f"{name}, line {broken[0]}: wanted {len(wanted)} fields")
    return rows
