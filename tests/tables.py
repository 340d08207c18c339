"""Rows of runs.parquet made by hand, and the report of them."""

import pyarrow as pa
import pyarrow.parquet as pq

import aepo.cli
from analysis.load import SCHEMA

MEDIUM, LARGE = "maze2d-medium", "maze2d-large"


def evaluation(method, score, return_mean, **values):
    guided = method == "aepo"
    return {
        "method": method,
        "beta": 3.0,
        "guidance_scale": 3.0 if guided else 0.0,
        "score": score,
        "return_mean": return_mean,
        "return_std": 0.0,
        "num_episodes": 2,
        "episode_returns": [return_mean, return_mean],
    } | values


def row(task=MEDIUM, seed=0, score=60.0, cloned=20.0, **values):
    """One finished run; a return is twice the score plus 10, so references are 10 and 210."""

    def point(step, value):
        return {"stage": "energy", "step": step, "score": value, "return_mean": 2 * value + 10}

    return {
        "schema_version": 2,
        "run": f"{task}-s{seed}-0123456789ab",
        "task": task,
        "suite": "maze2d",
        "source": "collected",
        "dataset": f"local/{task}-v0",
        "dataset_digest": "sha256:0f1e",
        "env_id": None,
        "ref_min": 10.0,
        "ref_max": 210.0,
        "seed": seed,
        "fingerprint": "0123456789ab",
        "method": "aepo",
        "preset": "quick",
        "status": "finished",
        "error": None,
        "score": score,
        "return_mean": 2 * score + 10,
        "num_episodes": 2,
        "steps": 3000,
        "seconds": 1.5,
        "evaluations": [
            evaluation("aepo", score, 2 * score + 10),
            evaluation("diffusion-bc", cloned, 2 * cloned + 10),
        ],
        "curve": [point(500, score / 2), point(1000, score)],
        "commit": "c3a614e",
        "started_at": "2025-11-22T11:10:00Z",
        "mlflow_run_id": None,
    } | values


def lost(task=MEDIUM, seed=1, status="failed", error="TrainingError: critic/loss is nan\nat step 7", **values):
    nothing = dict.fromkeys(["score", "return_mean", "num_episodes", "dataset_digest", "ref_min", "ref_max"])
    holes = nothing | {"evaluations": [], "curve": [], "steps": 0, "seconds": 0.0}
    return row(task, seed) | holes | {"status": status, "error": error} | values


def without_references(seed, mean):
    plain = [evaluation(method, None, mean + gain) for method, gain in (("aepo", 0.0), ("diffusion-bc", -9.0))]
    points = [{"stage": "energy", "step": 500, "score": None, "return_mean": mean}]
    holes = dict.fromkeys(["ref_min", "ref_max", "score"])
    return row("own/task-v0", seed, suite="user", source="user") | holes | {"evaluations": plain, "curve": points}


def write(folder, *rows, schema=SCHEMA):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), folder / "runs.parquet")
    return folder


def report(*words):
    return aepo.cli.run(["report", *map(str, words)])


WHOLE = SCHEMA


def finished(task, method, seed, score, **values):
    """A run with a curve that rises to its score, a heat map if it is guided, and its clone's score beside its own."""
    points = [(500, score / 2), (1000, score + 4.0 * (seed == 1)), (1500, score)]
    curve = [{"stage": "energy", "step": step, "score": value, "return_mean": 2 * value + 10} for step, value in points]
    guided = method in ("aepo", "qgpo")
    pair = {} if guided else {"beta": None, "guidance_scale": None}
    own = evaluation(method, score, 2 * score + 10, **pair)
    clone = [evaluation("diffusion-bc", 20.5 + seed, 51.0 + 2 * seed)] if guided else []
    grid = [
        {"beta": beta, "guidance_scale": w, "score": score - w * beta, "return_mean": 2 * score, "num_episodes": 2}
        for beta in (1.0, 1 / 3)
        for w in (0.0, 2.0)
        if guided
    ]
    names = {"run": f"{task}-{method}-{seed}", "method": method, "evaluations": [own, *clone], "curve": curve}
    return row(task, seed, score) | names | {"grid": grid} | values


NASTY = r"a\b{c}$d_e^f#g%h&i~j|k<script>alert(1)</script>*l`m[n](o)\input{p}ü中--q"
