"""The check: when registers are looked at, so that the repair queue has what is below target.

A full walk happens at the start, whenever a disk comes or goes, and from time to time. Between walks hints name single
registers: a read that found damage, a write that had to leave out disks, a scrub. A walk that was not complete, because
a disk or a majority did not answer, is begun again after a pause that doubles.

A disk that comes and goes all the time asks for a walk each time. After a rest two walks may follow each other; then
the next one waits as long as the last one took, so that repair has half of the time.

A finding says what the disks were when it was judged (``health.Finding``). They may have been in that state only for a
moment: a node missed some heartbeats, a call broke off, a disk was left out because it was slow. No walk begins for
that. So findings that repair does not try are judged again when the disks are not as they were then (``_look_again``).
"""

from __future__ import annotations

import asyncio

from storaged.cluster.layout import PARTITIONS
from storaged.disk_room import ROW_BYTES
from storaged.errors import StoragedError
from storaged.maintain.asks import NAMES_A_SETTLE, EndedLoans, EndLoans
from storaged.maintain.catch_up import CatchUp
from storaged.maintain.context import MaintainContext, concurrently
from storaged.maintain.health import Finding
from storaged.maintain.job import Job
from storaged.maintain.rebuild import CannotRepair
from storaged.maintain.repair_queue import RepairQueue
from storaged.maintain.spare_room import UNKNOWN_BYTES
from storaged.maintain.walk import Range, Walker, upload_rows
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.store_ports import RowDamaged

VERIFY_PAUSE_S_MAX = 60.0
"""Records of buckets that were not verified are looked at again soon, then after a pause that doubles up to this."""

RESTED_WALKS = 2
"""A walk has rested enough if it began this many times its own length after the last one: the next may follow at once.
"""

GIVE_WAY_S = 2.0
GIVE_WAY_S_MAX = 300.0
"""A walk rests while other nodes bring up rows with the help of this one: until they have not asked for GIVE_WAY_S. In
all it rests no longer than the second.
"""

LONG_LOOK_S = 0.2
"""A look at a register that takes longer is one at very many versions or parts."""
LOOKS_REST = 10
LOOKS_REST_S_MAX = 60.0
"""Hints about such a register wait this many times as long as the last look took, and no longer than the second: a key
that is written all the time may be hinted at with each write.
"""

REFUSALS = (CannotRepair, StoragedError, RowDamaged, TimeoutError)
"""Why a register can't be looked at or repaired now."""

NOW = -1e18


class Check:
    """Fills ``queue``. ``round`` does what is due; ``hint`` and ``request_walk`` may be called at any time and set
    ``wake``.
    """

    def __init__(self, context: MaintainContext, scanner: RingScanner) -> None:
        self._context = context
        self.walker = Walker(context, scanner)
        self.catch_up = CatchUp(context, self.walker)
        self.queue = RepairQueue(context.limits)
        self.job = Job("check", context.clock)
        self.judged = 0
        """Objects and parts with fragments that the last complete walk judged."""
        self.partition_bytes = UNKNOWN_BYTES
        """What one replica of a partition takes, about, by the last complete walk."""
        self._row_bytes = 0
        self.wake = asyncio.Event()
        self._hints: dict[bytes, None] = {}
        self._rests: dict[bytes, float] = {}
        """Until when hints about a register (packed name) wait: of those that were long to look at."""
        self._wanted, self._walked = 1, 0
        """Numbers of the walk that is wanted, and of the last complete one: it began after it was wanted, and every
        disk and every majority answered.
        """
        self._walk_at = self._rested_at = NOW
        """When the next walk may begin: for what the last one has failed in, and for how long it took."""
        self._walk_pause_s = 0.0
        self._gave_way_s = 0.0
        """How long this walk rested for others."""
        self._loans_wait = False
        """No gateway answered when this walk asked about loans."""
        self._verify_at, self._verify_pause_s = NOW, 0.0
        self._again_at, self._again_pause_s = NOW, 0.0

    # --- requests and state -------------------------------------------------------------------------------------------

    def hint(self, name: bytes) -> None:
        """This register (packed name) should be looked at soon. Beyond the bound a walk finds it. No-op while the hint
        before it waits.
        """
        if name in self._hints:
            return
        if len(self._hints) < self._context.limits.hints_max:
            self._hints[name] = None
            self.wake.set()
        else:
            self.request_walk()

    def request_walk(self) -> None:
        """A full walk should begin as soon as one may."""
        self._wanted += 1
        self._walk_at = NOW
        self.wake.set()

    @property
    def current(self) -> bool:
        """The queue comes from a complete walk that began after the last reason for one."""
        return self._walked == self._wanted

    @property
    def has_hints(self) -> bool:
        return bool(self._hints)

    @property
    def looks_again(self) -> bool:
        """Something is being judged again, since the disks are not as they were."""
        return self._again_pause_s > 0

    @property
    def busy(self) -> bool:
        """Whether work that changes the queue is being done, or waits to be done. Registers that are judged again and
        again in vain do not count.
        """
        again = self.looks_again and self._again_pause_s < self._context.limits.walk_retry_max_s
        return self.job.state == "running" or not self.current or self.has_hints or again

    @property
    def walk_due(self) -> bool:
        """A walk is wanted, and may begin."""
        return not self.current and self._may_walk()

    def _may_walk(self) -> bool:
        return self._context.clock.monotonic() >= max(self._walk_at, self._rested_at)

    async def round(self) -> None:
        """Everything that is due. Raises StoragedError, RowDamaged, TimeoutError."""
        now = self._context.clock.monotonic()
        overdue = now - self.job.started >= self._context.limits.walk_interval_s
        if self._may_walk() and (not self.current or overdue):
            rested_s = now - self.job.ended
            await self._walk()
            ended = self._context.clock.monotonic()
            took_s = ended - now
            self._rested_at = ended + took_s if rested_s < RESTED_WALKS * took_s else NOW
        await self._verify_buckets_again()
        await self._look_at_hints()
        await self._look_again()

    # --- walks --------------------------------------------------------------------------------------------------------

    async def _walk(self) -> None:
        """Judges everything that this node is responsible for. The walk is not complete when a range can't be settled,
        or a disk does not answer about it. Hints are dropped: the walk looks at their registers too.
        """
        wanted, unanswered, settled = self._wanted, self.walker.unanswered, self.walker.settled
        judged, self._row_bytes, self._gave_way_s = self.walker.judged, 0, 0.0
        self._hints.clear()
        self.queue.begin_walk()
        self.job.start()
        failures: list[str] = []
        self._loans_wait = False
        try:
            await self._walk_ranges(failures)
        except (StoragedError, RowDamaged, TimeoutError) as error:
            failures.append(str(error))
        if self.walker.unanswered != unanswered:
            failures.append("a disk did not answer")
        self._loans_wait = False
        await self._end_loans()
        if not failures:
            self._walked, self._walk_pause_s, self._walk_at = wanted, 0.0, NOW
            self.judged, self.partition_bytes = self.walker.judged - judged, self._bytes_of_partition()
            self.job.finish("done", f"{self.walker.settled - settled} registers settled")
            self._note_judged()
            return
        limits = self._context.limits
        self._walk_pause_s = min(max(2 * self._walk_pause_s, 2 * limits.poll_s), limits.walk_retry_max_s)
        if wanted == self._wanted:
            self._walk_again_in(self._walk_pause_s)
        self.job.finish("failed", failures[0])
        self._context.log(
            f"check of all objects: {len(failures)} failures, the first: {failures[0]}; again in"
            f" {self._walk_pause_s:.0f} s"
        )

    def _bytes_of_partition(self) -> int:
        """Of the partitions that this node leads: their rows, and small copies where a disk is away."""
        context = self._context
        led = [number for number in range(PARTITIONS) if context.leads(number)]
        disks = (disk for number in led for disk in context.layouts.partition(number).present)
        away = sum(not context.liveness.disk_readable(disk) for disk in disks)
        if not led:
            return UNKNOWN_BYTES
        return self._row_bytes // len(led) + (self.queue.copy_bytes // away if away else 0)

    async def _end_loans(self) -> None:
        """Asks gateways to look at the loans that the walk has found. The next walk asks again for those that they
        can't look at now. When no gateway answers, the rest of this walk does not wait for that again.
        """
        if self._loans_wait:
            return
        owners, self.walker.owners = list(self.walker.owners), set()
        for start in range(0, len(owners), NAMES_A_SETTLE):
            names = tuple(owners[start : start + NAMES_A_SETTLE])
            try:
                await self._context.asks.ask("loans", EndLoans(names), EndedLoans)
            except (StoragedError, TimeoutError) as error:
                self._context.log(f"loans of {len(owners) - start} objects are looked at later: {error}")
                self._loans_wait = True
                return

    async def _walk_ranges(self, failures: list[str]) -> None:
        buckets = self.walker.buckets
        try:
            await buckets.refresh(self._context)
        except StoragedError as error:  # the directory as it was read last has to do
            failures.append(str(error))
        ranges = self.walker.led_ranges()
        self.job.start(len(ranges))
        for where in ranges:
            await self._give_way()
            try:
                if not await self.walker.settle_range(where):
                    failures.append("a replica did not answer")
            except StoragedError as error:
                failures.append(str(error))
            if where.table != Table.SYSTEM and buckets.is_verified(where.scope):
                try:
                    self.queue.replace(where.prefix, await self._judge_range(where))
                except (StoragedError, RowDamaged, TimeoutError) as error:
                    # One page of the local store is damaged: the other ranges are looked at all the same.
                    failures.append(str(error))
            self.job.advance()
        self.queue.keep_only(where.prefix for where in ranges if buckets.is_verified(where.scope))

    async def _judge_range(self, where: Range) -> list[Finding]:
        found: list[Finding] = []
        async for rows in self.walker.rows(where):
            await self._give_way()
            self._row_bytes += sum(ROW_BYTES + len(name.key) + len(value.body) for name, value in rows)
            found += await self.walker.judge_rows(rows)
            if len(self.walker.owners) >= NAMES_A_SETTLE:
                await self._end_loans()
        return found

    async def _give_way(self) -> None:
        """Rows that disks missed come first: those that this node brings up, and those that others do."""
        await self.catch_up.ended()
        time = asyncio.get_running_loop().time
        while (left_s := self._context.compared_at() + GIVE_WAY_S - time()) > 0 and self._gave_way_s < GIVE_WAY_S_MAX:
            await asyncio.sleep(left_s)
            self._gave_way_s += left_s
            await self.catch_up.ended()

    def _walk_again_in(self, pause_s: float) -> None:
        """The queue may not have everything, but there is no use in hurrying."""
        self._walk_at = self._context.clock.monotonic() + pause_s
        if self.current:
            self._wanted += 1

    async def _verify_buckets_again(self) -> None:
        """Records of buckets that could not be verified may be by now, when a gateway has signed them. Then everything
        is looked at again.
        """
        now, buckets = self._context.clock.monotonic(), self.walker.buckets
        if not buckets.refused:
            self._verify_pause_s = 0.0
            return
        if now < self._verify_at:
            return
        self._verify_pause_s = min(max(2 * self._verify_pause_s, self._context.limits.poll_s), VERIFY_PAUSE_S_MAX)
        self._verify_at = now + self._verify_pause_s
        before = set(buckets.refused)
        await buckets.refresh(self._context)
        if before - set(buckets.refused):
            self.request_walk()

    # --- single registers ---------------------------------------------------------------------------------------------

    async def _look_at_hints(self) -> None:
        """Some of them, several at a time."""
        now = self._context.clock.monotonic()
        self._rests = {packed: until for packed, until in self._rests.items() if until > now}
        hints = [packed for packed in self._hints if packed not in self._rests][: self._context.limits.hints_a_round]
        for packed in hints:
            del self._hints[packed]
        names = [name for name in map(RegisterName.unpack, hints) if self._context.leads(name.partition)]
        if any(name.table != Table.SYSTEM and name.scope not in self.walker.buckets.by_id for name in names):
            try:
                await self.walker.buckets.refresh(self._context)
            except StoragedError as error:  # nothing can be judged without the bucket's record
                self._leave_to_walk(f"hints about buckets that are not known here: {error}")
        await concurrently(map(self._look_at_hint, names), min(self._context.limits.hints_concurrent_max, len(names)))

    async def _look_at_hint(self, name: RegisterName) -> None:
        began = self._context.clock.monotonic()
        try:
            await self._look_at(name)
        except REFUSALS as error:
            self._leave_to_walk(f"a hint about {name.key[:80]!r}: {error}")
            return
        ended = self._context.clock.monotonic()
        if ended - began >= LONG_LOOK_S:
            self._rests[name.pack()] = ended + min(LOOKS_REST * (ended - began), LOOKS_REST_S_MAX)

    def _leave_to_walk(self, what: str) -> None:
        self._context.log(f"left to the next check: {what}")
        if self.current:
            self._walk_again_in(self._context.limits.walk_retry_max_s)

    async def _look_again(self) -> None:
        """Judges registers again that were judged while other disks could be used than now, some at a time. The pause
        between two rounds doubles while they are in vain. Registers that were judged in vain come last then: a disk
        that never answers must not delay the registers of other disks.
        """
        clock, limits = self._context.clock, self._context.limits
        now, disks_now = clock.monotonic(), self.walker.placements.disks_now
        if (not self.current and now >= self._rested_at) or now < self._again_at:
            return  # a walk judges all of it; one that has to wait for the length of another is too late
        left = self.queue.take_changed(disks_now(), now, limits.hints_a_round)
        if not left:
            self._again_at, self._again_pause_s = now + limits.retry_s, 0.0
            return
        unanswered, looked = self.walker.unanswered, list[bytes]()
        try:
            while left and self.walker.unanswered == unanswered:
                some = left[: limits.hints_concurrent_max]
                await concurrently((self._look_at_hint(RegisterName.unpack(name)) for name in some), len(some))
                looked += some
                left = left[len(some) :]
        finally:
            in_vain = self.queue.judged_again(looked, left, disks_now(), clock.monotonic())
        in_vain = in_vain or self.walker.unanswered != unanswered
        pause_s = min(2 * self._again_pause_s, limits.walk_retry_max_s) if in_vain else 0.0
        self._again_pause_s = max(pause_s, limits.poll_s)
        self._again_at = clock.monotonic() + self._again_pause_s

    def _note_judged(self) -> None:
        """Has the findings of now judged again: their disks may have been in that state only for a moment."""
        if not self.looks_again:
            self._again_at = NOW

    async def _look_at(self, name: RegisterName) -> None:
        """Brings the register's replicas to one state and judges what it refers to. When that is on target, judges the
        parts of open uploads for its key too.
        """
        if name.table == Table.SYSTEM:
            return  # gateways are responsible for those
        states = {replica.state for replica in await self._context.registers.agreement(name)}
        if states & {"behind", "damaged"} or {"current", "empty"} <= states:
            await self.walker.bring_up(name)
            self.walker.settled += 1
        await self.judge(name, (await self._context.registers.read(name)).value)
        if name.table == Table.OBJECT and not self.queue.has(name.pack()):
            async for row, value in upload_rows(self._context, name):
                await self.judge(row, value)

    async def judge(self, name: RegisterName, value: Value | None) -> None:
        """Puts the register's finding into the queue, or takes it off when there is none. Raises StoragedError,
        RowDamaged when it can't be judged now; then the queue stays as it is.
        """
        found: list[Finding] = []
        if value is not None and self.walker.buckets.is_verified(name.scope) and await self.walker.is_needed(name):
            found = await self.walker.judge_rows([(name, value)], whole=True)
        self.queue.set(name.pack(), found[0] if found else None)
        if found:
            self.queue.fresh = True
            if found[0].may_have_changed(self.walker.placements.disks_now()):
                self._note_judged()
