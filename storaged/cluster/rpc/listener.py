"""Accepts connections on every address of a host, and bounds the handshakes under way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from storaged.cluster.rpc.connection import describe
from storaged.errors import PortInUse

log = structlog.get_logger(__name__)

RETRY_S = 0.25
"""Between two tries to accept, while the process is out of descriptors."""

Handshake = Callable[[socket.socket, str], Coroutine[Any, Any, None]]


class Listener:
    """Hands each accepted connection to ``handshake(accepted, address)``, at most ``handshakes_max`` at a time."""

    def __init__(self, handshake: Handshake, handshakes_max: int) -> None:
        self._handshake = handshake
        self._free = asyncio.Semaphore(handshakes_max)
        self._handshakes: dict[asyncio.Task[None], str] = {}
        """Handshakes under way, oldest first, and the host of each."""
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The port in use (the system's choice when 0 was asked for)."""
        port: int = self._sockets[0].getsockname()[1]
        return port

    async def start(self, host: str, port: int) -> None:
        """Listens on every address of ``host``. Raises PortInUse, or OSError for an address that is not this
        machine's.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, _type, _protocol, _name, address in sorted(set(found)):
                chosen = (address[0], self.port, *address[2:]) if self._sockets and port == 0 else address
                self._sockets.append(_listen(family, chosen))
        except OSError:
            for listener in self._sockets:
                listener.close()
            self._sockets.clear()
            raise
        self._accepting = [loop.create_task(self._accept(loop, listener)) for listener in self._sockets]

    async def close(self) -> None:
        """Ends the handshakes under way and stops listening."""
        for task in (*self._accepting, *self._handshakes):
            task.cancel()
        await asyncio.gather(*self._accepting, *self._handshakes, return_exceptions=True)
        for listener in self._sockets:
            listener.close()
        self._accepting.clear()
        self._sockets.clear()

    async def _accept(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:  # mostly out of descriptors: existing connections must go on
                log.error("cannot accept a connection", reason=describe(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                if self._free.locked():
                    self._end_one_handshake()
                await self._free.acquire()
            except BaseException:
                accepted.close()
                raise
            task = loop.create_task(self._handshake(accepted, address[0]))
            self._handshakes[task] = address[0]
            task.add_done_callback(self._on_handshake_done)

    def _end_one_handshake(self) -> None:
        """Makes room for a newcomer while the most handshakes allowed are under way.

        Hosts that only connect and send nothing must not keep nodes out. So this ends the oldest handshake with the
        host that has the most of them. While every host has only one, the newcomer waits.
        """
        counts = Counter(self._handshakes.values())
        busiest, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            log.debug("too many handshakes; the oldest is ended", address=busiest)
            next(task for task, host in self._handshakes.items() if host == busiest).cancel()

    def _on_handshake_done(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)
        self._free.release()
        if not task.cancelled() and task.exception() is not None:
            log.error("a handshake failed unexpectedly", reason=repr(task.exception()))


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
