"""The sweep's command without Ray: file, plan, estimate, status, stop, lock; the trial's functions in this process."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aepo import cli
from aepo.errors import CheckpointError, ConfigError, DataError, Interrupted, ResourceError
from aepo.runs import run, rundir
from tune import commands, estimate, trainable
from tune.plan import STOP, make_plan, run_folder, write_manifest
from tune.spec import Execution, Resources, SweepSpec, read_sweep_file
from tune.status import LOCK, LiveStatus, is_running, status, sweep_lock
from tune.sweep import on_ray

CPU = torch.device("cpu")
TINY = [f"{stage}.{key}" for stage in ("behavior", "critic", "energy") for key in ("steps=20", "hidden_size=16")]


def at_critic_50(progress):
    return (progress.stage, progress.step) == ("critic", 50)


@pytest.fixture
def sweep(make_dataset, tiny_config, tmp_path):
    """A sweep of four: one finished, one failed, one begun, one not."""
    dataset_id = make_dataset()
    plan = [tiny_config(dataset_id, seed=seed) for seed in range(4)]
    folder = tmp_path / "sweep"
    write_manifest(folder, plan)
    place = run_folder(folder, plan[0])
    run.execute(plan[0], place, run.FolderStore(place), device=CPU)
    failed = run_folder(folder, plan[1])
    failed.mkdir()
    rundir.record_failure(plan[1], failed, "TrainingError: critic/loss is nan")
    (failed / "log.txt").write_text("".join(f"line {i}\n" for i in range(20)))
    begun = run_folder(folder, plan[2])
    with pytest.raises(Interrupted):
        run.execute(
            plan[2],
            begun,
            run.FolderStore(begun),
            device=CPU,
            on_progress=lambda p: (p.stage, p.step) == ("critic", 50),
        )
    return folder, plan


# -- file and plan -----------------------------------------------------------------------------------------


def write_toml(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    return tmp_path / "sweep.toml"


def parse(*words):
    return cli.parse(commands.Sweep, "aepo sweep", list(words))


def test_a_sweep_file_says_what_the_flags_say_and_a_flag_wins(tmp_path):
    file = write_toml(
        tmp_path,
        """
        task = ["maze2d-umaze"]
        seeds = [1, 2]
        preset = ["best-smoke", "iql-smoke"]
        out = "sweeps/file"
        max-concurrent = 3
        cpus = 2
        set."critic.expectile" = 0.9
        set.evaluation.grid_beta = [1, 3]
        """,
    )
    merged = parse(str(file), "--seeds", "7")
    assert merged.spec == SweepSpec(
        task=("maze2d-umaze",),
        seeds=(7,),
        preset=("best-smoke", "iql-smoke"),
        set={"critic.expectile": 0.9, "evaluation.grid_beta": [1, 3]},
    )
    assert merged.execution == Execution(max_concurrent=3, cpus=2.0, out=Path("sweeps/file"))


FLAGS = {
    "seeds": st.lists(st.integers(0, 9), max_size=3).map(tuple),
    "preset": st.lists(st.sampled_from(["quick", "best-paper"]), max_size=2).map(tuple),
    "set": st.lists(st.sampled_from(["critic.expectile=0.9", "sampling.beta=1"]), max_size=2).map(tuple),
    "tracking_uri": st.sampled_from(["", "sqlite:///a.db"]),
    "runner": st.sampled_from(["train", "inline"]),
    "cpus": st.sampled_from([1.0, 2.5]),
    "max_concurrent": st.integers(0, 3),
    "out": st.sampled_from(["sweeps/default", "sweeps/other"]).map(Path),
    "reuse_stages": st.booleans(),
    "retry_failed": st.booleans(),
}


def as_words(name, value):
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]


def as_toml(value):
    return json.dumps(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.fixed_dictionaries({}, optional=FLAGS), flags=st.fixed_dictionaries({}, optional=FLAGS))
def test_a_flag_that_is_given_wins_whatever_it_says(file, flags, tmp_path):
    place = write_toml(tmp_path, "".join(f"{name} = {as_toml(value)}\n" for name, value in file.items()))
    words = [word for name, value in flags.items() for word in as_words(name, value)]
    wanted = {**file, **flags}
    if "set" in wanted:
        wanted["set"] = dict(word.split("=") for word in wanted["set"])
    of_spec = {field.name for field in dataclasses.fields(SweepSpec)}
    assert parse(str(place), *words) == commands.Sweep(
        file=place,
        spec=SweepSpec(**{name: value for name, value in wanted.items() if name in of_spec}),
        execution=Execution(**{name: value for name, value in wanted.items() if name not in of_spec}),
    )


def test_flags_that_say_which_runs_there_are_are_refused_beside_a_manifest(sweep, capsys):
    manifest = str(sweep[0] / "sweep.json")
    assert cli.run(["sweep", manifest, "--dry-run", "--seeds", "0", "--preset", "quick"]) == 2
    assert "leave out --seeds, --preset" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = [1]", "no setting 'seed'; did you mean seeds"),
        ("seeds = ['a']", "seeds.0: "),
        ("seeds = 1", "seeds: "),
        ("runner = 'slurm'", "runner: "),
        ("seeds = [1", "is no TOML"),
        ("yes = true", "no setting 'yes'"),
    ],
)
def test_a_sweep_file_with_a_mistake_is_refused_by_name(text, message, tmp_path, capsys):
    file = write_toml(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        read_sweep_file(file)
    assert cli.run(["sweep", str(file)]) == 2
    assert str(file) in " ".join(capsys.readouterr().err.split("\n"))
    assert cli.run(["sweep", str(tmp_path / "none.toml")]) == 2


def test_a_suite_is_all_its_tasks_of_a_source():
    plan = make_plan(SweepSpec(seeds=(0,), preset=("smoke",), suite=("antmaze", "kitchen")))
    assert len(plan) == 9
    assert {config.data.source for config in plan} == {"d4rl"}
    plan = make_plan(SweepSpec(seeds=(0,), preset=("smoke",), suite=("gym-mujoco",), source="minari"))
    assert len(plan) == 6
    assert len(make_plan(SweepSpec(seeds=(0,), preset=("smoke",), suite=("pointmaze",)))) == 8
    with pytest.raises(ConfigError, match="no suite 'atari' with any data; there are adroit"):
        make_plan(SweepSpec(seeds=(0,), preset=("smoke",), suite=("atari",)))


def test_a_dry_run_shows_the_plan_with_its_estimate_and_starts_nothing(make_dataset, tmp_path, capsys):
    dataset_id = make_dataset()
    words = ["sweep", "--dataset", dataset_id, "no/such-v0", "--seeds", "0", "1", "--preset", "qgpo-smoke", "iql-smoke"]
    words += ["--out", str(tmp_path / "sweep"), "--dry-run"]
    assert cli.run([*words, "--json"]) == 0
    out, messages = capsys.readouterr()
    rows = json.loads(out)
    assert [(row["task"], row["method"], row["runs"], row["to do"]) for row in rows] == [
        (task, method, 2, 2) for task in (dataset_id, "no/such-v0") for method in ("qgpo", "iql")
    ]
    assert [row["data"] for row in rows] == ["here", "here", "missing", "missing"]
    assert all(row["seconds"] > 0 for row in rows[:2])
    assert rows[2]["seconds"] is None
    assert "8 of 8 runs to do, 4 of unknown length" in messages
    assert "missing: no/such-v0; `aepo data download no/such-v0`" in messages
    assert not (tmp_path / "sweep").exists()
    assert cli.run(words) == 0
    assert "time each" in capsys.readouterr().out


def test_the_estimate_is_of_the_order_of_the_truth(make_dataset, tiny_config):
    config = tiny_config(make_dataset(), critic__steps=400, behavior__steps=400, energy__steps=400)
    costs = estimate.run_costs([config, tiny_config(seed=1)], estimate.Costs(cpus=1, gpus=0), "inline")
    assert set(costs) == {config.name, tiny_config(seed=1).name}
    steps = sum(costs[config.name].stages.values())
    from aepo import pipeline
    from aepo.data.transitions import load_transitions

    data = load_transitions(config.data.dataset)
    begin = time.process_time()
    for _ in pipeline.train(config, data, device=CPU):
        pass
    truth = time.process_time() - begin
    assert truth / 4 < steps < truth * 4


def test_memory_counts_the_support_actions_that_a_method_keeps(monkeypatch):
    monkeypatch.setattr(estimate, "_environment_bytes", lambda row: 0.0)
    plan = make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(0,), preset=("best-paper", "qgpo-paper")))
    plain, qgpo = (estimate.memory_gib(config, "train") for config in plan)
    assert plain == 1.2
    assert qgpo - plain == pytest.approx(2 * 1_000_000 * 16 * estimate.MAX_ACTION_DIM * 4 / 2**30)
    assert estimate.memory_gib(plan[0], "inline") < plain


def test_memory_counts_the_environments_of_an_evaluation(monkeypatch):
    class Large:
        def __init__(self):
            self.model = np.ones(5_000_000)

        def reset(self, seed):
            pass

        def close(self):
            pass

    estimate._environment_bytes.cache_clear()
    monkeypatch.setattr(estimate, "_make", lambda row: Large())
    (few,) = make_plan(SweepSpec(task=("pen-human-v1",), seeds=(0,), set={"evaluation.num_episodes": 20}))
    (many,) = make_plan(SweepSpec(task=("pen-human-v1",), seeds=(0,), set={"evaluation.num_episodes": 2000}))
    assert estimate.memory_gib(few, "train") - 1.2 == pytest.approx(20 * 0.04e9 / 2**30, rel=0.2)
    assert estimate.memory_gib(many, "train") - 1.2 == pytest.approx(50 * 0.04e9 / 2**30, rel=0.2)
    estimate._environment_bytes.cache_clear()


def test_long_runs_come_first():
    plan = make_plan(SweepSpec(task=("maze2d-umaze",), seeds=(0,), preset=("smoke", "paper", "quick")))
    assert [config.preset for config in sorted(plan, key=estimate.work, reverse=True)] == ["paper", "quick", "smoke"]


def test_the_manifest_plans_the_same_runs_again_and_knows_their_data(sweep, tmp_path, capsys, make_dataset):
    from tune.plan import read_digests, read_manifest
    from tune.sweep import check_data

    folder, plan = sweep
    digests = check_data(plan, {})
    write_manifest(folder, plan, digests)
    file = folder / "sweep.json"
    assert read_manifest(file) == plan
    assert read_digests(file) == read_digests(folder) == digests
    assert read_digests(tmp_path) == {}
    assert cli.run(["sweep", str(file), "--out", str(tmp_path / "again"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["runs"] == 4
    assert cli.run(["sweep", str(file), "--task", "maze2d-umaze"]) == 2
    assert "says which runs there are" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(DataError, match="has changed since this sweep was planned"):
        check_data(plan, {plan[0].data.dataset: "0123"})


def test_a_tracking_address_that_is_none_is_refused_before_anything_starts(make_dataset, tmp_path, capsys, monkeypatch):
    words = ["sweep", "--dataset", make_dataset(), "--preset", "smoke", "--out", str(tmp_path / "sweep")]
    assert cli.run([*words, "--tracking-uri", "htp://x"]) == 2
    assert "begins with 'htp'; wanted sqlite, http" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    for command in (words, ["search", *words[1:]], ["quickstart", "--out", words[-1]]):
        assert cli.run(command) == 2
        assert "MLFLOW_TRACKING_URI is 'file:./mlruns'" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "sweep").exists()


# -- status, lock, stop ------------------------------------------------------------------------------------


def test_status_says_where_every_run_stands_and_why_one_failed(sweep, capsys):
    folder, plan = sweep
    rows = status(folder, plan)
    assert [row["state"] for row in rows] == ["finished", "failed", "interrupted", "waiting"]
    assert rows[1]["error"] == "TrainingError: critic/loss is nan"
    assert rows[1]["log"] == [f"line {i}" for i in range(15, 20)]
    assert (rows[2]["stage"], rows[2]["step"]) == ("critic", "50/60")
    with sweep_lock(folder):
        assert [row["state"] for row in status(folder, plan)] == ["finished", "failed", "running", "waiting"]
    assert cli.run(["sweep", "--status", "--out", str(folder)]) == 0
    out, messages = capsys.readouterr()
    assert "1 finished, 1 failed, 1 interrupted, 1 waiting" in out
    assert "critic/loss is nan" in messages
    assert "    line 19" in messages
    assert cli.run(["sweep", "--status", "--out", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_watch_ends_when_nobody_carries_the_sweep_out(sweep, capsys):
    assert cli.run(["sweep", "--watch", "--out", str(sweep[0])]) == 0
    out, messages = capsys.readouterr()
    assert "critic 50/60" in messages
    assert "1 waiting" in out


def test_looking_at_what_is_no_sweep_is_refused(tmp_path, capsys):
    for flag in ("--status", "--watch", "--stop"):
        assert cli.run(["sweep", flag, "--out", str(tmp_path)]) == CheckpointError.exit_status
        assert "is not a sweep" in capsys.readouterr().err.replace("\n", " ")
    assert cli.run(["sweep", "--stop", "--status"]) == 2


def test_the_live_status_reads_the_ends_of_long_files(sweep, monkeypatch):
    folder, plan = sweep
    whole = LiveStatus(folder, plan)
    whole.refresh()
    monkeypatch.setattr("tune.status.TAIL_BYTES", 300)
    tail = LiveStatus(folder, plan)
    tail.refresh()
    assert {name: row["step"] for name, row in tail.rows().items()} == {
        name: row["step"] for name, row in whole.rows().items()
    }


def test_a_sweep_is_carried_out_by_one_process_at_a_time(tmp_path):
    assert not is_running(tmp_path)
    with sweep_lock(tmp_path):
        code = (
            "import sys, pathlib; from tune.status import sweep_lock\nwith sweep_lock(pathlib.Path(sys.argv[1])): pass"
        )
        words = [sys.executable, "-c", code, str(tmp_path)]
        second = subprocess.run(words, capture_output=True, text=True, check=False)
        assert f"is carried out already, by process {os.getpid()}" in second.stderr
        looking = (
            "import sys, pathlib; from tune.status import is_running; print(is_running(pathlib.Path(sys.argv[1])))"
        )
        seen = subprocess.run(
            [sys.executable, "-c", looking, str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert seen.stdout.strip() == "True"
    with sweep_lock(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


def test_a_request_to_stop_is_taken_back_by_the_next_start_and_refused_where_nobody_runs(sweep, capsys):
    folder, _ = sweep
    assert cli.run(["sweep", "--stop", "--out", str(folder)]) == 3
    assert "there is nothing to stop" in capsys.readouterr().err
    code = "import sys, time, pathlib; from tune.status import sweep_lock\n"
    code += "with sweep_lock(pathlib.Path(sys.argv[1])): time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    try:
        while not is_running(folder):
            time.sleep(0.1)
        assert cli.run(["sweep", "--stop", "--out", str(folder)]) == 0
        assert (folder / STOP).exists()
    finally:
        process.kill()
        process.wait()
    with sweep_lock(folder):
        assert not (folder / STOP).exists()


# -- the trial's functions ---------------------------------------------------------------------------------


@pytest.fixture
def values(sweep, monkeypatch):
    """What a trial gets, for the run that has not begun; Ray Tune's report goes nowhere."""
    folder, plan = sweep
    monkeypatch.setattr("ray.tune.report", lambda _: None)
    monkeypatch.setattr(trainable, "STOP_INTERVAL_S", 0.0)
    return {
        "run": plan[3].name,
        "sweep": str(folder),
        "cpus": 1.0,
        "gpus": 0.0,
        "checkpoint_s": 60.0,
        "stages": "",
    }


def test_a_stopped_run_stores_its_checkpoint_and_ends_like_the_unbroken_one(sweep, values, tmp_path):
    run.set_up_torch(1)  # as a trial does: threads and subnormal numbers are part of what is the same bit for bit
    folder, plan = sweep
    place = run_folder(folder, plan[3])
    (folder / STOP).touch()
    trainable.run_inline(values)
    assert not place.exists()  # not begun at all
    (folder / STOP).unlink()
    saw = []

    def at_critic(progress):
        saw.append(progress.stage)
        return progress.stage == "critic"

    with pytest.raises(Interrupted, match=r"stopped at step \d+ of critic"):
        run.execute(plan[3], place, run.FolderStore(place), device=CPU, on_progress=at_critic)
    assert rundir.read_result(place) is None
    trainable.run_inline(values)
    assert rundir.read_result(place).status == "finished"
    whole = run.execute(plan[3], tmp_path / "whole", run.FolderStore(tmp_path / "whole"), device=CPU)
    assert (place / rundir.POLICY).read_bytes() == (tmp_path / "whole" / rundir.POLICY).read_bytes()
    assert rundir.read_result(place).evaluations == whole.evaluations
    assert "starts" in (place / "log.txt").read_text()


def test_a_run_asked_to_stop_within_training_says_so_in_its_log(sweep, values, monkeypatch):
    folder, plan = sweep
    place = run_folder(folder, plan[3])
    answers = iter([False, False])  # at the start, at the first Progress
    monkeypatch.setattr(trainable, "_is_stopped", lambda _: next(answers, True))
    trainable.run_inline(values)
    assert "stopped at step" in (place / "log.txt").read_text()
    assert rundir.read_result(place) is None
    assert run.FolderStore(place).load() is not None


def test_a_trial_evaluates_on_the_cores_that_it_was_granted(sweep, values):
    folder, plan = sweep
    trainable.run_inline(values | {"cpus": 2.0})
    place = run_folder(folder, plan[3])
    assert rundir.read_result(place).status == "finished"
    assert "2 evaluation processes, started in" in (place / "log.txt").read_text()


def test_a_failure_that_repeats_is_a_result_and_no_exception(sweep, values, monkeypatch):
    monkeypatch.setattr("aepo.stages.fast.expectile_loss", lambda u_B, _: u_B.sum() / 0)
    trainable.run_inline(values)
    place = run_folder(sweep[0], sweep[1][3])
    assert rundir.read_result(place).status == "failed"
    assert "failed: critic/loss is" in (place / "log.txt").read_text()


def test_an_accident_is_tried_again_and_the_same_one_twice_is_a_failure(sweep, values, monkeypatch):
    folder, plan = sweep
    place = run_folder(folder, plan[3])

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("aepo.pipeline.train", broken)
        with pytest.raises(ZeroDivisionError):
            trainable.run_inline(values)
        assert rundir.read_result(place) is None
        trainable.run_inline(values)
    result = rundir.read_result(place)
    assert (result.status, result.error) == (
        "failed",
        "ZeroDivisionError: a bug (twice; log.txt has the traceback)",
    )
    assert "in broken" in (place / "log.txt").read_text()


def test_a_full_disk_is_a_row_that_says_so(sweep, values, monkeypatch):
    folder, plan = sweep

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aepo.checkpoint.save", full)
    trainable.run_inline(values | {"checkpoint_s": 0.0})
    result = rundir.read_result(run_folder(folder, plan[3]))
    assert result.status == "failed"
    assert result.error.startswith("ResourceError: no space left for ")


@pytest.mark.parametrize(
    ("address", "error", "wanted"),
    [
        (
            "",
            Exception("The node timed\nout."),
            r"start here \(Exception: The node timed out\.\).*the same command again",
        ),
        ("10.0.0.1:9", SystemExit(15), r"no Ray at 10.0.0.1:9 \(SystemExit: 15\); `ray status`"),
    ],
)
def test_a_ray_that_does_not_answer_is_said_with_what_to_do(address, error, wanted, sweep, monkeypatch):
    import ray

    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "init", fail)
    _, plan = sweep
    with pytest.raises(ResourceError, match=wanted), on_ray(Resources(address=address), plan):
        raise AssertionError("it has started")


def test_memory_and_cores_bound_the_slots():
    from tune.sweep import _slots

    node = {"Alive": True, "Resources": {"CPU": 8.0, "memory": 4 * 2**30}}
    assert _slots([node], Resources(), 1.2) == 3
    assert _slots([node], Resources(runner="inline"), 0.4) == 8
    with pytest.raises(ResourceError, match=r"5\.0 GiB"):
        _slots([node], Resources(), 5.0)


@pytest.mark.parametrize("flag", ["--cpus", "--gpus", "--checkpoint-s"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("command", [["sweep"], ["search"]])
def test_resources_are_finite_numbers(command, flag, value, tmp_path, capsys):
    where = ["--task", "maze2d-umaze", "--out", str(tmp_path / "s"), f"{flag}={value}", "--dry-run"]
    assert cli.run([*command, *where]) == 2
    assert "--cpus must be a number above 0" in capsys.readouterr().err.replace("\n", " ")
