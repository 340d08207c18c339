"""The gradients of the stages' losses, written out: what training uses, since autograd takes a quarter longer.

Each function takes what the loss that its docstring names takes, and returns the gradients of this loss by the
parameters of the networks that learn, and the same metrics. tests/aepo/stages/test_fast.py holds each equal
to its loss. To read what a stage learns, read the loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aepo import backward
from aepo.backward import aten
from aepo.config import ActorConfig, ActorCriticConfig, CriticConfig
from aepo.data.transitions import Batch, Pairs
from aepo.diffusion.networks import EnergyNet, NoiseNet, VarianceNet
from aepo.diffusion.schedule import alpha_sigma
from aepo.networks import LOG_STD_RANGE, Actor, GaussianActor, Mlp, TwinQ, ValueNet
from aepo.parallel import mean
from aepo.stages import targets
from aepo.stages.optim import MAX_WEIGHT, Gradients, Metrics, gradients_of
from aepo.stages.targets import EnergyLoss, Sample

Slope = Callable[[Tensor, Sample], tuple[Tensor, Metrics]]
"""(a network's outputs, what the target was given) -> the loss's gradient by these outputs, and metrics."""


@torch.no_grad()
def behavior(net: NoiseNet, variance: nn.Module, batch: Pairs, t_B: Tensor, eps_BA: Tensor) -> Gradients:
    """Return the gradients of `aepo.stages.behavior.loss`, the variance's after the noise net's.

    The noise net's loss is E ||F - (alpha_t eps - sigma_t a_0)||^2, since eps_phi = sigma_t a_t + alpha_t F.
    """
    actions_BA = batch.actions_BA
    alpha_B1, sigma_B1 = (part_B.unsqueeze(1) for part_B in alpha_sigma(t_B))
    a_t_BA = alpha_B1 * actions_BA + sigma_B1 * eps_BA
    inputs_BI = net.inputs(a_t_BA, batch.states_BS, t_B)
    target_BA = alpha_B1 * eps_BA - sigma_B1 * actions_BA
    error_BA, gradients = backward.error_and_gradients(net.body, inputs_BI, target_BA)
    if not isinstance(variance, VarianceNet):
        return gradients, lambda: {"loss": error_BA.square().mean()}
    mean_BA = (alpha_B1 * a_t_BA - sigma_B1 * (error_BA + target_BA)).clamp(-1.0, 1.0)
    logit_BA, pull = backward.vjp(variance.body, inputs_BI)
    variance_BA = logit_BA.sigmoid()
    excess_BA = variance_BA - (actions_BA - mean_BA).square()
    gradients += pull(2.0 / error_BA.numel() * excess_BA * variance_BA * (1.0 - variance_BA))
    return gradients, lambda: {
        "loss": error_BA.square().mean() + excess_BA.square().mean(),
        "variance_loss": excess_BA.square().mean(),
    }


@torch.no_grad()
def in_sample(
    q: TwinQ, v: ValueNet, target: TwinQ, batch: Batch, ahead: tuple[Tensor, Tensor, Tensor], config: CriticConfig
) -> Gradients:
    """Return the gradients of `aepo.stages.critic.in_sample_loss`, Q's before V's: their parameters are disjoint."""
    rewards_B, discounts_B, next_states_BS = ahead
    backup_B = torch.addcmul(rewards_B, discounts_B, v.forward(next_states_BS))
    v_B1, pull = backward.vjp(v.body, batch.states_BS)
    pairs_BP = torch.cat([batch.states_BS, batch.actions_BA], dim=1)
    u_B = target.lowest_of(pairs_BP) - v_B1.squeeze(1)
    of_v = pull(-expectile_slope(u_B, config.expectile).unsqueeze(1))
    q_loss, of_q = squared_errors(q, pairs_BP, backup_B)
    return [*of_q, *of_v], lambda: {
        "loss": q_loss() + expectile_loss(u_B, config.expectile),
        "v": v_B1.mean(),
        "advantage_std": u_B.std(correction=0),
    }


@torch.no_grad()
def in_support(
    q: TwinQ, v: ValueNet, target: TwinQ, batch: Batch, support_BKA: Tensor, config: CriticConfig
) -> Gradients:
    """Return the gradients of `aepo.stages.critic.in_support_loss`, Q's before V's."""
    num_support = support_BKA.shape[1]
    repeated = batch.next_states_BS.repeat_interleave(num_support, dim=0)
    q_BK = target.lowest(repeated, support_BKA.flatten(0, 1)).view(-1, num_support)
    next_v_B = ((config.backup_beta * q_BK).softmax(dim=1) * q_BK).sum(dim=1)
    backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_v_B
    q_loss, of_q = squared_errors(q, torch.cat([batch.states_BS, batch.actions_BA], dim=1), backup_B)
    v_loss, of_v = squared_error(v.body, batch.next_states_BS, next_v_B)
    return [*of_q, *of_v], lambda: {
        "loss": q_loss() + v_loss(),
        "v": next_v_B.mean(),
        "support_std": q_BK.std(dim=1, correction=min(1, q_BK.shape[1] - 1)).mean(),
    }


def expectile_loss(u_B: Tensor, expectile: float) -> Tensor:
    """Return the mean of |tau - 1(u < 0)| u^2, a scalar  [M6]."""
    return (_weighted(u_B, expectile) * u_B).mean()


def expectile_slope(u_B: Tensor, expectile: float) -> Tensor:
    """Return the gradient of `expectile_loss` by u, [B]."""
    return 2.0 / u_B.shape[0] * _weighted(u_B, expectile)


def _weighted(u_B: Tensor, expectile: float) -> Tensor:
    """Return |tau - 1(u < 0)| u."""
    return torch.where(u_B < 0, (1.0 - expectile) * u_B, expectile * u_B)


def squared_error(net: Mlp, x_BI: Tensor, target_B: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return what gives the mean squared error of a network's only output, and its gradients by the parameters."""
    error_B1, gradients = backward.error_and_gradients(net, x_BI, target_B.unsqueeze(1))
    return lambda: error_B1.square().mean(), gradients


def squared_errors(q: TwinQ, pairs_BP: Tensor, target_B: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return what gives the sum of both critics' mean squared errors, and its gradients by their parameters  [M7]."""
    (loss_1, of_q_1), (loss_2, of_q_2) = (squared_error(net, pairs_BP, target_B) for net in (q.q_1, q.q_2))
    return lambda: loss_1() + loss_2(), [*of_q_1, *of_q_2]


@torch.no_grad()
def actor(net: GaussianActor, batch: Pairs, advantage_B: Tensor, config: ActorConfig) -> Gradients:
    """Return the gradients of `aepo.stages.actor.loss`, the deviations' first."""
    weight_B = (config.inverse_temperature * advantage_B).exp().clamp(max=MAX_WEIGHT)
    output_BA, pull = backward.vjp(net.body, batch.states_BS)
    mean_BA, log_std_A = output_BA.tanh(), net.log_std_A.clamp(*LOG_STD_RANGE)
    precision_A = (-log_std_A).exp()
    distance_BA = (batch.actions_BA - mean_BA) * precision_A  # in standard deviations
    squared_BA = distance_BA.square()
    slope_B1 = (-weight_B / len(weight_B)).unsqueeze(1)  # of the loss by log pi
    of_log_std_A = (slope_B1 * (squared_BA - 1.0)).sum(dim=0) * (log_std_A == net.log_std_A)
    of_mean_BA = slope_B1 * (distance_BA * precision_A)

    def metrics() -> dict[str, Tensor]:
        log_prob_B = (-0.5 * (squared_BA + math.log(2 * math.pi)) - log_std_A).sum(dim=1)
        return {
            "loss": -(weight_B * log_prob_B).mean(),
            "weight": weight_B.mean(),
            "clamped_share": (weight_B == MAX_WEIGHT).float().mean(),
        }

    return [of_log_std_A, *pull(aten.tanh_backward.default(of_mean_BA, mean_BA))], metrics


@torch.no_grad()
def smoothed_q(
    q: TwinQ, q_target: TwinQ, pi_target: Actor, batch: Batch, normal_BA: Tensor, config: ActorCriticConfig
) -> Gradients:
    """Return the gradients of `aepo.stages.actor_critic.q_loss`."""
    noise_BA = (config.policy_noise * normal_BA).clamp(-config.noise_clip, config.noise_clip)
    next_actions_BA = (pi_target(batch.next_states_BS) + noise_BA).clamp(-1.0, 1.0)
    next_q_B = q_target.lowest(batch.next_states_BS, next_actions_BA)
    backup_B = batch.rewards_B + config.discount * (1.0 - batch.terminals_B) * next_q_B
    pairs_BP = torch.cat([batch.states_BS, batch.actions_BA], dim=1)
    loss, gradients = squared_errors(q, pairs_BP, backup_B)
    return gradients, lambda: {"loss": loss(), "q": backup_B.mean()}


@torch.no_grad()
def policy(pi: Actor, q: TwinQ, batch: Batch, config: ActorCriticConfig) -> Gradients:
    """Return the gradients of `aepo.stages.actor_critic.pi_loss`: through Q_1, and of the distance to the data."""
    output_BA, pull = backward.vjp(pi.body, batch.states_BS)
    actions_BA = output_BA.tanh()
    pairs_BP = torch.cat([batch.states_BS, actions_BA], dim=1)
    q_B1, slope_BA = backward.with_slope(q.q_1, pairs_BP, slice(batch.states_BS.shape[1], None))
    scale = config.q_weight / mean(q_B1.abs().mean()).clamp(min=1e-6)
    error_BA = actions_BA - batch.actions_BA
    of_actions_BA = 2.0 / error_BA.numel() * error_BA - scale / len(error_BA) * slope_BA

    def metrics() -> dict[str, Tensor]:
        distance = error_BA.square().mean()
        return {"actor_loss": distance - scale * q_B1.mean(), "distance": distance}

    return pull(aten.tanh_backward.default(of_actions_BA, actions_BA)), metrics


def energy(net: EnergyNet, loss: EnergyLoss, x: Sample) -> Gradients:
    """Return the gradients of a loss of aepo/stages/targets.py; by autograd for one that is not in SLOPES."""
    if loss not in SLOPES:
        value, metrics = loss(net, x)
        return gradients_of(value, net.parameters()), lambda: {key: each.detach() for key, each in metrics().items()}
    with torch.no_grad():
        outputs_BO, pull = backward.vjp(net.body, net.inputs(x.a_t_BA, x.states_BS, x.t_B, x.beta_B))
        slope_BO, metrics = SLOPES[loss](outputs_BO, x)
        return pull(slope_BO), metrics


def _analytic(heads_B2: Tensor, x: Sample) -> tuple[Tensor, Metrics]:
    return _heads(heads_B2, *targets.first_order(x.q_B, x.slope_BA, x.point_BA, x.mean_BA, x.variance_BA))


def _mse(heads_B2: Tensor, x: Sample) -> tuple[Tensor, Metrics]:
    return _heads(heads_B2, x.q_B, torch.zeros_like(x.q_B))


def _heads(heads_B2: Tensor, first_B: Tensor, second_B: Tensor) -> tuple[Tensor, Metrics]:
    error_B2 = heads_B2 - torch.stack([first_B, second_B], dim=1)
    return 2.0 / len(error_B2) * error_B2, lambda: {
        "loss": error_B2.square().mean(dim=0).sum(),
        "f_1": first_B.mean(),
        "f_2": second_B.mean(),
    }


def _analytic_second_order(f_B1: Tensor, x: Sample) -> tuple[Tensor, Metrics]:
    target_B, used_B = targets.second_order(x.value, x.states_BS, x.point_BA, x.mean_BA, x.variance_BA, x.beta_B)
    slope_B1, metrics = _one_output(f_B1, x, target_B)
    return slope_B1, lambda: metrics() | {"first_order_share": 1.0 - used_B.float().mean()}


def _monte_carlo(f_B1: Tensor, x: Sample) -> tuple[Tensor, Metrics]:
    return _one_output(f_B1, x, targets.log_mean_exp(x))


def _one_output(f_B1: Tensor, x: Sample, target_B: Tensor) -> tuple[Tensor, Metrics]:
    error_B1 = f_B1 - (target_B / x.beta_B).unsqueeze(1)
    return 2.0 / len(error_B1) * error_B1, lambda: {"loss": error_B1.square().mean(), "energy": target_B.mean()}


def _log_expectation(f_B1: Tensor, x: Sample) -> tuple[Tensor, Metrics]:
    f_B = f_B1.squeeze(1)
    gap_B = x.beta_B * (x.q_B - f_B)
    clamped_B = gap_B.clamp(max=targets.MAX_EXPONENT)
    exp_B = clamped_B.exp()

    def metrics() -> dict[str, Tensor]:
        tangent_B = exp_B * (1.0 + gap_B - clamped_B)  # exp itself below the largest exponent
        energy_B = x.beta_B * f_B
        return {
            "loss": ((tangent_B + energy_B) / x.beta_B.square()).mean(),
            "energy": energy_B.mean(),
            "clamped_share": (gap_B > targets.MAX_EXPONENT).float().mean(),
        }

    return ((1.0 - exp_B) / (len(f_B) * x.beta_B)).unsqueeze(1), metrics


def _contrastive(f_B1: Tensor, x: Sample) -> tuple[Tensor, Metrics]:
    f_SK, beta_SK, q_SK = (part.view(-1, x.num_actions) for part in (f_B1, x.beta_B, x.q_B))
    energy_SK = beta_SK * f_SK
    weight_SK = (beta_SK * q_SK).softmax(dim=1)
    slope_SK = (energy_SK.softmax(dim=1) - weight_SK) * (beta_SK / len(beta_SK))
    return slope_SK.view(-1, 1), lambda: {
        "loss": -(weight_SK * energy_SK.log_softmax(dim=1)).sum(dim=1).mean(),
        "effective_support": (1.0 / weight_SK.square().sum(dim=1)).mean(),
    }


SLOPES: dict[EnergyLoss, Slope] = {
    targets.analytic: _analytic,
    targets.analytic_second_order: _analytic_second_order,
    targets.monte_carlo: _monte_carlo,
    targets.mse: _mse,
    targets.log_expectation: _log_expectation,
    targets.contrastive: _contrastive,
}
"""Loss of a target -> its gradient by the network's outputs; a loss without one is differentiated by autograd."""
