"""Names of files and folders that are derived from names which users give, of any length."""

import hashlib
import os

MAX_BYTES = 100
"""Longest derived name. A file system takes 255, an encrypted one 143; seeds, digests and process ids come on top."""
NUM_DIGITS = 12


def bounded(name: str) -> str:
    """Return a name of MAX_BYTES at most: itself, or else its beginning and a digest of the whole.

    Args:
        name: one part of a path; bytes that are no text may stand in it as Python's surrogates.
    """
    whole = os.fsencode(name)
    if len(whole) <= MAX_BYTES:
        return name
    begin = whole[: MAX_BYTES - NUM_DIGITS - 1].decode(errors="ignore")
    return f"{begin}-{hashlib.sha256(whole).hexdigest()[:NUM_DIGITS]}"
