"""What a report says, built once from the runs; the renderers format it and decide nothing."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aepo import trust
from aepo.documents import parse_json
from aepo.files import read_text
from aepo.results import CLONING, Diagnostic
from analysis.aggregate import Aggregate, Interval, Profile, aggregate, complete_scores, profile
from analysis.compare import Difference, differences, missing, overall
from analysis.curves import Curve, HeatMap, heat_maps, learning_curves
from analysis.labels import Arm, colours
from analysis.load import arms, clones, diagnostics, evaluations
from analysis.published import PublishedScore
from analysis.scores import Score, suite_averages, task_scores
from analysis.tables import Results, best_results, results

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Normalized score of the last policy: mean ± standard error (seeds)"
BEST_TITLE = "Normalized score of the best evaluation on the way: mean ± standard error (seeds)"
BEST_NOTE = (
    "Best: each run's highest evaluation along its learning curve, the last one included. It is picked on the returns "
    "that it reports, so it flatters every method, the more the fewer episodes an evaluation has; the table of the "
    "last policy is the one to quote."
)
RANK_NOTE = "Bold: within one standard error of the row's highest mean."
SCALE_NOTE = f"{TITLE}; 0 = random policy, 100 = expert. {RANK_NOTE}"
AGGREGATE_TITLE = "Over all tasks: value (95 % interval)"
AGGREGATE_NOTE = (
    "Methods with every score of every task. IQM: mean of the middle half of all scores; median and mean: of the "
    "tasks' means; optimality gap: what scores lack to 100. Intervals: stratified bootstrap over seeds, 2,000 "
    "resamples (arXiv 2108.13264)."
)
PAIRED_NOTE = (
    "Difference: second less first, with 95 % interval (Student's; of the seeds' differences where both sides have the "
    "seeds, else Welch's). About one row in twenty is told higher or lower by chance."
)
DOUBT_TITLE = "Runs in doubt"
DOUBT_NOTE = "A bound that a run has passed says where to look next; its numbers stand in the tables as they are."
MANIFEST = "sweep.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One planned run in the list of runs."""

    status: str
    task: str
    arm: Arm
    seed: int
    score: float
    """Normalized score; NaN without one."""
    return_mean: float
    """Mean return per episode; NaN without a result."""
    cloned: float
    """Score, or without references return, of the policy at guidance scale 0; NaN where none was measured."""
    steps: float
    """Gradient steps, all stages together; NaN if not recorded."""
    seconds: float
    """Wall-clock time; NaN if not recorded."""
    started_at: str
    error: str
    source: str
    commit: str
    mlflow_run_id: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """What a report says; a text that is not there is empty."""

    heading: str
    arms: tuple[Arm, ...]
    """All arms that anything is told of."""
    colours: Mapping[Arm, str]
    """Arm -> #RRGGBB."""
    suites: Mapping[str, tuple[str, ...]]
    """Suite -> its tasks."""
    scores: tuple[Score, ...]
    table: Results
    """Final scores with their ranks, averages and footnotes."""
    best: Results | None
    """Scores of the best evaluations; None if no run was evaluated on the way."""
    aggregates: tuple[Aggregate, ...]
    """One per arm that is complete on all of several tasks; empty for one task."""
    profiles: Mapping[Arm, Profile]
    """The performance profiles of the arms in `aggregates`."""
    curves: tuple[Curve, ...]
    without_curve: tuple[str, ...]
    """Tasks of which no run was evaluated on the way."""
    heat_maps: tuple[HeatMap, ...]
    holes: tuple[str, ...]
    """A line for each run without a result."""
    doubts: tuple[str, ...]
    """A line for each bound that a run has passed (aepo/trust.py)."""
    protocol: tuple[str, ...]
    """Lines that say how the numbers were made."""
    tasks: tuple[Mapping[str, str], ...]
    """Per task its data, its reference returns and how guided methods sample, by the heads of the columns."""
    runs: tuple[RunRow, ...]
    manifests: Mapping[str, Any]
    """Source -> its JSON document, of the runs' settings the first of each arm alone."""
    run_address: str
    """MLflow's address of a run, less its id; empty = no links."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a paired comparison says."""

    names: tuple[str, str]
    """The two sides, as they were given."""
    commits: tuple[str, str]
    rows: tuple[Difference, ...]
    notes: tuple[str, ...]
    """A line for each task and arm, or seed of it, that only one side has."""
    means: Mapping[Arm, Interval]
    """Mean difference over the tasks, of arms that are paired on every task."""


def build_report(
    runs: "pd.DataFrame",
    *,
    sources: Sequence[Path] = (),
    published: Mapping[str, Sequence[PublishedScore]] | None = None,
    tracking_uri: str = "",
) -> ReportData:
    """Return what a report of runs says.

    Args:
        runs: of `analysis.load.load_runs`.
        sources: what they were read from, for the manifests beside it.
        published: column -> its cells.
        tracking_uri: MLflow's; runs are linked if it is http(s), MLFLOW_TRACKING_URI if empty.
    """
    scores = task_scores(runs)
    curves = learning_curves(runs)
    aggregates = aggregate(scores) if runs["task"].nunique() > 1 else []
    levels = _levels(scores)
    shown = tuple(dict.fromkeys([*arms(runs), *(curve.arm for curve in curves), *(score.arm for score in scores)]))
    recorded = runs.groupby("task")["curve"].agg(lambda column: any(map(bool, column.dropna().map(len))))
    return ReportData(
        heading=f"AEPO: {_count(runs['task'].nunique(), 'task')}, {_count(runs['seed'].nunique(), 'seed')}",
        arms=shown,
        colours=colours(shown),
        suites={str(suite): tuple(dict.fromkeys(group["task"])) for suite, group in runs.groupby("suite")},
        scores=tuple(scores),
        table=results(runs, scores, suite_averages(scores), published or {}),
        best=best_results(scores),
        aggregates=tuple(aggregates),
        profiles={arm: profile(found, levels) for arm, found in complete_scores(scores).items()} if aggregates else {},
        curves=tuple(curves),
        without_curve=tuple(str(task) for task, any_of_it in recorded.items() if not any_of_it),
        heat_maps=tuple(heat_maps(runs)),
        holes=tuple(hole_lines(runs)),
        doubts=tuple(_doubt_lines(runs)),
        protocol=tuple(_protocol(runs)),
        tasks=tuple(_task_rows(runs)),
        runs=tuple(_run_rows(runs)),
        manifests=_manifests(sources, runs),
        run_address=_run_address(tracking_uri),
    )


def build_comparison(names: tuple[str, str], sides: Sequence["pd.DataFrame"]) -> Comparison:
    """Return what a comparison of two sets of runs says: the second less the first.

    Args:
        names: of the sides.
        sides: the runs of each, of `analysis.load.load_runs`.
    """
    before, after = (task_scores(runs) for runs in sides)
    rows = differences(before, after)
    first, second = (listed(runs["commit"].dropna()) for runs in sides)
    return Comparison(
        names=names,
        commits=(first, second),
        rows=tuple(rows),
        notes=tuple(missing(rows, names)),
        means=overall(rows, before, after),
    )


def hole_lines(runs: "pd.DataFrame") -> list[str]:
    """Return a line for each planned run without a result: what became of it, which it is and why."""
    lost = runs[runs["status"] != "finished"]
    lines = []
    for row, arm in zip(lost.to_dict("records"), arms(lost), strict=True):
        reason = " ".join(row["error"].split()) if isinstance(row["error"], str) else ""
        reason = reason or ("never ran to an end" if row["status"] == "missing" else "no reason recorded")
        lines.append(f"{row['status']}: {row['task']} {arm} seed {row['seed']} ({row['run']}): {reason}")
    return lines


def _doubt_lines(runs: "pd.DataFrame") -> list[str]:
    """Return a line for each bound that a finished run has passed."""
    finished = runs[runs["status"] == "finished"]
    measured: dict[str, list[Diagnostic]] = {}
    for run, name, value in diagnostics(finished)[["run", "name", "value"]].itertuples(index=False, name=None):
        measured.setdefault(run, []).append(Diagnostic(name=name, value=value))
    planned = zip(finished["run"], finished["task"], arms(finished), finished["seed"], strict=True)
    return [
        f"{task} {arm} seed {seed} ({run}): {text}"
        for run, task, arm, seed in planned
        for text in trust.doubts(measured.get(run, ()))
    ]


def listed(values: Iterable[object]) -> str:
    """Return the different values, sorted; a dash if there are none."""
    kinds = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    return ", ".join(f"{kind:,.10g}" if isinstance(kind, float) else str(kind) for kind in kinds) or "-"


def code(text: str) -> str:
    """Return text as Markdown shows code, in one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _levels(scores: Sequence[Score]) -> "np.ndarray[Any, Any]":
    """Return the scores at which profiles are told: the range of all, 0 to 100 at least."""
    found = [value for score in scores for value in score.scores if math.isfinite(value)]
    return np.linspace(min(0.0, *found, 0.0), max(100.0, *found, 100.0), 101)


def _clone_line(measured: "pd.DataFrame") -> list[str]:
    """Return in a line, if cloning stands in the table, of which methods' runs: their clones may act in other ways."""
    cloned = measured[(measured["method"] == CLONING) & (measured["run_method"] != CLONING)]
    labels = dict.fromkeys(Arm(str(method)).label for method in cloned["run_method"])
    if not labels:
        return []
    return [f"Diffusion BC is the behaviour model alone, with guidance scale 0, in runs of {', '.join(labels)}."]


def _protocol(runs: "pd.DataFrame") -> list[str]:
    """Return how the numbers were made, in lines; code in them stands between backticks."""
    finished = runs[runs["status"] == "finished"]
    measured = evaluations(finished)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(runs["status"].value_counts().items()))
    return [
        f"Runs: {len(runs)} planned ({counts}); preset {listed(runs['preset'])}.",
        f"Seeds: {listed(runs['seed'])}. The standard error is that of the mean over seeds: their standard deviation "
        "(divisor n - 1) over the root of their number.",
        f"Evaluation: the last policy of a run, {listed(measured['num_episodes'])} episodes for each method.",
        f"Gradient steps: {listed(finished['steps'].dropna().astype(float))} per run, all stages together.",
        *_clone_line(measured),
        "Score: 100 (return - random) / (expert - random), with the reference returns below.",
        f"Commit: {listed(code(str(commit)) for commit in finished['commit'].dropna())}.",
    ]


def _task_rows(runs: "pd.DataFrame") -> list[dict[str, str]]:
    """Return for each task its data, its reference returns and how each guided arm samples."""
    rows = []
    for task, planned in runs.groupby("task", sort=False):
        done = planned[planned["status"] == "finished"]
        measured = evaluations(done)
        is_own = (measured["method"] == measured["run_method"]) & (measured["selected_episodes"] == 0)
        own = measured[is_own & measured["beta"].notna()]
        known = done if len(done) else planned
        settings = [
            f"{Arm(str(method), str(variant)).label}: {listed(group['beta'])}, {listed(group['guidance_scale'])}"
            for (method, variant), group in own.groupby(["method", "variant"], sort=False)
        ]
        rows.append(
            {
                "task": str(task),
                "source": listed(planned["source"]),
                "data set": listed(planned["dataset"]),
                "environment": listed(known["env_id"].dropna()) or "-",
                "random": listed(known["ref_min"].dropna()),
                "expert": listed(known["ref_max"].dropna()),
                "beta, guidance scale": "; ".join(settings) or "-",
                "digest": listed(known["dataset_digest"].dropna()),
            }
        )
    return rows


def _run_rows(runs: "pd.DataFrame") -> list[RunRow]:
    texts = ["started_at", "error", "commit", "mlflow_run_id"]
    numbers = ["score", "return_mean", "steps", "seconds"]
    plain = runs[["status", "task", "seed", "source"]].assign(
        **{name: runs[name].astype(object).where(runs[name].notna(), "") for name in texts},
        **{name: runs[name].astype(float) for name in numbers},
    )
    plain["cloned"] = runs["run"].map(clones(runs)).astype(float)
    rows = zip(plain.to_dict("records"), arms(runs), strict=True)
    return [RunRow(arm=arm, **{str(name): value for name, value in row.items()}) for row, arm in rows]


def _manifests(sources: Sequence[Path], runs: "pd.DataFrame") -> dict[str, Any]:
    known = dict(zip(runs["run"], map(str, arms(runs)), strict=True))
    found = {}
    for path in sources:
        file = (path if path.is_dir() else path.parent) / MANIFEST
        try:
            document = parse_json(read_text(file))
            first: dict[str, Any] = {}
            for name, settings in document["runs"].items():
                first.setdefault(known.get(name, settings["method"]), {"run": name, **settings})
            found[str(path)] = {**document, "runs": len(document["runs"]), "first run of each method": first}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a table may stand alone
    return found


def _run_address(tracking_uri: str) -> str:
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    is_web = uri.startswith(("http://", "https://"))
    return re.sub(r"//[^/@]*@", "//", uri).rstrip("/") + "/#/runs/" if is_web else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
