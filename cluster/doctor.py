"""`aepo doctor`: what this machine can run, and what to do about the rest."""

import dataclasses
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from aepo.console import emit_json, emit_table, err
from aepo.errors import ConfigError, ResourceError
from aepo.tasks import rows, table

Status = Literal["pass", "warn", "fail"]
PACKAGES = ["torch", "ray", "mlflow", "minari", "gymnasium", "gymnasium-robotics", "mujoco", "pandas"]
FREE_DISK_GIB = 5.0
FREE_MEMORY_GIB = 2.5
"""GiB of memory that a private Ray and one running trial take."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding; `remedy` is empty where there is nothing to do."""

    check: str
    status: Status
    found: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check this machine: packages, cores, memory, disk, GPU, environments, and which tasks it can train and evaluate.

    Exits 6 if something that training needs fails.

    For example:
      aepo doctor
      aepo doctor --json
      aepo doctor --measure
    """

    measure: bool = False
    """Instead, measure in about a minute which of torch's two backends trains faster on this processor.
    The answer is kept, beside decoded data, for all runs that begin here."""
    seconds: float = 1.5
    """Seconds of measuring per stage and dimensions, with --measure."""
    json: bool = False
    """Print one JSON document on standard output and nothing else."""

    def run(self) -> int:
        """Print one row per check; return 6 if one failed."""
        if self.measure:
            return self._measure()
        checks = examine()
        if self.json:
            emit_json([dataclasses.asdict(check) for check in checks])
        else:
            emit_table("this machine", [dataclasses.asdict(check) for check in checks])
        return 6 if any(check.status == "fail" for check in checks) else 0

    def _measure(self) -> int:
        from aepo import kernels
        from aepo.bench.measure import backend_gains
        from aepo.runs.backend import own_table
        from aepo.runs.run import set_up_torch
        from aepo.runs.rundir import commit

        if self.seconds <= 0:
            raise ConfigError(f"want --seconds above 0, got {self.seconds:g}")
        if not kernels.processor().vendor:
            raise ResourceError("/proc/cpuinfo does not say which processor this is: torch's own layers are used")
        set_up_torch(1)
        gains = {}
        for name, gain in backend_gains(self.seconds):
            err.print(f"{name}: {gain:.2f} times as fast by onednn as by torch", soft_wrap=True)
            gains[name] = gain
        here, median = kernels.processor(), statistics.median(gains.values())
        row = kernels.Measured(
            vendor=here.vendor,
            family=here.family,
            model=here.model,
            torch=kernels.torch_version(),
            gain=round(median, 3),
            source=f"{here.name}; aepo doctor --measure at {commit() or 'an unknown commit'}",
        )
        kernels.keep(own_table(), row)
        chosen = kernels.choose(own_table())
        facts = {**dataclasses.asdict(row), "backend": chosen, "table": str(own_table())}
        emit_json({**facts, "gains": gains}) if self.json else emit_table("steps by onednn beside torch", [facts])
        return 0


def examine() -> list[Check]:
    """Return all findings."""
    environments = [_environment(env_id) for env_id in dict.fromkeys(row.env_id for row in rows())]
    return [
        _python(),
        *map(_package, PACKAGES),
        _cores(),
        _kernels(),
        _memory(),
        _disk(),
        _gpu(),
        *environments,
        *_tasks({check.check for check in environments if check.status == "pass"}),
    ]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "pass" if sys.version_info >= (3, 11) else "fail", found, "")


def _package(name: str) -> Check:
    try:
        return Check(name, "pass", version(name))
    except PackageNotFoundError:
        return Check(name, "fail", "not installed", "install this project again: make install")


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    found = f"{cores} cores, load {load:.1f}"
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdigit() and int(threads) > cores:
        return Check("cores", "warn", f"{found}, OMP_NUM_THREADS={threads}", f"export OMP_NUM_THREADS={cores}")
    if load > cores:
        return Check("cores", "warn", found, "other programs hold the cores; a shared core costs more than half")
    return Check("cores", "pass", found)


def _kernels() -> Check:
    """Say how fast linear layers are, and whether the processor could do more."""
    import torch

    from aepo import kernels
    from aepo.bench.measure import linear_rates
    from aepo.runs.backend import own_table

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = kernels.choose(own_table())
    with kernels.using(chosen):
        rates = linear_rates()
    torch.set_num_threads(threads)
    capability = torch.backends.cpu.get_cpu_capability()
    found = (
        f"{capability}, backend {chosen}, linear layers {rates['float32']:.0f} GFLOP/s a core "
        f"({rates['plain']:.0f} by PyTorch's own), {rates['bfloat16']:.0f} with bfloat16"
    )
    if not capability.startswith("AVX512") and "avx512f" in _processor_flags():
        return Check("kernels", "warn", found, "the processor has AVX-512: unset ATEN_CPU_CAPABILITY")
    return Check("kernels", "pass", found)


def _processor_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _memory() -> Check:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    enough = free >= FREE_MEMORY_GIB
    remedy = "" if enough else f"a sweep wants {FREE_MEMORY_GIB:g} GiB, and 1.2 more for every further trial at once"
    return Check("memory", "pass" if enough else "fail", f"{free:.1f} GiB free", remedy)


def _disk() -> Check:
    places = {str(Path.cwd()), tempfile.gettempdir()}
    free = {place: shutil.disk_usage(place).free / 2**30 for place in sorted(places)}
    found = ", ".join(f"{place} {gib:.0f} GiB free" for place, gib in free.items())
    low = min(free.values()) < FREE_DISK_GIB
    return Check("disk", "warn" if low else "pass", found, "Ray spills into the temporary folder" if low else "")


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "pass", "none; everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", "pass", ", ".join(names))


def _environment(env_id: str) -> Check:
    """Make the environment and take one step."""

    def step() -> str:
        gymnasium = importlib.import_module("gymnasium")
        importlib.import_module("aepo.environments").register_robotics()
        env = gymnasium.make(env_id)
        try:
            env.reset(seed=0)
            env.step(env.action_space.sample())
        finally:
            env.close()
        return "steps"

    return _attempt(
        env_id, step, "make install gives the versions that work together; FrankaKitchen wants mujoco < 3.12"
    )


def _attempt(name: str, action: Callable[[], str], remedy: str) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Check(name, "pass", action())
    except Exception as error:  # whatever a simulator raises is the finding
        return Check(name, "warn", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}", remedy)


def _tasks(env_ids: set[str]) -> Sequence[Check]:
    """Say of every task whether its data are here, of which source, and whether its environment steps."""
    from aepo.data.library import local_datasets

    local = local_datasets()
    checks = []
    for name in table():
        own = [row for row in rows() if row.task == name]
        here = [row for row in own if row.dataset in local]
        able = [row for row in here if row.env_id in env_ids]
        data = ", ".join(f"{row.source} {local[row.dataset]['total_steps']:,} steps" for row in here) or "none"
        steps = [row.env_id for row in own if row.env_id in env_ids]
        found = f"data: {data}; evaluates in: {', '.join(dict.fromkeys(steps)) or 'none'}"
        if able:
            checks.append(Check(f"task {name}", "pass", found))
        else:
            remedy = f"{here[0].env_id}, above" if here else f"aepo data show {name} says how to get them"
            checks.append(Check(f"task {name}", "warn", found, remedy))
    return checks
