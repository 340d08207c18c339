"""Whether to trust a run: what is measured of it besides its returns, and the bounds beyond which it is in doubt.

The bounds stand in one table, BOUNDS. They are rules of thumb that say where to look next, not tests. No torch.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aepo.results import Diagnostic, Evaluation, Result


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A bound of a diagnostic, and what it means to be beyond it."""

    name: str
    """The diagnostic's name."""
    limit: float
    is_upper: bool
    """Whether values above the limit are doubtful, and not those below."""
    shown: str
    """The diagnostic in words, before its value."""
    meaning: str
    """What a value beyond the limit says of the run."""
    advice: str
    """What to do next."""
    error: str = ""
    """Name of the diagnostic with the standard error of this one, of which two are allowed for; empty = none."""


GAIN, GAIN_ERROR = "gain", "gain_error"
"""What guidance gains over cloning, a mean over pairs of episodes with one first state, and its standard error.

In points of the score; without references in standard errors of the clone's mean return.
"""
HELD_OUT_RATIO = "behavior/held_out_ratio"
"""Stage 1's loss on held-out episodes over its mean training loss in the last tenth of its logs."""
BOUNDS = (
    Bound(
        name="energy/kl",
        limit=3.0,
        is_upper=True,
        shown="the cost of guidance in nats is",
        meaning="guided actions are far from the data",
        advice="see what less does: aepo evaluate RUN --nats 1",
    ),
    Bound(
        name="energy/guidance_sd",
        limit=3.0,
        is_upper=True,
        shown="the largest step of guidance in deviations of the posterior is",
        meaning="the solver leaves the noised actions on which the energy was trained",
        advice="see what less does: aepo evaluate RUN --nats 1, or a smaller --guidance-scale",
    ),
    Bound(
        name="critic/advantage_corr",
        limit=0.0,
        is_upper=False,
        shown="Q - V correlates with what held-out episodes earned by",
        meaning="the critic ranks held-out actions the wrong way round",
        advice="guide less (--nats 0.3), or change critic.expectile, critic.discount or critic.steps",
    ),
    Bound(
        name="critic/held_out_loss",
        limit=1.0,
        is_upper=True,
        shown="Q's squared error on held-out episodes over the variance of V is",
        meaning="the critic has learned its episodes by heart",
        advice="lower critic.steps or critic.hidden_size, or bring more data",
    ),
    Bound(
        name=HELD_OUT_RATIO,
        limit=2.0,
        is_upper=True,
        shown="the behaviour model's loss on held-out episodes over that in training is",
        meaning="it has learned its episodes by heart",
        advice="lower behavior.steps or behavior.hidden_size, or bring more data",
    ),
    Bound(
        name=GAIN,
        limit=-5.0,
        is_upper=False,
        shown="guided less cloned score is",
        meaning="guidance makes the clone worse",
        advice="see what less does: aepo evaluate RUN --nats 0.3 1; and look at the critic (data.held_out_share 0.1)",
        error=GAIN_ERROR,
    ),
)
KEPT = ("held_out_loss", "advantage_corr", "kl", "guidance_sd", "guidance_scale")
"""Metrics of any stage whose last value is a diagnostic."""


def diagnose(
    rows: Iterable[Mapping[str, Any]], evaluations: Sequence[Evaluation], points: float | None
) -> tuple[Diagnostic, ...]:
    """Return the diagnostics of a run that ends; those that are not finite are not known.

    Args:
        rows: of its metrics.
        evaluations: of its policy, the run's own first.
        points: what one unit of return is in the score; None without references.
    """
    metrics = [row["metrics"] for row in rows]
    found = {name: value for each in metrics for name, value in each.items() if name.rpartition("/")[2] in KEPT}
    found |= _held_out_ratio(metrics) | _gain(evaluations, points)
    return tuple(Diagnostic(name=name, value=value) for name, value in found.items() if math.isfinite(value))


def clone(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation at guidance scale 0 beside a run's own, None if there is none."""
    return next((each for each in evaluations[1:] if each.guidance_scale == 0 and not each.selected_episodes), None)


def doubts(diagnostics: Iterable[Diagnostic]) -> list[str]:
    """Return a line for each bound that a run has passed: the value, the bound, what it means, what to do next."""
    return list(_doubts({each.name: each.value for each in diagnostics}))


def _doubts(values: Mapping[str, float]) -> Iterator[str]:
    for bound in BOUNDS:
        if bound.name not in values:
            continue
        slack = 2 * values[bound.error] if bound.error in values else 0.0
        value, sign = values[bound.name], 1 if bound.is_upper else -1
        if sign * (value - bound.limit) > slack:
            side = "above" if bound.is_upper else "below"
            beyond = f" by more than two standard errors of {slack / 2:.3g}" * bool(bound.error)
            yield f"{bound.shown} {value:.3g}, {side} {bound.limit:g}{beyond}: {bound.meaning}; {bound.advice}"


def line(result: Result) -> str:
    """Return in one line what speaks for or against a finished run, its own number and its clone's first."""
    values = {each.name: each.value for each in result.diagnostics}
    own, cloned = result.evaluations[0], clone(result.evaluations)
    is_guided = cloned is not None and own.guidance_scale
    parts = [f"{'guided' if is_guided else 'score' if own.score is not None else 'return'} {_number(own)}"]
    if cloned is not None:
        parts[0] += f", cloned {_number(cloned)}"
        if GAIN in values:
            unit = "" if own.score is not None else " standard errors of the clone"
            parts[0] += f" ({values[GAIN]:+.1f} ± {values[GAIN_ERROR]:.1f}{unit})"
    parts += [f"guidance costs {value:.2g} nats" for name, value in values.items() if name.endswith("/kl")]
    parts += [f"advantage correlates {value:.2f}" for name, value in values.items() if name.endswith("/advantage_corr")]
    return f"trust: {'; '.join(parts)}"


def _number(row: Evaluation) -> str:
    return f"{row.return_mean if row.score is None else row.score:.1f}"


def _gain(evaluations: Sequence[Evaluation], points: float | None) -> dict[str, float]:
    """Return GAIN and GAIN_ERROR, nothing without guidance or where episodes say nothing of their spread."""
    own, cloned = evaluations[0], clone(evaluations)
    if not own.guidance_scale or cloned is None:
        return {}
    if len(own.episode_returns) != len(cloned.episode_returns) or len(own.episode_returns) < 2:
        return {}
    gains = [guided - other for guided, other in zip(own.episode_returns, cloned.episode_returns, strict=True)]
    if points is None:
        if (error := _stderr(cloned.episode_returns)) == 0:
            return {}
        points = 1.0 / error
    return {GAIN: points * sum(gains) / len(gains), GAIN_ERROR: points * _stderr(gains)}


def _held_out_ratio(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return HELD_OUT_RATIO, nothing where nothing was held out; what a learned variance adds to a loss is left out."""
    held_out = [each["behavior/held_out_loss"] for each in metrics if "behavior/held_out_loss" in each]
    losses = [
        each["behavior/loss"] - each.get("behavior/variance_loss", 0.0) for each in metrics if "behavior/loss" in each
    ]
    last = losses[-max(1, len(losses) // 10) :]
    return {HELD_OUT_RATIO: held_out[-1] * len(last) / sum(last)} if held_out and last and sum(last) > 0 else {}


def _stderr(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    squares = sum((value - mean) * (value - mean) for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))
