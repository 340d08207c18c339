"""`aepo data`: get, list, show and verify data sets."""

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro
from rich.progress import track

from aepo import tasks
from aepo.console import emit_json, emit_table, err, say, warn
from aepo.data.episodes import action_bounds, check_episode, read_episodes, rewards_of, scalar_observations
from aepo.data.library import local_datasets, open_dataset, remedy
from aepo.documents import parse_json
from aepo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from aepo.data.combine import CombineSummary


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
class Download:
    """Download Minari data sets, several at once; one that is there is left alone, an interrupted one goes on.

    They come from Minari's remote (MINARI_REMOTE, else hf://farama-minari). Of a task that has no data set of its own
    there (medium-expert) the parts are downloaded and joined. D4RL's original files are imported: `aepo data import`.

    For example:
      aepo data download hopper-medium-v2 pen-human-v1
      aepo data download D4RL/door/human-v2 --jobs 1
    """

    names: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK_OR_ID")]]
    """Names of tasks, or ids of Minari data sets."""
    jobs: int = 4
    """Data sets at a time."""
    overwrite: bool = False
    """Replace data sets that are there."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Download, join and print what came; return the exit status."""
        from aepo.data.download import download

        wanted = [
            tasks.find(name, "minari") if name in tasks.table() else tasks.for_dataset(name) for name in self.names
        ]
        if not wanted:
            raise ConfigError("download wants at least one task or id; `aepo data list --source minari` shows them")
        ids = [dataset for task in wanted for dataset in (task.origin.split() or [task.dataset])]
        rows = [dataclasses.asdict(one) for one in download(ids, jobs=self.jobs, overwrite=self.overwrite)]
        joined = [dataclasses.asdict(_combine(task, overwrite=self.overwrite)) for task in wanted if task.origin]
        if self.json:
            emit_json(rows + joined)
        else:
            columns = ("dataset", "num_episodes", "num_steps", "path")
            emit_table("data sets", rows + joined, columns=columns)
        return 0


@dataclasses.dataclass(frozen=True)
class Combine:
    """Join the data sets of a task that Minari has in parts: medium-expert from medium and expert.

    For example:
      aepo data combine hopper-medium-expert-v2
    """

    task: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TASK")]]
    """Name of a task."""
    overwrite: bool = False
    """Replace a data set that is there."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Join and print what was made; return the exit status."""
        summary = _combine(tasks.find(self.task, "minari"), overwrite=self.overwrite)
        _emit(summary.dataset, dataclasses.asdict(summary), as_json=self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class Import:
    """Make Minari data sets of original D4RL files: HDF5, as D4RL's servers give them.

    Transitions are those of D4RL's own q-learning view. `aepo data show TASK` names the file and its address. A file's
    name says whose it is; of a folder all such files are imported, those that are there are left alone.

    For example:
      aepo data import d4rl hopper_medium-v2.hdf5 --task hopper-medium-v2
      aepo data import d4rl maze2d-umaze-sparse-v1.hdf5 --overwrite
      aepo data import d4rl ~/.d4rl/datasets
    """

    layout: tyro.conf.Positional[Literal["d4rl"]]
    """Format of the files."""
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE_OR_FOLDER")]]
    """HDF5 files, or folders of such."""
    task: str = ""
    """Name of the task whose data the one file holds; none = the file's name says it."""
    clip_actions: bool = False
    """Move actions that lie outside of the action space to its bounds, as the environments do when they step."""
    overwrite: bool = False
    """Replace a data set that is there."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Import and print what was made; return the exit status."""
        from aepo.data.d4rl import find_files, import_file, import_files

        if self.task:
            if len(self.files) != 1:
                raise ConfigError(f"--task is of one file, got {len(self.files)}; leave it out, names say it")
            task = tasks.find(self.task, "d4rl")
            summary = import_file(self.files[0], task, overwrite=self.overwrite, clip_actions=self.clip_actions)
            _emit(summary.dataset, dataclasses.asdict(summary), as_json=self.json)
            return 0
        found = find_files(self.files)
        rows = [
            dataclasses.asdict(one)
            for one in import_files(found, overwrite=self.overwrite, clip_actions=self.clip_actions)
        ]
        columns = ("task", "dataset", "num_episodes", "num_steps", "mean_return")
        emit_json(rows) if self.json else emit_table("imported", rows, columns=columns)
        return 0


@dataclasses.dataclass(frozen=True)
class List:
    """List the tasks, where their data come from, and the data sets of Minari's local library.

    The benchmark has 36 tasks. Each has D4RL's original data and most have data that Farama regenerated (`minari`):
    different data, whose scores are not comparable. `collected` data are made here.

    For example:
      aepo data list
      aepo data list --source minari --json
    """

    source: Literal["all", "d4rl", "minari", "collected", "user"] = "all"
    """Only rows of this source: d4rl has the benchmark's 36, user what belongs to no task;
    all = each task once, with its first source, and what belongs to none."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print the list; return the exit status."""
        local = local_datasets()
        known = {task.dataset for task in tasks.rows()}
        users = [tasks.for_dataset(dataset) for dataset in local if dataset not in known]
        listed = list(tasks.table().values()) if self.source == "all" else list(tasks.rows())
        rows = [_row(task, local) for task in (*listed, *users) if self.source in ("all", task.source)]
        if self.json:
            emit_json(rows)
        else:
            columns = ("task", "suite", "source", "dataset", "env_id", "ref_min", "ref_max", "local", "steps")
            emit_table(f"tasks, and data sets in {_library()}", rows, columns=columns)
            err.print("other data of the same tasks: aepo data list --source minari", soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a task's row, and what its data set holds if it is here: spaces, environments, returns, references.

    For example:
      aepo data show maze2d-umaze
      aepo data show hopper-medium-v2 --source minari --returns 1000 3000
      aepo data show local/maze2d/umaze-v0 --json
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ID_OR_TASK")]]
    """Name of a task, or id of a local Minari data set."""
    source: str = ""
    """Source of a task's data: d4rl or minari; none = the task's first."""
    returns: tuple[float, ...] = ()
    """Returns of episodes to convert into normalized scores."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print the description; return the exit status."""
        local = local_datasets()
        task = _task(self.name, self.source, local)
        facts = {**_row(task, local), **(_contents(task) if task.dataset in local else {"remedy": _remedy(task)})}
        if self.returns:
            facts["scores"] = {f"{value:g}": _score(task, facts, value) for value in self.returns}
        _emit(task.dataset, facts, as_json=self.json)
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
    source: str = ""
    """Source of a task's data: d4rl or minari; none = the task's first."""
    figure: Path | None = None
    """Write histograms of returns and lengths as PNG."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Read, count and print; return the exit status."""
        from aepo.data.stats import draw, summarise
        from aepo.data.transitions import load_transitions

        task = _task(self.name, self.source, local_datasets())
        data = load_transitions(task.dataset, observation_keys=task.observation_keys, reward_rule=task.reward_rule)
        _emit(task.dataset, {"dataset": task.dataset, **summarise(data)}, as_json=self.json)
        for line in filter(None, (data.note, data.doubt)):
            say(line)
        if self.figure is not None:
            draw(data, self.figure, title=task.dataset)
            say(f"histograms: {self.figure}")
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
    source: str = ""
    """Source of a task's data: d4rl or minari; none = the task's first."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Read, check and print; return the exit status."""
        from aepo.verify import verify

        facts, problems, doubts = verify(_task(self.name, self.source, local_datasets()))
        if self.json:
            emit_json({**facts, "problems": problems, "doubts": doubts})
        else:
            _emit(facts["dataset"], facts, as_json=False)
            for doubt in doubts:
                warn(doubt, kind="doubt")
            for problem in problems:
                say(problem)
        if problems:
            raise DataError(f"{facts['dataset']} has {len(problems)} problems; the first: {problems[0]}")
        err.print("no problem found")
        return 0


DATA: TypeAlias = (
    Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Combine, tyro.conf.subcommand("combine")]
    | Annotated[Download, tyro.conf.subcommand("download")]
    | Annotated[Import, tyro.conf.subcommand("import")]
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


def _row(task: tasks.Task, local: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a task's row, and of its data set whether and with how many steps it is here."""
    metadata = local.get(task.dataset, {})
    published = next((row.dataset for row in tasks.rows() if row.task == task.task and row.source == "minari"), None)
    own = task.source == "user"
    return {
        "task": None if own else task.task,
        "suite": task.suite,
        "source": task.source,
        "dataset": task.dataset,
        "minari_id": published,
        "env_id": task.env_id or _env_id(metadata.get("env_spec")),
        "horizon": task.horizon or None,
        "ref_min": metadata.get("ref_min_score") if task.ref_min is None else task.ref_min,
        "ref_max": metadata.get("ref_max_score") if task.ref_max is None else task.ref_max,
        "published_steps": task.steps,
        "observation_keys": list(task.observation_keys),
        "reward_rule": task.reward_rule,
        "return_rule": task.return_rule,
        "origin": task.origin or None,
        "local": task.dataset in local,
        "steps": metadata.get("total_steps"),
        "episodes": metadata.get("total_episodes"),
    }


def _contents(task: tasks.Task) -> dict[str, Any]:
    """Return what a local data set holds."""
    dataset = open_dataset(task.dataset)
    metadata = dataset.storage.metadata
    bounds, scalars = action_bounds(dataset), scalar_observations(dataset)
    returns = []
    for episode in track(
        read_episodes(dataset),
        total=int(dataset.total_episodes),
        description=f"reading {dataset.id}",
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ):
        check_episode(dataset, episode, *bounds, scalars=scalars)
        returns.append(float(rewards_of(episode).sum()))
    return {
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
    }


def _combine(task: tasks.Task, *, overwrite: bool) -> "CombineSummary":
    from aepo.data.combine import combine

    if not task.origin:
        raise ConfigError(f"{task.task} is one data set, {task.dataset}: aepo data download {task.task}")
    return combine(
        task.dataset,
        task.origin.split(),
        description=f"{task.task} of source minari: {task.origin}, joined by `aepo data combine`.",
        ref_min=task.ref_min,
        ref_max=task.ref_max,
        overwrite=overwrite,
    )


def _remedy(task: tasks.Task) -> str:
    return remedy(task.dataset)


def _score(task: tasks.Task, facts: dict[str, Any], return_: float) -> float:
    if facts["ref_min"] is None or facts["ref_max"] is None:
        raise DataError(f"{task.dataset} has no reference returns, so a return has no score")
    return dataclasses.replace(task, ref_min=facts["ref_min"], ref_max=facts["ref_max"]).score(return_)


def _task(name: str, source: str, local: dict[str, dict[str, Any]]) -> tasks.Task:
    """Return the row of a task, or of the id of a local data set.

    Raises:
        DataError: if it is neither; names the nearest.
        ConfigError: if the task has no data of this source.
    """
    if name in (known := tasks.table()):
        return tasks.find(name, source)
    if name in local or name in {row.dataset for row in tasks.rows()}:
        return tasks.for_dataset(name)
    near = get_close_matches(name, [*known, *local], n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise DataError(f"{name!r} is neither a task nor a data set in {_library()}{hint} `aepo data list` shows all")


def _library() -> str:
    from minari.storage.datasets_root_dir import get_dataset_path

    return str(get_dataset_path())


def _env_id(spec: str | None) -> str | None:
    """Return the id in an environment's specification, None if there is none."""
    try:
        return None if spec is None else str(parse_json(spec)["id"])
    except (ValueError, TypeError, KeyError):
        return None
