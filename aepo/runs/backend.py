"""The backend of a run's matrix products: chosen when it begins, noted in its folder, and kept when it goes on."""

import dataclasses
from pathlib import Path

import torch

from aepo import checkpoint, kernels, parallel
from aepo.config import RunConfig
from aepo.data.transitions import cache_folder
from aepo.documents import read_document
from aepo.errors import CheckpointError
from aepo.files import write_json
from aepo.runs.rundir import KERNELS, METRICS


def backend_of(config: RunConfig, folder: Path) -> kernels.Backend:
    """Return the backend with which a run began, or begins, and note it in its folder; errors as `noted_backend`."""
    if (noted := noted_backend(config, folder)) is not None:
        return noted
    chosen = kernels.choose(own_table())
    facts = {"format": 1, "arithmetic": kernels.ARITHMETIC, "backend": chosen, "torch": torch.__version__}
    write_json(folder / KERNELS, facts | dataclasses.asdict(kernels.processor()))
    return chosen


def noted_backend(config: RunConfig, folder: Path) -> kernels.Backend | None:
    """Return the backend with which a run began, None if it has not.

    Raises:
        CheckpointError: if it was stopped before the arithmetic of training changed: its steps would not be those
            that it has taken.
    """
    rows = folder / METRICS
    saved = any((folder / name).exists() for name in (checkpoint.FILE, checkpoint.PREVIOUS))
    if not saved and not (rows.exists() and rows.stat().st_size):
        return None  # nothing was computed, whatever is noted
    path = folder / KERNELS
    # without a note it is from before this was written down
    begun = read_document(path, kind="run", version=1, field="backend") if path.exists() else {"arithmetic": 1}
    if begun.get("arithmetic") != kernels.ARITHMETIC:
        raise CheckpointError(
            f"{config.name} was stopped under arithmetic {begun.get('arithmetic')}, this version computes by "
            f"{kernels.ARITHMETIC}, and the two are never mixed: continue it with the version that began it, or delete "
            f"{folder} to begin again"
        )
    if begun["backend"] not in kernels.backends():
        raise CheckpointError(
            f"{path}: the run began with {begun['backend']!r}, this torch has {', '.join(kernels.backends())}; "
            f"continue it where torch has the other, or delete {folder} to begin again"
        )
    backend: kernels.Backend = begun["backend"]
    return backend


def agreed_backend(backend: kernels.Backend) -> kernels.Backend:
    """Return the leader's backend in every worker: their processors may differ."""
    return "onednn" if parallel.broadcast_flag(backend == "onednn") else "torch"


def own_table() -> Path:
    """Return where `aepo doctor --measure` keeps what it found on this user's processors."""
    return cache_folder() / "kernels.csv"
