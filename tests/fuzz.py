"""The product under bad, odd and broken inputs: each must end in a result or in one line with its exit status.

    python -m tests.fuzz [--seed N] [--data 500] [--settings 500] [--folders 200] [--out FILE]
    python -m tests.fuzz --seed N --only data-17      # one again, with what it printed

An input is a folder of its own with HOME, TMPDIR and a working folder, made wholly by (seed, name). Its commands are
called in a process of its own, a fork of this one, with a deadline, a limit of memory and none of the state that others
have left. What may be mutated is in tests/mutations.py. An input fails by an unexpected error (exit status 1) or
another status that is not documented, a traceback or a warning of Python's on standard error, an error of several
lines, a result that is not finite, a deadline passed, a signal, or a file outside of where commands may write.
"""

import argparse
import codecs
import contextlib
import dataclasses
import faulthandler
import fnmatch
import io
import json
import math
import os
import random
import re
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aepo import cli

STATUSES = (0, 2, 3, 4, 5, 6)
"""A result, and the errors that docs/operations.md describes."""
LIMIT_S = 60.0
"""Of an input, by the clock: a busy machine is no failure. On a free core one takes about half a second."""
MEMORY = 6 * 2**30
"""Bytes that an input may ask for beyond what this process has."""
WRITABLE = ("home/.cache", "home/.cache/*", "cwd/out", "cwd/out/*")
"""Where any command may leave something; the rest of an input's folder stays as it was."""
BROKEN = 97
"""Exit status of a child in which the fuzz itself failed."""


@dataclasses.dataclass
class Box:
    """One input: its folder, its source of random numbers, and what was done to it."""

    root: Path
    templates: Path
    random: random.Random
    done: list[str] = dataclasses.field(default_factory=list)
    """What was mutated, in words."""
    commands: list[list[str]] = dataclasses.field(default_factory=list)
    """To be called one after the other; the first one's exit status is the input's."""
    writable: list[str] = dataclasses.field(default_factory=list)
    """Further patterns of paths that the commands may write."""
    unprivileged: bool = False
    """Give up the rights of root before the commands are called: permissions say nothing to it."""

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def cwd(self) -> Path:
        return self.root / "cwd"

    def copy(self, template: str, place: str) -> Path:
        """Put a template into the working folder, or a data set into the library; return where."""
        shutil.copytree(self.templates / template, self.root / place, dirs_exist_ok=True)
        return self.root / place


def input_names(counts: dict[str, int]) -> list[str]:
    return [f"{kind}-{number}" for kind, count in counts.items() for number in range(count)]


def run_input(seed: int, name: str, templates: Path, *, limit_s: float = LIMIT_S, show: bool = False) -> dict[str, Any]:
    """Return an input's row: what was mutated, how it ended, and as what it counts."""
    from tests.mutations import KINDS

    def body(work: Path) -> dict[str, Any]:
        box = Box(_make_folders(work), templates, random.Random(f"{seed} {name}"))
        KINDS[name.partition("-")[0]](box)
        (work / "done").write_text("; ".join(box.done) or "nothing", errors="backslashreplace")
        return _call(box, work)

    return {"input": name, "kind": name.partition("-")[0], **in_child(body, limit_s=limit_s, show=show)}


def in_child(body: Callable[[Path], dict[str, Any]], *, limit_s: float = LIMIT_S, show: bool = False) -> dict[str, Any]:
    """Return what a function says in a fork of this process, with what went wrong: `outcome`, `faults`, `seconds`.

    Args:
        body: is called with an empty folder, which is deleted when it has returned.
        limit_s: after which it is killed.
        show: print what it has printed.
    """
    work = Path(tempfile.mkdtemp(prefix="aepo-fuzz-")).resolve()
    work.chmod(0o755)
    try:
        if (pid := os.fork()) == 0:
            _become_child(work, body)  # never returns
        end = time.monotonic() + limit_s
        while not (has_ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)):
            if time.monotonic() > end:
                break
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it has started, too; it leads a group of its own
        _, status, usage = os.wait4(pid, 0)
        printed = (work / "stderr").read_text(errors="replace") if (work / "stderr").exists() else ""
        if show:
            print((work / "stdout").read_text(errors="replace"), printed, sep="\n")
        row: dict[str, Any] = {
            "what": (work / "done").read_text() if (work / "done").exists() else "",
            "status": None,
            "last_line": next(iter(printed.splitlines()[::-1]), ""),
            "seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "faults": [],
        }
        if not has_ended:
            row["faults"] = [f"no end after {limit_s:g} s"]
        elif os.WIFSIGNALED(status):
            row["faults"] = [f"died of {signal.Signals(os.WTERMSIG(status)).name}"]
        elif os.WEXITSTATUS(status) == BROKEN:
            row["faults"] = [f"the fuzz itself: {row['last_line']}"]
        elif not (work / "row").exists():
            row["faults"] = [f"left with exit status {os.WEXITSTATUS(status)} in the middle of a command"]
        else:
            row |= json.loads((work / "row").read_text())
        return row | {"outcome": _outcome(row)}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _outcome(row: dict[str, Any]) -> str:
    return "failure" if row["faults"] else "result" if row["status"] == 0 else f"error {row['status']}"


def _become_child(work: Path, body: Callable[[Path], dict[str, Any]]) -> None:
    status = BROKEN
    try:
        os.setsid()
        streams = [os.open(work / name, os.O_RDWR | os.O_CREAT, 0o666) for name in ("stdout", "stderr")]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest has it on, and it writes past us
        warnings.resetwarnings()  # as Python itself has them and shows them, whatever pytest does with them
        warnings.showwarning = _show_warning
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        (work / "row").write_text(json.dumps(body(work)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _make_folders(work: Path) -> Path:
    """Make the folders of an input, so deep that a path which climbs out of them is still below `work`."""
    root = work / "w" / "o" / "r" / "k"
    for name in ("home", "cwd", "tmp"):
        (root / name).mkdir(parents=True)
    os.chdir(root / "cwd")
    tempfile.tempdir = None
    for name in [name for name in os.environ if name.startswith(("AEPO_", "MINARI_", "MLFLOW_", "XDG_", "RAY_"))]:
        del os.environ[name]
    os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "OMP_NUM_THREADS": "1"}
    return root


def _call(box: Box, work: Path) -> dict[str, Any]:
    """Call an input's commands and return exit status, last line and faults."""
    if box.unprivileged and os.getuid() == 0:
        for path in [*work.rglob("*"), work]:
            os.chown(path, 65534, 65534, follow_symlinks=False)
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    before = _listing(work)
    faults, statuses, last_line = [], [], ""
    for argv in box.commands:
        begins = [os.lseek(number, 0, os.SEEK_CUR) for number in (1, 2)]
        by_parser = False
        try:
            status = cli.run(argv)
        except SystemExit as leaving:  # of the parser of flags, which says what was wrong in a box
            status, by_parser = leaving.code if isinstance(leaving.code, int) else 1, True
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (_read_from(number, begin) for number, begin in zip((1, 2), begins, strict=True))
        statuses.append(status)
        faults += [f"{argv[0]}: {fault}" for fault in judge(argv, status, out, err, by_parser=by_parser)]
        last_line = last_line or next(iter(err.splitlines()[::-1]), "")
    faults += _not_finite(box.cwd / "out")
    patterns = ["stdout", "stderr", "row", "done", *(f"w/o/r/k/{each}" for each in (*WRITABLE, *box.writable))]
    after = _listing(work)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    outside = sorted(path for path in changed if not any(fnmatch.fnmatchcase(path, each) for each in patterns))
    faults += [f"wrote or removed {path}" for path in outside[:3]]
    return {"status": statuses[0], "last_line": last_line, "faults": faults, "statuses": statuses}


def _read_from(number: int, begin: int) -> str:
    end = os.lseek(number, 0, os.SEEK_END)
    return os.pread(number, end - begin, begin).decode(errors="replace")


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return path -> size and time of everything in a folder; of folders only that they are there."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            facts = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            found[str(path.relative_to(folder))] = (0, 0) if is_folder else (facts.st_size, facts.st_mtime_ns)
    return found


def judge(argv: list[str], status: int, out: str, err: str, *, by_parser: bool = False) -> list[str]:
    """Return what is wrong with how a command ended."""
    faults = []
    lines = err.splitlines()
    if status == 1:
        faults.append(lines[-1] if lines else "exit status 1")
    elif status not in STATUSES:
        faults.append(f"exit status {status}")
    if "Traceback (most recent call last)" in err:
        faults.append("a traceback")
    if warned := re.search(r":\d+: (\w*Warning: .*)", err):
        faults.append(f"a warning: {warned[1]}")
    errors = [line for line in lines if line.startswith("error:")]
    if status in STATUSES[1:] and not by_parser and (len(errors) != 1 or lines[-1] != errors[0]):
        faults.append(f"{len(errors)} lines of error, the last line {lines[-1] if lines else ''!r}")
    if status == 0 and "--json" in argv:
        try:
            document = json.loads(out, parse_constant=_refuse)
        except ValueError as error:
            faults.append(f"no JSON on standard output: {error}")
        else:
            faults += _without_numbers(argv[0], document)
    return faults


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _without_numbers(command: str, document: Any) -> Iterator[str]:
    """Yield the results in a JSON document that are no number: printed, NaN becomes null."""
    rows = document.get("evaluations", []) if command == "train" else document if command == "evaluate" else []
    references = command == "train" and document["ref_min"] is not None
    if references and not document["ref_min"] < document["ref_max"]:
        yield f"scores by the references {document['ref_min']} and {document['ref_max']}"
    for row in rows:
        if not isinstance(row["return_mean"], int | float) or (references and row["score"] is None):
            yield f"a result of {row['method']} without a number"


def _not_finite(folder: Path) -> Iterator[str]:
    """Yield what is not finite in the results and reports that were written."""
    for path in sorted(folder.rglob("result.json")):
        with contextlib.suppress(ValueError, OSError, RecursionError):
            result = json.loads(path.read_text())
            if isinstance(result, dict) and result.get("status") == "finished":
                values = [result.get("score"), result.get("return_mean"), *_numbers(result.get("evaluations"))]
                if any(isinstance(value, float) and not math.isfinite(value) for value in values):
                    yield "a finished result that is not finite"
    for path in sorted(folder.rglob("report.md")):
        if re.search(r"\bnan\b|\binf\b", path.read_text().lower()):
            yield "a report with a number that is not finite"


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    else:
        yield value


def make_templates(folder: Path) -> None:
    """Make what the inputs are mutations of, in a child, which leaves this process as it was."""
    from tests import mutations

    def body(work: Path) -> dict[str, Any]:
        mutations.make_templates(folder, _make_folders(work))
        return {"status": 0}

    if (row := in_child(body, limit_s=300))["faults"]:
        raise SystemExit(f"no templates: {row['faults'][0]}")


def load() -> None:
    """Import what the commands import, once, before any fork, with Python's own settings for the tests."""
    import importlib

    for name in (
        *(
            "aepo.commands.runs",
            "aepo.runs.run",
            "aepo.commands.data",
            "aepo.data.d4rl",
            "aepo.verify",
            "aepo.data.stats",
        ),
        *("tune.commands", "tune.search", "tune.search_commands", "tune.status", "tune.estimate", "tune.space"),
        *("analysis.report", "analysis.tables", "analysis.figures", "analysis.page", "analysis.mlflow_source"),
        "mlflow",
        *_modules_of("minari.dataset"),
        *_modules_of("tyro"),  # some are imported when flags are parsed, where a child may no longer read them
        *("analysis.markdown", "analysis.latex", "analysis.terminal"),
        *("analysis.load", "matplotlib.backends.backend_agg", "h5py", "torch._dynamo", "tests.mutations"),
    ):
        importlib.import_module(name)
    from aepo.environments import register_robotics

    register_robotics()
    for words in (["train", "--dataset", "none/none-v0"], ["data", "verify", "none/none-v0"]):  # what parsing imports
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.run(words)
    for encoding in (
        "us-ascii",
        "idna",
        "utf-8-sig",
        "utf-16",
        "latin-1",
    ):  # one without rights may not read them later
        codecs.lookup(encoding)


def _modules_of(package: str) -> list[str]:
    """Return the names of all modules of a package."""
    import importlib
    import pkgutil

    return [found.name for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--data", type=int, default=500)
    parser.add_argument("--settings", type=int, default=500)
    parser.add_argument("--folders", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[], help="names of inputs, as data-17")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of an input, by the clock")
    parser.add_argument("--out", type=Path, default=None, help="JSON with a row per input")
    flags = parser.parse_args(argv)
    seed = secrets.randbelow(2**31) if flags.seed is None else flags.seed
    print(f"seed {seed}", flush=True)
    load()
    names = flags.only or input_names({kind: getattr(flags, kind) for kind in ("data", "settings", "folders")})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="aepo-fuzz-templates-") as templates:
        Path(templates).chmod(0o755)
        make_templates(Path(templates))
        for name in names:
            row = run_input(seed, name, Path(templates), limit_s=flags.limit_s, show=bool(flags.only))
            rows.append(row)
            if row["faults"] or flags.only:
                print(f"{name}: {row['outcome']}: {row['what']}\n    " + "\n    ".join(row["faults"]), flush=True)
            if flags.out is not None:
                flags.out.write_text(json.dumps({"seed": seed, "inputs": rows}, indent=1))
    print(summary(rows))
    print(f"seed {seed}")
    return 1 if any(row["faults"] for row in rows) else 0


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a line per kind, with how its inputs ended, and what they took."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        counts = ", ".join(
            f"{count} {outcome}" for outcome, count in sorted(Counter(r["outcome"] for r in own).items())
        )
        seconds = [row["seconds"] for row in own]
        lines.append(f"{kind}: {len(own)} inputs: {counts}; {sum(seconds):.0f} core s, {max(seconds):.1f} at most")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
