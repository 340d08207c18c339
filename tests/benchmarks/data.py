"""Time and memory of a data set of a million steps. Run by hand: python -m tests.benchmarks.data [--steps N].

Baseline: what most code does in every trial, Minari's episodes concatenated and copied into tensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings

STATE_DIM, ACTION_DIM, EPISODE_STEPS = 11, 3, 1000
"""Hopper's shape."""
DATASET = "benchmark/hopper/random-v0"
NUM_BATCHES = 2000
"""Of 256 rows, drawn after loading: every page of a million rows is touched."""


HELD = []
"""What a trial has loaded, until it ends."""


def write(num_steps: int) -> None:
    import gymnasium
    import minari
    import numpy as np
    from minari.data_collector.episode_buffer import EpisodeBuffer

    rng = np.random.default_rng(0)
    truncations = np.arange(1, EPISODE_STEPS + 1) == EPISODE_STEPS
    buffers = [
        EpisodeBuffer(
            observations=rng.normal(size=(EPISODE_STEPS + 1, STATE_DIM)),
            actions=rng.uniform(-1, 1, (EPISODE_STEPS, ACTION_DIM)).astype(np.float32),
            rewards=rng.normal(size=EPISODE_STEPS),
            terminations=np.zeros(EPISODE_STEPS, dtype=bool),
            truncations=truncations,
        )
        for _ in range(num_steps // EPISODE_STEPS)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            DATASET,
            buffers,
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64),
            action_space=gymnasium.spaces.Box(-1, 1, (ACTION_DIM,), np.float32),
        )


def load_ours():
    from aepo.data.transitions import load_transitions

    data = load_transitions(DATASET, reward_rule="raw")
    return data, data.draw


def load_naively():
    import minari
    import numpy as np
    import torch

    episodes = list(minari.load_dataset(DATASET).iterate_episodes())
    arrays = [
        np.concatenate([e.observations[:-1] for e in episodes]),
        np.concatenate([e.actions for e in episodes]),
        np.concatenate([e.rewards for e in episodes])[:, None],
        np.concatenate([e.terminations for e in episodes])[:, None],
        np.concatenate([e.observations[1:] for e in episodes]),
    ]
    tensors = [torch.tensor(array, dtype=torch.float32) for array in arrays]

    def draw(batch_size, generator):
        index = torch.randint(len(tensors[0]), (batch_size,), generator=generator)
        return [tensor[index] for tensor in tensors]

    return tensors, draw


def trial(load: str) -> dict[str, float]:
    """Load, draw, and return seconds and this process's memory in MB beyond what imports take."""
    import time

    import minari  # noqa: F401
    import psutil
    import torch

    import aepo.data.transitions  # noqa: F401

    torch.set_num_threads(1)
    process = psutil.Process()
    before = process.memory_full_info()
    begin = time.perf_counter()
    data, draw = {"ours": load_ours, "naive": load_naively}[load]()
    loaded = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_BATCHES):
        draw(256, generator)
    drawn = time.perf_counter()
    after = process.memory_full_info()
    HELD.append(data)
    return {
        "load_s": loaded - begin,
        "batches_per_s": NUM_BATCHES / (drawn - loaded),
        "own_mb": (after.uss - before.uss) / 2**20,
        "resident_mb": (after.rss - before.rss) / 2**20,
    }


def start(load: str) -> "subprocess.Popen[str]":
    """Start a trial that holds its data until its standard input closes."""
    command = [sys.executable, "-m", "tests.benchmarks.data", "--trial", load]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def result(process: "subprocess.Popen[str]") -> dict[str, float]:
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--trial", choices=["ours", "naive"])
    args = parser.parse_args()
    if args.trial:
        print(json.dumps(trial(args.trial)), flush=True)
        sys.stdin.read()
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MINARI_DATASETS_PATH": f"{folder}/minari", "AEPO_CACHE": f"{folder}/cache"}
        write(args.steps)
        rows = {}
        trials = []  # all stay alive, as those of a sweep do
        for name, load in (("naive", "naive"), ("first load", "ours"), ("second load", "ours"), ("third load", "ours")):
            trials.append(start(load))
            rows[name] = result(trials[-1])
        for process in trials:
            process.communicate()
    print(f"{args.steps:,} steps, S = {STATE_DIM}, A = {ACTION_DIM}; own = memory that no other process shares")
    print("| | load, s | own memory, MB | resident, MB | batches of 256 per s |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = (f"{row['load_s']:.3f}", f"{row['own_mb']:.0f}", f"{row['resident_mb']:.0f}")
        print(f"| {name} | {' | '.join(cells)} | {row['batches_per_s']:,.0f} |")
    again, naive = rows["third load"], rows["naive"]
    print(f"a further trial: loaded {naive['load_s'] / again['load_s']:.0f} times faster than naive, ", end="")
    print(f"{again['own_mb']:.0f} MB of its own against {naive['own_mb']:.0f}")


if __name__ == "__main__":
    main()
