"""A cluster in use gets a server more, and loses one for good: the commands of deploy/README.md on real processes, with
clients that read and write all the time.
"""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from storaged.cli import create
from storaged.cluster.issuing import load_authority
from tests.cluster import STORAGED, Cluster, free_port
from tests.patience import SLOWNESS

SIZES = (1, 900, 4_096, 9_000, 16_000, 50_000, 300_000, 3_000_000)
OBJECTS = 48
ATTEMPTS = 5
"""On a machine that does much else, too."""


class Client(threading.Thread):
    """Writes and reads back until it is stopped. Like an SDK, it tries a request again that was refused."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(daemon=True)
        self._s3 = cluster.boto3(attempts=1)
        self._number = number
        self._random = random.Random(number)
        self._stopped = threading.Event()
        self.written: dict[str, bytes | None] = {}
        """None: the last write of this key failed, and may have been done."""
        self.done = 0
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            key = f"client {self._number}/{self.done % 25}"
            body = self._random.randbytes(self._random.choice(SIZES[:6]))
            for attempt in range(ATTEMPTS):
                try:
                    self.written[key] = None
                    self._s3.put_object(Bucket="demo", Key=key, Body=body)
                    self.written[key] = body
                    if self._s3.get_object(Bucket="demo", Key=key)["Body"].read() != body:
                        self.failed.append(f"{key} is not what was written")
                    break
                except (ClientError, BotoCoreError) as error:
                    if attempt == ATTEMPTS - 1:
                        self.failed.append(f"{key}: {error}")
                    self._stopped.wait(1.0)
            self.done += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join(60 * SLOWNESS)


class Changed:
    """The cluster, and what a client knows to be in it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.authority = load_authority(cluster.directory / "authority")
        rng = random.Random(1)
        self.bodies = {f"object {number}": rng.randbytes(SIZES[number % len(SIZES)]) for number in range(OBJECTS)}
        self.processes: list[subprocess.Popen[bytes]] = []

    def admin(self, *command: str) -> str:
        return self.cluster.run("cluster", *command).stdout

    def layouts(self) -> list[Path]:
        """Signs what follows, and returns the files to apply, in their order."""
        known = set(self._files())
        self.admin("layout", str(self.authority.directory))
        return [path for path in self._files() if path not in known]

    def _files(self) -> list[Path]:
        folder = create.layout_path(self.authority, 1).parent
        return sorted(folder.glob("layout-*.signed"), key=lambda path: int(path.stem.split("-")[1]))

    def apply(self, file: Path) -> None:
        """It may have to be repeated while rows of the system partition are copied."""
        self.cluster.wait_until(
            lambda: self.cluster.run("cluster", "apply", str(file), check=False, timeout_s=120).returncode == 0,
            120,
            f"{file.name} in force",
        )

    def start(self, node: str) -> None:
        config = self.authority.directory / "nodes" / node / "config.toml"
        log = (self.cluster.directory.parent / f"{node}.log").open("ab")
        command = [STORAGED, "run", str(config)]
        self.processes.append(
            subprocess.Popen(command, env=self.cluster.environment(), stdout=log, stderr=log, start_new_session=True)
        )

    def wait_moved(self) -> None:
        def moved() -> bool:
            status: dict[str, Any] = self.cluster.status()
            moving = status["moving"]
            waits = moving["partitions"] != 0 or moving["objects"] or moving["system"] or status["objects_below_target"]
            return status["objects_counted"] and not waits

        self.cluster.wait_until(moved, 240, "everything where the layout wants it")

    def nodes_of(self, key: str) -> list[str]:
        """Of its fragments. All can be read."""
        rows = self.cluster.where("demo", key)["fragments"]
        assert {row["state"] for row in rows} <= {"ok"}, key
        return [row["node"] for row in rows]

    def check(self, clients: list[Client]) -> None:
        s3 = self.cluster.boto3(attempts=3)
        everything: dict[str, bytes | None] = dict(self.bodies)
        for client in clients:
            everything.update(client.written)
        for key, body in everything.items():
            if body is not None:
                assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body, key
        listed = {
            entry["Key"]
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket="demo")
            for entry in page.get("Contents", ())
        }
        assert {key for key, body in everything.items() if body is not None} <= listed <= everything.keys()


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Changed]:
    cluster = Cluster(tmp_path / "s3")
    found = None
    try:
        cluster.start()
        found = Changed(cluster)
        yield found
    finally:
        for process in found.processes if found is not None else ():
            process.send_signal(signal.SIGTERM)
            process.wait(60 * SLOWNESS)
        cluster.stop()


def test_a_server_is_added_and_another_one_is_gone_for_good(changed: Changed) -> None:
    cluster, folder = changed.cluster, str(changed.authority.directory)
    s3 = cluster.boto3()
    for key, body in changed.bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    clients = [Client(cluster, number) for number in range(2)]
    for client in clients:
        client.start()

    place = cluster.directory / "n4"
    changed.admin(
        *("issue", folder, "n4", "--rack", "FR/lyo2/d", "--roles", "storage", "--admin", "none"),
        *("--address", f"127.0.0.1:{free_port()}", "--state", str(place)),
        *("--disk", str(place / "d1"), "--disk", str(place / "d2")),
    )
    assert "1.00 times the ideal" in changed.admin("plan", folder)
    (file,) = changed.layouts()
    changed.apply(file)
    changed.start("n4")
    changed.wait_moved()
    for client in clients:
        client.stop()
    assert [client.failed for client in clients] == [[], []]
    assert all(client.done for client in clients)
    changed.check(clients)
    large = [key for key, body in changed.bodies.items() if len(body) > 100_000]
    nodes = [node for key in large for node in changed.nodes_of(key)]
    assert nodes.count("n4") > len(nodes) / 8, "its share is a quarter"

    cluster.run("dev", "kill", "n1")
    changed.admin("remove", folder, "n1")
    for file in changed.layouts():  # its disk is a seed: one layout brings the next seed, the other ends the exchange
        changed.apply(file)
    changed.wait_moved()
    assert not any(node["name"] == "n1" for node in cluster.status()["nodes"])
    assert not any("n1" in changed.nodes_of(key) for key in changed.bodies)
    changed.check(clients)
    cluster.run("dev", "kill", "n2")
    changed.check(clients)
