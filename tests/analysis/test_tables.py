"""The results table: which cells are best, and the LaTeX and Markdown of names that mean to be markup."""

import re
import shutil
import subprocess

import pytest

from analysis.curves import learning_curves
from analysis.latex import latex_text
from analysis.load import load_runs
from analysis.markdown import escape
from analysis.report import write_report
from analysis.scores import task_scores
from analysis.tables import Cell, _ranked
from tests.tables import LARGE, NASTY, evaluation, lost, report, row, write


def best(*cells):
    found = _ranked({str(place): cell for place, cell in enumerate(cells)}, {str(i) for i in range(len(cells))})
    return [int(key) for key, cell in found.items() if cell.is_best]


def test_best_is_within_one_standard_error_of_the_highest_mean():
    assert best(Cell(mean=50, stderr=2), Cell(mean=48, stderr=9), Cell(mean=47.9, stderr=9)) == [0, 1]
    assert best(Cell(mean=50), Cell(mean=49.9, stderr=9)) == [0]  # no error known: the highest alone
    assert best(Cell(mean=50, stderr=2)) == []  # nothing to be best of
    assert best(Cell(mean=float("nan")), Cell(mean=1.0), Cell(mean=2.0)) == [2]


def test_every_name_is_shown_as_it_is_and_never_as_markup(tmp_path):
    rows = [
        row(NASTY, 0, suite="<b>suite</b>", method="aepo<i>", evaluations=[evaluation("aepo<i>", 60.0, 130.0)]),
        lost(NASTY, 1, suite="<b>suite</b>", method="aepo<i>", error="</script><script>alert(2)</script>"),
    ]
    write_report([write(tmp_path / "s", *rows)], tmp_path / "out", allow_missing=True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("</script>") == 4  # the data, two libraries and the page's own
    text = (tmp_path / "out" / "report.md").read_text()
    table = text.partition("## Runs without")[0]
    assert not re.search(r"(?<!\\)[<`]", table)
    assert r"\<script\>" in table
    assert "`failed: " in text


def test_markdown_cells_stay_in_their_row():
    assert "\n" not in escape("a\nb")
    assert escape("a|b") == r"a\|b"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here (Debian: texlive-latex-recommended)")
def test_latex_compiles_whatever_the_names(tmp_path):
    finished = [row(task, seed, 60.0 + seed) for task in (NASTY, LARGE) for seed in (0, 1)]
    write_report([write(tmp_path / "s", *finished)], tmp_path / "out", allow_missing=True, published=["IQL@corl-last"])
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    ended = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, errors="replace")
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert (tmp_path / "out" / "report.pdf").stat().st_size > 10_000


def test_latex_has_booktabs_and_the_best_in_bold(tmp_path):
    write_report([write(tmp_path / "s", row(seed=0), row(seed=1))], tmp_path / "out", allow_missing=False)
    text = (tmp_path / "out" / "report.tex").read_text()
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\usepackage{booktabs,longtable}"):
        assert rule in text
    assert r"\textbf{60.0 $\pm$ 0.0 (2)} & 20.0 $\pm$ 0.0 (2)" in text


def test_latex_signs():
    assert latex_text("a_b & 50% ± ü") == r"a\_b \& 50\% $\pm$ [U+00FC]"


def test_the_page_holds_no_address_but_links(tmp_path):
    rows = [row(seed=seed, mlflow_run_id="0a1b") for seed in (0, 1)]
    for uri, linked in (("http://me:secret@tracker:5000", True), ("sqlite:///mlflow.db", False)):
        write_report([write(tmp_path / "s", *rows)], tmp_path / "out", allow_missing=False, tracking_uri=uri)
        page = (tmp_path / "out" / "report.html").read_text()
        assert "secret" not in page
        assert ("http://tracker:5000/#/runs/" in page) is linked
        assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)=""", page.partition("<script")[0])
        assert "default-src 'none'" in page


def test_a_task_is_ranked_only_where_no_run_is_missing(tmp_path):
    rows = [row(seed=0, score=90.0), lost(seed=1)]
    result = write_report([write(tmp_path / "s", *rows)], tmp_path / "out", allow_missing=True)
    assert not any(cell.is_best for cell in result.table.rows[0].cells.values())
    assert load_runs(tmp_path / "s")["status"].to_list() == ["finished", "failed"]


def test_a_run_in_doubt_is_named_in_every_text_but_latex(tmp_path, capsys):
    doubtful = {"diagnostics": [{"name": "energy/kl", "value": 4.5}, {"name": "energy/guidance_sd", "value": 1.0}]}
    folder = write(tmp_path, row(seed=0), row(seed=1, **doubtful))
    out = tmp_path / "out"
    assert report(folder, "--out", out) == 0
    wanted = "the cost of guidance in nats is 4.5, above 3: guided actions are far from the data"
    texts = [capsys.readouterr().out, (out / "report.md").read_text(), (out / "report.html").read_text()]
    for text in texts:
        assert text.count(wanted) == 1
        assert "maze2d-medium aepo seed 1" in text
    assert "guidance costs" not in (out / "report.tex").read_text()


def test_a_selected_setting_is_a_column_beside_the_methods_own(tmp_path, capsys):
    def both(seed, score, chosen):
        own = row(seed=seed, score=score)
        selected = evaluation("aepo", chosen, 2 * chosen + 10, guidance_scale=1.0 * seed, selected_episodes=100)
        return own | {"evaluations": [*own["evaluations"], selected]}

    folder, out = write(tmp_path, both(0, 60.0, 70.0), both(1, 62.0, 80.0)), tmp_path / "out"
    runs = load_runs(folder)
    found = {score.arm.label: score.scores for score in task_scores(runs)}
    assert found == {
        "AEPO": (60.0, 62.0),
        "AEPO (selected, 100 episodes)": (70.0, 80.0),
        "diffusion BC": (20.0, 20.0),
    }
    assert list(found)[:2] == ["AEPO", "AEPO (selected, 100 episodes)"], "side by side"
    assert report(folder, "--out", out) == 0
    terminal = capsys.readouterr().out
    names = ("report.md", "report.tex", "report.html")
    texts = [terminal, *((out / name).read_text().replace("\\", "") for name in names)]
    for text in texts:
        assert "AEPO (selected, 100 episodes)" in text
        assert "so it is not ranked with them" in text
    assert "| **61.0 ± 1.0 (2)** | 75.0 ± 5.0 (2) |" in texts[1]
    assert "selected_episodes" in (out / "scores.csv").read_text()
    (level,) = [curve for curve in learning_curves(runs) if curve.arm.selected_episodes]
    assert (level.is_level, level.mean.tolist()) == (True, [75.0])
