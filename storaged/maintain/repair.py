"""Repair: walks what this node looks after, counts what is below target, and mends it, the most endangered first.

A full walk happens at the start, whenever a disk comes or goes, and every so often. Between walks, hints name single registers: a read
that found damage, a write that had to leave disks out, a scrub. What can't be mended with the disks that answer waits for them; blocks without a
spare are recoded for those that are there after a delay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from storaged.errors import PeerError, StoragedError
from storaged.fragments.ports import FragmentId
from storaged.maintain.context import MaintainContext, wait_for
from storaged.maintain.mend import CannotMend, Mender
from storaged.maintain.runner import Job
from storaged.maintain.survey import BlockHealth, Finding, judge
from storaged.maintain.walk import Walker
from storaged.meta.names import RegisterName
from storaged.objects.place import Placement, choose

Range = tuple[str, int, bytes, int]


class Repair:
    """Owns the findings of this node. ``run`` is its task; ``hint`` and ``wake`` may be called at any time."""

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self._walker = Walker(context)
        self.mender = Mender(context)
        self.job = Job("repair", context.clock)
        self._findings: dict[bytes, Finding] = {}
        self._hints: set[bytes] = set()
        self._wake = asyncio.Event()
        self._walk_wanted = True
        self._dropped: list[tuple[float, FragmentId, str]] = []
        self._away_since: dict[str, float] = {}
        self._not_before: dict[bytes, float] = {}
        """What could not be mended rests for a while."""
        self.walked = False
        self.overflow = 0

    # --- what others see --------------------------------------------------------------------------------------------

    @property
    def below_target(self) -> int:
        return len(self._findings) + self.overflow

    @property
    def lost(self) -> int:
        return sum(finding.lost for finding in self._findings.values())

    @property
    def at_risk(self) -> int:
        """Objects of which one more lost fragment would make a block unreadable, although every disk that should hold it answers."""
        return sum(finding.spare == 0 and finding.damaged_fragments > 0 for finding in self._findings.values())

    @property
    def idle(self) -> bool:
        """Nothing to do now: no hints, no walk wanted, nothing that could be mended."""
        return self.walked and not self._walk_wanted and not self._hints and self.job.state != "running"

    def hint(self, name: bytes) -> None:
        """This register (packed name) should be looked at soon. Beyond the bound, the next walk finds it."""
        if len(self._hints) < self._context.limits.hints_max:
            self._hints.add(name)
        else:
            self._walk_wanted = True
        self._wake.set()

    def wake(self) -> None:
        """A full walk should begin."""
        self._walk_wanted = True
        self._wake.set()

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever. A round that fails (no majority, say) is logged and tried again."""
        last_walk = -1e18
        while True:
            limits, now = self._context.limits, self._context.clock.monotonic()
            try:
                if self._walk_wanted or now - last_walk >= limits.walk_interval_s:
                    self._walk_wanted = False
                    await self._walk()
                    last_walk = now
                if self._hints:
                    await self._look_at_hints()
                await self._mend_all()
                await self._drop_due()
            except (StoragedError, TimeoutError) as error:
                self.job.finish("failed", str(error))
                self._context.log(f"repair: {type(error).__name__}: {error}; trying again")
                self._walk_wanted = True
                await asyncio.sleep(2 * limits.poll_s)
            await wait_for(self._wake, limits.poll_s)

    async def _walk(self) -> None:
        """Judges everything this node looks after, and replaces the findings."""
        await self._walker.buckets.refresh(self._context)
        ranges = self._context.led_ranges()
        self.job.start(len(ranges))
        findings: dict[bytes, Finding] = {}
        overflow = 0
        for where in ranges:
            async for rows in self._walker.rows(*where):
                for finding in await self._walker.judge_rows(rows):
                    if len(findings) < self._context.limits.findings_max:
                        findings[finding.name] = finding
                    else:
                        overflow += 1
            self.job.advance()
        self._findings, self.overflow, self.walked = findings, overflow, True
        self.job.finish()

    async def _look_at_hints(self) -> None:
        hints, self._hints = self._hints, set()
        if any(RegisterName.unpack(name).scope not in self._walker.buckets.countries for name in hints):
            await self._walker.buckets.refresh(self._context)
        for packed in hints:
            name = RegisterName.unpack(packed)
            if self._context.leads(name.partition):
                await self._judge_again(name)

    async def _judge_again(self, name: RegisterName) -> list[BlockHealth]:
        """Reads one register from a majority, and files what is wrong with it."""
        packed = name.pack()
        try:
            reading = await self._context.registers.read(name)
            health = await self._walker.health(name, reading.value)
        except (KeyError, ValueError, msgspec.MsgspecError) as error:
            self._context.log(f"repair can't judge {name.key[:80]!r}: {type(error).__name__}: {error}")
            self._findings.pop(packed, None)
            return []
        finding = judge(packed, health, self._walker.recodable)
        if finding is None:
            self._findings.pop(packed, None)
        elif packed in self._findings or len(self._findings) < self._context.limits.findings_max:
            self._findings[packed] = finding
        return health

    # --- mending ----------------------------------------------------------------------------------------------------

    async def _mend_all(self) -> None:
        """Mends what can be mended, the fewest spare fragments first."""
        self._note_away()
        now = self._context.clock.monotonic()
        self._not_before = {name: when for name, when in self._not_before.items() if when > now}
        work = sorted(
            (finding.spare, name)
            for name, finding in self._findings.items()
            if name not in self._not_before and (finding.mendable or self._overdue(finding))
        )
        if not work:
            return
        self.job.start(len(work))
        queue = iter(work)

        async def worker() -> None:
            for _, name in queue:
                before = self.mender.bytes_rebuilt
                try:
                    await self._mend(RegisterName.unpack(name))
                except (CannotMend, StoragedError, TimeoutError) as error:
                    self._context.log(f"repair of {name[18:98]!r}: {error}")
                    self._not_before[name] = self._context.clock.monotonic() + self._context.limits.retry_s
                self.job.advance(1, self.mender.bytes_rebuilt - before)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._context.limits.mend_at_once):
                group.create_task(worker())
        self.job.finish()

    async def _mend(self, name: RegisterName) -> None:
        health = await self._judge_again(name)
        runs: dict[tuple[bytes, int], list[BlockHealth]] = {}
        for block in health:
            runs.setdefault((block.place.entry.data_id, block.place.run), []).append(block)
        try:
            for blocks in runs.values():
                placement = self._better_placement(name, blocks)
                if placement is not None:
                    await self._recode(name, blocks, placement)
                    continue
                for block in blocks:
                    if block.missing and block.readable:
                        await self.mender.rebuild_missing(block)
        finally:
            await self._judge_again(name)

    def _better_placement(self, name: RegisterName, blocks: list[BlockHealth]) -> Placement | None:
        """Where a run should go instead of where it is: to its target when it can be held again; to what the living disks can hold when
        blocks have had no spare left for long enough. None: it stays, and what is missing is rebuilt in place."""
        place = blocks[0].place
        if place.entry.small or not all(block.readable for block in blocks):
            return None
        countries = self._walker.buckets.countries.get(name.scope, ())
        if not blocks[0].on_target:
            placement = self._walker.target_placement(place, countries)
            if placement is not None:
                return placement
        if any(block.spare == 0 and block.away for block in blocks) and self._away_long_enough(blocks):
            placement = choose(
                self._context.layouts.current, place.entry.data_id, place.profile, self._context.liveness.disk_writable, countries
            )
            if placement.profile != place.profile or placement.disks != place.disks:
                return placement
        return None

    async def _recode(self, name: RegisterName, blocks: list[BlockHealth], placement: Placement) -> None:
        left = await self.mender.recode_run(name, blocks, placement, self._context.layouts.current.epoch)
        due = self._context.clock.monotonic() + self._context.limits.drop_delay_s
        self._dropped += [(due, fragment, disk) for fragment, disk in left]

    def _note_away(self) -> None:
        now, readable = self._context.clock.monotonic(), self._context.readable_disks()
        for disk in self._context.layouts.current.disk_by_id:
            if disk in readable:
                self._away_since.pop(disk, None)
            else:
                self._away_since.setdefault(disk, now)

    def _away_long_enough(self, blocks: Iterable[BlockHealth]) -> bool:
        now = self._context.clock.monotonic()
        disks = {block.place.disks[position] for block in blocks for position in block.away}
        return all(now - self._away_since.get(disk, now) >= self._context.limits.recode_delay_s for disk in disks)

    def _overdue(self, finding: Finding) -> bool:
        """Without a spare, while some disk has been away for so long that it is not waited for any more."""
        now = self._context.clock.monotonic()
        delay = self._context.limits.recode_delay_s
        return not finding.lost and finding.spare == 0 and any(now - since >= delay for since in self._away_since.values())

    async def _drop_due(self) -> None:
        """Deletes fragments that recoded runs left behind; what a restart forgets, the sweep of unclaimed fragments finds."""
        now = self._context.clock.monotonic()
        due = [(fragment, disk) for when, fragment, disk in self._dropped if when <= now]
        self._dropped = [entry for entry in self._dropped if entry[0] > now]
        by_disk: dict[str, list[FragmentId]] = {}
        for fragment, disk in due:
            by_disk.setdefault(disk, []).append(fragment)
        for disk, ids in by_disk.items():
            try:
                async with asyncio.timeout(self._context.limits.call_timeout_s):
                    await self._context.stores.store(disk).delete(ids)
            except (PeerError, TimeoutError):
                continue
