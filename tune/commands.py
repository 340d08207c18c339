"""`aepo sweep`: tasks x seeds on Ray, from flags."""

import dataclasses
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro
from rich.prompt import Confirm

from aepo import tasks
from aepo.config import RunConfig
from aepo.console import emit_json, emit_table, err, say, warn
from aepo.errors import ConfigError, IncompleteError
from aepo.results import Row
from tune.spec import Execution, SweepSpec, is_manifest, read_sweep_file

if TYPE_CHECKING:
    from tune.estimate import Total

Switch: TypeAlias = tyro.conf.FlagCreatePairsOff[bool]
"""A flag that no file sets: there is no --no-... of it."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train tasks x methods x seeds on Ray, track every run in MLflow, and write runs.parquet.

    The same command again continues: runs that ended are not repeated, interrupted ones go on from their last
    checkpoint. On a terminal the plan is shown with an estimate first, and the sweep starts when you say so.
    `aepo report FOLDER` makes the tables and figures.

    For example:
      aepo sweep --task maze2d-umaze maze2d-medium --seeds 0 1 --preset quick --out sweeps/mazes
      aepo sweep --task maze2d-open --preset best analytic --seeds 0 1 2 --out sweeps/aepo
      aepo sweep --suite maze2d --variant "w 3: sampling.guidance_scale=3" --variant "w 9: sampling.guidance_scale=9"
      aepo sweep --suite antmaze --source minari --preset best-paper --seeds 0 1 2 3 4 --gpus 0.25 --dry-run
      aepo sweep paper.toml --address ray-head:6379
      aepo sweep sweeps/mazes/sweep.json --out sweeps/again
      aepo sweep --watch --out sweeps/mazes
    """

    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[FILE]")]] = None
    """TOML with the same names as the flags below, as in docs/operations.md; a flag that is given wins.
    Or the sweep.json of a sweep, whose runs are then planned again."""
    spec: tyro.conf.OmitArgPrefixes[SweepSpec] = dataclasses.field(default_factory=SweepSpec)
    """What is run: tasks x methods x variants x seeds."""
    execution: tyro.conf.OmitArgPrefixes[Execution] = dataclasses.field(default_factory=Execution)
    """Where and how the runs are carried out."""
    dry_run: Switch = False
    """Show the plan with its estimate and start nothing."""
    yes: Switch = False
    """Start without asking."""
    status: Switch = False
    """Show where every run of --out stands, of failed ones why, and start nothing; from any terminal."""
    watch: Switch = False
    """Show where every run of --out stands as a live table, until the sweep ends."""
    stop: Switch = False
    """Ask the process that carries --out out to end: every run stores a checkpoint first."""
    json: Switch = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Carry the sweep out, or look at it; return the exit status, 3 if a planned run has no result."""
        if sum((self.status, self.watch, self.stop, self.dry_run)) > 1:
            raise ConfigError("--dry-run, --status, --watch and --stop are different commands; give one")
        if self.status or self.watch or self.stop:
            return self._look()
        return self._carry_out()

    def with_file(self) -> "Sweep":
        """Return the defaults of the flags beside the file: what it says, without its variants if flags give others.

        Raises:
            ConfigError: if the file cannot be read, or has an unknown or mistyped name.
        """
        assert self.file is not None
        spec, execution = read_sweep_file(self.file)
        if self.spec.variant:  # tyro adds those of the command line
            spec = dataclasses.replace(spec, variant=())
        return Sweep(file=self.file, spec=spec, execution=execution)

    def _look(self) -> int:
        from tune.plan import STOP, read_manifest
        from tune.status import is_running, status, watch

        out = self.execution.out
        sweep = out.resolve()
        plan = read_manifest(sweep)
        if self.stop:
            if not is_running(sweep):
                raise IncompleteError(f"nobody carries {out} out; there is nothing to stop")
            (sweep / STOP).touch()
            err.print("asked to stop; every run stores a checkpoint first (--watch shows it)", soft_wrap=True)
            return 0
        if self.watch:
            watch(sweep, plan)
        rows = status(sweep, plan)
        if self.json:
            emit_json(rows)
            return 0
        counts = ", ".join(f"{count} {state}" for state, count in Counter(row["state"] for row in rows).items())
        hidden = ("error", "log", "task", "method", "variant", "seed")
        emit_table(f"{out}: {counts}", [{k: v for k, v in row.items() if k not in hidden} for row in rows])
        for row in rows:
            if row["error"]:
                say(f"{row['run']}: {row['error']}")
                for line in row["log"]:
                    say(f"    {line}")
        return 0

    def _carry_out(self) -> int:
        how = self.execution
        how.check()
        from tune.plan import STAGES, describe_variants, pending, planned_runs, read_digests

        plan = planned_runs(self.file, self.spec)
        if left_out := tasks.lacking(self.spec.source, self.spec.suite) if self.spec.suite else []:
            warn(f"not planned, since there are no {self.spec.source} data of them: {', '.join(left_out)}")
        if plain := describe_variants(self.spec, plan):
            say(plain)
        waiting = pending(how.out.resolve(), plan, retry_failed=how.retry_failed)
        asks = sys.stdin.isatty() and err.is_terminal and not self.yes
        expected = None
        if self.dry_run or (waiting and (asks or _runs_here(how))):
            shown, expected = self._show_plan(plan, waiting, quietly=not (self.dry_run or asks))
            if self.dry_run:
                if self.json:
                    emit_json(shown)
                return 0
            if asks and not Confirm.ask("start?", console=err, default=True):
                return 0
        from tune.mlflow_sink import find_store
        from tune.sweep import run_sweep

        uri = find_store(how.tracking_uri, how.out)
        rows = run_sweep(
            how.out,
            plan,
            dataclasses.replace(how, stages=how.out.resolve() / STAGES if how.reuse_stages else None),
            tracking_uri=uri,
            retry_failed=how.retry_failed,
            only=how.only,
            digests=read_digests(self.file) if self.file is not None and is_manifest(self.file) else None,
            keep=how.keep,
            expected=expected,
        )
        print_rows(rows, as_json=self.json)
        say(f"tables and figures:  aepo report {shlex.quote(str(how.out))}")
        say(f"MLflow page:         {page_command(uri)}")
        check_complete(rows)
        return 0

    def _show_plan(
        self, plan: Sequence[RunConfig], waiting: Sequence[RunConfig], *, quietly: bool
    ) -> "tuple[list[dict[str, Any]], Total]":
        """Print the plan, a row per task, method and variant, with what it takes; return the rows and the total.

        Quietly it is only estimated.
        """
        how = self.execution
        from tune.estimate import Costs, memory_gib, run_costs, total
        from tune.plan import describe_leaving, grow

        if not quietly and (leaving := grow(how.out.resolve(), plan, only=how.only)[1]):
            err.print(describe_leaving(leaving), markup=False, soft_wrap=True)
        measured = Costs(cpus=how.cpus, gpus=how.gpus)
        costs = run_costs(waiting, measured, how.runner)
        cores = len(os.sched_getaffinity(0))
        slots = how.max_concurrent or max(1, int(cores / how.cpus / how.workers_per_run))
        sharing = dataclasses.replace(how, stages=how.out if how.reuse_stages else None)
        whole = total(waiting, costs, sharing, slots=slots, start_s=measured.sweep_start() if costs else 0.0)
        rows: list[dict[str, Any]] = []
        here = {config.data.dataset for config in plan if _is_here(config.data.dataset)}
        for (task, method, preset, variant), runs in _grouped(plan).items():
            to_do = [config for config in runs if config in waiting]
            known = [costs[config.name].seconds for config in to_do if config.name in costs]
            rows.append(
                {
                    "task": task,
                    "source": runs[0].data.source,
                    "method": method,
                    "preset": preset,
                    "variant": variant,
                    "runs": len(runs),
                    "to do": len(to_do),
                    "steps": runs[0].num_steps,
                    "seconds": max(known, default=None),
                    "memory_gib": memory_gib(runs[0], how.runner),
                    "data": "here" if runs[0].data.dataset in here else "missing",
                }
            )
        if quietly:
            return rows, whole
        if not self.json:
            shown = [
                {
                    "task": row["task"],
                    "method": row["method"],
                    **({"variant": row["variant"]} if any(row["variant"] for row in rows) else {}),
                    "to do": f"{row['to do']} of {row['runs']}",
                    "time each": _duration(row["seconds"]),
                    "GiB each": row["memory_gib"],
                    "data": row["data"],
                }
                for row in rows
            ]
            emit_table(f"plan of {how.out}", shown)
        unknown = sum(config.name not in costs for config in waiting)
        lacking = f", {unknown} of unknown length (their data are missing)" if unknown else ""
        say(f"{len(waiting)} of {len(plan)} runs to do{lacking}: {describe_estimate(whole, how)}")
        for dataset in dict.fromkeys(config.data.dataset for config in plan if config.data.dataset not in here):
            from aepo.data.library import remedy

            warn(f"missing: {dataset}; {remedy(dataset)}")
        return rows, whole


def describe_estimate(whole: "Total", how: Execution) -> str:
    """Return a line of what a plan takes."""
    gpu = f", {whole.gpu_hours:.3g} GPU hours" if how.gpus else ""
    saves = f"sharing stages {'saves' if how.reuse_stages else 'would save (--reuse-stages)'} {whole.saved_hours:.3g}"
    return (
        f"about {whole.core_hours:.3g} core hours{gpu} and, {whole.slots} at a time, {whole.wall_hours:.3g} hours on "
        f"the clock, with {whole.start_hours:.3g} core hours of start-up and {whole.evaluation_hours:.3g} of "
        f"evaluation; {saves}"
    )


def _runs_here(how: Execution) -> bool:
    """Return whether runs are carried out by this machine's cores, so that measuring them here says something."""
    return not how.address and not how.gpus


def _duration(seconds: float | None) -> str | None:
    return None if seconds is None else str(timedelta(seconds=round(seconds)))


def _is_here(dataset: str) -> bool:
    from minari.storage.datasets_root_dir import get_dataset_path

    return bool((get_dataset_path(dataset) / "data").exists())


def _grouped(plan: Sequence[RunConfig]) -> dict[tuple[str, str, str, str], list[RunConfig]]:
    groups: dict[tuple[str, str, str, str], list[RunConfig]] = {}
    for config in plan:
        groups.setdefault((config.task, config.method, config.preset, config.variant), []).append(config)
    return groups


COLUMNS = ["task", "method", "variant", "seed", "status", "score", "return_mean", "num_episodes", "steps", "seconds"]


def print_rows(rows: list[Row], *, as_json: bool) -> None:
    """Print one row per run; without a column of variants where there are none."""
    shown = [key for key in COLUMNS if key != "variant" or any(row.variant for row in rows)]
    if as_json:
        emit_json([dataclasses.asdict(row) for row in rows])
    else:
        emit_table("runs", [{key: getattr(row, key) for key in shown} for row in rows])


def check_complete(rows: list[Row]) -> None:
    """Raise unless every planned run has finished.

    Raises:
        IncompleteError: names each that has not, with its reason.
    """
    if holes := [row for row in rows if row.status != "finished"]:
        reasons = "; ".join(f"{row.run}: {row.error or row.status}" for row in holes)
        raise IncompleteError(
            f"{len(holes)} of {len(rows)} runs have no result: {reasons} "
            "(the same command continues missing ones, --retry-failed repeats failed ones)"
        )


def page_command(uri: str) -> str:
    """Return the command that shows an MLflow store as a page on this machine only, or the server's address."""
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    words = [program, "ui", "--host", "127.0.0.1", "--backend-store-uri", uri]
    return uri if uri.startswith("http") else shlex.join(words)
