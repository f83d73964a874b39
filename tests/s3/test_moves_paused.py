"""Moves are paused, survive a restart of the gateway paused, go on, and are taken back: on real processes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Servers

SIZES = (1, 900, 9_000, 50_000, 300_000)
OBJECTS = 40
QUIET_S = 15
"""Longer than a gateway needs for a round when something may move. A slow machine makes nothing move either."""


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path / "servers")
    try:
        yield found.create()
    finally:
        found.stop()


def job(servers: Servers, *command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(servers.on("gateway", "job", *command, "--json").stdout)
    return found


def partitions_of(servers: Servers) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job, and what status says of moves."""
    status = servers.status()
    jobs = {one["name"]: one for one in status["jobs"] if one["node"] == "cluster"}
    return jobs.get("partitions", {}), status["moving"] or {}


def test_moves_are_paused_across_a_restart_go_on_and_are_taken_back(servers: Servers) -> None:
    rng = random.Random(1)
    bodies = {f"object {number}": rng.randbytes(SIZES[number % len(SIZES)]) for number in range(OBJECTS)}
    s3 = servers.boto3(attempts=5)
    for key, body in bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    for name in ("partitions", "fragments"):
        assert job(servers, "pause", name)["settings"][name]["paused"]
    assert job(servers, "pace", "fragments", "100MiB")["settings"]["fragments"]["bytes_per_s"] == 100 << 20
    before = [node["name"] for node in servers.status()["nodes"] if "storage" in node["roles"]]
    servers.add("n4", "FR/lyo2/d")

    def shown() -> bool:
        return partitions_of(servers)[0].get("state") == "paused"

    servers.wait_until(shown, 120, "the job in status")
    found, moving = partitions_of(servers)
    total = found["total"]
    assert (found["done"], moving["joint"], moving["partitions"]) == (0, 0, total)
    assert total > 100
    servers.begin_again("gateway")
    servers.wait_until(shown, 120, "the job in status after a restart")
    time.sleep(QUIET_S)
    found, moving = partitions_of(servers)
    assert (found["done"], found["total"], moving["joint"]) == (0, total, 0), "a restart ends no pause"

    job(servers, "resume", "partitions")
    servers.wait_until(lambda: partitions_of(servers)[0].get("done", total) > 20, 120, "some partitions")
    job(servers, "pause", "partitions")
    servers.wait_until(lambda: partitions_of(servers)[1].get("joint") == 0, 120, "no partition under way")
    for key, body in bodies.items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key

    servers.abort()
    for name in ("partitions", "fragments"):
        job(servers, "resume", name)
    servers.wait_moved()
    for key, body in bodies.items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key
        rows = servers.where("demo", key)
        assert {row["node"] for row in (*rows["fragments"], *rows["replicas"])} <= set(before), key
    servers.kill_node("n4")
    for key, body in bodies.items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, "the new server has nothing any more"
