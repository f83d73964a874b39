"""Maintenance looks after buckets that were deleted while copies in other buckets use their data: it keeps that data
whole, until the last copy goes. Then nothing of the bucket is left.

What concerns copies in the same bucket just as well is in ``test_maintain_loans``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from storaged.errors import NoSuchBucket, OutcomeUnknown, PeerUnreachable, ServiceUnavailable, SlowDown
from storaged.fragments.ports import FragmentId
from storaged.maintain.context import MaintainLimits
from storaged.meta.messages import Accept, Accepts, Create
from storaged.meta.names import RegisterName, Table, Visibility, object_name
from storaged.meta.store_ports import Fence, StoreBatch
from storaged.node.housekeeping import tidy
from storaged.objects.api import NewMeta
from storaged.objects.records import DELETED, BucketRecord
from storaged.objects.write.loans import FRESH_MS
from storaged.objects.write.references import pages_in
from tests.integration.memory_cluster import RACKS, WHO, Cluster, Gateway, layout_of, run
from tests.integration.test_collect_lies import write_to
from tests.integration.test_maintain_collect import leave_out_buckets
from tests.integration.test_maintain_loans import LENDER, ORPHAN_S, Copied
from tests.integration.test_maintain_pages import kept
from tests.integration.test_maintain_versions import collect, sweep, sweep_pages
from tests.integration.test_moving_partitions import Moves

LIMITS = MaintainLimits(drop_delay_s=30, recode_delay_s=60)
PAGED = pytest.mark.parametrize("paged", [False, True])


class Lending(Copied):
    """``nonce``: of the lender's fence. ``bucket`` stays as it was before its deletion, so a gateway that was suspended
    since then has the same record.
    """

    def __init__(self, cluster: Cluster, *, countries: tuple[str, ...] = ()) -> None:
        super().__init__(cluster, LENDER, countries=countries)
        cluster.keys.now_ms = cluster.clock.wall_ms

    async def end_bucket(self) -> None:
        await super().end_bucket()
        found = await self.cluster.gateway.plane.lenders.find(self.bucket.id)
        assert found is not None
        self.nonce = found.nonce

    async def housekeep(self) -> None:
        await tidy(self.cluster.gateway.plane, self.cluster.buckets)
        await self.cluster.gateway.plane.background.settle()

    def fences(self) -> dict[str, Fence | None]:
        """Of the bucket, at all disks that have its partitions now."""
        disks = {
            disk
            for shard in self.bucket.shard_numbers
            for disk in self.cluster.layouts.partition(
                RegisterName(Table.OBJECT, self.bucket.id, shard, b"").partition
            ).present
        }
        return {disk: self.cluster.meta(disk).get_fence(self.bucket.id) for disk in sorted(disks)}

    def lend_all(self) -> bool:
        """Whether every replica has the fence that lends."""
        return all(fence == Fence(self.bucket.id, self.nonce, False, True) for fence in self.fences().values())

    def rows(self) -> list[tuple[str, RegisterName]]:
        """What replicas have of its objects, besides deleted ones: not disks that have handed them over."""
        return [
            (disk, name)
            for disk in self.cluster.layouts.current.disk_by_id
            for packed, (_, visibility) in self.cluster.rows(disk).items()
            for name in [RegisterName.unpack(packed)]
            if (name.scope, name.table) == (self.bucket.id, Table.OBJECT)
            and visibility != Visibility.TOMBSTONE
            and disk in self.cluster.layouts.partition(name.partition).present
        ]

    async def drop_copies(self) -> None:
        for key in (b"b", b"c"):
            await self.delete(key)

    async def assert_ends(self) -> None:
        """The copies are gone: so the lender ends, and leaves nothing."""
        cluster = self.cluster
        await self.tidy()
        await self.housekeep()
        assert not await self.lends()
        assert all(fence == Fence(self.bucket.id, self.nonce, True) for fence in self.fences().values())
        assert not self.rows()
        await self.tidy()
        await sweep_pages(cluster)
        if await self._unknown():  # what was judged while the fence became final is judged again
            await self.tidy()
        assert not await self._unknown()
        await self.housekeep()
        assert self.bucket.id not in cluster.keys.newest
        assert self.bucket.id not in cluster.keys.ended
        await self.check()

    async def _unknown(self) -> set[tuple[str, FragmentId]]:
        """Fragments that no object refers to."""
        found = set(await self.cluster.fragments())
        for key in self.datas:
            for part in await self.parts(key):
                found -= set(await self.cluster.fragments(part.data_id))
        return found

    async def assert_refused(self, gateway: Gateway | None = None) -> None:
        """What comes with the record of the deleted bucket."""
        before = self.rows()
        for key in (b"a", b"new"):
            with pytest.raises((NoSuchBucket, OutcomeUnknown)):
                await self.cluster.put(self.bucket, key, b"from before", gateway)
        assert self.rows() == before


async def all_walk(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        if node.up:
            node.maintenance.check.request_walk()
    assert await cluster.settled() == (0, 0)


async def without_each(cluster: Cluster, lending: Copied, nodes: Sequence[str] = ("na", "nb", "nc")) -> None:
    """Everything can be read without any one of the nodes."""
    for node in nodes:
        await cluster.kill(node)
        await lending.check()
        cluster.start(node)
        await cluster.pass_s(10)


# --- its end


@PAGED
def test_data_goes_with_its_last_copy_while_the_bucket_lends_more_and_then_nothing_is_left(paged: bool) -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.begin()
        for source, copy in ((b"a", b"b"), (b"d", b"c")):
            await lending.store(source, paged=paged)
            await lending.copy(source, copy)
        upload = await cluster.objects.create_upload(lending.bucket, b"up", NewMeta(), owner=WHO.user_id)
        await cluster.put_part(lending.bucket, b"up", upload.upload_id, 1, os.urandom(100_000))
        ids = [part.data_id for part in await lending.parts(b"a")]
        others = [part.data_id for part in await lending.parts(b"d")]
        await lending.delete(b"a")
        await lending.delete(b"d")
        await lending.end_bucket()
        await lending.tidy()
        await sweep_pages(cluster)
        await lending.check()
        assert lending.lend_all()
        await lending.delete(b"b")
        await lending.tidy()
        await sweep_pages(cluster)
        await lending.housekeep()
        for data_id in ids:
            assert not await cluster.fragments(data_id)
        for data_id in others:
            assert len(await cluster.fragments(data_id)) == 6
        assert await lending.lends()
        assert lending.bucket.id in cluster.keys.newest
        await lending.check()
        await lending.delete(b"c")
        await cluster.leap(ORPHAN_S + 60)
        await lending.assert_ends()
        assert not kept(cluster)

    run(scenario)


def test_loans_that_a_dead_gateway_left_in_a_lender_end_and_so_does_the_lender() -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.make()
        plane: Any = cluster.gateway.plane
        plane.background.spawn = lambda work: work.close() or False
        await lending.drop_copies()
        del plane.background.spawn
        await lending.housekeep()
        assert await lending.lends()
        cluster.maintain()
        await cluster.leap(FRESH_MS / 1000 + 60)
        await all_walk(cluster)
        await lending.assert_ends()

    run(scenario)


@pytest.mark.parametrize("step", ["begin", "deleted", "tend"])
def test_a_gateway_dies_while_a_bucket_becomes_a_lender_and_another_one_goes_on(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``begin``: all fences lend; ``deleted``: the record of the lender is there, too; ``tend``: it is a lender."""

    async def dies(*_args: object, **_named: object) -> None:
        raise asyncio.CancelledError

    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.begin()
        await lending.store(b"a", paged=True)
        ids = [part.data_id for part in await lending.parts(b"a")]
        await lending.copy(b"a", b"b")
        await lending.copy(b"b", b"c")
        await lending.delete(b"a")
        dying = cluster.new_gateway("dying")
        if step == "deleted":
            go_on = dying.buckets._step

            async def only_before(record: BucketRecord, after: BucketRecord, **how: bytes) -> BucketRecord | None:
                if after.state == DELETED:
                    await dies()
                return await go_on(record, after, **how)

            dying.buckets._step = only_before  # type: ignore[method-assign]
        else:
            monkeypatch.setattr(dying.buckets._lenders, step, dies)
        try:
            await dying.buckets.delete(lending.bucket)
        except asyncio.CancelledError:
            assert step != "tend"
        assert await lending.lends() == (step != "begin")
        await lending.tidy()
        await sweep_pages(cluster)
        await lending.check()
        await lending.housekeep()
        assert await lending.lends()
        with pytest.raises(NoSuchBucket):
            await cluster.buckets.renewed("bucket")
        found = await cluster.gateway.plane.lenders.find(lending.bucket.id)
        assert found is not None
        lending.nonce = found.nonce
        assert lending.lend_all()
        await lending.drop_copies()
        await lending.assert_ends()
        for data_id in ids:
            assert not await cluster.fragments(data_id)

    run(scenario)


# --- what it lends stays whole


def test_what_a_lender_lends_stays_in_its_countries() -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster, countries=("FR",))
        await lending.make(paged=True)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        await cluster.pass_s(LIMITS.recode_delay_s + 60)
        await cluster.settled()
        await lending.check()
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        await lending.tidy()
        await sweep_pages(cluster)
        await lending.check()
        layout = cluster.layouts.current
        assert {layout.country_of(disk) for disk, _ in await cluster.fragments()} == {"FR"}
        await without_each(cluster, lending)
        await lending.drop_copies()
        await lending.assert_ends()

    run(scenario, racks={**RACKS, "d": "DE/ber1/d"}, limits=LIMITS)


def test_a_disk_that_is_drained_has_nothing_of_a_lender_in_the_end() -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.make(paged=True)
        cluster.maintain()
        await cluster.settled()
        ids = [part.data_id for part in await lending.parts(b"a") if part.runs]
        held = [disk for data_id in ids for disk, _ in await cluster.fragments(data_id)]
        drained = max(sorted(set(held)), key=held.count)
        layout = layout_of(2, epoch=2, racks={**RACKS, "d": "FR/lyo2/d"})
        disks = tuple(
            msgspec.structs.replace(disk, state="draining") if disk.id == drained else disk for disk in layout.disks
        )
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(msgspec.structs.replace(layout, disks=disks, base=1))
        for _ in range(60):
            await cluster.pass_s(10)
            if drained not in {disk for data_id in ids for disk, _ in await cluster.fragments(data_id)}:
                break
        for data_id in ids:
            assert drained not in {disk for disk, _ in await cluster.fragments(data_id)}
        await lending.tidy()
        await lending.check()

    run(scenario, racks={**RACKS, "d": "FR/lyo2/d"}, limits=LIMITS)


def test_a_damaged_page_of_a_lender_is_restored() -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.make(paged=True)
        cluster.maintain()
        await cluster.settled()
        name = lending.name(b"a")
        replicas = cluster.layouts.partition(name.partition).present
        value = (await cluster.gateway.ring.read(name)).value
        needed = [page async for page in pages_in(cluster.gateway.ring, name, value)]
        assert needed
        for index, page in enumerate(needed):
            cluster.meta(replicas[index % len(replicas)]).damage_page(page)
            assert page not in cluster.pages(replicas[index % len(replicas)])
        await all_walk(cluster)
        for disk in replicas:
            assert set(needed) <= set(cluster.pages(disk))
        await without_each(cluster, lending)

    run(scenario)


# --- disks that were away, and disks that come


def test_a_bucket_becomes_no_lender_while_a_node_is_away_and_is_usable_until_that_is_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.begin()
        await lending.store(b"a", paged=False)
        for copy in (b"b", b"c"):
            await lending.copy(b"a", copy)
        await lending.delete(b"a")
        cluster.maintain()
        await cluster.settled()
        for turn, node in enumerate(("na", "nb", "nc")):
            await cluster.kill(node)
            with pytest.raises(SlowDown, match="Copies in other buckets"):
                await cluster.buckets.delete(lending.bucket)
            lending.bucket = await cluster.buckets.renewed("bucket")
            await lending.put(b"more", b"it is usable %d" % turn)
            await lending.check()
            await lending.delete(b"more")
            assert not await lending.lends()
            cluster.start(node)
            assert await cluster.settled() == (0, 0)
            lending.bucket = await cluster.buckets.renewed("bucket")
            assert not lending.bucket.nonce
            await lending.put(b"more", b"by all nodes")
            await lending.delete(b"more")
        await lending.end_bucket()
        assert lending.lend_all()
        await lending.drop_copies()
        await lending.assert_ends()

    run(scenario)


@pytest.mark.parametrize("node", ["na", "nb", "nc"])
def test_a_node_that_was_away_later_learns_that_loans_have_ended(node: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.begin()
        for source in (b"a", b"d"):
            await lending.store(source, paged=source == b"d")
        for source, copies in ((b"a", (b"b", b"c")), (b"d", (b"e", b"f"))):
            for copy in copies:
                await lending.copy(source, copy)
            await lending.delete(source)
        await lending.end_bucket()
        cluster.maintain()
        await cluster.settled()
        await cluster.kill(node)
        await lending.drop_copies()
        await lending.delete(b"e")
        await lending.housekeep()
        assert await lending.lends()
        await lending.check()
        cluster.start(node)
        assert await cluster.settled() == (0, 0)
        await all_walk(cluster)
        assert cluster.differing_registers() == []
        for other in {"na", "nb", "nc"} - {node}:
            await cluster.kill(other)
            assert await lending.loans(b"a") == 0
            assert await lending.loans(b"d") == 1
            await lending.check()
            cluster.start(other)
            await cluster.settled()
        await lending.delete(b"f")
        await cluster.leap(ORPHAN_S + 60)
        await lending.assert_ends()

    run(scenario)


def test_rows_of_a_lender_that_differ_are_settled_by_the_walk() -> None:
    """One replica has the row from before a loan ended."""

    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.make()
        name = lending.name(b"a")
        replicas = cluster.layouts.partition(name.partition).present
        before = {disk: cluster.meta(disk).get(name) for disk in replicas}
        await lending.delete(b"b")
        slot = before[replicas[0]]
        assert slot is not None
        await write_to(cluster, replicas[:1], StoreBatch(slots=[slot]))
        assert cluster.differing_registers() == [name.pack()]
        cluster.maintain()
        await cluster.settled()
        assert cluster.differing_registers() == []
        assert lending.lend_all()
        await lending.tidy()
        await lending.check()
        await lending.delete(b"c")
        await lending.assert_ends()

    run(scenario)


@pytest.mark.parametrize(("paged", "away"), [(True, ""), (False, "na"), (True, "nb"), (False, "nc")])
def test_partitions_of_a_lender_move_to_disks_that_have_nothing_of_it(paged: bool, away: str) -> None:
    """``away``: a node that is away while the first of them moves, unless the disk that comes is its own."""

    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.make(paged=paged)
        cluster.maintain()
        await cluster.settled()
        suspended = cluster.new_gateway("suspended")
        moves = Moves(cluster, random.Random(7))
        partition = lending.name(b"a").partition
        joint = await moves.joint(partition)
        state = cluster.layouts.partition(partition)
        is_spared = away and cluster.layouts.current.node_of(state.comes) != away
        if is_spared:
            await cluster.kill(away)
        await moves.bring_up(partition)
        await moves.settle(joint)
        if is_spared:
            cluster.start(away)
            await cluster.settled()
        await cluster.pass_s(10)
        await lending.check()
        for key in (b"b", b"a", b"c", b"a", b"a"):
            await moves.move(lending.name(key).partition)
            await cluster.pass_s(5)
            await lending.check()
        assert lending.lend_all()
        await lending.assert_refused()
        await lending.assert_refused(suspended)
        assert await cluster.settled() == (0, 0)
        assert cluster.differing_registers() == []
        await lending.tidy()
        await without_each(cluster, lending)
        await lending.drop_copies()
        await cluster.leap(ORPHAN_S + 60)
        await lending.assert_ends()

    run(scenario)


@pytest.mark.parametrize("replica", [0, 1, 2])
@pytest.mark.parametrize("moved", [False, True])
def test_a_create_that_slept_on_its_way_since_before_the_bucket_was_deleted_leaves_nothing(
    replica: int, moved: bool
) -> None:
    """It reaches one replica after the bucket has become a lender. ``moved``: a new disk is in the place of that."""

    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.begin()
        await lending.store(b"a", paged=False)
        for copy in (b"b", b"c"):
            await lending.copy(b"a", copy)
        suspended = cluster.new_gateway("suspended")
        await suspended.objects.head(lending.bucket, b"a")
        awake = asyncio.Event()
        key = b"late"
        name = object_name(lending.bucket.id, lending.bucket.shard_numbers, key)
        at = cluster.layouts.partition(name.partition).present[replica]

        async def sleeps(source: str, node: str, _method: str, request: Any) -> None:
            if source == "suspended" and isinstance(request, Create | Accept | Accepts):
                await awake.wait()
                if node != cluster.layouts.current.node_of(at):
                    raise PeerUnreachable("It reaches one replica alone.")

        cluster.intercept = sleeps
        putting = asyncio.ensure_future(cluster.put(lending.bucket, key, os.urandom(300_000), suspended))
        await cluster.pass_s(1)
        assert not putting.done()
        await lending.delete(b"a")
        await lending.end_bucket()
        cluster.maintain()
        await cluster.settled()
        if moved:
            moves = Moves(cluster, random.Random(replica))
            while at in cluster.layouts.partition(name.partition).present:
                await moves.move(name.partition)
        awake.set()
        with pytest.raises((NoSuchBucket, OutcomeUnknown, ServiceUnavailable)):
            await putting
        assert not [row for row in lending.rows() if row[1] == name]
        await all_walk(cluster)
        await lending.tidy()
        await lending.check()
        await lending.drop_copies()
        await lending.assert_ends()

    run(scenario)


# --- lies


@pytest.mark.parametrize("says", ["what is true", "that the fence stays"])
def test_a_directory_that_leaves_out_a_lender_costs_it_nothing(monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.make(paged=True)
        await cluster.leap(ORPHAN_S + 60)
        await lending.tidy()
        await sweep_pages(cluster)
        fragments, pages = await cluster.fragments(), kept(cluster)
        for store in (store for node in cluster.nodes.values() for store in node.fragments.values()):
            for data_id in {fragment.data_id for fragment in store.fragments}:
                await store.unretire(data_id)
        with monkeypatch.context() as lies:
            leave_out_buckets(cluster, lies)
            if says == "that the fence stays":
                liar = cluster.layouts.partition(lending.name(b"a").partition).present[:1]
                await write_to(cluster, liar, StoreBatch(fences=[Fence(lending.bucket.id, lending.nonce, True)]))
            await cluster.leap(ORPHAN_S + 60)
            await sweep(cluster)
            await sweep_pages(cluster)
            await cluster.pass_s(1)
            assert await collect(cluster) == 0
            cluster.maintain()
            await cluster.leap(ORPHAN_S + 60)
            await cluster.pass_s(60)
        assert await cluster.fragments() == fragments
        assert kept(cluster) == pages
        await lending.check()

    run(scenario)


def test_an_attempt_to_delete_the_bucket_from_before_it_was_a_lender_ends_nothing() -> None:
    """A gateway slept while it deleted the bucket. Another one gave the bucket back, and it was deleted again."""

    async def scenario(cluster: Cluster) -> None:
        lending = Lending(cluster)
        await lending.begin()
        await lending.store(b"a", paged=False)
        for copy in (b"b", b"c"):
            await lending.copy(b"a", copy)
        slow = cluster.new_gateway("slow")
        asleep, awake = asyncio.Event(), asyncio.Event()
        fence = slow.plane.fences.fence

        async def sleeps(*args: Any, **named: Any) -> bool:
            asleep.set()
            await awake.wait()
            return await fence(*args, **named)

        data = lending.datas.pop(b"a")
        await cluster.objects.delete(lending.bucket, b"a")
        await lending.delete(b"b")
        await lending.delete(b"c")
        slow.plane.fences = type("Fences", (), {"fence": staticmethod(sleeps), "unfence": slow.ring.unfence})()
        deleting = asyncio.ensure_future(slow.buckets.delete(lending.bucket))
        await asleep.wait()
        await cluster.put(lending.bucket, b"a", data)
        (record,) = [one for one in await cluster.buckets.every_bucket() if one.name == "bucket"]
        assert record.state == "deleting"
        await cluster.buckets.resume(record)
        lending.bucket = await cluster.buckets.renewed("bucket")
        lending.datas[b"a"] = data
        for copy in (b"b", b"c"):
            await lending.copy(b"a", copy)
        await lending.delete(b"a")
        await lending.end_bucket()
        awake.set()
        with pytest.raises((ServiceUnavailable, NoSuchBucket)):
            await deleting
        assert lending.lend_all()
        await slow.plane.background.settle()
        await tidy(slow.plane, slow.buckets)
        assert await lending.lends()
        await lending.tidy()
        await lending.check()
        await lending.drop_copies()
        await lending.assert_ends()

    run(scenario)
