"""ReBRAC: its losses against the paper's sums written out row by row, its settings, and a known optimum."""

import dataclasses

import numpy as np
import pytest
import torch

from aepo import config as configs
from aepo import pipeline, tasks
from aepo.data.transitions import Batch
from aepo.methods import rebrac
from aepo.policy import Policy
from aepo.presets import preset
from aepo.stages import actor_critic
from tests.examples import random_transitions
from tests.training import bandit, share_of_optimum

CPU = torch.device("cpu")


def rows_of(batch):
    return [Batch(*(part[i : i + 1] for part in batch)) for i in range(len(batch.rewards_B))]


@torch.no_grad()
def test_the_losses_are_the_papers_sums(tiny_config):
    data = dataclasses.replace(random_transitions(num=60), episode_ends_E=torch.tensor([1, 20, 21, 50, 60]))
    config = tiny_config(method="rebrac", rebrac__policy_noise=0.5, rebrac__noise_clip=0.3).rebrac
    config = dataclasses.replace(config, actor_penalty=0.4, critic_penalty=0.7)
    state = actor_critic.start(config, data, torch.Generator().manual_seed(0))
    state.actor_target.net.body[-1].bias.add_(0.2)  # targets are other networks than those that learn
    state.q_target.net.q_1[-1].bias.add_(0.5)
    index, normal = torch.arange(60), torch.randn(60, data.action_dim, generator=torch.Generator().manual_seed(1))
    batch = data.take(index)
    total, penalties, values, distances = 0.0, [], [], []
    for i, one in enumerate(rows_of(batch)):
        noise = (0.5 * normal[i]).clamp(-0.3, 0.3)
        smoothed = (state.actor_target.net(one.next_states_BS) + noise).clamp(-1, 1)
        is_last = i + 1 in (1, 20, 21, 50, 60)
        penalties.append(0.0 if is_last else float((smoothed - batch.actions_BA[i + 1]).square().sum()))
        next_q = float(state.q_target.net(one.next_states_BS, smoothed).min()) - 0.7 * penalties[-1]
        backup = float(one.rewards_B) + config.discount * (1 - float(one.terminals_B)) * next_q
        total += sum((float(q) - backup) ** 2 for q in state.q(one.states_BS, one.actions_BA))
        action = state.actor(one.states_BS)
        values.append(float(state.q(one.states_BS, action).min()))
        distances.append(float((action - one.actions_BA).square().sum()))
    nets = state.q, state.q_target.net, state.actor_target.net
    loss, metrics = rebrac.q_loss(*nets, batch, data.take_next_actions(index), normal, config)
    assert float(loss) == pytest.approx(total / 60, rel=1e-4)
    assert float(metrics()["penalty"]) == pytest.approx(np.mean(penalties), rel=1e-4)
    loss, _ = rebrac.pi_loss(state.actor, state.q, batch, config)
    wanted = 0.4 * np.mean(distances) - np.mean(values) / np.mean(np.abs(values))
    assert float(loss) == pytest.approx(wanted, rel=1e-4)


def test_the_actors_gradient_leaves_the_critics_scale_out(tiny_config, transitions):
    config = tiny_config(method="rebrac").rebrac
    state = actor_critic.start(config, transitions, torch.Generator().manual_seed(0))
    batch = transitions.take(torch.arange(40))
    loss, _ = rebrac.pi_loss(state.actor, state.q, batch, config)
    found = torch.autograd.grad(loss, list(state.actor.parameters()))
    actions = state.actor(batch.states_BS)
    q = state.q.lowest(batch.states_BS, actions)
    scale = 1 / float(q.detach().abs().mean())
    wanted = config.actor_penalty * (actions - batch.actions_BA).square().sum(1).mean() - scale * q.mean()
    for one, other in zip(found, torch.autograd.grad(wanted, list(state.actor.parameters())), strict=True):
        torch.testing.assert_close(one, other)


OTHER = {
    "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4,
    "discount": 0.5, "target_rate": 0.5, "policy_noise": 0.1, "noise_clip": 0.05, "actor_interval": 1,
    "activation": "relu", "layer_norm": False, "actor_penalty": 1.0, "critic_penalty": 1.0,
}  # fmt: skip


def test_every_setting_is_heeded(tiny_config, transitions):
    def weights(config):
        *_, last = pipeline.train(config, transitions, device=CPU)
        return torch.cat([weight.flatten() for weight in last.states["rebrac"].actor.parameters()])

    base = tiny_config(method="rebrac")
    assert set(OTHER) | {"precision"} == {field.name for field in dataclasses.fields(base.rebrac)}
    before = weights(base)
    for name, value in OTHER.items():
        after = weights(configs.with_overrides(base, {f"rebrac.{name}": value}))
        assert before.shape != after.shape or not torch.equal(before, after), name


@pytest.mark.parametrize("name", ["actor_penalty", "critic_penalty"])
def test_a_penalty_below_zero_is_refused(name, tiny_config):
    with pytest.raises(configs.ConfigError, match=rf"{name} must be in \[0, inf\)"):
        tiny_config(method="rebrac", **{f"rebrac__{name}": -1.0})


def test_it_finds_the_best_action():
    base = preset("rebrac-smoke", tasks.for_dataset("bandit"), 0)
    size = {"steps": 1500, "batch_size": 256, "hidden_size": 64, "num_layers": 2, "learning_rate": 2e-3}
    config = configs.with_overrides(base, {f"rebrac.{key}": value for key, value in size.items()})
    data = bandit()
    *_, last = pipeline.train(config, data, device=CPU)
    assert share_of_optimum(Policy.from_state(config, last.states, data)) > 0.8
