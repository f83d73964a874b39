"""Catch-up: when a disk was away, its rows come first.

Theory of operation
    A walk judges every record, and asks disks for what each names. That takes as long as the node has records: minutes,
    for a million. Rows that a disk missed must not wait for it: until the disk has them, one more failure makes them
    unreadable. So when a disk comes back, or a node starts, a *pass* goes over the ranges that this node is responsible
    for, settles the rows that differ, and looks at nothing else. A walk that is under way waits meanwhile.

    A range whose replicas have the same sum of all rows (``meta.storage.sums``) is the same everywhere: that costs a
    message for all ranges of a bucket and table. Of the others the stamps of the rows are compared, in slices.

    A pass trusts what replicas say of their rows without a look at the rows themselves. Damage is found by the walk,
    which follows each pass and verifies every row that it compares.

A range that can't be brought up now is tried again a few times. After that the walk does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storaged.errors import StoragedError
from storaged.maintain.context import MaintainContext, concurrently, wait_for
from storaged.maintain.job import Job
from storaged.maintain.walk import Range, Walker
from storaged.meta.store_ports import RowDamaged

RANGES_AT_ONCE = 4
GROUPS_AT_ONCE = 8
TRIES = 5
"""The pause between two doubles, and begins with ``MaintainLimits.poll_s``."""

RESTED = 2
"""A pass that began so many times its own length after the last one ended may be followed by another one at once."""

REST_S_MAX = 15.0


class CatchUp:
    """Of one storage node. ``run`` until cancelled."""

    def __init__(self, context: MaintainContext, walker: Walker) -> None:
        self._context = context
        self._walker = walker
        self._wanted = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self.job = Job("catch-up", context.clock)

    def request(self) -> None:
        """A disk has come back, or may have been away unnoticed. May be called at any time."""
        self._wanted.set()

    @property
    def busy(self) -> bool:
        return self._wanted.is_set() or not self._ended.is_set()

    async def ended(self) -> None:
        """Returns when no pass is under way."""
        await self._ended.wait()

    async def run(self) -> None:
        """A pass that follows another one at once is followed by a rest as long as it took, though not longer than
        REST_S_MAX, however often disks come and go: then the walk goes on.
        """
        clock = self._context.clock
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            began = clock.monotonic()
            rested_s = began - self.job.ended
            left = await self._pass(None, 1)
            took_s, pause_s = clock.monotonic() - began, self._context.limits.poll_s
            for number in range(1, TRIES):
                if left == []:
                    break
                # What is wanted meanwhile is a pass over all ranges, those that are left among them.
                again = None if await wait_for(self._wanted, pause_s) else left
                left = await self._pass(again, 2**number)
                pause_s *= 2
            if rested_s < RESTED * took_s:
                await asyncio.sleep(min(took_s, REST_S_MAX))

    async def _pass(self, ranges: list[Range] | None, patience: float) -> list[Range] | None:
        """Over these ranges; None: over all. Returns those that could not be brought up; None when it is not known
        which ranges there are. ``patience``: with replicas that are slow, all the more when they did not answer before.
        """
        self._ended.clear()
        failures: list[str] = []
        left: list[Range] = []
        all_known = True
        settled = self._walker.settled
        self.job.start()
        try:
            if ranges is None:
                ranges = await self._led_ranges(failures)
                all_known = not failures
            self.job.total = len(ranges)
            differing = await self._differing(ranges, failures)
            self.job.advance(len(ranges) - len(differing))
            await concurrently((self._bring_up(where, patience, left, failures) for where in differing), RANGES_AT_ONCE)
        finally:
            self._ended.set()
            detail = failures[0] if failures else f"{self._walker.settled - settled} registers settled"
            self.job.finish("failed" if failures else "done", detail)
        if failures:
            self._context.log(f"catch-up: {len(failures)} failures, the first: {failures[0]}")
        return left if all_known else None

    async def _led_ranges(self, failures: list[str]) -> list[Range]:
        try:
            await self._walker.buckets.refresh(self._context)
        except (StoragedError, TimeoutError) as error:  # the directory as it was read last has to do
            failures.append(str(error))
        try:
            return self._walker.led_ranges()
        except StoragedError as error:
            failures.append(str(error))
            return []

    async def _differing(self, ranges: Sequence[Range], failures: list[str]) -> list[Range]:
        """Those whose sums differ, or are not known everywhere."""
        groups: dict[tuple[int, bytes], list[Range]] = {}
        for where in ranges:
            groups.setdefault((where.table, where.scope), []).append(where)
        found: list[Range] = []

        async def compare(group: Sequence[Range]) -> None:
            try:
                found.extend(await self._walker.differing(group))
            except (StoragedError, TimeoutError) as error:
                self._context.log(f"the sums of {len(group)} ranges can't be compared now: {error}")
                found.extend(group)

        await concurrently(map(compare, groups.values()), GROUPS_AT_ONCE)
        return found

    async def _bring_up(self, where: Range, patience: float, left: list[Range], failures: list[str]) -> None:
        try:
            whole = await self._walker.settle_range(where, quick=True, patience=patience)
            reason = "a replica did not answer"
        except (StoragedError, RowDamaged, TimeoutError) as error:
            whole, reason = False, str(error)
        if not whole:
            left.append(where)
            failures.append(reason)
        self.job.advance()
