"""IDQL (arXiv 2304.10573): the value of the data's actions by IQL, and the best of N actions of a cloned policy.

V:    min E |tau - 1(u < 0)| u^2,   u = min_i Q'_i(s, a) - V(s)                                [M6]
Q_i:  min E (r + gamma (1 - terminal) V(s') - Q_i(s, a))^2                                     [M7]
mu:   min E |eps_phi(a_t, s, t) - eps|^2 / alpha_t^2,   a diffusion model of the data's actions  [M5]
pi:   a = argmax_k min_i Q'_i(s, a_k) over a_1 .. a_N ~ mu(.|s)

Both stages are AEPO's (aepo/stages/behavior.py, critic.py), so that a store of stages serves both methods. The paper's
policy draws a_k with weight |tau - 1(Q'(s, a_k) < V(s))|, the one of which V is the value. Its offline scores are those
of the argmax, which is what is here. With N = 1 it is the clone, which every run is evaluated by as well.

Kept apart from the authors' code (github.com/philippe-eecs/IDQL): noise in continuous time over alpha_t^2 in place of 5
times of equal weight, another schedule and DPM-Solver++ in place of DDPM's steps, our noise network in place of a
residual one with dropout. V and Q step together, so that Q backs up over V before its step, not behind it; their rate
falls by a cosine. States are standardised, a layer of the critics is normalised before its activation, batches, steps
and averages are the budget's. N is 64 everywhere, the paper's is 16, 64 or 256, by score.
tests/golden/parity/README.md says what agrees with that code to how many digits.
"""

import dataclasses
from typing import TYPE_CHECKING

from aepo.budgets import Budget, common
from aepo.config import BehaviorConfig, CriticConfig, RunConfig, SamplingConfig, check_unguided
from aepo.errors import ConfigError
from aepo.methods import Method
from aepo.tasks import Task

if TYPE_CHECKING:
    from aepo.samplers import CloneSampler
    from aepo.stages import Stage

NUM_CANDIDATES = 64
"""N of the authors' launcher."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IDQLConfig(RunConfig):
    """A diffusion behaviour policy and a critic; `sampling` says how many actions the critic chooses from."""

    behavior: BehaviorConfig
    critic: CriticConfig
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        check_unguided(self.sampling)
        if self.sampling.num_candidates < 2:
            raise ConfigError(
                "sampling.num_candidates must be at least 2: every run is evaluated with 1 (diffusion-bc) as well"
            )


def preset(task: Task, seed: int, budget: Budget) -> IDQLConfig:
    """Return IDQL's config: AEPO's first two stages; the steps of the third are not taken."""
    return IDQLConfig(
        method="idql",
        behavior=budget.behavior,
        critic=dataclasses.replace(budget.critic, discount=task.discount),
        sampling=SamplingConfig(guidance_scale=0.0, num_steps=budget.num_sampling_steps, num_candidates=NUM_CANDIDATES),
        **common(task, seed, budget),
    )


def stages() -> "tuple[Stage, ...]":
    """Return stages 1 and 2."""
    from aepo.stages import behavior, critic

    return behavior.STAGE, critic.STAGE


def sampler(config: IDQLConfig, state_dim: int, action_dim: int) -> "CloneSampler":
    """Return the untrained networks of the clone and of the target critics, which choose."""
    from aepo.samplers import CloneSampler

    return CloneSampler(
        (config.behavior, config.critic),
        config.sampling,
        critics=lambda states: states["critic"].target.net,
        state_dim=state_dim,
        action_dim=action_dim,
    )


IDQL = Method(name="idql", config=IDQLConfig, preset=preset, stages=stages, sampler=sampler)
