"""The closed form: guidance without an energy network, against autograd and exact Gaussians; its runs and policies."""

import dataclasses

import numpy as np
import pytest
import torch

from aepo import pipeline
from aepo.config import CriticConfig
from aepo.diffusion import guidance, sampler
from aepo.diffusion.networks import ClosedForm
from aepo.errors import ConfigError
from aepo.networks import TwinQ
from aepo.policy import Policy
from aepo.stages import critic, energy
from tests.training import CPU

CLOSED = {"energy__target": "analytic", "energy__expansion": "posterior_mean", "energy__steps": 0}


def trained(config, data):
    """The states of a run at its end."""
    *_, last = pipeline.train(config, data, device=CPU)
    return last.states


def gaussian_mean(grid, mean, variance):
    """The posterior mean of N(mean, variance), and its variance, at the steps of a solver."""

    def of(a_t_BA, i):
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        return (mean * sigma**2 + variance * alpha * a_t_BA) / (sigma**2 + variance * alpha**2)

    rows = [variance * s**2 / (s**2 + variance * a**2) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    return of, torch.stack(rows[:-1])


def test_the_shift_is_the_gradient_of_the_energy_through_the_posterior_mean():
    """sigma_t^2 / alpha_t grad_{a_t} beta Q(s, m_t(a_t)) / scale by autograd, for Gaussian actions  [M4, M11]."""
    torch.manual_seed(0)
    grid = sampler.make_grid(5)
    q = TwinQ(3, 2, CriticConfig(steps=1, batch_size=1, hidden_size=32, num_layers=2))
    mean_A, variance_A = torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.05])
    posterior_mean, variance_NA = gaussian_mean(grid, mean_A, variance_A)
    states_BS, a_t_BA = torch.randn(7, 3), 0.3 * torch.randn(7, 2)
    closed, beta = ClosedForm(), 1.7
    closed.scale.fill_(0.4)
    shift, factors_N = energy.closed_shift(closed, q, states_BS, beta, variance_NA)
    for i in range(5):
        noised_BA = a_t_BA.clone().requires_grad_()
        energy_B = beta * q.lowest(states_BS, posterior_mean(noised_BA, i)) / closed.scale
        (slope_BA,) = torch.autograd.grad(energy_B.sum(), noised_BA)
        with torch.no_grad():
            found_BA = factors_N[i] * shift(a_t_BA, posterior_mean(a_t_BA, i), i)
        exact_BA = grid.sigma[i] ** 2 / grid.alpha[i] * slope_BA
        assert torch.allclose(found_BA, exact_BA, rtol=1e-3, atol=1e-6)


def test_samples_of_a_gaussian_with_a_linear_q_have_the_exact_mean():
    """Mu = N(m, S), Q = g.a: pi* = N(m + beta S g, S), per dimension  [oracle]."""
    grid, beta = sampler.make_grid(200), 2.0
    mean_A, variance_A, g_A = torch.tensor([0.1, -0.2]), torch.tensor([0.2, 0.02]), torch.tensor([0.7, -1.1])
    posterior_mean, variance_NA = gaussian_mean(grid, mean_A, variance_A)
    linear = guidance.guided(
        posterior_mean, lambda a_BA, _, i: variance_NA[i] * g_A.expand_as(a_BA), [beta] * 200, None
    )
    start_BA = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    drawn_BA = sampler.solve(linear, start_BA, grid, clip=False)
    exact_A = mean_A + beta * variance_A * g_A
    assert ((drawn_BA.mean(0) - exact_A).abs() < 4 * (variance_A / 20_000).sqrt() + 2e-3).all()
    assert torch.allclose(drawn_BA.var(0), variance_A, rtol=0.05)


def test_a_run_without_energy_steps_has_two_stages_and_a_policy_that_is_guided(tiny_config, transitions, tmp_path):
    config = tiny_config(**CLOSED)
    assert list(config.stages) == ["behavior", "critic"]
    states = trained(config, transitions)
    assert set(states) == {"behavior", "critic"}
    policy = Policy.from_state(config, states, transitions)
    assert float(policy.sampler.energy.scale) == float(critic.advantage_scale(states["critic"], transitions))
    policy.save(tmp_path / "policy.safetensors")
    observations = np.random.default_rng(0).normal(size=(9, 3))

    def act(one):
        return one.act(observations, torch.Generator().manual_seed(0))

    assert np.array_equal(act(policy), act(Policy.load(tmp_path / "policy.safetensors")))
    cloned = policy.with_sampling(dataclasses.replace(policy.sampling, guidance_scale=0.0))
    assert not np.array_equal(act(policy), act(cloned))
    assert policy.sampler.cost()["energy/kl"] > 0


def test_the_guided_action_has_the_higher_q(tiny_config, transitions):
    config = tiny_config(**CLOSED)
    policy = Policy.from_state(config, trained(config, transitions), transitions)
    states_BS = transitions.sample(200).states_BS
    q = []
    for scale in (0.0, 1.0):
        own = policy.with_sampling(dataclasses.replace(policy.sampling, guidance_scale=scale))
        actions_BA = own.sampler.sample(states_BS, torch.Generator().manual_seed(1))
        q.append(float(policy.sampler.q.lowest(states_BS, actions_BA).mean()))
    assert q[1] > q[0]


@pytest.mark.parametrize("change", [{"energy__target": "log_expectation"}, {}])
def test_a_target_that_is_learned_wants_steps(tiny_config, change):
    with pytest.raises(ConfigError, match=r"give steps, as in --set energy.steps=4000"):
        tiny_config(**{**CLOSED, "energy__expansion": "data_action", **change})


def test_a_run_without_energy_steps_is_a_prefix_of_one_with_them(tiny_config, transitions):
    """The stages that both have are the same to the bit, so that a store serves both."""
    from aepo.runs.stage_store import stage_keys

    learned = tiny_config(energy__target="analytic", energy__expansion="posterior_mean")
    keys, more = stage_keys(tiny_config(**CLOSED), "digest"), stage_keys(learned, "digest")
    assert keys.items() < more.items()
    states, _ = pipeline.prepare(learned, transitions, CPU)
    assert set(states) == {"behavior", "critic", "energy"}
