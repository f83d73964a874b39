"""Seeds with the garbage collector: gateways write, overwrite and delete objects, and some fall asleep for hours in the
middle; every storage node collects on its own disk all the time, with the program's own collector.

Some upload parts, and complete or abort that (``collecting_uploads``); blocks move between disks, too.

Everything is old to the sweep, so nothing is spared for its age. Clocks are hours off. What may fail fails: nodes die,
messages are lost, or arrive hours later; promises are evicted; garbage lists are lost, or put back; a collector stands
still between its looks; gateways say that they made rounds and did not. A disk that is put back is refused, as its
node's claims have it (``forgetful``).

Judged is: the data of what a register holds in the end is where its writer saw it durable. And when all nodes are up
again, everything else goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from storaged.errors import DiskUnusable, PeerError, ServiceUnavailable, StoragedError
from storaged.fragments.payloads import header_at_position
from storaged.fragments.ports import FragmentHeader, FragmentId, Retirement, encode_copies
from storaged.fragments.remote import FragmentHost, RemoteFragmentStore
from storaged.hashes import fragment_hash
from storaged.maintain.asks import SETTLED, UNSETTLED, Settle, SettledNames
from storaged.maintain.context import MaintainContext, MaintainLimits
from storaged.maintain.disuse import Judge
from storaged.maintain.gc import Collector
from storaged.meta.consensus.looks import Look
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Grounds, Outcome, SmallCopies, Unasked
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import Copy
from storaged.objects.records import ObjectRecord, PartEntry, Run, Version, encode_object
from storaged.objects.write.commit import ProposedAgain, _Once
from storaged.objects.write.retire import origin_of
from storaged.sov1 import MAGIC
from storaged.wire import Buffer, decode, encode
from tests.doubles.fragments import MemoryFragmentStore
from tests.sim.cluster import DISKS, Gateway, MemoryDisk, StorageNode, Weather, World, make_layout
from tests.sim.collecting_uploads import Uploads, versions_of
from tests.sim.hostile import Reachable
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

SCOPE = b"a bucket's scope"
KEYS = (b"a", b"b", b"c")
GATEWAYS = 3
OPERATIONS = 8
HOUR_S = 12.0
"""Of virtual time: what counts is the order of things."""
ENDS_MAX = 15
"""Times that all disks collect in the end."""
LIMITS = MaintainLimits(collect_batch=4, orphan_age_ms=-(1 << 50), retry_max_s=3.0)


class CopyDisk(MemoryDisk):
    """Small copies are fragments, as in the program."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.fragments = MemoryFragmentStore()

    def copies(self, life: int, node: StorageNode) -> PlainCopies:
        async def store(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
            await self.world_sync()
            if node.life != life or not node.up:
                raise DiskUnusable("the process died")
            await self.fragments.write(decode(header, FragmentHeader), body, sync=True)

        async def load(data_id: bytes) -> Copy | None:
            found = [fragment for fragment in self.fragments.fragments if fragment[:3] == (data_id, 0, 1)]
            if not found:
                return None
            kept = self.fragments.kept(found[0])
            return Copy(encode(kept.header), memoryview(kept.payload))

        return PlainCopies(self.store, store, load, holds=self.fragments.holds_copy)

    def crash(self) -> None:
        super().crash()
        self.fragments.crash()
        self.fragments.pardon([fragment.data_id for fragment in self.fragments.fragments])


class CollectingNode(StorageNode):
    """``fragments`` are what is on its disk."""

    medium: CopyDisk

    def blank_disk(self) -> None:
        self.medium = CopyDisk(self.world, self.name)

    def start(self) -> None:
        super().start()
        self.methods = {**self.methods, **FragmentHost({self.disk: self.medium.fragments}).methods()}


class OneBucket:
    """``maintain.directory.Buckets`` of a cluster with one bucket."""

    by_id = {SCOPE: None}
    complete = True

    async def refresh(self, context: MaintainContext) -> None:
        pass

    def countries_of(self, scope: bytes) -> tuple[str, ...]:
        return ()


class GatewayAsks:
    """``maintain.asks``: some gateway carries it out, or none."""

    def __init__(self, run: Collecting) -> None:
        self._run = run

    async def ask(self, kind: str, request: Settle, answer: type[SettledNames]) -> SettledNames:
        gateways = [gateway for gateway in self._run.gateways if gateway.caller.alive]
        if not gateways or (self._run.random.random() < 0.1 and not self._run._healed):
            raise ServiceUnavailable("no gateway")
        gateway = self._run.random.choice(gateways)
        results = []
        if not self._run._healed and self._run.aside.random() < self._run.false_rounds:
            return SettledNames((SETTLED,) * len(request.names), ("",) * len(request.names))
        for packed in request.names:
            try:
                await gateway.client.settle(RegisterName.unpack(packed))
                results.append(SETTLED)
            except StoragedError:
                results.append(UNSETTLED)
        return SettledNames(tuple(results), ("",) * len(results))

    async def settle(self, name: RegisterName, timeout_s: float) -> Value | None:
        await self.ask("settle", Settle((name.pack(),)), SettledNames)
        return None


def entry_of(data_id: bytes, places: dict[int, str], *, small: bool = False, number: int = 1) -> PartEntry:
    run = Run(0, 1, 1, 2, 1) if small else Run(0, 1, 2, 1, 1, places)
    return PartEntry(number, data_id, 1, MAGIC + bytes((1, 12)) + bytes(58), 2, "2+1", (run,), small=small)


def version_of(entry: PartEntry) -> Version:
    return Version("", 1, 1, "", 1, entry.data_id, b"", False, b"", b"", (entry,))


def encode_record(version: Version) -> bytes:
    return encode_object(ObjectRecord((version,)))


def entries_in(value: Value | None) -> list[PartEntry]:
    return [entry for version in versions_of(value) for entry in version.parts]


class Collecting:
    """One run."""

    node_kind = CollectingNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        self.random = random.Random(f"collecting {seed}")
        self.world = World(loop, self.random, rules, epochs=1)
        self.world.roles = {"n" + disk[1:]: ("storage",) for disk in DISKS}
        self.layout = make_layout(1, DISKS[:3])
        self.found = Verdicts(seed)
        self.gateways: list[Gateway] = []
        self.aside = random.Random(f"collecting aside {seed}")
        self.false_rounds = self.aside.choice((0.0, 0.0, 0.3, 1.0))
        """How often a gateway says that it made rounds, and made none."""
        self._pause_s = self.aside.choice((0.0, 0.0, 3.0, HOUR_S))
        """How long a collector may stand still between its looks."""
        patient = self.aside.random() < 0.4
        self._patience: dict[str, Any] = {"call_timeout_s": HOUR_S, "deadline_s": 5 * HOUR_S} if patient else {}
        """Of gateways that wait for answers which take hours."""
        self.durable: dict[bytes, set[tuple[int, str]]] = {}
        """Data id -> the places at which its writer saw it durable: position and disk."""
        self._healed = False
        self._forgets = self.random.random() < 0.3
        self._away = self.random.choice(DISKS) if self.random.random() < 0.2 else ""
        """A disk that is away until the end."""
        self._to_put_back = not self._away and not self._forgets and self.aside.random() < 0.3
        self.creating = random.Random(f"creating {seed}")
        self.creates = self.creating.choice((0.0, 0.5, 1.0))
        """How often a coded PUT is a create."""
        self.uploads = Uploads(self)
        self.calm_s = 1.5
        """Between two harms."""
        self.pauses_s: tuple[float, ...] = (0.1, 0.5, 2.0, 5.0)
        """Of collectors."""

    def name(self, key: bytes) -> RegisterName:
        return RegisterName(Table.OBJECT, SCOPE, 3, key)

    def complain(self, violation: str) -> None:
        self.found.violation = self.found.violation or violation

    # --- gateways

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self.random.uniform(0, 0.6))
            name = self.name(self.random.choice(KEYS))
            self.found.operations += 1
            kind = self.random.random()
            try:
                if kind < 0.35:
                    await self._put_coded(gateway, name)
                elif kind < 0.5:
                    await self.uploads.upload(gateway, name)
                elif kind < 0.6:
                    await self.uploads.move(gateway, name)
                elif kind < 0.85:
                    await self._put_small(gateway, name)
                else:
                    outcome = await gateway.client.change(name, _delete)
                    self.retire_replaced(gateway, name, outcome)
            except (StoragedError, ProposedAgain):
                self.found.refused += 1

    def store(self, gateway: Gateway, disk: str) -> RemoteFragmentStore:
        return RemoteFragmentStore(gateway.caller, "n" + disk[1:], disk, timeout_s=1.0)

    async def _put_coded(self, gateway: Gateway, name: RegisterName) -> None:
        grounds = gateway.client.grounds(name) if self.creating.random() < self.creates else None
        body_of = lambda entry: encode_record(version_of(entry))  # noqa: E731
        outcome, _ = await self.commit_coded(gateway, name, name, body_of, grounds)
        self.retire_replaced(gateway, name, outcome)

    async def commit_coded(
        self,
        gateway: Gateway,
        owner: RegisterName,
        register: RegisterName,
        body_of: Callable[[PartEntry], bytes],
        grounds: Grounds | None = None,
    ) -> tuple[Outcome, PartEntry]:
        """Writes data of the object ``owner``, and has ``register`` name it, as ``objects.write.commit`` does.
        ``grounds``: by a create.
        """
        data_id, disks = self.random.randbytes(16), self.random.sample(DISKS, 3)
        entry = entry_of(data_id, dict(enumerate(disks)))
        payload = self.random.randbytes(8)
        held: dict[str, FragmentId] = {}
        for position, disk in enumerate(disks):
            fragment = FragmentId(data_id, 0, 2, 1, position)
            header = FragmentHeader(
                fragment.pack(), owner.pack(), bytes(64), (fragment_hash([payload]),) * 3, 4096, 8, 1
            )
            with contextlib.suppress(PeerError):
                await self.store(gateway, disk).write(header, [payload])
                held[disk] = fragment
        change = Change(body_of(entry), Visibility.LIVE)
        try:
            await self.sleep(0.1)
            unasked: Unasked | None = None
            if grounds is not None:
                at_once = asyncio.Event()
                at_once.set()
                await self._made_durable(gateway, held, at_once, again=False)
                unasked = Unasked(grounds, change)
            for attempt in range(3):
                self._ask_late(gateway)
                promised = asyncio.Event()
                ready = self._made_durable(gateway, held, promised, again=attempt > 0 or grounds is not None)
                update = _Once(lambda _value: change, promised).update
                with contextlib.suppress(ProposedAgain):
                    client = gateway.client
                    outcome = await client.change(register, update, ready=ready, unasked=unasked)
                    self.found.done["created"] += unasked is not None and not promised.is_set()
                    return outcome, entry
                unasked = None
            raise ProposedAgain
        except BaseException:
            self.retire(gateway, owner, [entry], b"")
            raise

    def _ask_late(self, gateway: Gateway) -> None:
        """In some runs some prepares take hours, and what is sent beside them does not."""
        if self._patience and not self._healed and self.aside.random() < 0.3:
            self.found.faults.append("prepares came late")
            self.world.prepares_late[gateway.name] = self.aside.uniform(0.2, 0.9) * HOUR_S
            self.world.loop.call_later(0.01, self.world.prepares_late.pop, gateway.name, None)

    async def _made_durable(
        self, gateway: Gateway, held: dict[str, FragmentId], promised: asyncio.Event, *, again: bool
    ) -> None:
        """As ``PartWriter.durable``."""
        await promised.wait()
        durable: set[tuple[int, str]] = set()
        for disk, fragment in held.items():
            with contextlib.suppress(PeerError):
                store = self.store(gateway, disk)
                if again:
                    (stat,) = await store.touch([fragment], 5)
                    if stat.health:
                        continue
                await store.sync([fragment])
                durable.add((fragment.position, disk))
        if len(durable) < 2:
            raise ServiceUnavailable("its fragments are gone, or out of reach")
        self.durable[next(iter(held.values())).data_id] = durable
        await self.sleep(0.25)

    async def sleep(self, chance: float) -> None:
        """Some requests fall asleep for hours."""
        if self.random.random() < chance:
            self.found.faults.append("a request slept")
            await asyncio.sleep(self.random.uniform(0.3, 2.0) * HOUR_S)

    async def _put_small(self, gateway: Gateway, name: RegisterName) -> None:
        data_id, content = self.random.randbytes(16), self.random.randbytes(5)
        fragment = FragmentId(data_id, 0, 1, 2, 0)
        header = FragmentHeader(fragment.pack(), name.pack(), b"", (fragment_hash([content]),), 4096, 5, 1)
        small = SmallCopies(
            data_id, [(copy, [content]) for copy in encode_copies(header, 3)], lambda disks: len(disks) >= 2
        )
        self.durable[data_id] = set()
        body = encode_record(version_of(entry_of(data_id, {}, small=True)))
        change = Change(body, Visibility.LIVE, data_id)
        outcome = await gateway.client.change(name, lambda _value: change, small=small, regardless=True)
        self.retire_replaced(gateway, name, outcome)

    def retire_replaced(self, gateway: Gateway, name: RegisterName, outcome: Outcome) -> None:
        """What a committed change replaced."""
        kept = {version.context_id for version in versions_of(outcome.after)}
        for version in versions_of(outcome.before):
            if version.context_id not in kept:
                self.retire(gateway, name, version.parts, origin_of(version))

    def retire(self, gateway: Gateway, name: RegisterName, parts: Iterable[PartEntry], origin: bytes) -> None:
        """Puts parts on the garbage lists of their disks; now and then the call is forgotten."""
        for entry in parts:
            if self.random.random() < 0.2:
                continue
            placed = gateway.layouts.partition(name.partition).disks
            disks = placed if entry.small else entry.runs[0].moved.values()
            for disk in disks:
                self._start(self._retire_on(gateway, disk, [Retirement(entry.data_id, name.pack(), 0, origin)]))

    async def _retire_on(self, gateway: Gateway, disk: str, entries: list[Retirement]) -> None:
        with contextlib.suppress(PeerError):
            await self.store(gateway, disk).retire(entries)

    def _start(self, work: Any) -> None:
        self._tasks.append(self.world.loop.create_task(work))

    # --- collectors

    def _collector(self, node: CollectingNode, asks: GatewayAsks) -> tuple[Collector, Gateway]:
        client = self.process(
            node.name,
            skew_ms=0,
            gateway=False,
            local={node.disk: node.replica},
            ask_to_settle=asks.settle,
        )
        alive = Reachable(self.world)
        context: Any = MaintainContext(
            node=node.name,
            clock=node.clock,
            layouts=client.layouts,
            liveness=alive,
            registers=client.client,
            look=self._looking(client),
            pages=client.client,
            scanner=self.scanner(client),
            stores=None,  # type: ignore[arg-type]
            local_meta={node.disk: node.store},
            local_fragments={node.disk: node.medium.fragments},
            signers=None,  # type: ignore[arg-type]
            asks=asks,  # type: ignore[arg-type]
            limits=LIMITS,
        )
        buckets: Any = OneBucket()
        return Collector(context, Judge(context, buckets)), client

    def scanner(self, client: Gateway) -> RingScanner:
        settings = ScanSettings(timeout_s=0.3, hedge_s=0.02)
        return RingScanner(client.layouts, client.directory, client.client, Reachable(self.world), settings)

    def _looking(self, client: Gateway) -> Callable[[RegisterName], Awaitable[Look]]:
        async def look(name: RegisterName) -> Look:
            found = await client.client.look(name)
            if self._pause_s and not self._healed and self.aside.random() < 0.3:
                await asyncio.sleep(self.aside.uniform(0, self._pause_s))
            return found

        return look

    async def collect(self, node: CollectingNode) -> None:
        """The collector of one node, in all its lives. Until it is cancelled."""
        while True:
            await asyncio.sleep(self.random.choice(self.pauses_s))
            if node.up:
                life = self.world.loop.create_task(self._collect_once(node))
                while not life.done() and node.up:
                    await asyncio.wait([life], timeout=0.5)
                life.cancel()
                await asyncio.gather(life, return_exceptions=True)
                if not life.cancelled() and life.exception() is not None:
                    raise life.exception()  # type: ignore[misc]

    async def _collect_once(self, node: CollectingNode) -> None:
        collector, client = self._collector(node, GatewayAsks(self))
        try:
            await collector.sweep()
            await collector.collect_due()
            self.found.done["deleted"] += collector.deleted_fragments
        except PeerError:
            pass  # its own disk is silent
        finally:
            await client.client.close()

    # --- nemesis

    async def nemesis(self) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(1 / self.calm_s))
            await self._harm()

    async def _harm(self) -> None:
        node = self.world.nodes["n" + self.random.choice(DISKS)[1:]]
        choice = self.random.random()
        if choice < 0.4 and node.up:
            node.crash()
            if node.disk != self._away:
                self.world.loop.call_later(self.random.choice((0.01, 0.5, 6.0)), self._restart, node)
        elif choice < 0.6:
            names = [*self.world.nodes, *(f"g{index}" for index in range(GATEWAYS))]
            self.world.cut = frozenset(name for name in names if self.random.random() < 0.3)
            self.world.loop.call_later(self.random.choice((0.2, 3.0)), setattr, self.world, "cut", frozenset())
        elif choice < 0.75:
            self.world.weather = self._weather()
        elif choice < 0.85:
            await self._suspect(node)
        elif self._forgets:
            self._turn_back(node)
        elif self._to_put_back and not node.up:
            self._put_back(node)

    def _put_back(self, node: StorageNode) -> None:
        """An older snapshot of its disk is put back. Its claims show it (``forgetful`` has those), and it answers
        nothing any more.
        """
        self._to_put_back = False
        node.foreign = True
        self.found.faults.append(f"{node.name} had its disk put back")

    async def _suspect(self, node: Any) -> None:
        """Something that the disk has is on its garbage list, whatever refers to it."""
        store = node.medium.fragments
        if store.fragments:
            fragment = self.random.choice(store.fragments)
            await store.retire([Retirement(fragment.data_id, store.header(fragment).owner, 0)])

    def _turn_back(self, node: Any) -> None:
        """A garbage list is as it was before, or lost."""
        store = node.medium.fragments
        if self.random.random() < 0.5:
            store._retired.clear()
        else:
            store._retired.update({key: entry for key, entry in node.past.items() if key not in store._retired})

    def _restart(self, node: StorageNode) -> None:
        if not node.up and not node.foreign:
            node.start()

    def _skew_ms(self, *hours: int) -> int:
        """Some clocks are hours off. Not a disk's and a gateway's ahead at once: the disk would then hold promises that
        all others refuse."""
        far = self.random.choice(hours) * 3_600_000 if self.random.random() < 0.1 else 0
        return self.world.skew_ms() + far

    def _weather(self) -> Weather:
        level = self.random.choice((0.0, 0.02, 0.15))
        slow_s = self.random.choice((0.4, HOUR_S))
        return Weather(level / 2, level, level, 0.0, self.random.choice((1.0, 6.0)), slow_s)

    # --- the whole

    async def play(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []
        nodes = [self.node_kind(self.world, "n" + disk[1:], disk, self._skew_ms(-3, 2)) for disk in DISKS]
        for node in nodes:
            _remember(node)
        self.gateways = [
            self.process(f"g{index}", skew_ms=self._skew_ms(-3), copy_at=header_at_position, **self._patience)
            for index in range(GATEWAYS)
        ]
        self.world.weather = self._weather()
        works = (self.nemesis(), *self.more(), *map(self.collect, nodes))
        background = [self.world.loop.create_task(work) for work in works]
        await asyncio.gather(*(self.worker(gateway) for gateway in self.gateways for _ in range(2)))
        for task in background:
            task.cancel()
        for outcome in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await self._heal(nodes)
        reader = await self.make_reader()
        await self.uploads.end(reader)
        live = await self._look_at_the_end(reader)
        await self._nothing_else_stays(nodes, live)
        for gateway in (*self.gateways, reader):
            await gateway.client.close()
        self.found.messages = self.world.messages

    def process(self, name: str, **options: Any) -> Gateway:
        return Gateway(self.world, name, self.layout, **options)

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        """What else goes on until the workload has ended."""
        return ()

    async def make_reader(self) -> Gateway:
        """Who looks at the end. All is well by now."""
        return self.process("reader", skew_ms=0, copy_at=header_at_position)

    async def _heal(self, nodes: Sequence[CollectingNode]) -> None:
        self.world.cut, self.world.weather, self._healed = frozenset(), Weather(), True
        for node in nodes:
            node.clock.skew_ms = 0  # one that is hours behind refuses every round
            self._restart(node)
        await asyncio.sleep(3 * HOUR_S)  # what was on its way for hours arrives
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look_at_the_end(self, reader: Gateway) -> set[bytes]:
        """Returns the data ids that registers refer to."""
        live: set[bytes] = set()
        for key in KEYS:
            name = self.name(key)
            try:
                await self.settle_everywhere(reader, name)
                reading = await reader.client.read(name, want_payload=True)
            except StoragedError as error:
                self.complain(f"{key!r} cannot be read in the end: {error}")
                continue
            for entry in entries_in(reading.value):
                live.add(entry.data_id)
                if entry.small and reading.payload is None:
                    self.complain(f"the copies of {entry.data_id.hex()} are gone")
                self.judge_places(entry)
        return live

    def judge_places(self, entry: PartEntry) -> None:
        """The data is where its writer saw it durable."""
        for position, disk in self.durable[entry.data_id].intersection(entry.runs[0].moved.items()):
            medium: Any = self.world.nodes["n" + disk[1:]].medium
            if FragmentId(entry.data_id, 0, 2, 1, position) not in medium.fragments.fragments:
                self.complain(f"a fragment of {entry.data_id.hex()} is gone from {disk}")

    async def settle_everywhere(self, reader: Gateway, name: RegisterName) -> None:
        """As catch-up does: a row that lags claims the data that it names. A replica may miss any of the rounds."""
        for _ in range(ENDS_MAX):
            await reader.client.settle(name)
            await asyncio.sleep(0.5)
            if all(replica.state != "behind" for replica in await reader.client.agreement(name)):
                return

    async def _nothing_else_stays(self, nodes: Sequence[CollectingNode], live: set[bytes]) -> None:
        """Rounds may miss a replica that has promised more to others, so that data waits for the next one."""
        left: set[bytes] = set()
        for _ in range(ENDS_MAX):
            for node in nodes:
                await self._collect_once(node)
            left = {fragment.data_id for node in nodes for fragment in node.medium.fragments.fragments} - live
            if not left or any(node.foreign for node in nodes):
                return
            await asyncio.sleep(1.0)
        if not self.found.violation:
            self.complain(f"orphans stay although every replica is there: {sorted(left)[0].hex()}")

    def judge(self) -> Verdicts:
        if self.world.loop.troubles:
            self.found.violation = "unhandled: " + self.world.loop.troubles[0]
        self.found.trace = self.world.trace()
        return self.found


def _remember(node: Any) -> None:
    """All entries that its garbage list ever had."""
    node.past = {}
    store = node.medium.fragments
    retire = store.retire

    async def retired(entries: Sequence[Retirement]) -> None:
        await retire(entries)
        node.past.update(store._retired)

    store.retire = retired


def _delete(value: Value | None) -> Change | None:
    return None if value is None or not value.body else Change(b"", Visibility.TOMBSTONE)


def run_collecting(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Collecting(seed, loop, rules))  # type: ignore[arg-type,return-value]
