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
from aepo.networks import Mlp, TwinQ, ValueNet
from aepo.parallel import share
from aepo.stages import Stage, States, Step
from aepo.stages.behavior import BehaviorState, sample_support
from aepo.stages.optim import Adam, Ema, Metrics

OfRows = Callable[[Tensor], Tensor]
"""Rows of the data [B] -> a number for each [B]."""
Loss = Callable[[], Tensor]
"""A scalar, computed when it is asked for."""
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
    num_support = min(len(data), config.num_support_states) if config.learner == "softmax_in_support" else 0
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
    if config.learner == "softmax_in_support":
        num, device = len(state.support_index_M), state.generator.device
        state.support_index_M = torch.randperm(len(data), generator=state.generator, device=device)[:num]
        next_states_MS = data.take(state.support_index_M).next_states_BS
        state.support_MKA = sample_support(behavior, next_states_MS, config.num_samples, state.generator)


def expectile_loss(u_B: Tensor, expectile: float) -> Tensor:
    """Return the mean of |tau - 1(u < 0)| u^2, a scalar  [M6]."""
    return (_weighted(u_B, expectile) * u_B).mean()


def expectile_slope(u_B: Tensor, expectile: float) -> Tensor:
    """Return the gradient of `expectile_loss` by u, [B]."""
    return 2.0 / u_B.shape[0] * _weighted(u_B, expectile)


def _weighted(u_B: Tensor, expectile: float) -> Tensor:
    """Return |tau - 1(u < 0)| u."""
    return torch.where(u_B < 0, (1.0 - expectile) * u_B, expectile * u_B)


def squared_error(net: Mlp, x_BI: Tensor, target_B: Tensor) -> tuple[Loss, list[Tensor]]:
    """Return the mean squared error of a network's only output and its gradients by the parameters."""
    error_B1, gradients = net.fit(x_BI, target_B.unsqueeze(1))
    return lambda: error_B1.square().mean(), gradients


def squared_errors(q: TwinQ, pairs_BP: Tensor, target_B: Tensor) -> tuple[Loss, list[Tensor]]:
    """Return the sum of both critics' mean squared errors and its gradients by their parameters  [M7].

    Args:
        q: Q_1 and Q_2.
        pairs_BP: states and actions side by side.
        target_B: what both follow.
    """
    (loss_1, of_q_1), (loss_2, of_q_2) = (squared_error(net, pairs_BP, target_B) for net in (q.q_1, q.q_2))
    return lambda: loss_1() + loss_2(), [*of_q_1, *of_q_2]


class Ahead(NamedTuple):
    """What follows a transition: Q's target is rewards + discounts V(states)."""

    rewards_B: Tensor
    """Discounted sum over the steps taken."""
    discounts_B: Tensor
    """gamma^(steps taken), 0 behind a terminal."""
    states_BS: Tensor


class Steps(NamedTuple):
    """`Ahead` of every transition of the data, its states as rows."""

    rewards_N: Tensor
    discounts_N: Tensor
    last_N: Tensor
    """Row of the last step taken."""


def look_ahead(data: Transitions, num_steps: int, discount: float) -> Steps:
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
    return Steps(sum_N, discounts_N * (1.0 - terminals_N[last_N]), last_N)


@torch.no_grad()
def gradients(state: CriticState, config: CriticConfig, batch: Batch, ahead: Ahead) -> tuple[list[Tensor], Metrics]:
    """Return those of the sum of the losses, whose parameters are disjoint, Q's before V's, and metrics  [M6, M7]."""
    backup_B = torch.addcmul(ahead.rewards_B, ahead.discounts_B, state.v.forward(ahead.states_BS))
    v_B1, pull = state.v.body.vjp(batch.states_BS)
    pairs_BP = torch.cat([batch.states_BS, batch.actions_BA], dim=1)
    u_B = state.target.net.lowest_of(pairs_BP) - v_B1.squeeze(1)
    of_v = pull(-expectile_slope(u_B, config.expectile).unsqueeze(1))
    q_loss, of_q = squared_errors(state.q, pairs_BP, backup_B)
    return [*of_q, *of_v], lambda: {
        "loss": q_loss() + expectile_loss(u_B, config.expectile),
        "v": v_B1.mean(),
        "advantage_std": u_B.std(correction=0),
    }


@torch.no_grad()
def softmax_gradients(
    state: CriticState, config: CriticConfig, batch: Batch, support_BKA: Tensor
) -> tuple[list[Tensor], Metrics]:
    """Return those of the sum of the losses with the in-support backup, Q's before V's, and metrics  [M7, M8].

    V, which the energy's scale needs, follows the backup by squared error in the next states.
    """
    num_support = support_BKA.shape[1]
    repeated = batch.next_states_BS.repeat_interleave(num_support, dim=0)
    q_BK = state.target.net.lowest(repeated, support_BKA.flatten(0, 1)).view(-1, num_support)
    next_v_B = soft_maximum(q_BK, config.backup_beta)
    backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_v_B
    q_loss, of_q = squared_errors(state.q, torch.cat([batch.states_BS, batch.actions_BA], dim=1), backup_B)
    v_loss, of_v = squared_error(state.v.body, batch.next_states_BS, next_v_B)
    return [*of_q, *of_v], lambda: {
        "loss": q_loss() + v_loss(),
        "v": next_v_B.mean(),
        "support_std": q_BK.std(dim=1, correction=min(1, q_BK.shape[1] - 1)).mean(),
    }


def soft_maximum(q_BK: Tensor, beta: float) -> Tensor:
    """Return sum_i softmax_i(beta q_i) q_i, [B]: the mean at beta 0, the maximum as beta grows  [M8]."""
    return ((beta * q_BK).softmax(dim=1) * q_BK).sum(dim=1)


def train_step(state: CriticState, config: CriticConfig, data: Transitions, steps: Steps | None = None) -> Metrics:
    """Take one gradient step on Q and V together and return its metrics.

    Args:
        state: the stage.
        config: its settings.
        data: transitions.
        steps: what `look_ahead` returned, for `backup_steps` above 1.
    """
    generator = state.generator
    num_rows = len(data) if config.learner == "expectile" else len(state.support_index_M)
    index_B = share(torch.randint(num_rows, (config.batch_size,), generator=generator, device=generator.device))
    if config.learner == "expectile":
        batch = data.take(index_B)
        if steps is None:
            discounts_B = config.discount * (1.0 - batch.terminals_B)
            ahead = Ahead(batch.rewards_B, discounts_B, batch.next_states_BS)
        else:
            next_states_BS = data.take(steps.last_N[index_B]).next_states_BS
            ahead = Ahead(steps.rewards_N[index_B], steps.discounts_N[index_B], next_states_BS)
        found, metrics = gradients(state, config, batch, ahead)
    else:
        batch = data.take(state.support_index_M[index_B])
        found, metrics = softmax_gradients(state, config, batch, state.support_MKA[index_B])
    state.optimizer.step_along(found)
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


def while_resting(state: CriticState, compute: Callable[[], Table]) -> Callable[[], Table]:
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


def advantage_of_rows(q: TwinQ, state: CriticState, data: Transitions, *, num_draws: int) -> OfRows:
    """Return `advantages` as a function of rows, for a stage that draws `num_draws` of them while the critic rests.

    If that is as many as there are, each is computed once, as soon as one is asked for.
    """
    if num_draws < len(data):
        return lambda index_B: advantages(q, state, data, index_B)
    table = while_resting(state, lambda: advantages(q, state, data))
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
    return ("behavior",) if config.learner == "softmax_in_support" else ()


def prepare(config: CriticConfig, states: States, data: Transitions) -> None:
    """Draw the support actions, if the learner has any."""
    if learns_from(config):
        measure(states["critic"], config, data, states["behavior"])


def make_step(config: CriticConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of stage 2."""
    steps = look_ahead(data, config.backup_steps, config.discount) if config.backup_steps > 1 else None
    return lambda: train_step(states["critic"], config, data, steps)


STAGE = Stage(name="critic", start=start, step=make_step, prepare=prepare, learns_from=learns_from)
