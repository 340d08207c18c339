"""The sweep: a plan carried out by Ray Tune, watched from the run folders, tracked and recorded.

Everything on the screen, in MLflow and in runs.parquet is read from the run folders; Ray says only which
trials have ended without a result.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.live import Live
from rich.table import Table

from aepo import parallel
from aepo.config import RunConfig
from aepo.console import err, say, warn
from aepo.errors import DataError, ResourceError
from aepo.results import Row
from aepo.runs import run, rundir
from tune.clean import of_run
from tune.estimate import Total, memory_gib, work
from tune.mlflow_sink import mlflow_tracker
from tune.places import places_on_node
from tune.plan import STOP, describe_leaving, grow, pending, read_digests, run_folder, write_manifest
from tune.runs_table import collect_rows, each_row, write_rows
from tune.sockets import make_socket_folder
from tune.spec import Keep, Resources
from tune.status import LINE_INTERVAL_S, LiveStatus, sweep_lock
from tune.tracking import Tracker
from tune.usage import Meter

SHIP_INTERVAL_S = 5.0
ORPHAN_INTERVAL_S = 2.0
TRIAL_DRIVER = {"node:__internal_head__": 0.001}
"""A trial's own share: a sliver of the head node and no CPU, so that drivers never take a worker's place."""


def run_sweep(
    sweep: Path,
    plan: Sequence[RunConfig],
    resources: Resources,
    *,
    tracking_uri: str,
    retry_failed: bool = False,
    only: bool = False,
    digests: Mapping[str, str] | None = None,
    keep: Keep = "all",
    expected: Total | None = None,
) -> list[Row]:
    """Carry out what the plan lists and the folder lacks; return one row per run of the plan.

    The runs that the folder has planned before stay in its manifest and its table, as `tune.plan.grow` says.

    Args:
        sweep: the folder.
        plan: what ought to exist.
        resources: what a run takes.
        tracking_uri: of MLflow.
        retry_failed: run again what failed before.
        only: let the folder plan these runs alone; the files of others stay.
        digests: of the data that another sweep of this plan was trained on.
        keep: what stays of a finished run; `policies`: its checkpoints go at once.
        expected: what the runs to do were estimated to take; stands beside what they took.

    Raises:
        DataError: if a data set or its environment is missing, or the data have changed since the sweep was planned;
            nothing has been started then.
        ResourceError: if no trial fits on the cluster, or another process carries the sweep out.
    """
    sweep = sweep.resolve()
    with sweep_lock(sweep):
        known = {**read_digests(sweep), **(digests or {})}
        whole, leaving = grow(sweep, plan, only=only)
        if leaving:
            err.print(describe_leaving(leaving), markup=False, soft_wrap=True)
        return _drive(
            sweep,
            plan,
            whole,
            resources,
            known,
            tracking_uri=tracking_uri,
            retry_failed=retry_failed,
            keep=keep,
            expected=expected,
        )


def _drive(
    sweep: Path,
    plan: Sequence[RunConfig],
    whole: Sequence[RunConfig],
    resources: Resources,
    digests: dict[str, str],
    *,
    tracking_uri: str,
    retry_failed: bool,
    keep: Keep,
    expected: Total | None,
) -> list[Row]:
    meter = Meter()
    for config in plan:
        parallel.check_batches(config, resources.workers_per_run)
    waiting = sorted(pending(sweep, plan, retry_failed=retry_failed), key=work, reverse=True)  # the longest first
    check_results(sweep, [config for config in plan if config not in waiting])
    write_manifest(sweep, whole, check_data(waiting, digests))
    tracker = mlflow_tracker(sweep, whole, uri=tracking_uri)
    errors: dict[str, str] = {}
    ended = len(plan) - len(waiting)
    say(f"{len(plan)} runs planned in {sweep}: {ended} ended, {len(waiting)} to do")
    if waiting:
        for config in waiting:
            if retry_failed:
                for name in (rundir.RESULT, "error.txt"):
                    (run_folder(sweep, config) / name).unlink(missing_ok=True)

        def write() -> None:
            write_rows(sweep, each_row(sweep, whole, errors=errors, mlflow_run_ids=tracker.run_ids))
            if keep == "policies":
                _drop_checkpoints(sweep, waiting)

        with watching(LiveStatus(sweep, waiting), tracker, write, meter):
            errors |= _run_on_ray(sweep, waiting, resources)
    for config in plan:
        if config.name in errors and rundir.read_result(run_folder(sweep, config)) is None:
            tracker.end(config, "FAILED", errors[config.name])
    tracker.ship_rest()
    rows = collect_rows(sweep, whole, errors=errors, mlflow_run_ids=tracker.run_ids)
    write_rows(sweep, rows)
    tracker.close([row.status for row in rows])
    if waiting:
        if keep == "policies":
            _drop_checkpoints(sweep, waiting)
        meter.look()
        say(taken(meter, expected, on_cluster=bool(resources.address)))
    if (sweep / STOP).exists():
        err.print("stopped as asked; the same command goes on")
    wanted, others = rows[len(rows) - len(plan) :], rows[: len(rows) - len(plan)]  # as `grow` orders them
    if others:
        open_ = sum(row.status != "finished" for row in others)
        err.print(f"{len(others)} other runs were planned here before, {open_} of them without a result")
    return wanted


def taken(meter: Meter, expected: Total | None, *, on_cluster: bool = False) -> str:
    """Return a line of what a sweep has taken, beside what was expected; a cluster's processes are not seen from here.

    Start-up and evaluation are in all of the numbers.
    """
    core = "" if on_cluster else f"{meter.core_hours:.3g} core hours, "
    line = f"took {core}{meter.wall_hours:.3g} hours on the clock"
    if expected is None:
        return line
    guess = "" if on_cluster else f"{expected.core_hours:.3g} core hours, "
    return f"{line}; estimated: {guess}{expected.wall_hours:.3g} hours on the clock, start-up and evaluation included"


def _drop_checkpoints(sweep: Path, plan: Sequence[RunConfig]) -> None:
    for config in plan:
        for item in of_run(run_folder(sweep, config)):
            item.delete()


def check_results(sweep: Path, ended: Sequence[RunConfig]) -> None:
    """Raise a CheckpointError if results in the folder are of other data than those of that name now."""
    seen = set()
    for config in ended:
        folder = run_folder(sweep, config)
        result = rundir.read_result(folder)
        if result is not None and result.status == "finished":
            digest = str(result.dataset_digest)
            if (config.data, digest) not in seen:
                run.check_unchanged(config, digest, folder)
            seen.add((config.data, digest))


def check_data(plan: Sequence[RunConfig], digests: dict[str, str]) -> dict[str, str]:
    """Decode every data set once and make every environment once, before anything is scheduled; return all digests."""
    for config in {config.data: config for config in plan}.values():
        (found, evaluator), name = run.prepare(config), config.data.dataset
        evaluator.close()
        if digests.setdefault(name, found.digest) != found.digest:
            raise DataError(
                f"{name} has changed since this sweep was planned ({digests[name]} then, "
                f"{found.digest} now); bring the old data, or sweep into another folder"
            )
    return digests


def _run_on_ray(sweep: Path, plan: Sequence[RunConfig], resources: Resources) -> dict[str, str]:
    """Run the trials; return run name -> error of those that Ray gave up."""
    with on_ray(resources, plan) as slots:
        import ray.tune

        from tune.trainable import ForgetEnded, run_inline, run_trial

        concurrent = min(slots, len(plan))
        inline = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        bundle = TRIAL_DRIVER if resources.runner == "train" else inline
        err.print(f"{concurrent} at a time, {resources.cpus:g} CPU and {resources.gpus:g} GPU each")
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                run_trial if resources.runner == "train" else run_inline, ray.tune.PlacementGroupFactory([bundle])
            ),
            param_space={
                "run": ray.tune.grid_search([config.name for config in plan]),
                "sweep": str(sweep),
                "cpus": resources.cpus,
                "gpus": resources.gpus,
                "workers": resources.workers_per_run,
                "stages": str(resources.stages or ""),
                "checkpoint_s": resources.checkpoint_s,
            },
            tune_config=ray.tune.TuneConfig(
                max_concurrent_trials=concurrent,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name=f"tune-{os.getpid()}-{int(time.time())}",
                storage_path=str(sweep / "tune"),
                failure_config=ray.tune.FailureConfig(max_failures=2),
                callbacks=[ForgetEnded()],
                verbose=0,
            ),
        )
        grid = tuner.fit()
        return {
            str(result.config["run"]): f"{type(result.error).__name__}: {_last_line(result.error)}"
            for result in (grid[i] for i in range(len(grid)))
            if result.error is not None and result.config is not None
        }


@contextmanager
def on_ray(resources: Resources, plan: Sequence[RunConfig]) -> Iterator[int]:
    """Be connected to the cluster, or to a private Ray of this machine; give how many trials fit at once.

    Raises:
        ResourceError: if none does.
    """
    private = {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name: all of Ray listens on 127.0.0.1
        "RAY_worker_niceness": "0",  # at Ray's 15, threads of a run that wait for each other nearly stand beside others
    }
    for name, value in {
        **({} if resources.address else private),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nobody reads Tune's own state: a sweep resumes from its run folders
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    import ray

    from tune.trainable import free_orphans

    # Ray lets everybody write to its folders, code and sockets among them: they lie in one that only this user enters
    folder = None if resources.address else make_socket_folder()
    private_ray = {"address": "local", "include_dashboard": False, "_temp_dir": f"{folder}/ray"}
    where = {"address": resources.address} if resources.address else private_ray
    try:
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (Exception, SystemExit) as error:  # Ray says so by a plain Exception, or asks Python to exit with 15
            reason = f"({type(error).__name__}: {' '.join(str(error).split())})"
            raise ResourceError(
                f"no Ray at {resources.address} {reason}; `ray status` there shows whether it is up, and --address '' "
                "starts one here"
                if resources.address
                else f"Ray did not start here {reason}; where other work keeps the processors busy it takes too long: "
                "give the same command again when that has ended"
            ) from error
        memory = max(memory_gib(config, resources.runner) for config in plan)
        slots = _slots(ray.nodes(), resources, memory)  # type: ignore[no-untyped-call]
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        with _in_background(free_orphans, every_s=ORPHAN_INTERVAL_S):
            yield min(slots, resources.max_concurrent or slots)
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _slots(nodes: Sequence[dict[str, Any]], resources: Resources, memory: float) -> int:
    """Return how many trials of so many GiB fit on the nodes at once.

    Raises:
        ResourceError: if none does.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    per_node = []
    for node in alive:
        fits = places_on_node(node, cpus=resources.cpus, gpus=resources.gpus)
        per_node.append(min(fits, int(node.get("memory", 0.0) / 2**30 / memory)))
    if sum(per_node) < resources.workers_per_run:
        have = ", ".join(
            f"{node.get('CPU', 0):g} CPU {node.get('GPU', 0):g} GPU {node.get('memory', 0) / 2**30:.1f} GiB"
            for node in alive
        )
        each = f"{resources.cpus:g} CPU, {resources.gpus:g} GPU and {memory:.1f} GiB"
        times = f"{resources.workers_per_run} times " if resources.workers_per_run > 1 else ""
        raise ResourceError(f"one trial wants {times}{each} on one node; the nodes have: {have}")
    return sum(per_node) // resources.workers_per_run


class Shown(Protocol):
    """What is watched: the live status of a sweep's runs or a search's trials."""

    def refresh(self) -> None:
        """Read what is new."""

    def table(self) -> Table:
        """Return it as a table."""

    def lines(self) -> list[str]:
        """Return what has moved since the last call, a line each."""

    @property
    def num_ended(self) -> int:
        """How many have ended."""


@contextmanager
def watching(
    board: Shown, tracker: Tracker, on_ended: Callable[[], object], meter: Meter | None = None
) -> Iterator[None]:
    """Show the runs and ship their metrics, in a thread, while the body runs; `on_ended` is called when some ended."""
    stop = threading.Event()

    def watch() -> None:
        next_write, next_line = 0.0, time.monotonic() + LINE_INTERVAL_S
        written = -1
        with Live(board.table(), console=err, auto_refresh=False) if err.is_terminal else nullcontext() as live:
            while True:
                last = stop.wait(1.0)
                board.refresh()
                if meter is not None:
                    meter.look()
                if live is not None:
                    live.update(board.table(), refresh=True)
                elif time.monotonic() >= next_line or last:
                    next_line = time.monotonic() + LINE_INTERVAL_S
                    for line in board.lines():
                        err.print(line, soft_wrap=True)
                if last:
                    return
                if time.monotonic() >= next_write and board.num_ended != written:
                    next_write, written = time.monotonic() + SHIP_INTERVAL_S, board.num_ended
                    on_ended()

    def ship() -> None:
        backoff = SHIP_INTERVAL_S
        while True:
            backoff = SHIP_INTERVAL_S if tracker.ship() else min(300.0, 2 * backoff)
            if stop.wait(backoff):
                return

    # a server that does not answer holds neither the display nor the end, where `Tracker.ship_rest` takes over
    with (
        _thread(lambda: _reporting("display", watch), stop),
        _thread(lambda: _reporting("tracking", ship), stop, wait_s=0.0),
    ):
        yield


@contextmanager
def _in_background(action: Callable[[], object], *, every_s: float) -> Iterator[None]:
    """Do something again and again in a thread while the body runs; a failure is tried again."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(every_s):
            with suppress(Exception):
                action()

    with _thread(repeat, stop):
        yield


@contextmanager
def _thread(target: Callable[[], None], stop: threading.Event, *, wait_s: float = 60.0) -> Iterator[None]:
    """Run a function beside the body; `stop` is set at its end, and the function waited for so long."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=wait_s)


def _reporting(what: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # the sweep outlives its display; the last shipment sends what this one missed
        warn(f"the {what} stopped: {type(error).__name__}: {error}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""
