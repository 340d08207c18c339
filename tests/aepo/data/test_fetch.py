"""D4RL's files from a server: whole, continued, refused; and imported by their names from a folder."""

import hashlib
import json
import re
from threading import Thread

import pytest

from aepo import cli, tasks
from aepo.data import fetch as fetching
from aepo.data.d4rl import find_files
from aepo.data.fetch import KnownFile, address, fetch, file_bytes, file_name, known_files
from aepo.errors import DataError, ResourceError
from tests.families import write_file
from tests.file_server import Server

D4RL = [row for row in tasks.rows() if row.source == "d4rl"]
HOPPER, PEN = tasks.find("hopper-medium-v2"), tasks.find("pen-human-v1")


@pytest.fixture
def server():
    with Server() as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def put(server, task, content):
    server.files[address(task, "/d4rl")] = content


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    """Nothing is known of the files but what a test says; and nothing is waited for."""
    monkeypatch.setattr(fetching, "known_files", dict)
    monkeypatch.setattr(fetching, "WAIT_S", 0.0)


def know(monkeypatch, task, content, sha256=""):
    known = KnownFile(file=file_name(task), bytes=len(content), sha256=sha256, source="a test")
    monkeypatch.setattr(fetching, "known_files", lambda: {known.file: known})


def test_the_known_files_are_those_of_tasks_and_estimates_come_near(monkeypatch):
    known = known_files()
    names = {file_name(row) for row in D4RL}
    assert len(names) == 36
    assert set(known) < names
    assert len(known) == 28
    assert all(row.source and re.fullmatch(r"[0-9a-f]{64}|", row.sha256) for row in known.values())
    for row in D4RL:
        estimate, is_known = file_bytes(row)
        assert estimate > 0
        assert not is_known
        if file_name(row) in known and row.suite != "kitchen":
            assert 0.5 < estimate / known[file_name(row)].bytes < 2
    total = sum(row.bytes for row in known.values())
    monkeypatch.setattr(fetching, "known_files", lambda: known)
    assert sum(file_bytes(row)[0] for row in D4RL if file_bytes(row)[1]) == total


def test_files_come_several_at_once_and_are_left_alone_when_there(server, tmp_path, monkeypatch):
    for number, task in enumerate((HOPPER, PEN)):
        put(server, task, bytes([number]) * 3_000_000)
    know(monkeypatch, PEN, bytes(3_000_000), hashlib.sha256(b"\1" * 3_000_000).hexdigest())
    tmp_path = tmp_path / "files"
    found = fetch([HOPPER, PEN], tmp_path, mirror=server.url)
    assert [(row.task, row.received, row.checked) for row in found] == [
        ("hopper-medium-v2", 3_000_000, "nothing"),
        ("pen-human-v1", 3_000_000, "sha256"),
    ]
    assert (tmp_path / file_name(PEN)).read_bytes() == b"\1" * 3_000_000
    assert fetch([HOPPER, PEN], tmp_path, mirror=server.url) == []
    assert len(server.seen) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".fetch.lock",
        "hopper_medium-v2.hdf5",
        "pen-human-v1.hdf5",
    ]


@pytest.mark.parametrize("with_ranges", [True, False])
def test_a_cut_answer_is_continued(server, tmp_path, with_ranges):
    content = bytes(range(256)) * 8192
    put(server, HOPPER, content)
    server.cut, server.with_ranges = (1_000_000, True) if with_ranges else (0, False)
    (tmp_path / "hopper_medium-v2.hdf5.part").write_bytes(content[:1000])
    assert fetch([HOPPER], tmp_path, mirror=server.url)[0].num_bytes == len(content)
    assert (tmp_path / "hopper_medium-v2.hdf5").read_bytes() == content
    asked = [asked for _, asked in server.seen]
    assert asked == (["bytes=1000-", "bytes=1001000-", "bytes=2001000-"] if with_ranges else ["bytes=1000-"])


def test_a_part_that_is_whole_is_taken_and_one_that_is_too_long_is_not(server, tmp_path):
    put(server, HOPPER, b"whole")
    for left in (b"whole", b"too long"):
        (tmp_path / "hopper_medium-v2.hdf5.part").write_bytes(left)
        fetch([HOPPER], tmp_path, mirror=server.url)
        assert (tmp_path / "hopper_medium-v2.hdf5").read_bytes() == b"whole"
        (tmp_path / "hopper_medium-v2.hdf5").unlink()


def test_what_is_not_the_published_file_is_refused(server, tmp_path, monkeypatch):
    put(server, PEN, b"other")
    know(monkeypatch, PEN, b"right", hashlib.sha256(b"right").hexdigest())
    with pytest.raises(DataError, match=r"SHA-256 d9298a10d1b0\.\.\., wanted 27042f4e6eca"):
        fetch([PEN], tmp_path, mirror=server.url)
    know(monkeypatch, PEN, b"longer")
    with pytest.raises(DataError, match="has 5 bytes, the published file 6"):
        fetch([PEN], tmp_path, mirror=server.url)
    assert not list(tmp_path.glob("*.hdf5*"))


def test_without_the_server_the_addresses_are_left_for_wget(server, tmp_path):
    put(server, PEN, b"pen")
    with pytest.raises(ResourceError, match=r"hopper-medium-v2: HTTPError: .*wget --continue --input-file=addresses"):
        fetch([HOPPER, PEN], tmp_path, mirror=server.url)
    assert (tmp_path / "addresses.txt").read_text() == f"{address(HOPPER, server.url)}\n"
    assert (tmp_path / "pen-human-v1.hdf5").exists()
    with pytest.raises(ResourceError, match="Connection refused"):
        fetch([HOPPER], tmp_path, mirror="http://127.0.0.1:9/d4rl")
    assert (tmp_path / "addresses.txt").read_text() == f"{address(HOPPER, 'http://127.0.0.1:9/d4rl')}\n"
    put(server, HOPPER, b"hopper")
    fetch([HOPPER], tmp_path, mirror=server.url)
    assert not (tmp_path / "addresses.txt").exists()


def test_a_disk_that_is_too_small_is_said_before_anything_comes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceError, match=r"GB are free in .*; name a folder on a larger disk"):
        fetch([HOPPER], tmp_path, mirror=server.url)
    assert not server.seen


# -- imports by name ---------------------------------------------------------------------------------------


def test_a_folder_is_imported_by_names_and_what_is_there_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "files"
    (folder / "deeper").mkdir(parents=True)
    write_file(folder / "hopper_medium-v2.hdf5", "hopper-medium-v2")
    write_file(folder / "deeper" / "pen-human-v1.hdf5", "pen-human-v1")
    write_file(folder / "mine.hdf5", "hopper-medium-v2")
    words = ["data", "import", "d4rl", str(folder)]
    assert cli.run([*words, "--json"]) == 0
    out, said = capsys.readouterr()
    assert {row["dataset"] for row in json.loads(out)} == {
        "local/d4rl/hopper-medium-v2",
        "local/d4rl/pen-human-v1",
    }
    assert "mine.hdf5: no task's file has this name" in said.replace("\n", " ")
    assert cli.run([*words, "--json"]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out) == []
    assert said.count("was left alone") == 2
    assert cli.run([*words, "--task", "hopper-medium-v2"]) == 3  # a folder is no file
    capsys.readouterr()


def test_one_bad_file_of_a_folder_stops_no_other(tmp_path, capsys):
    write_file(tmp_path / "pen-human-v1.hdf5", "pen-human-v1")
    (tmp_path / "hopper_medium-v2.hdf5").write_bytes(b"torn")
    assert cli.run(["data", "import", "d4rl", str(tmp_path)]) == 3
    assert "1 of 2 files are not imported" in capsys.readouterr().err.replace("\n", " ")
    assert cli.run(["data", "show", "pen-human-v1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["local"]


def test_what_names_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        find_files([tmp_path / "nothing"])
    with pytest.raises(DataError, match=r"no D4RL file in .*; wanted names"):
        find_files([tmp_path])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pen-human-v1.hdf5").touch()
    with pytest.raises(DataError, match="are both of pen-human-v1; name the one"):
        find_files([tmp_path])
