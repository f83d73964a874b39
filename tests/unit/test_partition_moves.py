"""The calls that move a partition, against replicas in memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import partition_of
from storaged.cluster.partitions import PartitionState, epoch_of
from storaged.errors import InvalidRequest, ServiceUnavailable
from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.messages import (
    Create,
    FenceLift,
    FenceSet,
    FencesReply,
    FencesTake,
    RangeFloor,
    RangesReply,
    ScopeFence,
)
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.proposer.moving import Closed, merged
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.ring_client import MemoryReplicas, ring_client

SCOPE, OTHER, THIRD = (bytes([number]) * 16 for number in (1, 2, 3))
JOINT = PartitionState(7, 1, epoch_of(1, 1), ("a0", "b0", "c0"), ("a0", "b0", "d0"))


class Ring(MemoryReplicas):
    async def fence(self, disks: Sequence[str], scope: bytes, nonce: bytes, *, final: bool = False) -> None:
        for disk in disks:
            assert (await self.replicas[disk].fence(FenceSet(disk, scope, nonce, final))).done

    async def lift(self, disks: Sequence[str], scope: bytes, nonce: bytes) -> None:
        for disk in disks:
            assert (await self.replicas[disk].unfence(FenceLift(disk, scope, nonce))).done


@dataclass
class World:
    ring: Ring
    client: RingClient


@pytest.fixture
async def world() -> AsyncIterator[World]:
    layout = layout_of((1, 1, 1, 1))
    ring = Ring(disk.id for disk in layout.disks)
    client = ring_client(KnownLayouts(layout), ring, node="gateway", jitter=lambda: 0.5)
    yield World(ring, client)
    await client.close()


async def test_the_replica_that_comes_gets_fences_and_lifts_of_a_majority(world: World) -> None:
    ring, moves = world.ring, world.client.moves
    await ring.fence(["b0", "c0"], SCOPE, b"n2")
    await ring.fence(["a0", "b0", "c0"], OTHER, b"n1")
    await ring.lift(["a0", "c0"], OTHER, b"n1")
    await ring.fence(["a0", "c0"], THIRD, b"n1", final=True)
    ring.away = {"b0"}
    assert await moves.copy_fences(JOINT, JOINT.disks) == Closed(frozenset((THIRD,)), {})
    comes = ring.replicas["d0"]
    held = await comes.handover.fences(messages.FencesAsk("d0", b""))
    assert held == FencesReply(
        (
            ScopeFence(SCOPE, b"n2", False, b""),
            ScopeFence(OTHER, b"", False, b"n1"),
            ScopeFence(THIRD, b"n1", True, b""),
        ),
        False,
    )
    assert not (await comes.fence(FenceSet("d0", OTHER, b"n1", False))).done, "it was lifted"
    assert not (await comes.unfence(FenceLift("d0", THIRD, b"n9"))).done, "it stays for ever"


async def test_one_replica_alone_closes_no_bucket_and_says_of_none_that_it_is_deleted(world: World) -> None:
    ring, moves, top = world.ring, world.client.moves, b"\xff" * 16
    await ring.fence(["a0"], SCOPE, top, final=True)
    await ring.fence(["a0"], OTHER, top)
    await ring.lift(["a0"], THIRD, top)
    perhaps = {SCOPE: top}
    assert await moves.copy_fences(JOINT, JOINT.disks) == Closed(frozenset(), perhaps)
    comes = ring.replicas["d0"]
    held = await comes.handover.fences(messages.FencesAsk("d0", b""))
    assert held == FencesReply((), False)
    ring.away = {"b0"}  # it may have said the same
    found = await moves.copy_fences(JOINT, JOINT.disks)
    assert found == Closed(frozenset(), perhaps), "rows are left out where a majority says so"
    held = await comes.handover.fences(messages.FencesAsk("d0", b""))
    assert [scope.nonce for scope in held.scopes] == [top, top]
    assert not any(scope.final for scope in held.scopes), "with it there would be a majority for the end of a bucket"


LENDS = ScopeFence(SCOPE, b"n", False, b"", True)
SAYS_NOT, SAYS_FINAL = ScopeFence(SCOPE, b"n", False, b""), ScopeFence(SCOPE, b"n", True, b"")
SAYS_HIGHER = ScopeFence(SCOPE, b"z", False, b"", True)


@pytest.mark.parametrize(
    ("held", "at_least", "found"),
    [
        ([LENDS, LENDS, LENDS], 2, LENDS),
        ([LENDS, LENDS, SAYS_NOT], 2, LENDS),
        ([LENDS, LENDS, SAYS_FINAL], 2, LENDS),
        ([LENDS, LENDS, SAYS_HIGHER], 2, LENDS),
        ([LENDS, SAYS_NOT, SAYS_NOT], 2, SAYS_NOT),
        ([LENDS, SAYS_NOT], 2, SAYS_NOT),
        ([LENDS, LENDS], 1, LENDS),
        ([LENDS, SAYS_NOT], 1, LENDS),
        ([LENDS, ScopeFence(SCOPE, b"", False, b"z")], 1, LENDS),
        ([LENDS, LENDS, ScopeFence(SCOPE, b"", False, b"z")], 2, LENDS),
        ([replace(LENDS, lifted=b"m"), replace(LENDS, lifted=b"m")], 1, replace(LENDS, lifted=b"m")),
        ([LENDS, SAYS_FINAL, SAYS_FINAL], 2, SAYS_FINAL),
        ([LENDS, SAYS_FINAL], 1, SAYS_FINAL),
        ([LENDS, replace(SAYS_FINAL, nonce=b"z", lifted=b"z")], 1, LENDS),
        ([LENDS, replace(SAYS_NOT, nonce=b"z")], 1, LENDS),
        ([LENDS, SAYS_HIGHER], 1, SAYS_HIGHER),
        ([LENDS, replace(SAYS_NOT, nonce=b"o"), replace(SAYS_NOT, nonce=b"o")], 2, replace(SAYS_NOT, nonce=b"o")),
        ([LENDS, ScopeFence(SCOPE, b"", False, b"n"), ScopeFence(SCOPE, b"", False, b"n")], 2, None),
    ],
)
def test_a_fence_lends_where_so_many_say_so_of_its_nonce(
    held: list[ScopeFence], at_least: int, found: ScopeFence | None
) -> None:
    for order in itertools.permutations(held):
        [it] = merged([FencesReply((its,), False) for its in order], None, at_least)
        assert it == (found or ScopeFence(SCOPE, b"", False, b"n"))


@pytest.mark.parametrize("liar", [None, SAYS_NOT, SAYS_FINAL, SAYS_HIGHER, replace(SAYS_HIGHER, final=True)])
async def test_the_replica_that_comes_lends_too_and_rows_are_copied_with_the_nonce(
    world: World, liar: ScopeFence | None
) -> None:
    ring, moves = world.ring, world.client.moves
    for disk in ("a0", "b0", "c0"):
        await ring.replicas[disk].fence(FenceSet(disk, SCOPE, b"n", lends=True))
    if liar is not None:

        async def lie(_request: object, *, timeout_s: float = 10.0) -> FencesReply:
            return FencesReply((liar,), False)

        ring.replicas["a0"].handover.fences = lie  # type: ignore[method-assign]
    assert await moves.copy_fences(JOINT, JOINT.disks) == Closed(frozenset(), {SCOPE: b"n"})
    comes = ring.replicas["d0"]
    held = await comes.handover.fences(messages.FencesAsk("d0", b""))
    assert held.scopes == (LENDS,)
    await comes.fence(FenceSet("d0", SCOPE, b"n", final=True))
    await moves.copy_fences(JOINT, JOINT.disks)
    held = await comes.handover.fences(messages.FencesAsk("d0", b""))
    assert held.scopes == (SAYS_FINAL,), "what was copied late does not make it lend again"


async def test_a_disk_takes_a_fence_though_one_replica_of_another_partition_called_its_nonce_lifted(
    world: World,
) -> None:
    ring, moves = world.ring, world.client.moves
    await ring.lift(["a0"], SCOPE, b"z")
    ring.away = {"b0"}
    await moves.copy_fences(JOINT, JOINT.disks)
    assert (await ring.replicas["d0"].fence(FenceSet("d0", SCOPE, b"n", lends=True))).lends


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize(
    "lie", [ScopeFence(SCOPE, b"", False, b"z"), replace(SAYS_HIGHER, lends=False), replace(SAYS_HIGHER, final=True)]
)
async def test_a_disk_keeps_a_fence_that_lends_though_one_replica_of_another_partition_says_otherwise(
    world: World, lie: ScopeFence, away: bool
) -> None:
    """The other replicas of that partition have never heard of the bucket."""
    ring, moves = world.ring, world.client.moves
    await ring.replicas["d0"].fence(FenceSet("d0", SCOPE, b"n", lends=True))

    async def lies(_request: object, *, timeout_s: float = 10.0) -> FencesReply:
        return FencesReply((lie,), False)

    ring.replicas["a0"].handover.fences = lies  # type: ignore[method-assign]
    ring.away = {"b0"} if away else set()
    await moves.copy_fences(JOINT, JOINT.disks)
    held = await ring.replicas["d0"].handover.fences(messages.FencesAsk("d0", b""))
    assert held.scopes == (LENDS,)
    if lie.lifted:
        ring.away = set()
        ring.replicas["b0"].handover.fences = lies  # type: ignore[method-assign]
        await moves.copy_fences(JOINT, JOINT.disks)
        held = await ring.replicas["d0"].handover.fences(messages.FencesAsk("d0", b""))
        assert held.scopes == (lie,), "a majority says so: it was away when the fence was lifted"


async def test_more_fences_than_one_reply_has_are_all_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("acceptor.handover", "proposer.moving"):
        monkeypatch.setattr(f"storaged.meta.{module}.FENCES_A_CALL", 3)
    scopes = [bytes([number]) * 16 for number in range(1, 12)]
    for number, scope in enumerate(scopes):
        await world.ring.fence([disk for disk in ("a0", "b0", "c0") if number % 3 != "abc".index(disk[0])], scope, b"n")
    assert await world.client.moves.copy_fences(JOINT, JOINT.disks) == Closed(frozenset(), {})
    for scope in scopes:
        assert not (await world.ring.replicas["d0"].fence(FenceSet("d0", scope, b"m", False))).done


async def test_the_replica_that_comes_keeps_newer_fences_of_its_own(world: World) -> None:
    ring = world.ring
    await ring.fence(["a0", "b0", "c0"], SCOPE, b"n1")
    await ring.fence(["d0"], SCOPE, b"n3")
    await ring.fence(["a0", "b0", "c0", "d0"], OTHER, b"n1")
    await ring.lift(["d0"], OTHER, b"n1")
    await world.client.moves.copy_fences(JOINT, JOINT.disks)
    held = await ring.replicas["d0"].handover.fences(messages.FencesAsk("d0", b""))
    assert held.scopes == (ScopeFence(SCOPE, b"n3", False, b""), ScopeFence(OTHER, b"", False, b"n1"))


async def test_without_a_majority_nothing_is_concluded(world: World) -> None:
    world.ring.away = {"a0", "b0"}
    moves, all_of_them = world.client.moves, JOINT.disks
    for call in (
        lambda: moves.copy_fences(JOINT, all_of_them),
        lambda: moves.ranges(JOINT, all_of_them),
        lambda: moves.fence(JOINT),
    ):
        with pytest.raises(ServiceUnavailable, match="Partition 7"):
            await call()


async def test_a_disk_that_does_not_refuse_earlier_steps_is_not_asked(world: World) -> None:
    few = JOINT.present[:1]
    for call in (world.client.moves.copy_fences, world.client.moves.ranges):
        with pytest.raises(ServiceUnavailable, match="Partition 7"):
            await call(JOINT, few)


async def test_a_majority_of_each_set_refuses_the_steps_before(world: World) -> None:
    world.ring.away = {"c0"}
    assert await world.client.moves.fence(JOINT) == {"a0", "b0", "d0"}
    world.ring.away = {"b0", "d0"}  # a majority of the present set is left, and one of the three that come
    with pytest.raises(ServiceUnavailable):
        await world.client.moves.fence(JOINT)


async def test_ranges_are_those_of_a_majority(world: World) -> None:
    found = set()
    for number in range(200):
        name = RegisterName(Table.OBJECT, number.to_bytes(16, "big"), 0, b"key")
        value = Value(1, bytes(16), Visibility.LIVE, b"body")
        disk = "abc"[number % 3] + "0"
        await world.ring.replicas[disk].accept(Create(disk, name, Ballot(1, 1, "gateway", bytes(8)), value))
        if partition_of(name.scope, 0) == JOINT.partition:
            found.add((name.table, name.scope, name.shard))
    wide = JOINT._replace(partition=partition_of((5).to_bytes(16, "big"), 0))
    assert (Table.OBJECT, (5).to_bytes(16, "big"), 0) in await world.client.moves.ranges(wide, wide.disks)
    assert set(await world.client.moves.ranges(JOINT, JOINT.disks)) == found


LATER, EARLIER = ScopeFence(OTHER, b"n", False, b""), ScopeFence(SCOPE, b"n", False, b"")


@pytest.mark.parametrize(
    "lie",
    [
        FencesReply((), True),
        FencesReply((LATER, EARLIER), True),
        FencesReply((EARLIER, EARLIER), True),
        FencesReply((ScopeFence(b"short", b"n", False, b""),), False),
        FencesReply((ScopeFence(SCOPE, bytes(65), False, b""),), False),
        RangesReply((b"",)),
        RangesReply((RegisterName(Table.OBJECT, SCOPE, 0, b"").prefix,)),
        RangesReply((b"\x09" + bytes(17),)),
    ],
    ids=repr,
)
async def test_an_answer_that_is_none_counts_as_none(world: World, lie: FencesReply | RangesReply) -> None:
    """The mover goes on with the two others, and asks no one for the same again and again."""
    assert partition_of(SCOPE, 0) != JOINT.partition
    handover = world.ring.replicas["a0"].handover

    async def answer(_request: object, *, timeout_s: float = 10.0) -> FencesReply | RangesReply:
        return lie

    handover.fences = handover.ranges = answer  # type: ignore[assignment, method-assign]
    moves = world.client.moves
    call = moves.copy_fences if isinstance(lie, FencesReply) else moves.ranges
    await world.ring.fence(["b0"], SCOPE, b"n")
    async with asyncio.timeout(20):
        assert await call(JOINT, JOINT.disks) in ([], Closed(frozenset(), {}))
        world.ring.away = {"b0"}
        with pytest.raises(ServiceUnavailable):
            await call(JOINT, JOINT.disks)


def ranges_of_it() -> Iterator[bytes]:
    """Prefixes of ranges of the partition of JOINT, in their order, without end."""
    for number in itertools.count(1):
        name = RegisterName(Table.OBJECT, number.to_bytes(16, "big"), 0, b"")
        if name.partition == JOINT.partition:
            yield name.prefix


def floor(counter: int) -> Ballot:
    return Ballot(epoch_of(0, 1), counter, "", b"")


async def floors_at(world: World, disk: str) -> dict[bytes, Ballot]:
    held = await world.ring.replicas[disk].floors.floors(messages.FloorsAsk(disk, JOINT.partition, b""))
    return {its.prefix: its.ballot for its in held.floors}


async def set_floors(world: World, disks: str, prefix: bytes, counter: int) -> None:
    for disk in disks.split():
        take = messages.FloorsTake(disk, JOINT.partition, JOINT.epoch, (RangeFloor(prefix, floor(counter)),))
        assert not (await world.ring.replicas[disk].floors.take_floors(take)).verdict


async def test_the_replica_that_comes_gets_no_floor_that_one_disk_makes_up(world: World) -> None:
    """Neither ranges without end, nor one far in the future, nor one that stops the move since it is of another."""
    some = ranges_of_it()
    shared, cut_short, other = next(some), next(some), RegisterName(Table.OBJECT, SCOPE, 0, b"").prefix
    await set_floors(world, "b0 c0", shared, 10)
    await set_floors(world, "c0", cut_short, 10)
    lies = [(shared, floor(1 << 61))]

    async def liar(request: messages.FloorsAsk, *, timeout_s: float = 10.0) -> messages.FloorsReply:
        if not lies:
            lies.append((next(some), floor(5)))
        return messages.FloorsReply((RangeFloor(*lies.pop()),), True)

    world.ring.replicas["a0"].floors.floors = liar  # type: ignore[method-assign]
    async with asyncio.timeout(20):
        await world.client.moves.copy_floors(JOINT, JOINT.disks)
    assert await floors_at(world, "d0") == {shared: floor(10)}
    lies[:] = [(other, floor(5))]
    await set_floors(world, "b0 c0", shared, 20)
    await world.client.moves.copy_floors(JOINT, JOINT.disks)
    assert await floors_at(world, "d0") == {shared: floor(20), cut_short: floor(10)}, "two answer, and each counts"


async def test_after_a_recovery_each_disk_that_is_left_counts_for_floors(world: World) -> None:
    prefix = next(ranges_of_it())
    await set_floors(world, "b0", prefix, 10)
    await world.client.moves.copy_floors(JOINT._replace(lost=("a0",)), ("b0", "c0"))
    assert await floors_at(world, "d0") == {prefix: floor(10)}


async def test_a_disk_whose_rows_can_not_be_read_does_not_say_how_many_it_has(world: World) -> None:
    shard, replica = next(ranges_of_it()), world.ring.replicas["a0"]
    name = RegisterName(shard[0], shard[1:17], shard[17], b"k")
    accepted = await replica.accept(
        Create("a0", name, Ballot(1, 1, "g", bytes(8)), Value(1, bytes(16), Visibility.LIVE, b""))
    )
    assert not accepted.verdict
    assert await world.client.moves.count_keys(JOINT, "a0", 100) == 1
    scan = replica.scan

    async def liar(request: messages.ScanRequest, *, timeout_s: float = 10.0) -> messages.ScanReply:
        (found,) = (await scan(request, timeout_s=timeout_s)).slices
        return messages.ScanReply(slices=(replace(found, rows=b"\xc1"),))

    replica.scan = liar  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        await world.client.moves.count_keys(JOINT, "a0", 100)


async def test_a_row_that_is_damaged_is_none_that_a_disk_has(world: World) -> None:
    """Nothing can be got back from it."""
    shard, replica = next(ranges_of_it()), world.ring.replicas["a0"]
    for key in (b"k", b"l"):
        name = RegisterName(shard[0], shard[1:17], shard[17], key)
        create = Create("a0", name, Ballot(1, 1, "g", bytes(8)), Value(1, bytes(16), Visibility.LIVE, b""))
        assert not (await replica.accept(create)).verdict
    assert world.ring.stores["a0"].damage(name)
    assert await world.client.moves.count_keys(JOINT, "a0", 100) == 1


def test_a_merged_scope_keeps_the_newest_of_each_kind() -> None:
    one = FencesReply((ScopeFence(SCOPE, b"n2", False, b"n1"), ScopeFence(OTHER, b"n5", True, b"")), False)
    two = FencesReply((ScopeFence(SCOPE, b"", False, b"n2"), ScopeFence(THIRD, b"n1", False, b"")), False)
    assert merged([one, two], None) == [
        ScopeFence(SCOPE, b"", False, b"n2"),
        ScopeFence(OTHER, b"n5", True, b""),
        ScopeFence(THIRD, b"n1", False, b""),
    ]
    assert [scope.scope for scope in merged([one, two], SCOPE)] == [SCOPE]


async def test_too_many_fences_and_a_scope_that_is_none_are_refused(world: World) -> None:
    handover = world.ring.replicas["d0"].handover
    with pytest.raises(InvalidRequest):
        await handover.fences(messages.FencesAsk("d0", b"short"))
    with pytest.raises(InvalidRequest):
        await handover.take_fences(FencesTake("d0", (ScopeFence(b"short", b"n", False, b""),)))
    with pytest.raises(InvalidRequest):
        await handover.take_fences(FencesTake("d0", (ScopeFence(SCOPE, b"n", False, b""),) * 1_001))
