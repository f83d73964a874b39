"""Objects expire while all sorts of things happen: rules change; objects are written, overwritten, tagged, locked and
deleted; versions pile up; clocks are days off; gateways pause and die in the middle of a look; two of them look at
once; parts of the index are lost.

The program's own planes and workers (``maintain.lifecycle``), over the simulated ring. A day lasts DAY_MS of virtual
time. The clocks of up to two of the five storage nodes are wrong by days, and those of gateways, too. ``Oracle`` says a
second time what rules mean, and the program is judged by it. What must hold:

* Each change that a worker proposes for an object deletes only versions that the rules of the last ``CACHE_S`` name,
  that no lock keeps, and that are due by the clocks of the other three storage nodes, which are a majority.
* Once all is well, due versions go within the time of the next weekly walk.
* The index of a bucket has a few rows for each key, and none whose day is over. Where there are no rules any more it is
  dropped, but for notes that another gateway wrote later.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from storaged.cluster import agreed_time
from storaged.cluster.agreed_time import AgreedTime
from storaged.errors import OutcomeUnknown, StoragedError
from storaged.maintain.lifecycle import WALK_EVERY_DAYS, LifecycleWorker
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import every_row
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility, object_name
from storaged.meta.ports import Outcome, PageQuery, Reading
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.code.adding import overtake
from storaged.objects.code.history import Draft, Entry, Shelf, entries_on
from storaged.objects.code.version_pages import decode_page
from storaged.objects.code.versions import Place, decode_record, open_version
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.configuration.kinds import ENABLED, LOCK, VERSIONING, ObjectLock, Versioning
from storaged.objects.configuration.lifecycle import LIFECYCLE, Lifecycle, LifecycleFilter, LifecycleRule
from storaged.objects.lifecycle import walk
from storaged.objects.lifecycle.index import drop_row, every_due, read_state, write_notes
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.records import BucketRecord, Lock, ObjectRecord, decode_object
from storaged.objects.service import ObjectService
from tests.sim.cluster import DISKS, Gateway
from tests.sim.planes import CACHE_S, KnownBuckets, Lives, NotedPages, keys_for, make_plane
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import EPOCH_MS, VirtualLoop
from tests.sim.workload import Verdicts

OWNER = "f" * 64
DAY_MS = 500
"""So long that the index can still count the days since 1970 (u32)."""
CALLS = 14
"""Of each worker."""
SAMPLES_S = 0.3
LATE_DAYS = 12
"""How far clocks of gateways may differ in a run, and more."""
LIARS = ("n3", "n4")
PLAIN, VERSIONED = "plain", "versioned"
LIVING_KEYS = (b"a/1", b"a/2", b"b/1", b"t/1")
ROWS_MAX = 3 * len(LIVING_KEYS) + 3
"""Of the index of a bucket, in the end: rows of some days, and the state."""
AFTER_DAYS = WALK_EVERY_DAYS + 4

looking: ContextVar[bool] = ContextVar("looking", default=False)
"""Whether the code that runs now belongs to a worker."""


def rule(prefix: str = "", *, tags: dict[str, str] | None = None, **says: int) -> LifecycleRule:
    return LifecycleRule("r", True, LifecycleFilter(prefix, tags or {}), **says)  # type: ignore[arg-type]


def some_rules(chance: random.Random, today: int) -> tuple[LifecycleRule, ...]:
    pool = (
        rule("a/", days=1),
        rule("", days=3),
        rule("b/", date_ms=(today + chance.randint(-1, 3)) * DAY_MS),
        rule("t/", tags={"k": "1"}, days=1),
        rule("", noncurrent_days=1),
        rule("", noncurrent_days=1, newer_noncurrent=2),
        rule("a/", noncurrent_days=2),
        rule("", marker=True),
        LifecycleRule("off", False, LifecycleFilter(""), days=1),
    )
    return tuple(chance.sample(pool, chance.choice((0, 1, 2, 3))))


class Was(NamedTuple):
    """A version as rules see it, and its place in the list."""

    entry: Entry
    tags: dict[str, str]
    newer: int
    """How many versions were newer."""
    successor_ms: int
    alone: bool

    @property
    def is_marker(self) -> bool:
        return bool(self.entry.version.delete_marker)


class Oracle:
    """The meaning of rules, written independently of the program."""

    def __init__(self, key: bytes, rules: tuple[LifecycleRule, ...]) -> None:
        self._rules = [one for one in rules if one.enabled and key.startswith(one.filter.prefix.encode())]

    @staticmethod
    def _midnight(since_ms: int, days: int) -> int:
        """The first midnight later than so many days after a moment."""
        found = since_ms - since_ms % DAY_MS
        while found <= since_ms + days * DAY_MS:
            found += DAY_MS
        return found

    def due_ms(self, was: Was) -> int | None:
        """From when on this version may expire; None: never."""
        found = []
        modified_ms = was.entry.version.modified_ms
        for one in self._rules:
            if one.filter.tags and (was.is_marker or any(was.tags.get(k) != v for k, v in one.filter.tags.items())):
                continue
            if was.newer == 0 and not was.is_marker:
                found += [self._midnight(modified_ms, one.days)] if one.days else []
                found += [one.date_ms] if one.date_ms else []
            elif was.newer > 0 and one.noncurrent_days and was.newer - 1 >= one.newer_noncurrent:
                found.append(self._midnight(max(modified_ms, was.successor_ms), one.noncurrent_days))
            if was.alone and was.is_marker:
                found += [self._midnight(modified_ms, 0)] if one.marker else []
                found += [self._midnight(modified_ms, one.days)] if one.days else []
                found += [one.date_ms] if one.date_ms else []
        return min(found, default=None)


class Watched:
    """Registers of a gateway. Changes that its worker proposes are judged, and the worker pauses before some of
    them."""

    def __init__(self, client: Any, play: Living) -> None:
        self._client = client
        self._play = play

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def read(self, name: RegisterName, **how: Any) -> Reading:
        reading: Reading = await self._client.read(name, **how)
        if looking.get() and name.table == Table.OBJECT:
            await self._play.meanwhile(name, reading.value)
        return reading

    async def change(self, name: RegisterName, update: Callable[[Value | None], Change | None], **how: Any) -> Outcome:
        judged = update
        if looking.get() and name.table == Table.OBJECT:

            def judged(value: Value | None) -> Change | None:
                change = update(value)
                if change is not None:
                    self._play.judge_change(name, value, change)
                return change

        outcome: Outcome = await self._client.change(name, judged, **how)
        return outcome


class Process(NamedTuple):
    """One life of a gateway."""

    plane: ObjectPlane
    objects: ObjectService
    directory: KnownBuckets
    worker: LifecycleWorker


class Living(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.world.overtake = overtake
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = False
        self.of_objects = True
        self.first_seeds = DISKS
        self.chance = random.Random(f"lifecycle {seed}")
        self.keys = keys_for(seed, *(bare(name).id for name in (PLAIN, VERSIONED)))
        self.rules: dict[str, list[tuple[float, tuple[LifecycleRule, ...]]]] = {}
        """Of each bucket: from when on which rules were in force."""
        for name in (PLAIN, VERSIONED):
            self.rules[name] = [(0.0, some_rules(self.chance, self.today()))]
        self.names = {
            f"{name} {key.decode()}": object_name(bare(name).id, bare(name).shard_numbers, key)
            for name in (PLAIN, VERSIONED)
            for key in LIVING_KEYS
        }
        self.last_seen = dict.fromkeys(self.names)
        self._pages: dict[bytes, bytes] = {}
        self._processes = Lives(self._make)
        self._still = self.chance.choice((0.0, 0.2, 0.5))
        self._ends = False
        self.expired = self.refused_changes = 0

    # --- clocks

    def now_ms(self) -> int:
        return EPOCH_MS + int(self.world.loop.time() * 1000)

    def today(self) -> int:
        return self.now_ms() // DAY_MS

    def begin_gateways(self) -> None:
        super().begin_gateways()
        for node in self.world.nodes.values():
            node.clock.skew_ms = self.chance.randint(-20, 20)
            if node.name in LIARS:
                node.clock.skew_ms = self.chance.choice((0, 5 * DAY_MS, 100 * DAY_MS, -5 * DAY_MS))
        for gateway in self.gateways:
            gateway.clock.skew_ms = self.chance.choice((0, 0, 40, -40, 3 * DAY_MS, -3 * DAY_MS))
        if any(abs(one.clock.skew_ms) > DAY_MS for one in (*self.world.nodes.values(), *self.gateways)):
            self.found.faults.append("clocks are days off")

    def reached_ms(self) -> int:
        """By the clocks of a majority of the storage nodes."""
        return max(node.clock.wall_ms() for node in self.world.nodes.values() if node.name not in LIARS)

    def _ahead_ms(self, gateway: Gateway) -> list[float | None]:
        own = gateway.clock.wall_ms()
        return [float(node.clock.wall_ms() - own) if node.up else None for node in self.world.nodes.values()]

    # --- gateways

    def bucket_of(self, name: str, plane: ObjectPlane) -> BucketRecord:
        """As it is now."""
        rules = self.rules[name][-1][1]
        found: Configuration = NOTHING.having(LIFECYCLE, Lifecycle(rules)) if rules else NOTHING
        if name == VERSIONED:
            found = found.having(VERSIONING, Versioning(ENABLED)).having(LOCK, ObjectLock())
        return plane.configurations.put(bare(name), found)

    def _make(self, gateway: Gateway) -> Process:
        agreed = AgreedTime(gateway.clock, lambda: self._ahead_ms(gateway))
        plane = make_plane(
            self.world,
            gateway,
            self.keys,
            registers=Watched(gateway.client, self),
            limits=ObjectLimits(lifecycle_day_ms=DAY_MS, lifecycle_per_s=1_000_000),
            agreed_ms=agreed.now_ms,
        )
        plane.pages = NotedPages(gateway.client, self._pages)
        directory = KnownBuckets(self, plane, (PLAIN, VERSIONED))
        worker = LifecycleWorker(plane, directory)  # type: ignore[arg-type]
        return Process(plane, ObjectService(plane), directory, worker)

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(CALLS):
            await asyncio.sleep(self.chance.uniform(0, 0.3))
            self.found.operations += 1
            kind, process = self.chance.random(), self._processes.of(gateway)
            process.plane.now_agreed_ms()
            try:
                if kind < 0.3:
                    await self._look(process)
                elif kind < 0.4:
                    await write_notes(process.plane, process.plane.notes)
                elif kind < 0.46:
                    self._new_rules()
                elif kind < 0.52:
                    await self._lose_a_row(process)
                else:
                    await self._change(process)
            except OutcomeUnknown:
                self.found.unknown += 1
            except StoragedError:
                self.found.refused += 1

    async def meanwhile(self, name: RegisterName, value: Value | None) -> None:
        """What happens to a key between the look at it and the change."""
        if self._ends or self.chance.random() >= self._still:
            return
        await asyncio.sleep(self.chance.uniform(0, CACHE_S))
        entries = self._entries(decode_record(value))
        if entries and self.chance.random() < 0.7:
            await asyncio.create_task(self._interfere(name, self.chance.choice(entries).name))

    async def _interfere(self, name: RegisterName, version: str) -> None:
        looking.set(False)  # in this task alone
        process = self._processes.of(self.chance.choice(self.gateways))
        bucket = self.bucket_of(PLAIN if name.scope == bare(PLAIN).id else VERSIONED, process.plane)
        with contextlib.suppress(StoragedError):
            if bucket.name == VERSIONED and self.chance.random() < 0.6:
                await process.objects.set_hold(bucket, name.key, self.chance.random() < 0.8, version_id=version)
            else:
                await self._put(process, bucket, name.key, {"k": "2"})

    async def _look(self, process: Process) -> None:
        looking.set(True)
        try:
            for _ in range(6):
                if not await process.worker.once():
                    break
        finally:
            looking.set(False)

    def _new_rules(self) -> None:
        name = self.chance.choice((PLAIN, VERSIONED))
        self.rules[name].append((self.world.loop.time(), some_rules(self.chance, self.today())))

    async def _lose_a_row(self, process: Process) -> None:
        bucket = self.bucket_of(self.chance.choice((PLAIN, VERSIONED)), process.plane)
        rows = [row async for row in every_due(process.plane, bucket)]
        if rows:
            self.found.faults.append("a row of the index is lost")
            await drop_row(process.plane, self.chance.choice(rows).name)

    async def _change(self, process: Process) -> None:
        name, key = self.chance.choice((PLAIN, VERSIONED, VERSIONED)), self.chance.choice(LIVING_KEYS)
        bucket, kind = await process.directory.get(name), self.chance.random()
        objects, tags = process.objects, {"k": self.chance.choice("12")}
        if kind < 0.6:
            await self._put(process, bucket, key, tags)
        elif kind < 0.75:
            await objects.delete(bucket, key)
        elif kind < 0.88:
            await objects.set_tags(bucket, key, tags)
        elif name == VERSIONED:
            await objects.set_hold(bucket, key, self.chance.random() < 0.4)

    async def _put(self, process: Process, bucket: BucketRecord, key: bytes, tags: dict[str, str]) -> None:
        lock = None
        if bucket.name == VERSIONED and self.chance.random() < 0.2:
            until_ms = process.plane.clock.wall_ms() + self.chance.choice((1, 2, 4)) * DAY_MS
            lock = Lock("GOVERNANCE", until_ms, False)
        meta = NewMeta(tags=tags, lock=lock)
        await process.objects.put(bucket, key, _pieces(b"body"), meta, BodyChecks(size=4), owner=OWNER)

    # --- what workers propose

    def judge_change(self, name: RegisterName, value: Value | None, change: Change) -> None:
        bucket = PLAIN if name.scope == bare(PLAIN).id else VERSIONED
        before = self._seen(bucket, name.key, decode_record(value))
        after = {
            entry.version.context_id
            for entry in self._entries(
                decode_object(change.body) if change.visibility != Visibility.TOMBSTONE else None
            )
        }
        gone = [was for was in before if was.entry.version.context_id not in after]
        added = after - {was.entry.version.context_id for was in before}
        expired = [*gone, *([before[0]] if added else [])]
        self.expired += len(expired)
        if added and (not before or before[0].is_marker or bucket == PLAIN):
            self.complain(f"a marker is added to {name.key!r} where there is no current version")
        now_s, reached_ms = self.world.loop.time(), self.reached_ms()
        since = [index for index, (from_s, _) in enumerate(self.rules[bucket]) if from_s <= now_s - CACHE_S - 0.001]
        known = [rules for _, rules in self.rules[bucket][since[-1] if since else 0 :]]
        for was in expired:
            alone = was._replace(alone=was.alone or len(gone) == len(before))
            dues = [Oracle(name.key, rules).due_ms(alone) for rules in known]
            due_ms = min((due for due in dues if due is not None), default=None)
            lock = was.entry.kept.lock
            if due_ms is None:
                self.complain(f"{name.key!r} of {bucket}: no rule in force names what expires: {was}")
            elif due_ms > reached_ms:
                self.complain(f"{name.key!r} of {bucket} expires {due_ms - reached_ms} ms early: {was}")
            if was in gone and lock is not None and (lock.hold or lock.until_ms > reached_ms):
                self.complain(f"{name.key!r} of {bucket}: a locked version expires: {was}")

    def _seen(self, bucket: str, key: bytes, record: ObjectRecord) -> list[Was]:
        entries = self._entries(record)
        found = []
        for index, entry in enumerate(entries):
            tags: dict[str, str] = {}
            if not entry.version.delete_marker:
                opened = open_version(Place(bare(bucket).id, key), entry.version, self.keys.key())
                tags = dict(opened.meta.tags)
            successor_ms = entries[index - 1].version.modified_ms if index else 0
            found.append(Was(entry, tags, index, successor_ms, len(entries) == 1))
        return found

    def _entries(self, record: ObjectRecord | None) -> list[Entry]:
        """All, newest first."""
        if record is None:
            return []
        found, refs, _ = Draft(record, Shelf()).layers()
        found, waiting = list(found), refs[::-1]
        while waiting:
            ref = waiting.pop()
            page = decode_page(self._pages[ref.hash], ref)
            found += entries_on(page)
            waiting += reversed(page.refs)
        return found

    # --- the end

    async def look_at_the_end(self, reader: Gateway) -> None:
        """Rules change no more. Gateways died with their notes."""
        self._ends = True
        for node in self.world.nodes.values():
            node.clock.skew_ms = 0
        reader.clock.skew_ms = 0
        process = self._processes.of(reader)
        for gateway in self.gateways:
            other = self._processes.of(gateway)
            if gateway.caller.alive and self.chance.random() < 0.5:
                with contextlib.suppress(StoragedError):
                    await write_notes(other.plane, other.plane.notes)
        looking.set(True)
        skewed_days = max(abs(gateway.clock.skew_ms) for gateway in self.gateways) // DAY_MS
        for _ in range(AFTER_DAYS + skewed_days + 1):
            await asyncio.sleep(DAY_MS / 1000)
            process.plane.now_agreed_ms()
            for _ in range(200):
                if not await process.worker.once():
                    break
            else:
                self.complain("a worker has work for ever")
            await write_notes(process.plane, process.plane.notes)
        self.found.done["expired"] = self.expired
        for name in (PLAIN, VERSIONED):
            await self._judge_bucket(process, name)

    async def _judge_bucket(self, process: Process, name: str) -> None:
        rules, plane = self.rules[name][-1][1], process.plane
        bucket = self.bucket_of(name, plane)
        for known in process.worker.document():
            if known["problem"]:
                self.complain(f"lifecycle has a problem after everything healed: {known['problem']}")
        by_ms = self.reached_ms() - DAY_MS - DAY_MS // 2
        for key in LIVING_KEYS:
            reading = await plane.registers.read(object_name(bucket.id, bucket.shard_numbers, key))
            for was in self._seen(name, key, decode_record(reading.value)):
                due_ms, lock = Oracle(key, rules).due_ms(was), was.entry.kept.lock
                locked = lock is not None and (lock.hold or lock.until_ms > by_ms) and (was.newer or name == PLAIN)
                if due_ms is not None and due_ms <= by_ms and not locked:
                    self.complain(f"{key!r} of {name} is due since {by_ms - due_ms} ms and stays: {was}")
        if not any(one.enabled for one in rules) and await read_state(plane, bucket) is not None:
            self.complain(f"{name} has no rules, and an index")
        query = PageQuery(Table.LIFECYCLE, bucket.id, bucket.shard_numbers)
        count = len([row async for row in every_row(plane.scanner, query)])
        if count > ROWS_MAX:
            self.complain(f"the index of {name} has {count} rows")
        if any(one.enabled for one in rules):
            through = self.reached_ms() // DAY_MS - 2
            stale = [row.day async for row in every_due(plane, bucket, through)]
            if stale:
                self.complain(f"rows of the index of {name} stay, whose day is over: {stale}, {through}")


def bare(name: str) -> BucketRecord:
    return BucketRecord(name, name.encode().ljust(16, b"."), OWNER, 1, "active", 2, "eu-fr-1")


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


def run_lifecycle(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    before = agreed_time.SAMPLES_S, walk.LATE_MS, walk.ROWS_A_PIECE
    agreed_time.SAMPLES_S, walk.LATE_MS, walk.ROWS_A_PIECE = SAMPLES_S, LATE_DAYS * DAY_MS, 3
    try:
        return play_out(lambda loop: Living(seed, loop, rules))
    finally:
        agreed_time.SAMPLES_S, walk.LATE_MS, walk.ROWS_A_PIECE = before
