"""The results table: what stands in which cell, which are best and what each mark means; nothing of how it is shown.

A cell is best if its mean is within one standard error of the row's highest mean. What cannot be compared is not
ranked: a cell with runs missing, published scores of other data or of a best checkpoint.
"""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from analysis.aggregate import STATISTICS, Aggregate, Interval
from analysis.compare import Difference
from analysis.labels import Arm
from analysis.published import NOTE, UNKNOWN, PublishedScore, cautions, is_comparable, match, stderr
from analysis.scores import Average, Score

if TYPE_CHECKING:
    import pandas as pd

PARTIAL, AS_RETURN = "*", "†"
"""Marks behind a cell; published ones have letters."""
SELECTED_NOTE = (
    "Selected: each run chose how strongly it is guided by so many episodes in the environment, which are not those of "
    "its score; other columns have had none, so it is not ranked with them."
)
Note: TypeAlias = tuple[str, str]
"""(mark, text) of a footnote; the mark is empty where the note is of the whole table."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A mean over seeds with its standard error."""

    mean: float = math.nan
    """Normalized score, or return where the mark says so; NaN = a hole."""
    stderr: float = math.nan
    spread: float = math.nan
    """What is printed behind ±: `stderr`, or of a published cell the spread that its source gives."""
    count: int = 0
    """Number of seeds; 0 = not said, not printed."""
    marks: tuple[str, ...] = ()
    is_best: bool = False

    @property
    def text(self) -> str:
        """Mean, spread and number of seeds; a dash for a hole."""
        if math.isnan(self.mean):
            return "-"
        spread = "" if math.isnan(self.spread) and not self.count else f" ± {number(self.spread)}"
        return number(self.mean) + spread + (f" ({self.count})" if self.count else "")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """An arm of ours, or a published method."""

    key: str
    """The arm as text, or METHOD@SOURCE."""
    label: str
    is_published: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A task, or the average or total over several."""

    suite: str
    name: str
    is_task: bool
    cells: Mapping[str, Cell]
    """Column -> its cell; an absent one is blank."""
    runs: str = ""
    """How many runs are planned, or how many of them have no result."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The table and the footnotes of its marks."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[Note]


def number(value: float) -> str:
    """Return a number with one decimal, a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1f}"


def signed(value: float) -> str:
    """Return a difference with its sign and one decimal, a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:+.1f}"


def results(
    runs: "pd.DataFrame",
    scores: Sequence[Score],
    averages: Sequence[Average],
    published: Mapping[str, Sequence[PublishedScore]],
) -> Results:
    """Return the table of final scores, a column per arm and then per published column."""
    columns = [Column(key=str(arm), label=arm.label) for arm in dict.fromkeys(score.arm for score in scores)]
    columns += [Column(key=name, label=_published_label(name), is_published=True) for name in published]
    selected = {str(score.arm) for score in scores if score.selected_episodes}
    suites: dict[str, dict[str, dict[str, Cell]]] = {}
    for score in scores:
        suites.setdefault(score.suite, {}).setdefault(score.task, {})[str(score.arm)] = _own_cell(score)
    own = {task: cells for tasks in suites.values() for task, cells in tasks.items()}
    sources = dict(zip(runs["task"], runs["source"], strict=True))
    letters: dict[str, str] = {}
    quoted = {task: _quoted(task, sources[task], published, letters) for task in own}
    lost = {str(task): _lost(planned) for task, planned in runs.groupby("task")}
    counts = runs["task"].value_counts()
    rows = []
    for suite, tasks in suites.items():
        rows += [
            Row(
                suite=suite,
                name=task,
                is_task=True,
                cells=_ranked(cells | quoted[task].cells, _complete(cells) - selected | quoted[task].comparable),
                runs=lost[task] or str(counts[task]),
            )
            for task, cells in tasks.items()
        ]
        rows += _average_rows(suite, averages, [quoted[task] for task in tasks], selected)
    if len({row.suite for row in rows}) > 1:
        rows += _average_rows("", averages, list(quoted.values()), selected)
    partial = {
        task: lost[task] or "not every run was evaluated with every method"
        for task, cells in own.items()
        if len(_complete(cells)) < len(cells)
    }
    notes = [
        *((PARTIAL, f"{task}: {why}; the numbers are of the runs that have a result, and are not ranked")
          for task, why in partial.items()),
        *((mark, text) for text, mark in letters.items()),
        *_notes(runs, scores, averages, published, with_letters=bool(letters)),
    ]  # fmt: skip
    return Results(columns=columns, rows=rows, notes=notes)


def best_results(scores: Sequence[Score]) -> Results | None:
    """Return the table of the curves' highest evaluations; None if no run was evaluated on the way."""
    if not any(score.best_scores and score.best_scores != score.scores for score in scores):
        return None
    arms = dict.fromkeys(score.arm for score in scores if score.best_scores)
    tasks: dict[tuple[str, str], dict[str, Cell]] = {}
    for score in scores:
        marks = (PARTIAL,) * bool(score.num_failed)
        spread, count = score.best_stderr, len(score.best_scores)
        cell = Cell(mean=score.best_mean, stderr=spread, spread=spread, count=count, marks=marks)
        tasks.setdefault((score.suite, score.task), {})[str(score.arm)] = cell
    rows = [
        Row(suite=suite, name=task, is_task=True, cells=_ranked(cells, _complete(cells)))
        for (suite, task), cells in tasks.items()
    ]
    is_partial = any(cell.marks for row in rows for cell in row.cells.values())
    notes = [(PARTIAL, "runs are missing; the numbers are of those that have a result, and are not ranked")]
    columns = [Column(key=str(arm), label=arm.label) for arm in arms]
    return Results(columns=columns, rows=rows, notes=notes if is_partial else [])


def aggregate_rows(found: Sequence[Aggregate]) -> list[dict[str, str]]:
    """Return what several tasks say together, a row per arm, as text by the heads of the columns."""
    first = found[0].arm.label if found else ""
    return [
        {
            "method": row.arm.label,
            "tasks": str(row.num_tasks),
            **{title: _interval(getattr(row, name), 1) for title, name in STATISTICS.items()},
            f"P({first} is better)": "-" if row.improvement is None else _interval(row.improvement, 2),
        }
        for row in found
    ]


def difference_rows(found: Sequence[Difference]) -> list[dict[str, str]]:
    """Return a paired comparison, a row per task and arm, as text by the heads of the columns."""
    return [
        {
            "suite": row.suite,
            "task": row.task,
            "method": row.arm.label,
            "first": number(row.before_mean) + AS_RETURN * row.is_return,
            "second": number(row.after_mean),
            "difference": signed(row.difference),
            "95 % interval": "-" if math.isnan(row.low) else f"{signed(row.low)} to {signed(row.high)}",
            "seeds": f"{len(row.seeds)} pairs" if row.is_paired else "not paired",
            "verdict": row.verdict,
        }
        for row in found
    ]


def mean_lines(means: Mapping[Arm, Interval]) -> list[str]:
    """Return a line for each arm that is paired on every task: its mean difference with the interval."""
    return [
        f"{arm.label}, mean over its tasks: {signed(found.value)} "
        f"({number(found.low)} to {number(found.high)}, stratified bootstrap over seeds)"
        for arm, found in means.items()
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Quoted:
    """The published cells of one task."""

    cells: dict[str, Cell]
    comparable: set[str]
    """Columns of the cells that may be ranked and averaged with ours."""


def _quoted(
    task: str, source: str, published: Mapping[str, Sequence[PublishedScore]], letters: dict[str, str]
) -> _Quoted:
    """Return what the published columns say of a task, and add to the letters, text -> mark, those of new footnotes."""
    cells, comparable = {}, set()
    for name, column in published.items():
        if (found := match(column, task)) is None:
            continue
        text = f"{name}: {'; '.join([found.source.source, *cautions(found, task, source)])}."
        mark = letters.setdefault(text, _letter(len(letters)))
        cells[name] = Cell(
            mean=found.mean, stderr=stderr(found), spread=found.std, count=found.source.seeds, marks=(mark,)
        )
        if is_comparable(found, task, source):
            comparable.add(name)
    return _Quoted(cells, comparable)


def _notes(
    runs: "pd.DataFrame",
    scores: Sequence[Score],
    averages: Sequence[Average],
    published: Mapping[str, Sequence[PublishedScore]],
    *,
    with_letters: bool,
) -> list[Note]:
    """Return the footnotes that no single cell has: what returns, published cells, holes and mixed data mean."""
    notes = []
    if any(score.is_return for score in scores):
        notes.append((AS_RETURN, "return per episode, not a score: the data set has no reference scores"))
    notes += [("", SELECTED_NOTE)] * any(score.selected_episodes for score in scores)
    if with_letters:
        notes.append(("", NOTE))
    if UNKNOWN in published:
        notes.append(("", f"{_published_label(UNKNOWN)}: its scores are not known here, so its cells are blank."))
    holes = [f"{average.suite or 'The whole'} has no average; {average.hole}" for average in averages if average.hole]
    notes += [("", hole) for hole in dict.fromkeys(holes)]
    if runs["source"].nunique() > 1:
        kinds = runs.drop_duplicates("task").groupby("source", sort=False)["task"]
        named = "; ".join(f"{source}: {', '.join(names)}" for source, names in kinds)
        notes.append(("", f"Data of different sources, whose scores are not comparable: {named}"))
    return notes


def _own_cell(score: Score) -> Cell:
    marks = (PARTIAL,) * (score.num_failed > 0) + (AS_RETURN,) * score.is_return
    mean, error = (
        (score.return_mean, score.return_stderr) if score.is_return else (score.score_mean, score.score_stderr)
    )
    return Cell(mean=mean, stderr=error, spread=error, count=len(score.seeds), marks=marks)


def _complete(cells: Mapping[str, Cell]) -> set[str]:
    """Return the keys of the cells that lack no run."""
    return {key for key, cell in cells.items() if PARTIAL not in cell.marks}


def _ranked(cells: Mapping[str, Cell], rankable: set[str]) -> dict[str, Cell]:
    """Return the cells, those of the rankable that are within one standard error of the highest marked as best."""
    ranked = {key: cell for key, cell in cells.items() if key in rankable and not math.isnan(cell.mean)}
    if len(ranked) < 2:
        return dict(cells)
    top = max(ranked.values(), key=lambda cell: cell.mean)
    floor = top.mean - (0.0 if math.isnan(top.stderr) else top.stderr)
    best = {key for key, cell in ranked.items() if cell.mean >= floor}
    return {key: dataclasses.replace(cell, is_best=key in best) for key, cell in cells.items()}


def _average_rows(suite: str, averages: Sequence[Average], quoted: Sequence[_Quoted], selected: set[str]) -> list[Row]:
    """Return the rows of the average and of the total; a published column has them if all its cells compare.

    Args:
        suite: empty = over all suites.
        averages: of ours.
        quoted: the published cells of each task of the suite.
        selected: columns that are not ranked, because their runs chose how to act in the environment.
    """
    means, totals = {}, {}
    for average in averages:
        if average.suite == suite and not average.hole:
            error = average.score_stderr
            means[str(average.arm)] = Cell(mean=average.score_mean, stderr=error, spread=error)
            totals[str(average.arm)] = Cell(mean=average.total)
    count = len(quoted)
    for name in (name for name in quoted[0].cells if all(name in each.comparable for each in quoted)):
        cells = [each.cells[name] for each in quoted]
        error = math.hypot(*(cell.stderr for cell in cells)) / count
        mean = sum(cell.mean for cell in cells) / count
        means[name] = Cell(mean=mean, stderr=error, spread=error)
        totals[name] = Cell(mean=mean * count)
    names = (f"average of {count}", f"total of {count}")
    ranked = _ranked(means, set(means) - selected), totals
    return [
        Row(suite=suite or "all", name=name, is_task=False, cells=of) for name, of in zip(names, ranked, strict=True)
    ]


def _lost(planned: "pd.DataFrame") -> str:
    """Return how many of the planned runs have no result, as "1 of 2 failed"; empty if all have."""
    counts = planned["status"].value_counts()
    return ", ".join(
        f"{counts[status]} of {len(planned)} {status}" for status in ("failed", "missing") if status in counts
    )


def _published_label(name: str) -> str:
    return f"{name} (published)" if "@" not in name else f"{name.partition('@')[0]} ({name.partition('@')[2]})"


def _letter(place: int) -> str:
    """Return the mark of a footnote: a to z, then aa, ab, ..."""
    letters = string.ascii_lowercase
    return (
        letters[place] if place < len(letters) else letters[place // len(letters) - 1] + letters[place % len(letters)]
    )


def _interval(found: Interval, digits: int) -> str:
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})".replace("nan", "-")
