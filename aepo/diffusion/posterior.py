"""The Gaussian posterior q(a_0 | a_t, s) ~= N(m_t, v_t I), its mean [M9] and its variance [M10]."""

import torch
from torch import Tensor

from aepo.diffusion.schedule import T_MIN, alpha_sigma


def posterior_mean(a_t_BA: Tensor, eps_BA: Tensor, t_B: Tensor) -> Tensor:
    """Return m_t = (a_t - sigma_t eps) / alpha_t, clipped to the action range [-1, 1]  [M9]."""
    alpha_B, sigma_B = alpha_sigma(t_B)
    return ((a_t_BA - sigma_B[:, None] * eps_BA) / alpha_B[:, None]).clamp(-1.0, 1.0)


def time_grid(num_times: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the equidistant times in [T_MIN, 1] at which the variance table is measured, [K]."""
    return torch.linspace(T_MIN, 1.0, num_times, device=device)


def residual_variance(mean_KNA: Tensor, actions_NA: Tensor) -> Tensor:
    """Return v_t = E||a_0 - m_t||^2 / A for each of K times, in [0, variance of the actions]  [M10].

    The well-conditioned form: for an exact noise net it equals `analytic_variance`, whose division by
    alpha_t^2 loses all digits at high noise.

    Args:
        mean_KNA: posterior means of N noised data actions at K times.
        actions_NA: the data actions that were noised.
    """
    v_K = (actions_NA - mean_KNA).square().mean(dim=(1, 2))
    return v_K.clamp(min=0.0, max=float(actions_NA.var(dim=0, correction=0).mean()))


def analytic_variance(eps_KNA: Tensor, t_K: Tensor) -> Tensor:
    """Return v_t = sigma_t^2 / alpha_t^2 (1 - E||eps||^2 / A), A-DPM's form (arXiv 2201.06503), unclipped [K]."""
    alpha_K, sigma_K = alpha_sigma(t_K)
    return (sigma_K / alpha_K).square() * (1.0 - eps_KNA.square().mean(dim=(1, 2)))


def interpolate_variance(v_K: Tensor, t_B: Tensor) -> Tensor:
    """Return v at times t from the table over `time_grid(K)`, linear between its entries, [B]."""
    place_B = (t_B - T_MIN) / (1 - T_MIN) * (len(v_K) - 1)
    left_B = place_B.floor().clamp(0, len(v_K) - 2).long()
    return torch.lerp(v_K[left_B], v_K[left_B + 1], (place_B - left_B).clamp(0.0, 1.0))
