"""How a connection between two nodes begins: mutual TLS 1.3, and what carries the frames afterwards.

Theory of operation. TLS is driven here, over a plain TCP transport, because only its beginning is needed. Both sides
name ``PACKETS`` by ALPN, which TLS authenticates. Where both did, each sends ``SECRET_BYTES`` random bytes, in one
record of TLS and as the only data in it; the bytes that follow on the wire are packets (``packets``). TLS protects the
secrets: only the two nodes know them, and a node's private key that is stolen later does not reveal them. (Python has
no exporter of TLS, which would make them unnecessary.) A peer of version 0.1.0 names no protocol. Then TLS carries the
frames, as it did there: ``TlsReader`` and ``TlsWriter``. That is slower, and ends with the rolling upgrade.

What arrives is given to TLS record by record. So TLS never takes a byte that belongs to the packets, whatever it reads
ahead. A stranger gets here: until the peer's certificate has been verified, it can make this node hold one record, and
send at most ``HANDSHAKE_WIRE_BYTES_MAX``.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from storaged.cluster.rpc.packets import SECRET_BYTES, Frames, PacketError, PacketReader, PacketWriter, secrets_of
from storaged.ids import system_entropy
from storaged.units import KIB
from storaged.wire import Buffer

PACKETS: Final = "storaged-packets/1"

HANDSHAKE_WIRE_BYTES_MAX: Final = 64 * KIB
"""What one side may send in TLS. A handshake with certificates of this cluster has 2 KiB."""

_RECORD_HEADER_BYTES: Final = 5
_RECORD_BYTES_MAX: Final = _RECORD_HEADER_BYTES + 16 * KIB + 256
_CONTENT_TYPES: Final = (20, 21, 22, 23)
_READ_BYTES: Final = 64 * KIB
_ANSWERS_BYTES_MAX: Final = 16 * KIB
"""TLS answers each KeyUpdate with 27 bytes. They leave with the next frame."""


class Reader(Protocol):
    """Takes the bytes of a connection, as a BufferedProtocol receives them."""

    @property
    def mid_packet(self) -> bool: ...
    def buffer(self) -> memoryview: ...
    def received(self, count: int) -> None: ...
    def resume(self) -> None: ...


class Writer(Protocol):
    """Turns frames into the bytes of a connection."""

    def seal(self, data: bytes) -> Buffer: ...
    def seal_pieces(self, pieces: Sequence[Buffer]) -> Buffer: ...


@dataclass(frozen=True, slots=True)
class Secured:
    """A connection whose peer TLS has verified. ``certificate``: the peer's (DER)."""

    certificate: bytes
    reader: Reader
    writer: Writer


def offer_packets(context: ssl.SSLContext) -> None:
    """Handshakes on ``context`` name the protocol of packets."""
    context.set_alpn_protocols([PACKETS])


class Handshake:
    """One side of a handshake. ``dials``: the name of the node that this side dials; None on the side that listens.

    It sends through ``send``, and calls ``done`` once. ``ended`` is for peers of version 0.1.0: it is called when such
    a peer has closed its direction of TLS. The peer then waits until this side closes the other direction.
    """

    mid_packet = False

    def __init__(
        self,
        context: ssl.SSLContext,
        dials: str | None,
        frames: Frames,
        send: Callable[[bytes], object],
        done: Callable[[Secured], object],
        ended: Callable[[], object],
    ) -> None:
        self._to_tls, self._from_tls = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._to_tls, self._from_tls, server_side=dials is None, server_hostname=dials)
        self._dials = dials is not None
        self._frames = frames
        self._send = send
        self._done = done
        self._ended = ended
        self._view = memoryview(bytearray(_RECORD_BYTES_MAX))
        self._end = 0
        self._taken = 0
        """Bytes that TLS has been given."""
        self._secret = b""
        """What this side has contributed; empty until the peer's certificate has been verified."""

    def begin(self) -> None:
        """To be called when TCP is connected. The side that dials speaks first."""
        self._go_on()

    def buffer(self) -> memoryview:
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """Takes ``count`` bytes that were put into :meth:`buffer`.

        Raises PacketError, or ssl.SSLError after it has sent an alert to the peer.
        """
        self._end += count
        start, end = 0, self._end
        secured: Secured | None = None
        while secured is None and (size := self._record_bytes(start, end)):
            secured = self._take(start, size)
            start += size
        rest = bytes(self._view[start:end])
        if secured is None:
            self._view[: len(rest)] = rest
            self._end = len(rest)
            return
        self._done(secured)
        _pass_on(rest, secured.reader)

    def resume(self) -> None:
        """No frame has been handed on yet."""

    def _record_bytes(self, start: int, end: int) -> int:
        """The size of the record of TLS at ``start``; 0 while it has not arrived. Raises as :meth:`received` does."""
        if end - start < _RECORD_HEADER_BYTES:
            return 0
        kind, major, _minor, high, low = self._view[start : start + _RECORD_HEADER_BYTES]
        size = _RECORD_HEADER_BYTES + (high << 8) + low
        if kind not in _CONTENT_TYPES or major != 3 or size > _RECORD_BYTES_MAX:
            self._take(start, end - start)  # mostly TLS knows what is wrong, and sends an alert
            raise PacketError("what arrived is no record of TLS")
        return size if size <= end - start else 0

    def _take(self, start: int, size: int) -> Secured | None:
        """Gives these bytes to TLS."""
        self._taken += size
        if self._taken > HANDSHAKE_WIRE_BYTES_MAX:
            raise PacketError(f"a handshake of more than {HANDSHAKE_WIRE_BYTES_MAX} bytes")
        self._to_tls.write(self._view[start : start + size])
        return self._go_on()

    def _go_on(self) -> Secured | None:
        try:
            return self._step()
        except ssl.SSLWantReadError:
            return None
        finally:
            if self._from_tls.pending:
                self._send(self._from_tls.read())

    def _step(self) -> Secured | None:
        tls = self._tls
        if not self._secret:
            tls.do_handshake()
            if tls.selected_alpn_protocol() != PACKETS:
                return self._secured(
                    TlsReader(tls, self._to_tls, self._from_tls, self._frames, self._ended),
                    TlsWriter(tls, self._from_tls),
                )
            self._secret = system_entropy(SECRET_BYTES)
            tls.write(self._secret)
        secret = tls.read(SECRET_BYTES + 1)
        if len(secret) != SECRET_BYTES:
            raise PacketError(f"the peer sent {len(secret)} bytes in the place of its secret")
        if self._dials:
            ours, theirs = secrets_of(self._secret, secret)
        else:
            theirs, ours = secrets_of(secret, self._secret)
        return self._secured(PacketReader(theirs, self._frames), PacketWriter(ours))

    def _secured(self, reader: Reader, writer: Writer) -> Secured:
        return Secured(self._tls.getpeercert(binary_form=True) or b"", reader, writer)


def _pass_on(data: bytes, reader: Reader) -> None:
    """Gives the reader what arrived after the handshake."""
    while data:
        room = reader.buffer()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        data = data[count:]
        reader.received(count)


class TlsReader:
    """Reads frames out of the records of TLS, from a peer that knows no packets."""

    mid_packet = False

    def __init__(
        self,
        tls: ssl.SSLObject,
        to_tls: ssl.MemoryBIO,
        from_tls: ssl.MemoryBIO,
        frames: Frames,
        ended: Callable[[], object],
    ) -> None:
        self._ended = ended
        self._tls = tls
        self._to_tls = to_tls
        self._from_tls = from_tls
        self._frames = frames
        self._view = memoryview(bytearray(_READ_BYTES))

    def buffer(self) -> memoryview:
        return self._view

    def received(self, count: int) -> None:
        """Takes ``count`` bytes that were put into :meth:`buffer`. Raises ssl.SSLError, and what the frames raise."""
        self._to_tls.write(self._view[:count])
        self.resume()
        if self._from_tls.pending > _ANSWERS_BYTES_MAX:
            raise PacketError("the peer asks TLS for new keys again and again")

    def resume(self) -> None:
        """Goes on with what has arrived, once the frames wait no more. Raises as :meth:`received` does."""
        frames = self._frames
        try:
            while not frames.waiting:
                room = frames.buffer()
                count: int = self._tls.read(len(room), room)  # type: ignore[assignment]
                if not count:
                    self._ended()
                    return
                frames.received(count)
        except ssl.SSLWantReadError:
            pass


class TlsWriter:
    """Puts frames into records of TLS: for a peer that knows no packets."""

    def __init__(self, tls: ssl.SSLObject, from_tls: ssl.MemoryBIO) -> None:
        self._tls = tls
        self._from_tls = from_tls

    def seal(self, data: bytes) -> Buffer:
        return self.seal_pieces((data,))

    def seal_pieces(self, pieces: Sequence[Buffer]) -> Buffer:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[self._tls.write(rest) :]
        return self._from_tls.read()
