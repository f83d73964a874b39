"""A network of one function call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from storaged.cluster.ports import Call, Methods, PeerIdentity, Reply
from storaged.wire import Buffer, Message, decode, encode

T = TypeVar("T", bound=Message)


class Loopback:
    """A Caller whose network is a function call: everything is encoded and decoded on the way, as it would be."""

    def __init__(self, methods: Callable[[str], Methods], roles: tuple[str, ...] = ("gateway",)) -> None:
        self._methods = methods
        self._roles = roles

    async def call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[T],
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> tuple[T, memoryview]:
        found = self._methods(node)[method]
        received: Any = decode(encode(request), found.request)
        sent = memoryview(bytearray(b"".join(body)))
        answer = await found.handler(
            received, Call(PeerIdentity("test", "FR", "par1", "a", self._roles), sent, timeout_s)
        )
        sent[:] = bytes(len(sent))  # a request's body is valid until the handler returns, and not longer
        message, chunks = (answer.message, answer.body) if isinstance(answer, Reply) else (answer, ())
        return decode(encode(message), reply), memoryview(b"".join(chunks))
