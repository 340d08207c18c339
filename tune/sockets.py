"""A folder for Ray's sockets: the user's own, with a short name, whatever TMPDIR is."""

import os
import tempfile
from pathlib import Path

from aepo.errors import ResourceError

PREFIX = "aepo-"
"""What the name of such a folder begins with."""
MAX_BYTES = 107
"""Bytes of a socket's path at most, on Linux."""
BELOW = "/session_2026-11-28_07-29-29_123456_1234567/sockets/plasma_store"
"""What Ray puts behind its folder, at its longest."""
MADE = "/aepo-12345678/worker-999"
"""What is made in a folder that was found, and a node's in it (cluster/local.py)."""
ROOM = MAX_BYTES - len(BELOW) - len(MADE)
"""Bytes that a folder's name may have."""


def make_socket_folder() -> Path:
    """Return a new folder that only this user may enter; the caller removes it.

    It lies in the first of RAY_TMPDIR, the temporary folder (TMPDIR), /tmp and XDG_RUNTIME_DIR that can be written and
    whose name leaves room for Ray's sockets.

    Raises:
        ResourceError: if there is none.
    """
    wanted = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp", os.environ.get("XDG_RUNTIME_DIR")]
    faults = []
    for name in dict.fromkeys(map(os.path.abspath, filter(None, wanted))):
        if len(os.fsencode(name)) > ROOM:
            faults.append(f"{name}: longer than {ROOM} bytes")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=name))
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    raise ResourceError(
        f"no folder for Ray's sockets, whose paths have {MAX_BYTES} bytes at most ({'; '.join(faults)}); "
        f"set RAY_TMPDIR to one that can be written, with a name of at most {ROOM} bytes"
    )
