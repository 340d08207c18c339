"""Evaluation on several processes: the same bits, the same errors, nobody left behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import minari
import numpy as np
import psutil
import pytest
import torch

from aepo import cli, tasks
from aepo.errors import ConfigError, DataError, ResourceError, TrainingError
from aepo.evaluate import Evaluator
from aepo.runs import run, rundir
from tests.examples import wait_for
from tests.families import write_minari


class Watching:
    """A policy whose actions follow from what it sees, which it remembers."""

    device = torch.device("cpu")

    def num_cut(self, observations_NS):
        return 0

    def __init__(self, action_dim=1, on_act=None):
        self._action_dim, self._on_act = action_dim, on_act
        self.seen = []

    def act(self, observations_NS, generator):
        self.seen.append(observations_NS.tobytes())
        if self._on_act is not None:
            self._on_act(len(self.seen))
        noise = torch.rand(len(observations_NS), self._action_dim, generator=generator).numpy()
        return np.sin(observations_NS.sum(axis=1, keepdims=True) + 6 * noise).astype(np.float32)


def roll_out(dataset_id, processes, *, num_episodes, action_dim=1, **kwargs):
    """Returns and everything that the policy has seen."""
    evaluator, policy = Evaluator(dataset_id, processes=processes, **kwargs), Watching(action_dim)
    returns = evaluator.run(policy, num_episodes=num_episodes, seed=3)
    evaluator.close()
    return returns.tolist(), policy.seen


@pytest.fixture
def unruly(make_dataset):
    """A function that makes a data set of the environment that does as it is told."""

    def make(deed, *, elsewhere=False):
        dataset_id = make_dataset(f"tests/{deed or 'calm'}/{'elsewhere' if elsewhere else 'everywhere'}-v0")
        kwargs = {"deed": deed, "elsewhere": elsewhere}
        spec = gymnasium.envs.registration.EnvSpec(
            "Unruly-v0", "tests.unruly:Unruly", max_episode_steps=5, kwargs=kwargs
        ).to_json()
        minari.load_dataset(dataset_id).storage.update_metadata({"eval_env_spec": spec})
        return dataset_id

    return make


# -- the same bits -----------------------------------------------------------------------------------------


def test_every_number_of_processes_gives_the_same_returns(make_dataset, monkeypatch):
    monkeypatch.setattr("aepo.evaluate.MAX_ENVS", 5)  # of 7 episodes: two slots have a second one
    dataset_id = make_dataset()
    alone = roll_out(dataset_id, 1, num_episodes=7)
    assert len(set(alone[0])) == 7
    for processes in (2, 3, 8):
        assert roll_out(dataset_id, processes, num_episodes=7) == alone, processes


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning", "ignore:`eval_env`:UserWarning")
@pytest.mark.parametrize("task", ["kitchen-complete-v0", "antmaze-umaze-v2", "pen-human-v1"])
def test_the_slow_environments_give_the_same_on_several_processes(task, monkeypatch):
    monkeypatch.setattr("aepo.evaluate.MAX_ENVS", 3)
    row = tasks.find(task, "minari")
    write_minari(row.dataset, row)
    found = [
        roll_out(
            row.dataset,
            processes,
            num_episodes=4,
            action_dim=minari.load_dataset(row.dataset).action_space.shape[0],
            observation_keys=row.observation_keys,
            return_rule=row.return_rule,
            horizon=8,
        )
        for processes in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0][1])) == 16, "the environments do not move"


def test_a_runs_result_and_files_do_not_depend_on_the_processes(make_dataset, tiny_config, tmp_path):
    settings = {"num_curve_points": 1, "num_curve_episodes": 1, "grid_beta": "1", "grid_guidance_scale": "2"}
    config = tiny_config(make_dataset(), **{f"evaluation__{key}": value for key, value in settings.items()})
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        store, cpu = run.FolderStore(folder), torch.device("cpu")
        result = run.execute(config, folder, store, device=cpu, eval_processes=processes)
        results.append(dataclasses.replace(result, seconds=0.0, started_at=None, folder=""))
    assert results[0] == results[1]
    assert (tmp_path / "1" / rundir.POLICY).read_bytes() == (tmp_path / "2" / rundir.POLICY).read_bytes()


def test_the_commands_take_a_number_of_processes(make_dataset, tmp_path, capsys):
    small = [f"{stage}.{key}" for stage in ("critic", "actor") for key in ("steps=20", "hidden_size=8")]
    dataset_id, rows = make_dataset(), {}
    for processes in ("1", "2"):
        train = ["train", "--dataset", dataset_id, "--preset", "iql-smoke", "--set", *small, "--json"]
        assert cli.run([*train, "--out", str(tmp_path / processes), "--eval-processes", processes]) == 0
        result = json.loads(capsys.readouterr().out)
        evaluate = ["evaluate", result["folder"], "--num-episodes", "3", "--json"]
        assert cli.run([*evaluate, "--eval-processes", processes]) == 0
        out, err = capsys.readouterr()
        assert ("2 evaluation processes, started in " in err) == (processes == "2")
        rows[processes] = (Path(result["folder"]).name, result["evaluations"], json.loads(out))
    assert rows["1"] == rows["2"]


def test_subnormal_numbers_are_what_they_are_in_the_first_process(unruly):
    dataset_id = unruly("subnormal")
    for flush, return_ in ((True, 0.0), (False, 5.0)):
        torch.set_flush_denormal(flush)
        assert roll_out(dataset_id, 2, num_episodes=2)[0] == [return_, return_]


# -- the processes -----------------------------------------------------------------------------------------


def test_processes_start_at_the_first_evaluation_that_needs_them_and_stay(make_dataset):
    evaluator = Evaluator(make_dataset(), processes=3)
    workers = evaluator._slots.workers

    def pids_after(num_episodes):
        evaluator.run(Watching(), num_episodes=num_episodes, seed=0)
        return [worker.pid for worker in workers]

    assert pids_after(1) == []
    assert evaluator.start_s == 0
    (first,) = pids_after(2)
    started = evaluator.start_s
    assert started > 0
    assert pids_after(2) == [first]
    assert evaluator.start_s == started
    both = pids_after(7)
    assert both[0] == first
    assert len(both) == 2
    evaluator.close()
    assert not any(psutil.pid_exists(pid) for pid in both)


def test_a_process_has_no_torch_and_leaves_standard_output_alone(unruly, capfd):
    assert roll_out(unruly("torch"), 2, num_episodes=2)[0] == [5.0, 0.0]
    roll_out(unruly("print", elsewhere=True), 2, num_episodes=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("out of turn") == 5


SCRIPT = """
import os, torch
from aepo.evaluate import Evaluator
from tests.aepo.test_slots import Watching

evaluator = Evaluator("tests/pendulum/random-v0", processes=2)
evaluator.run(Watching(), num_episodes=2, seed=0)
print(evaluator._slots.workers[0].pid, flush=True)
while True:
    evaluator.run(Watching(), num_episodes=2, seed=0)
"""


def test_processes_end_with_the_one_that_started_them_even_if_it_is_killed(make_dataset, tmp_path):
    """Started by a script that guards nothing, which they must not execute again."""
    make_dataset()
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(parent.stdout.readline())
    os.kill(pid, signal.SIGINT)  # Ctrl-C is the parent's to decide on
    with pytest.raises(subprocess.TimeoutExpired):
        parent.wait(0.5)
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.communicate()
    assert wait_for(lambda: not psutil.pid_exists(pid), timeout_s=20)


# -- the same errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "rule", "error"),
    [
        ("raise", "sum", TrainingError("the environment Unruly-v0 failed: ZeroDivisionError: in the simulator")),
        ("leave", "sum", TrainingError("the environment Unruly-v0 failed: SystemExit: 0")),
        ("disk", "sum", TrainingError("the environment Unruly-v0 failed: OSError: [Errno 5] Input/output error")),
        ("nan", "sum", TrainingError("the environment Unruly-v0 gave an observation that is not finite")),
        ("", "subtasks", DataError("the environment Unruly-v0 reports no sub-tasks; --set data.return_rule=sum")),
        ("memory", "sum", MemoryError("no 3 GiB")),
    ],
)
def test_what_an_environment_raises_is_the_same_from_every_process(deed, rule, error, unruly):
    for processes, elsewhere in ((1, False), (2, True)):
        evaluator = Evaluator(unruly(deed, elsewhere=elsewhere), processes=processes, return_rule=rule)
        with pytest.raises(type(error)) as raised:
            evaluator.run(Watching(), num_episodes=4, seed=0)
        evaluator.close()
        assert (type(raised.value), str(raised.value)) == (type(error), str(error)), processes


def test_an_environment_that_ends_python_when_it_is_made_is_refused(unruly):
    with pytest.raises(ResourceError, match=r"cannot be made here \(SystemExit: 3\)"):
        Evaluator(unruly("leave-early"))


@pytest.mark.parametrize(
    ("deed", "error", "text"),
    [
        ("refuse", ResourceError, r"tests/refuse/elsewhere-v0 cannot be made here \(TypeError: no such maze"),
        ("kill", ResourceError, r"evaluation process 2 \(process id \d+\) was killed .* fewer --eval-processes"),
        ("exit", TrainingError, r"evaluation process 2 \(process id \d+\) has ended \(exit status 3\)"),
    ],
)
def test_what_goes_wrong_in_another_process_only_is_named(deed, error, text, unruly):
    evaluator = Evaluator(unruly(deed, elsewhere=True), processes=2)
    with pytest.raises(error, match=text):
        evaluator.run(Watching(), num_episodes=2, seed=0)
    evaluator.close()


def test_after_a_process_was_killed_another_takes_its_place(make_dataset):
    dataset_id = make_dataset()
    evaluator = Evaluator(dataset_id, processes=2)

    def kill(step):
        if step == 9:
            os.kill(evaluator._slots.workers[0].pid, signal.SIGKILL)

    with pytest.raises(ResourceError, match="evaluation process 2"):
        evaluator.run(Watching(on_act=kill), num_episodes=2, seed=3)
    returns = evaluator.run(Watching(), num_episodes=2, seed=3).tolist()
    evaluator.close()
    assert returns == roll_out(dataset_id, 1, num_episodes=2)[0]


def test_fewer_than_one_process_are_refused(make_dataset):
    with pytest.raises(ConfigError, match="at least 1 process, got 0"):
        Evaluator(make_dataset(), processes=0)
