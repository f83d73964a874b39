"""Deletes the rows of deleted keys, below floors. Runs in gateways.

A deleted key leaves a row at each of its replicas, its tombstone. ``consensus.floors`` says when these rows may go, and
why nothing comes back. The expunger takes the steps for one range of keys after the other:

1. One replica counts the tombstones that are older than the delay. A range with few of them is left alone.
2. All replicas refuse ballots below the floor, which lies the delay in the past. So no change of today is in its way.
3. All replicas are compared, and what differs is settled. The range of a bucket that is deleted is not compared: all
   its replicas refuse every change for ever.
4. All replicas report the floor for missing rows.
5. All replicas delete their tombstones below the floor, some rows at a time; of a bucket that was deleted all rows.

Nothing is noted anywhere: an expunger that dies leaves a range with a floor and with tombstones, which is a sound
state, and the next pass goes on. Two expungers at once set two floors, and the higher one stays. While a replica is
away, or the partition moves, its tombstones stay. So they do where a floor of an earlier layout has a higher sequence:
this gateway's clock is slower than that of another one, or the delay was made longer.

That the delay is longer than any retry is no matter of safety. It keeps clients from unknown outcomes: a gateway that
was suspended for longer learns of a floor that it can't tell what became of its change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from storaged.clock import Clock
from storaged.cluster.layout import PARTITIONS
from storaged.cluster.partitions import PartitionState
from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import NoSuchBucket, ServiceUnavailable, StoragedError
from storaged.maintain.job import Job, JobReport
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import Ballot, RegisterName
from storaged.meta.proposer.floors import PartitionFloors
from storaged.meta.proposer.moving import PartitionMoves

T = TypeVar("T")

DELAY_S = 86_400.0
WORTHWHILE = 100
"""A range with fewer tombstones is left alone: all of its rows would have to be compared for them."""
REST_RATIO = 4.0
"""The pause after a call, as a multiple of its duration, so that the expunger never takes much of the disks."""
REST_MAX_S = 1.0
FIRST_PASS_S = 600.0
"""After the start, so that a cluster that starts has other things to do."""

log = structlog.get_logger("expunger")


@dataclass(frozen=True)
class ExpungerPorts:
    """``is_mine()``: whether this gateway expunges now, and no other. ``settle``: of registers in which replicas
    differ, as ``Registers.settle``; None: the scanner's own, which passes no fence.
    """

    layouts: Layouts
    scanner: RingScanner
    moves: PartitionMoves
    floors: PartitionFloors
    liveness: Liveness
    clock: Clock
    is_mine: Callable[[], bool] = lambda: True
    settle: Callable[[RegisterName], Awaitable[object]] | None = None


@dataclass
class Expunged:
    """``rows`` and ``ranges`` that were expunged since the start. Of the last pass: how many partitions were ``left``,
    and why the last of them was (``waiting``).
    """

    rows: int = 0
    ranges: int = 0
    waiting: str = ""
    left: int = 0


class Expunger:
    """``run`` is its task."""

    def __init__(
        self,
        ports: ExpungerPorts,
        *,
        delay_s: float = DELAY_S,
        interval_s: float | None = None,
        worthwhile: int = WORTHWHILE,
        rest_ratio: float = REST_RATIO,
        partitions: Sequence[int] = range(PARTITIONS),
    ) -> None:
        """``interval_s`` between passes: a quarter of the delay. ``partitions``: those that it looks at."""
        self._ports = ports
        self._delay_s = delay_s
        self._interval_s = delay_s / 4 if interval_s is None else interval_s
        self._worthwhile = worthwhile
        self._rest_ratio = rest_ratio
        self._partitions = partitions
        self.done = Expunged()
        self.job = Job("expunging", ports.clock)

    def report(self, node: str) -> list[JobReport]:
        """As ``status`` shows it: nothing before the first pass."""
        return [] if self.job.state == "waiting" else [self.job.report(node)]

    async def run(self) -> None:
        """Runs for ever. What fails is tried again in the next pass."""
        await asyncio.sleep(min(FIRST_PASS_S, self._interval_s))
        while True:
            if self._ports.is_mine():
                await self.once()
            await asyncio.sleep(self._interval_s)

    async def once(self) -> int:
        """One pass over all partitions. Returns how many rows have gone."""
        before = self.done.rows
        self.done.left, self.done.waiting = 0, ""
        self.job.start(len(self._partitions))
        for number in self._partitions:
            try:
                await self._partition(number)
            except (StoragedError, TimeoutError) as error:
                self.done.left += 1
                self.done.waiting = str(error)
            self.job.advance()
            await asyncio.sleep(0)
        gone = self.done.rows - before
        detail = f"{gone} rows of deleted keys are gone"
        if self.done.left:
            detail += f"; {self.done.left} partitions wait: {self.done.waiting}"
        self.job.finish(detail=detail)
        if gone:
            log.info("rows of deleted keys are gone", rows=gone)
        return gone

    async def _partition(self, number: int) -> None:
        """Raises ServiceUnavailable where it can't be now."""
        layouts = self._ports.layouts
        state = layouts.partition(number)
        self._check(state)
        closed = False
        for prefix in await self._timed(self._ports.floors.ranges(state)):
            floor = self._floor(state)
            if await self._worth_it(state, prefix, floor):
                try:
                    await self.expunge(state, prefix, floor)
                except NoSuchBucket:
                    closed = True
        if closed:
            raise ServiceUnavailable("A bucket is being deleted; its deleted keys stay until that has ended.")

    def _floor(self, state: PartitionState) -> Ballot:
        now_us = self._ports.clock.wall_ms() * 1000
        return Ballot(state.epoch, max(1, now_us - int(self._delay_s * 1_000_000)), "", b"")

    def _check(self, state: PartitionState) -> None:
        """Raises ServiceUnavailable unless the partition is settled, and all its replicas are there."""
        if state.coming or self._ports.layouts.partition(state.partition).step != state.step:
            raise ServiceUnavailable(f"Partition {state.partition} moves; its deleted keys stay until it has.")
        for disk in state.present:
            if not (self._ports.liveness.disk_readable(disk) and self._ports.liveness.disk_writable(disk)):
                raise ServiceUnavailable(f"Partition {state.partition}: deleted keys stay while disk {disk} is away.")

    async def _worth_it(self, state: PartitionState, prefix: bytes, floor: Ballot) -> bool:
        count, after = 0, b""
        while count < self._worthwhile:
            some, end = await self._timed(self._ports.floors.count(state, prefix, floor, after))
            count += some
            if end is None:
                break
            after = end
        return count >= self._worthwhile

    async def expunge(self, state: PartitionState, prefix: bytes, floor: Ballot) -> int:
        """One range. Raises ServiceUnavailable where it can't be now, and NoSuchBucket where rows differ behind a
        fence. Returns how many rows have gone.
        """
        floors = self._ports.floors
        fenced = await self._ports.moves.fence(state)
        if not fenced.issuperset(state.present):
            raise ServiceUnavailable(f"Partition {state.partition}: a replica does not answer.")
        promises = await self._timed(floors.promise(state, prefix, floor))
        final = [promise.final for promise in promises]
        if any(final) and not all(final) and await self._ports.moves.close_everywhere(state, prefix[1:17]):
            promises = await self._timed(floors.promise(state, prefix, floor))
        if not all(promise.final for promise in promises):
            await self._compare(state, prefix)
        self._check(state)
        await floors.activate(state, prefix, floor)
        gone = 0
        async for count in self._going(state, prefix, floor):
            gone += count
            self.done.rows += count
        self.done.ranges += gone > 0
        return gone

    async def _compare(self, state: PartitionState, prefix: bytes) -> None:
        """All replicas, for what was accepted below the floor."""
        settle = self._ports.settle
        found = await self._timed(self._ports.scanner.catch_up(prefix[0], prefix[1:17], prefix[17], bring_up=settle))
        if found.away:
            raise ServiceUnavailable(
                f"Partition {state.partition}: deleted keys stay while disk {min(found.away)} does not answer."
            )

    async def _timed(self, call: Awaitable[T]) -> T:
        """Rests after the call."""
        began = self._ports.clock.monotonic()
        result = await call
        took_s = self._ports.clock.monotonic() - began
        await asyncio.sleep(min(REST_MAX_S, self._rest_ratio * took_s))
        return result

    async def _going(self, state: PartitionState, prefix: bytes, floor: Ballot) -> AsyncIterator[int]:
        after: bytes | None = b""
        while after is not None:
            self._check(state)
            gone, after = await self._timed(self._ports.floors.expunge(state, prefix, floor, after))
            yield gone
