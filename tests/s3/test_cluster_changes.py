"""A cluster in use gets a server more, and loses one for good: the commands of deploy/README.md on real processes, with
clients that read and write all the time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.workload import Workload
from tests.servers import Servers

SIZES = (1, 900, 4_096, 9_000, 16_000, 50_000, 300_000, 3_000_000)
OBJECTS = 48
ATTEMPTS = 5
"""On a machine that does much else, too."""
THINK_S = 0.2
"""A client's pause between requests. ``python -m tests.chaos change`` makes shorter ones, and the simulation none."""


class Changed:
    """The cluster, and what is known to be in it."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        rng = random.Random(1)
        self.bodies = {f"object {number}": rng.randbytes(SIZES[number % len(SIZES)]) for number in range(OBJECTS)}

    def nodes_of(self, key: str) -> list[str]:
        """Of its fragments. All can be read, though a small copy may come a moment after its partition has moved: the
        walk that counts it begins then.
        """

        def rows() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = self.servers.where("demo", key)["fragments"]
            return found

        self.servers.wait_until(lambda: {row["state"] for row in rows()} <= {"ok"}, 120, f"all fragments of {key}")
        return [row["node"] for row in rows()]

    def check(self, workload: Workload) -> None:
        s3 = self.servers.boto3(attempts=3)
        for key, body in self.bodies.items():
            assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="demo", Prefix="object ")
        assert {entry["Key"] for page in pages for entry in page.get("Contents", ())} == self.bodies.keys()
        workload.read_everything()
        assert workload.tally.violations() == []


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Changed]:
    servers = Servers(tmp_path / "servers")
    try:
        yield Changed(servers.create())
    finally:
        servers.stop()


def test_a_server_is_added_and_another_one_is_gone_for_good(changed: Changed) -> None:
    servers = changed.servers
    s3 = servers.boto3()
    for key, body in changed.bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    workload = Workload(servers.boto3, "demo", workers=2, attempts=ATTEMPTS, think_s=THINK_S)
    workload.start()

    replicas = servers.add("n4", "FR/lyo2/d")["replicas"]
    assert replicas["moved"] == replicas["ideal"]
    servers.wait_moved()
    workload.stop()
    assert workload.tally.given_up == 0, workload.tally.summary()
    assert workload.tally.acknowledged
    changed.check(workload)
    large = [key for key, body in changed.bodies.items() if len(body) > 262_144]  # smaller ones are copies
    nodes = [node for key in large for node in changed.nodes_of(key)]
    assert nodes.count("n4") > len(nodes) / 8, "its share is a quarter"

    servers.kill_node("n1")
    servers.remove("n1")
    servers.change()  # its disk is a seed: one layout brings the next seed, the other ends the exchange
    servers.wait_moved()
    assert servers.node("n1") is None
    assert not any("n1" in changed.nodes_of(key) for key in changed.bodies)
    changed.check(workload)
    servers.kill_node("n2")
    changed.check(workload)
