"""Configs as they are written stay the same runs: fingerprints that were stored when runs were made under them.

Rewrite the file only for configs that are new, never to make a test pass: python -m tests.aepo.test_fingerprints
"""

import contextlib
import json

import pytest

from aepo import tasks
from aepo.budgets import BUDGETS
from aepo.config import with_overrides
from aepo.errors import ConfigError
from aepo.presets import preset
from tests import ROOT

FILE = ROOT / "tests" / "golden" / "fingerprints.json"
TASKS = ("hopper-medium-v2", "maze2d-umaze-v1", "antmaze-umaze-v2", "pen-human-v1", "kitchen-complete-v0", "a/b-v0")
"""One of each suite, and a user's own data set."""
SEEDS = (0, 3)
CHANGES = (
    {"rounds": (0.1, 1.0)},
    {"critic.learner": "softmax_in_support", "critic.num_samples": 5},
    {"critic.backup_steps": 7, "critic.precision": "bfloat16"},
    {"energy.target": "analytic", "energy.expansion": "posterior_mean"},
    {"energy.target": "analytic_second_order", "energy.beta_max": 20.0},
    {"energy.target": "monte_carlo", "energy.num_samples": 32},
    {"energy.target": "mse"},
    {"energy.target": "weighted_denoising"},
    {"energy.target": "contrastive", "energy.num_support_states": 500},
    {"behavior.variance": "learned", "sampling.beta": 3.0},
    {"evaluation.grid_beta": "1,3", "evaluation.grid_guidance_scale": "1,3"},
    {"actor.inverse_temperature": 10.0},
    {"actor_critic.q_weight": 1.0},
)


def fingerprints():
    """Every preset on a few tasks and seeds, and one of each method with settings changed."""
    found = {}
    for method in ("best", "analytic", "qgpo", "iql", "td3bc"):
        for budget in BUDGETS:
            for name in TASKS:
                task = tasks.table().get(name) or tasks.for_dataset(name)
                for seed in SEEDS:
                    found[f"{method}-{budget} {name} {seed}"] = preset(f"{method}-{budget}", task, seed).fingerprint
        base = preset(f"{method}-quick", tasks.find("hopper-medium-v2"), 0)
        for change in CHANGES:
            with contextlib.suppress(ConfigError):  # a setting that the method does not have
                found[f"{method} {json.dumps(change)}"] = changed(base, change).fingerprint
    return found


def changed(base, change):
    if "rounds" not in change:
        return with_overrides(base, change)
    return type(base)(**{name: getattr(base, name) for name in base.__dataclass_fields__} | change)


@pytest.fixture(scope="module")
def now():
    return fingerprints()


def test_every_stored_fingerprint_is_that_of_the_same_config_today(now):
    stored = json.loads(FILE.read_text())
    assert len(stored) > 200
    assert {name: now.get(name) for name in stored} == stored
    assert len(set(stored.values())) == len(stored)


if __name__ == "__main__":
    FILE.write_text(json.dumps(fingerprints(), indent=0) + "\n")
