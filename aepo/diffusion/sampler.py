"""Sampling from the guided policy: DPM-Solver++, data prediction, multistep (arXiv 2211.01095) [M13].

    x_0 = m_t + w sigma_t^2 / alpha_t grad E_t(a_t),   clipped to [-1, 1]

is [M4] written for data prediction: eps_guided = eps - w sigma_t grad E, put into Tweedie's formula [M9].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aepo.diffusion.schedule import T_MIN, alpha_sigma, log_snr_half, time_of

Field = Callable[[Tensor, Tensor], Tensor]
"""(a_t [B, A], t [B]) -> [B, A]: the noise prediction, or the gradient of the energy already times w."""

Predict = Callable[[Tensor, int], Tensor]
"""(a_t [B, A], number of the solver's step) -> x_0 [B, A], before it is clipped."""


class Grid(NamedTuple):
    """What the solver needs of the schedule, computed once for all calls."""

    t: Tensor
    """Times from 1 to T_MIN, [N + 1]."""
    alpha: list[float]
    sigma: list[float]
    steps: list[tuple[float, float, float]]
    """Factors of each of N steps: ratio sigma_next / sigma; gain -alpha_next expm1(-h), h = step in log(alpha / sigma);
    and 1 / (2 r), the weight of the last difference of x_0, 0 in a step of first order."""


def make_grid(num_steps: int, *, order: int = 2, device: torch.device | str = "cpu") -> Grid:
    """Return the solver's constants on `num_steps` equal steps of log(alpha / sigma), t from 1 to T_MIN.

    Equal steps of t leave the last ones so unequal on the solver's clock that at 15 steps order 2 is worse than
    order 1 (measured on Gaussians, docs/decisions/method.md).

    Raises:
        ValueError: if num_steps < 1 or order is not 1 or 2.
    """
    if num_steps < 1 or order not in (1, 2):
        raise ValueError(f"want num_steps >= 1 and order 1 or 2, got {num_steps} and {order}")
    ends = log_snr_half(torch.tensor([1.0, T_MIN], dtype=torch.float64))
    t = time_of(torch.linspace(float(ends[0]), float(ends[1]), num_steps + 1, dtype=torch.float64))
    alpha, sigma = alpha_sigma(t)
    h = log_snr_half(t).diff()
    extra = torch.zeros_like(h)
    if order == 2:
        extra[1:] = 0.5 * h[1:] / h[:-1]
    constants = torch.stack([sigma[1:] / sigma[:-1], -alpha[1:] * torch.expm1(-h), extra], dim=1)
    steps = [(ratio, gain, more) for ratio, gain, more in constants.tolist()]
    return Grid(t.to(device, torch.float32), alpha.tolist(), sigma.tolist(), steps)


def sample(noise: Field, guide: Field | None, start_BA: Tensor, grid: Grid, *, clip: bool = True) -> Tensor:
    """Return actions [B, A] at time T_MIN, from standard normal `start_BA` at time 1.

    Args:
        noise: eps_phi(a_t, t).
        guide: w grad_{a_t} E(a_t, t), or None for the behaviour policy. It may use autograd inside.
        start_BA: draws of N(0, I).
        grid: from `make_grid`; its device and the tensors' must agree.
        clip: clip x_0 to the action range [-1, 1] at every step (off in tests on unbounded spaces).
    """

    def predict(a_t_BA: Tensor, i: int) -> Tensor:
        t_B = grid.t[i].expand(len(a_t_BA))
        x_0_BA = (a_t_BA - grid.sigma[i] * noise(a_t_BA, t_B)) / grid.alpha[i]
        if guide is None:
            return x_0_BA
        return x_0_BA + grid.sigma[i] ** 2 / grid.alpha[i] * guide(a_t_BA, t_B)

    return solve(predict, start_BA, grid, clip=clip)


@torch.no_grad()
def solve(predict: Predict, start_BA: Tensor, grid: Grid, *, clip: bool = True) -> Tensor:
    """Return actions as `sample` does, of networks already put together  [M13]."""
    a_t_BA = previous_BA = start_BA
    for i, (ratio, gain, extra) in enumerate(grid.steps):
        x_0_BA = predict(a_t_BA, i)
        if clip:
            x_0_BA = x_0_BA.clamp(-1.0, 1.0)
        mixed_BA = torch.lerp(previous_BA, x_0_BA, 1.0 + extra) if extra else x_0_BA
        a_t_BA = torch.add(gain * mixed_BA, a_t_BA, alpha=ratio)
        previous_BA = x_0_BA
    return a_t_BA.clamp(-1.0, 1.0) if clip else a_t_BA
