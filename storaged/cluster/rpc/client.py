"""The dialling side of the internode protocol: a pool with one link per node, which implements ``Caller``.

Theory of operation. A link dials when it is first needed and from then on keeps itself connected, with exponential
back-off and full jitter
(Brooker, "Exponential Backoff And Jitter", 2015). The first attempt after a connection broke is made at once, and calls
wait for its outcome; once
an attempt has failed the node counts as away, and calls fail immediately until a later attempt succeeds. So nobody
queues behind a dead node, and a
node that only restarted costs a few milliseconds.

A call is one frame out and one frame in. When its caller stops waiting (timeout, cancellation), the frame is withdrawn
if it has not left, else
the server is told to cancel it; an answer that comes anyway is skipped without being kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
from msgspec import MsgspecError

from storaged.clock import Clock, SystemClock
from storaged.cluster import identity
from storaged.cluster.ports import Admission, Call, Line, Methods, PeerIdentity, Reply, Then
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.connection import SMALL_BODY_BYTES, URGENT_BODY_BYTES, Connection, describe, measure
from storaged.cluster.rpc.expiry import FRESH_AGAIN_S, FRESH_BEFORE_S, expired, expiry_of
from storaged.cluster.rpc.framing import (
    DEADLINE_MS_MAX,
    ERROR,
    HANDSHAKE_BYTES_MAX,
    PROTOCOL_VERSION,
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
from storaged.cluster.rpc.server import OnRefusal
from storaged.errors import (
    CertificateRefused,
    JurisdictionRefused,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    StoragedError,
)
from storaged.ids import INCARNATION_BYTES, system_entropy
from storaged.units import MIB
from storaged.wire import MALFORMED, Buffer, Message, decode, decoder_of, encode

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=Message)
NO_BYTES = memoryview(b"")

_ANSWERS = (REPLY, ERROR)

ALONE_CALLS_MAX = 2
"""With so few calls out, another frame in this turn of the loop is unlikely: a lone PUT has two at one node for a
moment, sixty-four have twenty.
"""

Addresses = Callable[[str], str | None] | Mapping[str, str]
"""Node name -> ``host:port`` of its RPC server; None for a node that has none or is in no layout."""


@dataclass(frozen=True)
class PoolLimits:
    """``queued_bytes_max``: bodies that wait for one peer's transport; further calls wait for room (within their own
    timeout).
    """

    connect_timeout_s: float = 3.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    queued_bytes_max: int = 32 * MIB
    calls_per_connection_max: int = 4096
    stall_timeout_s: float = 30.0


@dataclass(frozen=True)
class LinkStatistics:
    """One peer as this node sees it. ``state``: connecting, connected, away."""

    node: str
    state: str
    reason: str
    connects: int
    calls_pending: int
    queued_bytes: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class PoolStatistics:
    calls: int
    calls_local: int
    calls_failed: int
    calls_timed_out: int
    links: tuple[LinkStatistics, ...]


@dataclass
class _Calls:
    """Counts since the start."""

    total: int = 0
    local: int = 0
    failed: int = 0
    timed_out: int = 0

    def saw(self, error: PeerError) -> None:
        if isinstance(error, PeerTimeout):
            self.timed_out += 1
        else:
            self.failed += 1


_Pending = tuple[Then, Callable[[memoryview], Message], float, str]
"""A call that waits for its answer: who is told, how the answer is decoded, its deadline, its method."""


class ClientConnection(Connection):
    """A connection to ``node``. Usable once ``hello`` is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, node: str, limits: PoolLimits, calls: _Calls) -> None:
        super().__init__(loop)
        self.node = node
        self.limits = limits
        self.calls = calls
        self.expires_s = float("inf")
        """Seconds since 1970: when the peer's certificate, or our own, is over."""
        self.fresh_at_s = float("inf")
        """When to try for a connection that lasts longer."""
        self.hello: asyncio.Future[Hello] = loop.create_future()
        self.pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._room: list[asyncio.Future[None]] = []
        self._expiry: asyncio.TimerHandle | None = None  # of the call that expires first
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
            self._greet(kind, head)
            return
        then, decode_reply, _deadline, method = pending
        answer: Any
        try:
            answer = decode_reply(head) if kind == REPLY else self._counted(self._error_in(head))
        except MALFORMED as error:
            answer = self._counted(
                faults.refused(faults.BAD_REPLY, f"The answer of {self.node} does not decode: {error}")
            )
        try:
            then(answer, body)
        except Exception:
            self._log_mistake(method)
        if self._room:
            self._make_room()

    def _error_in(self, head: memoryview) -> PeerError:
        return faults.from_head(decode(head, ErrorHead), self.node)

    def _log_mistake(self, method: str) -> None:
        """Of who asked: others that wait are told all the same, and keep their connection."""
        log.exception("telling of a call's answer failed", peer=self.node, method=method)

    def _greet(self, kind: int, head: memoryview) -> None:
        if self.hello.done():
            return  # an answer whose caller left while it was being received
        try:
            if kind == Kind.WELCOME:
                self.hello.set_result(decode(head, Hello))
            else:
                refusal = decode(head, ErrorHead)
                self._give_up(
                    CertificateRefused(
                        f"{self.node} refuses this node: {faults.plain(refusal.message)}", refused_with=refusal.code
                    )
                )
        except MsgspecError as error:
            raise FrameError(f"the handshake does not decode: {error}") from error

    def _give_up(self, error: Exception) -> None:
        if not self.hello.done():
            self.hello.set_exception(error)
            self.hello.exception()  # seen: nobody may be waiting for it yet

    def closed(self) -> None:
        self._give_up(ConnectionResetError(self.reason))
        pending, self.pending = self.pending, {}
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        for entry in pending.values():
            self._fail(entry, PeerUnreachable(f"The connection to {self.node} broke: {self.reason}."))
        self._make_room()

    # Calls.

    def alone(self) -> bool:
        return len(self.pending) <= ALONE_CALLS_MAX

    async def call(
        self, method: str, request: bytes, reply: type[T], body: Sequence[Buffer], deadline: float
    ) -> tuple[T, memoryview]:
        """``request``: the frame's head, whole. Raises PeerError; ValueError when the request is
        over a frame's limits.
        """
        while self.is_open and not self.has_room:
            await self._wait_for_room(deadline)
        if not self.is_open:
            raise self._counted(PeerUnreachable(f"The connection to {self.node} broke: {self.reason}."))
        future: asyncio.Future[tuple[Any, memoryview]] = self.loop.create_future()
        request_id = self.post(
            method, request, decoder_of(reply), body, deadline - self.loop.time(), partial(_resolve, future)
        )
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(request_id)
            raise

    @property
    def has_room(self) -> bool:
        return (
            self.queued_bytes <= self.limits.queued_bytes_max
            and len(self.pending) < self.limits.calls_per_connection_max
        )

    def post(
        self,
        method: str,
        head: bytes,
        decode_reply: Callable[[memoryview], Message],
        body: Sequence[Buffer],
        timeout_s: float,
        then: Then,
        small_bytes_max: int = SMALL_BODY_BYTES,
    ) -> int:
        """Sends a request; its id, or 0 when the connection is not open or has no room. Raises ValueError when it is
        over a frame's limits.
        """
        transport, pending, limits = self.transport, self.pending, self.limits
        if (  # ``is_open`` and ``has_room``, without their calls: for every frame
            transport is None
            or transport.is_closing()
            or self.queued_bytes > limits.queued_bytes_max
            or len(pending) >= limits.calls_per_connection_max
        ):
            return 0
        request_id = self._last_id = self._last_id + 1
        deadline_ms = min(max(int(timeout_s * 1000), 1), DEADLINE_MS_MAX)
        if body:
            self.send(REQUEST, request_id, head, *measure(body), deadline_ms, small_bytes_max)
        else:
            self.send(REQUEST, request_id, head, (), 0, deadline_ms)
        deadline = self.loop.time() + timeout_s
        pending[request_id] = (then, decode_reply, deadline, method)
        if self._expiry is None or deadline < self._expires_at:
            self._set_expiry(deadline)
        return request_id

    def _set_expiry(self, deadline: float) -> None:
        """One timer for all calls: it rings for the earliest, and most have been answered by then."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = self.loop.call_at(deadline, self._expire)
        self._expires_at = deadline  # a timer of uvloop that rings at once does not say when

    def _expire(self) -> None:
        self._expiry = None
        now = self.loop.time()
        for request_id, entry in [(request_id, entry) for request_id, entry in self.pending.items() if entry[2] <= now]:
            if self._abandon(request_id) is not None:
                self._fail(entry, PeerTimeout(f"{self.node} did not answer {entry[3]} in time."))
        if self.pending:
            self._set_expiry(min(deadline for _then, _decode, deadline, _method in self.pending.values()))

    def _fail(self, entry: _Pending, error: PeerError) -> None:
        then, _decode_reply, _deadline, method = entry
        try:
            then(self._counted(error), NO_BYTES)
        except Exception:
            self._log_mistake(method)

    def _counted(self, error: PeerError) -> PeerError:
        self.calls.saw(error)
        return error

    def _abandon(self, request_id: int) -> _Pending | None:
        entry = self.pending.pop(request_id, None)
        if entry is not None:
            if not self.withdraw(request_id):
                self.send(Kind.CANCEL, request_id, b"")
            if self._room:
                self._make_room()
        return entry

    async def _wait_for_room(self, deadline: float) -> None:
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._room.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        except TimeoutError:
            raise self._counted(
                PeerTimeout(f"{self.node} takes no more: {self.queued_bytes} bytes wait for it.")
            ) from None
        finally:
            with contextlib.suppress(ValueError):
                self._room.remove(waiter)

    def _make_room(self) -> None:
        waiters, self._room = self._room, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def sent(self, request_id: int, size: int) -> None:
        if self._room:
            self._make_room()


def _resolve(future: asyncio.Future[tuple[Any, memoryview]], answer: Any, bulk: memoryview) -> None:
    if future.done():
        return
    if isinstance(answer, PeerError):
        future.set_exception(answer)
    else:
        future.set_result((answer, bulk))


class _Link:
    """Keeps one peer connected. ``attempt`` is the dial whose outcome calls wait for; None while the node counts as
    away.
    """

    def __init__(self, pool: RpcPool, node: str) -> None:
        self.pool = pool
        self.node = node
        self.connection: ClientConnection | None = None
        self.incarnation = b""
        self.reason = ""
        self.connects = 0
        self.attempt: asyncio.Future[ClientConnection] | None = pool.loop.create_future()
        self.renewed = asyncio.Event()
        """A connection under newer certificates is to take the place of the one in use."""
        self.retired: list[ClientConnection] = []
        """Connections whose place was taken: they end with the calls that are under way on them."""
        self.task = pool.loop.create_task(self._run())

    @property
    def state(self) -> str:
        if self.connection is not None:
            return "connected"
        return "away" if self.attempt is None else "connecting"

    async def _run(self) -> None:
        limits = self.pool.limits
        failures = 0
        while True:
            try:
                connection = await self._dial()
            except (
                Exception
            ) as error:  # whatever it is: a link that gave up for good would make a node unreachable until a restart
                self._away(error)
            else:
                self._arrived(connection)
                began = self.pool.loop.time()
                connection = await self._lost(connection)
                self.connection = None
                if self.pool.loop.time() - began >= limits.backoff_max_s:
                    failures = 0
                    self.attempt = self.pool.loop.create_future()
                    continue
                self._away(ConnectionResetError(connection.reason))
            failures += 1
            longest_s = min(limits.backoff_first_s * 2 ** min(failures, 16), limits.backoff_max_s)
            await asyncio.sleep(limits.backoff_first_s / 2 + longest_s * self.pool.jitter())

    async def _lost(self, connection: ClientConnection) -> ClientConnection:
        """The connection that was lost: this one, or the last of those that have taken its place meanwhile."""
        while not connection.lost.done():
            renewed = asyncio.ensure_future(self.renewed.wait())
            try:
                await asyncio.wait((connection.lost, renewed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                renewed.cancel()
            if connection.lost.done():
                break
            try:
                fresh = await self._dial()
            except Exception as error:  # the old one may still do; once it is over, this is what there is
                log.info("no newer connection yet", peer=self.node, reason=describe(error))
                continue
            self.connects += 1
            self.retired.append(connection)
            self.connection = connection = fresh
        return connection

    def look_at_expiry(self, wall_s: float) -> None:
        """Ends what is over, and sees to a successor in time."""
        for connection in list(self.retired):
            if not connection.pending or connection.expires_s <= wall_s:
                connection.close("a newer connection has taken its place")
                self.retired.remove(connection)
        current = self.connection
        if current is None:
            return
        if current.expires_s <= wall_s:
            current.abort("its certificate, or this node's, has expired")
        elif current.fresh_at_s <= wall_s:
            current.fresh_at_s = wall_s + FRESH_AGAIN_S
            self.renewed.set()

    async def _dial(self) -> ClientConnection:
        pool, node = self.pool, self.node
        self.renewed.clear()
        host, port = pool.endpoint(node)
        connection = ClientConnection(pool.loop, node, pool.limits, pool.calls)
        try:
            async with asyncio.timeout(pool.limits.connect_timeout_s):
                await pool.loop.create_connection(
                    lambda: connection, host, port, ssl=pool.context, server_hostname=node
                )
                certificate, own = connection.peer_certificate(), pool.identity
                peer, peer_expires_s = identity.identity_of(certificate), expiry_of(certificate)
                connection.expires_s = min(peer_expires_s, own.expires.timestamp())
                connection.fresh_at_s = connection.expires_s - FRESH_BEFORE_S
                if peer_expires_s <= pool.clock.wall_ms() / 1000:
                    raise expired(node, peer_expires_s)
                pool.judge(node, peer)
                connection.send(
                    Kind.HELLO, 0, encode(Hello(own.cluster, own.name, pool.incarnation_bytes, PROTOCOL_VERSION))
                )
                hello = await connection.hello
                if (hello.cluster, hello.name, hello.version) != (own.cluster, node, PROTOCOL_VERSION):
                    raise CertificateRefused(
                        f"{node} answers as {hello.name!r} of cluster {hello.cluster!r}, protocol version"
                        f" {hello.version}."
                    )
        except ssl.SSLCertVerificationError as error:
            connection.abort(describe(error))
            raise CertificateRefused(f"{node} at {host}:{port} is not of this cluster: {describe(error)}.") from error
        except BaseException as error:
            connection.abort(describe(error))
            raise
        self.incarnation = hello.incarnation
        return connection

    def _arrived(self, connection: ClientConnection) -> None:
        if self.attempt is None:
            log.info("node is back", peer=self.node)
        self.connects += 1
        self.connection = connection
        self.reason = ""
        attempt, self.attempt = self.attempt, None
        if attempt is not None and not attempt.done():
            attempt.set_result(connection)
        self.pool.tell(self.node, True)

    def _away(self, error: Exception) -> None:
        reason = error.message if isinstance(error, StoragedError) else describe(error)
        if (
            isinstance(error, CertificateRefused | JurisdictionRefused)
            and self.pool.on_refusal is not None
            and reason != self.reason
        ):
            self.pool.on_refusal(self.node, error)
        if reason != self.reason:
            log.warning("node is away", peer=self.node, reason=reason)
        self._fail_waiting(reason)
        self.pool.tell(self.node, False)

    def _fail_waiting(self, reason: str) -> None:
        self.reason = reason
        attempt, self.attempt = self.attempt, None
        if attempt is not None and not attempt.done():
            attempt.set_exception(PeerUnreachable(f"{self.node} is away: {reason}"))
            attempt.exception()  # seen: nobody may be waiting for it

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self._fail_waiting("this node is stopping")
        for retired in self.retired:
            retired.abort("this node is stopping")
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.close("this node is stopping")
            await asyncio.wait([connection.lost], timeout=0.5)
            connection.abort("this node is stopping")

    def statistics(self) -> LinkStatistics:
        connection = self.connection
        return LinkStatistics(
            node=self.node,
            state=self.state,
            reason=self.reason,
            connects=self.connects,
            calls_pending=len(connection.pending) if connection else 0,
            queued_bytes=connection.queued_bytes if connection else 0,
            bytes_in=connection.bytes_in if connection else 0,
            bytes_out=connection.bytes_out if connection else 0,
        )


class RpcPool:
    """A ``Caller`` over mutual TLS. A call to ``local_name`` goes straight to ``local_methods``.

    With a mapping of addresses all nodes are dialled at ``start``, with a function each when it is first called.
    ``jitter`` gives numbers in [0, 1).
    """

    def __init__(
        self,
        own: identity.Identity,
        *,
        addresses: Addresses,
        admission: Admission,
        local_name: str = "",
        local_methods: Methods | None = None,
        incarnation: bytes = b"",
        limits: PoolLimits | None = None,
        on_refusal: OnRefusal | None = None,
        jitter: Callable[[], float] = random.random,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock if clock is not None else SystemClock()
        self.identity = own
        self.context = identity.client_context(own)
        self.limits = limits or PoolLimits()
        self.incarnation_bytes = incarnation or system_entropy(INCARNATION_BYTES)
        self.on_refusal = on_refusal
        self.jitter = jitter
        self._addresses = addresses
        self._admission = admission
        self._local_name = local_name or own.name
        self._local_methods: Methods = local_methods if local_methods is not None else {}
        self._links: dict[str, _Link] = {}
        self._prefixes: dict[str, bytes] = {}
        self._watchers: list[Callable[[str, bool], None]] = []
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._running = False
        self.calls = _Calls()

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._running = True
        self._sweep_timer = self.loop.call_later(1.0, self._sweep)
        if isinstance(self._addresses, Mapping):
            for node in self._addresses:
                if node != self._local_name:
                    self._links[node] = _Link(self, node)

    async def close(self) -> None:
        """Calls under way fail with PeerUnreachable."""
        self._running = False
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))

    def renew(self, own: identity.Identity) -> None:
        """Connections are made anew under the certificate that lies in the identity's directory now; calls under way
        are not broken. Raises CertificateRefused and keeps the old one."""
        identity.renew(self.context, own)
        self.identity = own
        for link in self._links.values():
            link.renewed.set()

    # What is known of peers.

    def watch(self, watcher: Callable[[str, bool], None]) -> None:
        """``watcher(node, reached)`` is called when a connection stands, and when an attempt to make one failed."""
        self._watchers.append(watcher)

    def tell(self, node: str, reached: bool) -> None:
        for watcher in self._watchers:
            watcher(node, reached)

    def connected(self, node: str) -> bool:
        link = self._links.get(node)
        return node == self._local_name or (
            link is not None and link.connection is not None and link.connection.is_open
        )

    def away(self, node: str) -> str:
        """Why calls to a node fail at once; empty while it is connected or being dialled."""
        link = self._links.get(node)
        return link.reason or "away" if link is not None and link.state == "away" else ""

    def heard(self, node: str) -> float | None:
        """When (the loop's seconds) the last byte came from a node on the connection in use; None without one."""
        link = self._links.get(node)
        return link.connection.heard if link is not None and link.connection is not None else None

    def incarnation(self, node: str) -> bytes:
        """Of the process that answers as ``node`` (its last, while it is away); empty when it was never reached."""
        link = self._links.get(node)
        return self.incarnation_bytes if node == self._local_name else link.incarnation if link is not None else b""

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            calls=self.calls.total,
            calls_local=self.calls.local,
            calls_failed=self.calls.failed,
            calls_timed_out=self.calls.timed_out,
            links=tuple(self._links[node].statistics() for node in sorted(self._links)),
        )

    def endpoint(self, node: str) -> tuple[str, int]:
        """Raises PeerUnreachable."""
        address = self._addresses.get(node) if isinstance(self._addresses, Mapping) else self._addresses(node)
        host, _, port = (address or "").rpartition(":")
        if not host or not port.isdecimal():
            raise PeerUnreachable(
                f"No address of {node} is known." if not address else f"{address!r} is not host:port."
            )
        return host.strip("[]"), int(port)

    def judge(self, node: str, peer: PeerIdentity) -> None:
        if peer.name != node:
            raise CertificateRefused(f"The certificate at {node}'s address is {peer.name}'s.")
        if peer.cluster != self.identity.cluster:
            raise CertificateRefused(
                f"{node} belongs to cluster {peer.cluster!r}, {self.identity.name} to {self.identity.cluster!r}."
            )
        self._admission(peer)

    # Calls.

    async def call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[T],
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> tuple[T, memoryview]:
        self.calls.total += 1
        if node == self._local_name:
            try:
                return await self._call_local(method, request, reply, body, timeout_s)
            except PeerError as error:
                self.calls.saw(error)
                raise
        deadline = self.loop.time() + timeout_s
        link = self._links.get(node)
        connection = link.connection if link is not None else None
        if connection is None:
            try:
                connection = await self._connection(node, deadline)
            except PeerError as error:
                self.calls.saw(error)
                raise
        return await connection.call(method, self._prefix(method) + encode(request), reply, body, deadline)

    def post(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        then: Then,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> bool:
        """See ``ports.Poster``."""
        return self._post(node, method, decoder_of(reply), self._prefix(method), encode(request), then, body, timeout_s)

    def line(self, node: str, method: str, reply: type[Message], start: bytes, *, urgent: bool = False) -> Line:
        """See ``ports.Poster``."""
        small_bytes_max = URGENT_BODY_BYTES if urgent else SMALL_BODY_BYTES
        return partial(
            self._post, node, method, decoder_of(reply), self._prefix(method) + start, small_bytes_max=small_bytes_max
        )

    def _post(
        self,
        node: str,
        method: str,
        decode_reply: Callable[[memoryview], Message],
        start: bytes,
        rest: bytes,
        then: Then,
        body: Sequence[Buffer],
        timeout_s: float,
        small_bytes_max: int = SMALL_BODY_BYTES,
    ) -> bool:
        link = self._links.get(node)
        connection = link.connection if link is not None else None
        if connection is None or not connection.post(
            method, start + rest, decode_reply, body, timeout_s, then, small_bytes_max
        ):
            return False
        self.calls.total += 1
        return True

    def _prefix(self, method: str) -> bytes:
        prefix = self._prefixes.get(method)
        if prefix is None:
            name = method.encode("ascii")
            prefix = self._prefixes[method] = bytes([len(name)]) + name
        return prefix

    async def _connection(self, node: str, deadline: float) -> ClientConnection:
        if not self._running:
            raise PeerUnreachable("This node is stopping.")
        link = self._links.get(node)
        if link is None:
            self.endpoint(node)  # only nodes that have an address get a link: their number is the layout's
            link = self._links[node] = _Link(self, node)
        if link.attempt is None:
            raise PeerUnreachable(f"{node} is away: {link.reason}")
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(link.attempt)
        except TimeoutError:
            raise PeerTimeout(f"{node} was not reached in time.") from None

    async def _call_local(
        self, name: str, request: Message, reply: type[T], body: Sequence[Buffer], timeout_s: float
    ) -> tuple[T, memoryview]:
        """The same answers and errors as over the network; the body's bytes are the caller's, so what the handler keeps
        is copied out.
        """
        self.calls.local += 1
        own = self.identity.peer
        method = self._local_methods.get(name)
        if method is None:
            raise faults.refused(faults.UNKNOWN_METHOD, f"{own.name} has no method {name!r}.")
        if method.roles.isdisjoint(own.roles):
            raise faults.refused(
                faults.ROLE_REFUSED,
                f"{name} is for {', '.join(sorted(method.roles))}; {own.name} is {', '.join(own.roles)}.",
            )
        if not isinstance(request, method.request):
            raise faults.refused(
                faults.BAD_MESSAGE, f"{name} takes {method.request.__name__}, not {type(request).__name__}."
            )
        flat, _size = measure(body)
        sent = memoryview(flat[0] if len(flat) == 1 else b"".join(flat))
        deadline = self.loop.time() + timeout_s
        expiry = asyncio.timeout_at(deadline)
        try:
            async with expiry:
                answer = await method.handler(request, Call(own, sent, deadline))
        except Exception as error:
            if expiry.expired():
                raise PeerTimeout(f"{name} on this node took too long.") from None
            if not isinstance(error, StoragedError):
                log.exception("call failed", peer=own.name, method=name)
            raise faults.as_peer_error(error, own.name) from error
        message, pieces = answer if isinstance(answer, Reply) else (answer, ())
        if not isinstance(message, reply):
            raise faults.refused(faults.BAD_REPLY, f"{name} answers {type(message).__name__}, not {reply.__name__}.")
        return message, memoryview(b"".join(pieces))

    def _sweep(self) -> None:
        now = self.loop.time()
        for link in list(self._links.values()):
            if link.connection is not None and link.connection.stalled_s(now) > self.limits.stall_timeout_s:
                link.connection.abort("the peer made no progress")
            link.look_at_expiry(self.clock.wall_ms() / 1000)
        self._sweep_timer = self.loop.call_later(1.0, self._sweep)
