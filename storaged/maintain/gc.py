"""Garbage collection: each node deletes on its own disks what is out of use. ``disuse`` says when that is.

Theory of operation. Garbage is found in two ways: gateways fill the garbage lists (``retire``), and the ``sweep`` puts
on them what no record claims. A page of a list is judged together (``garbage_page``):

* What a committed change replaced goes after a settled read of its register. One message to a node reads many.
* Parts of uploads go when their upload has ended, after a round of the object's register.
* Everything else needs a round of its register, which is asked of a gateway.

No node deletes on another's disk: each has its own list, and looks by itself.

An entry names the register that referred to the data. A gateway takes that from a record, and one replica of the
record may have forged it. So a fragment is deleted only if its own header names that register too: the gateway that
wrote the fragment has put it there.

What can't be judged now rests for a while, with what else of its register has the same origin. A list is
gone through page by page, so that entries which wait for long hold up no others. How many wait, and why, is in the
node's status.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from storaged.errors import StoragedError
from storaged.fragments.ports import NearStore, Retirement
from storaged.maintain.collection_pace import CollectionPace
from storaged.maintain.context import MaintainContext
from storaged.maintain.disuse import Judge
from storaged.maintain.garbage_page import GarbagePage, Rest, upload_id_of
from storaged.maintain.holds import REASON as HELD
from storaged.maintain.holds import Holds, has_room_to_hold
from storaged.maintain.sweep import Sweep

ENTRIES_A_ROUND = 50_000
"""Entries of one disk looked at before the other disks have their turn; the next round goes on from there."""
RESTING_MAX = 10_000
"""Registers and origins whose garbage rests. Of further ones each round asks again."""
RESTS_A_KEY = 64
"""When this many origins of one register rest, all its garbage rests, so that a key with ten thousand open uploads
leaves room for others.
"""


class Collector:
    """Judges and deletes on this node's disks. ``run`` is its task."""

    def __init__(self, context: MaintainContext, judge: Judge | None = None, holds: Holds | None = None) -> None:
        self._context = context
        self._holds = holds if holds is not None else Holds(context.clock, context.limits.read_hold_s)
        self._judge = judge if judge is not None else Judge(context)
        self.pace = CollectionPace(context)
        self._sweep = Sweep(context, self._judge.buckets, self.pace)
        self._resting: dict[Rest, tuple[float, str]] = {}
        """What can't be judged now: until when, and why."""
        self._rests_of: Counter[bytes] = Counter()
        """How many of these each register has."""
        self._cursors: dict[str, tuple[int, bytes]] = {}
        """Where on each disk's list the next round goes on."""
        self._counting: dict[str, Counter[str]] = {}
        self._waiting: dict[str, Counter[str]] = {}
        self.deleted_fragments = 0
        self.kept = 0
        self.rounds = 0
        """Registers for which a round was asked."""

    @property
    def orphans(self) -> int:
        return self._sweep.orphans

    def waiting(self) -> Counter[str]:
        """How many data ids of the garbage lists wait, by reason, as the last complete passes over the lists found."""
        return sum(self._waiting.values(), Counter())

    async def run(self) -> None:
        """For ever: the garbage lists often, the sweep of orphans a few times a day."""
        next_sweep = self._context.clock.monotonic() + self._context.limits.orphan_interval_s
        while True:
            await asyncio.sleep(self._context.limits.collect_interval_s)
            await self.collect_due()
            if self._context.clock.monotonic() >= next_sweep:
                next_sweep = self._context.clock.monotonic() + self._context.limits.orphan_interval_s
                await self.sweep()

    async def sweep(self) -> int:
        """Puts on the lists what no record claims; returns how many fragments that were."""
        return await self._sweep.once()

    async def collect_due(self) -> int:
        """Judges what is due on all disks. Returns how many fragments were deleted."""
        before = self.deleted_fragments
        now = self._context.clock.monotonic()
        self._resting = {owner: rest for owner, rest in self._resting.items() if rest[0] > now}
        self._rests_of = Counter(owner for owner, _ in self._resting)
        for disk, store in self._context.local_fragments.items():
            counting = self._counting.setdefault(disk, Counter())
            resting_before = len(self._resting)
            try:
                if await self._collect_disk(disk, store, counting):
                    self._waiting[disk], self._counting[disk] = counting, Counter()
            except (StoragedError, TimeoutError) as error:
                self._cursors.pop(disk, None)
                counting.clear()
                self._context.log(f"the garbage list of disk {disk} can't be judged now: {error}")
            if counting and len(self._resting) > resting_before:
                reason, count = counting.most_common(1)[0]
                self._context.log(
                    f"{counting.total()} entries of disk {disk}'s garbage list can't be judged now; {count} of them:"
                    f" {reason}"
                )
        return self.deleted_fragments - before

    async def _collect_disk(self, disk: str, store: NearStore, counting: Counter[str]) -> bool:
        """One round over a list, or the next part of it. True: its end was reached."""
        limits, now_ms = self._context.limits, self._context.clock.wall_ms()
        for _ in range(0, ENTRIES_A_ROUND, limits.collect_batch):
            await self.pace.spend(0)
            page = await store.due(now_ms, self._cursors.get(disk, (0, b"")), limits.collect_batch)
            if not page:
                self._cursors.pop(disk, None)
                return True
            self._cursors[disk] = page[-1].due_ms, page[-1].data_id
            await self._collect_page(disk, store, page, counting)
        return False

    async def _collect_page(
        self, disk: str, store: NearStore, page: Sequence[Retirement], counting: Counter[str]
    ) -> None:
        awake = []
        for entry in page:
            rest = self._resting.get((entry.owner, entry.origin)) or self._resting.get((entry.owner, None))
            if rest is None:
                awake.append(entry)
            else:
                counting[rest[1]] += 1
        await self.pace.spend(len(awake))
        if self._holds and has_room_to_hold(await store.usage()):
            some = [entry for entry in awake if not self._holds.keeps(entry.data_id, upload_id_of(entry))]
            counting[HELD] += len(awake) - len(some)
            awake = some
        judged = GarbagePage(self._context, self._judge, disk, store, self.pace)
        try:
            await judged.collect(awake)
        finally:
            self.deleted_fragments += judged.deleted
            self.kept += judged.kept
            self.rounds += judged.rounds
            until = self._context.clock.monotonic() + self._context.limits.retry_max_s / 10
            for waits, reason in judged.waiting:
                counting[reason] += 1
                self._let_rest(waits, until, reason)

    def _let_rest(self, waits: Rest, until: float, reason: str) -> None:
        owner = waits[0]
        if self._rests_of[owner] >= RESTS_A_KEY:
            waits = owner, None
        if waits in self._resting or len(self._resting) < RESTING_MAX:
            self._rests_of[owner] += waits not in self._resting
            self._resting[waits] = until, reason
