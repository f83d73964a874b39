"""Partitions move from disks to disks while gateways write, read and list in them.

The mover is the program's own (``maintain.partition_mover``): two of its processes run, die and begin again anywhere.
Each process learns of layouts and of steps at another time, and a process that begins again knows no step. Nodes die
and lose what was not synced, disks hang or are lost for good, and one bucket is closed meanwhile. At the end every
partition is where the last layout wants it, and everything can be read, listed and written there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import msgspec

from storaged.cluster.layout import Layout
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionRecord, is_settled, path_of
from storaged.cluster.ports import Method
from storaged.errors import LayoutRefused, NoSuchBucket, StoragedError
from storaged.maintain.partition_mover import MoverPorts, PartitionMover
from storaged.meta.authority import KnownSteps
from storaged.meta.client import DEADLINE_S
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import Change, Visibility, object_name, system_name
from storaged.meta.ports import PageQuery, Update
from storaged.meta.transport.replicas import ReplicaHost
from storaged.wire import decode
from tests.doubles.layouts import KnownLayouts
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, World, make_layout
from tests.sim.lending_fences import Lender
from tests.sim.listing import BUCKET, LISTED_KEYS, SHARDS, Listing
from tests.sim.operators import Spread, spread_layout, suffice
from tests.sim.parts import BitFlips, ClockJumps, HungDisks, Part, Suspensions, Trouble
from tests.sim.scenario import Scenario, play_out
from tests.sim.sparing import POLICY, Sparing
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, Workload

MOVERS = 2
PATIENCE_S = 60.0
"""Of a sound cluster, until all partitions are where they belong."""
CLOSED = object_name(b"a closed bucket.", range(1), b"key")
REOPENED = object_name(b"a fenced bucket.", range(1), b"key")
OTHER_KEYS = ("x", "y", "z")
"""Of objects that are read and changed one by one, small ones too."""
NAMES = {key: object_name(BUCKET, range(SHARDS), key.encode()) for key in (*LISTED_KEYS, *OTHER_KEYS)}
NUMBERS = sorted({name.partition for name in (*NAMES.values(), CLOSED, REOPENED)})


SPREAD_SHARE = 0.3
"""Of the runs."""


def layouts_of(chance: random.Random, *, spreads: bool = False) -> list[Layout]:
    """The first one places the partitions; each of the others moves some. ``spreads``: no operator is trusted alone."""
    found: list[Layout] = []
    count = chance.choice((2, 2, 3))
    while len(found) < count:
        disks = frozenset(chance.sample(DISKS, chance.choice((3, 4, 4))))
        if spreads and not suffice(disks):
            continue
        whole = make_layout(len(found) + 1, FIRST_SEEDS)
        places = tuple(
            disk if disk.id in disks else msgspec.structs.replace(disk, state="draining") for disk in whole.disks
        )
        layout = msgspec.structs.replace(whole, disks=places, base=1 if found else 0, sparing=POLICY)
        layout = spread_layout(layout) if spreads else layout
        if not found or any(
            set(layout.replicas_of(number)) != set(found[-1].replicas_of(number)) for number in NUMBERS
        ):
            found.append(layout)
    return found


OnRecord = Callable[[PartitionRecord], None]


class _Map(PartitionMap):
    """``on_record``: told of each record that a process learns or makes."""

    def __init__(self, on_record: OnRecord) -> None:
        super().__init__()
        self._on_record = on_record

    def learn(self, record: PartitionRecord) -> bool:
        self._on_record(record)
        return super().learn(record)


class Places(KnownLayouts):
    """What one process knows: all layouts as soon as they are in force for it, and the steps that it was told."""

    def __init__(self, layouts: list[Layout], current: Layout, on_record: OnRecord) -> None:
        super().__init__(current)
        self._known = {layout.epoch: layout for layout in layouts}
        self.partitions = _Map(on_record)
        self.partitions.complete = True  # as if it had read all records before the first partition moved

    def learn_record(self, record: PartitionRecord) -> None:
        """As a node does: a gateway could have written one with lost disks that no layout names."""
        if set(record.lost) <= set(self.current.lost):
            with contextlib.suppress(LayoutRefused):
                self.partitions.learn(record)


class Process(Gateway):
    """A gateway whose partitions move."""

    def __init__(self, scenario: Moving, name: str, **options: Any) -> None:
        self._scenario = scenario
        super().__init__(scenario.world, name, scenario.layout, refresh=self.refresh, **options)

    def start(self) -> None:
        """A new process knows no step yet."""
        self.layouts: Any = Places(
            self._scenario.layouts,
            self._scenario.known.get(self.name, self._scenario.layouts[0]),
            self._scenario.note_record,
        )
        super().start()

    async def refresh(self, partition: int) -> None:
        value = (await self.client.read(system_name(path_of(partition)))).value
        if value is not None and value.body:
            self.layouts.learn_record(decode(value.body, PartitionRecord))


class Node(StorageNode):
    """A storage node that learns steps when another process names them."""

    scenario: Moving

    def start(self) -> None:
        super().start()
        if not self.up:
            return
        if (lender := getattr(self.scenario, "lender", None)) is not None:  # other plays have none
            lender.corrupt(self)
        world, life = self.world, self.life
        self.places = Places(self.scenario.layouts, self.scenario.layouts[-1], self.scenario.note_record)
        self.learning: set[int] = set()

        def on_newer(partition: int) -> None:
            if partition not in self.learning:
                self.learning.add(partition)
                world.loop.create_task(self.learn(partition, life))

        steps = KnownSteps(lambda number: self.places.partitions.step_of(number, self.places.current), on_newer)
        host = ReplicaHost(
            {self.disk: self.replica}, lambda: self.scenario.layouts[-1].epoch, world.rules, world.on_refusal, steps
        )
        self.methods = {**host.methods(), **self.scenario.methods_of(self.name)}

    async def learn(self, partition: int, life: int) -> None:
        asker = Process(self.scenario, self.name, gateway=False, skew_ms=0)
        try:
            with contextlib.suppress(StoragedError):
                await asker.refresh(partition)
            record = asker.layouts.partitions.record(partition)
            if record is not None and self.life == life:
                self.places.partitions.learn(record)
        finally:
            self.learning.discard(partition)
            await asker.client.close()


class Seen:
    """Liveness: a disk whose node is down is away; now and then a sound one seems to be."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world = world
        self._chance = chance

    def disk_readable(self, disk_id: str) -> bool:
        return self._world.nodes["n" + disk_id[1:]].up and self._chance.random() > 0.02

    disk_prompt = disk_readable

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id)


class Mover(PartitionMover):
    """Values of this play are no records, and have no pages."""

    async def _copy_pages(self, disk: str, rows: PageQuery) -> None:
        pass


class Movers(Part):
    """Two processes move partitions, die, and begin again."""

    def __init__(self, scenario: Moving, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of: Moving = scenario
        self.sound = False
        self.reason = ""

    async def run(self) -> None:
        await asyncio.gather(*(self._live(f"m{number}") for number in range(MOVERS)))

    async def heal(self) -> None:
        """They finish what is left, and die no more."""
        self.sound = True
        self.of.known = dict.fromkeys(self.of.known, self.of.layouts[-1])
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await self._finished():
                    await self._live("m0")
        except TimeoutError:
            self.of.complain(f"partitions do not reach their places: {self.reason}")

    async def _finished(self) -> bool:
        process = Process(self.of, "m9", skew_ms=0)
        self.world.note("look")
        process.layouts.learn(self.of.layouts[-1])
        try:
            for number in NUMBERS:
                await process.refresh(number)
            if self.of.sparing is not None and not await self.of.sparing.ended(process):
                return False
        except StoragedError:
            return False
        finally:
            await process.client.close()
        states = [process.layouts.partition(number) for number in NUMBERS]
        wanted = process.layouts.partitions.target(self.of.layouts[-1])
        return all(is_settled(state, wanted) for state in states)

    async def _live(self, name: str) -> None:
        """One life of a mover after the other. When the cluster is sound: a few rounds of one."""
        chance = self.chance
        while True:
            process = Process(self.of, name)
            settings = ScanSettings(timeout_s=0.3, hedge_s=0.02)
            scanner = RingScanner(
                process.layouts, process.directory, process.client, Seen(self.world, chance), settings
            )
            ports = MoverPorts(
                process.layouts,
                process.client,
                scanner,
                process.client,
                process.client.moves,
                Seen(self.world, chance),
                process.clock,
                lambda record: record,
                process.refresh,
            )
            mover = Mover(ports, lost_s=chance.choice((0.3, 5.0)))
            try:
                async with asyncio.timeout(None if self.sound else chance.uniform(0.05, 1.5)):
                    for _ in range(3 if self.sound else 1_000):
                        await self._round(process, mover)
            except TimeoutError:
                self.fault(f"{name} died")
            finally:
                self.of.found.done["steps"] += mover.progress.steps
                self.reason = mover.progress.reason
                await process.crash()
            if self.sound:
                return
            await asyncio.sleep(chance.uniform(0, 0.1))

    async def _round(self, process: Process, mover: PartitionMover) -> None:
        process.layouts.learn(self.of.known.get(process.name, self.of.layouts[0]))
        if self.of.sparing is not None:
            await self.of.sparing.turn(process)
        layout = process.layouts.partitions.target(process.layouts.current)
        self.of.spread.judge_block(layout)
        lost = mover._lost(layout)
        for number in NUMBERS:
            if self.sound or self.chance.random() < 0.3:
                with contextlib.suppress(StoragedError):
                    await process.refresh(number)
            if not is_settled(process.layouts.partition(number), layout):
                await mover._try_step(number, layout, lost)
        await asyncio.sleep(self.chance.uniform(0.001, 0.02))


class Announcements(Part):
    """Each process learns of each layout at another time."""

    def __init__(self, scenario: Moving, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of: Moving = scenario

    async def run(self) -> None:
        chance, of = self.chance, self.of
        for layout in of.layouts[1:]:
            await asyncio.sleep(chance.uniform(0, 0.2))
            self.fault(f"layout {layout.epoch}")
            for name in of.known:
                self.world.loop.call_later(chance.uniform(0, 0.2), self._learn, name, layout)

    def _learn(self, name: str, layout: Layout) -> None:
        if self.of.known[name].epoch < layout.epoch:
            self.of.known[name] = layout
        for gateway in self.of.gateways:
            if gateway.name == name:
                gateway.layouts.learn(self.of.known[name])  # type: ignore[attr-defined]


class Closing(Part):
    """One bucket is closed for good; another is fenced, and opened again."""

    finishes = True

    def __init__(self, scenario: Moving, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of: Moving = scenario
        self.closed_at = -1
        self.lifted: list[bytes] = []

    async def run(self) -> None:
        await asyncio.gather(self._close(), self._fence_and_open(), *(self._use() for _ in range(3)))

    async def _close(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, 0.5))
        await self.until_done("closer", lambda process: process.client.fence(CLOSED.scope, [0], b"last", final=True))
        self.closed_at = self.of.moment()

    async def _fence_and_open(self) -> None:
        for nonce in (b"1", b"2", b"3", b"4", b"5"):
            await asyncio.sleep(self.chance.uniform(0, 0.15))
            await self.until_done(
                "fencer", lambda process, nonce=nonce: process.client.fence(REOPENED.scope, [0], nonce)
            )
            await asyncio.sleep(self.chance.uniform(0, 0.2))
            lifted = await self.until_done(
                "fencer", lambda process, nonce=nonce: process.client.unfence(REOPENED.scope, [0], nonce)
            )
        while not lifted:  # as gateways do for a bucket whose record has the nonce still
            await asyncio.sleep(0.1)
            lifted = await self.until_done("fencer", lambda process: process.client.unfence(REOPENED.scope, [0], nonce))

    async def until_done(self, name: str, call: Any) -> Any:
        process = Process(self.of, name, skew_ms=0)
        while True:
            try:
                outcome = await call(process)
                break
            except StoragedError:
                await asyncio.sleep(0.02)
                await self._refresh(process)
        await process.client.close()
        return outcome

    async def _refresh(self, process: Process) -> None:
        for name in (CLOSED, REOPENED):
            with contextlib.suppress(StoragedError):
                await process.refresh(name.partition)

    async def _use(self) -> None:
        for _ in range(10):
            await asyncio.sleep(self.chance.uniform(0, 0.15))
            await self.write(self.chance.choice(self.of.gateways))

    async def write(self, gateway: Gateway) -> None:
        put: Update = lambda value: Change(b"late", Visibility.LIVE)  # noqa: E731
        closed = self.closed_at >= 0
        try:
            await gateway.client.change(CLOSED, put, regardless=self.chance.random() < 0.5)
        except (NoSuchBucket, StoragedError):
            return
        if closed:
            self.of.complain("something was written in a bucket that was closed before")

    async def judge(self, reader: Gateway) -> None:
        await self.write(reader)
        try:
            await reader.client.change(REOPENED, lambda value: Change(b"again", Visibility.LIVE))
        except StoragedError as error:
            self.of.complain(f"a bucket that was opened again can't be written: {error!r}")
        for disk in reader.layouts.partition(REOPENED.partition).present:
            if self.world.nodes["n" + disk[1:]].store.get_fence(REOPENED.scope) is not None:
                self.of.stale_fences += 1


class Wiped(Part):
    """A disk that no layout wants any more is lost for good, in the middle of it."""

    finishes = True

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        flips = any(isinstance(part, BitFlips) for part in scenario.parts)  # both together may lose a majority
        return chance.random() < 0.3 and not flips

    async def run(self) -> None:
        layout = self.scenario.layout
        await asyncio.sleep(self.chance.uniform(0, 0.8))
        gone = [disk.id for disk in layout.disks if disk.state != "active" and disk.id not in layout.seeds]
        for disk in gone[:1]:
            node = self.world.nodes["n" + disk[1:]]
            if node.up:
                node.crash()
            self.scenario.lost_copies.update(node.payloads.synced)
            node.blank_disk()
            self.fault(f"the disk of {node.name} is lost")


class Moving(Listing):
    node_kind = Node

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.world.on_files = self.aside.random() < 0.15
        self.spread = Spread(seed, SPREAD_SHARE, self.complain)
        self.layouts = layouts_of(random.Random(f"layouts {seed}"), spreads=self.spread.joins)
        self.layout = self.layouts[-1]
        self.names = dict(NAMES)
        self.last_seen = dict.fromkeys(self.names)
        self.world.epochs = self.layouts[-1].epoch
        self.known: dict[str, Layout] = dict.fromkeys(
            ("g0", "g1", "g2", "m0", "m1", "closer", "fencer"), self.layouts[0]
        )
        self.stale_fences = 0
        self.lender = Lender(self, random.Random(f"lender {seed}"))
        self.sparing: Sparing | None = None
        Node.scenario = self

    def note_record(self, record: PartitionRecord) -> None:
        """A process learns it, or has written it."""
        self.spread.judge_record(record)

    @property
    def current(self) -> Layout:
        """For what nodes see of its disks."""
        return self.layout

    def methods_of(self, node: str) -> dict[str, Method]:
        return self.sparing.methods_of(node) if self.sparing is not None else {}

    def join_parts(self) -> None:
        chances = {kind: random.Random(f"{kind.__name__} {self.found.seed}") for kind in PARTS}
        self.movers = Movers(self, chances[Movers])
        self.closing = Closing(self, chances[Closing])
        self.parts = [Announcements(self, chances[Announcements]), self.closing]
        self.parts.append(self.movers)
        if self.lender.joined:
            self.parts.append(self.lender)
        for kind in (Trouble, HungDisks, Suspensions, ClockJumps, BitFlips, Wiped):
            if kind is Trouble or kind.joins(self, chances[kind]):
                self.parts.insert(0, kind(self, chances[kind]))
        if Sparing.joins(self, chances[Sparing]):
            self.sparing = Sparing(self, chances[Sparing])
            self.parts.insert(0, self.sparing)
            for node in self.world.nodes.values():
                node.methods = {**node.methods, **self.methods_of(node.name)}

    async def play(self) -> None:
        await super().play()
        self.found.done["blocks spread"] = self.spread.blocks
        await asyncio.sleep(5.0)  # nodes end what they read of steps: tasks that are left end in no order

    def _choose_key(self) -> str:
        return self.random.choice(OTHER_KEYS)

    async def worker(self, gateway: Gateway) -> None:
        """Half of them list, and write what is listed."""
        if self.random.random() < 0.5:
            await super().worker(gateway)
        else:
            await Workload.worker(self, gateway)

    def begin_gateways(self) -> None:
        self.gateways = [Process(self, f"g{index}") for index in range(3)]

    async def look_at_the_end(self, reader: Gateway) -> None:
        """With what is known at the end."""
        await super().look_at_the_end(reader)
        for key, name in self.names.items():
            try:
                await reader.client.change(name, lambda value: Change(b"the last", Visibility.LIVE))
            except StoragedError as error:
                self.complain(f"{key} cannot be written after everything healed: {error!r}")

    async def make_reader(self) -> Gateway:
        found = Process(self, "reader", deadline_s=DEADLINE_S)
        found.layouts.learn(self.layouts[-1])
        for number in NUMBERS:
            await found.refresh(number)
        return found


PARTS = (Announcements, Closing, Movers, Trouble, HungDisks, Suspensions, ClockJumps, BitFlips, Wiped, Sparing)


def run_moving(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Moving(seed, loop, rules))
