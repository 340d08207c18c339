"""The runs of one or more sweeps as one data frame, checked; how they were trained is not known here.

The schema (aepo/results.py) is the contract with the writer (`tune`). What is wrong is refused by name; a hole stays a
hole. A source is a sweep's folder, its runs.parquet, or `mlflow:EXPERIMENT`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aepo.documents import parse_json
from aepo.errors import DataError
from aepo.results import SCHEMA_VERSION, Row, optional, schema
from analysis.labels import Arm, in_order

FILE = "runs.parquet"
MLFLOW = "mlflow:"
"""Beginning of the name of a source that is an experiment of MLflow."""

SCHEMA = schema()
"""Columns of runs.parquet, one row per planned run; further columns are ignored."""

_STATUSES = ("finished", "failed", "missing")
_NESTED = ("evaluations", "curve", "grid", "diagnostics")
_MAX_NAMED = 20
"""Faults of a kind that a message names; it counts the others."""
_KEY = ["run", "task", "suite", "seed", "status"]


def load_runs(*sources: Path | str, tracking_uri: str = "", allow_missing: bool = False) -> pd.DataFrame:
    """Return all planned runs, sorted by arm, suite, task and seed, so that the order of the input has no effect.

    A table is tasks x arms x seeds: where the sources hold no row of one of these, a row `missing` stands for it.

    Args:
        sources: folders of sweeps, their runs.parquet, or `mlflow:EXPERIMENT`.
        tracking_uri: MLflow's, for the last; empty = MLFLOW_TRACKING_URI.
        allow_missing: take a finished run without a finite result as one that failed, instead of refusing it.

    Raises:
        DataError: if a table is missing or broken, of another schema version, or lacks a column; if a run or
            an arm's seed of a task stands in it twice; if the runs of one task differ in data, or those of one arm in
            settings; if a finished run has no result, or no score although its data set has reference scores.
    """
    tables = [_read_source(str(source), tracking_uri, allow_missing) for source in sources]
    if not tables or not sum(table.num_rows for table in tables):
        raise DataError(
            f"no runs in {', '.join(map(str, sources))}; wanted at least one planned run: repeat `aepo sweep`"
        )
    whole = _with_holes(pa.concat_tables(tables))
    runs: pd.DataFrame = whole.drop_columns(list(_NESTED)).to_pandas()
    for name in _NESTED:  # stay Arrow's: a million points as Python objects would take a minute
        runs[name] = pd.arrays.ArrowExtensionArray(whole[name])
    runs = runs.sort_values(["suite", "task", "seed", "run"], ignore_index=True)
    places = {arm: place for place, arm in enumerate(in_order(arms(runs)))}
    order = np.argsort([places[arm] for arm in arms(runs)], kind="stable")
    runs = runs.iloc[order].reset_index(drop=True)
    _check_runs(runs)
    _check_results(runs[runs["status"] == "finished"])
    if allow_missing:
        for run, method in _without_number(runs[runs["status"] == "finished"]):
            reason = f"finished, but its evaluation of {method} has no finite number"
            runs.loc[runs["run"] == run, ["status", "error"]] = ["failed", reason]
            runs.loc[runs["run"] == run, ["score", "return_mean"]] = np.nan
    _check_numbers(runs[runs["status"] == "finished"])
    return runs


def evaluations(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and method, of runs of every status: the run's key and what was measured.

    `run_method` and `run_variant` are the run's own. Another method that runs of several arms have measured with the
    same seed (cloning is part of every guided run) stands there once, of the first arm. It is of no variant if all
    variants have measured the same, else of the run's: their settings have changed it.
    """
    frame = _explode(runs, "evaluations")
    others = frame["method"] != frame["run_method"]
    frame["variant"] = frame["run_variant"]
    for _, group in frame[others].groupby("method"):
        if _is_same_in_all_variants(group):
            frame.loc[group.index, "variant"] = ""
    again = frame.duplicated(["task", "seed", "method", "variant", "selected_episodes"]) & others
    return frame[~again].reset_index(drop=True)


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run, stage and step; of a step written twice (a resumed run) the last.

    `method` is the run's own, or whose policy it was along an earlier stage, as the clone's.
    """
    frame = _explode(runs, "curve")
    frame["method"] = frame["method"].fillna("").mask(lambda names: names == "", frame["run_method"])
    return frame.drop_duplicates(["run", "stage", "step"], keep="last", ignore_index=True)


def grids(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run, beta and guidance scale: the heat maps that the runs have evaluated."""
    return _explode(runs, "grid")


def diagnostics(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and diagnostic: what says whether to trust the run."""
    return _explode(runs, "diagnostics")


def clones(runs: pd.DataFrame) -> dict[str, float]:
    """Return run -> what its clone reached, the score or without references the return, of runs that measured one."""
    frame = _explode(runs, "evaluations")
    others = frame[frame["method"] != frame["run_method"]].drop_duplicates("run")
    return dict(zip(others["run"], others["score"].fillna(others["return_mean"]), strict=True))


def arms(frame: pd.DataFrame, prefix: str = "") -> list[Arm]:
    """Return the arm of each row; `prefix` is "run_" for the arm of the run that measured it."""
    columns = [frame[f"{prefix}method"], frame[f"{prefix}variant"]]
    return list(
        map(Arm, *columns, *([] if prefix or "selected_episodes" not in frame else [frame["selected_episodes"]]))
    )


def has_references(runs: pd.DataFrame) -> "pd.Series[bool]":
    """Return for each run whether a score can be computed: both reference returns are known."""
    return runs["ref_min"].notna() & runs["ref_max"].notna()


def _explode(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    items = pa.chunked_array(runs[column].array.__arrow_array__()).combine_chunks()
    owners = pc.list_parent_indices(items).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(items)
    names = {"method": "run_method", "variant": "run_variant"}
    frame = runs[[*_KEY, *names]].rename(columns=names).take(owners).reset_index(drop=True)
    for field in SCHEMA.field(column).type.value_type:
        values = pc.struct_field(flat, field.name).to_pandas()
        frame[field.name] = values.astype(float) if pa.types.is_floating(field.type) else values
    if "selected_episodes" in frame:  # which tables from before do not have
        frame["selected_episodes"] = frame["selected_episodes"].fillna(0).astype(int)
    return frame


def _as_set(results: pd.DataFrame) -> pd.DataFrame:
    """Return the evaluations of runs' own methods as they were set before training."""
    return results[(results["method"] == results["run_method"]) & (results["selected_episodes"] == 0)]


def _is_same_in_all_variants(measured: pd.DataFrame) -> bool:
    """Return whether the variants agree on what they have measured: on every task a shared seed, and each equal."""
    first = measured.drop_duplicates(["task", "seed", "run_variant"])
    for _, group in first.groupby("task"):
        table = group.pivot(index="seed", columns="run_variant", values="return_mean")
        for name in table.columns[1:]:
            pairs = table[[table.columns[0], name]].dropna()
            if pairs.empty or (pairs.iloc[:, 0] != pairs.iloc[:, 1]).any():
                return False
    return True


def _with_holes(table: pa.Table) -> pa.Table:
    """Return the runs with a row for each task, arm and seed that the table has elsewhere, but not together."""
    tasks, methods, variants, seeds = (table[name].to_pylist() for name in ("task", "method", "variant", "seed"))
    columns = [tasks, list(map(Arm, methods, variants)), seeds]
    there = set(zip(*columns, strict=True))
    absent = [each for each in itertools.product(*map(dict.fromkeys, columns)) if each not in there]
    place = {task: row for row, task in reversed(list(enumerate(columns[0])))}
    known = {task: table.select(["suite", "source", "dataset"]).slice(row, 1) for task, row in place.items()}
    holes = [
        Row.unended(
            schema_version=SCHEMA_VERSION,
            run=f"{task} {arm} seed {seed}",
            task=task,
            **known[task].to_pylist()[0],
            seed=seed,
            method=arm.method,
            variant=arm.variant,
            error="no row of it in the given sweeps, which have this task, this method and this seed with others",
        )
        for task, arm, seed in absent
    ]
    return pa.concat_tables([table, _table(holes)]) if holes else table


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)


def _read_source(source: str, tracking_uri: str, allow_missing: bool) -> pa.Table:
    if source.startswith(MLFLOW):
        from analysis.mlflow_source import read_experiment

        rows = read_experiment(source.removeprefix(MLFLOW), tracking_uri, allow_missing=allow_missing)
        return _conform(_table(rows), source)
    path = Path(source)
    return _read(path / FILE if path.is_dir() else path)


def _read(file: Path) -> pa.Table:
    if not file.is_file():
        raise DataError(f"no runs at {file}; wanted the folder of a sweep, as `aepo sweep` writes it")
    try:
        table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet table ({_one_line(error)}); repeat `aepo sweep`") from error
    return _conform(table, str(file))


def _conform(table: pa.Table, source: str) -> pa.Table:
    """Return a table's columns in the types of the schema, which it must follow."""
    absent = [name for name in SCHEMA.names if name not in table.column_names]
    if required := [name for name in absent if name not in optional()]:
        raise DataError(f"{source} lacks {', '.join(required)}; wanted schema {SCHEMA_VERSION}: repeat `aepo sweep`")
    versions = sorted(map(str, set(table["schema_version"].to_pylist()) - {SCHEMA_VERSION}))
    if versions:
        raise DataError(
            f"{source} has schema version {', '.join(versions)}, wanted {SCHEMA_VERSION}; "
            "repeat `aepo sweep` with this version of aepo, or report with the version that wrote it"
        )
    for name in absent:
        table = table.append_column(name, pa.nulls(table.num_rows, SCHEMA.field(name).type))
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"{source} does not follow schema {SCHEMA_VERSION} ({_one_line(error)}); repeat `aepo sweep`"
        ) from error
    named = pc.fill_null(table["variant"], "")
    return table.set_column(table.column_names.index("variant"), SCHEMA.field("variant"), named)


def _check_runs(runs: pd.DataFrame) -> None:
    if twice := list(runs["run"][runs["run"].duplicated()]):
        raise DataError(f"run {_named(twice)} stands twice in the given sweeps, wanted once; give each sweep once")
    _check_settings(runs[runs["settings"].notna()])
    again = runs[runs.duplicated(["task", "method", "variant", "seed"])]
    seeds = zip(again["task"], arms(again), again["seed"], strict=True)
    if twice := [f"task {task} has two runs of {arm} with seed {seed}" for task, arm, seed in seeds]:
        raise DataError(
            f"{_named(twice, '; ')} and different settings, wanted one; report sweeps of different settings one by one"
        )
    odd = runs[~runs["status"].isin(_STATUSES)]
    if wrong := [f"run {row.run} has status {row.status!r}" for row in odd.itertuples()]:
        raise DataError(f"{_named(wrong, '; ')}, wanted one of {', '.join(_STATUSES)}")
    _check_equal(runs, ["task"], "suite", "source", "dataset")
    _check_equal(runs[runs["preset"] != ""], ["task", "method", "variant"], "preset")


def _check_settings(runs: pd.DataFrame) -> None:
    """Check that a task's runs of one arm have equal settings, whatever their seeds."""
    keys = ["task", "method", "variant"]
    kinds = runs.drop_duplicates([*keys, "settings"])
    for (task, method, variant), group in kinds[kinds.duplicated(keys, keep=False)].groupby(keys):
        arm = Arm(str(method), str(variant))
        first, second = group["run"].iloc[:2]
        one, other = map(_settings, group["run"].iloc[:2], group["settings"].iloc[:2])
        names = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
        values = [f"{name} ({one.get(name, 'none')} and {other.get(name, 'none')})" for name in names]
        raise DataError(
            f"the runs of {task} {arm} differ in settings, {first} and {second} in {_named(values)}; "
            "a mean needs equal ones: report them one by one"
        )


def _settings(run: str, text: str) -> dict[str, Any]:
    """Return a run's settings of the table."""
    try:
        settings = parse_json(text)
        if isinstance(settings, dict):
            return settings
    except ValueError:
        pass
    raise DataError(f"run {run} has settings {text[:40]!r} in the table, wanted a JSON object; repeat `aepo sweep`")


def _check_results(finished: pd.DataFrame) -> None:
    """Check what only finished runs have; the data of a run that failed early were perhaps never read."""
    _check_equal(finished, ["task"], "dataset_digest", "ref_min", "ref_max")
    results = _explode(finished, "evaluations")
    again = results[results.duplicated(["run", "method", "selected_episodes"])]
    if twice := [f"run {row.run} has two evaluations of {row.method}" for row in again.itertuples()]:
        raise DataError(f"{_named(twice, '; ')}, wanted one; evaluate it again")
    own = _as_set(results).rename(columns={"run_variant": "variant"})
    _check_equal(own, ["task", "method", "variant"], "beta", "guidance_scale")
    bare = finished[~finished["run"].isin(own["run"])]
    if without := [f"run {row.run} finished without an evaluation of {row.method}" for row in bare.itertuples()]:
        raise DataError(f"{_named(without, '; ')}; evaluate it again")


def _check_numbers(finished: pd.DataFrame) -> None:
    """Check that finished runs have finite results, the same in both places."""
    if holes := [f"run {run} finished, but its evaluation of {name}" for run, name in _without_number(finished)]:
        raise DataError(
            f"{_named(holes, ' has no finite number; ')} has no finite number; evaluate it again, or report with "
            "--allow-missing, which takes it as a run without a result"
        )
    results = _explode(finished, "evaluations")
    own = _as_set(results).set_index("run")
    says = own["score"].to_dict()
    measured = np.array([says[run] for run in finished["run"]])
    agrees = np.isclose(finished["score"].astype(float), measured, rtol=1e-6) | ~has_references(finished)
    if wrong := [
        f"run {row.run} has score {row.score}, but its evaluation of {row.method} says {says[row.run]}"
        for row in finished[~agrees].itertuples()
    ]:
        raise DataError(f"{_named(wrong, '; ')}; wanted the same number: repeat `aepo sweep`")


def _without_number(finished: pd.DataFrame) -> list[tuple[str, str]]:
    """Return run and method of each evaluation that lacks a finite return, or the score that it ought to have."""
    results = _explode(finished, "evaluations")
    scored = results["run"].isin(finished["run"][has_references(finished)])
    no_score = scored & ~_is_finite(results["score"])
    no_return = ~_is_finite(results["return_mean"]) | results["num_episodes"].isna()
    return list(results[no_score | no_return][["run", "method"]].itertuples(index=False, name=None))


def _check_equal(frame: pd.DataFrame, keys: list[str], *columns: str) -> None:
    for column in columns:
        kinds = frame.drop_duplicates([*keys, column])
        for _, group in kinds[kinds.duplicated(keys, keep=False)].groupby(keys):
            first, second = group.iloc[0], group.iloc[1]
            raise DataError(
                f"the runs of {' '.join(filter(None, first[keys]))} differ in {column}: {first[column]} in "
                f"{first['run']}, {second[column]} in {second['run']}; a mean needs equal ones: report them one by one"
            )


def _named(faults: Iterable[object], separator: str = ", ") -> str:
    """Return the faults, each once, in one line that does not grow without end."""
    texts = list(dict.fromkeys(map(str, faults)))
    more = [f"and {len(texts) - _MAX_NAMED:,} more"] if len(texts) > _MAX_NAMED else []
    return separator.join([*texts[:_MAX_NAMED], *more])


def _is_finite(values: "pd.Series[float]") -> "pd.Series[bool]":
    return values.abs() < np.inf


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
