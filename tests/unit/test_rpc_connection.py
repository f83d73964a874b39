"""How frames leave a connection: joined, small ones first, and never from memory that its owner has taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

from storaged.cluster.rpc.connection import (
    EARLY_FRAMES,
    SLICE_BYTES,
    SMALL_BODY_BYTES,
    URGENT_BODY_BYTES,
    Connection,
    measure,
)
from storaged.cluster.rpc.framing import FrameReader, Kind, Verdict
from storaged.cluster.rpc.handshake import Secured
from storaged.units import KIB, MIB
from storaged.wire import Buffer
from tests.worlds.receiving import feed


class Plain:
    """A reader and a writer of frames that nobody encrypts."""

    mid_packet = False

    def __init__(self, frames: FrameReader) -> None:
        self.buffer, self.received = frames.buffer, frames.received

    def resume(self) -> None:
        pass

    def seal(self, data: bytes) -> Buffer:
        return data

    def seal_pieces(self, pieces: Sequence[Buffer]) -> Buffer:
        return b"".join(pieces)


class Transport:
    """Takes bytes at once, and asks to pause after ``room_bytes``."""

    def __init__(self, room_bytes: int = 1 << 40) -> None:
        self.writes: list[bytes] = []
        self.room_bytes = room_bytes
        self.protocol: Connection | None = None
        self.gone = False

    def write(self, data: Buffer) -> None:
        self.writes.append(bytes(data))
        self.room_bytes -= len(data)
        if self.room_bytes <= 0 and self.protocol is not None:
            self.protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.gone

    def abort(self) -> None:
        self.gone = True


class Sender(Connection):
    def __init__(self, transport: Transport) -> None:
        super().__init__(asyncio.get_running_loop())
        self.left: list[tuple[int, int]] = []
        transport.protocol = self
        self.connection_made(cast(asyncio.Transport, transport))
        plain = Plain(self.reader)
        self.on_secured(Secured(b"", plain, plain))

    def admit(self, kind: int, request_id: int, head_bytes: int, body_bytes: int) -> Verdict:
        return Verdict.TAKE

    def deliver(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        pass

    def on_closed(self) -> None:
        pass

    def on_sent(self, request_id: int, size: int) -> None:
        self.left.append((request_id, size))


def frames_in(writes: list[bytes]) -> list[tuple[int, bytes, bytes]]:
    """What a reader makes of it: (request id, head, body)."""
    found: list[tuple[int, bytes, bytes]] = []
    reader = FrameReader(
        lambda *header: Verdict.TAKE,
        lambda kind, request_id, deadline_ms, head, body: found.append((request_id, bytes(head), bytes(body))),
    )
    feed(reader, b"".join(writes))
    return found


async def test_frames_of_one_loop_turn_leave_in_one_write() -> None:
    transport = Transport()
    sender = Sender(transport)
    for number in range(1, EARLY_FRAMES):
        sender.send(Kind.REQUEST, number, b"head%d" % number, (b"body",), 4)
    assert transport.writes == []
    await asyncio.sleep(0)
    assert len(transport.writes) == 1
    assert frames_in(transport.writes) == [(number, b"head%d" % number, b"body") for number in range(1, EARLY_FRAMES)]


async def test_of_a_long_turn_frames_leave_before_it_has_ended_but_not_while_bodies_wait() -> None:
    transport = Transport()
    sender = Sender(transport)
    for number in range(1, 2 * EARLY_FRAMES + 2):
        sender.send(Kind.REQUEST, number, b"head%d" % number)
    assert [len(frames_in([data])) for data in transport.writes] == [EARLY_FRAMES, EARLY_FRAMES]
    await asyncio.sleep(0)
    assert [number for number, _head, _body in frames_in(transport.writes)] == list(range(1, 2 * EARLY_FRAMES + 2))
    transport.writes.clear()
    transport.room_bytes = 0
    sender.pause_writing()
    for number in range(100, 100 + 2 * EARLY_FRAMES):
        sender.send(Kind.REQUEST, number, b"head")
    assert transport.writes == []
    sender.resume_writing()
    await asyncio.sleep(0)
    assert [number for number, _head, _body in frames_in(transport.writes)] == list(range(100, 100 + 2 * EARLY_FRAMES))


async def test_small_frames_overtake_bodies_that_wait() -> None:
    transport = Transport(room_bytes=1)
    sender = Sender(transport)
    for number in (1, 2):
        sender.send(Kind.REQUEST, number, b"", (bytes(MIB),), MIB)
    await asyncio.sleep(0)
    sender.send(Kind.REQUEST, 3, b"vote")
    await asyncio.sleep(0)
    assert len(transport.writes) == 1
    assert len(transport.writes[0]) <= SLICE_BYTES + 24
    transport.room_bytes = 1 << 40
    sender.resume_writing()
    await asyncio.sleep(0)
    assert [number for number, _head, _body in frames_in(transport.writes)] == [1, 3, 2]
    assert sender.queued_bytes == 0
    assert sender.left == [(1, MIB), (2, MIB)]


async def test_a_frame_withdrawn_before_it_left_never_leaves() -> None:
    transport = Transport()
    sender = Sender(transport)
    sender.send(Kind.REQUEST, 1, b"small")
    sender.send(Kind.REQUEST, 2, b"", (bytes(MIB),), MIB)
    sender.send(Kind.REQUEST, 3, b"stays")
    assert sender.withdraw(1)
    assert sender.withdraw(2)
    await asyncio.sleep(0)
    assert frames_in(transport.writes) == [(3, b"stays", b"")]
    assert sender.queued_bytes == 0
    assert not sender.withdraw(3)


async def test_a_body_withdrawn_half_way_is_finished_as_it_was_although_its_owner_uses_the_memory_again() -> None:
    transport = Transport(room_bytes=1)
    sender = Sender(transport)
    memory = bytearray(b"a" * MIB)
    sender.send(Kind.REQUEST, 1, b"", (memory,), MIB)
    await asyncio.sleep(0)
    assert not sender.withdraw(1)
    memory[:] = b"b" * MIB
    sender.send(Kind.CANCEL, 1, b"")
    transport.room_bytes = 1 << 40
    sender.resume_writing()
    await asyncio.sleep(0)
    assert frames_in(transport.writes) == [(1, b"", b"a" * MIB), (1, b"", b"")]


async def test_a_lost_connection_gives_back_every_body_that_had_not_left() -> None:
    transport = Transport(room_bytes=1)
    sender = Sender(transport)
    for number in (1, 2, 3):
        sender.send(Kind.REPLY, number, b"", (bytes(MIB),), MIB)
    await asyncio.sleep(0)
    sender.connection_lost(None)
    assert sorted(sender.left) == [(1, MIB), (2, MIB), (3, MIB)]
    sender.send(Kind.REPLY, 4, b"", (bytes(MIB),), MIB)
    assert sender.left[-1] == (4, MIB)
    await asyncio.sleep(0)
    assert len(transport.writes) == 1
    assert sender.lost.done()


async def test_a_body_at_the_border_of_small_is_joined_and_one_byte_more_is_not_copied() -> None:
    transport = Transport()
    sender = Sender(transport)
    sender.send(Kind.REQUEST, 1, b"", (bytes(SMALL_BODY_BYTES),), SMALL_BODY_BYTES)
    assert sender.queued_bytes == 0
    sender.send(Kind.REQUEST, 2, b"", (bytes(SMALL_BODY_BYTES + 1),), SMALL_BODY_BYTES + 1)
    assert sender.queued_bytes == SMALL_BODY_BYTES + 1
    await asyncio.sleep(0)
    assert [len(body) for _number, _head, body in frames_in(transport.writes)] == [
        SMALL_BODY_BYTES,
        SMALL_BODY_BYTES + 1,
    ]


def test_measure_drops_empty_pieces_and_counts_bytes() -> None:
    wide = memoryview(bytearray(32)).cast("I")
    pieces, size = measure([b"", memoryview(bytearray(0)).cast("I"), wide, b"abc", memoryview(b""), bytearray(b"d")])
    assert (size, [len(piece) for piece in pieces]) == (36, [32, 3, 1])


async def test_an_urgent_body_leaves_before_larger_ones_that_came_first() -> None:
    transport = Transport(room_bytes=1)
    sender = Sender(transport)
    sender.send(Kind.REQUEST, 1, b"fragment", (bytes(MIB),), MIB)
    sender.send(Kind.REQUEST, 2, b"fragment", (bytes(MIB),), MIB)
    sender.send(Kind.REQUEST, 3, b"accepts", (bytes(5 * SMALL_BODY_BYTES),), 5 * SMALL_BODY_BYTES, 0, URGENT_BODY_BYTES)
    sender.send(
        Kind.REQUEST, 4, b"beyond", (bytes(URGENT_BODY_BYTES + 1),), URGENT_BODY_BYTES + 1, 0, URGENT_BODY_BYTES
    )
    while len(frames_in(transport.writes)) < 4:
        await asyncio.sleep(0)
        transport.room_bytes = 1
        sender.resume_writing()
    assert [request_id for request_id, _head, _body in frames_in(transport.writes)] == [3, 1, 2, 4]
    assert [request_id for request_id, _size in sender.left] == [1, 2, 4]
    assert sender.queued_bytes == 0


async def test_small_frames_leave_in_one_write_with_the_first_body_of_their_turn() -> None:
    transport = Transport()
    sender = Sender(transport)
    sender.send(Kind.REPLY, 1, b"fragments", (bytes(2 * SMALL_BODY_BYTES),), 2 * SMALL_BODY_BYTES)
    sender.send(Kind.REPLY, 2, b"fragments", (bytes(MIB),), MIB)
    sender.send(Kind.REPLY, 3, b"rows")
    await asyncio.sleep(0)
    assert [number for number, _head, _body in frames_in(transport.writes[:1])] == [3, 1]
    assert frames_in(transport.writes) == [
        (3, b"rows", b""),
        (1, b"fragments", bytes(2 * SMALL_BODY_BYTES)),
        (2, b"fragments", bytes(MIB)),
    ]
    assert sender.left == [(1, 2 * SMALL_BODY_BYTES), (2, MIB)]
    transport.writes.clear()
    sender.send(Kind.REPLY, 4, b"fragments", (bytes(MIB),), MIB)
    many = EARLY_FRAMES // 2
    for number in range(10, 10 + many):
        sender.send(Kind.REPLY, number, b"rows", (bytes(KIB),), KIB)
    await asyncio.sleep(0)
    assert len(frames_in(transport.writes[:1])) == many, "what is not small together is not copied once more"
    assert [number for number, _head, _body in frames_in(transport.writes)] == [*range(10, 10 + many), 4]


class Lone(Sender):
    def likely_last_frame(self) -> bool:
        return True


async def test_a_lone_frame_leaves_at_once_unless_another_is_to_follow() -> None:
    transport = Transport()
    sender = Lone(transport)
    sender.send(Kind.REQUEST, 1, b"row")
    assert [number for number, _head, _body in frames_in(transport.writes)] == [1]
    sender.send(Kind.REQUEST, 2, b"cells", followed=True)
    sender.send(Kind.REQUEST, 3, b"row")
    assert len(transport.writes) == 1
    await asyncio.sleep(0)
    assert [len(frames_in([data])) for data in transport.writes] == [1, 2]
