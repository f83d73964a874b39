"""Reads that travel together: each gets its own cells, and none waits for another one's disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from storaged.cluster.ports import Call, EncodedCall, OnReply, PeerIdentity, Reply
from storaged.cluster.rpc import faults
from storaged.errors import FragmentDamaged, FragmentMissing, PeerError, PeerTimeout
from storaged.fragments.messages import ReadReply, ReadRequest, ReadsReply, ReadsRequest
from storaged.fragments.ports import READS_MAX, CellRead, FragmentHeader, FragmentId
from storaged.fragments.read_batches import ASKED_AGAIN_S, BATCH_BYTES_MAX, ReadBatcher
from storaged.fragments.remote import READS_BYTES_MAX, FragmentHost
from storaged.hashes import fragment_hash
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.disks import FaultyDisk

pytestmark = pytest.mark.virtual_time

GATEWAY = Call(PeerIdentity("gw", "FR", "par1", "a", ("gateway",)), memoryview(b""), 0.0)
CELL = 4096


class Node:
    """A ``TryCaller`` of one node with some disks."""

    def __init__(self) -> None:
        self.disks = {name: FaultyDisk(name, near=True) for name in ("one", "two", "three")}
        self.methods = dict(FragmentHost(self.disks).methods())
        self.asked: list[tuple[str, int]] = []
        """Each call: the method, and how many reads it has."""
        self.connected = True
        self.answered: Callable[[Any, bytes], tuple[Any, bytes]] = lambda message, body: (message, body)
        self._calls: set[asyncio.Task[None]] = set()

    def try_call(self, *_what: Any, **_how: Any) -> bool:
        raise AssertionError("calls are encoded")

    def encoded_call(
        self,
        node: str,
        method: str,
        reply: type[Message],
        prefix: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        def call(rest: bytes, on_reply: OnReply, body: Sequence[Buffer], timeout_s: float) -> bool:
            if self.connected:
                task = asyncio.create_task(self._answer(method, rest, reply, on_reply))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            return self.connected

        return call

    async def _answer(self, name: str, asked: bytes, kind: type[Message], on_reply: OnReply) -> None:
        method = self.methods.get(name)
        if method is None:
            self.asked.append((name, 0))
            on_reply(faults.refused(faults.UNKNOWN_METHOD, "It is not known."), memoryview(b""))
            return
        request = decode(asked, method.request)
        self.asked.append((name, len(request.reads) if isinstance(request, ReadsRequest) else 1))
        try:
            assert method.try_answer is not None
            found = method.try_answer(request, GATEWAY) or await method.handler(request, GATEWAY)
        except PeerError as error:
            on_reply(error, memoryview(b""))
            return
        assert isinstance(found, Reply)
        message, body = self.answered(found.message, b"".join(found.body))
        on_reply(decode(encode(message), kind), memoryview(body))

    async def has(self, disk: str, size: int = 3 * CELL) -> tuple[FragmentId, bytes]:
        """A new fragment on a disk, and its bytes."""
        fragment, data = FragmentId(os.urandom(16), 0, 4, 2, 0), os.urandom(size)
        hashes = (fragment_hash([data]),) * 6
        await self.disks[disk].write(FragmentHeader(fragment.pack(), b"o", b"h" * 64, hashes, CELL, size, 1), [data])
        return fragment, data


class Reader:
    """Asks through a batcher, and keeps what came."""

    def __init__(self, node: Node) -> None:
        self.batcher = ReadBatcher(node, "n1", 5.0)
        self.found: dict[bytes, CellRead | PeerError | None] = {}

    def ask(self, disk: str, fragment: FragmentId, size: int = 3 * CELL) -> None:
        request = ReadRequest(disk, fragment.pack(), 0, -(-size // CELL))
        self.batcher.ask(request, size, partial(self.found.__setitem__, fragment.pack()))

    def data(self, fragment: FragmentId) -> bytes:
        found = self.found[fragment.pack()]
        assert isinstance(found, CellRead)
        assert found.whole == b"".join(cell for cell in found.cells if cell is not None)
        return bytes(found.whole or b"")


async def test_reads_of_one_turn_travel_in_one_call_and_each_gets_its_own() -> None:
    node = Node()
    reader = Reader(node)
    made = [(disk, *await node.has(disk)) for disk in ("one", "two", "one", "three")]
    for disk, fragment, _ in made:
        reader.ask(disk, fragment)
    await asyncio.sleep(0.01)
    assert node.asked == [("fragment.reads", 4)]
    assert [reader.data(fragment) for _, fragment, _ in made] == [data for *_, data in made]
    reader.ask("one", made[0][1])
    await asyncio.sleep(0.01)
    assert node.asked[1:] == [("fragment.read", 1)]


async def test_a_disk_that_waits_or_has_no_such_fragment_holds_up_no_other() -> None:
    node = Node()
    reader = Reader(node)
    (slow, late), (quick, data), (damaged, _) = await node.has("one"), await node.has("two"), await node.has("three")
    none = FragmentId(os.urandom(16), 0, 4, 2, 0)
    node.disks["one"].slow_s = 1.0
    node.disks["three"].damage(damaged, -1)
    for disk, fragment in (("one", slow), ("two", none), ("three", damaged), ("two", quick)):
        reader.ask(disk, fragment)
    await asyncio.sleep(0.5)
    assert reader.data(quick) == data
    assert isinstance(reader.found[none.pack()], FragmentMissing)
    assert isinstance(reader.found[damaged.pack()], FragmentDamaged)
    assert slow.pack() not in reader.found
    await asyncio.sleep(1.0)
    assert reader.data(slow) == late
    assert node.asked == [("fragment.reads", 4), *3 * [("fragment.read", 1)]]


async def test_a_node_that_does_not_know_the_call_gets_each_read_alone_until_its_program_was_replaced() -> None:
    node = Node()
    reader = Reader(node)
    newer = node.methods.pop("fragment.reads")
    made = [await node.has("one") for _ in range(2)]
    for _ in range(2):
        reader.found.clear()
        for fragment, _ in made:
            reader.ask("one", fragment)
        await asyncio.sleep(0.01)
        assert [reader.data(fragment) for fragment, _ in made] == [data for _, data in made]
    assert node.asked == [("fragment.reads", 0), *4 * [("fragment.read", 1)]]
    node.methods["fragment.reads"] = newer
    await asyncio.sleep(ASKED_AGAIN_S)
    for fragment, _ in made:
        reader.ask("one", fragment)
    await asyncio.sleep(0.01)
    assert node.asked[5:] == [("fragment.reads", 2)]


async def test_without_a_connection_all_are_told_that_they_must_wait() -> None:
    node = Node()
    reader = Reader(node)
    node.connected = False
    made = [await node.has("one") for _ in range(2)]
    for count in (1, 2):
        for fragment, _ in made[:count]:
            reader.ask("one", fragment)
        await asyncio.sleep(0.01)
        assert reader.found == {fragment.pack(): None for fragment, _ in made[:count]}
    assert node.asked == []


async def test_an_error_of_the_call_is_told_to_all() -> None:
    node = Node()
    reader = Reader(node)

    async def late(*_: object) -> None:
        raise PeerTimeout("late")

    node.methods["fragment.reads"] = node.methods["fragment.reads"]._replace(try_answer=lambda *_: None, handler=late)
    made = [await node.has("one") for _ in range(2)]
    for fragment, _ in made:
        reader.ask("one", fragment)
    await asyncio.sleep(0.01)
    assert [type(found) for found in reader.found.values()] == 2 * [PeerTimeout]


@pytest.mark.parametrize("how", ["other", "short", "few"])
async def test_what_answers_another_question_is_taken_for_nothing_else(how: str) -> None:
    node = Node()
    reader = Reader(node)
    made = [await node.has("one") for _ in range(2)]

    def wrong(message: Any, body: bytes) -> tuple[Any, bytes]:
        if not isinstance(message, ReadsReply):
            return message, body
        if how == "other":
            return ReadsReply(message.found[::-1]), body
        if how == "few":
            return ReadsReply(message.found[:1]), body[: 3 * CELL]
        return message, body[:-1]

    node.answered = wrong
    for fragment, _ in made:
        reader.ask("one", fragment)
    await asyncio.sleep(0.01)
    first, second = (reader.found[fragment.pack()] for fragment, _ in made)
    if how == "other":
        assert isinstance(first, FragmentDamaged)
        assert isinstance(second, FragmentDamaged)
    else:
        assert reader.data(made[0][0]) == made[0][1]
        if how == "few":
            assert reader.data(made[1][0]) == made[1][1]
        else:
            assert isinstance(second, FragmentDamaged)


async def test_a_call_has_a_bounded_number_of_reads_and_of_bytes() -> None:
    node = Node()
    reader = Reader(node)
    large = BATCH_BYTES_MAX // 2
    made = [await node.has("one", large) for _ in range(3)]
    for fragment, _ in made:
        reader.ask("one", fragment, large)
    await asyncio.sleep(0.01)
    assert node.asked == [("fragment.reads", 2), ("fragment.read", 1)]
    assert [reader.data(fragment) for fragment, _ in made] == [data for _, data in made]
    fragment, data = await node.has("one", CELL)
    for _ in range(READS_MAX + 1):
        reader.ask("one", fragment, CELL)
    await asyncio.sleep(0.01)
    assert node.asked[2:] == [("fragment.reads", READS_MAX), ("fragment.read", 1)]
    assert reader.data(fragment) == data


async def test_a_node_bounds_what_it_answers_at_once() -> None:
    node = Node()
    fragment, _ = await node.has("one", READS_BYTES_MAX // 2)
    read = ReadRequest("one", fragment.pack(), 0, 1000)
    answer = node.methods["fragment.reads"].try_answer
    assert answer is not None
    reply = answer(ReadsRequest((read,) * 4), GATEWAY)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, ReadsReply)
    assert [isinstance(found, ReadReply) for found in reply.message.found] == [True, True, False, False]
    assert sum(map(len, reply.body)) == READS_BYTES_MAX
    with pytest.raises(PeerError, match="65 reads are more than 64"):
        answer(ReadsRequest((read,) * 65), GATEWAY)
