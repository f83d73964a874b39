"""All connections of one listening socket: how many there are, and which of them keep the server waiting.

A sweep over all connections, a few times in each time limit, ends those where nothing moved for too long, or too
little (``progress``). So requests need no timers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from storaged.errors import SlowDown
from storaged.s3.http.connection import Connection
from storaged.s3.http.limits import Limits
from storaged.s3.http.progress import BODY, HEAD, SEND, WORKING
from storaged.s3.http.unauthenticated import UnauthenticatedClients
from storaged.units import KIB

RECEIVE_BYTES = 64 * KIB
"""Received by one system call, unless a large body goes straight to its reader."""
FLUSH_POLL_S = 0.25
SWEEPS_PER_LIMIT = 4
SWEEP_EVERY_S_MAX = 1.0


class Connections:
    """Makes connections, up to ``Limits.connections_max``, runs ``converse`` for each, and sweeps them."""

    def __init__(
        self,
        converse: Callable[[Connection], Coroutine[Any, Any, None]],
        limits: Limits,
        try_begin: Callable[[Connection, bytes, int], bool] | None = None,
        proxies: Sequence[str] = (),
    ) -> None:
        """``converse``: the task of one connection.

        ``try_begin(connection, head, more)`` is offered each head that arrives while the task waits. It returns True if
        it takes the request: then it calls ``Connection.answered`` or ``hand_over``, perhaps before it returns.
        ``more``: the number of bytes that arrived after the head, all of which it takes with ``open_body``. It must not
        raise.
        """
        self.limits = limits
        self.try_begin = try_begin
        self.scratch = memoryview(bytearray(RECEIVE_BYTES))
        self.unauthenticated = UnauthenticatedClients(limits, proxies)
        self.handshakes = 0
        """TLS handshakes under way (``tls``)."""
        self.requests_in_flight = 0
        """Authenticated requests that are not answered yet."""
        self.whole_bytes = 0
        """Memory of large bodies that callbacks answer; see ``Connection.take_memory``."""
        self.refused_total = 0
        self.open: set[Connection] = set()
        self._converse = converse
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_s = {HEAD: limits.headers_s, BODY: limits.body_idle_s, SEND: limits.send_idle_s}
        self._every_s = min(SWEEP_EVERY_S_MAX, *(limit_s / SWEEPS_PER_LIMIT for limit_s in self._idle_s.values()))
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> Connection:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self._sweep)
        return Connection(self)

    def admit(self, connection: Connection) -> bool:
        """False: there are too many connections, and all have authenticated."""
        if len(self.open) >= self.limits.connections_max and not self.unauthenticated.make_room():
            return False
        self.open.add(connection)
        return True

    def room_for_handshake(self) -> bool:
        """False: connections and handshakes together are too many, and all connections have authenticated."""
        return len(self.open) + self.handshakes < self.limits.connections_max or self.unauthenticated.make_room()

    def take_place(self) -> None:
        """Counts a request as in flight. Raises SlowDown when too many are."""
        if self.requests_in_flight >= self.limits.requests_max:
            self.refused_total += 1
            raise SlowDown()
        self.requests_in_flight += 1

    def begin(self, connection: Connection) -> None:
        """Starts the task of a connection."""
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, connection: Connection) -> None:
        self.open.discard(connection)

    async def wait_flushed(self) -> None:
        """Returns when no client takes anything any more. TLS passes on what it was given when the socket has room, and
        does not report when it has, so the acknowledged bytes are polled."""
        before: dict[Connection, int] | None = None
        while (
            now := {connection: connection.acked_bytes() for connection in self.open if connection.secure}
        ) and now != before:
            before = now
            await asyncio.sleep(FLUSH_POLL_S)

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
            phase = connection.progress.phase
            if phase != WORKING:
                connection.check_progress(now_s, self._every_s, self._idle_s[phase])
