"""What is asked of SLURM."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """What is asked of SLURM: flags of `aepo submit --slurm`."""

    partition: str = ""
    """With --slurm: partition; none = the cluster's own choice. So with the others below."""
    account: str = ""
    """Account that pays."""
    time: str = "24:00:00"
    """Time limit, as HOURS:MINUTES:SECONDS or DAYS-HOURS; the job queues itself again until all runs have ended."""
    nodes: int = 1
    """Nodes."""
    cpus_per_node: int = 8
    """Cores of each node."""
    gpus_per_node: int = 0
    """GPUs of each node."""
    memory_per_node: str = ""
    """Memory of each node, as 64G; none = 2 GiB a core."""
    sbatch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Any other flag of sbatch, as in --sbatch qos=long --sbatch constraint=a100."""
