"""The same steps as most research code writes them: the baseline of `aepo bench`.

They have the losses with which the stage files open, the same networks, batches and data, and nothing of how our steps
compute them: PyTorch's own linear layers, one optimizer per network and its default loop, averages parameter by
parameter, a loss read out at every step, autograd for every gradient.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import minari
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aepo.config import ActorConfig, ActorCriticConfig, BehaviorConfig, CriticConfig, EnergyConfig
from aepo.data.episodes import flatten
from aepo.data.transitions import Batch, Pairs, Transitions
from aepo.diffusion import posterior, sampler
from aepo.diffusion.networks import ClosedForm
from aepo.diffusion.schedule import alpha_sigma, draw_times
from aepo.networks import Mlp
from aepo.samplers import GuidedSampler
from aepo.stages import Stage, States, actor, actor_critic, behavior, critic, energy, targets
from aepo.stages.optim import Loss

Step = Callable[[], float]
Net = TypeVar("Net", bound=nn.Module)


def plain(net: Net) -> Net:
    """Return a copy whose layers are PyTorch's."""
    twin = copy.deepcopy(net).requires_grad_(True)  # of averages, too
    for module in twin.modules():
        if isinstance(module, Mlp):
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return twin


def step_on(optimizers: Sequence[torch.optim.Optimizer], loss: Loss) -> float:
    """Take a gradient step and read the loss out."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss[0].backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    return loss[0].item()


def soft_update(average: nn.Module, net: nn.Module, rate: float) -> None:
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


def behavior_step(config: BehaviorConfig, states: States, data: Transitions) -> Step:  # noqa: ARG001  # asks no other
    """Return stage 1's step."""
    state = behavior.start(config, data, torch.Generator())
    net, average = plain(state.net), plain(state.ema.net)
    optimizer = adam(net.parameters())

    def step() -> float:
        batch = draw(data, config.batch_size, state.generator)
        t_B = draw_times(config.batch_size, state.generator)
        eps_BA = torch.randn(batch.actions_BA.shape, generator=state.generator)
        pairs = Pairs(batch.states_BS, batch.actions_BA)
        value = step_on([optimizer], behavior.loss(net, nn.Identity(), pairs, t_B, eps_BA))
        soft_update(average, net, 1 - config.ema_decay)
        return value

    return step


def critic_step(config: CriticConfig, states: States, data: Transitions) -> Step:
    """Return the step of the critics, V and Q: on the data's actions, or over actions of stage 1 [M8]."""
    state = critic.start(config, data, torch.Generator())
    if config.support[0]:
        critic.measure(state, config, data, states["behavior"])
    q, v, target = plain(state.q), plain(state.v), plain(state.target.net)
    optimizers = [adam(q.parameters()), adam(v.parameters())]

    def step() -> float:
        if config.support[0]:
            index_B = torch.randint(len(state.support_index_M), (config.batch_size,), generator=state.generator)
            batch, support_BKA = take(data, state.support_index_M[index_B]), state.support_MKA[index_B]
            loss = critic.in_support_loss(q, v, target, batch, support_BKA, config)
        else:
            batch = draw(data, config.batch_size, state.generator)
            discounts_B = config.discount * (1 - batch.terminals_B)
            ahead = critic.NStepReturn(batch.rewards_B, discounts_B, batch.next_states_BS)
            loss = critic.in_sample_loss(q, v, target, batch, ahead, config)
        value = step_on(optimizers, loss)
        soft_update(target, q, config.target_rate)
        return value

    return step


def energy_step(config: EnergyConfig, states: States, data: Transitions) -> Step:
    """Return stage 3's step, of any target; Q is asked for every batch."""
    behavior_state, critic_state = states["behavior"], states["critic"]
    state = energy.start(config, data, torch.Generator())
    energy.measure(state, config, data, behavior_state)
    state.net, average = plain(state.net), plain(state.ema.net)
    judge = dataclasses.replace(critic_state, q=plain(critic_state.q), v=plain(critic_state.v))
    few = dataclasses.replace(config, steps=1)  # draws, so that Q is not asked of all data once
    value_of = energy.q_source(judge, state, few, data).value
    source = energy.source_of(value_of, targets.by_autograd(value_of), state, few, data)
    own = dataclasses.replace(behavior_state, ema=plain(behavior_state.ema), variance=plain(behavior_state.variance))
    optimizer = adam(state.net.parameters())

    def step() -> float:
        x = energy.draw(state, config, data, own, source)
        value = step_on([optimizer], energy.loss(state.net, config.target, x))
        soft_update(average, state.net, 1 - config.ema_decay)
        return value

    return step


def actor_step(config: ActorConfig, states: States, data: Transitions) -> Step:
    """Return the step of the actor that follows a critic; its advantages are asked for every batch."""
    state = actor.start(config, data, torch.Generator())
    net, target, v = plain(state.net), plain(states["critic"].target.net), plain(states["critic"].v)
    optimizer = adam(net.parameters())

    def step() -> float:
        batch = draw(data, config.batch_size, state.generator)
        with torch.no_grad():
            advantage_B = target(batch.states_BS, batch.actions_BA).amin(dim=0) - v(batch.states_BS)
        pairs = Pairs(batch.states_BS, batch.actions_BA)
        return step_on([optimizer], actor.loss(net, pairs, advantage_B, config))

    return step


def actor_critic_step(config: ActorCriticConfig, states: States, data: Transitions) -> Step:  # noqa: ARG001  # asks no other
    """Return the step of actor and critics together, of which every `actor_interval`-th trains the actor as well."""
    state = actor_critic.start(config, data, torch.Generator())
    pi, pi_target = plain(state.actor), plain(state.actor_target.net)
    q, q_target = plain(state.q), plain(state.q_target.net)
    pi_optimizer, q_optimizer = adam(pi.parameters()), adam(q.parameters())
    num_steps = 0

    def step() -> float:
        nonlocal num_steps
        batch = draw(data, config.batch_size, state.generator)
        normal_BA = torch.randn(batch.actions_BA.shape, generator=state.generator)
        value = step_on([q_optimizer], actor_critic.q_loss(q, q_target, pi_target, batch, normal_BA, config))
        num_steps += 1
        if num_steps % config.actor_interval == 0:
            step_on([pi_optimizer], actor_critic.pi_loss(pi, q, batch, config))
            soft_update(pi_target, pi, config.target_rate)
            soft_update(q_target, q, config.target_rate)
        return value

    return step


BASELINES: dict[Stage, Callable[[Any, States, Transitions], Step]] = {
    behavior.STAGE: behavior_step,
    critic.STAGE: critic_step,
    energy.STAGE: energy_step,
    actor.STAGE: actor_step,
    actor_critic.STAGE: actor_critic_step,
}
"""Stage -> (its config, states of all stages, data) -> its step."""


class Sampler:
    """Guided actions in given states, eps_phi and grad E as they are written [M4]."""

    def __init__(self, policy: GuidedSampler, states_BS: Tensor):
        """Copy the policy's networks."""
        self._noise, self._energy, self._sampling = plain(policy.noise), plain(policy.energy), policy.sampling
        self._states_BS, self._action_dim = states_BS, policy.noise.action_dim
        if isinstance(policy.energy, ClosedForm):
            assert policy.data is not None
            times_N = sampler.make_grid(policy.sampling.num_steps).t[:-1]
            variance_NA = policy.budget(policy.data).variance_NA
            self._q, self._variance_of = plain(policy.q), dict(zip(times_N.tolist(), variance_NA, strict=True))

    def __call__(self) -> Tensor:
        """Return one action per state, [B, A]."""
        start_BA = torch.randn(len(self._states_BS), self._action_dim)
        return sampler.sample(self._noise_of, self._guide, start_BA, sampler.make_grid(self._sampling.num_steps))

    def _noise_of(self, a_t_BA: Tensor, t_B: Tensor) -> Tensor:
        noise_BA: Tensor = self._noise(a_t_BA, self._states_BS, t_B)
        return noise_BA

    def _guide(self, a_t_BA: Tensor, t_B: Tensor) -> Tensor:
        if isinstance(self._energy, ClosedForm):
            return self._sampling.guidance_scale * self._closed_slope(self._energy, a_t_BA, t_B)
        beta_B = torch.full_like(t_B, self._sampling.beta)
        slope_BA = energy.slope(self._energy, a_t_BA, self._states_BS, t_B, beta_B)
        return self._sampling.guidance_scale * slope_BA

    def _closed_slope(self, closed: ClosedForm, a_t_BA: Tensor, t_B: Tensor) -> Tensor:
        """Return alpha_t / sigma_t^2 beta v_t grad_a Q(s, m_t) / scale  [M11]."""
        mean_BA = posterior.posterior_mean(a_t_BA, self._noise_of(a_t_BA, t_B), t_B)
        _, slope_BA = targets.by_autograd(self._q.lowest)(self._states_BS, mean_BA)
        alpha_B, sigma_B = alpha_sigma(t_B)
        variance_A = self._variance_of[float(t_B[0])]
        factor_B = alpha_B / sigma_B.square() * self._sampling.beta / closed.scale
        closed_BA: Tensor = factor_B[:, None] * variance_A * slope_BA
        return closed_BA


def load(dataset_id: str) -> tuple[Tensor, ...]:
    """Return states, actions, rewards, terminals and next states of a data set, episode by episode."""
    columns: list[list[NDArray[np.float32]]] = [[], [], [], [], []]
    for episode in minari.load_dataset(dataset_id).iterate_episodes():
        states = flatten(episode.observations)
        parts = (states[:-1], episode.actions, episode.rewards, episode.terminations, states[1:])
        for column, part in zip(columns, parts, strict=True):
            column.append(np.asarray(part, dtype=np.float32))
    return tuple(torch.from_numpy(np.concatenate(column)) for column in columns)
