"""Sixty odd inputs, the same in every run; and that the fuzz takes for a failure what is one.

`python -m tests.fuzz` draws new ones: what it finds is mended with a test, and never stops somebody else's change.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from aepo.console import err
from aepo.errors import AEPOError, CheckpointError, ConfigError, DataError, ResourceError, TrainingError
from tests import fuzz, mutations

COUNTS = {"data": 20, "settings": 25, "folders": 15}
AGAIN = ["data-0", "settings-0", "folders-0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the inputs, and of some made a second time."""
    seed = os.environ.get("AEPO_FUZZ_SEED", "550049340")
    out = tmp_path_factory.mktemp("fuzz") / "rows.json"
    words = [sys.executable, "-m", "tests.fuzz", "--seed", seed, "--out", str(out)]
    words += ["--only", *fuzz.input_names(COUNTS), *AGAIN]
    ended = subprocess.run(
        words, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )  # a process of one thread
    assert out.exists(), ended.stderr
    return json.loads(out.read_text())["inputs"], f"AEPO_FUZZ_SEED={seed}; python -m tests.fuzz --seed {seed} --only"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "settings", "folders"])
def test_odd_inputs_end_in_a_result_or_in_one_line_with_its_exit_status(kind, rows):
    inputs, command = rows
    failed = [row for row in inputs if row["kind"] == kind and row["faults"]]
    said = "\n".join(f"{row['input']}: {row['what']}: {'; '.join(row['faults'])}" for row in failed)
    assert not failed, f"{command} {' '.join(row['input'] for row in failed)}\n{said}"


@pytest.mark.slow
def test_many_mutations_of_data_leave_what_can_be_used(rows):
    outcomes = [row["outcome"] for row in rows[0] if row["kind"] == "data"]
    assert outcomes.count("result") >= len(outcomes) / 5, rows[1]  # a third of many


@pytest.mark.slow
def test_an_input_is_made_by_its_seed_and_name(rows):
    inputs = rows[0]
    for name in AGAIN:
        first, second = (row for row in inputs if row["input"] == name)
        assert (first["what"], first["status"], first["outcome"]) == (
            second["what"],
            second["status"],
            second["outcome"],
        )


# -- what is a failure ---------------------------------------------------------------------------------------


@pytest.fixture
def ends_as(monkeypatch, tmp_path):
    """The row of an input whose one command does what it is told."""

    def outcome(deed, *words, limit_s=20.0):
        monkeypatch.setattr("aepo.commands.data.List.run", lambda self: deed())
        monkeypatch.setitem(
            mutations.KINDS, "broken", lambda box: box.commands.append(["data", "list", "--source", "user", *words])
        )
        return fuzz.run_input(0, "broken-0", tmp_path, limit_s=limit_s)

    return outcome


def write(path):
    def deed():
        Path(path).write_text("x")
        return 0

    return deed


def die(error):
    def deed():
        raise error

    return deed


def warn():
    warnings.warn("overflow encountered", RuntimeWarning, stacklevel=1)
    return 0


def write_result(score):
    def deed():
        Path("out").mkdir()
        result = {"status": "finished", "score": score, "return_mean": 1.0, "evaluations": [{"episode_returns": [1.0]}]}
        Path("out/result.json").write_text(json.dumps(result))
        return 0

    return deed


BROKEN = {
    "a bug": (die(KeyError("x")), "unexpected error: KeyError"),
    "an exit status of its own": (lambda: 77, "exit status 77"),
    "a crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "died of SIGSEGV"),
    "leaving early": (lambda: os._exit(0), "in the middle of a command"),
    "a file at home": (write("../home/x"), "wrote or removed w/o/r/k/home/x"),
    "a file here": (write("x"), "wrote or removed w/o/r/k/cwd/x"),
    "a temporary file": (lambda: write(f"{os.environ['TMPDIR']}/x")(), "wrote or removed w/o/r/k/tmp/x"),
    "a file above": (write("../../../x"), "wrote or removed w/o/x"),
    "a warning": (warn, "a warning: RuntimeWarning: overflow"),
    "a traceback": (lambda: print("Traceback (most recent call last):", file=sys.stderr) or 0, "a traceback"),
    "two lines": (lambda: print("error: one", "two", sep="\n", file=sys.stderr) or 2, "1 lines of error"),
    "a status without a word": (lambda: 3, "0 lines of error"),
    "a score that is none": (write_result(float("nan")), "a finished result that is not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_counts_as_a_failure(name, ends_as):
    deed, said = BROKEN[name]
    row = ends_as(deed)
    assert row["outcome"] == "failure"
    assert any(said in fault for fault in row["faults"]), row


def test_no_end_is_a_failure_and_is_ended(ends_as, tmp_path):
    def hang():
        if os.fork() == 0:
            time.sleep(600)
        (tmp_path / "process").write_text(str(os.getpid()))
        time.sleep(600)

    begin = time.monotonic()
    row = ends_as(hang, limit_s=0.5)
    assert row["faults"] == ["no end after 0.5 s"]
    assert time.monotonic() - begin < 300
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def test_no_json_is_a_failure_where_it_was_asked_for(ends_as):
    assert ends_as(lambda: 0, "--json")["faults"] == [
        "data: no JSON on standard output: Expecting value: line 1 column 1 (char 0)"
    ]


@pytest.mark.parametrize("error", [ConfigError, DataError, CheckpointError, TrainingError, ResourceError])
def test_an_error_of_ours_is_none(error: type[AEPOError], ends_as):
    row = ends_as(die(error("what was got, what was wanted")))
    assert (row["outcome"], row["status"]) == (f"error {error.exit_status}", error.exit_status)
    assert row["last_line"] == "error: what was got, what was wanted"


def test_a_result_is_none(ends_as):
    assert ends_as(write_result(1.0))["outcome"] == "result"
    assert ends_as(lambda: err.print("warning: of our own") or 0)["outcome"] == "result"
    assert fuzz.judge(["evaluate", "--json"], 0, '[{"method": "iql", "return_mean": 1.5}]', "") == []


@pytest.mark.parametrize(
    ("command", "document"),
    [
        ("evaluate", [{"method": "iql", "return_mean": None}]),
        (
            "train",
            {"ref_min": 0.0, "ref_max": 1.0, "evaluations": [{"method": "iql", "return_mean": 1.0, "score": None}]},
        ),
        ("train", {"ref_min": 1.0, "ref_max": 0.0, "evaluations": []}),
    ],
)
def test_a_result_without_a_number_is_a_failure(command, document):
    assert len(fuzz.judge([command, "--json"], 0, json.dumps(document), "")) == 1
