"""The noising of actions: variance-preserving SDE with a linear rate [M2].

a_t = alpha_t a_0 + sigma_t eps,   eps ~ N(0, I),   t in [T_MIN, 1]
"""

import torch
from torch import Tensor

BETA_0 = 0.1
BETA_1 = 20.0
T_MIN = 1e-3
"""Smallest time that is trained and sampled; below it sigma_t is too small to divide by."""


def log_alpha(t_B: Tensor) -> Tensor:
    """Return log alpha_t = -t^2 (b1 - b0) / 4 - t b0 / 2  [M2]."""
    return t_B * (-0.25 * (BETA_1 - BETA_0) * t_B - 0.5 * BETA_0)


def alpha_sigma(t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha_t, sigma_t), both in (0, 1), with alpha_t^2 + sigma_t^2 = 1  [M2]."""
    log_alpha_B = log_alpha(t_B)
    return log_alpha_B.exp(), torch.expm1(log_alpha_B + log_alpha_B).neg().sqrt()


def log_snr_half(t_B: Tensor) -> Tensor:
    """Return lambda_t = log(alpha_t / sigma_t), the solver's clock (DPM-Solver, arXiv 2211.01095)."""
    log_alpha_B = log_alpha(t_B)
    return log_alpha_B - 0.5 * (-torch.expm1(2 * log_alpha_B)).log()


def time_of(log_snr_half_B: Tensor) -> Tensor:
    """Return the t at which log(alpha_t / sigma_t) has these values: the inverse of `log_snr_half`, [B]."""
    log_alpha_B = -0.5 * torch.nn.functional.softplus(-2.0 * log_snr_half_B)
    a, b = 0.25 * (BETA_1 - BETA_0), 0.5 * BETA_0  # a t^2 + b t + log alpha = 0
    return (-b + (b * b - 4.0 * a * log_alpha_B).sqrt()) / (2.0 * a)


def draw_times(batch_size: int, generator: torch.Generator) -> Tensor:
    """Return times t ~ U[T_MIN, 1], [B], on the generator's device."""
    t_B = torch.rand(batch_size, generator=generator, device=generator.device)
    return T_MIN + (1 - T_MIN) * t_B


def add_noise(actions_BA: Tensor, t_B: Tensor, eps_BA: Tensor) -> Tensor:
    """Return a_t = alpha_t a_0 + sigma_t eps  [M2]."""
    alpha_B, sigma_B = alpha_sigma(t_B)
    return alpha_B[:, None] * actions_BA + sigma_B[:, None] * eps_BA
