"""A run's folder: what its files are called, and how they are read and written. No torch, so that looking is quick.

config.json  kernels.json  metrics.jsonl  state.ckpt  policy.safetensors  result.json  [grid.png]  [log.txt]
"""

import fcntl
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aepo import __version__
from aepo.config import RunConfig
from aepo.errors import CheckpointError
from aepo.textfile import read_text

RESULT, CONFIG, METRICS, POLICY = "result.json", "config.json", "metrics.jsonl", "policy.safetensors"
GRID = "grid.png"
KERNELS = "kernels.json"
"""How the run's steps are computed (aepo/kernels.py)."""
COMMIT = "COMMIT"
"""Beside the packages, in packed code."""


def read_spool(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the whole rows of a metrics file after a byte offset, and the offset behind them."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return [], offset
    whole = text.rfind(b"\n") + 1
    return [json.loads(line) for line in text[:whole].splitlines()], offset + whole


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of an ended run, None if it has not ended.

    Raises:
        CheckpointError: if the file is not a result.
    """
    try:
        result = json.loads(read_text(folder / RESULT))
        assert isinstance(result, dict)
        assert {"status", "fingerprint"} <= set(result)
    except FileNotFoundError:
        return None
    except (ValueError, AssertionError) as error:
        raise CheckpointError(f"{folder / RESULT} is not a result; delete {folder} to repeat the run") from error
    return result


def read_document(path: Path, *, kind: str, version: int, field: str) -> dict[str, Any]:
    """Return a JSON document of this version, an object that has `field` with something to count in it.

    Args:
        path: the file.
        kind: what its folder then is, for the message: "sweep".
        version: wanted in its `format`.
        field: a list or an object.

    Raises:
        CheckpointError: if there is none, or of another version.
    """
    try:
        document: dict[str, Any] = json.loads(read_text(path))
        assert document["format"] == version, f"format {document['format']}, wanted {version}"
        len(document[field])
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a {kind}: it has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a {kind} of this version: {error}") from error
    return document


def record_failure(config: RunConfig, folder: Path, error: str, *, started_at: str | None = None) -> None:
    """Write the result of a run that failed for good."""
    facts = {**describe(config, folder), "started_at": started_at}
    write_json(folder / RESULT, {**facts, "status": "failed", "error": error})


def describe(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Return what is known of a run before it starts, with every key that a result has."""
    return {
        "run": config.name,
        "task": config.task,
        "suite": config.suite,
        "source": config.data.source,
        "dataset": config.data.dataset,
        "dataset_digest": None,
        "env_id": None,
        "ref_min": None,
        "ref_max": None,
        "seed": config.seed,
        "fingerprint": config.fingerprint,
        "method": config.method,
        "preset": config.preset,
        "status": "missing",
        "error": None,
        "score": None,
        "return_mean": None,
        "num_episodes": None,
        "steps": 0,
        "steps_reused": 0,
        "seconds": 0.0,
        "evaluations": [],
        "curve": [],
        "grid": [],
        "commit": commit(),
        "version": __version__,
        "machine": f"{platform.processor() or platform.machine()}, torch {version('torch')}",
        "started_at": None,
        "folder": str(folder),
    }


def write_json(path: Path, document: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that after a crash is either whole or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def commit() -> str | None:
    """Return the git commit of this code, with `+dirty` if changed, None outside a checkout.

    What `aepo submit` has packed has no history; a file says which commit it is.
    """
    here = Path(__file__).parent
    if (packed := here.parent / COMMIT).exists():
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


def try_lock(descriptor: int) -> bool:
    """Return whether this process now holds an open file's lock, which goes with the process.

    On a file system without locks everybody holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
