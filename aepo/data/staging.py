"""New data sets appear whole or not at all: they are made in a hidden folder of Minari's library and then renamed."""

import contextlib
import functools
import itertools
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aepo.console import err
from aepo.data.episodes import DAMAGE, one_line, read_episode
from aepo.errors import DataError
from aepo.rundir import try_lock

CHUNK_EPISODES = 100
"""Written episodes between two updates of a progress bar."""


@contextlib.contextmanager
def staged(dataset_id: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the place of a data set; one that is made within the block appears there at the block's end.

    Until then it lies in a hidden folder, and MINARI_DATASETS_PATH and `tempfile.tempdir` of this process point there:
    one block per process at a time. Minari lists no hidden folders: what a killed process leaves never looks like a
    data set. The models that gymnasium-robotics leaves among the temporary files go with the folder.

    Args:
        dataset_id: Minari id.
        overwrite: replace a data set that is there; without it, one that another process was faster to make is kept.
    """
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path

    path = get_dataset_path(dataset_id).resolve()
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)
    library, tempdir = os.environ.get("MINARI_DATASETS_PATH"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".making-", dir=get_dataset_path()) as folder:
        os.environ["MINARI_DATASETS_PATH"] = tempfile.tempdir = folder
        try:
            yield path
        finally:
            tempfile.tempdir = tempdir
            if library is None:
                del os.environ["MINARI_DATASETS_PATH"]
            else:
                os.environ["MINARI_DATASETS_PATH"] = library
        if overwrite or not path.exists():
            if path.exists():
                path.rename(Path(folder) / "replaced")
            (Path(folder) / dataset_id).rename(path)


def write_episodes(episodes: Iterable[Any], *, advance: Callable[[int], None], **metadata: Any) -> Any:
    """Write Minari's episode buffers into its library and return the data set.

    Args:
        episodes: `EpisodeBuffer`s, read as they are written.
        advance: is told, now and then, how many episodes were written.
        metadata: arguments of `minari.create_dataset_from_buffers`.
    """
    import minari

    dataset: Any = None
    waiting = iter(episodes)
    while chunk := list(itertools.islice(waiting, CHUNK_EPISODES)):
        if dataset is not None:
            dataset.update_dataset_from_buffer(chunk)
        else:
            with warnings.catch_warnings():
                for field in ("code_permalink", "author_email"):  # advice for publishers
                    warnings.filterwarnings("ignore", message=f"`{field}` is set to None", category=UserWarning)
                dataset = minari.create_dataset_from_buffers(buffer=chunk, **metadata)
        advance(len(chunk))
    return dataset


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield a function that draws a bar with a description and a total, and returns the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield lambda description, total: functools.partial(
            progress.advance, progress.add_task(description, total=total)
        )


def check_id(dataset_id: str) -> None:
    """Raise a DataError for what is no Minari id, or leads out of the library."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
        good = "//" not in dataset_id
    except (ValueError, TypeError):  # TypeError: no version
        good = False
    if not good:
        raise DataError(f"{dataset_id!r} is no Minari id; wanted one such as D4RL/pen/human-v2")


def library_path(dataset_id: str) -> Path:
    """Return the folder of a data set, of the library for an empty id."""
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        return Path(get_dataset_path(dataset_id))
    except OSError as error:
        raise DataError(f"no Minari library here ({one_line(error)}); set MINARI_DATASETS_PATH") from error


def open_whole(folder: Path, dataset_id: str, *, remedy: str = "--overwrite replaces it") -> Any:
    """Return the `minari.MinariDataset` in a folder.

    Raises:
        DataError: if metadata or last episode cannot be read, or it is not the one that was asked for.
    """
    import minari

    try:
        dataset = minari.MinariDataset(folder / "data")
        if dataset.total_episodes > 0:
            read_episode(dataset, dataset.total_episodes - 1)
    except (*DAMAGE, DataError) as error:
        raise DataError(f"{folder} is no complete data set ({one_line(error)}); {remedy}") from error
    if dataset.id != dataset_id:
        raise DataError(f"{folder / 'data/metadata.json'}: dataset_id {dataset.id!r}, wanted {dataset_id!r}; {remedy}")
    return dataset


def say_left_alone(dataset_id: str) -> None:
    """Tell of a data set that was wanted, is there, and was not replaced."""
    err.print(f"{dataset_id} is there and was left alone; --overwrite replaces it", soft_wrap=True)


@contextlib.contextmanager
def locked_staging(dataset_id: str, doing: str) -> Iterator[Path]:
    """Yield the hidden folder in which a data set is made; no other process has it at the same time.

    It outlives a failure. Minari lists no hidden folders, and no id has a dot.
    """
    folder = library_path("") / f".{doing}.{dataset_id.replace('/', '.')}"
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{one_line(error)}; make the library writable, or set MINARI_DATASETS_PATH") from error
    try:
        if not try_lock(handle):
            raise DataError(f"another process is {doing} it in {folder}; wait until that has ended")
        yield folder
    finally:
        os.close(handle)


def publish(folder: Path, dataset_id: str, *, overwrite: bool) -> bool:
    """Move a complete data set to its place; return whether it is the one that is there now."""
    path, replaced = library_path(dataset_id), folder.with_name(f"{folder.name}.replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not overwrite:  # another process was faster
        shutil.rmtree(folder, ignore_errors=True)
        return False
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    folder.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    return True


def facts_of(dataset: Any) -> dict[str, Any]:
    """Return what the metadata of a `minari.MinariDataset` say: id, folder, counts, references (NaN = none)."""
    metadata = dataset.storage.metadata
    return {
        "dataset": dataset.id,
        "path": str(Path(dataset.storage.data_path).parent),
        "num_steps": int(dataset.total_steps),
        "num_episodes": int(dataset.total_episodes),
        "ref_min": metadata.get("ref_min_score", math.nan),
        "ref_max": metadata.get("ref_max_score", math.nan),
    }
