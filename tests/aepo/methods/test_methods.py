"""The table of methods: names, streams, what is refused; and that nothing outside aepo/methods names a method."""

import dataclasses
import hashlib
import re
from importlib.metadata import EntryPoint

import pytest

from aepo import method_table, methods, pipeline
from aepo.config import StageConfig
from aepo.errors import ConfigError
from tests import ROOT

NAMED = re.compile(r"\b(rebrac|td3bc|qgpo|idql|iql|fql)\b")


def test_no_file_outside_the_methods_names_one():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in ("aepo", "tune", "cluster", "analysis")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.parent != ROOT / "aepo" / "methods"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if NAMED.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [row.method for row in method_table.rows().values() if row.object])
def test_a_methods_stages_are_its_configs_fields_in_order(name, tiny_config):
    method = methods.find(name)
    config = tiny_config(method=method_table.rows()[name].preset)
    assert type(config) is method.config
    assert [stage.name for stage in method.stages()] == list(config.stages)
    for stage in method.stages():
        earlier = list(config.stages)[: list(config.stages).index(stage.name)]
        assert set(stage.learns_from(config.stages[stage.name])) <= set(earlier)
        assert isinstance(config.stages[stage.name], StageConfig)


def test_the_first_five_stages_keep_their_streams():
    known = ["behavior", "critic", "energy", "actor", "actor_critic"]
    assert [pipeline.stream_seed(stage, 0) for stage in known] == [0, 1, 2, 3, 4]
    assert [pipeline.stream_seed(stage, 3) for stage in known] == [15, 16, 17, 18, 19]


def test_a_new_stages_stream_follows_from_its_name_and_the_seed():
    streams = {pipeline.stream_seed(stage, seed) for stage in ("a", "b", "critic2") for seed in range(4)}
    assert len(streams) == 12
    assert all(2**32 < stream < 2**63 for stream in streams)
    # fixed for ever, or old runs would go on with other numbers
    assert pipeline.stream_seed("a", 0) == int(hashlib.sha256(b"a/0").hexdigest()[:16], 16) // 2


def test_labels_and_colours_are_given_and_distinct():
    rows = list(method_table.rows().values())
    assert all(row.label and re.fullmatch("#[0-9A-F]{6}", row.colour) for row in rows)
    for part in ("label", "colour", "method"):
        assert len({getattr(row, part) for row in rows}) == len(rows)


@pytest.fixture
def entries(monkeypatch):
    """A function that lets other packages bring these entry points."""

    def bring(**points):
        found = [EntryPoint(name=name, value=value, group=method_table.GROUP) for name, value in points.items()]
        monkeypatch.setattr(method_table, "entry_points", lambda group: found if group == method_table.GROUP else [])
        method_table.rows.cache_clear()
        methods.find.cache_clear()

    yield bring
    monkeypatch.undo()
    method_table.rows.cache_clear()
    methods.find.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("iql", "mine:IQL", "has a name that aepo uses; rename it"),
        ("best", "mine:BEST", "has a name that aepo uses; rename it"),
        ("My-Method", "mine:M", "wants a name of lower-case letters, digits and _"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, value, message, entries):
    entries(**{name: value})
    with pytest.raises(ConfigError, match=message):
        method_table.rows()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:M", "cannot be loaded from no_such_module:M: No module named"),
        ("math:nothing", "cannot be loaded from math:nothing"),
        ("math:pi", "math:pi is a float, wanted a Method named 'mine'"),
        ("aepo.methods.iql:IQL", "is a Method named 'iql', wanted a Method named 'mine'"),
    ],
)
def test_an_object_that_is_no_method_is_refused(value, message, entries):
    entries(mine=value)
    with pytest.raises(ConfigError, match=message):
        methods.find("mine")


def test_an_unknown_method_is_refused_by_the_names_that_are_known():
    with pytest.raises(ConfigError, match=r"method must be one of aepo, aepo-analytic, .*, got 'sac'"):
        methods.find("sac")
    with pytest.raises(ConfigError, match="got 'diffusion-bc'"):
        methods.find("diffusion-bc")


def test_a_config_of_another_methods_class_does_not_train(tiny_config, transitions):
    import torch

    config = dataclasses.replace(tiny_config(method="iql"), method="td3bc")
    with pytest.raises(ConfigError, match="a IQLConfig has not the stages of td3bc: wanted a TD3BCConfig"):
        pipeline.start(config, transitions, torch.device("cpu"))
