"""Stage 1: a diffusion model of the behaviour policy mu(a|s).

min_phi E || eps_phi(alpha_t a_0 + sigma_t eps, s, t) - eps ||^2 / alpha_t^2       [M5]
"""

import dataclasses

import torch
from torch import Tensor, nn

from aepo.config import BehaviorConfig
from aepo.data.transitions import Batch, Transitions
from aepo.diffusion import posterior, sampler
from aepo.diffusion.sampler import Grid, Predict
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.networks import Prepared, TimeNet
from aepo.parallel import share
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
        velocity_BA = super().forward(a_t_BA, states_BS, t_B)
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


def loss(state: BehaviorState, batch: Batch) -> tuple[Tensor, Metrics]:
    """Return the squared error of the predicted noise over alpha_t^2, per action dimension, and metrics  [M5].

    The weight makes it the squared error of NoiseNet's F, the same at all t for an ignorant network. A learned
    variance adds its own squared error, to (a_0 - m_t)^2  [M10].
    """
    generator = state.generator
    actions_BA = batch.actions_BA
    t_B = draw_times(len(actions_BA), generator)
    eps_BA = torch.randn(actions_BA.shape, generator=generator, device=actions_BA.device)
    batch, t_B, eps_BA = share(batch), share(t_B), share(eps_BA)
    actions_BA = batch.actions_BA
    a_t_BA = add_noise(actions_BA, t_B, eps_BA)
    predicted_BA: Tensor = state.net(a_t_BA, batch.states_BS, t_B)
    alpha_B, _ = alpha_sigma(t_B)
    noise_loss = ((predicted_BA - eps_BA) / alpha_B[:, None]).square().mean()
    if not state.has_variance:
        return noise_loss, dict
    residual_BA = actions_BA - posterior.posterior_mean(a_t_BA, predicted_BA.detach(), t_B)
    variance_loss = (state.variance(a_t_BA, batch.states_BS, t_B) - residual_BA.square()).square().mean()
    return noise_loss + variance_loss, lambda: {"variance_loss": variance_loss.detach()}


def train_step(state: BehaviorState, config: BehaviorConfig, data: Transitions) -> Metrics:
    """Take one gradient step and return its metrics."""
    value, metrics = loss(state, data.draw(config.batch_size, state.generator))
    state.optimizer.step_on(value)
    state.ema.update()
    state.step += 1
    return lambda: {"loss": value.detach(), **metrics()}


def sample_support(state: BehaviorState, states_MS: Tensor, num_actions: int, generator: torch.Generator) -> Tensor:
    """Return actions of the behaviour policy in each of M states, [M, num_actions, A]."""
    grid = sampler.make_grid(SUPPORT_SOLVER_STEPS, device=states_MS.device)
    parts = []
    for part_BS in torch.split(states_MS.repeat_interleave(num_actions, dim=0), SUPPORT_CHUNK):
        shape = (len(part_BS), state.net.action_dim)
        start_BA = torch.randn(shape, generator=generator, device=part_BS.device)
        parts.append(sampler.solve(predict_mean(state.ema.net, part_BS, grid), start_BA, grid))
    return torch.cat(parts).view(len(states_MS), num_actions, -1)


@torch.no_grad()
def predict_mean(net: NoiseNet, states_BS: Tensor, grid: Grid) -> Predict:
    """Return the posterior mean in these states for the solver, alpha_t a_t - sigma_t F, not clipped  [M9]."""
    prepared = Prepared(net, states_BS, grid.t)

    def predict(a_t_BA: Tensor, i: int) -> Tensor:
        return torch.add(grid.alpha[i] * a_t_BA, prepared.output(a_t_BA, i), alpha=-grid.sigma[i])

    return predict
