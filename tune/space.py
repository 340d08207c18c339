"""What a search varies: a TOML file typed against the config, and draws from it that depend on nothing but the record.

A trial's draw is a function of the search's seed, the trial's number and, for TPE, of the trials before it, so that
a search which is broken off and continued draws what it would have drawn.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from aepo import config as configs
from aepo.config import RunConfig
from aepo.documents import read_toml
from aepo.errors import ConfigError
from aepo.trials import Sampler, SpaceText, State, Trial

GRID = ("sampling.beta", "sampling.guidance_scale")
"""Settings that need no training: every pair is tried on every policy, and the best counts."""
CHOICES = ("critic.learner", "energy.target")
"""Settings that decide which other settings there are."""
ATTEMPTS = 100
"""Draws of a setting that is new, until the space counts as exhausted."""
STATES: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "waiting": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclasses.dataclass(frozen=True)
class Space:
    """Settings to vary and how."""

    varied: dict[str, BaseDistribution]
    """Dotted key -> the values it may take."""
    grid: dict[str, tuple[float, ...]]
    """sampling.beta and sampling.guidance_scale -> the values to try on a trained policy."""

    def to_text(self) -> SpaceText:
        """Return it as search.json holds it."""
        varied = {key: optuna.distributions.distribution_to_json(kind) for key, kind in self.varied.items()}
        return SpaceText(varied=varied, grid=self.grid)

    def apply(self, params: Mapping[str, Any], base: RunConfig) -> RunConfig:
        """Return a run with the drawn settings; those that the drawn learner or target does not have are left out.

        Raises:
            ConfigError: if they contradict each other.
        """
        choices = {key: params[key] for key in CHOICES if key in params}
        if "sampling.beta" in self.grid:  # the preset's may be none that a drawn target is trained for
            choices["sampling.beta"] = self.grid["sampling.beta"][0]
        chosen = configs.with_overrides(base, choices)
        used = configs.used_settings(chosen)
        chosen = configs.with_overrides(chosen, {key: params[key] for key in params if key in used})
        if not self.grid:
            return chosen
        values = configs.flatten(dataclasses.asdict(chosen))
        grid = {f"evaluation.grid_{key.removeprefix('sampling.')}": self.grid.get(key, (values[key],)) for key in GRID}
        return configs.with_overrides(chosen, grid)


def default_space(suites: Sequence[str]) -> Path:
    """Return the repository's space for these suites: the suite's own if they are one and it has one."""
    folder = Path(str(files("tune").joinpath("spaces")))
    own = folder / f"{suites[0]}.toml"
    return own if len(set(suites)) == 1 and own.exists() else folder / "default.toml"


def read_space(path: Path, bases: Sequence[RunConfig]) -> Space:
    """Return the space of a file, every value of it tried on the configs that it will change.

    Args:
        path: TOML, a table per part of the config, as in tune/spaces/default.toml.
        bases: configs of all tasks of the search.

    Raises:
        ConfigError: if the file cannot be read, a setting is unknown, a value out of its range, or a pair of
            a target and a learner contradicts itself.
    """
    document = read_toml(path, kind="search space")
    varied: dict[str, BaseDistribution] = {}
    grid: dict[str, tuple[float, ...]] = {}
    for group, settings in document.items():
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: {group} stands outside a table; wanted [critic] and the like above it")
        for name, wanted in settings.items():
            key = f"{group}.{name}"
            _check_key(path, key, bases)
            if key in GRID:
                grid[key] = _grid(path, key, wanted)
            else:
                varied[key] = _distribution(path, key, wanted, bases[0])
    if not varied and not grid:
        raise ConfigError(f"{path} varies nothing")
    space = Space(varied, grid)
    _try(path, space, bases)
    return space


def _check_key(path: Path, key: str, bases: Sequence[RunConfig]) -> None:
    group, _, name = key.partition(".")
    for base in bases:
        if group in ("data", "evaluation") or name == "steps":
            raise ConfigError(
                f"{path}: {key} is not searched: it would change what is compared, not how well it does; leave it out"
            )
        if key not in configs.settings(base):
            try:
                configs.with_overrides(base, {key: ""})
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None


def _grid(path: Path, key: str, wanted: Any) -> tuple[float, ...]:
    numbers = isinstance(wanted, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in wanted)
    if not numbers or not wanted or min(wanted) <= 0:
        raise ConfigError(f"{path}: {key} wants a list of numbers above 0, all tried on each policy; got {wanted!r}")
    values = tuple(float(value) for value in dict.fromkeys(wanted))
    if len({f"{value:g}" for value in values}) < len(values):  # cells are known by that to those who follow a run
        raise ConfigError(f"{path}: {key} wants numbers that differ in their first six digits; got {wanted!r}")
    return values


def _distribution(path: Path, key: str, wanted: Any, base: RunConfig) -> BaseDistribution:
    group, _, name = key.partition(".")
    present = dataclasses.asdict(base)[group][name]
    if isinstance(wanted, list) and wanted and all(isinstance(value, str | int | float) for value in wanted):
        return CategoricalDistribution(list(dict.fromkeys(wanted)))
    if isinstance(wanted, dict) and len(wanted) == 1 and isinstance(present, int | float):
        ((kind, bounds),) = wanted.items()
        if kind in ("log", "uniform") and isinstance(bounds, list) and len(bounds) == 2:
            try:
                low, high = bounds
                if not isinstance(present, int):
                    return FloatDistribution(low, high, log=kind == "log")
                if not isinstance(low, int) or not isinstance(high, int):
                    raise ValueError(f"whole numbers wanted, got {low!r} and {high!r}")
                return IntDistribution(low, high, log=kind == "log")
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}: {key} = {wanted}: {error}; wanted two numbers, ascending") from None
    raise ConfigError(
        f"{path}: {key} wants a list of values{', {log = [a, b]} or {uniform = [a, b]}' * (present is not None)}; "
        f"got {wanted!r}"
    )


def _try(path: Path, space: Space, bases: Sequence[RunConfig]) -> None:
    """Apply every value and both ends of every range, with every learner and target of the space."""
    ends = {
        key: list(kind.choices) if isinstance(kind, CategoricalDistribution) else [kind.low, kind.high]  # type: ignore[attr-defined]
        for key, kind in space.varied.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    trials = [first | {key: value} for key, values in ends.items() for value in values]
    for learner in ends.get("critic.learner", [None]):
        for target in ends.get("energy.target", [None]):
            own = {"critic.learner": learner, "energy.target": target}
            trials += [trial | {k: v for k, v in own.items() if v is not None} for trial in (trials or [{}])[:]]
    for base in bases:
        for params in trials:
            try:
                space.apply(params, base)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None


def preset_draw(space: Space, base: RunConfig) -> dict[str, Any] | None:
    """Return the preset's own settings as a draw; None if one of them lies outside of the space."""
    params = {key: dataclasses.asdict(base)[key.partition(".")[0]][key.partition(".")[2]] for key in space.varied}
    try:
        inside = all(kind._contains(kind.to_internal_repr(params[key])) for key, kind in space.varied.items())
    except ValueError:  # of a list without that value
        return None
    return params if inside else None


def draw(space: Space, sampler: Sampler, seed: int, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Return the settings of the next trial, none that a trial has had; None if the space is exhausted.

    Args:
        space: what to draw from.
        sampler: random, or Optuna's tree-structured Parzen estimator (TPE).
        seed: of the search.
        trials: the record so far.
    """
    taken = [trial.params for trial in trials]
    if not space.varied:
        return None if taken else {}
    for attempt in range(ATTEMPTS):
        params = dict(_study(space, sampler, [seed, len(trials), attempt], trials).ask(space.varied).params)
        if params not in taken:
            return params
    return None


def _study(space: Space, sampler: Sampler, seeds: Sequence[int], trials: Sequence[Trial]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = hash(tuple(seeds)) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is marked experimental
        kind: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        )
    study = optuna.create_study(sampler=kind, direction="maximize")
    study.add_trials([_frozen(space, trial) for trial in trials])
    return study


def _frozen(space: Space, trial: Trial) -> FrozenTrial:
    state = STATES[trial.state]
    scores = {row.round: row.score for row in trial.rounds}
    return create_trial(
        state=state,
        params=trial.params,
        distributions=space.varied,
        value=scores[max(scores)] if state == TrialState.COMPLETE else None,
        intermediate_values=scores,
    )
