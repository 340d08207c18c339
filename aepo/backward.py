"""Gradients of the networks without autograd, which costs as much as the arithmetic of layers of these sizes.

Training and sampling use them. Everything here runs under `torch.no_grad` only;
tests/aepo/test_networks.py holds it equal to autograd.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aepo import kernels
from aepo.networks import Mlp, Norm, TimeNet, TwinQ

Pull = Callable[[Tensor], list[Tensor]]
"""Gradient of a loss by a network's output -> its gradients by the network's parameters, in their order."""
aten = torch.ops.aten


def vjp(mlp: Mlp, x_BI: Tensor) -> tuple[Tensor, Pull]:
    """Return [B, O] of [B, I], and what turns a loss's gradient by it, [B, O], into those by the `parameters()`.

    Under `torch.no_grad` only. Without autograd, which costs as much as small layers' arithmetic, and in as little
    memory as will do, since at these sizes it is either in the cache or costs more than arithmetic, too: the second
    call finds all given away.
    """
    output_BO, kept = _forward(mlp, x_BI)
    return output_BO, functools.partial(_pull, mlp, kept)


def error_and_gradients(mlp: Mlp, x_BI: Tensor, target_BO: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the error output - target, [B, O], and the gradients of its mean square by the `parameters()`.

    Under `torch.no_grad` only. Unlike `vjp` it goes block by block through the rows, forwards and back.
    """
    errors, total = [], [torch.empty(0)]
    for part_BI, of_part_BO in kernels.blocks(x_BI, target_BO):
        output_BO, pull = vjp(mlp, part_BI)
        errors.append(output_BO - of_part_BO)
        found = pull(2.0 / target_BO.numel() * errors[-1])
        if len(errors) == 1:
            total = found
        else:
            torch._foreach_add_(total, found)
    return errors[0] if len(errors) == 1 else torch.cat(errors), total


def with_slope(mlp: Mlp, x_BI: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the only output, [B, 1], and its gradient by these columns of the input, [B, J].

    Under `torch.no_grad` only.
    """
    if kernels.overflows(x_BI):
        parts = kernels.blocks(x_BI)
        outputs, slopes = zip(*(with_slope(mlp, part_BI, columns) for (part_BI,) in parts), strict=True)
        return torch.cat(outputs), torch.cat(slopes)
    output_B1, kept = _forward(mlp, x_BI)
    (x_BI,) = kept.pop()
    grad_BH = mlp.output[0].repeat(len(x_BI), 1)  # overwritten below: never the weights themselves
    first = mlp.hidden[0][0][:, columns]
    for weight, _, norm in reversed(mlp.hidden):
        grad_BH, _ = _before(mlp, grad_BH, kept.pop(), norm, learns=False)
        grad_BH = kernels.product(grad_BH, weight if kept else first)
    return output_B1, grad_BH


def _forward(mlp: Mlp, x_BI: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Return the output, and of each layer what its chain rule needs."""
    assert not torch.is_grad_enabled()
    x_BI = kernels.dense(x_BI)  # it is a factor here and in the pullback
    kept: list[tuple[Tensor, ...]] = []
    for weight, bias, norm in mlp.hidden:
        before_BH = kernels.linear(x_BI, weight, bias)
        of_norm: tuple[Tensor, ...] = ()
        if norm is not None:
            product_BH = before_BH
            before_BH, *moments_B1 = torch.native_layer_norm(product_BH, *norm)
            of_norm = (product_BH, *moments_B1)
        after_BH = F.silu(before_BH) if mlp.activation == "silu" else before_BH.relu_()
        kept.append((x_BI, before_BH, *of_norm))
        x_BI = after_BH
    output_BO = kernels.linear(x_BI, *mlp.output)
    kept.append((x_BI,))
    return output_BO, kept


def _before(
    mlp: Mlp, grad_BH: Tensor, layer: tuple[Tensor, ...], norm: Norm | None, *, learns: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return a gradient by a layer's linear output and, if it learns, those by its normalisation's parameters.

    The gradient behind the layer is overwritten.
    """
    _, before_BH, *of_norm = layer
    if mlp.activation == "silu":
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


def _pull(mlp: Mlp, kept: list[tuple[Tensor, ...]], grad_BO: Tensor) -> list[Tensor]:
    assert kept, "the first call has given the activations away; call vjp again"
    (x_BI,) = kept.pop()
    gradients = [grad_BO.sum(dim=0), kernels.product(grad_BO.t(), x_BI)]  # the last parameter first
    grad_BH = kernels.product(grad_BO, mlp.output[0])
    for weight, _, norm in reversed(mlp.hidden):
        layer = kept.pop()
        grad_BH, of_norm = _before(mlp, grad_BH, layer, norm, learns=True)
        gradients += reversed(of_norm)
        x_BI = layer[0]
        gradients += [grad_BH.sum(dim=0), kernels.product(grad_BH.t(), x_BI)]
        if kept:
            grad_BH = kernels.product(grad_BH, weight)
    return gradients[::-1]


def lowest_with_slope(q: TwinQ, states_BS: Tensor, actions_BA: Tensor) -> tuple[Tensor, Tensor]:
    """Return min_i Q_i, [B], and its gradient by the actions, [B, A]; under `torch.no_grad` only."""
    pairs_BP, actions = torch.cat([states_BS, actions_BA], dim=-1), slice(states_BS.shape[-1], None)
    (q_1_B1, slope_1_BA), (q_2_B1, slope_2_BA) = (with_slope(net, pairs_BP, actions) for net in (q.q_1, q.q_2))
    return torch.minimum(q_1_B1, q_2_B1).squeeze(-1), torch.where(q_1_B1 <= q_2_B1, slope_1_BA, slope_2_BA)


class CachedTimeNet:
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
