"""The same steps as most research code writes them: the baseline of `aepo bench`.

Same losses, networks, batches and data. PyTorch's own linear layers, one optimizer per network and its default loop,
averages parameter by parameter, a loss read out at every step, autograd for the slope.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import minari
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal

from aepo.config import BehaviorConfig, CriticConfig, EnergyConfig, IQLConfig
from aepo.data.episodes import flatten
from aepo.data.transitions import Transitions
from aepo.diffusion import sampler
from aepo.networks import Mlp
from aepo.pipeline import GuidedState, IQLState
from aepo.policy import GuidedPolicy
from aepo.stages import actor, behavior, critic, energy

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


def behavior_step(config: BehaviorConfig, data: Transitions) -> Step:
    """Return stage 1's step."""
    state = behavior.start(config, data, torch.Generator())
    state.net, average = plain(state.net), plain(state.ema.net)
    optimizer = adam(state.net.parameters())

    def step() -> float:
        loss, _ = behavior.loss(state, data.draw(config.batch_size, state.generator))
        value = step_on(optimizer, loss)
        follow(average, state.net, 1 - config.ema_decay)
        return value

    return step


def critic_step(config: CriticConfig, data: Transitions) -> Step:
    """Return the step of IQL's critics, V and Q one after the other."""
    state = critic.start(config, data, torch.Generator())
    q, v, target = plain(state.q), plain(state.v), plain(state.target.net)
    q_optimizer, v_optimizer = adam(q.parameters()), adam(v.parameters())

    def step() -> float:
        batch = data.draw(config.batch_size, state.generator)
        with torch.no_grad():
            target_q_B = target(batch.states_BS, batch.actions_BA).amin(dim=0)
            next_v_B = v(batch.next_states_BS)
        advantage_B = target_q_B - v(batch.states_BS)
        step_on(v_optimizer, ((config.expectile - (advantage_B < 0).float()).abs() * advantage_B**2).mean())
        backup_B = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_v_B
        q_loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
        value = step_on(q_optimizer, q_loss)
        follow(target, q, config.target_rate)
        return value

    return step


def energy_step(config: EnergyConfig, state: GuidedState, data: Transitions) -> Step:
    """Return stage 3's step; Q is asked for every batch."""
    own = energy.start(config, data, torch.Generator())
    own.net, average = plain(own.net), plain(own.ema.net)
    model, judge = copy.copy(state.behavior), copy.copy(state.critic)
    model.ema, judge.q, judge.v = plain(model.ema), plain(judge.q), plain(judge.v)
    value = energy.q_source(judge, own, config, data).value

    def of_rows(index_B: Tensor) -> Tensor:
        batch = data.take(index_B)
        with torch.no_grad():
            return value(batch.states_BS, batch.actions_BA)

    optimizer = adam(own.net.parameters())

    def step() -> float:
        loss, _ = energy.loss(own, config, data, model, energy.QSource(value, of_rows))
        read = step_on(optimizer, loss)
        follow(average, own.net, 1 - config.ema_decay)
        return read

    return step


def actor_step(config: IQLConfig, state: IQLState, data: Transitions) -> Step:
    """Return the step of IQL's actor; its advantages are asked for every batch."""
    own = actor.start(config.actor, data, torch.Generator())
    own.net = plain(own.net)
    target, judge = plain(state.critic.target.net), copy.copy(state.critic)
    judge.v = plain(judge.v)
    optimizer = adam(own.net.parameters())

    def step() -> float:
        index_B = data.draw_rows(config.actor.batch_size, own.generator)
        advantage_B = critic.advantages(target, judge, data, index_B)
        batch = data.take(index_B)
        weight_B = (config.actor.inverse_temperature * advantage_B).exp().clamp(max=actor.MAX_WEIGHT)
        policy = Normal(own.net(batch.states_BS), own.net.log_std_A.clamp(-5.0, 2.0).exp())
        log_prob_B = policy.log_prob(batch.actions_BA).sum(dim=1)  # type: ignore[no-untyped-call]
        return step_on(optimizer, -(weight_B * log_prob_B).mean())

    return step


class Sampler:
    """Guided actions in given states, eps_phi and grad E as they are written [M4]."""

    def __init__(self, policy: GuidedPolicy, states_BS: Tensor):
        """Copy the policy's networks."""
        self._noise, self._energy, self._sampling = plain(policy.noise), plain(policy.energy), policy.sampling
        self._states_BS, self._action_dim = states_BS, policy.noise.action_dim

    def __call__(self) -> Tensor:
        """Return one action per state, [B, A]."""
        start_BA = torch.randn(len(self._states_BS), self._action_dim)
        return sampler.sample(self._noise_of, self._guide, start_BA, sampler.make_grid(self._sampling.num_steps))

    def _noise_of(self, a_t_BA: Tensor, t_B: Tensor) -> Tensor:
        return self._noise(a_t_BA, self._states_BS, t_B)  # type: ignore[no-any-return]

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
