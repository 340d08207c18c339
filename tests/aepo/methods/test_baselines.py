"""IQL and TD3+BC, and the n-step return: losses against sums written out, policies against a known optimum."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from aepo import config as configs
from aepo import pipeline, tasks
from aepo.data.transitions import Batch
from aepo.policy import Policy
from aepo.presets import preset
from aepo.stages import actor, actor_critic, critic, fast
from tests.examples import random_transitions
from tests.training import bandit, share_of_optimum

CPU = torch.device("cpu")


def rows_of(data, index=None):
    batch = data.take(torch.arange(40) if index is None else index)
    return batch, [Batch(*(part[i : i + 1] for part in batch)) for i in range(len(batch.rewards_B))]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_the_n_step_return_is_the_sum_written_out(num_steps):
    data = random_transitions(num=60)
    data = dataclasses.replace(data, episode_ends_E=torch.tensor([1, 20, 21, 50, 60]))
    batch, discount = data.batch(data.rows_ND), 0.9
    ahead = critic.n_step_returns(data, num_steps, discount)
    ends = iter(data.episode_ends_E.tolist())
    end = next(ends)
    for i in range(len(data)):
        end = end if i < end else next(ends)
        last = min(i + num_steps, end) - 1
        expected = sum(discount**k * float(batch.rewards_B[i + k]) for k in range(last - i + 1))
        assert float(ahead.rewards_N[i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert int(ahead.last_N[i]) == last
        alive = 1 - float(batch.terminals_B[last])
        assert float(ahead.discounts_N[i]) == pytest.approx(alive * discount ** (last - i + 1), rel=1e-4)


def test_one_step_ahead_is_the_plain_backup(tiny_config, transitions):
    config = tiny_config(method="iql")
    steps = critic.n_step_returns(transitions, 1, config.critic.discount)
    states = [pipeline.start(config, transitions, CPU)["critic"] for _ in range(2)]
    for _ in range(5):
        plain = critic.train_step(states[0], config.critic, transitions)
        ahead = critic.train_step(states[1], config.critic, transitions, steps)
        assert float(plain()["loss"]) == pytest.approx(float(ahead()["loss"]), rel=1e-6)


@torch.no_grad()
def test_iqls_loss_is_the_weighted_likelihood(tiny_config, transitions):
    config = tiny_config(method="iql", actor__inverse_temperature=2.0)
    states = pipeline.start(config, transitions, CPU)
    actor_state, judge = states["actor"], states["critic"]
    actor_state.net.log_std_A.copy_(torch.tensor([-0.7, 0.3]))
    judge.q.q_1[-1].weight.mul_(20)  # some weights reach their limit of 100, others do not
    judge.v.body[-1].bias.sub_(2.5)
    judge.target.net.load_state_dict(judge.q.state_dict())
    batch, singles = rows_of(transitions)
    total, num_clamped = 0.0, 0
    for one in singles:
        advantage = float(judge.q(one.states_BS, one.actions_BA).min() - judge.v(one.states_BS))
        weight = min(math.exp(2 * advantage), 100.0)
        num_clamped += weight == 100.0
        normal = torch.distributions.Normal(actor_state.net(one.states_BS), torch.tensor([-0.7, 0.3]).exp())
        total -= weight * float(normal.log_prob(one.actions_BA).sum())
    assert 0 < num_clamped < len(singles)
    advantage_B = critic.advantages(judge.target.net, judge, transitions)[: len(singles)]
    _, metrics = actor.loss(actor_state.net, batch, advantage_B, config.actor)
    assert float(metrics()["loss"]) == pytest.approx(total / len(singles), rel=1e-4)
    assert float(metrics()["clamped_share"]) == pytest.approx(num_clamped / len(singles))


@torch.no_grad()
def test_td3bcs_losses_are_the_papers_sums(tiny_config, transitions):
    config = tiny_config(method="td3bc", actor_critic__policy_noise=0.0, actor_critic__q_weight=2.0).actor_critic
    state = actor_critic.start(config, transitions, torch.Generator().manual_seed(0))
    batch, singles = rows_of(transitions)
    q_total, values, distances = 0.0, [], []
    for one in singles:
        next_q = state.q(one.next_states_BS, state.actor(one.next_states_BS)).min()
        target = float(one.rewards_B + config.discount * (1 - one.terminals_B) * next_q)
        q_total += sum((float(q) - target) ** 2 for q in state.q(one.states_BS, one.actions_BA))
        action = state.actor(one.states_BS)
        values.append(float(state.q(one.states_BS, action)[0]))
        distances.append(float((action - one.actions_BA).square().mean()))
    nets, normal_BA = (state.q, state.q_target.net, state.actor_target.net), torch.randn(batch.actions_BA.shape)
    _, metrics = actor_critic.q_loss(*nets, batch, normal_BA, config)
    assert float(metrics()["loss"]) == pytest.approx(q_total / len(singles), rel=1e-4)
    scale = 2.0 / np.mean(np.abs(values))
    _, metrics = actor_critic.pi_loss(state.actor, state.q, batch, config)
    assert float(metrics()["actor_loss"]) == pytest.approx(np.mean(distances) - scale * np.mean(values), rel=1e-4)


@torch.no_grad()
def test_td3bcs_target_noise_is_clipped(tiny_config, transitions, monkeypatch):
    settings = {"actor_critic__policy_noise": 100.0, "actor_critic__noise_clip": 0.3}
    config = tiny_config(method="td3bc", **settings).actor_critic
    state = actor_critic.start(config, transitions, torch.Generator().manual_seed(0))
    batch, _ = rows_of(transitions)
    seen, target = [], state.q_target.net
    of_actions = target.lowest
    monkeypatch.setattr(target, "lowest", lambda states, actions: seen.append(actions) or of_actions(states, actions))
    state.actor.body[-1].weight.mul_(0.1)  # no action near its bounds, where the noise is cut again
    state.actor_target.net.load_state_dict(state.actor.state_dict())
    fast.smoothed_q(state.q, target, state.actor_target.net, batch, torch.randn(batch.actions_BA.shape), config)
    noise = seen[0] - state.actor(batch.next_states_BS)
    assert noise.abs().max() <= 0.3 + 1e-6
    assert noise.abs().median() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("iql", {"actor.inverse_temperature": 10.0, "critic.expectile": 0.5}), ("td3bc", {"actor_critic.q_weight": 50.0})],
)
def test_a_baseline_finds_the_best_action(method, settings):
    base = preset(f"{method}-smoke", tasks.for_dataset("bandit"), 0)
    size = {"steps": 1500, "batch_size": 256, "hidden_size": 64, "num_layers": 2, "learning_rate": 2e-3}
    config = configs.with_overrides(
        base, {f"{stage}.{key}": value for stage in base.stages for key, value in size.items()} | settings
    )
    data = bandit()
    *_, last = pipeline.train(config, data, device=CPU)
    assert share_of_optimum(Policy.from_state(config, last.states, data)) > 0.8
