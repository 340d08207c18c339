"""The `aepo` command: a table of names; a command's module is imported when the command is called."""

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import tyro

from aepo import __version__
from aepo.console import err, results_only, warn
from aepo.errors import AEPOError, ResourceError, from_machine

COMMANDS = {
    "quickstart": (
        "tune.quickstart:Quickstart",
        "collect two mazes, sweep 2 tasks x 2 seeds, print the table",
    ),
    "train": ("aepo.commands.runs:Train", "train and evaluate one run, without Ray"),
    "sweep": ("tune.commands:Sweep", "train tasks x seeds on Ray, track in MLflow, resume when repeated"),
    "benchmark": ("tune.benchmark:Benchmark", "all tasks from nothing to the table: plan, fetch, import, run, report"),
    "search": ("tune.search_commands:Search", "find settings by ASHA, each stage trained once, checked on fresh seeds"),
    "evaluate": ("aepo.commands.runs:Evaluate", "roll out a trained policy again, with other settings if wanted"),
    "report": ("analysis.report:Report", "turn a sweep's runs into tables and figures"),
    "toy": ("aepo.commands.runs:Toy", "compare all energy targets with the exact answer on two-dimensional sets"),
    "bench": (
        "aepo.commands.bench:Bench",
        "measure steps, actions, evaluation on this machine beside a plain baseline",
    ),
    "data": ("aepo.commands.data:DATA", "list, show and collect data sets"),
    "store": ("aepo.commands.runs:STORE", "list and prune the trained stages that runs share"),
    "clean": ("tune.clean:Clean", "delete what finished runs no longer need, never results, policies or metrics"),
    "cluster": ("cluster.commands:CLUSTER", "bring up a cluster on this machine, look at one, take it down"),
    "submit": ("cluster.commands:Submit", "run a sweep file on a Ray cluster, as a job that survives this command"),
    "jobs": ("cluster.commands:JOBS", "list, show, follow, stop the sweeps on a cluster, fetch their tables"),
    "doctor": ("cluster.doctor:Doctor", "say what this machine can run, and what is missing"),
}
"""name -> (module:object that tyro can parse and that has run() -> exit status, one line of help)."""

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
LOOPBACK = ("localhost", "127.0.0.1", "::1")

EXIT_STATUS = """exit status:
  0 success                 1 unexpected error   2 wrong flag or setting   3 data or runs missing or unusable
  4 bad checkpoint or policy file                5 training failed         6 machine or disk too small, no cluster"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit status; the entry point of the console script."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Return the exit status of one command line; known errors are one line, `--debug` shows the traceback."""
    _reach_this_machine()
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        warn(f"no command {name!r}; {hint}", kind="error", style="red")
        return 2
    try:
        module, _, attribute = COMMANDS[name][0].partition(":")
        command = parse(getattr(importlib.import_module(module), attribute), f"aepo {name}", rest)
        try:
            with results_only():
                return int(command.run())
        except SystemExit as error:  # of a library or an environment, whose status would be taken for ours
            raise RuntimeError(f"something asked Python to exit with {error.code!r}") from error
    except BrokenPipeError:  # `aepo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if known := _as_known(error):
            line = str(known).replace("\n", "\\n")  # names of files may have such
            warn(line, kind="error", style="red")
            return known.exit_status
        text = f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
        warn(text, kind="unexpected error", style="red")
        return 1
    except KeyboardInterrupt:
        err.print("stopped; the same command continues where this one ended")
        return 130


def _reach_this_machine() -> None:
    """Keep a proxy of the surroundings out of what stays on this machine: Ray's and MLflow's servers on it."""
    if not any(os.environ.get(name) for name in PROXIES):
        return
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if known.strip() != "*":
        hosts = [host for host in map(str.strip, known.split(",")) if host]
        known = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    os.environ |= {"no_proxy": known, "NO_PROXY": known}


def parse(kind: Any, prog: str, words: list[str]) -> Any:
    """Return a command with its flags; where its class has `with_file`, what a file says is the flags' default.

    So a flag that is given wins, whatever it says: the parser knows which are given, a comparison afterwards does not.
    """
    if not hasattr(kind, "with_file"):
        return tyro.cli(kind, prog=prog, args=words, config=(tyro.conf.FlagCreatePairsOff,))
    command = tyro.cli(kind, prog=prog, args=words)
    return command if command.file is None else tyro.cli(kind, prog=prog, args=words, default=command.with_file())


def _as_known(error: Exception) -> AEPOError | None:
    """Return what users can understand and mend, None for what nobody expected."""
    if isinstance(error, AEPOError):
        return error
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, called by Ray and MLflow
        return ResourceError("this user has no home, where Ray and MLflow keep files; set HOME to a folder")
    return from_machine(error)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: aepo COMMAND [flags]        (aepo COMMAND --help for flags and an example)",
            "",
            *lines,
            "",
            "--debug anywhere shows the traceback of an error.",
            "",
            EXIT_STATUS,
        ]
    )
