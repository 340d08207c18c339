"""A sweep submitted to a cluster of three nodes that is broken, against the same sweep on one machine. Run by hand.

    python -m tests.cluster_faults [--hosts] [--out FOLDER]

2 tasks x 3 seeds. The command that submitted is killed at once (given again, it joins), then a worker node (SIGKILL)
and the MLflow server, which stays away for 20 s. The tables, weights and tracked metrics must be equal, and `down` must
leave no process and no port. With --hosts (root only) the three nodes are network namespaces of their own on a bridge
that nothing else is on, with folders of their own but for the shared one; the namespaces are removed afterwards.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from cluster import local, processes, services
from cluster.local import LocalCluster
from cluster.processes import Process
from tests.faults import answers, compare, holders, kill, log, position, wait_for

TASKS, SEEDS, STEPS = ["maze2d-open", "maze2d-umaze"], [0, 1, 2], 4000
FILE = """\
out = "sweeps/broken"
task = {tasks}
seeds = {seeds}
preset = ["smoke"]
checkpoint_s = 2
[set]
evaluation.num_episodes = 2
""" + "".join(
    f"{stage}.{key} = {value}\n"
    for stage in ("behavior", "critic", "energy")
    for key, value in (("steps", STEPS), ("batch_size", 32), ("hidden_size", 16))
)
AWAY_S = 20.0


class Machine:
    """Three nodes as `aepo cluster up --local` starts them."""

    def __init__(self, folder: Path):
        self.folder = folder / "cluster"
        self.prefix: list[str] = []
        self.up()
        cluster = LocalCluster(self.folder)
        state = cluster.state()
        self.dashboard, self.storage = cluster.dashboard(), self.folder / "storage"
        self.ports = list(state["ports"].values())
        self.environment = dict(
            line.removeprefix("export ").replace("'", "").split("=", 1)
            for line in (self.folder / "env").read_text().splitlines()
        )
        os.environ |= self.environment
        self.uri = self.environment["MLFLOW_TRACKING_URI"]

    def up(self) -> None:
        aepo("cluster", "up", "--local", "--nodes", "3", "--folder", str(self.folder))

    def leaders(self) -> dict[str, int]:
        return {name: entry["pid"] for name, entry in LocalCluster(self.folder).state()["services"].items()}

    def down(self) -> list[str]:
        """End it; return what is left, a line each."""
        before = [
            Process(**{k: v[k] for k in ("pid", "ticks")})
            for v in LocalCluster(self.folder).state()["services"].values()
        ]
        members = {member for process in before for member in processes.process_tree(process)}
        aepo("cluster", "down", "--folder", str(self.folder))
        left = [
            f"process {p.pid} is left"
            for p in members | processes.marked_processes(local.MARK, str(self.folder))
            if processes.is_alive(p)
        ]
        log(f"down: {len(members)} processes and {len(self.ports)} ports to end")
        return left + [f"port {port} is open" for port in self.ports if answers(port)]


class Hosts:
    """Three hosts: namespaces with an address each, a process table and a /tmp of their own, and one shared folder."""

    NAMES = ("aepo-head", "aepo-one", "aepo-two")
    SWITCH = "aepo-switch"

    def __init__(self, folder: Path):
        self.folder, self.storage = folder, folder / "storage"
        self.storage.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        ip("netns", "add", self.SWITCH)
        ip("-n", self.SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.SWITCH, "link", "set", "bridge", "up")
        for number, name in enumerate(self.NAMES, 1):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", self.SWITCH)
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", self.SWITCH, "link", "set", f"p{number}", "master", "bridge", "up")
        head = "10.213.7.1"
        self.prefix = ["ip", "netns", "exec", self.NAMES[0]]
        self.dashboard, self.uri = f"http://{head}:8265", f"http://{head}:5000"
        self.settings = services.ServiceSettings(
            host=head,
            database_host=head,
            sockets="",
            mlflow_names=f"{head}:*",
            gcs_host=head,
            artifacts=str(folder / "artifacts"),
        )
        cluster = LocalCluster(folder / "secrets")
        (folder / "secrets").mkdir(mode=0o700)
        self.hidden = cluster.secrets()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.hidden["ray_token"],
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": services.ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.hidden["mlflow_password"],
        }
        os.environ |= self.environment
        self.up()

    def up(self) -> None:
        """Start what does not run."""
        hidden, database = self.hidden, {"PGHOST": "10.213.7.1", "PGUSER": services.DATABASE}
        account = local.postgres_account()
        programs = local.postgres_programs()
        if "postgres" not in self.processes:
            keeper = LocalCluster(self.folder)
            for name in ("logs", "artifacts"):
                (self.folder / name).mkdir(exist_ok=True)
            shutil.copy(self.folder / "secrets" / "secrets.json", self.folder)
            data = keeper.make_database(programs, account)
            with (data / "pg_hba.conf").open("a") as file:
                file.write("host all all 10.213.7.0/24 scram-sha-256\n")
            words = ["setpriv", "--reuid", account, "--clear-groups", str(programs / "postgres")]
            self.start("postgres", 0, words + services.postgres(self.settings)[1:], {"PGDATA": str(data)})
            code = (
                "import psycopg; psycopg.connect(dbname='postgres', autocommit=True).execute('CREATE DATABASE mlflow')"
            )
            wait_for(
                lambda: (
                    subprocess.run(
                        [*self.prefix, sys.executable, "-c", code],
                        env=os.environ | database | {"PGPASSWORD": hidden["postgres_password"]},
                        capture_output=True,
                        check=False,
                    ).returncode
                    == 0
                ),
                60,
                "PostgreSQL",
            )
        if self.ended("mlflow"):
            secret = {
                "PGPASSWORD": hidden["postgres_password"],
                "MLFLOW_AUTH_CONFIG_PATH": str(services.AUTH_CONFIG),
                "MLFLOW_AUTH_ADMIN_PASSWORD": hidden["mlflow_password"],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": hidden["mlflow_key"],
            }
            words = [sys.executable, "-m", *services.mlflow(self.settings)]
            self.start("mlflow", 0, words, database | services.MLFLOW_SETTINGS | secret)
            self.wait_for_port(5000, "MLflow")
        for number, name in enumerate(("ray-head", "ray-worker-1", "ray-worker-2")):
            if self.ended(name):
                words = services.ray_worker(self.settings) if number else services.ray_head(self.settings)
                words = [str(Path(sys.executable).with_name("ray")), *words[1:], "--num-cpus", "1"]
                words += ["--node-ip-address", f"10.213.7.{number + 1}"]
                self.start(name, number, words, {"AEPO_STORAGE": str(self.storage), "OMP_NUM_THREADS": "1"})
                if not number:
                    self.wait_for_port(8265, "Ray's dashboard")

    def ended(self, name: str) -> bool:
        return name not in self.processes or self.processes[name].poll() is not None

    def start(self, name: str, host: int, words: list[str], environment: dict[str, str]) -> None:
        output = (self.folder / f"{name}.log").open("a")
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        own = self.folder / f"tmp{host}"
        shell = f'mkdir -p {own} /tmp/ray && mount --bind {own} /tmp/ray && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.processes[name] = subprocess.Popen(
            ["ip", "netns", "exec", self.NAMES[host], *alone, shell, "sh", *words],
            stdout=output,
            stderr=output,
            env=os.environ | environment | {"PATH": path},
            start_new_session=True,
        )

    def wait_for_port(self, port: int, what: str) -> None:
        code = f"import socket; socket.create_connection(('10.213.7.1', {port}), 2)"
        words = [*self.prefix, sys.executable, "-c", code]
        wait_for(lambda: subprocess.run(words, capture_output=True, check=False).returncode == 0, 120, what)

    def leaders(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.processes.items() if process.poll() is None}

    def down(self) -> list[str]:
        """End everything; return what is left, a line each."""
        for process in reversed(self.processes.values()):
            processes.end_all(processes.process_tree(Process(process.pid, processes.start_ticks(process.pid))))
            process.wait()
        left = []
        for name in (*self.NAMES, self.SWITCH):
            inside = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split()
            left += [f"process {pid} is left in {name}" for pid in inside]
            subprocess.run(["ip", "netns", "delete", name], check=False)
        return left


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def aepo(*words: str, prefix: list[str] | None = None) -> str:
    command = [*(prefix or []), sys.executable, "-m", "aepo", *words]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    folder = (arguments.out or Path(tempfile.mkdtemp(prefix="acf-", dir="/tmp"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # PostgreSQL's account passes through
    log(f"everything lies in {folder}")
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ |= {
        "MINARI_DATASETS_PATH": str(folder / "minari"),
        "AEPO_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    for task in TASKS:
        aepo("data", "collect", task, "--steps", "5000", "--json")
    file = folder / "mazes.toml"
    file.write_text(FILE.format(tasks=json.dumps(TASKS), seeds=SEEDS))
    log("the sweep on one machine")
    begin = time.monotonic()
    aepo("sweep", str(file), "--out", str(folder / "whole"), "--yes", "--json")
    log(f"took {time.monotonic() - begin:.0f} s")

    log("the cluster comes up")
    begin = time.monotonic()
    cluster = (Hosts if arguments.hosts else Machine)(folder)
    log(f"took {time.monotonic() - begin:.0f} s: {', '.join(cluster.leaders())}")
    try:
        faults = broken_sweep(cluster, file, folder)
    finally:
        left = cluster.down()
        print("\n".join(left) or "no process and no port is left")
    print("\n".join(faults) or "the tables, weights and tracked metrics are equal")
    sys.exit(1 if faults or left else 0)


def broken_sweep(cluster: Machine | Hosts, file: Path, folder: Path) -> list[str]:
    """Break it; return what differs."""
    sweep = cluster.storage / "sweeps" / "broken"
    words = [*cluster.prefix, sys.executable, "-m", "aepo", "submit", str(file), "--address", cluster.dashboard]
    doctor = ["cluster", "doctor", str(file), "--address", cluster.dashboard, "--json"]

    def examined() -> list[dict] | None:
        found = json.loads(aepo(*doctor, prefix=cluster.prefix))
        return found if found[0]["found"] == "3 answer" else None

    checks = wait_for(examined, 120, "three nodes")
    log("doctor: " + ", ".join(f"{check['check']} {check['status']} ({check['found']})" for check in checks))
    begin = time.monotonic()
    submitter = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: position(sweep) > 0, 300, "the first step")
    log("killing: the command that submitted")
    os.killpg(submitter.pid, signal.SIGKILL)
    submitter.wait()
    submitter = subprocess.Popen(words, stderr=(folder / "job.log").open("w"), start_new_session=True)
    total = len(TASKS) * len(SEEDS) * 3 * STEPS

    # `position` takes stages to be as long as those of tests.faults, half of these: what it says is below the truth
    wait_for(lambda: position(sweep) > total / 4, 600, "a quarter")
    name, members = wait_for(lambda: busy_worker(cluster, sweep), 300, "a worker node that trains")
    log(f"killing: {name}, {len(members)} processes (at {position(sweep):,} of {total:,} steps)")
    for member in members:
        kill(member)
    wait_for(lambda: position(sweep) > total / 3, 600, "a third")
    log(f"killing: mlflow (at {position(sweep):,} of {total:,} steps)")
    leader = psutil.Process(cluster.leaders()["mlflow"])
    for member in [*leader.children(recursive=True), leader]:
        kill(member)
    time.sleep(AWAY_S)
    log("both come back")
    cluster.up()
    status = submitter.wait(timeout=1800)
    log(f"the job ended with status {status} after {time.monotonic() - begin:.0f} s")
    jobs = json.loads(aepo("jobs", "list", "--address", cluster.dashboard, "--json", prefix=cluster.prefix))
    faults = [] if status == 0 and len(jobs) == 1 else [f"status {status}, jobs {jobs}"]
    job, home = jobs[0]["job"], folder / "home"
    aepo("jobs", "fetch", job, "--address", cluster.dashboard, "--out", str(home), prefix=cluster.prefix)
    if not (home / "report" / "report.md").exists():
        faults.append("no report came home")
    whole, broken = (pq.read_table(path / "runs.parquet").to_pylist() for path in (folder / "whole", home))
    log(f"{len(whole)} runs on one machine, {len(broken)} on the cluster")
    log(f"starts of a worker: {sum(path.read_text().count(' starts ') for path in sweep.glob('runs/*/log.txt'))}")
    if not isinstance(cluster, Hosts):  # whose MLflow this process does not reach
        return (
            faults + compare(whole, broken, sweep, folder / "whole", cluster.uri) + shown_secrets(cluster, jobs, folder)
        )
    code = (
        "import sys, json; from pathlib import Path; import pyarrow.parquet as pq; from tests.faults import compare; "
    )
    code += "a, b, s, w, u = sys.argv[1:]; r = [pq.read_table(p).to_pylist() for p in (a, b)]; "
    code += "print(json.dumps(compare(*r, Path(s), Path(w), u)))"
    paths = [folder / "whole" / "runs.parquet", home / "runs.parquet", sweep, folder / "whole"]
    command = [*cluster.prefix, sys.executable, "-c", code, *map(str, paths), cluster.uri]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return faults + json.loads(out.splitlines()[-1]) + shown_secrets(cluster, jobs, folder)


def busy_worker(cluster: Machine | Hosts, sweep: Path) -> tuple[str, list[psutil.Process]] | None:
    """A worker node whose processes train a run now."""
    training = {process.pid for process in holders(sweep)}
    for name, pid in cluster.leaders().items():
        if name.startswith("ray-worker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(pid)
                members = [leader, *leader.children(recursive=True)]
                if training & {member.pid for member in members}:
                    return name, members
    return None


def shown_secrets(cluster: Machine | Hosts, jobs: object, folder: Path) -> list[str]:
    """Say where a token or password can be read: job, logs, the sweep's folder, command lines."""
    hidden = cluster.hidden if isinstance(cluster, Hosts) else LocalCluster(cluster.folder).secrets()
    texts = {"the jobs list": json.dumps(jobs), "the job's log": (folder / "job.log").read_text()}
    places = [*cluster.storage.rglob("*.json*"), *cluster.storage.rglob("*.txt"), *folder.rglob("*.log")]
    texts |= {
        str(path): path.read_text(errors="replace") for path in places if path.name != "secrets.json" and path.is_file()
    }
    for process in psutil.process_iter(["cmdline"]):
        texts[f"command line of {process.pid}"] = " ".join(process.info["cmdline"] or [])
    return [
        f"{name} is in {place}" for name, secret in hidden.items() for place, text in texts.items() if secret in text
    ]


if __name__ == "__main__":
    main()
