"""Partitions exchange replicas while clients work: nothing is lost, and in the end the new replicas have everything.

The records of partitions are passed on by hand here, to one process after the other. Everything else is the cluster's
own: rounds, small copies, pages, fences, listings, background work.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import pytest

from storaged.cluster.layout import partition_of
from storaged.cluster.partitions import PartitionRecord
from storaged.errors import (
    BucketNotEmpty,
    NoSuchBucket,
    NoSuchKey,
    OutcomeUnknown,
    PeerUnreachable,
    ServiceUnavailable,
    StoragedError,
)
from storaged.fragments.ports import FragmentId
from storaged.maintain.partition_mover import MoverPorts, PartitionMover
from storaged.meta.names import RegisterName, Visibility, object_name
from storaged.objects.api import CompletedPart, NewMeta
from storaged.objects.records import BucketRecord
from storaged.objects.where import where
from storaged.objects.write.references import pages_in
from tests.integration.memory_cluster import WHO, Cluster, run

T = TypeVar("T")
SIZES = (10, 900, 5_000, 15_000, 600_000)
TRIES = 20
MOVES = 9
LONG = 40
"""Parts of an upload whose manifest is on a page."""


async def retried(call: Callable[..., Awaitable[T]], *args: Any, **named: Any) -> T:
    """What a client's SDK does."""
    for _ in range(TRIES):
        try:
            return await call(*args, **named)
        except (ServiceUnavailable, OutcomeUnknown):
            await asyncio.sleep(0.2)
    return await call(*args, **named)


class Clients:
    """Each changes keys of its own, so that it knows what they hold."""

    def __init__(self, cluster: Cluster, bucket: BucketRecord, chance: random.Random) -> None:
        self.cluster = cluster
        self.bucket = bucket
        self.chance = chance
        self.held: dict[bytes, bytes] = {}
        self.changes: dict[bytes, int] = {}
        self.done = 0
        self.stopping = False
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        work = [self.change(number) for number in range(4)]
        work += [self.list(), self.upload(), self.other_bucket()]
        self.tasks = [asyncio.get_running_loop().create_task(one) for one in work]

    async def end(self) -> None:
        self.stopping = True
        await asyncio.gather(*self.tasks)

    def noting(self, key: bytes) -> None:
        """It may be listed or not from now on, until this is called again."""
        self.changes[key] = self.changes.get(key, 0) + 1

    async def put(self, key: bytes, data: bytes) -> None:
        self.noting(key)
        await retried(self.cluster.put, self.bucket, key, data)
        self.held[key] = data
        self.noting(key)

    async def check(self, key: bytes) -> None:
        try:
            found = await retried(self.cluster.get, self.bucket, key)
        except NoSuchKey:
            assert key not in self.held, key
        else:
            assert found == self.held[key], key

    async def change(self, number: int) -> None:
        while not self.stopping:
            key = b"%d-%d" % (number, self.chance.randrange(12))
            choice = self.chance.random()
            if choice < 0.5:
                await self.put(key, self.chance.randbytes(self.chance.choice(SIZES)))
            elif choice < 0.65:
                self.noting(key)
                await retried(self.cluster.objects.delete, self.bucket, key)
                self.held.pop(key, None)
                self.noting(key)
            await self.check(key)
            self.done += 1
            await asyncio.sleep(0.05)

    async def list(self) -> None:
        while not self.stopping:
            before, held = dict(self.changes), set(self.held)
            listing = await retried(self.cluster.objects.list_objects, self.bucket, limit=1000)
            listed = set(listing.keys)
            still = {key for key, count in before.items() if count == self.changes[key] and count % 2 == 0}
            assert listed & still == held & still
            self.done += 1
            await asyncio.sleep(0.1)

    async def upload(self) -> None:
        objects = self.cluster.objects
        for number in range(1_000_000):
            if self.stopping:
                break
            key, parts = b"upload-%d" % (number % 5), (LONG if number % 3 == 0 else 2)
            whole, named = b"", []
            made = await retried(objects.create_upload, self.bucket, key, NewMeta(), owner=WHO.user_id)
            for part in range(1, parts + 1):
                data = self.chance.randbytes(20 + part)
                result = await retried(self.cluster.put_part, self.bucket, key, made.upload_id, part, data)
                named.append(CompletedPart(part, result.etag))
                whole += data
            self.noting(key)
            await retried(objects.complete, self.bucket, key, made.upload_id, named, owner=WHO.user_id)
            self.held[key] = whole
            self.noting(key)
            await self.check(key)
            self.done += 1

    async def other_bucket(self) -> None:
        """Is deleted in vain, then emptied and deleted, again and again."""
        buckets, put = self.cluster.buckets, self.cluster.put
        while not self.stopping:
            self.other = other = await retried(buckets.create, WHO, "other", region="eu-fr-1")
            for turn in range(2):
                await retried(put, other, b"kept", b"x" * 2_000)
                with pytest.raises(BucketNotEmpty):
                    await retried(buckets.delete, other)
                assert await retried(self.cluster.get, other, b"kept") == b"x" * 2_000
                await retried(put, other, b"%d" % turn, b"y")
                await asyncio.sleep(0.2)
            for key in (b"kept", b"0", b"1"):
                await retried(self.cluster.objects.delete, other, key)
            await retried(buckets.delete, other)
            self.done += 1


class Moves:
    """Moves partitions by the gateway's own calls."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        self.cluster = cluster
        self.chance = chance
        self.layouts = cluster.gateway.layouts
        self.moved: dict[int, str] = {}
        """Which disk came last."""
        self.copied: list[RegisterName] = []
        """Small objects of partitions that have moved."""
        gateway = cluster.gateway

        async def refresh(_partition: int) -> None: ...

        self.mover = PartitionMover(
            MoverPorts(
                self.layouts,
                gateway.ring,
                gateway.scanner,
                gateway.ring,
                gateway.ring.moves,
                cluster.alive,
                cluster.clock,
                lambda record: record,
                refresh,
            )
        )

    async def joint(self, partition: int) -> PartitionRecord:
        """A disk of the same rack takes the place of a replica."""
        state, layout = self.layouts.partition(partition), self.layouts.current
        goes = self.chance.choice(state.present)
        comes = next(disk.id for disk in layout.disks if disk.id != goes and disk.node == layout.node_of(goes))
        coming = tuple(comes if disk == goes else disk for disk in state.present)
        record = PartitionRecord(partition, state.step + 1, state.present, coming, layout.epoch)
        await self.cluster.learn(record, self.chance)
        return record

    async def bring_up(self, partition: int) -> None:
        state = self.layouts.partition(partition)
        for _ in range(200):
            try:
                if await self.mover._bring_up(state):
                    return
            except StoragedError:  # clients were in the way
                pass
            await self.cluster.pass_s(0.1)
        raise AssertionError(f"partition {partition} is never whole")

    async def settle(self, joint: PartitionRecord) -> None:
        partition = joint.partition
        settled = PartitionRecord(partition, joint.step + 1, joint.coming, (), joint.layout)
        await self.cluster.learn(settled, self.chance)
        await self.cluster.gateway.ring.moves.fence(self.layouts.partition(partition))
        self.moved[partition] = next(iter(set(joint.coming) - set(joint.present)))

    async def move(self, partition: int) -> None:
        record = await self.joint(partition)
        await self.cluster.pass_s(self.chance.random())
        await self.bring_up(partition)
        await self.settle(record)


async def assert_complete(cluster: Cluster, moves: Moves) -> None:
    """The disks that came have the rows, copies and pages that the others of their partition have."""
    rows = {disk.id: cluster.rows(disk.id) for disk in cluster.layouts.current.disks}
    checked = 0
    for partition, disk in moves.moved.items():
        state = cluster.layouts.partition(partition)
        names = {name for its in rows.values() for name in its if RegisterName.unpack(name).partition == partition}
        for packed in names:
            name = RegisterName.unpack(packed)
            try:
                value = await cluster.gateway.ring.settle(name)
            except NoSuchBucket:
                continue
            held = {replica: cluster.meta(replica).get(name) for replica in state.present}
            assert len({slot and (slot.ballot, slot.value) for slot in held.values()}) == 1, (partition, name, held)
            if value is None or value.visibility == Visibility.TOMBSTONE:
                continue
            checked += 1
            async for page in pages_in(cluster.gateway.ring, name, value):
                assert page in cluster.pages(disk)
            if value.payload:
                moves.copied.append(name)
                copy = FragmentId(value.payload, 0, 1, len(state.present) - 1, state.position_of(disk))
                assert cluster.holds(disk, copy), (partition, name)
    assert checked > 2


async def small_object(cluster: Cluster, key: bytes = b"key") -> tuple[BucketRecord, RegisterName]:
    bucket = await cluster.bucket()
    await cluster.put(bucket, key, b"x" * 5_000)
    return bucket, object_name(bucket.id, bucket.shard_numbers, key)


def test_where_shows_the_replicas_of_both_sets() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, name = await small_object(cluster)
        moves = Moves(cluster, random.Random(1))
        before = await where(cluster.objects.plane, bucket, b"key")
        assert (len(before.replicas), before.replicas_may_fail, before.disks_may_fail) == (3, 1, 2)
        await moves.joint(name.partition)
        state = moves.layouts.partition(name.partition)
        found = await where(cluster.objects.plane, bucket, b"key")
        assert {replica.disk: replica.state for replica in found.replicas} == {
            **dict.fromkeys(state.present, "ok"),
            state.comes: "empty",
        }
        assert [(copy.disk, copy.position, copy.state) for run in found.runs for copy in run.fragments] == [
            *((disk, position, "ok") for position, disk in enumerate(state.present)),
            (state.comes, state.position_of(state.comes), "missing"),
        ]
        assert (found.replicas_may_fail, found.disks_may_fail) == (1, 2)
        cluster.lose_disk(state.comes)
        found = await where(cluster.objects.plane, bucket, b"key")
        assert found.replicas_may_fail == 0, "each of the others is needed for a majority of the coming set"
        await cluster.put(bucket, b"key", b"y" * 5_000)
        found = await where(cluster.objects.plane, bucket, b"key")
        assert {replica.state for replica in found.replicas if replica.disk != state.comes} == {"ok"}

    run(scenario)


def test_a_write_while_a_partition_moves_leaves_copies_at_both_sets_and_needs_a_majority_of_each() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, name = await small_object(cluster)
        moves = Moves(cluster, random.Random(1))
        await moves.joint(name.partition)
        state = moves.layouts.partition(name.partition)
        await cluster.put(bucket, b"key", b"y" * 5_000)
        await cluster.pass_s(1)
        value = (await cluster.gateway.ring.read(name)).value
        assert value is not None
        copies = {(disk, copy.position) for disk, copy in await cluster.fragments(value.payload)}
        assert copies == {(disk, state.position_of(disk)) for disk in state.disks}
        both = next(disk for disk in state.present if disk != state.goes)
        cluster.lose_disk(state.comes)
        cluster.lose_disk(both)  # two of three are left of the set that it has, one of the set that comes
        with pytest.raises(ServiceUnavailable):
            await cluster.put(bucket, b"key", b"z" * 5_000)
        with pytest.raises(ServiceUnavailable):
            await cluster.get(bucket, b"key")

    run(scenario)


def test_a_listing_settles_nothing_for_the_disk_that_comes() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, name = await small_object(cluster)
        keys = [b"%d" % number for number in range(200)]
        keys = [key for key in keys if object_name(bucket.id, bucket.shard_numbers, key).shard == name.shard]
        for key in keys:
            await cluster.put(bucket, key, b"x")
        moves = Moves(cluster, random.Random(1))
        await moves.joint(name.partition)
        state = moves.layouts.partition(name.partition)
        cluster.lose_disk(next(disk for disk in state.present if disk != state.goes))
        rounds = cluster.gateway.ring.statistics().identity_rounds
        listing = await cluster.objects.list_objects(bucket)
        assert list(listing.keys) == sorted([*keys, b"key"])
        assert cluster.gateway.ring.statistics().identity_rounds == rounds
        # What was written meanwhile, and has no majority of the coming set, is settled before it is listed.
        await cluster.put(bucket, b"key", b"new")
        del cluster.meta(state.comes)._shards[name[:3]]
        listing = await cluster.objects.list_objects(bucket)
        assert list(listing.keys) == sorted([*keys, b"key"])
        assert cluster.gateway.ring.statistics().identity_rounds == rounds + 1

    run(scenario)


def test_a_gateway_that_has_not_heard_of_a_move_learns_of_it() -> None:
    """Requests that it refused once would be refused for long: its map is read again every minute."""

    async def scenario(cluster: Cluster) -> None:
        bucket, name = await small_object(cluster)
        moves, late = Moves(cluster, random.Random(1)), cluster.new_gateway("late")
        await late.objects.get(bucket, b"key")
        cluster.gateways.remove(late)  # nobody tells it
        await moves.move(name.partition)
        assert late.layouts.partition(name.partition).step == 0
        listing = await late.objects.list_objects(bucket)
        assert list(listing.keys) == [b"key"]
        assert late.layouts.partition(name.partition).step == 2
        await late.close()

    run(scenario)


def test_a_process_that_does_not_know_where_keys_are_refuses_and_guesses_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _name = await small_object(cluster)
        cluster.maintain()
        await cluster.settled()
        layout = cluster.layouts.current
        cluster.layouts.learn(msgspec.structs.replace(layout, epoch=2, base=1))
        processes = (cluster.gateway, *cluster.nodes.values())
        for process in processes:
            process.layouts.partitions.complete = False
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.pass_s(10)
        assert not any(node.maintenance.check.current for node in cluster.nodes.values()), "nothing was counted"
        with pytest.raises(ServiceUnavailable):
            await cluster.put(bucket, b"key", b"y" * 5_000)
        with pytest.raises(ServiceUnavailable):
            await cluster.get(bucket, b"key")
        with pytest.raises(ServiceUnavailable):
            await cluster.objects.delete(bucket, b"key")
        with pytest.raises(ServiceUnavailable):
            await cluster.objects.list_objects(bucket)
        with pytest.raises(ServiceUnavailable):
            await cluster.buckets.delete(bucket)
        for node in cluster.nodes.values():
            await node.maintenance.collector.sweep()
        await collect(cluster)
        for process in processes:
            process.layouts.partitions.complete = True
        await cluster.pass_s(30)  # background work has gone on
        assert await cluster.get(await cluster.buckets.resume(bucket) or bucket, b"key") == b"x" * 5_000
        assert len(await cluster.fragments()) == 3

    run(scenario)


def test_a_disk_that_the_layout_names_no_more_serves_until_its_partitions_have_moved() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, name = await small_object(cluster)
        layout = cluster.layouts.current
        gone, other, _ = cluster.gateway.layouts.partition(name.partition).present
        disks = tuple(disk for disk in layout.disks if disk.id != gone)
        cluster.layouts.learn(msgspec.structs.replace(layout, epoch=2, base=1, disks=disks))
        cluster.lose_disk(other)
        assert await cluster.get(bucket, b"key") == b"x" * 5_000
        await cluster.put(bucket, b"key", b"y" * 5_000)
        slot = cluster.nodes[layout.node_of(gone)].meta[gone].get(name)
        assert slot is not None
        assert slot.value.sequence == 2

    run(scenario)


async def collect(cluster: Cluster) -> None:
    """Days pass, and everything is swept."""
    limits = cluster.limits
    for _ in range(2):
        await cluster.leap(limits.orphan_age_ms / 1000 + 60)
        for node in cluster.nodes.values():
            await node.maintenance.collector.sweep()
        await cluster.leap(600)
        for node in cluster.nodes.values():
            await node.maintenance.collector.collect_due()


async def assert_gone(cluster: Cluster, moves: Moves) -> None:
    """Small copies are where the replicas are, and nowhere else."""
    for key in moves.copied:
        value = (await cluster.gateway.ring.read(key)).value
        if value is None or not value.payload:
            continue
        state = cluster.layouts.partition(key.partition)
        copies = {(disk, copy.position) for disk, copy in await cluster.fragments(value.payload)}
        assert copies == {(disk, position) for position, disk in enumerate(state.present)}


def test_a_disk_that_takes_earlier_steps_does_not_count_as_brought_up() -> None:
    """It may accept a late value after it was compared. With a disk that was not compared this may be chosen."""

    async def scenario(cluster: Cluster) -> None:
        _bucket, name = await small_object(cluster)
        moves = Moves(cluster, random.Random(1))
        await moves.joint(name.partition)
        state = moves.layouts.partition(name.partition)
        unfenced = next(disk for disk in state.coming if disk in state.present)

        async def trouble(_source: str, node: str, method: str, request: Any) -> None:
            if (method == "meta.fence_epoch" and request.disk == unfenced) or (
                method == "meta.scan" and request.disk == state.goes
            ):
                raise PeerUnreachable(f"{request.disk} is away")

        cluster.intercept = trouble
        assert not await moves.mover._bring_up(state)
        cluster.intercept = None
        assert await moves.mover._bring_up(state)

    run(scenario)


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_while_partitions_move_under_load(seed: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        chance = random.Random(seed)
        bucket = await cluster.bucket()
        clients, moves = Clients(cluster, bucket, chance), Moves(cluster, chance)
        cluster.maintain()
        clients.begin()
        await cluster.pass_s(1)
        for turn in range(MOVES):
            key = chance.choice(sorted(clients.held))
            of = object_name(bucket.id, bucket.shard_numbers, key).partition
            await moves.move(of if turn % 3 else partition_of(clients.other.id, chance.randrange(16)))
            for task in clients.tasks:
                assert not task.done() or task.exception() is None, task.exception()
        await clients.end()
        assert clients.done > 100
        for key in clients.changes:
            await clients.check(key)
        await assert_complete(cluster, moves)
        await collect(cluster)
        await assert_complete(cluster, moves)
        await assert_gone(cluster, moves)
        for rack in ("na", "nb", "nc"):  # what the disks of two racks have is enough
            await cluster.kill(rack)
            for key in clients.changes:
                await clients.check(key)
            cluster.start(rack)
            await cluster.pass_s(10)

    run(scenario)
