"""A cluster of the ring's real replicas and clients over a virtual network and virtual disks.

What is virtual: time, the network (delay, loss, duplicates, reordering, partitions), the disk under
``MemoryMetaStore``, randomness. What is real: the acceptor,
the proposer, the messages as bytes, the RPC methods. A process dies by losing its memory: what it had on the way to the
disk arrives in part, what
it had on the wire arrives or does not, what is sent to it is lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

import xxhash

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.ports import Call, EncodedCall, Method, OnAnswer, OnReply, PeerIdentity, Reply, T
from storaged.errors import (
    DiskForeign,
    DiskUnusable,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    StoragedError,
)
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName
from storaged.meta.proposer.new_keys import NewKeyRate
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import Copy
from storaged.meta.transport.accept_batching import ALONE_MAX
from storaged.meta.transport.replicas import ReplicaDirectory, ReplicaHost
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.meta_store import MemoryMetaStore
from tests.sim.virtual import VirtualClock, VirtualLoop
from tests.worlds.ring_client import ring_client

DISKS = ("d0", "d1", "d2", "d3", "d4")
FIRST_SEEDS = DISKS[:3]
EPOCHS = 2
"""Layouts that nodes know of."""
SKEW_MS_MAX = 5_000
WIDE_SKEW_MS_MAX = 100_000
"""In some of the runs: more than creates bear, and far less than an hour."""


def _peer(name: str, roles: tuple[str, ...] = ("gateway",)) -> PeerIdentity:
    return PeerIdentity(name, "FR", "par1", "a", roles)


def make_layout(epoch: int, seeds: Sequence[str]) -> Layout:
    """Five disks, each on a node of its own (``n0`` has ``d0``); registers of the system partition
    live on ``seeds``.
    """
    nodes = tuple(NodeEntry("n" + disk[1:], f"FR/site/{disk}", "", ("storage",)) for disk in DISKS)
    disks = tuple(DiskEntry(disk, "n" + disk[1:], 1) for disk in DISKS)
    return Layout("sim", epoch, nodes, disks, tuple(seeds))


class Layouts:
    """``cluster.ports.Layouts``: what one process believes."""

    def __init__(self, layout: Layout) -> None:
        self.current = layout

    def at(self, epoch: int) -> Layout:
        if epoch != self.current.epoch:
            raise KeyError(epoch)
        return self.current


@dataclass
class Weather:
    """How badly the network and the disks behave. Probabilities are per message."""

    lose: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    full: float = 0.0
    sync_ms: float = 4.0
    slow_s: float = 0.4
    """The longest delay of a slow message."""
    slow_sync: float = 20
    """How many times longer a slow sync takes."""
    refuse: float = 0.1
    """A post is refused, as when a connection has no room."""


@dataclass
class World:
    """Everything that the processes of one run share. ``trace`` is a digest over all that happened, in order."""

    loop: VirtualLoop
    random: random.Random
    rules: Rules = RULES
    weather: Weather = field(default_factory=Weather)
    nodes: dict[str, StorageNode] = field(default_factory=dict)
    cut: frozenset[str] = frozenset()
    """Processes on the far side of a partition: they reach each other, and nobody on the near side."""
    skew_ms_max: int = SKEW_MS_MAX
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of processes that are no gateways."""
    epochs: int = EPOCHS
    """The newest layout that nodes know."""
    on_refusal: Callable[[str, StoragedError], None] = lambda peer, error: None
    """Told of what replicas' nodes refuse as no honest node's."""
    messages: int = 0
    _trace: Any = field(default_factory=sha256)

    def note(self, *facts: object) -> None:
        self._trace.update(f"{self.loop.time():.9f} {facts!r}\n".encode())

    def trace(self) -> str:
        return str(self._trace.hexdigest())

    def skew_ms(self) -> int:
        """How wrong the next process's clock is."""
        return self.random.randint(-self.skew_ms_max, self.skew_ms_max)

    def apart(self, one: str, other: str) -> bool:
        return (one in self.cut) != (other in self.cut)

    def delay_s(self) -> float:
        if self.random.random() < self.weather.slow:
            return self.random.uniform(0.01, self.weather.slow_s)
        return self.random.uniform(0.0005, 0.004)

    async def sync(self) -> None:
        slow = self.random.random() < self.weather.slow
        await asyncio.sleep(
            self.random.uniform(0.0002, self.weather.sync_ms / 1000) * (self.weather.slow_sync if slow else 1)
        )


class PayloadDisk:
    """Small copies of one disk: durable once synced."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.synced: dict[bytes, bytes] = {}

    def bound_to(self, life: int, node: StorageNode) -> PlainCopies:
        """For one life of the process. Now and then the disk takes no copy: it is full."""

        async def store(header: bytes, body: Sequence[Buffer]) -> None:
            content = b"".join(bytes(piece) for piece in body)
            full = self._world.random.random() < self._world.weather.full
            await self._world.sync()
            if node.life != life or not node.up:
                raise DiskUnusable("the process died")
            if full:
                raise DiskUnusable("the disk is full")
            self.synced[header] = content

        async def load(data_id: bytes) -> Copy | None:
            found = self.synced.get(data_id)
            return None if found is None else Copy(data_id, memoryview(found))

        return PlainCopies(node.store, store, load)


class StorageNode:
    """One process with one disk; it may die and come back, and its disk may be swapped for a blank one meanwhile."""

    def __init__(self, world: World, name: str, disk: str, skew_ms: int | None = None) -> None:
        self.world = world
        self.name = name
        self.disk = disk
        self.life = 0
        self.up = False
        self.foreign = False
        self.epoch = 0
        self.skew_ms = world.skew_ms() if skew_ms is None else skew_ms
        self._handlers: dict[asyncio.Task[None], None] = {}
        self.blank_disk()
        self.expected_store_id = self.store.store_id
        self.start()
        world.nodes[name] = self

    def blank_disk(self) -> None:
        self.store = MemoryMetaStore(sync=self.world.sync, entropy=self.world.random.randbytes)
        self.payloads = PayloadDisk(self.world)

    def start(self) -> None:
        self.life += 1
        self.world.note("start", self.name)
        clock = VirtualClock(self.world.loop, self.skew_ms)
        try:
            self.replica = LocalReplica.open(
                self.disk,
                self.store,
                self.expected_store_id,
                copies=self.payloads.bound_to(self.life, self),
                promises_max=3,
                rules=self.world.rules,
                clock=clock,
            )
        except DiskForeign:
            self.foreign = True
            return
        self.up = True
        world = self.world
        self.methods = ReplicaHost(
            {self.disk: self.replica}, lambda: world.epochs, world.rules, clock, world.on_refusal
        ).methods()

    async def start_accepted(self, epoch: int) -> None:
        """With the blank disk that an operator has accepted."""
        self.expected_store_id = self.store.store_id
        self.start()
        self.up = False
        await self.replica.end_promises(epoch)
        self.up = True

    def crash(self) -> None:
        """Some prefix of the commits on their way reaches the disk; nobody hears of it."""
        self.world.note("crash", self.name)
        self.up = False
        self.replica.fail(DiskUnusable("the process died"))  # nothing of this life may begin another write
        for handler in tuple(self._handlers):
            handler.cancel()
        self.store.crash(self.world.random.choice((0, 0, 1, 2)))

    def deliver(self, source: str, method: str, request: bytes, body: bytes, answer: Any) -> None:
        """A request of the process ``source`` arrives; ``answer(reply bytes or error, bulk)`` sends the reply."""
        if not self.up:
            return
        entry, life = self.methods[method], self.life
        peer = _peer(source, self.world.roles.get(source, ("gateway",)))
        asked, call = decode(request, entry.request), Call(peer, memoryview(body), 0.0)

        def reply(outcome: Message | Reply | Exception) -> None:
            if not self.up or self.life != life:
                return
            if isinstance(outcome, Reply):
                answer(encode(outcome.message), b"".join(bytes(piece) for piece in outcome.body))
            elif isinstance(outcome, Message):
                answer(encode(outcome), b"")
            elif isinstance(outcome, StoragedError):
                answer(outcome, b"")
            else:
                raise outcome

        try:
            found = entry.try_answer(asked, call) if entry.try_answer is not None else None
            if found is not None:
                reply(found)
                return
            if entry.try_start is not None and entry.try_start(asked, call, reply):
                return
        except StoragedError as error:
            reply(error)
            return
        task = self.world.loop.create_task(self._handle(entry, asked, call, reply))
        self._handlers[task] = None
        task.add_done_callback(lambda done: self._handlers.pop(done, None))

    async def _handle(self, entry: Method, request: Message, call: Call, reply: OnAnswer) -> None:
        try:
            reply(await entry.handler(request, call))
        except StoragedError as error:
            reply(error)


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
        self, node: str, method: str, reply: type[Message], start: bytes, *, urgent: bool = False
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
        copies = 2 if world.random.random() < world.weather.duplicate else 1
        for _ in range(copies):
            if world.random.random() >= world.weather.lose:
                world.loop.call_later(world.delay_s(), self._arrive, source, target, method, content, arrive)

    def _arrive(self, source: str, target: str, method: str, content: bytes | StoragedError, arrive: Any) -> None:
        if self._world.apart(source, target):
            return
        self._world.messages += 1
        digest = xxhash.xxh3_64_hexdigest(content) if isinstance(content, bytes) else repr(content)
        self._world.note(source, target, method, digest)
        arrive()


def _resolve(answered: asyncio.Future[Any], outcome: bytes | StoragedError, payload: bytes) -> None:
    if not answered.done():
        answered.set_result((outcome, payload))


def _expire(answered: asyncio.Future[Any]) -> None:
    if not answered.done():
        answered.set_exception(PeerTimeout("no answer in time"))


class Guess(NewKeyRate):
    """Takes registers for new that are not, and the other way round."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def likely(self, name: RegisterName) -> bool:
        return self._world.random.random() < 0.7


class Gateway:
    """One process with a ring client. After ``crash`` its calls reach nobody, and a new life has a new incarnation.
    ``node``: a storage node in the same process,
    whose replica is asked without the network, and which dies and comes back with it."""

    def __init__(
        self,
        world: World,
        name: str,
        layout: Layout,
        node: StorageNode | None = None,
        *,
        skew_ms: int | None = None,
        kind: type[RingClient] = RingClient,
        local: dict[str, LocalReplica] | None = None,
        **options: Any,
    ) -> None:
        """``options`` of its client, which is one of this ``kind``."""
        self._world = world
        self._kind = kind
        self._local = local
        self._options = options
        self.name = name
        self._node = node
        self.layouts = Layouts(layout)
        self._skew_ms = world.skew_ms() if skew_ms is None else skew_ms
        self.life = 0
        self.start()

    def start(self) -> None:
        self.life += 1
        world = self._world
        self.caller = NetworkCaller(world, self.name)
        node = self._node
        if node is not None and not node.up:
            node.start()
        together = -1 if world.random.random() < 0.5 else ALONE_MAX
        self.directory = ReplicaDirectory(
            self.layouts, self.caller, self._local if node is None else {node.disk: node.replica}, alone_max=together
        )
        self.client = ring_client(
            self.layouts,
            self.directory,
            kind=self._kind,
            node=self.name,
            clock=VirtualClock(world.loop, self._skew_ms),
            entropy=world.random.randbytes,
            jitter=world.random.random,
            deadline_s=2.0,
            call_timeout_s=0.3,
            hedge_s=0.02,
            rules=world.rules,
            new_keys=Guess(world),
            **self._options,
        )

    async def crash(self) -> None:
        self._world.note("crash", self.name)
        self.caller.alive = False
        if self._node is not None:
            self._node.crash()
        await self.client.close()
