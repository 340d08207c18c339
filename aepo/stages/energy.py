"""Stage 3: the intermediate energy, and a network trained on it.

    E_t(s, a_t) = log E[exp(beta Q(s, a_0))],   a_0 ~ q(a_0 | a_t, s) ~= N(m_t, diag(v_t))      [M3, M9, M10]
                ~= beta (Q(s, c) + g.(m_t - c)) + beta^2 g' diag(v_t) g / 2,   g = grad_a Q(s, c)   [M11]
                 = beta f_1(s, a_t, t) + beta^2 f_2(s, a_t, t)                                      [M12]

So beta is chosen after training. This is the paper's target; it and the others are in targets.py. Q here is
(Q - V) / scale.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo.config import EnergyConfig
from aepo.data.transitions import Transitions
from aepo.diffusion import posterior
from aepo.diffusion.sampler import Grid, Predict
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.networks import Prepared, TimeNet
from aepo.parallel import share
from aepo.stages import critic, targets
from aepo.stages.behavior import BehaviorState, sample_support
from aepo.stages.critic import CriticState, OfRows
from aepo.stages.optim import Adam, Ema, Metrics, gradients_of
from aepo.stages.targets import Noised, Posterior, Value, WithSlope

NUM_VARIANCE_TIMES = 64
NUM_VARIANCE_SAMPLES = 4096
PART_ROWS = 8192
"""Rows of which Q is asked at once where it is asked of all."""
OF_DATA_ACTIONS = ("mse", "log_expectation", "weighted_denoising")
"""Targets that ask for Q of the data's actions alone."""


class EnergyNet(TimeNet):
    """E_t as beta f_1 + beta^2 f_2 [M12], or, with `takes_beta`, as beta f(s, a_t, t, log beta).

    The network sees alpha_t a_t: E_t forgets a_t as alpha_t falls, and the sampler divides grad E_t by alpha_t
    [M13]. So the gradient has the factor alpha_t by construction, and no error of the network is blown up at
    high noise.
    """

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int, takes_beta: bool):
        """Two outputs, or one and one more input."""
        super().__init__(
            state_dim + int(takes_beta),
            action_dim,
            1 if takes_beta else 2,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
        self.takes_beta = takes_beta

    def inputs(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:  # type: ignore[override]
        """Return what the layers see, [B, I]."""
        alpha_B, _ = alpha_sigma(t_B)
        if self.takes_beta:
            states_BS = torch.cat([states_BS, beta_B.log()[:, None]], dim=-1)
        return super().inputs(alpha_B[:, None] * a_t_BA, states_BS, t_B)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:  # type: ignore[override]
        """Return E_t(s, a_t) at inverse temperature beta, [B]."""
        outputs_BO = self.body(self.inputs(a_t_BA, states_BS, t_B, beta_B))
        return beta_B * outputs_BO[:, 0] if self.takes_beta else targets.combine(outputs_BO, beta_B)


@dataclasses.dataclass
class EnergyState:
    """Everything of stage 3 that a checkpoint holds."""

    net: EnergyNet
    ema: Ema[EnergyNet]
    optimizer: Adam
    generator: torch.Generator
    q_scale: Tensor
    """Standard deviation of Q - V over the data; Q is divided by it."""
    variance_K: Tensor
    """v_t over `posterior.time_grid(K)`  [M10]; unused where stage 1 has learned v_t(s, a_t)."""
    support_index_M: Tensor
    """Transitions whose states have support actions; none but for the contrastive target."""
    support_MKA: Tensor
    """Actions of the behaviour policy in these states."""
    step: int = 0


def make_net(config: EnergyConfig, state_dim: int, action_dim: int) -> EnergyNet:
    """Return the untrained network that the config's target wants."""
    return EnergyNet(
        state_dim,
        action_dim,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        takes_beta=config.facts.takes_beta,
    )


def start(config: EnergyConfig, data: Transitions, generator: torch.Generator) -> EnergyState:
    """Return stage 3 before its first step; weights are drawn from torch's global generator."""
    device = generator.device
    net = make_net(config, data.state_dim, data.action_dim).to(device)
    num_support = min(len(data), config.num_support_states) if config.target == "contrastive" else 0
    return EnergyState(
        net=net,
        ema=Ema(net, config.ema_decay),
        optimizer=Adam(net.parameters(), lr=config.learning_rate, num_steps=config.steps),
        generator=generator,
        q_scale=torch.ones((), device=device),
        variance_K=torch.zeros(NUM_VARIANCE_TIMES, device=device),
        support_index_M=torch.zeros(num_support, dtype=torch.long, device=device),
        support_MKA=torch.zeros(num_support, config.num_samples, data.action_dim, device=device),
    )


def measure(state: EnergyState, config: EnergyConfig, data: Transitions, behavior: BehaviorState) -> None:
    """Measure what stage 3 takes from stage 1 before its first step of a round: v_t, support actions."""
    if not behavior.has_variance:
        state.variance_K = measure_variance(behavior, data, state.generator)
    if config.target == "contrastive":
        num, device = len(state.support_index_M), state.generator.device
        state.support_index_M = torch.randperm(len(data), generator=state.generator, device=device)[:num]
        states_MS = data.take(state.support_index_M).states_BS
        state.support_MKA = sample_support(behavior, states_MS, config.num_samples, state.generator)


@torch.no_grad()
def measure_variance(behavior: BehaviorState, data: Transitions, generator: torch.Generator) -> Tensor:
    """Return the table of v_t over K equidistant times, measured on noised data actions, [K]  [M10]."""
    batch = data.draw(NUM_VARIANCE_SAMPLES, generator)
    means = []
    for t in posterior.time_grid(NUM_VARIANCE_TIMES, generator.device):
        t_B = t.expand(len(batch.actions_BA))
        a_t_BA = _add_noise(batch.actions_BA, t_B, generator)
        means.append(posterior.posterior_mean(a_t_BA, behavior.ema(a_t_BA, batch.states_BS, t_B), t_B))
    return posterior.residual_variance(torch.stack(means), batch.actions_BA)


def slope(net: EnergyNet, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:
    """Return grad E_t(s, a_t) by a_t, [B, A], without a graph beyond it  [M4]."""
    with torch.enable_grad():
        a_t_BA = a_t_BA.detach().requires_grad_()
        energy_B = net(a_t_BA, states_BS, t_B, beta_B)
        (slope_BA,) = torch.autograd.grad(energy_B.sum(), a_t_BA)
    return slope_BA


@torch.no_grad()
def predict_slope(net: EnergyNet, states_BS: Tensor, beta: float, grid: Grid) -> Predict:
    """Return grad E_t / alpha_t in these states for the solver: what the sampler would divide by alpha_t [M13]."""
    if net.takes_beta:
        states_BS = torch.cat([states_BS, states_BS.new_full((len(states_BS), 1), beta).log()], dim=-1)
    heads_O = states_BS.new_tensor([beta] if net.takes_beta else [beta, beta**2])
    prepared = Prepared(net, states_BS, grid.t)
    return lambda a_t_BA, i: prepared.slope(grid.alpha[i] * a_t_BA, i, heads_O)


class QSource(NamedTuple):
    """Q as stage 3 asks for it: of any actions, of the data's and of the support's."""

    value: Value
    """Of any actions."""
    with_slope: WithSlope
    """The same with its gradient by them."""
    of_rows: OfRows
    """Of the data's actions in these rows."""
    with_slope_of_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    """The same with its gradient by them."""
    of_support: OfRows
    """Of the support actions in the states at these places among those that have some, [B] -> [B, K]."""


def q_source(critic_state: CriticState, state: EnergyState, config: EnergyConfig, data: Transitions) -> QSource:
    """Return (min_i Q_i(s, a) - V(s)) / scale: V changes no policy, the scale, the state's, gives beta its unit."""

    def value(states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        with torch.no_grad():
            v_B = critic_state.v(states_BS)
        scaled_B: Tensor = (critic_state.q.lowest(states_BS, actions_BA) - v_B) / state.q_scale
        return scaled_B

    @torch.no_grad()
    def with_slope(states_BS: Tensor, actions_BA: Tensor) -> tuple[Tensor, Tensor]:
        q_B, slope_BA = critic_state.q.lowest_with_slope(states_BS, actions_BA)
        return (q_B - critic_state.v(states_BS)) / state.q_scale, slope_BA / state.q_scale

    resting = functools.partial(critic.while_resting, critic_state)
    return source_of(value, with_slope, state, config, data, resting=resting)


def source_of(
    value: Value,
    with_slope: WithSlope,
    state: EnergyState,
    config: EnergyConfig,
    data: Transitions,
    *,
    resting: Callable[[Callable[[], Any]], Callable[[], Any]] = functools.cache,
) -> QSource:
    """Return a source that asks once for every action of the data or the support, if the stage draws as many.

    Args:
        value: Q of any actions.
        with_slope: the same with its gradient by them.
        state: has the support actions.
        config: says how many actions are drawn in all.
        data: transitions.
        resting: makes of a function one that remembers its value for as long as Q is the same.
    """
    num_draws, device = config.steps * config.batch_size, data.rows_ND.device

    def of_rows(index_B: Tensor) -> Tensor:
        batch = data.take(index_B)
        with torch.no_grad():
            return value(batch.states_BS, batch.actions_BA)

    def with_slope_of_rows(index_B: Tensor) -> tuple[Tensor, Tensor]:
        batch = data.take(index_B)
        return with_slope(batch.states_BS, batch.actions_BA)

    def of_support(pick_B: Tensor) -> Tensor:
        states_BS, actions_BKA = data.take(state.support_index_M[pick_B]).states_BS, state.support_MKA[pick_B]
        repeated_NS = states_BS.repeat_interleave(actions_BKA.shape[1], dim=0)
        with torch.no_grad():
            return value(repeated_NS, actions_BKA.flatten(0, 1)).view(actions_BKA.shape[:2])

    def over(function: Callable[[Tensor], Any], num: int) -> list[Any]:
        return [function(index_B) for index_B in torch.split(torch.arange(num, device=device), PART_ROWS)]

    source = QSource(value, with_slope, of_rows, with_slope_of_rows, of_support)
    if num_draws >= len(data):
        values = resting(lambda: torch.cat(over(of_rows, len(data))))
        slopes = resting(lambda: [torch.cat(part) for part in zip(*over(with_slope_of_rows, len(data)), strict=True)])

        def rows_of_slopes(index_B: Tensor) -> tuple[Tensor, Tensor]:
            q_N, slope_NA = slopes()
            return q_N[index_B], slope_NA[index_B]

        source = source._replace(of_rows=lambda index_B: values()[index_B], with_slope_of_rows=rows_of_slopes)
    if num_draws >= state.support_MKA[:, :, 0].numel():
        support = resting(lambda: torch.cat(over(of_support, len(state.support_index_M))))
        source = source._replace(of_support=lambda pick_B: support()[pick_B])
    return source


def gradients(
    state: EnergyState, config: EnergyConfig, data: Transitions, behavior: BehaviorState, source: QSource
) -> tuple[list[Tensor], Metrics]:
    """Return those of the loss of the config's target on a new batch by the network's parameters, and metrics."""
    if config.target == "contrastive":
        return _contrastive(state, config, data, source)
    x = _noised(state, config, data, source)
    if config.target == "weighted_denoising":
        loss, metrics = targets.weighted_denoising(state.net, x, _posterior(state, config, x, behavior))
        return gradients_of(loss, state.net.parameters()), metrics
    with torch.no_grad():
        outputs_BO, pull = state.net.body.vjp(state.net.inputs(x.a_t_BA, x.states_BS, x.t_B, x.beta_B))
        slope_BO, metrics = _target(outputs_BO, state, config, x, behavior, source)
        return pull(slope_BO), metrics


def _target(
    outputs_BO: Tensor, state: EnergyState, config: EnergyConfig, x: Noised, behavior: BehaviorState, source: QSource
) -> targets.Outcome:
    if config.target == "mse":
        return targets.mse(outputs_BO, x)
    if config.target == "log_expectation":
        return targets.log_expectation(outputs_BO, x)
    origin = _posterior(state, config, x, behavior)
    if config.target == "monte_carlo":
        shape = (config.num_samples, config.batch_size, x.actions_BA.shape[1])
        draws_KBA = torch.randn(shape, generator=state.generator, device=x.t_B.device)
        return targets.monte_carlo(outputs_BO, source.value, x, origin, share(draws_KBA, dim=1))
    if config.target == "analytic":
        if config.expansion == "data_action":
            return targets.analytic(outputs_BO, *source.with_slope_of_rows(x.index_B), origin)
        return targets.analytic(outputs_BO, *source.with_slope(x.states_BS, origin.point_BA), origin)
    return targets.analytic_second_order(outputs_BO, source.value, x, origin)


def train_step(
    state: EnergyState, config: EnergyConfig, data: Transitions, behavior: BehaviorState, source: QSource
) -> Metrics:
    """Take one gradient step and return its metrics."""
    found, metrics = gradients(state, config, data, behavior, source)
    state.optimizer.step_along(found)
    state.ema.update()
    state.step += 1
    return metrics


def _noised(state: EnergyState, config: EnergyConfig, data: Transitions, source: QSource) -> Noised:
    generator = state.generator
    index_B = data.draw_rows(config.batch_size, generator)
    t_B = draw_times(len(index_B), generator)
    eps_BA = torch.randn((len(index_B), data.action_dim), generator=generator, device=generator.device)
    beta_B = torch.ones_like(t_B) if not state.net.takes_beta else _draw_betas(config, len(t_B), generator)
    index_B, t_B, eps_BA, beta_B = share(index_B), share(t_B), share(eps_BA), share(beta_B)
    batch = data.take_pairs(index_B)
    return Noised(
        index_B=index_B,
        states_BS=batch.states_BS,
        actions_BA=batch.actions_BA,
        t_B=t_B,
        a_t_BA=add_noise(batch.actions_BA, t_B, eps_BA),
        beta_B=beta_B,
        q_B=source.of_rows(index_B) if config.target in OF_DATA_ACTIONS else t_B.new_empty(0),
    )


@torch.no_grad()
def _posterior(state: EnergyState, config: EnergyConfig, x: Noised, behavior: BehaviorState) -> Posterior:
    mean_BA = posterior.posterior_mean(x.a_t_BA, behavior.ema(x.a_t_BA, x.states_BS, x.t_B), x.t_B)
    if behavior.has_variance:
        variance_BA = behavior.variance(x.a_t_BA, x.states_BS, x.t_B)
    else:
        variance_BA = posterior.interpolate_variance(state.variance_K, x.t_B)[:, None].expand_as(mean_BA)
    point_BA = {"posterior_mean": mean_BA, "data_action": x.actions_BA}[config.expansion]
    return Posterior(mean_BA, variance_BA, point_BA)


@torch.no_grad()
def _contrastive(
    state: EnergyState, config: EnergyConfig, data: Transitions, source: QSource
) -> tuple[list[Tensor], Metrics]:
    generator, num = state.generator, config.num_samples
    num_states = max(1, config.batch_size // num)
    pick_B = torch.randint(len(state.support_index_M), (num_states,), generator=generator, device=generator.device)
    states_BS = data.take(state.support_index_M[pick_B]).states_BS
    actions_BKA = state.support_MKA[pick_B]
    t_B = draw_times(num_states, generator)
    a_t = _add_noise(actions_BKA.flatten(0, 1), t_B.repeat_interleave(num), generator)
    beta_B = _draw_betas(config, num_states, generator)
    states_BS, a_t_BKA = share(states_BS), share(a_t.view_as(actions_BKA))
    pick_B, t_B, beta_B = share(pick_B), share(t_B), share(beta_B)
    repeated = [part.repeat_interleave(num, dim=0) for part in (states_BS, t_B, beta_B)]
    q_BK = source.of_support(pick_B)
    f_N1, pull = state.net.body.vjp(state.net.inputs(a_t_BKA.flatten(0, 1), *repeated))
    slope_BK, metrics = targets.contrastive(f_N1.view_as(q_BK), q_BK, beta_B)
    return pull(slope_BK.view(-1, 1)), metrics


def _draw_betas(config: EnergyConfig, num: int, generator: torch.Generator) -> Tensor:
    """Return inverse temperatures, log-uniform over the config's range, [num]."""
    u_B = torch.rand(num, generator=generator, device=generator.device)
    return config.beta_min * (config.beta_max / config.beta_min) ** u_B


def _add_noise(actions_BA: Tensor, t_B: Tensor, generator: torch.Generator) -> Tensor:
    eps_BA = torch.randn(actions_BA.shape, generator=generator, device=t_B.device)
    return add_noise(actions_BA, t_B, eps_BA)
