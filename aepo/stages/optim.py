"""What the three stages share: fused Adam with a cosine to zero, and averages of weights."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aepo import parallel


class Adam(torch.optim.Adam):
    """Adam, all parameters in one fused call; the learning rate falls to 0 by a cosine over `num_steps`."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, num_steps: int):
        """`lr` is the rate of the first step."""
        super().__init__(parameters, lr=lr, fused=True)
        self.defaults["num_steps"] = num_steps
        self.param_groups[0] |= {"position": 0, "num_steps": num_steps, "first_lr": lr}

    def step_on(self, loss: Tensor) -> None:
        """Back-propagate a scalar and take one step."""
        group: dict[str, Any] = self.param_groups[0]
        group["lr"] = group["first_lr"] * 0.5 * (1 + math.cos(math.pi * group["position"] / group["num_steps"]))
        self.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parallel.average_gradients(group["params"])
        self.step()
        group["position"] += 1


class Ema(nn.Module):
    """A copy of a network whose weights follow it: w <- w + (1 - decay) (w_net - w), without gradients."""

    def __init__(self, net: nn.Module, decay: float):
        """Starts equal to `net`."""
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move every weight towards `net`'s."""
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1.0 - self.decay)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what the averaged network returns."""
        return self.net(*inputs)  # type: ignore[no-any-return]
