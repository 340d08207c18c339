"""Roll-outs: all episodes at once, one batched call of the policy per step, no slot idle."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.envs.registration import WrapperSpec
from numpy.typing import NDArray
from torch import Tensor

from aepo.config import RunConfig
from aepo.data.episodes import ACTION_TOLERANCE, action_bounds, doubt_pictures
from aepo.data.transitions import Spaces, Transitions
from aepo.environments import References, references, same_environment
from aepo.errors import DataError, TrainingError
from aepo.results import GridCell
from aepo.slots import EnvironmentSpec, SharedSlots, environment_errors
from aepo.tasks import ReturnRule

MAX_HORIZON = 100_000
"""Steps of an episode of evaluation."""
MAX_DOUBTS = 3
"""Entries of an observation that are named."""
MAX_ENVS = 50
"""Environments that live at the same time."""


class Actor(Protocol):
    """Anything that can be rolled out."""

    @property
    def device(self) -> torch.device:
        """The device of the generator that `act` draws from."""

    def act(self, observations_NS: NDArray[Any], generator: torch.Generator) -> NDArray[Any]:
        """Return one action per raw observation, [N, A], that the environment accepts."""

    def num_cut(self, observations_NS: NDArray[Any]) -> int:
        """Return how many entries of raw observations it sees cut, because they are far from its data."""


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
        wanted = EnvironmentSpec(
            dataset_id=dataset_id,
            env_id=env_id,
            observation_keys=observation_keys,
            horizon=horizon,
            return_rule=return_rule,
        )
        self.cut_percent = 0.0
        """Percent of the observations' entries in the last `run` that the policy's bound has cut."""
        self._slots = SharedSlots(wanted, processes=processes)
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
        limit = horizon or (spec.max_episode_steps if spec else None)
        if limit is None or limit > MAX_HORIZON:
            got = (
                "no time limit" if limit is None else f"a time limit of {limit:,} steps, wanted at most {MAX_HORIZON:,}"
            )
            raise DataError(f"{dataset_id}: its environment has {got}; --set evaluation.horizon=STEPS")

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

    def run(self, policy: Actor, *, num_episodes: int, seed: int) -> NDArray[np.float64]:
        """Return what the return rule counts in each episode, [num_episodes], determined by the seed.

        Raises:
            TrainingError: if the environment fails or gives a value that is not finite, or if a process ends.
            DataError: if it does not report what the return rule counts.
            ResourceError: if a process is killed.
        """
        try:
            self._slots.make(min(num_episodes, MAX_ENVS))
            with environment_errors(self.env_id):
                returns = self._roll_out(policy, num_episodes, seed)
        except BaseException:
            self._slots.stop()  # an answer that nobody has waited for would be taken for that of the next call
            raise
        if not np.isfinite(returns).all():
            raise TrainingError(f"the environment {self.env_id} gave a reward that is not finite")
        return returns

    def _roll_out(self, policy: Actor, num_episodes: int, seed: int) -> NDArray[np.float64]:
        generator = torch.Generator(policy.device).manual_seed(seed)
        returns = np.zeros(num_episodes)
        episodes = {slot: slot for slot in range(min(num_episodes, MAX_ENVS))}
        waiting = iter(range(len(episodes), num_episodes))
        states = self._slots.reset({slot: seed + episode for slot, episode in episodes.items()})
        num_cut, num_seen = 0, 0
        while episodes:
            seen_BS = self._checked(np.stack([states[slot] for slot in episodes]))
            num_cut, num_seen = num_cut + policy.num_cut(seen_BS), num_seen + seen_BS.size
            actions = policy.act(seen_BS, generator)
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
        self.cut_percent = 100.0 * num_cut / num_seen
        return returns

    def observation_width(self, *, seed: int) -> int:
        """Return the number of entries of an observation, after a first reset."""
        return len(self._checked(self._slots.own.reset({0: seed})[0]))

    def check(self, data: Transitions) -> list[str]:
        """Take a real step before anything is trained; return what makes one doubt that the environment is the data's.

        Raises:
            DataError: if the environment has other actions or observations than the data, or a wrapper whose state they
                do not hold.
            TrainingError: if it fails, or gives a value that is not finite.
        """
        own, spaces = self._slots.own, data.spaces
        env = own.envs[0]
        name = f"{own.dataset.id}: its environment {self.env_id}"
        if moved := [wrapper.name for wrapper in (env.spec.additional_wrappers if env.spec else ()) if _moves(wrapper)]:
            raise DataError(
                f"{name} has the wrapper {moved[0]}, whose running statistics are not stored with the data: evaluation "
                "would begin with others; record without it, aepo normalises on its own"
            )
        low_A, high_A = action_bounds(env, name=self.env_id)
        own_A = [spaces.action_low_A.cpu().numpy(), spaces.action_high_A.cpu().numpy()]
        slack = ACTION_TOLERANCE * float((high_A - low_A).max())
        if (
            low_A.shape != own_A[0].shape
            or max(np.abs(own_A[0] - low_A).max(), np.abs(own_A[1] - high_A).max()) > slack
        ):
            raise DataError(
                f"{name} takes actions in {env.action_space}, the data hold actions in {own.dataset.action_space}: "
                "store them in the environment's units, or the environment with its wrapper that converts"
            )
        state_S = self._checked(own.reset({0: 0})[0])
        if len(state_S) != data.state_dim:
            raise DataError(f"{name} shows observations of {len(state_S)} entries, the data have {data.state_dim}")
        step = own.step({0: (low_A + high_A) / 2})[0]
        self._checked(step.state_S)
        if not np.isfinite(step.return_):
            raise TrainingError(f"the environment {self.env_id} gave a reward that is not finite")
        far = _far_entries(torch.as_tensor(state_S), spaces, self.env_id)
        return [*doubt_pictures(own.dataset, own.spec.observation_keys), *far]

    def close(self) -> None:
        """Close the environments and end the processes."""
        self._slots.close()

    def _checked(self, states: NDArray[np.float64]) -> NDArray[np.float64]:
        if not np.isfinite(states).all():
            raise TrainingError(f"the environment {self.env_id} gave an observation that is not finite")
        return states


def _moves(wrapper: WrapperSpec) -> bool:
    """Return whether a wrapper keeps statistics that its specification does not hold."""
    return wrapper.name in ("NormalizeObservation", "NormalizeReward")


def _far_entries(state_S: Tensor, spaces: Spaces, env_id: str) -> Iterator[str]:
    """Yield a line for each of the first entries of an environment's first observation that no data are near to."""
    mean_S, scale_S = spaces.state_mean_S.cpu(), spaces.state_scale_S.cpu()
    differs_S = (scale_S == 0) & ((state_S - mean_S).abs() > 1e-6 * mean_S.abs().clamp(min=1.0))
    for i in differs_S.nonzero().flatten().tolist()[:MAX_DOUBTS]:
        yield (
            f"entry {i} of the observation is {mean_S[i]:.6g} in all of the data and {state_S[i]:.6g} in {env_id}: "
            "policies do not see it"
        )
    far_S = spaces.beyond_bound(state_S.to(spaces.state_mean_S.device)).cpu()
    if 2 * int(far_S.sum()) > int((scale_S != 0).sum()):  # a few may be: data from one corner of a maze
        i = int(far_S.nonzero()[0])
        yield (
            f"{int(far_S.sum())} of {len(far_S)} entries of the observation are far from the data in {env_id}, as "
            f"entry {i}, {state_S[i]:.6g} there, {mean_S[i]:.6g} +- {1 / scale_S[i]:.3g} in the data: is it the "
            "environment of the data, with all its wrappers?"
        )


def draw_grid(cells: Sequence[GridCell], path: Path, *, title: str) -> None:
    """Write a heat map of the scores (returns, without references) over beta and guidance scale, or nats, as PNG.

    Args:
        cells: one per beta and guidance scale, or per beta and budget in nats.
        path: the file.
        title: stands above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = "return_mean" if any(cell.score is None for cell in cells) else "score"
    betas = sorted({cell.beta for cell in cells})
    strength = "nats" if any(cell.nats for cell in cells) else "guidance_scale"
    scales = sorted({getattr(cell, strength) for cell in cells})
    values = np.full((len(betas), len(scales)), np.nan)
    for cell in cells:
        values[betas.index(cell.beta), scales.index(getattr(cell, strength))] = getattr(cell, measure)
    figure = Figure(figsize=(2.2 + 0.9 * len(scales), 1.6 + 0.6 * len(betas)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axes.set(xlabel=strength.replace("_", " "), ylabel="beta")
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, label="normalized score" if measure == "score" else "return")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
