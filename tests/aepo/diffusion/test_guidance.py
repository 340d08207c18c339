"""Guidance measured in nats, against Gaussians and mixtures whose divergence is known."""

import math

import pytest
import torch

from aepo.diffusion import guidance, sampler


def gaussian(grid, mean, variance, slope):
    """Posterior mean, and guidance by a linear Q with this slope, of N(mean, variance) in one dimension."""

    def posterior(i):
        snr = (grid.alpha[i] / grid.sigma[i]) ** 2
        return variance / (1.0 + variance * snr)

    def predict_mean(a_t_BA, i):
        v, alpha, sigma = posterior(i), grid.alpha[i], grid.sigma[i]
        return v * (mean / variance + alpha / sigma**2 * a_t_BA)

    def predict_slope(a_t_BA, _, i):  # grad E_t / alpha_t, E_t = slope m_t + constant
        return torch.full_like(a_t_BA, slope * posterior(i) / grid.sigma[i] ** 2)

    variance_NA = torch.tensor([[posterior(i)] for i in range(len(grid.steps))])
    return predict_mean, predict_slope, variance_NA


def run(grid, mean, slope, scale, meter, start_BA):
    weights = [scale * sigma**2 for sigma in grid.sigma]
    return sampler.solve(guidance.guided(mean, slope, weights, meter), start_BA, grid, clip=False)


@pytest.mark.parametrize("variance", [0.5, 0.01, 1e-3])
@pytest.mark.parametrize("num_steps", [3, 6, 15])
def test_the_cost_is_the_divergence_of_shifted_gaussians(variance, num_steps):
    grid = sampler.make_grid(num_steps)
    beta_slope = 1.7
    mean, slope, variance_NA = gaussian(grid, 0.2, variance, beta_slope)
    meter = guidance.Budget.of(grid, variance_NA, scale=1.0, nats=0.0).meter(5)
    run(grid, mean, slope, 1.0, meter, torch.randn(5, 1, generator=torch.Generator().manual_seed(0)))
    first = (grid.alpha[0] / grid.sigma[0]) ** 2  # what was known before the first step
    last = (grid.alpha[-1] / grid.sigma[-1]) ** 2
    known = variance / (1 + variance * first) - variance / (1 + variance * last)
    exact = 0.5 * beta_slope**2 * known  # KL of N(mu + S g, S) against N(mu, S) is g' S g / 2; here up to T_MIN
    assert meter.spent_B.tolist() == pytest.approx([exact] * 5, rel=1e-3)


@pytest.mark.parametrize("nats", [0.1, 1.0])
def test_a_budget_that_binds_is_spent_exactly_and_one_that_does_not_changes_nothing(nats):
    grid = sampler.make_grid(6)
    mean, slope, variance_NA = gaussian(grid, 0.0, 0.3, 1.0)
    start_BA = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    tight = guidance.Budget.of(grid, variance_NA, scale=1.0, nats=nats).meter(64, sizes=True)
    run(grid, mean, slope, 1e4, tight, start_BA)
    assert tight.spent_B.tolist() == pytest.approx([guidance.CAP * nats] * 64, rel=1e-4)
    assert len(tight.deviations) == 6
    loose = guidance.Budget.of(grid, variance_NA, scale=1.0, nats=1e6).meter(64)
    assert torch.equal(run(grid, mean, slope, 1.0, loose, start_BA), run(grid, mean, slope, 1.0, None, start_BA))


def test_shares_end_with_all_that_is_left():
    shares = guidance.shares(sampler.make_grid(6), 0.3)
    assert shares[-1] == 1.0
    assert all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("nats", [0.05, 0.5, 2.0])
def test_the_scale_of_a_budget_costs_it(nats):
    grid = sampler.make_grid(6)
    mean, slope, variance_NA = gaussian(grid, 0.0, 0.3, 0.01)
    budget = guidance.Budget.of(grid, variance_NA, scale=1.0, nats=0.0)

    def cost_of(scale):
        meter = budget.meter(1)
        run(grid, mean, slope, scale, meter, torch.zeros(1, 1))
        return float(meter.spent_B.mean())

    assert cost_of(guidance.scale_within(nats, 1e4, cost_of)) == pytest.approx(nats, rel=1e-3)
    assert guidance.scale_within(nats, 3.0, lambda scale: 0.0) == 3.0


@pytest.mark.parametrize("target_kl", [0.3, 1.0])
def test_the_cost_is_the_divergence_of_samples_from_a_mixture(target_kl):
    """Two modes, Q linear: posterior, energy and both densities are known; the divergence by quadrature."""
    centres, variance = torch.tensor([-0.6, 0.5], dtype=torch.float64), 0.02
    grid = sampler.make_grid(200)  # the cost of exact guidance; the solver's own error is another matter

    def posterior(a_t, i, beta):
        """Weights, means and variance of the posterior of the tilted mixture."""
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        v = 1.0 / (1.0 / variance + (alpha / sigma) ** 2)
        shifted = centres + beta * variance  # of component k of mu exp(beta a)
        prior = beta * centres  # log weights, up to a constant
        log_w = prior - 0.5 * (a_t - alpha * shifted) ** 2 / (alpha**2 * variance + sigma**2)
        means = v * (shifted / variance + alpha / sigma**2 * a_t)
        w = log_w.softmax(dim=-1)
        mean = (w * means).sum(dim=-1, keepdim=True)
        return mean, (w * (v + (means - mean) ** 2)).sum(dim=-1)

    def divergence(beta):
        a = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
        log_p = torch.logsumexp(-0.5 * (a[:, None] - centres) ** 2 / variance, dim=-1)
        log_q = log_p + beta * a
        p, q = log_p.softmax(0), log_q.softmax(0)
        return float((q * (q.log() - p.log())).sum())

    low, high = 0.0, 20.0
    for _ in range(50):
        beta = (low + high) / 2
        low, high = (beta, high) if divergence(beta) < target_kl else (low, beta)
    generator = torch.Generator().manual_seed(3)
    spent, snr = torch.zeros(40_000, dtype=torch.float64), guidance.snr(grid).tolist()
    # the path measure: actions of the guided policy, noised; d_t and v_t there
    kind = torch.multinomial((beta * centres + 0.5 * beta**2 * variance).softmax(0), 40_000, True, generator=generator)
    a_0 = (centres[kind] + beta * variance + math.sqrt(variance) * torch.randn(40_000, generator=generator)).double()
    for i in range(len(grid.steps)):
        noise = torch.randn(40_000, generator=generator).double()
        a_t = (grid.alpha[i] * a_0 + grid.sigma[i] * noise)[:, None]
        (guided, _), (plain, v) = posterior(a_t, i, beta), posterior(a_t, i, 0.0)
        step = snr[i + 1] - snr[i]
        rate = 0.5 * step / (1.0 + v * step)
        spent += rate * (guided - plain)[:, 0] ** 2
        one = sampler.Grid(grid.t, grid.alpha[i : i + 2], grid.sigma[i : i + 2], grid.steps[i : i + 1])
        assert torch.allclose(guidance.nat_rates(one, v[:1, None])[0], rate[:1])
    assert float(spent.mean()) == pytest.approx(target_kl, rel=0.05)
