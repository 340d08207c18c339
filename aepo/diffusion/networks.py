"""The networks of (a_t, s, t) in the forms that the schedule gives them: noise [M5], variance [M10], energy [M12]."""

import torch
from torch import Tensor, nn

from aepo.diffusion.schedule import alpha_sigma
from aepo.networks import TimeNet


class NoiseNet(TimeNet):
    """eps_phi(a_t, s, t) = sigma_t a_t + alpha_t F(a_t, s, t), F the network (arXiv 2202.00512).

    What the stages need of it is the posterior mean (a_t - sigma_t eps) / alpha_t [M9], which then is
    alpha_t a_t - sigma_t F: an error of F is not divided by alpha_t, 0.007 at t = 1.
    """

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__(state_dim, action_dim, action_dim, hidden_size=hidden_size, num_layers=num_layers)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return the predicted noise, [B, A]."""
        alpha_B, sigma_B = alpha_sigma(t_B)
        velocity_BA: Tensor = super().forward(a_t_BA, states_BS, t_B)
        return sigma_B[:, None] * a_t_BA + alpha_B[:, None] * velocity_BA


class VarianceNet(TimeNet):
    """The posterior's variance per action dimension, v_t(a_t, s), in (0, 1): actions lie in [-1, 1]  [M10]."""

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int):
        """One output per action dimension."""
        super().__init__(state_dim, action_dim, action_dim, hidden_size=hidden_size, num_layers=num_layers)

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor) -> Tensor:
        """Return variances, [B, A]."""
        return super().forward(a_t_BA, states_BS, t_B).sigmoid()


class EnergyNet(TimeNet):
    """E_t as beta f_1 + beta^2 f_2 [M12], or, with `takes_beta`, as beta f(s, a_t, t, log beta).

    The network sees alpha_t a_t: E_t forgets a_t as alpha_t falls, and the sampler divides grad E_t by alpha_t
    [M13]. So the gradient has the factor alpha_t by construction, and no error of the network is blown up at
    high noise.
    """

    def __init__(self, state_dim: int, action_dim: int, *, hidden_size: int, num_layers: int, takes_beta: bool):
        """Two outputs, or one and one more input."""
        super().__init__(
            state_dim + int(takes_beta),
            action_dim,
            1 if takes_beta else 2,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
        self.takes_beta = takes_beta

    def inputs(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:  # type: ignore[override]
        """Return what the layers see, [B, I]."""
        alpha_B, _ = alpha_sigma(t_B)
        if self.takes_beta:
            states_BS = torch.cat([states_BS, beta_B.log()[:, None]], dim=-1)
        return super().inputs(alpha_B[:, None] * a_t_BA, states_BS, t_B)

    def outputs(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:
        """Return f_1 and f_2, [B, 2], or f, [B, 1]."""
        return self.body(self.inputs(a_t_BA, states_BS, t_B, beta_B))  # type: ignore[no-any-return]

    def forward(self, a_t_BA: Tensor, states_BS: Tensor, t_B: Tensor, beta_B: Tensor) -> Tensor:  # type: ignore[override]
        """Return E_t(s, a_t) at inverse temperature beta, [B]."""
        outputs_BO = self.outputs(a_t_BA, states_BS, t_B, beta_B)
        return beta_B * outputs_BO[:, 0] if self.takes_beta else combine(outputs_BO, beta_B)


class ClosedForm(nn.Module):
    """E_t = beta Q(s, m_t) / scale + ... [M11] in closed form, expanded at the posterior mean: no weights of its own.

    Its gradient moves m_t by beta v_t grad_a Q(s, m_t) / scale: the mean of the guided policy's own posterior where
    actions are Gaussian and Q is linear. v_t is measured per action dimension [M10].
    """

    scale: Tensor
    """Standard deviation of Q - V over the data."""

    def __init__(self) -> None:
        """Scale 1 until one is measured."""
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


def combine(heads_B2: Tensor, beta_B: Tensor) -> Tensor:
    """Return E = beta f_1 + beta^2 f_2, [B]  [M12]."""
    return beta_B * heads_B2[:, 0] + beta_B.square() * heads_B2[:, 1]
