"""How trained networks turn normalised states into actions in [-1, 1]: by guided diffusion, or by an actor."""

import abc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aepo import config as configs
from aepo.config import BehaviorConfig, CriticConfig, EnergyConfig, SamplingConfig
from aepo.diffusion import sampler
from aepo.diffusion.networks import NoiseNet
from aepo.errors import ConfigError
from aepo.networks import TwinQ
from aepo.stages import States, behavior, energy


class Sampler(nn.Module, abc.ABC):
    """The networks of a policy; their weights are what a policy's file holds."""

    sampling: SamplingConfig | None = None
    """What can be chosen after training; None where there is nothing to choose."""

    @abc.abstractmethod
    def copy_weights(self, states: States) -> None:
        """Take the weights of a run as it stands."""

    @abc.abstractmethod
    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return one action in [-1, 1]^A per normalised state, [B, A]."""

    def with_sampling(self, sampling: SamplingConfig) -> "Sampler":  # noqa: ARG002  # nothing is chosen
        """Return the same networks, sampling in another way.

        Raises:
            ConfigError: if there is nothing to choose, or for a choice that training does not allow.
        """
        raise ConfigError("this policy has one way to act: nothing of it can be chosen after training")


class GuidedSampler(Sampler):
    """pi*(a|s) ∝ mu(a|s) exp(beta Q(s, a)) as a sampler of actions [M1, M4].

    `with_sampling` gives the same networks another beta, guidance scale, number of solver steps or of
    candidates, none of which need training.
    """

    sampling: SamplingConfig

    def __init__(
        self,
        stages: tuple[BehaviorConfig, CriticConfig, EnergyConfig],
        sampling: SamplingConfig,
        *,
        state_dim: int,
        action_dim: int,
    ):
        """Make untrained networks, as the configs of the stages that train them say."""
        super().__init__()
        of_behavior, of_critic, of_energy = self._stages = stages
        self._dims = {"state_dim": state_dim, "action_dim": action_dim}
        self.sampling = sampling
        self.noise = NoiseNet(**self._dims, hidden_size=of_behavior.hidden_size, num_layers=of_behavior.num_layers)
        self.energy = energy.make_net(of_energy, **self._dims)
        self.q = TwinQ(**self._dims, config=of_critic)
        self.requires_grad_(False)
        self._grid: sampler.Grid | None = None

    def copy_weights(self, states: States) -> None:
        """Take the averaged noise and energy networks and the critics."""
        self.noise.load_state_dict(states["behavior"].ema.net.state_dict())
        self.energy.load_state_dict(states["energy"].ema.net.state_dict())
        self.q.load_state_dict(states["critic"].q.state_dict())

    def with_sampling(self, sampling: SamplingConfig) -> "GuidedSampler":
        """Return the same networks, sampling in another way.

        Raises:
            ConfigError: for a beta that the energy's target was not trained for.
        """
        configs.check_beta(self._stages[2], sampling.beta)
        twin = GuidedSampler(self._stages, sampling, **self._dims)
        twin.noise, twin.energy, twin.q = self.noise, self.energy, self.q
        return twin

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return one action in [-1, 1]^A per normalised state, [B, A]; the best of `num_candidates` by Q."""
        num_candidates = self.sampling.num_candidates
        repeated, grid = states_BS.repeat_interleave(num_candidates, dim=0), self._grid_on(states_BS.device)
        shape = (len(repeated), self._dims["action_dim"])
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


class ActorSampler(Sampler):
    """A network whose output is the action."""

    def __init__(self, actor: nn.Module, find: Callable[[States], nn.Module]):
        """Take an untrained network; `find` returns the trained one among a run's states."""
        super().__init__()
        self.actor = actor.requires_grad_(False)
        self._find = find

    def copy_weights(self, states: States) -> None:
        """Take the actor."""
        self.actor.load_state_dict(self._find(states).state_dict())

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002  # nothing is drawn
        """Return the actor's action per normalised state, [B, A]."""
        return self.actor(states_BS)  # type: ignore[no-any-return]
