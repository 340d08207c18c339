"""The trained artefact: observations in, actions out; what evaluation and users hold.

One safetensors file: the tensors, and in its metadata the run's config, how it acts if otherwise, and a digest. Loading
runs no code.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from aepo import methods
from aepo.config import RunConfig, SamplingConfig
from aepo.data.transitions import Pairs, Spaces, Transitions
from aepo.documents import parse_json
from aepo.errors import CheckpointError, ConfigError
from aepo.files import write_atomically
from aepo.samplers import Sampler
from aepo.stages import States

FORMAT = "aepo-policy-1"
SAMPLE = "sample"
"""Name in the file of some states and actions of the data; policies from before they were kept have none."""
NUM_SAMPLE = 512
"""How many they are; the mean cost of guidance over so many is known to about 5 %."""


class Policy:
    """A trained policy: observations in, actions out.

    `sampling` says how guided policies act; other policies have one way to act and None there.
    """

    def __init__(self, config: RunConfig, spaces: Spaces, sampler: Sampler | None = None):
        """Make a policy, its networks untrained unless given; `config` is the run that trains it."""
        self.config, self.spaces = config, spaces
        dims = len(spaces.state_mean_S), len(spaces.action_low_A)
        self.sampler = sampler or methods.find(config.method).sampler(config, *dims)

    @staticmethod
    def from_state(config: RunConfig, states: States, data: Transitions) -> "Policy":
        """Return the policy of a run as it stands; it has weights of its own."""
        policy = Policy(config, data.spaces)
        policy.sampler.copy_weights(states, data)
        policy.sampler.data = data.sample(NUM_SAMPLE)
        policy.sampler.to(policy.device)
        return policy

    @property
    def device(self) -> torch.device:
        """The device on which it computes."""
        return self.spaces.state_mean_S.device

    @property
    def sampling(self) -> SamplingConfig | None:
        """What was chosen of what needs no training, None where there is nothing to choose."""
        return self.sampler.sampling

    def with_sampling(self, sampling: SamplingConfig) -> "Policy":
        """Return this policy, the networks shared, sampling in another way.

        Raises:
            ConfigError: if there is nothing to choose, or for a beta that the energy was not trained for.
        """
        return Policy(self.config, self.spaces, self.sampler.with_sampling(sampling))

    def act(self, observations_NS: NDArray[Any] | Tensor, generator: torch.Generator) -> NDArray[Any]:
        """Return one action per observation, [N, A], within the action space of the data and in its type.

        On the CPU one thread computes, whatever torch's number of threads is.

        Args:
            observations_NS: raw observations, Dict observations joined as the config says.
            generator: source of the draws, on the policy's device.
        """
        with _one_thread():
            states_NS = self.spaces.normalise_states(torch.as_tensor(observations_NS, device=self.device))
            return self.spaces.accept(self.sampler.sample(states_NS, generator))

    def num_cut(self, observations_NS: NDArray[Any]) -> int:
        """Return how many entries of raw observations are so far from the data that networks see the bound instead."""
        states_NS = torch.as_tensor(observations_NS, device=self.device)
        return int(self.spaces.beyond_bound(states_NS).sum())

    def save(self, path: Path) -> None:
        """Write the policy as one safetensors file, atomically."""
        whole = _fields(self.spaces) | self.sampler.state_dict()
        if self.sampling is not None and self.sampler.data is not None:
            whole |= {f"{SAMPLE}.{name}": tensor for name, tensor in self.sampler.data._asdict().items()}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in whole.items()}
        facts: dict[str, Any] = {"config": dataclasses.asdict(self.config), "digest": _digest(tensors)}
        if self.sampling is not None and self.sampling != getattr(self.config, "sampling", None):
            facts["sampling"] = dataclasses.asdict(self.sampling)
        # one entry, because safetensors writes several in no fixed order
        write_atomically(path, to_safetensors(tensors, {FORMAT: json.dumps(facts)}))

    @staticmethod
    def load(path: Path, device: torch.device | str = "cpu") -> "Policy":
        """Return the policy that `save` wrote.

        Raises:
            CheckpointError: if the file is missing, torn, changed, or no policy of this version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as a policy: {error}; bring it again, or train the run again"
            ) from error
        if FORMAT not in metadata:
            raise CheckpointError(
                f"{path} is no {FORMAT}: its metadata hold {sorted(metadata) or 'nothing'}; "
                "train the run with this version"
            )
        try:
            facts = parse_json(metadata[FORMAT])
            if facts["digest"] != _digest(tensors):
                raise CheckpointError(f"{path} has been changed since it was written: its digest differs")
            names = [field.name for field in dataclasses.fields(Spaces) if field.name in tensors]
            spaces = Spaces(**{name: tensors.pop(name).to(device) for name in names})
            policy = Policy(methods.from_dict(facts["config"]), spaces)
            sample = {
                name: tensors.pop(f"{SAMPLE}.{name}").to(device)
                for name in Pairs._fields
                if f"{SAMPLE}.{name}" in tensors
            }
            policy.sampler.load_state_dict(tensors)
            policy.sampler.data = Pairs(**sample) if sample else None
            if "sampling" in facts:  # chosen after training
                policy = policy.with_sampling(SamplingConfig(**facts["sampling"]))
        except (ConfigError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{path} does not hold the policy that it names: {reason}; train the run again"
            ) from error
        policy.sampler.to(device)
        return policy


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread for as long as it lasts: several wait for each other longer than they work."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fields(spaces: Spaces) -> dict[str, Tensor]:
    fields = {field.name: getattr(spaces, field.name) for field in dataclasses.fields(spaces)}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
