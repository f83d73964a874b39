"""Renames: what arrives, what stays when one fails or dies, and that of several renames of an object one succeeds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from storaged import errors
from storaged.cluster.layout import Profile
from storaged.errors import (
    ConditionalRequestConflict,
    IdempotencyParameterMismatch,
    InvalidRequest,
    NoSuchKey,
    NoSuchVersion,
    PreconditionFailed,
    SlowDown,
)
from storaged.maintain.moved_record import body_after
from storaged.maintain.moves import MoveAsk
from storaged.meta.names import RegisterName, Table, Value, Visibility, object_name
from storaged.objects.api import (
    BodyChecks,
    CompletedPart,
    CopySource,
    NewMeta,
    PutResult,
    ReadConditions,
    Reading,
    Renaming,
)
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import BOUNDS, Draft, Shelf, levels_of
from storaged.objects.code.versions import decode_record
from storaged.objects.configuration.access import EVERYBODY, Acl, AclEntry
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, VERSIONING, Versioning
from storaged.objects.encryption import CUSTOMER, KMS, Encryption
from storaged.objects.etags import ANY, tag
from storaged.objects.read.find import current_entry
from storaged.objects.records import BucketRecord, ObjectRecord, decode_object, sharing_of
from storaged.objects.service import ObjectService
from storaged.objects.sharing import Arrival, Departure
from storaged.objects.system.emptying import Left, end_remains
from storaged.objects.write import complete, departures, loans, rename
from storaged.objects.write.departures import ARRIVALS_MAX, BUSY_MS, Seen, end_old
from storaged.objects.write.references import parts_in
from storaged.objects.write.uploads import CompleteResult
from storaged.objects.write.versioned import change_versions
from tests.worlds.objects import OWNER, World, bucket_of, got, pieces, put

pytestmark = pytest.mark.virtual_time

SIZES = [0, 10, 5_000, 300_000]
"""In the record, as copies, coded."""
SMALL, CODED = os.urandom(5_000), os.urandom(300_000)


class Made:
    def __init__(self) -> None:
        self.world = World()
        self.plane = self.world.plane()
        self.objects = ObjectService(self.plane)
        self.bucket: BucketRecord = bucket_of(self.world)

    def name(self, key: bytes) -> RegisterName:
        return object_name(self.bucket.id, self.bucket.shard_numbers, key)

    def record(self, key: bytes) -> ObjectRecord:
        return decode_record(self.world.ring.values.get(self.name(key)))

    async def rename(self, source: bytes, key: bytes, **how: Any) -> PutResult:
        return await self.objects.rename(self.bucket, Renaming(source, key, **how))

    async def keys(self) -> list[bytes]:
        return list((await self.objects.list_objects(self.bucket)).keys)

    async def read(self, key: bytes) -> bytes:
        return await got(self.objects, self.bucket, key=key)

    async def settled(self) -> None:
        await self.plane.background.settle()

    def fragments(self) -> set[bytes]:
        """The data ids of which some disk has a fragment."""
        return {one.data_id for disk in self.world.disks.disks.values() for one in disk.fragments}

    def departures(self) -> list[Departure]:
        records = [decode_record(value) for name, value in self.world.ring.values.items() if name.table == Table.OBJECT]
        return [found for record in records if (found := sharing_of(record).departure) is not None]

    def arrivals(self) -> list[Arrival]:
        records = [decode_record(value) for name, value in self.world.ring.values.items() if name.table == Table.OBJECT]
        return [arrival for record in records for arrival in sharing_of(record).arrivals]

    def meanwhile(self, key: bytes, work: Callable[[], Awaitable[Any]]) -> None:
        """Does something once, between a promise and the accept of this key."""

        async def interfere(name: RegisterName) -> None:
            if name == self.name(key):
                await work()
            else:
                self.world.ring.interfere = interfere

        self.world.ring.interfere = interfere


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    yield made
    await made.objects.close()


@pytest.mark.parametrize("size", SIZES)
async def test_an_object_gets_another_name_and_stays_what_it_is(made: Made, size: int) -> None:
    data = os.urandom(size)
    acl = Acl((AclEntry(EVERYBODY, "READ"),))
    meta = NewMeta({"content-type": "text/x"}, {"a": "b"}, {"tag": "t"}, acl=acl)
    checks = BodyChecks(size=size, algorithms=("SHA256",))
    await made.objects.put(made.bucket, b"old", pieces(data), meta, checks, owner=OWNER)
    await put(made.objects, made.bucket, b"replaced", key=b"new")
    before = await made.objects.head(made.bucket, b"old")
    await asyncio.sleep(5)
    result = await made.rename(b"old", b"new")
    await made.settled()
    assert await made.keys() == [b"new"]
    assert await made.read(b"new") == data
    after = await made.objects.head(made.bucket, b"new")
    assert after._replace(key=b"old") == before, "its time, too"
    assert (result.etag, result.modified_ms) == (hashlib.md5(data).hexdigest(), before.modified_ms)
    with pytest.raises(NoSuchKey):
        await made.objects.head(made.bucket, b"old")
    assert not made.departures()


async def test_a_coded_object_moves_no_data_and_its_data_goes_with_the_last_name(made: Made) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")
    disks = made.world.disks.disks.values()
    before = {fragment for disk in disks for fragment in disk.fragments}
    for source, key in ((b"a", b"b"), (b"b", b"c"), (b"c", b"a"), (b"a", b"d")):
        await made.rename(source, key)
        await made.settled()
        assert await made.keys() == [key]
        assert await made.read(key) == CODED
    assert {fragment for disk in disks for fragment in disk.fragments} == before
    assert not any(disk.garbage for disk in disks)
    await made.objects.delete(made.bucket, b"d")
    await made.settled()
    assert all(disk.garbage for disk in disks if disk.fragments)
    assert {made.world.ring.values[made.name(key)].visibility for key in (b"a", b"b", b"c", b"d")} == {
        Visibility.TOMBSTONE
    }


async def test_what_can_not_be_lent_is_sealed_anew(made: Made) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")
    replica = made.world.layouts.current.replicas_of(made.name(b"a").partition)[0]
    made.world.disks.disks[replica].down = True
    await made.rename(b"a", b"b")
    made.world.disks.disks[replica].down = False
    await made.settled()
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == CODED
    assert not sharing_of(made.record(b"b")).borrowed
    assert not sharing_of(made.record(b"a")).loans


async def test_kms_stays_and_a_customers_key_is_refused(made: Made) -> None:
    key = Encryption(KMS, "arn:key", context="e30=")
    meta = NewMeta(encryption=key)
    await made.objects.put(made.bucket, b"a", pieces(SMALL), meta, BodyChecks(size=len(SMALL)), owner=OWNER)
    await made.rename(b"a", b"b")
    assert (await made.objects.head(made.bucket, b"b")).encryption == key
    meta = NewMeta(encryption=Encryption(CUSTOMER, customer_key=b"k" * 32))
    await made.objects.put(made.bucket, b"c", pieces(SMALL), meta, BodyChecks(size=len(SMALL)), owner=OWNER)
    with pytest.raises(InvalidRequest, match="SSE-C"):
        await made.rename(b"c", b"d")
    assert await made.keys() == [b"b", b"c"]


async def test_a_bucket_with_versioning_and_the_same_name_are_refused(made: Made) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    with pytest.raises(InvalidRequest):
        await made.rename(b"a", b"a")
    with pytest.raises(NoSuchKey):
        await made.rename(b"none", b"b")
    versioned = made.plane.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))
    with pytest.raises(errors.NotImplemented):
        await made.objects.rename(versioned, Renaming(b"a", b"b"))
    assert await made.keys() == [b"a"]


@pytest.mark.parametrize(
    ("source", "target", "condition"),
    [
        (ReadConditions(if_match=tag("0" * 32)), ReadConditions(), "x-amz-rename-source-If-Match"),
        (ReadConditions(if_none_match=ANY), ReadConditions(), "x-amz-rename-source-If-None-Match"),
        (ReadConditions(if_modified_since_ms=1 << 41), ReadConditions(), "x-amz-rename-source-If-Modified-Since"),
        (ReadConditions(if_unmodified_since_ms=0), ReadConditions(), "x-amz-rename-source-If-Unmodified-Since"),
        (ReadConditions(), ReadConditions(if_none_match=ANY), "If-None-Match"),
        (ReadConditions(), ReadConditions(if_match=tag("0" * 32)), "If-Match"),
        (ReadConditions(), ReadConditions(if_unmodified_since_ms=0), "If-Unmodified-Since"),
        (ReadConditions(), ReadConditions(if_modified_since_ms=1 << 41), "If-Modified-Since"),
    ],
)
async def test_conditions_of_both_keys(
    made: Made, source: ReadConditions, target: ReadConditions, condition: str
) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    await put(made.objects, made.bucket, b"other", key=b"b")
    before = dict(made.world.ring.values)
    with pytest.raises(PreconditionFailed) as failed:
        await made.rename(b"a", b"b", source_conditions=source, conditions=target)
    assert failed.value.details["Condition"] == condition
    assert made.world.ring.values == before, "nothing was written"


@pytest.mark.parametrize("conditions", [ReadConditions(if_match=ANY), ReadConditions(if_modified_since_ms=0)])
async def test_a_new_key_that_is_not_there_fulfils_no_condition_on_what_it_has(
    made: Made, conditions: ReadConditions
) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    with pytest.raises(PreconditionFailed):
        await made.rename(b"a", b"b", conditions=conditions)
    await made.rename(b"a", b"b", conditions=ReadConditions(if_none_match=ANY, if_unmodified_since_ms=0))
    assert await made.keys() == [b"b"]


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_condition_of_the_new_key_is_judged_by_its_change(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    made.meanwhile(b"b", lambda: put(made.objects, made.bucket, b"first", key=b"b"))
    with pytest.raises(PreconditionFailed):
        await made.rename(b"a", b"b", conditions=ReadConditions(if_none_match=ANY))
    await made.settled()
    assert (await made.read(b"a"), await made.read(b"b")) == (data, b"first")
    assert not made.departures()


@pytest.mark.parametrize("data", [SMALL, CODED])
@pytest.mark.parametrize("same", [True, False])
async def test_of_several_renames_of_an_object_one_succeeds(made: Made, data: bytes, same: bool) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    renames = [made.rename(b"a", b"b" if same else b"b%d" % number) for number in range(5)]
    results = await asyncio.gather(*renames, return_exceptions=True)
    await made.settled()
    done = [one for one in results if not isinstance(one, BaseException)]
    assert len(done) == 1
    assert all(isinstance(one, NoSuchKey | SlowDown) for one in results if isinstance(one, BaseException)), results
    [key] = await made.keys()
    assert await made.read(key) == data
    assert not made.departures()


async def test_two_objects_do_not_swap_their_names(made: Made) -> None:
    await put(made.objects, made.bucket, b"x" * 4000, key=b"a")
    await put(made.objects, made.bucket, b"y" * 4000, key=b"b")
    results = await asyncio.gather(made.rename(b"a", b"b"), made.rename(b"b", b"a"), return_exceptions=True)
    await made.settled()
    done = [not isinstance(one, BaseException) for one in results]
    assert any(done)
    [key] = await made.keys()
    assert await made.read(key) in (b"x" * 4000, b"y" * 4000)


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_an_object_that_was_replaced_before_it_arrives_is_renamed_as_it_is_now(
    made: Made, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(made.objects, made.bucket, data, key=b"a")

    async def replaced(*what: Any) -> None:
        monkeypatch.undo()
        await departures.depart(*what)
        await put(made.objects, made.bucket, b"newer", key=b"a")

    monkeypatch.setattr(rename, "depart", replaced)
    await made.rename(b"a", b"b")
    await made.settled()
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == b"newer"


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_what_arrives_is_what_departed_when_another_gateway_adds_a_version(
    made: Made, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other gateway knows already that versioning was enabled."""
    await put(made.objects, made.bucket, data, key=b"a")
    other = made.world.plane()
    versioned = other.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))

    async def added(*what: Any) -> None:
        await departures.depart(*what)
        await put(ObjectService(other), versioned, b"newer", key=b"a")

    monkeypatch.setattr(rename, "depart", added)
    await made.rename(b"a", b"b")
    await made.settled()
    assert (await made.read(b"a"), await made.read(b"b")) == (b"newer", data)
    await other.close()


async def test_an_object_that_goes_before_it_is_read_is_not_there(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")

    async def deleted(*what: Any) -> None:
        await departures.depart(*what)
        await made.objects.delete(made.bucket, b"a")

    monkeypatch.setattr(rename, "depart", deleted)
    with pytest.raises(NoSuchKey):
        await made.rename(b"a", b"b")
    assert await made.keys() == []


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_an_object_that_replaces_the_old_one_later_is_not_taken_away(
    made: Made, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(made.objects, made.bucket, data, key=b"a")

    async def replaced(*what: Any) -> bool:
        await put(made.objects, made.bucket, b"newer", key=b"a")
        return await departures.finish(*what)

    monkeypatch.setattr(rename, "finish", replaced)
    await made.rename(b"a", b"b")
    await made.settled()
    assert (await made.read(b"a"), await made.read(b"b")) == (b"newer", data)


# --- renames that die


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_rename_that_died_before_it_arrived_is_undone(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    assert len(made.departures()) == 1
    assert await made.keys() == [b"a"]
    await end_old(made.plane, made.bucket, made.name(b"a"))
    assert len(made.departures()) == 1, "it is young"
    await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
    assert not made.departures()
    assert await made.keys() == [b"a"]
    assert await made.read(b"a") == data
    assert not sharing_of(made.record(b"a")).loans


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_rename_that_died_after_it_arrived_is_finished_by_the_walk(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    changes = 1 if data is SMALL else 2
    await _dies_at_the_end(made, made.rename(b"a", b"b"), changes)
    assert await made.keys() == [b"a", b"b"], "a list may show both"
    assert await made.read(b"b") == data
    with pytest.raises(NoSuchKey):
        await made.read(b"a")
    await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
    await made.settled()
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == data
    assert not made.departures()


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_wherever_its_gateway_dies_an_object_has_one_name_and_leaves_nothing(data: bytes, accepted: bool) -> None:
    """The data is that of a third key, and the new key has lent what it had. ``accepted``: the gateway dies after the
    change that it makes last, not before."""
    changes, died = 0, True
    while died:
        made, keys = Made(), (b"owner", b"old", b"new", b"other")
        await put(made.objects, made.bucket, data, key=b"owner")
        await made.rename(b"owner", b"old")
        await put(made.objects, made.bucket, b"other" + CODED, key=b"new")
        await made.rename(b"new", b"other")
        await put(made.objects, made.bucket, b"replaced", key=b"new")
        await made.settled()
        died = await _dies_after(made, made.rename(b"old", b"new"), changes, accepted=accepted)
        found: list[bytes] = []
        for key in (b"old", b"new"):
            with contextlib.suppress(NoSuchKey):
                found += [key] if await made.read(key) == data else []
        assert len(found) == 1, f"after {changes} changes"
        for key in keys:
            await end_old(made.plane, made.bucket, made.name(key), fresh_ms=-1)
        await made.settled()
        assert [key for key in await made.keys() if await made.read(key) == data] == found
        assert await made.read(b"other") == b"other" + CODED
        for key in keys:
            await made.objects.delete(made.bucket, key)
        await made.settled()
        rows = [made.world.ring.values[made.name(key)].visibility for key in keys]
        assert rows == [Visibility.TOMBSTONE] * 4, f"a row stays after {changes} changes"
        await made.objects.close()
        changes += 1
    assert changes > (3 if data is SMALL else 4)


async def _dies_after(made: Made, renaming: Awaitable[PutResult], changes: int, *, accepted: bool) -> bool:
    """The gateway dies after this many changes of registers; ``accepted``: and one more. False: it made no more."""
    count, change, spawn = 0, made.world.ring.change, made.plane.background.spawn

    async def dying(*what: Any, **how: Any) -> Any:
        nonlocal count
        count += 1
        if count > changes and not accepted:
            raise asyncio.CancelledError
        outcome = await change(*what, **how)
        if count > changes:
            raise asyncio.CancelledError
        return outcome

    made.world.ring.change = dying  # type: ignore[method-assign]
    made.plane.background.spawn = lambda work: work.close() is None  # type: ignore[method-assign,assignment]
    with contextlib.suppress(asyncio.CancelledError):
        await renaming
    made.world.ring.change = change  # type: ignore[method-assign]
    made.plane.background.spawn = spawn  # type: ignore[method-assign]
    return count > changes


async def _dies_on_the_way(made: Made, renaming: Awaitable[PutResult]) -> None:
    """The gateway dies between the promise and the accept of the new key."""

    async def dies() -> None:
        raise asyncio.CancelledError

    spawn = made.plane.background.spawn
    made.plane.background.spawn = lambda work: work.close() is None  # type: ignore[method-assign,assignment]
    made.meanwhile(b"b", dies)
    with pytest.raises(asyncio.CancelledError):
        await renaming
    made.plane.background.spawn = spawn  # type: ignore[method-assign]
    made.world.ring.interfere = None


async def _dies_at_the_end(made: Made, renaming: Awaitable[PutResult], changes: int, old: bytes = b"a") -> None:
    """The gateway dies when it would remove the old key's version. ``changes``: of the old key before that."""
    count, change, spawn = 0, made.world.ring.change, made.plane.background.spawn

    async def dying(name: RegisterName, *what: Any, **how: Any) -> Any:
        nonlocal count
        count += name == made.name(old)
        if count > changes:
            raise asyncio.CancelledError
        return await change(name, *what, **how)

    made.world.ring.change = dying  # type: ignore[method-assign]
    made.plane.background.spawn = lambda work: work.close() is None  # type: ignore[method-assign,assignment]
    try:
        with pytest.raises(asyncio.CancelledError):
            await renaming
    finally:
        made.world.ring.change = change  # type: ignore[method-assign]
        made.plane.background.spawn = spawn  # type: ignore[method-assign]


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_retry_with_the_same_token_finishes_what_died(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b", token="t"), 1 if data is SMALL else 2)
    assert await made.keys() == [b"a", b"b"]
    await made.rename(b"a", b"b", token="t")
    await made.settled()
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == data


async def test_a_request_that_was_sent_again_does_not_end_the_one_that_replaced_it(made: Made) -> None:
    """A client that does not wait long enough sends its request again, and the first one goes on meanwhile."""
    await put(made.objects, made.bucket, SMALL, key=b"a")
    again: list[asyncio.Task[PutResult]] = []

    async def sent_again() -> None:
        made.meanwhile(b"b", lambda: asyncio.sleep(40))
        again.append(asyncio.create_task(made.rename(b"a", b"b", token="t")))
        await asyncio.sleep(20)

    made.meanwhile(b"b", sent_again)
    with pytest.raises(SlowDown):
        await made.rename(b"a", b"b", token="t")
    assert await made.keys() == [b"a"]
    await again[0]
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == SMALL


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_token_is_good_once(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    first = await made.rename(b"a", b"b", token="t")
    await made.settled()
    await put(made.objects, made.bucket, b"a new one", key=b"a")
    assert await made.rename(b"a", b"b", token="t") == first
    assert (await made.read(b"a"), await made.read(b"b")) == (b"a new one", data)
    with pytest.raises(IdempotencyParameterMismatch):
        await made.rename(b"c", b"b", token="t")
    await made.rename(b"a", b"b", token="u")
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == b"a new one"


async def test_a_rename_waits_for_another_and_ends_one_that_is_old(made: Made) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 2)
    with pytest.raises(NoSuchKey):
        await made.rename(b"a", b"c")
    with pytest.raises(SlowDown):
        await made.objects.set_tags(made.bucket, b"a", {"x": "y"})
    assert await made.keys() == [b"a", b"b"]
    made.world.clock.wall += BUSY_MS  # type: ignore[attr-defined]
    with pytest.raises(NoSuchKey):
        await made.objects.set_tags(made.bucket, b"a", {"x": "y"})
    with pytest.raises(NoSuchKey):
        await made.rename(b"a", b"c")
    assert await made.keys() == [b"b"]


async def test_metadata_that_changed_before_the_departure_arrives(made: Made) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")
    made.meanwhile(b"a", lambda: made.objects.set_tags(made.bucket, b"a", {"x": "y"}))
    await made.rename(b"a", b"b")
    assert (await made.objects.head(made.bucket, b"b")).tags == {"x": "y"}


async def test_what_arrived_and_was_replaced_before_the_departure_ended_does_not_come_back(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")

    async def replaced(*what: Any) -> bool:
        await put(made.objects, made.bucket, b"newer", key=b"b")
        await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
        return await departures.finish(*what)

    monkeypatch.setattr(rename, "finish", replaced)
    await made.rename(b"a", b"b")
    await made.settled()
    assert await made.keys() == [b"b"]
    assert await made.read(b"b") == b"newer"


@pytest.mark.parametrize("what", ["replaced", "created anew", "deleted", "renamed"])
@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_what_has_arrived_never_comes_back_to_its_old_name(made: Made, data: bytes, what: str) -> None:
    """The gateway of the rename has died before it removed the old name."""
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is SMALL else 2)
    left = {"replaced": [b"b"], "created anew": [b"b"], "deleted": [], "renamed": [b"c"]}[what]
    if what in ("replaced", "created anew"):
        await put(made.objects, made.bucket, b"newer", key=b"b")
    if what == "renamed":
        await made.rename(b"b", b"c")
    if what in ("deleted", "created anew"):
        await made.objects.delete(made.bucket, b"b")
    if what == "created anew":
        await put(made.objects, made.bucket, b"newer", key=b"b")
    with pytest.raises(NoSuchKey):
        await made.read(b"a")
    await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
    await made.settled()
    assert await made.keys() == left
    assert not made.departures()
    assert not made.arrivals()


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_walk_at_the_new_key_finishes_a_rename_and_forgets_it(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is SMALL else 2)
    await end_old(made.plane, made.bucket, made.name(b"b"))
    assert len(made.departures()) == 1, "it is young"
    assert made.arrivals()
    await end_old(made.plane, made.bucket, made.name(b"b"), fresh_ms=-1)
    await made.settled()
    assert await made.keys() == [b"b"]
    assert not made.arrivals()


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_an_arrival_whose_departure_is_gone_is_forgotten_by_a_walk(made: Made, data: bytes) -> None:
    """The gateway has died after the old key was deleted, or right after it removed the old name."""
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is SMALL else 2)
    await made.objects.delete(made.bucket, b"a")
    assert made.arrivals()
    await end_old(made.plane, made.bucket, made.name(b"b"))
    assert not made.arrivals()
    assert await made.read(b"b") == data


async def test_a_departure_that_is_marked_anew_while_an_arrival_is_ended_keeps_the_arrival(made: Made) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1)
    settle = made.world.ring.settle

    async def marked(name: RegisterName) -> Value | None:
        value = await settle(name)

        def edit(draft: Draft, _ordinal: int) -> bool:
            assert draft.departure is not None
            draft.departure = msgspec.structs.replace(draft.departure, ending=b"another.")
            return True

        await change_versions(made.plane, BucketKeys(made.plane, made.bucket), made.name(b"a"), edit)
        return value

    made.world.ring.settle = marked  # type: ignore[method-assign]
    assert await departures.end_arrivals(made.plane, made.bucket, made.name(b"b"), fresh_ms=-1) == 1
    made.world.ring.settle = settle  # type: ignore[method-assign]
    await made.settled()
    assert made.arrivals()
    assert await departures.end_arrivals(made.plane, made.bucket, made.name(b"b"), fresh_ms=-1) == 0
    assert await made.keys() == [b"b"]


async def test_a_record_remembers_a_bounded_number_of_arrivals(made: Made) -> None:
    spawn = made.plane.background.spawn
    made.plane.background.spawn = lambda work: work.close() is None  # type: ignore[method-assign,assignment]
    for number in range(ARRIVALS_MAX + 1):
        await put(made.objects, made.bucket, SMALL, key=b"%d" % number)
        await made.rename(b"%d" % number, b"b")
        assert len(made.arrivals()) <= ARRIVALS_MAX
    for number in range(ARRIVALS_MAX):
        await put(made.objects, made.bucket, SMALL, key=b"%d" % number)
        made.plane.background.spawn = spawn  # type: ignore[method-assign]
        await _dies_at_the_end(made, made.rename(b"%d" % number, b"b"), 1, old=b"%d" % number)
    await put(made.objects, made.bucket, SMALL, key=b"last")
    with pytest.raises(SlowDown):
        await made.rename(b"last", b"b")
    assert await made.read(b"last") == SMALL
    assert await departures.end_arrivals(made.plane, made.bucket, made.name(b"b"), fresh_ms=-1) == 0
    await made.rename(b"last", b"b")
    assert await made.keys() == [b"b"]


async def test_a_deleted_key_with_an_arrival_keeps_no_bucket_from_being_deleted(made: Made) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1)
    await made.objects.delete(made.bucket, b"b")
    assert await end_remains(made.plane, made.bucket) is Left.OBJECTS, "the old name is listed"
    await made.objects.delete(made.bucket, b"a")
    assert await end_remains(made.plane, made.bucket) is Left.NOTHING
    assert made.world.ring.values[made.name(b"b")].visibility == Visibility.TOMBSTONE


async def test_a_copy_of_what_departs_and_a_deletion_need_not_wait(made: Made) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    await made.objects.copy(CopySource(made.bucket, b"a"), made.bucket, b"c", owner=OWNER, meta=None)
    await made.objects.delete(made.bucket, b"a")
    await made.settled()
    assert not made.departures()
    assert await made.keys() == [b"c"]
    assert await made.read(b"c") == CODED


@pytest.mark.parametrize("data", [b"", SMALL, CODED])
async def test_reads_of_the_old_key_find_what_departs_until_it_has_arrived(made: Made, data: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    assert await made.read(b"a") == data
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    await made.settled()
    assert len(made.departures()) == 1
    assert await made.read(b"a") == data
    found: list[Any] = []
    made.objects.try_read(made.bucket, b"a", True, found.append)
    await asyncio.sleep(1)
    assert isinstance(found[0], Reading), "the new key must be looked at, in a task"
    await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
    await made.settled()
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is not CODED else 2)
    for read in (made.read(b"a"), made.objects.head(made.bucket, b"a")):
        with pytest.raises(NoSuchKey):
            await read
    with pytest.raises(NoSuchVersion):
        await made.objects.head(made.bucket, b"a", version_id="null")
    with pytest.raises(NoSuchVersion):
        await made.objects.copy(CopySource(made.bucket, b"a", "null"), made.bucket, b"c", owner=OWNER, meta=None)
    assert await made.read(b"b") == data
    await put(made.objects, made.bucket, b"new", key=b"a")
    assert await made.read(b"a") == b"new"
    assert (await made.objects.head(made.bucket, b"a", version_id="null")).size == 3


async def test_a_read_that_meets_another_object_after_it_looked_at_the_new_key_finds_that(made: Made) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1)
    read = made.world.ring.read

    async def replaced(name: RegisterName, **how: Any) -> Any:
        found = await read(name, **how)
        if name == made.name(b"b"):
            made.world.ring.read = read  # type: ignore[method-assign]
            await put(made.objects, made.bucket, b"newer", key=b"a")
        return found

    made.world.ring.read = replaced  # type: ignore[method-assign]
    assert (await made.objects.head(made.bucket, b"a")).size == 5


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_a_read_that_meets_the_end_of_a_rename_does_not_find_what_has_left(made: Made, data: bytes) -> None:
    """It has read the old key. Then the rename ends, and the new key forgets what has arrived."""
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is SMALL else 2)
    read = made.world.ring.read

    async def ended(name: RegisterName, **how: Any) -> Reading:
        if name == made.name(b"b"):
            made.world.ring.read = read  # type: ignore[method-assign]
            await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
            await made.settled()
            assert not made.arrivals()
        return await read(name, **how)

    made.world.ring.read = ended  # type: ignore[method-assign]
    with pytest.raises(NoSuchKey):
        await made.read(b"a")
    assert await made.read(b"b") == data


async def test_a_new_key_that_is_damaged_hides_nothing(made: Made) -> None:
    await put(made.objects, made.bucket, SMALL, key=b"a")
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    made.world.ring.values[made.name(b"b")] = Value(1, b"", Visibility.LIVE, b"damage")
    assert await made.read(b"a") == SMALL


async def test_a_departure_that_another_request_has_marked_since_is_not_ended(made: Made) -> None:
    """The first one found that nothing had arrived. Then the second one began, and may find something else."""
    await put(made.objects, made.bucket, SMALL, key=b"a")
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    [departure] = made.departures()
    settle = made.world.ring.settle

    async def second(name: RegisterName) -> Any:
        made.world.ring.settle = settle  # type: ignore[method-assign]
        value = await settle(name)
        keys = BucketKeys(made.plane, made.bucket)

        def mark(draft: Any, _ordinal: int) -> bool:
            draft.departure = msgspec.structs.replace(draft.departure, ending=b"another mark")
            return True

        await change_versions(made.plane, keys, made.name(b"a"), mark)
        return value

    made.world.ring.settle = second  # type: ignore[method-assign,assignment]
    await departures.end_departure(made.plane, made.bucket, made.name(b"a"), departure.id)
    assert [one.ending for one in made.departures()] == [b"another mark"]
    await departures.end_departure(made.plane, made.bucket, made.name(b"a"), departure.id)
    assert not made.departures()
    assert await made.keys() == [b"a"]


async def test_a_version_that_is_lost_takes_its_departure_with_it(made: Made) -> None:
    """Else the departure would be that of the next null version."""
    await put(made.objects, made.bucket, CODED, key=b"a")
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    versioned = made.plane.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))
    for _ in range(BOUNDS.versions_max):
        await put(made.objects, versioned, b"newer", key=b"a")
    assert len(made.departures()) == 1
    record = made.record(b"a")
    draft = Draft(record, Shelf())
    draft.give_up({ref.hash for level in levels_of(record) for ref in level})
    assert (draft.departure, draft.null()) == (None, None)


# --- objects that were uploaded in parts


async def upload(made: Made, key: bytes, datas: list[bytes]) -> str:
    """Returns the ETag."""
    upload_id, parts = await _uploaded(made, key, datas)
    return (await made.objects.complete(made.bucket, key, upload_id, parts, owner=OWNER)).etag


async def _uploaded(made: Made, key: bytes, datas: list[bytes]) -> tuple[str, list[CompletedPart]]:
    begun = await made.objects.create_upload(made.bucket, key, NewMeta(), algorithm="CRC32", owner=OWNER)
    parts = []
    for number, data in enumerate(datas, 1):
        checks = BodyChecks(len(data), algorithms=("CRC32",))
        stored = await made.objects.put_part(made.bucket, key, begun.upload_id, number, pieces(data), checks)
        parts.append(CompletedPart(number, stored.etag, stored.checksums))
    return begun.upload_id, parts


@pytest.fixture
async def in_parts(made: Made) -> Made:
    made.plane.limits = dataclasses.replace(made.plane.limits, part_bytes_min=1)
    return made


@pytest.mark.parametrize("count", [1, 3, 32, 33, 300])
async def test_all_parts_of_an_object_are_lent_and_go_together(in_parts: Made, count: int) -> None:
    made, datas = in_parts, [os.urandom(5_000 + number) for number in range(count)]
    datas[-1] += b"" if count == 1 else b"end"
    etag = await upload(made, b"a", datas)
    before, fragments = await made.objects.head(made.bucket, b"a"), made.fragments()
    assert len(fragments) == count
    for source, key in ((b"a", b"b"), (b"b", b"c"), (b"c", b"a"), (b"a", b"d")):
        await made.rename(source, key)
        await made.settled()
    after = await made.objects.head(made.bucket, b"d")
    assert after._replace(key=b"a") == before
    assert (after.etag, after.part_count) == (etag, count)
    assert await made.read(b"d") == b"".join(datas)
    assert made.fragments() == fragments
    [loan] = sharing_of(made.record(b"a")).loans
    assert (len(loan.parts), len(loan.pages), loan.uploaded) == (
        (count, 0, True) if count <= 32 else (0, -(-count // 256), True)
    )
    value = made.world.ring.values[made.name(b"a")]
    kept = {part.data_id async for part in parts_in(made.plane.pages, made.name(b"a"), value.body, Table.OBJECT)}
    assert kept == fragments
    assert not any(disk.garbage for disk in made.world.disks.disks.values())
    await made.objects.copy(
        CopySource(made.bucket, b"d"), made.bucket, b"copy", owner=OWNER, meta=None, algorithm="SHA256"
    )
    await made.objects.delete(made.bucket, b"d")
    await made.settled()
    retired = {data_id for disk in made.world.disks.disks.values() for data_id in disk.garbage}
    assert retired == fragments
    calls = [entries for disk in made.world.disks.disks.values() for entries in disk.retirements]
    origins = {entry.origin for entries in calls for entry in entries}
    assert origins == {b""}, "nothing is said of parts, so the collector asks about uploads, too"
    assert await made.read(b"copy") == b"".join(datas), "it has data of its own"


async def test_a_move_of_any_part_is_one_of_the_loan(in_parts: Made) -> None:
    made, datas = in_parts, [os.urandom(70_000), os.urandom(80_000)]
    await upload(made, b"a", datas)
    await made.rename(b"a", b"b")
    await made.settled()
    name = made.name(b"a")
    part = sharing_of(made.record(b"a")).loans[0].parts[1]
    run = part.runs[0]
    ask = MoveAsk(name.pack(), part.data_id, run, msgspec.structs.replace(run, moved={0: "elsewhere"}))
    found = await body_after(made.plane.pages, name, made.world.ring.values[name], [(ask, Profile(run.k, run.m))])
    assert found is not None
    [loan] = sharing_of(decode_object(found[0])).loans
    assert [one.runs[0].moved for one in loan.parts] == [{}, {0: "elsewhere"}]


@pytest.mark.parametrize("count", [2, 33])
async def test_an_object_whose_blocks_move_is_the_same_object(in_parts: Made, count: int) -> None:
    made = in_parts
    await upload(made, b"a", [os.urandom(5_000) for _ in range(count)])
    name = made.name(b"a")
    value, record = made.world.ring.values[name], made.record(b"a")
    seen = Seen(current_entry(record), None)
    part = [part async for part in parts_in(made.plane.pages, name, value.body, Table.OBJECT)][1]
    run = part.runs[0]
    ask = MoveAsk(name.pack(), part.data_id, run, msgspec.structs.replace(run, moved={0: "elsewhere"}))
    found = await body_after(made.plane.pages, name, value, [(ask, Profile(run.k, run.m))])
    assert found is not None
    moved = decode_object(found[0])
    assert moved != record
    assert seen.is_current(Draft(moved, Shelf()))
    other = msgspec.structs.replace(moved.versions[0], meta=b"other")
    assert not seen.is_current(Draft(msgspec.structs.replace(moved, versions=(other,)), Shelf()))


async def test_parts_on_pages_that_can_not_be_lent_are_sealed_anew(
    in_parts: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loans, "LENT_PAGES_MAX", 0)
    made, datas = in_parts, [os.urandom(5_000) for _ in range(33)]
    etag = await upload(made, b"a", datas)
    before = await made.objects.head(made.bucket, b"a")
    await made.rename(b"a", b"b")
    await made.settled()
    after = await made.objects.head(made.bucket, b"b")
    assert (after.etag, after.checksums, after.modified_ms) == (etag, before.checksums, before.modified_ms)
    assert await made.read(b"b") == b"".join(datas)
    assert await made.keys() == [b"b"]


async def test_a_record_lends_no_more_parts_than_it_has_room_for(
    in_parts: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, datas = in_parts, [os.urandom(70_000) for _ in range(3)]
    monkeypatch.setattr(loans, "LENT_PARTS_MAX", 5)
    for number in range(2):
        await upload(made, b"a", datas)
        await made.rename(b"a", b"b%d" % number)
        await made.settled()
    assert [bool(sharing_of(made.record(key)).borrowed) for key in (b"b0", b"b1")] == [True, False]
    assert await made.read(b"b0") == await made.read(b"b1") == b"".join(datas)


async def test_an_upload_that_is_completed_twice_lends_the_parts_of_each_version(
    in_parts: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway of the first Complete dies after it made the object, which is renamed. The upload is open again."""
    made, datas = in_parts, [os.urandom(70_000 + number) for number in range(3)]
    upload_id, parts = await _uploaded(made, b"a", datas)

    async def dies(*_what: Any) -> CompleteResult:
        raise asyncio.CancelledError

    with monkeypatch.context() as dying:
        dying.setattr(complete, "_done", dies)
        with pytest.raises(asyncio.CancelledError):
            await made.objects.complete(made.bucket, b"a", upload_id, parts[:2], owner=OWNER)
    await made.rename(b"a", b"b")
    with pytest.raises(ConditionalRequestConflict):
        await made.objects.complete(made.bucket, b"a", upload_id, parts[:2], owner=OWNER)
    await made.objects.complete(made.bucket, b"a", upload_id, parts, owner=OWNER)
    for source, key in ((b"a", b"c"), (b"c", b"d"), (b"b", b"c")):
        await made.rename(source, key)
        await made.settled()
    assert await made.keys() == [b"c", b"d"]
    assert (await made.read(b"c"), await made.read(b"d")) == (b"".join(datas[:2]), b"".join(datas))
    await made.objects.delete(made.bucket, b"c")
    await made.settled()
    value = made.world.ring.values[made.name(b"a")]
    kept = {part.data_id async for part in parts_in(made.plane.pages, made.name(b"a"), value.body, Table.OBJECT)}
    assert len(kept) == 3
    await made.objects.delete(made.bucket, b"d")
    await made.settled()
    assert made.world.ring.values[made.name(b"a")].visibility == Visibility.TOMBSTONE


async def test_an_upload_replaces_what_departs(in_parts: Made) -> None:
    made = in_parts
    await put(made.objects, made.bucket, CODED, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 2)
    await upload(made, b"a", [b"new", b"er"])
    await made.settled()
    assert not made.departures()
    await end_old(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1)
    assert (await made.read(b"a"), await made.read(b"b")) == (b"newer", CODED)


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_what_was_read_while_it_departs_is_not_found_in_a_cache_later(made: Made, data: bytes) -> None:
    """Its record does not change when it arrives elsewhere."""
    await put(made.objects, made.bucket, data, key=b"a")
    read: list[bytes] = []

    async def reads() -> None:
        read.append(await made.read(b"a"))

    made.meanwhile(b"b", reads)
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is SMALL else 2)
    assert read == [data]
    with pytest.raises(NoSuchKey):
        await made.read(b"a")


async def test_a_rename_waits_for_another_that_is_young(made: Made) -> None:
    await put(made.objects, made.bucket, CODED, key=b"a")
    await _dies_on_the_way(made, made.rename(b"a", b"b"))
    [departure] = made.departures()
    with pytest.raises(SlowDown):
        await made.rename(b"a", b"c")
    await made.settled()
    assert made.departures() == [departure]
    made.world.clock.wall += BUSY_MS  # type: ignore[attr-defined]
    await made.rename(b"a", b"c")
    assert await made.keys() == [b"c"]


@pytest.mark.parametrize("source", [b"a", b"b"])
@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_the_next_rename_of_an_object_ends_one_that_has_died(made: Made, data: bytes, source: bytes) -> None:
    await put(made.objects, made.bucket, data, key=b"a")
    await _dies_at_the_end(made, made.rename(b"a", b"b"), 1 if data is SMALL else 2)
    made.world.clock.wall += BUSY_MS  # type: ignore[attr-defined]
    if source == b"a":
        with pytest.raises(NoSuchKey):
            await made.rename(source, b"c")
    else:
        await made.rename(source, b"c")
    await made.settled()
    assert await made.keys() == [b"b" if source == b"a" else b"c"]
    assert not made.departures()
    assert not made.arrivals()


@pytest.mark.parametrize("data", [SMALL, CODED])
async def test_the_arrival_is_forgotten_when_the_old_key_was_replaced_before_it_lost_its_version(
    made: Made, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    await put(made.objects, made.bucket, data, key=b"a")

    async def replaced(*what: Any) -> None:
        await put(made.objects, made.bucket, b"newer", key=b"a")
        await departures.finish(*what)

    monkeypatch.setattr(rename, "finish", replaced)
    await made.rename(b"a", b"b")
    await made.settled()
    assert not made.arrivals()
    assert (await made.read(b"a"), await made.read(b"b")) == (b"newer", data)
