"""What Ray Tune asks in a search: which trial is next, and whether one goes on. The record has the answers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket
from ray.tune.search import Searcher

from aepo import config as configs
from aepo import run, rundir
from aepo.config import RunConfig
from aepo.console import err
from tune.plan import RUN_FOLDERS, STOP
from tune.search import Record, trial_configs
from tune.space import draw, preset_draw


class Asking(Searcher):
    """What Ray Tune asks for the next trial: those under way first, then draws; tells the record how a trial ended."""

    def __init__(
        self,
        record: Record,
        bases: Sequence[RunConfig],
        values: Mapping[str, Any],
        *,
        on_draw: Callable[[dict[str, Any]], None],
        on_end: Callable[[dict[str, Any]], None],
    ):
        """`values` go to every trial; `on_draw` plans a new one, `on_end` hears of those that go on no more."""
        super().__init__(metric="score", mode="max")
        self._record, self._bases, self._values = record, bases, dict(values)
        self._plan, self._end = on_draw, on_end
        self._search = record.path.parent
        self._waiting = [trial for trial in record.trials if trial["state"] == "running"]
        self._numbers: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray stores searchers; this one's state is the record

    def suggest(self, trial_id: str) -> Any:
        """Called by Tune."""
        if (self._search / STOP).exists():
            return Searcher.FINISHED
        trial = self._waiting.pop(0) if self._waiting else self._draw()
        if trial is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = trial["number"]
        return {
            **self._values,
            "number": trial["number"],
            "runs": trial["runs"],
            "ended": len(trial["rounds"]),
        }

    def _draw(self) -> dict[str, Any] | None:
        record = self._record
        if len(record.trials) >= record.spec.trials:
            return None
        taken = {name for trial in record.trials for name in trial["runs"]}
        passed: list[dict[str, Any]] = []
        while True:  # settings that differ in nothing that counts are one trial
            params = preset_draw(record.space, self._bases[0]) if not record.trials and not passed else None
            if params is None:
                params = draw(record.space, record.spec.sampler, record.spec.seed, [*record.trials, *passed])
            if params is None or len(passed) > 100:
                err.print(f"the space has no more than {len(record.trials)} different settings", soft_wrap=True)
                return None
            runs = trial_configs(record, params, self._bases)
            if not taken & {config.name for config in runs}:
                break
            passed.append({"params": params, "state": "failed", "rounds": []})
        used = {key: value for key, value in params.items() if key in configs.used_settings(runs[0])}
        trial = {
            "number": len(record.trials),
            "params": params,
            "used": used,
            "runs": [config.name for config in runs],
            "steps": [
                sum(config.round_ends(stage)[number] for config in runs for stage in config.stages)
                for number in range(record.spec.rounds)
            ],
            "state": "running",
            "rounds": [],
            "error": None,
        }
        record.trials.append(trial)
        self._plan(trial)
        record.save()
        return trial

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        """Called by Tune."""
        trial = self._record.trials[self._numbers[trial_id]]
        if trial["state"] == "running":  # it came to no last round
            results = [rundir.read_result(self._search / RUN_FOLDERS / name) for name in trial["runs"]]
            reasons = [found["error"] for found in results if found is not None and found["error"]]
            if reasons or error or not (self._search / STOP).exists():
                lost = "its process was lost again and again" if error else "it ended without a reason"
                trial |= {"state": "failed", "error": reasons[0] if reasons else lost}
                self._record.save()
        self._end(trial)

    def save(self, checkpoint_path: str) -> None:
        """Called by Tune; the record is stored already."""

    def restore(self, checkpoint_path: str) -> None:
        """Called by Tune; see `save`."""


class Rungs(FIFOScheduler):
    """ASHA (arXiv 1810.05934): Ray's own decisions, on rungs that are read from the record and written to it first."""

    def __init__(self, record: Record):
        """Take the rounds that have ended before."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._record, spec = record, record.spec
        self._bracket = None
        if spec.grace:
            grace, end = spec.reduction ** (spec.grace - 1), spec.reduction**spec.rounds
            self._bracket = _Bracket(grace, end, spec.reduction, 0, stop_last_trials=False)
            for milestone, scores in self._bracket._rungs:
                number = round(math.log(milestone, spec.reduction)) + 1
                for trial in record.trials:
                    if len(trial["rounds"]) >= number:
                        scores[trial["number"]] = trial["rounds"][number - 1]["score"]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Called by Tune."""
        number, row = result["number"], _round(result, self._record)
        last = row["round"] == self._record.spec.rounds
        action = str(TrialScheduler.CONTINUE)
        if self._bracket is not None:
            named: Any = SimpleNamespace(trial_id=number)
            action = self._bracket.on_result(named, result["budget"], row["score"])
        state = "finished" if last else "stopped" if action == TrialScheduler.STOP else "running"
        self._record.note(number, row, state)
        return str(TrialScheduler.CONTINUE) if last else action


def _round(result: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """Return a round of a trial from the metrics of its runs: the pair of the heat map that is best over all tasks."""
    metrics: Sequence[Mapping[str, float]] = result["metrics"]
    beta = guidance_scale = None
    if record.space.grid:
        cells = {key: sum(row[key] for row in metrics) / len(metrics) for key in metrics[0] if key.startswith("grid/")}
        best = max(cells, key=lambda key: cells[key])
        beta, guidance_scale = run.read_cell_name(best.removeprefix("grid/"))
        scores = [row[best] for row in metrics]
    else:
        scores = [row.get("eval/score", row["eval/return_mean"]) for row in metrics]
    return {
        "round": result["round"],
        "score": sum(scores) / len(scores),
        "scores": dict(zip([*record.spec.tasks, *record.spec.datasets], scores, strict=True)),
        "beta": beta,
        "guidance_scale": guidance_scale,
        "steps_reused": int(sum(row["steps_reused"] for row in metrics)),
        "at": round(time.time(), 1),
    }
