"""TD3+BC: actor and critics in one stage (arXiv 2106.06860).

Q_i:  min E (r + gamma (1 - terminal) min_j Q'_j(s', pi'(s') + noise) - Q_i(s, a))^2
pi:   max E lambda Q_1(s, pi(s)) - |pi(s) - a|^2 / A,   lambda = alpha / E|Q_1(s, pi(s))|
"""

import dataclasses

import torch
from torch import Tensor

from aepo.config import ActorCriticConfig, TwinDelayedConfig
from aepo.data.transitions import Batch, Transitions
from aepo.networks import Actor, TwinQ, aten
from aepo.parallel import mean, share
from aepo.stages import Stage, States, Step
from aepo.stages.critic import squared_errors
from aepo.stages.optim import Adam, Ema, Metrics


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


@torch.no_grad()
def q_gradients(
    state: ActorCriticState, config: ActorCriticConfig, batch: Batch, normal_BA: Tensor
) -> tuple[list[Tensor], Metrics]:
    """Return those of the critics' summed squared error to the smoothed backup, and metrics; draws are N(0, 1)."""
    noise_BA = (config.policy_noise * normal_BA).clamp(-config.noise_clip, config.noise_clip)
    next_actions_BA = (state.actor_target(batch.next_states_BS) + noise_BA).clamp(-1.0, 1.0)
    next_q_B = state.q_target.net.lowest(batch.next_states_BS, next_actions_BA)
    backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_q_B
    pairs_BP = torch.cat([batch.states_BS, batch.actions_BA], dim=1)
    loss, gradients = squared_errors(state.q, pairs_BP, backup_B)
    return gradients, lambda: {"loss": loss(), "q": backup_B.mean()}


@torch.no_grad()
def actor_gradients(state: ActorCriticState, config: ActorCriticConfig, batch: Batch) -> tuple[list[Tensor], Metrics]:
    """Return those of the actor's loss, through Q_1 and the distance to the data's actions, and metrics."""
    output_BA, pull = state.actor.body.vjp(batch.states_BS)
    actions_BA = output_BA.tanh()
    pairs_BP = torch.cat([batch.states_BS, actions_BA], dim=1)
    q_B1, slope_BA = state.q.q_1.with_slope(pairs_BP, slice(batch.states_BS.shape[1], None))
    scale = config.q_weight / mean(q_B1.abs().mean()).clamp(min=1e-6)
    error_BA = actions_BA - batch.actions_BA
    of_actions_BA = 2.0 / error_BA.numel() * error_BA - scale / len(error_BA) * slope_BA

    def metrics() -> dict[str, Tensor]:
        distance = error_BA.square().mean()
        return {"actor_loss": distance - scale * q_B1.mean(), "distance": distance}

    return pull(aten.tanh_backward.default(of_actions_BA, actions_BA)), metrics


def train_step(state: ActorCriticState, config: ActorCriticConfig, data: Transitions) -> Metrics:
    """Take one gradient step on the critics and, in every `actor_interval`-th step, on the actor; return metrics."""
    batch = data.draw(config.batch_size, state.generator)
    shape, device = batch.actions_BA.shape, batch.actions_BA.device
    normal_BA = torch.randn(shape, generator=state.generator, device=device)
    batch, normal_BA = share(batch), share(normal_BA)
    gradients, of_q = q_gradients(state, config, batch, normal_BA)
    state.q_optimizer.step_along(gradients)
    state.step += 1
    if state.step % config.actor_interval:
        return of_q
    gradients, of_actor = actor_gradients(state, config, batch)
    state.actor_optimizer.step_along(gradients)
    state.actor_target.update()
    state.q_target.update()
    return lambda: of_q() | of_actor()


def make_step(config: ActorCriticConfig, states: States, data: Transitions) -> Step:
    """Return the function that takes one step of the stage."""
    return lambda: train_step(states["actor_critic"], config, data)


STAGE = Stage(name="actor_critic", start=start, step=make_step)
