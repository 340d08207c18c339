"""Minari data sets downloaded from Minari's remote.

They are written into a hidden folder of Minari's library, which is renamed when it is complete: what an interrupted
process leaves behind never looks like a data set, and the next download goes on from it.

The files are those of `minari.download_dataset`, but do not come through it: it takes any folder of the right name for
a complete data set, prints on standard output, and without network tries for 23 s. Nor through `snapshot_download` of
huggingface_hub 2.4, which deletes what an interrupted transfer has received.
"""

import dataclasses
import hashlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from aepo.console import err, say
from aepo.data.episodes import one_line
from aepo.data.staging import (
    check_id,
    facts_of,
    library_path,
    locked_staging,
    open_whole,
    publish,
    say_left_alone,
)
from aepo.documents import parse_json
from aepo.errors import AEPOError, ConfigError, DataError, ResourceError, lacks_space

TIMEOUT_S = 10.0
"""Seconds that a server may take to accept a connection, and between two pieces of an answer."""
TRIES, WAIT_S = 3, 1.0
"""A transfer gives up after so many answers in a row that brought nothing, so many seconds apart."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DownloadSummary:
    """A data set that is now in the library. References that it does not have are NaN."""

    dataset: str
    """Minari id."""
    path: str
    """Folder of the data set."""
    downloaded: bool
    """It is true if the set was downloaded now; else it was there before and has been left alone."""
    num_steps: int
    num_episodes: int
    ref_min: float
    """Return of score 0, from its metadata."""
    ref_max: float
    """Return of score 100."""
    num_bytes: int
    """Bytes received now; what an earlier attempt had received is not counted."""
    download_s: float
    """Wall-clock seconds, checking included."""


def download(dataset_ids: Sequence[str], *, jobs: int = 4, overwrite: bool = False) -> list[DownloadSummary]:
    """Download data sets into Minari's local library, several at once; return them in the order asked for.

    The remote is that of Minari: MINARI_REMOTE, by default hf://farama-minari, at HF_ENDPOINT. One that is there is
    left alone. One that fails does not stop the others. What an interrupted attempt has received is not fetched again.

    Args:
        dataset_ids: Minari ids.
        jobs: data sets at a time, >= 1.
        overwrite: replace data sets of these names, each when the new one is complete.

    Raises:
        ConfigError: if `jobs` is out of range or MINARI_REMOTE is none of Hugging Face.
        DataError: if an id is none (before anything is touched), or, after all were tried, if some failed; says
            why, and how to get them without network.
        ResourceError: if huggingface_hub is not installed, or the disk is too small for all that failed.
    """
    if jobs < 1:
        raise ConfigError(f"wanted jobs >= 1, got {jobs}")
    for dataset_id in dataset_ids:
        check_id(dataset_id)
    done: dict[str, DownloadSummary] = {}
    failed: dict[str, Exception] = {}
    missing = []
    for dataset_id in dict.fromkeys(dataset_ids):
        if overwrite or not library_path(dataset_id).exists():
            missing.append(dataset_id)
            continue
        try:
            done[dataset_id] = _downloaded(dataset_id, downloaded=False)
            say_left_alone(dataset_id)
        except DataError as error:
            failed[dataset_id] = error
    if missing:
        for dataset_id, outcome in _download_all(missing, jobs=jobs, overwrite=overwrite):
            if isinstance(outcome, Exception):
                failed[dataset_id] = outcome
            else:
                done[dataset_id] = outcome
    if failed:
        raise _failure(failed) from ExceptionGroup("downloads that failed", list(failed.values()))
    return [done[dataset_id] for dataset_id in dict.fromkeys(dataset_ids)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """One file of a data set on the remote."""

    name: str
    """Path relative to the data set's folder."""
    url: str
    num_bytes: int
    digest: str
    """SHA-256 of its content, else its git blob's SHA-1 (of small files); empty = the remote does not say."""

    def intact(self, path: Path) -> bool:
        """Return whether a local file has this content."""
        if not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        if len(self.digest) == 40:
            content = b"blob %d\0" % self.num_bytes + path.read_bytes()
            return hashlib.sha1(content, usedforsecurity=False).hexdigest() == self.digest
        with path.open("rb") as file:
            return self.digest in ("", hashlib.file_digest(file, "sha256").hexdigest())


def _download_all(
    dataset_ids: Sequence[str], *, jobs: int, overwrite: bool
) -> Iterator[tuple[str, DownloadSummary | Exception]]:
    """Try all; yield what became of each."""
    remote, hub = _remote(), _hub()
    listings: dict[str, Any] = {}
    for repository in dict.fromkeys(dataset_id.partition("/")[0] for dataset_id in dataset_ids):
        name = f"{remote.removeprefix('hf://')}/{repository}"
        try:
            listings[repository] = hub.HfApi().dataset_info(name, files_metadata=True, timeout=TIMEOUT_S)
        except Exception as error:  # whatever the libraries below raise, it concerns this repository alone
            listings[repository] = error
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    stop, pool = threading.Event(), ThreadPoolExecutor(jobs)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def attempt(dataset_id: str) -> DownloadSummary | Exception:
            listing = listings[dataset_id.partition("/")[0]]
            if isinstance(listing, Exception):
                return listing
            try:
                return _download_one(dataset_id, listing, progress=progress, stop=stop, overwrite=overwrite)
            except Exception as error:  # as above, this data set alone
                return error

        try:
            yield from zip(dataset_ids, pool.map(attempt, dataset_ids), strict=True)
        finally:  # also at Ctrl-C
            stop.set()
            pool.shutdown(cancel_futures=True)


def _download_one(
    dataset_id: str, listing: Any, *, progress: Progress, stop: threading.Event, overwrite: bool
) -> DownloadSummary:
    begin_s, num_received = time.perf_counter(), 0
    files = _files(dataset_id, listing)
    names, total = {file.name for file in files}, sum(file.num_bytes for file in files)

    def received(num_bytes: int) -> None:
        nonlocal num_received
        num_received += num_bytes
        progress.advance(bar, num_bytes)

    with locked_staging(dataset_id, "downloading") as folder:
        bar = progress.add_task(dataset_id, total=total)
        for file in files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{file.digest[:12]}.part")
            progress.advance(bar, max(_size(path), _size(part)))
            if not file.intact(path):
                _check_space(file.num_bytes - _size(part), folder)
                _fetch(file, part, received=received, stop=stop)
                if not file.intact(part):
                    part.unlink()
                    raise DataError(f"{file.url}: what arrived is not what the remote lists; give the command again")
                part.replace(path)
            if file.name == "data/metadata.json":
                _check_metadata(dataset_id, path, file.url)
        for path in folder.rglob("*"):  # of an earlier attempt at another version
            if path.is_file() and path.relative_to(folder).as_posix() not in names:
                path.unlink()
        open_whole(folder, dataset_id, remedy=f"yet it is what {_remote()} has")
        published = publish(folder, dataset_id, overwrite=overwrite)
    progress.remove_task(bar)
    seconds = time.perf_counter() - begin_s
    summary = _downloaded(dataset_id, downloaded=published, num_bytes=num_received, download_s=seconds)
    say(
        f"{dataset_id}: {summary.num_steps:,} steps, {total / 1e6:,.1f} MB, {num_received / 1e6:,.1f} of them received "
        f"in {seconds:.1f} s"
    )
    return summary


def _remote() -> str:
    """Return the remote that Minari uses, which must be one of Hugging Face."""
    from minari.storage.remotes import DEFAULT_REMOTE

    remote = os.environ.get("MINARI_REMOTE") or str(DEFAULT_REMOTE)
    if not remote.startswith("hf://"):
        raise ConfigError(f"MINARI_REMOTE is {remote!r}; wanted one of Hugging Face, such as {DEFAULT_REMOTE}")
    return remote


def _hub() -> Any:
    try:
        importlib.import_module("huggingface_hub.utils")
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ResourceError(f'no downloads here ({error}); pip install "minari[hf]"') from error


def _files(dataset_id: str, listing: Any) -> list[_File]:
    """Return a data set's files, metadata first, from the listing of its repository at one commit.

    Raises:
        DataError: if it has none there, or one that leads out of its folder.
    """
    hub = _hub()
    repository, _, folder = dataset_id.partition("/")
    prefix = f"{folder}/" if folder else ""
    names = {sibling.rfilename: sibling for sibling in listing.siblings or ()}
    if f"{prefix}data/metadata.json" not in names:
        others = [f"{repository}/{name}" for name in names if name.endswith("/data/metadata.json")]
        near = get_close_matches(dataset_id, [name.removesuffix("/data/metadata.json") for name in others])
        hint = f"did you mean {' or '.join(near)}?" if near else "`minari list remote` shows what is"
        raise DataError(f"it is not at {_remote()}; {hint}")
    files = []
    for name in sorted(names, key=lambda name: (not name.endswith("/metadata.json"), name)):
        if not name.startswith(f"{prefix}data/"):
            continue
        if ".." in PurePosixPath(name).parts:
            raise DataError(f"{_remote()} lists {name!r}, which leads out of the data set's folder")
        file = names[name]
        files.append(
            _File(
                name=name.removeprefix(prefix),
                url=hub.hf_hub_url(listing.id, name, repo_type="dataset", revision=listing.sha),
                num_bytes=file.size,
                digest=file.lfs.sha256 if file.lfs else file.blob_id or "",
            )
        )
    return files


def leave_addresses(dataset_ids: Sequence[str], folder: Path) -> str:
    """Write the addresses of data sets' files into a folder, a file for each repository; return how wget takes them.

    The remote is not asked: the names are those of Minari's HDF5 format at the newest commit.

    Args:
        dataset_ids: Minari ids.
        folder: is made.
    """
    hub, author = _hub(), _remote().removeprefix("hf://")
    lines_of: dict[str, list[str]] = {}
    commands = []
    for dataset_id in dataset_ids:
        repository, _, name = dataset_id.partition("/")
        lines = lines_of.setdefault(repository, [])
        for file in ("metadata.json", "main_data.hdf5"):
            lines.append(hub.hf_hub_url(f"{author}/{repository}", f"{name}/data/{file}", repo_type="dataset"))
    folder.mkdir(parents=True, exist_ok=True)
    for repository, lines in lines_of.items():
        listed = folder / f"addresses-{repository}.txt"
        listed.write_text("".join(f"{line}\n" for line in lines))
        above = urlsplit(lines[0]).path.strip("/").split("/").index("main") + 1
        commands.append(
            f"`wget --continue --force-directories --no-host-directories --cut-dirs={above} "
            f"--directory-prefix={repository} --input-file={listed.name}`"
        )
    names = ", ".join(f"{folder}/addresses-{repository}.txt" for repository in lines_of)
    return (
        f"or bring {names} to such a machine, {' and '.join(commands)}, then bring {', '.join(lines_of)} "
        f"from there into {library_path('')} here"
    )


def _check_metadata(dataset_id: str, path: Path, url: str) -> None:
    """Raise a DataError for a wrong id or a version that the installed Minari cannot read, before gigabytes follow."""
    from minari import __version__, supported_dataset_versions

    try:
        metadata = parse_json(path.read_text())
        found, version = metadata["dataset_id"], metadata["minari_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url}: no metadata of a data set ({one_line(error)})") from error
    if found != dataset_id:
        raise DataError(f"{url}: dataset_id {found!r}, wanted {dataset_id!r}")
    if version not in supported_dataset_versions:
        raise DataError(f"{url}: written by Minari {version}, which the installed {__version__} cannot read")


def _fetch(file: _File, part: Path, *, received: Callable[[int], None], stop: threading.Event) -> None:
    """Complete `part`, going on from what it has; it keeps what arrived before an error."""
    num_tries = 0
    while (before := _size(part)) < file.num_bytes:
        try:
            _receive(file, part, received=received, stop=stop)
            if _size(part) < file.num_bytes:
                raise ConnectionError(f"the answer ended after {_size(part):,} of {file.num_bytes:,} bytes")
        except Exception as error:
            if isinstance(error, OSError) and lacks_space(error):
                raise ResourceError(f"{part.parent}: {error.strerror}; make room, give the command again") from error
            num_tries = 1 if _size(part) > before else num_tries + 1
            if num_tries >= TRIES or stop.wait(WAIT_S):
                raise


def _receive(file: _File, part: Path, *, received: Callable[[int], None], stop: threading.Event) -> None:
    """Append one answer of the server to `part`; begin anew if the server cannot go on."""
    hub, start = _hub(), _size(part)
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with hub.get_session().stream("GET", file.url, headers=headers, timeout=TIMEOUT_S) as answer:
        hub.utils.hf_raise_for_status(answer)
        with part.open("ab" if answer.status_code == 206 else "wb") as out:
            for chunk in answer.iter_bytes():
                out.write(chunk)
                received(len(chunk))
                if stop.is_set():
                    raise InterruptedError("stopped")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(num_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ResourceError(
            f"{num_bytes / 1e6:,.1f} MB are missing and {free / 1e6:,.1f} MB free in {folder.parent}; "
            "make room, or set MINARI_DATASETS_PATH to a larger disk"
        )


def _failure(failed: Mapping[str, Exception]) -> AEPOError:
    """Return one error for all data sets that failed: which, why, and what to do."""
    ids_of: dict[str, list[str]] = {}
    for dataset_id, error in failed.items():
        ids_of.setdefault(_reason(error), []).append(dataset_id)
    reasons = "; ".join(f"{', '.join(ids)}: {reason}" for reason, ids in ids_of.items())
    outside = [dataset_id for dataset_id, error in failed.items() if not isinstance(error, AEPOError)]
    if outside:
        name = outside[0] if len(outside) == 1 else "ID"
        reasons += (
            f"; the same command goes on where this one ended; without network: `minari download {name}` on a machine "
            f"that has one, then bring its folder ~/.minari/datasets/{name} (or $MINARI_DATASETS_PATH/{name}) here "
            f"as {library_path(name)}"
        )
    all_resources = all(isinstance(error, ResourceError) for error in failed.values())
    return (ResourceError if all_resources else DataError)(f"not downloaded: {reasons}")


def _reason(error: Exception) -> str:
    if isinstance(error, AEPOError):
        return str(error)
    answer = getattr(error, "response", None)
    text = one_line(error) if answer is None else f"HTTP {answer.status_code} from {answer.url}"
    return f"{_remote()} at {_hub().HfApi().endpoint}: {type(error).__name__}: {text}"


def _downloaded(dataset_id: str, *, downloaded: bool, num_bytes: int = 0, download_s: float = 0.0) -> DownloadSummary:
    facts = facts_of(open_whole(library_path(dataset_id), dataset_id))
    return DownloadSummary(**facts, downloaded=downloaded, num_bytes=num_bytes, download_s=download_s)
