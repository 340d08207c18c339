"""The gradients that stages write down, against autograd through the papers' losses, in double precision."""

import math

import pytest
import torch
from torch.nn import functional as F

from aepo.bench.naive import plain
from aepo.data.transitions import Batch
from aepo.stages import actor, actor_critic, critic
from tests.test_energy import random_transitions

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


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_slope_of_the_expectile_loss(expectile):
    u = torch.tensor([-2.0, -1e-9, 1e-9, 0.3, math.pi], dtype=torch.float64, requires_grad=True)
    loss, slope = critic.expectile_loss(u, expectile), critic.expectile_slope(u, expectile)
    assert_same([slope.detach()], torch.autograd.grad(loss, [u]))
