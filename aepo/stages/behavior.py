"""Stage 1: a diffusion model of the behaviour policy mu(a|s), and the variance of its posterior.

eps_phi:  min E || eps_phi(a_t, s, t) - eps ||^2 / alpha_t^2,   a_t = alpha_t a_0 + sigma_t eps      [M5]
v:        min E || v(a_t, s, t) - (a_0 - m_t)^2 ||^2,           m_t = (a_t - sigma_t eps_phi) / alpha_t   [M9, M10]
"""

import dataclasses

import torch
from torch import Tensor, nn

from aepo import kernels
from aepo.backward import CachedTimeNet
from aepo.config import BehaviorConfig
from aepo.data.transitions import Pairs, Transitions
from aepo.diffusion import sampler
from aepo.diffusion.networks import NoiseNet, VarianceNet
from aepo.diffusion.posterior import posterior_mean
from aepo.diffusion.sampler import Grid, Predict
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.parallel import share
from aepo.stages import Stage, States, Step, fast
from aepo.stages.optim import Adam, Ema, Loss, Metrics


def loss(net: NoiseNet, variance: nn.Module, batch: Pairs, t_B: Tensor, eps_BA: Tensor) -> Loss:
    """Return E ||eps_phi(a_t, s, t) - eps||^2 / alpha_t^2 per action dimension, a_t = alpha_t a_0 + sigma_t eps  [M5].

    A learned variance adds E ||v(a_t, s, t) - (a_0 - m_t)^2||^2  [M10].
    """
    alpha_B, _ = alpha_sigma(t_B)
    a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
    predicted_BA = net(a_t_BA, batch.states_BS, t_B)
    noise_loss = ((predicted_BA - eps_BA) / alpha_B[:, None]).square().mean()
    if not isinstance(variance, VarianceNet):
        return noise_loss, lambda: {"loss": noise_loss}
    squares_BA = (batch.actions_BA - posterior_mean(a_t_BA, predicted_BA.detach(), t_B)).square()
    variance_loss = (variance(a_t_BA, batch.states_BS, t_B) - squares_BA).square().mean()
    return noise_loss + variance_loss, lambda: {"loss": noise_loss + variance_loss, "variance_loss": variance_loss}


SUPPORT_SOLVER_STEPS = 15
NUM_CHECKED = 2048
"""Held-out transitions of which a loss is measured."""
SUPPORT_CHUNK = 65_536
"""Actions sampled at once."""


@dataclasses.dataclass
class BehaviorState:
    """Everything of stage 1 that a checkpoint holds."""

    net: NoiseNet
    ema: Ema[NoiseNet]
    variance: nn.Module
    """VarianceNet, or Identity where the variance is a table over t that stage 3 measures."""
    optimizer: Adam
    generator: torch.Generator
    step: int = 0

    @property
    def has_variance(self) -> bool:
        """Whether `variance` was learned."""
        return isinstance(self.variance, VarianceNet)


def start(config: BehaviorConfig, data: Transitions, generator: torch.Generator) -> BehaviorState:
    """Return stage 1 before its first step; weights are drawn from torch's global generator."""
    size = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
    net = NoiseNet(data.state_dim, data.action_dim, **size).to(generator.device)
    learned = config.variance == "learned"
    variance = VarianceNet(data.state_dim, data.action_dim, **size).to(generator.device) if learned else nn.Identity()
    optimizer = Adam([*net.parameters(), *variance.parameters()], lr=config.learning_rate, num_steps=config.steps)
    return BehaviorState(net, Ema(net, config.ema_decay), variance, optimizer, generator)


def train_step(state: BehaviorState, config: BehaviorConfig, data: Transitions) -> Metrics:
    """Take one gradient step and return its metrics."""
    generator = state.generator
    batch = data.take_pairs(data.draw_rows(config.batch_size, generator))
    t_B = draw_times(config.batch_size, generator)
    eps_BA = torch.randn(batch.actions_BA.shape, generator=generator, device=batch.actions_BA.device)
    gradients, metrics = fast.behavior(state.net, state.variance, share(batch), share(t_B), share(eps_BA))
    state.optimizer.step_along(gradients)
    state.ema.update()
    state.step += 1
    return metrics


def sample_support(state: BehaviorState, states_MS: Tensor, num_actions: int, generator: torch.Generator) -> Tensor:
    """Return actions of the behaviour policy in each of M states, [M, num_actions, A]."""
    grid = sampler.make_grid(SUPPORT_SOLVER_STEPS, device=states_MS.device)
    parts = []
    for part_BS in torch.split(states_MS.repeat_interleave(num_actions, dim=0), SUPPORT_CHUNK):
        shape = (len(part_BS), state.net.action_dim)
        start_BA = torch.randn(shape, generator=generator, device=part_BS.device)
        for states_BS, begin_BA in kernels.blocks(part_BS, start_BA):
            parts.append(sampler.solve(predict_mean(state.ema.net, states_BS, grid), begin_BA, grid))
    return torch.cat(parts).view(len(states_MS), num_actions, -1)


@torch.no_grad()
def predict_mean(net: NoiseNet, states_BS: Tensor, grid: Grid) -> Predict:
    """Return the posterior mean in these states for the solver, alpha_t a_t - sigma_t F, not clipped  [M9]."""
    cached = CachedTimeNet(net, states_BS, grid.t)

    def predict(a_t_BA: Tensor, i: int) -> Tensor:
        return torch.add(grid.alpha[i] * a_t_BA, cached.output(a_t_BA, i), alpha=-grid.sigma[i])

    return predict


def make_step(config: BehaviorConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of stage 1."""
    return lambda: train_step(states["behavior"], config, data)


def make_check(config: BehaviorConfig, states: States, held_out: Transitions) -> Step:  # noqa: ARG001
    """Return the function that measures the loss of the averaged network on held-out actions, always the same noise."""
    state, draws = states["behavior"], torch.Generator(held_out.rows_ND.device).manual_seed(0)
    batch = held_out.sample(NUM_CHECKED)
    t_B = draw_times(len(batch.actions_BA), draws)
    eps_BA = torch.randn(batch.actions_BA.shape, generator=draws, device=t_B.device)

    def check() -> Metrics:
        value, _ = loss(state.ema.net, nn.Identity(), batch, t_B, eps_BA)
        return lambda: {"held_out_loss": value}

    return check


STAGE = Stage(name="behavior", start=start, step=make_step, check=make_check, acts=True)
