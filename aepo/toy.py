"""The toy bench: every energy target on six two-dimensional sets where the exact answer can be drawn.

A set is a density mu on [-1, 1]^2 with a Q on it, of mean 0 and standard deviation 1. The exact policy
mu exp(beta Q) / Z [M1] is drawn by reweighting a large sample of mu. Q is given, not learned, and guidance has
scale 1, so what is compared is the target and the network's fit to it.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Generator, Tensor

from aepo.config import ENERGY_TARGETS, BehaviorConfig, EnergyConfig, Expansion
from aepo.data.transitions import Spaces, Transitions
from aepo.diffusion import posterior, sampler
from aepo.diffusion.networks import EnergyNet
from aepo.diffusion.schedule import alpha_sigma
from aepo.stages import behavior, energy, targets

NUM_SAMPLES = 4000
"""Samples in each draw that is compared."""
NUM_POOL = 400_000
"""Draws of mu that are reweighted into exact draws."""
NUM_FLOORS = 10
"""Pairs of exact draws over which the floor is averaged."""
NUM_DATA = 100_000
NUM_PROJECTIONS = 256
NUM_SOLVER_STEPS = 30
NUM_SUPPORT_STATES = 2000
"""Support states are so many at most: all states are the same."""


CLOSED_FORM = "closed_form"
"""The energy computed as actions are drawn, at the posterior mean; no network is trained."""


def variants() -> list[str]:
    """Return the closed form and the targets of stage 3, as `target/expansion` those that expand Q."""
    return [
        CLOSED_FORM,
        *(
            name
            for target, facts in ENERGY_TARGETS.items()
            for name in ([f"{target}/{c}" for c in get_args(Expansion)] if "expansion" in facts.settings else [target])
        ),
    ]


def energy_config(variant: str, steps: int) -> EnergyConfig:
    """Return the settings of one of `variants`; the closed form takes no steps."""
    if variant == CLOSED_FORM:
        variant, steps = "analytic/posterior_mean", 0
    target, _, expansion = variant.partition("/")
    settings: dict[str, Any] = {"target": target, **({"expansion": expansion} if expansion else {})}
    config = EnergyConfig(steps=steps, batch_size=512, hidden_size=256, num_layers=3, learning_rate=2e-3, **settings)
    return dataclasses.replace(config, num_support_states=NUM_SUPPORT_STATES) if config.support[0] else config


class Bench:
    """One set with its trained behaviour model and its exact draws; targets are trained on it one by one."""

    def __init__(self, name: str, *, steps: int, seed: int, betas: tuple[float, ...]):
        """Draw the data, train the behaviour model and draw the exact policy at each beta."""
        self.name, self._betas, self._steps, self._seed = name, betas, steps, seed
        generator = torch.Generator().manual_seed(seed)
        density, q = SETS[name]
        pool_NA = density(NUM_POOL, generator)
        q_N = q(pool_NA)
        self._mean, self._std = q_N.mean(), q_N.std()
        weights = {beta: (beta * (q_N - self._mean) / self._std).softmax(dim=0) for beta in betas}

        def exact(beta: float) -> Tensor:
            return pool_NA[torch.multinomial(weights[beta], NUM_SAMPLES, replacement=True, generator=generator)]

        self._exact = {beta: exact(beta) for beta in betas}
        self._floor = {
            beta: sum(sliced_wasserstein(self._exact[beta], exact(beta)) for _ in range(NUM_FLOORS)) / NUM_FLOORS
            for beta in betas
        }
        self._draws: dict[tuple[str, float], Tensor] = {("exact", beta): self._exact[beta] for beta in betas}

        actions_NA = density(NUM_DATA, generator)
        zeros = torch.zeros(NUM_DATA, 1)
        rows = torch.cat([zeros, actions_NA, zeros, zeros + 1, zeros], dim=1)
        self._data = Transitions(
            rows_ND=rows,
            shift_D=torch.zeros(rows.shape[1]),
            scale_D=torch.ones(rows.shape[1]),
            spaces=Spaces(
                state_mean_S=torch.zeros(1),
                state_scale_S=torch.ones(1),
                action_low_A=-torch.ones(2),
                action_high_A=torch.ones(2),
            ),
            digest=name,
            episode_ends_E=torch.arange(1, NUM_DATA + 1),
        )
        config = BehaviorConfig(steps=steps, batch_size=512, hidden_size=256, num_layers=3, learning_rate=2e-3)
        torch.manual_seed(seed)
        self._behavior = behavior.start(config, self._data, torch.Generator().manual_seed(seed + 1))
        while self._behavior.step < steps:
            behavior.train_step(self._behavior, config, self._data)
        self._variance_K = energy.measure_variance(self._behavior, self._data, torch.Generator().manual_seed(seed + 4))

    def compare(self, variant: str) -> list[dict[str, Any]]:
        """Train one target, or `none` for the behaviour model alone; return one row per beta."""
        net: EnergyNet | None = None
        if variant not in ("none", CLOSED_FORM):
            config = energy_config(variant, self._steps)
            torch.manual_seed(self._seed)
            state = energy.start(config, self._data, torch.Generator().manual_seed(self._seed + 2))
            energy.measure(state, config, self._data, self._behavior)

            def value(_: Tensor, actions_BA: Tensor) -> Tensor:
                return self._value(actions_BA)

            source = energy.source_of(value, targets.by_autograd(value), state, config, self._data)
            while state.step < config.steps:
                energy.train_step(state, config, self._data, self._behavior, source)
            net = state.net
            net.load_state_dict(state.ema.net.state_dict())
        states_BS = torch.zeros(NUM_SAMPLES, 1)
        rows = []
        for beta in self._betas:

            def noise(a_t_BA: Tensor, t_B: Tensor) -> Tensor:
                noise_BA: Tensor = self._behavior.ema(a_t_BA, states_BS, t_B)
                return noise_BA

            def guide(a_t_BA: Tensor, t_B: Tensor, beta: float = beta) -> Tensor:
                if net is not None:
                    return energy.slope(net, a_t_BA, states_BS, t_B, torch.full_like(t_B, beta))
                mean_BA = posterior.posterior_mean(a_t_BA, noise(a_t_BA, t_B), t_B)
                _, slope_BA = targets.by_autograd(lambda _, a_BA: self._value(a_BA))(states_BS, mean_BA)
                alpha_B, sigma_B = alpha_sigma(t_B)
                v_B = posterior.interpolate_variance(self._variance_K, t_B)
                return (beta * alpha_B / sigma_B.square() * v_B)[:, None] * slope_BA

            start_BA = torch.randn(NUM_SAMPLES, 2, generator=torch.Generator().manual_seed(self._seed + 3))
            drawn_BA = sampler.sample(
                noise, None if variant == "none" else guide, start_BA, sampler.make_grid(NUM_SOLVER_STEPS)
            )
            self._draws[variant, beta] = drawn_BA
            distance = sliced_wasserstein(drawn_BA, self._exact[beta])
            rows.append(
                {"set": self.name, "beta": beta, "target": variant, "distance": distance, "floor": self._floor[beta]}
            )
        return rows

    def draw(self, path: Path) -> None:
        """Write the scatter plots, a row per beta, exact draws first."""
        columns = list(dict.fromkeys(variant for variant, _ in self._draws))
        figure = Figure(figsize=(2 * len(columns), 2.2 * len(self._betas)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(self._betas), len(columns), squeeze=False)
        for i, beta in enumerate(self._betas):
            for j, variant in enumerate(columns):
                points = self._draws[variant, beta]
                axes[i, j].scatter(points[:, 0], points[:, 1], s=1, alpha=0.3, linewidths=0, color="#0072B2")
                axes[i, j].set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[], aspect="equal")
                if i == 0:
                    axes[i, j].set_title(variant.replace("/", "\n").replace("_", " "), fontsize=9)
            axes[i, 0].set_ylabel(f"beta {beta:g}")
        figure.savefig(path, dpi=120, metadata={"Software": None})

    def _value(self, actions_BA: Tensor) -> Tensor:
        return (SETS[self.name][1](actions_BA) - self._mean) / self._std


def sliced_wasserstein(first_NA: Tensor, second_NA: Tensor) -> float:
    """Return the sliced Wasserstein-2 distance of two samples of equal size, over 256 fixed directions (N log N)."""
    angle_P = torch.arange(NUM_PROJECTIONS) * (math.pi / NUM_PROJECTIONS)
    directions_AP = torch.stack([angle_P.cos(), angle_P.sin()])
    gap_NP = (first_NA @ directions_AP).sort(dim=0).values - (second_NA @ directions_AP).sort(dim=0).values
    return float(gap_NP.square().mean().sqrt())


def _normal(num: int, generator: Generator, std: float) -> Tensor:
    return std * torch.randn(num, 2, generator=generator)


def _uniform(num: int, generator: Generator) -> Tensor:
    return torch.rand(num, generator=generator)


def _polar(radius_N: Tensor, angle_N: Tensor) -> Tensor:
    return torch.stack([radius_N * angle_N.cos(), radius_N * angle_N.sin()], dim=1)


def _eight_gaussians(num: int, generator: Generator) -> Tensor:
    angle_N = (8 * _uniform(num, generator)).floor() * (math.pi / 4)
    return (_polar(0.75 + 0 * angle_N, angle_N) + _normal(num, generator, 0.05)).clamp(-1, 1)


def _moons(num: int, generator: Generator) -> Tensor:
    angle_N, upper_N = math.pi * _uniform(num, generator), _uniform(num, generator) < 0.5
    points_NA = _polar(0.55 + 0 * angle_N, angle_N)
    moved_NA = torch.where(
        upper_N[:, None], points_NA - torch.tensor([0.25, 0.1]), torch.tensor([0.25, 0.1]) - points_NA
    )
    return (moved_NA + _normal(num, generator, 0.03)).clamp(-1, 1)


def _rings(num: int, generator: Generator) -> Tensor:
    radius_N = 0.25 * (1 + (3 * _uniform(num, generator)).floor())
    return (_polar(radius_N, 2 * math.pi * _uniform(num, generator)) + _normal(num, generator, 0.02)).clamp(-1, 1)


def _swiss_roll(num: int, generator: Generator) -> Tensor:
    angle_N = 1.5 * math.pi * (1 + 2 * _uniform(num, generator))
    return (_polar(angle_N / 16, angle_N) + _normal(num, generator, 0.02)).clamp(-1, 1)


def _two_spirals(num: int, generator: Generator) -> Tensor:
    angle_N = 3 * math.pi * _uniform(num, generator).sqrt()
    side_N = 2 * (_uniform(num, generator) < 0.5).float() - 1
    return (_polar(side_N * angle_N / 11, angle_N) + _normal(num, generator, 0.02)).clamp(-1, 1)


def _checkerboard(num: int, generator: Generator) -> Tensor:
    x_N, y_N = 2 * _uniform(num, generator) - 1, _uniform(num, generator)
    row_N = 2 * (2 * _uniform(num, generator)).floor() + (2 * (x_N + 1)).floor() % 2
    return torch.stack([x_N, (row_N + y_N) / 2 - 1], dim=1)


def _x(actions_BA: Tensor) -> Tensor:
    return actions_BA[:, 0]


def _radius(actions_BA: Tensor) -> Tensor:
    return actions_BA.square().sum(dim=1).add(1e-4).sqrt()


def _inward(actions_BA: Tensor) -> Tensor:
    return -actions_BA.square().sum(dim=1)


def _saddle(actions_BA: Tensor) -> Tensor:
    return actions_BA[:, 0] * actions_BA[:, 1]


def _waves(actions_BA: Tensor) -> Tensor:
    return (3 * actions_BA[:, 0]).sin() + (3 * actions_BA[:, 1]).cos()


def _two_ways(actions_BA: Tensor) -> Tensor:
    return actions_BA[:, 0].square() - 0.5 * actions_BA[:, 1]


SETS: dict[str, tuple[Callable[[int, Generator], Tensor], Callable[[Tensor], Tensor]]] = {
    "eight_gaussians": (_eight_gaussians, _two_ways),
    "moons": (_moons, _x),
    "rings": (_rings, _inward),
    "swiss_roll": (_swiss_roll, _radius),
    "two_spirals": (_two_spirals, _waves),
    "checkerboard": (_checkerboard, _saddle),
}
"""name -> (draw n points of mu, Q before it is scaled)."""
