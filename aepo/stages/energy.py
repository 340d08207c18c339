"""Stage 3: the intermediate energy in closed form, and a network trained on it.

    E_t(s, a_t) = log E[exp(beta Q(s, a_0))],   a_0 ~ q(a_0 | a_t, s) ~= N(m_t, v_t I)        [M3, M9, M10]
                ~= beta (Q(s, c) + g.(m_t - c)) + beta^2 v_t |g|^2 / 2,   g = grad_a Q(s, c)   [M11]
                 = beta f_1(s, a_t, t) + beta^2 f_2(s, a_t, t)                                 [M12]

The network has the two heads f_1 and f_2, so beta is chosen after training. Q here is (Q - V) / scale.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from aepo.config import EnergyConfig
from aepo.data.transitions import Batch, Transitions
from aepo.diffusion import posterior
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.networks import TimeNet
from aepo.stages.behavior import BehaviorState
from aepo.stages.critic import CriticState, advantage_scale
from aepo.stages.optim import Adam, Ema

NUM_VARIANCE_TIMES = 64
NUM_VARIANCE_SAMPLES = 4096

Value = Callable[[Tensor, Tensor], Tensor]
"""(states [B, S], actions [B, A]) -> scaled Q [B], differentiable in the actions."""


class EnergyNet(TimeNet):
    """The two heads f_1 and f_2 [M12], as functions of (alpha_t a_t, s, t).

    E_t forgets a_t as alpha_t falls, and the sampler divides grad E_t by alpha_t [M13]: with this input the
    gradient has the factor alpha_t by construction, and no error of the network is blown up at high noise.
    """

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """Two outputs."""
        super().__init__(state_dim, action_dim, 2, hidden_size=hidden_size, num_layers=num_layers)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return f_1 and f_2, [B, 2]."""
        alpha_B, _ = alpha_sigma(t_B)
        return super().forward(alpha_B[:, None] * a_t_BA, states_BS, t_B)


@dataclasses.dataclass
class EnergyState:
    """Everything of stage 3 that a checkpoint holds."""

    net: EnergyNet
    ema: Ema
    optimizer: Adam
    generator: torch.Generator
    q_scale: Tensor
    """Standard deviation of Q - V over the data; Q is divided by it."""
    variance_K: Tensor
    """v_t over `posterior.time_grid(K)`  [M10]."""
    step: int = 0


def start(config: EnergyConfig, data: Transitions, generator: torch.Generator) -> EnergyState:
    """Return stage 3 before its first step; weights are drawn from torch's global generator."""
    size = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
    net = EnergyNet(data.state_dim, data.action_dim, **size).to(generator.device)
    return EnergyState(
        net=net,
        ema=Ema(net, config.ema_decay),
        optimizer=Adam(net.parameters(), lr=config.learning_rate, num_steps=config.steps),
        generator=generator,
        q_scale=torch.ones((), device=generator.device),
        variance_K=torch.zeros(NUM_VARIANCE_TIMES, device=generator.device),
    )


def measure(state: EnergyState, data: Transitions, behavior: BehaviorState, critic: CriticState) -> None:
    """Measure what stage 3 takes from the trained stages before its first step: Q's scale and v_t."""
    state.q_scale = advantage_scale(critic, data)
    state.variance_K = measure_variance(behavior, data, state.generator)


@torch.no_grad()
def measure_variance(behavior: BehaviorState, data: Transitions, generator: torch.Generator) -> Tensor:
    """Return the table of v_t over K equidistant times, measured on noised data actions, [K]  [M10]."""
    batch = data.draw(NUM_VARIANCE_SAMPLES, generator)
    t_K = posterior.time_grid(NUM_VARIANCE_TIMES, generator.device)
    mean_KNA = torch.stack([_noised_mean(behavior, batch, t.expand(len(batch.actions_BA)), generator)[1] for t in t_K])
    return posterior.residual_variance(mean_KNA, batch.actions_BA)


def scaled_value(critic: CriticState, energy: EnergyState) -> Value:
    """Return (s, a) -> (min_i Q_i(s, a) - V(s)) / scale; V changes no policy, the scale gives beta its unit."""

    def value(states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        with torch.no_grad():
            v_B = critic.v(states_BS)
        scaled_B: Tensor = (critic.q(states_BS, actions_BA).amin(dim=0) - v_B) / energy.q_scale
        return scaled_B

    return value


def targets(
    value: Value, states_BS: Tensor, point_BA: Tensor, mean_BA: Tensor, variance_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the targets of both heads, f_1 and f_2, each [B], without gradient  [M11, M12].

    Exact where Q is linear in the action and the posterior Gaussian.

    Args:
        value: scaled Q.
        states_BS: states.
        point_BA: c, where Q is expanded.
        mean_BA: posterior mean m_t.
        variance_B: posterior variance v_t of each action component, >= 0.
    """
    with torch.enable_grad():
        point_BA = point_BA.detach().requires_grad_()
        q_B = value(states_BS, point_BA)
        (slope_BA,) = torch.autograd.grad(q_B.sum(), point_BA)
    first_B = q_B.detach() + (slope_BA * (mean_BA - point_BA.detach())).sum(dim=-1)
    return first_B, 0.5 * variance_B * slope_BA.square().sum(dim=-1)


def combine(heads_B2: Tensor, beta: float) -> Tensor:
    """Return E = beta f_1 + beta^2 f_2, [B]  [M12]."""
    return beta * heads_B2[:, 0] + beta**2 * heads_B2[:, 1]


def loss(
    state: EnergyState, config: EnergyConfig, behavior: BehaviorState, value: Value, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the squared error of both heads, a scalar, and metrics  [M12]."""
    t_B = draw_times(len(batch.actions_BA), state.generator)
    with torch.no_grad():
        a_t_BA, mean_BA = _noised_mean(behavior, batch, t_B, state.generator)
    point_BA = {"posterior_mean": mean_BA, "data_action": batch.actions_BA}[config.expansion]
    variance_B = posterior.interpolate_variance(state.variance_K, t_B)
    first_B, second_B = targets(value, batch.states_BS, point_BA, mean_BA, variance_B)
    heads_B2 = state.net(a_t_BA, batch.states_BS, t_B)
    first = (heads_B2[:, 0] - first_B).square().mean()
    second = (heads_B2[:, 1] - second_B).square().mean()
    metrics = {"loss": (first + second).detach(), "f_1": first_B.mean(), "f_2": second_B.mean()}
    return first + second, metrics


def train_step(
    state: EnergyState, config: EnergyConfig, data: Transitions, behavior: BehaviorState, value: Value
) -> dict[str, Tensor]:
    """Take one gradient step and return its metrics, still on the device."""
    value_of_loss, metrics = loss(state, config, behavior, value, data.draw(config.batch_size, state.generator))
    state.optimizer.step_on(value_of_loss)
    state.ema.update(state.net)
    state.step += 1
    return metrics


def _noised_mean(
    behavior: BehaviorState, batch: Batch, t_B: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return noised data actions a_t and their posterior means m_t, each [B, A]."""
    eps_BA = torch.randn(batch.actions_BA.shape, generator=generator, device=t_B.device)
    a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
    return a_t_BA, posterior.posterior_mean(a_t_BA, behavior.ema(a_t_BA, batch.states_BS, t_B), t_B)
