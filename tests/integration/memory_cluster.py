"""A whole cluster in one process, of the real parts but for sockets and disks: three racks of one node with two disks
each, and a gateway.

What is virtual: time (an hour passes in no time), the network (a call is a function call with its messages encoded),
the disks (in memory). Threads run in line, so that a test does the same thing every time.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import msgspec

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.partitions import PartitionRecord
from storaged.cluster.ports import Call, DiskStatus, Method, OnReply, PeerIdentity, Reply
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.authority import METHODS
from storaged.cluster.sparing import UNREACHABLE
from storaged.disk_states import FAILED
from storaged.errors import PeerError, PeerRefused, PeerUnreachable, StoragedError
from storaged.fragments.payloads import Payloads, header_at_position
from storaged.fragments.ports import FragmentId
from storaged.fragments.remote import FragmentHost, StoreDirectory
from storaged.maintain.answers import Answers, divide_handler, loans_handler, settle_handler
from storaged.maintain.asks import Asks
from storaged.maintain.context import MaintainContext, MaintainLimits
from storaged.maintain.discard import Discarder
from storaged.maintain.health import BlockPlace, blocks_of
from storaged.maintain.mover import Mover
from storaged.maintain.service import MaintainClient, Maintenance
from storaged.maintain.status import MaintainStatus
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.authority import KnownSteps
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import Change, RegisterName, Table, Value, object_name
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import RowDamaged
from storaged.meta.transport.replicas import ReplicaDirectory, ReplicaHost
from storaged.node.disks import load_of
from storaged.node.keeper import SystemKeeper
from storaged.objects.api import BodyChecks, NewMeta, Principal, PutResult
from storaged.objects.code.adding import overtake
from storaged.objects.code.manifest import parts_of
from storaged.objects.code.small_copy import is_small_copy
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.records import BucketRecord, ObjectRecord, PartEntry, decode_object, encode_object
from storaged.objects.service import ObjectService
from storaged.objects.system.belief import Belief
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.users import UserService
from storaged.objects.write.departures import end_old
from storaged.objects.write.divide import divide
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.fragments import MemoryFragmentStore
from tests.doubles.keys import MemoryKeys, MemorySigners
from tests.doubles.layouts import KnownLayouts, Places
from tests.doubles.meta_store import MemoryMetaStore
from tests.sim.virtual import VirtualClock, VirtualLoop
from tests.suites.meta_store import slots_in
from tests.worlds.ring_client import ring_client

T = TypeVar("T")
M = TypeVar("M", bound=Message)

WHO = Principal("f" * 64, "tester")
CALL_S = 0.0005
PASSED_ON_S = 0.02
RACKS = {"a": "FR/par1/a", "b": "FR/par2/b", "c": "FR/lyo1/c"}


class InlineLoop(VirtualLoop):
    """Work for threads is done at once. A test may let days pass."""

    def advance(self, seconds: float) -> None:
        self._now += max(seconds, 0.0)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def run(scenario: Callable[[Cluster], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Runs ``scenario(cluster)`` in virtual time. What went wrong in the background fails the test."""
    loop = InlineLoop()

    async def main() -> None:
        cluster = Cluster(loop, **options)
        try:
            await scenario(cluster)
        finally:
            await cluster.close()

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert not loop.troubles, loop.troubles


def layout_of(disks_per_node: int = 2, epoch: int = 1, racks: Mapping[str, str] = RACKS) -> Layout:
    nodes = tuple(NodeEntry(f"n{rack}", location, "", ("storage",)) for rack, location in racks.items())
    disks = tuple(DiskEntry(f"{rack}{index}", f"n{rack}", 1) for rack in racks for index in range(disks_per_node))
    return Layout("test", epoch, nodes, disks, ("a0", "b0", "c0"))


class StorageNode:
    """One storage process: it can be killed and started again on its disks."""

    def __init__(self, cluster: Cluster, name: str, disks: Iterable[str]) -> None:
        self._cluster = cluster
        self.name = name
        self.layouts = ProcessLayouts(cluster.layouts)
        self.meta = {disk: MemoryMetaStore() for disk in disks}
        self.fragments = {disk: MemoryFragmentStore() for disk in disks}
        self.up = False
        self.lives = 0
        self.log: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        cluster, self.up = self._cluster, True
        self.lives += 1
        self.replicas: dict[str, LocalReplica] = {}
        self.stores: dict[str, MemoryFragmentStore] = dict(self.fragments)
        for disk, meta in self.meta.items():
            copies = Payloads(self.fragments[disk])
            self.replicas[disk] = LocalReplica(
                disk,
                meta,
                copies=PlainCopies(meta, copies.store_payload, load_of(copies), holds=copies.holds_payload),
                clock=cluster.clock,
            )
        caller = LocalCaller(cluster, self.name, "storage")
        directory = ReplicaDirectory(self.layouts, caller, self.replicas)
        asks = Asks(cluster.clock, self.log.append)
        self.ring = ring_client(
            self.layouts,
            directory,
            node=self.name,
            clock=cluster.clock,
            copy_at=header_at_position,
            is_copy=is_small_copy,
            refresh=self.layouts.refresh,
            jitter=lambda: 0.5,
            gateway=False,
            ask_to_settle=asks.settle,
        )
        scanner = RingScanner(self.layouts, directory, self.ring, cluster.alive)
        context = MaintainContext(
            node=self.name,
            clock=cluster.clock,
            layouts=self.layouts,
            liveness=cluster.alive,
            registers=self.ring,
            look=self.ring.look,
            pages=self.ring,
            scanner=scanner,
            stores=StoreDirectory(self.layouts, caller, self.stores),
            local_meta=self.meta,
            local_fragments=self.fragments,
            signers=MemorySigners(),
            asks=asks,
            adopt=lambda disk, request, copy: self.replicas[disk].accept(request, copy),
            small_copies=self.ring.small_copies,
            compared_at=lambda: self.host.compared_at,
            why_away=cluster.alive.why_away,
            reports=cluster.alive.reports,
            limits=cluster.limits,
            log=self.log.append,
        )

        self.context = context
        self.maintenance = Maintenance(context, scanner, caller)
        self.host = ReplicaHost(self.replicas, lambda: self.layouts.current.epoch, steps=self.layouts.steps())
        self.methods: dict[str, Method] = {
            **self.host.methods(),
            **FragmentHost(self.stores, self.maintenance.fragment_contested).methods(),
            **self.maintenance.methods(),
        }

    def maintain(self) -> None:
        """Starts background work."""
        if self.up and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self.maintenance.run())

    async def kill(self) -> None:
        """What was not synced is lost."""
        self.up = False
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() or task.exception() is None, task.exception()
        await self.ring.close()
        for store in self.fragments.values():
            store.crash()

    def check(self) -> None:
        """Background work must not have ended."""
        if self._task is not None and self._task.done():
            self._task.result()


class Alive:
    """``Liveness``: what heartbeats would say, shared by all. ``disks_down`` answer nothing; ``read_only`` take no
    writes.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.disks_down: set[str] = set()
        self.read_only: set[str] = set()
        self.full: frozenset[str] = frozenset()
        self.without_rows: frozenset[str] = frozenset()
        self.ample: frozenset[str] = frozenset()
        self.slow: set[str] = set()
        self.late: list[str] = []
        self.room_bytes: dict[str, int] = {}
        """What each disk may have in all; empty: heartbeats say nothing of that."""

    def reports(self) -> dict[str, DiskStatus]:
        found = {}
        for node in self._cluster.nodes.values():
            for disk, store in node.fragments.items():
                if disk in self.room_bytes:
                    used, room = store.held_bytes, self.room_bytes[disk]
                    found[disk] = DiskStatus(disk, "", "ok", used, max(0, room - used))
        return found

    def disk_readable(self, disk_id: str) -> bool:
        for node in self._cluster.nodes.values():
            if disk_id in node.meta:
                return node.up and disk_id not in self.disks_down
        return False

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id) and disk_id not in self.read_only | self.full

    def disk_prompt(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id) and disk_id not in self.slow

    def disk_late(self, disk_id: str, for_s: float) -> None:
        self.late.append(disk_id)

    def disk_answered(self, disk_id: str) -> None:
        pass

    def disks_full(self) -> frozenset[str]:
        return self.full

    def disk_takes_rows(self, disk_id: str, *, outside_reserve: bool = False) -> bool:
        return disk_id in self.ample if outside_reserve else disk_id not in self.without_rows

    def why_away(self, disk_id: str) -> str:
        if self.disk_readable(disk_id):
            return ""
        return FAILED if any(node.up and disk_id in node.meta for node in self._cluster.nodes.values()) else UNREACHABLE


class ProcessLayouts(Places):
    """What one process knows: the layouts of all, and the records of partitions that it has learnt."""

    def __init__(self, shared: KnownLayouts) -> None:
        self._shared = shared
        self.partitions.complete = True

    @property
    def current(self) -> Layout:
        return self._shared.current

    def at(self, epoch: int) -> Layout:
        return self._shared.at(epoch)

    def earlier(self) -> list[Layout]:
        return self._shared.earlier()

    async def refresh(self, partition: int) -> None:
        record = self._shared.partitions.record(partition)
        if record is not None:
            self.partitions.learn(record)

    def steps(self) -> KnownSteps:
        return KnownSteps(lambda partition: self.partitions.step_of(partition, self.current))


class LocalCaller:
    """``Caller``: the other node's method, called directly, where its row lets the caller's ``role``; requests and
    replies go through their encoding. ``intercept`` sees every call before it is made, ``answering`` each that was
    answered.
    """

    def __init__(self, cluster: Cluster, name: str, role: str) -> None:
        self._cluster = cluster
        self._name = name
        self._peer = PeerIdentity(name, "FR", "par1", "a", (role,))

    async def call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[M],
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> tuple[M, memoryview]:
        await asyncio.sleep(CALL_S)
        intercept = self._cluster.intercept
        if intercept is not None:
            await intercept(self._name, node, method, request)
        target = self._cluster.nodes[node]
        if not target.up:
            raise PeerUnreachable(f"{node} is away")
        lives = target.lives
        if METHODS[method].callers.isdisjoint(self._peer.roles):  # also of methods that these nodes lack
            raise faults.refused(faults.ROLE_REFUSED, f"{method} is not for {self._peer.roles}")
        found = target.methods[method]
        call = Call(self._peer, memoryview(b"".join(body)), 0.0)
        asked = decode(encode(request), found.request)
        try:
            answer = await (_started(found, asked, call) if method == "meta.turn" else found.handler(asked, call))
        except PeerError:
            raise
        except StoragedError as error:
            raise PeerRefused(error.message, error.code) from None
        if not target.up or target.lives != lives:
            raise PeerUnreachable(f"{node} went away")
        if self._cluster.answering is not None:
            await self._cluster.answering(self._name, node, method, request)
        message, bulk = (answer.message, b"".join(answer.body)) if isinstance(answer, Reply) else (answer, b"")
        await asyncio.sleep(CALL_S)
        return decode(encode(message), reply), memoryview(bulk)

    def begin_call(
        self, node: str, method: str, request: Message, reply: type[M], on_reply: OnReply, **options: Any
    ) -> Callable[[], object]:
        """``cluster.ports.BeginCaller``."""

        async def run() -> None:
            try:
                answer = await self.call(node, method, request, reply, **options)
            except PeerError as error:
                on_reply(error, memoryview(b""))
            else:
                on_reply(*answer)

        return self._cluster.loop.create_task(run()).cancel


async def _started(method: Method, asked: Message, call: Call) -> Message:
    """What a method answers that has no other way than to be started."""
    answered: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def answer(outcome: Any) -> None:
        if not answered.done():
            answered.set_result(outcome)

    assert method.try_start is not None
    assert method.try_start(asked, call, answer)
    return await answered


Intercept = Callable[[str, str, str, Message], Coroutine[Any, Any, None]]


class Cluster:
    """``objects`` and ``buckets`` are the gateway's; ``kill`` and ``start`` take a node or, as ``rack_a``, all of a
    rack (here they are the same).
    """

    def __init__(
        self,
        loop: InlineLoop,
        *,
        disks_per_node: int = 2,
        limits: MaintainLimits | None = None,
        racks: Mapping[str, str] = RACKS,
        **plane_limits: Any,
    ) -> None:
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.limits = limits or MaintainLimits()
        self.layouts = KnownLayouts(layout_of(disks_per_node, racks=racks))
        self.intercept: Intercept | None = None
        self.answering: Intercept | None = None
        self.log: list[str] = []
        self.nodes: dict[str, StorageNode] = {}
        self.alive = Alive(self)
        for rack in racks:
            disks = [disk.id for disk in self.layouts.current.disks if disk.node == f"n{rack}"]
            self.nodes[f"n{rack}"] = StorageNode(self, f"n{rack}", disks)
        for node in self.nodes.values():
            node.start()
        self._plane_limits = ObjectLimits(**{"block_cells_max": 12, "part_bytes_min": 1, **plane_limits})
        self.keys = MemoryKeys()
        self.gateways: list[Gateway] = []
        self.gateway = self.new_gateway("g")
        self.objects, self.buckets = self.gateway.objects, self.gateway.buckets

    def new_gateway(self, name: str) -> Gateway:
        gateway = Gateway(self, name, self._plane_limits)
        self.gateways.append(gateway)
        return gateway

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.close()
        for node in self.nodes.values():
            if node.up:
                node.check()
                await node.kill()

    # --- what happens to it

    def maintain(self) -> None:
        for node in self.nodes.values():
            node.maintain()

    async def learn(self, record: PartitionRecord, chance: random.Random | None = None) -> None:
        """All processes get to know where a partition is: one after the other, in any order."""
        self.layouts.partitions.learn(record)
        known = [process.layouts for process in (*self.nodes.values(), *self.gateways)]
        (chance or random.Random(0)).shuffle(known)
        for layouts in known:
            await self.pass_s(PASSED_ON_S)
            layouts.partitions.learn(record)

    async def kill(self, *nodes: str) -> None:
        for name in nodes:
            await self.nodes[name].kill()

    def start(self, *nodes: str, maintain: bool = True) -> None:
        for name in nodes:
            assert not self.nodes[name].up
            self.nodes[name].start()
            if maintain:
                self.nodes[name].maintain()

    def lose_disk(self, disk: str) -> None:
        """The disk answers nothing any more."""
        node = self.nodes[self.layouts.current.node_of(disk)]
        self.alive.disks_down.add(disk)
        del node.replicas[disk], node.stores[disk]

    async def pass_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        for node in self.nodes.values():
            node.check()

    async def leap(self, seconds: float) -> None:
        """Time passes at once, between two seconds that pass slowly: what was due meanwhile happens then, once."""
        await self.pass_s(1)
        self.loop.advance(seconds)
        await self.pass_s(1)

    # --- objects

    async def bucket(self, name: str = "bucket") -> BucketRecord:
        return await self.buckets.create(WHO, name, region="eu-fr-1")

    async def put(self, bucket: BucketRecord, key: bytes, data: bytes, gateway: Gateway | None = None) -> PutResult:
        objects = (gateway or self.gateway).objects
        return await objects.put(bucket, key, body_of(data), NewMeta(), BodyChecks(size=len(data)), owner=WHO.user_id)

    async def put_part(
        self, bucket: BucketRecord, key: bytes, upload_id: str, number: int, data: bytes, gateway: Gateway | None = None
    ) -> PutResult:
        objects = (gateway or self.gateway).objects
        return await objects.put_part(bucket, key, upload_id, number, body_of(data), BodyChecks(size=len(data)))

    async def get(self, bucket: BucketRecord, key: bytes) -> bytes:
        stream = await self.objects.get(bucket, key)
        return b"".join([bytes(piece) async for piece in stream.chunks()])

    async def record(self, bucket: BucketRecord, key: bytes) -> ObjectRecord:
        value = (await self.gateway.ring.read(object_name(bucket.id, bucket.shard_numbers, key))).value
        assert value is not None
        return decode_object(value.body)

    async def entry(self, bucket: BucketRecord, key: bytes) -> PartEntry:
        return (await self.record(bucket, key)).versions[0].parts[0]

    # --- fragments

    def store(self, disk: str) -> MemoryFragmentStore:
        return self.nodes[self.layouts.current.node_of(disk)].fragments[disk]

    async def fragments(self, data_id: bytes | None = None) -> list[tuple[str, FragmentId]]:
        """(disk, fragment) of everything, or of one data id, on all disks, also on those that are away."""
        found = []
        for node in self.nodes.values():
            for disk, store in node.fragments.items():
                found += [(disk, FragmentId.unpack(header.id)) async for header in store.scan(limit=1_000_000)]
        return sorted(where for where in found if data_id is None or where[1].data_id == data_id)

    async def places(self, bucket: BucketRecord, key: bytes) -> list[BlockPlace]:
        """Where the object's blocks are, by its record."""
        name = object_name(bucket.id, bucket.shard_numbers, key)
        found: list[BlockPlace] = []
        for version in (await self.record(bucket, key)).versions:
            async for part in parts_of(self.gateway.ring, name, version):
                found += blocks_of(part, name.partition, self.layouts, bucket.countries)
        return found

    def holds(self, disk: str, fragment: FragmentId) -> bool:
        """The disk has the fragment, and its bytes are what its header says."""
        return self.store(disk).is_whole(fragment)

    async def is_whole(self, bucket: BucketRecord, key: bytes) -> bool:
        """Every fragment is where it should be, under the target profile."""
        return all(
            all(self.holds(disk, fragment) for fragment, disk in place.fragments)
            and (place.entry.small or str(place.profile) == place.entry.target)
            for place in await self.places(bucket, key)
        )

    def forge(self, disk: str, fragment: FragmentId, payload: bytes = b"") -> None:
        """The disk lies: other bytes, whose checksums hold."""
        kept = self.store(disk).kept(fragment)
        kept.payload = payload or bytes([kept.payload[0] ^ 0x55]) + kept.payload[1:]

    def meta(self, disk: str) -> MemoryMetaStore:
        return self.nodes[self.layouts.current.node_of(disk)].meta[disk]

    def pages(self, disk: str) -> dict[bytes, int]:
        """Hash -> created ms of every page that a disk has whole."""
        store = self.meta(disk)
        return {page: created for page, created in store.pages(after=b"", limit=10_000) if _is_whole_page(store, page)}

    def rows(self, disk: str) -> dict[bytes, tuple[int, int]]:
        """Packed name -> (sequence, visibility) of every register that a disk has."""
        found = {}
        meta = self.meta(disk)
        for table, scope, shard in meta.scopes():
            for slot in slots_in(meta, table, scope, shard, after=b"", prefix=b"", limit=10_000):
                found[slot.name.pack()] = (slot.value.sequence, slot.value.visibility)
        return found

    def differing_registers(self) -> list[bytes]:
        """Registers whose replicas do not all have the same row."""
        rows = {disk.id: self.rows(disk.id) for disk in self.layouts.current.disks}
        names = {name for found in rows.values() for name in found}
        return sorted(
            name
            for name in names
            if len(
                {rows[disk].get(name) for disk in self.layouts.partition(RegisterName.unpack(name).partition).present}
            )
            > 1
        )

    # --- maintenance

    async def statuses(self) -> list[MaintainStatus]:
        return await self.gateway.maintain.statuses()

    async def counts(self) -> tuple[int, int, bool]:
        """(below target, lost, whether every living node has counted)."""
        told = await self.statuses()
        counted = {status.node for status in told} == {name for name, node in self.nodes.items() if node.up}
        return (
            sum(status.below_target for status in told),
            sum(status.lost for status in told),
            counted and all(status.current for status in told) and self.gateway.keeper.current,
        )

    async def parts_below_target(self) -> int:
        return sum(status.parts_below_target for status in await self.statuses())

    async def settled(self, seconds_max: float = 600.0) -> tuple[int, int]:
        """(below target, lost) once every node has counted and none is busy."""
        end = self.loop.time() + seconds_max
        while self.loop.time() < end:
            await self.pass_s(1.0)
            told = await self.statuses()
            below, lost, counted = await self.counts()
            if counted and not any(status.busy for status in told):
                return below, lost
        raise AssertionError(
            f"still busy after {seconds_max} s: {await self.statuses()}"
            f" {[node.log[-3:] for node in self.nodes.values()]}"
        )


def _is_whole_page(store: MemoryMetaStore, page: bytes) -> bool:
    try:
        return store.get_page(page) is not None
    except RowDamaged:
        return False


class Gateway:
    def __init__(self, cluster: Cluster, name: str, limits: ObjectLimits) -> None:
        self.name = name
        self.layouts = ProcessLayouts(cluster.layouts)
        caller = LocalCaller(cluster, name, "gateway")
        self.maintain = MaintainClient(caller, self.layouts, cluster.alive)
        directory = ReplicaDirectory(self.layouts, caller)
        self.ring = ring_client(
            self.layouts,
            directory,
            node=name,
            clock=cluster.clock,
            copy_at=header_at_position,
            is_copy=is_small_copy,
            refresh=self.layouts.refresh,
            jitter=lambda: 0.5,
            overtake=overtake,
            believes=lambda name, value: self.belief(name, value),
            on_missed=self._missed,
            on_fenced=lambda scope: self.buckets.fenced(scope),
        )
        self.scanner = RingScanner(
            self.layouts,
            directory,
            self.ring,
            cluster.alive,
            on_fenced=lambda scope: self.buckets.fenced(scope),
            refresh=self.layouts.refresh,
        )
        self.keeper = SystemKeeper(self.scanner, self.ring, self.layouts, cluster.alive, jitter=lambda: 0.5)
        self.plane = ObjectPlane(
            registers=self.ring,
            pages=self.ring,
            scanner=self.scanner,
            fences=self.ring,
            stores=StoreDirectory(self.layouts, caller, {}),
            liveness=cluster.alive,
            layouts=self.layouts,
            keys=cluster.keys,
            clock=cluster.clock,
            entropy=os.urandom,
            limits=limits,
            on_damage=lambda damage: self.maintain.hint(
                damage.owner, damage.fragment if damage.reason == "lied" else None
            ),
            on_degraded=self.maintain.hint,
        )
        self.objects = ObjectService(self.plane)
        self.buckets = BucketService(self.plane)
        self.belief = Belief(self.plane, UserService(self.plane))
        loop = asyncio.get_running_loop()
        context = self._maintain_context(cluster)
        self.mover = Mover(context)
        self.discarder = Discarder(context, self.mover)
        handlers = {
            "settle": settle_handler(self.plane.lender_registers),
            "move": self.mover.answer,
            "discard": self.discarder.answer,
            "divide": divide_handler(self.mover.bucket, partial(divide, self.plane)),
            "loans": loans_handler(self.mover.bucket, partial(end_old, self.plane)),
        }
        self.answers = Answers(caller, self.layouts, handlers, cluster.log.append)
        holds = self.maintain.run_holds(self.plane.long_reads.keys)
        work = (self.maintain.run(), self.keeper.run(), holds, self.answers.run())
        self._tasks = [loop.create_task(task) for task in work]

    async def stop_answering(self) -> None:
        """Storage nodes ask this gateway in vain."""
        self._tasks[-1].cancel()
        await asyncio.gather(self._tasks[-1], return_exceptions=True)

    def _maintain_context(self, cluster: Cluster) -> MaintainContext:

        return MaintainContext(
            node=self.name,
            clock=cluster.clock,
            layouts=self.layouts,
            liveness=cluster.alive,
            registers=self.plane.lender_registers,
            look=self.ring.look,
            pages=self.ring,
            scanner=self.scanner,
            stores=self.plane.stores,
            local_meta={},
            local_fragments={},
            signers=MemorySigners(),
            asks=Asks(cluster.clock),
            limits=cluster.limits,
            log=cluster.log.append,
        )

    def _missed(self, name: RegisterName) -> None:
        (self.keeper if name.table == Table.SYSTEM else self.maintain).hint(name)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.objects.close()
        await self.ring.close()


async def body_of(data: bytes) -> AsyncIterator[Buffer]:
    for at in range(0, len(data), 200_000):
        yield data[at : at + 200_000]


def without_hash(value: Value | None) -> Change:
    """The record of a small object as version 0.1.0 wrote it: an update function."""
    assert value is not None
    [version] = decode_object(value.body).versions
    [entry] = version.parts
    old = msgspec.structs.replace(version, parts=(msgspec.structs.replace(entry, copy_hash=b""),))
    return Change(encode_object(ObjectRecord((old,))), value.visibility, value.payload)
