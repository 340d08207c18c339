"""The benchmark's steps without Ray: what a plan takes, in closed form; data by name; a folder and its plan."""

import itertools
import json
from threading import Thread

import pytest

from aepo import cli, method_table, tasks
from aepo.config import with_overrides
from aepo.data import fetch as fetching
from aepo.data.fetch import address, file_name
from aepo.presets import preset
from tests.families import write_file
from tests.file_server import Server
from tune import benchmark, commands, estimate
from tune.plan import make_plan, write_manifest
from tune.spec import Execution, Resources, SweepSpec, read_sweep_file

COSTS = {"step": 1e-3, "draw": 1e-5, "bytes": 1e6, "start": 4.0, "byte": 1e-9, "act": 2e-3, "clone": 1e-3}
"""Seconds by the first word of their names, at any dimensions."""
ENVIRONMENT = {"make": 0.1, "reset": 0.01, "step": 1e-4, "limit": 1000.0}


@pytest.fixture
def measured(monkeypatch):
    """Let nothing be measured: every cost is the one above."""
    asked = []

    def once(self, key, measure):
        if key not in self.seconds and not self._given:
            asked.append(key)
            self.seconds[key] = COSTS[key.split()[0]]
        return REAL_ONCE(self, key, measure)

    monkeypatch.setattr(estimate.Costs, "_once", once)
    monkeypatch.setattr(estimate, "_environment", lambda config, row: dict(ENVIRONMENT))
    return asked


REAL_ONCE = estimate.Costs._once


def run_json(capsys, *words, status=0):
    assert cli.run(["benchmark", *words, "--json"]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# -- the plan ----------------------------------------------------------------------------------------------


def test_a_plan_without_data_knows_hours_sizes_and_what_is_missing(measured, capsys):
    found = run_json(capsys, "d4rl", "plan")
    assert (found["tasks"], found["runs"], found["missing"]) == (36, 36 * len(method_table.presets()) * 5, [])
    assert len(found["data_to_come"]) == 36
    assert set(found["estimated_sizes"]) == {
        row.task for row in tasks.rows() if row.source == "d4rl" and file_name(row) not in fetching.known_files()
    }
    known = sum(row.bytes for row in fetching.known_files().values()) / 1e9
    assert known < found["download_gb"] < known + 2
    assert found["disk_gb"] > 2 * found["download_gb"]
    assert found["gpu_hours"] == 0
    assert 0 < found["wall_hours"] < found["core_hours"]
    found = run_json(capsys, "minari", "plan")
    assert found["tasks"] == 33
    assert found["missing"] == [f"{name}-medium-replay-v2" for name in ("halfcheetah", "hopper", "walker2d")]
    assert cli.run(["benchmark", "minari", "plan", "--preset", "iql-smoke"]) == 0
    out, said = capsys.readouterr()
    assert "core_hours" in out
    assert "no minari data of halfcheetah-medium-replay-v2" in said.replace("\n", " ")


def test_a_runs_seconds_are_the_sum_of_its_parts(measured):
    costs = estimate.Costs(cpus=1, gpus=0)
    config = with_overrides(
        preset("qgpo-quick", tasks.find("kitchen-mixed-v0"), 0),
        {"evaluation.num_episodes": 60, "evaluation.num_curve_points": 3, "evaluation.num_curve_episodes": 10},
    )
    found = costs.of_run(config, "train")
    stages = config.stages
    rows = tasks.find("kitchen-mixed-v0").steps
    for name, stage in stages.items():
        drawn = min(stage.support[0], rows)
        assert found.stages[name] == pytest.approx(1e-3 * stage.steps + 1e-5 * drawn)
    assert any(stage.support[0] for stage in stages.values())
    horizon = 280
    guided, cloned = 60 * (0.01 + horizon * 1e-4), 60 * (0.01 + horizon * 1e-4)
    curve = 3 * (10 * (0.01 + horizon * 1e-4) + horizon * 2e-3)
    calls = 2 * horizon * 2e-3 + 2 * horizon * 1e-3  # 60 episodes are two batches
    along_stage_1 = 4 * (10 * (0.01 + horizon * 1e-4) + horizon * 1e-3)  # the clone's curve, and its end
    assert found.evaluation == pytest.approx(50 * 0.1 + guided + cloned + curve + along_stage_1 + calls)
    assert found.start == pytest.approx(2 * 4.0 + 1e-9 * fetching.library_bytes(tasks.find("kitchen-mixed-v0")))


def test_a_cost_between_two_dimensions_is_on_the_line(monkeypatch):
    costs = estimate.Costs(cpus=1, gpus=0)
    assert costs._between("x", (4, 2), lambda at: float(sum(at))) == 6
    assert costs._between("x", (17, 6), lambda at: 0.0) == pytest.approx(23)
    assert costs._between("x", (60, 30), lambda at: 0.0) == pytest.approx(90)


def test_shared_stages_are_counted_once_and_the_longest_run_comes_first(measured):
    plan = make_plan(SweepSpec(task=("maze2d-umaze-v1",), seeds=(0, 1), preset=("best-quick", "analytic-quick")))
    costs = estimate.run_costs(plan, estimate.Costs(cpus=1, gpus=0), "inline")
    alone = estimate.total(plan, costs, Resources(), slots=2, start_s=0.0)
    best, analytic = plan[0].stages, plan[2].stages
    alike, num_alike = 0.0, 0
    for name, stage in best.items():
        if stage != analytic[name]:
            break
        alike += stage.steps * 1e-3
        num_alike += 1
    assert alike >= plan[0].behavior.steps * 1e-3
    assert alone.saved_hours * 3600 == pytest.approx(2 * alike)
    shared = estimate.total(plan, costs, Resources(stages="x"), slots=2, start_s=0.0)
    assert (alone.core_hours - shared.core_hours) * 3600 == pytest.approx(2 * alike)
    assert alone.disk_gb == pytest.approx(4 * estimate.NUM_COPIES * 3e-3)
    assert shared.disk_gb - alone.disk_gb == pytest.approx(2 * (2 * len(best) - num_alike) * 1e-3)


@pytest.mark.parametrize("slots", [1, 2, 3, 50])
def test_wall_time_lies_between_the_bounds_of_any_schedule(measured, slots):
    spec = SweepSpec(task=("maze2d-umaze-v1", "pen-human-v1"), seeds=(0, 1), preset=("smoke", "quick", "iql-quick"))
    plan = make_plan(spec)
    costs = estimate.run_costs(plan, estimate.Costs(cpus=1, gpus=0), "inline")
    each = [cost.seconds for cost in costs.values()]
    found = estimate.total(plan, costs, Resources(), slots=slots, start_s=0.0).wall_hours * 3600
    assert max(sum(each) / slots, max(each)) <= found + 1e-9
    assert found <= sum(each) / slots + max(each) + 1e-9


def test_measurements_of_another_machine_serve_here(measured, tmp_path, capsys, monkeypatch):
    words = ["d4rl", "plan", "--preset", "best-smoke", "--seeds", "0"]
    there = run_json(capsys, *words, "--measure", str(tmp_path / "costs.json"))
    del measured[:]
    monkeypatch.setattr(estimate, "_environment", None)
    here = run_json(capsys, *words, "--cost-of", str(tmp_path / "costs.json"))
    assert here == there
    assert not measured
    given = ["--cost-of", str(tmp_path / "costs.json")]
    gpu = run_json(capsys, *words, *given, "--gpus", "0.25", "--max-concurrent", "4", "--price-per-hour", "10")
    assert gpu["gpu_hours"] > 0
    assert gpu["price"] == pytest.approx(10 * gpu["wall_hours"])
    assert cli.run(["benchmark", "d4rl", "plan", "--preset", "iql-smoke", *given]) == 2
    assert "has no 'step" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "other.json").write_text('{"seconds": 1}')
    assert cli.run(["benchmark", "d4rl", "plan", "--cost-of", str(tmp_path / "other.json")]) == 2
    assert "no file of measurements" in capsys.readouterr().err.replace("\n", " ")
    assert cli.run(["benchmark", "d4rl", "plan", "--gpus", "1"]) == 6
    assert "no GPU here to measure on" in capsys.readouterr().err.replace("\n", " ")


def test_a_sweep_names_the_tasks_that_a_source_lacks(measured, tmp_path, capsys):
    words = ["sweep", "--suite", "gym-mujoco", "--source", "minari", "--preset", "smoke", "--dry-run"]
    assert cli.run([*words, "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "no minari data of them: halfcheetah-medium-replay-v2, hopper-medium-replay-v2, walker2d" in said
    assert "6 of 6 runs to do: about" in said
    assert "core hours of start-up" in said


def test_a_real_measurement_is_positive_and_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.01)
    monkeypatch.setattr(estimate, "_start", lambda: 1.0)
    costs = estimate.Costs(cpus=1, gpus=0)
    for name in ("best-smoke", "qgpo-smoke", "iql-smoke", "td3bc-smoke"):
        found = costs.of_run(preset(name, tasks.find("maze2d-umaze-v1"), 0), "inline")
        assert found.evaluation > 0
        assert all(0 < seconds < 100 for seconds in found.stages.values())
        assert all(size > 1000 for size in found.disk_bytes.values())
    costs.save(tmp_path / "c.json")
    assert estimate.read_costs(tmp_path / "c.json") == costs.seconds


# -- data --------------------------------------------------------------------------------------------------


def test_two_tasks_go_from_the_server_to_a_verified_library(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetching, "known_files", dict)
    names = ("hopper-medium-v2", "pen-human-v1")
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name in names:
            row = tasks.find(name)
            path = write_file(tmp_path / "made.hdf5", name)
            server.files[address(row, "/d4rl")] = path.read_bytes()
        words = ["benchmark", "d4rl", "fetch", "--task", *names, "--folder", str(tmp_path / "files")]
        assert cli.run([*words, "--mirror", server.url]) == 0
        assert "next: aepo benchmark d4rl import" in capsys.readouterr().err.replace("\n", " ")
        server.shutdown()
    assert cli.run(["benchmark", "d4rl", "import", str(tmp_path / "files")]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "still to come: halfcheetah-medium-v2" in said
    found = run_json(capsys, "d4rl", "verify", "--task", *names)
    assert [(row["task"], row["problems"]) for row in found] == [(name, []) for name in names]
    assert cli.run(["benchmark", "d4rl", "verify"]) == 3
    assert "34 of 36 tasks cannot be used: halfcheetah-medium-v2: not here" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert cli.run(words) == 0  # what is in the library is not fetched again


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(monkeypatch):
    """The sweeps that would have been carried out."""
    found = []
    monkeypatch.setattr(commands.Sweep, "run", lambda self: found.append(self) or 0)
    monkeypatch.setattr(benchmark, "local_datasets", lambda: {row.dataset: {} for row in tasks.rows()})
    return found


def test_a_run_is_a_sweep_of_all_tasks_and_a_folder_keeps_its_plan(swept, tmp_path, capsys):
    chosen = ["--preset", "best-smoke", "--seeds", "0"]
    words = ["benchmark", "d4rl", "run", "--out", str(tmp_path / "b"), "--yes"]
    assert cli.run([*words, *chosen]) == 0
    (sweep,) = swept
    assert (len(sweep.spec.rows()), sweep.execution.reuse_stages, sweep.yes) == (36, True, True)
    write_manifest(tmp_path / "b", make_plan(sweep.spec))
    assert cli.run([*words, *chosen]) == 0
    assert cli.run(words) == 0
    assert swept[1] == sweep
    assert swept[2].file == tmp_path / "b" / "sweep.json"
    assert cli.run([*words, "--preset", "iql-smoke"]) == 2
    assert "has another plan, of 36 runs" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_without_data_names_the_tasks(tmp_path, capsys):
    words = ["benchmark", "d4rl", "run", "--task", "pen-human-v1", "kitchen-mixed-v0", "--preset", "smoke"]
    assert cli.run([*words, "--out", str(tmp_path)]) == 3
    said = capsys.readouterr().err.replace("\n", " ")
    assert "data of 2 tasks are not here: pen-human-v1, kitchen-mixed-v0; aepo benchmark d4rl fetch" in said


def test_a_file_is_a_benchmark_too_and_a_submitted_one_is_kept_as_a_file(swept, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark, "_aepo", lambda *words: calls.append(words) or 0)
    out = tmp_path / "b"
    words = ["--out", str(out), "--gpus", "0.25", "--preset", "best-paper", "iql-paper", "--seeds", "0", "1"]
    assert cli.run(["benchmark", "minari", "submit", *words, "--cluster", "http://c:8265", "--detach"]) == 0
    file = out / "benchmark.toml"
    assert calls == [("submit", str(file), "--address", "http://c:8265", "--detach")]
    spec, execution = read_sweep_file(file)
    assert len(make_plan(spec)) == 33 * 2 * 2
    assert execution == Execution(out=out, gpus=0.25, reuse_stages=True)
    assert cli.run(["benchmark", str(file), "run", "--yes"]) == 0
    assert swept[0].spec == spec
    assert swept[0].execution == execution
    assert cli.run(["benchmark", str(file), "run", "--seeds", "7"]) == 2
    assert "says which tasks, presets and seeds there are" in capsys.readouterr().err.replace("\n", " ")
    assert cli.run(["benchmark", "atari", "plan"]) == 2
    assert "no benchmark 'atari'; wanted d4rl, minari" in capsys.readouterr().err.replace("\n", " ")


# -- help and schedule -----------------------------------------------------------------------------------


def test_every_step_has_help_with_an_example(capsys):
    for step in ("plan", "fetch", "import", "verify", "run", "submit", "report"):
        with pytest.raises(SystemExit):
            cli.parse(benchmark.Benchmark, "aepo benchmark", ["d4rl", step, "--help"])
        assert f"aepo benchmark d4rl {step}" in capsys.readouterr().out


def test_the_longest_first_schedule_is_the_greedy_one(measured):
    """The independent answer: put each run, the longest first, on the place that is free first."""
    plan = make_plan(SweepSpec(task=("maze2d-umaze-v1",), seeds=(0, 1, 2), preset=("quick", "smoke")))
    costs = estimate.run_costs(plan, estimate.Costs(cpus=1, gpus=0), "inline")
    places = [0.0, 0.0]
    for config in itertools.chain(plan[:3], plan[3:]):  # quick ones have more work
        places[places.index(min(places))] += costs[config.name].seconds
    found = estimate.total(plan, costs, Resources(), slots=2, start_s=0.0)
    assert found.wall_hours * 3600 == pytest.approx(max(places))


def test_the_process_whose_start_is_measured_starts():
    assert estimate._start() > 0.1  # it raises where an import fails
