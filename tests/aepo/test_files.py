"""Text files of a person: whatever editor saved them they are read alike, or refused by line."""

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aepo import cli, documents, kernels
from aepo.errors import CheckpointError, ConfigError
from aepo.files import MARKS, read_text

MARKED = [*((name, mark) for mark, name in MARKS), ("utf-8", b"")]
TEXT = st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]))
SWEEP = 'task = ["maze2d-umaze"]\nseeds = [0]\npreset = ["smoke"]  # für später\n'


@given(text=TEXT, how=st.sampled_from(MARKED), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_every_text_is_read_alike_in_every_encoding_and_with_every_end_of_line(text, how, end, tmp_path_factory):
    encoding, mark = how
    path = tmp_path_factory.getbasetemp() / "text"
    path.write_bytes(mark + text.replace("\n", end).encode(encoding))
    assert read_text(path) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\nb = 'ü'".encode("latin-1"), r"x\.toml, line 2, is no UTF-8 text \(byte 0xfc\); save the file as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a\0b", "line 1, is no UTF-16-LE text"),
        ("a\nb".encode("utf-16-le"), "line 1, has a zero byte: UTF-16 without"),
        (b"\x89PNG\r\n\x1a\n", "line 1, is no UTF-8 text"),
    ],
)
def test_what_is_no_text_is_refused_by_line(data, message, tmp_path):
    (tmp_path / "x.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_text(tmp_path / "x.toml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_other_editors_do_what_they_say(encoding, tmp_path, capsys):
    file = tmp_path / "sweep.toml"
    file.write_bytes(SWEEP.replace("\n", "\r\n").encode(encoding))
    assert cli.run(["sweep", str(file), "--dry-run", "--json"]) == 0
    assert [row["task"] for row in json.loads(capsys.readouterr().out)] == ["maze2d-umaze"]
    space = tmp_path / "space.toml"
    space.write_bytes("[critic]\r\nexpectile = [0.7, 0.9]\r\n".encode(encoding))
    words = ["search", "--task", "maze2d-umaze", "--space", str(space), "--dry-run", "--json"]
    assert cli.run(words) == 0
    assert "critic.expectile" in capsys.readouterr().out
    manifest = tmp_path / "sweep.json"
    manifest.write_bytes('{"format": 1, "runs": {}}'.encode(encoding))
    assert documents.read_document(manifest, kind="sweep", version=1, field="runs")["runs"] == {}
    table = tmp_path / "kernels.csv"
    table.write_bytes("vendor,family,model,torch,gain,source\r\nA,1,2,2.9,1.2,S\r\n".encode(encoding))
    assert [row.gain for row in kernels.read_own(table)] == [1.2]


def test_files_that_are_no_text_are_refused_by_name(tmp_path, capsys):
    for name in ("sweep.toml", "space.toml", "sweep.json", "kernels.csv"):
        (tmp_path / name).write_bytes(SWEEP.encode("latin-1"))
    assert cli.run(["sweep", str(tmp_path / "sweep.toml")]) == 2
    assert cli.run(["search", "--task", "maze2d-umaze", "--space", str(tmp_path / "space.toml")]) == 2
    assert capsys.readouterr().err.replace("\n", "").count("is no UTF-8 text") == 2
    with pytest.raises(ConfigError, match=r"kernels\.csv, line 3, is no UTF-8 text"):
        kernels.read_own(tmp_path / "kernels.csv")
    with pytest.raises(CheckpointError, match="is not a sweep of this version: 'utf-8' codec"):
        documents.read_document(tmp_path / "sweep.json", kind="sweep", version=1, field="runs")
    with pytest.raises(CheckpointError, match="cannot be read"):
        documents.read_document(tmp_path, kind="sweep", version=1, field="runs")
