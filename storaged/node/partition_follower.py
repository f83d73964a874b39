"""Keeps a node's map of the partitions current: reads their records from the system partition.

A record is believed when a quorum of the system partition holds it and a gateway signed it. The node reads all records
at its start, every ``EVERY_S``, and when another node says that it knows more. A request that a replica refuses, since
the partition has moved, reads the record of that partition (``refresh``).

When the system partition was recovered without its majority, records of it may have fallen back to earlier steps. What
a node knows stays. A gateway writes it again (``on_fallen``), for those that begin later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import structlog
from msgspec import MsgspecError

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PATH_PREFIX, PartitionRecord, path_of, signed_bytes
from storaged.cluster.ports import Layouts
from storaged.cluster.signers import is_signed
from storaged.errors import CertificateRefused, LayoutRefused, StoragedError
from storaged.meta.authority import KnownSteps
from storaged.meta.listing.merge import every_row
from storaged.meta.names import SYSTEM_SCOPE, Table, Value, system_name
from storaged.meta.ports import PageQuery, Registers, Scanner
from storaged.node.move_settings import FollowedSettings, KeyOf
from storaged.wire import decode

EVERY_S = 60.0
RETRY_S = 2.0
PAUSE_S, PAUSE_S_MAX = 1.0, 10.0
"""Between two readings of all records. It doubles while other nodes say that they know more, and reading brings
nothing: a node that lies about what it knows must not keep this one reading.
"""
RECORDS_A_SECOND = 128
"""The pause is at least so long that on average no more records are read in a second. Without that, the readings of all
nodes took a third of the work of moving all partitions of a small cluster. A request for a partition whose step is
not known yet does not wait.
"""

log = structlog.get_logger("partitions")


class FollowedLayouts(Layouts, Protocol):
    """The layouts of a node, and its map of partitions."""

    @property
    def partitions(self) -> PartitionMap: ...


def known_steps(layouts: FollowedLayouts, node: str, follower: Callable[[], PartitionFollower]) -> KnownSteps:
    """Which steps the replicas of this node know."""

    async def refresh(partition: int) -> None:
        with contextlib.suppress(StoragedError, TimeoutError):
            await follower().refresh(partition)

    partitions = layouts.partitions
    return KnownSteps(
        lambda number: partitions.step_of(number, layouts.current),
        lambda _number: partitions.on_behind(node),
        refresh,
    )


class PartitionFollower:
    """``run`` is its task."""

    def __init__(
        self, layouts: FollowedLayouts, registers: Registers, scanner: Scanner, key_of: KeyOf, cluster: str
    ) -> None:
        self._layouts = layouts
        self._partitions = layouts.partitions
        self._registers = registers
        self._scanner = scanner
        self._key_of = key_of
        self._cluster = cluster
        self._behind = asyncio.Event()
        self._reading: dict[int, asyncio.Task[None]] = {}
        """By partition: one reading serves all who ask meanwhile. It may have begun too early for the last of them, who
        is then refused, and asks once more.
        """
        self.settings = FollowedSettings(registers, key_of, cluster)
        """Of moves. They have a task of their own."""
        self.on_fallen: Callable[[PartitionRecord], Awaitable[None]] | None = None
        """Of a gateway: ``await on_fallen(record)`` writes a record that the system partition has lost."""
        self.refused = 0
        """Records that no gateway has signed, or that do not decode."""
        self._partitions.on_behind = lambda _node: self._behind.set()

    async def run(self) -> None:
        """Runs for ever. In a cluster whose data never moved, the records are read once: partitions may have moved
        without another layout, away from disks that are out.
        """
        pause_s, hinted = PAUSE_S, False
        while True:
            self._behind.clear()
            rest_s, steps = EVERY_S, self._partitions.steps
            try:
                if self._layouts.current.base or hinted or steps or not self._partitions.complete:
                    await self.read_all()
            except (StoragedError, TimeoutError) as error:
                rest_s = RETRY_S
                log.info("the records of partitions are read later", reason=str(error))
            in_vain = hinted and self._partitions.steps == steps
            pause_s = min(2 * pause_s, PAUSE_S_MAX) if in_vain else PAUSE_S
            await asyncio.sleep(max(pause_s, self._reading_s()))
            hinted = True
            try:
                async with asyncio.timeout(rest_s):
                    await self._behind.wait()
            except TimeoutError:
                hinted = False

    def _reading_s(self) -> float:
        """As ``RECORDS_A_SECOND`` says. Nothing until all records were read once: requests for partitions that are not
        known to have moved are refused as long.
        """
        return self._partitions.moved / RECORDS_A_SECOND if self._partitions.complete else 0.0

    def wake(self) -> None:
        """Reads the records soon: another layout is in force, and may be the first one that moves data."""
        self._behind.set()

    async def read_all(self) -> None:
        """Raises ServiceUnavailable without a majority of the system partition."""
        wanted, held = PageQuery(Table.SYSTEM, SYSTEM_SCOPE, (0,), prefix=PATH_PREFIX.encode()), dict[int, int]()
        async for row in every_row(self._scanner, wanted):
            record = await self._learn(row.key.decode("utf-8", "replace"), row.value)
            if record is not None:
                held[record.partition] = record.step
        self._partitions.complete = True
        if self._layouts.current.seeds_recovered and self.on_fallen is not None:
            for record in self._partitions.fallen(held):
                await self.on_fallen(record)

    async def refresh(self, partition: int) -> None:
        """Reads the record of one partition. Raises as ``read_all``. Where the system partition is, the layout says."""
        if partition == SYSTEM_PARTITION:
            return
        reading = self._reading.get(partition)
        if reading is None:
            reading = asyncio.get_running_loop().create_task(self._read(partition))
            self._reading[partition] = reading
            reading.add_done_callback(partial(self._is_read, partition))
        await asyncio.shield(reading)

    def _is_read(self, partition: int, reading: asyncio.Task[None]) -> None:
        self._reading.pop(partition, None)
        if not reading.cancelled():
            reading.exception()  # known to those who wait; asyncio would report it when all of them were cancelled

    async def _read(self, partition: int) -> None:
        path = path_of(partition)
        value = (await self._registers.read(system_name(path))).value
        if value is not None and value.body:
            await self._learn(path, value)

    async def _learn(self, path: str, value: Value) -> PartitionRecord | None:
        """Returns the record; None for one that is not believed, or not yet."""
        try:
            record = decode(value.body, PartitionRecord)
            if path != path_of(record.partition):
                raise LayoutRefused(f"it is about partition {record.partition}")
            known = self._partitions.record(record.partition)
            if known is not None and known.step >= record.step:
                return record
            if not set(record.lost) <= set(self._layouts.current.lost):
                log.info("a partition that was recovered is followed later", record=path, layout=record.layout)
                return None  # it is read again when the layout is known that calls these disks lost
            key = await self._key_of(record.signer)
            if not is_signed(key, signed_bytes(self._cluster, record), record.signature):
                raise LayoutRefused("its signature does not hold")
            self._partitions.learn(record)
            return record
        except (MsgspecError, LayoutRefused, CertificateRefused) as error:
            self.refused += 1
            log.error("the record of a partition is not believed", record=path, reason=str(error))
        return None
