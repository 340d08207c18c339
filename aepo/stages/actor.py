"""IQL's policy, trained after its critic: a Gaussian fitted by advantage-weighted regression.

max_pi E min(exp(beta (min_i Q'_i(s, a) - V(s))), 100) log pi(a|s)     (arXiv 2110.06169)
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import ActorConfig
from aepo.data.transitions import Pairs, Transitions
from aepo.networks import GaussianActor
from aepo.parallel import share
from aepo.stages import Stage, States, Step, fast
from aepo.stages.critic import ByRow, advantage_of_rows
from aepo.stages.optim import MAX_WEIGHT, Adam, Loss, Metrics


def loss(net: GaussianActor, batch: Pairs, advantage_B: Tensor, config: ActorConfig) -> Loss:
    """Return -E min(exp(beta (min_i Q'_i(s, a) - V(s))), 100) log pi(a|s)."""
    weight_B = (config.inverse_temperature * advantage_B).exp().clamp(max=MAX_WEIGHT)
    loss = -(weight_B * net.log_prob(batch.states_BS, batch.actions_BA)).mean()
    return loss, lambda: {
        "loss": loss,
        "weight": weight_B.mean(),
        "clamped_share": (weight_B == MAX_WEIGHT).to(loss.dtype).mean(),
    }


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


def train_step(state: ActorState, config: ActorConfig, data: Transitions, of_rows: ByRow) -> Metrics:
    """Take one gradient step and return its metrics; `of_rows` gives min_i Q'_i - V."""
    index_B = share(data.draw_rows(config.batch_size, state.generator))
    gradients, metrics = fast.actor(state.net, data.take_pairs(index_B), of_rows(index_B), config)
    state.optimizer.step_along(gradients)
    state.step += 1
    return metrics


def make_step(config: ActorConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of the stage."""
    judge, num_draws = states["critic"], config.steps * config.batch_size
    of_rows = advantage_of_rows(judge.target.net, judge, data, num_draws=num_draws)
    return lambda: train_step(states["actor"], config, data, of_rows)


STAGE = Stage(name="actor", start=start, step=make_step, learns_from=lambda _: ("critic",), acts=True)
