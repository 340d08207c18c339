"""A run's metrics.jsonl: one line per log, written once even if steps are repeated, read by whoever tracks the run."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, with_config
from typing_extensions import TypedDict

from aepo.config import RunConfig
from aepo.documents import first_fault, parser
from aepo.errors import CheckpointError
from aepo.results import STRICT, Count

ROUND = "round"
"""Metric of the row that a round's evaluation writes: its number, from 1."""


@with_config({**STRICT, "extra": "allow"})
class _Row(TypedDict):
    """A line of a metrics file."""

    time: Annotated[float, Field(ge=0, le=1e11)]
    """When the row was written, in seconds since the epoch."""
    stage: str
    step: Count
    num_steps: Count
    metrics: dict[str, float]


def parse_rows(path: Path, lines: bytes) -> list[dict[str, Any]]:
    """Return the rows that stand in whole lines of a metrics file.

    Raises:
        CheckpointError: for a line that is none.
    """
    rows: list[dict[str, Any]] = []
    for line in lines.splitlines():
        try:
            rows.append(dict(parser(_Row).validate_json(line)))
        except ValidationError as error:
            raise CheckpointError(
                f"{path}: {line[:60].decode(errors='replace')!r} is no row of metrics ({first_fault(error)}); "
                f"delete {path.parent} to repeat the run"
            ) from None
    return rows


def read_spool(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the whole rows of a metrics file after a byte offset, and the offset behind them.

    Raises:
        CheckpointError: if the file cannot be read, or a line is no row.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return [], offset
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    whole = text.rfind(b"\n") + 1
    return parse_rows(path, text[:whole]), offset + whole


class Spool:
    """The run's metrics.jsonl, open for appending; every (stage, step) stands in it once, and each evaluated round."""

    def __init__(self, path: Path, config: RunConfig):
        """Open it, cutting off a last line that a crash has torn.

        Raises:
            CheckpointError: if it cannot be read, or has rows that are none, or of another method.
        """
        self._config = config
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, whole = read_spool(path)
        if foreign := [row["stage"] for row in rows if row["stage"] not in config.stages]:
            raise CheckpointError(f"{path} has rows of a stage {foreign[0]!r}, which {config.method} does not have")
        self._file = path.open("ab")
        self._file.truncate(whole)
        self._last = self._place(rows[-1]) if rows else (0, 0, 0)
        self.rounds = {int(row["metrics"][ROUND]): row for row in rows if ROUND in row["metrics"]}
        """Number, from 1, of an evaluated round -> its row."""

    def _place(self, row: dict[str, Any]) -> tuple[int, int, int]:
        return self._config.place(row["stage"], int(row["step"]))

    def has(self, stage: str, step: int) -> bool:
        """Return whether a row of this step, or of a later one, is already there."""
        return self._last >= self._config.place(stage, step)

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one row; readers see whole lines only."""
        row = {
            "time": round(time.time(), 3),
            "stage": stage,
            "step": step,
            "num_steps": self._config.stages[stage].steps,
            "metrics": metrics,
        }
        self._append(row)
        if ROUND in metrics:
            self.rounds[int(metrics[ROUND])] = row
        self._file.flush()

    def copy(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows that another run wrote, those that are not there yet."""
        for row in rows:
            if self._place(row) > self._last:
                self._append(row)
        self._file.flush()

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._last = self._place(row)

    def sync(self) -> None:
        """Put all rows on the disk, before the checkpoint that makes them unrepeatable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
