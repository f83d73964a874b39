"""The dialling side of one connection: sends requests, and hands each reply to the callback that waits for it.

A call is one frame out and one frame in. When its caller stops waiting (timeout, cancellation), the frame is withdrawn
if it has not left yet; otherwise the server gets a CANCEL frame, and a reply that arrives nevertheless is skipped
without being stored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import structlog
from msgspec import MsgspecError

from storaged.cluster.ports import OnReply, PeerIdentity
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.connection import SMALL_BODY_BYTES, Connection, measure
from storaged.cluster.rpc.framing import (
    DEADLINE_MS_MAX,
    ERROR,
    HANDSHAKE_BYTES_MAX,
    REPLY,
    REQUEST,
    SKIP,
    TAKE,
    ErrorHead,
    FrameError,
    Hello,
    Kind,
    Verdict,
)
from storaged.errors import PeerError, PeerTimeout, PeerUnreachable
from storaged.units import MIB
from storaged.wire import MALFORMED, Buffer, Message, decode, decoder_of

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=Message)
NO_BYTES = memoryview(b"")

_ANSWERS = (REPLY, ERROR)

QUIET_CALLS_MAX = 2
"""With at most this many calls pending, another frame in this turn of the loop is unlikely: a lone PUT has two at one
node for a moment, sixty-four PUTs have twenty."""


@dataclass(frozen=True)
class PoolLimits:
    """Bounds of one pool of connections. ``queued_bytes_max``: bodies that wait for one peer's transport; further calls
    wait for room, within their own timeout.
    """

    connect_timeout_s: float = 3.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    queued_bytes_max: int = 32 * MIB
    calls_per_connection_max: int = 4096
    stall_timeout_s: float = 30.0


@dataclass
class CallCounts:
    """Calls of one pool since its start."""

    total: int = 0
    local: int = 0
    failed: int = 0
    timed_out: int = 0

    def count_failure(self, error: PeerError) -> PeerError:
        """Counts ``error`` and returns it."""
        if isinstance(error, PeerTimeout):
            self.timed_out += 1
        else:
            self.failed += 1
        return error


class _Pending(NamedTuple):
    """A call that waits for its reply."""

    on_reply: OnReply
    decode_reply: Callable[[memoryview], Message]
    deadline: float
    method: str


class ClientConnection(Connection):
    """A connection to ``node``. Usable once ``hello`` is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, node: str, limits: PoolLimits, counts: CallCounts) -> None:
        super().__init__(loop)
        self.node = node
        self.limits = limits
        self.counts = counts
        self.peer: PeerIdentity | None = None
        """What its certificate says, once that was checked."""
        self.expires_s = float("inf")
        """When the peer's certificate or our own expires, whichever is first, in seconds since 1970."""
        self.redial_at_s = float("inf")
        """When to try for a connection that lasts longer, in seconds since 1970."""
        self.pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._room_waiters: list[asyncio.Future[None]] = []
        self._expiry: asyncio.TimerHandle | None = None
        """The timer of the call that expires first."""
        self._expires_at = 0.0

    # Frames in.

    def admit(self, kind: int, request_id: int, head_bytes: int, body_bytes: int) -> Verdict:
        if kind in _ANSWERS:
            return TAKE if request_id in self.pending else SKIP
        if (
            kind not in (Kind.WELCOME, Kind.REFUSED)
            or body_bytes
            or head_bytes > 2 * HANDSHAKE_BYTES_MAX
            or self.hello.done()
        ):
            raise FrameError(f"a {Kind(kind).name} frame does not belong here")
        return TAKE

    def deliver(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        pending = self.pending.pop(request_id, None)
        if pending is None:
            self._finish_handshake(kind, head)
            return
        on_reply, decode_reply, _deadline, method = pending
        answer: Any
        try:
            answer = decode_reply(head) if kind == REPLY else self.counts.count_failure(self._error_in(head))
        except MALFORMED as error:
            answer = self.counts.count_failure(
                faults.refused(faults.BAD_REPLY, f"The answer of {self.node} does not decode: {error}")
            )
        try:
            on_reply(answer, body)
        except Exception:
            self._log_callback_error(method)
        if self._room_waiters:
            self._wake_room_waiters()

    def _error_in(self, head: memoryview) -> PeerError:
        return faults.from_head(decode(head, ErrorHead), self.node)

    def _log_callback_error(self, method: str) -> None:
        """An error in one callback must not keep replies from other callers, nor end the connection."""
        log.exception("the callback of a call failed", peer=self.node, method=method)

    def _finish_handshake(self, kind: int, head: memoryview) -> None:
        if self.hello.done():
            return  # a reply whose call was abandoned while it was being received
        try:
            if kind == Kind.WELCOME:
                self.hello.set_result(decode(head, Hello))
            else:
                self.fail_handshake(faults.handshake_refused(decode(head, ErrorHead), self.node))
        except MsgspecError as error:
            raise FrameError(f"the handshake does not decode: {error}") from error

    def on_closed(self) -> None:
        self.fail_handshake(ConnectionResetError(self.reason))
        pending, self.pending = self.pending, {}
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        for call in pending.values():
            self._fail(call, PeerUnreachable(f"The connection to {self.node} broke: {self.reason}."))
        self._wake_room_waiters()

    # Calls.

    def likely_last_frame(self) -> bool:
        return len(self.pending) <= QUIET_CALLS_MAX

    async def call(
        self, method: str, head: bytes, reply: type[T], body: Sequence[Buffer], deadline: float
    ) -> tuple[T, memoryview]:
        """Sends a request and waits for its reply. ``head`` is the frame's whole head, ``deadline`` in the loop's
        seconds. Raises PeerError; ValueError when the request exceeds a frame's limits.
        """
        while self.is_open and not self.has_room:
            await self._wait_for_room(deadline)
        if not self.is_open:
            raise self.counts.count_failure(PeerUnreachable(f"The connection to {self.node} broke: {self.reason}."))
        future: asyncio.Future[tuple[Any, memoryview]] = self.loop.create_future()
        request_id = self.try_call(
            method, head, decoder_of(reply), body, deadline - self.loop.time(), partial(_resolve, future)
        )
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(request_id)
            raise

    @property
    def has_room(self) -> bool:
        return (
            self.queued_bytes <= self.limits.queued_bytes_max
            and len(self.pending) < self.limits.calls_per_connection_max
        )

    def try_call(
        self,
        method: str,
        head: bytes,
        decode_reply: Callable[[memoryview], Message],
        body: Sequence[Buffer],
        timeout_s: float,
        on_reply: OnReply,
        small_bytes_max: int = SMALL_BODY_BYTES,
        followed: bool = False,
    ) -> int:
        """Sends a request and returns its id, or 0 when the connection is not open or has no room. ``followed``: see
        ``send``.

        Raises ValueError when the request exceeds a frame's limits.
        """
        transport, pending, limits = self.transport, self.pending, self.limits
        if (  # ``is_open`` and ``has_room`` inlined: this runs for every frame
            transport is None
            or transport.is_closing()
            or self.queued_bytes > limits.queued_bytes_max
            or len(pending) >= limits.calls_per_connection_max
        ):
            return 0
        request_id = self._last_id = self._last_id + 1
        deadline_ms = min(max(int(timeout_s * 1000), 1), DEADLINE_MS_MAX)
        if body:
            self.send(REQUEST, request_id, head, *measure(body), deadline_ms, small_bytes_max, followed)
        else:
            self.send(REQUEST, request_id, head, (), 0, deadline_ms, SMALL_BODY_BYTES, followed)
        deadline = self.loop.time() + timeout_s
        pending[request_id] = _Pending(on_reply, decode_reply, deadline, method)
        if self._expiry is None or deadline < self._expires_at:
            self._set_expiry(deadline)
        return request_id

    def _set_expiry(self, deadline: float) -> None:
        """One timer serves all calls: it fires at the earliest deadline, and by then most calls have their reply."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = self.loop.call_at(deadline, self._expire)
        self._expires_at = deadline  # uvloop's timer does not say when it fires if that is at once

    def _expire(self) -> None:
        self._expiry = None
        now = self.loop.time()
        late = [(request_id, call) for request_id, call in self.pending.items() if call.deadline <= now]
        for request_id, call in late:
            if self.abandon(request_id) is not None:
                self._fail(call, PeerTimeout(f"{self.node} did not answer {call.method} in time."))
        if self.pending:
            self._set_expiry(min(call.deadline for call in self.pending.values()))

    def _fail(self, call: _Pending, error: PeerError) -> None:
        try:
            call.on_reply(self.counts.count_failure(error), NO_BYTES)
        except Exception:
            self._log_callback_error(call.method)

    def abandon(self, request_id: int) -> _Pending | None:
        """The caller stops waiting: its buffers are free at once, and ``on_reply`` is not called. No-op after the
        reply.
        """
        call = self.pending.pop(request_id, None)
        if call is not None:
            if not self.withdraw(request_id):
                self.send(Kind.CANCEL, request_id, b"")
            if self._room_waiters:
                self._wake_room_waiters()
        return call

    async def _wait_for_room(self, deadline: float) -> None:
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._room_waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        except TimeoutError:
            raise self.counts.count_failure(
                PeerTimeout(f"{self.node} accepts no more calls: {self.queued_bytes} bytes wait for it.")
            ) from None
        finally:
            with contextlib.suppress(ValueError):
                self._room_waiters.remove(waiter)

    def _wake_room_waiters(self) -> None:
        waiters, self._room_waiters = self._room_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def on_sent(self, request_id: int, size: int) -> None:
        if self._room_waiters:
            self._wake_room_waiters()


def _resolve(future: asyncio.Future[tuple[Any, memoryview]], answer: Any, bulk: memoryview) -> None:
    if future.done():
        return
    if isinstance(answer, PeerError):
        future.set_exception(answer)
    else:
        future.set_result((answer, bulk))
