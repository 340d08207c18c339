"""The runs of one or more sweeps as one data frame, checked; how they were trained is not known here.

`SCHEMA` is the contract with the writer (`tune`). What is wrong is refused by name; a hole stays a hole.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aepo.errors import DataError

SCHEMA_VERSION = 2
FILE = "runs.parquet"
METHODS = ("aepo", "aepo-analytic", "qgpo", "iql", "td3bc")
"""Order of the methods in tables; those that a run measures besides its own, and unknown ones, stand behind."""

_EVALUATION = {
    "method": pa.string(),
    "beta": pa.float64(),
    "guidance_scale": pa.float64(),
    "score": pa.float64(),
    "return_mean": pa.float64(),
    "return_std": pa.float64(),
    "num_episodes": pa.int64(),
    "episode_returns": pa.list_(pa.float64()),
}
_CURVE = {"stage": pa.string(), "step": pa.int64(), "score": pa.float64(), "return_mean": pa.float64()}
_NEVER_NULL = {
    "schema_version": pa.int64(),
    "run": pa.string(),
    "task": pa.string(),
    "suite": pa.string(),
    "source": pa.string(),
    "dataset": pa.string(),
    "seed": pa.int64(),
    "fingerprint": pa.string(),
    "method": pa.string(),
    "preset": pa.string(),
    "status": pa.string(),
}
_NULLABLE = {
    "dataset_digest": pa.string(),
    "env_id": pa.string(),
    "ref_min": pa.float64(),
    "ref_max": pa.float64(),
    "error": pa.string(),
    "score": pa.float64(),
    "return_mean": pa.float64(),
    "num_episodes": pa.int64(),
    "steps": pa.int64(),
    "seconds": pa.float64(),
    "evaluations": pa.list_(pa.struct(list(_EVALUATION.items()))),
    "curve": pa.list_(pa.struct(list(_CURVE.items()))),
    "commit": pa.string(),
    "started_at": pa.string(),
    "mlflow_run_id": pa.string(),
}
SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind in _NEVER_NULL.items()]
    + [pa.field(name, kind) for name, kind in _NULLABLE.items()]
)
"""Columns of runs.parquet, one row per planned run; further columns are ignored."""

_STATUSES = ("finished", "failed", "missing")
_KEY = ["run", "task", "suite", "seed", "status"]


def load_runs(*paths: Path) -> pd.DataFrame:
    """Return all planned runs, sorted by method, suite, task and seed, so that the order of the input has no effect.

    Args:
        paths: folders of sweeps, or their runs.parquet.

    Raises:
        DataError: if a table is missing or broken, of another schema version, or lacks a column; if a run or
            a method's seed of a task stands in it twice; if the runs of one task differ in data, or those of its
            methods in settings; if a
            finished run has no result, or no score although its data set has reference scores.
    """
    tables = [_read(path / FILE if path.is_dir() else path) for path in paths]
    runs: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    runs = runs.sort_values(["suite", "task", "seed", "run"], ignore_index=True)
    runs = runs.sort_values("method", key=rank, kind="stable", ignore_index=True)
    if runs.empty:
        raise DataError(
            f"no runs in {', '.join(map(str, paths))}; wanted at least one planned run: repeat `aepo sweep`"
        )
    _check_runs(runs)
    _check_results(runs[runs["status"] == "finished"])
    return runs


def evaluations(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and method, of runs of every status: the run's key and what was measured.

    `run_method` is the run's own method. Another one that runs of several methods have measured with the same seed
    (cloning is part of every guided run) stands there once: of the first of METHODS.
    """
    frame = _explode(runs, "evaluations", _EVALUATION)
    again = frame.duplicated(["task", "seed", "method"]) & (frame["method"] != frame["run_method"])
    return frame[~again].reset_index(drop=True)


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run, stage and step; of a step written twice (a resumed run) the last."""
    frame = _explode(runs, "curve", _CURVE)
    return frame.drop_duplicates(["run", "stage", "step"], keep="last", ignore_index=True)


def rank(methods: "pd.Series[str]") -> "pd.Series[int]":
    """Return a key that sorts methods as METHODS does, then by name."""
    others = sorted(set(methods) - set(METHODS))
    return methods.map({method: place for place, method in enumerate([*METHODS, *others])})


def has_references(runs: pd.DataFrame) -> "pd.Series[bool]":
    """Return for each run whether a score can be computed: both reference returns are known."""
    return runs["ref_min"].notna() & runs["ref_max"].notna()


def _explode(runs: pd.DataFrame, column: str, fields: Mapping[str, Any]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    keys = runs[[*_KEY, "method"]].rename(columns={"method": "run_method"})
    for key, items in zip(keys.to_dict("records"), runs[column], strict=True):
        found: Sequence[Mapping[str, Any]] = items if items is not None else ()
        rows += [{**{str(name): value for name, value in key.items()}, **item} for item in found]
    frame = pd.DataFrame(rows, columns=[*keys, *fields])
    return frame.astype({name: float for name, kind in fields.items() if pa.types.is_floating(kind)})


def _read(file: Path) -> pa.Table:
    if not file.is_file():
        raise DataError(f"no runs at {file}; wanted the folder of a sweep, as `aepo sweep` writes it")
    try:
        table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet table ({_one_line(error)}); repeat `aepo sweep`") from error
    if absent := [name for name in SCHEMA.names if name not in table.column_names]:
        raise DataError(f"{file} lacks {', '.join(absent)}; wanted schema {SCHEMA_VERSION}: repeat `aepo sweep`")
    versions = sorted(map(str, set(table["schema_version"].to_pylist()) - {SCHEMA_VERSION}))
    if versions:
        raise DataError(
            f"{file} has schema version {', '.join(versions)}, wanted {SCHEMA_VERSION}; "
            "repeat `aepo sweep` with this version of aepo, or report with the version that wrote it"
        )
    try:
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"{file} does not follow schema {SCHEMA_VERSION} ({_one_line(error)}); repeat `aepo sweep`"
        ) from error


def _check_runs(runs: pd.DataFrame) -> None:
    for run in runs["run"][runs["run"].duplicated()]:
        raise DataError(f"run {run} stands twice in the given sweeps, wanted once; give each sweep once")
    for task, method, seed in _first(runs[runs.duplicated(["task", "method", "seed"])], "task", "method", "seed"):
        raise DataError(
            f"task {task} has two runs of {method} with seed {seed} and different settings, wanted one; "
            "report sweeps of different settings one by one"
        )
    for run, status in _first(runs[~runs["status"].isin(_STATUSES)], "run", "status"):
        raise DataError(f"run {run} has status {status!r}, wanted one of {', '.join(_STATUSES)}")
    _check_equal(runs, ["task"], "suite", "source", "dataset")
    _check_equal(runs, ["task", "method"], "preset")


def _check_results(finished: pd.DataFrame) -> None:
    """Check what only finished runs have; the data of a run that failed early were perhaps never read."""
    _check_equal(finished, ["task"], "dataset_digest", "ref_min", "ref_max")
    results = _explode(finished, "evaluations", _EVALUATION)
    for run, method in _first(results[results.duplicated(["run", "method"])], "run", "method"):
        raise DataError(f"run {run} has two evaluations of {method}, wanted one; evaluate it again")
    own = results[results["method"] == results["run_method"]].set_index("run")
    _check_equal(own.reset_index(), ["task", "method"], "beta", "guidance_scale")
    for run, method in _first(finished[~finished["run"].isin(own.index)], "run", "method"):
        raise DataError(f"run {run} finished without an evaluation of {method}; evaluate it again")
    scored = results["run"].isin(finished["run"][has_references(finished)])
    no_score = scored & ~_is_finite(results["score"])
    no_return = ~_is_finite(results["return_mean"]) | results["num_episodes"].isna()
    for run, method in _first(results[no_score | no_return], "run", "method"):
        raise DataError(f"run {run} finished, but its evaluation of {method} has no finite number; evaluate it again")
    measured = own["score"].reindex(finished["run"]).to_numpy()
    agrees = np.isclose(finished["score"], measured, rtol=1e-6) | ~has_references(finished)
    for run, method, score in _first(finished[~agrees], "run", "method", "score"):
        raise DataError(
            f"run {run} has score {score}, but its evaluation of {method} says {own['score'][run]}; "
            "wanted the same number: repeat `aepo sweep`"
        )


def _check_equal(frame: pd.DataFrame, keys: list[str], *columns: str) -> None:
    for column in columns:
        kinds = frame.drop_duplicates([*keys, column])
        for _, group in kinds[kinds.duplicated(keys, keep=False)].groupby(keys):
            first, second = group.iloc[0], group.iloc[1]
            raise DataError(
                f"the runs of {' '.join(first[keys])} differ in {column}: {first[column]} in {first['run']}, "
                f"{second[column]} in {second['run']}; a mean needs equal ones: report them one by one"
            )


def _first(rows: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return list(rows[list(columns)].head(1).itertuples(index=False, name=None))


def _is_finite(values: "pd.Series[float]") -> "pd.Series[bool]":
    return values.abs() < np.inf


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
