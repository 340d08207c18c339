"""`aepo search`: hyperparameters by ASHA, from flags."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.prompt import Confirm

from aepo import config as configs
from aepo.console import emit_json, emit_table, err, say
from aepo.errors import ConfigError, IncompleteError
from aepo.presets import preset
from tune.spec import Compute, Resources, Settings, TaskChoice

if TYPE_CHECKING:
    from aepo.trials import Confirmation


@dataclasses.dataclass(frozen=True)
class Search:
    """Find settings by ASHA: many trials begin, the best third goes on after each round, and stages are shared.

    A trial trains all stages with a share of the budget, is evaluated, and waits; whenever three have come so far, the
    best of those that wait goes on with more, so a search never takes more than --dry-run says. Stages that trials have
    alike are trained once; every pair of beta and guidance scale is tried on every policy. The found settings and the
    preset's own are then trained and evaluated on fresh seeds. The same command again continues. Several tasks share
    one setting, the mean score counts; for settings of its own search each task in a folder of its own.

    For example:
      aepo search --task maze2d-umaze --trials 24 --out searches/umaze
      aepo search --task antmaze-umaze-v2 --source minari --preset best-paper --space mine.toml --gpus 0.25 --dry-run
      aepo search --status --out searches/umaze
      aepo report searches/umaze
      aepo sweep searches/umaze/found.toml --seeds 0 1 2 3 4 --out sweeps/umaze-found
    """

    tasks: tyro.conf.OmitArgPrefixes[TaskChoice] = dataclasses.field(default_factory=TaskChoice)
    """Data that the trials train on."""
    preset: str = "quick"
    """Where the search starts, and what it is compared with; METHOD, BUDGET or METHOD-BUDGET, as in `aepo sweep`."""
    set: Settings = dataclasses.field(default_factory=dict)
    """Settings that differ from the preset in all trials, as in: behavior.steps=2000."""
    space: Path | None = None
    """TOML that says what is varied, as in docs/operations.md; none = the suite's, in tune/spaces."""
    trials: int = 24
    """Settings to try; more of them continue a search."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: Optuna's, which learns from the trials before; random."""
    rounds: int = 3
    """Evaluations of a whole trial."""
    reduction: int = 3
    """One in so many of the trials at a rung goes on; a round has so many times the steps of those before it."""
    grace: int = 1
    """Round after which trials first wait for a promotion; 0 = none does, every trial is trained in full."""
    seed: int = 1000
    """Training seed of all trials; their draws and episodes follow from it. Keep it out of your results' seeds."""
    num_episodes: int = 20
    """Episodes per evaluation, for each pair of beta and guidance scale."""
    select_seeds: tuple[int, ...] = (1001,)
    """Training seeds on which the best trial must beat the preset; else the preset's own settings are what is found."""
    confirm_seeds: tuple[int, ...] = (2000, 2001, 2002)
    """Fresh training seeds for the found settings and the preset's, on which nothing has depended."""
    out: Path = Path("searches/default")
    """Folder of the search; on a cluster one that all nodes see."""
    dry_run: bool = False
    """Show the space and what the search costs at most, and start nothing."""
    yes: bool = False
    """Start without asking."""
    status: bool = False
    """Show the trials of --out and start nothing; from any terminal."""
    stop: bool = False
    """Ask the process that carries --out out to end: every trial stores a checkpoint first."""
    compute: tyro.conf.OmitArgPrefixes[Compute] = dataclasses.field(default_factory=Compute)
    """Where trials are carried out, and what each takes there."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Search, or look at a search; return the exit status."""
        if sum((self.status, self.stop, self.dry_run)) > 1:
            raise ConfigError("--dry-run, --status and --stop are different commands; give one")
        if self.status:
            return self._look()
        if self.stop:
            return self._stop()
        return self._carry_out()

    def _look(self) -> int:
        from aepo.trials import read_search, trial_rows

        document = read_search(self.out)
        if self.json:
            emit_json(dataclasses.asdict(document))
        else:
            emit_table(f"{self.out}", trial_rows(document.trials))
        return 0

    def _stop(self) -> int:
        from tune.plan import STOP
        from tune.search import CONFIRM, SELECT
        from tune.status import is_running

        search = self.out.resolve()
        if not is_running(search):
            raise IncompleteError(f"nobody carries {self.out} out; there is nothing to stop")
        for folder in (search, *(search / name for name in (SELECT, CONFIRM))):
            if folder.is_dir():
                (folder / STOP).touch()
        err.print("asked to stop; every trial stores a checkpoint first (--status shows it)", soft_wrap=True)
        return 0

    def _carry_out(self) -> int:
        if self.rounds < 1 or self.reduction < 2 or self.trials < 1 or not 0 <= self.grace <= self.rounds:
            raise ConfigError("wanted --rounds and --trials from 1, --reduction from 2, --grace from 0 to the rounds")
        self.compute.check()
        seeds = [self.seed, *self.select_seeds, *self.confirm_seeds]
        if not self.select_seeds or not self.confirm_seeds or len(set(seeds)) != len(seeds):
            raise ConfigError(
                "--select-seeds and --confirm-seeds want at least one seed each, none of them twice or the "
                f"search's own (--seed); got {', '.join(map(str, seeds))}"
            )
        rows = self.tasks.rows()
        if not rows:
            raise ConfigError("a search wants at least one task; `aepo data list` shows them")
        bases = [configs.with_overrides(preset(self.preset, row, self.seed), self.set) for row in rows]
        from aepo.trials import SEARCH, SearchSpec, read_search, trial_rows
        from tune.search import describe_space, run_search
        from tune.space import default_space, read_space

        space = read_space(self.space or default_space([base.suite for base in bases]), bases)
        spec = SearchSpec(
            tasks=tuple(row.task for row in rows[: len(rows) - len(self.tasks.dataset)]),
            datasets=self.tasks.dataset,
            source=self.tasks.source,
            preset=self.preset,
            overrides={**self.set},
            trials=self.trials,
            sampler=self.sampler,
            seed=self.seed,
            rounds=self.rounds,
            reduction=self.reduction,
            grace=self.grace,
            num_episodes=self.num_episodes,
            select_seeds=self.select_seeds,
            confirm_seeds=self.confirm_seeds,
        )
        for base in bases:
            dataclasses.replace(base, rounds=spec.shares)  # refuses rounds that the stages are too short for
        asks = sys.stdin.isatty() and err.is_terminal and not self.yes and not (self.out / SEARCH).exists()
        if self.dry_run or asks:
            facts = describe_space(spec, bases, space)
            if self.json:
                emit_json(facts)
            else:
                emit_table(f"what {self.out} varies", facts["space"])
                err.print(facts["cost"], soft_wrap=True)
            if self.dry_run or not Confirm.ask("start?", console=err, default=True):
                return 0
        from tune.mlflow_sink import find_store

        uri = find_store(self.compute.tracking_uri, self.out)
        resources = Resources(**dataclasses.asdict(self.compute), runner="inline")
        record = run_search(self.out, spec, bases, space, resources, tracking_uri=uri)
        if self.json:
            emit_json(dataclasses.asdict(read_search(record.path.parent)))
        else:
            emit_table("trials", trial_rows(record.trials))
            emit_table("found against the preset, on fresh seeds", confirm_rows(record.confirm))
        say(f"settings as a sweep:  aepo sweep {self.out}/found.toml --seeds 0 1 2 3 4")
        say(f"report:               aepo report {self.out}")
        return 0


def confirm_rows(confirm: "Confirmation | None") -> list[dict[str, Any]]:
    """Return one row per setting and fresh seed."""
    assert confirm is not None, "a search that has ended has confirmed"
    return [
        {"settings": name, **{key: getattr(row, key) for key in ("task", "seed", "status", "score", "num_episodes")}}
        for name, rows in (("found", confirm.found), ("default", confirm.default))
        for row in rows
    ]
