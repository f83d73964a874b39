"""The listening side of the admin socket: only root and the node's own user get in.

It closes the connection of every other user before it reads a byte. The socket's mode (0600) keeps others out already.
But a mode can change, a directory can move, and a process can hand a descriptor on, so the kernel's word on the caller
decides (SO_PEERCRED, unix(7)). Within a user namespace (PrivateUsers= of systemd) users without a mapping show as 65534
(nobody), and are refused.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import structlog
from aiohttp import web

_UCRED = struct.Struct("3i")
ACCEPT_AGAIN_S = 1.0
"""The pause when the process has no descriptors left and accepting at once would fail again."""

log = structlog.get_logger("admin")


class SocketPeer(NamedTuple):
    """The process at the other end of a Unix socket, as the kernel knew it when it connected."""

    uid: int
    name: str

    @property
    def actor(self) -> str:
        """The caller, as the audit log names it."""
        return f"unix:{self.uid}:{self.name}"


@lru_cache(maxsize=64)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def peer_of(connection: Any) -> SocketPeer:
    """The peer of ``connection``, a socket or what an asyncio transport returns for one. Raises OSError."""
    _pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return SocketPeer(uid, _user_name(uid))


def owner_or_root(uid: int) -> bool:
    return uid in (0, os.geteuid())


class AdminListener(web.BaseSite):
    """An aiohttp site over a bound Unix socket. ``allowed`` judges a uid; ``on_refusal`` is called
    with a refused peer.
    """

    def __init__(
        self,
        runner: web.AppRunner,
        listener: socket.socket,
        *,
        allowed: Callable[[int], bool] = owner_or_root,
        on_refusal: Callable[[SocketPeer], None],
    ) -> None:
        super().__init__(runner)
        self._listener = listener
        self._allowed = allowed
        self._on_refusal = on_refusal
        self._taking: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        return f"unix:{self._listener.getsockname()}"

    async def start(self) -> None:
        await super().start()
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._begin()

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for task in self._taking:
            task.cancel()
        await super().stop()

    def _begin(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("admin connections are not accepted for a moment", reason=str(error))
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_AGAIN_S, self._begin)
            return
        try:
            peer = peer_of(connection)
        except OSError:
            peer = SocketPeer(-1, "")
        server = self._runner.server
        if not self._allowed(peer.uid) or server is None:
            connection.close()
            log.warning("an admin connection is refused", uid=peer.uid, user=peer.name)
            self._on_refusal(peer)
            return
        connection.setblocking(False)
        task = loop.create_task(loop.connect_accepted_socket(server, connection))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)
