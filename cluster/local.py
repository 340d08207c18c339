"""A whole cluster as processes on this machine: Ray's head and workers, MLflow on PostgreSQL, its files in a folder.

    <folder>/state.json     what runs: ports, and of every process its number and when it started
            /secrets.json   Ray's token and the passwords, made at the first start (0600, as state.json)
            /token, env     the token alone, for RAY_AUTH_TOKEN_PATH; what a shell or a notebook wants to set (0600)
            /logs/          one log per service
            /postgres/, artifacts/, storage/    MLflow's runs, and the sweeps' folders; they outlive the cluster

Everything listens on 127.0.0.1. A process is ours if its number and its start, in ticks since the machine booted, are
those that were written down: a number that the kernel has given to another process is never signalled.
"""

import contextlib
import dataclasses
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aepo import files
from aepo.console import err
from aepo.documents import parse_json
from aepo.errors import AEPOError, ResourceError
from cluster import services
from cluster.processes import (
    Process,
    children,
    end_all,
    end_process_tree,
    is_alive,
    marked_processes,
    start_ticks,
)
from cluster.services import ADMIN, AUTH_CONFIG, DATABASE, MLFLOW_SETTINGS, ServiceSettings
from tune.sockets import make_socket_folder

LOCALHOST = "127.0.0.1"
START_TIMEOUT_S = {"postgres": 60.0, "mlflow": 300.0, "ray-head": 180.0}
WORKER_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
LOG_LINES = 15
MARK = "AEPO_CLUSTER"
"""Variable in the environment of every process of a cluster: its folder."""
NODE = "AEPO_NODE"
"""Variable in the environment of every process of a node of Ray: the node's name, another one at each start, since a
node that died keeps its own for a while."""
POSTGRES_STEP = "install it: apt-get install postgresql (Debian, Ubuntu), dnf install postgresql-server (Fedora)"
EXTRA_STEP = "install the cluster's packages: pip install 'aepo-platform[cluster]'"


@dataclasses.dataclass(frozen=True)
class ServiceStatus:
    """One service as it is now."""

    service: str
    state: str
    """up, down, or silent: there, but it does not answer."""
    pid: int | None
    address: str
    log: str


class LocalCluster:
    """One cluster, of which everything that is known lies in its folder."""

    def __init__(self, folder: Path):
        """Read nothing yet."""
        self.folder = folder.resolve()
        self._state = self.folder / "state.json"

    # What is known

    def state(self) -> dict[str, Any] | None:
        """Return what was written down at the last start, None if there is no cluster.

        After a reboot, or in another container, the processes are gone; their numbers may be anybody's.
        """
        try:
            state = parse_json(self._state.read_text())
            assert isinstance(state["services"], dict)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ResourceError(f"{self._state} is not a cluster's state; look for its processes, delete it") from error
        if state["boot"] != _boot():
            state["services"] = {}
        return state  # type: ignore[no-any-return]

    def secrets(self) -> dict[str, str]:
        """Return Ray's token and the passwords; made at first."""
        path = self.folder / "secrets.json"
        if not path.exists():
            names = ("ray_token", "postgres_password", "mlflow_password", "mlflow_key")
            _write_secret(path, json.dumps({name: secrets.token_hex(32) for name in names}))
        return dict(parse_json(path.read_text()))

    def dashboard(self) -> str | None:
        """Return the address of the jobs server, None if there is no cluster."""
        state = self.state()
        return None if state is None else f"http://{LOCALHOST}:{state['ports']['dashboard']}"

    def status(self) -> list[ServiceStatus]:
        """Return every service of the cluster, asked now."""
        state = self.state()
        if state is None:
            return []
        rows = []
        for name in _names(state):
            process = _process(state, name)
            alive = process is not None and is_alive(process)
            answer = "up" if alive and self._answers(state, name) else "silent" if alive else "down"
            pid = process.pid if process is not None and alive else None
            rows.append(ServiceStatus(name, answer, pid, _address(state, name), str(self._log(name))))
        return rows

    # Up

    def up(self, *, nodes: int, cpus: int, gpus: int) -> bool:
        """Start what does not run; return whether anything had to be started.

        A service that died is started again; if it was Ray's head, the workers too.

        Raises:
            ResourceError: if a program is missing or a service does not come up, which its log's last lines explain;
                what this call started has been stopped then. Or if the cluster is up with other nodes, or
                CUDA_VISIBLE_DEVICES names fewer GPUs than the nodes are to offer.
        """
        devices_of_node(nodes - 1, gpus)
        self._make_folder()
        with self._lock():
            state = self.state()
            if state is not None and any(is_alive(p) for p in _processes(state)):
                if (state["nodes"], state["cpus"], state["gpus"]) != (nodes, cpus, gpus):
                    raise ResourceError(
                        f"the cluster in {self.folder} is up with {state['nodes']} nodes of {state['cpus']} CPU and "
                        f"{state['gpus']} GPU; aepo cluster down ends it"
                    )
            else:
                state = self._new_state(nodes, cpus, gpus)
            missing = [name for name in _names(state) if not _runs(state, name)]
            if not missing:
                return False
            if "ray-head" in missing:
                self._stop(state, [name for name in _names(state) if name.startswith("ray")])
            started: list[str] = []
            try:
                for name in [name for name in _names(state) if not _runs(state, name)]:
                    started.append(name)
                    self._start(state, name)
                    if name != "mlflow":  # which nobody waits for; two Ray nodes that start at once take one socket
                        self._wait(state, name)
                if "mlflow" in started:
                    self._wait(state, "mlflow")
            except BaseException:
                self._stop(state, started)
                if not any(is_alive(p) for p in _processes(state)):
                    self._forget(state)
                raise
            return True

    def down(self) -> list[str]:
        """Stop everything; return the services that ran."""
        if not self.folder.exists():
            return []
        with self._lock():
            state = self.state()
            if state is None:
                return []
            ran = [name for name in _names(state) if _runs(state, name)]
            self._stop(state, _names(state))
            self._forget(state)
            return ran

    # Inside

    def _make_folder(self) -> None:
        root = os.geteuid() == 0
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o711 if root else 0o700)
        for name in ("logs", "artifacts", "storage"):
            (self.folder / name).mkdir(exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as file:
            if not files.try_lock(file.fileno()):
                raise ResourceError(f"another `aepo cluster` is at work in {self.folder}; wait for it")
            yield

    def _new_state(self, nodes: int, cpus: int, gpus: int) -> dict[str, Any]:
        wanted = {"postgres": 5432, "mlflow": 5000, "gcs": 6379, "dashboard": 8265}
        state = {
            "boot": _boot(),
            "nodes": nodes,
            "cpus": cpus,
            "gpus": gpus,
            "memory": _node_memory(nodes),
            "ports": _free_ports(wanted),
            "temp": str(make_socket_folder()),
            "services": {},
        }
        self._save(state)
        token, ports = self.secrets()["ray_token"], state["ports"]
        _write_secret(self.folder / "token", token)
        variables = {
            "RAY_API_SERVER_ADDRESS": f"http://{LOCALHOST}:{ports['dashboard']}",  # type: ignore[index]
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            **self._tracking(state),
        }
        text = "".join(f"export {name}='{value}'\n" for name, value in variables.items())
        _write_secret(self.folder / "env", text)
        return state

    def _save(self, state: dict[str, Any]) -> None:
        _write_secret(self._state, json.dumps(state, indent=1) + "\n")

    def _forget(self, state: dict[str, Any]) -> None:
        shutil.rmtree(state["temp"], ignore_errors=True)
        for name in ("state.json", "token", "env"):
            (self.folder / name).unlink(missing_ok=True)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _tracking(self, state: dict[str, Any]) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": _address(state, "mlflow"),
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.secrets()["mlflow_password"],
        }

    def _settings(self, state: dict[str, Any]) -> ServiceSettings:
        ports = state["ports"]
        return ServiceSettings(
            host=LOCALHOST,
            database_host=LOCALHOST,
            database_port=ports["postgres"],
            sockets="",
            mlflow_port=ports["mlflow"],
            artifacts=str(self.folder / "artifacts"),
            gcs_host=LOCALHOST,
            gcs_port=ports["gcs"],
            dashboard_port=ports["dashboard"],
        )

    def _start(self, state: dict[str, Any], name: str) -> None:
        """Start one service in a session of its own and write down its process."""
        words, environment, account = self._command(state, name)
        with self._log(name).open("ab") as log:
            log.write(f"\n--- {time.strftime('%F %T')} {name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {MARK: str(self.folder)},
                cwd="/" if account else self.folder,
                start_new_session=True,
                **_as(account),
            )
        children.append(process)
        state["services"][name] = {"pid": process.pid, "ticks": start_ticks(process.pid)}
        if name.startswith("ray"):
            state["services"][name]["node"] = environment[NODE]
        self._save(state)

    def _command(self, state: dict[str, Any], name: str) -> tuple[list[str], dict[str, str], str | None]:
        """Return a service's command line, environment and account (None: this one)."""
        settings, hidden, ports = self._settings(state), self.secrets(), state["ports"]
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        if name == "postgres":
            account, programs = postgres_account(), postgres_programs()
            data = self.make_database(programs, account)
            return (
                [str(programs / "postgres"), *services.postgres(settings)[1:]],
                {"PGDATA": str(data), "PATH": path},
                account,
            )
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PG"))}
        environment["PATH"] = path
        if name == "mlflow":
            environment |= MLFLOW_SETTINGS | {
                "PGHOST": LOCALHOST,
                "PGPORT": str(ports["postgres"]),
                "PGUSER": DATABASE,
                "PGPASSWORD": hidden["postgres_password"],
                "MLFLOW_AUTH_CONFIG_PATH": str(AUTH_CONFIG),
                "MLFLOW_AUTH_ADMIN_PASSWORD": hidden["mlflow_password"],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": hidden["mlflow_key"],
            }
            return [sys.executable, "-m", *services.mlflow(settings)], environment, None
        head, node = name == "ray-head", f"{name}-{secrets.token_hex(3)}"
        words = services.ray_head(settings) if head else services.ray_worker(settings)
        words = [sys.executable, "-m", "cluster.node", *words[1:], "--node-name", node]
        words += ["--node-ip-address", LOCALHOST]
        words += services.on_shared_machine(
            cpus=state["cpus"], gpus=state["gpus"], memory=state["memory"], folder=f"{state['temp']}/{name[4:]}"
        )
        if devices := devices_of_node(0 if head else int(name.rpartition("-")[2]), state["gpus"]):
            environment["CUDA_VISIBLE_DEVICES"] = devices
        environment |= self._tracking(state) | {
            NODE: node,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "AEPO_STORAGE": str(self.folder / "storage"),
            "OMP_NUM_THREADS": "1",
        }
        return words, environment, None

    def make_database(self, programs: Path, account: str | None) -> Path:
        """Return PostgreSQL's data folder, made at first, with the password of `secrets`.

        Raises:
            ResourceError: if the account cannot reach the folder, or initdb fails.
        """
        data, parent = self.folder / "postgres" / "data", self.folder / "postgres"
        if (data / "PG_VERSION").exists():
            return data
        parent.mkdir(exist_ok=True, mode=0o700)
        shutil.rmtree(data, ignore_errors=True)  # what an interrupted first start left
        password = parent / "password"
        _write_secret(password, self.secrets()["postgres_password"])
        if account is not None:
            for path in (parent, password):
                shutil.chown(path, account)
            if subprocess.run(["test", "-w", str(parent)], check=False, **_as(account)).returncode:
                raise ResourceError(
                    f"PostgreSQL refuses to run as root; it would run as {account}, who cannot reach {parent}. Wanted: "
                    "a --folder that everybody may pass through, such as /var/lib/aepo/cluster"
                )
        words = [str(programs / "initdb"), "--pgdata", str(data), "--username", DATABASE, "--auth", "scram-sha-256"]
        words += ["--pwfile", str(password), "--encoding", "UTF8", "--locale", "C", "--no-instructions"]
        with self._log("postgres").open("ab") as log:
            ended = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=False, **_as(account)
            )
        password.unlink()
        if ended.returncode:
            raise ResourceError(f"initdb ended with status {ended.returncode}:\n{self._last_lines('postgres')}")
        return data

    def _wait(self, state: dict[str, Any], name: str) -> None:
        """Return when a service answers.

        Raises:
            ResourceError: with the last lines of its log, if it ends or takes too long.
        """
        begin, timeout_s = time.monotonic(), START_TIMEOUT_S.get(name, WORKER_TIMEOUT_S)
        process = _process(state, name)
        while not self._answers(state, name):
            if process is None or not is_alive(process):
                raise ResourceError(f"{name} ended while it started; its log says:\n{self._last_lines(name)}")
            if time.monotonic() - begin > timeout_s:
                raise ResourceError(f"{name} does not answer after {timeout_s:g} s:\n{self._last_lines(name)}")
            time.sleep(0.3)
        err.print(f"{name} is up at {_address(state, name)}", markup=False, soft_wrap=True)

    def _answers(self, state: dict[str, Any], name: str) -> bool:
        import requests

        hidden, address = self.secrets(), _address(state, name)
        try:
            if name == "postgres":
                self._ensure_database(state["ports"]["postgres"], hidden["postgres_password"])
                return True
            if name == "mlflow":
                url, basic = (
                    f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0",
                    (ADMIN, hidden["mlflow_password"]),
                )
                return requests.get(url, auth=basic, timeout=5).status_code == 200
            head = f"http://{LOCALHOST}:{state['ports']['dashboard']}"
            bearer = {"Authorization": f"Bearer {hidden['ray_token']}"}
            if name == "ray-head":
                return requests.get(f"{head}/api/jobs/", headers=bearer, timeout=10).status_code == 200
            found = requests.get(f"{head}/api/v0/nodes", headers=bearer, timeout=10).json()
            nodes = found["data"]["result"]["result"]
            return any(
                node["node_name"] == state["services"][name]["node"] and node["state"] == "ALIVE" for node in nodes
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _ensure_database(self, port: int, password: str) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise ResourceError(f"{error}; {EXTRA_STEP}") from None
        try:
            with psycopg.connect(
                host=LOCALHOST,
                port=port,
                user=DATABASE,
                password=password,
                dbname="postgres",
                autocommit=True,
                connect_timeout=3,
            ) as connection:
                if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
        except psycopg.Error as error:
            raise ConnectionError(str(error)) from None

    def _last_lines(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])

    def _stop(self, state: dict[str, Any], names: Sequence[str]) -> None:
        """End services, the last one first, and everything that came from them."""
        for name in reversed(names):
            process = _process(state, name)
            if process is None:
                continue
            soft = signal.SIGINT if name == "postgres" else signal.SIGTERM  # PostgreSQL's fast shutdown
            end_process_tree(process, soft, timeout_s=STOP_TIMEOUT_S)
            state["services"].pop(name, None)
            self._save(state)
        if not state["services"]:
            end_all(marked_processes(MARK, str(self.folder)))


def default_folder() -> Path:
    """Return AEPO_CLUSTER_FOLDER, or a folder of the user's; root's PostgreSQL, which is not root, must get there."""
    if named := os.environ.get("AEPO_CLUSTER_FOLDER"):
        return Path(named)
    return Path("/var/lib/aepo/cluster") if os.geteuid() == 0 else Path.home() / ".local/share/aepo/cluster"


def devices_of_node(number: int, gpus: int) -> str:
    """Return the CUDA_VISIBLE_DEVICES of a node, empty for one without GPUs: nodes of one machine share no device.

    Raises:
        ResourceError: if this process may see fewer devices than the nodes up to this one take.
    """
    if not gpus:
        return ""
    end, visible = gpus * (number + 1), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ",".join(map(str, range(end - gpus, end)))
    devices = [name.strip() for name in visible.split(",") if name.strip()]
    if end > len(devices):
        raise ResourceError(
            f"the nodes are to offer {end} GPUs, CUDA_VISIBLE_DEVICES={visible!r} has {len(devices)}; name more there, "
            "or take fewer --nodes or --gpus-per-node"
        )
    return ",".join(devices[end - gpus : end])


def token_file(address: str) -> Path | None:
    """Return the file with the token of the local cluster at this address, None if there is none."""
    cluster = LocalCluster(default_folder())
    with contextlib.suppress(AEPOError, OSError):
        if cluster.dashboard() == address.rstrip("/"):
            return cluster.folder / "token"
    return None


def _names(state: dict[str, Any]) -> list[str]:
    return ["postgres", "mlflow", "ray-head", *(f"ray-worker-{i}" for i in range(1, state["nodes"]))]


def _address(state: dict[str, Any], name: str) -> str:
    ports = state["ports"]
    if name == "postgres":
        return f"postgresql://{LOCALHOST}:{ports['postgres']}/{DATABASE}"
    key = "mlflow" if name == "mlflow" else "dashboard"
    return f"http://{LOCALHOST}:{ports[key]}" if name in ("mlflow", "ray-head") else f"{LOCALHOST}:{ports['gcs']}"


def _process(state: dict[str, Any], name: str) -> Process | None:
    found = state["services"].get(name)
    return None if found is None else Process(found["pid"], found["ticks"])


def _processes(state: dict[str, Any]) -> list[Process]:
    return [process for name in state["services"] if (process := _process(state, name)) is not None]


def _runs(state: dict[str, Any], name: str) -> bool:
    process = _process(state, name)
    return process is not None and is_alive(process)


def _boot() -> str:
    """Name this boot of the machine and this space of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _node_memory(nodes: int) -> int:
    import psutil

    return int(0.7 * psutil.virtual_memory().available / nodes)


def _free_ports(wanted: dict[str, int]) -> dict[str, int]:
    """Return the wanted ports, and for those that are taken others that are free."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for name, port in wanted.items():
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((LOCALHOST, port))
            except OSError:
                listener.bind((LOCALHOST, 0))
            ports[name] = int(listener.getsockname()[1])
    return ports


def _write_secret(path: Path, text: str) -> None:
    """Write a file that nobody else can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def postgres_account() -> str | None:
    """Return who PostgreSQL runs as if this is root, which it refuses; None if this is anybody else."""
    if os.geteuid() != 0:
        return None
    for account in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(account)
            return account
    raise ResourceError("PostgreSQL refuses to run as root, and there is no user postgres or nobody; run as yourself")


def _as(account: str | None) -> dict[str, Any]:
    """Return what makes a process run as an account, nothing for None."""
    if account is None:
        return {}
    return {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}


def postgres_programs() -> Path:
    """Return the folder of the newest PostgreSQL on PATH or where Debian puts it.

    Raises:
        ResourceError: if there is none.
    """
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(versions, key=lambda folder: (len(folder.parent.name), folder.parent.name), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise ResourceError(f"no PostgreSQL on PATH or in /usr/lib/postgresql; {POSTGRES_STEP}")
