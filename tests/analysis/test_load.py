"""The report of a sweep: numbers against ones computed here, every hole shown, what is unsound refused."""

import csv
import dataclasses
import json
import math
import statistics
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from aepo.errors import ConfigError, DataError, IncompleteError
from analysis import figures
from analysis.aggregate import Aggregate, Interval, Profile
from analysis.curves import Curve, learning_curves
from analysis.figures import file_stem
from analysis.labels import Arm, colours
from analysis.load import SCHEMA, curves, evaluations, load_runs
from analysis.report import write_report
from analysis.scores import suite_averages, task_scores
from tests.tables import LARGE, MEDIUM, evaluation, lost, report, row, without_references, write


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_deviation_are_those_of_the_seeds(tmp_path):
    seeds = {0: 61.5, 3: 48.25, 7: 70.0}
    sweep = write(tmp_path, *(row(seed=seed, score=score) for seed, score in reversed(seeds.items())))
    guided, cloned = task_scores(load_runs(sweep))
    assert (guided.method, cloned.method) == ("aepo", "diffusion-bc")
    assert guided.score_mean == pytest.approx(statistics.mean(seeds.values()))
    assert guided.score_std == pytest.approx(statistics.stdev(seeds.values()))
    assert guided.return_mean == pytest.approx(statistics.mean(2 * score + 10 for score in seeds.values()))
    assert (guided.seeds, guided.scores) == ((0, 3, 7), (61.5, 48.25, 70.0))
    assert (guided.num_episodes, guided.num_failed) == (6, 0)
    assert (cloned.score_mean, cloned.score_std) == (20.0, 0.0)


def of_method(method, seed, score, *, task=MEDIUM, cloned=None):
    own = evaluation(method, score, 2 * score + 10, beta=None, guidance_scale=None)
    side = [] if cloned is None else [evaluation("diffusion-bc", cloned, 2 * cloned + 10)]
    return row(task, seed, score, run=f"{task}-{method}-{seed}", method=method, evaluations=[own, *side])


def test_every_method_is_a_column_and_cloning_counts_once(tmp_path):
    rows = [
        row(seed=0, score=60.0, cloned=20.0),
        row(seed=1, score=40.0, cloned=10.0),
        of_method("qgpo", 0, 55.0, cloned=21.0),  # the same clone, measured again by another run
        of_method("qgpo", 1, 45.0, cloned=11.0),
        of_method("qgpo", 2, 35.0, cloned=12.0),  # a seed that AEPO does not have
        of_method("iql", 0, 30.0),
        lost(seed=1, method="iql", run="lost-iql"),
        of_method("iql", 0, 99.0, task=LARGE),
    ]
    scores = task_scores(load_runs(write(tmp_path, *rows)))
    table = {(score.task, score.method): (score.scores, score.seeds, score.num_failed) for score in scores}
    assert list(table) == [
        (task, method) for task in (LARGE, MEDIUM) for method in ("aepo", "qgpo", "iql", "diffusion-bc")
    ]
    assert table[MEDIUM, "aepo"] == ((60.0, 40.0), (0, 1), 1), "seed 2 is in the table, but not of AEPO"
    assert table[MEDIUM, "qgpo"] == ((55.0, 45.0, 35.0), (0, 1, 2), 0)
    assert table[MEDIUM, "iql"] == ((30.0,), (0,), 2)
    assert table[MEDIUM, "diffusion-bc"] == ((20.0, 10.0, 12.0), (0, 1, 2), 0)
    assert table[LARGE, "iql"] == ((99.0,), (0,), 2)
    assert table[LARGE, "aepo"] == ((), (), 3), "a method of the table without a run on a task is a hole there"


def test_suite_average_weighs_every_task_equally(tmp_path):
    medium = [row(MEDIUM, seed, score) for seed, score in enumerate((10.0, 20.0, 30.0))]
    large = [row(LARGE, seed, score) for seed, score in enumerate((70.0, 80.0, 90.0))]
    guided, cloned, *whole = suite_averages(task_scores(load_runs(write(tmp_path, *medium, *large))))
    assert (guided.suite, guided.score_mean, guided.total, guided.hole) == ("maze2d", 50.0, 100.0, "")
    assert guided.score_stderr == pytest.approx((100 / 3 + 100 / 3) ** 0.5 / 2)  # of (x + y) / 2
    assert cloned.score_mean == 20.0
    assert [(average.suite, average.score_mean) for average in whole] == [("", 50.0), ("", 20.0)]


def test_command_prints_one_object_per_task_and_method(tmp_path, capsys):
    large = [row(LARGE, seed, score=80.0 + seed) for seed in (0, 1)]
    sweep = write(tmp_path / "s", row(seed=0, score=60.0), row(seed=1, score=50.0), *large)
    assert report(sweep, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(entry["task"], entry["method"]) for entry in printed] == [
        (LARGE, "aepo"),
        (LARGE, "diffusion-bc"),
        (MEDIUM, "aepo"),
        (MEDIUM, "diffusion-bc"),
    ]
    assert printed[2] == {
        "task": MEDIUM,
        "suite": "maze2d",
        "method": "aepo",
        "score_mean": 55.0,
        "score_std": pytest.approx(50**0.5),
        "score_stderr": pytest.approx(5.0),
        "scores": [60.0, 50.0],
        "best_scores": [60.0, 50.0],
        "best_mean": 55.0,
        "best_stderr": pytest.approx(5.0),
        "returns": [130.0, 110.0],
        "return_mean": 120.0,
        "return_std": pytest.approx(200**0.5),
        "return_stderr": pytest.approx(10.0),
        "seeds": [0, 1],
        "num_episodes": 4,
        "num_failed": 0,
    }


def test_one_seed_has_neither_deviation_nor_error(tmp_path):
    guided, _ = task_scores(load_runs(write(tmp_path, row())))
    assert all(map(math.isnan, (guided.score_std, guided.score_stderr, guided.best_stderr)))


def test_best_is_the_highest_evaluation_of_each_run_and_called_so(tmp_path):
    def points(*scores):
        return [
            {"stage": "energy", "step": 100 * i, "score": s, "return_mean": 2 * s + 10} for i, s in enumerate(scores)
        ]

    sweep = write(
        tmp_path / "s",
        row(seed=0, score=60.0, curve=points(10.0, 90.0, 60.0)),
        row(seed=1, score=50.0, curve=points(20.0, 30.0)),  # the last evaluation is the highest
    )
    guided, cloned = task_scores(load_runs(sweep))
    assert (guided.best_scores, guided.best_mean, guided.best_stderr) == ((90.0, 50.0), 70.0, 20.0)
    assert cloned.best_scores == ()
    assert report(sweep) == 0
    text = (sweep / "report" / "report.md").read_text()
    final, best = text.partition("## Best on the way")[::2]
    assert "55.0 ± 5.0 (2)" in final
    assert "70.0 ± 20.0 (2)" in best
    assert "picked on the returns" in best
    without = write(tmp_path / "w", row(seed=0, curve=[]), row(seed=1))
    assert task_scores(load_runs(without))[0].best_scores == ()


def test_command_prints_the_table_and_writes_the_report_into_the_first_sweep(tmp_path, capsys):
    first = write(tmp_path / "first", row(seed=0, score=60.0), row(seed=1, score=50.0))
    second = write(tmp_path / "second", row(LARGE, 0, score=80.0), row(LARGE, 1, score=82.0))
    assert report(first, second) == 0
    printed = capsys.readouterr()
    assert "55.0 ± 5.0 (2)" in printed.out
    assert "81.0 ± 1.0 (2)" in printed.out
    assert str(first / "report" / "report.md") in printed.err
    assert not (second / "report").exists()
    text = (first / "report" / "report.md").read_text()
    for claim in ("Seeds: 0, 1", "2 episodes", "3,000 per run", "c3a614e", "collected", "sha256:0f1e", "210"):
        assert claim in text
    lines = [cells(line) for line in text.splitlines() if line.startswith("| maze2d")]
    assert lines[:3] == [
        ["maze2d", "maze2d-large", "**81.0 ± 1.0 (2)**", "20.0 ± 0.0 (2)", "2"],
        ["maze2d", "maze2d-medium", "**55.0 ± 5.0 (2)**", "20.0 ± 0.0 (2)", "2"],
        ["maze2d", "average of 2", "**68.0 ± 2.5**", "20.0 ± 0.0", ""],
    ]
    assert ["maze2d", "total of 2", "136.0", "40.0", ""] in lines
    assert "Runs without a result" not in text
    for name in ("maze2d", "intervals", "profiles"):
        assert f"(figures/{name}.png)" in text
        assert (first / "report" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (first / "report" / "figures" / f"{name}.svg").read_text().startswith("<?xml")


def test_scores_csv_has_the_exact_numbers(tmp_path):
    sweep = write(tmp_path / "s", row(seed=0, score=60.1), row(seed=1, score=50.0))
    write_report([sweep], tmp_path / "out", allow_missing=False)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        guided, cloned = csv.DictReader(file)
    assert [float(score) for score in guided["scores"].split()] == [60.1, 50.0]
    assert float(guided["score_mean"]) == statistics.mean([60.1, 50.0])
    assert (cloned["method"], cloned["seeds"], cloned["num_failed"]) == ("diffusion-bc", "0 1", "0")


def test_incomplete_sweep_exits_3_names_each_run_and_writes_nothing(tmp_path, capsys):
    sweep = write(tmp_path / "s", row(seed=0), lost(seed=1), lost(LARGE, 0, "missing", None))
    assert report(sweep) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (
        f"failed: {MEDIUM} aepo seed 1 ({MEDIUM}-s1-0123456789ab): "
        "TrainingError: critic/loss is nan at step 7" in printed.err
    )
    assert f"missing: {LARGE} aepo seed 0" in printed.err
    assert "--allow-missing" in printed.err
    assert not (sweep / "report").exists()


def test_failed_run_is_shown_and_never_averaged_over(tmp_path, capsys):
    sweep = write(
        tmp_path / "s",
        row(seed=0, score=60.0),
        lost(seed=1, evaluations=[evaluation("aepo", 1000.0, 2010.0)], score=1000.0),  # died after evaluating
        row(LARGE, 0, score=80.0),
        row(LARGE, 1, score=80.0),
    )
    assert report(sweep, "--allow-missing", "--json") == 0
    printed = capsys.readouterr()
    guided = next(entry for entry in json.loads(printed.out) if (entry["task"], entry["method"]) == (MEDIUM, "aepo"))
    assert (guided["score_mean"], guided["scores"], guided["seeds"]) == (60.0, [60.0], [0])
    assert (guided["num_failed"], guided["num_episodes"]) == (1, 2)
    assert "critic/loss is nan" in printed.err
    text = (sweep / "report" / "report.md").read_text()
    assert r"| maze2d | maze2d-medium | 60.0 ± - (1)\* | 20.0 ± - (1)\* | 1 of 2 failed |" in text  # and not bold
    assert "| maze2d | average of 2 |  |  |  |" in text  # no average over the tasks that went well
    assert "maze2d has no average; not complete: maze2d-medium" in text
    assert "critic/loss is nan at step 7" in text


def test_task_of_which_nothing_finished_is_a_row_of_holes(tmp_path, capsys):
    sweep = write(tmp_path / "s", lost(seed=0), lost(seed=1, status="missing", error=None), row(LARGE, 0))
    assert report(sweep, "--allow-missing") == 0
    assert "1 of 2 failed, 1 of 2 missing" in (sweep / "report" / "report.md").read_text()
    guided = task_scores(load_runs(sweep))[2]
    assert (guided.task, guided.scores, guided.num_failed) == (MEDIUM, (), 2)
    assert guided.score_mean != guided.score_mean  # NaN


def test_sweep_in_which_nothing_finished_can_be_reported(tmp_path):
    sweep = write(tmp_path / "s", lost(seed=0), lost(seed=1, evaluations=None, curve=None))
    result = write_report([sweep], tmp_path / "out", allow_missing=True)
    assert [score.method for score in result.scores] == ["aepo"]
    assert "No evaluation was recorded for: maze2d-medium" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(IncompleteError, match="2 of 2 planned runs"):
        write_report([sweep], tmp_path / "out", allow_missing=False)


def test_method_that_lacks_a_run_is_marked(tmp_path):
    sweep = write(tmp_path / "s", row(seed=0), row(seed=1, evaluations=[evaluation("aepo", 60.0, 130.0)]))
    result = write_report([sweep], tmp_path / "out", allow_missing=False)
    assert [score.num_failed for score in result.scores] == [0, 1]
    cell = result.table.rows[0].cells["diffusion-bc"]
    assert (cell.text, cell.marks, cell.is_best) == ("20.0 ± - (1)", ("*",), False)
    assert "not every run was evaluated" in result.table.notes[0][1]


def test_without_references_the_return_stands_in_and_says_so(tmp_path, capsys):
    sweep = write(tmp_path / "s", without_references(0, 1500.0), without_references(1, 1600.0))
    assert report(sweep) == 0
    printed = capsys.readouterr().out
    assert "1550.0 ± 50.0 (2)†" in printed
    assert "no reference scores" in printed
    assert report(sweep, "--json") == 0
    guided = json.loads(capsys.readouterr().out)[0]
    assert (guided["score_mean"], guided["scores"], guided["return_mean"]) == (None, [None, None], 1550.0)
    text = (sweep / "report" / "report.md").read_text()
    assert "user has no average; no reference scores: own/task-v0" in text
    assert "(figures/user.png)" in text


def test_equal_input_in_any_order_gives_equal_bytes(tmp_path):
    rows = [row(seed=0), row(seed=1, score=40.0), lost(seed=2), row(LARGE, 0), without_references(0, 7.0)]
    outs = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        out = tmp_path / name / "out"
        write_report([write(tmp_path / name, *order)], out, allow_missing=True)
        outs.append({str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.*")})
    assert sorted(outs[0]) == [
        *(f"figures/{name}.{kind}" for name in ("maze2d", "user") for kind in ("png", "svg")),
        "report.html",
        "report.md",
        "report.tex",
        "scores.csv",
    ]
    assert outs[0] == outs[1]


def test_holes_stay_holes_and_a_step_written_twice_counts_once(tmp_path):
    curve = [
        {"stage": "energy", "step": step, "score": score, "return_mean": 1.0}
        for step, score in ((500, 1.0), (1000, None), (500, 2.0))
    ]
    runs = load_runs(write(tmp_path, row(seed=0, curve=curve), lost(seed=1)))
    assert list(runs["score"].isna()) == [False, True]
    assert list(evaluations(runs)["method"]) == ["aepo", "diffusion-bc"]
    points = curves(runs)
    assert list(points["step"]) == [1000, 500]
    assert points["score"].isna().to_list() == [True, False]
    assert points["score"].to_list()[1] == 2.0


def test_table_with_columns_of_nulls_and_other_widths_is_read(tmp_path):
    table = pa.Table.from_pylist([lost(seed=0) | {"later_column": 1}])  # types as Arrow infers them
    pq.write_table(table, tmp_path / "runs.parquet")
    assert load_runs(tmp_path / "runs.parquet")["status"].to_list() == ["failed"]


def test_several_tasks_are_told_together_and_one_is_not(tmp_path, capsys):
    rows = [row(task, seed=seed, score=60.0 + seed) for task in ("a", "b") for seed in (0, 1)]
    sweep = write(tmp_path / "sweep", *rows)
    assert report(sweep) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "## Over all tasks" in text
    line = next(line for line in text.splitlines() if line.startswith("| AEPO | 2 |"))
    assert line.startswith("| AEPO | 2 | 60.5 (60.0 to 61.0) | 60.5 (60.0 to 61.0) |")
    assert "| diffusion BC | 2 | 20.0 (20.0 to 20.0) |" in text
    assert "1.00 (1.00 to 1.00)" in text
    assert "Over all tasks" in capsys.readouterr().out
    one = write(tmp_path / "one", row("a"))
    assert report(one) == 0
    assert "Over all tasks" not in (one / "report" / "report.md").read_text()
    holes = write(tmp_path / "holes", row("a"), row("b"), lost("b", seed=1))
    assert report(holes, "--allow-missing") == 0
    assert "| AEPO | 2 |" not in (holes / "report" / "report.md").read_text()


def test_a_table_over_several_sources_says_so(tmp_path, capsys):
    sweep = write(tmp_path / "sweep", row("a", env_id="Maze-v3"), row("b", source="d4rl"))
    assert report(sweep) == 0
    text = (sweep / "report" / "report.md").read_text()
    assert "Data of different sources, whose scores are not comparable: collected: a; d4rl: b" in text
    assert "| Maze-v3 |" in text
    capsys.readouterr()
    one = write(tmp_path / "one", row("a"), row("b"))
    assert report(one) == 0
    assert "different sources" not in (one / "report" / "report.md").read_text() + capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row()], "stands twice"),
        ([row(), row(run="other", fingerprint="other")], "two runs of aepo with seed 0"),
        ([row(schema_version=1)], "schema version 1, wanted 2"),
        ([row(status="running")], "status 'running'"),
        ([row(), row(seed=1, source="user")], "differ in source: collected .* user"),
        ([row(), row(seed=1, dataset_digest="sha256:beef")], "differ in dataset_digest"),
        ([row(), row(seed=1, ref_max=500.0)], "differ in ref_max"),
        ([row(), row(seed=1, preset="paper")], "differ in preset"),
        (
            [row(), row(seed=1, evaluations=[evaluation("aepo", 60.0, 130.0, beta=1.0)])],
            f"{MEDIUM} aepo differ in beta: 3.0 .* 1.0",
        ),
        ([row(score=float("nan"))], "no finite number"),
        ([row(cloned=float("inf"))], "evaluation of diffusion-bc has no finite number"),
        ([row(evaluations=[evaluation("aepo", None, 130.0)])], "no finite number"),
        ([row(evaluations=[evaluation("aepo", 60.0, None)])], "no finite number"),
        ([row(evaluations=[evaluation("diffusion-bc", 20.0, 50.0)])], "without an evaluation of aepo"),
        ([row(evaluations=[evaluation("aepo", 60.0, 130.0)] * 2)], "two evaluations of aepo"),
        ([row() | {"score": 61.0}], "score 61.0, but its evaluation of aepo says 60.0"),
        ([row() | {"score": None}], "has score nan, but"),
        ([], "no runs in"),
    ],
)
def test_unsound_runs_are_refused_by_name(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_runs(write(tmp_path, *rows))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_finished_run_without_a_number_can_be_taken_as_a_hole_that_is_named(tmp_path, capsys, number):
    sweep = write(tmp_path, row(seed=0, score=60.0), row(seed=1, score=number))
    assert report(sweep) == 3
    assert "no finite number" in capsys.readouterr().err
    assert report(sweep, "--allow-missing", "--json") == 0
    printed = capsys.readouterr()
    guided = json.loads(printed.out)[0]
    assert (guided["scores"], guided["num_failed"]) == ([60.0], 1)
    assert "evaluation of aepo has no finite number" in printed.err


def test_a_seed_without_a_row_is_a_hole_that_is_named(tmp_path, capsys):
    rows = [row(task, seed) for task in (MEDIUM, LARGE) for seed in (0, 1, 2)]
    sweep = write(tmp_path, *rows[:-1])
    assert report(sweep) == 3
    assert f"missing: {LARGE} aepo seed 2" in capsys.readouterr().err
    assert report(sweep, "--allow-missing") == 0
    assert r"60.0 ± 0.0 (2)\*" in (sweep / "report" / "report.md").read_text()


def test_every_fault_is_named_not_the_first_alone(tmp_path):
    with pytest.raises(DataError) as error:
        load_runs(write(tmp_path, *(row(seed=seed, score=float("nan")) for seed in range(3))))
    assert all(f"{MEDIUM}-s{seed}-" in str(error.value) for seed in range(3))


def test_the_same_sweep_twice_is_refused(tmp_path, capsys):
    sweep = write(tmp_path, row())
    assert report(sweep, sweep / "runs.parquet") == 3
    assert "stands twice" in capsys.readouterr().err


def test_table_of_another_form_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="no runs at "):
        load_runs(tmp_path)
    (tmp_path / "runs.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match="not a readable Parquet table"):
        load_runs(tmp_path)
    without = SCHEMA.remove(SCHEMA.get_field_index("score"))
    with pytest.raises(DataError, match="lacks score"):
        load_runs(write(tmp_path, row(), schema=without))
    texts = SCHEMA.set(SCHEMA.get_field_index("seed"), pa.field("seed", pa.string()))
    with pytest.raises(DataError, match="does not follow schema 2"):
        load_runs(write(tmp_path, row() | {"seed": "zero"}, schema=texts))
    null = SCHEMA.set(SCHEMA.get_field_index("task"), pa.field("task", pa.string()))
    with pytest.raises(DataError, match="does not follow schema 2"):
        load_runs(write(tmp_path, row() | {"task": None}, schema=null))


def test_wrong_command_lines_exit_2(tmp_path, capsys):
    assert report() == 2
    assert "no sweep given" in capsys.readouterr().err
    sweep = write(tmp_path, row())
    assert report(sweep, "--out", sweep / "runs.parquet") == 2
    assert "cannot be a folder" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        write_report([sweep], sweep / "runs.parquet" / "below", allow_missing=False)


def test_file_names_are_safe_and_different():
    assert file_stem("hopper-medium-v2") == "hopper-medium-v2"
    names = [file_stem(task) for task in ("a/b", "a-b", "a b", "../../etc/passwd", "..", "ü")]
    assert len(set(names)) == len(names)
    assert all("/" not in name and not name.startswith((".", "-.")) for name in names)


def test_the_help_loads_neither_pandas_nor_matplotlib():
    script = (
        "import sys, aepo.cli, analysis.report\n"
        "print([name for name in ('pandas', 'matplotlib', 'torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def curve(**scores):
    return [
        {"stage": "energy", "step": int(step[1:]), "score": score, "return_mean": score}
        for step, score in scores.items()
    ]


def test_figure_shows_the_mean_where_all_finished_seeds_were_measured(tmp_path):
    runs = load_runs(
        write(
            tmp_path,
            row(seed=0, cloned=20.0, curve=curve(_100=10.0, _200=30.0, _300=50.0)),
            row(seed=1, cloned=22.0, curve=curve(_100=20.0, _200=None, _300=70.0)),
            lost(seed=2, curve=curve(_100=-90.0)),
        )
    )
    guided, cloned = learning_curves(runs)
    assert (guided.steps.tolist(), guided.mean.tolist(), guided.stderr.tolist()) == ([100, 300], [15, 60], [5, 10])
    assert {seed: values.tolist() for seed, (_, values) in guided.lost.items()} == {2: [-90.0]}
    assert {seed: steps.tolist() for seed, (steps, _) in guided.runs.items()} == {0: [100, 200, 300], 1: [100, 300]}
    assert (cloned.is_level, cloned.mean.tolist(), cloned.stderr.tolist()) == (True, [21.0], [1.0])
    axes = Figure().add_subplot()
    figures._draw(axes, MEDIUM, [guided, cloned], colours([guided.arm, cloned.arm]))
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["AEPO"] == [[100, 15], [300, 60]]
    assert [y for _, y in lines["diffusion BC, at the end"]] == [21, 21]
    assert lines["AEPO, run without a result"] == [[100, -90]]
    assert axes.get_ylabel() == "normalized score"


def cloned_curve(**scores):
    return [{**point, "stage": "behavior", "method": "diffusion-bc"} for point in curve(**scores)]


def test_the_clones_points_are_its_own_dashed_curve_and_not_the_methods(tmp_path):
    points = [[*cloned_curve(_50=90.0 + seed, _100=95.0), *curve(_200=10.0, _3000=60.0)] for seed in (0, 2)]
    both = [row(seed=seed, cloned=20.0 + 2 * seed, curve=points[seed]) for seed in (0, 1)]
    runs = load_runs(write(tmp_path, *both))
    guided, cloned = learning_curves(runs)
    assert (guided.is_other, guided.steps.tolist(), guided.mean.tolist()) == (False, [200, 3000], [10, 60])
    assert (cloned.arm.label, cloned.is_other, cloned.is_level) == ("diffusion BC", True, False)
    assert (cloned.steps.tolist(), cloned.mean.tolist()) == ([50, 100, 3000], [91, 95, 21])
    assert [score.best_mean for score in task_scores(runs) if score.method == "aepo"] == [60.0]
    axes = Figure().add_subplot()
    figures._draw(axes, MEDIUM, [guided, cloned], colours([guided.arm, cloned.arm]))
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["diffusion BC"].get_xydata().tolist() == [[50, 91], [100, 95], [3000, 21]]
    assert (lines["diffusion BC"].get_linestyle(), lines["AEPO"].get_linestyle()) == ("--", "-")


@pytest.mark.parametrize("points", [curve(_7=1.0), curve(_7=None), curve(_7=None, _8=2.0)])
@pytest.mark.parametrize("make", [row, lost])
def test_figure_of_few_points_is_drawn_without_a_warning(tmp_path, points, make):
    runs = load_runs(write(tmp_path, make(seed=1, curve=points)))
    found = learning_curves(runs)
    stems = figures.draw_curves({"maze2d": [MEDIUM]}, found, colours(curve.arm for curve in found), tmp_path)
    assert stems == ({"maze2d": "maze2d"} if any(point["score"] is not None for point in points) else stems)


def test_a_method_has_the_same_colour_whatever_stands_beside_it():
    few, many = (colours(map(Arm, names)) for names in (("aepo", "zeta"), ("zeta", "iql", "aepo")))
    assert all(many[arm] == colour for arm, colour in few.items())
    assert len(set(many.values())) == len(many) == 3


def test_the_legend_of_a_single_panel_is_not_cut_off(tmp_path):
    steps, values = np.array([1, 2]), np.array([1.0, 2.0])
    curve = Curve(
        task="a-task",
        arm=Arm("aepo"),
        is_return=False,
        steps=steps,
        mean=values,
        stderr=values,
        runs={},
        lost={0: (steps, values)},
    )
    methods = list(map(Arm, ("aepo", "aepo-analytic", "qgpo", "iql", "td3bc")))
    curves = [dataclasses.replace(curve, arm=arm) for arm in methods]
    stem = figures.draw_curves({"suite": ["a-task"]}, curves, colours(methods), tmp_path)["suite"]
    ink = image.imread(tmp_path / f"{stem}.png")[..., :3].min(axis=2) < 0.9
    assert ink.any()
    assert not ink[:, [0, -1]].any(), "nothing touches the sides"
    assert not ink[[0, -1]].any()


def test_an_interval_at_the_end_of_its_axis_is_seen_whole(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, *_: drawn.append(figure))
    low, high = Interval(value=10.0, low=10.0, high=14.0), Interval(value=92.0, low=91.0, high=92.0)
    names = ("iqm", "median", "mean", "optimality_gap")
    found = [
        Aggregate(arm=Arm(name), num_tasks=2, improvement=None, **dict.fromkeys(names, interval))
        for name, interval in (("aepo", high), ("iql", low))
    ]
    flat = np.array([0.0, 1.0])
    profiles = {Arm("aepo"): Profile(levels=flat, value=flat, low=flat, high=flat)}
    figures.draw_aggregates(found, profiles, colours(row.arm for row in found), tmp_path)
    for axes in drawn[0].axes:
        left, right = axes.get_xlim()
        assert left < 9.5
        assert right > 92.5


@pytest.mark.parametrize("text", ["x", "[1]", "", "[" * 100_000])
def test_settings_that_are_no_object_are_refused(text, tmp_path):
    rows = [row(seed=seed) | {"settings": settings} for seed, settings in ((0, text), (1, "{}"))]
    with pytest.raises(DataError, match=r"has settings .* in the table, wanted a JSON object"):
        load_runs(write(tmp_path, *rows, schema=SCHEMA))
