"""Two disks in different racks are lost for good, with the majority of some partitions: what the guide says, on real
processes. Every object had all of its replicas, so nothing is lost.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.cluster import RACKS
from tests.servers import Servers

FOUR = {**RACKS, "n4": "FR/lyo2/d"}
SIZES = (1, 900, 9_000, 50_000, 300_000)
OBJECTS = 60


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path / "servers")
    try:
        yield found.create(FOUR)
    finally:
        found.stop()


def lose(servers: Servers, name: str, disk: str) -> str:
    """A disk is gone, and another one, blank, is in its place. Returns its id."""
    servers.stop_node(name)
    place = servers.servers[name].folder / disk
    shutil.rmtree(place)
    place.mkdir()
    servers.start_node(name)
    return servers.servers[name].disk_ids()[disk]


def losses(servers: Servers, *disks: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(servers.on("gateway", "cluster", "losses", *disks, "--json").stdout)
    return found


def reads(s3: Any, key: str) -> bytes | None:
    try:
        body: bytes = s3.get_object(Bucket="demo", Key=key)["Body"].read()
    except (ClientError, BotoCoreError):
        return None
    return body


def test_partitions_go_on_from_the_disk_that_is_left(servers: Servers, tmp_path: Path) -> None:
    rng = random.Random(1)
    bodies = {f"object {number}": rng.randbytes(SIZES[number % len(SIZES)]) for number in range(OBJECTS)}
    s3 = servers.boto3(attempts=5)
    for key, body in bodies.items():
        s3.put_object(Bucket="demo", Key=key, Body=body)
    servers.wait_healthy(240)
    ids = [servers.servers[name].disk_ids()[disk] for name, disk in (("n3", "d2"), ("n4", "d1"))]
    assert losses(servers, *ids)["answering"] == ids, "they still answer"
    assert [lose(servers, "n3", "d2"), lose(servers, "n4", "d1")] == ids
    servers.wait_until(lambda: not losses(servers, *ids)["answering"], 60, "the disks are away")
    found = losses(servers, *ids)
    assert found["partitions"]
    assert not found["system_lost"]
    assert servers.status()["verdict"] == "DOWN"
    once = servers.boto3(attempts=1)
    stopped = [key for key in bodies if reads(once, key) is None]

    file = tmp_path / "losses.json"
    file.write_text(json.dumps(found))
    recover = ("cluster", "recover", str(servers.authority), "--losses", str(file))
    said = servers.run(*recover).stdout
    assert "have no majority without disk" in said
    words = f"lose {len(found['partitions'])} partitions; {' '.join(ids)} are powered off for ever"
    refused = servers.run(*recover, "--unsafe", "--words", "yes", check=False)
    assert "RECOVER_REFUSED" in refused.stderr
    servers.run(*recover, "--unsafe", "--words", words)
    servers.apply(servers.authority / "layouts" / "layout-100.signed")
    servers.wait_moved()
    for key, body in bodies.items():
        assert reads(s3, key) == body, f"{key}, which {'was' if key in stopped else 'was not'} stopped"
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="demo")
    assert {entry["Key"] for page in pages for entry in page.get("Contents", ())} == bodies.keys()
    for key in bodies:
        s3.put_object(Bucket="demo", Key=key, Body=b"after")
    servers.kill_node("n1")
    for key in bodies:
        assert reads(s3, key) == b"after", "one rack may fail again"
