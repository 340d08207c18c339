"""What a cluster consists of, and the command line of each part: the one place that says it.

`aepo cluster up --local` runs these as processes; docker-compose.yml and cluster/kubernetes repeat them word for word,
and a test compares. A password is in no command line, for every user of a machine can read those: PostgreSQL's clients
take theirs from PGPASSWORD, Ray its token from RAY_AUTH_TOKEN or a file, MLflow its own from its variables.
"""

import dataclasses
from pathlib import Path

DATABASE = "mlflow"
"""PostgreSQL's database and its owner."""
ADMIN = "admin"
"""MLflow's first user; the platform logs as it."""
AUTH_CONFIG = Path(__file__).with_name("mlflow-auth.ini")
STORE = "postgresql+psycopg:///" + DATABASE
"""Where MLflow keeps runs and users; host, port, user and password come from PGHOST, PGPORT, PGUSER and PGPASSWORD."""
MLFLOW_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "20",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "20",
}
"""Environment of MLflow's server. The first saves 1.5 GB; without the others a wide sweep loses metrics. Two workers
stay below PostgreSQL's 100 connections."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Where the parts of one cluster listen and keep their files; the defaults are those of containers."""

    host: str = "0.0.0.0"
    """What every service listens on: in a container all of its own interfaces, of which no port is published but to
    127.0.0.1 of the host."""
    database_host: str = "*"
    database_port: int = 5432
    sockets: str = "/var/run/postgresql"
    """Folder of PostgreSQL's Unix socket; empty for none."""
    mlflow_port: int = 5000
    mlflow_names: str = "mlflow:*,localhost:*,127.0.0.1:*"
    """Host headers that MLflow answers to."""
    artifacts: str = "/artifacts"
    gcs_host: str = "ray-head"
    gcs_port: int = 6379
    dashboard_port: int = 8265


def postgres(settings: ServiceSettings) -> list[str]:
    """Return PostgreSQL's command line; its data folder is PGDATA."""
    options = {
        "listen_addresses": settings.database_host,
        "port": str(settings.database_port),
        "unix_socket_directories": settings.sockets,
        "password_encryption": "scram-sha-256",
    }
    return ["postgres", *(word for key, value in options.items() for word in ("-c", f"{key}={value}"))]


def mlflow(settings: ServiceSettings) -> list[str]:
    """Return the tracking server's command line; every request but /health wants a user and a password."""
    return [
        *("mlflow", "server", "--app-name", "basic-auth", "--workers", "2"),
        *("--host", settings.host, "--port", str(settings.mlflow_port), "--allowed-hosts", settings.mlflow_names),
        *("--backend-store-uri", STORE, "--artifacts-destination", settings.artifacts),
    ]


def ray_head(settings: ServiceSettings, *, has_dashboard: bool = True) -> list[str]:
    """Return the head's command line; the dashboard is the jobs server. Port 0 of `place` is any free one."""
    served = ("--dashboard-host", settings.host, "--dashboard-port", str(settings.dashboard_port))
    return [
        *("ray", "start", "--head", "--block", "--disable-usage-stats"),
        *("--include-dashboard", "true" if has_dashboard else "false", "--port", str(settings.gcs_port)),
        *(served if has_dashboard else ()),
        *RAY_NODE,
    ]


def ray_worker(settings: ServiceSettings) -> list[str]:
    """Return a worker's command line."""
    return [
        *("ray", "start", "--block", "--disable-usage-stats", "--address", f"{settings.gcs_host}:{settings.gcs_port}"),
        *RAY_NODE,
    ]


def on_shared_machine(*, cpus: int, gpus: int, memory: int, folder: Path | str) -> list[str]:
    """Return what a node's command line says besides, where it is not the only one of its machine.

    Args:
        cpus: cores that it offers.
        gpus: GPUs that it offers.
        memory: bytes that it offers to runs, beside its object store; Ray's own guess is all of the machine's.
        folder: its own folder for files and sockets; in a shared one nodes replace each other's code.
    """
    return [
        *("--num-cpus", str(cpus), "--num-gpus", str(gpus), "--memory", str(memory)),
        *("--dashboard-agent-listen-port", "0", "--temp-dir", str(folder)),
    ]


OBJECT_STORE = 200_000_000
"""Bytes of shared memory of a node: little, for runs pass no objects."""
RAY_NODE = ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", str(OBJECT_STORE)]
"""Ports that are free, as several nodes may share an address."""
