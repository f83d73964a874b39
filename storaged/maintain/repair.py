"""Repair: brings what is below target back to its target, the most endangered first.

How repair decides, in the order of this file:

1. The check (``check``) asks the disks that a record names for each fragment. A fragment is OK, MISSING (its disk
   answers and does not have it undamaged) or AWAY (``health``). A block is below target when one of its fragments is
   not OK, or when it is not coded and spread as its part's target asks. A register with such a block is a finding in
   the queue.
2. ``_repair_most_urgent`` takes the finding whose worst block has the fewest spare fragments. It tries a finding when
   the disks that answer suffice to do something, or when disks have been away for longer than the delay. A
   finding whose repair failed backs off.
3. ``_repair`` reads the record again from a majority. It copies missing pages of the manifest. Then it looks at the
   blocks again, in slices of one run.
4. ``_repair_slice`` recodes a slice when ``_better_placement`` finds a better place for all of it. Else it rebuilds the
   MISSING fragments where they were. AWAY fragments wait for their disk.
5. ``_better_placement`` never moves small copies, nor a slice with a block that can't be read. Where no operator is
   trusted alone, gateways code what is kept whole (``dividing``). It chooses the target
   of the layout in force, if the disks that take writes can hold it: without delay for a slice that was not written
   with its target, or that the layout in force wants elsewhere or under another profile, after the delay for one with
   AWAY fragments, unless more failure domains are silent than the layout's policy replaces (``cluster.sparing``), or
   the other disks have no room for all of it (``spare_room``). If they can't hold the target, it chooses what they can
   hold, for a slice that has AWAY fragments, after the delay, when a block has no spare left.
6. Only gateways change records: ``relocate`` asks one to make the record name the new places, many moves at a time,
   while repair goes on. The gateway puts the old fragments on garbage lists. While no gateway answers, nothing is
   recoded (step 4 rebuilds in place, for which no record changes), and ``waits`` says so.
7. The register is judged again, and leaves the queue when it is on target.
8. What is whole, and only has to move since the layout in force wants it elsewhere, comes last. It moves within the
   pace of the job ``fragments``, and waits while that is paused (``cluster.move_settings``).

Repair does not touch a block with fewer than k readable fragments. The block is lost when that would be so even if all
disks that are away came back; ``status`` counts it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

from storaged.cluster.sparing import UNREACHABLE
from storaged.fragments.ports import FragmentId
from storaged.ids import UPLOAD_ID_BYTES
from storaged.maintain.check import NOW, REFUSALS, Check
from storaged.maintain.context import MaintainContext, concurrently, wait_for
from storaged.maintain.dividing import Divider
from storaged.maintain.health import BlockHealth, BlockPlace, Finding
from storaged.maintain.job import Job
from storaged.maintain.moves import MOVED, MOVES_A_CALL, DiscardAsk, FragmentAsk, MovesAnswer
from storaged.maintain.rebuild import CannotRepair, Move, Rebuilder
from storaged.maintain.rejudging import urgency
from storaged.maintain.relocate import Relocator
from storaged.maintain.repair_queue import PREFIX_BYTES
from storaged.maintain.spare_room import Counts
from storaged.maintain.spare_watch import SpareWatch
from storaged.maintain.walk import entries_of, upload_rows
from storaged.meta.names import RegisterName, Table, Value
from storaged.objects.code.place import Placement
from storaged.wire import Message

BLOCKS_A_SLICE = 64
"""Blocks of one run that are looked at, and recoded, together. It bounds what is in memory of a large object, and what
is repeated after an interruption.
"""
COMPARE_AGAIN_S = 600.0
"""The pause between comparisons of fragments that differ while none is known to be the false one."""

BURST_S = 20.0
"""Repair may save up the pace of this time, and spend it at once. Its rests between looks are shorter."""

NO_ROOM = "the disks that may have it have no room for what disks that are away had"
NO_RECODING_S = -1.0
"""Of ``Waits.recode_in_s``: nothing will be recoded."""


class Waits(Message, frozen=True):
    """Why repair does nothing more now. ``disks_away``: take no new fragments. ``recode_in_s``: seconds until blocks
    are recoded for the other disks, NO_RECODING_S when none will be. ``recode_delay_s``: the delay of the layout's
    policy, or the setting in its place. ``gateway``: why no gateway changes records for repair; empty while one does,
    or nothing has to be changed.
    """

    disks_away: tuple[str, ...] = ()
    recode_in_s: float = NO_RECODING_S
    recode_delay_s: float = 0.0
    gateway: str = ""


class Repair:
    """Works off the queue that ``check`` fills. ``run`` is the task of both. ``statuses()``: of all nodes."""

    def __init__(
        self, context: MaintainContext, check: Check, statuses: Callable[[], Awaitable[Sequence[Counts]]]
    ) -> None:
        self._context = context
        self.room = SpareWatch(context, statuses)
        self.check = check
        self._queue = check.queue
        self._walker = check.walker
        self._placements = check.walker.placements
        self.rebuilder = Rebuilder(context)
        self.relocator = Relocator(context, self._on_concluded)
        self._divider = Divider(context)
        self._lacks_room = False  # of the slice that was looked at last: it could go to its target, but for room
        self._concluded: dict[bytes, str] = {}
        """Registers to be judged, because no move of them waits any more; and why the last move was not made."""
        self.job = Job("repair", context.clock)
        self._mismatches: dict[tuple[bytes, FragmentId], None] = {}
        self._away_since: dict[str, float] = {}
        self._compare_again_at = NOW
        self._moves_at = NOW
        """When something that is whole may move again, by the pace."""
        self._paced_by = 0
        """The revision of the settings of moves that were seen last."""
        self._next_look_at = NOW
        """When the queue is looked at again, unless it is fresh."""

    # --- requests and state -----------------------------------------------------------------------------------------

    def hint_mismatch(self, owner: bytes, fragment: FragmentId) -> None:
        """A fragment of this register's data is not what was sealed, although its checksums hold: the block's fragments
        should be compared with each other. Bounded.
        """
        if len(self._mismatches) < self._context.limits.hints_max:
            self._mismatches[owner, fragment] = None
            self.check.wake.set()

    @property
    def busy(self) -> bool:
        """Something is being done, or waits to be done, that changes the findings. What has failed several times does
        not count.
        """
        if self.job.state == "running" or self.relocator.busy or self._concluded:
            return True
        moves = not self.relocator.away
        expects = self._queue.expects_progress(moves=moves, misplaced=not self._context.settings().fragments_paused)
        return self.check.busy or bool(self._mismatches) or expects

    def waits(self) -> Waits:
        """What keeps repair from doing more now: disks that are away, and when blocks are recoded without them."""
        now, delay_s = self._context.clock.monotonic(), self._context.recode_delay_s
        later = [delay_s - (now - since) for since in self._away_since.values()]
        pending = [left for left in later if left > 0]
        will_recode = pending and self._queue.waits_for_delay(bare_only=self._is_cut_off(0.0))
        recode_in_s = min(pending) if will_recode else NO_RECODING_S
        wants = self._queue.wants_moves(misplaced=not self._context.settings().fragments_paused)
        gateway = self.relocator.away if wants else ""
        return Waits(tuple(sorted(self._away_since)), recode_in_s, delay_s, gateway)

    def unrepaired(self) -> Counter[str]:
        """Why objects and parts below target are not repaired: reasons, and how many have each. Left out are those that
        wait for disks that are away, or for their turn.
        """
        return self._queue.unrepaired(self._placements.disks_now(), str(self._context.layouts.current.target))

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever. A round that fails (no majority, say) is logged and tried again."""
        while True:
            await self.round()
            limits, check = self._context.limits, self.check
            waiting = self._mismatches or self._concluded
            eager = not check.current or check.has_hints or check.looks_again or waiting or self._look_due()
            await wait_for(check.wake, limits.poll_s if eager else limits.retry_s)

    async def round(self) -> None:
        """One turn of everything that is due, the check included."""
        self._note_away()
        try:
            await self.check.round()
            await self._compare_mismatched()
            await self._judge_concluded()
            await self._look_for_room()
            await self._repair_most_urgent()
        except REFUSALS as error:
            self._context.log(f"repair: {type(error).__name__}: {error}; trying again")

    async def _look_for_room(self) -> None:
        # Without anything to write anew no other node is asked: a disk may be gone for ever.
        some_wait = not self.check.current or self._queue.away_bytes > 0
        if await self.room.look(needed=some_wait and self._some_away_long()):
            self._queue.try_again()

    def _look_due(self) -> bool:
        return self._queue.fresh or self._next_look_at <= self._context.clock.monotonic()

    # --- what is repaired next --------------------------------------------------------------------------------------

    async def _repair_most_urgent(self) -> None:
        """Repairs some of what can be repaired, the fewest spare fragments first. Rests for a while when nothing is
        left to try.
        """
        if not self._look_due():
            return
        self._queue.fresh, self._next_look_at = False, NOW
        await self._forget_ended_uploads()
        work = self._due_findings()
        if not work:
            self._rest()
            return
        if self.job.state != "running":
            self.job.start()
        self.job.total = self.job.done + len(work)
        failures: list[str] = []
        batch = self._context.limits.repair_batch
        for finding in heapq.nsmallest(batch, work, key=urgency):
            await self._look_for_room()
            if finding.misplaced and not self._may_move():
                break  # those that follow only have to move, too
            await self.relocator.room()
            before, reason = self.rebuilder.bytes_rebuilt, ""
            try:
                await self._repair(RegisterName.unpack(finding.name))
            except (*REFUSALS, KeyError, ValueError) as error:
                reason = str(error) or type(error).__name__
                failures.append(f"{finding.name[18:98]!r}: {reason}")
            self.job.advance(0, self.rebuilder.bytes_rebuilt - before)
            if finding.misplaced:
                self._spend(self.rebuilder.bytes_rebuilt - before)
            if not self._is_moving(finding) and not self._divider.has(finding.name):
                self._conclude(finding.name, reason)
            if self._divider.full:
                self._concluded |= await self._divider.ask()
            await self._judge_concluded()
            if self.check.walk_due:
                break  # the disks have changed: something else may be urgent now
        self._concluded |= await self._divider.ask()
        await self._judge_concluded()
        if failures:
            self._context.log(f"repair of {len(failures)} registers failed, the first: {failures[0]}")

    def _may_move(self) -> bool:
        """Whether what is whole may move now: the job is not paused, and within its pace."""
        settings = self._context.settings()
        if settings.revision != self._paced_by:  # moves under the earlier pace do not count
            self._moves_at, self._paced_by = NOW, settings.revision
        return not settings.fragments_paused and self._moves_at <= self._context.clock.monotonic()

    def _spend(self, moved_bytes: int) -> None:
        """Counts ``moved_bytes`` against the pace. All blocks of an object move at once; the pause after it makes up
        for that.
        """
        pace = self._context.settings().bytes_per_s
        if pace:
            now = self._context.clock.monotonic()
            self._moves_at = max(self._moves_at, now - BURST_S) + moved_bytes / pace

    def _on_concluded(self, name: bytes, reason: str) -> None:
        self._concluded[name] = reason
        self.check.wake.set()

    async def _judge_concluded(self) -> None:
        """Judges the registers whose moves were answered."""
        while self._concluded:
            some, self._concluded = self._concluded, {}
            judging = (self._judge_again(name, reason) for name, reason in some.items())
            await concurrently(judging, self._context.limits.hints_concurrent_max)

    async def _judge_again(self, packed: bytes, reason: str) -> None:
        try:
            name = RegisterName.unpack(packed)
            await self.check.judge(name, (await self._context.registers.read(name)).value)
        except REFUSALS as error:
            self._context.log(f"{packed[18:98]!r} can't be judged now: {error}")
            reason = reason or str(error)
        self._conclude(packed, reason)

    def _conclude(self, name: bytes, reason: str) -> None:
        """Notes that all was tried for this register. ``reason``: what failed."""
        if self._queue.has(name):
            self._queue.back_off(name, self._context.clock.monotonic(), reason)
        else:
            self._queue.repaired = True
        self.job.advance(1)

    async def _forget_ended_uploads(self) -> None:
        """Parts of uploads that ended since they were found are in an object now, or garbage."""
        for names in self._queue.of_table(Table.PART):
            where = RegisterName.unpack(names[0])
            uploads = await self._walker.open_uploads_of(where.scope, where.shard)
            for name in names:
                if name[PREFIX_BYTES:][:UPLOAD_ID_BYTES] not in uploads:
                    self._queue.set(name, None)

    def _due_findings(self) -> list[Finding]:
        now = self._context.clock.monotonic()
        moves = not self.relocator.away
        recode = self._some_away_long() and not self.room.stuck
        bare_only = self._is_cut_off(self._context.recode_delay_s) or self.room.short
        due = self._queue.due(now, recode=recode, moves=moves, misplaced=self._may_move(), bare_only=bare_only)
        return [finding for finding in due if not self._is_moving(finding)]

    def _is_moving(self, finding: Finding) -> bool:
        """A gateway is asked for moves of this register: it is judged when they are answered."""
        return self.relocator.has(finding.name) and not self.relocator.away

    def _rest(self) -> None:
        if self.relocator.busy:
            return
        now = self._context.clock.monotonic()
        self._next_look_at = now + self._context.limits.retry_s
        if now < self._moves_at < self._next_look_at:
            self._next_look_at = self._moves_at
        if self._queue.repaired and self._queue.overflowed:
            self.check.request_walk()  # it finds again what did not fit into the queue
        if self.job.state == "running":
            self.job.finish()

    # --- one register -----------------------------------------------------------------------------------------------

    async def _repair(self, name: RegisterName) -> None:
        """Rebuilds and recodes what can be, then judges again. Tries everything; then raises the first failure."""
        try:
            self._walker.buckets.countries_of(name.scope)
        except KeyError:  # the bucket is gone, or its record is not verified: nothing is touched
            self._queue.set(name.pack(), None)
            raise
        failure: Exception | None = None
        try:
            value = (await self._context.registers.read(name)).value
            try:
                await self._walker.pages.repair(name, value)
            except REFUSALS as error:
                failure = error
            if not await self._walker.is_needed(name):
                return
            async for blocks in self._slices(name, value):
                try:
                    move = await self._repair_slice(name, blocks)
                except REFUSALS as error:
                    failure = failure or error
                    continue
                if move is not None:
                    self.relocator.add(name, [move])
                    await self.relocator.room()
        finally:
            if self.relocator.away or not self.relocator.has(name.pack()):
                await self.check.judge(name, (await self._context.registers.read(name)).value)
        await self._discard(name)
        if failure is not None:
            raise failure

    async def _discard(self, name: RegisterName) -> None:
        """Has a gateway delete what is in the way, so that the next attempt can write."""
        found, self.rebuilder.in_the_way = self.rebuilder.in_the_way, {}
        if not found or self.relocator.away:
            return
        fragments = [FragmentAsk(name.pack(), fragment.pack(), disk) for disk, fragment in found]
        for start in range(0, len(fragments), MOVES_A_CALL):
            ask = DiscardAsk(tuple(fragments[start : start + MOVES_A_CALL]))
            answers = (await self._context.asks.ask("discard", ask, MovesAnswer)).answers
            refused = [answer.reason for answer in answers if answer.code != MOVED]
            if refused:
                self._context.log(f"{len(refused)} fragments in the way of repair stay, the first: {refused[0]}")

    async def _slices(self, name: RegisterName, value: Value | None) -> AsyncIterator[list[BlockHealth]]:
        """Consecutive blocks of one run each, as they are now, of all versions that can be read."""
        async for entry in entries_of(self._context, name, value, on_unreadable=lambda _error: None):
            some: list[BlockPlace] = []
            for place in self._walker.places(name, entry):
                if some and (len(some) == BLOCKS_A_SLICE or place.run != some[0].run):
                    yield await self._walker.health(some)
                    some = []
                some.append(place)
            if some:
                yield await self._walker.health(some)

    async def _repair_slice(self, name: RegisterName, blocks: list[BlockHealth]) -> Move | None:
        """Recodes the blocks for a better placement and returns where they are now, or rebuilds in place what is
        missing.
        """
        if blocks[0].place.whole_copy and all(block.misplaced for block in blocks):
            self._divider.add(name.pack())
            return None
        self._lacks_room = False
        placement = self._better_placement(name, blocks) if not self.relocator.away else None
        if placement is not None:
            return await self.rebuilder.recode(blocks, placement, self._context.layouts.current.epoch)
        await self.rebuilder.rebuild_missing(block for block in blocks if block.missing and block.readable)
        if self._lacks_room:
            raise CannotRepair(NO_ROOM)
        return None

    def _better_placement(self, name: RegisterName, blocks: list[BlockHealth]) -> Placement | None:
        """Where the blocks should go; None: they stay, and what is missing is rebuilt in place.

        They go to their target when they are not on it, when the layout in force wants them elsewhere, or without the
        disks that have been away for long. What could stay, but for the layout, waits until the disks that the layout
        wants take writes; where only the target has changed, it does not wait for disks that have been away for long.
        They go to what the living disks can hold when a block has had no spare for long.
        """
        entry = blocks[0].place.entry
        if entry.small or not all(block.readable for block in blocks):
            return None
        countries = self._walker.buckets.countries_of(name.scope)
        away, delay_s = any(block.away for block in blocks), self._context.recode_delay_s
        away_long = away and self._away_long_enough(blocks)
        place = blocks[0].place
        bare = any(block.spare == 0 for block in blocks)
        short = away_long and self.room.short and not place.gone
        urgent = not blocks[0].as_written or (away_long and not self._is_cut_off(delay_s) and (bare or not short))
        among = self.room.for_all(blocks, place.profile.k) if away_long and not place.gone else None
        on_target = blocks[0].on_target
        if urgent or not (place.placed and on_target):
            # Elsewhere it would count as placed, and never come to the disk that is away now.
            waits = not urgent and self._placements.may_stay(place) and (on_target or not self._some_away_long())
            placement = self._placements.at_target(entry, countries, place, first_choice=waits, among=among)
            if placement is not None:
                return placement
        lacks_room = among is not None and (short or urgent) and bool(self._placements.at_target(entry, countries))
        if away_long and bare and not lacks_room:
            return self._placements.choose(entry, place.profile, countries, self.room.for_all(blocks, 1))
        self._lacks_room = urgent and lacks_room and not short
        return None

    def _some_away_long(self) -> bool:
        """Some disk has taken no writes for longer than repair waits for it."""
        now, delay_s = self._context.clock.monotonic(), self._context.recode_delay_s
        return any(now - since >= delay_s for since in self._away_since.values())

    def _away_long_enough(self, blocks: Iterable[BlockHealth]) -> bool:
        """A disk that no layout names any more is away for good."""
        now, known = self._context.clock.monotonic(), self._context.layouts.current.disk_by_id
        disks = {block.place.disks[position] for block in blocks for position in block.away}
        delay_s = self._context.recode_delay_s
        return all(disk not in known or now - self._away_since.get(disk, now) >= delay_s for disk in disks)

    def _is_cut_off(self, for_s: float) -> bool:
        """Whether the nodes of more failure domains than the layout's policy replaces do not answer, and disks there
        have been away for so long. Then it may be the network, and it would be in vain to rebuild all that they have.
        A node that answers does not count, whatever its disks do.
        """
        context, now = self._context, self._context.clock.monotonic()
        layout = context.layouts.current
        domains = {
            layout.domain_by_disk[disk]
            for disk, since in self._away_since.items()
            if disk in layout.disk_by_id and now - since >= for_s and context.why_away(disk) == UNREACHABLE
        }
        return len(domains) > layout.sparing.domains_max

    def _note_away(self) -> None:
        """Remembers since when each disk takes no new fragments."""
        now = self._context.clock.monotonic()
        _, writable = self._context.usable_disks()
        self._away_since = {
            disk: self._away_since.get(disk, now)
            for disk in self._context.layouts.current.disk_by_id
            if disk not in writable
        }

    # --- fragments that checksums can't judge -----------------------------------------------------------------------

    async def _compare_mismatched(self) -> None:
        """Compares the fragments of the blocks that ``hint_mismatch`` named, and rebuilds those that differ."""
        self._compare_undecided()
        mismatches, self._mismatches = self._mismatches, {}
        for owner, fragment in mismatches:
            name = RegisterName.unpack(owner)
            try:
                await self._compare(name, fragment)
            except (*REFUSALS, KeyError, ValueError) as error:
                self._context.log(f"block {fragment.block} of {name.key[:80]!r} could not be verified: {error}")

    def _compare_undecided(self) -> None:
        """Blocks whose fragments differ, while none of them was known to be the false one, are compared again from time
        to time: a fragment that was lost or away may be back, and decide.
        """
        now = self._context.clock.monotonic()
        if self.rebuilder.undecided and now >= self._compare_again_at:
            self._compare_again_at = now + COMPARE_AGAIN_S
            for owner, fragment in list(self.rebuilder.undecided):
                self.hint_mismatch(owner, fragment)

    async def _compare(self, name: RegisterName, fragment: FragmentId) -> None:
        found = False
        value = (await self._context.registers.read(name)).value
        rows = [(name, value)] if value is not None else []
        rows += [row async for row in upload_rows(self._context, name)] if name.table == Table.OBJECT else []
        for row, held in rows:
            async for entry in entries_of(self._context, row, held, on_unreadable=lambda _error: None):
                if entry.data_id == fragment.data_id:
                    places = [place for place in self._walker.places(row, entry) if place.block == fragment.block]
                    found = found or any(fragment == its for place in places for its, _ in place.fragments)
                    for health in await self._walker.health(places):
                        try:
                            wrong = await self.rebuilder.verify_block(health)
                        except CannotRepair:
                            await self._discard(row)
                            self.check.hint(row.pack())
                            raise
                        self._context.log(
                            f"block {fragment.block} of {row.key[:80]!r}: {wrong} fragments were not what the others"
                            " say, rebuilt"
                        )
        if not found:  # deleted, replaced or recoded meanwhile
            self.rebuilder.undecided.pop((name.pack(), fragment), None)
