"""Full configs by name: a method, a budget, and the settings of the task's suite (settings.csv).

`quick` is `best-quick`, `qgpo` is `qgpo-quick`, and so on. At one budget every method takes the same number of
gradient steps, so that a table compares methods and not budgets.
"""

import csv
import dataclasses
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from aepo.config import (
    ActorConfig,
    ActorCriticConfig,
    BehaviorConfig,
    CriticConfig,
    DataConfig,
    EnergyConfig,
    EvaluationConfig,
    GuidedConfig,
    IQLConfig,
    Method,
    RunConfig,
    SamplingConfig,
    TD3BCConfig,
    with_overrides,
)
from aepo.errors import ConfigError
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


def best(task: Task, seed: int, budget: Budget, *, method: Method = "aepo") -> GuidedConfig:
    """AEPO with the energy target and the settings that measured best on the suite (docs/results)."""
    return GuidedConfig(
        method=method,
        behavior=budget.behavior,
        critic=dataclasses.replace(budget.critic, discount=task.discount),
        energy=budget.energy,
        sampling=SamplingConfig(num_steps=budget.num_sampling_steps),
        **_common(task, seed, budget),
    )


def analytic(task: Task, seed: int, budget: Budget) -> GuidedConfig:
    """The paper's AEPO: the closed form under a Gaussian posterior [M11]."""
    return best(task, seed, budget, method="aepo-analytic")


def qgpo(task: Task, seed: int, budget: Budget) -> GuidedConfig:
    """QGPO (arXiv 2304.12824): contrastive energy, softmax backup in the support [M8]."""
    base = best(task, seed, budget, method="qgpo")
    stages = {"energy.target": "contrastive", "critic.learner": "softmax_in_support"}
    return with_overrides(
        base, stages | {f"{stage}.num_support_states": budget.num_support_states for stage in ("critic", "energy")}
    )


def iql(task: Task, seed: int, budget: Budget) -> IQLConfig:
    """IQL (arXiv 2110.06169); the steps that others spend on diffusion and energy are its actor's."""
    critic = dataclasses.replace(budget.critic, discount=task.discount)
    actor = ActorConfig(
        steps=budget.behavior.steps + budget.energy.steps,
        batch_size=critic.batch_size,
        hidden_size=critic.hidden_size,
        num_layers=critic.num_layers,
        learning_rate=critic.learning_rate,
    )
    return IQLConfig(method="iql", critic=critic, actor=actor, **_common(task, seed, budget))


def td3bc(task: Task, seed: int, budget: Budget) -> TD3BCConfig:
    """TD3+BC (arXiv 2106.06860)."""
    critic = budget.critic
    actor_critic = ActorCriticConfig(
        steps=budget.behavior.steps + critic.steps + budget.energy.steps,
        batch_size=critic.batch_size,
        hidden_size=critic.hidden_size,
        num_layers=critic.num_layers,
        learning_rate=critic.learning_rate,
        discount=task.discount,
        target_rate=critic.target_rate,
    )
    return TD3BCConfig(method="td3bc", actor_critic=actor_critic, **_common(task, seed, budget))


METHODS: dict[str, Callable[[Task, int, Budget], RunConfig]] = {
    "best": best,
    "analytic": analytic,
    "qgpo": qgpo,
    "iql": iql,
    "td3bc": td3bc,
}


def preset(name: str, task: Task, seed: int) -> RunConfig:
    """Return the named preset for a task and a seed; left out, the method is `best` and the budget `quick`.

    Raises:
        ConfigError: for an unknown name.
    """
    full = f"best-{name}" if name in BUDGETS else f"{name}-quick" if name in METHODS else name
    method, _, budget = full.partition("-")
    if method not in METHODS or budget not in BUDGETS:
        raise ConfigError(
            f"unknown preset {name!r}; known: methods {', '.join(METHODS)}, budgets {', '.join(BUDGETS)}, "
            "or both, as in iql-paper"
        )
    config = METHODS[method](task, seed, BUDGETS[budget])
    return with_overrides(dataclasses.replace(config, preset=name), _of_suite(task.suite, method))


@cache
def _of_suite(suite: str, method: str) -> dict[str, str]:
    """Return the settings of a method: those of every suite (*), and above them the suite's own."""
    rows = list(csv.DictReader(files("aepo").joinpath("settings.csv").read_text().splitlines()))
    order = [("*", method), (suite, method)]
    return {row["setting"]: row["value"] for key in order for row in rows if (row["suite"], row["method"]) == key}


def _common(task: Task, seed: int, budget: Budget) -> dict[str, Any]:
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
