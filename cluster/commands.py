"""`aepo cluster`: a cluster on this machine, and whether one is fit."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from aepo.console import emit_json, emit_table, err
from aepo.errors import ConfigError


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
    """Of the cluster."""
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
    """Of the cluster."""

    def run(self) -> int:
        """Stop all services."""
        from cluster.local import LocalCluster

        stopped = LocalCluster(self.folder).down()
        err.print(f"stopped: {', '.join(stopped)}" if stopped else "no cluster is up", soft_wrap=True)
        return 0


def _show(folder: Path, *, as_json: bool) -> int:
    from cluster.local import LocalCluster

    rows = [dataclasses.asdict(status) for status in LocalCluster(folder).status()]
    if as_json:
        emit_json(rows)
    elif rows:
        emit_table(f"cluster in {folder}", rows)
    else:
        err.print(f"no cluster is up in {folder}", soft_wrap=True)
    return 0 if rows and all(row["state"] == "up" for row in rows) else 6


CLUSTER: TypeAlias = (
    Annotated[Up, tyro.conf.subcommand("up")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Down, tyro.conf.subcommand("down")]
)
"""What `aepo cluster` parses."""
