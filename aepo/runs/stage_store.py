"""Trained stages, kept under what they are a function of, so that no run trains again what another has trained.

A stage is determined by the data, its own settings, the seed, the stages that it learns from, and how matrix products
are computed: its key is a digest of these, and of the rounds before where a run has several. A file of the store is a
checkpoint (aepo/checkpoint.py) of one stage with the metrics that its training wrote, and with its evaluations on the
way, which another run takes if it would have made the same. Two runs that want a stage at once train it once: the
second waits for a lock that goes with the process which holds it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import torch

from aepo import checkpoint, kernels, methods, pipeline
from aepo.config import RunConfig, identifying_fields
from aepo.console import say, warn
from aepo.documents import parse_json
from aepo.errors import CheckpointError
from aepo.files import open_lock, try_lock, write_atomically
from aepo.runs.evaluation import OWN
from aepo.runs.spool import ROUND
from aepo.stages import States

FORMAT = 1
SUFFIX = ".stage"
Row: TypeAlias = dict[str, Any]
"""A row of a run's metrics.jsonl."""


def stage_keys(config: RunConfig, data_digest: str) -> dict[tuple[str, int], str]:
    """Return (stage, step at which a round leaves it) -> key, 24 hex digits, in the order of training.

    Keys are those of stages trained with the backend in use (aepo/kernels.py).

    Args:
        config: the run.
        data_digest: of its transitions.
    """
    method, keys = methods.find(config.method), dict[tuple[str, int], str]()
    stages = methods.stages_of(config)
    for number in range(len(config.rounds)):
        ends = {name: config.round_ends(name) for name in config.stages}
        for stage in stages:
            name, own = stage.name, config.stages[stage.name]
            facts = {
                "format": FORMAT,
                "torch": torch.__version__,
                "arithmetic": [kernels.ARITHMETIC, kernels.backend()],
                "stage": name,
                "config": identifying_fields(own),
                "data": [data_digest, list(config.data.observation_keys), config.data.reward_rule],
                "seed": config.seed,
                "upstream": [keys[other, ends[other][number]] for other in stage.learns_from(own)],
            }
            if name not in pipeline.STREAMS:  # whose keys are from before streams had names
                facts["stream"] = pipeline.stream_seed(name, config.seed)
            if config.data.held_out_share:
                facts["held_out_share"] = config.data.held_out_share
            if method.code:
                facts["code"] = method.code
            if len(config.rounds) > 1:
                facts["until"] = ends[name][number]
                facts["before"] = keys[name, ends[name][number - 1]] if number else ""
            text = json.dumps(facts, sort_keys=True)
            keys[name, ends[name][number]] = hashlib.sha256(text.encode()).hexdigest()[:24]
    return keys


def evaluated_by(config: RunConfig, stage: str, beside: Sequence[str] = ()) -> str:
    """Return, as JSON, all but the stage's key that evaluations along a stage are a function of.

    `beside` are the keys of other stages whose networks act too, though the stage's own key does not depend on them.
    """
    own, sampling = config.evaluation, getattr(config, "sampling", None)
    acts: dict[str, Any] = identifying_fields(sampling) if sampling is not None else {}
    if stage != list(config.stages)[-1]:  # without guidance
        acts = {name: value for name, value in acts.items() if name in ("num_steps", "temperature")}
    facts = {
        "points": [own.num_curve_points, own.num_curve_episodes, own.horizon],
        "environment": [config.data.env_id, config.data.return_rule, config.data.ref_min, config.data.ref_max],
        "sampling": acts,
    }
    if beside:
        facts["beside"] = list(beside)
    return json.dumps(facts, sort_keys=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredStage:
    """A stored stage, as `aepo store list` shows it."""

    key: str
    num_bytes: int
    used_at: float
    """When the stage was last used, in seconds since the epoch."""
    path: Path


class StageStore:
    """A folder of trained stages, shared by all runs that see it."""

    def __init__(self, folder: Path):
        """Name the folder, which is made when something is stored."""
        self.folder = folder
        self._held: dict[str, TextIO] = {}
        self._has_warned = False

    def claim(self, key: str) -> dict[str, Any] | None:
        """Return a stored stage; else None, and the right to train it, which `publish` or `release` give back.

        Waits while another process trains it. A store that cannot be written to costs time, not the run.
        """
        if (found := self._read(key)) is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open_lock(self.folder / f"{key}.lock")
        except OSError as error:
            self._warn(f"stages are not shared in {self.folder}: {error.strerror}")
            return None
        told = False
        while not try_lock(file.fileno()):
            if not told:
                say(f"waiting for a stage that another run trains ({key})")
                told = True
            time.sleep(0.5)
        if (found := self._read(key)) is not None:
            file.close()
            return found
        self._held[key] = file
        return None

    def publish(self, key: str, content: dict[str, Any]) -> None:
        """Store a stage that was claimed; a full or read-only disk costs time, not the run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), checkpoint.to_bytes(content))
        except OSError as error:
            self._warn(f"the stage was not stored in {self.folder}: {error}")
        self.release(key)

    def release(self, key: str) -> None:
        """Give a claim back, if it is held."""
        if (file := self._held.pop(key, None)) is not None:
            file.close()

    def close(self) -> None:
        """Give all claims back."""
        for key in list(self._held):
            self.release(key)

    def entries(self) -> list[StoredStage]:
        """Return what is stored, the most recently used first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                facts = path.stat()
                found.append(StoredStage(key=path.stem, num_bytes=facts.st_size, used_at=facts.st_mtime, path=path))
        return sorted(found, key=lambda entry: entry.used_at, reverse=True)

    def prune(self, max_bytes: int) -> list[StoredStage]:
        """Delete the stages used longest ago until the rest takes at most so many bytes; return them."""
        kept, deleted = 0, []
        for entry in self.entries():
            kept += entry.num_bytes
            if kept > max_bytes:
                entry.path.unlink(missing_ok=True)
                deleted.append(entry)
        return deleted

    def _read(self, key: str) -> dict[str, Any] | None:
        path = self._path(key)
        try:
            content = checkpoint.from_bytes(path.read_bytes(), path)
        except FileNotFoundError:
            return None
        except OSError as error:  # another user's, say
            self._warn(f"{path}: {error.strerror}; the stage is trained again")
            return None
        except CheckpointError as error:
            warn(f"{error}; the stage is trained again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def _warn(self, text: str) -> None:
        """Say once what goes wrong with the folder."""
        if not self._has_warned:
            warn(text)
        self._has_warned = True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


class StageReuse:
    """One run's dealings with a store: it takes the stages that are there and gives those that it trains."""

    def __init__(self, store: StageStore, config: RunConfig, data_digest: str):
        """Compute the keys of the run's stages; none is claimed before it begins."""
        self._store, self._config = store, config
        self._keys = stage_keys(config, data_digest)
        self.steps_reused = 0
        """Gradient steps that this run did not have to take."""

    def give(self, stage: str, end: int, states: States, rows: Sequence[Row]) -> None:
        """Store a stage that a round has left at `end`, with its rows of the run's metrics."""
        begin = self._begin(stage, end)
        own: list[Row] = []
        evaluated: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["stage"] == stage and begin < row["step"] <= end and ROUND not in row["metrics"]:
                metrics = {key: value for key, value in row["metrics"].items() if key.startswith(f"{stage}/")}
                own += [{**row, "metrics": metrics}] if metrics else []
                points = {key: value for key, value in row["metrics"].items() if key.startswith(OWN)}
                evaluated |= {str(row["step"]): points} if points else {}
        content = {
            "stage": stage,
            "state": checkpoint.collect(states[stage]),
            "rows": json.dumps(own),
            "evaluated": json.dumps(evaluated),
            "evaluated_by": evaluated_by(self._config, stage, self._beside(stage, end)),
        }
        self._store.publish(self._keys[stage, end], content)

    def take(self, states: States, number: int) -> list[Row]:
        """Put the stages of a round that are there into the live state, up to the first that is not; it is claimed.

        Returns:
            The metrics of the stages that were taken.
        """
        taken: list[Row] = []
        for stage in self._config.stages:
            end, reached = self._config.round_ends(stage)[number], states[stage].step
            if reached >= end:
                continue
            begin = self._begin(stage, end)
            if reached != begin or (found := self._store.claim(self._keys[stage, end])) is None:
                break
            checkpoint.restore(states[stage], found["state"])
            self.steps_reused += end - begin
            rows = parse_json(found["rows"])
            if found.get("evaluated_by") == evaluated_by(self._config, stage, self._beside(stage, end)):
                points = parse_json(found["evaluated"])
                rows = [{**row, "metrics": row["metrics"] | points.get(str(row["step"]), {})} for row in rows]
            taken += rows
        return taken

    def close(self) -> None:
        """Give claims back."""
        self._store.close()

    def _beside(self, stage: str, end: int) -> list[str]:
        """Return the keys of the stages that act along the last one, and from which it does not learn."""
        config, *earlier = self._config, *list(self._config.stages)[:-1]
        if stage in earlier:
            return []
        of_stage = {each.name: each.learns_from(config.stages[each.name]) for each in methods.stages_of(config)}
        known, number = {stage}, config.round_ends(stage).index(end)
        for name in (stage, *reversed(earlier)):  # a stage learns from earlier ones only
            known |= set(of_stage[name]) if name in known else set()
        return [self._keys[name, config.round_ends(name)[number]] for name in earlier if name not in known]

    def _begin(self, stage: str, end: int) -> int:
        """Return the step at which the round that leaves a stage at `end` enters it."""
        ends = [0, *self._config.round_ends(stage)]
        return ends[ends.index(end) - 1]
