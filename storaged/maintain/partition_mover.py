"""Moves the replicas of partitions to where the layout in force wants them. Runs in gateways.

Theory of operation
    A partition exchanges one replica at a time (``cluster.partitions``), and the mover takes it from state to state:

    1. *joint*: the record of the partition is changed by compare-and-set. From now on operations need a majority of the
       set it has and of the set it gets.
    2. A majority of both sets refuses earlier steps, durably. So no operation that knows one set alone can end.
    3. The disk that comes takes over the bucket fences of a majority that refuses earlier steps.
    4. Everything is brought up: of each shard that a majority or the disk that comes has rows of, all replicas are
       compared, and what differs is settled by rounds that a majority of both sets takes. Rows of deleted keys and
       empty rows count too. What the disk that comes was too busy for is settled again. Then come manifest pages. The
       partition is *whole* when a majority of both sets and the disk that comes have answered for all shards: then a
       majority of the coming set has all that was chosen. It gets what is chosen meanwhile anyway. Last the disk that
       comes gets the floors of the present set (``consensus.floors``).
    5. *settled*: the record is changed again. The disk that goes keeps rows that count no more. A process that still
       knows the joint state alone needs a majority of the coming set too, so nothing has to be fenced here.

    The records alone say how far a partition is, so a mover that dies is continued by any other. Two movers at once do
    the same work twice; the compare-and-set lets one of them pass. While a partition is joint it can spare fewer disks,
    so no exchange begins for a disk that takes no writes now, and only some partitions are joint at the same time. When
    the disk that comes takes no writes for a while, the partition goes back to the set that it had. It exchanges other
    replicas first, or waits for the disk.

    For a disk that is out nothing comes to a disk that has no room for all that would come to it (``spare_room``). This
    is judged in each round, so it pauses when the room is taken by others, and begins again when there is room.

    While the job is paused (``cluster.move_settings``), no exchange begins. Those that are under way end: a joint
    partition can spare fewer disks than a settled one. A pace bounds how many exchanges begin; each gateway takes its
    share of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import structlog
from msgspec import MsgspecError

from storaged.clock import Clock
from storaged.cluster.layout import PARTITIONS, Layout
from storaged.cluster.move_settings import UNKNOWN, MoveSettings
from storaged.cluster.partitions import (
    PartitionRecord,
    PartitionState,
    check_step,
    is_settled,
    next_step,
    path_of,
)
from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import DataDamaged, LayoutRefused, NoSuchBucket, PageLost, ServiceUnavailable, StoragedError
from storaged.maintain.context import concurrently
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.listing.merge import RingScanner, every_row
from storaged.meta.messages import PAGES_A_CHECK
from storaged.meta.names import Change, RegisterName, Table, Value, system_name
from storaged.meta.ports import PageCopies, PageQuery, Registers
from storaged.meta.proposer.moving import PartitionMoves
from storaged.objects.write.references import is_readable, pages_in
from storaged.units import format_size
from storaged.wire import decode, encode

AT_ONCE = 4
"""Partitions whose rows are copied at the same time."""
PARTITIONS_A_TURN = 32
JOINT_MAX = 128
"""Partitions that are joint at the same time. While the disk that comes to a joint partition is away, the loss of one
more replica stops the partition. One that has not begun does not need that disk.
"""
LOST_S = 600.0
"""A disk that took no writes for this time counts as lost: it is exchanged first, and gets no partitions."""
COMPARISONS = 3
"""Of one shard, until no row differs. A round that a majority of both sets takes may miss the disk that comes, which is
busy then; the second comparison finds that. Rows that are written all the time may differ in each.
"""
FAILURES_SHOWN = 5
"""The log mentions a partition whose step failed this many times in a row. The first attempt mostly fails, since the
nodes of its disks have to learn of each step first.
"""
REST_S = 1.0
IDLE_S = 10.0
BURST_S = 10.0
"""A mover that began nothing may save up the pace of this time, and spend it at once."""

log = structlog.get_logger("partitions")


async def ample(_layout: Layout, _states: Sequence[PartitionState]) -> Mapping[str, int]:
    """All disks have room."""
    return {}


async def anywhere() -> Mapping[int, Collection[str]]:
    """No bucket has countries."""
    return {}


@dataclass(frozen=True)
class MoverPorts:
    """``sign(record)``: with the signing key of the cluster's gateways. ``refresh(partition)``: reads the record of a
    partition into the map of ``layouts``. ``allowed()``: for each partition with keys of buckets with countries, the
    countries of all of them together. ``settings()``: whether and how fast it moves; ``gateways()``: how many share the
    pace. ``room(layout, states)``: which disks can't take what would come to them from disks that are out, and how many
    bytes each lacks (``spare_room.disks_short``).
    """

    layouts: Layouts
    registers: Registers
    scanner: RingScanner
    pages: PageCopies
    moves: PartitionMoves
    liveness: Liveness
    clock: Clock
    sign: Callable[[PartitionRecord], PartitionRecord]
    refresh: Callable[[int], Awaitable[None]]
    allowed: Callable[[], Awaitable[Mapping[int, Collection[str]]]] = anywhere
    settings: Callable[[], MoveSettings] = MoveSettings
    gateways: Callable[[], int] = lambda: 1
    room: Callable[[Layout, Sequence[PartitionState]], Awaitable[Mapping[str, int]]] = ample


@dataclass
class MoverProgress:
    """``steps``: that this process has made. ``reason``: why some partition can't make a step; empty when all can."""

    steps: int = 0
    reason: str = ""


class PartitionMover:
    """``run`` is its task."""

    def __init__(
        self,
        ports: MoverPorts,
        *,
        at_once: int = AT_ONCE,
        joint_max: int = JOINT_MAX,
        lost_s: float = LOST_S,
        partitions: Sequence[int] = range(PARTITIONS),
    ) -> None:
        """``partitions``: those that it moves."""
        self._ports = ports
        self._partitions = partitions
        self._at_once = at_once
        self._may_begin = self._joint_max = joint_max
        self._lost_s = lost_s
        self._away_since: dict[str, float] = {}
        """Disks of the layout that take no writes: away, full, read-only or broken."""
        self._allowed: Mapping[int, Collection[str]] = {}
        self._failures: dict[int, int] = {}
        """How often in turn a partition could not make a step."""
        self._late: dict[int, str] = {}
        """Partitions that are to be mentioned, and why they could not make a step."""
        self._begins_at = 0.0
        """When the next exchange may begin, by the pace."""
        self._short: Mapping[str, int] = {}
        """Disks without room for what would come to them from disks that are out."""
        self.progress = MoverProgress()

    async def run(self) -> None:
        """Runs for ever. What fails is tried again, after longer and longer pauses while nothing moves."""
        rest_s = REST_S
        while True:
            steps = self.progress.steps
            waiting = await self.round()
            rest_s = REST_S if self.progress.steps > steps else min(1.5 * rest_s, IDLE_S)
            await asyncio.sleep(rest_s if waiting else IDLE_S)

    async def round(self) -> int:
        """Takes every partition that waits one step further, where that is possible now. Returns how many wait."""
        layouts, progress = self._ports.layouts, self.progress
        layout = layouts.partitions.target(layouts.current)
        if not layout.base and layout is layouts.current and not layouts.partitions.steps:
            return 0  # data never moved in this cluster
        try:
            states = await self._unsettled(layout)
        except ServiceUnavailable as error:  # an earlier layout is still to be learnt
            progress.reason = error.message
            return 1
        lost = self._lost(layout)
        progress.reason = ""
        settings = self._ports.settings()
        if settings.partitions_paused:
            if settings is UNKNOWN and states:
                progress.reason = "this gateway has not read yet whether moves are paused"
            states = [state for state in states if state.coming]
        try:
            self._allowed = await self._ports.allowed() if states else {}
            self._short = await self._ports.room(layout, states) if layout is not layouts.current and states else {}
        except (StoragedError, TimeoutError) as error:
            progress.reason = f"the countries of buckets, or the room on disks, are not known: {error}"
            return len(states)
        # Those that are under way end before others begin: few partitions are joint at any time.
        waiting = [state.partition for state in sorted(states, key=lambda state: not state.coming)]
        self._may_begin = self._joint_max - sum(bool(state.coming) for state in states)
        await concurrently((self._try_step(number, layout, lost) for number in waiting), self._at_once)
        self._mention_late()
        return len(waiting)

    def _mention_late(self) -> None:
        """One line a round: all partitions may wait for one disk."""
        if self._late:
            number, reason = next(iter(self._late.items()))
            log.info("partitions move later", partition=number, reason=reason, others=len(self._late) - 1)
            self._late.clear()

    async def _unsettled(self, layout: Layout) -> list[PartitionState]:
        """Where a layout wants a partition is computed once, from all disks: requests have their turn meanwhile."""
        found: list[PartitionState] = []
        for start in range(0, len(self._partitions), PARTITIONS_A_TURN):
            states = map(self._ports.layouts.partition, self._partitions[start:][:PARTITIONS_A_TURN])
            found += [state for state in states if not is_settled(state, layout)]
            await asyncio.sleep(0)
        return found

    def _lost(self, layout: Layout) -> frozenset[str]:
        """Disks of the layout that took no writes for long. ``next_step`` knows those that it does not name."""
        now, liveness = self._ports.clock.monotonic(), self._ports.liveness
        readable = [disk.id for disk in layout.disks if liveness.disk_readable(disk.id)]
        usable = {disk for disk in readable if liveness.disk_writable(disk)}
        self._away_since = {disk: self._away_since.get(disk, now) for disk in layout.disk_by_id if disk not in usable}
        return frozenset(disk for disk, since in self._away_since.items() if now - since >= self._lost_s)

    async def _try_step(self, number: int, layout: Layout, lost: frozenset[str]) -> None:
        try:
            made = await self._step(self._ports.layouts.partition(number), layout, lost)
            self.progress.steps += made  # not in one line: others count while this one waits
            self._failures.pop(number, None)
        except (StoragedError, TimeoutError) as error:
            failures = self._failures[number] = self._failures.get(number, 0) + 1
            if failures >= FAILURES_SHOWN:
                self.progress.reason = f"partition {number}: {error}"
            if failures == FAILURES_SHOWN:
                self._late[number] = str(error)

    async def _step(self, state: PartitionState, layout: Layout, lost: frozenset[str]) -> bool:
        """Returns whether the partition is one step further. Raises StoragedError where it can't be now."""
        if is_settled(state, layout):
            return False  # another mover was first
        record = next_step(state, layout, lost=lost) if state.coming else self._begin(state, layout)
        if record is None and state.coming:
            whole = await self._bring_up(state)
            record = next_step(state, layout, whole=whole, lost=lost)
        if record is None:
            raise ServiceUnavailable(_why_not(state, layout))
        if record.coming and not state.coming:
            if self._may_begin <= 0 or not self._within_pace():
                return False  # its turn comes
            self._may_begin -= 1
        made = await self._take(state, record)
        self._may_begin += made and not record.coming
        return made

    def _within_pace(self) -> bool:
        """Whether one more exchange may begin now; counts it. False once the job is paused."""
        settings = self._ports.settings()
        if settings.partitions_paused:
            return False
        if not settings.partitions_per_min:
            return True
        now = self._ports.clock.monotonic()
        begins_at = max(self._begins_at, now - BURST_S)
        if begins_at > now:
            return False
        self._begins_at = begins_at + 60.0 * max(1, self._ports.gateways()) / settings.partitions_per_min
        return True

    def _begin(self, state: PartitionState, layout: Layout) -> PartitionRecord | None:
        """The next exchange. Raises LayoutRefused where only disks could come that lie outside of the countries of a
        bucket.
        """
        allowed = self._allowed.get(state.partition)
        wanted = layout.replicas_of(state.partition)
        outside = {disk for disk in wanted if allowed is not None and layout.country_of(disk) not in allowed}
        short = self._short.keys() - outside if self._is_spared(state) else frozenset[str]()
        record = next_step(state, layout, lost={*self._away_since, *outside, *short})
        if record is None and short and next_step(state, layout, lost={*self._away_since, *outside}) is not None:
            disk = next(disk for disk in wanted if disk in short and disk not in state.present)
            raise ServiceUnavailable(
                f"disk {disk} lacks {format_size(self._short[disk])} for what would come to it from disks that are out"
            )
        if record is None and allowed is not None and next_step(state, layout, lost=self._away_since) is not None:
            disk = next(disk for disk in wanted if disk in outside and disk not in state.present)
            raise LayoutRefused(
                f"keys of a bucket that may lie in {', '.join(sorted(allowed)) or 'no common country'} only would move"
                f" to disk {disk} in {layout.country_of(disk)}; they stay where they are"
            )
        return record

    def _is_spared(self, state: PartitionState) -> bool:
        """Whether it has a replica on a disk that is out."""
        return not self._ports.layouts.partitions.out.disks.isdisjoint(state.present)

    async def _take(self, state: PartitionState, record: PartitionRecord) -> bool:
        """Writes the record of the next step. False when another mover was first."""
        check_step(state, record, self._ports.layouts.current)
        signed = self._ports.sign(record)
        body, proposed = encode(signed), False

        def update(value: Value | None) -> Change | None:
            nonlocal proposed
            proposed = _step_in(value) == state.step
            return Change(body) if proposed else None

        path = path_of(state.partition)
        outcome = await self._ports.registers.change(system_name(path), update)
        made = outcome.after is not None and outcome.after.body == body
        if made and proposed:  # a quorum has just accepted what this gateway has signed: nothing is left to be read
            self._ports.layouts.partitions.learn(signed)
        else:
            await self._ports.refresh(state.partition)
        return made

    # --- bringing up --------------------------------------------------------------------------------------------------

    async def _bring_up(self, state: PartitionState) -> bool:
        """Whether the partition is whole. Raises ServiceUnavailable where a majority is missing."""
        moves = self._ports.moves
        fenced = await moves.fence(state)
        if state.comes not in fenced:
            raise ServiceUnavailable(f"disk {state.comes}, which comes to it, does not answer")
        closed = await moves.copy_fences(state, fenced)
        for table, scope, shard in await moves.ranges(state, fenced):
            if scope in closed.surely:
                continue
            wanted = PageQuery(table, scope, (shard,), hidden=True, settling_nonce=closed.perhaps.get(scope, b""))
            if not await self._bring_up_range(state, fenced, wanted):
                return False
        await moves.copy_floors(state, fenced)
        # Nothing has changed the state meanwhile, or the comparisons were of another one.
        return self._ports.layouts.partition(state.partition).step == state.step

    async def _bring_up_range(self, state: PartitionState, fenced: frozenset[str], wanted: PageQuery) -> bool:
        """What a disk says counts only if it refuses earlier steps. Another one may still accept a late value of
        the step before. Together with a disk that has not answered it may then be a majority of the present set.
        """
        for _ in range(COMPARISONS):
            try:
                found = await self._ports.scanner.catch_up(
                    wanted.table, wanted.scope, wanted.shards[0], settling_nonce=wanted.settling_nonce
                )
            except NoSuchBucket:
                return False  # the bucket is being deleted; when that has ended it is gone, or can be settled, or lends
            answered = fenced - found.away
            if state.comes not in answered or not Quorum(*state.voting).met(answered):
                return False
            if not found.settled:
                break
        if wanted.table in (Table.OBJECT, Table.UPLOAD):
            await self._copy_pages(state.comes, wanted)
        return True

    async def _copy_pages(self, disk: str, rows: PageQuery) -> None:
        """Gives a disk the pages that one shard's records name, but for those that no replica of either set has any
        more: a disk that comes loses nothing by them. Raises StoragedError where it can't."""
        near: dict[bytes, RegisterName] = {}
        async for row in every_row(self._ports.scanner, rows):
            name = RegisterName(rows.table, rows.scope, rows.shards[0], row.key)
            if not is_readable(row.value.body, rows.table):
                continue  # which pages it has cannot be known; repair reports it
            async for page in pages_in(self._ports.pages, name, row.value, on_unreadable=_only_lost):
                near.setdefault(page, name)
                if len(near) >= PAGES_A_CHECK:
                    await self._copy_missing(disk, near)
                    near.clear()
        if near:
            await self._copy_missing(disk, near)

    async def _copy_missing(self, disk: str, near: dict[bytes, RegisterName]) -> None:
        for page in await self._ports.pages.pages_missing(disk, list(near)):
            try:
                await self._ports.pages.copy_page(near[page], page, disk)
            except PageLost as error:
                _only_lost(error)


def _only_lost(error: DataDamaged) -> None:
    """Goes on without a page that is lost. Raises the error of one that may be at a replica which did not answer: the
    majority that has it must not become smaller."""
    if not isinstance(error, PageLost):
        raise error
    log.warning("a partition moves without a page that is lost", reason=error.message)


def _why_not(state: PartitionState, layout: Layout) -> str:
    if state.coming:
        return (
            f"disk {state.comes} does not have everything yet: it or a majority of the replicas did not answer, or one"
            " of its buckets is being deleted"
        )
    coming = [disk for disk in layout.replicas_of(state.partition) if disk not in state.present]
    return f"it waits until disk {' or '.join(coming)} takes writes"


def _step_in(value: Value | None) -> int:
    """The step of a record; 0 for a partition that never moved. Raises LayoutRefused for what is no record."""
    if value is None or not value.body:
        return 0
    try:
        return decode(value.body, PartitionRecord).step
    except MsgspecError as error:
        raise LayoutRefused(f"The record of a partition does not decode: {error}") from None
