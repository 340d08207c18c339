"""The judge of a refactor: 20 fixed steps of every stage against losses that were stored when they were right.

Rewrite the file on purpose, never to make a test pass: python -m tests.aepo.test_golden
"""

import json

import pytest
import torch

from aepo import config as configs
from aepo import pipeline, tasks
from aepo.presets import preset
from tests import ROOT
from tests.examples import random_transitions

FOLDER = ROOT / "tests" / "golden"
SEEDS = (0, 3)
"""A seed above 0 shows whether a stage's random numbers depend on more than its name and the seed."""
EVERY = {"steps": 20, "batch_size": 32, "hidden_size": 32, "num_layers": 2, "learning_rate": 1e-3}
CRITIC = {"discount": 0.99, "target_rate": 0.005}
EXPECTILE = {"expectile": 0.7, "backup_steps": 1}
SUPPORT = {"num_samples": 16, "num_support_states": 100}
BETAS = {"beta_min": 0.1, "beta_max": 10.0}
SETTINGS = {
    "best": {
        "behavior": {"ema_decay": 0.995, "variance": "learned"},
        "critic": {"learner": "expectile", **CRITIC, **EXPECTILE, "backup_steps": 3},
        "energy": {"target": "log_expectation", "ema_decay": 0.995, **BETAS},
    },
    "analytic": {
        "behavior": {"ema_decay": 0.995, "variance": "time"},
        "critic": {"learner": "expectile", **CRITIC, **EXPECTILE},
        "energy": {"target": "analytic", "ema_decay": 0.995, "expansion": "posterior_mean"},
    },
    "qgpo": {
        "behavior": {"ema_decay": 0.995, "variance": "time"},
        "critic": {"learner": "softmax_in_support", **CRITIC, **SUPPORT, "backup_beta": 1.0},
        "energy": {"target": "contrastive", "ema_decay": 0.995, **SUPPORT, **BETAS},
    },
    "iql": {
        "critic": {"learner": "expectile", **CRITIC, **EXPECTILE},
        "actor": {"inverse_temperature": 3.0},
    },
    "td3bc": {
        "actor_critic": {**CRITIC, "q_weight": 2.5, "policy_noise": 0.2, "noise_clip": 0.5, "actor_interval": 2},
    },
}
"""Every setting is given here, so that presets can change."""


def file_of(seed):
    return FOLDER / f"losses-{seed}.json"


def losses(method, seed):
    """Every metric of every step."""
    torch.set_num_threads(1)
    base = preset(f"{method}-smoke", tasks.for_dataset("golden"), seed)
    overrides = {f"{stage}.{key}": value for stage in base.stages for key, value in EVERY.items()} | {
        f"{stage}.{key}": value for stage, values in SETTINGS[method].items() for key, value in values.items()
    }
    config = configs.with_overrides(base, overrides)
    rows = pipeline.train(config, random_transitions(), device=torch.device("cpu"))
    return [{"stage": p.stage, "step": p.step, **p.metrics} for p in rows]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", SETTINGS)
def test_twenty_steps_of_every_stage_give_the_stored_losses(method, seed):
    stored, now = json.loads(file_of(seed).read_text())[method], losses(method, seed)
    assert len(now) == len(stored) == 20 * len(SETTINGS[method])
    for was, is_ in zip(stored, now, strict=True):
        # other processors round differently; 20 steps let that grow to less than this
        assert (is_.pop("stage"), is_.pop("step")) == (was.pop("stage"), was.pop("step"))
        assert is_ == pytest.approx(was, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    for seed in SEEDS:
        parts = {method: ",\n".join(map(json.dumps, losses(method, seed))) for method in SETTINGS}
        text = ",\n".join(f'"{method}": [\n{rows}\n]' for method, rows in parts.items())
        file_of(seed).write_text("{\n" + text + "\n}\n")
