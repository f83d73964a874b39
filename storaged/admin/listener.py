"""The admin socket's listening side: takes root and the node's own user, closes the connection of everybody else
before a byte is read.

The socket's mode (0600) keeps others out already. The kernel's word on who connected (SO_PEERCRED, unix(7)) is what
counts: a mode can be changed, a directory moved, a descriptor handed on. Within a user namespace (PrivateUsers= of
systemd) users that it does not map show as 65534 (nobody), and are refused.
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
"""When the process has no descriptors left, accepting again at once would fail again."""

log = structlog.get_logger("admin")


class SocketPeer(NamedTuple):
    """Who is at the other end of a Unix socket, by the kernel's word when it connected."""

    uid: int
    name: str

    @property
    def actor(self) -> str:
        """As the audit log names it."""
        return f"unix:{self.uid}:{self.name}"


@lru_cache(maxsize=64)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def actor_of_user(uid: int) -> str:
    """As the audit log names a user of this machine."""
    return SocketPeer(uid, _user_name(uid)).actor


def peer_of(connection: Any) -> SocketPeer:
    """``connection``: a socket, or what an asyncio transport gives as one. Raises OSError."""
    _pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return SocketPeer(uid, _user_name(uid))


def owner_or_root(uid: int) -> bool:
    return uid in (0, os.geteuid())


class AdminListener(web.BaseSite):
    """An aiohttp site over a bound Unix socket. ``allowed`` judges a uid, ``on_refusal`` hears of who is refused."""

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
