"""Learning to a known optimum: one-step tasks whose best action is a formula."""

import dataclasses

import pytest
import torch

from aepo import config as configs
from aepo import pipeline, tasks
from aepo.policy import Policy
from aepo.presets import preset
from tests.training import bandit, share_of_optimum


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "beta", "scale", "precision"),
    [
        ("analytic/posterior_mean", 1.0, 10.0, "float32"),
        ("analytic/data_action", 1.0, 10.0, "float32"),
        ("analytic/data_action", 1.0, 10.0, "bfloat16"),
        ("log_expectation", 3.0, 3.0, "float32"),
        ("weighted_denoising", 3.0, 3.0, "float32"),
    ],
)
def test_guidance_finds_the_best_action_and_cloning_does_not(target, beta, scale, precision):
    size = {"steps": 1500, "batch_size": 256, "hidden_size": 64, "num_layers": 2, "learning_rate": 2e-3}
    size["precision"] = precision
    base = preset("smoke", tasks.for_dataset("bandit"), 0)
    overrides = {f"{stage}.{key}": value for stage in base.stages for key, value in size.items()}
    overrides |= {"energy.target": target.partition("/")[0], "critic.expectile": 0.5, "critic.backup_steps": 1}
    if "/" not in target:  # they learn every beta at once
        overrides |= {"energy.steps": 4000, "energy.batch_size": 512}
    else:
        overrides["energy.expansion"] = target.partition("/")[2]
    config = configs.with_overrides(base, overrides | {"sampling.temperature": 1.0})
    data = bandit()
    *_, last = pipeline.train(config, data, device=torch.device("cpu"))
    policy = Policy.from_state(config, last.states, data)

    def share(guidance_scale):
        sampling = dataclasses.replace(config.sampling, beta=beta, guidance_scale=guidance_scale, num_steps=15)
        return share_of_optimum(policy.with_sampling(sampling))

    assert share(0.0) == pytest.approx(0.0, abs=0.1)
    assert share(scale) > 2 / 3
