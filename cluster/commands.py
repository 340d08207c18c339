"""`aepo cluster`, `aepo submit` and `aepo jobs`."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro

from aepo.console import emit_json, emit_table, emit_text, err
from aepo.errors import ConfigError
from cluster.slurm.allocation import Allocation

if TYPE_CHECKING:
    from aepo.config import RunConfig
    from cluster.jobs import Job
    from cluster.slurm.client import SlurmJob
    from tune.spec import Execution

JOB_WORDS = ("list", "status", "logs", "stop", "fetch")


def _folder() -> Path:
    from cluster.local import default_folder

    return default_folder()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Up:
    """Start a whole cluster on this machine: Ray's head and workers, MLflow on PostgreSQL, all on 127.0.0.1.

    Starts what does not run: given again it says that the cluster is up, or starts the service that died. Needs
    PostgreSQL's programs (apt-get install postgresql) and the extra packages of aepo-platform[cluster].

    For example:
      aepo cluster up --local --nodes 3
      aepo cluster up --local --nodes 2 --cpus-per-node 8 --gpus-per-node 1
    """

    local: bool = False
    """On this machine; docs/cluster.md says how clusters of several machines come up."""
    nodes: int = 1
    """Ray nodes: the head, which trains too, and workers."""
    cpus_per_node: int = 0
    """CPU cores that a node offers; 0 = its share of this machine's, at least 1."""
    gpus_per_node: int = 0
    """GPUs that a node offers."""
    folder: Path = dataclasses.field(default_factory=_folder)
    """Logs, passwords, MLflow's runs."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Start what is missing, print the services; return 0 when all answer."""
        from cluster.local import LocalCluster

        if not self.local:
            raise ConfigError("wanted --local; for several machines see docs/cluster.md")
        if self.nodes < 1 or self.cpus_per_node < 0 or self.gpus_per_node < 0:
            raise ConfigError("--nodes must be at least 1, --cpus-per-node and --gpus-per-node not below 0")
        cluster = LocalCluster(self.folder)
        cpus = self.cpus_per_node or max(1, len(os.sched_getaffinity(0)) // self.nodes)
        if not cluster.up(nodes=self.nodes, cpus=cpus, gpus=self.gpus_per_node):
            err.print("the cluster is up already", soft_wrap=True)
        status = _show(self.folder, as_json=self.json)
        err.print(f"for this shell:  . {cluster.folder / 'env'}", markup=False, soft_wrap=True)
        err.print(
            f"a sweep on it:   aepo submit SWEEP.toml --address {cluster.dashboard()}", markup=False, soft_wrap=True
        )
        return status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Show the services of the cluster on this machine. Exits 6 if one is down or does not answer, or none is up.

    For example:
      aepo cluster status
    """

    folder: Path = dataclasses.field(default_factory=_folder)
    """The cluster's folder."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print one row per service."""
        return _show(self.folder, as_json=self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Down:
    """Stop the cluster on this machine, every process of it. MLflow's runs and the sweeps stay in its folder.

    For example:
      aepo cluster down
    """

    folder: Path = dataclasses.field(default_factory=_folder)
    """The cluster's folder."""

    def run(self) -> int:
        """Stop all services."""
        from cluster.local import LocalCluster

        stopped = LocalCluster(self.folder).down()
        err.print(f"stopped: {', '.join(stopped)}" if stopped else "no cluster is up", soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Submit:
    """Run a sweep file on a Ray cluster or by SLURM, as a job that goes on when this command ends.

    Packs this code and the file, starts the job and shows its log. Given again it joins the job while it runs;
    after its end a new attempt does what is missing. Exits as the sweep does. The folder that the file names lies on
    the cluster, below AEPO_STORAGE of its nodes.

    For example:
      aepo submit mazes.toml --address http://127.0.0.1:8265
      aepo submit mazes.toml --detach
      aepo submit sweeps/mazes/sweep.json --out sweeps/again
      aepo submit mazes.toml --slurm --nodes 4 --cpus-per-node 16 --gpus-per-node 1 --time 2-00 --partition gpu
    """

    file: tyro.conf.Positional[Path]
    """Sweep file, as of `aepo sweep`, or the sweep.json of a sweep."""
    address: str = ""
    """Jobs server (Ray's dashboard); none = RAY_API_SERVER_ADDRESS, or else the cluster of this machine. Its token is
    RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH."""
    out: Path | None = None
    """Folder on the cluster, instead of the file's."""
    retry_failed: bool = False
    """Run again what failed before."""
    only: bool = False
    """Let the folder plan these runs alone, as `aepo sweep --only`."""
    places: int = 0
    """Runs at once that there shall be room for at the start, where nodes come on demand: the cluster's autoscaler is
    asked for them and waited for, a quarter of an hour at most."""
    detach: bool = False
    """Do not wait for the end."""
    slurm: bool = False
    """Write a batch file and have SLURM run it, with a Ray of its own. This is then a login node, and its folders are
    there on the nodes too."""
    allocation: tyro.conf.OmitArgPrefixes[Allocation] = dataclasses.field(default_factory=Allocation)
    """What is asked of SLURM."""
    json: bool = False
    """Print one JSON document on standard output, the job, and nothing else."""

    def run(self) -> int:
        """Submit or join, follow, and return the sweep's exit status."""
        from cluster import jobs
        from tune.plan import planned_runs
        from tune.spec import read_sweep_file

        if not self.file.is_file():
            hint = "; `aepo jobs` looks after jobs" if str(self.file) in JOB_WORDS else ""
            raise ConfigError(f"no sweep file {self.file}{hint}")
        if self.places < 0:
            raise ConfigError("--places must not be below 0")
        spec, execution = read_sweep_file(self.file)
        execution = dataclasses.replace(
            execution,
            out=execution.out if self.out is None else self.out,
            retry_failed=self.retry_failed or execution.retry_failed,
            only=self.only or execution.only,
        )
        plan = planned_runs(self.file, spec)
        if self.slurm:
            return self._by_slurm(execution, plan)
        if self.allocation != Allocation():
            raise ConfigError("--partition, --time, --nodes and the like are for --slurm")
        client = jobs.connect(self.address)
        name, is_new = jobs.submit(client, self.file, execution, plan, places=self.places)
        err.print(f"{'started' if is_new else 'joined'} {name}: {len(plan)} runs", markup=False, soft_wrap=True)
        err.print(f"aepo jobs logs {name} shows it again, aepo jobs stop {name} ends it", markup=False, soft_wrap=True)
        if self.detach:
            job = jobs.find(client, name)
        else:
            job = jobs.follow(client, name, lambda text: err.print(text, end="", markup=False, soft_wrap=True))
            err.print(
                f"{name}: {job.status}; aepo jobs fetch {name} brings the table home", markup=False, soft_wrap=True
            )
        if self.json:
            emit_json(dataclasses.asdict(job))
        return _exit_status(job)

    def _by_slurm(self, execution: "Execution", plan: "list[RunConfig]") -> int:
        from cluster import jobs
        from cluster.slurm import client

        if self.address or self.places:
            raise ConfigError("--address and --places are for a Ray cluster that is up; leave them out with --slurm")
        flags = ["--retry-failed"] * execution.retry_failed + ["--only"] * execution.only
        job, is_new = client.submit(self.file, execution.out, self.allocation, flags=flags, plan=jobs.plan_digest(plan))
        err.print(f"{'submitted' if is_new else 'joined'} job {job.job}: {len(plan)} runs", soft_wrap=True)
        err.print(f"aepo jobs logs {job.job} shows it again, aepo jobs stop {job.job} ends it", soft_wrap=True)
        if not self.detach:
            job = client.follow(job, lambda text: err.print(text, end="", markup=False, soft_wrap=True))
            err.print(f"job {job.job}: {job.state}; the report is in {job.sweep}/report", markup=False, soft_wrap=True)
        if self.json:
            emit_json(dataclasses.asdict(job))
        return _slurm_status(job)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobsList:
    """List the sweeps that a cluster runs or ran.

    For example:
      aepo jobs list --address http://127.0.0.1:8265
      aepo jobs list --slurm
    """

    address: str = ""
    """Jobs server, as of `aepo submit`."""
    slurm: bool = False
    """Those of SLURM instead."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print one row per attempt."""
        from cluster import jobs
        from cluster.slurm import client

        if self.slurm:
            _print_slurm(client.listed(), as_json=self.json)
            return 0
        _print_jobs(jobs.jobs(jobs.connect(self.address)), as_json=self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class JobsStatus:
    """Show one job.

    For example:
      aepo jobs status aepo-mazes-1f2e3d4c-1
    """

    job: tyro.conf.Positional[str]
    """Job, or folder of the sweep as in its file: its last attempt. A number, or a folder here that SLURM has run, is a
    job of SLURM."""
    address: str = ""
    """Jobs server, as of `aepo submit`."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print one row."""
        from cluster import jobs
        from cluster.slurm import client

        if client.is_slurm(self.job):
            _print_slurm([client.find(self.job)], as_json=self.json)
            return 0
        _print_jobs([jobs.find(jobs.connect(self.address), self.job)], as_json=self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class JobsLogs:
    """Show a job's log, as it grows until the job ends. Exits as the sweep does.

    For example:
      aepo jobs logs aepo-mazes-1f2e3d4c-1
    """

    job: tyro.conf.Positional[str]
    """Job, or folder of the sweep as in its file: its last attempt. A number, or a folder here that SLURM has run, is a
    job of SLURM."""
    address: str = ""
    """Jobs server, as of `aepo submit`."""

    def run(self) -> int:
        """Write the log to standard output."""
        from cluster import jobs
        from cluster.slurm import client as slurm

        def write(text: str) -> None:
            emit_text(text.removesuffix("\n"))

        if slurm.is_slurm(self.job):
            return _slurm_status(slurm.follow(slurm.find(self.job), write))
        client = jobs.connect(self.address)
        job = jobs.follow(client, jobs.find(client, self.job).job, write)
        return _exit_status(job)


@dataclasses.dataclass(frozen=True)
class JobsStop:
    """End a job: every run stores a checkpoint first. `aepo submit` of the same file goes on.

    For example:
      aepo jobs stop aepo-mazes-1f2e3d4c-1
    """

    job: tyro.conf.Positional[str]
    """Job, or folder of the sweep as in its file: its last attempt. A number, or a folder here that SLURM has run, is a
    job of SLURM."""
    address: str = ""
    """Jobs server, as of `aepo submit`."""
    timeout_s: float = 120.0
    """Seconds until it is killed; 0 kills at once."""

    def run(self) -> int:
        """Stop the job and wait for its end."""
        from cluster import jobs
        from cluster.slurm import client as slurm

        if slurm.is_slurm(self.job):
            slurm.stop(slurm.find(self.job), timeout_s=self.timeout_s)
            _print_slurm([slurm.find(self.job)], as_json=False)
            return 0
        client = jobs.connect(self.address)
        jobs.stop(client, jobs.find(client, self.job), timeout_s=self.timeout_s)
        _print_jobs([jobs.find(client, self.job)], as_json=False)
        return 0


@dataclasses.dataclass(frozen=True)
class JobsFetch:
    """Bring the table of a sweep, running or ended, into a folder here, and write its report.

    For example:
      aepo jobs fetch aepo-mazes-1f2e3d4c-1 --out sweeps/mazes
    """

    job: tyro.conf.Positional[str]
    """Job, or folder of the sweep as in its file: its last attempt. A number, or a folder here that SLURM has run, is a
    job of SLURM."""
    address: str = ""
    """Jobs server, as of `aepo submit`."""
    out: Path | None = None
    """Folder here; none = that of the sweep file."""

    def run(self) -> int:
        """Fetch runs.parquet and sweep.json, write report/ beside them; return 3 if planned runs have no result."""
        from analysis.report import Report
        from cluster import jobs
        from cluster.slurm import client as slurm

        if slurm.is_slurm(self.job):
            found = slurm.find(self.job)
            home = self.out or Path(found.sweep)
            err.print(f"{home}: {', '.join(slurm.fetch(found, home))}", markup=False, soft_wrap=True)
            return Report(runs=(home,), allow_missing=found.state != "COMPLETED").run()
        client = jobs.connect(self.address)
        job = jobs.find(client, self.job)
        home = self.out or Path(
            job.sweep if not Path(job.sweep).is_absolute() else Path("sweeps") / Path(job.sweep).name
        )
        err.print(f"{home}: {', '.join(jobs.fetch(client, job, home))}", markup=False, soft_wrap=True)
        return Report(runs=(home,), allow_missing=job.status != "SUCCEEDED").run()


def _show(folder: Path, *, as_json: bool) -> int:
    from cluster.local import LocalCluster

    rows = [dataclasses.asdict(status) for status in LocalCluster(folder).status()]
    if as_json:
        emit_json(rows)
    elif rows:
        emit_table(f"cluster in {folder}", rows)
    else:
        err.print(f"no cluster is up in {folder}", markup=False, soft_wrap=True)
    return 0 if rows and all(row["state"] == "up" for row in rows) else 6


@dataclasses.dataclass(frozen=True)
class ClusterDoctor:
    """Ask every node of a cluster for its versions, storage, tracking server, data, GPUs, clock, disk and open ports.

    Exits 6 if something fails that a sweep needs.

    For example:
      aepo cluster doctor --address http://127.0.0.1:8265
      aepo cluster doctor mazes.toml --json
    """

    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[FILE]")]] = None
    """Sweep file, whose data sets every node must have."""
    address: str = ""
    """Jobs server, as of `aepo submit`."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print one row per check; return 6 if one failed."""
        from cluster import jobs
        from cluster.fitness import examine_cluster
        from tune.plan import planned_runs
        from tune.spec import read_sweep_file

        datasets = []
        if self.file is not None:
            datasets = [config.data.dataset for config in planned_runs(self.file, read_sweep_file(self.file)[0])]
        client = jobs.connect(self.address)
        checks = examine_cluster(client, jobs.jobs_server(self.address), datasets)
        rows = [dataclasses.asdict(check) for check in checks]
        if self.json:
            emit_json(rows)
        else:
            emit_table("this cluster", rows)
        return 6 if any(check.status == "fail" for check in checks) else 0


def _print_jobs(found: "list[Job]", *, as_json: bool) -> None:
    if as_json:
        emit_json([dataclasses.asdict(job) for job in found])
    else:
        hidden = ("plan", "out")
        rows = [{k: v for k, v in dataclasses.asdict(job).items() if k not in hidden} for job in found]
        emit_table("jobs", rows, None if rows else ["job", "sweep", "status"])


def _exit_status(job: "Job") -> int:
    if job.status in ("SUCCEEDED", "PENDING", "RUNNING"):
        return 0
    return job.exit_status if job.exit_status and job.exit_status > 0 else 1


def _print_slurm(found: "list[SlurmJob]", *, as_json: bool) -> None:
    rows = [dataclasses.asdict(job) for job in found]
    if as_json:
        emit_json(rows)
    else:
        shown = [{key: value for key, value in row.items() if key != "log"} for row in rows]
        emit_table("jobs of SLURM", shown, None if rows else ["job", "sweep", "state"])


def _slurm_status(job: "SlurmJob") -> int:
    if not job.is_over or job.state == "COMPLETED":
        return 0
    return job.exit_status or 1


CLUSTER: TypeAlias = (
    Annotated[Up, tyro.conf.subcommand("up")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Down, tyro.conf.subcommand("down")]
    | Annotated[ClusterDoctor, tyro.conf.subcommand("doctor")]
)
"""What `aepo cluster` parses."""

JOBS: TypeAlias = (
    Annotated[JobsList, tyro.conf.subcommand("list")]
    | Annotated[JobsStatus, tyro.conf.subcommand("status")]
    | Annotated[JobsLogs, tyro.conf.subcommand("logs")]
    | Annotated[JobsStop, tyro.conf.subcommand("stop")]
    | Annotated[JobsFetch, tyro.conf.subcommand("fetch")]
)
"""What `aepo jobs` parses."""
