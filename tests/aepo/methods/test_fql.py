"""FQL: parity with the authors' code by numbers (tests/golden/parity), its settings, and a known optimum."""

import dataclasses

import numpy as np
import pytest
import torch

from aepo import config as configs
from aepo import pipeline, tasks
from aepo.budgets import BUDGETS
from aepo.data.transitions import Batch
from aepo.methods import fql
from aepo.policy import Policy
from aepo.presets import preset
from tests import ROOT
from tests.examples import random_transitions
from tests.training import bandit, share_of_optimum

CPU = torch.device("cpu")
CASES = {
    "mean": {"next_q": "mean", "normalize_q": False, "alpha": 10.0, "discount": 0.99, "target_rate": 0.005},
    "min": {"next_q": "min", "normalize_q": True, "alpha": 0.3, "discount": 0.9, "target_rate": 0.1},
}
"""Settings of the fixture's cases, as its README has them; ten steps of so many leave the rate as it is."""
SIZE = {"steps": 10**9, "batch_size": 8, "hidden_size": 16, "num_layers": 2, "learning_rate": 3e-4}
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-3)}
"""Largest relative difference of losses, targets and one update; and after ten updates."""


@pytest.fixture(scope="module")
def theirs():
    """The authors' numbers by name."""
    with np.load(ROOT / "tests" / "golden" / "parity" / "fql.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def leaves(prefix, name, number=None):
    """The authors' names of a network's weights, in the order of ours; `number` is that of a critic."""
    parts = {"critic": "value_net", "target_critic": "value_net"}
    linear = [(f"Dense_{i}/{kind}", number) for i in range(3) for kind in ("kernel", "bias")]
    norm = [(f"LayerNorm_{i}/{kind}", number) for i in range(2) for kind in ("scale", "bias")]
    found = linear[:4] + norm * (number is not None) + linear[4:]
    return [(f"{prefix}/{name}/{parts.get(name, 'mlp')}/{leaf}", which) for leaf, which in found]


NETS = [
    *((f"q.q_{i + 1}", "critic", i) for i in range(2)),
    ("flow", "actor_bc_flow", None),
    ("policy", "actor_onestep_flow", None),
    *((f"q_target.net.q_{i + 1}", "target_critic", i) for i in range(2)),
]
"""Our networks, the authors' names of them, and the number of a critic."""


def net_of(state, path):
    for name in path.split("."):
        state = getattr(state, name)
    return state


def weights_of(theirs, prefix, name, number):
    tensors = [theirs[leaf] if which is None else theirs[leaf][which] for leaf, which in leaves(prefix, name, number)]
    return [tensor.t() if tensor.ndim == 2 else tensor for tensor in tensors]  # flax multiplies from the other side


@pytest.fixture(params=TOLERANCES, ids=["float64", "float32"])
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def loaded(theirs, dtype, case):
    """Our stage with the authors' initial weights, and the batches and draws of their ten updates."""
    config = fql.FQLStage(**SIZE, **CASES[case])
    data = random_transitions(state_dim=5, action_dim=3)
    state = fql.start(config, data, torch.Generator().manual_seed(0))
    state.optimizer._step = state.optimizer._step.float()  # which fused Adam asks for
    with torch.no_grad():
        for path, name, number in NETS:
            wanted = weights_of(theirs, "start", name.removeprefix("target_"), number)
            for own, their in zip(net_of(state, path).parameters(), wanted, strict=True):
                assert own.shape == their.shape
                own.copy_(their)
    names = "observations", "actions", "rewards", "masks", "next_observations"
    parts = [theirs[f"batch/{name}"].to(dtype) for name in names]
    parts[3] = 1.0 - parts[3]
    batches = [Batch(*(part[i] for part in parts)) for i in range(10)]
    draws = [theirs[f"draws/{name}"].to(dtype) for name in ("next_normal", "start", "t", "normal")]
    return config, state, batches, [fql.Draws(*(part[i] for part in draws)) for i in range(10)]


def difference(own, their):
    """The largest difference, relative to the largest number."""
    own, their = torch.as_tensor(own).double(), torch.as_tensor(their).double()
    assert own.shape == their.shape
    return float((own - their).abs().max() / their.abs().max())


def moves(state, theirs, prefix):
    """How far each of the authors' weights went, and the largest difference of ours from that, network by network."""
    found = {}
    for path, name, number in NETS:
        before = weights_of(theirs, "start", name.removeprefix("target_"), number)
        after = weights_of(theirs, prefix, name, number)
        ours = [weight.detach().double() for weight in net_of(state, path).parameters()]
        gap = max(float((own - new).abs().max()) for own, new in zip(ours, after, strict=True))
        found[path] = gap, max(float((new - old).abs().max()) for new, old in zip(after, before, strict=True))
    return found


def test_losses_targets_and_gradients_are_those_of_the_authors_code(loaded, theirs, dtype, case):
    config, state, (batch, *_), (draws, *_) = loaded
    allowed, _ = TOLERANCES[dtype]
    targets_B = fql.backup(state.q_target.net, state.policy, batch, draws.next_normal_BA, config)
    loss_q, _ = fql.q_loss(state.q, state.q_target.net, state.policy, batch, draws.next_normal_BA, config)
    loss_v, _ = fql.flow_loss(state.flow, batch, draws.start_BA, draws.t_B)
    loss_mu, of_mu = fql.policy_loss(state.policy, state.flow, state.q, batch, draws.normal_BA, config)
    metrics = of_mu()
    found = {
        "losses": difference(
            [float(loss_q.detach()), float(loss_v.detach()), float(metrics["distance"]), -float(metrics["value"])],
            theirs[f"{case}/losses"][0],
        ),
        "targets": difference(targets_B, theirs[f"{case}/target"]),
        "flow": difference(
            fql.follow(state.flow, batch.states_BS, draws.normal_BA, 10), theirs[f"{case}/flow_actions"]
        ),
    }
    for loss, part in ((loss_q, "q"), (loss_v, "flow"), (loss_mu, "policy")):
        own = torch.autograd.grad(loss, list(getattr(state, part).parameters()))
        their = [
            leaf
            for path, name, number in NETS
            if path.split(".")[0] == part
            for leaf in weights_of(theirs, f"{case}/gradient", name, number)
        ]
        pairs = [torch.cat([tensor.flatten().double() for tensor in each]) for each in (own, their)]
        found[f"gradient of {part}"] = difference(*pairs)
    assert max(found.values()) < allowed, found


def test_one_update_and_ten_end_where_the_authors_code_ends(loaded, theirs, dtype, case):
    config, state, batches, draws = loaded
    allowed, allowed_later = TOLERANCES[dtype]
    losses = []
    for number, (batch, drawn) in enumerate(zip(batches, draws, strict=True), 1):
        metrics = fql.update(state, config, batch, drawn)()
        losses.append([metrics["loss"], metrics["flow_loss"], metrics["distance"], -metrics["value"]])
        if number == 1:
            one = moves(state, theirs, f"{case}/one")
    ten = moves(state, theirs, f"{case}/ten")
    # of the weights, which are of size 1: in each update once
    rounding = torch.finfo(dtype).eps * 2
    for path, (gap, size) in one.items():
        assert gap <= allowed * size + rounding, path
    for path, (gap, size) in ten.items():
        assert size > 0
        assert gap <= allowed_later * size + 10 * rounding, path
    assert difference(torch.tensor(losses, dtype=torch.float64), theirs[f"{case}/losses"]) < allowed_later
    own = fql.act(state.policy, batches[0].states_BS, theirs["act/normal"].to(dtype))
    assert difference(own.detach(), theirs[f"{case}/act"]) < allowed_later


def test_the_fixture_reaches_what_is_clipped_and_what_ends(theirs):
    assert (theirs["batch/masks"] == 0).any()
    assert all((theirs[f"{case}/{name}"].abs() == 1).any() for case in CASES for name in ("act", "flow_actions"))


OTHER = {
    "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4, "discount": 0.5,
    "target_rate": 0.5, "alpha": 3.0, "normalize_q": False, "next_q": "min", "flow_steps": 3,
}  # fmt: skip


def test_every_setting_is_heeded(tiny_config, transitions):
    def weights(config):
        *_, last = pipeline.train(config, transitions, device=CPU)
        return torch.cat([weight.flatten() for weight in last.states["fql"].policy.parameters()])

    base = tiny_config(method="fql")
    assert set(OTHER) | {"precision"} == {field.name for field in dataclasses.fields(base.fql)}
    before = weights(base)
    for name, value in OTHER.items():
        after = weights(configs.with_overrides(base, {f"fql.{name}": value}))
        assert before.shape != after.shape or not torch.equal(before, after), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha", -1.0, r"alpha must be in \[0, inf\)"),
        ("flow_steps", 0, r"flow_steps must be in \[1, 1000\]"),
        ("next_q", "max", "mean.*min"),
    ],
)
def test_what_a_setting_cannot_be_is_refused(name, value, message, tiny_config):
    with pytest.raises(configs.ConfigError, match=message):
        tiny_config(method="fql", **{f"fql__{name}": value})


def test_the_papers_networks_and_settings_are_those_of_the_papers_budget():
    config = preset("fql-paper", tasks.find("antmaze-umaze-v2"), 0).fql
    assert (config.hidden_size, config.num_layers, config.batch_size, config.learning_rate) == (512, 4, 256, 3e-4)
    assert (config.alpha, config.normalize_q, config.next_q, config.discount) == (10.0, False, "mean", 0.99)
    config = preset("fql-paper", tasks.find("door-human-v1"), 0).fql
    assert (config.alpha, config.normalize_q, config.next_q, config.discount) == (30_000.0, False, "min", 0.99)
    budget = BUDGETS["paper"]
    assert config.steps == budget.behavior.steps + budget.critic.steps + budget.energy.steps


def test_an_action_is_a_draw_of_the_generator_that_is_given(tiny_config, transitions):
    config = tiny_config(method="fql")
    policy = Policy.from_state(config, pipeline.start(config, transitions, CPU), transitions)
    states = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def act(seed):
        return policy.act(states, torch.Generator().manual_seed(seed))

    assert np.array_equal(act(0), act(0))
    assert not np.array_equal(act(0), act(1))
    assert len(np.unique(policy.act(states[:1].expand(6, -1), torch.Generator().manual_seed(0)))) > 6


def test_it_finds_the_best_action():
    base = preset("fql-smoke", tasks.for_dataset("bandit"), 0)
    size = {"steps": 1500, "batch_size": 256, "hidden_size": 64, "num_layers": 2, "learning_rate": 2e-3}
    config = configs.with_overrides(base, {f"fql.{key}": value for key, value in (size | {"alpha": 0.1}).items()})
    data = bandit()
    *_, last = pipeline.train(config, data, device=CPU)
    assert share_of_optimum(Policy.from_state(config, last.states, data)) > 0.8
