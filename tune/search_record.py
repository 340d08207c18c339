"""The record of a search while it is carried out, and the runs that a trial of it consists of."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo import config as configs
from aepo import files
from aepo.config import RunConfig
from aepo.errors import ConfigError
from aepo.runs import rundir
from aepo.trials import SEARCH, Confirmation, Round, SearchFile, SearchSpec, Selection, State, Trial, read_search
from tune.space import Space


@dataclasses.dataclass
class SearchRecord:
    """A search.json that is being written: whatever changes is saved before anything depends on it."""

    path: Path
    spec: SearchSpec
    space: Space
    trials: list[Trial]
    select: Selection | None = None
    confirm: Confirmation | None = None

    @staticmethod
    def open(search: Path, spec: SearchSpec, space: Space) -> "SearchRecord":
        """Return the record of a folder, a new one if there is none.

        Raises:
            ConfigError: if the folder holds another search.
            CheckpointError: if its record is not of this version.
        """
        record = SearchRecord(search / SEARCH, spec, space, [])
        if not record.path.exists():
            return record
        document = read_search(search)
        free = ("trials", "select_seeds", "confirm_seeds")
        ours = {**vars(spec), "space": space.to_text()}
        theirs = {**vars(document.spec), "space": document.space}
        if other := [key for key in ours if key not in free and ours[key] != theirs[key]]:
            raise ConfigError(
                f"{search} holds another search: {other[0]} is {theirs[other[0]]} there, {ours[other[0]]} here; "
                "search into another folder with --out"
            )
        record.trials = document.trials
        return record

    def save(self) -> None:
        """Write it atomically."""
        document = SearchFile(
            commit=rundir.commit(),
            spec=self.spec,
            shares=self.spec.shares,
            space=self.space.to_text(),
            trials=self.trials,
            select=self.select,
            confirm=self.confirm,
        )
        files.write_json(self.path, dataclasses.asdict(document))

    def note(self, number: int, row: Round, state: State) -> None:
        """Add a round to a trial and store it."""
        trial = self.trials[number]
        if row.round == len(trial.rounds) + 1:
            trial.rounds.append(row)
            trial.state = state
            self.save()

    def best(self) -> Trial | None:
        """Return the finished trial with the highest last score."""
        finished = [trial for trial in self.trials if trial.state == "finished"]
        return max(finished, key=lambda trial: trial.score, default=None)


def example(spec: SearchSpec, base: RunConfig) -> RunConfig:
    """Return a run as the trials of a search have it: in their rounds, on their seed."""
    return dataclasses.replace(base, seed=spec.seed, rounds=spec.shares)


def trial_configs(record: SearchRecord, params: Mapping[str, Any], bases: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the runs of a trial, one per task."""
    spec = record.spec
    episodes = {"evaluation.num_curve_points": 0}
    episodes |= {f"evaluation.num_{kind}_episodes": spec.num_episodes for kind in ("curve", "grid")}
    plain = [configs.with_overrides(base, episodes) for base in bases]
    return [example(spec, record.space.apply(params, base)) for base in plain]
