"""MLflow as a sink: an experiment per sweep, in it a run for the sweep itself and below it one per fingerprint.

They are found again by their tags. Rows are sent with the time at which they were written, so sending one twice changes
nothing. Whenever the sweep is opened the server is asked anew what it has, so that nothing is made twice.
"""

import dataclasses
import json
import logging
import os
import platform
import secrets
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from aepo import __version__, files, trust
from aepo.config import RunConfig, flatten, identifying_fields
from aepo.errors import ConfigError
from aepo.results import DIAGNOSTICS, OF_SELECTED, SCHEMA_VERSION, SELECTED, Result
from aepo.runs import rundir
from tune.plan import MANIFEST, PACKAGES
from tune.runs_table import RUNS
from tune.tracking import LOAD_INTERVAL_S, Status, Tracker, read_sent, warn_of, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from sqlalchemy import URL

BATCH = 1000
"""Metrics per request, as many as MLflow takes."""
IDENTITY = "mlflow.json"
"""File in the sweep's folder with the id by which its runs are found."""
PAGE = 200
"""Runs per answer of a search."""
TAG, SWEEP = "aepo.run", "aepo.sweep"
PLANNED, NUM_PLANNED = "aepo.planned", "aepo.num_planned"
"""Tags: a run's says false once its sweep plans it no more, the sweep's how many runs it plans."""
TAGGED = ("task", "suite", "seed", "fingerprint", "method", "preset")
MEASURED = ("env_id", "ref_min", "ref_max")
"""Fields of a result that become tags, since the settings do not say them."""
VARIABLE = "MLFLOW_TRACKING_URI"
SCHEMES = ("sqlite", "http", "https", "postgresql", "postgresql+psycopg", "mysql", "mssql", "databricks")
"""What a tracking address may begin with, among others."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Beginnings of the addresses of stores that this process opens itself; others are servers."""
FILES = "mlartifacts"
"""Folder in a sweep's folder for the files of its runs, where no server keeps them."""
ATTACH_ATTEMPTS = 3
"""Failures to store files, one after the other, until runs are closed without them."""
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated "create" makes two; the tracker repeats, and looks first
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
            f"{name} is {without_secrets(given)!r}: {fault}; {remedy} for a SQLite file in the sweep's folder"
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


def mlflow_tracker(sweep: Path, plan: Sequence[RunConfig], *, uri: str) -> Tracker:
    """Return the tracker of a sweep whose sink is MLflow; the experiment is named like the sweep's folder."""
    return Tracker(sweep, plan, MlflowSink(uri))


@dataclasses.dataclass
class _Entry:
    """One run as MLflow has it."""

    run_id: str
    status: str
    has_params: bool
    has_error: bool

    @staticmethod
    def of(found: "Run") -> "_Entry":
        return _Entry(found.info.run_id, found.info.status, bool(found.data.params), "aepo.error" in found.data.tags)


class MlflowSink:
    """Writes a store or server of MLflow, which no call before `open` contacts."""

    name = "MLflow"

    def __init__(self, uri: str):
        """Set this process up for MLflow: timeouts, and less of what it prints."""
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", ".*Any type hint is inferred")  # mlflow's, about types of its own
        self.address = uri
        self._entries: dict[str, _Entry] = {}
        self._client: MlflowClient
        self._attach_failures = 0
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

    def open(self, sweep: Path, planned: Collection[str], answered: Callable[[], None]) -> None:
        """Find the experiment, the sweep's run and all others in it, and make what is missing."""
        from mlflow import MlflowClient

        self._sweep, self._answered = sweep, answered
        self._client = client = MlflowClient(self.address)
        name = f"aepo/{sweep.name}"
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = None if self._is_server else (self._sweep / FILES).as_uri()
            self._experiment = client.create_experiment(name, artifacts)
        else:
            self._experiment = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(self._experiment)
        if not (sweep_id := read_sent(sweep / IDENTITY).get("sweep")):
            sweep_id = secrets.token_hex(8)
            files.write_json(sweep / IDENTITY, {"sweep": sweep_id})
        self._tags[SWEEP] = sweep_id
        query = f"tags.`{SWEEP}` = '{sweep_id}'"
        found = {entry.data.tags.get(TAG, ""): entry for entry in self._search(query)}
        if not self._is_server:
            self._move_in([entry.info.run_id for entry in found.values()])
        parent = found.pop("", None)
        for name, entry in found.items():
            if (is_planned := str(name in planned).lower()) != entry.data.tags.get(PLANNED, "true"):
                client.set_tag(entry.info.run_id, PLANNED, is_planned)
        num_planned = str(len(planned))
        if parent is not None and parent.data.tags.get(NUM_PLANNED) != num_planned:
            client.set_tag(parent.info.run_id, NUM_PLANNED, num_planned)
        if parent is None:
            tags = {**self._tags, "aepo.host": platform.node(), "aepo.machine": platform.platform()}
            tags[NUM_PLANNED] = num_planned
            parent = client.create_run(self._experiment, tags=tags, run_name=sweep.name)
        elif parent.info.status != "RUNNING":
            client.update_run(parent.info.run_id, status="RUNNING")
        self._parent, self._began_at = parent.info.run_id, parent.info.start_time / 1000
        self._entries = {name: _Entry.of(entry) for name, entry in found.items() if name in planned}

    @property
    def _is_server(self) -> bool:
        return self.address.partition(":")[0].partition("+")[0] not in DATABASES

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
        self._answered()
        yield from page
        if page.token:
            yield from self._search(query, page.token)

    def run(self, config: RunConfig, folder: Path, *, is_open: bool) -> str:
        """Make the run, unless it is there, and log its params; reopen it if it goes on; return its id."""
        from mlflow.entities import Param

        entry = self._entries.get(config.name) or self._create(config, folder)
        if not entry.has_params:
            flat = flatten(identifying_fields(config) | {"rounds": config.rounds})
            params = [Param(key, str(value)) for key, value in flat.items()]
            self._client.log_batch(entry.run_id, params=params)
            entry.has_params = True
        if is_open and entry.status != "RUNNING":
            self._client.update_run(entry.run_id, status="RUNNING")
            entry.status = "RUNNING"
        return entry.run_id

    def _create(self, config: RunConfig, folder: Path) -> _Entry:
        """Make the run of MLflow, its tags in the same request, so that it is found again whatever comes next."""
        tags = {**self._tags, TAG: config.name, "mlflow.parentRunId": self._parent}
        tags |= {f"aepo.{key}": str(getattr(config, key)) for key in TAGGED}
        tags |= {"aepo.variant": config.variant} if config.variant else {}
        tags |= {"aepo.steps": str(config.num_steps), "aepo.last_stage": list(config.stages)[-1]}
        tags["aepo.stages"] = " ".join(config.stages)
        began_at = (folder / rundir.CONFIG).stat().st_mtime if (folder / rundir.CONFIG).exists() else time.time()
        created = self._client.create_run(self._experiment, int(began_at * 1000), tags, run_name=config.name)
        return self._entries.setdefault(config.name, _Entry.of(created))

    def log(self, run: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows; the steps of the sweep's own are minutes since it began."""
        from mlflow.entities import Metric

        run_id = self._entries[run].run_id if run else self._parent
        metrics = [
            Metric(key, value, int(row["time"] * 1000), row["step"] if run else self._minute(row["time"]))
            for row in rows
            for key, value in row["metrics"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])
            self._answered()

    def _minute(self, at: float) -> int:
        return int((at - self._began_at) / LOAD_INTERVAL_S)

    def end(self, config: RunConfig, folder: Path, status: Status, reason: str, result: Result | None) -> None:
        """Send scores, tags, files and the policy of a run with a result, and the status of any."""
        entry, ended_at = self._entries[config.name], None
        if result is not None:
            ended_at = int((folder / rundir.RESULT).stat().st_mtime * 1000)
            self._log_result(entry, folder, config, result, ended_at)
        elif reason:
            self._client.set_tag(entry.run_id, "aepo.error", reason[:5000])
        self._client.set_terminated(entry.run_id, status, ended_at)

    def _log_result(self, entry: _Entry, folder: Path, config: RunConfig, result: Result, ended_at: int) -> None:
        from mlflow.entities import Dataset as DatasetEntity
        from mlflow.entities import DatasetInput, InputTag, Metric, RunTag

        run_id, model_id = entry.run_id, self._attach(entry.run_id, folder, config, step=result.steps)
        finals = [
            Metric(
                f"final/{row.method}/{SELECTED * bool(row.selected_episodes)}{key}",
                value,
                ended_at,
                result.steps,
                model_id=model_id,
            )
            for row in result.evaluations
            for key in ("score", "return_mean", *(OF_SELECTED if row.selected_episodes else ()))
            if (value := getattr(row, key)) is not None
        ]
        tags = _commit_tags(result.commit) | {"aepo.machine": result.machine}
        tags["aepo.schema_version"] = str(SCHEMA_VERSION)  # these and `final/` are what `aepo report mlflow:` reads
        tags |= {f"aepo.{key}": str(value) for key in MEASURED if (value := getattr(result, key)) is not None}
        finals += [
            Metric(f"{DIAGNOSTICS}{each.name}", each.value, ended_at, result.steps) for each in result.diagnostics
        ]
        if doubts := trust.doubts(result.diagnostics):
            tags["aepo.doubts"] = "\n".join(doubts)[:5000]
        if result.error or entry.has_error:
            tags["aepo.error"] = (result.error or "")[:5000]
        self._client.log_batch(run_id, metrics=finals, tags=[RunTag(key, value) for key, value in tags.items()])
        if result.dataset_digest:
            source = json.dumps({"dataset": result.dataset, "source": result.source})
            inputs = DatasetEntity(result.dataset, result.dataset_digest, "minari", source)
            dataset = DatasetInput(inputs, tags=[InputTag("mlflow.data.context", "training")])
            self._client.log_inputs(run_id, datasets=[dataset])

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
            warn_of(self, f"does not store the files of {config.name}", error)
            return None
        finally:
            utils._artifact_repos_cache.clear()  # of up to 1,024 runs and models, each with queues and pools of threads
        self._attach_failures = 0
        return model_id

    def close(self, statuses: Sequence[str]) -> None:
        """End the sweep's own run, which keeps its plan and runs.parquet, by its runs' statuses."""
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


def _local(address: str) -> Path:
    return Path(url2pathname(urlsplit(address).path))
