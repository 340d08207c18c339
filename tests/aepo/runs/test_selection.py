"""A run that chooses how to act on episodes of its own: what it tries, spends and keeps, and that none is repeated."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from aepo import cli
from aepo.errors import ConfigError
from aepo.evaluate import Evaluator
from aepo.policy import Policy
from aepo.runs import run, rundir, spool
from aepo.runs.evaluation import evaluation_seed, selection_seed

CPU = torch.device("cpu")
SHORT = {"evaluation__horizon": 5, "evaluation__num_episodes": 3}


def execute(config, folder):
    return run.execute(config, folder, run.FolderStore(folder), device=CPU)


@pytest.fixture
def rolled(monkeypatch):
    """What was rolled out: guidance scale, nats, episodes, seed."""
    calls, original = [], Evaluator.run

    def noting(self, policy, *, num_episodes, seed):
        own = policy.sampling
        calls.append((own and (own.guidance_scale, own.nats), num_episodes, seed))
        return original(self, policy, num_episodes=num_episodes, seed=seed)

    monkeypatch.setattr(Evaluator, "run", noting)
    return calls


def test_a_default_grid_is_tried_and_the_best_is_kept_and_reported(make_dataset, tiny_config, tmp_path, rolled):
    config = tiny_config(make_dataset(), sampling__guidance_scale=50.0, evaluation__select_episodes=11, **SHORT)
    result = execute(config, tmp_path / "run")
    tried = [call for call in rolled if call[2] == selection_seed(0)]
    assert [each for each, *_ in tried] == [(0.0, 0.0), (50.0, 0.3), (50.0, 1.0), (50.0, 3.0)]
    assert [episodes for _, episodes, _ in tried] == [2] * 4
    reported = set(range(evaluation_seed(0), evaluation_seed(0) + 3))
    assert not reported & set(range(selection_seed(0), selection_seed(0) + 2))
    rows = spool.read_spool(tmp_path / "run" / rundir.METRICS)[0]
    means = [value for row in rows for name, value in row["metrics"].items() if name.startswith("select/")]
    own, _, chosen = result.evaluations
    assert (own.selected_episodes, chosen.selected_episodes, chosen.method) == (0, 8, own.method)
    scale, nats = tried[int(np.argmax(means))][0]
    assert (chosen.guidance_scale, chosen.nats) == (scale, nats if scale else 0.0)
    assert (result.score, result.return_mean) == (own.score, own.return_mean)
    policy = Policy.load(tmp_path / "run" / rundir.POLICY)
    assert (policy.sampling.guidance_scale, policy.sampling.nats) == (scale, nats)
    assert policy.config.sampling == config.sampling
    again = Evaluator.of(config)
    returns = again.run(policy, num_episodes=3, seed=evaluation_seed(0))
    again.close()
    assert chosen.episode_returns == tuple(returns.tolist()), "on the reported episodes, as the kept policy acts"
    plain = execute(tiny_config(sampling__guidance_scale=50.0, **SHORT), tmp_path / "plain")
    assert plain.evaluations == result.evaluations[:2]


def test_the_cells_of_the_heat_map_are_the_choice_where_there_are_any(make_dataset, tiny_config, tmp_path, rolled):
    grid = {
        "evaluation__grid_beta": "1,3",
        "evaluation__grid_guidance_scale": "0,2",
        "evaluation__num_grid_episodes": 1,
    }
    execute(tiny_config(make_dataset(), evaluation__select_episodes=4, **grid, **SHORT), tmp_path)
    tried = [call for call in rolled if call[2] == selection_seed(0)]
    assert [each[0] for each, *_ in tried] == [0.0, 2.0, 0.0, 2.0]
    assert [episodes for _, episodes, _ in tried] == [1] * 4


def test_a_run_killed_while_it_chooses_goes_on_where_it_was(make_dataset, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(make_dataset(), evaluation__select_episodes=8, **SHORT)
    whole = execute(config, tmp_path / "whole")
    original, seen = Evaluator.run, []

    def dying(self, policy, *, num_episodes, seed):
        if seed == selection_seed(0):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(policy.sampling)
        return original(self, policy, num_episodes=num_episodes, seed=seed)

    monkeypatch.setattr(Evaluator, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "broken")

    def going_on(self, policy, *, num_episodes, seed):
        seen.extend([policy.sampling] if seed == selection_seed(0) else [])
        return original(self, policy, num_episodes=num_episodes, seed=seed)

    monkeypatch.setattr(Evaluator, "run", going_on)
    broken = execute(config, tmp_path / "broken")
    assert len(seen) == len({(each.guidance_scale, each.nats) for each in seen}) == 4, "none was evaluated twice"
    assert broken.evaluations == whole.evaluations
    names = (tmp_path / name / rundir.POLICY for name in ("whole", "broken"))
    assert len({path.read_bytes() for path in names}) == 1


def test_fewer_episodes_than_settings_are_refused_and_none_change_no_fingerprint(tiny_config):
    with pytest.raises(ConfigError, match=r"select_episodes must be at least 4, .* got 3"):
        tiny_config(evaluation__select_episodes=3)
    grid = {"evaluation__grid_beta": "1,3", "evaluation__grid_nats": "1,2,3"}
    with pytest.raises(ConfigError, match="at least 6"):
        tiny_config(evaluation__select_episodes=5, **grid)
    assert tiny_config(evaluation__select_episodes=0).fingerprint == tiny_config().fingerprint
    assert tiny_config(evaluation__select_episodes=4).fingerprint != tiny_config().fingerprint


def test_a_method_without_guidance_ignores_it(make_dataset, tiny_config, tmp_path, rolled):
    result = execute(tiny_config(make_dataset(), method="iql", evaluation__select_episodes=1, **SHORT), tmp_path)
    assert len(result.evaluations) == len(rolled) == 1


def test_qgpo_has_it_and_evaluate_acts_by_what_was_chosen(make_dataset, tmp_path, capsys):
    small = [f"{stage}.{key}" for stage in ("behavior", "critic", "energy") for key in ("steps=20", "hidden_size=8")]
    words = ["--dataset", make_dataset(), "--preset", "qgpo-smoke", "--out", str(tmp_path / "runs"), "--set", *small]
    assert cli.run(["train", *words, "evaluation.horizon=5", "evaluation.select_episodes=3"]) == 2
    assert cli.run(["train", *words, "evaluation.horizon=5", "evaluation.select_episodes=8"]) == 0
    assert "qgpo (selected, 8 episodes)" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    chosen = rundir.read_result(folder).evaluations[2]
    assert cli.run(["evaluate", str(folder), "--num-episodes", "2", "--seed", str(evaluation_seed(0)), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["guidance_scale"], row["nats"]) == (chosen.guidance_scale, chosen.nats)
    assert row["episode_returns"] == list(chosen.episode_returns)


def test_a_policy_keeps_how_it_acts(make_dataset, tiny_config, tmp_path):
    execute(tiny_config(make_dataset(), **SHORT), tmp_path)
    policy = Policy.load(tmp_path / rundir.POLICY)
    other = dataclasses.replace(policy.sampling, beta=2.0, guidance_scale=5.0, nats=0.7)
    policy.with_sampling(other).save(tmp_path / "other")
    assert Policy.load(tmp_path / "other").sampling == other
    before = (tmp_path / rundir.POLICY).read_bytes()
    policy.save(tmp_path / "same")
    assert (tmp_path / "same").read_bytes() == before, "as files were before there was a choice"
