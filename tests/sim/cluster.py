"""A cluster of the ring's real replicas and clients over a virtual network and virtual disks.

What is virtual: time, the network (``network``), the disk under ``MemoryMetaStore`` or under the program's own store
(``file_disk``), randomness. What is real: the acceptor, the proposer, the messages as bytes, the RPC methods. A process
dies by losing its memory: what it had on the way to the disk arrives in part, what it had on the wire arrives or does
not, what is sent to it is lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import xxhash

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.ports import Call, Method, OnAnswer, PeerIdentity, Reply
from storaged.cluster.rpc import faults
from storaged.errors import DiskForeign, DiskUnusable, PeerRefused, StoragedError
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, Value
from storaged.meta.proposer.new_keys import NewKeyRate
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.transport.accept_batching import ALONE_MAX
from storaged.meta.transport.replicas import ReplicaDirectory, ReplicaHost
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.layouts import Places
from tests.doubles.meta_store import MemoryMetaStore
from tests.sim.file_disk import FileDisk, directory_for_files
from tests.sim.network import NetworkCaller
from tests.sim.payloads import PayloadDisk
from tests.sim.virtual import VirtualClock, VirtualLoop
from tests.worlds.ring_client import ring_client

DISKS = ("d0", "d1", "d2", "d3", "d4")
FIRST_SEEDS = DISKS[:3]
IMPATIENT: dict[str, Any] = {"deadline_s": 2.0, "call_timeout_s": 0.3, "hedge_s": 0.02}
"""Time limits of clients: runs are short."""
EPOCHS = 2
"""Layouts that nodes know of."""
SKEW_MS_MAX = 5_000
WIDE_SKEW_MS_MAX = 100_000
"""In some of the runs: more than creates bear, and far less than an hour."""


def node_of(process: str) -> str:
    """``g0`` and ``g0.1`` are two processes of the node ``g0``."""
    return process.partition(".")[0]


ROLES_CHECKED = frozenset({"meta.fence", "meta.unfence"})
"""What the table of methods refuses here. Prepares, accepts and creates are left to ``meta.authority.Gate``, which says
the same; epochs are fenced by nobody yet but the simulation.
"""


def _peer(name: str, roles: tuple[str, ...] = ("gateway",)) -> PeerIdentity:
    return PeerIdentity(name, "FR", "par1", "a", roles)


def make_layout(epoch: int, seeds: Sequence[str]) -> Layout:
    """Five disks, each on a node of its own (``n0`` has ``d0``); registers of the system partition
    live on ``seeds``.
    """
    nodes = tuple(NodeEntry("n" + disk[1:], f"FR/site/{disk}", "", ("storage",)) for disk in DISKS)
    disks = tuple(DiskEntry(disk, "n" + disk[1:], 1) for disk in DISKS)
    return Layout("sim", epoch, nodes, disks, tuple(seeds))


class Layouts(Places):
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
    promises_max: int = 3
    """Of every replica: few, so that promises are evicted."""
    on_files: bool = False
    """Disks have the program's own store, on files that fail."""
    directories: int = 0
    contents: bool = True
    """Contents of messages are a part of the trace. Not where they have signatures, which are others in each run."""
    gathering: float = 0.5
    """The part of the gateways that send no accept by itself while others may follow in the same turn."""
    prepares_late: dict[str, float] = field(default_factory=dict)
    """How many seconds longer prepares of a process take."""
    stopped: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    """What waits for processes that are stopped."""
    overtake: Callable[[RegisterName, Value, Value], Value | None] = lambda name, create, below: create
    """Of every gateway's client."""
    _files: Any = None
    _trace: Any = field(default_factory=sha256)

    def note(self, *facts: object) -> None:
        self._trace.update(f"{self.loop.time():.9f} {facts!r}\n".encode())

    def digest(self, content: bytes | StoragedError) -> str:
        """Of a message. Errors name this run's directory, which is another one in every process."""
        if not self.contents:
            return ""
        if isinstance(content, StoragedError):
            return type(content).__name__
        if self._files is not None:
            content = content.replace(self._files.name.encode(), b"")
        return xxhash.xxh3_64_hexdigest(content)

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

    def stop(self, process: str) -> None:
        """As SIGSTOP: what it sends and what is sent to it waits. Its timers go on."""
        self.note("stop", process)
        self.stopped.setdefault(process, [])

    def go_on(self, process: str) -> None:
        for waiting in self.stopped.pop(process, ()):
            waiting()

    def files(self) -> str:
        """The directory of this run's files."""
        if self._files is None:
            self._files = directory_for_files()
        return str(self._files.name)

    def close(self) -> None:
        """At the end of a run."""
        for node in self.nodes.values():
            node.up = False
            node.medium.close()
        if self._files is not None:
            self._files.cleanup()

    async def sync(self) -> None:
        slow = self.random.random() < self.weather.slow
        await asyncio.sleep(
            self.random.uniform(0.0002, self.weather.sync_ms / 1000) * (self.weather.slow_sync if slow else 1)
        )


class MemoryDisk:
    """A disk of a run: the store of its replica, and the small copies. ``hung``: nothing is written until the event is
    set. ``file_disk.FileDisk`` is the other kind.
    """

    refusal = ""
    """Why the store takes no writes."""

    def __init__(self, world: World, _name: str) -> None:
        self.world = world
        self.hung: asyncio.Event | None = None
        self.store: Any = MemoryMetaStore(sync=self.world_sync, entropy=world.random.randbytes)
        self.payloads: Any = PayloadDisk()

    async def unless_hung(self) -> None:
        while self.hung is not None:
            await self.hung.wait()

    async def world_sync(self) -> None:
        await self.unless_hung()
        await self.world.sync()
        await self.unless_hung()

    def copies(self, life: int, node: StorageNode) -> PlainCopies:
        """For one life of the process. Now and then the disk takes no copy: it is full."""

        async def store(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
            content = b"".join(bytes(piece) for piece in body)
            full = self.world.random.random() < self.world.weather.full
            await self.world_sync()
            if node.life != life or not node.up:
                raise DiskUnusable("the process died")
            if full:
                raise DiskUnusable("the disk is full")
            self.payloads.stored(header, content)

        return PlainCopies(self.store, store, self.payloads.load, holds=self.payloads.holds)

    def give_copy(self, data_id: bytes, content: bytes) -> None:
        """Durably, as a copier would."""
        self.payloads.synced.setdefault(data_id, content)

    def crash(self) -> None:
        """Some prefix of the commits on their way reaches the disk."""
        self.store.crash(self.world.random.choice((0, 0, 1, 2)))

    def close(self) -> None:
        """At the end of a run."""


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
        self.clock = VirtualClock(world.loop, world.skew_ms() if skew_ms is None else skew_ms)
        self._handlers: dict[asyncio.Task[None], None] = {}
        self.blank_disk()
        self.expected_store_id = self.store.store_id
        self.start()
        world.nodes[name] = self

    def blank_disk(self) -> None:
        if self.life:
            self.medium.close()
        self.medium: Any = (FileDisk if self.world.on_files else MemoryDisk)(self.world, self.name)

    @property
    def store(self) -> Any:
        return self.medium.store

    @property
    def payloads(self) -> Any:
        return self.medium.payloads

    @property
    def silent(self) -> bool:
        """It is up, and takes no part in the ring."""
        return self.up and self.replica.statistics().state != "ok"

    @property
    def takes_writes(self) -> bool:
        """Its disk is the right one, has room, and did not fail."""
        return not (self.foreign or self.silent or self.medium.refusal)

    def start(self) -> None:
        self.life += 1
        self.world.note("start", self.name)
        clock = self.clock
        try:
            self.replica = LocalReplica.open(
                self.disk,
                self.store,
                self.expected_store_id,
                copies=self.medium.copies(self.life, self),
                promises_max=self.world.promises_max,
                rules=self.world.rules,
                clock=clock,
            )
        except DiskForeign:
            self.foreign = True
            return
        self.up = True
        world = self.world
        self.methods = ReplicaHost(
            {self.disk: self.replica}, lambda: world.epochs, world.rules, world.on_refusal
        ).methods()

    async def start_accepted(self, epoch: int) -> None:
        """With the blank disk that an operator has accepted."""
        self.expected_store_id = self.store.store_id
        self.start()
        self.up = False
        await self.replica.end_promises(epoch)
        self.up = True

    def give_copy(self, data_id: bytes, content: bytes) -> None:
        """Durably, as a copier would."""
        self.payloads.synced.setdefault(data_id, content)

    def crash(self) -> None:
        """Some prefix of the commits on their way reaches the disk; nobody hears of it."""
        self.world.note("crash", self.name)
        self.up = False
        self.replica.fail(DiskUnusable("the process died"))  # nothing of this life may begin another write
        for handler in tuple(self._handlers):
            handler.cancel()
        self.medium.crash()

    def deliver(self, source: str, method: str, request: bytes, body: bytes, answer: Any) -> None:
        """A request of the process ``source`` arrives; ``answer(reply bytes or error, bulk)`` sends the reply."""
        if not self.up:
            return
        entry, life = self.methods[method], self.life
        peer = _peer(node_of(source), self.world.roles.get(source, ("gateway",)))
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

        if method in ROLES_CHECKED and entry.roles.isdisjoint(peer.roles):
            reply(PeerRefused(f"{method} is not for {peer.roles}", faults.ROLE_REFUSED))
            return
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
        self.layouts: Any = Layouts(layout)
        self.clock = VirtualClock(world.loop, world.skew_ms() if skew_ms is None else skew_ms)
        self.life = 0
        self.start()

    def start(self) -> None:
        self.life += 1
        world = self._world
        self.caller = NetworkCaller(world, self.name)
        node = self._node
        if node is not None and not node.up:
            node.start()
        together = -1 if world.random.random() < world.gathering else ALONE_MAX
        self.directory = ReplicaDirectory(
            self.layouts, self.caller, self._local if node is None else {node.disk: node.replica}, alone_max=together
        )
        self.client = ring_client(
            self.layouts,
            self.directory,
            kind=self._kind,
            node=node_of(self.name),
            clock=self.clock,
            entropy=world.random.randbytes,
            jitter=world.random.random,
            rules=world.rules,
            new_keys=Guess(world),
            overtake=world.overtake,
            **{**IMPATIENT, **self._options},
        )

    async def crash(self) -> None:
        self._world.note("crash", self.name)
        self.caller.alive = False
        if self._node is not None:
            self._node.crash()
        await self.client.close()
