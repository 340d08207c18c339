"""`aepo quickstart`: the main job on an embedded default, on one machine, in minutes."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from aepo import tasks
from aepo.console import err

TASKS = ("maze2d-umaze", "maze2d-open")
SEEDS = (0, 1)
NUM_STEPS = 200_000
"""Environment steps per data set."""


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Collect two mazes, train 2 tasks x 2 seeds as a Ray Tune sweep, evaluate, and print the results table.

    AEPO stands beside diffusion behaviour cloning (the same networks at guidance scale 0). The same command
    again continues, or prints the table if all is there.

    For example:
      aepo quickstart
      aepo quickstart --json > table.json
    """

    out: Path = Path("quickstart")
    """Folder of the sweep, its MLflow store and its report."""
    preset: str = "quick"
    """quick (minutes) or smoke (seconds per run; scores mean nothing)."""
    env_steps: int = NUM_STEPS
    """Environment steps per data set, when it is collected."""
    json: bool = False
    """Print one JSON document (the report's rows) on standard output and nothing else."""

    def run(self) -> int:
        """Do it all; return the exit status."""
        from aepo.data.pointmaze import collect
        from tune.commands import check_complete, page_command
        from tune.mlflow_sink import find_store
        from tune.plan import make_plan
        from tune.spec import Resources, SweepSpec
        from tune.sweep import run_sweep

        begin = time.monotonic()
        uri = find_store("", self.out)
        for name in TASKS:
            collect(tasks.find(name), num_steps=self.env_steps, seed=0)
        plan = make_plan(SweepSpec(task=TASKS, seeds=SEEDS, preset=(self.preset,)))
        rows = run_sweep(self.out, plan, Resources(checkpoint_s=20.0), tracking_uri=uri, only=True)
        check_complete(rows)
        # the report is a program of its own: between scheduling and analysis stands a table, not code
        report = [sys.executable, "-m", "aepo", "report", str(self.out), *(["--json"] if self.json else [])]
        status = subprocess.run(report, check=False).returncode
        err.print(f"MLflow page: {page_command(uri)}", markup=False, soft_wrap=True)
        err.print(f"took {(time.monotonic() - begin) / 60:.1f} minutes; the same command again recomputes nothing")
        return status
