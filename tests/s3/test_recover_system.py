"""Two servers are lost for good, and with them the majority of the seed disks: what the guide says, on real processes.
The seed disk that is left had everything, so nothing is lost. A server that comes back after that takes no part.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.cluster import RACKS
from tests.servers import Servers

FOUR = {**RACKS, "n4": "FR/lyo2/d"}
SIZES = (1, 900, 9_000)
"""Small objects have whole copies at all replicas. Of larger ones two racks of four have too many fragments."""
OBJECTS = 30


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path / "servers")
    try:
        yield found.create(FOUR)
    finally:
        found.stop()


def losses(servers: Servers, *disks: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(servers.on("gateway", "cluster", "losses", *disks, "--json").stdout)
    return found


def writes(s3: Any, key: str) -> bool:
    try:
        s3.put_object(Bucket="demo", Key=key, Body=b"x")
    except (ClientError, BotoCoreError):
        return False
    return True


def test_the_system_partition_goes_on_from_the_seed_disk_that_is_left(servers: Servers, tmp_path: Path) -> None:
    rng = random.Random(1)
    bodies = {f"object {number}": rng.randbytes(SIZES[number % len(SIZES)]) for number in range(OBJECTS)}
    s3 = servers.boto3(attempts=5)
    for key, body in bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    servers.on("gateway", "user", "add", "second", "--json")
    servers.wait_healthy(240)
    lost = [disk for name in ("n2", "n3") for disk in servers.servers[name].disk_ids().values()]
    (seed,) = [servers.servers["n1"].disk_ids()["d1"]]
    for name in ("n2", "n3"):
        servers.kill_node(name)
    servers.wait_until(lambda: not losses(servers, *lost)["answering"], 60, "the disks are away")

    found = losses(servers, *lost)
    assert found["system_lost"]
    assert (found["system"]["left"], found["silent"], found["unknown"]) == ([seed], [], [])
    assert (found["system"]["registers"]["buckets"], found["system"]["registers"]["users"]) == (1, 2)
    file = tmp_path / "losses.json"
    file.write_text(json.dumps(found))

    servers.invite("n5", "FR/lyo2/e")
    for name in ("n2", "n3"):
        servers.remove(name)
    recover = ("cluster", "recover", str(servers.authority), "--losses", str(file))
    said = servers.run(*recover).stdout
    assert "the system partition has no majority without seed disk" in said
    assert f"seed disk {seed} is left, with 1 buckets" in said
    words = f"lose the system partition and {len(found['partitions'])} partitions; {' '.join(lost)} are powered off"
    assert "RECOVER_REFUSED" in servers.run(*recover, "--unsafe", "--words", words, check=False).stderr
    known = set(servers._signed())
    servers.run(*recover, "--unsafe", "--words", f"{words} for ever")
    files = [path for path in servers._signed() if path not in known]
    assert len(files) == 5, "the recovery, and two for each seed disk"
    servers.join("n5")
    servers.begin("n5")
    for each in files:
        servers.apply(each)
    servers.wait_moved()

    for key, body in bodies.items():
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == body
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="demo")
    assert {entry["Key"] for page in pages for entry in page.get("Contents", ())} == bodies.keys()
    assert "second" in servers.on("gateway", "user", "list").stdout
    s3.create_bucket(Bucket="later")

    returned(servers, "n2")
    servers.kill_node("n4")
    servers.begin_again("n5")
    once = servers.boto3(attempts=10)
    servers.wait_until(lambda: writes(once, "after"), 120, "writes while one more server is away")
    for key, body in bodies.items():
        assert once.get_object(Bucket="demo", Key=key)["Body"].read() == body
    servers.on("gateway", "user", "add", "third", "--json")


def returned(servers: Servers, name: str) -> None:
    """A lost server is switched on. It learns that its disks are lost, and they take no part."""
    servers.begin(name)
    servers.wait_until(
        lambda: servers.log_of(name, 500).count("calls it lost for good") >= 2, 120, f"{name} is refused"
    )
    assert servers.status()["verdict"] != "DOWN"
    assert all(node["name"] != name for node in servers.status()["nodes"])
