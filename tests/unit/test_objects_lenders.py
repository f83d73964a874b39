"""Copies between buckets that move no data, and what becomes of the data when the bucket of its owner is deleted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from storaged.errors import BucketNotEmpty, NoSuchBucket, NoSuchKey, OutcomeUnknown, ServiceUnavailable, SlowDown
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility, object_name, system_name
from storaged.meta.ports import ListPage, PageQuery, Reading, Row
from storaged.objects.api import BodyChecks, CompletedPart, CopySource, NewMeta, Principal, PutResult, Renaming
from storaged.objects.code.lending import find_borrower
from storaged.objects.code.versions import decode_record
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, VERSIONING, Versioning
from storaged.objects.records import DELETED, LENDING, BucketRecord, PartEntry, sharing_of
from storaged.objects.service import ObjectService
from storaged.objects.system import lenders
from storaged.objects.system.bucket_records import PREFIX
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.emptying import Left, left_in
from storaged.objects.system.keyends import destroy_ended_keys
from storaged.objects.where import where
from storaged.objects.write.departures import end_old
from storaged.objects.write.loans import end_loan, end_unused
from storaged.objects.write.references import parts_in
from tests.worlds.objects import World, got, pieces, put

pytestmark = pytest.mark.virtual_time

ANNE = Principal("a" * 64, "anne", "AKA")
DATA = os.urandom(300_000)


class Made:
    """Two buckets: ``source`` has the object ``a``, ``other`` is empty."""

    source: BucketRecord
    other: BucketRecord

    def __init__(self) -> None:
        self.world = World(None, retire_delay_ms=0)
        self.plane = self.world.plane()
        self.objects = ObjectService(self.plane)
        self.buckets = BucketService(self.plane)

    async def make(self) -> None:
        self.source = await self.bucket("source")
        self.other = await self.bucket("other")
        await put(self.objects, self.source, DATA, key=b"a")

    async def bucket(self, name: str, countries: tuple[str, ...] = ()) -> BucketRecord:
        return await self.buckets.create(ANNE, name, region="eu-fr-1", countries=countries)

    def name(self, key: bytes, bucket: BucketRecord | None = None) -> RegisterName:
        bucket = bucket or self.source
        return object_name(bucket.id, bucket.shard_numbers, key)

    def value(self, key: bytes, bucket: BucketRecord | None = None) -> Value | None:
        return self.world.ring.values.get(self.name(key, bucket))

    async def copy(self, source: BucketRecord, key: bytes, bucket: BucketRecord, to: bytes, **how: object) -> PutResult:
        options: dict[str, object] = {"owner": ANNE.user_id, "meta": None, **how}
        return await self.objects.copy(CopySource(source, key), bucket, to, **options)  # type: ignore[arg-type]

    async def read(self, bucket: BucketRecord, key: bytes) -> bytes:
        return await got(self.objects, bucket, key=key)

    async def delete(self, bucket: BucketRecord, key: bytes) -> None:
        await self.objects.delete(bucket, key)
        await self.plane.background.settle()

    async def delete_bucket(self, bucket: BucketRecord) -> None:
        await self.buckets.delete(bucket)
        await self.plane.background.settle()

    async def parts_of(self, key: bytes, bucket: BucketRecord | None = None) -> list[PartEntry]:
        """All that a key's record refers to."""
        value, name = self.value(key, bucket), self.name(key, bucket)
        if value is None or value.visibility == Visibility.TOMBSTONE:
            return []
        return [part async for part in parts_in(self.plane.pages, name, value.body, Table.OBJECT)]

    def borrowers(self, key: bytes) -> list[bytes]:
        return [one.key for loan in sharing_of(decode_record(self.value(key))).loans for one in loan.borrowers]

    def fragments(self) -> set[bytes]:
        return {one.data_id for disk in self.world.disks.disks.values() for one in disk.fragments}

    def retired(self) -> set[bytes]:
        return {data_id for disk in self.world.disks.disks.values() for data_id in disk.garbage}

    async def lender(self) -> BucketRecord | None:
        return await self.plane.lenders.find(self.source.id)

    async def tend(self) -> None:
        """As housekeeping does."""
        for record in await self.buckets.every_bucket():
            await self.buckets.resume(record)
        await self.plane.background.settle()


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    await made.make()
    yield made
    await made.objects.close()


async def test_a_copy_to_another_bucket_moves_no_data_and_reads_the_same(made: Made) -> None:
    before, first = made.fragments(), await made.objects.head(made.source, b"a")
    copied = await made.copy(made.source, b"a", made.other, b"a")
    assert made.fragments() == before
    assert (copied.etag, copied.size, copied.checksums) == (first.etag, len(DATA), first.checksums)
    assert await made.read(made.other, b"a") == DATA
    assert await made.objects.get(made.other, b"a") is not None
    assert not await made.parts_of(b"a", made.other), "the data is its source's"
    assert len((await where(made.plane, made.other, b"a")).runs) == 1


async def test_the_data_stays_for_copies_in_other_buckets_and_goes_with_the_last_one(made: Made) -> None:
    third = await made.bucket("third")
    [part] = await made.parts_of(b"a")
    await made.copy(made.source, b"a", made.other, b"b")
    await made.copy(made.other, b"b", third, b"c")
    await made.copy(third, b"c", made.source, b"d")
    assert made.borrowers(b"a") == [b"b", b"c", b"d"], "copies of copies borrow from the same owner"
    await made.delete(made.source, b"a")
    await made.delete(made.other, b"b")
    for bucket, key in ((third, b"c"), (made.source, b"d")):
        assert await made.read(bucket, key) == DATA
    await put(made.objects, third, b"new", key=b"c")
    await made.plane.background.settle()
    assert part.data_id not in made.retired()
    await made.delete(made.source, b"d")
    assert part.data_id in made.retired()


async def test_a_copy_back_onto_the_key_that_lends_it_the_data(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await put(made.objects, made.source, b"new", key=b"a")
    await made.copy(made.other, b"b", made.source, b"a")
    await made.plane.background.settle()
    await made.delete(made.other, b"b")
    assert await made.read(made.source, b"a") == DATA
    await made.delete(made.source, b"a")
    assert not await made.parts_of(b"a")
    assert len(made.retired()) >= 1


async def test_many_parts_on_pages_are_lent_to_another_bucket(made: Made) -> None:
    made.plane.limits = dataclasses.replace(made.plane.limits, part_bytes_min=1)
    upload = await made.objects.create_upload(made.source, b"big", NewMeta(), owner=ANNE.user_id)
    bodies, parts = [os.urandom(20_000) for _ in range(40)], []
    for number, body in enumerate(bodies, 1):
        stored = await made.objects.put_part(
            made.source, b"big", upload.upload_id, number, pieces(body), BodyChecks(len(body))
        )
        parts.append(CompletedPart(number, stored.etag, stored.checksums))
    await made.objects.complete(made.source, b"big", upload.upload_id, parts, owner=ANNE.user_id)
    before = made.fragments()
    await made.copy(made.source, b"big", made.other, b"big")
    assert made.fragments() == before
    await made.delete(made.source, b"big")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    assert await made.read(made.other, b"big") == b"".join(bodies)


async def test_buckets_with_other_countries_do_not_lend(made: Made) -> None:
    apart = msgspec.structs.replace(made.other, countries=("FR",))
    await made.copy(made.source, b"a", apart, b"b")
    assert await made.parts_of(b"b", apart), "it has data of its own"
    assert not made.borrowers(b"a")


async def test_versions_of_other_buckets_borrow_too(made: Made) -> None:
    versioned = await made.buckets.create(
        ANNE, "versioned", region="eu-fr-1", configuration=NOTHING.having(VERSIONING, Versioning(ENABLED))
    )
    await made.copy(made.source, b"a", versioned, b"a")
    await put(made.objects, versioned, b"newer", key=b"a")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    listed = await made.objects.list_versions(versioned)
    [old] = [one for one in listed.versions if one.size == len(DATA)]
    stream = await made.objects.get(versioned, b"a", version_id=old.version_id)
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == DATA
    await made.objects.delete(versioned, b"a", version_id=old.version_id)
    await made.plane.background.settle()
    await made.tend()
    assert await made.lender() is None


async def test_what_borrows_from_another_bucket_is_renamed(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    before = made.fragments()
    await made.objects.rename(made.other, Renaming(b"b", b"c"))
    await made.plane.background.settle()
    assert made.fragments() == before
    assert made.borrowers(b"a") == [b"c"]
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    await made.objects.rename(made.other, Renaming(b"c", b"d"))
    await made.plane.background.settle()
    assert await made.read(made.other, b"d") == DATA
    assert await made.parts_of(b"d", made.other), "a lender gets no new borrowers"


# --- the bucket of the owner is deleted


async def test_a_bucket_whose_data_other_buckets_use_is_deleted_and_its_name_is_free(made: Made) -> None:
    [part] = await made.parts_of(b"a")
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    with pytest.raises(NoSuchBucket):
        await made.buckets.renewed("source")
    again = await made.bucket("source")
    assert again.id != made.source.id
    assert not (await made.objects.list_objects(again)).keys
    with pytest.raises(NoSuchKey):
        await made.objects.head(again, b"a")
    await made.tend()
    lender = await made.lender()
    assert lender is not None
    assert (lender.state, lender.formerly, lender.id) == (LENDING, "source", made.source.id)
    assert [one.name for one in (await made.buckets.list_buckets(ANNE))[0]] == ["other", "source"]
    assert await made.read(made.other, b"b") == DATA
    assert part.data_id not in made.retired()
    await made.delete(made.other, b"b")
    assert part.data_id in made.retired()
    await made.tend()
    assert await made.lender() is None
    assert made.world.ring.fences[made.source.id] == (lender.nonce, True)


async def test_nothing_but_its_nonce_changes_a_lender(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    before = made.value(b"a")
    for key in (b"a", b"new"):
        with pytest.raises((NoSuchBucket, OutcomeUnknown)):
            await put(made.objects, made.source, DATA, key=key)
    assert made.value(b"a") == before
    with pytest.raises(NoSuchBucket):
        await made.plane.registers.change(made.name(b"a"), lambda _value: Change(b"", Visibility.TOMBSTONE))
    assert made.value(b"a") == before
    assert await made.read(made.other, b"b") == DATA


async def test_a_copy_of_what_a_lender_lends_gets_data_of_its_own(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    await made.copy(made.other, b"b", made.other, b"c")
    assert await made.parts_of(b"c", made.other)
    await made.delete(made.other, b"b")
    await made.tend()
    assert await made.lender() is None
    assert await made.read(made.other, b"c") == DATA


async def test_a_bucket_with_objects_or_loans_of_its_own_keys_is_not_empty(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.copy(made.source, b"a", made.source, b"c")
    await made.delete(made.source, b"a")
    with pytest.raises(BucketNotEmpty):
        await made.buckets.delete(made.source)
    assert await made.read(made.other, b"b") == await made.read(made.source, b"c") == DATA
    await made.delete(made.source, b"c")
    await made.delete_bucket(made.source)
    assert await made.read(made.other, b"b") == DATA


async def test_a_replica_that_is_away_keeps_a_bucket_from_becoming_a_lender(made: Made) -> None:
    """Its fence would be missing there for as long as the lender lasts."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    made.world.ring.replica_away = True
    with pytest.raises(SlowDown, match="Copies in other buckets"):
        await made.buckets.delete(made.source)
    made.world.ring.replica_away = False
    again = await made.buckets.renewed("source")
    assert again.id == made.source.id
    await put(made.objects, again, b"more", key=b"d")
    assert await made.read(again, b"d") == b"more"
    assert await made.lender() is None
    await made.delete(again, b"d")
    await made.delete_bucket(again)
    assert await made.lender() is not None


async def test_a_bucket_opens_again_where_no_fence_can_lend(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A majority of the storage nodes runs version 0.1.0."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    fence = made.world.ring.fence

    async def old(*what: Any, lends: bool = False, **how: Any) -> bool:
        if lends:
            raise ServiceUnavailable("They have not done that.")
        return await fence(*what, **how)

    with monkeypatch.context() as patch:
        patch.setattr(made.world.ring, "fence", old)
        with pytest.raises(SlowDown, match="Copies in other buckets"):
            await made.buckets.delete(made.source)
    source = await made.buckets.renewed("source")
    await put(made.objects, source, b"more", key=b"d")
    assert await made.read(source, b"d") == b"more"
    assert await made.lender() is None


async def test_a_bucket_is_not_closed_in_vain_while_a_replica_is_known_to_be_away(made: Made) -> None:
    """Clients ask again and again. Each attempt would refuse writes meanwhile, and wait for a node that hangs."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    before = made.world.ring.values[system_name("bucket/source")]
    disk = made.plane.layouts.partition(made.name(b"a").partition).voting[0][0]
    made.world.disks.suspected = {disk}
    with pytest.raises(SlowDown, match="Copies in other buckets"):
        await made.buckets.delete(made.source)
    assert made.world.ring.values[system_name("bucket/source")] == before
    made.world.disks.suspected = set()
    await made.delete_bucket(made.source)
    assert await made.lender() is not None


async def test_the_key_of_a_lender_stays_until_it_has_ended(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when an attempt before it had found the bucket empty, and noted that with the key."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.plane.keys.end_bucket_key(made.source.id, "source", bytes(16), made.source.shard_numbers)
    await made.delete_bucket(made.source)
    assert (await destroy_ended_keys(made.plane, made.buckets)).destroyed == 0
    await made.bucket("source")  # then the record of the name is another bucket's
    assert (await destroy_ended_keys(made.plane, made.buckets)).destroyed == 0
    assert made.source.id in made.world.keys.newest
    await made.delete(made.other, b"b")
    await made.tend()
    assert await made.lender() is None
    for disk in made.world.disks.disks.values():
        disk.garbage.clear()  # it was collected
    assert (await destroy_ended_keys(made.plane, made.buckets)).destroyed == 1


@pytest.mark.parametrize("name_is_taken", [False, True])
async def test_a_lender_whose_record_is_hidden_keeps_its_fence_and_its_key(made: Made, name_is_taken: bool) -> None:
    """By one replica of the system partition that lies and one that lags, while the third one is away. An attempt
    before had found the bucket empty, and noted that with its key."""
    await made.plane.keys.end_bucket_key(made.source.id, "source", bytes(16), made.source.shard_numbers)
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    if name_is_taken:
        await made.bucket("source")
    values, hidden = made.world.ring.values, system_name(PREFIX + lenders.lender_name(made.source.id))
    record = values.pop(hidden)
    await destroy_ended_keys(made.plane, made.buckets)
    values[hidden] = record
    lender = await made.lender()
    assert lender is not None
    assert made.world.ring.fences[made.source.id] == (lender.nonce, False)
    assert made.source.id in made.world.keys.newest
    assert await destroy_ended_keys(made.plane, made.buckets) == (0, 0, 0, ""), "and no report says that it waits"


async def test_a_lender_that_is_not_noted_with_its_key_keeps_that_too(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy allows the gateway that deletes the bucket no keys. And the list of buckets is from before that."""
    await made.plane.keys.end_bucket_key(made.source.id, "source", bytes(16), made.source.shard_numbers)
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    before = await made.buckets.every_bucket()

    async def nothing(*_what: object) -> None:
        pass

    async def from_before() -> list[BucketRecord]:
        return before

    with monkeypatch.context() as patch:
        patch.setattr(made.plane.keys, "end_bucket_key", nothing)
        await made.delete_bucket(made.source)
    with monkeypatch.context() as patch:
        patch.setattr(made.buckets, "every_bucket", from_before)
        await destroy_ended_keys(made.plane, made.buckets)
    lender = await made.lender()
    assert lender is not None
    assert made.world.ring.fences[made.source.id] == (lender.nonce, False)
    assert made.source.id in made.world.keys.newest


async def test_the_key_of_a_bucket_stays_that_was_nearly_a_lender(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of the lender went, since its bucket was not deleted."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    step = made.buckets._step

    async def refused(record: BucketRecord, after: BucketRecord, **how: bytes) -> BucketRecord | None:
        if after.state == DELETED:
            raise ServiceUnavailable("No majority.")
        return await step(record, after, **how)

    with monkeypatch.context() as patch:
        patch.setattr(made.buckets, "_step", refused)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(made.source)
    made.world.ring.replica_away = True  # so the next attempt finds that it can't become a lender now
    [deleting] = [one for one in await made.buckets.every_bucket() if one.name == "source"]
    await made.buckets.resume(deleting)
    made.world.ring.replica_away = False
    await made.tend()
    assert await made.lender() is None
    source = await made.buckets.renewed("source")
    await destroy_ended_keys(made.plane, made.buckets)
    assert source.id in made.world.keys.newest
    noted = made.world.keys.ended[source.id]
    assert (await made.buckets._records.last(noted.name)) is None, "version 0.1.0 reads nothing that says Deleted"
    await put(made.objects, source, DATA, key=b"more")
    assert await made.read(source, b"more") == DATA


@pytest.mark.parametrize("when", ["begin", "step"])
async def test_a_gateway_dies_while_a_bucket_becomes_a_lender(
    made: Made, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``begin``: before the record of the lender is written; ``step``: before the name is Deleted."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")

    async def dies(*_args: object) -> None:
        raise ServiceUnavailable("It dies.")

    with monkeypatch.context() as patch:
        if when == "begin":
            patch.setattr(made.buckets._lenders, "begin", dies)
        else:
            step = made.buckets._step

            async def only_others(record: BucketRecord, after: BucketRecord, **how: bytes) -> BucketRecord | None:
                if after.state == DELETED:
                    await dies()
                return await step(record, after, **how)

            patch.setattr(made.buckets, "_step", only_others)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(made.source)
    lender = await made.lender()
    assert (lender is not None) == (when == "step")
    if lender is not None:
        await made.buckets.resume(lender)
        assert await made.lender() is not None, "its deletion goes on"
    again = await made.bucket("source")
    assert again.id != made.source.id
    assert await made.read(made.other, b"b") == DATA
    assert await made.lender() is not None


async def test_the_record_of_a_lender_goes_when_its_bucket_was_not_deleted(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    ring, step = made.world.ring, made.buckets._step

    async def refused(record: BucketRecord, after: BucketRecord, **how: bytes) -> BucketRecord | None:
        if after.state == DELETED:
            raise ServiceUnavailable("No majority.")
        return await step(record, after, **how)

    with monkeypatch.context() as patch:
        patch.setattr(made.buckets, "_step", refused)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(made.source)
    first = await made.lender()
    assert first is not None
    ring.replica_away = True  # so the next attempt finds that it can't become a lender now
    with pytest.raises(NoSuchBucket):
        await made.buckets.renewed("source")
    [deleting] = [one for one in await made.buckets.every_bucket() if one.name == "source"]
    resumed = await made.buckets.resume(deleting)
    assert resumed is not None
    ring.replica_away = False
    source = await made.buckets.renewed("source")
    await put(made.objects, source, b"more", key=b"d")
    await made.tend()
    assert await made.lender() is None
    assert await made.read(made.other, b"b") == DATA
    await made.delete(source, b"d")
    await made.delete_bucket(source)
    second = await made.lender()
    assert second is not None
    assert second.nonce > first.nonce
    await made.delete(made.other, b"b")
    await made.tend()
    assert await made.lender() is None
    assert not await made.parts_of(b"a")


async def test_a_bucket_that_is_deleted_at_last_as_an_empty_one_leaves_no_lender(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt before has written the record of the lender, and the loans have ended since."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    step = made.buckets._step

    async def refused(record: BucketRecord, after: BucketRecord, **how: bytes) -> BucketRecord | None:
        if after.state == DELETED:
            raise ServiceUnavailable("No majority.")
        return await step(record, after, **how)

    with monkeypatch.context() as patch:
        patch.setattr(made.buckets, "_step", refused)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(made.source)
    await made.delete(made.other, b"b")
    assert made.value(b"a") is None or not await made.parts_of(b"a"), "the fence lends already"
    await made.tend()
    await made.tend()
    assert await made.lender() is None
    with pytest.raises(NoSuchBucket):
        await made.buckets.renewed("source")
    assert made.world.ring.fences[made.source.id][1], "its fence is final"


async def test_an_attempt_before_the_last_one_writes_no_lender(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    lender = await made.lender()
    assert lender is not None
    before = msgspec.structs.replace(made.source, nonce=bytes(len(lender.nonce)))
    with pytest.raises(ServiceUnavailable):
        await made.buckets._lenders.begin(before)
    assert await made.lender() == lender


async def test_a_row_with_a_loan_inside_of_its_bucket_makes_no_lender(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    value = made.value(b"a")
    assert value is not None
    assert left_in(Row(b"a", value)) is Left.LOANS
    await put(made.objects, made.source, DATA, key=b"a")
    await made.copy(made.source, b"a", made.source, b"c")
    await made.delete(made.source, b"a")
    value = made.value(b"a")
    assert value is not None
    assert made.borrowers(b"a") == [b"b", b"c"]
    assert left_in(Row(b"a", value)) is Left.OBJECTS


async def test_a_bucket_of_which_some_replica_may_have_an_object_makes_no_lender(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when that replica did not answer before."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")

    async def is_doubted(_plane: object, _bucket: BucketRecord, *, everyone: bool = False) -> bool:
        return everyone

    monkeypatch.setattr(lenders, "is_doubted", is_doubted)
    with pytest.raises(SlowDown):
        await made.buckets.delete(made.source)
    assert await made.lender() is None
    assert (await made.buckets.renewed("source")).id == made.source.id


@pytest.mark.parametrize("name_is_taken", [False, True])
async def test_a_lender_whose_record_is_written_late_goes(
    made: Made, name_is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt sleeps before it writes that. Another one has deleted the bucket when it wakes up. Found by
    seed 242 of the play ``lenders``."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.objects.create_upload(made.source, b"up", NewMeta(), owner=ANNE.user_id)
    await made.delete(made.source, b"a")
    slept: list[BucketRecord] = []

    async def sleeps(bucket: BucketRecord) -> BucketRecord:
        slept.append(bucket)
        raise ServiceUnavailable("It sleeps.")

    with monkeypatch.context() as patch:
        patch.setattr(made.buckets._lenders, "begin", sleeps)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(made.source)
    made.world.ring.replica_away = True
    [deleting] = [one for one in await made.buckets.every_bucket() if one.name == "source"]
    await made.buckets.resume(deleting)
    made.world.ring.replica_away = False
    source = await made.buckets.renewed("source")
    await made.delete(made.other, b"b")
    await made.delete_bucket(source)
    if name_is_taken:
        await made.bucket("source")
    await made.buckets._lenders.begin(slept[0])
    assert await made.lender() is not None
    await made.tend()
    assert await made.lender() is None


async def test_a_lender_whose_record_is_written_late_does_not_keep_its_bucket_from_its_end(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, and the gateway that deleted the bucket died before it had set the final fence. What sets that in its
    place asks whether the bucket is a lender; and the lender goes only when the fence is final."""
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    slept: list[BucketRecord] = []

    async def sleeps(bucket: BucketRecord) -> BucketRecord:
        slept.append(bucket)
        raise ServiceUnavailable("It sleeps.")

    with monkeypatch.context() as patch:
        patch.setattr(made.buckets._lenders, "begin", sleeps)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(made.source)
    made.world.ring.replica_away = True
    [deleting] = [one for one in await made.buckets.every_bucket() if one.name == "source"]
    await made.buckets.resume(deleting)
    made.world.ring.replica_away = False
    source = await made.buckets.renewed("source")
    await made.delete(made.other, b"b")
    fence = made.world.ring.fence

    async def dies(*what: Any, final: bool = False, **how: Any) -> bool:
        if final:
            raise ServiceUnavailable("It dies.")
        return await fence(*what, **how)

    with monkeypatch.context() as patch:
        patch.setattr(made.world.ring, "fence", dies)
        with pytest.raises(ServiceUnavailable):
            await made.buckets.delete(source)
    await made.bucket("source")
    await made.buckets._lenders.begin(slept[0])
    assert await made.lender() is not None
    for disk in made.world.disks.disks.values():
        disk.garbage.clear()  # it was collected
    await destroy_ended_keys(made.plane, made.buckets)
    for record in await made.buckets.every_bucket():
        await made.buckets.resume(record)
    assert await made.lender() is None
    assert made.world.ring.fences[made.source.id][1], "its fence is final"
    assert made.source.id not in made.world.keys.newest


async def test_a_lender_goes_that_ends_in_the_middle_of_its_deletion(made: Made) -> None:
    """One gateway writes its record; then the loans end, and another gateway finds the bucket empty."""
    await made.copy(made.source, b"a", made.other, b"b")
    upload = await made.objects.create_upload(made.source, b"up", NewMeta(), owner=ANNE.user_id)
    assert upload.upload_id
    await made.delete(made.source, b"a")
    begin = made.buckets._lenders.begin

    async def dies(bucket: BucketRecord) -> BucketRecord:
        await begin(bucket)
        raise ServiceUnavailable("It dies.")

    made.buckets._lenders.begin = dies  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        await made.buckets.delete(made.source)
    await made.delete(made.other, b"b")
    [deleting] = [one for one in await made.buckets.every_bucket() if one.name == "source"]
    assert await made.buckets.resume(deleting) is None
    await made.tend()
    assert await made.lender() is None


async def test_open_uploads_end_with_the_bucket_that_becomes_a_lender(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    upload = await made.objects.create_upload(made.source, b"up", NewMeta(), owner=ANNE.user_id)
    body = os.urandom(200_000)
    await made.objects.put_part(made.source, b"up", upload.upload_id, 1, pieces(body), BodyChecks(size=len(body)))
    [of_upload] = made.fragments() - {part.data_id for part in await made.parts_of(b"a")}
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    assert of_upload in made.retired()
    uploads = [value for name, value in made.world.ring.values.items() if name.table == Table.UPLOAD]
    assert [value.visibility for value in uploads] == [Visibility.HIDDEN]
    assert await made.read(made.other, b"b") == DATA


async def test_an_upload_that_can_not_be_read_keeps_no_lender_from_its_end(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    for key in (b"up", b"up2"):
        await made.objects.create_upload(made.source, key, NewMeta(), owner=ANNE.user_id)
    values = made.world.ring.values
    damaged, other = sorted((name for name in values if name.table == Table.UPLOAD), key=lambda name: name.key)
    values[damaged] = msgspec.structs.replace(values[damaged], body=b"?")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    assert values[other].visibility == Visibility.HIDDEN, "the other one has ended"
    await made.delete(made.other, b"b")
    await made.tend()
    assert await made.lender() is None


async def test_loans_of_a_lender_end_whose_replicas_have_to_be_settled_first(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    name = made.name(b"b", made.other)
    made.world.ring.values[name] = Value(9, b"o" * 16, Visibility.TOMBSTONE, b"")  # its gateway died before the end
    ring, read = made.world.ring, made.world.ring.read

    async def settles(name: RegisterName, *, settling_nonce: bytes = b"", **how: Any) -> Reading:
        if ring.lending.get(name.scope, settling_nonce) != settling_nonce:
            raise NoSuchBucket("", lends="true")
        return await read(name, **how)

    monkeypatch.setattr(ring, "read", settles)
    lender = await made.lender()
    assert lender is not None
    assert await end_old(made.plane, lender, made.name(b"a"), fresh_ms=-1) == 0
    await made.tend()
    assert await made.lender() is None


async def test_a_version_that_turns_up_in_a_lender_is_removed(made: Made) -> None:
    """A disk that had just come may have taken it, without a fence. Nobody was told that it is there."""
    await made.copy(made.source, b"a", made.other, b"b")
    await put(made.objects, made.source, DATA, key=b"0")
    late = made.value(b"0")
    assert late is not None
    await made.delete(made.source, b"0")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    made.world.ring.values[made.name(b"0")] = msgspec.structs.replace(late, sequence=9)
    await made.tend()
    await made.delete(made.other, b"b")
    for _ in range(3):
        await made.tend()
    assert await made.lender() is None
    gone = made.value(b"0")
    assert gone is not None
    assert gone.visibility == Visibility.TOMBSTONE


async def test_a_look_at_a_lender_reads_a_row_and_removes_all_versions(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lender may have a million rows that lend, and each gateway looks at it every hour."""
    late: dict[bytes, Value] = {}
    for key in (b"0", b"1", b"2"):
        await put(made.objects, made.source, DATA, key=key)
        value = made.value(key)
        assert value is not None
        late[key] = value
        await made.delete(made.source, key)
    for number in range(5):
        await made.copy(made.source, b"a", made.other, b"%d" % number)
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    for key, value in late.items():
        made.world.ring.values[made.name(key)] = msgspec.structs.replace(value, sequence=9)
    limits, list_page = [], made.plane.scanner.list_page

    async def noted(wanted: PageQuery) -> ListPage:
        if wanted.table == Table.OBJECT and wanted.scope == made.source.id:
            limits.append(wanted.limit)
        return await list_page(wanted)

    monkeypatch.setattr(made.plane.scanner, "list_page", noted)
    await made.tend()
    assert limits == [1] * 4
    gone = [made.value(key) for key in late]
    assert all(value is not None and value.visibility == Visibility.TOMBSTONE for value in gone)
    assert await made.lender() is not None
    assert await made.read(made.other, b"0") == DATA


async def test_a_loan_of_a_known_lender_ends_without_a_look_for_its_nonce(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    await made.copy(made.source, b"a", made.other, b"c")
    await made.delete(made.source, b"a")
    await made.delete_bucket(made.source)
    lender, looks, find = await made.lender(), list[bytes](), made.plane.lenders.find
    assert lender is not None
    ids = [one.id for loan in sharing_of(decode_record(made.value(b"a"))).loans for one in loan.borrowers]

    async def noted(bucket_id: bytes) -> BucketRecord | None:
        looks.append(bucket_id)
        return await find(bucket_id)

    monkeypatch.setattr(made.plane.lenders, "find", noted)
    for key, value in ((b"b", made.value(b"b", made.other)), (b"c", made.value(b"c", made.other))):
        assert value is not None
        made.world.ring.values[made.name(key, made.other)] = Value(9, b"o" * 16, Visibility.TOMBSTONE, b"")
    await end_loan(made.plane, lender, made.name(b"a"), ids[0])
    assert made.borrowers(b"a") == [b"c"]
    assert not looks
    await end_loan(made.plane, msgspec.structs.replace(lender, nonce=b"old"), made.name(b"a"), ids[1])
    assert not await made.parts_of(b"a"), "with the nonce that the lender has now"
    assert set(looks) == {made.source.id}


async def test_loans_to_a_bucket_that_was_deleted_for_good_end(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateways that removed the copies died before they could end the loans."""
    await made.copy(made.source, b"a", made.other, b"b")
    name = made.name(b"b", made.other)
    made.world.ring.values[name] = Value(9, b"o" * 16, Visibility.TOMBSTONE, b"")
    await made.delete_bucket(made.other)
    assert made.borrowers(b"a") == [b"b"]
    assert await end_unused(made.plane, made.source, made.name(b"a"), fresh_ms=-1) == 0
    assert not made.borrowers(b"a")


async def test_loans_to_a_bucket_that_is_closed_for_a_while_stay(made: Made) -> None:
    await made.copy(made.source, b"a", made.other, b"b")
    [borrower] = [one for loan in sharing_of(decode_record(made.value(b"a"))).loans for one in loan.borrowers]
    await made.plane.fences.fence(made.other.id, made.other.shard_numbers, b"n" * 16)
    with pytest.raises(NoSuchBucket):
        await end_loan(made.plane, made.source, made.name(b"a"), borrower.id)
    found = find_borrower(made.value(b"a"), borrower.id)
    assert found is not None
    await made.plane.fences.unfence(made.other.id, made.other.shard_numbers, b"n" * 16)
    await end_loan(made.plane, made.source, made.name(b"a"), borrower.id)
    found = find_borrower(made.value(b"a"), borrower.id)
    assert found is not None
    assert not found[1].ending
    assert await made.read(made.other, b"b") == DATA


async def test_a_copy_whose_source_is_closed_meanwhile_moves_its_data_or_fails(made: Made) -> None:
    nonce = b"n" * 16
    await made.plane.fences.fence(made.source.id, made.source.shard_numbers, nonce)
    await made.copy(made.source, b"a", made.other, b"b")
    assert await made.parts_of(b"b", made.other)
    assert not made.borrowers(b"a")
