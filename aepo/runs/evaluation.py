"""A policy's evaluation as a run records it, once or over the cells of a heat map."""

import numpy as np
from numpy.typing import NDArray

from aepo.config import RunConfig, SamplingConfig
from aepo.evaluate import Evaluator
from aepo.policy import Policy
from aepo.results import CLONING, Evaluation, GridCell

BEST_CLONE = "best-clone"
"""Name in tables of a guided method at guidance scale 0 that takes the candidate with the largest Q."""
OWN = "eval/"
"""Begins the metrics of an evaluation of a run's own policy on the way."""


EVALUATION_SEED = 1_000_000
"""Distance between the first evaluation seeds of runs whose seeds are neighbours; see `evaluation_seed`."""


def cell_name(config: RunConfig, beta: float, strength: float) -> str:
    """Return the name of a cell of the heat map among the metrics of a round; its numbers are those of the config."""
    return f"grid/beta {beta:g} {'nats' if config.evaluation.grid_nats else 'scale'} {strength:g}"


def evaluation_seed(seed: int) -> int:
    """Return the seed of a run's first evaluation episode; those of different runs do not overlap by design."""
    return EVALUATION_SEED * (1 + seed) % (2**31 - 10_000)


def selection_seed(seed: int) -> int:
    """Return the seed of the first episode on which a run chooses how to act; no run reports one of them, by design."""
    return (EVALUATION_SEED * (1 + seed) + EVALUATION_SEED // 2) % (2**31 - 10_000)


def choice_name(place: int, cell: SamplingConfig) -> str:
    """Return the metric's name of the mean return of one of the ways to act among which a run chooses."""
    strength = f"nats {cell.nats:g}" if cell.nats and cell.guidance_scale else f"scale {cell.guidance_scale:g}"
    return f"select/{place} beta {cell.beta:g} {strength}"


def evaluate(policy: Policy, evaluator: Evaluator, *, num_episodes: int, seed: int) -> Evaluation:
    """Return a policy's evaluation, rolled out as its `sampling` says."""
    returns = evaluator.run(policy, num_episodes=num_episodes, seed=seed)
    metrics = measures(evaluator, returns)
    method: str = policy.config.method
    beta = scale = None
    nats = 0.0
    if policy.config.is_guided and policy.sampling is not None:
        beta, scale = policy.sampling.beta, policy.sampling.guidance_scale
        nats = policy.sampling.nats if scale else 0.0
        if scale == 0:
            method = CLONING if policy.sampling.num_candidates == 1 else BEST_CLONE
    elif policy.sampling is not None and policy.sampling.num_candidates == 1:
        method, scale = CLONING, 0.0
    return Evaluation(
        method=method,
        beta=beta,
        guidance_scale=scale,
        score=metrics.get("eval/score"),
        return_mean=metrics["eval/return_mean"],
        return_std=float(returns.std(ddof=1)) if len(returns) > 1 else 0.0,
        num_episodes=len(returns),
        episode_returns=tuple(returns.tolist()),
        nats=nats,
        kl=policy.sampler.spent(),
    )


def evaluate_grid(policy: Policy, evaluator: Evaluator, config: RunConfig) -> list[GridCell]:
    """Return the cells of the config's heat map."""
    cells: list[GridCell] = []
    if policy.sampling is None:
        return cells
    for own in config.evaluation.cells(policy.sampling):
        each = policy.with_sampling(own)
        num_episodes = config.evaluation.num_grid_episodes
        row = evaluate(each, evaluator, num_episodes=num_episodes, seed=evaluation_seed(config.seed))
        cells.append(row.cell())
    return cells


def prefix(config: RunConfig, stage: str) -> str:
    """Return what begins the metrics of evaluations along a stage: OWN, behind it the stage's name if not the last."""
    return OWN if stage == list(config.stages)[-1] else f"{OWN}{stage}/"


def measures(evaluator: Evaluator, returns: NDArray[np.float64], begin: str = OWN) -> dict[str, float]:
    """Return what a run's metrics say of an evaluation: mean return, what was cut of the states, the score if any."""
    mean = float(returns.mean())
    score = {f"{begin}score": evaluator.references.score(mean)} if evaluator.references else {}
    return {f"{begin}return_mean": mean, f"{begin}cut_percent": evaluator.cut_percent, **score}
