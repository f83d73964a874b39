"""The listening side of one connection: takes requests within bounds, runs them, and sends their replies.

Theory of operation. A request is answered in one of three ways (``ports.Method``): at once on the event loop, where it
needs no waiting; by a callback, where ``try_start`` accepted it, mostly after a disk has written; else by a task. A
task is cancelled when its caller cancels the call, its deadline has passed or the connection is gone. A request that
``try_start`` accepted cannot be stopped. It is abandoned instead: its place and its bytes are free at once, and its
answer is dropped.

What requests hold in memory is bounded twice, per connection and per server. Before a body is received, its bytes are
taken from both budgets; replies with large bodies count until they have left. When a budget is used up, the server
stops reading from that connection: TCP carries the back-pressure to the caller. A single body larger than a budget is
admitted when nothing else is in flight. Replies of handlers that already run come on top, so the number of handlers is
bounded too. A peer that does not read its replies is not read from either, once ``UNREAD_BYTES_MAX`` of small ones wait
for it. What a hanging disk still holds of abandoned calls is in no budget of the server: a budget that never comes
back would end the traffic with the node's other disks. So the implementation of ``try_start`` bounds what it holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import structlog
from msgspec import MsgspecError

from storaged.cluster.ports import Call, Method, PeerIdentity, Reply, TryStart
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.budget import Budget
from storaged.cluster.rpc.connection import SMALL_BODY_BYTES, Connection, measure
from storaged.cluster.rpc.framing import (
    CANCEL,
    ERROR,
    HANDSHAKE_BYTES_MAX,
    REPLY,
    REQUEST,
    TAKE,
    WAIT,
    FrameError,
    Hello,
    Kind,
    Verdict,
)
from storaged.errors import CertificateRefused, StoragedError
from storaged.units import MIB
from storaged.wire import Buffer, Message, decode, encode

log = structlog.get_logger(__name__)

UNREAD_BYTES_MAX = MIB
"""Small replies are in no budget. When more bytes of them wait because the peer does not read, or as many replies as
handlers may run, no more of its requests are taken."""


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of one server. ``inflight``: bodies received or being answered.

    ``connections_per_peer_max``: under one certified name. A gateway has up to 64 processes, each with one connection,
    and with one or two more while it replaces that one. After its machine has vanished, the old ones count for half a
    minute.
    """

    connections_max: int = 1024
    connections_per_peer_max: int = 256
    handshakes_max: int = 64
    handlers_per_connection_max: int = 256
    inflight_bytes_per_connection_max: int = 32 * MIB
    inflight_bytes_max: int = 96 * MIB
    handshake_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    drain_s: float = 5.0


@dataclass
class ServerShared:
    """What the connections of one server share: its methods by encoded name, bounds, counts and callbacks."""

    loop: asyncio.AbstractEventLoop
    node: str
    methods: dict[bytes, Method]
    limits: ServerLimits
    budget: Budget
    on_closed: Callable[[ServerConnection], None]
    on_call_refused: Callable[[str, StoragedError], None]
    on_call_done: Callable[[], None] | None = None
    """Set while the server stops: called when a call without a task has ended."""
    calls: int = 0
    calls_failed: int = 0
    calls_cancelled: int = 0


class _Running(NamedTuple):
    """A call that runs. ``task`` is None where ``try_start`` accepted it. ``size``: bytes of the body to release when
    such a call ends; a task's callback releases its own.
    """

    task: asyncio.Task[None] | None
    deadline: float
    size: int = 0


class ServerConnection(Connection):
    """One peer. ``peer`` is set once the handshake is complete."""

    flush_after_read = True

    def __init__(self, shared: ServerShared) -> None:
        super().__init__(shared.loop)
        self.shared = shared
        self.peer: PeerIdentity | None = None
        """What the peer's certificate says."""
        self.expires_s = float("inf")
        """When the peer's certificate expires, in seconds since 1970."""
        self.caller: PeerIdentity | None = None
        """The peer with the roles that the layout in force gives it: what handlers see."""
        self.running: dict[int, _Running] = {}
        self.inflight_bytes = 0
        self._methods: dict[bytes, Method] = {}
        """The methods that the caller's roles allow."""
        self._receiving_bytes = 0
        self._granted: int | None = None
        self._blocked = False  # by this connection's own bounds

    # Frames in.

    def admit(self, kind: int, request_id: int, head_bytes: int, body_bytes: int) -> Verdict:
        if kind != REQUEST or self.peer is None:
            return self._admit_other(kind, head_bytes, body_bytes)
        if self._granted is not None:
            self._granted = None
        elif not self._has_room(body_bytes):
            self._blocked = True
            return self._pause_reading()
        elif body_bytes and not self.shared.budget.try_take(body_bytes):
            self.shared.budget.wait(body_bytes, self, self._on_granted)
            return self._pause_reading()
        self.inflight_bytes += body_bytes
        self._receiving_bytes = body_bytes
        return TAKE

    def _admit_other(self, kind: int, head_bytes: int, body_bytes: int) -> Verdict:
        if self.peer is None:
            if kind != Kind.HELLO or head_bytes > HANDSHAKE_BYTES_MAX or body_bytes or self.hello.done():
                raise FrameError("the peer did not begin with a handshake")
        elif kind != CANCEL or head_bytes or body_bytes:
            raise FrameError(f"a {Kind(kind).name} frame does not belong here")
        return TAKE

    def _has_room(self, size: int) -> bool:
        limits = self.shared.limits
        if len(self.running) >= limits.handlers_per_connection_max:
            return False
        if self._paused and self._small and not self._are_few_unread():
            return False
        return self.inflight_bytes == 0 or self.inflight_bytes + size <= limits.inflight_bytes_per_connection_max

    def _are_few_unread(self) -> bool:
        unread = self._small
        return (
            len(unread) < self.shared.limits.handlers_per_connection_max
            and sum(map(len, unread.values())) <= UNREAD_BYTES_MAX
        )

    def _pause_reading(self) -> Verdict:
        if self.transport is not None:
            self.transport.pause_reading()
        return WAIT

    def _on_granted(self, size: int) -> None:
        """The server's budget has room for the body that this connection waits to receive."""
        self._granted = size
        self.loop.call_soon(self._resume_reading)

    def _resume_reading(self) -> None:
        if self.transport is None or not self.reader.waiting:
            return
        if not self._blocked and self._granted is None:
            return  # two calls ended in one turn: the first made it wait for the server's budget, once is enough
        self._blocked = False
        self.resume_frames()
        if not self.reader.waiting and self.is_open:
            self.last_read_at = self.loop.time()  # before, the peer could not be heard
            self.transport.resume_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._blocked and self.reader.waiting:
            self.loop.call_soon(self._resume_reading)

    def deliver(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        if kind == REQUEST:
            self._receiving_bytes = 0
            self._run(request_id, deadline_ms, head, body)
        elif kind == CANCEL:
            running = self.running.get(request_id)
            if running is not None:
                self.cancel_call(request_id, running)
        else:
            try:
                self.hello.set_result(decode(head, Hello))
            except MsgspecError as error:
                raise FrameError(f"the handshake does not decode: {error}") from error

    def drop_frame(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        self._receiving_bytes = 0
        self._release(len(body))

    # Calls.

    def _run(self, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        if request_id in self.running:
            self._release(len(body))
            raise FrameError(f"request id {request_id} is in use")
        assert self.caller is not None
        self.shared.calls += 1
        size = len(body)
        name_end = 1 + (head[0] if head else 0)
        name = bytes(head[1:name_end])
        try:
            method = self._methods.get(name) or self._other_method(name)
            request = decode(head[name_end:], method.request)
        except (MsgspecError, StoragedError) as error:
            self._release(size)  # first: to record a refusal may fail
            self._refuse_call(request_id, name, error)
            return
        call = Call(self.caller, body, self.loop.time() + deadline_ms / 1000)
        if method.try_answer is not None and self._try_answer(request_id, name, method.try_answer, request, call):
            if size:
                self._release(size)
            return
        if method.try_start is not None and self._try_start(request_id, name, method.try_start, request, call):
            return
        task = self.loop.create_task(self._serve(request_id, name, method, request, call))
        self.running[request_id] = _Running(task, call.deadline)
        # Not a finally in the task: a task that is cancelled before its first step never reaches it.
        task.add_done_callback(partial(self._on_task_done, request_id, size))

    def likely_last_frame(self) -> bool:
        return not self.running

    def set_roles(self, roles: frozenset[str]) -> None:
        """The peer's roles in the layout in force: they decide which methods it may call."""
        assert self.peer is not None
        self.caller = self.peer._replace(roles=tuple(sorted(roles)))
        self._methods = {
            name: method for name, method in self.shared.methods.items() if not method.roles.isdisjoint(roles)
        }

    def _other_method(self, name: bytes) -> Method:
        """A method that is not open to the caller's roles, but to non-members.

        Raises PeerRefused for an unknown method and for one that this peer may not call.
        """
        method = self.shared.methods.get(name)
        assert self.caller is not None
        if method is None:
            raise faults.refused(
                faults.UNKNOWN_METHOD, f"{self.shared.node} has no method {name.decode('ascii', 'replace')!r}."
            )
        if method.for_non_members:
            return method
        if not self.caller.roles:
            raise faults.refused(
                faults.NOT_A_MEMBER,
                f"The layout in force at {self.shared.node} does not name {self.caller.name} at its certified place.",
            )
        needed = ", ".join(sorted(method.roles)) or "no one"
        roles = ", ".join(self.caller.roles)
        raise faults.refused(faults.ROLE_REFUSED, f"{name.decode()} is for {needed}; {self.caller.name} is {roles}.")

    def _refuse_call(self, request_id: int, name: bytes, error: MsgspecError | StoragedError) -> None:
        if isinstance(error, StoragedError):
            assert self.caller is not None
            self.shared.on_call_refused(self.caller.name, error)
            self._fail(request_id, error)
        else:
            text = f"The request to {name.decode()} does not decode: {error}"
            self._fail(request_id, faults.refused(faults.BAD_MESSAGE, text))

    def _try_answer(
        self,
        request_id: int,
        name: bytes,
        try_answer: Callable[[Any, Call], Message | Reply | None],
        request: Message,
        call: Call,
    ) -> bool:
        """Whether the request has its reply or error."""
        try:
            answer = try_answer(request, call)
            if answer is not None:
                self._answer(request_id, answer)
        except Exception as error:
            if not isinstance(error, StoragedError):
                log.exception("call failed", peer=call.peer.name, method=name.decode())
            self._fail(request_id, error)
            return True
        return answer is not None

    def _try_start(self, request_id: int, name: bytes, try_start: TryStart, request: Message, call: Call) -> bool:
        """Whether the request was accepted, or failed."""
        running = self.running[request_id] = _Running(None, call.deadline, len(call.body))
        try:
            if try_start(request, call, partial(self._on_answer, request_id, running, name)):
                return True
        except Exception as error:
            self._on_answer(request_id, running, name, error)
            return True
        del self.running[request_id]
        return False

    def _on_answer(self, request_id: int, running: _Running, name: bytes, answer: Message | Reply | Exception) -> None:
        if self.running.get(request_id) is not running:
            return  # the call was abandoned
        del self.running[request_id]
        if not isinstance(answer, Exception):
            try:
                self._answer(request_id, answer)
            except Exception as error:  # it exceeds a frame
                answer = error
        if isinstance(answer, Exception):
            if not isinstance(answer, StoragedError):
                log.error(
                    "call failed", peer=self.peer.name if self.peer else "", method=name.decode(), exc_info=answer
                )
            self._fail(request_id, answer)
        self._release(running.size)
        if self.shared.on_call_done is not None:
            self.shared.on_call_done()

    def cancel_call(self, request_id: int, running: _Running) -> None:
        """Ends a call whose caller waits no more: cancels its task, or abandons what ``try_start`` accepted."""
        if running.task is not None:
            running.task.cancel()
            return
        del self.running[request_id]
        self.shared.calls_cancelled += 1
        self._release(running.size)
        if self.shared.on_call_done is not None:
            self.shared.on_call_done()

    async def _serve(self, request_id: int, name: bytes, method: Method, request: Message, call: Call) -> None:
        try:
            self._answer(request_id, await method.handler(request, call))
        except Exception as error:
            if not isinstance(error, StoragedError):
                log.exception("call failed", peer=call.peer.name, method=name.decode())
            self._fail(request_id, error)

    def _on_task_done(self, request_id: int, size: int, task: asyncio.Task[None]) -> None:
        self.running.pop(request_id, None)
        self.shared.calls_cancelled += task.cancelled()
        self._release(size)

    # Replies.

    def _answer(self, request_id: int, answer: Message | Reply) -> None:
        message, body = answer if isinstance(answer, Reply) else (answer, ())
        if body:
            pieces, reply_bytes = measure(body)
            self._send_bulk(request_id, encode(message), pieces, reply_bytes)
        else:
            self.send(REPLY, request_id, encode(message))

    def _send_bulk(self, request_id: int, head: bytes, pieces: tuple[Buffer, ...], size: int) -> None:
        counted = size if size > SMALL_BODY_BYTES else 0
        self.inflight_bytes += counted
        self.shared.budget.add(counted)
        try:
            self.send(REPLY, request_id, head, pieces, size)
        except ValueError:
            self._release(counted)
            raise

    def _fail(self, request_id: int, error: Exception) -> None:
        self.shared.calls_failed += 1
        self.send(ERROR, request_id, encode(faults.to_head(error)))

    def on_sent(self, request_id: int, size: int) -> None:
        self._release(size)

    def _release(self, size: int) -> None:
        self.inflight_bytes -= size
        self.shared.budget.release(size)
        if self._blocked and self.reader.waiting:
            self.loop.call_soon(self._resume_reading)

    # The end.

    def on_closed(self) -> None:
        budget = self.shared.budget
        budget.forget(self)
        for held in (self._receiving_bytes, self._granted or 0):
            budget.release(held)
        self._receiving_bytes, self._granted = 0, None
        for request_id, running in list(self.running.items()):
            self.cancel_call(request_id, running)
        self.fail_handshake(ConnectionResetError(self.reason))
        self.shared.on_closed(self)

    def on_protocol_error(self, error: FrameError) -> None:
        if self.peer is None and not self.hello.done():
            if self._tcp is not None and not self._tcp.is_closing():
                self._tcp.pause_reading()  # the refusal is sent in the next turn; the reader takes no more
            self.fail_handshake(CertificateRefused(f"The handshake failed: {error}."))
        else:
            self.abort(str(error))
