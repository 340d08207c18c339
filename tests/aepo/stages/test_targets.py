"""An energy target is added in one place: one that is made here is trained, resumed, compared and removed."""

import copy
import json
import re

import pytest
import torch

from aepo import checkpoint, cli, config, parallel, pipeline, toy
from aepo.config import CRITIC_LEARNERS, ENERGY_TARGETS, EnergyTarget, with_overrides
from aepo.errors import ConfigError
from aepo.stages import energy, targets
from tests import ROOT
from tests.training import CPU, finish, same
from tune import estimate

SUPPORT = {"energy__target": "cumulants", "energy__num_samples": 4, "energy__num_support_states": 90}


def cumulants(net, x):
    """E = beta mean Q + beta^2 variance of Q / 2 over the support actions of a state, whatever a_t is."""
    q_SK = x.q_B.view(-1, x.num_actions)
    first_B, second_B = (
        part_S.repeat_interleave(x.num_actions) for part_S in (q_SK.mean(dim=1), 0.5 * q_SK.var(dim=1, correction=0))
    )
    f_1_B, f_2_B = net.outputs(x.a_t_BA, x.states_BS, x.t_B, x.beta_B).unbind(dim=1)
    loss = (f_1_B - first_B).square().mean() + (f_2_B - second_B).square().mean()
    return loss, lambda: {"loss": loss, "f_1": first_B.mean()}


@pytest.fixture
def registered():
    targets.register("cumulants", EnergyTarget(asks=("support",), takes_beta=False), cumulants)
    yield
    targets.unregister("cumulants")


@pytest.mark.usefixtures("registered")
def test_a_new_target_trains_resumes_bit_for_bit_and_learns(tiny_config, transitions):
    many = {"energy__steps": 400, "energy__learning_rate": 3e-3, "energy__batch_size": 64}
    cfg = tiny_config(**SUPPORT, **many)
    losses, saved = [], None
    for progress in pipeline.train(cfg, transitions, device=CPU):
        if (progress.stage, progress.step) == ("energy", 200):
            saved = copy.deepcopy(checkpoint.collect(progress.states))
        losses += [progress.metrics["energy/loss"]] if "energy/loss" in progress.metrics else []
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert same(finish(cfg, transitions), finish(cfg, transitions, saved))


@pytest.mark.usefixtures("registered")
def test_what_others_ask_of_a_new_target_is_answered(tiny_config):
    cfg = tiny_config(**SUPPORT, energy__batch_size=16)
    assert cfg.energy.support == (90, 4)
    assert {key for key in config.used_settings(cfg) if key.startswith("energy.")} >= {
        "energy.num_samples",
        "energy.num_support_states",
    }
    assert not {"energy.expansion", "energy.beta_min", "energy.beta_max"} & {*config.used_settings(cfg)}
    with pytest.raises(ConfigError, match="EnergyConfig: cumulants has no expansion; leave that setting out"):
        with_overrides(cfg, {"energy.expansion": "posterior_mean"})
    assert with_overrides(cfg, {"energy.target": "mse"}).energy.num_samples == 16  # gives way
    with_overrides(cfg, {"sampling.beta": 50.0})  # a polynomial in beta takes any
    parallel.check_batches(cfg, 4)  # four states of four actions
    with pytest.raises(ConfigError, match=r"energy.batch_size 16 cannot be shared by 8 workers"):
        parallel.check_batches(with_overrides(cfg, {"behavior.batch_size": 16, "critic.batch_size": 16}), 8)
    much = with_overrides(cfg, {"energy.num_support_states": 10**6})
    more = estimate.memory_gib(much, "inline") - estimate.memory_gib(
        with_overrides(cfg, {"energy.target": "mse"}), "inline"
    )
    assert more == pytest.approx(10**6 * 4 * estimate.MAX_ACTION_DIM * 4 / 2**30)
    light = estimate._light(much)
    assert light.energy.num_support_states == estimate.MEASURED_SUPPORT
    assert with_overrides(light, {"energy.num_support_states": 10**6}) == much


@pytest.mark.usefixtures("registered")
def test_a_new_target_is_compared_on_the_toy_sets(tmp_path, capsys):
    assert "cumulants" in toy.variants()
    argv = ["toy", "--sets", "moons", "--steps", "30", "--betas", "1", "--out", str(tmp_path), "--json"]
    assert cli.run([*argv, "--targets", "cumulants"]) == 0
    assert [row["target"] for row in json.loads(capsys.readouterr().out)] == ["none", "cumulants"]


def test_a_target_goes_as_it_came_and_takes_no_other_targets_name(tiny_config):
    before = dict(ENERGY_TARGETS)
    targets.register("cumulants", EnergyTarget(asks=("support",)), cumulants)
    for name in ("cumulants", "mse"):
        with pytest.raises(ConfigError, match=f"there is an energy target '{name}'"):
            targets.register(name, EnergyTarget(), cumulants)
    assert tiny_config(energy__target="cumulants").energy.target == "cumulants"
    targets.unregister("cumulants")
    assert before == ENERGY_TARGETS
    assert targets.LOSSES.keys() == before.keys()
    with pytest.raises(ConfigError, match=r"target must be one of analytic, .*contrastive, got 'cumulants'"):
        tiny_config(energy__target="cumulants")


@pytest.mark.parametrize("name", ENERGY_TARGETS)
def test_a_target_is_given_what_it_asks_for_and_nothing_else(name, tiny_config, transitions):
    """What is empty fails where it is used, so a loss that forgets to ask cannot train."""
    cfg = tiny_config(energy__target=name)
    state, steps = pipeline.prepare(cfg, transitions, CPU)
    for step in steps.values():
        step()
    stages = state if isinstance(state, dict) else vars(state)
    source = energy.q_source(stages["critic"], stages["energy"], cfg.energy, transitions)
    x = energy.draw(stages["energy"], cfg.energy, transitions, stages["behavior"], source)
    given = {field for field, value in x._asdict().items() if isinstance(value, torch.Tensor) and value.numel()}
    fields = {
        "data": {"q_B"},
        "posterior": {"mean_BA", "variance_BA"},
        "slope": {"q_B", "slope_BA", "point_BA"},
        "curvature": {"point_BA"},
        "draws": {"draws_KBA"},
        "support": {"q_B"},
    }
    asked = set().union(*(fields.get(ask, set()) for ask in ENERGY_TARGETS[name].asks))
    assert given == {"states_BS", "actions_BA", "t_B", "a_t_BA", "beta_B"} | asked
    assert x.num_actions == (cfg.energy.num_samples if "support" in ENERGY_TARGETS[name].asks else 1)


def test_who_asks_of_a_stage_names_neither_target_nor_learner():
    root = ROOT
    for path in ("aepo/parallel.py", "aepo/toy.py", "aepo/stages/energy.py", "tune/estimate.py"):
        text = (root / path).read_text()
        assert not [name for name in (*ENERGY_TARGETS, *CRITIC_LEARNERS) if f'"{name}"' in text], path
        assert not re.search(r"isinstance\(\w+, \w*Config", text), path
