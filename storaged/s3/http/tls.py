"""TLS handshakes of clients, which count as unauthenticated from the moment they connect.

The event loop's own server makes a protocol only after the handshake. Until then no limit would count a client that
connects and says nothing, and each such client takes a descriptor of the process for ``Limits.handshake_s``. So this
module accepts connections itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from storaged.s3.http.connections import Connections

log = logging.getLogger("storaged.s3")

ACCEPTS_A_TURN = 64
PAUSE_S = 0.5
"""When the process has no descriptors left, it accepts again after this pause: at once it would fail again."""


class _Handshake:
    """A handshake that may be given up for another client."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self.evicted = False

    def evict(self) -> None:
        self.evicted = True
        self._task.cancel()


async def accept_tls(
    connections: Connections, accepted: socket.socket, context: ssl.SSLContext, timeout_s: float
) -> None:
    """Makes a connection of an accepted socket. Closes it when the handshake fails, takes too long, or makes room for
    another client's. Raises only CancelledError."""
    task = asyncio.current_task()
    assert task is not None
    try:
        remote = str(accepted.getpeername()[0])
    except OSError:  # it has gone already
        accepted.close()
        return
    if not connections.room_for_handshake():
        accepted.close()
        return
    handshake = _Handshake(task)
    client = connections.unauthenticated.add(handshake, remote)
    connections.handshakes += 1
    try:
        await asyncio.get_running_loop().connect_accepted_socket(
            connections, accepted, ssl=context, ssl_handshake_timeout=timeout_s
        )
    except asyncio.CancelledError:
        accepted.close()
        if not handshake.evicted:
            raise
    except OSError as error:
        log.debug("a connection broke before its first request: %s", error)
        accepted.close()
    finally:
        connections.handshakes -= 1
        client.remove()


class TlsAcceptor:
    """Accepts from listening sockets, and serves each client by ``adopt`` in a task."""

    def __init__(
        self, listeners: Sequence[socket.socket], adopt: Callable[[socket.socket], Coroutine[Any, Any, None]]
    ) -> None:
        self._listeners = list(listeners)
        self._adopt = adopt
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.add_reader(listener, self._accept, listener)

    def close(self) -> None:
        """Stops accepting, and gives up the handshakes under way."""
        if self._pause is not None:
            self._pause.cancel()
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        for task in self._tasks:
            task.cancel()

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_A_TURN):
            try:
                accepted, _address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:  # the client has gone
                continue
            except OSError as error:
                log.error("connections are not accepted for a moment: %s", error)
                for each in self._listeners:
                    loop.remove_reader(each)
                self._pause = loop.call_later(PAUSE_S, self.start)
                return
            accepted.setblocking(False)
            task = loop.create_task(self._adopt(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
