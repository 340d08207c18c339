"""Jobs of SLURM as they are asked for and looked after on a login node, with stand-ins for its commands."""

import json
import subprocess
from pathlib import Path

import pytest

from aepo import cli
from aepo.errors import ConfigError, IncompleteError
from cluster.slurm import client
from cluster.slurm.allocation import Allocation
from tests.stand_ins import said, script
from tests.tables import row, write
from tune.plan import write_manifest

SBATCH = """#!/bin/sh
echo "sbatch $*" >> "$SAID"
echo PENDING > "$(dirname "$SAID")/state"
echo "$2" > "$(dirname "$SAID")/command"
echo "17;lab"
"""
LOGIN_SCONTROL = """#!/bin/sh
here=$(dirname "$SAID")
[ "$4" = '' ] && [ "$3" = 17 ] && [ -e "$here/state" ] || exit 1
echo "JobId=17 JobName=aepo-mazes"
echo "   JobState=$(cat "$here/state") Reason=Priority Dependency=(null)"
echo "   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=${EXITED:-0}:0"
echo "   StartTime=2026-01-02T03:04:05 EndTime=Unknown"
echo "   NodeList=c1"
echo "   Command=$(cat "$here/command") x y"
"""
LOGIN_SQUEUE = """#!/bin/sh
case "$*" in *states=all*) echo "17 aepo-mazes"; echo "18 other" ;; *) echo 1:02:03 ;; esac
"""


@pytest.fixture
def login(tools, monkeypatch, tmp_path):
    """SLURM's commands as on a login node, where one job may be known."""
    script(tools / "sbatch", SBATCH)
    script(tools / "scontrol", LOGIN_SCONTROL)
    script(tools / "squeue", LOGIN_SQUEUE)
    script(tools / "scancel", '#!/bin/sh\necho "scancel $*" >> "$SAID"; echo CANCELLED > "$(dirname "$SAID")/state"\n')
    monkeypatch.setattr(client, "POLL_S", 0.05)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mazes.toml").write_text('task = ["maze2d-umaze"]\nout = "sweeps/mazes"\n')
    return lambda word: (tools / "state").write_text(word)


SUBMIT = ["submit", "mazes.toml", "--slurm", "--detach", "--json", "--nodes", "3"]


def test_a_sweep_is_submitted_once_and_joined(login, tools, tmp_path, capsys):
    assert cli.run([*SUBMIT, "--partition", "gpu", "--retry-failed"]) == 0
    out, messages = capsys.readouterr()
    found = json.loads(out)
    sweep = tmp_path / "sweeps" / "mazes"
    assert (found["job"], found["state"], found["sweep"]) == ("17", "PENDING", str(sweep))
    assert "submitted job 17: 1 runs" in messages
    assert said(tools) == f"sbatch --parsable {sweep}/sweep.sbatch {sweep}/slurm-sweep.toml {sweep} --retry-failed\n"
    lines = (sweep / "sweep.sbatch").read_text().splitlines()
    assert {"#SBATCH --nodes=3", "#SBATCH --partition=gpu", "#SBATCH --mem=16G", "#SBATCH --requeue"} <= set(lines)
    assert not any("mem-per-cpu" in line for line in lines)
    assert subprocess.run(["bash", "-n", sweep / "sweep.sbatch"], check=False).returncode == 0
    assert cli.run(SUBMIT) == 0
    assert "joined job 17" in capsys.readouterr().err
    assert said(tools).count("sbatch --parsable") == 1
    (tmp_path / "mazes.toml").write_text('task = ["maze2d-open"]\nout = "sweeps/mazes"\n')
    assert cli.run(SUBMIT) == 6
    assert "another plan" in capsys.readouterr().err
    login("COMPLETED")
    assert cli.run(SUBMIT) == 0
    assert said(tools).count("sbatch --parsable") == 2


def test_jobs_of_slurm_are_listed_shown_and_stopped(login, tools, tmp_path, capsys):
    assert cli.run(SUBMIT) == 0
    capsys.readouterr()
    login("RUNNING")
    assert cli.run(["jobs", "list", "--slurm", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["job"], row["state"], row["restarts"], row["time_left"]) == ("17", "RUNNING", 2, "1:02:03")
    for name in ("17", "sweeps/mazes"):
        assert cli.run(["jobs", "status", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [row]
    shared = tmp_path / "sweeps" / "mazes" / ".slurm-17"
    shared.mkdir()
    assert cli.run(["jobs", "stop", "17", "--timeout-s", "0.3"]) == 0
    assert (shared / "stop").exists()
    assert "scancel 17" in said(tools)
    assert client.find("17").state == "CANCELLED"


def test_a_log_is_shown_to_the_jobs_end(login, tools, tmp_path, capsys, monkeypatch):
    assert cli.run(SUBMIT) == 0
    capsys.readouterr()
    (tmp_path / "sweeps" / "mazes" / "slurm-17.log").write_text("one\ntwo\nth")
    login("FAILED")
    monkeypatch.setenv("EXITED", "4")
    assert cli.run(["jobs", "logs", "17"]) == 4
    assert capsys.readouterr().out == "one\ntwo\nth\n"


def test_a_table_is_fetched_and_reported(login, tmp_path, capsys):
    assert cli.run(SUBMIT) == 0
    assert cli.run(["jobs", "fetch", "17"]) == 3
    assert "lacks runs.parquet, sweep.json" in capsys.readouterr().err.replace("\n", " ")
    write(tmp_path / "sweeps" / "mazes", row(seed=0), row(seed=1))
    write_manifest(tmp_path / "sweeps" / "mazes", [])
    login("COMPLETED")
    assert cli.run(["jobs", "fetch", "sweeps/mazes", "--out", "home"]) == 0, capsys.readouterr().err
    assert (tmp_path / "home" / "report" / "report.html").exists()


def test_without_slurm_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("mazes.toml").write_text('task = ["maze2d-umaze"]\nout = "sweeps/mazes"\n')
    assert cli.run(SUBMIT) == 6
    assert "no sbatch on PATH" in capsys.readouterr().err
    assert cli.run(["jobs", "status", "17"]) == 6
    assert not Path("sweeps").exists()
    assert cli.run(["submit", "mazes.toml", "--nodes", "3"]) == 2
    assert cli.run([*SUBMIT, "--places", "3"]) == 2


def test_a_job_that_is_none_of_ours_is_refused(login):
    with pytest.raises(IncompleteError, match="knows no job 18"):
        client.find("18")
    with pytest.raises(IncompleteError, match="neither a job's number nor"):
        client.find("sweeps/none")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:00", 1800),
        ("2-00", 172800),
        ("1-02:03", 93780),
        ("24:00:00", 86400),
        ("infinite", float("inf")),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert client.limit_s(text) == seconds


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"time": "soon"}, "--time wants"),
        ({"time": "2"}, "is 120 s"),
        ({"nodes": 0}, "at least 1"),
        ({"sbatch": ("--qos long",)}, "without dashes"),
        ({"sbatch": ("qos=long\nrm",)}, "without dashes"),
    ],
)
def test_an_allocation_that_makes_no_sense_is_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        client.batch_lines(Allocation(**asked), Path("/s/mazes"))


def test_any_flag_of_sbatch_may_be_given():
    asked = Allocation(sbatch=("qos=long", "exclusive", "mem=0", "comment=two words"), gpus_per_node=2)
    lines = client.batch_lines(asked, Path("/s/my mazes"))
    assert {"#SBATCH --qos=long", "#SBATCH --exclusive", "#SBATCH --mem=0"} <= set(lines)
    assert {'#SBATCH --comment="two words"', "#SBATCH --gpus-per-node=2"} <= set(lines)
    assert '#SBATCH --output="/s/my mazes/slurm-%j.log"' in lines
    assert "#SBATCH --job-name=aepo-my-mazes" in lines
