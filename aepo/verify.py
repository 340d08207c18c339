"""A whole data set against what it says of itself."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.progress import track

from aepo.console import err
from aepo.data.episodes import (
    action_bounds,
    check_observations,
    data_file,
    find_problems,
    flatten,
    read_episode,
    scalar_observations,
)
from aepo.data.library import open_dataset
from aepo.data.transitions import load_transitions
from aepo.environments import References, references
from aepo.errors import AEPOError, DataError
from aepo.evaluate import Evaluator
from aepo.tasks import Task

MAX_LOST = 0.05
"""Largest share of a D4RL file's rows that have no successor and are left out."""


def verify(task: Task) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return what was read of a task's data set, a line for each thing that is wrong with it, and one for each doubt.

    What is wrong is what training refuses. A doubt is what it only warns of, or what the published data set would not
    show, as another number of steps.

    Raises:
        DataError: if there is no such data set, or nothing of it can be read.
    """
    dataset = open_dataset(task.dataset)
    counts, problems = _read(dataset, task)
    refs = None
    try:
        refs = (
            references(dataset) if task.ref_min is None else References(random=task.ref_min, expert=task.ref_max or 0)
        )
    except DataError as error:
        problems.append(str(error))
    env_id, note, doubts = None, "", list[str]()
    try:
        evaluator = Evaluator(
            task.dataset,
            env_id=task.env_id,
            observation_keys=task.observation_keys,
            horizon=task.horizon or 1,
            refs=refs or References(random=0.0, expert=1.0),  # those of the data set have just been looked at
        )
        with contextlib.closing(evaluator):
            env_id = evaluator.env_id
            if not problems:
                keys, rule = task.observation_keys, task.reward_rule
                data = load_transitions(task.dataset, observation_keys=keys, reward_rule=rule)
                note = data.note
                doubts = [*([data.doubt] if data.doubt else []), *evaluator.check(data)]
    except AEPOError as error:
        problems.append(str(error))
    facts = {
        "dataset": dataset.id,
        "path": str(data_file(dataset)),
        **counts,
        "ref_min": refs.random if refs else None,
        "ref_max": refs.expert if refs else None,
        "env_id": env_id,
        "note": note or None,
    }
    return facts, problems, [*doubts, *_unlike_published(task, counts["num_steps"], dataset.storage.metadata)]


def _read(dataset: Any, task: Task) -> tuple[dict[str, int], list[str]]:
    """Read every episode; return how many episodes and steps there are, and a line for each thing that is wrong."""
    low_A, high_A = action_bounds(dataset)
    check_observations(dataset, task.observation_keys)
    scalars = scalar_observations(dataset)
    file = data_file(dataset)
    problems: list[str] = []
    num_episodes = num_steps = 0
    widths: set[int] = set()
    indices = track(
        dataset.episode_indices,
        description=f"verifying {dataset.id}",
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    for index in indices:
        try:
            episode = read_episode(dataset, index)
        except DataError as error:
            problems.append(str(error))
            continue
        num_episodes += 1
        num_steps += np.size(episode.rewards)
        found = find_problems(episode, low_A, high_A, scalars=scalars)
        problems += [f"{file}: episode {index}: {problem}" for problem in found]
        if not found:
            widths.add(flatten(episode.observations, task.observation_keys).shape[1])
    if num_steps != dataset.total_steps:
        problems.append(f"{file}: {num_steps} steps, its metadata state {dataset.total_steps}")
    if len(widths) > 1:
        problems.append(f"{file}: observations have {sorted(widths)} entries, wanted one number for all episodes")
    return {"num_episodes": num_episodes, "num_steps": num_steps}, problems


def _unlike_published(task: Task, num_steps: int, metadata: Mapping[str, Any]) -> list[str]:
    """Return what differs from the published data set of a task, a line each."""
    found = []
    lost = 0 if task.source == "minari" else MAX_LOST
    if task.steps is not None and not (1 - lost) * task.steps <= num_steps <= task.steps:
        found.append(f"{num_steps:,} steps, the published data of {task.task} have {task.steps:,}")
    stated = (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    if task.ref_min is not None and stated[0] is not None and stated != (task.ref_min, task.ref_max):
        found.append(f"its metadata state the references {stated}; used are {(task.ref_min, task.ref_max)}")
    return found
