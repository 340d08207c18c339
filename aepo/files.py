"""Files: text as any editor leaves it, writing that is whole or not at all, and locks that go with their process."""

import codecs
import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from aepo.console import say
from aepo.errors import FORBIDDEN, BusyError, ConfigError
from aepo.names import bounded

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order mark -> encoding of what follows it; a file without one is UTF-8."""


def read_text(path: Path) -> str:
    r"""Return a text file's characters without a byte order mark, every line ended by `\n`.

    It is read as its mark says (UTF-8, UTF-16 or UTF-32), and as UTF-8 without one, wherever the machine's language is.

    Raises:
        OSError: if it cannot be read.
        ConfigError: if it is no text in that encoding, with the line of the first fault.
    """
    data = path.read_bytes()
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    body = data[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + body[: error.start].decode(encoding, errors="replace").count("\n")
        raise ConfigError(
            f"{path}, line {line}, is no {encoding.upper()} text (byte 0x{body[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        raise ConfigError(f"{path}, line {line}, has a zero byte: UTF-16 without a byte order mark? Save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


LOOK_S = 1.0
"""Seconds for which a lock may be held by a process that only looks, or is about to end."""


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
"""Numbers for this process's temporary files, since its threads may write the same file."""


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
