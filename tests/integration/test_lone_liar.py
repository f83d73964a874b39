"""One of three replicas lies about its row, while both others are sound: nothing that the others agree on changes."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import pytest

from storaged.errors import DataDamaged, FragmentOther, NoSuchKey
from storaged.hashes import fragment_hash
from storaged.maintain.answers import settle_handler
from storaged.maintain.asks import SETTLED, Settle
from storaged.maintain.context import MaintainLimits
from storaged.maintain.health import BlockPlace
from storaged.maintain.moves import REFUSED, DiscardAsk, FragmentAsk
from storaged.maintain.pull import Behind, BroughtUp
from storaged.meta import messages
from storaged.meta.consensus.register import NEVER, digest_of
from storaged.meta.names import SEQUENCE_MAX, Ballot, RegisterName, Value, Visibility, object_name
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import Cluster, LocalCaller, run, without_hash

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
def test_a_lone_replica_hides_no_object_that_one_of_the_others_holds_under_the_ballot_of_a_later_round(
    position: int,
) -> None:
    """The round proposed the value again. The liar took part, the third replica missed it."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        data = os.urandom(LARGE)
        await cluster.put(bucket, KEY, data)
        await cluster.pass_s(5)
        name = name_of(bucket)
        replicas = cluster.layouts.current.replicas_of(name.partition)
        liar, later = replicas[position], replicas[position - 1]
        true = held(cluster, liar, name)
        ballot = true.ballot._replace(counter=true.ballot.counter + 1)
        await cluster.meta(liar).commit(StoreBatch((Slot(name, ballot, deleted(true.value)),)))
        await cluster.meta(later).commit(StoreBatch((Slot(name, ballot, true.value),)))
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
        assert false.payload != truth
        assert cluster.store(where.disks[lost]).kept(where.fragment(lost)).payload == truth, "the record has its hash"
        assert await cluster.get(bucket, KEY) == data

    run(scenario)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("told", ["hash of the lie", "true hash", "no hash"])
def test_a_copy_that_is_not_what_the_record_says_is_carried_to_no_other_replica(position: int, told: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, os.urandom(3_000))
        await cluster.pass_s(5)
        name = name_of(bucket)
        [where] = await cluster.places(bucket, KEY)
        fragments = [cluster.store(disk).kept(fragment) for fragment, disk in where.fragments]
        truth = bytes(fragments[position].payload)
        cluster.forge(where.disks[position], where.fragment(position))
        lie = fragments[position]
        hashes = {"hash of the lie": (fragment_hash((lie.payload,)),), "no hash": ()}.get(told, lie.header.hashes)
        lie.header = msgspec.structs.replace(lie.header, hashes=hashes)
        value = held(cluster, where.disks[position], name).value
        for ring in (cluster.gateway.ring, *(node.ring for node in cluster.nodes.values())):
            copies = await ring.small_copies(name, value)
            assert copies
            assert {bytes(payload) for _header, (payload,) in copies} == {truth}

    run(scenario)


PHANTOM = b"a key that nobody wrote"


async def make_up(cluster: Cluster, bucket: BucketRecord, position: int) -> tuple[RegisterName, str]:
    """A disk shows, under a key that was never written, the record of another object. Its name and its disk."""
    name = object_name(bucket.id, bucket.shard_numbers, PHANTOM)
    true = name_of(bucket)
    value = held(cluster, cluster.layouts.current.replicas_of(true.partition)[0], true).value
    liar = cluster.layouts.current.replicas_of(name.partition)[position]
    lie = Slot(name, ahead(cluster, Ballot(1, 1, "", b"")), msgspec.structs.replace(value, payload=b""))
    await cluster.meta(liar).commit(StoreBatch((lie,)))
    return name, liar


async def settle(cluster: Cluster, name: RegisterName, liar: str) -> None:
    handler = settle_handler(cluster.gateway.ring)
    answer = await handler(cluster.layouts.current.node_of(liar), Settle((name.pack(),)))
    assert answer.results == (SETTLED,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("position", range(3))
def test_a_lone_replica_makes_up_no_key(position: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, os.urandom(LARGE))
        await cluster.pass_s(5)
        name, liar = await make_up(cluster, bucket, position)
        await settle(cluster, name, liar)
        for _ in range(3):
            with pytest.raises(NoSuchKey):
                await cluster.get(bucket, PHANTOM)
            assert list((await cluster.objects.list_objects(bucket)).keys) == [KEY]
        replicas = cluster.layouts.current.replicas_of(name.partition)
        assert {held(cluster, disk, name).value for disk in replicas} == {NEVER}
        data = os.urandom(LARGE)
        await cluster.put(bucket, PHANTOM, data)
        assert await cluster.get(bucket, PHANTOM) == data

    run(scenario)


@pytest.mark.parametrize("position", range(3))
def test_a_key_made_up_while_another_replica_is_away_is_damage_and_no_object(position: int) -> None:
    """Its record opens under no key of the bucket, and names no data. A delete ends it, a write replaces it."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, os.urandom(LARGE))
        await cluster.pass_s(5)
        name, liar = await make_up(cluster, bucket, position)
        away = cluster.layouts.current.replicas_of(name.partition)[position - 1]
        await cluster.kill(cluster.layouts.current.node_of(away))
        await settle(cluster, name, liar)
        with pytest.raises(DataDamaged):
            await cluster.get(bucket, PHANTOM)
        with pytest.raises(DataDamaged):
            await cluster.objects.head(bucket, PHANTOM)
        with pytest.raises(DataDamaged, match=PHANTOM.decode()):
            await cluster.objects.list_objects(bucket)
        await cluster.objects.delete(bucket, PHANTOM)
        with pytest.raises(NoSuchKey):
            await cluster.get(bucket, PHANTOM)
        assert list((await cluster.objects.list_objects(bucket)).keys) == [KEY]

    run(scenario)


@pytest.mark.parametrize("end", ["true again", "deleted"])
def test_copies_that_differ_where_no_record_decides_are_shown_in_status_and_compared_again(end: str) -> None:
    """As version 0.1.0 wrote them."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, os.urandom(3_000))
        await cluster.gateway.ring.change(name_of(bucket), without_hash)
        [where] = await cluster.places(bucket, KEY)
        assert not where.entry.copy_hash
        cluster.maintain()
        await cluster.pass_s(5)
        fragment, disk = where.fragment(1), where.disks[1]
        truth = bytes(cluster.store(disk).kept(fragment).payload)
        cluster.forge(disk, fragment)
        kept = cluster.store(disk).kept(fragment)
        kept.header = msgspec.structs.replace(kept.header, hashes=(fragment_hash((kept.payload,)),))
        other = cluster.nodes[cluster.layouts.current.node_of(where.disks[0])]
        assert other.maintenance is not None
        other.maintenance.fragment_contested(name_of(bucket).pack(), where.fragment(0))
        await cluster.pass_s(60)
        assert kept.payload != truth
        jobs = [job for status in await cluster.statuses() for job in status.jobs if job.name == "comparison"]
        assert [job.state for job in jobs] == ["waiting"]
        assert jobs[0].detail.startswith("1 fragments are not what the others")
        if end == "deleted":
            await cluster.objects.delete(bucket, KEY)
        else:
            kept.payload, kept.header = truth, msgspec.structs.replace(kept.header, hashes=(fragment_hash((truth,)),))
        await cluster.pass_s(1300)
        assert not [job for status in await cluster.statuses() for job in status.jobs if job.name == "comparison"]

    run(scenario)


def test_a_fragment_whose_header_names_another_owner_is_an_orphan_and_is_rebuilt() -> None:
    """No scrub has to compare headers: the sweep asks the register that the header names, which does not refer to the
    data. Then the fragment is missing.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        data = os.urandom(LARGE)
        await cluster.put(bucket, KEY, data)
        [where, *_] = await cluster.places(bucket, KEY)
        fragment, disk = where.fragment(0), where.disks[0]
        kept = cluster.store(disk).kept(fragment)
        other = object_name(bucket.id, bucket.shard_numbers, b"another key")
        kept.header = msgspec.structs.replace(kept.header, owner=other.pack())
        cluster.maintain()
        await cluster.leap(2 * MaintainLimits().orphan_age_ms / 1000)
        await cluster.pass_s(3600)
        assert cluster.store(disk).kept(fragment).header.owner == name_of(bucket).pack()
        assert await cluster.get(bucket, KEY) == data
        assert await cluster.is_whole(bucket, KEY)

    run(scenario)
