"""Keeps this node connected to one peer.

Theory of operation. A link dials when it is first needed and from then on keeps itself connected, with exponential
back-off and full jitter (Brooker, "Exponential Backoff And Jitter", 2015). It makes the first attempt at once after a
connection broke, and calls wait for its outcome. Once an attempt has failed, the node counts as away, and calls fail at
once until a later attempt succeeds. So no call queues for a dead node, and a node that only restarted costs a few
milliseconds.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from storaged.clock import Clock
from storaged.cluster import identity
from storaged.cluster.ports import PeerChecks, PeerIdentity
from storaged.cluster.rpc.client_connection import CallCounts, ClientConnection, PoolLimits
from storaged.cluster.rpc.connection import describe
from storaged.cluster.rpc.expiry import REDIAL_BEFORE_S, REDIAL_INTERVAL_S, expired, expiry_of
from storaged.cluster.rpc.framing import PROTOCOL_VERSION, Hello, Kind
from storaged.errors import (
    CertificateRefused,
    CertificateRevoked,
    JurisdictionRefused,
    PeerRefused,
    PeerUnreachable,
    StoragedError,
)
from storaged.wire import encode

log = structlog.get_logger(__name__)

Addresses = Callable[[str], str | None] | Mapping[str, str]
"""Node name -> ``host:port`` of its RPC server; None for a node without an address or in no layout."""


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


@dataclass
class Dialler:
    """What the links of one pool share. ``watchers`` are called with (node, reached)."""

    loop: asyncio.AbstractEventLoop
    own: identity.Identity
    tls: ssl.SSLContext
    incarnation: bytes
    limits: PoolLimits
    addresses: Addresses
    checks: PeerChecks
    clock: Clock
    counts: CallCounts
    watchers: list[Callable[[str, bool], None]] = field(default_factory=list)

    def endpoint(self, node: str) -> tuple[str, int]:
        """Host and port of a node's RPC server. Raises PeerUnreachable when it has none."""
        address = self.addresses.get(node) if isinstance(self.addresses, Mapping) else self.addresses(node)
        host, _, port = (address or "").rpartition(":")
        if not host or not port.isdecimal():
            raise PeerUnreachable(
                f"No address of {node} is known." if not address else f"{address!r} is not host:port."
            )
        return host.strip("[]"), int(port)

    def notify(self, node: str, reached: bool) -> None:
        for watcher in self.watchers:
            watcher(node, reached)

    async def dial(self, node: str) -> tuple[ClientConnection, Hello]:
        """Connects to ``node``: TLS, the checks of its certificate, the handshake.

        Raises PeerUnreachable, CertificateRefused, JurisdictionRefused, PeerRefused (``node`` has another reason to
        refuse this one), or the error of the network.
        """
        host, port = self.endpoint(node)
        connection = ClientConnection(self.loop, node, self.limits, self.counts)
        connection.begin_with(self.tls, node)
        try:
            async with asyncio.timeout(self.limits.connect_timeout_s):
                await self.loop.create_connection(lambda: connection, host, port)
                await connection.secured
                peer = self._check_certificate(connection)
                hello = await self._handshake(connection)
                self.checks.admission(peer)  # a layout may have come meanwhile
                return connection, hello
        except ssl.SSLCertVerificationError as error:
            connection.abort(describe(error))
            raise CertificateRefused(f"{node} at {host}:{port} is not of this cluster: {describe(error)}.") from error
        except BaseException as error:
            connection.abort(describe(error))
            raise

    def _check_certificate(self, connection: ClientConnection) -> PeerIdentity:
        """Raises CertificateRefused or JurisdictionRefused; sets the connection's peer, and when it expires."""
        certificate, node = connection.certificate, connection.node
        peer, peer_expires_s = identity.identity_of(certificate), expiry_of(certificate)
        connection.peer = peer
        connection.expires_s = min(peer_expires_s, self.own.expires.timestamp())
        connection.redial_at_s = connection.expires_s - REDIAL_BEFORE_S
        if peer_expires_s <= self.clock.wall_ms() / 1000:
            raise expired(node, peer_expires_s)
        if peer.name != node:
            raise CertificateRefused(f"The certificate at {node}'s address is {peer.name}'s.")
        self._check_cluster(peer)
        self.checks.admission(peer)
        return peer

    def _check_cluster(self, peer: PeerIdentity) -> None:
        own = self.own
        if peer.cluster != own.cluster:
            raise CertificateRefused(f"{peer.name} belongs to cluster {peer.cluster!r}, {own.name} to {own.cluster!r}.")

    async def _handshake(self, connection: ClientConnection) -> Hello:
        own = self.own
        connection.send(Kind.HELLO, 0, encode(Hello(own.cluster, own.name, self.incarnation, PROTOCOL_VERSION)))
        hello = await connection.hello
        if (hello.cluster, hello.name, hello.version) != (own.cluster, connection.node, PROTOCOL_VERSION):
            raise CertificateRefused(
                f"{connection.node} answers as {hello.name!r} of cluster {hello.cluster!r}, protocol version"
                f" {hello.version}."
            )
        return hello


class Link:
    """Keeps one peer connected. ``attempt`` is the dial whose outcome calls wait for; None while the node is away."""

    def __init__(self, dialler: Dialler, node: str) -> None:
        self.dialler = dialler
        self.node = node
        self.connection: ClientConnection | None = None
        self.incarnation = b""
        self.reason = ""
        self.connects = 0
        self.attempt: asyncio.Future[ClientConnection] | None = dialler.loop.create_future()
        self.redial = asyncio.Event()
        """Set when a connection under newer certificates shall replace the current one."""
        self.retired: list[ClientConnection] = []
        """Replaced connections: each is closed when its last call has finished."""
        self.task = dialler.loop.create_task(self._run())

    @property
    def state(self) -> str:
        if self.connection is not None:
            return "connected"
        return "away" if self.attempt is None else "connecting"

    async def _run(self) -> None:
        limits = self.dialler.limits
        failures = 0
        while True:
            presented = self.dialler.own.peer.fingerprint
            try:
                connection = await self._dial()
            except Exception as error:  # any error: a link that gave up would leave the node unreachable until restart
                self._note_revoked(error, presented)
                self._set_away(error)
            else:
                self._set_connected(connection)
                began = self.dialler.loop.time()
                connection = await self._wait_until_lost(connection)
                self.connection = None
                if self.dialler.loop.time() - began >= limits.backoff_max_s:
                    failures = 0
                    self.attempt = self.dialler.loop.create_future()
                    continue
                self._set_away(ConnectionResetError(connection.reason))
            failures += 1
            longest_s = min(limits.backoff_first_s * 2 ** min(failures, 16), limits.backoff_max_s)
            await asyncio.sleep(limits.backoff_first_s / 2 + longest_s * random.random())

    async def _wait_until_lost(self, connection: ClientConnection) -> ClientConnection:
        """Waits until the connection is lost, and replaces it when asked to. Returns the one that was lost last."""
        while not connection.lost.done():
            redial = asyncio.ensure_future(self.redial.wait())
            try:
                await asyncio.wait((connection.lost, redial), return_when=asyncio.FIRST_COMPLETED)
            finally:
                redial.cancel()
            if connection.lost.done():
                break
            try:
                fresh = await self._dial()
            except Exception as error:  # the old connection still serves until it expires
                log.info("no newer connection yet", peer=self.node, reason=describe(error))
                continue
            self.connects += 1
            self.retired.append(connection)
            self.connection = connection = fresh
        return connection

    def recheck(self, admission: Callable[[PeerIdentity], None]) -> None:
        """Ends the connections to a peer that is not admitted any more."""
        for connection in (*self.retired, *([self.connection] if self.connection is not None else [])):
            try:
                assert connection.peer is not None
                admission(connection.peer)
            except StoragedError as error:
                connection.abort(error.message)

    def check_expiry(self, wall_s: float) -> None:
        """Closes expired and drained connections, and asks for a successor in time."""
        for connection in list(self.retired):
            if not connection.pending or connection.expires_s <= wall_s:
                connection.close("a newer connection has taken its place")
                self.retired.remove(connection)
        current = self.connection
        if current is None:
            return
        if current.expires_s <= wall_s:
            current.abort("its certificate, or this node's, has expired")
        elif current.redial_at_s <= wall_s:
            current.redial_at_s = wall_s + REDIAL_INTERVAL_S
            self.redial.set()

    async def _dial(self) -> ClientConnection:
        self.redial.clear()
        connection, hello = await self.dialler.dial(self.node)
        self.incarnation = hello.incarnation
        return connection

    def _set_connected(self, connection: ClientConnection) -> None:
        if self.attempt is None:
            log.info("node is back", peer=self.node)
        self.connects += 1
        self.connection = connection
        self.reason = ""
        attempt, self.attempt = self.attempt, None
        if attempt is not None and not attempt.done():
            attempt.set_result(connection)
        self.dialler.notify(self.node, True)

    def _note_revoked(self, error: Exception, presented: bytes) -> None:
        """``presented``: the fingerprint of the certificate that was refused. This node may have another one by now."""
        on_revoked = self.dialler.checks.on_revoked
        said = error.details.get("refused_with") if isinstance(error, CertificateRefused) else None
        if said == CertificateRevoked.code and on_revoked is not None:
            on_revoked(self.node, presented)

    def _set_away(self, error: Exception) -> None:
        reason = error.message if isinstance(error, StoragedError) else describe(error)
        on_refusal = self.dialler.checks.on_refusal
        if (
            isinstance(error, CertificateRefused | JurisdictionRefused | PeerRefused)
            and on_refusal is not None
            and reason != self.reason
        ):
            on_refusal(self.node, error)
        if reason != self.reason:
            log.warning("node is away", peer=self.node, reason=reason)
        self._fail_waiting_calls(reason)
        self.dialler.notify(self.node, False)

    def _fail_waiting_calls(self, reason: str) -> None:
        self.reason = reason
        attempt, self.attempt = self.attempt, None
        if attempt is not None and not attempt.done():
            attempt.set_exception(PeerUnreachable(f"{self.node} is away: {reason}"))
            attempt.exception()  # marks it as retrieved: it may have no waiter

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self._fail_waiting_calls("this node is stopping")
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
