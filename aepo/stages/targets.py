"""What the energy network learns: seven ways to E_t(s, a_t) = log E[exp(beta Q(s, a_0)) | a_t, s]  [M3].

    analytic               [M11], [M12]   the paper's: first order in Q, Gaussian posterior; exact for a linear Q
    analytic_second_order                 the same with Q's Hessian; exact for a quadratic Q
    monte_carlo                           log-mean-exp over draws from the Gaussian posterior
    mse                                   E[beta Q(s, a_0)]: QGPO's ablation (arXiv 2304.12824); below [M3] by Jensen
    log_expectation        [M14]          exact in the limit, data actions only
    weighted_denoising     [M15]          its gradient: exact in the limit, data actions only
    contrastive                           QGPO's CEP: exact in the limit up to a constant per (s, t), support actions

Each is a loss of the network on noised actions, named as its row in ENERGY_TARGETS (aepo/config.py), which says what it
asks for: a new target is a loss here, a row there, or one call of `register`. Those that are polynomials in beta train
two heads f_1 and f_2, the others E / beta of a network that takes beta, drawn anew for every sample. Training takes the
gradients of aepo/stages/fast.py where it has them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aepo import parallel
from aepo.config import ENERGY_TARGETS, EnergyTarget
from aepo.diffusion.networks import EnergyNet
from aepo.diffusion.schedule import alpha_sigma
from aepo.errors import ConfigError
from aepo.stages.optim import MAX_WEIGHT, Loss

MAX_EXPONENT = 5.0
"""In [M14] exp is continued by its tangent from here on, so that one outlier does not own the step."""
MIN_PIVOT = 0.1
"""Second order is used where every eigenvalue of I - beta Sigma H is at least this."""


def analytic(net: EnergyNet, x: "Sample") -> Loss:
    """Return the squared error of both heads, the paper's loss.

    E (f_1 - Q(s, c) - g.(m_t - c))^2 + E (f_2 - g' diag(v_t) g / 2)^2,   g = grad_a Q(s, c)   [M11, M12]
    """
    first_B, second_B = first_order(x.q_B, x.slope_BA, x.point_BA, x.mean_BA, x.variance_BA)
    f_1_B, f_2_B = net.outputs(x.a_t_BA, x.states_BS, x.t_B, x.beta_B).unbind(dim=1)
    loss = (f_1_B - first_B).square().mean() + (f_2_B - second_B).square().mean()
    return loss, lambda: {"loss": loss, "f_1": first_B.mean(), "f_2": second_B.mean()}


def first_order(
    q_B: Tensor, slope_BA: Tensor, point_BA: Tensor, mean_BA: Tensor, variance_BA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Q(s, c) + g.(m_t - c) and g' diag(v_t) g / 2, each [B]: E = beta f_1 + beta^2 f_2  [M11, M12].

    Exact where Q is linear in the action and the posterior Gaussian.

    Args:
        q_B: scaled Q at c, without a graph.
        slope_BA: its gradient g there.
        point_BA: c, where Q is expanded.
        mean_BA: posterior mean m_t.
        variance_BA: posterior variance of each action component, >= 0.
    """
    first_B = q_B + (slope_BA * (mean_BA - point_BA)).sum(dim=-1)
    return first_B, 0.5 * (variance_BA * slope_BA.square()).sum(dim=-1)


def mse(net: EnergyNet, x: "Sample") -> Loss:
    """Return E (f_1 - Q(s, a_0))^2 + E f_2^2."""
    f_1_B, f_2_B = net.outputs(x.a_t_BA, x.states_BS, x.t_B, x.beta_B).unbind(dim=1)
    loss = (f_1_B - x.q_B).square().mean() + f_2_B.square().mean()
    return loss, lambda: {"loss": loss, "f_1": x.q_B.mean(), "f_2": torch.zeros_like(loss)}


def analytic_second_order(net: EnergyNet, x: "Sample") -> Loss:
    """Return E ((E_t - closed form of second order) / beta)^2; metrics say how often the first order stood in."""
    target_B, used_B = second_order(x.value, x.states_BS, x.point_BA, x.mean_BA, x.variance_BA, x.beta_B)
    loss, metrics = _squared_error(net, x, target_B)
    return loss, lambda: metrics() | {"first_order_share": 1.0 - used_B.to(loss.dtype).mean()}


def monte_carlo(net: EnergyNet, x: "Sample") -> Loss:
    """Return E ((E_t - log mean_k exp(beta Q(s, a_k))) / beta)^2,   a_k ~ N(m_t, diag(v_t))."""
    return _squared_error(net, x, log_mean_exp(x))


@torch.no_grad()
def log_mean_exp(x: "Sample") -> Tensor:
    """Return log mean_k exp(beta Q(s, a_k)) over draws a_k ~ N(m_t, diag(v_t)), clipped to [-1, 1], [B]."""
    actions_KBA = (x.mean_BA + x.variance_BA.sqrt() * x.draws_KBA).clamp(-1.0, 1.0)
    states_KBS = x.states_BS.expand(len(x.draws_KBA), -1, -1)
    q_KB = x.value(states_KBS.flatten(0, 1), actions_KBA.flatten(0, 1)).view(len(x.draws_KBA), -1)
    return torch.logsumexp(x.beta_B * q_KB, dim=0) - math.log(len(x.draws_KBA))


def log_expectation(net: EnergyNet, x: "Sample") -> Loss:
    """Return E[(exp(beta Q(s, a_0) - E_t) + E_t) / beta^2], least where E_t is [M3] exactly  [M14].

    Near its least value the loss is half the squared error of E_t / beta: as in the other targets, no beta of the
    range owns it.
    """
    energy_B = net(x.a_t_BA, x.states_BS, x.t_B, x.beta_B)
    gap_B = x.beta_B * x.q_B - energy_B
    clamped_B = gap_B.clamp(max=MAX_EXPONENT)
    exp_B = clamped_B.exp() * (1.0 + gap_B - clamped_B)  # above the largest exponent its tangent there
    loss = ((exp_B + energy_B) / x.beta_B.square()).mean()
    return loss, lambda: {
        "loss": loss,
        "energy": energy_B.mean(),
        "clamped_share": (gap_B > MAX_EXPONENT).to(loss.dtype).mean(),
    }


def weighted_denoising(net: EnergyNet, x: "Sample") -> Loss:
    """Return E[w |a_0 - m_t - sigma_t^2 / alpha_t grad E_t|^2] / A over E[w],   w = exp(beta Q(s, a_0))  [M15].

    Least where m_t + sigma_t^2 / alpha_t grad E_t is the guided policy's own posterior mean, E[w a_0 | a_t] over
    E[w | a_t], that is, where grad E_t is the gradient of [M3]. The network is fitted through its gradient, all that
    guidance uses, and learns from A numbers per sample instead of one; E_t is known up to a constant per (s, t, beta).
    """
    weight_B = (x.beta_B * x.q_B).exp().clamp(max=MAX_WEIGHT)
    alpha_B, sigma_B = alpha_sigma(x.t_B)
    a_t_BA = x.a_t_BA.detach().requires_grad_()
    energy_B = net(a_t_BA, x.states_BS, x.t_B, x.beta_B)
    (slope_BA,) = torch.autograd.grad(energy_B.sum(), a_t_BA, create_graph=True)
    guided_BA = x.mean_BA + (sigma_B.square() / alpha_B)[:, None] * slope_BA
    error_B = (x.actions_BA - guided_BA).square().mean(dim=1)
    loss = (weight_B * error_B).sum() / parallel.mean(weight_B.sum())
    return loss, lambda: {
        "loss": loss,
        "effective_share": weight_B.mean().square() / weight_B.square().mean(),
        "clamped_share": (weight_B == MAX_WEIGHT).to(loss.dtype).mean(),
    }


def contrastive(net: EnergyNet, x: "Sample") -> Loss:
    """Return -E sum_i softmax_i(beta Q(s, a_i)) log softmax_i(E_t(s, a_{i,t})) over K support actions of each state."""
    energy_B = net(x.a_t_BA, x.states_BS, x.t_B, x.beta_B)
    energy_SK, scaled_SK = (part_B.view(-1, x.num_actions) for part_B in (energy_B, x.beta_B * x.q_B))
    weight_SK = scaled_SK.softmax(dim=1)
    loss = -(weight_SK * energy_SK.log_softmax(dim=1)).sum(dim=1).mean()
    return loss, lambda: {"loss": loss, "effective_support": (1.0 / weight_SK.square().sum(dim=1)).mean()}


def _squared_error(net: EnergyNet, x: "Sample", target_B: Tensor) -> Loss:
    """Return E ((E_t - target) / beta)^2: over beta, so that no beta of the range owns the loss."""
    energy_B = net(x.a_t_BA, x.states_BS, x.t_B, x.beta_B)
    loss = ((energy_B - target_B) / x.beta_B).square().mean()
    return loss, lambda: {"loss": loss, "energy": target_B.mean()}


Value = Callable[[Tensor, Tensor], Tensor]
"""(states [B, S], actions [B, A]) -> scaled Q [B], differentiable in the actions."""
WithSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(states [B, S], actions [B, A]) -> scaled Q [B] and its gradient by the actions [B, A], both without a graph."""
NOTHING = torch.empty(0)


class Sample(NamedTuple):
    """Actions, noised, and what a target asks for (`EnergyTarget.asks`); what it does not ask for is empty."""

    states_BS: Tensor
    actions_BA: Tensor
    """a_0: the data's actions, or several support actions of one state after the other."""
    t_B: Tensor
    a_t_BA: Tensor
    beta_B: Tensor
    """Inverse temperature at which the network is trained on this row; unused by polynomials in beta."""
    value: Value
    """Scaled Q of any action."""
    q_B: Tensor = NOTHING
    """Scaled Q(s, a_0) for `data` and `support`, Q(s, c) for `slope`."""
    slope_BA: Tensor = NOTHING
    """Gradient of Q at c, for `slope`."""
    mean_BA: Tensor = NOTHING
    """Posterior mean m_t [M9], for `posterior`: where the behaviour model says that a_t came from."""
    variance_BA: Tensor = NOTHING
    """Diagonal of the posterior's covariance v_t [M10], for `posterior`."""
    point_BA: Tensor = NOTHING
    """Point of expansion c [M11], for `slope` and `curvature`."""
    draws_KBA: Tensor = NOTHING
    """Standard normal draws, `num_samples` of each row, for `draws`."""
    num_actions: int = 1
    """K, the support actions of each state, for `support`."""


EnergyLoss = Callable[[EnergyNet, Sample], Loss]
LOSSES: dict[str, EnergyLoss] = {
    "analytic": analytic,
    "analytic_second_order": analytic_second_order,
    "monte_carlo": monte_carlo,
    "mse": mse,
    "log_expectation": log_expectation,
    "weighted_denoising": weighted_denoising,
    "contrastive": contrastive,
}
"""Target -> its loss; ENERGY_TARGETS says what each asks for."""


def register(name: str, target: EnergyTarget, loss: EnergyLoss) -> None:
    """Add a target: from here on `energy.target` takes its name, and `aepo toy` compares it.

    Raises:
        ConfigError: for a name that another target has.
    """
    if name in ENERGY_TARGETS:
        raise ConfigError(f"there is an energy target {name!r}; choose another name")
    ENERGY_TARGETS[name], LOSSES[name] = target, loss


def unregister(name: str) -> None:
    """Take a target away that `register` added."""
    del ENERGY_TARGETS[name], LOSSES[name]


def second_order(
    value: Value, states_BS: Tensor, point_BA: Tensor, mean_BA: Tensor, variance_BA: Tensor, beta_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log E[exp(beta q(a))], a ~ N(m_t, Sigma), q the expansion of Q at c to second order; and where it holds.

    With q_m, g_m the value and slope of q at m_t and I - beta Sigma^1/2 H Sigma^1/2 = U diag(p) U':

        E = beta q_m + beta^2 / 2 |p^-1/2 U' Sigma^1/2 g_m|^2 - 1/2 log det diag(p)

    The integral exists only for p > 0; below MIN_PIVOT the first order stands in, sample by sample.

    Args:
        value: scaled Q, twice differentiable in the actions.
        states_BS: states.
        point_BA: c, where Q is expanded.
        mean_BA: posterior mean m_t.
        variance_BA: diagonal of Sigma.
        beta_B: inverse temperatures.

    Returns:
        E [B] and a mask [B]: True where second order was used; both without gradient.
    """
    q_B, slope_BA, hessian_BAA = _expand(value, states_BS, point_BA)
    delta_BA = mean_BA - point_BA
    first_B = q_B + (slope_BA * delta_BA).sum(dim=-1)
    plain_B = beta_B * first_B + 0.5 * beta_B.square() * (variance_BA * slope_BA.square()).sum(dim=-1)

    bent_BA = torch.einsum("bij,bj->bi", hessian_BAA, delta_BA)
    root_BA = variance_BA.sqrt()
    eigenvalues_BA, vectors_BAA = torch.linalg.eigh(root_BA[:, :, None] * hessian_BAA * root_BA[:, None, :])
    pivot_BA = 1.0 - beta_B[:, None] * eigenvalues_BA
    used_B = (pivot_BA >= MIN_PIVOT).all(dim=-1)
    pivot_BA = pivot_BA.clamp(min=MIN_PIVOT)
    along_BA = torch.einsum("bij,bi->bj", vectors_BAA, root_BA * (slope_BA + bent_BA))
    curved_B = (
        beta_B * (first_B + 0.5 * (bent_BA * delta_BA).sum(dim=-1))
        + 0.5 * beta_B.square() * (along_BA.square() / pivot_BA).sum(dim=-1)
        - 0.5 * pivot_BA.log().sum(dim=-1)
    )
    return torch.where(used_B, curved_B, plain_B), used_B


def by_autograd(value: Value) -> WithSlope:
    """Return a differentiable Q together with its slope."""

    def with_slope(states_BS: Tensor, actions_BA: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            actions_BA = actions_BA.detach().requires_grad_()
            q_B = value(states_BS, actions_BA)
            (slope_BA,) = torch.autograd.grad(q_B.sum(), actions_BA)
        return q_B.detach(), slope_BA

    return with_slope


def _expand(value: Value, states_BS: Tensor, point_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, its gradient and its symmetrised Hessian at c, detached."""
    q_B, slope_BA = by_autograd(value)(states_BS, point_BA)

    def of_one(state_S: Tensor, action_A: Tensor) -> Tensor:
        return value(state_S[None], action_A[None])[0]

    hessian_BAA = torch.func.vmap(torch.func.jacrev(torch.func.grad(of_one, argnums=1), argnums=1))(
        states_BS, point_BA.detach()
    )
    return q_B, slope_BA, (0.5 * (hessian_BAA + hessian_BAA.transpose(1, 2))).detach()
