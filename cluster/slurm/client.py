"""Jobs of SLURM from where SLURM's commands are, a login node: submitted, listed, followed, stopped, fetched.

A job is known by its number, or by the folder of its sweep, which all nodes see; JOB_FILE in it says which job it is.
The batch file that ran stands beside it, with the sweep file as it was when the job was submitted.
"""

import dataclasses
import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aepo import files
from aepo.documents import parse_json
from aepo.errors import ConfigError, IncompleteError, ResourceError
from cluster.slurm.allocation import Allocation
from cluster.slurm.job import STOPPED, seconds_of

JOB_FILE = "slurm.json"
BATCH_FILE = "sweep.sbatch"
TEMPLATE = Path(__file__).with_name(BATCH_FILE)
LEAST_TIME_S = 180.0
"""A shorter job would do little but start and stop."""
QUEUED = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "STOPPED", "RESIZING")
POLL_S = 2.0


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """A job of SLURM that carries a sweep out."""

    job: str
    sweep: str
    """Its folder."""
    state: str
    """SLURM's word, as PENDING or COMPLETED; UNKNOWN if SLURM has forgotten the job."""
    restarts: int
    started: str
    time_left: str
    exit_status: int | None
    reason: str
    """Why it waits, or where it runs."""
    log: str

    @property
    def is_over(self) -> bool:
        """Whether it neither waits nor runs."""
        return self.state not in QUEUED


def batch_lines(allocation: Allocation, sweep: Path) -> list[str]:
    """Return the #SBATCH lines of a job.

    Raises:
        ConfigError: for a number or time that SLURM would not take, or one that is too short.
    """
    if min(allocation.nodes, allocation.cpus_per_node) < 1 or allocation.gpus_per_node < 0:
        raise ConfigError("--nodes and --cpus-per-node must be at least 1, --gpus-per-node not below 0")
    seconds = limit_s(allocation.time)
    if seconds < LEAST_TIME_S:
        raise ConfigError(
            f"--time {allocation.time} is {seconds:g} s: start, notice and end of a job take that; wanted: "
            f"{LEAST_TIME_S:g} s or more, 30 minutes to be worth it"
        )
    words = {
        "job-name": f"aepo-{re.sub(r'[^A-Za-z0-9_.]', '-', sweep.name)}",
        "nodes": str(allocation.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(allocation.cpus_per_node),
        "mem": allocation.memory_per_node or f"{2 * allocation.cpus_per_node}G",
        "time": allocation.time,
        "output": f"{_escaped(sweep)}/slurm-%j.log",
        "open-mode": "append",
        "requeue": "",
        "partition": allocation.partition,
        "account": allocation.account,
        "gpus-per-node": str(allocation.gpus_per_node or ""),
    }
    bare = {"requeue"}
    for flag in allocation.sbatch:
        name, _, value = flag.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or re.search(r"[\n\r]", value):
            raise ConfigError(f"--sbatch wants a long flag of sbatch without dashes, as qos=long; got {flag!r}")
        words[name] = value
        bare |= {name} if not value else set()
    shown = {name: value for name, value in words.items() if value or name in bare}
    return [f"#SBATCH --{name}{'=' if value else ''}{_quoted(value)}" for name, value in shown.items()]


def limit_s(text: str) -> float:
    """Return a time limit in any of sbatch's forms, in seconds.

    Raises:
        ConfigError: if it is in none.
    """
    if found := re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, hours, minutes, seconds = (int(word or 0) for word in found.groups())
        return 86400 * days + 3600 * hours + 60 * minutes + seconds
    value = 60.0 * int(text) if text.isdigit() else seconds_of(text)
    if value == float("inf") and text.upper() not in ("UNLIMITED", "INFINITE"):
        raise ConfigError(f"--time wants MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS; got {text!r}")
    return value


def batch_file(allocation: Allocation, sweep: Path) -> str:
    """Return the batch file of a job: that of this package, with other #SBATCH lines and this environment."""
    text = TEMPLATE.read_text()
    head, body = re.split(r"(?:^#SBATCH .*\n)+", text, maxsplit=1, flags=re.MULTILINE)
    lines = "\n".join(batch_lines(allocation, sweep))
    return f"{head}{lines}\nAEPO_VENV=${{AEPO_VENV:-{shlex.quote(sys.prefix)}}}\n{body}"


def submit(
    file: Path, sweep: Path, allocation: Allocation, *, flags: Sequence[str], plan: str
) -> tuple["SlurmJob", bool]:
    """Return the job that carries a sweep out, and whether it is a new one; one that waits or runs is joined.

    Args:
        file: sweep file, which is copied.
        sweep: folder, which the nodes see.
        allocation: what is asked for.
        flags: of `aepo sweep`.
        plan: digest of the planned runs.

    Raises:
        ResourceError: if SLURM's commands are not here or refuse the job, or another plan waits or runs in the folder.
    """
    sweep = sweep.resolve()
    lines = batch_file(allocation, sweep)
    _tool("sbatch")
    if (sweep / JOB_FILE).exists():
        last = find(str(sweep))
        if not last.is_over:
            if _note(sweep).get("plan") != plan:
                raise ResourceError(f"job {last.job} carries out another plan in {sweep}; aepo jobs stop {last.job}")
            return last, False
    sweep.mkdir(parents=True, exist_ok=True)
    copy = sweep / f"slurm-sweep{file.suffix}"
    files.write_atomically(copy, file.read_bytes())
    files.write_atomically(sweep / BATCH_FILE, lines.encode())
    words = ["sbatch", "--parsable", str(sweep / BATCH_FILE), str(copy), str(sweep), *flags]
    number = _ask(*words).strip().partition(";")[0]
    note = {"job": number, "plan": plan, "log": str(sweep / f"slurm-{number}.log"), "submitted": time.strftime("%F %T")}
    files.write_json(sweep / JOB_FILE, note)
    return find(number), True


def is_slurm(name: str) -> bool:
    """Return whether a name is that of a job of SLURM: a number, or a folder with a job's note."""
    return name.isdigit() or (Path(name) / JOB_FILE).exists()


def find(name: str) -> SlurmJob:
    """Return a job by its number or its sweep's folder.

    Raises:
        IncompleteError: if there is none of ours.
        ResourceError: if SLURM's commands are not here.
    """
    number = name if name.isdigit() else str(_note(Path(name)).get("job", ""))
    if not number:
        raise IncompleteError(f"{name} is neither a job's number nor the folder of a sweep that SLURM has run")
    fields = _fields(number)
    command = shlex.split(fields.get("Command", ""))
    sweep = Path(command[0]).parent if command else Path(name)
    if name.isdigit() and not (sweep / JOB_FILE).exists():
        raise IncompleteError(f"SLURM knows no job {name} of `aepo submit --slurm`; its sweep's folder may be given")
    return _job(number, fields, sweep.resolve())


def listed() -> list[SlurmJob]:
    """Return this user's jobs that wait or run, or have ended so lately that SLURM still knows them.

    Raises:
        ResourceError: if SLURM's commands are not here.
    """
    found = _ask("squeue", "--noheader", "--user", getpass.getuser(), "--states=all", "--format=%i %j").splitlines()
    jobs = []
    for number, _, name in (line.strip().partition(" ") for line in found):
        if name.startswith("aepo-"):
            fields = _fields(number)
            command = shlex.split(fields.get("Command", ""))
            if command and (Path(command[0]).parent / JOB_FILE).exists():
                jobs.append(_job(number, fields, Path(command[0]).parent))
    return sorted(jobs, key=lambda job: int(job.job))


def follow(job: SlurmJob, write: Callable[[str], object]) -> SlurmJob:
    """Write a job's log as it grows, over its restarts, until the job ends."""
    position = 0
    while True:
        job = find(job.sweep)
        if Path(job.log).exists():
            with Path(job.log).open("rb") as file:
                file.seek(position)
                text = file.read()
            whole = len(text) if job.is_over else text.rfind(b"\n") + 1
            if whole:
                write(text[:whole].decode(errors="replace"))
                position += whole
        if job.is_over:
            return job
        time.sleep(POLL_S)


def stop(job: SlurmJob, *, timeout_s: float) -> None:
    """Have every run store a checkpoint and the job end; cancel one that waits, or has not ended after a while."""
    shared = Path(job.sweep) / f".slurm-{job.job}"
    if job.state == "RUNNING" and timeout_s > 0 and shared.is_dir():
        (shared / STOPPED).touch()
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if find(job.sweep).is_over:
                return
            time.sleep(POLL_S)
    if not find(job.sweep).is_over:
        _ask("scancel", job.job)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and not find(job.sweep).is_over:
            time.sleep(POLL_S)


def fetch(job: SlurmJob, home: Path) -> list[str]:
    """Copy a sweep's table and manifest into a folder, unless that is the sweep's own; return their names.

    Raises:
        IncompleteError: if the sweep has no table yet.
    """
    names = ["runs.parquet", "sweep.json"]
    if missing := [name for name in names if not (Path(job.sweep) / name).is_file()]:
        raise IncompleteError(f"{job.sweep} lacks {', '.join(missing)}; has the job begun? It is {job.state}")
    if home.resolve() != Path(job.sweep):
        home.mkdir(parents=True, exist_ok=True)
        for name in names:
            files.write_atomically(home / name, (Path(job.sweep) / name).read_bytes())
    return names


def _job(number: str, fields: dict[str, str], sweep: Path) -> SlurmJob:
    code = fields.get("ExitCode", "").partition(":")[0]
    state = fields.get("JobState", "UNKNOWN")
    left = ""
    if state == "RUNNING":
        left = _ask("squeue", "--noheader", "--jobs", number, "--format=%L").strip()
    places = (fields.get("NodeList"), fields.get("Reason"))
    return SlurmJob(
        job=number,
        sweep=str(sweep),
        state=state,
        restarts=int(fields.get("Restarts") or 0),
        started=fields.get("StartTime", "").replace("Unknown", "").replace("T", " "),
        time_left=left,
        exit_status=int(code) if code.isdigit() and state not in QUEUED else None,
        reason=next((text for text in places if text and text not in ("(null)", "None")), ""),
        log=fields.get("StdOut") or str(_note(sweep).get("log") or sweep / f"slurm-{number}.log"),
    )


def _fields(number: str) -> dict[str, str]:
    """Return what SLURM says of a job: while it knows it by scontrol, then by its accounting, if it keeps one."""
    _tool("scontrol")
    shown = _run("scontrol", "show", "job", number)
    if shown.returncode == 0:
        # a line `Key=Value` or several; a command and paths may hold blanks and stand alone on their lines
        fields: dict[str, str] = {}
        for line in shown.stdout.splitlines():
            text = line.strip()
            alone = re.match(r"(Command|StdOut|WorkDir)=(.*)", text)
            pairs = [alone.groups()] if alone else [word.partition("=")[::2] for word in text.split() if "=" in word]
            fields |= {key: value for key, value in pairs if key not in fields}
        return fields
    if shutil.which("sacct") is None:
        return {}
    asked = _run(
        "sacct", "--noheader", "--parsable2", "--allocations", "--jobs", number, "--format=State,ExitCode,Start"
    )
    words = asked.stdout.strip().split("|")
    if asked.returncode or len(words) != 3:
        return {}
    return {"JobState": words[0].partition(" ")[0], "ExitCode": words[1], "StartTime": words[2]}


def _note(sweep: Path) -> dict[str, object]:
    try:
        return dict(parse_json((sweep / JOB_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ResourceError(f"no {name} on PATH; wanted: a login node of a SLURM cluster, where SLURM's commands are")
    return found


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def _ask(*words: str) -> str:
    _tool(words[0])
    asked = _run(*words)
    if asked.returncode:
        raise ResourceError(f"{words[0]} failed: {' '.join(asked.stderr.split()) or asked.returncode}")
    return asked.stdout


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) else value
