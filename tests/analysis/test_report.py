"""Every renderer against reports that were stored when they were right: the same runs, the same characters.

Rewrite the files on purpose, never to make a test pass: python -m tests.analysis.test_report
"""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.tables import LARGE, MEDIUM, WHOLE, finished, lost, report, without_references, write

FOLDER = ROOT / "tests" / "golden" / "reports"
D4RL = {"suite": "gym-mujoco", "source": "d4rl"}
COMMANDS = {
    "whole": [
        "sweeps/whole",
        "--published",
        "IQL@corl-last",
        "QGPO@qgpo",
        "TD3+BC@corl-best",
        "AEPO",
        "--tracking-uri",
        "http://me:secret@127.0.0.1:5000",
    ],
    "holes": ["sweeps/holes", "sweeps/more", "--allow-missing"],
    "paired": ["sweeps/holes", "sweeps/after", "--paired", "--allow-missing"],
}
"""Name of a stored report -> the words behind `aepo report`."""


def write_sweeps(folder):
    """Write the sweeps of COMMANDS."""
    rows = [
        finished(task, method, seed, base + gain + 3.7 * seed * (1 + place), mlflow_run_id="0a1b", **kind)
        for place, (task, base, kind) in enumerate(
            [("hopper-medium-v2", 60.0, D4RL), ("walker2d-medium-v2", 75.0, D4RL), (MEDIUM, 40.0, {})]
        )
        for method, gain in (("td3bc", -7.25), ("aepo", 0.0), ("qgpo", -1.5))
        for seed in (2, 0, 1)
    ]
    write(folder / "sweeps" / "whole", *rows, schema=WHOLE)
    runs = {each["run"]: {"method": each["method"], "task": each["task"]} for each in rows}
    (folder / "sweeps" / "whole" / "sweep.json").write_text(json.dumps({"format": 1, "runs": runs}))
    bad = "<b>x</b> | died\nof `it`"
    write(
        folder / "sweeps" / "holes",
        finished(MEDIUM, "aepo", 0, 61.0),
        finished(MEDIUM, "aepo", 1, 58.5),
        lost(MEDIUM, 0, method="iql", run="lost-iql", error=bad),
        finished(MEDIUM, "iql", 1, 71.5),
        finished(LARGE, "aepo", 0, 81.0),
        finished(LARGE, "aepo", 1, float("nan")),
        finished(LARGE, "iql", 0, 33.0),
        finished(LARGE, "zeta<i>", 0, 12.0, seconds=90.0),
        schema=WHOLE,
    )
    write(folder / "sweeps" / "more", without_references(0, 1500.0), without_references(1, 1600.0))
    after = [finished(task, "aepo", seed, 62.0 + 2 * seed) for task in (MEDIUM, LARGE) for seed in (0, 1, 2)]
    write(folder / "sweeps" / "after", *after, schema=WHOLE)


def tell(name, folder):
    """Return file -> text of one report, and what the terminal shows; of the page all but the libraries."""
    texts = {}
    out = folder / "out" / name
    for key, words in (("terminal.txt", []), ("printed.json", ["--json"])):
        with contextlib.redirect_stdout(io.StringIO()) as stream, contextlib.redirect_stderr(io.StringIO()):
            assert report(*COMMANDS[name], "--out", str(out), *words) == 0
        texts[key] = stream.getvalue()
    texts |= {file.name: file.read_text(encoding="utf-8") for file in sorted(out.glob("*.*"))}
    if page := texts.pop("report.html", ""):
        texts["report.html"] = re.sub(r"(?s)<style>.*?</style>|<script>.*?</script>", "", page)
    return texts


@pytest.mark.parametrize("name", COMMANDS)
def test_a_report_says_what_it_said_character_for_character(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sweeps(tmp_path)
    told = tell(name, tmp_path)
    assert sorted(told) == sorted(file.name for file in (FOLDER / name).iterdir())
    for file, text in told.items():
        assert text == (FOLDER / name / file).read_text(encoding="utf-8"), f"{name}/{file} differs"


def store():
    """Write the files that this module compares with."""
    with tempfile.TemporaryDirectory() as place:
        write_sweeps(Path(place))
        os.chdir(place)
        for name in COMMANDS:
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
            for file, text in tell(name, Path(place)).items():
                (FOLDER / name / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    store()


@pytest.mark.parametrize("manifest", ["[" * 100_000, '{"runs": {"a": "\\u0000"}}', "[]", "x", '{"runs": 1}'])
def test_a_manifest_that_is_none_costs_no_report(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sweeps(tmp_path)
    (tmp_path / "sweeps" / "whole" / "sweep.json").write_text(manifest)
    assert tell("whole", tmp_path)["report.html"]
