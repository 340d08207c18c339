"""What Ray Tune asks in a search: which trial trains next, and up to which round. The record has the answers."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from aepo import config as configs
from aepo.config import RunConfig
from aepo.console import err
from aepo.results import RoundResult
from aepo.runs import rundir
from aepo.trials import Round, SearchSpec, State, Trial
from tune.plan import RUN_FOLDERS, STOP
from tune.search_record import SearchRecord, trial_configs
from tune.space import draw, preset_draw


def next_promotion(record: SearchRecord) -> Trial | None:
    """Return the waiting trial that goes on now, if one does: ASHA (arXiv 1810.05934) with a bound.

    Of the n trials that have come to a rung, n // reduction go on, in whatever order they came: whenever that leaves
    room for one more, it is the best of those that wait there, the highest rung first.
    """
    for rung in reversed(range(1, record.spec.rounds)):
        here = [trial for trial in record.trials if len(trial.rounds) >= rung]
        waiting = _waiting(record, rung)
        gone = sum(len(trial.rounds) > rung or trial.state in ("running", "failed") for trial in here)
        if waiting and gone < len(here) // record.spec.reduction:
            return max(waiting, key=lambda trial: trial.score)
    return None


def best_waiting(record: SearchRecord) -> Trial | None:
    """Return the best of those that wait at the highest rung, if no trial has finished: few trials, or lost ones."""
    if record.best() is not None:
        return None
    for rung in reversed(range(1, record.spec.rounds)):
        if waiting := _waiting(record, rung):
            return max(waiting, key=lambda trial: trial.score)
    return None


def _waiting(record: SearchRecord, rung: int) -> list[Trial]:
    return [trial for trial in record.trials if trial.state == "waiting" and len(trial.rounds) == rung]


def next_rung(spec: SearchSpec, num_rounds: int) -> int:
    """Return the round up to which a trial trains that has had so many: it waits there, or is finished."""
    return max(num_rounds + 1, spec.grace) if spec.grace else spec.rounds


class ASHASearcher(Searcher):
    """What Ray Tune asks for the next piece of work: a trial from one rung to the next.

    First those under way in a continued search, then promotions, then draws. What comes back goes to the record before
    anything depends on it.
    """

    def __init__(
        self,
        record: SearchRecord,
        bases: Sequence[RunConfig],
        values: Mapping[str, Any],
        *,
        on_draw: Callable[[Trial], None],
        on_end: Callable[[Trial], None],
    ):
        """`values` go to every trial; `on_draw` plans a new one, `on_end` hears of those that go on no more."""
        super().__init__(metric="score", mode="max")
        self._record, self._bases, self._values = record, bases, dict(values)
        self._plan, self._end = on_draw, on_end
        self._search = record.path.parent
        self._broken = [trial for trial in record.trials if trial.state == "running"]
        self._numbers: dict[str, int] = {}
        """Tune's id of each piece of work under way -> number of its trial."""
        self._exhausted = False
        self.is_over = False
        """Whether there is no more to train; a search that is broken off is not over."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray stores searchers; this one's state is the record

    def suggest(self, trial_id: str) -> Any:
        """Called by Tune."""
        if (self._search / STOP).exists():
            return Searcher.FINISHED
        record = self._record
        trial = self._broken.pop(0) if self._broken else next_promotion(record) or self._draw()
        if trial is None:
            if self._numbers:
                return None  # what comes of those under way decides
            trial = best_waiting(record)
        if trial is None:
            self.is_over = True
            return Searcher.FINISHED
        if trial.state == "waiting":
            trial.state = "running"
            record.save()
        self._numbers[trial_id] = trial.number
        return {
            **self._values,
            "number": trial.number,
            "runs": trial.runs,
            "ended": len(trial.rounds),
            "until": next_rung(record.spec, len(trial.rounds)),
        }

    def _draw(self) -> Trial | None:
        record = self._record
        if self._exhausted or len(record.trials) >= record.spec.trials:
            return None
        taken = {name for trial in record.trials for name in trial.runs}
        passed: list[Trial] = []
        while True:  # settings that differ in nothing that counts are one trial
            params = preset_draw(record.space, self._bases[0]) if not record.trials and not passed else None
            if params is None:
                params = draw(record.space, record.spec.sampler, record.spec.seed, [*record.trials, *passed])
            if params is None or len(passed) > 100:
                err.print(f"the space has no more than {len(record.trials)} different settings", soft_wrap=True)
                self._exhausted = True
                return None
            runs = trial_configs(record, params, self._bases)
            if not taken & {config.name for config in runs}:
                break
            passed.append(Trial(number=-1, params=params, used={}, runs=[], steps=[], state="failed"))
        used = {key: value for key, value in params.items() if key in configs.used_settings(runs[0])}
        trial = Trial(
            number=len(record.trials),
            params=params,
            used=used,
            runs=[config.name for config in runs],
            steps=[
                sum(config.round_ends(stage)[number] for config in runs for stage in config.stages)
                for number in range(record.spec.rounds)
            ],
        )
        record.trials.append(trial)
        self._plan(trial)
        record.save()
        return trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Called by Tune."""
        row = _round(result["results"], self._record)
        rung = next_rung(self._record.spec, row.round - 1)
        is_last = row.round == self._record.spec.rounds
        state: State = "finished" if is_last else "waiting" if row.round == rung else "running"
        self._record.note(self._numbers[trial_id], row, state)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        """Called by Tune."""
        trial = self._record.trials[self._numbers.pop(trial_id)]
        if trial.state == "running":  # it did not come to the rung
            results = [rundir.read_result(self._search / RUN_FOLDERS / name) for name in trial.runs]
            reasons = [found.error for found in results if found is not None and found.error]
            if reasons or error or not (self._search / STOP).exists():
                lost = "its process was lost again and again" if error else "it ended without a reason"
                trial.state, trial.error = "failed", reasons[0] if reasons else lost
                self._record.save()
        self._end(trial)

    def save(self, checkpoint_path: str) -> None:
        """Called by Tune; the record is stored already."""

    def restore(self, checkpoint_path: str) -> None:
        """Called by Tune; see `save`."""


def _round(results: Sequence[RoundResult], record: SearchRecord) -> Round:
    """Return a round of a trial from those of its runs: with the cell of the heat map that is best over all tasks."""
    beta = guidance_scale = None
    scores = [result.value for result in results]
    if record.space.grid:
        cells = results[0].cells
        best = max(cells, key=lambda cell: sum(result.cells[cell] for result in results))
        beta, guidance_scale = best
        scores = [result.cells[best] for result in results]
    return Round(
        round=results[0].round,
        score=sum(scores) / len(scores),
        scores=dict(zip(record.spec.names, scores, strict=True)),
        beta=beta,
        guidance_scale=guidance_scale,
        steps_reused=sum(result.steps_reused for result in results),
        at=round(time.time(), 1),
    )
