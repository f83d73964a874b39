"""How a transport gives bytes to a reader of a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Receiver(Protocol):
    """What a FrameReader, a PacketReader and a Handshake have in common."""

    def buffer(self) -> memoryview: ...
    def received(self, count: int) -> None: ...


def feed(receiver: Receiver, data: bytes, after: Callable[[], object] = lambda: None) -> None:
    """Gives it all of ``data``, each time as much as it has room for. ``after`` is called each time."""
    while data:
        room = receiver.buffer()
        assert len(room), "there is no room to receive into"
        part = data[: len(room)]
        room[: len(part)] = part
        receiver.received(len(part))
        after()
        data = data[len(part) :]
