"""Where every run of a sweep stands, read from its folder alone: from any terminal, while it runs or after."""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from aepo import files
from aepo.config import RunConfig
from aepo.console import err
from aepo.errors import AEPOError
from aepo.results import Result
from aepo.runs import rundir, spool
from tune.plan import RUN_FOLDERS, STOP

COLUMNS = ("stage", "step", "steps/s", "left", "score")
LOCK = "sweep.lock"
TAIL_BYTES = 8_000
"""A run that is under way already is read from so many bytes before the end of its metrics file."""
LOG_LINES = 5
"""Lines of a failed run's log that `aepo sweep --status` shows."""
LINE_INTERVAL_S = 30.0
"""Seconds between two status lines where standard error is no terminal."""


@contextmanager
def sweep_lock(sweep: Path) -> Iterator[None]:
    """Hold the lock of a sweep's or a search's folder while the block carries it out: one process at a time does.

    The lock goes with the process: nothing that was killed holds one.

    Raises:
        BusyError: if another process holds it.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    advice = f"aepo sweep --watch --out {sweep} shows it, --stop ends it"
    with files.hold(sweep / LOCK, what=f"{sweep} is carried out", advice=advice):
        (sweep / STOP).unlink(missing_ok=True)
        yield


def is_running(sweep: Path) -> bool:
    """Return whether a process carries the sweep or search of a folder out now."""
    if not (sweep / LOCK).exists():
        return False
    with files.open_lock(sweep / LOCK) as file:
        return not files.try_lock(file.fileno())


@dataclasses.dataclass
class _Seen:
    """What has been read of one run."""

    offset: int = 0
    last: dict[str, Any] | None = None
    """The newest row of the spool."""
    first: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """stage -> its first row of this round."""
    reached: dict[str, int] = dataclasses.field(default_factory=dict)
    """stage -> its newest step."""
    recent: deque[tuple[float, int]] = dataclasses.field(default_factory=lambda: deque(maxlen=20))
    """(time, step) of the newest rows of the current stage."""
    score: float | None = None
    result: Result | None = None
    """The run's result without its evaluations, since a sweep may have thousands of runs."""
    problem: str | None = None
    """Why the run's files cannot be read."""


class LiveStatus:
    """Where each run stands, read from the run folders, each byte once."""

    def __init__(self, sweep: Path, plan: Sequence[RunConfig]):
        """Watch the runs of a plan; `refresh` reads them, and of what was written before this call only the ends."""
        self._sweep = sweep
        self._plan: dict[str, tuple[RunConfig, Path]] = {}
        self._seen: dict[str, _Seen] = {}
        for config in plan:
            self.add(config)
        self._seconds_per_step: dict[str, float] = {}
        self._lines: dict[str, str] = {}

    def add(self, config: RunConfig) -> None:
        """Watch one more run."""
        name = config.name  # a digest of the whole config: once
        folder = self._sweep / RUN_FOLDERS / name
        self._seen[name] = _Seen(offset=_near_end(folder / rundir.METRICS))
        self._plan[name] = (config, folder)

    def refresh(self) -> None:
        """Read what the runs have written since the last call."""
        for name, (_, folder) in list(self._plan.items()):
            seen = self._seen[name]
            if seen.result is not None:
                continue
            try:
                rows, seen.offset = spool.read_spool(folder / rundir.METRICS, seen.offset)
                result = rundir.read_result(folder)
            except AEPOError as error:  # of one run, and the others can be shown
                seen.problem = str(error)
                continue
            seen.problem = None
            for row in rows:
                if seen.last is not None and row["stage"] != seen.last["stage"]:
                    self._learn(seen.first.pop(seen.last["stage"]), seen.last)
                    seen.recent.clear()
                seen.first.setdefault(row["stage"], row)
                seen.recent.append((row["time"], row["step"]))
                seen.score = row["metrics"].get("eval/score", seen.score)
                seen.reached[row["stage"]] = row["step"]
                seen.last = row
            if result is not None:
                seen.result = dataclasses.replace(result, evaluations=(), curve=(), grid=())
                seen.recent.clear()
                seen.first.clear()

    @property
    def plan(self) -> dict[str, tuple[RunConfig, Path]]:
        """Run name -> config and folder."""
        return self._plan

    @property
    def num_ended(self) -> int:
        """Runs that have a result."""
        return sum(seen.result is not None for seen in self._seen.values())

    @property
    def all_ended(self) -> bool:
        """Whether every run has a result."""
        return self.num_ended == len(self._seen)

    def result(self, name: str) -> Result | None:
        """Return the result of a run, None if it has not ended."""
        return self._seen[name].result

    def problem(self, name: str) -> str | None:
        """Return why a run's files cannot be read, None if they can."""
        return self._seen[name].problem

    def rows(self) -> dict[str, dict[str, str]]:
        """Return run name -> stage, step, rate, time left and last score, as text, of the runs that have started."""
        return {
            name: self._row(config, self._seen[name])
            for name, (config, folder) in self._plan.items()
            if folder.exists()
        }

    def table(self) -> Table:
        """Return the rows as a table, the newest 40."""
        rows = self.rows()
        ended = self.num_ended
        table = Table(title=f"{ended} of {len(self._plan)} runs ended", title_justify="left")
        for column in ("run", *COLUMNS):
            table.add_column(column, justify="left" if column in ("run", "stage") else "right")
        for name in list(rows)[-40:]:
            table.add_row(name, *(rows[name][column] for column in COLUMNS))
        return table

    def lines(self) -> list[str]:
        """Return one line per run that has moved since the last call."""
        lines = []
        for name, row in self.rows().items():
            text = f"{name}  {row['stage']} {row['step']}"
            text += f"  {row['steps/s']} steps/s, {row['left']} left" if row["steps/s"] else ""
            text += f"  score {row['score']}" if row["score"] else ""
            if self._lines.get(name) != text:
                self._lines[name] = text
                lines.append(text)
        return lines

    def _row(self, config: RunConfig, seen: _Seen) -> dict[str, str]:
        score = seen.score if seen.result is None else seen.result.score
        row = dict.fromkeys(COLUMNS, "") | {"score": "" if score is None else f"{score:.1f}"}
        if seen.result is not None:
            return row | {"stage": seen.result.status, "step": f"{seen.result.steps:,}"}
        if seen.last is None:
            return row | {"stage": "starting"}
        step, num_steps = seen.last["step"], seen.last["num_steps"]
        row |= {"stage": seen.last["stage"], "step": f"{step:,}/{num_steps:,}"}
        if step == num_steps and seen.last["stage"] == list(config.stages)[-1]:
            return row | {"stage": "evaluating"}
        (time_0, step_0), (time_1, step_1) = seen.recent[0], seen.recent[-1]
        if time_1 <= time_0 or step_1 <= step_0:
            return row
        rate = (step_1 - step_0) / (time_1 - time_0)
        seconds = (num_steps - step) / rate
        for name, stage in config.stages.items():
            if name != seen.last["stage"]:
                # at another run's rate, or as long as none has been through the stage at this one's
                left = stage.steps - seen.reached.get(name, 0)
                seconds += left * self._seconds_per_step.get(name, 1.0 / rate)
        return row | {"steps/s": f"{rate:,.0f}", "left": str(timedelta(seconds=round(seconds)))}

    def _learn(self, first: dict[str, Any], last: dict[str, Any]) -> None:
        """Take the seconds per step of a stage that a run has ended."""
        if last["step"] > first["step"]:
            seconds = (last["time"] - first["time"]) / (last["step"] - first["step"])
            self._seconds_per_step[last["stage"]] = seconds


def _near_end(path: Path) -> int:
    """Return the offset of a line near the end of a file, 0 for a short one."""
    try:
        with path.open("rb") as file:
            if (size := file.seek(0, os.SEEK_END)) <= TAIL_BYTES:
                return 0
            file.seek(size - TAIL_BYTES)
            file.readline()
            return file.tell()
    except FileNotFoundError:
        return 0


def status(sweep: Path, plan: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Return one row per planned run: state, stage, step, rate, time left, score, and of a failed one why.

    `state` is finished, failed, running, interrupted (begun, and nobody carries the sweep out) or waiting.
    """
    live = LiveStatus(sweep, plan)
    live.refresh()
    running = is_running(sweep)
    shown = live.rows()
    rows = []
    for name, (config, folder) in live.plan.items():
        row: dict[str, Any] = {"run": name, "task": config.task, "method": config.method}
        row |= {"variant": config.variant, "seed": config.seed}
        here = shown.get(name)
        if here is None:
            rows.append({**row, "state": "waiting", **dict.fromkeys(COLUMNS, ""), "error": None, "log": []})
            continue
        result = live.result(name)
        state = result.status if result else "running" if running else "interrupted"
        failed = state == "failed"
        cells = here | ({"stage": ""} if result else {})
        error = result.error if result else live.problem(name)
        rows.append({**row, "state": state, **cells, "error": error, "log": _last_lines(folder) if failed else []})
    return rows


def watch(sweep: Path, plan: Sequence[RunConfig], *, until_idle: bool = True) -> None:
    """Show a live table until the sweep ends, or until nobody carries it out (`until_idle`)."""
    runs = LiveStatus(sweep, plan)
    with Live(runs.table(), console=err, auto_refresh=False) if err.is_terminal else nullcontext() as live:
        while True:
            runs.refresh()
            if live is not None:
                live.update(runs.table(), refresh=True)
            else:
                for line in runs.lines():
                    err.print(line, soft_wrap=True)
            if runs.all_ended or (until_idle and not is_running(sweep)):
                return
            time.sleep(1.0 if live is not None else LINE_INTERVAL_S)


def _last_lines(folder: Path) -> list[str]:
    try:
        with (folder / "log.txt").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except FileNotFoundError:
        return []
