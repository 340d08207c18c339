"""Published numbers: all cells with their sources, their cautions, and what is ranked with what."""

import csv
import math

import pytest

from aepo.errors import ConfigError, DataError
from analysis import published as pub
from analysis.load import load_runs
from analysis.scores import suite_averages, task_scores
from analysis.tables import results
from tests.tables import report, row, write


def test_every_cell_has_a_source_and_aepo_has_none():
    cells = pub.published()
    assert len(cells) == 1215
    assert not [cell for cell in cells if "aepo" in cell.method.lower()]
    with open(pub.__file__.replace(".py", ".csv"), newline="") as file:  # noqa: PTH123
        raw = list(csv.DictReader(file))
    assert [(cell.task, cell.method, cell.mean, cell.source.source) for cell in cells] == [
        (line["task"], line["method"], float(line["mean"]), line["source"]) for line in raw
    ]
    assert sum(math.isnan(cell.std) for cell in cells) == sum(not line["std"] for line in raw)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("maze2d,t-v1,M,nan,,S", "wanted finite"),
        ("maze2d,t-v1,M,x,,S", "could not convert"),
        ("maze2d,t-v1,M,1,-1,S", "no spread below 0"),
        ("maze2d,t-v1,M,1,,T", "has no source 'T'"),
        ("maze2d,t,M,1,,S", "has no version"),
        ("maze2d,t-v1,M,1,,S\nmaze2d,t-v1,M,2,,S", "stands there twice"),
        ("maze2d,t-v1,M,1", "wanted 6 fields"),
    ],
)
def test_a_broken_table_is_refused_by_line(tmp_path, monkeypatch, line, message):
    (tmp_path / pub.SCORES).write_text(f"suite,task,method,mean,std,source\n{line}\n")
    (tmp_path / pub.SOURCES).write_text("key,checkpoint,own,others,spread,seeds,source\ns,last,M,rerun,std,4,S\n")
    monkeypatch.setattr(pub, "files", lambda _: tmp_path)
    with pytest.raises(DataError, match=message):
        pub.published.__wrapped__()


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path, monkeypatch):
    text = "suite,task,method,mean,std,source\r\nmaze2d,t-v1,M,1,,S\r\n"
    (tmp_path / pub.SCORES).write_bytes(text.encode("utf-8-sig"))
    text = "key,checkpoint,own,others,spread,seeds,source\ns,last,M,rerun,std,4,S\n"
    (tmp_path / pub.SOURCES).write_bytes(text.encode("utf-16"))
    monkeypatch.setattr(pub, "files", lambda _: tmp_path)
    (cell,) = pub.published.__wrapped__()
    assert (cell.suite, cell.task, cell.mean) == ("maze2d", "t-v1", 1.0)


def test_columns_are_found_by_method_and_source():
    (name, cells), (blank, none) = pub.find_columns(["iql@CORL-last", "AEPO"]).items()
    assert (name, len(cells), blank, none) == ("IQL@corl-last", 30, "AEPO", [])
    assert list(pub.find_columns(["SRPO@srpo"])) == ["SRPO@srpo"]
    with pytest.raises(ConfigError, match=r"IQL@corl-last, .*IQL@iql"):
        pub.find_columns(["IQL"])  # several sources
    with pytest.raises(ConfigError, match="list` shows"):
        pub.find_columns(["Gato"])


def cell_of(column, task):
    return pub.match(pub.find_columns([column])[column], task)


@pytest.mark.parametrize(
    ("column", "task", "source", "caution", "ranked"),
    [
        ("IQL@corl-last", "hopper-medium-v2", "d4rl", "rerun by a third party", True),
        ("IQL@corl-best", "hopper-medium-v2", "d4rl", "best checkpoint", False),
        ("IQL@corl-last", "hopper-medium-v2", "minari", "not D4RL's (source: minari)", False),
        ("IQL@iql-v0", "antmaze-umaze-v2", "d4rl", "v0 data, ours v2", False),
        ("IQL@iql", "hopper-medium-v2", "d4rl", "no spread given", True),
    ],
)
def test_each_caution_is_told_and_what_does_not_compare_is_not_ranked(column, task, source, caution, ranked):
    cell = cell_of(column, task)
    assert caution in "; ".join(pub.cautions(cell, task, source))
    assert pub.is_comparable(cell, task, source) is ranked


def test_a_method_of_its_own_paper_is_no_third_partys():
    cell = cell_of("QGPO@qgpo", "hopper-medium-v2")
    assert pub.cautions(cell, "hopper-medium-v2", "d4rl") == []
    assert pub.stderr(cell) == pytest.approx(cell.std / 5**0.5)


def table_of(tmp_path, *rows, columns):
    runs = load_runs(write(tmp_path, *rows))
    scores = task_scores(runs)
    return results(runs, scores, suite_averages(scores), pub.find_columns(columns))


def d4rl(score, seed=0, **values):
    return row("hopper-medium-v2", seed, score, **{"suite": "gym-mujoco", "source": "d4rl"} | values)


def test_a_published_cell_is_bold_only_where_it_may_be_ranked(tmp_path):
    columns = ["QGPO@qgpo", "TD3+BC@corl-best", "AEPO"]
    table = table_of(tmp_path / "a", d4rl(60.0), d4rl(61.0, 1), columns=columns)
    best = {key for key, cell in table.rows[0].cells.items() if cell.is_best}
    assert best == {"QGPO@qgpo"}  # 98.0; TD3+BC's best checkpoint would be ranked beside the last ones
    assert table.rows[0].cells["TD3+BC@corl-best"].mean > 60
    assert "AEPO" not in table.rows[0].cells
    other = table_of(tmp_path / "b", d4rl(60.0, source="minari"), d4rl(61.0, 1, source="minari"), columns=columns)
    assert {key for key, cell in other.rows[0].cells.items() if cell.is_best} == {"aepo"}


def test_every_published_cell_has_a_footnote_with_its_source(tmp_path, capsys):
    sweep = write(tmp_path, d4rl(60.0), d4rl(61.0, 1))
    assert report(sweep, "--published", "IQL@corl-last", "AEPO") == 0
    printed = capsys.readouterr().out
    assert "[a]" in printed
    assert "a IQL@corl-last: CORL README, last checkpoint (4 seeds); rerun by a third party." in printed
    assert "mujoco-py" in printed
    assert "not known here" in printed


def test_the_list_needs_no_sweep(capsys):
    assert report("--published", "list") == 0
    assert "TD3+BC@rebrac-t4" in capsys.readouterr().out
    assert report("--published", "Gato", "sweeps/none") == 2


def test_a_table_of_ones_own_gives_columns(tmp_path):
    lines = [
        {"method": "AEPO", "task": "pen-human-v1", "score": "76.7", "spread": "", "source": "its Table 2"},
        {"method": "AEPO", "task": "hopper-medium-v2", "score": "100", "spread": "0.5", "source": "its Table 1"},
        {"method": "Other", "task": "pen-human-v1", "score": "1", "spread": "2", "source": ""},
    ]
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    found = pub.find_columns([str(tmp_path / "mine.csv"), "AEPO"])
    assert list(found) == ["AEPO@mine", "Other@mine", "AEPO"]
    assert [(cell.task, cell.mean, cell.source.source) for cell in found["AEPO@mine"]] == [
        ("pen-human-v1", 76.7, "its Table 2"),
        ("hopper-medium-v2", 100.0, "its Table 1"),
    ]
    assert math.isnan(found["AEPO@mine"][0].std)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,task\n", "wanted method, task, score, spread, source"),
        ("method,task,score,spread,source\nA,t,x,,\n", "line 2: could not convert"),
        ("method,task,score,spread,source\nA,t,nan,,\n", "line 2: wanted a method, a task, a finite score"),
        ("method,task,score,spread,source\nA,t,1,-1,\n", "line 2: wanted"),
        ("method,task,score,spread,source\nA,t,1\n", "line 2: wanted 5 fields"),
        ("method,task,score,spread,source\nA,t,1,,\nA,t,2,,\n", "line 3: A on t stands there twice"),
    ],
)
def test_a_broken_table_of_ones_own_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        pub.own_columns(tmp_path / "mine.csv")
    with pytest.raises(DataError, match="no table"):
        pub.own_columns(tmp_path / "none.csv")
