"""The fast ways through a network against the plain ones, in double precision where rounding would blur them."""

import copy
import dataclasses
import io
import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aepo import kernels, networks, pipeline
from aepo.backward import CachedTimeNet, error_and_gradients, vjp, with_slope
from aepo.diffusion import sampler
from aepo.networks import Mlp, TimeNet
from aepo.policy import Policy
from aepo.stages import energy
from aepo.stages.optim import Adam, gradients_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _small_sizes_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MIN_PRODUCTS", 0)
        yield


BACKENDS = [backend for backend in get_args(kernels.Backend) if backend != "onednn" or kernels.has_onednn()]
"""All that this torch can multiply by, whatever this processor would take."""


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kernels.using(request.param):
        yield request.param


@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    wide=st.booleans(),
    seed=st.integers(0, 99),
    backend=st.sampled_from(BACKENDS),
)
def test_linear_and_its_gradients_are_those_of_double_precision(rows, inputs, outputs, wide, seed, backend):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    whole = torch.randn(rows, inputs + 5, requires_grad=True)
    x = whole[:, 2 : inputs + 2] if wide else whole[:, :inputs].contiguous()
    weights = torch.randn(outputs).expand(rows, outputs) if wide else torch.randn(rows, outputs)  # no row stride
    exact_layer = nn.Linear(inputs, outputs).double()
    exact_layer.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    exact_x = x.detach().double().requires_grad_()
    with kernels.using(backend):
        y, exact = kernels.linear(x, layer.weight, layer.bias), exact_layer(exact_x)
        found = torch.autograd.grad(y, [x, *layer.parameters()], weights)
    rounding = 1e-6 * (rows + inputs + outputs)  # of sums of so many numbers of size 1
    assert (y.double() - exact).abs().max() < rounding
    wanted = torch.autograd.grad(exact, [exact_x, *exact_layer.parameters()], weights.double())
    assert all((one.double() - other).abs().max() < rounding for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("rows", [1, 70])
def test_an_mlp_whose_weights_alone_learn_has_autograds_gradients(activation, norm, num_layers, rows):
    torch.manual_seed(0)
    mlp = Mlp([7] + [33] * num_layers + [2], norm=norm, activation=activation)
    exact = nn.Sequential(*copy.deepcopy(list(mlp))).double()
    x = torch.randn(rows, 7)
    weights = torch.randn(rows, 2)
    wanted = torch.autograd.grad(exact(x.double()), list(exact.parameters()), weights.double())
    with torch.no_grad():
        _, pull = vjp(copy.deepcopy(mlp).double(), x.double())
        found = pull(weights.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for backend in BACKENDS:
        with kernels.using(backend), torch.no_grad():
            single = vjp(mlp, x)[1](weights)
        for one, other in zip(single, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_a_vjp_changes_nothing_it_was_given_and_answers_once(activation):
    torch.manual_seed(0)
    mlp = Mlp([7, 33, 33, 2], norm=activation == "silu", activation=activation)
    x, weights = torch.randn(20, 7), torch.randn(20, 2)
    before = [tensor.clone() for tensor in (x, weights, *mlp.parameters())]
    output, pull = vjp(mlp, x)
    kept = output.clone()
    pull(weights)
    assert not output.requires_grad
    assert torch.equal(output, kept)
    assert all(map(torch.equal, before, (x, weights, *mlp.parameters())))
    with pytest.raises(AssertionError, match="call vjp again"):
        pull(weights)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_a_slope_leaves_the_weights_as_they_are(norm, rows, monkeypatch):
    """A last block of one row is as wide as the output's weights: they are not to be overwritten."""
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 16)
    mlp, x = Mlp([7, 33, 33, 1], norm=norm), torch.randn(rows, 7)
    before = [parameter.clone() for parameter in mlp.parameters()]
    slopes = [with_slope(mlp, x, slice(2, 5))[1] for _ in range(2)]
    error_and_gradients(mlp, x, torch.randn(rows, 1))
    assert torch.equal(*slopes)
    assert all(map(torch.equal, before, mlp.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_rows_go_through_in_blocks_as_in_one_piece(norm, monkeypatch):
    """Outputs, gradients and slopes of 70 rows in blocks of 16, the last one shorter."""
    torch.manual_seed(0)
    mlp, x, target = Mlp([7, 33, 33, 1], norm=norm), torch.randn(70, 7), torch.randn(70, 1)
    whole = [
        mlp(x),
        *with_slope(mlp, x, slice(2, 5)),
        error_and_gradients(mlp, x, target)[0],
        *error_and_gradients(mlp, x, target)[1],
    ]
    output, pull = vjp(mlp, x)
    by_hand = [output - target, *pull(2.0 / 70 * (output - target))]
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 16)
    assert [len(part) for (part,) in kernels.blocks(x)] == [16, 16, 16, 16, 6]
    blocks = [
        mlp(x),
        *with_slope(mlp, x, slice(2, 5)),
        error_and_gradients(mlp, x, target)[0],
        *error_and_gradients(mlp, x, target)[1],
    ]
    for one, other in zip([*whole, *whole[3:]], [*blocks, *by_hand], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_that_a_state_replaces_are_those_that_learn():
    one, other = Mlp([3, 8, 1], norm=True), Mlp([3, 8, 1], norm=True)
    one.load_state_dict(other.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(one(x), other(x))
    found = [torch.autograd.grad(mlp(x).sum(), list(mlp.parameters())) for mlp in (one, copy.deepcopy(one), other)]
    assert all(torch.equal(*pair) for same in zip(*found, strict=True) for pair in itertools.pairwise(same))


def test_adam_goes_on_as_torchs_after_storing_and_loading():
    torch.manual_seed(0)
    ours, theirs = Mlp([3, 8, 1], norm=True), Mlp([3, 8, 1], norm=True)
    theirs.load_state_dict(ours.state_dict())
    adam, plain = Adam(ours.parameters(), lr=1e-2, num_steps=50), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 50)
    for step in range(40):
        if step == 20:
            stored = io.BytesIO()
            torch.save(adam.state_dict(), stored)
            stored.seek(0)
            adam = Adam(ours.parameters(), lr=1.0, num_steps=9)
            adam.load_state_dict(torch.load(stored, weights_only=True))
        x = torch.randn(16, 3)
        adam.step_along(gradients_of(ours(x).square().mean(), ours.parameters()))
        plain.zero_grad()
        theirs(x).square().mean().backward()
        plain.step()
        schedule.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_a_gradient_of_the_slope_is_that_of_double_precision(rows):
    """What weighted_denoising asks for: the slope by the input, differentiated by the weights."""
    torch.manual_seed(0)
    net = networks.Mlp([5, 24, 24, 1])
    plain = nn.Sequential(*copy.deepcopy(list(net))).double()
    x = torch.randn(rows, 5)

    def second(model, start):
        start = start.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(start).sum(), start, create_graph=True)
        return torch.autograd.grad(
            slope.square().sum(), [p for name, p in model.named_parameters() if name != "4.bias"]
        )

    for found, exact in zip(second(net, x), second(plain, x.double()), strict=True):
        assert (found.double() - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rows", [1, 15, 16, 70])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_a_cached_network_says_what_the_network_says(rows, num_layers):
    torch.manual_seed(1)
    net = TimeNet(4, 3, 2, hidden_size=32, num_layers=num_layers)
    states, actions, times = torch.randn(rows, 4), torch.randn(rows, 3), torch.tensor([1.0, 0.4, 0.001])
    weights = torch.tensor([0.7, -2.0])
    with torch.no_grad():
        cached = CachedTimeNet(net, states, times)
    for step, t in enumerate(times):
        x = actions.clone().requires_grad_()
        output = net(x, states, t.expand(rows))
        (slope,) = torch.autograd.grad((output * weights).sum(), x)
        with torch.no_grad():
            assert torch.allclose(cached.output(actions, step), output, atol=1e-5)
            assert torch.allclose(cached.slope(actions, step, weights), slope, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("target", ["analytic", "log_expectation"])
@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_a_policy_samples_as_its_networks_put_together_by_the_equations(
    target, guidance_scale, tiny_config, transitions
):
    """Against `sampler.sample`, which takes eps_phi and grad E as they are written, by autograd [M4, M9]."""
    config = tiny_config(energy__target=target)
    *_, last = pipeline.train(config, transitions, device=CPU)
    sampling = dataclasses.replace(config.sampling, beta=2.0, guidance_scale=guidance_scale, temperature=1.0)
    policy = Policy.from_state(config, last.states, transitions).with_sampling(sampling)
    states = torch.randn(40, transitions.state_dim, generator=torch.Generator().manual_seed(0))
    start = torch.randn(40, transitions.action_dim, generator=torch.Generator().manual_seed(1))

    def guide(a_t_BA, t_B):
        return guidance_scale * energy.slope(policy.sampler.energy, a_t_BA, states, t_B, torch.full_like(t_B, 2.0))

    by_equations = sampler.sample(
        lambda a, t: policy.sampler.noise(a, states, t), guide, start, sampler.make_grid(config.sampling.num_steps)
    )
    assert torch.allclose(policy.sampler.sample(states, torch.Generator().manual_seed(1)), by_equations, atol=1e-4)


def test_adam_steps_as_torchs_on_gradients_of_any_layout():
    """The second-order gradient of a matrix product comes transposed; the parameter that the loss misses stays."""
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5), torch.randn(2)]
    fast = [nn.Parameter(tensor.clone()) for tensor in start]
    plain = [nn.Parameter(tensor.clone()) for tensor in start]
    one, other = Adam(fast, lr=0.1, num_steps=10), torch.optim.Adam(plain, lr=0.1)

    def loss(matrix, vector, unused):
        return (matrix.t() @ torch.arange(6.0).view(3, 2)).square().sum() + (matrix.t() ** 3).sum() + vector.sum() ** 2

    for position in range(10):
        one.step_along(gradients_of(loss(*fast), fast))
        other.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * position / 10))
        other.zero_grad()
        loss(*plain).backward()
        other.step()
        for found, exact in zip(fast, plain, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
