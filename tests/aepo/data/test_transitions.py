"""Minari data sets as transitions: what is read, what is normalised, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aepo import tasks
from aepo.data.episodes import flatten
from aepo.data.transitions import load_transitions
from aepo.errors import ConfigError, DataError, ResourceError


def test_transitions_are_the_episodes_in_order(make_dataset):
    import minari

    dataset_id = make_dataset(num_episodes=3)
    data = load_transitions(dataset_id, reward_rule="raw")
    episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
    assert len(data) == sum(len(e.rewards) for e in episodes) == 120
    batch = data.batch(data.rows_ND)
    states = np.concatenate([e.observations[:-1] for e in episodes])
    following = np.concatenate([e.observations[1:] for e in episodes])
    mean, std = states.mean(0), states.std(0)
    np.testing.assert_allclose(batch.states_BS, (states - mean) / std, atol=1e-4)
    np.testing.assert_allclose(batch.next_states_BS, (following - mean) / std, atol=1e-4)
    np.testing.assert_allclose(batch.actions_BA, np.concatenate([e.actions for e in episodes]) / 2, atol=1e-6)
    np.testing.assert_allclose(batch.rewards_B, np.concatenate([e.rewards for e in episodes]), rtol=1e-5)
    assert not batch.terminals_B.any(), "a truncated episode is no terminal"


def test_pairs_are_the_states_and_actions_of_a_batch(transitions):
    width = transitions.rows_ND.shape[1]
    draws = torch.Generator().manual_seed(0)
    shift_D, scale_D = torch.randn(width, generator=draws), 2.0 * torch.rand(width, generator=draws) + 0.5
    data = dataclasses.replace(transitions, shift_D=shift_D, scale_D=scale_D)
    index, before = torch.tensor([4, 0, 4, 499]), data.rows_ND.clone()
    batch = data.take(index)
    assert all(map(torch.equal, data.take_pairs(index), (batch.states_BS, batch.actions_BA)))
    assert batch.actions_BA.abs().max() == 1.0  # some are cut
    assert torch.equal(data.rows_ND, before)


def test_only_terminations_are_terminals(make_dataset):
    def end_early(arrays):
        arrays["terminations"][-1] = True

    data = load_transitions(make_dataset(edit=end_early))
    assert data.batch(data.rows_ND).terminals_B.nonzero().tolist() == [[119]]


@pytest.mark.parametrize("rule", ["raw", "return_range"])
def test_rewards_follow_the_rule_of_the_row(rule, make_dataset):
    import minari

    dataset_id = make_dataset()
    episodes = [e.rewards for e in minari.load_dataset(dataset_id).iterate_episodes()]
    returns = [r.sum() for r in episodes]
    raw = np.concatenate(episodes)
    exact = {"raw": raw, "return_range": raw * 1000 / (max(returns) - min(returns))}[rule]
    data = load_transitions(dataset_id, reward_rule=rule)
    np.testing.assert_allclose(data.batch(data.rows_ND).rewards_B, exact, rtol=1e-4)


def test_until_goal_ends_an_episode_at_its_first_reward(make_dataset):
    rewards = [[0] * 40, [0] * 7 + [1, 1, 0, 1] + [0] * 29, [1] + [0] * 39]
    paid = iter(rewards)

    def pay(arrays):
        arrays["rewards"][:] = next(paid)

    data = load_transitions(make_dataset(edit_all=pay), reward_rule="until_goal")
    batch = data.batch(data.rows_ND)
    assert data.episode_ends_E.tolist() == [40, 48, 49]
    assert batch.rewards_B.tolist() == [-1.0] * 47 + [0.0, 0.0]
    assert batch.terminals_B.nonzero().flatten().tolist() == [47, 48]
    as_stored = load_transitions("tests/pendulum/random-v0", reward_rule="raw")  # another cache
    assert len(as_stored) == 120
    assert as_stored.batch(as_stored.rows_ND).rewards_B.tolist() == np.concatenate(rewards).tolist()


def test_actions_go_to_minus_one_and_one_and_back(make_dataset):
    data = load_transitions(make_dataset())
    actions = data.batch(data.rows_ND).actions_BA
    assert actions.abs().max() <= 1
    raw = data.rows_ND[:, 3:4]
    torch.testing.assert_close(data.spaces.denormalise_actions(actions), raw, atol=1e-5, rtol=1e-5)
    assert data.spaces.action_low_A.tolist() == [-2.0]


def test_the_second_load_reads_the_cache_and_a_changed_file_does_not(make_dataset, tmp_path, monkeypatch):
    dataset_id = make_dataset()
    first = load_transitions(dataset_id)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("aepo.data.transitions._decode", lambda *_: pytest.fail("decoded again"))
        second = load_transitions(dataset_id)
    assert torch.equal(first.rows_ND, second.rows_ND)
    assert first.digest == second.digest
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])  # torn
    assert load_transitions(dataset_id).digest == first.digest
    make_dataset("tests/pendulum/other-v0", num_episodes=2)
    assert load_transitions("tests/pendulum/other-v0").digest != first.digest


def test_no_cache_is_a_warning_and_not_the_end(make_dataset, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AEPO_CACHE", str(tmp_path / "file" / "below"))
    assert len(load_transitions(make_dataset())) == 120
    assert "no cache" in capsys.readouterr().err


def test_a_missing_data_set_says_what_to_do():
    with pytest.raises(DataError, match="aepo data download no/such-v0"):
        load_transitions("no/such-v0")
    with pytest.raises(DataError, match="aepo data collect maze2d-umaze"):
        load_transitions(tasks.find("maze2d-umaze").dataset)


def test_a_data_set_larger_than_memory_is_refused_before_it_is_read(make_dataset, monkeypatch):
    dataset_id = make_dataset()
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(ResourceError, match="GiB of memory"):
        load_transitions(dataset_id)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(1, 3)),
        min_size=1,
        max_size=5,
        unique_by=lambda x: x[0],
    )
)
def test_flatten_joins_entries_in_the_given_or_the_sorted_order(parts):
    rng = np.random.default_rng(0)
    observation = {key: rng.random((4, width)) for key, width in parts}
    keys = tuple(key for key, _ in parts)
    np.testing.assert_array_equal(flatten(observation, keys), np.concatenate([observation[k] for k in keys], 1))
    ordered = np.concatenate([observation[k] for k in sorted(keys)], 1)
    np.testing.assert_array_equal(flatten(observation), ordered)
    nested = {"x": observation, "y": rng.random((4, 2, 2))}
    assert flatten(nested).shape == (4, ordered.shape[1] + 4)


def test_flatten_names_the_entry_that_is_missing():
    with pytest.raises(DataError, match="no entry 'goal'; they have"):
        flatten({"observation": np.zeros((1, 2))}, ("goal",))


def test_task_table_is_whole_and_unknown_names_get_the_nearest():
    for row in tasks.table().values():
        assert tasks.for_dataset(row.dataset) is row
    with pytest.raises(ConfigError, match="did you mean maze2d-umaze"):
        tasks.find("maze2d-umase")
    assert tasks.for_dataset("any/thing-v0").suite == "user"
