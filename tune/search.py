"""A search for settings: trials in rounds under Ray Tune by ASHA, then found against default on fresh seeds.

search.json is the truth: the space, every trial with its rounds, and what became of it, written before a trial goes
on. Ray's own state is thrown away; a repeated command goes on from the file. Trials train in a private seed and are
evaluated on that seed's episodes. One seed says little, and its best is flattered: the best trial must beat the preset
on other seeds before it counts as found, and both are reported on seeds on which nothing has depended.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution
from rich.table import Table

from aepo import config as configs
from aepo import files
from aepo.config import RunConfig
from aepo.console import err, say
from aepo.errors import IncompleteError
from aepo.results import Row
from aepo.trials import OPEN, Confirmation, Outcome, SearchSpec, Selection, Trial, count_steps, words_of
from tune.mlflow_sink import mlflow_tracker
from tune.plan import RUN_FOLDERS, STAGES, STOP, read_digests, write_manifest
from tune.search_record import SearchRecord, example, trial_configs
from tune.space import Space
from tune.spec import Resources
from tune.status import LiveStatus, sweep_lock
from tune.sweep import check_data, on_ray, run_sweep, watching

FOUND, SELECT, CONFIRM = "found.toml", "select", "confirm"
"""Names in a search's folder: of the found settings, and of the sweeps of best and preset, of found and default."""


def run_search(
    search: Path, spec: SearchSpec, bases: Sequence[RunConfig], space: Space, resources: Resources, *, tracking_uri: str
) -> SearchRecord:
    """Carry a search out, or on, and return its record, `confirm` filled in.

    Args:
        search: its folder.
        spec: what to do.
        bases: the preset's config of every task, with any seed.
        space: what is varied.
        resources: what a trial takes; the runs share their stages.
        tracking_uri: of MLflow.

    Raises:
        ConfigError: if the folder holds another search.
        IncompleteError: if no trial has come through, or the search was stopped.
        DataError, ResourceError: as `tune.sweep.run_sweep`.
    """
    search = search.resolve()
    resources = dataclasses.replace(resources, runner="inline", stages=search / STAGES)
    with sweep_lock(search):
        record = SearchRecord.open(search, spec, space)
        _try_out(search, record, bases, resources, tracking_uri)
        _check_stop(search)
        best = record.best()
        if best is None:
            reasons = sorted({trial.error for trial in record.trials if trial.error})
            raise IncompleteError(f"no trial of {search} has finished: {'; '.join(reasons) or 'none was started'}")

        def train(name: str, *settings: Mapping[str, Any], seeds: Sequence[int]) -> list[list[Outcome]]:
            """Return for each of these settings the outcomes of its runs."""
            plans = [_whole_runs(bases, changes, seeds) for changes in settings]
            plan = {config.name: config for runs in plans for config in runs}
            rows = run_sweep(search / name, [*plan.values()], resources, tracking_uri=tracking_uri)
            _check_stop(search)
            found = {run: _outcome(row) for run, row in zip(plan, rows, strict=True)}
            return [[found[config.name] for config in runs] for runs in plans]

        changes = found_settings(space, best)
        seeds = ", ".join(map(str, spec.select_seeds))
        err.print(f"trial {best.number} against the preset, on training seed {seeds}")
        ours, preset = train(SELECT, changes, {}, seeds=spec.select_seeds)
        wins = mean_score(ours) > mean_score(preset)
        settings = changes if wins else {}
        write_preset(search / FOUND, record, best if wins else None, settings)
        err.print(f"found and default settings, on {len(spec.confirm_seeds)} fresh seeds")
        found, default = train(CONFIRM, settings, {}, seeds=spec.confirm_seeds)
        record.select = Selection(trial=best.number, settings=changes, wins=wins, best=ours, preset=preset)
        record.confirm = Confirmation(settings=settings, found=found, default=default)
        record.save()
    return record


def _whole_runs(bases: Sequence[RunConfig], changes: Mapping[str, Any], seeds: Sequence[int]) -> list[RunConfig]:
    changed = [configs.with_overrides(base, changes) for base in bases]
    return [dataclasses.replace(config, seed=seed) for config in changed for seed in seeds]


def _outcome(row: Row) -> Outcome:
    return Outcome(**{field.name: getattr(row, field.name) for field in dataclasses.fields(Outcome)})


def mean_score(outcomes: Sequence[Outcome]) -> float:
    """Return the mean over runs; minus infinity if one has failed."""
    values = [outcome.value for outcome in outcomes if outcome.value is not None]
    return sum(values) / len(values) if len(values) == len(outcomes) else -math.inf


def _check_stop(search: Path) -> None:
    if (search / STOP).exists():
        raise IncompleteError(f"{search} was stopped as asked; the same command goes on")


def found_settings(space: Space, trial: Trial) -> dict[str, Any]:
    """Return a trial's settings as overrides of the preset, with the beta and guidance scale that did best."""
    last = trial.rounds[-1]
    pair = {"sampling.beta": last.beta, "sampling.guidance_scale": last.guidance_scale}
    return {**trial.used, **{key: value for key, value in pair.items() if space.grid and value is not None}}


def write_preset(path: Path, record: SearchRecord, trial: Trial | None, changes: Mapping[str, Any]) -> None:
    """Write the found settings, a trial's or the preset's own (None), as a file that `aepo sweep` takes."""
    spec = record.spec
    which = "the preset's own settings, which no trial beat" if trial is None else f"trial {trial.number}"
    lines = [
        f"# Found by `aepo search`, {len(record.trials)} trials: {which}.",
        *[f"{key} = {json.dumps(list(names))}" for key, names in (("task", spec.tasks), ("dataset", spec.datasets))],
        f"source = {json.dumps(spec.source)}",
        f"preset = [{json.dumps(spec.preset)}]",
        "",
        "[set]",
        *[f"{json.dumps(key)} = {json.dumps(value)}" for key, value in {**spec.overrides, **changes}.items()],
    ]
    files.write_atomically(path, ("\n".join(lines) + "\n").encode())


def _try_out(
    search: Path, record: SearchRecord, bases: Sequence[RunConfig], resources: Resources, tracking_uri: str
) -> None:
    """Bring the record to the number of trials that the spec wants."""
    spec = record.spec
    plans: dict[int, list[RunConfig]] = {
        trial.number: trial_configs(record, trial.params, bases) for trial in record.trials
    }
    open_ = sum(trial.state in OPEN for trial in record.trials)
    missing = max(0, spec.trials - len(record.trials))
    say(f"{spec.trials} trials in {search}: {len(record.trials) - open_} ended, {open_} under way, {missing} to draw")
    if not open_ and not missing:
        return
    examples = [example(spec, base) for base in bases]
    digests = check_data(examples, read_digests(search))
    tracker = mlflow_tracker(search, [config for plan in plans.values() for config in plan], uri=tracking_uri)
    status = LiveSearchStatus(search, record, plans)

    def plan(trial: Trial) -> None:
        plans[trial.number] = added = trial_configs(record, trial.params, bases)
        write_manifest(search, [config for each in plans.values() for config in each], digests)
        for config in added:
            tracker.add(config)
            status.add(config)

    def end(trial: Trial) -> None:
        for config in plans[trial.number]:
            if trial.state == "finished":
                tracker.end(config, "FINISHED")
            elif trial.state == "stopped":
                tracker.end(config, "KILLED", f"stopped by ASHA after round {len(trial.rounds)}")
            elif trial.state == "failed":
                tracker.end(config, "FAILED", trial.error or "")
            if trial.state in ("finished", "stopped"):
                for file in (search / RUN_FOLDERS / config.name).glob("state*.ckpt"):
                    file.unlink()  # its stages are in the store

    for trial in record.trials:
        if trial.state not in OPEN:
            end(trial)
    with watching(status, tracker, lambda: None), on_ray(resources, examples) as slots:
        concurrent = min(slots, open_ + missing)
        err.print(f"{concurrent} at a time, {resources.cpus:g} CPU and {resources.gpus:g} GPU each")
        if _schedule(search, record, bases, resources, concurrent, on_draw=plan, on_end=end):
            for trial in record.trials:
                if trial.state == "waiting":
                    trial.state = "stopped"
                    end(trial)
            record.save()
    tracker.ship_rest()
    tracker.close([_ROW_STATUS[trial.state] for trial in record.trials])


def _schedule(
    search: Path,
    record: SearchRecord,
    bases: Sequence[RunConfig],
    resources: Resources,
    concurrent: int,
    *,
    on_draw: Callable[[Trial], None],
    on_end: Callable[[Trial], None],
) -> bool:
    """Let Ray Tune carry out what ASHA asks for, `concurrent` trials at a time; return whether the search is over."""
    import ray.tune

    from tune.asha import ASHASearcher
    from tune.trainable import ForgetEnded, run_rounds

    values = {
        "sweep": str(search),
        "cpus": resources.cpus,
        "gpus": resources.gpus,
        "stages": str(resources.stages),
        "checkpoint_s": resources.checkpoint_s,
    }
    searcher = ASHASearcher(record, bases, values, on_draw=on_draw, on_end=on_end)
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(run_rounds, ray.tune.PlacementGroupFactory([bundle])),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,  # until it answers that there is no more
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            reuse_actors=False,  # a trial that is ended amid its process leaves it in no known state
        ),
        run_config=ray.tune.RunConfig(
            name=f"tune-{int(time.time())}",
            storage_path=str(search / "tune"),
            failure_config=ray.tune.FailureConfig(max_failures=2),
            callbacks=[ForgetEnded()],
            verbose=0,
        ),
    )
    tuner.fit()
    return searcher.is_over


_ROW_STATUS = {"finished": "finished", "stopped": "finished", "failed": "failed"} | dict.fromkeys(OPEN, "missing")


class LiveSearchStatus:
    """Where each trial of a search stands, from its record and its runs' folders."""

    def __init__(self, search: Path, record: SearchRecord, plans: Mapping[int, Sequence[RunConfig]]):
        """Watch the runs of all trials; nothing is read before `refresh`."""
        self._record = record
        self._runs = LiveStatus(search, [config for plan in plans.values() for config in plan])
        self._lines: dict[int, str] = {}

    def add(self, config: RunConfig) -> None:
        """Watch one more run."""
        self._runs.add(config)

    @property
    def num_ended(self) -> int:
        """Trials that go on no more."""
        return sum(trial.state not in OPEN for trial in self._record.trials)

    def refresh(self) -> None:
        """Read what the runs have written."""
        self._runs.refresh()

    def table(self) -> Table:
        """Return a row per trial, those under way and the best."""
        record, runs = self._record, self._runs.rows()
        best = record.best()
        title = f"{self.num_ended} of {record.spec.trials} trials ended, {_saved(record)}"
        table = Table(title=title, title_justify="left")
        for column in ("trial", "settings", "state", "scores by round", "now"):
            table.add_column(column, justify="right" if column == "trial" else "left")
        for trial in record.trials[-40:]:
            scores = "  ".join(f"{row.score:.1f}" for row in trial.rounds)
            style = "bold" if trial is best else "dim" if trial.state in ("stopped", "failed") else ""
            table.add_row(str(trial.number), words_of(trial.used), trial.state, scores, _now(trial, runs), style=style)
        return table

    def lines(self) -> list[str]:
        """Return one line per trial that has moved since the last call."""
        lines, runs = [], self._runs.rows()
        for trial in list(self._record.trials):
            scores = ", ".join(f"{row.score:.1f}" for row in trial.rounds)
            text = f"trial {trial.number}  {trial.state}  {_now(trial, runs)}  {f'scores {scores}' * bool(scores)}"
            if self._lines.get(trial.number) != text:
                self._lines[trial.number] = text
                lines.append(f"{text}  {words_of(trial.used)}")
        return lines


def _now(trial: Trial, runs: Mapping[str, Mapping[str, str]]) -> str:
    if trial.state != "running":
        return ""
    rows = [runs[name] for name in trial.runs if name in runs]
    return f"{rows[-1]['stage']} {rows[-1]['step']}" if rows else "waiting"


def _saved(record: SearchRecord) -> str:
    taken, reused, _ = count_steps(record.trials)
    return f"{taken:,} gradient steps taken, {reused:,} saved by shared stages"


def describe_space(spec: SearchSpec, bases: Sequence[RunConfig], space: Space) -> dict[str, Any]:
    """Return what a search varies, a row per setting, and what it costs at most."""
    rows = []
    for key, kind in space.varied.items():
        if isinstance(kind, CategoricalDistribution):
            rows.append({"setting": key, "values": ", ".join(map(str, kind.choices))})
        else:
            scale = "log" if getattr(kind, "log", False) else "uniform"
            rows.append({"setting": key, "values": f"{kind.low:g} to {kind.high:g} ({scale})"})  # type: ignore[attr-defined]
    for key, values in space.grid.items():
        rows.append({"setting": key, "values": f"{', '.join(f'{v:g}' for v in values)} (on every policy)"})
    steps = sum(base.num_steps for base in bases)
    shares, going_on = (0.0, *spec.shares), spec.trials
    share = 0.0
    for number, (before, after) in enumerate(pairwise(shares)):
        if spec.grace and number >= spec.grace:
            going_on = max(1, going_on // spec.reduction)
        share += (after - before) * going_on / spec.trials
    cells = math.prod(len(values) for values in space.grid.values())
    cost = (
        f"{spec.trials} trials of {steps:,} gradient steps; at most {share:.0%} of them, since one in {spec.reduction} "
        f"goes on at each rung, less what trials share; {cells} x {spec.num_episodes} episodes per evaluation; then "
        f"2 x {len(spec.select_seeds)} whole runs per task to select, 2 x {len(spec.confirm_seeds)} to confirm"
    )
    return {"space": rows, "cost": cost}
