"""Bucket keys outlive what an attacker does to the ring: a gateway gives them back, and a backup where no gateway has
them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from botocore.exceptions import ClientError

from storaged.cluster import identity, issuing, signed_layout
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.cluster.ports import PeerChecks
from storaged.cluster.rpc import RpcPool
from storaged.keys.bucketkey import BucketKeyRecord
from storaged.meta.client import RingClient, RingSettings
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import SYSTEM_SCOPE, Change, Table, system_name
from storaged.meta.ports import PageQuery
from storaged.meta.transport.replicas import ReplicaDirectory
from storaged.wire import decode, encode
from tests.cluster import Cluster

BUCKETS = ["contracts", "letters", "photos"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("keys") / "cluster", workers=2)
    try:
        found.start()
        s3 = found.boto3(attempts=4)
        for bucket in BUCKETS:
            s3.create_bucket(Bucket=bucket)
            s3.put_object(Bucket=bucket, Key="key", Body=bucket.encode())
        yield found
    finally:
        found.stop()


class _All:
    def disk_writable(self, disk: str) -> bool:
        return True

    def disk_readable(self, disk: str) -> bool:
        return True

    disk_prompt = disk_readable


class Ring:
    """The ring, to somebody who has a gateway's certificate and no keys: storage nodes take values of these registers
    from no other."""

    def __init__(self, cluster: Cluster) -> None:
        own = identity.load_identity(cluster.directory / "gateway" / "identity")
        layouts = LayoutBook(
            own.administration, own.cluster, known=LayoutFiles(cluster.directory / "gateway" / "layouts").load()
        )
        self.pool = RpcPool(
            own,
            addresses=lambda node: layouts.current.node_by_name[node].address or None,
            checks=PeerChecks(lambda peer: None),
        )
        directory = ReplicaDirectory(layouts, self.pool, {}, node="nobody")
        self.ring = RingClient(layouts, directory, RingSettings(own.name))
        self.scanner = RingScanner(layouts, directory, self.ring, _All(), ScanSettings(cache_bytes_max=1 << 20))

    async def keys(self) -> list[str]:
        page = await self.scanner.list_page(PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=b"key/"))
        return [row.key.decode() for row in page.rows]

    async def read(self, path: str) -> bytes:
        value = (await self.ring.read(system_name(path))).value
        return value.body if value is not None else b""

    async def overwrite_keys(self) -> int:
        paths = await self.keys()
        for path in paths:
            await self.ring.change(system_name(path), lambda _value: Change(b"", 0))
        return len(paths)


def with_ring(cluster: Cluster, work: Callable[[Ring], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        ring = Ring(cluster)
        await ring.pool.start()
        try:
            return await work(ring)
        finally:
            await ring.ring.close()
            await ring.pool.close()

    return asyncio.run(run())


def problems(cluster: Cluster) -> list[str]:
    return [problem["code"] for problem in cluster.status()["problems"]]


def restart_gateway(cluster: Cluster, between: Callable[[], object] = lambda: None) -> None:
    cluster.run("dev", "kill", "gateway")
    between()
    cluster.run("dev", "start", "gateway")
    cluster.wait_until(lambda: cluster.status()["verdict"] in ("HEALTHY", "DEGRADED", "AT_RISK"), 60, "the gateway")


def bodies(cluster: Cluster) -> list[bytes]:
    s3 = cluster.boto3(attempts=4)
    return [s3.get_object(Bucket=bucket, Key="key")["Body"].read() for bucket in BUCKETS]


def kinds(cluster: Cluster) -> list[str]:
    files = sorted((cluster.directory / "gateway" / "audit").glob("*.jsonl"))
    return [json.loads(line)["kind"] for file in files for line in file.read_text().splitlines()]


def test_keys_that_were_overwritten_in_the_ring_come_back_from_the_gateway_and_from_a_backup(
    cluster: Cluster, tmp_path: Path
) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text("correct horse battery staple\n")
    cluster.run("keys", "backup", str(tmp_path / "backup"), "--passphrase-file", str(phrase))
    expected = [bucket.encode() for bucket in BUCKETS]

    assert with_ring(cluster, Ring.overwrite_keys) >= len(BUCKETS)
    assert with_ring(cluster, Ring.keys) == []
    restart_gateway(cluster)
    assert bodies(cluster) == expected
    assert "BUCKET_KEY_DAMAGED" in problems(cluster)
    assert "BUCKET_KEY_DAMAGED" in cluster.run("doctor", check=False).stdout
    assert len(with_ring(cluster, Ring.keys)) >= len(BUCKETS)
    assert kinds(cluster).count("key.restore") >= len(BUCKETS)

    def lose_the_copies() -> None:
        with_ring(cluster, Ring.overwrite_keys)
        (cluster.directory / "gateway" / "bucketkeys").unlink()

    restart_gateway(cluster, lose_the_copies)
    with pytest.raises(ClientError, match="ServiceUnavailable"):
        cluster.boto3().get_object(Bucket=BUCKETS[0], Key="key")
    cluster.wait_until(lambda: cluster.status()["verdict"] == "AT_RISK", 15, "status to say that a key is not mended")
    assert "BUCKET_KEY_DAMAGED" in problems(cluster)
    told = cluster.run("keys", "restore", str(tmp_path / "backup"), "--passphrase-file", str(phrase)).stdout
    assert "was already in" in told
    os.kill(cluster.pids()["gateway"], signal.SIGHUP)
    cluster.wait_until(
        lambda: not (cluster.directory / "gateway" / "bucketkeys.restored").exists(),
        30,
        "the backup's keys to be taken",
    )
    assert bodies(cluster) == expected
    cluster.wait_until(lambda: cluster.status()["verdict"] == "DEGRADED", 15, "all keys to be mended")


def move_gateway(cluster: Cluster, location: str, jurisdiction: str) -> None:
    """Another certificate, and a layout that says so, as an operator would make them."""
    authority = issuing.load_authority(cluster.directory / "authority")
    folder = cluster.directory / "gateway"
    issuing.issue(
        authority, folder / "identity", name="gateway", location=location, roles=("gateway",), jurisdiction=jurisdiction
    )
    known = decode(LayoutFiles(cluster.directory / "n1" / "layouts").load()[-1].payload, Layout)
    nodes = tuple(
        msgspec.structs.replace(node, location=location) if node.name == "gateway" else node for node in known.nodes
    )
    signed = signed_layout.sign_layout(
        msgspec.structs.replace(known, epoch=known.epoch + 1, nodes=nodes), authority.administration
    )
    for name in ("n1", "n2", "n3", "gateway"):
        (cluster.directory / name / "identity" / "layout.signed").write_bytes(encode(signed))
    for pid in cluster.pids().values():
        os.kill(pid, signal.SIGHUP)
    cluster.wait_until(lambda: cluster.status().get("epoch") == known.epoch + 1, 30, "the layout")


def test_a_gateway_that_is_certified_elsewhere_loses_the_key_of_a_bucket_of_france_at_once(cluster: Cluster) -> None:
    cluster.run("bucket", "create", "of-france", "--user", "dev", "--countries", "FR")
    s3 = cluster.boto3(attempts=4)
    s3.put_object(Bucket="of-france", Key="key", Body=b"data")
    assert s3.get_object(Bucket="of-france", Key="key")["Body"].read() == b"data"
    before = decode(LayoutFiles(cluster.directory / "n1" / "layouts").load()[-1].payload, Layout)
    place = next(node.location for node in before.nodes if node.name == "gateway")
    move_gateway(cluster, "DE/fra1/z", "HU")
    for attempt in (
        lambda: cluster.boto3(attempts=6).get_object(Bucket="of-france", Key="key"),
        lambda: cluster.boto3(attempts=6).put_object(Bucket="of-france", Key="key", Body=b"other"),
    ):
        with pytest.raises(ClientError) as refused:
            attempt()
        error = refused.value.response
        assert (error["ResponseMetadata"]["HTTPStatusCode"], error["Error"]["Code"]) == (503, "ServiceUnavailable")
        assert "bucket countries: this gateway is in DE, and the bucket is bound to FR" in error["Error"]["Message"]
    assert bodies(cluster) == [bucket.encode() for bucket in BUCKETS]
    assert "key.refused" in kinds(cluster)
    move_gateway(cluster, place, "FR")
    assert cluster.boto3(attempts=4).get_object(Bucket="of-france", Key="key")["Body"].read() == b"data"


def test_a_bucket_that_is_deleted_leaves_its_end_with_its_key(cluster: Cluster) -> None:
    s3 = cluster.boto3(attempts=4)
    before = set(with_ring(cluster, Ring.keys))
    s3.create_bucket(Bucket="short-lived")
    s3.delete_bucket(Bucket="short-lived")
    [path] = set(with_ring(cluster, Ring.keys)) - before
    record = decode(with_ring(cluster, lambda ring: ring.read(path)), BucketKeyRecord)
    assert record.ended is not None
    assert (record.ended.name, len(record.ended.nonce), len(record.authenticator)) == ("short-lived", 16, 32)
    assert re.search(
        r"key backup +covers epoch 1; \d+ bucket keys? newer than it", cluster.run("doctor", check=False).stdout
    )
