"""Stage 1: a diffusion model of the behaviour policy mu(a|s).

min_phi E || eps_phi(a_t, s, t) - eps ||^2 / alpha_t^2,   a_t = alpha_t a_0 + sigma_t eps          [M5]
      = E || F(a_t, s, t) - (alpha_t eps - sigma_t a_0) ||^2     for eps_phi = sigma_t a_t + alpha_t F
"""

import dataclasses

import torch
from torch import Tensor, nn

from aepo import kernels
from aepo.config import BehaviorConfig
from aepo.data.transitions import Pairs, Transitions
from aepo.diffusion import sampler
from aepo.diffusion.sampler import Grid, Predict
from aepo.diffusion.schedule import alpha_sigma, draw_times
from aepo.networks import Prepared, TimeNet
from aepo.parallel import share
from aepo.stages import Stage, States, Step
from aepo.stages.optim import Adam, Ema, Metrics

SUPPORT_SOLVER_STEPS = 15
SUPPORT_CHUNK = 65_536
"""Actions sampled at once."""


class NoiseNet(TimeNet):
    """eps_phi(a_t, s, t) = sigma_t a_t + alpha_t F(a_t, s, t), F the network (arXiv 2202.00512).

    What the stages need of it is the posterior mean (a_t - sigma_t eps) / alpha_t [M9], which then is
    alpha_t a_t - sigma_t F: an error of F is not divided by alpha_t, 0.007 at t = 1.
    """

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__(state_dim, action_dim, action_dim, hidden_size=hidden_size, num_layers=num_layers)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return the predicted noise, [B, A]."""
        alpha_B, sigma_B = alpha_sigma(t_B)
        velocity_BA: Tensor = super().forward(a_t_BA, states_BS, t_B)
        return sigma_B[:, None] * a_t_BA + alpha_B[:, None] * velocity_BA


class VarianceNet(TimeNet):
    """The posterior's variance per action dimension, v_t(a_t, s), in (0, 1): actions lie in [-1, 1]  [M10]."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__(state_dim, action_dim, action_dim, hidden_size=hidden_size, num_layers=num_layers)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return variances, [B, A]."""
        return super().forward(a_t_BA, states_BS, t_B).sigmoid()


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


@torch.no_grad()
def gradients(state: BehaviorState, batch: Pairs) -> tuple[list[Tensor], Metrics]:
    """Return those of the squared error of F, per action dimension, by the optimizer's parameters, and metrics  [M5].

    A learned variance adds its own squared error, to (a_0 - m_t)^2  [M10].
    """
    generator = state.generator
    actions_BA = batch.actions_BA
    t_B = draw_times(len(actions_BA), generator)
    eps_BA = torch.randn(actions_BA.shape, generator=generator, device=actions_BA.device)
    batch, t_B, eps_BA = share(batch), share(t_B), share(eps_BA)
    actions_BA = batch.actions_BA
    alpha_B1, sigma_B1 = (part_B.unsqueeze(1) for part_B in alpha_sigma(t_B))
    a_t_BA = alpha_B1 * actions_BA + sigma_B1 * eps_BA
    inputs_BI = state.net.inputs(a_t_BA, batch.states_BS, t_B)
    target_BA = alpha_B1 * eps_BA - sigma_B1 * actions_BA
    error_BA, found = state.net.body.fit(inputs_BI, target_BA)
    if not isinstance(state.variance, VarianceNet):
        return found, lambda: {"loss": error_BA.square().mean()}
    mean_BA = (alpha_B1 * a_t_BA - sigma_B1 * (error_BA + target_BA)).clamp(-1.0, 1.0)
    logit_BA, pull_variance = state.variance.body.vjp(inputs_BI)
    variance_BA = logit_BA.sigmoid()
    excess_BA = variance_BA - (actions_BA - mean_BA).square()
    found += pull_variance(2.0 / error_BA.numel() * excess_BA * variance_BA * (1.0 - variance_BA))
    return found, lambda: {
        "loss": error_BA.square().mean() + excess_BA.square().mean(),
        "variance_loss": excess_BA.square().mean(),
    }


def train_step(state: BehaviorState, config: BehaviorConfig, data: Transitions) -> Metrics:
    """Take one gradient step and return its metrics."""
    index_B = data.draw_rows(config.batch_size, state.generator)
    found, metrics = gradients(state, data.take_pairs(index_B))
    state.optimizer.step_along(found)
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
    prepared = Prepared(net, states_BS, grid.t)

    def predict(a_t_BA: Tensor, i: int) -> Tensor:
        return torch.add(grid.alpha[i] * a_t_BA, prepared.output(a_t_BA, i), alpha=-grid.sigma[i])

    return predict


def make_step(config: BehaviorConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of stage 1."""
    return lambda: train_step(states["behavior"], config, data)


STAGE = Stage(name="behavior", start=start, step=make_step)
