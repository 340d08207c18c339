"""`aepo benchmark`: from nothing to the table of all tasks, step by step; each step can be given again.

The steps are the commands that there are for one task or one sweep, called for all tasks.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from aepo import method_table, tasks
from aepo.console import emit_json, emit_table, say, warn
from aepo.data.library import local_datasets
from aepo.errors import ConfigError, DataError
from aepo.tasks import Task
from tune.spec import Execution, SweepSpec, read_sweep_file

SOURCES = ("d4rl", "minari")
PRESETS = tuple(f"{preset}-paper" for preset in method_table.presets())
SEEDS = (0, 1, 2, 3, 4)
PUBLISHED = tuple(row.published for row in method_table.rows().values() if row.published)
SHARED = "shared"
"""Stands for any folder of stages in an estimate, which asks only whether there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkSpec:
    """What a benchmark runs: tasks x methods x seeds."""

    task: tuple[str, ...] = ()
    """Only these tasks; none given = all of the benchmark."""
    preset: Annotated[tuple[str, ...], tyro.conf.arg(help=method_table.preset_help("best"))] = PRESETS
    seeds: tuple[int, ...] = SEEDS
    """Seeds; every task is run with each."""

    def spec(self, what: str) -> SweepSpec:
        """Return the plan of a benchmark.

        Raises:
            ConfigError: for an unknown benchmark or task, or if these flags stand beside a file, which says all.
        """
        if what in SOURCES:
            names = tuple(row.task for row in benchmark_rows(what, self.task))
            return SweepSpec(task=names, source=what, preset=self.preset, seeds=self.seeds)
        if (self.task, self.preset, self.seeds) != ((), PRESETS, SEEDS):
            raise ConfigError(f"{what} says which tasks, presets and seeds there are; leave these flags out")
        return read_sweep_file(_file(what))[0]


def _out(what: str) -> Path:
    return Path("benchmarks") / (what if what in SOURCES else Path(what).stem)


def _execution(what: str, given: Execution) -> Execution:
    """Return where and how: what a file says, under the flags that differ from their defaults."""
    base = Execution(out=_out(what), reuse_stages=True) if what in SOURCES else read_sweep_file(_file(what))[1]
    plain = Execution()
    changed = {field.name: getattr(given, field.name) for field in dataclasses.fields(Execution)}
    return dataclasses.replace(
        base, **{name: value for name, value in changed.items() if value != getattr(plain, name)}
    )


def _file(what: str) -> Path:
    if not Path(what).is_file():
        raise ConfigError(f"no benchmark {what!r}; wanted {', '.join(SOURCES)}, or a sweep file as of `aepo sweep`")
    return Path(what)


def benchmark_rows(what: str, names: Sequence[str] = ()) -> list[Task]:
    """Return the rows of a benchmark's tasks, those of these names if there are any.

    Raises:
        ConfigError: for an unknown benchmark or task, or one that the source has no data of.
    """
    if what not in SOURCES:
        found = read_sweep_file(_file(what))[0].rows()
        return [row for row in found if not names or row.task in names]
    if names:
        return [tasks.find(name, what) for name in names]
    return [row for row in tasks.rows() if row.source == what]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(BenchmarkSpec):
    """Say what the whole benchmark takes, before any data are here: hours, downloads, disk, and what is missing.

    A few steps of every method are measured on this machine. For a machine with a GPU: `--measure FILE` there, then
    `--cost-of FILE` here.

    For example:
      aepo benchmark d4rl plan
      aepo benchmark d4rl plan --preset best-quick analytic-quick --seeds 0 1 2 --json
      aepo benchmark d4rl plan --gpus 1 --measure h100.json
      aepo benchmark d4rl plan --gpus 0.25 --max-concurrent 32 --cost-of h100.json --price-per-hour 25
    """

    execution: tyro.conf.OmitArgPrefixes[Execution] = dataclasses.field(default_factory=Execution)
    """Where and how the runs are carried out."""
    cost_of: Path | None = None
    """File with the measurements of another machine, taken instead of this one's."""
    measure: Path | None = None
    """File in which this machine's measurements are kept."""
    price_per_hour: float = 0.0
    """Price of an hour of all machines together, in any currency."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def carry_out(self, what: str) -> int:
        """Measure, add up and print; return the exit status."""
        from aepo.data.fetch import file_bytes, library_bytes
        from tune.commands import describe_estimate
        from tune.estimate import Costs, read_costs, row_of, run_costs, total
        from tune.plan import make_plan

        how = _execution(what, self.execution)
        how.check()
        plan = make_plan(self.spec(what))
        costs = Costs(cpus=how.cpus, gpus=how.gpus, known=read_costs(self.cost_of) if self.cost_of else None)
        if how.gpus and self.cost_of is None:
            costs.check_gpu()
        runs = run_costs(plan, costs, how.runner)
        sharing = dataclasses.replace(how, stages=Path(SHARED) if how.reuse_stages else None)
        slots = how.max_concurrent or places(how)
        whole = total(plan, runs, sharing, slots=slots, start_s=costs.sweep_start())
        if self.measure is not None:
            costs.save(self.measure)
        here = local_datasets()
        rows = list({row.dataset: row for row in map(row_of, plan)}.values())
        to_come = [row for row in rows if row.dataset not in here]
        sizes = [file_bytes(row) for row in to_come]
        download = sum(size for size, _ in sizes)
        disk = download + sum(library_bytes(row) for row in rows) + whole.disk_gb * 1e9
        document: dict[str, Any] = {
            "tasks": len(rows),
            "runs": len(plan),
            "core_hours": whole.core_hours,
            "gpu_hours": whole.gpu_hours,
            "wall_hours": whole.wall_hours,
            "runs_at_a_time": whole.slots,
            "start_hours": whole.start_hours,
            "evaluation_hours": whole.evaluation_hours,
            "saved_hours": whole.saved_hours,
            "reuse_stages": how.reuse_stages,
            "download_gb": download / 1e9,
            "disk_gb": disk / 1e9,
            "price": whole.wall_hours * self.price_per_hour or None,
            "missing": tasks.lacking(what) if what in SOURCES else [],
            "data_to_come": [row.task for row in to_come],
            "estimated_sizes": [row.task for row, (_, known) in zip(to_come, sizes, strict=True) if not known],
            "unknown_length": sorted({config.task for config in plan if config.name not in runs}),
        }
        if self.json:
            emit_json(document)
            return 0
        facts = {key: value for key, value in document.items() if not isinstance(value, list)}
        shown = [{"of the whole": key, "": _number(value)} for key, value in facts.items() if value is not None]
        emit_table(f"benchmark {what}", shown)
        say(describe_estimate(whole, how))
        if document["missing"]:
            warn(f"no {what} data of {_named(document['missing'])}")
        if document["estimated_sizes"]:
            say(f"sizes estimated from rows, not known: {_named(document['estimated_sizes'])}")
        if document["unknown_length"]:
            warn(f"not in the hours, since their data are not here: {_named(document['unknown_length'])}")
        say(f"next: aepo benchmark {what} {'fetch' if to_come else 'run'}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Fetch the data of all tasks, several at a time; again, it goes on where it ended.

    D4RL's original files come into a folder, checked by published sums as far as there are, and are then imported.
    Minari's come into the library at once. Where a server is out of reach, the addresses are left as a file for wget.

    For example:
      aepo benchmark d4rl fetch --folder d4rl
      aepo benchmark d4rl fetch --task hopper-medium-v2 --mirror https://mirror.example.org/offline_rl
      aepo benchmark minari fetch --jobs 2
    """

    task: tuple[str, ...] = ()
    """Only these tasks; none given = all."""
    folder: Path = Path("d4rl")
    """Folder of the original files, and of lists of addresses."""
    jobs: int = 4
    """Files at a time."""
    mirror: str = ""
    """Address that stands in the place of http://rail.eecs.berkeley.edu/datasets/offline_rl."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def carry_out(self, what: str) -> int:
        """Fetch and print what came; return the exit status."""
        from aepo.commands.data import Download
        from aepo.data.download import leave_addresses
        from aepo.data.fetch import fetch

        if self.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1, got {self.jobs}")
        rows = benchmark_rows(what, self.task)
        if lacking := tasks.lacking(what) if what in SOURCES else []:
            warn(f"no {what} data of {_named(lacking)}")
        others = tuple(row.task for row in rows if row.source == "minari")
        found = fetch([row for row in rows if row.source == "d4rl"], self.folder, jobs=self.jobs, mirror=self.mirror)
        if others:
            try:
                return Download(names=others, jobs=self.jobs, json=self.json).run()
            except DataError as error:
                here = local_datasets()
                ids = [name for row in rows if row.source == "minari" for name in row.origin.split() or [row.dataset]]
                left = leave_addresses([name for name in dict.fromkeys(ids) if name not in here], self.folder)
                raise DataError(f"{error}; {left}") from error
        table = [dataclasses.asdict(one) for one in found]
        if self.json:
            emit_json(table)
        else:
            emit_table("fetched", table, columns=("task", "file", "num_bytes", "checked"))
        say(f"next: aepo benchmark {what} import {self.folder}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportFiles:
    """Import D4RL's original files by their names, from folders or files; data sets that are there are left alone.

    For example:
      aepo benchmark d4rl import d4rl
      aepo benchmark d4rl import ~/.d4rl/datasets extra/pen-human-v1.hdf5
    """

    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE_OR_FOLDER")]]
    """HDF5 files, or folders of such."""
    clip_actions: bool = False
    """Move actions that lie outside of the action space to its bounds, as the environments do when they step."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def carry_out(self, what: str) -> int:
        """Import and print what was made; return the exit status."""
        from aepo.commands.data import Import

        status = Import(layout="d4rl", files=self.files, clip_actions=self.clip_actions, json=self.json).run()
        here = local_datasets()
        if still := [row.task for row in benchmark_rows(what) if row.dataset not in here]:
            say(f"still to come: {_named(still)}")
        say(f"next: aepo benchmark {what} verify")
        return status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read the data of all tasks and say what is wrong, as `aepo data verify` does. Exit status 3 if anything is.

    For example:
      aepo benchmark d4rl verify
    """

    task: tuple[str, ...] = ()
    """Only these tasks; none given = all."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def carry_out(self, what: str) -> int:
        """Read, check and print a row per task; return the exit status."""
        from aepo.verify import verify

        here, table = local_datasets(), list[dict[str, Any]]()
        for row in benchmark_rows(what, self.task):
            problems, doubts, facts = ["not here"], list[str](), dict[str, Any]()
            if row.dataset in here:
                try:
                    facts, problems, doubts = verify(row)
                except DataError as error:
                    problems = [str(error)]
            counts = {key: facts.get(key) for key in ("num_episodes", "num_steps")}
            table.append({"task": row.task, **counts, "problems": problems, "doubts": doubts})
        if self.json:
            emit_json(table)
        else:
            shown = [{**row, "problems": len(row["problems"]), "doubts": len(row["doubts"])} for row in table]
            emit_table(f"data of {what}", shown)
            for task in table:
                for doubt in task["doubts"]:
                    warn(f"{task['task']}: {doubt}", kind="doubt")
        if bad := [task for task in table if task["problems"]]:
            first = "; ".join(f"{task['task']}: {task['problems'][0]}" for task in bad[:5])
            raise DataError(
                f"{len(bad)} of {len(table)} tasks cannot be used: {first}{'; ...' if len(bad) > 5 else ''}; "
                f"aepo benchmark {what} fetch, then import"
            )
        say(f"no problem found; next: aepo benchmark {what} run")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(BenchmarkSpec):
    """Carry the benchmark out on this machine, or on a Ray cluster (--address), as `aepo sweep` does.

    Again, it goes on; a folder that has a plan goes on with that plan. Stages that runs have alike are trained once.

    For example:
      aepo benchmark d4rl run --preset best-quick analytic-quick --seeds 0 1 2
      aepo benchmark d4rl run --keep policies --yes
    """

    execution: tyro.conf.OmitArgPrefixes[Execution] = dataclasses.field(default_factory=Execution)
    """Where and how the runs are carried out."""
    yes: bool = False
    """Start without asking."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def carry_out(self, what: str) -> int:
        """Check the plan and the data, then sweep; return the exit status."""
        from tune.commands import Sweep
        from tune.plan import MANIFEST, make_plan, read_manifest

        how, spec = _execution(what, self.execution), self.spec(what)
        held = read_manifest(how.out) if (how.out / MANIFEST).exists() else None
        if held is not None and {one.name for one in held} != {one.name for one in make_plan(spec)}:
            if self.spec(what) != BenchmarkSpec().spec(what) or what not in SOURCES:
                raise ConfigError(
                    f"{how.out} has another plan, of {len(held)} runs; give the same tasks, presets and seeds, none of "
                    "these flags to go on with it, or another folder with --out"
                )
            sweep = Sweep(file=how.out / MANIFEST, spec=SweepSpec(seeds=(), preset=()), execution=how)
        else:
            sweep = Sweep(spec=spec, execution=how)
        wanted = held if held is not None else make_plan(spec)
        here = local_datasets()
        if absent := list(dict.fromkeys(one.task for one in wanted if one.data.dataset not in here)):
            raise DataError(
                f"data of {len(absent)} tasks are not here: {_named(absent)}; aepo benchmark {what} fetch, then "
                "import, or --task for those that are"
            )
        status = dataclasses.replace(sweep, yes=self.yes, json=self.json).run()
        say(f"next: aepo benchmark {what} report" + ("" if how.out == _out(what) else f" --out {how.out}"))
        return status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submit(BenchmarkSpec):
    """Submit the benchmark to a Ray cluster, as `aepo submit` does with a sweep file; the file is kept in --out.

    For example:
      aepo benchmark d4rl submit --cluster http://127.0.0.1:8265 --gpus 0.25
      aepo benchmark d4rl submit --detach
    """

    execution: tyro.conf.OmitArgPrefixes[Execution] = dataclasses.field(default_factory=Execution)
    """Where and how the runs are carried out; --out lies on the cluster, below AEPO_STORAGE."""
    cluster: str = ""
    """Jobs server of the cluster, as --address of `aepo submit`."""
    detach: bool = False
    """Do not wait for the end."""

    def carry_out(self, what: str) -> int:
        """Write the sweep file and submit it; return the exit status."""
        how, spec = _execution(what, self.execution), self.spec(what)
        file = Path(what)
        if what in SOURCES:
            file = how.out / "benchmark.toml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(sweep_file(spec, how))
        words = ["submit", str(file), *(["--address", self.cluster] if self.cluster else [])]
        return _aepo(*words, *(["--detach"] if self.detach else []))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Make the table: a row per task beside published columns, means of suites, and what is missing by name.

    For example:
      aepo benchmark d4rl report
      aepo benchmark d4rl report --published AEPO IQL@corl-last mine.csv
    """

    out: Path | None = None
    """Folder of the benchmark; none = benchmarks/ and its name."""
    published: tuple[str, ...] = PUBLISHED
    """Published scores to stand beside ours, as METHOD@SOURCE; `aepo report --published list` shows what there is."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def carry_out(self, what: str) -> int:
        """Report; return the exit status, 3 if a task or run has no result."""
        from tune.plan import pending, read_manifest

        out = self.out or _out(what)
        plan = read_manifest(out)
        flags = ["--allow-missing", "--published", *self.published, *(["--json"] if self.json else [])]
        status = _aepo("report", str(out), *flags)
        if lacking := tasks.lacking(what) if what in SOURCES else []:
            warn(f"no {what} data of {_named(lacking)}")
        planned = {one.task for one in plan}
        if unplanned := [row.task for row in benchmark_rows(what) if row.task not in planned]:
            warn(f"not in this folder's plan: {_named(unplanned)}")
        open_ = pending(out, plan, retry_failed=True)
        if open_:
            warn(f"{len(open_)} of {len(plan)} runs have no result; aepo benchmark {what} run goes on")
        return status or (3 if open_ else 0)


Step: TypeAlias = (
    Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
    | Annotated[ImportFiles, tyro.conf.subcommand("import")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Submit, tyro.conf.subcommand("submit")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Go from nothing to the table of a whole benchmark, in steps that can each be given again.

    For example:
      aepo benchmark d4rl plan
      aepo benchmark d4rl fetch
      aepo benchmark d4rl import d4rl
      aepo benchmark d4rl verify
      aepo benchmark d4rl run
      aepo benchmark d4rl report
    """

    what: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="d4rl|minari|FILE.toml")]]
    """The 36 tasks on D4RL's files, those of them that Minari has, or the plan of a sweep file."""
    step: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Step]]
    """What is done."""

    def run(self) -> int:
        """Do one step; return its exit status."""
        return self.step.carry_out(self.what)


def sweep_file(spec: SweepSpec, how: Execution) -> str:
    """Return a sweep file of a plan; numbers and texts of JSON are those of TOML."""
    values: dict[str, Any] = {"task": spec.task, "source": spec.source, "preset": spec.preset, "seeds": spec.seeds}
    plain = Execution()
    for field in dataclasses.fields(Execution):
        value = getattr(how, field.name)
        if value != getattr(plain, field.name) and field.name not in ("address", "stages"):
            values[field.name] = str(value) if isinstance(value, Path) else value
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def places(how: Execution) -> int:
    """Return how many runs this machine holds at once."""
    import os

    return max(1, int(len(os.sched_getaffinity(0)) / how.cpus / how.workers_per_run))


def _aepo(*words: str) -> int:
    """Run a command of another part as a program of its own, with this one's standard output."""
    return subprocess.run([sys.executable, "-m", "aepo", *words], check=False).returncode


def _named(names: Sequence[str]) -> str:
    return ", ".join(names)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
