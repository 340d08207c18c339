"""The report of a search: what was found, what it is worth on fresh seeds, where trials were stopped, what it cost.

It reads search.json alone, so that it can be made while the search runs; optuna's importance and plots are used as they
are.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aepo.errors import CheckpointError, ConfigError, DataError
from aepo.trials import SEARCH, Outcome, SearchFile, State, count_steps, read_search, trial_rows, words_of

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

COLOURS: dict[State, str] = {
    "finished": "#0072B2",
    "stopped": "#999999",
    "failed": "#D55E00",
    "running": "#E69F00",
    "waiting": "#F0E442",
}
"""State of a trial -> its colour, one of Okabe and Ito's."""


@dataclasses.dataclass(frozen=True)
class SearchReport:
    """What a report says, for printing."""

    confirmed: list[dict[str, str]]
    """A row for the found and one for the default settings, and their difference."""
    trials: list[dict[str, str]]
    """A row per trial, the best first."""
    notes: list[str]


def is_search(folder: Path) -> bool:
    """Return whether a folder is that of a search."""
    return (folder / SEARCH).exists()


def write_search_report(search: Path, out: Path, *, against: Path | None = None) -> SearchReport:
    """Write report.md and its figures into `out` and return what they say; equal input, equal bytes.

    Args:
        search: folder of `aepo search`.
        out: folder of the report.
        against: another search of the same tasks, compared at equal gradient steps.

    Raises:
        DataError: if search.json is not one of this version.
        ConfigError: if `out` cannot be a folder, or the searches are of different tasks.
    """
    document = _read(search)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be a folder ({error.strerror}); give another with --out") from error
    begun = [trial for trial in document.trials if trial.rounds]
    notes = [*_compute_notes(document), *_optimism_notes(document)]
    figures = {}
    if begun:
        figures["trials"] = _draw_trials(document, out / "trials.png")
        curves = {search.name: document}
        if against is not None:
            other = _read(against)
            theirs, ours = other.spec.names, document.spec.names
            if theirs != ours:
                raise ConfigError(f"{against} searched {theirs}, {search} {ours}: not comparable")
            curves[against.name if against.name != search.name else str(against)] = other
            notes += _against_notes(curves)
        figures["best"] = _draw_best(curves, out / "best.png")
    study = _first_rounds(document)
    importance = _importance(study) if len(study.trials) > 2 else {}
    if importance:
        figures["importance"] = _draw_importance(importance, out / "importance.png")
        figures["settings"] = _draw_parallel(study, out / "settings.png")
    report = SearchReport(_confirm_rows(document), trial_rows(document.trials), notes)
    text = _markdown(search, document, report, importance, figures)
    (out / "report.md").write_text(text)
    return report


def _read(search: Path) -> SearchFile:
    try:
        return read_search(search)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _seeds(seeds: Sequence[int]) -> str:
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _compute_notes(document: SearchFile) -> list[str]:
    taken, reused, full = count_steps(document.trials)
    if not full:
        return ["No trial has begun."]
    states = [trial.state for trial in document.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states)
    notes = [
        f"{len(states)} trials ({counts}) took {taken:,} gradient steps, {taken / full:.1%} of the {full:,} that they "
        f"take in full; the stage store saved {reused:,}, stopping {full - taken - reused:,}."
    ]
    if document.select and document.confirm:
        select, confirm = (
            sum((row.steps or 0) - (row.steps_reused or 0) for row in rows)
            for rows in (
                [*document.select.best, *document.select.preset],
                [*document.confirm.found, *document.confirm.default],
            )
        )
        notes.append(
            f"Selection on {_seeds(document.spec.select_seeds)} took {select:,} more: {taken + select:,} "
            f"in all, {(taken + select) / full:.1%}. Found and default on fresh seeds took {confirm:,}, for the "
            "report only."
        )
    return notes


def _means(document: SearchFile, outcomes: Sequence[Outcome]) -> np.ndarray[Any, Any]:
    """Return the mean over tasks for each seed that has all, [seeds]."""
    by_seed: dict[int, list[float]] = {}
    for outcome in outcomes:
        if outcome.status == "finished" and outcome.value is not None:
            by_seed.setdefault(outcome.seed, []).append(outcome.value)
    return np.array([np.mean(v) for v in by_seed.values() if len(v) == len(document.spec.names)])


def _confirm_rows(document: SearchFile) -> list[dict[str, str]]:
    if document.confirm is None:
        return []
    rows = []
    for name, outcomes in (("found", document.confirm.found), ("default", document.confirm.default)):
        scores = _means(document, outcomes)
        rows.append(
            {
                "settings": name,
                "score": f"{scores.mean():.1f} ± {_standard_error(scores):.1f}" if len(scores) else "-",
                "seeds": f"{len(scores)} of {len(outcomes) // len(document.spec.names)}",
                "each": "  ".join(f"{score:.1f}" for score in scores),
            }
        )
    return rows


def _standard_error(scores: np.ndarray[Any, Any]) -> float:
    return float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan")


def _optimism_notes(document: SearchFile) -> list[str]:
    if document.select is None or document.confirm is None:
        return ["Not yet trained on other seeds: the scores below picked the settings and flatter them."]
    select = document.select
    own = document.trials[select.trial].score
    best, preset = (_means(document, rows) for rows in (select.best, select.preset))
    if not len(best):
        return [f"No run of trial {select.trial} on the selecting seeds has finished."]
    notes = [
        f"Trial {select.trial} scored {own:.1f} in the search and {best.mean():.1f} on the selecting seeds: an "
        f"optimism of {own - best.mean():.1f} from being picked (and from its rounds; here it is trained in one)."
    ]
    if len(preset):
        verdict = "its settings are what was found" if select.wins else "the preset's own settings stay"
        notes.append(f"The preset scored {preset.mean():.1f} on the same seeds: {verdict}.")
    fresh = _means(document, document.confirm.found)
    if len(fresh) and select.wins:
        notes.append(f"Found: {best.mean():.1f} on the selecting seeds, {fresh.mean():.1f} on fresh ones.")
    return notes


def _progress(document: SearchFile) -> tuple[list[int], list[float]]:
    """Return the gradient steps taken by all trials and the best full score so far, after each round that ended."""
    events = []
    for trial in document.trials:
        taken = [0, *trial.steps_taken]
        for number, row in enumerate(trial.rounds):
            last = number + 1 == len(trial.steps)
            events.append((row.at, taken[number + 1] - taken[number], row.score if last else None))
    steps, best = [0], [float("nan")]
    for _, more, score in sorted(events, key=lambda event: event[0]):
        steps.append(steps[-1] + more)
        best.append(best[-1] if score is None else float(np.nanmax([best[-1], score])))
    return steps, best


def _against_notes(curves: Mapping[str, SearchFile]) -> list[str]:
    progress = {name: _progress(document) for name, document in curves.items()}
    budget = min(steps[-1] for steps, _ in progress.values())
    reached = {
        name: best[max(i for i, step in enumerate(steps) if step <= budget)] for name, (steps, best) in progress.items()
    }
    text = ", ".join(f"{name} {score:.1f}" if score == score else f"{name} none yet" for name, score in reached.items())
    return [f"Best score of a whole trial at {budget:,} gradient steps: {text}."]


# -- figures -----------------------------------------------------------------------------------------------


def _save(figure: "Figure", path: Path) -> str:
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    return path.name


def _draw_trials(document: SearchFile, path: Path) -> str:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for trial in document.trials:
        shares = document.shares[: len(trial.rounds)]
        scores = [row.score for row in trial.rounds]
        ended = trial.state == "finished"
        axes.plot(shares, scores, color=COLOURS[trial.state], marker="o", markersize=4, lw=1.8 if ended else 0.8)
    states = [state for state in COLOURS if any(trial.state == state for trial in document.trials)]
    axes.legend([Line2D([], [], color=COLOURS[state], marker="o") for state in states], states, frameon=False)
    axes.set_xscale("log")
    axes.set_xticks(document.shares, [f"{share:.0%}" for share in document.shares])
    axes.minorticks_off()
    axes.set_xlabel("share of the gradient steps")
    axes.set_ylabel("score, best beta and guidance scale")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _draw_best(curves: Mapping[str, SearchFile], path: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5))
    axes = figure.add_subplot()
    for name, document in curves.items():
        steps, best = _progress(document)
        axes.step(np.array(steps) / 1000, best, where="post", marker=".", label=name)
    axes.set_xlabel("gradient steps taken by all trials, thousands")
    axes.set_ylabel("best score of a whole trial")
    if len(curves) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _first_rounds(document: SearchFile) -> "optuna.Study":
    """Return the first round of every trial as a study: the one budget that all have had."""
    import optuna
    from optuna.distributions import json_to_distribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {key: json_to_distribution(text) for key, text in document.space.varied.items()}
    study = optuna.create_study(direction="maximize")
    for trial in document.trials:
        if trial.rounds:
            study.add_trial(create_trial(params=trial.params, distributions=kinds, value=trial.rounds[0].score))
    return study


def _importance(study: "optuna.Study") -> dict[str, float]:
    """Return setting -> share of the variance of the first rounds' scores, by fANOVA; empty if they are all equal."""
    import optuna

    scores = [trial.value for trial in study.trials]
    if len(set(scores)) < 2 or not study.trials[0].params:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _draw_importance(importance: Mapping[str, float], path: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.5 + 0.4 * len(importance)))
    axes = figure.add_subplot()
    names = list(importance)[::-1]
    axes.barh(names, [importance[name] for name in names], color=COLOURS["finished"])
    axes.set_xlabel("share of the variance after round 1")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _draw_parallel(study: "optuna.Study", path: Path) -> str:
    import matplotlib as mpl

    mpl.use("agg")
    import optuna.visualization.matplotlib as pictures
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls it experimental
        axes = pictures.plot_parallel_coordinate(study, target_name="score, round 1")
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_size_inches(9, 4.5)
    axes.set_title("")
    bar = next(other for other in figure.axes if other.get_label() == "<colorbar>")  # drawn over the last axis' words
    left, bottom, width, height = bar.get_position().bounds
    bar.set_position((left + 0.12, bottom, width, height))
    name = _save(figure, path)
    plt.close(figure)
    return name


def _markdown(
    search: Path,
    document: SearchFile,
    report: SearchReport,
    importance: Mapping[str, float],
    figures: Mapping[str, str],
) -> str:
    spec = document.spec
    lines = [
        f"# Search {search.name}: {', '.join(spec.names)}",
        "",
        f"Preset `{spec.preset}`, {spec.trials} trials by {spec.sampler}, rounds at "
        f"{', '.join(f'{share:.0%}' for share in document.shares)} of the steps, "
        + (f"one in {spec.reduction} goes on from round {spec.grace} (ASHA)" if spec.grace else "none stopped")
        + f", {spec.num_episodes} episodes per evaluation, training seed {spec.seed}; commit "
        f"{document.commit}.",
        "",
        *[f"- {note}" for note in report.notes],
        "",
    ]
    if document.confirm is not None:
        lines += ["## Found against default, on fresh seeds", ""]
        lines += ["Mean over seeds ± standard error.", "", *_table(report.confirmed), ""]
        words = words_of(document.confirm.settings)
        lines += [f"Found: {words or 'the settings of the preset, which no trial beat'}.", ""]
    titles = {
        "trials": "Every trial over its rounds",
        "best": "The best whole trial against gradient steps",
        "importance": "Importance of the settings (fANOVA on the first rounds, which all trials have)",
        "settings": "Settings and scores after round 1",
    }
    for key, name in figures.items():
        lines += [f"## {titles[key]}", "", f"![{titles[key]}]({name})", ""]
        if key == "importance":
            lines += [*_table([{"setting": k, "share": f"{v:.2f}"} for k, v in importance.items()]), ""]
    lines += ["## Trials", "", *_table(report.trials), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row.values()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells]]
