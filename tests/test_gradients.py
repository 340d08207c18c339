"""The gradients that stages write down, against autograd through the papers' losses, in double precision."""

import math

import pytest
import torch
from torch.nn import functional as F

from aepo.bench.naive import plain
from aepo.data.transitions import Batch
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.stages import actor, actor_critic, behavior, critic, energy, targets
from tests.conftest import random_transitions

NETWORKS = [("silu", True), ("silu", False), ("relu", True), ("relu", False)]


def in_double(batch):
    return Batch(*(part.double() for part in batch))


def of_autograd(loss, *nets):
    return torch.autograd.grad(loss, [parameter for net in nets for parameter in net.parameters()])


def assert_same(found, exact):
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.fixture
def data():
    return random_transitions(300)


def start_critic(config, data):
    torch.manual_seed(0)
    state = critic.start(config, data, torch.Generator())
    for net in (state.q, state.v, state.target):
        net.double()
    with torch.no_grad():
        for parameter in state.target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return state


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_expectile_regression(activation, layer_norm, expectile, data, tiny_config):
    config = tiny_config(
        critic__activation=activation, critic__layer_norm=layer_norm, critic__expectile=expectile
    ).critic
    state = start_critic(config, data)
    batch = in_double(data.take(torch.arange(200)))
    ahead = critic.Ahead(batch.rewards_B, config.discount * (1 - batch.terminals_B), batch.next_states_BS)
    found, metrics = critic.gradients(state, config, batch, ahead)

    q, v, target = plain(state.q), plain(state.v), plain(state.target)
    with torch.no_grad():
        backup = batch.rewards_B + config.discount * (1 - batch.terminals_B) * v(batch.next_states_BS)
        low = torch.minimum(*target(batch.states_BS, batch.actions_BA))
    u = low - v(batch.states_BS)
    v_loss = ((expectile - (u < 0).double()).abs() * u**2).mean()
    q_1, q_2 = q(batch.states_BS, batch.actions_BA)
    q_loss = F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup)
    assert metrics()["loss"].item() == pytest.approx((v_loss + q_loss).item())
    assert_same(found, of_autograd(v_loss + q_loss, q, v))


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_the_softmax_backup(activation, layer_norm, data, tiny_config):
    config = tiny_config(
        critic__activation=activation, critic__layer_norm=layer_norm, critic__learner="softmax_in_support"
    ).critic
    state = start_critic(config, data)
    batch = in_double(data.take(torch.arange(200)))
    support = torch.rand(200, 3, 2).double()
    found, metrics = critic.softmax_gradients(state, config, batch, support)

    q, v, target = plain(state.q), plain(state.v), plain(state.target)
    with torch.no_grad():
        values = torch.stack([torch.minimum(*target(batch.next_states_BS, support[:, k])) for k in range(3)], dim=1)
        next_v = (torch.softmax(config.backup_beta * values, dim=1) * values).sum(dim=1)
        backup = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_v
    q_1, q_2 = q(batch.states_BS, batch.actions_BA)
    loss = F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup) + F.mse_loss(v(batch.next_states_BS), next_v)
    assert metrics()["loss"].item() == pytest.approx(loss.item())
    assert_same(found, of_autograd(loss, q, v))


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("log_std", [-6.0, -5.0, 0.3, 2.5])
def test_the_weighted_likelihood(activation, log_std, data, tiny_config):
    """Outside its limits the deviation does not move."""
    config = tiny_config(method="iql", actor__activation=activation).actor
    torch.manual_seed(0)
    state = actor.start(config, data, torch.Generator())
    state.net.double()
    with torch.no_grad():
        state.net.log_std_A.copy_(torch.tensor([log_std, 0.1]))
    batch, advantage = in_double(data.take(torch.arange(200))), torch.randn(200).double()
    found, metrics = actor.gradients(state, config, batch, advantage)

    net = plain(state.net)
    policy = torch.distributions.Normal(net(batch.states_BS), net.log_std_A.clamp(-5.0, 2.0).exp())
    weight = (config.inverse_temperature * advantage).exp().clamp(max=100.0)
    loss = -(weight * policy.log_prob(batch.actions_BA).sum(dim=1)).mean()
    assert metrics()["loss"].item() == pytest.approx(loss.item())
    assert_same(found, of_autograd(loss, net))
    assert (found[0][0] == 0) == (not -5.0 <= log_std <= 2.0)


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_td3bcs_critics(activation, layer_norm, data, tiny_config):
    config = tiny_config(
        method="td3bc", actor_critic__activation=activation, actor_critic__layer_norm=layer_norm
    ).actor_critic
    torch.manual_seed(0)
    state = actor_critic.start(config, data, torch.Generator())
    for net in (state.q, state.q_target, state.actor_target):
        net.double()
    batch, normal = in_double(data.take(torch.arange(200))), torch.randn(200, 2).double()
    found, metrics = actor_critic.q_gradients(state, config, batch, normal)

    q, q_target, policy = plain(state.q), plain(state.q_target), plain(state.actor_target)
    with torch.no_grad():
        noise = (config.policy_noise * normal).clamp(-config.noise_clip, config.noise_clip)
        action = (policy(batch.next_states_BS) + noise).clamp(-1, 1)
        next_q = torch.minimum(*q_target(batch.next_states_BS, action))
        backup = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_q
    q_1, q_2 = q(batch.states_BS, batch.actions_BA)
    loss = F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup)
    assert metrics()["loss"].item() == pytest.approx(loss.item())
    assert_same(found, of_autograd(loss, q))


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_td3bcs_actor(activation, layer_norm, data, tiny_config):
    config = tiny_config(
        method="td3bc", actor_critic__activation=activation, actor_critic__layer_norm=layer_norm
    ).actor_critic
    torch.manual_seed(0)
    state = actor_critic.start(config, data, torch.Generator())
    for net in (state.q, state.actor):
        net.double()
    batch = in_double(data.take(torch.arange(200)))
    found, metrics = actor_critic.actor_gradients(state, config, batch)

    q, policy = plain(state.q), plain(state.actor)
    actions = policy(batch.states_BS)
    value = q(batch.states_BS, actions)[0]
    weight = config.q_weight / value.detach().abs().mean()
    loss = F.mse_loss(actions, batch.actions_BA) - weight * value.mean()
    assert metrics()["actor_loss"].item() == pytest.approx(loss.item())
    assert_same(found, of_autograd(loss, policy))


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_the_lower_critic_and_its_slope(activation, layer_norm, data, tiny_config):
    config = tiny_config(critic__activation=activation, critic__layer_norm=layer_norm).critic
    state = start_critic(config, data)
    batch = in_double(data.take(torch.arange(200)))
    with torch.no_grad():
        q_B, slope_BA = state.q.lowest_with_slope(batch.states_BS, batch.actions_BA)
    actions = batch.actions_BA.clone().requires_grad_()
    exact = plain(state.q)(batch.states_BS, actions).amin(dim=0)
    assert_same([q_B, slope_BA], [exact.detach(), *torch.autograd.grad(exact.sum(), [actions])])


@pytest.mark.parametrize("variance", ["time", "learned"])
def test_the_noise_net(variance, data, tiny_config):
    """Through eps_phi and its squared error over alpha_t^2, as [M5] has it."""
    config = tiny_config(behavior__variance=variance).behavior
    torch.manual_seed(0)
    state = behavior.start(config, data, torch.Generator().manual_seed(5))
    nets = [state.net, state.variance] if variance == "learned" else [state.net]
    for net in nets:
        net.double()
    batch = in_double(data.take(torch.arange(200)))
    found, metrics = behavior.gradients(state, batch)

    generator = torch.Generator().manual_seed(5)
    t_B = draw_times(200, generator)
    eps_BA = torch.randn(200, 2, generator=generator).double()
    t_B = t_B.double()
    a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
    twins = [plain(net) for net in nets]
    predicted_BA = twins[0](a_t_BA, batch.states_BS, t_B)
    alpha_B, sigma_B = (part[:, None] for part in alpha_sigma(t_B))
    loss = ((predicted_BA - eps_BA) / alpha_B).square().mean()
    if variance == "learned":
        mean_BA = ((a_t_BA - sigma_B * predicted_BA.detach()) / alpha_B).clamp(-1, 1)
        squares_BA = (batch.actions_BA - mean_BA).square()
        loss = loss + F.mse_loss(twins[1](a_t_BA, batch.states_BS, t_B), squares_BA)
    assert metrics()["loss"].item() == pytest.approx(loss.item(), rel=1e-4)  # t was drawn in single precision
    for one, other in zip(found, of_autograd(loss, *twins), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_the_targets_say_of_the_outputs():
    """The gradient by the outputs is that of the loss among the metrics."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    beta_B, q_B = normal(50).exp(), 3 * normal(50)  # some gaps above the largest exponent, some below
    nothing_B1 = torch.zeros(50, 1).double()
    x = targets.Noised(torch.arange(50), nothing_B1, nothing_B1, beta_B, nothing_B1, beta_B, q_B)
    origin = targets.Posterior(normal(50, 2), normal(50, 2).square(), normal(50, 2))

    def value(states_BS, actions_BA):
        return actions_BA.sin().sum(dim=1)

    with_slope = targets.by_autograd(value)
    draws_KBA = normal(5, 50, 2)
    cases = {
        "analytic": (2, lambda out: targets.analytic(out, *with_slope(nothing_B1, origin.point_BA), origin)),
        "mse": (2, lambda out: targets.mse(out, x)),
        "second order": (1, lambda out: targets.analytic_second_order(out, value, x, origin)),
        "monte carlo": (1, lambda out: targets.monte_carlo(out, value, x, origin, draws_KBA)),
        "log expectation": (1, lambda out: targets.log_expectation(out, x)),
        "contrastive": (4, lambda out: targets.contrastive(out, 3 * q_B[:, None].sin() * out.detach(), beta_B)),
    }
    for name, (num_outputs, target) in cases.items():
        outputs = normal(50, num_outputs).requires_grad_()
        slope, metrics = target(outputs)
        (exact,) = torch.autograd.grad(metrics()["loss"], outputs)
        torch.testing.assert_close(slope.detach(), exact, rtol=1e-9, atol=1e-12, msg=name)
        assert slope.shape == outputs.shape
    assert 0 < (beta_B * q_B > targets.MAX_EXPONENT).sum() < 50


@pytest.mark.parametrize("target", ["log_expectation", "analytic", "contrastive", "weighted_denoising", "mse"])
def test_the_energys_gradients_are_those_of_the_loss_by_its_parameters(target, data, tiny_config):
    """One step of ours against autograd through the network and the loss among the metrics."""
    method = {"contrastive": "qgpo", "analytic": "analytic"}.get(target, "best")
    config = tiny_config(method=method, energy__target=target).energy
    torch.manual_seed(0)
    state = energy.start(config, data, torch.Generator().manual_seed(3))
    model = behavior.start(tiny_config().behavior, data, torch.Generator().manual_seed(4))
    judge = critic.start(tiny_config().critic, data, torch.Generator().manual_seed(5))
    energy.measure(state, config, data, model)
    source = energy.q_source(judge, state, config, data)
    before = state.generator.get_state()
    found, _ = energy.gradients(state, config, data, model, source)
    assert all(one.is_contiguous() for one in found)
    step = 3e-3
    for index, (name, parameter) in enumerate(state.net.named_parameters()):
        direction = found[index] / found[index].norm()
        losses = []
        for side in (step, -step):
            with torch.no_grad():
                parameter.add_(direction, alpha=side)
            state.generator.set_state(before)
            losses.append(energy.gradients(state, config, data, model, source)[1]()["loss"].item())
            with torch.no_grad():
                parameter.add_(direction, alpha=-side)
        numeric = (losses[0] - losses[1]) / (2 * step)
        assert numeric == pytest.approx(found[index].norm().item(), rel=0.03, abs=2e-3), name


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_slope_of_the_expectile_loss(expectile):
    u = torch.tensor([-2.0, -1e-9, 1e-9, 0.3, math.pi], dtype=torch.float64, requires_grad=True)
    loss, slope = critic.expectile_loss(u, expectile), critic.expectile_slope(u, expectile)
    assert_same([slope.detach()], torch.autograd.grad(loss, [u]))
