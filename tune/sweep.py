"""The sweep: a plan carried out by Ray Tune, watched from the run folders, tracked and recorded.

Everything on the screen, in MLflow and in runs.parquet is read from the run folders; Ray says only which
trials have ended without a result.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from aepo import pipeline, run
from aepo.config import RunConfig
from aepo.console import err
from aepo.data.transitions import load_transitions
from aepo.errors import AEPOError, ResourceError
from aepo.evaluate import Evaluator
from tune.plan import pending, run_folder, write_manifest
from tune.record import collect_rows, write_rows
from tune.tracking import Tracker

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
    for name, value in {
        "RAY_AUTH_MODE": "token",  # a private Ray; a cluster's own setting goes before
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
            _node_ip_address="127.0.0.1",
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
        with (
            Live(board.table(), console=err, auto_refresh=False, transient=False)
            if err.is_terminal
            else _quiet() as live
        ):
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

    thread = threading.Thread(target=_reporting(watch), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)


def _reporting(watch: Any) -> Any:
    def wrapped() -> None:
        try:
            watch()
        except Exception as error:  # the sweep outlives its display; the last shipment repeats what this missed
            err.print(f"[yellow]warning:[/] the display stopped: {type(error).__name__}: {error}", soft_wrap=True)

    return wrapped


@contextmanager
def _quiet() -> Iterator[None]:
    yield None


class Board:
    """Where each run stands, read from the spools."""

    def __init__(self, sweep: Path, plan: Sequence[RunConfig]):
        """Nothing is read before `refresh`."""
        self._folders = {config.name: run_folder(sweep, config) for config in plan}
        self._plan = {config.name: config for config in plan}
        self._rows: dict[str, dict[str, str]] = {}
        self._seconds_per_stage: dict[str, float] = {}
        self._lines: dict[str, str] = {}

    def refresh(self) -> None:
        """Read what the runs have written."""
        for name, folder in self._folders.items():
            self._rows[name] = self._row(name, folder)

    def table(self) -> Table:
        """Return the runs that have started and a count of the others."""
        table = Table(title=f"{self._count('finished')} of {len(self._plan)} runs finished", title_justify="left")
        for column in ("run", "stage", "step", "steps/s", "left", "score"):
            table.add_column(column, justify="left" if column in ("run", "stage") else "right")
        shown = [name for name, row in self._rows.items() if row["stage"] not in ("waiting",)]
        for name in shown[-40:]:
            row = self._rows[name]
            table.add_row(name, *(row[key] for key in ("stage", "step", "rate", "left", "score")))
        return table

    def lines(self) -> list[str]:
        """Return one line per run that has moved since the last call."""
        lines = []
        for name, row in self._rows.items():
            text = f"{name}  {row['stage']} {row['step']}"
            if row["rate"]:
                text += f"  {row['rate']} steps/s, {row['left']} left"
            if row["score"]:
                text += f"  score {row['score']}"
            if row["stage"] != "waiting" and self._lines.get(name) != text:
                self._lines[name] = text
                lines.append(text)
        return lines

    def _count(self, stage: str) -> int:
        return sum(row["stage"] == stage for row in self._rows.values())

    def _row(self, name: str, folder: Path) -> dict[str, str]:
        blank = {"stage": "waiting", "step": "", "rate": "", "left": "", "score": ""}
        if (known := self._rows.get(name)) and known["stage"] in ("finished", "failed"):
            return known
        try:
            result = run.read_result(folder)
        except AEPOError:
            return {**blank, "stage": "failed"}
        spool = run.read_spool(folder / run.METRICS)
        scores = [row["metrics"]["eval/score"] for row in spool if "eval/score" in row["metrics"]]
        if result is not None:
            if result["status"] == "finished":
                self._learn(spool)
            score = result["score"]
            return {
                **blank,
                "stage": result["status"],
                "step": f"{result['steps']:,}",
                "score": "" if score is None else f"{score:.1f}",
            }
        if not spool:
            return {**blank, "stage": "starting"} if folder.exists() else blank
        here = spool[-1]
        stage = [row for row in spool if row["stage"] == here["stage"]][-20:]
        seconds, steps = stage[-1]["time"] - stage[0]["time"], stage[-1]["step"] - stage[0]["step"]
        rate = steps / seconds if seconds > 0 else 0.0
        evaluating = here["stage"] == pipeline.STAGES[-1] and here["step"] == here["num_steps"]
        return {
            "stage": "evaluating" if evaluating else here["stage"],
            "step": f"{here['step']:,}/{here['num_steps']:,}",
            "rate": f"{rate:,.0f}" if rate and not evaluating else "",
            "left": "" if evaluating else self._left(self._plan[name], here, rate),
            "score": f"{scores[-1]:.1f}" if scores else "",
        }

    def _learn(self, spool: Sequence[dict[str, Any]]) -> None:
        """Take seconds per step of each stage from a finished run."""
        for stage in pipeline.STAGES:
            rows = [row for row in spool if row["stage"] == stage]
            if len(rows) > 1 and rows[-1]["step"] > rows[0]["step"]:
                steps = rows[-1]["step"] - rows[0]["step"]
                self._seconds_per_stage[stage] = (rows[-1]["time"] - rows[0]["time"]) / steps

    def _left(self, config: RunConfig, here: dict[str, Any], rate: float) -> str:
        """Return the time left: this stage at its own rate, later ones at a finished run's or else at this one's."""
        if not rate:
            return ""
        seconds = (here["num_steps"] - here["step"]) / rate
        for stage in pipeline.STAGES[pipeline.STAGES.index(here["stage"]) + 1 :]:
            seconds += getattr(config, stage).steps * self._seconds_per_stage.get(stage, 1.0 / rate)
        minutes, rest = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""
