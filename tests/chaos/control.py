"""Stops, kills and starts nodes of a trial cluster, and asks for its status, in this process.

A command of its own for each would load a whole Python: on a busy machine these take most of the time of a run.
"""

from __future__ import annotations

from typing import Any

from storaged.cli.client import gateway
from storaged.cli.supervisor import READY_TIMEOUT_S, STOP_TIMEOUT_S, control
from storaged.errors import StoragedError
from tests.cluster import Cluster
from tests.patience import SLOWNESS

STARTS_MAX = 5


def stop(cluster: Cluster, node: str) -> None:
    _obeyed(cluster, "stop", node)


def kill(cluster: Cluster, node: str) -> None:
    _obeyed(cluster, "kill", node)


def start(cluster: Cluster, node: str) -> None:
    """The supervisor gives up after a while, and a busy machine may need longer: the node goes on starting."""
    answer: dict[str, Any] = {}
    for _ in range(STARTS_MAX):
        answer = _ask(cluster, "start", node)
        if "code" not in answer:
            return
    raise AssertionError(f"{node} does not start: {answer} {cluster.log_tail()}")


def status(cluster: Cluster) -> dict[str, Any]:
    """Of the gateway; with no nodes while it is away."""
    try:
        found: dict[str, Any] = gateway(cluster.directory, "GET", "/v1/status")
    except (StoragedError, OSError, ValueError):
        return {"nodes": [], "problems": [], "verdict": "DOWN"}
    return found


def all_up(cluster: Cluster) -> bool:
    nodes = status(cluster)["nodes"]
    return len(nodes) == 4 and all(node["state"] == "up" for node in nodes)


def pid_of(cluster: Cluster, node: str) -> int:
    """Of a node that runs."""
    nodes = _ask(cluster, "nodes", "")["nodes"]
    return next(int(entry["pid"]) for entry in nodes if entry["name"] == node)


def _obeyed(cluster: Cluster, action: str, node: str) -> None:
    answer = _ask(cluster, action, node)
    assert "code" not in answer, f"{action} {node}: {answer}"


def _ask(cluster: Cluster, action: str, node: str) -> dict[str, Any]:
    guard_s = SLOWNESS * (READY_TIMEOUT_S + STOP_TIMEOUT_S)
    return control(cluster.directory, {"do": action, "name": node}, guard_s)
