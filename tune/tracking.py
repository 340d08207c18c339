"""The only MLflow writer: ships the runs' spools from the sweep's own process, never from a training loop.

An experiment per sweep, in it a run for the sweep itself and below it one per fingerprint, found again by their
tags. Rows are sent with the time at which they were written, so sending one twice changes nothing; the offset on disk
only saves work. After any failure the server is asked anew what it has, so that nothing is made twice.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import secrets
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil

from aepo import __version__, files
from aepo.config import RunConfig, flatten, identity
from aepo.console import warn
from aepo.documents import parse_json
from aepo.errors import AEPOError, ConfigError
from aepo.results import SCHEMA_VERSION, Result
from aepo.runs import rundir, spool
from tune.plan import MANIFEST, PACKAGES, run_folder
from tune.runs_table import RUNS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from sqlalchemy import URL

OFFSET = "mlflow.json"
"""In a run's folder: its MLflow run, bytes of the spool sent, digest of the result sent. In the sweep's: its id."""
BATCH = 1000
"""Metrics per request, as many as MLflow takes."""
PAGE = 200
"""Runs per answer of a search."""
TAG, SWEEP = "aepo.run", "aepo.sweep"
PLANNED, NUM_PLANNED = "aepo.planned", "aepo.num_planned"
"""Tags: a run's says false once its sweep plans it no more, the sweep's how many runs it plans."""
TAGGED = ("task", "suite", "seed", "fingerprint", "method", "preset")
MEASURED = ("env_id", "ref_min", "ref_max")
"""Fields of a result that become tags, since the settings do not say them."""
LOAD, LOAD_INTERVAL_S = "system/", 60.0
"""What this machine has used, in the names of MLflow's own monitor; its page shows them apart."""
PAUSES_S = (2.0, 4.0, 8.0, 16.0, 25.0)
"""Between attempts to send what is left at the end."""
PATIENCE_S = 60.0
"""At the end, since the server's last answer or the end itself, whatever an attempt takes."""
VARIABLE = "MLFLOW_TRACKING_URI"
SCHEMES = ("sqlite", "http", "https", "postgresql", "postgresql+psycopg", "mysql", "mssql", "databricks")
"""What a tracking address may begin with, among others."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Begin the addresses of stores that this process opens itself; others are servers."""
FILES = "mlartifacts"
"""In a sweep's folder: files of its runs, where no server keeps them."""
ATTACH_ATTEMPTS = 3
"""Failures to store files, one after the other, until runs are closed without them."""
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated "create" makes two; `ship` repeats, and looks first
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def find_store(given: str, sweep: Path) -> str:
    """Return the address of the store or server to track in, looked at but not asked.

    Args:
        given: by a flag or file; empty = MLFLOW_TRACKING_URI, or else a SQLite file in the sweep's folder.
        sweep: folder.

    Raises:
        ConfigError: for an address at which there can be none, with the name of the flag or variable that gave it.
    """
    if given:
        fault, name, remedy = _fault(given), "--tracking-uri", "leave it out"
    elif given := os.environ.get(VARIABLE, ""):
        fault, name, remedy = _fault(given), VARIABLE, "unset it"
    else:
        return sqlite_uri(sweep.resolve() / "mlflow.db")
    if fault:
        raise ConfigError(
            f"{name} is {_without_secrets(given)!r}: {fault}; {remedy} for a SQLite file in the sweep's folder"
        )
    return given


def _fault(uri: str) -> str:
    """Return what is wrong for sure with an address of a store or server, nothing where it may answer."""
    scheme = uri.partition(":")[0]
    if scheme in ("http", "https"):
        try:
            parts = urlsplit(uri)
            return "" if parts.hostname and parts.port != 0 else "it names no host"
        except ValueError as error:
            return str(error)
    if scheme.partition("+")[0] == "databricks":
        return ""
    if scheme.partition("+")[0] not in DATABASES:
        return f"no MLflow store has an address that begins with {scheme!r}; wanted {', '.join(SCHEMES)}"
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except (SQLAlchemyError, ValueError) as error:
        return " ".join(str(error).replace(uri, "it").split())
    except ImportError as error:
        return f"Python's driver of that database is not installed ({error})"
    return _file_fault(url) if scheme.startswith("sqlite") else ""


def _file_fault(url: "URL") -> str:
    """Return why a SQLite file cannot be opened or made, nothing if it can."""
    if url.host or url.port:
        return "a path stands behind three slashes, an absolute one behind four"
    if not url.database or url.database == ":memory:":
        return "a database in memory keeps nothing"
    if url.database.startswith("file:"):
        return ""
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # as SQLite's journal
            pass
        if path.exists():
            with path.open("r+b") as file:
                return "" if file.read(16) in (b"", b"SQLite format 3\0") else f"{path} is no SQLite file"
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    return ""


def sqlite_uri(path: Path) -> str:
    """Return the address of a SQLite file, in which `%` and `?` of its path are no signs of their own.

    With the driver's name where there are such: MLflow makes a folder for what stands behind a bare `sqlite:///`, as it
    stands there.
    """
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}" if quoted == str(path) else f"sqlite+pysqlite:///{quoted}"


@dataclasses.dataclass
class _Entry:
    """One run as MLflow has it."""

    run_id: str
    status: str
    has_params: bool
    has_error: bool
    offset: int
    """Bytes of the spool that have been sent."""
    closed: str
    """Digest of the result that has been sent."""

    @staticmethod
    def of(found: "Run", folder: Path) -> "_Entry":
        run_id, tags = found.info.run_id, found.data.tags
        sent = _read(folder)
        offset, closed = (sent["offset"], sent["closed"]) if sent.get("run_id") == run_id else (0, "")
        return _Entry(run_id, found.info.status, bool(found.data.params), "aepo.error" in tags, offset, closed)


class Tracker:
    """Ships what the runs of a plan have written so far; call `ship` now and then and `close` at the end."""

    def __init__(self, sweep: Path, plan: Sequence[RunConfig], *, uri: str):
        """Contact nobody yet; the first `ship` makes the experiment, which is named like the sweep's folder."""
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", ".*Any type hint is inferred")  # mlflow's, about types of its own
        self._sweep, self.uri = sweep.resolve(), uri
        self._folders: dict[str, Path] = {}
        self._open: dict[str, RunConfig] = {}
        for config in plan:
            self.add(config)
        self._entries: dict[str, _Entry] = {}
        self._ends: dict[str, tuple[str, str]] = {}
        self._client: MlflowClient
        self._is_connected, self._lock = False, threading.Lock()
        self._answered_at, self._is_given_up = 0.0, False
        self._attach_failures = 0
        self._load: list[tuple[str, float, float]] = []
        self._next_sample = 0.0
        self._tags = {
            **_commit_tags(rundir.commit()),
            **{f"aepo.version.{name}": version(name) for name in PACKAGES},
            "aepo.version.aepo": __version__,
            "aepo.version.python": platform.python_version(),
            "mlflow.source.name": "aepo sweep",
        }

    @property
    def run_ids(self) -> dict[str, str]:
        """Run name -> MLflow run id, of the runs that have one."""
        return {name: entry.run_id for name, entry in self._entries.copy().items()}

    def ship(self) -> bool:
        """Send what is new; return whether the tracking server took it. What it did not waits for the next call."""
        if time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + LOAD_INTERVAL_S
            now, used = time.time(), psutil.virtual_memory().used / 1e6
            self._load += [(f"{LOAD}cpu_utilization_percentage", psutil.cpu_percent(), now)]
            self._load += [(f"{LOAD}system_memory_usage_megabytes", used, now)]
        return self._attempt(self._ship)

    def ship_rest(self) -> bool:
        """Send all that is left, waiting a minute at most for a server that is away; return whether it took it."""

        def repeat() -> bool:
            for pause_s in PAUSES_S:
                if self.ship():
                    return True
                time.sleep(pause_s)
            return self.ship()

        return self._patiently(repeat)

    def add(self, config: RunConfig) -> None:
        """Ship one more run."""
        self._folders[config.name] = run_folder(self._sweep, config)
        self._open[config.name] = config

    def end(self, config: RunConfig, status: Literal["FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
        """Let the next `ship` close a run that ended without a result."""
        self._ends[config.name] = (status, reason)

    def close(self, statuses: Sequence[str]) -> bool:
        """End the sweep's own run, which keeps runs.parquet, by its runs' statuses; return whether that was taken."""
        return self._patiently(lambda: self._attempt(lambda: self._close_sweep(statuses)))

    def _patiently(self, action: Callable[[], bool]) -> bool:
        """Return what an action returns, or False once the server has not answered for too long, here or before.

        The action is then left to a thread that ends with the process: databases and their drivers have timeouts of
        their own, or none.
        """
        if self._is_given_up:
            return False
        ended: Future[bool] = Future()

        def act() -> None:
            try:
                ended.set_result(action())
            except BaseException as error:
                ended.set_exception(error)

        self._answered_at = time.monotonic()
        threading.Thread(target=act, daemon=True).start()
        while (left_s := self._answered_at + PATIENCE_S - time.monotonic()) > 0:
            with suppress(TimeoutError):
                return ended.result(timeout=left_s)
        self._is_given_up = True
        self._warn(f"has not answered for {PATIENCE_S:g} s; metrics wait on disk, and the same command sends them")
        return False

    def _attempt(self, action: Callable[[], None]) -> bool:
        with self._lock:
            try:
                if not self._is_connected:
                    self._connect()
                action()
            except AEPOError:
                raise
            except Exception as error:  # whatever tracking meets, training goes on
                self._is_connected = False
                self._warn(f"does not answer; metrics wait on disk ({_one_line(error, self.uri)})")
        return self._is_connected

    def _warn(self, text: str) -> None:
        warn(f"MLflow at {_without_secrets(self.uri)} {text}")

    def _connect(self) -> None:
        """Find the experiment, the sweep's run and all others in it, and make what is missing."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient(self.uri)
        name = f"aepo/{self._sweep.name}"
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = None if self._is_server else (self._sweep / FILES).as_uri()
            self._experiment = client.create_experiment(name, artifacts)
        else:
            self._experiment = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(self._experiment)
        if not (identity := _read(self._sweep).get("sweep")):
            identity = secrets.token_hex(8)
            files.write_json(self._sweep / OFFSET, {"sweep": identity})
        self._tags[SWEEP] = identity
        query = f"tags.`{SWEEP}` = '{identity}'"
        found = {entry.data.tags.get(TAG, ""): entry for entry in self._search(query)}
        if not self._is_server:
            self._move_in([entry.info.run_id for entry in found.values()])
        parent = found.pop("", None)
        for name, entry in found.items():
            if (planned := str(name in self._folders).lower()) != entry.data.tags.get(PLANNED, "true"):
                client.set_tag(entry.info.run_id, PLANNED, planned)
        num_planned = str(len(self._folders))
        if parent is not None and parent.data.tags.get(NUM_PLANNED) != num_planned:
            client.set_tag(parent.info.run_id, NUM_PLANNED, num_planned)
        if parent is None:
            tags = {**self._tags, "aepo.host": platform.node(), "aepo.machine": platform.platform()}
            tags[NUM_PLANNED] = num_planned
            parent = client.create_run(self._experiment, tags=tags, run_name=self._sweep.name)
        elif parent.info.status != "RUNNING":
            client.update_run(parent.info.run_id, status="RUNNING")
        self._parent, self._began_at = parent.info.run_id, parent.info.start_time / 1000
        self._entries = {n: _Entry.of(found[n], folder) for n, folder in self._folders.items() if n in found}
        self._is_connected = True

    @property
    def _is_server(self) -> bool:
        return self.uri.partition(":")[0].partition("+")[0] not in DATABASES

    def _move_in(self, run_ids: Sequence[str]) -> None:
        """Have the store keep the files of this sweep in its folder, as it is called now.

        A store has absolute addresses of files, which name the old place when a folder was moved or copied. Files that
        stand at their address and not here stay where they are, as do those of stores that somebody else set up.
        """
        from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun

        here = (self._sweep / FILES).as_uri()

        def moved(address: str) -> str:
            old, files, rest = f"{address}/".rpartition(f"/{FILES}/")
            new = f"{here}/{rest}".removesuffix("/")
            if not files or not old.startswith("file:") or new == address:
                return address
            return address if _local(address).exists() and not _local(new).exists() else new

        store: Any = self._client._tracking_client.store
        with store.ManagedSessionMaker(read_only=False) as session:
            experiment = session.get(SqlExperiment, int(self._experiment))
            if experiment.artifact_location.startswith("file:") and experiment.artifact_location.endswith(f"/{FILES}"):
                experiment.artifact_location = here  # whoever of its name was here last: each run keeps an address
            for start in range(0, len(run_ids), PAGE):
                ids = run_ids[start : start + PAGE]
                for entry in session.query(SqlRun).filter(SqlRun.run_uuid.in_(ids)):
                    entry.artifact_uri = moved(entry.artifact_uri)
                for model in session.query(SqlLoggedModel).filter(SqlLoggedModel.source_run_id.in_(ids)):
                    model.artifact_location = moved(model.artifact_location)

    def _search(self, query: str, token: str | None = None) -> "Iterator[Run]":
        page = self._client.search_runs([self._experiment], query, max_results=PAGE, page_token=token)
        self._answered_at = time.monotonic()
        yield from page
        if page.token:
            yield from self._search(query, page.token)

    def _ship(self) -> None:
        from mlflow.entities import Metric

        if self._load:
            load = [
                Metric(key, value, int(at * 1000), int((at - self._began_at) / LOAD_INTERVAL_S))
                for key, value, at in self._load
            ]
            self._client.log_batch(self._parent, metrics=load)
            self._load.clear()
        for name, config in list(self._open.items()):
            self._ship_run(name, config, self._folders[name])

    def _ship_run(self, name: str, config: RunConfig, folder: Path) -> None:
        end = self._ends.get(name)
        if end is None and not (folder / rundir.CONFIG).exists():
            return
        result = rundir.read_result(folder)  # before the spool: what the spool lacks then, the next call sends
        digest = hashlib.sha256((folder / rundir.RESULT).read_bytes()).hexdigest()[:16] if result else ""
        entry = self._entries.get(name) or self._create(name, config, folder)
        if not entry.has_params:
            self._log_params(entry, config)
        if result is None and end is None and entry.status != "RUNNING":
            self._client.update_run(entry.run_id, status="RUNNING")
            entry.status, entry.closed = "RUNNING", ""
        if result is None or entry.closed != digest:
            offset = self._send_metrics(entry.run_id, folder / rundir.METRICS, entry.offset)
            if result is not None:
                self._close_run(entry, folder, config, result)
            elif end is not None:
                status, reason = end
                if reason:
                    self._client.set_tag(entry.run_id, "aepo.error", reason[:5000])
                self._client.set_terminated(entry.run_id, status)
            if (offset, digest) != (entry.offset, entry.closed):
                entry.offset, entry.closed = offset, digest
                files.write_json(folder / OFFSET, {"run_id": entry.run_id, "offset": offset, "closed": digest})
        if result is not None or end is not None:
            del self._open[name]
            self._answered_at = time.monotonic()

    def _create(self, name: str, config: RunConfig, folder: Path) -> _Entry:
        """Make the run of MLflow, its tags in the same request, so that it is found again whatever comes next."""
        tags = {**self._tags, TAG: name, "mlflow.parentRunId": self._parent}
        tags |= {f"aepo.{key}": str(getattr(config, key)) for key in TAGGED}
        tags |= {"aepo.variant": config.variant} if config.variant else {}
        tags |= {"aepo.steps": str(config.num_steps), "aepo.last_stage": list(config.stages)[-1]}
        began_at = (folder / rundir.CONFIG).stat().st_mtime if (folder / rundir.CONFIG).exists() else time.time()
        created = self._client.create_run(self._experiment, int(began_at * 1000), tags, run_name=name)
        return self._entries.setdefault(name, _Entry.of(created, folder))

    def _log_params(self, entry: _Entry, config: RunConfig) -> None:
        from mlflow.entities import Param

        flat = flatten(identity(config) | {"rounds": config.rounds})
        params = [Param(key, str(value)) for key, value in flat.items()]
        self._client.log_batch(entry.run_id, params=params)
        entry.has_params = True

    def _send_metrics(self, run_id: str, path: Path, offset: int) -> int:
        """Send the spool's whole lines after `offset`; return the new offset."""
        from mlflow.entities import Metric

        rows, end = spool.read_spool(path, offset)
        metrics = [
            Metric(key, value, int(row["time"] * 1000), row["step"])
            for row in rows
            for key, value in row["metrics"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])
            self._answered_at = time.monotonic()
        return end

    def _close_run(self, entry: _Entry, folder: Path, config: RunConfig, result: Result) -> None:
        from mlflow.entities import Dataset as DatasetEntity
        from mlflow.entities import DatasetInput, InputTag, Metric, RunTag

        run_id, model_id = entry.run_id, self._attach(entry.run_id, folder, config, step=result.steps)
        ended_at = int((folder / rundir.RESULT).stat().st_mtime * 1000)
        finals = [
            Metric(f"final/{row.method}/{key}", value, ended_at, result.steps, model_id=model_id)
            for row in result.evaluations
            for key, value in (("score", row.score), ("return_mean", row.return_mean))
            if value is not None
        ]
        tags = _commit_tags(result.commit) | {"aepo.machine": result.machine}
        tags["aepo.schema_version"] = str(SCHEMA_VERSION)  # these and `final/` are what `aepo report mlflow:` reads
        tags |= {f"aepo.{key}": str(value) for key in MEASURED if (value := getattr(result, key)) is not None}
        if result.error or entry.has_error:
            tags["aepo.error"] = (result.error or "")[:5000]
        self._client.log_batch(run_id, metrics=finals, tags=[RunTag(key, value) for key, value in tags.items()])
        if result.dataset_digest:
            source = json.dumps({"dataset": result.dataset, "source": result.source})
            inputs = DatasetEntity(result.dataset, result.dataset_digest, "minari", source)
            dataset = DatasetInput(inputs, tags=[InputTag("mlflow.data.context", "training")])
            self._client.log_inputs(run_id, datasets=[dataset])
        self._client.set_terminated(run_id, "FINISHED" if result.status == "finished" else "FAILED", ended_at)

    def _attach(self, run_id: str, folder: Path, config: RunConfig, *, step: int) -> str | None:
        """Store the run's files and its policy as a logged model, whose id is returned; in the end without them."""
        from mlflow.tracking._tracking_service import utils

        from tune.model import log_model

        try:
            for name in (rundir.CONFIG, rundir.RESULT, rundir.POLICY, rundir.GRID, "log.txt"):
                if (folder / name).exists():
                    self._client.log_artifact(run_id, str(folder / name))
            tags = {TAG: config.name, "aepo.task": config.task, "aepo.method": config.method}
            policy = folder / rundir.POLICY
            model_id = log_model(self._client, run_id, policy, tags=tags, step=step) if policy.exists() else None
        except Exception as error:
            self._attach_failures += 1
            if self._attach_failures < ATTACH_ATTEMPTS:
                raise
            self._warn(f"does not store the files of {config.name} ({_one_line(error, self.uri)})")
            return None
        finally:
            utils._artifact_repos_cache.clear()  # of up to 1,024 runs and models, each with queues and pools of threads
        self._attach_failures = 0
        return model_id

    def _close_sweep(self, statuses: Sequence[str]) -> None:
        from mlflow.entities import Metric

        counts, now = Counter(statuses), int(time.time() * 1000)
        numbers = [Metric(f"runs/{key}", counts[key], now, 0) for key in ("finished", "failed", "missing")]
        self._client.log_batch(self._parent, metrics=numbers)
        for name in (MANIFEST, RUNS):
            if (self._sweep / name).exists():
                self._client.log_artifact(self._parent, str(self._sweep / name))
        status = "FAILED" if counts["failed"] else "KILLED" if counts["missing"] else "FINISHED"
        self._client.set_terminated(self._parent, status)


def _commit_tags(commit: str | None) -> dict[str, str]:
    if commit is None:
        return {}
    clean = commit.removesuffix("+dirty")
    return {"aepo.commit": commit, "aepo.dirty": str(clean != commit).lower(), "mlflow.source.git.commit": clean}


def _read(folder: Path) -> dict[str, Any]:
    try:
        sent = parse_json((folder / OFFSET).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return sent if isinstance(sent, dict) else {}


def _local(address: str) -> Path:
    return Path(url2pathname(urlsplit(address).path))


def _one_line(error: BaseException, uri: str) -> str:
    text = " ".join(str(error).replace(uri, _without_secrets(uri)).split())
    return f"{type(error).__name__}: {text[:200]}"


def _without_secrets(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
