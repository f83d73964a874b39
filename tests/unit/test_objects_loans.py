"""Copies that move no data: what they read, what keeps their data, and when it goes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from storaged.cluster.layout import Profile
from storaged.errors import AccessDenied, DataDamaged, InvalidRequest, NoSuchKey, PreconditionFailed
from storaged.maintain.moved_record import body_after
from storaged.maintain.moves import MoveAsk
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility, object_name
from storaged.meta.ports import Reading
from storaged.meta.storage.row_head import LEAD_BYTES, head_of
from storaged.objects.api import BodyChecks, CompletedPart, CopySource, NewMeta, PutResult, WriteConditions
from storaged.objects.code.lock import COMPLIANCE
from storaged.objects.code.manifest import parts_of, with_parts
from storaged.objects.code.versions import decode_record
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, LOCK, VERSIONING, ObjectLock, Versioning
from storaged.objects.encryption import CUSTOMER, KMS, Encryption
from storaged.objects.etags import ANY
from storaged.objects.read.borrowed import find_data
from storaged.objects.read.find import find
from storaged.objects.records import (
    BucketRecord,
    History,
    Kept,
    Loan,
    Lock,
    ObjectRecord,
    PartEntry,
    Sharing,
    SharingRecord,
    Version,
    decode_heads,
    decode_object,
    encode_object,
    shares,
    sharing_of,
)
from storaged.objects.service import ObjectService
from storaged.objects.sharing import Borrowed, Borrower
from storaged.objects.system.emptying import Left, end_remains
from storaged.objects.where import where
from storaged.objects.write import lent_copy, loans
from storaged.objects.write.lent_copy import lent_of
from storaged.objects.write.loans import BORROWED_MAX, BORROWERS_MAX, FRESH_MS, end_unused
from storaged.objects.write.references import pages_in, parts_in
from storaged.wire import decode
from tests.worlds.objects import OWNER, World, bucket_of, got, pieces, put

pytestmark = pytest.mark.virtual_time

DATA = os.urandom(300_000)


class Made:
    def __init__(self) -> None:
        self.world = World()
        self.plane = self.world.plane()
        self.objects = ObjectService(self.plane)
        self.bucket: BucketRecord = bucket_of(self.world)

    def name(self, key: bytes) -> RegisterName:
        return object_name(self.bucket.id, self.bucket.shard_numbers, key)

    def value(self, key: bytes) -> Value | None:
        return self.world.ring.values.get(self.name(key))

    def record(self, key: bytes) -> ObjectRecord:
        return decode_record(self.value(key))

    async def copy(self, source: bytes, to: bytes, **how: object) -> PutResult:
        wanted = CopySource(self.bucket, source)
        options: dict[str, object] = {"owner": OWNER, "meta": None, **how}
        return await self.objects.copy(wanted, self.bucket, to, **options)  # type: ignore[arg-type]

    async def parts_of(self, key: bytes) -> list[PartEntry]:
        """All that a key's record refers to."""
        value = self.value(key)
        if value is None or value.visibility == Visibility.TOMBSTONE:
            return []
        return [part async for part in parts_in(self.plane.pages, self.name(key), value.body, Table.OBJECT)]

    async def read(self, key: bytes) -> bytes:
        return await got(self.objects, self.bucket, key=key)

    async def delete(self, key: bytes) -> None:
        await self.objects.delete(self.bucket, key)
        await self.plane.background.settle()

    def fragments(self) -> set[bytes]:
        """The data ids of which some disk has a fragment."""
        return {one.data_id for disk in self.world.disks.disks.values() for one in disk.fragments}

    def retired(self) -> set[bytes]:
        return {data_id for disk in self.world.disks.disks.values() for data_id in disk.garbage}


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    await put(made.objects, made.bucket, DATA, key=b"a")
    yield made
    await made.objects.close()


async def test_a_look_at_loans_that_are_used_reads_each_record_once(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk has gateways look at all loans, and mostly nothing is to be done."""
    await made.copy(b"a", b"b")
    reads, read = list[bytes](), made.world.ring.read

    async def noted(name: RegisterName, **how: Any) -> Reading:
        reads.append(name.key)
        return await read(name, **how)

    monkeypatch.setattr(made.world.ring, "read", noted)
    assert await end_unused(made.plane, made.bucket, made.name(b"a"), fresh_ms=0) == 1
    assert sorted(reads) == [b"a", b"b"]


async def test_a_copy_moves_no_data_and_reads_the_same(made: Made) -> None:
    before = made.fragments()
    first = await made.objects.head(made.bucket, b"a")
    copied = await made.copy(b"a", b"b")
    assert made.fragments() == before
    assert (copied.etag, copied.size, copied.checksums) == (first.etag, len(DATA), first.checksums)
    assert await made.read(b"b") == DATA
    assert (await made.objects.head(made.bucket, b"b")).etag == hashlib.md5(DATA).hexdigest()
    assert not await made.parts_of(b"b"), "the data is its source's"
    assert list((await made.objects.list_objects(made.bucket)).keys) == [b"a", b"b"]


async def test_the_data_stays_for_the_copy_when_the_source_goes_and_goes_with_the_last_one(made: Made) -> None:
    [part] = await made.parts_of(b"a")
    await made.copy(b"a", b"b")
    await made.copy(b"b", b"c")
    await made.delete(b"a")
    with pytest.raises(NoSuchKey):
        await made.objects.head(made.bucket, b"a")
    assert list((await made.objects.list_objects(made.bucket)).keys) == [b"b", b"c"]
    assert await made.read(b"b") == await made.read(b"c") == DATA
    await put(made.objects, made.bucket, b"other", key=b"b")
    await made.plane.background.settle()
    assert part.data_id not in made.retired()
    assert await made.read(b"c") == DATA
    await made.delete(b"c")
    assert part.data_id in made.retired()
    value = made.value(b"a")
    assert value is not None
    assert value.visibility == Visibility.TOMBSTONE


@pytest.mark.parametrize("size", [0, 10, 5_000, 200_000])
async def test_the_source_is_overwritten_by_any_put_and_the_copy_stays(made: Made, size: int) -> None:
    await made.copy(b"a", b"b")
    data = os.urandom(size)
    answers: list[PutResult | Exception] = []
    checks = BodyChecks(size=size)
    soon = made.objects.try_put(made.bucket, b"a", data, NewMeta(), checks, answers.append, owner=OWNER)
    if not soon:
        await put(made.objects, made.bucket, data, key=b"a")
    while soon and not answers:
        await made.plane.registers.read(made.name(b"a"))
    assert all(isinstance(answer, PutResult) for answer in answers)
    assert (await made.read(b"a"), await made.read(b"b")) == (data, DATA)


async def test_what_has_no_fragments_of_its_own_is_sealed_anew(made: Made) -> None:
    for size in (0, 100, 3_000):
        await put(made.objects, made.bucket, os.urandom(size), key=b"small")
        await made.copy(b"small", b"copy")
        assert [part.size for part in await made.parts_of(b"copy")] == [size]
    with_key = Encryption(CUSTOMER, customer_key=b"k" * 32)
    await made.copy(b"a", b"copy", encryption=with_key)
    assert await made.parts_of(b"copy"), "its key must open no data of others"
    await made.copy(b"a", b"copy", algorithm="SHA256")
    assert await made.parts_of(b"copy"), "its checksum has to be computed"
    assert not sharing_of(made.record(b"a")).loans
    await made.copy(b"a", b"a", meta=NewMeta(user={"x": "y"}))
    assert await made.read(b"a") == DATA


@pytest.mark.parametrize("known", [False, True])
async def test_while_a_replica_is_away_a_copy_gets_data_of_its_own(made: Made, known: bool) -> None:
    """``known``: then nothing is written in vain."""
    disks, before = made.world.disks, made.value(b"a")
    disk = made.world.layouts.current.replicas_of(made.name(b"a").partition)[0]
    disks.disks[disk].down = True
    if known:
        disks.suspected.add(disk)
    await made.copy(b"a", b"b")
    await made.plane.background.settle()
    assert await made.parts_of(b"b"), "a late create could overwrite the record that lends"
    assert not sharing_of(made.record(b"a")).loans
    assert (made.value(b"a") == before) is known
    disks.disks[disk].down = False
    disks.suspected.clear()
    await made.copy(b"a", b"c")
    assert not await made.parts_of(b"c")


async def test_a_full_record_lends_no_more(made: Made) -> None:
    for number in range(BORROWERS_MAX):
        await made.copy(b"a", b"copy %d" % number)
    await made.copy(b"a", b"one more")
    assert await made.parts_of(b"one more")
    assert not await made.parts_of(b"copy 0")


async def test_conditions_are_judged_and_a_copy_that_fails_leaves_no_loan(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def later(*_what: object) -> None:
        """The commit judges the condition."""

    monkeypatch.setattr(lent_copy, "check_early", later)
    await put(made.objects, made.bucket, b"there", key=b"b")
    with pytest.raises(PreconditionFailed):
        await made.copy(b"a", b"b", conditions=WriteConditions(if_none_match=ANY))
    assert sharing_of(made.record(b"a")).loans, "it was lent before"
    await made.plane.background.settle()
    assert not sharing_of(made.record(b"a")).loans
    assert await made.read(b"b") == b"there"


async def test_metadata_tags_and_encryption_are_the_copys_own(made: Made) -> None:
    await made.copy(b"a", b"b", meta=NewMeta({"content-type": "x/y"}, {"u": "1"}), tags={"t": "1"})
    info = await made.objects.head(made.bucket, b"b")
    assert (info.headers["content-type"], info.user, info.tags) == ("x/y", {"u": "1"}, {"t": "1"})
    await made.objects.set_tags(made.bucket, b"b", {"t": "2"})
    await made.objects.set_tags(made.bucket, b"a", {"t": "3"})
    assert (await made.objects.head(made.bucket, b"b")).tags == {"t": "2"}
    await made.delete(b"a")
    assert await made.read(b"b") == DATA
    with pytest.raises(InvalidRequest):
        await made.objects.get(made.bucket, b"b", customer_key=b"k" * 32)


async def test_source_and_copy_get_another_encryption_and_a_newer_bucket_key_each_by_itself(made: Made) -> None:
    """Each record wraps the data key anew; the body stays sealed under it."""
    await made.copy(b"a", b"b")
    await made.copy(b"b", b"c")
    made.world.keys.newest[made.bucket.id] = 2
    for key in (b"a", b"c"):
        await made.objects.set_encryption(made.bucket, key, Encryption(KMS, "arn:of:key"))
    shown = [(await made.objects.head(made.bucket, key)).encryption for key in (b"a", b"b", b"c")]
    assert [one is not None and one.kind for one in shown] == [KMS, False, KMS]
    assert [made.record(key).versions[0].bucket_key for key in (b"a", b"b", b"c")] == [2, 1, 2]
    assert [await made.read(key) for key in (b"a", b"b", b"c")] == [DATA] * 3
    await made.delete(b"a")
    await made.copy(b"c", b"d")
    assert [await made.read(key) for key in (b"b", b"c", b"d")] == [DATA] * 3
    assert not await made.parts_of(b"d")


@pytest.mark.parametrize("lock", [Lock(COMPLIANCE, 1 << 50), Lock(hold=True)])
async def test_a_locked_copy_keeps_the_data_of_a_source_that_is_deleted_and_a_locked_source_its_own(
    made: Made, lock: Lock
) -> None:
    configuration = NOTHING.having(VERSIONING, Versioning(ENABLED)).having(LOCK, ObjectLock())
    made.bucket = made.plane.configurations.put(made.bucket, configuration)
    copied = await made.copy(b"a", b"b", lock=lock)
    back = await made.copy(b"b", b"a")
    await made.objects.delete(made.bucket, b"a", version_id="null")
    await made.objects.delete(made.bucket, b"a", version_id=back.version_id)
    with pytest.raises(AccessDenied):
        await made.objects.delete(made.bucket, b"b", version_id=copied.version_id)
    await made.plane.background.settle()
    assert await end_unused(made.plane, made.bucket, made.name(b"a"), fresh_ms=-1) == 1
    assert await made.read(b"b") == DATA
    [part] = await made.parts_of(b"a")
    assert part.data_id not in made.retired()
    locked = await made.objects.put(
        made.bucket, b"l", pieces(DATA), NewMeta(lock=lock), BodyChecks(size=len(DATA)), owner=OWNER
    )
    free = await made.copy(b"l", b"free")
    await made.objects.delete(made.bucket, b"free", version_id=free.version_id)
    with pytest.raises(AccessDenied):
        await made.objects.delete(made.bucket, b"l", version_id=locked.version_id)
    await made.plane.background.settle()
    assert not sharing_of(made.record(b"l")).loans
    assert await made.read(b"l") == DATA


async def test_a_move_of_blocks_is_one_change_that_all_copies_see(made: Made) -> None:
    await made.copy(b"a", b"b")
    [part] = await made.parts_of(b"a")
    run = part.runs[0]
    moved = msgspec.structs.replace(run, moved={0: "elsewhere"})
    ask = MoveAsk(made.name(b"a").pack(), part.data_id, run, moved)
    for gone in (False, True):
        if gone:
            await made.delete(b"a")
            ask = MoveAsk(made.name(b"a").pack(), part.data_id, moved, run)
        value = made.value(b"a")
        assert value is not None
        after = await body_after(made.plane.pages, made.name(b"a"), value, [(ask, Profile(run.k, run.m))])
        assert after is not None
        record = decode_object(after[0])
        [loan] = sharing_of(record).loans
        assert loan.part.runs[0].moved == ask.new.moved
        assert [version.parts for version in record.versions] == ([] if gone else [(loan.part,)])
        change = Change(after[0], value.visibility, value.payload)
        await made.plane.registers.change(made.name(b"a"), lambda _value, change=change: change)
    assert await made.read(b"b") == DATA


async def test_what_is_lent_does_not_move_while_the_page_of_its_version_cannot_be_read(made: Made) -> None:
    """The version would stay with the old places, and the two must be the same."""
    made.bucket = made.plane.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))
    await made.copy(b"a", b"b")
    [loan] = sharing_of(made.record(b"a")).loans
    for _ in range(20):  # the first one goes to a page
        await put(made.objects, made.bucket, os.urandom(70_000), key=b"a")
    run = loan.part.runs[0]
    ask = MoveAsk(made.name(b"a").pack(), loan.part.data_id, run, msgspec.structs.replace(run, moved={0: "elsewhere"}))
    pages, made.world.ring.pages = made.world.ring.pages, {}
    move = [(ask, Profile(run.k, run.m))]
    assert await body_after(made.plane.pages, made.name(b"a"), made.value(b"a"), move) is None
    made.world.ring.pages = pages
    assert await body_after(made.plane.pages, made.name(b"a"), made.value(b"a"), move) is not None


async def test_a_loan_that_another_request_has_marked_since_is_not_ended_nor_unmarked(made: Made) -> None:
    await made.copy(b"a", b"b")
    registers: Any = made.plane.registers
    settle = registers.settle
    for used in (True, False):
        [borrower] = sharing_of(made.record(b"a")).loans[0].borrowers
        if not used:
            del made.world.ring.values[made.name(b"b")]

        async def settled(
            name: RegisterName, borrower: Borrower = borrower, settling_nonce: bytes = b""
        ) -> Value | None:
            value: Value | None = await settle(name, settling_nonce=settling_nonce)
            await loans._mark(made.plane, made.bucket, made.name(b"a"), borrower.id, b"another!")
            return value

        registers.settle = settled
        await loans.end_loan(made.plane, made.bucket, made.name(b"a"), borrower.id)
        [marked] = sharing_of(made.record(b"a")).loans[0].borrowers
        assert marked == msgspec.structs.replace(borrower, ending=b"another!")
        registers.settle = settle


async def test_a_loan_that_ends_before_the_accept_of_its_copy_makes_a_copy_of_its_own(made: Made) -> None:
    """The end has a round of the copy's register, which ends the copy's promise."""
    ring, owner = made.world.ring, made.name(b"a")

    async def end(name: RegisterName) -> None:
        if name == owner:
            ring.interfere = end  # it waits for the change of the copy
            return
        [borrower] = sharing_of(made.record(b"a")).loans[0].borrowers
        await loans.end_loan(made.plane, made.bucket, owner, borrower.id)

    ring.interfere = end
    await made.copy(b"a", b"b")
    assert await made.parts_of(b"b")
    assert await made.read(b"b") == DATA
    assert not sharing_of(made.record(b"a")).loans


async def test_a_copy_goes_on_under_no_loan_that_is_marked_or_gone(made: Made) -> None:
    await made.copy(b"a", b"b")
    [borrower] = sharing_of(made.record(b"a")).loans[0].borrowers
    await loans.check_lent(made.plane, made.name(b"a"), borrower.id)
    await loans._mark(made.plane, made.bucket, made.name(b"a"), borrower.id, b"ending!!")
    with pytest.raises(loans.NotLent):
        await loans.check_lent(made.plane, made.name(b"a"), borrower.id)
    with pytest.raises(loans.NotLent):
        await loans.check_lent(made.plane, made.name(b"a"), bytes(16))


async def test_deleted_keys_that_lend_are_in_no_list_of_versions(made: Made) -> None:
    """Nor are the common prefixes under which there are only such keys."""
    for prefix in (b"x/", b"y/"):
        await made.copy(b"a", prefix + b"1")
        await made.copy(prefix + b"1", prefix + b"2")
        await put(made.objects, made.bucket, DATA, key=prefix + b"3")
        await made.copy(prefix + b"3", b"z")
        await made.copy(prefix + b"3", b"copy of " + prefix + b"3")
        for key in (b"1", b"2", b"3"):
            await made.delete(prefix + key)
    await put(made.objects, made.bucket, b"small", key=b"y/4")
    await made.delete(b"a")
    listed = await made.objects.list_versions(made.bucket)
    there = [b"copy of x/3", b"copy of y/3", b"y/4", b"z"]
    assert [one.key for one in listed.versions] == there
    for limit in (1, 2, 3, 4, 1000):
        found, after = list[bytes](), b""
        while True:
            listed = await made.objects.list_versions(made.bucket, delimiter=b"/", after=after, limit=limit)
            assert len(listed.versions) + len(listed.prefixes) <= limit
            found += sorted([*(one.key for one in listed.versions), *listed.prefixes])
            if listed.next_after is None:
                break
            after = listed.next_after
        assert found == [b"copy of x/", b"copy of y/", b"y/", b"z"]


async def test_where_names_the_fragments_that_a_copy_borrows(made: Made) -> None:
    await made.copy(b"a", b"b")
    one, other = await where(made.plane, made.bucket, b"a"), await where(made.plane, made.bucket, b"b")
    assert [run.fragments for run in one.runs] == [run.fragments for run in other.runs]
    assert other.size == len(DATA)


async def test_a_loan_that_is_gone_is_damage_and_never_an_empty_object(made: Made) -> None:
    await made.copy(b"a", b"b")
    del made.world.ring.values[made.name(b"a")]
    with pytest.raises(DataDamaged):
        await made.read(b"b")


async def test_loans_of_versions_that_are_gone_are_ended_by_a_look(made: Made) -> None:
    await made.copy(b"a", b"b")
    await made.copy(b"a", b"c")
    del made.world.ring.values[made.name(b"b")]  # as if the process had died before it ended the loan
    name = made.name(b"a")
    assert await end_unused(made.plane, made.bucket, name) == 1
    assert len(sharing_of(made.record(b"a")).loans[0].borrowers) == 2, "it is too young to be looked at"
    assert await end_unused(made.plane, made.bucket, name, fresh_ms=-1) == 1
    assert [one.key for one in sharing_of(made.record(b"a")).loans[0].borrowers] == [b"c"]
    assert await made.read(b"c") == DATA


async def test_a_loan_that_a_clock_far_ahead_has_dated_is_ended_too(made: Made) -> None:
    clock: Any = made.plane.clock
    clock.wall += 1000 * FRESH_MS
    await made.copy(b"a", b"b")
    clock.wall -= 1000 * FRESH_MS
    del made.world.ring.values[made.name(b"b")]
    assert await end_unused(made.plane, made.bucket, made.name(b"a")) == 0


async def test_versions_lend_and_borrow(made: Made) -> None:
    made.bucket = made.plane.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))
    first = await made.copy(b"a", b"b")
    assert first.version_id
    for _ in range(20):  # the first one goes to a page
        await put(made.objects, made.bucket, os.urandom(70_000), key=b"b")
    await made.delete(b"a")
    stream = await made.objects.get(made.bucket, b"b", version_id=first.version_id)
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == DATA
    source = CopySource(made.bucket, b"b", first.version_id)
    await made.objects.copy(source, made.bucket, b"c", owner=OWNER, meta=None)
    assert not await made.parts_of(b"c")
    await made.objects.delete(made.bucket, b"a", version_id="null")
    await made.objects.delete(made.bucket, b"b", version_id=first.version_id)
    await made.plane.background.settle()
    assert await made.read(b"c") == DATA
    assert [one.key for one in sharing_of(made.record(b"a")).loans[0].borrowers] == [b"c"]


async def test_one_key_borrows_a_bounded_number_of_times(made: Made) -> None:
    made.bucket = made.plane.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))
    for _ in range(BORROWED_MAX + 1):
        await made.copy(b"a", b"b")
    assert len(await made.parts_of(b"b")) == 1
    assert await made.read(b"b") == DATA


async def test_what_a_dead_process_left_of_loans_keeps_no_bucket_from_being_deleted(made: Made) -> None:
    await made.copy(b"a", b"b")
    await made.objects.delete(made.bucket, b"a")
    assert await end_remains(made.plane, made.bucket) is Left.OBJECTS
    del made.world.ring.values[made.name(b"b")]
    assert await end_remains(made.plane, made.bucket) is Left.NOTHING
    value = made.value(b"a")
    assert value is not None
    assert value.visibility == Visibility.TOMBSTONE


def test_a_record_that_shares_is_read_as_it_was_written_and_by_no_program_that_knows_no_loans() -> None:
    class OldRecord(msgspec.Struct, array_like=True):
        versions: tuple[list[object], ...]

    part = PartEntry(1, b"d" * 16, 1, b"h" * 64, 2, "2+1", ())
    loan = Loan(part, (Borrower(b"i" * 16, b"key", 5),))
    version = Version("null", 1, 1, OWNER, 1, b"d" * 16, b"", False, b"", b"", (part,))
    for versions, kept in (((), ()), ((version,), (Kept(0),)), ((version,) * 20, tuple(map(Kept, range(20))))):
        record = SharingRecord(versions, History(kept), Sharing((loan,), {0: Borrowed(b"other", b"j" * 16)}))
        body = encode_object(record)
        assert shares(body)
        assert decode_object(body) == record
        if versions:
            assert decode_heads([head_of(body)])[0].owner == OWNER
        with pytest.raises(msgspec.ValidationError):
            decode(body[LEAD_BYTES:], OldRecord)
    assert not shares(encode_object(ObjectRecord((version,))))
    assert not shares(b"")


# --- objects that were uploaded in parts


async def upload(made: Made, key: bytes, datas: list[bytes], algorithm: str = "CRC32", kind: str = "") -> str:
    """Returns the ETag."""
    made.plane.limits = dataclasses.replace(made.plane.limits, part_bytes_min=1)
    begun = await made.objects.create_upload(
        made.bucket, key, NewMeta(), algorithm=algorithm, checksum_type=kind, owner=OWNER
    )
    parts = []
    for number, data in enumerate(datas, 1):
        checks = BodyChecks(len(data), algorithms=(algorithm,))
        stored = await made.objects.put_part(made.bucket, key, begun.upload_id, number, pieces(data), checks)
        parts.append(CompletedPart(number, stored.etag, stored.checksums))
    return (await made.objects.complete(made.bucket, key, begun.upload_id, parts, owner=OWNER)).etag


@pytest.mark.parametrize("count", [1, 3, 32, 33, 300])
async def test_a_copy_of_an_upload_has_its_parts_and_its_data_goes_with_the_last_of_them(
    made: Made, count: int
) -> None:
    datas = [os.urandom(5_000 + number) for number in range(count)]
    etag = await upload(made, b"m", datas)
    source, fragments = await made.objects.head(made.bucket, b"m"), made.fragments()
    await made.copy(b"m", b"b", meta=NewMeta({"content-type": "x/y"}))
    result = await made.copy(b"b", b"c")
    assert (result.etag, result.checksums, result.checksum_type) == (etag, source.checksums, "COMPOSITE")
    assert made.fragments() == fragments
    assert not await made.parts_of(b"c")
    copied = await made.objects.head(made.bucket, b"c")
    assert (copied.etag, copied.part_count, copied.parts) == (etag, count, source.parts)
    await put(made.objects, made.bucket, b"something else", key=b"m")
    await made.delete(b"b")
    await made.plane.background.settle()
    assert await made.read(b"c") == b"".join(datas)
    assert b"".join(await _part(made, b"c", count)) == datas[-1]
    assert not made.retired() & {part.data_id for part in source.parts}
    await made.delete(b"c")
    await made.plane.background.settle()
    assert made.retired() >= {part.data_id for part in source.parts}


async def _part(made: Made, key: bytes, number: int) -> list[bytes]:
    stream = await made.objects.get(made.bucket, key, part_number=number)
    return [bytes(piece) async for piece in stream.chunks()]


@pytest.mark.parametrize(
    ("algorithm", "kind", "asked", "moves"),
    [
        ("SHA256", "COMPOSITE", "", False),
        ("SHA256", "COMPOSITE", "SHA256", True),
        ("CRC32", "FULL_OBJECT", "CRC32", False),
        ("CRC32", "FULL_OBJECT", "SHA256", True),
    ],
)
async def test_a_copy_of_an_upload_that_names_a_checksum_gets_one_of_the_whole_object(
    made: Made, algorithm: str, kind: str, asked: str, moves: bool
) -> None:
    datas = [os.urandom(70_000), os.urandom(80_000)]
    etag = await upload(made, b"m", datas, algorithm, kind)
    before = await made.objects.head(made.bucket, b"m")
    result = await made.copy(b"m", b"b", algorithm=asked)
    assert bool(await made.parts_of(b"b")) is moves
    assert await made.read(b"b") == b"".join(datas)
    if not moves:
        assert (result.etag, result.checksums, result.checksum_type) == (etag, before.checksums, kind)
        return
    assert (result.etag, result.checksum_type) == (hashlib.md5(b"".join(datas)).hexdigest(), "FULL_OBJECT")
    assert tuple(result.checksums) == (asked,)
    assert not sharing_of(made.record(b"m")).loans


@pytest.mark.parametrize("count", [2, 33])
async def test_a_record_that_names_other_parts_than_are_sealed_lends_nothing(made: Made, count: int) -> None:
    """A hostile replica may have put them there: what the copy would read is damage."""
    await upload(made, b"m", [os.urandom(5_000) for _ in range(count)])
    value, record = made.value(b"m"), made.record(b"m")
    assert value is not None
    version = record.versions[0]
    parts = [part async for part in parts_of(made.plane.pages, made.name(b"m"), version)]
    await lent_of(made.plane, made.bucket, b"m", await find(made.plane, made.bucket, b"m", ""))
    swapped = await with_parts(made.plane.pages, made.name(b"m"), version, parts[::-1])
    body = encode_object(msgspec.structs.replace(record, versions=(swapped,)))
    made.world.ring.values[made.name(b"m")] = msgspec.structs.replace(value, body=body)
    with pytest.raises(DataDamaged):
        await made.copy(b"m", b"b")
    assert made.value(b"b") is None
    assert not sharing_of(made.record(b"m")).loans


# --- parts on pages


async def _pages(made: Made, key: bytes, *, complete: bool = True) -> set[bytes]:
    """The pages that a key's record needs."""
    return {page async for page in pages_in(made.plane.pages, made.name(key), made.value(key), complete=complete)}


async def test_pages_with_lent_parts_are_those_of_the_owner_and_the_sealed_list_is_the_copys_own(made: Made) -> None:
    await upload(made, b"m", [os.urandom(5_000) for _ in range(300)])
    before = await _pages(made, b"m")
    await made.copy(b"m", b"b")
    [loan] = sharing_of(made.record(b"m")).loans
    assert (loan.part, loan.parts, len(loan.pages)) == (None, (), 2)
    assert await _pages(made, b"m") == before
    own = await _pages(made, b"b")
    assert (len(own), own & before) == (1, set())
    version = made.record(b"b").versions[0]
    assert (version.pages, version.manifest, version.parts) == (tuple(own), b"", ())
    await made.delete(b"m")
    assert await _pages(made, b"m") == set(loan.pages) == {loan.manifest, *loan.pages}
    assert len(await made.parts_of(b"m")) == 300
    found = await find_data(made.plane, made.bucket, b"b", "")
    assert set(found.opened.version.pages) == set(loan.pages) | own, "a long download holds all of them"
    forgetful = msgspec.structs.replace(loan, pages=())
    record = made.record(b"m")
    assert isinstance(record, SharingRecord)
    body = encode_object(msgspec.structs.replace(record, sharing=Sharing((forgetful,))))
    value = made.value(b"m")
    assert value is not None
    made.world.ring.values[made.name(b"m")] = msgspec.structs.replace(value, body=body)
    with pytest.raises(DataDamaged):
        await _pages(made, b"m")


async def test_the_pages_of_a_copy_are_put_between_promise_and_accept(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a sweep that looked before could delete them."""
    await upload(made, b"m", [os.urandom(5_000) for _ in range(33)])
    before = set(made.world.ring.pages)

    looks = loans.check_lent

    async def promised(*what: Any) -> None:
        assert set(made.world.ring.pages) == before
        await looks(*what)

    monkeypatch.setattr(loans, "check_lent", promised)
    await made.copy(b"m", b"b")
    assert set(made.world.ring.pages) == before | await _pages(made, b"b")
    assert len(before) < len(made.world.ring.pages)


@pytest.mark.parametrize("gone", [False, True])
async def test_a_move_of_a_part_on_a_lent_page_is_one_change_of_version_and_loan(made: Made, gone: bool) -> None:
    datas = [os.urandom(5_000) for _ in range(300)]
    await upload(made, b"m", datas)
    await made.copy(b"m", b"b")
    if gone:
        await made.delete(b"m")
    name = made.name(b"m")
    part = (await made.parts_of(b"m"))[290]
    run = part.runs[0]
    ask = MoveAsk(name.pack(), part.data_id, run, msgspec.structs.replace(run, moved={0: "elsewhere"}))
    found = await body_after(made.plane.pages, name, made.value(b"m"), [(ask, Profile(run.k, run.m))])
    assert found is not None
    record = decode_object(found[0])
    [loan] = sharing_of(record).loans
    for having in (loan, *record.versions):
        parts = [one async for one in parts_of(made.plane.pages, name, having)]
        assert [index for index, one in enumerate(parts) if one.runs[0].moved] == [290]
        assert set(having.pages) >= {having.manifest}
    assert len(record.versions) == (0 if gone else 1)
    assert {version.manifest for version in record.versions} <= {loan.manifest}
    assert set(found[1]) >= set(loan.pages) - await _pages(made, b"m")
    value = made.value(b"m")
    assert value is not None
    change = Change(found[0], value.visibility, value.payload)
    await made.plane.registers.change(name, lambda _value: change)
    await made.copy(b"b", b"c")
    assert len(sharing_of(made.record(b"m")).loans[0].borrowers) == 2
    assert await made.read(b"c") == b"".join(datas)
    again = await body_after(made.plane.pages, name, made.value(b"m"), [(ask, Profile(run.k, run.m))])
    assert again is None, "it was made"


async def test_nothing_moves_while_a_page_of_a_loan_cannot_be_read(made: Made) -> None:
    await upload(made, b"m", [os.urandom(5_000) for _ in range(33)])
    await made.copy(b"m", b"b")
    await put(made.objects, made.bucket, DATA, key=b"m")
    [loan] = sharing_of(made.record(b"m")).loans
    name, part = made.name(b"m"), made.record(b"m").versions[0].parts[0]
    run = part.runs[0]
    ask = MoveAsk(name.pack(), part.data_id, run, msgspec.structs.replace(run, moved={0: "elsewhere"}))
    move = [(ask, Profile(run.k, run.m))]
    page = made.world.ring.pages.pop(loan.manifest)
    assert await body_after(made.plane.pages, name, made.value(b"m"), move) is None
    seen: list[DataDamaged] = []
    value = made.value(b"m")
    assert value is not None
    found = [one async for one in parts_in(made.plane.pages, name, value.body, Table.OBJECT, on_unreadable=seen.append)]
    assert (found, len(seen)) == ([part], 1)
    with pytest.raises(DataDamaged):
        await made.parts_of(b"m")
    made.world.ring.pages[loan.manifest] = page
    assert await body_after(made.plane.pages, name, made.value(b"m"), move) is not None


async def test_a_record_lends_a_bounded_number_of_pages(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loans, "LENT_PAGES_MAX", 3)
    for number in range(2):
        await upload(made, b"m", [os.urandom(2_000) for _ in range(300)])
        await made.copy(b"m", b"copy %d" % number)
        assert bool(await made.parts_of(b"copy %d" % number)) is bool(number)


async def test_a_version_with_parts_on_pages_lends_and_its_copy_is_one_of_versions(made: Made) -> None:
    made.bucket = made.plane.configurations.put(made.bucket, NOTHING.having(VERSIONING, Versioning(ENABLED)))
    datas = [os.urandom(5_000) for _ in range(40)]
    await upload(made, b"m", datas)
    copied = await made.copy(b"m", b"b")
    for _ in range(20):  # both go to pages of older versions
        await put(made.objects, made.bucket, os.urandom(70_000), key=b"b")
        await put(made.objects, made.bucket, os.urandom(70_000), key=b"m")
    source = CopySource(made.bucket, b"b", copied.version_id)
    await made.objects.copy(source, made.bucket, b"c", owner=OWNER, meta=None)
    assert not await made.parts_of(b"c")
    assert await made.read(b"c") == b"".join(datas)
    assert b"".join(await _part(made, b"c", 40)) == datas[39]
    await made.objects.set_tags(made.bucket, b"c", {"t": "1"})
    await made.objects.set_encryption(made.bucket, b"c", Encryption(KMS, "arn:of:key"))
    assert await made.read(b"c") == b"".join(datas)
    assert (await made.objects.head(made.bucket, b"c")).part_count == 40
