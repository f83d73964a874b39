"""Versions that are not current are kept by everything that looks after data: collection, sweeps, repair, catch-up,
recoding, moves of partitions, deletion of buckets, and counting.

A key has the null version from before versioning, with small copies, and then versions of all sizes, of which most lie
on pages. Each test does to it what may lose data, and reads all of them.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from storaged.errors import BucketNotEmpty
from storaged.fragments.ports import Retirement
from storaged.maintain import mover
from storaged.maintain.context import MaintainLimits
from storaged.meta.names import RegisterName, Table, Value, object_name
from storaged.objects.api import CompletedPart, NewMeta
from storaged.objects.code.history import Bounds
from storaged.objects.code.versions import decode_record
from storaged.objects.configuration.kinds import ENABLED, VERSIONING, Versioning
from storaged.objects.plane import ObjectLimits
from storaged.objects.records import BucketRecord, PartEntry
from storaged.objects.usage import usage_after
from storaged.objects.write import versioned
from storaged.objects.write.references import pages_in, parts_in
from tests.doubles.meta_store import MemoryMetaStore
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.integration.test_moving_partitions import Moves
from tests.integration.test_operators import FOUR, spread_over

FEW = Bounds(versions_max=3, versions_bytes_max=1 << 20, leaf_versions=2, refs_max=3, branch_refs=2)
SIZES = (10, 5_000, 60_000, 300_000)
ORPHAN_S = MaintainLimits().orphan_age_ms / 1000
RETIRE_S = ObjectLimits().retire_delay_ms / 1000
READERS_S = MaintainLimits().drop_delay_s
KEY = b"key"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioned, "BOUNDS", FEW)


class Kept:
    """A key with many versions, in a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.datas: dict[str, bytes] = {}
        """By version id."""
        self.bucket: BucketRecord

    @property
    def name(self) -> RegisterName:
        return object_name(self.bucket.id, self.bucket.shard_numbers, KEY)

    async def make(self, versions: int = 12) -> None:
        cluster = self.cluster
        bucket = self.bucket = await cluster.bucket()
        self.datas["null"] = os.urandom(5_000)
        await cluster.put(bucket, KEY, self.datas["null"])
        await self.enable()
        for number in range(versions):
            await self.put(os.urandom(SIZES[number % len(SIZES)]))
        await self.upload(40, 100)
        await self.put(b"the current one")
        record = decode_record(await self.value())
        assert record.history is not None
        assert len(record.history.levels) > 1, "a tree"
        assert record.history.null_at == 0

    async def enable(self) -> None:
        await self.cluster.buckets.configure(self.bucket, VERSIONING, lambda _before: Versioning(ENABLED))
        self.bucket = await self.cluster.buckets.renewed(self.bucket.name)

    async def put(self, data: bytes) -> str:
        result = await self.cluster.put(self.bucket, KEY, data)
        self.datas[result.version_id] = data
        return result.version_id

    async def upload(self, count: int, size: int) -> str:
        objects = self.cluster.objects
        upload = await objects.create_upload(self.bucket, KEY, NewMeta(), owner=WHO.user_id)
        parts, whole = [], b""
        for number in range(1, count + 1):
            data = os.urandom(size)
            result = await self.cluster.put_part(self.bucket, KEY, upload.upload_id, number, data)
            parts.append(CompletedPart(number, result.etag))
            whole += data
        done = await objects.complete(self.bucket, KEY, upload.upload_id, parts, owner=WHO.user_id)
        self.datas[done.version_id] = whole
        return done.version_id

    async def delete(self, version_id: str) -> None:
        await self.cluster.objects.delete(self.bucket, KEY, version_id=version_id)
        self.datas.pop(version_id, None)

    async def value(self) -> Value:
        value = (await self.cluster.gateway.ring.read(self.name)).value
        assert value is not None
        return value

    async def parts(self) -> list[PartEntry]:
        value = await self.value()
        return [part async for part in parts_in(self.cluster.gateway.ring, self.name, value.body, Table.OBJECT)]

    async def pages(self) -> set[bytes]:
        return {
            page async for page in pages_in(self.cluster.gateway.ring, self.name, await self.value(), complete=True)
        }

    async def check(self) -> None:
        """Every version is there, and reads as it was written."""
        listing = await self.cluster.objects.list_versions(self.bucket)
        assert {one.version_id for one in listing.versions if not one.delete_marker} == set(self.datas)
        for version_id, data in self.datas.items():
            stream = await self.cluster.objects.get(self.bucket, KEY, version_id=version_id)
            assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data, version_id

    async def replicas_have_all(self) -> None:
        pages = await self.pages()
        for disk in self.cluster.layouts.partition(self.name.partition).present:
            assert pages <= set(self.cluster.pages(disk)), disk


async def collect(cluster: Cluster) -> int:
    return sum([await node.maintenance.collector.collect_due() for node in cluster.nodes.values() if node.up])


async def sweep(cluster: Cluster) -> int:
    return sum([await node.maintenance.collector.sweep() for node in cluster.nodes.values() if node.up])


async def sweep_pages(cluster: Cluster) -> int:
    return sum(
        await asyncio.gather(*(node.maintenance.page_sweep.once() for node in cluster.nodes.values() if node.up))
    )


def on_disks(cluster: Cluster) -> set[bytes]:
    return {page for disk in cluster.layouts.current.disk_by_id for page in cluster.pages(disk)}


@pytest.mark.parametrize("writes", [1, 3])
def test_a_key_that_is_written_all_the_time_is_repaired(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Its record is another one whenever a gateway changes it. ``writes``: versions that are added meanwhile: one stays
    in the record, three push what moves to other pages.
    """
    after, busy = mover.body_after, [True]

    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()

        async def overtaken(*what: Any) -> Any:
            found = await after(*what)
            for _ in range(writes if busy[0] and what[1] == kept.name else 0):
                await kept.put(os.urandom(2_000))
            return found

        monkeypatch.setattr(mover, "body_after", overtaken)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        await cluster.pass_s(MaintainLimits().recode_delay_s + 600)
        coded = [part for part in await kept.parts() if part.size >= 60_000]
        assert {(run.k, run.m) for part in coded for run in part.runs} == {(2, 2)}
        busy[0] = False
        cluster.start("nc")
        assert await cluster.settled() == (0, 0)
        await kept.check()
        await cluster.leap(max(ORPHAN_S, RETIRE_S) + 60)
        await collect(cluster)
        await sweep(cluster)
        await sweep_pages(cluster)
        await kept.check()
        await kept.replicas_have_all()

    run(scenario)


def test_no_sweep_and_no_collector_takes_a_version_for_an_orphan() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        before = len(await cluster.fragments())
        await cluster.leap(ORPHAN_S + 60)
        assert await sweep(cluster) == 0
        for part in await kept.parts():  # whoever puts it on a list
            for disk, _ in await cluster.fragments(part.data_id):
                await cluster.store(disk).retire([Retirement(part.data_id, kept.name.pack(), 0)])
        assert await collect(cluster) == 0
        assert len(await cluster.fragments()) == before
        await sweep_pages(cluster)
        assert await kept.pages() == on_disks(cluster)
        await kept.replicas_have_all()
        await kept.check()

    run(scenario)


def test_data_and_pages_of_a_version_that_was_deleted_go_and_all_others_stay() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        chance = random.Random(7)
        while kept.datas:
            for version_id in chance.sample(sorted(kept.datas), min(4, len(kept.datas))):
                await kept.delete(version_id)
            await cluster.leap(max(ORPHAN_S, RETIRE_S) + 60)
            await collect(cluster)
            await sweep(cluster)
            await cluster.pass_s(1)
            await collect(cluster)
            await sweep_pages(cluster)
            assert {fragment.data_id for _, fragment in await cluster.fragments()} == {
                part.data_id for part in await kept.parts() if not part.inline
            }
            assert on_disks(cluster) == await kept.pages()
            await kept.check()
        assert not await cluster.fragments()
        assert not on_disks(cluster)

    run(scenario)


def test_lost_fragments_of_older_versions_are_rebuilt() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        lost = 0
        for part in await kept.parts():
            if not part.inline:
                disk, fragment = (await cluster.fragments(part.data_id))[0]
                await cluster.store(disk).delete([fragment])
                lost += 1
        assert lost >= 9
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert sum(status.fragments_rebuilt for status in await cluster.statuses()) == lost
        await kept.check()

    run(scenario)


def test_a_page_of_older_versions_that_is_damaged_or_missing_is_replaced() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        cluster.maintain()
        await cluster.settled()
        disks = cluster.layouts.partition(kept.name.partition).present
        for number, page in enumerate(sorted(await kept.pages())):
            cluster.meta(disks[number % 3]).damage_page(page)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        assert await cluster.settled() == (0, 0)
        await kept.replicas_have_all()
        await kept.check()

    run(scenario)


@pytest.mark.parametrize("node", ["na", "nb", "nc"])
def test_a_node_whose_disks_were_replaced_gets_rows_pages_and_fragments_of_all_versions(node: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        cluster.maintain()
        await cluster.settled()
        disks = [disk.id for disk in cluster.layouts.current.disks if disk.node == node]
        await cluster.kill(node)
        cluster.nodes[node].meta = {disk: MemoryMetaStore() for disk in disks}
        for disk in disks:
            store = cluster.nodes[node].fragments[disk]
            await store.delete(list(store.fragments))
        cluster.start(node)
        assert await cluster.settled() == (0, 0)
        await kept.replicas_have_all()
        for other in {"na", "nb", "nc"} - {node}:
            await cluster.kill(other)
            await kept.check()
            cluster.start(other)
            await cluster.pass_s(10)

    run(scenario)


def test_versions_that_were_written_while_a_rack_was_away_are_there_when_it_returns() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        for number in range(8):
            await kept.put(os.urandom(SIZES[number % len(SIZES)]))
        await kept.delete(sorted(kept.datas)[3])
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        await kept.replicas_have_all()
        for away in ("na", "nc"):
            await cluster.kill(away)
            await kept.check()
            cluster.start(away)
            await cluster.pass_s(10)

    run(scenario)


def test_recoding_and_moving_back_keep_every_version() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        await kept.upload(34, 60_000)
        await kept.put(b"current")
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        await cluster.pass_s(MaintainLimits().recode_delay_s + 60)
        await cluster.settled()
        coded = [part for part in await kept.parts() if part.runs and not part.small]
        assert {(run.k, run.m) for part in coded for run in part.runs} != {(4, 2)}
        await kept.check()
        cluster.start("nc")
        assert await cluster.settled() == (0, 0)
        coded = [part for part in await kept.parts() if part.runs and not part.small]
        assert {(run.k, run.m) for part in coded for run in part.runs} == {(4, 2)}
        await cluster.leap(ORPHAN_S + 60)
        await sweep_pages(cluster)
        await sweep(cluster)
        await collect(cluster)
        assert on_disks(cluster) == await kept.pages()
        await kept.replicas_have_all()
        await kept.check()

    run(scenario)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_partition_moves_with_the_pages_and_copies_of_all_versions(seed: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        cluster.maintain()
        await cluster.settled()
        moves = Moves(cluster, random.Random(seed))
        for number in range(4):
            await moves.move(kept.name.partition)
            await cluster.pass_s(10)
            await kept.replicas_have_all()
            await kept.put(os.urandom(SIZES[number % len(SIZES)]))
            await kept.check()
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        await collect(cluster)
        await sweep_pages(cluster)
        await kept.replicas_have_all()
        for node in ("na", "nb", "nc"):
            await cluster.kill(node)
            await kept.check()
            cluster.start(node)
            await cluster.pass_s(10)

    run(scenario)


def test_a_bucket_with_an_old_version_or_a_delete_marker_is_not_empty() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        marker = await cluster.objects.delete(kept.bucket, KEY)
        assert not (await cluster.objects.list_objects(kept.bucket)).keys
        with pytest.raises(BucketNotEmpty):
            await cluster.buckets.delete(kept.bucket)
        await kept.check()
        for version_id in list(kept.datas):
            await kept.delete(version_id)
        with pytest.raises(BucketNotEmpty):
            await cluster.buckets.delete(kept.bucket)
        await cluster.objects.delete(kept.bucket, KEY, version_id=marker.version_id)
        await cluster.buckets.delete(kept.bucket)

    run(scenario)


def test_usage_counts_every_version_once_however_small_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storaged.objects.usage.PAGES_A_CALL", 1)
    monkeypatch.setattr("storaged.objects.usage.VERSIONS_A_PAGE", 3)

    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        await cluster.put(kept.bucket, b"other", b"12345")
        await cluster.objects.delete(kept.bucket, b"other")
        versions = objects = total = 0
        mark: str | None = ""
        while mark is not None:
            piece = await usage_after(cluster.objects, kept.bucket, mark)
            assert piece.versions <= 3
            versions, objects, total = versions + piece.versions, objects + piece.objects, total + piece.size_bytes
            mark = piece.next_after
        assert (versions, objects) == (len(kept.datas) + 1, 1)
        assert total == sum(map(len, kept.datas.values())) + 5

    run(scenario)


def test_all_versions_are_coded_when_no_operator_is_trusted_alone_any_more() -> None:
    """Copies, bodies in records, and small parts of an upload in pages of its manifest."""

    async def scenario(cluster: Cluster) -> None:
        kept = Kept(cluster)
        await kept.make()
        before = await kept.parts()
        assert any(part.small for part in before)
        assert sum(bool(part.inline) for part in before) > 40
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        cluster.maintain()
        await cluster.settled()
        for _ in range(60):
            await cluster.pass_s(1)
            if not sum(status.misplaced for status in await cluster.statuses()):
                break
        after = await kept.parts()
        assert [(part.data_id, part.number, part.size) for part in after] == [
            (part.data_id, part.number, part.size) for part in before
        ]
        assert all(part.runs and not part.small and not part.inline for part in after)
        assert (await kept.value()).payload == b""
        await kept.check()
        await cluster.leap(2 * ORPHAN_S)
        await cluster.pass_s(30)
        await kept.check()

    run(scenario, racks=FOUR)
