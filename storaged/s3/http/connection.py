"""Connections of clients: bytes in and out of a socket, one request after the other, with back-pressure and time
limits.

Theory of operation. A connection is a protocol of the event loop and one task, which lives as long as the connection:
the loop's callbacks put bytes where they
belong (a head, or the body of the request being answered) and wake the task only when it has something to do. So a
small request costs one wake-up; or none: a
head that has come is first offered to ``Connections.begin_soon``, which may answer it by callbacks, and ends that with
``answered``, or with ``hand_over`` to the task.
A body that it waits for is fed as ever; ``when_whole`` tells when all has come.

All connections read into one buffer, from which a head is copied at once; only the bytes of a large body are received
straight into its reader's memory
(``RequestBody.fill``). What a client sends while nobody reads is kept up to ``Limits.read_buffer_bytes``; then its
socket is no longer read.

The transport keeps nothing of what is written unless the socket is full: its high-water mark is the lowest, so that a
buffer may be used again after ``drained``.

No request has timers. A connection says what it waits for (``phase``) and what has moved since (``moved``); a sweep
over all connections, a few times in each
limit's time, ends those where nothing did for too long, or too little (``too_slow``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, cast

from storaged import trace
from storaged.errors import IncompleteBody, RequestTimeout, SlowDown
from storaged.s3.http.body import RequestBody
from storaged.s3.http.grammar import HEAD_END, broken_so_far
from storaged.s3.http.limits import Limits
from storaged.s3.http.unauthenticated import Stranger, Strangers
from storaged.units import KIB
from storaged.wire import Buffer

log = logging.getLogger("storaged.s3")

RECEIVE_BYTES = 64 * KIB
"""Of one system call, unless a large body goes straight to its reader."""
FLUSH_LOOK_S = 0.25
SWEEPS_PER_LIMIT = 4
SWEEP_EVERY_S_MAX = 1.0

_TCP_INFO = getattr(socket, "TCP_INFO", None)
_BYTES_ACKED = slice(120, 128)
"""Of Linux's ``struct tcp_info`` (linux/tcp.h): ``tcpi_bytes_acked``."""

WORKING, HEAD, BODY, SEND = range(4)
"""Phases: what a connection waits for. Working: nothing that its client owes."""


class Connection(asyncio.BufferedProtocol):
    """One client. Its task calls ``next_head``, reads ``body``, and ``write``s."""

    __slots__ = (
        "_answering", "_begun", "_body", "_ended", "_has_place", "_heard", "_held_back", "_input", "_limits", "_others", "_room", "_scratch", "_send_waited_s", "_stranger", "_taken_before", "_waited",  # noqa: E501
        "heard_ns", "lost", "moved_s", "moved_seen", "paused", "phase", "progress", "remote", "secure", "transport",
    )  # fmt: skip

    def __init__(self, others: Connections) -> None:
        self._others = others
        self._limits = others.limits
        self._scratch = others.scratch
        self._input = b""
        self._body: RequestBody | None = None
        self._heard: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._waited = False
        """The loop has run since the last request."""
        self._held_back = False
        self._ended = False
        self._answering = False
        """A request is being answered by callbacks; the task waits."""
        self._begun: object | None = None
        self._has_place = False
        """Its request is authenticated, and counts as in flight."""
        self._stranger: Stranger | None = None
        """Until its first request is authenticated."""
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.remote = ""
        self.secure = False
        self.lost = False
        self.paused = False
        """The transport could not write all that it was given; see ``drained``."""
        self.heard_ns = 0
        """When spans are on: when the first byte of a request came (``time.perf_counter_ns``), 0 between requests."""
        self.phase = WORKING
        self.progress = 0
        self.moved_seen = (-1, 0)
        self.moved_s = 0.0
        self._send_waited_s = 0.0
        self._taken_before = 0

    # --- the loop's callbacks
    # -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.remote = peer[0] if isinstance(peer, tuple) else ""
        if not self._others.admit(self):
            self.lost = True
            self.transport.abort()
            return
        self._stranger = self._others.strangers.came(self, self.remote)
        self.secure = transport.get_extra_info("ssl_object") is not None
        # TLS has copied what it encrypted; with a limit of 0 it would pause at an empty buffer, for ever
        self.transport.set_write_buffer_limits(high=1 if self.secure else 0)
        self._others.begin(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        body = self._body
        return self._scratch if body is None or body.destination is None else body.destination

    def buffer_updated(self, nbytes: int) -> None:
        if trace.on and not self.heard_ns:
            self.heard_ns = time.perf_counter_ns()
        body = self._body
        if body is None:
            self._on_head(bytes(self._scratch[:nbytes]))
        elif body.destination is not None:
            body.received(nbytes)
        else:
            body.feed(bytes(self._scratch[:nbytes]))
            if body.then is not None and (body.complete or self._held_back):
                body.tell()
        if self._stranger is not None:
            body = self._body
            self._stranger.keeps(len(self._input) + (body.kept_bytes if body is not None else 0))

    def _on_head(self, data: bytes) -> None:
        waiter = self._heard
        awaited = self.idle
        seen = len(self._input)
        if not seen:
            self.progress += 1  # the first bytes of a head: the time for the rest of it begins
        else:
            data = self._input + data
        self._input = data
        if awaited:
            end = data.find(HEAD_END, max(seen - 3, 0))
            if end >= 0 or broken_so_far(data, self._limits, seen):
                if end >= 0 and self._begin_soon(data, end):
                    return
                self._wake(waiter)
                awaited = False
        if not awaited and len(data) > self._limits.read_buffer_bytes:
            self.hold_back()  # also before the task has run: one readiness of the socket may bring dozens of reads

    def _begin_soon(self, data: bytes, end: int) -> bool:
        """Whether the request whose head ends at ``end`` of all that has come is answered by callbacks."""
        begin = self._others.begin_soon
        if begin is None:
            return False
        self._answering = True
        self._input = data[end + len(HEAD_END) :]
        self.phase = WORKING
        if begin(self, data[:end], len(self._input)):
            return True
        self._answering = False
        self._input = data
        self.phase = HEAD
        return False

    def when_whole(self, body: RequestBody, then: Callable[[], None]) -> None:
        """``then`` is called once all of ``body``, which was opened, has come; no more will; or more than may be kept
        of one that does not say how long it is as it is
        sent, which the task reads then. One that says so is kept whole."""
        if body.failed or (self._held_back and body.full and not body.bounded):
            then()
            return
        body.then = partial(self._body_over, then)
        if self._held_back:
            self._take_on()
        self.phase = BODY
        self.progress += 1

    def _body_over(self, then: Callable[[], None]) -> None:
        self.phase = WORKING
        self.progress += 1
        then()

    def answered(self, *, keep: bool) -> None:
        """The answer of a request that was begun by ``begin_soon`` has been written; ``keep``: others may follow."""
        self._answering = False
        if not keep:
            self.transport.close()
            return
        self.phase = HEAD
        self.progress += 1
        if self._input or self._ended:
            self._wake(self._heard)

    def hand_over(self, begun: object) -> bool:
        """The task goes on with a request that was begun by ``begin_soon``: ``next_head`` returns it. False: there is
        no task any more, for the client has gone.
        """
        self._answering = False
        if self._heard is None or self._heard.cancelled():
            return False
        self._begun = begun
        self._wake(self._heard)
        return True

    def eof_received(self) -> bool:
        """The client sends no more. If it did so with requests under way, it may still want their answers: then the
        transport stays open.
        """
        self._ended = True
        if self._body is not None:
            self._body.fail(IncompleteBody())
        if self.idle:
            self._wake(self._heard)
            return False
        return not self.secure

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self._ended = True
        if self._body is not None:
            self._body.fail(IncompleteBody())
        if self._answering:
            self._input = b""  # nobody is left to be answered, and it must not overtake the request under way
        self._wake(self._heard)
        if self._room is not None and not self._room.done():
            self._room.set_exception(ConnectionResetError("The client has gone."))
        self._known()
        self._others.forget(self)

    def evict(self) -> None:
        """Room is needed, and nobody known is here."""
        self._stranger = None
        self._others.forget(self)
        self.transport.abort()

    def _known(self) -> None:
        stranger, self._stranger = self._stranger, None
        if stranger is not None:
            stranger.leaves()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._wake(self._room)

    # --- what the connection's task does
    # ------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No request has been heard of."""
        return self._heard is not None and not self._heard.done() and not self._answering

    async def next_head(self) -> object | None:
        """What stands before the empty line of the next request, or what was handed over; None when there will be none.
        Raises S3Error when what came can't be
        a head."""
        fresh = True
        if self._stranger is not None:
            self._stranger.asks(False)
        while True:
            if self._begun is not None:
                begun, self._begun = self._begun, None
                return begun
            data = self._input
            if fresh and data.startswith(b"\r\n"):
                self._input = data = data[2:]
                fresh = False
            end = data.find(HEAD_END)
            if end >= 0:
                if self._waited:
                    self._waited = False
                else:
                    await asyncio.sleep(0)  # requests sent in one go: others have their turn between them
                    data = self._input
                self._input = data[end + 4 :]
                if self._stranger is not None:
                    self._stranger.asks(True)
                return data[:end]
            if data and (error := broken_so_far(data, self._limits)) is not None:
                raise error
            if self._ended:
                return None
            if self._held_back:
                self._take_on()
            self._heard = asyncio.get_running_loop().create_future()
            self.phase = HEAD
            self.progress += 1
            try:
                await self._heard
            finally:
                self._heard = None
                self.phase = WORKING
                self.progress += 1
            self._waited = True

    def open_body(self, body: RequestBody) -> None:
        """What comes next belongs to ``body``, until it is complete."""
        self._body = body
        come, self._input = self._input, b""
        body.feed(come)
        if self._body is None:
            return
        if self._ended:
            body.fail(IncompleteBody())
        elif self._held_back and not body.full:
            self._take_on()

    def body_done(self, rest: Buffer = b"") -> None:
        """All of the body has come, and ``rest`` after it; or no more will."""
        self._body = None
        self._input = bytes(rest)

    def admitted(self) -> None:
        """The request that is being answered is authenticated, and takes a place among those in flight. Raises
        SlowDown.
        """
        if self._stranger is not None:
            self._known()
        if not self._has_place:
            self._others.take_place()
            self._has_place = True

    @property
    def crowded(self) -> bool:
        """As many requests are in flight as may be."""
        return self._others.places_taken >= self._limits.requests_max

    def give_place(self) -> None:
        """The request has been answered."""
        if self._has_place:
            self._has_place = False
            self._others.places_taken -= 1

    def hold_back(self) -> None:
        """Reads no more from the socket, so that the client has to wait."""
        if not self._held_back and not self._ended:
            self._held_back = True
            self.transport.pause_reading()

    def _take_on(self) -> None:
        self._held_back = False
        if not self.transport.is_closing():
            self.transport.resume_reading()

    async def heard(self, body: RequestBody) -> None:
        """Waits until something of ``body`` has come: until its destination is full, if it has one. Raises what the
        body failed with.
        """
        if self._held_back:
            self._take_on()
        waiter = body.waiter = asyncio.get_running_loop().create_future()
        self.phase = BODY
        self.progress += 1
        try:
            await waiter
        finally:
            body.waiter = None
            self.phase = WORKING
            self.progress += 1

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Raises ConnectionResetError. See ``paused``: when it is set, ``drained`` must be awaited before ``data`` is
        used again.
        """
        if self.lost or self.transport.is_closing():
            raise ConnectionResetError("The client has gone.")
        self.transport.write(data)

    def go_on(self) -> None:
        """``100 Continue``."""
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def drained(self) -> None:
        """Until all that was written has been taken. Raises ConnectionResetError, and TimeoutError for a client that
        does not take it.
        """
        while self.paused:
            if self.lost:
                raise ConnectionResetError("The client has gone.")
            self._room = asyncio.get_running_loop().create_future()
            self._send_waited_s = 0.0
            self.phase = SEND
            self.progress += 1
            try:
                await self._room
            finally:
                self._room = None
                self.phase = WORKING
                self.progress += 1

    def end_writing(self) -> None:
        """Tells the client that the answer was the last, while what it still sends is read."""
        if not self.transport.is_closing() and self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has gone already
                self.transport.write_eof()

    # --- time limits
    # --------------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """What was waited for did not come in time."""
        if self.phase == HEAD:
            self.transport.close()
        elif self.phase == SEND and self._room is not None and not self._room.done():
            self._room.set_exception(TimeoutError("The client takes nothing."))
        elif self.phase == BODY and self._body is not None:
            self._body.fail(RequestTimeout())

    def moved(self) -> tuple[int, int]:
        """Another value whenever what is waited for has moved: a block that fills, or a window that is taken, wakes
        nobody before it is done. Second: its bytes.
        """
        if self.phase == BODY and self._body is not None:
            return self.progress, self._body.bytes_come
        return self.progress, self.taken() if self.phase == SEND else 0

    def taken(self) -> int:
        """Bytes that the client's end has acknowledged so far, those of TLS included; 0 where the
        kernel does not tell.
        """
        connected = self.transport.get_extra_info("socket")
        if _TCP_INFO is None or connected is None:
            return 0
        try:
            info = connected.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES_ACKED.stop)
        except OSError:
            return 0
        return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)

    def too_slow(self, waited_s: float, amount: int) -> bool:
        """Counts ``waited_s`` more seconds of waiting for a body or for what was sent to be taken, which must be earned
        by what moves: ``amount``, from ``moved``.
        """
        limits = self._limits
        if self.phase == SEND:
            if not self._send_waited_s:
                self._taken_before = amount
            self._send_waited_s += waited_s
            return self._send_waited_s > limits.send_idle_s + (amount - self._taken_before) / limits.rate_min_bytes_s
        body = self._body
        if self.phase != BODY or body is None:
            return False
        body.waited_s += waited_s
        return body.waited_s > limits.body_idle_s + amount / limits.rate_min_bytes_s

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Connections:
    """The connections of one listening socket: makes them, up to ``Limits.connections_max``, runs ``converse`` for
    each, and ends those that keep it waiting.
    """

    def __init__(
        self,
        converse: Callable[[Connection], Coroutine[Any, Any, None]],
        limits: Limits,
        begin_soon: Callable[[Connection, bytes, int], bool] | None = None,
        proxies: Sequence[str] = (),
    ) -> None:
        """``begin_soon(connection, head, more)``: whether it takes the request on, to call ``Connection.answered`` or
        ``hand_over``, perhaps before it returns. ``more``:
        so many bytes have come behind the head; who takes the request on takes them all (``open_body``). It must not
        raise."""
        self.limits = limits
        self.begin_soon = begin_soon
        self.scratch = memoryview(bytearray(RECEIVE_BYTES))
        self.strangers = Strangers(limits, proxies)
        self.handshakes = 0
        """Of TLS, not made yet; see ``handshake``."""
        self.places_taken = 0
        """Requests in flight that were authenticated."""
        self.refused_total = 0
        self.open: set[Connection] = set()
        self._converse = converse
        self._tasks: set[asyncio.Task[None]] = set()
        self._patience_s = {HEAD: limits.headers_s, BODY: limits.body_idle_s, SEND: limits.send_idle_s}
        self._every_s = min(SWEEP_EVERY_S_MAX, *(limit_s / SWEEPS_PER_LIMIT for limit_s in self._patience_s.values()))
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> Connection:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self._sweep)
        return Connection(self)

    def admit(self, connection: Connection) -> bool:
        """False: there are too many, and all have authenticated."""
        if len(self.open) >= self.limits.connections_max and not self.strangers.make_room():
            return False
        self.open.add(connection)
        return True

    def room_for_handshake(self) -> bool:
        """False: as many connections are open, or about to be, as may be, and all have authenticated."""
        return len(self.open) + self.handshakes < self.limits.connections_max or self.strangers.make_room()

    def take_place(self) -> None:
        """Raises SlowDown when as many requests are in flight as may be."""
        if self.places_taken >= self.limits.requests_max:
            self.refused_total += 1
            raise SlowDown()
        self.places_taken += 1

    def begin(self, connection: Connection) -> None:
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, connection: Connection) -> None:
        self.open.discard(connection)

    async def flushed(self) -> None:
        """Returns when no client takes anything any more: what TLS was given it passes on when the socket has room, and
        does not tell when it has.
        """
        before: dict[Connection, int] | None = None
        while (
            now := {connection: connection.taken() for connection in self.open if connection.secure}
        ) and now != before:
            before = now
            await asyncio.sleep(FLUSH_LOOK_S)

    async def close(self) -> None:
        """Breaks all connections, and waits until their tasks have ended."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in tuple(self.open):
            connection.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._timer = loop.call_later(self._every_s, self._sweep)
        for connection in tuple(self.open):
            phase = connection.phase
            if phase == WORKING:
                continue
            moved = connection.moved()
            if moved != connection.moved_seen:
                connection.moved_seen = moved
                connection.moved_s = now_s
            elif now_s - connection.moved_s > self._patience_s[phase]:
                connection.expire()
            if connection.too_slow(self._every_s, moved[1]):
                connection.expire()
