"""What MLflow holds of a sweep, whatever happens in between: nothing lost, nothing twice, in order."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aepo import config as configs
from aepo import files
from aepo.errors import CheckpointError, ConfigError, DataError
from aepo.policy import Policy
from aepo.results import Diagnostic
from aepo.runs import rundir, spool
from tests import tracked
from tests.examples import random_transitions, wait_for
from tests.tracked import small_config
from tune import tracking
from tune.mlflow_sink import SWEEP, TAG, find_store, sqlite_uri
from tune.mlflow_sink import mlflow_tracker as Tracker
from tune.plan import run_folder, write_manifest
from tune.runs_table import collect_rows, write_rows

pytestmark = tracked.MLFLOW_WARNINGS
finished, sweep = tracked.finished, tracked.sweep


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs_of(uri, folder):
    """The sweep's own run, and the others by name."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"aepo/{folder.name}")
    entries = client.search_runs([experiment.experiment_id])
    (parent,) = (entry for entry in entries if TAG not in entry.data.tags)
    children = {entry.data.tags[TAG]: entry for entry in entries if entry is not parent}
    assert len(children) == len(entries) - 1, "a run of MLflow per planned run, not two"
    return parent, children


# -- what is there ---------------------------------------------------------------------------------------------------


def test_every_row_of_the_spool_arrives_once_however_often_it_is_sent(sweep, uri):
    from mlflow import MlflowClient

    folder, plan = sweep
    config, place = plan[0], run_folder(folder, plan[0])
    assert Tracker(folder, plan, uri=uri).ship()
    (place / "mlflow.json").unlink()  # the offset was lost in a crash
    for _ in range(2):
        assert Tracker(folder, plan, uri=uri).ship()
    client = MlflowClient(uri)
    _, children = runs_of(uri, folder)
    assert set(children) == {c.name for c in plan[:2]}
    entry = children[config.name]
    assert entry.info.status == "FINISHED"
    rows = spool.read_spool(place / rundir.METRICS)[0]
    for stage in ("behavior", "critic", "energy"):
        history = client.get_metric_history(entry.info.run_id, f"{stage}/loss")
        name = f"{stage}/loss"
        expected = [(r["step"], r["metrics"][name]) for r in rows if name in r["metrics"]]
        assert [(m.step, m.value) for m in history] == expected
    assert entry.data.params["critic.expectile"] == "0.7"
    names = {rundir.POLICY, rundir.CONFIG, rundir.RESULT, rundir.GRID}
    assert {a.path for a in client.list_artifacts(entry.info.run_id)} >= names
    (dataset,) = entry.inputs.dataset_inputs
    result = rundir.read_result(place)
    assert (dataset.dataset.name, dataset.dataset.digest) == (config.data.dataset, result.dataset_digest)
    assert entry.data.metrics["final/aepo/score"] == pytest.approx(result.score)
    (final,) = client.get_metric_history(entry.info.run_id, "final/aepo/score")
    assert final.step == config.num_steps
    assert entry.data.metrics["energy/kl"] == {d.name: d.value for d in result.diagnostics}["energy/kl"]


def test_what_speaks_against_a_run_is_a_tag_and_its_diagnostics_are_metrics(sweep, uri):
    folder, plan = sweep
    tracked.set_result(folder, plan[0], diagnostics=(Diagnostic(name="energy/kl", value=4.5),))
    tracked.set_result(folder, plan[1], diagnostics=(Diagnostic(name="energy/kl", value=0.5),))
    assert Tracker(folder, plan, uri=uri).ship()
    _, children = runs_of(uri, folder)
    one, other = (children[config.name].data for config in plan[:2])
    assert (one.metrics["trust/energy/kl"], other.metrics["trust/energy/kl"]) == (4.5, 0.5)
    assert one.tags["aepo.doubts"].startswith("the cost of guidance in nats is 4.5, above 3")
    assert "aepo.doubts" not in other.tags


def test_tags_say_which_code_ran_where(sweep, uri):
    import mujoco

    folder, plan = sweep
    tracked.set_result(folder, plan[0], commit="0123456789ab+dirty")
    tracked.set_result(folder, plan[1], commit="0123456789ab")
    assert Tracker(folder, plan, uri=uri).ship()
    parent, children = runs_of(uri, folder)
    tags = [children[config.name].data.tags for config in plan[:2]]
    assert [(t["aepo.commit"], t["mlflow.source.git.commit"], t["aepo.dirty"]) for t in tags] == [
        ("0123456789ab+dirty", "0123456789ab", "true"),
        ("0123456789ab", "0123456789ab", "false"),
    ]
    for each in (*tags, parent.data.tags):
        assert (each["aepo.version.mujoco"], each["aepo.version.torch"]) == (mujoco.__version__, torch.__version__)
    assert (tags[0]["aepo.seed"], tags[0]["aepo.fingerprint"]) == ("0", plan[0].fingerprint)
    assert parent.data.tags["aepo.host"] == socket.gethostname()


def test_the_sweep_is_the_parent_of_its_runs_and_ends_with_its_table(sweep, uri):
    from mlflow import MlflowClient

    folder, plan = sweep
    client = MlflowClient(uri)

    def carry_out(plan):
        tracker = Tracker(folder, plan, uri=uri)
        assert tracker.ship()
        assert runs_of(uri, folder)[0].info.status == "RUNNING"
        rows = collect_rows(folder, plan, mlflow_run_ids=tracker.run_ids)
        write_rows(folder, rows)
        assert tracker.close([row.status for row in rows])
        return runs_of(uri, folder)

    parent, children = carry_out(plan)
    assert parent.info.run_name == "sweep"
    assert {entry.data.tags["mlflow.parentRunId"] for entry in children.values()} == {parent.info.run_id}
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"sweep.json", "runs.parquet"}
    assert parent.info.status == "KILLED", "one run is missing"
    counts = {key: parent.data.metrics[f"runs/{key}"] for key in ("finished", "failed", "missing")}
    assert counts == {"finished": 2, "failed": 0, "missing": 1}
    again, _ = carry_out(plan[:2])
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    tracked.set_result(folder, plan[1], status="failed", error="TrainingError: NaN")
    parent, children = carry_out(plan[:2])
    assert (parent.info.status, parent.data.metrics["runs/failed"]) == ("FAILED", 1)
    assert children[plan[1].name].info.status == "FAILED"
    assert children[plan[1].name].data.tags["aepo.error"] == "TrainingError: NaN"


def test_the_parent_has_the_load_of_the_machine_once_a_minute(sweep, uri, monkeypatch):
    from mlflow import MlflowClient

    folder, plan = sweep
    tracker = Tracker(folder, plan, uri=uri)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for seconds in (0, 30, 61):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: clock + seconds)
        assert tracker.ship()
    monkeypatch.undo()
    parent, _ = runs_of(uri, folder)
    for key, high in (("cpu_utilization_percentage", 100), ("system_memory_usage_megabytes", 1e8)):
        history = MlflowClient(uri).get_metric_history(parent.info.run_id, f"system/{key}")
        assert len(history) == 2
        assert all(0 <= metric.value <= high for metric in history)


# -- the policy as a model -------------------------------------------------------------------------------------------


def test_a_process_of_its_own_loads_the_logged_policy_and_acts(sweep, uri):
    folder, plan = sweep
    tracker = Tracker(folder, plan, uri=uri)
    assert tracker.ship()
    code = """
import json, sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"runs:/{sys.argv[2]}/policy")
states = np.linspace(-1, 1, 15).reshape(5, 3)
actions = [model.predict(each, params={"seed": 7}) for each in (states, states.astype(np.float32))]
assert not np.array_equal(model.predict(states), model.predict(states)), "without a seed the draws go on"
assert model.predict(model.input_example).shape == (1, 1)
assert not {"ray", "tune"} & set(sys.modules)
print(json.dumps([str(actions[0].dtype), *[each.tolist() for each in actions]]))
"""
    words = [sys.executable, "-c", code, uri, tracker.run_ids[plan[0].name]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    dtype, *actions = json.loads(done.stdout)
    policy = Policy.load(run_folder(folder, plan[0]) / rundir.POLICY)
    expected = policy.act(np.linspace(-1, 1, 15).reshape(5, 3), torch.Generator().manual_seed(7))
    assert dtype == "float32"
    assert actions == [expected.tolist()] * 2


def test_dict_observations_are_joined_as_the_run_joined_them(tmp_path, tiny_config):
    import mlflow.pyfunc

    from tune.model import write_model

    config = tiny_config(method="iql")
    data = dataclasses.replace(config.data, observation_keys=("goal", "place"))
    torch.manual_seed(0)
    policy = Policy(dataclasses.replace(config, data=data), random_transitions().spaces)
    policy.save(tmp_path / rundir.POLICY)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", tmp_path / rundir.POLICY, run_id="r", model_id="m-1")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    place, goal = np.random.default_rng(0).normal(size=(2, 4, 2))
    goal = goal[:, :1]
    joined = np.concatenate([goal, place], axis=1)
    actions = model.predict({"place": place, "goal": goal, "time": np.zeros((4, 1))})
    assert actions.shape == (4, 2)
    assert np.array_equal(actions, policy.act(joined, torch.Generator()))
    assert np.array_equal(actions, model.predict(joined))
    with pytest.raises(DataError, match="no entry 'goal'"):
        model.predict({"place": place})


def test_a_model_is_made_once_and_holds_the_scores_and_the_newest_policy(sweep, uri):
    from mlflow import MlflowClient

    folder, plan = sweep
    place = run_folder(folder, plan[0])
    assert Tracker(folder, plan, uri=uri).ship()
    shutil.copy(run_folder(folder, plan[1]) / rundir.POLICY, place / rundir.POLICY)
    tracked.set_result(folder, plan[0], score=1.0)
    assert Tracker(folder, plan, uri=uri).ship()
    client = MlflowClient(uri)
    entry = runs_of(uri, folder)[1][plan[0].name]
    (output,) = entry.outputs.model_outputs
    models = {m.source_run_id: m for m in client.search_logged_models([entry.info.experiment_id])}
    assert len(models) == 2
    model = models[entry.info.run_id]
    assert (model.model_id, model.name, str(model.status)) == (output.model_id, "policy", "READY")
    assert "final/aepo/score" in {metric.key for metric in model.metrics}
    stored = client.list_logged_model_artifacts(model.model_id)
    assert not [file.path for file in stored if file.path.endswith(("pkl", "pickle"))]
    (weights,) = (folder / "mlartifacts").glob(f"**/{model.model_id}/artifacts/{rundir.POLICY}")
    assert weights.read_bytes() == (place / rundir.POLICY).read_bytes()


def test_a_store_that_takes_no_files_costs_warnings_but_no_row(sweep, uri, capsys, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder, plan = sweep

    def refuse(*_, **__):
        raise MlflowException("no access to the bucket")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", refuse)
    tracker = Tracker(folder, plan, uri=uri)
    assert [tracker.ship() for _ in range(3)] == [False, False, True]
    assert capsys.readouterr().err.count("no access to the bucket") == 4
    _, children = runs_of(uri, folder)
    assert [children[config.name].info.status for config in plan[:2]] == ["FINISHED", "FINISHED"]
    assert "final/aepo/score" in children[plan[0].name].data.metrics


# -- restarts and failures -------------------------------------------------------------------------------------------


def test_a_run_that_is_repeated_is_open_again_and_then_ends_as_it_ended(sweep, uri):
    folder, plan = sweep
    result = rundir.read_result(run_folder(folder, plan[0]))
    tracked.set_result(folder, plan[0], status="failed", error="ResourceError: full")
    assert Tracker(folder, plan, uri=uri).ship()
    assert runs_of(uri, folder)[1][plan[0].name].info.status == "FAILED"
    (run_folder(folder, plan[0]) / rundir.RESULT).unlink()
    tracker = Tracker(folder, plan, uri=uri)
    assert tracker.ship()
    assert runs_of(uri, folder)[1][plan[0].name].info.status == "RUNNING"
    rundir.write_result(run_folder(folder, plan[0]), result)
    assert tracker.ship()
    entry = runs_of(uri, folder)[1][plan[0].name]
    assert (entry.info.status, entry.data.tags.get("aepo.error", "")) == ("FINISHED", "")


def test_a_run_that_ray_gave_up_is_failed_with_its_reason_until_it_goes_on(sweep, uri):
    folder, plan = sweep
    tracker = Tracker(folder, plan, uri=uri)
    tracker.end(plan[2], "FAILED", "ActorDiedError: killed")
    assert tracker.ship()
    entry = runs_of(uri, folder)[1][plan[2].name]
    assert (entry.info.status, entry.data.tags["aepo.error"]) == ("FAILED", "ActorDiedError: killed")
    run_folder(folder, plan[2]).mkdir()
    files.write_json(run_folder(folder, plan[2]) / rundir.CONFIG, dataclasses.asdict(plan[2]))
    assert Tracker(folder, plan, uri=uri).ship()
    again = runs_of(uri, folder)[1][plan[2].name]
    assert (again.info.run_id, again.info.status) == (entry.info.run_id, "RUNNING")


def test_nothing_is_asked_of_the_server_when_nothing_has_changed(sweep, uri, monkeypatch):
    from mlflow import MlflowClient

    folder, plan = sweep
    tracker = Tracker(folder, plan, uri=uri)
    assert tracker.ship()
    for name in vars(MlflowClient):
        if not name.startswith("_"):
            monkeypatch.setattr(MlflowClient, name, lambda *_, **__: pytest.fail("called"))
    assert tracker.ship()


def test_a_server_that_is_away_costs_a_warning_and_its_rows_come_later(sweep, uri, capsys, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder, plan = sweep
    tracker = Tracker(folder, plan, uri=uri)

    def away(*_, **__):
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        assert not tracker.ship()
    assert "metrics wait on disk (MlflowException: connection refused)" in capsys.readouterr().err
    assert tracker.ship()
    assert set(tracker.run_ids) == {config.name for config in plan[:2]}


@pytest.mark.parametrize(("num_failures", "arrives"), [(3, True), (99, False)])
def test_at_the_end_a_server_that_is_away_is_waited_for(num_failures, arrives, sweep, uri, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder, plan = sweep
    tracker = Tracker(folder, plan, uri=uri)
    pauses, send = [], MlflowClient.log_batch

    def log_batch(*args, **kwargs):
        if len(pauses) < num_failures:
            raise MlflowException("connection refused")
        return send(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr("tune.tracking.time.sleep", pauses.append)
    assert tracker.ship_rest() is arrives
    assert sum(pauses) == (14 if arrives else 55)
    assert tracker.ship() is arrives


def test_a_server_that_never_answers_is_given_up_whatever_its_client_waits_for(sweep, uri, capsys, monkeypatch):
    from mlflow import MlflowClient

    folder, plan = sweep
    silent = threading.Event()
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: silent.wait())
    monkeypatch.setattr("tune.tracking.PATIENCE_S", 0.5)
    before = set(threading.enumerate())
    tracker = Tracker(folder, plan, uri=uri)
    try:
        assert not tracker.ship_rest()
        assert not tracker.close([row.status for row in collect_rows(folder, plan)])
    finally:
        silent.set()
        for thread in set(threading.enumerate()) - before:  # else it runs into the next test
            thread.join(60)
    assert " ".join(capsys.readouterr().err.split()).count("has not answered for 0.5 s; metrics wait on disk") == 1


def test_a_server_that_answers_has_all_the_time_that_it_needs(sweep, uri, monkeypatch):
    folder, plan = sweep
    monkeypatch.setattr("tune.tracking.PATIENCE_S", 0.2)
    tracker = Tracker(folder, plan, uri=uri)

    def slow():
        tracker._answered_at = time.monotonic() + 60  # as an answer in a minute from now would set it
        time.sleep(0.5)
        return True

    assert tracker._patiently(slow)


def test_what_fails_while_the_rest_is_sent_is_raised(sweep, uri):
    folder, plan = sweep
    (run_folder(folder, plan[0]) / rundir.RESULT).write_text("{")
    with pytest.raises(CheckpointError, match="is not a result"):
        Tracker(folder, plan, uri=uri).ship_rest()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:./mlruns", "begins with 'file'; wanted sqlite"),
        ("./mlruns", "begins with './mlruns'"),
        ("http://", "names no host"),
        ("http://host:port", "Port could not be cast"),
        ("sqlite://mlflow.db", "stands behind three slashes|[Ii]nvalid"),
        ("sqlite:mlflow.db", "Could not parse"),
        ("sqlite://", "in memory keeps nothing"),
        ("sqlite:////proc/none/track.db", "cannot be written"),
        ("sqlite:///{home}", "cannot be written"),
        ("sqlite:///{home}/text/track.db", "cannot be written"),
        ("sqlite:///{home}/text", "is no SQLite file"),
        ("postgresql+nosuch://me:secret@host/db", "Can't load plugin"),
        ("mysql+pyodbc://me:secret@host/db", "is not installed"),
    ],
)
def test_an_address_that_is_wrong_for_sure_is_refused_by_the_name_of_what_gave_it(
    address, message, tmp_path, monkeypatch
):
    (tmp_path / "text").write_text("no database, but a text of some length")
    address = address.replace("{home}", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"--tracking-uri is .*({message}).*; leave it out for") as error:
        find_store(address, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError, match=rf"MLFLOW_TRACKING_URI is .*({message}).*; unset it for"):
        find_store("", tmp_path)
    assert "secret" not in str(error.value)


def test_addresses_at_which_a_store_may_be_are_taken(tmp_path, monkeypatch):
    good = ["http://127.0.0.1:5000", "https://me:word@host/path", "databricks", "databricks://profile"]
    good += ["postgresql+psycopg://me:word@host:5432/mlflow", sqlite_uri(tmp_path / "new" / "50%20?" / "a.db")]
    for address in good:
        assert find_store(address, tmp_path) == address
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert find_store("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_password_in_the_uri_is_not_printed(sweep, capsys):
    folder, plan = sweep
    assert not Tracker(folder, plan, uri="nonsense://me:secret@host/db").ship()
    out, err = capsys.readouterr()
    assert "nonsense://host/db" in err
    assert "secret" not in out + err


def test_a_run_whose_making_was_not_answered_is_not_made_twice(sweep, uri, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder, plan = sweep
    make, calls = MlflowClient.create_run, []

    def unanswered(*args, **kwargs):
        made = make(*args, **kwargs)
        calls.append(made)
        if len(calls) in (1, 3):  # the sweep's own, and its second run
            raise MlflowException("read timed out")
        return made

    monkeypatch.setattr(MlflowClient, "create_run", unanswered)
    tracker = Tracker(folder, plan, uri=uri)
    assert [tracker.ship() for _ in range(4)] == [False, False, True, True]
    assert len(calls) == 3
    _, children = runs_of(uri, folder)
    assert all(entry.data.params for entry in children.values())


def test_two_folders_of_one_name_are_two_sweeps_and_a_moved_folder_is_the_same(sweep, uri, tmp_path):
    from mlflow import MlflowClient

    folder, plan = sweep
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "sweep")
    assert Tracker(folder, plan, uri=uri).ship()
    second = Tracker(other, plan, uri=uri)
    assert second.ship()
    moved = other.rename(tmp_path / "elsewhere" / "moved").rename(tmp_path / "sweep2").rename(other)
    third = Tracker(moved, plan, uri=uri)
    assert third.ship()
    assert third.run_ids == second.run_ids
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("aepo/sweep")
    entries = client.search_runs([experiment.experiment_id])
    assert len(entries) == 6
    assert len({entry.data.tags[SWEEP] for entry in entries}) == 2


def addresses(uri, folder):
    """Where the store says that files of the sweep lie: of its experiment, runs and models."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"aepo/{folder.name}")
    runs = client.search_runs([experiment.experiment_id])
    models = client.search_logged_models([experiment.experiment_id])
    found = [experiment.artifact_location, *(entry.info.artifact_uri for entry in runs)]
    return [*found, *(model.artifact_location for model in models)]


@pytest.mark.parametrize("copied", [False, True])
def test_a_sweep_goes_on_where_its_folder_was_moved_to(copied, sweep, tmp_path):
    from mlflow import MlflowClient

    folder, plan = sweep
    assert Tracker(folder, plan[:1], uri=find_store("", folder)).ship()
    new = tmp_path / "a b" / "50%20?#é" / "sweep"  # none of which is itself in an address
    (shutil.copytree if copied else shutil.move)(folder, new)
    before = sorted(folder.rglob("*"))
    tracker = Tracker(new, plan, uri=find_store("", new))
    assert tracker.ship()
    assert tracker.close([row.status for row in collect_rows(new, plan)])
    assert sorted(folder.rglob("*")) == before
    here = (new / "mlartifacts").as_uri()
    assert all(f"{address}/".startswith(f"{here}/") for address in addresses(find_store("", new), new))
    assert sorted(path.name for path in (tmp_path / "a b").iterdir()) == ["50%20?#é"]
    client = MlflowClient(find_store("", new))
    for run_id in tracker.run_ids.values():
        assert "result.json" in {file.path for file in client.list_artifacts(run_id)}
    (model, _) = client.search_logged_models([client.get_experiment_by_name("aepo/sweep").experiment_id])
    assert "MLmodel" in {file.path for file in client.list_logged_model_artifacts(model.model_id)}


def test_of_two_folders_of_one_name_each_keeps_its_files(sweep, uri, tmp_path):
    folder, plan = sweep
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "sweep")
    for place, planned in ((folder, plan[:1]), (other, plan[:1]), (folder, plan[:2]), (other, plan[:2])):
        assert Tracker(place, planned, uri=uri).ship()
    for place in (folder, other):
        assert len(list((place / "mlartifacts").rglob(rundir.RESULT))) == 2
        assert len(list((place / "mlartifacts").rglob("MLmodel"))) == 2


@given(name=st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1))
def test_the_address_of_a_store_is_that_of_its_file(name):
    from sqlalchemy import make_url

    path = Path("/") / name / "mlflow.db"
    assert make_url(sqlite_uri(path)).database == str(path)


# -- a server that is killed -----------------------------------------------------------------------------------------


class Server:
    """`mlflow server` on a SQLite file, in a process group of its own."""

    def __init__(self, folder):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.folder, self.uri, self.database = folder, f"http://127.0.0.1:{self.port}", folder / "server.db"

    def start(self):
        words = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.folder / "files"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        wait_for(self.answers, 120)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def rows(self):
        """MLflow run id -> key -> steps, in the order in which they came."""
        found = defaultdict(lambda: defaultdict(list))
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30) as connection:
            for run_id, key, step in connection.execute("SELECT run_uuid, key, step FROM metrics ORDER BY rowid"):
                found[run_id][key].append(step)
        connection.close()
        return found


def append_rows(folder, config, steps):
    place = run_folder(folder, config)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / rundir.CONFIG).exists():
        files.write_json(place / rundir.CONFIG, dataclasses.asdict(config))
    with (place / rundir.METRICS).open("ab") as file:
        for step in steps:
            row = {"time": 1.7e9 + step, "stage": "critic", "step": step, "num_steps": 10_000}
            row["metrics"] = {f"critic/{i}": step + i / 16 for i in range(10)}
            file.write(json.dumps(row).encode() + b"\n")


class Memory:
    """A sink that outlives the process that writes it; one call of a name raises."""

    name, address = "Memory", "here"

    def __init__(self, failing=None):
        self.run_ids, self.taken, self.failing = {}, [], failing

    def _take(self, call, *what):
        if call == self.failing:
            self.failing = None
            raise OSError("away")
        self.taken += what

    def open(self, sweep, planned, answered):
        self._take("open")

    def run(self, config, folder, *, is_open):
        self._take("run")
        return self.run_ids.setdefault(config.name, f"id of {config.name}")

    def log(self, run, rows):
        self._take("log" if run else "load", *((run, row["step"]) for row in rows if run))

    def end(self, config, folder, status, reason, result):
        self._take("end", (config.name, status))

    def close(self, statuses):
        self._take("close", *statuses)


@pytest.mark.parametrize("failing", [None, "open", "load", "run", "log", "end", "close"])
def test_a_sink_has_every_row_though_the_process_stops_between_and_the_sink_fails(failing, tmp_path, capsys):
    plan = [small_config("tests/pendulum/random-v0", seed) for seed in range(2)]
    first, second = (config.name for config in plan)
    sink, refused = Memory(failing), 0
    for steps in (range(3), range(3, 5), range(5, 5)):
        for config in plan:
            append_rows(tmp_path, config, steps)
        if not steps:
            tracked.set_result(tmp_path, plan[0], status="finished")
        for _ in range(2):
            tracker = tracking.Tracker(tmp_path, plan, sink)  # of a process of its own
            refused += not tracker.ship()
    refused += not tracker.close(["finished", "missing"])
    assert refused == (failing is not None)
    assert ("Memory at here does not answer" in " ".join(capsys.readouterr().err.split())) == bool(refused)
    assert tracker.close(["finished", "missing"])
    rows = [(name, step) for steps in (range(3), range(3, 5)) for name in (first, second) for step in steps]
    assert [row for row in sink.taken if row in rows] == rows, "each once, in the order of each shipment"
    assert sink.taken.count((first, "FINISHED")) == 1
    assert sink.run_ids == tracker.run_ids == {config.name: f"id of {config.name}" for config in plan}


@pytest.mark.slow
def test_a_server_killed_amid_a_shipment_has_every_row_once_and_in_order_in_the_end(tmp_path):
    from mlflow import MlflowClient

    folder = tmp_path / "sweep"
    plan = [small_config("tests/pendulum/random-v0", seed) for seed in range(3)]
    write_manifest(folder, plan)
    for config in plan[:2]:
        append_rows(folder, config, range(400))
    server = Server(tmp_path)
    server.start()
    try:
        tracker, answers = Tracker(folder, plan, uri=server.uri), []
        thread = threading.Thread(target=lambda: answers.append(tracker.ship()))
        thread.start()
        wait_for(lambda: server.database.exists() and sum(len(k) for k in server.rows().values()) > 2, 60)
        server.kill()
        thread.join(timeout=60)
        assert answers == [False]
        there = sum(len(steps) for keys in server.rows().values() for key, steps in keys.items() if "critic" in key)
        assert 0 < there < 8000, "killed amid the shipment"
        for keys in server.rows().values():
            for key, steps in keys.items():
                assert not key.startswith("critic") or steps == list(range(len(steps))), "a beginning, without holes"
        assert not tracker.ship()
        for config in plan:  # training goes on meanwhile
            append_rows(folder, config, range(400, 500))
        tracked.set_result(folder, plan[0], status="finished")
        tracked.set_result(folder, plan[1], status="failed", error="TrainingError: NaN")
        server.start()
        assert tracker.ship()
        assert Tracker(folder, plan, uri=server.uri).ship(), "a second process, which sends nothing twice"
        rows, (_, children) = server.rows(), runs_of(server.uri, folder)
        assert [children[config.name].info.status for config in plan] == ["FINISHED", "FAILED", "RUNNING"]
        client = MlflowClient(server.uri)
        for config, first in zip(plan, (0, 0, 400), strict=True):
            run_id = children[config.name].info.run_id
            assert rows[run_id] == {f"critic/{i}": list(range(first, 500)) for i in range(10)}
            history = client.get_metric_history(run_id, "critic/3")
            assert [(m.step, m.value) for m in history] == [(step, step + 3 / 16) for step in range(first, 500)]
    finally:
        server.kill()


def test_flatten_gives_dotted_keys():
    assert configs.flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
