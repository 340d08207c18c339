"""The networks: one block of hidden layers, used six ways.

Plain multilayer perceptrons with SiLU (smooth, so that grad_a Q and grad E are) and layer normalisation in
the critics. They know nothing of schedules or losses.
"""

import itertools
import math

import torch
from torch import Tensor, nn


def mlp(sizes: list[int], *, norm: bool = False) -> nn.Sequential:
    """Return linear layers of these sizes with SiLU (after LayerNorm, if `norm`) between them."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(fan_in, fan_out))
        if i < len(sizes) - 2:
            layers += [nn.LayerNorm(fan_out), nn.SiLU()] if norm else [nn.SiLU()]
    return nn.Sequential(*layers)


class TimeNet(nn.Module):
    """A function of (a_t, s, t); the noise net and the energy net are made of it."""

    frequencies_F: Tensor

    def __init__(self, state_dim: int, action_dim: int, out_dim: int, *, hidden_size: int, num_layers: int):
        """Time enters as 16 sines and 16 cosines of geometric frequencies, pi/2 to 16 pi."""
        super().__init__()
        self.action_dim = action_dim
        self.register_buffer("frequencies_F", torch.logspace(-1, 4, 16, base=2.0) * math.pi, persistent=False)
        self.body = mlp([state_dim + action_dim + 32] + [hidden_size] * num_layers + [out_dim])

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return [B, out_dim]."""
        phase_BF = t_B[:, None] * self.frequencies_F
        return self.body(torch.cat([a_t_BA, states_BS, phase_BF.sin(), phase_BF.cos()], dim=-1))  # type: ignore[no-any-return]


class TwinQ(nn.Module):
    """Two independent critics Q_1, Q_2 of (s, a)."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """Both have layer normalisation, which bounds what they say of actions the data do not have."""
        super().__init__()
        sizes = [state_dim + action_dim] + [hidden_size] * num_layers + [1]
        self.q_1, self.q_2 = mlp(sizes, norm=True), mlp(sizes, norm=True)

    def forward(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return both values, [2, B]."""
        pair = torch.cat([states_BS, actions_BA], dim=-1)
        return torch.stack([self.q_1(pair).squeeze(-1), self.q_2(pair).squeeze(-1)])


class ValueNet(nn.Module):
    """V of s."""

    def __init__(self, state_dim: int, *, hidden_size: int, num_layers: int):
        """Layer normalisation as in the critics."""
        super().__init__()
        self.body = mlp([state_dim] + [hidden_size] * num_layers + [1], norm=True)

    def forward(self, states_BS: Tensor) -> Tensor:
        """Return [B]."""
        return self.body(states_BS).squeeze(-1)  # type: ignore[no-any-return]


class Actor(nn.Module):
    """A deterministic policy, pi(s) in (-1, 1)^A."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__()
        self.body = mlp([state_dim] + [hidden_size] * num_layers + [action_dim])

    def forward(self, states_BS: Tensor) -> Tensor:
        """Return actions, [B, A]."""
        return self.body(states_BS).tanh()  # type: ignore[no-any-return]


class GaussianActor(Actor):
    """A Gaussian policy: mean in (-1, 1)^A, one standard deviation per dimension, the same in all states (IQL)."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """The deviations start at 1 and stay in [e^-5, e^2]."""
        super().__init__(state_dim, action_dim, hidden_size=hidden_size, num_layers=num_layers)
        self.log_std_A = nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return log pi(a|s), [B]; `forward` returns the mean."""
        log_std_A = self.log_std_A.clamp(-5.0, 2.0)
        squared_BA = ((actions_BA - self(states_BS)) / log_std_A.exp()).square()
        log_prob_BA: Tensor = -0.5 * (squared_BA + math.log(2 * math.pi)) - log_std_A
        return log_prob_BA.sum(dim=1)
