"""A server is gone, and nobody types anything: the others take over what it had, so that one more rack may fail. Then
the server returns. Real processes, with clients that read and write.
"""

from __future__ import annotations

from typing import Any

from tests.cluster import free_port
from tests.s3.test_cluster_changes import Changed, Client, changed

__all__ = ["changed"]


def out(changed: Changed) -> set[str]:
    """The nodes with disks that are out."""
    status: dict[str, Any] = changed.cluster.status()
    return {entry["node"] for entry in status.get("sparing", {"out": ()})["out"]}


def test_a_server_that_is_gone_is_replaced_by_itself_then_another_may_fail_and_the_first_returns(
    changed: Changed,
) -> None:
    cluster, folder = changed.cluster, str(changed.authority.directory)
    s3 = cluster.boto3()
    for key, body in changed.bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    place = cluster.directory / "n4"
    changed.admin(
        *("issue", folder, "n4", "--rack", "FR/lyo2/d", "--roles", "storage", "--admin", "none"),
        *("--address", f"127.0.0.1:{free_port()}", "--state", str(place)),
        *("--disk", str(place / "d1"), "--disk", str(place / "d2")),
    )
    changed.admin("sparing", folder, "--fragments", "10s", "--registers", "20s")
    (file,) = changed.layouts()
    changed.apply(file)
    changed.start("n4")
    changed.wait_moved()
    clients = [Client(cluster, number) for number in range(2)]
    for client in clients:
        client.start()

    gone = changed.processes.pop()
    gone.kill()
    gone.wait()
    cluster.wait_until(lambda: out(changed) == {"n4"}, 120, "the disks of n4 out")
    changed.wait_moved()
    problems = [entry for entry in cluster.status()["problems"] if entry["code"] == "DISK_OUT"]
    assert len(problems) == 2
    assert all("have taken over" in entry["detail"] for entry in problems)
    assert not any("n4" in changed.nodes_of(key) for key in changed.bodies)
    for client in clients:
        client.stop()
    assert [client.failed for client in clients] == [[], []]

    cluster.run("dev", "kill", "n1")
    late = Client(cluster, 9)
    late.start()
    cluster.wait_until(lambda: late.done > 20, 60, "writes while two racks are away")
    late.stop()
    assert late.failed == []
    changed.check([*clients, late])
    assert out(changed) == {"n4"}, "two of four nodes vote nothing out"

    cluster.run("dev", "start", "n1")
    changed.start("n4")
    cluster.wait_until(lambda: out(changed) == set(), 120, "n4 back")
    changed.wait_moved()
    changed.check([*clients, late])
    cluster.run("dev", "kill", "n2")
    changed.check([*clients, late])
