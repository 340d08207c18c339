"""Roll-outs: all episodes at once, one batched call of the policy per step, no slot idle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from aepo.config import RunConfig
from aepo.data.episodes import flatten
from aepo.data.library import open_dataset
from aepo.environments import References, make_environment, references, same_environment
from aepo.errors import DataError, TrainingError
from aepo.policy import Policy
from aepo.tasks import ReturnRule

MAX_ENVS = 50
"""Environments that live at the same time."""


class Evaluator:
    """The evaluation environment of a data set, held open between evaluations."""

    def __init__(
        self,
        dataset_id: str,
        *,
        env_id: str = "",
        observation_keys: tuple[str, ...] = (),
        horizon: int = 0,
        return_rule: ReturnRule = "sum",
        refs: References | None = None,
    ):
        """Make the first environment, so that what is missing is said before training.

        Args:
            dataset_id: Minari id; its evaluation environment is used, or else that of the data.
            env_id: the environment that it must name, its version aside; made if it names none; empty = any.
            observation_keys: entries of a Dict observation, as in training.
            horizon: steps of an episode; 0 = the environment's own limit.
            return_rule: what counts in an episode.
            refs: the task's own reference returns; none = those in the data set's metadata.

        Raises:
            DataError: if the data set names no environment, that of another task, or one whose episodes need not end.
            ResourceError: if the environment cannot be made here.
        """
        self.dataset = open_dataset(dataset_id)
        self.references = refs or references(self.dataset)
        self._wanted_env_id = env_id
        self._keys = observation_keys
        self._horizon = horizon
        self._return_rule = return_rule
        self._envs = [make_environment(self.dataset, env_id=env_id, horizon=horizon)]
        spec = self._envs[0].spec
        self.env_id = spec.id if spec else ""
        if env_id and not same_environment(env_id, self.env_id):
            raise DataError(
                f"{dataset_id} is data of {self.env_id or 'an unnamed environment'}, the task is {env_id}: "
                "a data set of another task; `aepo train --dataset` trains on any"
            )
        if not horizon and (spec is None or spec.max_episode_steps is None):
            raise DataError(f"{dataset_id}: its environment has no time limit; --set evaluation.horizon=STEPS")

    @classmethod
    def of(cls, config: RunConfig) -> "Evaluator":
        """Return the evaluator of a run."""
        data = config.data
        known = data.ref_min is not None and data.ref_max is not None
        return cls(
            data.dataset,
            env_id=data.env_id,
            observation_keys=data.observation_keys,
            horizon=config.evaluation.horizon,
            return_rule=data.return_rule,
            refs=References(random=data.ref_min, expert=data.ref_max) if known else None,  # type: ignore[arg-type]
        )

    def run(self, policy: Policy, *, num_episodes: int, seed: int) -> NDArray[np.float64]:
        """Return what the return rule counts in each episode, [num_episodes], determined by the seed.

        Raises:
            TrainingError: if the environment fails or gives a value that is not finite.
            DataError: if it does not report what the return rule counts.
        """
        while len(self._envs) < min(num_episodes, MAX_ENVS):
            self._envs.append(make_environment(self.dataset, env_id=self._wanted_env_id, horizon=self._horizon))
        generator = torch.Generator(policy.spaces.state_mean_S.device).manual_seed(seed)
        returns = np.zeros(num_episodes)
        waiting = iter(range(num_episodes))
        live: list[tuple[int, gymnasium.Env[Any, Any], Any]] = []
        try:
            for env, episode in zip(self._envs, waiting, strict=False):
                live.append((episode, env, env.reset(seed=seed + episode)[0]))
            while live:
                actions = policy.act(self._observe([observation for _, _, observation in live]), generator)
                survivors = []
                for (episode, env, _), action in zip(live, actions, strict=True):
                    observation, reward, terminated, truncated, info = env.step(action)
                    over = self._count(returns, episode, float(reward), info)
                    if terminated or truncated or over:
                        following = next(waiting, None)
                        if following is None:
                            continue
                        episode, observation = following, env.reset(seed=seed + following)[0]
                    survivors.append((episode, env, observation))
                live = survivors
        except Exception as error:
            if isinstance(error, MemoryError | DataError | TrainingError):
                raise
            raise TrainingError(f"the environment {self.env_id} failed: {type(error).__name__}: {error}") from error
        if not np.isfinite(returns).all():
            raise TrainingError(f"the environment {self.env_id} gave a reward that is not finite")
        return returns

    def observation_width(self, *, seed: int) -> int:
        """Return the number of entries of an observation, after a first reset."""
        return int(self._observe([self._envs[0].reset(seed=seed)[0]]).shape[1])

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _count(self, returns: NDArray[np.float64], episode: int, reward: float, info: Mapping[str, Any]) -> bool:
        """Add a step to its episode's return; return whether the return rule ends the episode."""
        if self._return_rule == "subtasks":
            if "episode_task_completions" not in info:
                raise DataError(f"the environment {self.env_id} reports no sub-tasks; --set data.return_rule=sum")
            returns[episode] = len(info["episode_task_completions"])
            return False
        if self._return_rule == "goal":
            returns[episode] = float(reward > 0) if np.isfinite(reward) else reward
            return reward > 0
        returns[episode] += reward
        return False

    def _observe(self, observations: Sequence[Any]) -> NDArray[np.float32]:
        stacked = _stack(observations)
        states_NS = flatten(stacked, self._keys)
        if not np.isfinite(states_NS).all():
            raise TrainingError(f"the environment {self.env_id} gave an observation that is not finite")
        return states_NS


def _stack(observations: Sequence[Any]) -> Any:
    first = observations[0]
    if isinstance(first, dict):
        return {key: _stack([observation[key] for observation in observations]) for key in first}
    return np.stack(observations)


def draw_grid(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a heat map of the scores (returns, without references) over beta and guidance scale as PNG.

    Args:
        rows: one per beta and guidance scale, with `score` and `return_mean`.
        path: the file.
        title: stands above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = "return_mean" if any(row["score"] is None for row in rows) else "score"
    betas = sorted({row["beta"] for row in rows})
    scales = sorted({row["guidance_scale"] for row in rows})
    values = np.full((len(betas), len(scales)), np.nan)
    for row in rows:
        values[betas.index(row["beta"]), scales.index(row["guidance_scale"])] = row[measure]
    figure = Figure(figsize=(2.2 + 0.9 * len(scales), 1.6 + 0.6 * len(betas)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axes.set(xlabel="guidance scale", ylabel="beta")
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, label="normalized score" if measure == "score" else "return")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
