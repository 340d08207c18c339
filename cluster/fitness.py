"""`aepo cluster doctor`: pass, warn or fail of what the nodes of a cluster see, with the remedy."""

import ipaddress
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aepo.documents import parse_json
from aepo.errors import DataError
from cluster.doctor import FREE_DISK_GIB, Check, Status
from cluster.probe import FACTS

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 60.0
Facts = dict[str, Any]


def examine_cluster(client: "JobSubmissionClient", address: str, datasets: Sequence[str]) -> list[Check]:
    """Return the findings on a cluster; `datasets` are those that a sweep wants.

    Raises:
        DataError: if the job that looks did not answer.
    """
    import requests

    from cluster.jobs import run_helper

    text = run_helper(client, f"python -m cluster.probe {secrets.token_hex(4)}", check=True)
    line = next((line for line in text.splitlines() if line.startswith(FACTS)), None)
    if line is None:
        raise DataError("the job that looks at the nodes printed nothing; `ray job list` and its log say why")
    asks = requests.get(f"{address.rstrip('/')}/api/jobs/", timeout=20).status_code != 200
    return judge(parse_json(line.removeprefix(FACTS)), asks_token=asks, datasets=datasets)


def judge(facts: Sequence[Facts], *, asks_token: bool, datasets: Sequence[str] = ()) -> list[Check]:
    """Return one finding per check, of what `cluster.probe` found on every node."""
    answered = [row for row in facts if "error" not in row]
    silent = {row["node"]: row["error"] for row in facts if "error" in row}
    return [
        _check("nodes", silent, f"{len(answered)} answer", "ray status and the node's raylet log say why it does not"),
        _versions(answered),
        _storage(answered),
        *_tracking(answered),
        *_data(answered, datasets),
        _gpus(answered),
        _clocks(answered),
        _disk(answered),
        _token(answered, asks_token=asks_token),
        _ports(answered, asks_token=asks_token),
    ]


def _check(name: str, bad: dict[str, str], good: str, remedy: str, *, status: Status = "fail") -> Check:
    if not bad:
        return Check(name, "pass", good)
    return Check(name, status, "; ".join(f"{node}: {text}" for node, text in bad.items()), remedy)


def _bad(facts: Sequence[Facts], say: Callable[[Facts], str]) -> dict[str, str]:
    return {row["node"]: text for row in facts if (text := say(row))}


def _versions(facts: Sequence[Facts]) -> Check:
    differing = {
        name: " and ".join(sorted({row["versions"][name] for row in facts}))
        for name in (facts[0]["versions"] if facts else {})
        if len({row["versions"][name] for row in facts}) > 1
    }
    shown = f"python {facts[0]['versions']['python']}, ray {facts[0]['versions']['ray']} everywhere" if facts else "-"
    return _check("versions", differing, shown, "install from constraints.txt, or the same image, on all nodes")


def _storage(facts: Sequence[Facts]) -> Check:
    def say(row: Facts) -> str:
        found = row["storage"]
        return str(found["writes"]) or ("" if found["sees"] else f"{found['path']} does not show the head's file")

    paths = ", ".join(sorted({row["storage"]["path"] for row in facts}))
    return _check(
        "storage",
        _bad(facts, say),
        f"{paths} is shared and writable",
        "mount one folder on all nodes and name it in AEPO_STORAGE",
    )


def _tracking(facts: Sequence[Facts]) -> list[Check]:
    bad = _bad(facts, lambda row: "" if row["tracking"]["status"] == 200 else str(row["tracking"]["status"]))
    uris = ", ".join(sorted({row["tracking"]["uri"] for row in facts}))
    remedy = "set MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD on every node; 403: --allowed-hosts of the server"
    checks = [_check("tracking", bad, uris, remedy, status="warn" if not uris.startswith("http") else "fail")]
    unlocked = _bad(facts, lambda row: "answers without a password" if row["tracking"]["open"] else "")
    if unlocked or not bad:
        remedy = "mlflow server --app-name basic-auth"
        checks.append(_check("tracking password", unlocked, "wanted", remedy, status="warn"))
    return checks


def _data(facts: Sequence[Facts], datasets: Sequence[str]) -> list[Check]:
    checks = []
    for name in dict.fromkeys(datasets):
        bad = _bad(facts, lambda row, name=name: "" if name in row["data"] else "missing")  # type: ignore[misc]
        checks.append(_check(f"data {name}", bad, "on every node", "put it on shared storage: MINARI_DATASETS_PATH"))
    if not datasets:
        union = {name for row in facts for name in row["data"]}
        bad = _bad(
            facts, lambda row: ", ".join(sorted(union - set(row["data"]))) and f"lacks {len(union - set(row['data']))}"
        )
        checks.append(
            _check("data", bad, f"{len(union)} data sets on every node", "MINARI_DATASETS_PATH on shared storage")
        )
    return checks


def _gpus(facts: Sequence[Facts]) -> Check:
    def say(row: Facts) -> str:
        seen, offered = row["gpus"]["torch"], row["ray_gpus"]
        return "" if seen == offered else f"torch sees {seen}, Ray offers {offered:g}"

    total = sum(int(row["ray_gpus"]) for row in facts)
    remedy = "driver and torch's CUDA must fit; ray start --num-gpus; docker: the GPU profile"
    return _check("gpus", _bad(facts, say), f"{total}" if total else "none; everything runs on the CPU", remedy)


def _clocks(facts: Sequence[Facts]) -> Check:
    off = {row["node"]: max(0.0, abs(row["clock_s"]) - row["clock_error_s"]) for row in facts}
    worst = max(off.values(), default=0.0)
    bad = {node: f"{seconds:.1f} s off the head's" for node, seconds in off.items() if seconds > CLOCK_WARN_S}
    return _check(
        "clocks",
        bad,
        f"within {max(worst, 0.1):.1f} s",
        "run chrony or systemd-timesyncd on all nodes",
        status="fail" if worst > CLOCK_FAIL_S else "warn",
    )


def _disk(facts: Sequence[Facts]) -> Check:
    def say(row: Facts) -> str:
        return ", ".join(f"{place} {gib:g} GiB" for place, gib in row["disk"].items() if gib < FREE_DISK_GIB)

    least = min((gib for row in facts for gib in row["disk"].values()), default=0.0)
    remedy = f"less than {FREE_DISK_GIB:g} GiB is free; delete old sweeps or sessions of Ray in /tmp"
    return _check("disk", _bad(facts, say), f"{least:g} GiB free at least", remedy, status="warn")


def _token(facts: Sequence[Facts], *, asks_token: bool) -> Check:
    remedy = (
        "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node: whoever reaches it runs what they like"
    )
    bad = {} if asks_token else {"jobs server": "asks for no token"}
    exposed = any(row["ports"] for row in facts)
    return _check("token", bad, "wanted by the jobs server", remedy, status="fail" if exposed else "warn")


def _ports(facts: Sequence[Facts], *, asks_token: bool) -> Check:
    """Ray listens either on loopback or on all interfaces; the latter is for private networks."""

    def say(row: Facts) -> str:
        public = [address for address in row["addresses"] if ipaddress.ip_address(address).is_global]
        return f"{', '.join(row['ports'])} on {', '.join(public)}" if public and row["ports"] else ""

    inner = sum(len(row["ports"]) for row in facts)
    good = f"{inner} ports, on private addresses only" if inner else "all on loopback"
    remedy = "close them in a firewall or security group; a token does not encrypt"
    return _check("open ports", _bad(facts, say), good, remedy, status="warn" if asks_token else "fail")
