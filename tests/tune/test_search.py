"""A search: who goes on, and no more than that, the record as the truth, nothing trained twice, the report."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch

from aepo import cli
from aepo import config as configs
from aepo.errors import CheckpointError, ConfigError
from aepo.results import RoundResult
from aepo.runs import run
from aepo.trials import SEARCH, Confirmation, Outcome, SearchSpec, Selection, count_steps, read_search
from analysis.search_report import write_search_report
from tests.examples import trial, wait_for
from tune.plan import RUN_FOLDERS
from tune.search import found_settings, mean_score, write_preset
from tune.search_record import SearchRecord, trial_configs
from tune.space import read_space

CPU = torch.device("cpu")

SPEC = SearchSpec(
    tasks=(),
    datasets=("tests/pendulum/random-v0",),
    source="",
    preset="smoke",
    overrides={},
    trials=9,
    sampler="random",
    seed=1000,
    rounds=3,
    reduction=3,
    grace=1,
    num_episodes=1,
    select_seeds=(1001,),
    confirm_seeds=(2000,),
)


@pytest.fixture
def space(tmp_path, tiny_config):
    file = tmp_path / "space.toml"
    file.write_text("critic.expectile = [0.5, 0.7, 0.9]\nenergy.learning_rate = {log = [1e-4, 1e-2]}\n")
    return read_space(file, [tiny_config()])


def record(tmp_path, space, trials, spec=SPEC):
    return SearchRecord(tmp_path / SEARCH, spec, space, trials)


# -- decisions ---------------------------------------------------------------------------------------------


def work_through(current, space, base, scores, *, at_once, generator):
    """Do what the searcher asks, so many pieces at once that end in any order; yield after each its trial and record.

    A score is `scores(number, round)`.
    """
    from tune.asha import ASHASearcher

    searcher = ASHASearcher(current, [base], {}, on_draw=lambda _: None, on_end=lambda _: None)
    under_way = {}
    for piece in itertools.count():
        while len(under_way) < at_once:
            work = searcher.suggest(f"piece {piece}-{len(under_way)}")
            if work in (None, "FINISHED"):
                break
            under_way[f"piece {piece}-{len(under_way)}"] = work
        assert searcher.is_over == (not under_way)
        if not under_way:
            assert work == "FINISHED"
            return
        name = generator.choice(sorted(under_way))
        work = under_way.pop(name)
        for round_number in range(work["ended"] + 1, work["until"] + 1):
            score = scores(work["number"], round_number)
            results = [RoundResult(round=round_number, score=score, return_mean=0.0, steps_reused=0)]
            searcher.on_trial_result(name, {"round": round_number, "results": results})
        searcher.on_trial_complete(name)
        stored = read_search(current.path.parent).trials
        assert stored == current.trials
        yield work, stored


def at_rung(trials, number):
    return [t for t in trials if len(t.rounds) >= number]


def gone_on(trials, number):
    return [t for t in at_rung(trials, number) if len(t.rounds) > number or t.state == "running"]


@pytest.mark.parametrize("order", ["random", "each better than the last", "each worse than the last"])
@pytest.mark.parametrize(("at_once", "reduction"), [(1, 3), (2, 4), (7, 2)])
def test_one_in_so_many_goes_on_in_whatever_order_they_come(order, at_once, reduction, tmp_path, space, tiny_config):
    generator = np.random.default_rng([at_once, reduction])
    values = generator.normal(size=(24, 3))
    if order != "random":
        values = np.sort(values, axis=0)[:: 1 if "better" in order else -1]
    spec = dataclasses.replace(SPEC, trials=24, reduction=reduction)
    current = record(tmp_path, space, [], spec)
    walk = work_through(
        current, space, tiny_config(), lambda n, r: float(values[n, r - 1]), at_once=at_once, generator=generator
    )
    for _, trials in walk:
        for rung in (1, 2):
            here, gone = at_rung(trials, rung), gone_on(trials, rung)
            assert len(gone) <= len(here) // reduction
    counts = [len(at_rung(current.trials, rung)) for rung in (1, 2, 3)]
    assert counts == [24, 24 // reduction, 24 // reduction // reduction]
    assert {t.state for t in at_rung(current.trials, 3)} == {"finished"}
    best = int(np.argmax(values[:, 0]))
    assert len(current.trials[best].rounds) > 1


def test_with_few_trials_the_best_is_finished_all_the_same(tmp_path, space, tiny_config):
    current = record(tmp_path, space, [], dataclasses.replace(SPEC, trials=4))
    scores = {0: 1.0, 1: 4.0, 2: 3.0, 3: 2.0}
    generator = np.random.default_rng(0)
    list(work_through(current, space, tiny_config(), lambda n, _: scores[n], at_once=2, generator=generator))
    assert [len(t.rounds) for t in current.trials].count(3) == 1
    assert current.best().number == 1


def test_who_was_promoted_goes_on_from_the_record_and_who_waits_waits(tmp_path, space, tiny_config):
    rows = [trial(0, (10.0,), "waiting"), trial(1, (30.0,)), trial(2, (20.0,), "waiting"), trial(3)]
    current = record(tmp_path, space, rows, dataclasses.replace(SPEC, trials=4))
    scores = {0: 0.0, 1: 31.0, 2: 21.0, 3: 19.0}
    generator = np.random.default_rng(0)
    walk = work_through(current, space, tiny_config(), lambda n, _: scores[n], at_once=1, generator=generator)
    assert [(w["number"], w["ended"], w["until"]) for w, _ in walk] == [(1, 1, 2), (3, 0, 1), (1, 2, 3)]
    assert [t.state for t in current.trials] == ["waiting", "finished", "waiting", "waiting"]


def test_a_search_that_was_asked_to_stop_is_not_over(tmp_path, space, tiny_config):
    from tune.asha import ASHASearcher

    current = record(tmp_path, space, [trial(0, (1.0,), "waiting")])
    searcher = ASHASearcher(current, [tiny_config()], {}, on_draw=lambda _: None, on_end=lambda _: None)
    (tmp_path / "stop").touch()
    assert searcher.suggest("piece") == "FINISHED"
    assert not searcher.is_over  # so the trial goes on waiting
    assert current.trials[0].state == "waiting"


def test_a_trial_that_failed_after_a_promotion_took_its_place(tmp_path, space):
    from tune.asha import best_waiting, next_promotion

    rows = [trial(n, (float(n),), "waiting") for n in range(3)]
    current = record(tmp_path, space, rows)
    assert next_promotion(current) is rows[2]
    rows[2].state = "failed"
    assert next_promotion(current) is None
    assert best_waiting(current) is rows[1]  # for nothing has finished yet
    current.trials[0] = trial(0, (1.0, 1.0, 1.0), "finished")
    assert best_waiting(current) is None


@pytest.mark.parametrize(("grace", "rungs"), [(0, [3]), (1, [1, 2, 3]), (2, [2, 3]), (3, [3])])
def test_trials_train_to_the_next_rung_past_the_rounds_of_grace(grace, rungs):
    from tune.asha import next_rung

    spec = dataclasses.replace(SPEC, grace=grace)
    assert sorted({next_rung(spec, ended) for ended in range(3)}) == rungs


def test_several_tasks_share_the_pair_that_is_best_over_all(tmp_path, space):
    from tune.asha import _round

    spec = dataclasses.replace(SPEC, tasks=("a", "b"), datasets=())
    space = dataclasses.replace(space, grid={"sampling.beta": (1.0,), "sampling.guidance_scale": (1.0, 3.0)})
    of_a = RoundResult(round=1, score=50.0, return_mean=0.0, steps_reused=5, cells={(1.0, 1.0): 10.0, (1.0, 3.0): 50.0})
    of_b = RoundResult(round=1, score=60.0, return_mean=0.0, steps_reused=7, cells={(1.0, 1.0): 60.0, (1.0, 3.0): 0.0})
    row = _round([of_a, of_b], record(tmp_path, space, [], spec))
    assert (row.score, row.beta, row.guidance_scale) == (35.0, 1.0, 1.0)
    assert row.scores == {"a": 10.0, "b": 60.0}
    assert row.steps_reused == 12


def test_the_beta_that_was_evaluated_is_the_one_that_is_found(make_dataset, tmp_path, tiny_config):
    from tune.asha import _round

    dataset = make_dataset()
    file = tmp_path / "space.toml"
    file.write_text(f"critic.expectile = [0.7]\nsampling = {{beta = [{1 / 3!r}], guidance_scale = [1, {1 / 7!r}]}}\n")
    base = tiny_config(dataset, evaluation__horizon=5)
    space = read_space(file, [base])
    current = record(tmp_path, space, [])
    (config,) = trial_configs(current, {"critic.expectile": 0.7}, [base])
    result = run.advance(config, tmp_path / "run", run.FolderStore(tmp_path / "run"), num_rounds=1, device=CPU)
    assert set(result.cells) == {(1 / 3, 1.0), (1 / 3, 1 / 7)}
    best = max(result.cells, key=lambda cell: result.cells[cell])
    row = _round([result], current)
    assert (row.beta, row.guidance_scale) == best

    one = trial(0, (), "finished", {"critic.expectile": 0.7})
    one.rounds.append(row)
    write_preset(tmp_path / "found.toml", current, one, found_settings(space, one))
    settings = tomllib.loads((tmp_path / "found.toml").read_text())["set"]
    sampling = configs.with_overrides(base, settings).sampling
    assert (sampling.beta, sampling.guidance_scale) == (settings["sampling.beta"], settings["sampling.guidance_scale"])
    assert (sampling.beta, sampling.guidance_scale) == best


@pytest.mark.parametrize("values", ["[1, 1.0000001]", "[0.3333333, 0.3333334]"])
def test_values_of_a_grid_that_no_metric_tells_apart_are_refused(values, tmp_path, tiny_config):
    file = tmp_path / "space.toml"
    file.write_text(f"sampling.beta = {values}\n")
    with pytest.raises(ConfigError, match="first six digits"):
        read_space(file, [tiny_config()])


# -- the record --------------------------------------------------------------------------------------------


def test_a_folder_holds_one_search_but_more_trials_are_welcome(tmp_path, space):
    record(tmp_path, space, [trial(0)]).save()
    assert SearchRecord.open(tmp_path, dataclasses.replace(SPEC, trials=30, confirm_seeds=(5,)), space).trials == [
        trial(0)
    ]
    with pytest.raises(ConfigError, match="holds another search: seed is 1000 there, 3 here"):
        SearchRecord.open(tmp_path, dataclasses.replace(SPEC, seed=3), space)
    other = dataclasses.replace(space, grid={"sampling.beta": (1.0,)})
    with pytest.raises(ConfigError, match="another search: space"):
        SearchRecord.open(tmp_path, SPEC, other)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "trials": []}', '{"format": 1}'])
def test_a_record_that_is_none_is_refused(text, tmp_path):
    with pytest.raises(CheckpointError, match="has no search"):
        read_search(tmp_path)
    (tmp_path / SEARCH).write_text(text)
    with pytest.raises(CheckpointError, match="not a search of this version"):
        read_search(tmp_path)


def test_shares_are_those_of_the_reduction():
    assert SPEC.shares == pytest.approx((1 / 9, 1 / 3, 1))
    assert SPEC.shares[-1] == 1.0
    assert dataclasses.replace(SPEC, rounds=1).shares == (1.0,)


# -- the whole ---------------------------------------------------------------------------------------------

SPACE = """
[critic]
expectile = [0.5, 0.9]
[energy]
learning_rate = [1e-3, 2e-3]
[sampling]
guidance_scale = [1, 3]
"""
SMALL = [
    *[f"{s}.{k}={v}" for s in ("behavior", "critic", "energy") for k, v in (("steps", 90), ("hidden_size", 16))],
    "critic.expectile=0.5",
    "evaluation.horizon=5",
]


def words(dataset, folder, *more):
    (folder.parent / "space.toml").write_text(SPACE)
    flags = ["--dataset", dataset, "--preset", "smoke", "--space", str(folder.parent / "space.toml"), "--yes"]
    flags += [
        "--num-episodes",
        "1",
        "--select-seeds",
        "1001",
        "--confirm-seeds",
        "2000",
        "--set",
        *SMALL,
        "--out",
        str(folder),
    ]
    return ["search", *flags, "--json", *more]


def aepo(*flags):
    """Run a command in a process of its own, since Ray takes its settings when it is first imported."""
    command = [sys.executable, "-m", "aepo", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_from_the_first_draw_to_the_report_and_on(make_dataset, tmp_path, capsys):
    folder = tmp_path / "search"
    document = json.loads(aepo(*words(make_dataset(), folder, "--trials", "4")))
    trials = document["trials"]
    assert len({json.dumps(t["params"], sort_keys=True) for t in trials}) == 4  # all that the space has
    assert {t["state"] for t in trials} <= {"finished", "stopped"}
    assert trials[0]["params"] == {"critic.expectile": 0.5, "energy.learning_rate": 1e-3}  # the preset's own
    # four trials, one behaviour, two critics: every stage of every round is trained once
    reached = {t["number"]: len(t["rounds"]) for t in trials}
    most = {e: max(reached[t["number"]] for t in trials if t["params"]["critic.expectile"] == e) for e in (0.5, 0.9)}
    ends = [10, 30, 90]
    wanted = ends[max(reached.values()) - 1] + sum(ends[n - 1] for n in most.values())
    wanted += sum(ends[n - 1] for n in reached.values())
    assert count_steps(read_search(folder).trials)[0] == wanted
    num_stages = sum([max(reached.values()), *most.values(), *reached.values()]) + count_confirmed(folder)
    assert len(list(folder.glob("stages/*.stage"))) == num_stages
    best = max((t for t in trials if t["state"] == "finished"), key=lambda t: t["rounds"][-1]["score"])
    select, confirm = document["select"], document["confirm"]
    assert select["trial"] == best["number"]
    rows = [row for part in (select, confirm) for runs in part.values() if isinstance(runs, list) for row in runs]
    assert [(row["status"], row["seed"]) for row in rows] == [("finished", s) for s in (1001, 1001, 2000, 2000)]
    assert select["wins"] == (select["best"][0]["score"] > select["preset"][0]["score"])

    # the found settings are a sweep, and the very runs that were confirmed
    flags = ["sweep", str(folder / "found.toml"), "--seeds", "2000", "--out", str(folder / "confirm")]
    assert cli.run([*flags, "--dry-run", "--json"]) == 0
    assert [(row["runs"], row["to do"]) for row in json.loads(capsys.readouterr().out)] == [(1, 0)]
    config, *_ = json.loads((folder / "select" / "sweep.json").read_text())["runs"].values()  # the best trial's
    assert config["critic"]["expectile"] == best["params"]["critic.expectile"]
    assert config["sampling"]["guidance_scale"] == best["rounds"][-1]["guidance_scale"]

    # again: nothing to do; with more trials the space is exhausted, and said to be
    before = (folder / "search.json").read_text()
    again = json.loads(aepo(*words("tests/pendulum/random-v0", folder, "--trials", "5")))
    assert again["trials"] == json.loads(before)["trials"]

    # tracked: every trial's run is closed, by what became of it
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "aepo/search")
    found = {r.info.run_name: r.info.status for r in client.search_runs([experiment.experiment_id])}
    states = {name: {"finished": "FINISHED", "stopped": "KILLED"}[t["state"]] for t in trials for name in t["runs"]}
    assert {name: found[name] for name in states} == states

    assert cli.run(["report", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["settings"] for row in result["confirmed"]] == ["found", "default"]
    assert f"{wanted:,} gradient steps" in result["notes"][0]
    assert cli.run(["search", "--status", "--out", str(folder)]) == 0


def count_confirmed(folder):
    """Stages of the selecting and confirming runs: those that they do not share."""
    plans = [json.loads((folder / name / "sweep.json").read_text())["runs"].values() for name in ("select", "confirm")]
    felt = {"behavior": ["behavior"], "critic": ["critic"], "energy": ["energy", "critic"]}
    return len(
        {
            json.dumps([c["seed"], stage, *[c[part] for part in parts]])
            for p in plans
            for c in p
            for stage, parts in felt.items()
        }
    )


@pytest.mark.slow
@pytest.mark.ray
def test_killed_in_mid_search_it_goes_on_from_the_record(make_dataset, tmp_path):
    dataset, folder = make_dataset(), tmp_path / "search"
    command = [sys.executable, "-m", "aepo", *words(dataset, folder, "--trials", "4")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def two_rounds():
        assert first.poll() is None, first.stderr.read()
        return (folder / "search.json").exists() and sum(len(t.rounds) for t in read_search(folder).trials) >= 2

    wait_for(two_rounds)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = json.loads((folder / SEARCH).read_text())["trials"]
    assert any(t["state"] == "running" for t in before)
    after = json.loads(aepo(*command[3:]))["trials"]
    assert len(after) == 4
    for old, new in zip(before, after, strict=False):
        assert new["params"] == old["params"]
        assert new["rounds"][: len(old["rounds"])] == old["rounds"]
        if old["state"] == "running":  # promoted from its last rung, or new: it goes on
            assert len(new["rounds"]) > len(old["rounds"])
        elif old["state"] != "waiting":
            assert new == old
    names = [name for t in after for name in t["runs"]]
    assert len(names) == len(set(names))
    assert {path.name for path in (folder / RUN_FOLDERS).iterdir()} == set(names)


@pytest.mark.slow
@pytest.mark.ray
def test_trials_that_fail_are_told_and_the_rest_goes_on(make_dataset, tmp_path, capsys):
    folder, dataset = tmp_path / "search", make_dataset()
    flags = words(dataset, folder, "--trials", "2", "--grace", "0", "--rounds", "1")
    (tmp_path / "space.toml").write_text("energy.hidden_size = [16, 1_000_000]\n")
    aepo(*flags)
    trials = {t.params["energy.hidden_size"]: t for t in read_search(folder).trials}
    assert trials[16].state == "finished"
    assert trials[1_000_000].state == "failed"
    assert "memory" in trials[1_000_000].error
    assert cli.run(["search", "--status", "--out", str(folder)]) == 0
    assert "memory" in capsys.readouterr().out


# -- command and report ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "at least one task"),
        (["--task", "maze2d-umaze", "--rounds", "0"], "--rounds"),
        (["--task", "maze2d-umaze", "--reduction", "1"], "--reduction"),
        (["--task", "maze2d-umaze", "--seed", "2000"], "or the search's own"),
        (["--task", "maze2d-umaze", "--select-seeds", "7", "--confirm-seeds", "7"], "none of them twice"),
        (["--task", "maze2d-umaze", "--status", "--stop"], "give one"),
        (["--task", "maze2d-umaze", "--set", "behavior.steps=4"], "rounds want more steps than 4 of behavior"),
        (["--stop"], "nothing to stop"),
        (["--status"], "is not a search"),
    ],
)
def test_wrong_flags_are_told(flags, words, tmp_path, capsys):
    assert cli.run(["search", *flags, "--out", str(tmp_path / "none"), "--yes"]) in (2, 3, 4)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_dry_run_says_what_is_varied_and_what_it_costs(tmp_path, capsys):
    assert cli.run(["search", "--task", "maze2d-umaze", "--out", str(tmp_path / "none"), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"setting": "sampling.beta", "values": "1, 3 (on every policy)"} in facts["space"]
    # 1/9 of the steps by all, 2/9 by 8 of 24, 6/9 by 2
    assert f"at most {1 / 9 + 2 / 9 * 8 / 24 + 6 / 9 * 2 / 24:.0%} of them" in facts["cost"]
    assert not (tmp_path / "none").exists()


def outcome(seed, score, return_mean=None):
    status = "failed" if score is None and return_mean is None else "finished"
    return Outcome(
        task="t",
        seed=seed,
        status=status,
        score=score,
        return_mean=return_mean,
        num_episodes=1,
        steps=180,
        steps_reused=60,
        error=None,
    )


def finished_record(tmp_path, space, *, shift=0.0):
    scores = [(1.0,), (2.0, 5.0), (3.0, 6.0, 70.0 + shift), (0.5,)]
    states = ["stopped", "stopped", "finished", "stopped"]
    current = record(
        tmp_path, space, [trial(i, s, state) for i, (s, state) in enumerate(zip(scores, states, strict=True))]
    )
    rows = [outcome(seed, value) for seed, value in ((2000, 50.0), (2001, 60.0))]
    lost = outcome(2001, None)
    settings = {"critic.expectile": 0.5}
    current.select = Selection(trial=2, settings=settings, wins=True, best=[rows[0]], preset=[lost])
    current.confirm = Confirmation(settings=settings, found=rows, default=[rows[0], lost])
    current.save()
    return tmp_path


def test_the_report_says_optimism_compute_and_holes(tmp_path, space):
    folder = finished_record(tmp_path, space)
    first = write_search_report(folder, tmp_path / "one")
    again = write_search_report(folder, tmp_path / "two")
    assert first == again
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert first.confirmed[0] == {"settings": "found", "score": "55.0 ± 5.0", "seeds": "2 of 2", "each": "50.0  60.0"}
    assert first.confirmed[1]["seeds"] == "1 of 2"
    assert first.notes[0] == (
        "4 trials (1 finished, 3 stopped) took 280 gradient steps, 38.9% of the 720 that they take in full; "
        "the stage store saved 0, stopping 440."
    )
    assert "took 240 more: 520 in all, 72.2%" in first.notes[1]
    assert "Found and default on fresh seeds took 480" in first.notes[1]
    assert "70.0 in the search and 50.0 on the selecting seeds: an optimism of 20.0" in first.notes[2]
    assert first.notes[3] == "Found: 50.0 on the selecting seeds, 55.0 on fresh ones."
    assert [row["trial"] for row in first.trials] == ["2", "1", "0", "3"]
    text = (tmp_path / "one" / "report.md").read_text()
    for name in ("trials.png", "best.png", "importance.png", "settings.png"):
        assert f"({name})" in text
        assert (tmp_path / "one" / name).stat().st_size > 5000


def test_a_trial_must_beat_the_preset_on_runs_that_all_came_through():
    rows = [outcome(0, 3.0), outcome(1, None, return_mean=5.0)]
    assert mean_score(rows) == 4.0
    assert mean_score([*rows, outcome(2, None)]) == -np.inf


def test_two_searches_are_compared_at_equal_steps(tmp_path, space, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = finished_record(tmp_path / "a", space), finished_record(tmp_path / "b", space, shift=9.0)
    assert "b 79.0" in write_search_report(one, tmp_path / "report", against=other).notes[-1]
    document = json.loads((other / "search.json").read_text())
    document["spec"]["datasets"] = ["elsewhere"]
    (other / "search.json").write_text(json.dumps(document))
    assert cli.run(["report", str(one), str(other)]) == 2
    assert "not comparable" in capsys.readouterr().err
    assert cli.run(["report", str(one), str(other), str(one)]) == 2


def test_a_search_that_is_under_way_can_be_reported(tmp_path, space):
    record(tmp_path, space, [trial(0), trial(1, (3.0,))]).save()
    result = write_search_report(tmp_path, tmp_path / "report")
    assert result.confirmed == []
    assert "flatter" in result.notes[-1]
    record(tmp_path, space, []).save()
    assert write_search_report(tmp_path, tmp_path / "report").notes[0] == "No trial has begun."
