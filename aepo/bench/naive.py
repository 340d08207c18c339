"""The same steps as most research code writes them: the baseline of `aepo bench`.

Same losses, networks, batches and data, and nothing of how our steps compute them, so that the baseline stays as it is
while they change. PyTorch's own linear layers, one optimizer per network and its default loop, averages parameter by
parameter, a loss read out at every step, autograd for every gradient.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import minari
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal

from aepo.config import ActorConfig, ActorCriticConfig, BehaviorConfig, CriticConfig, EnergyConfig, StageConfig
from aepo.data.episodes import flatten
from aepo.data.transitions import Batch, Transitions
from aepo.diffusion import sampler
from aepo.diffusion.posterior import interpolate_variance
from aepo.diffusion.schedule import BETA_0, BETA_1, draw_times
from aepo.networks import Mlp, TimeNet
from aepo.samplers import GuidedSampler
from aepo.stages import States, actor, actor_critic, behavior, critic, energy, targets

Step = Callable[[], float]
Net = TypeVar("Net", bound=nn.Module)


def plain(net: Net) -> Net:
    """Return a copy whose layers are PyTorch's."""
    twin = copy.deepcopy(net).requires_grad_(True)  # of averages, too
    for module in twin.modules():
        if isinstance(module, Mlp):
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return twin


def step_on(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Take a gradient step and read the loss out."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def follow(average: nn.Module, net: nn.Module, rate: float) -> None:
    """Move an average towards a network."""
    for slow, fast in zip(average.parameters(), net.parameters(), strict=True):
        slow.data.copy_(rate * fast.data + (1 - rate) * slow.data)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Return PyTorch's default Adam."""
    return torch.optim.Adam(parameters, lr=3e-4)


def draw(data: Transitions, batch_size: int, generator: torch.Generator) -> Batch:
    """Return transitions drawn uniformly with replacement."""
    return take(data, torch.randint(len(data), (batch_size,), generator=generator))


def take(data: Transitions, index_B: Tensor) -> Batch:
    """Return the transitions of these rows, normalised."""
    s, a = data.state_dim, data.action_dim
    rows_BD = (data.rows_ND.index_select(0, index_B) - data.shift_D) * data.scale_D
    states, actions, rewards, terminals, next_states = rows_BD.split_with_sizes([s, a, 1, 1, s], dim=1)
    return Batch(states, actions.clamp(-1.0, 1.0), rewards.squeeze(1), terminals.squeeze(1), next_states)


def alpha_sigma(t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha_t and sigma_t  [M2]."""
    log_alpha_B = -0.25 * t_B.square() * (BETA_1 - BETA_0) - 0.5 * t_B * BETA_0
    return log_alpha_B.exp(), (-torch.expm1(2 * log_alpha_B)).sqrt()


def add_noise(actions_BA: Tensor, t_B: Tensor, eps_BA: Tensor) -> Tensor:
    """Return a_t  [M2]."""
    alpha_B, sigma_B = alpha_sigma(t_B)
    return alpha_B[:, None] * actions_BA + sigma_B[:, None] * eps_BA


def time_net(net: TimeNet, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
    """Return what a network says of (a_t, s, t)."""
    phase_BF = t_B[:, None] * net.frequencies_F
    features_BF = torch.cat([phase_BF.sin(), phase_BF.cos()], dim=-1)
    return net.body(torch.cat([a_t_BA, states_BS, features_BF], dim=-1))  # type: ignore[no-any-return]


def noise_of(net: behavior.NoiseNet, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
    """Return eps_phi(a_t, s, t)."""
    alpha_B, sigma_B = alpha_sigma(t_B)
    return sigma_B[:, None] * a_t_BA + alpha_B[:, None] * time_net(net, a_t_BA, states_BS, t_B)


def behavior_step(config: BehaviorConfig, states: States, data: Transitions) -> Step:  # noqa: ARG001  # asks no other
    """Return stage 1's step."""
    state = behavior.start(config, data, torch.Generator())
    net, average = plain(state.net), plain(state.ema.net)
    optimizer = adam(net.parameters())

    def step() -> float:
        batch = draw(data, config.batch_size, state.generator)
        t_B = draw_times(config.batch_size, state.generator)
        eps_BA = torch.randn(batch.actions_BA.shape, generator=state.generator)
        a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
        predicted_BA = noise_of(net, a_t_BA, batch.states_BS, t_B)
        alpha_B, _ = alpha_sigma(t_B)
        value = step_on(optimizer, ((predicted_BA - eps_BA) / alpha_B[:, None]).square().mean())
        follow(average, net, 1 - config.ema_decay)
        return value

    return step


def critic_step(config: CriticConfig, states: States, data: Transitions) -> Step:
    """Return the step of the critics, V and Q one after the other: IQL's, or over actions of stage 1 [M8]."""
    if config.learner == "softmax_in_support":
        return _critic_in_support(config, data, states["behavior"])
    state = critic.start(config, data, torch.Generator())
    q, v, target = plain(state.q), plain(state.v), plain(state.target.net)
    q_optimizer, v_optimizer = adam(q.parameters()), adam(v.parameters())

    def step() -> float:
        batch = draw(data, config.batch_size, state.generator)
        with torch.no_grad():
            target_q_B = target(batch.states_BS, batch.actions_BA).amin(dim=0)
            next_v_B = v(batch.next_states_BS)
        advantage_B = target_q_B - v(batch.states_BS)
        v_loss = ((config.expectile - (advantage_B < 0).float()).abs() * advantage_B**2).mean()
        of_v = step_on(v_optimizer, v_loss)
        backup_B = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_v_B
        q_loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
        of_q = step_on(q_optimizer, q_loss)
        follow(target, q, config.target_rate)
        return of_v + of_q

    return step


def _critic_in_support(config: CriticConfig, data: Transitions, behavior_state: behavior.BehaviorState) -> Step:
    state = critic.start(config, data, torch.Generator())
    critic.measure(state, config, data, behavior_state)
    q, v, target = plain(state.q), plain(state.v), plain(state.target.net)
    q_optimizer, v_optimizer = adam(q.parameters()), adam(v.parameters())
    num_support = config.num_samples

    def step() -> float:
        index_B = torch.randint(len(state.support_index_M), (config.batch_size,), generator=state.generator)
        batch, support_BKA = take(data, state.support_index_M[index_B]), state.support_MKA[index_B]
        with torch.no_grad():
            repeated = torch.repeat_interleave(batch.next_states_BS, num_support, dim=0)
            q_BK = target(repeated, support_BKA.flatten(0, 1)).amin(dim=0).view(-1, num_support)
            next_v_B = (torch.softmax(config.backup_beta * q_BK, dim=1) * q_BK).sum(dim=1)
        of_v = step_on(v_optimizer, (v(batch.next_states_BS) - next_v_B).square().mean())
        backup_B = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_v_B
        q_loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
        of_q = step_on(q_optimizer, q_loss)
        follow(target, q, config.target_rate)
        return of_v + of_q

    return step


def energy_step(config: EnergyConfig, states: States, data: Transitions) -> Step:
    """Return stage 3's step, of the targets that presets have; Q is asked for every batch."""
    own = energy.start(config, data, torch.Generator())
    energy.measure(own, config, data, states["behavior"])
    own.net, average = plain(own.net), plain(own.ema.net)
    noise, q, v = (plain(net) for net in (states["behavior"].ema.net, states["critic"].q, states["critic"].v))
    loss = {"log_expectation": _log_expectation, "analytic": _analytic, "contrastive": _contrastive}[config.target]
    optimizer = adam(own.net.parameters())

    def value(states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        with torch.no_grad():
            v_B = v(states_BS)
        scaled_B: Tensor = (q(states_BS, actions_BA).amin(dim=0) - v_B) / own.q_scale
        return scaled_B

    def step() -> float:
        read = step_on(optimizer, loss(own, config, data, noise, value))
        follow(average, own.net, 1 - config.ema_decay)
        return read

    return step


def _draw_betas(config: EnergyConfig, num: int, generator: torch.Generator) -> Tensor:
    return config.beta_min * (config.beta_max / config.beta_min) ** torch.rand(num, generator=generator)


def _energy_of(net: energy.EnergyNet, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:
    alpha_B, _ = alpha_sigma(t_B)
    with_beta = torch.cat([states_BS, beta_B.log()[:, None]], dim=-1)
    return beta_B * time_net(net, alpha_B[:, None] * a_t_BA, with_beta, t_B)[:, 0]


def _log_expectation(
    own: energy.EnergyState,
    config: EnergyConfig,
    data: Transitions,
    noise: behavior.NoiseNet,  # noqa: ARG001  # of other targets
    value: targets.Value,
) -> Tensor:
    batch = draw(data, config.batch_size, own.generator)
    t_B = draw_times(config.batch_size, own.generator)
    eps_BA = torch.randn(batch.actions_BA.shape, generator=own.generator)
    beta_B = _draw_betas(config, config.batch_size, own.generator)
    a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
    with torch.no_grad():
        q_B = value(batch.states_BS, batch.actions_BA)
    energy_B = _energy_of(own.net, a_t_BA, batch.states_BS, t_B, beta_B)
    gap_B = beta_B * q_B - energy_B
    tangent_B = math.exp(targets.MAX_EXPONENT) * (1.0 + gap_B - targets.MAX_EXPONENT)
    below_B = gap_B < targets.MAX_EXPONENT
    exp_B = torch.where(below_B, gap_B.clamp(max=targets.MAX_EXPONENT).exp(), tangent_B)
    return ((exp_B + energy_B) / beta_B.square()).mean()


def _analytic(
    own: energy.EnergyState, config: EnergyConfig, data: Transitions, noise: behavior.NoiseNet, value: targets.Value
) -> Tensor:
    batch = draw(data, config.batch_size, own.generator)
    t_B = draw_times(config.batch_size, own.generator)
    eps_BA = torch.randn(batch.actions_BA.shape, generator=own.generator)
    a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
    with torch.no_grad():
        alpha_B, sigma_B = alpha_sigma(t_B)
        eps_hat_BA = noise_of(noise, a_t_BA, batch.states_BS, t_B)
        mean_BA = ((a_t_BA - sigma_B[:, None] * eps_hat_BA) / alpha_B[:, None]).clamp(-1.0, 1.0)
        variance_BA = interpolate_variance(own.variance_K, t_B)[:, None].expand_as(mean_BA)
    point_BA = (mean_BA if config.expansion == "posterior_mean" else batch.actions_BA).detach().requires_grad_()
    q_B = value(batch.states_BS, point_BA)
    (slope_BA,) = torch.autograd.grad(q_B.sum(), point_BA)
    with torch.no_grad():
        first_B = q_B + (slope_BA * (mean_BA - point_BA)).sum(dim=-1)
        second_B = 0.5 * (variance_BA * slope_BA.square()).sum(dim=-1)
    alpha_B, _ = alpha_sigma(t_B)
    heads_B2 = time_net(own.net, alpha_B[:, None] * a_t_BA, batch.states_BS, t_B)
    return (heads_B2[:, 0] - first_B).square().mean() + (heads_B2[:, 1] - second_B).square().mean()


def _contrastive(
    own: energy.EnergyState,
    config: EnergyConfig,
    data: Transitions,
    noise: behavior.NoiseNet,  # noqa: ARG001  # of other targets
    value: targets.Value,
) -> Tensor:
    num, num_states = config.num_samples, max(1, config.batch_size // config.num_samples)
    pick_B = torch.randint(len(own.support_index_M), (num_states,), generator=own.generator)
    states_BS, actions_BKA = take(data, own.support_index_M[pick_B]).states_BS, own.support_MKA[pick_B]
    t_B = draw_times(num_states, own.generator)
    eps = torch.randn(actions_BKA.flatten(0, 1).shape, generator=own.generator)
    beta_B = _draw_betas(config, num_states, own.generator)
    repeated, t_N = states_BS.repeat_interleave(num, dim=0), t_B.repeat_interleave(num)
    a_t = add_noise(actions_BKA.flatten(0, 1), t_N, eps)
    with torch.no_grad():
        q_BK = value(repeated, actions_BKA.flatten(0, 1)).view(-1, num)
    energy_BK = _energy_of(own.net, a_t, repeated, t_N, beta_B.repeat_interleave(num)).view_as(q_BK)
    weight_BK = (beta_B[:, None] * q_BK).softmax(dim=1)
    return -(weight_BK * energy_BK.log_softmax(dim=1)).sum(dim=1).mean()


def actor_step(config: ActorConfig, states: States, data: Transitions) -> Step:
    """Return the step of IQL's actor; its advantages are asked for every batch."""
    own = actor.start(config, data, torch.Generator())
    net = plain(own.net)
    target, v = plain(states["critic"].target.net), plain(states["critic"].v)
    optimizer = adam(net.parameters())

    def step() -> float:
        batch = draw(data, config.batch_size, own.generator)
        with torch.no_grad():
            advantage_B = target(batch.states_BS, batch.actions_BA).amin(dim=0) - v(batch.states_BS)
        weight_B = (config.inverse_temperature * advantage_B).exp().clamp(max=actor.MAX_WEIGHT)
        policy = Normal(net(batch.states_BS), net.log_std_A.clamp(-5.0, 2.0).exp())
        log_prob_B = policy.log_prob(batch.actions_BA).sum(dim=1)  # type: ignore[no-untyped-call]
        return step_on(optimizer, -(weight_B * log_prob_B).mean())

    return step


def actor_critic_step(own: ActorCriticConfig, states: States, data: Transitions) -> Step:  # noqa: ARG001  # asks no other
    """Return TD3+BC's step, of which every second one trains the actor as well."""
    state = actor_critic.start(own, data, torch.Generator())
    pi, pi_target, q, q_target = (
        plain(net) for net in (state.actor, state.actor_target.net, state.q, state.q_target.net)
    )
    plain_q_1: nn.Module = q.q_1  # type: ignore[assignment]
    pi_optimizer, q_optimizer = adam(pi.parameters()), adam(q.parameters())
    num_steps = 0

    def step() -> float:
        nonlocal num_steps
        batch = draw(data, own.batch_size, state.generator)
        with torch.no_grad():
            normal_BA = torch.randn(batch.actions_BA.shape, generator=state.generator)
            noise_BA = (own.policy_noise * normal_BA).clamp(-own.noise_clip, own.noise_clip)
            next_actions_BA = (pi_target(batch.next_states_BS) + noise_BA).clamp(-1.0, 1.0)
            next_q_B = q_target(batch.next_states_BS, next_actions_BA).amin(dim=0)
            backup_B = batch.rewards_B + own.discount * (1 - batch.terminals_B) * next_q_B
        q_loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
        value = step_on(q_optimizer, q_loss)
        num_steps += 1
        if num_steps % own.actor_interval == 0:
            actions_BA = pi(batch.states_BS)
            q_B = plain_q_1(torch.cat([batch.states_BS, actions_BA], dim=1))
            weight = own.q_weight / q_B.detach().abs().mean()
            step_on(pi_optimizer, (actions_BA - batch.actions_BA).square().mean() - weight * q_B.mean())
            follow(pi_target, pi, own.target_rate)
            follow(q_target, q, own.target_rate)
        return value

    return step


BASELINES: dict[type[StageConfig], Callable[[Any, States, Transitions], Step]] = {
    BehaviorConfig: behavior_step,
    CriticConfig: critic_step,
    EnergyConfig: energy_step,
    ActorConfig: actor_step,
    ActorCriticConfig: actor_critic_step,
}
"""Class of a stage's config -> (config, states of all stages, data) -> its step."""


class Sampler:
    """Guided actions in given states, eps_phi and grad E as they are written [M4]."""

    def __init__(self, policy: GuidedSampler, states_BS: Tensor):
        """Copy the policy's networks."""
        self._noise, self._energy, self._sampling = plain(policy.noise), plain(policy.energy), policy.sampling
        self._states_BS, self._action_dim = states_BS, policy.noise.action_dim

    def __call__(self) -> Tensor:
        """Return one action per state, [B, A]."""
        start_BA = torch.randn(len(self._states_BS), self._action_dim)
        return sampler.sample(self._noise_of, self._guide, start_BA, sampler.make_grid(self._sampling.num_steps))

    def _noise_of(self, a_t_BA: Tensor, t_B: Tensor) -> Tensor:
        return noise_of(self._noise, a_t_BA, self._states_BS, t_B)

    def _guide(self, a_t_BA: Tensor, t_B: Tensor) -> Tensor:
        beta_B = torch.full_like(t_B, self._sampling.beta)
        slope_BA = energy.slope(self._energy, a_t_BA, self._states_BS, t_B, beta_B)
        return self._sampling.guidance_scale * slope_BA


def load(dataset_id: str) -> tuple[Tensor, ...]:
    """Return states, actions, rewards, terminals and next states of a data set, episode by episode."""
    columns: list[list[NDArray[np.float32]]] = [[], [], [], [], []]
    for episode in minari.load_dataset(dataset_id).iterate_episodes():
        states = flatten(episode.observations)
        parts = (states[:-1], episode.actions, episode.rewards, episode.terminations, states[1:])
        for column, part in zip(columns, parts, strict=True):
            column.append(np.asarray(part, dtype=np.float32))
    return tuple(torch.from_numpy(np.concatenate(column)) for column in columns)
