"""One run in its folder: result, spool, checkpoints, policy; broken off, torn, foreign."""

import dataclasses
import json
import math
import os
import shutil
import threading
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from aepo import checkpoint
from aepo.environments import References
from aepo.errors import CheckpointError, ConfigError, DataError, ResourceError, TrainingError
from aepo.evaluate import Evaluator
from aepo.pipeline import Progress
from aepo.policy import Policy
from aepo.runs import run, rundir, spool

CPU = torch.device("cpu")


def execute(config, folder, **kwargs):
    return run.execute(config, folder, run.FolderStore(folder), device=CPU, **kwargs)


class Break(Exception):
    """Stands for a kill."""


def test_a_run_leaves_result_spool_config_and_policy(make_dataset, tiny_config, tmp_path):
    config = tiny_config(make_dataset(), evaluation__num_curve_points=2, evaluation__num_curve_episodes=1)
    result = execute(config, tmp_path / "run")
    document = json.loads((tmp_path / "run" / rundir.RESULT).read_text())
    assert document == json.loads(json.dumps(dataclasses.asdict(result)))
    assert result.status == "finished"
    assert result.steps == 180
    assert [row.method for row in result.evaluations] == ["aepo", "diffusion-bc"]
    returns = result.evaluations[0].episode_returns
    assert result.return_mean == pytest.approx(np.mean(returns))
    assert result.score == pytest.approx(100 * (np.mean(returns) + 1200) / (1200 - 150))
    points = [(point.method, point.stage, point.step) for point in result.curve]
    cloned = [("diffusion-bc", "behavior", step) for step in (20, 40, 60)]
    assert points == [*cloned, *(("", "energy", step) for step in (140, 160, 180))]
    rows = spool.read_spool(tmp_path / "run" / rundir.METRICS)[0]
    steps = [(stage, step) for stage in ("behavior", "critic", "energy") for step in range(1, 61)]
    assert [(r["stage"], r["step"]) for r in rows] == [*steps, ("energy", 60)]
    assert rows[-1]["metrics"].keys() == {"energy/kl", "energy/guidance_sd", "energy/guidance_scale"}
    assert Policy.load(tmp_path / "run" / rundir.POLICY).config == config


def test_a_heat_map_of_beta_and_guidance_scale_ends_a_run(make_dataset, tiny_config, tmp_path):
    settings = {"grid_beta": "1,3", "grid_guidance_scale": "0,2", "num_grid_episodes": 2}
    config = tiny_config(make_dataset(), **{f"evaluation__{key}": value for key, value in settings.items()})
    result = execute(config, tmp_path)
    cells = [(row.beta, row.guidance_scale) for row in result.grid]
    assert cells == [(1.0, 0.0), (1.0, 2.0), (3.0, 0.0), (3.0, 2.0)]
    cloned = [row.score for row in result.grid if row.guidance_scale == 0]
    assert cloned[0] == cloned[1], "beta has no effect without guidance"
    assert (tmp_path / rundir.GRID).read_bytes().startswith(b"\x89PNG")


def test_nats_are_an_axis_of_the_heat_map_too(make_dataset, tiny_config, tmp_path):
    settings = {"grid_beta": "1", "grid_nats": "0.01,1000", "num_grid_episodes": 2}
    evaluation = {f"evaluation__{key}": value for key, value in settings.items()}
    config = tiny_config(make_dataset(), sampling__guidance_scale=1e3, **evaluation)
    result = execute(config, tmp_path)
    assert [(row.beta, row.guidance_scale, row.nats) for row in result.grid] == [(1.0, 1e3, 0.01), (1.0, 1e3, 1e3)]
    assert (tmp_path / rundir.GRID).read_bytes().startswith(b"\x89PNG")
    own, cloned = result.evaluations
    assert own.kl > policy_of(tmp_path).sampler.cost()["energy/kl"] / 10 > 0
    assert cloned.kl is None
    assert result.grid[1].return_mean != result.grid[0].return_mean
    with pytest.raises(ConfigError, match=r"grid_guidance_scale or evaluation\.grid_nats, got"):
        tiny_config(evaluation__grid_beta="1", evaluation__grid_guidance_scale="1", evaluation__grid_nats="1")


def policy_of(folder):
    return Policy.load(folder / rundir.POLICY)


def test_every_setting_of_the_evaluation_is_heeded(make_dataset, tiny_config, tmp_path):
    """Each changes how often, how long or with what the policy is rolled out, and so the result."""
    base = {
        "num_episodes": 2, "num_curve_points": 1, "num_curve_episodes": 1, "horizon": 5, "num_grid_episodes": 1,
        "grid_beta": "1", "grid_guidance_scale": "2", "select_episodes": 1,
    }  # fmt: skip
    other = base | {
        "num_episodes": 3, "num_curve_points": 2, "num_curve_episodes": 2, "horizon": 6, "num_grid_episodes": 2,
        "grid_beta": "3", "grid_guidance_scale": "1", "select_episodes": 2,
    }  # fmt: skip
    dataset = make_dataset()

    def measure(settings):
        config = tiny_config(dataset, **{f"evaluation__{key}": value for key, value in settings.items()})
        assert {*settings, "grid_nats"} == {field.name for field in dataclasses.fields(config.evaluation)}
        result = execute(config, tmp_path / config.name)
        return result.evaluations, result.curve, result.grid

    before = measure(base)
    for name, value in other.items():
        assert measure(base | {name: value}) != before, name


def test_the_curve_along_stage_1_is_the_clones_and_not_taken_for_the_runs_own(make_dataset, tiny_config, tmp_path):
    many = {"num_episodes": 3, "num_curve_points": 1, "num_curve_episodes": 3}
    config = tiny_config(make_dataset(), **{f"evaluation__{key}": value for key, value in many.items()})
    result = execute(config, tmp_path)
    cloned = [point for point in result.curve if point.method]
    assert [(point.stage, point.step) for point in cloned] == [("behavior", 30), ("behavior", 60)]
    assert cloned[-1].return_mean == result.evaluations[1].return_mean, "the same policy on the same episodes"
    assert cloned[0].return_mean != cloned[1].return_mean
    rows = spool.read_spool(tmp_path / rundir.METRICS)[0]
    assert {row["stage"] for row in rows if "eval/score" in row["metrics"]} == {"energy"}


@pytest.mark.parametrize("method", ["iql", "td3bc"])
def test_a_baselines_run_ends_like_any_other(method, make_dataset, tiny_config, tmp_path):
    config = tiny_config(
        make_dataset(), method=method, evaluation__num_curve_points=1, evaluation__num_curve_episodes=1
    )
    result = execute(config, tmp_path)
    (row,) = result.evaluations
    assert (row.method, row.beta, row.guidance_scale) == (method, None, None)
    assert (row.score, result.method, result.grid) == (result.score, method, ())
    assert result.steps == 60 * len(config.stages) == result.curve[-1].step
    assert len(result.curve) == 2
    assert execute(config, tmp_path) == result


def test_a_finished_run_is_not_repeated(make_dataset, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(make_dataset())
    first = execute(config, tmp_path)
    monkeypatch.setattr(run, "prepare", lambda *_, **__: pytest.fail("repeated"))
    assert execute(config, tmp_path) == first
    shutil.rmtree(Path(os.environ["MINARI_DATASETS_PATH"]) / config.data.dataset)
    assert execute(config, tmp_path) == first, "a result outlives its data"


def test_a_result_of_other_data_is_not_taken_for_one_of_these(make_dataset, tiny_config, tmp_path):
    config = tiny_config(make_dataset())
    execute(config, tmp_path)

    def other_sign(arrays):
        arrays["rewards"] *= -1

    shutil.rmtree(Path(os.environ["MINARI_DATASETS_PATH"]) / config.data.dataset)
    make_dataset(edit_all=other_sign)
    with pytest.raises(CheckpointError, match=r"holds a result of other data: .* has changed since"):
        execute(config, tmp_path)


@pytest.mark.parametrize("place", [("behavior", 50), ("critic", 50), ("energy", 50), ("energy", 60)])
def test_a_broken_run_goes_on_and_ends_like_an_unbroken_one(place, make_dataset, tiny_config, tmp_path):
    config = tiny_config(make_dataset(), evaluation__num_curve_points=2, evaluation__num_curve_episodes=1)

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.step) == place:
            raise Break

    unbroken = execute(config, tmp_path / "whole")
    with pytest.raises(Break):
        execute(config, tmp_path / "broken", checkpoint_s=0.0, on_progress=stop)
    with (tmp_path / "broken" / rundir.METRICS).open("ab") as file:
        file.write(b'{"time": 12, "sta')  # the kill tore a line
    broken = execute(config, tmp_path / "broken")
    clock = {key: getattr(broken, key) for key in ("seconds", "started_at", "folder", "peak_memory_gb")}
    assert broken == dataclasses.replace(unbroken, **clock)
    assert (tmp_path / "broken" / rundir.POLICY).read_bytes() == (tmp_path / "whole" / rundir.POLICY).read_bytes()
    spools = [
        [{**row, "time": 0} for row in spool.read_spool(tmp_path / name / rundir.METRICS)[0]]
        for name in ("whole", "broken")
    ]
    assert spools[0] == spools[1]


def test_the_checkpoint_before_serves_when_the_newest_is_torn(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step})
    newest = tmp_path / checkpoint.FILE
    for torn in (newest.read_bytes()[:-1], newest.read_bytes()[:-20] + bytes(20), b""):
        newest.write_bytes(torn)
        assert checkpoint.load(tmp_path) == {"step": 1}
        assert "going on from the one before" in capsys.readouterr().err
    newest.unlink()
    assert checkpoint.load(tmp_path) == {"step": 1}
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"PK nonsense")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path / "empty") is None


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_run_or_of_other_data_is_refused(make_dataset, tiny_config, tmp_path):
    dataset_id = make_dataset()
    config = tiny_config(dataset_id)

    def stop(progress: Progress) -> None:
        if progress.step > 50:
            raise Break

    for name in ("foreign", "changed"):
        with pytest.raises(Break):
            execute(config, tmp_path / name, checkpoint_s=0.0, on_progress=stop)
    with pytest.raises(CheckpointError, match="foreign"):
        execute(tiny_config(dataset_id, seed=1), tmp_path / "foreign")
    import minari

    minari.delete_dataset(dataset_id)
    make_dataset(num_episodes=4)
    with pytest.raises(CheckpointError, match="has changed since"):
        execute(config, tmp_path / "changed")


def test_a_failed_run_is_a_result(make_dataset, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(make_dataset())
    monkeypatch.setattr("aepo.stages.fast.expectile_loss", lambda u_B, _: u_B.sum() * math.nan)
    with pytest.raises(TrainingError, match="critic/loss is nan"):
        execute(config, tmp_path)
    result = rundir.read_result(tmp_path)
    assert result.status == "failed"
    assert "critic/loss is nan" in result.error
    assert result.score is None


def test_running_out_of_memory_is_a_result(make_dataset, tiny_config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError("no 3 GiB")

    monkeypatch.setattr(run, "load_transitions", full)
    with pytest.raises(ResourceError, match="out of memory: no 3 GiB"):
        execute(tiny_config(make_dataset()), tmp_path)
    assert rundir.read_result(tmp_path).status == "failed"


def test_a_file_that_is_no_result_is_not_taken_for_one(tmp_path):
    (tmp_path / rundir.RESULT).write_text('{"status": "fini')
    with pytest.raises(CheckpointError, match="not a result"):
        rundir.read_result(tmp_path)


def test_readers_of_the_spool_never_see_half_a_row(tmp_path, tiny_config):
    writer = spool.Spool(tmp_path / "s", tiny_config("local/x-v0", critic__steps=500))
    counts, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            counts.append(len(spool.read_spool(tmp_path / "s")[0]))

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(1, 500):
        writer.write("critic", step, {"critic/loss": 1.0})
    stop.set()
    thread.join()
    writer.close()
    assert counts == sorted(counts)
    assert len(spool.read_spool(tmp_path / "s")[0]) == 499


# -- policy ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_dataset, tiny_config, tmp_path):
    execute(tiny_config(make_dataset()), tmp_path / "run")
    return tmp_path / "run" / rundir.POLICY


def test_a_policy_read_back_acts_the_same_and_within_bounds(trained):
    observations = 10 * np.random.default_rng(0).standard_normal((64, 3))
    first, second = (Policy.load(trained).act(observations, torch.Generator().manual_seed(0)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (64, 1)
    assert np.abs(first).max() <= 2.0
    assert first.std() > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_a_policy_acts_on_one_thread_and_gives_the_setting_back(threads, trained, monkeypatch):
    policy, generator = Policy.load(trained), torch.Generator()
    observations, saw, settings = np.zeros((2, 3)), [], []
    sample, set_num_threads = policy.sampler.sample, torch.set_num_threads

    def watched(states_BS, generator):
        saw.append(torch.get_num_threads())
        return sample(states_BS, generator)

    def broken(states_BS, generator):
        raise RuntimeError("no action")

    set_num_threads(threads)
    try:
        monkeypatch.setattr(torch, "set_num_threads", lambda n: (settings.append(n), set_num_threads(n)))
        monkeypatch.setattr(policy.sampler, "sample", watched)
        policy.act(observations, generator)
        assert (saw, torch.get_num_threads()) == ([1], threads)
        assert settings == ([] if threads == 1 else [1, threads])
        monkeypatch.setattr(policy.sampler, "sample", broken)
        with pytest.raises(RuntimeError, match="no action"):
            policy.act(observations, generator)
        assert torch.get_num_threads() == threads
    finally:
        set_num_threads(1)


def test_of_several_candidates_the_one_with_the_largest_q_is_taken(trained):
    policy = Policy.load(trained)
    policy = policy.with_sampling(dataclasses.replace(policy.sampling, temperature=1.0))
    states = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))

    def value(num):
        several = policy.with_sampling(dataclasses.replace(policy.sampling, num_candidates=num))
        actions = several.sampler.sample(states, torch.Generator().manual_seed(1))
        return policy.sampler.q(states, actions).amin(0)

    assert value(16).mean() > value(1).mean()
    repeated = states.repeat_interleave(16, 0)
    several = policy.with_sampling(dataclasses.replace(policy.sampling, num_candidates=16))
    drawn = policy.sampler.sample(repeated, torch.Generator().manual_seed(1))
    best = policy.sampler.q(repeated, drawn).amin(0).view(32, 16).amax(1)
    taken = several.sampler.sample(states, torch.Generator().manual_seed(1))
    torch.testing.assert_close(policy.sampler.q(states, taken).amin(0), best)


def test_at_temperature_zero_nothing_is_drawn(trained):
    policy = Policy.load(trained)
    states = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))

    def spread(temperature):
        colder = policy.with_sampling(dataclasses.replace(policy.sampling, temperature=temperature))
        first, second = (colder.sampler.sample(states, torch.Generator().manual_seed(seed)) for seed in (1, 2))
        return float((first - second).abs().mean())

    assert spread(0.0) == 0
    assert 0 < spread(0.1) < spread(1.0)
    with pytest.raises(ConfigError, match="num_candidates must be 1"):
        dataclasses.replace(policy.sampling, temperature=0.0, num_candidates=2)


def test_guidance_scale_zero_ignores_the_energy(trained):

    policy = Policy.load(trained)
    cloning = policy.with_sampling(dataclasses.replace(policy.sampling, guidance_scale=0.0))
    states = torch.randn(16, 3)
    before = cloning.sampler.sample(states, torch.Generator().manual_seed(0))
    guided = policy.sampler.sample(states, torch.Generator().manual_seed(0))
    for parameter in policy.sampler.energy.parameters():
        parameter.data.mul_(-3)
    assert torch.equal(before, cloning.sampler.sample(states, torch.Generator().manual_seed(0)))
    assert not torch.equal(guided, policy.sampler.sample(states, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "missing"])
def test_a_damaged_policy_file_is_refused(damage, trained):
    data = bytearray(trained.read_bytes())
    if damage == "truncated":
        trained.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-10] ^= 1
        trained.write_bytes(data)
    elif damage == "foreign":
        from safetensors.torch import save

        trained.write_bytes(save({"weight": torch.zeros(3)}))
    else:
        trained.unlink()
    with pytest.raises(CheckpointError, match=str(trained)):
        Policy.load(trained)


# -- evaluation --------------------------------------------------------------------------------------------


class Constant:
    """A policy that always pushes the same way."""

    def __init__(self, trained):
        self.spaces, self.device = Policy.load(trained).spaces, CPU

    def num_cut(self, observations_NS):
        return 0

    def act(self, observations_NS, generator):
        return np.full((len(observations_NS), 1), 0.7, dtype=np.float32)


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_returns_are_those_of_a_plain_loop_whatever_the_number_of_environments(slots, trained, monkeypatch):
    monkeypatch.setattr("aepo.evaluate.MAX_ENVS", slots)
    evaluator = Evaluator("tests/pendulum/random-v0")
    returns = evaluator.run(Constant(trained), num_episodes=7, seed=5)
    evaluator.close()
    env = gymnasium.make("Pendulum-v1", max_episode_steps=40)
    exact = []
    for episode in range(7):
        env.reset(seed=5 + episode)
        exact.append(sum(env.step(np.array([0.7], dtype=np.float32))[1] for _ in range(40)))
    env.close()
    np.testing.assert_allclose(returns, exact)


def test_a_horizon_shortens_the_episodes(trained):
    evaluator = Evaluator("tests/pendulum/random-v0", horizon=5)
    short = evaluator.run(Constant(trained), num_episodes=2, seed=0)
    evaluator.close()
    env = gymnasium.make("Pendulum-v1")
    env.reset(seed=0)
    assert short[0] == pytest.approx(sum(env.step(np.array([0.7], dtype=np.float32))[1] for _ in range(5)))
    env.close()


def test_scores_are_zero_for_random_and_a_hundred_for_expert():
    references = References(random=-20.0, expert=3000.0)
    assert references.score(-20.0) == 0
    assert references.score(3000.0) == 100


def test_a_data_set_without_references_gives_returns_and_no_score(make_dataset, tiny_config, tmp_path):
    result = execute(tiny_config(make_dataset("tests/pendulum/bare-v0", references=False)), tmp_path)
    assert result.score is None
    assert math.isfinite(result.return_mean)


def test_an_environment_that_crashes_ends_the_run_by_name(trained, monkeypatch):
    evaluator = Evaluator("tests/pendulum/random-v0")

    class Broken(Constant):
        def act(self, observations_NS, generator):
            raise ZeroDivisionError("in the simulator")

    with pytest.raises(TrainingError, match="Pendulum-v1 failed: ZeroDivisionError"):
        evaluator.run(Broken(trained), num_episodes=1, seed=0)
    evaluator.close()


def test_a_data_set_that_is_not_there_cannot_be_evaluated():
    with pytest.raises(DataError, match="cannot be read"):
        Evaluator("no/such-v0")


def test_a_run_without_an_energy_network_ends_with_a_result_and_its_diagnostics(make_dataset, tiny_config, tmp_path):
    config = tiny_config(
        make_dataset(),
        energy__target="analytic",
        energy__expansion="posterior_mean",
        energy__steps=0,
        data__held_out_share=0.2,
        evaluation__num_curve_points=2,
    )
    result = execute(config, tmp_path)
    assert {point.stage for point in result.curve} == {"behavior", "critic"}
    assert {"energy/kl", "energy/guidance_sd", "critic/advantage_corr"} <= {each.name for each in result.diagnostics}
    assert [row.method for row in result.evaluations] == ["aepo", "diffusion-bc"]
