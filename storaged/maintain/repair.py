"""Repair: walks what this node looks after, counts what is below target, and mends it, the most endangered first.

A full walk happens at the start, whenever a disk comes or goes, and every so often. Between walks, hints name single
registers: a read
that found damage, a write that had to leave disks out, a scrub. What can't be mended with the disks that answer waits
for them; when disks have been away for
long, blocks without a spare are recoded for those that are there, and blocks that other disks can hold as they should
be are moved to them.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterable

from storaged.errors import StoragedError
from storaged.fragments.ports import FragmentId
from storaged.ids import UPLOAD_ID_BYTES
from storaged.maintain.context import MaintainContext, wait_for
from storaged.maintain.health import BlockHealth, BlockPlace, Finding
from storaged.maintain.job import Job
from storaged.maintain.leftovers import Leavings
from storaged.maintain.rebuild import CannotMend, Mender, Move
from storaged.maintain.relocate import commit_moves
from storaged.maintain.repair_queue import PREFIX_BYTES, Findings
from storaged.maintain.walk import Range, Walker, entries_of, upload_rows
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.ports import RowDamaged
from storaged.objects.code.place import Placement
from storaged.wire import Message

BLOCKS_A_SLICE = 64
"""Blocks of one run that are looked at, and recoded, together: what is in memory of a large object, and what is done
anew after an interruption.
"""

BLOCKS_A_SWAP = 512
"""Blocks recoded before the record is changed: a change of a record with many parts writes its manifest anew."""

NO_RECODING_S = -1.0
"""Of ``Waits.recode_in_s``: nothing will be recoded."""


class Waits(Message, frozen=True):
    """Why repair mends nothing more now. ``disks_away``: take no new fragments. ``recode_in_s``: seconds until blocks
    are
    recoded for the other disks, NO_RECODING_S when that would not help. ``recode_delay_s``: the setting behind it."""

    disks_away: tuple[str, ...] = ()
    recode_in_s: float = NO_RECODING_S
    recode_delay_s: float = 0.0


BELIEVE_S_MAX = 60.0
"""Records that were not believed are looked at again soon, then after a pause that doubles up to this."""

REFUSALS = (CannotMend, StoragedError, RowDamaged, TimeoutError)


class Repair:
    """Owns the findings of this node. ``run`` is its task; ``hint``, ``suspect`` and ``wake`` may be called at any
    time.
    """

    def __init__(self, context: MaintainContext, scanner: RingScanner) -> None:
        self._context = context
        self.walker = Walker(context, scanner)
        self.mender = Mender(context)
        self.findings = Findings(context.limits)
        self.leavings = Leavings(context, self.walker)
        self.walk_job = Job("check", context.clock)
        self.job = Job("repair", context.clock)
        self._hints: dict[bytes, None] = {}
        self._suspects: dict[tuple[bytes, FragmentId], None] = {}
        self._wake = asyncio.Event()
        self._wanted, self._walked = 1, 0
        """Numbers of the walk that is wanted and of the last one that was whole: it began after it was wanted, and
        everybody answered.
        """
        self._walk_at = self._mend_at = -1e18
        self._walk_pause_s = 0.0
        self._believe_at, self._believe_pause_s = -1e18, 0.0
        self._mended = False
        """Something was mended since the last walk."""
        self._away_since: dict[str, float] = {}

    # --- what others see and say ------------------------------------------------------------------------------------

    @property
    def counted(self) -> bool:
        """The findings come from a whole walk that began after the last reason for one."""
        return self._walked == self._wanted

    @property
    def busy(self) -> bool:
        """Something is being done, or waits to be done, that changes the findings. What repair has failed at several
        times does not count.
        """
        running = "running" in (self.walk_job.state, self.job.state)
        return running or not self.counted or bool(self._hints or self._suspects) or self.findings.hopeful()

    def hint(self, name: bytes) -> None:
        """This register (packed name) should be looked at soon. Beyond the bound, a walk finds it."""
        if len(self._hints) < self._context.limits.hints_max:
            self._hints[name] = None
            self._wake.set()
        else:
            self.wake()

    def suspect(self, owner: bytes, fragment: FragmentId) -> None:
        """A fragment of this register's data was not what was sealed, although its checksums hold: the block's
        fragments are compared with each other.
        """
        if len(self._suspects) < self._context.limits.hints_max:
            self._suspects[owner, fragment] = None
            self._wake.set()

    def wake(self) -> None:
        """A full walk should begin."""
        self._wanted += 1
        self._walk_at = -1e18
        self._wake.set()

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever. A round that fails (no majority, say) is logged and tried again."""
        while True:
            await self.round()
            limits = self._context.limits
            eager = (
                not self.counted or self._hints or self._suspects or self._mend_at <= self._context.clock.monotonic()
            )
            await wait_for(self._wake, limits.poll_s if eager else limits.retry_s)

    async def round(self) -> None:
        """One turn of everything that is due."""
        self._note_away()
        try:
            now = self._context.clock.monotonic()
            if now >= self._walk_at and (
                not self.counted or now - self.walk_job.started >= self._context.limits.walk_interval_s
            ):
                await self._walk()
            await self._believe_again()
            await self._look_at_suspects()
            await self._look_at_hints()
            await self._mend_most_urgent()
            await self.leavings.drop_due()
        except (StoragedError, RowDamaged, TimeoutError) as error:
            self._context.log(f"repair: {type(error).__name__}: {error}; trying again")

    async def _believe_again(self) -> None:
        """Buckets whose records were not believed may be by now: a gateway has signed them. Then everything is looked
        at anew.
        """
        now, buckets = self._context.clock.monotonic(), self.walker.buckets
        if not buckets.refused:
            self._believe_pause_s = 0.0
            return
        if now < self._believe_at:
            return
        self._believe_pause_s = min(max(2 * self._believe_pause_s, self._context.limits.poll_s), BELIEVE_S_MAX)
        self._believe_at = now + self._believe_pause_s
        before = set(buckets.refused)
        await buckets.refresh(self._context)
        if before - set(buckets.refused):
            self.wake()

    async def _walk(self) -> None:
        """Judges everything this node looks after. A range that can't be brought to one state, or asked about, makes
        the walk less than whole: it is begun
        again after a pause that doubles. Hints are subsumed."""
        wanted, unanswered, settled = self._wanted, self.walker.unanswered, self.walker.settled
        self._hints.clear()
        self._mend_at, self._mended = -1e18, False
        self.walk_job.start()
        failures: list[str] = []
        try:
            try:
                await self.walker.buckets.refresh(self._context)
            except StoragedError as error:  # what is known of the directory has to do
                failures.append(str(error))
            ranges = self.walker.led_ranges()
            self.walk_job.start(len(ranges))
            for where in ranges:
                try:
                    if not await self.walker.bring_together(where):
                        failures.append("a replica did not answer")
                except StoragedError as error:
                    failures.append(str(error))
                if where.table != Table.SYSTEM and self.walker.buckets.is_trusted(where.scope):
                    try:
                        self.findings.replace(where.prefix, await self._judged_range(where))
                    except (StoragedError, RowDamaged, TimeoutError) as error:
                        # A page of the local store, or what leads to its rows: the other ranges are looked at all the
                        # same.
                        failures.append(str(error))
                self.walk_job.advance()
            self.findings.keep_only(where.prefix for where in ranges if self.walker.buckets.is_trusted(where.scope))
        except (StoragedError, RowDamaged, TimeoutError) as error:
            failures.append(str(error))
        if self.walker.unanswered != unanswered:
            failures.append("a disk did not answer")
        if not failures:
            self._walked, self._walk_pause_s, self._walk_at = wanted, 0.0, -1e18
            self.walk_job.finish("done", f"{self.walker.settled - settled} registers settled")
            return
        self._walk_pause_s = min(
            max(2 * self._walk_pause_s, 2 * self._context.limits.poll_s), self._context.limits.walk_retry_max_s
        )
        if wanted == self._wanted:
            self._walk_again_in(self._walk_pause_s)
        self.walk_job.finish("failed", failures[0])
        self._context.log(
            f"check of all objects: {len(failures)} failures, the first: {failures[0]}; again in"
            f" {self._walk_pause_s:.0f} s"
        )

    def _walk_again_in(self, pause_s: float) -> None:
        """The findings are not known to be the whole truth, but there is no use in hurrying."""
        self._walk_at = self._context.clock.monotonic() + pause_s
        if self.counted:
            self._wanted += 1

    async def _judged_range(self, where: Range) -> list[Finding]:
        return [finding async for rows in self.walker.rows(where) for finding in await self.walker.judge_rows(rows)]

    # --- hints ------------------------------------------------------------------------------------------------------

    async def _look_at_hints(self) -> None:
        """Some of them, several at a time."""
        hints = list(self._hints)[: self._context.limits.hints_a_round]
        for packed in hints:
            del self._hints[packed]
        names = [name for name in map(RegisterName.unpack, hints) if self._context.leads(name.partition)]
        if any(name.table != Table.SYSTEM and name.scope not in self.walker.buckets.by_id for name in names):
            await self.walker.buckets.refresh(self._context)
        queue = iter(names)

        async def worker() -> None:
            for name in queue:
                try:
                    await self._look_at(name)
                except REFUSALS as error:
                    self._context.log(f"a hint about {name.key[:80]!r} is left to the next check: {error}")
                    if self.counted:
                        self._walk_again_in(self._context.limits.walk_retry_max_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._context.limits.hints_at_once, len(names))):
                group.create_task(worker())

    async def _look_at(self, name: RegisterName) -> None:
        """Brings the register's replicas together, and judges what it refers to; when that is well, the parts of open
        uploads for its key.
        """
        if name.table == Table.SYSTEM:
            return  # gateways look after those
        states = {replica.state for replica in await self._context.registers.agreement(name)}
        if states & {"behind", "damaged"} or {"current", "empty"} <= states:
            await self._context.registers.settle(name)
            self.walker.settled += 1
        await self._judge(name, (await self._context.registers.read(name)).value)
        if name.table == Table.OBJECT and not self.findings.has(name.pack()):
            async for row, value in upload_rows(self._context, name):
                await self._judge(row, value)

    async def _judge(self, name: RegisterName, value: Value | None) -> None:
        counted = (
            value is not None and self.walker.buckets.is_trusted(name.scope) and await self.walker.is_counted(name)
        )
        found = await self.walker.judge_rows([(name, value)]) if value is not None and counted else []
        self.findings.file(name.pack(), found[0] if found else None)
        if found:
            self._mend_at = -1e18

    async def _look_at_suspects(self) -> None:
        suspects, self._suspects = self._suspects, {}
        for owner, fragment in suspects:
            name = RegisterName.unpack(owner)
            try:
                await self._verify(name, fragment)
            except (*REFUSALS, KeyError, ValueError) as error:
                self._context.log(f"block {fragment.block} of {name.key[:80]!r} could not be verified: {error}")

    async def _verify(self, name: RegisterName, fragment: FragmentId) -> None:
        value = (await self._context.registers.read(name)).value
        rows = [(name, value)] if value is not None else []
        rows += [row async for row in upload_rows(self._context, name)] if name.table == Table.OBJECT else []
        for row, held in rows:
            async for entry in entries_of(self._context, row, held):
                if entry.data_id == fragment.data_id:
                    places = [place for place in self.walker.places(row, entry) if place.block == fragment.block]
                    for health in await self.walker.health(places):
                        wrong = await self.mender.verify_block(health)
                        self._context.log(
                            f"block {fragment.block} of {row.key[:80]!r}: {wrong} fragments were not what the others"
                            " say, rebuilt"
                        )

    # --- mending ----------------------------------------------------------------------------------------------------

    async def _mend_most_urgent(self) -> None:
        """Mends some of what can be mended, the fewest spare fragments first. When nothing is left to try, rests for a
        while.
        """
        now, limits = self._context.clock.monotonic(), self._context.limits
        if now < self._mend_at:
            return
        await self._forget_finished_parts()
        overdue = any(now - since >= limits.recode_delay_s for since in self._away_since.values())
        work = list(self.findings.workable(now, overdue))
        if not work:
            self._mend_at = now + limits.retry_s
            if self._mended and self.findings.overflowed:
                self.wake()  # what did not fit is found again
            if self.job.state == "running":
                self.job.finish()
            return
        if self.job.state != "running":
            self.job.start()
        self.job.total = self.job.done + len(work)
        failures: list[str] = []
        for finding in heapq.nsmallest(limits.mend_batch, work, key=lambda finding: (finding.spare, finding.name)):
            before = self.mender.bytes_rebuilt
            try:
                await self._mend(RegisterName.unpack(finding.name))
            except (*REFUSALS, KeyError, ValueError) as error:
                failures.append(f"{finding.name[18:98]!r}: {error}")
            if self.findings.has(finding.name):
                self.findings.rest(finding.name, self._context.clock.monotonic())
            else:
                self._mended = True
            self.job.advance(1, self.mender.bytes_rebuilt - before)
            if self._wanted != self._walked and self._context.clock.monotonic() >= self._walk_at:
                break  # the disks have changed: what is urgent now may be something else
        if failures:
            self._context.log(f"repair of {len(failures)} registers failed, the first: {failures[0]}")

    async def _forget_finished_parts(self) -> None:
        """Parts of uploads that ended since they were found wanting: they are in an object now, or garbage."""
        for names in self.findings.of_table(Table.PART):
            where = RegisterName.unpack(names[0])
            uploads = await self.walker.open_uploads_of(where.scope, where.shard)
            for name in names:
                if name[PREFIX_BYTES:][:UPLOAD_ID_BYTES] not in uploads:
                    self.findings.file(name, None)

    async def _mend(self, name: RegisterName) -> None:
        """Rebuilds, recodes or moves what can be, then judges anew. Everything is tried; then the first failure is
        raised.
        """
        try:
            self.walker.buckets.countries_of(name.scope)
        except KeyError:  # the bucket is gone, or its record is not believed: nothing is touched
            self.findings.file(name.pack(), None)
            raise
        failure: Exception | None = None
        moves: list[Move] = []
        try:
            value = (await self._context.registers.read(name)).value
            try:
                await self.walker.pages.mend(name, value)
            except REFUSALS as error:
                failure = error
            if not await self.walker.is_counted(name):
                return
            async for slice_ in self._slices(name, value):
                try:
                    move = await self._mend_slice(name, slice_)
                except REFUSALS as error:
                    failure = failure or error
                    continue
                if move is not None:
                    moves.append(move)
                if sum(move.new.count for move in moves) >= BLOCKS_A_SWAP:
                    await self._say(name, moves)
                    moves = []
            await self._say(name, moves)
        finally:
            await self._judge(name, (await self._context.registers.read(name)).value)
        if failure is not None:
            raise failure

    async def _slices(self, name: RegisterName, value: Value | None) -> AsyncIterator[list[BlockHealth]]:
        """Consecutive blocks of one run each, as they are."""
        async for entry in entries_of(self._context, name, value):
            some: list[BlockPlace] = []
            for place in self.walker.places(name, entry):
                if some and (len(some) == BLOCKS_A_SLICE or place.run != some[0].run):
                    yield await self.walker.health(some)
                    some = []
                some.append(place)
            if some:
                yield await self.walker.health(some)

    async def _mend_slice(self, name: RegisterName, blocks: list[BlockHealth]) -> Move | None:
        placement = self._better_placement(name, blocks)
        if placement is not None:
            return await self.mender.recode(blocks, placement, self._context.layouts.current.epoch)
        await self.mender.rebuild_missing(block for block in blocks if block.missing and block.readable)
        return None

    def _better_placement(self, name: RegisterName, blocks: list[BlockHealth]) -> Placement | None:
        """Where blocks should go instead of where they are: to their target when it can be held again, or held without
        the disks that have been away for long; to
        what the living disks can hold when blocks have had no spare left for long. None: they stay, and what is missing
        is rebuilt in place."""
        entry = blocks[0].place.entry
        if entry.small or not all(block.readable for block in blocks):
            return None
        countries = self.walker.buckets.countries_of(name.scope)
        away = any(block.away for block in blocks)
        if not blocks[0].on_target or (away and self._away_long_enough(blocks)):
            placement = self.walker.target_placement(entry, countries)
            if placement is not None:
                return placement
        if away and any(block.spare == 0 for block in blocks) and self._away_long_enough(blocks):
            return self.walker.placement(entry, blocks[0].place.profile, countries)
        return None

    async def _say(self, name: RegisterName, moves: list[Move]) -> None:
        if not moves:
            return
        await commit_moves(self._context, name, moves)
        if (
            name.table == Table.OBJECT
        ):  # a part's row may be copied into the object just now: what it left is swept later
            for move in moves:
                self.leavings.add(name, move)

    def waits(self) -> Waits:
        """What keeps repair from mending more now: disks that are away, and when blocks are recoded without them."""
        now, delay_s = self._context.clock.monotonic(), self._context.limits.recode_delay_s
        later = [delay_s - (now - since) for since in self._away_since.values()]
        pending = [left for left in later if left > 0]
        recode_in_s = min(pending) if pending and self.findings.movable_later() else NO_RECODING_S
        return Waits(tuple(sorted(self._away_since)), recode_in_s, delay_s)

    # --- disks that are away ----------------------------------------------------------------------------------------

    def _note_away(self) -> None:
        """Since when each disk takes no new fragments."""
        now = self._context.clock.monotonic()
        _, writable = self._context.usable_disks()
        self._away_since = {
            disk: self._away_since.get(disk, now)
            for disk in self._context.layouts.current.disk_by_id
            if disk not in writable
        }

    def _away_long_enough(self, blocks: Iterable[BlockHealth]) -> bool:
        """A disk that no layout names any more is away for good."""
        now, known = self._context.clock.monotonic(), self._context.layouts.current.disk_by_id
        disks = {block.place.disks[position] for block in blocks for position in block.away}
        delay_s = self._context.limits.recode_delay_s
        return all(disk not in known or now - self._away_since.get(disk, now) >= delay_s for disk in disks)
