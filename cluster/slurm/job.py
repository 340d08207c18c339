"""`python -m cluster.slurm.job NOTES SWEEP FOLDER [FLAGS]`: what a SLURM job does beside its first node's Ray.

It starts Ray on the nodes (`cluster.slurm.node`), runs `aepo sweep`, and makes the report. Before the time limit, or
asked by a file `stop` in NOTES, it has the runs store checkpoints and queues the job again; a few times at most without
anything gained, for each start costs the nodes a minute. A file `stop` in the job's folder, .slurm-ID in the sweep's,
ends it for good.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from aepo import files
from aepo.documents import parse_json
from aepo.errors import AEPOError, ResourceError
from aepo.runs import rundir
from cluster.slurm.node import ADDRESS, END, PRIVATE, UP
from tune.plan import RUN_FOLDERS, STOP

STOPPED = "stop"
STARTS = ".slurm-starts.json"
"""In the sweep's folder: what the starts of the last job have gained."""
NOTICE_S, LEAST_NOTICE_S, NOTICE_SHARE = 300.0, 45.0, 6
"""Seconds before the time limit in which runs are asked to stop: of short limits a share, but not less than this."""
RESERVE_S = 12.0
"""Before the limit the job queues itself again whatever still runs; SLURM does so with no job that its limit ended."""
MAX_FRUITLESS = 3
"""Starts in a row after which nothing more was stored; then the job ends instead of queueing itself again."""
START_SHARE = 3
"""If the first start takes more than this part of the time limit, the limit is refused."""
HEAD_TIMEOUT_S, WORKERS_TIMEOUT_S, END_TIMEOUT_S, CANCEL_S, POLL_S = 300.0, 120.0, 15.0, 10.0, 1.0


@dataclasses.dataclass
class Clock:
    """How long the job may run."""

    ends_at: float
    """By time.monotonic(); infinite without a limit."""
    limit_s: float
    """All of it."""

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.ends_at - time.monotonic()

    @property
    def notice_s(self) -> float:
        """Seconds before the limit in which runs are asked to stop."""
        return min(NOTICE_S, max(LEAST_NOTICE_S, self.limit_s / NOTICE_SHARE))


def seconds_of(text: str) -> float:
    """Return SLURM's [DAYS-][[HOURS:]MINUTES:]SECONDS as seconds, infinite for a word such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text.strip())
    if found is None:
        return float("inf")
    days, first, second, last = found.groups()
    hours, minutes = (first, second) if second is not None else (None, first)
    return 86400 * int(days or 0) + 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(last)


def read_clock(job: str) -> Clock:
    """Ask SLURM for the time that is left; without an answer the job has no end, and SLURM's signal alone warns."""
    words = ["squeue", "--noheader", "--jobs", job, "--format", "%L %l"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    left, limit = (seconds_of(word) for word in [*asked.stdout.split(), "", ""][:2])
    return Clock(time.monotonic() + left, limit if limit < float("inf") else left)


def stored(sweep: Path) -> tuple[int, int]:
    """Return how many runs have ended and how many rows of metrics the runs hold, which say how far they are."""
    runs = sweep / RUN_FOLDERS
    ended = sum(1 for _ in runs.glob(f"*/{rundir.RESULT}"))
    return ended, sum(path.read_bytes().count(b"\n") for path in runs.glob(f"*/{rundir.METRICS}"))


def count_fruitless(note: Path, job: str, now: tuple[int, int]) -> int:
    """Return how many starts of a job in a row, this one included, stored no more than was there; remember it."""
    try:
        held = parse_json(note.read_text())
        if held["job"] != job:
            raise KeyError(job)
        best, fruitless = tuple(held["best"]), int(held["fruitless"])
    except (OSError, ValueError, KeyError, TypeError):
        best, fruitless = (0, 0), 0
    fruitless = 0 if now > best else fruitless + 1
    files.write_json(note, {"job": job, "best": max(now, best), "fruitless": fruitless})
    return fruitless


class Asked(Exception):
    """The job was asked to stop while it started."""


class SweepJob:
    """One start of a job."""

    def __init__(self, notes: Path, file: str, sweep: Path, flags: Sequence[str]):
        """Take over the folder of an earlier start of this job, if that was killed."""
        self.notes, self.file, self.sweep, self.flags = notes, file, sweep.resolve(), list(flags)
        self.number = os.environ["SLURM_JOB_ID"]
        self.shared = self.sweep / f".slurm-{self.number}"
        self.clock = read_clock(self.number)
        self.begin = time.monotonic()
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.shared.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (ADDRESS, END, *(path.name for path in self.shared.glob(f"{UP}*"))):
            (self.shared / name).unlink(missing_ok=True)

    @property
    def is_asked(self) -> bool:
        """Whether runs are to stop now: by a signal, by somebody who wants the job's end, or by the clock."""
        return self.is_ending or (self.notes / STOPPED).exists() or self.clock.left_s < self.clock.notice_s

    @property
    def is_ending(self) -> bool:
        """Whether somebody wants the job's end (`aepo jobs stop`)."""
        return (self.shared / STOPPED).exists()

    def run(self) -> int:
        """Carry the sweep out as far as the time goes; return the job's exit status."""
        if self.clock.limit_s < float("inf"):
            print(f"{self.clock.left_s:.0f} s left, runs stop {self.clock.notice_s:.0f} s before", flush=True)
        status = None
        try:
            self._start_ray()
            self._check_start()
            status = self._run_sweep()
        except Asked:
            print("asked to stop before the sweep could begin", flush=True)
        finally:
            self._end_ray()
        wants_more = status is None or (status != 0 and self.is_asked)
        if wants_more and self.is_ending:
            print("stopped for good, as asked; `aepo submit --slurm` goes on", flush=True)
            wants_more, status = False, 3
        if wants_more:
            return self._queue_again()
        shutil.rmtree(self.shared, ignore_errors=True)
        if status in (0, 3):
            words = ["report", str(self.sweep)] + (["--allow-missing"] if status else [])
            subprocess.run([*_AEPO, *words], check=False)
        print("the sweep has ended" if status == 0 else f"the sweep ended with status {status}", flush=True)
        return status or 0

    def _start_ray(self) -> None:
        """Start Ray's head on this node and workers on the others, and wait for them.

        Raises:
            Asked: if there is no time left for it.
            ResourceError: if the head does not start.
        """
        token = self.shared / "token"
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_NUM_THREADS": "1",
        }
        names = _host_names(os.environ["SLURM_JOB_NODELIST"])
        here = os.environ.get("SLURMD_NODENAME") or names[0]
        self.nodes.append(self._step("head", ["--nodes=1", "--ntasks=1", f"--nodelist={here}"]))
        others = len(names) - 1
        if others:
            where = [f"--nodes={others}", f"--ntasks={others}", f"--exclude={here}", "--no-kill"]
            self.nodes.append(self._step("worker", where))
        if not self._wait((self.shared / ADDRESS).exists, HEAD_TIMEOUT_S, whose=self.nodes[0]):
            raise ResourceError(f"Ray's head did not start in {self._ran_s:.0f} s; what it said stands above")
        self._wait(lambda: self._num_up() > others, WORKERS_TIMEOUT_S)
        print(f"Ray is up on {self._num_up()} of {len(names)} nodes after {self._ran_s:.0f} s", flush=True)

    def _step(self, role: str, where: list[str]) -> "subprocess.Popen[bytes]":
        """Start a step on some nodes: with this environment, whatever the job's own was, and all that they have."""
        words = ["srun", "--export=ALL", "--overlap", "--kill-on-bad-exit=0", "--wait=0", "--ntasks-per-node=1", *where]
        return subprocess.Popen([*words, sys.executable, "-m", "cluster.slurm.node", str(self.shared), role])

    def _num_up(self) -> int:
        return sum(1 for _ in self.shared.glob(f"{UP}*"))

    def _wait(
        self, condition: Callable[[], bool], timeout_s: float, whose: "subprocess.Popen[bytes] | None" = None
    ) -> bool:
        end = time.monotonic() + timeout_s
        while not condition():
            if self.is_asked:
                raise Asked
            if time.monotonic() > end or (whose is not None and whose.poll() is not None):
                return condition()
            time.sleep(POLL_S / 4)
        return True

    @property
    def _ran_s(self) -> float:
        return time.monotonic() - self.begin

    def _check_start(self) -> None:
        """Refuse a time limit of which the start takes too much, at the job's first start.

        Raises:
            ResourceError: if it does.
        """
        is_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if is_first and self._ran_s > self.clock.limit_s / START_SHARE:
            raise ResourceError(
                f"the time limit of {self.clock.limit_s:.0f} s is too short: the start took {self._ran_s:.0f} s of it, "
                f"and {self.clock.notice_s:.0f} s are notice for checkpoints; wanted: a longer --time"
            )

    def _run_sweep(self) -> int:
        """Run the sweep, ask it to stop in time, and return its exit status, 3 if it was killed."""
        address = (self.shared / ADDRESS).read_text()
        words = [self.file, "--yes", "--address", address, "--out", str(self.sweep), *self.flags]
        sweep = subprocess.Popen([*_AEPO, "sweep", *words])
        is_told = False
        while sweep.poll() is None:
            if self.is_asked:
                if not is_told:
                    print(f"asked to stop with {self.clock.left_s:.0f} s left; runs store checkpoints", flush=True)
                    is_told = True
                (self.sweep / STOP).touch()  # again and again: a sweep that begins removes it
            if self.clock.left_s < RESERVE_S:
                print("no time is left; what lies behind the last checkpoints is done again", flush=True)
                sweep.kill()
                sweep.wait()
                return 3
            time.sleep(POLL_S)
        return sweep.returncode

    def _end_ray(self) -> None:
        """Have every node end Ray and remove its folder, and wait; another step removes what a killed one left."""
        (self.shared / END).touch()
        end = time.monotonic() + max(2.0, min(END_TIMEOUT_S, self.clock.left_s - 5.0))
        while any(step.poll() is None for step in self.nodes) and time.monotonic() < end:
            time.sleep(POLL_S / 4)
        for step in self.nodes:
            if step.poll() is None:  # of a node that is gone
                step.kill()
                step.wait()
        if left := [path.name.removeprefix(PRIVATE) for path in self.shared.glob(f"{PRIVATE}*")]:
            where = [f"--nodes={len(left)}", f"--ntasks={len(left)}", f"--nodelist={','.join(left)}"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._step("clean", where).wait(max(2.0, end - time.monotonic()))

    def _queue_again(self) -> int:
        now = stored(self.sweep)
        fruitless = count_fruitless(self.sweep / STARTS, self.number, now)
        if fruitless >= MAX_FRUITLESS:
            print(
                f"error: {fruitless} starts in a row stored nothing more; the time limit of {self.clock.limit_s:.0f} s "
                "is too short for the start and the notice: give a longer --time, or a shorter --signal",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(self.shared, ignore_errors=True)
            return 1
        print(f"{now[0]} runs have ended, the others go on: the job queues itself again", flush=True)
        asked = subprocess.run(["scontrol", "requeue", self.number], check=False)
        if asked.returncode:
            print("error: SLURM refused to queue the job again; submit it again to go on", file=sys.stderr, flush=True)
            shutil.rmtree(self.shared, ignore_errors=True)
            return 1
        return 3


_AEPO = (sys.executable, "-m", "aepo")


def _host_names(nodes: str) -> list[str]:
    asked = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return asked.stdout.split()


def main(notes: Path, file: str, sweep: Path, flags: Sequence[str]) -> int:
    """Run a job; the token goes with it, also if it is cancelled."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of scancel --full; the shell above receives SLURM's
    job = SweepJob(notes, file, sweep, flags)

    def cancel(number: int, frame: FrameType | None) -> None:
        del frame
        end = time.monotonic() + CANCEL_S
        while job.shared.exists() and time.monotonic() < end:  # nodes that end write there
            shutil.rmtree(job.shared, ignore_errors=True)
            time.sleep(POLL_S / 4)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, cancel)
    try:
        return job.run()
    except AEPOError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        shutil.rmtree(job.shared, ignore_errors=True)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
