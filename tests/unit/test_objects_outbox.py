"""Events in the records of keys, and their delivery, in the object plane."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from storaged.errors import SlowDown, StoragedError
from storaged.meta.names import RegisterName, Table, Value, Visibility, event_name, object_name
from storaged.objects.api import BodyChecks, CompletedPart, CopySource, NewMeta, Renaming, WriteConditions
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, SUSPENDED, VERSIONING, Versioning
from storaged.objects.configuration.notification import NOTIFICATION, Notification, NotificationRule
from storaged.objects.destinations import DeliveryFailed
from storaged.objects.etags import ANY
from storaged.objects.event_delivery import DOWN_S, FRESH_MS, EventDelivery
from storaged.objects.pending_events import CREATED, EXPIRED, REMOVED, Origin
from storaged.objects.records import BucketRecord, decode_object
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.write import outbox
from storaged.objects.write import rename as renames
from storaged.objects.write.departures import end_old
from tests.doubles.clock import LoopClock
from tests.worlds.objects import OWNER, World, bucket_of, pieces

pytestmark = pytest.mark.virtual_time

HOOK, OTHER = "arn:storaged:sqs::hook:webhook", "arn:storaged:sqs::other:webhook"
PUT = Origin(f"{CREATED}:Put", "someone", "10.0.0.1", "R1")
COPY = Origin(f"{CREATED}:Copy", "someone", "10.0.0.1", "R3")
DELETE = Origin(REMOVED, "someone", "10.0.0.1", "R2")
ALL = NotificationRule("all", HOOK, (f"{CREATED}:*", f"{REMOVED}:*", f"{EXPIRED}:*"))


class Hooks:
    """Destinations in memory."""

    def __init__(self) -> None:
        self.got: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.down: set[str] = set()
        self.lost_answers = 0
        """So many more events arrive without an acknowledgement."""

    def knows(self, arn: str) -> bool:
        return arn.startswith("arn:storaged:sqs::")

    async def send(self, arn: str, body: bytes) -> None:
        await asyncio.sleep(0.001)
        if arn in self.down:
            raise DeliveryFailed("down")
        self.got[arn] += json.loads(body)["Records"]
        if self.lost_answers:
            self.lost_answers -= 1
            raise DeliveryFailed("no answer")

    def names(self, arn: str = HOOK) -> list[tuple[str, str]]:
        return [(record["eventName"], record["s3"]["object"]["key"]) for record in self.got[arn]]

    def sequencers(self, arn: str = HOOK) -> list[str]:
        return [record["s3"]["object"]["sequencer"] for record in self.got[arn]]


class Directory(BucketService):
    """The buckets of a test, without registers."""

    def __init__(self, made: Made) -> None:
        super().__init__(made.plane)
        self._made = made

    async def get(self, name: str) -> BucketRecord:
        return self._made.bucket

    async def configuration(self, bucket: BucketRecord) -> Any:
        return self.configuration_of(self._made.bucket)

    async def every_bucket(self) -> list[BucketRecord]:
        return [self._made.bucket]


class Made:
    """A bucket with notifications."""

    def __init__(self, *rules: NotificationRule, status: str = "") -> None:
        self.world = World(part_bytes_min=1000)
        self.plane = self.world.plane()
        self.objects = ObjectService(self.plane)
        self.bare = bucket_of(self.world)
        self.status = status
        self.set(*(rules or (ALL,)))
        self.hooks = Hooks()
        self.delivery = self.another()

    def set(self, *rules: NotificationRule) -> None:
        configuration = NOTHING.having(NOTIFICATION, Notification(rules))
        if self.status:
            configuration = configuration.having(VERSIONING, Versioning(self.status))
        self.bucket = self.plane.configurations.put(self.bare, configuration)

    def another(self) -> EventDelivery:
        """The delivery of another process."""
        return EventDelivery(self.plane, Directory(self), self.hooks, "eu-fr-1")

    async def put(self, key: bytes = b"key", data: bytes = b"data", **more: Any) -> Any:
        meta = NewMeta(origin=PUT)
        checks = BodyChecks(size=len(data))
        return await self.objects.put(self.bucket, key, pieces(data), meta, checks, owner=OWNER, **more)

    async def delete(self, key: bytes = b"key", **more: Any) -> Any:
        return await self.objects.delete(self.bucket, key, origin=DELETE, **more)

    def name(self, key: bytes = b"key") -> RegisterName:
        return object_name(self.bucket.id, self.bucket.shard_numbers, key)

    def value(self, name: RegisterName) -> Value | None:
        return self.world.ring.values.get(name)

    def pending(self, key: bytes = b"key") -> int:
        value = self.value(self.name(key))
        history = decode_object(value.body).history if value is not None and value.body else None
        return len(history.outbox) if history is not None else 0

    def noted(self) -> set[bytes]:
        """The keys in pointers."""
        found: set[bytes] = set()
        for name, value in self.world.ring.values.items():
            if name.table == Table.EVENT:
                found |= outbox.decode_keys(value).stamps.keys()
        return found

    async def sweep(self) -> int:
        return await self.another().sweep(fresh_ms=0)


@pytest.fixture(params=["", ENABLED, SUSPENDED])
def made(request: pytest.FixtureRequest) -> Made:
    return Made(status=request.param)


async def test_events_enter_the_record_with_their_change_and_leave_it_when_they_are_acknowledged(made: Made) -> None:
    result = await made.put(data=b"x" * 40_000)
    await made.put(b"tiny")
    assert (made.pending(), made.pending(b"tiny")) == (1, 1)
    assert made.noted() == {b"key", b"tiny"}
    assert await made.sweep() == 0
    assert (made.pending(), made.pending(b"tiny"), made.noted()) == (0, 0, set())
    assert sorted(made.hooks.names()) == [("ObjectCreated:Put", "key"), ("ObjectCreated:Put", "tiny")]
    record = next(one for one in made.hooks.got[HOOK] if one["s3"]["object"]["key"] == "key")
    thing = record["s3"]["object"]
    assert (thing["size"], thing["eTag"]) == (40_000, result.etag)
    assert thing.get("versionId", "") == result.version_id
    assert record["userIdentity"] == {"principalId": "someone"}
    assert record["requestParameters"] == {"sourceIPAddress": "10.0.0.1"}
    assert record["s3"]["configurationId"] == "all"
    stream = await made.objects.get(made.bucket, b"key")
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == b"x" * 40_000
    await stream.close()


async def test_small_copies_stay_while_events_come_and_go() -> None:
    made = Made()
    for number in range(3):
        await made.put(data=b"%d" % number * 4000)
        value = made.value(made.name())
        assert value is not None
        assert value.payload
    await made.sweep()
    stream = await made.objects.get(made.bucket, b"key")
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == b"2" * 4000
    await made.put(data=b"x" * 40_000)
    value = made.value(made.name())
    assert value is not None
    assert value.payload == b"", "the copies went with their version"


async def test_a_deleted_key_keeps_its_events_and_is_gone_after_them(made: Made) -> None:
    await made.put()
    await made.delete()
    value = made.value(made.name())
    assert value is not None
    assert value.visibility == Visibility.HIDDEN
    with pytest.raises(StoragedError):
        await made.objects.head(made.bucket, b"key")
    assert not (await made.objects.list_objects(made.bucket)).keys
    assert await made.sweep() == 0
    removed = "ObjectRemoved:DeleteMarkerCreated" if made.status else "ObjectRemoved:Delete"
    assert made.hooks.names() == [("ObjectCreated:Put", "key"), (removed, "key")]
    first, second = made.hooks.sequencers()
    assert first < second
    value = made.value(made.name())
    assert value is not None
    assert (value.visibility == Visibility.TOMBSTONE) == (not made.status)


async def test_what_changes_nothing_has_no_event(made: Made) -> None:
    if not made.status:
        await made.delete()
    with pytest.raises(StoragedError):
        await made.put(conditions=WriteConditions(if_match=ANY))
    assert (made.pending(), made.noted()) == (0, set())


async def test_copies_and_completed_uploads_have_events(made: Made) -> None:
    await made.put()
    await made.objects.copy(
        CopySource(made.bucket, b"key"),
        made.bucket,
        b"copy",
        owner=OWNER,
        meta=None,
        origin=Origin(f"{CREATED}:Copy"),
    )
    upload = await made.objects.create_upload(made.bucket, b"up", NewMeta(), owner=OWNER)
    part = await made.objects.put_part(
        made.bucket, b"up", upload.upload_id, 1, pieces(b"p" * 2000), BodyChecks(size=2000)
    )
    done = await made.objects.complete(
        made.bucket,
        b"up",
        upload.upload_id,
        [CompletedPart(1, part.etag)],
        owner=OWNER,
        origin=Origin(f"{CREATED}:CompleteMultipartUpload"),
    )
    assert await made.sweep() == 0
    assert sorted(made.hooks.names()) == [
        ("ObjectCreated:CompleteMultipartUpload", "up"),
        ("ObjectCreated:Copy", "copy"),
        ("ObjectCreated:Put", "key"),
    ]
    thing = next(one["s3"]["object"] for one in made.hooks.got[HOOK] if one["s3"]["object"]["key"] == "up")
    assert (thing["eTag"], thing["size"]) == (done.etag, 2000)


async def test_events_come_in_order_and_once_more_when_an_acknowledgement_is_lost(made: Made) -> None:
    for number in range(5):
        await made.put(data=b"%d" % number)
    made.hooks.lost_answers = 1
    assert await made.sweep() == 1
    assert made.pending() == 5, "none is removed before its acknowledgement"
    assert await made.sweep() == 0
    found = made.hooks.sequencers()
    assert len(found) == 6
    assert found[0] == found[1]
    assert found[1:] == sorted(set(found)), "a duplicate has the sequencer of the first"


async def test_a_destination_that_is_down_delays_its_own_events_alone() -> None:
    both = (ALL, NotificationRule("others", OTHER, (f"{CREATED}:Put",)))
    made = Made(*both)
    made.hooks.down = {HOOK}
    delivery = made.another()
    for _ in range(2):
        await made.put()
    assert await delivery.sweep(fresh_ms=0) == 1
    assert (len(made.hooks.got[OTHER]), made.pending()) == (2, 2)
    made.hooks.down = set()
    assert await delivery.sweep(fresh_ms=0) == 1, "it is not asked again at once"
    await asyncio.sleep(DOWN_S)
    assert await delivery.sweep(fresh_ms=0) == 0
    assert [one[:16] for one in made.hooks.sequencers()] == [one[:16] for one in made.hooks.sequencers(OTHER)]


async def test_a_full_outbox_refuses_changes_and_loses_nothing(made: Made) -> None:
    for _ in range(outbox.PENDING_MAX):
        await made.put()
    with pytest.raises(SlowDown):
        await made.put(data=b"one too many")
    with pytest.raises(SlowDown):
        await made.delete()
    assert made.pending() == outbox.PENDING_MAX
    assert await made.sweep() == 0
    await made.delete()
    assert len(made.hooks.got[HOOK]) == outbox.PENDING_MAX


async def test_rules_choose_by_event_prefix_and_suffix() -> None:
    made = Made(
        NotificationRule("images", HOOK, (f"{CREATED}:*",), "in/", ".png"),
        NotificationRule("gone", OTHER, (f"{REMOVED}:Delete",)),
    )
    for key in (b"in/a.png", b"in/a.txt", b"a.png"):
        await made.put(key)
        await made.delete(key)
    assert await made.sweep() == 0
    assert made.hooks.names() == [("ObjectCreated:Put", "in%2Fa.png")]
    assert sorted(key for _, key in made.hooks.names(OTHER)) == ["a.png", "in%2Fa.png", "in%2Fa.txt"]


async def test_events_of_a_destination_that_the_bucket_names_no_more_are_given_up() -> None:
    made = Made()
    made.hooks.down = {HOOK}
    await made.put()
    await made.put(b"gone")
    await made.delete(b"gone")
    assert await made.sweep() == 2
    made.set()
    await made.put(data=b"later")
    assert (made.pending(), await made.sweep(), made.noted()) == (1, 0, set())
    value = made.value(made.name(b"gone"))
    assert value is not None
    assert value.visibility == Visibility.TOMBSTONE
    assert made.hooks.got[HOOK] == []


async def test_locks_tags_and_versions_leave_the_outbox_alone(made: Made) -> None:
    await made.put()
    await made.objects.set_tags(made.bucket, b"key", {"a": "b"})
    assert made.pending() == 1
    info = await made.objects.head(made.bucket, b"key")
    assert info.tags == {"a": "b"}
    page = await made.objects.list_versions(made.bucket)
    assert [version.version_id for version in page.versions] == [info.version_id or "null"]


async def test_without_versioning_a_key_with_events_has_one_version() -> None:
    made = Made()
    for number in range(3):
        await made.put(data=b"%d" % number)
    record = decode_record(made.value(made.name()))
    assert len(record.versions) == 1
    page = await made.objects.list_versions(made.bucket)
    assert [version.version_id for version in page.versions] == ["null"]
    await made.sweep()
    assert decode_record(made.value(made.name())).history is None


async def test_a_process_delivers_the_events_of_its_own_changes_at_once(made: Made) -> None:
    made.plane.on_events = made.delivery.soon
    running = asyncio.create_task(made.delivery.run())
    for number in range(20):
        await made.put(b"key %d" % (number % 7))
    async with asyncio.timeout(60):
        while made.noted():  # noqa: ASYNC110 - the delivery tells nobody
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(made.hooks.got[HOOK]) == 20
    assert made.delivery.counts.delivered == 20


@pytest.mark.parametrize("what", ["nothing", "deleted", "replaced", "renamed"])
async def test_events_of_a_rename_that_died_are_told_once_and_its_rows_go(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``what`` becomes of the object under its new name before the old one has gone."""

    async def dies(*_: Any) -> None:
        raise asyncio.CancelledError

    async def rename(source: bytes, key: bytes) -> None:
        await made.objects.rename(made.bucket, Renaming(source, key, created=COPY, removed=DELETE))

    made = Made()
    await made.put(b"a")
    spawn = made.plane.background.spawn
    with monkeypatch.context() as patched:
        patched.setattr(renames, "finish", dies)
        patched.setattr(made.plane.background, "spawn", lambda work: work.close() is None)
        with pytest.raises(asyncio.CancelledError):
            await rename(b"a", b"b")
    assert made.plane.background.spawn == spawn
    wanted = [("ObjectCreated:Put", "a"), ("ObjectCreated:Copy", "b"), ("ObjectRemoved:Delete", "a")]
    if what == "deleted":
        await made.delete(b"b")
        wanted.append(("ObjectRemoved:Delete", "b"))
    elif what == "replaced":
        await made.put(b"b")
        wanted.append(("ObjectCreated:Put", "b"))
    elif what == "renamed":
        await rename(b"b", b"c")
        wanted += [("ObjectCreated:Copy", "c"), ("ObjectRemoved:Delete", "b")]
    await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
    await made.plane.background.settle()
    while await made.sweep():
        continue
    assert sorted(made.hooks.names()) == sorted(wanted)
    gone = [b"a"] if what in ("nothing", "replaced") else [b"a", b"b"]
    for key in gone:
        value = made.value(made.name(key))
        assert value is not None
        assert value.visibility == Visibility.TOMBSTONE


async def test_a_pointer_stays_while_a_change_is_under_way() -> None:
    """The change has noted its key and not accepted yet: what a look finds empty may not be forgotten for long."""
    made = Made()
    name = made.name()
    await outbox.note(made.plane, name)
    stamp = outbox.decode_keys(made.value(event_name(name))).stamps[b"key"]
    await outbox.note(made.plane, name)
    assert await outbox.forget(made.plane, name, stamp), "nothing is in the outbox"
    assert made.noted() == {b"key"}, "but another change has stamped the pointer since"
    stamp = outbox.decode_keys(made.value(event_name(name))).stamps[b"key"]
    await outbox.forget(made.plane, name, stamp)
    assert made.noted() == set()


async def test_a_pointer_that_cannot_be_read_is_never_replaced() -> None:
    made = Made()
    name = event_name(made.name())
    made.world.ring.values[name] = Value(1, b"o", Visibility.LIVE, b"\xff")
    with pytest.raises(StoragedError):
        await made.put()
    value = made.value(name)
    assert value is not None
    assert value.body == b"\xff"
    assert made.pending() == 0


async def test_an_event_is_bound_to_its_key() -> None:
    made = Made()
    await made.put(b"a")
    await made.put(b"b")
    one, other = made.name(b"a"), made.name(b"b")
    values = made.world.ring.values
    first, second = decode_object(values[one].body), decode_object(values[other].body)
    assert first.history is not None
    assert second.history is not None
    stolen = msgspec.structs.replace(first.history, outbox=second.history.outbox)
    forged = record_change(msgspec.structs.replace(first, history=stolen))
    values[one] = msgspec.structs.replace(values[one], body=forged.body)
    assert await made.sweep() == 1
    assert made.hooks.names() == [("ObjectCreated:Put", "b")]


async def test_changes_of_other_keys_of_a_pointer_do_not_keep_a_sweep_away() -> None:
    made = Made()
    clock = made.world.clock
    assert isinstance(clock, LoopClock)
    await made.put(b"left")  # by a process that ends
    pointer = event_name(made.name(b"left"))
    others = (b"other %d" % number for number in range(100_000))
    other = next(key for key in others if event_name(made.name(key)) == pointer)
    for _ in range(2):
        assert made.pending(b"left") == 1
        clock.wall += FRESH_MS // 2
        await made.put(other)
        await made.another().sweep()
    assert (made.pending(b"left"), made.pending(other)) == (0, 2), "what was noted lately is left to its process"


async def test_an_event_that_does_not_open_goes_with_an_empty_configuration() -> None:
    """Otherwise its key would be refused, and its bucket not be deleted, for ever."""
    made = Made()
    await made.put()
    await made.delete()
    name, values = made.name(), made.world.ring.values
    record = decode_object(values[name].body)
    assert record.history is not None
    broken = tuple(msgspec.structs.replace(event, sealed=b"") for event in record.history.outbox)
    history = msgspec.structs.replace(record.history, outbox=broken)
    body = record_change(msgspec.structs.replace(record, history=history)).body
    values[name] = msgspec.structs.replace(values[name], body=body)
    assert (await made.sweep(), made.pending()) == (1, 2)
    made.set()
    assert (await made.sweep(), made.pending(), made.noted()) == (0, 0, set())
    assert values[name].visibility == Visibility.TOMBSTONE


async def test_a_pointer_that_cannot_be_read_keeps_no_other_waiting() -> None:
    made = Made()
    pointers = {key: event_name(made.name(key)) for key in (b"%d" % number for number in range(10))}
    for key in pointers:
        await made.put(key)
    first = min(pointers.values(), key=lambda name: (name.shard, name.key))  # a sweep comes to it before the others
    made.world.ring.values[first] = Value(1, b"o", Visibility.LIVE, b"\xff")
    await made.sweep()
    assert [key for key in pointers if made.pending(key)] == [key for key in pointers if pointers[key] == first]
