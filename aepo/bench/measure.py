"""What a step, an action and a second core cost here, beside the same work as research code writes it."""

import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aepo import pipeline, run, tasks
from aepo.bench import naive
from aepo.config import Config, GuidedConfig, IQLConfig, Precision, settings, with_overrides
from aepo.data import pointmaze
from aepo.data.transitions import Spaces, Transitions
from aepo.errors import ConfigError
from aepo.evaluate import Evaluator
from aepo.networks import linear, multiplying
from aepo.pipeline import GuidedState, IQLState
from aepo.policy import GuidedPolicy, Policy
from aepo.presets import preset

STATE_DIM, ACTION_DIM = 11, 3
"""Hopper's."""
NUM_STATES = (1, 10, 50)
"""At once, of which actions are sampled."""
BLOCKS = 5
"""Ours and the baseline are timed by turns, so many times; the quickest block of each counts."""
NUM_COLLECTED = 20_000
"""Transitions of the data set that is loaded."""
NUM_EPISODES, HORIZON = 20, 100
"""Of an evaluation."""
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Milliseconds of one call."""

    wall_ms: float
    cpu_ms: float


def random_data(num: int) -> Transitions:
    """Return `num` transitions of normal numbers with Hopper's dimensions, an episode each 1,000."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num + 1, STATE_DIM, generator=generator)
    actions = 2 * torch.rand(num, ACTION_DIM, generator=generator) - 1
    rewards, terminals = torch.randn(num, 1, generator=generator), torch.zeros(num, 1)
    rows_ND = torch.cat([states[:-1], actions, rewards, terminals, states[1:]], dim=1)
    return Transitions(
        rows_ND=rows_ND,
        shift_D=torch.zeros(rows_ND.shape[1]),
        scale_D=torch.ones(rows_ND.shape[1]),
        spaces=Spaces(
            state_mean_S=torch.zeros(STATE_DIM),
            state_scale_S=torch.ones(STATE_DIM),
            action_low_A=-torch.ones(ACTION_DIM),
            action_high_A=torch.ones(ACTION_DIM),
        ),
        digest="random",
        episode_ends_E=torch.tensor([*range(1000, num, 1000), num]),
    )


def compare(ours: Callable[[], Any], baseline: Callable[[], Any], *, seconds: float) -> tuple[Cost, Cost]:
    """Return the cost of a call of each, timed by turns for about so many seconds in all."""
    found: list[list[Cost]] = [[], []]
    for call in (ours, baseline):
        call()  # what only the first one does
    for _ in range(BLOCKS):
        for costs, call in zip(found, (ours, baseline), strict=True):
            costs.append(_block(call, seconds / BLOCKS / 2))
    best = [min(costs, key=lambda cost: cost.cpu_ms) for costs in found]
    return best[0], best[1]


def _block(call: Callable[[], Any], seconds: float) -> Cost:
    wall, cpu, num = time.perf_counter(), time.process_time(), 0
    while num < 2 or time.perf_counter() - wall < seconds:
        call()
        num += 1
    return Cost((time.perf_counter() - wall) * 1e3 / num, (time.process_time() - cpu) * 1e3 / num)


def configs_of(
    budget: str, precision: Precision = "float32", overrides: Mapping[str, str] | None = None
) -> tuple[GuidedConfig, IQLConfig]:
    """Return the two methods that are measured, at a preset's sizes; `overrides` go to those that have them.

    Raises:
        ConfigError: for a setting of which nothing here depends, or a bad value.
    """
    task, overrides = tasks.for_dataset("bench"), overrides or {}
    aepo, iql = preset(f"best-{budget}", task, 0), preset(f"iql-{budget}", task, 0)
    assert isinstance(aepo, GuidedConfig)
    assert isinstance(iql, IQLConfig)
    measured = {*aepo.stages, *iql.stages, "sampling"}
    known = {key for key in (*settings(aepo), *settings(iql)) if key.partition(".")[0] in measured}
    if unknown := sorted(overrides.keys() - known):
        near = get_close_matches(unknown[0], known, n=3) or sorted(measured)
        raise ConfigError(f"aepo bench measures nothing of {unknown[0]!r}; did you mean {' or '.join(near)}?")
    aepo = with_overrides(aepo, {"critic.backup_steps": 1})
    return _changed(aepo, precision, overrides), _changed(iql, precision, overrides)


def _changed(config: Config, precision: Precision, overrides: Mapping[str, str]) -> Config:
    own = {key: value for key, value in overrides.items() if key in settings(config)}
    return with_overrides(config, {f"{stage}.precision": precision for stage in config.stages} | own)


def steps(aepo: GuidedConfig, iql: IQLConfig, data: Transitions, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row per stage: milliseconds per step, ours at the stage's precision and the baseline's in float32."""
    state, ours = pipeline.prepare(aepo, data, CPU)
    iql_state, iql_ours = pipeline.prepare(iql, data, CPU)
    assert isinstance(state, GuidedState)
    assert isinstance(iql_state, IQLState)
    target = aepo.energy.target
    pairs = [
        ("behaviour step", aepo.behavior, ours["behavior"], naive.behavior_step(aepo.behavior, data)),
        ("critic step", aepo.critic, ours["critic"], naive.critic_step(aepo.critic, data)),
        (
            f"energy step, {target}",
            aepo.energy,
            ours["energy"],
            naive.energy_step(aepo.energy, state, data),
        ),
        ("IQL's actor step", iql.actor, iql_ours["actor"], naive.actor_step(iql, iql_state, data)),
    ]
    for name, stage, call, baseline in pairs:
        size = f"{stage.num_layers} x {stage.hidden_size}, batch {stage.batch_size}"
        yield {"work": f"{name} ({size})", **_row(*compare(call, baseline, seconds=seconds))}


def sampling(aepo: GuidedConfig, data: Transitions, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row per number of states: milliseconds per call that returns one guided action for each."""
    policy = Policy.from_state(aepo, pipeline.start(aepo, data, CPU), data.spaces)
    assert isinstance(policy, GuidedPolicy)
    generator = torch.Generator().manual_seed(0)
    for num in NUM_STATES:
        states_BS = torch.randn(num, data.state_dim, generator=generator)
        ours, baseline = compare(
            lambda states_BS=states_BS: policy.act(states_BS, generator),  # type: ignore[misc]
            naive.Sampler(policy, states_BS),
            seconds=seconds,
        )
        name = f"guided actions of {num} state{'s' if num > 1 else ''} ({aepo.sampling.num_steps} solver steps)"
        yield {"work": name, **_row(ours, baseline)}


def with_data(folder: Path, budget: str, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for loading a data set and one for a step of its environment; the data lie in `folder`."""
    (folder / "minari").mkdir()
    before = os.environ.copy()
    os.environ |= {"MINARI_DATASETS_PATH": str(folder / "minari"), "AEPO_CACHE": str(folder / "cache")}
    try:
        yield from _with_maze(budget, seconds)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _with_maze(budget: str, seconds: float) -> Iterator[dict[str, Any]]:
    task = tasks.find("maze2d-open", "collected")
    pointmaze.collect(task, num_steps=NUM_COLLECTED, seed=0, num_reference_episodes=1)
    config = preset(f"best-{budget}", task, 0)
    assert isinstance(config, GuidedConfig)
    config = with_overrides(config, {"evaluation.horizon": HORIZON})
    ours, baseline = compare(lambda: run.load_data(config), lambda: naive.load(task.dataset), seconds=seconds)
    yield {"work": f"loading {NUM_COLLECTED:,} transitions, once decoded", **_row(ours, baseline)}
    data = run.load_data(config)
    policy = Policy.from_state(config, pipeline.start(config, data, CPU), data.spaces)
    evaluator = Evaluator.of(config)

    def at_once() -> None:
        evaluator.run(policy, num_episodes=NUM_EPISODES, seed=0)

    def one_by_one() -> None:
        for seed in range(NUM_EPISODES):
            evaluator.run(policy, num_episodes=1, seed=seed)

    costs = compare(at_once, one_by_one, seconds=seconds)
    evaluator.close()
    num_steps = NUM_EPISODES * HORIZON
    each = [Cost(cost.wall_ms / num_steps, cost.cpu_ms / num_steps) for cost in costs]
    yield {"work": f"evaluation, a step of one of {NUM_EPISODES} episodes", **_row(*each)}


def _row(ours: Cost, baseline: Cost) -> dict[str, Any]:
    return {
        "cpu_ms": ours.cpu_ms,
        "wall_ms": ours.wall_ms,
        "baseline_cpu_ms": baseline.cpu_ms,
        "baseline_wall_ms": baseline.wall_ms,
        "ratio": baseline.cpu_ms / ours.cpu_ms,
    }


def linear_rates(*, seconds: float = 0.2) -> dict[str, float]:
    """Return the GFLOP/s of this process in a linear layer of 256 rows and units: `plain` is PyTorch's own in float32,
    the others ours by precision.
    """
    layer, x_BI = nn.Linear(256, 256), torch.randn(256, 256)
    calls: dict[str, Callable[..., Tensor]] = {"plain": F.linear} | dict.fromkeys(("float32", "bfloat16"), linear)
    rates = {}
    with torch.no_grad():
        for name, call in calls.items():
            with multiplying("float32" if name == "plain" else name):  # type: ignore[arg-type]
                multiply = functools.partial(call, x_BI, layer.weight, layer.bias)
                multiply()
                rates[name] = 2e-6 * 256**3 / min(_block(multiply, seconds / 6).wall_ms for _ in range(2))
    return rates


def together(num_processes: int, aepo: GuidedConfig, num_data: int, *, seconds: float) -> float:
    """Return the critic steps per second of so many processes at once, in all, each on one thread as trials are."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_processes)
    with context.Pool(num_processes, initializer=_join, initargs=(barrier,)) as pool:
        rates = pool.starmap(_rate, [(aepo, num_data, seconds)] * num_processes, chunksize=1)
    return float(np.sum(rates))


_barrier: Barrier


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier
    run.set_up_torch(1)


def _rate(aepo: GuidedConfig, num_data: int, seconds: float) -> float:
    _, ours = pipeline.prepare(aepo, random_data(num_data), CPU)
    ours["critic"]()
    _barrier.wait()
    return 1e3 / _block(ours["critic"], seconds).wall_ms
