"""Moves frames over one connection between two nodes; both sides derive from it.

Theory of operation. A connection is plain TCP; a ``Handshake`` makes it secure, and puts a reader and a writer of
encrypted bytes in its own place. Frames come in through them and a FrameReader. Frames go out in one write for all that
a turn of the event loop produced, or for some of them in a long turn. A frame that no other frame is likely to follow
leaves at once (``likely_last_frame``). Frames produced while a read is processed leave at the end of that read. Small
frames (a prepare, a ping, a reply without bulk) are joined and go first. Large bodies follow in slices as the transport
takes them, so that a vote never queues behind many megabytes. The writer encrypts at once what it is given: after the
write the caller's buffers are free.

The transport gives each write to the kernel at once, and asks for a pause as soon as the kernel takes no more. So the
memory into which a slice was encrypted is nearly always free for the next one, and at most one slice waits here.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Any, cast

from storaged.cluster.rpc.framing import FrameError, FrameReader, Hello, Verdict, pack_header
from storaged.cluster.rpc.handshake import Handshake, Reader, Secured, Writer
from storaged.cluster.rpc.packets import keep
from storaged.units import KIB
from storaged.wire import Buffer

SMALL_BODY_BYTES = 16 * KIB
"""Bodies up to this size are copied into the joined write: that is cheaper than a packet and a write of their own."""

URGENT_BODY_BYTES = 256 * KIB
"""The same for bodies that their sender marks as urgent: a batch that many small PUTs share must not wait for
fragments."""

SLICE_BYTES = 256 * KIB
"""Larger bodies are encrypted and written in slices of this size; between two the transport may pause the writer."""

WRITE_BYTES_MAX = SLICE_BYTES + SMALL_BODY_BYTES
"""So that the head of a frame leaves with the first slice of its body."""

EARLY_FRAMES = 32
"""This many small frames leave before the turn of the loop has ended: the peer works on them while this side finishes
its turn."""

ENDED_BY_PEER = "the peer closed the connection"

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_MS = 30_000
"""The kernel notices a peer that vanished without a reset after 11 s when nothing was being sent, after 30 s when
something was. Not sooner: TCP_USER_TIMEOUT counts the time of a closed window too, and a peer with a slow disk may
rightly take nothing for some seconds."""


def measure(body: Sequence[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    """Returns the body's buffers as flat bytes, without empty ones, and their total length."""
    if len(body) == 1 and type(body[0]) is bytes and body[0]:
        return tuple(body), len(body[0])  # the usual case: a copy of a small object
    flat: list[Buffer] = []
    size = 0
    for piece in body:
        if isinstance(piece, memoryview):
            count = piece.nbytes
            if count and (piece.itemsize != 1 or piece.ndim != 1):
                piece = piece.cast("B")
        else:
            count = len(piece)
        if count:
            flat.append(piece)
            size += count
    return tuple(flat), size


class Connection(asyncio.BufferedProtocol):
    """What both sides share. Subclasses decide on frames (``admit``, ``deliver``) and clean up in ``on_closed``.

    Its many attributes are the state of one reader, one writer and their counters; the hot path reads most of them for
    every frame.
    """

    flush_after_read = False
    """This side mostly sends replies to what it just read, so no more frames follow before the next read."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.reader = FrameReader(self.admit, self.deliver)
        self.transport: asyncio.Transport | None = None
        """Set while frames may be sent: from the end of the TLS handshake until the connection is gone."""
        self.secured: asyncio.Future[None] = loop.create_future()
        """Done when TLS has verified the peer, or has failed: then it holds the error."""
        self.certificate = b""
        """The peer's, as TLS verified it (DER)."""
        self.lost = loop.create_future()
        """Done when the connection is gone; it never holds an exception."""
        self.hello: asyncio.Future[Hello] = loop.create_future()
        """How the peer introduced itself."""
        self.reason = ""
        """Why it was closed, when this side knows."""
        self.bytes_in = 0
        self.bytes_out = 0
        """Encrypted, as TCP carries them."""
        self.queued_bytes = 0
        """Bodies that wait for the transport."""
        self.last_read_at = loop.time()
        """When the last bytes arrived, in seconds of the loop's clock."""
        self._tcp: asyncio.Transport | None = None
        """The same transport, as soon as TCP is connected."""
        self._incoming: Reader | None = None
        self._outgoing: Writer | None = None
        self._small: dict[int, bytes] = {}
        self._large: dict[int, tuple[tuple[Buffer, ...], int]] = {}
        self._slices: list[Buffer] = []
        """What is left of the large frame that is being written, last slice first."""
        self._sliced: tuple[int, int] | None = None
        """The id and size of that frame."""
        self._flush_scheduled = False
        self._reading = False
        self._paused = False
        self._paused_since = 0.0

    # What subclasses define.

    def admit(self, kind: int, request_id: int, head_bytes: int, body_bytes: int) -> Verdict:
        raise NotImplementedError

    def deliver(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        raise NotImplementedError

    def drop_frame(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        """An admitted frame arrived after this side had ended the connection."""

    def on_protocol_error(self, error: FrameError) -> None:
        """The peer broke the protocol."""
        self.abort(str(error))

    def on_closed(self) -> None:
        raise NotImplementedError

    def on_sent(self, request_id: int, size: int) -> None:
        """The transport has taken a large body, or the body was dropped."""

    def likely_last_frame(self) -> bool:
        """Whether no other frame is likely to be sent in this turn of the loop."""
        return False

    # The beginning.

    def begin_with(self, context: ssl.SSLContext, dials: str | None = None) -> None:
        """Says how to make the connection secure, before it is made. ``dials``: the node that this side dials."""
        self._incoming = Handshake(
            context, dials, self.reader, self._send_handshake, self.on_secured, lambda: self.close(ENDED_BY_PEER)
        )

    def _send_handshake(self, data: bytes) -> None:
        assert self._tcp is not None
        self._tcp.write(data)

    def on_secured(self, found: Secured) -> None:
        """Frames can be sent, and are received from now on."""
        self._incoming, self._outgoing = found.reader, found.writer
        self.certificate = found.certificate
        self.transport = self._tcp
        if not self.secured.done():
            self.secured.set_result(None)

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._tcp.set_write_buffer_limits(high=0)
        _tune(transport.get_extra_info("socket"))
        if isinstance(self._incoming, Handshake):
            self._incoming.begin()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming.buffer()  # type: ignore[union-attr]

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_in += nbytes
        self.last_read_at = self.loop.time()
        self._reading = True
        try:
            self._incoming.received(nbytes)  # type: ignore[union-attr]
        except FrameError as error:
            self.on_protocol_error(error)
        except ssl.SSLError as error:
            self._on_tls_error(error)
        self._reading = False
        if self._small or self._large:
            self._schedule(now=self.flush_after_read)

    def resume_frames(self) -> None:
        """Goes on with what has arrived, after ``admit`` returned WAIT.

        Any other error ends the connection too. In ``buffer_updated`` the transport does that.
        """
        assert self._incoming is not None
        try:
            self.reader.resume()
            self._incoming.resume()
        except FrameError as error:
            self.on_protocol_error(error)
        except ssl.SSLError as error:
            self._on_tls_error(error)
        except BaseException:
            self.abort("this node failed at what the peer had sent")
            raise

    def _on_tls_error(self, error: ssl.SSLError) -> None:
        self.fail_handshake(error)
        self.close(describe(error))  # not abort: an alert for the peer may have been sent

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.reason:
            self.reason = describe(exc) if exc else ENDED_BY_PEER
        self.transport = self._tcp = None
        self._small.clear()
        for request_id, (_pieces, size) in self._large.items():
            self.on_sent(request_id, size)
        if self._sliced is not None:
            self.on_sent(*self._sliced)
        self._large.clear()
        self._slices.clear()
        self._sliced = None
        self.queued_bytes = 0
        self.on_closed()
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True
        self._paused_since = self.loop.time()

    def resume_writing(self) -> None:
        self._paused = False
        self._schedule()

    # Sending.

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def send(
        self,
        kind: int,
        request_id: int,
        head: bytes,
        body: tuple[Buffer, ...] = (),
        size: int = 0,
        deadline_ms: int = 0,
        small_bytes_max: int = SMALL_BODY_BYTES,
        followed: bool = False,
    ) -> None:
        """Queues a frame; ``body`` and ``size`` are the results of :func:`measure`.

        A frame whose body has at most ``small_bytes_max`` bytes goes before larger ones. ``followed``: another frame is
        likely to be sent in this turn of the loop. Raises ValueError when the frame exceeds the limits.
        """
        header = pack_header(kind, request_id, len(head), size, deadline_ms)
        if self.transport is None:
            if size > small_bytes_max:
                self.on_sent(request_id, size)
            return
        if size <= small_bytes_max:
            small = self._small
            small[request_id] = b"".join((header, head, *body))
            if len(small) >= EARLY_FRAMES:
                self._flush()
                return
        else:
            self._large[request_id] = ((header + head, *body), size)
            self.queued_bytes += size
        self._schedule(followed=followed)

    def withdraw(self, request_id: int) -> bool:
        """Takes back a frame; its buffers are free at once. Returns whether no part of it had left yet."""
        if self._small.pop(request_id, None) is not None:
            return True
        large = self._large.pop(request_id, None)
        if large is not None:
            self.queued_bytes -= large[1]
            self.on_sent(request_id, large[1])
            return True
        if self._sliced is not None and self._sliced[0] == request_id:
            # Half of the body has left. The rest must follow, from a copy: its owner may reuse the memory.
            self._slices = [bytes(piece) for piece in self._slices]
        return False

    def _schedule(self, *, now: bool = False, followed: bool = False) -> None:
        if self._flush_scheduled or self._reading:
            return
        # Not while large bodies wait: several fragments of one block go to a node in one turn.
        if now or (not followed and not self._large and self.likely_last_frame()):
            self._flush()
        else:
            self._flush_scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        transport = self.transport
        if transport is None or self._paused:
            return
        if self._slices:
            self._write_slices(transport)
        while not self._paused and not self._slices:
            joined = b"".join(self._small.values())
            self._small.clear()
            together = self._large and len(joined) <= SMALL_BODY_BYTES
            if joined and not together:
                sealed = self._outgoing.seal(joined)  # type: ignore[union-attr]
                self.bytes_out += len(sealed)
                transport.write(sealed)
                if type(sealed) is memoryview and transport.get_write_buffer_size():
                    keep()
            if self._paused or not self._large:
                break
            request_id = next(iter(self._large))
            pieces, size = self._large.pop(request_id)
            self._slices = [part for piece in reversed(pieces) for part in _slice(piece)]
            if joined and together:  # one write for both: each wakes the peer
                self._slices.append(joined)
            self._sliced = (request_id, size)
            self._write_slices(transport)

    def _write_slices(self, transport: asyncio.Transport) -> None:
        slices = self._slices
        while slices and not self._paused:
            group: list[Buffer] = []
            group_bytes = 0
            while slices and group_bytes + len(slices[-1]) <= WRITE_BYTES_MAX:
                piece = slices.pop()
                group.append(piece)
                group_bytes += len(piece)
            sealed = self._outgoing.seal_pieces(group)  # type: ignore[union-attr]
            self.bytes_out += len(sealed)
            transport.write(sealed)
            if transport.get_write_buffer_size():
                keep()
        if not slices and self._sliced is not None:
            request_id, size = self._sliced
            self._sliced = None
            self.queued_bytes -= size
            self.on_sent(request_id, size)

    # Closing.

    def fail_handshake(self, error: Exception) -> None:
        """No-op once the peer has introduced itself."""
        for waiter in (self.secured, self.hello):
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # marks it as retrieved: it may have no waiter yet

    def abort(self, reason: str) -> None:
        """Ends the connection now; queued frames are lost."""
        self.reader.deliver = self.drop_frame
        if not self.reason:
            self.reason = reason
        if self._tcp is not None:
            self._tcp.abort()

    def close(self, reason: str) -> None:
        """Ends the connection after the transport has sent what it holds."""
        self.reader.deliver = self.drop_frame
        if not self.reason:
            self.reason = reason
        if self._tcp is not None:
            self._tcp.close()

    def stalled_s(self, now: float) -> float:
        """Seconds without progress: a frame is half received, or the transport takes nothing."""
        arriving = not self.reader.waiting and (  # while it waits, this side makes the peer wait
            self.reader.mid_frame or (self._incoming is not None and self._incoming.mid_packet)
        )
        silent = now - self.last_read_at if arriving else 0.0
        blocked = now - self._paused_since if self._paused else 0.0
        return max(silent, blocked)


def _slice(piece: Buffer) -> Sequence[Buffer]:
    """The slices of one buffer, last first."""
    if len(piece) <= SLICE_BYTES:
        return [piece]
    view = memoryview(piece)
    return [view[start : start + SLICE_BYTES] for start in range(0, len(view), SLICE_BYTES)][::-1]


def _tune(raw: Any) -> None:
    """Sends small frames without delay, and lets the kernel notice a vanished peer."""
    if raw is None:
        return
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
    ):
        if hasattr(socket, option):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def describe(error: BaseException) -> str:
    """One line for the log, without the source lines that OpenSSL adds."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not of this cluster's authority, or not valid now ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = str(error)
    return text if text else type(error).__name__
