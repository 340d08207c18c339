"""One run from data to result in one folder: what `aepo train` and every Ray worker execute.

    config.json  metrics.jsonl  policy.safetensors  result.json  [grid.png]      (checkpoint: where its store puts it)

One process at a time carries a run out (run.lock).

The metrics file is a spool: one line per log, written once even if steps are repeated after a crash, read by
whoever tracks the run. The result file comes last and makes the run finished.
"""

import dataclasses
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from aepo import checkpoint, kernels, methods, parallel, pipeline, trust
from aepo.config import RunConfig
from aepo.console import say, warn
from aepo.data.transitions import Transitions, load_transitions
from aepo.errors import (
    AEPOError,
    CheckpointError,
    DataError,
    Interrupted,
    ResourceError,
    from_machine,
    is_out_of_memory,
    lacks_space,
)
from aepo.evaluate import Evaluator, draw_grid
from aepo.files import LOOK_S, hold, write_json
from aepo.pipeline import Progress
from aepo.policy import Policy
from aepo.results import CurvePoint, Result, RoundResult, policy_along
from aepo.runs.backend import agreed_backend, backend_of, noted_backend, own_table
from aepo.runs.evaluation import (
    cell_name,
    choice_name,
    evaluate,
    evaluate_grid,
    evaluation_seed,
    measures,
    prefix,
    selection_seed,
)
from aepo.runs.rundir import (
    CONFIG,
    GRID,
    LOCK,
    METRICS,
    POLICY,
    RESULT,
    describe,
    read_result,
    record_failure,
    write_result,
)
from aepo.runs.spool import ROUND, Spool, read_spool
from aepo.runs.stage_store import StageReuse, StageStore
from aepo.stages import States


class CheckpointStore(Protocol):
    """Keeps the checkpoint of a run; any object with these two methods will do."""

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


def execute(
    config: RunConfig,
    folder: Path,
    store: CheckpointStore,
    *,
    device: torch.device,
    checkpoint_s: float = 60.0,
    on_progress: Callable[[Progress], bool | None] | None = None,
    stage_store: StageStore | None = None,
    eval_processes: int = 1,
    wait_s: float = LOOK_S,
) -> Result:
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
        eval_processes: how many step the environments of an evaluation, >= 1; nothing but seconds depends on it.
        wait_s: seconds to wait for another process that carries the run out.

    Raises:
        AEPOError: what failed, in one line.
        BusyError: if another process carries the run out; nothing was touched.
        Interrupted: if it was asked to stop, after a checkpoint.
    """
    if (result := _finished(config, folder)) is not None:
        return result
    with _owned(folder, wait_s):
        if (result := _finished(config, folder)) is not None:  # by the one that was waited for
            return result
        (folder / RESULT).unlink(missing_ok=True)  # of a failure, which is repeated
        with _recorded(config, folder) as facts:
            num_evaluated = len(config.rounds) - 1  # the last round ends with the result
            with _Training(
                config, folder, store, device, checkpoint_s, on_progress, stage_store, eval_processes, num_evaluated
            ) as training:
                result = training.conclude(training.until(len(config.rounds)), facts)
            write_result(folder, result)
    return result


def _finished(config: RunConfig, folder: Path) -> Result | None:
    """Return the result of a finished run, None if it has not ended or failed.

    Raises:
        CheckpointError: if the file is no result, or one of another run or of other data.
    """
    result = read_result(folder)
    if result is None or result.status != "finished":
        return None
    if result.fingerprint != config.fingerprint:
        raise CheckpointError(
            f"{folder / RESULT} is of run {result.fingerprint}, wanted {config.fingerprint}: foreign; "
            f"delete {folder} to repeat the run"
        )
    check_unchanged(config, str(result.dataset_digest), folder)
    return result


@contextmanager
def _owned(folder: Path, wait_s: float) -> Iterator[None]:
    """Be the process that works in a run's folder, which is made; errors as `hold`."""
    folder.mkdir(parents=True, exist_ok=True)
    advice = "wait until that has ended, or end it, or train into another folder"
    with hold(folder / LOCK, what=f"{folder} is being trained", advice=advice, wait_s=wait_s):
        yield


def advance(
    config: RunConfig,
    folder: Path,
    store: CheckpointStore,
    *,
    num_rounds: int,
    device: torch.device,
    checkpoint_s: float = 60.0,
    on_progress: Callable[[Progress], bool | None] | None = None,
    stage_store: StageStore | None = None,
    eval_processes: int = 1,
    wait_s: float = LOOK_S,
) -> RoundResult:
    """Train to the end of a round and evaluate there; at once if that round has ended before.

    Errors are those of `execute`; there is no result, the run can go on.

    Args:
        config: the run.
        folder: its folder.
        store: where checkpoints go.
        num_rounds: rounds to have ended, in [1, number of the config's rounds].
        device: where to train.
        checkpoint_s: seconds between two checkpoints.
        on_progress: as `execute`.
        stage_store: as `execute`.
        eval_processes: as `execute`.
        wait_s: as `execute`.
    """
    with (
        _owned(folder, wait_s),
        _recorded(config, folder),
        _Training(
            config, folder, store, device, checkpoint_s, on_progress, stage_store, eval_processes, num_rounds
        ) as training,
    ):
        if num_rounds not in training.spool.rounds:
            training.until(num_rounds)
        metrics = training.spool.rounds[num_rounds]["metrics"]
    return RoundResult(
        round=num_rounds,
        score=metrics.get("eval/score"),
        return_mean=metrics["eval/return_mean"],
        steps_reused=int(metrics["steps_reused"]),
        cells={pair: metrics[cell_name(config, *pair)] for pair in config.evaluation.grid},
    )


@contextmanager
def _recorded(config: RunConfig, folder: Path) -> Iterator[Result]:
    """Give what is known of a run at its start; what fails in the body for good becomes the run's result."""
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        write_json(folder / CONFIG, dataclasses.asdict(config))
        with kernels.using(agreed_backend(backend_of(config, folder))):
            yield dataclasses.replace(describe(config, folder), started_at=started_at)
    except (AEPOError, MemoryError, RuntimeError, OSError) as error:
        if not (known := _as_known(error, folder)):
            raise
        try:
            record_failure(config, folder, f"{type(known).__name__}: {known}", started_at=started_at)
        except OSError as other:  # a full disk: the run then counts as not ended, and the same command goes on
            warn(f"the failure is not recorded in {folder}: {other.strerror}")
        raise known from error


def _as_known(error: BaseException, folder: Path) -> AEPOError | None:
    """Return what a repetition would meet again, None for what may have been an accident."""
    if isinstance(error, AEPOError):
        return error
    if is_out_of_memory(error):
        return from_machine(error)
    if lacks_space(error):
        place = getattr(error, "filename", None) or folder
        return ResourceError(f"no space left for {place}; make room and start the run again")
    return None


class _Training:
    """A run under way: what the pipeline yields becomes metrics, checkpoints and evaluations."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        store: CheckpointStore,
        device: torch.device,
        checkpoint_s: float,
        on_progress: Callable[[Progress], bool | None] | None,
        stage_store: StageStore | None,
        eval_processes: int,
        num_evaluated: int,
    ):
        """Load data and checkpoint; the first `num_evaluated` rounds end with an evaluation."""
        self._config, self._folder, self._store, self._device = config, folder, store, device
        self._checkpoint_s, self._on_progress, self._num_evaluated = checkpoint_s, on_progress, num_evaluated
        self._began_at = time.monotonic()
        data, self._evaluator = prepare(config, eval_processes)
        self._data = data.to(device)
        self._saved = store.load()
        self._seconds_before = _check_saved(self._saved, config, self._data)
        self._reused_before = int(self._saved.get("steps_reused", 0)) if self._saved is not None else 0
        self.spool = Spool(folder / METRICS, config)
        self._reuse = StageReuse(stage_store, config, self._data.digest) if stage_store is not None else None
        self._last_stage = list(config.stages)[-1]
        stages = [stage.name for stage in methods.stages_of(config) if stage.acts]
        self._points = {name: _curve_points(config, name) for name in {*stages, self._last_stage}}

    def __enter__(self) -> "_Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self._reuse is not None:
            self._reuse.close()
        try:
            self.spool.close()  # writes what is left, which a full disk refuses
        finally:
            self._evaluator.close()

    def until(self, num_rounds: int) -> States:
        """Train to the end of a round and return the state there.

        Raises:
            Interrupted: if asked to stop.
        """
        resume = None
        if self._saved is not None or self._reuse is not None:
            state = pipeline.start(self._config, self._data, self._device)
            if self._saved is not None:
                checkpoint.restore(state, self._saved["state"])
                reached = ", ".join(f"{name} step {state[name].step:,}" for name in self._config.stages)
                say(f"{self._config.name} continues behind {reached}")
            if self._settle(state, 0, num_rounds) == num_rounds:
                return state
            resume = checkpoint.collect(state)
        last_saved = time.monotonic()
        for progress in pipeline.train(self._config, self._data, device=self._device, resume=resume):
            state = progress.states
            self._note(progress)
            stop = bool(self._on_progress is not None and self._on_progress(progress))
            ends_round = progress.ends_stage and progress.stage == self._last_stage
            save = stop or ends_round or time.monotonic() - last_saved >= self._checkpoint_s
            parallel.broadcast_flag(stop)
            if save:
                self._keep(state)
                last_saved = time.monotonic()
            if stop:
                raise Interrupted(f"stopped at step {progress.step} of {progress.stage}")
            if progress.ends_stage:
                if self._reuse is not None:
                    self._reuse.give(progress.stage, progress.step, state, read_spool(self._folder / METRICS)[0])
                if self._settle(state, progress.round, num_rounds) == num_rounds:
                    break
        return state

    def _note(self, progress: Progress) -> None:
        """Write a step's metrics, with an evaluation at the points of the learning curve."""
        if not progress.metrics or self.spool.has(progress.stage, progress.step):
            return
        metrics = dict(progress.metrics)
        if progress.step in self._points.get(progress.stage, ()):
            metrics |= self._evaluate(progress.states, progress.stage)
        self.spool.write(progress.stage, progress.step, metrics)

    def _settle(self, state: States, number: int, num_rounds: int) -> int:
        """Take from the store what is there, and evaluate each round that has ended; return the first that has not."""
        while number < num_rounds:
            if self._reuse is not None:
                self.spool.copy(self._reuse.take(state, number))
            if any(state[name].step < self._config.round_ends(name)[number] for name in self._config.stages):
                break
            number += 1
            if number <= self._num_evaluated and number not in self.spool.rounds:
                self._evaluate_round(state, number)
        return number

    def _evaluate_round(self, state: States, number: int) -> None:
        policy = Policy.from_state(self._config, state, self._data)
        if self._config.evaluation.grid_beta:
            cells = evaluate_grid(policy, self._evaluator, self._config)
            best = max(cells, key=lambda cell: cell.return_mean)
            keys = ("score", "return_mean", "beta", "guidance_scale")
            metrics = {f"eval/{key}": value for key in keys if (value := getattr(best, key)) is not None}
            metrics |= {
                cell_name(self._config, *pair): cell.value
                for pair, cell in zip(self._config.evaluation.grid, cells, strict=True)
            }
        else:
            metrics = self._evaluate(state, self._last_stage)
        metrics |= {ROUND: float(number), "steps_reused": float(self._steps_reused)}
        self.spool.write(self._last_stage, self._config.round_ends(self._last_stage)[number - 1], metrics)
        self._keep(state)

    def _evaluate(self, state: States, stage: str) -> dict[str, float]:
        """Return a point of the learning curve of the policy along a stage; before the last it is not guided."""
        policy = Policy.from_state(self._config, state, self._data)
        if stage != self._last_stage and policy.sampling is not None:
            policy = policy.with_sampling(policy.sampling.cloning)
        num_episodes, seed = self._config.evaluation.num_curve_episodes, evaluation_seed(self._config.seed)
        returns = self._evaluator.run(policy, num_episodes=num_episodes, seed=seed)
        return measures(self._evaluator, returns, prefix(self._config, stage))

    @property
    def _steps_reused(self) -> int:
        return self._reused_before + (self._reuse.steps_reused if self._reuse is not None else 0)

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began_at

    def _keep(self, state: States) -> None:
        """Store a checkpoint, behind the metrics that it makes unrepeatable."""
        self.spool.sync()
        self._store.save(
            {
                "fingerprint": self._config.fingerprint,
                "dataset_digest": self._data.digest,
                "seconds": self._seconds,
                "steps_reused": self._steps_reused,
                "code": methods.find(self._config.method).code,
                "state": checkpoint.collect(state),
            }
        )

    def conclude(self, state: States, facts: Result) -> Result:
        """Write the policy, evaluate it, and return the result: `facts` and what training and evaluation add."""
        config = self._config
        policy = Policy.from_state(config, state, self._data)
        self._note_cost(policy)
        selected, selected_episodes = self._select(policy)
        selected.save(self._folder / POLICY)
        policies = [policy]
        if policy.sampling is not None:
            policies.append(policy.with_sampling(policy.sampling.cloning))
        num_episodes, seed = config.evaluation.num_episodes, evaluation_seed(config.seed)
        evaluations = [evaluate(each, self._evaluator, num_episodes=num_episodes, seed=seed) for each in policies]
        own = evaluations[0]
        if selected_episodes:
            found = evaluate(selected, self._evaluator, num_episodes=num_episodes, seed=seed)
            evaluations.append(dataclasses.replace(found, method=config.method, selected_episodes=selected_episodes))
        grid = evaluate_grid(policy, self._evaluator, config)
        if grid:
            try:
                draw_grid(grid, self._folder / GRID, title=f"{config.task}, seed {config.seed}")
            except OSError as error:  # the result has its numbers
                warn(f"no heat map in {self._folder}: {error.strerror}")
        rows = read_spool(self._folder / METRICS)[0]
        has_clone = policy.sampling is not None
        curve = [
            CurvePoint(
                stage=row["stage"],
                step=config.steps_until(row["stage"], row["step"]),
                score=row["metrics"].get(f"{begin}score"),
                return_mean=row["metrics"][f"{begin}return_mean"],
                method="" if row["stage"] == self._last_stage else policy_along(row["stage"], has_clone=has_clone),
            )
            for row, begin in ((row, prefix(config, row["stage"])) for row in rows)
            if f"{begin}return_mean" in row["metrics"]
        ]
        last = CurvePoint(stage=self._last_stage, step=config.num_steps, score=own.score, return_mean=own.return_mean)
        refs = self._evaluator.references
        return dataclasses.replace(
            facts,
            status="finished",
            dataset_digest=self._data.digest,
            env_id=self._evaluator.env_id,
            ref_min=refs.random if refs else None,
            ref_max=refs.expert if refs else None,
            score=own.score,
            return_mean=own.return_mean,
            num_episodes=own.num_episodes,
            steps=config.num_steps,
            steps_reused=self._steps_reused,
            seconds=round(self._seconds, 3),
            peak_memory_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
            evaluations=tuple(evaluations),
            curve=(*curve, last),
            grid=tuple(grid),
            diagnostics=trust.diagnose(rows, evaluations, 100.0 / (refs.expert - refs.random) if refs else None),
        )

    def _select(self, policy: Policy) -> tuple[Policy, int]:
        """Return the policy in the way to act that returned most, and the episodes spent on finding it.

        Where nothing is to be chosen they are the policy itself and 0. The mean return of each way is a row of metrics,
        so that a run which goes on evaluates none twice.
        """
        own = self._config.evaluation
        if policy.sampling is None or not self._config.is_guided or not own.select_episodes:
            return policy, 0
        choices = own.choices(policy.sampling)
        num_episodes, seed = own.select_episodes // len(choices), selection_seed(self._config.seed)
        rows = read_spool(self._folder / METRICS)[0]
        written = {name: value for row in rows for name, value in row["metrics"].items()}
        means = []
        for place, choice in enumerate(choices):
            name = choice_name(place, choice)
            if name not in written:
                returns = self._evaluator.run(policy.with_sampling(choice), num_episodes=num_episodes, seed=seed)
                written[name] = float(returns.mean())
                last = self._config.stages[self._last_stage].steps
                self.spool.write(self._last_stage, last, {name: written[name]})
            means.append(written[name])
        best = choices[means.index(max(means))]
        return policy.with_sampling(best), num_episodes * len(choices)

    def _note_cost(self, policy: Policy) -> None:
        """Write what guidance costs on states of the data as metrics of the last stage's last step, once.

        The stage store never has them: they depend on how is sampled, which trained stages do not.
        """
        most = torch.finfo(torch.float32).max  # stands for what is not finite, which no file holds
        costs = {name: value if math.isfinite(value) else most for name, value in policy.sampler.cost().items()}
        written = {name for row in read_spool(self._folder / METRICS)[0] for name in row["metrics"]}
        if not costs.keys() <= written:
            self.spool.write(self._last_stage, self._config.stages[self._last_stage].steps, costs)


def follow_leader(config: RunConfig, folder: Path, store: CheckpointStore, *, device: torch.device) -> None:
    """Train beside the worker that leads (`execute`): the same steps and backend, no evaluation, no files.

    Raises:
        Interrupted: if the leader was asked to stop.
        AEPOError: what the leader meets too.
    """
    with kernels.using(agreed_backend(noted_backend(config, folder) or kernels.backend())):
        data = load_data(config).to(device)
        saved = store.load()
        _check_saved(saved, config, data)
        for progress in pipeline.train(config, data, device=device, resume=saved and saved["state"]):
            if parallel.broadcast_flag(False):
                raise Interrupted(f"stopped at step {progress.step} of {progress.stage}")


def prepare(config: RunConfig, eval_processes: int = 1) -> tuple[Transitions, Evaluator]:
    """Return a run's transitions and its evaluation environment, after a real step in it; say what is doubtful.

    Raises:
        DataError: if the data, the environment or the two together cannot be used, as `aepo data verify` says.
        TrainingError: if the environment fails.
        ResourceError: if there is too little memory, or the environment cannot be made here.
    """
    data = load_data(config)
    evaluator = Evaluator.of(config, processes=eval_processes)
    try:
        doubts = [*([data.doubt] if data.doubt else []), *evaluator.check(data)]
    except BaseException:
        evaluator.close()
        raise
    if data.note:
        say(f"{config.data.dataset}: {data.note}")
    for doubt in doubts:
        warn(f"{config.data.dataset}: {doubt}")
    return data, evaluator


def check_unchanged(config: RunConfig, digest: str, folder: Path) -> None:
    """Raise a CheckpointError if the data are here and are not those of a result; without them the result stands."""
    try:
        found = load_data(config).digest
    except (DataError, ResourceError):
        return
    if found != digest:
        raise CheckpointError(
            f"{folder} holds a result of other data: {config.data.dataset} has changed since ({digest} then, {found} "
            "now); train into another folder, or delete this one to train on the new data"
        )


def load_data(config: RunConfig) -> Transitions:
    """Return a run's transitions on the CPU, by the rules of its config; errors as theirs."""
    data = load_transitions(
        config.data.dataset,
        observation_keys=config.data.observation_keys,
        reward_rule=config.data.reward_rule,
    )
    return data.hold_out(config.data.held_out_share)


def _curve_points(config: RunConfig, stage: str) -> set[int]:
    """Return the steps of a stage at which a Progress with metrics is evaluated: the end too, but of the last stage."""
    num_steps, is_last = config.stages[stage].steps, stage == list(config.stages)[-1]
    log_interval = max(1, num_steps // pipeline.NUM_LOGS)
    count = config.evaluation.num_curve_points
    points = {round(num_steps * i / (count + 1) / log_interval) * log_interval for i in range(1, count + 1)}
    return points if is_last or not count else points | {num_steps}


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
    if saved.get("code", "") != methods.find(config.method).code:
        raise CheckpointError(
            f"the file of the method {config.method} has changed since the checkpoint was written, and with it what it "
            "computes; train into another folder, or delete this one"
        )
    seconds, reused = saved.get("seconds"), saved.get("steps_reused", 0)
    if not (isinstance(seconds, float) and isinstance(reused, int) and "state" in saved):
        raise CheckpointError(f"the checkpoint of {config.name} lacks its state or seconds: of another version")
    return seconds


def set_up_torch(threads: int) -> None:
    """Let torch use this many cores in this process, take 0 for numbers below 1e-38, multiply by the best backend.

    Such numbers cost a hundred times the arithmetic: Adam's means of a ReLU unit that has fallen silent become them.
    The backend is that of the tables (aepo/kernels.py); a run that began with another keeps its own.
    """
    kernels.use(kernels.choose(own_table()))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
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
