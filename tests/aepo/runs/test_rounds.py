"""A run cut into rounds: what it trains, that it goes on bit for bit, and that rounds are shared like stages."""

import dataclasses
import json

import pytest
import torch

from aepo import config as configs
from aepo import methods, pipeline
from aepo.errors import ConfigError, Interrupted
from aepo.runs import run, rundir, spool
from aepo.runs.stage_store import StageStore, stage_keys

CPU = torch.device("cpu")
ROUNDS = (1 / 6, 0.5, 1.0)


@pytest.fixture
def config(make_dataset, tiny_config):
    make_dataset()
    overrides = {"evaluation__num_curve_episodes": 1, "evaluation__num_grid_episodes": 1, "evaluation__horizon": 5}
    return dataclasses.replace(tiny_config(**overrides), rounds=ROUNDS)


def advance(config, folder, number, **kwargs):
    return run.advance(config, folder, run.FolderStore(folder), num_rounds=number, device=CPU, **kwargs)


def execute(config, folder, **kwargs):
    return run.execute(config, folder, run.FolderStore(folder), device=CPU, **kwargs)


def losses(folder):
    rows = spool.read_spool(folder / rundir.METRICS)[0]
    return [(r["stage"], r["step"], {k: v for k, v in r["metrics"].items() if k != "steps_reused"}) for r in rows]


@pytest.mark.parametrize("rounds", [(), (0.5,), (0.0, 1.0), (0.5, 0.5, 1.0), (0.7, 0.3, 1.0), (0.5, 1.5), (1e-6, 1.0)])
def test_rounds_that_make_no_sense_are_refused(rounds, tiny_config):
    with pytest.raises(ConfigError, match="rounds"):
        dataclasses.replace(tiny_config(), rounds=rounds)


def test_one_round_is_the_run_that_it_was_before_there_were_rounds(tiny_config):
    config = tiny_config()
    assert dataclasses.replace(config, rounds=(1.0,)).fingerprint == config.fingerprint
    assert dataclasses.replace(config, rounds=(0.5, 1.0)).fingerprint != config.fingerprint
    assert methods.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    before = {key: value for key, value in dataclasses.asdict(config).items() if key != "rounds"}
    assert methods.from_dict(before) == config


def test_steps_of_a_run_are_counted_over_its_rounds(config):
    visited = [
        (name, step)
        for number in range(3)
        for name in config.stages
        for step in range([0, *config.round_ends(name)][number] + 1, config.round_ends(name)[number] + 1)
    ]
    assert [config.steps_until(*place) for place in visited] == list(range(1, config.num_steps + 1))
    places = [config.place(*place) for place in visited]
    assert places == sorted(places)


def test_every_round_goes_through_all_stages_and_measures_anew(config, make_dataset):
    data = run.load_data(config)
    seen, scales = [], set()
    for progress in pipeline.train(config, data, device=CPU):
        if progress.ends_stage:
            seen.append((progress.round, progress.stage, progress.step))
            if progress.stage == "energy":
                scales.add(float(progress.states["energy"].q_scale))
    assert seen == [
        (number, stage, step) for number, step in enumerate((10, 30, 60)) for stage in ("behavior", "critic", "energy")
    ]
    assert len(scales) == 3  # the critic's scale is that of each round


def test_behaviour_and_critic_are_those_of_one_round(config):
    data = run.load_data(config)
    one = dataclasses.replace(config, rounds=(1.0,))
    ends = [list(pipeline.train(each, data, device=CPU))[-1].states for each in (config, one)]
    for stage in ("behavior", "critic"):
        nets = [end[stage] for end in ends]
        for name in ("ema",) if stage == "behavior" else ("q", "v"):
            tensors = [getattr(net, name).state_dict() for net in nets]
            assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_a_run_advances_round_by_round_as_it_does_at_once(config, tmp_path):
    steps = [advance(config, tmp_path / "slow", number) for number in (1, 2, 3)]
    whole = advance(config, tmp_path / "fast", 3)
    assert steps[2] == whole
    assert losses(tmp_path / "slow") == losses(tmp_path / "fast")
    assert [row.round for row in steps] == [1, 2, 3]
    assert advance(config, tmp_path / "fast", 2) == steps[1]  # ended before: nothing is trained
    results = [execute(config, tmp_path / name) for name in ("slow", "fast", "plain")]
    assert results[0].evaluations == results[1].evaluations == results[2].evaluations
    assert [point.step for point in results[2].curve] == [30, 90, 180]
    policies = [(tmp_path / name / rundir.POLICY).read_bytes() for name in ("slow", "fast", "plain")]
    assert policies[0] == policies[1] == policies[2]


@pytest.mark.parametrize("place", [("behavior", 10), ("critic", 20), ("energy", 30), ("energy", 60)])
def test_interrupted_anywhere_it_goes_on_bit_for_bit(place, config, tmp_path):
    whole = execute(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        execute(config, tmp_path / "broken", on_progress=lambda p: (p.stage, p.step) == place)
    assert execute(config, tmp_path / "broken").evaluations == whole.evaluations
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_round_tries_the_cells_of_the_heat_map_and_counts_the_best(config, tmp_path):
    grid = {"evaluation.grid_beta": (1 / 3, 3.0), "evaluation.grid_guidance_scale": (1.0, 5.0)}
    result = advance(configs.with_overrides(config, grid), tmp_path, 1)
    assert list(result.cells) == [(beta, scale) for beta in (1 / 3, 3) for scale in (1, 5)]
    assert result.value == result.score == max(result.cells.values())
    ((*_, metrics),) = [row for row in losses(tmp_path) if "round" in row[2]]
    assert result.cells[metrics["eval/beta"], metrics["eval/guidance_scale"]] == result.score
    assert metrics["grid/beta 0.333333 scale 5"] == result.cells[1 / 3, 5]
    grid = {"evaluation.grid_beta": (3.0,), "evaluation.grid_nats": (0.5, 2.0)}
    result = advance(configs.with_overrides(config, grid), tmp_path / "nats", 1)
    assert list(result.cells) == [(3.0, 0.5), (3.0, 2.0)]
    assert losses(tmp_path / "nats")[-1][2].keys() >= {"grid/beta 3 nats 0.5", "grid/beta 3 nats 2"}


@pytest.mark.parametrize("method", ["iql", "td3bc"])
def test_the_baselines_have_rounds_too(method, make_dataset, tiny_config, tmp_path):
    make_dataset()
    config = tiny_config(method=method, evaluation__num_curve_episodes=1, evaluation__horizon=5)
    config = dataclasses.replace(config, rounds=ROUNDS)
    advance(config, tmp_path, 1)
    assert execute(config, tmp_path).status == "finished"


# -- with a store ------------------------------------------------------------------------------------------


def test_rounds_are_shared_like_stages(config, tmp_path):
    store = StageStore(tmp_path / "stages")
    alone = [advance(config, tmp_path / "alone", number) for number in (1, 2, 3)]
    first = [advance(config, tmp_path / "first", number, stage_store=store) for number in (1, 2)]
    second = [advance(config, tmp_path / "second", number, stage_store=store) for number in (1, 2, 3)]
    assert [row.steps_reused for row in first] == [0, 0]
    assert [row.steps_reused for row in second] == [30, 90, 90]
    for ours, expected in zip([*first, *second], [*alone[:2], *alone], strict=True):
        assert dataclasses.replace(ours, steps_reused=0) == dataclasses.replace(expected, steps_reused=0)
    assert losses(tmp_path / "second") == losses(tmp_path / "alone")
    assert advance(config, tmp_path / "first", 3, stage_store=store).steps_reused == 90


def test_another_critic_shares_the_behaviour_of_every_round(config, tmp_path):
    store = StageStore(tmp_path / "stages")
    other = configs.with_overrides(config, {"critic.expectile": 0.9})
    advance(config, tmp_path / "first", 3, stage_store=store)
    shared = advance(other, tmp_path / "second", 3, stage_store=store)
    assert shared.steps_reused == 60
    assert advance(other, tmp_path / "alone", 3).score == shared.score


def test_a_stage_after_rounds_is_not_the_stage_of_one_round(config):
    keys = stage_keys(config, "digest")
    one = stage_keys(dataclasses.replace(config, rounds=(1.0,)), "digest")
    assert len(keys) == 9
    assert not set(keys.values()) & set(one.values())
