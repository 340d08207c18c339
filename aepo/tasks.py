"""The tasks: one row of tasks.csv each; what differs between tasks stands there and never in an `if`.

What differs between suites and methods stands in settings.csv (aepo/presets.py).
"""

import csv
import dataclasses
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from aepo.errors import ConfigError

RewardRule = Literal["raw", "minus_one", "return_range"]
"""raw: as stored; minus_one: r - 1 (sparse goals, IQL's AntMaze rule);
return_range: r * 1000 / (best - worst episode return) (IQL's locomotion rule, arXiv 2110.06169)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One row: the data and the rules by which they are read."""

    task: str
    """Name on the command line and in every table."""
    suite: str
    """Group over which scores are averaged."""
    source: str
    """Where the data come from: `collected` (by `aepo data collect`) or `user` (any Minari data set)."""
    dataset: str
    """Minari id."""
    observation_keys: tuple[str, ...] = ()
    """Entries of a Dict observation, in the order in which they are joined; () = a plain Box, or all, sorted."""
    reward_rule: RewardRule = "return_range"
    horizon: int = 0
    """Steps of an evaluation episode; 0 = the limit of the data set's environment."""
    discount: float = 0.99
    """gamma, per environment step."""

    def __post_init__(self) -> None:
        if self.reward_rule not in get_args(RewardRule):
            raise ConfigError(
                f"task {self.task}: reward_rule {self.reward_rule!r}, wanted one of {get_args(RewardRule)}"
            )


@cache
def table() -> dict[str, Task]:
    """Return all rows of tasks.csv by name."""
    text = files("aepo").joinpath("tasks.csv").read_text()
    rows = [_parse(row) for row in csv.DictReader(text.splitlines())]
    return {row.task: row for row in rows}


def find(name: str) -> Task:
    """Return the row of a task.

    Raises:
        ConfigError: if there is none; names the nearest.
    """
    if name in (rows := table()):
        return rows[name]
    near = get_close_matches(name, rows, n=3, cutoff=0.4) or list(rows)
    raise ConfigError(
        f"unknown task {name!r}; did you mean {' or '.join(near)}? "
        "`aepo data list` shows all; `--dataset ID` trains on any Minari data set"
    )


def for_dataset(dataset: str) -> Task:
    """Return the row that uses this Minari id, or a row with the defaults for a data set of the user's own."""
    for row in table().values():
        if row.dataset == dataset:
            return row
    return Task(task=dataset, suite="user", source="user", dataset=dataset)


def _parse(row: dict[str, str]) -> Task:
    return Task(
        task=row["task"],
        suite=row["suite"],
        source=row["source"],
        dataset=row["dataset"],
        observation_keys=tuple(row["observation_keys"].split()),
        reward_rule=row["reward_rule"],  # type: ignore[arg-type]  # checked in __post_init__
        horizon=int(row["horizon"]),
        discount=float(row["discount"]),
    )
