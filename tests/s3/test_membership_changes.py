"""Racks get other names and running nodes are revoked, on real processes: nothing moves, and what was written stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from storaged.cli.client import request
from storaged.errors import StoragedError
from tests.servers import Servers

BODIES = {f"key-{number}": f"body {number}".encode() * (1 + 40_000 * (number % 3)) for number in range(12)}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    found = Servers(tmp_path_factory.mktemp("membership") / "servers")
    try:
        found.create()
        for key, body in BODIES.items():
            found.boto3(attempts=5).put_object(Bucket="demo", Key=key, Body=body)
        yield found
    finally:
        found.stop()


def check_all(servers: Servers) -> None:
    s3 = servers.boto3(attempts=5)
    for key, body in BODIES.items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key


def codes_of(servers: Servers, name: str) -> dict[str, str]:
    """The problems that a node itself reports: code -> detail."""
    found: dict[str, Any] = {"problems": []}
    with contextlib.suppress(StoragedError, OSError, ValueError):
        found = request(servers.servers[name].state, "GET", "/v1/status")
    return {problem["code"]: problem["detail"] for problem in found["problems"]}


def test_a_rack_is_renamed_while_the_cluster_works(servers: Servers) -> None:
    """All nodes stay up under layouts before and after, also one that was away, or starts again."""
    where = {key: servers.where("demo", key) for key in BODIES}
    disks = {key: sorted(row["disk"] for row in found["fragments"]) for key, found in where.items()}
    servers.stop_node("n3")
    servers.run("rack", "rename", str(servers.authority), "FR/par1/a", "FR/par9/z")
    planned = servers.change()
    assert (planned["moves_data"], planned["partitions"]) == (False, 0)
    servers.start_node("n3")
    servers.wait_healthy(120)
    servers.begin_again("n1")
    servers.wait_healthy(120)
    status = servers.status()
    assert {node["name"]: node["rack"] for node in status["nodes"]} == {
        "n1": "FR/par9/z",
        "n2": "FR/par2/b",
        "n3": "FR/lyo1/c",
        "gateway": "FR/par9/z",
    }
    assert (status["moving"]["partitions"], status["moving"]["objects"]) == (0, 0)
    for key, placed in disks.items():
        assert sorted(row["disk"] for row in servers.where("demo", key)["fragments"]) == placed
    check_all(servers)
    assert "this node presents" not in servers.log_of("n1", 200), "no certificate was renewed"


def test_a_running_node_is_revoked_and_comes_back_with_another_certificate(servers: Servers) -> None:
    """Its connections end although both sides keep running; it says why itself; nobody else is affected."""
    servers.run("cluster", "revoke", str(servers.authority), "n2")
    planned = servers.change()
    assert planned["moves_data"] is False
    assert any("of n2 is revoked" in change for change in planned["changes"])

    def is_out() -> bool:
        node = servers.node("n2")
        return node is not None and node["state"] == "down"

    servers.wait_until(is_out, 60, "n2 away")
    servers.wait_until(lambda: "CERTIFICATE_REVOKED" in codes_of(servers, "n2"), 60, "n2 says that it is revoked")
    assert servers.runs("n2")
    assert "own certificate" in servers.on("n2", "doctor", check=False).stdout
    check_all(servers)
    servers.boto3(attempts=5).put_object(Bucket="demo", Key="meanwhile", Body=b"m")
    servers.begin_again("n2")
    servers.wait_until(lambda: "CERTIFICATE_REVOKED" in codes_of(servers, "n2"), 60, "n2 says so again")
    assert is_out()

    servers.renew("n2")
    servers.reload("n2")
    servers.wait_until(lambda: not is_out() and "CERTIFICATE_REVOKED" not in codes_of(servers, "n2"), 60, "n2 again")
    servers.wait_healthy(180)
    check_all(servers)
