"""What a data set's episodes are like: returns, lengths, how they end; as numbers and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from aepo.data.transitions import Transitions

QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
NUM_BINS = 40


def episode_returns(data: Transitions) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the undiscounted return of each episode, of the rewards as stored, and its number of steps."""
    ends_E = data.episode_ends_E.cpu().numpy()
    starts_E = np.concatenate([[0], ends_E[:-1]])
    rewards_N = data.rows_ND[:, data.state_dim + data.action_dim].double().cpu().numpy()
    return np.add.reduceat(rewards_N, starts_E), ends_E - starts_E


def summarise(data: Transitions) -> dict[str, Any]:
    """Return counts, the distribution of returns and lengths, and how often what is special happens, in percent."""
    returns_E, lengths_E = episode_returns(data)
    batch = data.batch(data.rows_ND)
    facts: dict[str, Any] = {
        "num_episodes": len(returns_E),
        "num_steps": len(data),
        "state_dim": data.state_dim,
        "action_dim": data.action_dim,
    }
    for name, values in (("return", returns_E), ("length", lengths_E)):
        facts |= {f"{name}_mean": float(values.mean()), f"{name}_std": float(values.std())}
        facts |= {f"{name}_{key}": float(np.quantile(values, q)) for key, q in QUANTILES.items()}
    last_E = data.episode_ends_E - 1
    facts["terminated_percent"] = 100.0 * float(batch.terminals_B[last_E].mean())
    facts["nonzero_reward_percent"] = 100.0 * float(
        (data.rows_ND[:, data.state_dim + data.action_dim] != 0).float().mean()
    )
    facts["action_at_bound_percent"] = 100.0 * float((batch.actions_BA.abs() > 1.0 - 1e-3).float().mean())
    facts["digest"] = data.digest
    return facts


def draw(data: Transitions, path: Path, *, title: str) -> None:
    """Write histograms of returns and of lengths side by side as PNG."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    names = ("return per episode", "steps per episode")
    for axes, values, name in zip(figure.subplots(1, 2), episode_returns(data), names, strict=True):
        axes.hist(values, bins=NUM_BINS, color="#0072B2")
        axes.axvline(values.mean(), color="#D55E00", label=f"mean {values.mean():.4g}")
        axes.set(xlabel=name, ylabel="episodes")
        axes.ticklabel_format(useOffset=False)  # lengths around 1,000 read 1000, not "+1e3"
        for axis in (axes.yaxis, axes.xaxis) if values.dtype.kind == "i" else (axes.yaxis,):
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
