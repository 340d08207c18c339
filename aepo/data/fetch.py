"""D4RL's original files from their server: several at once, continued where they were cut, checked by published sums.

d4rl_files.csv has bytes and SHA-256 of the published files as others have noted them, each with its source; nothing
of it could be checked against the server itself. A file without a row, or without a sum, is taken by its length.
"""

import csv
import dataclasses
import hashlib
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from aepo.console import err, say
from aepo.data.download import TIMEOUT_S, TRIES, WAIT_S
from aepo.data.episodes import one_line
from aepo.data.library import local_datasets
from aepo.errors import AEPOError, DataError, ResourceError
from aepo.files import hold
from aepo.tasks import Task

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
"""The addresses of tasks.csv begin with this; a mirror stands in its place."""
ADDRESSES = "addresses.txt"
"""File in the folder that lists what could not be fetched, an address a line, for wget."""
CHUNK = 1 << 20
EPISODE_BYTES = 20_000
"""Bytes of an episode in the library, beside its arrays; 14,000 to 21,000 were measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownFile:
    """A row says what is known of a published file."""

    file: str
    bytes: int
    sha256: str
    """SHA-256 of the file, hexadecimal; empty = not known."""
    source: str
    """The source says who noted these numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchSummary:
    """A file that is now in the folder."""

    task: str
    file: str
    num_bytes: int
    received: int
    """Bytes that came now."""
    checked: str
    """The check shows that it is the published file: sha256, length, or nothing beyond the server's own length."""


@cache
def known_files() -> Mapping[str, KnownFile]:
    """Return what is known of published files by their names."""
    lines = csv.DictReader(files("aepo").joinpath("data/d4rl_files.csv").read_text().splitlines(), strict=True)
    rows = [KnownFile(**{**row, "bytes": int(row["bytes"])}) for row in lines]  # type: ignore[arg-type]
    return {row.file: row for row in rows}


def file_name(task: Task) -> str:
    """Return the name of a task's D4RL file."""
    return task.origin.rpartition("/")[2]


def file_bytes(task: Task) -> tuple[int, bool]:
    """Return what a task's published data take in transfer, and whether that is known or an estimate from its rows.

    The estimate is of states, next states, actions and flags in float32, or in float64 of Minari's, which has no next
    states; it lies within a factor of 2 of the known files but Kitchen's.
    """
    if task.source == "d4rl" and (known := known_files().get(file_name(task))):
        return known.bytes, True
    rows, (states, actions) = task.steps or 0, _widths(task)
    return rows * (4 * (2 * states + actions + 3) if task.source == "d4rl" else 8 * (states + actions + 1)), False


def library_bytes(task: Task) -> int:
    """Return about what a task's data take in Minari's library and in the cache of decoded data."""
    rows, (states, actions) = task.steps or 0, _widths(task)
    episodes = rows // max(1, task.horizon) * EPISODE_BYTES
    return rows * (4 * (states + actions + 2) + 4 * (2 * states + actions + 2)) + episodes


def _widths(task: Task) -> tuple[int, int]:
    return task.state_dim or 0, task.action_dim or 0


def fetch(rows: Sequence[Task], folder: Path, *, jobs: int = 4, mirror: str = "") -> list[FetchSummary]:
    """Fetch the D4RL files of tasks into a folder; a file, or a data set of the library, that is there is left alone.

    What a cut transfer has brought is kept as FILE.part and continued. One that fails does not stop the others.

    Args:
        rows: of source `d4rl`.
        folder: is made.
        jobs: files at a time, >= 1.
        mirror: address that stands in the place of SERVER.

    Raises:
        DataError: if what arrived is not the published file.
        ResourceError: if the server is out of reach, or the disk is full; the addresses are left in `addresses.txt`.
    """
    here = local_datasets()
    missing = [row for row in rows if row.dataset not in here and not _is_whole(folder / file_name(row))]
    if not missing:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sum(file_bytes(row)[0] for row in missing) - sum(_size(_part(folder, row)) for row in missing)
    if wanted > (free := shutil.disk_usage(folder).free):
        raise ResourceError(
            f"about {wanted / 1e9:.1f} GB are to come and {free / 1e9:.1f} GB are free in {folder}; name a folder on a "
            "larger disk with --folder"
        )
    advice = "wait until that has ended, or name another folder"
    with hold(folder / ".fetch.lock", what=f"files are being fetched into {folder}", advice=advice):
        done, failed = _fetch_all(missing, folder, jobs, mirror)
    if failed:
        raise _failure(failed, folder, mirror)
    (folder / ADDRESSES).unlink(missing_ok=True)
    return done


def _fetch_all(
    rows: Sequence[Task], folder: Path, jobs: int, mirror: str
) -> tuple[list[FetchSummary], dict[Task, Exception]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    stop, pool = threading.Event(), ThreadPoolExecutor(jobs)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def attempt(row: Task) -> FetchSummary | Exception:
            if stop.is_set():
                return InterruptedError("stopped")
            bar = progress.add_task(row.task, total=file_bytes(row)[0])
            try:
                return _fetch_one(row, folder, mirror, stop=stop, advance=lambda at: progress.update(bar, completed=at))
            except Exception as error:  # it concerns this file alone
                return error
            finally:
                progress.remove_task(bar)

        try:
            ends = list(zip(rows, pool.map(attempt, rows), strict=True))
        finally:  # also at Ctrl-C
            stop.set()
            pool.shutdown(cancel_futures=True)
    done = [end for _, end in ends if isinstance(end, FetchSummary)]
    return done, {row: end for row, end in ends if isinstance(end, Exception)}


def _fetch_one(
    row: Task, folder: Path, mirror: str, *, stop: threading.Event, advance: Callable[[int], None]
) -> FetchSummary:
    path, part, known = folder / file_name(row), _part(folder, row), known_files().get(file_name(row))
    begin, total, tries = _size(part), -1, 0
    while _size(part) != total:
        before = _size(part)
        try:
            total = _receive(address(row, mirror), part, stop=stop, advance=advance)
            if _size(part) != total:
                raise ConnectionError(f"the answer ended after {_size(part):,} of {total:,} bytes")
        except urllib.error.HTTPError:
            raise  # the server has answered: the next answer is the same
        except OSError:
            tries = 1 if _size(part) > before else tries + 1
            if tries >= TRIES or stop.wait(WAIT_S):
                raise
    if known is not None and total != known.bytes:
        part.unlink()
        raise DataError(
            f"{address(row, mirror)} has {total:,} bytes, the published file {known.bytes:,}; fetch it elsewhere, then "
            "import it"
        )
    if known is not None and known.sha256:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != known.sha256:
            part.unlink()
            raise DataError(
                f"{address(row, mirror)}: SHA-256 {found[:12]}..., wanted {known.sha256[:12]}...: not the published "
                "file; give the command again, or fetch it elsewhere"
            )
    part.replace(path)
    checked = "nothing" if known is None else "sha256" if known.sha256 else "length"
    say(f"{row.task}: {path.name}, {total / 1e6:,.1f} MB, checked by {checked}")
    return FetchSummary(task=row.task, file=str(path), num_bytes=total, received=max(0, total - begin), checked=checked)


def _receive(url: str, part: Path, *, stop: threading.Event, advance: Callable[[int], None]) -> int:
    """Append one answer of the server to `part`, or begin anew if it cannot go on; return the length of the file."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        if error.code != 416:  # nothing lies behind what is there
            raise
        total = int((error.headers.get("Content-Range") or "*/-1").rpartition("/")[2])
        if total != start:
            part.unlink()
        return total
    with answer:
        going_on = answer.status == 206
        length = int(answer.headers.get("Content-Length") or -1)
        with part.open("ab" if going_on else "wb") as out:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                advance(out.tell())
                if stop.is_set():
                    raise InterruptedError("stopped")
    return (start if going_on else 0) + length if length >= 0 else _size(part)


def address(row: Task, mirror: str = "") -> str:
    """Return where a task's file is fetched from."""
    return row.origin.replace(SERVER, mirror.rstrip("/")) if mirror else row.origin


def _failure(failed: Mapping[Task, Exception], folder: Path, mirror: str) -> AEPOError:
    """Return one error for all files that failed, and leave their addresses for another program."""
    listed = folder / ADDRESSES
    listed.write_text("".join(f"{address(row, mirror)}\n" for row in failed))
    tasks_of: dict[str, list[str]] = {}
    for row, error in failed.items():
        reason = str(error) if isinstance(error, AEPOError) else f"{type(error).__name__}: {one_line(error)}"
        tasks_of.setdefault(reason, []).append(row.task)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in tasks_of.items())
    kind = DataError if any(isinstance(error, DataError) for error in failed.values()) else ResourceError
    return kind(
        f"{len(failed)} files not fetched: {reasons}; the same command goes on. Without network here: bring {listed} "
        f"to a machine that has one, `wget --continue --input-file={ADDRESSES}`, then bring the files and import their "
        "folder"
    )


def _is_whole(path: Path) -> bool:
    known = known_files().get(path.name)
    return path.is_file() and (known is None or path.stat().st_size == known.bytes)


def _part(folder: Path, row: Task) -> Path:
    return folder / f"{file_name(row)}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
