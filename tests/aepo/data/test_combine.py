import re
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from aepo.data import combine as combining
from aepo.data.combine import combine
from aepo.errors import ConfigError, DataError, ResourceError

SHA = "0123456789abcdef0123456789abcdef01234567"
HUMAN, EXPERT = "D4RL/pen/human-v2", "D4RL/pen/expert-v2"
FILES = ("main_data.hdf5", "metadata.json")


def episodes(dataset_id):
    return list(minari.load_dataset(dataset_id).iterate_episodes())


def assert_same_episodes(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        for field in ("observations", "actions", "rewards", "terminations", "truncations"):
            a, b = getattr(one, field), getattr(other, field)
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.fixture
def root(tmp_path):
    """The local library."""
    return tmp_path / "minari"


MEDIUM, BEST, BOTH = "tests/pendulum/medium-v0", "tests/pendulum/expert-v0", "local/tests/both-v0"
WORDS = {"description": "both", "ref_min": -1300.0, "ref_max": -100.0}


@pytest.fixture
def parts(make_dataset):
    make_dataset(MEDIUM, num_episodes=2)
    make_dataset(BEST, num_episodes=3, edit=lambda arrays: arrays["rewards"].fill(7))
    return [MEDIUM, BEST]


def test_a_combined_set_holds_the_episodes_of_its_parts_in_their_order(parts, root, capsys):
    summary = combine(BOTH, parts, **WORDS)
    wanted = [episode for part in parts for episode in episodes(part)]
    oracle = minari.combine_datasets([minari.load_dataset(part) for part in parts], "tests/pendulum/oracle-v0")
    assert_same_episodes(list(oracle.iterate_episodes()), wanted)
    for part in parts:
        minari.delete_dataset(part)
    capsys.readouterr()
    dataset = minari.load_dataset(BOTH)
    assert_same_episodes(list(dataset.iterate_episodes()), wanted)
    assert [episode.id for episode in dataset.iterate_episodes()] == [0, 1, 2, 3, 4]
    assert [m["id"] for m in dataset.storage.get_episode_metadata(range(5))] == [0, 1, 2, 3, 4]
    assert (dataset.total_episodes, dataset.total_steps) == (5, 200)
    assert dataset.combined_datasets == parts
    assert dataset.env_spec == oracle.env_spec
    assert dataset.recover_environment(eval_env=True).spec.max_episode_steps == 40
    metadata = dataset.storage.metadata
    assert (metadata["description"], metadata["ref_min_score"], metadata["ref_max_score"]) == ("both", -1300, -100)
    assert (summary.combined, summary.parts, summary.path) == (True, tuple(parts), str(root / BOTH))
    assert (summary.num_episodes, summary.num_steps, summary.ref_min, summary.ref_max) == (5, 200, -1300, -100)
    assert capsys.readouterr().out == ""
    assert set(minari.list_local_datasets()) == {BOTH, "tests/pendulum/oracle-v0"}


def store(dataset_id, size=3, *, num_episodes=2, value=0.0, **kwargs):
    """Write episodes of one step with seeds, a Dict observation and infos."""
    box = gymnasium.spaces.Box(-1.0, 1.0, (size,), np.float64)
    buffers = [
        EpisodeBuffer(
            id=episode,
            seed=10 * episode + 3,
            observations={"where": np.full((2, size), value + episode)},
            actions=np.zeros((1, size)),
            rewards=np.array([1.0]),
            terminations=np.array([True]),
            truncations=np.array([False]),
            infos={"qpos": np.full((2, 4), value)},
        )
        for episode in range(num_episodes)
    ]
    words = {"author": "tests", "author_email": "t@example.org", "code_permalink": "tests", "algorithm_name": "none"}
    options = {"observation_space": gymnasium.spaces.Dict({"where": box}), "action_space": box, **words, **kwargs}
    minari.create_dataset_from_buffers(
        dataset_id, buffers, description="stored", **({"env": "Pendulum-v1", "eval_env": "Pendulum-v1"} | options)
    )
    return dataset_id


def test_seeds_infos_and_dict_observations_survive(capsys):
    store("tests/a/one-v0", value=0.1)
    store("tests/a/two-v0", value=0.5, algorithm_name="other")
    combine(BOTH, ["tests/a/two-v0", "tests/a/one-v0"], description="", ref_min=None, ref_max=None)
    dataset = minari.load_dataset(BOTH)
    found = list(dataset.iterate_episodes())
    assert [episode.observations["where"][0, 0] for episode in found] == [0.5, 1.5, 0.1, 1.1]
    assert [episode.infos["qpos"][0, 0] for episode in found] == [0.5, 0.5, 0.1, 0.1]
    assert [m["seed"] for m in dataset.storage.get_episode_metadata(range(4))] == [3, 13, 3, 13]
    assert "ref_min_score" not in dataset.storage.metadata
    assert "algorithm_name" not in dataset.storage.metadata
    assert dataset.storage.metadata["author"] == {"tests"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 4}, r"observation space of tests/a/two-v0 is .*\(4,\)"),
        ({"action_space": gymnasium.spaces.Box(-2.0, 2.0, (3,), np.float64)}, r"action space of tests/a/two-v0 is"),
        (
            {"env": "MountainCarContinuous-v0"},
            r"different environments \(tests/a/one-v0 Pendulum-v1, tests/a/two-v0 Mount",
        ),
        ({"eval_env": "MountainCarContinuous-v0"}, r"evaluation environment of tests/a/two-v0 is"),
        ({"data_format": "arrow"}, r"format of tests/a/two-v0 is arrow"),
    ],
)
def test_parts_that_are_not_alike_are_not_combined(change, message):
    store("tests/a/one-v0")
    store("tests/a/two-v0", **change)
    with pytest.raises(DataError, match=message):
        combine(BOTH, ["tests/a/one-v0", "tests/a/two-v0"], description="", ref_min=None, ref_max=None)
    assert BOTH not in minari.list_local_datasets()


def test_what_cannot_be_combined_is_refused(parts, root):
    with pytest.raises(DataError, match=f"needs {HUMAN}, which is not in .*; aepo data download {HUMAN}"):
        combine(BOTH, [MEDIUM, HUMAN], **WORDS)
    for wrong in ([], [MEDIUM], [MEDIUM, MEDIUM], [MEDIUM, BOTH]):
        with pytest.raises(DataError, match="two or more different parts"):
            combine(BOTH, wrong, **WORDS)
    for low, high in ((1.0, 0.0), (float("nan"), 1.0), (None, 1.0), (0.0, None)):
        with pytest.raises(ConfigError, match="reference return"):
            combine(BOTH, parts, description="", ref_min=low, ref_max=high)
    with (root / BEST / "data" / "main_data.hdf5").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match=f"{BEST} is no complete data set .*; aepo data download {BEST} --overwrite"):
        combine(BOTH, parts, **WORDS)
    assert not (root / BOTH).exists()


def test_a_combined_set_that_is_there_is_left_alone_unless_it_is_to_be_replaced(parts, make_dataset, capsys):
    combine(BOTH, parts, **WORDS)
    again = combine(BOTH, parts[::-1], description="other", ref_min=0.0, ref_max=1.0)
    assert (again.combined, again.parts, again.ref_min) == (False, tuple(parts), -1300)
    assert "was left alone" in capsys.readouterr().err
    again = combine(BOTH, parts[::-1], description="other", ref_min=0.0, ref_max=1.0, overwrite=True)
    assert (again.combined, again.parts, again.ref_min) == (True, tuple(parts[::-1]), 0)
    assert_same_episodes(episodes(BOTH), [*episodes(BEST), *episodes(MEDIUM)])


def test_a_process_killed_before_the_last_step_leaves_nothing_to_see(parts, root):
    code = (
        "import os, signal, aepo.data.combine as combining\n"
        "combining.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"combining.combine({BOTH!r}, {parts!r}, **{WORDS!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(root.rglob(".combining.*/data/metadata.json"))
    assert set(minari.list_local_datasets()) == set(parts)
    combine(BOTH, parts, **WORDS)
    assert len(episodes(BOTH)) == 5
    assert not list(root.rglob(".*"))


def test_one_that_fails_in_the_middle_leaves_nothing_and_spares_the_one_that_is_there(parts, root, monkeypatch):
    combine(BOTH, parts, **WORDS)
    before = episodes(BOTH)
    copy = combining._copy_episodes

    def full(*args):
        copy(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(combining, "_copy_episodes", full)
    with pytest.raises(ResourceError, match=rf"no space left for {re.escape(str(root))}/.*; make room"):
        combine(BOTH, parts[::-1], **WORDS, overwrite=True)
    assert_same_episodes(episodes(BOTH), before)
    assert not list(root.rglob(".*"))


def test_a_library_that_cannot_be_written_is_said(parts, root, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    with pytest.raises(DataError, match=rf"Permission denied: '{re.escape(str(root))}.*; make the library"):
        combine(BOTH, parts, **WORDS)
