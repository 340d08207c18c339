"""What an episode must be before anything is trained on it, and its observations as vectors. No torch.

The same rules refuse a data set and verify it.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aepo.errors import DataError

ACTION_TOLERANCE = 1e-4
"""Share of the action range that float32 and a recorder's rounding may lie outside of it."""
MIN_ACTION_RANGE, MAX_ACTION = 1e-4, 1e30
"""The range of an action is at least this share of its bounds' magnitude; the second is the largest bound."""
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
"""The largest and smallest magnitudes that single precision holds with all its digits."""
MAX_OBSERVATION, MIN_RANGE = 1e30, 1e-30
"""Sums and squares of larger numbers, and quotients by smaller ranges, leave single precision."""
VECTORS = ("Box", "MultiBinary", "MultiDiscrete")
"""Spaces whose values are arrays of numbers."""
MAX_SHOWN = 200
"""Characters of a space in a message."""
DAMAGE = (OSError, KeyError, ValueError, RuntimeError, AssertionError, AttributeError, TypeError, IndexError)
"""What h5py and Minari raise for a file that is not what it says."""


def data_file(dataset: Any) -> Path:
    """Return the file that holds a Minari data set's episodes, or the folder of an Arrow one's."""
    folder = Path(dataset.storage.data_path)
    file = folder / "main_data.hdf5"
    return file if file.exists() or not (folder / "0").is_dir() else folder


def read_episode(dataset: Any, index: int) -> Any:
    """Return one `minari.EpisodeData`.

    Raises:
        DataError: if the file is truncated or lacks a part; names file and episode.
    """
    try:
        return next(iter(dataset.iterate_episodes([index])))
    except DAMAGE as error:
        raise DataError(
            f"{data_file(dataset)}: episode {index} cannot be read: {one_line(error)}; bring it again"
        ) from error


def read_episodes(dataset: Any) -> Iterator[Any]:
    """Yield all episodes in order, the file opened once; errors as in `read_episode`."""
    episodes = None
    for index in dataset.episode_indices:
        try:
            episodes = dataset.iterate_episodes() if episodes is None else episodes  # Arrow's files are opened here
            episode = next(episodes)
        except DAMAGE as error:
            raise DataError(
                f"{data_file(dataset)}: episode {index} cannot be read: {one_line(error)}; bring it again"
            ) from error
        yield episode


def action_bounds(dataset: Any, *, name: str = "") -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the bounds of the action space of a data set (or of an environment of that name), [A], in its own type.

    Raises:
        DataError: if it is no Box of real numbers, one axis and finite bounds.
    """
    space, name = dataset.action_space, name or dataset.id
    if type(space).__name__ != "Box" or len(space.shape) != 1 or space.shape[0] < 1:
        raise DataError(f"{name}: actions must be a Box of one axis, got {_shown(space)}; store them so")
    if space.dtype.kind != "f":
        raise DataError(f"{name}: actions must be real numbers (float32, float64), got {_shown(space)}; store them so")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all() and (space.low < space.high).all()):
        raise DataError(
            f"{name}: actions must have finite bounds, low below high, got {_shown(space)}; "
            "give the space bounds that hold the actions"
        )
    low_A, high_A = space.low.astype(np.float64), space.high.astype(np.float64)
    magnitude_A = np.maximum(np.abs(low_A), np.abs(high_A))
    range_A = high_A - low_A
    if (range_A < np.maximum(MIN_ACTION_RANGE * magnitude_A, MIN_RANGE)).any() or magnitude_A.max() > MAX_ACTION:
        raise DataError(f"{name}: actions must have bounds that float32 tells apart, got {_shown(space)}; shift them")
    return space.low.copy(), space.high.copy()


def accepted(actions_BA: NDArray[Any], low_A: NDArray[Any], high_A: NDArray[Any]) -> NDArray[Any]:
    """Return actions in the type of an action space and within its closed bounds, whatever rounding did to them."""
    within_BA: NDArray[Any] = np.clip(actions_BA.astype(low_A.dtype, copy=False), low_A, high_A)
    return within_BA


def check_observations(dataset: Any, keys: tuple[str, ...] = ()) -> None:
    """Raise a DataError unless observations are arrays of numbers, in Dicts and Tuples as deep as they like.

    Args:
        dataset: what `open_dataset` returns.
        keys: entries of a Dict that are used; () = all.
    """
    if keys and type(dataset.observation_space).__name__ != "Dict":
        raise DataError(
            f"{dataset.id}: observations are {_shown(dataset.observation_space)}, without entries to choose from: "
            f"leave data.observation_keys out, got {' '.join(keys)}"
        )
    for name, space in named_spaces("observations", dataset.observation_space, keys):
        if (kind := type(space).__name__) not in VECTORS:
            raise DataError(
                f"{dataset.id}: {name} are a {kind} space, wanted a Box, MultiBinary or MultiDiscrete, or a Dict or "
                f"Tuple of them: store numbers, a {kind} for example as one-hot vectors"
            )


def scalar_observations(dataset: Any) -> set[str]:
    """Return the names of an observation's parts that are one number without an axis, in a data set [T + 1]."""
    return {name for name, space in named_spaces("observations", dataset.observation_space) if space.shape == ()}


def named_spaces(name: str, space: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what a space is made of by name; keys that it lacks are refused when data are read."""
    kind = type(space).__name__
    if kind == "Dict":
        for key in (key for key in (keys or sorted(space.spaces)) if key in space.spaces):
            yield from named_spaces(f"{name}/{key}", space.spaces[key])
    elif kind == "Tuple":
        for i, each in enumerate(space.spaces):
            yield from named_spaces(f"{name}/{i}", each)
    else:
        yield name, space


def _shown(value: object) -> str:
    """Return a value on one line of bounded length."""
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def doubt_pictures(dataset: Any, keys: tuple[str, ...] = ()) -> list[str]:
    """Return a line for each part of the observations that looks like pictures; arguments as `check_observations`."""
    return [
        f"{name} are arrays of {' x '.join(map(str, space.shape))}: networks get {math.prod(space.shape):,} numbers "
        "in a row, which is no way to learn from pictures"
        for name, space in named_spaces("observations", dataset.observation_space, keys)
        if len(space.shape) >= 3
    ]


def rewards_of(episode: Any) -> NDArray[np.float64]:
    """Return an episode's rewards, [T], for sums of any length; one number in an array of its own is that number."""
    rewards = np.asarray(episode.rewards)
    if rewards.ndim == 2 and rewards.shape[1] == 1:
        rewards = rewards[:, 0]
    return rewards.astype(np.float64, copy=False)


def check_episode(
    dataset: Any,
    episode: Any,
    action_low_A: NDArray[Any],
    action_high_A: NDArray[Any],
    *,
    scalars: Collection[str] = (),
) -> None:
    """Raise a DataError with the first thing that is wrong with an episode; arguments as `find_problems`."""
    if problems := find_problems(episode, action_low_A, action_high_A, scalars=scalars):
        raise DataError(
            f"{data_file(dataset)}: episode {episode.id}: {problems[0]}; "
            f"`aepo data verify {dataset.id}` lists all, mend or drop these episodes"
        )


def find_problems(
    episode: Any,
    action_low_A: NDArray[Any],
    action_high_A: NDArray[Any],
    *,
    scalars: Collection[str] = (),
) -> list[str]:
    """Return what is wrong with an episode, a line each, field first; an empty list if nothing is.

    Args:
        episode: a `minari.EpisodeData` of T steps.
        action_low_A: lower bounds of the action space.
        action_high_A: upper bounds.
        scalars: what `scalar_observations` returns.
    """
    rewards = np.asarray(episode.rewards)
    if rewards.ndim == 2 and rewards.shape[1] == 1:
        rewards = rewards[:, 0]
    if rewards.ndim != 1 or len(rewards) == 0:
        return [f"rewards: shape {rewards.shape}, wanted one number per step and at least one step"]
    steps, action_dim = len(rewards), len(action_low_A)
    actions, terminations = np.asarray(episode.actions), np.asarray(episode.terminations)
    fields = {
        **dict(_named_leaves("observations", episode.observations)),
        "actions": actions,
        "rewards": rewards,
        "terminations": terminations,
        "truncations": np.asarray(episode.truncations),
    }
    problems = []
    for name, array in fields.items():
        if name.startswith("observations"):
            if array.ndim < (1 if name in scalars else 2) or len(array) != steps + 1:
                problems.append(f"{name}: shape {array.shape}, wanted {steps + 1} rows for {steps} rewards")
        elif array.shape != (wanted := (steps, action_dim) if name == "actions" else (steps,)):
            problems.append(f"{name}: shape {array.shape}, wanted {wanted}")
        if array.dtype.kind not in "fiub":
            problems.append(f"{name}: type {array.dtype}, wanted numbers")
        elif not (finite := np.isfinite(array)).all():
            row = int(np.argwhere(~finite)[0][0])
            problems.append(f"{name}: a value that is not finite, the first at step {row}, wanted none")
        elif array.dtype.itemsize >= 4 and (large := np.abs(array) > LARGEST).any():
            where = np.argwhere(large)[0]
            problems.append(f"{name}: {array[tuple(where)]:g} at step {where[0]} is beyond float32 (3.4e38)")
        elif name.startswith("observations") and (large := np.abs(array.astype(np.float64)) > MAX_OBSERVATION).any():
            where = np.argwhere(large)[0]
            problems.append(
                f"{name}: {array[tuple(where)]:g} at step {where[0]}, wanted at most {MAX_OBSERVATION:g}: store it in "
                "other units"
            )
        elif name in ("terminations", "truncations") and (other := (array != 0) & (array != 1)).any():
            where = np.argwhere(other)[0]
            problems.append(f"{name}: {array[tuple(where)]:g} at step {where[0]}, wanted 0 or 1")
    if problems:
        return problems
    low_A, high_A = action_low_A.astype(np.float64), action_high_A.astype(np.float64)
    slack_A = ACTION_TOLERANCE * (high_A - low_A)
    outside = (actions < low_A - slack_A) | (actions > high_A + slack_A)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        problems.append(
            f"actions: {outside.sum()} values outside of the action space, the first {actions[row, column]:g} "
            f"at step {row}, dimension {column}, where [{low_A[column]:g}, {high_A[column]:g}] is allowed"
        )
    if (early := np.flatnonzero(terminations[:-1])).size:
        problems.append(f"terminations: the episode terminates at step {early[0]} and goes on to step {steps - 1}")
    return problems


def _named_leaves(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _named_leaves(f"{name}/{key}", value[key])
    elif isinstance(value, tuple):
        for i, each in enumerate(value):
            yield from _named_leaves(f"{name}/{i}", each)
    else:
        yield name, np.asarray(value)


def flatten(observation: Any, keys: tuple[str, ...] = ()) -> NDArray[np.float64]:
    """Return one vector per time step, [T, S], from arrays [T, ...] or (nested) dicts and tuples of them.

    It is in double precision: what is far from 0 must be centred before single precision holds it.

    Args:
        observation: what Minari stores for an episode, or an environment's observation with a leading axis.
        keys: entries to take, in this order; () takes all, sorted by name, those of a tuple in order.
    """
    return np.concatenate(_leaves(observation, keys), axis=-1).astype(np.float64, copy=False)


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[NDArray[Any]]:
    if isinstance(value, Mapping):
        if missing := [key for key in keys if key not in value]:
            raise DataError(f"observations have no entry {missing[0]!r}; they have {sorted(value)}")
        return [leaf for key in (keys or sorted(value)) for leaf in _leaves(value[key])]
    if isinstance(value, tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    array = np.asarray(value)
    return [array.reshape(len(array), -1)]


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
