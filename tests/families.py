"""Data of every task, small: files in D4RL's layout, and data sets as Minari stores them."""

import gymnasium
import h5py
import minari
import numpy as np
from minari.data_collector.episode_buffer import EpisodeBuffer

from aepo import tasks
from aepo.data.d4rl import LAYOUTS, make_evaluation_environment
from aepo.environments import register_robotics

WIDTHS = {
    "halfcheetah": (17, 6),
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "maze2d": (4, 2),
    "antmaze": (29, 8),
    "pen": (45, 24),
    "hammer": (46, 26),
    "door": (39, 28),
    "relocate": (39, 30),
    "kitchen": (60, 9),
}
"""Entries of observations and actions in D4RL's files."""

D4RL_MAPS = {
    # D4RL's own, # = wall, G = the evaluation goal; antmaze starts in row 1, column 1
    "PointMaze_UMaze": "##### #GOO# ###O# #OOO# #####",
    "PointMaze_Medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "PointMaze_Large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# "
    "##O#O#O#O### #OO#OOO#OGO# ############",
    "AntMaze_UMaze": "##### #OOO# ###O# #GOO# #####",
    "AntMaze_Medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "AntMaze_Large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# "
    "##O#O#O#O### #OO#OOO#OGO# ############",
}

D4RL = [row.task for row in tasks.rows() if row.source == "d4rl"]

MINARI = [row.task for row in tasks.rows() if row.source == "minari"]


def map_of(env_id):
    lines = next(text for name, text in D4RL_MAPS.items() if env_id.startswith(name)).split()
    return np.array([list(line) for line in lines])


def write_file(path, task, num_rows=300, *, timeouts=True, **changes):
    """Write a file in D4RL's layout; positions of mazes are in free cells."""
    rng = np.random.default_rng(0)
    state_dim, action_dim = WIDTHS[task.partition("-")[0]]
    row = tasks.find(task, "d4rl")
    fields = {
        "observations": rng.normal(size=(num_rows, state_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (num_rows, action_dim)).astype(np.float32),
        "rewards": (rng.random(num_rows) < 0.05).astype(np.float32),
        "terminals": np.arange(num_rows) % 71 == 70,
    }
    if row.suite in ("maze2d", "antmaze"):
        cells = np.argwhere(map_of(row.env_id) != "#")[rng.integers(0, 5, num_rows)]
        centres = cells if row.suite == "maze2d" else 4.0 * (cells[:, ::-1] - 1)
        fields["observations"][:, :2] = centres + rng.uniform(-0.1, 0.1, (num_rows, 2))
        fields["infos/goal"] = np.tile(centres[:1], (num_rows, 1)).astype(np.float32)
    if timeouts and row.suite != "kitchen":  # D4RL's kitchen files have none
        fields["timeouts"] = np.arange(num_rows) % 100 == 99
    if row.suite == "gym-mujoco":
        fields["next_observations"] = fields["observations"] + 0.5
    with h5py.File(path, "w") as file:
        for name, array in {**fields, **changes}.items():
            if array is not None:
                file[name] = array
    return path


def record_file(path, task, *, num_episodes=4, num_steps=25):
    """Write a file in D4RL's layout of the task's own environment, one episode with random, the next with slow actions.

    Positions go back to D4RL's frame. The last row of the first episode has a reward of 1 more: few find one by chance.
    """
    row = tasks.find(task, "d4rl")
    env, layout = make_evaluation_environment(row), LAYOUTS[row.suite]
    shift = layout.observe(row, np.zeros((1, 4)), None)[0, :2] if row.suite == "maze2d" else np.zeros(2)
    if row.suite == "antmaze":
        shift = layout.observe(row, np.zeros((1, 29)), np.zeros((1, 2)))["achieved_goal"][0]
    env.action_space.seed(0)
    fields = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": []}
    goals = []
    for episode in range(num_episodes):
        observation, _ = env.reset(seed=episode)
        for step in range(num_steps):
            action = env.action_space.sample()
            if episode % 2:
                action = (0.5 * np.sin(0.2 * step) * env.action_space.high).astype(action.dtype)
            fields["observations"].append(_as_in_d4rl(row, observation, shift))
            if row.suite == "antmaze":
                goals.append(observation["desired_goal"] - shift)
            observation, reward, terminated, _, _ = env.step(action)
            last = step == num_steps - 1
            fields["actions"].append(action)
            fields["rewards"].append(reward + (last and episode == 0))
            fields["terminals"].append(terminated)
            fields["timeouts"].append(last and not terminated)
            if terminated:
                break
    env.close()
    arrays = {name: np.array(values) for name, values in fields.items()}
    if row.suite == "kitchen":  # D4RL's files have none
        arrays["terminals"] |= arrays.pop("timeouts")
    arrays |= {"infos/goal": np.array(goals)} if goals else {}
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array.astype(np.float32) if array.dtype == np.float64 else array
    return path


def _as_in_d4rl(row, observation, shift):
    if row.suite == "antmaze":
        return np.concatenate([observation["achieved_goal"] - shift, observation["observation"]])
    if row.suite == "maze2d":
        return np.concatenate([observation[:2] - shift, observation[2:]])
    return np.concatenate([observation, np.zeros(30)]) if row.suite == "kitchen" else observation


def write_minari(dataset_id, row):
    """Random actions in the real environment, stored as Minari stores them."""
    register_robotics()
    common = {"disable_env_checker": True}
    if row.suite == "maze2d":
        env = gymnasium.make(row.env_id, max_episode_steps=1_000_000, reset_target=True, **common)
        eval_env = gymnasium.make(row.env_id, max_episode_steps=row.horizon, **common)
    else:
        env = gymnasium.make(row.env_id, max_episode_steps=row.horizon, **common)
        eval_env = None
    env.action_space.seed(0)
    buffers = []
    for episode in range(3):
        observations, fields = [env.reset(seed=episode)[0]], []
        while len(fields) < 25 and not (fields and fields[-1][2]):
            action = env.action_space.sample()
            observation, reward, terminated, _, _ = env.step(action)
            observations.append(observation)
            fields.append((action, float(reward), bool(terminated), False))
        actions, rewards, terminations, _ = map(np.array, zip(*fields, strict=True))
        ends = np.arange(1, len(rewards) + 1) == len(rewards)
        buffers.append(
            EpisodeBuffer(
                id=episode,
                observations=stack(observations),
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=ends & ~terminations,
            )
        )
    minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        env=env,
        eval_env=eval_env,
        algorithm_name="random",
        author="tests",
        author_email="t@example.org",
        code_permalink="tests",
        description="random actions",
    )
    env.close()


def stack(observations):
    if isinstance(observations[0], dict):
        return {key: stack([each[key] for each in observations]) for key in observations[0]}
    return np.array(observations)
