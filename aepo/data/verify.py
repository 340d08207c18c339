"""A whole data set against what it says of itself."""

import math
from typing import Any

from rich.progress import track

from aepo.console import err
from aepo.data.episodes import action_bounds, data_file, find_problems, flatten, read_episode
from aepo.data.library import open_dataset
from aepo.errors import AEPOError, DataError
from aepo.evaluate import Evaluator
from aepo.tasks import Task

MAX_LOST = 0.05
"""Share of a D4RL file's rows that have no successor."""


def verify(task: Task) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return what was read of a task's data set, a line for each thing that is wrong with it, and one for each doubt.

    A doubt is what the published data set would not show, as another number of steps.

    Raises:
        DataError: if there is no such data set, or nothing of it can be read.
    """
    dataset = open_dataset(task.dataset)
    low_A, high_A = action_bounds(dataset)
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
        num_steps += len(episode.rewards)
        found = find_problems(episode, low_A, high_A)
        problems += [f"{file}: episode {index}: {problem}" for problem in found]
        if not found:
            widths.add(flatten(episode.observations, task.observation_keys).shape[1])
    if num_steps != dataset.total_steps:
        problems.append(f"{file}: {num_steps} steps, its metadata state {dataset.total_steps}")
    if len(widths) > 1:
        problems.append(f"{file}: observations have {sorted(widths)} entries, wanted one number for all episodes")
    metadata = dataset.storage.metadata
    ref_min, ref_max = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if (ref_min is None) != (ref_max is None):
        problems.append(f"{file}: one reference score of two: ref_min_score {ref_min}, ref_max_score {ref_max}")
    elif ref_min is not None and not (math.isfinite(ref_min) and math.isfinite(ref_max) and ref_min < ref_max):
        problems.append(f"{file}: reference scores {ref_min} and {ref_max}, wanted two finite ones, ascending")
    env_id = None
    try:
        evaluator = Evaluator(
            task.dataset, env_id=task.env_id, observation_keys=task.observation_keys, horizon=task.horizon or 1
        )
        env_id = evaluator.env_id
        width = evaluator.observation_width(seed=0)
        if len(widths) == 1 and {width} != widths:
            problems.append(f"{file}: observations have {min(widths)} entries, those of {env_id} have {width}")
        evaluator.close()
    except AEPOError as error:
        problems.append(str(error))
    facts = {
        "dataset": dataset.id,
        "path": str(file),
        "num_episodes": num_episodes,
        "num_steps": num_steps,
        "ref_min": ref_min if task.ref_min is None else task.ref_min,
        "ref_max": ref_max if task.ref_max is None else task.ref_max,
        "env_id": env_id,
    }
    return facts, problems, _doubts(task, num_steps, ref_min, ref_max)


def _doubts(task: Task, num_steps: int, ref_min: float | None, ref_max: float | None) -> list[str]:
    found = []
    lost = 0 if task.source == "minari" else MAX_LOST
    if task.steps is not None and not (1 - lost) * task.steps <= num_steps <= task.steps:
        found.append(f"{num_steps:,} steps, the published data of {task.task} have {task.steps:,}")
    stated = (ref_min, ref_max)
    if task.ref_min is not None and ref_min is not None and stated != (task.ref_min, task.ref_max):
        found.append(f"its metadata state the references {stated}; used are {(task.ref_min, task.ref_max)}")
    return found
