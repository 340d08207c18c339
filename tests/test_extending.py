"""The recipes of docs/extending.md, each followed to the letter from a folder of the test's own."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aepo import cli, pipeline, presets, tasks, toy
from aepo.runs import run, rundir, spool
from aepo.stages import targets
from tune.plan import run_folder, write_manifest

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
SMALL = [
    *("sarsa.steps=120", "sarsa.hidden_size=16", "clone.steps=120", "clone.hidden_size=16"),
    *("evaluation.num_episodes=2", "sarsa.batch_size=32", "clone.batch_size=32"),
]


def block(kind, begin):
    """Return the page's code block of a kind that begins like this."""
    found = [text for text in re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.S) if text.startswith(begin)]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def package(tmp_path):
    """An installed package with the page's method; returns the environment in which it is found."""
    folder = tmp_path / "site"
    metadata = folder / "onestep-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "onestep.py").write_text(block("python", "# onestep.py"))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onestep\nVersion: 1.0\n")
    points = block("toml", '[project.entry-points."aepo.methods"]').replace(
        'project.entry-points."aepo.methods"', "aepo.methods"
    )
    (metadata / "entry_points.txt").write_text(points.replace('"', ""))
    paths = [str(folder), str(PAGE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def aepo(package, *words, check=True):
    """Run a command in a process of its own."""
    argv = [sys.executable, "-m", "aepo", *words]
    done = subprocess.run(argv, env=package, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def train(package, dataset, out, *words, **kwargs):
    flags = ["--dataset", dataset, "--preset", "onestep-smoke", "--out", str(out), "--json", "--set", *SMALL]
    return aepo(package, "train", *flags, *words, **kwargs)


def test_a_method_of_another_package_trains_is_killed_and_goes_on_to_the_same_bits(package, make_dataset, tmp_path):
    dataset = make_dataset()
    whole = json.loads(train(package, dataset, tmp_path / "whole").stdout)
    assert whole["status"] == "finished"
    argv = [sys.executable, "-m", "aepo", "train", "--dataset", dataset, "--preset", "onestep-smoke"]
    argv += ["--out", str(tmp_path / "broken"), "--checkpoint-s", "0", "--set", *SMALL]
    process = subprocess.Popen(argv, env=package, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = None
    while metrics is None or "clone" not in metrics.read_text():  # the second stage has begun
        assert process.poll() is None, "it ended before it was killed"
        metrics = next((tmp_path / "broken").glob(f"**/{rundir.METRICS}"), None)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(package, dataset, tmp_path / "broken")
    first, second = (next((tmp_path / name).glob(f"**/{rundir.POLICY}")).read_bytes() for name in ("whole", "broken"))
    assert first == second


def test_a_run_whose_methods_file_has_changed_does_not_go_on(package, make_dataset, tmp_path):
    dataset, out = make_dataset(), tmp_path / "run"
    words = ["evaluation.num_episodes=100000"]  # it is stopped in its evaluation
    argv = [sys.executable, "-m", "aepo", "train", "--dataset", dataset, "--preset", "onestep-smoke", "--out", str(out)]
    process = subprocess.Popen(
        [*argv, "--set", *SMALL, *words], env=package, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("**/state.ckpt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = tmp_path / "site" / "onestep.py"
    file.write_text(file.read_text().replace("0.01 * torch.randn", "0.02 * torch.randn"))
    done = subprocess.run([*argv, "--set", *SMALL, *words], env=package, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "the file of the method onestep has changed since the checkpoint was written" in done.stderr


def test_a_method_of_another_package_has_streams_of_its_own(package):
    code = (
        "from aepo import pipeline, methods; print(methods.find('onestep').code, "
        "pipeline.stream_seed('sarsa', 0), pipeline.stream_seed('clone', 0), pipeline.stream_seed('sarsa', 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=package, capture_output=True, text=True, check=True)
    digest, *streams = done.stdout.split()
    assert len(digest) == 24
    assert len(set(streams)) == 3
    assert min(map(int, streams)) > 10_000, "none of the first five stages, whose streams are small numbers"


def test_a_method_of_another_package_is_benched(package):
    done = aepo(
        package,
        "bench",
        "--only",
        "steps",
        "--shape",
        "3x1",
        "--preset",
        "smoke",
        "--seconds",
        "0.02",
        "--transitions",
        "2000",
        "--json",
    )
    rows = {row["work"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["sarsa step, expectile"]["ratio"] is None
    assert rows["clone step"]["of_floor"] > 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_method_of_another_package_is_swept_searched_and_reported(package, make_dataset, tmp_path):
    dataset, out = make_dataset(), str(tmp_path / "sweep")
    flags = ["--dataset", dataset, "--seeds", "0", "1", "--preset", "onestep-smoke", "iql-smoke", "--out", out]
    small = [*SMALL, "critic.steps=20", "actor.steps=20"]
    aepo(package, "sweep", *flags, "--reuse-stages", "--yes", "--set", *small)
    table = json.loads(aepo(package, "report", out, "--json").stdout)
    assert {row["method"] for row in table} >= {"onestep", "iql"}
    assert "onestep" in (Path(out) / "report" / "report.md").read_text()
    space = tmp_path / "space.toml"
    space.write_text("[clone]\ninverse_temperature = [0.5, 1.0, 3.0]\n")
    found = tmp_path / "search"
    aepo(
        package,
        "search",
        "--dataset",
        dataset,
        "--preset",
        "onestep-smoke",
        "--trials",
        "3",
        "--space",
        str(space),
        "--out",
        str(found),
        "--yes",
        "--set",
        *SMALL,
    )
    assert (found / "found.toml").exists()


@pytest.fixture
def target():
    """The page's target, registered; taken away again."""
    exec(compile(block("python", "# target.py"), str(PAGE), "exec"), {})
    yield "upper"
    targets.unregister("upper")


def test_a_target_from_outside_trains_guides_and_is_compared(target, tiny_config, transitions):
    config = tiny_config(energy__target=target)
    *_, last = pipeline.train(config, transitions, device=torch.device("cpu"))
    assert (last.stage, last.step) == ("energy", 60)
    assert 0 < last.metrics["energy/loss"] < 100
    bench = toy.Bench("moons", steps=20, seed=0, betas=(1.0,))
    assert bench.compare(target)[0]["beta"] == 1.0


class Instead:
    """Files of the package, of which one has more lines."""

    def __init__(self, name, lines):
        own = Path(presets.__file__).parent.joinpath(name).read_text()
        self._name, self._text = name, own.rstrip("\n") + "\n" + lines

    def joinpath(self, *names):
        assert names == (self._name,)
        return self

    def read_text(self, encoding=None):
        return self._text


@pytest.fixture
def rows(monkeypatch):
    """The page's rows of tasks.csv and settings.csv, below their headers."""
    for module, name, begin in ((tasks, "tasks.csv", "task,suite"), (presets, "settings.csv", "suite,method")):
        header, _, lines = block("csv", begin).partition("\n")
        assert header == Path(presets.__file__).parent.joinpath(name).read_text().splitlines()[0]
        monkeypatch.setattr(module, "files", lambda _, name=name, lines=lines: Instead(name, lines))
    caches = (tasks.rows, tasks.table, presets._of_suite)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_a_task_and_a_suite_are_rows(rows, make_dataset, tmp_path, capsys):
    dataset = make_dataset(references=False)
    task = tasks.find("pendulum-random")
    assert (task.dataset, task.suite) == (dataset, "pendulum")
    assert [row.task for row in tasks.of_suite("pendulum")] == ["pendulum-random"]
    assert presets.preset("best", task, 0).sampling.guidance_scale == 2
    assert presets.preset("iql", task, 0).critic.expectile == 0.9
    assert cli.run(["data", "list", "--json"]) == 0
    assert "pendulum-random" in capsys.readouterr().out
    small = [f"{stage}.steps=20" for stage in ("behavior", "critic", "energy")]
    words = [
        "train",
        "--task",
        "pendulum-random",
        "--preset",
        "smoke",
        "--out",
        str(tmp_path),
        "--json",
        "--set",
        *small,
    ]
    assert cli.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["score"] == pytest.approx(100 * (found["return_mean"] + 1200) / (1200 - 150))


def test_a_command_is_a_class_and_a_line(make_dataset, tmp_path, monkeypatch, capsys):
    make_dataset()
    (tmp_path / "count.py").write_text(block("python", "# count.py"))
    monkeypatch.syspath_prepend(tmp_path)
    for name, entry in importlib.import_module("count").COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, entry)
    assert cli.run(["count", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"datasets": 1}


def test_a_sink_of_another_tracker_is_sent_what_is_new(make_dataset, tiny_config, tmp_path):
    names = {}
    exec(compile(block("python", "# tracker.py"), str(PAGE), "exec"), names)
    config = tiny_config(make_dataset(), method="iql")
    folder, path = run_folder(tmp_path, config), tmp_path / "sent" / "lines.jsonl"
    write_manifest(tmp_path, [config])
    run.execute(config, folder, run.FolderStore(folder), device=torch.device("cpu"))
    assert names["ship"](tmp_path, path)
    assert names["ship"](tmp_path, path)
    sent = [line for line in map(json.loads, path.read_text().splitlines()) if line["run"] == config.name]
    assert sent.pop() == {"run": config.name, "status": "FINISHED", "score": rundir.read_result(folder).score}
    assert sent == [{"run": config.name, **row} for row in spool.read_spool(folder / rundir.METRICS)[0]]
