"""IDQL: numbers of the authors' code (tests/golden/parity), the choice, its settings, and a known optimum."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from aepo import cli, pipeline, tasks, trust
from aepo import config as configs
from aepo.budgets import BUDGETS
from aepo.config import BehaviorConfig, CriticConfig
from aepo.data.transitions import Pairs, Spaces, Transitions
from aepo.diffusion.schedule import alpha_sigma
from aepo.networks import TwinQ
from aepo.policy import Policy
from aepo.presets import preset
from aepo.runs import run
from aepo.runs.stage_store import stage_keys
from aepo.samplers import best_of
from aepo.stages import behavior, critic
from tests import ROOT
from tests.training import CPU, bandit, share_of_optimum

SIZE = {"steps": 2**31 - 1, "batch_size": 16, "hidden_size": 8, "num_layers": 2, "learning_rate": 3e-4}
"""Of the fixture's networks; so many steps that the cosine is flat."""
CRITIC = CriticConfig(expectile=0.7, discount=0.99, target_rate=0.005, activation="relu", layer_norm=False, **SIZE)
BEHAVIOR = BehaviorConfig(ema_decay=0.999, **SIZE)
ONE, TEN = 1e-4, 1e-3
"""Relative differences from the authors' float32 that are allowed after one update and after ten."""


@pytest.fixture(scope="module")
def theirs():
    with np.load(ROOT / "tests" / "golden" / "parity" / "idql.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def data_of(theirs):
    """The fixture's ten batches, one behind the other, as transitions."""
    states, actions, rewards, masks, following = (
        theirs[f"batch/{name}"].flatten(0, 1)
        for name in ("observations", "actions", "rewards", "masks", "next_observations")
    )
    rows = torch.cat([states, actions, rewards[:, None], 1 - masks[:, None], following], dim=1)
    spaces = Spaces(
        state_mean_S=torch.zeros(3),
        state_scale_S=torch.ones(3),
        action_low_A=-torch.ones(2),
        action_high_A=torch.ones(2),
    )
    return Transitions(
        rows_ND=rows,
        shift_D=torch.zeros(rows.shape[1]),
        scale_D=torch.ones(rows.shape[1]),
        spaces=spaces,
        digest="parity",
        episode_ends_E=torch.tensor([len(rows)]),
    )


def layers_of(theirs, prefix, names, i=()):
    """Weights and biases of flax's layers in order, as torch has them; `i` is the critic's number of two."""
    layers = [[theirs[f"{prefix}/{name}/{part}"][i] for part in ("kernel", "bias")] for name in names]
    return [part for kernel, bias in layers for part in (kernel.T, bias)]


def v_of(theirs, prefix):
    return layers_of(theirs, prefix, ("MLP_0/Dense_0", "MLP_0/Dense_1", "OutputVDense"))


def q_of(theirs, prefix):
    names = [f"VmapStateActionValue_0/{name}" for name in ("MLP_0/Dense_0", "MLP_0/Dense_1", "Dense_0")]
    return [*layers_of(theirs, prefix, names, 0), *layers_of(theirs, prefix, names, 1)]


def noise_of(theirs, prefix):
    return layers_of(theirs, prefix, [f"MLP_0/Dense_{i}" for i in range(3)])


@torch.no_grad()
def put(net, weights):
    for own, other in zip(net.parameters(), weights, strict=True):
        own.copy_(other)


@torch.no_grad()
def check_moved_alike(net, before, after, tolerance):
    """Check every layer against theirs, by its largest weight, and the whole by the way that theirs went."""
    gaps, ways = [], []
    for own, start, end in zip(net.parameters(), before, after, strict=True):
        gaps.append(float((own - end).abs().max()))
        ways.append(float((end - start).abs().max()))
        assert gaps[-1] <= tolerance * float(end.abs().max())
    assert max(gaps) <= 0.01 * max(ways)


def critic_of(theirs, data):
    state = critic.start(CRITIC, data, torch.Generator().manual_seed(0))
    put(state.v, v_of(theirs, "value/0"))
    put(state.q, q_of(theirs, "critic/0"))
    put(state.target.net, q_of(theirs, "target_critic/0"))
    return state


def train_critic(state, data, num_steps, monkeypatch):
    for i in range(num_steps):
        monkeypatch.setattr(critic, "share", lambda _, i=i: torch.arange(16 * i, 16 * i + 16))
        critic.train_step(state, CRITIC, data)


def noise_state_of(theirs, data, num_times):
    state = behavior.start(BEHAVIOR, data, torch.Generator().manual_seed(0))
    put(state.net, noise_of(theirs, f"T{num_times}/score/0"))
    put(state.ema.net, noise_of(theirs, f"T{num_times}/target_score/0"))
    return state


def drawn(theirs, data, num_times, i):
    """Pairs, times and noise of the authors' step number i."""
    pairs = data.take_pairs(torch.arange(16 * i, 16 * i + 16))
    t_B = theirs[f"T{num_times}/t"][theirs[f"T{num_times}/index"][i].long()].float()
    return pairs, t_B, theirs[f"T{num_times}/noise"][i]


@torch.no_grad()
def test_the_critics_losses_are_those_of_the_authors_code(theirs):
    data = data_of(theirs)
    state, batch = critic_of(theirs, data), data.take(torch.arange(16))
    lowest_B, v_B = state.target.net.lowest(batch.states_BS, batch.actions_BA), state.v(batch.states_BS)
    torch.testing.assert_close(lowest_B, theirs["lowest_target_q"], rtol=ONE, atol=1e-6)
    torch.testing.assert_close(v_B, theirs["v"], rtol=ONE, atol=1e-6)
    rows = torch.stack([critic.expectile_loss(u, 0.7) for u in (lowest_B - v_B)[:, None]])
    torch.testing.assert_close(rows, theirs["expectile_loss"], rtol=ONE, atol=1e-6)
    v_loss = critic.expectile_loss(lowest_B - v_B, 0.7)
    assert float(v_loss) == pytest.approx(float(theirs["value_loss"]), rel=ONE)
    ahead = critic.NStepReturn(batch.rewards_B, 0.99 * (1 - batch.terminals_B), batch.next_states_BS)
    loss, _ = critic.in_sample_loss(state.q, state.v, state.target.net, batch, ahead, CRITIC)
    of_both = 2 * float(theirs["critic_loss"])  # theirs is the mean of the two critics, ours their sum
    assert float(loss - v_loss) == pytest.approx(of_both, rel=ONE)


@pytest.mark.parametrize(("num_steps", "tolerance"), [(1, ONE), (10, TEN)])
def test_updates_of_v_q_and_the_targets_are_those_of_the_authors_code(num_steps, tolerance, theirs, monkeypatch):
    data = data_of(theirs)
    state = critic_of(theirs, data)
    train_critic(state, data, num_steps, monkeypatch)
    check_moved_alike(state.v, v_of(theirs, "value/0"), v_of(theirs, f"value/{num_steps}"), tolerance)
    check_moved_alike(state.q, q_of(theirs, "critic/0"), q_of(theirs, f"critic/{num_steps}"), tolerance)
    before, after = (q_of(theirs, f"target_critic/{step}") for step in (0, num_steps))
    check_moved_alike(state.target.net, before, after, tolerance)


def test_ten_updates_of_v_and_then_q_as_the_authors_take_them_are_near_ours(theirs, monkeypatch):
    """Their Q backs up over V behind its step: a difference that is kept, and stays small."""
    data = data_of(theirs)
    state = critic_of(theirs, data)
    train_critic(state, data, 10, monkeypatch)
    for net, wanted in (
        (state.v, v_of(theirs, "value/by-turns")),
        (state.q, q_of(theirs, "critic/by-turns")),
        (state.target.net, q_of(theirs, "target_critic/by-turns")),
    ):
        for own, other in zip(net.parameters(), wanted, strict=True):
            assert float((own.detach() - other).abs().max()) <= 0.02 * float(other.abs().max())


@torch.no_grad()
def test_the_diffusion_loss_is_that_of_the_authors_code_times_its_weight(theirs):
    """Theirs sums over action dimensions, all times alike; ours is per dimension and over alpha_t^2."""
    data = data_of(theirs)
    state = noise_state_of(theirs, data, 5)
    pairs, t_B, eps_BA = drawn(theirs, data, 5, 0)
    alpha_B, _ = alpha_sigma(t_B)
    assert len(t_B.unique()) == 5
    alike_B = theirs["T5/alpha_hats"][theirs["T5/index"][0].long()]
    torch.testing.assert_close(alpha_B.square(), alike_B, rtol=ONE, atol=1e-6)
    rows = []
    for i in range(16):
        row = Pairs(*(part[i : i + 1] for part in pairs))
        own, _ = behavior.loss(state.net, nn.Identity(), row, t_B[i : i + 1], eps_BA[i : i + 1])
        rows.append(2 * float(alpha_B[i]) ** 2 * float(own))
    assert np.mean(rows) == pytest.approx(float(theirs["T5/actor_loss"]), rel=ONE)


@pytest.mark.parametrize(("num_steps", "tolerance"), [(1, ONE), (10, TEN)])
def test_updates_of_the_noise_net_at_one_time_are_those_of_the_authors_code(num_steps, tolerance, theirs, monkeypatch):
    """At one time the weights of the two losses differ by a factor, which Adam takes out."""
    data = data_of(theirs)
    state = noise_state_of(theirs, data, 1)
    for i in range(num_steps):
        values = iter(drawn(theirs, data, 1, i))
        monkeypatch.setattr(behavior, "share", lambda _, values=values: next(values))
        behavior.train_step(state, BEHAVIOR, data)
    for net, name in ((state.net, "score"), (state.ema.net, "target_score")):
        before, after = (noise_of(theirs, f"T1/{name}/{step}") for step in (0, num_steps))
        check_moved_alike(net, before, after, tolerance)


@torch.no_grad()
def test_of_the_authors_candidates_the_one_that_they_take_is_taken(theirs):
    q = TwinQ(3, 2, CRITIC)
    put(q, q_of(theirs, "choice/target_critic"))
    taken = best_of(q, theirs["choice/states"], theirs["choice/candidates"])
    assert torch.equal(taken, theirs["choice/actions"])


# -- the method --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_best_of_the_clones_by_the_target_critics_is_taken(tiny_config, transitions):
    config = tiny_config(method="idql", sampling__num_candidates=7, critic__learning_rate=0.03)
    *_, last = pipeline.train(config, transitions, device=CPU)
    policy = Policy.from_state(config, last.states, transitions)
    states = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    taken = policy.sampler.sample(states, torch.Generator().manual_seed(1))
    clone = policy.with_sampling(policy.sampling.cloning).sampler
    candidates = clone.sample(states.repeat_interleave(7, 0), torch.Generator().manual_seed(1)).view(40, 7, 2)
    chosen = {}
    for name, q in (("target", last.states["critic"].target.net), ("online", last.states["critic"].q)):
        values = [[float(q(s[None], a[None]).min()) for a in row] for s, row in zip(states, candidates, strict=True)]
        chosen[name] = torch.stack([row[int(np.argmax(own))] for own, row in zip(values, candidates, strict=True)])
    torch.testing.assert_close(taken, chosen["target"])
    assert not torch.equal(chosen["target"], chosen["online"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling__guidance_scale": 1.0}, "this method has no guidance"),
        ({"sampling__beta": 2.0}, "this method has no guidance"),
        ({"sampling__nats": 0.5}, "this method has no guidance"),
        ({"sampling__num_candidates": 1}, "num_candidates must be at least 2"),
        ({"sampling__temperature": 0.0}, "num_candidates must be 1"),
        ({"evaluation__grid_beta": "1", "evaluation__grid_guidance_scale": "1"}, "so no heat map; leave it out"),
    ],
)
def test_what_it_has_not_is_refused(settings, message, tiny_config, transitions):
    with pytest.raises(configs.ConfigError, match=message):
        tiny_config(method="idql", **settings)


def test_a_trained_policy_takes_other_numbers_of_candidates_and_no_guidance(tiny_config, transitions):
    config = tiny_config(method="idql")
    policy = Policy.from_state(config, pipeline.start(config, transitions, CPU), transitions)
    states = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def value(num):
        several = policy.with_sampling(dataclasses.replace(policy.sampling, num_candidates=num)).sampler
        return several.q.lowest(states, several.sample(states, torch.Generator().manual_seed(1))).mean()

    assert value(2) < value(16) < value(256)
    with pytest.raises(configs.ConfigError, match="this method has no guidance"):
        policy.with_sampling(dataclasses.replace(policy.sampling, guidance_scale=1.0))


@pytest.mark.parametrize("task", ["hopper-medium-v2", "maze2d-umaze-v1", "antmaze-umaze-v2"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_it_shares_the_first_two_stages_with_aepo(task, budget):
    best, idql = (preset(f"{method}-{budget}", tasks.find(task), 0) for method in ("best", "idql"))
    best, idql = (stage_keys(config, "digest") for config in (best, idql))
    assert idql.items() == {key: value for key, value in best.items() if key[0] != "energy"}.items()


def test_a_run_has_its_own_score_and_the_clones_and_chooses_no_guidance(make_dataset, tiny_config, tmp_path):
    config = tiny_config(make_dataset(), method="idql", evaluation__select_episodes=8, evaluation__num_curve_points=1)
    result = run.execute(config, tmp_path, run.FolderStore(tmp_path), device=CPU)
    assert [row.method for row in result.evaluations] == ["idql", "diffusion-bc"]
    assert [row.selected_episodes for row in result.evaluations] == [0, 0]
    assert [(row.beta, row.guidance_scale) for row in result.evaluations] == [(None, None), (None, 0.0)]
    assert [point.method for point in result.curve] == ["diffusion-bc", "diffusion-bc", "", ""]
    assert trust.GAIN not in {each.name for each in result.diagnostics}
    assert "guided" not in trust.line(result)
    assert "cloned" in trust.line(result)
    assert cli.run(["evaluate", str(tmp_path), "--num-episodes", "1", "--num-steps", "2", "3"]) == 0
    assert cli.run(["evaluate", str(tmp_path), "--num-episodes", "1", "--figure", str(tmp_path / "map.png")]) == 2


def test_it_finds_the_best_action():
    base = preset("idql-smoke", tasks.for_dataset("bandit"), 0)
    size = {"steps": 800, "batch_size": 256, "hidden_size": 64, "num_layers": 2, "learning_rate": 2e-3}
    settings = {f"{stage}.{key}": value for stage in base.stages for key, value in size.items()}
    config = configs.with_overrides(base, settings | {"critic.target_rate": 0.05})
    data = bandit()
    *_, last = pipeline.train(config, data, device=CPU)
    assert share_of_optimum(Policy.from_state(config, last.states, data)) > 0.8
