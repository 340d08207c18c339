"""Every command: help with an example, a tiny real run, each documented exit status, JSON alone on standard output."""

import json
import re

import pytest

from aepo import cli


def run(capsys, *argv):
    status = cli.run(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    "command",
    [
        *cli.COMMANDS,
        *("data collect", "data list", "data import", "store list", "store prune"),
        *("cluster up", "cluster status", "cluster doctor", "jobs list", "jobs status"),
    ],
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.run([*command.split(), "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    if command not in ("data", "store", "cluster", "jobs"):
        assert f"aepo {command}" in out.partition("example")[2]
        assert "--json" in out


def test_no_arguments_list_the_commands(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert all(re.search(rf"^  {name} ", out, re.M) for name in cli.COMMANDS)
    assert "exit status" in out


@pytest.mark.parametrize("known", ["", "corp.example, 10.0.0.1", "*"])
def test_a_proxy_is_never_asked_for_this_machine(known, capsys, monkeypatch):
    from requests.utils import should_bypass_proxies

    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", known)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    run(capsys, "--version")
    for host in ("127.0.0.1:5000", "localhost:8265"):
        assert should_bypass_proxies(f"http://{host}/api", None)
    assert should_bypass_proxies("http://corp.example", None) is (known != "")
    assert should_bypass_proxies("http://elsewhere.example", None) is (known == "*")


TINY = [
    "--set",
    *(f"{stage}.{key}={value}" for stage in ("behavior", "critic", "energy") for key, value in
      (("steps", 20), ("batch_size", 8), ("hidden_size", 8))),
]  # fmt: skip


def test_train_prints_one_json_document_and_evaluate_the_grid(make_dataset, tmp_path, capsys):
    dataset_id = make_dataset()
    argv = [
        "train",
        "--dataset",
        dataset_id,
        "--preset",
        "smoke",
        "--json",
        "--out",
        str(tmp_path / "runs"),
        *TINY,
    ]
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    result = json.loads(out)
    keys = [
        "task",
        "dataset",
        "seed",
        "fingerprint",
        "status",
        "score",
        "return_mean",
        "num_episodes",
        "steps",
        "seconds",
        "folder",
    ]
    assert set(keys) <= set(result)
    assert (result["status"], result["steps"], result["dataset"]) == ("finished", 60, dataset_id)
    assert "behavior" in err
    again = run(capsys, *argv)
    assert json.loads(again[1]) == result

    argv = [
        "evaluate",
        result["folder"],
        "--beta",
        "1",
        "3",
        "--guidance-scale",
        "0",
        "2",
        "--num-episodes",
        "2",
    ]
    status, out, _ = run(capsys, *argv, "--json")
    rows = json.loads(out)
    assert status == 0
    assert [(row["beta"], row["guidance_scale"], row["method"]) for row in rows] == [
        (1, 0, "diffusion-bc"), (1, 2, "aepo"), (3, 0, "diffusion-bc"), (3, 2, "aepo"),
    ]  # fmt: skip
    status, out, _ = run(capsys, *argv, "--figure", str(tmp_path / "grid.png"))
    assert status == 0
    assert "guidance_scale" in out
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    clones = ["evaluate", result["folder"], "--guidance-scale", "0", "--temperature", "1", "--num-episodes", "1"]
    for num, method in (("1", "diffusion-bc"), ("4", "best-clone")):
        status, out, _ = run(capsys, *clones, "--num-candidates", num, "--json")
        assert (status, json.loads(out)[0]["method"]) == (0, method)


def test_a_baseline_trains_and_evaluates_from_the_command_line(make_dataset, capsys, tmp_path):
    small = [f"{stage}.steps=20" for stage in ("critic", "actor")]
    argv = ["train", "--dataset", make_dataset(), "--preset", "iql-smoke", "--out", str(tmp_path), "--json"]
    status, out, _ = run(capsys, *argv, "--set", *small)
    folder = json.loads(out)["folder"]
    assert status == 0
    status, out, _ = run(capsys, "evaluate", folder, "--num-episodes", "2", "--json")
    assert (status, [row["method"] for row in json.loads(out)]) == (0, ["iql"])
    status, _, err = run(capsys, "evaluate", folder, "--guidance-scale", "1")
    assert status == 2
    assert "a policy of iql has one way to act" in err


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["swep"], 2, "did you mean 'sweep'"),
        (["train"], 2, "either --task NAME or --dataset ID"),
        (["train", "--task", "maze2d-umase"], 2, "did you mean maze2d-umaze"),
        (["train", "--task", "maze2d-umaze", "--preset", "fast"], 2, "budgets paper, quick, smoke"),
        (
            ["train", "--task", "maze2d-umaze", "--set", "critic.expectil=1"],
            2,
            "did you mean critic.expectile",
        ),
        (["train", "--task", "maze2d-umaze", "--set", "critic.expectile"], 2, "KEY=VALUE"),
        (["train", "--task", "maze2d-umaze", "--threads", "0"], 2, "at least 1"),
        (["train", "--task", "maze2d-umaze", "--eval-processes", "0"], 2, "at least 1, got 1 and 0"),
        (["evaluate", "nowhere", "--eval-processes", "-1"], 2, "at least 1, got 50, 1 and -1"),
        (["train", "--task", "maze2d-umaze", "--device", "abacus"], 6, "no device 'abacus'"),
        (["train", "--task", "maze2d-umaze"], 3, "aepo data collect maze2d-umaze"),
        (["train", "--dataset", "no/such-v0"], 3, "aepo data download no/such-v0"),
        (["train", "--dataset", "../../etc"], 3, "cannot be read"),
        (["evaluate", "nowhere"], 4, "no policy at nowhere"),
        (["sweep"], 2, "at least one task"),
        (["sweep", "--task", "maze2d-umaze", "--seeds", "0", "0"], 2, "planned twice"),
        (["sweep", "--task", "maze2d-umaze"], 3, "aepo data collect maze2d-umaze"),
        (["report", "nowhere"], 3, "nowhere"),
    ],
)
def test_mistakes_get_one_clear_line_and_the_documented_exit_status(
    argv, status, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *argv)
    assert got == status, err
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert out == ""


def test_debug_shows_where_an_error_came_from():
    from aepo.errors import ConfigError

    with pytest.raises(ConfigError):
        cli.run(["train", "--debug"])


def test_a_bug_is_one_line_too_and_exit_status_one(capsys, monkeypatch):
    monkeypatch.setattr("aepo.tasks.find", lambda *_: 1 / 0)
    status, _, err = run(capsys, "train", "--task", "x")
    assert status == 1
    assert "unexpected error: ZeroDivisionError" in err


def test_a_failed_run_prints_its_row_and_exits_five(make_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aepo.stages.fast.expectile_loss", lambda u_B, _: u_B.sum() / 0)
    argv = [
        "train",
        "--dataset",
        make_dataset(),
        "--preset",
        "smoke",
        "--json",
        "--out",
        str(tmp_path),
        *TINY,
    ]
    status, out, err = run(capsys, *argv)
    assert status == 5
    assert json.loads(out)["status"] == "failed"
    assert "critic/loss is" in err
    assert "lower critic.learning_rate" in err


def test_doctor_reports_every_package_environment_and_task(capsys):
    from aepo.tasks import table

    status, out, _ = run(capsys, "doctor", "--json")
    checks = {row["check"]: row for row in json.loads(out)}
    assert status in (0, 6)
    assert checks["torch"]["status"] == "pass"
    assert checks["PointMaze_UMaze-v3"]["status"] == "pass"
    assert {f"task {name}" for name in table()} <= set(checks)
    assert all(row["remedy"] for row in checks.values() if row["status"] == "fail")
