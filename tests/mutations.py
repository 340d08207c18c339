"""What tests/fuzz.py does to data sets, D4RL files, settings and run folders, as people's files and fingers might.

A mutation takes an input's `Box` and what it mutates, and returns what it did in words. Those in MILD leave what can be
used.
"""

import contextlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from gymnasium import spaces

from tests.fuzz import Box

BEYOND = float(np.finfo(np.float32).max) * 4
"""A float64 that no float32 holds."""
NUMBERS = [
    *("nan", "inf", "-inf", "0", "-0", "-0.0", "-1", "1", "2", "0.5", "1.0", "1.5", "1e-400", "1e400", "1e-30"),
    *("1e30",),
]
NUMBERS += ["2147483647", "2147483648", "9223372036854775808", str(2**64), "1" + "0" * 30, "1" * 5000, "-" + "9" * 400]
WORDS = [
    *("", "''", '""', "None", "null", "true", "False", "yes", "[1, 2]", "(1,)", "{}", "1,2", ",", "1_000"),
    *("1__0", "١٢"),
]
WORDS += [
    *("½", "²", "0x10", "1e", "+1", " 1 ", "1\n", "\t", "--1", "=", "a=b", "é", "🙂", "[red]x[/]", "[/]"),
    *("x" * 3000,),
]
WORDS += [
    *("relu", "RELU", "float32", "bfloat16", "tf32", "analytic", "mse", "contrastive", "monte_carlo", "learned"),
    *("time",),
]
WORDS += ["expectile", "softmax_in_support", "data_action", "posterior_mean", "d4rl", "user", "sum", "goal", "subtasks"]
JSON_VALUES: list[Any] = [None, True, False, 0, -1, 1, 1.5, 2**31, 2**64, 10**30, 1e308, float("nan"), float("inf")]
JSON_VALUES += [
    *("", "x", "1", "nan", "[red]", "ü\u202e", "\ud800", "a\0b", "x" * 3000, [], {}, [[]], {"": 1}, [None]),
    *({"a": {"b": []}},),
]
LONG = ("steps", "num_episodes", "num_curve_points", "num_curve_episodes", "num_grid_episodes", "horizon")
"""Settings of which large values are good and take long."""
METHODS = ["iql", "iql", "iql", "td3bc", "best", "analytic", "qgpo"]
STAGES = {"iql": ("critic", "actor"), "td3bc": ("actor_critic",)}
GUIDED = ("behavior", "critic", "energy")
DATASET = "fuzz/pendulum-v0"


# -- templates ---------------------------------------------------------------------------------------------


class Odd(gymnasium.Env[Any, Any]):
    """Spaces by name, observations and rewards drawn; nothing is learned here."""

    def __init__(self, observation: str = "box", action: str = "box"):
        self.observation_space, self.action_space = OBSERVATIONS[observation](), ACTIONS[action]()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(self.np_random.normal()), False, False, {}


def _box(low: Any, high: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


OBSERVATIONS: dict[str, Callable[[], spaces.Space[Any]]] = {
    "box": lambda: _box(-1, 1, (3,)),
    "box of one": lambda: _box(-1, 1, (1,)),
    "float64": lambda: _box(-1, 1, (3,), np.float64),
    "float16": lambda: _box(-1, 1, (3,), np.float16),
    "int8": lambda: _box(-5, 5, (3,), np.int8),
    "int64": lambda: _box(-5, 5, (3,), np.int64),
    "image": lambda: _box(0, 255, (4, 4, 3), np.uint8),
    "unbounded": lambda: _box(-np.inf, np.inf, (3,)),
    "half bounded": lambda: spaces.Box(np.array([0, -np.inf], np.float32), np.array([np.inf, 0], np.float32)),
    "equal bounds": lambda: _box(1, 1, (3,)),
    "no axis": lambda: _box(-1, 1, ()),
    "two axes": lambda: _box(-1, 1, (2, 2)),
    "no entry": lambda: _box(-1, 1, (0,)),
    "huge": lambda: _box(-1e38, 1e38, (3,)),
    "tiny": lambda: _box(-1e-38, 1e-38, (3,)),
    "discrete": lambda: spaces.Discrete(5),
    "discrete from -2": lambda: spaces.Discrete(5, start=-2),
    "multi discrete": lambda: spaces.MultiDiscrete([3, 4]),
    "multi binary": lambda: spaces.MultiBinary(4),
    "text": lambda: spaces.Text(6),
    "tuple": lambda: spaces.Tuple([_box(-1, 1, (3,)), spaces.Discrete(4)]),
    "dict": lambda: spaces.Dict({"b": _box(-1, 1, (2,)), "a": _box(-1, 1, (3,))}),
    "nested dict": lambda: spaces.Dict({"a": _box(-1, 1, (2,)), "b": spaces.Dict({"c": _box(0, 1, (2, 2))})}),
    "dict with discrete": lambda: spaces.Dict({"a": _box(-1, 1, (2,)), "b": spaces.Discrete(3)}),
    "dict with text": lambda: spaces.Dict({"a": _box(-1, 1, (2,)), "mission": spaces.Text(6)}),
    "dict with odd names": lambda: spaces.Dict(
        {"a b": _box(-1, 1, (2,)), "ü": _box(-1, 1, (1,)), "%": _box(0, 1, (1,))}
    ),
    "dict in tuple": lambda: spaces.Tuple([spaces.Dict({"a": _box(-1, 1, (2,))}), _box(0, 1, ())]),
}
ACTIONS: dict[str, Callable[[], spaces.Space[Any]]] = {
    "box": lambda: _box(-1, 1, (2,)),
    "float64": lambda: _box(-1, 1, (2,), np.float64),
    "float16": lambda: _box(-1, 1, (2,), np.float16),
    "to one side": lambda: _box(0, 5, (2,)),
    "tiny": lambda: _box(-1e-6, 1e-6, (2,)),
    "large": lambda: _box(-1e6, 1e6, (2,)),
    "offset": lambda: _box(1e6, 1e6 + 1, (2,), np.float64),
    "subnormal": lambda: _box(-1e-40, 1e-40, (2,)),
    "huge": lambda: _box(-3e38, 3e38, (2,)),
    "unbounded": lambda: _box(-np.inf, np.inf, (2,)),
    "equal bounds": lambda: spaces.Box(np.array([-1, 1], np.float32), np.array([1, 1], np.float32)),
    "int": lambda: _box(-3, 3, (2,), np.int64),
    "no axis": lambda: _box(-1, 1, ()),
    "two axes": lambda: _box(-1, 1, (2, 2)),
    "no entry": lambda: _box(-1, 1, (0,)),
    "discrete": lambda: spaces.Discrete(4),
    "multi binary": lambda: spaces.MultiBinary(3),
    "tuple": lambda: spaces.Tuple([_box(-1, 1, (1,)), _box(-1, 1, (1,))]),
    "dict": lambda: spaces.Dict({"a": _box(-1, 1, (2,))}),
}
MILD_OBSERVATIONS = ["box of one", "float64", "float16", "unbounded", "half bounded", "two axes", "dict", "nested dict"]
MILD_ACTIONS = ["box", "box", "float64", "to one side", "tiny", "large"]


def odd_env(observation: str, action: str) -> gymnasium.Env[Any, Any]:
    spec = gymnasium.envs.registration.EnvSpec(
        id="Odd-v0",
        entry_point="tests.mutations:Odd",
        max_episode_steps=15,
        disable_env_checker=True,
        kwargs={"observation": observation, "action": action},
    )
    return gymnasium.make(spec)


def write_set(dataset_id: str, env: gymnasium.Env[Any, Any], *, num_episodes: int = 6, **metadata: Any) -> None:
    """Write episodes of random actions."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    env.action_space.seed(0)
    buffers = []
    for number in range(num_episodes):
        steps = [(env.reset(seed=number)[0], None, 0.0, False, False)]
        while not (steps[-1][3] or steps[-1][4]):
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            steps.append((observation, action, float(reward), terminated, truncated))
        observations, actions, rewards, terminations, truncations = zip(*steps, strict=True)
        flags = {"terminations": np.array(terminations[1:]), "truncations": np.array(truncations[1:])}
        arrays = {"observations": _stacked(observations), "actions": _stacked(actions[1:]), **flags}
        buffers.append(EpisodeBuffer(id=number, rewards=np.array(rewards[1:]), **arrays))
    facts = {"algorithm_name": "random", "author": "fuzz", "author_email": "f@example.org", "code_permalink": "fuzz"}
    facts |= {"description": "random actions", "ref_min_score": -300.0, "ref_max_score": -10.0} | metadata
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env, eval_env=env.spec, **facts)
    env.close()


def _stacked(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _stacked([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(_stacked(part) for part in zip(*values, strict=True))
    return list(values) if isinstance(values[0], str) else np.array(values)


def make_templates(folder: Path, root: Path) -> None:
    """Make data sets, runs that have ended and that were stopped, and a sweep with everything that it leaves."""
    from aepo import cli, tasks
    from aepo import config as configs
    from aepo.presets import preset
    from aepo.runs import run
    from tune.mlflow_sink import mlflow_tracker
    from tune.plan import make_plan, run_folder, write_manifest
    from tune.runs_table import collect_rows, write_rows
    from tune.spec import SweepSpec

    library = folder / "library"
    library.mkdir()
    os.environ["MINARI_DATASETS_PATH"] = str(library)
    write_set(DATASET, gymnasium.make("Pendulum-v1", max_episode_steps=30))
    write_set("fuzz/car-v0", gymnasium.make("MountainCarContinuous-v0", max_episode_steps=30))
    write_set("fuzz/maze-v0", gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=15))

    run.set_up_torch(1)
    for method in ("iql", "best"):
        words = train_words(DATASET, method, out=str(folder / "ended" / method / "out"))
        assert cli.run(words) == 0, f"{method} does not train"
        config = configs.with_overrides(
            preset(f"{method}-smoke", tasks.for_dataset(DATASET), 0), configs.parse_overrides(small(method))
        )
        last = list(config.stages)[-1]
        stopped = folder / "stopped" / method / "out" / config.name
        try:
            run.execute(
                config,
                stopped,
                run.FolderStore(stopped),
                device=run.select_device("cpu"),
                checkpoint_s=0.0,
                on_progress=lambda progress, last=last: progress.stage == last,
            )
            raise AssertionError("was not stopped")
        except run.Interrupted:
            pass
    sweep = folder / "sweep" / "out"
    overrides = configs.parse_overrides(small("iql"))
    plan = make_plan(SweepSpec(dataset=(DATASET,), seeds=(0, 1), preset=("iql-smoke",), set=overrides))
    write_manifest(sweep, plan, {DATASET: run.load_data(plan[0]).digest})
    for config in plan:
        place = run_folder(sweep, config)
        run.execute(config, place, run.FolderStore(place), device=run.select_device("cpu"))
    tracker = mlflow_tracker(sweep, plan, uri=f"sqlite:///{sweep}/mlflow.db")
    tracker.ship_rest()
    rows = collect_rows(sweep, plan, mlflow_run_ids=tracker.run_ids)
    write_rows(sweep, rows)
    tracker.close([row.status for row in rows])


def small(method: str) -> list[str]:
    """Return settings for ten steps."""
    sizes = (("steps", 10), ("batch_size", 8), ("hidden_size", 8))
    stages = STAGES.get(method, GUIDED)
    return [f"{stage}.{key}={value}" for stage in stages for key, value in sizes] + ["evaluation.num_episodes=1"]


def train_words(dataset: str, method: str, *settings: str, out: str = "out", named: str = "--dataset") -> list[str]:
    words = ["train", named, dataset, "--preset", f"{method}-smoke", "--device", "cpu", "--json", "--out", out]
    return [*words, "--set", *small(method), *settings]


# -- Minari data sets --------------------------------------------------------------------------------------

FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")


def data(box: Box) -> None:
    """One or two mutations of a data set; then it is trained on, and looked at."""
    if box.random.random() < 0.3:
        return d4rl(box)
    pick = box.random
    dataset = DATASET
    if pick.random() < 0.2:
        dataset = _write_odd(box)
    elif pick.random() < 0.25:
        dataset = pick.choice(["fuzz/car-v0", "fuzz/maze-v0"])
    library = box.root / "home/.minari/datasets"
    if not (library / dataset).exists():
        shutil.copytree(box.templates / "library" / dataset, library / dataset)
    folder = library / dataset / "data"
    if not box.done or pick.random() < 0.2:
        for _ in range(1 + (pick.random() < 0.25)):
            mutation = pick.choice(MILD if pick.random() < 0.5 else SEVERE)
            box.done.append(mutation(box, folder) or mutation.__name__)
    if pick.random() < 0.1:
        dataset = _rename(box, library, dataset)
    method = pick.choice(METHODS)
    extra = pick.choice([[]] * 5 + [["evaluation.horizon=7"], ["evaluation.num_curve_points=1"]])
    box.commands.append(train_words(dataset, method, *extra))
    looks = [["data", "verify", dataset], ["data", "show", dataset], ["data", "stats", dataset], ["data", "list"]]
    box.commands.append([*pick.choice(looks), "--json"])
    return None


def _write_odd(box: Box) -> str:
    """Write a data set of spaces of another kind."""
    pick = box.random
    observation, action = pick.choice(MILD_OBSERVATIONS), pick.choice(MILD_ACTIONS)
    if pick.random() < 0.6:
        if pick.random() < 0.5:
            observation = pick.choice(list(OBSERVATIONS))
        else:
            action = pick.choice(list(ACTIONS))
    os.environ["MINARI_DATASETS_PATH"] = str(box.home / ".minari/datasets")
    (box.home / ".minari/datasets").mkdir(parents=True)
    write_set("fuzz/odd-v0", odd_env(observation, action), num_episodes=4)
    del os.environ["MINARI_DATASETS_PATH"]
    box.done.append(f"observations {observation}, actions {action}")
    return "fuzz/odd-v0"


IDS = [
    "x-v0",
    "a/b/c/d/e/f-v0",
    "Up.per_lo-wer/1-v999",
    "a" * 100 + "-v0",
    "fuzz/é-v0",
    "fuzz/a b-v0",
    "fuzz/[red]x-v0",
]
IDS += ["fuzz/x", "fuzz/x-v", "fuzz/x-v01", "x-v0/", "/x-v0", "fuzz//x-v0", "../x-v0", "-v0", "fuzz/-x-v0"]


def _rename(box: Box, library: Path, dataset: str) -> str:
    name = box.random.choice(IDS)
    box.done.append(f"named {name!r}")
    place = library / name.strip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    (library / dataset).rename(place)
    facts = place / "data/metadata.json"
    if facts.exists() and (values := _loaded(facts)) is not None:
        facts.write_text(json.dumps(values | {"dataset_id": name}))
        for space in place.parent.parents:
            if space == library:
                break
            (space / "namespace_metadata.json").exists()
    return name


def _loaded(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError):
        return None
    return value if isinstance(value, dict) else None


def _episodes(file: h5py.File) -> list[str]:
    """Return the groups of episodes by number, without those that another mutation has spoiled."""
    whole = (name for name in file if name.startswith("episode_") and isinstance(file[name], h5py.Group))
    return sorted((name for name in whole if "rewards" in file[name]), key=lambda name: int(name[8:]))


def _leaf(group: Any, name: str, pick: random.Random) -> tuple[Any, str] | None:
    """Return the parent and name of an array: the field itself, or one of the entries of its tree."""
    while name in group and isinstance(group[name], h5py.Group):
        group = group[name]
        if not len(group):
            return None
        name = pick.choice(sorted(group))
    return (group, name) if name in group else None


def _edit(
    box: Box,
    folder: Path,
    fields: Sequence[str],
    make: Callable[[Any, np.random.Generator], Any],
    *,
    every: bool | None,
) -> str:
    """Put make(array) in the place of a field, of every episode or of one; return which."""
    pick = box.random
    field = pick.choice(list(fields))
    everywhere = pick.random() < 0.5 if every is None else every
    generator = np.random.default_rng(pick.randrange(2**32))
    if not (folder / "main_data.hdf5").is_file():
        return f"{field}: no file to edit"
    try:
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            names = _episodes(file)
            for name in names if everywhere else [pick.choice(names)] if names else []:
                state = pick.getstate()
                if (found := _leaf(file[name], field, pick)) is None:
                    continue
                pick.setstate(state)
                group, leaf = found
                old = group[leaf][()]
                new = make(old, generator)
                del group[leaf]
                group[leaf] = new
    except (OSError, TypeError, ValueError, KeyError, RuntimeError) as error:
        return f"{field}: cannot be edited ({type(error).__name__})"
    return f"{field} of {'every episode' if everywhere else 'one episode'}"


def _set_metadata(folder: Path, **changes: Any) -> None:
    path = folder / "metadata.json"
    if (values := _loaded(path)) is not None:
        values |= changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def field_type(box: Box, folder: Path) -> str:
    kind = box.random.choice(["f2", "f4", "f8", ">f4", ">f8", "i4", "i8", "u1", "?", "i1"])
    fields = {"f": FIELDS, "i": ("rewards", "terminations", "truncations"), "u": FIELDS[3:], "?": FIELDS[3:]}
    where = _edit(box, folder, fields[kind.strip(">")[0]], lambda a, _: np.asarray(a).astype(kind), every=None)
    return f"{where} as {kind}"


SCALES = [1e-30, 1e-8, 1e-3, 1e3, 1e6, 1e12, 1e30, 0.0, -1.0]


def scaled(box: Box, folder: Path) -> str:
    factor = box.random.choice(SCALES)
    where = _edit(box, folder, ("observations", "rewards"), lambda a, _: np.asarray(a) * factor, every=True)
    return f"{where} times {factor:g}"


def shifted(box: Box, folder: Path) -> str:
    shift = box.random.choice([1e-3, 1.0, 1e4, 1e7, 1e15, -1e6])
    where = _edit(box, folder, ("observations", "rewards"), lambda a, _: np.asarray(a) + shift, every=None)
    return f"{where} plus {shift:g}"


def constant(box: Box, folder: Path) -> str:
    value = box.random.choice([0.0, -0.0, 1.0, -1.0, 1e-42, 5e-324, 0.5])
    return f"{_edit(box, folder, FIELDS[:3], lambda a, _: np.full_like(a, value), every=None)} all {value!r}"


def constant_column(box: Box, folder: Path) -> str:
    def make(array: Any, _: Any) -> Any:
        new = np.array(array)
        new[..., 0] = 3.0
        return new

    return f"{_edit(box, folder, ('observations',), make, every=True)}: a constant entry"


def ended(box: Box, folder: Path) -> str:
    flags = box.random.choice([(1, 0), (0, 0), (1, 1), (0, 1)])

    def make(value: int) -> Callable[[Any, Any], Any]:
        def change(array: Any, _: Any) -> Any:
            new = np.array(array)
            new[-1:] = value
            return new

        return change

    for field, value in zip(("terminations", "truncations"), flags, strict=True):
        _edit(box, folder, (field,), make(value), every=True)
    return f"the last steps' termination and truncation {flags}"


def kept_episodes(box: Box, folder: Path) -> str:
    """Episodes removed, counts kept true."""
    keep = box.random.choice([1, 1, 2, 3])
    total = _rebuild(folder, lambda file, names: names[:keep])
    return f"{keep} episodes, {total} steps"


def cut_episodes(box: Box, folder: Path) -> str:
    """Episodes of few steps."""
    steps = box.random.choice([1, 1, 1, 2, 5])
    return f"episodes of {steps} steps, {_cut(folder, steps, keep=None)} in all"


def single_transition(box: Box, folder: Path) -> str:
    _cut(folder, 1, keep=1)
    return "one transition"


def _cut(folder: Path, steps: int, *, keep: int | None) -> int:
    """Cut every episode to its first steps and keep the first ones; return the steps that are left."""

    def change(file: h5py.File, names: list[str]) -> list[str]:
        for name in names[:keep]:
            paths: list[str] = []
            file[name].visititems(
                lambda path, node, to=paths: to.append(path) if isinstance(node, h5py.Dataset) else None
            )
            for path in paths:
                array = file[name][path][: steps + path.startswith("observations")]
                del file[name][path]
                file[name][path] = array
            file[name].attrs["total_steps"] = steps
        return names[:keep]

    return _rebuild(folder, change)


def _rebuild(folder: Path, change: Callable[[h5py.File, list[str]], list[str]]) -> int:
    """Change a file, keep the named episodes, and write the true counts; return the steps."""
    try:
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            names = _episodes(file)
            keep = change(file, names)
            for name in set(names) - set(keep):
                del file[name]
            total = sum(len(file[name]["rewards"]) for name in keep)
            file.attrs["total_steps"], file.attrs["total_episodes"] = total, len(keep)
    except (OSError, KeyError, TypeError, ValueError, IndexError):
        return -1
    _set_metadata(folder, total_steps=int(total), total_episodes=len(keep))
    return int(total)


def reference(box: Box, folder: Path) -> str:
    pairs: list[tuple[Any, Any]] = [(..., ...), (None, None), (0, 1), (-1e6, 1e6), (-1e-9, 1e-9), ("-300", "-10")]
    low, high = box.random.choice(pairs)
    _set_metadata(folder, ref_min_score=low, ref_max_score=high)
    return f"reference scores {low!r} and {high!r}"


def odd_reference(box: Box, folder: Path) -> str:
    nan, inf = float("nan"), float("inf")
    pairs: list[tuple[Any, Any]] = [(-10, -300), (1, 1), (0, 0), (nan, 1), (nan, nan), (-inf, inf), (..., 1), (1, None)]
    pairs += [("low", "high"), ([], {}), (True, False), (10**400, 10**401), ("", "")]
    low, high = box.random.choice(pairs)
    _set_metadata(folder, ref_min_score=low, ref_max_score=high)
    return f"reference scores {str(low)[:20]!r} and {str(high)[:20]!r}"


def lacking_metadata(box: Box, folder: Path) -> str:
    keys = [
        *("author", "author_email", "algorithm_name", "code_permalink", "description", "minari_version"),
        *("dataset_size",),
    ]
    key = box.random.choice(keys)
    _set_metadata(folder, **{key: box.random.choice([..., None, 3, "", "[red]é"])})
    return f"metadata: {key}"


def any_metadata(box: Box, folder: Path) -> str:
    values = _loaded(folder / "metadata.json") or {}
    key = box.random.choice(sorted(values) or ["x"])
    value = box.random.choice([*JSON_VALUES, ...])
    _set_metadata(folder, **{key: value})
    return f"metadata: {key} is {str(value)[:30]!r}"


def wrong_counts(box: Box, folder: Path) -> str:
    key = box.random.choice(["total_steps", "total_episodes"])
    value = box.random.choice([0, -1, 1, 179, 181, 10**9, 10**20, "180", 180.0, None])
    _set_metadata(folder, **{key: value})
    return f"metadata: {key} is {value!r}"


def environment(box: Box, folder: Path) -> str:
    """The specification of the environment in the metadata; a mild change or another one."""
    pick = box.random
    values = _loaded(folder / "metadata.json") or {}
    keys = [key for key in ("env_spec", "eval_env_spec") if key in values]
    if not keys:
        return "no environment to change"
    try:
        spec = json.loads(values[pick.choice(keys)])
    except (ValueError, TypeError):
        spec = None
    if not isinstance(spec, dict):
        return "the environment is none already"
    changes: list[tuple[str, Any]] = [("max_episode_steps", 5), ("max_episode_steps", 1), ("reward_threshold", -1.0)]
    changes += [("nondeterministic", True), ("order_enforce", False), ("namespace", None)]
    if pick.random() < 0.5:
        changes = [("max_episode_steps", value) for value in (0, -1, 10**12, 1.5, "30", None, True)]
        changes += [
            ("id", value) for value in ("", "Nowhere-v0", "Pendulum-v99", "Pendulum", "a/b/c-v0", None, 3, "[x]-v0")
        ]
        changes += [("entry_point", value) for value in ("", "no.where:Env", "os:system", "no colon", None)]
        changes += [("kwargs", value) for value in ({"g": "x"}, {"no": 1}, None, [], {"render_mode": "human"})]
        wrapper = {"name": "X", "entry_point": "no.where:Wrapper", "kwargs": None}
        known = {"name": "C", "entry_point": "gymnasium.wrappers:ClipAction", "kwargs": {}}
        changes += [("additional_wrappers", value) for value in ([wrapper], [known], None, "x")]
        changes += [("render_mode", "human"), ("", 1)]
    key, value = pick.choice(changes)
    spec[key] = value
    text = json.dumps(spec)
    for name in keys if pick.random() < 0.6 else [pick.choice(keys)]:
        values[name] = text
    (folder / "metadata.json").write_text(json.dumps(values))
    return f"environment: {key} is {str(value)[:40]!r}"


def no_environment(box: Box, folder: Path) -> str:
    keys = box.random.choice([["env_spec"], ["eval_env_spec"], ["env_spec", "eval_env_spec"]])
    value = box.random.choice([..., None, "", "{}", "null", "[]", "{", "3", 3, {}])
    _set_metadata(folder, **dict.fromkeys(keys, value))
    return f"{' and '.join(keys)} {value!r}"


def space_text(box: Box, folder: Path) -> str:
    key = box.random.choice(["observation_space", "action_space"])
    value = box.random.choice([..., None, "", "{}", '{"type": "Box"}', '{"type": "Graph"}', "Box(3,)", "[]", 3, "null"])
    _set_metadata(folder, **{key: value})
    return f"metadata: {key} is {value!r}"


def extra_file(box: Box, folder: Path) -> str:
    name = box.random.choice([".DS_Store", "notes.txt", "main_data (1).hdf5", "é.hdf5", "main_data.hdf5.part", "sub/x"])
    place = box.random.choice([folder, folder.parent]) / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"x" * 10)
    return f"a file {name} besides"


def extra_array(box: Box, folder: Path) -> str:
    pick = box.random
    name = pick.choice(["infos/success", "extra", "option_data", "seed"])

    def change(file: h5py.File, names: list[str]) -> list[str]:
        for each in names:
            file[each].require_group("infos") if "/" in name else None
            file[each][name] = np.zeros(len(file[each]["rewards"]))
        return names

    _rebuild(folder, change)
    return f"an array {name} besides"


def compressed(box: Box, folder: Path) -> str:
    pick = box.random
    how = pick.choice([{"compression": "gzip"}, {"compression": "lzf"}, {"chunks": True}, {"fletcher32": True}])

    def change(file: h5py.File, names: list[str]) -> list[str]:
        for each in names:
            for field in ("rewards", "terminations"):
                array = file[each][field][()]
                del file[each][field]
                file[each].create_dataset(field, data=array, **how)
        return names

    _rebuild(folder, change)
    return f"stored with {how}"


def poisoned(box: Box, folder: Path) -> str:
    value = box.random.choice([float("nan"), float("inf"), float("-inf"), BEYOND, 1e39, 3e38, -3e38])

    def make(array: Any, generator: np.random.Generator) -> Any:
        wide = abs(value) > 3.3e38 and np.isfinite(value)
        new = np.array(array, dtype=np.float64 if wide else None)
        if new.dtype.kind == "f" and new.size:
            new.flat[generator.integers(new.size)] = value
        return new

    return f"{_edit(box, folder, FIELDS[:3], make, every=None)}: a value {value:g}"


def reshaped(box: Box, folder: Path) -> str:
    shapes: dict[str, Callable[[Any], Any]] = {
        "no axis": lambda a: a.reshape(-1)[0] if a.size else np.float32(0),
        "one value": lambda a: a.reshape(-1)[:1],
        "(T, 1)": lambda a: a.reshape(len(a), -1)[:, :1],
        "(T, 1, 1)": lambda a: a.reshape(len(a), -1)[:, :1, None],
        "an axis more": lambda a: a[:, None],
        "an axis before": lambda a: a[None],
        "turned": lambda a: a.T,
        "one row less": lambda a: a[:-1],
        "one row more": lambda a: np.concatenate([a, a[-1:]]),
        "no row": lambda a: a[:0],
    }
    name = box.random.choice(list(shapes))
    return f"{_edit(box, folder, FIELDS, lambda a, _: shapes[name](np.asarray(a)), every=None)}: {name}"


def retyped(box: Box, folder: Path) -> str:
    kinds: dict[str, Callable[[Any], Any]] = {
        "bytes": lambda a: np.array([str(v).encode() for v in a.reshape(-1)]).reshape(a.shape),
        "strings": lambda a: np.array([str(v) for v in a.reshape(-1)], dtype=h5py.string_dtype()).reshape(a.shape),
        "complex": lambda a: a.astype(complex),
        "bool": lambda a: a.astype(bool),
        "int": lambda a: a.astype(np.int32),
        "float flags": lambda a: a.astype(float) * 0.5,
    }
    name = box.random.choice(list(kinds))
    return f"{_edit(box, folder, FIELDS, lambda a, _: kinds[name](np.asarray(a)), every=None)} as {name}"


def terminates_within(box: Box, folder: Path) -> str:
    field = box.random.choice(FIELDS[3:])

    def make(array: Any, generator: np.random.Generator) -> Any:
        new = np.array(array)
        new.flat[generator.integers(max(1, new.size))] = 1
        return new

    return f"{_edit(box, folder, (field,), make, every=None)} set in the middle"


def missing_part(box: Box, folder: Path) -> str:
    pick = box.random
    field = pick.choice(FIELDS)
    kind = pick.choice(["nothing", "a group", "a link to nowhere", "a link to itself", "an external link"])
    with_file = folder / "main_data.hdf5"
    try:
        with h5py.File(with_file, "r+") as file:
            name = pick.choice(_episodes(file))
            del file[name][field]
            if kind == "a group":
                file[name].create_group(field)
            elif kind == "a link to nowhere":
                file[name][field] = h5py.SoftLink("/nowhere")
            elif kind == "a link to itself":
                file[name][field] = h5py.SoftLink(f"/{name}/{field}")
            elif kind == "an external link":
                file[name][field] = h5py.ExternalLink("nowhere.hdf5", "/x")
    except (OSError, KeyError, IndexError):
        return "no part to remove"
    return f"{kind} in place of {field}"


def missing_episode(box: Box, folder: Path) -> str:
    pick = box.random
    try:
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            name = pick.choice(_episodes(file))
            how = pick.choice(["removed", "renamed", "no group", "without attributes"])
            if how == "without attributes":
                for key in list(file[name].attrs):
                    del file[name].attrs[key]
                return f"{name} without attributes"
            if how == "renamed":
                file.move(name, "episode_99")
                return f"{name} named episode_99"
            del file[name]
            if how == "no group":
                file[name] = np.zeros(3)
    except (OSError, KeyError, IndexError):
        return "no episode to remove"
    return f"{name} {how}"


def no_data(box: Box, folder: Path) -> str:
    total = _rebuild(folder, lambda file, names: [])
    return f"no episode ({total} steps)"


def torn_file(box: Box, folder: Path) -> str:
    name = box.random.choice(["main_data.hdf5"] * 3 + ["metadata.json"])
    return spoil_file(box, folder / name)


def permissions(box: Box, folder: Path) -> str:
    path = box.random.choice([folder, folder / "main_data.hdf5", folder / "metadata.json", folder.parent])
    mode = box.random.choice([0o000, 0o400, 0o444, 0o555])
    if path.exists():
        path.chmod(mode)
    box.unprivileged = True
    return f"permissions of {path.name} {mode:o}"


MILD = [field_type, scaled, shifted, constant, constant_column, ended, kept_episodes, cut_episodes, single_transition]
MILD += [reference, lacking_metadata, environment, extra_file, extra_array, compressed, field_type, ended, cut_episodes]
SEVERE = [odd_reference, any_metadata, wrong_counts, no_environment, space_text, poisoned, poisoned, reshaped, reshaped]
SEVERE += [retyped, terminates_within, missing_part, missing_episode, no_data, torn_file, torn_file, permissions]


# -- any file ----------------------------------------------------------------------------------------------


def spoil_file(box: Box, path: Path) -> str:
    """Tear, empty, overwrite or replace a file."""
    pick = box.random
    ways = [
        *("cut", "cut", "zeros", "flipped", "empty", "random", "text", "removed", "a folder", "a dangling link"),
        *("doubled",),
    ]
    how = pick.choice(ways)
    if not path.is_file():
        return f"{path.name} is no file"
    content = bytearray(path.read_bytes())
    place = pick.randrange(max(1, len(content)))
    if how in ("removed", "a folder", "a dangling link"):
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a dangling link":
            path.symlink_to("nowhere")
    elif how == "cut":
        path.write_bytes(content[:place])
    elif how == "zeros":
        length = min(pick.choice([1, 64, 4096]), len(content) - place)
        content[place : place + length] = bytes(length)
        path.write_bytes(content)
    elif how == "flipped":
        if content:
            content[place] ^= 1 << pick.randrange(8)
        path.write_bytes(content)
    else:
        new = {"empty": b"", "random": pick.randbytes(500), "text": b"not what it was\n" * 30, "doubled": content * 2}
        path.write_bytes(new[how])
    return f"{path.name}: {how}" + (f" at {place}" if how in ("cut", "zeros", "flipped") else "")


def spoil_text(box: Box, path: Path) -> str:
    """Write a text file as another program might."""
    pick = box.random
    ways: dict[str, Callable[[str], bytes]] = {
        "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
        "BOM": lambda text: b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": lambda text: text.encode("utf-16"),
        "Latin-1": lambda text: text.encode() + b"# \xe9\xfc\n",
        "NUL": lambda text: text[: len(text) // 2].encode() + b"\0" + text[len(text) // 2 :].encode(),
        "a surrogate": lambda text: text.encode() + b"\xed\xa0\x80",
        "twice": lambda text: (text + text).encode(),
        "CR": lambda text: text.replace("\n", "\r").encode(),
    }
    how = pick.choice(list(ways))
    path.write_bytes(ways[how](path.read_text(errors="replace")))
    return f"{path.name}: {how}"


def mutate_json(box: Box, path: Path) -> str:
    """Change one place of a JSON document."""
    pick = box.random
    document = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(document)
    how = pick.choice(
        ["value", "value", "value", "removed", "added", "renamed", "deep", "long number", "twice", "other"]
    )
    node, key = pick.choice(places)
    text = None
    if how == "value":
        node[key] = pick.choice(JSON_VALUES)
    elif how == "removed":
        del node[key]
    elif how == "added" and isinstance(node, dict):
        node[pick.choice(["new", "", "é", "steps"])] = pick.choice(JSON_VALUES)
    elif how == "renamed" and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif how == "deep":
        node[key] = "HERE"
        text = json.dumps(document).replace('"HERE"', "[" * 20_000 + "]" * 20_000)
    elif how == "long number":
        node[key] = "HERE"
        text = json.dumps(document).replace('"HERE"', "1" * 6000)
    elif how == "twice" and isinstance(node, dict):
        text = json.dumps(document).replace("{", '{"format": 1, "steps": 3, ', 1)
    else:
        document = pick.choice(JSON_VALUES)
    path.write_text(json.dumps(document) if text is None else text)
    return f"{path.name}: {how} at {key!r}" + (f": {str(node[key])[:30]!r}" if how == "value" else "")


# -- D4RL's files ------------------------------------------------------------------------------------------

D4RL_TASKS = ["hopper-medium-v2"] * 3 + ["halfcheetah-medium-v2", "walker2d-medium-v2"] + ["maze2d-umaze-v1"] * 3
D4RL_TASKS += ["maze2d-medium-dense-v1", "antmaze-umaze-v2", "pen-human-v1", "kitchen-complete-v0"]


def d4rl(box: Box) -> None:
    """One or two mutations of a D4RL file, which is imported and trained on."""
    from tests.families import write_file

    pick = box.random
    task = pick.choice(D4RL_TASKS)
    path = write_file(box.cwd / "file.hdf5", task, num_rows=pick.choice([150, 150, 150, 2, 3, 1]))
    box.done.append(f"D4RL file of {task}")
    for _ in range(1 + (pick.random() < 0.25)):
        mutation = pick.choice(D4RL_MILD if pick.random() < 0.5 else D4RL_SEVERE)
        with contextlib.suppress(OSError):  # of a file that the first mutation has spoiled
            box.done.append(mutation(box, path))
    words = ["data", "import", "d4rl", pick.choice(["file.hdf5", str(path)]), "--task", task, "--json"]
    box.commands.append(words + (["--clip-actions"] if pick.random() < 0.3 else []))
    method = pick.choice(METHODS)
    box.commands.append(train_words(task, method, "evaluation.horizon=5", named="--task"))
    box.writable += ["home/.minari", "home/.minari/*"]


def _d4rl_edit(path: Path, name: str, make: Callable[[Any], Any], **how: Any) -> None:
    try:
        with h5py.File(path, "r+") as file:
            if name in file and isinstance(file[name], h5py.Dataset):
                new = make(file[name][()])
                del file[name]
                file.create_dataset(name, data=new, **how)
    except (OSError, TypeError, ValueError, KeyError, IndexError):
        return


D4RL_FIELDS = ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "infos/goal"]


def d4rl_type(box: Box, path: Path) -> str:
    name = box.random.choice(D4RL_FIELDS)
    kind = box.random.choice(
        ["f2", "f8", ">f4", ">f8", "<f4"] if name not in D4RL_FIELDS[3:5] else ["?", "u1", "i8", "f4"]
    )
    _d4rl_edit(path, name, lambda a: a.astype(kind))
    return f"{name} as {kind}"


def d4rl_stored(box: Box, path: Path) -> str:
    how = box.random.choice([{"compression": "gzip"}, {"compression": "lzf"}, {"chunks": True}, {"fletcher32": True}])
    for name in D4RL_FIELDS[:4]:
        _d4rl_edit(path, name, lambda a: a, **how)
    return f"stored with {how}"


def d4rl_without(box: Box, path: Path) -> str:
    name = box.random.choice(["timeouts", "next_observations", "infos/goal"])
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
    return f"without {name}"


def d4rl_besides(box: Box, path: Path) -> str:
    name = box.random.choice(["infos/qpos", "metadata/algorithm", "é", "infos/action_log_probs"])
    with h5py.File(path, "r+") as file:
        file[name] = box.random.choice([np.zeros((3, 2)), b"text", np.zeros(0)])
    return f"{name} besides"


def d4rl_columns(box: Box, path: Path) -> str:
    name = box.random.choice(["rewards", "terminals", "timeouts"])
    _d4rl_edit(path, name, lambda a: a[:, None])
    return f"{name} (N, 1)"


def d4rl_flags(box: Box, path: Path) -> str:
    pick = box.random
    name, value = pick.choice(["terminals", "timeouts"]), pick.choice([True, False, True])
    _d4rl_edit(path, name, lambda a: np.full_like(a, value))
    return f"{name} all {value}"


def d4rl_scaled(box: Box, path: Path) -> str:
    name, factor = box.random.choice(["rewards", "rewards", "observations", "actions"]), box.random.choice(SCALES)
    _d4rl_edit(path, name, lambda a: a * a.dtype.type(factor) if factor < 1e30 else a * factor)
    return f"{name} times {factor:g}"


def d4rl_poisoned(box: Box, path: Path) -> str:
    pick = box.random
    name = pick.choice(D4RL_FIELDS[:3] + D4RL_FIELDS[5:])
    value = pick.choice([float("nan"), float("inf"), 1e39, -1e39, 3e38, 5e-324])
    place = pick.randrange(10_000)

    def make(array: Any) -> Any:
        new = array.astype(np.float64)
        new.flat[place % new.size] = value
        return new

    _d4rl_edit(path, name, make)
    return f"{name}: a value {value:g}"


def d4rl_reshaped(box: Box, path: Path) -> str:
    pick = box.random
    name = pick.choice(D4RL_FIELDS)
    shapes: dict[str, Callable[[Any], Any]] = {
        "no axis": lambda a: a.reshape(-1)[0],
        "an axis more": lambda a: a[..., None],
        "two axes more": lambda a: a[..., None, None],
        "turned": lambda a: a.T,
        "a row less": lambda a: a[:-1],
        "a row more": lambda a: np.concatenate([a, a[-1:]]),
        "no row": lambda a: a[:0],
        "flat": lambda a: a.reshape(-1),
        "wide": lambda a: np.concatenate([a, a], axis=-1),
        "no entry": lambda a: a[..., :0],
    }
    how = pick.choice(list(shapes))
    _d4rl_edit(path, name, shapes[how])
    return f"{name}: {how}"


def d4rl_retyped(box: Box, path: Path) -> str:
    pick = box.random
    name = pick.choice(D4RL_FIELDS)
    kinds: dict[str, Callable[[Any], Any]] = {
        "bytes": lambda a: np.array([str(v).encode() for v in a.reshape(-1)]).reshape(a.shape),
        "strings": lambda a: np.array([str(v) for v in a.reshape(-1)], dtype=h5py.string_dtype()).reshape(a.shape),
        "complex": lambda a: a.astype(complex),
        "records": lambda a: np.zeros(len(a), dtype=[("x", "f4")]),
        "ints": lambda a: a.astype(np.int64),
        "float flags": lambda a: a.astype(float) * 0.5,
        "empty": lambda _: h5py.Empty("f4"),
    }
    how = pick.choice(list(kinds))
    _d4rl_edit(path, name, kinds[how])
    return f"{name} as {how}"


def d4rl_part(box: Box, path: Path) -> str:
    pick = box.random
    name = pick.choice(D4RL_FIELDS)
    kind = pick.choice(["nothing", "a group", "a link to nowhere", "a link to itself", "an external link"])
    try:
        with h5py.File(path, "r+") as file:
            if name in file:
                del file[name]
            if kind == "a group":
                file.create_group(name)
            elif kind == "a link to nowhere":
                file[name] = h5py.SoftLink("/nowhere")
            elif kind == "a link to itself":
                file[name] = h5py.SoftLink(f"/{name}")
            elif kind == "an external link":
                file[name] = h5py.ExternalLink("nowhere.hdf5", "/x")
    except (OSError, KeyError, RuntimeError):
        return "no part to replace"
    return f"{kind} in place of {name}"


def d4rl_torn(box: Box, path: Path) -> str:
    return spoil_file(box, path)


D4RL_MILD = [d4rl_type, d4rl_type, d4rl_stored, d4rl_without, d4rl_besides, d4rl_columns, d4rl_flags, d4rl_scaled]
D4RL_SEVERE = [d4rl_poisoned, d4rl_reshaped, d4rl_reshaped, d4rl_retyped, d4rl_part, d4rl_torn]


# -- settings ----------------------------------------------------------------------------------------------


def settings(box: Box) -> None:
    """Words on the command line, sweep files, search spaces, manifests and the config in a policy."""
    kinds = [
        *(set_words, set_words, set_words, sweep_file, sweep_file, search_space, presets, flags, manifest),
        *(policy_config,),
    ]
    box.random.choice(kinds)(box)


def _library(box: Box) -> None:
    shutil.copytree(box.templates / "library", box.home / ".minari/datasets", ignore=shutil.ignore_patterns("maze-v0"))


def _known(method: str) -> list[str]:
    from aepo import config as configs
    from aepo import tasks
    from aepo.presets import preset

    return configs.settings(preset(f"{method}-smoke", tasks.for_dataset(DATASET), 0))


def _takes_long(key: str, value: str) -> bool:
    try:
        return key.rpartition(".")[2] in LONG and not float(value.replace("_", "")) < 1001
    except ValueError:
        return False


def _odd_value(pick: random.Random, key: str) -> str:
    while True:
        value = pick.choice(NUMBERS if pick.random() < 0.6 else WORDS)
        if not _takes_long(key, value):
            return value


def set_words(box: Box) -> None:
    _library(box)
    pick = box.random
    method = pick.choice(METHODS)
    words = []
    for _ in range(pick.choice([1, 1, 2])):
        key = pick.choice(_known(method))
        if pick.random() < 0.1:
            odd_keys = [
                *("", ".", "critic", "critic.", ".steps", "critic.steps.x", "seed", "task", "method", "rounds"),
                *("é.x",),
            ]
            key = pick.choice([*odd_keys, key.upper(), f"{key} ", f" {key}", key * 100, "[red]a.b", "data.__class__"])
        words.append(f"{key}={_odd_value(pick, key)}" if pick.random() < 0.97 else key)
    box.done.append("--set " + " ".join(word[:60] for word in words))
    box.commands.append(train_words(DATASET, method, *words))


def presets(box: Box) -> None:
    _library(box)
    pick = box.random
    names = [
        *("", "-", "best-", "-smoke", "best-smoke-", "BEST-SMOKE", "best_smoke", "smoke\n", " smoke"),
        *("ïql-smoke", "None"),
    ]
    names += ["[bold]smoke", "iql-iql", "smoke-smoke", "best-smoke-iql", "x" * 3000, "iql–smoke", "0", "nan"]
    name = pick.choice(names)
    box.done.append(f"preset {name[:40]!r}")
    words = train_words(DATASET, "iql")
    words[words.index("iql-smoke")] = name
    box.commands.append(
        words if pick.random() < 0.6 else ["sweep", "--dataset", DATASET, "--preset", name, "--dry-run"]
    )


def flags(box: Box) -> None:
    """A value of a flag."""
    _library(box)
    pick = box.random
    common = [
        *("--seed", "--task", "--source", "--dataset", "--threads", "--eval-processes", "--checkpoint-s"),
        *("--device",),
    ]
    evaluate = ["--beta", "--guidance-scale", "--temperature", "--num-candidates", "--num-steps", "--seed", "--threads"]
    if pick.random() < 0.5:
        flag = pick.choice(common)
        value = _odd_value(pick, flag)
        if flag == "--eval-processes" and value.isdecimal() and int(value) > 2:
            value = "0"
        words = train_words(DATASET, "iql")
        at = words.index("--set")
        box.commands.append([*words[:at], flag, value, *words[at:]])
    else:
        run = _ended(box, pick.choice(["iql", "best"]))
        flag = pick.choice(evaluate)
        value = _odd_value(pick, flag)
        box.commands.append(["evaluate", run, "--device", "cpu", "--num-episodes", "1", "--json", flag, value])
    box.done.append(f"{flag} {value[:40]!r}")


def _ended(box: Box, method: str, kind: str = "ended") -> str:
    folder = box.copy(f"{kind}/{method}/out", "cwd/out")
    return str(next(each for each in folder.iterdir()).relative_to(box.cwd))


TOML_VALUES = [
    *("nan", "-inf", "-0.0", "-1", "0", "1", "1.5", "1_000", "0x10", '""', '"x"', "true", "[]", "[1, 'a']"),
    *("[[1]]",),
]
TOML_VALUES += ["{}", "{a = 1}", "1979-05-27", "07:32:00", "'''\nx\n'''", '"\\u0000"', '"[red]x"', "1" * 6000, "1e400"]
TOML_VALUES += [
    "[" * 3000 + "]" * 3000,
    str(2**64),
    "['']",
    '["iql-smoke", "td3bc-smoke"]',
    "[0, 0]",
    "[0, 1]",
    "['0']",
]
SWEEP_KEYS = [
    *("out", "task", "suite", "source", "dataset", "seeds", "preset", "address", "runner", "workers_per_run"),
    *("cpus",),
]
SWEEP_KEYS += [
    *("gpus", "max_concurrent", "checkpoint_s", "reuse_stages", "tracking_uri", "retry_failed", "set", "yes"),
    *("file",),
]


def _sweep_lines(pick: random.Random) -> list[str]:
    lines = ['out = "out"', f'dataset = ["{DATASET}"]', 'preset = ["iql-smoke"]', "seeds = [0, 1]", "cpus = 1"]
    return [*lines, "", "[set]", "critic.steps = 10", "actor.steps = 10", "critic.expectile = 0.9"]


def sweep_file(box: Box) -> None:
    """A sweep file that is not quite one, planned without starting anything."""
    _library(box)
    pick = box.random
    lines = _sweep_lines(pick)
    for _ in range(pick.choice([1, 1, 2])):
        how = pick.choice(["key", "key", "value", "setting", "setting", "line", "section", "text", "file"])
        if how == "key":
            key, value = pick.choice(SWEEP_KEYS), pick.choice(TOML_VALUES)
            lines = [line for line in lines if not line.startswith(f"{key} ")]
            lines.insert(0, f"{key} = {value}")
            box.done.append(f"{key} = {value[:40]}")
        elif how == "value":
            place = pick.choice([place for place, line in enumerate(lines) if " = " in line])
            lines[place] = f"{lines[place].partition(' = ')[0]} = {pick.choice(TOML_VALUES)}"
            box.done.append(lines[place][:60])
        elif how == "setting":
            key = pick.choice(_known("iql"))
            value = pick.choice(TOML_VALUES)
            lines.append(f"{key} = {value}")
            box.done.append(f"[set] {key} = {value[:40]}")
        elif how == "line":
            line = pick.choice(lines)
            lines.append(pick.choice([line, line[: len(line) // 2], f"{line} x", "= 3", "é = 1", "a.b.c = 1", "[set]"]))
            box.done.append(f"a line {lines[-1]!r}")
        elif how == "section":
            name = pick.choice(["critic", "other", "set.critic", "a" + ".a" * 3000, "[set]", "[[set]]", '""', "é"])
            lines += [f"[{name}]", "x = 1"]
            box.done.append(f"a section {name[:40]}")
    path = box.cwd / pick.choice(["sweep.toml", "sweep file.toml", "sweep", "é.toml"])
    path.write_text("\n".join(lines) + "\n")
    if pick.random() < 0.15:
        box.done.append(spoil_text(box, path) if pick.random() < 0.6 else spoil_file(box, path))
    # `--out` on the command line, so that what the file says of it is parsed and leads nowhere
    box.commands.append(["sweep", path.name, *pick.choice([["--dry-run"], ["--dry-run"], ["--status"]]), "--json"])


def search_space(box: Box) -> None:
    _library(box)
    pick = box.random
    method = pick.choice(["best", "iql"])
    lines = ["[critic]", "expectile = [0.7, 0.9]", "learning_rate = { log = [1e-4, 1e-2] }", "hidden_size = [8, 16]"]
    lines += ["[sampling]", "beta = [1, 3]", "guidance_scale = [1, 10]"] if method == "best" else ["[actor]"]
    bounds = [
        pick.choice(["nan", "inf", "0", "-1", "1", "2", "1e-3", "1e400", '"a"', "true", str(2**64)]) for _ in range(2)
    ]
    kinds = [f"{{ {pick.choice(['log', 'uniform', 'normal', ''])} = [{', '.join(bounds)}] }}", f"[{', '.join(bounds)}]"]
    for _ in range(pick.choice([1, 1, 2])):
        value = pick.choice([*kinds, *kinds, pick.choice(TOML_VALUES)])
        if pick.random() < 0.5:
            place = pick.choice([place for place, line in enumerate(lines) if " = " in line])
            lines[place] = f"{lines[place].partition(' = ')[0]} = {value}"
            box.done.append(lines[place][:60])
        else:
            group, _, name = pick.choice(_known(method)).partition(".")
            lines += [f"[{group}]", f"{name} = {value}"]
            lines = [line for place, line in enumerate(lines) if line not in lines[:place] or not line.startswith("[")]
            lines = [line for line in lines if line != f"[{group}]"] if f"[{group}]" not in lines[:-2] else lines
            if f"[{group}]" not in lines:
                lines.insert(-1, f"[{group}]")
            box.done.append(f"[{group}] {name} = {value[:40]}")
    path = box.cwd / "space.toml"
    path.write_text("\n".join(lines) + "\n")
    if pick.random() < 0.15:
        box.done.append(spoil_text(box, path) if pick.random() < 0.6 else spoil_file(box, path))
    words = ["search", "--dataset", DATASET, "--preset", f"{method}-smoke", "--space", path.name, "--dry-run", "--json"]
    box.commands.append([*words, "--out", "out"])


def manifest(box: Box) -> None:
    _library(box)
    pick = box.random
    sweep = box.copy("sweep/out", "cwd/out")
    path = sweep / "sweep.json"
    for _ in range(pick.choice([1, 1, 2])):
        if _is_json(path):
            box.done.append(pick.choice([mutate_json, mutate_json, mutate_json, spoil_text, spoil_file])(box, path))
    ways = [["sweep", "out/sweep.json", "--dry-run", "--json"], ["sweep", "--status", "--out", "out", "--json"]]
    box.commands.append(pick.choice(ways))


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict | list)
    except (ValueError, OSError, RecursionError):
        return False


def policy_config(box: Box) -> None:
    """The config in a policy's metadata."""
    _library(box)
    pick = box.random
    run = _ended(box, pick.choice(["iql", "best"]))
    path = box.cwd / run / "policy.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    facts = box.cwd / "facts.json"
    facts.write_text(header["__metadata__"]["aepo-policy-1"])
    box.done.append("policy: " + mutate_json(box, facts))
    header["__metadata__"]["aepo-policy-1"] = facts.read_text()
    facts.unlink()
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    box.commands.append(["evaluate", run, "--device", "cpu", "--num-episodes", "1", "--json"])


# -- folders of runs and sweeps ----------------------------------------------------------------------------

RUN_FILES = ["config.json", "kernels.json", "metrics.jsonl", "state.ckpt", "policy.safetensors", "result.json"]


def folders(box: Box) -> None:
    _library(box)
    box.random.choice([run_folder, run_folder, sweep_folder])(box)


def run_folder(box: Box) -> None:
    """A run that has ended or was stopped, spoiled; then the same command again, and its policy evaluated."""
    pick = box.random
    method, kind = pick.choice(["iql", "best"]), pick.choice(["ended", "stopped", "stopped"])
    run = _ended(box, method, kind)
    folder = box.cwd / run
    box.done.append(f"{kind} run of {method}")
    if kind == "ended" and pick.random() < 0.5:
        (folder / "result.json").unlink()
        box.done.append("no result.json")
    for _ in range(pick.choice([1, 1, 2])):
        box.done.append(_spoil_run(box, folder))
    box.commands.append(train_words(DATASET, method))
    if (folder / "policy.safetensors").exists() and pick.random() < 0.5:
        box.commands.insert(0, ["evaluate", run, "--device", "cpu", "--num-episodes", "1", "--json"])


def _spoil_run(box: Box, folder: Path) -> str:
    pick = box.random
    there = [name for name in RUN_FILES if (folder / name).exists()]
    path = folder / pick.choice(there or ["result.json"])
    if path.name == "state.ckpt" and path.is_file() and pick.random() < 0.6:
        return _other_checkpoint(box, path)
    if path.name == "metrics.jsonl" and path.is_file() and pick.random() < 0.7:
        return _other_rows(box, path)
    if path.suffix == ".json" and _is_json(path) and pick.random() < 0.6:
        return mutate_json(box, path)
    if path.name == "policy.safetensors" and path.is_file() and pick.random() < 0.4:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"aepo-policy-1", b"aepo-policy-0"))
        return "a policy of an older format"
    if pick.random() < 0.15:
        other = folder / pick.choice(["result.json", "state.ckpt", "metrics.jsonl"])
        if other.is_file():
            other.unlink()
        if path.is_file():
            shutil.copy(path, folder / "state.previous.ckpt")
        return f"{path.name} as state.previous.ckpt, another file removed"
    return spoil_file(box, path)


def _other_checkpoint(box: Box, path: Path) -> str:
    """A checkpoint that is whole, and not of this run or version."""
    import torch

    from aepo import checkpoint

    pick = box.random
    try:
        content: Any = checkpoint.from_bytes(path.read_bytes(), path)
    except Exception:
        return spoil_file(box, path)
    places: list[tuple[Any, Any]] = []

    def walk(node: dict[Any, Any]) -> None:
        for key, value in node.items():
            places.append((node, key))
            if isinstance(value, dict):
                walk(value)

    walk(content)
    node, key = pick.choice(places if pick.random() < 0.5 else places[:6])
    how = pick.choice(["removed", "value", "value", "nan", "shape", "foreign", "list"])
    if how == "removed":
        del node[key]
    elif how == "value":
        node[key] = pick.choice([None, -1, 10**9, 2**70, float("nan"), "", "x", [], {}, torch.zeros(3), True])
    elif how in ("nan", "shape") and (tensors := [p for p in places if isinstance(p[0].get(p[1]), torch.Tensor)]):
        node, key = pick.choice(tensors)
        old = node[key]
        node[key] = (
            torch.full_like(old, float("nan")) if how == "nan" and old.is_floating_point() else torch.zeros(2, 5)
        )
    elif how == "foreign":
        content["fingerprint"] = "0" * 12
    else:
        content = [content]
    path.write_bytes(checkpoint.to_bytes(content))
    return f"state.ckpt: {how} at {key!r}"


def _other_rows(box: Box, path: Path) -> str:
    """Rows of metrics that are none, or of another stage or step."""
    pick = box.random
    lines = path.read_bytes().splitlines()
    odd = [b"", b"{}", b"[]", b"null", b"3", b"{", b"\xff\xfe", b"\0" * 20, b"[" * 20_000, b'"x"']
    how = pick.choice(["a line", "a line", "a field", "a field", "turned", "doubled", "no end"])
    place = pick.randrange(max(1, len(lines)))
    if how == "a line":
        lines.insert(place, pick.choice(odd))
    elif how == "a field" and lines:
        try:
            row = json.loads(lines[place])
        except ValueError:
            row = {}
        keys = ["time", "stage", "step", "num_steps", "metrics"]
        key = pick.choice(keys)
        row[key] = pick.choice(JSON_VALUES)
        if pick.random() < 0.3:
            del row[key]
        lines[place] = json.dumps(row).encode()
        how = f"a field {key}: {str(row.get(key, 'removed'))[:30]}"
    elif how == "turned":
        lines.reverse()
    elif how == "doubled":
        lines += lines
    path.write_bytes(b"\n".join(lines) + (b"" if how == "no end" else b"\n"))
    return f"metrics.jsonl: {how}"


def sweep_folder(box: Box) -> None:
    """A sweep whose files are spoiled; then it is looked at and reported."""
    pick = box.random
    sweep = box.copy("sweep/out", "cwd/out")
    looks = [["sweep", "--status", "--out", "out", "--json"], ["report", "out", "--json"]]
    what = pick.choice(["run", "run", "table", "table", "table", "manifest", "mlflow.db", "folder"])
    uri = "sqlite:///out/mlflow.db"
    if what == "run":
        runs = sorted((sweep / "runs").iterdir())
        box.done.append(_spoil_run(box, pick.choice(runs)))
    elif what == "table":
        box.done.append(_other_table(box, sweep / "runs.parquet"))
        looks.reverse()
    elif what == "manifest":
        path = sweep / "sweep.json"
        box.done.append(pick.choice([mutate_json, spoil_text, spoil_file])(box, path))
    elif what == "mlflow.db":
        box.done.append(spoil_file(box, sweep / "mlflow.db"))
        looks = [["report", "mlflow:aepo/out", "--tracking-uri", uri, "--out", "out/report", "--json"]]
    else:
        path = pick.choice(
            [sweep / "runs", sweep / "report", sweep / "sweep.lock", sweep / "stop", sweep / "mlartifacts"]
        )
        if path.is_dir():
            shutil.rmtree(path)
        pick.choice([path.mkdir, path.touch, lambda: path.symlink_to("nowhere")])() if not path.exists() else None
        box.done.append(f"{path.name} is something else")
    box.commands += looks


def _other_table(box: Box, path: Path) -> str:
    """Write runs.parquet with a column or a value that is none of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pick = box.random
    if pick.random() < 0.15:
        return spoil_file(box, path)
    table = pq.read_table(path)
    rows = table.to_pylist()
    how = pick.choice(
        ["value", "value", "value", "value", "no column", "type", "empty", "twice", "nested", "nulls", "version"]
    )
    key = pick.choice(table.column_names)
    if how == "no column":
        table = table.drop_columns([key])
    elif how == "type":
        kind = pick.choice([pa.string(), pa.float32(), pa.int8(), pa.binary(), pa.list_(pa.int64())])
        table = table.set_column(table.column_names.index(key), key, pa.nulls(len(rows), kind))
    elif how == "empty":
        table = table.slice(0, 0)
    elif how == "twice":
        table = pa.concat_tables([table, table])
    elif how == "nulls":
        table = table.set_column(table.column_names.index(key), key, pa.nulls(len(rows), table[key].type))
    elif how == "version":
        rows[0]["schema_version"] = pick.choice([1, 3, -1])
        table = pa.Table.from_pylist(rows, schema=table.schema)
    elif how == "nested":
        for row in rows[: pick.choice([1, 2])]:
            key = pick.choice(["evaluations", "curve"])
            item = pick.choice(row[key] or [{}])
            field = pick.choice(sorted(item) or ["score"])
            item[field] = pick.choice([None, float("nan"), float("inf"), -1, 10**9, 1e308])
            row[key] = pick.choice([row[key], row[key], [], None, [*row[key], *row[key]], [None]])
        try:
            table = pa.Table.from_pylist(rows, schema=table.schema)
        except (pa.ArrowException, TypeError, ValueError):
            table = pa.Table.from_pylist([dict(row, evaluations=[], curve=[]) for row in rows], schema=table.schema)
    else:
        values: list[Any] = [None, "", "x", "[red]x[/]", "<script>alert(1)</script>", "a|b\nc", "é\u202e", "x" * 2000]
        values += [float("nan"), float("inf"), -1, 0, 2**62, 1e308, "failed", "missing", "iql"]
        fitting = []
        for value in values:
            try:
                pa.array([value], table[key].type)
                fitting.append(value)
            except (pa.ArrowException, TypeError, ValueError):
                continue
        value = pick.choice(fitting)
        for row in rows[: pick.choice([1, 2])]:
            row[key] = value
        table = pa.Table.from_pylist(rows, schema=table.schema)
        how = f"{str(value)[:30]!r}"
    pq.write_table(table, path)
    return f"runs.parquet: {how} in {key}"


KINDS: dict[str, Callable[[Box], None]] = {"data": data, "settings": settings, "folders": folders}
