"""The virtual network: how a process of a run calls the storage nodes.

Messages are lost, duplicated, delayed, reordered and cut off by partitions, as the world's weather says. To and from a
process that is stopped (``World.stop``) they wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from storaged.cluster.ports import EncodedCall, OnReply, T
from storaged.errors import PeerError, PeerRefused, PeerTimeout, PeerUnreachable, StoragedError
from storaged.wire import Buffer, Message, decode, encode

if TYPE_CHECKING:
    from tests.sim.cluster import World


class NetworkCaller:
    """``cluster.ports.Caller`` and ``TryCaller`` of one process, until it dies. Now and then a try_call
    is refused, as when a connection has no room.
    """

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self.alive = True

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
        loop = self._world.loop
        answered: asyncio.Future[tuple[bytes | StoragedError, bytes]] = loop.create_future()
        target = self._world.nodes[node]
        if not target.up and self._world.random.random() < 0.5:
            raise PeerUnreachable(f"{node} is away")
        encoded, bulk = encode(request), b"".join(bytes(piece) for piece in body)

        def answer(outcome: bytes | StoragedError, payload: bytes) -> None:
            if not answered.done():
                self._send(node, self.name, method, outcome, lambda: _resolve(answered, outcome, payload))

        self._send(self.name, node, method, encoded, lambda: target.deliver(self.name, method, encoded, bulk, answer))
        timer = loop.call_later(timeout_s, _expire, answered)
        try:
            outcome, payload = await answered
        finally:
            timer.cancel()
        if isinstance(outcome, PeerError):
            raise outcome
        if isinstance(outcome, StoragedError):
            raise PeerRefused(outcome.message, outcome.code)
        return decode(outcome, reply), memoryview(payload)

    def try_call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        then: OnReply,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> bool:
        return self._try_call(node, method, reply, encode(request), b"", then, body, timeout_s)

    def encoded_call(
        self,
        node: str,
        method: str,
        reply: type[Message],
        start: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        return partial(self._try_call, node, method, reply, start)

    def _try_call(
        self,
        node: str,
        method: str,
        reply: type[Message],
        start: bytes,
        rest: bytes,
        then: OnReply,
        body: Sequence[Buffer],
        timeout_s: float,
    ) -> bool:
        target = self._world.nodes[node]
        if not self.alive or not target.up or self._world.random.random() < self._world.weather.refuse:
            return False
        encoded, bulk = start + rest, b"".join(bytes(piece) for piece in body)
        waiting = [then]

        def told(outcome: bytes | StoragedError, payload: bytes) -> None:
            if not waiting:
                return
            waiting.pop()
            timer.cancel()
            if isinstance(outcome, bytes):
                then(decode(outcome, reply), memoryview(payload))
            elif isinstance(outcome, PeerError):
                then(outcome, memoryview(b""))
            else:
                then(PeerRefused(outcome.message, outcome.code), memoryview(b""))

        def answer(outcome: bytes | StoragedError, payload: bytes) -> None:
            self._send(node, self.name, method, outcome, lambda: told(outcome, payload))

        timer = self._world.loop.call_later(timeout_s, told, PeerTimeout("no answer in time"), b"")
        self._send(self.name, node, method, encoded, lambda: target.deliver(self.name, method, encoded, bulk, answer))
        return True

    def _send(self, source: str, target: str, method: str, content: bytes | StoragedError, arrive: Any) -> None:
        world = self._world
        if not self.alive:
            return
        if source in world.stopped:
            world.stopped[source].append(partial(self._send, source, target, method, content, arrive))
            return
        copies = 2 if world.random.random() < world.weather.duplicate else 1
        for _ in range(copies):
            if world.random.random() >= world.weather.lose:
                late_s = world.prepares_late.get(source, 0.0) if method == PREPARE else 0.0
                world.loop.call_later(world.delay_s() + late_s, self._arrive, source, target, method, content, arrive)

    def _arrive(self, source: str, target: str, method: str, content: bytes | StoragedError, arrive: Any) -> None:
        world = self._world
        if world.apart(source, target):
            return
        if target in world.stopped:
            world.stopped[target].append(partial(self._arrive, source, target, method, content, arrive))
            return
        world.messages += 1
        world.note(source, target, method, world.digest(content))
        arrive()


PREPARE = "meta.prepare"


def _resolve(answered: asyncio.Future[Any], outcome: bytes | StoragedError, payload: bytes) -> None:
    if not answered.done():
        answered.set_result((outcome, payload))


def _expire(answered: asyncio.Future[Any]) -> None:
    if not answered.done():
        answered.set_exception(PeerTimeout("no answer in time"))
