"""Floors, which take the place of the rows of deleted keys."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pytest

from storaged.cluster.partitions import PartitionRecord, PartitionState, epoch_of
from storaged.errors import InvalidRequest, NoSuchBucket, OutcomeUnknown, ServiceUnavailable
from storaged.maintain.expunger import Expunger, ExpungerPorts
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient
from storaged.meta.consensus.change import Shared, Wanted
from storaged.meta.consensus.floors import KnownFloors, in_order, may_go, may_go_when_closed, sequence_of, value_of
from storaged.meta.consensus.looks import moved_on
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import (
    COUNTER_AHEAD_MAX_US,
    FLOOR_SEQUENCES,
    NEVER,
    RULES,
    Ballots,
    Lineage,
    Rules,
    Standing,
    Verdict,
    created,
)
from storaged.meta.listing.comparing import CatchUp
from storaged.meta.listing.merge import RingScanner
from storaged.meta.messages import Expunge, ExpungeReply, FenceSet, FloorSet, RangeFloor
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility, system_name
from storaged.meta.ports import PageQuery
from storaged.meta.store_ports import Slot
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.doubles.meta_store import MemoryMetaStore
from tests.unit.test_replica import (
    NAME,
    OTHER,
    FixedClock,
    SlowDisk,
    accept,
    ballot,
    prepare,
    read,
    settle_tasks,
    value,
)
from tests.worlds.ring_client import MemoryReplicas, clock_of, ring_client

pytestmark = pytest.mark.virtual_time

NOW_US = 1_750_000_000_000_000
FLOOR = Ballot(1, NOW_US, "", b"")
S = sequence_of(FLOOR)
PREFIX = NAME.prefix
DISKS = ("a0", "b0", "c0", "d0")
GONE = Value(7, b"o" * 16, Visibility.TOMBSTONE, b"")


def now_us(after: int) -> Ballot:
    return ballot(NOW_US + after)


def replica_on(store: MemoryMetaStore, **options: Any) -> LocalReplica:
    return LocalReplica("d", store, clock=FixedClock(NOW_US // 1000 + 1_000), **options)


async def set_floor(replica: LocalReplica, floor: Ballot = FLOOR) -> None:
    for active in (False, True):
        reply = await replica.floors.set_floor(FloorSet("d", PREFIX, floor, active))
        assert reply.verdict == Verdict.OK


async def create(replica: LocalReplica, at: Ballot, sequence: int) -> messages.AcceptReply:
    new = Value(sequence, bytes(16), Visibility.LIVE, b"new")
    return await replica.accept(messages.Create("d", NAME, at, new))


# --- pure


def test_a_row_goes_only_if_it_is_a_tombstone_from_before_the_floor() -> None:
    old = Slot(NAME, now_us(-1), GONE)
    assert may_go(old, FLOOR)
    assert may_go(old._replace(value=NEVER), FLOOR)
    assert not may_go(old._replace(value=value()), FLOOR)
    assert not may_go(old._replace(value=Value(7, b"", Visibility.HIDDEN, b"")), FLOOR)
    assert not may_go(old._replace(ballot=now_us(0)), FLOOR)
    assert not may_go(old._replace(ballot=ballot(NOW_US + 1, epoch=0)), FLOOR), "a newer layout makes no row older"
    assert not may_go(old._replace(value=Value(S, b"", Visibility.TOMBSTONE, b"")), FLOOR)


def test_of_a_deleted_bucket_all_rows_below_the_floor_may_go() -> None:
    old = Slot(NAME, Ballot(1, NOW_US - 200_000_000, "gw", b"incarnat"), value())
    assert may_go_when_closed(old, FLOOR)
    assert not may_go_when_closed(old._replace(ballot=now_us(0)), FLOOR)
    assert not may_go_when_closed(old._replace(ballot=ballot(NOW_US + 1, epoch=0)), FLOOR)


def test_two_floors_have_not_one_sequence() -> None:
    again = FLOOR._replace(counter=FLOOR.counter + 1)
    newer = FLOOR._replace(epoch=2)
    assert sequence_of(again) == sequence_of(newer) == S
    assert in_order(FLOOR, FLOOR)
    assert not in_order(again, FLOOR)
    assert not in_order(FLOOR, again)
    assert not in_order(newer, FLOOR)
    later = FLOOR.counter + (1 << 20)
    assert in_order(FLOOR._replace(counter=later), FLOOR)
    assert in_order(newer._replace(counter=later), FLOOR)


def test_data_on_disks_names_a_floor_that_a_quorum_has_named_in_this_step() -> None:
    known, later = KnownFloors(), S + FLOOR_SEQUENCES
    view = View.of(epoch_of(2, 1), DISKS[:3])
    assert known.vouched(NAME, view) == 0
    known.note(NAME, later, NOW_US, "a0", view.epoch)
    known.note(NAME, later, NOW_US, "d0", view.epoch)
    assert (known.of(NAME), known.vouched(NAME, view)) == (later, 0), "one alone may lie"
    known.note(NAME, S, NOW_US, "b0", view.epoch)
    assert known.vouched(NAME, view) == S
    assert known.vouched(NAME._replace(shard=9), view) == 0
    assert known.vouched(NAME, View.of(epoch_of(4, 1), DISKS[:3])) == 0
    known.note(NAME, S, NOW_US, "c0", epoch_of(4, 1))
    assert known.vouched(NAME, View.of(epoch_of(4, 1), DISKS[:3])) == 0, "the others have named theirs before"
    assert known.vouched(NAME, view) == 0, "that step is over"


def test_a_floor_that_a_late_refusal_names_belongs_to_the_step_of_its_create() -> None:
    counts = dict.fromkeys(("preempted", "unknown", "unavailable", "identity_rounds"), 0)
    shared = Shared(Ballots("gw", lambda: b"incarnat"), RULES, counts)
    machine = Proposer(shared, Wanted(NAME, put(b"new")), Lineage(b"c" * 14))
    old, new = (View.of(epoch_of(step, 1), DISKS[:3]) for step in (2, 4))
    machine.create(old, Change(b"new"), NOW_US)
    refused = messages.AcceptReply(Verdict.HELD, FLOOR, floor=S)
    assert [machine.created(disk, refused) for disk in DISKS[:2]] == [False, True]
    machine.begin(new, NOW_US)
    machine.created(DISKS[2], refused)
    assert (shared.floors.vouched(NAME, old), shared.floors.vouched(NAME, new)) == (S, 0)
    assert shared.grounds(NAME, old, NOW_US, vouched=True).floor == S


def test_sequences_of_floors_grow_and_what_is_created_on_them_is_known() -> None:
    later = FLOOR._replace(counter=NOW_US + (1 << 20))
    assert sequence_of(later) == S + FLOOR_SEQUENCES
    assert S % FLOOR_SEQUENCES == 0
    assert created(Value(S + 1, b"c" * 14 + bytes(2), Visibility.LIVE, b""))
    assert not created(Value(S + 2, b"c" * 14 + bytes(2), Visibility.LIVE, b""))
    assert not created(Value(S + 1, b"c" * 16, Visibility.LIVE, b""))


def test_a_proposer_believes_no_floor_that_lies_in_the_future() -> None:
    known = KnownFloors()
    known.note(NAME, sequence_of(FLOOR._replace(counter=NOW_US + 2 * COUNTER_AHEAD_MAX_US)), NOW_US)
    known.note(NAME, 0, NOW_US)
    assert known.of(NAME) == 0
    known.note(NAME, S, NOW_US)
    known.note(NAME, 5, NOW_US)
    assert (known.of(NAME), known.of(OTHER), known.of(system_name("x"))) == (S, S, 0)


@pytest.mark.parametrize("lie", [5, S + 1, S + FLOOR_SEQUENCES - 1])
@pytest.mark.parametrize("vouched", [False, True])
def test_what_is_created_after_a_replica_has_lied_about_its_floor_is_known_for_a_create(
    lie: int, vouched: bool
) -> None:
    """Else a proposer that finds it at a replica that lags would overwrite versions with it."""
    counts = dict.fromkeys(("preempted", "unknown", "unavailable", "identity_rounds"), 0)
    shared = Shared(Ballots("gw", lambda: b"incarnat"), RULES, counts)
    view = View.of(epoch_of(2, 1), DISKS[:3])
    machine = Proposer(shared, Wanted(NAME, put(b"new")), Lineage(b"c" * 14))
    machine.create(view, Change(b"new"), NOW_US)
    for disk, floor in ((DISKS[0], lie), (DISKS[1], S if vouched else 0)):
        machine.created(disk, messages.AcceptReply(Verdict.HELD, FLOOR, floor=floor))
    grounds = shared.grounds(NAME, view, NOW_US, vouched=vouched)
    assert created(Lineage(b"d" * 14).create(Change(b"new"), grounds.ballot, grounds.floor))


# --- one acceptor


async def test_a_missing_row_reports_the_floor_to_prepares_and_reads_and_after_a_restart() -> None:
    store = MemoryMetaStore()
    replica = replica_on(store)
    assert (await read(replica)).accepted == ZERO_BALLOT
    await set_floor(replica)
    for one in (replica, replica_on(store)):
        found = await one.prepare(prepare(now_us(20_000_000)))  # above the high-water ballot
        assert (found.verdict, found.accepted, found.value) == (Verdict.OK, FLOOR, value_of(FLOOR))
        told = await read(one)
        assert (told.accepted, told.value) == (FLOOR, value_of(FLOOR))
    elsewhere = await replica.prepare(prepare(now_us(1), NAME._replace(shard=4)))
    assert elsewhere.accepted == ZERO_BALLOT


async def test_a_row_counts_and_not_the_floor() -> None:
    replica = replica_on(MemoryMetaStore())
    await replica.accept(accept(now_us(-9), value()))
    await set_floor(replica)
    assert (await read(replica)).accepted == now_us(-9)
    assert (await replica.floors.expunge(Expunge("d", PREFIX, FLOOR))).gone == 0
    assert (await read(replica)).value == value()


async def test_a_floor_that_is_promised_refuses_lower_ballots_and_reports_nothing() -> None:
    store = MemoryMetaStore()
    replica = replica_on(store)
    late = now_us(-1)  # never promised: no high-water ballot lies above it
    reply = await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))
    assert (reply.verdict, reply.floor, reply.final) == (Verdict.OK, ZERO_BALLOT, False)
    assert (await read(replica)).accepted == ZERO_BALLOT
    for one in (replica, replica_on(store)):
        assert (await one.accept(accept(late, value()))).verdict == Verdict.PREEMPTED
        assert (await create(one, late, 1)).verdict == Verdict.PREEMPTED


async def test_a_promise_is_answered_when_what_was_accepted_before_can_be_read() -> None:
    disk = SlowDisk()
    replica = replica_on(MemoryMetaStore(sync=disk.sync))
    await replica.prepare(prepare(now_us(-3)))
    disk.open.clear()
    writing = asyncio.ensure_future(replica.accept(accept(now_us(-3), value())))
    await settle_tasks()
    promising = asyncio.ensure_future(replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR)))
    await settle_tasks()
    assert not promising.done()
    disk.open.set()
    await promising
    assert writing.done()
    assert (await read(replica)).value == value()


async def test_a_floor_counts_from_when_it_is_on_disk() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = replica_on(store)
    await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))
    disk.open.clear()
    setting = asyncio.ensure_future(replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR, True)))
    await settle_tasks()
    assert not setting.done()
    assert (await read(replica)).accepted == ZERO_BALLOT
    disk.open.set()
    await setting
    assert (await read(replica_on(store))).accepted == FLOOR


async def test_a_lower_floor_does_not_replace_a_higher_one() -> None:
    store = MemoryMetaStore()
    replica = replica_on(store)
    await set_floor(replica)
    lower = FLOOR._replace(counter=NOW_US - 50_000_000)
    assert (await replica.floors.set_floor(FloorSet("d", PREFIX, lower))).verdict == Verdict.OK
    assert (await replica.floors.set_floor(FloorSet("d", PREFIX, lower, True))).verdict == Verdict.PREEMPTED
    assert (await read(replica)).accepted == (await read(replica_on(store))).accepted == FLOOR


async def test_a_later_floor_with_a_lower_sequence_is_refused_and_no_row_goes_below_it() -> None:
    """The clock of the gateway that sets it is slow, or its delay is longer."""
    store = MemoryMetaStore()
    replica = replica_on(store)
    await replica.accept(accept(now_us(-60_000_000), GONE))
    await set_floor(replica)
    slow = Ballot(2, NOW_US - 50_000_000, "", b"")
    for one in (replica, replica_on(store)):
        for active in (False, True):
            reply = await one.floors.set_floor(FloorSet("d", PREFIX, slow, active))
            assert (reply.verdict, reply.floor) == (Verdict.PREEMPTED, FLOOR)
        assert await one.floors.expunge(Expunge("d", PREFIX, slow, count=True)) == ExpungeReply(
            Verdict.OK, 0, NAME.key, True
        )
    same = Ballot(2, NOW_US - NOW_US % (1 << 20), "", b"")
    assert sequence_of(same) == S
    for floor in (same, same._replace(counter=NOW_US + 1)):
        reply = await replica.floors.set_floor(FloorSet("d", PREFIX, floor))
        assert (reply.verdict, reply.floor) == (Verdict.PREEMPTED, FLOOR)
    await set_floor(replica, Ballot(2, NOW_US - NOW_US % (1 << 20) + (1 << 20), "", b""))


async def test_a_floor_of_an_earlier_layout_is_refused_when_a_later_one_is_promised() -> None:
    """Also after a restart: else one replica has the one, and another replica has the other."""
    store = MemoryMetaStore()
    replica = replica_on(store)
    await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))
    slow = Ballot(2, NOW_US - 50_000_000, "", b"")
    assert (await replica.floors.set_floor(FloorSet("d", PREFIX, slow))).verdict == Verdict.OK
    again = replica_on(store)
    for one, active in ((replica, True), (again, False), (again, True)):
        assert (await one.floors.set_floor(FloorSet("d", PREFIX, FLOOR, active))).verdict == Verdict.EPOCH
    await set_floor(again, slow)


async def test_a_promise_of_a_floor_waits_for_floors_on_their_way_to_the_disk() -> None:
    disk = SlowDisk()
    replica = replica_on(MemoryMetaStore(sync=disk.sync))
    await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))
    await replica.prepare(prepare(ballot(NOW_US, epoch=2)))  # no high-water ballot has to be written for the promise
    disk.open.clear()
    setting = asyncio.ensure_future(replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR, True)))
    await settle_tasks()
    slow = FloorSet("d", PREFIX, Ballot(2, NOW_US - 50_000_000, "", b""))
    promising = asyncio.ensure_future(replica.floors.set_floor(slow))
    await settle_tasks()
    assert not promising.done()
    disk.open.set()
    assert (await setting).verdict == Verdict.OK
    assert (await promising).verdict == Verdict.PREEMPTED


async def test_creates_are_taken_above_the_floor_alone() -> None:
    replica = replica_on(MemoryMetaStore())
    await set_floor(replica)
    for sequence in (1, S):
        held = await create(replica, now_us(9), sequence)
        assert (held.verdict, held.floor) == (Verdict.HELD, S)
    assert (await create(replica, now_us(9), S + 1)).verdict == Verdict.OK
    held = await create(replica, now_us(10), S + 1)
    assert (held.verdict, held.floor) == (Verdict.HELD, 0), "there is a row"


async def test_tombstones_go_below_an_active_floor_and_the_floor_takes_their_place() -> None:
    store = MemoryMetaStore()
    replica = replica_on(store)
    await replica.accept(accept(now_us(-9), GONE))
    await replica.accept(accept(now_us(-8), value(), OTHER))
    counted = await replica.floors.expunge(Expunge("d", PREFIX, FLOOR, count=True))
    assert counted == ExpungeReply(Verdict.OK, 1, OTHER.key, True)
    with pytest.raises(InvalidRequest, match="below a floor that is active"):
        await replica.floors.expunge(Expunge("d", PREFIX, FLOOR))
    await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))
    with pytest.raises(InvalidRequest, match="below a floor that is active"):
        await replica.floors.expunge(Expunge("d", PREFIX, FLOOR))
    await set_floor(replica)
    first = await replica.floors.expunge(Expunge("d", PREFIX, FLOOR, limit=1))
    assert first == ExpungeReply(Verdict.OK, 1, NAME.key, False)
    assert await replica.floors.expunge(Expunge("d", PREFIX, FLOOR, NAME.key)) == ExpungeReply(
        Verdict.OK, 0, OTHER.key, True
    )
    assert store.get(NAME) is None
    assert store.get(OTHER) is not None
    for one in (replica, replica_on(store)):
        assert (await read(one)).value == value_of(FLOOR)
        assert (await one.accept(accept(now_us(-9), GONE))).verdict == Verdict.PREEMPTED


async def test_a_row_with_an_accept_on_its_way_stays() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = replica_on(store)
    await replica.accept(accept(now_us(-9), GONE))
    await set_floor(replica)
    await replica.prepare(prepare(now_us(9)))
    disk.open.clear()
    writing = asyncio.ensure_future(replica.accept(accept(now_us(9), value(sequence=8))))
    await settle_tasks()
    going = asyncio.ensure_future(replica.floors.expunge(Expunge("d", PREFIX, FLOOR)))
    await settle_tasks()
    assert going.done()
    assert going.result().gone == 0
    disk.open.set()
    assert (await writing).verdict == Verdict.OK
    assert (await read(replica)).value == value(sequence=8)


async def test_an_accept_that_is_judged_while_a_row_goes_stays() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = replica_on(store)
    await replica.accept(accept(now_us(-9), GONE))
    await set_floor(replica)
    await replica.prepare(prepare(now_us(9)))
    disk.open.clear()
    going = asyncio.ensure_future(replica.floors.expunge(Expunge("d", PREFIX, FLOOR)))
    await settle_tasks()
    writing = asyncio.ensure_future(replica.accept(accept(now_us(9), value(sequence=8))))
    await settle_tasks()
    disk.open.set()
    assert (await going).gone == 1
    assert (await writing).verdict == Verdict.OK
    assert (await read(replica)).value == value(sequence=8)


async def test_a_partition_with_two_sets_or_in_a_later_step_takes_no_floor_and_loses_no_row() -> None:
    replica = replica_on(MemoryMetaStore())
    joint, settled = FLOOR._replace(epoch=epoch_of(1, 1)), FLOOR._replace(epoch=epoch_of(2, 1))
    for active in (False, True):
        assert (await replica.floors.set_floor(FloorSet("d", PREFIX, joint, active))).verdict == Verdict.EPOCH
    await set_floor(replica, settled)
    assert (await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))).verdict == Verdict.EPOCH
    assert (await replica.floors.expunge(Expunge("d", PREFIX, FLOOR))).verdict == Verdict.EPOCH
    assert (await replica.floors.expunge(Expunge("d", PREFIX, joint))).verdict == Verdict.EPOCH
    assert (await replica.prepare(prepare(now_us(9)))).verdict == Verdict.EPOCH, "the step is durable"


async def test_requests_that_no_gateway_makes_are_refused() -> None:
    replica = replica_on(MemoryMetaStore())
    system = system_name("x").prefix
    for prefix, floor in (
        (PREFIX[:-1], FLOOR),
        (system, FLOOR),
        (PREFIX, now_us(0)),
        (PREFIX, FLOOR._replace(counter=0)),
    ):
        with pytest.raises(InvalidRequest):
            await replica.floors.set_floor(FloorSet("d", prefix, floor))
        with pytest.raises(InvalidRequest):
            await replica.floors.expunge(Expunge("d", prefix, floor))
    with pytest.raises(InvalidRequest, match="promised before"):
        await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR, True))
    with pytest.raises(InvalidRequest, match="limit is"):
        await replica.floors.expunge(Expunge("d", PREFIX, FLOOR, limit=messages.EXPUNGED_A_CALL + 1))
    ahead = FLOOR._replace(counter=NOW_US + 2 * COUNTER_AHEAD_MAX_US)
    assert (await replica.floors.set_floor(FloorSet("d", PREFIX, ahead))).verdict == Verdict.AHEAD


async def test_a_replica_says_that_the_bucket_is_deleted() -> None:
    replica = replica_on(MemoryMetaStore())
    await replica.fence(FenceSet("d", NAME.scope, b"nonce", True))
    assert (await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))).final


async def test_without_its_rule_each_of_these_is_otherwise() -> None:
    replica = replica_on(MemoryMetaStore(), rules=Rules(floors_reported=False))
    await set_floor(replica)
    assert (await read(replica)).accepted == ZERO_BALLOT
    replica = replica_on(MemoryMetaStore(), rules=Rules(creates_above_floors=False))
    await set_floor(replica)
    assert (await create(replica, now_us(9), 1)).verdict == Verdict.OK
    store = MemoryMetaStore()
    await set_floor(replica_on(store, rules=Rules(floors_durable=False)))
    assert (await read(replica_on(store))).accepted == ZERO_BALLOT
    replica = replica_on(MemoryMetaStore(), rules=Rules(floors_grow=False))
    for floor in (FLOOR, Ballot(2, NOW_US - 50_000_000, "", b"")):
        await set_floor(replica, floor)
        assert (await read(replica)).accepted == floor


# --- a partition moves


async def test_a_disk_is_asked_for_the_floors_of_one_partition_and_looks_at_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk with 48,000 floors took 90 ms of the event loop for each partition that moved."""
    store = MemoryMetaStore()
    replica = replica_on(store)
    prefixes = [RegisterName(Table.OBJECT, bytes(15) + bytes([scope]), 0, b"k").prefix for scope in range(20)]
    for prefix in prefixes:
        for active in (False, True):
            await replica.floors.set_floor(FloorSet("d", prefix, FLOOR, active))
    named: dict[int, list[bytes]] = {}
    for prefix in prefixes:
        named.setdefault(RegisterName(prefix[0], prefix[1:17], prefix[17], b"").partition, []).append(prefix)
    for again in (replica, replica_on(store)):
        with monkeypatch.context() as patched:
            patched.setattr(RegisterName, "partition", property(lambda _name: pytest.fail("another range")))
            for partition, wanted in named.items():
                told = await again.floors.floors(messages.FloorsAsk("d", partition))
                assert [its.prefix for its in told.floors] == sorted(wanted)


async def test_the_disk_that_comes_takes_floors_of_earlier_steps() -> None:
    replica = replica_on(MemoryMetaStore())
    partition, joint = NAME.partition, epoch_of(1, 1)
    take = messages.FloorsTake("d", partition, joint, (RangeFloor(PREFIX, FLOOR),))
    await replica.prepare(prepare(ballot(NOW_US, epoch=joint)))
    assert (await replica.floors.take_floors(take)).verdict == Verdict.OK
    told = await replica.floors.floors(messages.FloorsAsk("d", partition))
    assert told == messages.FloorsReply((RangeFloor(PREFIX, FLOOR),))
    assert await replica.floors.floors(messages.FloorsAsk("d", partition, PREFIX)) == messages.FloorsReply(())
    assert await replica.floors.floors(messages.FloorsAsk("d", partition + 1)) == messages.FloorsReply(())
    for wrong in (
        messages.FloorsTake("d", partition + 1, joint, take.floors),
        messages.FloorsTake("d", partition, joint, (RangeFloor(PREFIX, FLOOR._replace(epoch=joint)),)),
        messages.FloorsTake("d", partition, joint, take.floors * (messages.FENCES_A_CALL + 1)),
    ):
        with pytest.raises(InvalidRequest):
            await replica.floors.take_floors(wrong)
    await replica.prepare(prepare(ballot(NOW_US, epoch=epoch_of(2, 1))))
    assert (await replica.floors.take_floors(take)).verdict == Verdict.EPOCH


async def test_a_disk_takes_no_floor_for_a_step_that_ended_while_other_floors_were_written() -> None:
    disk = SlowDisk()
    replica = replica_on(MemoryMetaStore(sync=disk.sync))
    partition, joint = NAME.partition, epoch_of(1, 1)
    await replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR))
    disk.open.clear()
    setting = asyncio.ensure_future(replica.floors.set_floor(FloorSet("d", PREFIX, FLOOR, True)))
    await settle_tasks()
    later = FLOOR._replace(counter=FLOOR.counter + 1)
    take = messages.FloorsTake("d", partition, joint, (RangeFloor(PREFIX, later),))
    taking = asyncio.ensure_future(replica.floors.take_floors(take))
    await settle_tasks()
    moving = asyncio.ensure_future(replica.prepare(prepare(ballot(NOW_US, epoch=epoch_of(2, 1)))))
    await settle_tasks()
    disk.open.set()
    assert (await setting).verdict == Verdict.OK
    assert (await taking).verdict == Verdict.EPOCH
    await moving
    told = await replica.floors.floors(messages.FloorsAsk("d", partition))
    assert told == messages.FloorsReply((RangeFloor(PREFIX, FLOOR),))


# --- the ring


@dataclass
class World:
    ring: MemoryReplicas
    layouts: KnownLayouts
    client: RingClient
    state: PartitionState
    expunger: Expunger
    scanner: RingScanner


class Everybody:
    away: frozenset[str] = frozenset()

    def disk_readable(self, disk_id: str) -> bool:
        return disk_id not in self.away

    disk_prompt = disk_readable

    disk_writable = disk_readable


@pytest.fixture
async def world() -> AsyncIterator[World]:
    layout = layout_of((1, 1, 1, 1))
    layouts = KnownLayouts(layout)
    ring = MemoryReplicas(disk.id for disk in layout.disks)
    client = ring_client(layouts, ring, node="gateway", jitter=lambda: 0.5)
    scanner = RingScanner(layouts, ring, client, Everybody())
    clock = clock_of(asyncio.get_running_loop())
    ports = ExpungerPorts(layouts, scanner, client.moves, client.floors, Everybody(), clock)
    expunger = Expunger(ports, delay_s=0, worthwhile=1, partitions=[NAME.partition])
    yield World(ring, layouts, client, layouts.partition(NAME.partition), expunger, scanner)
    await client.close()


async def test_a_floor_between_two_looks_is_no_round_that_ends_what_was_promised_before(world: World) -> None:
    """The collector would delete the data of a write that sleeps between its promise and its accept."""
    await world.client.change(NAME, lambda _before: Change(b"old"))
    await world.client.change(NAME, lambda _before: Change(b"", Visibility.TOMBSTONE))
    at = Ballot(world.state.epoch, 1000 * clock_of(asyncio.get_running_loop()).wall_ms() + 1_000_000, "sleeps", b"")
    for disk in world.state.present:
        promise = await world.ring.replicas[disk].prepare(messages.Prepare(disk, NAME, at))
        assert promise.verdict == Verdict.OK
    first = await world.client.look(NAME)
    assert await expunge(world) == 1
    second = await world.client.look(NAME)
    assert set(second.held) == set(world.state.present)
    assert moved_on(first, second) is None
    new = Value(3, b"o" * 16, Visibility.LIVE, b"body")
    for disk in world.state.present:
        accepted = await world.ring.replicas[disk].accept(messages.Accept(disk, NAME, at, new))
        assert accepted.verdict == Verdict.OK


async def test_a_create_above_a_floor_that_overtakes_a_lower_sequence_is_not_applied_twice(world: World) -> None:
    """One replica has the floor, the others were to get it when they took a first write. A create that knows the floor
    gets to that replica alone, and is carried on. Its proposer must see that what followed may descend from it.
    """
    x, _, z = world.state.present
    floor = world.expunger._floor(world.state)
    for active in (False, True):
        for disk in (x,) if active else world.state.present:
            set_ = FloorSet(disk, PREFIX, floor, active)
            replica: Any = world.ring.replicas[disk]
            assert (await replica.floors.set_floor(set_)).verdict == Verdict.OK
    world.ring.away = {x}
    outcome = await world.client.change(NAME, lambda _before: Change(b"first"))
    assert outcome.after is not None
    assert outcome.after.sequence == 1
    lineage = Lineage(b"c" * 14)
    at = Ballot(world.state.epoch, 1000 * clock_of(asyncio.get_running_loop()).wall_ms(), "other", b"")
    value_ = lineage.create(Change(b"created"), at, sequence_of(floor))
    taken = await world.ring.replicas[x].accept(messages.Create(x, NAME, at, value_))
    assert taken.verdict == Verdict.OK
    world.ring.away = {z}
    await asyncio.sleep(0.01)
    found = await world.client.settle(NAME)
    assert found is not None
    assert found.body == b"created"
    outcome = await world.client.change(NAME, lambda _before: Change(b"on it"))
    assert lineage.judge(outcome.after, at._replace(counter=at.counter + 9), True) is Standing.UNKNOWN


async def test_a_replica_that_lies_about_ranges_and_rows_holds_up_no_pass(world: World) -> None:
    """It is asked first, names a range of another partition, and comes to no end: the next one is asked instead."""
    first = world.ring.replicas[world.state.present[0]]
    other = RegisterName(Table.OBJECT, b"o" * 16, 0, b"")
    assert other.partition != world.state.partition

    async def no_end(_request: messages.Expunge, *, timeout_s: float = 10.0) -> messages.ExpungeReply:
        return messages.ExpungeReply(Verdict.OK, 0, b"", False)

    async def ranges(_request: messages.RangesAsk, *, timeout_s: float = 10.0) -> messages.RangesReply:
        return messages.RangesReply((other.prefix, PREFIX))

    first.handover.ranges = ranges  # type: ignore[attr-defined]
    first.floors.expunge = no_end  # type: ignore[attr-defined]
    assert await world.client.floors.ranges(world.state) == [PREFIX]
    floor = world.expunger._floor(world.state)
    async with asyncio.timeout(20):
        assert await world.client.floors.count(world.state, PREFIX, floor, b"") == (0, None)
        with pytest.raises(ServiceUnavailable, match="how far"):
            await world.client.floors.expunge(world.state, PREFIX, floor, b"")
        assert await world.expunger.once() == 0


async def test_a_replica_that_answers_an_unknown_verdict_ends_no_pass(world: World) -> None:
    for number in range(3):
        name = NAME._replace(key=b"%d" % number)
        await world.client.change(name, put(b"x"))
        await world.client.change(name, delete)
    first = world.ring.replicas[world.state.present[0]]

    async def unknown(_request: FloorSet, *, timeout_s: float = 10.0) -> messages.FloorReply:
        return messages.FloorReply(99)

    first.floors.set_floor = unknown  # type: ignore[attr-defined]
    assert await expunge(world) == 0
    assert "(verdict 99)" in world.expunger.done.waiting


async def expunge(world: World) -> int:
    """What was written before is older than the floor."""
    await asyncio.sleep(0.01)
    return await world.expunger.once()


def put(body: bytes) -> Any:
    return lambda _value: Change(body, Visibility.LIVE)


def delete(_value: Value | None) -> Change:
    return Change(b"", Visibility.TOMBSTONE)


async def rows_at(world: World, disk: str) -> int:
    reply = await world.ring.replicas[disk].scan(
        messages.ScanRequest(disk, 1, Table.OBJECT, NAME.scope, (messages.ShardAsk(3, b"", 100, 0, 100, 1 << 20),))
    )
    return reply.slices[0].looked_at


async def test_a_pass_removes_the_rows_of_deleted_keys_at_all_replicas(world: World) -> None:
    for number in range(20):
        name = NAME._replace(key=b"key %d" % number)
        await world.client.change(name, put(b"v"))
        if number % 2:
            await world.client.change(name, delete)
    assert await expunge(world) == 10
    assert [await rows_at(world, disk) for disk in world.state.present] == [10, 10, 10]
    [job] = world.expunger.report("gw")
    assert (job.name, job.state, job.detail) == ("expunging", "done", "10 rows of deleted keys are gone")
    page = await world.scanner.list_page(PageQuery(Table.OBJECT, NAME.scope, (3,), limit=100))
    assert [row.key for row in page.rows] == sorted(b"key %d" % number for number in range(0, 20, 2))
    assert (await world.client.read(NAME._replace(key=b"key 1"))).value is None
    assert await expunge(world) == 0


async def test_a_key_is_created_and_changed_above_the_floor(world: World) -> None:
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    await expunge(world)
    outcome = await world.client.change(NAME, put(b"again"), regardless=True)
    assert outcome.after is not None
    assert outcome.after.sequence > FLOOR_SEQUENCES
    fresh = await world.client.change(OTHER, put(b"first"), regardless=True)
    assert fresh.after is not None
    assert created(fresh.after), "it knows the floor by now"
    assert (await world.client.read(NAME)).value == outcome.after
    assert (await world.client.read(OTHER)).value == fresh.after


async def test_nothing_goes_while_a_replica_is_away(world: World) -> None:
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    await settle_tasks()
    world.ring.away = {world.state.present[2]}
    assert await expunge(world) == 0
    assert "stay" in world.expunger.done.waiting or "answer" in world.expunger.done.waiting
    assert [await rows_at(world, disk) for disk in world.state.present] == [1, 1, 1]
    for call in (world.client.floors.promise, world.client.floors.activate):
        with pytest.raises(ServiceUnavailable, match="deleted keys stay while disk"):
            await call(world.state, PREFIX, FLOOR)


@pytest.mark.parametrize("fenced", [1, 2])
async def test_rows_of_a_deleted_bucket_go_although_a_replica_was_away_when_it_was_deleted(
    world: World, fenced: int
) -> None:
    """It has no fence. One that is alone with a final fence may lie: the others get none."""
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    await settle_tasks()
    for disk in world.state.present[:fenced]:
        await world.ring.replicas[disk].fence(FenceSet(disk, NAME.scope, b"n", True))
    assert await expunge(world) == 1
    stores = [world.ring.stores[disk] for disk in world.state.present]
    assert [store.get_fence(NAME.scope) is not None for store in stores].count(True) == (3 if fenced == 2 else 1)
    assert [await rows_at(world, disk) for disk in world.state.present] == [0, 0, 0]


async def test_nothing_goes_when_a_replica_is_away_while_all_are_compared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    await settle_tasks()
    compare = world.scanner.catch_up

    async def away_meanwhile(*range_: Any, **how: Any) -> CatchUp:
        world.ring.away = {world.state.present[2]}
        try:
            return await compare(*range_, **how)
        finally:
            world.ring.away = set()

    monkeypatch.setattr(world.scanner, "catch_up", away_meanwhile)
    assert await expunge(world) == 0
    assert "does not answer" in world.expunger.done.waiting
    assert [await rows_at(world, disk) for disk in world.state.present] == [1, 1, 1]
    replicas: dict[str, Any] = {disk: world.ring.replicas[disk] for disk in DISKS}
    replies = [await replicas[disk].floors.floors(messages.FloorsAsk(disk, NAME.partition)) for disk in DISKS]
    assert not any(reply.floors for reply in replies), "no floor is active"


async def test_nothing_goes_while_a_partition_has_two_sets_or_moved_meanwhile(world: World) -> None:
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    state, layouts = world.state, world.layouts
    layouts.partitions.learn(PartitionRecord(NAME.partition, 1, state.present, (*state.present[:2], "c0"), 1))
    assert await expunge(world) == 0
    assert "moves" in world.expunger.done.waiting
    with pytest.raises(ServiceUnavailable, match="moves"):
        await world.expunger.expunge(state, PREFIX, FLOOR._replace(counter=1 << 20))


async def test_the_bucket_that_is_deleted_is_not_compared(world: World) -> None:
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    await settle_tasks()
    await world.client.fence(NAME.scope, (3,), b"nonce", final=True)
    assert await expunge(world) == 1
    with pytest.raises(NoSuchBucket):
        await world.client.change(NAME, put(b"late"))


@pytest.mark.parametrize("fence", ["final", "lends", "plain", "lifted"])
async def test_live_rows_go_only_where_the_bucket_was_deleted_for_good(world: World, fence: str) -> None:
    """Those of a disk that had the partition before: nothing settles them behind the fence."""
    await world.client.change(NAME, put(b"v"))
    await settle_tasks()
    await world.client.fence(NAME.scope, (3,), b"nonce", final=fence == "final", lends=fence == "lends")
    if fence == "lifted":
        await world.client.unfence(NAME.scope, (3,), b"nonce")
    gone = fence == "final"
    assert await expunge(world) == gone
    assert [await rows_at(world, disk) for disk in world.state.present] == [0 if gone else 1] * 3
    if gone:
        with pytest.raises(NoSuchBucket):
            await world.client.change(NAME, put(b"late"))


async def test_a_replica_drops_live_rows_by_its_own_fence_alone(world: World) -> None:
    """What others say of the bucket does not count: they may lie."""
    await world.client.change(NAME, put(b"v"))
    await settle_tasks()
    disk = world.state.present[0]
    await world.ring.replicas[disk].fence(FenceSet(disk, NAME.scope, b"nonce", True))
    await expunge(world)
    assert [await rows_at(world, disk) for disk in world.state.present] == [0, 1, 1]


async def test_a_bucket_that_is_being_deleted_waits(world: World) -> None:
    await world.client.change(NAME, put(b"v"))
    await world.client.change(NAME, delete)
    await settle_tasks()
    await world.client.change(OTHER, put(b"v"))
    await world.client.fence(NAME.scope, (3,), b"nonce")
    world.ring.stores[world.state.present[0]].damage(OTHER)
    assert await expunge(world) == 0
    assert "being deleted" in world.expunger.done.waiting


async def test_a_bucket_whose_fence_lends_is_compared_by_rounds_with_its_nonce_and_holds_up_no_other_range(
    world: World,
) -> None:
    """Until then its tombstones stay: this gateway may not know the nonce."""
    names = (RegisterName(Table.OBJECT, b"\xff" + number.to_bytes(15, "big"), 0, b"k") for number in range(10**6))
    another = next(name for name in names if name.partition == NAME.partition)
    for name in (NAME, another):
        await world.client.change(name, put(b"v"))
        await world.client.change(name, delete)
    await world.client.change(OTHER, put(b"v"))
    await settle_tasks()
    await world.client.fence(NAME.scope, (3,), b"nonce", lends=True)
    assert world.ring.stores[world.state.present[0]].damage(OTHER)
    assert await expunge(world) == 1, "of the other bucket, which comes after it"
    assert "being deleted" in world.expunger.done.waiting
    settle = partial(world.client.settle, settling_nonce=b"nonce")
    world.expunger._ports = dataclasses.replace(world.expunger._ports, settle=settle)
    assert await expunge(world) == 1
    assert not world.expunger.done.waiting


async def test_a_range_with_few_tombstones_is_left_alone(world: World) -> None:
    world.expunger._worthwhile = 3
    for number in range(3):
        name = NAME._replace(key=b"key %d" % number)
        await world.client.change(name, put(b"v"))
        await world.client.change(name, delete)
        assert await expunge(world) == (3 if number == 2 else 0)


async def test_a_replica_that_lacks_a_live_row_gets_it_before_the_floor_counts(world: World) -> None:
    lagging = world.state.present[2]
    await world.client.change(OTHER, put(b"gone"))
    await world.client.change(OTHER, delete)
    await settle_tasks()
    world.ring.away = {lagging}
    await world.client.change(NAME, put(b"live"))
    world.ring.away = set()
    assert await expunge(world) == 1
    for first in world.state.present:
        world.ring.away = {first}
        reading = await world.client.read(NAME)
        assert reading.value is not None
        assert reading.value.body == b"live"


async def begin_unanswered(world: World, other: RingClient) -> tuple[asyncio.Task[Any], Callable[[], None]]:
    """A change of ``NAME`` whose first attempt was applied. No answer to it has arrived. Returns what has the calls
    fail, so that the change is tried again.
    """
    waiting: list[Callable[[Exception], None]] = []
    replicas = {disk: world.ring.replicas[disk] for disk in world.state.present}
    held = {disk: replica.try_accept for disk, replica in replicas.items()}

    def swallow(disk: str) -> Any:
        def try_accept(request: Any, body: Any, on_answer: Any, header: bytes = b"", *, create: bool = False) -> bool:
            waiting.append(on_answer)
            return held[disk](request, body, lambda _answer: None, header, create=create)

        return try_accept

    for disk, replica in replicas.items():
        replica.try_accept = swallow(disk)  # type: ignore[method-assign]
    changing = asyncio.ensure_future(world.client.change(NAME, put(b"mine")))
    await asyncio.sleep(0.05)
    for disk, replica in replicas.items():
        replica.try_accept = held[disk]  # type: ignore[method-assign]
    reading = await other.read(NAME)
    assert reading.value is not None
    assert reading.value.body == b"mine"

    def fail() -> None:
        for on_answer in waiting:
            on_answer(ServiceUnavailable("The connection is lost."))

    return changing, fail


async def test_a_retry_of_a_change_that_was_deleted_and_expunged_is_of_unknown_outcome(world: World) -> None:
    other = ring_client(KnownLayouts(layout_of((1, 1, 1, 1))), world.ring, node="other", jitter=lambda: 0.5)
    changing, fail = await begin_unanswered(world, other)
    await other.change(NAME, delete)
    assert await expunge(world) == 1
    fail()
    with pytest.raises(OutcomeUnknown):
        await changing
    assert (await other.read(NAME)).value is None
    await other.close()


async def test_a_floor_of_a_newer_layout_and_a_slow_clock_has_no_retry_apply_again(world: World) -> None:
    other = ring_client(world.layouts, world.ring, node="other", jitter=lambda: 0.5)
    first_us = world.expunger._ports.clock.wall_ms() * 1000
    await world.expunger.expunge(world.state, PREFIX, Ballot(1, first_us, "", b""))
    changing, fail = await begin_unanswered(world, other)
    await other.change(NAME, delete)
    assert await world.expunger.expunge(world.state, PREFIX, Ballot(1, first_us + (1 << 21), "", b"")) == 1
    world.layouts.learn(msgspec.structs.replace(world.layouts.current, epoch=2))
    with pytest.raises(ServiceUnavailable, match="PREEMPTED"):
        await world.expunger.expunge(world.state, PREFIX, Ballot(2, first_us, "", b""))
    fail()
    with pytest.raises(OutcomeUnknown):
        await changing
    assert (await other.read(NAME)).value is None
    await other.close()
