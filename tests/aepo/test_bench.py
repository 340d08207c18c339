"""`aepo bench`: the baseline does our work, and every part gives its rows. No time is asserted."""

import json

import pytest
import torch

from aepo import cli, methods, pipeline, tasks
from aepo.bench import measure, naive
from aepo.commands.bench import Bench
from aepo.stages import actor, actor_critic, behavior, critic, energy

SHAPE = measure.Shape(state_dim=11, action_dim=3, task=tasks.for_dataset("bench/11x3-v0"), num_transitions=2500)


def test_random_data_are_whole_episodes():
    data = SHAPE.data()
    assert data.episode_ends_E.tolist() == [1000, 2000, 2500]
    assert (data.state_dim, data.action_dim, len(data)) == (11, 3, 2500)


def test_the_benchmark_has_twelve_shapes_and_every_row_dimensions():
    rows = [row for row in tasks.rows() if row.source in ("d4rl", "minari")]
    shapes = measure.shapes_of(rows, most=200_000)
    dims = [(shape.state_dim, shape.action_dim) for shape in shapes]
    assert dims == sorted({(row.state_dim, row.action_dim) for row in rows})
    assert len(dims) == 12
    sizes = {dims: shape.num_transitions for dims, shape in zip(dims, shapes, strict=True)}
    assert sizes[11, 3] == 200_000
    assert sizes[45, 24] == 200_000  # the largest data of these dimensions, not the first
    assert measure.shapes_of([tasks.find("kitchen-complete-v0")], most=200_000)[0].num_transitions == 3680


def benched_steps(dataset="bench/11x3-v0"):
    configs = measure.configs_of("smoke", tasks.for_dataset(dataset))
    return list(measure.benched_steps(configs, SHAPE.data()))


def test_every_stage_of_every_method_is_measured_once():
    found = benched_steps()
    configs = measure.configs_of("smoke", tasks.for_dataset("bench"))
    wanted = {(method, stage) for method, config in configs.items() for stage in config.stages}
    assert sorted((method, work.stage) for work in found for method in work.methods) == sorted(wanted)
    kinds = {(work.stage, work.kind) for work in found}
    assert {("critic", "expectile"), ("critic", "softmax_in_support"), ("energy", "contrastive")} < kinds


STAGES = [
    ("best", "behavior"),
    ("best", "critic"),
    ("best", "energy"),
    ("analytic", "energy"),
    ("qgpo", "critic"),
    ("qgpo", "energy"),
    ("iql", "actor"),
    ("td3bc", "actor_critic"),
]


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_the_baselines_first_loss_is_ours(method, stage):
    """From the same weights, the same draws give both the same loss."""
    config, data = measure.configs_of("smoke", SHAPE.task)[method], SHAPE.data()
    states, _ = pipeline.prepare(config, data, measure.CPU)
    own = config.stages[stage]
    found = next(each for each in methods.find(config.method).stages() if each.name == stage)

    def ours():
        generator = torch.Generator()
        if stage == "behavior":
            return behavior.train_step(behavior.start(own, data, generator), own, data)
        if stage == "critic":
            fresh = critic.start(own, data, generator)
            critic.measure(fresh, own, data, states.get("behavior"))
            return critic.train_step(fresh, own, data)
        if stage == "energy":
            fresh = energy.start(own, data, generator)
            energy.measure(fresh, own, data, states["behavior"])
            source = energy.q_source(states["critic"], fresh, own, data)
            return energy.train_step(fresh, own, data, states["behavior"], source)
        if stage == "actor":
            fresh = actor.start(own, data, generator)
            of_rows = critic.advantage_of_rows(states["critic"].target.net, states["critic"], data, num_draws=0)
            return actor.train_step(fresh, own, data, of_rows)
        return actor_critic.train_step(actor_critic.start(own, data, generator), own, data)

    torch.manual_seed(0)
    baseline = measure.baseline_of(found, own, states, data)()
    torch.manual_seed(0)
    assert baseline == pytest.approx(float(ours()()["loss"]), rel=1e-4)


def argv_of(*words, seconds="0.02"):
    return ["bench", "--preset", "smoke", "--transitions", "2000", "--seconds", seconds, "--json", *words]


@pytest.mark.slow
def test_every_part_gives_its_rows(capsys):
    assert cli.run(argv_of("--task", "maze2d-umaze-v1", "--shape", "81x9", "--processes", "1", "2")) == 0
    found = json.loads(capsys.readouterr().out)
    names = [(row["work"], row["shape"]) for row in found["rows"]]
    assert len(set(names)) == len(names)
    assert {shape for _, shape in names} == {"4 x 2", "81 x 9", "8 x 2", ""}  # an environment's entries are all joined
    of_large = [work for work, shape in names if shape == "81 x 9"]
    for name in (
        "behavior step",
        "critic step, expectile",
        "energy step, log_expectation",
        "energy step, analytic",
        "energy step, contrastive",
        "actor step",
        "actor_critic step",
        "guided actions of 50 states",
    ):
        assert of_large.count(name) == 1, (name, of_large)
    assert ("evaluation, a step in PointMaze_UMaze-v3", "8 x 2") in names
    assert sum("loading" in work for work, _ in names) == 1
    compared = [row for row in found["rows"] if row["ratio"] is not None]  # a method's own stages have no baseline
    assert all(row["cpu_ms"] > 0 for row in found["rows"])
    assert all(row["ratio"] > 0 for row in compared)
    assert all(
        row["of_floor"] > 1 for row in found["rows"] if " step" in row["work"] and "evaluation" not in row["work"]
    )
    assert found["slowest"]["ratio"] == min(row["ratio"] for row in compared)
    critic_row = next(row for row in found["summary"] if row["work"] == "critic step, expectile")
    assert critic_row["shapes"] == 2
    assert [row["processes"] for row in found["processes"]] == [1, 2]
    assert all(row["critic_steps_per_s"] > 0 for row in found["processes"])
    assert {"processor", "torch", "commit", "kernels", "backend"} <= set(found["machine"])


def test_shapes_come_from_tasks_suites_and_flags():
    def dims(**flags):
        return [(shape.state_dim, shape.action_dim) for shape in Bench(**flags)._shapes()]

    assert dims(task=("hopper-medium-v2", "hopper-medium-expert-v2")) == [(11, 3)]
    assert dims(suite=("adroit",)) == [(39, 28), (39, 30), (45, 24), (46, 26)]
    assert dims(task=("kitchen-mixed-v0",), source="minari") == [(59, 9)]
    assert len(dims(all=True)) == 12
    assert dims(shape=("81x9", "3x1")) == [(81, 9), (3, 1)]
    assert len(dims()) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--shape", "81"], "as in 81x9; got '81'"),
        (["--shape", "0x3"], "as in 81x9; got '0x3'"),
        (["--task", "hopper"], "did you mean hopper-"),
        (["--suite", "atari"], "no suite 'atari'"),
        (["--set", "critic.layernorm=false"], "critic.layer_norm"),
        (["--set", "critic.activation=gelu"], "'silu' or 'relu'"),
        (["--set", "evaluation.num_episodes=3"], "measures nothing of"),  # and would change nothing
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(words, named, capsys):
    assert cli.run(argv_of("--only", "steps", *words)) == 2
    assert named in capsys.readouterr().err.replace("\n", " ")


def test_settings_reach_the_methods_that_have_them(capsys):
    words = {"critic.activation": "relu", "actor.activation": "relu", "behavior.batch_size": "7"}
    configs = measure.configs_of("smoke", SHAPE.task, "bfloat16", words)
    best, iql = configs["best"], configs["iql"]
    assert (best.critic.activation, iql.critic.activation, iql.actor.activation) == ("relu",) * 3
    assert (best.behavior.batch_size, iql.critic.layer_norm, iql.actor.precision) == (7, True, "bfloat16")
    assert cli.run(argv_of("--only", "sampling", "--set", "critic.layer_norm=false", "--shape", "3x1")) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["set"] == ["critic.layer_norm=false"]


@pytest.mark.parametrize(("activation", "layer_norm"), [("relu", False), ("silu", True)])
def test_the_baselines_networks_are_ours(activation, layer_norm):
    """`plain` copies say what ours say, without any of our code."""
    settings = {"critic.activation": activation, "critic.layer_norm": str(layer_norm)}
    config, data = measure.configs_of("smoke", SHAPE.task, overrides=settings)["best"].critic, SHAPE.data()
    state, batch = critic.start(config, data, torch.Generator()), data.take(torch.arange(50))
    twin = naive.plain(state.q)
    assert {type(module).__module__.split(".")[0] for module in twin.q_1.modules()} == {"torch"}
    found, wanted = (net(batch.states_BS, batch.actions_BA) for net in (state.q, twin))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_floor_has_the_products_of_a_step_and_their_layout(tiny_config, transitions):
    """A step's operands are copied with their strides: a transposed factor stays one."""
    _, steps = pipeline.prepare(tiny_config(method="iql"), transitions, measure.CPU)
    steps["actor"]()  # asks for the advantages of all data
    products = measure.products_of(steps["actor"])
    assert len(products) == 3 + 5  # three layers; of each the weight's gradient, and of two the input's
    copies = [measure._copy(operand) for _, operands in products for operand in operands[-2:]]
    originals = [operand for _, operands in products for operand in operands[-2:]]
    assert [copy.stride() for copy in copies if min(copy.shape) > 1] == [
        operand.stride() for operand in originals if min(operand.shape) > 1
    ]
    measure.floor_of(steps["actor"], seconds=0.01)()


def test_numbers_that_measure_nothing_are_refused(capsys):
    assert cli.run(["bench", "--seconds", "0"]) == 2
    assert "--seconds above 0" in capsys.readouterr().err
