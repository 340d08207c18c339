"""AEPO (arXiv 2505.01822): pi*(a|s) ∝ mu(a|s) exp(beta Q(s, a)), sampled by diffusion with a closed-form energy [M1].

Three stages: the behaviour policy mu [M5], Q [M6, M7], and the energy that guides mu towards good actions [M11, M12];
the losses are in aepo/stages/behavior.py, critic.py and energy.py. An action is then drawn along
m_t + w sigma_t^2 / alpha_t grad E_t [M4, M13] (aepo/samplers.py).
"""

import dataclasses
from typing import TYPE_CHECKING

from aepo.budgets import Budget, common
from aepo.config import (
    BehaviorConfig,
    CriticConfig,
    EnergyConfig,
    RunConfig,
    SamplingConfig,
    check_beta,
)
from aepo.errors import ConfigError
from aepo.methods import Method
from aepo.tasks import Task

if TYPE_CHECKING:
    from aepo.samplers import GuidedSampler
    from aepo.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuidedConfig(RunConfig):
    """AEPO and QGPO: a diffusion behaviour policy, a critic, an energy that guides."""

    behavior: BehaviorConfig
    critic: CriticConfig
    energy: EnergyConfig
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for beta in (self.sampling.beta, *self.evaluation.grid_beta):
            check_beta(self.energy, beta)
        if "curvature" in self.energy.facts.asks and self.critic.activation == "relu":
            raise ConfigError(
                f"energy.target {self.energy.target} needs critic.activation silu: Q of relu layers has no second "
                "derivative"
            )
        chosen, count = self.evaluation.select_episodes, len(self.evaluation.choices(self.sampling))
        if 0 < chosen < count:
            raise ConfigError(
                f"evaluation.select_episodes must be at least {count}, an episode for each setting to choose from, "
                f"got {chosen}"
            )
        if self.sampling.guidance_scale == 0:
            raise ConfigError("sampling.guidance_scale must be > 0: every run is evaluated at 0 (diffusion-bc) as well")


def best(task: Task, seed: int, budget: Budget, *, method: str = "aepo") -> GuidedConfig:
    """AEPO with the energy target and the settings that measured best on the suite (docs/results)."""
    return GuidedConfig(
        method=method,
        behavior=budget.behavior,
        critic=dataclasses.replace(budget.critic, discount=task.discount),
        energy=budget.energy,
        sampling=SamplingConfig(num_steps=budget.num_sampling_steps),
        **common(task, seed, budget),
    )


def analytic(task: Task, seed: int, budget: Budget) -> GuidedConfig:
    """The paper's AEPO: the closed form under a Gaussian posterior [M11]."""
    return best(task, seed, budget, method="aepo-analytic")


def stages() -> "tuple[Stage, ...]":
    """Return stages 1 to 3."""
    from aepo.stages import behavior, critic, energy

    return behavior.STAGE, critic.STAGE, energy.STAGE


def sampler(config: GuidedConfig, state_dim: int, action_dim: int) -> "GuidedSampler":
    """Return the untrained networks of guided sampling."""
    from aepo.samplers import GuidedSampler

    trained = config.behavior, config.critic, config.energy
    return GuidedSampler(trained, config.sampling, state_dim=state_dim, action_dim=action_dim)


AEPO = Method(name="aepo", config=GuidedConfig, preset=best, stages=stages, sampler=sampler)
ANALYTIC = dataclasses.replace(AEPO, name="aepo-analytic", preset=analytic)
