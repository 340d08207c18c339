"""The local Minari library: a data set opened, or how it gets there. No torch."""

import os
from pathlib import Path
from typing import Any

from aepo import tasks
from aepo.console import warn
from aepo.data.episodes import DAMAGE, one_line
from aepo.errors import DataError

MAX_DEPTH = 20
"""Folders between the library and a data set that are looked into."""


def open_dataset(dataset_id: str) -> Any:
    """Return the local `minari.MinariDataset`, its data not yet read.

    Raises:
        DataError: if it is not in the local library; says how to get it.
    """
    import minari
    from minari.storage.local import get_dataset_path

    folder = get_dataset_path("")
    try:
        dataset = minari.load_dataset(dataset_id)
        _ = dataset.total_steps, dataset.total_episodes  # which raise where the metadata hold no number
        return dataset
    except DAMAGE as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else one_line(error)
        raise DataError(
            f"data set {dataset_id!r} cannot be read in {folder} ({reason}); {remedy(dataset_id)}"
        ) from error


def local_datasets() -> dict[str, dict[str, Any]]:
    """Return id -> metadata of all data sets in the local library; those that cannot be read are said, and left out.

    Minari's own listing ends at the first folder whose name is no id.
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    root, found = Path(get_dataset_path()), {}
    for folder, below, _ in os.walk(root, followlinks=True):
        here = Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if len(here.relative_to(root).parts) >= MAX_DEPTH:
            below.clear()
        if "data" in below and here != root:
            below.clear()
            dataset_id = here.relative_to(root).as_posix()
            try:
                found[dataset_id] = dict(open_dataset(dataset_id).storage.metadata)
            except DataError as error:
                warn(str(error))
    return found


def remedy(dataset_id: str) -> str:
    """Return in words how a data set gets into the local library."""
    task = tasks.for_dataset(dataset_id)
    if task.source == "collected":
        return f"make it: aepo data collect {task.task}"
    if task.source == "d4rl":
        file = task.origin.rpartition("/")[2]
        others = [row.source for row in tasks.rows() if row.task == task.task and row.source != "d4rl"]
        other = "".join(f"; other data of this task: --source {source}" for source in others)
        return f"bring D4RL's {file} ({task.origin}), then: aepo data import d4rl {file} --task {task.task}{other}"
    if task.source == "minari" and task.origin:
        return f"make it of its parts: aepo data download {task.task}"
    return (
        f"`aepo data download {dataset_id}` where there is a network, or put its folder there, "
        "or set MINARI_DATASETS_PATH to the library that has it"
    )
