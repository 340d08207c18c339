"""D4RL's files: cut as D4RL cuts, in D4RL's frames and dynamics, and all 36 tasks from file or Minari set to score."""

from importlib.resources import files

import gymnasium
import h5py
import minari
import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aepo import cli, tasks
from aepo.data.d4rl import (
    GOAL_CELLS,
    LAYOUTS,
    D4RLAnt,
    KitchenPositions,
    episode_bounds,
    import_file,
    make_evaluation_environment,
)
from aepo.data.transitions import load_transitions
from aepo.environments import register_robotics
from aepo.errors import DataError
from tests.families import D4RL, map_of, write_file

# -- episodes ----------------------------------------------------------------------------------------------


def d4rl_view(observations, terminals, timeouts, horizon):
    """D4RL's q-learning view, told row by row: (row, terminal) of each transition."""
    rows, step = [], 0
    for i in range(len(observations) - 1):
        last = bool(timeouts[i]) if timeouts is not None else step == horizon - 1
        if last:
            step = 0
        else:
            if terminals[i]:
                step = 0
            rows.append((i, bool(terminals[i])))
            step += 1
    return rows


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=40), st.booleans(), st.integers(1, 7))
def test_episodes_hold_the_transitions_of_d4rls_q_learning_view(flags, with_timeouts, horizon):
    timeouts = np.array([flag for flag, _ in flags]) if with_timeouts else None
    terminals = np.array([number == 0 for _, number in flags])
    bounds = episode_bounds(terminals, timeouts, horizon)
    rows = [row for start, stop in bounds for row in range(start, stop)]
    assert [(row, bool(terminals[row])) for row in rows] == d4rl_view(terminals, terminals, timeouts, horizon)
    for start, stop in bounds:
        assert stop > start
        assert not terminals[start : stop - 1].any()


def test_an_import_gives_the_views_transitions_bit_for_bit(tmp_path):
    path = write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2")
    import_file(path, tasks.find("hopper-medium-v2"))
    with h5py.File(path) as file:
        fields = {name: file[name][()] for name in file}
    view = d4rl_view(fields["observations"], fields["terminals"], fields["timeouts"], 1000)
    rows = [row for row, _ in view]
    data = load_transitions("local/d4rl/hopper-medium-v2", reward_rule="raw")
    states, actions, rewards, terminals, following = np.split(data.rows_ND.numpy(), [11, 14, 15, 16], axis=1)
    np.testing.assert_array_equal(states, fields["observations"][rows])
    np.testing.assert_array_equal(actions, fields["actions"][rows])
    np.testing.assert_array_equal(rewards[:, 0], fields["rewards"][rows])
    np.testing.assert_array_equal(terminals[:, 0].astype(bool), [terminal for _, terminal in view])
    for i, (row, terminal) in enumerate(view):  # a terminal state is in next_observations only
        wanted = fields["next_observations"][row] if terminal else fields["observations"][row + 1]
        np.testing.assert_array_equal(following[i], wanted)
    assert 0 < terminals.sum() < 5


def test_a_file_without_timeouts_is_cut_by_the_horizon(tmp_path):
    path = write_file(tmp_path / "k.hdf5", "kitchen-complete-v0", 600, terminals=np.zeros(600, bool))
    summary = import_file(path, tasks.find("kitchen-complete-v0"))
    assert (summary.num_episodes, summary.num_steps) == (3, 279 + 279 + 39)


# -- frames and dynamics -----------------------------------------------------------------------------------


def simulate_d4rl_point(maze, start, velocity, actions):
    """D4RL's point maze as its source describes it: cell (i, j) stands at (i + 1, j + 1) m, position 0 at 1.2 m."""
    walls = "".join(
        f'<geom type="box" pos="{i + 1} {j + 1} 0" size="0.5 0.5 0.2" contype="2" conaffinity="1"/>'
        for i, j in np.argwhere(maze == "#")
    )
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><compiler inertiafromgeom="true"/>
        <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
        <default><joint damping="1"/>
        <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/></default>
        <worldbody>{walls}<body pos="1.2 1.2 0"><geom type="sphere" size="0.1" contype="1"/>
        <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/></body></worldbody>
        <actuator><motor joint="x" gear="100" ctrlrange="-1 1" ctrllimited="true"/>
        <motor joint="y" gear="100" ctrlrange="-1 1" ctrllimited="true"/></actuator></mujoco>"""
    )
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = start, velocity
    states = []
    for action in actions:
        data.qvel[:] = np.clip(data.qvel, -5, 5)
        data.ctrl[:] = action
        mujoco.mj_step(model, data)
        states.append([*data.qpos, *data.qvel])
    return np.array(states)


@pytest.mark.parametrize("task", ["maze2d-umaze-v1", "maze2d-medium-dense-v1", "maze2d-large-v1"])
def test_a_point_moves_and_bumps_into_walls_as_in_d4rl(task):
    row = tasks.find(task)
    maze, layout = map_of(row.env_id), LAYOUTS["maze2d"]
    env = make_evaluation_environment(row)
    rng = np.random.default_rng(1)
    cells = np.argwhere(maze != "#")
    for cell in cells[rng.permutation(len(cells))[:6]]:
        start = cell + rng.uniform(-0.1, 0.1, 2)
        actions = rng.uniform(-1, 1, (20, 2)).repeat(15, axis=0)
        exact = layout.observe(row, simulate_d4rl_point(maze, start, [0.3, -0.2], actions), None)
        env.reset(seed=0)
        ours = layout.observe(row, np.array([[*start, 0.3, -0.2]]), None)[0]
        env.unwrapped.point_env.set_state(ours[:2], ours[2:])
        moved = np.array([env.step(action.astype(np.float32))[0] for action in actions])
        np.testing.assert_allclose(moved[:, :2], exact[:, :2], atol=0.02)
    env.close()


def test_a_points_goal_is_where_d4rl_pays():
    for task in D4RL:
        row = tasks.find(task)
        if row.suite != "maze2d":
            continue
        env = make_evaluation_environment(row)
        (goal,) = np.argwhere(map_of(row.env_id) == "G")
        centre = LAYOUTS["maze2d"].observe(row, np.array([[*goal, 0.0, 0.0]]), None)[0, :2]
        for seed in range(20):
            env.reset(seed=seed)
            assert np.abs(env.unwrapped.goal - centre).max() <= 0.25 + 0.2  # and D4RL's goal is 0.2 off the centre
        env.close()


@pytest.mark.parametrize("task", [task for task in D4RL if task.startswith("antmaze")])
def test_an_ant_starts_and_meets_walls_and_goals_where_d4rl_has_them(task):
    row, maze = tasks.find(task), map_of(tasks.find(task).env_id)
    env = make_evaluation_environment(row)

    def place(cells):
        """D4RL: column j and row i stand at (4 j - 4, 4 i - 4) m; then our frame."""
        centres = 4.0 * (np.asarray(cells, float)[:, ::-1] - 1)
        return LAYOUTS["antmaze"].observe(row, np.pad(centres, ((0, 0), (0, 27))), None)["achieved_goal"]

    model = env.unwrapped.ant_env.model
    blocks = [i for i in range(model.ngeom) if "block" in model.geom(i).name]
    ours = {tuple(np.round(model.geom_pos[i][:2], 3)) for i in blocks}
    assert ours == {tuple(np.round(centre, 3)) for centre in place(np.argwhere(maze == "#"))}
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        assert np.abs(observation["achieved_goal"] - place([(1, 1)])[0]).max() <= 1.0 + 1e-6
        assert np.abs(observation["desired_goal"] - place(np.argwhere(maze == "G"))[0]).max() <= 1.0 + 1e-6
    env.close()


def test_an_ant_moves_as_d4rls_does():
    """D4RL's ant is Gymnasium's with motors of 30 Nm and a physics step of 0.02 s."""
    xml = files("gymnasium").joinpath("envs/mujoco/assets/ant.xml").read_text()
    for old, new in (('gear="150"', 'gear="1"'), ("-1.0 1.0", "-30 30"), ('timestep="0.01"', 'timestep="0.02"')):
        assert old in xml
        xml = xml.replace(old, new)
    model = mujoco.MjModel.from_xml_string(xml)
    old = mujoco.MjData(model)
    env = make_evaluation_environment(tasks.find("antmaze-umaze-v2"))
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    inner = env.unwrapped.ant_env
    home = inner.data.qpos[:2].copy()
    for trial in range(3):
        qpos = inner.init_qpos.copy()
        qpos[2] = 5.0  # in the air: contacts are another matter, D4RL's are softer
        qpos[7:] = np.array([0, 0.87, 0, -0.87, 0, -0.87, 0, 0.87]) + rng.uniform(-0.1, 0.1, 8)  # hip, ankle, ...
        old.qpos[:], old.qvel[:] = qpos, 0
        mujoco.mj_forward(model, old)
        inner.set_state(np.concatenate([home, qpos[2:]]), np.zeros(14))
        for _ in range(4):
            action = rng.uniform(-0.2, 0.2, 8)  # within the limits of the joints, which are softer too
            old.ctrl[:] = 30 * action
            mujoco.mj_step(model, old, 5)
            env.step(action)
        np.testing.assert_allclose(inner.data.qpos[7:], old.qpos[7:], atol=1e-3, err_msg=str(trial))
        assert np.abs(inner.data.qpos[7:] - qpos[7:]).max() > 0.05  # it did move
    env.close()


def test_a_kitchen_is_seen_by_its_positions():
    env = make_evaluation_environment(tasks.find("kitchen-mixed-v0"))
    inner = env.unwrapped
    inner.object_noise_ratio = inner.robot_env.robot_noise_ratio = 0.0
    env.reset(seed=0)
    for _ in range(5):
        observation, *_ = env.step(env.action_space.sample())
        np.testing.assert_allclose(observation, inner.data.qpos, atol=1e-9)
    assert set(inner.goal) == {"microwave", "kettle", "bottom burner", "light switch"}
    assert observation in env.observation_space
    env.close()


@pytest.mark.parametrize("name", GOAL_CELLS)
def test_the_registered_mazes_are_d4rls(name):
    register_robotics()
    maze = map_of(name)
    registered = gymnasium.spec(next(i for i in gymnasium.registry if i.startswith(name))).kwargs["maze_map"]
    np.testing.assert_array_equal(np.array([[cell == 1 for cell in line] for line in registered]), maze == "#")
    assert [GOAL_CELLS[name]] == [tuple(cell) for cell in np.argwhere(maze == "G")]


def test_the_wrappers_are_stored_with_the_data_set(tmp_path):
    import_file(write_file(tmp_path / "a.hdf5", "antmaze-umaze-v2"), tasks.find("antmaze-umaze-v2"))
    import_file(write_file(tmp_path / "k.hdf5", "kitchen-mixed-v0"), tasks.find("kitchen-mixed-v0"))
    for name, wrapper in (("antmaze-umaze-v2", D4RLAnt), ("kitchen-mixed-v0", KitchenPositions)):
        env = minari.load_dataset(f"local/d4rl/{name}").recover_environment(eval_env=True)
        assert isinstance(env, wrapper)
        env.close()
    assert minari.load_dataset("local/d4rl/antmaze-umaze-v2")[0].observations["desired_goal"].shape[1] == 2


# -- files that are none -----------------------------------------------------------------------------------


def spoiled(name, place, value):
    """Return changes that write one value into a field of a good file."""

    def change(path):
        with h5py.File(path, "r+") as file:
            file[name][place] = value

    return change


def without(name):
    def change(path):
        with h5py.File(path, "r+") as file:
            del file[name]

    return change


def instead(name, array):
    def change(path):
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = array

    return change


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGED = {
    "truncated": (half, "cannot be read as HDF5"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as HDF5"),
    "text": (lambda path: path.write_text("<html>404</html>"), "cannot be read as HDF5"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no file"),
    "missing": (lambda path: path.unlink(), "no file"),
    "no actions": (without("actions"), "no actions; a D4RL file has observations, actions"),
    "observations nan": (spoiled("observations", (7, 2), np.nan), "observations: a value that is not finite.* row 7"),
    "rewards inf": (spoiled("rewards", 0, np.inf), "rewards: a value that is not finite, the first in row 0"),
    "actions nan": (spoiled("actions", (299, 0), np.nan), "actions: a value that is not finite.* row 299"),
    "actions outside": (spoiled("actions", (5, 1), 1.5), "rows 0 to 70: actions: 1 values outside"),
    "successor nan": (spoiled("next_observations", (70, 0), -np.inf), "next_observations: a value"),
    "beyond float32": (
        instead("rewards", np.full(300, 1e39)),
        "rewards: a value that is not finite, the first in row 0",
    ),
    "half a flag": (instead("timeouts", np.full(300, 0.5)), "timeouts: 0.5, wanted 0 or 1"),
    "short rewards": (instead("rewards", np.zeros(299)), r"rewards: shape \(299,\), wanted 300 rows"),
    "short terminals": (instead("terminals", np.zeros((300, 2), bool)), "terminals: shape"),
    "short successors": (instead("next_observations", np.zeros((299, 11))), "next_observations: shape"),
    "no rows": (instead("observations", np.zeros((0, 11))), r"observations: shape \(0, 11\)"),
    "flat": (instead("observations", np.zeros(300)), "observations: shape"),
    "of another task": (instead("observations", np.zeros((300, 17))), "have 17 entries, those of hopper-medium-v2"),
    "wide actions": (instead("actions", np.zeros((300, 6))), "actions have 6 entries"),
    "strings": (instead("rewards", np.array([b"a"] * 300)), "rewards is of type .S1, wanted an array of numbers"),
    "no transition": (instead("timeouts", np.ones(300, bool)), "no transition"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_file_and_field_and_leaves_nothing(damage, tmp_path, capsys):
    change, message = DAMAGED[damage]
    path = write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2")
    change(path)
    with pytest.raises(DataError, match=message) as refused:
        import_file(path, tasks.find("hopper-medium-v2"))
    assert str(path) in str(refused.value)
    assert cli.run(["data", "import", "d4rl", str(path), "--task", "hopper-medium-v2"]) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert minari.list_local_datasets() == {}


def test_the_mean_return_of_large_rewards_is_their_mean(tmp_path):
    path = write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2", rewards=np.full(300, 3e38, np.float32))
    assert 1e40 < import_file(path, tasks.find("hopper-medium-v2")).mean_return < 1e41


def test_actions_outside_are_clipped_when_asked(tmp_path):
    path = write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2")
    spoiled("actions", (5, 1), 1.5)(path)
    import_file(path, tasks.find("hopper-medium-v2"), clip_actions=True)
    assert load_transitions("local/d4rl/hopper-medium-v2").rows_ND[5, 12] == 1.0


def test_a_file_of_another_maze_or_length_is_told_of(tmp_path, capsys):
    path = write_file(tmp_path / "maze.hdf5", "maze2d-umaze-v1")
    doubts = import_file(path, tasks.find("maze2d-large-v1")).warnings
    assert "of the positions lie in walls of PointMaze_Large-v3: another maze's file?" in doubts[1]
    moved = write_file(tmp_path / "moved.hdf5", "maze2d-umaze-v1", observations=np.full((300, 4), 1.0) * [2, 1, 0, 0])
    doubts = import_file(moved, tasks.find("maze2d-umaze-v1")).warnings
    assert "100 % of the positions lie in walls of PointMaze_UMaze-v3" in doubts[1]
    assert "300 rows, the published file of maze2d-umaze-v1 has 1,000,000" in doubts[0]
    assert "warning" in capsys.readouterr().err


def test_a_data_set_that_is_there_is_replaced_only_when_asked(tmp_path):
    path, task = write_file(tmp_path / "hopper.hdf5", "hopper-medium-v2"), tasks.find("hopper-medium-v2")
    import_file(path, task)
    with pytest.raises(DataError, match=r"is there: .*--overwrite"):
        import_file(path, task)
    write_file(path, "hopper-medium-v2", 250)
    assert import_file(path, task, overwrite=True).num_rows == 250
    assert minari.load_dataset(task.dataset).total_steps < 250
    with pytest.raises(DataError, match="is no D4RL file"):
        import_file(path, tasks.find("hopper-medium-v2", "minari"))
