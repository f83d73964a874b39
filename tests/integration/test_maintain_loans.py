"""Repair, moves and collection keep the data of copies that moved none, until the last key that reads it goes.

``a`` was copied to ``b``, and that to ``c``, in the same bucket or in another one. Then ``a`` was deleted, and a new
object stored there, or its bucket was deleted too, and so became a lender. Each test does something that could lose
the data, and reads all keys. What concerns lenders alone is in ``test_maintain_lenders``.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from storaged.errors import ServiceUnavailable
from storaged.maintain import check, walk
from storaged.maintain.context import MaintainLimits
from storaged.meta.names import RegisterName, Table, Visibility, object_name
from storaged.objects.api import BodyChecks, CompletedPart, CopySource, NewMeta, Renaming
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectLimits
from storaged.objects.records import BucketRecord, PartEntry, sharing_of
from storaged.objects.write import rename
from storaged.objects.write.loans import FRESH_MS
from storaged.objects.write.references import pages_in, parts_in
from tests.doubles.meta_store import MemoryMetaStore
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.integration.test_maintain_pages import PART, kept, many
from tests.integration.test_maintain_versions import collect, sweep, sweep_pages
from tests.integration.test_moving_partitions import Moves
from tests.worlds.objects import pieces

ORPHAN_S = MaintainLimits().orphan_age_ms / 1000
RETIRE_S = ObjectLimits().retire_delay_ms / 1000


INSIDE, APART, LENDER = "inside", "another bucket", "lender"
ANYWHERE = pytest.mark.parametrize("where", [INSIDE, APART, LENDER])
"""The copies are in the bucket of their source; or in another one; or this, and the bucket of the source is deleted."""


class Copied:
    """``datas``: what each key has to have; where it is ``bucket_of`` tells."""

    def __init__(self, cluster: Cluster, where: str = INSIDE, *, countries: tuple[str, ...] = ()) -> None:
        self.cluster = cluster
        self.where = where
        self.countries = countries
        self.datas: dict[bytes, bytes] = {}
        self.buckets: dict[bytes, BucketRecord] = {}
        """Of the keys that are not in ``bucket``."""
        self.bucket: BucketRecord
        """Of the source."""
        self.copies: BucketRecord
        """Of the copies."""

    async def begin(self) -> None:
        self.bucket = self.copies = await self.create("bucket")
        if self.where != INSIDE:
            self.copies = await self.create("copies")

    async def create(self, name: str) -> BucketRecord:
        return await self.cluster.buckets.create(WHO, name, region="eu-fr-1", countries=self.countries)

    async def make(self, *, paged: bool = False) -> None:
        """``paged``: ``a`` has its parts on pages."""
        await self.begin()
        await self.store(b"a", paged=paged)
        self.part = (await self.parts(b"a"))[-1]
        await self.copy(b"a", b"b")
        await self.copy(b"b", b"c")
        await self.delete(b"a")
        await self.end_bucket()
        if self.where != LENDER:
            await self.put(b"a", b"another object")
        assert len(await self.cluster.fragments(self.part.data_id)) == 6, "one copy of the data"

    async def end_bucket(self) -> None:
        """Deletes the bucket of the source, which lends; another bucket gets its name."""
        if self.where == LENDER:
            await self.cluster.buckets.delete(self.bucket)
            assert await self.lends()
            again = await self.create(self.bucket.name)
            self.buckets[b"of the new bucket"] = again
            await self.put(b"of the new bucket", os.urandom(300_000))

    async def lends(self) -> bool:
        """Whether the bucket of the source is a lender."""
        return await self.cluster.gateway.plane.lenders.find(self.bucket.id) is not None

    def bucket_of(self, key: bytes) -> BucketRecord:
        return self.buckets.get(key, self.bucket)

    def name(self, key: bytes) -> RegisterName:
        bucket = self.bucket_of(key)
        return object_name(bucket.id, bucket.shard_numbers, key)

    async def put(self, key: bytes, data: bytes) -> None:
        await self.cluster.put(self.bucket_of(key), key, data)
        self.datas[key] = data
        await self.cluster.gateway.plane.background.settle()

    async def store(self, key: bytes, *, paged: bool) -> None:
        """A coded object."""
        if not paged:
            await self.put(key, os.urandom(300_000))
            return
        self.datas[key] = await many(self.cluster, self.bucket_of(key), key, count=34, size=PART)
        await self.cluster.gateway.plane.background.settle()

    async def copy(self, source: bytes, to: bytes) -> None:
        wanted = CopySource(self.bucket_of(source), source)
        self.buckets[to] = self.copies
        await self.cluster.objects.copy(wanted, self.copies, to, owner=WHO.user_id, meta=None)
        self.datas[to] = self.datas[source]

    async def delete(self, key: bytes) -> None:
        await self.cluster.objects.delete(self.bucket_of(key), key)
        del self.datas[key]
        await self.cluster.gateway.plane.background.settle()

    async def parts(self, key: bytes) -> list[PartEntry]:
        value = (await self.cluster.gateway.ring.read(self.name(key))).value
        if value is None or value.visibility == Visibility.TOMBSTONE:
            return []
        return [part async for part in parts_in(self.cluster.gateway.ring, self.name(key), value.body, Table.OBJECT)]

    async def loans(self, key: bytes) -> int:
        value = (await self.cluster.gateway.ring.read(self.name(key))).value
        return len(sharing_of(decode_record(value)).loans)

    async def check(self) -> None:
        for key, data in self.datas.items():
            assert await self.cluster.get(self.bucket_of(key), key) == data, key

    async def tidy(self) -> None:
        """Runs everything that may delete, long after the last change."""
        await self.cluster.leap(max(ORPHAN_S, RETIRE_S) + 60)
        for _ in range(2):
            await collect(self.cluster)
            await sweep(self.cluster)
            await self.cluster.pass_s(1)


@ANYWHERE
def test_the_data_outlives_its_key_and_goes_with_the_last_copy(where: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.make()
        await copied.tidy()
        await copied.check()
        await copied.delete(b"b")
        await copied.tidy()
        await copied.check()
        await copied.put(b"c", b"it is overwritten")
        await copied.tidy()
        assert not await cluster.fragments(copied.part.data_id)
        assert not await copied.loans(b"a")
        await copied.check()

    run(scenario)


@ANYWHERE
def test_lost_fragments_of_a_deleted_source_are_rebuilt(where: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.make()
        for disk, fragment in (await cluster.fragments(copied.part.data_id))[:2]:
            await cluster.store(disk).delete([fragment])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert sum(status.fragments_rebuilt for status in await cluster.statuses()) == 2
        for node in ("na", "nb", "nc"):
            await cluster.kill(node)
            await copied.check()
            cluster.start(node)
            await cluster.pass_s(10)

    run(scenario)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("where", "early"), [(INSIDE, False), (INSIDE, True), (APART, True), (LENDER, False)])
def test_recoding_and_moving_back_keep_what_copies_read(where: str, early: bool, paged: bool) -> None:
    """``early``: the source is there while its blocks move."""

    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.make(paged=paged)
        owner = b"a"
        if early:
            await copied.store(b"d", paged=paged)
            await copied.copy(b"d", b"e")
            owner = b"d"
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        await cluster.pass_s(MaintainLimits().recode_delay_s + 60)
        await cluster.settled()
        coded = [part for part in await copied.parts(owner) if part.runs and not part.small]
        assert {(run.k, run.m) for part in coded for run in part.runs} == {(2, 2)}
        await copied.check()
        cluster.start("nc")
        assert await cluster.settled() == (0, 0)
        if early:
            await copied.delete(b"d")
        await copied.tidy()
        await copied.check()
        coded = [part for part in await copied.parts(owner) if part.runs and not part.small]
        assert {(run.k, run.m) for part in coded for run in part.runs} == {(4, 2)}

    run(scenario)


@pytest.mark.parametrize("where", [INSIDE, LENDER])
@pytest.mark.parametrize("paged", [False, True])
def test_a_node_whose_disks_were_replaced_gets_what_copies_read(paged: bool, where: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.make(paged=paged)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        for disk in [disk.id for disk in cluster.layouts.current.disks if disk.node == "nb"]:
            cluster.nodes["nb"].meta[disk] = MemoryMetaStore()
            store = cluster.nodes["nb"].fragments[disk]
            await store.delete(list(store.fragments))
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        for other in ("na", "nc"):
            await cluster.kill(other)
            await copied.check()
            cluster.start(other)
            await cluster.pass_s(10)

    run(scenario)


@ANYWHERE
@pytest.mark.parametrize("paged", [False, True])
def test_partitions_move_with_loans_and_with_what_borrows(paged: bool, where: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.make(paged=paged)
        cluster.maintain()
        await cluster.settled()
        moves = Moves(cluster, random.Random(5))
        for key in (b"a", b"b", b"a", b"c"):
            await moves.move(copied.name(key).partition)
            await cluster.pass_s(10)
            await copied.check()
        await copied.tidy()
        await copied.check()

    run(scenario)


@ANYWHERE
def test_a_walk_has_the_loans_ended_that_a_dead_gateway_left(where: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.make()
        plane = cluster.gateway.plane
        background: Any = plane.background
        background.spawn = lambda work: work.close() or False
        await copied.delete(b"b")
        await copied.put(b"c", b"it is overwritten")
        assert await copied.loans(b"a") == 1
        cluster.maintain()
        await cluster.settled()
        assert await copied.loans(b"a") == 1, "they are too young"
        await cluster.leap(FRESH_MS / 1000 + 60)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.settled()
        assert not await copied.loans(b"a")
        del plane.background.spawn
        await copied.tidy()
        assert not await cluster.fragments(copied.part.data_id)
        await copied.check()

    run(scenario)


def test_a_walk_finishes_the_renames_of_a_dead_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """One had arrived, the other had not."""

    async def dies(*_: Any) -> Any:
        raise asyncio.CancelledError

    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster)
        await copied.make()
        await copied.put(b"early", os.urandom(300_000))
        plane = cluster.gateway.plane
        plane.background.spawn = lambda work: work.close() or False  # type: ignore[assignment,method-assign,func-returns-value]
        for step, source, to in (("finish", b"c", b"new c"), ("check_departing", b"early", b"late")):
            monkeypatch.setattr(rename, step, dies)
            with pytest.raises((asyncio.CancelledError, ServiceUnavailable)):
                await cluster.objects.rename(copied.bucket, Renaming(source, to))
            monkeypatch.undo()
        copied.datas[b"new c"] = copied.datas.pop(b"c")
        await copied.check()
        cluster.maintain()
        await cluster.settled()
        await copied.check()
        await cluster.leap(FRESH_MS / 1000 + 60)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.settled()
        del plane.background.spawn
        found = (await cluster.objects.list_objects(copied.bucket)).keys
        assert sorted(found) == sorted(copied.datas)
        await copied.tidy()
        await copied.check()
        for key in (*sorted(copied.datas), b"c"):
            sharing = sharing_of(decode_record((await cluster.gateway.ring.read(copied.name(key))).value))
            assert (sharing.departure, sharing.arrivals) == (None, ())

    run(scenario)


def test_all_parts_of_a_renamed_object_stay_until_it_goes() -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster)
        await copied.begin()
        objects, datas = cluster.objects, [os.urandom(5 << 20), os.urandom(70_000)]
        upload = await objects.create_upload(copied.bucket, b"a", NewMeta(), owner=WHO.user_id)
        parts = []
        for number, data in enumerate(datas, 1):
            checks = BodyChecks(len(data))
            done = await objects.put_part(copied.bucket, b"a", upload.upload_id, number, pieces(data), checks)
            parts.append(CompletedPart(number, done.etag))
        await objects.complete(copied.bucket, b"a", upload.upload_id, parts, owner=WHO.user_id)
        ids = [part.data_id for part in await copied.parts(b"a")]
        await objects.rename(copied.bucket, Renaming(b"a", b"b"))
        copied.datas = {b"b": b"".join(datas)}
        await cluster.gateway.plane.background.settle()
        await copied.tidy()
        await copied.check()
        assert [part.data_id for part in await copied.parts(b"a")] == ids
        for disk, fragment in (await cluster.fragments(ids[1]))[:2]:
            await cluster.store(disk).delete([fragment])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await copied.check()
        await copied.delete(b"b")
        await copied.tidy()
        for data_id in ids:
            assert not await cluster.fragments(data_id)
        assert not await copied.loans(b"a")

    run(scenario)


@pytest.mark.parametrize("where", [INSIDE, LENDER])
def test_lent_parts_on_pages_are_kept_repaired_and_moved_until_the_last_copy_goes(where: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.begin()
        await copied.store(b"a", paged=True)
        ids = [part.data_id for part in await copied.parts(b"a")]
        await copied.copy(b"a", b"b")
        await cluster.objects.rename(copied.copies, Renaming(b"b", b"c"))
        copied.datas[b"c"], copied.buckets[b"c"] = copied.datas.pop(b"b"), copied.copies
        before = kept(cluster)
        await copied.delete(b"a")
        await copied.end_bucket()
        await copied.tidy()
        await sweep_pages(cluster)
        await copied.check()
        assert kept(cluster) < before, "the sealed list of the deleted object went, and that of the first copy"
        pages = await _pages(copied, b"a") | await _pages(copied, b"c")
        assert kept(cluster) == pages
        for disk, fragment in (await cluster.fragments(ids[30]))[:2]:
            await cluster.store(disk).delete([fragment])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await copied.check()
        for node in ("na", "nb", "nc"):
            await cluster.kill(node)
            await copied.check()
            cluster.start(node)
            await cluster.pass_s(10)
        await copied.delete(b"c")
        await copied.tidy()
        assert not await copied.loans(b"a")
        await cluster.leap(ORPHAN_S + 60)
        await sweep_pages(cluster)
        assert not kept(cluster)
        for data_id in ids:
            assert not await cluster.fragments(data_id)

    run(scenario)


async def _pages(copied: Copied, key: bytes) -> set[bytes]:
    ring, name = copied.cluster.gateway.ring, copied.name(key)
    return {page async for page in pages_in(ring, name, (await ring.read(name)).value, complete=True)}


@pytest.mark.parametrize("where", [INSIDE, LENDER])
def test_one_walk_has_the_loans_of_many_objects_ended(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """More than a node notes at once. Copies are no lenders."""
    for module, name, value in ((walk, "ROWS_A_SLICE", 1), (walk, "OWNERS_MAX", 1), (check, "NAMES_A_SETTLE", 1)):
        monkeypatch.setattr(module, name, value)
    sources = [b"source %d" % number for number in range(5)]

    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster, where)
        await copied.begin()
        for source in sources:
            await copied.put(source, os.urandom(300_000))
            await copied.copy(source, b"copy of " + source)
            if where == LENDER:
                await copied.delete(source)
        await copied.end_bucket()
        plane = cluster.gateway.plane
        plane.background.spawn = lambda work: work.close() or False  # type: ignore[assignment,method-assign,func-returns-value]
        for source in sources[1:]:
            await copied.delete(b"copy of " + source)
        cluster.maintain()
        await cluster.settled()
        await cluster.leap(FRESH_MS / 1000 + 60)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.settled()
        assert [await copied.loans(source) for source in sources] == [1, 0, 0, 0, 0]
        await copied.check()

    run(scenario)


def test_a_bucket_with_loans_of_deleted_keys_is_deleted() -> None:
    async def scenario(cluster: Cluster) -> None:
        copied = Copied(cluster)
        await copied.make()
        for key in (b"a", b"b", b"c"):
            await copied.delete(key)
        await cluster.buckets.delete(copied.bucket)
        await copied.tidy()
        assert not await cluster.fragments()

    run(scenario)
