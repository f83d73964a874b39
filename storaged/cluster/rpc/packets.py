"""Packets: what carries frames between two nodes that both know them. Pure: bytes in, bytes out.

::

    0   4      N, the bytes that follow (big-endian), 17 to 262160
    4   N - 16  ciphertext: bytes of the stream of frames, in their order
        16     tag

Theory of operation. TLS 1.3 makes the connection: it checks both certificates, and its own encryption carries nothing
but 32 random bytes from each side (``handshake``). Both secrets give the keys of both directions. From then on frames
travel in packets. QUIC divides the work in the same way (RFC 9001). The reason is speed: a record of TLS has 16 KiB at
most, and is copied through the buffers of two libraries at each end. A packet has up to 256 KiB, is sealed from the
memory where the body is, and is opened into the memory where the body shall be, each by one call of AES-256-GCM.

A packet is sealed under the key of its direction; its nonce is a secret of the direction XOR the packet's number. The
numbers are not sent. So a packet that is altered, left out, sent twice, sent in another order or sent back does not
open, and the first packet that does not open ends the connection. The reader hands no byte of a packet on before its
tag has been checked.

After ``PACKETS_A_KEY`` packets both sides derive the next keys, and forget the last ones. So one key seals at most 2^32
blocks of 16 bytes. TLS 1.3 allows 2^34.5 for AES-GCM (RFC 8446, 5.5), QUIC 2^33 (RFC 9001, 6.6 and B.1.1): with 2^32
the advantage of somebody who looks for differences to random bytes is below 2^-64. What may be forged has no limit of
its own, because one failed try ends the connection.

A small frame costs about as much as with TLS, so both directions are written for few steps of Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from storaged.cluster.rpc.framing import FrameError
from storaged.units import KIB
from storaged.wire import Buffer

LABEL: Final = b"sov.packets.v1"
SECRET_BYTES: Final = 32
"""What each side contributes."""

LENGTH_BYTES: Final = 4
TAG_BYTES: Final = 16
PACKET_PLAIN_MAX: Final = 256 * KIB
"""Larger packets gain nothing: a byte then costs what the cipher alone costs, and both ends should stay in the cache
of their processors."""

PACKETS_A_KEY: Final = 2**18

_LENGTH_MIN: Final = TAG_BYTES + 1
_LENGTH_MAX: Final = PACKET_PLAIN_MAX + TAG_BYTES
_OVERHEAD: Final = LENGTH_BYTES + TAG_BYTES

JOIN_BYTES: Final = 16 * KIB
"""Pieces below this size share a packet: to copy one is cheaper than a packet of its own."""

_LARGE_BYTES: Final = 32 * KIB
"""While a packet of this size is being received, no more than its end is asked for, so that nothing of the next one has
to be moved."""

_OUT_BYTES: Final = PACKET_PLAIN_MAX + 32 * KIB
_NONCE_BYTES: Final = 12
_shared = threading.local()
"""``out``: where the large packets of a thread's connections are sealed. It stays in the processor's cache, and no
connection keeps memory of its own for them."""


class PacketError(FrameError):
    """The peer, or somebody on the way, broke the protocol of packets; the connection must end."""


class Frames(Protocol):
    """Where the reader puts what it has opened: a ``FrameReader``."""

    waiting: bool

    def buffer(self) -> memoryview: ...
    def received(self, count: int) -> None: ...


class _Ended:
    """In the place of the frames after an error: it waits for ever."""

    waiting = True

    def buffer(self) -> memoryview:
        raise AssertionError

    def received(self, count: int) -> None:
        raise AssertionError


_ENDED: Final = _Ended()


class Secrets:
    """The secret of one direction, from which its keys come."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def next_key(self) -> tuple[AESGCM, int]:
        """The cipher and the nonces' secret of the next key. The secret before it is forgotten."""
        key, nonces = _expand(self._secret, b"key", 32), _expand(self._secret, b"nonces", _NONCE_BYTES)
        self._secret = _expand(self._secret, b"next", 32)
        return AESGCM(key), int.from_bytes(nonces, "big")


def secrets_of(dialler: bytes, listener: bytes) -> tuple[Secrets, Secrets]:
    """The secrets of both directions: of what the dialling side sends, and of what the listening side sends.

    ``dialler`` and ``listener`` are what each has contributed, each of ``SECRET_BYTES``.
    """
    assert len(dialler) == len(listener) == SECRET_BYTES
    return (
        Secrets(_derive(dialler + listener, b"dialler")),
        Secrets(_derive(dialler + listener, b"listener")),
    )


def _derive(shared: bytes, direction: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, None, LABEL + b"\0" + direction).derive(shared)


def _expand(secret: bytes, purpose: bytes, count: int) -> bytes:
    return HKDFExpand(hashes.SHA256(), count, LABEL + b"\0" + purpose).derive(secret)


class PacketWriter:
    """Seals what one side sends. After each call, the caller's buffers are free."""

    __slots__ = ("_nonces", "_number", "_seal", "_seal_into", "_secrets")

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._turn()

    def _turn(self) -> None:
        cipher, self._nonces = self._secrets.next_key()
        self._seal, self._seal_into = cipher.encrypt, cipher.encrypt_into
        self._number = 0

    def seal(self, data: bytes) -> Buffer:
        """The packets for a run of frames. What this returns is valid until the next call for any connection of this
        thread (:func:`keep`).
        """
        size = len(data)
        if size > JOIN_BYTES:
            return self.seal_pieces((data,))
        number = self._number
        if number == PACKETS_A_KEY:
            self._turn()
            number = 0
        self._number = number + 1
        length = (size + TAG_BYTES).to_bytes(LENGTH_BYTES, "big")
        return length + self._seal((self._nonces ^ number).to_bytes(_NONCE_BYTES, "big"), data, length)

    def seal_pieces(self, pieces: Sequence[Buffer]) -> memoryview:
        """The packets for large pieces, none of them empty: a packet for each, small neighbours together. Valid as
        :meth:`seal` says.
        """
        plain = _packets_of(pieces)
        total = sum(map(len, plain)) + _OVERHEAD * len(plain)
        out = _out(total)
        start = 0
        for data in plain:
            if self._number == PACKETS_A_KEY:
                self._turn()
            inner = len(data) + TAG_BYTES
            length = inner.to_bytes(LENGTH_BYTES, "big")
            begin = start + LENGTH_BYTES
            end = begin + inner
            out[start:begin] = length
            nonce = (self._nonces ^ self._number).to_bytes(_NONCE_BYTES, "big")
            self._number += 1
            self._seal_into(nonce, data, length, out[begin:end])
            start = end
        return out[:total]


def keep() -> None:
    """What :meth:`PacketWriter.seal_pieces` returned last in this thread stays valid: a transport holds it."""
    _shared.out = None


def _out(size: int) -> memoryview:
    found: memoryview | None = getattr(_shared, "out", None)
    if found is None or len(found) < size:
        found = _shared.out = memoryview(bytearray(max(size, _OUT_BYTES)))
    return found


def _packets_of(pieces: Sequence[Buffer]) -> list[Buffer]:
    """The plaintext of each packet."""
    found: list[Buffer] = []
    small: list[Buffer] = []
    for piece in pieces:
        size = len(piece)
        if size < JOIN_BYTES:
            small.append(piece)
            continue
        if small:
            _join(small, found)
        if size <= PACKET_PLAIN_MAX:
            found.append(piece)
        else:
            view = memoryview(piece)
            found += [view[at : at + PACKET_PLAIN_MAX] for at in range(0, size, PACKET_PLAIN_MAX)]
    if small:
        _join(small, found)
    return found


def _join(small: list[Buffer], found: list[Buffer]) -> None:
    """Moves small pieces into packets of their own."""
    joined = small[0] if len(small) == 1 else b"".join(small)
    found += [joined[at : at + PACKET_PLAIN_MAX] for at in range(0, len(joined), PACKET_PLAIN_MAX)]
    small.clear()


class PacketReader:
    """Opens what one side receives, straight into the memory of its frames. Not thread-safe.

    It serves a BufferedProtocol, as a FrameReader does: ``buffer`` says where the next bytes go, ``received`` takes
    them. While ``frames.waiting`` nothing is opened, until :meth:`resume`.
    """

    __slots__ = (
        "_end",
        "_frames",
        "_nonces",
        "_number",
        "_open_into",
        "_plain",
        "_rest",
        "_secrets",
        "_start",
        "_view",
        "_wanted",
    )

    def __init__(self, secrets: Secrets, frames: Frames) -> None:
        self._secrets = secrets
        self._frames = frames
        self._view = memoryview(bytearray(PACKET_PLAIN_MAX + _OVERHEAD + LENGTH_BYTES))
        self._start = 0
        self._end = 0
        self._wanted = 0
        """Bytes of the packet that has begun to arrive; 0 when that is not known."""
        self._plain: memoryview | None = None
        """Where a packet is opened that does not fit into the frames' buffer: it has the end of a body and more."""
        self._rest: memoryview | None = None
        """What the frames have not taken of it yet."""
        self._turn()

    def _turn(self) -> None:
        cipher, self._nonces = self._secrets.next_key()
        self._open_into: Callable[[bytes, Buffer, Buffer, Buffer], object] = cipher.decrypt_into
        self._number = 0

    @property
    def mid_packet(self) -> bool:
        """Whether part of a packet has arrived and the rest has not."""
        return self._end > self._start

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Raises PacketError when the peer's bytes arrive although reading is
        paused.
        """
        start, end, view, wanted = self._start, self._end, self._view, self._wanted
        if start == end:
            self._start = self._end = 0
            return view
        stop = start + wanted + LENGTH_BYTES
        if wanted < _LARGE_BYTES or stop > len(view):
            if start:  # only the last part of a read is moved
                left = end - start
                view[:left] = view[start:end]
                self._start, self._end = 0, left
                end, stop = left, wanted + LENGTH_BYTES
            if wanted < _LARGE_BYTES:
                stop = len(view)
        if end >= stop:
            raise PacketError("bytes arrived although reading is paused")
        return view[end:stop]

    def received(self, count: int) -> None:
        """Takes ``count`` bytes that were put into the last :meth:`buffer`, and hands on what can be opened.

        Raises PacketError, and what ``frames.received`` raises; afterwards it opens nothing any more.
        """
        view, frames, start, wanted = self._view, self._frames, self._start, 0
        end = self._end = self._end + count
        try:
            while not frames.waiting and (begin := start + LENGTH_BYTES) <= end:
                length = view[start:begin]
                inner = int.from_bytes(length, "big")
                if not _LENGTH_MIN <= inner <= _LENGTH_MAX:
                    raise PacketError(f"a packet of {inner} bytes is not one of {_LENGTH_MIN} to {_LENGTH_MAX}")
                stop = begin + inner
                if stop > end:
                    wanted = LENGTH_BYTES + inner
                    break
                number = self._number
                if number == PACKETS_A_KEY:
                    self._turn()
                    number = 0
                size = inner - TAG_BYTES
                room = frames.buffer()
                fits = size <= len(room)
                if not fits:
                    room = self._room()
                nonce = (self._nonces ^ number).to_bytes(_NONCE_BYTES, "big")
                try:
                    self._open_into(nonce, view[begin:stop], length, room[:size])
                except InvalidTag:
                    raise PacketError("a packet is not what the peer has sealed, or not the next one") from None
                self._number = number + 1
                start = self._start = stop
                if fits:
                    frames.received(size)
                else:
                    self._hand_on(room[:size])
        except BaseException:
            self._frames = _ENDED
            raise
        self._wanted = wanted

    def resume(self) -> None:
        """Goes on with what has arrived, once the frames wait no more. Raises as :meth:`received` does."""
        rest, self._rest = self._rest, None
        if rest is not None:
            self._hand_on(rest)
        self.received(0)

    def _room(self) -> memoryview:
        if self._plain is None:
            self._plain = memoryview(bytearray(PACKET_PLAIN_MAX))
        return self._plain

    def _hand_on(self, rest: memoryview) -> None:
        """Copies opened bytes to the frames, until these wait."""
        frames = self._frames
        while rest:
            if frames.waiting:
                self._rest = rest
                return
            room = frames.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            rest = rest[count:]
            frames.received(count)
