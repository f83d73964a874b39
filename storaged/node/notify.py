"""Notifies the service manager: READY, RELOADING, STOPPING, WATCHDOG (sd_notify(3)). Does nothing outside systemd."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import MutableMapping


class Notifier:
    """Sends to ``$NOTIFY_SOCKET`` (a leading ``@`` means abstract), and removes it from the environment, so that
    children don't notify in this process's name.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            if address
            else None
        )
        watched = (
            int(environ.pop("WATCHDOG_USEC", "0") or 0)
            if environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
            else 0
        )
        self.watchdog_s = watched / 1e6

    def _send(self, text: str) -> None:
        if self._socket is not None:
            try:
                self._socket.sendto(text.encode(), self._address)
            except OSError:  # the node goes on when the manager does not listen
                pass

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def reloading(self) -> None:
        """Type=notify-reload wants the monotonic time in microseconds; READY follows when the reload is over."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    async def feed_watchdog(self) -> None:
        """Feeds the watchdog from the event loop, twice in each period, so that a loop that hangs is restarted. Returns
        at once when there is no watchdog.
        """
        while self.watchdog_s:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 2)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
