"""`aepo bench`: what a step, an action, an episode and a second core cost on this machine."""

import dataclasses
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aepo.config import Precision, parse_overrides
from aepo.console import emit_json, emit_table, err
from aepo.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from aepo.bench.measure import Shape

Part = Literal["steps", "sampling", "evaluation", "loading", "processes"]
COLUMNS = ("work", "shape", "size", "cpu_ms", "baseline_cpu_ms", "ratio", "floor_cpu_ms", "of_floor")
DEFAULT_TASKS = ("maze2d-umaze-v1", "hopper-medium-v2", "pen-human-v1")
"""Tasks of few dimensions, of Hopper's, and of many."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure training steps, sampling, evaluation and loading on one core of this machine, each against a baseline.

    The baseline does the same work with the same networks as most research code writes it (aepo/bench/naive.py), by
    turns with ours; the ratio is of CPU time. `of_floor` is a step's time over that of its matrix products alone, each
    by the fastest kernel of this torch. Dimensions, settings and sizes of data are those of the task table. Run it on a
    quiet machine. docs/results/speed.md has our numbers.

    For example:
      aepo bench
      aepo bench --all --only steps
      aepo bench --task kitchen-mixed-v0 --source minari --seconds 20 --json
      aepo bench --shape 11x3 81x9 --only steps sampling --precision bfloat16
      aepo bench --only steps --set critic.activation=relu critic.layer_norm=false actor.activation=relu
      aepo bench --only processes --processes 1 2 6
    """

    task: tuple[str, ...] = ()
    """Names of tasks (`aepo data list` shows them); none given = three, of few to many dimensions."""
    suite: tuple[str, ...] = ()
    """All tasks of these suites."""
    source: str = ""
    """Source of the tasks' data: d4rl, minari or collected; none = the task's first."""
    all: bool = False
    """All tasks of the benchmark, of either source: a row for each of their distinct dimensions."""
    shape: tuple[str, ...] = ()
    """Other dimensions, of states and actions, as in 81x9; settings are those of a data set of one's own."""
    preset: Literal["quick", "paper", "smoke"] = "quick"
    """Budget whose network and batch sizes are taken."""
    only: tuple[Part, ...] = ()
    """Parts to measure; none given = all."""
    precision: Precision = "float32"
    """Precision of our training steps' matrix products; the baseline's stay float32."""
    set: tuple[str, ...] = ()
    """Settings of steps and sampling, KEY=VALUE.
    critic.activation=relu critic.layer_norm=false actor.activation=relu are published IQL's networks."""
    transitions: int = 200_000
    """Transitions of a data set at most, which are random numbers; tasks with fewer have as many as their data."""
    processes: tuple[int, ...] = (1, 2, 6)
    """Numbers of training processes at once, each on one thread."""
    seconds: float = 2.0
    """Seconds of measuring per row."""
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

        from aepo import kernels
        from aepo.bench import measure
        from aepo.runs import rundir
        from aepo.runs.run import set_up_torch

        shapes = self._shapes()
        overrides = parse_overrides(self.set)
        configs = [measure.configs_of(self.preset, shape.task, self.precision, overrides) for shape in shapes]
        set_up_torch(1)
        cores = len(os.sched_getaffinity(0))
        if os.getloadavg()[0] > 0.5 * cores:
            err.print(f"[yellow]warning:[/] load {os.getloadavg()[0]:.1f} on {cores} cores: other work disturbs this")
        rows: list[dict[str, Any]] = []

        def show(row: dict[str, Any]) -> None:
            rows.append(row)
            floor = f", {row['of_floor']:.2f} of the floor" if row["of_floor"] is not None else ""
            what = f"{row['work']}, {row['shape']}" if row["shape"] else row["work"]
            speed = f", {row['ratio']:.2f} times the baseline's speed" if row["ratio"] is not None else ""
            err.print(f"{what}: {row['cpu_ms']:.3g} ms{speed}{floor}", soft_wrap=True)

        for shape, of_methods in zip(shapes, configs, strict=True):
            guided = of_methods["best"]
            if self._has("steps"):
                for row in measure.steps(of_methods, shape, seconds=self.seconds):
                    show(row)
            if self._has("sampling"):
                for row in measure.sampling(guided, shape, seconds=self.seconds):
                    show(row)
        if self._has("evaluation"):
            for env_id, task in {shape.task.env_id: shape.task for shape in shapes if shape.task.env_id}.items():
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        show(measure.evaluation(Path(folder), self.preset, task, seconds=self.seconds))
                    except ResourceError as error:
                        err.print(f"[yellow]warning:[/] no evaluation in {env_id}: {error}", soft_wrap=True)
        if self._has("loading"):
            with tempfile.TemporaryDirectory() as folder:
                show(measure.loading(Path(folder), self.preset, seconds=self.seconds))
        rates = []
        if self._has("processes"):
            guided = configs[0]["best"]
            for num in self.processes:
                total = measure.concurrent_rate(num, guided, shapes[0], seconds=self.seconds)
                rates.append({"processes": num, "critic_steps_per_s": total})
                err.print(f"{num} process{'es' if num > 1 else ''} at once: {total:.0f} critic steps/s in all")
        machine = {
            "processor": kernels.processor().name or platform.processor() or "unknown",
            "cores": cores,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kernels": torch.backends.cpu.get_cpu_capability(),
            "backend": kernels.backend(),
            "commit": rundir.commit(),
            "preset": self.preset,
            "precision": self.precision,
            "set": list(self.set),
        }
        self._emit(machine, rows, measure.summary_of(rows), rates)
        return 0

    def _shapes(self) -> "list[Shape]":
        """Return the dimensions asked for, the fewest first."""
        from aepo import tasks
        from aepo.bench.measure import Shape, shapes_of

        rows = [tasks.find(name, self.source) for name in self.task]
        rows += [row for suite in self.suite for row in tasks.of_suite(suite, self.source)]
        if self.all:
            rows += [row for row in tasks.rows() if row.source in (self.source or ("d4rl", "minari"))]
        if not rows and not self.shape:
            rows = [tasks.find(name, self.source) for name in DEFAULT_TASKS]
        shapes = shapes_of(rows, most=self.transitions)
        for text in self.shape:
            if not (found := re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)):
                raise ConfigError(f"--shape wants dimensions of states and actions, as in 81x9; got {text!r}")
            dims = [int(number) for number in found.groups()]
            task = tasks.for_dataset(f"bench/{text}-v0")
            shapes.append(Shape(state_dim=dims[0], action_dim=dims[1], task=task, num_transitions=self.transitions))
        return shapes

    def _has(self, part: Part) -> bool:
        return not self.only or part in self.only

    def _emit(
        self,
        machine: Mapping[str, Any],
        rows: list[dict[str, Any]],
        summary: list[dict[str, Any]],
        rates: list[dict[str, Any]],
    ) -> None:
        compared = [row for row in rows if row["ratio"] is not None]
        slowest = min(compared, key=lambda row: float(row["ratio"]), default=None)
        if self.json:
            emit_json({"machine": machine, "rows": rows, "summary": summary, "slowest": slowest, "processes": rates})
            return
        title = f"one core of {machine['processor']}, torch {machine['torch']}, backend {machine['backend']}"
        title += f", commit {machine['commit'] or 'unknown'}"
        if rows:
            emit_table(title, [_rounded({key: row[key] for key in COLUMNS}) for row in rows])
            emit_table("medians over dimensions", [_rounded(row) for row in summary])
        if rates:
            emit_table("training processes at once", rates)
        if slowest is not None:
            what = f"{slowest['work']}, {slowest['shape']}" if slowest["shape"] else slowest["work"]
            err.print(f"the slowest beside its baseline: {what}, {slowest['ratio']:.2f} times", soft_wrap=True)


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
