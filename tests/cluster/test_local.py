"""A cluster on this machine, jobs on it, and the judgement of a cluster's doctor."""

import contextlib
import dataclasses
import json
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from aepo.errors import ConfigError, DataError, ResourceError
from aepo.runs import rundir
from cluster import fitness, jobs, local, processes
from cluster.local import LocalCluster
from cluster.processes import Process
from tests import ROOT
from tests.examples import wait_for
from tune.plan import make_plan
from tune.spec import Execution, SweepSpec

# Places


def test_nodes_of_one_machine_share_no_device(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [local.devices_of_node(number, 2) for number in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-1f2e,7")
    assert [local.devices_of_node(number, 1) for number in range(3)] == ["5", "GPU-1f2e", "7"]
    with pytest.raises(ResourceError, match="offer 4 GPUs, CUDA_VISIBLE_DEVICES='5, GPU-1f2e,7' has 3"):
        local.devices_of_node(1, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.devices_of_node(1, 0) == ""
    with pytest.raises(ResourceError, match="has 0"):
        local.devices_of_node(0, 1)


def test_a_taken_port_is_replaced_by_a_free_one():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        found = local._free_ports({"a": taken})
        assert found["a"] != taken
        with socket.socket() as other:
            other.bind(("127.0.0.1", found["a"]))


# State


def write_state(folder, **changes):
    state = {
        "boot": local._boot(),
        "nodes": 1,
        "cpus": 1,
        "gpus": 0,
        "memory": 1,
        "temp": str(folder / "ray"),
        "ports": {"postgres": 1, "mlflow": 2, "gcs": 3, "dashboard": 4},
        "services": {},
    } | changes
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state))
    return LocalCluster(folder)


def start(*words):
    process = subprocess.Popen(words, start_new_session=True)
    return process, Process(process.pid, processes.start_ticks(process.pid))


def test_the_state_of_another_boot_names_no_processes(tmp_path):
    process, leader = start("sleep", "300")
    services = {"ray-head": {"pid": leader.pid, "ticks": leader.ticks}}
    cluster = write_state(tmp_path / "cluster", services=services, boot="another")
    assert {status.state for status in cluster.status()} == {"down"}
    assert cluster.down() == []
    assert process.poll() is None
    assert cluster.state() is None
    process.kill()
    process.wait()


def test_a_torn_state_is_said_to_be_one(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ResourceError, match="not a cluster's state"):
        LocalCluster(tmp_path).state()


def test_two_commands_do_not_work_on_one_cluster_at_once(tmp_path):
    cluster = LocalCluster(tmp_path)
    with cluster._lock(), pytest.raises(ResourceError, match="another"):
        LocalCluster(tmp_path).down()


def test_secrets_are_long_kept_and_readable_by_the_owner_only(tmp_path):
    hidden = LocalCluster(tmp_path).secrets()
    assert hidden == LocalCluster(tmp_path).secrets()
    assert all(len(value) == 64 for value in hidden.values())
    assert len(set(hidden.values())) == len(hidden)
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


def test_a_machine_without_postgresql_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(local.Path, "glob", lambda self, pattern: [])
    with pytest.raises(ResourceError, match="apt-get install postgresql"):
        local.postgres_programs()


# What is packed


def test_packed_code_runs_and_holds_neither_data_nor_history_nor_secrets(tmp_path):
    file = tmp_path / "mazes.toml"
    file.write_text('task = ["maze2d-umaze"]\n')
    inside = ROOT / "cluster" / "secrets.json"
    assert not inside.exists()
    inside.write_text("{}")
    try:
        with jobs.pack(file) as folder:
            names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            code = "import aepo.runs.rundir as r, cluster, tune.commands, analysis; print(r.__file__, r.commit())"
            ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
            where, _, commit = ran.stdout.strip().partition(" ")
            assert where == str(folder / "aepo" / "runs" / "rundir.py")
            assert commit == str(rundir.commit())
    finally:
        inside.unlink()
    assert {"sweep.toml", "COMMIT", "aepo/tasks.csv", "tune/sweep.py", "cluster/mlflow-auth.ini"} <= names
    kinds = {Path(name).suffix or name for name in names}
    assert kinds == {".py", ".csv", ".ini", ".typed", ".toml", "COMMIT"}
    assert not folder.exists()


@pytest.mark.parametrize(
    ("out", "wanted"),
    [("sweeps/mazes", "${AEPO_STORAGE}/sweeps/mazes"), ("/shared/a b", "/shared/a b"), ("x;y", "${AEPO_STORAGE}/x;y")],
)
def test_a_folder_on_the_cluster_is_below_its_storage_and_quoted_for_the_shell(out, wanted, tmp_path):
    assert jobs.remote_folder(Path(out)) == wanted
    command = f"printf %s {jobs._quoted(wanted)}"
    said = subprocess.run(
        ["sh", "-c", command], env={"AEPO_STORAGE": "/s t"}, capture_output=True, text=True, check=True
    )
    assert said.stdout == wanted.replace("${AEPO_STORAGE}", "/s t")
    if "$" in wanted:
        unset = subprocess.run(["sh", "-c", command], env={}, capture_output=True, text=True, check=False)
        assert unset.returncode != 0
        assert "AEPO_STORAGE is not set" in unset.stderr


@pytest.mark.parametrize("out", ["../elsewhere", "a/../../b", "/shared/../etc", ".."])
def test_a_folder_that_leads_out_of_the_storage_is_refused(out):
    with pytest.raises(ConfigError, match=r"\.\."):
        jobs.remote_folder(Path(out))


# Jobs, of a server that is only made up


@dataclasses.dataclass
class Details:
    submission_id: str
    status: object
    metadata: dict
    start_time: int | None = 1_000
    end_time: int | None = None
    driver_exit_code: int | None = None


class Server:
    """Keeps what was submitted, and refuses a number twice as Ray does."""

    def __init__(self):
        self.jobs, self.entrypoints, self.packed = {}, [], []

    def list_jobs(self):
        return list(self.jobs.values())

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata=None):
        from ray.job_submission import JobStatus

        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        assert set(runtime_env) == {"working_dir"}
        self.entrypoints.append(entrypoint)
        self.packed.append(sorted(path.name for path in Path(runtime_env["working_dir"]).iterdir()))
        self.jobs[submission_id] = Details(submission_id, JobStatus.RUNNING, metadata or {})

    def end(self, name, status="FAILED"):
        from ray.job_submission import JobStatus

        self.jobs[name].status = JobStatus(status)


@pytest.fixture
def sweep_file(tmp_path):
    file = tmp_path / "mazes.toml"
    file.write_text('task = ["maze2d-umaze"]\nout = "sweeps/mazes"\n')
    return file


def submit(server, file, seeds=(0,), **changes):
    plan = make_plan(SweepSpec(task=("maze2d-umaze",), seeds=seeds))
    return jobs.submit(server, file, Execution(out=Path("sweeps/mazes"), **changes), plan)


def test_the_same_sweep_joins_while_it_runs_and_goes_on_after_its_end(sweep_file):
    server = Server()
    first = submit(server, sweep_file)
    assert first[1]
    assert submit(server, sweep_file) == (first[0], False)
    assert len(server.entrypoints) == 1
    server.end(first[0])
    second = submit(server, sweep_file)
    assert second == (first[0].removesuffix("-1") + "-2", True)
    assert submit(server, sweep_file) == (second[0], False)
    server.end(second[0], "SUCCEEDED")
    for attempt in range(3, 12):  # text would sort -10 before -9
        name, _ = submit(server, sweep_file)
        assert name.endswith(f"-{attempt}")
        server.end(name)


def test_of_two_that_submit_at_the_same_time_one_joins(sweep_file, monkeypatch):
    server = Server()
    name, _ = submit(server, sweep_file)
    monkeypatch.setattr(server, "list_jobs", lambda: [])  # the second looked before the first was there
    assert submit(server, sweep_file) == (name, False)


def test_another_plan_in_the_folder_of_a_running_sweep_is_refused(sweep_file):
    server = Server()
    submit(server, sweep_file)
    with pytest.raises(ResourceError, match="another plan"):
        submit(server, sweep_file, seeds=(0, 1))


def test_a_password_never_becomes_part_of_a_job(sweep_file):
    server = Server()
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME"):
        submit(server, sweep_file, tracking_uri="http://me:geheim@host:5000")
    assert not server.jobs


def test_the_job_runs_the_sweep_file_below_the_storage_of_the_cluster(sweep_file):
    server = Server()
    name, _ = submit(server, sweep_file, retry_failed=True)
    (entrypoint,) = server.entrypoints
    assert entrypoint.startswith("python -m aepo sweep sweep.toml --yes --address auto --retry-failed --out ")
    assert entrypoint.endswith("/sweeps/mazes")
    assert server.packed[0] == ["COMMIT", "aepo", "analysis", "cluster", "sweep.toml", "tune"]
    job = jobs.find(server, "sweeps/mazes")
    assert (job.job, job.attempt, job.status) == (name, 1, "RUNNING")


def test_room_is_asked_for_before_the_sweep(sweep_file):
    from cluster.reserve import fitting

    server = Server()
    execution = Execution(out=Path("sweeps/mazes"), gpus=0.25)
    jobs.submit(server, sweep_file, execution, make_plan(SweepSpec(task=("maze2d-umaze",))), places=8)
    assert server.entrypoints[0].startswith("python -m cluster.reserve 8 1 0.25 && python -m aepo sweep ")
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 16.0}},
        {"Alive": False, "Resources": {"CPU": 16.0, "GPU": 8.0}},
    ]
    assert fitting(nodes, 1.0, 0.25) == 4 + 2
    assert fitting(nodes, 1.0, 0.0) == 4 + 2 + 16
    assert fitting(nodes, 3.0, 0.0) == 1 + 0 + 5


def test_a_log_is_written_once_though_the_connection_breaks(monkeypatch):
    text, calls, written = "one\ntwo\nthree\n", [], []

    class Client(Server):
        async def tail_job_logs(self, name):
            calls.append(name)
            if len(calls) == 1:
                yield text[:6]
                raise RuntimeError("WebSocket closed")
            if len(calls) == 2:
                raise OSError("refused")
            for start in range(0, len(text), 4):
                yield text[start : start + 4]
            self.end("aepo-x-1", "SUCCEEDED")

        def get_job_logs(self, name):
            return text + "end\n"

    server = Client()
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    server.submit_job(entrypoint="", submission_id="aepo-x-1", runtime_env={"working_dir": "."}, metadata={"out": "x"})
    assert jobs.follow(server, "aepo-x-1", written.append).status == "SUCCEEDED"
    assert "".join(written) == text + "end\n"


def test_what_is_fetched_must_arrive_whole(monkeypatch, tmp_path):
    from cluster.send import SENT

    job = jobs.Job("aepo-x-1", "x", 1, "SUCCEEDED", "", "", 0, "/x", "")
    sent = subprocess.run(
        [sys.executable, "-m", "cluster.send", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert sent == ""  # nothing there yet
    for name in ("runs.parquet", "sweep.json", "other"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    sent = subprocess.run(
        [sys.executable, "-m", "cluster.send", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "other" not in sent
    home = tmp_path / "home"
    monkeypatch.setattr(jobs, "run_helper", lambda *_, **__: f"noise\n{sent}noise\n")
    assert jobs.fetch(None, job, home) == ["runs.parquet", "sweep.json"]
    assert (home / "runs.parquet").read_bytes() == b"runs.parquet" * 1000
    damaged = sent.replace(sent.split()[-1], sent.split()[-1][:-8])
    for answer in (damaged, "", sent.replace("sweep.json", "../sweep.json"), sent.replace(SENT, "x", 1)):
        monkeypatch.setattr(jobs, "run_helper", lambda *_, answer=answer, **__: answer)
        with pytest.raises(DataError):
            jobs.fetch(None, job, home)
    assert sorted(path.name for path in home.iterdir()) == ["runs.parquet", "sweep.json"]


# Doctor


def node(name, **changes):
    facts = {
        "node": name,
        "ray_gpus": 0,
        "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"},
        "storage": {"path": "/shared", "sees": True, "writes": ""},
        "tracking": {"uri": "http://mlflow:5000", "status": 200, "open": False},
        "data": ["a/b-v0", "c/d-v0"],
        "gpus": {"torch": 0},
        "disk": {"/tmp": 50.0, "/shared": 800.0},
        "ports": [],
        "addresses": ["127.0.0.1", "10.0.0.1"],
        "clock_s": 0.01,
        "clock_error_s": 0.005,
    }
    return facts | changes


def judged(*nodes, asks_token=True, datasets=()):
    return {check.check: check for check in fitness.judge(nodes, asks_token=asks_token, datasets=datasets)}


def test_a_cluster_in_order_passes():
    checks = judged(node("head"), node("one"), datasets=["a/b-v0"])
    assert {check.status for check in checks.values()} == {"pass"}
    assert not any(check.remedy for check in checks.values())
    assert "data a/b-v0" in checks


@pytest.mark.parametrize(
    ("changes", "check", "status", "said"),
    [
        ({"error": "GetTimeoutError: no answer"}, "nodes", "fail", "one: GetTimeoutError"),
        (
            {"versions": {"python": "3.12.1", "ray": "2.60.0", "torch": "2.13.0"}},
            "versions",
            "fail",
            "3.11.7 and 3.12.1",
        ),
        ({"storage": {"path": "/shared", "sees": False, "writes": ""}}, "storage", "fail", "does not show"),
        (
            {"storage": {"path": "/shared", "sees": True, "writes": "Read-only file system"}},
            "storage",
            "fail",
            "Read-only",
        ),
        ({"tracking": {"uri": "http://mlflow:5000", "status": 403, "open": None}}, "tracking", "fail", "403"),
        (
            {"tracking": {"uri": "http://mlflow:5000", "status": 200, "open": True}},
            "tracking password",
            "warn",
            "without",
        ),
        ({"data": ["c/d-v0"]}, "data a/b-v0", "fail", "one: missing"),
        ({"ray_gpus": 1}, "gpus", "fail", "torch sees 0, Ray offers 1"),
        ({"clock_s": -5.0}, "clocks", "warn", "5.0 s"),
        ({"clock_s": 300.0}, "clocks", "fail", "300.0 s"),
        ({"disk": {"/tmp": 1.5}}, "disk", "warn", "/tmp 1.5 GiB"),
        ({"ports": ["raylet 4711"], "addresses": ["8.8.8.8"]}, "open ports", "warn", "raylet 4711 on 8.8.8.8"),
    ],
)
def test_a_fault_of_one_node_is_found_with_its_remedy(changes, check, status, said):
    checks = judged(node("head"), node("one", **changes), datasets=["a/b-v0"])
    found = checks[check]
    assert (found.status, bool(found.remedy)) == (status, True)
    assert said in found.found
    others = {name for name, other in checks.items() if other.status != "pass" and name != check}
    assert not others


def test_a_slow_network_is_no_wrong_clock():
    assert judged(node("head"), node("one", clock_s=4.0, clock_error_s=3.5))["clocks"].status == "pass"


def test_no_token_is_a_warning_on_loopback_and_a_failure_where_others_reach_it():
    assert judged(node("head"), asks_token=False)["token"].status == "warn"
    inside = judged(node("head", ports=["gcs_server 6379"]), asks_token=False)
    assert inside["token"].status == "fail"
    assert inside["open ports"].status == "pass"
    outside = judged(node("head", ports=["gcs_server 6379"], addresses=["8.8.8.8"]), asks_token=False)
    assert outside["open ports"].status == "fail"


# The whole, on this machine


@pytest.mark.ray
def test_everything_listens_on_this_machine_only(machine):
    cluster, state, _ = machine
    services = [Process(entry["pid"], entry["ticks"]) for entry in state["services"].values()]
    pids = {member.pid for service in services for member in processes.process_tree(service)}
    found = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in pids]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in found} == {"127.0.0.1"}
    assert set(state["ports"].values()) <= {c.laddr.port for c in found}
    for name in ("state.json", "secrets.json", "token", "env"):
        assert stat.S_IMODE((cluster.folder / name).stat().st_mode) == 0o600
    lines = " ".join(
        word
        for process in psutil.process_iter(["pid", "cmdline"])
        if process.pid in pids
        for word in process.info["cmdline"] or []
    )  # some of Ray's come and go
    assert not [name for name, secret in cluster.secrets().items() if secret in lines]


@pytest.mark.ray
def test_without_the_token_or_the_password_nothing_answers(machine):
    import requests

    cluster, state, aepo = machine
    head = cluster.dashboard()
    for path in ("/api/jobs/", "/api/version", "/api/v0/nodes", "/nodes?view=summary", "/api/cluster_status"):
        assert requests.get(head + path, timeout=10).status_code == 401
        assert requests.get(head + path, timeout=10, headers={"Authorization": "Bearer wrong"}).status_code == 403
    assert requests.post(f"{head}/api/jobs/", json={"entrypoint": "true"}, timeout=10).status_code == 401
    assert "refuses the token" in aepo("jobs", "list", status=6, RAY_AUTH_TOKEN="wrong", RAY_AUTH_TOKEN_PATH="").stderr
    mlflow = f"http://127.0.0.1:{state['ports']['mlflow']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    hidden = cluster.secrets()
    answers = [
        requests.get(mlflow, auth=auth, timeout=10).status_code
        for auth in (None, ("admin", "wrong"), ("admin", "password1234"), ("admin", hidden["mlflow_password"]))
    ]
    assert answers == [401, 401, 401, 200]
    import psycopg

    port = state["ports"]["postgres"]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(host="127.0.0.1", port=port, user="mlflow", password="wrong", dbname="mlflow")


@pytest.mark.ray
def test_a_second_up_starts_only_what_died(machine):
    cluster, state, aepo = machine
    flags = ("cluster", "up", "--local", "--nodes", "2", "--folder", cluster.folder)
    assert "up already" in aepo(*flags).stderr
    assert "aepo cluster down" in aepo(*flags[:4], "3", *flags[5:], status=6).stderr
    victim = psutil.Process(state["services"]["ray-worker-1"]["pid"])
    for process in [*victim.children(recursive=True), victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_for(lambda: [s.state for s in cluster.status()] == ["up", "up", "up", "down"], 30)
    aepo("cluster", "status", "--folder", cluster.folder, status=6)
    aepo(*flags)
    rows = json.loads(aepo("cluster", "status", "--folder", cluster.folder, "--json").stdout)
    assert {row["state"] for row in rows} == {"up"}
    now = cluster.state()["services"]
    assert {name for name in now if now[name] != state["services"][name]} == {"ray-worker-1"}


def documented():
    """The commands of the README and of docs/cluster.md that want a cluster of Ray's, without comments."""
    found = []
    for page in (ROOT / "README.md", ROOT / "docs" / "cluster.md"):
        inside = False
        text = re.sub(r"\n## SLURM\n.*?(?=\n## |\Z)", "", page.read_text(), flags=re.DOTALL)  # see test_slurm_client.py
        for line in text.splitlines():
            inside = inside != line.startswith("```")
            if inside and "--slurm" not in line and line.startswith(("aepo cluster", "aepo submit", "aepo jobs")):
                found.append(line.partition("#")[0].split()[1:])
    return found


def test_the_pages_name_every_command_of_a_cluster():
    names = {tuple(words[:2]) if words[0] != "submit" else ("submit",) for words in documented()}
    jobs_of = {("jobs", name) for name in ("list", "status", "logs", "stop", "fetch")}
    assert names == {("cluster", name) for name in ("up", "down", "status", "doctor")} | jobs_of | {("submit",)}


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_by_the_documented_commands(machine):
    cluster, _, aepo = machine
    text = 'task = ["maze2d-open"]\npreset = ["smoke"]\nout = "sweeps/mazes"\nrunner = "inline"\n[set]\n'
    for stage in ("behavior", "critic", "energy"):
        text += f"{stage}.steps = 400\n{stage}.batch_size = 16\n{stage}.hidden_size = 16\n"
    (cluster.folder.parent / "mazes.toml").write_text(text)
    started = json.loads(aepo("submit", "mazes.toml", "--detach", "--json").stdout)
    lines, ran = documented(), {}
    first = lines.index(["cluster", "up", "--local", "--nodes", "2"])
    for words in lines[first:]:
        if words != ["cluster", "down"] and tuple(words) not in ran:  # some stand on both pages
            as_json = ["--json"] if words[1] in ("doctor", "list") else []
            ran[tuple(words)] = aepo(*words, *as_json, AEPO_CLUSTER_FOLDER=str(cluster.folder))

    found = {check["check"]: check for check in json.loads(ran["cluster", "doctor", "mazes.toml"].stdout)}
    assert {check["status"] for name, check in found.items() if name != "disk"} == {"pass"}
    assert found["nodes"]["found"] == "2 answer"
    assert found["open ports"]["found"] == "all on loopback"
    assert "data local/maze2d/open-v0" in found

    assert f"joined {started['job']}" in ran["submit", "mazes.toml"].stderr
    assert "1 runs planned" in ran["submit", "mazes.toml"].stderr
    (job,) = json.loads(ran["jobs", "list"].stdout)
    assert (job["job"], job["status"], job["exit_status"]) == (started["job"], "SUCCEEDED", 0)
    home, folder = (path / "sweeps" / "mazes" for path in (cluster.folder.parent, cluster.folder / "storage"))
    assert "maze2d-open" in ran["jobs", "fetch", "sweeps/mazes"].stdout
    assert (home / "report" / "report.md").exists()
    assert (home / "runs.parquet").read_bytes() == (folder / "runs.parquet").read_bytes()

    assert "1 ended, 0 to do" in aepo("submit", "mazes.toml").stderr  # a new attempt, in which nothing is left to do
    assert sum(path.read_text().count(" starts ") for path in folder.glob("runs/*/log.txt")) == 1
    seen = ran["jobs", "list"].stdout + ran["jobs", "logs", "sweeps/mazes"].stdout
    seen += "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())
    assert not [name for name, secret in cluster.secrets().items() if secret in seen]


def test_a_service_that_does_not_come_up_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    cluster = LocalCluster(tmp_path / "cluster")
    words = ["sh", "-c", "echo the disk is full; exit 3"]
    monkeypatch.setattr(LocalCluster, "_command", lambda *_: (words, {}, None))
    with pytest.raises(ResourceError, match=r"(?s)postgres ended while it started.*the disk is full"):
        cluster.up(nodes=1, cpus=1, gpus=0)
    assert cluster.state() is None
    assert not processes.marked_processes(local.MARK, str(cluster.folder))
