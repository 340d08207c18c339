"""Stage 2: the value of actions, never asking about an action that the data do not have (IQL, arXiv 2110.06169).

V:    min E |tau - 1(u < 0)| u^2,   u = min_i Q'_i(s, a) - V(s)       [M6]
Q_i:  min E (r + gamma (1 - terminal) V(s') - Q_i(s, a))^2            [M7]

with r + gamma V(s') continued along the data for n steps (n-step return), where the next state alone tells
little of an action. Or, over K actions a_i that stage 1 draws in s' (QGPO, arXiv 2304.12824):

V(s') = sum_i softmax_i(beta_Q min_j Q'_j(s', a_i)) min_j Q'_j(s', a_i)     [M8]
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from aepo.config import CriticConfig
from aepo.data.transitions import Batch, Transitions
from aepo.networks import TwinQ, ValueNet
from aepo.parallel import share
from aepo.stages import Stage, States, Step, fast
from aepo.stages.behavior import NUM_CHECKED, BehaviorState, sample_support
from aepo.stages.optim import Adam, Ema, Loss, Metrics


def in_sample_loss(
    q: TwinQ, v: ValueNet, target: TwinQ, batch: Batch, ahead: "NStepReturn", config: CriticConfig
) -> Loss:
    """Return the losses of V, Q_1 and Q_2, whose parameters are disjoint, in one sum.

    V:    E |tau - 1(u < 0)| u^2,   u = min_i Q'_i(s, a) - V(s)     [M6]
    Q_i:  E (r + gamma V(s') - Q_i(s, a))^2                         [M7]
    """
    with torch.no_grad():
        target_q_B = target.lowest(batch.states_BS, batch.actions_BA)
        backup_B = ahead.rewards_B + ahead.discounts_B * v(ahead.states_BS)
    v_B = v(batch.states_BS)
    u_B = target_q_B - v_B
    v_loss = expectile_loss(u_B, config.expectile)
    q_loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
    return v_loss + q_loss, lambda: {
        "loss": v_loss + q_loss,
        "v": v_B.mean(),
        "advantage_std": u_B.std(correction=0),
    }


def expectile_loss(u_B: Tensor, expectile: float) -> Tensor:
    """Return E |tau - 1(u < 0)| u^2, a scalar  [M6]."""
    return ((expectile - (u_B < 0).to(u_B.dtype)).abs() * u_B.square()).mean()


def in_support_loss(
    q: TwinQ, v: ValueNet, target: TwinQ, batch: Batch, support_BKA: Tensor, config: CriticConfig
) -> Loss:
    """Return the losses of Q_1, Q_2 and V in one sum; the network of V is what the energy's scale needs.

    Q_i:  E (r + gamma next_v - Q_i(s, a))^2,   next_v = sum_k softmax_k(beta_Q q_k) q_k,   q_k = min_i Q'_i(s', a_k)
    V:    E (next_v - V(s'))^2                                                                      [M7, M8]
    """
    num_actions = support_BKA.shape[1]
    with torch.no_grad():
        next_states_NS = batch.next_states_BS.repeat_interleave(num_actions, dim=0)
        q_BK = target.lowest(next_states_NS, support_BKA.flatten(0, 1)).view(-1, num_actions)
        next_v_B = soft_maximum(q_BK, config.backup_beta)
        backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_v_B
    q_loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
    v_loss = (v(batch.next_states_BS) - next_v_B).square().mean()
    return q_loss + v_loss, lambda: {
        "loss": q_loss + v_loss,
        "v": next_v_B.mean(),
        "support_std": q_BK.std(dim=1, correction=min(1, num_actions - 1)).mean(),
    }


def soft_maximum(q_BK: Tensor, beta: float) -> Tensor:
    """Return sum_i softmax_i(beta q_i) q_i, [B]: the mean at beta 0, the maximum as beta grows  [M8]."""
    return ((beta * q_BK).softmax(dim=1) * q_BK).sum(dim=1)


ByRow = Callable[[Tensor], Tensor]
"""Rows of the data [B] -> a number for each [B]."""
Table = TypeVar("Table")


@dataclasses.dataclass
class CriticState:
    """Everything of stage 2 that a checkpoint holds; `target` is Q'."""

    q: TwinQ
    target: Ema[TwinQ]
    v: ValueNet
    optimizer: Adam
    generator: torch.Generator
    support_index_M: Tensor
    """Transitions whose next states have support actions; none but for [M8]."""
    support_MKA: Tensor
    """Actions of the behaviour policy in these next states."""
    step: int = 0


def start(config: CriticConfig, data: Transitions, generator: torch.Generator) -> CriticState:
    """Return stage 2 before its first step; weights are drawn from torch's global generator."""
    q = TwinQ(data.state_dim, data.action_dim, config).to(generator.device)
    v = ValueNet(data.state_dim, config).to(generator.device)
    optimizer = Adam([*q.parameters(), *v.parameters()], lr=config.learning_rate, num_steps=config.steps)
    num_support = min(len(data), config.support[0])
    return CriticState(
        q=q,
        target=Ema(q, 1.0 - config.target_rate),
        v=v,
        optimizer=optimizer,
        generator=generator,
        support_index_M=torch.zeros(num_support, dtype=torch.long, device=generator.device),
        support_MKA=torch.zeros(num_support, config.num_samples, data.action_dim, device=generator.device),
    )


def measure(state: CriticState, config: CriticConfig, data: Transitions, behavior: BehaviorState) -> None:
    """Draw what stage 2 takes from stage 1 before its first step of a round: support actions [M8]."""
    if num := len(state.support_index_M):
        device = state.generator.device
        state.support_index_M = torch.randperm(len(data), generator=state.generator, device=device)[:num]
        next_states_MS = data.take(state.support_index_M).next_states_BS
        state.support_MKA = sample_support(behavior, next_states_MS, config.num_samples, state.generator)


class NStepReturn(NamedTuple):
    """What follows a transition: Q's target is rewards + discounts V(states)."""

    rewards_B: Tensor
    """Discounted sum over the steps taken."""
    discounts_B: Tensor
    """gamma^(steps taken), 0 behind a terminal."""
    states_BS: Tensor


class NStepReturns(NamedTuple):
    """`NStepReturn` of every transition of the data, its states as rows."""

    rewards_N: Tensor
    discounts_N: Tensor
    last_N: Tensor
    """Row of the last step taken."""


def n_step_returns(data: Transitions, num_steps: int, discount: float) -> NStepReturns:
    """Return the n-step return of every transition but for V; an episode that ends sooner is left there.

    Args:
        data: N transitions, episode after episode.
        num_steps: n >= 1.
        discount: gamma.
    """
    device = data.rows_ND.device
    parts = [data.batch(part_BD)[2:4] for part_BD in torch.split(data.rows_ND, 65_536)]
    rewards_N, terminals_N = (torch.cat(column) for column in zip(*parts, strict=True))
    row_N = torch.arange(len(data), device=device)
    end_N = data.episode_ends_E[torch.searchsorted(data.episode_ends_E, row_N, right=True)]
    sum_N, discounts_N, last_N = rewards_N.clone(), torch.full_like(rewards_N, discount), row_N.clone()
    for k in range(1, num_steps):
        goes_on_N = row_N + k < end_N
        if not goes_on_N.any():
            break
        last_N = torch.where(goes_on_N, row_N + k, last_N)
        sum_N += torch.where(goes_on_N, discounts_N * rewards_N[last_N], 0.0)
        discounts_N = torch.where(goes_on_N, discounts_N * discount, discounts_N)
    return NStepReturns(sum_N, discounts_N * (1.0 - terminals_N[last_N]), last_N)


def _ahead(
    data: Transitions, batch: Batch, index_B: Tensor, steps: NStepReturns | None, config: CriticConfig
) -> NStepReturn:
    """Return what follows the transitions of these rows."""
    if steps is None:
        return NStepReturn(batch.rewards_B, config.discount * (1.0 - batch.terminals_B), batch.next_states_BS)
    next_states_BS = data.take(steps.last_N[index_B]).next_states_BS
    return NStepReturn(steps.rewards_N[index_B], steps.discounts_N[index_B], next_states_BS)


def _noised(batch: Batch, config: CriticConfig, generator: torch.Generator) -> Batch:
    """Return a batch with noise on what Q and V are asked about; what follows stays as it is."""

    def draw(part_BX: Tensor) -> Tensor:
        shape = config.batch_size, part_BX.shape[1]
        return share(torch.randn(shape, generator=generator, device=generator.device))

    if config.state_noise:
        batch = batch._replace(states_BS=batch.states_BS + config.state_noise * draw(batch.states_BS))
    if config.action_noise:
        batch = batch._replace(actions_BA=batch.actions_BA + config.action_noise * draw(batch.actions_BA))
    return batch


def train_step(
    state: CriticState, config: CriticConfig, data: Transitions, steps: NStepReturns | None = None
) -> Metrics:
    """Take one gradient step on Q and V together and return its metrics.

    Args:
        state: the stage.
        config: its settings.
        data: transitions.
        steps: what `n_step_returns` returned, for `backup_steps` above 1.
    """
    generator, num_support = state.generator, len(state.support_index_M)
    num_rows = num_support or len(data)
    index_B = share(torch.randint(num_rows, (config.batch_size,), generator=generator, device=generator.device))
    nets = state.q, state.v, state.target.net
    if num_support:
        batch = _noised(data.take(state.support_index_M[index_B]), config, generator)
        gradients, metrics = fast.in_support(*nets, batch, state.support_MKA[index_B], config)
    else:
        batch = _noised(data.take(index_B), config, generator)
        gradients, metrics = fast.in_sample(*nets, batch, _ahead(data, batch, index_B, steps, config), config)
    state.optimizer.step_along(gradients)
    state.target.update()
    state.step += 1
    return metrics


@torch.no_grad()
def advantages(q: TwinQ, state: CriticState, data: Transitions, index_M: Tensor | None = None) -> Tensor:
    """Return min_i Q_i(s, a) - V(s) of every transition, or of those of these rows, [N] or [M]; `q` is Q or Q'."""
    index_M = torch.arange(len(data), device=data.rows_ND.device) if index_M is None else index_M
    parts = []
    for part_B in torch.split(index_M, 8192):
        batch = data.take(part_B)
        parts.append(q.lowest(batch.states_BS, batch.actions_BA) - state.v(batch.states_BS))
    return torch.cat(parts)


def cached_until_trained(state: CriticState, compute: Callable[[], Table]) -> Callable[[], Table]:
    """Return what gives a value that depends on the critic, computed when first asked for.

    It is computed again when the critic has learned since, as it has a round later.
    """
    known: tuple[int, Table] | None = None

    def value() -> Table:
        nonlocal known
        if known is None or known[0] != state.step:
            known = state.step, compute()
        return known[1]

    return value


def advantage_of_rows(q: TwinQ, state: CriticState, data: Transitions, *, num_draws: int) -> ByRow:
    """Return `advantages` as a function of rows, for a stage that draws `num_draws` of them while the critic rests.

    If that is as many as there are, each is computed once, as soon as one is asked for.
    """
    if num_draws < len(data):
        return lambda index_B: advantages(q, state, data, index_B)
    table = cached_until_trained(state, lambda: advantages(q, state, data))
    return lambda index_B: table()[index_B]


def advantage_scale(state: CriticState, data: Transitions, *, num_samples: int = 65_536) -> Tensor:
    """Return the standard deviation of min_i Q_i(s, a) - V(s) over the data, a scalar > 0.

    Q is divided by it, so that one beta means the same on every task (method sheet, stage 2).
    """
    index_M = torch.arange(0, len(data), max(1, len(data) // num_samples), device=data.rows_ND.device)
    u_M = advantages(state.q, state, data, index_M)
    return u_M.std(correction=min(1, len(u_M) - 1)).clamp(min=1e-6)  # of one transition there is no spread


def learns_from(config: CriticConfig) -> tuple[str, ...]:
    """Return stage 1 for a learner that backs up over its actions [M8]."""
    return ("behavior",) if config.support[0] else ()


def prepare(config: CriticConfig, states: States, data: Transitions) -> None:
    """Draw the support actions, if the learner has any."""
    if learns_from(config):
        measure(states["critic"], config, data, states["behavior"])


def make_step(config: CriticConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of stage 2."""
    steps = n_step_returns(data, config.backup_steps, config.discount) if config.backup_steps > 1 else None
    return lambda: train_step(states["critic"], config, data, steps)


def make_check(config: CriticConfig, states: States, held_out: Transitions) -> Step:
    """Return the function that measures Q and V on held-out episodes.

    `held_out_loss` is the squared error of Q against r + gamma V(s') over n steps, in units of V's variance there;
    `advantage_corr` the correlation of Q - V with what was earned from there to the end of the episode, less V.
    """
    state, index_M = states["critic"], held_out.sample_rows(NUM_CHECKED)
    batch = held_out.take(index_M)
    near, far = (n_step_returns(held_out, steps, config.discount) for steps in (config.backup_steps, len(held_out)))

    def backup(ahead: NStepReturns) -> Tensor:
        following = NStepReturn(
            ahead.rewards_N[index_M], ahead.discounts_N[index_M], held_out.take(ahead.last_N[index_M])[4]
        )
        value_M: Tensor = state.v(following.states_BS)
        return following.rewards_B + following.discounts_B * value_M

    def check() -> Metrics:
        q_M, v_M = state.q.lowest(batch.states_BS, batch.actions_BA), state.v(batch.states_BS)
        error_M, earned_M = q_M - backup(near), backup(far) - v_M
        return lambda: {
            "held_out_loss": error_M.square().mean() / v_M.var(correction=0).clamp(min=1e-12),
            "advantage_corr": _correlation(q_M - v_M, earned_M),
        }

    return check


def _correlation(a_M: Tensor, b_M: Tensor) -> Tensor:
    """Return Pearson's correlation, 0 where one is constant."""
    a_M, b_M = a_M - a_M.mean(), b_M - b_M.mean()
    correlation: Tensor = (a_M * b_M).sum() / (a_M.norm() * b_M.norm()).clamp(min=1e-12)
    return correlation


STAGE = Stage(name="critic", start=start, step=make_step, prepare=prepare, check=make_check, learns_from=learns_from)
