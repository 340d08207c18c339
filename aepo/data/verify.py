"""A whole data set against what it says of itself."""

import math
from typing import Any

from rich.progress import track

from aepo.console import err
from aepo.data.episodes import data_file, find_problems, read_episode
from aepo.data.transitions import action_bounds, open_dataset
from aepo.errors import AEPOError, DataError
from aepo.evaluate import Evaluator


def verify(dataset_id: str) -> tuple[dict[str, Any], list[str]]:
    """Return what was read of a data set, and a line for each thing that is wrong with it.

    Raises:
        DataError: if there is no such data set, or nothing of it can be read.
    """
    dataset = open_dataset(dataset_id)
    low_A, high_A = action_bounds(dataset)
    file = data_file(dataset)
    problems: list[str] = []
    num_episodes = num_steps = 0
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
        problems += [f"{file}: episode {index}: {problem}" for problem in find_problems(episode, low_A, high_A)]
    if num_steps != dataset.total_steps:
        problems.append(f"{file}: {num_steps} steps, its metadata state {dataset.total_steps}")
    metadata = dataset.storage.metadata
    ref_min, ref_max = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if (ref_min is None) != (ref_max is None):
        problems.append(f"{file}: one reference score of two: ref_min_score {ref_min}, ref_max_score {ref_max}")
    elif ref_min is not None and not (math.isfinite(ref_min) and math.isfinite(ref_max) and ref_min < ref_max):
        problems.append(f"{file}: reference scores {ref_min} and {ref_max}, wanted two finite ones, ascending")
    env_id = None
    try:
        evaluator = Evaluator(dataset_id, horizon=1)
        env_id = evaluator.env_id
        evaluator.close()
    except AEPOError as error:
        problems.append(str(error))
    facts = {
        "dataset": dataset.id,
        "path": str(file),
        "num_episodes": num_episodes,
        "num_steps": num_steps,
        "ref_min": ref_min,
        "ref_max": ref_max,
        "env_id": env_id,
    }
    return facts, problems
