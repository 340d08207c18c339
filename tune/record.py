"""Rows of runs.parquet: one per planned run, whether it finished, failed or is missing."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aepo import rundir
from aepo.config import RunConfig, flatten
from tune.plan import run_folder

RUNS = "runs.parquet"
SCHEMA_VERSION = 2
ROWS_AT_ONCE = 200
"""Held while they are written."""
EVALUATION = pa.struct(
    [
        ("method", pa.string()),
        ("beta", pa.float64()),
        ("guidance_scale", pa.float64()),
        ("score", pa.float64()),
        ("return_mean", pa.float64()),
        ("return_std", pa.float64()),
        ("num_episodes", pa.int64()),
        ("episode_returns", pa.list_(pa.float64())),
    ]
)
POINT = pa.struct(
    [("stage", pa.string()), ("step", pa.int64()), ("score", pa.float64()), ("return_mean", pa.float64())]
)
CELL = pa.struct(
    [
        ("beta", pa.float64()),
        ("guidance_scale", pa.float64()),
        ("score", pa.float64()),
        ("return_mean", pa.float64()),
        ("num_episodes", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("schema_version", pa.int64()),
        *[
            (name, pa.string())
            for name in [
                "run",
                "task",
                "suite",
                "source",
                "dataset",
                "dataset_digest",
                "env_id",
                "fingerprint",
                "method",
                "preset",
            ]
        ],
        ("status", pa.string()),
        ("error", pa.string()),
        ("seed", pa.int64()),
        *[(name, pa.float64()) for name in ["ref_min", "ref_max", "score", "return_mean", "seconds"]],
        *[(name, pa.int64()) for name in ["num_episodes", "steps"]],
        ("evaluations", pa.list_(EVALUATION)),
        ("curve", pa.list_(POINT)),
        ("grid", pa.list_(CELL)),
        *[(name, pa.string()) for name in ["commit", "version", "machine", "started_at", "mlflow_run_id", "folder"]],
        ("settings", pa.string()),
        ("variant", pa.string()),
    ]
)


def collect_rows(
    sweep: Path,
    plan: Sequence[RunConfig],
    *,
    errors: Mapping[str, str] | None = None,
    mlflow_run_ids: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per planned run; see `each_row`."""
    return list(each_row(sweep, plan, errors=errors, mlflow_run_ids=mlflow_run_ids))


def each_row(
    sweep: Path,
    plan: Sequence[RunConfig],
    *,
    errors: Mapping[str, str] | None = None,
    mlflow_run_ids: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one row per planned run.

    Args:
        sweep: folder of the sweep.
        plan: what ought to exist.
        errors: run name -> why a run without a result has none.
        mlflow_run_ids: run name -> id.
    """
    for config in plan:
        folder = run_folder(sweep, config)
        result = rundir.read_result(folder)
        row = rundir.describe(config, folder) if result is None else result
        if result is None and errors and config.name in errors:
            row |= {"status": "failed", "error": errors[config.name]}
        row["mlflow_run_id"] = (mlflow_run_ids or {}).get(config.name)
        row["folder"] = str(folder.relative_to(sweep))
        yield {"schema_version": SCHEMA_VERSION, **row, "settings": settings_text(config), "variant": config.variant}


def settings_text(config: RunConfig) -> str:
    """Return the whole config but its seed as JSON: dotted keys and their values as text, equal for equal settings.

    Without a variant there is no key of it, as in tables from before there were variants.
    """
    unnamed = ("seed",) if config.variant else ("seed", "variant")
    flat = flatten(dataclasses.asdict(config))
    return json.dumps({key: str(value) for key, value in flat.items() if key not in unnamed}, sort_keys=True)


def write_rows(sweep: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write runs.parquet atomically and return its path; of thousands of rows a few are in memory at a time."""
    path = sweep / RUNS
    remaining = iter(rows)
    with rundir.replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        while some := [dict(row) for row in itertools.islice(remaining, ROWS_AT_ONCE)]:
            writer.write_table(pa.Table.from_pylist(some, schema=SCHEMA))
    return path
