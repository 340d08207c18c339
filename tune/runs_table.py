"""Rows of runs.parquet: one per planned run, whether it finished, failed or is missing."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aepo import files
from aepo.config import RunConfig, flatten, identifying_fields
from aepo.results import SCHEMA_VERSION, Row, schema
from aepo.runs import rundir
from tune.plan import run_folder

RUNS = "runs.parquet"
ROWS_AT_ONCE = 200
"""Rows in memory at a time while they are written."""


def collect_rows(
    sweep: Path,
    plan: Sequence[RunConfig],
    *,
    errors: Mapping[str, str] | None = None,
    mlflow_run_ids: Mapping[str, str] | None = None,
) -> list[Row]:
    """Return one row per planned run; see `each_row`."""
    return list(each_row(sweep, plan, errors=errors, mlflow_run_ids=mlflow_run_ids))


def each_row(
    sweep: Path,
    plan: Sequence[RunConfig],
    *,
    errors: Mapping[str, str] | None = None,
    mlflow_run_ids: Mapping[str, str] | None = None,
) -> Iterator[Row]:
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
        if result is None:
            result = rundir.describe(config, folder)
            if errors and config.name in errors:
                result = dataclasses.replace(result, status="failed", error=errors[config.name])
        result = dataclasses.replace(result, folder=str(folder.relative_to(sweep)))
        yield Row(
            **vars(result),
            schema_version=SCHEMA_VERSION,
            mlflow_run_id=(mlflow_run_ids or {}).get(config.name),
            settings=settings_text(config),
            variant=config.variant,
        )


def settings_text(config: RunConfig) -> str:
    """Return the whole config but its seed as JSON: dotted keys and their values as text, equal for equal settings.

    Settings that came later have no key at their default, as in tables from before there were any.
    """
    flat = flatten(identifying_fields(config) | {"rounds": config.rounds})
    return json.dumps({key: str(value) for key, value in flat.items() if key != "seed"}, sort_keys=True)


def write_rows(sweep: Path, rows: Iterable[Row]) -> Path:
    """Write runs.parquet atomically and return its path; of thousands of rows a few are in memory at a time."""
    path = sweep / RUNS
    remaining = iter(rows)
    with files.replacing(path) as temporary, pq.ParquetWriter(temporary, schema()) as writer:
        while some := [dataclasses.asdict(row) for row in itertools.islice(remaining, ROWS_AT_ONCE)]:
            writer.write_table(pa.Table.from_pylist(some, schema=schema()))
    return path
