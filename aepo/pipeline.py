"""The three stages as one generator of Progress: the seam that every driver uses (plain, Ray, tests).

It knows neither files nor schedulers. A driver iterates, stores `state` when it wants to, and stops when it
likes; `train(..., resume=saved)` continues bit for bit on the same kind of CPU.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from aepo import checkpoint
from aepo.config import RunConfig
from aepo.data.transitions import Transitions
from aepo.errors import TrainingError
from aepo.stages import behavior, critic, energy

STAGES = ("behavior", "critic", "energy")
HEARTBEAT = 50
"""Steps between two Progress at most; a driver can store the state at each."""
NUM_LOGS = 200
"""Progress with metrics per stage."""


@dataclasses.dataclass
class PipelineState:
    """Everything that training changes."""

    behavior: behavior.BehaviorState
    critic: critic.CriticState
    energy: energy.EnergyState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands after a step."""

    stage: str
    step: int
    """Gradient steps taken in this stage."""
    num_steps: int
    """Gradient steps of this stage in all."""
    metrics: dict[str, float]
    """`behavior/loss` and the like at this step; empty between logs."""
    state: PipelineState
    """The live state: store it before the generator goes on."""


def start(config: RunConfig, data: Transitions, device: torch.device) -> PipelineState:
    """Return the state before the first step, wholly determined by the seed."""
    torch.manual_seed(config.seed)
    generators = [torch.Generator(device).manual_seed(config.seed * len(STAGES) + i) for i in range(len(STAGES))]
    return PipelineState(
        behavior=behavior.start(config.behavior, data, generators[0]),
        critic=critic.start(config.critic, data, generators[1]),
        energy=energy.start(config.energy, data, generators[2]),
    )


def train(
    config: RunConfig, data: Transitions, *, device: torch.device, resume: dict[str, Any] | None = None
) -> Iterator[Progress]:
    """Yield Progress from the first step, or from the one that `resume` holds, to the last of stage 3.

    Args:
        config: the run.
        data: transitions on `device`.
        device: where to train.
        resume: what `checkpoint.collect` made of a PipelineState of the same config.

    Raises:
        CheckpointError: if `resume` is not of this config.
        TrainingError: at the first log where a metric is not finite.
    """
    state = start(config, data, device)
    if resume is not None:
        checkpoint.restore(state, resume)
    value = energy.scaled_value(state.critic, state.energy)

    def behavior_step() -> dict[str, Tensor]:
        return behavior.train_step(state.behavior, config.behavior, data)

    def critic_step() -> dict[str, Tensor]:
        if state.critic.step == 0:
            critic.measure(state.critic, config.critic, data, state.behavior)
        return critic.train_step(state.critic, config.critic, data)

    def energy_step() -> dict[str, Tensor]:
        if state.energy.step == 0:
            state.energy.q_scale = critic.advantage_scale(state.critic, data)
            energy.measure(state.energy, config.energy, data, state.behavior)
        return energy.train_step(state.energy, config.energy, data, state.behavior, value)

    yield from _stage("behavior", behavior_step, state.behavior, config.behavior.steps, state)
    yield from _stage("critic", critic_step, state.critic, config.critic.steps, state)
    yield from _stage("energy", energy_step, state.energy, config.energy.steps, state)


def _stage(
    name: str,
    train_step: Callable[[], dict[str, Tensor]],
    stage: behavior.BehaviorState | critic.CriticState | energy.EnergyState,
    num_steps: int,
    state: PipelineState,
) -> Iterator[Progress]:
    log_interval = max(1, num_steps // NUM_LOGS)
    while stage.step < num_steps:
        tensors = train_step()
        log = stage.step % log_interval == 0 or stage.step == num_steps
        if not log and stage.step % HEARTBEAT:
            continue
        metrics = {f"{name}/{key}": float(tensor) for key, tensor in tensors.items()} if log else {}
        if bad := [key for key, value in metrics.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"{bad[0]} is {metrics[bad[0]]} at step {stage.step} of {num_steps}; "
                f"lower {name}.learning_rate or look for outliers in the data (aepo data show)"
            )
        yield Progress(stage=name, step=stage.step, num_steps=num_steps, metrics=metrics, state=state)
