"""A folder whose name leaves room for sockets, in whatever surroundings."""

import os
import shutil
import socket
import stat
import tempfile

import pytest

from aepo.errors import ResourceError
from tune.sockets import BELOW, MAX_BYTES, ROOM, make_socket_folder


@pytest.fixture
def short():
    """A folder with a short name, away from the other tests' long one."""
    folder = tempfile.mkdtemp(prefix="s", dir="/tmp")
    yield folder
    shutil.rmtree(folder)


def test_a_long_tmpdir_is_passed_over_and_a_socket_fits(short, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", f"{tmp_path}/{'long' * 20}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    folder = make_socket_folder()
    try:
        assert folder.parent.as_posix() == "/tmp"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        place = folder / "worker-999" / BELOW.strip("/")
        place.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
        assert len(os.fsencode(place)) <= MAX_BYTES - ROOM + len("/tmp")
    finally:
        shutil.rmtree(folder)


def test_the_users_own_choice_comes_first(short, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", short)
    assert make_socket_folder().parent.as_posix() == short
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", f"{short}/r")
    os.mkdir(f"{short}/r")  # noqa: PTH102
    assert make_socket_folder().parent.as_posix() == f"{short}/r"


def test_without_any_folder_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("ü" * ROOM)))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ResourceError, match=r"longer than \d+ bytes; .*/tmp: Permission denied\); set RAY_TMPDIR to"):
        make_socket_folder()
