"""The networks: one block of hidden layers, used six ways.

Plain multilayer perceptrons, with SiLU (smooth, so that grad_a Q and grad E are) and layer normalisation in the critics
unless the config says otherwise. They know nothing of schedules or losses.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aepo import kernels
from aepo.config import Activation, ActorConfig, CriticConfig, TwinDelayedConfig

Pull = Callable[[Tensor], list[Tensor]]
Norm = tuple[tuple[int, ...], Tensor, Tensor, float]
"""Shape, gain, shift and epsilon of a layer normalisation."""
aten = torch.ops.aten


class Mlp(nn.Sequential):
    """Linear layers, activations (after LayerNorm, if `norm`) between them, called without the modules' overhead."""

    def __init__(self, sizes: list[int], *, norm: bool = False, activation: Activation = "silu"):
        """`sizes` are those of the input, the hidden layers and the output."""
        *inner, last = itertools.pairwise(sizes)
        hidden = [(nn.Linear(*size), nn.LayerNorm(size[1]) if norm else None) for size in inner]
        output, module = nn.Linear(*last), {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
        layers = [[layer, module()] if norm is None else [layer, norm, module()] for layer, norm in hidden]
        super().__init__(*itertools.chain(*layers), output)
        self._hidden = [
            (
                layer.weight,
                layer.bias,
                None if norm is None else (norm.normalized_shape, norm.weight, norm.bias, norm.eps),
            )
            for layer, norm in hidden
        ]
        self._output = (output.weight, output.bias)
        self._activation: Activation = activation

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return [B, O] of [B, I]."""
        learns = torch.is_grad_enabled()
        if not learns and kernels.overflows(x_BI):
            return torch.cat([self.forward(part_BI) for (part_BI,) in kernels.blocks(x_BI)])
        for weight, bias, norm in self._hidden:
            if norm is None:
                x_BI = kernels.linear(x_BI, weight, bias, self._activation)
                continue
            x_BI = torch.layer_norm(kernels.linear(x_BI, weight, bias), *norm)
            x_BI = kernels.activate(x_BI, self._activation, inplace=not learns)
        return kernels.linear(x_BI, *self._output)

    def vjp(self, x_BI: Tensor) -> tuple[Tensor, Pull]:
        """Return [B, O] of [B, I], and what turns a loss's gradient by it, [B, O], into those by the `parameters()`.

        Under `torch.no_grad` only. Without autograd, which costs as much as small layers' arithmetic, and in as little
        memory as will do, since at these sizes it is either in the cache or costs more than arithmetic, too: the second
        call finds all given away.
        """
        output_BO, kept = self._forward(x_BI)
        return output_BO, functools.partial(self._pull, kept)

    def fit(self, x_BI: Tensor, target_BO: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the error output - target, [B, O], and the gradients of its mean square by the `parameters()`.

        Under `torch.no_grad` only. Unlike `vjp` it goes block by block through the rows, forwards and back.
        """
        errors, total = [], [torch.empty(0)]
        for part_BI, of_part_BO in kernels.blocks(x_BI, target_BO):
            output_BO, pull = self.vjp(part_BI)
            errors.append(output_BO - of_part_BO)
            found = pull(2.0 / target_BO.numel() * errors[-1])
            if len(errors) == 1:
                total = found
            else:
                torch._foreach_add_(total, found)
        return errors[0] if len(errors) == 1 else torch.cat(errors), total

    def with_slope(self, x_BI: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the only output, [B, 1], and its gradient by these columns of the input, [B, J].

        Under `torch.no_grad` only.
        """
        if kernels.overflows(x_BI):
            parts = kernels.blocks(x_BI)
            outputs, slopes = zip(*(self.with_slope(part_BI, columns) for (part_BI,) in parts), strict=True)
            return torch.cat(outputs), torch.cat(slopes)
        output_B1, kept = self._forward(x_BI)
        (x_BI,) = kept.pop()
        grad_BH = self._output[0].repeat(len(x_BI), 1)  # overwritten below: never the weights themselves
        first = self._hidden[0][0][:, columns]
        for weight, _, norm in reversed(self._hidden):
            grad_BH, _ = self._before(grad_BH, kept.pop(), norm, learns=False)
            grad_BH = kernels.product(grad_BH, weight if kept else first)
        return output_B1, grad_BH

    def _forward(self, x_BI: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Return the output, and of each layer what its chain rule needs."""
        assert not torch.is_grad_enabled()
        x_BI = kernels.dense(x_BI)  # it is a factor here and in the pullback
        kept: list[tuple[Tensor, ...]] = []
        for weight, bias, norm in self._hidden:
            before_BH = kernels.linear(x_BI, weight, bias)
            of_norm: tuple[Tensor, ...] = ()
            if norm is not None:
                product_BH = before_BH
                before_BH, *moments_B1 = torch.native_layer_norm(product_BH, *norm)
                of_norm = (product_BH, *moments_B1)
            after_BH = F.silu(before_BH) if self._activation == "silu" else before_BH.relu_()
            kept.append((x_BI, before_BH, *of_norm))
            x_BI = after_BH
        output_BO = kernels.linear(x_BI, *self._output)
        kept.append((x_BI,))
        return output_BO, kept

    def _before(
        self, grad_BH: Tensor, layer: tuple[Tensor, ...], norm: Norm | None, *, learns: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a gradient by a layer's linear output and, if it learns, those by its normalisation's parameters.

        The gradient behind the layer is overwritten.
        """
        _, before_BH, *of_norm = layer
        if self._activation == "silu":
            aten.silu_backward.grad_input(grad_BH, before_BH, grad_input=grad_BH)
        else:
            aten.threshold_backward.grad_input(grad_BH, before_BH, 0, grad_input=grad_BH)
        if norm is None:
            return grad_BH, []
        shape, gain_H, shift_H, _ = norm
        product_BH, mean_B1, rstd_B1 = of_norm
        grad_BH, *of_weights = aten.native_layer_norm_backward.default(
            grad_BH, product_BH, shape, mean_B1, rstd_B1, gain_H, shift_H, [True, learns, learns]
        )
        return grad_BH, of_weights if learns else []

    def _pull(self, kept: list[tuple[Tensor, ...]], grad_BO: Tensor) -> list[Tensor]:
        assert kept, "the first call has given the activations away; call vjp again"
        (x_BI,) = kept.pop()
        gradients = [grad_BO.sum(dim=0), kernels.product(grad_BO.t(), x_BI)]  # the last parameter first
        grad_BH = kernels.product(grad_BO, self._output[0])
        for weight, _, norm in reversed(self._hidden):
            layer = kept.pop()
            grad_BH, of_norm = self._before(grad_BH, layer, norm, learns=True)
            gradients += reversed(of_norm)
            x_BI = layer[0]
            gradients += [grad_BH.sum(dim=0), kernels.product(grad_BH.t(), x_BI)]
            if kept:
                grad_BH = kernels.product(grad_BH, weight)
        return gradients[::-1]


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


class Prepared:
    """A TimeNet in given states at given times, for a sampler, which asks it step after step, without gradients.

    What its first layer makes of states and times is computed once, and the slope by hand, since at a sampler's sizes
    autograd costs more than the arithmetic.
    """

    def __init__(self, net: TimeNet, states_BS: Tensor, t_N: Tensor):
        """Times are named by their place in `t_N` from here on."""
        first, *inner, last = (layer for layer in net.body if isinstance(layer, nn.Linear))
        sizes = [net.action_dim, states_BS.shape[1], 2 * len(net.frequencies_F)]
        parts = torch.split(first.weight, sizes, dim=1)
        of_action_HA, of_state_HS, of_time_HF = (part.contiguous() for part in parts)
        self._action_AH = of_action_HA.t()
        self._states_BH = F.linear(states_BS, of_state_HS, first.bias)
        self._times_NH = F.linear(torch.cat(net.features(t_N), dim=1), of_time_HF)
        self._inner, self._last = inner, last

    def _first(self, a_BA: Tensor, step: int) -> Tensor:
        return torch.addmm(self._states_BH + self._times_NH[step], a_BA, self._action_AH)

    def output(self, a_BA: Tensor, step: int) -> Tensor:
        """Return the network's output, [B, O]."""
        x_BH = F.silu(self._first(a_BA, step), inplace=True)
        for layer in self._inner:
            x_BH = kernels.linear(x_BH, layer.weight, layer.bias, "silu")
        return F.linear(x_BH, self._last.weight, self._last.bias)

    def slope(self, a_BA: Tensor, step: int, weight_O: Tensor) -> Tensor:
        """Return the gradient of sum_o weight_o output_o by the actions, [B, A]."""
        before = [self._first(a_BA, step)]  # what each SiLU is given
        for layer in self._inner:
            before.append(kernels.linear(F.silu(before[-1]), layer.weight, layer.bias))
        grad_BH = (weight_O @ self._last.weight).expand_as(before[-1])
        for layer, x_BH in zip(reversed(self._inner), reversed(before[1:]), strict=True):
            grad_BH = torch.ops.aten.silu_backward.default(grad_BH, x_BH)
            grad_BH = kernels.product(grad_BH, layer.weight)
        slope_BA: Tensor = torch.ops.aten.silu_backward.default(grad_BH, before[0]) @ self._action_AH.t()
        return slope_BA


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

    def lowest_with_slope(self, states_BS: Tensor, actions_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Return min_i Q_i, [B], and its gradient by the actions, [B, A]; under `torch.no_grad` only."""
        pairs_BP, actions = torch.cat([states_BS, actions_BA], dim=-1), slice(states_BS.shape[-1], None)
        (q_1_B1, slope_1_BA), (q_2_B1, slope_2_BA) = (net.with_slope(pairs_BP, actions) for net in (self.q_1, self.q_2))
        return torch.minimum(q_1_B1, q_2_B1).squeeze(-1), torch.where(q_1_B1 <= q_2_B1, slope_1_BA, slope_2_BA)

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

    @torch.no_grad()
    def log_prob(self, states_BS: Tensor, actions_BA: Tensor) -> tuple[Callable[[], Tensor], Pull]:
        """Return what gives log pi(a|s), [B], and what turns a loss's gradient by it, [B], into those by the
        `parameters()`.

        `forward` returns the mean.
        """
        output_BA, pull = self.body.vjp(states_BS)
        mean_BA, log_std_A = output_BA.tanh(), self.log_std_A.clamp(-5.0, 2.0)
        precision_A = (-log_std_A).exp()
        distance_BA = (actions_BA - mean_BA) * precision_A  # in standard deviations
        squared_BA = distance_BA.square()

        def pull_both(grad_B: Tensor) -> list[Tensor]:
            grad_B1 = grad_B.unsqueeze(1)
            of_log_std_A = (grad_B1 * (squared_BA - 1.0)).sum(dim=0) * (log_std_A == self.log_std_A)
            of_mean_BA = grad_B1 * (distance_BA * precision_A)
            return [of_log_std_A, *pull(aten.tanh_backward.default(of_mean_BA, mean_BA))]

        return lambda: (-0.5 * (squared_BA + math.log(2 * math.pi)) - log_std_A).sum(dim=1), pull_both
