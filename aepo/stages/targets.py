"""What the energy network learns: seven ways to E_t(s, a_t) = log E[exp(beta Q(s, a_0)) | a_t, s]  [M3].

    analytic               [M11], [M12]   the paper's: first order in Q, Gaussian posterior; exact for a linear Q
    analytic_second_order                 the same with Q's Hessian; exact for a quadratic Q
    monte_carlo                           log-mean-exp over draws from the Gaussian posterior
    mse                                   E[beta Q(s, a_0)]: QGPO's ablation (arXiv 2304.12824); below [M3] by Jensen
    log_expectation        [M14]          exact in the limit, data actions only
    weighted_denoising     [M15]          its gradient: exact in the limit, data actions only
    contrastive                           QGPO's CEP: exact in the limit up to a constant per (s, t), support actions

Each is a loss of the network's outputs on one noised batch, and returns its gradient by them; some ask the behaviour
model for the posterior. Those that are polynomials in beta train two heads f_1 and f_2, the others f = E / beta, of a
network that takes beta, drawn anew for every sample. `weighted_denoising` asks for the network itself.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aepo import parallel
from aepo.diffusion.schedule import alpha_sigma
from aepo.stages.optim import Metrics

if TYPE_CHECKING:
    from aepo.stages.energy import EnergyNet

Value = Callable[[Tensor, Tensor], Tensor]
"""(states [B, S], actions [B, A]) -> scaled Q [B], differentiable in the actions."""
WithSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(states [B, S], actions [B, A]) -> scaled Q [B] and its gradient by the actions [B, A], both without a graph."""
Outcome = tuple[Tensor, Metrics]
"""Gradient of the loss by the network's outputs, in their shape, and metrics, `loss` among them."""

MAX_EXPONENT = 5.0
"""Of [M14]: above it exp is continued by its tangent, so that one outlier does not own the step."""
MAX_WEIGHT = 100.0
"""Of [M15], as of IQL's advantages: one outlier does not own the step."""
MIN_PIVOT = 0.1
"""Second order is used where every eigenvalue of I - beta Sigma H is at least this."""


class Noised(NamedTuple):
    """Data actions, noised."""

    index_B: Tensor
    """Their rows of the data."""
    states_BS: Tensor
    actions_BA: Tensor
    """a_0."""
    t_B: Tensor
    a_t_BA: Tensor
    beta_B: Tensor
    """Inverse temperature at which the network is trained on this sample; unused by polynomials in beta."""
    q_B: Tensor
    """Scaled Q(s, a_0); empty for targets that do not ask for it."""


class Posterior(NamedTuple):
    """What the behaviour model says of where each a_t came from."""

    mean_BA: Tensor
    """m_t  [M9]."""
    variance_BA: Tensor
    """Diagonal of the covariance  [M10]."""
    point_BA: Tensor
    """c of [M11]."""


def analytic(heads_B2: Tensor, q_B: Tensor, slope_BA: Tensor, origin: Posterior) -> Outcome:
    """Return the gradient of the squared error of both heads  [M12].

    Args:
        heads_B2: the network's outputs.
        q_B: scaled Q at the point of expansion.
        slope_BA: its gradient there.
        origin: the posterior.
    """
    first_B, second_B = first_order(q_B, slope_BA, origin.point_BA, origin.mean_BA, origin.variance_BA)
    return _fit_heads(heads_B2, first_B, second_B)


def mse(heads_B2: Tensor, x: Noised) -> Outcome:
    """Return the gradient of the squared error of f_1 to Q(s, a_0) and of f_2 to 0."""
    return _fit_heads(heads_B2, x.q_B, torch.zeros_like(x.q_B))


def analytic_second_order(f_B1: Tensor, value: Value, x: Noised, origin: Posterior) -> Outcome:
    """Return the gradient of the squared error of f to the second-order closed form; its metrics say how often the
    first order stood in.
    """
    target_B, used_B = second_order(value, x.states_BS, origin.point_BA, origin.mean_BA, origin.variance_BA, x.beta_B)
    slope_B1, metrics = _fit_energy(f_B1, x, target_B)
    return slope_B1, lambda: metrics() | {"first_order_share": 1.0 - used_B.float().mean()}


def monte_carlo(f_B1: Tensor, value: Value, x: Noised, origin: Posterior, draws_KBA: Tensor) -> Outcome:
    """Return the gradient of the squared error of f to log-mean-exp of beta Q over draws from N(m_t, v_t), over beta.

    Args:
        f_B1: the network's outputs.
        value: scaled Q.
        x: the batch.
        origin: its posterior.
        draws_KBA: standard normal draws; actions made of them are clipped to [-1, 1].
    """
    actions_KBA = (origin.mean_BA + origin.variance_BA.sqrt() * draws_KBA).clamp(-1.0, 1.0)
    states_KBS = x.states_BS.expand(len(draws_KBA), -1, -1)
    q_KB = value(states_KBS.flatten(0, 1), actions_KBA.flatten(0, 1)).view(len(draws_KBA), -1)
    target_B = torch.logsumexp(x.beta_B * q_KB, dim=0) - math.log(len(draws_KBA))
    return _fit_energy(f_B1, x, target_B)


def log_expectation(f_B1: Tensor, x: Noised) -> Outcome:
    """Return the gradient of E[(exp(beta Q(s, a_0) - E) + E) / beta^2], least where E is [M3] exactly  [M14].

    Near its least value the loss is half the squared error of E / beta: as in the other targets, no beta of the
    range owns it.
    """
    f_B = f_B1.squeeze(1)
    gap_B = x.beta_B * (x.q_B - f_B)
    clamped_B = gap_B.clamp(max=MAX_EXPONENT)
    exp_B = clamped_B.exp()

    def metrics() -> dict[str, Tensor]:
        tangent_B = exp_B * (1.0 + gap_B - clamped_B)  # exp itself below the largest exponent
        energy_B = x.beta_B * f_B
        return {
            "loss": ((tangent_B + energy_B) / x.beta_B.square()).mean(),
            "energy": energy_B.mean(),
            "clamped_share": (gap_B > MAX_EXPONENT).float().mean(),
        }

    return ((1.0 - exp_B) / (len(f_B) * x.beta_B)).unsqueeze(1), metrics


def weighted_denoising(net: "EnergyNet", x: Noised, origin: Posterior) -> tuple[Tensor, Metrics]:
    """Return E[w |a_0 - m_t - sigma_t^2 / alpha_t grad E|^2] / A over E[w], w = exp(beta Q(s, a_0))  [M15].

    Least where m_t + sigma_t^2 / alpha_t grad E is the guided policy's own posterior mean E[w a_0 | a_t] / E[w | a_t],
    that is, where grad E is the gradient of [M3]. The network is fitted through its gradient, all that guidance uses,
    and learns from A numbers per sample instead of one; E itself is known up to a constant per (s, t, beta).
    """
    weight_B = (x.beta_B * x.q_B).exp().clamp(max=MAX_WEIGHT)
    alpha_B, sigma_B = alpha_sigma(x.t_B)
    a_t_BA = x.a_t_BA.detach().requires_grad_()
    energy_B = net(a_t_BA, x.states_BS, x.t_B, x.beta_B)
    (slope_BA,) = torch.autograd.grad(energy_B.sum(), a_t_BA, create_graph=True)
    guided_BA = origin.mean_BA + (sigma_B.square() / alpha_B)[:, None] * slope_BA
    error_B = (x.actions_BA - guided_BA).square().mean(dim=1)
    loss = (weight_B * error_B).sum() / parallel.mean(weight_B.sum())
    return loss, lambda: {
        "loss": loss.detach(),
        "effective_share": weight_B.mean().square() / weight_B.square().mean(),
        "clamped_share": (weight_B == MAX_WEIGHT).float().mean(),
    }


def contrastive(f_BK: Tensor, q_BK: Tensor, beta_B: Tensor) -> Outcome:
    """Return the gradient of the cross-entropy between softmax(beta Q(s, a_i)) and softmax(E_t(s, a_{i,t})).

    Args:
        f_BK: the network's outputs E / beta for K support actions of each state, noised, all of a state at one t.
        q_BK: scaled Q of these actions.
        beta_B: inverse temperatures.
    """
    energy_BK = beta_B[:, None] * f_BK
    weight_BK = (beta_B[:, None] * q_BK).softmax(dim=1)
    slope_BK = (energy_BK.softmax(dim=1) - weight_BK) * (beta_B / len(beta_B))[:, None]
    return slope_BK, lambda: {
        "loss": -(weight_BK * energy_BK.log_softmax(dim=1)).sum(dim=1).mean(),
        "effective_support": (1.0 / weight_BK.square().sum(dim=1)).mean(),
    }


def first_order(
    q_B: Tensor, slope_BA: Tensor, point_BA: Tensor, mean_BA: Tensor, variance_BA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return f_1 and f_2 with E = beta f_1 + beta^2 f_2, each [B]  [M11, M12].

    Exact where Q is linear in the action and the posterior Gaussian.

    Args:
        q_B: scaled Q at c, without a graph.
        slope_BA: its gradient there.
        point_BA: c, where Q is expanded.
        mean_BA: posterior mean m_t.
        variance_BA: posterior variance of each action component, >= 0.
    """
    first_B = q_B + (slope_BA * (mean_BA - point_BA)).sum(dim=-1)
    return first_B, 0.5 * (variance_BA * slope_BA.square()).sum(dim=-1)


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


def combine(heads_B2: Tensor, beta_B: Tensor) -> Tensor:
    """Return E = beta f_1 + beta^2 f_2, [B]  [M12]."""
    return beta_B * heads_B2[:, 0] + beta_B.square() * heads_B2[:, 1]


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


def _fit_heads(heads_B2: Tensor, first_B: Tensor, second_B: Tensor) -> Outcome:
    error_B2 = heads_B2 - torch.stack([first_B, second_B], dim=1)
    return 2.0 / len(error_B2) * error_B2, lambda: {
        "loss": error_B2.square().mean(dim=0).sum(),
        "f_1": first_B.mean(),
        "f_2": second_B.mean(),
    }


def _fit_energy(f_B1: Tensor, x: Noised, target_B: Tensor) -> Outcome:
    """Errors of E / beta, so that no beta of the range owns the loss."""
    error_B1 = f_B1 - (target_B / x.beta_B).unsqueeze(1)
    return 2.0 / len(error_B1) * error_B1, lambda: {"loss": error_B1.square().mean(), "energy": target_B.mean()}
