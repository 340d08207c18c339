"""The networks: one block of hidden layers, used six ways.

Plain multilayer perceptrons with SiLU (smooth, so that grad_a Q and grad E are) and layer normalisation in
the critics. They know nothing of schedules or losses.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_ROWS, MIN_PRODUCTS = 16, 2**20
"""Fewer rows, or fewer multiplications in all, do not repay a call of oneDNN."""


def _prefers_onednn() -> bool:
    """Return whether MKL, which PyTorch calls, leaves AVX-512 unused here: on all processors but Intel's."""
    if not (torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


PREFERS_ONEDNN = _prefers_onednn()


def _onednn(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, activation: str = "none") -> Tensor:
    product_BO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_BI, weight_OI, bias_O, activation, [], "")
    return product_BO


def _takes_onednn(x_BI: Tensor, weight_OI: Tensor) -> bool:
    if not (PREFERS_ONEDNN and x_BI.ndim == 2 and x_BI.device.type == "cpu"):
        return False
    rows = x_BI.shape[0]
    return rows >= MIN_ROWS and rows * weight_OI.numel() >= MIN_PRODUCTS


class _OneDNNLinear(torch.autograd.Function):
    """x W' + b by oneDNN, as often differentiable as one likes."""

    @staticmethod
    def forward(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return _onednn(x_BI, weight_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004  # torch's signature
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_BO = grad_BO.contiguous()
        multiply = _apply if torch.is_grad_enabled() else _onednn  # it is where gradients are differentiated again
        return (
            multiply(grad_BO, weight_OI.t(), None) if wants_x else None,
            multiply(grad_BO.t(), x_BI.t(), None) if wants_weight else None,
            grad_BO.sum(dim=0) if wants_bias else None,
        )


_apply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _OneDNNLinear.apply


class Linear(nn.Linear):
    """A linear layer that takes oneDNN's AVX-512 kernels where MKL does not have its own.

    PyTorch's own linear layers call MKL, which on AMD's processors runs AVX2 kernels at less than half the speed
    (docs/results/speed.md).
    """

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return [B, O] of [B, I]."""
        if not _takes_onednn(x_BI, self.weight):
            return F.linear(x_BI, self.weight, self.bias)
        x_BI = x_BI.contiguous()  # columns of a wider tensor would take oneDNN's slow path
        multiply = _apply if torch.is_grad_enabled() else _onednn
        return multiply(x_BI, self.weight, self.bias)


def _multiply(x_BI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x W', [B, O], without gradients."""
    return _onednn(x_BI, weight_OI, None) if _takes_onednn(x_BI, weight_OI) else x_BI @ weight_OI.t()


class Mlp(nn.Sequential):
    """Linear layers with SiLU (after LayerNorm, if `norm`) between them, called without the modules' overhead."""

    def __init__(self, sizes: list[int], *, norm: bool = False):
        """`sizes` are those of the input, the hidden layers and the output."""
        *inner, last = itertools.pairwise(sizes)
        hidden = [(Linear(*size), nn.LayerNorm(size[1]) if norm else None) for size in inner]
        output = Linear(*last)
        layers = [[linear, nn.SiLU()] if norm is None else [linear, norm, nn.SiLU()] for linear, norm in hidden]
        super().__init__(*itertools.chain(*layers), output)
        self._hidden, self._output = hidden, [output]  # lists, so that no module stands in the state twice
        self._weights = list(self.parameters())

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return [B, O] of [B, I]."""
        learns = torch.is_grad_enabled()
        if learns and not x_BI.requires_grad:
            return _learn(x_BI, self, *self._weights)
        for linear, norm in self._hidden:
            if norm is None and not learns and _takes_onednn(x_BI, linear.weight):
                x_BI = _onednn(x_BI.contiguous(), linear.weight, linear.bias, "swish")
                continue
            x_BI = linear.forward(x_BI)
            if norm is not None:
                x_BI = F.layer_norm(x_BI, norm.normalized_shape, norm.weight, norm.bias)
            x_BI = F.silu(x_BI, inplace=not learns)
        return self._output[0].forward(x_BI)


class _Learning(torch.autograd.Function):
    """An Mlp whose weights alone learn, as one step of autograd, which costs as much as small layers' arithmetic."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, mlp: Mlp, *_: Tensor) -> Tensor:
        kept: list[tuple[Tensor, ...]] = []
        for linear, norm in mlp._hidden:
            product_BH = linear.forward(x_BI)
            if norm is None:
                kept.append((x_BI, product_BH))
                x_BI = F.silu(product_BH)
            else:
                normed_BH, *moments_B1 = torch.native_layer_norm(
                    product_BH, norm.normalized_shape, norm.weight, norm.bias, norm.eps
                )
                kept.append((x_BI, normed_BH, product_BH, *moments_B1))
                x_BI = F.silu(normed_BH)
        ctx.mlp = mlp
        ctx.save_for_backward(*itertools.chain(*kept), x_BI)
        return mlp._output[0].forward(x_BI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        *kept, x_BH = ctx.saved_tensors
        num_kept = len(kept) // len(ctx.mlp._hidden)
        gradients = [grad_BO.sum(dim=0), grad_BO.t() @ x_BH]  # the last parameter first
        grad_BH = grad_BO @ ctx.mlp._output[0].weight
        for place, (linear, norm) in reversed([*enumerate(ctx.mlp._hidden)]):
            x_BI, before_BH, *of_norm = kept[place * num_kept : (place + 1) * num_kept]
            grad_BH = torch.ops.aten.silu_backward.default(grad_BH, before_BH)
            if norm is not None:
                product_BH, mean_B1, rstd_B1 = of_norm
                grad_BH, *of_weights = torch.ops.aten.native_layer_norm_backward.default(
                    grad_BH, product_BH, norm.normalized_shape, mean_B1, rstd_B1, norm.weight, norm.bias, [True] * 3
                )
                gradients += reversed(of_weights)
            gradients += [grad_BH.sum(dim=0), _multiply(grad_BH.t(), x_BI.t())]
            if place:
                grad_BH = _multiply(grad_BH, linear.weight.t())
        return None, None, *reversed(gradients)


_learn: Callable[..., Tensor] = _Learning.apply


class TimeNet(nn.Module):
    """A function of (a_t, s, t); the noise net and the energy net are made of it."""

    frequencies_F: Tensor

    def __init__(self, state_dim: int, action_dim: int, out_dim: int, *, hidden_size: int, num_layers: int):
        """Time enters as 16 sines and 16 cosines of geometric frequencies, pi/2 to 16 pi."""
        super().__init__()
        self.action_dim = action_dim
        self.register_buffer("frequencies_F", torch.logspace(-1, 4, 16, base=2.0) * math.pi, persistent=False)
        self.body = Mlp([state_dim + action_dim + 32] + [hidden_size] * num_layers + [out_dim])

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return [B, out_dim]."""
        return self.body(torch.cat([a_t_BA, states_BS, self.features(t_B)], dim=-1))  # type: ignore[no-any-return]

    def features(self, t_B: Tensor) -> Tensor:
        """Return the sines and cosines of times, [B, 32]."""
        phase_BF = t_B[:, None] * self.frequencies_F
        return torch.cat([phase_BF.sin(), phase_BF.cos()], dim=-1)


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
        self._times_NH = F.linear(net.features(t_N), of_time_HF)
        self._inner, self._last = inner, last

    def _first(self, a_BA: Tensor, step: int) -> Tensor:
        return torch.addmm(self._states_BH + self._times_NH[step], a_BA, self._action_AH)

    def output(self, a_BA: Tensor, step: int) -> Tensor:
        """Return the network's output, [B, O]."""
        x_BH = F.silu(self._first(a_BA, step), inplace=True)
        for layer in self._inner:
            if _takes_onednn(x_BH, layer.weight):
                x_BH = _onednn(x_BH, layer.weight, layer.bias, "swish")
            else:
                x_BH = F.silu(F.linear(x_BH, layer.weight, layer.bias), inplace=True)
        return F.linear(x_BH, self._last.weight, self._last.bias)

    def slope(self, a_BA: Tensor, step: int, weight_O: Tensor) -> Tensor:
        """Return the gradient of sum_o weight_o output_o by the actions, [B, A]."""
        before = [self._first(a_BA, step)]  # what each SiLU is given
        for layer in self._inner:
            before.append(layer(F.silu(before[-1])))
        grad_BH = (weight_O @ self._last.weight).expand_as(before[-1])
        for layer, x_BH in zip(reversed(self._inner), reversed(before[1:]), strict=True):
            grad_BH = torch.ops.aten.silu_backward.default(grad_BH, x_BH)
            grad_BH = _multiply(grad_BH, layer.weight.t())
        slope_BA: Tensor = torch.ops.aten.silu_backward.default(grad_BH, before[0]) @ self._action_AH.t()
        return slope_BA


class TwinQ(nn.Module):
    """Two independent critics Q_1, Q_2 of (s, a)."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """Both have layer normalisation, which bounds what they say of actions the data do not have."""
        super().__init__()
        sizes = [state_dim + action_dim] + [hidden_size] * num_layers + [1]
        self.q_1, self.q_2 = Mlp(sizes, norm=True), Mlp(sizes, norm=True)

    def forward(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return both values, [2, B]."""
        pair = torch.cat([states_BS, actions_BA], dim=-1)
        return torch.stack([self.q_1(pair).squeeze(-1), self.q_2(pair).squeeze(-1)])


class ValueNet(nn.Module):
    """V of s."""

    def __init__(self, state_dim: int, *, hidden_size: int, num_layers: int):
        """Layer normalisation as in the critics."""
        super().__init__()
        self.body = Mlp([state_dim] + [hidden_size] * num_layers + [1], norm=True)

    def forward(self, states_BS: Tensor) -> Tensor:
        """Return [B]."""
        return self.body(states_BS).squeeze(-1)  # type: ignore[no-any-return]


class Actor(nn.Module):
    """A deterministic policy, pi(s) in (-1, 1)^A."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__()
        self.body = Mlp([state_dim] + [hidden_size] * num_layers + [action_dim])

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
