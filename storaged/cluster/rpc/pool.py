"""Calls methods on other nodes over one link per node; implements ``ports.Caller``, ``TryCaller`` and
``BeginCaller``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster import identity, tls
from storaged.cluster.ports import Call, EncodedCall, Method, Methods, OnReply, PeerChecks, PeerIdentity, Reply
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.client_connection import CallCounts, ClientConnection, PoolLimits
from storaged.cluster.rpc.connection import SMALL_BODY_BYTES, URGENT_BODY_BYTES, measure
from storaged.cluster.rpc.handshake import offer_packets
from storaged.cluster.rpc.link import Addresses, Dialler, Link, LinkStatistics
from storaged.errors import PeerError, PeerTimeout, PeerUnreachable, StoragedError
from storaged.ids import INCARNATION_BYTES, system_entropy
from storaged.wire import Buffer, Message, decoder_of, encode

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=Message)

SWEEP_S = 1.0


@dataclass(frozen=True)
class PoolStatistics:
    calls: int
    calls_local: int
    calls_failed: int
    calls_timed_out: int
    links: tuple[LinkStatistics, ...]


class RpcPool:
    """A ``Caller`` over mutual TLS. With ``local_methods``, a call to this node's own name goes straight to them.

    Where ``addresses`` is a mapping, ``start`` dials all its nodes. Where it is a function, a node is dialled at the
    first call to it.
    """

    def __init__(
        self,
        own: identity.Identity,
        *,
        addresses: Addresses,
        checks: PeerChecks,
        local_methods: Methods | None = None,
        incarnation: bytes = b"",
        limits: PoolLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock if clock is not None else SystemClock()
        self._identity = own
        self._tls = tls.client_context(own)
        offer_packets(self._tls)
        self._limits = limits or PoolLimits()
        self._incarnation = incarnation or system_entropy(INCARNATION_BYTES)
        self._addresses = addresses
        self._checks = checks
        self._local_name = own.name if local_methods is not None else ""
        self._local_methods: Methods = local_methods if local_methods is not None else {}
        self._links: dict[str, Link] = {}
        self._prefixes: dict[str, bytes] = {}
        self._watchers: list[Callable[[str, bool], None]] = []
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._running = False
        self._counts = CallCounts()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._dialler = Dialler(
            loop=self._loop,
            own=self._identity,
            tls=self._tls,
            incarnation=self._incarnation,
            limits=self._limits,
            addresses=self._addresses,
            checks=self._checks,
            clock=self._clock,
            counts=self._counts,
            watchers=self._watchers,
        )
        self._running = True
        self._sweep_timer = self._loop.call_later(SWEEP_S, self._sweep)
        if isinstance(self._addresses, Mapping):
            for node in self._addresses:
                if node != self._identity.name:
                    self._links[node] = Link(self._dialler, node)

    async def close(self) -> None:
        """Closes every connection. Calls under way fail with PeerUnreachable."""
        self._running = False
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))

    def renew(self, own: identity.Identity) -> None:
        """Replaces all connections by new ones under the certificate that is in the identity's directory now.

        Calls under way are not interrupted. Raises CertificateRefused and keeps the old certificate.
        """
        tls.renew(self._tls, own)
        self._identity = self._dialler.own = own
        for link in self._links.values():
            link.redial.set()

    def recheck_peers(self, admission: Callable[[PeerIdentity], None]) -> None:
        """Ends the connections to peers that ``admission`` does not admit any more; calls under way on them fail."""
        for link in list(self._links.values()):
            link.recheck(admission)

    # The state of peers.

    def watch(self, watcher: Callable[[str, bool], None]) -> None:
        """``watcher(node, reached)`` is called when a connection is made, and when an attempt to make one failed."""
        self._watchers.append(watcher)

    def connected(self, node: str) -> bool:
        link = self._links.get(node)
        return node == self._local_name or (
            link is not None and link.connection is not None and link.connection.is_open
        )

    def away_reason(self, node: str) -> str:
        """Why calls to a node fail at once; empty while it is connected or being dialled."""
        link = self._links.get(node)
        return link.reason or "away" if link is not None and link.state == "away" else ""

    def last_read_at(self, node: str) -> float | None:
        """When the last byte came from a node on its current connection (the loop's seconds); None without one."""
        link = self._links.get(node)
        return link.connection.last_read_at if link is not None and link.connection is not None else None

    def incarnation(self, node: str) -> bytes:
        """The incarnation of the process that answers as ``node``, or the last known one while the node is away.

        Empty when the node was never reached.
        """
        link = self._links.get(node)
        return self._incarnation if node == self._local_name else link.incarnation if link is not None else b""

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            calls=self._counts.total,
            calls_local=self._counts.local,
            calls_failed=self._counts.failed,
            calls_timed_out=self._counts.timed_out,
            links=tuple(self._links[node].statistics() for node in sorted(self._links)),
        )

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
        """See ``ports.Caller``."""
        self._counts.total += 1
        if node == self._local_name:
            try:
                return await self._call_local(method, request, reply, body, timeout_s)
            except PeerError as error:
                self._counts.count_failure(error)
                raise
        deadline = self._loop.time() + timeout_s
        link = self._links.get(node)
        connection = link.connection if link is not None else None
        if connection is None:
            try:
                connection = await self._connection(node, deadline)
            except PeerError as error:
                self._counts.count_failure(error)
                raise
        return await connection.call(method, self._prefix(method) + encode(request), reply, body, deadline)

    def try_call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        on_reply: OnReply,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> bool:
        """See ``ports.TryCaller``."""
        return self._try_call(
            node, method, decoder_of(reply), self._prefix(method), encode(request), on_reply, body, timeout_s
        )

    def begin_call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        on_reply: OnReply,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> Callable[[], object] | None:
        """See ``ports.BeginCaller``."""
        link = self._links.get(node)
        connection = link.connection if link is not None else None
        if connection is None:
            return None
        head = self._prefix(method) + encode(request)
        request_id = connection.try_call(method, head, decoder_of(reply), body, timeout_s, on_reply)
        if not request_id:
            return None
        self._counts.total += 1
        return partial(connection.abandon, request_id)

    def encoded_call(
        self,
        node: str,
        method: str,
        reply: type[Message],
        prefix: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        """See ``ports.TryCaller``."""
        small_bytes_max = URGENT_BODY_BYTES if urgent else SMALL_BODY_BYTES
        head_prefix = self._prefix(method) + prefix
        return partial(
            self._try_call,
            node,
            method,
            decoder_of(reply),
            head_prefix,
            small_bytes_max=small_bytes_max,
            followed=followed,
        )

    def _try_call(
        self,
        node: str,
        method: str,
        decode_reply: Callable[[memoryview], Message],
        prefix: bytes,
        rest: bytes,
        on_reply: OnReply,
        body: Sequence[Buffer],
        timeout_s: float,
        small_bytes_max: int = SMALL_BODY_BYTES,
        followed: bool = False,
    ) -> bool:
        """The common end of ``try_call`` and ``encoded_call``, with flat arguments: it runs for every frame."""
        link = self._links.get(node)
        connection = link.connection if link is not None else None
        if connection is None or not connection.try_call(
            method, prefix + rest, decode_reply, body, timeout_s, on_reply, small_bytes_max, followed
        ):
            return False
        self._counts.total += 1
        return True

    def _prefix(self, method: str) -> bytes:
        """How the head of a request begins: the method's name after its length."""
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
            self._dialler.endpoint(node)  # only a node with an address gets a link: the layout bounds their number
            link = self._links[node] = Link(self._dialler, node)
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
        """Gives the same answers and errors as a call over the network.

        The body's buffers stay the caller's, so the handler copies what it keeps.
        """
        self._counts.local += 1
        own = self._identity.peer
        method = _local_method(self._local_methods, name, request, own)
        flat, _size = measure(body)
        sent = memoryview(flat[0] if len(flat) == 1 else b"".join(flat))
        deadline = self._loop.time() + timeout_s
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
        now = self._loop.time()
        for link in list(self._links.values()):
            if link.connection is not None and link.connection.stalled_s(now) > self._limits.stall_timeout_s:
                link.connection.abort("the peer made no progress")
            link.check_expiry(self._clock.wall_ms() / 1000)
        self._sweep_timer = self._loop.call_later(SWEEP_S, self._sweep)


def _local_method(methods: Methods, name: str, request: Message, own: PeerIdentity) -> Method:
    """The method to call on this node. Raises PeerRefused where the server of another node would."""
    method = methods.get(name)
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
    return method
