"""`python -m cluster.node start ...`: Ray's own command line, in which 127.0.0.1 stays 127.0.0.1.

Ray puts a node's outward address in its place, and then all of Ray listens on every interface. What keeps a laptop's
Ray on 127.0.0.1 (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0) refuses a second node. Both are lifted here, for Ray 2.58
to 2.61. A head also starts no server for Ray Client, which nobody here uses and whose port cannot be any free one.
"""

import os

from ray._private import ray_constants, services
from ray._private.parameter import RayParams
from ray.scripts.scripts import main


def without_client(parameters: RayParams, is_head: bool) -> None:
    """Have no server for Ray Client; Ray calls this by the name in its variable for such a hook."""
    del is_head
    parameters.ray_client_server_port = None


if __name__ == "__main__":
    os.environ[ray_constants.RAY_START_HOOK] = "cluster.node.without_client"
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    main()  # type: ignore[no-untyped-call]
