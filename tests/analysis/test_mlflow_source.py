"""A report from MLflow is the report from the folder: what `tune` sends is enough, page by page."""

import dataclasses
from pathlib import Path

import pytest
import torch

from aepo import config as configs
from aepo.errors import ConfigError, DataError
from aepo.runs import run
from analysis import mlflow_source
from analysis.load import curves, diagnostics, evaluations, load_runs
from analysis.report import write_report
from tests import tracked
from tests.tables import report
from tune.mlflow_sink import mlflow_tracker as Tracker
from tune.plan import run_folder, write_manifest
from tune.runs_table import collect_rows, write_rows

finished, sweep = tracked.finished, tracked.sweep
pytestmark = tracked.MLFLOW_WARNINGS


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/store.db"


def track(folder, plan, uri, *, close=True):
    tracker = Tracker(folder, plan, uri=uri)
    assert tracker.ship()
    rows = collect_rows(folder, plan, mlflow_run_ids=tracker.run_ids)
    write_rows(folder, rows)
    assert not close or tracker.close([row.status for row in rows])
    return f"mlflow:aepo/{folder.name}"


def test_variants_are_told_apart_in_mlflow_as_in_the_folder(make_dataset, tiny_config, uri, tmp_path):
    base = tiny_config(make_dataset())
    plan = [
        dataclasses.replace(configs.with_overrides(base, {"sampling.guidance_scale": scale}), variant=f"w {scale}")
        for scale in (1.0, 2.0)
    ]
    folder = tmp_path / "sweep"
    write_manifest(folder, plan)
    for config in plan:
        place = run_folder(folder, config)
        run.execute(config, place, run.FolderStore(place), device=torch.device("cpu"))
    source = track(folder, plan, uri)
    both = [load_runs(each, tracking_uri=uri) for each in (source, folder)]
    assert [runs["variant"].to_list() for runs in both] == [["w 1.0", "w 2.0"]] * 2
    assert both[0]["settings"].to_list() == both[1]["settings"].to_list()


def test_the_clones_points_are_the_same_in_mlflow(make_dataset, tiny_config, uri, tmp_path):
    config = tiny_config(make_dataset(), evaluation__num_curve_points=1, evaluation__num_curve_episodes=1)
    folder = tmp_path / "sweep"
    write_manifest(folder, [config])
    place = run_folder(folder, config)
    run.execute(config, place, run.FolderStore(place), device=torch.device("cpu"))
    source = track(folder, [config], uri)
    both = [curves(load_runs(each, tracking_uri=uri)) for each in (source, folder)]
    columns = ["method", "stage", "step", "score", "return_mean"]
    ours, theirs = (frame[columns].to_dict("records") for frame in both)
    assert ours == theirs
    assert [(each["method"], each["step"]) for each in ours] == [
        ("diffusion-bc", 30),
        ("diffusion-bc", 60),
        ("aepo", 150),
        ("aepo", 180),
    ]


def test_a_selected_setting_is_the_same_in_mlflow(make_dataset, tiny_config, uri, tmp_path):
    config = tiny_config(make_dataset(), evaluation__select_episodes=4, evaluation__horizon=5)
    folder = tmp_path / "sweep"
    write_manifest(folder, [config])
    place = run_folder(folder, config)
    result = run.execute(config, place, run.FolderStore(place), device=torch.device("cpu"))
    source = track(folder, [config], uri)
    both = [evaluations(load_runs(each, tracking_uri=uri)) for each in (source, folder)]
    columns = ["method", "beta", "guidance_scale", "nats", "score", "return_mean", "selected_episodes"]
    ours, theirs = (frame.sort_values(["method", "selected_episodes"])[columns].to_dict("records") for frame in both)
    assert ours == theirs
    assert [each["selected_episodes"] for each in ours] == [0, 4, 0]
    assert ours[1]["return_mean"] == result.evaluations[2].return_mean


def test_mlflow_and_the_folder_say_the_same(sweep, uri, tmp_path, monkeypatch):
    folder, plan = sweep
    source = track(folder, plan, uri)
    monkeypatch.setattr(mlflow_source, "PAGE", 1)  # every run is a page of its own
    both = [load_runs(source, tracking_uri=uri), load_runs(folder)]
    columns = ["run", "task", "suite", "source", "dataset", "dataset_digest", "env_id", "ref_min", "ref_max", "seed"]
    columns += [
        "fingerprint",
        "method",
        "preset",
        "variant",
        "status",
        "score",
        "return_mean",
        "steps",
        "commit",
        "mlflow_run_id",
        "settings",
    ]
    ours, theirs = (runs[columns].astype(object).where(runs[columns].notna(), None).to_dict("records") for runs in both)
    for row in (*ours, *theirs):
        if row["status"] == "missing":  # the folder does not know of steps either
            row["steps"] = row["commit"] = row["settings"] = None
    assert ours == theirs
    assert [runs["status"].to_list().count("missing") for runs in both] == [1, 1]
    measured = [evaluations(runs)[["run", "method", "beta", "guidance_scale", "score", "return_mean"]] for runs in both]
    assert measured[0].to_dict("records") == measured[1].to_dict("records")
    trusted = [
        diagnostics(runs).sort_values(["run", "name"])[["run", "name", "value"]].to_dict("records") for runs in both
    ]
    assert trusted[0] == trusted[1]
    assert {row["name"] for row in trusted[0]} >= {"energy/kl", "gain"}
    texts = []
    for name, runs in (("m", source), ("f", folder)):
        write_report([Path(runs)], tmp_path / name, allow_missing=True, tracking_uri=uri)
        texts.append((tmp_path / name / "scores.csv").read_bytes())
    assert texts[0] == texts[1]


def test_a_run_not_begun_is_a_hole_also_while_the_sweep_runs(sweep, uri, capsys):
    folder, plan = sweep
    source = track(folder, plan, uri, close=False)
    assert report(source, "--tracking-uri", uri) == 3
    assert "plans 3 runs, of which MLflow knows 2" in capsys.readouterr().err
    assert report(source, "--tracking-uri", uri, "--allow-missing", "--out", folder / "r") == 0
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", ["[" * 100_000, '{"runs": [1]}', "x", '{"runs": {"a": 1}}'])
def test_a_plan_that_is_none_is_refused_in_one_line(manifest, sweep, uri, monkeypatch):
    folder, plan = sweep
    source = track(folder, plan, uri)
    monkeypatch.setattr("mlflow.artifacts.load_text", lambda _: manifest)
    with pytest.raises(DataError, match=r"sweep.json .* is not a sweep's plan \(.*\), wanted runs by name; report"):
        load_runs(source, tracking_uri=uri)


def test_a_failed_run_is_a_row_with_its_reason(sweep, uri, capsys):
    folder, plan = sweep
    tracked.set_result(folder, plan[0], status="failed", error="TrainingError: critic/loss is nan")
    source = track(folder, plan, uri)
    assert report(source, "--tracking-uri", uri) == 3
    assert "critic/loss is nan" in capsys.readouterr().err
    assert run_folder(folder, plan[0]).exists()


def test_an_unknown_schema_version_is_refused(sweep, uri, monkeypatch):
    folder, plan = sweep
    monkeypatch.setattr("tune.mlflow_sink.SCHEMA_VERSION", 99)
    with pytest.raises(DataError, match="schema version 99, wanted 2"):
        load_runs(track(folder, plan, uri), tracking_uri=uri)


def test_what_is_not_there_is_said(uri, tmp_path):
    from mlflow import MlflowClient

    MlflowClient(uri).search_experiments()  # makes the store
    with pytest.raises(DataError, match=r"no experiment 'nothing'; it has Default"):
        load_runs("mlflow:nothing", tracking_uri=uri)
    with pytest.raises(DataError, match="no run that"):
        load_runs("mlflow:Default", tracking_uri=uri)
    with pytest.raises(ConfigError, match="--tracking-uri"):
        load_runs("mlflow:Default")
    with pytest.raises(DataError, match="does not answer") as error:
        load_runs("mlflow:x", tracking_uri="http://me:secret@127.0.0.1:9")
    assert "secret" not in str(error.value)
