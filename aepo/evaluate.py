"""Roll-outs: all episodes at once, one batched call of the policy per step, no slot idle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aepo.config import RunConfig
from aepo.environments import References, references, same_environment
from aepo.errors import DataError, TrainingError
from aepo.policy import Policy
from aepo.slots import SharedSlots, Site, naming
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
        processes: int = 1,
    ):
        """Make the first environment, so that what is missing is said before training.

        Args:
            dataset_id: Minari id; its evaluation environment is used, or else that of the data.
            env_id: the environment that it must name, its version aside; made if it names none; empty = any.
            observation_keys: entries of a Dict observation, as in training.
            horizon: steps of an episode; 0 = the environment's own limit.
            return_rule: what counts in an episode.
            refs: the task's own reference returns; none = those in the data set's metadata.
            processes: how many step the environments, this one among them, >= 1; the returns do not depend on it. The
                others are started by the first `run` that needs them and end with `close`.

        Raises:
            ConfigError: for a number of processes below 1.
            DataError: if the data set names no environment, that of another task, or one whose episodes need not end.
            ResourceError: if the environment cannot be made here.
        """
        site = Site(
            dataset_id=dataset_id,
            env_id=env_id,
            observation_keys=observation_keys,
            horizon=horizon,
            return_rule=return_rule,
        )
        self._slots = SharedSlots(site, processes=processes)
        own = self._slots.own
        own.make([0])
        self.references = refs or references(own.dataset)
        self.env_id = own.env_id
        if env_id and not same_environment(env_id, self.env_id):
            raise DataError(
                f"{dataset_id} is data of {self.env_id or 'an unnamed environment'}, the task is {env_id}: "
                "a data set of another task; `aepo train --dataset` trains on any"
            )
        spec = own.envs[0].spec
        if not horizon and (spec is None or spec.max_episode_steps is None):
            raise DataError(f"{dataset_id}: its environment has no time limit; --set evaluation.horizon=STEPS")

    @classmethod
    def of(cls, config: RunConfig, *, processes: int = 1) -> "Evaluator":
        """Return the evaluator of a run; arguments and errors as the constructor's."""
        data = config.data
        known = data.ref_min is not None and data.ref_max is not None
        return cls(
            data.dataset,
            env_id=data.env_id,
            observation_keys=data.observation_keys,
            horizon=config.evaluation.horizon,
            return_rule=data.return_rule,
            refs=References(random=data.ref_min, expert=data.ref_max) if known else None,  # type: ignore[arg-type]
            processes=processes,
        )

    @property
    def start_s(self) -> float:
        """Seconds that starting other processes has taken."""
        return self._slots.start_s

    def run(self, policy: Policy, *, num_episodes: int, seed: int) -> NDArray[np.float64]:
        """Return what the return rule counts in each episode, [num_episodes], determined by the seed.

        Raises:
            TrainingError: if the environment fails or gives a value that is not finite, or if a process ends.
            DataError: if it does not report what the return rule counts.
            ResourceError: if a process is killed.
        """
        try:
            self._slots.make(min(num_episodes, MAX_ENVS))
            with naming(self.env_id):
                returns = self._roll_out(policy, num_episodes, seed)
        except BaseException:
            self._slots.stop()  # an answer that nobody has waited for would be taken for that of the next call
            raise
        if not np.isfinite(returns).all():
            raise TrainingError(f"the environment {self.env_id} gave a reward that is not finite")
        return returns

    def _roll_out(self, policy: Policy, num_episodes: int, seed: int) -> NDArray[np.float64]:
        generator = torch.Generator(policy.spaces.state_mean_S.device).manual_seed(seed)
        returns = np.zeros(num_episodes)
        episodes = {slot: slot for slot in range(min(num_episodes, MAX_ENVS))}
        waiting = iter(range(len(episodes), num_episodes))
        states = self._slots.reset({slot: seed + episode for slot, episode in episodes.items()})
        while episodes:
            actions = policy.act(self._checked(np.stack([states[slot] for slot in episodes])), generator)
            steps = self._slots.step(dict(zip(episodes, actions, strict=True)))
            for slot, episode in episodes.items():
                states[slot], returns[episode] = steps[slot].state_S, steps[slot].return_
            ended = [slot for slot in episodes if steps[slot].over]
            following = dict(zip(ended, waiting, strict=False))
            for slot in ended:
                if slot not in following:
                    del episodes[slot]
            episodes |= following
            states |= self._slots.reset({slot: seed + episode for slot, episode in following.items()})
        return returns

    def observation_width(self, *, seed: int) -> int:
        """Return the number of entries of an observation, after a first reset."""
        return len(self._checked(self._slots.own.reset({0: seed})[0]))

    def close(self) -> None:
        """Close the environments and end the processes."""
        self._slots.close()

    def _checked(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(states).all():
            raise TrainingError(f"the environment {self.env_id} gave an observation that is not finite")
        return states


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
