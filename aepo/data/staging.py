"""New data sets appear whole or not at all: they are made in a hidden folder and then renamed.

The folder lies beside the place of the data set, where it may: a namespace of the library, or a data set, can be a
symbolic link to another disk, to which nothing can be renamed from the library's own.
"""

import contextlib
import errno
import functools
import itertools
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aepo.console import err, say
from aepo.data.episodes import DAMAGE, one_line, read_episode
from aepo.errors import AEPOError, DataError, ResourceError, lacks_space
from aepo.files import try_lock
from aepo.names import bounded

CHUNK_EPISODES = 100
"""Written episodes between two updates of a progress bar."""
EPISODE_BYTES = 32_768
"""An episode takes so many bytes of an HDF5 file beside its arrays, at most; 14,000 to 21,000 were measured."""


@contextlib.contextmanager
def staged(dataset_id: str, *, overwrite: bool = False, num_bytes: int = 0) -> Iterator[Path]:
    """Yield the place of a data set; one that is made within the block appears there at the block's end.

    Until then it lies in a hidden folder, and MINARI_DATASETS_PATH and `tempfile.tempdir` of this process point there:
    one block per process at a time. Minari lists no hidden folders: what a killed process leaves never looks like a
    data set. The models that gymnasium-robotics leaves among the temporary files go with the folder.

    Args:
        dataset_id: Minari id.
        overwrite: replace a data set that is there; without it, one that another process was faster to make is kept.
        num_bytes: what the data set will take at least, as far as that is known.

    Raises:
        DataError: before the block, if the place cannot be written to.
        ResourceError: before the block, if there is no room for so much, or if there is none later.
    """
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces

    path = destination(dataset_id)
    namespace = parse_dataset_id(dataset_id)[0]
    try:
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        staging = tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent)
    except OSError as error:
        raise _unwritable(error, path) from error
    library, tempdir = os.environ.get("MINARI_DATASETS_PATH"), tempfile.tempdir
    with staging as folder, _saying_what_is_full(path):
        check_room(Path(folder), num_bytes)
        os.environ["MINARI_DATASETS_PATH"] = tempfile.tempdir = folder
        try:
            yield path
        finally:
            tempfile.tempdir = tempdir
            if library is None:
                del os.environ["MINARI_DATASETS_PATH"]
            else:
                os.environ["MINARI_DATASETS_PATH"] = library
        publish(Path(folder) / dataset_id, dataset_id, overwrite=overwrite)


@contextlib.contextmanager
def _saying_what_is_full(path: Path) -> Iterator[None]:
    """Raise a ResourceError for want of space, whichever library meets it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 raises both
        if not lacks_space(error):
            raise
        raise _full(path) from error


def _full(path: Path) -> ResourceError:
    return ResourceError(
        f"no space left for {path}; make room, or set MINARI_DATASETS_PATH to a larger disk, and repeat"
    )


def _unwritable(error: Exception, path: Path) -> AEPOError:
    if lacks_space(error):
        return _full(path)
    return DataError(f"{one_line(error)}; make the library writable, or set MINARI_DATASETS_PATH")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise an OSError unless so much may be written into a folder now, quotas and limits of this process included.

    HDF5 must not meet a full disk: it ends the process with a fault of memory.
    """
    if num_bytes:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)


def write_episodes(episodes: Iterable[Any], *, advance: Callable[[int], None], **metadata: Any) -> Any:
    """Write Minari's episode buffers into its library and return the data set.

    Raises:
        OSError: if there is no room for the next of them.

    Args:
        episodes: `EpisodeBuffer`s, read as they are written.
        advance: is told, now and then, how many episodes were written.
        metadata: arguments of `minari.create_dataset_from_buffers`.
    """
    import minari

    dataset: Any = None
    waiting = iter(episodes)
    while chunk := list(itertools.islice(waiting, CHUNK_EPISODES)):
        check_room(library_path(""), sum(map(_num_bytes, chunk)))
        if dataset is not None:
            dataset.update_dataset_from_buffer(chunk)
        else:
            with warnings.catch_warnings():
                for field in ("code_permalink", "author_email"):  # advice for publishers
                    warnings.filterwarnings("ignore", message=f"`{field}` is set to None", category=UserWarning)
                dataset = minari.create_dataset_from_buffers(buffer=chunk, **metadata)
        advance(len(chunk))
    return dataset


def _num_bytes(episode: Any) -> int:
    """Return about how much an `EpisodeBuffer` takes in a file."""
    parts = [episode.observations, episode.actions, episode.rewards, episode.terminations, episode.truncations]
    arrays = []
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            parts += part.values()
        else:
            arrays.append(np.asarray(part))
    return EPISODE_BYTES + sum(array.nbytes for array in arrays)


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


def destination(dataset_id: str) -> Path:
    """Return the folder of a data set, symbolic links followed; the one above it is made.

    Raises:
        DataError: if it cannot be.
    """
    path = library_path(dataset_id)
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _unwritable(error, path) from error
    return path


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
    say(f"{dataset_id} is there and was left alone; --overwrite replaces it")


@contextlib.contextmanager
def locked_staging(dataset_id: str, doing: str) -> Iterator[Path]:
    """Yield the hidden folder in which a data set is made; no other process has it at the same time.

    It outlives a failure. Minari lists no hidden folders, and no id has a dot.

    Raises:
        DataError: if the place cannot be written to, or another process has it.
        ResourceError: if the disk is full.
    """
    path = destination(dataset_id)
    folder = path.parent / f".{doing}.{bounded(dataset_id.replace('/', '.'))}"
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(error, path) from error
    try:
        if not try_lock(handle):
            raise DataError(f"another process is {doing} it in {folder}; wait until that has ended")
        with _saying_what_is_full(path):
            yield folder
    finally:
        os.close(handle)


def publish(folder: Path, dataset_id: str, *, overwrite: bool) -> bool:
    """Move a complete data set to its place; return whether it is the one that is there now.

    What it replaces is put back if it cannot be moved.
    """
    path, replaced = destination(dataset_id), folder.with_name(f"{bounded(folder.name)}.replaced")
    if path.exists() and not overwrite:  # another process was faster
        shutil.rmtree(folder, ignore_errors=True)
        return False
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        _move(path, replaced)
    try:
        _move(folder, path)
    except OSError:
        if replaced.exists():
            _move(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return True


def _move(source: Path, target: Path) -> None:
    """Rename a folder; copy it first where that is to another file system, so that it appears whole there too.

    Folders beside each other can be on two: one of them is where something is mounted, or a layer of a container.
    """
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = target.with_name(f".moving.{bounded(target.name)}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(source, partial)
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(source)


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
