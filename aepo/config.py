"""What a run is made of: frozen dataclasses, one per stage, checked when made; the fingerprint.

A run has the stages of its method. Equal configs are the same run and resume; configs that differ in any field
never share a folder.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from aepo.errors import ConfigError
from aepo.names import bounded
from aepo.tasks import ReturnRule, RewardRule, Source, check_references

Expansion = Literal["posterior_mean", "data_action"]
"""Points at which Q is expanded in [M11]."""

VarianceEstimate = Literal["time", "learned"]
Precision = Literal["float32", "tf32", "bfloat16"]
MAX_COUNT = 2**31 - 1
"""Seeds, steps and samples are at most so many, because libraries count in 32 bits."""
SELECT_NATS = (0.3, 1.0, 3.0)
"""Budgets among which, and cloning, a run chooses that has no heat map (`evaluation.select_episodes`)."""
MAX_VARIANT = 40
"""Characters in the name of a variant, which heads a column."""
Activation = Literal["silu", "relu"]
"""Activations between a network's layers; where a gradient by the action is used, SiLU gives a smooth one."""


Ask = Literal["data", "posterior", "slope", "curvature", "draws", "support"]
"""What an energy target is given of a batch: Q of the data's actions; the posterior [M9, M10]; with it Q and its slope,
or its curvature too, at the point of expansion c [M11]; with it standard normal draws; or, in place of the data's
actions, several of stage 1 in one state, with their Q.
"""


class Choice(Protocol):
    """A value of a setting on which it depends what other settings a stage has."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings that this value uses and another does not."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CriticLearner:
    """A way to value the next state in stage 2; its loss is in aepo/stages/critic.py."""

    settings: tuple[str, ...]
    """Settings that this learner uses and another does not."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnergyTarget:
    """An energy target says what stage 3 learns; its loss is in aepo/stages/targets.py."""

    asks: tuple[Ask, ...] = ()
    """The loss is given these quantities of a batch."""
    takes_beta: bool = True
    """Whether beta is an input of the network, which then knows the range trained.

    If not, the target is a polynomial in beta: two heads, any beta after training.
    """

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings that this target uses and another does not."""
        needs: dict[Ask, tuple[str, ...]] = {
            "slope": ("expansion",),
            "curvature": ("expansion",),
            "draws": ("num_samples",),
            "support": ("num_samples", "num_support_states"),
        }
        return tuple(name for ask in self.asks for name in needs.get(ask, ())) + BETAS * self.takes_beta


BETAS = ("beta_min", "beta_max")
CRITIC_LEARNERS = {
    "expectile": CriticLearner(settings=("expectile", "backup_steps")),
    "softmax_in_support": CriticLearner(settings=("num_samples", "num_support_states", "backup_beta")),
}
"""Expectile regression [M6], or a backup over actions of stage 1 [M8]."""
ENERGY_TARGETS = {
    "analytic": EnergyTarget(asks=("posterior", "slope"), takes_beta=False),
    "analytic_second_order": EnergyTarget(asks=("posterior", "curvature")),
    "monte_carlo": EnergyTarget(asks=("posterior", "draws")),
    "mse": EnergyTarget(asks=("data",), takes_beta=False),
    "log_expectation": EnergyTarget(asks=("data",)),
    "weighted_denoising": EnergyTarget(asks=("data", "posterior")),
    "contrastive": EnergyTarget(asks=("support",)),
}
"""The targets by name; `aepo.stages.targets.register` adds one with its loss."""


def setting(
    default: Any = dataclasses.MISSING,
    interval: str = "",
    *,
    uses: Mapping[str, Choice] | None = None,
    later: bool = False,
) -> Any:
    """Return a dataclass field and what is checked of its value.

    Args:
        default: the field's default; none given = the field must be.
        interval: where a number lies, as in "(0, 1]"; a whole number without an upper end has MAX_COUNT.
        uses: the values of a choice, each with the settings that it uses.
        later: the field came after runs were made: at its default it changes no identity (`identifying_fields`).
    """
    return dataclasses.field(default=default, metadata={"interval": interval, "uses": uses or {}, "later": later})


def _check(config: object, **intervals: str) -> None:
    """Raise a ConfigError for the first setting that is out of its interval or values, or that a choice does not use.

    `intervals` are those of fields without their own.
    """
    name, fields = type(config).__name__, dataclasses.fields(config)  # type: ignore[arg-type]
    for field in fields:
        if interval := intervals.get(field.name) or field.metadata.get("interval"):
            _check_interval(f"{name}: {field.name}", getattr(config, field.name), interval)
    for field in fields:
        known = get_args(field.type) if get_origin(field.type) is Literal else tuple(field.metadata.get("uses") or ())
        if known and getattr(config, field.name) not in known:
            got = getattr(config, field.name)
            raise ConfigError(f"{name}: {field.name} must be one of {', '.join(known)}, got {got!r}")
    for choice in _choices(config):
        for unused in _unused(choice, value := getattr(config, choice.name)):
            if getattr(config, unused) != _default(config, unused):
                raise ConfigError(f"{name}: {value} has no {unused}; leave that setting out")


def _check_interval(name: str, value: float, interval: str) -> None:
    if isinstance(value, int):
        interval = interval.replace("inf)", f"{MAX_COUNT}]")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ConfigError(f"{name} must be in {interval}, got {str(value)[:40]}")


def _choices(config: object) -> list[dataclasses.Field[Any]]:
    """Return the fields on whose value it depends what other settings there are."""
    return [field for field in dataclasses.fields(config) if field.metadata.get("uses")]  # type: ignore[arg-type]


def _unused(choice: dataclasses.Field[Any], value: str) -> list[str]:
    """Return the settings that some value of a choice uses, but not this one; of an unknown value none."""
    uses: Mapping[str, Choice] = choice.metadata["uses"]
    every = dict.fromkeys(name for each in uses.values() for name in each.settings)
    return [name for name in every if value in uses and name not in uses[value].settings]


def _default(config: object, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(config) if field.name == name)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which data, and the rules by which they become transitions (from the task's row)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dataset: str
    """Minari id of the data set."""
    source: Source
    """Source of the data, which stands in every result row: data of different sources are different data."""
    env_id: str = ""
    """Gymnasium id of the environment that the data set must name, its version aside; empty = any."""
    observation_keys: tuple[str, ...] = ()
    """Entries of a Dict observation, in this order; () = a Box, or all entries sorted."""
    reward_rule: RewardRule = "return_range"
    return_rule: ReturnRule = "sum"
    ref_min: float | None = None
    """Return of score 0; none = the data set's metadata say."""
    ref_max: float | None = None
    """Return of score 100."""
    held_out_share: float = setting(0.0, "[0, 0.5]", later=True)
    """Share of the episodes on which no stage trains, for what is measured of a run besides its scores; 0 = none."""

    def __post_init__(self) -> None:
        _check(self)
        if (self.ref_min is None) != (self.ref_max is None):
            raise ConfigError(
                "DataConfig: ref_min and ref_max are given together or not at all, "
                f"got {self.ref_min} and {self.ref_max}"
            )
        if self.ref_min is not None and self.ref_max is not None:
            check_references("DataConfig", self.ref_min, self.ref_max)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Settings that every stage has."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: int = setting(interval="[1, inf)")
    """Gradient steps."""
    batch_size: int = setting(interval="[1, inf)")
    hidden_size: int = setting(interval="[1, 1000000]")
    num_layers: int = setting(interval="[1, 1000]")
    learning_rate: float = setting(3e-4, "(0, 1]")
    """Adam's first rate, decayed to 0 by a cosine over `steps`."""
    precision: Precision = "float32"
    """Precision of the factors in large matrix products while the stage trains, if the device has units for it: tf32
    has 10 bits of mantissa (GPUs), bfloat16 has 7. Sums, weights, Adam, losses and small layers stay float32, and so do
    sampling and evaluation; where a gradient comes by autograd, that of small layers does not. Measured on CPUs
    (docs/results/speed.md): with AMX a step by bfloat16 is 1.2 to 2.2 times as fast; without it gains nothing, not even
    where avx512_bf16 is listed (AMD Zen 4), and may lose a fifth (Ice Lake)."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def support(self) -> tuple[int, int]:
        """States, and actions in each, that stage 1 draws for this stage before its first step and that it keeps."""
        return 0, 0

    @property
    def num_units(self) -> int:
        """Units of a batch that belong together and that workers can share: rows, or states with all their actions."""
        return self.batch_size

    def uses(self, name: str) -> bool:
        """Return whether a setting has an effect, given what is chosen."""
        return not any(name in _unused(choice, getattr(self, choice.name)) for choice in _choices(self))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BehaviorConfig(StageConfig):
    """Stage 1, the diffusion behaviour policy [M5]."""

    ema_decay: float = setting(0.995, "[0, 1)")
    """Decay per step of the average of weights that samples."""
    variance: VarianceEstimate = "time"
    """Variance of the posterior [M10]: one table over t (`time`), or a network of (a_t, s, t) per action dimension
    (`learned`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig(StageConfig):
    """Stage 2, twin Q and V: expectile regression [M6, M7] (IQL, arXiv 2110.06169), or [M8]."""

    expectile: float = setting(0.7, "(0, 1)")
    """tau of [M6], in (0, 1); 0.5 is the mean, 1 the maximum over the data's actions."""
    discount: float = setting(0.99, "[0, 1)")
    """gamma of [M7], per environment step."""
    target_rate: float = setting(0.005, "(0, 1]")
    """Soft update of the target critics, per step."""
    activation: Activation = "silu"
    """Q and V have this activation; published IQL has relu."""
    layer_norm: bool = True
    """Q and V normalise each layer before its activation, which bounds Q of actions that the data do not have.
    Published IQL does not."""
    backup_steps: int = setting(1, "[1, 1000]")
    """expectile: n of the n-step return that Q follows, within an episode of the data; 1 is IQL's [M7]."""
    learner: str = setting("expectile", uses=CRITIC_LEARNERS)
    """The learner says how values back up: `expectile` over the data's actions, `softmax_in_support` over stage 1's."""
    num_samples: int = setting(16, "[2, 1000]")
    """softmax_in_support: K, support actions per next state."""
    num_support_states: int = setting(100_000, "[1, inf)")
    """softmax_in_support: transitions whose next states get support actions, once, at most; the others are not used."""
    backup_beta: float = setting(1.0, "[0, inf)")
    """softmax_in_support: inverse temperature of the backup, in units of Q."""
    action_noise: float = setting(0.0, "[0, inf)", later=True)
    """Standard deviation of the noise on the actions that Q is trained on, in units of the range [-1, 1]: its slope,
    which is all that guidance by the closed form asks of it, is then that of a smoothed Q."""
    state_noise: float = setting(0.0, "[0, inf)", later=True)
    """The same for the states that Q and V are trained on, in standard deviations of the data."""

    @property
    def support(self) -> tuple[int, int]:
        """Next states, and actions in each, over which [M8] backs up."""
        return (self.num_support_states, self.num_samples) if self.uses("num_support_states") else (0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnergyConfig(StageConfig):
    """Stage 3, the intermediate energy [M11, M12]."""

    steps: int = setting(interval="[0, inf)")
    """Gradient steps; 0 = no network: [M11] at the posterior mean is computed from Q as actions are drawn."""

    ema_decay: float = setting(0.995, "[0, 1)")
    """Decay per step of the average of weights that guides."""
    target: str = setting("analytic", uses=ENERGY_TARGETS)
    """What the network learns; see aepo/stages/targets.py."""
    expansion: Expansion = "data_action"
    """The point c of [M11] at which Q is expanded; analytic targets only."""
    num_samples: int = setting(16, "[2, 1000]")
    """monte_carlo: draws from the posterior per sample; contrastive: support actions per state."""
    num_support_states: int = setting(20_000, "[1, inf)")
    """contrastive: states for which support actions are sampled once, at most."""
    beta_min: float = setting(0.1, "(0, inf)")
    """Smallest inverse temperature trained; targets that are no polynomial in beta only."""
    beta_max: float = setting(10.0, "(0, inf)")
    """Largest inverse temperature trained; targets that are no polynomial in beta only."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        if self.beta_min >= self.beta_max:
            raise ConfigError(f"EnergyConfig: beta_min must be below beta_max, got {self.beta_min} and {self.beta_max}")
        if not self.is_learned and (self.target, self.expansion) != ("analytic", "posterior_mean"):
            raise ConfigError(
                "EnergyConfig: steps 0 is the closed form, target analytic with expansion posterior_mean; got target "
                f"{self.target} with expansion {self.expansion}: give steps, as in --set energy.steps=4000"
            )

    @property
    def is_learned(self) -> bool:
        """It is true where there is an energy network."""
        return self.steps > 0

    @property
    def facts(self) -> EnergyTarget:
        """The target's row of ENERGY_TARGETS: what it asks for, and whether it takes beta."""
        return ENERGY_TARGETS[self.target]

    @property
    def support(self) -> tuple[int, int]:
        """States, and actions in each, of a target over the behaviour policy's support."""
        return (self.num_support_states, self.num_samples) if self.uses("num_support_states") else (0, 0)

    @property
    def num_units(self) -> int:
        """Units of a batch: rows, or states with all their support actions."""
        return self.batch_size // max(1, self.support[1])


def check_beta(energy: EnergyConfig, beta: float) -> None:
    """Raise a ConfigError if an energy network trained like this knows nothing of `beta`."""
    if energy.facts.takes_beta and not energy.beta_min <= beta <= energy.beta_max:
        raise ConfigError(
            f"beta {beta:g} is outside what target {energy.target} is trained for, "
            f"energy.beta_min {energy.beta_min:g} to energy.beta_max {energy.beta_max:g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActorConfig(StageConfig):
    """IQL's policy: a Gaussian, cloned with weight exp(advantage) (arXiv 2110.06169)."""

    inverse_temperature: float = setting(3.0, "[0, inf)")
    """Factor of Q - V in the exponent, in units of the data set's (scaled) rewards."""
    activation: Activation = "silu"
    """Activation between the actor's layers; published IQL has relu."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TwinDelayedConfig(StageConfig):
    """An actor and two critics that learn together, with smoothed targets (TD3, arXiv 1802.09477)."""

    discount: float = setting(0.99, "[0, 1)")
    """gamma, per environment step."""
    target_rate: float = setting(0.005, "(0, 1]")
    """Soft update of the targets, whenever the actor is."""
    activation: Activation = "silu"
    """The actor and both Q have this activation; published TD3+BC and ReBRAC have relu."""
    layer_norm: bool = True
    """Q normalises each layer before its activation. Published TD3+BC does not."""
    policy_noise: float = setting(0.2, "[0, inf)")
    """Standard deviation of the noise on the target's action."""
    noise_clip: float = setting(0.5, "[0, inf)")
    """Largest magnitude of that noise."""
    actor_interval: int = setting(2, "[1, inf)")
    """Critic steps per actor step."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActorCriticConfig(TwinDelayedConfig):
    """TD3+BC, actor and critics together (arXiv 2106.06860); `steps` are the critics'."""

    q_weight: float = setting(2.5, "(0, inf)")
    """alpha: weight of Q over its mean size against the squared distance to the data's action."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the trained networks become actions [M4, M13]; nothing here needs training."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    beta: float = setting(1.0, "(0, inf)")
    """Inverse temperature of exp(beta Q) [M1], Q in units of the standard deviation of Q - V on the data."""
    guidance_scale: float = setting(3.0, "[0, inf)")
    """w of [M4]; 0 = actions of the behaviour model: its clone, or the best of several by Q."""
    nats: float = setting(0.0, "[0, inf)", later=True)
    """What guidance may cost an action on the mean, KL(guided || behaviour); one action may cost three times that.

    0 = no bound. Where the guidance scale costs more on states of the data, it is lowered until it does not [M16]."""
    num_steps: int = setting(6, "[1, 1000]")
    """Solver steps per action."""
    temperature: float = setting(1.0, "[0, 1]")
    """Standard deviation of the solver's start, in [0, 1]: 1 draws from the policy, 0 is one action, near the mode."""
    num_candidates: int = setting(1, "[1, 1000]")
    """Actions drawn per state; of several the one with the largest Q is taken."""

    def __post_init__(self) -> None:
        _check(self)
        if self.temperature == 0 and self.num_candidates > 1:
            raise ConfigError("sampling.temperature 0 draws one action: num_candidates must be 1")

    @property
    def cloning(self) -> "SamplingConfig":
        """The same without guidance and choice: one action of the behaviour model."""
        return dataclasses.replace(self, guidance_scale=0.0, num_candidates=1)


def check_unguided(sampling: SamplingConfig) -> None:
    """Raise a ConfigError if the settings of a method without guidance ask for some."""
    plain = dataclasses.replace(sampling, beta=_default(sampling, "beta"), guidance_scale=0.0, nats=0.0)
    if sampling != plain:
        raise ConfigError(
            "this method has no guidance: leave sampling.beta, sampling.guidance_scale and sampling.nats out; "
            f"got {sampling.beta:g}, {sampling.guidance_scale:g} and {sampling.nats:g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Roll-outs in the data set's evaluation environment."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_episodes: int = setting(interval="[1, inf)")
    """Episodes of the final evaluation, once guided and once at guidance scale 0."""
    num_curve_points: int = setting(0, "[0, inf)")
    """Evaluations during each stage along which a policy acts, equally spaced. The last stage's end is left to the
    final evaluation; an earlier stage, such as the behaviour model's, is evaluated at its end too, without guidance."""
    num_curve_episodes: int = setting(10, "[1, inf)")
    """Episodes of each evaluation during the last stage."""
    horizon: int = setting(0, "[0, inf)")
    """Steps of an episode; 0 = the environment's own limit."""
    grid_beta: tuple[float, ...] = ()
    """Inverse temperatures of the heat map at the end of a guided run, times `grid_guidance_scale` or `grid_nats`."""
    grid_guidance_scale: tuple[float, ...] = ()
    """Guidance scales of the heat map."""
    grid_nats: tuple[float, ...] = setting((), later=True)
    """Budgets of the heat map in place of guidance scales, in nats, each at the run's scale [M16]."""
    num_grid_episodes: int = setting(10, "[1, inf)")
    """Episodes of each cell of the heat map."""
    select_episodes: int = setting(0, "[0, 100000]", later=True)
    """Episodes, in all, on which a guided run chooses among the cells of the heat map after training, or without a heat
    map among cloning and 0.3, 1 and 3 nats at the run's beta. First states are others than those that are reported.
    The policy keeps the best cell, which is evaluated beside the run's own setting; the run's score stays that of its
    own setting. 0 = nothing is chosen. Methods that have no guidance to choose ignore it."""

    def __post_init__(self) -> None:
        _check(self)
        scales, nats = self.grid_guidance_scale, self.grid_nats
        if bool(self.grid_beta) != bool(scales or nats) or (scales and nats):
            raise ConfigError(
                "a heat map wants evaluation.grid_beta and evaluation.grid_guidance_scale or evaluation.grid_nats, "
                f"got {self.grid_beta or 'none'}, {scales or 'none'} and {nats or 'none'}"
            )
        if not all(0 < value < math.inf for value in (*self.grid_beta, *nats)):
            raise ConfigError("evaluation.grid_beta and evaluation.grid_nats must be above 0")
        if not all(0 <= scale < math.inf for scale in scales):
            raise ConfigError("evaluation.grid_guidance_scale must not be below 0")

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Beta and guidance scale, or nats, of each cell of the heat map; none where there is no heat map."""
        return list(itertools.product(self.grid_beta, self.grid_nats or self.grid_guidance_scale))

    def cells(self, own: SamplingConfig) -> list[SamplingConfig]:
        """Return how a policy acts in each cell of the heat map, given the run's own way."""
        if self.grid_nats:
            return [dataclasses.replace(own, beta=beta, nats=nats) for beta, nats in self.grid]
        return [dataclasses.replace(own, beta=beta, guidance_scale=scale) for beta, scale in self.grid]

    def choices(self, own: SamplingConfig) -> list[SamplingConfig]:
        """Return the ways to act among which `select_episodes` choose, given the run's own way."""
        return self.cells(own) or [own.cloning, *(dataclasses.replace(own, nats=nats) for nats in SELECT_NATS)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: one task, one seed, the stages of one method, one policy."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    suite: str
    seed: int
    """Seeds weights, batches, noise and evaluation."""
    method: str
    """The name in methods.csv."""
    preset: str
    """The preset from which the other fields came; a name, without effect."""
    data: DataConfig
    evaluation: EvaluationConfig
    rounds: tuple[float, ...] = setting((1.0,), later=True)
    """Share of every stage's steps that is taken by the end of each round, rising to 1. A round goes through all
    stages and ends with an evaluation, so that a search can compare runs early; one round is the paper's pipeline."""
    variant: str = setting("", later=True)
    """Name of the settings by which a sweep tells runs of one method apart; "" = the method is run with one setting."""

    def __post_init__(self) -> None:
        _check(self, seed="[0, inf)")
        if self.variant:
            check_variant(self.variant)
        if self.evaluation.grid_beta and not self.is_guided:
            raise ConfigError(
                f"evaluation.grid_beta: {self.method} has neither beta nor guidance scale, so no heat map; leave it out"
            )
        shares = (0.0, *self.rounds)
        if shares[-1] != 1.0 or not all(low < high for low, high in pairwise(shares)):
            raise ConfigError(f"rounds must rise from above 0 to 1, as in 0.1, 0.3, 1; got {list(self.rounds)}")
        for name in self.stages:
            if not all(low < high for low, high in pairwise([0, *self.round_ends(name)])):
                raise ConfigError(f"{len(self.rounds)} rounds want more steps than {self.stages[name].steps} of {name}")

    @property
    def groups(self) -> dict[str, Any]:
        """The fields by name: those of all methods and the method's own."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def is_guided(self) -> bool:
        """It is true where guidance draws actions away from the behaviour policy, by a beta and a guidance scale."""
        sampling: SamplingConfig | None = self.groups.get("sampling")
        return sampling is not None and sampling.guidance_scale > 0

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages of the method that take steps, by name, in the order in which they are trained."""
        return {name: stage for name, stage in self.stage_groups.items() if stage.steps}

    @property
    def stage_groups(self) -> dict[str, StageConfig]:
        """All stages of the method by name, those without a step too."""
        return {name: value for name, value in self.groups.items() if isinstance(value, StageConfig)}

    @property
    def fingerprint(self) -> str:
        """12 hex digits of the whole config."""
        values = identifying_fields(self)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """`{task}-s{seed}-{fingerprint}`, the variant behind the task if there is one; safe as the name of a folder."""
        words = [re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-") for word in (self.task, self.variant)]
        return f"{bounded('-'.join(filter(None, words)))}-s{self.seed}-{self.fingerprint}"

    @property
    def num_steps(self) -> int:
        """Gradient steps of all stages."""
        return sum(stage.steps for stage in self.stages.values())

    def round_ends(self, stage: str) -> list[int]:
        """Return the step of a stage at which each round leaves it."""
        return [round(share * self.stages[stage].steps) for share in self.rounds]

    def place(self, stage: str, step: int) -> tuple[int, int, int]:
        """Return (round, number of the stage, step) of a step >= 1: places sort as training goes."""
        return bisect_left(self.round_ends(stage), step), list(self.stages).index(stage), step

    def steps_until(self, stage: str, step: int) -> int:
        """Return the gradient steps that the run has taken, in all stages, when a stage has come to a step >= 1."""
        here, number, _ = self.place(stage, step)
        ends = [[0, *self.round_ends(name)] for name in self.stages]
        return step + sum(ends[i][here + (i < number)] for i in range(len(ends)) if i != number)


def identifying_fields(config: Any) -> dict[str, Any]:
    """Return what tells a config apart: its fields as nested dicts, without those that came later and have the default.

    So runs and stored stages from before a setting was added are still found.
    """
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not (field.metadata.get("later") and value == field.default):
            values[field.name] = identifying_fields(value) if dataclasses.is_dataclass(value) else value
    return values


Config = TypeVar("Config", bound=RunConfig)


def parse(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Return the config that `dataclasses.asdict` (or JSON) wrote; numbers may be strings, as flags are.

    Raises:
        ConfigError: for an unknown, missing or mistyped key, or a value out of range.
    """
    parser: TypeAdapter[Config] = _adapter(config_class)  # type: ignore[arg-type]  # a TypeVar of a class is hashable
    try:
        return parser.validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(validation_message(error)) from None


def validation_message(error: ValidationError) -> str:
    """Return in one line what pydantic found wrong: the setting, what was wanted, what was got."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg'].removeprefix('Value error, ')}{_got(item)}"
        for item in error.errors()
    )


def _got(problem: Mapping[str, Any]) -> str:
    """Return in words what was given, where a message does not say so itself."""
    says = problem["type"] in ("value_error", "missing", "extra_forbidden") or isinstance(problem["input"], Mapping)
    return "" if says else f", got {str(problem['input'])[:40]!r}"


@cache
def _adapter(config_class: Any) -> TypeAdapter[Any]:
    """Return the parser of a class of configs; making one takes milliseconds."""
    return TypeAdapter(config_class)


def check_variant(name: str) -> None:
    """Raise a ConfigError unless a text can be the name of a variant: it stands in file names, tables and figures."""
    if not 0 < len(name) <= MAX_VARIANT or not name.isprintable() or name != name.strip():
        raise ConfigError(
            f"the name of a variant must have 1 to {MAX_VARIANT} characters, none of them a control character and no "
            f"space at its ends, as in 'w 3'; got {name[: 2 * MAX_VARIANT]!r}"
        )


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a config with dotted keys replaced, as in {"critic.expectile": 0.9}.

    A value has the type of its setting, or is the text of one, as on a command line: commas then part a list.

    Raises:
        ConfigError: for an unknown key (names the nearest) or a bad value.
    """
    values = dataclasses.asdict(config)
    known = settings(config)
    for key, value in overrides.items():
        if key not in known:
            near = get_close_matches(key, known, n=3) or groups_of(known)
            raise ConfigError(f"{config.method} has no setting {key!r}; did you mean {' or '.join(near)}?")
        group, _, field = key.partition(".")
        old = values[group][field]
        if _has_bool(value) and not isinstance(old, bool):  # which would be 0 or 1
            raise ConfigError(f"{key} takes no truth value; wanted one like {old!r}, got {value!r}")
        values[group][field] = value.split(",") if isinstance(old, tuple) and isinstance(value, str) else value
    for group, stage in config.stage_groups.items():
        for choice in _choices(stage):
            if f"{group}.{choice.name}" in overrides:  # what a preset set and this choice lacks is no contradiction
                for name in _unused(choice, str(values[group][choice.name])):
                    if f"{group}.{name}" not in overrides:
                        values[group][name] = _default(stage, name)
    return parse(type(config), values)


def _has_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_bool, value)))


def settings(config: RunConfig) -> list[str]:
    """Return the dotted keys that `with_overrides` takes."""
    groups = dataclasses.asdict(config).items()
    return [f"{group}.{field}" for group, fields in groups if isinstance(fields, Mapping) for field in fields]


def groups_of(keys: Iterable[str]) -> list[str]:
    """Return `critic.*` for all settings of a group, each group once: for a message that names what there is."""
    return list(dict.fromkeys(f"{key.partition('.')[0]}.*" for key in keys))


def used_settings(config: RunConfig, overrides: Iterable[str] = ()) -> list[str]:
    """Return the dotted keys that make a difference to a run, or may, where `overrides` change what is chosen."""
    idle = {
        f"{group}.{name}"
        for group, stage in config.stage_groups.items()
        for choice in _choices(stage)
        if f"{group}.{choice.name}" not in overrides
        for name in _unused(choice, getattr(stage, choice.name))
    }
    return [key for key in settings(config) if key not in idle]


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Return {"critic.expectile": "0.9"} from words of a command line, such as `critic.expectile=0.9`.

    Raises:
        ConfigError: for a word that is no setting and value.
    """
    pairs = [word.partition("=") for word in words]
    if bad := [word for word, (_, equals, _) in zip(words, pairs, strict=True) if not equals]:
        raise ConfigError(f"a setting wants KEY=VALUE, as in critic.expectile=0.9; got {bad[0]!r}")
    return {key: value for key, _, value in pairs}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"critic.expectile": 0.9} from nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
