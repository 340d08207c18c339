"""A skip is a failure in CI."""

import os
import subprocess
import sys

import pytest

from tests import ROOT

SKIPPING = """
import pytest

def test_skips():
    pytest.skip("no such tool")

@pytest.mark.cuda
def test_of_a_gpu():
    pytest.skip("no GPU")

@pytest.mark.xfail(strict=True)
def test_known():
    assert False
"""


@pytest.mark.parametrize(("no_skips", "said"), [("", "2 skipped, 1 xfailed"), ("1", "1 failed, 1 skipped, 1 xfailed")])
def test_a_skip_is_a_failure_where_it_is_asked_for(no_skips, said, tmp_path):
    (tmp_path / "test_it.py").write_text(SKIPPING)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    environment = os.environ | {"AEPO_NO_SKIPS": no_skips, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    ended = subprocess.run([*words, "test_it.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said in ended.stdout.splitlines()[-1], ended.stdout + ended.stderr
    assert ended.returncode == bool(no_skips)
