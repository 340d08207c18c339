"""A report in LaTeX: a document of its own with booktabs and longtable."""

from analysis.model import BEST_NOTE, BEST_TITLE, RANK_NOTE, TITLE, ReportData
from analysis.tables import AS_RETURN, Cell, Results


def latex(data: ReportData) -> str:
    """Return report.tex."""
    parts = [_table(data.table, caption=latex_text(f"{TITLE}. {RANK_NOTE}"))]
    if data.best:
        parts.append(_table(data.best, caption=latex_text(f"{BEST_TITLE}. {BEST_NOTE}")))
    return _document(*parts, num_columns=len(data.table.columns))


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


def _document(*tables: str, num_columns: int) -> str:
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


def _table(table: Results, *, caption: str) -> str:
    """Return a longtable with booktabs rules, best cells bold."""
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
        cells = [_cell(row.cells.get(column.key)) for column in table.columns]
        lines.append(" & ".join([latex_text(name), *cells]) + r" \\")
    lines.append(r"\end{longtable}")
    lines += [rf"\noindent {_mark(mark)} {latex_text(text)}\par" for mark, text in table.notes]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = cell.text.replace(" ± ", r" $\pm$ ")
    return (rf"\textbf{{{text}}}" if cell.is_best else text) + "".join(map(_mark, cell.marks))


def _mark(mark: str) -> str:
    shown = mark.replace(AS_RETURN, r"\dagger")
    return f"$^{{{shown}}}$" if mark else ""
