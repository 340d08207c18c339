"""Stage 1: a diffusion model of the behaviour policy mu(a|s).

min_phi E || eps_phi(alpha_t a_0 + sigma_t eps, s, t) - eps ||^2 / alpha_t^2       [M5]
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import BehaviorConfig
from aepo.data.transitions import Batch, Transitions
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.networks import TimeNet
from aepo.stages.optim import Adam, Ema


class NoiseNet(TimeNet):
    """eps_phi(a_t, s, t) = sigma_t a_t + alpha_t F(a_t, s, t), F the network (arXiv 2202.00512).

    What the stages need of it is the posterior mean (a_t - sigma_t eps) / alpha_t [M9], which then is
    alpha_t a_t - sigma_t F: an error of F is not divided by alpha_t, 0.007 at t = 1.
    """

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__(state_dim, action_dim, action_dim, hidden_size=hidden_size, num_layers=num_layers)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return the predicted noise, [B, A]."""
        alpha_B, sigma_B = alpha_sigma(t_B)
        velocity_BA = super().forward(a_t_BA, states_BS, t_B)
        return sigma_B[:, None] * a_t_BA + alpha_B[:, None] * velocity_BA


@dataclasses.dataclass
class BehaviorState:
    """Everything of stage 1 that a checkpoint holds."""

    net: NoiseNet
    ema: Ema
    optimizer: Adam
    generator: torch.Generator
    step: int = 0


def start(config: BehaviorConfig, data: Transitions, generator: torch.Generator) -> BehaviorState:
    """Return stage 1 before its first step; weights are drawn from torch's global generator."""
    size = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
    net = NoiseNet(data.state_dim, data.action_dim, **size).to(generator.device)
    optimizer = Adam(net.parameters(), lr=config.learning_rate, num_steps=config.steps)
    return BehaviorState(net, Ema(net, config.ema_decay), optimizer, generator)


def loss(net: NoiseNet, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the squared error of the predicted noise over alpha_t^2, per action dimension, a scalar  [M5].

    The weight makes it the squared error of NoiseNet's F, the same at all t for an ignorant network.
    """
    actions_BA = batch.actions_BA
    t_B = draw_times(len(actions_BA), generator)
    eps_BA = torch.randn(actions_BA.shape, generator=generator, device=actions_BA.device)
    predicted_BA: Tensor = net(add_noise(actions_BA, t_B, eps_BA), batch.states_BS, t_B)
    alpha_B, _ = alpha_sigma(t_B)
    return ((predicted_BA - eps_BA) / alpha_B[:, None]).square().mean()


def train_step(state: BehaviorState, config: BehaviorConfig, data: Transitions) -> dict[str, Tensor]:
    """Take one gradient step and return its metrics, still on the device."""
    value = loss(state.net, data.draw(config.batch_size, state.generator), state.generator)
    state.optimizer.step_on(value)
    state.ema.update(state.net)
    state.step += 1
    return {"loss": value.detach()}
