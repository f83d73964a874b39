"""No create overwrites a record that lends data, however it comes to lie above that record: with replicas, ballots and
floors, as the ring has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.consensus.floors import sequence_of
from storaged.meta.consensus.register import Lineage, Verdict
from storaged.meta.messages import FloorSet
from storaged.meta.names import Ballot, RegisterName, object_name
from storaged.meta.ports import Outcome
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.records import Borrower, ObjectRecord, PartEntry, Version, sharing_of
from storaged.objects.write.loans import NotLent, Wanted, add_borrower
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.ring_client import MemoryReplicas, clock_of, ring_client

pytestmark = pytest.mark.virtual_time

BUCKET: Any = SimpleNamespace(id=b"b" * 16, shard_numbers=b"\x03", countries=())
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

    async def create(self, ballot: Ballot, floor: int = 0) -> None:
        """Another gateway's, that the last replica alone takes."""
        value = Lineage(b"c" * 14).create(OTHER, ballot, floor)
        verdicts = [
            (await self.ring.replicas[disk].accept(messages.Create(disk, NAME, ballot, value))).verdict
            for disk in self.state.present
        ]
        assert verdicts == [Verdict.HELD, Verdict.HELD, Verdict.OK]

    async def set_floor(self) -> Ballot:
        floor = self.ballot(-HOUR_US)._replace(node="")
        for active in (False, True):
            for disk in self.state.present:
                replica: Any = self.ring.replicas[disk]
                asked = FloorSet(disk, NAME.prefix, floor, active)
                assert (await replica.floors.set_floor(asked)).verdict == Verdict.OK
        return floor

    async def lend(self) -> bool:
        """The last replica answers what it holds, and then takes no part for a while."""

        async def change(*what: Any, **how: Any) -> Outcome:
            self.ring.away = {self.last}
            return await self.client.change(*what, **how)

        registers = SimpleNamespace(change=change, refuses_creates=self.client.refuses_creates)
        plane: Any = SimpleNamespace(registers=registers, pages=self.client)
        try:
            await add_borrower(plane, BUCKET, Wanted(NAME, LENT.context_id, None, BORROWER))
        except NotLent:
            return False
        finally:
            self.ring.away = set()
        return True

    async def loans_that_stay(self) -> int:
        """After a round that does not reach the second replica."""
        self.ring.away = {self.second}
        await asyncio.sleep(0.01)
        return len(sharing_of(decode_record(await self.client.settle(NAME))).loans)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.client.close()


async def test_no_data_is_lent_below_a_create_that_one_replica_has(world: World) -> None:
    """Its gateway's clock is ahead of the lender's. So the loan would get a lower ballot than the create, and the next
    round that meets the create carries it on.
    """
    await world.store()
    await world.create(world.ballot(HOUR_US // 2))
    lent = await world.lend()
    assert await world.loans_that_stay() == lent
    assert not lent


async def test_no_data_is_lent_while_a_replica_has_a_floor_in_place_of_a_row(world: World) -> None:
    """A create that knows the floor is taken there, also when the loan has been made."""
    floor = await world.set_floor()
    await world.store()
    lent = await world.lend()
    if lent:
        await world.create(world.ballot(HOUR_US // 2), sequence_of(floor))
    assert await world.loans_that_stay() == lent
    assert not lent


async def test_data_is_lent_once_the_create_is_overtaken(world: World) -> None:
    await world.store()
    await world.create(world.ballot(HOUR_US // 2))
    await world.client.settle(NAME)
    assert await world.lend()
    assert await world.loans_that_stay() == 1


async def test_data_that_was_stored_by_a_create_is_lent(world: World) -> None:
    change = record_change(ObjectRecord((LENT,)), b"")
    await world.client.change(NAME, lambda _before: change, regardless=True)
    await asyncio.sleep(0.01)
    assert await world.lend()
