"""How many runs a node of Ray has places for, counted as Ray places them."""

from collections.abc import Mapping

UNIT = 10_000
"""Ray counts every resource in ten-thousandths."""


def places_on_node(have: Mapping[str, float], *, cpus: float, gpus: float) -> int:
    """Return how many runs a node places at once, its memory aside.

    A fraction of a GPU lies on one GPU: of runs that take 0.3 a GPU holds three, whatever its neighbours have left.

    Args:
        have: the node's resources, as Ray names them: CPU, GPU.
        cpus: cores of a run, > 0.
        gpus: GPUs of a run, >= 0: a part of one, or whole ones, since Ray gives no run 1.5.
    """
    by_cpus = _units(have.get("CPU", 0.0)) // _units(cpus)
    if not gpus:
        return by_cpus
    devices = int(have.get("GPU", 0.0))
    return min(by_cpus, devices * (UNIT // _units(gpus)) if gpus < 1 else devices * UNIT // _units(gpus))


def _units(amount: float) -> int:
    """Return an amount in Ray's units, at least one: 1 / 0.1 is ten of them and not nine."""
    return max(1, round(amount * UNIT))
