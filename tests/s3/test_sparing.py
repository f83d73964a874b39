"""A server is gone, and nobody types anything: the others take over what it had, so that one more rack may fail. Then
the server returns. Real processes, with clients that read and write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.workload import Workload
from tests.cluster import RACKS
from tests.s3.test_cluster_changes import ATTEMPTS, THINK_S, Changed
from tests.servers import Servers


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Changed]:
    servers = Servers(tmp_path / "servers")
    try:
        yield Changed(servers.create({**RACKS, "n4": "FR/lyo2/d"}))
    finally:
        servers.stop()


def out(servers: Servers) -> set[str]:
    """The nodes with disks that are out."""
    status: dict[str, Any] = servers.status()
    return {entry["node"] for entry in status.get("sparing", {"out": ()})["out"]}


def work(servers: Servers, bucket: str) -> Workload:
    """It has the keys of the bucket for itself."""
    found = Workload(servers.boto3, bucket, workers=2, attempts=ATTEMPTS, think_s=THINK_S)
    found.start()
    return found


def seed_nodes(servers: Servers) -> list[str]:
    """The nodes with a seed disk; none while the system partition moves."""
    found: dict[str, Any] = servers.status().get("sparing", {"seed_moves": True})
    return [] if found["seed_moves"] else sorted(seed["node"] for seed in found["seeds"])


def problems(servers: Servers, code: str) -> list[dict[str, Any]]:
    return [entry for entry in servers.status()["problems"] if entry["code"] == code]


def test_a_server_that_is_gone_is_replaced_by_itself_then_another_may_fail_and_the_first_returns(
    changed: Changed,
) -> None:
    """It has a seed disk, so that the system partition gets another replica, too."""
    servers = changed.servers
    s3 = servers.boto3()
    for key, body in changed.bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    servers.run("cluster", "sparing", str(servers.authority), "--fragments", "10s", "--registers", "20s")
    assert not servers.change()["moves_data"]
    assert seed_nodes(servers) == ["n1", "n2", "n3"]
    warnings = [entry["code"] for entry in servers.status()["warnings"] if not entry["code"].startswith("DISK")]
    assert not warnings, "each seed disk has a spare"
    workload = work(servers, "demo")

    servers.kill_node("n1")
    servers.wait_until(lambda: out(servers) == {"n1"}, 120, "the disks of n1 out")
    servers.wait_until(lambda: seed_nodes(servers) == ["n2", "n3", "n4"], 120, "three living seed disks")
    assert not problems(servers, "SEED_DISK_OUT")
    servers.wait_moved()
    out_now = problems(servers, "DISK_OUT")
    assert len(out_now) == 2
    assert all("have taken over" in entry["detail"] for entry in out_now)
    assert not any("n1" in changed.nodes_of(key) for key in changed.bodies)
    workload.stop()
    assert workload.tally.given_up == 0, workload.tally.summary()
    changed.check(workload)

    servers.kill_node("n2")
    changed.check(workload)
    s3.create_bucket(Bucket="later")
    later = work(servers, "later")
    servers.wait_until(lambda: later.tally.acknowledged > 20, 120, "writes while two racks are away")
    later.stop()
    assert later.tally.given_up == 0, later.tally.summary()
    assert out(servers) == {"n1"}, "two of four nodes vote nothing out"

    servers.start_node("n2")
    servers.start_node("n1")
    servers.wait_until(lambda: out(servers) == set(), 120, "n1 back")
    servers.wait_moved()
    assert seed_nodes(servers) == ["n2", "n3", "n4"], "n1 has lost its place"
    servers.kill_node("n3")
    for each in (workload, later):
        changed.check(each)
