"""The heads of frames that belong to the protocol itself (see ``framing``): who is at either end of a connection, and what went wrong."""

from __future__ import annotations

from storaged.wire import Message


class Hello(Message, frozen=True):
    """Who is at this end. ``incarnation`` is 8 random bytes per process start; ``version`` the highest protocol version spoken."""

    cluster: str
    name: str
    incarnation: bytes
    version: int


class ErrorHead(Message, frozen=True):
    """An error as it crosses the wire: the class's code, its message and details, and ``remote_code`` of a PeerRefused that is passed on."""

    code: str
    message: str
    details: dict[str, str]
    remote_code: str = ""
