"""What a plan will take: seconds per run from step rates measured here, and memory per run."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from rich.progress import track

from aepo import pipeline
from aepo.config import RunConfig, with_overrides
from aepo.console import err
from aepo.data.transitions import Transitions
from aepo.runs import run

SECONDS = 0.4
"""Per stage measured."""
BASE_GIB = {"train": 1.2, "inline": 0.6}
"""By runner, half above what was measured: processes of one running trial (docs/operations.md)."""
MAX_ACTION_DIM = 30
"""Largest number of action dimensions among the benchmark's tasks; memory is estimated before data are read."""
MEASURED_SUPPORT = 512
"""States with support actions while rates are measured; drawing them is preparation, not a step."""


def seconds_per_run(plan: Sequence[RunConfig], *, cpus: float, gpus: float) -> dict[str, float]:
    """Return run name -> seconds of its gradient steps on this machine; evaluation and preparation are not in it.

    One run of each kind is measured: same settings, same dimensions of states and actions.
    """
    run.set_up_torch(max(1, min(int(cpus), os.cpu_count() or 1)))
    device = run.select_device("auto" if gpus else "cpu")
    kinds: dict[Any, list[RunConfig]] = {}
    datasets: dict[Any, Transitions] = {}
    for config in plan:
        if config.data not in datasets:
            datasets[config.data] = run.load_data(config)
        data = datasets[config.data]
        same = dataclasses.replace(config, task="", suite="", preset="", seed=0, data=plan[0].data)
        kinds.setdefault((same, data.state_dim, data.action_dim), []).append(config)
    seconds: dict[str, float] = {}
    shown = track(
        kinds.values(),
        description="measuring step rates",
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    for configs in shown:
        first = configs[0]
        rates = pipeline.measure_rates(_light(first), datasets[first.data].to(device), device=device, seconds=SECONDS)
        total = sum(stage.steps / rates[name] for name, stage in first.stages.items())
        seconds |= {config.name: total for config in configs}
    return seconds


def work(config: RunConfig) -> float:
    """Return a rough measure of a run's length for ordering: weights times rows, summed over its steps."""
    return float(
        sum(
            stage.steps * stage.batch_size * stage.num_layers * stage.hidden_size**2 for stage in config.stages.values()
        )
    )


def memory_gib(config: RunConfig, runner: str) -> float:
    """Return the memory of a run: processes, and the support actions that a stage keeps; data are shared."""
    support = sum(math.prod(stage.support) for stage in config.stages.values()) * MAX_ACTION_DIM * 4
    return BASE_GIB[runner] + support / 2**30


def _light(config: RunConfig) -> RunConfig:
    """Return the same steps with little preparation."""
    changes = {
        f"{name}.num_support_states": MEASURED_SUPPORT
        for name, stage in config.stages.items()
        if stage.support[0] > MEASURED_SUPPORT
    }
    return with_overrides(config, changes)
