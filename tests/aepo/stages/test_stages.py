"""The examination that every stage passes: trains, resumes bit for bit, refuses what is foreign, heeds its config."""

import copy
import csv
import dataclasses
import io
from importlib.resources import files
from typing import get_args

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aepo import checkpoint, kernels, method_table, methods, pipeline, tasks
from aepo import config as configs
from aepo.diffusion import guidance
from aepo.errors import CheckpointError, ConfigError, TrainingError
from aepo.kernels import matmul_precision
from aepo.policy import Policy
from aepo.presets import preset
from aepo.stages import critic
from tests.examples import random_transitions
from tests.training import CPU, finish, same, weights

METHODS = method_table.presets()


STAGES_OF = {preset: [stage.name for stage in methods.find(name).stages()] for preset, name in METHODS.items()}
METHOD_STAGES = [(method, stage) for method, stages in STAGES_OF.items() for stage in stages]


@pytest.mark.parametrize(("method", "stage"), METHOD_STAGES)
@pytest.mark.parametrize("step", [50, 60])
def test_a_run_broken_in_any_stage_ends_bit_for_bit_like_an_unbroken_one(method, stage, step, tiny_config, transitions):
    config = tiny_config(method=method)
    unbroken = finish(config, transitions)
    for progress in pipeline.train(config, transitions, device=CPU):
        if (progress.stage, progress.step) == (stage, step):
            file = io.BytesIO()
            torch.save(checkpoint.collect(progress.states), file)
            break
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    if (stage, step) == (STAGES_OF[method][-1], 60):
        state = pipeline.start(config, transitions, CPU)
        checkpoint.restore(state, saved)
        assert same(weights(state), unbroken)
    else:
        assert same(finish(config, transitions, saved), unbroken)


@pytest.mark.parametrize("method", STAGES_OF)
def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(method, tiny_config, transitions):
    third = finish(tiny_config(seed=3, method=method), transitions)
    assert same(finish(tiny_config(seed=3, method=method), transitions), third)
    assert not same(finish(tiny_config(seed=4, method=method), transitions), third)


def test_a_stage_is_the_same_in_every_method_that_has_it(tiny_config, transitions):
    same_critic = {"critic__backup_steps": 3, "critic__discount": 0.9}
    guided = finish(tiny_config(**same_critic), transitions)
    iql = finish(tiny_config(method="iql", **same_critic), transitions)
    of_critic = {key: value for key, value in iql.items() if key.startswith(".critic")}
    assert of_critic
    assert same({key: guided[key] for key in of_critic}, of_critic)
    other_size = finish(tiny_config(behavior__hidden_size=17, **same_critic), transitions)
    assert same({key: other_size[key] for key in of_critic}, of_critic)


@pytest.mark.parametrize(("method", "stage"), METHOD_STAGES)
def test_every_stage_lowers_its_loss(method, stage, tiny_config, transitions):
    overrides = {f"{stage}__steps": 400, f"{stage}__learning_rate": 1e-3, f"{stage}__batch_size": 64}
    rows = [
        progress.metrics[f"{stage}/loss"]
        for progress in pipeline.train(tiny_config(method=method, **overrides), transitions, device=CPU)
        if progress.stage == stage and progress.metrics
    ]
    # a cross-entropy ends at the entropy of its labels, which here is almost that of a uniform distribution
    limit = 1.0 if (method, stage) == ("qgpo", "energy") else 0.9
    assert sum(rows[-20:]) < limit * sum(rows[:20])


@pytest.mark.parametrize("method", STAGES_OF)
def test_progress_runs_through_the_stages_in_order_and_to_their_last_step(method, tiny_config, transitions):
    seen = [(p.stage, p.step) for p in pipeline.train(tiny_config(method=method), transitions, device=CPU)]
    assert list(dict.fromkeys(stage for stage, _ in seen)) == STAGES_OF[method]
    for stage in STAGES_OF[method]:
        steps = [step for name, step in seen if name == stage]
        assert steps == sorted(set(steps))
        assert steps[-1] == 60


@pytest.mark.parametrize(("method", "stage"), METHOD_STAGES)
def test_a_checkpoint_of_other_networks_is_refused(method, stage, tiny_config, transitions):
    *_, last = pipeline.train(tiny_config(method=method), transitions, device=CPU)
    saved = checkpoint.collect(last.states)
    with pytest.raises(CheckpointError, match="does not fit"):
        finish(tiny_config(method=method, **{f"{stage}__hidden_size": 17}), transitions, saved)
    with pytest.raises(CheckpointError, match="another version"):
        finish(tiny_config(method=method), transitions, {key: saved[key] for key in saved if key != stage})
    for other in set(STAGES_OF) - {method}:
        if STAGES_OF[other] != STAGES_OF[method]:
            with pytest.raises(CheckpointError, match="another version"):
                finish(tiny_config(method=other), transitions, saved)


OTHER = {
    "behavior": {
        "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4, "ema_decay": 0.5,
        "variance": "learned",
    },
    "critic": {
        "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4,
        "expectile": 0.95, "discount": 0.5, "target_rate": 0.5, "learner": "softmax_in_support",
        "num_samples": 5, "num_support_states": 33, "backup_beta": 3.0, "backup_steps": 5,
        "activation": "relu", "layer_norm": False, "action_noise": 0.5, "state_noise": 0.1,
    },
    "energy": {
        "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4,
        "ema_decay": 0.5, "target": "mse", "expansion": "posterior_mean",
        "num_samples": 5, "num_support_states": 33, "beta_min": 0.2, "beta_max": 5.0,
    },
    "actor": {
        "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4,
        "inverse_temperature": 0.5, "activation": "relu",
    },
    "actor_critic": {
        "steps": 61, "batch_size": 17, "hidden_size": 17, "num_layers": 3, "learning_rate": 1e-4,
        "discount": 0.5, "target_rate": 0.5, "q_weight": 1.0, "policy_noise": 0.1, "noise_clip": 0.05,
        "actor_interval": 1, "activation": "relu", "layer_norm": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("analytic", "behavior"),
        ("analytic", "critic"),
        ("analytic", "energy"),
        ("iql", "actor"),
        ("td3bc", "actor_critic"),
    ],
)
def test_every_setting_of_a_stage_is_heeded(method, stage, tiny_config, transitions):
    base = tiny_config(method=method)
    fields = {field.name for field in dataclasses.fields(getattr(base, stage))}
    assert set(OTHER[stage]) | {"precision"} == fields, "a new setting wants a line here"
    before = finish(base, transitions)
    other = tiny_config(method="qgpo") if method == "analytic" else base
    before_other = finish(other, transitions)
    for name, value in OTHER[stage].items():
        of_other = name in ("num_samples", "num_support_states", "beta_min", "beta_max", "backup_beta")
        reference = other if of_other else base
        changed = configs.with_overrides(reference, {f"{stage}.{name}": value})
        assert not same(finish(changed, transitions), before_other if of_other else before), name
        assert changed.fingerprint != reference.fingerprint


class Products(TorchDispatchMode):
    """Notes the precision that torch has whenever a matrix product is computed."""

    def __init__(self):
        super().__init__()
        self.precisions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_steps_matrix_products_have_the_precision_of_its_stage_and_no_others(
    method, tiny_config, transitions, monkeypatch
):
    """What it makes of them is the processor's affair; what the steps ask for is ours."""
    base = tiny_config(method=method)
    for stage in base.stages:
        config = configs.with_overrides(base, {f"{stage}.precision": "bfloat16"})
        assert config.fingerprint != base.fingerprint
        for smallest, wanted in ((0, "medium"), (2**40, "highest")):  # small products stay float32
            if smallest and stage not in pipeline.STREAMS:
                continue  # autograd, by which a method's own stages may learn, multiplies all alike
            monkeypatch.setattr(kernels, "MIN_PRODUCTS", smallest)
            _, steps = pipeline.prepare(config, transitions, CPU)
            for name, step in steps.items():
                step()  # measures what it takes from the stages before
                with Products() as products:
                    step()
                assert set(products.precisions) == {wanted if name == stage else "highest"}, (name, smallest)
                assert torch.get_float32_matmul_precision() == "highest"  # evaluation, between steps
    with pytest.raises(RuntimeError, match="no"), matmul_precision("bfloat16"):
        raise RuntimeError("no")
    assert torch.get_float32_matmul_precision() == "highest"


@torch.no_grad()
def test_bfloat16_costs_a_factor_at_most_its_last_bit(monkeypatch):
    """Processors without units for it may compute as ever, or by other kernels of the same precision."""
    monkeypatch.setattr(kernels, "MIN_PRODUCTS", 0)
    x, weight, bias = torch.randn(64, 64), torch.randn(64, 64), torch.randn(64)
    with matmul_precision("bfloat16"):
        found = [kernels.linear(x, weight, bias), kernels.product(x, weight), kernels.product(x.t(), weight)]
    exact = [torch.addmm(bias, x, weight.T), x @ weight, x.T @ weight]
    sizes = [x.abs() @ weight.T.abs() + bias.abs(), x.abs() @ weight.abs(), x.T.abs() @ weight.abs()]
    for one, other, size in zip(found, exact, sizes, strict=True):
        assert ((one - other).abs() <= 2.02 * 2**-8 * size).all()


TARGETS = tuple(configs.ENERGY_TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variance", ["time", "learned"])
def test_every_target_trains_resumes_bit_for_bit_and_guides(target, variance, tiny_config, transitions):
    config = tiny_config(energy__target=target, behavior__variance=variance)
    *_, last = pipeline.train(config, transitions, device=CPU)
    unbroken = weights(last.states)
    for progress in pipeline.train(config, transitions, device=CPU):
        if (progress.stage, progress.step) == ("energy", 30):
            saved = copy.deepcopy(checkpoint.collect(progress.states))
            break
    assert same(finish(config, transitions, saved), unbroken)
    policy = Policy.from_state(config, last.states, transitions)
    states = torch.randn(64, transitions.state_dim, generator=torch.Generator().manual_seed(0))
    drawn = [
        policy.with_sampling(dataclasses.replace(config.sampling, guidance_scale=w, beta=beta)).sampler.sample(
            states, torch.Generator().manual_seed(1)
        )
        for w, beta in ((0.0, 1.0), (1.0, 1.0), (1.0, 3.0))
    ]
    assert all(actions.abs().max() <= 1 for actions in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("learner", configs.CRITIC_LEARNERS)
@pytest.mark.parametrize("variance", get_args(configs.VarianceEstimate))
@pytest.mark.parametrize("expansion", get_args(configs.Expansion))
@pytest.mark.parametrize("target", TARGETS)
def test_every_combination_of_choices_trains_or_is_refused(
    target, expansion, variance, learner, tiny_config, transitions
):
    choices = {
        "energy__target": target,
        "energy__expansion": expansion,
        "behavior__variance": variance,
        "critic__learner": learner,
    }
    few = {f"{stage}__steps": 2 for stage in STAGES_OF["best"]}
    default = expansion == next(f.default for f in dataclasses.fields(configs.EnergyConfig) if f.name == "expansion")
    if target.startswith("analytic") or default:
        *_, last = pipeline.train(tiny_config(**choices, **few), transitions, device=CPU)
        assert (last.stage, last.step) == ("energy", 2)
        assert all(np.isfinite(value) for value in last.metrics.values())
    else:
        with pytest.raises(ConfigError, match=f"{target} has no expansion"):
            tiny_config(**choices, **few)


def test_noise_on_the_critics_input_has_its_size_and_leaves_what_follows(tiny_config, transitions):
    config = dataclasses.replace(tiny_config().critic, action_noise=0.5, state_noise=0.1, batch_size=500)
    batch = transitions.take(torch.arange(500))
    noised = critic._noised(batch, config, torch.Generator().manual_seed(0))
    assert float((noised.actions_BA - batch.actions_BA).std()) == pytest.approx(0.5, rel=0.1)
    assert float((noised.states_BS - batch.states_BS).std()) == pytest.approx(0.1, rel=0.1)
    for name in ("rewards_B", "terminals_B", "next_states_BS"):
        assert torch.equal(getattr(noised, name), getattr(batch, name))


@pytest.mark.parametrize("method", STAGES_OF)
def test_a_batch_of_one_trains(method, tiny_config, transitions):
    few = {f"{stage}__{key}": value for stage in STAGES_OF[method] for key, value in (("steps", 2), ("batch_size", 1))}
    for last in pipeline.train(tiny_config(method=method, **few), transitions, device=CPU):
        assert all(np.isfinite(value) for value in last.metrics.values())


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_a_critic_of_relu_layers_or_is_refused(target, tiny_config, transitions):
    few = {f"{stage}__steps": 2 for stage in STAGES_OF["best"]}
    choices = {"energy__target": target, "critic__activation": "relu", "critic__layer_norm": False}
    if target == "analytic_second_order":
        with pytest.raises(ConfigError, match=r"needs critic\.activation silu"):
            tiny_config(**choices, **few)
        return
    *_, last = pipeline.train(tiny_config(**choices, **few), transitions, device=CPU)
    assert all(np.isfinite(value) for value in last.metrics.values())


def test_every_setting_of_sampling_changes_the_actions(tiny_config, transitions):
    config = tiny_config(sampling__temperature=0.5)
    *_, last = pipeline.train(config, transitions, device=CPU)
    policy = Policy.from_state(config, last.states, transitions)
    states = torch.randn(64, transitions.state_dim, generator=torch.Generator().manual_seed(0))

    def act(**changes):
        changed = policy.with_sampling(dataclasses.replace(config.sampling, **changes))
        return changed.sampler.sample(states, torch.Generator().manual_seed(1))

    other = {"beta": 3.0, "guidance_scale": 0.5, "num_steps": 4, "temperature": 1.0, "num_candidates": 2, "nats": 1e-4}
    assert set(other) == {field.name for field in dataclasses.fields(config.sampling)}, "a new setting wants a value"
    for name, value in other.items():
        assert not torch.equal(act(**{name: value}), act()), name


@pytest.mark.parametrize("behavior__variance", ["time", "learned"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_policy_spends_the_nats_that_it_is_given_of_every_target(
    target, behavior__variance, tiny_config, transitions, tmp_path
):
    config = tiny_config(energy__target=target, behavior__variance=behavior__variance)
    *_, last = pipeline.train(config, transitions, device=CPU)
    policy = Policy.from_state(config, last.states, transitions)
    assert policy.sampler.cost()["energy/guidance_scale"] == config.sampling.guidance_scale
    strong = dataclasses.replace(config.sampling, guidance_scale=1000.0)
    bounded = policy.with_sampling(dataclasses.replace(strong, nats=0.3))
    assert bounded.sampler.cost()["energy/kl"] == pytest.approx(0.3, rel=0.01)
    loose = policy.with_sampling(dataclasses.replace(config.sampling, nats=1e6)).sampler
    assert loose.cost() == policy.sampler.cost()
    bounded.save(tmp_path / "policy")  # as trained: sampling is chosen anew
    loaded = Policy.load(tmp_path / "policy").with_sampling(bounded.sampling)
    observations = torch.randn(33, transitions.state_dim, generator=torch.Generator().manual_seed(0))
    actions = [each.act(observations, torch.Generator().manual_seed(1)) for each in (bounded, loaded)]
    assert (actions[0] == actions[1]).all()
    assert 0 < loaded.sampler.spent() <= guidance.CAP * 0.3 * 1.001
    loaded.sampler.data = None  # as in files from before states of the data were kept
    with pytest.raises(ConfigError, match=r"holds no states of its data, .*; train the run again"):
        loaded.act(observations, torch.Generator())


@pytest.mark.parametrize("method", STAGES_OF)
def test_every_methods_policy_acts_the_same_after_save_and_load(method, tiny_config, transitions, tmp_path):
    config = tiny_config(method=method)
    *_, last = pipeline.train(config, transitions, device=CPU)
    policy = Policy.from_state(config, last.states, transitions)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert (loaded.sampler.__class__, loaded.config) == (policy.sampler.__class__, config)
    assert (loaded.sampling is not None) == ("behavior" in STAGES_OF[method])
    observations = torch.randn(33, transitions.state_dim, generator=torch.Generator().manual_seed(0))
    first, second = (each.act(observations, torch.Generator().manual_seed(1)) for each in (policy, loaded))
    assert first.shape == (33, transitions.action_dim)
    assert abs(first).max() <= 1
    assert (first == second).all()


@pytest.mark.parametrize("target", [name for name in TARGETS if configs.ENERGY_TARGETS[name].takes_beta])
def test_a_beta_that_was_not_trained_is_refused(target, tiny_config, transitions):
    with pytest.raises(ConfigError, match="beta 11 is outside what target"):
        tiny_config(energy__target=target, sampling__beta=11)
    config = tiny_config(energy__target=target)
    *_, last = pipeline.train(config, transitions, device=CPU)
    policy = Policy.from_state(config, last.states, transitions)
    with pytest.raises(ConfigError, match=r"beta 0\.01 is outside"):
        policy.with_sampling(dataclasses.replace(config.sampling, beta=0.01))


def test_a_setting_that_the_target_lacks_is_refused_but_a_presets_gives_way(tiny_config):
    base = tiny_config(method="analytic", energy__expansion="posterior_mean")
    changed = configs.with_overrides(base, {"energy.target": "mse"})
    assert changed.energy.expansion == "data_action"
    with pytest.raises(ConfigError, match="mse has no expansion"):
        configs.with_overrides(base, {"energy.target": "mse", "energy.expansion": "posterior_mean"})
    with pytest.raises(ConfigError, match="analytic has no num_samples"):
        configs.with_overrides(base, {"energy.num_samples": 5})


def test_every_row_of_the_settings_table_is_heeded():
    rows = list(csv.DictReader(files("aepo").joinpath("settings.csv").read_text().splitlines()))
    suites = {task.suite: task for task in tasks.table().values()} | {"user": tasks.for_dataset("a/b-v0")}
    assert len({(row["suite"], row["method"], row["setting"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["suite"] in {"*", *suites}
        assert row["method"] in METHODS
        for suite, task in suites.items():
            own = any((r["suite"], r["method"], r["setting"]) == (suite, row["method"], row["setting"]) for r in rows)
            if row["suite"] == suite or (row["suite"] == "*" and not own):
                stage, _, field = row["setting"].partition(".")
                value = getattr(getattr(preset(row["method"], task, 0), stage), field)
                truth = {"true": True, "false": False}
                assert value == (truth[row["value"]] if isinstance(value, bool) else type(value)(row["value"]))


@pytest.mark.parametrize("method", STAGES_OF)
def test_an_unknown_key_of_a_stored_config_is_refused(method, tiny_config):
    values = dataclasses.asdict(tiny_config(method=method))
    assert methods.from_dict(values) == tiny_config(method=method)
    for place in (values, *(values[stage] for stage in STAGES_OF[method])):
        place["unheard_of"] = 1
        with pytest.raises(ConfigError, match="unheard_of"):
            methods.from_dict(values)
        del place["unheard_of"]
    with pytest.raises(ConfigError, match="method must be one of"):
        methods.from_dict(values | {"method": "sac"})
    other = "td3bc" if method != "td3bc" else "iql"
    with pytest.raises(ConfigError):
        methods.from_dict(values | {"method": other})


@pytest.mark.parametrize("name", ["best-", "-quick", "fast", "iql-fast", "sac-quick", "", "iql-quick-quick"])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ConfigError, match="unknown preset"):
        preset(name, tasks.for_dataset("a/b-v0"), 0)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_place(tiny_config):
    data = random_transitions()
    rows = data.rows_ND.clone()
    rows[:, 5] = float("inf")  # rewards
    with pytest.raises(TrainingError, match=r"critic/loss is (inf|nan) at step 1 of 60; lower critic.learning_rate"):
        finish(tiny_config(), dataclasses.replace(data, rows_ND=rows))


def test_training_leaves_the_data_alone(tiny_config, transitions):
    before = copy.deepcopy(transitions.rows_ND)
    finish(tiny_config(), transitions)
    assert torch.equal(before, transitions.rows_ND)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"critic__expectile": 1.0}, r"expectile must be in \(0, 1\), got 1.0"),
        ({"critic__expectile": float("nan")}, "expectile"),
        ({"behavior__steps": 0}, "steps"),
        ({"sampling__beta": 0}, "beta"),
        ({"sampling__guidance_scale": 0}, "evaluated at 0"),
        ({"energy__expansion": "nowhere"}, "expansion"),
        ({"energy__target": "guess"}, "target"),
        ({"energy__target": "contrastive", "energy__beta_min": 20}, "beta_min must be below beta_max"),
        ({"behavior__variance": "guess"}, "variance"),
        ({"critic__expectil": 0.5}, "did you mean critic.expectile"),
        ({"behavior__steps": "many"}, "behavior.steps"),
    ],
)
def test_bad_settings_are_refused_by_name(override, message, tiny_config):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**override)
