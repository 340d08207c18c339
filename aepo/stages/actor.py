"""IQL's policy, trained after its critic: a Gaussian that clones the data's actions by how good they are.

max_pi E min(exp(beta (min_i Q'_i(s, a) - V(s))), 100) log pi(a|s)     (arXiv 2110.06169)
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import ActorConfig
from aepo.data.transitions import Pairs, Transitions
from aepo.networks import GaussianActor
from aepo.parallel import share
from aepo.stages import Stage, States, Step
from aepo.stages.critic import OfRows, advantage_of_rows
from aepo.stages.optim import Adam, Metrics

MAX_WEIGHT = 100.0


@dataclasses.dataclass
class ActorState:
    """Everything of the stage that a checkpoint holds."""

    net: GaussianActor
    optimizer: Adam
    generator: torch.Generator
    step: int = 0


def start(config: ActorConfig, data: Transitions, generator: torch.Generator) -> ActorState:
    """Return the stage before its first step; weights are drawn from torch's global generator."""
    net = GaussianActor(data.state_dim, data.action_dim, config).to(generator.device)
    return ActorState(net, Adam(net.parameters(), lr=config.learning_rate, num_steps=config.steps), generator)


@torch.no_grad()
def gradients(
    state: ActorState, config: ActorConfig, batch: Pairs, advantage_B: Tensor
) -> tuple[list[Tensor], Metrics]:
    """Return those of the weighted negative log-likelihood of the data's actions, and metrics."""
    weight_B = (config.inverse_temperature * advantage_B).exp().clamp(max=MAX_WEIGHT)
    log_prob, pull = state.net.log_prob(batch.states_BS, batch.actions_BA)
    return pull(-weight_B / len(weight_B)), lambda: {
        "loss": -(weight_B * log_prob()).mean(),
        "weight": weight_B.mean(),
        "clamped_share": (weight_B == MAX_WEIGHT).float().mean(),
    }


def train_step(state: ActorState, config: ActorConfig, data: Transitions, of_rows: OfRows) -> Metrics:
    """Take one gradient step and return its metrics; `of_rows` gives min_i Q'_i - V."""
    index_B = share(data.draw_rows(config.batch_size, state.generator))
    found, metrics = gradients(state, config, data.take_pairs(index_B), of_rows(index_B))
    state.optimizer.step_along(found)
    state.step += 1
    return metrics


def make_step(config: ActorConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of the stage."""
    judge, num_draws = states["critic"], config.steps * config.batch_size
    of_rows = advantage_of_rows(judge.target.net, judge, data, num_draws=num_draws)
    return lambda: train_step(states["actor"], config, data, of_rows)


STAGE = Stage(name="actor", start=start, step=make_step, learns_from=lambda _: ("critic",))
