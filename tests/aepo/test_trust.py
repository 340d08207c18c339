"""What speaks against a run: the bounds, the paired gain against a formula, and that every output says the same."""

import dataclasses
import json
import math

import numpy as np
import pytest

from aepo import trust
from aepo.results import Diagnostic, Evaluation, Result


def evaluation(returns, scale, score=None):
    return Evaluation(
        method="m" if scale else "diffusion-bc",
        beta=1.0,
        guidance_scale=scale,
        score=score,
        return_mean=float(np.mean(returns)),
        return_std=0.0,
        num_episodes=len(returns),
        episode_returns=tuple(returns),
    )


def values(rows=(), evaluations=(), points=None):
    found = trust.diagnose([{"metrics": row} for row in rows], evaluations, points)
    return {each.name: each.value for each in found}


def doubts(**named):
    return trust.doubts([Diagnostic(name=name.replace("__", "/"), value=value) for name, value in named.items()])


@pytest.mark.parametrize("bound", trust.BOUNDS, ids=lambda bound: bound.name)
def test_a_value_is_doubted_beyond_its_bound_alone(bound):
    beyond = 1.0 if bound.is_upper else -1.0
    for value, count in ((bound.limit, 0), (bound.limit - beyond, 0), (bound.limit + beyond, 1)):
        found = trust.doubts([Diagnostic(name=bound.name, value=value)])
        assert len(found) == count, value
        assert all(bound.meaning in text and bound.advice in text and f"{bound.limit:g}" in text for text in found)


def test_the_stated_bounds():
    limits = {bound.name: (bound.limit, bound.is_upper) for bound in trust.BOUNDS}
    assert limits["energy/kl"] == limits["energy/guidance_sd"] == (3.0, True)
    assert limits["critic/advantage_corr"] == (0.0, False)
    assert limits["gain"] == (-5.0, False)
    assert doubts(energy__kl=4.2) == [
        "the cost of guidance in nats is 4.2, above 3: guided actions are far from the data; "
        "see what less does: aepo evaluate RUN --nats 1"
    ]


def test_a_loss_is_doubted_only_by_more_than_two_standard_errors():
    assert doubts(gain=-10.9, gain_error=3.0) == []
    (text,) = doubts(gain=-11.1, gain_error=3.0)
    assert "-11.1, below -5 by more than two standard errors of 3" in text


def test_the_gain_is_of_pairs_in_points_of_the_score():
    own, cloned = [10.0, 30.0, 20.0, 60.0], [5.0, 27.0, 11.0, 57.0]
    found = values(evaluations=[evaluation(own, 3.0), evaluation(cloned, 0.0)], points=0.5)
    gains = 0.5 * (np.array(own) - np.array(cloned))
    assert found["gain"] == pytest.approx(gains.mean())
    assert found["gain_error"] == pytest.approx(gains.std(ddof=1) / 2)
    unpaired = 0.5 * np.hypot(np.std(own, ddof=1), np.std(cloned, ddof=1)) / 2
    assert found["gain_error"] < unpaired / 5, "the spread of the first states is in both"


def test_without_references_the_unit_is_the_clones_standard_error():
    own, cloned = [10.0, 30.0, 20.0, 60.0], [5.0, 27.0, 11.0, 57.0]
    found = values(evaluations=[evaluation(own, 3.0), evaluation(cloned, 0.0)])
    unit = np.std(cloned, ddof=1) / 2
    assert found["gain"] == pytest.approx(np.mean(np.subtract(own, cloned)) / unit)


@pytest.mark.parametrize("returns", [[1.0], [7.0, 7.0]])
def test_a_clone_that_says_nothing_of_its_spread_gives_no_gain(returns):
    assert values(evaluations=[evaluation(returns, 3.0), evaluation(returns, 0.0)]) == {}
    assert values(evaluations=[evaluation(returns, 3.0)], points=1.0) == {}


def test_the_last_value_of_each_metric_counts_and_no_other_metric():
    rows = [{"behavior/loss": 2.0}, {"critic/advantage_corr": 0.5, "critic/loss": 3.0}, {"critic/advantage_corr": 0.25}]
    rows += [{"energy/kl": 0.5, "energy/guidance_sd": math.inf, "energy/guidance_scale": 3.0}]
    assert values(rows, [evaluation([1.0], 3.0)]) == {
        "critic/advantage_corr": 0.25,
        "energy/kl": 0.5,
        "energy/guidance_scale": 3.0,
    }


def test_the_held_out_loss_is_compared_with_the_last_tenth_of_training():
    rows = [{"behavior/loss": 9.0}] * 18 + [{"behavior/loss": 3.0, "behavior/variance_loss": 1.0}] * 2
    rows += [{"behavior/held_out_loss": 5.0}]
    assert values(rows, [evaluation([1.0], 3.0)])["behavior/held_out_ratio"] == pytest.approx(2.5)


def test_the_line_has_both_numbers_the_cost_and_the_correlation():
    named = {"gain": 29.14, "gain_error": 3.21, "energy/kl": 0.412, "critic/advantage_corr": 0.307}
    result = Result.unended(
        evaluations=(evaluation([1.0, 2.0], 3.0, 82.1), evaluation([1.0, 2.0], 0.0, 53.0)),
        diagnostics=tuple(Diagnostic(name=name, value=value) for name, value in named.items()),
    )
    assert trust.line(result) == (
        "trust: guided 82.1, cloned 53.0 (+29.1 ± 3.2); guidance costs 0.41 nats; advantage correlates 0.31"
    )
    alone = dataclasses.replace(result, evaluations=(evaluation([-4.0], 3.0),), diagnostics=())
    assert trust.line(alone) == "trust: return -4.0"


def test_looking_at_trust_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, aepo.trust; print({'torch', 'numpy', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# -- where it is said ----------------------------------------------------------------------------------------


@pytest.mark.trains
def test_train_and_evaluate_say_what_speaks_against_a_run(make_dataset, tmp_path, capsys, monkeypatch):
    from aepo import cli
    from aepo.runs import rundir, spool

    strict = tuple(dataclasses.replace(bound, limit=0.0, is_upper=True) for bound in trust.BOUNDS[:1])
    monkeypatch.setattr(trust, "BOUNDS", strict)
    small = [f"{stage}.{key}" for stage in ("behavior", "critic", "energy") for key in ("steps=40", "hidden_size=8")]
    words = ["--dataset", make_dataset(), "--preset", "best-smoke", "--out", str(tmp_path / "runs")]
    words += ["--set", *small, "data.held_out_share=0.3", "evaluation.horizon=5"]
    assert cli.run(["train", *words]) == 0
    said = capsys.readouterr().err
    (line,) = [text for text in said.splitlines() if text.startswith("trust: guided")]
    assert "advantage correlates" in line
    assert said.splitlines()[-1].startswith("warning: the cost of guidance in nats is")
    (folder,) = (tmp_path / "runs").iterdir()
    result = rundir.read_result(folder)
    names = {each.name: each.value for each in result.diagnostics}
    assert names.keys() >= {"energy/kl", "energy/guidance_sd", "energy/guidance_scale", "behavior/held_out_ratio"}
    assert names.keys() >= {f"{stage}/held_out_loss" for stage in ("behavior", "critic", "energy")} | {"gain"}
    rows = spool.read_spool(folder / rundir.METRICS)[0]
    last = {name: value for row in rows for name, value in row["metrics"].items()}
    assert all(value == last[name] for name, value in names.items() if name in last)
    assert cli.run(["train", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["diagnostics"]
    assert spool.read_spool(folder / rundir.METRICS)[0] == rows
    assert cli.run(["evaluate", str(folder), "--num-episodes", "1"]) == 0
    assert f"warning: the run {folder.name}: the cost of guidance in nats is" in capsys.readouterr().err
