"""One seeded run: gateways work on a few keys while a nemesis does its worst; then everything heals, and the history is
judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog.testing

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.errors import OutcomeUnknown, S3Error, StoragedError
from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.consensus.register import COUNTER_MAX, RULES, Rules, Verdict, overtaken
from storaged.meta.names import Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Outcome, SmallCopies, Update
from tests.sim.cluster import (
    DISKS,
    FIRST_SEEDS,
    SKEW_MS_MAX,
    WIDE_SKEW_MS_MAX,
    Gateway,
    StorageNode,
    Weather,
    World,
    make_layout,
)
from tests.sim.linear import Content, Kind, Operation, linearizable
from tests.sim.virtual import VirtualLoop, run

KEYS = ("x", "y")
GATEWAYS = 3
WORKERS = 2
OPERATIONS = 7
"""Operations of each worker: 42 a run."""

NEW_SEEDS = ("d2", "d3", "d4")


@dataclass
class Verdicts:
    """What one run showed. ``violation`` is empty when all is well."""

    seed: int
    violation: str = ""
    operations: int = 0
    unknown: int = 0
    refused: int = 0
    messages: int = 0
    trace: str = ""
    faults: list[str] = field(default_factory=list)


class ObjectName(RegisterName):
    """A register of an object (others are not created unasked) on the disks that a layout of the simulation names:
    those of the system partition.
    """

    __slots__ = ()

    @property
    def partition(self) -> int:
        return SYSTEM_PARTITION


class ConditionFailed(Exception):
    """The update's own refusal, as a 412 is; carries what it judged."""

    def __init__(self, observed: Content) -> None:
        super().__init__(observed)
        self.observed = observed


class ClientLeft(Exception):
    """Whoever asked has gone, and the operation was cancelled."""


class BarrierFailed(Exception):
    """The fragments could not be synced: nothing may be accepted."""


def content_of(value: Value | None) -> Content:
    return None if value is None or value.visibility == Visibility.TOMBSTONE else value.body


class Scenario:
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        self.random = random.Random(seed)
        aside = random.Random(
            f"aside {seed}"
        )  # its own, so that what is drawn from it changes nothing in the runs without
        self.world = World(
            loop, self.random, rules, skew_ms_max=WIDE_SKEW_MS_MAX if aside.random() < 0.2 else SKEW_MS_MAX
        )
        self._stray_at_s = aside.uniform(0, 0.4) if aside.random() < 0.15 else None
        """When a gateway whose clock is at the end of all time begins to write; it does in some runs."""
        self.found = Verdicts(seed)
        self.history: list[Operation] = []
        self._moments = 0
        self._of_objects = aside.random() < 0.7
        """Else registers of the system table: they are not created unasked, and what a majority holds counts against a
        lone higher ballot.
        """
        self._names = {key: self._name(b"sim/" + key.encode()) for key in KEYS}
        self._last_seen: dict[str, Content] = dict.fromkeys(KEYS)
        self._serial = 0
        self._disks_may_be_swapped = self._disks_may_be_full = False
        self._dies_with_its_gateway: StorageNode | None = None
        self.layout = make_layout(1, FIRST_SEEDS)

    def _name(self, key: bytes) -> RegisterName:
        return (
            ObjectName(Table.OBJECT, bytes(16), 0, key)
            if self._of_objects
            else RegisterName(Table.SYSTEM, bytes(16), 0, key)
        )

    # --- workload

    def _moment(self) -> int:
        self._moments += 1
        return self._moments

    def _fresh(self, key: str) -> bytes:
        self._serial += 1
        return f"{key}{self._serial}".encode()

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self.random.uniform(0, 0.05))
            key = self.random.choice(KEYS)
            kind = self.random.choices(tuple(Kind), (35, 25, 25, 15))[0]
            await self.operate(gateway, kind, key)

    async def operate(self, gateway: Gateway, kind: Kind, key: str) -> None:
        operation = Operation(kind, key, self._moment(), new=self._fresh(key), expected=self._last_seen[key])
        self.history.append(operation)
        self.found.operations += 1
        try:
            observed = await self._unless_it_leaves(self._carry_out(gateway, operation))
        except ConditionFailed as failed:
            observed = failed.observed
            if operation.kind is Kind.PUT:
                operation.kind = Kind.READ  # of what it refuses to replace
        except (OutcomeUnknown, ClientLeft):
            self.found.unknown += 1
            self.world.note("unknown", kind, key)
            return
        except (S3Error, BarrierFailed) as error:
            self.found.refused += 1
            self.history.remove(operation)
            self.world.note("refused", kind, key, repr(error))
            return
        operation.observed = observed
        operation.returned = self._moment()
        self._last_seen[key] = operation.step(observed)[1] if self.random.random() < 0.8 else observed
        self.world.note("done", kind, key, observed, operation.new)

    async def _unless_it_leaves(self, work: Coroutine[Any, Any, Content]) -> Content:
        if self.random.random() >= 0.06:
            return await work
        task = self.world.loop.create_task(work)
        try:
            done, _ = await asyncio.wait((task,), timeout=self.random.uniform(0, 0.02))
        finally:
            task.cancel()
        if not done:
            await asyncio.wait((task,))
        if task.cancelled():
            raise ClientLeft
        return task.result()

    async def _carry_out(self, gateway: Gateway, operation: Operation) -> Content:
        name = self._names[operation.key]
        client = gateway.client
        if operation.kind is Kind.READ:
            reading = await client.read(name, want_payload=self.random.random() < 0.3)
            if reading.value is not None:
                self._look_for_copies(reading.value.payload)
            if (
                reading.payload is not None
                and reading.value is not None
                and bytes(reading.payload) != reading.value.body
            ):
                self._complain(f"the small copy of {reading.value.body!r} is {bytes(reading.payload)!r}")
            return content_of(reading.value)
        if operation.kind is Kind.DELETE:
            outcome = await self._change(client, name, _delete)
            return content_of(outcome.before)
        small, data_id = self._small_copies(operation.new or b"")
        if operation.kind is Kind.CAS:
            outcome = await self._change(
                client, name, _compare_and_set(operation.expected, operation.new or b"", data_id), small
            )
        elif (barrier := self._barrier()) is not None:
            outcome = await client.change(name, _put(operation.new or b"", data_id), small=small, ready=barrier)
        else:
            put = _put_unless_held if self.random.random() < 0.1 else _put
            outcome = await self._change(
                client, name, put(operation.new or b"", data_id), small, regardless=self._of_objects
            )
            operation.blind = outcome.before is None and outcome.after is not None and outcome.after.sequence > 1
        self._look_for_copies(data_id)
        return content_of(outcome.before)

    async def _change(
        self,
        client: RingClient,
        name: RegisterName,
        update: Update,
        small: SmallCopies | None = None,
        *,
        regardless: bool = False,
    ) -> Outcome:
        """By a task, or by callbacks."""
        told: asyncio.Future[Outcome] = self.world.loop.create_future()

        def then(outcome: Outcome | Exception) -> None:
            if told.cancelled():
                return
            if told.done():
                self._complain(f"a change was told twice: {told}, then {outcome}")
            elif isinstance(outcome, Exception):
                told.set_exception(outcome)
            else:
                told.set_result(outcome)

        if self.random.random() < 0.5 and client.try_change(name, update, then, small=small, regardless=regardless):
            return await told
        return await client.change(name, update, small=small)

    def _look_for_copies(self, data_id: bytes) -> None:
        """What was told or confirmed has its copy on two disks, unless disks were full or swapped."""
        if data_id and not self._disks_may_be_swapped and not self._disks_may_be_full:
            holders = [node.name for node in self.world.nodes.values() if data_id in node.payloads.synced]
            if len(holders) < 2:
                self._complain(f"a small object was told of with its copy on {holders} alone")

    def _small_copies(self, content: bytes) -> tuple[SmallCopies | None, bytes]:
        if self.random.random() >= 0.3:
            return None, b""
        data_id = self.random.randbytes(16)
        return SmallCopies(data_id, [(data_id, [content])] * 3, lambda disks: len(disks) >= 2), data_id

    def _barrier(self) -> Awaitable[None] | None:
        if self.random.random() >= 0.2:
            return None

        async def barrier(delay_s: float, fails: bool) -> None:
            await asyncio.sleep(delay_s)
            if fails:
                raise BarrierFailed

        return barrier(self.random.uniform(0, 0.05), self.random.random() < 0.2)

    # --- nemesis

    async def gateway_life(self, gateway: Gateway) -> None:
        """A gateway's workers; sometimes the process dies in the middle, and comes back as another."""
        work = [self.world.loop.create_task(self.worker(gateway)) for _ in range(WORKERS)]
        if self.random.random() < 0.4:
            await asyncio.wait(work, timeout=self.random.uniform(0.02, 0.4))
            for task in work:
                task.cancel()
            await gateway.crash()
            await asyncio.gather(*work, return_exceptions=True)
            self.found.faults.append(f"{gateway.name} died")
            await asyncio.sleep(self.random.uniform(0, 0.1))
            gateway.start()
            work = [self.world.loop.create_task(self.worker(gateway)) for _ in range(WORKERS)]
        await asyncio.gather(*work)

    async def nemesis(self, wipe: bool) -> None:
        """Crashes, partitions and bad weather until it is cancelled; sometimes, once, a disk is swapped for a blank one
        while its node is down.
        """
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.08))
            choice = self.random.random()
            node = self.world.nodes["n" + self.random.choice(DISKS[:3])[1:]]
            if choice < 0.5 and node is self._dies_with_its_gateway:
                continue
            if choice < 0.5 and node.up:
                node.crash()
                self.found.faults.append(f"{node.name} died")
                if wipe and self.random.random() < 0.3:
                    wipe = False
                    node.blank_disk()
                    self.found.faults.append(f"{node.name} got a blank disk")
                self.world.loop.call_later(self.random.choice((0.0, 0.005, 0.02, 0.2)), self._restart, node)
            elif choice < 0.75:
                names = [*self.world.nodes, *(f"g{index}" for index in range(GATEWAYS))]
                self.world.cut = frozenset(name for name in names if self.random.random() < 0.4)
                self.world.note("cut", sorted(self.world.cut))
                self.world.loop.call_later(self.random.choice((0.02, 0.1, 0.5)), self._mend)
            else:
                self.world.weather = self._weather()

    def _mend(self) -> None:
        self.world.cut = frozenset()

    def _restart(self, node: StorageNode) -> None:
        if not node.up and not node.foreign:
            node.start()

    def _weather(self) -> Weather:
        level = self.random.choice((0.0, 0.02, 0.1, 0.25))
        full = self.random.choice((0.0, 0.1, 0.5)) if self._disks_may_be_full or self._disks_may_be_swapped else 0.0
        if self._disks_may_be_swapped:
            # the one disk that had room for a copy could be the one that is swapped, and the copy be lost rightly
            full = 0.0
        return Weather(
            level * self.random.random(),
            level * self.random.random(),
            level,
            full,
            self.random.choice((1.0, 4.0, 15.0)),
        )

    async def stray(self) -> None:
        """It asks every replica for a promise above all others, and gets no further."""
        await asyncio.sleep(self._stray_at_s or 0.0)
        self.found.faults.append("a clock at the end of time")
        stray = Gateway(self.world, "stray", self.layout)
        ballot = Ballot(self.layout.epoch, COUNTER_MAX, "stray", bytes(8))
        for name in self._names.values():
            for disk in self.layout.seeds:
                with contextlib.suppress(StoragedError):
                    await stray.directory.replica(disk).prepare(messages.Prepare(disk, name, ballot), timeout_s=0.2)
        await stray.client.close()

    async def move(self, gateways: list[Gateway]) -> None:
        """A layout change with a pause: fence a majority of the old replicas, copy every register, let the new layout
        be known. Until then nobody writes.
        """
        await asyncio.sleep(self.random.uniform(0.02, 0.3))
        self.found.faults.append("the ring moved")
        mover = Gateway(self.world, "mover", self.layout)
        fenced = await self._until_majority(FIRST_SEEDS, lambda disk: self._fence_epoch(mover, disk))
        for name in self._names.values():
            await self._copy(mover, name, fenced)
        layout = make_layout(2, NEW_SEEDS)
        await self._until_majority(NEW_SEEDS, lambda disk: self._fence_epoch(mover, disk))
        for gateway in gateways:
            self.world.loop.call_later(self.random.uniform(0, 0.3), setattr, gateway.layouts, "current", layout)
        self.layout = layout
        await mover.client.close()

    async def _fence_epoch(self, mover: Gateway, disk: str) -> bool:
        reply = await mover.directory.replica(disk).fence_epoch(messages.EpochFence(disk, 2), timeout_s=0.2)
        return reply.epoch >= 2

    async def _copy(self, mover: Gateway, name: RegisterName, fenced: list[str]) -> None:
        told: list[tuple[Ballot, Value | None]] = []
        heard: list[str] = []
        while len(heard) < 2:
            for disk in fenced:
                try:
                    reply, _ = await mover.directory.replica(disk).read(messages.Read(disk, name, 2), timeout_s=0.2)
                except StoragedError:
                    await asyncio.sleep(0.02)
                    continue
                if disk not in heard:
                    heard.append(disk)
                    told.append((reply.accepted, reply.value))
        ballot, value = max(told, key=lambda pair: pair[0])
        if value is None:
            return
        beneath = overtaken(told, ballot, value, self.world.rules)
        if beneath is not None:
            value = msgspec.structs.replace(value, sequence=beneath.sequence + 1)
        if value.payload:
            self._carry_copies(value.payload)
        target = Ballot(2, ballot.counter, "mover", b"\0" * 8)

        async def accept(disk: str) -> bool:
            request = messages.Accept(disk, name, target, value, identity=True)
            return (await mover.directory.replica(disk).accept(request, timeout_s=0.2)).verdict == Verdict.OK

        await self._until_majority(NEW_SEEDS, accept)

    def _carry_copies(self, data_id: bytes) -> None:
        """A layout change takes small copies along, before the registers: the new replicas are other disks."""
        stores = {disk: self.world.nodes["n" + disk[1:]].payloads.synced for disk in DISKS}
        held = next((stores[disk][data_id] for disk in FIRST_SEEDS if data_id in stores[disk]), None)
        for disk in NEW_SEEDS if held is not None else ():
            stores[disk].setdefault(data_id, held)

    async def _until_majority(self, disks: tuple[str, ...], call: Callable[[str], Awaitable[bool]]) -> list[str]:
        done: list[str] = []
        while 2 * len(done) <= len(disks):
            for disk in disks:
                try:
                    if disk not in done and await call(disk):
                        done.append(disk)
                except StoragedError:
                    await asyncio.sleep(0.02)
        return done

    # --- the whole

    async def play(self) -> None:
        nodes = [StorageNode(self.world, "n" + disk[1:], disk) for disk in DISKS]
        special = self.random.random()
        shared = nodes[0] if self.random.random() < 0.4 else None
        gateways = [
            Gateway(self.world, f"g{index}", self.layout, None if index else shared) for index in range(GATEWAYS)
        ]
        self._dies_with_its_gateway = shared
        self._disks_may_be_swapped = special < 0.25
        self._disks_may_be_full = special >= 0.9
        self.world.weather = self._weather()
        nemesis = self.world.loop.create_task(self.nemesis(wipe=self._disks_may_be_swapped))
        moving = self.world.loop.create_task(self.move(gateways)) if special > 0.7 else None
        stray = self.world.loop.create_task(self.stray()) if self._stray_at_s is not None else None
        await asyncio.gather(*(self.gateway_life(gateway) for gateway in gateways))
        if stray is not None:
            await stray
        nemesis.cancel()
        await asyncio.gather(nemesis, return_exceptions=True)
        self._heal()
        if moving is not None:
            await moving
        for gateway in gateways:
            gateway.layouts.current = self.layout
        await self._look_at_the_end(Gateway(self.world, "reader", self.layout))
        for gateway in gateways:
            await gateway.client.close()
        self.found.messages = self.world.messages

    def _heal(self) -> None:
        self.world.note("heal")
        self.world.cut = frozenset()
        self.world.weather = Weather()
        for node in self.world.nodes.values():
            self._restart(node)

    async def _look_at_the_end(self, reader: Gateway) -> None:
        """Healed, every key can be read and written, and the small copies are still there."""
        await asyncio.sleep(1.0)
        for key in KEYS:
            operation = Operation(Kind.READ, key, self._moment())
            try:
                reading = await reader.client.read(self._names[key], want_payload=True)
            except StoragedError as error:
                self._complain(f"{key} cannot be read after everything healed: {error!r}")
                continue
            operation.observed, operation.returned = content_of(reading.value), self._moment()
            self.history.append(operation)
            if reading.value is not None and reading.value.payload and reading.payload is None:
                self._complain(f"the small copy of {reading.value.body!r} is lost")
        for key in KEYS:
            try:
                await reader.client.change(self._names[key], _put(b"the last", b""))
            except StoragedError as error:
                self._complain(f"{key} cannot be written after everything healed: {error!r}")
        await reader.client.close()

    def _complain(self, violation: str) -> None:
        self.found.violation = self.found.violation or violation

    def judge(self) -> Verdicts:
        if not linearizable(self.history):
            self._complain("the history is not linearizable")
        if self.world.loop.troubles:
            self._complain("unhandled: " + self.world.loop.troubles[0])
        self.found.trace = self.world.trace()
        return self.found


def _delete(value: Value | None) -> Change | None:
    return None if content_of(value) is None else Change(b"", Visibility.TOMBSTONE)


def _put(content: bytes, data_id: bytes) -> Callable[[Value | None], Change | None]:
    return lambda _value: Change(content, Visibility.LIVE, data_id)


def _put_unless_held(content: bytes, data_id: bytes) -> Callable[[Value | None], Change | None]:
    """As a PUT that finds a record which it can't read."""
    return _compare_and_set(None, content, data_id)


def _compare_and_set(expected: Content, content: bytes, data_id: bytes) -> Callable[[Value | None], Change | None]:
    def update(value: Value | None) -> Change | None:
        if content_of(value) != expected:
            raise ConditionFailed(content_of(value))
        return Change(content, Visibility.LIVE, data_id)

    return update


def run_seed(seed: int, rules: Rules = RULES) -> Verdicts:
    """Plays one seed and judges it. The same seed and rules give the same trace, in every process."""
    return play_out(lambda loop: Scenario(seed, loop, rules))


def play_out(begin: Callable[[VirtualLoop], Scenario]) -> Verdicts:
    loop = VirtualLoop()
    scenario = begin(loop)
    with structlog.testing.capture_logs():
        run(loop, scenario.play())
    return scenario.judge()
