"""`aepo train`, `evaluate`, `toy` and `store`: one run, one policy, the toy bench, stored stages; without Ray."""

import dataclasses
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from aepo import method_table, trust
from aepo.console import emit_json, emit_table, err, say, warn
from aepo.errors import AEPOError, CheckpointError, ConfigError
from aepo.results import selected_name

if TYPE_CHECKING:
    from aepo.policy import Policy
    from aepo.results import Evaluation, Result

RESULT_KEYS = [
    "task",
    "dataset",
    "seed",
    "fingerprint",
    "status",
    "score",
    "return_mean",
    "num_episodes",
    "steps",
    "seconds",
    "folder",
]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train the stages of one run, evaluate the policy, and print its score.

    It ends with what speaks for or against the run, and a warning for each bound that it has passed.
    The same command again continues where it was stopped, or prints the result if it has ended.

    For example:
      aepo train --task maze2d-umaze --seed 0
      aepo train --dataset mujoco/hopper/medium-v0 --preset analytic-smoke --json
    """

    task: str = ""
    """Name of a task (`aepo data list` shows them)."""
    source: str = ""
    """Source of the task's data: d4rl (the original file), minari (what Farama regenerated);
    none = the task's first, which is d4rl for the benchmark's tasks."""
    dataset: str = ""
    """Id of any local Minari data set with a Box action space, instead of a task."""
    seed: int = 0
    """Seeds weights, batches, noise and evaluation."""
    preset: Annotated[str, tyro.conf.arg(help=method_table.preset_help("best"))] = "quick"
    set: tuple[str, ...] = ()
    """Settings that differ from the preset, as in: critic.expectile=0.9 sampling.beta=1."""
    out: Path = Path("runs")
    """Folder in which the run's own folder is made."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU cores to use; results are the same bit for bit only for the same number."""
    eval_processes: int = 1
    """Processes that step the environments of an evaluation, this one among them; results do not depend on it."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints."""
    stage_store: Path | None = None
    """Folder of trained stages: what another run has trained there is taken, the rest is left there (aepo store)."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Train and print; return the exit status."""
        if bool(self.task) == bool(self.dataset):
            raise ConfigError("train wants either --task NAME or --dataset ID; `aepo data list` shows both")
        if min(self.threads, self.eval_processes) < 1:
            got = f"{self.threads} and {self.eval_processes}"
            raise ConfigError(f"--threads and --eval-processes must be at least 1, got {got}")
        _check_cores(self.threads, self.eval_processes)
        if not 0 <= self.checkpoint_s < math.inf:
            raise ConfigError(f"--checkpoint-s must be a number of seconds from 0, got {self.checkpoint_s}")
        from aepo import config as configs
        from aepo import tasks
        from aepo.presets import preset
        from aepo.runs import run
        from aepo.runs.stage_store import StageStore

        if self.source and self.dataset:
            raise ConfigError("--source chooses among the data of a --task; --dataset is one data set")
        task = tasks.find(self.task, self.source) if self.task else tasks.for_dataset(self.dataset)
        config = configs.with_overrides(preset(self.preset, task, self.seed), configs.parse_overrides(self.set))
        if self.stage_store is not None and self.stage_store.exists() and not self.stage_store.is_dir():
            raise ConfigError(f"--stage-store {self.stage_store} is a file; wanted a folder, or none yet")
        run.set_up_torch(self.threads)
        device, folder = run.select_device(self.device), self.out / config.name
        with StageBars(config) as bars:
            try:
                result = run.execute(
                    config,
                    folder,
                    run.FolderStore(folder),
                    device=device,
                    checkpoint_s=self.checkpoint_s,
                    on_progress=bars.update,
                    stage_store=StageStore(self.stage_store) if self.stage_store is not None else None,
                    eval_processes=self.eval_processes,
                )
            except (AEPOError, OSError) as error:
                if self.json and (failed := _failure(folder, error)) is not None:
                    emit_json({key: getattr(failed, key) for key in (*RESULT_KEYS, "error")})
                raise
        if self.json:
            emit_json(dataclasses.asdict(result))
        else:
            emit_table(
                f"{config.task}, seed {config.seed} ({config.data.source} data {config.data.dataset})",
                [
                    {key: getattr(row, key) for key in EVALUATION_COLUMNS}
                    | {"method": selected_name(row.method, row.selected_episodes)}
                    for row in result.evaluations
                ],
            )
            say(f"run, policy and result: {folder}")
        say(trust.line(result))
        for doubt in trust.doubts(result.diagnostics):
            warn(doubt)
        return 0


MAX_CORES = 1024


def _check_place(path: Path) -> None:
    """Raise an OSError, before anything is computed, for a file that cannot be written; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def _failure(folder: Path, error: Exception) -> "Result | None":
    """Return the result that a run has left of this error, None if it has left none."""
    from aepo.runs import rundir

    with suppress(AEPOError, OSError):
        result = rundir.read_result(folder)
        return result if result is not None and result.error == f"{type(error).__name__}: {error}" else None
    return None


def _known_doubts(folder: Path, fingerprint: str) -> list[str]:
    """Return what the result beside a policy says against its run; nothing where there is none of that run."""
    from aepo.runs import rundir

    with suppress(AEPOError, OSError):
        result = rundir.read_result(folder)
        if result is not None and result.fingerprint == fingerprint:
            return trust.doubts(result.diagnostics)
    return []


EVALUATION_COLUMNS = [
    "method",
    "beta",
    "guidance_scale",
    "nats",
    "kl",
    "score",
    "return_mean",
    "return_std",
    "num_episodes",
]


class StageBars:
    """Progress bars with step rate and time left, on standard error."""

    def __init__(self, config: Any):
        """One bar per stage; on no terminal, one line per tenth of a stage."""
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[rate]}  loss {task.fields[loss]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=err,
            disable=not err.is_terminal,
        )
        self._bars = {
            name: self._progress.add_task(name, total=stage.steps, start=False, rate="", loss="-")
            for name, stage in config.stages.items()
        }
        self._current = ""
        self._first = (0.0, 0)
        self._loss = "-"

    def __enter__(self) -> "StageBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, progress: Any) -> None:
        """Show a Progress of the pipeline."""
        now = time.monotonic()
        if progress.stage != self._current:
            self._current, self._first = progress.stage, (now, progress.step)
            self._progress.start_task(self._bars[progress.stage])
        seconds, steps = now - self._first[0], progress.step - self._first[1]
        rate = f"{steps / seconds:,.0f} steps/s" if seconds > 0.5 else ""
        if progress.metrics:
            self._loss = f"{progress.metrics[f'{progress.stage}/loss']:.4g}"
        self._progress.update(self._bars[progress.stage], completed=progress.step, rate=rate, loss=self._loss)
        if not err.is_terminal and progress.step % max(1, progress.num_steps // 10) == 0:
            err.print(f"{progress.stage} {progress.step:,}/{progress.num_steps:,}  {rate}  loss {self._loss}")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Roll out a trained policy in the evaluation environment of its data set.

    beta, guidance scale, temperature and candidates need no training: give others to see what they do. The last two
    examples compare a single clone with the best of 16 by Q, a first look at the critic (docs/decisions/settings.md).

    For example:
      aepo evaluate runs/maze2d-umaze-s0-0123456789ab --beta 1 3 --guidance-scale 0 1 3 --figure grid.png
      aepo evaluate runs/maze2d-umaze-s0-0123456789ab --nats 0 0.3 1 3
      aepo evaluate runs/maze2d-umaze-s0-0123456789ab --num-steps 3 5 10 15 --json
      aepo evaluate runs/maze2d-umaze-s0-0123456789ab --guidance-scale 0 --temperature 1 --num-candidates 1
      aepo evaluate runs/maze2d-umaze-s0-0123456789ab --guidance-scale 0 --temperature 1 --num-candidates 16
    """

    policy: Annotated[Path, tyro.conf.Positional]
    """A policy.safetensors, or the folder of its run."""
    beta: tuple[float, ...] = ()
    """Inverse temperatures; none given = the run's."""
    guidance_scale: tuple[float, ...] = ()
    """Guidance scales; none given = the run's; 0 = diffusion behaviour cloning."""
    nats: tuple[float, ...] = ()
    """What guidance may cost an action on the mean, KL(guided || behaviour) in nats; none given = the run's.
    Where the scale costs more on states of the data, it is lowered; 0 = no bound."""
    figure: Path | None = None
    """Write a heat map of the scores over beta and guidance scale, or nats, as PNG."""
    temperature: float | None = None
    """Standard deviation of the solver's start; none = the run's.
    1 draws from the policy, 0 is one action, near the mode."""
    num_candidates: int = 0
    """Actions drawn per state, the one with the largest Q taken; 0 = the run's number."""
    num_steps: tuple[int, ...] = ()
    """Numbers of solver steps per action; none given = the run's."""
    num_episodes: int = 50
    """Episodes per setting."""
    seed: int = 12345
    """Seed of the episodes; by default apart from those of training."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, ..."""
    threads: int = 1
    """CPU cores to use."""
    eval_processes: int = 1
    """Processes that step the environments of an evaluation, this one among them; results do not depend on it."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Evaluate every combination and print; return the exit status."""
        if min(self.num_episodes, self.threads, self.eval_processes) < 1:
            got = f"{self.num_episodes}, {self.threads} and {self.eval_processes}"
            raise ConfigError(f"--num-episodes, --threads and --eval-processes must be at least 1, got {got}")
        _check_cores(self.threads, self.eval_processes)
        if self.figure is not None and len(self.num_steps) > 1:
            raise ConfigError("--figure draws beta and guidance scale: give one of --num-steps")
        if self.figure is not None:
            _check_place(self.figure)
        from aepo.evaluate import Evaluator, draw_grid
        from aepo.policy import Policy
        from aepo.runs import evaluation, run, rundir

        run.set_up_torch(self.threads)
        path = self.policy / rundir.POLICY if self.policy.is_dir() else self.policy
        if not path.exists():
            raise CheckpointError(f"no policy at {path}; `aepo train` writes one into the folder it prints")
        policy = Policy.load(path, run.select_device(self.device))
        config = policy.config
        evaluator = Evaluator.of(config, processes=self.eval_processes)
        rows: list[dict[str, Any]] = []
        evaluations: list[Evaluation] = []
        policies = self._settings(policy)
        for i, each in enumerate(policies):
            row = evaluation.evaluate(each, evaluator, num_episodes=self.num_episodes, seed=self.seed)
            steps = each.sampling.num_steps if each.sampling else None
            if len(policies) > 1:
                bound = f", {row.nats:g} nats" * bool(row.nats)
                guided = f"beta {row.beta:g}, guidance scale {row.guidance_scale:g}{bound}, " if row.beta else ""
                setting = f"{guided}{steps} steps"
                err.print(f"{i + 1} of {len(policies)}: {setting}: return {row.return_mean:.4g}")
            names = {"task": config.task, "seed": config.seed, "fingerprint": config.fingerprint}
            rows.append({**names, "num_steps": steps, **dataclasses.asdict(row)})
            evaluations.append(row)
        evaluator.close()
        if self.json:
            emit_json(rows)
        else:
            emit_table(
                f"{config.task}, seed {config.seed}, {self.num_episodes} episodes each",
                [{key: row[key] for key in (*EVALUATION_COLUMNS, "num_steps")} for row in rows],
            )
        for doubt in _known_doubts(path.parent, config.fingerprint):
            warn(f"the run {path.parent.name}: {doubt}")
        if self.figure is not None:  # last: no numbers are lost with it
            title = f"{config.task}, seed {config.seed}, {self.num_episodes} episodes each"
            draw_grid([row.cell() for row in evaluations], self.figure, title=title)
            say(f"heat map: {self.figure}")
        return 0

    def _settings(self, policy: "Policy") -> "list[Policy]":
        """Return the policy once per combination of beta, guidance scale and solver steps."""
        own = policy.sampling
        if self.figure is not None and own is not None and not policy.config.is_guided:
            raise ConfigError(f"--figure draws beta and guidance scale, which {policy.config.method} does not have")
        if own is None:
            given = (self.beta, self.guidance_scale, self.nats, self.num_candidates, self.num_steps, self.figure)
            if any(given) or self.temperature is not None:
                raise ConfigError(
                    f"a policy of {policy.config.method} has one way to act; leave out --beta, --guidance-scale, "
                    "--nats, --temperature, --num-candidates, --num-steps and --figure"
                )
            return [policy]
        temperature = own.temperature if self.temperature is None else self.temperature
        return [
            policy.with_sampling(
                dataclasses.replace(
                    own,
                    beta=beta,
                    guidance_scale=scale,
                    nats=budget,
                    temperature=temperature,
                    num_candidates=self.num_candidates or own.num_candidates,
                    num_steps=steps,
                )
            )
            for beta in self.beta or (own.beta,)
            for scale in self.guidance_scale or (own.guidance_scale,)
            for budget in self.nats or (own.nats,)
            for steps in self.num_steps or (own.num_steps,)
        ]


@dataclasses.dataclass(frozen=True)
class Toy:
    """Train every energy target on two-dimensional sets and print its distance to the exact answer.

    The distance is the sliced Wasserstein-2 of 4,000 guided samples to 4,000 exact ones; `floor` is that of two
    exact draws. Scatter plots are written, too.

    For example:
      aepo toy
      aepo toy --sets eight_gaussians rings --targets analytic/data_action contrastive --betas 3 --json
    """

    sets: tuple[str, ...] = ()
    """Names among eight_gaussians, moons, rings, swiss_roll, two_spirals, checkerboard; none given = all."""
    targets: tuple[str, ...] = ()
    """closed_form, or targets, analytic ones with /posterior_mean or /data_action behind them; none given = all."""
    betas: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Inverse temperatures; one training serves all."""
    steps: int = 5000
    """Gradient steps of the behaviour model and of each target."""
    seed: int = 0
    """Seeds data, weights and draws."""
    threads: int = 1
    """CPU cores to use."""
    out: Path = Path("toy")
    """Folder for the scatter plots."""
    json: bool = False
    """Print one JSON list, an object per set, beta and target, on standard output and nothing else."""

    def run(self) -> int:
        """Train, compare, draw and print; return the exit status."""
        from rich.progress import track

        from aepo.config import check_beta
        from aepo.runs.run import set_up_torch
        from aepo.toy import SETS, Bench, energy_config, variants

        names, targets = self.sets or tuple(SETS), self.targets or variants()
        for given, known in ((names, SETS), (targets, variants())):
            if unknown := [name for name in given if name not in known]:
                raise ConfigError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
        if min(self.steps, self.threads) < 1 or not self.betas or min(self.betas) <= 0:
            raise ConfigError("--steps and --threads must be at least 1 and every beta above 0")
        _check_cores(self.threads)
        for variant in targets:
            for beta in self.betas:
                check_beta(energy_config(variant, self.steps), beta)
        set_up_torch(self.threads)
        self.out.mkdir(parents=True, exist_ok=True)
        jobs = [(name, variant) for name in names for variant in ("none", *targets)]
        bench: Bench | None = None
        rows: list[dict[str, Any]] = []
        for name, variant in track(jobs, description="targets", console=err, disable=not err.is_terminal):
            if bench is None or bench.name != name:
                bench = Bench(name, steps=self.steps, seed=self.seed, betas=self.betas)
            rows += bench.compare(variant)
            if not err.is_terminal:
                err.print(f"{name}: {variant}")
            if variant == jobs[-1][1]:
                bench.draw(self.out / f"{name}.png")
        if self.json:
            emit_json(rows)
        else:
            emit_table("sliced Wasserstein-2 to the exact policy", _as_table(rows))
            say(f"scatter plots: {self.out}")
        return 0


def _check_cores(*numbers: int) -> None:
    """Raise a ConfigError for more threads or processes than any machine has: libraries crash, or try to start them."""
    if max(numbers) > MAX_CORES:
        raise ConfigError(f"threads and processes must be at most {MAX_CORES}, got {max(numbers)}")


def _as_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    table: dict[tuple[str, float], dict[str, str]] = {}
    for row in rows:
        key = (row["set"], row["beta"])
        line = table.setdefault(key, {"set": row["set"], "beta": f"{row['beta']:g}", "floor": f"{row['floor']:.3f}"})
        line[row["target"].replace("analytic_second_order", "second_order")] = f"{row['distance']:.3f}"
    return list(table.values())


@dataclasses.dataclass(frozen=True)
class StoreList:
    """List trained stages, the most recently used first.

    For example:
      aepo store list sweeps/methods/stages
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the store."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print a row per stage; return the exit status."""
        rows = _stored(self.folder)
        emit_json(rows) if self.json else emit_table(f"trained stages in {self.folder}", rows)
        return 0


@dataclasses.dataclass(frozen=True)
class StoreSize:
    """Say how many trained stages there are and what they take.

    For example:
      aepo store size sweeps/methods/stages
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the store."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print the size; return the exit status."""
        rows = _stored(self.folder)
        facts = {"folder": str(self.folder), "stages": len(rows), "mb": sum(row["mb"] for row in rows)}
        emit_json(facts) if self.json else emit_table("store", [facts])
        return 0


@dataclasses.dataclass(frozen=True)
class StorePrune:
    """Delete the stages that were used longest ago; runs train them again if they want them.

    For example:
      aepo store prune sweeps/methods/stages --max-mb 1000
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the store."""
    max_mb: float
    """Megabytes that the rest may take."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Delete and print what was deleted; return the exit status."""
        from aepo.runs.stage_store import StageStore

        if not 0 <= self.max_mb < math.inf:
            raise ConfigError(f"--max-mb must be a number not below 0, got {self.max_mb}")
        _stored(self.folder)
        deleted = StageStore(self.folder).prune(int(self.max_mb * 1e6))
        rows = [{"key": entry.key, "mb": entry.num_bytes / 1e6} for entry in deleted]
        emit_json(rows) if self.json else emit_table(f"deleted from {self.folder}", rows, columns=("key", "mb"))
        return 0


STORE: TypeAlias = (
    Annotated[StoreList, tyro.conf.subcommand("list")]
    | Annotated[StoreSize, tyro.conf.subcommand("size")]
    | Annotated[StorePrune, tyro.conf.subcommand("prune")]
)
"""What `aepo store` parses."""


def _stored(folder: Path) -> list[dict[str, Any]]:
    from aepo.runs.stage_store import StageStore

    if not folder.is_dir():
        raise CheckpointError(f"no store at {folder}; a sweep with --reuse-stages has one in its folder, stages/")
    return [
        {
            "key": entry.key,
            "mb": entry.num_bytes / 1e6,
            "used": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.used_at)),
        }
        for entry in StageStore(folder).entries()
    ]
