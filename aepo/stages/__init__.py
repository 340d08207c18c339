"""Stages: one file each, with the paper's loss, its state and its step; a method is a tuple of them (aepo/methods)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from aepo.data.transitions import Transitions
from aepo.stages.optim import Metrics


class StageState(Protocol):
    """The state of one stage: a dataclass of networks, optimizers, tensors, generators and numbers."""

    step: int
    """Gradient steps taken."""


States = dict[str, Any]
"""Stage name -> its StageState: everything that training changes in a run."""
Step = Callable[[], Metrics]
"""Takes one gradient step, or none where it only measures, and returns its metrics."""


def _nothing(_: Any) -> tuple[str, ...]:
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a method. `config` below is the stage's own part of a run's config."""

    name: str
    """The field of the run's config, the key of its state, the first part of its metrics' names."""
    start: Callable[[Any, Transitions, torch.Generator], StageState]
    """(config, data, generator) -> the state before the first step; weights come from torch's global generator."""
    step: Callable[[Any, States, Transitions], Step]
    """(config, states of all stages, data) -> the function that takes one step."""
    prepare: Callable[[Any, States, Transitions], None] | None = None
    """(config, states, data): measures what the stage takes from the others, before its first step of each round."""
    check: Callable[[Any, States, Transitions], Step] | None = None
    """(config, states, held-out data) -> the function that measures the stage there, by draws of its own."""
    learns_from: Callable[[Any], tuple[str, ...]] = _nothing
    """config -> the stages whose networks it asks; what is stored of a stage depends on theirs."""
    acts: bool = False
    """Whether there is a policy along this stage that is worth a learning curve; there always is along the last."""
