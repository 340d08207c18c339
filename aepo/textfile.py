"""How a file that a person wrote becomes text, whichever editor wrote it: for TOML and CSV."""

import codecs
from pathlib import Path

from aepo.errors import ConfigError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order mark -> encoding of what follows it; a file without one is UTF-8."""


def read_text(path: Path) -> str:
    r"""Return a text file's characters without a byte order mark, every line ended by `\n`.

    It is read as its mark says (UTF-8, UTF-16 or UTF-32), and as UTF-8 without one, wherever the machine's language is.

    Raises:
        OSError: if it cannot be read.
        ConfigError: if it is no text in that encoding, with the line of the first fault.
    """
    data = path.read_bytes()
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    body = data[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + body[: error.start].decode(encoding, errors="replace").count("\n")
        raise ConfigError(
            f"{path}, line {line}, is no {encoding.upper()} text (byte 0x{body[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        raise ConfigError(f"{path}, line {line}, has a zero byte: UTF-16 without a byte order mark? Save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
