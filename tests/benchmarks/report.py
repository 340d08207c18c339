"""How long `aepo report` takes, from the call to the last file: `python -m tests.benchmarks.report`, by hand.

The tables are made here, with learning curves of random scores: 36 tasks x 1 method x 5 seeds x 200 evaluations, then
40 tasks x 5 methods x 50 seeds x 200.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.load import SCHEMA

METHODS = ("aepo", "aepo-analytic", "qgpo", "iql", "td3bc")
SUITES = ("gym-mujoco", "maze2d", "antmaze", "adroit")


def write_table(folder: Path, *, num_tasks: int, num_methods: int, num_seeds: int, num_points: int) -> int:
    """Write runs.parquet into a folder and return the number of its rows."""
    rng = np.random.default_rng(0)
    rows = []
    steps = np.linspace(10_000, 1_000_000, num_points).astype(int).tolist()
    for task in range(num_tasks):
        for method in METHODS[:num_methods]:
            level = rng.uniform(10, 100)
            for seed in range(num_seeds):
                scores = level * (1 - np.exp(-np.arange(1, num_points + 1) / 40)) + rng.normal(0, 3, num_points)
                curve = [
                    {"stage": "energy", "step": step, "score": score, "return_mean": 2 * score + 10}
                    for step, score in zip(steps, scores.tolist(), strict=True)
                ]
                own, cloned = float(scores[-1]), float(rng.normal(15, 2))
                evaluations = [
                    {
                        "method": name,
                        "beta": 1.0,
                        "guidance_scale": 1.0,
                        "score": score,
                        "return_mean": 2 * score + 10,
                        "return_std": 1.0,
                        "num_episodes": 50,
                        "episode_returns": [2 * score + 10] * 50,
                    }
                    for name, score in ((method, own), ("diffusion-bc", cloned))[: 1 + (method == "aepo")]
                ]
                rows.append(
                    {
                        "schema_version": 2,
                        "run": f"task-{task:02d}-{method}-s{seed}",
                        "task": f"task-{task:02d}-v2",
                        "suite": SUITES[task % len(SUITES)],
                        "source": "collected",
                        "dataset": f"local/task-{task:02d}-v2",
                        "dataset_digest": "0f1e",
                        "ref_min": 10.0,
                        "ref_max": 210.0,
                        "seed": seed,
                        "fingerprint": "0123456789ab",
                        "method": method,
                        "preset": "paper",
                        "status": "finished",
                        "score": own,
                        "return_mean": 2 * own + 10,
                        "num_episodes": 50,
                        "steps": 1_000_000,
                        "seconds": 3600.0,
                        "evaluations": evaluations,
                        "curve": curve,
                        "commit": "0123456",
                    }
                )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "runs.parquet")
    return len(rows)


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for tables and reports (default: a temporary one)")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        for num_tasks, num_methods, num_seeds in ((36, 1, 5), (40, 5, 50)):
            folder = (keep or Path(temporary)) / f"{num_tasks}x{num_methods}x{num_seeds}"
            size = (num_tasks, num_methods, num_seeds)
            count = write_table(folder, num_tasks=size[0], num_methods=size[1], num_seeds=size[2], num_points=200)
            begin, used = time.monotonic(), _cpu_s()
            subprocess.run([sys.executable, "-m", "aepo", "report", str(folder)], check=True, capture_output=True)
            took, page = time.monotonic() - begin, (folder / "report" / "report.html").stat().st_size
            cpu = _cpu_s() - used
            print(f"{count:,} runs x 200 evaluations: {took:.1f} s, {cpu:.1f} s of CPU, page {page / 1e6:.1f} MB")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
