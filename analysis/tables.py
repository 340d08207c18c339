"""The results table: what stands in which cell, which are best, what each mark means; and its Markdown and LaTeX.

A cell is best if its mean is within one standard error of the row's highest mean. What cannot be compared is not
ranked: a cell with runs missing, published scores of other data or of a best checkpoint.
"""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from analysis.published import NOTE, UNKNOWN, Published, cautions, is_comparable, match, stderr

if TYPE_CHECKING:
    import pandas as pd

    from analysis.scores import Average, Score

PARTIAL, AS_RETURN = "*", "†"
"""Marks behind a cell; published ones have letters."""
LABELS = {
    "aepo": "AEPO",
    "aepo-analytic": "AEPO analytic",
    "qgpo": "QGPO",
    "iql": "IQL",
    "td3bc": "TD3+BC",
    "diffusion-bc": "diffusion BC",
}
"""Method -> its name in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A mean over seeds with its standard error."""

    mean: float = math.nan
    """Normalized score, or return where the mark says so; NaN = a hole."""
    stderr: float = math.nan
    spread: float = math.nan
    """What is printed behind ±: `stderr`, or of a published cell the spread that its source gives."""
    count: int = 0
    """Seeds; 0 = not said, not printed."""
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
    """A method of ours, or a published one."""

    key: str
    """Method, or METHOD@SOURCE."""
    label: str
    is_published: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A task, or the average or total over several."""

    suite: str
    name: str
    is_task: bool
    cells: Mapping[str, Cell]
    """By column; what is absent is blank."""
    runs: str = ""
    """How many runs are planned, or how many of them have no result."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The table and the footnotes of its marks."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[tuple[str, str]]
    """(mark, text); the mark is empty where a note is of the whole table."""


def label(method: str) -> str:
    """Return a method's name in tables and figures."""
    return LABELS.get(method, method)


def number(value: float) -> str:
    """Return a number with one decimal, a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1f}"


def results(
    runs: "pd.DataFrame",
    scores: "Sequence[Score]",
    averages: "Sequence[Average]",
    published: Mapping[str, Sequence[Published]],
) -> Results:
    """Return the table of final scores, a column per method and then per published column."""
    methods = list(dict.fromkeys(score.method for score in scores))
    columns = [Column(key=method, label=label(method)) for method in methods]
    columns += [Column(key=name, label=_published_label(name), is_published=True) for name in published]
    sources = dict(zip(runs["task"], runs["source"], strict=True))
    planned = {str(task): group for task, group in runs.groupby("task", sort=False)}
    notes: dict[str, str] = {}
    rows: list[Row] = []
    whole: dict[str, list[Cell | None]] = {name: [] for name in published}
    for suite in dict.fromkeys(score.suite for score in scores):
        of_suite: dict[str, list[Cell | None]] = {name: [] for name in published}
        tasks: dict[str, dict[str, Cell]] = {}
        for score in scores:
            if score.suite == suite:
                tasks.setdefault(score.task, {})[score.method] = _own_cell(score)
        for task, cells in tasks.items():
            rankable = {key for key, cell in cells.items() if PARTIAL not in cell.marks}
            for name, column in published.items():
                found = match(column, task)
                if found is None:
                    of_suite[name].append(None)
                    continue
                marks = (
                    _letter(
                        notes, f"{name}: {'; '.join([found.source.source, *cautions(found, task, sources[task])])}."
                    ),
                )
                count = found.source.seeds
                spread = found.std
                cells[name] = Cell(mean=found.mean, stderr=stderr(found), spread=spread, count=count, marks=marks)
                comparable = is_comparable(found, task, sources[task])
                of_suite[name].append(cells[name] if comparable else None)
                if comparable:
                    rankable.add(name)
            lost = _lost(planned[task])
            rows.append(
                Row(
                    suite=suite,
                    name=task,
                    is_task=True,
                    cells=_ranked(cells, rankable),
                    runs=lost or str(len(planned[task])),
                )
            )
            if any(PARTIAL in cell.marks for cell in cells.values()):
                why = lost or "not every run was evaluated with every method"
                notes[f"{task}: {why}; the numbers are of the runs that have a result, and are not ranked"] = PARTIAL
        rows += _average_rows(suite, len(tasks), averages, of_suite)
        for name, found_cells in of_suite.items():
            whole[name] += found_cells
    if len({row.suite for row in rows}) > 1:
        rows += _average_rows("", len(planned), averages, whole)
    texts = [(mark, text) for text, mark in sorted(notes.items(), key=lambda note: note[1] != PARTIAL)]
    if any(score.is_return for score in scores):
        texts.append((AS_RETURN, "return per episode, not a score: the data set has no reference scores"))
    if any(mark.isalpha() for mark, _ in texts):
        texts.append(("", NOTE))
    if UNKNOWN in published:
        texts.append(("", f"{_published_label(UNKNOWN)}: its scores are not known here, so its cells are blank."))
    for average in averages:
        note = ("", f"{average.suite or 'The whole'} has no average; {average.hole}")
        if average.hole and note not in texts:
            texts.append(note)
    if runs["source"].nunique() > 1:
        kinds = runs.drop_duplicates("task").groupby("source", sort=False)["task"]
        named = "; ".join(f"{source}: {', '.join(names)}" for source, names in kinds)
        texts.append(("", f"Data of different sources, whose scores are not comparable: {named}"))
    return Results(columns=columns, rows=rows, notes=texts)


def best_results(scores: "Sequence[Score]") -> Results | None:
    """Return the table of the curves' highest evaluations; None if no run was evaluated on the way."""
    if not any(score.best_scores and score.best_scores != score.scores for score in scores):
        return None
    methods = [score.method for score in scores if score.best_scores]
    columns = [Column(key=method, label=label(method)) for method in dict.fromkeys(methods)]
    tasks: dict[tuple[str, str], dict[str, Cell]] = {}
    for score in scores:
        marks = (PARTIAL,) * bool(score.num_failed)
        spread, count = score.best_stderr, len(score.best_scores)
        cell = Cell(mean=score.best_mean, stderr=spread, spread=spread, count=count, marks=marks)
        tasks.setdefault((score.suite, score.task), {})[score.method] = cell
    rows = [
        Row(
            suite=suite,
            name=task,
            is_task=True,
            cells=_ranked(cells, {key for key, cell in cells.items() if not cell.marks}),
        )
        for (suite, task), cells in tasks.items()
    ]
    is_partial = any(cell.marks for row in rows for cell in row.cells.values())
    notes = [(PARTIAL, "runs are missing; the numbers are of those that have a result, and are not ranked")]
    return Results(columns=columns, rows=rows, notes=notes if is_partial else [])


def markdown(table: Results) -> str:
    """Return the table in Markdown, best cells bold."""
    with_runs = any(row.runs for row in table.rows)
    lines = [["suite", "task", *(escape(column.label) for column in table.columns), *(["runs"] * with_runs)]]
    lines.append(["---"] * len(lines[0]))
    for row in table.rows:
        cells = [_markdown_cell(row.cells.get(column.key)) for column in table.columns]
        lines.append([escape(row.suite), escape(row.name), *cells, *([escape(row.runs)] * with_runs)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    for sign in "\\`|*_<>[]#&$~":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ").replace("\r", " ")


def latex(table: Results, *, caption: str) -> str:
    """Return a longtable with booktabs rules; it wants the packages booktabs and longtable."""
    heads = ["Task", *(column.label for column in table.columns)]
    head = " & ".join(rf"\textbf{{{latex_text(name)}}}" for name in heads)
    lines = [
        rf"\begin{{longtable}}{{l{'r' * len(table.columns)}}}",
        rf"\caption{{{caption}}} \\",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        r"\endhead",
        r"\bottomrule",
        r"\endfoot",
    ]
    before = table.rows[0] if table.rows else None
    for row in table.rows:
        if before is not None and (row.suite != before.suite or row.is_task != before.is_task):
            lines.append(r"\midrule")
        before = row
        name = row.name if row.is_task else f"{row.suite}: {row.name}" if row.suite else row.name
        cells = [_latex_cell(row.cells.get(column.key)) for column in table.columns]
        lines.append(" & ".join([latex_text(name), *cells]) + r" \\")
    lines.append(r"\end{longtable}")
    lines += [rf"\noindent {_latex_mark(mark)} {latex_text(text)}\par" for mark, text in table.notes]
    return "\n".join(lines) + "\n"


def latex_document(*tables: str, num_columns: int) -> str:
    """Return a document of its own around tables, on paper that is wide enough for most."""
    layout = "landscape," if num_columns > 4 else ""
    size = r"\scriptsize" if num_columns > 8 else r"\footnotesize"
    head = [
        r"\documentclass{article}",
        rf"\usepackage[{layout}margin=1.5cm]{{geometry}}",
        r"\usepackage{booktabs,longtable}",
        r"\begin{document}",
        size,
    ]
    return "\n".join([*head, *tables, r"\end{document}"]) + "\n"


def latex_text(text: str) -> str:
    """Return text that LaTeX sets as it is; what is not ASCII becomes its code point, but for ± and dagger."""
    signs = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedblright{}",
        "-": "{-}",
        "±": r"$\pm$",
        AS_RETURN: r"$\dagger$",
        **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    }
    found = []
    for sign in " ".join(text.split()):
        plain = sign if sign.isascii() and sign.isprintable() else f"[U+{ord(sign):04X}]"
        found.append(signs.get(sign, plain))
    return "".join(found)


def _own_cell(score: "Score") -> Cell:
    marks = (PARTIAL,) * (score.num_failed > 0) + (AS_RETURN,) * score.is_return
    mean, error = (
        (score.return_mean, score.return_stderr) if score.is_return else (score.score_mean, score.score_stderr)
    )
    return Cell(mean=mean, stderr=error, spread=error, count=len(score.seeds), marks=marks)


def _ranked(cells: Mapping[str, Cell], rankable: set[str]) -> dict[str, Cell]:
    """Return the cells, those of the rankable that are within one standard error of the highest marked as best."""
    ranked = {key: cell for key, cell in cells.items() if key in rankable and not math.isnan(cell.mean)}
    if len(ranked) < 2:
        return dict(cells)
    top = max(ranked.values(), key=lambda cell: cell.mean)
    floor = top.mean - (0.0 if math.isnan(top.stderr) else top.stderr)
    best = {key for key, cell in ranked.items() if cell.mean >= floor}
    return {key: dataclasses.replace(cell, is_best=key in best) for key, cell in cells.items()}


def _average_rows(
    suite: str, num_tasks: int, averages: "Sequence[Average]", published: Mapping[str, Sequence[Cell | None]]
) -> list[Row]:
    """Return the rows of the average and of the total; a published column has them if all its cells compare."""
    means, totals = {}, {}
    for average in averages:
        if average.suite == suite and not average.hole:
            means[average.method] = Cell(
                mean=average.score_mean, stderr=average.score_stderr, spread=average.score_stderr
            )
            totals[average.method] = Cell(mean=average.total)
    for name, cells in published.items():
        whole = [cell for cell in cells if cell is not None]
        if len(whole) == num_tasks:
            errors = math.hypot(*(cell.stderr for cell in whole)) / num_tasks
            mean = sum(cell.mean for cell in whole) / num_tasks
            means[name] = Cell(mean=mean, stderr=errors, spread=errors)
            totals[name] = Cell(mean=mean * num_tasks)
    names = (f"average of {num_tasks}", f"total of {num_tasks}")
    where = suite or "all"
    ranked = _ranked(means, set(means)), totals
    return [Row(suite=where, name=name, is_task=False, cells=of) for name, of in zip(names, ranked, strict=True)]


def _lost(planned: "pd.DataFrame") -> str:
    """Return how many of the planned runs have no result, as "1 of 2 failed"; empty if all have."""
    counts = planned["status"].value_counts()
    return ", ".join(
        f"{counts[status]} of {len(planned)} {status}" for status in ("failed", "missing") if status in counts
    )


def _published_label(name: str) -> str:
    return f"{name} (published)" if "@" not in name else f"{name.partition('@')[0]} ({name.partition('@')[2]})"


def _letter(notes: dict[str, str], text: str) -> str:
    """Return the mark of a footnote, a new one if the text is new."""
    used = sum(mark != PARTIAL for mark in notes.values())
    letters = string.ascii_lowercase
    new = letters[used] if used < len(letters) else letters[used // len(letters) - 1] + letters[used % len(letters)]
    return notes.setdefault(text, new)


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"**{cell.text}**" if cell.is_best else cell.text
    return text + "".join(escape(f" [{mark}]" if mark.isalpha() else mark) for mark in cell.marks)


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = cell.text.replace(" ± ", r" $\pm$ ")
    return (rf"\textbf{{{text}}}" if cell.is_best else text) + "".join(map(_latex_mark, cell.marks))


def _latex_mark(mark: str) -> str:
    shown = mark.replace(AS_RETURN, r"\dagger")
    return f"$^{{{shown}}}$" if mark else ""
