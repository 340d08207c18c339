"""From a Minari data set to one read-only tensor of transitions.

N transitions, S state dim, A action dim. A row is [state S | action A | reward | terminal | next state S], so
that a batch is one gather. Rows are stored as recorded; normalisation is one affine map applied to a batch, so
the decoded rows are one memory-mapped file that all trials of a machine share.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aepo.console import err, warn
from aepo.data.episodes import action_bounds, data_file, find_problems, flatten, one_line, read_episodes
from aepo.data.library import open_dataset
from aepo.errors import DataError, ResourceError
from aepo.rundir import replacing

CACHE_FORMAT = 4


class Batch(NamedTuple):
    """B transitions, normalised: states standardised, actions in [-1, 1], rewards by the task's rule."""

    states_BS: Tensor
    actions_BA: Tensor
    rewards_B: Tensor
    terminals_B: Tensor
    next_states_BS: Tensor


class Pairs(NamedTuple):
    """The states and actions of B transitions, normalised as in a Batch: half of its numbers or less."""

    states_BS: Tensor
    actions_BA: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spaces:
    """What a policy must know of its environment; stored with it."""

    state_mean_S: Tensor
    state_scale_S: Tensor
    """1 / standard deviation."""
    action_low_A: Tensor
    action_high_A: Tensor

    def normalise_states(self, states_BS: Tensor) -> Tensor:
        """Return states with mean 0 and variance 1 over the data."""
        return (states_BS - self.state_mean_S) * self.state_scale_S

    def denormalise_actions(self, actions_BA: Tensor) -> Tensor:
        """Return actions in the environment's units from actions in [-1, 1]."""
        return self.action_low_A + (actions_BA + 1.0) * 0.5 * (self.action_high_A - self.action_low_A)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transitions:
    """All transitions of a data set and the affine map that normalises them."""

    rows_ND: Tensor
    shift_D: Tensor
    scale_D: Tensor
    spaces: Spaces
    digest: str
    """SHA-256 over the decoded rows, first 16 hex digits."""
    episode_ends_E: Tensor
    """Row behind the last one of each episode, ascending."""

    def __post_init__(self) -> None:
        assert int(self.episode_ends_E[-1]) == len(self.rows_ND)

    @property
    def state_dim(self) -> int:
        """S."""
        return self.spaces.state_mean_S.shape[0]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.spaces.action_low_A.shape[0]

    def __len__(self) -> int:
        return len(self.rows_ND)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Return transitions drawn uniformly with replacement."""
        return self.take(self.draw_rows(batch_size, generator))

    def draw_rows(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return rows drawn uniformly with replacement, [batch_size]."""
        return torch.randint(len(self), (batch_size,), generator=generator, device=generator.device)

    def take(self, index_B: Tensor) -> Batch:
        """Return the transitions of these rows."""
        return self.batch(self.rows_ND.index_select(0, index_B))

    def take_pairs(self, index_B: Tensor) -> Pairs:
        """Return the states and actions of these rows."""
        s, p = self.state_dim, self.state_dim + self.action_dim
        rows_BP = self.rows_ND[:, :p].index_select(0, index_B).sub_(self.shift_D[:p]).mul_(self.scale_D[:p])
        return Pairs(rows_BP[:, :s], rows_BP[:, s:].clamp_(-1.0, 1.0))

    def batch(self, rows_BD: Tensor) -> Batch:
        """Return raw rows normalised and cut into their parts."""
        s, a = self.state_dim, self.action_dim
        rows_BD = (rows_BD - self.shift_D) * self.scale_D
        states, actions, rewards, terminals, next_states = rows_BD.split_with_sizes([s, a, 1, 1, s], dim=1)
        return Batch(states, actions.clamp(-1.0, 1.0), rewards.squeeze(1), terminals.squeeze(1), next_states)

    def to(self, device: torch.device) -> "Transitions":
        """Return the same transitions on a device."""
        spaces = Spaces(
            **{field.name: getattr(self.spaces, field.name).to(device) for field in dataclasses.fields(Spaces)}
        )
        moved = {name: getattr(self, name).to(device) for name in ("rows_ND", "shift_D", "scale_D", "episode_ends_E")}
        return dataclasses.replace(self, spaces=spaces, **moved)


def load_transitions(
    dataset_id: str, *, observation_keys: tuple[str, ...] = (), reward_rule: str = "return_range"
) -> Transitions:
    """Return a Minari data set as transitions on the CPU, decoded once and then read from a cache.

    Raises:
        DataError: if the data set is not there, its actions are not a bounded Box, it has no transition,
            or it holds a value that is not finite.
        ResourceError: if it does not fit into memory.
    """
    dataset = open_dataset(dataset_id)
    bounds = action_bounds(dataset)
    low_A, high_A = map(torch.from_numpy, bounds)
    path = Path(dataset.storage.data_path)
    stamp = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.iterdir())]
    cut = reward_rule == "until_goal"
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, str(path), stamp, observation_keys, cut]).encode()).hexdigest()
    cache = cache_folder() / f"{key[:24]}.safetensors"
    if not (found := _read_cache(cache)):
        decoded = _decode(dataset, observation_keys, *bounds, until_goal=cut)
        _write_cache(cache, *decoded)
        found = _read_cache(cache) or decoded
    rows_ND, ends_E, facts = found
    state_dim, action_dim = (rows_ND.shape[1] - len(low_A) - 2) // 2, len(low_A)
    state_mean_S = torch.tensor(json.loads(facts["state_mean"]))
    state_scale_S = 1.0 / torch.tensor(json.loads(facts["state_std"])).clamp(min=1e-3)
    reward_shift, reward_scale = _reward_map(reward_rule, float(facts["return_min"]), float(facts["return_max"]))
    shift_D = torch.cat([state_mean_S, (low_A + high_A) / 2, torch.tensor([reward_shift, 0.0]), state_mean_S])
    scale_D = torch.cat([state_scale_S, 2.0 / (high_A - low_A), torch.tensor([reward_scale, 1.0]), state_scale_S])
    assert len(shift_D) == rows_ND.shape[1] == 2 * state_dim + action_dim + 2
    return Transitions(
        rows_ND=rows_ND,
        shift_D=shift_D,
        scale_D=scale_D,
        spaces=Spaces(
            state_mean_S=state_mean_S,
            state_scale_S=state_scale_S,
            action_low_A=low_A,
            action_high_A=high_A,
        ),
        digest=facts["digest"],
        episode_ends_E=ends_E,
    )


def cache_folder() -> Path:
    """Return where decoded data sets lie: $AEPO_CACHE, else aepo/ in the user's cache folder.

    A relative XDG_CACHE_HOME is ignored, as its specification says. A user without a home has Debian's /nonexistent.
    """
    if folder := os.environ.get("AEPO_CACHE"):
        return Path(folder)
    if (base := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return base / "aepo"
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no entry among the users
        home = Path("/nonexistent")
    return home / ".cache" / "aepo"


def _reward_map(rule: str, return_min: float, return_max: float) -> tuple[float, float]:
    """Return (shift, scale) of r -> (r - shift) * scale."""
    if rule == "return_range":
        spread = return_max - return_min
        return 0.0, 1000.0 / spread if spread > 0 else 1.0
    return {"raw": (0.0, 1.0), "until_goal": (1.0, 1.0)}[rule]


def _decode(
    dataset: Any,
    keys: tuple[str, ...],
    action_low_A: NDArray[np.float32],
    action_high_A: NDArray[np.float32],
    *,
    until_goal: bool,
) -> tuple[Tensor, Tensor, dict[str, str]]:
    num_steps, action_dim = int(dataset.total_steps), len(action_low_A)
    if num_steps < 1:
        raise DataError(f"{dataset.id} holds no transition")
    rows: NDArray[np.float32] | None = None
    end, read, ends, returns = 0, 0, [], []
    episodes = track(
        read_episodes(dataset),
        total=int(dataset.total_episodes),
        description=f"decoding {dataset.id}",
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    for episode in episodes:
        if problems := find_problems(episode, action_low_A, action_high_A):
            raise DataError(f"{data_file(dataset)}: episode {episode.id}: {problems[0]}; aepo data verify {dataset.id}")
        states = flatten(episode.observations, keys)
        rewards = np.asarray(episode.rewards, dtype=np.float32)
        terminals = np.asarray(episode.terminations, dtype=np.float32)
        steps = len(rewards)
        if rows is None:
            width = 2 * states.shape[1] + action_dim + 2
            _check_memory(dataset.id, num_steps * width * 4)
            rows = np.empty((num_steps, width), dtype=np.float32)
        read += steps
        if read > num_steps:
            raise DataError(f"{dataset.id} holds more than the {num_steps} steps that its metadata state")
        if until_goal and (rewards > 0).any():
            steps = int(np.argmax(rewards > 0)) + 1
            terminals[steps - 1] = 1.0
        actions = np.asarray(episode.actions, dtype=np.float32)
        parts = [states[:-1], actions, rewards[:, None], terminals[:, None], states[1:]]
        np.concatenate([part[:steps] for part in parts], axis=1, out=rows[end : end + steps])
        returns.append(float(np.sum(episode.rewards[:steps])))
        end += steps
        ends.append(end)
    if rows is None or read != num_steps:
        raise DataError(f"{dataset.id} holds {read} steps, its metadata state {num_steps}")
    rows = rows[:end]
    states_NS = rows[:, : (rows.shape[1] - action_dim - 2) // 2]
    facts = {
        "digest": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
        "return_min": repr(min(returns)),
        "return_max": repr(max(returns)),
        "state_mean": json.dumps(states_NS.mean(axis=0, dtype=np.float64).tolist()),
        "state_std": json.dumps(states_NS.std(axis=0, dtype=np.float64).tolist()),
    }
    return torch.from_numpy(rows), torch.tensor(ends), facts


def _check_memory(dataset_id: str, num_bytes: int) -> None:
    free = psutil.virtual_memory().available
    if 2 * num_bytes > free:
        raise ResourceError(
            f"{dataset_id} needs {2 * num_bytes / 2**30:.1f} GiB of memory to decode, {free / 2**30:.1f} GiB are "
            "free; end other programs or take a larger machine"
        )


def _read_cache(path: Path) -> tuple[Tensor, Tensor, dict[str, str]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("rows"), file.get_tensor("episode_ends"), file.metadata()
    except (FileNotFoundError, SafetensorError, OSError):
        return None


def _write_cache(path: Path, rows_ND: Tensor, ends_E: Tensor, facts: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"rows": rows_ND, "episode_ends": ends_E}, temporary, metadata=facts)
    except (OSError, SafetensorError) as error:  # a full or read-only disk costs time, not the run
        warn(f"no cache of decoded data in {path.parent} ({one_line(error)}); AEPO_CACHE names another folder")
