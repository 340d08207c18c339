"""Data of PointMaze environments, collected here: shortest paths, a PD controller, noise on its actions.

The published files come from an old simulator (D4RL) or must be downloaded (Minari); this makes data of the
same kind from gymnasium-robotics alone. They are not the published data: a score on them is no D4RL score.

One continuing run feeds both protocols, which differ in how it is cut, seen and paid:

    maze2d      D4RL (arXiv 2004.07219): the goal that the controller pursues is hidden, and rewards are
                relabelled for one evaluation goal. The learner must stitch its way from other journeys.
    pointmaze   Minari (D4RL/pointmaze): the goal is observed, and an episode ends where it is reached.

N = steps of the run, T = steps of an episode, S = 4 entries of a state (x, y in m; vx, vy in m/s), A = 2 of
an action (force, -1..1), X = 2 of a position. An array's name ends in its shape. This module does not know
what learns from the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import os
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import aepo
from aepo.console import err
from aepo.errors import ConfigError, DataError, ResourceError
from aepo.tasks import Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

Cell: TypeAlias = tuple[int, int]
"""Row and column of a maze's map, counted from its upper left corner."""
Position: TypeAlias = tuple[float, float]
"""x and y in metres; the map's centre is the origin and a cell is 1 m wide."""
Policy: TypeAlias = Callable[[Sequence[float]], Sequence[float]]
"""State (x, y, vx, vy) -> action."""

GOAL_RADIUS = 0.45
"""Metres from a goal within which a state is paid and the goal counts as reached; gymnasium-robotics' own."""
POSITION_GAIN, VELOCITY_GAIN = 10.0, -1.0
"""Force per metre to the way-point and per m/s: D4RL's. Stronger damping only lowered the reference score."""
NOISE_STD = 0.5
"""Standard deviation of the Gaussian noise on each entry of an action, before clipping to -1..1; D4RL's."""
EPISODE_STEPS = 1_000
"""Steps of a maze2d data episode: few and long ones, because Minari reads 3 ms per episode."""
REFERENCE_SEED = 0
"""Seeds the reference episodes. They describe the evaluation, not the data: all seeds share one scale."""
REQUIREMENTS = ("gymnasium-robotics>=1.4.2,<1.5", "mujoco>=3.3.7,<3.12")
"""As in pyproject.toml; stored in the data set, so that Minari warns where it is used with others."""
CHUNK_STEPS, CHUNK_EPISODES = 1_000, 100
"""Environment steps and written episodes between two updates of a progress bar."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Maze:
    """A registered environment, and the cell of its map that evaluation pays for."""

    env_id: str
    goal_cell: Cell
    """Where D4RL's map of the same maze says G."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A continuing run: one reset before its first state, a new random goal wherever one is reached."""

    states_NS: Floats
    """N + 1 rows: step t leads from row t to row t + 1."""
    actions_NA: NDArray[np.float32]
    goals_NX: Floats
    """The goal that was pursued during each step."""
    reached_N: NDArray[np.bool_]
    """True where the state after the step is within the arrival radius of that goal."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a run becomes a data set, and what an agent sees of it."""

    wrap: Callable[[Any], Any]
    """Gives an environment the observations that the data set holds."""
    ends: Callable[[Run], NDArray[np.intp]]
    """The index after the last step of each episode, rising to N."""
    observations: Callable[[Floats, Floats], Any]
    """Of an episode, from its T + 1 states and as many goals."""
    rewards: Callable[[Run, Position], Floats]
    """Of each step, from the run and the centre of the evaluation goal's cell."""
    arrival_radius: float
    """Metres from the goal within which the run turns to a new one; at most GOAL_RADIUS."""
    max_episode_steps: int
    """Time limit of the environment that the data set names as its origin; -1 = none."""
    description: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CollectSummary:
    """A collected data set. What a data set of another origin does not say is NaN or None."""

    dataset: str
    """Minari id."""
    path: str
    """Its folder."""
    collected: bool
    """False: it was there before and has been left alone."""
    num_steps: int
    num_episodes: int
    seed: int | None
    mean_return: float
    """Over the data's episodes."""
    ref_min: float
    """Mean return of the uniform random policy in the evaluation environment: score 0."""
    ref_max: float
    """Mean return of the noiseless controller, which knows the goal, in the same environment: score 100."""
    env_steps_per_s: float
    """Of the data run."""
    collect_s: float
    """Wall-clock seconds of the data run."""
    reference_s: float
    """Wall-clock seconds of the reference episodes."""
    write_s: float
    """Wall-clock seconds of writing."""


class Navigator:
    """The shortest paths of a maze, and the controller that follows them.

    It has no memory: an action depends on state and goal only. The way-point is the centre of the next cell
    on a shortest path, or the goal where that cell is the goal's. Two cells that share a side are a rectangle
    without a wall in it, so the straight line to the way-point is always free.

    Args:
        maze_map: rows of cells, 1 = wall, all else free (as in `gymnasium_robotics.envs.maze.maps`).
    """

    def __init__(self, maze_map: Sequence[Sequence[int | str]]) -> None:
        self.num_rows, self.num_columns = len(maze_map), len(maze_map[0])
        self.free_cells = frozenset(
            (row, column) for row, line in enumerate(maze_map) for column, cell in enumerate(line) if cell != 1
        )
        self._next_cells = {goal: self._search(goal) for goal in self.free_cells}

    def centre(self, cell: Cell) -> Position:
        """Return the centre of a cell."""
        return cell[1] + 0.5 - self.num_columns / 2, self.num_rows / 2 - cell[0] - 0.5

    def cell(self, position: Position) -> Cell:
        """Return the cell around a position."""
        return math.floor(self.num_rows / 2 - position[1]), math.floor(position[0] + self.num_columns / 2)

    def next_cell(self, cell: Cell, goal: Cell) -> Cell:
        """Return the cell after `cell` on a shortest path to `goal`; after the goal comes the goal."""
        return self._next_cells[goal][cell]

    def way_points(self, goal: Position) -> list[Position]:
        """Return the way-point to a goal for each cell, row by row; in a wall it is the goal."""
        goal_cell = self.cell(goal)
        table = [goal] * (self.num_rows * self.num_columns)
        for (row, column), following in self._next_cells[goal_cell].items():
            if following != goal_cell:
                table[row * self.num_columns + column] = self.centre(following)
        return table

    def act(self, state: Sequence[float], way_points: Sequence[Position]) -> tuple[float, float]:
        """Return the noiseless controller's action; `way_points` is the table of the goal."""
        x, y, vx, vy = state
        row, column = int(self.num_rows / 2 - y), int(x + self.num_columns / 2)
        way_x, way_y = way_points[row * self.num_columns + column]
        force_x = POSITION_GAIN * (way_x - x) + VELOCITY_GAIN * vx
        force_y = POSITION_GAIN * (way_y - y) + VELOCITY_GAIN * vy
        return min(max(force_x, -1.0), 1.0), min(max(force_y, -1.0), 1.0)

    def _search(self, goal: Cell) -> dict[Cell, Cell]:
        """Return the next cell from every cell that can reach the goal, breadth first from the goal."""
        following, queue = {goal: goal}, deque([goal])
        while queue:
            row, column = cell = queue.popleft()
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in self.free_cells and near not in following:
                    following[near] = cell
                    queue.append(near)
        return following


def _hide_goal(env: Any) -> Any:
    from gymnasium.wrappers import FilterObservation, FlattenObservation

    return FlattenObservation(FilterObservation(env, ["observation"]))


def _ends_by_length(run: Run) -> NDArray[np.intp]:
    num_steps = len(run.actions_NA)
    return np.append(np.arange(EPISODE_STEPS, num_steps, EPISODE_STEPS), num_steps)


def _ends_by_arrival(run: Run) -> NDArray[np.intp]:
    return np.union1d(np.flatnonzero(run.reached_N) + 1, [len(run.actions_NA)])


def _goal_observations(states_TS: Floats, goals_TX: Floats) -> dict[str, Floats]:
    return {"observation": states_TS, "achieved_goal": states_TS[:, :2], "desired_goal": goals_TX}


def _relabelled_rewards(run: Run, goal: Position) -> Floats:
    distance_N = np.hypot(run.states_NS[1:, 0] - goal[0], run.states_NS[1:, 1] - goal[1])
    return np.where(distance_N <= GOAL_RADIUS, 1.0, 0.0)


PROTOCOLS = {
    "maze2d": Protocol(
        wrap=_hide_goal,
        ends=_ends_by_length,
        observations=lambda states_TS, _: states_TS,
        rewards=_relabelled_rewards,
        arrival_radius=0.1,  # D4RL's controller; so the data show how to brake at a goal
        max_episode_steps=EPISODE_STEPS,
        description="D4RL's maze2d protocol: observations are x, y, vx, vy without the goal; the reward is 1 "
        f"where the state after the step is within {GOAL_RADIUS} m of the centre of the evaluation goal's "
        f"cell, whatever goal was pursued; episodes are truncated slices of {EPISODE_STEPS} steps.",
    ),
    "pointmaze": Protocol(
        wrap=lambda env: env,
        ends=_ends_by_arrival,
        observations=_goal_observations,
        rewards=lambda run, _: run.reached_N.astype(np.float64),
        arrival_radius=GOAL_RADIUS,
        max_episode_steps=-1,
        description="Minari's pointmaze protocol: the goal is observed; reaching it pays 1 and truncates the "
        "episode; the next one goes on from there towards a new goal.",
    ),
}
"""By suite."""

_UMAZE = Maze(env_id="PointMaze_UMaze-v3", goal_cell=(1, 1))
_MEDIUM = Maze(env_id="PointMaze_Medium-v3", goal_cell=(6, 6))
_LARGE = Maze(env_id="PointMaze_Large-v3", goal_cell=(7, 9))
_OPEN = Maze(env_id="PointMaze_Open-v3", goal_cell=(2, 3))

MAZES = {
    "maze2d-open": _OPEN,
    "maze2d-umaze": _UMAZE,
    "maze2d-medium": _MEDIUM,
    "maze2d-large": _LARGE,
    "pointmaze-open": _OPEN,
    "pointmaze-umaze": _UMAZE,
    "pointmaze-medium": _MEDIUM,
    "pointmaze-large": _LARGE,
}
"""By task: all that can be collected."""


def collect(
    task: Task, *, num_steps: int, seed: int, num_reference_episodes: int = 100, overwrite: bool = False
) -> CollectSummary:
    """Collect the data set of a task and return what was made; one that is there is left alone.

    The data set appears under its name when it is complete. Until then it lies in a hidden folder of Minari's
    library, and MINARI_DATASETS_PATH and `tempfile.tempdir` of this process point there: one call per process
    at a time. The same arguments give the same arrays.

    Args:
        task: a row of the task table that MAZES and PROTOCOLS know.
        num_steps: environment steps to record, >= 1.
        seed: of start, goals and noise, >= 0; the reference scores do not depend on it.
        num_reference_episodes: episodes of `task.horizon` steps behind each reference score, >= 1.
        overwrite: replace a data set of this name.

    Raises:
        ConfigError: if the task cannot be collected or a number is out of range.
        DataError: if something that cannot be read lies where the data set belongs.
        ResourceError: if the environments cannot be imported.
    """
    if task.task not in MAZES or task.suite not in PROTOCOLS:
        raise ConfigError(
            f"{task.task!r} of suite {task.suite!r} cannot be collected; these tasks can: {', '.join(MAZES)}"
        )
    if num_steps < 1 or seed < 0 or num_reference_episodes < 1:
        raise ConfigError(
            f"wanted steps >= 1, seed >= 0 and reference episodes >= 1; "
            f"got {num_steps}, {seed} and {num_reference_episodes}"
        )
    _import_environments()
    from minari.storage.datasets_root_dir import get_dataset_path

    maze, protocol = MAZES[task.task], PROTOCOLS[task.suite]
    path = get_dataset_path(task.dataset).resolve()
    if path.exists() and not overwrite:
        found = _summary(path, collected=False)
        err.print(
            f"{found.dataset} is there ({found.num_steps:,} steps, seed {found.seed}) and was left alone; "
            "--overwrite replaces it",
            soft_wrap=True,
        )
        return found

    _make_namespace(task.dataset)
    with _scratch_library() as library, _progress() as progress:
        data_env, eval_env = _make_environments(task, maze, protocol)
        navigator = Navigator(data_env.unwrapped.maze.maze_map)
        clock_s = [time.perf_counter()]
        run = record(
            data_env.unwrapped,
            navigator,
            arrival_radius=protocol.arrival_radius,
            num_steps=num_steps,
            seed=seed,
            advance=_bar(progress, "collecting", num_steps),
        )
        clock_s.append(time.perf_counter())
        ref_min, ref_max = measure_references(
            eval_env.unwrapped,
            navigator,
            horizon=task.horizon,
            num_episodes=num_reference_episodes,
            advance=_bar(progress, "reference scores", 2 * num_reference_episodes * task.horizon),
        )
        clock_s.append(time.perf_counter())
        rewards_N, ends = protocol.rewards(run, navigator.centre(maze.goal_cell)), protocol.ends(run)
        dataset = _write(
            _episodes(run, rewards_N, ends, protocol),
            advance=_bar(progress, "writing", len(ends)),
            dataset_id=task.dataset,
            env=data_env,
            eval_env=eval_env,
            algorithm_name=f"shortest path, PD controller, action noise {NOISE_STD}",
            author=f"aepo {aepo.__version__}",
            ref_min_score=ref_min,
            ref_max_score=ref_max,
            num_episodes_average_score=num_reference_episodes,
            description=f"Collected in {maze.env_id} by `aepo data collect {task.task} --steps {num_steps} "
            f"--seed {seed}`: not a published D4RL or Minari file. {protocol.description}",
            requirements=list(REQUIREMENTS),
        )
        clock_s.append(time.perf_counter())
        collect_s, reference_s, write_s = (end - start for start, end in itertools.pairwise(clock_s))
        origin = {
            "seed": seed,
            "mean_return": float(rewards_N.sum()) / len(ends),
            "env_steps_per_s": num_steps / collect_s,
            "collect_s": collect_s,
            "reference_s": reference_s,
            "write_s": write_s,
        }
        dataset.storage.update_metadata({"aepo": origin})
        data_env.close()
        eval_env.close()
        publish = overwrite or not path.exists()  # or another process was faster
        if publish:
            if path.exists():
                path.rename(library / "replaced")
            (library / task.dataset).rename(path)
    return _summary(path, collected=publish)


def record(
    env: Any,
    navigator: Navigator,
    *,
    num_steps: int,
    seed: int,
    arrival_radius: float = GOAL_RADIUS,
    advance: Callable[[int], None] = lambda _: None,
) -> Run:
    """Return a continuing run of the noisy controller.

    Steps the environment's physics and lets it draw a new goal where one is reached: what `PointMazeEnv.step`
    does, but for the three distances that it computes at every step (they are 40 % of its time).

    Args:
        env: an unwrapped PointMazeEnv with `continuing_task` and `reset_target`.
        navigator: of its maze.
        num_steps: >= 1.
        seed: of start, goals and noise.
        arrival_radius: metres from the goal within which the next one is drawn, at most GOAL_RADIUS.
        advance: is told, now and then, how many steps were done.
    """
    run = Run(
        states_NS=np.empty((num_steps + 1, 4)),
        actions_NA=np.empty((num_steps, 2), dtype=np.float32),
        goals_NX=np.empty((num_steps, 2)),
        reached_N=np.zeros(num_steps, dtype=np.bool_),
    )
    noise = np.random.default_rng([seed, 1])  # not [seed]: that is the environment's own stream
    env.reset(seed=seed)
    step, hypot = env.point_env.step, math.hypot
    run.states_NS[0] = env.point_env.state_vector()
    state = run.states_NS[0].tolist()
    goal_x, goal_y = goal = tuple(env.goal.tolist())
    way_points = navigator.way_points(goal)
    for start in range(0, num_steps, CHUNK_STEPS):
        stop = min(start + CHUNK_STEPS, num_steps)
        noise_TA = noise.normal(scale=NOISE_STD, size=(stop - start, 2)).tolist()
        for t, (noise_x, noise_y) in enumerate(noise_TA, start):
            force_x, force_y = navigator.act(state, way_points)
            action_A = run.actions_NA[t]
            action_A[0] = min(max(force_x + noise_x, -1.0), 1.0)
            action_A[1] = min(max(force_y + noise_y, -1.0), 1.0)
            run.states_NS[t + 1] = state_S = step(action_A)[0]
            run.goals_NX[t] = goal
            state = state_S.tolist()
            if hypot(state[0] - goal_x, state[1] - goal_y) <= arrival_radius:
                run.reached_N[t] = True
                env.update_goal(state_S[:2])
                goal_x, goal_y = goal = tuple(env.goal.tolist())
                way_points = navigator.way_points(goal)
        advance(stop - start)
    return run


def measure_references(
    env: Any,
    navigator: Navigator,
    *,
    horizon: int,
    num_episodes: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, float]:
    """Return the mean returns of the uniform random policy and of the noiseless controller.

    The controller knows the goal of each episode, also where the protocol hides it from the learner.

    Args:
        env: an unwrapped PointMazeEnv with one goal cell and without `reset_target`.
        navigator: of its maze.
        horizon: steps of an episode; a return is the number of them that end within GOAL_RADIUS of the goal.
        num_episodes: per policy, >= 1.
        advance: is told, now and then, how many steps were done.
    """
    random = np.random.default_rng([REFERENCE_SEED, 1])

    def wander(_: Position) -> Policy:
        actions = iter(random.uniform(-1.0, 1.0, size=(horizon, 2)).tolist())
        return lambda _: next(actions)

    def pursue(goal: Position) -> Policy:
        return functools.partial(navigator.act, way_points=navigator.way_points(goal))

    step, hypot, means = env.point_env.step, math.hypot, []
    for policy_for in (wander, pursue):
        env.reset(seed=REFERENCE_SEED)  # both policies meet the same starts and goals
        num_paid = 0
        for _ in range(num_episodes):
            goal_x, goal_y = goal = tuple(env.goal.tolist())
            policy, state = policy_for(goal), env.point_env.state_vector().tolist()
            for _ in range(horizon):
                state = step(np.array(policy(state), dtype=np.float32))[0].tolist()
                num_paid += hypot(state[0] - goal_x, state[1] - goal_y) <= GOAL_RADIUS
            env.reset()
            advance(horizon)
        means.append(num_paid / num_episodes)
    return means[0], means[1]


def _import_environments() -> None:
    """Register the environments with gymnasium."""
    with contextlib.suppress(ImportError):  # a print at import, about the dense rewards of Adroit's v1 only
        importlib.import_module("farama_notifications").notifications.pop("gymnasium_robotics", None)
    try:
        for name in ("mujoco", "gymnasium_robotics", "minari"):
            importlib.import_module(name)
    except ImportError as error:
        wanted = " ".join(f'"{requirement}"' for requirement in REQUIREMENTS)
        raise ResourceError(f"no PointMaze here ({error}); pip install {wanted} minari") from error


def _make_environments(task: Task, maze: Maze, protocol: Protocol) -> tuple[Any, Any]:
    """Return the environments of the data and of the evaluation; Minari can store and rebuild both.

    gymnasium-robotics moves the evaluation's goal by up to 0.25 m in x and y from its cell's centre, anew for
    each episode; a ball at the centre is paid all the same. The start is in any other cell.
    """
    import gymnasium

    maze_map = gymnasium.spec(maze.env_id).kwargs["maze_map"]
    one_goal: list[list[int | str]] = [["r" if cell == 0 else cell for cell in line] for line in maze_map]
    row, column = maze.goal_cell
    assert one_goal[row][column] == "r", f"{maze.env_id}: no free cell at {maze.goal_cell}"
    one_goal[row][column] = "g"
    common: dict[str, Any] = {"reward_type": "sparse", "continuing_task": True}
    data_env = gymnasium.make(maze.env_id, max_episode_steps=protocol.max_episode_steps, reset_target=True, **common)
    eval_env = gymnasium.make(
        maze.env_id, max_episode_steps=task.horizon, reset_target=False, maze_map=one_goal, **common
    )
    return protocol.wrap(data_env), protocol.wrap(eval_env)


def _episodes(run: Run, rewards_N: Floats, ends: NDArray[np.intp], protocol: Protocol) -> Iterator[Any]:
    """Yield the run as Minari's episode buffers: none is terminated, each is truncated at its end."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    for start, end in itertools.pairwise([0, *ends.tolist()]):
        goals_TX = run.goals_NX[start:end]
        yield EpisodeBuffer(
            observations=protocol.observations(
                run.states_NS[start : end + 1], np.concatenate([goals_TX, goals_TX[-1:]])
            ),
            actions=run.actions_NA[start:end],
            rewards=rewards_N[start:end],
            terminations=np.zeros(end - start, dtype=np.bool_),
            truncations=np.arange(start + 1, end + 1) == end,
        )


def _write(episodes: Iterator[Any], *, advance: Callable[[int], None], **metadata: Any) -> Any:
    """Write a data set into Minari's library and return it."""
    import minari

    dataset: Any = None
    while chunk := list(itertools.islice(episodes, CHUNK_EPISODES)):
        if dataset is not None:
            dataset.update_dataset_from_buffer(chunk)
        else:
            with warnings.catch_warnings():
                for field in ("code_permalink", "author_email"):  # advice for publishers
                    warnings.filterwarnings("ignore", message=f"`{field}` is set to None", category=UserWarning)
                dataset = minari.create_dataset_from_buffers(buffer=chunk, **metadata)
        advance(len(chunk))
    return dataset


def _make_namespace(dataset_id: str) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)


@contextlib.contextmanager
def _scratch_library() -> Iterator[Path]:
    """Yield a hidden folder in Minari's library that this process takes for the library, then delete it.

    Minari lists no hidden folders: what a killed process leaves there never looks like a data set. The MuJoCo
    models that gymnasium-robotics leaves among the temporary files go with it.
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    library, tempdir = os.environ.get("MINARI_DATASETS_PATH"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".collecting-", dir=get_dataset_path()) as folder:
        os.environ["MINARI_DATASETS_PATH"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = tempdir
            if library is None:
                del os.environ["MINARI_DATASETS_PATH"]
            else:
                os.environ["MINARI_DATASETS_PATH"] = library


def _summary(path: Path, *, collected: bool) -> CollectSummary:
    from minari.dataset.minari_storage import MinariStorage

    measured = ("mean_return", "env_steps_per_s", "collect_s", "reference_s", "write_s")
    try:
        metadata = MinariStorage.read_raw_metadata(path / "data")
        origin = metadata.get("aepo", {})
        return CollectSummary(
            dataset=metadata["dataset_id"],
            path=str(path),
            collected=collected,
            num_steps=metadata["total_steps"],
            num_episodes=metadata["total_episodes"],
            ref_min=metadata.get("ref_min_score", math.nan),
            ref_max=metadata.get("ref_max_score", math.nan),
            seed=origin.get("seed"),
            **{name: origin.get(name, math.nan) for name in measured},
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no data set ({error}); --overwrite replaces it") from error


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def _bar(progress: Progress, description: str, total: int) -> Callable[[int], None]:
    return functools.partial(progress.advance, progress.add_task(description, total=total))
