"""One trial = one Ray Train run of one pipeline: the only code that talks to Ray Train.

    Tune trial (no CPU of its own, on the head node) -> Train controller -> worker: aepo.runs.run.execute

A failure that a repetition would meet again is a result; only what the machine did (a killed worker, a lost
node) is left to Ray, which starts the worker again. Checkpoints lie in the run's folder, there as soon as they
are written: a Train checkpoint is committed by the controller some time after its report, and a kill in between
costs two intervals.
"""

import contextlib
import functools
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray.train
import ray.train.v2.api.data_parallel_trainer as v2
import ray.tune

from tune.plan import RUN_FOLDERS, STOP, read_planned

if TYPE_CHECKING:
    from aepo.results import RoundResult

End = TypeVar("End")

MAX_WORKER_FAILURES = 3
STOP_INTERVAL_S = 1.0
"""Between two looks for the file that asks a sweep to stop."""
PLACE_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Ray's variable: how long a run may wait for a place before that counts as a failed start. By default a minute, and 18
starts later a run that only had to wait for others would be a failure."""
A_YEAR_S = 365 * 86400
WAIT_S = 120.0
"""For the worker that this one replaces, if it has not ended: an orphan does within seconds, and a network file system
takes back the locks of a node that is gone after a minute and a half."""


class SlimTrainer(v2.DataParallelTrainer):
    """Ray's trainer without two helper processes per run.

    The placement-group cleaner costs 0.6 GB a run (ray issue 65443) and needs the dashboard; `free_orphans` does its
    work for all runs. The data-set manager serves Ray Data only.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in unused]


class ForgetEnded(ray.tune.Callback):
    """Drops the statistics that Tune keeps of every metric of an ended trial: half of what a trial costs the driver."""

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]  # called by keyword
        """Called by Tune."""
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        trial.run_metadata.invalidate_cache()


def free_orphans() -> int:
    """Remove the placement groups of this job whose creator has died, and return how many.

    Ray keeps them until the job ends: a trial's driver that is killed would leave the cores of its workers reserved
    for good.
    """
    from ray._private import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    num = 0
    for text in state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(text)
        removed = group.state == PlacementGroupTableData.REMOVED
        by_actor = bool(group.creator_actor_id.strip(b"\xff"))  # else by the sweep's process, which lives
        if by_actor and group.creator_actor_dead and not removed and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            num += 1
    return num


def run_trial(values: dict[str, Any]) -> None:
    """Launch the Train run of one planned run and wait for it; the function that Ray Tune schedules.

    Args:
        values: `run` (name), `sweep` (folder), `cpus`, `gpus`, `workers`, `checkpoint_s`; plain values, since
            Tune stores them.
    """
    if _is_stopped(values):
        return
    os.environ[PLACE_TIMEOUT] = str(A_YEAR_S)
    folder = Path(values["sweep"]) / RUN_FOLDERS / values["run"]
    trainer = SlimTrainer(
        train_worker,
        backend_config=_backend(values),
        train_loop_config=values,
        scaling_config=ray.train.ScalingConfig(
            num_workers=values["workers"],
            use_gpu=values["gpus"] > 0,
            resources_per_worker={
                "CPU": values["cpus"],
                **({"GPU": values["gpus"]} if values["gpus"] else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(
                max_failures=MAX_WORKER_FAILURES,
                controller_failure_limit=5,  # type: ignore[call-arg]  # V2's class, chosen at run time
            ),
        ),
    )
    trainer.fit()
    ray.tune.report({"ended": 1})


def run_inline(values: dict[str, Any]) -> None:
    """Execute one planned run in Tune's own process, without Ray Train."""
    if not _is_stopped(values):
        _execute(values)
    ray.tune.report({"ended": 1})


def train_worker(values: dict[str, Any]) -> None:
    """Execute one run in a Train worker, from the last checkpoint if there is one; of several workers one leads."""
    if ray.train.get_context().get_world_rank() == 0:
        _execute(values)
    else:
        _follow(values)


def _backend(values: dict[str, Any]) -> Any:
    """Return what makes the workers of a run one process group of torch; one alone needs none."""
    if values["workers"] == 1:
        return None
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl" if values["gpus"] else "gloo")


def _is_repeated(folder: Path, text: str) -> bool:
    """Return whether the run's last start ended with this error too; remember it."""
    note = folder / "error.txt"
    same = note.exists() and note.read_text() == text
    note.write_text(text)
    return same


def _follow(values: dict[str, Any]) -> None:
    from aepo.errors import AEPOError, Interrupted
    from aepo.runs import run

    sweep = Path(values["sweep"])
    config = read_planned(sweep, values["run"])
    run.set_up_torch(max(1, int(values["cpus"])))
    _claim_share(values["gpus"])
    folder = sweep / RUN_FOLDERS / config.name
    with contextlib.suppress(AEPOError, Interrupted):  # the leader says it
        run.follow_leader(
            config, folder, run.FolderStore(folder), device=run.select_device("cuda" if values["gpus"] else "cpu")
        )


def _is_stopped(values: dict[str, Any]) -> bool:
    return (Path(values["sweep"]) / STOP).exists()


def _claim_share(gpus: float) -> None:
    """Keep to a fraction of a GPU's memory: Ray counts fractions and does not enforce them."""
    if 0 < gpus < 1:
        import torch

        torch.cuda.set_per_process_memory_fraction(gpus)


def run_rounds(values: dict[str, Any]) -> None:
    """Advance the runs of one trial of a search, round by round, to the next rung; what Ray Tune schedules.

    Args:
        values: `runs` (names, one per task), `ended` (rounds), `until` (the last round), and those of `run_trial`.
    """
    from aepo.runs import run

    for number in range(values["ended"] + 1, values["until"] + 1):
        results: list[RoundResult] = []
        for name in values["runs"]:
            how = functools.partial(run.advance, num_rounds=number)
            if _is_stopped(values) or (found := _perform(values | {"run": name}, how)) is None:
                return
            results.append(found)
        ray.tune.report({"round": number, "results": results})


def _execute(values: dict[str, Any]) -> None:
    from aepo.runs import run

    _perform(values, run.execute)


def _perform(values: dict[str, Any], how: Callable[..., End]) -> End | None:
    """Return what `how`, run.execute or run.advance, returns of a planned run; None if it failed or was stopped."""
    from aepo.errors import AEPOError, BusyError, Interrupted
    from aepo.runs import run, rundir
    from aepo.runs.stage_store import StageStore

    sweep = Path(values["sweep"])
    config = read_planned(sweep, values["run"])
    folder = sweep / RUN_FOLDERS / config.name
    folder.mkdir(parents=True, exist_ok=True)
    num_cores = max(1, int(values["cpus"]))
    run.set_up_torch(num_cores)
    _claim_share(values["gpus"])
    looked = time.monotonic()

    def stop(_: Any) -> bool:
        nonlocal looked
        if time.monotonic() - looked < STOP_INTERVAL_S:
            return False
        looked = time.monotonic()
        return _is_stopped(values)

    with (
        (folder / "log.txt").open("a", buffering=1, errors="backslashreplace") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        log.write(f"worker {os.getpid()} starts {config.name}\n")  # Train doubles what is printed
        try:
            return how(
                config,
                folder,
                run.FolderStore(folder),
                device=run.select_device("cuda" if values["gpus"] else "cpu"),
                checkpoint_s=values["checkpoint_s"],
                on_progress=stop,
                stage_store=StageStore(Path(values["stages"])) if values["stages"] else None,
                eval_processes=num_cores,
                wait_s=WAIT_S,
            )
        except BusyError:  # the result is the other's to write; Ray tries again, and in the end says why
            raise
        except AEPOError as error:  # stands in result.json; a repetition would meet it again
            log.write(f"failed: {error}\n")
        except Interrupted as message:
            log.write(f"{message}\n")
        except Exception as error:  # an accident may be over at the next start; the same one twice is none
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            traceback.print_exc()
            if not _is_repeated(folder, text):
                raise
            log.write(f"failed twice in the same way: {text}\n")
            rundir.record_failure(config, folder, f"{text} (twice; log.txt has the traceback)")
    return None
