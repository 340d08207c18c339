"""One type of a result in all its files; tests/golden/results was written before there was one, and is still read."""

import dataclasses
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aepo import cli, results
from aepo.errors import CheckpointError, DataError
from aepo.results import Evaluation, GridCell, Result, Row
from aepo.runs import rundir
from aepo.trials import SEARCH, read_search
from analysis.load import grids, load_runs
from analysis.search_report import write_search_report
from tests import ROOT
from tune.runs_table import write_rows

BEFORE = ROOT / "tests" / "golden" / "results"


@pytest.fixture
def result():
    return rundir.read_result(BEFORE)


def row(result, **values):
    return Row(**vars(result), schema_version=results.SCHEMA_VERSION, mlflow_run_id=None, **values)


# -- files from before ---------------------------------------------------------------------------------------


def test_a_result_from_before_is_read_and_written_with_what_came_later_alone(result, tmp_path):
    assert isinstance(result.evaluations[0], Evaluation)
    assert [(cell.beta, cell.value == cell.score) for cell in result.grid] == [(1 / 3, True), (1.0, True)]
    rundir.write_result(tmp_path, result)
    after, before = (json.loads((folder / rundir.RESULT).read_text()) for folder in (tmp_path, BEFORE))
    for key, later in (("evaluations", {"nats": 0.0, "kl": None, "selected_episodes": 0}), ("grid", {"nats": 0.0})):
        before[key] = [{**row, **later} for row in before[key]]
    before["curve"] = [{**point, "method": ""} for point in before["curve"]]
    before |= {"diagnostics": [], "peak_memory_gb": None}
    assert list(after.items()) == list(before.items())


def test_a_table_from_before_is_read_and_what_it_lacks_is_null(result):
    runs = load_runs(BEFORE / "runs.parquet")
    before = pq.read_table(BEFORE / "runs.parquet").to_pylist()
    assert list(runs["status"]) == [each["status"] for each in before] == ["finished", "failed", "missing"]
    assert runs["score"].iloc[0] == before[0]["score"] == result.score
    assert list(runs["settings"]) == [each["settings"] for each in before]
    assert "steps_reused" not in before[0]
    assert runs["steps_reused"].isna().all()
    assert list(grids(runs)["beta"]) == [1 / 3, 1.0]


def test_a_search_from_before_is_read_written_and_reported(tmp_path, capsys):
    before = json.loads((BEFORE / SEARCH).read_text())
    search = read_search(BEFORE)
    assert json.loads(json.dumps(dataclasses.asdict(search))) == before
    assert list(dataclasses.asdict(search)) == list(before)
    assert search.space.grid["sampling.beta"] == (1 / 3, 1.0)
    report = write_search_report(BEFORE, tmp_path)
    assert [line["trial"] for line in report.trials] == ["1", "0"]
    assert [line["settings"] for line in report.confirmed] == ["found", "default"]
    assert cli.run(["search", "--status", "--out", str(BEFORE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == before


@pytest.mark.parametrize("key", ["spec", "trials", "shares", "space"])
def test_a_search_that_lacks_something_is_refused_by_name(key, tmp_path):
    document = json.loads((BEFORE / SEARCH).read_text())
    document[key] = {"rounds": "three"} if key != "trials" else [{"number": "one"}]
    (tmp_path / SEARCH).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"not a search of this version: {key}"):
        read_search(tmp_path)
    with pytest.raises(DataError, match=f"not a search of this version: {key}"):
        write_search_report(tmp_path, tmp_path / "report")


# -- the table -----------------------------------------------------------------------------------------------


def test_every_field_of_a_result_is_a_column_with_its_value(result, tmp_path):
    reused = dataclasses.replace(result, steps_reused=60)
    write_rows(tmp_path, [row(reused, settings="{}")])
    (stored,) = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    document = json.loads(json.dumps(dataclasses.asdict(reused)))
    assert {key: stored[key] for key in document} == document
    assert set(stored) - set(document) == {"schema_version", "mlflow_run_id", "settings", "variant"}
    assert list(load_runs(tmp_path)["steps_reused"]) == [60]


def test_the_columns_from_before_have_the_types_that_they_had():
    before, now = pq.read_schema(BEFORE / "runs.parquet"), results.schema()
    assert set(before.names) < set(now.names)
    pq.read_table(BEFORE / "runs.parquet").cast(pa.schema([now.field(name) for name in before.names]))
    for name in before.names:
        if not pa.types.is_nested(before.field(name).type):
            assert before.field(name).type == now.field(name).type


def test_a_column_is_null_only_where_its_value_may_be():
    nullable = {field.name for field in results.schema() if field.nullable}
    assert {"error", "score", "ref_min", "settings", "steps_reused", "version"} < nullable
    assert not {"run", "task", "seed", "status", "steps", "evaluations", "schema_version"} & nullable


def test_a_new_field_with_a_default_is_a_last_column_that_tables_may_lack(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(Row):
        added: str = ""

    monkeypatch.setattr(results, "Row", Wider)
    for cached in (results.schema, results.optional):
        monkeypatch.setattr(results, cached.__name__, cached.__wrapped__)
    assert results.schema().names[-1] == "added"
    assert "added" in results.optional()


# -- the types -----------------------------------------------------------------------------------------------


def test_a_run_without_an_end_has_nothing_but_what_is_known():
    planned = Result.unended(run="a-s0", task="a", seed=0)
    assert (planned.status, planned.score, planned.steps, planned.curve) == ("missing", None, 0, ())
    assert (planned.run, planned.suite, planned.error) == ("a-s0", "", None)


def test_a_cell_is_worth_its_score_or_without_references_its_return():
    cell = GridCell(beta=1.0, guidance_scale=2.0, score=None, return_mean=-7.0, num_episodes=1)
    assert cell.value == -7.0
    assert dataclasses.replace(cell, score=40.0).value == 40.0


def test_looking_at_results_loads_neither_torch_nor_pyarrow():
    code = "import sys, aepo.results, aepo.trials; print({'torch', 'pyarrow', 'ray', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
