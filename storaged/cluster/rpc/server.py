"""The listening side of the internode protocol.

Theory of operation. A peer passes three checks in this order: TLS (a certificate of this cluster's authority, valid
now), the certificate's extension and the admission policy (jurisdiction), and the handshake (same cluster, same
protocol version, the name that was certified). It must also have fewer connections than one node may have. The server
sends a refusal if it can, logs it, and hands it to ``on_refusal`` for the audit log. A certificate outlives a
membership. So what a peer may call follows from the layout in force (``PeerChecks.roles_of``), and the server checks it
again, for existing connections too, whenever that changes (``recheck_peers``). A certificate that is revoked, or has
expired (``expiry``), ends its connections.

A stopping server waits for tasks, and then for the calls that ``try_start`` accepted, each for ``drain_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster import identity, tls
from storaged.cluster.ports import Methods, PeerChecks, PeerIdentity
from storaged.cluster.refusal_lines import RefusalLines
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.budget import Budget
from storaged.cluster.rpc.connection import describe
from storaged.cluster.rpc.expiry import expired, expiry_of
from storaged.cluster.rpc.framing import PROTOCOL_VERSION, Hello, Kind
from storaged.cluster.rpc.handshake import offer_packets
from storaged.cluster.rpc.listener import Listener
from storaged.cluster.rpc.server_connection import ServerConnection, ServerLimits, ServerShared
from storaged.errors import CertificateRefused, PeerRefused, StoragedError
from storaged.ids import INCARNATION_BYTES, system_entropy
from storaged.wire import encode

log = structlog.get_logger(__name__)

SWEEP_S = 0.25


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


class RpcServer:
    """Answers ``methods`` on a TCP port, to peers that pass ``checks``.

    ``incarnation`` (8 bytes) lets peers tell one start of this process from the next. Use: ``await start(host, port)``
    ... ``await close()``.
    """

    def __init__(
        self,
        own: identity.Identity,
        methods: Methods,
        *,
        checks: PeerChecks,
        incarnation: bytes = b"",
        limits: ServerLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._identity = own
        self._methods = {name.encode("ascii"): method for name, method in methods.items()}
        assert all(0 < len(name) < 256 for name in self._methods)
        self._checks = checks
        self.limits = limits or ServerLimits()
        self._clock = clock if clock is not None else SystemClock()
        self._incarnation = incarnation or system_entropy(INCARNATION_BYTES)
        self._tls = tls.server_context(own)
        offer_packets(self._tls)
        self._connections: set[ServerConnection] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._refused = 0
        self._lines = RefusalLines(log.warning, self._clock.monotonic)
        self._bytes_in_closed = 0
        """Bytes of connections that have ended."""
        self._bytes_out_closed = 0

    @property
    def port(self) -> int:
        """The port in use (the system's choice when 0 was asked for)."""
        return self._listener.port

    async def start(self, host: str, port: int) -> None:
        """Listens on every address of ``host``. Raises PortInUse, or OSError for an address that is not this
        machine's.
        """
        self._loop = asyncio.get_running_loop()
        self._shared = ServerShared(
            loop=self._loop,
            node=self._identity.name,
            methods=self._methods,
            limits=self.limits,
            budget=Budget(self.limits.inflight_bytes_max),
            on_closed=self._on_closed,
            on_call_refused=self._on_call_refused,
        )
        self._listener = Listener(self._welcome, self.limits.handshakes_max)
        await self._listener.start(host, port)
        self._sweep_timer = self._loop.call_later(SWEEP_S, self._sweep)
        log.info("listening for nodes", host=host, port=self.port, node=self._identity.name)

    async def close(self) -> None:
        """Takes no more requests, lets running ones finish for ``drain_s``, then ends every connection."""
        if self._sweep_timer is None:
            return  # it never started
        self._sweep_timer.cancel()
        await self._listener.close()
        connections = list(self._connections)
        for connection in connections:
            if connection.transport is not None and not connection.reader.waiting:
                connection.transport.pause_reading()
        await self._drain(connections)
        for connection in connections:
            connection.close("this node is stopping")
        if connections:
            await asyncio.wait([connection.lost for connection in connections], timeout=1.0)
        for connection in connections:
            connection.abort("this node is stopping")

    async def _drain(self, connections: list[ServerConnection]) -> None:
        running = [call for connection in connections for call in connection.running.values()]
        tasks = [call.task for call in running if call.task is not None]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=self.limits.drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if any(connection.running for connection in connections):  # accepted without a task: a disk answers them
            drained = asyncio.Event()

            def check() -> None:
                if not any(connection.running for connection in self._connections):
                    drained.set()

            self._shared.on_call_done = check
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(drained.wait(), self.limits.drain_s)

    def renew(self, own: identity.Identity) -> None:
        """New connections use the certificate that is in the identity's directory now.

        Raises CertificateRefused and keeps the old one.
        """
        tls.renew(self._tls, own)
        self._identity = own

    def recheck_peers(self) -> None:
        """Applies a new layout: gives connected peers the roles that it grants, and ends those it does not admit."""
        for connection in list(self._connections):
            peer = connection.peer
            assert peer is not None
            connection.set_roles(self._roles_of(peer))
            try:
                self._checks.admission(peer)
            except StoragedError as error:
                self._expel(connection, peer.name, error)

    def statistics(self) -> ServerStatistics:
        connections, shared = self._connections, self._shared
        return ServerStatistics(
            connections=len(connections),
            handlers_running=sum(len(connection.running) for connection in connections),
            inflight_bytes=shared.budget.used_bytes,
            inflight_bytes_peak=shared.budget.peak_bytes,
            connections_waiting=sum(connection.reader.waiting for connection in connections),
            calls=shared.calls,
            calls_failed=shared.calls_failed,
            calls_cancelled=shared.calls_cancelled,
            peers_refused=self._refused,
            bytes_in=self._bytes_in_closed + sum(connection.bytes_in for connection in connections),
            bytes_out=self._bytes_out_closed + sum(connection.bytes_out for connection in connections),
            peers=tuple(sorted(connection.peer.name for connection in connections if connection.peer is not None)),
        )

    # Letting peers in.

    async def _welcome(self, accepted: socket.socket, address: str) -> None:
        if len(self._connections) >= self.limits.connections_max:
            log.warning("connection refused: too many", address=address, connections_max=self.limits.connections_max)
            accepted.close()
            return
        connection = ServerConnection(self._shared)
        connection.begin_with(self._tls)
        who = address
        try:
            async with asyncio.timeout(self.limits.handshake_timeout_s):
                await self._loop.connect_accepted_socket(lambda: connection, accepted)
                await connection.secured
                certificate = connection.certificate
                peer, connection.expires_s = identity.identity_of(certificate), expiry_of(certificate)
                who = peer.name
                if connection.expires_s <= self._clock.wall_ms() / 1000:
                    raise expired(peer.name, connection.expires_s)
                self._checks.admission(peer)
                self._check_hello(await connection.hello, peer)
                self._checks.admission(peer)  # a layout may have come meanwhile
                self._check_room_for(peer)
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
            self._admit(connection, peer)

    def _check_hello(self, hello: Hello, peer: PeerIdentity) -> None:
        own = self._identity
        if hello.version != PROTOCOL_VERSION:
            raise CertificateRefused(
                f"{peer.name} speaks protocol version {hello.version}, {own.name} {PROTOCOL_VERSION}."
            )
        for cluster in (hello.cluster, peer.cluster):
            if cluster != own.cluster:
                raise CertificateRefused(f"{peer.name} belongs to cluster {cluster!r}, {own.name} to {own.cluster!r}.")
        if hello.name != peer.name or len(hello.incarnation) != INCARNATION_BYTES:
            raise CertificateRefused(f"{peer.name} introduces itself as {hello.name!r}.")

    def _check_room_for(self, peer: PeerIdentity) -> None:
        """Keeps one certified node from taking every connection. Called without a wait before the peer is admitted."""
        most = self.limits.connections_per_peer_max
        names = [connection.peer.name for connection in self._connections if connection.peer is not None]
        if names.count(peer.name) >= most:
            raise faults.refused(
                faults.TOO_MANY_CONNECTIONS,
                f"{peer.name} has {most} connections to {self._identity.name}, and one node may have no more.",
            )

    def _roles_of(self, peer: PeerIdentity) -> frozenset[str]:
        return self._checks.roles_of(peer) if self._checks.roles_of is not None else frozenset(peer.roles)

    def _admit(self, connection: ServerConnection, peer: PeerIdentity) -> None:
        if not connection.is_open:
            return
        connection.peer = peer
        connection.set_roles(self._roles_of(peer))
        self._connections.add(connection)
        own = self._identity
        connection.send(Kind.WELCOME, 0, encode(Hello(own.cluster, own.name, self._incarnation, PROTOCOL_VERSION)))
        log.debug("node connected", peer=peer.name)

    # Refusing and ending.

    def _refuse(self, connection: ServerConnection, who: str, error: StoragedError) -> None:
        """Refuses a peer during its handshake, and tells it why."""
        if connection.is_open:
            connection.send(Kind.REFUSED, 0, encode(faults.to_head(error)))
            self._loop.call_soon(connection.close, error.message)
        else:
            connection.close(error.message)
        self._record_refusal(who, error)

    def _expel(self, connection: ServerConnection, name: str, error: StoragedError) -> None:
        """Ends the connection of a peer that had been admitted."""
        connection.abort(error.message)
        self._record_refusal(name, error)

    def _record_refusal(self, who: str, error: StoragedError) -> None:
        self._refused += 1
        self._lines.note("node refused", who, _code_of(error), error.message)
        if self._checks.on_refusal is not None:
            self._checks.on_refusal(who, error)

    def _on_call_refused(self, peer: str, error: StoragedError) -> None:
        """A peer called an unknown method, or one that its roles do not allow; no honest node of this version does the
        second.
        """
        code = _code_of(error)
        if code == faults.ROLE_REFUSED and self._checks.on_refusal is not None:
            self._checks.on_refusal(peer, error)
        else:
            self._lines.note("call refused", peer, code, error.message)

    def _on_closed(self, connection: ServerConnection) -> None:
        self._bytes_in_closed += connection.bytes_in
        self._bytes_out_closed += connection.bytes_out
        if connection in self._connections:
            self._connections.discard(connection)
            peer = connection.peer.name if connection.peer is not None else ""
            log.debug("node disconnected", peer=peer, reason=connection.reason)

    def _sweep(self) -> None:
        now, wall_s = self._loop.time(), self._clock.wall_ms() / 1000
        for connection in list(self._connections):
            if connection.stalled_s(now) > self.limits.stall_timeout_s:
                connection.abort("the peer made no progress")
            if connection.expires_s <= wall_s and connection.is_open and connection.peer is not None:
                self._expel(connection, connection.peer.name, expired(connection.peer.name, connection.expires_s))
            for request_id, running in [call for call in connection.running.items() if call[1].deadline < now]:
                connection.cancel_call(request_id, running)
        self._sweep_timer = self._loop.call_later(SWEEP_S, self._sweep)


def _code_of(error: StoragedError) -> str:
    return error.remote_code if isinstance(error, PeerRefused) else error.code
