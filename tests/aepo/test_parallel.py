"""Two workers with half of every batch each reach the weights of one with all of it."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aepo import config as configs
from aepo import parallel, pipeline, tasks
from aepo.errors import ConfigError
from aepo.presets import preset
from tests.examples import random_transitions

CPU = torch.device("cpu")
EVERY = {"steps": 25, "batch_size": 32, "hidden_size": 16, "num_layers": 2}
VARIANTS = {
    "best": ("best", {"behavior.variance": "learned", "critic.backup_steps": 3}),
    "analytic": ("analytic", {}),
    "second order": ("analytic", {"energy.target": "analytic_second_order"}),
    "monte carlo": ("analytic", {"energy.target": "monte_carlo"}),
    "mse": ("analytic", {"energy.target": "mse"}),
    "weighted denoising": ("best", {"energy.target": "weighted_denoising"}),
    "qgpo": ("qgpo", {"critic.num_support_states": 50, "energy.num_support_states": 50}),
    "iql": ("iql", {}),
    "noise": ("iql", {"critic.action_noise": 0.5, "critic.state_noise": 0.1}),
    "td3bc": ("td3bc", {}),
}


def make_config(name):
    method, settings = VARIANTS[name]
    base = preset(f"{method}-smoke", tasks.for_dataset("parallel"), 3)
    small = {f"{stage}.{key}": value for stage in base.stages for key, value in EVERY.items()}
    return configs.with_overrides(base, {**small, **settings})


def train(name):
    """Return the state after the last step, and the metrics of the last log."""
    torch.set_num_threads(1)
    last = None
    for progress in pipeline.train(make_config(name), random_transitions(), device=CPU):
        last = progress
    return {key: value.clone() for key, value in weights(last.states)}, last.metrics


def weights(state, prefix=""):
    for key, value in (state if isinstance(state, dict) else vars(state)).items():
        if isinstance(value, torch.nn.Module):
            yield from ((f"{prefix}{key}.{name}", tensor) for name, tensor in value.state_dict().items())
        elif hasattr(value, "__dataclass_fields__"):
            yield from weights(value, f"{prefix}{key}.")


def worker(rank, names, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        assert parallel.num_workers() == 2
        assert parallel.broadcast_flag(rank == 0)
        assert not parallel.broadcast_flag(rank == 1)
        torch.save({name: train(name) for name in names}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    address = f"file://{folder}/rendezvous"
    mp.spawn(worker, args=(list(VARIANTS), address, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_workers_reach_the_weights_of_one(name, both):
    alone, metrics = train(name)
    for shared, shared_metrics in (each[name] for each in both):
        assert set(shared) == set(alone)
        for key, tensor in alone.items():
            if name == "qgpo" and key in ("energy.net.body.4.bias", "energy.ema.net.body.4.bias"):
                continue  # its loss does not depend on it: the gradient is rounding, which Adam blows up
            torch.testing.assert_close(
                shared[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
        assert shared_metrics == pytest.approx(metrics, rel=0.5, abs=0.05)
    for key, tensor in both[0][name][0].items():
        assert torch.equal(tensor, both[1][name][0][key]), f"{key} differs between the workers"


def test_it_is_the_sharing_that_makes_them_equal(both):
    """The test above would notice a worker that trains on its half alone."""
    config = make_config("iql")
    half = configs.with_overrides(config, {f"{stage}.batch_size": 16 for stage in config.stages})
    state = copy.copy(list(pipeline.train(half, random_transitions(), device=CPU))[-1].states)
    key = "critic.q.body.0.weight"
    ours = dict(weights(state))
    key = next(k for k in ours if k.startswith("critic.q."))
    assert (ours[key] - both[0]["iql"][0][key]).abs().max() > 1e-3


def test_a_batch_that_cannot_be_shared_is_refused():
    config = make_config("qgpo")  # 2 states of 16 actions
    parallel.check_batches(config, 2)
    with pytest.raises(ConfigError, match=r"energy\.batch_size 32 cannot be shared by 4 workers"):
        parallel.check_batches(config, 4)
    with pytest.raises(ConfigError, match=r"behavior\.batch_size"):
        parallel.check_batches(make_config("best"), 3)


def test_alone_nothing_is_exchanged():
    tensor = torch.ones(4)
    assert parallel.share(tensor) is tensor
    assert parallel.mean(tensor) is tensor
    assert parallel.broadcast_flag(True)
