"""What a plan will take: hours of cores and GPUs, memory and disk, before any of its data are here.

A run's time is made of starting its processes, reading its data, gradient steps, what a stage draws before them, and
evaluation. Each is measured here for a moment: steps at two dimensions of states and actions between which their cost
is linear, environments one of each kind. On the CPU, processor time is measured, so that other work on the machine
counts for nothing. The measurements can be kept and used elsewhere: those of a machine with a GPU, for example.
"""

import contextlib
import dataclasses
import hashlib
import heapq
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import gymnasium
import psutil
import torch
from rich.progress import Progress

from aepo import checkpoint, files, kernels, methods, pipeline, tasks
from aepo.bench.measure import Shape
from aepo.config import RunConfig, with_overrides
from aepo.console import err, warn
from aepo.data.fetch import library_bytes
from aepo.data.library import open_dataset
from aepo.data.transitions import Transitions
from aepo.documents import parse_json
from aepo.environments import make_environment, own_temporary_folder, register_robotics
from aepo.errors import AEPOError, ConfigError, ResourceError
from aepo.evaluate import MAX_ENVS
from aepo.policy import Policy
from aepo.runs import run, rundir
from aepo.runs.stage_store import stage_keys
from aepo.slots import environment_errors
from tune.spec import Resources

SECONDS = 0.15
"""Seconds per measurement, which takes at least three calls."""
FORMAT = 1
"""Version of a file of measurements."""
SMALL, LARGE = (4, 2), (46, 26)
"""Dimensions of states and actions at which steps are measured: the fewest and about the most of the benchmark's."""
NUM_TRANSITIONS = 20_000
"""Random transitions of which batches are taken while steps are measured."""
BASE_GIB = {"train": 1.2, "inline": 0.6}
"""Runner -> GiB of the processes of one running trial, half above what was measured (docs/operations.md)."""
MAX_ACTION_DIM = 30
"""Largest number of action dimensions among the benchmark's tasks; memory is estimated before data are read."""
MEASURED_SUPPORT = 512
"""States with support actions while rates are measured; drawing them is counted apart."""
STARTS = {"train": 2.0, "inline": 0.0}
"""Runner -> cost of starting a run, in times of importing this program."""
SWEEP_STARTS = 4.0
"""Cost, in these times, of what a sweep starts once: its own process, Ray, MLflow, and each place for a run."""

NUM_COPIES = 2.3
"""A run keeps two checkpoints and its policy, which is about a third of one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCost:
    """Seconds of one run, on as many cores as it has."""

    start: float
    """Seconds of starting its processes and reading its data."""
    stages: Mapping[str, float]
    """Stage -> seconds of its steps and of what it draws before them."""
    evaluation: float | None
    """Seconds of all evaluations; none = its environment cannot be made here."""
    disk_bytes: Mapping[str, int]
    """Stage -> bytes that its state takes in a checkpoint."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.start + sum(self.stages.values()) + (self.evaluation or 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """What a plan takes in all."""

    core_hours: float
    gpu_hours: float
    wall_hours: float
    start_hours: float
    """Core hours of starting processes and reading data."""
    evaluation_hours: float
    saved_hours: float
    """Core hours, on a GPU its hours, that stages trained once save; in none of the others unless they are shared."""
    slots: int
    """Runs at a time."""
    disk_gb: float
    """Checkpoints, policies and the stages that runs share."""


class Costs:
    """Seconds of what runs are made of, measured when they are first asked for, or given."""

    def __init__(self, *, cpus: float, gpus: float, known: Mapping[str, float] | None = None):
        """Take what was measured elsewhere, or nothing.

        Args:
            cpus: cores of a run.
            gpus: of a run; with any, steps are measured on the GPU.
            known: seconds by name, of a file; then nothing is measured here.
        """
        self.seconds: dict[str, float] = dict(known or {})
        self._given = known is not None
        self._threads = max(1, min(int(cpus), os.cpu_count() or 1))
        self._gpus = gpus
        self._prepared: dict[Any, tuple[Any, Mapping[str, Callable[[], Any]], Transitions]] = {}

    @cached_property
    def _device(self) -> torch.device:
        run.set_up_torch(self._threads)
        return run.select_device("auto" if self._gpus else "cpu")

    def check_gpu(self) -> None:
        """Raise a ResourceError if steps cannot be measured on a GPU here."""
        if self._device.type == "cpu":
            raise ResourceError(
                "no GPU here to measure on; where there is one: aepo benchmark d4rl plan --gpus 1 --measure FILE, then "
                "--cost-of FILE here"
            )

    def save(self, file: Path) -> None:
        """Write what was measured, and where."""
        document = {
            "format": FORMAT,
            "machine": platform.node(),
            "processor": kernels.processor().name,
            "device": torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu",
            "threads": self._threads,
            "torch": torch.__version__,
            "commit": rundir.commit(),
            "seconds": self.seconds,
        }
        files.write_json(file, document)

    def of_run(self, config: RunConfig, runner: str) -> RunCost | None:
        """Return what a run takes; None if the dimensions of its data are not known.

        Raises:
            ConfigError: if what was measured elsewhere lacks something of it.
        """
        row = row_of(config)
        dims = _dims(config, row)
        if dims is None:
            return None
        stages = {}
        for name, stage in config.stages.items():
            key = f"{name} {_digest(stage)}"
            seconds = stage.steps * self._between(f"step {key}", dims, partial(self._step, config, name))
            if stage.support[0]:
                each = self._between(f"draw {key}", dims, partial(self._draw, config, name))
                seconds += each * min(stage.support[0], row.steps or stage.support[0])
            stages[name] = seconds
        sizes = {
            name: int(self._between(f"bytes {name} {_digest(config)}", dims, partial(self._size, config, name)))
            for name in config.stages
        }
        starts = STARTS[runner] * self._once("start", _start)
        read = self._once("byte read", _read) * library_bytes(row)
        return RunCost(
            start=starts + read,
            stages=stages,
            evaluation=self._evaluation(config, row, dims),
            disk_bytes=sizes,
        )

    def sweep_start(self) -> float:
        """Return the seconds of what a sweep starts once."""
        return SWEEP_STARTS * self._once("start", _start)

    def _evaluation(self, config: RunConfig, row: tasks.Task, dims: tuple[int, int]) -> float | None:
        own = config.evaluation
        has_clone = "sampling" in config.groups
        times = {own.num_curve_episodes: own.num_curve_points} if own.num_curve_points else {}
        clones = {own.num_episodes: 1} if has_clone else {}  # the final evaluation is made of the clone too
        *before, _ = methods.stages_of(config)
        if own.num_curve_points and (count := sum(stage.acts for stage in before) * (own.num_curve_points + 1)):
            clones[own.num_curve_episodes] = clones.get(own.num_curve_episodes, 0) + count
        times[own.num_episodes] = times.get(own.num_episodes, 0) + 1
        if config.is_guided and own.select_episodes:
            num_choices = len(own.choices(config.sampling))  # type: ignore[attr-defined]
            each = own.select_episodes // num_choices
            times[each] = times.get(each, 0) + num_choices
            times[own.num_episodes] += 1
        if grid := len(own.grid):
            times[own.num_grid_episodes] = times.get(own.num_grid_episodes, 0) + grid
        kind = _environment_kind(row)
        if f"make {kind}" not in self.seconds:
            try:
                self.seconds |= {f"{what} {kind}": value for what, value in _environment(config, row).items()}
            except AEPOError as error:
                warn(f"evaluation of {config.task} is not in the estimate: {error}")
                return None
        make, reset, step, limit = (self.seconds[f"{what} {kind}"] for what in ("make", "reset", "step", "limit"))
        horizon = own.horizon or limit
        seconds = make * max(min(MAX_ENVS, num) for num in times)
        for kind, counts in (("act", times), ("clone" if has_clone else "act", clones)):
            for num, count in counts.items():
                seconds += count * num * (reset + horizon * step)
                acting = self._act(config, dims, min(num, MAX_ENVS), kind)
                seconds += count * math.ceil(num / MAX_ENVS) * horizon * acting
        return seconds

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.seconds:
            if self._given:
                raise ConfigError(
                    f"the file of --cost-of has no {key!r}: measure there with the same methods and settings"
                )
            self.seconds[key] = measure()
        return self.seconds[key]

    def _between(self, key: str, dims: tuple[int, int], measure: Callable[[tuple[int, int]], float]) -> float:
        """Return a cost at these dimensions from those at SMALL and LARGE: linear in their sum, never negative."""
        low, high = (self._once(f"{key} {at[0]}x{at[1]}", partial(measure, at)) for at in (SMALL, LARGE))
        share = (sum(dims) - sum(SMALL)) / (sum(LARGE) - sum(SMALL))
        return max(0.1 * min(low, high), low + share * (high - low))

    def _ready(
        self, config: RunConfig, at: tuple[int, int]
    ) -> tuple[Any, Mapping[str, Callable[[], Any]], Transitions]:
        """Return states, steps and data of a config at these dimensions, after a step of each stage.

        Those of one config are kept.
        """
        digest = _digest(config)
        if any(kept != digest for kept, _ in self._prepared):
            self._prepared.clear()
        if (digest, at) not in self._prepared:
            shape = Shape(state_dim=at[0], action_dim=at[1], task=row_of(config), num_transitions=NUM_TRANSITIONS)
            data = shape.data().to(self._device)
            states, steps = pipeline.prepare(_light(config), data, self._device)
            for step in steps.values():
                step()
            self._prepared[digest, at] = states, steps, data
        return self._prepared[digest, at]

    def _step(self, config: RunConfig, name: str, at: tuple[int, int]) -> float:
        return self._timed(self._ready(config, at)[1][name])

    def _draw(self, config: RunConfig, name: str, at: tuple[int, int]) -> float:
        states, _, data = self._ready(config, at)
        stage = next(stage for stage in methods.stages_of(config) if stage.name == name)
        own = _light(config).stages[name]
        if stage.prepare is None:
            return 0.0
        prepare = stage.prepare
        return self._timed(lambda: prepare(own, states, data)) / own.support[0]

    def _act(self, config: RunConfig, dims: tuple[int, int], num: int, what: str) -> float:
        def measure(at: tuple[int, int]) -> float:
            states, _, data = self._ready(config, at)
            policy = Policy.from_state(config, states, data)
            if what == "clone":
                assert policy.sampling is not None
                policy = policy.with_sampling(policy.sampling.cloning)
            generator = torch.Generator(policy.device).manual_seed(0)
            observations = torch.randn(num, at[0], device=policy.device)
            return self._timed(lambda: policy.act(observations, generator), threads=1)

        return self._between(f"{what} {num} {_digest(config)}", dims, measure)

    def _size(self, config: RunConfig, name: str, at: tuple[int, int]) -> float:
        states, _, _ = self._ready(config, at)
        return len(checkpoint.to_bytes(checkpoint.collect({name: states[name]})))

    def _timed(self, call: Callable[[], Any], *, threads: int = 0) -> float:
        """Return the seconds of a call."""
        on_cpu = self._device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        call()
        begin, num = clock(), 0
        while num < 3 or clock() - begin < SECONDS:
            call()
            num += 1
        if not on_cpu:
            torch.cuda.synchronize()
        return (clock() - begin) / num / ((threads or self._threads) if on_cpu else 1)


def read_costs(file: Path) -> dict[str, float]:
    """Return the seconds that `Costs.save` wrote.

    Raises:
        ConfigError: if the file is none of these.
    """
    try:
        document = parse_json(file.read_text())
        seconds = document["seconds"]
        if document["format"] != FORMAT or not all(isinstance(value, int | float) for value in seconds.values()):
            raise ValueError("another format")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no file of measurements ({error}); write one: aepo benchmark d4rl plan --measure {file}"
        ) from error
    return {str(key): float(value) for key, value in seconds.items()}


def run_costs(plan: Sequence[RunConfig], costs: Costs, runner: str) -> dict[str, RunCost]:
    """Return run name -> what it takes, without runs whose data are neither here nor of known dimensions."""
    kinds: dict[Any, RunCost | None] = {}
    found = {}
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        for config in progress.track(plan, description="measuring what runs take"):
            kind = dataclasses.replace(config, seed=0, variant="")
            if kind not in kinds:
                kinds[kind] = costs.of_run(config, runner)
            if (cost := kinds[kind]) is not None:
                found[config.name] = cost
    return found


def total(
    plan: Sequence[RunConfig], costs: Mapping[str, RunCost], resources: Resources, *, slots: int, start_s: float
) -> Total:
    """Return what the runs with a known cost take, so many at a time, the longest first.

    Args:
        plan: the runs to do.
        costs: of each.
        resources: cores and GPUs of a run; with `stages` its stages are shared.
        slots: runs at a time.
        start_s: of the sweep itself.
    """
    seen: set[str] = set()
    seconds, saved, stored_bytes = [], 0.0, 0.0
    for config in sorted((one for one in plan if one.name in costs), key=work, reverse=True):
        own = costs[config.name]
        shared = 0.0
        for (name, end), key in stage_keys(config, config.data.dataset).items():
            if key in seen:
                ends = [0, *config.round_ends(name)]
                shared += own.stages[name] * (end - ends[ends.index(end) - 1]) / config.stages[name].steps
            elif resources.stages is not None:
                stored_bytes += own.disk_bytes[name]
            seen.add(key)
        saved += shared
        seconds.append(own.seconds - (shared if resources.stages is not None else 0.0))
    slots = max(1, min(slots, len(seconds) or 1))
    free = [0.0] * slots
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    width = resources.cpus * resources.workers_per_run
    core = (sum(seconds) * width + start_s + (slots - 1) * start_s / SWEEP_STARTS) if seconds else 0.0
    known = [costs[config.name] for config in plan if config.name in costs]
    return Total(
        core_hours=core / 3600,
        gpu_hours=sum(seconds) * resources.gpus * resources.workers_per_run / 3600,
        wall_hours=(max(free) + start_s) / 3600 if seconds else 0.0,
        start_hours=(sum(cost.start for cost in known) * width + start_s) / 3600 if known else 0.0,
        evaluation_hours=sum(cost.evaluation or 0.0 for cost in known) * width / 3600,
        saved_hours=saved * (resources.gpus or width) / 3600,
        slots=slots,
        disk_gb=(NUM_COPIES * sum(sum(cost.disk_bytes.values()) for cost in known) + stored_bytes) / 1e9,
    )


def work(config: RunConfig) -> float:
    """Return a rough measure of a run's length for ordering: weights times rows, summed over its steps."""
    return float(
        sum(
            stage.steps * stage.batch_size * stage.num_layers * stage.hidden_size**2 for stage in config.stages.values()
        )
    )


def memory_gib(config: RunConfig, runner: str) -> float:
    """Return the memory of a run: processes, environments, and support actions that a stage keeps; data are shared."""
    support = sum(math.prod(stage.support) for stage in config.stages.values()) * MAX_ACTION_DIM * 4
    own = config.evaluation
    num_envs = min(MAX_ENVS, max(own.num_episodes, own.num_curve_episodes, own.num_grid_episodes * bool(own.grid)))
    row = row_of(config)
    alike = next((each for each in tasks.rows() if _environment_kind(each) == _environment_kind(row)), row)
    envs = num_envs * _environment_bytes(alike)
    return BASE_GIB[runner] + (support + envs) / 2**30


@cache
def _environment_bytes(row: tasks.Task) -> float:
    """Return by how much this process grows with each further environment of a task; 0 where none can be made.

    Measured once for all tasks of a kind: what is freed is taken again, so that a second measurement finds less.

    One of HalfCheetah takes 1 MB, of PointMaze 11, of FrankaKitchen 60 to 110, and a run evaluates in 50 at a time.
    """
    process = psutil.Process()
    with contextlib.suppress(AEPOError), own_temporary_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions that tasks name on purpose
        with environment_errors(row.env_id or row.dataset):
            envs, sizes = list[Any](), list[int]()
            for _ in range(4):
                envs.append(_make(row))
                envs[-1].reset(seed=0)
                sizes.append(process.memory_info().rss)
            for env in envs:
                env.close()
        return max(0.0, (sizes[-1] - sizes[0]) / (len(sizes) - 1))  # the first one brings its libraries along
    return 0.0


def row_of(config: RunConfig) -> tasks.Task:
    """Return the row of a run's task, or one with defaults for a data set of the user's own."""
    return tasks.for_dataset(config.data.dataset)


def _light(config: RunConfig) -> RunConfig:
    """Return the same steps with little preparation."""
    changes = {
        f"{name}.num_support_states": MEASURED_SUPPORT
        for name, stage in config.stages.items()
        if stage.support[0] > MEASURED_SUPPORT
    }
    return with_overrides(config, changes)


def _dims(config: RunConfig, row: tasks.Task) -> tuple[int, int] | None:
    """Return the entries of states and actions: of the task's row, else of the data if they are here."""
    if row.state_dim is not None and row.action_dim is not None:
        return row.state_dim, row.action_dim
    with contextlib.suppress(AEPOError):
        data = run.load_data(config)
        return data.state_dim, data.action_dim
    return None


def _digest(config: Any) -> str:
    """Return a digest of what determines the cost of a step: all settings but names, data and numbers of steps."""
    facts = dataclasses.asdict(config)
    for name in ("task", "suite", "seed", "preset", "variant", "data", "evaluation", "rounds"):
        facts.pop(name, None)
    text = json.dumps(_without(facts, {"steps", "learning_rate", "discount", "ema_decay"}), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _without(value: Any, names: Iterable[str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without(item, names) for key, item in value.items() if key not in names}


def _environment_kind(row: tasks.Task) -> str:
    """Return a name for environments whose steps cost about the same: mazes of one robot do."""
    return f"{row.env_id.partition('_')[0] or row.dataset} {row.source if row.source == 'd4rl' else ''}".strip()


def _environment(config: RunConfig, row: tasks.Task) -> dict[str, float]:
    """Return the seconds to make, reset and step a run's environment, and its limit of steps.

    Raises:
        AEPOError: if it cannot be made here.
    """
    make = partial(_make, row, config.evaluation.horizon)
    with own_temporary_folder(), warnings.catch_warnings(), environment_errors(row.env_id or row.dataset):
        warnings.simplefilter("ignore")  # of versions that tasks name on purpose
        make().close()
        begin = time.process_time()
        env = make()
        made = time.process_time() - begin
        env.reset(seed=0)
        begin = time.process_time()
        env.reset(seed=1)
        reset = time.process_time() - begin
        env.action_space.seed(0)
        steps, spent = 0, 0.0
        while steps < 20 or spent < SECONDS:
            action = env.action_space.sample()
            begin = time.process_time()
            *_, terminated, truncated, _ = env.step(action)
            spent += time.process_time() - begin
            steps += 1
            if terminated or truncated:
                env.reset()
        limit = env.spec.max_episode_steps if env.spec else None
        env.close()
    return {"make": made, "reset": reset, "step": spent / steps, "limit": float(limit or 1000)}


def _make(row: tasks.Task, horizon: int = 0) -> Any:
    """Return an environment of a task as its runs are evaluated in, or of the same kind where its data are not here."""
    from aepo.data.d4rl import make_evaluation_environment

    if row.source == "d4rl":
        return make_evaluation_environment(row)
    if row.env_id:
        register_robotics()
        return gymnasium.make(row.env_id, disable_env_checker=True)
    return make_environment(open_dataset(row.dataset), env_id=row.env_id, horizon=horizon)


def _start() -> float:
    """Return the seconds of processor time that a process takes to import what a run needs."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import aepo.runs.run, ray.train, ray.tune"], check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def _read() -> float:
    """Return the seconds in which a byte of a data set goes through its digest."""
    block = bytes(1 << 25)
    begin = time.process_time()
    hashlib.sha256(block).digest()
    return (time.process_time() - begin) / len(block)
