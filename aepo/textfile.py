"""Text that a person wrote, on whatever system."""

import codecs
from pathlib import Path

from aepo.errors import ConfigError

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""What a file begins with -> how it is encoded; UTF-8 without a mark is the rule."""


def read_text(path: Path, kind: str) -> str:
    """Return a text file's content, lines ending in a line feed alone; UTF-8, or UTF-16 with its mark.

    Args:
        path: the file.
        kind: what it is, for messages: "sweep file".

    Raises:
        ConfigError: if it cannot be read, or is no such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"no {kind} {path} ({error.strerror})") from error
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeError as error:
        raise ConfigError(f"{kind} {path} is not {encoding.upper()} ({error}): save it as UTF-8") from error
