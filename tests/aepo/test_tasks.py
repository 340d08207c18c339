"""The task table: complete, typed, and true to the numbers that D4RL and Minari published."""

import dataclasses
import json
from collections import Counter
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aepo import cli, tasks
from aepo.config import DataConfig
from aepo.errors import ConfigError

D4RL = [row for row in tasks.rows() if row.source == "d4rl"]
MINARI = [row for row in tasks.rows() if row.source == "minari"]


def test_the_benchmark_has_36_tasks_in_five_suites():
    assert Counter(row.suite for row in D4RL) == {
        "gym-mujoco": 9,
        "maze2d": 6,
        "antmaze": 6,
        "adroit": 12,
        "kitchen": 3,
    }
    assert [tasks.table()[row.task] for row in D4RL] == D4RL  # the first source
    without = {row.task for row in D4RL} - {row.task for row in MINARI}
    assert without == {f"{robot}-medium-replay-v2" for robot in ("halfcheetah", "hopper", "walker2d")}
    for row in MINARI:
        twin = tasks.find(row.task)
        assert (twin.suite, twin.reward_rule, twin.return_rule) == (row.suite, row.reward_rule, row.return_rule)


@pytest.mark.parametrize("row", [*D4RL, *MINARI], ids=lambda row: f"{row.task} {row.source}")
def test_the_references_are_0_and_100_and_the_score_is_linear_between(row):
    assert row.score(row.ref_min) == 0
    assert row.score(row.ref_max) == pytest.approx(100, abs=1e-12)
    assert row.score((row.ref_min + row.ref_max) / 2) == pytest.approx(50)


@given(st.floats(-1e5, 1e5))
def test_a_score_goes_back_to_its_return(return_):
    row = tasks.find("hopper-medium-v2")
    assert row.ref_min + row.score(return_) / 100 * (row.ref_max - row.ref_min) == pytest.approx(return_, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "source", "return_", "score"),
    [
        # raw and normalized as D4RL's paper prints them, of BC and BEAR (arXiv 2004.07219, appendix)
        ("halfcheetah-medium-v2", "", 4196.4, 36.1),
        ("halfcheetah-medium-v2", "", 4897.0, 41.7),
        ("hopper-medium-v2", "", 923.5, 29.0),
        ("hopper-medium-v2", "", 1674.5, 52.1),
        ("walker2d-medium-v2", "", 304.8, 6.6),
        ("walker2d-medium-v2", "", 2717.0, 59.1),
        ("pen-human-v1", "", 1121.9, 34.4),
        ("hammer-human-v1", "", -82.4, 1.5),
        ("door-human-v1", "", -41.7, 0.5),
        # by hand: a success is 100, a sub-task of four 25; Minari's pen has 200 steps and references of its own
        ("antmaze-large-play-v2", "", 0.37, 37.0),
        ("kitchen-partial-v0", "", 2.5, 62.5),
        ("pen-human-v1", "minari", 4479.2, 50.0),
    ],
)
def test_returns_convert_to_the_scores_that_were_published(task, source, return_, score):
    assert tasks.find(task, source).score(return_) == pytest.approx(score, abs=0.06)


def test_horizons_and_rules_are_those_of_the_benchmark():
    horizons = {(row.task.split("-")[0], row.source): set() for row in (*D4RL, *MINARI)}
    for row in (*D4RL, *MINARI):
        horizons[row.task.split("-")[0], row.source].add(row.horizon)
    assert horizons["maze2d", "d4rl"] == horizons["maze2d", "minari"] == {300, 600, 800}
    assert horizons["antmaze", "d4rl"] == horizons["antmaze", "minari"] == {700, 1000}
    assert (horizons["pen", "d4rl"], horizons["pen", "minari"]) == ({100}, {200})
    assert (horizons["kitchen", "d4rl"], horizons["kitchen", "minari"]) == ({280}, {280, 450})
    assert {row.reward_rule for row in D4RL if row.suite == "gym-mujoco"} == {"return_range"}
    assert {(row.reward_rule, row.return_rule) for row in D4RL if row.suite == "antmaze"} == {("until_goal", "goal")}
    assert {row.return_rule for row in D4RL if row.suite == "kitchen"} == {"subtasks"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_rule": "twice"}, "reward_rule 'twice', wanted one of"),
        ({"return_rule": "most"}, "return_rule"),
        ({"source": "web"}, "source 'web'"),
        ({"horizon": "many"}, "line 2: horizon"),
        ({"horizon": "-1"}, "horizon >= 0"),
        ({"discount": "1"}, r"discount in \(0, 1\)"),
        ({"ref_min": ""}, "one reference return of two"),
        ({"ref_min": "nan"}, "wanted two finite ones, ascending"),
        ({"ref_min": "20000"}, "ascending"),
        ({"steps": "0"}, "steps >= 1"),
        ({"task": ""}, "line 2: .*task"),
        ({"task": "hopper-medium-v2", "dataset": "x/y-v0"}, "twice: hopper-medium-v2 of d4rl"),
        ({"dataset": "local/d4rl/hopper-medium-v2"}, "twice: local/d4rl/hopper-medium-v2"),
    ],
)
def test_a_spoiled_table_is_refused_when_it_is_loaded(change, message, monkeypatch, tmp_path):
    header, first, *others = files("aepo").joinpath("tasks.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), first.split(","), strict=True)) | change
    (tmp_path / "tasks.csv").write_text("\n".join([header, ",".join(cells.values()), *others]))
    monkeypatch.setattr("aepo.tasks.files", lambda _: tmp_path)
    with pytest.raises(ConfigError, match=message):
        tasks.rows.__wrapped__()


def test_columns_that_are_missing_or_unknown_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("aepo.tasks.files", lambda _: tmp_path)
    for text in ("task,suite\na,b", files("aepo").joinpath("tasks.csv").read_text().replace("horizon", "length", 1)):
        (tmp_path / "tasks.csv").write_text(text)
        with pytest.raises(ConfigError, match="line 2: wanted the columns task, suite"):
            tasks.rows.__wrapped__()


def test_a_source_that_a_task_lacks_is_refused():
    assert tasks.find("hopper-medium-v2", "minari").dataset == "mujoco/hopper/medium-v0"
    with pytest.raises(ConfigError, match="hopper-medium-replay-v2 has no data of source 'minari'; it has d4rl"):
        tasks.find("hopper-medium-replay-v2", "minari")
    with pytest.raises(ConfigError, match="stand in the data set"):
        tasks.find("maze2d-umaze").score(1.0)


@pytest.mark.parametrize("references", [(None, 1.0), (1.0, 1.0), (float("nan"), 1.0)])
def test_a_config_with_impossible_references_is_refused(references):
    with pytest.raises(ConfigError, match="DataConfig"):
        DataConfig(dataset="a/b-v0", source="user", ref_min=references[0], ref_max=references[1])


def run_json(capsys, *words):
    assert cli.run(["data", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_shows_the_36_rows_with_their_facts(capsys):
    rows = run_json(capsys, "list", "--source", "d4rl")
    assert [row["task"] for row in rows] == [row.task for row in D4RL]
    for row, task in zip(rows, D4RL, strict=True):
        assert {key: row[key] for key in ("suite", "env_id", "ref_min", "ref_max", "dataset", "horizon")} == {
            key: getattr(task, key) for key in ("suite", "env_id", "ref_min", "ref_max", "dataset", "horizon")
        }
        assert row["source"] == "d4rl"
        assert not row["local"]
    ids = {row["task"]: row["minari_id"] for row in rows}
    assert ids["pen-human-v1"] == "D4RL/pen/human-v2"
    assert ids["hopper-medium-replay-v2"] is None
    assert len(run_json(capsys, "list", "--source", "minari")) == len(MINARI)
    assert run_json(capsys, "list", "--source", "user") == []


@pytest.mark.parametrize("row", [*D4RL, *MINARI], ids=lambda row: f"{row.task} {row.source}")
def test_show_prints_the_facts_of_a_row_whose_data_are_not_here(row, capsys):
    shown = run_json(capsys, "show", row.task, "--source", row.source, "--returns", str(row.ref_max))
    assert (shown["env_id"], shown["dataset"], shown["published_steps"]) == (row.env_id, row.dataset, row.steps)
    assert list(shown["scores"].values()) == [pytest.approx(100)]
    wanted = f"--task {row.task}" if row.source == "d4rl" else "aepo data download"
    assert wanted in shown["remedy"]
    if row.source == "d4rl":
        assert row.origin in shown["remedy"]


def test_a_run_carries_its_tasks_references_and_source():
    from aepo.presets import preset

    config = preset("quick", tasks.find("pen-human-v1", "minari"), 0)
    assert dataclasses.asdict(config.data)["source"] == "minari"
    assert (config.data.ref_min, config.evaluation.horizon) == (137.92955108500217, 200)
    assert preset("quick", tasks.find("pen-human-v1"), 0).fingerprint != config.fingerprint
