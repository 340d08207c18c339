"""Where a product is computed, how that is chosen, and that no operand takes a slow path, of any task's shape."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch

from aepo import cli, kernels, method_table, pipeline, tasks
from aepo.bench import measure
from aepo.config import ENERGY_TARGETS, with_overrides
from aepo.errors import CheckpointError, ConfigError, Interrupted
from aepo.kernels import Measured, Processor
from aepo.policy import Policy
from aepo.presets import preset
from aepo.runs import run
from aepo.runs.backend import own_table
from aepo.runs.stage_store import stage_keys
from tests.examples import random_transitions, write_pendulum

METHODS = method_table.presets()

CPU = torch.device("cpu")
ZEN5 = Processor(vendor="AuthenticAMD", family="26", model="2", name="AMD EPYC")
BACKENDS = [backend for backend in get_args(kernels.Backend) if backend != "onednn" or kernels.has_onednn()]
DIMS = sorted({(row.state_dim, row.action_dim) for row in tasks.rows() if row.state_dim} | {(3, 1), (81, 9)})
"""Of every task, and of the smallest and largest data that people have brought."""


def row(**changes):
    values = {"vendor": "AuthenticAMD", "family": "26", "model": "", "torch": kernels.torch_version(), "gain": 2.0}
    return Measured(**{**values, "source": "here, today", **changes})


@pytest.fixture
def on(monkeypatch):
    """A function that makes this machine's processor another one."""

    def be(processor):
        monkeypatch.setattr(kernels, "processor", lambda: processor)

    return be


def test_the_choice_is_a_function_of_processor_and_torch(on, tmp_path, monkeypatch):
    own = tmp_path / "kernels.csv"
    best = "onednn" if kernels.has_onednn() else "torch"
    for processor, torch_version, wanted in (
        (ZEN5, "2.13", best),
        (dataclasses.replace(ZEN5, model="17"), "2.13", best),  # every model of the family
        (ZEN5, "3.0", "torch"),
        (dataclasses.replace(ZEN5, family="27"), "2.13", "torch"),  # not measured: the default
        (Processor(vendor="GenuineIntel", family="6", model="106", name="Xeon"), "2.13", "torch"),  # measured: slower
        (Processor(vendor="", family="", model="", name=""), "2.13", "torch"),
    ):
        on(processor)
        monkeypatch.setattr(kernels, "torch_version", lambda torch_version=torch_version: torch_version)
        assert kernels.choose(own) == wanted, processor


def test_what_was_measured_here_counts_before_our_table(on, tmp_path):
    on(ZEN5)
    own = tmp_path / "folder" / "kernels.csv"
    kernels.keep(own, row(gain=1.0, model="2"))
    assert kernels.choose(own) == "torch"
    kernels.keep(own, row(gain=1.149, model="3"))
    kernels.keep(own, row(gain=1.16, model="2"))  # in place of the first
    assert [each.gain for each in kernels.read_own(own)] == [1.16, 1.149]
    assert kernels.choose(own) == ("onednn" if kernels.has_onednn() else "torch")
    on(dataclasses.replace(ZEN5, model="3"))
    assert kernels.choose(own) == "torch"  # less than 15 % is not worth other bits


HEADER = "vendor,family,model,torch,gain,source\n"


@pytest.mark.parametrize(
    "text",
    [
        b"vendor,gain\nx,1",
        HEADER.encode() + b"x,1,2,2.13,fast,y",
        HEADER.encode() + b"x,1,2,2.13,nan,y",
        b"hello\n",
        b"AuthenticAMD,26,,2.13,1.7,a row without its header\n",
        HEADER.encode() + b"\xe9,1,2,2.13,1,y",
    ],
)
def test_a_table_that_is_none_is_refused_by_its_name(text, tmp_path):
    own = tmp_path / "kernels.csv"
    own.write_bytes(text)
    with pytest.raises(ConfigError, match=r"kernels.csv is .*delete it, `aepo doctor --measure` writes it"):
        kernels.choose(own)


def test_an_empty_table_has_no_rows(tmp_path, on):
    on(Processor(vendor="x", family="1", model="2", name=""))
    (tmp_path / "kernels.csv").touch()
    assert kernels.choose(tmp_path / "kernels.csv") == "torch"


def test_a_processor_that_tells_nothing_has_no_row():
    nameless = Processor(vendor="", family="", model="", name="")
    assert not row(vendor="", family="").is_of(nameless)


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ConfigError, match="cannot multiply by 'mkl'; wanted one of torch, onednn"),
        kernels.using("mkl"),
    ):
        pass
    before = kernels.backend()
    with pytest.raises(ValueError, match="no"), kernels.using("torch"):
        raise ValueError("no")
    assert kernels.backend() == before


@pytest.mark.parametrize("num_rows", [1, 16, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_of_any_layout_is_that_of_double_precision(backend, num_rows, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_PRODUCTS", 0)
    wide = torch.randn(num_rows, 50)
    layouts = {
        "contiguous": wide[:, :20].contiguous(),
        "columns": wide[:, 5:25],
        "transposed": torch.randn(20, num_rows).t(),
        "columns of a transposed": torch.randn(30, num_rows).t()[:, 3:23],
        "every second row": torch.randn(2 * num_rows, 20)[::2],
        "one row": torch.randn(20).expand(num_rows, 20),
        "backwards": torch.randn(num_rows, 40)[:, ::2],
    }
    weight_OI, bias_O = torch.randn(9, 30)[:, :20], torch.randn(9)
    for name, x_BI in layouts.items():
        with kernels.using(backend), torch.no_grad():
            found = [kernels.linear(x_BI, weight_OI.contiguous(), bias_O), kernels.product(x_BI, weight_OI.t())]
        product = x_BI.double() @ weight_OI.double().t()
        for one, exact in zip(found, [product + bias_O, product], strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-4, msg=f"{name} {one - exact}")
        assert kernels.dense(x_BI).is_contiguous() or kernels.dense(x_BI).t().is_contiguous(), name


def steps_of(dims, monkeypatch):
    """Every stage's step of every method and target, at these dimensions."""
    monkeypatch.setattr(kernels, "MIN_PRODUCTS", 0)
    data = random_transitions(300, *dims)
    for method in METHODS:
        base = preset(f"{method}-smoke", tasks.for_dataset("bench"), 0)
        configs = {method: base}
        if method == "best":
            configs = {target: with_overrides(base, {"energy.target": target}) for target in ENERGY_TARGETS}
        for name, config in configs.items():
            sizes = {f"{stage}.{key}": 32 for stage in config.stages for key in ("batch_size", "hidden_size")}
            few = dict.fromkeys(("critic.num_support_states", "energy.num_support_states"), 50)
            own = sizes | {key: value for key, value in few.items() if method == "qgpo"}
            state, steps = pipeline.prepare(with_overrides(config, own), data, CPU)
            for stage, step in steps.items():
                step()  # what comes before the first step
                yield f"{name} {stage}", step
            if name == "log_expectation":
                policy = Policy.from_state(with_overrides(config, own), state, data)
                states_BS = torch.randn(50, dims[0])
                yield "sampling", lambda policy=policy, states_BS=states_BS: policy.act(states_BS, torch.Generator())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"{dims[0]}x{dims[1]}")
def test_no_operand_of_a_product_has_strides_without_a_fast_path(dims, backend, monkeypatch):
    num_products = 0
    for name, step in steps_of(dims, monkeypatch):
        if name.startswith(("weighted_denoising energy", "analytic_second_order energy")):
            continue  # by autograd, whose layers are torch's own
        with kernels.using(backend):
            for operator, operands in measure.products_of(step):
                num_products += 1
                for operand in operands:
                    if isinstance(operand, torch.Tensor) and operand.ndim == 2:
                        dense = operand.is_contiguous() or operand.t().is_contiguous()
                        assert dense, (name, operator, operand.shape, operand.stride())
    assert num_products > 100


SCRIPT = """
import pytest, torch
from aepo import kernels
from tests.aepo.test_kernels import steps_of
torch.set_num_threads(1)
with pytest.MonkeyPatch.context() as patch, kernels.using("onednn"):
    for dims in ((11, 3), (29, 8), (81, 9)):
        for name, step in steps_of(dims, patch):
            print(f"step {dims} {name}", flush=True)
            step()
"""


@pytest.mark.skipif(not kernels.has_onednn(), reason="this torch has no oneDNN")
def test_no_reference_implementation_of_onednn_runs():
    """It says itself which of its implementations compute: `ref` is what it falls back to."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("step", "onednn_verbose,v1,primitive,exec"))]
    assert sum(line.startswith("step") for line in lines) > 60
    executed = [line.split(",") for line in lines if not line.startswith("step")]
    assert len(executed) > 500
    slow = [",".join(words) for words in executed if words[6].startswith("ref")]
    assert not slow, slow[:3]


@pytest.fixture
def dataset(on):
    on(ZEN5)
    return write_pendulum()


def train(config, folder, stop_after=None):
    """Execute a run, or stop it after so many steps of the critic."""
    store = run.FolderStore(folder)

    def stop(progress):
        return stop_after is not None and progress.stage == "critic" and progress.step >= stop_after

    return run.execute(config, folder, store, device=CPU, checkpoint_s=0.0, on_progress=stop)


@pytest.mark.skipif(not kernels.has_onednn(), reason="this torch has no oneDNN")
def test_a_run_keeps_its_backend_after_the_table_was_changed(dataset, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_PRODUCTS", 0)
    monkeypatch.setattr("aepo.pipeline.HEARTBEAT", 7)
    config = tiny_config(dataset, evaluation__num_episodes=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole)
    with pytest.raises(Interrupted):
        train(config, broken, stop_after=20)
    kept = json.loads((broken / "kernels.json").read_text())
    assert (kept["backend"], kept["arithmetic"], kept["family"]) == ("onednn", kernels.ARITHMETIC, "26")
    kernels.keep(own_table(), row(gain=0.5, model="2"))
    assert kernels.choose(own_table()) == "torch"
    calls = []
    onednn = kernels._onednn
    monkeypatch.setattr(kernels, "_onednn", lambda *args: calls.append(1) or onednn(*args))
    before = kernels.backend()
    train(config, broken)
    assert len(calls) > 1000
    assert kernels.backend() == before
    assert (whole / "policy.safetensors").read_bytes() == (broken / "policy.safetensors").read_bytes()
    calls.clear()
    train(config, tmp_path / "new")  # begins with what the table now says
    assert json.loads((tmp_path / "new" / "kernels.json").read_text())["backend"] == "torch"
    assert not calls


def test_a_stored_stage_is_of_its_arithmetic(tiny_config, monkeypatch):
    config = tiny_config()
    keys = []
    for backend in BACKENDS:
        with kernels.using(backend):
            keys.append(stage_keys(config, "digest"))
    monkeypatch.setattr(kernels, "ARITHMETIC", kernels.ARITHMETIC + 1)
    keys.append(stage_keys(config, "digest"))
    for place in keys[0]:
        assert len({each[place] for each in keys}) == len(keys)


def test_a_run_of_another_arithmetic_is_refused_by_name_and_left_as_it_is(dataset, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(dataset, evaluation__num_episodes=1)
    for age in ("before it was written down", "older", "newer"):
        folder = tmp_path / age.replace(" ", "-")
        with pytest.raises(Interrupted):
            train(config, folder, stop_after=20)
        note = folder / "kernels.json"
        facts = json.loads(note.read_text())
        if age == "before it was written down":
            note.unlink()
        else:
            note.write_text(json.dumps(facts | {"arithmetic": kernels.ARITHMETIC + (1 if age == "newer" else -1)}))
        kept = {name: (folder / name).read_bytes() for name in ("state.ckpt", "metrics.jsonl")}
        wanted = rf"{config.name} was stopped under arithmetic \d.*delete .* to begin"
        with pytest.raises(CheckpointError, match=wanted):
            train(config, folder)
        with pytest.raises(CheckpointError, match=wanted):  # a worker beside it does not wait for it in vain
            run.follow_leader(config, folder, run.FolderStore(folder), device=CPU)
        assert kept == {name: (folder / name).read_bytes() for name in kept}
        assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    note.write_text(json.dumps(facts))  # as it was
    assert train(config, folder).status == "finished"


def test_a_run_stopped_before_its_first_row_of_metrics_is_refused_too(dataset, tiny_config, tmp_path):
    config, folder = tiny_config(dataset, behavior__steps=20_000, evaluation__num_episodes=1), tmp_path / "run"
    with pytest.raises(Interrupted):
        run.execute(config, folder, run.FolderStore(folder), device=CPU, on_progress=lambda progress: True)
    assert (folder / "metrics.jsonl").read_text() == ""
    (folder / "kernels.json").unlink()
    with pytest.raises(CheckpointError, match="was stopped under arithmetic 1"):
        train(config, folder)


def test_a_note_without_a_step_binds_nobody(dataset, tiny_config, tmp_path):
    config, folder = tiny_config(dataset, evaluation__num_episodes=1), tmp_path / "run"
    folder.mkdir()
    (folder / "kernels.json").write_text(json.dumps({"format": 1, "arithmetic": 1, "backend": "torch"}))
    assert train(config, folder).status == "finished"
    assert json.loads((folder / "kernels.json").read_text())["arithmetic"] == kernels.ARITHMETIC


@pytest.mark.parametrize("note", [{"format": 1, "backend": "torch"}, {"format": 1, "arithmetic": 2, "backend": "mkl"}])
def test_a_note_that_is_none_says_what_to_do(note, dataset, tiny_config, tmp_path):
    config, folder = tiny_config(dataset, evaluation__num_episodes=1), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, folder, stop_after=20)
    (folder / "kernels.json").write_text(json.dumps(note))
    with pytest.raises(CheckpointError, match=r"delete .* to begin again"):
        train(config, folder)


def test_an_ended_run_of_another_arithmetic_is_still_a_result(dataset, tiny_config, tmp_path):
    config = tiny_config(dataset, evaluation__num_episodes=1)
    ended = train(config, tmp_path / "run")
    (tmp_path / "run" / "kernels.json").unlink()
    assert train(config, tmp_path / "run") == ended


@pytest.mark.skipif(not kernels.has_onednn(), reason="this torch has no oneDNN")
def test_doctor_measures_a_processor_and_keeps_the_answer(capsys, monkeypatch):
    monkeypatch.setattr(
        measure, "backend_gains", lambda seconds: iter([("critic", 1.3), ("actor", 1.2), ("energy", 0.9)])
    )
    assert cli.run(["doctor", "--measure", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["gain"], facts["backend"]) == (1.2, "onednn")
    (kept,) = kernels.read_own(own_table())
    assert kept.is_of(kernels.processor())
    assert kernels.backend() == "torch"  # of this process, until something trains
    run.set_up_torch(1)
    assert kernels.backend() == "onednn"
    kernels.use("torch")
    assert cli.run(["doctor", "--measure", "--seconds", "0"]) == 2


@pytest.mark.skipif(not kernels.has_onednn(), reason="this torch has no oneDNN")
def test_backends_are_compared_over_stages_and_shapes():
    found = [name for name, _ in itertools.islice(measure.backend_gains(0.01), 3)]
    assert found == ["behavior step, 4 x 2", "critic step, expectile, 4 x 2", "energy step, analytic, 4 x 2"]
