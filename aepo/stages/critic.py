"""Stage 2: the value of actions, never asking about an action that the data do not have (IQL, arXiv 2110.06169).

V:    min E |tau - 1(u < 0)| u^2,   u = min_i Q'_i(s, a) - V(s)       [M6]
Q_i:  min E (r + gamma (1 - terminal) V(s') - Q_i(s, a))^2            [M7]

or, over K actions a_i that stage 1 draws in s' (QGPO, arXiv 2304.12824):

V(s') = sum_i softmax_i(beta_Q min_j Q'_j(s', a_i)) min_j Q'_j(s', a_i)     [M8]
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import CriticConfig
from aepo.data.transitions import Batch, Transitions
from aepo.networks import TwinQ, ValueNet
from aepo.stages.behavior import BehaviorState, sample_support
from aepo.stages.optim import Adam, Ema


@dataclasses.dataclass
class CriticState:
    """Everything of stage 2 that a checkpoint holds; `target` is Q'."""

    q: TwinQ
    target: Ema
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
    size = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
    q = TwinQ(data.state_dim, data.action_dim, **size).to(generator.device)
    v = ValueNet(data.state_dim, **size).to(generator.device)
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
    """Draw what stage 2 takes from the trained stage 1 before its first step: support actions [M8]."""
    if config.learner == "softmax_in_support":
        num, device = len(state.support_index_M), state.generator.device
        state.support_index_M = torch.randperm(len(data), generator=state.generator, device=device)[:num]
        next_states_MS = data.batch(data.rows_ND.index_select(0, state.support_index_M)).next_states_BS
        state.support_MKA = sample_support(behavior, next_states_MS, config.num_samples, state.generator)


def expectile_loss(u_B: Tensor, expectile: float) -> Tensor:
    """Return the mean of |tau - 1(u < 0)| u^2, a scalar  [M6]."""
    return (torch.where(u_B < 0, 1.0 - expectile, expectile) * u_B.square()).mean()


def loss(state: CriticState, config: CriticConfig, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of both losses, whose parameters are disjoint, and metrics  [M6, M7]."""
    with torch.no_grad():
        target_q_B = state.target(batch.states_BS, batch.actions_BA).amin(dim=0)
        backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * state.v(batch.next_states_BS)
    v_B = state.v(batch.states_BS)
    v_loss = expectile_loss(target_q_B - v_B, config.expectile)
    q_loss = (state.q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
    metrics = {
        "loss": (q_loss + v_loss).detach(),
        "v": v_B.detach().mean(),
        "advantage_std": (target_q_B - v_B.detach()).std(),
    }
    return q_loss + v_loss, metrics


def softmax_loss(
    state: CriticState, config: CriticConfig, batch: Batch, support_BKA: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of both losses with the in-support backup, and metrics  [M7, M8].

    V, which the energy's scale needs, follows the backup by squared error in the next states.
    """
    num_support = support_BKA.shape[1]
    with torch.no_grad():
        repeated = batch.next_states_BS.repeat_interleave(num_support, dim=0)
        q_BK = state.target(repeated, support_BKA.flatten(0, 1)).amin(dim=0).view(-1, num_support)
        next_v_B = soft_maximum(q_BK, config.backup_beta)
        backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_v_B
    v_B = state.v(batch.next_states_BS)
    v_loss = (v_B - next_v_B).square().mean()
    q_loss = (state.q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
    metrics = {"loss": (q_loss + v_loss).detach(), "v": next_v_B.mean(), "support_std": q_BK.std(dim=1).mean()}
    return q_loss + v_loss, metrics


def soft_maximum(q_BK: Tensor, beta: float) -> Tensor:
    """Return sum_i softmax_i(beta q_i) q_i, [B]: the mean at beta 0, the maximum as beta grows  [M8]."""
    return ((beta * q_BK).softmax(dim=1) * q_BK).sum(dim=1)


def train_step(state: CriticState, config: CriticConfig, data: Transitions) -> dict[str, Tensor]:
    """Take one gradient step on Q and V together and return its metrics, still on the device."""
    if config.learner == "expectile":
        value, metrics = loss(state, config, data.draw(config.batch_size, state.generator))
    else:
        shape = (config.batch_size,)
        device = state.generator.device
        pick_B = torch.randint(len(state.support_index_M), shape, generator=state.generator, device=device)
        batch = data.batch(data.rows_ND.index_select(0, state.support_index_M[pick_B]))
        value, metrics = softmax_loss(state, config, batch, state.support_MKA[pick_B])
    state.optimizer.step_on(value)
    state.target.update(state.q)
    state.step += 1
    return metrics


@torch.no_grad()
def advantage_scale(state: CriticState, data: Transitions, *, num_samples: int = 65_536) -> Tensor:
    """Return the standard deviation of min_i Q_i(s, a) - V(s) over the data, a scalar > 0.

    Q is divided by it, so that one beta means the same on every task (method sheet, stage 2).
    """
    index = torch.arange(0, len(data), max(1, len(data) // num_samples), device=data.rows_ND.device)
    parts = []
    for rows_BD in torch.split(data.rows_ND.index_select(0, index), 8192):
        batch = data.batch(rows_BD)
        parts.append(state.q(batch.states_BS, batch.actions_BA).amin(dim=0) - state.v(batch.states_BS))
    return torch.cat(parts).std().clamp(min=1e-6)
