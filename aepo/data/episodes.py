"""What an episode must be before anything is trained on it, and its observations as vectors. No torch.

The same rules refuse a data set and verify it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aepo.errors import DataError

ACTION_TOLERANCE = 1e-4
"""Of the action range: what float32 and a recorder's rounding may put outside of it."""
DAMAGE = (OSError, KeyError, ValueError, RuntimeError, AssertionError, AttributeError, TypeError, IndexError)
"""What h5py and Minari raise for a file that is not what it says."""


def data_file(dataset: Any) -> Path:
    """Return the file that holds a Minari data set's episodes."""
    return Path(dataset.storage.data_path) / "main_data.hdf5"


def read_episode(dataset: Any, index: int) -> Any:
    """Return one `minari.EpisodeData`.

    Raises:
        DataError: if the file is truncated or lacks a part; names file and episode.
    """
    try:
        return next(iter(dataset.iterate_episodes([index])))
    except DAMAGE as error:
        raise DataError(f"{data_file(dataset)}: episode {index} cannot be read: {one_line(error)}") from error


def read_episodes(dataset: Any) -> Iterator[Any]:
    """Yield all episodes in order, the file opened once; errors as in `read_episode`."""
    episodes = dataset.iterate_episodes()
    for index in dataset.episode_indices:
        try:
            episode = next(episodes)
        except DAMAGE as error:
            raise DataError(f"{data_file(dataset)}: episode {index} cannot be read: {one_line(error)}") from error
        yield episode


def action_bounds(dataset: Any, *, name: str = "") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the lower and upper bounds of the action space of a data set (or of an environment of that name), [A].

    Raises:
        DataError: if it is no Box of one axis with finite bounds.
    """
    space, name = dataset.action_space, name or dataset.id
    if type(space).__name__ != "Box" or len(space.shape) != 1:
        raise DataError(f"{name}: actions must be a Box of one axis, got {space}")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all() and (space.low < space.high).all()):
        raise DataError(f"{name}: actions must have finite bounds, got {space}")
    return space.low.astype(np.float32), space.high.astype(np.float32)


def find_problems(episode: Any, action_low_A: NDArray[np.float32], action_high_A: NDArray[np.float32]) -> list[str]:
    """Return what is wrong with an episode, a line each, field first; an empty list if nothing is.

    Args:
        episode: a `minari.EpisodeData` of T steps.
        action_low_A: lower bounds of the action space.
        action_high_A: upper bounds.
    """
    rewards = np.asarray(episode.rewards)
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
            if array.ndim < 2 or len(array) != steps + 1:
                problems.append(f"{name}: shape {array.shape}, wanted {steps + 1} rows for {steps} rewards")
        elif array.shape != (wanted := (steps, action_dim) if name == "actions" else (steps,)):
            problems.append(f"{name}: shape {array.shape}, wanted {wanted}")
        if array.dtype.kind not in "fiub":
            problems.append(f"{name}: type {array.dtype}, wanted numbers")
        elif not (finite := np.isfinite(array)).all():
            row = int(np.argwhere(~finite)[0][0])
            problems.append(f"{name}: a value that is not finite, the first at step {row}")
    if problems:
        return problems
    slack_A = ACTION_TOLERANCE * (action_high_A - action_low_A)
    outside = (actions < action_low_A - slack_A) | (actions > action_high_A + slack_A)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        problems.append(
            f"actions: {outside.sum()} values outside of the action space, the first {actions[row, column]:g} "
            f"at step {row}, dimension {column}, where [{action_low_A[column]:g}, {action_high_A[column]:g}] is allowed"
        )
    if (early := np.flatnonzero(terminations[:-1])).size:
        problems.append(f"terminations: the episode terminates at step {early[0]} and goes on to step {steps - 1}")
    return problems


def _named_leaves(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _named_leaves(f"{name}/{key}", value[key])
    else:
        yield name, np.asarray(value)


def flatten(observation: Any, keys: tuple[str, ...] = ()) -> NDArray[np.float32]:
    """Return one vector per time step, [T, S], from arrays [T, ...] or a (nested) dict of them.

    Args:
        observation: what Minari stores for an episode, or an environment's observation with a leading axis.
        keys: entries to take, in this order; () takes all, sorted by name.
    """
    return np.concatenate(_leaves(observation, keys), axis=-1).astype(np.float32, copy=False)


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[NDArray[Any]]:
    if isinstance(value, Mapping):
        if missing := [key for key in keys if key not in value]:
            raise DataError(f"observations have no entry {missing[0]!r}; they have {sorted(value)}")
        return [leaf for key in (keys or sorted(value)) for leaf in _leaves(value[key])]
    array = np.asarray(value)
    return [array.reshape(len(array), -1)]


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
