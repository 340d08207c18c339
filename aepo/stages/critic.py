"""Stage 2: the value of actions, never asking about an action that the data do not have (IQL, arXiv 2110.06169).

V:    min E |tau - 1(u < 0)| u^2,   u = min_i Q'_i(s, a) - V(s)       [M6]
Q_i:  min E (r + gamma (1 - terminal) V(s') - Q_i(s, a))^2            [M7]
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import CriticConfig
from aepo.data.transitions import Batch, Transitions
from aepo.networks import TwinQ, ValueNet
from aepo.stages.optim import Adam, Ema


@dataclasses.dataclass
class CriticState:
    """Everything of stage 2 that a checkpoint holds; `target` is Q'."""

    q: TwinQ
    target: Ema
    v: ValueNet
    optimizer: Adam
    generator: torch.Generator
    step: int = 0


def start(config: CriticConfig, data: Transitions, generator: torch.Generator) -> CriticState:
    """Return stage 2 before its first step; weights are drawn from torch's global generator."""
    size = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
    q = TwinQ(data.state_dim, data.action_dim, **size).to(generator.device)
    v = ValueNet(data.state_dim, **size).to(generator.device)
    optimizer = Adam([*q.parameters(), *v.parameters()], lr=config.learning_rate, num_steps=config.steps)
    return CriticState(q, Ema(q, 1.0 - config.target_rate), v, optimizer, generator)


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


def train_step(state: CriticState, config: CriticConfig, data: Transitions) -> dict[str, Tensor]:
    """Take one gradient step on Q and V together and return its metrics, still on the device."""
    value, metrics = loss(state, config, data.draw(config.batch_size, state.generator))
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
