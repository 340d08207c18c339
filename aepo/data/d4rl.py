"""D4RL's original HDF5 files as Minari data sets (arXiv 2004.07219).

A file holds one array per field over N rows, of which `terminals` and `timeouts` end episodes. They become the
transitions of D4RL's own q-learning view: a row with a timeout has no successor and is dropped, so is the last row.

Evaluation is in today's environments. Where D4RL's had another frame, robot or view, positions are shifted or the
environment is made to fit, so that a state and an action of the file mean the same in it:

    maze2d    D4RL counts positions from a corner, rows of the map along x: shifted, and the map is turned.
    antmaze   positions shifted, the map mirrored; D4RL's ant has a fifth of the torque and twice the control step.
    kitchen   D4RL shows 9 joint and 21 object positions, and a goal that never changes, which is left out.

What remains different: goals lie anywhere within 0.25 (PointMaze) or 1 m (AntMaze) of their cell's centre, they are
reached at 0.45 m instead of 0.5 m, the ant's contacts are stiffer, and the simulator is a newer one.

N = rows of the file, S = entries of an observation, A = of an action. This module does not know what learns from it.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
import h5py
import numpy as np
import psutil
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import FilterObservation, FlattenObservation
from numpy.typing import NDArray

import aepo
from aepo import tasks
from aepo.console import say, warn
from aepo.data.episodes import DAMAGE, action_bounds, find_problems, one_line
from aepo.data.pointmaze import REQUIREMENTS
from aepo.data.staging import library_path, progress_bars, say_left_alone, staged, write_episodes
from aepo.environments import register_robotics
from aepo.errors import DataError, ResourceError
from aepo.tasks import Task

Floats: TypeAlias = NDArray[np.floating[Any]]
MazeMap: TypeAlias = list[list[int | str]]
FIELDS = ("observations", "actions", "rewards", "terminals")
OPTIONAL_FIELDS = ("timeouts", "next_observations", "infos/goal")
ANT_CELL = 4.0
"""Metres of a side of an AntMaze cell."""
ANT_TORQUE, ANT_FRAME_SKIP = 30.0 / 150.0, 10
"""D4RL's ant: 30 Nm instead of 150, and a control step of 0.1 s instead of 0.05 s (its assets/ant.xml)."""
ANT_START = (1, 1)
GOAL_CELLS = {
    "PointMaze_UMaze": (1, 1),
    "PointMaze_Medium": (6, 6),
    "PointMaze_Large": (7, 9),
    "AntMaze_UMaze": (3, 1),
    "AntMaze_Medium": (6, 6),
    "AntMaze_Large": (7, 9),
}
"""Row and column of the evaluation goal, where D4RL's map of the maze says G, by the beginning of the Gymnasium id."""
POINT_OFFSET = 0.2
"""D4RL's point stands at 1.2 m when its position is 0, in the middle of a cell would be 1 m (its maze_model.py)."""
LIGHT_SLIDER = ("microwave", "kettle", "light switch", "slide cabinet")
KITCHEN_SUBTASKS = {
    "kitchen-complete-v0": LIGHT_SLIDER,
    "kitchen-partial-v0": LIGHT_SLIDER,
    "kitchen-mixed-v0": ("microwave", "kettle", "bottom burner", "light switch"),
}
MAX_IN_WALLS = 0.01
"""Share of positions inside walls above which the import warns."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImportSummary:
    """A D4RL file that has become a Minari data set."""

    task: str
    dataset: str
    """Minari id."""
    path: str
    """Folder of the data set."""
    file: str
    num_rows: int
    """Rows of the file."""
    published_num_rows: int | None
    """Rows of the published file, if known."""
    num_steps: int
    """Transitions: the rows that have a successor or are terminal."""
    num_episodes: int
    mean_return: float
    """Mean over the episodes of the sum of rewards as stored."""
    env_id: str
    ref_min: float | None
    ref_max: float | None
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a suite's files are seen, and in which environment policies trained on them act."""

    environment: Callable[[Task], Any]
    observe: Callable[[Task, Floats, Floats | None], Any] = lambda _, observations_NS, __: observations_NS
    """(task, D4RL's observations, goals) -> observations of the environment."""
    width: int | None = None
    """Entries of D4RL's observation, where it is not the environment's."""
    positions: Callable[[Any], Floats] | None = None
    """Observations of the environment -> positions in the maze, [N, 2]."""


class D4RLAnt(gymnasium.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """An AntMaze in which an action moves the ant as in D4RL: a fifth of the torque for twice the time."""

    def __init__(self, env: gymnasium.Env[Any, Any]):
        """Take an AntMaze-v4."""
        RecordConstructorArgs.__init__(self)
        gymnasium.ActionWrapper.__init__(self, env)
        env.unwrapped.ant_env.frame_skip = ANT_FRAME_SKIP  # type: ignore[attr-defined]

    def action(self, action: Any) -> Any:
        """Return the action of the inner environment."""
        return ANT_TORQUE * np.asarray(action)


class KitchenPositions(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """A FrankaKitchen seen as in D4RL: 9 joint positions and 21 object positions, no velocities, no goal."""

    COLUMNS = np.r_[0:9, 18:39]
    """Columns kept of the 59: positions and velocities of the robot (9, 9) and of the objects (21, 20)."""

    def __init__(self, env: gymnasium.Env[Any, Any]):
        """Take a FrankaKitchen-v1."""
        RecordConstructorArgs.__init__(self)
        gymnasium.ObservationWrapper.__init__(self, env)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (len(self.COLUMNS),), np.float64)

    def observation(self, observation: Any) -> Any:
        """Return the positions, [30]."""
        return observation["observation"][self.COLUMNS]


def _registered_walls(env_id: str) -> NDArray[np.bool_]:
    """Return True for each wall of a registered maze, [rows, columns]."""
    maze_map: Sequence[Sequence[int | str]] = gymnasium.spec(env_id).kwargs["maze_map"]
    return np.array([[cell == 1 for cell in line] for line in maze_map])


def _drawn(walls: NDArray[np.bool_], **letters: tuple[int, int] | None) -> MazeMap:
    """Return a map with letters in it: g = goal, r = start; without a start it is anywhere else."""
    maze_map: MazeMap = [[int(cell) for cell in line] for line in walls]
    for letter, cell in letters.items():
        if cell is None:
            maze_map = [[letter if other == 0 else other for other in line] for line in maze_map]
        else:
            maze_map[cell[0]][cell[1]] = letter
    return maze_map


def _turned(maze_map: MazeMap) -> MazeMap:
    """Return a map of which x counts the rows and y the columns of the given one, both rising."""
    return [[line[column] for line in maze_map] for column in reversed(range(len(maze_map[0])))]


def _goal_cell(env_id: str) -> tuple[int, int]:
    return next(cell for name, cell in GOAL_CELLS.items() if env_id.startswith(name))


def _make_maze2d(task: Task) -> Any:
    walls = _registered_walls(task.env_id)
    maze_map = _turned(_drawn(walls, r=None, g=_goal_cell(task.env_id)))
    env = _make(task, maze_map=maze_map, reset_target=False, continuing_task=True)
    return FlattenObservation(FilterObservation(env, ["observation"]))


def _observe_maze2d(task: Task, observations_NS: Floats, _: Floats | None) -> Floats:
    shift = 0.5 + POINT_OFFSET - np.array(_registered_walls(task.env_id).shape) / 2
    return np.concatenate([observations_NS[:, :2] + shift, observations_NS[:, 2:]], axis=1)


def _make_antmaze(task: Task) -> Any:
    walls = _registered_walls(task.env_id)
    maze_map = _drawn(walls, r=ANT_START, g=_goal_cell(task.env_id))[::-1]
    return D4RLAnt(_make(task, maze_map=maze_map, reset_target=False, continuing_task=False))


def _observe_antmaze(task: Task, observations_NS: Floats, goals_NX: Floats | None) -> dict[str, Floats]:
    rows, columns = _registered_walls(task.env_id).shape
    shift = ANT_CELL * (1.5 - np.array([columns, rows]) / 2)
    if goals_NX is None:
        row, column = _goal_cell(task.env_id)
        goals_NX = np.full((len(observations_NS), 2), ANT_CELL * (np.array([column, row]) - 1))
    return {
        "observation": observations_NS[:, 2:],
        "achieved_goal": observations_NS[:, :2] + shift,
        "desired_goal": goals_NX + shift,
    }


def _make_kitchen(task: Task) -> Any:
    subtasks = list(KITCHEN_SUBTASKS[task.task])
    return KitchenPositions(_make(task, tasks_to_complete=subtasks))


def _make(task: Task, **kwargs: Any) -> Any:
    return gymnasium.make(task.env_id, max_episode_steps=task.horizon, disable_env_checker=True, **kwargs)


LAYOUTS = {
    "gym-mujoco": Layout(environment=_make),
    "adroit": Layout(environment=_make),
    "maze2d": Layout(
        environment=_make_maze2d,
        observe=_observe_maze2d,
        positions=lambda observations_NS: observations_NS[:, :2],
    ),
    "antmaze": Layout(
        environment=_make_antmaze,
        observe=_observe_antmaze,
        width=29,
        positions=lambda observations: observations["achieved_goal"],
    ),
    "kitchen": Layout(
        environment=_make_kitchen,
        observe=lambda _, observations_NS, __: observations_NS[:, :30],
        width=60,
    ),
}
"""Suite -> its layout."""


def make_evaluation_environment(task: Task) -> Any:
    """Return the environment in which policies trained on a task's D4RL file are evaluated.

    Raises:
        ResourceError: if it cannot be made here.
    """
    register_robotics()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*")
            return LAYOUTS[task.suite].environment(task)
    except (ImportError, gymnasium.error.Error, AttributeError, TypeError, AssertionError) as error:
        raise ResourceError(
            f"the environment {task.env_id} cannot be made here ({type(error).__name__}: {one_line(error)}); "
            f"it wants {' '.join(REQUIREMENTS)}: make install"
        ) from error


def import_file(file: Path, task: Task, *, overwrite: bool = False, clip_actions: bool = False) -> ImportSummary:
    """Write the transitions of a D4RL file as the Minari data set of a task and return what was made.

    The data set appears under its name when it is complete.

    Args:
        file: HDF5, as D4RL's servers give it.
        task: a row of source `d4rl`.
        overwrite: replace a data set of this name.
        clip_actions: move actions into the action space; without it one outside is an error.

    Raises:
        DataError: if the file cannot be read, is not of this task, or holds what no transition may hold; or if the
            data set is there and must not be overwritten.
        ResourceError: if it does not fit into memory, or its environment cannot be made here.
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    if task.source != "d4rl":
        raise DataError(f"{task.task} of source {task.source} is no D4RL file; wanted a task of source d4rl")
    layout = LAYOUTS[task.suite]
    path = get_dataset_path(task.dataset)
    if path.exists() and not overwrite:
        raise DataError(f"{task.dataset} is there: {path}; --overwrite replaces it")
    arrays = read_file(file)
    with staged(task.dataset, overwrite=overwrite):
        env = make_evaluation_environment(task)
        _check_widths(file, task, layout, arrays, env)
        low_A, high_A = action_bounds(env, name=task.env_id)
        if clip_actions:
            arrays["actions"] = arrays["actions"].clip(low_A, high_A)
        bounds = episode_bounds(arrays["terminals"], arrays.get("timeouts"), task.horizon)
        if not bounds:
            raise DataError(
                f"{file}: no transition: its {len(arrays['rewards'])} rows have no successor; wanted two rows of an "
                "episode at least, get the file again"
            )
        doubts = _doubts(task, layout, arrays, env)
        for doubt in doubts:
            warn(f"{file}: {doubt}")
        with progress_bars() as bar:
            write_episodes(
                _episodes(file, task, layout, arrays, bounds, env),
                advance=bar(f"writing {task.dataset}", len(bounds)),
                dataset_id=task.dataset,
                env=env,
                eval_env=env,
                algorithm_name=f"D4RL: {task.task}",
                author=f"aepo {aepo.__version__}",
                description=f"{file.name} imported by `aepo data import d4rl`: D4RL's {task.task} (arXiv 2004.07219), "
                "cut as its q-learning view.",
                ref_min_score=task.ref_min,
                ref_max_score=task.ref_max,
                requirements=list(REQUIREMENTS),
            )
        env.close()
    num_steps = sum(stop - start for start, stop in bounds)
    return ImportSummary(
        task=task.task,
        dataset=task.dataset,
        path=str(path),
        file=str(file),
        num_rows=len(arrays["rewards"]),
        published_num_rows=task.steps,
        num_steps=num_steps,
        num_episodes=len(bounds),
        mean_return=float(
            sum(arrays["rewards"][start:stop].sum(dtype=np.float64) for start, stop in bounds) / len(bounds)
        ),
        env_id=task.env_id,
        ref_min=task.ref_min,
        ref_max=task.ref_max,
        warnings=doubts,
    )


def find_files(paths: Sequence[Path]) -> dict[Path, Task]:
    """Return the D4RL files among these files and below these folders, each with the task that its name is of.

    Files of other names are said, and left out.

    Raises:
        DataError: if a path is not there, no file is of a task, or two are of the same.
    """
    by_name = {row.origin.rpartition("/")[2]: row for row in tasks.rows() if row.source == "d4rl"}
    found: dict[Path, Task] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"no file or folder {path}; wanted D4RL's files, as in {next(iter(by_name))}")
        for file in sorted(path.rglob("*.hdf5")) if path.is_dir() else [path]:
            if file.name in by_name:
                found[file] = by_name[file.name]
            else:
                warn(f"{file}: no task's file has this name; --task says whose it is")
    of_task: dict[str, Path] = {}
    for file, task in found.items():
        if (other := of_task.setdefault(task.task, file)) != file:
            raise DataError(f"{other} and {file} are both of {task.task}; name the one to import")
    if not found:
        raise DataError(
            f"no D4RL file in {', '.join(map(str, paths))}; wanted names as D4RL's servers give, as in "
            f"{next(iter(by_name))}"
        )
    return found


def import_files(
    files: Mapping[Path, Task], *, overwrite: bool = False, clip_actions: bool = False
) -> list[ImportSummary]:
    """Import files, each as the data set of its task; one that is there is left alone, one that fails stops no other.

    Raises:
        DataError: after all were tried, if some failed; says which and why.
    """
    done, failed = [], []
    for number, (file, task) in enumerate(files.items(), 1):
        if library_path(task.dataset).exists() and not overwrite:
            say_left_alone(task.dataset)
            continue
        say(f"{number} of {len(files)}: {file} as {task.dataset}")
        try:
            done.append(import_file(file, task, overwrite=overwrite, clip_actions=clip_actions))
        except DataError as error:
            failed.append(str(error))
            warn(str(error), kind="error", style="red")
    if failed:
        raise DataError(f"{len(failed)} of {len(files)} files are not imported: {'; '.join(failed)}")
    return done


def read_file(file: Path) -> dict[str, Any]:
    """Return the fields of a D4RL file by name, each with N rows; rewards and flags are [N].

    Raises:
        DataError: if it cannot be read, or a field is missing, of another length, no number or not finite.
        ResourceError: if it does not fit into memory.
    """
    if not file.is_file():
        raise DataError(f"no file {file}; wanted a D4RL file as its servers give it, as in hopper_medium-v2.hdf5")
    try:
        with h5py.File(file, "r") as source:
            present = [name for name in (*FIELDS, *OPTIONAL_FIELDS) if name in source]
            if missing := [name for name in FIELDS if name not in present]:
                raise DataError(
                    f"{file}: no {missing[0]}; a D4RL file has {', '.join(FIELDS)}, this one {_keys(source)}"
                )
            for name in present:
                if not isinstance(source[name], h5py.Dataset) or source[name].dtype.kind not in "fiub":
                    kind = getattr(source[name], "dtype", type(source[name]).__name__)
                    raise DataError(f"{file}: {name} is of type {kind}, wanted an array of numbers; get the file again")
            num_bytes = sum(source[name].size * max(4, source[name].dtype.itemsize) for name in present)
            if 2 * num_bytes > (free := psutil.virtual_memory().available):
                raise ResourceError(
                    f"{file} needs {2 * num_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; "
                    "end other programs or take a larger machine"
                )
            arrays = {name: source[name][()] for name in present}
    except DAMAGE as error:
        raise DataError(f"{file} cannot be read as HDF5 ({one_line(error)}); get the file again") from error
    num_rows = len(arrays["observations"]) if arrays["observations"].ndim == 2 else 0
    if num_rows == 0:
        raise DataError(
            f"{file}: observations: shape {arrays['observations'].shape}, wanted (rows, entries); get the file again"
        )
    for name in ("rewards", "terminals", "timeouts"):
        if name in arrays and arrays[name].shape == (num_rows, 1):
            arrays[name] = arrays[name][:, 0]
    for name, array in arrays.items():
        wanted = (num_rows,) if name in ("rewards", "terminals", "timeouts") else (num_rows, *array.shape[1:2])
        if array.shape != wanted or (name not in ("rewards", "terminals", "timeouts") and array.ndim != 2):
            raise DataError(
                f"{file}: {name}: shape {array.shape}, wanted {num_rows} rows as observations have; get the file again"
            )
        good_N = (np.abs(array.reshape(num_rows, -1)) <= np.finfo(np.float32).max).all(axis=1)
        if not good_N.all() and name != "infos/goal":
            row = np.argmin(good_N)
            raise DataError(
                f"{file}: {name}: a value that is not finite, the first in row {row} (in float32), wanted none; "
                "get the file again"
            )
        if name in ("terminals", "timeouts") and not np.isin(array, (0, 1)).all():
            odd = array[np.argmin(np.isin(array, (0, 1)))]
            raise DataError(f"{file}: {name}: {odd:g}, wanted 0 or 1")
    return arrays


def episode_bounds(terminals_N: NDArray[Any], timeouts_N: NDArray[Any] | None, horizon: int) -> list[tuple[int, int]]:
    """Return (first row, row behind the last one) of each episode's transitions, as D4RL's `qlearning_dataset` cuts.

    Args:
        terminals_N: true where the row's transition ends in a terminal state.
        timeouts_N: true in the last row of an episode that was cut; none = episodes are `horizon` rows long.
        horizon: rows of an episode, used without timeouts only.
    """
    terminal = np.asarray(terminals_N, dtype=bool).tolist()
    timeout = None if timeouts_N is None else np.asarray(timeouts_N, dtype=bool).tolist()
    bounds, start, steps = [], 0, 0
    for row in range(len(terminal) - 1):
        if timeout[row] if timeout is not None else steps == horizon - 1:
            if row > start:
                bounds.append((start, row))
            start, steps = row + 1, 0
            continue
        if terminal[row]:
            bounds.append((start, row + 1))
            start, steps = row + 1, 0
        steps += 1  # after a terminal too, as D4RL's
    if len(terminal) - 1 > start:
        bounds.append((start, len(terminal) - 1))
    return bounds


def _episodes(
    file: Path, task: Task, layout: Layout, arrays: dict[str, Any], bounds: Sequence[tuple[int, int]], env: Any
) -> Iterator[Any]:
    """Yield the episodes as Minari's buffers."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    low_A, high_A = action_bounds(env, name=task.env_id)
    successors_NS = arrays.get("next_observations")
    for start, stop in bounds:
        terminal = bool(arrays["terminals"][stop - 1])
        observations_TS = arrays["observations"][start : stop + 1]
        if terminal and successors_NS is not None:
            observations_TS = np.concatenate([observations_TS[:-1], successors_NS[stop - 1 : stop]])
        goals = arrays["infos/goal"][start : stop + 1] if "infos/goal" in arrays else None
        last_T = np.arange(start + 1, stop + 1) == stop
        episode = EpisodeBuffer(
            observations=layout.observe(task, observations_TS, goals),
            actions=arrays["actions"][start:stop],
            rewards=arrays["rewards"][start:stop],
            terminations=last_T & terminal,
            truncations=last_T & (not terminal),
        )
        if problems := find_problems(episode, low_A, high_A):
            raise DataError(f"{file}: episode in rows {start} to {stop - 1}: {problems[0]}")
        yield episode


def _check_widths(file: Path, task: Task, layout: Layout, arrays: dict[str, Any], env: Any) -> None:
    for name, wanted in (
        ("observations", layout.width or env.observation_space.shape[0]),
        ("next_observations", layout.width or env.observation_space.shape[0]),
        ("actions", env.action_space.shape[0]),
        ("infos/goal", 2),
    ):
        if name in arrays and arrays[name].shape[1] != wanted:
            raise DataError(
                f"{file}: {name} have {arrays[name].shape[1]} entries, those of {task.task} have {wanted}: "
                "a file of another task?"
            )


def _doubts(task: Task, layout: Layout, arrays: dict[str, Any], env: Any) -> list[str]:
    """Return what speaks against this being the published file of the task."""
    found = []
    num_rows = len(arrays["rewards"])
    if task.steps not in (None, num_rows):
        found.append(f"{num_rows:,} rows, the published file of {task.task} has {task.steps:,}")
    if layout.positions is not None:
        maze = env.unwrapped.maze
        walls = np.array([[cell == 1 for cell in line] for line in maze.maze_map])
        positions_NX = layout.positions(layout.observe(task, arrays["observations"], None)) / maze.maze_size_scaling
        columns_N = np.floor(positions_NX[:, 0] + walls.shape[1] / 2).clip(0, walls.shape[1] - 1).astype(int)
        rows_N = np.floor(walls.shape[0] / 2 - positions_NX[:, 1]).clip(0, walls.shape[0] - 1).astype(int)
        inside = float(walls[rows_N, columns_N].mean())
        if inside > MAX_IN_WALLS:
            found.append(f"{100 * inside:.0f} % of the positions lie in walls of {task.env_id}: another maze's file?")
    return found


def _keys(source: Any) -> str:
    return ", ".join(sorted(source)) or "nothing"
