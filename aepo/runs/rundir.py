"""A run's folder: what its files are called, and how they are read and written. No torch, so that looking is quick.

config.json  kernels.json  metrics.jsonl  state.ckpt  policy.safetensors  result.json  [grid.png]  [log.txt]  run.lock
"""

import dataclasses
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from aepo import __version__
from aepo.config import RunConfig
from aepo.documents import first_fault, parser
from aepo.errors import CheckpointError
from aepo.files import write_json
from aepo.results import Result

RESULT, CONFIG, METRICS, POLICY = "result.json", "config.json", "metrics.jsonl", "policy.safetensors"
GRID = "grid.png"
KERNELS = "kernels.json"
"""File that says how the run's steps are computed (aepo/kernels.py)."""
LOCK = "run.lock"
"""File that the process which carries the run out holds locked; it names the process."""
COMMIT = "COMMIT"
"""File beside the packages, in packed code, with the commit that they are of."""


def read_result(folder: Path) -> Result | None:
    """Return the result of an ended run, None if it has not ended.

    Raises:
        CheckpointError: if the file is not a result.
    """
    path = folder / RESULT
    try:
        result: Result = parser(Result).validate_json(path.read_bytes())
        if result.status != "missing":
            return result
        reason = "status: a run without an end has none"
    except FileNotFoundError:
        return None
    except NotADirectoryError:  # somebody's file in the place of the folder: not ours to delete
        raise
    except ValidationError as error:
        reason = first_fault(error)
    except OSError as error:
        reason = str(error.strerror)
    raise CheckpointError(f"{path} is not a result ({reason}); delete {folder} to repeat the run")


def write_result(folder: Path, result: Result) -> None:
    """Write the result of a run that has ended, atomically."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def record_failure(config: RunConfig, folder: Path, error: str, *, started_at: str | None = None) -> None:
    """Write the result of a run that failed for good."""
    known = describe(config, folder)
    write_result(folder, dataclasses.replace(known, started_at=started_at, status="failed", error=error))


def describe(config: RunConfig, folder: Path) -> Result:
    """Return what is known of a run before it starts."""
    return Result.unended(
        run=config.name,
        task=config.task,
        suite=config.suite,
        source=config.data.source,
        dataset=config.data.dataset,
        seed=config.seed,
        fingerprint=config.fingerprint,
        method=config.method,
        preset=config.preset,
        commit=commit(),
        version=__version__,
        machine=f"{platform.processor() or platform.machine()}, torch {version('torch')}",
        folder=str(folder),
    )


@cache
def commit() -> str | None:
    """Return the git commit of this code, with `+dirty` if changed, None outside a checkout.

    What `aepo submit` has packed has no history; a file says which commit it is.
    """
    here = Path(__file__).parent
    if (packed := here.parents[1] / COMMIT).exists():
        return packed.read_text().strip() or None
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() or None
