import json
import subprocess
import sys
import warnings

import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from aepo import cli, tasks


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "library"))
    return tmp_path / "library"


def store(dataset_id, returns, *, steps=4, **metadata):
    """Write a data set of the user's own: episodes of `steps` steps, the reward is paid at the end."""
    space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float64)
    episodes = [
        EpisodeBuffer(
            observations=np.zeros((steps + 1, 3)),
            actions=np.zeros((steps, 3)),
            rewards=np.array([0.0] * (steps - 1) + [total]),
            terminations=np.zeros(steps, dtype=bool),
            truncations=np.arange(1, steps + 1) == steps,
        )
        for total in returns
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*None", category=UserWarning)  # advice for publishers
        dataset = minari.create_dataset_from_buffers(dataset_id, episodes, observation_space=space, action_space=space)
    dataset.storage.update_metadata(metadata)


def run(capsys, *words):
    """Return exit status, standard output and standard error of `aepo data` with these words."""
    try:
        status = cli.run(["data", *words])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_commands_are_known_before_torch_or_mujoco_are_loaded():
    code = "import sys, aepo.commands.data as c; c.DATA; print([m for m in sys.modules if m in sys.argv])"
    heavy = ["torch", "mujoco", "gymnasium", "minari"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["collect", "combine", "download", "import", "list", "show", "stats", "verify"])
def test_help_has_an_example_that_the_parser_takes(command, capsys, monkeypatch):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    examples = [line.split() for line in out.splitlines() if line.startswith("  aepo data ")]
    assert examples
    called = []
    for name in ("Collect", "Combine", "Download", "Import", "List", "Show", "Stats", "Verify"):
        monkeypatch.setattr(f"aepo.commands.data.{name}.run", lambda self: called.append(self) or 0)
    for words in examples:
        assert run(capsys, *words[2:])[0] == 0
    assert [type(one).__name__ for one in called] == [command.title()] * len(examples)


def test_collect_makes_the_data_set_that_list_and_show_then_find(capsys, library):
    status, out, _ = run(capsys, "collect", "maze2d-umaze", "--steps", "1200", "--seed", "3", "--json")
    made = json.loads(out)
    assert status == 0
    assert made["collected"] is True
    assert (made["dataset"], made["num_steps"], made["seed"]) == ("local/maze2d/umaze-v0", 1200, 3)
    assert made["path"] == str(library / "local" / "maze2d" / "umaze-v0")
    assert made["env_steps_per_s"] > 0

    rows = {row["task"]: row for row in json.loads(run(capsys, "list", "--json")[1])}
    assert (rows["maze2d-umaze"]["local"], rows["maze2d-umaze"]["steps"]) == (True, 1200)
    assert (rows["maze2d-large"]["local"], rows["maze2d-large"]["steps"]) == (False, None)

    shown = json.loads(run(capsys, "show", "maze2d-umaze", "--json")[1])
    assert shown == json.loads(run(capsys, "show", "local/maze2d/umaze-v0", "--json")[1])
    assert (shown["num_steps"], shown["num_episodes"]) == (1200, 2)
    assert shown["env"] == shown["eval_env"] == "PointMaze_UMaze-v3"
    assert shown["observation_space"] == "Box(-inf, inf, (4,), float64)"
    assert (shown["ref_min"], shown["ref_max"]) == (made["ref_min"], made["ref_max"])
    assert shown["return_mean"] == pytest.approx(made["mean_return"])

    status, out, err = run(capsys, "collect", "maze2d-umaze", "--json")
    assert status == 0
    assert json.loads(out) == {**made, "collected": False}
    assert "1,200 steps, seed 3" in err


def test_list_has_one_row_per_task_and_then_the_users_own(capsys):
    store("mine/walk-v0", [1.0, 2.0])
    status, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["task"] for row in rows] == [*tasks.table(), None]
    last = {key: rows[-1][key] for key in ("task", "suite", "dataset", "local", "steps", "episodes", "ref_min")}
    assert list(last.values()) == [None, "user", "mine/walk-v0", True, 8, 2, None]
    table = run(capsys, "list")[1]
    assert all(row["dataset"] in table for row in rows)


def test_a_broken_data_set_is_named_and_hides_no_other(capsys, library):
    store("mine/walk-v0", [1.0])
    (library / "mine" / "torn-v0" / "data").mkdir(parents=True)
    status, out, err = run(capsys, "list", "--json")
    assert status == 0
    assert "mine/torn-v0" in " ".join(err.split())
    assert json.loads(out)[-1]["dataset"] == "mine/walk-v0"


def test_show_returns_of_a_data_set_without_environment_or_references(capsys):
    store("mine/walk-v0", [1.0, -4.0, 9.0], description="mine")
    status, out, _ = run(capsys, "show", "mine/walk-v0", "--json")
    shown = json.loads(out)
    assert status == 0
    assert (shown["return_min"], shown["return_mean"], shown["return_max"]) == (-4.0, 2.0, 9.0)
    assert (shown["num_episodes"], shown["num_steps"], shown["description"]) == (3, 12, "mine")
    assert {shown[key] for key in ("env", "eval_env", "ref_min", "ref_max")} == {None}
    assert "mine/walk-v0" in run(capsys, "show", "mine/walk-v0")[1]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["collect", "maze2d-umze"], 2, "did you mean maze2d-umaze"),
        (["collect", "maze2d-umaze", "--steps", "0"], 2, "wanted steps >= 1"),
        (["show", "maze2d-umze"], 3, "did you mean maze2d-umaze"),
        (["show", "qqq"], 3, "`aepo data list` shows all"),
        (["stats", "maze2d-large"], 3, "aepo data collect maze2d-large"),
        (["show", "maze2d-large", "--source", "minari"], 2, "has no data of source 'minari'; it has collected"),
        (["show", "maze2d-large", "--returns", "1"], 3, "no reference returns"),
        (["show"], 2, "required"),
        ([], 2, "collect"),
        (["collect", "maze2d-umaze", "--stepz", "1"], 2, "--stepz"),
    ],
)
def test_what_goes_wrong_is_said_on_standard_error_with_its_status(words, status, message, capsys):
    got, out, err = run(capsys, *words)
    assert got == status
    assert out == ""
    assert message in " ".join(err.split())


def test_stats_are_those_of_the_episodes(capsys, tmp_path):
    returns = [1.0, -2.0, 4.0, 4.0, 10.0]
    store("tests/own/set-v0", returns, steps=4)
    status, out, _ = run(capsys, "stats", "tests/own/set-v0", "--json", "--figure", str(tmp_path / "a" / "b.png"))
    facts = json.loads(out)
    assert status == 0
    assert (facts["num_episodes"], facts["num_steps"], facts["state_dim"], facts["action_dim"]) == (5, 20, 3, 3)
    assert facts["return_mean"] == pytest.approx(np.mean(returns))
    assert facts["return_std"] == pytest.approx(np.std(returns))
    assert [facts[f"return_{key}"] for key in ("min", "q25", "median", "q75", "max")] == [-2, 1, 4, 4, 10]
    assert facts["length_min"] == facts["length_max"] == 4
    assert (facts["terminated_percent"], facts["action_at_bound_percent"]) == (0, 0)
    assert facts["nonzero_reward_percent"] == pytest.approx(25)
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
