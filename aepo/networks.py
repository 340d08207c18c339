"""The networks: one block of hidden layers, used six ways.

Plain multilayer perceptrons, with SiLU (smooth, so that grad_a Q and grad E are) and layer normalisation in the critics
unless the config says otherwise. They know nothing of schedules or losses.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from aepo.config import Activation, ActorConfig, ActorCriticConfig, CriticConfig, Precision

Pull = Callable[[Tensor], list[Tensor]]
aten = torch.ops.aten

MIN_ROWS, MIN_PRODUCTS = 16, 2**20
"""Fewer rows, or fewer multiplications in all, do not repay a call of oneDNN."""
MATMUL_PRECISION: dict[Precision, str] = {"float32": "highest", "tf32": "high", "bfloat16": "medium"}
"""Torch's names."""
_small_differ = False
"""Whether small products are to be more precise than `multiplying` has the others."""


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
    if x_BI.ndim != 2 or x_BI.device.type != "cpu":
        return False
    return x_BI.shape[0] >= MIN_ROWS and not _is_small(x_BI, weight_OI)


def _is_small(x_BI: Tensor, weight_OI: Tensor) -> bool:
    return x_BI.shape[0] * weight_OI.numel() < MIN_PRODUCTS


@contextlib.contextmanager
def multiplying(precision: Precision) -> Iterator[None]:
    """Multiply matrices at this precision, on the CPU and on GPUs, for as long as it lasts.

    Small ones stay float32: bfloat16 costs them more than it saves.
    """
    global _small_differ  # as torch's precision is; to ask for that costs as much as a small product
    before, differed = torch.get_float32_matmul_precision(), _small_differ
    torch.set_float32_matmul_precision(MATMUL_PRECISION[precision])
    _small_differ = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _small_differ = differed


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


def linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """Return x W' + b, [B, O], by oneDNN's AVX-512 kernels where MKL does not have its own.

    PyTorch's own linear layers call MKL, which on AMD's processors runs AVX2 kernels at less than half the speed
    (docs/results/speed.md).
    """
    if PREFERS_ONEDNN and _takes_onednn(x_BI, weight_OI):
        x_BI = x_BI.contiguous()  # columns of a wider tensor would take oneDNN's slow path
        multiply = _apply if torch.is_grad_enabled() else _onednn
        return multiply(x_BI, weight_OI, bias_O)
    if _small_differ and _is_small(x_BI, weight_OI):
        with multiplying("float32"):
            return F.linear(x_BI, weight_OI, bias_O)
    return F.linear(x_BI, weight_OI, bias_O)


def _product(x_BI: Tensor, y_IO: Tensor) -> Tensor:
    """Return x y, [B, O], without gradients."""
    if PREFERS_ONEDNN and _takes_onednn(x_BI, y_IO):
        return _onednn(x_BI, y_IO.t(), None)
    if _small_differ and _is_small(x_BI, y_IO):
        with multiplying("float32"):
            return torch.mm(x_BI, y_IO)
    return torch.mm(x_BI, y_IO)


class Mlp(nn.Sequential):
    """Linear layers, activations (after LayerNorm, if `norm`) between them, called without the modules' overhead."""

    def __init__(self, sizes: list[int], *, norm: bool = False, activation: Activation = "silu"):
        """`sizes` are those of the input, the hidden layers and the output."""
        *inner, last = itertools.pairwise(sizes)
        hidden = [(nn.Linear(*size), nn.LayerNorm(size[1]) if norm else None) for size in inner]
        output, module = nn.Linear(*last), {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
        layers = [[layer, module()] if norm is None else [layer, norm, module()] for layer, norm in hidden]
        super().__init__(*itertools.chain(*layers), output)
        self._weights = list(self.parameters())
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
        if learns and not x_BI.requires_grad:
            return _learn(x_BI, self, *self._weights)
        act, name = (F.silu, "swish") if self._activation == "silu" else (F.relu, "relu")
        for weight, bias, norm in self._hidden:
            if PREFERS_ONEDNN and norm is None and not learns and _takes_onednn(x_BI, weight):
                x_BI = _onednn(x_BI.contiguous(), weight, bias, name)
                continue
            x_BI = linear(x_BI, weight, bias)
            if norm is not None:
                x_BI = torch.layer_norm(x_BI, *norm)
            x_BI = act(x_BI, inplace=not learns)
        return linear(x_BI, *self._output)

    def vjp(self, x_BI: Tensor) -> tuple[Tensor, Pull]:
        """Return [B, O] of [B, I], and what turns a loss's gradient by it, [B, O], into those by the `parameters()`.

        Under `torch.no_grad` only. Without autograd, which costs as much as small layers' arithmetic, and in as little
        memory as will do, since at these sizes it is either in the cache or costs more than arithmetic, too: the second
        call finds all given away.
        """
        assert not torch.is_grad_enabled()
        kept: list[tuple[Tensor, ...]] = []
        for weight, bias, norm in self._hidden:
            before_BH = linear(x_BI, weight, bias)
            of_norm: tuple[Tensor, ...] = ()
            if norm is not None:
                product_BH = before_BH
                before_BH, *moments_B1 = torch.native_layer_norm(product_BH, *norm)
                of_norm = (product_BH, *moments_B1)
            after_BH = F.silu(before_BH) if self._activation == "silu" else before_BH.relu_()
            kept.append((x_BI, before_BH, *of_norm))
            x_BI = after_BH
        output_BO = linear(x_BI, *self._output)
        kept.append((x_BI,))
        return output_BO, functools.partial(self._pull, kept)

    def _pull(self, kept: list[tuple[Tensor, ...]], grad_BO: Tensor) -> list[Tensor]:
        assert kept, "the first call has given the activations away; call vjp again"
        (x_BI,) = kept.pop()
        gradients = [grad_BO.sum(dim=0), _product(grad_BO.t(), x_BI)]  # the last parameter first
        grad_BH = _product(grad_BO, self._output[0])
        for weight, _, norm in reversed(self._hidden):
            x_BI, before_BH, *of_norm = kept.pop()
            if self._activation == "silu":
                aten.silu_backward.grad_input(grad_BH, before_BH, grad_input=grad_BH)
            else:
                aten.threshold_backward.grad_input(grad_BH, before_BH, 0, grad_input=grad_BH)
            del before_BH
            if norm is not None:
                shape, gain_H, shift_H, _ = norm
                product_BH, mean_B1, rstd_B1 = of_norm
                grad_BH, *of_weights = aten.native_layer_norm_backward.default(
                    grad_BH, product_BH, shape, mean_B1, rstd_B1, gain_H, shift_H, [True] * 3
                )
                gradients += reversed(of_weights)
            gradients += [grad_BH.sum(dim=0), _product(grad_BH.t(), x_BI)]
            if kept:
                grad_BH = _product(grad_BH, weight)
        return gradients[::-1]


class _Learning(torch.autograd.Function):
    """An Mlp whose weights alone learn, as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, mlp: Mlp, *_: Tensor) -> Tensor:
        output_BO, ctx.pull = mlp.vjp(x_BI)
        return output_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.pull(grad_BO)


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
            if PREFERS_ONEDNN and _takes_onednn(x_BH, layer.weight):
                x_BH = _onednn(x_BH, layer.weight, layer.bias, "swish")
            else:
                x_BH = F.silu(F.linear(x_BH, layer.weight, layer.bias), inplace=True)
        return F.linear(x_BH, self._last.weight, self._last.bias)

    def slope(self, a_BA: Tensor, step: int, weight_O: Tensor) -> Tensor:
        """Return the gradient of sum_o weight_o output_o by the actions, [B, A]."""
        before = [self._first(a_BA, step)]  # what each SiLU is given
        for layer in self._inner:
            before.append(linear(F.silu(before[-1]), layer.weight, layer.bias))
        grad_BH = (weight_O @ self._last.weight).expand_as(before[-1])
        for layer, x_BH in zip(reversed(self._inner), reversed(before[1:]), strict=True):
            grad_BH = torch.ops.aten.silu_backward.default(grad_BH, x_BH)
            grad_BH = _product(grad_BH, layer.weight)
        slope_BA: Tensor = torch.ops.aten.silu_backward.default(grad_BH, before[0]) @ self._action_AH.t()
        return slope_BA


class TwinQ(nn.Module):
    """Two independent critics Q_1, Q_2 of (s, a)."""

    def __init__(self, state_dim: int, action_dim: int, config: CriticConfig | ActorCriticConfig):
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
        pair_BP = torch.cat([states_BS, actions_BA], dim=-1)
        return torch.minimum(self.q_1.forward(pair_BP), self.q_2.forward(pair_BP)).squeeze(-1)


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

    def __init__(self, state_dim: int, action_dim: int, config: ActorConfig | ActorCriticConfig):
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
    def log_prob(self, states_BS: Tensor, actions_BA: Tensor) -> tuple[Tensor, Pull]:
        """Return log pi(a|s), [B], and what turns a loss's gradient by it, [B], into those by the `parameters()`.

        `forward` returns the mean.
        """
        output_BA, pull = self.body.vjp(states_BS)
        mean_BA, log_std_A = output_BA.tanh(), self.log_std_A.clamp(-5.0, 2.0)
        std_A = log_std_A.exp()
        distance_BA = (actions_BA - mean_BA) / std_A  # in standard deviations
        squared_BA = distance_BA.square()
        log_prob_BA = -0.5 * (squared_BA + math.log(2 * math.pi)) - log_std_A

        def pull_both(grad_B: Tensor) -> list[Tensor]:
            of_log_std_A = (grad_B @ (squared_BA - 1.0)) * (log_std_A == self.log_std_A)
            return [of_log_std_A, *pull(grad_B[:, None] * distance_BA / std_A * (1.0 - mean_BA.square()))]

        return log_prob_BA.sum(dim=1), pull_both
