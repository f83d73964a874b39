"""The shared state of the object plane: the ports of the planes below, limits, caches, and the tasks and threads that
outlive one call.

``ObjectPlane`` is the first argument of the functions in ``write``, ``read`` and ``listing``;
``service.ObjectService`` binds them to one.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

from storaged.clock import Clock
from storaged.cluster.layout import Layout
from storaged.cluster.ports import Layouts, Liveness
from storaged.deadlines import Deadlines
from storaged.fragments.ports import FragmentId, FragmentStores
from storaged.ids import Entropy
from storaged.meta.names import RegisterName
from storaged.meta.ports import Fences, Pages, Registers, Scanner
from storaged.objects.api import OBJECT_BYTES_MAX, PART_BYTES_MAX, PART_BYTES_MIN, PARTS_MAX
from storaged.objects.background import Background, Counters
from storaged.objects.bad_rows import BadRows
from storaged.objects.cache.buffers import BufferPool
from storaged.objects.cache.configurations import Configurations
from storaged.objects.cache.listed_rows import ListedRowCache
from storaged.objects.cache.opened_records import OpenedRecordCache
from storaged.objects.code import place
from storaged.objects.code.lifecycle import DAY_MS
from storaged.objects.configuration.kinds import COPIES, VERSIONING
from storaged.objects.garbage import Garbage
from storaged.objects.hedge_delay import HedgeDelay
from storaged.objects.lender_registers import LenderRegisters
from storaged.objects.lifecycle.notes import Notes
from storaged.objects.long_reads import LongReads
from storaged.objects.ports import KeyService, Lenders, NoLenders
from storaged.objects.records import BucketRecord
from storaged.objects.room import Room
from storaged.sov1 import TAG_BYTES
from storaged.units import KIB, MIB

LONG_READ_PART = 4
"""A download is long after this part of the delay for readers (``long_reads``)."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ObjectLimits:
    """Bounds and delays of the object plane: one attribute for each."""

    inline_sealed_bytes_max: int = 1 * KIB
    """Sealed bytes that stay in the record. Under about 2 KiB a record keeps out of LMDB's overflow pages."""
    small_bytes_max: int = 16 * KIB
    """Bodies kept as whole copies beside the register. A gateway takes ``small_object_bytes_max`` of its configuration,
    256 KiB by default. At 4 KiB, copies reach 0.89 of the PUT rate of data in the record, in half the space.
    """
    put_bytes_max: int = PART_BYTES_MAX
    part_bytes_max: int = PART_BYTES_MAX
    object_bytes_max: int = OBJECT_BYTES_MAX
    part_bytes_min: int = PART_BYTES_MIN
    parts_max: int = PARTS_MAX
    block_cells_max: int = 48
    """Data cells of a block while few uploads are in flight (seven of known size in one process): 3 MiB, so that a
    fragment of 4+2 is one write of 768 KiB.
    """
    fill_buffer_bytes_max: int = 52 * MIB
    """Plaintext of uploads while their clients send it, without what the transports hold."""
    put_buffer_bytes_max: int = 24 * MIB
    """Sealed cells and parity of blocks that are sent to disks: 21 blocks of 12 cells, whose transfers take turns."""
    get_buffer_bytes_max: int = 32 * MIB
    """Opened windows, and opened copies of more than 64 KiB. Their sealed cells take as much again while they are
    opened.
    """
    buffer_wait_s: float = 20.0
    """How long a transfer waits for a buffer before SlowDown."""
    write_timeout_s: float = 15.0
    sync_timeout_s: float = 60.0
    read_timeout_s: float = 15.0
    late_grace_s: float = 0.5
    """A write or a sync is given up when it is not done this long after all was safe without it, or after as long again
    as the others took."""
    hedge_floor_s: float = 0.05
    """A read is not hedged sooner: below the ordinary latency of a busy disk a hedge only adds load."""
    retire_delay_ms: int = 3_600_000
    """How long replaced data stays, for reads that are under way."""
    threads: int = 4
    background_tasks_max: int = 256
    buckets_per_user_max: int = 1000
    bucket_cache_s: float = 1.0
    user_cache_s: float = 1.0
    cache_entries_max: int = 4096
    opened_bytes_max: int = 24 * MIB
    """The cache of opened records: some 8,000 keys, at 3 KiB each."""
    listed_bytes_max: int = 16 * MIB
    """The cache of listed rows: some 25,000, with keys of 30 bytes. Their heads and keys are in the scanner's cache
    too.
    """
    configuration_bytes_max: int = 32 * MIB
    """The cache of opened configurations of buckets: sealed bytes."""
    upload_keep_ms: int = 86_400_000
    """How long the rows of a finished upload stay, so that a repeated Complete gets its answer."""
    upload_expire_ms: int = 30 * 86_400_000
    """How long an open upload stays to which nothing is added, before it is aborted; 0: for ever."""
    lifecycle_day_ms: int = DAY_MS
    """A day of lifecycle rules. Only tests have a shorter one."""
    lifecycle_per_s: int = 100
    """Keys that lifecycle looks at in a second, at most."""


class Damage(NamedTuple):
    """A damaged fragment that a read found. ``reason``: missing, checksum (a cell does not match its checksum), lied
    (it does, but is not what was sealed). ``cell``: of the fragment; -1 for all of it.
    """

    owner: RegisterName
    fragment: FragmentId
    disk: str
    cell: int
    reason: str


OnDamage = Callable[[Damage], None]


async def _no_other_process(_kind: str, _key: str) -> None:
    """``on_changed`` of a gateway with one process."""


@dataclass
class ObjectPlane:
    """The ports below, and what all requests share.

    It has more than 20 attributes, because the functions of the plane keep no state of their own.
    """

    registers: Registers
    pages: Pages
    scanner: Scanner
    fences: Fences
    stores: FragmentStores
    liveness: Liveness
    layouts: Layouts
    keys: KeyService
    clock: Clock
    entropy: Entropy
    limits: ObjectLimits = field(default_factory=ObjectLimits)
    on_damage: OnDamage = lambda damage: None
    on_changed: Callable[[str, str], Awaitable[None]] = _no_other_process
    """``await on_changed(kind, key)``: a ``bucket`` of this name, or a ``user`` of this access key, has just changed.
    Other processes that serve this gateway's port must drop it from their caches (``BucketService.forget``,
    ``UserService.forget``). The answer to the change waits for this.
    """
    on_events: Callable[[BucketRecord, RegisterName], None] = lambda bucket, name: None
    """Called with a key whose outbox has just got events (``write.outbox``)."""
    names_authenticated: Callable[[], bool] = lambda: True
    """Whether all claims of names are known to have an authenticator. Then one without is refused (``claims``)."""
    agreed_ms: Callable[[], int | None] | None = None
    """The wall clock as far as a majority of the storage nodes agrees (``cluster.agreed_time``); it returns None while
    that is not known. What only time allows to delete is judged by it. Without it this process's clock counts.
    """
    on_degraded: Callable[[RegisterName], None] = lambda name: None
    """Called with a register whose data was just committed with fewer fragments, or under another profile, than it
    should have.
    """

    lenders: Lenders = field(default_factory=NoLenders)
    """``system.lenders.LenderService``, which sets itself here."""

    def __post_init__(self) -> None:
        self.lender_registers = LenderRegisters(lambda: self.registers, lambda scope: self.lenders.find(scope))
        """For what may change the rows of lenders, too."""
        self.counters = Counters()
        self.small_bytes_max = max(self.limits.small_bytes_max, self.limits.inline_sealed_bytes_max - TAG_BYTES)
        """Bodies that are not coded: they are in the record, or kept as copies."""
        self.room = Room(self.layouts, self.liveness)
        self.bad_rows = BadRows()
        self.configurations = Configurations(self.keys, self.limits.configuration_bytes_max)
        self.notes = Notes(self.configurations, self.counters, self.limits.lifecycle_day_ms)
        """Of changes in buckets with a lifecycle."""
        self.background = Background(self.limits.background_tasks_max, self.counters)
        self.fill_buffers = BufferPool(self.limits.fill_buffer_bytes_max, self.limits.buffer_wait_s)
        self.garbage = Garbage(self.stores, self.background, self.limits.write_timeout_s)
        self.put_buffers = BufferPool(self.limits.put_buffer_bytes_max, self.limits.buffer_wait_s)
        self.get_buffers = BufferPool(self.limits.get_buffer_bytes_max, self.limits.buffer_wait_s)
        self.long_reads = LongReads(self.clock, self.limits.retire_delay_ms / 1000 / LONG_READ_PART)
        self.hedge = HedgeDelay(self.limits.hedge_floor_s)
        self.deadlines = Deadlines()
        """Of reads of fragments."""
        self._copy_plans: dict[tuple[bytes, int], place.CopyPlan] = {}
        """Of the layout and the steps of partitions below."""
        self._planned_layout: Layout | None = None
        self._planned_steps = -1
        self.opened_records = OpenedRecordCache(self.limits.opened_bytes_max)
        self.listed_rows = ListedRowCache(self.limits.listed_bytes_max)
        self.threads = ThreadPoolExecutor(self.limits.threads, thread_name_prefix="objects")

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs native work that releases the interpreter lock. A cancelled caller still waits for the thread, which
        uses the caller's buffers.
        """
        future = asyncio.get_running_loop().run_in_executor(self.threads, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def versioning(self, bucket: BucketRecord) -> str:
        """ENABLED or SUSPENDED; empty: the bucket never had versioning. Raises DataDamaged, ServiceUnavailable."""
        if bucket.plain:
            return ""
        found = self.configurations.of(bucket).get(VERSIONING)
        return found.status if found is not None else ""

    def small_bytes_in(self, bucket: BucketRecord) -> int:
        """As ``small_bytes_max``, in a bucket, which may have chosen less. Raises DataDamaged, ServiceUnavailable."""
        if bucket.plain or (copies := self.configurations.of(bucket).get(COPIES)) is None:
            return self.small_bytes_max
        return max(self.limits.inline_sealed_bytes_max - TAG_BYTES, min(copies.bytes, self.small_bytes_max))

    def copy_plan(self, name: RegisterName) -> place.CopyPlan:
        """The plan for the register's partition, where it is now. Raises ServiceUnavailable."""
        shard, layout, steps = (name.scope, name.shard), self.layouts.current, self.layouts.partitions.steps
        full = len(self._copy_plans) >= self.limits.cache_entries_max
        if layout is not self._planned_layout or steps != self._planned_steps or full:
            self._planned_layout, self._planned_steps, self._copy_plans = layout, steps, {}
        plan = self._copy_plans.get(shard)
        if plan is None:
            state = self.layouts.partition(name.partition)
            plan = self._copy_plans[shard] = place.copy_plan(layout, state, self.liveness.disk_writable)
        return plan

    def for_lenders(self, bucket: BucketRecord) -> ObjectPlane:
        """This plane, for changes of a bucket that may be a lender: the end of loans."""
        found = copy.copy(self)
        found.registers = self.lender_registers.of(bucket)
        return found

    def now_agreed_ms(self) -> int | None:
        """See ``agreed_ms``."""
        return self.agreed_ms() if self.agreed_ms is not None else self.clock.wall_ms()

    async def close(self) -> None:
        await self.background.close()
        self.deadlines.close()
        self.opened_records.clear()
        self.listed_rows.clear()
        self.threads.shutdown(wait=True)
