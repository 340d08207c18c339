"""`aepo bench`: what a step, an action, an episode and a second core cost on this machine."""

import dataclasses
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, Literal

from aepo.config import Precision, parse_overrides
from aepo.console import emit_json, emit_table, err
from aepo.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure training steps, sampling, evaluation and loading on one core of this machine, each against a baseline.

    The baseline does the same work with the same networks as most research code writes it (aepo/bench/naive.py), by
    turns with ours; the ratio is of CPU time. Run it on a quiet machine. docs/results/speed.md has our numbers.

    For example:
      aepo bench
      aepo bench --preset paper --seconds 20 --json
      aepo bench --only steps --precision bfloat16
      aepo bench --only steps --set critic.activation=relu critic.layer_norm=false actor.activation=relu
      aepo bench --only processes --processes 1 2 6
    """

    preset: Literal["quick", "paper", "smoke"] = "quick"
    """Whose network and batch sizes."""
    only: tuple[Literal["steps", "sampling", "data", "processes"], ...] = ()
    """Parts to measure; none given = all."""
    precision: Precision = "float32"
    """Of our training steps' matrix products; the baseline's stay float32."""
    set: tuple[str, ...] = ()
    """Settings of steps and sampling, KEY=VALUE: critic.activation=relu critic.layer_norm=false actor.activation=relu
    are published IQL's networks."""
    transitions: int = 1_000_000
    """Of the data set, random numbers with Hopper's dimensions."""
    processes: tuple[int, ...] = (1, 2, 6)
    """Numbers of training processes at once, each on one thread."""
    seconds: float = 4.0
    """Per row."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Measure and print; return the exit status."""
        if self.transitions < 1000 or self.seconds <= 0 or min(self.processes, default=1) < 1:
            raise ConfigError(
                "want --transitions of at least 1000, --seconds above 0 and --processes of at least 1, got "
                f"{self.transitions}, {self.seconds:g} and {' '.join(map(str, self.processes))}"
            )
        import torch

        from aepo import rundir
        from aepo.bench import measure
        from aepo.run import set_up_torch

        set_up_torch(1)
        cores = len(os.sched_getaffinity(0))
        if os.getloadavg()[0] > 0.5 * cores:
            err.print(f"[yellow]warning:[/] load {os.getloadavg()[0]:.1f} on {cores} cores: other work disturbs this")
        parts = self.only or ("steps", "sampling", "data", "processes")
        rows: list[dict[str, Any]] = []

        def show(row: dict[str, Any]) -> None:
            rows.append(row)
            err.print(f"{row['work']}: {row['cpu_ms']:.3g} ms, {row['ratio']:.2f} times the baseline's speed")

        configs = measure.configs_of(self.preset, self.precision, parse_overrides(self.set))
        data = measure.random_data(self.transitions)
        if "steps" in parts:
            for row in measure.steps(*configs, data, seconds=self.seconds):
                show(row)
        if "sampling" in parts:
            for row in measure.sampling(configs[0], data, seconds=self.seconds):
                show(row)
        if "data" in parts:
            with tempfile.TemporaryDirectory() as folder:
                for row in measure.with_data(Path(folder), self.preset, seconds=self.seconds):
                    show(row)
        rates = []
        if "processes" in parts:
            for num in self.processes:
                total = measure.together(num, configs[0], min(self.transitions, 100_000), seconds=self.seconds)
                rates.append({"processes": num, "critic_steps_per_s": total})
                err.print(f"{num} process{'es' if num > 1 else ''} at once: {total:.0f} critic steps/s in all")
        machine = {
            "processor": _processor(),
            "cores": cores,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kernels": torch.backends.cpu.get_cpu_capability(),
            "commit": rundir.commit(),
            "preset": self.preset,
            "precision": self.precision,
            "set": list(self.set),
        }
        if self.json:
            emit_json({"machine": machine, "rows": rows, "processes": rates})
            return 0
        title = (
            f"one core of {machine['processor']}, torch {torch.__version__}, commit {machine['commit'] or 'unknown'}"
        )
        if rows:
            emit_table(title, [{**row, **{key: f"{row[key]:.3g}" for key in row if key != "work"}} for row in rows])
        if rates:
            emit_table("training processes at once", rates)
        return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
