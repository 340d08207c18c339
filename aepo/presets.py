"""Full configs by name: a method, a budget, and the settings of the task's suite (settings.csv).

`quick` is `best-quick`, `analytic` is `analytic-quick`, and so on.
"""

import csv
import dataclasses
from functools import cache
from importlib.resources import files

from aepo import method_table, methods
from aepo.budgets import BUDGETS
from aepo.config import RunConfig, with_overrides
from aepo.errors import ConfigError
from aepo.tasks import Task


def preset(name: str, task: Task, seed: int) -> RunConfig:
    """Return the named preset for a task and a seed; left out, the method is `best` and the budget `quick`.

    Raises:
        ConfigError: for an unknown name.
    """
    known = method_table.presets()
    full = f"best-{name}" if name in BUDGETS else f"{name}-quick" if name in known else name
    method, _, budget = full.partition("-")
    if method not in known or budget not in BUDGETS:
        raise ConfigError(
            f"unknown preset {name!r}; known: methods {', '.join(known)}, budgets {', '.join(BUDGETS)}, "
            "or both, as in best-paper"
        )
    config = methods.find(known[method]).preset(task, seed, BUDGETS[budget])
    return with_overrides(dataclasses.replace(config, preset=name), _of_suite(task.suite, method))


@cache
def _of_suite(suite: str, method: str) -> dict[str, str]:
    """Return the settings of a method: those of every suite (*), and above them the suite's own."""
    rows = list(csv.DictReader(files("aepo").joinpath("settings.csv").read_text().splitlines()))
    order = [("*", method), (suite, method)]
    return {row["setting"]: row["value"] for key in order for row in rows if (row["suite"], row["method"]) == key}
