"""Every energy target against quadrature, the Gaussian's own answer or its known minimiser; the two heads [M12]."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aepo.diffusion.networks import combine
from aepo.diffusion.schedule import alpha_sigma
from aepo.stages import behavior, critic, energy, targets
from aepo.stages.behavior import BehaviorState
from aepo.stages.critic import CriticState
from tests.examples import random_transitions


def linear(q, slope_A):
    """Q(s, a) = q + slope.a."""
    return lambda states_BS, actions_BA: q + actions_BA @ slope_A


def first_order(value, states_BS, point_BA, mean_BA, variance_BA):
    """What the target makes of a differentiable Q."""
    return targets.first_order(*targets.by_autograd(value)(states_BS, point_BA), point_BA, mean_BA, variance_BA)


@given(
    st.floats(-2, 2),
    st.floats(-1.5, 1.5),
    st.floats(0, 0.5),
    st.floats(0.1, 3),
    st.floats(-1, 1),
    st.floats(-1, 1),
)
def test_target_is_exact_for_a_linear_q_wherever_it_is_expanded(q, g, v, beta, mean, point):
    x, w = np.polynomial.hermite.hermgauss(60)
    exact = np.log(w / np.sqrt(np.pi) @ np.exp(beta * (q + g * (mean + np.sqrt(2 * v) * x))))
    where = [torch.tensor([[x]], dtype=torch.float64) for x in (0.0, point, mean, v)]
    value = linear(q, torch.tensor([g], dtype=torch.float64))
    heads = torch.stack(first_order(value, *where), dim=1)
    beta_B = torch.tensor([beta], dtype=torch.float64)
    assert combine(heads, beta_B).item() == pytest.approx(exact, rel=1e-5, abs=1e-5)
    second, used = targets.second_order(value, *where, beta_B)
    assert used.all()
    assert second.item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def quadratic(q, slope_A, hessian_AA):
    """Q(s, a) = q + slope.a + a'Ha/2."""
    return lambda states_BS, actions_BA: (
        q + actions_BA @ slope_A + 0.5 * torch.einsum("bi,ij,bj->b", actions_BA, hessian_AA, actions_BA)
    )


@given(
    st.floats(-2, 2), st.floats(-3, 1.5), st.floats(0.01, 0.5), st.floats(0.1, 1), st.floats(-1, 1), st.floats(-1, 1)
)
def test_second_order_is_exact_for_a_quadratic_q_wherever_it_is_expanded(g, h, v, beta, mean, point):
    x, w = np.polynomial.hermite.hermgauss(120)
    a = mean + np.sqrt(2 * v) * x
    exact = np.log(w / np.sqrt(np.pi) @ np.exp(beta * (0.3 + g * a + 0.5 * h * a**2)))
    value = quadratic(0.3, torch.tensor([g]).double(), torch.tensor([[h]]).double())
    where = [torch.tensor([[x]], dtype=torch.float64) for x in (0.0, point, mean, v)]
    got, used = targets.second_order(value, *where, torch.tensor([beta], dtype=torch.float64))
    assert used.item() == (1 - beta * v * h >= targets.MIN_PIVOT)
    if used.item():
        assert got.item() == pytest.approx(exact, rel=1e-6, abs=1e-6)


def test_second_order_in_many_dimensions_agrees_with_the_gaussian_integral():
    """Log N-integral of exp(linear + quadratic) by completing the square with dense matrices."""
    generator = torch.Generator().manual_seed(0)
    dim, beta = 6, 0.7
    bend = torch.randn(dim, dim, generator=generator).double()
    hessian = 0.3 * (bend + bend.T)
    slope, mean, point = (torch.randn(dim, generator=generator).double() for _ in range(3))
    variance = 0.2 * torch.rand(dim, generator=generator).double() + 0.05
    got, used = targets.second_order(
        quadratic(0.0, slope, hessian),
        torch.zeros(1, 1).double(),
        point[None],
        mean[None],
        variance[None],
        torch.tensor([beta], dtype=torch.float64),
    )
    precision = torch.diag(1 / variance) - beta * hessian
    push = mean / variance + beta * slope
    exact = 0.5 * (push @ torch.linalg.solve(precision, push) - (mean**2 / variance).sum())
    exact -= 0.5 * (torch.logdet(precision) + variance.log().sum())
    assert used.all()
    assert got.item() == pytest.approx(exact.item(), rel=1e-8)


def test_where_the_integral_does_not_exist_first_order_stands_in():
    value = quadratic(0.0, torch.tensor([1.0]), torch.tensor([[4.0]]))
    x = torch.tensor([[0.5], [0.5]])
    variance_BA, beta_B = torch.tensor([[1.0], [0.01]]), torch.tensor([1.0, 1.0])
    got, used = targets.second_order(value, torch.zeros(2, 1), x, x, variance_BA, beta_B)
    assert used.tolist() == [False, True]
    heads = torch.stack(first_order(value, torch.zeros(2, 1), x, x, variance_BA), dim=1)
    assert got[0] == combine(heads, beta_B)[0]


class Free:
    """Stands for a network: E = beta f, its outputs f free numbers."""

    def __init__(self, *shape):
        self.f = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)

    def __call__(self, a_t_BA, states_BS, t_B, beta_B):
        return beta_B * self.f.flatten()


def minimise(loss, x, *shape):
    """Return the outputs f = E / beta at which a target's loss is least."""
    net = Free(*shape)
    optimizer = torch.optim.LBFGS([net.f], line_search_fn="strong_wolfe", max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        value, _ = loss(net, x)
        value.backward()
        return value

    optimizer.step(closure)
    return net.f.detach()


def sample(actions_BA, beta, **asked):
    zeros = torch.zeros_like(actions_BA)
    t_B = torch.full((len(actions_BA),), 0.5, dtype=actions_BA.dtype)
    return targets.Sample(zeros, actions_BA, t_B, zeros, torch.full_like(t_B, 1.0) * beta, **{"value": None, **asked})


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_minimiser_of_log_expectation_is_the_log_expectation(beta):
    """One a_t for all samples, so that f is one number: log mean exp(beta Q) of the data actions over beta [M14]."""
    actions_BA = torch.rand(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q_B = actions_BA[:, 0].square()

    exact = (torch.logsumexp(beta * q_B, 0) - np.log(50)) / beta
    found = minimise(targets.log_expectation, sample(actions_BA, beta, q_B=q_B), 1)
    assert found.item() == pytest.approx(exact.item(), abs=1e-4)


def test_an_outlier_moves_log_expectation_along_a_line():
    zero = torch.zeros(1, 1).double()
    losses = [
        targets.log_expectation(Free(1), sample(zero, 1.0, q_B=torch.tensor([q]).double()))[0].item()
        for q in (100.0, 101.0, 102.0)
    ]
    slope = np.exp(targets.MAX_EXPONENT)
    assert np.diff(losses) == pytest.approx([slope, slope])


class Slope:
    """Stands for a network: E = h.a_t, so that its gradient is A free numbers."""

    def __init__(self, action_dim):
        self.slope_A = torch.zeros(action_dim, dtype=torch.float64, requires_grad=True)

    def __call__(self, a_t, states, t, beta):
        return a_t @ self.slope_A


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_minimiser_of_weighted_denoising_is_the_gradient_of_the_log_expectation(beta):
    """Mu has atoms a_k; its posterior at a_t, E_t = log sum_k p_k exp(beta q_k) and grad E_t are sums [M3]."""
    generator = torch.Generator().manual_seed(0)
    atoms_KA = 2 * torch.rand(6, 2, generator=generator, dtype=torch.float64) - 1
    q_K = torch.randn(6, generator=generator, dtype=torch.float64)
    a_t_A, t_B = torch.tensor([0.2, -0.1], dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    alpha, sigma = (float(x[0]) for x in alpha_sigma(t_B))

    def log_likelihood_K(a_t_A):
        return -(a_t_A - alpha * atoms_KA).square().sum(dim=1) / (2 * sigma**2)

    prior_K = -log_likelihood_K(a_t_A)  # of which the posterior at this a_t is uniform: one sample of each atom

    def exact_energy(a_t_A):
        posterior_K = (prior_K + log_likelihood_K(a_t_A)).log_softmax(dim=0)
        return torch.logsumexp(posterior_K + beta * q_K, dim=0)

    exact_A = torch.autograd.functional.jacobian(exact_energy, a_t_A)
    mean_KA = atoms_KA.mean(dim=0).expand(6, 2)
    x = sample(atoms_KA, beta, q_B=q_K, mean_BA=mean_KA)._replace(a_t_BA=a_t_A.expand(6, 2), t_B=t_B)
    net = Slope(2)
    optimizer = torch.optim.LBFGS([net.slope_A], line_search_fn="strong_wolfe", max_iter=100, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = targets.weighted_denoising(net, x)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(net.slope_A.detach(), exact_A, rtol=1e-5, atol=1e-6)


def test_the_minimiser_of_the_contrastive_loss_is_q_up_to_a_constant():
    """Without noise the posterior is a point, so f = E / beta = Q."""
    q_BK = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    beta_B = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x = sample(torch.zeros(15, 1).double(), beta_B.repeat_interleave(5), q_B=q_BK.flatten(), num_actions=5)
    difference = minimise(targets.contrastive, x, 3, 5) - q_BK
    torch.testing.assert_close(
        difference - difference.mean(1, keepdim=True), torch.zeros_like(difference), atol=1e-3, rtol=0
    )


def test_monte_carlo_tends_to_the_gaussian_integral():
    actions_BA = torch.zeros(1, 1, dtype=torch.float64)
    draws = torch.randn(200_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    beta = 2.0
    # six deviations inside [-1, 1]: clipping does nothing
    asked = {"mean_BA": actions_BA + 0.2, "variance_BA": actions_BA + 0.01, "draws_KBA": draws}
    x = sample(actions_BA, beta, value=linear(0.3, torch.tensor([0.8]).double()), **asked)
    got = minimise(targets.monte_carlo, x, 1)
    assert got.item() == pytest.approx(0.3 + 0.8 * 0.2 + 0.5 * beta * 0.01 * 0.8**2, abs=1e-3)


@pytest.mark.parametrize("action_dim", [1, 3, 30])
def test_guidance_of_a_gaussian_with_linear_q_is_exact(action_dim):
    """grad_{a_t} E_t = beta g dm_t/da_t where m_t is the Gaussian's own posterior mean."""
    beta, std, alpha, sigma = 2.0, 0.4, 0.7, np.sqrt(1 - 0.7**2)
    slope = torch.randn(action_dim, generator=torch.Generator().manual_seed(0)).double()
    shrink = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    variance = torch.full((1, action_dim), std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)).double()
    a_t = torch.randn(1, action_dim, generator=torch.Generator().manual_seed(1)).double()

    def combined(a_t_BA):
        f_1, f_2 = first_order(linear(0.3, slope), a_t_BA, shrink * a_t_BA, shrink * a_t_BA, variance)
        return combine(torch.stack([f_1, f_2], dim=1), torch.tensor([beta]).double())

    step = 1e-4
    numeric = torch.stack(
        [(combined(a_t + step * e) - combined(a_t - step * e))[0] / (2 * step) for e in torch.eye(action_dim).double()]
    )
    exact = beta * shrink * slope
    assert ((numeric - exact).norm() / exact.norm()).item() < 1e-4


def test_targets_carry_no_gradient_and_leave_the_critic_alone():
    net = torch.nn.Linear(2, 1)
    f_1, f_2 = first_order(
        lambda s, a: net(a).squeeze(-1),
        torch.zeros(4, 1),
        torch.randn(4, 2),
        torch.randn(4, 2),
        torch.ones(4, 2),
    )
    assert not f_1.requires_grad
    assert not f_2.requires_grad
    assert net.weight.grad is None


def test_two_heads_fit_what_one_head_would_at_every_beta():
    """Least squares is linear in its target, so fitting f_1 and f_2 apart fits beta f_1 + beta^2 f_2."""
    generator = torch.Generator().manual_seed(0)
    features, f = torch.randn(200, 5, generator=generator), torch.randn(200, 2, generator=generator)
    heads = features @ torch.linalg.lstsq(features, f).solution
    for beta in (0.5, 1.0, 3.0):
        beta_B = torch.full((200,), beta)
        one = features @ torch.linalg.lstsq(features, combine(f, beta_B)[:, None]).solution
        torch.testing.assert_close(combine(heads, beta_B), one[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_minimiser_of_the_expectile_loss_is_the_empirical_expectile(expectile):
    sample = np.random.default_rng(0).gamma(2.0, size=500)
    low, high = sample.min(), sample.max()
    for _ in range(100):  # bisection on the first-order condition
        middle = (low + high) / 2
        above = expectile * np.clip(sample - middle, 0, None).sum()
        low, high = (
            (middle, high) if above > (1 - expectile) * np.clip(middle - sample, 0, None).sum() else (low, middle)
        )
    v = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], line_search_fn="strong_wolfe", max_iter=100, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = critic.expectile_loss(torch.tensor(sample) - v, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert v.item() == pytest.approx(low, abs=1e-5)


def states(config, data):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    return (
        behavior.start(config.behavior, data, generators[0]),
        critic.start(config.critic, data, generators[1]),
        energy.start(config.energy, data, generators[2]),
    )


def test_measured_scale_is_the_standard_deviation_of_the_advantage(tiny_config):
    data = random_transitions(1000)
    _, trained, _ = states(tiny_config(), data)
    batch = data.batch(data.rows_ND)
    with torch.no_grad():
        q_1, q_2 = trained.q(batch.states_BS, batch.actions_BA).numpy()
        v = trained.v(batch.states_BS).numpy()
    exact = np.std(np.minimum(q_1, q_2) - v, ddof=1)
    assert critic.advantage_scale(trained, data).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("num_draws", [999, 1000])
def test_advantages_of_rows_are_computed_again_when_the_critic_has_learned(num_draws, tiny_config):
    """Whether once for all rows or for those asked for: Q and V of single transitions say what they are."""
    data = random_transitions(1000)
    _, trained, _ = states(tiny_config(), data)
    of_rows = critic.advantage_of_rows(trained.q, trained, data, num_draws=num_draws)
    rows = torch.tensor([7, 999, 7, 0])
    for _ in range(2):
        found = of_rows(rows)
        for row, advantage in zip(rows, found, strict=True):
            one = data.take(row[None])
            with torch.no_grad():
                exact = trained.q(one.states_BS, one.actions_BA).min() - trained.v(one.states_BS)
            assert float(advantage) == pytest.approx(float(exact), abs=1e-5)
        critic.train_step(trained, tiny_config().critic, data)
    assert not torch.allclose(of_rows(rows), found)


def test_scaling_q_and_shifting_it_by_a_function_of_the_state_leaves_the_energy_alone(tiny_config):
    data = random_transitions(1000)
    _, trained, stage = states(tiny_config(), data)
    source = energy.q_source(trained, stage, tiny_config().energy, data)
    stage.q_scale = critic.advantage_scale(trained, data)
    batch = data.batch(data.rows_ND[:50])
    before = source.value(batch.states_BS, batch.actions_BA)
    with torch.no_grad():  # Q <- 10 Q + 7, V <- 10 V + 7
        for net in (trained.q.q_1, trained.q.q_2, trained.v.body):
            net[-1].weight.mul_(10)
            net[-1].bias.mul_(10).add_(7)
    stage.q_scale = critic.advantage_scale(trained, data)
    after = source.value(batch.states_BS, batch.actions_BA)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


def test_terminal_transitions_do_not_bootstrap_and_episode_ends_do(tiny_config):
    config = tiny_config().critic
    data = random_transitions(200)
    state = critic.start(config, data, torch.Generator().manual_seed(0))
    batch = data.batch(data.rows_ND)
    with torch.no_grad():
        v_next = state.v(batch.next_states_BS)
        q = state.q(batch.states_BS, batch.actions_BA)
        target = torch.minimum(*state.target(batch.states_BS, batch.actions_BA))
        u = (target - state.v(batch.states_BS)).double().numpy()
        backup = np.where(batch.terminals_B > 0, batch.rewards_B, batch.rewards_B + config.discount * v_next)
    exact = sum(np.mean((backup - q_i.numpy()) ** 2) for q_i in q)
    exact += np.mean(np.where(u < 0, 1 - config.expectile, config.expectile) * u**2)
    assert 0 < batch.terminals_B.mean() < 1
    steps = critic.n_step_returns(data, 1, config.discount)
    ahead = critic.NStepReturn(steps.rewards_N, steps.discounts_N, data.take(steps.last_N).next_states_BS)
    loss, _ = critic.in_sample_loss(state.q, state.v, state.target.net, batch, ahead, config)
    assert loss.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.7, 50.0])
def test_soft_maximum_lies_between_mean_and_maximum(beta):
    q = np.random.default_rng(0).normal(size=(20, 6))
    got = critic.soft_maximum(torch.tensor(q), beta).numpy()
    weight = np.exp(beta * (q - q.max(1, keepdims=True)))
    np.testing.assert_allclose(got, (weight * q).sum(1) / weight.sum(1))
    assert (got >= q.mean(1) - 1e-12).all()
    assert (got <= q.max(1)).all()


def test_the_softmax_backup_values_next_states_by_their_support(tiny_config):
    config = tiny_config(critic__learner="softmax_in_support").critic
    data = random_transitions(200)
    state = critic.start(config, data, torch.Generator().manual_seed(0))
    batch = data.batch(data.rows_ND)
    support = torch.rand(200, 3, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        q = torch.stack([torch.minimum(*state.target(batch.next_states_BS, support[:, k])) for k in range(3)], dim=1)
        next_v = critic.soft_maximum(q, config.backup_beta).double().numpy()
        backup = batch.rewards_B.numpy() + config.discount * np.where(batch.terminals_B > 0, 0, next_v)
        exact = sum(np.mean((backup - q_i.numpy()) ** 2) for q_i in state.q(batch.states_BS, batch.actions_BA))
        exact += np.mean((state.v(batch.next_states_BS).numpy() - next_v) ** 2)
    loss, _ = critic.in_support_loss(state.q, state.v, state.target.net, batch, support, config)
    assert loss.item() == pytest.approx(exact, rel=1e-5)


def test_states_hold_nothing_but_what_a_checkpoint_can_hold():
    from aepo import checkpoint

    assert {field.name for field in dataclasses.fields(BehaviorState)} >= {
        "net",
        "ema",
        "optimizer",
        "generator",
    }
    assert {field.name for field in dataclasses.fields(CriticState)} >= {"q", "target", "v", "optimizer"}
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoint.collect(dataclasses.make_dataclass("State", ["odd"])(odd={1, 2}))


@pytest.mark.parametrize("target", ["log_expectation", "analytic", "contrastive"])
def test_what_q_says_once_of_all_is_what_it_says_of_each(target, tiny_config, transitions):
    """A stage that draws as many actions as there are asks once; one that draws fewer asks every time."""
    method = {"contrastive": "qgpo", "analytic": "analytic"}.get(target, "best")
    config = tiny_config(method=method, energy__target=target, energy__steps=100).energy
    data = transitions
    model = behavior.start(tiny_config().behavior, data, torch.Generator())
    judge = critic.start(tiny_config().critic, data, torch.Generator())
    state = energy.start(config, data, torch.Generator())
    energy.measure(state, config, data, model)
    state.q_scale.fill_(2.0)
    once = energy.q_source(judge, state, config, data)
    each = energy.q_source(judge, state, dataclasses.replace(config, steps=1), data)
    rows = torch.tensor([3, 499, 3, 0])
    batch = data.take(rows)
    q_B, slope_BA = each.with_slope(batch.states_BS, batch.actions_BA)
    for source in (once, each):
        torch.testing.assert_close(source.of_rows(rows), q_B)
        torch.testing.assert_close(source.with_slope_of_rows(rows), (q_B, slope_BA))
        if target == "contrastive":
            pick, states_BS = torch.tensor([2, 0]), data.take(state.support_index_M[[2, 0]]).states_BS
            exact = [each.value(states_BS, state.support_MKA[pick, k]) for k in range(config.num_samples)]
            torch.testing.assert_close(source.of_support(pick), torch.stack(exact, dim=1))
    with torch.no_grad():
        judge.q.q_1[-1].bias.sub_(5.0)
    torch.testing.assert_close(once.of_rows(rows), q_B)  # the critic is taken to rest while its step stands
    judge.step += 1
    torch.testing.assert_close(once.of_rows(rows), each.of_rows(rows))
    assert not torch.allclose(each.of_rows(rows), q_B)
