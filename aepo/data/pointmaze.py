"""Data of PointMaze environments, collected here: a path through the maze, a PD controller, noise on its actions.

The published files come from an old simulator (D4RL) or must be downloaded (Minari); this makes data of the same kind
from gymnasium-robotics alone. They are not the published data: a score on them is no D4RL score.

One continuing run becomes a data set. The protocols differ in who steers, and in how it is cut, seen and paid:

    maze2d      D4RL (arXiv 2004.07219): the goal that the controller pursues is hidden, and rewards are
                relabelled for one evaluation goal. The learner must stitch its way from other journeys.
    pointmaze   Minari (D4RL/pointmaze): the goal is observed, and an episode ends where it is reached.

The task's environment says what a step pays: sparse, 1 within GOAL_RADIUS of a goal, or dense, exp(-metres to it).
No reward enters the run: with the same seed, sparse and dense data of a maze have the same states and actions.

Score 100 is the mean return of the protocol's own controller without noise. For pointmaze, as for Minari's sets, that
is one that takes detours (`steer_depth_first`): going straight scores 108 to 115 in UMaze and Open, 133 in Medium and
Large. Of 1,000,000 steps the mean length is within 3 % of the published one in all four mazes; of 800 episodes ref_max
is within 2 %. The standard error of 100 episodes is 2 % of ref_max in Open and UMaze, 5 % in Medium and Large.

N = steps of the run, T = steps of an episode, S = 4 entries of a state (x, y in m; vx, vy in m/s), A = 2 of an action
(force, -1..1), X = 2 of a position. An array's name ends in its shape. This module does not know what learns from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.wrappers import FilterObservation, FlattenObservation
from numpy.typing import NDArray

import aepo
from aepo.console import say
from aepo.data.staging import destination, progress_bars, staged, write_episodes
from aepo.data.steering import Cell, Controller, Navigator, Position, steer_depth_first, steer_shortest, wander
from aepo.errors import ConfigError, DataError, ResourceError
from aepo.tasks import Task

Floats: TypeAlias = NDArray[np.float64]
GOAL_RADIUS = 0.45
"""Metres from a goal within which a state is paid and the goal counts as reached; gymnasium-robotics' own."""
NOISE_STD = 0.5
"""Standard deviation of the Gaussian noise on each entry of an action, before clipping to -1..1; D4RL's, Minari's."""
EPISODE_STEPS = 1_000
"""Steps of a maze2d data episode: few and long ones, because Minari reads 3 ms per episode."""
STEP_BYTES = 64
"""A recorded step takes at least so many bytes of a file."""
REFERENCE_SEED = 0
"""Seed of the reference episodes. They describe the evaluation, not the data: all seeds share one scale."""
REQUIREMENTS = ("gymnasium-robotics>=1.4.2,<1.5", "mujoco>=3.3.7,<3.12")
"""Requirements as in pyproject.toml; stored in the data set, so that Minari warns where it is used with others."""
CHUNK_STEPS = 1_000
"""Environment steps between two updates of a progress bar."""


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
    """How a run is steered and becomes a data set, and what an agent sees of it."""

    controller: Controller
    algorithm: str
    """The controller's name in the metadata."""
    wrap: Callable[[Any], Any]
    """Gives an environment the observations that the data set holds."""
    ends: Callable[[Run], NDArray[np.intp]]
    """The index after the last step of each episode, rising; N may be missing."""
    observations: Callable[[Floats, Floats], Any]
    """(T + 1 states of an episode, as many goals) -> its observations."""
    paid_goals: Callable[[Run, Position], Floats]
    """Goals that the steps are paid for, one or N x 2; from the run and the centre of the evaluation goal's cell."""
    arrival_radius: float
    """Metres from the goal within which the run turns to a new one; at most GOAL_RADIUS."""
    max_episode_steps: int
    """Time limit of the environment that the data set names as its origin; -1 = none."""
    description: str


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """Minari's own data set of the same maze, reward and protocol."""

    dataset: str
    """Minari id."""
    num_episodes: int
    ref_min: float
    ref_max: float
    num_steps: int = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CollectSummary:
    """A collected data set beside the published one. What nobody says of it is NaN or None."""

    dataset: str
    """Minari id."""
    path: str
    """Folder of the data set."""
    collected: bool
    """Whether it was collected now; False: it was there before and has been left alone."""
    num_steps: int
    num_episodes: int
    mean_length: float
    """Steps per episode."""
    published_dataset: str | None
    """Minari id; None = nothing of this kind is published."""
    published_num_steps: int | None
    published_num_episodes: int | None
    published_mean_length: float | None
    seed: int | None
    mean_return: float
    """Mean return of the data's episodes."""
    ref_min: float
    """Mean return of the uniform random policy in the evaluation environment: score 0."""
    ref_max: float
    """Mean return of the noiseless controller, which knows the goal, in the same environment: score 100."""
    published_ref_min: float | None
    published_ref_max: float | None
    env_steps_per_s: float
    """Environment steps per second while the data were collected."""
    collect_s: float
    reference_s: float
    write_s: float
    """Wall-clock seconds of the data run, the reference episodes and the writing."""


PROTOCOLS = {
    "maze2d": Protocol(
        controller=steer_shortest,
        algorithm="shortest path, PD controller",
        wrap=lambda env: FlattenObservation(FilterObservation(env, ["observation"])),
        ends=lambda run: np.arange(EPISODE_STEPS, len(run.actions_NA), EPISODE_STEPS),
        observations=lambda states_TS, _: states_TS,
        paid_goals=lambda _, centre: np.array(centre),
        arrival_radius=0.1,  # D4RL's controller; so the data show how to brake at a goal
        max_episode_steps=EPISODE_STEPS,
        description="D4RL's maze2d protocol: observations are x, y, vx, vy without the goal; steps are paid for the "
        "centre of the evaluation goal's cell, whatever goal was pursued; episodes are truncated slices of "
        f"{EPISODE_STEPS} steps.",
    ),
    "pointmaze": Protocol(
        controller=steer_depth_first,
        algorithm="depth-first path, PD controller",
        wrap=lambda env: env,
        ends=lambda run: np.flatnonzero(run.reached_N) + 1,
        observations=lambda states_TS, goals_TX: {
            "observation": states_TS,
            "achieved_goal": states_TS[:, :2],
            "desired_goal": goals_TX,
        },
        paid_goals=lambda run, _: run.goals_NX,
        arrival_radius=GOAL_RADIUS,
        max_episode_steps=-1,
        description="Minari's pointmaze protocol: the goal is observed, and steps are paid for it; reaching it "
        f"({GOAL_RADIUS} m) truncates the episode; the next one goes on from there towards a new goal.",
    ),
}
"""Suite -> its protocol."""

REWARD_DESCRIPTIONS = {
    "sparse": f"A step pays 1 where the state after it is within {GOAL_RADIUS} m of that goal, else 0.",
    "dense": "A step pays exp(-d) where the state after it is d metres from that goal.",
}
"""`reward_type` of gymnasium-robotics -> what a step pays."""

GOAL_CELLS: dict[str, Cell] = {
    task: cell
    for maze, cell in {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}.items()
    for task in (f"maze2d-{maze}", f"pointmaze-{maze}", f"pointmaze-{maze}-dense")
}
"""Task -> the cell that evaluation pays for, where D4RL's map says G; other tasks cannot be collected."""

PUBLISHED = {
    "pointmaze-open": Published("D4RL/pointmaze/open-v2", 9_525, 7.199999809265137, 229.86000061035156),
    "pointmaze-umaze": Published("D4RL/pointmaze/umaze-v2", 13_210, 13.489999771118164, 218.6999969482422),
    "pointmaze-medium": Published("D4RL/pointmaze/medium-v2", 4_752, 17.65999984741211, 361.04998779296875),
    "pointmaze-large": Published("D4RL/pointmaze/large-v2", 3_360, 3.549999952316284, 462.260009765625),
    "pointmaze-open-dense": Published("D4RL/pointmaze/open-dense-v2", 9_525, 70.7329330444336, 229.4267120361328),
    "pointmaze-umaze-dense": Published("D4RL/pointmaze/umaze-dense-v2", 13_210, 59.25226974487305, 223.9688720703125),
    "pointmaze-medium-dense": Published("D4RL/pointmaze/medium-dense-v2", 4_752, 49.2408447265625, 368.8089599609375),
    "pointmaze-large-dense": Published("D4RL/pointmaze/large-dense-v2", 3_360, 27.165931701660156, 481.5344543457031),
}
"""Task -> published numbers, from Minari's documentation pages and the metadata of its data sets."""


def collect(
    task: Task, *, num_steps: int, seed: int, num_reference_episodes: int = 100, overwrite: bool = False
) -> CollectSummary:
    """Collect the data set of a task and return what was made; one that is there is left alone.

    The data set appears under its name when it is complete (`staged`): one call per process at a time. The same
    arguments give the same arrays.

    Args:
        task: a row of the task table that GOAL_CELLS and PROTOCOLS know.
        num_steps: environment steps to record, >= 1.
        seed: of start, goals and noise, >= 0; the reference scores do not depend on it.
        num_reference_episodes: episodes of `task.horizon` steps behind each reference score, >= 1.
        overwrite: replace a data set of this name.

    Raises:
        ConfigError: if the task cannot be collected or a number is out of range.
        DataError: if something that cannot be read lies where the data set belongs, or it cannot be written there.
        ResourceError: if the environments cannot be imported, or the disk is full.
    """
    if task.task not in GOAL_CELLS or task.suite not in PROTOCOLS:
        raise ConfigError(
            f"{task.task!r} of suite {task.suite!r} cannot be collected; these tasks can: {', '.join(GOAL_CELLS)}"
        )
    if num_steps < 1 or seed < 0 or num_reference_episodes < 1:
        raise ConfigError(
            f"wanted steps >= 1, seed >= 0 and reference episodes >= 1; "
            f"got {num_steps}, {seed} and {num_reference_episodes}"
        )
    _import_environments()
    protocol = PROTOCOLS[task.suite]
    path = destination(task.dataset)
    if path.exists() and not overwrite:
        found = _summary(path, task)
        say(
            f"{found.dataset} is there ({found.num_steps:,} steps, seed {found.seed}) and was left alone; "
            "--overwrite replaces it"
        )
        return found

    with staged(task.dataset, overwrite=overwrite, num_bytes=STEP_BYTES * num_steps), progress_bars() as bar:
        data_env, eval_env = _make_environments(task, protocol)
        navigator = Navigator(data_env.unwrapped.maze.maze_map)
        clock_s = [time.perf_counter()]
        run = record(
            data_env.unwrapped,
            navigator,
            protocol,
            num_steps=num_steps,
            seed=seed,
            advance=bar("collecting", num_steps),
        )
        clock_s.append(time.perf_counter())
        ref_min, ref_max = measure_references(
            eval_env.unwrapped,
            navigator,
            protocol.controller,
            horizon=task.horizon,
            num_episodes=num_reference_episodes,
            advance=bar("reference scores", 2 * num_reference_episodes * task.horizon),
        )
        clock_s.append(time.perf_counter())
        rewards_N = data_env.unwrapped.compute_reward(
            run.states_NS[1:, :2], protocol.paid_goals(run, navigator.centre(GOAL_CELLS[task.task])), {}
        )
        ends = np.union1d(protocol.ends(run), [num_steps])
        dataset = write_episodes(
            _episodes(run, rewards_N, ends, protocol),
            advance=bar("writing", len(ends)),
            dataset_id=task.dataset,
            env=data_env,
            eval_env=eval_env,
            algorithm_name=f"{protocol.algorithm}, action noise {NOISE_STD}",
            author=f"aepo {aepo.__version__}",
            ref_min_score=ref_min,
            ref_max_score=ref_max,
            num_episodes_average_score=num_reference_episodes,
            description=f"Collected in {task.env_id} by `aepo data collect {task.task} --steps {num_steps} "
            f"--seed {seed}`: not a published D4RL or Minari file. {protocol.description} "
            f"{REWARD_DESCRIPTIONS[data_env.unwrapped.reward_type]}",
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
    return _summary(path, task, origin=origin)


def record(
    env: Any,
    navigator: Navigator,
    protocol: Protocol,
    *,
    num_steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Run:
    """Return a continuing run of the protocol's controller with noise.

    Steps the environment's physics and lets it draw a new goal where one is reached: what `PointMazeEnv.step` does, but
    for the three distances that it computes at every step (they are 40 % of its time).

    Args:
        env: an unwrapped PointMazeEnv with `continuing_task` and `reset_target`.
        navigator: of its maze.
        protocol: its controller and arrival radius count.
        num_steps: >= 1.
        seed: of start, goals, way-points and noise.
        advance: is told, now and then, how many steps were done.
    """
    run = Run(
        states_NS=np.empty((num_steps + 1, 4)),
        actions_NA=np.empty((num_steps, 2), dtype=np.float32),
        goals_NX=np.empty((num_steps, 2)),
        reached_N=np.zeros(num_steps, dtype=np.bool_),
    )
    random = np.random.default_rng([seed, 1])  # not [seed]: that is the environment's own stream
    env.reset(seed=seed)
    step, hypot, arrival_radius = env.point_env.step, math.hypot, protocol.arrival_radius
    run.states_NS[0] = env.point_env.state_vector()
    state = run.states_NS[0].tolist()
    goal_x, goal_y = goal = tuple(env.goal.tolist())
    policy = protocol.controller(navigator, state, goal, random)
    for start in range(0, num_steps, CHUNK_STEPS):
        stop = min(start + CHUNK_STEPS, num_steps)
        noise_TA = random.normal(scale=NOISE_STD, size=(stop - start, 2)).tolist()
        for t, (noise_x, noise_y) in enumerate(noise_TA, start):
            force_x, force_y = policy(state)
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
                policy = protocol.controller(navigator, state, goal, random)
        advance(stop - start)
    return run


def measure_references(
    env: Any,
    navigator: Navigator,
    controller: Controller,
    *,
    horizon: int,
    num_episodes: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, float]:
    """Return the mean returns of the uniform random policy and of a controller without noise.

    The controller knows the goal of each episode, also where the protocol hides it from the learner.

    Args:
        env: an unwrapped PointMazeEnv with one goal cell and without `reset_target`.
        navigator: of its maze.
        controller: of score 100.
        horizon: steps of an episode; a return is the sum of what the environment pays for them.
        num_episodes: per policy, >= 1.
        advance: is told, now and then, how many steps were done.
    """
    random = np.random.default_rng([REFERENCE_SEED, 1])
    step, positions_TX, means = env.point_env.step, np.empty((horizon, 2)), []
    for steer in (wander, controller):
        env.reset(seed=REFERENCE_SEED)  # both policies meet the same starts and goals
        total = 0.0
        for _ in range(num_episodes):
            state = env.point_env.state_vector().tolist()
            policy = steer(navigator, state, tuple(env.goal.tolist()), random)
            for t in range(horizon):
                state = step(np.array(policy(state), dtype=np.float32))[0].tolist()
                positions_TX[t] = state[:2]
            total += float(env.compute_reward(positions_TX, env.goal, {}).sum())
            env.reset()
            advance(horizon)
        means.append(total / num_episodes)
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


def _make_environments(task: Task, protocol: Protocol) -> tuple[Any, Any]:
    """Return the environments of the data and of the evaluation; Minari can store and rebuild both.

    The reward is the one that the task's environment is registered with. gymnasium-robotics moves the evaluation's goal
    by up to 0.25 m in x and y from its cell's centre, anew for each episode; a ball at the centre has still arrived.
    The start is in any other cell.
    """
    maze_map = gymnasium.spec(task.env_id).kwargs["maze_map"]
    one_goal: list[list[int | str]] = [["r" if cell == 0 else cell for cell in line] for line in maze_map]
    row, column = GOAL_CELLS[task.task]
    assert one_goal[row][column] == "r", f"{task.env_id}: no free cell at {row, column}"
    one_goal[row][column] = "g"
    make = functools.partial(gymnasium.make, task.env_id, continuing_task=True)
    data_env = make(max_episode_steps=protocol.max_episode_steps, reset_target=True)
    eval_env = make(max_episode_steps=task.horizon, reset_target=False, maze_map=one_goal)
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


def _summary(path: Path, task: Task, *, origin: dict[str, Any] | None = None) -> CollectSummary:
    """Return what the metadata say; `origin` is what this process wrote, unless another was faster."""
    from minari.dataset.minari_storage import MinariStorage

    published = PUBLISHED.get(task.task)
    measured = ("mean_return", "env_steps_per_s", "collect_s", "reference_s", "write_s")
    try:
        metadata = MinariStorage.read_raw_metadata(path / "data")
        found = metadata.get("aepo", {})
        return CollectSummary(
            dataset=metadata["dataset_id"],
            path=str(path),
            collected=found == origin,
            num_steps=metadata["total_steps"],
            num_episodes=metadata["total_episodes"],
            mean_length=metadata["total_steps"] / metadata["total_episodes"],
            published_dataset=published.dataset if published else None,
            published_num_steps=published.num_steps if published else None,
            published_num_episodes=published.num_episodes if published else None,
            published_mean_length=published.num_steps / published.num_episodes if published else None,
            ref_min=metadata.get("ref_min_score", math.nan),
            ref_max=metadata.get("ref_max_score", math.nan),
            published_ref_min=published.ref_min if published else None,
            published_ref_max=published.ref_max if published else None,
            seed=found.get("seed"),
            **{name: found.get(name, math.nan) for name in measured},
        )
    except (OSError, ValueError, KeyError, ZeroDivisionError) as error:
        raise DataError(f"{path} is no data set ({error}); --overwrite replaces it") from error
