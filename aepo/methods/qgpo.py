"""QGPO (arXiv 2304.12824): AEPO's stages with a contrastive energy and a softmax backup in the support [M8].

Both losses are over actions that the behaviour policy draws once, before the stage's first step.
"""

import dataclasses

from aepo.budgets import Budget
from aepo.config import with_overrides
from aepo.methods.aepo import AEPO, GuidedConfig, best
from aepo.tasks import Task


def preset(task: Task, seed: int, budget: Budget) -> GuidedConfig:
    """Return QGPO's config: the target, the learner, and as many support states as the budget has."""
    settings = {"energy.target": "contrastive", "critic.learner": "softmax_in_support"}
    support = {f"{stage}.num_support_states": budget.num_support_states for stage in ("critic", "energy")}
    return with_overrides(best(task, seed, budget, method="qgpo"), settings | support)


QGPO = dataclasses.replace(AEPO, name="qgpo", preset=preset)
