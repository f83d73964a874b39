"""Lifecycle in the object plane: what is due goes, nothing goes early, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import pytest

from storaged.errors import NoSuchBucket, NoSuchKey, NoSuchUpload, ServiceUnavailable
from storaged.maintain.lifecycle import LifecycleWorker
from storaged.meta.names import RegisterName, Table, Visibility
from storaged.objects.api import BodyChecks, CompletedPart, NewMeta
from storaged.objects.code.history import Bounds
from storaged.objects.code.lifecycle import DAY_MS, due_day
from storaged.objects.code.lock import COMPLIANCE
from storaged.objects.configuration.kinds import ENABLED, LOCK, SUSPENDED, VERSIONING, ObjectLock, Versioning
from storaged.objects.configuration.lifecycle import LIFECYCLE, Lifecycle, LifecycleFilter, LifecycleRule
from storaged.objects.configuration.notification import NOTIFICATION, Notification, NotificationRule
from storaged.objects.event_delivery import EventDelivery
from storaged.objects.lifecycle import walk
from storaged.objects.lifecycle.index import every_due, read_state, write_notes
from storaged.objects.lifecycle.look import Judge, Looked, look_at
from storaged.objects.listing_types import ListedVersion
from storaged.objects.pending_events import EXPIRED
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, Lock, decode_object
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.write import versioned
from tests.doubles.clock import LoopClock
from tests.unit.test_objects_buckets import ANNE
from tests.unit.test_objects_outbox import HOOK, Hooks
from tests.worlds.objects import World, pieces

pytestmark = pytest.mark.virtual_time

FEW = Bounds(versions_max=3, versions_bytes_max=20_000, leaf_versions=2, refs_max=3, branch_refs=2)
HOUR_MS = 3_600_000


def rule(prefix: str = "", *, tags: Mapping[str, str] | None = None, **says: int) -> LifecycleRule:
    return LifecycleRule("r", True, LifecycleFilter(prefix, dict(tags or {})), **says)  # type: ignore[arg-type]


class Living:
    """A bucket with lifecycle rules, a gateway that serves it, and a worker."""

    def __init__(self) -> None:
        self.world = World(part_bytes_min=1)
        self.plane = self.world.plane()
        self.objects = ObjectService(self.plane)
        self.buckets = BucketService(self.plane)
        self.worker = self.new_worker()

    def new_worker(self, plane: ObjectPlane | None = None) -> LifecycleWorker:
        """Of another gateway, if ``plane`` is another one."""
        if plane is None:
            return LifecycleWorker(self.plane, self.buckets)
        return LifecycleWorker(plane, BucketService(plane))

    async def made(self, *rules: LifecycleRule, status: str = "", lock: bool = False) -> None:
        await self.buckets.create(ANNE, "b", region="eu-fr-1")
        if status:
            await self.buckets.configure(await self.bucket(), VERSIONING, lambda _: Versioning(status))
        if lock:
            await self.buckets.configure(await self.bucket(), LOCK, lambda _: ObjectLock())
        await self.rules(*rules)

    async def rules(self, *rules: LifecycleRule) -> None:
        value = Lifecycle(rules) if rules else None
        await self.buckets.configure(await self.bucket(), LIFECYCLE, lambda _: value)

    async def bucket(self) -> BucketRecord:
        return await self.buckets.get("b")

    @property
    def now_ms(self) -> int:
        return self.world.clock.wall_ms()

    def until(self, day: int, *, before_ms: int = 0) -> None:
        """The wall clock is at the beginning of a day, or a moment before it."""
        assert isinstance(self.world.clock, LoopClock)
        self.world.clock.wall = day * DAY_MS - before_ms
        self.world.clock.ahead_s += 5  # what was cached is old

    async def put(
        self,
        key: bytes = b"key",
        data: bytes = b"data",
        tags: Mapping[str, str] | None = None,
        lock: Lock | None = None,
    ) -> str:
        meta = NewMeta(tags=dict(tags or {}), lock=lock)
        result = await self.objects.put(
            await self.bucket(), key, pieces(data), meta, BodyChecks(size=len(data)), owner=ANNE.user_id
        )
        return result.version_id

    async def delete(self, key: bytes = b"key", version_id: str = "") -> None:
        await self.objects.delete(await self.bucket(), key, version_id=version_id)

    async def written(self) -> None:
        """The notes are in the index."""
        await write_notes(self.plane, self.plane.notes)

    async def works(self, worker: LifecycleWorker | None = None) -> None:
        """Until nothing is left to do today."""
        while await (worker or self.worker).once():
            pass

    async def keys(self) -> list[bytes]:
        return list((await self.objects.list_objects(await self.bucket())).keys)

    async def versions(self) -> list[ListedVersion]:
        return list((await self.objects.list_versions(await self.bucket())).versions)

    async def rows(self) -> list[tuple[int, tuple[bytes, ...]]]:
        return [(row.day, row.keys) async for row in every_due(self.plane, await self.bucket())]

    def interferes(self, what: Callable[[], Awaitable[object]]) -> None:
        """Happens when the worker next changes an object, between its promise and its accept."""

        async def between(name: RegisterName) -> None:
            if name.table != Table.OBJECT:
                self.world.ring.interfere = between
                return
            self.world.ring.interfere = None
            await what()

        self.world.ring.interfere = between


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioned, "BOUNDS", FEW)
    monkeypatch.setattr(walk, "ROWS_A_PIECE", 3)
    monkeypatch.setattr(walk, "VERSIONED_ROWS_A_PAGE", 2)
    monkeypatch.setattr(walk, "ROWS_A_PAGE", 2)


# --- what is due


async def test_an_object_goes_on_its_day_and_not_before() -> None:
    world = Living()
    await world.made(rule("logs/", days=3))
    made_ms = world.now_ms
    await world.put(b"logs/a")
    await world.put(b"kept")
    day = due_day(made_ms, 3)
    await world.works()
    world.until(day, before_ms=1000)
    await world.works()
    assert await world.keys() == [b"kept", b"logs/a"]
    world.until(day)
    await world.works()
    assert await world.keys() == [b"kept"]


async def test_objects_from_before_the_rules_are_found_by_one_walk() -> None:
    world = Living()
    await world.made()
    for number in range(10):
        await world.put(b"old/%d" % number)
    await world.put(b"other")
    await world.rules(rule("old/", days=1))
    assert await world.rows() == []
    await world.works()
    assert {key for _, keys in await world.rows() for key in keys} == {b"old/%d" % number for number in range(10)}
    world.until(due_day(world.now_ms, 2))
    await world.works()
    assert await world.keys() == [b"other"]
    assert await world.rows() == []
    (found,) = world.worker.document()
    assert (found["objects_walked"], found["expired"], found["problem"]) == (10, 10, "")


async def test_a_bucket_without_rules_pays_nothing() -> None:
    world = Living()
    await world.made()
    before = len(world.world.ring.values)
    await world.put()
    assert len(world.world.ring.values) == before + 1
    assert world.plane.notes.count == 0


async def test_a_put_with_rules_leaves_one_note_and_rows_hold_many() -> None:
    world = Living()
    await world.made(rule(days=1))
    await world.works()
    changes = len(world.world.ring.regardless)
    for number in range(20):
        await world.put(b"%d" % number)
    assert len(world.world.ring.regardless) == changes + 20
    assert world.plane.notes.count == 20
    await world.written()
    assert len(world.world.ring.regardless) == changes + 21
    ((_, keys),) = await world.rows()
    assert len(keys) == 20


async def test_an_object_that_was_written_again_counts_from_then() -> None:
    world = Living()
    await world.made(rule(days=3))
    await world.put()
    first = due_day(world.now_ms, 3)
    await world.written()
    world.until(first, before_ms=HOUR_MS)
    await world.put(data=b"new")
    second = due_day(world.now_ms, 3)
    await world.written()
    world.until(first)
    await world.works()
    assert await world.keys() == [b"key"]
    world.until(second)
    await world.works()
    assert await world.keys() == []


async def test_the_earliest_of_several_rules_counts() -> None:
    world = Living()
    await world.made(rule(days=30), rule("a", days=2), rule(days=5))
    await world.put(b"a")
    await world.put(b"b")
    now_ms = world.now_ms
    world.until(due_day(now_ms, 2))
    await world.works()
    assert await world.keys() == [b"b"]
    world.until(due_day(now_ms, 5))
    await world.works()
    assert await world.keys() == []


async def test_tags_and_sizes_as_they_are_now() -> None:
    world = Living()
    sized = LifecycleRule("s", True, LifecycleFilter("size/", larger_than=4, smaller_than=8), days=1)
    await world.made(rule("tag/", tags={"a": "1"}, days=1), sized)
    for name, tags in ((b"tag/yes", {"a": "1", "b": "2"}), (b"tag/no", {"a": "2"}), (b"tag/later", {})):
        await world.put(name, tags=tags)
    for size in (4, 5, 7, 8):
        await world.put(b"size/%d" % size, b"x" * size)
    await world.objects.set_tags(await world.bucket(), b"tag/yes", {"a": "3"})
    await world.objects.set_tags(await world.bucket(), b"tag/later", {"a": "1"})
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert await world.keys() == [b"size/4", b"size/8", b"tag/no", b"tag/yes"]


async def test_a_date() -> None:
    world = Living()
    today = world.now_ms // DAY_MS
    await world.made(rule(date_ms=(today + 2) * DAY_MS))
    await world.put(b"before")
    world.until(today + 2, before_ms=1000)
    await world.works()
    assert await world.keys() == [b"before"]
    world.until(today + 2)
    await world.works()
    assert await world.keys() == []
    await world.put(b"after")
    await world.written()
    world.until(today + 3)
    await world.works()
    assert await world.keys() == []


async def test_versions_get_a_marker_then_go_then_the_marker_goes() -> None:
    world = Living()
    await world.made(rule(days=1, noncurrent_days=2), rule(marker=True), status=ENABLED)
    await world.put()
    day = due_day(world.now_ms, 1)
    await world.written()
    world.until(day)
    await world.works()
    assert [one.delete_marker for one in await world.versions()] == [True, False]
    world.until(due_day(day * DAY_MS, 2), before_ms=1000)
    await world.works()
    assert len(await world.versions()) == 2
    world.until(due_day(day * DAY_MS + 1000, 2))
    await world.works()
    assert await world.versions() == []
    record = world.worker.document()[0]
    assert (record["expired"], record["noncurrent"], record["markers"]) == (1, 1, 1)


@pytest.mark.parametrize("kept", [0, 3])
async def test_noncurrent_versions_by_age_and_number(kept: int) -> None:
    world = Living()
    await world.made(rule(noncurrent_days=2, newer_noncurrent=kept), status=ENABLED)
    names = [await world.put(data=b"%d" % number) for number in range(12)]
    await world.written()
    world.until(due_day(world.now_ms, 2))
    await world.works()
    assert [one.version_id for one in await world.versions()] == names[-1 - kept :][::-1]
    # one more version pushes the oldest of them out as soon as that is old enough
    names.append(await world.put())
    await world.written()
    world.until(due_day(world.now_ms, 2))
    await world.works()
    assert [one.version_id for one in await world.versions()] == names[-1 - kept :][::-1]


async def test_many_noncurrent_versions_on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from storaged.objects.lifecycle import look

    monkeypatch.setattr(look, "VERSIONS_A_LOOK", 4)
    world = Living()
    await world.made(rule(noncurrent_days=1), status=ENABLED)
    for number in range(40):
        await world.put(data=b"%d" % number)
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert len(await world.versions()) == 1
    assert world.worker.document()[0]["noncurrent"] == 39


async def test_where_versioning_is_suspended_the_null_version_makes_way() -> None:
    world = Living()
    await world.made(rule(days=1), status=SUSPENDED)
    await world.put()
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert [(one.version_id, one.delete_marker) for one in await world.versions()] == [("null", True)]


async def test_uploads_by_rule_and_by_default() -> None:
    world = Living()
    await world.made(rule("a/", abort_days=2))
    bucket = await world.bucket()
    ids = {}
    for key in (b"a/1", b"b/1"):
        ids[key] = (await world.objects.create_upload(bucket, key, NewMeta(), owner=ANNE.user_id)).upload_id
    now_ms = world.now_ms
    world.until(due_day(now_ms, 2), before_ms=1000)
    await world.works()
    assert len((await world.objects.list_uploads(bucket))[0]) == 2
    world.until(due_day(now_ms, 2))
    await world.works()
    assert [one.key for one in (await world.objects.list_uploads(bucket))[0]] == [b"b/1"]
    world.until(due_day(now_ms, 31))
    await world.works()
    assert (await world.objects.list_uploads(bucket))[0] == []
    with pytest.raises(NoSuchUpload):
        await world.objects.complete(bucket, b"b/1", ids[b"b/1"], [CompletedPart(1, "")], owner=ANNE.user_id)


# --- races: the compare-and-set judges


async def due_object(world: Living, *rules: LifecycleRule, status: str = "", lock: bool = False) -> None:
    """An object that is due now, in the index."""
    await world.made(*rules or (rule(days=1),), status=status, lock=lock)
    await world.put(tags={"a": "1"})
    await world.written()
    await world.works()
    world.until(due_day(world.now_ms, 1))


async def test_a_put_between_promise_and_accept_wins() -> None:
    world = Living()
    await due_object(world)
    world.interferes(lambda: world.put(data=b"new"))
    await world.works()
    assert await world.keys() == [b"key"]


async def test_tags_that_change_between_promise_and_accept_count() -> None:
    world = Living()
    await due_object(world, rule(tags={"a": "1"}, days=1))

    async def changes() -> None:
        await world.objects.set_tags(await world.bucket(), b"key", {"a": "2"})

    world.interferes(changes)
    await world.works()
    assert await world.keys() == [b"key"]


async def test_a_hold_that_comes_between_promise_and_accept_holds() -> None:
    world = Living()
    await due_object(world, rule(noncurrent_days=1), status=ENABLED, lock=True)
    (old,) = await world.versions()
    await world.put(data=b"new")
    await world.written()
    world.until(due_day(world.now_ms, 1))

    async def holds() -> None:
        await world.objects.set_hold(await world.bucket(), b"key", True, version_id=old.version_id)

    world.interferes(holds)
    await world.works()
    assert len(await world.versions()) == 2
    # when the hold ends it goes
    await world.objects.set_hold(await world.bucket(), b"key", False, version_id=old.version_id)
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert len(await world.versions()) == 1


async def test_a_locked_version_stays_until_its_retention_ends() -> None:
    world = Living()
    await world.made(rule(noncurrent_days=1), status=ENABLED, lock=True)
    until_ms = world.now_ms + 5 * DAY_MS
    await world.put(lock=Lock(COMPLIANCE, until_ms))
    await world.put(data=b"new")
    await world.written()
    for day in range(due_day(world.now_ms, 1), until_ms // DAY_MS + 1):
        world.until(day)
        await world.works()
        assert len(await world.versions()) == 2
    world.until(until_ms // DAY_MS + 1)
    await world.works()
    assert len(await world.versions()) == 1


async def test_rules_that_are_taken_back_count_at_once() -> None:
    world = Living()
    await due_object(world)
    world.interferes(world.rules)  # within the change: this gateway knows it at once
    world.interferes(lambda: _forced(world))
    await world.works()
    assert await world.keys() == [b"key"]
    await world.works()
    assert await world.rows() == []


async def _forced(world: Living) -> None:
    """The rules go, and the object changes, so that the update runs again."""
    await world.rules()
    await world.objects.set_tags(await world.bucket(), b"key", {"a": "3"})


async def test_versioning_that_comes_between_keeps_the_data() -> None:
    world = Living()
    await due_object(world)

    async def changes() -> None:
        await world.buckets.configure(await world.bucket(), VERSIONING, lambda _: Versioning(ENABLED))
        await world.objects.set_tags(await world.bucket(), b"key", {"a": "3"})

    world.interferes(changes)
    await world.works()
    found = await world.versions()
    assert [one.delete_marker for one in found] == [True, False]


async def test_newer_versions_that_are_deleted_meanwhile_keep_an_older_one() -> None:
    world = Living()
    await world.made(rule(noncurrent_days=1, newer_noncurrent=2), status=ENABLED)
    names = [await world.put(data=b"%d" % number) for number in range(4)]
    await world.written()
    world.until(due_day(world.now_ms, 1))
    world.interferes(lambda: world.delete(version_id=names[2]))
    await world.works()
    assert [one.version_id for one in await world.versions()] == [names[3], names[1], names[0]]


async def test_two_workers_at_once_do_it_once() -> None:
    world = Living()
    await world.made(rule(days=1, noncurrent_days=1), status=ENABLED)
    for number in range(6):
        await world.put(b"%d" % number)
    await world.put(b"kept")
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.delete(b"kept")
    await world.put(b"kept")
    other = world.new_worker(world.world.plane())
    await asyncio.gather(world.works(), world.works(other))
    found = await world.versions()
    assert sum(one.delete_marker for one in found) == 7
    assert [one.key for one in found if one.latest and not one.delete_marker] == [b"kept"]


async def dies_at(world: Living, fails_at: int) -> bool:
    """The worker dies at this change of a register, with its notes. False: it made fewer."""
    change, count = world.world.ring.change, 0

    async def dying(*args: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == fails_at:
            raise asyncio.CancelledError
        return await change(*args, **named)  # type: ignore[arg-type]

    world.world.ring.change = dying  # type: ignore[method-assign, assignment]
    try:
        await world.works()
    except asyncio.CancelledError:
        world.plane.notes.take()
        return True
    finally:
        world.world.ring.change = change  # type: ignore[method-assign]
    return False


async def test_a_worker_that_dies_anywhere_leaves_all_to_the_next() -> None:
    died, fails_at = True, 0
    while died:
        fails_at += 1
        world = Living()
        await world.made(status=ENABLED)
        for number in range(5):
            await world.put(b"%d" % number)
        await world.put(b"kept/1")
        await world.rules(*(rule(str(number), days=1) for number in range(5)))
        world.until(due_day(world.now_ms, 1))
        died = await dies_at(world, fails_at)
        await world.works(world.new_worker())
        latest = {one.key: one.delete_marker for one in await world.versions() if one.latest}
        assert latest == {b"0": True, b"1": True, b"2": True, b"3": True, b"4": True, b"kept/1": False}, fails_at
        assert len(await world.versions()) == 11, "no key got two markers"
    assert fails_at > 10


async def test_notes_that_are_lost_delay_and_the_next_walk_finds_them() -> None:
    world = Living()
    await world.made(rule(days=1))
    await world.works()
    await world.put()
    world.plane.notes.take()
    day = world.now_ms // DAY_MS
    for later in range(1, 8):
        world.until(day + later)
        await world.works()
        assert await world.keys() == [b"key"]
    world.until(day + 8)
    await world.works()
    assert await world.keys() == []


async def test_rows_do_not_pile_up() -> None:
    """A walk writes the index anew, and what was there before goes."""
    world = Living()
    await world.made(rule(days=300))
    await world.put()
    await world.written()
    for days in range(0, 90, 8):
        world.until(world.now_ms // DAY_MS + days)
        await world.works()
        assert len(await world.rows()) <= 2


# --- time


async def test_without_an_agreed_time_nothing_goes() -> None:
    world = Living()
    await due_object(world)
    world.plane.agreed_ms = lambda: None
    await world.works()
    assert await world.keys() == [b"key"]
    assert "clocks" in world.worker.document()[0]["problem"]


async def test_a_clock_that_jumps_ahead_deletes_nothing_early() -> None:
    world = Living()
    await world.made(rule(days=3))
    await world.put()
    await world.written()
    truth = world.now_ms
    world.plane.agreed_ms = lambda: truth
    world.until(due_day(world.now_ms, 300))
    upload = await world.objects.create_upload(await world.bucket(), b"u", NewMeta(), owner=ANNE.user_id)
    await world.works()
    assert await world.keys() == [b"key"]
    assert upload.upload_id in {one.upload_id for one in (await world.objects.list_uploads(await world.bucket()))[0]}


# --- damage


async def test_a_false_index_costs_looks_and_deletes_nothing() -> None:
    world = Living()
    await world.made(rule(days=30))
    await world.put()
    await world.written()
    bucket, today = await world.bucket(), world.now_ms // DAY_MS
    world.plane.notes.add(bucket, b"key", today)
    world.plane.notes.add(bucket, b"never was", today)
    await world.written()
    for name in list(world.world.ring.values):
        if name.table == Table.LIFECYCLE and len(name.key) > 1:
            value = world.world.ring.values[name]
            world.world.ring.values[name._replace(key=b"d\0\0\0\0" + name.key[5:])] = msgspec.structs.replace(value)
            world.world.ring.values[name._replace(key=b"d\0\0\0\1" + name.key[5:])] = msgspec.structs.replace(
                value, body=b"\xff"
            )
    await world.works()
    assert await world.keys() == [b"key"]
    world.until(today + 31)
    await world.works()
    assert await world.keys() == []


async def test_a_key_that_cannot_be_read_stays_and_the_others_go() -> None:
    world = Living()
    await world.made(rule(days=1))
    for key in (b"a", b"b", b"c"):
        await world.put(key)
    await world.written()
    for name, value in list(world.world.ring.values.items()):
        if name.table == Table.OBJECT and name.key == b"b":
            world.world.ring.values[name] = msgspec.structs.replace(value, body=b"\xc1")
    world.until(due_day(world.now_ms, 1))
    await world.works()
    left = [
        name.key
        for name, value in world.world.ring.values.items()
        if name.table == Table.OBJECT and value.visibility != Visibility.TOMBSTONE
    ]
    assert left == [b"b"]


async def test_keys_without_a_majority_are_looked_at_on_the_next_day() -> None:
    world = Living()
    await due_object(world)
    read = world.world.ring.read

    async def failing(name: RegisterName, **named: object) -> object:
        if name.table == Table.OBJECT:
            raise ServiceUnavailable("no majority")
        return await read(name, **named)  # type: ignore[arg-type]

    world.world.ring.read = failing  # type: ignore[method-assign, assignment]
    await world.works()
    world.world.ring.read = read  # type: ignore[method-assign]
    assert await world.keys() == [b"key"]
    world.until(world.now_ms // DAY_MS + 1)
    await world.works()
    assert await world.keys() == []


async def test_a_fault_of_a_look_ends_neither_the_worker_nor_other_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Living()
    await world.made(rule(days=1))
    for key in (b"a", b"b"):
        await world.put(key)
    await world.written()
    world.until(due_day(world.now_ms, 1))

    async def faulty(plane: ObjectPlane, judge: Judge, bucket: BucketRecord, key: bytes) -> Looked:
        if key == b"a":
            raise RuntimeError("a fault")
        return await look_at(plane, judge, bucket, key)

    with monkeypatch.context() as patched:
        patched.setattr("storaged.maintain.lifecycle.look_at", faulty)
        await world.works()
    assert await world.keys() == [b"a"]
    world.until(world.now_ms // DAY_MS + 1)
    await world.works()
    assert await world.keys() == []


async def test_a_bucket_that_is_deleted_takes_its_index_with_it() -> None:
    world = Living()
    await world.made(rule(days=300))
    await world.put()
    await world.works()
    assert await world.rows()
    await world.delete()
    bucket = await world.bucket()
    await world.buckets.delete(bucket)
    await world.written()  # notes of a bucket that is gone are dropped
    with pytest.raises(NoSuchBucket):
        await world.bucket()
    rows = [
        value.visibility
        for name, value in world.world.ring.values.items()
        if name.table == Table.LIFECYCLE and name.scope == bucket.id
    ]
    assert set(rows) == {Visibility.TOMBSTONE}
    await world.works()


async def test_an_index_that_is_gone_is_made_again() -> None:
    from storaged.objects.lifecycle.index import drop_index

    world = Living()
    await world.made(rule(days=1))
    await world.put()
    await world.works()
    await drop_index(world.plane, await world.bucket())
    world.plane.notes.take()
    await world.works()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    with pytest.raises(NoSuchKey):
        await world.objects.head(await world.bucket(), b"key")


async def test_an_index_goes_with_its_rules_although_its_worker_has_ended() -> None:
    world = Living()
    await world.made(rule(days=30))
    await world.put()
    await world.works()
    assert await world.rows()
    await world.rules()
    worker = world.new_worker()
    await world.works(worker)
    assert await world.rows() == []
    assert await read_state(world.plane, await world.bucket()) is None
    await world.rules(rule(days=30))
    await world.works(worker)
    assert await world.rows(), "rules that come again are noticed"
    await world.rules()
    await world.works(worker)
    assert await world.rows() == []


# --- events


def outbox_of(world: Living) -> int:
    """How many events the records of all keys have."""
    return sum(
        len(record.history.outbox)
        for name, value in world.world.ring.values.items()
        if name.table == Table.OBJECT and value.body and (record := decode_object(value.body)).history is not None
    )


@pytest.mark.parametrize("status", ["", ENABLED])
async def test_what_expires_makes_events(status: str) -> None:
    world = Living()
    await world.made(rule(days=1), status=status)
    asked = NotificationRule("n", "arn:storaged:sqs::hook:webhook", (f"{EXPIRED}:*",))
    await world.buckets.configure(await world.bucket(), NOTIFICATION, lambda _: Notification((asked,)))
    await world.put()
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert await world.keys() == []
    assert outbox_of(world) == 1


async def test_many_versions_with_events_go_as_the_outbox_has_room() -> None:
    world = Living()
    await world.made(rule(noncurrent_days=1), status=ENABLED)
    asked = NotificationRule("n", "arn:storaged:sqs::hook:webhook", (f"{EXPIRED}:*",))
    await world.buckets.configure(await world.bucket(), NOTIFICATION, lambda _: Notification((asked,)))
    for number in range(45):
        await world.put(data=b"%d" % number)
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert outbox_of(world) == 32
    assert len(await world.versions()) == 45 - 32
    await world.buckets.configure(await world.bucket(), NOTIFICATION, lambda _: None)
    world.until(world.now_ms // DAY_MS + 1)
    await world.works()
    assert len(await world.versions()) == 1


async def test_many_versions_with_events_go_in_one_day_where_the_destination_takes_them() -> None:
    world = Living()
    await world.made(rule(noncurrent_days=1), status=ENABLED)
    hooks, asked = Hooks(), NotificationRule("n", HOOK, (f"{EXPIRED}:*",))
    await world.buckets.configure(await world.bucket(), NOTIFICATION, lambda _: Notification((asked,)))
    delivery = EventDelivery(world.plane, world.buckets, hooks, "eu-fr-1")
    world.plane.on_events = delivery.soon
    delivers = asyncio.create_task(delivery.run())
    for number in range(100):
        await world.put(data=b"%d" % number)
    await world.written()
    world.until(due_day(world.now_ms, 1))
    await world.works()
    assert len(await world.versions()) == 1
    async with asyncio.timeout(60):
        while outbox_of(world):  # noqa: ASYNC110 - the delivery sets no event
            await asyncio.sleep(0.1)
    delivers.cancel()
    await asyncio.gather(delivers, return_exceptions=True)
    assert len(hooks.sequencers()) == len({*hooks.sequencers()}) == 99


# --- at random


@pytest.mark.parametrize("seed", range(12))
async def test_at_random_nothing_goes_early_and_all_goes_in_the_end(seed: int) -> None:
    """Days pass, versions are written, deleted, locked and unlocked, two workers work at once and one of them dies.
    Versions are followed by their ids: none goes before its time by the rules, unless its client deleted it.
    """
    draw = random.Random(seed)
    world = Living()
    status = draw.choice([ENABLED, SUSPENDED])
    await world.made(
        rule(days=3, noncurrent_days=2, newer_noncurrent=draw.choice([0, 2])), status=status, lock=status == ENABLED
    )
    tags_rule = rule("t", tags={"go": "1"}, days=1)
    keys, born, gone_by_client = [b"a", b"b", b"t"], dict[tuple[bytes, str], int](), set[tuple[bytes, str]]()
    holds = set[tuple[bytes, str]]()
    workers = [world.worker, world.new_worker(world.world.plane())]
    for _ in range(60):
        key = draw.choice(keys)
        match draw.randrange(7):
            case 0 | 1:
                await world.put(key, tags={"go": draw.choice("12")})
            case 2:
                await world.delete(key)
            case 3 if status == ENABLED:
                for one in await world.versions():
                    if not one.delete_marker and draw.random() < 0.2:
                        hold = (one.key, one.version_id) not in holds
                        await world.objects.set_hold(await world.bucket(), one.key, hold, version_id=one.version_id)
                        (holds.add if hold else holds.discard)((one.key, one.version_id))
            case 4:
                world.until(world.now_ms // DAY_MS + 1)
            case 5:
                await world.written()
            case 6:
                task = asyncio.create_task(world.works(draw.choice(workers)))
                await asyncio.sleep(draw.random() * 0.05)
                if draw.random() < 0.3:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                else:
                    await asyncio.gather(task, world.works(draw.choice(workers)))
        now = {(one.key, one.version_id): one for one in await world.versions() if one.version_id != "null"}
        for name in born.keys() - now.keys() - gone_by_client:
            assert world.now_ms - born[name] >= 2 * DAY_MS, f"{name} went early"
            assert name not in holds, f"{name} has a hold"
            gone_by_client.add(name)
        for name, one in now.items():
            born.setdefault(name, one.modified_ms)
    for one in holds:
        await world.objects.set_hold(await world.bucket(), one[0], False, version_id=one[1])
    await world.rules(rule(days=1, noncurrent_days=1), rule(marker=True), tags_rule)
    for _ in range(8):
        await world.written()
        world.until(world.now_ms // DAY_MS + 2)
        await world.works()
    assert await world.versions() == []
