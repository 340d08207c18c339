import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
import tomllib
from pathlib import Path

import gymnasium
import gymnasium_robotics
import minari
import numpy as np
import pytest
from gymnasium_robotics.envs.maze import maps
from scipy.sparse.csgraph import shortest_path

from aepo import tasks
from aepo.data import pointmaze, staging
from aepo.data.pointmaze import (
    GOAL_CELLS,
    PROTOCOLS,
    PUBLISHED,
    collect,
    measure_references,
    record,
)
from aepo.data.steering import Navigator, steer_depth_first, steer_shortest
from aepo.errors import ConfigError, DataError, ResourceError
from tests import ROOT

gymnasium.register_envs(gymnasium_robotics)

HORIZON = 50
POINTMAZES = [task for task in GOAL_CELLS if task.startswith("pointmaze")]
DENSE = [task for task in POINTMAZES if task.endswith("dense")]

MAPS = {
    "PointMaze_Open-v3": maps.OPEN,
    "PointMaze_UMaze-v3": maps.U_MAZE,
    "PointMaze_Medium-v3": maps.MEDIUM_MAZE,
    "PointMaze_Large-v3": maps.LARGE_MAZE,
}


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "library"))
    return tmp_path / "library"


def collect_little(name="maze2d-umaze", *, num_steps=10, seed=0, **kwargs):
    """Collect with two reference episodes of 50 steps; `collect` itself is not made any shorter."""
    task = dataclasses.replace(tasks.find(name), horizon=HORIZON)
    return collect(task, num_steps=num_steps, seed=seed, num_reference_episodes=2, **kwargs)


def free_cells(maze_map):
    return [(i, j) for i, line in enumerate(maze_map) for j, cell in enumerate(line) if cell != 1]


def distances(maze_map):
    """Steps between all free cells, by Floyd and Warshall on the graph of cells that share a side."""
    cells = np.array(free_cells(maze_map))
    return shortest_path(np.abs(cells[:, None] - cells[None]).sum(-1) == 1, method="FW", unweighted=True)


def everything(dataset_id):
    return [
        array
        for episode in minari.load_dataset(dataset_id)
        for array in (episode.observations, episode.actions, episode.rewards, episode.truncations)
    ]


@pytest.mark.parametrize("env_id", MAPS)
@pytest.mark.parametrize("suite", PROTOCOLS)
def test_a_run_is_what_the_environments_own_step_gives(suite, env_id):
    env = gymnasium.make(env_id, reset_target=True, max_episode_steps=-1)
    protocol = dataclasses.replace(PROTOCOLS[suite], arrival_radius=pointmaze.GOAL_RADIUS)
    run = record(env.unwrapped, Navigator(MAPS[env_id]), protocol, num_steps=1500, seed=3)
    observation, _ = env.reset(seed=3)
    for t, action in enumerate(run.actions_NA):
        np.testing.assert_array_equal(observation["observation"], run.states_NS[t])
        np.testing.assert_array_equal(env.unwrapped.goal, run.goals_NX[t])
        observation, reward, terminated, truncated, _ = env.step(action)
        assert reward == run.reached_N[t]
        assert not terminated
        assert not truncated
    np.testing.assert_array_equal(observation["observation"], run.states_NS[-1])
    assert run.reached_N.sum() > 1
    assert np.abs(run.actions_NA).max() == 1
    env.close()


def test_noise_of_the_stated_spread_is_added_before_the_action_is_clipped():
    env, navigator = gymnasium.make("PointMaze_Open-v3", reset_target=True), Navigator(maps.OPEN)

    def actions(*force):
        protocol = dataclasses.replace(PROTOCOLS["pointmaze"], controller=lambda *_: lambda _: force)
        return record(env.unwrapped, navigator, protocol, num_steps=4000, seed=0).actions_NA

    assert (actions(4.0, -4.0) == (1.0, -1.0)).all()
    force_1, force_0 = actions(1.0, 0.0).T
    assert (force_1 == 1.0).mean() == pytest.approx(0.5, abs=0.03)
    assert np.percentile(force_1, 15.87) == pytest.approx(0.5, abs=0.04)  # one standard deviation below
    assert np.percentile(force_0, [15.87, 50, 84.13]) == pytest.approx([-0.5, 0.0, 0.5], abs=0.04)
    env.close()


@pytest.mark.parametrize("maze", ["open", "umaze", "medium", "large"])
def test_pointmaze_episodes_are_as_long_as_the_published_ones(maze):
    row, published = tasks.find(f"pointmaze-{maze}"), PUBLISHED[f"pointmaze-{maze}"]
    env = gymnasium.make(row.env_id, reset_target=True, max_episode_steps=-1).unwrapped
    run = record(env, Navigator(env.maze.maze_map), PROTOCOLS["pointmaze"], num_steps=40_000, seed=0)
    mean_length = len(run.reached_N) / run.reached_N.sum()
    assert mean_length == pytest.approx(published.num_steps / published.num_episodes, rel=0.1)
    env.close()


def test_maze2d_pays_for_the_evaluation_goal_and_hides_every_goal():
    summary = collect_little("maze2d-umaze", num_steps=4500)
    dataset = minari.load_dataset(summary.dataset)
    episodes = list(dataset)
    assert [len(episode) for episode in episodes] == [1000, 1000, 1000, 1000, 500]
    centre = np.array([-1.0, 1.0])  # cell (1, 1) of 5 x 5 cells of 1 m around the origin
    for episode in episodes:
        assert episode.observations.shape == (len(episode) + 1, 4)
        paid = [math.dist(state[:2], centre) <= 0.45 for state in episode.observations[1:]]
        np.testing.assert_array_equal(episode.rewards, paid)
        assert not episode.terminations.any()
        assert np.flatnonzero(episode.truncations).tolist() == [len(episode) - 1]
    for one, next_one in itertools.pairwise(episodes):
        np.testing.assert_array_equal(one.observations[-1], next_one.observations[0])
    assert summary.mean_return == pytest.approx(np.mean([episode.rewards.sum() for episode in episodes]))
    assert summary.mean_return > 0


@pytest.mark.parametrize("task", ["pointmaze-umaze", "pointmaze-umaze-dense"])
def test_pointmaze_shows_the_goal_and_ends_where_it_is_reached(task, monkeypatch):
    monkeypatch.setattr(staging, "CHUNK_EPISODES", 7)
    summary = collect_little(task, num_steps=3000)
    episodes = list(minari.load_dataset(summary.dataset))
    assert summary.num_episodes == len(episodes) > 14
    assert sum(map(len, episodes)) == summary.num_steps == 3000
    for episode in episodes:
        seen = episode.observations
        np.testing.assert_array_equal(seen["achieved_goal"], seen["observation"][:, :2])
        assert (seen["desired_goal"] == seen["desired_goal"][0]).all()
        distance = np.linalg.norm(seen["achieved_goal"] - seen["desired_goal"], axis=1)
        arrived = distance[1:] <= 0.45
        assert not arrived[:-1].any()
        assert arrived[-1] or episode is episodes[-1]
        assert not episode.terminations.any()
        assert np.flatnonzero(episode.truncations).tolist() == [len(episode) - 1]
    for one, next_one in itertools.pairwise(episodes):
        np.testing.assert_array_equal(one.observations["observation"][-1], next_one.observations["observation"][0])


@pytest.mark.parametrize("task", POINTMAZES)
def test_rewards_are_those_of_the_distance_to_the_goal_of_the_step(task):
    pay = (lambda metres: math.exp(-metres)) if task in DENSE else (lambda metres: float(metres <= 0.45))
    summary = collect_little(task, num_steps=1500)
    episodes = list(minari.load_dataset(summary.dataset))
    for episode in episodes:
        seen = episode.observations
        paid = [
            pay(math.dist(state[:2], goal))
            for state, goal in zip(seen["observation"][1:], seen["desired_goal"][:-1], strict=True)
        ]
        np.testing.assert_allclose(episode.rewards, paid, rtol=1e-14)
    assert summary.mean_return == pytest.approx(np.mean([episode.rewards.sum() for episode in episodes]))


@pytest.mark.parametrize("task", POINTMAZES)
def test_the_recovered_environment_pays_the_recorded_rewards_for_the_recorded_actions(task):
    dataset = minari.load_dataset(collect_little(task, num_steps=1500, seed=3).dataset)
    env = dataset.recover_environment()
    observation, _ = env.reset(seed=3)
    for episode in dataset:
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(observation["observation"], episode.observations["observation"][t])
            np.testing.assert_array_equal(env.unwrapped.goal, episode.observations["desired_goal"][t])
            observation, reward, *_ = env.step(action)
            assert reward == episode.rewards[t]
    assert dataset.total_episodes > 2
    env.close()


@pytest.mark.parametrize("task", DENSE)
def test_dense_and_sparse_data_of_a_maze_differ_in_nothing_but_rewards(task):
    dense = minari.load_dataset(collect_little(task, num_steps=600).dataset)
    sparse = minari.load_dataset(collect_little(task.removesuffix("-dense"), num_steps=600).dataset)
    for one, other in zip(dense, sparse, strict=True):
        assert (one.rewards != other.rewards).all()
        np.testing.assert_array_equal(one.actions, other.actions)
        for key in one.observations:
            np.testing.assert_array_equal(one.observations[key], other.observations[key])


@pytest.mark.parametrize("task", GOAL_CELLS)
def test_both_environments_can_be_rebuilt_and_show_what_the_data_show(task):
    dataset = minari.load_dataset(collect_little(task).dataset)
    first = dataset[0].observations
    for eval_env in (False, True):
        env = dataset.recover_environment(eval_env=eval_env)
        assert env.observation_space == dataset.observation_space
        assert env.action_space == dataset.action_space
        assert env.unwrapped.reward_type == ("dense" if task in DENSE else "sparse")
        env.close()
    if PROTOCOLS[tasks.find(task).suite] is PROTOCOLS["maze2d"]:
        assert dataset.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        assert first.shape == (11, 4)
    else:
        assert set(dataset.observation_space) == set(first) == {"observation", "achieved_goal", "desired_goal"}


@pytest.mark.parametrize("task", GOAL_CELLS)
def test_evaluation_starts_anywhere_else_and_lasts_the_horizon_with_one_goal(task):
    # D4RL's maze_model.py, OPEN, U_MAZE, MEDIUM_MAZE, LARGE_MAZE: row and column of G
    row, column = {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}[task.split("-")[1]]
    env = minari.load_dataset(collect_little(task).dataset).recover_environment(eval_env=True)
    maze = env.unwrapped.maze
    centre = maze.cell_rowcol_to_xy(np.array([row, column]))
    starts = set()
    for seed in range(60):
        env.reset(seed=seed)
        assert np.abs(env.unwrapped.goal - centre).max() <= 0.25
        starts.add(tuple(int(i) for i in maze.cell_xy_to_rowcol(env.unwrapped.point_env.state_vector()[:2])))
    assert (row, column) not in starts
    assert starts <= set(free_cells(maze.maze_map))
    assert len(starts) > min(20, len(free_cells(maze.maze_map)) - 2)
    goal = env.unwrapped.goal.copy()
    env.unwrapped.point_env.set_state(goal, np.zeros(2))
    steps, truncated, total = 0, False, 0.0
    while not truncated:
        _, reward, terminated, truncated, _ = env.step(np.zeros(2, dtype=np.float32))
        steps, total = steps + 1, total + reward
        assert not terminated
    np.testing.assert_array_equal(env.unwrapped.goal, goal)
    assert steps == HORIZON
    assert total == pytest.approx(HORIZON)  # dense pays 1 at the goal itself
    env.close()


@pytest.mark.parametrize("name", ["maze2d-umaze", "pointmaze-umaze", "pointmaze-umaze-dense"])
def test_references_are_mean_returns_of_the_recovered_evaluation_environment(name):
    task, num_episodes = dataclasses.replace(tasks.find(name), horizon=120), 3
    summary = collect(task, num_steps=10, seed=0, num_reference_episodes=num_episodes)
    dataset = minari.load_dataset(task.dataset)
    metadata = dataset.storage.metadata
    env, navigator = dataset.recover_environment(eval_env=True), Navigator(maps.U_MAZE)
    random = np.random.default_rng([pointmaze.REFERENCE_SEED, 1])

    def state():
        return env.unwrapped.point_env.state_vector().tolist()

    def mean_return(start):
        total = 0.0
        env.reset(seed=pointmaze.REFERENCE_SEED)
        for _ in range(num_episodes):
            truncated, act = False, start(tuple(env.unwrapped.goal.tolist()))
            while not truncated:
                _, reward, _, truncated, _ = env.step(np.array(act(state()), dtype=np.float32))
                total += reward
            env.reset()
        return total / num_episodes

    wander = mean_return(lambda _: lambda _: random.uniform(-1, 1, 2))
    controller = {"maze2d": steer_shortest, "pointmaze": steer_depth_first}[task.suite]
    pursue = mean_return(lambda goal: controller(navigator, state(), goal, random))
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (summary.ref_min, summary.ref_max)
    assert (summary.ref_min, summary.ref_max) == pytest.approx((wander, pursue), rel=1e-12)
    assert metadata["num_episodes_average_score"] == num_episodes
    assert 0 <= summary.ref_min < summary.ref_max <= task.horizon
    env.close()


def test_reference_episodes_report_every_step():
    env, told = gymnasium.make("PointMaze_UMaze-v3", reset_target=False).unwrapped, []
    measure_references(env, Navigator(maps.U_MAZE), steer_shortest, horizon=7, num_episodes=3, advance=told.append)
    assert sum(told) == 2 * 3 * 7
    env.close()


@pytest.mark.parametrize("name", ["maze2d-umaze", "pointmaze-umaze"])
def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(name):
    first = collect_little(name, num_steps=1200, seed=5)
    actions = [episode.actions for episode in minari.load_dataset(first.dataset)]
    arrays = everything(first.dataset)
    again = collect_little(name, num_steps=1200, seed=5, overwrite=True)
    for one, other in zip(arrays, everything(again.dataset), strict=True):
        np.testing.assert_equal(one, other)
    third = collect_little(name, num_steps=1200, seed=6, overwrite=True)
    assert not np.array_equal(actions[0], minari.load_dataset(third.dataset)[0].actions)
    assert (first.ref_min, first.ref_max) == (third.ref_min, third.ref_max)


def test_the_metadata_say_what_the_data_are_not():
    summary = collect_little("pointmaze-medium", num_steps=30, seed=4)
    metadata = minari.load_dataset(summary.dataset).storage.metadata
    assert "not a published D4RL or Minari file" in metadata["description"]
    assert "--steps 30 --seed 4" in metadata["description"]
    assert "noise 0.5" in metadata["algorithm_name"]
    assert summary.seed == metadata["aepo"]["seed"] == 4
    assert summary.env_steps_per_s == pytest.approx(30 / summary.collect_s)


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(pointmaze.REQUIREMENTS) <= set(project["dependencies"])


def test_all_tasks_that_the_table_calls_collected_can_be_collected():
    rows = [row for row in tasks.rows() if row.source == "collected"]
    assert {row.task for row in rows} == set(GOAL_CELLS)
    assert {row.suite for row in rows} == set(PROTOCOLS)
    assert min(row.horizon for row in rows) > 0


@pytest.mark.parametrize("task", POINTMAZES)
def test_a_summary_shows_the_published_data_set_beside_the_own(task):
    made = collect_little(task, num_steps=900)
    there = collect_little(task)
    assert there == dataclasses.replace(made, collected=False)
    assert made.mean_length == 900 / made.num_episodes
    maze, _, dense = task.removeprefix("pointmaze-").partition("-")
    assert made.published_dataset == f"D4RL/pointmaze/{maze}{'-dense' if dense else ''}-v2"
    assert made.published_num_steps == 1_000_000
    # read on minari.farama.org/datasets/D4RL/pointmaze
    assert made.published_num_episodes == {"open": 9525, "umaze": 13210, "medium": 4752, "large": 3360}[maze]
    assert made.published_mean_length == pytest.approx(
        {"open": 105.0, "umaze": 75.7, "medium": 210.4, "large": 297.6}[maze], abs=0.05
    )
    assert (made.published_ref_min, made.published_ref_max) == (PUBLISHED[task].ref_min, PUBLISHED[task].ref_max)


def test_maze2d_has_no_published_data_set_beside_it():
    summary = dataclasses.asdict(collect_little("maze2d-umaze"))
    assert summary["mean_length"] == 10
    published = {name: value for name, value in summary.items() if name.startswith("published")}
    assert len(published) == 6
    assert set(published.values()) == {None}


def test_published_data_sets_are_those_of_the_task_table():
    rows = {row.dataset: row for row in tasks.rows() if row.dataset.startswith("D4RL/pointmaze/")}
    published = {other.dataset: other for other in PUBLISHED.values()}
    assert set(PUBLISHED) == set(POINTMAZES)
    assert len(published) == len(PUBLISHED)
    assert set(rows) <= set(published)
    for dataset, row in rows.items():
        assert published[dataset].num_steps == row.steps
        assert (published[dataset].ref_min, published[dataset].ref_max) == (row.ref_min, row.ref_max)
    for name, other in PUBLISHED.items():
        if other.dataset in rows:
            assert tasks.find(name).env_id == rows[other.dataset].env_id


def test_a_data_set_that_is_there_is_left_alone_unless_told_otherwise(capsys):
    first = collect_little(num_steps=10, seed=1)
    file = Path(first.path, "data", "main_data.hdf5")
    before = file.stat().st_mtime_ns
    again = collect_little(num_steps=20, seed=2)
    assert "10 steps, seed 1" in capsys.readouterr().err
    assert again == dataclasses.replace(first, collected=False)
    assert file.stat().st_mtime_ns == before
    new = collect_little(num_steps=20, seed=2, overwrite=True)
    assert new.collected
    assert (new.num_steps, new.seed) == (20, 2)
    assert minari.load_dataset(new.dataset).total_steps == 20


def test_of_two_processes_that_collect_the_same_the_first_to_end_stays(tmp_path, monkeypatch):
    first = collect_little(num_steps=10, seed=1)
    Path(first.path).rename(tmp_path / "finished")
    when_writing(lambda: (tmp_path / "finished").rename(first.path), monkeypatch)
    assert collect_little(num_steps=20, seed=2) == dataclasses.replace(first, collected=False)


def test_an_interrupted_collection_leaves_nothing(library, monkeypatch):
    when_writing(press_ctrl_c, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        collect_little("pointmaze-umaze", num_steps=3000)
    assert minari.list_local_datasets() == {}
    assert {path.name for path in library.rglob("*") if path.is_file()} == {"namespace_metadata.json"}
    assert os.environ["MINARI_DATASETS_PATH"] == str(library)
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(library))
    assert collect_little("pointmaze-umaze").collected


def test_an_interrupted_replacement_leaves_the_old_data_set(monkeypatch):
    summary = collect_little(num_steps=10, seed=1)
    arrays = everything(summary.dataset)
    when_writing(press_ctrl_c, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        collect_little(num_steps=20, seed=2, overwrite=True)
    for one, other in zip(arrays, everything(summary.dataset), strict=True):
        np.testing.assert_array_equal(one, other)


def press_ctrl_c():
    raise KeyboardInterrupt


def when_writing(act, monkeypatch):
    """Act at the first step of the progress bar of writing."""
    bars = pointmaze.progress_bars

    @contextlib.contextmanager
    def watched():
        with bars() as bar:
            yield lambda name, total: (lambda _: act()) if name == "writing" else bar(name, total)

    monkeypatch.setattr(pointmaze, "progress_bars", watched)


def test_no_temporary_files_are_left(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    summary = collect_little()
    assert tempfile.tempdir == str(tmp_path / "temporary")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert [path for path in (tmp_path / "library").iterdir() if path.name.startswith(".")] == []
    assert list(minari.list_local_datasets()) == [summary.dataset]


def test_the_default_library_is_restored_after_a_collection(tmp_path, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    summary = collect_little()
    assert Path(summary.path) == tmp_path / ".minari" / "datasets" / "local" / "maze2d" / "umaze-v0"
    assert "MINARI_DATASETS_PATH" not in os.environ


def test_what_is_no_data_set_is_refused_and_can_be_replaced(library):
    folder = library / "local" / "maze2d" / "umaze-v0" / "data"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"is no data set .*--overwrite"):
        collect_little()
    (folder / "metadata.json").write_text(json.dumps({"dataset_id": "local/maze2d/umaze-v0"}))
    with pytest.raises(DataError, match="total_steps"):
        collect_little()
    assert collect_little(overwrite=True).collected


@pytest.mark.parametrize(
    "change", [{"task": "maze2d-huge"}, {"suite": "antmaze"}, {"task": "hopper", "suite": "locomotion"}]
)
def test_a_task_that_cannot_be_collected_names_those_that_can(change):
    task = dataclasses.replace(tasks.find("maze2d-umaze"), **change)
    with pytest.raises(ConfigError, match=r"maze2d-medium.*pointmaze-large"):
        collect(task, num_steps=10, seed=0)


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"seed": -1}, {"num_reference_episodes": 0}])
def test_numbers_out_of_range_are_refused_before_anything_is_made(library, wrong):
    with pytest.raises(ConfigError, match="wanted steps >= 1"):
        collect(tasks.find("maze2d-umaze"), **{"num_steps": 10, "seed": 0, **wrong})
    assert not library.exists()


@pytest.mark.parametrize("module", ["mujoco", "gymnasium_robotics"])
def test_without_the_simulator_the_message_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResourceError, match=r'pip install "gymnasium-robotics>='):
        collect_little()
