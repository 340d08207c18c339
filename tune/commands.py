"""`aepo sweep`: tasks x seeds on Ray, from flags."""

import dataclasses
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro
from pydantic import TypeAdapter, ValidationError
from rich.prompt import Confirm

from aepo import config as configs
from aepo.config import RunConfig
from aepo.console import emit_json, emit_table, err, say, warn
from aepo.documents import read_toml
from aepo.errors import ConfigError, IncompleteError
from aepo.results import Row

Switch: TypeAlias = tyro.conf.FlagCreatePairsOff[bool]
"""A flag that no file sets: there is no --no-... of it."""
PLANNING = ("task", "suite", "source", "dataset", "seeds", "preset", "set")
"""Flags that say which runs there are."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train tasks x methods x seeds on Ray, track every run in MLflow, and write runs.parquet.

    The same command again continues: runs that ended are not repeated, interrupted ones go on from their last
    checkpoint. On a terminal the plan is shown with an estimate first, and the sweep starts when you say so.
    `aepo report FOLDER` makes the tables and figures.

    For example:
      aepo sweep --task maze2d-umaze maze2d-medium --seeds 0 1 --preset quick --out sweeps/mazes
      aepo sweep --task maze2d-open --preset best qgpo iql td3bc --seeds 0 1 2 --out sweeps/methods
      aepo sweep --suite antmaze --source minari --preset best-paper --seeds 0 1 2 3 4 --gpus 0.25 --dry-run
      aepo sweep paper.toml --address ray-head:6379
      aepo sweep sweeps/mazes/sweep.json --out sweeps/again
      aepo sweep --watch --out sweeps/mazes
    """

    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[FILE]")]] = None
    """TOML with the same names as the flags below, as in docs/operations.md; a flag that is given wins. Or the
    sweep.json of a sweep, whose runs are then planned again."""
    task: tuple[str, ...] = ()
    """Names of tasks (`aepo data list` shows them)."""
    suite: tuple[str, ...] = ()
    """All tasks of these suites: gym-mujoco, maze2d, antmaze, adroit, kitchen, pointmaze."""
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
    dry_run: Switch = False
    """Show the plan with its estimate and start nothing."""
    yes: Switch = False
    """Start without asking."""
    status: Switch = False
    """Show where every run of --out stands, of failed ones why, and start nothing; from any terminal."""
    watch: Switch = False
    """The same as a live table, until the sweep ends."""
    stop: Switch = False
    """Ask the process that carries --out out to end: every run stores a checkpoint first."""
    address: str = ""
    """Address of a Ray cluster; none = a private Ray on this machine while the sweep runs."""
    runner: Literal["train", "inline"] = "train"
    """train: a Ray Train run per trial, whose worker is replaced if it dies; inline: in Tune's own process, cheaper
    for many short runs."""
    workers_per_run: int = 1
    """Train workers per run: each takes its part of every batch, the weights are those of one worker but for the order
    of additions."""
    cpus: float = 1.0
    """CPU cores per worker."""
    gpus: float = 0.0
    """GPUs per worker; a fraction shares one."""
    max_concurrent: int = 0
    """Runs at the same time, at most; 0 = as many as fit."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints of a run."""
    reuse_stages: bool = False
    """Train a stage that several runs have alike (data, settings, seed, stages before it) once: stages/ of the folder
    keeps them."""
    tracking_uri: str = ""
    """MLflow store or server; none = MLFLOW_TRACKING_URI, or else a SQLite file in the sweep's folder."""
    retry_failed: bool = False
    """Run again what failed before."""
    only: bool = False
    """Let --out plan these runs alone. Without it the folder keeps what it has planned before, but for other settings
    of the same task and method; files of runs that are no longer planned stay."""
    json: Switch = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Carry the sweep out, or look at it; return the exit status, 3 if a planned run has no result."""
        if sum((self.status, self.watch, self.stop, self.dry_run)) > 1:
            raise ConfigError("--dry-run, --status, --watch and --stop are different commands; give one")
        if self.status or self.watch or self.stop:
            return self._look()
        return self._carry_out()

    @staticmethod
    def from_file(file: Path) -> "Sweep":
        """Return the sweep of a TOML file, or of a manifest, of which no flag says which runs there are.

        Raises:
            ConfigError: if the file cannot be read, or has an unknown or mistyped name.
        """
        if file.suffix == ".json":
            return Sweep(file=file, seeds=(), preset=())
        values = read_toml(file, kind="sweep file")
        names = [field.name for field in dataclasses.fields(Sweep)]
        known = [name for name in names if name not in ("file", "dry_run", "yes", "status", "watch", "stop", "json")]
        values = {name.replace("-", "_"): value for name, value in values.items()}
        if unknown := [name for name in values if name not in known]:
            near = get_close_matches(unknown[0], known, n=1) or known
            raise ConfigError(f"{file}: no setting {unknown[0]!r}; did you mean {' or '.join(near)}?")
        if isinstance(values.get("set"), dict):
            flat = configs.flatten(values["set"])
            values["set"] = [f"{key}={_word(value)}" for key, value in flat.items()]
        try:
            return TypeAdapter(Sweep).validate_python({"file": file, **values})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise ConfigError(f"{file}: {'; '.join(problems)}") from None

    @property
    def manifest(self) -> Path | None:
        """The sweep.json whose runs are planned again, None if the flags say which runs there are."""
        return self.file if self.file is not None and self.file.suffix == ".json" else None

    def plan(self) -> list[RunConfig]:
        """Return the runs that the flags, or a manifest, ask for."""
        from tune.plan import make_plan, read_manifest

        if self.manifest is None:
            return make_plan(
                self.task,
                self.dataset,
                self.seeds,
                presets=self.preset,
                overrides=configs.parse_overrides(self.set),
                source=self.source,
                suites=self.suite,
            )
        if given := [f"--{name}" for name in PLANNING if getattr(self, name)]:
            raise ConfigError(f"{self.manifest} says which runs there are; leave out {', '.join(given)}")
        return read_manifest(self.manifest)

    def _look(self) -> int:
        from tune.board import is_driven, status, watch
        from tune.plan import STOP, read_manifest

        sweep = self.out.resolve()
        plan = read_manifest(sweep)
        if self.stop:
            if not is_driven(sweep):
                raise IncompleteError(f"nobody carries {self.out} out; there is nothing to stop")
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
        hidden = ("error", "log", "task", "method", "seed")
        emit_table(f"{self.out}: {counts}", [{k: v for k, v in row.items() if k not in hidden} for row in rows])
        for row in rows:
            if row["error"]:
                say(f"{row['run']}: {row['error']}")
                for line in row["log"]:
                    say(f"    {line}")
        return 0

    def _carry_out(self) -> int:
        check_resources(self.cpus, self.gpus, self.max_concurrent, self.checkpoint_s)
        if self.workers_per_run < 1 or (self.workers_per_run > 1 and (self.runner == "inline" or self.reuse_stages)):
            raise ConfigError("--workers-per-run must be at least 1, and 1 with --runner inline or --reuse-stages")
        from tune.plan import STAGES, pending, read_digests

        manifest = self.manifest
        plan = self.plan()
        waiting = pending(self.out.resolve(), plan, retry_failed=self.retry_failed)
        asks = sys.stdin.isatty() and err.is_terminal and not self.yes
        if self.dry_run or (asks and waiting):
            shown = self._show_plan(plan, waiting)
            if self.dry_run:
                if self.json:
                    emit_json(shown)
                return 0
            if not Confirm.ask("start?", console=err, default=True):
                return 0
        from tune.sweep import Resources, run_sweep
        from tune.tracking import find_store

        uri = find_store(self.tracking_uri, self.out)
        resources = Resources(
            address=self.address,
            runner=self.runner,
            workers=self.workers_per_run,
            cpus=self.cpus,
            gpus=self.gpus,
            max_concurrent=self.max_concurrent,
            checkpoint_s=self.checkpoint_s,
            stages=self.out.resolve() / STAGES if self.reuse_stages else None,
        )
        rows = run_sweep(
            self.out,
            plan,
            resources,
            tracking_uri=uri,
            retry_failed=self.retry_failed,
            only=self.only,
            digests=read_digests(manifest) if manifest is not None else None,
        )
        print_rows(rows, as_json=self.json)
        say(f"tables and figures:  aepo report {shlex.quote(str(self.out))}")
        say(f"MLflow page:         {page_command(uri)}")
        check_complete(rows)
        return 0

    def _show_plan(self, plan: Sequence[RunConfig], waiting: Sequence[RunConfig]) -> list[dict[str, Any]]:
        """Print the plan, a row per task and method, with what it is estimated to take; return the rows."""
        from tune.estimate import memory_gib, seconds_per_run
        from tune.plan import describe_leaving, grow

        if leaving := grow(self.out.resolve(), plan, only=self.only)[1]:
            err.print(describe_leaving(leaving), markup=False, soft_wrap=True)
        here = [config for config in plan if _is_here(config.data.dataset)]
        seconds = seconds_per_run([config for config in here if config in waiting], cpus=self.cpus, gpus=self.gpus)
        rows: list[dict[str, Any]] = []
        for (task, method, preset), runs in _grouped(plan).items():
            to_do = [config for config in runs if config in waiting]
            known = [seconds[config.name] for config in to_do if config.name in seconds]
            rows.append(
                {
                    "task": task,
                    "source": runs[0].data.source,
                    "method": method,
                    "preset": preset,
                    "runs": len(runs),
                    "to do": len(to_do),
                    "steps": runs[0].num_steps,
                    "seconds": max(known, default=None),
                    "memory_gib": memory_gib(runs[0], self.runner),
                    "data": "here" if runs[0] in here else "missing",
                }
            )
        cores = len(os.sched_getaffinity(0))
        slots = max(1, min(int(cores / self.cpus), self.max_concurrent or len(waiting), len(waiting) or 1))
        if not self.json:
            shown = [
                {
                    "task": row["task"],
                    "method": row["method"],
                    "to do": f"{row['to do']} of {row['runs']}",
                    "time each": _duration(row["seconds"]),
                    "GiB each": row["memory_gib"],
                    "data": row["data"],
                }
                for row in rows
            ]
            emit_table(f"plan of {self.out}", shown)
        total = sum(seconds.values())
        unknown = sum(config.name not in seconds for config in waiting)
        lacking = f", {unknown} of unknown length (their data are missing)" if unknown else ""
        err.print(
            f"{len(waiting)} of {len(plan)} runs to do{lacking}: {_duration(total)} of gradient steps with "
            f"{self.cpus:g} of these cores each; on this machine {slots} at a time, about {_duration(total / slots)}, "
            "preparation and evaluation not counted",
            soft_wrap=True,
        )
        for dataset in dict.fromkeys(config.data.dataset for config in plan if config not in here):
            from aepo.data.library import remedy

            warn(f"missing: {dataset}; {remedy(dataset)}")
        return rows


def check_resources(cpus: float, gpus: float, max_concurrent: int, checkpoint_s: float) -> None:
    """Raise a ConfigError unless these flags are finite numbers of their ranges."""
    others = (gpus, max_concurrent, checkpoint_s)
    if not (0 < cpus < math.inf and all(0 <= value < math.inf for value in others)):
        raise ConfigError(
            "--cpus must be a number above 0; --gpus, --max-concurrent and --checkpoint-s numbers not below it; got "
            f"{cpus:g}, {gpus:g}, {max_concurrent} and {checkpoint_s:g}"
        )


def _duration(seconds: float | None) -> str | None:
    return None if seconds is None else str(timedelta(seconds=round(seconds)))


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_here(dataset: str) -> bool:
    from minari.storage.datasets_root_dir import get_dataset_path

    return bool((get_dataset_path(dataset) / "data").exists())


def _grouped(plan: Sequence[RunConfig]) -> dict[tuple[str, str, str], list[RunConfig]]:
    groups: dict[tuple[str, str, str], list[RunConfig]] = {}
    for config in plan:
        groups.setdefault((config.task, config.method, config.preset), []).append(config)
    return groups


COLUMNS = ["task", "method", "seed", "status", "score", "return_mean", "num_episodes", "steps", "seconds"]


def print_rows(rows: list[Row], *, as_json: bool) -> None:
    """Print one row per run."""
    if as_json:
        emit_json([dataclasses.asdict(row) for row in rows])
    else:
        emit_table("runs", [{key: getattr(row, key) for key in COLUMNS} for row in rows])


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
