"""What a run is made of: frozen dataclasses, one per stage, checked when made; the fingerprint.

A run has the stages of its method. Equal configs are the same run and resume; configs that differ in any field
never share a folder.
"""

import dataclasses
import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from aepo.errors import ConfigError
from aepo.names import bounded
from aepo.tasks import ReturnRule, RewardRule, Source, check_references

Method = Literal["aepo", "aepo-analytic", "qgpo", "iql", "td3bc"]
"""Whose policy it is: the name in tables. Cloning, `diffusion-bc`, is the first three at guidance scale 0."""
Expansion = Literal["posterior_mean", "data_action"]
"""Where Q is expanded in [M11]."""

EnergyTarget = Literal[
    "analytic",
    "analytic_second_order",
    "monte_carlo",
    "mse",
    "log_expectation",
    "weighted_denoising",
    "contrastive",
]
"""What the energy network learns; aepo/stages/targets.py says how they differ."""
POLYNOMIAL_TARGETS = ("analytic", "mse")
"""Polynomials in beta: two heads, any beta after training. The others take beta, within the range trained."""
VarianceEstimate = Literal["time", "learned"]
CriticLearner = Literal["expectile", "softmax_in_support"]
"""How stage 2 values the next state: IQL's expectile regression [M6], or QGPO's backup over cloned actions [M8]."""
Precision = Literal["float32", "tf32", "bfloat16"]
MAX_COUNT = 2**31 - 1
"""Seeds, steps and samples are at most so many, because libraries count in 32 bits."""
MAX_VARIANT = 40
"""Characters in the name of a variant, which heads a column."""
Activation = Literal["silu", "relu"]
"""Between a network's layers; where a gradient by the action is used, SiLU gives a smooth one."""


def _check(config: object, **ranges: str) -> None:
    """Raise a ConfigError for the first field outside its interval, written as in '(0, 1]'.

    A whole number without an upper end has MAX_COUNT.
    """
    for name, interval in ranges.items():
        value = getattr(config, name)
        if isinstance(value, int):
            interval = interval.replace("inf)", f"{MAX_COUNT}]")
        low, high = (float(end) for end in interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ConfigError(f"{type(config).__name__}: {name} must be in {interval}, got {str(value)[:40]}")


def _check_choice(config: object, **choices: Any) -> None:
    """Raise a ConfigError for the first field that is not one of its Literal's values."""
    for name, choice in choices.items():
        if getattr(config, name) not in get_args(choice):
            raise ConfigError(
                f"{type(config).__name__}: {name} must be one of {', '.join(get_args(choice))}, "
                f"got {getattr(config, name)!r}"
            )


def _check_unused(config: object, choice: str, unused: Sequence[str]) -> None:
    """Raise a ConfigError for the first setting that this choice does not have and that is not at its default."""
    for name in unused:
        if getattr(config, name) != _default(type(config), name):
            raise ConfigError(f"{type(config).__name__}: {choice} has no {name}; leave that setting out")


def unused_of_learner(learner: str) -> list[str]:
    """Return the settings of stage 2 that a learner does not have."""
    if learner == "expectile":
        return ["num_samples", "num_support_states", "backup_beta"]
    return ["expectile", "backup_steps"]


def _default(config_class: type, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(config_class) if field.name == name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which data, and the rules by which they become transitions (from the task's row)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dataset: str
    """Minari id."""
    source: Source
    """Stands in every result row: data of different sources are different data."""
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

    def __post_init__(self) -> None:
        _check_choice(self, source=Source, reward_rule=RewardRule, return_rule=ReturnRule)
        if (self.ref_min is None) != (self.ref_max is None):
            raise ConfigError("DataConfig: ref_min and ref_max are given together or not at all")
        if self.ref_min is not None and self.ref_max is not None:
            check_references("DataConfig", self.ref_min, self.ref_max)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """What every stage has."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: int
    """Gradient steps."""
    batch_size: int
    hidden_size: int
    num_layers: int
    learning_rate: float = 3e-4
    """Adam, decayed to 0 by a cosine over `steps`."""
    precision: Precision = "float32"
    """Of the factors in large matrix products while the stage trains, if the device has units for it: tf32 has 10 bits
    of mantissa (GPUs), bfloat16 has 7. Sums, weights, Adam, losses and small layers stay float32, and so do sampling
    and evaluation. Measured on CPUs (docs/results/speed.md): with AMX a step by bfloat16 is 1.2 to 2.2 times as fast;
    without it gains nothing, not even where avx512_bf16 is listed (AMD Zen 4), and may lose a fifth (Ice Lake)."""

    def __post_init__(self) -> None:
        _check(self, steps="[1, inf)", batch_size="[1, inf)", hidden_size="[1, 1000000]", num_layers="[1, 1000]")
        _check(self, learning_rate="(0, 1]")
        _check_choice(self, precision=Precision)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BehaviorConfig(StageConfig):
    """Stage 1, the diffusion behaviour policy [M5]."""

    ema_decay: float = 0.995
    """Per step, of the weights that sample."""
    variance: VarianceEstimate = "time"
    """Of the posterior [M10]: one table over t, or `learned`, a network of (a_t, s, t) per action dimension."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check(self, ema_decay="[0, 1)")
        _check_choice(self, variance=VarianceEstimate)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig(StageConfig):
    """Stage 2, twin Q and V: expectile regression [M6, M7] (IQL, arXiv 2110.06169), or [M8]."""

    expectile: float = 0.7
    """tau of [M6], in (0, 1); 0.5 is the mean, 1 the maximum over the data's actions."""
    discount: float = 0.99
    """gamma of [M7], per environment step."""
    target_rate: float = 0.005
    """Soft update of the target critics, per step."""
    activation: Activation = "silu"
    """Of Q and V; published IQL has relu."""
    layer_norm: bool = True
    """Before each activation: it bounds Q of actions that the data do not have. Published IQL has none."""
    backup_steps: int = 1
    """expectile: n of the n-step return that Q follows, within an episode of the data; 1 is IQL's [M7]."""
    learner: CriticLearner = "expectile"
    """`softmax_in_support` backs up over actions sampled from stage 1; `expectile` is its counterpart's setting."""
    num_samples: int = 16
    """softmax_in_support: K, support actions per next state."""
    num_support_states: int = 100_000
    """softmax_in_support: transitions whose next states get support actions, once, at most; the others are not used."""
    backup_beta: float = 1.0
    """softmax_in_support: inverse temperature of the backup, in units of Q."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check(self, expectile="(0, 1)", discount="[0, 1)", target_rate="(0, 1]")
        _check(
            self,
            backup_steps="[1, 1000]",
            num_samples="[2, 1000]",
            num_support_states="[1, inf)",
            backup_beta="[0, inf)",
        )
        _check_choice(self, learner=CriticLearner, activation=Activation)
        _check_unused(self, self.learner, unused_of_learner(self.learner))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnergyConfig(StageConfig):
    """Stage 3, the intermediate energy [M11, M12]."""

    ema_decay: float = 0.995
    """Per step, of the weights that guide."""
    target: EnergyTarget = "analytic"
    """What the network learns; see aepo/stages/targets.py."""
    expansion: Expansion = "data_action"
    """The point c of [M11] at which Q is expanded; analytic targets only."""
    num_samples: int = 16
    """monte_carlo: draws from the posterior per sample; contrastive: support actions per state."""
    num_support_states: int = 20_000
    """contrastive: states for which support actions are sampled once, at most."""
    beta_min: float = 0.1
    """Smallest inverse temperature trained; targets that are no polynomial in beta only."""
    beta_max: float = 10.0
    """Largest one."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check(self, ema_decay="[0, 1)")
        _check(self, num_samples="[2, 1000]", num_support_states="[1, inf)", beta_min="(0, inf)", beta_max="(0, inf)")
        _check_choice(self, target=EnergyTarget, expansion=Expansion)
        if self.beta_min >= self.beta_max:
            raise ConfigError(f"EnergyConfig: beta_min must be below beta_max, got {self.beta_min} and {self.beta_max}")
        _check_unused(self, self.target, unused_of_target(self.target))


def unused_of_target(target: str) -> list[str]:
    """Return the settings of stage 3 that a target does not have."""
    unused = []
    if not target.startswith("analytic"):
        unused += ["expansion"]
    if target not in ("monte_carlo", "contrastive"):
        unused += ["num_samples"]
    if target != "contrastive":
        unused += ["num_support_states"]
    if target in POLYNOMIAL_TARGETS:
        unused += ["beta_min", "beta_max"]
    return unused


def check_beta(energy: EnergyConfig, beta: float) -> None:
    """Raise a ConfigError if an energy network trained like this knows nothing of `beta`."""
    if energy.target not in POLYNOMIAL_TARGETS and not energy.beta_min <= beta <= energy.beta_max:
        raise ConfigError(
            f"beta {beta:g} is outside what target {energy.target} is trained for, "
            f"energy.beta_min {energy.beta_min:g} to energy.beta_max {energy.beta_max:g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActorConfig(StageConfig):
    """IQL's policy: a Gaussian, cloned with weight exp(advantage) (arXiv 2110.06169)."""

    inverse_temperature: float = 3.0
    """Factor of Q - V in the exponent, in units of the data set's (scaled) rewards."""
    activation: Activation = "silu"
    """Published IQL has relu."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check(self, inverse_temperature="[0, inf)")
        _check_choice(self, activation=Activation)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActorCriticConfig(StageConfig):
    """TD3+BC, actor and critics together (arXiv 2106.06860); `steps` are the critics'."""

    discount: float = 0.99
    """gamma, per environment step."""
    target_rate: float = 0.005
    """Soft update of the targets, whenever the actor is."""
    activation: Activation = "silu"
    """Of the actor and both Q; published TD3+BC has relu."""
    layer_norm: bool = True
    """Before each activation of Q. Published TD3+BC has none."""
    q_weight: float = 2.5
    """alpha: weight of Q over its mean size against the squared distance to the data's action."""
    policy_noise: float = 0.2
    """Standard deviation of the noise on the target's action."""
    noise_clip: float = 0.5
    """Largest noise."""
    actor_interval: int = 2
    """Critic steps per actor step."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check(self, discount="[0, 1)", target_rate="(0, 1]", q_weight="(0, inf)")
        _check(self, policy_noise="[0, inf)", noise_clip="[0, inf)", actor_interval="[1, inf)")
        _check_choice(self, activation=Activation)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the trained networks become actions [M4, M13]; nothing here needs training."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    beta: float = 1.0
    """Inverse temperature of exp(beta Q) [M1], Q in units of the standard deviation of Q - V on the data."""
    guidance_scale: float = 3.0
    """w of [M4]; 0 = diffusion behaviour cloning."""
    num_steps: int = 6
    """Solver steps per action."""
    temperature: float = 1.0
    """Standard deviation of the solver's start, in [0, 1]: 1 draws from the policy, 0 is one action, near the mode."""
    num_candidates: int = 1
    """Actions drawn per state; of several the one with the largest Q is taken."""

    def __post_init__(self) -> None:
        _check(self, beta="(0, inf)", guidance_scale="[0, inf)")
        _check(self, num_steps="[1, 1000]", temperature="[0, 1]", num_candidates="[1, 1000]")
        if self.temperature == 0 and self.num_candidates > 1:
            raise ConfigError("sampling.temperature 0 draws one action: num_candidates must be 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Roll-outs in the data set's evaluation environment."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_episodes: int
    """Episodes of the final evaluation, once guided and once at guidance scale 0."""
    num_curve_points: int = 0
    """Evaluations during the last stage, equally spaced, its last step left to the final one."""
    num_curve_episodes: int = 10
    """Episodes of each of these."""
    horizon: int = 0
    """Steps of an episode; 0 = the environment's own limit."""
    grid_beta: tuple[float, ...] = ()
    """Inverse temperatures of the heat map at the end of a guided run, times `grid_guidance_scale`."""
    grid_guidance_scale: tuple[float, ...] = ()
    """Guidance scales of the heat map."""
    num_grid_episodes: int = 10
    """Episodes of each of its cells."""

    def __post_init__(self) -> None:
        _check(self, num_episodes="[1, inf)", num_curve_points="[0, inf)", num_curve_episodes="[1, inf)")
        _check(self, horizon="[0, inf)", num_grid_episodes="[1, inf)")
        if bool(self.grid_beta) != bool(self.grid_guidance_scale):
            raise ConfigError("a heat map wants both evaluation.grid_beta and evaluation.grid_guidance_scale")
        betas, scales = self.grid_beta, self.grid_guidance_scale
        if not all(0 < beta < math.inf for beta in betas) or not all(0 <= scale < math.inf for scale in scales):
            raise ConfigError("evaluation.grid_beta must be above 0 and evaluation.grid_guidance_scale not below it")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: one task, one seed, the stages of one method, one policy."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    suite: str
    seed: int
    """Seeds weights, batches, noise and evaluation."""
    method: Method
    preset: str
    """The preset from which the other fields came; a name, without effect."""
    data: DataConfig
    evaluation: EvaluationConfig
    rounds: tuple[float, ...] = (1.0,)
    """Share of every stage's steps that is taken by the end of each round, rising to 1. A round goes through all
    stages and ends with an evaluation, so that a search can compare runs early; one round is the paper's pipeline."""
    variant: str = ""
    """Name of the settings by which a sweep tells runs of one method apart; "" = the method is run with one setting."""

    def __post_init__(self) -> None:
        _check(self, seed="[0, inf)")
        if self.variant:
            check_variant(self.variant)
        if CLASSES.get(self.method) is not type(self):
            raise ConfigError(f"{type(self).__name__}: method {self.method!r} does not have these stages")
        shares = (0.0, *self.rounds)
        if shares[-1] != 1.0 or not all(low < high for low, high in pairwise(shares)):
            raise ConfigError(f"rounds must rise from above 0 to 1, as in 0.1, 0.3, 1; got {list(self.rounds)}")
        for name in self.stages:
            if not all(low < high for low, high in pairwise([0, *self.round_ends(name)])):
                raise ConfigError(f"{len(self.rounds)} rounds want more steps than {self.stages[name].steps} of {name}")

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages of the method by name, in the order in which they are trained."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, StageConfig)}

    @property
    def fingerprint(self) -> str:
        """12 hex digits of the whole config."""
        values = dataclasses.asdict(self)
        if self.rounds == (1.0,):
            del values["rounds"]  # so that runs from before there were rounds go on
        if not self.variant:
            del values["variant"]  # so that runs from before there were variants go on
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuidedConfig(RunConfig):
    """AEPO and QGPO: a diffusion behaviour policy, a critic, an energy that guides."""

    behavior: BehaviorConfig
    critic: CriticConfig
    energy: EnergyConfig
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for beta in (self.sampling.beta, *self.evaluation.grid_beta):
            check_beta(self.energy, beta)
        if self.energy.target == "analytic_second_order" and self.critic.activation == "relu":
            raise ConfigError(
                "energy.target analytic_second_order needs critic.activation silu: Q of relu layers has no second "
                "derivative"
            )
        if self.sampling.guidance_scale == 0:
            raise ConfigError("sampling.guidance_scale must be > 0: every run is evaluated at 0 (diffusion-bc) as well")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IQLConfig(RunConfig):
    """IQL: a critic, and a Gaussian policy that clones what it finds good (arXiv 2110.06169)."""

    critic: CriticConfig
    actor: ActorConfig

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        _check_unguided(self)
        if self.critic.learner != "expectile":
            raise ConfigError("iql wants critic.learner expectile: softmax_in_support needs stage 1's actions")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TD3BCConfig(RunConfig):
    """TD3+BC: actor and critics in one stage (arXiv 2106.06860)."""

    actor_critic: ActorCriticConfig

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        _check_unguided(self)


Config = TypeVar("Config", bound=RunConfig)
CLASSES: dict[str, type[RunConfig]] = {
    "aepo": GuidedConfig,
    "aepo-analytic": GuidedConfig,
    "qgpo": GuidedConfig,
    "iql": IQLConfig,
    "td3bc": TD3BCConfig,
}
"""Method -> class of its config."""


def _check_unguided(config: RunConfig) -> None:
    if config.evaluation.grid_beta:
        raise ConfigError(f"evaluation.grid_beta: {config.method} has neither beta nor guidance scale, so no heat map")


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Return the config that `dataclasses.asdict` (or JSON) wrote; numbers may be strings, as flags are.

    Raises:
        ConfigError: for an unknown, missing or mistyped key, or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config is an object of settings, got {str(values)[:40]!r}")
    if not isinstance(method := values.get("method"), str) or method not in CLASSES:
        raise ConfigError(f"method must be one of {', '.join(CLASSES)}, got {str(method)[:40]!r}")
    try:
        return _adapter(method).validate_python(dict(values))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise ConfigError("; ".join(problems)) from None


@cache
def _adapter(method: str) -> TypeAdapter[RunConfig]:
    """Return the parser of a method's config; making one takes milliseconds."""
    return TypeAdapter(CLASSES[method])


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
            near = get_close_matches(key, known, n=3) or known
            raise ConfigError(f"{config.method} has no setting {key!r}; did you mean {' or '.join(near)}?")
        group, _, field = key.partition(".")
        old = values[group][field]
        if _has_bool(value) and not isinstance(old, bool):  # which would be 0 or 1
            raise ConfigError(f"{key} takes no truth value; wanted one like {old!r}, got {value!r}")
        values[group][field] = value.split(",") if isinstance(old, tuple) and isinstance(value, str) else value
    for group, choice, config_class, unused in (
        ("critic", "learner", CriticConfig, unused_of_learner),
        ("energy", "target", EnergyConfig, unused_of_target),
    ):
        if f"{group}.{choice}" in overrides:  # what only the preset set and this choice lacks is no contradiction
            for name in unused(str(overrides[f"{group}.{choice}"])):
                if f"{group}.{name}" not in overrides:
                    values[group][name] = _default(config_class, name)
    changed = from_dict(values)
    assert isinstance(changed, type(config))
    return changed


def _has_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_bool, value)))


def settings(config: RunConfig) -> list[str]:
    """Return the dotted keys that `with_overrides` takes."""
    groups = dataclasses.asdict(config).items()
    return [f"{group}.{field}" for group, fields in groups if isinstance(fields, Mapping) for field in fields]


def used_settings(config: RunConfig, overrides: Iterable[str] = ()) -> list[str]:
    """Return the dotted keys that make a difference to a run, or may, where `overrides` change a learner or target."""
    idle: set[str] = set()
    if isinstance(config, GuidedConfig | IQLConfig) and "critic.learner" not in overrides:
        idle |= {f"critic.{name}" for name in unused_of_learner(config.critic.learner)}
    if isinstance(config, GuidedConfig) and "energy.target" not in overrides:
        idle |= {f"energy.{name}" for name in unused_of_target(config.energy.target)}
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
