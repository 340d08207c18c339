"""A run's folder: what its files are called, and how they are read and written. No torch, so that looking is quick.

config.json  kernels.json  metrics.jsonl  state.ckpt  policy.safetensors  result.json  [grid.png]  [log.txt]  run.lock
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TextIO

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from aepo import __version__
from aepo.config import RunConfig
from aepo.console import say
from aepo.documents import parse_json
from aepo.errors import FORBIDDEN, BusyError, CheckpointError
from aepo.names import bounded
from aepo.results import STRICT, Count, Result

RESULT, CONFIG, METRICS, POLICY = "result.json", "config.json", "metrics.jsonl", "policy.safetensors"
GRID = "grid.png"
KERNELS = "kernels.json"
"""How the run's steps are computed (aepo/kernels.py)."""
LOCK = "run.lock"
"""Held by the process that carries the run out; names it."""
LOOK_S = 1.0
"""For so long a lock may be held by one that only looks, or is about to end."""
COMMIT = "COMMIT"
"""Beside the packages, in packed code."""


@with_config({**STRICT, "extra": "allow"})
class _Row(TypedDict):
    """A line of a metrics file."""

    time: Annotated[float, Field(ge=0, le=1e11)]
    """Seconds since the epoch."""
    stage: str
    step: Count
    num_steps: Count
    metrics: dict[str, float]


@cache
def _parser(kind: Any) -> TypeAdapter[Any]:
    """Return the parser of a kind of document; making one takes milliseconds, so none is made at import."""
    return TypeAdapter(kind)


def parse_rows(path: Path, lines: bytes) -> list[dict[str, Any]]:
    """Return the rows that stand in whole lines of a metrics file.

    Raises:
        CheckpointError: for a line that is none.
    """
    rows: list[dict[str, Any]] = []
    for line in lines.splitlines():
        try:
            rows.append(dict(_parser(_Row).validate_json(line)))
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


def read_result(folder: Path) -> Result | None:
    """Return the result of an ended run, None if it has not ended.

    Raises:
        CheckpointError: if the file is not a result.
    """
    path = folder / RESULT
    try:
        result: Result = _parser(Result).validate_json(path.read_bytes())
        if result.status != "missing":
            return result
        reason = "status: a run without an end has none"
    except FileNotFoundError:
        return None
    except NotADirectoryError:  # somebody's file in the place of the folder: not ours to delete
        raise
    except ValidationError as error:
        reason = first_fault(error)
    except OSError as error:
        reason = str(error.strerror)
    raise CheckpointError(f"{path} is not a result ({reason}); delete {folder} to repeat the run")


def write_result(folder: Path, result: Result) -> None:
    """Write the result of a run that has ended, atomically."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def first_fault(error: ValidationError) -> str:
    """Return where a document first goes wrong, and how."""
    item = error.errors(include_input=False, include_url=False)[0]
    return ": ".join([*(["/".join(map(str, item["loc"]))] if item["loc"] else []), item["msg"]])


def read_document(path: Path, *, kind: str, version: int, field: str) -> dict[str, Any]:
    """Return a JSON document of this version, an object that has `field` with something to count in it.

    Args:
        path: the file.
        kind: what its folder then is, for the message: "sweep".
        version: wanted in its `format`.
        field: a list or an object.

    Raises:
        CheckpointError: if there is none, or of another version.
    """
    command = {"run": "train"}.get(kind, kind)
    again = f"bring the file again, or repeat `aepo {command}` into another folder"
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        assert document["format"] == version, f"format {document['format']}, wanted {version}"
        len(document[field])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a {kind}: it has no {path.name}; wanted the folder that `aepo {command} --out` made"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; see to its permissions, or bring it again"
        ) from error
    except KeyError as error:
        raise CheckpointError(f"{path} is not a {kind} of this version: it has no {error}; {again}") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a {kind} of this version: {error}; {again}") from error
    return document


def record_failure(config: RunConfig, folder: Path, error: str, *, started_at: str | None = None) -> None:
    """Write the result of a run that failed for good."""
    known = describe(config, folder)
    write_result(folder, dataclasses.replace(known, started_at=started_at, status="failed", error=error))


def describe(config: RunConfig, folder: Path) -> Result:
    """Return what is known of a run before it starts."""
    return Result.unended(
        run=config.name,
        task=config.task,
        suite=config.suite,
        source=config.data.source,
        dataset=config.data.dataset,
        seed=config.seed,
        fingerprint=config.fingerprint,
        method=config.method,
        preset=config.preset,
        commit=commit(),
        version=__version__,
        machine=f"{platform.processor() or platform.machine()}, torch {version('torch')}",
        folder=str(folder),
    )


def write_json(path: Path, document: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that after a crash is either whole or as it was before."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new file beside `path` that takes its place at the block's end: whole, or not at all.

    It may be read by whom the umask says, even if the library that writes it makes files for their owner alone.
    """
    place = f"{os.uname().nodename}.{os.getpid()}.{next(_numbers)}"  # shared folders: process ids repeat elsewhere
    temporary = path.with_name(f".{bounded(path.name)}.{place}")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with the same id
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        with temporary.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o777 != mode:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before says more
            temporary.unlink(missing_ok=True)


_numbers = itertools.count()
"""Of the temporary files of this process, whose threads may write the same file."""


@cache
def commit() -> str | None:
    """Return the git commit of this code, with `+dirty` if changed, None outside a checkout.

    What `aepo submit` has packed has no history; a file says which commit it is.
    """
    here = Path(__file__).parent
    if (packed := here.parent / COMMIT).exists():
        return packed.read_text().strip() or None
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() or None


def try_lock(descriptor: int) -> bool:
    """Return whether this process now holds an open file's lock, which goes with the process.

    On a file system without locks this is always true.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def open_lock(path: Path) -> TextIO:
    """Return a lock file, made if there is none; another user's is opened to be read, which is enough to lock it."""
    try:
        return path.open("a+")
    except OSError as error:
        if error.errno not in FORBIDDEN:
            raise
        return path.open("r")


@contextlib.contextmanager
def hold(path: Path, *, what: str, advice: str, wait_s: float = LOOK_S) -> Iterator[None]:
    """Hold a lock file for as long as the block lasts. It goes with the process: nothing that was killed holds one.

    Args:
        path: the file; its folder must exist.
        what: what another process is then doing, for the message: "runs/x is being trained".
        advice: what to do then.
        wait_s: seconds to wait for it.

    Raises:
        BusyError: if another process holds it for so long; it is told who, if that is known.
    """
    with open_lock(path) as file:
        begin, told = time.monotonic(), False
        while not try_lock(file.fileno()):
            file.seek(0)
            holder = " ".join(file.read().split()) or "another process"
            waited = time.monotonic() - begin
            if waited >= wait_s:
                raise BusyError(f"{what} already, by {holder}; {advice}")
            if waited >= LOOK_S and not told:
                say(f"{what} already, by {holder}; waiting for {wait_s:.0f} s at most")
                told = True
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk, another user's file: held all the same
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield
