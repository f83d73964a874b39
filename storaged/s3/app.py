"""The S3 front of a gateway: it listens, takes connections, and closes in order. ``responder`` answers the requests.

parse -> locate -> user and bucket -> authenticate -> authorize -> the operation -> send -> report to the observer

Every answer carries x-amz-request-id. Errors are S3's documents. An error that was not expected becomes an
InternalError, which says nothing about the inside.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from storaged.clock import Clock
from storaged.ids import Entropy
from storaged.objects.api import Buckets, Objects, Users
from storaged.objects.destinations import Destinations
from storaged.objects.granted import GrantedObjects, LockAudit, not_audited
from storaged.objects.quotas import Quotas
from storaged.s3.access_logs import AccessLogs
from storaged.s3.context import NO_DESTINATIONS, Endpoint, Front
from storaged.s3.http.connections import Connections
from storaged.s3.http.listen import BACKLOG, listen
from storaged.s3.http.tls import TlsAcceptor, accept_tls
from storaged.s3.request import RequestDone
from storaged.s3.responder import Responder

log = logging.getLogger("storaged.s3")

UNAUTHENTICATED_DRAIN_S = 2.0
"""How long a server that closes waits for requests that are not authenticated, such as forms whose fields have not all
arrived. None of them may delay it for longer.
"""


@dataclass(frozen=True, slots=True)
class Statistics:
    connections: int
    requests_in_flight: int
    requests_total: int
    refused_total: int
    """Refused with SlowDown, because too many were in flight."""
    unauthenticated: int
    """Connections that have not authenticated."""
    evicted_total: int
    """Connections that had not authenticated, closed to make room."""


class S3App:
    """One S3 endpoint. ``on_request`` is called after each answer, and must not block."""

    def __init__(
        self,
        objects: Objects,
        buckets: Buckets,
        users: Users,
        endpoint: Endpoint,
        *,
        clock: Clock,
        entropy: Entropy,
        on_request: Callable[[RequestDone], None] | None = None,
        quotas: Quotas | None = None,
        destinations: Destinations | None = None,
        lock_audit: LockAudit = not_audited,
    ) -> None:
        self._endpoint = endpoint
        granted = GrantedObjects(objects, quotas, lock_audit)
        self.front = front = Front(granted, buckets, users, endpoint, clock, destinations or NO_DESTINATIONS)
        self.access_logs = AccessLogs(front, entropy)
        self._responder = Responder(front, entropy, on_request, self.access_logs)
        self._servers: list[asyncio.Server] = []
        self._acceptor: TlsAcceptor | None = None
        self._connections: Connections | None = None
        self._ssl: ssl.SSLContext | None = None

    async def start(self, host: str, port: int, ssl: ssl.SSLContext | None = None) -> int:
        """Listens; returns the port (``port`` 0: any that is free). Raises PortInUse."""
        listeners = listen(host, port)
        taken = int(listeners[0].getsockname()[1])
        connections = self.open(ssl)
        if ssl is not None:
            self._acceptor = TlsAcceptor(listeners, self.adopt)
            self._acceptor.start()
            return taken
        for listener in listeners:
            self._servers.append(
                await asyncio.get_running_loop().create_server(connections, sock=listener, backlog=BACKLOG)
            )
        return taken

    def open(self, ssl: ssl.SSLContext | None = None) -> Connections:
        """Serves connections that are given to ``adopt``; does not listen."""
        self._ssl = ssl
        self.access_logs.start()
        self._connections = Connections(
            self._responder.converse, self._endpoint.limits, self._responder.try_begin, self._endpoint.proxies
        )
        return self._connections

    async def adopt(self, accepted: socket.socket) -> None:
        """Serves a connection that another process or task accepted. Closes it once ``close`` was called."""
        if self._connections is None or self._responder.draining:
            accepted.close()
            return
        if self._ssl is not None:
            await accept_tls(self._connections, accepted, self._ssl, self._endpoint.limits.handshake_s)
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._connections, accepted)
        except OSError as error:
            log.debug("a connection broke before its first request: %s", error)
            accepted.close()

    async def close(self, drain_s: float) -> None:
        """Stops listening, waits up to ``drain_s`` seconds for the requests in flight, then breaks off the others. Safe
        to call twice."""
        self._responder.draining = True
        for server in self._servers:
            server.close()
        if self._acceptor is not None:
            self._acceptor.close()
        if self._connections is None:
            return
        for connection in tuple(self._connections.open):
            if connection.idle:
                connection.close()
        ending = asyncio.get_running_loop().call_later(
            min(UNAUTHENTICATED_DRAIN_S, drain_s), self._connections.unauthenticated.evict_all
        )
        try:
            async with asyncio.timeout(drain_s):
                await self._responder.wait_idle()
                await self._connections.wait_flushed()
        except TimeoutError:
            if self._responder.in_flight:
                log.warning(
                    "%d requests were still in flight after %.0f s and are broken off",
                    self._responder.in_flight,
                    drain_s,
                )
        finally:
            ending.cancel()
        await self._connections.close()
        await self.access_logs.close()
        self._connections = None
        self._servers.clear()

    def statistics(self) -> Statistics:
        connections = self._connections
        if connections is None:
            return Statistics(0, self._responder.in_flight, self._responder.requests_total, 0, 0, 0)
        unauthenticated = connections.unauthenticated.counts()
        return Statistics(
            len(connections.open),
            self._responder.in_flight,
            self._responder.requests_total,
            connections.refused_total,
            unauthenticated.connections,
            unauthenticated.evicted_total,
        )
