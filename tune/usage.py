"""What a sweep has really taken: processor time of all of its processes, and time on the clock."""

import os
import time

import psutil

INTERVAL_S = 2.0
"""Seconds between two looks; a process that begins and ends between two is not seen."""


class Meter:
    """Counts the processor seconds of this process and of all that it has started, since it was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self._own = psutil.Process(os.getpid())
        self._seen: dict[tuple[int, float], float] = {}
        self._looked = 0.0
        self._began_s = time.monotonic()
        self.look()
        self._before = sum(self._seen.values())
        self._looked = 0.0

    def look(self) -> None:
        """Read what each process has used, unless that was done a moment ago."""
        if time.monotonic() - self._looked < INTERVAL_S:
            return
        self._looked = time.monotonic()
        for process in [self._own, *self._own.children(recursive=True)]:
            try:
                used = process.cpu_times()
                self._seen[process.pid, process.create_time()] = used.user + used.system
            except psutil.Error:  # ended meanwhile
                continue

    @property
    def core_hours(self) -> float:
        """Core hours that this process and those that it has started have taken."""
        return (sum(self._seen.values()) - self._before) / 3600

    @property
    def wall_hours(self) -> float:
        """Hours on the clock since the meter was made."""
        return (time.monotonic() - self._began_s) / 3600
