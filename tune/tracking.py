"""Ships what a sweep's runs have written, from the sweep's own process, never from a training loop, to a sink: MLflow.

A file beside each spool says what the sink has: its id of the run, bytes of the spool, the digest of the result. That
only saves work: after any failure the sink is opened anew, and what it may lack is sent again.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

from aepo import files
from aepo.config import RunConfig
from aepo.console import warn
from aepo.documents import parse_json
from aepo.errors import AEPOError
from aepo.results import Result
from aepo.runs import rundir, spool
from tune.plan import run_folder

LOAD, LOAD_INTERVAL_S = "system/", 60.0
"""What this machine has used, in the names of MLflow's own monitor; its page shows them apart."""
PAUSES_S = (2.0, 4.0, 8.0, 16.0, 25.0)
"""Seconds between attempts to send what is left at the end."""
PATIENCE_S = 60.0
"""Seconds to wait at the end, since the server's last answer or the end itself, whatever an attempt takes."""
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Sink(Protocol):
    """Where a tracker sends a sweep; after any exception it opens it anew and repeats what was not taken."""

    name: str
    """What messages call it; in small letters, the name of the files that say what it has."""
    address: str
    """Where it is; messages leave the password out."""

    @property
    def run_ids(self) -> Mapping[str, str]:
        """Run name -> the sink's id of it, of the planned runs that it has."""

    def open(self, sweep: Path, planned: Collection[str], answered: Callable[[], None]) -> None:
        """Find what there is of a sweep and its runs; a long call says with `answered` that the other side lives."""

    def run(self, config: RunConfig, folder: Path, *, is_open: bool) -> str:
        """Find or make a run, which goes on if it is open; return the sink's id of it."""

    def log(self, run: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take rows of a run's spool, some perhaps twice; for the run "", the machine's load: `time` and `metrics`."""

    def end(self, config: RunConfig, folder: Path, status: Status, reason: str, result: Result | None) -> None:
        """Take a run's end, with its result and files if it has one, else the reason."""

    def close(self, statuses: Sequence[str]) -> None:
        """Take the sweep's end and the statuses of its runs."""


class Tracker:
    """Ships what the runs of a plan have written so far; call `ship` now and then and `close` at the end."""

    def __init__(self, sweep: Path, plan: Sequence[RunConfig], sink: Sink):
        """Contact nobody yet; the first `ship` opens the sweep."""
        self._sweep, self._sink = sweep.resolve(), sink
        self._file = f"{sink.name.lower()}.json"
        self._folders: dict[str, Path] = {}
        self._open: dict[str, RunConfig] = {}
        for config in plan:
            self.add(config)
        self._ends: dict[str, tuple[Status, str]] = {}
        self._is_connected, self._lock = False, threading.Lock()
        self._answered_at, self._is_given_up = 0.0, False
        self._load: list[dict[str, Any]] = []
        self._next_sample = 0.0

    @property
    def run_ids(self) -> Mapping[str, str]:
        """Run name -> the sink's id, of the runs that have one."""
        return self._sink.run_ids

    def ship(self) -> bool:
        """Send what is new; return whether the sink took it. What it did not waits for the next call."""
        if time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + LOAD_INTERVAL_S
            cpu, used = psutil.cpu_percent(), psutil.virtual_memory().used / 1e6
            metrics = {f"{LOAD}cpu_utilization_percentage": cpu, f"{LOAD}system_memory_usage_megabytes": used}
            self._load.append({"time": time.time(), "metrics": metrics})
        return self._attempt(self._ship)

    def ship_rest(self) -> bool:
        """Send all that is left, waiting a minute at most for a server that is away; return whether it took it."""

        def repeat() -> bool:
            for pause_s in PAUSES_S:
                if self.ship():
                    return True
                time.sleep(pause_s)
            return self.ship()

        return self._patiently(repeat)

    def add(self, config: RunConfig) -> None:
        """Ship one more run."""
        self._folders[config.name] = run_folder(self._sweep, config)
        self._open[config.name] = config

    def end(self, config: RunConfig, status: Status, reason: str = "") -> None:
        """Let the next `ship` close a run that ended without a result."""
        self._ends[config.name] = (status, reason)

    def close(self, statuses: Sequence[str]) -> bool:
        """End the sweep by its runs' statuses; return whether that was taken."""
        return self._patiently(lambda: self._attempt(lambda: self._sink.close(statuses)))

    def _patiently(self, action: Callable[[], bool]) -> bool:
        """Return what an action returns, or False once the server has not answered for too long, here or before.

        The action is then left to a thread that ends with the process: databases and their drivers have timeouts of
        their own, or none.
        """
        if self._is_given_up:
            return False
        ended: Future[bool] = Future()

        def act() -> None:
            try:
                ended.set_result(action())
            except BaseException as error:
                ended.set_exception(error)

        self._answer()
        threading.Thread(target=act, daemon=True).start()
        while (left_s := self._answered_at + PATIENCE_S - time.monotonic()) > 0:
            with suppress(TimeoutError):
                return ended.result(timeout=left_s)
        self._is_given_up = True
        silence = f"has not answered for {PATIENCE_S:g} s"
        warn_of(self._sink, f"{silence}; metrics wait on disk, and the same command sends them")
        return False

    def _attempt(self, action: Callable[[], None]) -> bool:
        with self._lock:
            try:
                if not self._is_connected:
                    self._sink.open(self._sweep, self._folders.keys(), self._answer)
                    self._is_connected = True
                action()
            except AEPOError:
                raise
            except Exception as error:  # whatever a sink meets, training goes on
                self._is_connected = False
                warn_of(self._sink, "does not answer; metrics wait on disk", error)
        return self._is_connected

    def _answer(self) -> None:
        self._answered_at = time.monotonic()

    def _ship(self) -> None:
        if self._load:
            self._sink.log("", self._load)
            self._load.clear()
        for name, config in list(self._open.items()):
            self._ship_run(name, config, self._folders[name])

    def _ship_run(self, name: str, config: RunConfig, folder: Path) -> None:
        end = self._ends.get(name)
        if end is None and not (folder / rundir.CONFIG).exists():
            return
        result = rundir.read_result(folder)  # before the spool: what the spool lacks then, the next call sends
        digest = hashlib.sha256((folder / rundir.RESULT).read_bytes()).hexdigest()[:16] if result else ""
        if result is not None:
            end = "FINISHED" if result.status == "finished" else "FAILED", result.error or ""
        run_id = self._sink.run(config, folder, is_open=end is None)
        sent = read_sent(folder / self._file)
        begin, closed = (sent["offset"], sent["closed"]) if sent.get("run_id") == run_id else (0, "")
        if result is None or closed != digest:
            rows, offset = spool.read_spool(folder / rundir.METRICS, begin)
            if rows:
                self._sink.log(name, rows)
            if end is not None:
                self._sink.end(config, folder, *end, result)
            if (offset, digest) != (begin, closed):
                files.write_json(folder / self._file, {"run_id": run_id, "offset": offset, "closed": digest})
        if end is not None:
            del self._open[name]
            self._answer()


def read_sent(path: Path) -> dict[str, Any]:
    """Return what a file says that a sink has; nothing if there is none, or it is torn."""
    try:
        sent = parse_json(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return sent if isinstance(sent, dict) else {}


def warn_of(sink: Sink, text: str, error: Exception | None = None) -> None:
    """Warn of what a sink does, in one line without the password of its address."""
    address = without_secrets(sink.address)
    if error is not None:
        cause = " ".join(str(error).replace(sink.address, address).split())
        text += f" ({type(error).__name__}: {cause[:200]})"
    warn(f"{sink.name} at {address} {text}")


def without_secrets(uri: str) -> str:
    """Return an address without what stands before its last @."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
