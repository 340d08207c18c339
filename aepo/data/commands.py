"""`aepo data`: collect, list and show data sets."""

import dataclasses
import json
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro
from rich.markup import escape
from rich.progress import track

from aepo import tasks
from aepo.console import emit_json, emit_table, err
from aepo.errors import DataError


@dataclasses.dataclass(frozen=True)
class Collect:
    """Collect the data set of a task in simulation; one that is there is left alone.

    A million steps take one to three minutes. The returns that mean score 0 and score 100 are measured, too.
    The data set lies in Minari's library: the folder MINARI_DATASETS_PATH, or ~/.minari/datasets.

    For example:
      aepo data collect maze2d-umaze --steps 200000
    """

    task: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TASK")]]
    """Name of a task (`aepo data list` shows them)."""
    steps: int = 1_000_000
    """Environment steps; D4RL's data sets hold a million."""
    seed: int = 0
    """Seeds start, goals and action noise."""
    overwrite: bool = False
    """Replace a data set that is there."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Collect and print what was made; return the exit status."""
        from aepo.data.pointmaze import collect

        summary = collect(tasks.find(self.task), num_steps=self.steps, seed=self.seed, overwrite=self.overwrite)
        _emit(self.task, dataclasses.asdict(summary), as_json=self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class List:
    """List all tasks and the data sets of Minari's local library.

    For example:
      aepo data list
    """

    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print the list; return the exit status."""
        local = _local_datasets()
        rows = [_row(task.task, task.dataset, local) for task in tasks.table().values()]
        known = {row["dataset"] for row in rows}
        rows += [_row(None, dataset, local) for dataset in local if dataset not in known]
        if self.json:
            emit_json(rows)
        else:
            emit_table(f"tasks, and data sets in {_library()}", rows, columns=("task", "dataset", "local", "steps"))
        return 0


@dataclasses.dataclass(frozen=True)
class Show:
    """Show what a data set holds: spaces, environments, returns and reference scores.

    For example:
      aepo data show maze2d-umaze
      aepo data show local/maze2d/umaze-v0 --json
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ID_OR_TASK")]]
    """Name of a task, or id of a local Minari data set."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print the description; return the exit status."""
        from aepo.data.transitions import open_dataset

        dataset = open_dataset(_dataset_id(self.name))
        metadata = dataset.storage.metadata
        returns = [
            float(episode.rewards.sum())
            for episode in track(
                dataset.iterate_episodes(),
                total=dataset.total_episodes,
                description=f"reading {dataset.id}",
                console=err,
                transient=True,
                disable=not err.is_terminal,
            )
        ]
        facts = {
            "dataset": dataset.id,
            "description": metadata.get("description"),
            "path": str(dataset.storage.data_path),
            "env": _env_id(metadata.get("env_spec")),
            "eval_env": _env_id(metadata.get("eval_env_spec")),
            "observation_space": str(dataset.observation_space),
            "action_space": str(dataset.action_space),
            "num_episodes": len(returns),
            "num_steps": int(dataset.total_steps),
            "return_mean": sum(returns) / len(returns) if returns else None,
            "return_min": min(returns, default=None),
            "return_max": max(returns, default=None),
            "ref_min": metadata.get("ref_min_score"),
            "ref_max": metadata.get("ref_max_score"),
        }
        _emit(dataset.id, facts, as_json=self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class Stats:
    """Print how a data set's episodes are distributed: returns, lengths, how they end.

    For example:
      aepo data stats maze2d-umaze --figure umaze.png
      aepo data stats mujoco/hopper/medium-v0 --json
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ID_OR_TASK")]]
    """Name of a task, or id of a local Minari data set."""
    figure: Path | None = None
    """Write histograms of returns and lengths as PNG."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Read, count and print; return the exit status."""
        from aepo.data.stats import draw, summarise
        from aepo.data.transitions import load_transitions

        task = tasks.for_dataset(_dataset_id(self.name))
        data = load_transitions(task.dataset, observation_keys=task.observation_keys)
        _emit(task.dataset, {"dataset": task.dataset, **summarise(data)}, as_json=self.json)
        if self.figure is not None:
            draw(data, self.figure, title=task.dataset)
            err.print(f"histograms: {self.figure}", soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read a whole data set and say what is wrong with it: each episode, the counts, the references, the environment.

    Training refuses the same things, at the first one; here all are listed. Exit status 3 if there is any.

    For example:
      aepo data verify maze2d-umaze
      aepo data verify mujoco/hopper/medium-v0 --json
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ID_OR_TASK")]]
    """Name of a task, or id of a local Minari data set."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Read, check and print; return the exit status."""
        from aepo.data.verify import verify

        facts, problems = verify(_dataset_id(self.name))
        if self.json:
            emit_json({**facts, "problems": problems})
        else:
            _emit(facts["dataset"], facts, as_json=False)
            for problem in problems:
                err.print(problem, markup=False, soft_wrap=True)
        if problems:
            raise DataError(f"{facts['dataset']} has {len(problems)} problems; the first: {problems[0]}")
        err.print("no problem found")
        return 0


DATA: TypeAlias = (
    Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)
"""What `aepo data` parses."""


def _emit(title: str, facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit_json(facts)
    else:
        emit_table(title, [{"field": name, "value": value} for name, value in facts.items()])


def _row(task: str | None, dataset: str, local: dict[str, dict[str, Any]]) -> dict[str, Any]:
    metadata = local.get(dataset)
    return {
        "task": task,
        "dataset": dataset,
        "local": metadata is not None,
        "steps": metadata["total_steps"] if metadata else None,
        "episodes": metadata["total_episodes"] if metadata else None,
    }


def _local_datasets() -> dict[str, dict[str, Any]]:
    """Return id -> metadata of all local data sets; says which folders hold none that can be read."""
    import minari

    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        found: dict[str, dict[str, Any]] = minari.list_local_datasets()
    for warning in broken:
        err.print(f"[yellow]warning:[/] {escape(str(warning.message))}", soft_wrap=True)
    return found


def _dataset_id(name: str) -> str:
    """Return the data set of a task, or the id itself.

    Raises:
        DataError: if it is neither a task nor the id of a local data set; names the nearest.
    """
    if name in (rows := tasks.table()):
        return rows[name].dataset
    if name in (local := _local_datasets()):
        return name
    near = get_close_matches(name, [*rows, *local], n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise DataError(f"{name!r} is neither a task nor a data set in {_library()}{hint} `aepo data list` shows all")


def _library() -> str:
    from minari.storage.datasets_root_dir import get_dataset_path

    return str(get_dataset_path())


def _env_id(spec: str | None) -> str | None:
    return None if spec is None else str(json.loads(spec)["id"])
