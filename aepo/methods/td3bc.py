"""TD3+BC (arXiv 2106.06860): one actor and two critics that learn together, the actor held near the data.

The losses are in aepo/stages/actor_critic.py.
"""

import dataclasses
from typing import TYPE_CHECKING

from aepo.budgets import Budget, common, joint
from aepo.config import ActorCriticConfig, RunConfig
from aepo.methods import Method
from aepo.tasks import Task

if TYPE_CHECKING:
    from aepo.samplers import ActorSampler
    from aepo.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TD3BCConfig(RunConfig):
    """Actor and critics in one stage."""

    actor_critic: ActorCriticConfig


def preset(task: Task, seed: int, budget: Budget) -> TD3BCConfig:
    """Return TD3+BC's config; its one stage takes the steps of all stages of the others."""
    return TD3BCConfig(
        method="td3bc", actor_critic=ActorCriticConfig(**joint(task, budget)), **common(task, seed, budget)
    )


def stages() -> "tuple[Stage, ...]":
    """Return the one stage."""
    from aepo.stages import actor_critic

    return (actor_critic.STAGE,)


def sampler(config: TD3BCConfig, state_dim: int, action_dim: int) -> "ActorSampler":
    """Return the untrained actor."""
    from aepo.networks import Actor
    from aepo.samplers import ActorSampler

    net = Actor(state_dim, action_dim, config.actor_critic)
    return ActorSampler(net, lambda states: states["actor_critic"].actor)


TD3BC = Method(name="td3bc", config=TD3BCConfig, preset=preset, stages=stages, sampler=sampler)
