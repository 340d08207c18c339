"""One Minari data set of the episodes of several, as D4RL's medium-expert of medium and expert."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from aepo.console import err
from aepo.data.episodes import DAMAGE, data_file, one_line
from aepo.data.staging import (
    check_id,
    check_room,
    facts_of,
    library_path,
    locked_staging,
    open_whole,
    publish,
    say_left_alone,
)
from aepo.errors import ConfigError, DataError, lacks_space
from aepo.tasks import check_references


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CombineSummary:
    """A data set made of others. References that it does not have are NaN."""

    dataset: str
    """Minari id."""
    path: str
    """Folder of the data set."""
    combined: bool
    """It is true if the set was joined now; else it was there before and has been left alone."""
    parts: tuple[str, ...]
    """Minari ids of the parts, in the order of their episodes."""
    num_steps: int
    num_episodes: int
    ref_min: float
    """Return of score 0."""
    ref_max: float
    """Return of score 100."""


def combine(
    dataset_id: str,
    parts: Sequence[str],
    *,
    description: str,
    ref_min: float | None,
    ref_max: float | None,
    overwrite: bool = False,
) -> CombineSummary:
    """Make one local data set from the episodes of several, in their order; one that is there is left alone.

    It holds copies: the parts may be deleted. What the parts' metadata agree on, it says too. Written here, because
    `minari.combine_datasets` loses the episodes' seeds and the evaluation environment, mixes different spaces, and
    takes twelve times as long.

    Args:
        dataset_id: of the new data set.
        parts: two or more Minari ids.
        description: for its metadata.
        ref_min: return of score 0; None = what the parts agree on.
        ref_max: return of score 100, > ref_min.
        overwrite: replace a data set of this name.

    Raises:
        ConfigError: if the references are not two finite numbers in ascending order.
        DataError: if an id is none, a part is missing or broken, or the parts differ in spaces or environments.
        ResourceError: if the disk is full.
    """
    for name in (dataset_id, *parts):
        check_id(name)
    if len(parts) < 2 or len({dataset_id, *parts}) <= len(parts):
        raise DataError(f"{dataset_id}: wanted two or more different parts, got {', '.join(parts) or 'none'}")
    if (ref_min is None) != (ref_max is None):
        raise ConfigError(f"{dataset_id}: one reference return of two: {ref_min} and {ref_max}")
    if ref_min is not None and ref_max is not None:
        check_references(dataset_id, ref_min, ref_max)
    if library_path(dataset_id).exists() and not overwrite:
        found = _combined(dataset_id, combined=False)
        say_left_alone(dataset_id)
        return found
    for part in parts:
        if not library_path(part).exists():
            raise DataError(f"{dataset_id} needs {part}, which is not in {library_path('')}; aepo data download {part}")
    datasets = [open_whole(library_path(part), part, remedy=f"aepo data download {part} --overwrite") for part in parts]
    metadata = _common_metadata(dataset_id, datasets)
    metadata |= {"dataset_id": dataset_id, "description": description, "combined_datasets": list(parts)}
    if ref_min is not None:
        metadata |= {"ref_min_score": ref_min, "ref_max_score": ref_max}
    with locked_staging(dataset_id, "combining") as folder:
        try:
            shutil.rmtree(folder / "data", ignore_errors=True)  # of a killed process
            (folder / "data").mkdir()
            file = folder / "data" / "main_data.hdf5"
            check_room(folder, sum(data_file(dataset).stat().st_size for dataset in datasets))
            metadata |= _copy_episodes(dataset_id, datasets, file)
            metadata["dataset_size"] = round(file.stat().st_size / 1e6, 1)
            (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
            published = publish(folder, dataset_id, overwrite=overwrite)
        except DAMAGE as error:
            if lacks_space(error):
                raise
            raise DataError(f"{dataset_id} was not combined of {', '.join(parts)}: {one_line(error)}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return _combined(dataset_id, combined=published)


def _common_metadata(dataset_id: str, datasets: Sequence[Any]) -> dict[str, Any]:
    """Return what the metadata of all parts say alike.

    Raises:
        DataError: if they differ in what makes one data set of them.
    """
    import minari
    from minari.utils import validate_datasets_to_combine

    first = datasets[0]
    raw = [dataset.storage.read_raw_metadata(dataset.storage.data_path) for dataset in datasets]
    common = {key: value for key, value in raw[0].items() if all(other.get(key) == value for other in raw)}
    for dataset, other in zip(datasets, raw, strict=True):
        differences = {
            "observation space": (dataset.observation_space, first.observation_space),
            "action space": (dataset.action_space, first.action_space),
            "evaluation environment": (other.get("eval_env_spec"), raw[0].get("eval_env_spec")),
            "image encoding": (other.get("jpeg_encoding", True), raw[0].get("jpeg_encoding", True)),
            "format": (other["data_format"], "hdf5"),
        }
        for what, (got, wanted) in differences.items():
            if got != wanted:
                raise DataError(f"{dataset_id}: {what} of {dataset.id} is {got}, of {first.id} {wanted}; not combined")
    try:
        env_spec = validate_datasets_to_combine(datasets)
    except ValueError as error:
        ids = ", ".join(f"{dataset.id} {dataset.env_spec and dataset.env_spec.id}" for dataset in datasets)
        raise DataError(f"{dataset_id}: the parts have different environments ({ids}); not combined") from error
    spaces = {key: raw[0][key] for key in ("observation_space", "action_space")}
    common |= spaces | {"minari_version": minari.__version__}
    if env_spec is not None:
        common["env_spec"] = env_spec.to_json()
    common.pop("aepo", None)  # how one of them was collected
    return common


def _copy_episodes(dataset_id: str, datasets: Sequence[Any], path: Path) -> dict[str, int]:
    """Write all episodes into one file of Minari's layout, numbered on; return what the metadata say of them."""
    import h5py

    num_episodes = num_steps = 0
    episodes = [(dataset, index) for dataset in datasets for index in range(dataset.total_episodes)]
    with contextlib.ExitStack() as stack:
        sources = {
            dataset.id: stack.enter_context(h5py.File(dataset.storage.data_path / "main_data.hdf5"))
            for dataset in datasets
        }
        target = stack.enter_context(h5py.File(path, "w", track_order=True))
        for dataset, index in track(
            episodes,
            description=f"combining {dataset_id}",
            console=err,
            transient=True,
            disable=not err.is_terminal,
        ):
            source, name = sources[dataset.id], f"episode_{num_episodes}"
            source.copy(source[f"episode_{index}"], target, name, expand_external=True)
            target[name].attrs["id"] = num_episodes
            num_episodes += 1
            num_steps += len(target[name]["rewards"])
    return {"total_episodes": num_episodes, "total_steps": num_steps}


def _combined(dataset_id: str, *, combined: bool) -> CombineSummary:
    dataset = open_whole(library_path(dataset_id), dataset_id)
    return CombineSummary(**facts_of(dataset), combined=combined, parts=tuple(dataset.combined_datasets))
