"""One of three replicas lies about its row, while both others are sound: nothing that the others agree on changes."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import pytest

from storaged.errors import FragmentOther
from storaged.hashes import fragment_hash
from storaged.maintain.answers import settle_handler
from storaged.maintain.asks import SETTLED, Settle
from storaged.maintain.health import BlockPlace
from storaged.maintain.moves import REFUSED, DiscardAsk, FragmentAsk
from storaged.maintain.pull import Behind, BroughtUp
from storaged.meta import messages
from storaged.meta.consensus.register import digest_of
from storaged.meta.names import SEQUENCE_MAX, Ballot, RegisterName, Value, Visibility, object_name
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import Cluster, LocalCaller, run

LARGE = 300_000
KEY = b"key"


def name_of(bucket: BucketRecord) -> RegisterName:
    return object_name(bucket.id, bucket.shard_numbers, KEY)


def held(cluster: Cluster, disk: str, name: RegisterName) -> Slot:
    slot = cluster.meta(disk).get(name)
    assert slot is not None
    return slot


def deleted(value: Value) -> Value:
    return Value(value.sequence + 1, b"f" * 16, Visibility.TOMBSTONE, b"")


def ahead(cluster: Cluster, _ballot: Ballot) -> Ballot:
    return Ballot(1, cluster.clock.wall_ms() * 1000 + 1000, "n", b"12345678")


def same(_cluster: Cluster, ballot: Ballot) -> Ballot:
    return ballot


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("ballot_of", [ahead, same])
def test_a_lone_replica_neither_deletes_an_object_nor_hides_it(
    position: int, ballot_of: Callable[[Cluster, Ballot], Ballot]
) -> None:
    """Under a ballot above that of the others, and under their own."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        data = os.urandom(LARGE)
        await cluster.put(bucket, KEY, data)
        await cluster.pass_s(5)
        name = name_of(bucket)
        replicas = cluster.layouts.current.replicas_of(name.partition)
        liar = replicas[position]
        true = held(cluster, liar, name)
        lie = Slot(name, ballot_of(cluster, true.ballot), deleted(true.value))
        await cluster.meta(liar).commit(StoreBatch((lie,)))
        assert await cluster.get(bucket, KEY) == data
        answer = await settle_handler(cluster.gateway.ring)(
            cluster.layouts.current.node_of(liar), Settle((name.pack(),))
        )
        assert answer.results == (SETTLED,)  # type: ignore[attr-defined]
        assert await cluster.get(bucket, KEY) == data
        assert {held(cluster, disk, name).value for disk in replicas} == {true.value}

    run(scenario)


@pytest.mark.parametrize("position", range(3))
def test_a_lone_replica_does_not_use_up_the_sequences_of_a_register(position: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, os.urandom(LARGE))
        await cluster.pass_s(5)
        name = name_of(bucket)
        liar = cluster.layouts.current.replicas_of(name.partition)[position]
        for sequence in (SEQUENCE_MAX, SEQUENCE_MAX - 1):
            lie = msgspec.structs.replace(deleted(held(cluster, liar, name).value), sequence=sequence)
            ballot = ahead(cluster, held(cluster, liar, name).ballot)
            await cluster.meta(liar).commit(StoreBatch((Slot(name, ballot, lie),)))
            for _ in range(2):
                data = os.urandom(LARGE)
                await cluster.put(bucket, KEY, data)
                assert await cluster.get(bucket, KEY) == data

    run(scenario)


@pytest.mark.parametrize("with_digest", ["true", "of the lie"])
def test_a_disk_that_lags_adopts_no_value_that_a_lone_replica_reports(with_digest: str) -> None:
    """The liar reports the ballot of the others, and answers first."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        name = name_of(bucket)
        liar, sound, lagging = cluster.layouts.current.replicas_of(name.partition)
        node_of = cluster.layouts.current.node_of
        true = Value(1, b"o" * 16, Visibility.LIVE, b"")
        ballot = Ballot(1, cluster.clock.wall_ms() * 1000, "g", b"incarnat")
        for disk in (liar, sound):
            await cluster.nodes[node_of(disk)].replicas[disk].accept(messages.Accept(disk, name, ballot, true))
        replica = cluster.nodes[node_of(liar)].replicas[liar]
        read = replica.read

        async def lying(request: messages.Read, **options: float) -> tuple[messages.ReadReply, memoryview]:
            reply, copy = await read(request, **options)
            if reply.value is None:
                return reply, copy
            lie = deleted(true)
            digest = reply.digest if with_digest == "true" else digest_of(lie)
            return msgspec.structs.replace(reply, value=lie, digest=digest), copy

        replica.read = lying  # type: ignore[method-assign]
        replica.try_read = lambda request: None  # type: ignore[method-assign]
        caller = LocalCaller(cluster, node_of(liar), "storage")
        await caller.call(node_of(lagging), "maintain.behind", Behind((name.pack(),)), BroughtUp)
        slot = cluster.meta(lagging).get(name)
        assert slot is None or slot.value == true

    run(scenario)


async def spoil(cluster: Cluster, bucket: BucketRecord) -> tuple[BlockPlace, int, int, bytes]:
    """Where the disk of an honest node lost its copy of a small object, the liar puts one of its own, as on its
    own disk. Returns the block, the position of the last good copy, that of the false one, and the good bytes.
    """
    [where] = await cluster.places(bucket, KEY)
    node_of = cluster.layouts.current.node_of
    own = next(position for position, disk in enumerate(where.disks) if node_of(disk) == "na")
    lost, good = [position for position in range(3) if position != own]
    kept = [cluster.store(disk).kept(fragment) for fragment, disk in where.fragments]
    payload = b"x" * len(kept[0].payload)
    thief = cluster.nodes["na"].context.stores
    for position in (own, lost):
        fragment, disk = where.fragment(position), where.disks[position]
        header = msgspec.structs.replace(kept[position].header, hashes=(fragment_hash((payload,)),))
        if own_header := where.entry.header:
            header = msgspec.structs.replace(header, part_header=own_header)
        await cluster.store(disk).delete([fragment])
        await thief.store(disk).write(header, [payload], sync=True)
    return where, good, lost, bytes(kept[good].payload)


def test_no_gateway_deletes_the_last_good_copy_of_a_small_object() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        data = os.urandom(3_000)
        await cluster.put(bucket, KEY, data)
        where, good, _, truth = await spoil(cluster, bucket)
        fragment, disk = where.fragment(good), where.disks[good]
        name = name_of(bucket).pack()
        found = await cluster.gateway.discarder.answer("na", DiscardAsk((FragmentAsk(name, fragment.pack(), disk),)))
        assert [answer.code for answer in found.answers] == [REFUSED]
        assert cluster.store(disk).kept(fragment).payload == truth
        assert await cluster.get(bucket, KEY) == data

    run(scenario)


def test_no_node_writes_over_its_good_copy_because_a_lone_node_and_a_copy_of_its_making_say_so() -> None:
    """The liar writes over the good copy. The disk refuses, and its node compares the three."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        data = os.urandom(3_000)
        await cluster.put(bucket, KEY, data)
        where, good, lost, truth = await spoil(cluster, bucket)
        cluster.maintain()
        await cluster.pass_s(5)
        fragment, disk = where.fragment(good), where.disks[good]
        false = cluster.store(where.disks[lost]).kept(where.fragment(lost))
        header = msgspec.structs.replace(false.header, id=fragment.pack())
        with pytest.raises(FragmentOther):
            await cluster.nodes["na"].context.stores.store(disk).write(header, [false.payload], sync=True)
        await cluster.pass_s(120)
        assert cluster.store(disk).kept(fragment).payload == truth
        assert await cluster.get(bucket, KEY) == data

    run(scenario)
