"""What the stages share: metrics, fused Adam with a cosine to zero, and averages of weights."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from aepo import parallel

Metrics = Callable[[], dict[str, Tensor]]
"""Metrics of one step, on the device, computed when they are asked for: those of most steps nobody logs."""
Loss = tuple[Tensor, Metrics]
"""A scalar with its graph, and metrics, `loss` among them: what the functions return with which stage files open."""
Gradients = tuple[list[Tensor], Metrics]
"""A loss's gradients by a network's parameters, in their order, and its metrics: what training uses."""
MAX_WEIGHT = 100.0
"""Exponential weights of samples are cut here, so that one outlier does not own the step."""
Net = TypeVar("Net", bound=nn.Module)


class Adam(torch.optim.Adam):
    """Adam, all parameters in one fused call; the learning rate falls to 0 by a cosine over `num_steps`."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, num_steps: int):
        """`lr` is the rate of the first step."""
        super().__init__(parameters, lr=lr, fused=True)
        self.defaults["num_steps"] = num_steps
        self.param_groups[0] |= {"position": 0, "num_steps": num_steps, "first_lr": lr}
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._gather()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of the same parameters."""
        super().load_state_dict(state_dict)
        self._gather()

    def _gather(self) -> None:
        states = [self.state[parameter] for parameter in self.param_groups[0]["params"]]
        self._means, self._squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        self._step: Tensor = states[0]["step"]  # one for all: thirty to count up cost as much as the rest
        for state in states:
            state["step"] = self._step

    def step_along(self, gradients: list[Tensor]) -> None:
        """Take one step, given a gradient for each parameter; `torch.optim.Adam.step` costs as much again in Python."""
        group: dict[str, Any] = self.param_groups[0]
        group["lr"] = group["first_lr"] * 0.5 * (1 + math.cos(math.pi * group["position"] / group["num_steps"]))
        parallel.average(gradients)
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            self._step += 1
            torch._fused_adam_(
                group["params"],
                gradients,
                self._means,
                self._squares,
                [],
                [self._step] * len(gradients),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        group["position"] += 1


def gradients_of(loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of a scalar by autograd; 0 for a parameter on which it does not depend."""
    found = torch.autograd.grad(loss, list(parameters), materialize_grads=True)
    return [gradient.contiguous() for gradient in found]  # the fused Adam looks at no strides


class Ema(nn.Module, Generic[Net]):
    """A copy of a network whose weights follow it: w <- w + (1 - decay) (w_net - w), without gradients."""

    def __init__(self, net: Net, decay: float):
        """Starts equal to `net`."""
        super().__init__()
        self.net: Net = copy.deepcopy(net).requires_grad_(False)
        self.decay = decay
        self._weights: list[Tensor] = list(self.net.parameters())
        self._followed: list[Tensor] = list(net.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Move every weight towards that of the network followed."""
        torch._foreach_lerp_(self._weights, self._followed, 1.0 - self.decay)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what the averaged network returns."""
        return self.net(*inputs)  # type: ignore[no-any-return]
