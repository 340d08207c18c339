"""Variants: several settings of one method in one sweep, told apart by a name in folders, rows, tags and the status."""

import dataclasses
import hashlib
import json

import pytest

from aepo import config as configs
from aepo import tasks
from aepo.errors import ConfigError
from aepo.presets import METHODS, preset
from tune.record import settings_text


def config_of(method="iql", variant="", **overrides):
    base = preset(f"{method}-smoke", tasks.find("maze2d-umaze"), 0)
    return dataclasses.replace(configs.with_overrides(base, overrides), variant=variant)


# -- the name in a config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_without_a_variant_is_the_run_from_before_there_were_variants(method):
    config = config_of(method)
    before = dataclasses.asdict(config)
    assert (before.pop("variant"), before.pop("rounds")) == ("", (1.0,))
    digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:12]
    assert config.name == f"maze2d-umaze-s0-{digest}"
    assert configs.from_dict(before) == config
    assert "variant" not in json.loads(settings_text(config))
    assert json.loads(settings_text(config_of(method, "w 3")))["variant"] == "w 3"


def test_a_variant_stands_in_the_name_of_its_run_and_is_part_of_what_the_run_is():
    plain, named, other = (config_of(variant=name) for name in ("", "w 3", "w 5"))
    assert named.name == f"maze2d-umaze-w-3-s0-{named.fingerprint}"
    assert len({config.fingerprint for config in (plain, named, other)}) == 3
    assert configs.from_dict(json.loads(json.dumps(dataclasses.asdict(named)))) == named


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
