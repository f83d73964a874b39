"""What gateways do in a run: reads, writes, deletes and compare-and-sets of a few keys, with and without small copies,
by tasks and by callbacks; callers that leave; gateways that die. Each operation is noted for the judge.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from storaged.cluster.layout import SYSTEM_PARTITION, Layout
from storaged.errors import DataDamaged, OutcomeUnknown, S3Error
from storaged.meta.client import RingClient
from storaged.meta.consensus.register import FLOOR_SEQUENCES
from storaged.meta.names import Change, RegisterName, Value, Visibility
from storaged.meta.ports import Outcome, SmallCopies, Update
from tests.sim.cluster import Gateway, World
from tests.sim.linear import Content, Kind, Operation, linearizable

WORKERS = 2
OPERATIONS = 7
"""Operations of each worker: 42 a run."""
EXPECTED_OPERATIONS = 50
"""Of a run, with those of gateways that died."""


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
    seconds: float = 0.0
    """Of virtual time, until the workload had ended; 0 where a play does not say."""
    done: Counter[str] = field(default_factory=Counter)
    """What a play has done besides operations."""
    accepts_a_message: dict[int, int] = field(default_factory=dict)
    """How many messages had so many accepts, where a run counts them."""


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
    """The caller has gone, and the operation was cancelled."""


class BarrierFailed(Exception):
    """The fragments could not be synced: nothing may be accepted."""


def content_of(value: Value | None) -> Content:
    return None if value is None or value.visibility == Visibility.TOMBSTONE else value.body


class Workload:
    """A history of operations on the registers ``names``, and what was seen to be wrong (``found``)."""

    def __init__(self, seed: int, world: World, layout: Layout) -> None:
        self.world = world
        self.random: random.Random = world.random
        self.layout = layout
        self.found = Verdicts(seed)
        self.history: list[Operation] = []
        self.names: dict[str, RegisterName] = {}
        self.last_seen: dict[str, Content] = {}
        self.fresh = False
        self.copied: dict[bytes, bytes] = {}
        """What small copies hold, by data id."""
        self.of_objects = True
        """Else registers of the system table: they are not created unasked, and what a majority holds counts against a
        lone higher ballot.
        """
        self.disks_may_be_swapped = self.disks_may_be_full = False
        self.lost_copies: set[bytes] = set()
        """Data ids of the small copies on the disk that was lost."""
        self.copies_may_be_lost = False
        """Small copies of an object may be lost on all disks."""
        self.small_share = 0.3
        """How many of the writes are of small objects."""
        self._moments = 0
        self._serial = 0

    def complain(self, violation: str) -> None:
        self.found.violation = self.found.violation or violation

    def judge(self) -> Verdicts:
        if not linearizable(self.history):
            self.complain("the history is not linearizable")
        if self.world.loop.troubles:
            self.complain("unhandled: " + self.world.loop.troubles[0])
        self.found.messages, self.found.trace = self.world.messages, self.world.trace()
        return self.found

    def moment(self) -> int:
        self._moments += 1
        return self._moments

    def _fresh(self, key: str) -> bytes:
        """On files every other row is too long for the tree, and lies in the heap."""
        self._serial += 1
        padding = 150 if self.world.on_files and self._serial % 2 else 0
        return f"{key}{self._serial}".encode().ljust(padding, b".")

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self.random.uniform(0, 0.05))
            key = self._choose_key()
            kind = self.random.choices(tuple(Kind), (35, 25, 25, 15))[0]
            await self.operate(gateway, kind, key)

    def _choose_key(self) -> str:
        """``fresh``: one after the other, so that registers which were never written are met all the time."""
        keys = list(self.names)
        if not self.fresh:
            return self.random.choice(keys)
        first = min(self.found.operations * len(keys) // EXPECTED_OPERATIONS, len(keys) - 2)
        return keys[first + self.random.randrange(2)]

    async def operate(self, gateway: Gateway, kind: Kind, key: str) -> None:
        operation = Operation(kind, key, self.moment(), new=self._fresh(key), expected=self.last_seen[key])
        self.history.append(operation)
        self.found.operations += 1
        try:
            observed = await self._unless_it_leaves(self.carry_out(gateway, operation))
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
            if isinstance(error, DataDamaged) and not self.copies_may_be_lost:
                self.complain("an object counts as damaged whose copy is whole on some disk")
            self.world.note("refused", kind, key, type(error).__name__)
            return
        operation.observed = observed
        operation.returned = self.moment()
        self.last_seen[key] = operation.step(observed)[1] if self.random.random() < 0.8 else observed
        self.world.note("done", kind, key, observed, operation.new)

    async def _unless_it_leaves(self, work: Coroutine[Any, Any, Content]) -> Content:
        if self.random.random() >= 0.06:
            return await work
        task = self.world.loop.create_task(work)
        task.add_done_callback(_is_known)
        try:
            done, _ = await asyncio.wait((task,), timeout=self.random.uniform(0, 0.02))
        finally:
            task.cancel()
        if not done:
            await asyncio.wait((task,))
        if task.cancelled():
            raise ClientLeft
        return task.result()

    async def carry_out(self, gateway: Gateway, operation: Operation) -> Content:
        name = self.names[operation.key]
        client = gateway.client
        if operation.kind is Kind.READ:
            reading = await client.read(name, want_payload=self.random.random() < 0.3)
            if reading.value is not None:
                self.look_for_copies(reading.value.payload)
            if (
                reading.payload is not None
                and reading.value is not None
                and bytes(reading.payload) != self.copied[reading.value.payload]
            ):
                self.complain(f"the small copy of {reading.value.body!r} is {bytes(reading.payload)!r}")
            return content_of(reading.value)
        if operation.kind is Kind.DELETE:
            outcome = await self._change(client, name, delete)
            return content_of(outcome.before)
        small, data_id = self._small_copies(operation.new or b"")
        if operation.kind is Kind.CAS:
            keeps = small is None and self.random.random() < 0.5
            update = _compare_and_set(operation.expected, operation.new or b"", data_id, keeps=keeps)
            outcome = await self._change(client, name, update, small)
        elif (barrier := self._barrier()) is not None:
            outcome = await client.change(name, put(operation.new or b"", data_id), small=small, ready=barrier)
        else:
            written = _put_unless_held if self.random.random() < 0.1 else put
            outcome = await self._change(
                client, name, written(operation.new or b"", data_id), small, regardless=self.of_objects
            )
            sequence = outcome.after.sequence if outcome.after is not None else 0
            operation.blind = outcome.before is None and sequence % FLOOR_SEQUENCES > 1
        self.look_for_copies(data_id)
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
                self.complain(f"a change was told twice: {told}, then {outcome}")
            elif isinstance(outcome, Exception):
                told.set_exception(outcome)
            else:
                told.set_result(outcome)

        if self.random.random() < 0.5 and client.try_change(name, update, then, small=small, regardless=regardless):
            return await told
        return await client.change(name, update, small=small)

    def look_for_copies(self, data_id: bytes) -> None:
        """A small object that was read or confirmed has its copy on two disks, unless disks were full or swapped, or
        one was lost.
        """
        if data_id and not self.disks_may_be_swapped and not self.disks_may_be_full:
            holders = [node.name for node in self.world.nodes.values() if data_id in node.payloads.synced]
            if len(holders) + (data_id in self.lost_copies) < 2:
                self.complain(f"a small object was told of with its copy on {holders} alone")

    def _small_copies(self, content: bytes) -> tuple[SmallCopies | None, bytes]:
        if self.random.random() >= self.small_share:
            return None, b""
        data_id = self.random.randbytes(16)
        self.copied[data_id] = content
        return SmallCopies(
            data_id, [(data_id, [content])] * len(self.layout.seeds), lambda disks: len(disks) >= 2
        ), data_id

    def _barrier(self) -> Awaitable[None] | None:
        if self.random.random() >= 0.2:
            return None

        async def barrier(delay_s: float, fails: bool) -> None:
            await asyncio.sleep(delay_s)
            if fails:
                raise BarrierFailed

        return barrier(self.random.uniform(0, 0.05), self.random.random() < 0.2)

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


def _is_known(task: asyncio.Task[Any]) -> None:
    """Reads the task's error, so that asyncio does not report it when the gateway dies at the same time."""
    if not task.cancelled():
        task.exception()


def delete(value: Value | None) -> Change | None:
    return None if content_of(value) is None else Change(b"", Visibility.TOMBSTONE)


def put(content: bytes, data_id: bytes) -> Callable[[Value | None], Change | None]:
    return lambda _value: Change(content, Visibility.LIVE, data_id)


def _put_unless_held(content: bytes, data_id: bytes) -> Callable[[Value | None], Change | None]:
    """As a PUT that finds a record which it can't read."""
    return _compare_and_set(None, content, data_id)


def _compare_and_set(
    expected: Content, content: bytes, data_id: bytes, *, keeps: bool = False
) -> Callable[[Value | None], Change | None]:
    """``keeps``: the small copy that the value names stays, as where tags change."""

    def update(value: Value | None) -> Change | None:
        if content_of(value) != expected:
            raise ConditionFailed(content_of(value))
        kept = value.payload if keeps and value is not None and content_of(value) is not None else data_id
        return Change(content, Visibility.LIVE, kept)

    return update
