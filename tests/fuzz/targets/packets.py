"""What strangers may send to a node that listens, and what somebody on the way may make of packets."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from storaged.cluster import issuing, tls
from storaged.cluster.rpc import packets
from storaged.cluster.rpc.handshake import Handshake, Secured, offer_packets
from storaged.cluster.rpc.packets import (
    LENGTH_BYTES,
    PACKET_PLAIN_MAX,
    TAG_BYTES,
    PacketError,
    PacketReader,
    secrets_of,
)
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, cut
from tests.worlds.receiving import feed

SEALED_MAX = 16
SECRETS = bytes(32), b"L" * 32

FEW_A_KEY = Plant(packets, "PACKETS_A_KEY", lambda _: 3)
"""So that an input of some packets has all of their keys' ends in it."""


class _Frames:
    """Takes ``room`` bytes at a time, and waits after each ``pause`` bytes."""

    def __init__(self, room: int, pause: int) -> None:
        self.waiting = False
        self.taken = bytearray()
        self._pause = pause
        self._memory = memoryview(bytearray(room))

    def buffer(self) -> memoryview:
        return self._memory

    def received(self, count: int) -> None:
        assert not self.waiting, "it was given bytes although it waits"
        before = len(self.taken)
        self.taken += self._memory[:count]
        self.waiting = len(self.taken) // self._pause > before // self._pause


def packets_on_the_way(data: bytes) -> None:
    """Whatever is done to a stream of packets, and however it is cut, the frames get what the whole packets had that
    come before the first change, in their order. At the first one that is not the next, an error ends it.
    """
    choices = Choices(data)
    step, room, pause = choices.pick((4000, 1, 5, 300)), choices.pick((9000, 7, 100)), choices.pick((1 << 30, 50, 700))
    with FEW_A_KEY.planted():
        plain, honest, stream = _built(choices)
        frames = _Frames(room, pause)
        reader = PacketReader(secrets_of(*SECRETS)[0], frames)
        try:
            _give(reader, frames, stream, step)
            ended = False
        except PacketError:
            ended = True
    whole = at = 0
    while whole < len(honest) and stream.startswith(honest[whole], at):
        at += len(honest[whole])
        whole += 1
    assert frames.taken == b"".join(plain[:whole])
    assert ended == _is_broken(stream[at:])
    assert ended or reader.mid_packet == (at < len(stream))


def _built(choices: Choices) -> tuple[list[bytes], list[bytes], bytes]:
    """What was sealed, its packets, and what arrives."""
    writer = packets.PacketWriter(secrets_of(*SECRETS)[0])
    plain: list[bytes] = []
    honest: list[bytes] = []
    stream: list[bytes] = []
    changes: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: stream.append(stream[choices.number(len(stream))]),
        lambda: stream.pop(choices.number(len(stream))),
        lambda: stream.insert(choices.number(len(stream)), stream.pop()),
        lambda: stream.append(choices.line()),
        lambda: stream.append(_flipped(stream.pop(), choices.number(65_536))),
        lambda: stream.append(stream.pop()[: choices.number(300)]),
    )
    while choices.left:
        if len(honest) < SEALED_MAX:
            plain.append(bytes((len(honest) + 65,)) * (1 + choices.number(1500)))
            honest.append(bytes(writer.seal(plain[-1])))
            stream.append(honest[-1])
        change = choices.pick(changes)
        if stream:
            change()
    return plain, honest, b"".join(stream)


def _flipped(packet: bytes, number: int) -> bytes:
    changed = bytearray(packet)
    if changed:
        changed[number // 8 % len(changed)] ^= 1 << number % 8
    return bytes(changed)


def _give(reader: PacketReader, frames: _Frames, stream: bytes, step: int) -> None:
    def resume() -> None:
        while frames.waiting:
            frames.waiting = False
            reader.resume()

    for piece in cut(stream, step):
        feed(reader, piece, resume)


def _is_broken(rest: bytes) -> bool:
    """Whether a stream must end at ``rest``, which does not begin with the next packet."""
    if len(rest) < LENGTH_BYTES:
        return False
    size = int.from_bytes(rest[:LENGTH_BYTES], "big")
    return not TAG_BYTES < size <= PACKET_PLAIN_MAX + TAG_BYTES or len(rest) >= LENGTH_BYTES + size


def _forgetful(self: PacketReader) -> None:
    self._rest = None
    self.received(0)


@cache
def _context() -> ssl.SSLContext:
    """Of a node that listens."""
    with tempfile.TemporaryDirectory(prefix="storaged-fuzz-") as folder:
        authority = issuing.create_authority(Path(folder) / "authority", "c1")
        own = issuing.issue(authority, Path(folder) / "n1", name="n1", location="FR/par1/a", roles=("storage",))
        context = tls.server_context(own)
    offer_packets(context)
    return context


def opening(data: bytes) -> None:
    """Whatever a stranger without a certificate sends first, it gets no further than the handshake. What is no TLS
    ends the connection. However the bytes are cut, the end is the same.
    """
    choices = Choices(data)
    step, stream = choices.pick((1, 5, 300)), choices.rest()
    whole = _opened(stream, 1 << 30)
    assert _opened(stream, step) == whole
    if len(stream) >= TLS_HEADER_BYTES and (stream[0] not in (20, 21, 22, 23) or stream[1] != 3):
        assert whole, "it is no record of TLS, and was taken"


TLS_HEADER_BYTES = 5


def _opened(stream: bytes, step: int) -> bool:
    """Whether an error ended it."""

    def secured(_found: Secured) -> None:
        raise AssertionError("a stranger got in")

    side = Handshake(_context(), None, _Frames(100, 1 << 30), lambda data: None, secured, lambda: None)
    side.begin()
    try:
        for piece in cut(stream, step):
            feed(side, piece)
    except (ssl.SSLError, PacketError):
        return True
    return False


HELLO = bytes.fromhex(
    "16030100fc010000f80303c2cb996c75f1dc405e658c9dab447c62e88e8c1f94efa84392b2b2f4b82b6ec620d103bbf7c7022ccad6ef00ca75"
    "1c52fc71833151faab56cd53b9d8e8fc223867000813021303130100ff010000a70000000700050000026e31000b000403000102000a001600"
    "14001d0017001e00190018010001010102010301040010001500131273746f72616765642d7061636b6574732f310016000000170000000d00"
    "1e001c040305030603080708080809080a080b080408050806040105010601002b0003020304002d00020101003300260024001d0020c6c59c"
    "5cd67ee08576fbbd7a4cbf7b164b2a35fdee3d6229806e6c310e58be02"
)
"""The first message of a node that dials."""


TARGETS = (
    Target(
        "opening",
        opening,
        (
            b"\x00" + HELLO,
            b"\x01" + HELLO + b"\x14\x03\x03\x00\x01\x01" + b"\x17\x03\x03\x00\x20" + bytes(32),
            b"\x02" + HELLO[:5] + b"\x40\x00" + HELLO[5:],
            b"\x02GET / HTTP/1.1\r\n\r\n",
            b"\x01\x15\x03\x03\x00\x02\x02\x28",
            b"\x00\x16\x03\x01\x40\x00",
        ),
        Plant(Handshake, "_record_bytes", lambda _: lambda self, start, end: 0),
        (b"\x16\x03\x01", b"\x17\x03\x03", HELLO[-50:], b"storaged-packets/1"),
        size_max=1024,
        steps=4_000,
        steps_a_byte=120,
        peak_bytes=1 << 20,
    ),
    Target(
        "packets",
        packets_on_the_way,
        (
            b"\x00\x00\x00" + b"\x00\x10\x00" * 8,
            b"\x01\x01\x01" + b"\x00\x80\x00\x01\x00\x00\x00\x10\x05\x01\x07",
            b"\x02\x02\x02" + b"\x04\x00\x00" * 4 + b"\x00\x09\x02\x00" + b"\x00\x09\x03\x01",
            b"\x03\x00\x01" + b"\x02\x00\x01\x00" + b"\x00\x09\x04\x00\x00\x00\x11x\n",
            b"\x00\x01\x02" + b"\x05\x00\x06\x50",
        ),
        Plant(PacketReader, "resume", lambda _: _forgetful),
        (b"\x00\x00\x00\x11", b"\xff\xff\xff\xff", b"\x00\x04\x00\x10"),
        size_max=512,
        steps=40_000,
        steps_a_byte=4_000,
        peak_bytes=2 << 20,
    ),
)
