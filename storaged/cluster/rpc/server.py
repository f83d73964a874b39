"""The listening side of the internode protocol.

Theory of operation. A peer is let in by three gates in this order: TLS (a certificate of this cluster's authority,
valid now), the certificate's
extension and the admission policy (jurisdiction), and the handshake (same cluster, same protocol version, the name that
was certified). A
refusal is sent when there is somebody to send it to, logged, and handed to ``on_refusal`` for the audit log. A
certificate outlives a membership: what a peer
may call follows from the layout in force (``membership``), and is judged again, for connections that stand too,
whenever that changes (``judge_again``). A certificate
that is over ends its connection (``expiry``).

A request is answered in one of three ways (``ports.Method``): at once, on the event loop, where nothing needs waiting;
by a callback, of what ``begin`` took on,
mostly when a disk has written it; else by a task. A task ends early, cancelled, when its caller withdraws the call, its
deadline has passed or the connection is gone.
What was taken on can't be stopped: it is then let go instead, its place and its bytes are free, and an answer that
comes after all goes nowhere. A stopping
server waits for tasks and for what it did not let go, each for ``drain_s``.

What requests hold in memory is bounded twice, per connection and per server: before a body is received its bytes are
taken
from both budgets, answers with large bodies count until they have left, and when a budget is used up the server stops
reading from that
connection: TCP carries the back-pressure to the caller. A single body larger than a budget is admitted when nothing
else is in flight; answers
of handlers that run already come on top, so their number is bounded too. What a disk that hangs still holds of calls
that were let go is in no budget of the
server's, for a budget that never comes back would end the traffic with the node's other disks: whoever takes calls on
bounds what it has in hand itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import structlog
from msgspec import MsgspecError

from storaged.clock import Clock, SystemClock
from storaged.cluster import identity
from storaged.cluster.ports import Admission, Begin, Call, Membership, Method, Methods, PeerIdentity, Reply
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.connection import SMALL_BODY_BYTES, Connection, describe, measure
from storaged.cluster.rpc.expiry import expired, expiry_of
from storaged.cluster.rpc.framing import (
    CANCEL,
    HANDSHAKE_BYTES_MAX,
    PROTOCOL_VERSION,
    REPLY,
    REQUEST,
    TAKE,
    WAIT,
    FrameError,
    Hello,
    Kind,
    Verdict,
)
from storaged.errors import CertificateRefused, PortInUse, StoragedError
from storaged.ids import INCARNATION_BYTES, system_entropy
from storaged.units import MIB
from storaged.wire import Message, decode, encode

log = structlog.get_logger(__name__)

OnRefusal = Callable[[str, StoragedError], None]
"""``on_refusal(peer, error)``: ``peer`` is the certified name, or the network address of one who has none (without its
port: what a stranger does a thousand
times is one thing to record)."""

SWEEP_S = 0.25


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of one server. ``inflight``: bodies received or being answered."""

    connections_max: int = 1024
    handshakes_max: int = 64
    handlers_per_connection_max: int = 256
    inflight_bytes_per_connection_max: int = 32 * MIB
    inflight_bytes_max: int = 96 * MIB
    handshake_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    drain_s: float = 5.0


@dataclass(frozen=True)
class ServerStatistics:
    connections: int
    handlers_running: int
    inflight_bytes: int
    inflight_bytes_peak: int
    connections_waiting: int
    calls: int
    calls_failed: int
    calls_cancelled: int
    peers_refused: int
    bytes_in: int
    bytes_out: int
    peers: tuple[str, ...]


class Budget:
    """Bytes that may be in flight, given out in the order they were asked for."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._waiting: deque[tuple[int, ServerConnection]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def _fits(self, size: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + size <= self.limit_bytes

    def take(self, size: int) -> bool:
        if self._waiting or not self._fits(size):
            return False
        self.add(size)
        return True

    def add(self, size: int) -> None:
        """Counts what is there already (an answer), whether or not it fits."""
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def wait(self, size: int, connection: ServerConnection) -> None:
        self._waiting.append((size, connection))

    def forget(self, connection: ServerConnection) -> None:
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not connection)
        self._wake()

    def release(self, size: int) -> None:
        self.used_bytes -= size
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, connection = self._waiting.popleft()
            self.add(size)
            connection.granted(size)


class _Running(NamedTuple):
    """``task``: None for what was taken on without one. ``size``: of the body that comes free when it is let go; a
    task's callback sees to its own.
    """

    task: asyncio.Task[None] | None
    deadline: float
    size: int = 0


class ServerConnection(Connection):
    """One peer. ``peer`` is set once it is welcome."""

    answers = True

    def __init__(self, server: RpcServer) -> None:
        super().__init__(server.loop)
        self.server = server
        self.peer: PeerIdentity | None = None
        self.roles: frozenset[str] = frozenset()
        """In which the layout in force knows the peer."""
        self.expires_s = float("inf")
        """Seconds since 1970: when the peer's certificate is over."""
        self.caller: PeerIdentity | None = None
        """The peer with the roles in which the layout in force knows it: what handlers see."""
        self._methods: dict[bytes, Method] = {}
        """What it may call in these roles."""
        self.hello: asyncio.Future[Hello] = self.loop.create_future()
        self.running: dict[int, _Running] = {}
        self.inflight_bytes = 0
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
            return self._wait()
        elif body_bytes and not self.server.budget.take(body_bytes):
            self.server.budget.wait(body_bytes, self)
            return self._wait()
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
        limits = self.server.limits
        if len(self.running) >= limits.handlers_per_connection_max:
            return False
        return self.inflight_bytes == 0 or self.inflight_bytes + size <= limits.inflight_bytes_per_connection_max

    def _wait(self) -> Verdict:
        if self.transport is not None:
            self.transport.pause_reading()
        return WAIT

    def granted(self, size: int) -> None:
        """The server's budget has room for the body that this connection waits with."""
        self._granted = size
        self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.transport is None or not self.reader.waiting:
            return
        self._blocked = False
        try:
            self.reader.resume()
        except FrameError as error:
            self.broken(error)
        if not self.reader.waiting and self.is_open:
            self.transport.resume_reading()

    def deliver(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        if kind == REQUEST:
            self._receiving_bytes = 0
            self._begin(request_id, deadline_ms, head, body)
        elif kind == CANCEL:
            running = self.running.get(request_id)
            if running is not None:
                self.end_early(request_id, running)
        else:
            try:
                self.hello.set_result(decode(head, Hello))
            except MsgspecError as error:
                raise FrameError(f"the handshake does not decode: {error}") from error

    def dropped(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        self._receiving_bytes = 0
        self._release(len(body))

    def _begin(self, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        if request_id in self.running:
            self._release(len(body))
            raise FrameError(f"request id {request_id} is in use")
        assert self.peer is not None
        assert self.caller is not None
        self.server.calls += 1
        size = len(body)
        name_end = 1 + (head[0] if head else 0)
        name = bytes(head[1:name_end])
        try:
            method = self._methods.get(name) or self._method(name)
            request = decode(head[name_end:], method.request)
        except MsgspecError as error:
            self._fail(
                request_id,
                faults.refused(faults.BAD_MESSAGE, f"The request to {name.decode()} does not decode: {error}"),
            )
            self._release(size)
            return
        except StoragedError as error:
            self.server.call_refused(self.peer.name, error)
            self._fail(request_id, error)
            self._release(size)
            return
        call = Call(self.caller, body, self.loop.time() + deadline_ms / 1000)
        if method.at_once is not None and self._answered_at_once(request_id, name, method.at_once, request, call):
            if size:
                self._release(size)
            return
        if method.begin is not None and self._begun(request_id, size, name, method.begin, request, call):
            return
        task = self.loop.create_task(self._serve(request_id, name, method, request, call))
        self.running[request_id] = _Running(task, call.deadline)
        # Not a finally in the task: one that is cancelled before its first step never gets there.
        task.add_done_callback(partial(self._finished, request_id, size))

    # Answers.

    def alone(self) -> bool:
        return not self.running

    def know_as(self, roles: frozenset[str]) -> None:
        assert self.peer is not None
        self.roles = roles
        self.caller = self.peer._replace(roles=tuple(sorted(roles)))
        self._methods = {
            name: method for name, method in self.server.methods_by_name.items() if not method.roles.isdisjoint(roles)
        }

    def _method(self, name: bytes) -> Method:
        """What is not among those of its roles. Raises PeerRefused for one that there is not, or that this peer may not
        call.
        """
        method = self.server.methods_by_name.get(name)
        assert self.peer is not None
        if method is None:
            raise faults.refused(
                faults.UNKNOWN_METHOD, f"{self.server.identity.name} has no method {name.decode('ascii', 'replace')!r}."
            )
        if not self.roles and not method.for_strangers:
            raise faults.refused(
                faults.NOT_A_MEMBER,
                f"The layout in force at {self.server.identity.name} does not name {self.peer.name} where it stands.",
            )
        if method.roles.isdisjoint(self.roles) and not method.for_strangers:
            needed = ", ".join(sorted(method.roles)) or "no one"
            raise faults.refused(
                faults.ROLE_REFUSED,
                f"{name.decode()} is for {needed}; {self.peer.name} is {', '.join(sorted(self.roles))}.",
            )
        return method

    def _answered_at_once(
        self,
        request_id: int,
        name: bytes,
        at_once: Callable[[Any, Call], Message | Reply | None],
        request: Message,
        call: Call,
    ) -> bool:
        try:
            answer = at_once(request, call)
            if answer is not None:
                self._answer(request_id, answer)
        except StoragedError as error:
            self._fail(request_id, error)
        except Exception as error:
            log.exception("call failed", peer=call.peer.name, method=name.decode())
            self._fail(request_id, error)
        else:
            return answer is not None
        return True

    def _begun(self, request_id: int, size: int, name: bytes, begin: Begin, request: Message, call: Call) -> bool:
        running = self.running[request_id] = _Running(None, call.deadline, size)
        try:
            if begin(request, call, partial(self._begun_answered, request_id, running, name)):
                return True
        except Exception as error:
            self._begun_answered(request_id, running, name, error)
            return True
        del self.running[request_id]
        return False

    def _begun_answered(
        self, request_id: int, running: _Running, name: bytes, outcome: Message | Reply | Exception
    ) -> None:
        if self.running.get(request_id) is not running:
            return  # it was let go
        del self.running[request_id]
        if isinstance(outcome, Exception):
            if not isinstance(outcome, StoragedError):
                log.error(
                    "call failed", peer=self.peer.name if self.peer else "", method=name.decode(), exc_info=outcome
                )
            self._fail(request_id, outcome)
        else:
            self._answer(request_id, outcome)
        self._release(running.size)
        if self.server.drained is not None:
            self.server.look_whether_drained()

    def end_early(self, request_id: int, running: _Running) -> None:
        """Nobody waits for this call any more."""
        if running.task is not None:
            running.task.cancel()
            return
        del self.running[request_id]
        self.server.calls_cancelled += 1
        self._release(running.size)
        if self.server.drained is not None:
            self.server.look_whether_drained()

    def _answer(self, request_id: int, answer: Message | Reply) -> None:
        message, body = answer if isinstance(answer, Reply) else (answer, ())
        if body:
            pieces, reply_bytes = measure(body)
            self._send_bulk(request_id, encode(message), pieces, reply_bytes)
        else:
            self.send(REPLY, request_id, encode(message))

    async def _serve(self, request_id: int, name: bytes, method: Method, request: Message, call: Call) -> None:
        try:
            self._answer(request_id, await method.handler(request, call))
        except StoragedError as error:
            self._fail(request_id, error)
        except Exception as error:
            log.exception("call failed", peer=call.peer.name, method=name.decode())
            self._fail(request_id, error)

    def _finished(self, request_id: int, size: int, task: asyncio.Task[None]) -> None:
        self.running.pop(request_id, None)
        self.server.calls_cancelled += task.cancelled()
        self._release(size)

    def _send_bulk(
        self, request_id: int, head: bytes, pieces: tuple[bytes | bytearray | memoryview, ...], size: int
    ) -> None:
        counted = size if size > SMALL_BODY_BYTES else 0
        self.inflight_bytes += counted
        self.server.budget.add(counted)
        try:
            self.send(Kind.REPLY, request_id, head, pieces, size)
        except ValueError:
            self._release(counted)
            raise

    def _fail(self, request_id: int, error: Exception) -> None:
        self.server.calls_failed += 1
        self.send(Kind.ERROR, request_id, encode(faults.to_head(error)))

    def sent(self, request_id: int, size: int) -> None:
        self._release(size)

    def _release(self, size: int) -> None:
        self.inflight_bytes -= size
        self.server.budget.release(size)
        if self._blocked and self.reader.waiting:
            self.loop.call_soon(self._go_on)

    def closed(self) -> None:
        self.server.budget.forget(self)
        for held in (self._receiving_bytes, self._granted or 0):
            self.server.budget.release(held)
        self._receiving_bytes, self._granted = 0, None
        for request_id, running in list(self.running.items()):
            self.end_early(request_id, running)
        self._give_up(ConnectionResetError(self.reason))
        self.server.gone(self)

    def broken(self, error: FrameError) -> None:
        if self.peer is None and not self.hello.done():
            self._give_up(CertificateRefused(f"The handshake failed: {error}."))
        else:
            self.abort(str(error))

    def _give_up(self, error: Exception) -> None:
        if not self.hello.done():
            self.hello.set_exception(error)
            self.hello.exception()  # seen: nobody may be waiting for it yet


class RpcServer:
    """Answers ``methods`` on a TCP port, to peers that ``admission`` lets in.

    ``membership`` None: a peer has the roles of its certificate. ``incarnation`` (8 bytes) tells peers apart one start
    of this process from the next. Use: ``await start(host, port)`` ... ``await close()``.
    """

    def __init__(
        self,
        own: identity.Identity,
        methods: Methods,
        *,
        admission: Admission,
        membership: Membership | None = None,
        incarnation: bytes = b"",
        limits: ServerLimits | None = None,
        on_refusal: OnRefusal | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.identity = own
        self.limits = limits or ServerLimits()
        self._clock = clock if clock is not None else SystemClock()
        self.methods_by_name = {name.encode("ascii"): method for name, method in methods.items()}
        assert all(0 < len(name) < 256 for name in self.methods_by_name)
        self.budget = Budget(self.limits.inflight_bytes_max)
        self.calls = 0
        self.calls_failed = 0
        self.calls_cancelled = 0
        self._admission = admission
        self._membership: Membership = membership or (lambda peer: frozenset(peer.roles))
        self._incarnation = incarnation or system_entropy(INCARNATION_BYTES)
        self._on_refusal = on_refusal
        self._context = identity.server_context(own)
        self._connections: set[ServerConnection] = set()
        self._welcoming: dict[asyncio.Task[None], str] = {}
        """Handshakes under way, oldest first, and the host that each is with."""
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._refused = 0
        self.drained: asyncio.Event | None = None
        """While the server stops: set when nothing runs any more."""
        self._bytes_in_gone = 0
        self._bytes_out_gone = 0

    @property
    def port(self) -> int:
        """The port in use (as chosen by the system when 0 was asked for)."""
        port: int = self._listeners[0].getsockname()[1]
        return port

    async def start(self, host: str, port: int) -> None:
        """Listens on every address of ``host``. Raises PortInUse, or OSError for an address that is
        not this machine's.
        """
        self.loop = asyncio.get_running_loop()
        self._handshakes = asyncio.Semaphore(self.limits.handshakes_max)
        found = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, _type, _protocol, _name, address in sorted(set(found)):
                chosen = (address[0], self.port, *address[2:]) if self._listeners and port == 0 else address
                self._listeners.append(_listen(family, chosen))
        except OSError:
            for listener in self._listeners:
                listener.close()
            self._listeners.clear()
            raise
        self._accepting = [self.loop.create_task(self._accept(listener)) for listener in self._listeners]
        self._sweep_timer = self.loop.call_later(SWEEP_S, self._sweep)
        log.info("listening for nodes", host=host, port=self.port, node=self.identity.name)

    async def close(self) -> None:
        """Takes no more requests, lets those that run finish for ``drain_s``, then ends every connection."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for task in (*self._accepting, *self._welcoming):
            task.cancel()
        await asyncio.gather(*self._accepting, *self._welcoming, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        connections = list(self._connections)
        for connection in connections:
            if connection.transport is not None and not connection.reader.waiting:
                connection.transport.pause_reading()
        running = [
            entry.task for connection in connections for entry in connection.running.values() if entry.task is not None
        ]
        if running:
            _done, late = await asyncio.wait(running, timeout=self.limits.drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if any(connection.running for connection in connections):
            self.drained = asyncio.Event()  # what was taken on without a task: a disk answers it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.drained.wait(), self.limits.drain_s)
        for connection in connections:
            connection.close("this node is stopping")
        if connections:
            await asyncio.wait([connection.lost for connection in connections], timeout=1.0)
        for connection in connections:
            connection.abort("this node is stopping")
        self._accepting.clear()
        self._listeners.clear()

    def renew(self, own: identity.Identity) -> None:
        """New connections use the certificate that lies in the identity's directory now. Raises CertificateRefused and
        keeps the old one.
        """
        identity.renew(self._context, own)
        self.identity = own

    def judge_again(self) -> None:
        """The layout in force is another: peers that stand connected have the roles that it gives them from now on, and
        those it does not admit are let go.
        """
        for connection in list(self._connections):
            peer = connection.peer
            assert peer is not None
            connection.know_as(self._membership(peer))
            try:
                self._admission(peer)
            except StoragedError as error:
                self._end(connection, peer.name, error)

    def _end(self, connection: ServerConnection, name: str, error: StoragedError) -> None:
        """A peer that was let in is welcome no longer."""
        self._refused += 1
        log.warning("node refused", peer=name, code=error.code, reason=error.message)
        connection.abort(error.message)
        if self._on_refusal is not None:
            self._on_refusal(name, error)

    def statistics(self) -> ServerStatistics:
        connections = self._connections
        return ServerStatistics(
            connections=len(connections),
            handlers_running=sum(len(connection.running) for connection in connections),
            inflight_bytes=self.budget.used_bytes,
            inflight_bytes_peak=self.budget.peak_bytes,
            connections_waiting=sum(connection.reader.waiting for connection in connections),
            calls=self.calls,
            calls_failed=self.calls_failed,
            calls_cancelled=self.calls_cancelled,
            peers_refused=self._refused,
            bytes_in=self._bytes_in_gone + sum(connection.bytes_in for connection in connections),
            bytes_out=self._bytes_out_gone + sum(connection.bytes_out for connection in connections),
            peers=tuple(sorted(connection.peer.name for connection in connections if connection.peer is not None)),
        )

    def call_refused(self, peer: str, error: StoragedError) -> None:
        """A peer called what there is not, or what its roles don't allow: no honest node of this version does the
        second."""
        code = getattr(error, "remote_code", error.code)
        if code == faults.ROLE_REFUSED and self._on_refusal is not None:
            self._on_refusal(peer, error)
        else:
            log.warning("call refused", peer=peer, code=code, reason=error.message)

    def look_whether_drained(self) -> None:
        if self.drained is not None and not any(connection.running for connection in self._connections):
            self.drained.set()

    # Letting peers in.

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, address = await self.loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, mostly: those who are in must go on
                log.error("cannot accept a connection", reason=describe(error))
                await asyncio.sleep(SWEEP_S)
                continue
            try:
                if self._handshakes.locked():
                    self._make_way()
                await self._handshakes.acquire()
            except BaseException:
                accepted.close()
                raise
            task = self.loop.create_task(self._welcome(accepted, address[0]))
            self._welcoming[task] = address[0]
            task.add_done_callback(self._welcomed)

    def _make_way(self) -> None:
        """All handshakes that there may be are under way. Those who only connect and say nothing must not keep nodes
        out: the oldest handshake with the host that
        has most of them is ended. While every host has but one, the newcomer waits."""
        counts = Counter(self._welcoming.values())
        busiest, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            log.debug("too many handshakes; the oldest is ended", address=busiest)
            next(task for task, host in self._welcoming.items() if host == busiest).cancel()

    def _welcomed(self, task: asyncio.Task[None]) -> None:
        self._welcoming.pop(task, None)
        self._handshakes.release()
        if not task.cancelled() and task.exception() is not None:
            log.error("a handshake failed unexpectedly", reason=repr(task.exception()))

    async def _welcome(self, accepted: socket.socket, address: str) -> None:
        if len(self._connections) >= self.limits.connections_max:
            log.warning("connection refused: too many", address=address, connections_max=self.limits.connections_max)
            accepted.close()
            return
        connection = ServerConnection(self)
        who = address
        try:
            async with asyncio.timeout(self.limits.handshake_timeout_s):
                await self.loop.connect_accepted_socket(
                    lambda: connection,
                    accepted,
                    ssl=self._context,
                    ssl_handshake_timeout=self.limits.handshake_timeout_s,
                )
                certificate = connection.peer_certificate()
                peer, connection.expires_s = identity.identity_of(certificate), expiry_of(certificate)
                who = peer.name
                self._check_valid(connection, peer.name)
                self._admission(peer)
                self._judge(await connection.hello, peer)
        except StoragedError as error:
            self._refuse(connection, who, error)
        except ssl.SSLError as error:
            self._refuse(connection, who, CertificateRefused(f"TLS with {address} failed: {describe(error)}."))
        except (TimeoutError, OSError) as error:
            connection.abort("the handshake was not completed")
            log.debug("handshake not completed", address=address, reason=describe(error))
        except BaseException:
            connection.abort("the handshake was ended")
            raise
        else:
            self._let_in(connection, peer)

    def _check_valid(self, connection: ServerConnection, name: str) -> None:
        """Raises CertificateRefused once the peer's certificate is over."""
        if connection.expires_s <= self._clock.wall_ms() / 1000:
            raise expired(name, connection.expires_s)

    def _judge(self, hello: Hello, peer: PeerIdentity) -> None:
        own = self.identity
        if hello.version != PROTOCOL_VERSION:
            raise CertificateRefused(
                f"{peer.name} speaks protocol version {hello.version}, {own.name} {PROTOCOL_VERSION}."
            )
        for cluster in (hello.cluster, peer.cluster):
            if cluster != own.cluster:
                raise CertificateRefused(f"{peer.name} belongs to cluster {cluster!r}, {own.name} to {own.cluster!r}.")
        if hello.name != peer.name or len(hello.incarnation) != INCARNATION_BYTES:
            raise CertificateRefused(f"{peer.name} introduces itself as {hello.name!r}.")

    def _let_in(self, connection: ServerConnection, peer: PeerIdentity) -> None:
        if not connection.is_open:
            return
        connection.peer = peer
        connection.know_as(self._membership(peer))
        self._connections.add(connection)
        own = self.identity
        connection.send(Kind.WELCOME, 0, encode(Hello(own.cluster, own.name, self._incarnation, PROTOCOL_VERSION)))
        log.debug("node connected", peer=peer.name)

    def _refuse(self, connection: ServerConnection, who: str, error: StoragedError) -> None:
        self._refused += 1
        log.warning("node refused", peer=who, code=error.code, reason=error.message)
        if connection.is_open:
            connection.send(Kind.REFUSED, 0, encode(faults.to_head(error)))
            self.loop.call_soon(connection.close, error.message)
        if self._on_refusal is not None:
            self._on_refusal(who, error)

    def gone(self, connection: ServerConnection) -> None:
        self._bytes_in_gone += connection.bytes_in
        self._bytes_out_gone += connection.bytes_out
        if connection in self._connections:
            self._connections.discard(connection)
            peer = connection.peer.name if connection.peer is not None else ""
            log.debug("node disconnected", peer=peer, reason=connection.reason)

    def _sweep(self) -> None:
        now, wall_s = self.loop.time(), self._clock.wall_ms() / 1000
        for connection in list(self._connections):
            if connection.stalled_s(now) > self.limits.stall_timeout_s:
                connection.abort("the peer made no progress")
            if connection.expires_s <= wall_s and connection.is_open and connection.peer is not None:
                self._end(connection, connection.peer.name, expired(connection.peer.name, connection.expires_s))
            for request_id, running in [entry for entry in connection.running.items() if entry[1].deadline < now]:
                connection.end_early(request_id, running)
        self._sweep_timer = self.loop.call_later(SWEEP_S, self._sweep)


def _listen(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"{address[0]}:{address[1]} is already in use by another program.") from error
        raise
    return listener
