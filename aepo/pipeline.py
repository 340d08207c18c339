"""The stages of a method as one generator of Progress: the seam that every driver uses (plain, Ray, tests).

It knows neither files nor schedulers. A driver iterates, stores `state` when it wants to, and stops when it
likes; `train(..., resume=saved)` continues bit for bit on the same kind of CPU.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aepo import checkpoint, parallel
from aepo.config import CriticConfig, GuidedConfig, IQLConfig, Precision, RunConfig, TD3BCConfig
from aepo.data.transitions import Transitions
from aepo.errors import TrainingError
from aepo.kernels import multiplying
from aepo.stages import actor, actor_critic, behavior, critic, energy
from aepo.stages.optim import Metrics

STAGES = ("behavior", "critic", "energy", "actor", "actor_critic")
"""Of all methods. A stage's random numbers depend on the seed and its place here alone."""
HEARTBEAT = 50
"""Steps between two Progress at most; a driver can store the state at each."""
NUM_LOGS = 200
"""Progress with metrics per stage."""


@dataclasses.dataclass
class GuidedState:
    """Everything that training AEPO or QGPO changes."""

    behavior: behavior.BehaviorState
    critic: critic.CriticState
    energy: energy.EnergyState


@dataclasses.dataclass
class IQLState:
    """Everything that training IQL changes."""

    critic: critic.CriticState
    actor: actor.ActorState


@dataclasses.dataclass
class TD3BCState:
    """Everything that training TD3+BC changes."""

    actor_critic: actor_critic.ActorCriticState


PipelineState = GuidedState | IQLState | TD3BCState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands after a step."""

    stage: str
    step: int
    """Gradient steps taken in this stage."""
    num_steps: int
    """Gradient steps of this stage in all."""
    round: int
    """Of the config's rounds, from 0."""
    ends_stage: bool
    """Whether this is the stage's last step in the round."""
    metrics: dict[str, float]
    """`behavior/loss` and the like at this step; empty between logs."""
    state: PipelineState
    """The live state: store it before the generator goes on."""


def start(config: RunConfig, data: Transitions, device: torch.device) -> PipelineState:
    """Return the state before the first step, wholly determined by the seed."""
    return prepare(config, data, device)[0]


def train(
    config: RunConfig, data: Transitions, *, device: torch.device, resume: dict[str, Any] | None = None
) -> Iterator[Progress]:
    """Yield Progress from the first step, or from the one that `resume` holds, to the last of the last stage.

    Args:
        config: the run.
        data: transitions on `device`.
        device: where to train.
        resume: what `checkpoint.collect` made of a PipelineState of the same config.

    Raises:
        CheckpointError: if `resume` is not of this config.
        TrainingError: at the first log where a metric is not finite.
    """
    state, train_steps = prepare(config, data, device)
    if resume is not None:
        checkpoint.restore(state, resume)
    for number in range(len(config.rounds)):
        for name, train_step in train_steps.items():
            yield from _stage(config, name, number, train_step, state)


def measure_rates(config: RunConfig, data: Transitions, *, device: torch.device, seconds: float) -> dict[str, float]:
    """Return the gradient steps per second of each stage, each measured from its start for about so many seconds.

    What a stage prepares before its first step is not counted.
    """
    _, train_steps = prepare(config, data, device)
    rates = {}
    for name, train_step in train_steps.items():
        for _ in range(2):
            metrics = train_step()
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            metrics = train_step()
            steps += 1
        float(next(iter(metrics().values())))  # what a GPU still has to do
        rates[name] = steps / (time.perf_counter() - begin)
    return rates


def prepare(
    config: RunConfig, data: Transitions, device: torch.device
) -> tuple[PipelineState, dict[str, Callable[[], Metrics]]]:
    """Return the state before the first step, wholly determined by the seed, and, in order, each stage's step."""

    def seed(stage: str) -> torch.Generator:
        place = config.seed * len(STAGES) + STAGES.index(stage)
        torch.manual_seed(place)  # weights
        return torch.Generator(device).manual_seed(place)  # batches and noise

    state, steps = _method(config, data, seed)
    return state, {name: _at_precision(config.stages[name].precision, step) for name, step in steps.items()}


def _at_precision(precision: Precision, step: Callable[[], Metrics]) -> Callable[[], Metrics]:
    def train_step() -> Metrics:
        with multiplying(precision):
            return step()

    return train_step


def _method(
    config: RunConfig, data: Transitions, seed: Callable[[str], torch.Generator]
) -> tuple[PipelineState, dict[str, Callable[[], Metrics]]]:
    if isinstance(config, GuidedConfig):
        return _guided(config, data, seed)
    if isinstance(config, IQLConfig):
        return _iql(config, data, seed)
    assert isinstance(config, TD3BCConfig)
    only = actor_critic.start(config.actor_critic, data, seed("actor_critic"))
    return TD3BCState(only), {"actor_critic": lambda: actor_critic.train_step(only, config.actor_critic, data)}


def _guided(
    config: GuidedConfig, data: Transitions, seed: Callable[[str], torch.Generator]
) -> tuple[GuidedState, dict[str, Callable[[], Metrics]]]:
    state = GuidedState(
        behavior=behavior.start(config.behavior, data, seed("behavior")),
        critic=critic.start(config.critic, data, seed("critic")),
        energy=energy.start(config.energy, data, seed("energy")),
    )
    source = energy.q_source(state.critic, state.energy, config.energy, data)
    steps = _look_ahead(config.critic, data)

    def behavior_step() -> Metrics:
        return behavior.train_step(state.behavior, config.behavior, data)

    critic_begins, energy_begins = ({0, *config.round_ends(stage)} for stage in ("critic", "energy"))

    def critic_step() -> Metrics:
        if state.critic.step in critic_begins:
            critic.measure(state.critic, config.critic, data, state.behavior)
        return critic.train_step(state.critic, config.critic, data, steps)

    def energy_step() -> Metrics:
        if state.energy.step in energy_begins:
            state.energy.q_scale = critic.advantage_scale(state.critic, data)
            energy.measure(state.energy, config.energy, data, state.behavior)
        return energy.train_step(state.energy, config.energy, data, state.behavior, source)

    return state, {"behavior": behavior_step, "critic": critic_step, "energy": energy_step}


def _iql(
    config: IQLConfig, data: Transitions, seed: Callable[[str], torch.Generator]
) -> tuple[IQLState, dict[str, Callable[[], Metrics]]]:
    state = IQLState(
        critic=critic.start(config.critic, data, seed("critic")),
        actor=actor.start(config.actor, data, seed("actor")),
    )
    steps = _look_ahead(config.critic, data)
    num_draws = config.actor.steps * config.actor.batch_size
    of_rows = critic.advantage_of_rows(state.critic.target.net, state.critic, data, num_draws=num_draws)

    def critic_step() -> Metrics:
        return critic.train_step(state.critic, config.critic, data, steps)

    def actor_step() -> Metrics:
        return actor.train_step(state.actor, config.actor, data, of_rows)

    return state, {"critic": critic_step, "actor": actor_step}


def _look_ahead(config: CriticConfig, data: Transitions) -> critic.Steps | None:
    return critic.look_ahead(data, config.backup_steps, config.discount) if config.backup_steps > 1 else None


def _stage(
    config: RunConfig, name: str, number: int, train_step: Callable[[], Metrics], state: PipelineState
) -> Iterator[Progress]:
    """Take a stage's steps of one round."""
    stage, num_steps, end = getattr(state, name), config.stages[name].steps, config.round_ends(name)[number]
    log_interval = max(1, num_steps // NUM_LOGS)
    while stage.step < end:
        said = train_step()
        log = stage.step % log_interval == 0 or stage.step == end
        if not log and stage.step % HEARTBEAT:
            continue
        metrics = {f"{name}/{key}": float(parallel.mean(tensor)) for key, tensor in said().items()} if log else {}
        if bad := [key for key, value in metrics.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"{bad[0]} is {metrics[bad[0]]} at step {stage.step} of {num_steps}; "
                f"lower {name}.learning_rate or look for outliers in the data (aepo data show)"
            )
        yield Progress(
            stage=name,
            step=stage.step,
            num_steps=num_steps,
            round=number,
            ends_stage=stage.step == end,
            metrics=metrics,
            state=state,
        )
