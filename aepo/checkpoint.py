"""The states of a run <-> one file: complete, atomic, checked, never unpickled.

A file is MAGIC, the SHA-256 of the payload, the payload (torch's zip format, read with `weights_only=True`).
`save` keeps the file before it; `load` falls back on that one if the newest is torn.
"""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aepo.console import warn
from aepo.errors import CheckpointError
from aepo.files import write_atomically

MAGIC = b"aepo-checkpoint-1\n"
FILE = "state.ckpt"
PREVIOUS = "state.previous.ckpt"


def collect(state: Any) -> dict[str, Any]:
    """Return every field of a state dataclass, or entry of a dict of them, as plain values and tensors.

    A field of another kind raises a TypeError.

    Tensors are those of the live state: write them before it goes on.
    """
    return {name: _collect(value) for name, value in _parts(state).items()}


def restore(state: Any, saved: dict[str, Any]) -> None:
    """Set every field of a state dataclass, or of a dict of them, from what `collect` returned.

    Raises:
        CheckpointError: if the fields, or the shapes in them, are those of another run.
    """
    parts = _parts(state)
    if not isinstance(saved, dict) or set(saved) != set(parts):
        held = sorted(map(str, saved)) if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise CheckpointError(f"checkpoint holds {held}, wanted {sorted(parts)}: of another version")
    for name, value in parts.items():
        part = saved[name]
        try:
            if isinstance(value, nn.Module | torch.optim.Optimizer):
                _check_alike(value.state_dict(), part)  # an optimizer itself takes anything
                value.load_state_dict(part)
            elif isinstance(value, torch.Generator):
                value.set_state(part)
            elif dataclasses.is_dataclass(value):
                restore(value, part)
            elif isinstance(value, Tensor):
                value.copy_(part)
            else:
                setattr(state, name, type(value)(part))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint does not fit this run at {name!r}: {reason}") from error


def _check_alike(ours: Any, theirs: Any) -> None:
    """Raise a ValueError, TypeError or LookupError unless a saved value has our tensors and numbers at their places."""
    if isinstance(ours, Tensor):
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            got = f"a tensor {tuple(theirs.shape)}" if isinstance(theirs, Tensor) else f"a {type(theirs).__name__}"
            raise ValueError(f"{got}, wanted a tensor {tuple(ours.shape)}")
    elif isinstance(ours, dict):
        for key, value in ours.items():
            _check_alike(value, theirs[key])
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            _check_alike(one, other)
    elif isinstance(ours, int | float) and not isinstance(theirs, int | float):
        raise TypeError(f"a {type(theirs).__name__}, wanted a number")


def _parts(state: Any) -> dict[str, Any]:
    if isinstance(state, dict):
        return state
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _collect(value: Any) -> Any:
    if isinstance(value, nn.Module | torch.optim.Optimizer):
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return collect(value)
    if isinstance(value, Tensor | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write `content` as the folder's newest checkpoint; at no moment is there none."""
    data = to_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FILE).exists():
        (folder / FILE).replace(folder / PREVIOUS)
    write_atomically(folder / FILE, data)


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest whole checkpoint of a folder, on the CPU; None if there has been none.

    Raises:
        CheckpointError: if there are files but none is whole.
    """
    problems = []
    for path in (folder / FILE, folder / PREVIOUS):
        try:
            content = from_bytes(path.read_bytes(), path)
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem}; going on from the one before it")
        return content
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; delete {folder} to start this run anew")
    return None


def to_bytes(content: dict[str, Any]) -> bytes:
    """Return the content of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    return MAGIC + hashlib.sha256(payload).digest() + payload


def from_bytes(data: bytes, path: Path) -> dict[str, Any]:
    """Return what `to_bytes` was given, on the CPU; `path` is for the message.

    Raises:
        CheckpointError: if it is torn, changed or foreign.
    """
    start = len(MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this version of aepo")
    if hashlib.sha256(data[start:]).digest() != data[len(MAGIC) : start]:
        raise CheckpointError(
            f"{path} is torn or changed ({len(data):,} bytes); delete it, and the one before it is used"
        )
    content = torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, wanted a dict")
    return content
