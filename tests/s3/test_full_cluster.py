"""A cluster fills up, is full, and is emptied again: real processes, on disks that are small file systems.

A full cluster reads, lists and deletes. It refuses every write that takes room, the smallest too, and says so. It comes
back by itself when there is room.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storaged.units import MIB
from tests.servers import DISKS, Servers
from tests.worlds.small_disk import SmallDisks

DISK_BYTES = 128 * MIB
LIMITS = '\n[limits]\nreserve_bytes = "24 MiB"\nretire_delay_s = 10\n'
FULL = (507, "InsufficientStorage")
TINY_BYTES = 900
OBJECTS_MAX = 600
"""More than fit."""


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
