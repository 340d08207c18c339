"""FQL (arXiv 2502.02538): a flow clones the data; a policy of one step stays near it and climbs Q.

Q_i:  min E (y - Q_i(s, a))^2,   y = r + gamma (1 - terminal) mean_j Q'_j(s', clip(mu(s', z)))   [or min_j]
v:    min E |v(s, x_t, t) - (a - x_0)|^2 / A,   x_t = (1 - t) x_0 + t a,   t ~ U(0, 1)
mu:   min E alpha |mu(s, z) - flow(s, z)|^2 / A - lambda mean_i Q_i(s, clip(mu(s, z)))
      flow(s, z): Euler steps along v from z, clipped, without gradient;   lambda = 1 or 1 / E|mean_i Q_i|

x_0 and z are drawn from N(0, 1). Networks are those of the authors' code (github.com/seohongpark/fql): GELU, and in Q a
layer normalisation behind it. As there, one Adam moves all networks at once, and Q' follows Q as it was before that.

Kept apart from it: states are standardised, rewards scaled by the task's rule, and the learning rate falls by a cosine.
Q is normalised by default and alpha is 1, which the authors advise for new data; their alphas per task are for Q as it
is.
"""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aepo import kernels
from aepo.budgets import Budget, common, joint
from aepo.config import RunConfig, StageConfig, setting
from aepo.data.transitions import Batch, Transitions
from aepo.methods import Method
from aepo.parallel import mean, share
from aepo.samplers import ActorSampler
from aepo.stages import Stage, States, Step
from aepo.stages.optim import Adam, Ema, Loss, Metrics, gradients_of
from aepo.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FQLStage(StageConfig):
    """Settings of the one stage."""

    discount: float = setting(0.99, "[0, 1)")
    """gamma, per environment step."""
    target_rate: float = setting(0.005, "(0, 1]")
    """Soft update of the targets, every step."""
    alpha: float = setting(1.0, "[0, inf)")
    """Weight of the squared distance between the policy's action and the flow's, from the same noise."""
    normalize_q: bool = True
    """If true, the policy's Q is divided by its mean size, so that one alpha means the same on every task."""
    next_q: Literal["mean", "min"] = "mean"
    """The target takes this of the two critics' values of the next action."""
    flow_steps: int = setting(10, "[1, 1000]")
    """Euler steps from noise to the flow's action."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FQLConfig(RunConfig):
    """Critics, flow and policy in one stage."""

    fql: FQLStage


def q_loss(
    q: "Critics", q_target: "Critics", policy: "GeluNet", batch: Batch, normal_BA: Tensor, config: FQLStage
) -> Loss:
    """Return E (y - Q_i(s, a))^2, mean over i; y is what `backup` returns."""
    backup_B = backup(q_target, policy, batch, normal_BA, config)
    loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean()
    return loss, lambda: {"loss": loss.detach(), "q": backup_B.mean()}


@torch.no_grad()
def backup(q_target: "Critics", policy: "GeluNet", batch: Batch, normal_BA: Tensor, config: FQLStage) -> Tensor:
    """Return y = r + gamma (1 - terminal) mean_j Q'_j(s', clip(mu(s', z))), or min_j, [B]; draws are N(0, 1)."""
    next_q_2B = q_target(batch.next_states_BS, act(policy, batch.next_states_BS, normal_BA))
    next_q_B: Tensor = next_q_2B.amin(dim=0) if config.next_q == "min" else next_q_2B.mean(dim=0)
    return batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_q_B


def flow_loss(flow: "GeluNet", batch: Batch, start_BA: Tensor, t_B: Tensor) -> Loss:
    """Return E |v(s, (1 - t) x_0 + t a, t) - (a - x_0)|^2 / A."""
    t_B1 = t_B[:, None]
    between_BA = (1.0 - t_B1) * start_BA + t_B1 * batch.actions_BA
    velocity_BA = flow(torch.cat([batch.states_BS, between_BA, t_B1], dim=1))
    loss = (velocity_BA - (batch.actions_BA - start_BA)).square().mean()
    return loss, lambda: {"flow_loss": loss.detach()}


def policy_loss(
    policy: "GeluNet", flow: "GeluNet", q: "Critics", batch: Batch, normal_BA: Tensor, config: FQLStage
) -> Loss:
    """Return alpha E |mu(s, z) - flow(s, z)|^2 / A - lambda E mean_i Q_i(s, clip(mu(s, z)))."""
    actions_BA = policy(torch.cat([batch.states_BS, normal_BA], dim=1))
    distance = (actions_BA - follow(flow, batch.states_BS, normal_BA, config.flow_steps)).square().mean()
    q_B = q(batch.states_BS, actions_BA.clamp(-1.0, 1.0)).mean(dim=0)
    scale = 1.0 / mean(q_B.detach().abs().mean()).clamp(min=1e-6) if config.normalize_q else 1.0
    value = scale * q_B.mean()
    loss = config.alpha * distance - value
    return loss, lambda: {"policy_loss": loss.detach(), "distance": distance.detach(), "value": value.detach()}


@torch.no_grad()
def follow(flow: "GeluNet", states_BS: Tensor, normal_BA: Tensor, num_steps: int) -> Tensor:
    """Return where Euler steps along the flow lead from noise, clipped to [-1, 1], [B, A]."""
    actions_BA = normal_BA
    for i in range(num_steps):
        t_B1 = torch.full_like(actions_BA[:, :1], i / num_steps)
        actions_BA = actions_BA + flow(torch.cat([states_BS, actions_BA, t_B1], dim=1)) / num_steps
    return actions_BA.clamp(-1.0, 1.0)


def act(policy: nn.Module, states_BS: Tensor, normal_BA: Tensor) -> Tensor:
    """Return clip(mu(s, z)), [B, A]."""
    return policy(torch.cat([states_BS, normal_BA], dim=1)).clamp(-1.0, 1.0)  # type: ignore[no-any-return]


class GeluNet(nn.Module):
    """Linear layers with GELU between them, and behind it a layer normalisation if `norm`; starts as flax's."""

    def __init__(self, sizes: list[int], *, norm: bool = False):
        """`sizes` are those of the input, the hidden layers and the output."""
        super().__init__()
        *inner, last = itertools.pairwise(sizes)
        self.hidden = nn.ModuleList(Linear(*size) for size in inner)
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=1e-6) if norm else nn.Identity() for _, size in inner)
        self.output = Linear(*last)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return [B, O] of [B, I]."""
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x_BI = norm(F.gelu(layer(x_BI), approximate="tanh"))
        return self.output(x_BI)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A linear layer by our kernels; weights start by Glorot's uniform draw, biases at 0."""

    def reset_parameters(self) -> None:
        """Draw the weights from torch's global generator."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return [B, O] of [B, I]."""
        return kernels.linear(x_BI, self.weight, self.bias)


class Critics(nn.Module):
    """Two independent critics Q_1, Q_2 of (s, a)."""

    def __init__(self, state_dim: int, action_dim: int, config: FQLStage):
        """Layers of the stage's size, each normalised."""
        super().__init__()
        sizes = [state_dim + action_dim] + [config.hidden_size] * config.num_layers + [1]
        self.q_1, self.q_2 = (GeluNet(sizes, norm=True) for _ in range(2))

    def forward(self, states_BS: Tensor, actions_BA: Tensor) -> Tensor:
        """Return both values, [2, B]."""
        pair_BP = torch.cat([states_BS, actions_BA], dim=1)
        return torch.cat([self.q_1(pair_BP), self.q_2(pair_BP)], dim=1).t()


def make_policy(state_dim: int, action_dim: int, config: FQLStage) -> GeluNet:
    """Return an untrained mu, a function of states and noise side by side."""
    return GeluNet([state_dim + action_dim] + [config.hidden_size] * config.num_layers + [action_dim])


class Draws(NamedTuple):
    """One step draws these numbers besides its rows."""

    next_normal_BA: Tensor
    """z of the next action, N(0, 1)."""
    start_BA: Tensor
    """x_0 of the flow, N(0, 1)."""
    t_B: Tensor
    """Times of the flow, U(0, 1)."""
    normal_BA: Tensor
    """z of the policy's action and of the flow's, N(0, 1)."""

    @staticmethod
    def of(num: int, action_dim: int, generator: torch.Generator) -> "Draws":
        """Return the draws for `num` rows."""
        device = generator.device
        normal_3BA = torch.randn(3, num, action_dim, generator=generator, device=device)
        return Draws(normal_3BA[0], normal_3BA[1], torch.rand(num, generator=generator, device=device), normal_3BA[2])


@dataclasses.dataclass
class FQLState:
    """Everything of the stage that a checkpoint holds; `q_target` is Q', `flow` v and `policy` mu."""

    q: Critics
    q_target: Ema[Critics]
    flow: GeluNet
    policy: GeluNet
    optimizer: Adam
    generator: torch.Generator
    step: int = 0


def start(config: FQLStage, data: Transitions, generator: torch.Generator) -> FQLState:
    """Return the stage before its first step; weights are drawn from torch's global generator."""
    dims, hidden = (data.state_dim, data.action_dim), [config.hidden_size] * config.num_layers
    q = Critics(*dims, config).to(generator.device)
    flow = GeluNet([sum(dims) + 1, *hidden, data.action_dim]).to(generator.device)
    policy = make_policy(*dims, config).to(generator.device)
    parameters = [*q.parameters(), *flow.parameters(), *policy.parameters()]
    optimizer = Adam(parameters, lr=config.learning_rate, num_steps=config.steps)
    return FQLState(q, Ema(q, 1.0 - config.target_rate), flow, policy, optimizer, generator)


def update(state: FQLState, config: FQLStage, batch: Batch, draws: Draws) -> Metrics:
    """Take one gradient step on all networks and return its metrics."""
    loss_q, of_q = q_loss(state.q, state.q_target.net, state.policy, batch, draws.next_normal_BA, config)
    loss_v, of_flow = flow_loss(state.flow, batch, draws.start_BA, draws.t_B)
    loss_mu, of_policy = policy_loss(state.policy, state.flow, state.q, batch, draws.normal_BA, config)
    parts = (loss_q, state.q), (loss_v, state.flow), (loss_mu, state.policy)
    gradients = [gradient for loss, net in parts for gradient in gradients_of(loss, net.parameters())]
    state.q_target.update()  # before the step: towards the Q that gave the gradients
    state.optimizer.step_along(gradients)
    state.step += 1
    return lambda: of_q() | of_flow() | of_policy()


def train_step(state: FQLState, config: FQLStage, data: Transitions) -> Metrics:
    """Draw a batch and what else a step draws, take the step and return its metrics."""
    index_B = data.draw_rows(config.batch_size, state.generator)
    draws = Draws.of(config.batch_size, data.action_dim, state.generator)
    return update(state, config, data.take(share(index_B)), share(draws))


def make_step(config: FQLStage, states: States, data: Transitions) -> Step:
    """Return the function that takes one step."""
    return lambda: train_step(states["fql"], config, data)


class OneStepSampler(ActorSampler):
    """A network of states and noise whose output, clipped, is the action."""

    def __init__(self, policy: GeluNet, action_dim: int):
        """Take an untrained policy."""
        super().__init__(policy, lambda states: states["fql"].policy)
        self._action_dim = action_dim

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return an action per normalised state, [B, A], each by a draw of its own."""
        shape = (len(states_BS), self._action_dim)
        return act(self.actor, states_BS, torch.randn(shape, generator=generator, device=states_BS.device))


def preset(task: Task, seed: int, budget: Budget) -> FQLConfig:
    """Return FQL's config; its one stage takes the steps of all stages of the others, in the behaviour model's size."""
    size = {name: getattr(budget.behavior, name) for name in ("hidden_size", "num_layers")}
    return FQLConfig(method="fql", fql=FQLStage(**joint(task, budget) | size), **common(task, seed, budget))


def sampler(config: FQLConfig, state_dim: int, action_dim: int) -> OneStepSampler:
    """Return the untrained policy."""
    return OneStepSampler(make_policy(state_dim, action_dim, config.fql), action_dim)


STAGE = Stage(name="fql", start=start, step=make_step, acts=True)
FQL = Method(name="fql", config=FQLConfig, preset=preset, stages=lambda: (STAGE,), sampler=sampler)
