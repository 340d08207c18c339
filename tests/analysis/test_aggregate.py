"""Aggregates over tasks against independent sums, and against brute force."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis import aggregate as agg
from analysis.scores import Score


def matrix(num_tasks=6, num_seeds=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(60 + 10 * task, 20, num_seeds) for task in range(num_tasks)]


def score(task, method, values, *, num_failed=0):
    return Score(
        task=task, suite="s", method=method, score_mean=float(np.mean(values)), score_std=1.0, scores=tuple(values),
        score_stderr=1.0, returns=tuple(values), return_stderr=1.0, best_scores=(), best_mean=1.0, best_stderr=1.0,
        return_mean=1.0, return_std=1.0, seeds=tuple(range(len(values))), num_episodes=1, num_failed=num_failed,
    )  # fmt: skip


@given(st.lists(st.lists(st.floats(-50, 200), min_size=4, max_size=4), min_size=1, max_size=6))
def test_point_values_are_those_of_plain_sums(rows):
    samples = [np.array(row) for row in rows]
    pooled = sorted(itertools.chain(*rows))
    cut = int(0.25 * len(pooled))
    assert float(agg.iqm(*samples)) == pytest.approx(sum(pooled[cut : len(pooled) - cut]) / (len(pooled) - 2 * cut))
    means = sorted(sum(row) / len(row) for row in rows)
    middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
    assert float(agg.median(*samples)) == pytest.approx(middle, abs=1e-9)
    assert float(agg.mean(*samples)) == pytest.approx(sum(means) / len(means), abs=1e-9)
    lacking = [100 - min(value, 100.0) for value in pooled]
    assert float(agg.optimality_gap(*samples)) == pytest.approx(sum(lacking) / len(lacking), abs=1e-9)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_improvement_is_mann_and_whitneys_u(x, y):
    x, y = np.array(x, float), np.array(y, float)
    u = stats.mannwhitneyu(x, y, method="asymptotic").statistic
    assert float(agg.improvement(x, y)) == pytest.approx(u / (len(x) * len(y)))
    assert float(agg.improvement(x, y) + agg.improvement(y, x)) == pytest.approx(1.0)


def test_improvement_is_averaged_over_tasks():
    samples = [np.array([1.0]), np.array([0.0]), np.array([0.0]), np.array([1.0])]
    assert float(agg.improvement(*samples)) == 0.5


@pytest.mark.parametrize("statistic", [agg.iqm, agg.median, agg.mean, agg.optimality_gap])
def test_intervals_are_those_of_a_plain_stratified_bootstrap(statistic):
    samples = matrix()
    ours = agg.interval(statistic, samples)
    rng = np.random.default_rng(123)
    draws = [statistic(*(rng.choice(sample, len(sample)) for sample in samples)) for _ in range(4000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    width = high - low
    assert ours.value == pytest.approx(float(statistic(*samples)))
    assert ours.low == pytest.approx(low, abs=0.1 * width)
    assert ours.high == pytest.approx(high, abs=0.1 * width)
    assert ours == agg.interval(statistic, samples)  # the same numbers again


def brute_iqm(scores):
    """Of the sorted scores, the mean without floor(n / 4) at each end (Agarwal et al. 2021, section 4.3)."""
    ordered = sorted(scores)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return math.fsum(kept) / len(kept)


def brute_improvement(x, y):
    """Mean over tasks of P(X > Y) + P(X = Y) / 2, pair by pair (their equation 2)."""
    tasks = [
        math.fsum((a > b) + (a == b) / 2 for a, b in itertools.product(one, other)) / (len(one) * len(other))
        for one, other in zip(x, y, strict=True)
    ]
    return math.fsum(tasks) / len(tasks)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10_000), st.booleans())
def test_point_values_agree_with_brute_force_to_1e_9(num_tasks, num_seeds, seed, ties):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, num_seeds + 1, num_tasks)  # as many seeds as each task happens to have
    x, y = ([rng.normal(50, 60, count).round(0 if ties else 9) for count in counts] for _ in range(2))
    assert float(agg.iqm(*x)) == pytest.approx(brute_iqm(itertools.chain(*x)), abs=1e-9)
    assert float(agg.improvement(*x, *y)) == pytest.approx(brute_improvement(x, y), abs=1e-9)
    means = [math.fsum(task) / len(task) for task in x]
    assert float(agg.median(*x)) == pytest.approx(statistics.median(means), abs=1e-9)
    assert float(agg.mean(*x)) == pytest.approx(math.fsum(means) / len(means), abs=1e-9)
    gaps = [math.fsum(max(0.0, 100 - value) for value in task) / len(task) for task in x]
    assert float(agg.optimality_gap(*x)) == pytest.approx(math.fsum(gaps) / len(gaps), abs=1e-9)
    level = np.array([0.0, 50.0, 100.0])
    shares = [math.fsum(math.fsum(v > at for v in task) / len(task) for task in x) / len(x) for at in level]
    assert agg.profile(x, level).value == pytest.approx(shares, abs=1e-9)


def test_the_interval_of_improvement_is_that_of_a_plain_stratified_bootstrap():
    x, y = matrix(4, 6, 1), [sample + 8 for sample in matrix(4, 6, 2)]
    rng = np.random.default_rng(9)
    draws = [brute_improvement(*([rng.choice(t, len(t)) for t in side] for side in (x, y))) for _ in range(2000)]
    found = agg.interval(agg.improvement, [*x, *y])
    assert (found.low, found.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.03)


def test_the_band_of_a_profile_is_that_of_a_plain_stratified_bootstrap():
    samples, levels = matrix(5, 6), np.array([40.0, 60.0, 80.0])
    rng = np.random.default_rng(3)
    draws = []
    for _ in range(3000):
        drawn = [rng.choice(sample, len(sample)) for sample in samples]
        draws.append(np.mean([[np.mean(task > level) for level in levels] for task in drawn], axis=0))
    found = agg.profile(samples, levels)
    assert found.low == pytest.approx(np.percentile(draws, 2.5, axis=0), abs=0.035)
    assert found.high == pytest.approx(np.percentile(draws, 97.5, axis=0), abs=0.035)
    assert np.isnan(agg.profile([np.array([1.0])], levels).low).all()


@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_and_never_averaged_over(hole):
    samples = [np.array([1.0, hole, 3.0]), np.array([2.0])]
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        agg.interval(agg.iqm, samples)
    with pytest.raises(ValueError, match="1 of 4"):
        agg.profile(samples, np.array([0.0]))
    with pytest.raises(ValueError, match="one task or more"):
        agg.interval(agg.iqm, [])
    with pytest.raises(ValueError, match="at least one seed"):
        agg.interval(agg.iqm, [np.array([])])


def test_an_interval_of_the_iqm_covers_the_truth_about_as_often_as_it_says():
    truth = brute_iqm(np.random.default_rng(5).normal(0, 1, 400_001) * 10 + 50)  # symmetric: 50
    rng = np.random.default_rng(1)
    found = [agg.interval(agg.iqm, [rng.normal(50, 10, 15) for _ in range(5)]) for _ in range(100)]
    assert 85 <= sum(each.low <= truth <= each.high for each in found) <= 100


def test_an_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        found = agg.interval(agg.mean, [rng.normal(50, 10, 20) for _ in range(4)])
        hits += found.low <= 50 <= found.high
    assert 85 <= hits <= 100


def test_one_seed_has_no_interval():
    found = agg.interval(agg.iqm, [np.array([1.0]), np.array([2.0])])
    assert found.value == 1.5
    assert math.isnan(found.low)


def test_a_method_with_a_hole_has_no_aggregate_and_the_first_is_compared():
    scores = [
        score(task, method, values, num_failed=int((task, method) == ("b", "iql")))
        for task, base in (("a", 50.0), ("b", 70.0))
        for method, values in (
            ("aepo", [base, base + 2]),
            ("qgpo", [base - 9, base - 5]),
            ("iql", [base, base]),
        )
    ]
    rows = agg.aggregate(scores)
    assert [(row.arm.method, row.num_tasks) for row in rows] == [("aepo", 2), ("qgpo", 2)]
    assert rows[0].improvement is None
    assert rows[1].improvement.value == 1.0
    assert rows[0].mean.value == pytest.approx(61.0)
    assert agg.aggregate([]) == []
