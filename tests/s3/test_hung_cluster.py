"""A disk of six hangs, with real processes: clients go on, ``status`` names the disk, and it comes back by itself.

The disk hangs in the kernel (``hanging_disk``). Needs root and /dev/fuse, and is skipped elsewhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benches.hung_cluster import FaultyServers
from tests.worlds.hanging_disk import SYNCS, WRITES, HangingDisk, available, hanging_disk

SIZE = 300_000
CLIENTS = 4


@pytest.fixture
def bad() -> Iterator[HangingDisk]:
    if not available():
        pytest.skip("needs root and /dev/fuse")
    with hanging_disk() as disk:
        yield disk


@pytest.fixture
def servers(tmp_path: Path, bad: HangingDisk) -> Iterator[FaultyServers]:
    found = FaultyServers(tmp_path / "servers", bad)
    try:
        yield found.create()  # type: ignore[misc]
    finally:
        bad.release()
        found.stop()


class Clients:
    """PUT and GET until ``end``. No request is tried again."""

    def __init__(self, servers: FaultyServers) -> None:
        self.bodies: dict[str, bytes] = {}
        self.errors: list[Exception] = []
        self._servers = servers
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        s3 = self._servers.boto3(attempts=1)
        count = 0
        while not self._ending.is_set():
            key, body = f"{number}/{count}", os.urandom(SIZE)
            count += 1
            try:
                s3.put_object(Bucket="demo", Key=key, Body=body)
                self.bodies[key] = body
                assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body
            except Exception as error:
                self.errors.append(error)

    def more(self, count: int = 12) -> None:
        """Returns when so many more were written. None may fail."""
        before = len(self.bodies)
        self._servers.wait_until(lambda: self.errors or len(self.bodies) >= before + count, 120, "clients that go on")
        assert not self.errors, self.errors[:3]

    def end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


def codes(servers: FaultyServers) -> set[str]:
    found: dict[str, Any] = servers.status()
    return {entry["code"] for entry in (*found["problems"], *found["warnings"]) if entry["code"].startswith("DISK")}


def test_clients_go_on_while_a_disk_hangs_and_it_takes_part_again_when_it_answers(
    servers: FaultyServers, bad: HangingDisk
) -> None:
    pids = servers.pids()
    clients = Clients(servers)
    try:
        clients.more()
        bad.hang(SYNCS, WRITES)
        servers.wait_until(lambda: codes(servers) & {"DISK_SLOW", "DISK_HUNG"}, 60, "a disk that is left out")
        clients.more()
        servers.wait_until(lambda: "DISK_HUNG" in codes(servers), 60, "a disk that hangs")
        clients.more()
        bad.release()
        servers.wait_until(lambda: not codes(servers), 90, "a disk that is well again")
        clients.more()
    finally:
        clients.end()
    assert not clients.errors
    assert servers.pids() == pids, "no node ended"
    s3 = servers.boto3(attempts=1)
    for key, body in clients.bodies.items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body
