"""Damaged data sets: none is trained on, none ends in a traceback, each message names file, episode and field."""

import json

import h5py
import numpy as np
import pytest

from aepo import cli
from aepo.data.transitions import load_transitions
from aepo.errors import DataError

EPISODE = "episode_1"


def replaced(key, make):
    """A damage that puts make(old array) in the place of a field of episode 1."""

    def damage(folder):
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            old = file[EPISODE][key][:]
            del file[EPISODE][key]
            file[EPISODE][key] = make(old)

    return damage


def changed(key, place, value):
    """A damage that writes one value."""

    def make(old):
        new = old.copy()
        new[place] = value
        return new

    return replaced(key, make)


def removed(name):
    def damage(folder):
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            del file[name]

    return damage


def as_group(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file[EPISODE]["observations"]
        file[EPISODE].create_group("observations")["x"] = np.zeros((41, 3))


def emptied(folder):
    for key in ("actions", "rewards", "terminations", "truncations"):
        replaced(key, lambda old: old[:0])(folder)
    replaced("observations", lambda old: old[:1])(folder)


def bytes_of(make):
    def damage(folder):
        file = folder / "main_data.hdf5"
        file.write_bytes(make(file.read_bytes()))

    return damage


def metadata(**changes):
    def damage(folder):
        file = folder / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


IN_FIELD = {
    "rewards nan": (changed("rewards", 3, np.nan), "rewards: a value that is not finite, the first at step 3"),
    "rewards inf": (changed("rewards", 0, np.inf), "rewards: a value that is not finite, the first at step 0"),
    "observations nan": (changed("observations", (40, 1), np.nan), "observations: a value that is not finite"),
    "actions nan": (changed("actions", (5, 0), np.nan), "actions: a value that is not finite"),
    "actions outside": (
        changed("actions", (5, 0), 2.5),
        "actions: 1 values outside of the action space, the first 2.5",
    ),
    "rewards short": (
        replaced("rewards", lambda old: old[:-1]),
        "observations: shape (41, 3), wanted 40 rows for 39 rewards",
    ),
    "observations short": (replaced("observations", lambda old: old[:-1]), "observations: shape (40, 3), wanted 41"),
    "observations flat": (replaced("observations", lambda old: old[:, 0]), "observations: shape (41,), wanted 41 rows"),
    "actions short": (replaced("actions", lambda old: old[:-1]), "actions: shape (39, 1), wanted (40, 1)"),
    "actions wide": (replaced("actions", lambda old: np.hstack([old, old])), "actions: shape (40, 2), wanted (40, 1)"),
    "terminations short": (replaced("terminations", lambda old: old[1:]), "terminations: shape (39,), wanted (40,)"),
    "truncations short": (replaced("truncations", lambda old: old[1:]), "truncations: shape (39,), wanted (40,)"),
    "rewards twofold": (replaced("rewards", lambda old: np.stack([old, old], 1)), "rewards: shape (40, 2)"),
    "terminates early": (
        changed("terminations", 7, True),
        "terminations: the episode terminates at step 7 and goes on",
    ),
    "no step": (emptied, "rewards: shape (0,), wanted one number per step and at least one step"),
    "text": (replaced("rewards", lambda old: np.array([b"1"] * len(old))), "rewards: type |S1, wanted numbers"),
}
IN_FILE = {
    "half": bytes_of(lambda all_: all_[: len(all_) // 2]),
    "head": bytes_of(lambda all_: all_[:100]),
    "nothing": bytes_of(lambda all_: b""),
    "no hdf5": bytes_of(lambda all_: b"not a data set " * 1000),
    "no file": lambda folder: (folder / "main_data.hdf5").unlink(),
    "no episode": removed(EPISODE),
    "no rewards": removed(f"{EPISODE}/rewards"),
    "no actions": removed(f"{EPISODE}/actions"),
    "no observations": removed(f"{EPISODE}/observations"),
    "no terminations": removed(f"{EPISODE}/terminations"),
    "group for field": as_group,
    "no metadata": lambda folder: (folder / "metadata.json").unlink(),
    "torn metadata": lambda folder: (folder / "metadata.json").write_text('{"total_steps": 12'),
    "metadata of text": lambda folder: (folder / "metadata.json").write_text('"total_steps"'),
    "too many steps": metadata(total_steps=200),
    "too few steps": metadata(total_steps=90),
    "too many episodes": metadata(total_episodes=7),
}
DAMAGES = {name: (damage, "") for name, damage in IN_FILE.items()} | IN_FIELD


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_data_set_is_refused_and_verify_says_why(name, make_dataset, tmp_path, capsys):
    dataset_id = make_dataset()
    damage, message = DAMAGES[name]
    damage(tmp_path / "minari" / dataset_id / "data")
    with pytest.raises(DataError) as refusal:
        load_transitions(dataset_id)
    assert dataset_id in str(refusal.value)
    if message:
        assert f"main_data.hdf5: episode 1: {message}" in str(refusal.value)
    assert cli.run(["data", "verify", dataset_id]) == 3
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert message in said


def test_verify_lists_every_problem(make_dataset, tmp_path, capsys):
    dataset_id = make_dataset()
    for damage in ("rewards nan", "actions wide"):
        DAMAGES[damage][0](tmp_path / "minari" / dataset_id / "data")
    metadata(ref_min_score=float("nan"))(tmp_path / "minari" / dataset_id / "data")
    assert cli.run(["data", "verify", dataset_id, "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    wanted = ["actions: shape (40", "rewards: a value that is not finite", "reference scores nan and -150.0"]
    assert [text for text, problem in zip(wanted, problems, strict=True) if text in problem] == wanted


def test_a_whole_data_set_is_verified(make_dataset, capsys):
    dataset_id = make_dataset()
    assert cli.run(["data", "verify", dataset_id, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_episodes"], facts["num_steps"], facts["problems"]) == (3, 120, [])
    assert (facts["ref_min"], facts["ref_max"], facts["env_id"]) == (-1200.0, -150.0, "Pendulum-v1")


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "a/../../b-v0", "..", "", "x" * 300])
def test_a_malicious_id_is_refused(name, capsys):
    with pytest.raises(DataError):
        load_transitions(name)
    assert cli.run(["data", "verify", name]) != 0
    assert "Traceback" not in capsys.readouterr().err
