"""The sweep: a plan carried out by Ray Tune, watched from the run folders, tracked and recorded.

Everything on the screen, in MLflow and in runs.parquet is read from the run folders; Ray says only which
trials have ended without a result.
"""

import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from aepo import run
from aepo.config import RunConfig
from aepo.console import err
from aepo.data.transitions import load_transitions
from aepo.errors import AEPOError, ResourceError
from aepo.evaluate import Evaluator
from tune.plan import pending, run_folder, write_manifest
from tune.record import collect_rows, write_rows
from tune.tracking import Tracker

COLUMNS = ("stage", "step", "steps/s", "left", "score")
SHIP_INTERVAL_S = 5.0
LINE_INTERVAL_S = 30.0
"""Between two status lines where standard error is no terminal."""
TRIAL_DRIVER = {"node:__internal_head__": 0.001}
"""A trial's own share: a sliver of the head node and no CPU, so that drivers never take a worker's place."""
MEMORY_PER_TRIAL_GIB = 1.2
"""Measured: driver, controller and worker of one running trial (docs/operations.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial takes, and where."""

    address: str = ""
    """Ray cluster to use; "" starts a private one on this machine for the time of the sweep."""
    cpus: float = 1.0
    """CPU cores per trial."""
    gpus: float = 0.0
    """GPUs per trial; a fraction shares one."""
    max_concurrent: int = 0
    """Trials at once, at most; 0 = as many as fit."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints of a run."""


def run_sweep(
    sweep: Path,
    plan: Sequence[RunConfig],
    resources: Resources,
    *,
    tracking_uri: str,
    retry_failed: bool = False,
) -> list[dict[str, Any]]:
    """Carry out what the plan lists and the folder lacks; return one row per planned run.

    Raises:
        DataError: if a data set or its environment is missing; nothing has been started then.
        ResourceError: if no trial fits on the cluster.
    """
    sweep = sweep.resolve()
    write_manifest(sweep, plan)
    waiting = pending(sweep, plan, retry_failed=retry_failed)
    if waiting:
        _check_data(waiting)
    tracker = Tracker(sweep, plan, uri=tracking_uri)
    errors: dict[str, str] = {}
    ended = len(plan) - len(waiting)
    err.print(f"{len(plan)} runs planned in {sweep}: {ended} ended, {len(waiting)} to do", soft_wrap=True)
    if waiting:
        for config in waiting:
            if retry_failed:
                (run_folder(sweep, config) / run.RESULT).unlink(missing_ok=True)
        with _watch(sweep, plan, waiting, tracker, errors):
            errors |= _run_on_ray(sweep, waiting, resources)
    for config in plan:
        if config.name in errors and run.read_result(run_folder(sweep, config)) is None:
            tracker.fail(config, errors[config.name])
    tracker.ship()
    rows = collect_rows(sweep, plan, errors=errors, mlflow_run_ids=tracker.run_ids)
    write_rows(sweep, rows)
    return rows


def _check_data(plan: Sequence[RunConfig]) -> None:
    """Decode every data set once and make every environment once, before anything is scheduled."""
    for data in {config.data for config in plan}:
        load_transitions(data.dataset, observation_keys=data.observation_keys, reward_rule=data.reward_rule)
        horizon = next(config.evaluation.horizon for config in plan if config.data == data)
        Evaluator(data.dataset, observation_keys=data.observation_keys, horizon=horizon).close()


def _run_on_ray(sweep: Path, plan: Sequence[RunConfig], resources: Resources) -> dict[str, str]:
    """Run the trials; return run name -> error of those that Ray gave up."""
    private = {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name: all of Ray listens on 127.0.0.1
    }
    for name, value in {
        **({} if resources.address else private),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    import ray
    import ray.tune

    from tune.trainable import run_trial

    if resources.address:
        ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        slots = _slots(ray.nodes(), resources)  # type: ignore[no-untyped-call]
        concurrent = min(slots, resources.max_concurrent or slots, len(plan))
        err.print(f"{concurrent} at a time, {resources.cpus:g} CPU and {resources.gpus:g} GPU each")
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(run_trial, ray.tune.PlacementGroupFactory([TRIAL_DRIVER])),
            param_space={
                "run": ray.tune.grid_search([config.name for config in plan]),
                "sweep": str(sweep),
                "cpus": resources.cpus,
                "gpus": resources.gpus,
                "checkpoint_s": resources.checkpoint_s,
            },
            tune_config=ray.tune.TuneConfig(
                max_concurrent_trials=concurrent, trial_dirname_creator=lambda trial: str(trial.trial_id)
            ),
            run_config=ray.tune.RunConfig(
                name=f"tune-{os.getpid()}-{int(time.time())}",
                storage_path=str(sweep / "tune"),
                failure_config=ray.tune.FailureConfig(max_failures=2),
                verbose=0,
            ),
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        grid = tuner.fit()
        return {
            str(result.config["run"]): f"{type(result.error).__name__}: {_last_line(result.error)}"
            for result in (grid[i] for i in range(len(grid)))
            if result.error is not None and result.config is not None
        }
    finally:
        ray.shutdown()


def _slots(nodes: Sequence[dict[str, Any]], resources: Resources) -> int:
    """Return how many trials fit on the nodes at once.

    Raises:
        ResourceError: if none does.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    per_node = []
    for node in alive:
        fits = node.get("CPU", 0.0) / resources.cpus
        if resources.gpus:
            fits = min(fits, node.get("GPU", 0.0) / resources.gpus)
        per_node.append(int(min(fits, node.get("memory", 0.0) / 2**30 / MEMORY_PER_TRIAL_GIB)))
    if not sum(per_node):
        have = ", ".join(
            f"{node.get('CPU', 0):g} CPU {node.get('GPU', 0):g} GPU {node.get('memory', 0) / 2**30:.1f} GiB"
            for node in alive
        )
        raise ResourceError(
            f"one trial wants {resources.cpus:g} CPU, {resources.gpus:g} GPU and {MEMORY_PER_TRIAL_GIB:g} GiB "
            f"on one node; the nodes have: {have}"
        )
    return sum(per_node)


@contextmanager
def _watch(
    sweep: Path,
    plan: Sequence[RunConfig],
    waiting: Sequence[RunConfig],
    tracker: Tracker,
    errors: dict[str, str],
) -> Iterator[None]:
    """Show the runs, ship their metrics and keep runs.parquet current, in a thread, while the body runs."""
    stop = threading.Event()
    board = Board(sweep, waiting)

    def watch() -> None:
        next_ship, next_line = 0.0, time.monotonic() + LINE_INTERVAL_S
        backoff = SHIP_INTERVAL_S
        with Live(board.table(), console=err, auto_refresh=False) if err.is_terminal else nullcontext() as live:
            while True:
                last = stop.wait(1.0)
                board.refresh()
                if live is not None:
                    live.update(board.table(), refresh=True)
                elif time.monotonic() >= next_line or last:
                    next_line = time.monotonic() + LINE_INTERVAL_S
                    for line in board.lines():
                        err.print(line, soft_wrap=True)
                if last:
                    return
                if time.monotonic() >= next_ship:
                    backoff = SHIP_INTERVAL_S if tracker.ship() else min(300.0, 2 * backoff)
                    next_ship = time.monotonic() + backoff
                    write_rows(sweep, collect_rows(sweep, plan, errors=errors, mlflow_run_ids=tracker.run_ids))

    thread = threading.Thread(target=_reporting, args=(watch,), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)


def _reporting(watch: Callable[[], None]) -> None:
    try:
        watch()
    except Exception as error:  # the sweep outlives its display; the last shipment sends what this one missed
        err.print(f"[yellow]warning:[/] the display stopped: {type(error).__name__}: {error}", soft_wrap=True)


@dataclasses.dataclass
class _Seen:
    """What the board has read of one run."""

    offset: int = 0
    last: dict[str, Any] | None = None
    """The newest row of the spool."""
    first: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """stage -> its first row."""
    recent: deque[tuple[float, int]] = dataclasses.field(default_factory=lambda: deque(maxlen=20))
    """(time, step) of the newest rows of the current stage."""
    score: float | None = None
    result: dict[str, Any] | None = None


class Board:
    """Where each run stands, read from the run folders, each byte once."""

    def __init__(self, sweep: Path, plan: Sequence[RunConfig]):
        """Nothing is read before `refresh`."""
        self._plan = {config.name: (config, run_folder(sweep, config)) for config in plan}
        self._seen = {name: _Seen() for name in self._plan}
        self._seconds_per_step: dict[str, float] = {}
        self._lines: dict[str, str] = {}

    def refresh(self) -> None:
        """Read what the runs have written since the last call."""
        for name, (_, folder) in self._plan.items():
            seen = self._seen[name]
            if seen.result is not None:
                continue
            rows, seen.offset = run.read_spool(folder / run.METRICS, seen.offset)
            for row in rows:
                if seen.last is not None and row["stage"] != seen.last["stage"]:
                    self._learn(seen.first[seen.last["stage"]], seen.last)
                    seen.recent.clear()
                seen.first.setdefault(row["stage"], row)
                seen.recent.append((row["time"], row["step"]))
                seen.score = row["metrics"].get("eval/score", seen.score)
                seen.last = row
            with suppress(AEPOError):  # an unreadable result is said when the rows are collected
                seen.result = run.read_result(folder)

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
        ended = sum(seen.result is not None for seen in self._seen.values())
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
        score = seen.score if seen.result is None else seen.result["score"]
        row = dict.fromkeys(COLUMNS, "") | {"score": "" if score is None else f"{score:.1f}"}
        if seen.result is not None:
            return row | {"stage": seen.result["status"], "step": f"{seen.result['steps']:,}"}
        if seen.last is None:
            return row | {"stage": "starting"}
        step, num_steps = seen.last["step"], seen.last["num_steps"]
        row |= {"stage": seen.last["stage"], "step": f"{step:,}/{num_steps:,}"}
        stages = list(config.stages)
        if seen.last["stage"] == stages[-1] and step == num_steps:
            return row | {"stage": "evaluating"}
        (time_0, step_0), (time_1, step_1) = seen.recent[0], seen.recent[-1]
        if time_1 <= time_0:
            return row
        rate = (step_1 - step_0) / (time_1 - time_0)
        seconds = (num_steps - step) / rate
        for stage in stages[stages.index(seen.last["stage"]) + 1 :]:
            # later stages at another run's rate, or as long as none has been through them at this one's
            seconds += config.stages[stage].steps * self._seconds_per_step.get(stage, 1.0 / rate)
        return row | {"steps/s": f"{rate:,.0f}", "left": str(timedelta(seconds=round(seconds)))}

    def _learn(self, first: dict[str, Any], last: dict[str, Any]) -> None:
        """Take the seconds per step of a stage that a run has ended."""
        if last["step"] > first["step"]:
            seconds = (last["time"] - first["time"]) / (last["step"] - first["step"])
            self._seconds_per_step[last["stage"]] = seconds


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""
