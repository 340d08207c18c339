"""`aepo bench`: the baseline does our work, and every part gives its rows. No time is asserted."""

import json

import pytest
import torch

from aepo import cli
from aepo.bench import measure, naive
from aepo.stages import actor, behavior, critic, energy


@pytest.fixture
def parts():
    aepo, iql = measure.configs_of("smoke")
    data = measure.random_data(2500)
    state, _ = measure.pipeline.prepare(aepo, data, measure.CPU)
    iql_state, _ = measure.pipeline.prepare(iql, data, measure.CPU)
    return aepo, iql, state, iql_state, data


def test_random_data_are_whole_episodes():
    data = measure.random_data(2500)
    assert data.episode_ends_E.tolist() == [1000, 2000, 2500]
    assert (data.state_dim, data.action_dim) == (11, 3)


@pytest.mark.parametrize("stage", ["behavior", "critic", "energy", "actor"])
def test_the_baselines_first_loss_is_ours(stage, parts):
    aepo, iql, state, iql_state, data = parts

    def ours():
        generator = torch.Generator()
        if stage == "behavior":
            return behavior.train_step(behavior.start(aepo.behavior, data, generator), aepo.behavior, data)()["loss"]
        if stage == "critic":
            fresh = critic.start(aepo.critic, data, generator)
            batch = data.draw(aepo.critic.batch_size, torch.Generator())
            backup = batch.rewards_B + aepo.critic.discount * fresh.v(batch.next_states_BS)  # nothing is terminal
            return (fresh.q(batch.states_BS, batch.actions_BA) - backup).square().mean(dim=1).sum()
        if stage == "energy":
            fresh = energy.start(aepo.energy, data, generator)
            source = energy.q_source(state.critic, fresh, aepo.energy, data)
            return energy.train_step(fresh, aepo.energy, data, state.behavior, source)()["loss"]
        fresh = actor.start(iql.actor, data, generator)
        of_rows = critic.advantage_of_rows(iql_state.critic.target.net, iql_state.critic, data, num_draws=0)
        return actor.train_step(fresh, iql.actor, data, of_rows)()["loss"]

    step = {
        "behavior": lambda: naive.behavior_step(aepo.behavior, data),
        "critic": lambda: naive.critic_step(aepo.critic, data),
        "energy": lambda: naive.energy_step(aepo.energy, state, data),
        "actor": lambda: naive.actor_step(iql, iql_state, data),
    }[stage]
    torch.manual_seed(0)
    baseline = step()()
    torch.manual_seed(0)
    assert baseline == pytest.approx(ours().item(), rel=1e-4)


def test_every_part_gives_its_rows(capsys):
    argv = [
        "bench",
        "--preset",
        "smoke",
        "--transitions",
        "2000",
        "--seconds",
        "0.02",
        "--processes",
        "1",
        "2",
        "--json",
    ]
    assert cli.run(argv) == 0
    found = json.loads(capsys.readouterr().out)
    work = [row["work"] for row in found["rows"]]
    for name in (
        "behaviour step",
        "critic step",
        "energy step",
        "IQL's actor",
        "actions of 50",
        "loading",
        "evaluation",
    ):
        assert sum(name in one for one in work) == 1, (name, work)
    assert all(row["cpu_ms"] > 0 and row["ratio"] > 0 for row in found["rows"])
    assert [row["processes"] for row in found["processes"]] == [1, 2]
    assert all(row["critic_steps_per_s"] > 0 for row in found["processes"])
    assert {"processor", "torch", "commit", "kernels"} <= set(found["machine"])


def test_settings_reach_the_methods_that_have_them(capsys):
    aepo, iql = measure.configs_of(
        "smoke", "bfloat16", {"critic.activation": "relu", "actor.activation": "relu", "behavior.batch_size": "7"}
    )
    assert (aepo.critic.activation, iql.critic.activation, iql.actor.activation) == ("relu",) * 3
    assert (aepo.behavior.batch_size, iql.critic.layer_norm, iql.actor.precision) == (7, True, "bfloat16")
    argv = ["bench", "--preset", "smoke", "--transitions", "2000", "--seconds", "0.02", "--only", "steps", "--json"]
    assert cli.run([*argv, "--set", "critic.layer_norm=false"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["set"] == ["critic.layer_norm=false"]
    for words, named in (
        ("critic.layernorm=false", "critic.layer_norm"),
        ("critic.activation=gelu", "'silu' or 'relu'"),
        ("evaluation.num_episodes=3", "measures nothing of"),  # and would change nothing
    ):
        assert cli.run([*argv, "--set", words]) == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(("activation", "layer_norm"), [("relu", False), ("silu", True)])
def test_the_baselines_networks_are_ours(activation, layer_norm, parts):
    """`plain` copies say what ours say, without any of our code."""
    settings = {"critic.activation": activation, "critic.layer_norm": str(layer_norm)}
    config, data = measure.configs_of("smoke", overrides=settings)[0].critic, parts[-1]
    state, batch = critic.start(config, data, torch.Generator()), data.take(torch.arange(50))
    twin = naive.plain(state.q)
    assert {type(module).__module__.split(".")[0] for module in twin.q_1.modules()} == {"torch"}
    found, wanted = (net(batch.states_BS, batch.actions_BA) for net in (state.q, twin))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_numbers_that_measure_nothing_are_refused(capsys):
    assert cli.run(["bench", "--seconds", "0"]) == 2
    assert "--seconds above 0" in capsys.readouterr().err
