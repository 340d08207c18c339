"""Variants: several settings of one method in one sweep, told apart by a name in folders, rows, tags and the status."""

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aepo import cli, methods, tasks
from aepo import config as configs
from aepo.errors import ConfigError
from aepo.method_table import presets
from aepo.presets import preset
from aepo.runs import run
from tests import ROOT, tracked
from tune import commands
from tune import sweep as sweeps
from tune.plan import describe_variants, grow, make_plan, read_manifest, run_folder, write_manifest
from tune.runs_table import settings_text
from tune.spec import SweepSpec, Variant, read_sweep_file

pytestmark = tracked.MLFLOW_WARNINGS
PAGE = (ROOT / "docs" / "operations.md").read_text().partition("## Variants")[2]
FILE = PAGE.partition("```toml\n")[2].partition("```")[0]
"""The sweep file of docs/operations.md: two methods, three variants, the settings of one task and one method."""
SCALE, TAU = "sampling.guidance_scale", "critic.expectile"


def config_of(method="iql", variant="", **overrides):
    base = preset(f"{method}-smoke", tasks.find("maze2d-umaze"), 0)
    return dataclasses.replace(configs.with_overrides(base, overrides), variant=variant)


# -- the name in a config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", presets())
def test_a_run_without_a_variant_is_the_run_from_before_there_were_variants(method):
    config = config_of(method)
    before = configs.identifying_fields(config)
    assert not {"variant", "rounds"} & set(before)
    digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:12]
    assert config.name == f"maze2d-umaze-s0-{digest}"
    assert methods.from_dict(before) == config
    assert "variant" not in json.loads(settings_text(config))
    assert json.loads(settings_text(config_of(method, "w 3")))["variant"] == "w 3"


def test_a_variant_stands_in_the_name_of_its_run_and_is_part_of_what_the_run_is():
    plain, named, other = (config_of(variant=name) for name in ("", "w 3", "w 5"))
    assert named.name == f"maze2d-umaze-w-3-s0-{named.fingerprint}"
    assert len({config.fingerprint for config in (plain, named, other)}) == 3
    assert methods.from_dict(json.loads(json.dumps(dataclasses.asdict(named)))) == named


@pytest.mark.parametrize("variant", ["../../etc/passwd", "é" * 40, "x" * 40, "a/b\\c:d*e?", "-s1-", "$(rm)"])
def test_whatever_a_variant_is_called_its_run_has_a_short_and_safe_folder(variant):
    config = config_of(variant=variant)
    assert set(config.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
    assert len(dataclasses.replace(config, task="t" * 300).name) < 130


@pytest.mark.parametrize("variant", ["x" * 41, "w\n3", "w\x1b[31m", "\0", " ", " w 3", "w 3 ", "w\u202e3"])
def test_a_name_that_would_spoil_a_table_is_refused(variant):
    with pytest.raises(ConfigError, match=r"must have 1 to 40 characters.*as in 'w 3'; got"):
        config_of(variant=variant)


# -- values keep their types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "typed", "word"),
    [
        ("critic.expectile", 0.9, "0.9"),
        ("critic.learning_rate", 1e-4, "1e-4"),
        ("actor.inverse_temperature", 3, "3"),
        ("critic.layer_norm", False, "false"),
        ("critic.activation", "relu", "relu"),
        ("critic.steps", 20, "20"),
    ],
)
def test_a_value_and_its_word_are_one_setting_and_one_run(key, typed, word):
    one, other = config_of(**{key: typed}), config_of(**{key: word})
    assert one == other
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("key", "value"),
    [("critic.expectile", True), ("critic.steps", True), ("critic.steps", False), ("data.dataset", True)],
)
def test_a_truth_value_is_no_number(key, value):
    with pytest.raises(ConfigError, match=rf"{key} takes no truth value; wanted one like .*, got {value}"):
        config_of(**{key: value})
    with pytest.raises(ConfigError, match="takes no truth value"):
        config_of("best", **{"evaluation.grid_beta": [1.0, True]})


# -- which run gets which setting --------------------------------------------------------------------------


def spec_of(**changes):
    return SweepSpec(**{"task": ("maze2d-umaze",), "preset": ("best-smoke", "iql-smoke"), **changes})


def w(value, **changes):
    return Variant(name=f"w {value}", set={SCALE: value}, **changes)


@pytest.mark.parametrize("given_by", list(itertools.product([False, True], repeat=4)))
def test_set_yields_to_the_method_the_method_to_the_task_and_the_task_to_the_variant(given_by):
    of_all, of_method, of_task, of_variant = given_by
    spec = spec_of(
        task=("maze2d-umaze", "maze2d-open"),
        set={TAU: 0.51} if of_all else {},
        method_set={"iql": {TAU: 0.52}} if of_method else {},
        task_set={"maze2d-open": {TAU: 0.53}} if of_task else {},
        variant=(Variant(name="a"), Variant(name="b", set={TAU: 0.54})) if of_variant else (),
    )
    got = {(c.task, c.method, c.variant): c.critic.expectile for c in make_plan(spec)}
    assert len(got) == (8 if of_variant else 4)
    for (task, method, variant), value in got.items():
        wanted = 0.9  # the preset's
        wanted = 0.51 if of_all else wanted
        wanted = 0.52 if of_method and method == "iql" else wanted
        wanted = 0.53 if of_task and task == "maze2d-open" else wanted
        wanted = 0.54 if variant == "b" else wanted
        assert value == wanted, (task, method, variant)


def test_a_method_without_the_settings_of_any_variant_is_run_once_and_the_command_says_so(tmp_path, capsys):
    words = ["--task", "maze2d-umaze", "--preset", "best-smoke", "iql-smoke", "--out", str(tmp_path / "s"), "--dry-run"]
    for second, of_iql in ((f"w 3: {SCALE}=3", ""), (f"w 3: {SCALE}=3 {TAU}=0.8", "w 3")):
        given = ["--variant", f"w 1: {SCALE}=1", "--variant", second, "--seeds", "0", "1", "--json"]
        assert cli.run(["sweep", *words, *given]) == 0
        out, messages = capsys.readouterr()
        shown = [(row["method"], row["variant"], row["runs"]) for row in json.loads(out)]
        assert shown == [("aepo", "w 1", 2), ("aepo", "w 3", 2), ("iql", of_iql, 2)]
        assert ("iql: run once, without a variant" in messages) == (not of_iql)
    spec = spec_of(variant=(w(1.0), w(3.0)))
    plan = make_plan(spec)
    assert [(c.method, c.variant) for c in plan] == [("aepo", "w 1.0"), ("aepo", "w 3.0"), ("iql", "")]
    assert plan[2].name == make_plan(spec_of())[1].name
    assert describe_variants(spec, plan).startswith("iql: run once, without a variant")
    assert describe_variants(spec, plan[:2]) == describe_variants(spec_of(), make_plan(spec_of())) == ""


@pytest.mark.parametrize(("name", "method"), [("best", "aepo"), ("aepo", "aepo"), ("iql", "iql")])
def test_a_method_is_named_as_its_preset_or_as_in_tables(name, method):
    variants = (Variant(name="a", set={TAU: 0.8}, methods=(name,)),)
    plan = make_plan(spec_of(method_set={name: {"critic.steps": 7}}, variant=variants))
    assert {c.method: (c.variant, c.critic.expectile) for c in plan} == {
        other: ("a", 0.8) if other == method else ("", 0.9) for other in ("aepo", "iql")
    }
    assert {c.method for c in plan if c.critic.steps == 7} == {method}
    assert make_plan(spec_of(method_set={"td3bc": {"actor_critic.steps": 7}})) == make_plan(spec_of())


def test_a_suite_and_a_task_of_it_with_settings_plan_the_task_once():
    suite = [row.task for row in tasks.of_suite("maze2d")]
    plan = make_plan(spec_of(task=(suite[1],), suite=("maze2d",), task_set={suite[1]: {TAU: 0.6}}))
    assert sorted(c.task for c in plan) == sorted(2 * suite)
    assert {c.task for c in plan if c.critic.expectile == 0.6} == {suite[1]}


NO_SETTING = r"has no setting 'critic\.expectil'; did you mean critic\.expectile"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": (w(1), w(1))}, "two variants are called 'w 1'; give each a name of its own"),
        (
            {"variant": (w(1), Variant(name="one", set={SCALE: 1.0}))},
            "'w 1' and 'one' give aepo on maze2d-umaze the same",
        ),
        (
            {"variant": (Variant(name="a"), Variant(name="b"))},
            "'a' and 'b' give aepo on maze2d-umaze the same settings",
        ),
        ({"variant": (Variant(name="a", set={"critic.expectil": 1}),)}, f"variant 'a': .*{NO_SETTING}"),
        ({"variant": (Variant(name="a", set={TAU: 0.8, "x.y": 1}),)}, "variant 'a': aepo, iql has no setting 'x.y'"),
        ({"variant": (Variant(name="a", set={TAU: 2}),)}, r"aepo on maze2d-umaze, variant 'a': .*\(0, 1\), got 2"),
        ({"variant": (w(1, methods=("best", "iql")),)}, "'w 1' changes nothing of iql on maze2d-umaze"),
        ({"variant": (w(1, methods=("iql",)),)}, "variant 'w 1': iql has no setting 'sampling.guidance_scale'"),
        ({"variant": (w(1, methods=("iqll",)),)}, "no method 'iqll'; did you mean iql"),
        ({"method_set": {"cql": {}}}, "no method 'cql'; did you mean"),
        ({"method_set": {"iql": {SCALE: 1}}}, r"\[method.iql.set\]: iql has no setting 'sampling.guidance_scale'"),
        ({"method_set": {"best": {TAU: 0.6}, "aepo": {TAU: 0.7}}}, "are of one method; make them one table"),
        ({"task_set": {"maze2d-umaze": {"critic.expectil": 1}}}, rf'\[task."maze2d-umaze".set\]: .*{NO_SETTING}'),
        ({"set": {"critic.num_samples": 16}}, "set: aepo, iql does not use critic.num_samples with its learner"),
    ],
)
def test_what_changes_nothing_or_is_not_clear_is_refused_before_anything_runs(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(spec_of(**changes))


# -- files and flags ---------------------------------------------------------------------------------------


def test_a_sweep_file_keeps_the_types_of_its_values(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(FILE)
    spec, execution = read_sweep_file(file)
    assert spec == SweepSpec(
        task=("maze2d-umaze", "maze2d-open"),
        seeds=(0, 1, 2),
        preset=("best", "iql"),
        variant=tuple(
            Variant(name=name, set={SCALE: value, "actor.inverse_temperature": value})
            for name, value in (("mild", 1), ("middle", 3), ("greedy", 10))
        ),
        task_set={"maze2d-open": {TAU: 0.8}},
        method_set={"iql": {"actor.activation": "relu"}},
    )
    assert [type(value) for value in spec.variant[0].set.values()] == [int, int]
    assert execution.out == Path("sweeps/greed")
    assert len(make_plan(spec)) == 2 * 2 * 3 * 3
    file.write_text("[dataset.'a/b-v0'.set]\ncritic = { expectile = 0.1 }\n[[variant]]\nname = 'x'\nset = ['a.b=1']")
    spec, _ = read_sweep_file(file)
    assert (spec.dataset, spec.task_set) == (("a/b-v0",), {"a/b-v0": {TAU: 0.1}})
    assert spec.variant == (Variant(name="x", set={"a.b": "1"}),)


@given(value=st.floats(min_value=1e-300, max_value=1, exclude_max=True))
def test_a_number_of_a_sweep_file_is_the_number_of_the_run(value, tmp_path_factory):
    file = tmp_path_factory.mktemp("file") / "sweep.toml"
    file.write_text(f"task = ['maze2d-umaze']\npreset = ['iql-smoke']\nset = {{ '{TAU}' = {value!r} }}\n")
    (config,) = make_plan(read_sweep_file(file)[0])
    assert config.critic.expectile == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[variant]]\nname = ''", "1 to 40 characters"),
        ("[[variant]]\nname = 'w\u00073'", "is no TOML"),
        ('[[variant]]\nname = "w\\u00073"', "none of them a control character"),
        ("[[variant]]\nset = { a = 1 }", "variant.0.name: "),
        ("[[variant]]\nname = 'a'\nsett = { a = 1 }", "variant.0.sett: "),
        ("[[variant]]\nname = 'a'\nset = 3", "variant.0.set: wanted a table of settings"),
        ("variant = ['w 3']", "variant.0: "),
        ("[task.maze2d-umaze]\nexpectile = 1", r'task.maze2d-umaze: wanted \[task."maze2d-umaze".set\]'),
        ("[method]\niql = 3", r'method.iql: wanted \[method."iql".set\]'),
        ("method = 'iql'", "method: wanted tables"),
        ("stages = 'x'", "no setting 'stages'"),
        ("task_set = {}", "no setting 'task_set'"),
        ("task = ['a']\n[task.b.set]", "is no TOML"),
    ],
)
def test_a_variant_or_table_with_a_mistake_is_refused_by_its_place(text, message, tmp_path, capsys):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep_file(file)
    assert cli.run(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_variants_that_are_given_take_the_place_of_the_files(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(FILE)
    merged = cli.parse(commands.Sweep, "aepo sweep", [str(file), "--variant", f"w 3:{SCALE}=3", "--variant", "same:"])
    assert merged.spec.variant == (Variant(name="w 3", set={SCALE: "3"}), Variant(name="same"))
    assert merged.spec.method_set == {"iql": {"actor.activation": "relu"}}
    assert len(cli.parse(commands.Sweep, "aepo sweep", [str(file)]).spec.variant) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "w 3"], "wants 'NAME: KEY=VALUE ...', as in 'w 3: sampling.guidance_scale=3'; got 'w 3'"),
        (["--variant", f": {SCALE}=3"], "1 to 40 characters"),
        (["--variant", "w 3: guidance"], "a setting wants KEY=VALUE"),
        (["--set", "critic.expectile"], "a setting wants KEY=VALUE"),
        (["--variant", f"a: {SCALE}=3", "--variant", f"a: {SCALE}=4"], "two variants are called 'a'"),
    ],
)
def test_words_that_are_no_variant_get_one_line(words, message, tmp_path, capsys):
    assert cli.run(["sweep", "--task", "maze2d-umaze", "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line


# -- carried out -------------------------------------------------------------------------------------------


def names(folder):
    return sorted({(config.variant, config.seed) for config in read_manifest(folder)})


def test_a_plan_grows_by_variants_and_another_name_takes_the_place_of_the_old_one(tmp_path):
    def plan(*variants, **changes):
        wanted = make_plan(spec_of(preset=("best-smoke",), variant=variants, **changes))
        whole, leaving = grow(tmp_path, wanted)
        write_manifest(tmp_path, whole)
        return sorted({config.variant for config in leaving})

    assert plan() == []
    assert plan(w(2), w(3), seeds=(0, 1)) == []
    assert names(tmp_path) == [("", 0), *itertools.product(("w 2", "w 3"), (0, 1))]
    assert plan(w(3), w(4)) == []
    assert names(tmp_path) == [("", 0), *itertools.product(("w 2", "w 3"), (0, 1)), ("w 4", 0)]
    assert plan(Variant(name="three", set={SCALE: 3})) == ["w 3"]
    assert plan(Variant(name="w 2", set={SCALE: 2, TAU: 0.6})) == ["w 2"]
    assert plan(Variant(name="as it is")) == [""]
    assert names(tmp_path) == [("as it is", 0), ("three", 0), ("w 2", 0), ("w 4", 0)]


def tiny_file(folder, dataset):
    """Write the page's file for one data set; return words that make its runs small."""
    text = FILE.replace('[task."maze2d-umaze"]', "").replace('[task."maze2d-open".set]', f'[dataset."{dataset}".set]')
    text = text.replace('["best", "iql"]', '["best-smoke", "iql-smoke"]').replace("[0, 1, 2]", "[0]")
    (folder / "greed.toml").write_text(text)
    small = [
        f"{stage}.{key}" for stage in ("behavior", "critic", "energy", "actor") for key in ("steps=20", "hidden_size=8")
    ]
    return [str(folder / "greed.toml"), "--out", str(folder / "sweep"), "--set", *small]


WANTED = [(method, variant) for method in ("aepo", "iql") for variant in ("mild", "middle", "greedy")]


def check_sweep(folder):
    """Check names, configs and rows of the page's sweep, which has been carried out."""
    table = pq.read_table(folder / "runs.parquet").to_pylist()
    assert [(row["method"], row["variant"], row["status"]) for row in table] == [(*each, "finished") for each in WANTED]
    for row, (method, variant) in zip(table, WANTED, strict=True):
        assert f"-{variant}-s0-" in row["run"]
        values = json.loads((folder / row["folder"] / "config.json").read_text())
        strength = {"mild": 1.0, "middle": 3.0, "greedy": 10.0}[variant]
        own = values["sampling"]["guidance_scale"] if method == "aepo" else values["actor"]["inverse_temperature"]
        assert (values["variant"], own, values["critic"]["expectile"]) == (variant, strength, 0.8)
        assert values["critic"]["steps"] == 20
        if method == "iql":
            assert values["actor"]["activation"] == "relu"
        scales = {each["method"]: each["guidance_scale"] for each in row["evaluations"]}
        assert scales[method] == (strength if method == "aepo" else None)
        assert json.loads(row["settings"])["variant"] == variant


def test_the_sweep_file_of_the_operations_page_is_carried_out(make_dataset, tmp_path, monkeypatch, capsys):
    def run_here(folder, plan, resources):
        for config in plan:
            place = run_folder(folder, config)
            place.mkdir(parents=True, exist_ok=True)
            run.execute(config, place, run.FolderStore(place), device=torch.device("cpu"))
        return {}

    monkeypatch.setattr(sweeps, "_run_on_ray", run_here)
    words = tiny_file(tmp_path, make_dataset())
    assert cli.run(["sweep", *words]) == 0
    out, _ = capsys.readouterr()
    assert "variant" in out
    check_sweep(tmp_path / "sweep")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "runs").rglob("result.json")}
    assert cli.run(["sweep", *words, "--json"]) == 0  # again: nothing is repeated
    assert [row["variant"] for row in json.loads(capsys.readouterr().out)] == [variant for _, variant in WANTED]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert cli.run(["sweep", "--status", "--out", str(tmp_path / "sweep"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["variant"], row["state"]) for row in rows] == [(*each, "finished") for each in WANTED]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/sweep/mlflow.db")
    experiment = client.get_experiment_by_name("aepo/sweep").experiment_id
    found = [entry.data for entry in client.search_runs([experiment], "tags.`aepo.run` != ''")]
    assert sorted(entry.tags["aepo.variant"] for entry in found) == sorted(variant for _, variant in WANTED)
    assert all(entry.params["variant"] == entry.tags["aepo.variant"] for entry in found)


@pytest.mark.slow
@pytest.mark.ray
def test_the_sweep_file_of_the_operations_page_runs_on_ray(make_dataset, tmp_path):
    words = [sys.executable, "-m", "aepo", "sweep", *tiny_file(tmp_path, make_dataset()), "--runner", "inline"]
    ended = subprocess.run([*words, "--reuse-stages"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    check_sweep(tmp_path / "sweep")
