"""Each stage's loss against the paper's formula written again, and the gradients that training uses against autograd
through that loss, all in double precision.
"""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from aepo import backward
from aepo.bench.naive import plain
from aepo.config import ENERGY_TARGETS
from aepo.data.transitions import Batch, Pairs
from aepo.diffusion.schedule import add_noise, alpha_sigma, draw_times
from aepo.stages import actor, actor_critic, behavior, critic, energy, fast, targets
from tests.examples import random_transitions

NETWORKS = [("silu", True), ("silu", False), ("relu", True), ("relu", False)]


def in_double(batch):
    return Batch(*(part.double() for part in batch))


def of_autograd(loss, *nets):
    weights = [parameter for net in nets for parameter in net.parameters()]
    return torch.autograd.grad(loss, weights, materialize_grads=True)


def assert_same(found, exact):
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def assert_agree(written_out, loss, nets, *, key="loss"):
    """What training uses against autograd through the loss: gradients by these networks' parameters, and metrics."""
    (gradients, said), (value, metrics) = written_out, loss
    assert value.ndim == 0
    assert_same(gradients, of_autograd(value, *nets))
    found, exact = said(), metrics()
    assert found.keys() == exact.keys()
    assert exact[key] is value or exact[key] == value
    for name in found:
        assert not found[name].requires_grad
        assert found[name].item() == pytest.approx(exact[name].item(), rel=1e-6, abs=1e-9), name


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
@pytest.mark.parametrize("steps", [1, 3])
def test_expectile_regression(activation, layer_norm, expectile, steps, data, tiny_config):
    config = tiny_config(
        critic__activation=activation, critic__layer_norm=layer_norm, critic__expectile=expectile
    ).critic
    state = start_critic(config, data)
    batch = in_double(data.take(torch.arange(200)))
    table = critic.n_step_returns(data, steps, config.discount)
    after = data.take(table.last_N[:200]).next_states_BS.double()
    ahead = critic.NStepReturn(table.rewards_N[:200].double(), table.discounts_N[:200].double(), after)
    nets = [plain(net) for net in (state.q, state.v, state.target.net)]
    loss = critic.in_sample_loss(*nets, batch, ahead, config)
    found = fast.in_sample(state.q, state.v, state.target.net, batch, ahead, config)
    assert_agree(found, loss, nets[:2])

    q, v, target = nets
    with torch.no_grad():
        backup = ahead.rewards_B + ahead.discounts_B * v(ahead.states_BS)
        low = torch.minimum(*target(batch.states_BS, batch.actions_BA))
    u = low - v(batch.states_BS)
    v_loss = ((expectile - (u < 0).double()).abs() * u**2).mean()
    q_1, q_2 = q(batch.states_BS, batch.actions_BA)
    exact = v_loss + F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup)
    assert loss[0].item() == pytest.approx(exact.item())
    assert_same(found[0], of_autograd(exact, q, v))


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_the_softmax_backup(activation, layer_norm, data, tiny_config):
    config = tiny_config(
        critic__activation=activation, critic__layer_norm=layer_norm, critic__learner="softmax_in_support"
    ).critic
    state = start_critic(config, data)
    batch = in_double(data.take(torch.arange(200)))
    support = torch.rand(200, 3, 2).double()
    nets = [plain(net) for net in (state.q, state.v, state.target.net)]
    loss = critic.in_support_loss(*nets, batch, support, config)
    found = fast.in_support(state.q, state.v, state.target.net, batch, support, config)
    assert_agree(found, loss, nets[:2])

    q, v, target = nets
    with torch.no_grad():
        values = torch.stack([torch.minimum(*target(batch.next_states_BS, support[:, k])) for k in range(3)], dim=1)
        next_v = (torch.softmax(config.backup_beta * values, dim=1) * values).sum(dim=1)
        backup = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_v
    q_1, q_2 = q(batch.states_BS, batch.actions_BA)
    exact = F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup) + F.mse_loss(v(batch.next_states_BS), next_v)
    assert loss[0].item() == pytest.approx(exact.item())
    assert_same(found[0], of_autograd(exact, q, v))


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
    batch, advantage = in_double(data.take(torch.arange(200))), 2 * torch.randn(200).double()  # some weights are cut
    net = plain(state.net)
    loss = actor.loss(net, batch, advantage, config)
    found = fast.actor(state.net, batch, advantage, config)
    assert_agree(found, loss, [net])
    assert 0 < loss[1]()["clamped_share"] < 1

    policy = torch.distributions.Normal(net(batch.states_BS), net.log_std_A.clamp(-5.0, 2.0).exp())
    weight = (config.inverse_temperature * advantage).exp().clamp(max=100.0)
    exact = -(weight * policy.log_prob(batch.actions_BA).sum(dim=1)).mean()
    assert loss[0].item() == pytest.approx(exact.item())
    assert_same(found[0], of_autograd(exact, net))
    assert (found[0][0][0] == 0) == (not -5.0 <= log_std <= 2.0)


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_the_critics_of_actor_and_critic(activation, layer_norm, data, tiny_config):
    config = tiny_config(
        method="td3bc", actor_critic__activation=activation, actor_critic__layer_norm=layer_norm
    ).actor_critic
    torch.manual_seed(0)
    state = actor_critic.start(config, data, torch.Generator())
    for net in (state.q, state.q_target, state.actor_target):
        net.double()
    batch, normal = in_double(data.take(torch.arange(200))), torch.randn(200, 2).double()
    q, q_target, policy = (plain(net) for net in (state.q, state.q_target.net, state.actor_target.net))
    loss = actor_critic.q_loss(q, q_target, policy, batch, normal, config)
    found = fast.smoothed_q(state.q, state.q_target.net, state.actor_target.net, batch, normal, config)
    assert_agree(found, loss, [q])

    with torch.no_grad():
        noise = (config.policy_noise * normal).clamp(-config.noise_clip, config.noise_clip)
        action = (policy(batch.next_states_BS) + noise).clamp(-1, 1)
        next_q = torch.minimum(*q_target(batch.next_states_BS, action))
        backup = batch.rewards_B + config.discount * (1 - batch.terminals_B) * next_q
    q_1, q_2 = q(batch.states_BS, batch.actions_BA)
    exact = F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup)
    assert loss[0].item() == pytest.approx(exact.item())
    assert_same(found[0], of_autograd(exact, q))


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_the_actor_of_actor_and_critic(activation, layer_norm, data, tiny_config):
    config = tiny_config(
        method="td3bc", actor_critic__activation=activation, actor_critic__layer_norm=layer_norm
    ).actor_critic
    torch.manual_seed(0)
    state = actor_critic.start(config, data, torch.Generator())
    for net in (state.q, state.actor):
        net.double()
    batch = in_double(data.take(torch.arange(200)))
    q, policy = plain(state.q), plain(state.actor)
    loss = actor_critic.pi_loss(policy, q, batch, config)
    found = fast.policy(state.actor, state.q, batch, config)
    assert_agree(found, loss, [policy], key="actor_loss")

    actions = policy(batch.states_BS)
    value = q(batch.states_BS, actions)[0]
    weight = config.q_weight / value.detach().abs().mean()
    exact = F.mse_loss(actions, batch.actions_BA) - weight * value.mean()
    assert loss[0].item() == pytest.approx(exact.item())
    assert_same(found[0], of_autograd(exact, policy))


@pytest.mark.parametrize(("activation", "layer_norm"), NETWORKS)
def test_the_lower_critic_and_its_slope(activation, layer_norm, data, tiny_config):
    config = tiny_config(critic__activation=activation, critic__layer_norm=layer_norm).critic
    state = start_critic(config, data)
    batch = in_double(data.take(torch.arange(200)))
    with torch.no_grad():
        q_B, slope_BA = backward.lowest_with_slope(state.q, batch.states_BS, batch.actions_BA)
    actions = batch.actions_BA.clone().requires_grad_()
    exact = plain(state.q)(batch.states_BS, actions).amin(dim=0)
    assert_same([q_B, slope_BA], [exact.detach(), *torch.autograd.grad(exact.sum(), [actions])])


@pytest.mark.parametrize("variance", ["time", "learned"])
def test_the_noise_net(variance, data, tiny_config):
    """Through eps_phi and its squared error over alpha_t^2, as [M5] has it."""
    config = tiny_config(behavior__variance=variance).behavior
    torch.manual_seed(0)
    state = behavior.start(config, data, torch.Generator())
    state.net.double()
    state.variance.double()
    batch = Pairs(*in_double(data.take(torch.arange(200)))[:2])
    generator = torch.Generator().manual_seed(5)
    t_B, eps_BA = draw_times(200, generator).double(), torch.randn(200, 2, generator=generator).double()
    twins = [plain(state.net), plain(state.variance)]
    loss = behavior.loss(*twins, batch, t_B, eps_BA)
    found = fast.behavior(state.net, state.variance, batch, t_B, eps_BA)
    assert_agree(found, loss, twins)

    a_t_BA = add_noise(batch.actions_BA, t_B, eps_BA)
    predicted_BA = twins[0](a_t_BA, batch.states_BS, t_B)
    alpha_B, sigma_B = (part[:, None] for part in alpha_sigma(t_B))
    exact = ((predicted_BA - eps_BA) / alpha_B).square().mean()
    if variance == "learned":
        mean_BA = ((a_t_BA - sigma_B * predicted_BA.detach()) / alpha_B).clamp(-1, 1)
        squares_BA = (batch.actions_BA - mean_BA).square()
        exact = exact + F.mse_loss(twins[1](a_t_BA, batch.states_BS, t_B), squares_BA)
    assert loss[0].item() == pytest.approx(exact.item())
    assert_same(found[0], of_autograd(exact, *twins))


@pytest.mark.parametrize("variance", ["time", "learned"])
@pytest.mark.parametrize("expansion", ["posterior_mean", "data_action"])
@pytest.mark.parametrize("target", ENERGY_TARGETS)
def test_every_energy_target(target, expansion, variance, data, tiny_config):
    """On a batch as training draws it, in double precision from there on."""
    own = {"energy__expansion": expansion} if "expansion" in ENERGY_TARGETS[target].settings else {}
    config = tiny_config(energy__target=target, behavior__variance=variance, energy__batch_size=64, **own)
    torch.manual_seed(0)
    model = behavior.start(config.behavior, data, torch.Generator().manual_seed(4))
    judge = critic.start(config.critic, data, torch.Generator().manual_seed(5))
    state = energy.start(config.energy, data, torch.Generator().manual_seed(3))
    energy.measure(state, config.energy, data, model)
    state.q_scale = critic.advantage_scale(judge, data) / 10  # some exponents reach their limit
    source = energy.q_source(judge, state, config.energy, data)
    x = energy.draw(state, config.energy, data, model, source)
    state.net.double()
    q, v = copy.deepcopy(judge.q).double(), copy.deepcopy(judge.v).double()

    def value(states_BS, actions_BA):
        return (q.lowest(states_BS, actions_BA) - v(states_BS)) / state.q_scale.double()

    x = x._replace(
        value=value, **{key: part.double() for key, part in x._asdict().items() if isinstance(part, torch.Tensor)}
    )
    net = plain(state.net)
    assert_agree(fast.energy(state.net, targets.LOSSES[target], x), energy.loss(net, target, x), [net])
    if target == "log_expectation":
        assert 0 < (x.beta_B * x.q_B > targets.MAX_EXPONENT).sum() < len(x.q_B)


def test_every_target_has_a_loss_and_all_but_one_a_gradient_written_out():
    assert targets.LOSSES.keys() == ENERGY_TARGETS.keys()
    assert {*targets.LOSSES.values()} - {*fast.SLOPES} == {targets.weighted_denoising}


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_slope_of_the_expectile_loss(expectile):
    u = torch.tensor([-2.0, -1e-9, 1e-9, 0.3, math.pi], dtype=torch.float64, requires_grad=True)
    loss, slope = critic.expectile_loss(u, expectile), fast.expectile_slope(u, expectile)
    assert fast.expectile_loss(u, expectile).item() == pytest.approx(loss.item())
    assert_same([slope.detach()], torch.autograd.grad(loss, [u]))
