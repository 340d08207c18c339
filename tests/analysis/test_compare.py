"""Two sets of runs: differences against SciPy's tests, their coverage, and what either side lacks."""

import json

import numpy as np
import pytest
from scipy import stats

from analysis.compare import differences, different_data, paired, unpaired
from analysis.load import load_runs
from analysis.scores import task_scores
from tests.tables import LARGE, MEDIUM, lost, report, row, write


def scores(folder, *rows):
    return task_scores(load_runs(write(folder, *rows), allow_missing=True))


def test_the_paired_interval_is_that_of_the_t_test():
    rng = np.random.default_rng(0)
    before, after = rng.normal(50, 10, 5), rng.normal(55, 10, 5)
    ours, theirs = paired(before, after), stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=1e-9), pytest.approx(theirs.high, abs=1e-9))
    assert ours.value == pytest.approx(np.mean(after) - np.mean(before), abs=1e-9)


def test_the_unpaired_interval_is_welchs():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([5.0, 9.0])
    a, b = x.var(ddof=1) / 3, y.var(ddof=1) / 2
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 1)
    half = stats.t.ppf(0.975, freedom) * (a + b) ** 0.5
    found, middle = unpaired(x, y), y.mean() - x.mean()
    assert (found.value, found.low, found.high) == pytest.approx((middle, middle - half, middle + half), abs=1e-9)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says_with_few_seeds(num_seeds):
    rng = np.random.default_rng(num_seeds)
    hits = {"paired": 0, "unpaired": 0}
    for _ in range(2000):
        shared = rng.normal(50, 20, num_seeds)
        before, after = shared + rng.normal(0, 3, num_seeds), shared + 4 + rng.normal(0, 3, num_seeds)
        hits["paired"] += (found := paired(before, after)).low <= 4 <= found.high
        hits["unpaired"] += (
            (found := unpaired(rng.normal(0, 3, num_seeds), rng.normal(4, 3, num_seeds))).low <= 4 <= found.high
        )
    assert 0.935 < hits["paired"] / 2000 < 0.965
    assert 0.935 < hits["unpaired"] / 2000 <= 1.0  # Welch's is cautious with two seeds


def test_pairs_are_of_the_same_seed(tmp_path):
    before = scores(tmp_path / "a", row(seed=0, score=10.0), row(seed=1, score=90.0), row(seed=2, score=50.0))
    after = scores(tmp_path / "b", row(seed=2, score=56.0), row(seed=0, score=15.0), row(seed=1, score=97.0))
    guided, cloned = differences(before, after)
    assert (guided.is_paired, guided.seeds, guided.difference) == (True, (0, 1, 2), pytest.approx(6.0))
    assert (guided.low, guided.high) == (
        pytest.approx(6 - 4.303 / 3**0.5, abs=1e-3),
        pytest.approx(6 + 4.303 / 3**0.5, abs=1e-3),
    )
    assert guided.verdict == "higher"
    assert cloned.verdict == "same"


def test_other_seeds_are_not_paired_and_what_is_missing_is_said(tmp_path, capsys):
    a = write(tmp_path / "a", row(seed=0, score=10.0), row(seed=1, score=20.0))
    b = write(tmp_path / "b", row(seed=5, score=30.0), row(seed=6, score=40.0))
    guided = differences(*(task_scores(load_runs(side)) for side in (a, b)))[0]
    assert (guided.is_paired, guided.difference, guided.only_before, guided.only_after) == (False, 20.0, (0, 1), (5, 6))
    assert report(a, b, "--paired") == 3
    assert f"{MEDIUM} aepo: seeds 0, 1 are in {a} alone" in capsys.readouterr().err
    assert report(a, b, "--paired", "--allow-missing", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["difference"] == 20.0


def test_a_task_on_one_side_alone_is_said(tmp_path, capsys):
    a = write(tmp_path / "a", row(seed=0), row(LARGE, 0))
    b = write(tmp_path / "b", row(seed=0))
    assert report(a, b, "--paired", "--allow-missing") == 0
    text = (a / "report" / "paired.md").read_text()
    assert f"{LARGE} aepo: no result in {b}".replace("_", "\\_") in text.replace("\\_", "_").replace("_", "\\_")
    assert "On one side alone" in text


def test_a_failed_run_of_either_side_stops_the_comparison(tmp_path, capsys):
    a, b = write(tmp_path / "a", row(seed=0), row(seed=1)), write(tmp_path / "b", row(seed=0), lost(seed=1))
    assert report(a, b, "--paired") == 3
    assert "critic/loss is nan" in capsys.readouterr().err


def test_other_data_are_refused(tmp_path, capsys):
    a, b = write(tmp_path / "a", row()), write(tmp_path / "b", row(dataset_digest="sha256:beef"))
    assert different_data(load_runs(a), load_runs(b)) == [f"{MEDIUM}: dataset_digest sha256:0f1e against sha256:beef"]
    assert report(a, b, "--paired") == 3
    assert "do not have the same data" in capsys.readouterr().err


def test_equal_input_gives_equal_bytes_and_the_mean_over_tasks(tmp_path, capsys):
    sides = [
        write(tmp_path / name, *(row(task, seed, base + seed) for task in (MEDIUM, LARGE) for seed in (0, 1)))
        for name, base in (("a", 50.0), ("b", 53.0))
    ]
    found = []
    for out in ("x", "y"):
        assert report(*sides, "--paired", "--out", tmp_path / out) == 0
        found.append([(tmp_path / out / f"paired.{kind}").read_bytes() for kind in ("md", "csv")])
    assert found[0] == found[1]
    assert "AEPO, mean over its tasks: +3.0 (3.0 to 3.0" in capsys.readouterr().out


def test_one_sweep_cannot_be_compared(tmp_path, capsys):
    assert report(write(tmp_path, row()), "--paired") == 2
    assert "compares two sweeps" in capsys.readouterr().err
