"""Stage 1: a diffusion model of the behaviour policy mu(a|s).

min_phi E || eps_phi(alpha_t a_0 + sigma_t eps, s, t) - eps ||^2       [M5]
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import BehaviorConfig
from aepo.data.transitions import Batch, Transitions
from aepo.diffusion.schedule import add_noise, draw_times
from aepo.networks import TimeNet
from aepo.stages.optim import Adam, Ema


@dataclasses.dataclass
class BehaviorState:
    """Everything of stage 1 that a checkpoint holds."""

    net: TimeNet
    ema: Ema
    optimizer: Adam
    generator: torch.Generator
    step: int = 0


def start(config: BehaviorConfig, data: Transitions, generator: torch.Generator) -> BehaviorState:
    """Return stage 1 before its first step; weights are drawn from torch's global generator."""
    net = TimeNet(
        data.state_dim,
        data.action_dim,
        data.action_dim,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
    ).to(generator.device)
    optimizer = Adam(net.parameters(), lr=config.learning_rate, num_steps=config.steps)
    return BehaviorState(net, Ema(net, config.ema_decay), optimizer, generator)


def loss(net: TimeNet, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the noise prediction error per action dimension, a scalar  [M5]."""
    actions_BA = batch.actions_BA
    t_B = draw_times(len(actions_BA), generator)
    eps_BA = torch.randn(actions_BA.shape, generator=generator, device=actions_BA.device)
    predicted_BA: Tensor = net(add_noise(actions_BA, t_B, eps_BA), batch.states_BS, t_B)
    return (predicted_BA - eps_BA).square().mean()


def train_step(state: BehaviorState, config: BehaviorConfig, data: Transitions) -> dict[str, Tensor]:
    """Take one gradient step and return its metrics, still on the device."""
    value = loss(state.net, data.draw(config.batch_size, state.generator), state.generator)
    state.optimizer.step_on(value)
    state.ema.update(state.net)
    state.step += 1
    return {"loss": value.detach()}
