"""A report of methods with variants: a column for each in every renderer, against numbers computed here."""

import html
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess

import pytest
from matplotlib.figure import Figure

from aepo.errors import DataError
from analysis import figures, labels
from analysis.labels import OTHER_COLOURS, Arm, colours, in_order, known
from analysis.load import load_runs
from analysis.report import write_report
from analysis.scores import task_scores
from analysis.tables import aggregate_rows
from tests.tables import LARGE, MEDIUM, NASTY, WHOLE, evaluation, finished, lost, report, row, write

TASKS, SEEDS = (LARGE, MEDIUM), (0, 1, 2)
METHODS = {"aepo": "AEPO", "own-method": "own-method"}
VARIANTS = ("", "w 3", "w 10")
GAINS = {"": 0.0, "w 3": 6.5, "w 10": -4.25}
ARMS = [(method, variant) for method in METHODS for variant in VARIANTS]
LABELS = ["AEPO", "AEPO, w 3", "AEPO, w 10", "own-method", "own-method, w 3", "own-method, w 10"]
"""Of ARMS, in this order; the clone's column stands between the two methods."""


def score(task, method, variant, seed):
    return {LARGE: 80.0, MEDIUM: 55.0}[task] + GAINS[variant] - 9.0 * (method != "aepo") + (seed - 1) * 2.5 * (1 + seed)


def variant_row(task, method, variant, seed, **values):
    value = score(task, method, variant, seed)
    own = {"run": f"{task}-{method}-{variant}-s{seed}", "variant": variant, "settings": f'{{"variant": "{variant}"}}'}
    return finished(task, method, seed, value, **own | values)


def every_row():
    rows = [variant_row(task, *arm, seed) for task, arm, seed in itertools.product(TASKS, ARMS, SEEDS)]
    return rows[::-1]  # an order that no table may keep


def expected_cell(task, arm):
    values = [score(task, *arm, seed) for seed in SEEDS]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / 3**0.5:.1f} (3)"


def expected_average(arm):
    means = [statistics.mean(score(task, *arm, seed) for seed in SEEDS) for task in TASKS]
    errors = [statistics.stdev(score(task, *arm, seed) for seed in SEEDS) / 3**0.5 for task in TASKS]
    return f"{statistics.mean(means):.1f} ± {math.hypot(*errors) / 2:.1f}", f"{sum(means):.1f}"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the report says, where it lies, and its folder."""
    folder = tmp_path_factory.mktemp("variants")
    sweep = write(folder / "sweep", *every_row(), schema=WHOLE)
    runs = {each["run"]: {"method": each["method"]} for each in every_row()}
    (sweep / "sweep.json").write_text(json.dumps({"runs": runs}))
    return write_report([sweep], folder / "out", allow_missing=False), folder / "out", sweep


def check_table(heads, rows):
    """Check a table of texts, {task or average: its cells by column}."""
    assert heads == [*LABELS[:3], "diffusion BC", *LABELS[3:]]
    for place, arm in enumerate(ARMS):
        for task in TASKS:
            assert rows[task][LABELS[place]] == expected_cell(task, arm), (task, arm)
        average, total = expected_average(arm)
        assert (rows["average of 2"][LABELS[place]], rows["total of 2"][LABELS[place]]) == (average, total), arm
    assert rows[LARGE]["diffusion BC"] == "21.5 ± 0.6 (3)", "equal in all variants: one column"


def test_markdown_has_a_column_for_each_variant(told):
    text = (told[1] / "report.md").read_text().partition("## Best")[0]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    rows = {line[1]: dict(zip(lines[0][2:], (cell.strip("*") for cell in line[2:]), strict=True)) for line in lines[2:]}
    check_table(lines[0][2:-1], rows)
    best = [lines[0][place] for place, cell in enumerate(lines[2]) if cell.startswith("**")]
    assert best == ["AEPO, w 3"]


def test_latex_has_a_column_for_each_variant(told):
    text = (told[1] / "report.tex").read_text().partition(r"\end{longtable}")[0]
    text = text.replace(r" $\pm$ ", " ± ").replace("{-}", "-")
    lines = [
        [re.sub(r"\\textbf\{(.*)\}", r"\1", cell) for cell in line.removesuffix(r" \\").split(" & ")]
        for line in text.splitlines()
        if " & " in line
    ]
    heads = lines[0][1:]
    names = {f"maze2d: {name}": name for name in ("average of 2", "total of 2")}
    check_table(heads, {names.get(line[0], line[0]): dict(zip(heads, line[1:], strict=True)) for line in lines[1:]})
    best = next(line for line in text.splitlines() if line.startswith(LARGE)).split(" & ")
    assert [lines[0][place] for place, cell in enumerate(best) if r"\textbf" in cell] == ["AEPO, w 3"]


def test_the_terminal_has_a_column_for_each_variant(told, tmp_path, capsys):
    assert report(told[2], "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in printed.splitlines()]
    lines = [line for line in lines if len(line) == 3 + 7]
    heads = lines[0][2:-1]
    check_table(heads, {line[1]: dict(zip(heads, line[2:-1], strict=True)) for line in lines[1:]})
    assert "P(AEPO is better)" in printed


def test_the_page_has_a_column_for_each_variant(told):
    text = (told[1] / "report.html").read_text()
    table = re.search(r'(?s)<section id="results">.*?<table.*?</table>', text)[0]
    lines = [
        [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"(?s)<t[hd].*?</t[hd]>", line)]
        for line in re.findall(r"(?s)<tr>.*?</tr>", table)
    ]
    heads = lines[0][2:-1]
    check_table(heads, {line[1]: dict(zip(heads, line[2:-1], strict=True)) for line in lines[1:]})
    data = json.loads(re.search(r'(?s)id="data">(.*?)</script>', text)[1])
    keys = re.findall(r'data-method="(.*?)"', table)
    assert len({data["colors"][key] for key in keys}) == 7, "each column has a colour of its own"
    assert {row[data["run_columns"].index("method")] for row in data["runs"]} == set(LABELS)
    assert len(data["runs"]) == 36
    for panel in data["curves"]:
        lines = {line["label"]: line for line in panel["series"]}
        for label, arm in zip(LABELS, ARMS, strict=True):
            ends = [score(panel["task"], *arm, seed) for seed in SEEDS]
            assert lines[label]["x"] == [500, 1000, 1500]
            assert lines[label]["mean"][-1] == pytest.approx(statistics.mean(ends), rel=1e-4)
            assert lines[label]["mean"][0] == pytest.approx(statistics.mean(ends) / 2, rel=1e-4)
            assert len(lines[label]["runs"]) == 3
    assert [(each["task"], each["label"]) for each in data["grids"]] == [
        (task, label) for label in LABELS[:3] for task in TASKS
    ]
    for each in data["grids"]:
        arm = ARMS[LABELS.index(each["label"])]
        mean = statistics.mean(score(each["task"], *arm, seed) for seed in SEEDS)
        assert each["z"][1] == pytest.approx([mean, mean - 2.0], rel=1e-4)  # beta 1, guidance scales 0 and 2
    assert [(each["label"], len(each["x"])) for each in data["profiles"]] == [
        (label, 101) for label in [*LABELS[:3], "diffusion BC", *LABELS[3:]]
    ]
    for each in data["profiles"]:
        if each["label"] in LABELS:
            arm = ARMS[LABELS.index(each["label"])]
            values = [score(task, *arm, seed) for task in TASKS for seed in SEEDS]
            shares = [sum(value > level for value in values) / 6 for level in each["x"]]
            assert each["value"] == pytest.approx(shares, abs=1e-4)
    manifest = html.unescape(re.search(r"(?s)<pre>(.*?)</pre>", text)[1])
    assert list(json.loads(manifest)["first run of each method"]) == [
        f"{method}, {variant}".removesuffix(", ") for method, variant in ARMS[::-1]
    ]


def test_statistics_over_tasks_are_of_each_variant(told):
    rows = {row.arm[:2]: row for row in told[0].aggregates}
    assert [row.arm.label for row in told[0].aggregates] == [*LABELS[:3], "diffusion BC", *LABELS[3:]]
    pooled = {arm: [score(task, *arm, seed) for task in TASKS for seed in SEEDS] for arm in ARMS}
    for arm, values in pooled.items():
        assert rows[arm].mean.value == pytest.approx(statistics.mean(values))
        assert rows[arm].iqm.value == pytest.approx(statistics.mean(sorted(values)[1:-1]))
        assert rows[arm].optimality_gap.value == pytest.approx(statistics.mean(max(0.0, 100 - v) for v in values))
    first = ARMS[0]
    assert rows[first].improvement is None
    for arm in ARMS[1:]:
        wins = [
            (score(task, *first, one) > score(task, *arm, other))
            + (score(task, *first, one) == score(task, *arm, other)) / 2
            for task in TASKS
            for one, other in itertools.product(SEEDS, SEEDS)
        ]
        assert rows[arm].improvement.value == pytest.approx(statistics.mean(wins))
    assert aggregate_rows(told[0].aggregates)[1]["method"] == "AEPO, w 3"


def test_json_and_csv_name_the_variant(told, tmp_path, capsys):
    assert report(told[2], "--out", tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(each["method"], each["variant"]) for each in printed[:3]] == ARMS[:3]
    head, *lines = (told[1] / "scores.csv").read_text().splitlines()
    assert head.startswith("task,suite,method,variant,score_mean")
    assert lines[1].startswith(f"{LARGE},maze2d,aepo,w 3,")


def test_a_paired_comparison_is_of_each_variant(tmp_path, capsys):
    before = [variant_row(task, *arm, seed) for task, arm, seed in itertools.product(TASKS, ARMS, SEEDS)]
    gains = {"": 1.0, "w 3": 2.0, "w 10": -3.0}
    after = [
        finished(each["task"], each["method"], each["seed"], each["score"] + gains[each["variant"]])
        | {key: each[key] for key in ("run", "variant", "settings")}
        for each in before
    ]
    sides = [write(tmp_path / name, *rows, schema=WHOLE) for name, rows in (("a", before), ("b", after))]
    assert report(*sides, "--paired") == 0
    text = (tmp_path / "a" / "report" / "paired.md").read_text()
    for label, (_, variant) in zip(LABELS, ARMS, strict=True):
        gain = f"{gains[variant]:+.1f}"
        assert f"{label}, mean over its tasks: {gain} ({gain.lstrip('+')} to {gain.lstrip('+')}" in text
        assert len(re.findall(rf"\| {label} \| [\d.]+ \| [\d.]+ \| {re.escape(gain)} \|", text)) == 2
    capsys.readouterr()
    assert report(*sides, "--paired", "--json") == 0
    assert {each["variant"] for each in json.loads(capsys.readouterr().out)} == set(VARIANTS)


def test_the_figure_has_a_line_of_its_own_colour_for_each_variant(told):
    data = told[0]
    axes = Figure().add_subplot()
    figures._draw(axes, LARGE, [curve for curve in data.curves if curve.task == LARGE], data.colours)
    lines = {line.get_label(): line.get_color() for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == {*LABELS, "diffusion BC, at the end"}
    assert len(set(lines.values())) == 7
    assert lines["AEPO"] == "#0072B2"


def test_settings_may_differ_between_variants_and_not_within_one(tmp_path):
    rows = [variant_row(MEDIUM, "aepo", variant, seed) for variant in VARIANTS for seed in SEEDS]
    assert len(load_runs(write(tmp_path / "a", *rows, schema=WHOLE))) == 9
    rows[4] |= {"settings": '{"variant": "w 3", "sampling.guidance_scale": "4"}'}
    with pytest.raises(
        DataError, match=rf"{MEDIUM} aepo, w 3 differ in settings, .* sampling.guidance_scale \(none and 4"
    ):
        load_runs(write(tmp_path / "b", *rows, schema=WHOLE))
    again = variant_row(MEDIUM, "aepo", "w 3", 0, run="again")
    with pytest.raises(DataError, match="two runs of aepo, w 3 with seed 0"):
        load_runs(write(tmp_path / "c", *rows[:4], again, schema=WHOLE))


def test_a_variant_without_a_row_is_a_hole_of_its_own(tmp_path):
    rows = [variant_row(MEDIUM, "aepo", variant, seed) for variant in VARIANTS for seed in SEEDS]
    rows = [each for each in rows if (each["variant"], each["seed"]) != ("w 10", 2)]
    rows.append(variant_row(MEDIUM, "iql", "", 0))  # has no variant, and needs none
    runs = load_runs(write(tmp_path, *rows, schema=WHOLE))
    missing = runs[runs["status"] == "missing"]
    assert list(missing["run"]) == [f"{MEDIUM} aepo, w 10 seed 2", *(f"{MEDIUM} iql seed {seed}" for seed in (1, 2))]
    assert {(each.method, each.variant): each.num_failed for each in task_scores(runs)} == {
        ("aepo", ""): 0, ("aepo", "w 3"): 0, ("aepo", "w 10"): 1, ("iql", ""): 2, ("diffusion-bc", ""): 0,
    }  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
def test_a_clone_that_a_variant_has_changed_is_a_column_of_its_own(tmp_path, shared):
    clones = {"": 20.0, "w 3": 30.0}
    rows = [
        variant_row(MEDIUM, "aepo", variant, seed)
        | {
            "evaluations": [
                evaluation("aepo", score(MEDIUM, "aepo", variant, seed), 2 * score(MEDIUM, "aepo", variant, seed) + 10),
                evaluation("diffusion-bc", clones[variant], 2 * clones[variant] + 10),
            ]
        }
        for variant in clones
        for seed in ((0, 1) if shared else (0,) if variant else (1,))  # no shared seed: nothing says they are one
    ]
    rows += [] if shared else [lost(MEDIUM, 1, run="x", variant="w 3"), lost(MEDIUM, 0, run="y", variant="")]
    runs = load_runs(write(tmp_path, *rows, schema=WHOLE), allow_missing=True)
    found = {(each.method, each.variant): set(each.scores) for each in task_scores(runs)}
    assert (found["diffusion-bc", ""], found["diffusion-bc", "w 3"]) == ({20.0}, {30.0})


def nasty_sweep(folder):
    rows = [
        variant_row(task, "aepo", variant, seed) | {"variant": variant + NASTY}
        for task, variant, seed in itertools.product(TASKS, ("w 3", "w 10"), SEEDS)
    ]
    return write(folder, *rows, lost(LARGE, 3, run="lost", variant=f"w 3{NASTY}"), schema=WHOLE)


def test_a_variants_name_is_shown_as_it_is_and_never_as_markup(tmp_path, capsys):
    assert report(nasty_sweep(tmp_path / "s"), "--out", tmp_path / "out", "--allow-missing") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("</script>") == 4
    assert f"AEPO, w 3{html.escape(NASTY)}</th>" in page
    table = (tmp_path / "out" / "report.md").read_text().partition("## Runs without")[0]
    assert not re.search(r"(?<!\\)[<`]", table)
    head = next(line for line in table.splitlines() if line.startswith("| suite"))
    assert len(re.findall(r"(?<!\\)\|", head)) == 2 + 3 + 1 + 1  # suite, task; two variants, the clone; runs; the end
    assert r"\script" not in (tmp_path / "out" / "report.tex").read_text()
    assert "[n](o)" in capsys.readouterr().out.replace("\n", "")


def test_methods_of_one_label_are_two_columns_on_the_terminal(tmp_path, capsys):
    rows = [variant_row(MEDIUM, "aepo", "", 0), variant_row(MEDIUM, "AEPO", "", 0), variant_row(MEDIUM, "task", "", 0)]
    assert report(write(tmp_path, *rows, schema=WHOLE)) == 0
    head = next(line for line in capsys.readouterr().out.splitlines() if "suite" in line)
    assert [name.strip() for name in head.split("┃")[3:-2]] == ["AEPO", "diffusion BC", "AEPO", "task"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here (Debian: texlive-latex-recommended)")
@pytest.mark.parametrize("name", ["plain", "nasty"])
def test_latex_with_variants_compiles(told, tmp_path, name):
    sweep = told[2] if name == "plain" else nasty_sweep(tmp_path / "s")
    write_report([sweep], tmp_path / "out", allow_missing=True)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    ended = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, errors="replace")
    assert ended.returncode == 0, ended.stdout[-2000:]


def test_arms_stand_in_the_order_of_methods_and_of_numbers():
    arms = [Arm("zeta"), Arm("aepo", "w 10"), Arm("iql", "b 0.5"), Arm("beta"), Arm("aepo", "w 3"), Arm("diffusion-bc"),
            Arm("aepo"), Arm("iql", "b 0.25"), Arm("aepo", "fast"), Arm("aepo", "w 3")]  # fmt: skip
    assert list(map(str, in_order(arms))) == [
        "aepo", "aepo, fast", "aepo, w 3", "aepo, w 10", "iql, b 0.25", "iql, b 0.5", "diffusion-bc", "beta", "zeta",
    ]  # fmt: skip


def test_every_known_method_has_a_label_and_a_colour_of_its_own():
    assert all(re.fullmatch("#[0-9A-F]{6}", each.colour) and each.label and each.method for each in known())
    for column in zip(*((each.method, each.label, each.colour) for each in known()), strict=True):
        assert len(set(column)) == len(column)


def test_a_method_that_is_not_known_goes_by_its_name_and_takes_the_next_further_colour():
    assert (Arm("own-method").label, Arm("own-method", "w 3").label) == ("own-method", "own-method, w 3")
    names = [f"own-{place}" for place in range(len(OTHER_COLOURS) + 1)]
    found = colours(map(Arm, names[::-1]))
    assert list(found.values()) == [*OTHER_COLOURS, OTHER_COLOURS[0]]
    assert found == colours(map(Arm, [*names, "own-1"]))


def test_a_known_method_without_a_colour_takes_a_further_one(monkeypatch):
    rows = labels.Row(method="mine", label="Mine"), labels.Row(method="aepo", label="A", colour="#0072B2")
    monkeypatch.setattr(labels, "known", lambda: rows)
    assert colours([Arm("aepo"), Arm("mine"), Arm("other")]) == {
        Arm("mine"): OTHER_COLOURS[0], Arm("aepo"): "#0072B2", Arm("other"): OTHER_COLOURS[1],
    }  # fmt: skip


def test_variants_are_lighter_shades_of_their_methods_colour():
    found = colours([Arm("aepo", name) for name in ("w 1", "w 2", "w 3")])
    assert list(found.values()) == ["#0072B2", "#4C9CC9", "#99C7E0"]  # 0, 30 and 60 % white
    assert colours([Arm("aepo", "w 7")]) == {Arm("aepo", "w 7"): "#0072B2"}


def test_a_table_from_before_there_were_variants_has_none(tmp_path):
    runs = load_runs(write(tmp_path, row(seed=0), row(seed=1)))
    assert list(runs["variant"]) == ["", ""]
