"""TD3+BC: actor and critics in one stage (arXiv 2106.06860).

Q_i:  min E (r + gamma (1 - terminal) min_j Q'_j(s', pi'(s') + noise) - Q_i(s, a))^2
pi:   max E lambda Q_1(s, pi(s)) - |pi(s) - a|^2 / A,   lambda = alpha / E|Q_1(s, pi(s))|
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import ActorCriticConfig, TwinDelayedConfig
from aepo.data.transitions import Batch, Transitions
from aepo.networks import Actor, TwinQ
from aepo.parallel import mean, share
from aepo.stages import Stage, States, Step, fast
from aepo.stages.optim import Adam, Ema, Loss, Metrics


def q_loss(
    q: TwinQ, q_target: TwinQ, pi_target: Actor, batch: Batch, normal_BA: Tensor, config: ActorCriticConfig
) -> Loss:
    """Return sum_i E (r + gamma (1 - terminal) min_j Q'_j(s', pi'(s') + noise) - Q_i(s, a))^2; draws are N(0, 1)."""
    with torch.no_grad():
        noise_BA = (config.policy_noise * normal_BA).clamp(-config.noise_clip, config.noise_clip)
        next_actions_BA = (pi_target(batch.next_states_BS) + noise_BA).clamp(-1.0, 1.0)
        next_q_B = q_target.lowest(batch.next_states_BS, next_actions_BA)
        backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_q_B
    loss = (q(batch.states_BS, batch.actions_BA) - backup_B).square().mean(dim=1).sum()
    return loss, lambda: {"loss": loss, "q": backup_B.mean()}


def pi_loss(pi: Actor, q: TwinQ, batch: Batch, config: ActorCriticConfig) -> Loss:
    """Return E |pi(s) - a|^2 / A - lambda E Q_1(s, pi(s)),   lambda = alpha / E|Q_1(s, pi(s))|."""
    actions_BA = pi(batch.states_BS)
    q_B = q(batch.states_BS, actions_BA)[0]
    scale = config.q_weight / mean(q_B.detach().abs().mean()).clamp(min=1e-6)
    distance = (actions_BA - batch.actions_BA).square().mean()
    loss = distance - scale * q_B.mean()
    return loss, lambda: {"actor_loss": loss, "distance": distance}


@dataclasses.dataclass
class ActorCriticState:
    """Everything of the stage that a checkpoint holds; targets are Q' and pi'."""

    actor: Actor
    actor_target: Ema[Actor]
    actor_optimizer: Adam
    q: TwinQ
    q_target: Ema[TwinQ]
    q_optimizer: Adam
    generator: torch.Generator
    step: int = 0


def start(config: TwinDelayedConfig, data: Transitions, generator: torch.Generator) -> ActorCriticState:
    """Return the stage before its first step; weights are drawn from torch's global generator."""
    actor = Actor(data.state_dim, data.action_dim, config).to(generator.device)
    q = TwinQ(data.state_dim, data.action_dim, config).to(generator.device)
    num_actor_steps = max(1, config.steps // config.actor_interval)
    return ActorCriticState(
        actor=actor,
        actor_target=Ema(actor, 1.0 - config.target_rate),
        actor_optimizer=Adam(actor.parameters(), lr=config.learning_rate, num_steps=num_actor_steps),
        q=q,
        q_target=Ema(q, 1.0 - config.target_rate),
        q_optimizer=Adam(q.parameters(), lr=config.learning_rate, num_steps=config.steps),
        generator=generator,
    )


def train_step(state: ActorCriticState, config: ActorCriticConfig, data: Transitions) -> Metrics:
    """Take one gradient step on the critics and, in every `actor_interval`-th step, on the actor; return metrics."""
    batch = data.draw(config.batch_size, state.generator)
    shape, device = batch.actions_BA.shape, batch.actions_BA.device
    normal_BA = torch.randn(shape, generator=state.generator, device=device)
    batch, normal_BA = share(batch), share(normal_BA)
    gradients, of_q = fast.smoothed_q(state.q, state.q_target.net, state.actor_target.net, batch, normal_BA, config)
    state.q_optimizer.step_along(gradients)
    state.step += 1
    if state.step % config.actor_interval:
        return of_q
    gradients, of_actor = fast.policy(state.actor, state.q, batch, config)
    state.actor_optimizer.step_along(gradients)
    state.actor_target.update()
    state.q_target.update()
    return lambda: of_q() | of_actor()


def make_step(config: ActorCriticConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of the stage."""
    return lambda: train_step(states["actor_critic"], config, data)


STAGE = Stage(name="actor_critic", start=start, step=make_step, acts=True)
