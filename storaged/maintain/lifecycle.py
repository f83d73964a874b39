"""Carries out the lifecycle rules of all buckets. Runs in one gateway at a time; two at once do the same twice.

``objects.lifecycle`` has the index and the looks. The worker visits the buckets that have rules, in turn, and does a
bounded piece of work in each:

1. When the rules changed, or the last walk ended a week ago, it begins a walk; while one is under way it walks on.
2. It looks at the keys whose day has come, at most ``lifecycle_per_s`` in a second, and deletes each row of the index
   after its last key.
3. Once a day it aborts the uploads that are due (``write.multipart``).

Days begin at midnight UTC, so it visits a bucket again when a day has begun, when its rules changed, and while there is
work left. All progress is in rows and in the records: a worker that dies leaves nothing undone that the next one does
not find. What time allows is judged by an agreed time (``cluster.agreed_time``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from msgspec.structs import replace

from storaged.clock import Clock
from storaged.errors import DataDamaged, NoSuchBucket, StoragedError
from storaged.maintain.job import Job, JobReport
from storaged.maintain.rounds import TICKS_A_DAY, run_rounds
from storaged.objects.code.lifecycle import rules_of
from storaged.objects.lifecycle.index import (
    FORMAT,
    LifecycleState,
    drop_index,
    drop_row,
    every_due,
    read_state,
    write_notes,
    write_state,
)
from storaged.objects.lifecycle.look import Judge, Looked, look_at
from storaged.objects.lifecycle.report import state_document
from storaged.objects.lifecycle.walk import drop_older_rows, rules_digest, walk_piece
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.objects.system.buckets import BucketService
from storaged.objects.write.multipart import forget_finished_uploads

NOTES_S = 30.0
WALK_EVERY_DAYS = 7
ROWS_A_VISIT = 4
LOOKS_AT_ONCE = 8
BARE_A_PASS = 100
"""How many buckets without rules a pass looks at: they may still have an index of earlier rules."""
REST_RATIO = 1.0
"""The pause after a piece of a walk, as a multiple of its duration."""
REST_MAX_S = 10.0

log = structlog.get_logger("lifecycle")


async def keep_notes(plane: ObjectPlane) -> None:
    """Runs for ever, in each process of a gateway: writes its notes. It also asks for the agreed time, which is known
    only some time after it was first asked for.
    """
    while True:
        plane.now_agreed_ms()
        await asyncio.sleep(min(NOTES_S, plane.limits.lifecycle_day_ms / 1000 / TICKS_A_DAY))
        try:
            await write_notes(plane, plane.notes)
        except (StoragedError, TimeoutError) as error:
            log.info("notes of lifecycle are written later", reason=str(error))


class Pace:
    """At most ``per_s`` looks in a second."""

    def __init__(self, clock: Clock, per_s: int) -> None:
        self._clock = clock
        self._each_s = 1 / per_s
        self._free_at = 0.0

    async def spend(self) -> None:
        now = self._clock.monotonic()
        self._free_at = max(self._free_at, now - 0.1) + self._each_s
        await asyncio.sleep(max(self._free_at - now, 0.0))


@dataclass
class Visited:
    """What the worker knows of a bucket. ``after``: the row of the index that was done last, today. ``looked``: the
    day, and the rules, for which nothing is due any more; ``uploads``: the same of uploads. ``problem``: why the last
    visit failed.
    """

    name: str
    state: LifecycleState | None = None
    after: bytes = b""
    looked: tuple[int, bytes] = (-1, b"")
    uploads: tuple[int, bytes] = (-1, b"")
    damaged: int = 0
    problem: str = ""


class LifecycleWorker:
    """``run`` is its task. ``is_mine()``: whether this gateway is the one that does it now."""

    def __init__(
        self, plane: ObjectPlane, buckets: BucketService, *, is_mine: Callable[[], bool] = lambda: True
    ) -> None:
        self._plane = plane
        self._buckets = buckets
        self._is_mine = is_mine
        self._day_ms = plane.limits.lifecycle_day_ms
        self._pace = Pace(plane.clock, plane.limits.lifecycle_per_s)
        self._visited: dict[bytes, Visited] = {}
        self._bare: set[bytes] = set()
        """Buckets that have neither rules nor an index."""
        self._bare_left = 0
        self.job = Job("lifecycle", plane.clock)

    async def run(self) -> None:
        """Runs for ever."""
        await run_rounds("lifecycle", self._day_ms, self.once, is_mine=self._is_mine, forget=self._forget)

    def _forget(self) -> None:
        self._visited, self._bare = {}, set()

    async def once(self) -> bool:
        """Visits each bucket that has rules. Returns whether there is work left that can be done now."""
        more, seen, self._bare_left = False, set(), BARE_A_PASS
        for bucket in await self._buckets.every_bucket():
            if bucket.state != "active":
                continue
            seen.add(bucket.id)
            if bucket.plain and bucket.id not in self._visited and (bucket.id in self._bare or not self._bare_left):
                continue
            more |= await self._try_visit(bucket)
        self._bare &= seen
        self._visited = {bucket_id: known for bucket_id, known in self._visited.items() if bucket_id in seen}
        if not more and self.job.state == "running":
            self.job.finish(detail=self._summary())
        return more

    async def _try_visit(self, bucket: BucketRecord) -> bool:
        known = self._visited.get(bucket.id)
        try:
            rules = self._plane.configurations.of(bucket).derive(rules_of)
            if not rules and known is None:
                await self._drop_left(bucket)
                return False
            self._bare.discard(bucket.id)
            if known is None:
                known = self._visited[bucket.id] = Visited(bucket.name)
            if not rules:
                await drop_index(self._plane, bucket)
                del self._visited[bucket.id]
                return False
            more = await self.visit(bucket, known)
        except NoSuchBucket:
            return False
        except (StoragedError, TimeoutError) as error:
            if known is not None and known.problem != str(error):
                log.warning("the lifecycle of a bucket goes on later", bucket=bucket.name, reason=str(error))
                known.problem = str(error)
            return False
        except Exception:  # a fault here must not end the gateway, nor keep the other buckets waiting
            log.exception("the lifecycle of a bucket has failed", bucket=bucket.name)
            if known is not None:
                known.problem = "an internal error: the gateway's log has it"
            return False
        known.problem = ""
        return more

    async def _drop_left(self, bucket: BucketRecord) -> None:
        """Drops the index of rules that are gone, when the worker that knew of them has ended."""
        if bucket.id in self._bare or not self._bare_left:
            return
        self._bare_left -= 1
        if await read_state(self._plane, bucket) is not None:
            await drop_index(self._plane, bucket)
        self._bare.add(bucket.id)

    async def visit(self, bucket: BucketRecord, known: Visited) -> bool:
        """A piece of work in one bucket. Returns whether there is more. Raises StoragedError."""
        plane = self._plane
        judge = Judge(plane, self._buckets, bucket)
        wanted = rules_digest(plane, bucket)
        now_ms = judge.now_ms()
        today = now_ms // self._day_ms
        state = known.state = await read_state(plane, bucket)
        if state is None or state.rules != wanted or self._is_old(state, now_ms):
            state = await self._begin_walk(bucket, known, wanted, now_ms)
        if not state.walked_ms:
            return await self._walk(bucket, judge, known, state)
        if known.looked != (today, wanted) and await self._look(bucket, judge, known, today):
            return True
        known.looked, known.after = (today, wanted), b""
        if known.uploads != (today, wanted) and plane.configurations.of(bucket).derive(rules_of).abort:
            await forget_finished_uploads(plane, bucket)
        known.uploads = (today, wanted)
        return False

    def _is_old(self, state: LifecycleState, now_ms: int) -> bool:
        return bool(state.walked_ms) and now_ms - state.walked_ms > WALK_EVERY_DAYS * self._day_ms

    async def _begin_walk(self, bucket: BucketRecord, known: Visited, wanted: bytes, now_ms: int) -> LifecycleState:
        before = await read_state(self._plane, bucket)
        if before is not None and before.rules == wanted and not before.walked_ms:
            state = before  # another gateway has begun
        else:
            state = LifecycleState(FORMAT, wanted, now_ms)
            if before is not None:
                state = replace(before, rules=wanted, began_ms=now_ms, walked_ms=0, after=b"", objects=0)
            await write_state(self._plane, bucket, state)
            log.info("a walk over the bucket begins, for its lifecycle", bucket=bucket.name)
        known.state, known.damaged, known.after = state, 0, b""
        return state

    # --- the walk

    async def _walk(self, bucket: BucketRecord, judge: Judge, known: Visited, state: LifecycleState) -> bool:
        clock = self._plane.clock
        self._start_job(f"walks over {bucket.name}")
        began = clock.monotonic()
        after, count, damaged = await walk_piece(self._plane, judge, bucket, state.after)
        self.job.advance(count)
        known.damaged += damaged
        state = replace(state, after=after or b"", objects=state.objects + count)
        if after is None:
            await drop_older_rows(self._plane, bucket, state.began_ms)
            state = replace(state, walked_ms=judge.now_ms())
            log.info("the walk over the bucket has ended", bucket=bucket.name, objects=state.objects)
        await write_state(self._plane, bucket, state)
        known.state = state
        await asyncio.sleep(min(REST_MAX_S, REST_RATIO * (clock.monotonic() - began)))
        return True

    # --- looks

    async def _look(self, bucket: BucketRecord, judge: Judge, known: Visited, today: int) -> bool:
        """Rows whose day has come. Returns whether there may be more of them. Keys that can't be looked at now are
        noted for the next day. Raises StoragedError; then the row stays.
        """
        plane, done, rows = self._plane, Looked(), 0
        await write_notes(plane, plane.notes, bucket.id)
        try:
            async for row in every_due(plane, bucket, today, after=known.after):
                self._start_job(f"looks at keys of {bucket.name}")
                for key in await self._look_at_all(bucket, judge, row.keys, done):
                    plane.notes.add(bucket, key, today + 1)
                await write_notes(plane, plane.notes, bucket.id)  # before what they come from is gone
                await drop_row(plane, row.name)
                known.after = row.name.key
                rows += 1
                if rows >= ROWS_A_VISIT:
                    return True
        finally:
            await self._count(bucket, known, done)
        return False

    async def _look_at_all(
        self, bucket: BucketRecord, judge: Judge, keys: tuple[bytes, ...], done: Looked
    ) -> list[bytes]:
        """Returns the keys that could not be looked at."""
        failed: list[bytes] = []
        gate = asyncio.Semaphore(LOOKS_AT_ONCE)

        async def one(key: bytes) -> None:
            async with gate:
                await self._pace.spend()
                try:
                    done.add(await look_at(self._plane, judge, bucket, key))
                except DataDamaged as error:
                    log.warning("lifecycle leaves a key out", bucket=bucket.name, key=key[:80].hex(), reason=str(error))
                except (StoragedError, TimeoutError) as error:
                    failed.append(key)
                    log.info("lifecycle looks at a key later", bucket=bucket.name, reason=str(error))
                except Exception:  # as above
                    failed.append(key)
                    log.exception("a look of lifecycle has failed", bucket=bucket.name)
                self.job.advance()

        await asyncio.gather(*(one(key) for key in keys))
        return failed

    async def _count(self, bucket: BucketRecord, known: Visited, done: Looked) -> None:
        if done == Looked() or known.state is None:
            return
        state = known.state
        known.state = replace(
            state,
            expired=state.expired + done.expired,
            noncurrent=state.noncurrent + done.noncurrent,
            markers=state.markers + done.markers,
            early=state.early + done.early,
            locked=state.locked + done.locked,
        )
        await write_state(self._plane, bucket, known.state)

    # --- reports

    def _start_job(self, detail: str) -> None:
        if self.job.state != "running":
            self.job.start()
        self.job.detail = detail

    def _summary(self) -> str:
        counters = self._plane.counters
        return (
            f"{counters.lifecycle_expired} objects, {counters.lifecycle_noncurrent} noncurrent versions and"
            f" {counters.lifecycle_markers} delete markers expired since the start"
        )

    def report(self, node: str) -> list[JobReport]:
        """As ``status`` shows it: nothing before the first work."""
        return [] if self.job.state == "waiting" else [self.job.report(node)]

    def document(self) -> list[Mapping[str, Any]]:
        """One entry for each bucket with rules that this worker has visited."""
        return [
            {**state_document(known.state), "bucket": known.name, "unreadable": known.damaged, "problem": known.problem}
            for known in sorted(self._visited.values(), key=lambda one: one.name)
        ]
