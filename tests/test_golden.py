"""The judge of a refactor: 20 fixed steps of every stage against losses that were stored when they were right.

Rewrite the file on purpose, never to make a test pass: python -m tests.test_golden
"""

import json
from pathlib import Path

import pytest
import torch

from aepo import config as configs
from aepo import pipeline, tasks
from aepo.presets import preset
from tests.conftest import random_transitions

FILE = Path(__file__).parent / "golden" / "losses.json"


def losses():
    """Every metric of every step; every setting is given here, so that presets can change."""
    torch.set_num_threads(1)
    every = {"steps": 20, "batch_size": 32, "hidden_size": 32, "num_layers": 2, "learning_rate": 1e-3}
    overrides = {f"{stage}.{key}": value for stage in pipeline.STAGES for key, value in every.items()} | {
        "behavior.ema_decay": 0.995,
        "critic.expectile": 0.7,
        "critic.discount": 0.99,
        "critic.target_rate": 0.005,
        "energy.ema_decay": 0.995,
        "energy.expansion": "posterior_mean",
    }
    config = configs.with_overrides(preset("smoke", tasks.for_dataset("golden"), 0), overrides)
    rows = pipeline.train(config, random_transitions(), device=torch.device("cpu"))
    return [{"stage": p.stage, "step": p.step, **p.metrics} for p in rows]


def test_twenty_steps_of_every_stage_give_the_stored_losses():
    stored, now = json.loads(FILE.read_text()), losses()
    assert len(now) == len(stored) == 60
    for was, is_ in zip(stored, now, strict=True):
        # other processors round differently; 20 steps let that grow to less than this
        assert (is_.pop("stage"), is_.pop("step")) == (was.pop("stage"), was.pop("step"))
        assert is_ == pytest.approx(was, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in losses()) + "\n]\n")
