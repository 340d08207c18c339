"""Files of a run or sweep and settings, whatever stands in them: they are taken, or refused by an error of ours."""

import copy
import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aepo import checkpoint, cli, files, methods, tasks
from aepo import config as configs
from aepo.documents import MAX_DEPTH, parse_json, read_toml
from aepo.errors import CheckpointError, ConfigError, DataError, from_machine
from aepo.policy import FORMAT, Policy
from aepo.presets import preset
from aepo.runs import rundir, spool
from tune.plan import make_plan, read_digests, read_manifest, read_planned, write_manifest
from tune.spec import SweepSpec
from tune.status import LiveStatus, status

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**30, 10**40) | st.floats() | st.text(),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=5), items, max_size=3),
    max_leaves=6,
)
"""Any JSON value, Python's nan and inf among them."""
DEEP = "[" * 20_000 + "]" * 20_000
LONG = "1" * 6000
METHODS = ["iql", "td3bc", "best"]
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def config_of(method="iql"):
    return preset(f"{method}-smoke", tasks.for_dataset("tests/pendulum/random-v0"), 0)


def places(node):
    """(container, key) of everything in a document."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def spoiled(data, document):
    """A copy of a document with one place replaced by any value, or taken away."""
    document = json.loads(json.dumps(document))
    node, key = data.draw(st.sampled_from(list(places(document))))
    if data.draw(st.booleans()):
        node[key] = data.draw(ANY)
    else:
        del node[key]
    return document


def outcome(call, kind=CheckpointError):
    """What a call returns, and of an error of that kind what it says."""
    try:
        return call(), ""
    except kind as error:
        return None, str(error)


# -- JSON and TOML -----------------------------------------------------------------------------------------


@given(st.binary() | st.text() | ANY.map(json.dumps))
def test_any_text_is_a_json_document_or_a_value_error(text):
    try:
        parse_json(text)
    except ValueError:
        return
    assert json.loads(text) is not ...


@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' * 20_000 + "1" + "}" * 20_000, LONG, '"\\ud800"', '"a\\u0000"', b"\xff"]
)
def test_what_nothing_behind_a_parser_could_use_is_no_document(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_documents_may_be_as_deep_as_ours_and_deeper():
    depth = MAX_DEPTH - 1
    assert parse_json("[" * depth + "]" * depth) is not None


@same_folder
@given(content=st.binary() | st.text().map(str.encode))
def test_any_file_is_toml_or_a_config_error(content, tmp_path):
    path = tmp_path / "any.toml"
    path.write_bytes(content)
    document, said = outcome(lambda: read_toml(path, kind="sweep file"), ConfigError)
    assert isinstance(document, dict) or str(path) in said


@pytest.mark.parametrize("text", [f"x = {DEEP}", "[a" + ".a" * 3000 + "]", 'x = "\\u0000"', f"x = {LONG}"])
def test_a_sweep_file_that_nests_without_end_is_refused(text, tmp_path, capsys):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    for words in (["sweep", str(path)], ["search", "--dataset", "a/b-v0", "--space", str(path)]):
        assert cli.run(words) == 2
        assert "is no TOML" in capsys.readouterr().err


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
def test_a_sweep_file_from_windows_is_read(begin, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_bytes(begin + b'task = ["maze2d-umaze"]\r\nseeds = [0, 1]\r\n')
    assert read_toml(path, kind="sweep file") == {"task": ["maze2d-umaze"], "seeds": [0, 1]}


# -- settings ----------------------------------------------------------------------------------------------


@given(ANY)
def test_any_value_is_a_config_or_a_config_error(value):
    with pytest.raises(ConfigError):
        methods.from_dict(value)


@given(data=st.data(), method=st.sampled_from(METHODS))
def test_a_config_with_any_value_anywhere_is_one_or_refused(data, method):
    document = spoiled(data, dataclasses.asdict(config_of(method)))
    try:
        config = methods.from_dict(document)
    except ConfigError:
        return
    again = methods.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again.fingerprint == config.fingerprint


NUMBERS = st.integers().map(str) | st.floats().map(str) | st.sampled_from(["1e400", "-0", LONG, f"-{LONG}", "1_0", "١"])


@given(data=st.data(), method=st.sampled_from(METHODS))
def test_any_words_are_settings_or_a_config_error(data, method):
    base = config_of(method)
    key = data.draw(st.sampled_from(configs.settings(base)))
    try:
        config = configs.with_overrides(base, {key: data.draw(st.text() | NUMBERS | ANY)})
    except ConfigError:
        return
    for stage in config.stages.values():
        counts = [value for value in dataclasses.asdict(stage).values() if isinstance(value, int)]
        assert all(0 <= count < 2**31 for count in counts)


@pytest.mark.parametrize(
    "words",
    [
        {"critic.num_layers": "9223372036854775808"},
        {"critic.num_layers": "1001"},
        {"energy.target": 0},
        {"critic.learner": ["expectile"]},
        {"critic.batch_size": "1" + "0" * 400},
        {"behavior.hidden_size": "2147483647"},
        {"evaluation.num_episodes": "2147483648"},
        {"evaluation.grid_beta": "1,nan", "evaluation.grid_guidance_scale": "1"},
        {"evaluation.grid_beta": "1", "evaluation.grid_guidance_scale": "inf"},
    ],
)
def test_settings_beyond_any_machine_are_refused(words):
    with pytest.raises(ConfigError):
        configs.with_overrides(config_of("best"), words)


@pytest.mark.parametrize(
    "flags",
    [["--threads", str(2**63)], ["--eval-processes", "1025"], ["--checkpoint-s", "nan"], ["--checkpoint-s", "-1"]],
)
def test_flags_beyond_any_machine_are_refused(flags, capsys):
    assert cli.run(["train", "--task", "maze2d-umaze", *flags]) == 2
    assert "got" in capsys.readouterr().err


# -- a run's files -----------------------------------------------------------------------------------------


def result_of(tmp_path, config):
    evaluation = {"method": "iql", "beta": None, "guidance_scale": None, "score": 1.0, "return_mean": 2.0}
    evaluation |= {"return_std": 0.0, "num_episodes": 1, "episode_returns": [2.0], "nats": 0.0, "kl": None}
    evaluation |= {"selected_episodes": 0}
    point = {"stage": "actor", "step": 3, "score": None, "return_mean": 2.0, "method": ""}
    ended = {"status": "finished", "score": 1.0, "return_mean": 2.0, "num_episodes": 1}
    planned = dataclasses.asdict(rundir.describe(config, tmp_path))
    return planned | ended | {"evaluations": [evaluation], "curve": [point]}


ROW = {"time": 1e9, "stage": "actor", "step": 1, "num_steps": 10, "metrics": {"actor/loss": 0.5}}


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = result_of(tmp_path, config_of())
    files.write_json(tmp_path / rundir.RESULT, result | {"from": "another version"})
    assert written(rundir.read_result(tmp_path)) == written(result)
    older = {key: value for key, value in result.items() if key not in ("grid", "steps_reused", "folder")}
    files.write_json(tmp_path / rundir.RESULT, older)
    nothing = {"grid": [], "steps_reused": 0, "folder": ""}
    assert written(rundir.read_result(tmp_path)) == written(result | nothing)
    files.write_json(tmp_path / rundir.RESULT, result | {"status": "missing"})
    with pytest.raises(CheckpointError, match="status"):
        rundir.read_result(tmp_path)


def written(result):
    """Return what stands in a result's file."""
    document = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result
    return json.loads(json.dumps(document))


def test_the_result_of_another_run_is_not_taken_for_this_ones(tmp_path):
    from aepo.runs import run

    config, other = config_of(), config_of("td3bc")
    files.write_json(tmp_path / rundir.RESULT, result_of(tmp_path, config))
    store, cpu = run.FolderStore(tmp_path), torch.device("cpu")
    assert run.execute(config, tmp_path, store, device=cpu).score == 1.0
    with pytest.raises(CheckpointError, match=f"is of run {config.fingerprint}, wanted {other.fingerprint}"):
        run.execute(other, tmp_path, store, device=cpu)


@same_folder
@given(data=st.data())
def test_a_result_with_any_value_anywhere_is_one_or_refused(data, tmp_path):
    document = spoiled(data, result_of(tmp_path, config_of()))
    (tmp_path / rundir.RESULT).write_text(json.dumps(document))
    result, said = outcome(lambda: rundir.read_result(tmp_path))
    if said:
        assert "delete" in said
        return
    assert result.status in ("finished", "failed")
    assert result.score is None or abs(result.score) < float("inf")


@pytest.mark.parametrize("name", [rundir.RESULT, rundir.METRICS])
@pytest.mark.parametrize("content", [DEEP, LONG, "[]", "null", "{}", "\0" * 50, '{"a": 1', None])
def test_what_is_no_result_and_no_row_is_refused(content, name, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(f"{content}\n")
    with pytest.raises(CheckpointError, match=name):
        _ = rundir.read_result(tmp_path) if name == rundir.RESULT else spool.read_spool(path)


@same_folder
@given(data=st.data())
def test_rows_with_any_value_anywhere_are_rows_or_refused(data, tmp_path):
    document = spoiled(data, ROW)
    path = tmp_path / rundir.METRICS
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(document)}\n")
    try:
        rows, _ = spool.read_spool(path)
    except CheckpointError:
        return
    assert rows[0] == ROW
    assert rows[1]["step"] >= 0
    assert isinstance(rows[1]["metrics"], dict)


def test_rows_of_another_method_are_not_continued(tmp_path):
    from aepo.runs import spool

    (tmp_path / "rows").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(CheckpointError, match="a stage 'actor', which aepo does not have"):
        spool.Spool(tmp_path / "rows", config_of("best"))


@given(data=st.data())
def test_a_checkpoint_with_any_value_anywhere_is_restored_or_refused(data):
    from aepo.stages.behavior import BehaviorState, start
    from tests.examples import random_transitions

    small = dataclasses.replace(config_of("best").behavior, hidden_size=4, num_layers=1)
    state: BehaviorState = start(small, random_transitions(20), torch.Generator().manual_seed(0))
    saved = checkpoint.collect(state)
    node, key = data.draw(st.sampled_from(list(places_of_dicts(saved))))
    tensors = st.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8)])
    node[key] = data.draw(ANY if isinstance(node[key], dict) else ANY | tensors)
    if data.draw(st.booleans()):
        del node[key]
    _, said = outcome(lambda: checkpoint.restore(state, saved))
    assert "\n" not in said


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("value", [[0.0], 0.0, None, torch.zeros(7, 7)])
def test_an_optimizer_takes_no_means_of_another_kind_or_shape(name, value):
    from aepo.stages.behavior import start
    from tests.examples import random_transitions

    small = dataclasses.replace(config_of("best").behavior, hidden_size=4, num_layers=1)
    state = start(small, random_transitions(20), torch.Generator().manual_seed(0))
    saved = copy.deepcopy(checkpoint.collect(state))
    saved["optimizer"]["state"][3][name] = value
    with pytest.raises(CheckpointError, match=r"does not fit this run at 'optimizer': a .*, wanted a tensor"):
        checkpoint.restore(state, saved)


def places_of_dicts(node):
    for key, value in node.items():
        yield node, key
        if isinstance(value, dict):
            yield from places_of_dicts(value)


def write_policy(path, config):
    from tests.examples import random_transitions

    Policy(config, random_transitions().spaces).save(path)


def with_facts(path, make):
    """Write a policy's metadata anew; its weights stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][FORMAT] = make(header["__metadata__"][FORMAT])
    new = json.dumps(header).encode()
    path.with_name("odd").write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    return path.with_name("odd")


@same_folder
@given(data=st.data())
def test_a_policy_of_any_config_is_one_or_refused(data, tmp_path):
    path = tmp_path / "policy"
    if not path.exists():
        small = {f"{stage}.hidden_size": 4 for stage in ("critic", "actor")}
        write_policy(path, configs.with_overrides(config_of(), small))
    odd = with_facts(path, lambda text: json.dumps(spoiled(data, json.loads(text))))
    policy, said = outcome(lambda: Policy.load(odd))
    assert isinstance(policy, Policy) or "does not hold the policy" in said or "digest" in said


@pytest.mark.parametrize("facts", [DEEP, LONG, "3", "[]", '{"digest": "x"}', "{", ""])
def test_a_policy_without_facts_is_refused(facts, tmp_path):
    write_policy(tmp_path / "policy", config_of())
    with pytest.raises(CheckpointError):
        Policy.load(with_facts(tmp_path / "policy", lambda _: facts))


# -- a sweep's files ---------------------------------------------------------------------------------------


def write_sweep(folder):
    plan = make_plan(SweepSpec(dataset=("tests/pendulum/random-v0",), seeds=(0, 1), preset=("iql-smoke",)))
    write_manifest(folder, plan, {"tests/pendulum/random-v0": "0" * 16})
    return plan


@same_folder
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere_is_one_or_refused(data, tmp_path):
    write_sweep(tmp_path)
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(spoiled(data, json.loads(path.read_text()))))
    for read in (read_manifest, read_digests, lambda sweep: read_planned(sweep, "x")):
        _, said = outcome(lambda read=read: read(tmp_path))
        assert not said or str(tmp_path) in said


@pytest.mark.parametrize(
    "content", [DEEP, LONG, '{"format": 1, "runs": [3]}', '{"format": 1, "runs": {}, "data": [1]}', None]
)
def test_what_is_no_manifest_is_refused(content, tmp_path, capsys):
    path = tmp_path / "sweep.json"
    path.mkdir() if content is None else path.write_text(content)
    assert cli.run(["sweep", "--status", "--out", str(tmp_path)]) == 4
    assert "sweep.json" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        read_digests(tmp_path)


def test_one_broken_run_does_not_hide_the_others(tmp_path):
    plan = write_sweep(tmp_path)
    for config, line in zip(plan, ("not a row", json.dumps(ROW)), strict=True):
        folder = tmp_path / "runs" / config.name
        folder.mkdir(parents=True)
        (folder / rundir.METRICS).write_text(f"{line}\n")
    first, second = status(tmp_path, plan)
    assert "is no row of metrics" in first["error"]
    assert (second["error"], second["step"]) == (None, "1/10")


def test_rows_that_stand_twice_have_no_rate(tmp_path):
    plan = write_sweep(tmp_path)
    folder = tmp_path / "runs" / plan[0].name
    folder.mkdir(parents=True)
    (folder / rundir.METRICS).write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | {'time': 2e9})}\n")
    live = LiveStatus(tmp_path, plan)
    live.refresh()
    assert live.rows()[plan[0].name]["steps/s"] == ""


def test_a_store_of_mlflow_that_is_not_there_is_neither_made_nor_waited_for(tmp_path):
    from analysis.load import load_runs

    for path in (tmp_path / "none.db", tmp_path):
        with pytest.raises(DataError, match="no MLflow store"):
            load_runs("mlflow:aepo/x", tracking_uri=f"sqlite:///{path}")
    assert not (tmp_path / "none.db").exists()


def test_a_store_of_mlflow_that_is_none_is_refused(tmp_path):
    from analysis.load import load_runs

    (tmp_path / "mlflow.db").write_bytes(b"not a database " * 100)
    with pytest.raises(DataError, match="MLflow does not answer as wanted"):
        load_runs("mlflow:aepo/x", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


# -- the machine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/there"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_exit_status_six(error, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr("aepo.tasks.find", refuse)
    assert cli.run(["train", "--task", "x"]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: /there: Permission denied" if isinstance(error, OSError) else "error: out of memory")


def test_other_errors_are_not_the_machines():
    assert from_machine(RuntimeError("shapes differ")) is None
    assert from_machine(ValueError("cannot allocate memory")) is None


def test_the_spread_of_one_transition_is_no_nan(transitions):
    from aepo.stages import critic
    from tests.examples import random_transitions

    one = random_transitions(1)
    state = critic.start(config_of("best").critic, one, torch.Generator().manual_seed(0))
    assert critic.advantage_scale(state, one) == pytest.approx(1e-6)
