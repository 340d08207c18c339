"""Fixtures: a tiny Minari data set, and the settings that keep a test run to itself."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)
hypothesis.settings.register_profile("aepo", hypothesis.settings(), deadline=None)  # torch's first call imports
hypothesis.settings.load_profile("aepo")


TRAINS = """bench cluster diffusion energy extending families folders fuzz golden growth kernels learning odd_data page
parallel places pointmaze ray rebrac rounds run search slots stages store sweep targets toy tracked tracking
tune variants"""
"""Test files that train networks, roll out policies or start servers."""


@pytest.hookimpl(tryfirst=True)  # before xdist, which writes the group into the name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run all tests that start a Ray, one after the other: they count its processes."""
    for item in items:
        if item.path.stem.removeprefix("test_") in TRAINS.split():
            item.add_marker(pytest.mark.trains)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(autouse=True)
def _subnormal_numbers():
    """A command run in this process takes them for 0; Hypothesis, which draws them, refuses to."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's data, cache or tracking server."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("AEPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # maze environments leave their XML there


@pytest.fixture
def make_dataset() -> Callable[..., str]:
    """A function that writes a small Minari data set of Pendulum-v1 with random actions and returns its id."""
    return write_pendulum


def write_pendulum(
    dataset_id: str = "tests/pendulum/random-v0",
    *,
    num_episodes: int = 3,
    references: bool = True,
    edit: Callable[[dict[str, np.ndarray]], None] | None = None,
    edit_all: Callable[[dict[str, np.ndarray]], None] | None = None,
    data_format: str = "hdf5",
) -> str:
    """Write episodes of 40 steps; `edit` may spoil the last episode's arrays, `edit_all` those of each."""
    import gymnasium
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    env = gymnasium.make("Pendulum-v1", max_episode_steps=40)
    env.action_space.seed(0)
    buffers = []
    for episode in range(num_episodes):
        observations, actions, rewards = [env.reset(seed=episode)[0]], [], []
        truncated = False
        while not truncated:
            actions.append(env.action_space.sample())
            observation, reward, _, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(float(reward))
        arrays = {
            "observations": np.array(observations),
            "actions": np.array(actions),
            "rewards": np.array(rewards),
            "terminations": np.zeros(len(rewards), dtype=bool),
            "truncations": np.arange(1, len(rewards) + 1) == len(rewards),
        }
        if edit_all is not None:
            edit_all(arrays)
        if edit is not None and episode == num_episodes - 1:
            edit(arrays)
        buffers.append(EpisodeBuffer(id=episode, **arrays))
    kwargs = {"ref_min_score": -1200.0, "ref_max_score": -150.0} if references else {}
    minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        env=env,
        eval_env=env.spec,
        algorithm_name="random",
        author="tests",
        author_email="t@example.org",
        code_permalink="tests",
        description="random actions",
        data_format=data_format,
        **kwargs,
    )
    env.close()
    return dataset_id


def wait_for(condition: Callable[[], object], timeout_s: float = 120.0) -> object:
    """Return the first truth that a condition gives, asked twenty times a second."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.fixture
def tiny_config() -> Callable[..., object]:
    """A function that returns a config of a few steps for a data set; dotted keys replace settings."""
    from aepo import config as configs
    from aepo import tasks
    from aepo.presets import preset

    def make(
        dataset_id: str = "tests/pendulum/random-v0", seed: int = 0, method: str = "best", **overrides: object
    ) -> object:
        base = preset(f"{method}-smoke", tasks.for_dataset(dataset_id), seed)
        small = {
            f"{stage}.{key}": value
            for stage in base.stages
            for key, value in (("steps", 60), ("batch_size", 16), ("hidden_size", 16), ("num_layers", 2))
        }
        return configs.with_overrides(
            base, {**small, **{key.replace("__", "."): value for key, value in overrides.items()}}
        )

    return make


def random_transitions(num: int = 500, state_dim: int = 3, action_dim: int = 2, seed: int = 0):
    """Transitions of unit scale, made without a data set: random states, actions and rewards that depend on them."""
    from aepo.data.transitions import Spaces, Transitions

    generator = torch.Generator().manual_seed(seed)
    width = 2 * state_dim + action_dim + 2
    rows = torch.randn(num, width, generator=generator)
    actions = rows[:, state_dim : state_dim + action_dim]
    actions.mul_(0.2).add_(rows[:, :1].tanh()).clamp_(-1, 1)  # a behaviour to learn
    rows[:, state_dim + action_dim] = rows[:, 0] + 2 * rows[:, state_dim]  # reward: learnable
    rows[:, state_dim + action_dim + 1] = (rows[:, state_dim + action_dim + 1] > 1.5).float()
    spaces = Spaces(
        state_mean_S=torch.zeros(state_dim),
        state_scale_S=torch.ones(state_dim),
        action_low_A=-torch.ones(action_dim),
        action_high_A=torch.ones(action_dim),
    )
    return Transitions(
        rows_ND=rows,
        shift_D=torch.zeros(width),
        scale_D=torch.ones(width),
        spaces=spaces,
        digest="random",
        episode_ends_E=torch.tensor([num]),
    )


@pytest.fixture
def transitions():
    """Random transitions, [500], S = 3, A = 2."""
    return random_transitions()
