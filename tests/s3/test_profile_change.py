"""The profile of a cluster in use changes: the commands of deploy/README.md on real processes, with clients that read
and write all the time, and a rack that goes meanwhile.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.fragments.engine import Engine
from storaged.fragments.files import PosixFiles
from storaged.fragments.index import Index
from storaged.fragments.limits import StoreLimits
from storaged.fragments.offline import disk_id_of
from storaged.fragments.ports import REPLACED, FragmentId
from tests.chaos.workload import Workload
from tests.servers import Servers

SIZES = (1, 900, 9_000, 50_000, 300_000, 3_000_000)
OBJECTS = 36
ATTEMPTS = 5
THINK_S = 0.2
"""A client's pause between requests."""
DROP_DELAY_S = 10
COLLECTED_S = 45
"""After the delay a disk's collector looks at its list every 20 s. A check stops the nodes, and it begins again."""
CHECKS_MAX = 8


class Reprofiled:
    """A cluster, and the objects in it."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        rng = random.Random(1)
        self.bodies = {f"object {number}": rng.randbytes(SIZES[number % len(SIZES)]) for number in range(OBJECTS)}
        s3 = servers.boto3(attempts=ATTEMPTS)
        for key, body in self.bodies.items():
            s3.put_object(Bucket="demo", Key=key, Body=body)

    def set_profile(self, profile: str) -> None:
        authority = str(self.servers.authority)
        assert "for each byte" in self.servers.run("cluster", "profile", authority, profile, "--dry-run").stdout
        self.servers.run("cluster", "profile", authority, profile)
        assert self.servers.change()["profile"]["after"] == profile

    def profiles(self, key: str) -> set[str]:
        rows = self.servers.where("demo", key)["fragments"]
        assert {row["state"] for row in rows} <= {"ok"}, key
        return {row["profile"] for row in rows if row["kind"] == "coded"}

    def have(self, profile: str) -> bool:
        """All that is coded."""
        return set().union(*(self.profiles(key) for key in self.bodies)) == {profile}

    def wait_recoded(self) -> None:
        def recoded() -> bool:
            status = self.servers.status()
            moving = status["moving"]
            if not moving or not status["objects_counted"] or status["objects_below_target"]:
                return False
            return moving["recoding"] == 0 and moving["objects"] == 0

        self.servers.wait_until(recoded, 240, "everything under the new profile")

    def check(self, workload: Workload) -> None:
        s3 = self.servers.boto3(attempts=ATTEMPTS)
        for key, body in self.bodies.items():
            assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key
        workload.read_everything()
        assert workload.tally.violations() == []


@pytest.fixture
def reprofiled(tmp_path: Path) -> Iterator[Reprofiled]:
    servers = Servers(tmp_path / "servers")
    try:
        servers.create()
        config = servers.servers["gateway"].config
        config.write_text(config.read_text() + f"\n[limits]\ndrop_delay_s = {DROP_DELAY_S}\n")
        servers.begin_again("gateway")
        yield Reprofiled(servers)
    finally:
        servers.stop()


def profiles_on_disks(servers: Servers) -> dict[bytes, set[str]]:
    """Data id -> the profiles of its fragments, by what lies on the disks. The storage nodes are stopped.

    Without what clients have overwritten. It stays an hour for readers, also where repair was just coding it again.
    """
    found: dict[bytes, set[str]] = {}
    overwritten: set[bytes] = set()
    for directory in servers.root.glob("n*/d*/fragments"):
        files = PosixFiles(directory)
        index = Index(directory / "index", disk_id_of(files))
        try:
            engine = Engine(files, index, StoreLimits(), now_ms=lambda: 0, on_damage=lambda _key, _cell: None)
            engine.recover(read_only=True)
            for key, _ in index.entries():
                fragment = FragmentId.unpack(key)
                found.setdefault(fragment.data_id, set()).add(f"{fragment.k}+{fragment.m}")
                retired = index.retired(fragment.data_id)
                if retired is not None and retired.origin == REPLACED:
                    overwritten.add(fragment.data_id)
        finally:
            index.close()
            files.close()
    left = {data_id: profiles for data_id, profiles in found.items() if data_id not in overwritten}
    assert len(left) >= OBJECTS // 2
    return left


def test_the_profile_of_a_cluster_in_use_changes_twice(reprofiled: Reprofiled) -> None:
    servers = reprofiled.servers
    assert reprofiled.have("4+2")
    workload = Workload(servers.boto3, "demo", workers=2, attempts=ATTEMPTS, think_s=THINK_S)
    workload.start()
    reprofiled.set_profile("2+1")
    reprofiled.bodies["new"] = b"n" * 300_000
    servers.boto3(attempts=ATTEMPTS).put_object(Bucket="demo", Key="new", Body=reprofiled.bodies["new"])
    assert reprofiled.profiles("new") == {"2+1"}
    reprofiled.wait_recoded()
    workload.stop()
    assert workload.tally.given_up == 0, workload.tally.summary()
    assert workload.tally.acknowledged
    assert reprofiled.have("2+1")
    reprofiled.check(workload)

    reprofiled.set_profile("4+2")
    servers.kill_node("n3")  # whatever has been coded again, any rack may fail
    reprofiled.check(workload)
    servers.start_node("n3")
    servers.wait_healthy(120)
    reprofiled.wait_recoded()
    assert reprofiled.have("4+2")

    nodes = ("n1", "n2", "n3")
    for _ in range(CHECKS_MAX):  # the old fragments go a while after the record has changed
        time.sleep(COLLECTED_S)
        for name in nodes:
            servers.stop_node(name)
        mixed = [found for found in profiles_on_disks(servers).values() if len(found) > 1]
        for name in nodes:
            servers.begin(name)
        servers.wait_healthy(120)
        if not mixed:
            break
    assert not mixed
    servers.kill_node("n1")
    reprofiled.check(workload)
