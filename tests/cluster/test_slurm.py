"""A job of SLURM, with stand-ins for its commands and for Ray: its nodes, its starts and ends, the batch file."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest

from aepo.errors import ResourceError
from cluster.slurm import job, node
from tests import ROOT
from tests.examples import wait_for
from tests.stand_ins import said, script
from tune.plan import STOP


def ended(process):
    process.communicate(timeout=300)
    return process.returncode


# One node


RAY = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "ray_current_cluster").write_text("10.0.0.1:4711")
print(sys.argv[2], flush=True)
time.sleep(float(sys.argv[3]))
sys.exit(7)
"""


@pytest.fixture
def private():
    """A folder for the private ones of nodes, with a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="n", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def ray_node(tmp_path, private):
    """A function that starts a node whose Ray says something and lives for so long."""
    (tmp_path / "shared").mkdir()

    def begin(said=node.STARTED, lives="60", role="head"):
        text = (
            "import sys; from pathlib import Path; from cluster.slurm import node\n"
            f"node.command = lambda role, folder, ray: [sys.executable, '-c', {RAY!r}, str(ray), {said!r}, {lives!r}]\n"
            f"sys.exit(node.main(Path({str(tmp_path / 'shared')!r}), {role!r}))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(private), "SLURMD_NODENAME": "c1"}
        return subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True)

    return begin


@pytest.mark.parametrize("how", ["file", signal.SIGTERM])
def test_a_node_leaves_nothing_whether_it_is_told_or_killed(how, ray_node, private, tmp_path):
    process, shared = ray_node(), tmp_path / "shared"
    wait_for((shared / "up-c1").exists)
    assert (shared / "address").read_text() == "10.0.0.1:4711"
    (folder,) = private.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    if how == "file":
        (shared / "end").touch()
    else:
        process.send_signal(how)
    assert ended(process) == 0
    assert not list(private.iterdir())
    assert not (shared / "private-c1").exists()


def test_a_ray_that_does_not_start_is_quoted_and_tried_again(ray_node, private):
    process = ray_node(said="no such port", lives="0")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert out.count("Ray ended on c1") == node.START_TRIES
    assert out.count("trying again") == node.START_TRIES - 1
    assert "Ray ended on c1 (exit status 7)" in out
    assert "no such port" in out
    assert not list(private.iterdir())


def test_a_ray_that_ends_later_is_not_started_again(ray_node, private):
    process = ray_node(lives="3")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert out.count("Ray ended on c1") == 1
    assert not list(private.iterdir())


def test_a_worker_waits_for_the_heads_address(ray_node, tmp_path):
    process = ray_node(role="worker")
    time.sleep(2)
    assert not list((tmp_path / "shared").iterdir())
    (tmp_path / "shared" / "address").write_text("10.0.0.1:4711")
    wait_for((tmp_path / "shared" / "up-c1").exists)
    (tmp_path / "shared" / "end").touch()
    assert ended(process) == 0


def test_what_a_killed_start_left_goes_at_the_next(tmp_path):
    left, other = tmp_path / f"{node.PREFIX}1f2e", tmp_path / "other"
    left.mkdir()
    other.mkdir()
    for folder in (left, other):
        note = tmp_path / "private-c1"
        note.write_text(str(folder))
        node.remove_left(note)
        assert not note.exists()
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize(
    ("granted", "mib"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4096),
        ({"SLURM_MEM_PER_CPU": "1500", "SLURM_CPUS_ON_NODE": "2"}, 3000),
        ({"SLURM_MEM_PER_NODE": "0"}, 10_000),
        ({}, 10_000),
    ],
)
def test_a_node_takes_the_memory_of_its_grant(granted, mib, monkeypatch):
    import psutil

    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in granted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 10_000 << 20}))
    monkeypatch.setattr(node, "_control_group_bounds", list)
    assert node.granted_memory() == mib << 20
    monkeypatch.setattr(node, "_control_group_bounds", lambda: [2000 << 20])
    assert node.granted_memory() == 2000 << 20


def test_a_nodes_command_line_has_its_share_and_no_fixed_port(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(node, "granted_memory", lambda: 4096 << 20)
    head = node.command("head", tmp_path, tmp_path / "ray")
    pairs = dict(pairwise(head))
    assert (pairs["--port"], pairs["--num-cpus"], pairs["--num-gpus"]) == ("0", "6", "1")
    assert int(pairs["--memory"]) + int(pairs["--object-store-memory"]) <= (4096 << 20) - node.RESERVED["head"]
    assert {pairs[flag] for flag in pairs if flag.endswith("port")} == {"0"}
    (tmp_path / "address").write_text("10.0.0.1:4711")
    assert "10.0.0.1:4711" in node.command("worker", tmp_path, tmp_path / "ray")
    monkeypatch.setattr(node, "granted_memory", lambda: 100 << 20)
    head = node.command("head", tmp_path, tmp_path / "ray")
    assert int(head[head.index("--memory") + 1]) == node.LEAST_MEMORY


# One start of a job


SRUN = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
open(os.environ["SAID"], "a").write("srun " + " ".join(sys.argv[1:]) + "\\n")
folder, role = Path(sys.argv[-2]), sys.argv[-1]
if os.environ.get("RAY_FAILS"):
    sys.exit(1)
time.sleep(float(os.environ.get("RAY_STARTS_IN", "0")))
(folder / "address").write_text("10.0.0.1:4711")
(folder / f"up-{{role}}").touch()
if role == "clean":
    (folder / "private-c2").unlink()
    sys.exit()
if os.environ.get("LEAVES") and role == "worker":
    (folder / "private-c2").write_text("/tmp/aepo-left")
while not (folder / "end").exists():
    time.sleep(0.05)
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$SAID"
[ "$1" = show ] && printf 'c1\\nc2\\n'
exit 0
"""
AEPO = """
import os, sys, time
from pathlib import Path
open(os.environ["SAID"], "a").write("aepo " + " ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "sweep":
    run = Path(sys.argv[sys.argv.index("--out") + 1]) / "runs" / "a"
    run.mkdir(parents=True, exist_ok=True)
    if os.environ.get("GAINS"):
        (run / "metrics.jsonl").open("a").write("{}\\n")
    end = time.monotonic() + float(os.environ.get("SWEEP_TAKES", "0"))
    while time.monotonic() < end:
        time.sleep(0.05)
        if (run.parent.parent / "STOPFILE").exists() and not os.environ.get("DEAF"):
            sys.exit(3)
""".replace("STOPFILE", STOP)


@pytest.fixture
def start(tools, tmp_path, monkeypatch):
    """A function that makes one start of job 42 and returns its exit status; what was printed is shown."""
    script(tools / "srun", SRUN)
    script(tools / "scontrol", SCONTROL)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "c[1-2]")
    monkeypatch.setenv("SLURMD_NODENAME", "c1")
    monkeypatch.setattr(job, "_AEPO", (sys.executable, "-c", AEPO))
    monkeypatch.setattr(job, "POLL_S", 0.1)
    (tmp_path / "notes").mkdir()

    def begin(limit="1:00:00", left=None, restarts="0", **variables):
        script(tools / "squeue", f"#!/bin/sh\necho '{left or limit} {limit}'\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_RESTART_COUNT", restarts)
            for name, value in variables.items():
                patch.setenv(name, value)
            try:
                return job.SweepJob(tmp_path / "notes", "mazes.toml", tmp_path / "sweep", ["--only"]).run()
            except ResourceError as error:
                return str(error)

    return begin


def test_a_job_sweeps_reports_and_leaves_nothing(start, tools, tmp_path):
    assert start() == 0
    lines = said(tools).splitlines()
    steps = [line for line in lines if line.startswith("srun")]
    assert len(steps) == 2
    assert all("--export=ALL" in line for line in steps)
    assert sum("--nodelist=c1" in line for line in steps) == sum("--exclude=c1" in line for line in steps) == 1
    sweep = tmp_path / "sweep"
    assert f"aepo sweep mazes.toml --yes --address 10.0.0.1:4711 --out {sweep} --only" in lines
    assert lines[-1] == f"aepo report {sweep}"
    assert not list(sweep.glob(".slurm-*"))
    assert "requeue" not in said(tools)


def test_what_a_killed_step_left_is_removed_by_another(start, tools):
    assert start(LEAVES="1") == 0
    (line,) = [line for line in said(tools).splitlines() if line.endswith(" clean")]
    assert "--nodelist=c2" in line


def test_the_token_is_its_users(start, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(job.SweepJob, "_run_sweep", lambda self: seen.append(self.shared) or 1)
    monkeypatch.setattr(job.shutil, "rmtree", lambda *args, **kwargs: None)
    assert start() == 1
    assert stat.S_IMODE(seen[0].stat().st_mode) == 0o700
    assert stat.S_IMODE((seen[0] / "token").stat().st_mode) == 0o600
    assert len((seen[0] / "token").read_text()) == 64


def test_a_job_whose_time_is_over_stops_and_queues_itself_again(start, tools, tmp_path, capsys):
    assert start(limit="1:00:00", left="5:02", SWEEP_TAKES="60", GAINS="1") == 3
    assert "scontrol requeue 42" in said(tools)
    assert "aepo report" not in said(tools)
    assert "the job queues itself again" in capsys.readouterr().out


def test_a_sweep_that_does_not_stop_is_killed_before_the_limit(start, tools):
    begin = time.monotonic()
    assert start(limit="1:00:00", left="14", SWEEP_TAKES="500", DEAF="1", GAINS="1") == 3
    assert "scontrol requeue 42" in said(tools)
    assert time.monotonic() - begin < 400  # it would have taken longer


def test_a_job_that_is_asked_while_it_starts_queues_itself_again(start, tools, tmp_path):
    (tmp_path / "notes" / "stop").touch()
    assert start(RAY_STARTS_IN="1") == 3
    assert "scontrol requeue 42" in said(tools)
    assert "aepo sweep" not in said(tools)


def test_starts_without_gain_are_bounded(start, tools, tmp_path, capfd):
    (tmp_path / "notes" / "stop").touch()
    assert [start(restarts=str(i)) for i in range(job.MAX_FRUITLESS)] == [*[3] * (job.MAX_FRUITLESS - 1), 1]
    assert said(tools).count("scontrol requeue") == job.MAX_FRUITLESS - 1
    assert "the time limit of 3600 s is too short for the start and the notice" in capfd.readouterr().err
    note = tmp_path / "note.json"
    counted = [job.count_fruitless(note, "1", now) for now in ((0, 0), (0, 5), (0, 5), (0, 4), (1, 0), (1, 0))]
    assert counted == [1, 0, 1, 2, 0, 1]
    assert job.count_fruitless(note, "2", (1, 0)) == 0, "another job"


def test_a_limit_of_which_the_start_takes_most_is_refused_at_first(start, tools):
    assert "the time limit of 40 s is too short: the start took" in start(
        limit="40", left="2:00:00", RAY_STARTS_IN="14"
    )
    assert "aepo sweep" not in said(tools)
    assert start(limit="40", left="2:00:00", restarts="1", RAY_STARTS_IN="14") == 0


def test_a_job_that_is_stopped_for_good_stays_so(start, tools, tmp_path, capsys):
    shared = tmp_path / "sweep" / ".slurm-42"
    shared.mkdir(parents=True)
    (shared / "stop").touch()
    assert start() == 3
    assert "requeue" not in said(tools)
    assert "stopped for good" in capsys.readouterr().out
    assert not shared.exists()


def test_a_head_that_does_not_start_is_an_error(start, tools):
    assert "Ray's head did not start" in start(RAY_FAILS="1")
    assert "requeue" not in said(tools)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("59", 59), ("03:04", 184), ("1:00:00", 3600), ("1-02:03:04", 93784), ("UNLIMITED", float("inf"))],
)
def test_the_time_that_slurm_prints_is_read(text, seconds):
    assert job.seconds_of(text) == seconds


@pytest.mark.parametrize(("limit", "notice"), [(86400, 300), (1800, 300), (600, 100), (120, 45)])
def test_the_notice_of_a_short_limit_is_shorter(limit, notice):
    assert job.Clock(0.0, limit).notice_s == notice


# The batch file


@pytest.fixture
def batch(tools, tmp_path):
    """A function that starts the batch file with a Python that is a shell script."""
    script(tools / "aepo", "#!/bin/sh\n")

    def begin(body, *words, **variables):
        script(tools / "python", f"#!/bin/sh\n{body}\n")
        environment = {**os.environ, "SLURM_JOB_ID": "42", "TMPDIR": str(tmp_path), **variables}
        file = ROOT / "cluster" / "slurm" / "sweep.sbatch"
        return subprocess.Popen(["bash", str(file), *words], env=environment, stderr=subprocess.PIPE, text=True)

    return begin


def test_the_batch_file_hands_its_words_and_the_exit_status_on(batch, tools, tmp_path):
    before = set(tmp_path.iterdir())
    process = batch('echo "$@" > "$SAID"; env >> "$SAID"; exit 5', "m.toml", "out", "--only", SLURM_EXPORT_ENV="NONE")
    assert ended(process) == 5
    assert said(tools).splitlines()[0].startswith(f"-m cluster.slurm.job {tmp_path}/")
    assert said(tools).splitlines()[0].endswith(" m.toml out --only")
    assert "SLURM_EXPORT_ENV" not in said(tools)
    assert set(tmp_path.iterdir()) == before
    assert ended(batch("exit 0", "m.toml")) == 2


def test_the_batch_file_passes_a_warning_on_and_survives_it(batch, tools):
    process = batch(
        'echo up > "$SAID"; while [ ! -e "$3/stop" ]; do sleep 0.1; done; sleep 0.5; exit 3', "m.toml", "out"
    )
    wait_for(lambda: said(tools))
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 3


def test_the_batch_file_waits_for_the_end_of_what_is_cancelled(batch, tools):
    process = batch(
        'trap "sleep 1; echo tidy >> $SAID; exit 143" TERM; echo up > "$SAID"; sleep 60 & wait', "m.toml", "out"
    )
    wait_for(lambda: said(tools))
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 143
    assert "tidy" in said(tools)


CANCELLED = """
import sys, time
from pathlib import Path
from cluster.slurm import job
job.SweepJob.run = lambda self: (self.shared / "up-c1").touch() or time.sleep(60)
sys.exit(job.main(Path("notes"), "m.toml", Path("out"), []))
"""


def test_a_cancelled_job_takes_its_token_along(tools, tmp_path):
    script(tools / "squeue", "#!/bin/sh\necho 1:00:00 1:00:00\n")
    environment = {**os.environ, "SLURM_JOB_ID": "42", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", CANCELLED], env=environment, cwd=tmp_path)
    shared = tmp_path / "out" / ".slurm-42"
    wait_for((shared / "up-c1").exists)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    assert not shared.exists()


def test_a_warning_is_trapped_before_anything_else():
    text = (ROOT / "cluster" / "slurm" / "sweep.sbatch").read_text()
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert commands[0] == "job='' warned=''"
    assert commands[1].startswith("trap ")
