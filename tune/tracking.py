"""The only MLflow writer: ships the runs' spools from the sweep's own process, never from a training loop.

A run of MLflow per fingerprint, found again by its tag. Rows are sent with the time at which they were
written, so sending one twice changes nothing; the offset on disk only saves work.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aepo import run
from aepo.config import RunConfig
from aepo.console import err
from tune.plan import run_folder

OFFSET = "mlflow.json"
BATCH = 500
"""Metrics per request, at most."""
TAG = "aepo.run"
TAGGED = ("task", "suite", "fingerprint", "method", "preset", "commit")


def default_uri(sweep: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or else a SQLite file in the sweep's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{sweep.resolve()}/mlflow.db"


class Tracker:
    """Ships what the runs of a plan have written so far; call `ship` now and then and `finish` at the end."""

    def __init__(self, sweep: Path, plan: Sequence[RunConfig], *, uri: str):
        """Make the store and the experiment, which is named like the sweep's folder."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._failure: type[Exception] = MlflowException
        self._sweep, self._plan, self.uri = sweep, plan, uri
        self._client = MlflowClient(uri)
        self._ids: dict[str, str] = {}
        self._closed: set[str] = set()
        name = f"aepo/{sweep.resolve().name}"
        experiment = self._client.get_experiment_by_name(name)
        artifacts = None if uri.startswith("http") else (sweep.resolve() / "mlartifacts").as_uri()
        self._experiment = experiment.experiment_id if experiment else self._client.create_experiment(name, artifacts)

    @property
    def run_ids(self) -> dict[str, str]:
        """Run name -> MLflow run id, of the runs that have one."""
        return dict(self._ids)

    def ship(self) -> bool:
        """Send what is new; return whether the tracking server took it. What it did not waits for the next call."""
        try:
            for config in self._plan:
                self._ship_run(config)
        except (self._failure, OSError) as error:
            err.print(
                f"[yellow]warning:[/] MLflow at {_without_secrets(self.uri)} does not answer; "
                f"metrics wait on disk ({type(error).__name__})"
            )
            return False
        return True

    def fail(self, config: RunConfig, reason: str) -> None:
        """Close the run of a planned run that ended without a result."""
        try:
            run_id = self._run_id(config)
            self._client.set_tag(run_id, "aepo.error", reason[:5000])
            self._client.set_terminated(run_id, "FAILED")
        except (self._failure, OSError):
            err.print(f"[yellow]warning:[/] MLflow could not be told that {config.name} failed")

    def _ship_run(self, config: RunConfig) -> None:
        folder = run_folder(self._sweep, config)
        if config.name in self._closed or not (folder / run.CONFIG).exists():
            return
        result = run.read_result(folder)  # before the spool: what the spool lacks then, the next call sends
        sent = _read_offset(folder)
        if sent.get("uri") != self.uri:
            sent = {"uri": self.uri, "offset": 0, "closed": False}
        run_id = self._run_id(config, sent.get("run_id"))
        if sent["closed"] and result is not None and sent.get("status") == result["status"]:
            self._closed.add(config.name)
            return
        sent["run_id"] = run_id
        offset = self._send_metrics(run_id, folder / run.METRICS, int(sent["offset"]))
        if offset != sent["offset"]:
            sent["offset"] = offset
            run.write_json(folder / OFFSET, sent)
        if result is not None:
            self._close(run_id, folder, result)
            run.write_json(folder / OFFSET, {**sent, "closed": True, "status": result["status"]})
            self._closed.add(config.name)

    def _run_id(self, config: RunConfig, known: str | None = None) -> str:
        if config.name in self._ids:
            return self._ids[config.name]
        if known is None:
            found = self._client.search_runs([self._experiment], f"tags.`{TAG}` = '{config.name}'")
            known = found[0].info.run_id if found else self._create(config)
        elif self._client.get_run(known).info.status != "RUNNING":
            folder = run_folder(self._sweep, config)
            if run.read_result(folder) is None:
                self._client.update_run(known, status="RUNNING")
        self._ids[config.name] = known
        return known

    def _create(self, config: RunConfig) -> str:
        from mlflow.entities import Param, RunTag

        facts = run.describe(config, run_folder(self._sweep, config))
        tags = {
            TAG: config.name,
            **{f"aepo.{key}": str(facts[key]) for key in TAGGED},
            "aepo.seed": str(config.seed),
            "mlflow.source.name": "aepo sweep",
            "mlflow.source.git.commit": str(facts["commit"]),
        }
        created = self._client.create_run(self._experiment, run_name=config.name)
        run_id: str = created.info.run_id
        self._client.log_batch(
            run_id,
            params=[Param(key, str(value)) for key, value in flatten(dataclasses.asdict(config)).items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        return run_id

    def _send_metrics(self, run_id: str, path: Path, offset: int) -> int:
        """Send the spool's whole lines after `offset`; return the new offset."""
        from mlflow.entities import Metric

        rows, end = run.read_spool(path, offset)
        metrics = [
            Metric(key, value, int(row["time"] * 1000), row["step"])
            for row in rows
            for key, value in row["metrics"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        return end

    def _close(self, run_id: str, folder: Path, result: dict[str, Any]) -> None:
        from mlflow.entities import Dataset as DatasetEntity
        from mlflow.entities import DatasetInput, InputTag, Metric

        now = int((folder / run.RESULT).stat().st_mtime * 1000)
        finals = {
            f"final/{row['method']}/{key}": row[key]
            for row in result["evaluations"]
            for key in ("score", "return_mean")
            if row[key] is not None
        }
        self._client.log_batch(
            run_id, metrics=[Metric(key, value, now, result["steps"]) for key, value in finals.items()]
        )
        if result["dataset_digest"]:
            entity = DatasetEntity(
                name=result["dataset"],
                digest=result["dataset_digest"],
                source_type="minari",
                source=json.dumps({"dataset": result["dataset"], "source": result["source"]}),
            )
            self._client.log_inputs(
                run_id, datasets=[DatasetInput(entity, tags=[InputTag("mlflow.data.context", "training")])]
            )
        for name in (run.CONFIG, run.RESULT, run.POLICY, run.GRID, "log.txt"):
            if (folder / name).exists():
                self._client.log_artifact(run_id, str(folder / name))
        if result["error"]:
            self._client.set_tag(run_id, "aepo.error", result["error"][:5000])
        self._client.set_terminated(run_id, "FINISHED" if result["status"] == "finished" else "FAILED")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"critic.expectile": 0.9} from nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_offset(folder: Path) -> dict[str, Any]:
    try:
        sent = json.loads((folder / OFFSET).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return sent if isinstance(sent, dict) else {}


def _without_secrets(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
