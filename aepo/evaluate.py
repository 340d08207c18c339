"""Roll-outs: all episodes at once, one batched call of the policy per step, no slot idle."""

import contextlib
import dataclasses
import importlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from aepo.data.transitions import flatten, open_dataset
from aepo.errors import DataError, ResourceError, TrainingError
from aepo.policy import Policy

MAX_ENVS = 50
"""Environments that live at the same time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class References:
    """Returns that normalise: score 0 = `random`, 100 = `expert`."""

    random: float
    expert: float

    def score(self, return_: float) -> float:
        """Return the normalized score of a return."""
        return 100.0 * (return_ - self.random) / (self.expert - self.random)


def references(dataset: Any) -> References | None:
    """Return the reference returns in a Minari data set's metadata, None if it has none."""
    low, high = (dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score"))
    return None if low is None or high is None else References(random=float(low), expert=float(high))


def quiet_robotics() -> None:
    """Keep gymnasium-robotics from printing a notice about Adroit's rewards whenever it is imported.

    What the notice says stands in docs/method.md, where it concerns scores.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("farama_notifications").notifications.pop("gymnasium_robotics", None)


class Evaluator:
    """The evaluation environment of a data set, held open between evaluations."""

    def __init__(self, dataset_id: str, *, observation_keys: tuple[str, ...] = (), horizon: int = 0):
        """Make the first environment, so that what is missing is said before training.

        Args:
            dataset_id: Minari id; its evaluation environment is used, or else that of the data.
            observation_keys: entries of a Dict observation, as in training.
            horizon: steps of an episode; 0 = the environment's own limit.

        Raises:
            DataError: if the data set names no environment, or one whose episodes need not end.
            ResourceError: if the environment cannot be made here.
        """
        self.dataset = open_dataset(dataset_id)
        self.references = references(self.dataset)
        self._keys = observation_keys
        self._horizon = horizon
        self._envs = [self._make()]
        spec = self._envs[0].spec
        self.env_id = spec.id if spec else ""
        if not horizon and (spec is None or spec.max_episode_steps is None):
            raise DataError(f"{dataset_id}: its environment has no time limit; --set evaluation.horizon=STEPS")

    def run(self, policy: Policy, *, num_episodes: int, seed: int) -> NDArray[np.float64]:
        """Return the undiscounted return of each episode, [num_episodes], determined by the seed.

        Raises:
            TrainingError: if the environment fails or gives a value that is not finite.
        """
        while len(self._envs) < min(num_episodes, MAX_ENVS):
            self._envs.append(self._make())
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
                    observation, reward, terminated, truncated, _ = env.step(action)
                    returns[episode] += float(reward)
                    if terminated or truncated:
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

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _observe(self, observations: Sequence[Any]) -> NDArray[np.float32]:
        stacked = _stack(observations)
        states_NS = flatten(stacked, self._keys)
        if not np.isfinite(states_NS).all():
            raise TrainingError(f"the environment {self.env_id} gave an observation that is not finite")
        return states_NS

    def _make(self) -> gymnasium.Env[Any, Any]:
        kwargs: dict[str, Any] = {"disable_env_checker": True}  # it warns of what does not concern us
        kwargs |= {"max_episode_steps": self._horizon} if self._horizon else {}
        quiet_robotics()
        with warnings.catch_warnings(), _own_temporary_folder():
            warnings.filterwarnings("ignore", message=".*is out of date.*")
            warnings.filterwarnings("ignore", message=".*rewards are currently not .*")
            try:
                return self.dataset.recover_environment(eval_env=True, **kwargs)  # type: ignore[no-any-return]
            except (ImportError, gymnasium.error.Error, AttributeError, TypeError) as error:
                if self.dataset.storage.metadata.get("env_spec") is None:
                    raise DataError(
                        f"{self.dataset.id} names no environment, so no policy can be evaluated on it"
                    ) from error
                raise ResourceError(
                    f"the environment of {self.dataset.id} cannot be made here "
                    f"({type(error).__name__}: {' '.join(str(error).split())}); "
                    f"it asks for {self.dataset.storage.metadata.get('requirements') or 'unknown packages'}"
                ) from error


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """Let what a maze environment leaves in the temporary folder when it is made (its XML) vanish at once."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="aepo-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


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
