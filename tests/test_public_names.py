"""Names that others type stay: commands, flags, presets, settings, JSON keys, columns. New ones may come beside them.

What is missing here was renamed or dropped; that breaks scripts, sweep files and notebooks of users.
"""

import json
import re
from pathlib import Path

import pytest
import tyro

from aepo import cli, tasks
from aepo import config as configs
from aepo.commands.data import DATA
from aepo.presets import preset
from aepo.results import schema
from tune.spec import read_sweep_file

FLAGS = {
    "train": "task source dataset seed preset set out device threads eval-processes checkpoint-s stage-store json",
    "sweep": "task suite source dataset seeds preset set out dry-run yes status watch stop address runner "
    "workers-per-run cpus gpus max-concurrent checkpoint-s reuse-stages no-reuse-stages tracking-uri retry-failed "
    "no-retry-failed only no-only json variant",
    "search": "task suite source dataset preset set space trials sampler rounds reduction grace seed num-episodes "
    "select-seeds confirm-seeds out dry-run yes status stop address cpus gpus max-concurrent checkpoint-s tracking-uri "
    "json",
    "evaluate": "beta guidance-scale figure temperature num-candidates num-steps num-episodes seed device threads "
    "eval-processes json",
    "report": "out allow-missing paired published tracking-uri json",
    "data verify": "source json",
    "data stats": "source figure json",
    "data collect": "steps seed overwrite json",
}
PRESETS = ("best", "analytic", "qgpo", "iql", "td3bc"), ("smoke", "quick", "paper")
SETTINGS = {
    "best": """
        data.dataset data.source data.env_id data.observation_keys data.reward_rule data.return_rule data.ref_min
        data.ref_max evaluation.num_episodes evaluation.num_curve_points evaluation.num_curve_episodes
        evaluation.horizon evaluation.grid_beta evaluation.grid_guidance_scale evaluation.num_grid_episodes
        behavior.steps behavior.batch_size behavior.hidden_size behavior.num_layers behavior.learning_rate
        behavior.precision behavior.ema_decay behavior.variance
        critic.steps critic.batch_size critic.hidden_size critic.num_layers critic.learning_rate critic.precision
        critic.expectile critic.discount critic.target_rate critic.activation critic.layer_norm critic.backup_steps
        critic.learner critic.num_samples critic.num_support_states critic.backup_beta
        energy.steps energy.batch_size energy.hidden_size energy.num_layers energy.learning_rate energy.precision
        energy.ema_decay energy.target energy.expansion energy.num_samples energy.num_support_states energy.beta_min
        energy.beta_max sampling.beta sampling.guidance_scale sampling.num_steps sampling.temperature
        sampling.num_candidates
    """,
    "iql": """
        actor.steps actor.batch_size actor.hidden_size actor.num_layers actor.learning_rate actor.precision
        actor.inverse_temperature actor.activation
    """,
    "td3bc": """
        actor_critic.steps actor_critic.batch_size actor_critic.hidden_size actor_critic.num_layers
        actor_critic.learning_rate actor_critic.precision actor_critic.discount actor_critic.target_rate
        actor_critic.activation actor_critic.layer_norm actor_critic.q_weight actor_critic.policy_noise
        actor_critic.noise_clip actor_critic.actor_interval
    """,
}
COLUMNS = """
    schema_version run task suite source dataset dataset_digest env_id fingerprint method preset status error seed
    ref_min ref_max score return_mean seconds num_episodes steps evaluations curve grid commit version machine
    started_at mlflow_run_id folder settings variant
"""
TINY = [f"{stage}.{key}" for stage in ("behavior", "critic", "energy") for key in ("steps=20", "hidden_size=8")]


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_of_a_command_stay(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.run([*command.split(), "--help"])
    shown = re.findall(r"(?:^\W+|, )--([a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(FLAGS[command].split()) <= set(shown)


@pytest.mark.parametrize("words", [["verify", "x/y-v0"], ["stats", "x/y-v0"], ["collect", "maze2d-umaze"]])
def test_commands_of_data_take_their_data_set_by_place(words):
    assert tyro.cli(DATA, args=words) is not None


def test_what_a_sweep_is_typed_with_is_what_a_sweep_file_says(tmp_path):
    file = tmp_path / "sweep.toml"
    names = "task suite dataset seeds preset set"
    values = "source = 'd4rl'\nout = 'a'\naddress = 'b'\nrunner = 'inline'\nworkers_per_run = 1\ncpus = 2\ngpus = 1\n"
    values += "max_concurrent = 3\ncheckpoint_s = 5\nreuse_stages = true\ntracking_uri = 'c'\n"
    values += "retry_failed = true\nonly = true\n"
    file.write_text(values + "".join(f"{name} = []\n" for name in names.split()))
    spec, execution = read_sweep_file(file)
    assert (spec.source, execution.runner, execution.cpus, execution.only) == ("d4rl", "inline", 2.0, True)
    file.write_text(file.read_text().replace("_", "-"))
    assert read_sweep_file(file) == (spec, execution)


def test_presets_stay_alone_and_joined():
    methods, budgets = PRESETS
    for name in [*methods, *budgets, *(f"{method}-{budget}" for method in methods for budget in budgets)]:
        assert preset(name, tasks.find("maze2d-umaze"), 0).preset == name


@pytest.mark.parametrize("method", SETTINGS)
def test_the_names_of_settings_stay(method):
    known = configs.settings(preset(method, tasks.find("maze2d-umaze"), 0))
    assert set(SETTINGS[method].split()) <= set(known)


def test_columns_of_runs_stay():
    assert set(COLUMNS.split()) <= set(schema().names)


def test_keys_of_json_and_the_place_of_the_cache_stay(make_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AEPO_CACHE", str(tmp_path / "elsewhere"))
    words = ["--dataset", make_dataset(), "--seed", "0", "--preset", "smoke", "--out", str(tmp_path / "runs"), "--json"]
    assert cli.run(["train", *words, "--set", *TINY]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"folder", "score", "dataset", "evaluations"} <= set(result)
    assert [row["guidance_scale"] for row in result["evaluations"]]
    assert Path(result["folder"]).is_dir()
    assert any((tmp_path / "elsewhere").rglob("*"))
    assert cli.run(["evaluate", result["folder"], "--num-episodes", "1", "--json"]) == 0
    assert {"guidance_scale", "beta", "score", "method"} <= set(json.loads(capsys.readouterr().out)[0])


def test_a_slurm_job_takes_a_sweep_file_and_a_folder():
    """tests/cluster/test_slurm.py runs it with them."""
    script = (Path(__file__).parent.parent / "cluster" / "slurm" / "sweep.sbatch").read_text()
    assert "SWEEP.toml FOLDER" in script
    assert '-m cluster.slurm.job "$notes" "$@"' in script
