"""Schedule, posterior and solver against exact answers for Gaussians and mixtures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from aepo.diffusion import posterior, sampler, schedule


@given(st.floats(schedule.T_MIN, 1.0))
def test_alpha_is_the_integral_of_the_linear_rate(t):
    exact = math.exp(-0.5 * integrate.quad(lambda s: 0.1 + s * (20 - 0.1), 0, t)[0])
    alpha, sigma = schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64))
    assert alpha.item() == pytest.approx(exact, rel=1e-9)
    assert alpha.item() ** 2 + sigma.item() ** 2 == pytest.approx(1.0)


def test_half_log_snr_is_log_alpha_over_sigma():
    t = torch.linspace(schedule.T_MIN, 1, 50, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(schedule.log_snr_half(t), (alpha / sigma).log())


def test_time_of_inverts_the_half_log_snr():
    t = torch.linspace(schedule.T_MIN, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr_half(t)), t)


def test_times_fill_their_interval():
    t = schedule.draw_times(20_000, torch.Generator().manual_seed(0))
    assert schedule.T_MIN <= t.min() <= 0.002
    assert 0.999 <= t.max() <= 1
    assert stats.kstest(t.numpy(), stats.uniform(schedule.T_MIN, 1 - schedule.T_MIN).cdf).pvalue > 1e-3


class Mixture:
    """Two Gaussians in one dimension inside (-1, 1): everything about their noised versions in closed form."""

    weight, mean, std = np.array([0.3, 0.7]), np.array([-0.5, 0.4]), np.array([0.05, 0.1])

    def parts(self, a_t, t):
        alpha, sigma = (float(x) for x in schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
        var = (alpha * self.std) ** 2 + sigma**2
        density = self.weight * stats.norm.pdf(np.asarray(a_t)[..., None], alpha * self.mean, np.sqrt(var))
        share = density / density.sum(-1, keepdims=True)
        mean = self.mean + alpha * self.std**2 / var * (np.asarray(a_t)[..., None] - alpha * self.mean)
        spread = self.std**2 * sigma**2 / var
        return alpha, sigma, share, mean, spread

    def posterior(self, a_t, t):
        _, _, share, mean, spread = self.parts(a_t, t)
        first = (share * mean).sum(-1)
        return first, (share * (spread + mean**2)).sum(-1) - first**2

    def eps(self, a_t, t):
        alpha, sigma, *_ = self.parts(a_t, t)
        return (np.asarray(a_t) - alpha * self.posterior(a_t, t)[0]) / sigma

    def field(self, a_t_BA, t_B):
        values = [self.eps(a_t_BA[:, 0].double().numpy(), float(t_B[0]))]
        return torch.tensor(np.stack(values, axis=1), dtype=torch.float32)

    def draw(self, num, rng):
        k = (rng.random(num) < self.weight[1]).astype(int)
        return rng.normal(self.mean[k], self.std[k])


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6])
def test_tweedies_mean_is_the_posterior_mean_by_quadrature(t):
    mixture, a_t = Mixture(), 0.2
    alpha, sigma, *_ = mixture.parts(a_t, t)

    def joint(a):
        return (mixture.weight * stats.norm.pdf(a, mixture.mean, mixture.std)).sum() * stats.norm.pdf(
            a_t, alpha * a, sigma
        )

    points = [-0.5, 0.4, a_t / alpha]
    total = integrate.quad(joint, -1, 1, points=points, limit=200)[0]
    exact = integrate.quad(lambda a: a * joint(a), -1, 1, points=points, limit=200)[0] / total
    eps = torch.tensor([[mixture.eps(a_t, t)]], dtype=torch.float64)
    mean = posterior.posterior_mean(torch.tensor([[a_t]], dtype=torch.float64), eps, torch.tensor([t]).double())
    assert mean.item() == pytest.approx(exact, abs=1e-5)


def test_posterior_mean_is_clipped_to_the_action_range():
    mean = posterior.posterior_mean(torch.tensor([[5.0, -5.0]]), torch.zeros(1, 2), torch.tensor([0.5]))
    assert mean.tolist() == [[1.0, -1.0]]


def test_residual_variance_is_the_mixtures_mean_posterior_variance():
    mixture, rng = Mixture(), np.random.default_rng(0)
    actions, t_K = mixture.draw(100_000, rng), [0.05, 0.3, 0.9]
    means, exact = [], []
    for t in t_K:
        alpha, sigma, *_ = mixture.parts(0.0, t)
        a_t = alpha * actions + sigma * rng.standard_normal(len(actions))
        mean, variance = mixture.posterior(a_t, t)
        means.append(mean)
        exact.append(variance.mean())
    v_K = posterior.residual_variance(torch.tensor(np.array(means))[..., None], torch.tensor(actions)[:, None])
    np.testing.assert_allclose(v_K, exact, rtol=0.02)


def test_both_forms_of_the_variance_agree_where_the_analytic_one_is_well_conditioned():
    mixture, rng, t = Mixture(), np.random.default_rng(1), 0.3
    actions = mixture.draw(200_000, rng)
    alpha, sigma, *_ = mixture.parts(0.0, t)
    a_t = alpha * actions + sigma * rng.standard_normal(len(actions))
    eps = torch.tensor(mixture.eps(a_t, t))[None, :, None]
    mean = torch.tensor(mixture.posterior(a_t, t)[0])[None, :, None]
    analytic = posterior.analytic_variance(eps, torch.tensor([t], dtype=torch.float64))
    residual = posterior.residual_variance(mean, torch.tensor(actions)[:, None])
    assert analytic.item() == pytest.approx(residual.item(), rel=0.05)


def test_variance_never_exceeds_that_of_the_actions():
    actions = torch.tensor([[0.5], [-0.5]])
    v = posterior.residual_variance(torch.tensor([[[-1.0], [1.0]]]), actions)
    assert v.item() == pytest.approx(0.25)


@given(st.integers(2, 40), st.floats(schedule.T_MIN, 1.0))
def test_interpolation_in_the_table_is_numpys(num, t):
    v_K = torch.arange(num, dtype=torch.float64).square()
    grid = posterior.time_grid(num).double()
    exact = np.interp(t, grid.numpy(), v_K.numpy())
    assert posterior.interpolate_variance(v_K, torch.tensor([t]).double()).item() == pytest.approx(exact, abs=1e-3)


def test_samples_of_an_exact_noise_net_follow_the_mixture():
    mixture = Mixture()
    start = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    actions = sampler.sample(mixture.field, None, start, sampler.make_grid(500))[:, 0].numpy()
    exact = mixture.draw(4000, np.random.default_rng(0))
    assert stats.ks_2samp(actions, exact).pvalue > 1e-3


def test_error_falls_with_the_order_of_the_solver():
    """For a Gaussian the probability flow keeps (a_t - alpha m) / std(a_t): the exact end of every path."""
    mean, std = 0.4, 0.3

    def spread(t):
        alpha, sigma = schedule.alpha_sigma(t.double())
        return alpha, sigma, (alpha**2 * std**2 + sigma**2).sqrt()

    def noise(a_t_BA, t_B):
        alpha, sigma, total = (x[:, None] for x in spread(t_B))
        return (sigma / total**2 * (a_t_BA.double() - alpha * mean)).float()

    start = torch.linspace(-2, 2, 41)[:, None]
    (a_1, _, s_1), (a_0, _, s_0) = spread(torch.tensor(1.0)), spread(torch.tensor(schedule.T_MIN))
    exact = a_0 * mean + s_0 * (start - a_1 * mean) / s_1

    def error(num_steps, order):
        grid = sampler.make_grid(num_steps, order=order)
        return float((sampler.sample(noise, None, start, grid, clip=False) - exact).abs().mean())

    slopes = {order: math.log2(error(15, order) / error(60, order)) / 2 for order in (1, 2)}
    assert slopes[1] == pytest.approx(1.0, abs=0.2)
    assert slopes[2] == pytest.approx(2.0, abs=0.4)
    assert error(50, 2) < 0.3 * error(50, 1)


@pytest.mark.parametrize("action_dim", [1, 2, 7, 30])
def test_guided_samples_of_a_gaussian_with_linear_q_have_the_exact_mean_and_covariance(action_dim):
    """Mu = N(m, s^2 I), Q = g.a: pi* = N(m + beta s^2 g, s^2 I), E_t's gradient = beta g dm_t/da_t  [oracle]."""
    beta, s, num = 2.0, 0.5, 20_000
    generator = torch.Generator().manual_seed(action_dim)
    mean = torch.linspace(-0.3, 0.3, action_dim)
    g = torch.randn(action_dim, generator=generator)

    def shrink(t_B):
        alpha, sigma = schedule.alpha_sigma(t_B)
        return alpha, sigma, alpha * s**2 / (alpha**2 * s**2 + sigma**2)

    def noise(a_t_BA, t_B):
        alpha, sigma, k = (x[:, None] for x in shrink(t_B))
        m_t = mean + k * (a_t_BA - alpha * mean)
        return (a_t_BA - alpha * m_t) / sigma

    def guide(a_t_BA, t_B):
        return beta * shrink(t_B)[2][:, None] * g.expand_as(a_t_BA)

    start = torch.randn(num, action_dim, generator=generator)
    samples = sampler.sample(noise, guide, start, sampler.make_grid(400), clip=False)
    error = (samples.mean(0) - (mean + beta * s**2 * g)).abs()
    assert (error < 3.5 * s / math.sqrt(num)).all()
    covariance = torch.cov(samples.T).reshape(action_dim, action_dim)
    tolerance = 4 * s**2 * math.sqrt(2 / num)
    assert ((covariance - s**2 * torch.eye(action_dim)).abs() < tolerance).all()
    for temperature in (0.0, 0.5):  # the solver's start scaled: the same mean, the deviation scaled too
        scaled = sampler.sample(noise, guide, temperature * start, sampler.make_grid(400), clip=False)
        exact = mean + beta * s**2 * g
        assert (scaled.mean(0) - exact).abs().max() < 5e-3 + 3.5 * temperature * s / math.sqrt(num)
        assert (scaled.std(0) - temperature * s).abs().max() < 5e-3


@pytest.mark.parametrize(("num_steps", "order"), [(0, 2), (5, 3)])
def test_grid_refuses_what_it_cannot_do(num_steps, order):
    with pytest.raises(ValueError, match="order 1 or 2"):
        sampler.make_grid(num_steps, order=order)


@given(st.integers(1, 20), st.integers(1, 5))
def test_samples_stay_in_the_action_range_whatever_the_networks_say(num_steps, action_dim):
    start = 10 * torch.randn(3, action_dim, generator=torch.Generator().manual_seed(0))
    actions = sampler.sample(
        lambda a, t: 100 * torch.sin(37 * a), lambda a, t: 1e6 * a, start, sampler.make_grid(num_steps)
    )
    assert actions.shape == (3, action_dim)
    assert actions.abs().max() <= 1
