"""One run from data to result in one folder: what `aepo train` and every Ray worker execute.

    config.json  metrics.jsonl  policy.safetensors  result.json  [grid.png]      (checkpoint: where its store puts it)

The metrics file is a spool: one line per log, written once even if steps are repeated after a crash, read by
whoever tracks the run. The result file comes last and makes the run finished.
"""

import dataclasses
import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from aepo import checkpoint, parallel, pipeline
from aepo.config import RunConfig
from aepo.console import err
from aepo.data.transitions import Transitions, load_transitions
from aepo.errors import AEPOError, CheckpointError, Interrupted, ResourceError
from aepo.evaluate import Evaluator, draw_grid
from aepo.pipeline import Progress
from aepo.policy import GuidedPolicy, Policy
from aepo.rundir import (
    CONFIG,
    GRID,
    METRICS,
    POLICY,
    RESULT,
    describe,
    read_result,
    read_spool,
    record_failure,
    write_json,
)
from aepo.store import Reuse, StageStore

CLONING = "diffusion-bc"
"""Name in tables of a guided method at guidance scale 0."""
BEST_CLONE = "best-clone"
"""The same with several candidates, of which the one with the largest Q is taken."""
EVALUATION_SEED = 1_000_000
"""Episode i of a run's evaluation is reset with EVALUATION_SEED * (1 + seed) % 2**31 + i: apart from training."""


class Store(Protocol):
    """Where a run keeps its checkpoint."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest checkpoint, None at the first start."""

    def save(self, content: dict[str, Any]) -> None:
        """Keep this checkpoint; the newest replaces those before it."""


@dataclasses.dataclass(frozen=True)
class FolderStore:
    """The checkpoint in the run's own folder."""

    folder: Path

    def load(self) -> dict[str, Any] | None:
        """Return the newest whole checkpoint of the folder."""
        return checkpoint.load(self.folder)

    def save(self, content: dict[str, Any]) -> None:
        """Write it atomically, the one before it kept."""
        checkpoint.save(self.folder, content)


class Spool:
    """The run's metrics.jsonl, open for appending; every (stage, step) stands in it once."""

    def __init__(self, path: Path, stages: Sequence[str]):
        """Open it, cutting off a last line that a crash has torn; `stages` are the run's, in order."""
        self._stages = list(stages)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        self._file.truncate(whole)
        rows = text[:whole].splitlines()
        self._last = self._place(json.loads(rows[-1])) if rows else (-1, 0)

    def _place(self, row: dict[str, Any]) -> tuple[int, int]:
        return self._stages.index(row["stage"]), int(row["step"])

    def has(self, progress: Progress) -> bool:
        """Return whether a row of this step, or of a later one, is already there."""
        return self._last >= (self._stages.index(progress.stage), progress.step)

    def write(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Append one row; readers see whole lines only."""
        row = {
            "time": round(time.time(), 3),
            "stage": progress.stage,
            "step": progress.step,
            "num_steps": progress.num_steps,
            "metrics": metrics,
        }
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._last = self._place(row)

    def copy(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows that another run wrote, those that are not there yet."""
        for row in rows:
            if self._place(row) > self._last:
                self._file.write(json.dumps(row).encode() + b"\n")
                self._last = self._place(row)
        self._file.flush()

    def sync(self) -> None:
        """Put all rows on the disk, before the checkpoint that makes them unrepeatable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def execute(
    config: RunConfig,
    folder: Path,
    store: Store,
    *,
    device: torch.device,
    checkpoint_s: float = 60.0,
    on_progress: Callable[[Progress], bool | None] | None = None,
    stage_store: StageStore | None = None,
) -> dict[str, Any]:
    """Train, evaluate and return the result; from the last checkpoint if there is one, at once if it has ended.

    A failure that a repetition would meet again becomes a result with status `failed` and is raised too.

    Args:
        config: the run.
        folder: its folder, the run's own.
        store: where checkpoints go.
        device: where to train.
        checkpoint_s: seconds between two checkpoints, >= 0.
        on_progress: called at every Progress; True asks the run to stop.
        stage_store: where stages that other runs have trained are, and this one's go.

    Raises:
        AEPOError: what failed, in one line.
        Interrupted: if it was asked to stop, after a checkpoint.
    """
    ended = read_result(folder)
    if ended is not None and ended["status"] == "finished":
        return ended
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, dataclasses.asdict(config))
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {**describe(config, folder), "started_at": started_at}
    try:
        outcome = _train_and_evaluate(config, folder, store, device, checkpoint_s, on_progress, stage_store)
    except (AEPOError, MemoryError, torch.OutOfMemoryError, OSError) as error:
        if not (known := _as_known(error, folder)):
            raise
        record_failure(config, folder, f"{type(known).__name__}: {known}", started_at=started_at)
        raise known from error
    result = {**facts, **outcome, "status": "finished", "error": None}
    write_json(folder / RESULT, result)
    return result


def _as_known(error: BaseException, folder: Path) -> AEPOError | None:
    """Return what a repetition would meet again, None for what may have been an accident."""
    if isinstance(error, AEPOError):
        return error
    if not isinstance(error, OSError):
        return ResourceError(f"out of memory: {error}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left for {folder}; make room, then repeat with --retry-failed")
    return None


def _train_and_evaluate(
    config: RunConfig,
    folder: Path,
    store: Store,
    device: torch.device,
    checkpoint_s: float,
    on_progress: Callable[[Progress], bool | None] | None,
    stage_store: StageStore | None,
) -> dict[str, Any]:
    begin = time.monotonic()
    data = load_data(config).to(device)
    evaluator = Evaluator.of(config)
    saved = store.load()
    seconds_before = _check_saved(saved, config, data)
    stages = list(config.stages)
    if saved is not None:
        place = {name: int(saved["state"][name]["step"]) for name in stages}
        reached = ", ".join(f"{name} step {step:,}" for name, step in place.items())
        err.print(f"{config.name} continues behind {reached}", soft_wrap=True)
    spool = Spool(folder / METRICS, stages)
    points = _curve_points(config)
    last_saved = time.monotonic()
    state: pipeline.PipelineState | None = None
    resume = saved["state"] if saved is not None else None
    reuse = Reuse(stage_store, config, data.digest) if stage_store is not None else None
    if reuse is not None:
        resume, taken = reuse.begin(lambda: pipeline.start(config, data, device), resume)
        spool.copy(taken)

    def keep(progress: Progress) -> None:
        spool.sync()
        store.save(
            {
                "fingerprint": config.fingerprint,
                "dataset_digest": data.digest,
                "seconds": seconds_before + time.monotonic() - begin,
                "state": checkpoint.collect(progress.state),
            }
        )

    try:
        for progress in pipeline.train(config, data, device=device, resume=resume):
            state = progress.state
            metrics = dict(progress.metrics)
            if metrics and not spool.has(progress):
                if progress.stage == stages[-1] and progress.step in points:
                    policy = Policy.from_state(config, state, data.spaces)
                    returns = evaluator.run(
                        policy,
                        num_episodes=config.evaluation.num_curve_episodes,
                        seed=evaluation_seed(config.seed),
                    )
                    metrics |= _eval_metrics(evaluator, returns)
                spool.write(progress, metrics)
            stop = bool(on_progress is not None and on_progress(progress))
            last = progress.stage == stages[-1] and progress.step == progress.num_steps
            save = stop or last or time.monotonic() - last_saved >= checkpoint_s
            parallel.agree(stop)
            if save:
                keep(progress)
                last_saved = time.monotonic()
            if stop:
                raise Interrupted(f"stopped at step {progress.step} of {progress.stage}")
            if reuse is not None and progress.step == progress.num_steps:
                spool.copy(reuse.next(progress.stage, state, read_spool(folder / METRICS)[0]))
        if state is None:  # resumed after the last step
            state = pipeline.start(config, data, device)
            assert resume is not None
            checkpoint.restore(state, resume)
        policy = Policy.from_state(config, state, data.spaces)
        policy.save(folder / POLICY)
        policies = [policy]
        if isinstance(policy, GuidedPolicy):
            cloning = dataclasses.replace(policy.sampling, guidance_scale=0.0, num_candidates=1)
            policies.append(policy.with_sampling(cloning))
        seed = evaluation_seed(config.seed)
        evaluations = [
            evaluate(each, evaluator, num_episodes=config.evaluation.num_episodes, seed=seed) for each in policies
        ]
        grid = _evaluate_grid(policy, evaluator, config) if isinstance(policy, GuidedPolicy) else []
        if grid:
            draw_grid(grid, folder / GRID, title=f"{config.task}, seed {config.seed}")
    finally:
        if reuse is not None:
            reuse.close()
        spool.close()
        evaluator.close()
    headline = evaluations[0]
    before = config.num_steps - config.stages[stages[-1]].steps
    curve = [
        {
            "stage": row["stage"],
            "step": before + row["step"],
            "score": row["metrics"].get("eval/score"),
            "return_mean": row["metrics"]["eval/return_mean"],
        }
        for row in read_spool(folder / METRICS)[0]
        if "eval/return_mean" in row["metrics"]
    ]
    final = {key: headline[key] for key in ("score", "return_mean")}
    curve.append({"stage": stages[-1], "step": config.num_steps, **final})
    refs = evaluator.references
    return {
        "dataset_digest": data.digest,
        "env_id": evaluator.env_id,
        "ref_min": refs.random if refs else None,
        "ref_max": refs.expert if refs else None,
        **final,
        "num_episodes": headline["num_episodes"],
        "steps": config.num_steps,
        "steps_reused": reuse.steps_taken if reuse is not None else 0,
        "seconds": round(seconds_before + time.monotonic() - begin, 3),
        "evaluations": evaluations,
        "curve": curve,
        "grid": grid,
    }


def follow(config: RunConfig, store: Store, *, device: torch.device) -> None:
    """Train beside the worker that leads (`execute`): the same steps, no evaluation, no files.

    Raises:
        Interrupted: if the leader was asked to stop.
        AEPOError: what the leader meets too.
    """
    data = load_data(config).to(device)
    saved = store.load()
    _check_saved(saved, config, data)
    for progress in pipeline.train(config, data, device=device, resume=saved and saved["state"]):
        if parallel.agree(False):
            raise Interrupted(f"stopped at step {progress.step} of {progress.stage}")


def load_data(config: RunConfig) -> Transitions:
    """Return a run's transitions on the CPU, by the rules of its config; errors as `load_transitions`."""
    return load_transitions(
        config.data.dataset,
        observation_keys=config.data.observation_keys,
        reward_rule=config.data.reward_rule,
    )


def evaluation_seed(seed: int) -> int:
    """Return the seed of a run's first evaluation episode; those of different runs do not overlap by design."""
    return EVALUATION_SEED * (1 + seed) % (2**31 - 10_000)


def evaluate(policy: Policy, evaluator: Evaluator, *, num_episodes: int, seed: int) -> dict[str, Any]:
    """Return one entry of a result's `evaluations`: the policy rolled out as its `sampling` says."""
    returns = evaluator.run(policy, num_episodes=num_episodes, seed=seed)
    metrics = _eval_metrics(evaluator, returns)
    method: str = policy.config.method
    beta = scale = None
    if isinstance(policy, GuidedPolicy):
        beta, scale = policy.sampling.beta, policy.sampling.guidance_scale
        if scale == 0:
            method = CLONING if policy.sampling.num_candidates == 1 else BEST_CLONE
    return {
        "method": method,
        "beta": beta,
        "guidance_scale": scale,
        "score": metrics.get("eval/score"),
        "return_mean": metrics["eval/return_mean"],
        "return_std": float(returns.std(ddof=1)) if len(returns) > 1 else 0.0,
        "num_episodes": len(returns),
        "episode_returns": returns.tolist(),
    }


def _evaluate_grid(policy: GuidedPolicy, evaluator: Evaluator, config: RunConfig) -> list[dict[str, Any]]:
    """Return one row per beta and guidance scale of the config's heat map."""
    rows = []
    for beta, scale in itertools.product(config.evaluation.grid_beta, config.evaluation.grid_guidance_scale):
        cell = policy.with_sampling(dataclasses.replace(policy.sampling, beta=beta, guidance_scale=scale))
        num_episodes = config.evaluation.num_grid_episodes
        row = evaluate(cell, evaluator, num_episodes=num_episodes, seed=evaluation_seed(config.seed))
        rows.append({key: row[key] for key in ("beta", "guidance_scale", "score", "return_mean", "num_episodes")})
    return rows


def _eval_metrics(evaluator: Evaluator, returns: NDArray[np.float64]) -> dict[str, float]:
    mean = float(returns.mean())
    score = {"eval/score": evaluator.references.score(mean)} if evaluator.references else {}
    return {"eval/return_mean": mean, **score}


def _curve_points(config: RunConfig) -> set[int]:
    """Return the steps of the last stage at which a Progress with metrics is evaluated."""
    num_steps = list(config.stages.values())[-1].steps
    log_interval = max(1, num_steps // pipeline.NUM_LOGS)
    count = config.evaluation.num_curve_points
    return {round(num_steps * i / (count + 1) / log_interval) * log_interval for i in range(1, count + 1)}


def _check_saved(saved: dict[str, Any] | None, config: RunConfig, data: Transitions) -> float:
    """Return the seconds that a checkpoint's run has taken; refuse one of another run or of other data."""
    if saved is None:
        return 0.0
    if saved.get("fingerprint") != config.fingerprint:
        raise CheckpointError(
            f"the checkpoint is of run {saved.get('fingerprint')}, wanted {config.fingerprint}: foreign"
        )
    if saved.get("dataset_digest") != data.digest:
        raise CheckpointError(
            f"{config.data.dataset} has changed since the checkpoint was written "
            f"({saved.get('dataset_digest')} then, {data.digest} now); train into another folder"
        )
    return float(saved["seconds"])


def set_threads(threads: int) -> None:
    """Let torch use exactly this many cores in this process."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def select_device(name: str) -> torch.device:
    """Return the device of `auto` (CUDA if there is one, else CPU) or of a torch device name.

    Raises:
        ResourceError: if it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device
