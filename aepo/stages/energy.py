"""Stage 3: the intermediate energy, and a network trained on it.

    E_t(s, a_t) = log E[exp(beta Q(s, a_0))],   a_0 ~ q(a_0 | a_t, s) ~= N(m_t, diag(v_t))      [M3, M9, M10]
                ~= beta (Q(s, c) + g.(m_t - c)) + beta^2 g' diag(v_t) g / 2,   g = grad_a Q(s, c)   [M11]
                 = beta f_1(s, a_t, t) + beta^2 f_2(s, a_t, t)                                      [M12]

So beta is chosen after training. This is the paper's target, `analytic`; its loss and those of the others are in
targets.py. Q here is (Q - V) / scale.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo import backward
from aepo.config import EnergyConfig
from aepo.data.transitions import Transitions
from aepo.diffusion import posterior
from aepo.diffusion.guidance import Shift
from aepo.diffusion.networks import ClosedForm, EnergyNet
from aepo.diffusion.sampler import Grid
from aepo.diffusion.schedule import add_noise, draw_times
from aepo.networks import TwinQ
from aepo.parallel import share
from aepo.stages import Stage, States, Step, critic, fast, targets
from aepo.stages.behavior import NUM_CHECKED, BehaviorState, sample_support
from aepo.stages.critic import ByRow, CriticState
from aepo.stages.optim import Adam, Ema, Loss, Metrics
from aepo.stages.targets import Sample, Value, WithSlope


def loss(net: EnergyNet, target: str, x: Sample) -> Loss:
    """Return the loss of a target on noised actions: for `analytic` the squared error of both heads  [M11, M12].

    E (f_1 - Q(s, c) - g.(m_t - c))^2 + E (f_2 - g' diag(v_t) g / 2)^2
    """
    return targets.LOSSES[target](net, x)


NUM_VARIANCE_TIMES = 64
NUM_VARIANCE_SAMPLES = 4096
PART_ROWS = 8192
"""Rows of which Q is asked at once where it is asked of all."""


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
    """Transitions whose states have support actions; none but for targets that ask for them."""
    support_MKA: Tensor
    """Actions of the behaviour policy in these states."""
    step: int = 0


def make_net(config: EnergyConfig, state_dim: int, action_dim: int) -> EnergyNet:
    """Return the untrained network that the config's target wants; a closed form has none."""
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
    num_support = min(len(data), config.support[0])
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
    if num := len(state.support_index_M):
        device = state.generator.device
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
def learned_shift(net: EnergyNet, states_BS: Tensor, beta: float, grid: Grid) -> tuple[Shift, list[float]]:
    """Return grad E_t / alpha_t in these states, and sigma_t^2 of each step: their product is d_t  [M4, M13]."""
    if net.takes_beta:
        states_BS = torch.cat([states_BS, states_BS.new_full((len(states_BS), 1), beta).log()], dim=-1)
    heads_O = states_BS.new_tensor([beta] if net.takes_beta else [beta, beta**2])
    cached = backward.CachedTimeNet(net, states_BS, grid.t)
    factors_N = [sigma**2 for sigma in grid.sigma]
    return lambda a_t_BA, _, i: cached.slope(grid.alpha[i] * a_t_BA, i, heads_O), factors_N


@torch.no_grad()
def closed_shift(
    closed: ClosedForm, q: TwinQ, states_BS: Tensor, beta: float, variance_NA: Tensor
) -> tuple[Shift, list[float]]:
    """Return v_t grad_a Q(s, m_t) in these states, and beta / scale of each step: their product is d_t  [M11].

    Args:
        closed: has the scale.
        q: the critics; the lower one counts.
        states_BS: normalised states.
        beta: inverse temperature.
        variance_NA: v of the posterior at each step of the solver [M10].
    """

    def shift(_: Tensor, mean_BA: Tensor, i: int) -> Tensor:
        slope_BA = backward.lowest_with_slope(q, states_BS, mean_BA.clamp(-1.0, 1.0))[1]
        return variance_NA[i] * slope_BA

    return shift, [beta / float(closed.scale)] * len(variance_NA)


class QSource(NamedTuple):
    """Q as stage 3 asks for it: of any actions, of the data's and of the support's."""

    value: Value
    """Q of any actions."""
    with_slope: WithSlope
    """Q of any actions, and its gradient by them."""
    of_rows: ByRow
    """Q of the data's actions in these rows."""
    with_slope_of_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Q of the data's actions in these rows, and its gradient by the actions."""
    of_support: ByRow
    """Q of the support actions in the states at these places among those that have some, [B] -> [B, K]."""


def q_source(critic_state: CriticState, state: EnergyState, config: EnergyConfig, data: Transitions) -> QSource:
    """Return (min_i Q_i(s, a) - V(s)) / scale: V changes no policy, the scale, the state's, gives beta its unit."""

    def value(states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        with torch.no_grad():
            v_B = critic_state.v(states_BS)
        scaled_B: Tensor = (critic_state.q.lowest(states_BS, actions_BA) - v_B) / state.q_scale
        return scaled_B

    @torch.no_grad()
    def with_slope(states_BS: Tensor, actions_BA: Tensor) -> tuple[Tensor, Tensor]:
        q_B, slope_BA = backward.lowest_with_slope(critic_state.q, states_BS, actions_BA)
        return (q_B - critic_state.v(states_BS)) / state.q_scale, slope_BA / state.q_scale

    resting = functools.partial(critic.cached_until_trained, critic_state)
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


def train_step(
    state: EnergyState, config: EnergyConfig, data: Transitions, behavior: BehaviorState, source: QSource
) -> Metrics:
    """Take one gradient step and return its metrics."""
    x = draw(state, config, data, behavior, source)
    gradients, metrics = fast.energy(state.net, targets.LOSSES[config.target], x)
    state.optimizer.step_along(gradients)
    state.ema.update()
    state.step += 1
    return metrics


@torch.no_grad()
def draw(
    state: EnergyState, config: EnergyConfig, data: Transitions, behavior: BehaviorState, source: QSource
) -> Sample:
    """Return a new batch of noised actions with all that the target asks for."""
    asks, generator, num = config.facts.asks, state.generator, config.batch_size
    if "support" in asks:
        return _draw_support(state, config, data, source)
    index_B, t_B = data.draw_rows(num, generator), draw_times(num, generator)
    eps_BA = torch.randn((num, data.action_dim), generator=generator, device=generator.device)
    beta_B = _draw_betas(config, num, generator) if config.facts.takes_beta else torch.ones_like(t_B)
    draws_KBA = targets.NOTHING
    if "draws" in asks:
        shape = (config.num_samples, num, data.action_dim)
        draws_KBA = share(torch.randn(shape, generator=generator, device=generator.device), dim=1)
    index_B, t_B, eps_BA, beta_B = share(index_B), share(t_B), share(eps_BA), share(beta_B)
    states_BS, actions_BA = data.take_pairs(index_B)
    a_t_BA = add_noise(actions_BA, t_B, eps_BA)
    q_B = source.of_rows(index_B) if "data" in asks else targets.NOTHING
    x = Sample(states_BS, actions_BA, t_B, a_t_BA, beta_B, source.value, q_B=q_B, draws_KBA=draws_KBA)
    if "posterior" not in asks:
        return x
    mean_BA = posterior.posterior_mean(a_t_BA, behavior.ema(a_t_BA, states_BS, t_B), t_B)
    if behavior.has_variance:
        variance_BA = behavior.variance(a_t_BA, states_BS, t_B)
    else:
        variance_BA = posterior.interpolate_variance(state.variance_K, t_B)[:, None].expand_as(mean_BA)
    x = x._replace(mean_BA=mean_BA, variance_BA=variance_BA)
    in_data = config.expansion == "data_action"
    if "slope" in asks or "curvature" in asks:
        x = x._replace(point_BA=actions_BA if in_data else mean_BA)
    if "slope" in asks:
        q_B, slope_BA = source.with_slope_of_rows(index_B) if in_data else source.with_slope(states_BS, mean_BA)
        x = x._replace(q_B=q_B, slope_BA=slope_BA)
    return x


def _draw_support(state: EnergyState, config: EnergyConfig, data: Transitions, source: QSource) -> Sample:
    """Return a batch of support actions, noised, all of a state at one time and one beta."""
    generator, num = state.generator, config.num_samples
    num_states = max(1, config.num_units)
    pick_S = torch.randint(len(state.support_index_M), (num_states,), generator=generator, device=generator.device)
    actions_SKA = state.support_MKA[pick_S]
    t_S = draw_times(num_states, generator)
    a_t_SKA = _add_noise(actions_SKA.flatten(0, 1), t_S.repeat_interleave(num), generator).view_as(actions_SKA)
    beta_S = _draw_betas(config, num_states, generator)
    pick_S, actions_SKA, a_t_SKA = share(pick_S), share(actions_SKA), share(a_t_SKA)
    t_S, beta_S = share(t_S), share(beta_S)
    states_S = data.take(state.support_index_M[pick_S]).states_BS
    states_BS, t_B, beta_B = (part.repeat_interleave(num, dim=0) for part in (states_S, t_S, beta_S))
    return Sample(
        states_BS=states_BS,
        actions_BA=actions_SKA.flatten(0, 1),
        t_B=t_B,
        a_t_BA=a_t_SKA.flatten(0, 1),
        beta_B=beta_B,
        value=source.value,
        q_B=source.of_support(pick_S).flatten(),
        num_actions=num,
    )


def _draw_betas(config: EnergyConfig, num: int, generator: torch.Generator) -> Tensor:
    """Return inverse temperatures, log-uniform over the config's range, [num]."""
    u_B = torch.rand(num, generator=generator, device=generator.device)
    return config.beta_min * (config.beta_max / config.beta_min) ** u_B


def _add_noise(actions_BA: Tensor, t_B: Tensor, generator: torch.Generator) -> Tensor:
    eps_BA = torch.randn(actions_BA.shape, generator=generator, device=t_B.device)
    return add_noise(actions_BA, t_B, eps_BA)


def prepare(config: EnergyConfig, states: States, data: Transitions) -> None:
    """Measure the scale of Q, and of stage 1 what the target asks for."""
    state = states["energy"]
    state.q_scale = critic.advantage_scale(states["critic"], data)
    measure(state, config, data, states["behavior"])


def make_step(config: EnergyConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of stage 3."""
    source = q_source(states["critic"], states["energy"], config, data)
    return lambda: train_step(states["energy"], config, data, states["behavior"], source)


def make_check(config: EnergyConfig, states: States, held_out: Transitions) -> Step:
    """Return the function that measures the target's loss of the averaged network on held-out actions.

    Noise and support actions are the same at every call.
    """
    few = dataclasses.replace(config, batch_size=NUM_CHECKED)
    if "support" in config.facts.asks:
        few = dataclasses.replace(few, num_support_states=max(1, NUM_CHECKED // config.num_samples))

    def check() -> Metrics:
        live, device = states["energy"], held_out.rows_ND.device
        state = dataclasses.replace(live, generator=torch.Generator(device).manual_seed(0))
        if "support" in config.facts.asks:
            num = min(few.support[0], len(held_out))
            state.support_index_M = torch.zeros(num, dtype=torch.long, device=device)
            state.support_MKA = torch.zeros(num, few.num_samples, held_out.action_dim, device=device)
            measure(state, few, held_out, states["behavior"])
        x = draw(state, few, held_out, states["behavior"], q_source(states["critic"], state, few, held_out))
        with torch.enable_grad():  # a target may be the gradient of the energy
            value, _ = loss(live.ema.net, config.target, x)
        return lambda: {"held_out_loss": value.detach()}

    return check


STAGE = Stage(
    name="energy",
    start=start,
    step=make_step,
    prepare=prepare,
    check=make_check,
    learns_from=lambda _: ("behavior", "critic"),
    acts=True,
)
