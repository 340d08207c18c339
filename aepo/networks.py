"""The networks: one block of hidden layers, used six ways.

Plain multilayer perceptrons, with SiLU (smooth, so that grad_a Q and grad E are) and layer normalisation in the critics
unless the config says otherwise. They know nothing of schedules or losses; their gradients without autograd are in
aepo/backward.py.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from aepo import kernels
from aepo.config import Activation, ActorConfig, CriticConfig, TwinDelayedConfig

Norm = tuple[tuple[int, ...], Tensor, Tensor, float]
"""Shape, gain, shift and epsilon of a layer normalisation."""
LOG_STD_RANGE = (-5.0, 2.0)
"""Smallest and largest logarithm of a Gaussian policy's standard deviation."""


class Mlp(nn.Sequential):
    """Linear layers, activations (after LayerNorm, if `norm`) between them, called without the modules' overhead."""

    def __init__(self, sizes: list[int], *, norm: bool = False, activation: Activation = "silu"):
        """`sizes` are those of the input, the hidden layers and the output."""
        *inner, last = itertools.pairwise(sizes)
        hidden = [(nn.Linear(*size), nn.LayerNorm(size[1]) if norm else None) for size in inner]
        output, module = nn.Linear(*last), {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
        layers = [[layer, module()] if norm is None else [layer, norm, module()] for layer, norm in hidden]
        super().__init__(*itertools.chain(*layers), output)
        self.hidden = [
            (
                layer.weight,
                layer.bias,
                None if norm is None else (norm.normalized_shape, norm.weight, norm.bias, norm.eps),
            )
            for layer, norm in hidden
        ]
        self.output = (output.weight, output.bias)
        self.activation: Activation = activation

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return [B, O] of [B, I]."""
        learns = torch.is_grad_enabled()
        if not learns and kernels.overflows(x_BI):
            return torch.cat([self.forward(part_BI) for (part_BI,) in kernels.blocks(x_BI)])
        for weight, bias, norm in self.hidden:
            if norm is None:
                x_BI = kernels.linear(x_BI, weight, bias, self.activation)
                continue
            x_BI = torch.layer_norm(kernels.linear(x_BI, weight, bias), *norm)
            x_BI = kernels.activate(x_BI, self.activation, inplace=not learns)
        return kernels.linear(x_BI, *self.output)


class TimeNet(nn.Module):
    """A function of (a_t, s, t); the noise net and the energy net are made of it."""

    frequencies_F: Tensor

    def __init__(self, state_dim: int, action_dim: int, out_dim: int, *, hidden_size: int, num_layers: int):
        """Time enters as 16 sines and 16 cosines of geometric frequencies, pi/2 to 16 pi."""
        super().__init__()
        self.action_dim = action_dim
        self.register_buffer("frequencies_F", torch.logspace(-1, 4, 16, base=2.0) * math.pi, persistent=False)
        self.body = Mlp([state_dim + action_dim + 32] + [hidden_size] * num_layers + [out_dim])

    def inputs(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return what the layers see, [B, I]."""
        return torch.cat([a_t_BA, states_BS, *self.features(t_B)], dim=-1)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return [B, out_dim]."""
        return self.body(self.inputs(a_t_BA, states_BS, t_B))  # type: ignore[no-any-return]

    def features(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sines and cosines of times, [B, 16] each."""
        phase_BF = t_B[:, None] * self.frequencies_F
        return phase_BF.sin(), phase_BF.cos()


class TwinQ(nn.Module):
    """Two independent critics Q_1, Q_2 of (s, a)."""

    def __init__(self, state_dim: int, action_dim: int, config: CriticConfig | TwinDelayedConfig):
        """Layer normalisation bounds what both say of actions that the data do not have."""
        super().__init__()
        sizes = [state_dim + action_dim] + [config.hidden_size] * config.num_layers + [1]
        self.q_1, self.q_2 = (Mlp(sizes, norm=config.layer_norm, activation=config.activation) for _ in range(2))

    def forward(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return both values, [2, B]."""
        pair = torch.cat([states_BS, actions_BA], dim=-1)
        return torch.stack([self.q_1(pair).squeeze(-1), self.q_2(pair).squeeze(-1)])

    def lowest(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return min_i Q_i, [B]."""
        return self.lowest_of(torch.cat([states_BS, actions_BA], dim=-1))

    def lowest_of(self, pairs_BP: Tensor) -> Tensor:
        """Return min_i Q_i of states and actions side by side, [B]."""
        return torch.minimum(self.q_1.forward(pairs_BP), self.q_2.forward(pairs_BP)).squeeze(-1)


class ValueNet(nn.Module):
    """V of s."""

    def __init__(self, state_dim: int, config: CriticConfig):
        """Layers as those of the critics."""
        super().__init__()
        sizes = [state_dim] + [config.hidden_size] * config.num_layers + [1]
        self.body = Mlp(sizes, norm=config.layer_norm, activation=config.activation)

    def forward(self, states_BS: Tensor) -> Tensor:
        """Return [B]."""
        return self.body(states_BS).squeeze(-1)  # type: ignore[no-any-return]


class Actor(nn.Module):
    """A deterministic policy, pi(s) in (-1, 1)^A."""

    def __init__(self, state_dim: int, action_dim: int, config: ActorConfig | TwinDelayedConfig):
        """One output per action dimension; no layer normalisation."""
        super().__init__()
        sizes = [state_dim] + [config.hidden_size] * config.num_layers + [action_dim]
        self.body = Mlp(sizes, activation=config.activation)

    def forward(self, states_BS: Tensor) -> Tensor:
        """Return actions, [B, A]."""
        return self.body(states_BS).tanh()  # type: ignore[no-any-return]


class GaussianActor(Actor):
    """A Gaussian policy: mean in (-1, 1)^A, one standard deviation per dimension, the same in all states (IQL)."""

    def __init__(self, state_dim: int, action_dim: int, config: ActorConfig):
        """The deviations start at 1 and stay in [e^-5, e^2]."""
        super().__init__(state_dim, action_dim, config)
        self.log_std_A = nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return log pi(a|s), [B]; `forward` returns the mean."""
        policy = Normal(self(states_BS), self.log_std_A.clamp(*LOG_STD_RANGE).exp(), validate_args=False)
        return policy.log_prob(actions_BA).sum(dim=1)  # type: ignore[no-any-return, no-untyped-call]
