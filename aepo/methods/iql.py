"""IQL (arXiv 2110.06169): expectile regression of V, then a Gaussian that clones the data's good actions.

The losses are in aepo/stages/critic.py [M6, M7] and aepo/stages/actor.py; the Gaussian's mean acts.
"""

import dataclasses
from typing import TYPE_CHECKING

from aepo.budgets import Budget, common
from aepo.config import ActorConfig, CriticConfig, RunConfig
from aepo.errors import ConfigError
from aepo.methods import Method
from aepo.tasks import Task

if TYPE_CHECKING:
    from aepo.samplers import ActorSampler
    from aepo.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IQLConfig(RunConfig):
    """A critic, and a policy that clones what the critic finds good."""

    critic: CriticConfig
    actor: ActorConfig

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        if self.critic.learner != "expectile":
            raise ConfigError("iql wants critic.learner expectile: softmax_in_support needs stage 1's actions")


def preset(task: Task, seed: int, budget: Budget) -> IQLConfig:
    """Return IQL's config; the steps that others spend on diffusion and energy are its actor's."""
    critic = dataclasses.replace(budget.critic, discount=task.discount)
    actor = ActorConfig(
        steps=budget.behavior.steps + budget.energy.steps,
        batch_size=critic.batch_size,
        hidden_size=critic.hidden_size,
        num_layers=critic.num_layers,
        learning_rate=critic.learning_rate,
    )
    return IQLConfig(method="iql", critic=critic, actor=actor, **common(task, seed, budget))


def stages() -> "tuple[Stage, ...]":
    """Return the critic and, after it, the actor."""
    from aepo.stages import actor, critic

    return critic.STAGE, actor.STAGE


def sampler(config: IQLConfig, state_dim: int, action_dim: int) -> "ActorSampler":
    """Return the untrained Gaussian, whose mean acts."""
    from aepo.networks import GaussianActor
    from aepo.samplers import ActorSampler

    return ActorSampler(GaussianActor(state_dim, action_dim, config.actor), lambda states: states["actor"].net)


IQL = Method(name="iql", config=IQLConfig, preset=preset, stages=stages, sampler=sampler)
