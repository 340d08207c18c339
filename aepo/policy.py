"""The trained artefact: observations in, actions out; what evaluation and users hold.

One safetensors file: the tensors, and in its metadata the run's config and a digest. Loading runs no code.
"""

import abc
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
from torch import Tensor, nn

from aepo import config as configs
from aepo.config import GuidedConfig, IQLConfig, RunConfig, SamplingConfig, TD3BCConfig
from aepo.data.transitions import Spaces
from aepo.diffusion import sampler
from aepo.diffusion.networks import NoiseNet
from aepo.documents import parse_json
from aepo.errors import CheckpointError, ConfigError
from aepo.networks import Actor, GaussianActor, TwinQ
from aepo.pipeline import GuidedState, IQLState, PipelineState, TD3BCState
from aepo.rundir import write_atomically
from aepo.stages import behavior, energy

FORMAT = "aepo-policy-1"


class Policy(nn.Module, abc.ABC):
    """A trained policy; `GuidedPolicy` and `ActorPolicy` say how states become actions."""

    def __init__(self, config: RunConfig, spaces: Spaces):
        """`config` is the run that trained it."""
        super().__init__()
        self.config = config
        for name, tensor in _fields(spaces).items():
            self.register_buffer(name, tensor)

    @staticmethod
    def make(config: RunConfig, spaces: Spaces) -> "Policy":
        """Return the policy that a run trains, its networks untrained."""
        if isinstance(config, GuidedConfig):
            return GuidedPolicy(config, spaces)
        return ActorPolicy(config, spaces)

    @staticmethod
    def from_state(config: RunConfig, state: PipelineState, spaces: Spaces) -> "Policy":
        """Return the policy of a run as it stands; it has weights of its own."""
        policy = Policy.make(config, spaces)
        policy.copy_weights(state)
        return policy.to(spaces.state_mean_S.device)

    @abc.abstractmethod
    def copy_weights(self, state: PipelineState) -> None:
        """Take the weights of a run as it stands."""

    @abc.abstractmethod
    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return one action in [-1, 1]^A per normalised state, [B, A]."""

    @property
    def spaces(self) -> Spaces:
        """The normalisation of states and the bounds of actions."""
        return Spaces(**{field.name: self.get_buffer(field.name) for field in dataclasses.fields(Spaces)})

    def act(self, observations_NS: NDArray[Any] | Tensor, generator: torch.Generator) -> NDArray[Any]:
        """Return one action per observation, [N, A], within the action space of the data and in its type.

        On the CPU one thread computes, whatever torch's number of threads is.

        Args:
            observations_NS: raw observations, Dict observations joined as the config says.
            generator: source of the draws, on the policy's device.
        """
        spaces = self.spaces
        device = spaces.state_mean_S.device
        with _one_thread():
            states_NS = spaces.normalise_states(torch.as_tensor(observations_NS, device=device))
            return spaces.accept(self.sample(states_NS, generator))

    def num_cut(self, observations_NS: NDArray[Any]) -> int:
        """Return how many entries of raw observations are so far from the data that networks see the bound instead."""
        spaces = self.spaces
        states_NS = torch.as_tensor(observations_NS, device=spaces.state_mean_S.device)
        return int(spaces.beyond_bound(states_NS).sum())

    def save(self, path: Path) -> None:
        """Write the policy as one safetensors file, atomically."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        facts = {"config": dataclasses.asdict(self.config), "digest": _digest(tensors)}
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
            raise CheckpointError(f"{path} cannot be read as a policy: {error}") from error
        if FORMAT not in metadata:
            raise CheckpointError(f"{path} is no {FORMAT}: its metadata hold {sorted(metadata) or 'nothing'}")
        try:
            facts = parse_json(metadata[FORMAT])
            if facts["digest"] != _digest(tensors):
                raise CheckpointError(f"{path} has been changed since it was written: its digest differs")
            spaces = Spaces(
                **{field.name: tensors[field.name] for field in dataclasses.fields(Spaces) if field.name in tensors}
            )
            policy = Policy.make(configs.from_dict(facts["config"]), spaces)
            policy.load_state_dict(tensors)
        except (ConfigError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} does not hold the policy that it names: {reason}") from error
        return policy.to(device)


class GuidedPolicy(Policy):
    """pi*(a|s) ∝ mu(a|s) exp(beta Q(s, a)) as a sampler of actions [M1, M4].

    `with_sampling` gives the same networks another beta, guidance scale, number of solver steps or of
    candidates, none of which need training.
    """

    config: GuidedConfig

    def __init__(self, config: GuidedConfig, spaces: Spaces, sampling: SamplingConfig | None = None):
        """Make a policy with untrained networks; `sampling` other than the config's if given."""
        super().__init__(config, spaces)
        self.sampling = sampling or config.sampling
        dims = len(spaces.state_mean_S), len(spaces.action_low_A)
        self.noise = NoiseNet(*dims, hidden_size=config.behavior.hidden_size, num_layers=config.behavior.num_layers)
        self.energy = energy.make_net(config.energy, *dims)
        self.q = TwinQ(*dims, config.critic)
        self.requires_grad_(False)
        self._grid: sampler.Grid | None = None

    def copy_weights(self, state: PipelineState) -> None:
        """Take the averaged noise and energy networks and the critics."""
        assert isinstance(state, GuidedState)
        self.noise.load_state_dict(state.behavior.ema.net.state_dict())
        self.energy.load_state_dict(state.energy.ema.net.state_dict())
        self.q.load_state_dict(state.critic.q.state_dict())

    def with_sampling(self, sampling: SamplingConfig) -> "GuidedPolicy":
        """Return this policy, the networks shared, sampling in another way.

        Raises:
            ConfigError: for a beta that the energy's target was not trained for.
        """
        configs.check_beta(self.config.energy, sampling.beta)
        twin = GuidedPolicy(self.config, self.spaces, sampling)
        twin.noise, twin.energy, twin.q = self.noise, self.energy, self.q
        return twin

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return one action in [-1, 1]^A per normalised state, [B, A]; the best of `num_candidates` by Q."""
        num_candidates = self.sampling.num_candidates
        repeated, grid = states_BS.repeat_interleave(num_candidates, dim=0), self._grid_on(states_BS.device)
        shape = (len(repeated), len(self.spaces.action_low_A))
        start = self.sampling.temperature * torch.randn(shape, generator=generator, device=states_BS.device)
        actions = sampler.solve(self._predict(repeated, grid), start, grid)
        if num_candidates == 1:
            return actions
        q = self.q.lowest(repeated, actions).view(-1, num_candidates)
        best = q.argmax(dim=1, keepdim=True)[..., None].expand(-1, 1, actions.shape[1])
        return actions.view(len(states_BS), num_candidates, -1).gather(1, best).squeeze(1)

    def _predict(self, states_BS: Tensor, grid: sampler.Grid) -> sampler.Predict:
        """Return m_t + w sigma_t^2 / alpha_t grad E_t  [M4, M9]."""
        mean = behavior.predict_mean(self.noise, states_BS, grid)
        if self.sampling.guidance_scale == 0:
            return mean
        slope = energy.predict_slope(self.energy, states_BS, self.sampling.beta, grid)
        weights = [self.sampling.guidance_scale * sigma**2 for sigma in grid.sigma]
        return lambda a_t_BA, i: torch.add(mean(a_t_BA, i), slope(a_t_BA, i), alpha=weights[i])

    def _grid_on(self, device: torch.device) -> sampler.Grid:
        if self._grid is None or self._grid.t.device != device:
            self._grid = sampler.make_grid(self.sampling.num_steps, device=device)
        return self._grid


class ActorPolicy(Policy):
    """An actor network, as IQL and TD3+BC train it; of IQL's Gaussian the mean acts."""

    def __init__(self, config: RunConfig, spaces: Spaces):
        """Make a policy with an untrained network."""
        super().__init__(config, spaces)
        dims = len(spaces.state_mean_S), len(spaces.action_low_A)
        self.actor: Actor
        if isinstance(config, IQLConfig):
            self.actor = GaussianActor(*dims, config.actor)
        else:
            assert isinstance(config, TD3BCConfig)
            self.actor = Actor(*dims, config.actor_critic)
        self.requires_grad_(False)

    def copy_weights(self, state: PipelineState) -> None:
        """Take the actor."""
        assert isinstance(state, IQLState | TD3BCState)
        net = state.actor.net if isinstance(state, IQLState) else state.actor_critic.actor
        self.actor.load_state_dict(net.state_dict())

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002  # nothing is drawn
        """Return the actor's action per normalised state, [B, A]."""
        return self.actor(states_BS)  # type: ignore[no-any-return]


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
    return {field.name: getattr(spaces, field.name) for field in dataclasses.fields(spaces)}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
