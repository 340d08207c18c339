"""`python -m cluster.reserve PLACES CPUS GPUS`, before a sweep: have the cluster's autoscaler bring nodes, and wait.

A sweep takes as many runs at once as fit on the nodes at its start, so nodes that come on demand must be there by then.
The request is taken back in the end: a node goes again when it has been idle for as long as the cluster allows.
"""

import sys
import time

from tune.places import places_on_node

TIMEOUT_S, POLL_S = 900.0, 2.0


def fitting(nodes: list[dict[str, object]], cpus: float, gpus: float) -> int:
    """Return how many runs with so many cores and GPUs the living nodes have room for."""
    total = 0
    for node in nodes:
        have = node["Resources"]
        assert isinstance(have, dict)
        if node["Alive"]:
            total += places_on_node(have, cpus=cpus, gpus=gpus)
    return total


def main(places: int, cpus: float, gpus: float) -> None:
    """Ask, wait for at most a quarter of an hour, and go on with what is there."""
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    request_resources(bundles=[{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * places)
    end, shown = time.monotonic() + TIMEOUT_S, -1
    try:
        while True:
            there = fitting(ray.nodes(), cpus, gpus)  # type: ignore[no-untyped-call]
            if there != shown:
                print(f"room for {there} of {places} runs at once", flush=True)
                shown = there
            if there >= places:
                return
            if time.monotonic() > end:
                print(f"the cluster brought no more within {TIMEOUT_S / 60:g} min; the sweep starts", flush=True)
                return
            time.sleep(POLL_S)
    finally:
        request_resources(bundles=[])


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
