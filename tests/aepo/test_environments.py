"""All 36 tasks from file or Minari set to score, and what each family counts as a return."""

import json

import minari
import numpy as np
import pytest
import torch

from aepo import cli, tasks
from aepo.data.d4rl import (
    import_file,
)
from aepo.errors import DataError
from aepo.evaluate import Evaluator
from tests.families import D4RL, MINARI, write_file, write_minari

# -- all tasks, from the file to the score -----------------------------------------------------------------

SHORT = [f"{stage}.{key}" for stage in ("behavior", "critic", "energy") for key in ("steps=50", "hidden_size=16")]
TRAIN = ["--preset", "smoke", "--set", *SHORT, "evaluation.horizon=20", "evaluation.num_episodes=1"]


def run_json(capsys, *words):
    assert cli.run([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_from_data_to_score(capsys, tmp_path, task, source):
    row = tasks.find(task, source)
    facts = run_json(capsys, "data", "verify", task, "--source", source)
    assert facts["problems"] == []
    assert not [doubt for doubt in facts["doubts"] if "published data" not in doubt]
    result = run_json(capsys, "train", "--task", task, "--source", source, *TRAIN, "--out", str(tmp_path))
    assert result["status"] == "finished"
    assert (result["source"], result["ref_min"], result["ref_max"]) == (source, row.ref_min, row.ref_max)
    assert result["env_id"] == row.env_id
    assert result["score"] == pytest.approx(row.score(result["return_mean"]))
    if row.return_rule != "sum":
        assert 0 <= result["return_mean"] <= row.ref_max


@pytest.mark.parametrize("task", D4RL)
def test_each_task_goes_from_d4rls_file_to_a_score(task, tmp_path, capsys):
    path = write_file(tmp_path / "file.hdf5", task)
    summary = run_json(capsys, "data", "import", "d4rl", str(path), "--task", task)
    assert [text for text in summary["warnings"] if "rows, the published file" not in text] == []
    check_from_data_to_score(capsys, tmp_path, task, "d4rl")


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning", "ignore:`eval_env`:UserWarning")
@pytest.mark.parametrize("task", MINARI)
def test_each_task_goes_from_minaris_set_to_a_score(task, tmp_path, capsys):
    row = tasks.find(task, "minari")
    if row.origin:
        for part in row.origin.split():
            write_minari(part, row)
        run_json(capsys, "data", "combine", task)
    else:
        write_minari(row.dataset, row)
    check_from_data_to_score(capsys, tmp_path, task, "minari")


# -- evaluation --------------------------------------------------------------------------------------------


def test_a_data_set_of_another_environment_is_refused(tmp_path):
    import_file(write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2"), tasks.find("hopper-medium-v2"))
    Evaluator("local/d4rl/hopper-medium-v2", env_id="Hopper-v2").close()  # a version is a version
    with pytest.raises(DataError, match="is data of Hopper-v5, the task is Walker2d-v4: a data set of another task"):
        Evaluator("local/d4rl/hopper-medium-v2", env_id="Walker2d-v4")


class Scripted:
    """An environment that pays and reports what it is told, step by step."""

    def __init__(self, rewards, subtasks=None):
        self.script = list(zip(rewards, subtasks or [None] * len(rewards), strict=True))

    def reset(self, *, seed):
        self.steps = 0
        return np.zeros(3), {}

    def step(self, action):
        reward, subtasks = self.script[self.steps]
        self.steps += 1
        info = {} if subtasks is None else {"episode_task_completions": subtasks}
        return np.zeros(3), reward, False, self.steps == len(self.script), info

    def close(self):
        pass


class Still:
    """A policy that does nothing."""

    device = torch.device("cpu")

    def num_cut(self, observations_NS):
        return 0

    def act(self, observations_NS, generator):
        return np.zeros((len(observations_NS), 1), np.float32)


@pytest.mark.parametrize(
    ("rule", "env", "return_", "steps"),
    [
        ("goal", Scripted([0, 0, 1, 1, 1]), 1.0, 3),
        ("goal", Scripted([0, 0, 0]), 0.0, 3),
        ("sum", Scripted([0, 0, 1, 1, 1]), 3.0, 5),
        ("subtasks", Scripted([1, 1, 1, 2], [["kettle"]] * 3 + [["kettle", "microwave"]]), 2.0, 4),
        ("subtasks", Scripted([0, 0], [[], []]), 0.0, 2),
    ],
)
def test_an_episode_counts_by_its_tasks_rule(rule, env, return_, steps, make_dataset):
    evaluator = Evaluator(make_dataset(), return_rule=rule)
    evaluator.close()
    evaluator._slots.own.envs = {0: env}
    assert evaluator.run(Still(), num_episodes=1, seed=0).tolist() == [return_]
    assert env.steps == steps


def test_an_environment_that_reports_no_subtasks_is_refused(make_dataset):
    evaluator = Evaluator(make_dataset(), return_rule="subtasks")
    with pytest.raises(DataError, match="Pendulum-v1 reports no sub-tasks"):
        evaluator.run(Still(), num_episodes=1, seed=0)
    evaluator.close()


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning", "ignore:`eval_env`:UserWarning")
@pytest.mark.parametrize("mirrored", [True, False])
def test_evaluation_is_in_the_maze_of_the_data(mirrored):
    """Minari's AntMaze sets name the mirrored maze for evaluation (Minari issue 304)."""
    row = tasks.find("antmaze-umaze-v2", "minari")
    write_minari(row.dataset, row)
    storage = minari.load_dataset(row.dataset).storage
    spec = json.loads(storage.metadata["env_spec"])
    walls = [[int(cell == 1) for cell in line] for line in spec["kwargs"]["maze_map"]]
    spec["kwargs"]["maze_map"] = [line[::-1] for line in walls] if mirrored else walls
    storage.update_metadata({"eval_env_spec": json.dumps(spec)})
    evaluator = Evaluator(row.dataset, env_id=row.env_id, observation_keys=row.observation_keys)
    maze_map = evaluator._slots.own.envs[0].unwrapped.maze.maze_map
    assert [[int(cell == 1) for cell in line] for line in maze_map] == walls
    evaluator.close()


def test_a_minari_set_without_an_environment_uses_the_rows(tmp_path):
    import_file(write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2"), tasks.find("hopper-medium-v2"))
    file = tmp_path / "minari" / "local" / "d4rl" / "hopper-medium-v2" / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in metadata.items() if k not in ("env_spec", "eval_env_spec")}))
    evaluator = Evaluator("local/d4rl/hopper-medium-v2", env_id="Hopper-v5", horizon=9)
    assert evaluator.env_id == "Hopper-v5"
    evaluator.close()
    with pytest.raises(DataError, match="names no environment"):
        Evaluator("local/d4rl/hopper-medium-v2")
