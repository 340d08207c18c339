"""`aepo clean`: what finished runs no longer need goes from the disk; results, policies and metrics never do."""

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro
from rich.prompt import Confirm

from aepo.checkpoint import FILE, PREVIOUS
from aepo.console import emit_json, emit_table, err, say
from aepo.errors import AEPOError, BusyError, ConfigError
from aepo.runs import rundir
from tune.plan import MANIFEST, RUN_FOLDERS, STAGES, pending, read_manifest
from tune.status import is_running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Something that may be deleted."""

    what: str
    """Kind of file: checkpoints, stages or scheduler."""
    path: Path
    num_bytes: int

    def delete(self) -> None:
        """Delete it; what is gone already is no error."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Clean:
    """Delete what finished runs no longer need: checkpoints, and of a finished sweep its stored stages and Ray's state.

    Results, policies, metrics, tables and reports stay, and so do runs that have not finished. What would go is shown
    first, and on a terminal you are asked. Stages are trained again if another run wants them.

    For example:
      aepo clean sweeps/methods --dry-run
      aepo clean sweeps/methods --yes
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """A sweep's folder, a folder of runs, or a run's own."""
    dry_run: bool = False
    """Show what would go and delete nothing."""
    yes: bool = False
    """Delete without asking."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Show, ask and delete; return the exit status."""
        items = deletable(self.folder)
        sizes: Counter[str] = Counter()
        for item in items:
            sizes[item.what] += item.num_bytes
        rows = [
            {"what": what, "files": sum(item.what == what for item in items), "mb": size / 1e6}
            for what, size in sizes.items()
        ]
        asks = not (self.dry_run or self.yes) and bool(items)
        if not self.json:
            emit_table(f"may go from {self.folder}", rows, columns=("what", "files", "mb"))
        if asks and not (sys.stdin.isatty() and err.is_terminal):
            raise ConfigError("no terminal to ask on; give --yes to delete, or --dry-run to look")
        delete = bool(items) and not self.dry_run and (not asks or Confirm.ask("delete?", console=err, default=False))
        if delete:
            for item in items:
                item.delete()
            say(f"{sum(sizes.values()) / 1e6:,.1f} MB deleted")
        if self.json:
            emit_json({"folder": str(self.folder), "deleted": delete, "items": rows})
        return 0


def deletable(folder: Path) -> list[Item]:
    """Return what may go from a sweep's folder, a folder of runs, or a run's own.

    Raises:
        ConfigError: if there is no run.
        BusyError: if a process carries the sweep out.
    """
    if is_running(folder):
        raise BusyError(f"{folder} is carried out now; wait until that has ended, aepo sweep --stop --out {folder}")
    found = [folder, *folder.glob("*"), *folder.glob(f"{RUN_FOLDERS}/*")]
    runs = [path for path in found if (path / rundir.CONFIG).is_file()]
    if not runs:
        raise ConfigError(f"no run in {folder}; wanted the folder of a sweep, of runs, or of a run")
    items = [item for run in sorted(runs) for item in of_run(run)]
    if (folder / MANIFEST).is_file() and not pending(folder, read_manifest(folder), retry_failed=True):
        for what, name in (("stages", STAGES), ("scheduler", "tune")):
            if (folder / name).is_dir():
                items.append(Item(what=what, path=folder / name, num_bytes=_size(folder / name)))
    return items


def of_run(run: Path) -> Iterator[Item]:
    """Yield what a run no longer needs; nothing unless it has finished."""
    try:
        result = rundir.read_result(run)
    except AEPOError:
        return
    if result is None or result.status != "finished":
        return
    for what, name in (("checkpoints", FILE), ("checkpoints", PREVIOUS), ("scheduler", "train")):
        if (run / name).exists():
            yield Item(what=what, path=run / name, num_bytes=_size(run / name))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())
