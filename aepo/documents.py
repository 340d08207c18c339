"""JSON and TOML as people and programs have left them: whatever stands there, it is a document or an error of ours."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aepo.errors import ConfigError
from aepo.textfile import read_text

MAX_DEPTH = 50
"""Levels of a document; ours have seven at most. What walks through one may then call itself."""


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
