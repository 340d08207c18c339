"""`aepo sweep`: tasks x seeds on Ray, from flags."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from aepo import config as configs
from aepo.console import emit_json, emit_table, err
from aepo.errors import ConfigError, IncompleteError


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train tasks x methods x seeds on Ray, track every run in MLflow, and write runs.parquet.

    The same command again continues: runs that ended are not repeated, interrupted ones go on from their last
    checkpoint. `aepo report FOLDER` makes the tables and figures.

    For example:
      aepo sweep --task maze2d-umaze maze2d-medium --seeds 0 1 --preset quick --out sweeps/mazes
      aepo sweep --task maze2d-open --preset best qgpo iql td3bc --seeds 0 1 2 --out sweeps/methods
      aepo sweep --dataset mujoco/hopper/medium-v0 --seeds 0 --preset smoke --address ray-head:6379
    """

    task: tuple[str, ...] = ()
    """Names of tasks (`aepo data list` shows them)."""
    source: str = ""
    """Whose data of the tasks: d4rl (the original files), minari (what Farama regenerated); none = each task's first,
    d4rl for the benchmark's."""
    dataset: tuple[str, ...] = ()
    """Ids of local Minari data sets of your own."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; every task is run with each."""
    preset: tuple[str, ...] = ("quick",)
    """METHOD, BUDGET or METHOD-BUDGET; of several each is a column of the table. Methods: best (AEPO as it measured
    best), analytic (the paper's AEPO), qgpo, iql, td3bc. Budgets: paper (days on a CPU), quick (minutes), smoke
    (seconds; scores mean nothing)."""
    set: tuple[str, ...] = ()
    """Settings that differ from the preset, as in: critic.expectile=0.9 sampling.beta=1; methods without them keep
    theirs."""
    out: Path = Path("sweeps/default")
    """Folder of the sweep; on a cluster one that all nodes see."""
    address: str = ""
    """Address of a Ray cluster; none = a private Ray on this machine while the sweep runs."""
    cpus: float = 1.0
    """CPU cores per run."""
    gpus: float = 0.0
    """GPUs per run; a fraction shares one."""
    max_concurrent: int = 0
    """Runs at the same time, at most; 0 = as many as fit."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints of a run."""
    tracking_uri: str = ""
    """MLflow store or server; none = MLFLOW_TRACKING_URI, or else a SQLite file in the sweep's folder."""
    retry_failed: bool = False
    """Run again what failed before."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Carry the sweep out; return the exit status, 3 if a planned run has no result."""
        if self.cpus <= 0 or self.gpus < 0 or self.max_concurrent < 0 or self.checkpoint_s < 0:
            raise ConfigError("--cpus must be above 0; --gpus, --max-concurrent and --checkpoint-s not below it")
        from tune.plan import make_plan
        from tune.sweep import Resources, run_sweep
        from tune.tracking import default_uri

        plan = make_plan(
            self.task,
            self.dataset,
            self.seeds,
            presets=self.preset,
            overrides=configs.parse_overrides(self.set),
            source=self.source,
        )
        resources = Resources(
            address=self.address,
            cpus=self.cpus,
            gpus=self.gpus,
            max_concurrent=self.max_concurrent,
            checkpoint_s=self.checkpoint_s,
        )
        uri = self.tracking_uri or default_uri(self.out)
        rows = run_sweep(self.out, plan, resources, tracking_uri=uri, retry_failed=self.retry_failed)
        print_rows(rows, as_json=self.json)
        err.print(f"tables and figures:  aepo report {self.out}", soft_wrap=True)
        err.print(f"MLflow page:         {page_command(uri)}", soft_wrap=True)
        check_complete(rows)
        return 0


COLUMNS = ["task", "method", "seed", "status", "score", "return_mean", "num_episodes", "steps", "seconds"]


def print_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print one row per run."""
    if as_json:
        emit_json(rows)
    else:
        emit_table("runs", [{key: row[key] for key in COLUMNS} for row in rows])


def check_complete(rows: list[dict[str, Any]]) -> None:
    """Raise unless every planned run has finished.

    Raises:
        IncompleteError: names each that has not, with its reason.
    """
    if holes := [row for row in rows if row["status"] != "finished"]:
        reasons = "; ".join(f"{row['run']}: {row['error'] or row['status']}" for row in holes)
        raise IncompleteError(
            f"{len(holes)} of {len(rows)} runs have no result: {reasons} "
            "(the same command continues missing ones, --retry-failed repeats failed ones)"
        )


def page_command(uri: str) -> str:
    """Return the command that shows an MLflow store as a page on this machine only, or the server's address."""
    program = "mlflow" if shutil.which("mlflow") else Path(sys.executable).with_name("mlflow")
    return uri if uri.startswith("http") else f"{program} ui --host 127.0.0.1 --backend-store-uri {uri}"
