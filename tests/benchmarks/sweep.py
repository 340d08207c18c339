"""What the platform costs per run. Run by hand: python -m tests.benchmarks.sweep [--runs 24 | --noop 1000].

Baseline: a plain loop that calls `aepo train` for one run after the other, one loop per core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from aepo.runs import rundir, spool

TASK = "maze2d-open"
STEPS = 2000
SETTINGS = [
    f"{stage}.{key}={value}"
    for stage in ("behavior", "critic", "energy")
    for key, value in (("steps", STEPS), ("batch_size", 64), ("hidden_size", 32))
] + ["evaluation.num_episodes=1", "evaluation.horizon=10"]
NOTHING = [f"{stage}.steps=1" for stage in ("behavior", "critic", "energy")]
NOTHING += ["evaluation.num_episodes=1", "evaluation.horizon=1", "sampling.num_steps=1"]


def aepo(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "aepo", *words], check=True, capture_output=True)


def training_s(folders: list[Path]) -> float:
    """Return the seconds in which gradient steps were taken, summed over runs."""
    total = 0.0
    for folder in folders:
        for stage in ("behavior", "critic", "energy"):
            rows = [row for row in spool.read_spool(folder / rundir.METRICS)[0] if row["stage"] == stage]
            seconds, steps = rows[-1]["time"] - rows[0]["time"], rows[-1]["step"] - rows[0]["step"]
            total += seconds * rows[-1]["step"] / steps
    return total


def report(name: str, folders: list[Path], wall_s: float, slots: int) -> None:
    busy = training_s(folders)
    over = (wall_s * slots - busy) / len(folders)
    print(f"| {name} | {wall_s:.0f} | {busy / len(folders):.1f} | {over:.1f} | {100 * busy / (wall_s * slots):.0f} % |")


def measure(num_runs: int, folder: Path) -> None:
    slots = len(os.sched_getaffinity(0))
    seeds = [str(seed) for seed in range(num_runs)]
    common = ["--task", TASK, "--preset", "smoke", "--set", *SETTINGS]
    print(f"{num_runs} runs of {3 * STEPS:,} steps, {slots} at a time")
    print("| | wall, s | training, s per run | everything else, s per run | slots that train |\n|---|---|---|---|---|")

    begin = time.perf_counter()
    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(lambda seed: aepo("train", *common, "--seed", seed, "--out", str(folder / "loop")), seeds))
    report("loop of aepo train", list((folder / "loop").iterdir()), time.perf_counter() - begin, slots)
    for runner in ("train", "inline"):
        begin = time.perf_counter()
        aepo("sweep", *common, "--seeds", *seeds, "--out", str(folder / runner), "--runner", runner, "--yes")
        folders = list((folder / runner / "runs").iterdir())
        report(f"aepo sweep --runner {runner}", folders, time.perf_counter() - begin, slots)


def measure_many(num_runs: int, folder: Path) -> None:
    """A plan of runs that do next to nothing: the driver's memory, and how fast its status answers."""
    words = [sys.executable, "-m", "aepo", "sweep", "--task", TASK, "--preset", "smoke", "--runner", "inline", "--yes"]
    words += ["--seeds", *map(str, range(num_runs)), "--out", str(folder / "many"), "--set", *NOTHING]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver, memory, answers = psutil.Process(process.pid), [], []

    def look() -> None:
        while process.poll() is None:
            ended = len(list((folder / "many" / "runs").glob(f"*/{rundir.RESULT}")))
            try:
                memory.append((ended, driver.memory_info().rss / 2**20))
            except psutil.Error:
                return
            if ended > 10 and len(memory) % 10 == 0:
                begin = time.perf_counter()
                words = [sys.executable, "-m", "aepo", "sweep", "--status", "--json", "--out", str(folder / "many")]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    assert len(json.loads(done.stdout)) == num_runs
                    answers.append(time.perf_counter() - begin)
            time.sleep(2)

    begin = time.perf_counter()
    thread = threading.Thread(target=look)
    thread.start()
    status = process.wait()
    thread.join()
    wall = time.perf_counter() - begin
    print(f"{num_runs} runs of 3 steps, inline: {wall:.0f} s, {wall / num_runs:.2f} s per run, exit status {status}")
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        ended, mb = min(memory, key=lambda pair, share=share: abs(pair[0] - share * num_runs))
        print(f"driver's memory with {ended} runs ended: {mb:.0f} MB")
    print(f"aepo sweep --status: {len(answers)} answers, the slowest in {max(answers, default=0):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--noop", type=int, default=0, help="instead: so many runs that do nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ |= {
            "MINARI_DATASETS_PATH": f"{place}/minari",
            "AEPO_CACHE": f"{place}/cache",
            "OMP_NUM_THREADS": "1",
        }
        aepo("data", "collect", TASK, "--steps", "5000")
        if args.noop:
            measure_many(args.noop, folder)
        else:
            measure(args.runs, folder)


if __name__ == "__main__":
    main()
