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
from aepo.data.episodes import (
    MIN_RANGE,
    SMALLEST,
    accepted,
    action_bounds,
    check_episode,
    check_observations,
    data_file,
    flatten,
    one_line,
    read_episodes,
    rewards_of,
    scalar_observations,
)
from aepo.data.library import open_dataset
from aepo.documents import parse_json
from aepo.errors import DataError, ResourceError
from aepo.files import replacing
from aepo.tasks import RewardRule

CACHE_FORMAT = 6
MAX_HELD_OUT = 10_000
"""Transitions that are held out at most, whatever the share: what is measured on so many is known to 1 %."""
MIN_STD = 1e-3
"""A smaller standard deviation of a state's entry counts as this one, in the entry's own units."""
MAX_SPREADS = 1000.0
"""The farthest value of an entry lies at most so many of what counts as its standard deviation from the mean."""
MIN_BOUND = 10.0
"""Evaluation may go at least so many standard deviations from the mean, as in stable-baselines3's VecNormalize."""
MIN_RETURN_RANGE = 0.01
"""The returns of episodes are taken to span at least this share of the largest."""
CONSTANT = 1e-12
"""An entry that spans at most this share of its magnitude is constant."""
FAR = 2.0**-14
"""An entry that spans less than this share of its magnitude keeps 10 bits or fewer in float32."""


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


class NextActions(NamedTuple):
    """The actions that the data took after some transitions."""

    actions_BA: Tensor
    """The next action; where there is none, the transition's own."""
    exists_B: Tensor
    """False for the last transition of an episode, bool."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spaces:
    """What a policy must know of its environment, and what is stored with it."""

    state_mean_S: Tensor
    """Mean state in double precision: an observation is centred before single precision holds it."""
    state_scale_S: Tensor
    """1 / standard deviation; 0 for an entry that is constant in the data, which nothing can be learned of."""
    action_low_A: Tensor
    """Lowest actions, in the type of the action space; the highest are `action_high_A`."""
    action_high_A: Tensor
    state_bound_S: Tensor | None = None
    """Largest magnitude of a normalised state, from evaluation, that networks see; none = any."""

    def normalise_states(self, states_BS: Tensor) -> Tensor:
        """Return states with mean 0 and variance 1 over the data, cut where they are far from all data, float32."""
        normalised_BS = self._standardise(states_BS)
        bound_S = self.state_bound_S
        return (normalised_BS if bound_S is None else normalised_BS.clamp(-bound_S, bound_S)).float()

    def beyond_bound(self, states_BS: Tensor) -> Tensor:
        """Return which entries of states `normalise_states` cuts, [B, S]."""
        if self.state_bound_S is None:
            return torch.zeros_like(states_BS, dtype=torch.bool)
        return self._standardise(states_BS).abs() > self.state_bound_S * (1 + 1e-6)  # which single precision rounded

    def _standardise(self, states_BS: Tensor) -> Tensor:
        return (states_BS.double() - self.state_mean_S) * self.state_scale_S

    def denormalise_actions(self, actions_BA: Tensor) -> Tensor:
        """Return actions in the environment's units from actions in [-1, 1], to rounding within the bounds."""
        kind = torch.promote_types(self.action_low_A.dtype, torch.float32)
        low_A, high_A = self.action_low_A.to(kind), self.action_high_A.to(kind)
        return low_A + (actions_BA.to(kind) + 1.0) * 0.5 * (high_A - low_A)

    def accept(self, actions_BA: Tensor) -> NDArray[Any]:
        """Return actions in the environment's units, in its type and within its bounds, from actions in [-1, 1]."""
        raw_BA = self.denormalise_actions(actions_BA).cpu().numpy()
        return accepted(raw_BA, self.action_low_A.cpu().numpy(), self.action_high_A.cpu().numpy())


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
    note: str = ""
    """What a reader should know of how rewards are read."""
    doubt: str = ""
    """What speaks against reading rewards like that; empty = nothing."""
    held_out: "Transitions | None" = None
    """Episodes that were taken from these, on which no stage trains."""

    def __post_init__(self) -> None:
        assert int(self.episode_ends_E[-1]) == len(self.rows_ND)

    @property
    def state_dim(self) -> int:
        """S, the entries of a state."""
        return self.spaces.state_mean_S.shape[0]

    @property
    def action_dim(self) -> int:
        """A, the entries of an action."""
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

    def hold_out(self, share: float) -> "Transitions":
        """Return the data without a share of their whole episodes, which are then `held_out`; of share 0 the data.

        They are spread evenly over the data: at least one, and as many as hold MAX_HELD_OUT steps at most.

        Raises:
            DataError: if there is one episode alone.
        """
        if share == 0:
            return self
        num_episodes = len(self.episode_ends_E)
        if num_episodes < 2:
            raise DataError(f"no episode of {num_episodes} can be held out; wanted two, or data.held_out_share=0")
        lengths_E = self.episode_ends_E.diff(prepend=self.episode_ends_E.new_zeros(1))
        num = min(max(1, round(share * num_episodes)), num_episodes - 1)
        chosen_K = (torch.arange(num, device=lengths_E.device) * 2 + 1) * num_episodes // (2 * num)
        few = int((lengths_E[chosen_K].cumsum(0) <= MAX_HELD_OUT).sum())
        if few < num:
            num = max(1, few)
            chosen_K = (torch.arange(num, device=lengths_E.device) * 2 + 1) * num_episodes // (2 * num)
        is_held_E = torch.zeros(num_episodes, dtype=torch.bool, device=lengths_E.device)
        is_held_E[chosen_K] = True
        is_held_N = is_held_E.repeat_interleave(lengths_E)
        parts = []
        for here_E, here_N in ((is_held_E, is_held_N), (~is_held_E, ~is_held_N)):
            ends_E = lengths_E[here_E].cumsum(0)
            parts.append(dataclasses.replace(self, rows_ND=self.rows_ND[here_N], episode_ends_E=ends_E))
        held, rest = parts
        return dataclasses.replace(rest, held_out=held)

    def sample(self, num: int) -> Pairs:
        """Return states and actions of at most `num` rows that lie equally far apart, the same at every call."""
        states_BS, actions_BA = self.take_pairs(self.sample_rows(num))
        return Pairs(states_BS.contiguous(), actions_BA.contiguous())  # strided operands have no fast path

    def sample_rows(self, num: int) -> Tensor:
        """Return at most `num` rows that lie equally far apart, ascending."""
        num = min(num, len(self))
        return torch.arange(num, device=self.rows_ND.device) * len(self) // num

    def take_next_actions(self, index_B: Tensor) -> NextActions:
        """Return the actions that the data took after these rows."""
        following_B = index_B + 1
        ends_B = self.episode_ends_E[torch.searchsorted(self.episode_ends_E, following_B)]
        exists_B = ends_B != following_B
        return NextActions(self.take_pairs(torch.where(exists_B, following_B, index_B)).actions_BA, exists_B)

    def batch(self, rows_BD: Tensor) -> Batch:
        """Return raw rows normalised and cut into their parts."""
        s, a = self.state_dim, self.action_dim
        rows_BD = (rows_BD - self.shift_D) * self.scale_D
        states, actions, rewards, terminals, next_states = rows_BD.split_with_sizes([s, a, 1, 1, s], dim=1)
        return Batch(states, actions.clamp(-1.0, 1.0), rewards.squeeze(1), terminals.squeeze(1), next_states)

    def to(self, device: torch.device) -> "Transitions":
        """Return the same transitions on a device."""
        tensors = {field.name: getattr(self.spaces, field.name) for field in dataclasses.fields(Spaces)}
        spaces = Spaces(**{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})
        moved = {name: getattr(self, name).to(device) for name in ("rows_ND", "shift_D", "scale_D", "episode_ends_E")}
        held_out = None if self.held_out is None else self.held_out.to(device)
        return dataclasses.replace(self, spaces=spaces, held_out=held_out, **moved)


def load_transitions(
    dataset_id: str, *, observation_keys: tuple[str, ...] = (), reward_rule: RewardRule = "return_range"
) -> Transitions:
    """Return a Minari data set as transitions on the CPU, decoded once and then read from a cache of its content.

    Raises:
        DataError: if the data set is not there, its observations are no numbers, its actions are not a bounded Box, it
            has no transition, or it holds a value that float32 does not.
        ResourceError: if it does not fit into memory.
    """
    dataset = open_dataset(dataset_id)
    bounds = action_bounds(dataset)
    check_observations(dataset, observation_keys)
    ends = reward_rule if reward_rule in ("until_goal", "by_data") else "stored"
    key = hashlib.sha256(
        json.dumps([CACHE_FORMAT, content_digest(dataset), observation_keys, ends]).encode()
    ).hexdigest()
    cache = cache_folder() / f"{key[:24]}.safetensors"
    if not (found := _read_cache(cache)):
        decoded = _decode(dataset, observation_keys, *bounds, ends=ends)
        _write_cache(cache, *decoded)
        found = _read_cache(cache) or decoded
    rows_ND, ends_E, facts = found
    low_A, high_A = map(torch.from_numpy, bounds)
    state_dim, action_dim = (rows_ND.shape[1] - len(low_A) - 2) // 2, len(low_A)
    mean_S = torch.tensor(parse_json(facts["state_mean"]), dtype=torch.float64)
    offset_S = torch.tensor(parse_json(facts["state_offset"]), dtype=torch.float64)
    state_scale_S, state_bound_S = _state_map(facts, mean_S)
    reward_shift, reward_scale, note, doubt = _reward_map(reward_rule, facts)
    shift_D = torch.cat(
        [mean_S.float(), (low_A.float() + high_A.float()) / 2, torch.tensor([reward_shift, 0.0]), mean_S.float()]
    )
    action_scale_A = 2.0 / (high_A.float() - low_A.float())
    scale_D = torch.cat([state_scale_S, action_scale_A, torch.tensor([reward_scale, 1.0]), state_scale_S])
    assert len(shift_D) == rows_ND.shape[1] == 2 * state_dim + action_dim + 2
    return Transitions(
        rows_ND=rows_ND,
        shift_D=shift_D,
        scale_D=scale_D,
        spaces=Spaces(
            state_mean_S=mean_S + offset_S,
            state_scale_S=state_scale_S,
            action_low_A=low_A,
            action_high_A=high_A,
            state_bound_S=state_bound_S,
        ),
        digest=_digest_of(facts, shift_D, scale_D, alike=bool(doubt)),
        episode_ends_E=ends_E,
        note=note,
        doubt=doubt,
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


def content_digest(dataset: Any) -> str:
    """Return a digest of the bytes of a data set's files: what is decoded of them depends on nothing else."""
    digest = hashlib.sha256()  # which processors have instructions for
    folder = Path(dataset.storage.data_path)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):  # Arrow's episodes are folders
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _digest_of(facts: dict[str, str], shift_D: Tensor, scale_D: Tensor, *, alike: bool) -> str:
    """Return what names transitions: the digest of their rows, and of the maps where earlier versions had others.

    Those read odd data differently, and what was trained on either reading is never mixed with the other.
    """
    std_S = torch.tensor(parse_json(facts["state_std"]))
    varies_S = scale_D[: len(std_S)] != 0  # a constant trains nothing in any version
    same = torch.equal(scale_D[: len(std_S)][varies_S], 1.0 / std_S[varies_S].clamp(min=MIN_STD))
    if same and not alike and facts["half_rewards"] == "no":
        return facts["digest"]
    maps = shift_D.numpy().tobytes() + scale_D.numpy().tobytes()
    return hashlib.sha256(facts["digest"].encode() + maps).hexdigest()[:16]


def _state_map(facts: dict[str, str], mean_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of the states' entries, and the largest magnitude that networks see of each.

    A spread below 1e-3 counts as 1e-3, so that jitter is no signal, unless no entry has a larger one; no value of the
    data is more than 1,000 spreads from the mean. An entry that is constant counts for nothing. Evaluation may go 10
    standard deviations from the mean, or as far as the data go.
    """
    low_S, high_S = (torch.tensor(parse_json(facts[key]), dtype=torch.float64) for key in ("state_low", "state_high"))
    std_S = torch.tensor(parse_json(facts["state_std"]))
    constant_S = torch.tensor(parse_json(facts["state_constant"]), dtype=torch.bool)
    farthest_S = torch.maximum(high_S - mean_S, mean_S - low_S).float()
    largest = std_S.masked_fill(constant_S, 0.0).max().item()
    smallest_S = (farthest_S / MAX_SPREADS).clamp(min=min(MIN_STD, largest) if largest > 1e-30 else MIN_STD)
    scale_S = (1.0 / torch.maximum(std_S, smallest_S)).masked_fill(constant_S, 0.0)
    return scale_S, (farthest_S * scale_S).clamp(min=MIN_BOUND)


def _reward_map(rule: RewardRule, facts: dict[str, str]) -> tuple[float, float, str, str]:
    """Return (shift, scale) of r -> (r - shift) * scale, and the note and the doubt that go with it."""
    low, high = float(facts["return_min"]), float(facts["return_max"])
    fail, success = float(facts["reward_min"]), float(facts["reward_max"])
    if rule == "by_data" and facts["ends_at_success"] == "yes" and success - fail >= MIN_RANGE:
        note = (
            f"its episodes stop at the first reward of {success:g}, all others are {fail:g}: that step is taken for "
            "success, which ends an episode, and each other one costs 1 (--set data.reward_rule=return_range "
            "takes the file's flags and rewards)"
        )
        return success, 1.0 / (success - fail), note, ""
    if rule in ("return_range", "by_data"):
        largest = max(abs(low), abs(high))
        if largest < MIN_RANGE:
            return 0.0, 1.0, "", "all its episodes have the return 0, so rewards teach nothing"
        if high - low >= MIN_RETURN_RANGE * largest:
            return 0.0, 1000.0 / (high - low), "", ""
        scale = 1000.0 / (MIN_RETURN_RANGE * largest)
        doubt = (
            f"returns of its episodes are nearly alike, {low:.6g} to {high:.6g}: rewards are multiplied by "
            f"{scale:.4g}, as if returns spanned a hundredth of the largest (--set data.reward_rule=raw takes them as "
            "stored)"
        )
        return 0.0, scale, "", doubt
    return {"raw": (0.0, 1.0, "", ""), "until_goal": (1.0, 1.0, "", "")}[rule]


class _ReadRows(NamedTuple):
    """The transitions of a data set, before anything is judged of them as a whole."""

    rows_ND: NDArray[np.float32]
    ends_E: list[int]
    """The row behind each episode's last one."""
    returns_E: list[float]
    low_S: NDArray[np.float64]
    """The lowest of each entry of the states, less the offset; `high_S` the highest."""
    high_S: NDArray[np.float64]
    has_half_rewards: bool
    """It is true if any reward is stored in half precision."""


def _decode(
    dataset: Any,
    keys: tuple[str, ...],
    action_low_A: NDArray[Any],
    action_high_A: NDArray[Any],
    *,
    ends: str,
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Return rows, the ends of episodes and what is known of them.

    `ends` says where episodes end: "stored", "until_goal" or "by_data".
    """

    def read(offset_S: NDArray[np.float64] | None) -> _ReadRows:
        return _read_rows(
            dataset, keys, action_low_A, action_high_A, until_goal=ends == "until_goal", offset_S=offset_S
        )

    found = read(None)
    range_S = found.high_S - found.low_S
    magnitude_S = np.maximum(np.abs(found.low_S), np.abs(found.high_S))
    far_S = (range_S > CONSTANT * magnitude_S) & (range_S < FAR * magnitude_S)
    offset_S = np.where(far_S, (found.low_S + found.high_S) / 2, 0.0)
    if far_S.any():  # single precision cannot tell their values apart
        del found
        found = read(offset_S)
        range_S = found.high_S - found.low_S
        magnitude_S = np.maximum(np.abs(found.low_S), np.abs(found.high_S))
    action_dim, rows = len(action_low_A), found.rows_ND
    states_NS, rewards_N = rows[:, : len(offset_S)], rows[:, len(offset_S) + action_dim]
    ends_at_success = _ends_at_success(rewards_N, np.array(found.ends_E))
    if ends == "by_data" and ends_at_success:
        rows[:, len(offset_S) + action_dim + 1] = rewards_N == rewards_N.max()
    digest = hashlib.sha256(rows.tobytes())
    if offset_S.any():
        digest.update(offset_S.tobytes())
    facts = {
        "digest": digest.hexdigest()[:16],
        "return_min": repr(min(found.returns_E)),
        "return_max": repr(max(found.returns_E)),
        "reward_min": repr(float(rewards_N.min())),
        "reward_max": repr(float(rewards_N.max())),
        "half_rewards": "yes" if found.has_half_rewards else "no",
        "ends_at_success": "yes" if ends_at_success else "no",
        "state_mean": json.dumps(states_NS.mean(axis=0, dtype=np.float64).tolist()),
        "state_std": json.dumps(states_NS.std(axis=0, dtype=np.float64).tolist()),
        "state_low": json.dumps(found.low_S.tolist()),
        "state_high": json.dumps(found.high_S.tolist()),
        "state_constant": json.dumps((range_S <= CONSTANT * magnitude_S).tolist()),
        "state_offset": json.dumps(offset_S.tolist()),
    }
    return torch.from_numpy(rows), torch.tensor(found.ends_E), facts


def _read_rows(
    dataset: Any,
    keys: tuple[str, ...],
    action_low_A: NDArray[Any],
    action_high_A: NDArray[Any],
    *,
    until_goal: bool,
    offset_S: NDArray[np.float64] | None,
) -> _ReadRows:
    """Read and check every episode.

    `until_goal` cuts one behind its first reward. `offset_S` is subtracted of the states before single precision holds
    them; none = nothing.
    """
    num_steps, action_dim = int(dataset.total_steps), len(action_low_A)
    if num_steps < 1:
        raise DataError(
            f"{dataset.id} holds {num_steps} transitions, wanted one at least; bring it again, or collect some"
        )
    rows: NDArray[np.float32] | None = None
    end, num_read, ends_E, returns_E, has_half_rewards = 0, 0, [], [], False
    low_S, high_S = np.zeros(0), np.zeros(0)
    scalars = scalar_observations(dataset)
    episodes = track(
        read_episodes(dataset),
        total=int(dataset.total_episodes),
        description=f"decoding {dataset.id}",
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    for episode in episodes:
        check_episode(dataset, episode, action_low_A, action_high_A, scalars=scalars)
        states = flatten(episode.observations, keys)
        rewards = rewards_of(episode)
        has_half_rewards |= np.asarray(episode.rewards).dtype == np.float16
        terminals = np.asarray(episode.terminations, dtype=np.float32)
        steps = len(rewards)
        if not states.shape[1]:
            raise DataError(f"{dataset.id}: observations have no entry, so nothing can be learned of them")
        if rows is None:
            width = 2 * states.shape[1] + action_dim + 2
            _check_memory(dataset.id, num_steps * width * 4)
            rows = np.empty((num_steps, width), dtype=np.float32)
            low_S, high_S = np.full(states.shape[1], np.inf), np.full(states.shape[1], -np.inf)
        elif 2 * states.shape[1] + action_dim + 2 != rows.shape[1]:
            raise DataError(
                f"{data_file(dataset)}: episode {episode.id}: observations have {states.shape[1]} entries, those "
                f"before have {(rows.shape[1] - action_dim - 2) // 2}"
            )
        num_read += steps
        if num_read > num_steps:
            raise DataError(f"{dataset.id} holds more than the {num_steps} steps that its metadata state")
        if until_goal and (rewards > 0).any():
            steps = int(np.argmax(rewards > 0)) + 1
            terminals[steps - 1] = 1.0
        states = _normal(states if offset_S is None else states - offset_S)
        rewards = _normal(rewards)
        low_S, high_S = np.minimum(low_S, states.min(axis=0)), np.maximum(high_S, states.max(axis=0))
        actions = _normal(np.asarray(episode.actions, dtype=np.float32))
        parts: list[NDArray[Any]] = [states[:-1], actions, rewards[:, None], terminals[:, None], states[1:]]
        np.concatenate([part[:steps] for part in parts], axis=1, out=rows[end : end + steps])
        returns_E.append(float(np.sum(rewards[:steps])))
        end += steps
        ends_E.append(end)
    if rows is None or num_read != num_steps:
        raise DataError(
            f"{dataset.id} holds {num_read} steps, its metadata state {num_steps}: bring it again, or mend the metadata"
        )
    return _ReadRows(rows[:end], ends_E, returns_E, low_S, high_S, has_half_rewards)


def _normal(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array with 0, or -0, for numbers that single precision holds as subnormal ones.

    Processes that train take these for 0 and others do not: data would depend on which decodes them first.
    """
    return np.where(np.abs(array) < SMALLEST, np.copysign(array.dtype.type(0), array), array)


def _ends_at_success(rewards_N: NDArray[np.float32], ends_E: NDArray[np.int64]) -> bool:
    """Return whether rewards are one of two numbers and the larger is paid once, at the end of episodes."""
    values = np.unique(rewards_N)
    if len(values) != 2:
        return False
    paid = np.flatnonzero(rewards_N == values[1])
    return bool(np.isin(paid, ends_E - 1).all())


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
