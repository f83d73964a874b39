"""A page of older versions that no disk has any more costs the versions on it, and no others: these are repaired and
moved as before, and so are their pages."""

from __future__ import annotations

import random

import msgspec
import pytest

from storaged.errors import DataDamaged, InvalidArgument, PageLost
from storaged.fragments.ports import REPLACED, Retirement
from storaged.hashes import fragment_hash
from storaged.maintain.context import MaintainLimits
from storaged.maintain.moves import MOVED, DiscardAsk, FragmentAsk
from storaged.meta.names import Table
from storaged.objects.code.history import entries_on
from storaged.objects.code.version_walk import every_page
from storaged.objects.code.versions import decode_record
from storaged.objects.records import PartEntry
from storaged.objects.write import versioned
from storaged.objects.write.lost import forget_lost, lost_versions
from storaged.objects.write.references import pages_in, parts_in
from tests.integration.memory_cluster import Cluster, run
from tests.integration.test_maintain_versions import FEW, ORPHAN_S, Kept, collect, on_disks, sweep, sweep_pages
from tests.integration.test_moving_partitions import Moves


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioned, "BOUNDS", FEW)


class WithLostPage(Kept):
    """``left``: the parts of the versions that do not lie on the page that is lost."""

    async def lose_page(self) -> None:
        """The newest leaf goes, from all disks."""
        pages = every_page(self.cluster.gateway.ring, self.name, decode_record(await self.value()))
        page_hash, page = await anext(pages)
        await pages.aclose()
        gone = entries_on(page)
        parts = {part.data_id for entry in gone for part in entry.version.parts}
        self.left: list[PartEntry] = [part for part in await self.parts() if part.data_id not in parts]
        for entry in gone:
            del self.datas[entry.name]
        for disk in self.cluster.layouts.current.disk_by_id:
            if page_hash in self.cluster.pages(disk):
                self.cluster.meta(disk).damage_page(page_hash)

    async def check(self) -> None:
        """Every version that is left reads as it was written."""
        for version_id, data in self.datas.items():
            stream = await self.cluster.objects.get(self.bucket, b"key", version_id=version_id)
            assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data, version_id


async def made(cluster: Cluster) -> WithLostPage:
    kept = WithLostPage(cluster)
    await kept.make()
    cluster.maintain()
    await cluster.settled()
    await kept.lose_page()
    return kept


def test_versions_on_other_pages_than_a_lost_one_are_rebuilt() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        lost = set()
        for part in kept.left:
            if not part.inline:
                place = (await cluster.fragments(part.data_id))[0]
                await cluster.store(place[0]).delete([place[1]])
                lost.add(place)
        assert len(lost) >= 5
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.settled()
        assert lost <= set(await cluster.fragments())
        await kept.check()

    run(scenario)


def test_versions_on_other_pages_than_a_lost_one_are_recoded_without_the_disks_that_are_away() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        await cluster.kill("nc")
        await cluster.pass_s(MaintainLimits().recode_delay_s + 60)
        await cluster.settled()
        left = {part.data_id for part in kept.left if part.size > 50_000}
        assert len(left) >= 5
        found = await readable_parts(kept)
        profiles = {(run.k, run.m) for part in found if part.data_id in left for run in part.runs}
        assert (4, 2) not in profiles
        await kept.check()

    run(scenario)


def test_pages_of_versions_on_other_pages_than_a_lost_one_are_copied() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        pages = [
            page
            async for page in pages_in(
                cluster.gateway.ring, kept.name, await kept.value(), on_unreadable=lambda _error: None
            )
        ]
        disks = cluster.layouts.partition(kept.name.partition).present
        whole = [page for page in pages if all(page in cluster.pages(disk) for disk in disks)]
        assert len(whole) >= 3
        for number, page in enumerate(whole):
            cluster.meta(disks[number % 3]).damage_page(page)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.settled()
        for disk in disks:
            assert set(whole) <= set(cluster.pages(disk))
        await kept.check()

    run(scenario)


def test_what_a_lost_page_may_refer_to_is_not_deleted() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        before = await cluster.fragments()
        pages = on_disks(cluster)
        await cluster.leap(ORPHAN_S + 60)
        for disk, fragment in before:
            await cluster.store(disk).retire([Retirement(fragment.data_id, kept.name.pack(), 0, REPLACED)])
        await sweep(cluster)
        assert await collect(cluster) == 0
        await sweep_pages(cluster)
        assert await cluster.fragments() == before
        assert on_disks(cluster) == pages
        with pytest.raises(DataDamaged):
            await kept.parts()

    run(scenario)


async def readable_parts(kept: Kept) -> list[PartEntry]:
    ring, value = kept.cluster.gateway.ring, await kept.value()
    found = parts_in(ring, kept.name, value.body, Table.OBJECT, on_unreadable=lambda _error: None)
    return [part async for part in found]


def test_a_false_fragment_of_a_version_on_another_page_than_a_lost_one_is_removed() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        part = next(part for part in kept.left if part.size > 50_000)
        for disk, fragment in await cluster.fragments(part.data_id):
            store = cluster.store(disk)
            held = store.kept(fragment)
            payload = bytes(byte ^ 0x55 for byte in held.payload)
            hashes = list(held.header.hashes)
            hashes[fragment.position] = fragment_hash((payload,))
            header = msgspec.structs.replace(held.header, hashes=tuple(hashes))
            await store.delete([fragment])
            await store.write(header, [payload], sync=True)
            break
        ask = DiscardAsk((FragmentAsk(kept.name.pack(), fragment.pack(), disk),))
        (answer,) = (await cluster.gateway.discarder.answer("na", ask)).answers
        assert answer.code == MOVED, answer
        assert (disk, fragment) not in await cluster.fragments(part.data_id)
        await kept.check()

    run(scenario)


def test_a_partition_moves_although_a_page_is_lost() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        await Moves(cluster, random.Random(1)).move(kept.name.partition)
        await kept.check()

    run(scenario)


def test_a_page_is_lost_only_when_each_replica_says_so() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        record = decode_record(await kept.value())
        with pytest.raises(PageLost):
            await anext(every_page(cluster.gateway.ring, kept.name, record))
        await cluster.kill("nc")
        with pytest.raises(DataDamaged) as away:
            await anext(every_page(cluster.gateway.ring, kept.name, record))
        assert type(away.value) is DataDamaged

    run(scenario)


def test_lost_versions_are_let_go_of_and_the_bucket_can_be_emptied() -> None:
    async def scenario(cluster: Cluster) -> None:
        kept = await made(cluster)
        objects, plane = cluster.objects, cluster.objects.plane
        with pytest.raises(DataDamaged, match="key 'key'; a list that begins after this key goes on"):
            await objects.list_versions(kept.bucket)
        count = await lost_versions(plane, kept.bucket, b"key")
        assert count
        with pytest.raises(InvalidArgument, match=f"lost {count} versions"):
            await forget_lost(plane, kept.bucket, b"key", count + 1)
        await cluster.kill("nc")
        with pytest.raises(DataDamaged):
            await forget_lost(plane, kept.bucket, b"key", count)
        cluster.start("nc")
        await cluster.settled()
        await forget_lost(plane, kept.bucket, b"key", count)
        assert await lost_versions(plane, kept.bucket, b"key") == 0
        await kept.check()
        page = await objects.list_versions(kept.bucket)
        assert {found.version_id for found in page.versions if not found.delete_marker} == set(kept.datas)
        for found in page.versions:
            await objects.delete(kept.bucket, b"key", version_id=found.version_id)
        assert not (await objects.list_versions(kept.bucket)).versions

    run(scenario)
