"""JSON and TOML as people and programs have left them: whatever stands there, it is a document or an error of ours."""

import json
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aepo.errors import CheckpointError, ConfigError
from aepo.files import read_text

MAX_DEPTH = 50
"""Levels that a document may have; ours have seven at most. What walks through one may then call itself."""


def parse_json(text: str | bytes) -> Any:
    """Return a JSON document.

    Raises:
        ValueError: if it is none, or nested more deeply than MAX_DEPTH.
    """
    return _parsed(json.loads, text)


def read_toml(path: Path, *, kind: str) -> dict[str, Any]:
    """Return a TOML document, as any editor stores it.

    Args:
        path: the file.
        kind: what it is, for the message: "sweep file".

    Raises:
        ConfigError: if it cannot be read, is no TOML, or nested more deeply than MAX_DEPTH.
    """
    try:
        document: dict[str, Any] = _parsed(tomllib.loads, read_text(path))
    except OSError as error:
        raise ConfigError(f"no {kind} {path} ({error.strerror})") from error
    except ConfigError:  # which is a ValueError
        raise
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML: {error}; mend it there") from error
    return document


def _parsed(parse: Callable[[Any], Any], text: str | bytes) -> Any:
    try:
        document = parse(text)
    except ValueError as error:
        raise ValueError(str(error).partition("; use sys.")[0]) from error  # Python's advice to a programmer
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    level = [document]
    for _ in range(MAX_DEPTH):
        below = []
        for node in level:
            if isinstance(node, dict):
                below += [*node, *node.values()]
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str) and b"\0" in node.encode():  # which refuses half of a surrogate pair
                raise ValueError("a text in it holds the character NUL")
        if not below:
            return document
        level = below
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def first_fault(error: ValidationError) -> str:
    """Return where a document first goes wrong, and how."""
    item = error.errors(include_input=False, include_url=False)[0]
    return ": ".join([*(["/".join(map(str, item["loc"]))] if item["loc"] else []), item["msg"]])


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
    command = {"run": "train"}.get(kind, kind)
    again = f"bring the file again, or repeat `aepo {command}` into another folder"
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        assert document["format"] == version, f"format {document['format']}, wanted {version}"
        len(document[field])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a {kind}: it has no {path.name}; wanted the folder that `aepo {command} --out` made"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; see to its permissions, or bring it again"
        ) from error
    except KeyError as error:
        raise CheckpointError(f"{path} is not a {kind} of this version: it has no {error}; {again}") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a {kind} of this version: {error}; {again}") from error
    return document


@cache
def parser(kind: Any) -> TypeAdapter[Any]:
    """Return the parser of a kind of document; making one takes milliseconds, so none is made at import."""
    return TypeAdapter(kind)
