"""Packets between nodes: what was sealed comes out as it was, however the stream arrives, and nothing else does."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.rpc import packets
from storaged.cluster.rpc.framing import SCRATCH_BYTES, FrameReader, Kind, Verdict, pack_header
from storaged.cluster.rpc.packets import (
    JOIN_BYTES,
    LENGTH_BYTES,
    PACKET_PLAIN_MAX,
    PACKETS_A_KEY,
    SECRET_BYTES,
    TAG_BYTES,
    PacketError,
    PacketReader,
    PacketWriter,
    secrets_of,
)
from storaged.units import KIB
from tests.examples import examples

DIALLER, LISTENER = bytes(range(32)), bytes(range(32, 64))
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "packets.json").read_text())


class Sink:
    """Frames that take up to ``room`` bytes at a time, and wait after each ``pause`` bytes."""

    def __init__(self, room: int = 1 << 19, pause: int = 1 << 40) -> None:
        self.room = room
        self.pause = pause
        self.waiting = False
        self.taken = bytearray()
        self.most = 0
        self._memory = memoryview(bytearray(room))

    def buffer(self) -> memoryview:
        assert not self.waiting
        return self._memory

    def received(self, count: int) -> None:
        assert not self.waiting, "it was given bytes although it waits"
        before = len(self.taken)
        self.taken += self._memory[:count]
        self.most = max(self.most, count)
        self.waiting = len(self.taken) // self.pause > before // self.pause


def writer(direction: int = 0) -> PacketWriter:
    return PacketWriter(secrets_of(DIALLER, LISTENER)[direction])


def reader(sink: Sink, direction: int = 0) -> PacketReader:
    return PacketReader(secrets_of(DIALLER, LISTENER)[direction], sink)


def give(receiver: PacketReader, stream: bytes, step: int = 1 << 30, sink: Sink | None = None) -> None:
    """As a transport does: pieces of at most ``step`` bytes, and none while the frames wait."""
    at = 0
    while at < len(stream):
        room = receiver.buffer()
        count = min(step, len(room), len(stream) - at)
        assert count
        room[:count] = stream[at : at + count]
        at += count
        receiver.received(count)
        while sink is not None and sink.waiting:
            sink.waiting = False
            receiver.resume()


def sealed(plain: list[bytes]) -> list[bytes]:
    sender = writer()
    return [bytes(sender.seal(data)) for data in plain]


# --- what comes out


sizes = st.integers(1, 300) | st.sampled_from(
    [JOIN_BYTES - 1, JOIN_BYTES, JOIN_BYTES + 1, 40 * KIB, PACKET_PLAIN_MAX, PACKET_PLAIN_MAX + 1]
)


@settings(max_examples=examples(40), deadline=None)
@given(
    st.lists(st.lists(sizes, min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from([7, 1000, 70_000, 1 << 30]),
    st.sampled_from([1, 5000, 1 << 19]),
    st.sampled_from([1000, 100_000, 1 << 40]),
)
def test_the_stream_comes_out_as_it_went_in_however_it_is_cut(writes, step, room, pause):
    least = sum(map(sum, writes)) // 1000  # byte by byte, only a short stream is soon through
    step, room = max(step, least), max(room, least)
    sender, sink = writer(), Sink(room, pause)
    receiver, told = reader(sink), bytearray()
    rng = random.Random(repr(writes))
    for pieces in writes:
        plain = [rng.randbytes(size) for size in pieces]
        told += b"".join(plain)
        stream = sender.seal(plain[0]) if len(plain) == 1 else sender.seal_pieces(plain)
        give(receiver, bytes(stream), step, sink)
    assert sink.taken == told
    assert not receiver.mid_packet
    assert sink.most <= PACKET_PLAIN_MAX


@settings(max_examples=examples(30), deadline=None)
@given(
    st.lists(st.integers(0, 600_000), min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([999, 1 << 30])
)
def test_frames_come_out_of_packets_wherever_these_begin_and_end(bodies, seed, step):
    found = []
    frames = FrameReader(
        lambda *header: Verdict.TAKE,
        lambda kind, number, ms, head, body: found.append((number, bytes(head), bytes(body))),
    )
    rng, stream, told = random.Random(seed), bytearray(), []
    for number, size in enumerate(bodies):
        head, body = rng.randbytes(rng.randrange(100)), rng.randbytes(size)
        stream += pack_header(Kind.REQUEST, number, len(head), size) + head + body
        told.append((number, head, body))
    sender, receiver, at = writer(), PacketReader(secrets_of(DIALLER, LISTENER)[0], frames), 0
    while at < len(stream):
        count = rng.choice((1, 24, 500, 30 * KIB, PACKET_PLAIN_MAX))
        give(receiver, bytes(sender.seal(bytes(stream[at : at + count]))), step)
        at += count
    assert found == told


def test_a_packet_finds_room_for_its_plaintext_behind_any_part_of_a_header() -> None:
    """Otherwise it would be copied. The frame after it is larger than the scratch, which so is used again."""
    rooms = []

    class Watched(FrameReader):
        def buffer(self) -> memoryview:
            rooms.append(len(super().buffer()))
            return super().buffer()

    frames = Watched(lambda *header: Verdict.TAKE, lambda *frame: None)
    sender, receiver = writer(), PacketReader(secrets_of(DIALLER, LISTENER)[0], frames)
    frame = pack_header(Kind.REQUEST, 1, 0, 100) + bytes(100)
    give(receiver, bytes(sender.seal(frame * 1000 + frame[:23])))
    give(receiver, bytes(sender.seal(frame[23:] + frame * 2000)))
    assert min(rooms) >= PACKET_PLAIN_MAX
    assert SCRATCH_BYTES == PACKET_PLAIN_MAX + 24


def test_the_body_of_a_frame_is_opened_where_it_stays() -> None:
    copies = []

    class Watched(PacketReader):
        def _hand_on(self, rest: memoryview) -> None:
            copies.append(len(rest))
            super()._hand_on(rest)

    bodies = []
    frames = FrameReader(lambda *header: Verdict.TAKE, lambda *frame: bodies.append(bytes(frame[4])))
    sender, receiver = writer(), Watched(secrets_of(DIALLER, LISTENER)[0], frames)
    body = random.Random(1).randbytes(3 * PACKET_PLAIN_MAX + 5)
    pieces = [body[at : at + 64 * KIB] for at in range(0, len(body), 64 * KIB)]
    for _ in range(2):
        give(receiver, bytes(sender.seal_pieces([pack_header(Kind.REPLY, 1, 0, len(body)), *pieces])), 50_000)
    assert bodies == [body, body]
    assert copies == []


def test_what_a_transport_keeps_is_not_written_over() -> None:
    sender, first, second = writer(), bytes(300 * KIB), b"\1" * (300 * KIB)
    kept = sender.seal_pieces([first])
    packets.keep()
    again = sender.seal_pieces([second])
    reused = sender.seal_pieces([second])
    assert again.obj is reused.obj, "the memory of what left at once is used again"
    assert kept.obj is not again.obj
    sink = Sink()
    receiver = reader(sink)
    give(receiver, bytes(kept))
    assert sink.taken == first


# --- what does not come out

PLAIN = [b"first", b"the second one", b"3"]


def taken_of(stream: bytes, direction: int = 0) -> tuple[bytes, bool]:
    """What the frames got, and whether an error ended it."""
    sink = Sink()
    receiver = reader(sink, direction)
    try:
        give(receiver, stream)
    except PacketError:
        with pytest.raises(PacketError):  # it stays so
            give(receiver, b"".join(sealed(PLAIN)) * 20_000)
        return bytes(sink.taken), True
    return bytes(sink.taken), False


def test_a_flipped_bit_ends_the_stream_before_the_packet_that_has_it() -> None:
    whole = sealed(PLAIN)
    stream = b"".join(whole)
    ends = [sum(map(len, whole[: number + 1])) for number in range(3)]
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        hit = next(number for number, end in enumerate(ends) if bit // 8 < end)
        taken, ended = taken_of(bytes(damaged))
        assert taken == b"".join(PLAIN[:hit])
        if not ended:  # the length is another, and the stream ends before the packet does
            start = ends[hit] - len(whole[hit])
            assert bit // 8 < start + LENGTH_BYTES
            assert int.from_bytes(damaged[start : start + LENGTH_BYTES], "big") > len(stream) - start - LENGTH_BYTES


@pytest.mark.parametrize(
    ("order", "valid"),
    [
        ((1, 2), 0),
        ((0, 2), 1),
        ((0, 0, 1), 1),
        ((0, 1, 0), 2),
        ((0, 2, 1), 1),
        ((2, 1, 0), 0),
    ],
    ids=["first left out", "second left out", "sent twice at once", "sent again later", "swapped", "backwards"],
)
def test_packets_open_once_and_in_their_order_only(order: tuple[int, ...], valid: int) -> None:
    whole = sealed(PLAIN)
    assert taken_of(b"".join(whole[number] for number in order)) == (b"".join(PLAIN[:valid]), True)


def test_a_packet_that_is_sent_back_to_its_sender_does_not_open() -> None:
    stream = b"".join(sealed(PLAIN))
    assert taken_of(stream, direction=1) == (b"", True)
    assert taken_of(stream) == (b"".join(PLAIN), False)


def test_a_packet_of_another_connection_does_not_open() -> None:
    for other in ((DIALLER, bytes(32)), (bytes(32), LISTENER), (LISTENER, DIALLER)):
        for secrets in secrets_of(*other):
            assert taken_of(bytes(PacketWriter(secrets).seal(b"frames"))) == (b"", True)


def test_of_a_stream_that_was_cut_off_whole_packets_are_taken() -> None:
    whole = sealed(PLAIN)
    stream = b"".join(whole)
    for cut in range(len(stream)):
        complete, at = 0, 0
        while at + len(whole[complete]) <= cut:
            at += len(whole[complete])
            complete += 1
        sink = Sink()
        receiver = reader(sink)
        give(receiver, stream[:cut], 3)
        assert sink.taken == b"".join(PLAIN[:complete])
        assert receiver.mid_packet == (cut > at)


@pytest.mark.parametrize("length", [0, 1, TAG_BYTES, PACKET_PLAIN_MAX + TAG_BYTES + 1, 1 << 24, (1 << 32) - 1])
def test_a_length_out_of_its_bounds_ends_the_stream_as_soon_as_it_is_read(length: int) -> None:
    assert taken_of(length.to_bytes(LENGTH_BYTES, "big")) == (b"", True)


def test_the_frames_get_nothing_more_after_an_error() -> None:
    whole = sealed(PLAIN)
    sink = Sink()
    receiver = reader(sink)
    with pytest.raises(PacketError):
        give(receiver, b"\0\0\0\0")
    for _ in range(3):
        room = receiver.buffer()
        room[: len(whole[0])] = whole[0]
        receiver.received(len(whole[0]))
        receiver.resume()
    assert sink.taken == b""


# --- keys


class Counted:
    """AES-GCM that remembers each key and nonce that it sealed under."""

    used: set[tuple[bytes, bytes]] = set()

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = AESGCM(key)
        self.decrypt_into = self._cipher.decrypt_into

    def _note(self, nonce: bytes) -> None:
        assert (self._key, nonce) not in self.used
        self.used.add((self._key, nonce))

    def encrypt(self, nonce: bytes, data: bytes, length: bytes) -> bytes:
        self._note(nonce)
        return self._cipher.encrypt(nonce, data, length)

    def encrypt_into(self, nonce: bytes, data: bytes, length: bytes, out: memoryview) -> int:
        self._note(nonce)
        return self._cipher.encrypt_into(nonce, data, length, out)


def test_no_key_seals_twice_under_one_nonce_nor_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "AESGCM", Counted)
    monkeypatch.setattr(packets, "PACKETS_A_KEY", 3)
    monkeypatch.setattr(Counted, "used", set())
    for direction in (0, 1):
        sender, sink = writer(direction), Sink()
        receiver = reader(sink, direction)
        for number in range(10):
            give(receiver, bytes(sender.seal(b"%d" % number)))
            give(receiver, bytes(sender.seal_pieces([bytes(JOIN_BYTES), b"x"])))
        assert len(sink.taken) == 10 * (JOIN_BYTES + 2)
    keys = [key for key, _nonce in Counted.used]
    assert len(keys) == 2 * 30
    assert {keys.count(key) for key in keys} == {3}


def test_both_sides_take_the_next_key_after_the_same_packet() -> None:
    sender, sink = writer(), Sink()
    receiver = reader(sink)
    first_key = sender._seal
    for number in range(PACKETS_A_KEY):
        give(receiver, sender.seal(b"%d" % (number % 10)))
    assert sender._seal is first_key
    assert len(sink.taken) == PACKETS_A_KEY
    last = bytes(sender.seal(b"under the next key"))
    assert sender._seal is not first_key
    assert last.hex() == VECTORS["under the second key"][0]["packet"]
    give(receiver, last)
    assert sink.taken.endswith(b"under the next key")
    assert sender._number == receiver._number == 1


# --- vectors


def expanded(secret: bytes, info: bytes, count: int) -> bytes:
    """HKDF-Expand-SHA256 of up to one block, by RFC 5869."""
    return hmac.new(secret, info + b"\1", hashlib.sha256).digest()[:count]


def by_the_description(direction: str, key_number: int, packet_number: int, plain: bytes) -> bytes:
    secret = expanded(
        hmac.new(bytes(32), DIALLER + LISTENER, hashlib.sha256).digest(),
        b"sov.packets.v1\0" + direction.encode(),
        32,
    )
    for _ in range(key_number):
        secret = expanded(secret, b"sov.packets.v1\0next", 32)
    key, mask = expanded(secret, b"sov.packets.v1\0key", 32), expanded(secret, b"sov.packets.v1\0nonces", 12)
    nonce = bytes(a ^ b for a, b in zip(mask, packet_number.to_bytes(12, "big"), strict=True))
    length = (len(plain) + 16).to_bytes(4, "big")
    return length + AESGCM(key).encrypt(nonce, plain, length)


@pytest.mark.parametrize(("direction", "name"), [(0, "dialler"), (1, "listener")])
def test_the_vectors_are_what_the_description_gives_and_the_program_too(direction: int, name: str) -> None:
    assert (VECTORS["D"], VECTORS["L"]) == (DIALLER.hex(), LISTENER.hex())
    assert len(DIALLER) == SECRET_BYTES
    sender = writer(direction)
    for number, vector in enumerate(VECTORS[name]):
        plain = bytes.fromhex(vector["plain"])
        assert by_the_description(name, 0, number, plain).hex() == vector["packet"]
        assert bytes(sender.seal(plain)).hex() == vector["packet"]


def test_the_vector_of_the_second_key_is_what_the_description_gives() -> None:
    for number, vector in enumerate(VECTORS["under the second key"]):
        plain = bytes.fromhex(vector["plain"])
        assert by_the_description("dialler", 1, number, plain).hex() == vector["packet"]
