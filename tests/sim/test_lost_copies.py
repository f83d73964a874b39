"""Single stories of small objects whose copies can't be had: an unacknowledged overwrite destroys no acknowledged
object, an acknowledged one is not rolled back, and what can't be read now is not damaged.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
import structlog.testing

from storaged.errors import DataDamaged, PreconditionFailed, ServiceUnavailable
from storaged.meta import messages
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import Ballot, Change, Table, Value, Visibility
from storaged.meta.ports import Reading, SmallCopies
from storaged.meta.store_ports import Slot, StoreBatch
from tests.sim.cluster import FIRST_SEEDS, Gateway, StorageNode, World, make_layout
from tests.sim.virtual import VirtualLoop, run
from tests.sim.workload import ObjectName

NAME = ObjectName(Table.OBJECT, bytes(16), 0, b"key")


class Story:
    """Three disks, of three nodes, and a gateway."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.world = World(loop, random.Random(3))
        self.world.weather.refuse = 0.0
        self.nodes = [StorageNode(self.world, "n" + disk[1:], disk, 0) for disk in FIRST_SEEDS]
        self.gateway = Gateway(self.world, "g", make_layout(1, FIRST_SEEDS), skew_ms=0)
        self._counter = 0

    async def acknowledged(self, content: bytes, *, missed_by: str = "") -> None:
        """``missed_by``: a node that does not get it."""
        self.world.cut = frozenset({missed_by} - {""})
        small = SmallCopies(_id(content), [(_id(content), [content])] * 3, lambda disks: len(disks) >= 2)
        change = Change(content, Visibility.LIVE, _id(content))
        await self.gateway.client.change(NAME, lambda _value: change, small=small)
        await asyncio.sleep(1.0)  # until the last disk has it, too
        self.world.cut = frozenset()

    async def half_written(self, content: bytes, *nodes: int) -> None:
        """Another gateway gets promises of all; its accept reaches some disks, and it dies."""
        slots = [node.store.get(NAME) for node in self.nodes]
        held = max(slot.ballot.counter for slot in slots if slot is not None)
        ballot = Ballot(1, held + 10, "h", b"h" * 8)
        for node in self.nodes:
            assert (await node.replica.prepare(messages.Prepare(node.disk, NAME, ballot))).verdict == Verdict.OK
        value = Value(7, b"h" * 16, Visibility.LIVE, content, _id(content))
        for node in (self.nodes[number] for number in nodes):
            accept = messages.Accept(node.disk, NAME, ballot, value, header=_id(content))
            assert (await node.replica.accept(accept, (content,))).verdict == Verdict.OK

    async def read(self) -> Reading:
        return await self.gateway.client.read(NAME, want_payload=True)

    def rows(self) -> list[bytes]:
        slots = [node.store.get(NAME) for node in self.nodes]
        return [slot.value.body if slot is not None else b"" for slot in slots]

    def lose(self, content: bytes, *nodes: int) -> None:
        for number in nodes or range(3):
            self.nodes[number].payloads.lost.add(_id(content))

    def hide(self, content: bytes, after_s: float = 0.0) -> None:
        for node in self.nodes:
            node.payloads.unreadable[_id(content)] = after_s

    def show(self, content: bytes) -> None:
        for node in self.nodes:
            node.payloads.unreadable.pop(_id(content), None)


def _id(content: bytes) -> bytes:
    return content.ljust(16)


def play(tell: Callable[[Story], Awaitable[None]]) -> None:
    loop = VirtualLoop()

    async def told() -> None:
        story = Story(loop)
        await tell(story)
        await story.gateway.client.close()

    with structlog.testing.capture_logs():
        run(loop, told())


def body(reading: Reading) -> tuple[bytes, bytes]:
    assert reading.value is not None
    assert reading.payload is not None
    return reading.value.body, bytes(reading.payload)


@pytest.mark.parametrize("how", ["lost", "fails", "hangs"])
def test_an_unacknowledged_overwrite_destroys_no_acknowledged_object(how: str) -> None:
    """An object is acknowledged with its copies on three disks. The accept of an overwriting reaches one disk, whose
    copy of it can't be read. With a replica away nothing can be concluded; when it is back the object is read again.
    """

    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        await story.half_written(b"v2", 0)
        if how == "lost":
            story.lose(b"v2", 0)
        else:
            story.hide(b"v2", 5.0 if how == "hangs" else 0.0)
        story.world.cut = frozenset({"n2"})
        with pytest.raises(ServiceUnavailable) as raised:
            await story.read()
        assert not isinstance(raised.value, DataDamaged)
        assert story.rows() == [b"v2", b"v1", b"v1"]
        story.world.cut = frozenset()
        for _ in range(3):
            assert body(await story.read()) == (b"v1", b"v1")
        assert all(_id(b"v1") in node.payloads.synced for node in story.nodes)
        story.show(b"v2")
        assert body(await story.read()) == (b"v1", b"v1")  # it was settled, and stays

    play(tell)


def test_what_two_of_three_disks_hold_goes_on_as_it_was() -> None:
    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        before = (await story.read()).value
        await story.half_written(b"v2", 0)
        story.lose(b"v2", 0)
        assert await story.gateway.client.settle(NAME) == before

    play(tell)


def test_the_older_record_goes_on_as_a_new_change_above_all_that_was_seen() -> None:
    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1", missed_by="n2")
        before = (await story.read()).value
        await story.half_written(b"v2", 0)
        story.lose(b"v2", 0)
        after = await story.gateway.client.settle(NAME)
        assert before is not None
        assert after is not None
        assert (after.body, after.payload, after.sequence) == (b"v1", before.payload, 8)
        assert after.operation not in (before.operation, b"h" * 16)

    play(tell)


def test_each_record_that_takes_a_place_is_a_change_of_its_own() -> None:
    """Acceptors take two values of one operation for one value: a replica that lags would refuse the second one."""

    async def restated(story: Story, content: bytes) -> Value:
        """The acknowledged record, after an overwriting was cut short and has lost its copy."""
        before = (await story.read()).value
        for _ in range(20):  # until the disk with the newer record is among the first that promise
            await story.half_written(content, 0)
            story.lose(content, 0)
            after = await story.gateway.client.settle(NAME)
            assert before is not None
            assert after is not None
            assert after.body == before.body
            await asyncio.sleep(1.0)
            if after.operation != before.operation:
                return after
        raise AssertionError("the record never went on as a new change")

    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1", missed_by="n2")
        first = await restated(story, b"v2")
        await story.acknowledged(b"v3", missed_by="n2")
        second = await restated(story, b"v4")
        assert (first.body, second.body) == (b"v1", b"v3")
        assert first.operation != second.operation
        assert story.rows() == [b"v3"] * 3
        assert [node.replica.statistics().ballot_conflicts for node in story.nodes] == [0, 0, 0]

    play(tell)


def test_a_condition_is_judged_on_the_record_that_takes_the_place() -> None:
    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        await story.half_written(b"v2", 0)
        story.lose(b"v2", 0)
        seen: list[bytes] = []

        def unless_v2(value: Value | None) -> Change:
            assert value is not None
            seen.append(value.body)
            if value.body == b"v2":
                raise PreconditionFailed
            return Change(b"v3")

        outcome = await story.gateway.client.change(NAME, unless_v2)
        assert (outcome.before and outcome.before.body, outcome.after and outcome.after.body) == (b"v1", b"v3")
        assert seen[-1] == b"v1"
        assert (await story.read()).value == outcome.after

    play(tell)


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_an_acknowledged_object_whose_copies_cannot_be_read_now_is_not_rolled_back(how: str) -> None:
    """It was accepted with its copies by two disks; two of three answer, and one of those has the older record."""

    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        await story.half_written(b"v2", 0, 1)  # as good as acknowledged: a majority has it
        story.hide(b"v2", 5.0 if how == "hangs" else 0.0)
        story.world.cut = frozenset({"n0"})
        with pytest.raises(ServiceUnavailable) as raised:
            await story.read()
        assert not isinstance(raised.value, DataDamaged)
        story.show(b"v2")
        assert body(await story.read()) == (b"v2", b"v2")

    play(tell)


def test_a_record_is_not_rolled_back_in_two_steps() -> None:
    """Each of three disks holds another record: what is above the oldest may have been chosen, all together."""

    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        await story.half_written(b"v2", 0, 1)
        await story.half_written(b"v3", 0)
        story.lose(b"v2")
        story.lose(b"v3")
        with pytest.raises(ServiceUnavailable):
            await story.read()
        assert story.rows() == [b"v3", b"v2", b"v1"]
        await story.gateway.client.change(NAME, lambda _value: Change(b"v4"))  # it can be overwritten
        reading = await story.read()
        assert reading.value is not None
        assert reading.value.body == b"v4"

    play(tell)


def test_a_record_that_a_majority_accepted_with_its_copy_is_damaged_when_the_copy_is_nowhere() -> None:
    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        await story.half_written(b"v2", 0, 1)
        story.lose(b"v2")
        with pytest.raises(DataDamaged):
            await story.gateway.client.settle(NAME)
        story.hide(b"v2")  # one may have it after all
        with pytest.raises(ServiceUnavailable) as raised:
            await story.gateway.client.settle(NAME)
        assert not isinstance(raised.value, DataDamaged)
        story.show(b"v2")
        story.nodes[1].payloads.lost.clear()  # the copy comes back
        assert (await story.gateway.client.settle(NAME) or Value(0, b"", 0, b"")).body == b"v2"
        assert body(await story.read()) == (b"v2", b"v2")

    play(tell)


def test_a_row_from_before_rows_had_the_bit_counts_as_accepted_with_its_copy() -> None:
    """The store reports it so (``test_meta_rowvalue``); one that says that it had no copy does not count."""

    async def tell(story: Story) -> None:
        await story.acknowledged(b"v1")
        first = story.nodes[0].store.get(NAME)
        newer = Value(7, b"h" * 16, Visibility.LIVE, b"v2", _id(b"v2"))
        ballot = first.ballot._replace(counter=first.ballot.counter + 10)
        for node, copied in zip(story.nodes, (True, False, False), strict=True):
            if node is not story.nodes[2]:
                await node.store.commit(StoreBatch((Slot(NAME, ballot, newer, copied),)))
        story.lose(b"v2")
        assert body(await story.read()) == (b"v1", b"v1")

    play(tell)
