"""Processes that were started here, told from others that the kernel has given their number, and their descendants.

A process is ours if its number and its start, in ticks since the machine booted, are those that were written down.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

children: list["subprocess.Popen[bytes]"] = []
"""This process started these itself, and asks after them, so that the ended do not stay as zombies while it lives."""


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, by its number and its start."""

    pid: int
    ticks: int
    """When it started, in clock ticks since the machine booted."""


@dataclasses.dataclass(frozen=True)
class _Look:
    state: str
    parent: int
    session: int
    ticks: int


def _look(pid: int) -> _Look | None:
    """Return what the kernel says of a process, None if there is none of this number."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Look(words[0], int(words[1]), int(words[3]), int(words[19]))


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since the machine booted; -1 if there is none."""
    found = _look(pid)
    return -1 if found is None else found.ticks


def is_alive(process: Process) -> bool:
    """Return whether this very process runs, not another one that was given its number."""
    for child in children:
        child.poll()
    found = _look(process.pid)
    return found is not None and found.ticks == process.ticks and found.state not in "ZX"


def process_tree(process: Process) -> set[Process]:
    """Return a process, its session and all that descend from either.

    While a session has members, the kernel gives its number to no new process: if the leader's number is somebody
    else's now, nothing is left of the session.
    """
    looks = {int(path.name): found for path in Path("/proc").glob("[0-9]*") if (found := _look(int(path.name)))}
    leader = looks.get(process.pid)
    if leader is not None and leader.ticks != process.ticks:
        return set()
    members = {pid for pid, found in looks.items() if found.session == process.pid or pid == process.pid}
    grown = -1
    while grown != len(members):
        grown = len(members)
        members |= {pid for pid, found in looks.items() if found.parent in members}
    return {Process(pid, looks[pid].ticks) for pid in members if looks[pid].state not in "ZX"}


def marked_processes(name: str, value: str) -> set[Process]:
    """Return the processes in whose environment a variable has this value, but not this one."""
    mark, found = f"{name}={value}".encode(), set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0") and int(path.name) != os.getpid():
                look = _look(int(path.name))
                found |= {Process(int(path.name), look.ticks)} if look is not None else set()
    return found


def send(process: Process, number: int) -> None:
    """Signal this very process; nothing happens if it has ended."""
    with contextlib.suppress(ProcessLookupError, OSError):
        descriptor = os.pidfd_open(process.pid)
        try:
            if is_alive(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def end_process_tree(process: Process, soft: int, *, timeout_s: float) -> None:
    """Ask a process to end, wait, then kill what is left of its session and descendants."""
    members = process_tree(process)
    send(process, soft)
    wait_until(lambda: not any(map(is_alive, members)), timeout_s)
    end_all(members | process_tree(process))


def end_all(processes: set[Process]) -> None:
    """Kill processes and wait until they are gone."""
    for process in processes:
        send(process, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, processes)), 10.0)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a condition holds, so many seconds at most."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
