"""Seeds with a liar, with clocks that are hours off, with storage nodes that propose, and with blank disks that are
accepted.

Two kinds of runs. Where a replica *lies*, everything else is well but slow, gateways die, and one clock is off: what
one liar among three may do is bounded only
while both others can be asked (README, "Limits"). It writes to its own disk, under ballots of its choice, values that
no gateway wrote, older ones that one did, and
ones that were never chosen; it promises counters that are far off; it asks the others what only gateways may. What it
does not do is break a promise, or report
what it acknowledged as never accepted under the older ballot: no quorum of two in three bears that. Where nobody lies
everything fails that fails in ``scenario``.

Beside that a bucket is closed for good by a final fence while others use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from storaged.errors import NoSuchBucket, StoragedError
from storaged.meta import messages
from storaged.meta.client import AskToSettle, RingClient
from storaged.meta.consensus.looks import chosen
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import NEVER, RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import PageQuery, SmallCopies, Update
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.node.keeper import SystemKeeper
from storaged.wire import Buffer
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, Weather, World, make_layout
from tests.sim.parts import Trouble
from tests.sim.scenario import GATEWAYS, Scenario, play_out
from tests.sim.virtual import EPOCH_MS, VirtualLoop
from tests.sim.workload import Verdicts

KEYS = ("x", "y")

HOUR_MS = 3_600_000
SCOPE = b"a bucket's scope"
CLOSED = RegisterName(Table.OBJECT, SCOPE, 0, b"closed")
NONCE = b"the fence's nonce"
THIEF, MIMIC, STRAY = "n4", "mimic", "stray"


class SigningClient(RingClient):
    """A gateway's: it notes what it writes, as an authenticator over name, sequence and contents would."""

    def __init__(
        self,
        *given: Any,
        written: set[tuple[bytes, int, int, bytes]],
        unheard: set[tuple[RegisterName, str]],
        **options: Any,
    ) -> None:
        super().__init__(*given, **options)
        self._written = written
        self._unheard = unheard

    def _on_unheard(self, name: RegisterName, ballot: Ballot) -> None:
        super()._on_unheard(name, ballot)
        self._unheard.add((name, ballot.node))

    def _signed(self, name: RegisterName, update: Update) -> Update:
        def signing(value: Value | None) -> Change | None:
            change = update(value)
            if change is not None:
                sequence = (value.sequence if value is not None else 0) + 1
                self._written.add((name.key, sequence, int(change.visibility), change.body))
            return change

        return signing

    async def change(self, name: RegisterName, update: Update, **options: Any) -> Any:
        return await super().change(name, self._signed(name, update), **options)

    def try_change(self, name: RegisterName, update: Update, *given: Any, **options: Any) -> bool:
        return super().try_change(name, self._signed(name, update), *given, **options)


class Reachable:
    """``cluster.ports.Liveness``: which nodes are up."""

    def __init__(self, world: World) -> None:
        self._world = world

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id)

    def disk_readable(self, disk_id: str) -> bool:
        return self._world.nodes["n" + disk_id[1:]].up

    disk_prompt = disk_readable


class Hostile(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.random = self.world.random = random.Random(f"hostile {seed}")
        self._apart = random.Random(f"thief {seed}")
        chance = self.random.random
        self.world.skew_ms_max = 5_000
        self.world.epochs = 1
        self.world.on_files = False
        self.first_seeds, self.layout = FIRST_SEEDS, make_layout(1, FIRST_SEEDS)
        self.disks_may_be_full = self.disks_may_be_swapped = self.moves = False
        self.world.roles = {"n" + disk[1:]: ("storage",) for disk in DISKS}
        self.world.on_refusal = self._refusal
        self._lies = chance() < 0.5
        self._blank = not self._lies and chance() < 0.3
        self.of_objects = not self._lies and chance() < 0.4
        self.names = {key: self.name(b"sim/" + key.encode()) for key in KEYS}
        self.last_seen = dict.fromkeys(self.names)
        self.fresh = False
        self._liar = self.random.choice(FIRST_SEEDS)
        self._written: set[tuple[bytes, int, int, bytes]] = set()
        self._unheard: set[tuple[RegisterName, str]] = set()
        """(register, node whose ballot led): changes while not all replicas could be asked, and those differed."""
        self._lied = 0
        self._hints: list[RegisterName] = []
        self._closed_at = -1
        self._fences_seen: dict[str, int] = {}

    def _refusal(self, peer: str, error: StoragedError) -> None:
        if peer not in (THIEF, MIMIC, STRAY) and not (self._lies and peer == "n" + self._liar[1:]):
            self.complain(f"{peer}, which is honest, was refused: {error.message}")

    def _believes(self, name: RegisterName, value: Value) -> bool:
        return value.sequence == 0 or (name.key, value.sequence, int(value.visibility), value.body) in self._written

    def _gateway(self, name: str, **options: Any) -> Gateway:
        def fenced(scope: bytes) -> None:
            self._fences_seen[name] = self._fences_seen.get(name, 0) + (scope == SCOPE)

        return Gateway(
            self.world,
            name,
            self.layout,
            kind=SigningClient,
            written=self._written,
            unheard=self._unheard,
            believes=self._believes,
            on_missed=self._hints.append,
            on_fenced=fenced,
            **options,
        )

    def _small_copies(self, content: bytes) -> tuple[SmallCopies | None, bytes]:
        return (None, b"") if self._lies or self._blank or not self.of_objects else super()._small_copies(content)

    def weather(self) -> Weather:
        if not self._lies:
            return super().weather()
        level = self.random.choice((0.0, 0.1, 0.3))
        return Weather(0.0, level, level, 0.0, self.random.choice((1.0, 4.0)), 0.12, 6, 0.1)

    # --- what a liar does

    async def lies(self) -> None:
        """Until it is cancelled."""
        node = self.world.nodes["n" + self._liar[1:]]
        seen: dict[RegisterName, list[tuple[Ballot, Value]]] = {}
        self._overhear(node, seen)
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.03))
            if self.random.random() < 0.1 and node.up:
                node.crash()
                self.world.loop.call_later(self.random.choice((0.0, 0.02, 0.1)), self.restart, node)
                self.world.loop.call_later(0.11, self._overhear, node, seen)
                continue
            name = self.names[self.random.choice(KEYS)]
            if not node.up:
                continue
            self._lied += 1
            lie = self.random.choice((self._forge, self._forge, self._forge, self._promise_far, self._ask_others))
            await lie(node, name, seen.get(name, []))

    def _overhear(self, node: StorageNode, seen: dict[RegisterName, list[tuple[Ballot, Value]]]) -> None:
        """The liar remembers all values that it was ever asked to accept, also those that it refused."""
        replica = node.replica
        begin = replica.try_accept
        if not node.up or getattr(begin, "overheard", False):
            return

        def overheard(request: messages.Accept, *given: Any, **options: Any) -> bool:
            seen.setdefault(request.name, []).append((request.ballot, request.value))
            return begin(request, *given, **options)

        overheard.overheard = True  # type: ignore[attr-defined]
        replica.try_accept = overheard  # type: ignore[method-assign]

    def _high(self, node: StorageNode) -> int:
        now_us = EPOCH_MS * 1000 + int(self.world.loop.time() * 1e6)
        return now_us + self.random.choice((-20_000, 1_000, 50_000, 1_000_000, 1_800_000_000))

    async def _forge(self, node: StorageNode, name: RegisterName, seen: list[tuple[Ballot, Value]]) -> None:
        kind = self.random.random()
        ballot = Ballot(1, self._high(node), node.name, self.random.randbytes(8))
        if kind < 0.4 or not seen:
            value = Value(
                self.random.choice((1, 5, 1000)),
                self.random.randbytes(16),
                Visibility.LIVE,
                b"forged " + self.random.randbytes(4),
            )
        else:
            _, value = self.random.choice(seen[-6:])
            held = node.store.get(name) is not None
            if held and not self._others_agree(name) and value.sequence >= self._others_sequence(name):
                return
        await self._overwrite(node, name, ballot, value)

    def _others_agree(self, name: RegisterName) -> bool:
        """Whether the honest replicas hold the same. Where they don't, what they hold with one sequence under two
        ballots no rule can tell apart without the liar.
        """
        return len(self._held(name, [disk for disk in FIRST_SEEDS if disk != self._liar])) == 1

    def _others_sequence(self, name: RegisterName) -> int:
        """The highest that an honest replica holds. What the liar holds itself may be forged."""
        slots = [self.world.nodes["n" + disk[1:]].store.get(name) for disk in FIRST_SEEDS if disk != self._liar]
        return max((slot.value.sequence for slot in slots if slot is not None), default=0)

    def _held(self, name: RegisterName, disks: Sequence[str]) -> set[Ballot]:
        stores = [self.world.nodes["n" + disk[1:]].store for disk in disks]
        return {slot.ballot if (slot := store.get(name)) is not None else ZERO_BALLOT for store in stores}

    async def _overwrite(self, node: StorageNode, name: RegisterName, ballot: Ballot, value: Value) -> None:
        self.world.note("lie", node.name, name, ballot, value.body)
        if name in node.replica.pending.by_name:
            return
        slot, promises = node.store.get(name), node.replica.state.promises
        if slot is not None:  # what it accepted binds it still
            promises[name] = max(promises.get(name, ZERO_BALLOT), slot.ballot)
        with contextlib.suppress(StoragedError):
            await node.store.commit(StoreBatch((Slot(name, ballot, value),)))

    async def _promise_far(self, node: StorageNode, name: RegisterName, _seen: object) -> None:
        ahead_us = self.random.choice((600_000_000, 3 * 3_600_000_000))
        promises = node.replica.state.promises
        promises[name] = max(promises.get(name, ZERO_BALLOT), Ballot(1, self._high(node) + ahead_us, "zz", bytes(8)))

    async def _ask_others(self, node: StorageNode, name: RegisterName, seen: list[tuple[Ballot, Value]]) -> None:
        """What a storage certificate can't have."""
        liar = Gateway(self.world, node.name, self.layout, skew_ms=0)
        own = Ballot(self.random.choice((1, 1, 99)), self._high(node), node.name, self.random.randbytes(8))
        for disk in FIRST_SEEDS:
            if disk == node.disk:
                continue
            replica = liar.directory.replica(disk)
            with contextlib.suppress(StoragedError):
                await replica.prepare(messages.Prepare(disk, name, own), timeout_s=0.2)
            if seen:
                with contextlib.suppress(StoragedError):
                    identity = self.random.random() < 0.5
                    ballot = own if self.random.random() < 0.7 else Ballot(1, own.counter, "g0", bytes(8))
                    await replica.accept(
                        messages.Accept(disk, name, ballot, self.random.choice(seen[-6:])[1], b"", identity),
                        timeout_s=0.2,
                    )
        await liar.client.close()

    async def steal(self) -> None:
        """Somebody has the certificate of a storage node, and asks replicas for whatever may do harm. Until it is
        cancelled. NEVER it writes only where nothing was accepted: that an acceptor could tell.
        """
        self.found.faults.append(f"{THIEF}'s certificate is stolen")
        thief = Gateway(self.world, THIEF, self.layout, skew_ms=0)
        while True:
            await asyncio.sleep(self._apart.expovariate(1 / 0.002))
            name, disk = self._apart.choice(self._lagging() or [(self._any_name(), self._apart.choice(FIRST_SEEDS))])
            slot = self.world.nodes["n" + disk[1:]].store.get(name)
            ballot = Ballot(1, self._now_us() + self._apart.choice((1_000, 1_000_000)), THIEF, self._apart.randbytes(8))
            value = self._apart.choice((NEVER, NEVER, Value(9, self._apart.randbytes(16), Visibility.TOMBSTONE, b"")))
            if slot is not None and value is NEVER:
                value = slot.value
            kind = self._apart.choice((messages.Accept, messages.Create))
            replica = thief.directory.replica(disk)
            with contextlib.suppress(StoragedError):
                await replica.prepare(messages.Prepare(disk, name, ballot), timeout_s=0.2)
            with contextlib.suppress(StoragedError):
                await replica.accept(kind(disk, name, ballot, value, b"", self._apart.random() < 0.5), timeout_s=0.2)
            with contextlib.suppress(StoragedError):
                await replica.fence(messages.FenceSet(disk, name.scope, b"a thief's", True), timeout_s=0.2)

    def _any_name(self) -> RegisterName:
        return self.names[self._apart.choice(KEYS)]

    def _lagging(self) -> list[tuple[RegisterName, str]]:
        """Registers and disks that have accepted nothing where another has."""
        stores = {disk: self.world.nodes["n" + disk[1:]].store for disk in FIRST_SEEDS}
        held = {
            name: [disk for disk in FIRST_SEEDS if stores[disk].get(name) is not None] for name in self.names.values()
        }
        return [(name, disk) for name, disks in held.items() if disks for disk in FIRST_SEEDS if disk not in disks]

    def _now_us(self) -> int:
        return EPOCH_MS * 1000 + int(self.world.loop.time() * 1e6)

    async def mimic(self) -> None:
        """A gateway speaks under ballots that were promised to others, as one with a copied name may. Until it is
        cancelled.
        """
        self.found.faults.append("a gateway speaks under the ballots of others")
        mimic = Gateway(self.world, MIMIC, self.layout, skew_ms=0)
        while True:
            await asyncio.sleep(self._apart.expovariate(1 / 0.005))
            name, disk = self.names[self._apart.choice(KEYS)], self._apart.choice(FIRST_SEEDS)
            node = self.world.nodes["n" + disk[1:]]
            ballot = node.replica.state.promises.get(name, ZERO_BALLOT)
            if node.up and ballot.node:
                value = Value(self._apart.choice((1, 2, 5)), self._apart.randbytes(16), Visibility.LIVE, b"mimicked")
                with contextlib.suppress(StoragedError):
                    await mimic.directory.replica(disk).accept(
                        messages.Accept(disk, name, ballot, value), timeout_s=0.2
                    )

    async def overreach(self) -> None:
        """A gateway asks for promises under a layout that nobody knows, and repeats older values under the name of
        another.
        """
        await asyncio.sleep(self.random.uniform(0, 0.4))
        self.found.faults.append("a layout that nobody knows")
        stray = Gateway(self.world, STRAY, self.layout, skew_ms=0)
        ballot = Ballot(99, EPOCH_MS * 1000, STRAY, bytes(8))
        for name in self.names.values():
            for disk in FIRST_SEEDS:
                with contextlib.suppress(StoragedError):
                    await stray.directory.replica(disk).prepare(messages.Prepare(disk, name, ballot), timeout_s=0.2)
        for _ in range(3):
            await self._repeat_older(stray)
        await stray.client.close()

    async def _repeat_older(self, stray: Gateway) -> None:
        store = self.world.nodes["n0"].store
        older = {name: slot.value for name in self.names.values() if (slot := store.get(name)) is not None}
        await asyncio.sleep(self.random.uniform(0.02, 0.1))
        for name, value in older.items():
            ballot = Ballot(1, EPOCH_MS * 1000 + int(self.world.loop.time() * 1e6) + 1_000_000, "g0", bytes(8))
            for disk in FIRST_SEEDS:
                request = messages.Accept(disk, name, ballot, value, b"", self.random.random() < 0.5)
                with contextlib.suppress(StoragedError):
                    await stray.directory.replica(disk).accept(request, timeout_s=0.05)

    # --- keepers, storage nodes, blank disks, fences

    async def keeper(self, gateway: Gateway) -> None:
        """Until it is cancelled."""
        reachable = Reachable(self.world)
        while True:
            await asyncio.sleep(self.random.uniform(0.02, 0.2))
            if not gateway.caller.alive:
                continue
            scanner = RingScanner(
                gateway.layouts, gateway.directory, gateway.client, reachable, ScanSettings(timeout_s=0.3, hedge_s=0.02)
            )
            keeper = SystemKeeper(
                scanner, gateway.client, gateway.layouts, reachable, jitter=lambda: 0.01 * self.random.random()
            )
            for name in dict.fromkeys(self._hints):
                if name.table == Table.SYSTEM:
                    keeper.hint(name)
            self._hints.clear()
            await keeper.once()

    def _settle_by(self, gateways: Sequence[Gateway]) -> AskToSettle:
        async def settle(name: RegisterName, _timeout_s: float) -> Value | None:
            await asyncio.sleep(self.random.uniform(0, 0.02))
            return await self.random.choice(gateways).client.settle(name)

        return settle

    async def repair(self, node: StorageNode, gateways: Sequence[Gateway]) -> None:
        """A storage node looks at registers, and has gateways settle them, as its repair does. Until it is
        cancelled.
        """
        while True:
            await asyncio.sleep(self.random.uniform(0.005, 0.03 if self.of_objects else 0.15))
            if not node.up:
                continue
            local = {node.disk: node.replica} if self.random.random() < 0.8 else None
            other = Gateway(
                self.world,
                node.name,
                self.layout,
                skew_ms=node.clock.skew_ms,
                gateway=False,
                local=local,
                ask_to_settle=self._settle_by(gateways),
            )
            name = self.names[self.random.choice(KEYS)]
            with contextlib.suppress(StoragedError):
                if self.random.random() < 0.5:
                    await self._pull(node, other, name)
                elif self.random.random() < 0.5:
                    await other.client.read(name)
                else:
                    await other.client.settle(name)
            await other.client.close()

    async def _pull(self, node: StorageNode, other: Gateway, name: RegisterName) -> None:
        """Its disk adopts what the others agree on, as ``maintain.pull`` does."""
        look = await other.client.look(name)
        held = chosen(look)
        own = look.held.get(node.disk)
        if held is None or own is None or held.value is None or look.fenced or own.ballot >= held.ballot:
            return
        header, body = b"", list[Buffer]()
        if held.value.payload:
            copies = await other.client.small_copies(name, held.value)
            if not copies:
                return
            view = View.of(0, *look.quorum.sets)
            position = view.positions[view.quorum.disks.index(node.disk)]
            header, body = copies[position][0], list(copies[0][1])
        request = messages.Accept(node.disk, name, held.ballot, held.value, b"", True, header)
        await node.replica.accept(request, body)

    async def swap(self) -> None:
        """A disk fails; when the others are the same an operator accepts a blank one in its place."""
        await asyncio.sleep(self.random.uniform(0.05, 0.3))
        node = self.world.nodes["n" + self.random.choice(FIRST_SEEDS)[1:]]
        others = [disk for disk in FIRST_SEEDS if disk != node.disk]
        if node.up:
            node.crash()
        self._swapped = node
        operator = self._gateway("operator", skew_ms=0)
        for name in self.names.values():
            while True:
                with contextlib.suppress(StoragedError):
                    await operator.client.settle(name)
                if len(self._held(name, others)) == 1:
                    break
                await asyncio.sleep(0.01)
        await operator.client.close()
        node.blank_disk()
        self.found.faults.append(f"{node.name} got a blank disk, and it was accepted")
        await node.start_accepted(1)

    async def close_bucket(self) -> None:
        """It has the final fence from some moment on."""
        await asyncio.sleep(self.random.uniform(0.05, 0.3))
        closer = self._gateway("closer")
        while True:
            try:
                await closer.client.fence(SCOPE, [0], NONCE, final=True)
                break
            except StoragedError:
                await asyncio.sleep(0.02)
        self._closed_at = self.moment()
        await closer.client.close()

    async def use_bucket(self, gateway: Gateway) -> None:
        """Reads, lists and writes in the bucket that is being closed: afterwards none is written, and all others are
        told.
        """
        for _ in range(8):
            await asyncio.sleep(self.random.uniform(0, 0.08))
            began, seen = self.moment(), self._fences_seen.get(gateway.name, 0)
            choice = self.random.random()
            closed = -1 < self._closed_at < began
            try:
                if choice < 0.4:
                    await gateway.client.read(CLOSED)
                elif choice < 0.6:
                    scanner = RingScanner(
                        gateway.layouts,
                        gateway.directory,
                        gateway.client,
                        Reachable(self.world),
                        ScanSettings(timeout_s=0.3),
                        on_fenced=self._on_list(gateway),
                    )
                    await scanner.list_page(PageQuery(Table.OBJECT, SCOPE, [0]))
                else:
                    put: Update = lambda value: Change(b"late", Visibility.LIVE)  # noqa: E731
                    await gateway.client.change(CLOSED, put, regardless=choice < 0.8)
                    if closed and not self._blank:  # the blank disk may have had the fence
                        self.complain("something was written in a bucket that was closed before")
            except NoSuchBucket:
                continue
            except StoragedError:
                continue
            if closed and self._fences_seen.get(gateway.name, 0) == seen and not self._blank:
                self.complain("who read in a bucket that was closed before was not told so")

    def _on_list(self, gateway: Gateway) -> Callable[[bytes], None]:
        def fenced(scope: bytes) -> None:
            self._fences_seen[gateway.name] = self._fences_seen.get(gateway.name, 0) + 1

        return fenced

    def _misled(self) -> set[RegisterName]:
        """Registers of which a change went on from what the liar put there, while an honest replica could not be asked.
        A value that was chosen with the liar's own vote is lost then; README says so.
        """
        return {name for name, node in self._unheard if node == "n" + self._liar[1:]}

    def judge(self) -> Verdicts:
        misled = self._misled()
        self.history = [operation for operation in self.history if self.names.get(operation.key) not in misled]
        for operation in self.history:
            # The liar shows an attempt that it has refused, as all others did. The change is proposed on it once more.
            operation.blind |= self._lies and operation.observed is not None and operation.observed == operation.new
        return super().judge()

    # --- the whole

    def _skews(self) -> tuple[dict[str, int], dict[str, int]]:
        """Of one acceptor and of one proposer: hours."""
        hours = self.random.choice((0, 0, -2, 2)) if not self._blank else 0
        disk = self._liar if self._lies else self.random.choice(FIRST_SEEDS)
        proposer = self.random.choice((0, 0, -2, 2)) if not self._blank else 0
        return {disk: hours * HOUR_MS}, {f"g{self.random.randrange(GATEWAYS)}": proposer * HOUR_MS}

    async def bad_weather(self) -> None:
        """Nobody else dies while an operator accepts a disk. Until it is cancelled."""
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.08))
            self.world.weather = self.weather()

    async def play(self) -> None:
        of_disks, of_gateways = self._skews()
        nodes = [
            StorageNode(
                self.world,
                "n" + disk[1:],
                disk,
                of_disks.get(disk, 0) + self.world.skew_ms() if disk in of_disks else None,
            )
            for disk in DISKS
        ]
        gateways = self.gateways = [
            self._gateway(f"g{index}", skew_ms=of_gateways.get(f"g{index}", 0) + self.world.skew_ms())
            for index in range(GATEWAYS)
        ]
        self.found.faults += [
            f"{name}'s clock is {skew_ms / HOUR_MS} h off"
            for name, skew_ms in (*of_disks.items(), *of_gateways.items())
            if skew_ms
        ]
        self.world.weather = self.weather()
        others = [self.keeper(self.random.choice(gateways)), self.repair(self.random.choice(nodes[:3]), gateways)]
        if self._lies:
            self.found.faults.append(f"{self._liar} lies")
            others.append(self.lies())
        else:
            others.append(self.bad_weather() if self._blank else Trouble(self, self.random).run())
        background = [self.world.loop.create_task(work) for work in others]
        once = [self.world.loop.create_task(self.close_bucket())]
        if self.of_objects and not self._blank and self.random.random() < 0.5:
            once.append(self.world.loop.create_task(self.overreach()))
        if self._blank:
            once.append(self.world.loop.create_task(self.swap()))
        elif self.of_objects:
            background.append(self.world.loop.create_task(self._apart.choice((self.steal, self.steal, self.mimic))()))
        await asyncio.gather(
            *(self.gateway_life(gateway) for gateway in gateways),
            *(self.use_bucket(gateway) for gateway in gateways),
        )
        for task in background:
            task.cancel()
        for outcome in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await Trouble(self, self.random).heal()
        await asyncio.gather(*once)
        reader = self._gateway("reader", skew_ms=0, deadline_s=10.0)
        await self.look_at_the_end(reader)
        for gateway in (*gateways, reader):
            if gateway.client.chosen_falls[0] and not self._misled():
                self.complain(f"what was chosen fell back: {gateway.client.chosen_falls[1]}")
            await gateway.client.close()


def run_hostile(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Hostile(seed, loop, rules))
