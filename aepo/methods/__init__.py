"""Methods: one file each, with its settings, stages, preset and policy, and one row of methods.csv.

Everything else finds a method by its name (`find`) and asks it; nothing outside this folder names one. A method of
another package is found by an entry point (aepo/method_table.py), so that it trains, resumes, is swept and reported
like those here. Neither this module nor a method's file loads torch before `stages` or `sampler` is called.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aepo import method_table
from aepo.budgets import Budget
from aepo.config import RunConfig, parse
from aepo.errors import ConfigError
from aepo.tasks import Task

if TYPE_CHECKING:
    from aepo.samplers import Sampler
    from aepo.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What the platform asks of a method."""

    name: str
    """The name in methods.csv, or of the entry point."""
    config: type[RunConfig]
    """The class of its runs' configs: a RunConfig with one field per stage, in the order of training."""
    preset: Callable[[Task, int, Budget], RunConfig]
    """(task, seed, budget) -> the config of a run, before the rows of settings.csv."""
    stages: Callable[[], "tuple[Stage, ...]"]
    """() -> the stages in the order of training; their names are the config's fields."""
    sampler: Callable[[Any, int, int], "Sampler"]
    """(config, dimensions of states, of actions) -> the untrained networks that act."""

    @property
    def code(self) -> str:
        """Digest of the file that the method stands in; empty for those of this folder, whose changes are reviewed."""
        module = inspect.getmodule(self.stages)
        if module is None or module.__name__.startswith("aepo.") or not module.__file__:
            return ""
        return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:24]


def stages_of(config: RunConfig) -> "list[Stage]":
    """Return the stages of a run's method that take steps, in the order of training."""
    return [stage for stage in find(config.method).stages() if stage.name in config.stages]


@cache
def find(name: str) -> Method:
    """Return the method of a name.

    Raises:
        ConfigError: for a name that nothing has, or an object that is no method of this name.
    """
    method = method_table.load(name)
    if not isinstance(method, Method) or method.name != name:
        got = f"a Method named {method.name!r}" if isinstance(method, Method) else f"a {type(method).__name__}"
        raise ConfigError(f"{method_table.rows()[name].object} is {got}, wanted a Method named {name!r}")
    return method


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Return the config that `dataclasses.asdict` (or JSON) wrote; numbers may be strings, as flags are.

    Raises:
        ConfigError: for an unknown, missing or mistyped key, or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config is an object of settings, got {str(values)[:40]!r}")
    return parse(find(str(values.get("method"))).config, values)
