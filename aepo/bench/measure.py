"""What a step, an action and a second core cost here, beside the same work as research code writes it."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from aepo import kernels, method_table, methods, pipeline, tasks
from aepo.bench import naive
from aepo.config import Config, Precision, RunConfig, StageConfig, settings, used_settings, with_overrides
from aepo.data import pointmaze, staging
from aepo.data.episodes import action_bounds
from aepo.data.library import open_dataset
from aepo.data.transitions import Spaces, Transitions
from aepo.environments import own_temporary_folder, register_robotics
from aepo.errors import ConfigError, ResourceError
from aepo.evaluate import Evaluator
from aepo.kernels import linear, matmul_precision
from aepo.policy import Policy
from aepo.presets import preset
from aepo.runs import run
from aepo.samplers import GuidedSampler
from aepo.stages import Stage, States
from aepo.stages.optim import Metrics
from aepo.tasks import Task

NUM_STATES = (1, 10, 50)
"""States at once for which actions are sampled."""
BLOCKS = 5
"""Timing blocks per implementation, by turns; the fastest of each is reported."""
NUM_COLLECTED = 20_000
"""Transitions of the data set that is loaded."""
NUM_EPISODES, HORIZON = 10, 20
"""Episodes of an evaluation and steps of each."""
BENCH_DATASET = "bench/environment-v0"
NUM_SUPPORT_STATES = 1000
"""QGPO draws its actions in so many states before the first step; a step costs the same with more."""
CPU = torch.device("cpu")
PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.mkldnn._linear_pointwise.default if kernels.has_onednn() else None,
)
"""Torch's dispatcher sees matrix products as these operators."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Milliseconds of one call."""

    wall_ms: float
    cpu_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions that tasks have in common, and one of these tasks."""

    state_dim: int
    action_dim: int
    task: Task
    """A task of these dimensions, whose suite's settings are measured."""
    num_transitions: int

    def __str__(self) -> str:
        return f"{self.state_dim} x {self.action_dim}"

    def data(self) -> Transitions:
        """Return transitions of normal numbers, an episode each 1,000."""
        generator = torch.Generator().manual_seed(0)
        num, dims = self.num_transitions, (self.state_dim, self.action_dim)
        states = torch.randn(num + 1, dims[0], generator=generator)
        actions = 2 * torch.rand(num, dims[1], generator=generator) - 1
        rewards, terminals = torch.randn(num, 1, generator=generator), torch.zeros(num, 1)
        rows_ND = torch.cat([states[:-1], actions, rewards, terminals, states[1:]], dim=1)
        return Transitions(
            rows_ND=rows_ND,
            shift_D=torch.zeros(rows_ND.shape[1]),
            scale_D=torch.ones(rows_ND.shape[1]),
            spaces=Spaces(
                state_mean_S=torch.zeros(dims[0]),
                state_scale_S=torch.ones(dims[0]),
                action_low_A=-torch.ones(dims[1]),
                action_high_A=torch.ones(dims[1]),
            ),
            digest="random",
            episode_ends_E=torch.tensor([*range(1000, num, 1000), num]),
        )


def shapes_of(rows: Sequence[Task], *, most: int) -> list[Shape]:
    """Return the distinct dimensions of these tasks, the fewest first, each with at most `most` transitions.

    Rows without published dimensions have none.
    """
    found: dict[tuple[int, int], Shape] = {}
    for row in rows:
        if row.state_dim is None or row.action_dim is None:
            continue
        dims = row.state_dim, row.action_dim
        num = min(most, row.steps or most)
        if dims not in found or found[dims].num_transitions < num:
            first = found[dims].task if dims in found else row
            found[dims] = Shape(state_dim=dims[0], action_dim=dims[1], task=first, num_transitions=num)
    return [found[dims] for dims in sorted(found)]


def compare(*calls: Callable[[], Any], seconds: float) -> list[Cost]:
    """Return the cost of a call of each, timed by turns for about so many seconds in all."""
    found: list[list[Cost]] = [[] for _ in calls]
    for call in calls:
        call()  # what only the first one does
    for _ in range(BLOCKS):
        for costs, call in zip(found, calls, strict=True):
            costs.append(_block(call, seconds / BLOCKS / len(calls)))
    return [min(costs, key=lambda cost: cost.cpu_ms) for costs in found]


def _block(call: Callable[[], Any], seconds: float) -> Cost:
    wall, cpu, num = time.perf_counter(), time.process_time(), 0
    while num < 2 or time.perf_counter() - wall < seconds:
        call()
        num += 1
    return Cost((time.perf_counter() - wall) * 1e3 / num, (time.process_time() - cpu) * 1e3 / num)


def configs_of(
    budget: str, task: Task, precision: Precision = "float32", overrides: Mapping[str, str] | None = None
) -> dict[str, RunConfig]:
    """Return the config of every method at a preset's sizes; `overrides` go to those that have them.

    Raises:
        ConfigError: for a setting of which nothing here depends, or a bad value.
    """
    overrides = overrides or {}
    configs = {method: preset(f"{method}-{budget}", task, 0) for method in method_table.presets()}
    measured = {"sampling", *(stage for config in configs.values() for stage in config.stages)}
    every = dict.fromkeys(key for config in configs.values() for key in settings(config))
    known = [key for key in every if key.partition(".")[0] in measured]
    if unknown := sorted(overrides.keys() - set(known)):
        near = get_close_matches(unknown[0], known, n=3) or sorted(measured)
        raise ConfigError(f"aepo bench measures nothing of {unknown[0]!r}; did you mean {' or '.join(near)}?")
    # n-step returns gather a second batch, which the baseline does not have
    alike = {"critic.backup_steps": "1", "critic.num_support_states": str(NUM_SUPPORT_STATES)}
    alike["energy.num_support_states"] = str(NUM_SUPPORT_STATES)
    return {method: _changed(config, precision, alike | dict(overrides)) for method, config in configs.items()}


def _changed(config: Config, precision: Precision, overrides: Mapping[str, str]) -> Config:
    own = {key: value for key, value in overrides.items() if key in used_settings(config)}
    return with_overrides(config, {f"{stage}.precision": precision for stage in config.stages} | own)


COSTLY = (
    "hidden_size",
    "num_layers",
    "batch_size",
    "activation",
    "layer_norm",
    "learner",
    "target",
    "variance",
    "num_samples",
    "actor_interval",
)
"""Settings of a stage that change what a step costs; the others change numbers alone."""


@dataclasses.dataclass
class BenchedStep:
    """A stage's step to be measured, ours and the baseline's."""

    stage: str
    kind: str
    """Learner or target of the stage where it has several; else empty."""
    methods: list[str]
    size: str
    ours: Callable[[], Metrics]
    baseline: naive.Step | None
    """The baseline's step; None where there is none."""

    @property
    def name(self) -> str:
        """The stage's step, with its kind."""
        return f"{self.stage} step" + f", {self.kind}" * bool(self.kind)


def benched_steps(configs: Mapping[str, RunConfig], data: Transitions) -> Iterator[BenchedStep]:
    """Yield every stage of these methods once, with all methods whose step costs the same."""
    users: dict[tuple[Any, ...], list[str]] = {}
    for method, config in configs.items():
        for stage in methods.stages_of(config):
            own = config.stages[stage.name]
            key = (stage, *(getattr(own, setting, None) for setting in COSTLY))
            users.setdefault(key, []).append(method)
    prepared = {method: pipeline.prepare(configs[method], data, CPU) for method in {use[0] for use in users.values()}}
    for (stage, *_), names in users.items():
        own, (states, steps) = configs[names[0]].stages[stage.name], prepared[names[0]]
        yield BenchedStep(
            stage=stage.name,
            kind=str(getattr(own, "learner", "") or getattr(own, "target", "")),
            methods=names,
            size=f"{own.num_layers} x {own.hidden_size}, batch {own.batch_size}",
            ours=steps[stage.name],
            baseline=baseline_of(stage, own, states, data),
        )


def baseline_of(stage: Stage, config: StageConfig, states: States, data: Transitions) -> naive.Step | None:
    """Return the baseline's step of a stage, None where there is none."""
    make = naive.BASELINES.get(stage)
    return make(config, states, data) if make else None


def products_of(step: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return torch's operators and operands of the matrix products that a step computes, in order."""
    products: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in PRODUCTS:
                products.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():  # type: ignore[no-untyped-call]
        step()
    return products


def floor_of(step: Callable[[], Any], *, seconds: float) -> Callable[[], None]:
    """Return what computes a step's matrix products and nothing else, each by the fastest kernel of this torch.

    Operands are copies of the step's own, in the layout that it has them in. Kernels are compared for about so many
    seconds in all.
    """
    calls: list[Callable[[], Tensor]] = []
    fastest: dict[Any, int] = {}
    for operator, operands in products_of(step):
        bias, (x, y) = None, operands[:2]
        if operator is torch.ops.aten.addmm.default:
            bias, x, y = operands[:3]
        elif operator is not torch.ops.aten.mm.default:
            bias, y = operands[2], y.t()
        x, y = _copy(x), _copy(y)
        ways: list[Callable[[], Tensor]] = [
            functools.partial(torch.mm, x, y) if bias is None else functools.partial(torch.addmm, bias, x, y)
        ]
        if kernels.has_onednn():
            onednn = torch.ops.mkldnn._linear_pointwise.default
            ways.append(functools.partial(onednn, x, y.t(), bias, "none", [], ""))
        layout = (x.shape, x.stride(), y.shape, y.stride(), bias is None)
        if layout not in fastest:
            costs = compare(*ways, seconds=seconds / 10)
            fastest[layout] = min(range(len(ways)), key=lambda i, costs=costs: costs[i].cpu_ms)  # type: ignore[misc]
        calls.append(ways[fastest[layout]])

    @torch.no_grad()
    def multiply() -> None:
        for call in calls:
            call()

    return multiply


def _copy(x: Tensor) -> Tensor:
    if x.t().is_contiguous():
        return x.detach().t().clone().t()
    return x.detach().clone(memory_format=torch.contiguous_format)


def steps(configs: Mapping[str, RunConfig], shape: Shape, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row per stage: milliseconds per step, ours at the stage's precision and the baseline's in float32."""
    data = shape.data()
    for work in benched_steps(configs, data):
        work.ours()  # what comes before the first step
        floor = floor_of(work.ours, seconds=seconds / 5)
        ours, least, *others = compare(work.ours, floor, *filter(None, [work.baseline]), seconds=seconds)
        baseline = others[0] if others else None
        row = _row(work.name, shape, ours, baseline)
        yield row | {
            "size": work.size,
            "methods": " ".join(work.methods),
            "floor_cpu_ms": least.cpu_ms,
            "of_floor": ours.cpu_ms / least.cpu_ms,
        }


def sampling(config: RunConfig, shape: Shape, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row per number of states: milliseconds per call that returns one guided action for each."""
    data = shape.data()
    policy = Policy.from_state(config, pipeline.start(config, data, CPU), data)
    guided = policy.sampler
    assert isinstance(guided, GuidedSampler)
    generator = torch.Generator().manual_seed(0)
    for num in NUM_STATES:
        states_BS = torch.randn(num, data.state_dim, generator=generator)
        ours, baseline = compare(
            lambda states_BS=states_BS: policy.act(states_BS, generator),  # type: ignore[misc]
            naive.Sampler(guided, states_BS),
            seconds=seconds,
        )
        work = f"guided actions of {num} state{'s' if num > 1 else ''}"
        yield _row(work, shape, ours, baseline) | {"size": f"{guided.sampling.num_steps} solver steps"}


@contextlib.contextmanager
def _library(folder: Path) -> Iterator[None]:
    """Let data sets and their cache lie in a folder of their own."""
    (folder / "minari").mkdir()
    before = os.environ.copy()
    os.environ |= {"MINARI_DATASETS_PATH": str(folder / "minari"), "AEPO_CACHE": str(folder / "cache")}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def loading(folder: Path, budget: str, *, seconds: float) -> dict[str, Any]:
    """Return a row for loading a data set that was decoded before; it lies in `folder`, which is empty."""
    with _library(folder):
        task = tasks.find("maze2d-open", "collected")
        pointmaze.collect(task, num_steps=NUM_COLLECTED, seed=0, num_reference_episodes=1)
        config = preset(f"best-{budget}", task, 0)
        ours, baseline = compare(lambda: run.load_data(config), lambda: naive.load(task.dataset), seconds=seconds)
        return _row(f"loading {NUM_COLLECTED:,} transitions, once decoded", None, ours, baseline)


def evaluation(folder: Path, budget: str, task: Task, *, seconds: float) -> dict[str, Any]:
    """Return a row for a step of a task's environment, all entries of its observations joined.

    Ours steps episodes at once, the baseline one by one.

    A data set that names the environment is written into `folder`, which is empty.

    Raises:
        ResourceError: if the environment cannot be made here.
    """
    with _library(folder):
        dataset_id = _name_environment(task)
        evaluator = Evaluator(dataset_id, horizon=HORIZON)
        dims = evaluator.observation_width(seed=0), len(action_bounds(open_dataset(dataset_id))[0])
        shape = Shape(state_dim=dims[0], action_dim=dims[1], task=task, num_transitions=10)
        config, data = preset(f"best-{budget}", task, 0), shape.data()
        policy = Policy.from_state(config, pipeline.start(config, data, CPU), data)

        def at_once() -> None:
            evaluator.run(policy, num_episodes=NUM_EPISODES, seed=0)

        def one_by_one() -> None:
            for seed in range(NUM_EPISODES):
                evaluator.run(policy, num_episodes=1, seed=seed)

        costs = compare(at_once, one_by_one, seconds=seconds)
        evaluator.close()
        num_steps = NUM_EPISODES * HORIZON
        each = [Cost(cost.wall_ms / num_steps, cost.cpu_ms / num_steps) for cost in costs]
        return _row(f"evaluation, a step in {task.env_id}", shape, *each) | {"size": f"{NUM_EPISODES} episodes"}


def _name_environment(task: Task) -> str:
    """Write a data set of one step in a task's environment and return its id."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    register_robotics()
    with own_temporary_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions and habits of environments that tasks name on purpose
        env = gymnasium.wrappers.FlattenObservation(gymnasium.make(task.env_id))
        first, _ = env.reset(seed=0)
        action = env.action_space.sample()
        second, reward, *_ = env.step(action)
    episode = EpisodeBuffer(
        observations=np.stack([first, second]),
        actions=action[None],
        rewards=np.array([reward]),
        terminations=np.array([False]),
        truncations=np.array([True]),
    )
    facts = {"algorithm_name": "one action", "author": "aepo bench", "description": "names an environment"}
    specs = {"env": env, "eval_env": env.spec}
    staging.write_episodes([episode], advance=lambda _: None, dataset_id=BENCH_DATASET, **specs, **facts)
    env.close()
    return BENCH_DATASET


def _row(work: str, shape: Shape | None, ours: Cost, baseline: Cost | None) -> dict[str, Any]:
    return {
        "work": work,
        "shape": str(shape or ""),
        "size": "",
        "methods": "",
        "cpu_ms": ours.cpu_ms,
        "wall_ms": ours.wall_ms,
        "baseline_cpu_ms": baseline.cpu_ms if baseline else None,
        "baseline_wall_ms": baseline.wall_ms if baseline else None,
        "ratio": baseline.cpu_ms / ours.cpu_ms if baseline else None,
        "floor_cpu_ms": None,
        "of_floor": None,
    }


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each work of several shapes, the median and the worst of its ratios, and of those to its floor."""
    by_work: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_work.setdefault(row["work"], []).append(row)
    found = []
    for work, own in by_work.items():
        ratios, floors = ([row[key] for row in own if row[key] is not None] for key in ("ratio", "of_floor"))
        slowest = min((row for row in own if row["ratio"] is not None), key=lambda row: row["ratio"], default=None)
        found.append(
            {
                "work": work,
                "shapes": len(own),
                "ratio": statistics.median(ratios) if ratios else None,
                "lowest_ratio": min(ratios, default=None),
                "of_shape": slowest["shape"] if slowest else "",
                "of_floor": statistics.median(floors) if floors else None,
                "highest_of_floor": max(floors, default=None),
            }
        )
    return found


def backend_gains(seconds: float) -> Iterator[tuple[str, float]]:
    """Yield each stage and shape with how many times as fast whole steps are by oneDNN as by torch's own layers.

    Four shapes of the benchmark, stages of the quick budget.

    Raises:
        ResourceError: if this torch has no oneDNN.
    """
    if not kernels.has_onednn():
        raise ResourceError("this torch was built without oneDNN: there is nothing to choose")
    rows = [tasks.find(name) for name in ("maze2d-umaze-v1", "hopper-medium-v2", "antmaze-umaze-v2", "pen-human-v1")]
    for shape in shapes_of(rows, most=20_000):
        for work in benched_steps(configs_of("quick", shape.task), shape.data()):

            def by(backend: kernels.Backend, step: Callable[[], Any] = work.ours) -> None:
                with kernels.using(backend):
                    step()

            plain, onednn = compare(lambda by=by: by("torch"), lambda by=by: by("onednn"), seconds=seconds)  # type: ignore[misc]
            yield f"{work.name}, {shape}", plain.cpu_ms / onednn.cpu_ms


def linear_rates(*, seconds: float = 0.2) -> dict[str, float]:
    """Return the GFLOP/s of this process in a linear layer of 256 rows and units: `plain` is PyTorch's own in float32,
    the others ours by precision.
    """
    layer, x_BI = nn.Linear(256, 256), torch.randn(256, 256)
    calls: dict[str, Callable[..., Tensor]] = {"plain": F.linear} | dict.fromkeys(("float32", "bfloat16"), linear)
    rates = {}
    with torch.no_grad():
        for name, call in calls.items():
            with matmul_precision("float32" if name == "plain" else name):  # type: ignore[arg-type]
                multiply = functools.partial(call, x_BI, layer.weight, layer.bias)
                multiply()
                rates[name] = 2e-6 * 256**3 / min(_block(multiply, seconds / 6).wall_ms for _ in range(2))
    return rates


def concurrent_rate(num_processes: int, config: RunConfig, shape: Shape, *, seconds: float) -> float:
    """Return the critic steps per second of so many processes at once, in all, each on one thread as trials are."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_processes)
    with context.Pool(num_processes, initializer=_join, initargs=(barrier,)) as pool:
        rates = pool.starmap(_rate, [(config, shape, seconds)] * num_processes, chunksize=1)
    return float(np.sum(rates))


_barrier: Barrier


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier
    run.set_up_torch(1)


def _rate(config: RunConfig, shape: Shape, seconds: float) -> float:
    _, ours = pipeline.prepare(config, shape.data(), CPU)
    ours["critic"]()
    _barrier.wait()
    return 1e3 / _block(ours["critic"], seconds).wall_ms
