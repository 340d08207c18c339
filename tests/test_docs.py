"""Every command that the README gives to users runs, made small."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from aepo import cli, method_table

METHODS = method_table.presets()

ROOT = Path(__file__).parent.parent
SMALL = ["--set", *(f"{stage}.steps=20" for stage in ("behavior", "critic", "energy"))]
SMOKE = ["--preset", "smoke"]
APPENDED = {
    "train": SMALL,
    "sweep": SMALL,
    "search": ["--num-episodes", "1", "--confirm-seeds", "2000", *SMALL],
    "evaluate": ["--num-episodes", "2"],
    "toy": ["--targets", "mse", "--betas", "1", "--steps", "20"],
    "data": [],
    "report": [],
    "doctor": [],
    "bench": ["--preset", "smoke", "--transitions", "2000", "--seconds", "0.02", "--processes", "1"],
    "store": [],
    "clean": [],
    "benchmark": ["--preset", "smoke", "--seeds", "0"],
}
REPLACED = {"1000000": "3000", "24": "2", **{method: f"{method}-smoke" for method in METHODS}}


def blocks():
    """The lines of the README's code blocks, without comments."""
    inside, found = False, []
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            found.append(line.partition("#")[0].strip())
    return found


COMMANDS = [line for line in blocks() if line.startswith("aepo ")]
ON_A_CLUSTER = ("cluster", "submit", "jobs")
"""Run in tests/cluster/test_local.py, which has one."""


def test_the_readme_names_every_command():
    assert {line.split()[1] for line in COMMANDS} == set(cli.COMMANDS) - {"quickstart"}
    make = [line.split()[1] for line in blocks() if line.startswith("make ")]
    assert make == ["quickstart", "test"]
    assert all(f"\n{target}: " in (ROOT / "Makefile").read_text() for target in make)


def aepo(*words):
    ended = subprocess.run([sys.executable, "-m", "aepo", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, (words, ended.stderr)


@pytest.mark.slow
@pytest.mark.ray
def test_every_command_of_the_readme_runs(make_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_dataset()
    for name in ("maze2d-umaze", "maze2d-open"):
        aepo("data", "collect", name, "--steps", "3000")
    for line in [line for line in COMMANDS if line.split()[1] not in ON_A_CLUSTER]:
        words = [REPLACED.get(word, word) for word in shlex.split(line)[1:]]
        words = [other if word.endswith("-v0") else word for word in words]
        words = [str(next(Path("runs").iterdir())) if word == "runs/RUN" else word for word in words]
        if "--seeds" in words:  # one seed shows it
            first = words.index("--seeds") + 2
            last = next((i for i in range(first, len(words)) if words[i].startswith("--")), len(words))
            del words[first:last]
        trains = words[0] in ("train", "sweep", "search") and "--preset" not in words
        aepo(*words, *(SMOKE if trains else []), *APPENDED[words[0]])


def test_the_sweep_file_of_the_operations_page_is_one(tmp_path):
    from tune.plan import make_plan
    from tune.spec import read_sweep_file

    text = (ROOT / "docs" / "operations.md").read_text()
    (tmp_path / "mazes.toml").write_text(text.split("```toml\n")[1].partition("```")[0])
    plan = make_plan(read_sweep_file(tmp_path / "mazes.toml")[0])
    assert len(plan) == 24
    assert {config.evaluation.num_episodes for config in plan} == {100}
    assert {c.method: c.critic.expectile for c in plan if "critic" in c.stages} == {
        "aepo": 0.9,
        "qgpo": 0.7,
        "iql": 0.9,
    }


def test_the_search_space_of_the_operations_page_is_one(tmp_path):
    from aepo import tasks
    from aepo.presets import preset
    from tune.space import read_space

    text = (ROOT / "docs" / "operations.md").read_text()
    text = text.partition("## A search")[2]
    (tmp_path / "space.toml").write_text(text.split("```toml\n")[1].partition("```")[0])
    space = read_space(tmp_path / "space.toml", [preset("quick", tasks.find("maze2d-umaze"), 0)])
    assert set(space.varied) == {"critic.expectile", "critic.backup_steps", "energy.learning_rate"}
    assert space.grid == {"sampling.beta": (1.0, 3.0), "sampling.guidance_scale": (1.0, 10.0)}


def test_every_command_of_the_benchmark_page_is_one(capsys):
    """The steps run in tests/tune/test_benchmark.py; here their words are parsed."""
    from tune.benchmark import Benchmark

    text = (ROOT / "docs" / "benchmark.md").read_text()
    commands = re.findall(r"^ *aepo benchmark (.+?)(?:\s+#.*)?$", text, re.MULTILINE)
    commands += [words for words in re.findall(r"`aepo\sbenchmark ([^`|]+)`", text) if words.split()[0] == "d4rl"]
    assert len(commands) > 8
    for words in commands:
        cli.parse(Benchmark, "aepo benchmark", shlex.split(words))


def test_every_command_of_the_report_page_runs(tmp_path, monkeypatch, capsys):
    from tests.tables import row, write

    monkeypatch.chdir(tmp_path)
    for name in ("mazes", "before", "after"):
        write(tmp_path / "sweeps" / name, row(seed=0), row(seed=1))
    text = (ROOT / "docs" / "report.md").read_text()
    commands = [line.partition("#")[0].split()[1:] for line in text.splitlines() if line.startswith("aepo report ")]
    assert len(commands) == 5
    for words in commands:
        if not any(word.startswith("mlflow:") for word in words):  # tests/analysis/test_mlflow_source.py has that
            assert cli.run(words) == 0, (words, capsys.readouterr().err)


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_pages_that_code_and_pages_name_are_there():
    texts = [ROOT / "pyproject.toml", ROOT / "Makefile", *PAGES]
    texts += [
        path for folder in ("aepo", "tune", "cluster", "analysis", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    named = {(path, name) for path in texts for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())}
    assert len(named) > 10
    assert not [(str(path), name) for path, name in named if not (ROOT / name).exists()]


def test_the_contents_of_the_decisions_name_every_page():
    folder = ROOT / "docs" / "decisions"
    text = (folder / "README.md").read_text()
    assert set(re.findall(r"^- \[.+?\]\((.+?)\)", text, re.MULTILINE)) == {
        page.name for page in folder.glob("*.md") if page.name != "README.md"
    }


def test_the_glossary_has_each_term_once():
    terms = re.findall(r"^- \*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) == len(set(terms)) > 30
