"""`python -m cluster.slurm.node FOLDER head|worker|clean`: one node of a job's Ray for the time of a step.

Ray's files and sockets lie in a folder of this node that only this user enters. The step itself removes it, whether it
ends because the file END is there, because of a signal (scancel, a requeue, the time limit), or because Ray has ended;
a job that ends gets no new step that could. FOLDER is the job's, which all nodes see:

    token           Ray's, for RAY_AUTH_TOKEN_PATH (0600)
    address         of the head, once it listens
    up-NAME         this node is part of Ray
    private-NAME    where its folder is; if this process was killed, its next start, or `clean`, removes that
    end             the job is over
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from aepo import files
from cluster import services
from cluster.processes import Process, end_process_tree, start_ticks
from cluster.services import OBJECT_STORE, ServiceSettings
from tune.sockets import PREFIX, make_socket_folder

ADDRESS, END, UP, PRIVATE = "address", "end", "up-", "private-"
STARTED = "Ray runtime started."
"""What `ray start` prints of a node that is part of its cluster."""
POLL_S, STOP_S = 0.5, 5.0
START_TRIES = 3
"""Ray gives a node 30 s to start, which a busy machine may not keep."""
RESERVED = {"head": 1400 << 20, "worker": 600 << 20}
"""Bytes of the grant that no run is given: Ray's own processes, and beside the head the sweep's."""
LEAST_MEMORY = 64 << 20
LOG_LINES = 15


def main(folder: Path, role: str) -> int:
    """Be a node until the job's end; return the exit status, 1 if Ray ended by itself."""
    ending: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        ending.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    note = folder / f"{PRIVATE}{name}"
    remove_left(note)
    if role == "clean":
        return 0

    def is_over() -> bool:
        return bool(ending) or (folder / END).exists()

    while role == "worker" and not (folder / ADDRESS).exists():
        if is_over():
            return 0
        time.sleep(POLL_S)
    for left in reversed(range(START_TRIES)):
        private = make_socket_folder()
        try:
            files.write_atomically(note, str(private).encode())
            was_up = _run(folder, role, name, private, is_over)
        finally:
            shutil.rmtree(private, ignore_errors=True)
            note.unlink(missing_ok=True)
        if is_over() or was_up:
            break
        print(f"Ray did not start on {name}{'; trying again' if left else ''}", flush=True)
    return 0 if is_over() else 1


def _run(folder: Path, role: str, name: str, private: Path, is_over: Callable[[], bool]) -> bool:
    """Run Ray until it ends or the job does; return whether it was up."""
    log = private / "ray.log"
    with log.open("wb") as file:
        child = subprocess.Popen(
            command(role, folder, private / "ray"),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    ray = Process(child.pid, start_ticks(child.pid))
    is_up = False
    try:
        while child.poll() is None and not is_over():
            if not is_up and STARTED in log.read_text(errors="replace"):
                is_up = True
                if role == "head":
                    address = (private / "ray" / "ray_current_cluster").read_text().strip()
                    files.write_atomically(folder / ADDRESS, address.encode())
                (folder / f"{UP}{name}").touch()
            time.sleep(POLL_S)
        if not is_over():
            lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
            heading = f"Ray ended on {name} (exit status {child.returncode}); its last lines:"
            print(heading, *lines, sep="\n  ", flush=True)
        return is_up
    finally:
        end_process_tree(ray, signal.SIGTERM, timeout_s=STOP_S)


def command(role: str, folder: Path, ray_folder: Path) -> list[str]:
    """Return Ray's command line of this node: what SLURM has granted there, and no port that another may have."""
    if role == "head":
        words = services.ray_head(ServiceSettings(gcs_port=0), has_dashboard=False)
    else:
        host, _, port = (folder / ADDRESS).read_text().rpartition(":")
        words = services.ray_worker(ServiceSettings(gcs_host=host, gcs_port=int(port)))
    share = services.on_shared_machine(
        cpus=int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0))),
        gpus=granted_gpus(),
        memory=max(LEAST_MEMORY, granted_memory() - OBJECT_STORE - RESERVED[role]),
        folder=ray_folder,
    )
    return [sys.executable, "-m", "cluster.node", *words[1:], *share]


def granted_gpus() -> int:
    """Return how many GPUs the job has on this node; what CUDA_VISIBLE_DEVICES hides does not count."""
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else min(gpus, sum(bool(word.strip()) for word in visible.split(",")))


def granted_memory() -> int:
    """Return the bytes that the job may take on this node: by SLURM, its control group, and what the node has."""
    import psutil

    bounds = [int(psutil.virtual_memory().total), *_control_group_bounds()]
    per_node, per_cpu = (int(os.environ.get(f"SLURM_MEM_PER_{what}") or 0) for what in ("NODE", "CPU"))
    if granted := per_node or per_cpu * int(os.environ.get("SLURM_CPUS_ON_NODE") or 1):
        bounds.append(granted << 20)  # 0 is all of the node
    return min(bounds)


def _control_group_bounds() -> list[int]:
    """Return the memory limits of this process's control groups, of either version, as far as they can be read."""
    bounds = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / kinds
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            for name in ("memory.max", "memory.limit_in_bytes"):
                file = place / name
                if file.is_file() and (text := file.read_text().strip()).isdigit():
                    bounds.append(int(text))
    return bounds


def remove_left(note: Path) -> None:
    """Remove the folder that an earlier start of this job on this node could not, if it is this user's and there."""
    if not note.exists():
        return
    left = Path(note.read_text().strip())
    if left.name.startswith(PREFIX) and left.is_dir() and not left.is_symlink() and left.stat().st_uid == os.getuid():
        shutil.rmtree(left, ignore_errors=True)
    note.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
