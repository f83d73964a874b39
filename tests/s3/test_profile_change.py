"""The profile of a cluster in use changes: the commands of deploy/README.md on real processes, with clients that read
and write all the time, and a rack that goes meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged.fragments.engine import Engine
from storaged.fragments.files import PosixFiles
from storaged.fragments.index import Index
from storaged.fragments.limits import StoreLimits
from storaged.fragments.offline import disk_id_of
from storaged.fragments.ports import FragmentId
from tests.cluster import Cluster
from tests.s3.test_cluster_changes import Changed, Client

DROP_DELAY_S = 10
CHECKS_MAX = 12


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Changed]:
    cluster = Cluster(tmp_path / "s3")
    try:
        cluster.start()
        yield Changed(cluster)
    finally:
        cluster.stop()


def set_profile(changed: Changed, profile: str) -> None:
    folder = str(changed.authority.directory)
    before = changed.admin("profile", folder, profile, "--dry-run")
    assert "bytes are stored for each byte" in before
    changed.admin("profile", folder, profile)
    assert f"to {profile}" in changed.admin("plan", folder)
    (file,) = changed.layouts()
    changed.apply(file)


def profiles(cluster: Cluster, key: str) -> set[str]:
    return {row["profile"] for row in cluster.where("demo", key)["fragments"]}


def wait_recoded(cluster: Cluster) -> None:
    def recoded() -> bool:
        status: dict[str, Any] = cluster.status()
        moving = status.get("moving")
        if not moving or not status["objects_counted"]:
            return False
        return not (moving["recoding"] or moving["objects"] or status["objects_below_target"])

    cluster.wait_until(recoded, 240, "everything under the new profile")


def profiles_on_disks(cluster: Cluster) -> dict[bytes, set[str]]:
    """Data id -> the profiles of its fragments, by what lies on the disks. The cluster is stopped."""
    found: dict[bytes, set[str]] = {}
    for directory in cluster.directory.glob("n*/d*/fragments"):
        files = PosixFiles(directory)
        index = Index(directory / "index", disk_id_of(files))
        try:
            Engine(files, index, StoreLimits(), now_ms=lambda: 0, on_damage=lambda _key, _cell: None).recover(
                read_only=True
            )
            for key, _ in index.entries():
                fragment = FragmentId.unpack(key)
                found.setdefault(fragment.data_id, set()).add(f"{fragment.k}+{fragment.m}")
        finally:
            index.close()
            files.close()
    return found


def test_the_profile_of_a_cluster_in_use_changes_twice(changed: Changed) -> None:
    cluster = changed.cluster
    config = cluster.directory / "gateway" / "config.toml"
    config.write_text(config.read_text() + f"\n[limits]\ndrop_delay_s = {DROP_DELAY_S}\n")
    cluster.run("dev", "kill", "gateway")
    cluster.run("dev", "start", "gateway")
    s3 = cluster.boto3(attempts=5)
    for key, body in changed.bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    large = [key for key, body in changed.bodies.items() if len(body) > 16 * 1024]
    assert all(profiles(cluster, key) == {"4+2"} for key in large)
    clients = [Client(cluster, number) for number in range(2)]
    for client in clients:
        client.start()

    set_profile(changed, "2+1")
    changed.bodies["new"] = b"n" * 100_000
    s3.put_object(Bucket="demo", Key="new", Body=changed.bodies["new"])
    assert profiles(cluster, "new") == {"2+1"}
    wait_recoded(cluster)
    for client in clients:
        client.stop()
    assert [client.failed for client in clients] == [[], []]
    assert all(client.done for client in clients)
    assert all(profiles(cluster, key) == {"2+1"} for key in large)
    changed.check(clients)

    set_profile(changed, "4+2")
    cluster.run("dev", "kill", "n3")  # whatever has been coded again, any rack may fail
    changed.check(clients)
    cluster.run("dev", "start", "n3")
    cluster.wait_until(lambda: cluster.status()["verdict"] == "HEALTHY", 60, "all nodes")
    wait_recoded(cluster)
    assert all(profiles(cluster, key) == {"4+2"} for key in large)
    assert {row["state"] for key in large for row in cluster.where("demo", key)["fragments"]} == {"ok"}

    for _ in range(CHECKS_MAX):  # the old fragments go a while after the record has changed
        cluster.stop()
        mixed = [found for found in profiles_on_disks(cluster).values() if len(found) > 1]
        cluster.start()
        if not mixed:
            break
        time.sleep(DROP_DELAY_S)
    assert not mixed
    cluster.run("dev", "kill", "n1")
    changed.check(clients)
