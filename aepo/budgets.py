"""Budgets: steps, sizes and rates from which a method's preset makes its stages.

At one budget every method takes the same number of gradient steps, so that a table compares methods and not budgets.
"""

import dataclasses
from typing import Any

from aepo.config import BehaviorConfig, CriticConfig, DataConfig, EnergyConfig, EvaluationConfig
from aepo.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Steps, sizes and rates of the stages."""

    behavior: BehaviorConfig
    critic: CriticConfig
    energy: EnergyConfig
    evaluation: EvaluationConfig
    num_support_states: int
    """States in which QGPO draws support actions, once for the critic and once for the energy."""
    num_sampling_steps: int = 6


BUDGETS = {
    # the published budgets of the closest methods (QGPO, IQL): a GPU and hours
    "paper": Budget(
        behavior=BehaviorConfig(
            steps=600_000, batch_size=4096, learning_rate=1e-4, ema_decay=0.999, hidden_size=512, num_layers=4
        ),
        critic=CriticConfig(steps=1_000_000, batch_size=256, hidden_size=256, num_layers=3),
        energy=EnergyConfig(steps=500_000, batch_size=1024, ema_decay=0.999, hidden_size=512, num_layers=4),
        evaluation=EvaluationConfig(num_episodes=100, num_curve_points=9, num_curve_episodes=20),
        num_support_states=1_000_000,
    ),
    # minutes on one core: enough to see the method work on small tasks
    "quick": Budget(
        behavior=BehaviorConfig(steps=5000, batch_size=1024, learning_rate=1e-3, hidden_size=256, num_layers=3),
        critic=CriticConfig(
            steps=6000,
            batch_size=256,
            hidden_size=256,
            num_layers=2,
            learning_rate=1e-3,
            target_rate=0.05,  # values must travel through the data in 6,000 steps
        ),
        energy=EnergyConfig(steps=4000, batch_size=256, learning_rate=2e-3, hidden_size=256, num_layers=3),
        evaluation=EvaluationConfig(num_episodes=50, num_curve_points=3, num_curve_episodes=10),
        num_support_states=20_000,
    ),
    # seconds: shows that a data set loads, trains and evaluates; its scores mean nothing
    "smoke": Budget(
        behavior=BehaviorConfig(steps=300, batch_size=128, learning_rate=1e-3, hidden_size=64, num_layers=2),
        critic=CriticConfig(steps=300, batch_size=128, learning_rate=1e-3, hidden_size=64, num_layers=2),
        energy=EnergyConfig(steps=300, batch_size=128, learning_rate=1e-3, hidden_size=64, num_layers=2),
        evaluation=EvaluationConfig(num_episodes=2),
        num_support_states=1000,
        num_sampling_steps=5,
    ),
}


def joint(task: Task, budget: Budget) -> dict[str, Any]:
    """Return the settings of a method's only stage, which takes the steps that others spend on three."""
    critic = budget.critic
    return {
        "steps": budget.behavior.steps + critic.steps + budget.energy.steps,
        "batch_size": critic.batch_size,
        "hidden_size": critic.hidden_size,
        "num_layers": critic.num_layers,
        "learning_rate": critic.learning_rate,
        "discount": task.discount,
        "target_rate": critic.target_rate,
    }


def common(task: Task, seed: int, budget: Budget) -> dict[str, Any]:
    """Return the fields of a run's config that all methods have, but for its name."""
    return {
        "task": task.task,
        "suite": task.suite,
        "seed": seed,
        "preset": "",
        "data": DataConfig(
            dataset=task.dataset,
            source=task.source,
            env_id=task.env_id,
            observation_keys=task.observation_keys,
            reward_rule=task.reward_rule,
            return_rule=task.return_rule,
            ref_min=task.ref_min,
            ref_max=task.ref_max,
        ),
        "evaluation": dataclasses.replace(budget.evaluation, horizon=task.horizon),
    }
