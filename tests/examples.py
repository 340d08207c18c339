"""Transitions, a Minari data set and a trial that many test files train on; waiting for what happens elsewhere."""

import time
from collections.abc import Callable

import numpy as np
import torch

from aepo.trials import Round, Trial


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


def trial(number, scores=(), state="running", params=None):
    rounds = [
        Round(
            round=i + 1,
            score=score,
            scores={},
            beta=None,
            guidance_scale=None,
            steps_reused=0,
            at=float(10 * i + number),
        )
        for i, score in enumerate(scores)
    ]
    params = params or {"critic.expectile": 0.5, "energy.learning_rate": 1e-4 * (number + 1)}
    runs, steps = [f"run-{number}"], [20, 60, 180]
    return Trial(number=number, params=params, used=params, runs=runs, steps=steps, state=state, rounds=rounds)
