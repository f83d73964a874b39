"""One connection of a client: bytes in and out of a socket, one request after the other, with back-pressure.

Theory of operation. A connection is a protocol of the event loop, and one task that lives as long as the connection.
The loop's callbacks put bytes where they belong (a head, or the body of the request that is being answered) and wake
the task only when it has something to do. So a small request costs one wake-up. Many cost none: the callbacks first
offer a complete head to ``Owner.try_begin``. If that takes the request, it answers it by callbacks, and ends with
``answered``, or with ``hand_over`` to the task. The body of such a request is fed as always; ``when_whole`` reports
that all of it has arrived.

All connections receive into one scratch buffer, from which a head is copied at once. Only a large body is received
straight into its reader's memory (``body.RequestBody.fill``). Bytes that arrive while no one reads are kept up to
``Limits.read_buffer_bytes``; then the socket is no longer read.

The transport keeps no written bytes unless the socket is full: its high-water mark is the lowest, so that a buffer may
be reused after ``drain``.

Time limits: see ``progress`` and ``connections``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

from storaged import trace
from storaged.errors import IncompleteBody, RequestTimeout
from storaged.s3.http.body_input import BodyInput
from storaged.s3.http.grammar import HEAD_END, broken_so_far
from storaged.s3.http.limits import Limits
from storaged.s3.http.progress import BODY, HEAD, SEND, Progress
from storaged.s3.http.unauthenticated import UnauthenticatedClient, UnauthenticatedClients
from storaged.wire import Buffer

log = logging.getLogger("storaged.s3")

_TCP_INFO = getattr(socket, "TCP_INFO", None)
_BYTES_ACKED = slice(120, 128)
"""``tcpi_bytes_acked`` in Linux's ``struct tcp_info`` (linux/tcp.h)."""


class Owner(Protocol):
    """What a connection needs of the set that it belongs to (``connections.Connections``)."""

    limits: Limits
    scratch: memoryview
    unauthenticated: UnauthenticatedClients
    try_begin: Callable[[Connection, bytes, int], bool] | None
    requests_in_flight: int
    whole_bytes: int

    def admit(self, connection: Connection) -> bool: ...

    def begin(self, connection: Connection) -> None: ...

    def forget(self, connection: Connection) -> None: ...

    def take_place(self) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One client. Its task calls ``next_head``, reads the body, and writes the answer.

    It has more than 25 public methods because the event loop prescribes seven of them.
    """

    __slots__ = (
        "_answering", "_body", "_client", "_ended", "_handed_over", "_has_place", "_head_waiter", "_input", "_owner",
        "_reading_paused", "_whole_bytes", "_write_waiter", "_yielded", "first_byte_ns", "lost", "paused", "progress",
        "remote", "secure", "transport",
    )  # fmt: skip

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._input = b""
        self._body: BodyInput | None = None
        self._head_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None
        self._yielded = False
        """The loop has run since the last request."""
        self._reading_paused = False
        self._ended = False
        """The client sends no more."""
        self._answering = False
        """Callbacks answer a request; the task waits."""
        self._handed_over: object | None = None
        """The request that callbacks began and left to the task."""
        self._has_place = False
        """The current request is authenticated, and counts as in flight."""
        self._whole_bytes = 0
        """Memory that the current request's body has of what such bodies may have together."""
        self._client: UnauthenticatedClient | None = None
        """None once the first request is authenticated."""
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.remote = ""
        self.secure = False
        self.lost = False
        self.paused = False
        """The transport could not write everything; see ``drain``."""
        self.first_byte_ns = 0
        """When spans are on: the time of a request's first byte (``time.perf_counter_ns``); 0 between requests."""
        self.progress = Progress()

    # --- callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.remote = peer[0] if isinstance(peer, tuple) else ""
        if not self._owner.admit(self):
            self.lost = True
            self.transport.abort()
            return
        self._client = self._owner.unauthenticated.add(self, self.remote)
        self.secure = transport.get_extra_info("ssl_object") is not None
        # TLS has copied what it encrypted; with a limit of 0 it would pause for ever at an empty buffer
        self.transport.set_write_buffer_limits(high=1 if self.secure else 0)
        self._owner.begin(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        body = self._body
        return self._owner.scratch if body is None or body.destination is None else body.destination

    def buffer_updated(self, nbytes: int) -> None:
        if trace.on and not self.first_byte_ns:
            self.first_byte_ns = time.perf_counter_ns()
        body = self._body
        if body is None:
            self._on_head(bytes(self._owner.scratch[:nbytes]))
        elif body.destination is not None:
            body.received(nbytes)
            if body.on_whole is not None and body.complete:
                body.report_whole()
        else:
            body.feed(bytes(self._owner.scratch[:nbytes]))
            if body.on_whole is not None and (body.complete or self._reading_paused):
                body.report_whole()
        if self._client is not None:
            body = self._body
            self._client.keep(len(self._input) + (body.held_bytes if body is not None else 0))

    def eof_received(self) -> bool:
        """The client sends no more. It may still want the answers of requests under way: then the transport stays
        open."""
        self._ended = True
        if self._body is not None:
            self._body.fail(IncompleteBody())
        if self.idle:
            self._wake(self._head_waiter)
            return False
        return not self.secure

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self._ended = True
        if self._body is not None:
            self._body.fail(IncompleteBody())
        if self._answering:
            self._input = b""  # these requests can't be answered, and must not overtake the one under way
        self._wake(self._head_waiter)
        if self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_exception(ConnectionResetError("The client has gone."))
        self._authenticated_or_gone()
        self._owner.forget(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._wake(self._write_waiter)

    # --- requests that callbacks answer

    def _on_head(self, data: bytes) -> None:
        waiter = self._head_waiter
        awaited = self.idle
        seen = len(self._input)
        if not seen:
            self.progress.steps += 1  # the first bytes of a head: the time for the rest of it begins
        else:
            data = self._input + data
        self._input = data
        if awaited:
            end = data.find(HEAD_END, max(seen - 3, 0))
            if end >= 0 or broken_so_far(data, self._owner.limits, seen):
                if end < 0 or not self._try_begin(data, end):
                    self._wake(waiter)
                awaited = False
        if not awaited and len(self._input) > self._owner.limits.read_buffer_bytes:
            self.pause_reading()  # also before the task has run: one readiness of the socket may bring dozens of reads

    def _try_begin(self, data: bytes, end: int) -> bool:
        """Whether callbacks take the request whose head ends at ``end`` of ``data``, which is all that has arrived."""
        begin = self._owner.try_begin
        if begin is None:
            return False
        self._answering = True
        self._input = data[end + len(HEAD_END) :]
        self.progress.work()
        if begin(self, data[:end], len(self._input)):
            return True
        self._answering = False
        self._input = data
        self.progress.phase = HEAD
        return False

    def when_whole(self, body: BodyInput, then: Callable[[], None]) -> None:
        """Calls ``then`` once all of ``body`` (which was opened) has arrived, or once no more can be kept or will come.

        A body whose length is declared, and that is the object as it is, is kept whole. Of any other one, ``then`` is
        called as soon as ``read_buffer_bytes`` are kept; the task reads the rest.
        """
        if body.failed or (self._reading_paused and body.full and not body.bounded):
            then()
            return
        body.on_whole = partial(self._body_over, then)
        body.receive_whole()
        if self._reading_paused:
            self._resume_reading()
        self.progress.wait(BODY)

    def _body_over(self, then: Callable[[], None]) -> None:
        self.progress.work()
        then()

    def answered(self, *, keep: bool) -> None:
        """The answer to a request that ``try_begin`` took has been written. ``keep``: others may follow."""
        self._answering = False
        if not keep:
            self.close()
            return
        self.progress.wait(HEAD)
        if self._input or self._ended:
            self._wake(self._head_waiter)

    def hand_over(self, begun: object) -> bool:
        """Leaves a request that ``try_begin`` took to the task: ``next_head`` returns it. False: the client has gone,
        and there is no task any more."""
        self._answering = False
        if self._head_waiter is None or self._head_waiter.cancelled():
            return False
        self._handed_over = begun
        self._wake(self._head_waiter)
        return True

    # --- places

    def evict(self) -> None:
        """Closes this connection, which is not authenticated, to make room."""
        self._client = None
        self._owner.forget(self)
        self.transport.abort()

    def _authenticated_or_gone(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.remove()

    def on_admitted(self) -> None:
        """The current request is authenticated, and takes a place among those in flight. Raises SlowDown."""
        if self._client is not None:
            self._authenticated_or_gone()
        if not self._has_place:
            self._owner.take_place()
            self._has_place = True

    @property
    def crowded(self) -> bool:
        """As many requests are in flight as may be."""
        return self._owner.requests_in_flight >= self._owner.limits.requests_max

    def take_memory(self, count: int) -> bool:
        """Memory for a body that callbacks answer, until the request has been answered. False: others have it now."""
        if self._owner.whole_bytes + count > self._owner.limits.whole_bytes_max:
            return False
        self._owner.whole_bytes += count
        self._whole_bytes += count
        return True

    def release_place(self) -> None:
        """The request has been answered."""
        if self._whole_bytes:
            self._owner.whole_bytes -= self._whole_bytes
            self._whole_bytes = 0
        if self._has_place:
            self._has_place = False
            self._owner.requests_in_flight -= 1

    # --- reading, by the connection's task

    @property
    def idle(self) -> bool:
        """The connection waits for a request."""
        return self._head_waiter is not None and not self._head_waiter.done() and not self._answering

    async def next_head(self) -> object | None:
        """The next request: the bytes before the empty line that ends its head, or what ``hand_over`` was given. None
        when no more will come. Raises S3Error for bytes that can't become a head."""
        fresh = True
        if self._client is not None:
            self._client.serve(False)
        while True:
            if self._handed_over is not None:
                begun, self._handed_over = self._handed_over, None
                self._yielded = False
                if self._client is not None:
                    self._client.serve(True)
                return begun
            data = self._input
            if fresh and data.startswith(b"\r\n"):
                self._input = data = data[2:]
                fresh = False
            end = data.find(HEAD_END)
            if end >= 0:
                return await self._take_head(end)
            if data and (error := broken_so_far(data, self._owner.limits)) is not None:
                raise error
            if self._ended:
                return None
            await self._wait_for_head()

    async def _take_head(self, end: int) -> bytes:
        if self._yielded:
            self._yielded = False
        else:
            await asyncio.sleep(0)  # between requests that were sent in one go, other connections have their turn
        data = self._input
        self._input = data[end + len(HEAD_END) :]
        if self._client is not None:
            self._client.serve(True)
        return data[:end]

    async def _wait_for_head(self) -> None:
        if self._reading_paused:
            self._resume_reading()
        self._head_waiter = asyncio.get_running_loop().create_future()
        self.progress.wait(HEAD)
        try:
            await self._head_waiter
        finally:
            self._head_waiter = None
            self.progress.work()
        self._yielded = True

    def open_body(self, body: BodyInput) -> None:
        """The bytes that follow belong to ``body``, until it is complete."""
        self._body = body
        received, self._input = self._input, b""
        body.feed(received)
        if self._body is None:
            return
        if self._ended:
            body.fail(IncompleteBody())
        elif self._reading_paused and not body.full:
            self._resume_reading()

    def on_body_done(self, rest: Buffer = b"") -> None:
        """All of the body has arrived, and ``rest`` after it; or no more of it will."""
        self._body = None
        self._input = bytes(rest)

    def pause_reading(self) -> None:
        """Reads no more from the socket, so that the client has to wait."""
        if not self._reading_paused and not self._ended:
            self._reading_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        self._reading_paused = False
        if not self.transport.is_closing():
            self.transport.resume_reading()

    async def wait_for_body(self, body: BodyInput) -> None:
        """Waits until some bytes of ``body`` have arrived; with a destination, until that is full. Raises the error
        with which the body failed."""
        if self._reading_paused:
            self._resume_reading()
        waiter = body.waiter = asyncio.get_running_loop().create_future()
        self.progress.wait(BODY)
        try:
            await waiter
        finally:
            body.waiter = None
            self.progress.work()

    # --- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Raises ConnectionResetError. If ``paused`` is set afterwards, ``drain`` must be awaited before the memory
        of ``data`` is reused."""
        if self.lost or self.transport.is_closing():
            raise ConnectionResetError("The client has gone.")
        self.transport.write(data)

    def send_continue(self) -> None:
        """Sends ``100 Continue``."""
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def drain(self) -> None:
        """Returns when the kernel has taken all that was written. Raises ConnectionResetError, and TimeoutError for a
        client that does not take it."""
        while self.paused:
            if self.lost:
                raise ConnectionResetError("The client has gone.")
            self._write_waiter = asyncio.get_running_loop().create_future()
            self.progress.wait_for_send()
            try:
                await self._write_waiter
            finally:
                self._write_waiter = None
                self.progress.work()

    def close(self) -> None:
        """Closes the connection when all that was written has left. It closes the transport only once: asyncio's TLS
        transport forgets its socket at a second call, and ``acked_bytes`` still needs that."""
        if not self.transport.is_closing():
            self.transport.close()

    def write_eof(self) -> None:
        """Signals to the client that the answer was the last one; what it still sends is read."""
        if not self.transport.is_closing() and self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has gone already
                self.transport.write_eof()

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- time limits

    def check_progress(self, now_s: float, waited_s: float, idle_s: float) -> None:
        """Ends a wait in which nothing moved for ``idle_s`` seconds, or too few bytes did. ``waited_s``: seconds since
        the last check."""
        progress, body, limits = self.progress, self._body, self._owner.limits
        # A block that fills, or a window that is taken, wakes no task before it is done: its bytes are counted.
        if progress.phase == SEND:
            acked = self.acked_bytes()
            stalled = progress.stalled(now_s, acked, idle_s)
            late = progress.send_too_slow(waited_s, acked, limits) or stalled
        elif progress.phase == BODY and body is not None:
            stalled = progress.stalled(now_s, body.bytes_received, idle_s)
            body.waited_s += waited_s
            late = stalled or body.waited_s > limits.body_idle_s + body.bytes_received / limits.rate_min_bytes_s
        else:
            late = progress.stalled(now_s, 0, idle_s)
        if late:
            self._expire()

    def _expire(self) -> None:
        """Ends the wait: what it was for did not happen in time."""
        phase = self.progress.phase
        if phase == HEAD:
            self.close()
        elif phase == SEND and self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_exception(TimeoutError("The client takes nothing."))
        elif phase == BODY and self._body is not None:
            self._body.fail(RequestTimeout())

    def acked_bytes(self) -> int:
        """Bytes that the client's kernel has acknowledged so far, those of TLS included; 0 where this machine's kernel
        does not count them."""
        connected = self.transport.get_extra_info("socket")
        if _TCP_INFO is None or connected is None:
            return 0
        try:
            info = connected.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES_ACKED.stop)
        except OSError:
            return 0
        return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)
