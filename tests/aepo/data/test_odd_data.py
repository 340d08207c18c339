"""Data and environments that are odd: read rightly, or refused by `verify` and before any training alike."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector.episode_buffer import EpisodeBuffer

from aepo import cli, tasks
from aepo.data.episodes import accepted, doubt_pictures
from aepo.data.library import open_dataset
from aepo.data.transitions import MAX_SPREADS, Spaces, load_transitions
from aepo.errors import ConfigError, DataError, TrainingError
from aepo.evaluate import Evaluator
from aepo.policy import Policy
from aepo.presets import preset
from aepo.samplers import Sampler
from aepo.verify import verify
from tests import follow

NAME = "own/odd-v0"
REFERENCES = {"ref_min_score": -20.0 / 3, "ref_max_score": 10.0}
rarely = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def record(env, number=6):
    """Return episodes of a noisy expert, as buffers."""
    rng, found = np.random.default_rng(0), []
    for seed in range(number):
        seen, _ = env.reset(seed=seed)
        observations, actions, rewards, over = [seen], [], [], False
        while not over:
            space = env.action_space
            action = np.clip(2 * env.unwrapped.x + 0.3 * rng.normal(size=1), space.low, space.high).astype(space.dtype)
            seen, reward, _, over, _ = env.step(action)
            observations.append(seen)
            actions.append(action)
            rewards.append(float(np.squeeze(reward)))
        found.append(buffer(observations=np.array(observations), actions=np.array(actions), rewards=np.array(rewards)))
    return found


def buffer(rewards, **arrays):
    """Return an episode that is cut at its end."""
    cut = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(rewards=rewards, terminations=cut & False, truncations=cut, **arrays)


def store(buffers, env=None, name=NAME, **metadata):
    """Put them into the library of the test."""
    env = env or follow.make()
    about = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "tests")
    minari.create_dataset_from_buffers(
        dataset_id=name, buffer=buffers, env=env, **({"eval_env": env} | about | REFERENCES | metadata)
    )
    return name


def of_rewards(*episodes, dtype="float64"):
    """Return buffers with these rewards and random observations and actions."""
    rng = np.random.default_rng(0)
    return [
        buffer(
            observations=rng.normal(size=(len(rewards) + 1, 1)),
            actions=rng.uniform(-1, 1, (len(rewards), 1)).astype(np.float32),
            rewards=np.array(rewards, dtype),
        )
        for rewards in episodes
    ]


def scale_of(data):
    """Return the factor of rewards."""
    return float(data.scale_D[data.state_dim + data.action_dim])


class AtBound(Sampler):
    """Always the largest or the smallest action."""

    sign = 1.0

    def copy_weights(self, state):
        """Has none."""

    def sample(self, states_BS, generator):
        """Return the bound."""
        return self.sign * torch.ones(len(states_BS), 1)


@given(
    low=st.floats(-3e4, 3e4, width=16),
    size=st.floats(0.001, 1.0),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    sign=st.sampled_from([-1.0, 1.0, 1.0 + 1e-6]),
)
def test_an_action_lies_in_the_space_that_it_is_for(low, size, dtype, sign):
    space = spaces.Box(low, low + size * max(1.0, abs(low)), (1,), np.dtype(dtype))
    own = Spaces(
        state_mean_S=torch.zeros(1),
        state_scale_S=torch.ones(1),
        action_low_A=torch.tensor(space.low),
        action_high_A=torch.tensor(space.high),
    )
    sampler = AtBound()
    sampler.sign = sign
    policy = Policy(preset("iql-smoke", tasks.for_dataset(NAME), 0), own, sampler)
    (action,) = policy.act(np.zeros((1, 1)), torch.Generator())
    assert space.contains(action)
    wanted = float((space.high if sign > 0 else space.low)[0])
    assert float(action[0]) == pytest.approx(
        wanted, abs=1e-2 * (1 + abs(wanted)) if dtype == "float16" else 1e-5 * (1 + abs(wanted))
    )


@given(value=st.floats(width=32, allow_nan=False), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_what_an_environment_gets_lies_in_its_space(value, dtype):
    space = spaces.Box(-0.1, 0.3, (1,), np.dtype(dtype))
    with np.errstate(over="ignore"):
        assert space.contains(accepted(np.array([value]), space.low, space.high))


def test_an_offset_changes_nothing():
    near, far = (load_transitions(store(record(follow.make(offset=o)), name=f"own/o{o}-v0")) for o in (0, 5_400_000))
    batches = [data.batch(data.rows_ND) for data in (near, far)]
    for one, other in zip(*batches, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    x_N1 = np.linspace(-1, 1, 9)[:, None]
    seen = [data.spaces.normalise_states(torch.tensor(x_N1 + o)) for data, o in ((near, 0), (far, 5_400_000))]
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)
    assert near.digest != far.digest


def test_a_constant_entry_counts_for_nothing_and_is_said(capsys):
    env = follow.make(fixed=0.5)
    name = store(record(env), env, eval_env=follow.make(fixed=0.7))
    data = load_transitions(name)
    assert data.spaces.state_scale_S[1] == 0
    assert data.spaces.normalise_states(torch.tensor([[0.0, 1e30], [0.0, -3.0]]))[:, 1].tolist() == [0.0, 0.0]
    assert cli.run(["data", "verify", name]) == 0
    assert "entry 1 of the observation is 0.5 in all of the data and 0.7 in Follow-v0" in capsys.readouterr().err


@rarely
@given(
    column=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=8),
    seen=st.floats(allow_nan=False, allow_infinity=False),
)
def test_normalised_states_are_finite_and_bounded_whatever_the_data_and_the_environment(column, seen, make_library):
    rows = np.array(column)[:, None]
    name = make_library(
        [buffer(observations=rows, actions=np.zeros((len(rows) - 1, 1), np.float32), rewards=np.ones(len(rows) - 1))]
    )
    data = load_transitions(name)
    states_NS = data.batch(data.rows_ND).states_BS
    assert torch.isfinite(states_NS).all()
    assert states_NS.abs().max() <= 1.001 * MAX_SPREADS
    shown = data.spaces.normalise_states(torch.tensor([[seen]], dtype=torch.float64))
    assert shown.abs() <= data.spaces.state_bound_S <= 1.001 * MAX_SPREADS
    assert not data.spaces.beyond_bound(torch.tensor(rows)).any(), "no row of the data is cut"


@pytest.fixture
def make_library(tmp_path_factory, monkeypatch):
    """A function that stores buffers in a library of their own; one per example."""

    def make(buffers):
        folder = tmp_path_factory.mktemp("library")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
        return store(buffers)

    return make


def test_evaluation_counts_what_it_cuts():
    env = follow.make()
    name = store(record(env), env, eval_env=follow.make(offset=100.0))
    evaluator, policy = (
        Evaluator(name),
        Policy(preset("iql-smoke", tasks.for_dataset(NAME), 0), spaces_of(name), AtBound()),
    )
    evaluator.run(policy, num_episodes=1, seed=0)
    assert evaluator.cut_percent == 100.0
    evaluator.close()


def spaces_of(name):
    """Return the spaces of a data set."""
    return load_transitions(name).spaces


def test_observations_far_from_all_data_are_a_doubt(capsys):
    env = follow.make()
    assert cli.run(["data", "verify", store(record(env), env, eval_env=follow.make(offset=100.0))]) == 0
    assert "1 of 1 entries of the observation are far from the data in Follow-v0" in capsys.readouterr().err


def test_returns_are_summed_in_double_precision():
    rng = np.random.default_rng(0)
    rewards = [(80.0 + 10.0 * i + rng.integers(0, 4, 800)) for i in range(6)]
    exact, half = (
        load_transitions(store(of_rewards(*rewards, dtype=kind), name=f"own/{kind}-v0"))
        for kind in ("float64", "float16")
    )
    assert scale_of(half) == pytest.approx(scale_of(exact), rel=1e-6)
    assert half.digest != exact.digest, (
        "an earlier version took 0 for the half ones, and its steps are not mixed with these"
    )


def test_one_number_in_an_array_of_its_own_is_that_number():
    flat = store(of_rewards([1, 2, 3], [4, 5, 7]), name="own/flat-v0")
    boxed = store(of_rewards([[1], [2], [3]], [[4], [5], [7]]), name="own/boxed-v0")
    assert load_transitions(flat).digest == load_transitions(boxed).digest
    scalar = [dataclasses.replace(each, observations=each.observations[:, 0]) for each in of_rewards([1, 2, 3])]
    space = spaces.Box(-9, 9, (), np.float64)
    assert load_transitions(store(scalar, name="own/scalar-v0", observation_space=space)).state_dim == 1


@pytest.mark.parametrize("episodes", [[[1.0]], [[1.0], [0.0], [3.0]]])
def test_the_smallest_data_sets_are_read(episodes):
    data = load_transitions(store(of_rewards(*episodes)), reward_rule="by_data")
    batch = data.batch(data.rows_ND)
    assert len(data) == len(episodes)
    assert all(torch.isfinite(part).all() for part in batch)


@pytest.mark.parametrize(("low", "high"), [(10.0, 10.0 + 1e-6), (-3.0, -3.0), (1e-8, 1e-8 * (1 + 1e-9))])
def test_rewards_are_not_blown_up_where_returns_are_nearly_alike(low, high):
    data = load_transitions(store(of_rewards([low / 2, low / 2], [high / 2, high / 2])), reward_rule="by_data")
    assert abs(scale_of(data) * low) <= 1.001e5
    assert "nearly alike" in data.doubt


def test_returns_that_differ_follow_the_published_rule():
    data = load_transitions(store(of_rewards([1.0, 2.0, 0.5], [4.0, 0.5, 0.25])))
    assert (scale_of(data), data.doubt) == (pytest.approx(1000 / 1.25), "")


@pytest.mark.parametrize(("fail", "success"), [(0.0, 1.0), (-1.0, 0.0), (0.0, 10.0), (2.0, 5.0)])
def test_success_ends_an_episode_where_rewards_are_sparse(fail, success, capsys):
    name = store(of_rewards([fail] * 3 + [success], [fail] * 5, [success], [fail, success]))
    data = load_transitions(name, reward_rule="by_data")
    batch = data.batch(data.rows_ND)
    assert batch.terminals_B.nonzero().flatten().tolist() == [3, 9, 11]
    torch.testing.assert_close(batch.rewards_B, batch.terminals_B - 1.0)
    assert "is taken for success" in data.note
    assert not load_transitions(name).batch(data.rows_ND).rewards_B.equal(batch.rewards_B)
    as_stored = load_transitions(name, reward_rule="return_range")
    assert not as_stored.batch(as_stored.rows_ND).terminals_B.any(), "another cache"


@pytest.mark.parametrize(
    "episodes",
    [
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],  # paid in the middle
        [[1.0, 1.0, -100.0], [1.0, 1.0, 1.0]],  # alive, then fallen
        [[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0, 1.0]],
    ],
)
def test_other_rewards_are_no_sparse_success(episodes):
    data = load_transitions(store(of_rewards(*episodes)), reward_rule="by_data")
    assert not data.batch(data.rows_ND).terminals_B.any()
    assert data.note == ""


def test_data_of_ones_own_are_read_by_what_they_hold():
    assert tasks.for_dataset("own/any-v0").reward_rule == "by_data"
    assert {row.reward_rule for row in tasks.rows()} == {"raw", "until_goal", "return_range"}


def test_the_cache_knows_content_and_not_time_or_size(tmp_path):
    name = store(record(follow.make()))
    before = load_transitions(name)
    file = tmp_path / "minari" / name / "data" / "main_data.hdf5"
    times = file.stat()
    with h5py.File(file, "r+") as data:
        for episode in data.values():
            episode["rewards"][...] = -episode["rewards"][...]
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load_transitions(name)
    column = before.state_dim + before.action_dim
    assert torch.equal(after.rows_ND[:, column], -before.rows_ND[:, column])


def box(size):
    return spaces.Box(-1, 1, (size,), np.float64)


@pytest.mark.parametrize(
    ("space", "width"),
    [
        (spaces.Tuple((box(1), box(2))), 3),
        (spaces.Dict({"b": spaces.Tuple((box(2), spaces.MultiBinary(3))), "a": box(1)}), 6),
        (spaces.MultiDiscrete([3, 4]), 2),
    ],
)
def test_spaces_of_numbers_are_joined_in_order(space, width):
    assert load_transitions(store(in_space(space), observation_space=space, env=follow.make())).state_dim == width


@pytest.mark.parametrize(
    ("space", "kind"),
    [(spaces.Discrete(5), "Discrete"), (spaces.Tuple((box(1), spaces.Discrete(3))), "Discrete")],
)
def test_other_spaces_are_refused_by_name(space, kind, capsys):
    name = store(in_space(space), observation_space=space)
    with pytest.raises(DataError, match=f"are a {kind} space, wanted a Box"):
        load_transitions(name)
    assert cli.run(["data", "verify", name]) == 3
    assert kind in capsys.readouterr().err


def in_space(space, steps=5):
    """Return two episodes whose observations are drawn from a space."""
    found = []
    for seed in range(2):
        space.seed(seed)
        seen = _stack([space.sample() for _ in range(steps + 1)])
        actions = np.zeros((steps, 1), np.float32)
        found.append(buffer(observations=seen, actions=actions, rewards=np.arange(steps) + float(seed)))
    return found


def _stack(values):
    if isinstance(values[0], dict):
        return {key: _stack([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(map(_stack, zip(*values, strict=True)))
    return np.array(values)


def beyond_float32(buffers):
    buffers[3].observations[5, 0] = 1e39


def test_what_cannot_be_right_is_refused_by_verify_and_before_any_training(tmp_path, capsys):
    """One list of cases, because each is short: (what the data are made of, what both say)."""
    normalised = gymnasium.wrappers.NormalizeObservation(follow.make(offset=3.0))
    cases = {
        "sentinel": (follow.make(), beyond_float32, {}, "1e+39 at step 5 is beyond float32"),
        "units": (follow.make(), halve_actions, {"action_space": spaces.Box(-1, 1, (1,))}, "takes actions in Box(-2.0"),
        "statistics": (normalised, None, {}, "has the wrapper NormalizeObservation"),
        "swapped": (follow.make(), None, {"ref_min_score": 20.0, "ref_max_score": -6.7}, "ref_min_score"),
        "equal": (follow.make(), None, {"ref_min_score": 5.0, "ref_max_score": 5.0}, "ascending"),
        "integers": (follow.make(dtype="int64"), None, {}, "actions must be real numbers"),
        "wider": (follow.make(), None, {"eval_env": follow.make(fixed=1.0)}, "shows observations of 2 entries"),
    }
    for name, (env, spoil, metadata, wanted) in cases.items():
        buffers = record(env)
        if spoil is not None:
            spoil(buffers)
        stored = {key: value for key, value in metadata.items() if not key.startswith("ref_")}
        dataset = store(buffers, env, name=f"own/{name}-v0", **stored)
        file = tmp_path / "minari" / dataset / "data" / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {k: metadata[k] for k in metadata.keys() - stored}))
        capsys.readouterr()
        assert cli.run(["data", "verify", dataset]) == 3, name
        assert wanted in capsys.readouterr().err, name
        out = ["--out", str(tmp_path / name), "--preset", "iql-smoke"]
        assert cli.run(["train", "--dataset", dataset, *out]) == 3, name
        said = capsys.readouterr().err
        assert wanted in said, name
        assert len(said.strip().splitlines()) == 1, said
        assert not list((tmp_path / name).glob("*/metrics.jsonl")), name


def halve_actions(buffers):
    for i, each in enumerate(buffers):
        buffers[i] = dataclasses.replace(each, actions=(each.actions / 2).astype(np.float32))


def test_an_environment_that_fails_says_so_before_any_training(tmp_path):
    name = store(record(follow.make()), eval_env=follow.make(fails=True))
    evaluator = Evaluator(name)
    with pytest.raises(TrainingError, match="Follow-v0 failed: ValueError: no simulator"):
        evaluator.check(load_transitions(name))
    evaluator.close()


def test_rewards_in_arrays_are_counted():
    name = store(record(follow.make()), eval_env=follow.make(as_array=True))
    evaluator = Evaluator(name)
    assert evaluator.check(load_transitions(name)) == []
    evaluator.close()


def test_a_folder_that_is_no_data_set_hides_no_other(tmp_path, capsys):
    name = store(record(follow.make()))
    for other in ("own/odd", "own/x y-v0", "own/odd-v1"):
        shutil.copytree(tmp_path / "minari" / name, tmp_path / "minari" / other)
    (tmp_path / "minari" / "own/odd-v1/data/metadata.json").write_text("{")
    assert cli.run(["data", "list", "--source", "user", "--json"]) == 0
    said = capsys.readouterr()
    assert {row["dataset"] for row in json.loads(said.out)} == {name, "own/odd", "own/x y-v0"}
    assert "own/odd-v1" in said.err


@pytest.mark.parametrize("refs", [("0", "1"), (True, 2.0), (0.0, None), (10**400, 10**401), (float("nan"), 1.0)])
def test_reference_scores_are_two_numbers_or_nothing(refs, tmp_path):
    name = store(record(follow.make()))
    file = tmp_path / "minari" / name / "data" / "metadata.json"
    odd = dict(zip(("ref_min_score", "ref_max_score"), refs, strict=True))
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    with pytest.raises(DataError, match=r"ref_min_score, ref_max_score in its metadata\), wanted two finite numbers"):
        Evaluator(name)


def test_an_episode_without_end_is_refused():
    name = store(record(follow.make()), eval_env=follow.make(steps=10**12))
    with pytest.raises(DataError, match=r"a time limit of 1,000,000,000,000 steps, wanted at most 100,000; --set"):
        Evaluator(name)
    Evaluator(name, horizon=5).close()


def test_pictures_are_a_doubt(capsys):
    space = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    assert cli.run(["data", "verify", store(in_space(space), observation_space=space)]) == 3  # Follow shows no pictures
    assert "shows observations of 1 entries, the data have 48" in capsys.readouterr().err
    assert doubt_pictures(open_dataset(NAME)) == [
        "observations are arrays of 4 x 4 x 3: networks get 48 numbers in a row, which is no way to learn from pictures"
    ]


# -- Arrow, flags, subnormal numbers -----------------------------------------------------------------------


def folder_of(name):
    return Path(open_dataset(name).storage.data_path)


def test_an_episode_of_arrow_that_is_changed_in_place_is_other_data(make_dataset):
    name, other = (make_dataset(f"tests/{each}/arrow-v0", data_format="arrow") for each in ("one", "other"))
    make_dataset("tests/other/arrow2-v0", data_format="arrow", edit_all=lambda arrays: arrays["rewards"].__imul__(2))
    before = load_transitions(name).digest
    assert load_transitions(other).digest == before
    shutil.rmtree(folder_of(name) / "1")
    shutil.copytree(folder_of("tests/other/arrow2-v0") / "1", folder_of(name) / "1")
    assert load_transitions(name).digest != before


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda folder: (folder / "part-0.arrow").write_bytes(b"ARROW1")])
def test_an_episode_of_arrow_that_is_torn_or_gone_is_named(spoil, make_dataset):
    name = make_dataset("tests/torn/arrow-v0", data_format="arrow")
    spoil(folder_of(name) / "2")
    with pytest.raises(DataError, match=r"arrow-v0/data: episode \d cannot be read: .*; bring it again"):
        load_transitions(name)
    _, problems, _ = verify(tasks.for_dataset(name))
    assert any("cannot be read" in problem for problem in problems)


@pytest.mark.parametrize("flag", ["terminations", "truncations"])
@pytest.mark.parametrize("value", [-7, 0.5, 2, 1e-3])
def test_a_flag_that_is_neither_0_nor_1_is_refused(flag, value, make_dataset):
    name = make_dataset("tests/flags/odd-v0")
    with h5py.File(folder_of(name) / "main_data.hdf5", "r+") as file:
        group = file["episode_2"]
        flags = np.zeros(40)
        flags[-1] = value
        del group[flag]
        group[flag] = flags
    with pytest.raises(DataError, match=f"{flag}: {value:g} at step 39, wanted 0 or 1"):
        load_transitions(name)
    _, problems, _ = verify(tasks.for_dataset(name))
    assert any(f"{flag}: {value:g} at step 39, wanted 0 or 1" in problem for problem in problems)


def test_data_do_not_depend_on_how_the_process_takes_subnormal_numbers(make_dataset, tmp_path, monkeypatch):
    def tiny(arrays):
        arrays["observations"] = arrays["observations"].astype(np.float64)
        arrays["observations"][::3, 0], arrays["observations"][1::3, 1] = 1e-40, -3e-42
        arrays["rewards"][::5] = 1e-39

    name, digests = make_dataset("tests/tiny/odd-v0", edit_all=tiny), []
    for flushes in (False, True):
        monkeypatch.setenv("AEPO_CACHE", str(tmp_path / f"cache-{flushes}"))
        torch.set_flush_denormal(flushes)
        data = load_transitions(name)
        digests.append((data.digest, data.rows_ND.numpy().tobytes(), data.shift_D.tolist(), data.scale_D.tolist()))
    assert digests[0] == digests[1]
    rows_ND = data.rows_ND.abs()
    assert ((rows_ND == 0) | (rows_ND >= torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("refs", [(0.0, 1e-320), (0.0, 5e-324), (0.0, 1e-31), (-1.7e308, 1.7e308), (1.0, 1.0)])
def test_references_without_a_usable_difference_are_refused(refs):
    with pytest.raises(ConfigError, match="wanted two finite ones, ascending"):
        tasks.check_references("mine", *refs)


def test_observations_that_overflow_in_squares_are_refused_before_training(make_dataset):
    name = make_dataset(
        "tests/huge/odd-v0",
        edit=lambda arrays: arrays.update(observations=arrays["observations"].astype(np.float64) * 1e37),
    )
    with pytest.raises(DataError, match=r"wanted at most 1e\+30: store it in other units"):
        load_transitions(name)


def test_rewards_too_small_to_scale_teach_nothing_and_that_is_said(make_dataset):
    name = make_dataset(
        "tests/small/odd-v0", edit_all=lambda arrays: arrays.update(rewards=1e-36 * np.sign(arrays["rewards"]))
    )
    data = load_transitions(name)
    assert torch.isfinite(data.scale_D).all()
    assert "rewards teach nothing" in data.doubt


def test_a_number_of_steps_that_is_none_is_refused(make_dataset):
    name = make_dataset("tests/count/odd-v0")
    path = folder_of(name) / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_steps": math.nan}))
    with pytest.raises(DataError, match=r"cannot be read in .*NaN"):
        open_dataset(name)


def test_entries_of_an_observation_that_has_none_cannot_be_chosen(make_dataset):
    with pytest.raises(DataError, match=r"without entries to choose from: leave data\.observation_keys out, got a b"):
        load_transitions(make_dataset("tests/box/odd-v0"), observation_keys=("a", "b"))
