"""A cluster fills up, is full, and is emptied again: real processes, on disks that are small file systems.

A full cluster reads, lists and deletes. It refuses every write that takes room, the smallest too, and says so. It comes
back by itself when there is room.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storaged.units import MIB
from tests.cluster import RACKS
from tests.servers import DISKS, Servers
from tests.worlds.small_disk import SmallDisks

DISK_BYTES = 128 * MIB
LIMITS = '\n[limits]\nreserve_bytes = "24 MiB"\nretire_delay_s = 10\n'
FULL = (507, "InsufficientStorage")
TINY_BYTES = 900
OBJECTS_MAX = 600
"""More than fit."""
FREE_PART = 0.2
"""What one of four servers has does not fit into so much: the others would get a third more each."""


class SmallServers(Servers):
    def __init__(self, root: Path, disks: SmallDisks) -> None:
        super().__init__(root)
        self._disks = disks

    def install(self, name: str) -> None:
        super().install(name)
        server = self.servers[name]
        server.config.write_text(server.config.read_text() + LIMITS)
        if not server.s3_port:
            for disk in DISKS:
                self._disks.mount(server.folder / disk, DISK_BYTES)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[SmallServers]:
    disks = SmallDisks()
    found = SmallServers(tmp_path / "servers", disks)
    try:
        yield found.create()  # type: ignore[misc]
    finally:
        found.stop()
        disks.close()


@pytest.fixture
def four(tmp_path: Path) -> Iterator[SmallServers]:
    disks = SmallDisks()
    found = SmallServers(tmp_path / "servers", disks)
    try:
        yield found.create({**RACKS, "n4": "FR/lyo2/d"})  # type: ignore[misc]
    finally:
        found.stop()
        disks.close()


def answer(call: Any, **arguments: Any) -> tuple[int, str]:
    from botocore.exceptions import ClientError

    try:
        call(Bucket="demo", **arguments)
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
    return 200, ""


def states(servers: Servers) -> set[str]:
    return {disk["state"] for node in servers.status()["nodes"] for disk in node["disks"]}


def fill(servers: Servers, s3: Any, size: int, names: str) -> list[str]:
    """PUTs until the cluster says that it is full. Returns the keys that it took."""
    taken: list[str] = []
    for number in range(OBJECTS_MAX):
        key = f"{names}/{number:04}"
        said = answer(s3.put_object, Key=key, Body=os.urandom(size))
        if said == FULL:
            return taken
        if said[0] == 200:
            taken.append(key)
        else:  # the disks said no in the middle of a write, before heartbeats said it
            assert said[0] == 503, said
    raise AssertionError(f"{OBJECTS_MAX} objects of {size} bytes fit: {servers.status()}")


def everything(s3: Any) -> list[dict[str, Any]]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="demo")
    return [entry for page in pages for entry in page.get("Contents", ())]


def refused(servers: Servers, call: Any, **arguments: Any) -> None:
    """A write is refused, as soon as what failed writes give back is used up again. None gets another answer."""
    seen: Counter[tuple[int, str]] = Counter()

    def full() -> bool:
        said = answer(call, **arguments)
        seen[said] += 1
        return said == FULL

    servers.wait_until(full, 60, f"{arguments} refused")
    assert seen.keys() <= {FULL, (200, ""), (503, "ServiceUnavailable")}, seen


def test_a_full_cluster_reads_lists_and_deletes_and_comes_back_by_itself(servers: SmallServers) -> None:
    s3 = servers.boto3(attempts=1)
    upload = s3.create_multipart_upload(Bucket="demo", Key="open")["UploadId"]
    for key in ("kept", "changed"):
        s3.put_object(Bucket="demo", Key=key, Body=b"kept")
    taken = fill(servers, s3, MIB, "big")
    servers.wait_until(lambda: states(servers) == {"full"}, 60, "all disks full")
    assert {entry["code"] for entry in servers.status()["problems"]} >= {"DISK_FULL"}

    tagging = {"TagSet": [{"Key": "k", "Value": "v"}]}
    refused(servers, s3.put_object, Key="tiny", Body=b"x")
    refused(servers, s3.put_object, Key="changed", Body=b"else")
    refused(servers, s3.put_object, Key="small", Body=bytes(8_000))
    refused(servers, s3.put_object, Key="large", Body=bytes(3 * MIB))
    refused(servers, s3.copy_object, Key="copy", CopySource="demo/kept")
    refused(servers, s3.put_object_tagging, Key="kept", Tagging=tagging)
    refused(servers, s3.create_multipart_upload, Key="other")
    refused(servers, s3.upload_part, Key="open", UploadId=upload, PartNumber=1, Body=b"part")

    def put_many(worker: int) -> Counter[tuple[int, str]]:
        client = servers.boto3(attempts=1)
        return Counter(answer(client.put_object, Key=f"more/{worker}/{n}", Body=bytes(TINY_BYTES)) for n in range(100))

    with ThreadPoolExecutor(4) as pool:
        said = sum(pool.map(put_many, range(4)), Counter())
    assert FULL in said, said
    assert said.keys() <= {FULL, (200, "")}, said
    assert states(servers) <= {"full", "ok"}

    for key in taken:
        assert len(s3.get_object(Bucket="demo", Key=key)["Body"].read()) == MIB, key
    assert s3.get_object(Bucket="demo", Key="kept")["Body"].read() == b"kept"
    assert {*taken, "kept"} <= {entry["Key"] for entry in everything(s3)}

    pids = servers.pids()
    for key in (entry["Key"] for entry in everything(s3)):
        s3.delete_object(Bucket="demo", Key=key)
    s3.abort_multipart_upload(Bucket="demo", Key="open", UploadId=upload)
    assert "Contents" not in s3.list_objects_v2(Bucket="demo")
    servers.wait_until(lambda: states(servers) == {"ok"}, 180, "room on all disks")
    servers.wait_until(lambda: answer(s3.put_object, Key="tiny", Body=b"x")[0] == 200, 60, "writes again")
    assert answer(s3.put_object, Key="large", Body=bytes(3 * MIB))[0] == 200
    assert servers.pids() == pids, "no process was started again"

    again: list[str] = []

    def takes_half() -> bool:  # what was deleted last is given back in a later round of collection
        again.extend(fill(servers, s3, MIB, f"again/{len(again)}"))
        return len(again) > len(taken) / 2

    servers.wait_until(takes_half, 120, "room for half of the objects again")


def test_a_server_that_is_gone_is_not_replaced_without_room_and_is_when_there_is_some(four: SmallServers) -> None:
    servers = four
    s3 = servers.boto3(attempts=3)
    servers.run("cluster", "sparing", str(servers.authority), "--fragments", "10s", "--registers", "20s")
    servers.change()

    def free_part() -> float:
        disks = [disk for node in servers.status()["nodes"] for disk in node["disks"]]
        used, free = (sum(disk[what] for disk in disks) for what in ("bytes_used", "bytes_free"))
        return float(free / max(1, used + free))

    keys: list[str] = []
    while free_part() > FREE_PART:
        for _ in range(8):
            keys.append(f"big/{len(keys):04}")
            s3.put_object(Bucket="demo", Key=keys[-1], Body=bytes(MIB))
        assert len(keys) < OBJECTS_MAX

    def short() -> list[dict[str, Any]]:
        return [entry for entry in servers.status()["problems"] if entry["code"] == "SPARING_LACKS_ROOM"]

    servers.kill_node("n4")
    servers.wait_until(lambda: bool(short()), 120, "too little room for what n4 had")
    assert "have no room on the disks that are left" in short()[0]["detail"]
    seen: list[int] = []

    def pauses() -> bool:
        """What has no spare left is written anew, as far as there is room."""
        assert "full" not in states(servers)
        seen.append(servers.status()["objects_below_target"])
        time.sleep(1)
        return len(seen) > 20 and len({*seen[-10:]}) == 1

    servers.wait_until(pauses, 120, "nothing that is written anew")
    assert short()
    assert seen[-1] > len(keys) / 8
    assert answer(s3.put_object, Key="more", Body=bytes(MIB))[0] == 200, "clients still have the room that is left"

    for key in keys[::2]:
        s3.delete_object(Bucket="demo", Key=key)
    servers.wait_until(lambda: not short(), 180, "room for what n4 had")
    servers.wait_until(lambda: servers.status()["objects_below_target"] == 0, 240, "all of it at the others")
    servers.wait_moved()
    for key in keys[1::2]:
        assert "n4" not in {row["node"] for row in servers.where("demo", key)["fragments"]}
        assert s3.get_object(Bucket="demo", Key=key)["Body"].read() == bytes(MIB)
