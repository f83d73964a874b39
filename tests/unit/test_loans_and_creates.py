"""No create overwrites a record that lends data, however it comes to lie above that record: with replicas, ballots and
floors, as the ring has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.consensus.floors import sequence_of
from storaged.meta.consensus.register import Lineage, Verdict
from storaged.meta.messages import Expunge, FloorSet
from storaged.meta.names import Ballot, Change, RegisterName, Visibility, object_name
from storaged.meta.ports import Outcome
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.records import ObjectRecord, PartEntry, Version, sharing_of
from storaged.objects.sharing import Borrower
from storaged.objects.write.commit import AfterPromise
from storaged.objects.write.loans import NotLent, Wanted, with_loan
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.ring_client import MemoryReplicas, clock_of, ring_client

pytestmark = pytest.mark.virtual_time

BUCKET: Any = SimpleNamespace(id=b"b" * 16, shard_numbers=b"\x03", countries=(), state="active")
NAME: RegisterName = object_name(BUCKET.id, BUCKET.shard_numbers, b"a")
BORROWER = Borrower(b"i" * 16, b"b", 1)
HOUR_US = 3_600_000_000


def version(data_id: bytes) -> Version:
    part = PartEntry(1, data_id, 5, b"h" * 64, 2, "2+1", ())
    return Version("null", 1, 5, "owner", 1, data_id, b"", False, b"", b"", (part,))


LENT = version(b"d" * 16)
OTHER = record_change(ObjectRecord((version(b"e" * 16),)), b"")


class World:
    """Three replicas of the key ``a``, which has been stored, but not at the last one. ``client`` is the lender's."""

    def __init__(self) -> None:
        layouts = KnownLayouts(layout_of((1, 1, 1, 1)))
        self.ring = MemoryReplicas(disk.id for disk in layouts.current.disks)
        self.client: RingClient = ring_client(layouts, self.ring, node="gateway", jitter=lambda: 0.5)
        self.state = layouts.partition(NAME.partition)
        self.first, self.second, self.last = self.state.present

    def ballot(self, ahead_us: int = 0) -> Ballot:
        now_us = 1000 * clock_of(asyncio.get_running_loop()).wall_ms()
        return Ballot(self.state.epoch, now_us + ahead_us, "other", b"")

    async def store(self) -> None:
        self.ring.away = {self.last}
        await self.client.change(NAME, lambda _before: record_change(ObjectRecord((LENT,)), b""))
        await asyncio.sleep(0.01)
        self.ring.away = set()

    async def create(self, ballot: Ballot, floor: int = 0, *, taken: bool = True) -> None:
        """Another gateway's, that the last replica alone takes, or none."""
        value = Lineage(b"c" * 14).create(OTHER, ballot, floor)
        verdicts = [
            (await self.ring.replicas[disk].accept(messages.Create(disk, NAME, ballot, value))).verdict
            for disk in self.state.present
        ]
        assert verdicts == [Verdict.HELD, Verdict.HELD, Verdict.OK if taken else Verdict.HELD]

    async def set_floor(self, disks: Sequence[str]) -> Ballot:
        floor = self.ballot(1_000)._replace(node="")
        for active in (False, True):
            for disk in disks:
                replica: Any = self.ring.replicas[disk]
                asked = FloorSet(disk, NAME.prefix, floor, active)
                assert (await replica.floors.set_floor(asked)).verdict == Verdict.OK
        return floor

    async def lend(self, *, missed: bool = True) -> bool:
        """Whether a copy gets the loan. ``missed``: the last replica takes no part in the change of the record."""
        plane: Any = SimpleNamespace(
            registers=_Lender(self, missed=missed),
            pages=self.client,
            background=SimpleNamespace(spawn=lambda work: work.close()),
        )

        async def commit(_check: AfterPromise) -> bool:
            return True

        try:
            return await with_loan(plane, BUCKET, Wanted(NAME, (LENT.context_id,), None, BORROWER), commit)
        except NotLent:
            return False

    async def loans_that_stay(self) -> bool:
        """After a round that does not reach the second replica."""
        self.ring.away = {self.second}
        await asyncio.sleep(0.01)
        return bool(sharing_of(decode_record(await self.client.settle(NAME))).loans)


class _Lender:
    def __init__(self, world: World, *, missed: bool) -> None:
        self._world = world
        self._missed = missed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.client, name)

    async def change(self, *what: Any, **how: Any) -> Outcome:
        ring = self._world.ring
        ring.away = {self._world.last} if self._missed else set()
        try:
            return await self._world.client.change(*what, **how)
        finally:
            ring.away = set()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.client.close()


async def test_no_data_is_lent_below_a_create_that_one_replica_has(world: World) -> None:
    """Its gateway's clock is ahead of the lender's. So the loan has a lower ballot than the create, and the next round
    that meets the create carries it on.
    """
    await world.store()
    await world.create(world.ballot(HOUR_US // 2))
    lent = await world.lend()
    assert not (lent and not await world.loans_that_stay()), "the data of the copy would be lost"
    assert not lent


async def test_no_data_is_lent_while_a_replica_has_a_floor_in_place_of_a_row(world: World) -> None:
    """It takes a create that knows the floor, also after the loan was made."""
    floor = await world.set_floor(world.state.present)
    await world.store()
    lent = await world.lend()
    await world.create(world.ballot(HOUR_US // 2), sequence_of(floor))
    assert not (lent and not await world.loans_that_stay()), "the data of the copy would be lost"
    assert not lent


async def test_no_data_is_lent_while_a_replica_has_a_tombstone_in_place_of_the_record(world: World) -> None:
    """It may be expunged: the round that brings the replicas together before that may miss this one."""
    await world.client.change(NAME, lambda _before: Change(b"", Visibility.TOMBSTONE))
    await asyncio.sleep(0.01)
    await world.store()
    lent = await world.lend()
    floor = await world.set_floor(world.state.present)
    replica: Any = world.ring.replicas[world.last]
    assert (await replica.floors.expunge(Expunge(world.last, NAME.prefix, floor))).gone == 1
    await world.create(world.ballot(HOUR_US // 2), sequence_of(floor))
    assert not (lent and not await world.loans_that_stay()), "the data of the copy would be lost"
    assert not lent


async def test_data_is_lent_where_every_replica_takes_the_loan(world: World) -> None:
    await world.store()
    await world.create(world.ballot())
    await asyncio.sleep(0.01)
    assert await world.lend(missed=False)
    await world.create(world.ballot(HOUR_US // 2), taken=False)
    assert await world.loans_that_stay()


async def test_data_that_was_stored_by_a_create_is_lent(world: World) -> None:
    change = record_change(ObjectRecord((LENT,)), b"")
    await world.client.change(NAME, lambda _before: change, regardless=True)
    await asyncio.sleep(0.01)
    assert await world.lend(missed=False)
