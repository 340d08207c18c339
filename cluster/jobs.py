"""Sweeps as jobs of a Ray cluster, over its jobs server: packed, submitted once, followed, fetched home.

A job runs `aepo sweep` beside Ray's head, in the folder that the sweep file names, below AEPO_STORAGE of the cluster if
the name is relative. Its number is made of that folder and an attempt: whoever submits the same sweep again meets the
one that runs, and Ray refuses a number twice. What a job may not show (tokens, passwords) is in the environment of the
cluster's own processes and never in a job's.
"""

import asyncio
import base64
import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aepo import files
from aepo.config import RunConfig
from aepo.console import err
from aepo.errors import ConfigError, DataError, IncompleteError, ResourceError
from aepo.runs import rundir
from cluster.local import LocalCluster, default_folder, token_file
from cluster.send import SENT, WANTED

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

    from tune.spec import Execution

PACKAGES = ("aepo", "tune", "cluster", "analysis")
PACKED = {".py", ".csv", ".ini", ".toml", ".typed"}
"""Kinds of files that are packed, of our own packages only: no data, history, environment files or keys."""
STORAGE = "AEPO_STORAGE"
"""Variable that names, on the cluster, the folder that all nodes see."""
POLL_S, PATIENCE_S = 1.0, 900.0
HELPER_TIMEOUT_S = 180.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One attempt at a sweep."""

    job: str
    sweep: str
    attempt: int
    status: str
    started: str
    ended: str
    exit_status: int | None
    out: str
    """Folder on the cluster; in it AEPO_STORAGE stands for the shared one."""
    plan: str
    """Digest of the planned runs."""


def jobs_server(address: str) -> str:
    """Return the given address, or that of RAY_API_SERVER_ADDRESS or of this machine's cluster.

    Raises:
        ConfigError: if none is known.
    """
    address = (
        address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or LocalCluster(default_folder()).dashboard() or ""
    )
    address = address.rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"wanted the address of a jobs server, as http://127.0.0.1:8265; got {address or 'none'!r}")
    return address


def connect(address: str) -> "JobSubmissionClient":
    """Return a client of a jobs server, with the token of the environment or of the local cluster.

    Raises:
        ConfigError: if no address is known.
        ResourceError: if nobody answers there, or the token is refused.
    """
    address = jobs_server(address)
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not given and (path := token_file(address)) is not None:
        os.environ["RAY_AUTH_TOKEN_PATH"], given = str(path), {"RAY_AUTH_TOKEN_PATH"}
    if given or (Path.home() / ".ray/auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"
    import requests

    try:
        if requests.get(f"{address}/api/jobs/", timeout=20).status_code == 200:
            err.print(
                f"[yellow]warning:[/] {address} asks for no token: whoever reaches it runs what they like on it; "
            )
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            return JobSubmissionClient(address)
        except AuthenticationError as error:
            raise _explained(error, address) from error
    except (OSError, RuntimeError) as error:
        raise _explained(error, address) from error


def submit(
    client: "JobSubmissionClient", file: Path, execution: "Execution", plan: Sequence[RunConfig], *, places: int = 0
) -> tuple[str, bool]:
    """Return the job that carries a sweep out, and whether it is a new one.

    One that runs is joined; after one that has ended comes the next attempt, in which what has ended is not repeated.

    Args:
        client: of the jobs server.
        file: sweep file, which is packed.
        execution: what the file and the flags say of where and how.
        plan: its runs.
        places: runs at once that an autoscaler shall have made room for; 0 = whatever there is.

    Raises:
        ConfigError: for a tracking address that holds a password, or a folder outside of the storage.
        ResourceError: if another plan is being carried out in the same folder.
    """
    if "@" in execution.tracking_uri:
        raise ConfigError("a job shows its settings: set MLFLOW_TRACKING_USERNAME and _PASSWORD on the cluster instead")
    out = remote_folder(execution.out)
    identity, digest = hashlib.sha256(out.encode()).hexdigest()[:8], plan_digest(plan)
    stem = f"aepo-{re.sub(r'[^A-Za-z0-9_.]', '-', execution.out.name)}-{identity}"
    last = next((job for job in reversed(jobs(client)) if job.job.rpartition("-")[0] == stem), None)
    if last is not None and last.status in ("PENDING", "RUNNING"):
        if last.plan != digest:
            raise ResourceError(
                f"{last.job} carries out another plan in {execution.out}; aepo jobs stop {last.job}, or another folder"
            )
        return last.job, False
    name = f"{stem}-{1 if last is None else last.attempt + 1}"
    with pack(file) as folder:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        err.print(f"code and sweep file: {size / 1e6:.2f} MB in {sum(1 for _ in folder.rglob('*.*'))} files")
        words = ["python", "-m", "aepo", "sweep", f"sweep{file.suffix}", "--yes", "--address", "auto"]
        words += ["--retry-failed"] if execution.retry_failed else []
        words += ["--only"] if execution.only else []
        room = f"python -m cluster.reserve {places} {execution.cpus:g} {execution.gpus:g} && " if places else ""
        try:
            client.submit_job(
                entrypoint=f"{room}{shlex.join(words)} --out {_quoted(out)}",
                submission_id=name,
                runtime_env={"working_dir": str(folder)},
                metadata={"sweep": str(execution.out), "out": out, "plan": digest, "runs": str(len(plan))},
            )
        except RuntimeError as error:
            if "already" in str(error):  # somebody else was quicker
                return name, False
            raise
    return name, True


def jobs(client: "JobSubmissionClient") -> list[Job]:
    """Return the sweeps that the cluster knows, the oldest first."""
    found = [_job(details) for details in client.list_jobs() if (details.submission_id or "").startswith("aepo-")]
    return sorted((job for job in found if job.out), key=lambda job: (job.sweep, job.attempt))


def find(client: "JobSubmissionClient", name: str) -> Job:
    """Return a job by its number, or the last attempt at a sweep by its folder's name.

    Raises:
        IncompleteError: if the cluster knows none.
    """
    known = jobs(client)
    for job in reversed(known):
        if name in (job.job, job.sweep, job.job.rpartition("-")[0]):
            return job
    raise IncompleteError(f"the cluster knows no job {name}; it knows: {', '.join(job.job for job in known) or 'none'}")


def follow(client: "JobSubmissionClient", name: str, write: Callable[[str], object]) -> Job:
    """Write a job's log as it grows until the job ends; a connection that breaks is made again.

    Raises:
        ResourceError: if the jobs server stays away; the job goes on.
    """
    shown, lost_at = 0, 0.0

    async def tail() -> None:
        nonlocal shown, lost_at
        skip = shown
        async for text in client.tail_job_logs(name):
            lost_at = 0.0
            if skip < len(text):
                write(text[skip:])
                shown += len(text) - skip
            skip = max(0, skip - len(text))

    import aiohttp

    while True:
        try:
            asyncio.run(tail())
            job = find(client, name)
            if job.status not in ("PENDING", "RUNNING"):
                if rest := client.get_job_logs(name)[shown:]:
                    write(rest)
                return job
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if not lost_at:
                lost_at = time.monotonic()
                err.print(f"no connection to the cluster ({type(error).__name__}); the job goes on, trying again")
            if time.monotonic() - lost_at > PATIENCE_S:
                raise ResourceError(
                    f"no connection for {PATIENCE_S / 60:g} min; aepo jobs logs {name} goes on"
                ) from error
        time.sleep(POLL_S)


def stop(client: "JobSubmissionClient", job: Job, *, timeout_s: float) -> None:
    """Ask a sweep to store checkpoints and end; kill its process if it has not after a while."""
    if job.status not in ("PENDING", "RUNNING"):
        return
    if timeout_s > 0:
        helper = f"python -m aepo sweep --stop --out {_quoted(job.out)}"
        run_helper(client, helper, check=False)  # one that has not begun to sweep has nothing to store
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and find(client, job.job).status in ("PENDING", "RUNNING"):
            time.sleep(POLL_S)
    client.stop_job(job.job)


def fetch(client: "JobSubmissionClient", job: Job, home: Path) -> list[str]:
    """Bring runs.parquet and sweep.json of a sweep, running or ended, into a folder here; return their names.

    They come as text in the log of a small job, with a digest, since the jobs server is all that can be reached.

    Raises:
        DataError: if they did not arrive whole, or the sweep has no table yet.
    """
    text = run_helper(client, f"python -m cluster.send {_quoted(job.out)}", check=True)
    home.mkdir(parents=True, exist_ok=True)
    found = []
    for name, digest, data in re.findall(rf"^{SENT} (\S+) ([0-9a-f]{{64}}) (\S*)$", text, re.MULTILINE):
        content = base64.b64decode(data)
        if name not in WANTED or hashlib.sha256(content).hexdigest() != digest:
            raise DataError(f"{name} of {job.job} did not arrive whole; try again")
        files.write_atomically(home / name, content)
        found.append(name)
    if set(found) != set(WANTED):
        raise DataError(f"{job.out} on the cluster lacks {', '.join(sorted(set(WANTED) - set(found)))}; has it begun?")
    return found


def remote_folder(out: Path) -> str:
    """Return a sweep's folder on the cluster.

    Raises:
        ConfigError: if it leads out of the storage.
    """
    if ".." in out.parts or not out.name:
        raise ConfigError(f"--out must name a folder without '..', got {out}")
    return str(out) if out.is_absolute() else f"${{{STORAGE}}}/{out}"


@contextmanager
def pack(file: Path | None = None) -> Iterator[Path]:
    """Give a folder with our packages' code, the commit and a sweep file; it is removed afterwards."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory(prefix="aepo-pack-") as name:
        folder = Path(name)
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*")):
                if path.suffix in PACKED and path.is_file() and not path.is_symlink():
                    target = folder / path.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
        (folder / rundir.COMMIT).write_text(rundir.commit() or "")
        if file is not None:
            (folder / f"sweep{file.suffix}").write_bytes(file.read_bytes())
        yield folder


def run_helper(client: "JobSubmissionClient", entrypoint: str, *, check: bool) -> str:
    """Run a small command on the cluster, without a place in the list of sweeps, and return what it printed.

    Raises:
        ResourceError: if it has not ended in time.
        DataError: if it failed and `check`.
    """
    name = f"helper-{os.urandom(6).hex()}"
    with pack() as folder:
        client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env={"working_dir": str(folder)})
    end = time.monotonic() + HELPER_TIMEOUT_S
    while not (status := client.get_job_status(name)).is_terminal():
        if time.monotonic() > end:
            client.stop_job(name)
            raise ResourceError(f"the cluster did not run a small command within {HELPER_TIMEOUT_S:g} s; is it full?")
        time.sleep(POLL_S / 2)
    text = str(client.get_job_logs(name))
    client.delete_job(name)
    if check and status != "SUCCEEDED":
        lines = [line for line in text.splitlines() if line.strip()]
        raise DataError(f"on the cluster: {lines[-1] if lines else status}")
    return text


def _quoted(out: str) -> str:
    """Return a folder for the shell of the cluster's head, where AEPO_STORAGE is known."""
    prefix = f"${{{STORAGE}}}/"
    if not out.startswith(prefix):
        return shlex.quote(out)
    hint = f"{STORAGE} is not set on this cluster; it must name the folder that all nodes see"
    return f'"${{{STORAGE}:?{hint}}}"/{shlex.quote(out.removeprefix(prefix))}'


def plan_digest(plan: Sequence[RunConfig]) -> str:
    """Return what tells a plan of runs from another."""
    return hashlib.sha256(json.dumps(sorted(config.name for config in plan)).encode()).hexdigest()[:12]


def _job(details: "JobDetails") -> Job:
    metadata: dict[str, Any] = details.metadata or {}
    attempt = (details.submission_id or "").rpartition("-")[2]
    status: JobStatus = details.status
    return Job(
        job=details.submission_id or "",
        sweep=metadata.get("sweep", ""),
        attempt=int(attempt) if attempt.isdigit() else 0,
        status=status.value,
        started=_clock(details.start_time),
        ended=_clock(details.end_time),
        exit_status=details.driver_exit_code,
        out=metadata.get("out", ""),
        plan=metadata.get("plan", ""),
    )


def _clock(milliseconds: int | None) -> str:
    return time.strftime("%F %T", time.localtime(milliseconds / 1000)) if milliseconds else ""


def _explained(error: Exception, address: str) -> ResourceError:
    text = " ".join(str(error).split())
    if "nvalid authentication token" in text or "403" in text:
        return ResourceError(
            f"{address} refuses the token; RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must be the cluster's"
        )
    if "issing authentication token" in text or "401" in text:
        return ResourceError(f"{address} wants a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file")
    return ResourceError(
        f"no jobs server at {address} ({type(error).__name__}); is the cluster up? aepo cluster status"
    )
