"""Samplers turn normalised states into actions in [-1, 1]: by diffusion, guided or not, or by an actor."""

import abc
import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from aepo import config as configs
from aepo.config import BehaviorConfig, CriticConfig, EnergyConfig, SamplingConfig
from aepo.data.transitions import Pairs, Transitions
from aepo.diffusion import guidance, sampler
from aepo.diffusion.networks import ClosedForm, EnergyNet, NoiseNet
from aepo.errors import ConfigError
from aepo.networks import TwinQ
from aepo.stages import States, behavior, critic, energy


class Sampler(nn.Module, abc.ABC):
    """The networks of a policy; their weights are what a policy's file holds."""

    sampling: SamplingConfig | None = None
    """What can be chosen after training; None where there is nothing to choose."""
    data: Pairs | None = None
    """A few states of the data and the actions there, for what is measured of a trained policy."""

    @abc.abstractmethod
    def copy_weights(self, states: States, data: Transitions) -> None:
        """Take the weights of a run as it stands, and what else it acts by, measured on its data."""

    @abc.abstractmethod
    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return one action in [-1, 1]^A per normalised state, [B, A]."""

    def spent(self) -> float | None:
        """Return the nats that guidance has cost per action so far, on the mean; None where that is not known."""
        return None

    def cost(self) -> dict[str, float]:
        """Return what guidance costs on states of the data, by names of metrics; nothing where there is none."""
        return {}

    def with_sampling(self, sampling: SamplingConfig) -> "Sampler":  # noqa: ARG002  # nothing is chosen
        """Return the same networks, sampling in another way.

        Raises:
            ConfigError: if there is nothing to choose, or for a choice that training does not allow.
        """
        raise ConfigError("this policy has one way to act: nothing of it can be chosen after training")


class CloneSampler(Sampler):
    """The behaviour model as a sampler of actions: of several per state the one with the largest Q is taken.

    `with_sampling` gives the same networks another number of solver steps or of candidates.
    """

    sampling: SamplingConfig

    def __init__(
        self,
        stages: tuple[BehaviorConfig, CriticConfig],
        sampling: SamplingConfig,
        *,
        state_dim: int,
        action_dim: int,
        critics: Callable[[States], TwinQ] = lambda states: states["critic"].q,
    ):
        """Make untrained networks, as the configs of the stages that train them say.

        `critics` returns those that choose among a run's states.
        """
        super().__init__()
        of_behavior, of_critic = stages
        self._critics = critics
        self._dims = {"state_dim": state_dim, "action_dim": action_dim}
        self.sampling = sampling
        self.noise = NoiseNet(**self._dims, hidden_size=of_behavior.hidden_size, num_layers=of_behavior.num_layers)
        self.q = TwinQ(**self._dims, config=of_critic)
        self.requires_grad_(False)
        self._grid: sampler.Grid | None = None

    def copy_weights(self, states: States, data: Transitions) -> None:  # noqa: ARG002  # nothing is measured
        """Take the averaged noise network and the critics."""
        self.noise.load_state_dict(states["behavior"].ema.net.state_dict())
        self.q.load_state_dict(self._critics(states).state_dict())

    def with_sampling(self, sampling: SamplingConfig) -> Self:
        """Return the same networks, sampling in another way.

        Raises:
            ConfigError: for guidance, of which this policy has none.
        """
        configs.check_unguided(sampling)
        return self._twin(sampling)

    def _twin(self, sampling: SamplingConfig) -> Self:
        twin = copy.copy(self)
        twin.sampling, twin._grid = sampling, None
        return twin

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Return one action in [-1, 1]^A per normalised state, [B, A]; the best of `num_candidates` by Q."""
        num_candidates = self.sampling.num_candidates
        repeated, grid = states_BS.repeat_interleave(num_candidates, dim=0), self._grid_on(states_BS.device)
        shape = (len(repeated), self._dims["action_dim"])
        start = self.sampling.temperature * torch.randn(shape, generator=generator, device=states_BS.device)
        actions = self._draw(repeated, start, grid)
        if num_candidates == 1:
            return actions
        return best_of(self.q, states_BS, actions.view(len(states_BS), num_candidates, -1))

    def _draw(self, states_BS: Tensor, start_BA: Tensor, grid: sampler.Grid) -> Tensor:
        """Return one action per state and start of the solver, [B, A]."""
        return sampler.solve(behavior.predict_mean(self.noise, states_BS, grid), start_BA, grid)

    def _grid_on(self, device: torch.device) -> sampler.Grid:
        if self._grid is None or self._grid.t.device != device:
            self._grid = sampler.make_grid(self.sampling.num_steps, device=device)
        return self._grid


def best_of(q: TwinQ, states_BS: Tensor, actions_BKA: Tensor) -> Tensor:
    """Return of K actions in each state the one with the largest min_i Q_i, the first of equals, [B, A]."""
    num_states, num_candidates, action_dim = actions_BKA.shape
    q_B = q.lowest(states_BS.repeat_interleave(num_candidates, dim=0), actions_BKA.flatten(0, 1))
    best_B = q_B.view(num_states, num_candidates).argmax(dim=1)
    return actions_BKA.gather(1, best_B[:, None, None].expand(-1, 1, action_dim)).squeeze(1)


class GuidedSampler(CloneSampler):
    """pi*(a|s) ∝ mu(a|s) exp(beta Q(s, a)) as a sampler of actions [M1, M4].

    `with_sampling` gives the same networks another beta, guidance scale, number of solver steps or of
    candidates, none of which need training.
    """

    def __init__(
        self,
        stages: tuple[BehaviorConfig, CriticConfig, EnergyConfig],
        sampling: SamplingConfig,
        *,
        state_dim: int,
        action_dim: int,
    ):
        """Make untrained networks, as the configs of the stages that train them say."""
        super().__init__(stages[:2], sampling, state_dim=state_dim, action_dim=action_dim)
        self._of_energy = stages[2]
        self.energy: EnergyNet | ClosedForm = ClosedForm()
        if self._of_energy.is_learned:
            self.energy = energy.make_net(self._of_energy, **self._dims)
        self.requires_grad_(False)
        self._budget: guidance.Budget | None = None
        self._spent: Tensor | float = 0.0
        self._num_guided = 0

    def copy_weights(self, states: States, data: Transitions) -> None:
        """Take the averaged noise and energy networks and the critics; the closed form takes the scale of Q."""
        super().copy_weights(states, data)
        if isinstance(self.energy, ClosedForm):
            self.energy.scale = critic.advantage_scale(states["critic"], data)
        else:
            self.energy.load_state_dict(states["energy"].ema.net.state_dict())

    def with_sampling(self, sampling: SamplingConfig) -> Self:
        """Return the same networks, sampling in another way.

        Raises:
            ConfigError: for a beta that the energy's target was not trained for.
        """
        configs.check_beta(self._of_energy, sampling.beta)
        twin = self._twin(sampling)
        twin._budget, twin._spent, twin._num_guided = None, 0.0, 0
        return twin

    def _draw(self, states_BS: Tensor, start_BA: Tensor, grid: sampler.Grid) -> Tensor:
        """Return one guided action per state and start of the solver, [B, A], and count what guidance cost."""
        scale, meter = self._meter(len(states_BS))
        actions_BA = sampler.solve(self._predict(states_BS, grid, scale, meter), start_BA, grid)
        if meter is not None:
            self._spent, self._num_guided = self._spent + meter.spent_B.sum(), self._num_guided + len(states_BS)
        return actions_BA

    def _predict(
        self, states_BS: Tensor, grid: sampler.Grid, scale: float, meter: guidance.Meter | None
    ) -> sampler.Predict:
        """Return m_t + w sigma_t^2 / alpha_t grad E_t  [M4, M9], held to the meter's budget  [M16]."""
        mean = behavior.predict_mean(self.noise, states_BS, grid)
        if scale == 0:
            return mean
        if isinstance(self.energy, ClosedForm):
            assert meter is not None  # its policies hold states of their data
            variance_NA = meter.variance_NA
            shift, factors_N = energy.closed_shift(self.energy, self.q, states_BS, self.sampling.beta, variance_NA)
        else:
            shift, factors_N = energy.learned_shift(self.energy, states_BS, self.sampling.beta, grid)
        return guidance.guided(mean, shift, [scale * factor for factor in factors_N], meter)

    def _meter(self, num_actions: int) -> tuple[float, guidance.Meter | None]:
        """Return the guidance scale, and a new meter of its cost where there are data to know it by.

        Raises:
            ConfigError: for a budget in nats without them.
        """
        scale, nats = self.sampling.guidance_scale, self.sampling.nats
        if scale == 0:
            return 0.0, None
        if self.data is None:
            if nats:
                raise ConfigError(
                    "this policy holds no states of its data, by which sampling.nats is measured; train the run "
                    "again, or leave sampling.nats out"
                )
            return scale, None
        budget = self.budget(self.data)
        return budget.scale, budget.meter(num_actions)

    @torch.no_grad()
    def cost(self) -> dict[str, float]:
        """Return what guidance costs on states of the data, as it is sampled  [M16].

        `energy/kl` is KL(guided || behaviour) of an action in nats, mean over the states; `energy/guidance_sd` the size
        of its largest step, in deviations of the posterior; `energy/guidance_scale` w. Nothing where there is no
        guidance or no data.
        """
        if self.data is None or self.sampling.guidance_scale == 0:
            return {}
        budget = self.budget(self.data)
        meter = self._solve(self.data, budget, budget.scale)
        return {
            "energy/kl": float(meter.spent_B.mean()),
            "energy/guidance_sd": max(meter.deviations),
            "energy/guidance_scale": budget.scale,
        }

    def spent(self) -> float | None:
        """Return the nats that guidance has cost per action so far, on the mean; None where that is not known."""
        return float(self._spent) / self._num_guided if self._num_guided else None

    def budget(self, data: Pairs) -> guidance.Budget:
        """Return what guidance costs in states of the data, and the scale that keeps within `sampling.nats` there.

        It is computed once.
        """
        if self._budget is None:
            self._budget = self._find_budget(data)
        return self._budget

    @torch.no_grad()
    def _find_budget(self, data: Pairs) -> guidance.Budget:
        grid, draws = self._grid_on(data.states_BS.device), torch.Generator(data.states_BS.device).manual_seed(0)
        noise_BA = torch.randn(data.actions_BA.shape, generator=draws, device=data.actions_BA.device)
        mean = behavior.predict_mean(self.noise, data.states_BS, grid)
        variance_NA = guidance.variances(mean, data.actions_BA, noise_BA, grid)
        budget = guidance.Budget.of(grid, variance_NA, scale=self.sampling.guidance_scale, nats=self.sampling.nats)
        if not self.sampling.nats:
            return budget
        scale = guidance.scale_within(
            self.sampling.nats, budget.scale, lambda each: float(self._solve(data, budget, each).spent_B.mean())
        )
        return budget._replace(scale=scale)

    def _solve(self, data: Pairs, budget: guidance.Budget, scale: float) -> guidance.Meter:
        """Return the meter of one action in each state of the data."""
        grid, draws = self._grid_on(data.states_BS.device), torch.Generator(data.states_BS.device).manual_seed(1)
        start_BA = torch.randn(data.actions_BA.shape, generator=draws, device=data.actions_BA.device)
        meter = budget.meter(len(start_BA), sizes=True)
        predict = self._predict(data.states_BS, grid, scale, meter)
        sampler.solve(predict, self.sampling.temperature * start_BA, grid)
        return meter


class ActorSampler(Sampler):
    """A network whose output is the action."""

    def __init__(self, actor: nn.Module, find: Callable[[States], nn.Module]):
        """Take an untrained network; `find` returns the trained one among a run's states."""
        super().__init__()
        self.actor = actor.requires_grad_(False)
        self._find = find

    def copy_weights(self, states: States, data: Transitions) -> None:  # noqa: ARG002  # nothing is measured
        """Take the actor."""
        self.actor.load_state_dict(self._find(states).state_dict())

    def sample(self, states_BS: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002  # nothing is drawn
        """Return the actor's action per normalised state, [B, A]."""
        return self.actor(states_BS)  # type: ignore[no-any-return]
