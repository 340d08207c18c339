"""Training to the end, its whole state to compare, and a task whose best action is a formula."""

import torch

from aepo import checkpoint, pipeline
from aepo.data.transitions import Spaces, Transitions

CPU = torch.device("cpu")


def weights(state):
    """All tensors of a state as one dict of copies."""
    flat = {}

    def walk(prefix, value):
        if isinstance(value, torch.Tensor):
            flat[prefix] = value.clone()
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(f"{prefix}.{i}", item)
        else:
            flat[prefix] = value

    walk("", checkpoint.collect(state))
    return flat


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) if isinstance(first[key], torch.Tensor) else first[key] == second[key]
        for key in first
    )


def finish(config, data, resume=None):
    *_, last = pipeline.train(config, data, device=CPU, resume=resume)
    return weights(last.states)


def best_action(states_NS):
    """A smooth function of the state, away from the middle and the edge of the action range."""
    return torch.stack([0.6 * torch.sin(2 * states_NS[:, 0]), 0.5 * torch.cos(states_NS[:, 1])], dim=1)


def bandit(num=20_000):
    """Uniform actions, reward 1 - |a - a*(s)|^2, every step terminal."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num, 2, generator=generator)
    actions = 2 * torch.rand(num, 2, generator=generator) - 1
    rewards = 1 - (actions - best_action(states)).square().sum(1, keepdim=True)
    rows = torch.cat([states, actions, rewards, torch.ones(num, 1), states], dim=1)
    spaces = Spaces(
        state_mean_S=torch.zeros(2),
        state_scale_S=torch.ones(2),
        action_low_A=-torch.ones(2),
        action_high_A=torch.ones(2),
    )
    width = rows.shape[1]
    return Transitions(
        rows_ND=rows,
        shift_D=torch.zeros(width),
        scale_D=torch.ones(width),
        spaces=spaces,
        digest="bandit",
        episode_ends_E=torch.arange(1, num + 1),
    )


def share_of_optimum(policy):
    """How far a policy's actions in the bandit lead from uniform ones, 0, to the best in every state, 1."""
    states = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    actions = torch.as_tensor(policy.act(states, torch.Generator().manual_seed(2)))
    reward = float(1 - (actions - best_action(states)).square().sum(1).mean())
    uniform = float(1 - 2 / 3 - best_action(states).square().sum(1).mean())  # exact for uniform actions
    return (reward - uniform) / (1 - uniform)
