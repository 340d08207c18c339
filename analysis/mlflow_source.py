"""The runs of an MLflow experiment as rows of runs.parquet, from what `tune` has sent there: tags, params, metrics."""

import json
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from aepo.console import err, warn
from aepo.documents import parse_json
from aepo.errors import ConfigError, DataError
from aepo.results import DIAGNOSTICS, SCHEMA_VERSION, SELECTED, CurvePoint, Diagnostic, Evaluation, Row, policy_along

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, RunData

PAGE = 1000
"""Runs per answer of a search."""
THREADS = 8
"""Learning curves asked for at a time."""
MANIFEST = "sweep.json"
STATUS = {"FINISHED": "finished", "FAILED": "failed"}
"""MLflow's status -> a row's; any other is that of a run which never came to an end."""


def read_experiment(name: str, tracking_uri: str, *, allow_missing: bool) -> list[Row]:
    """Return one row per planned run of all sweeps of an experiment.

    A run that its sweep's manifest plans and MLflow does not know is a row `missing`.

    Args:
        name: of the experiment, as `aepo/mazes`.
        tracking_uri: empty = MLFLOW_TRACKING_URI.
        allow_missing: warn, where runs have not begun whose names MLflow does not know.

    Raises:
        ConfigError: without a tracking URI.
        DataError: if the server does not answer, has no such experiment, or its runs are not of this version; if a
            sweep plans more runs than MLflow can name.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError(f"no server to look for {name!r} on; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.is_file():  # MLflow would make it, or try to for minutes
        raise DataError(f"no MLflow store {file}; wanted the mlflow.db of a sweep, as sqlite:///sweeps/mazes/mlflow.db")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for logger in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            names = sorted(each.name for each in client.search_experiments(max_results=PAGE))
            raise DataError(f"MLflow has no experiment {name!r}; it has {', '.join(names)}")
        runs = list(_search(client, experiment.experiment_id))
        sweeps = [run for run in runs if "aepo.sweep" in run.data.tags and "aepo.run" not in run.data.tags]
        planned = [run for run in runs if run.data.tags.get("aepo.planned") != "false"]
        trained = [run for run in planned if "aepo.run" in run.data.tags]
        if not trained:
            raise DataError(f"the experiment {name!r} has no run that `aepo sweep` has tracked")
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda run: _row(client, run), trained)
            rows = list(track(found, "reading MLflow", len(trained), console=err, transient=True))
        for sweep in sweeps:
            known = {run.data.tags["aepo.run"] for run in trained if _sweep(run) == _sweep(sweep)}
            rows += _not_begun(client, sweep, known, allow_missing=allow_missing)
    except (MlflowException, SQLAlchemyError) as error:  # the latter from a file that is no database
        raise DataError(f"MLflow does not answer as wanted: {_without_secrets(str(error), uri)}") from error
    return rows


def _search(client: "MlflowClient", experiment: str) -> "Iterator[Run]":
    token = None
    while True:
        page = client.search_runs([experiment], max_results=PAGE, page_token=token, order_by=["start_time ASC"])
        yield from page
        if not (token := page.token):
            return


def _sweep(run: "Run") -> str:
    return str(run.data.tags.get("aepo.sweep", ""))


def _row(client: "MlflowClient", run: "Run") -> Row:
    """Return one run's row; of one that has not ended, its plan and its curve so far."""
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    status = STATUS.get(run.info.status, "missing")
    own = tags["aepo.method"]
    version = tags.get("aepo.schema_version", "")
    if status == "finished" and not version:
        raise DataError(
            f"run {tags['aepo.run']} in MLflow has no aepo.schema_version: an older aepo tracked it; "
            "report the sweep's folder instead"
        )
    if not params:
        raise DataError(
            f"run {tags['aepo.run']} in MLflow has no settings yet; wait for its sweep, or report its folder"
        )
    score, return_mean = (metrics.get(f"final/{own}/{key}") for key in ("score", "return_mean"))
    dataset = next((each.dataset for each in run.inputs.dataset_inputs), None) if run.inputs else None
    return Row.unended(
        schema_version=int(version) if version.isdecimal() else SCHEMA_VERSION,
        **{key: tags[f"aepo.{key}"] for key in ("run", "task", "suite", "fingerprint", "method", "preset")},
        seed=int(tags["aepo.seed"]),
        variant=tags.get("aepo.variant", ""),
        source=params["data.source"],
        dataset=params["data.dataset"],
        dataset_digest=dataset.digest if dataset else None,
        env_id=tags.get("aepo.env_id"),
        ref_min=float(tags["aepo.ref_min"]) if "aepo.ref_min" in tags else None,
        ref_max=float(tags["aepo.ref_max"]) if "aepo.ref_max" in tags else None,
        status=status,
        error=tags.get("aepo.error") or (None if status == "finished" else f"{run.info.status} in MLflow"),
        score=score,
        return_mean=return_mean,
        num_episodes=int(params["evaluation.num_episodes"]),
        steps=int(tags.get("aepo.steps", 0)),
        seconds=((run.info.end_time or run.info.start_time) - run.info.start_time) / 1000,
        evaluations=tuple(_evaluations(run.data)) if status == "finished" else (),
        curve=tuple(_curve(client, run)),
        diagnostics=tuple(
            Diagnostic(name=name.removeprefix(DIAGNOSTICS), value=value)
            for name, value in sorted(metrics.items())
            if name.startswith(DIAGNOSTICS)
        ),
        commit=tags.get("aepo.commit"),
        machine=tags.get("aepo.machine", ""),
        mlflow_run_id=run.info.run_id,
        settings=json.dumps({key: value for key, value in params.items() if key != "seed"}, sort_keys=True),
    )


def _evaluations(data: "RunData") -> Iterator[Evaluation]:
    """Yield the final evaluations that a run's metrics tell of, without episodes and their spread."""
    metrics, params, own = data.metrics, data.params, data.tags["aepo.method"]
    unknown: dict[str, Any] = {
        "return_std": math.nan,
        "num_episodes": int(params["evaluation.num_episodes"]),
        "episode_returns": (),
    }
    beta, scale = params.get("sampling.beta"), params.get("sampling.guidance_scale")
    is_guided = float(scale or 0) > 0
    for key in sorted(metrics):
        kind, _, rest = key.partition("/")
        method, _, measure = rest.partition("/")
        if kind == "final" and measure == "return_mean":
            yield Evaluation(
                method=method,
                beta=float(beta) if beta and is_guided else None,
                guidance_scale=0.0 if scale and method != own else float(scale) if scale and is_guided else None,
                score=metrics.get(f"final/{method}/score"),
                return_mean=metrics[key],
                **unknown,
            )
    begin = f"final/{own}/{SELECTED}"
    if f"{begin}return_mean" in metrics:
        yield Evaluation(
            method=own,
            score=metrics.get(f"{begin}score"),
            return_mean=metrics[f"{begin}return_mean"],
            beta=metrics[f"{begin}beta"],
            guidance_scale=metrics[f"{begin}guidance_scale"],
            nats=metrics[f"{begin}nats"],
            selected_episodes=int(metrics[f"{begin}selected_episodes"]),
            **unknown,
        )


def _curve(client: "MlflowClient", run: "Run") -> Iterator[CurvePoint]:
    """Yield the evaluations on the way, stage after stage, and the final one, at the steps of all stages together."""
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    steps, last_stage, offset = int(tags.get("aepo.steps", 0)), tags.get("aepo.last_stage", ""), 0
    for stage in tags.get("aepo.stages", "").split()[:-1]:
        if f"eval/{stage}/return_mean" in metrics:
            method = policy_along(stage, has_clone="sampling.guidance_scale" in params)
            yield from _points(client, run.info.run_id, stage, offset, f"eval/{stage}/", method)
        offset += int(params[f"{stage}.steps"])
    if "eval/return_mean" in metrics:
        offset = steps - int(params.get(f"{last_stage}.steps", 0))
        yield from _points(client, run.info.run_id, last_stage, offset, "eval/")
    final = f"final/{tags['aepo.method']}/"
    if f"{final}return_mean" in metrics:
        score, return_mean = metrics.get(f"{final}score"), metrics[f"{final}return_mean"]
        yield CurvePoint(stage=last_stage, step=steps, score=score, return_mean=return_mean)


def _points(
    client: "MlflowClient", run_id: str, stage: str, offset: int, begin: str, method: str = ""
) -> list[CurvePoint]:
    """Return the points of a learning curve along a stage, whose metrics begin like this, after `offset` steps."""
    scores = {point.step: point.value for point in client.get_metric_history(run_id, f"{begin}score")}
    return [
        CurvePoint(
            stage=stage,
            step=offset + point.step,
            score=scores.get(point.step),
            return_mean=point.value,
            method=method,
        )
        for point in client.get_metric_history(run_id, f"{begin}return_mean")
    ]


def _not_begun(client: "MlflowClient", sweep: "Run", known: set[str], *, allow_missing: bool) -> list[Row]:
    """Return a row for each planned run that MLflow does not know, by the manifest that a sweep stores at its end."""
    planned = int(sweep.data.tags.get("aepo.num_planned", len(known)))
    if MANIFEST not in {each.path for each in client.list_artifacts(sweep.info.run_id)}:
        if planned > len(known):
            fault = (
                f"the sweep {sweep.info.run_name} plans {planned} runs, of which MLflow knows {len(known)} and cannot "
                f"name the others before it has ended (it is {sweep.info.status})"
            )
            if not allow_missing:
                raise DataError(f"{fault}; wait, report its folder, or report with --allow-missing")
            warn(fault)
        return []
    from mlflow.artifacts import load_text

    try:
        planned_runs = parse_json(load_text(f"{sweep.info.artifact_uri}/{MANIFEST}"))["runs"].items()
        return [
            Row.unended(
                schema_version=SCHEMA_VERSION,
                run=name,
                **{key: config[key] for key in ("task", "suite", "seed", "method", "preset")},
                variant=config.get("variant", ""),
                fingerprint=name.rpartition("-")[2],
                source=config["data"]["source"],
                dataset=config["data"]["dataset"],
            )
            for name, config in planned_runs
            if name not in known
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the artifact {MANIFEST} of the sweep {sweep.info.run_name} is not a sweep's plan "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}), wanted runs by name; report its folder"
        ) from error


def _without_secrets(text: str, uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    shown = f"{scheme}{separator}{rest.rpartition('@')[2]}"
    return " ".join(text.replace(uri, shown).split())[:500]
