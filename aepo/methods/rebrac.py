"""ReBRAC (arXiv 2305.09836): TD3+BC with a penalty on the critic's next action as well as on the actor's.

Q_i:  min E (y - Q_i(s, a))^2,   y = r + gamma (1 - terminal) (min_j Q'_j(s', a~) - b_Q |a~ - a'|^2)
      a~ = clip(pi'(s') + clip(noise)),   a' the action that the data took in s'
pi:   min E b_pi |pi(s) - a|^2 - lambda min_j Q_j(s, pi(s)),   lambda = 1 / E|min_j Q_j(s, pi(s))|

Kept apart from the authors' code (github.com/tinkoff-ai/ReBRAC): states are standardised, rewards scaled by the
task's rule, a layer is normalised before its activation and starts as PyTorch has it. The last row of an episode has
no a'; where the episode was cut there the authors leave the row out, here the penalty is 0.
"""

import dataclasses

import torch
from torch import Tensor

from aepo.budgets import Budget, common, joint
from aepo.config import RunConfig, TwinDelayedConfig, setting
from aepo.data.transitions import Batch, NextActions, Transitions
from aepo.methods import Method
from aepo.networks import Actor, TwinQ
from aepo.parallel import mean, share
from aepo.samplers import ActorSampler
from aepo.stages import Stage, States, Step, actor_critic
from aepo.stages.actor_critic import ActorCriticState
from aepo.stages.optim import Loss, Metrics, gradients_of
from aepo.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReBRACStage(TwinDelayedConfig):
    """Settings of the one stage; `steps` are the critics'."""

    actor_penalty: float = setting(0.05, "[0, inf)")
    """b_pi, weight of the squared distance between the actor's action and the data's."""
    critic_penalty: float = setting(0.01, "[0, inf)")
    """b_Q, weight of the squared distance between the target's next action and the data's, in units of Q."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReBRACConfig(RunConfig):
    """Actor and critics in one stage."""

    rebrac: ReBRACStage


def q_loss(
    q: TwinQ,
    q_target: TwinQ,
    pi_target: Actor,
    batch: Batch,
    next_actions: NextActions,
    normal_BA: Tensor,
    config: ReBRACStage,
) -> Loss:
    """Return sum_i E (r + gamma (1 - terminal) (min_j Q'_j(s', a~) - b_Q |a~ - a'|^2) - Q_i(s, a))^2.

    The draws behind a~ are N(0, 1).
    """
    with torch.no_grad():
        noise_BA = (config.policy_noise * normal_BA).clamp(-config.noise_clip, config.noise_clip)
        smoothed_BA = (pi_target(batch.next_states_BS) + noise_BA).clamp(-1.0, 1.0)
        penalty_B = next_actions.exists_B * (smoothed_BA - next_actions.actions_BA).square().sum(dim=1)
        next_q_B = q_target.lowest(batch.next_states_BS, smoothed_BA) - config.critic_penalty * penalty_B
        backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_q_B
    loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
    return loss, lambda: {"loss": loss.detach(), "q": backup_B.mean(), "penalty": penalty_B.mean()}


def pi_loss(pi: Actor, q: TwinQ, batch: Batch, config: ReBRACStage) -> Loss:
    """Return b_pi E |pi(s) - a|^2 - lambda E min_j Q_j(s, pi(s)),   lambda = 1 / E|min_j Q_j(s, pi(s))|."""
    actions_BA = pi(batch.states_BS)
    distance = (actions_BA - batch.actions_BA).square().sum(dim=1).mean()
    q_B = q.lowest(batch.states_BS, actions_BA)
    scale = 1.0 / mean(q_B.detach().abs().mean()).clamp(min=1e-6)
    loss = config.actor_penalty * distance - scale * q_B.mean()
    return loss, lambda: {"actor_loss": loss.detach(), "distance": distance.detach()}


def train_step(state: ActorCriticState, config: ReBRACStage, data: Transitions) -> Metrics:
    """Take one gradient step on the critics and, in every `actor_interval`-th step, on the actor; return metrics."""
    index_B, shape = data.draw_rows(config.batch_size, state.generator), (config.batch_size, data.action_dim)
    normal_BA = torch.randn(shape, generator=state.generator, device=index_B.device)
    index_B, normal_BA = share(index_B), share(normal_BA)
    batch, targets = data.take(index_B), (state.q_target.net, state.actor_target.net)
    loss, of_q = q_loss(state.q, *targets, batch, data.take_next_actions(index_B), normal_BA, config)
    state.q_optimizer.step_along(gradients_of(loss, state.q.parameters()))
    state.step += 1
    if state.step % config.actor_interval:
        return of_q
    loss, of_pi = pi_loss(state.actor, state.q, batch, config)
    state.actor_optimizer.step_along(gradients_of(loss, state.actor.parameters()))
    state.actor_target.update()
    state.q_target.update()
    return lambda: of_q() | of_pi()


def make_step(config: ReBRACStage, states: States, data: Transitions) -> Step:
    """Return the function that takes one step."""
    return lambda: train_step(states["rebrac"], config, data)


def preset(task: Task, seed: int, budget: Budget) -> ReBRACConfig:
    """Return ReBRAC's config; its one stage takes the steps of all stages of the others."""
    return ReBRACConfig(method="rebrac", rebrac=ReBRACStage(**joint(task, budget)), **common(task, seed, budget))


def sampler(config: ReBRACConfig, state_dim: int, action_dim: int) -> ActorSampler:
    """Return the untrained actor."""
    return ActorSampler(Actor(state_dim, action_dim, config.rebrac), lambda states: states["rebrac"].actor)


STAGE = Stage(name="rebrac", start=actor_critic.start, step=make_step, acts=True)
REBRAC = Method(name="rebrac", config=ReBRACConfig, preset=preset, stages=lambda: (STAGE,), sampler=sampler)
