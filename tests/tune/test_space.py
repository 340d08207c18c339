"""Search spaces: what is refused, and draws that depend on the record alone."""

import pytest

from aepo import config as configs
from aepo import tasks
from aepo.errors import ConfigError
from aepo.presets import preset
from tests.examples import trial
from tune.space import default_space, draw, preset_draw, read_space

TASK = tasks.find("maze2d-umaze")


@pytest.fixture
def base():
    return preset("quick", TASK, 0)


def write(path, text):
    file = path / "space.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("suite", sorted({row.suite for row in tasks.rows()}))
@pytest.mark.parametrize("method", ["quick", "analytic", "qgpo"])
def test_the_spaces_of_the_repository_fit_every_suite(suite, method):
    row = next(row for row in tasks.rows() if row.suite == suite)
    base = preset(method, row, 0)
    space = read_space(default_space([suite]), [base])
    for number in range(30):
        space.apply(draw(space, "random", number, []), base)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "varies nothing"),
        ("critic.expectil = [0.5]", r"critic.expectil.*did you mean critic.expectile"),
        ("[critics]\nexpectile = [0.5]", "critics.expectile"),
        ("expectile = 0.5", "outside a table"),
        ("critic.expectile = [0.5, 1.5]", r"expectile must be in \(0, 1\)"),
        ("critic.expectile = 0.5", r"wants a list of values, \{log"),
        ("critic.expectile = {log = [0.0, 0.5]}", "critic.expectile"),
        ("critic.expectile = {log = [0.9, 0.5]}", "critic.expectile"),
        ("critic.expectile = {normal = [0.5, 0.9]}", "wants a list"),
        ("critic.backup_steps = {uniform = [1.5, 3]}", "whole numbers"),
        ("critic.backup_steps = {uniform = [0, 3]}", "backup_steps must be in"),
        ("energy.target = ['analytic', 'best']", "target"),
        ("critic.steps = [100, 200]", "not searched"),
        ("evaluation.num_episodes = [1, 2]", "not searched"),
        ("sampling.beta = {log = [1, 3]}", "wants a list of numbers above 0"),
        ("sampling.guidance_scale = [0, 1]", "wants a list of numbers above 0"),
        ("sampling.beta = [100]\nenergy.target = ['analytic', 'log_expectation']", "outside what target"),
        ("critic.expectile = [", "is no TOML"),
    ],
)
def test_what_is_wrong_is_said(text, words, base, tmp_path):
    with pytest.raises(ConfigError, match=words):
        read_space(write(tmp_path, text), [base])


def test_a_method_without_guidance_has_no_beta(tmp_path):
    with pytest.raises(ConfigError, match=r"sampling\.beta"):
        read_space(write(tmp_path, "sampling.beta = [1]"), [preset("iql", TASK, 0)])


def test_a_draw_lies_in_its_range_and_what_its_target_lacks_is_left_out(base, tmp_path):
    text = """
    energy.target = ["analytic", "mse"]
    energy.expansion = ["posterior_mean", "data_action"]
    critic.backup_steps = {log = [1, 100]}
    energy.learning_rate = {log = [1e-4, 1e-2]}
    sampling.temperature = {uniform = [0, 1]}
    sampling.guidance_scale = [1, 2]
    """
    space = read_space(write(tmp_path, text), [base])
    seen = set()
    for seed in range(40):
        params = draw(space, "random", seed, [])
        config = space.apply(params, base)
        assert 1 <= config.critic.backup_steps <= 100
        assert 1e-4 <= config.energy.learning_rate <= 1e-2
        assert 0 <= config.sampling.temperature <= 1
        assert config.evaluation.grid_guidance_scale == (1.0, 2.0)
        assert config.evaluation.grid_beta == (config.sampling.beta,)
        if config.energy.target == "analytic":
            seen.add(config.energy.expansion)
        else:
            assert config.energy.expansion == configs.EnergyConfig.__dataclass_fields__["expansion"].default
    assert seen == {"posterior_mean", "data_action"}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_are_a_function_of_the_record_and_never_repeat(sampler, base, tmp_path):
    space = read_space(write(tmp_path, "critic.expectile = [0.5, 0.7, 0.9]\ncritic.backup_steps = [1, 10]"), [base])
    trials = []
    while (params := draw(space, sampler, 7, trials)) is not None:
        assert params == draw(space, sampler, 7, trials)
        state = ("finished", "stopped", "failed", "running")[len(trials) % 4]
        trials.append(trial(len(trials), (params["critic.expectile"],) * (state != "failed"), state, params))
    settings = [tuple(sorted(trial.params.items())) for trial in trials]
    assert len(settings) == len(set(settings)) == 6


def test_tpe_looks_where_scores_were_high(base, tmp_path):
    space = read_space(write(tmp_path, "energy.learning_rate = {log = [1e-4, 1e-1]}"), [base])
    trials = []
    for _ in range(40):
        params = draw(space, "tpe", 0, trials)
        rate = params["energy.learning_rate"]
        trials.append(trial(len(trials), (-abs(rate - 1e-3),), "finished", params))
    late = sorted(trial.params["energy.learning_rate"] for trial in trials[25:])
    assert 3e-4 < late[len(late) // 2] < 3e-3


def test_the_preset_is_a_draw_if_it_lies_in_the_space(base, tmp_path):
    space = read_space(default_space(["maze2d"]), [base])
    params = preset_draw(space, base)
    config = space.apply(params, base)
    assert (config.critic, config.energy) == (base.critic, base.energy)
    for text in ("critic.expectile = [0.5, 0.7]", "energy.learning_rate = {log = [1e-5, 1e-4]}"):
        assert preset_draw(read_space(write(tmp_path, text), [base]), base) is None
