"""How far guidance goes, in nats, and how it is kept within a budget  [M16].

    KL(guided || behaviour) = 1/2 ∫ |d_t|^2 dSNR,   SNR = alpha_t^2 / sigma_t^2,   d_t = what guidance adds to m_t

A solver knows d_t at its N steps only. From step i on the posterior narrows as v / (1 + v (SNR - SNR_i)), v that of
step i, and d_t with it, which is exact for Gaussian actions and a linear Q; so a step costs

    1/2 |d_i|^2 x / (1 + v_i x),   x = SNR_{i+1} - SNR_i.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aepo.diffusion.sampler import Grid, Predict

CAP = 3.0
"""Nats that one action may cost, as a multiple of what actions may cost on the mean."""
NUM_HALVINGS = 30
"""Halvings of the range of scales: the scale is then known to 1 part in 10^9."""


Shift = Callable[[Tensor, Tensor, int], Tensor]
"""(a_t [B, A], m_t [B, A], number of the solver's step) -> d_t [B, A], but for a factor of the step."""


def guided(mean: Predict, shift: Shift, factors_N: list[float], meter: "Meter | None") -> Predict:
    """Return m_t + d_t, d_t = factor times shift, held to the meter  [M4, M16]."""

    def predict(a_t_BA: Tensor, i: int) -> Tensor:
        mean_BA = mean(a_t_BA, i)
        shift_BA = shift(a_t_BA, mean_BA, i)
        if meter is not None:
            shift_BA = meter.bound(shift_BA, factors_N[i], i)
        return torch.add(mean_BA, shift_BA, alpha=factors_N[i])

    return predict


def snr(grid: Grid) -> Tensor:
    """Return alpha_t^2 / sigma_t^2 at the N + 1 times of a solver, in double precision."""
    pairs = zip(grid.alpha, grid.sigma, strict=True)
    return torch.tensor([(alpha / sigma) ** 2 for alpha, sigma in pairs], dtype=torch.float64)


def nat_rates(grid: Grid, variance_NA: Tensor) -> Tensor:
    """Return what |d_i|^2 costs in nats at each of N steps and in each action dimension, [N, A]  [M16].

    Args:
        grid: the solver's steps.
        variance_NA: v of the posterior at their beginnings [M10].
    """
    steps_N1 = snr(grid).diff()[:, None].to(variance_NA)
    return 0.5 * steps_N1 / (1.0 + variance_NA * steps_N1)


def shares(grid: Grid, variance: float) -> list[float]:
    """Return the share of what is left of a budget that each step may spend: 1 at the last one.

    Of the whole, a step gets what it adds to log(1 + v SNR), what is known of an action of variance v.
    """
    gains_N = torch.log1p(variance * snr(grid)).diff()
    shares_N: list[float] = (gains_N / gains_N.flip(0).cumsum(0).flip(0)).tolist()
    return shares_N


def variances(mean: Predict, actions_BA: Tensor, noise_BA: Tensor, grid: Grid) -> Tensor:
    """Return v of the posterior at the beginning of each step, E (a_0 - m_t)^2 over noised data actions, [N, A]  [M10].

    Args:
        mean: the posterior mean in the states of the actions, not clipped.
        actions_BA: actions of the data.
        noise_BA: standard normal draws, used at every step.
        grid: the solver's steps.
    """
    noised = [
        mean(alpha * actions_BA + sigma * noise_BA, i).clamp(-1.0, 1.0)
        for i, (alpha, sigma) in enumerate(zip(grid.alpha[:-1], grid.sigma[:-1], strict=True))
    ]
    return torch.stack([(each_BA - actions_BA).square().mean(dim=0) for each_BA in noised]).clamp(min=1e-9)


class Meter:
    """What guidance has cost each of B actions so far; with a cap it holds every step to its share.

    One serves one call of the solver.
    """

    def __init__(self, budget: "Budget", num_actions: int, *, sizes: bool = False):
        """Begin with nothing spent; with `sizes` it also notes how far each step went."""
        self._budget, self._sizes = budget, sizes
        self.spent_B = budget.rates_NA.new_zeros(num_actions)
        self.deviations: list[float] = []
        """What each step added, sqrt(mean_a d_a^2 / v_a) deviations of the posterior, the median over the actions."""

    @property
    def variance_NA(self) -> Tensor:
        """V of the posterior at the beginning of each step."""
        return self._budget.variance_NA

    def bound(self, shift_BA: Tensor, factor: float, step: int) -> Tensor:
        """Return a shift, shortened where factor times shift, which guidance adds, costs more than its share."""
        budget = self._budget
        cost_B = shift_BA.square() @ budget.rates_NA[step] * factor**2
        if math.isfinite(budget.cap):
            allowed_B = budget.shares[step] * (budget.cap - self.spent_B).clamp(min=0.0)
            left_B = (allowed_B / cost_B.clamp(min=1e-30)).clamp(max=1.0)
            shift_BA, cost_B = shift_BA * left_B.sqrt()[:, None], cost_B * left_B
        self.spent_B = self.spent_B + cost_B
        if self._sizes:
            far_B = (shift_BA.square() * factor**2 / budget.variance_NA[step]).mean(dim=1).sqrt()
            self.deviations.append(float(far_B.median()))
        return shift_BA


class Budget(NamedTuple):
    """What guidance costs and may cost, by states of the data."""

    scale: float
    """Guidance scale w."""
    cap: float
    """Nats that one action may cost; inf = no bound."""
    variance_NA: Tensor
    """v of the posterior at the beginning of each step."""
    rates_NA: Tensor
    """What guidance costs there, from `nat_rates`."""
    shares: list[float]

    @staticmethod
    def of(grid: Grid, variance_NA: Tensor, *, scale: float, nats: float) -> "Budget":
        """Return a budget of CAP times `nats` for each action; of 0 nats there is no bound."""
        share_of_steps = shares(grid, float(variance_NA[0].mean()))
        return Budget(scale, CAP * nats or math.inf, variance_NA, nat_rates(grid, variance_NA), share_of_steps)

    def meter(self, num_actions: int, *, sizes: bool = False) -> Meter:
        """Return a meter for one call of the solver."""
        return Meter(self, num_actions, sizes=sizes)


def scale_within(nats: float, scale: float, cost_of: Callable[[float], float]) -> float:
    """Return the guidance scale, or the smaller one at which actions cost `nats` on the mean.

    Args:
        nats: the budget, > 0.
        scale: the largest that is asked for.
        cost_of: mean cost of actions guided by a scale, rising with it.
    """
    low, high = 0.0, scale
    if cost_of(high) <= nats:
        return scale
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(middle) < nats else (low, middle)
    return low
