"""The tasks: rows of tasks.csv; what differs between tasks stands there and never in an `if`.

A task of the benchmark has a row per source: `d4rl`, the original file (arXiv 2004.07219), and `minari`, the data
that Farama regenerated. They are different data, seen in different environments and normalised by different returns.
What differs between suites and methods stands in settings.csv (aepo/presets.py).
"""

import csv
import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args, get_type_hints

from aepo.errors import ConfigError

Source = Literal["d4rl", "minari", "collected", "user"]
"""d4rl: the original HDF5 file, imported; minari: downloaded by Minari; collected: made by `aepo data collect`;
user: any other Minari data set."""
RewardRule = Literal["raw", "until_goal", "return_range", "by_data"]
"""raw: as stored; until_goal: the first reward above 0 ends the episode as its terminal, and r - 1 (sparse goals, IQL's
AntMaze rule; Minari's AntMaze data go on paying, Minari issue 296);
return_range: r * 1000 / (best - worst episode return) (IQL's locomotion rule, arXiv 2110.06169);
by_data: where rewards are one of two numbers and the larger is paid once, at the end of episodes, that is success, ends
an episode as its terminal, and a step costs 1 (the flags of such data often say that the time was up, and the value of
what lies behind success would grow for ever); as return_range else."""
ReturnRule = Literal["sum", "goal", "subtasks"]
"""What evaluation counts in an episode. sum: of its rewards; goal: 1 and its end at the first reward above 0 (AntMaze);
subtasks: the distinct ones that its environment reports as done (Kitchen, which pays each step while one holds)."""


MIN_DIFFERENCE = 1e-30
"""Two reference returns are at least as far apart: processes that train take still smaller numbers for 0."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One row: the data of one source and the rules by which they are read and scored."""

    task: str
    """Name on the command line and in every table."""
    suite: str
    """Group over which scores are averaged."""
    source: Source
    """Where the data come from."""
    dataset: str
    """Minari id."""
    env_id: str = ""
    """Gymnasium id of the environment; empty = whatever the data set names."""
    state_dim: int | None = None
    """Entries of an observation, joined as `observation_keys` say; none = what the data have."""
    action_dim: int | None = None
    """Entries of an action."""
    horizon: int = 0
    """Steps of an evaluation episode; 0 = the limit of the data set's environment."""
    ref_min: float | None = None
    """Return of score 0; none = the data set's metadata say."""
    ref_max: float | None = None
    """Return of score 100."""
    steps: int | None = None
    """Rows of the published file; none = not published."""
    observation_keys: tuple[str, ...] = ()
    """Entries of a Dict observation, in the order in which they are joined; () = a plain Box, or all, sorted."""
    reward_rule: RewardRule = "return_range"
    return_rule: ReturnRule = "sum"
    discount: float = 0.99
    """gamma, per environment step."""
    origin: str = ""
    """Address of the D4RL file; or the ids of the Minari data sets that `aepo data combine` joins."""

    def __post_init__(self) -> None:
        for name, kind in (("source", Source), ("reward_rule", RewardRule), ("return_rule", ReturnRule)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"task {self.task}: {name} {getattr(self, name)!r}, wanted one of {get_args(kind)}")
        if any(dim is not None and dim < 1 for dim in (self.state_dim, self.action_dim)):
            raise ConfigError(f"task {self.task}: dimensions {self.state_dim} and {self.action_dim}, wanted at least 1")
        if self.horizon < 0 or not 0 < self.discount < 1 or (self.steps is not None and self.steps < 1):
            raise ConfigError(
                f"task {self.task}: wanted horizon >= 0, discount in (0, 1) and steps >= 1; "
                f"got {self.horizon}, {self.discount} and {self.steps}"
            )
        if (self.ref_min is None) != (self.ref_max is None):
            raise ConfigError(f"task {self.task}: one reference return of two")
        if self.ref_min is not None and self.ref_max is not None:
            check_references(self.task, self.ref_min, self.ref_max)

    def score(self, return_: float) -> float:
        """Return the normalized score of a return, 0 at `ref_min` and 100 at `ref_max` (arXiv 2004.07219).

        Raises:
            ConfigError: if the references stand in the data set and not in the row.
        """
        if self.ref_min is None or self.ref_max is None:
            raise ConfigError(f"{self.task}: the reference returns of {self.source} data stand in the data set")
        return 100.0 * (return_ - self.ref_min) / (self.ref_max - self.ref_min)


def check_references(name: str, ref_min: float, ref_max: float) -> None:
    """Raise a ConfigError unless two reference returns are finite and ascending, and so is their difference."""
    if not (math.isfinite(ref_min) and math.isfinite(ref_max) and MIN_DIFFERENCE < ref_max - ref_min < math.inf):
        raise ConfigError(f"{name}: reference returns {ref_min} and {ref_max}, wanted two finite ones, ascending")


@cache
def rows() -> tuple[Task, ...]:
    """Return all rows of tasks.csv, a task's own sources one after the other in the order of the file.

    Raises:
        ConfigError: for a row that is not one, or that stands there twice; names its line.
    """
    lines = csv.DictReader(files("aepo").joinpath("tasks.csv").read_text().splitlines(), strict=True)
    found = [_parse(row, line) for line, row in enumerate(lines, 2)]
    keys = [row.dataset for row in found] + [f"{row.task} of {row.source}" for row in found]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ConfigError(f"tasks.csv: twice: {', '.join(twice)}")
    return tuple(found)


@cache
def table() -> Mapping[str, Task]:
    """Return the row of each task by name; of several sources the first: `d4rl` for the benchmark's."""
    found: dict[str, Task] = {}
    for row in rows():
        found.setdefault(row.task, row)
    return found


def find(name: str, source: str = "") -> Task:
    """Return the row of a task.

    Args:
        name: of the task.
        source: `d4rl`, `minari` or `collected`; empty = the task's first.

    Raises:
        ConfigError: if there is none; names the nearest.
    """
    if name not in table():
        near = get_close_matches(name, table(), n=3, cutoff=0.4) or list(table())
        raise ConfigError(
            f"unknown task {name!r}; did you mean {' or '.join(near)}? "
            "`aepo data list` shows all; `--dataset ID` trains on any Minari data set"
        )
    own = {row.source: row for row in rows() if row.task == name}
    if not source:
        return table()[name]
    if source not in own:
        raise ConfigError(f"{name} has no data of source {source!r}; it has {', '.join(own)}")
    return own[source]


def of_suite(suite: str, source: str = "") -> list[Task]:
    """Return the rows of a suite: those of a source, or of the benchmark's first.

    Raises:
        ConfigError: if the suite has none; names those there are.
    """
    found = [row for row in rows() if row.suite == suite and row.source == (source or "d4rl")]
    if not found and not source:
        found = [row for row in table().values() if row.suite == suite]
    if not found:
        known = sorted({f"{row.suite} ({row.source})" for row in rows()})
        raise ConfigError(f"no suite {suite!r} with {source or 'any'} data; there are {', '.join(known)}")
    return found


def lacking(source: str, suites: Collection[str] = ()) -> list[str]:
    """Return the tasks of the benchmark, or of some of its suites, that a source has no data of."""
    benchmark = [row.task for row in rows() if row.source == "d4rl" and (not suites or row.suite in suites)]
    own = {row.task for row in rows() if row.source == source}
    return [name for name in benchmark if source and own and name not in own]


def for_dataset(dataset: str) -> Task:
    """Return the row that uses this Minari id, or a row with the defaults for a data set of the user's own."""
    for row in rows():
        if row.dataset == dataset:
            return row
    return Task(task=dataset, suite="user", source="user", dataset=dataset, reward_rule="by_data")


def _parse(row: dict[str, str], line: int) -> Task:
    """Return a row of the file as a Task; an empty cell is the field's default."""
    hints = get_type_hints(Task)
    if set(row) != set(hints) or None in row.values():
        raise ConfigError(f"tasks.csv, line {line}: wanted the columns {', '.join(hints)}")
    values: dict[str, Any] = {}
    for name, text in row.items():
        if text == "":
            continue
        try:
            values[name] = _convert(hints[name], text)
        except ValueError as error:
            raise ConfigError(f"tasks.csv, line {line}: {name}: {error}") from error
    try:
        return Task(**values)
    except TypeError as error:
        raise ConfigError(f"tasks.csv, line {line}: {error}") from error


def _convert(hint: Any, text: str) -> Any:
    if hint == tuple[str, ...]:
        return tuple(text.split())
    for kind in (int, float):
        if hint in (kind, kind | None):
            return kind(text)
    return text
