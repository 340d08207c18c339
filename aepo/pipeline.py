"""The stages of a method as one generator of Progress: the seam that every driver uses (plain, Ray, tests).

It knows neither files nor schedulers. A driver iterates, stores `states` when it wants to, and stops when it
likes; `train(..., resume=saved)` continues bit for bit on the same kind of CPU.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from aepo import checkpoint, methods, parallel
from aepo.config import RunConfig
from aepo.data.transitions import Transitions
from aepo.errors import ConfigError, TrainingError
from aepo.kernels import matmul_precision
from aepo.stages import Stage, States, Step
from aepo.stages.optim import Metrics

STREAMS = {"behavior": 0, "critic": 1, "energy": 2, "actor": 3, "actor_critic": 4}
"""The random streams of the first five stages, by number. Closed: a later stage draws its stream from its name."""
HEARTBEAT = 50
"""Steps between two Progress at most; a driver can store the state at each."""
NUM_LOGS = 200
"""Logs of a stage: so many of its Progress have metrics."""
NUM_CHECKS = 20
"""Logs of a stage that also hold what is measured on held-out episodes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands after a step."""

    stage: str
    step: int
    """Gradient steps taken in this stage."""
    num_steps: int
    """Gradient steps of this stage in all."""
    round: int
    """The number of the config's round, from 0."""
    ends_stage: bool
    """Whether this is the stage's last step in the round."""
    metrics: dict[str, float]
    """`behavior/loss` and the like at this step; empty between logs."""
    states: States
    """The live states of all stages: store them before the generator goes on."""


def start(config: RunConfig, data: Transitions, device: torch.device) -> States:
    """Return the states of all stages before the first step, wholly determined by the seed."""
    return prepare(config, data, device)[0]


def train(
    config: RunConfig, data: Transitions, *, device: torch.device, resume: dict[str, Any] | None = None
) -> Iterator[Progress]:
    """Yield Progress from the first step, or from the one that `resume` holds, to the last of the last stage.

    Args:
        config: the run.
        data: transitions on `device`.
        device: where to train.
        resume: what `checkpoint.collect` made of the states of a run of the same config.

    Raises:
        CheckpointError: if `resume` is not of this config.
        TrainingError: at the first log where a metric is not finite.
    """
    states, train_steps = prepare(config, data, device)
    checks = _checks(config, states, data)
    if resume is not None:
        checkpoint.restore(states, resume)
    for number in range(len(config.rounds)):
        for name, train_step in train_steps.items():
            check = checks.get(name)
            yield from _stage(config, name, number, train_step, states, check)


def prepare(config: RunConfig, data: Transitions, device: torch.device) -> tuple[States, dict[str, Step]]:
    """Return the states before the first step, wholly determined by the seed, and, in order, each stage's step.

    Raises:
        ConfigError: if the config is of another method's class.
    """
    method, states = methods.find(config.method), States()
    if type(config) is not method.config:
        raise ConfigError(
            f"a {type(config).__name__} has not the stages of {method.name}: wanted a {method.config.__name__}"
        )
    stages = methods.stages_of(config)
    for stage in stages:
        number = stream_seed(stage.name, config.seed)
        torch.manual_seed(number)  # weights
        generator = torch.Generator(device).manual_seed(number)  # batches and noise
        states[stage.name] = stage.start(config.stages[stage.name], data, generator)
    return states, {stage.name: _whole_step(stage, config, states, data) for stage in stages}


def stream_seed(stage: str, seed: int) -> int:
    """Return the number that seeds a stage's weights, batches and noise, in [0, 2^63).

    It depends on the stage's name and the run's seed alone, so that no other stage, old or new, changes it.
    """
    if stage in STREAMS:
        return seed * len(STREAMS) + STREAMS[stage]
    return int.from_bytes(hashlib.sha256(f"{stage}/{seed}".encode()).digest()[:8]) >> 1


def _whole_step(stage: Stage, config: RunConfig, states: States, data: Transitions) -> Step:
    """Return a stage's step at its precision, after what it prepares before the first one of each round."""
    own, begins = config.stages[stage.name], {0, *config.round_ends(stage.name)}
    step = stage.step(own, states, data)

    def train_step() -> Metrics:
        with matmul_precision(own.precision):
            if stage.prepare is not None and states[stage.name].step in begins:
                stage.prepare(own, states, data)
            return step()

    return train_step


def _checks(config: RunConfig, states: States, data: Transitions) -> dict[str, Step]:
    """Return what measures stages on held-out episodes, of those that can be; nothing where none are held out."""
    if data.held_out is None:
        return {}
    return {
        stage.name: stage.check(config.stages[stage.name], states, data.held_out)
        for stage in methods.stages_of(config)
        if stage.check is not None
    }


def _stage(
    config: RunConfig, name: str, number: int, train_step: Step, states: States, check: Step | None
) -> Iterator[Progress]:
    """Take a stage's steps of one round."""
    stage, num_steps, end = states[name], config.stages[name].steps, config.round_ends(name)[number]
    log_interval = max(1, num_steps // NUM_LOGS)
    check_interval = log_interval * (NUM_LOGS // NUM_CHECKS)
    while stage.step < end:
        said = train_step()
        log = stage.step % log_interval == 0 or stage.step == end
        if not log and stage.step % HEARTBEAT:
            continue
        metrics = {f"{name}/{key}": float(parallel.mean(tensor)) for key, tensor in said().items()} if log else {}
        if check is not None and log and (stage.step % check_interval == 0 or stage.step == end):
            with torch.no_grad():
                metrics |= {f"{name}/{key}": float(parallel.mean(tensor)) for key, tensor in check()().items()}
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
            states=states,
        )
