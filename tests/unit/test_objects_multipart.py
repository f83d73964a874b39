"""Multipart uploads: parts move into the object without moving data, Complete happens once, and nothing that is
referred to is ever garbage.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import zlib
from collections.abc import Callable

import msgspec
import pytest

from storaged.errors import (
    BadDigest,
    ConditionalRequestConflict,
    DataDamaged,
    EntityTooSmall,
    InvalidArgument,
    InvalidPart,
    InvalidPartNumber,
    InvalidPartOrder,
    InvalidRequest,
    MalformedXML,
    NoSuchKey,
    NoSuchUpload,
    PreconditionFailed,
    StoragedError,
    XAmzContentSHA256Mismatch,
)
from storaged.meta.names import Change, RegisterName, Table, object_name
from storaged.objects.api import (
    CHECKSUM_ALGORITHMS,
    BodyChecks,
    CompletedPart,
    CopySource,
    NewMeta,
    PutResult,
    RangeSpec,
    WriteConditions,
)
from storaged.objects.etags import ANY, tag
from storaged.objects.records import BucketRecord, ObjectRecord, PartEntry, decode_object, encode_object
from storaged.objects.service import ObjectService
from storaged.objects.upload_records import PartRecord
from storaged.objects.write import multipart
from storaged.objects.write.references import live_references, parts_in
from storaged.objects.write.uploads import parse_upload_id, part_rows
from storaged.wire import encode
from tests.unit.test_objects_put_get import OWNER, bucket_of, got, pieces, put
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time


async def uploaded(
    objects: ObjectService,
    bucket: BucketRecord,
    datas: list[bytes],
    *,
    algorithm: str = "",
    kind: str = "",
    meta: NewMeta | None = None,
) -> tuple[str, list[CompletedPart]]:
    upload = await objects.create_upload(
        bucket, b"key", meta or NewMeta(), owner=OWNER, algorithm=algorithm, checksum_type=kind
    )
    parts = []
    for number, data in enumerate(datas, 1):
        result = await objects.put_part(bucket, b"key", upload.upload_id, number, pieces(data), BodyChecks(len(data)))
        assert result.etag == hashlib.md5(data).hexdigest()
        parts.append(CompletedPart(number, result.etag, dict(result.checksums)))
    return upload.upload_id, parts


async def complete(
    objects: ObjectService, bucket: BucketRecord, upload_id: str, parts: list[CompletedPart], **more: object
) -> PutResult:
    return await objects.complete(bucket, b"key", upload_id, parts, owner=OWNER, **more)  # type: ignore[arg-type]


def world_of() -> tuple[World, ObjectService, BucketRecord]:
    world = World(part_bytes_min=1000)
    return world, ObjectService(world.plane()), bucket_of(world)


def etag_of(datas: list[bytes]) -> str:
    return hashlib.md5(b"".join(hashlib.md5(data).digest() for data in datas)).hexdigest() + f"-{len(datas)}"


async def test_parts_become_one_object_that_reads_whole_by_range_and_by_part_number() -> None:
    world, objects, bucket = world_of()
    datas = [os.urandom(size) for size in (200_000, 5000, 1500, 70_000, 10)]
    upload_id, parts = await uploaded(
        objects, bucket, datas, meta=NewMeta({"content-type": "a/b"}, {"x": "y"}, {"t": "1"})
    )
    before = {(disk, f) for disk, store in world.disks.disks.items() for f in store.fragments}
    result = await complete(objects, bucket, upload_id, parts)
    assert before == {(disk, f) for disk, store in world.disks.disks.items() for f in store.fragments}
    whole = b"".join(datas)
    assert (result.etag, result.size) == (etag_of(datas), len(whole))
    assert await got(objects, bucket) == whole
    for first, last in [(199_999, 200_000), (0, len(whole) - 1), (204_999, 206_600), (len(whole) - 11, None)]:
        assert (
            await got(objects, bucket, span=RangeSpec(first, last)) == whole[first : None if last is None else last + 1]
        )
    for number, data in enumerate(datas, 1):
        stream = await objects.get(bucket, b"key", part_number=number)
        assert (b"".join([bytes(piece) async for piece in stream.chunks()]), stream.partial) == (data, True)
    for bad in (0, 6):
        with pytest.raises(InvalidPartNumber):
            await objects.head(bucket, b"key", part_number=bad)
    info = await objects.head(bucket, b"key")
    assert (info.part_count, info.headers, info.user, info.tags) == (5, {"content-type": "a/b"}, {"x": "y"}, {"t": "1"})
    assert [(part.number, part.size, part.etag) for part in info.parts] == [
        (number, len(data), hashlib.md5(data).hexdigest()) for number, data in enumerate(datas, 1)
    ]
    await objects.close()


@pytest.mark.slow
async def test_ten_thousand_parts_are_kept_in_pages() -> None:
    world = World(part_bytes_min=1)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    upload = await objects.create_upload(bucket, b"key", NewMeta(), owner=OWNER)
    datas = [b"%05d" % number for number in range(1, 10_001)]

    async def one(number: int) -> CompletedPart:
        data = datas[number - 1]
        return CompletedPart(
            number, (await objects.put_part(bucket, b"key", upload.upload_id, number, pieces(data), BodyChecks(5))).etag
        )

    parts: list[CompletedPart] = []
    for start in range(1, 10_001, 500):
        parts += await asyncio.gather(*(one(number) for number in range(start, start + 500)))
    result = await complete(objects, bucket, upload.upload_id, parts)
    assert result.etag == etag_of(datas)
    assert await got(objects, bucket) == b"".join(datas)
    assert await got(objects, bucket, span=RangeSpec(49_990, 49_999)) == datas[-2] + datas[-1]
    info = await objects.head(bucket, b"key", part_number=10_000)
    assert (len(info.parts), info.parts[-1].etag) == (10_000, hashlib.md5(datas[-1]).hexdigest())
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    assert len(world.ring.values[name].body) < 2000
    assert len(await live_references(world.ring, world.ring, world.ring, name)) == 10_000
    with pytest.raises(InvalidArgument):
        await objects.put_part(bucket, b"key", upload.upload_id, 10_001, pieces(b"x"), BodyChecks(1))
    await objects.close()


@pytest.mark.parametrize("liar", ["swapped", "doubled", "dropped", "older", "flattened", "resized"])
async def test_a_record_whose_parts_are_not_those_that_were_completed_is_refused(liar: str) -> None:
    """Every part opens by itself: what binds them together, and in this order, is sealed in the version's metadata. A
    storage node that lies could else serve
    the parts in another order, or an attempt at a part that was superseded, as the object."""
    world, objects, bucket = world_of()
    datas = [bytes([number]) * 70_000 for number in (1, 2, 3)]
    upload_id, parts = await uploaded(objects, bucket, datas)
    older = (await stored_parts(world, bucket, upload_id))[1]
    again = await objects.put_part(bucket, b"key", upload_id, 2, pieces(b"x" * 70_000), BodyChecks(70_000))
    parts[1] = CompletedPart(2, again.etag)
    await complete(objects, bucket, upload_id, parts)
    assert await got(objects, bucket) == datas[0] + b"x" * 70_000 + datas[2]
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    value = (await world.ring.read(name)).value
    assert value is not None
    version = decode_object(value.body).versions[0]
    first, second, third = version.parts
    changed = {
        "swapped": {"parts": (second, first, third)},
        "doubled": {"parts": (first, first, third)},
        "dropped": {"parts": (first, third)},
        "older": {"parts": (first, older, third)},
        "flattened": {"parts": (third, second, first), "multipart": False, "part_count": 1},
        "resized": {
            "parts": (msgspec.structs.replace(first, size=69_999), second, msgspec.structs.replace(third, size=70_001))
        },
    }[liar]
    forged = encode_object(ObjectRecord((msgspec.structs.replace(version, **changed),)))
    await world.ring.change(name, lambda _value: Change(forged))
    whole = datas[0] + b"x" * 70_000 + datas[2]
    with pytest.raises(DataDamaged):
        await got(objects, bucket)
    for start in (0, 69_995, 139_995, 209_990):
        try:
            assert await got(objects, bucket, span=RangeSpec(start, start + 9)) == whole[start : start + 10]
        except DataDamaged:
            continue
    await objects.close()


async def test_a_single_body_is_the_one_part_that_its_record_is_bound_to() -> None:
    world, objects, bucket = world_of()
    data = os.urandom(100_000)
    await put(objects, bucket, data)
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    value = (await world.ring.read(name)).value
    assert value is not None
    version = decode_object(value.body).versions[0]
    assert await got(objects, bucket) == data
    (only,) = version.parts
    for parts in (
        (),
        (msgspec.structs.replace(only, data_id=bytes(16)),),
        (msgspec.structs.replace(only, size=50_000), only),
    ):
        forged = encode_object(ObjectRecord((msgspec.structs.replace(version, parts=parts),)))
        await world.ring.change(name, lambda _value, forged=forged: Change(forged))
        with pytest.raises(DataDamaged):
            await got(objects, bucket)
    await objects.close()


@pytest.mark.parametrize("algorithm", ["", "CRC32", "SHA256"])
@pytest.mark.parametrize("size", [10, 200_000])
async def test_a_part_that_is_not_what_was_signed_is_refused_whatever_the_upload_was_created_for(
    algorithm: str, size: int
) -> None:
    _world, objects, bucket = world_of()
    data = os.urandom(size)
    upload = await objects.create_upload(bucket, b"key", NewMeta(), owner=OWNER, algorithm=algorithm)
    with pytest.raises(XAmzContentSHA256Mismatch):
        await objects.put_part(bucket, b"key", upload.upload_id, 1, pieces(data), BodyChecks(size, sha256="0" * 64))
    signed = BodyChecks(size, sha256=hashlib.sha256(data).hexdigest())
    assert (await objects.put_part(bucket, b"key", upload.upload_id, 1, pieces(data), signed)).etag == hashlib.md5(
        data
    ).hexdigest()
    await objects.close()


def _with_run(entry: PartEntry, **changes: int) -> PartEntry:
    return msgspec.structs.replace(entry, runs=(msgspec.structs.replace(entry.runs[0], **changes),))


@pytest.mark.parametrize(
    "forge",
    [
        lambda entry: _with_run(entry, k=0),
        lambda entry: _with_run(entry, k=-1),
        lambda entry: _with_run(entry, k=10**9),
        lambda entry: _with_run(entry, m=10**12),
        lambda entry: _with_run(entry, m=-4),
        lambda entry: _with_run(entry, first=-1),
        lambda entry: _with_run(entry, count=2**60),
        lambda entry: msgspec.structs.replace(entry, runs=entry.runs * 1000),
        lambda entry: msgspec.structs.replace(entry, block_cells=0),
        lambda entry: msgspec.structs.replace(entry, block_cells=2**62),
        lambda entry: msgspec.structs.replace(entry, size=2**62),
        lambda entry: msgspec.structs.replace(entry, size=-1),
        lambda entry: msgspec.structs.replace(entry, number=2**40),
        lambda entry: msgspec.structs.replace(entry, data_id=b""),
        lambda entry: msgspec.structs.replace(entry, header=b""),
        lambda entry: msgspec.structs.replace(entry, target="4+two"),
        lambda entry: msgspec.structs.replace(entry, target=""),
    ],
)
async def test_a_record_that_cannot_be_is_damage_to_whoever_reads_or_repairs_it(
    forge: Callable[[PartEntry], PartEntry],
) -> None:
    """Where parts lie has no authenticator. Whatever a storage node writes there must cost one key, and not the gateway
    that reads it or the node that repairs it.
    """
    world, objects, bucket = world_of()
    await put(objects, bucket, os.urandom(100_000))
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    value = (await world.ring.read(name)).value
    assert value is not None
    version = decode_object(value.body).versions[0]
    forged = forge(version.parts[0])
    body = encode_object(ObjectRecord((msgspec.structs.replace(version, parts=(forged,)),)))
    await world.ring.change(name, lambda _value: Change(body))
    with pytest.raises(DataDamaged):
        await got(objects, bucket)
    for record, table in ((body, Table.OBJECT), (encode(PartRecord(forged, 0, b"")), Table.PART)):
        with pytest.raises(DataDamaged):
            _ = [part async for part in parts_in(world.ring, name, record, table)]
    await objects.close()


async def stored_parts(world: World, bucket: BucketRecord, upload_id: str) -> list[PartEntry]:
    rows = part_rows(world.ring, bucket.id, parse_upload_id(upload_id))
    return [row.entry async for row in rows]


async def test_complete_names_what_is_wrong_and_leaves_the_upload_open() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b" * 999, b"c" * 10])
    wrong: list[tuple[type[StoragedError], list[CompletedPart]]] = [
        (MalformedXML, []),
        (InvalidPartOrder, [parts[1], parts[0]]),
        (InvalidPartOrder, [parts[0], parts[0]]),
        (InvalidPart, [CompletedPart(1, "0" * 32)]),
        (InvalidPart, [parts[0], CompletedPart(7, parts[1].etag)]),
        (EntityTooSmall, parts),
    ]
    for error, request in wrong:
        with pytest.raises(error):
            await complete(objects, bucket, upload_id, request)
    with pytest.raises(InvalidRequest):
        await complete(objects, bucket, upload_id, [parts[0]], declared_size=999)
    with pytest.raises(NoSuchKey):
        await objects.head(bucket, b"key")
    await complete(objects, bucket, upload_id, [parts[0], parts[2]], declared_size=1010)
    assert await got(objects, bucket) == b"a" * 1000 + b"c" * 10
    for bad in ("", "AAAA", "x" * 22, "é"):
        with pytest.raises(NoSuchUpload):
            await complete(objects, bucket, bad, [parts[0]])
    await objects.close()


async def test_a_repeated_complete_gets_the_same_answer_even_after_the_object_is_gone() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b"])
    first = await complete(objects, bucket, upload_id, parts)
    assert await complete(objects, bucket, upload_id, parts) == first
    await objects.delete(bucket, b"key")
    assert await complete(objects, bucket, upload_id, parts) == first
    with pytest.raises(NoSuchKey):
        await objects.head(bucket, b"key")
    for call in (complete(objects, bucket, upload_id, parts[:1]), objects.abort(bucket, b"key", upload_id)):
        with pytest.raises(NoSuchUpload):
            await call
    with pytest.raises(NoSuchUpload):
        await objects.put_part(bucket, b"key", upload_id, 1, pieces(b"z"), BodyChecks(1))
    await objects.close()


async def test_conditions_of_complete_are_judged_at_its_commit_and_the_upload_stays_open_when_they_fail() -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000])

    async def rival(name: RegisterName) -> None:
        if name.table != Table.OBJECT:
            world.ring.interfere = rival
            return
        await put(objects, bucket, b"rival")

    world.ring.interfere = rival
    with pytest.raises(PreconditionFailed):
        await complete(objects, bucket, upload_id, parts, conditions=WriteConditions(if_none_match=ANY))
    assert await got(objects, bucket) == b"rival"
    assert [part.number for part in (await objects.list_parts(bucket, b"key", upload_id))[1]] == [1]
    with pytest.raises(PreconditionFailed):
        await complete(objects, bucket, upload_id, parts, conditions=WriteConditions(if_match=tag("0" * 32)))
    etag = hashlib.md5(b"rival").hexdigest()
    await complete(objects, bucket, upload_id, parts, conditions=WriteConditions(if_match=tag(etag)))
    assert await got(objects, bucket) == b"a" * 1000
    await objects.close()


async def stopped_before_done(
    world: World, objects: ObjectService, bucket: BucketRecord, upload_id: str, parts: list[CompletedPart], table: Table
) -> None:
    """A Complete whose gateway dies when it is about to change a register of ``table`` for the second time (UPLOAD:
    Done) or first (OBJECT).
    """
    seen = 0

    async def die(name: RegisterName) -> None:
        nonlocal seen
        seen += name.table == table
        if seen == (2 if table == Table.UPLOAD else 1):
            raise ConnectionError("the gateway died")
        world.ring.interfere = die

    world.ring.interfere = die
    with pytest.raises(ConnectionError):
        await complete(objects, bucket, upload_id, parts)


@pytest.mark.parametrize("table", [Table.OBJECT, Table.UPLOAD])
async def test_a_complete_that_was_interrupted_is_taken_up_again_by_the_same_request(table: Table) -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b" * 2000])
    await stopped_before_done(world, objects, bucket, upload_id, parts, table)
    with pytest.raises(ConditionalRequestConflict):
        await complete(objects, bucket, upload_id, parts[:1])
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    await objects.put_part(
        bucket, b"key", upload_id, 1, pieces(b"another"), BodyChecks(7)
    )  # replaces a row, not what is pinned
    pinned = (
        {part.data_id for part in decode_object(world.ring.values[name].body).versions[0].parts}
        if table == Table.UPLOAD
        else set()
    )
    assert pinned <= await live_references(world.ring, world.ring, world.ring, name)
    result = await complete(objects, bucket, upload_id, parts)
    assert await complete(objects, bucket, upload_id, parts) == result
    assert await got(objects, bucket) == b"a" * 1000 + b"b" * 2000
    version = decode_object(world.ring.values[name].body).versions[0]
    assert {part.data_id for part in version.parts} <= await live_references(world.ring, world.ring, world.ring, name)
    await objects.close()


async def test_a_complete_taken_up_after_the_object_changed_says_so_and_opens_the_upload_again() -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000])
    await stopped_before_done(world, objects, bucket, upload_id, parts, Table.UPLOAD)
    await put(objects, bucket, b"newer")
    with pytest.raises(ConditionalRequestConflict):
        await complete(objects, bucket, upload_id, parts)
    assert await got(objects, bucket) == b"newer"
    await complete(objects, bucket, upload_id, parts)
    assert await got(objects, bucket) == b"a" * 1000
    await objects.close()


async def test_an_abort_ends_a_complete_that_has_not_committed_and_none_that_has() -> None:
    for table, survives in ((Table.OBJECT, False), (Table.UPLOAD, True)):
        world, objects, bucket = world_of()
        upload_id, parts = await uploaded(objects, bucket, [b"a" * 3000])
        await stopped_before_done(world, objects, bucket, upload_id, parts, table)
        if survives:
            with pytest.raises(NoSuchUpload):
                await objects.abort(bucket, b"key", upload_id)
            assert await got(objects, bucket) == b"a" * 3000
            assert (await complete(objects, bucket, upload_id, parts)).size == 3000
        else:
            await objects.abort(bucket, b"key", upload_id)
            with pytest.raises(NoSuchUpload):
                await complete(objects, bucket, upload_id, parts)
            with pytest.raises(NoSuchKey):
                await objects.head(bucket, b"key")
        await objects.close()


async def test_an_abort_that_comes_between_promise_and_accept_wins_or_loses_wholly() -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 3000])

    async def abort_now(name: RegisterName) -> None:
        if name.table != Table.OBJECT:
            world.ring.interfere = abort_now
            return
        await objects.abort(bucket, b"key", upload_id)

    world.ring.interfere = abort_now
    with pytest.raises(NoSuchUpload):
        await complete(objects, bucket, upload_id, parts)
    with pytest.raises(NoSuchKey):
        await objects.head(bucket, b"key")
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    assert not await live_references(world.ring, world.ring, world.ring, name)
    await objects.close()


async def test_aborted_and_superseded_and_unused_parts_go_to_the_garbage_lists() -> None:
    world, objects, bucket = world_of()
    upload_id, _ = await uploaded(objects, bucket, [os.urandom(3000), os.urandom(3000)])
    first = {f.data_id for disk in world.disks.disks.values() for f in disk.fragments}
    again = await objects.put_part(bucket, b"key", upload_id, 1, pieces(b"x" * 3000), BodyChecks(3000))
    await objects.plane.background.settle()
    superseded = {data_id for disk in world.disks.disks.values() for data_id in disk.garbage}
    assert len(superseded) == 1
    assert superseded < first
    await complete(objects, bucket, upload_id, [CompletedPart(1, again.etag)])
    await objects.plane.background.settle()
    garbage = {data_id for disk in world.disks.disks.values() for data_id in disk.garbage}
    assert garbage == first
    upload_id, _ = await uploaded(objects, bucket, [os.urandom(3000)])
    await objects.abort(bucket, b"key", upload_id)
    with pytest.raises(NoSuchUpload):
        await objects.list_parts(bucket, b"key", upload_id)
    await objects.plane.background.settle()
    assert len({data_id for disk in world.disks.disks.values() for data_id in disk.garbage} - garbage) == 1
    assert await got(objects, bucket) == b"x" * 3000
    await objects.close()


async def test_parts_of_an_aborted_upload_whose_bucket_goes_meanwhile_are_left_to_the_sweep() -> None:
    world, objects, bucket = world_of()
    upload_id, _ = await uploaded(objects, bucket, [os.urandom(3000), os.urandom(3000)])
    found = await multipart.open_upload(objects.plane, bucket, b"key", upload_id)
    world.ring.fences[bucket.id] = (b"nonce", True)
    await multipart.drop_parts(objects.plane, bucket, found)
    assert sum(name.table == Table.PART and value.visibility > 0 for name, value in world.ring.values.items()) == 2
    await objects.close()


async def test_a_copied_range_beyond_its_source_is_an_invalid_argument_or_request() -> None:
    _, objects, bucket = world_of()
    await put(objects, bucket, b"0123456789", key=b"source")
    upload_id, _ = await uploaded(objects, bucket, [])
    for span, error in ((RangeSpec(0, 21), InvalidArgument), (RangeSpec(10, 10), InvalidRequest)):
        with pytest.raises(error):
            await objects.copy_part(CopySource(bucket, b"source", span=span), bucket, b"key", upload_id, 1)
    await objects.close()


async def test_a_part_that_arrives_while_its_upload_is_aborted_is_refused() -> None:
    world, objects, bucket = world_of()
    upload_id, _ = await uploaded(objects, bucket, [])

    async def abort_now(name: RegisterName) -> None:
        assert name.table == Table.PART
        await objects.abort(bucket, b"key", upload_id)

    world.ring.interfere = abort_now
    with pytest.raises(NoSuchUpload):
        await objects.put_part(bucket, b"key", upload_id, 1, pieces(b"x" * 3000), BodyChecks(3000))
    await objects.plane.background.settle()
    assert all(value.visibility < 2 for name, value in world.ring.values.items())
    await objects.close()


async def test_a_part_stays_where_its_upload_seems_never_to_have_been() -> None:
    """A replica that lies, with one that lags, may hide the upload's row for a moment: it has not ended."""
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 3000])
    hidden = {}

    async def hide(name: RegisterName) -> None:
        assert name.table == Table.PART
        for upload in [name for name in world.ring.values if name.table == Table.UPLOAD]:
            hidden[upload] = world.ring.values.pop(upload)

    world.ring.interfere = hide
    with pytest.raises(NoSuchUpload):
        await objects.put_part(bucket, b"key", upload_id, 1, pieces(b"a" * 3000), BodyChecks(3000))
    assert hidden
    world.ring.values |= hidden
    await objects.plane.background.settle()
    await complete(objects, bucket, upload_id, parts)
    assert await got(objects, bucket) == b"a" * 3000
    await objects.close()


@pytest.mark.parametrize("algorithm", CHECKSUM_ALGORITHMS)
async def test_checksums_of_parts_combine_as_the_upload_was_created_for(algorithm: str) -> None:
    _, objects, bucket = world_of()
    datas = [b"a" * 1234, b"b" * 7]
    for kind in ("COMPOSITE", "FULL_OBJECT"):
        impossible = (
            kind == "COMPOSITE"
            if algorithm == "CRC64NVME"
            else kind == "FULL_OBJECT" and not algorithm.startswith("CRC")
        )
        if impossible:
            with pytest.raises(InvalidRequest):
                await uploaded(objects, bucket, datas, algorithm=algorithm, kind=kind)
            continue
        upload_id, parts = await uploaded(objects, bucket, datas, algorithm=algorithm, kind=kind)
        assert all(part.checksums for part in parts)
        with pytest.raises(BadDigest):
            await complete(objects, bucket, upload_id, parts, checksums={algorithm: "AAAA"})
        with pytest.raises(InvalidPart):
            await complete(objects, bucket, upload_id, [CompletedPart(1, parts[0].etag, {algorithm: "AAAA"}), parts[1]])
        result = await complete(objects, bucket, upload_id, parts)
        assert result.checksum_type == kind
        if algorithm == "CRC32":
            whole = zlib.crc32(b"".join(datas)).to_bytes(4, "big")
            each = zlib.crc32(b"".join(zlib.crc32(data).to_bytes(4, "big") for data in datas)).to_bytes(4, "big")
            expected = base64.b64encode(whole if kind == "FULL_OBJECT" else each).decode() + (
                "" if kind == "FULL_OBJECT" else "-2"
            )
            assert result.checksums == {"CRC32": expected}
        if kind == "FULL_OBJECT":
            whole_put = await objects.put(
                bucket,
                b"whole",
                pieces(b"".join(datas)),
                NewMeta(),
                BodyChecks(None, algorithms=(algorithm,)),
                owner=OWNER,
            )
            assert whole_put.checksums == result.checksums
        info = await objects.head(bucket, b"key")
        assert (info.checksums, info.checksum_type) == (result.checksums, kind)
        assert [part.checksum for part in info.parts] == [part.checksums[algorithm] for part in parts]
    await objects.close()


async def test_parts_are_copied_from_ranges_of_other_objects() -> None:
    _, objects, bucket = world_of()
    data = os.urandom(300_000)
    await put(objects, bucket, data, key=b"src")
    upload = await objects.create_upload(bucket, b"key", NewMeta(), owner=OWNER)
    parts = []
    for number, span in ((1, RangeSpec(0, 99_999)), (2, RangeSpec(100_000, 299_999))):
        result = await objects.copy_part(
            CopySource(bucket, b"src", span=span), bucket, b"key", upload.upload_id, number
        )
        parts.append(CompletedPart(number, result.etag))
    for span, error in ((RangeSpec(300_000, 300_001), InvalidRequest), (RangeSpec(0, 300_000), InvalidArgument)):
        with pytest.raises(error):
            await objects.copy_part(CopySource(bucket, b"src", span=span), bucket, b"key", upload.upload_id, 3)
    await objects.delete(bucket, b"src")
    await complete(objects, bucket, upload.upload_id, parts)
    assert await got(objects, bucket) == data
    await objects.close()


async def test_uploads_and_parts_are_listed_in_pages() -> None:
    _, objects, bucket = world_of()
    ids: dict[bytes, list[str]] = {}
    for key in (b"a", b"a", b"b/1", b"b/2", b"c", b"\xc3\xa9/x"):
        info = await objects.create_upload(bucket, key, NewMeta(storage_class="STANDARD"), owner=OWNER)
        ids.setdefault(key, []).append(info.upload_id)
    listed, marker = [], (b"", "")
    while True:
        uploads, prefixes, following = await objects.list_uploads(
            bucket, after_key=marker[0], after_upload=marker[1], limit=2
        )
        assert not prefixes
        listed += [(upload.key, upload.upload_id) for upload in uploads]
        if following is None:
            break
        marker = following
    assert [key for key, _ in listed] == [b"a", b"a", b"b/1", b"b/2", b"c", b"\xc3\xa9/x"]
    assert {upload for _, upload in listed} == {upload for each in ids.values() for upload in each}
    uploads, prefixes, following = await objects.list_uploads(bucket, delimiter=b"/", limit=3)
    assert ([upload.key for upload in uploads], prefixes) == ([b"a", b"a"], [b"b/"])
    assert following is not None
    uploads, prefixes, following = await objects.list_uploads(
        bucket, delimiter=b"/", after_key=following[0], after_upload=following[1]
    )
    assert ([upload.key for upload in uploads], prefixes, following) == ([b"c"], [b"\xc3\xa9/"], None)
    uploads, _, _ = await objects.list_uploads(bucket, prefix=b"b/")
    assert [upload.key for upload in uploads] == [b"b/1", b"b/2"]
    upload_id, _ = await uploaded(objects, bucket, [b"1", b"22", b"333"])
    _, found, after = await objects.list_parts(bucket, b"key", upload_id, limit=2)
    assert ([part.size for part in found], after) == ([1, 2], 2)
    _, found, after = await objects.list_parts(bucket, b"key", upload_id, after=2)
    assert ([part.size for part in found], after) == ([3], None)
    await objects.close()


async def test_finished_uploads_are_forgotten_after_a_day_and_take_no_data_with_them() -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [os.urandom(3000), os.urandom(3000)])
    await complete(objects, bucket, upload_id, parts)
    assert await multipart.forget_finished_uploads(objects.plane, bucket) == 0
    world.clock.wall += 86_400_000
    assert await multipart.forget_finished_uploads(objects.plane, bucket) == 1
    await objects.plane.background.settle()
    assert not any(disk.garbage for disk in world.disks.disks.values())
    assert all(
        value.visibility == 0 for name, value in world.ring.values.items() if name.table in (Table.UPLOAD, Table.PART)
    )
    with pytest.raises(NoSuchUpload):
        await complete(objects, bucket, upload_id, parts)
    assert (await objects.head(bucket, b"key")).size == 6000
    await objects.close()


async def test_an_upload_expires_when_nothing_was_added_for_long() -> None:
    world, objects, bucket = world_of()
    expire_ms = objects.plane.limits.upload_expire_ms
    idle, _ = await uploaded(objects, bucket, [os.urandom(3000)])
    used, parts = await uploaded(objects, bucket, [os.urandom(3000)])
    world.clock.wall += expire_ms // 2
    data = os.urandom(3000)
    more = await objects.put_part(bucket, b"key", used, 2, pieces(data), BodyChecks(len(data)))
    world.clock.wall += expire_ms // 2 - 3_600_000
    assert await multipart.forget_finished_uploads(objects.plane, bucket) == 0
    assert objects.plane.counters.uploads_expired == 0, "it is due after that"
    world.clock.wall += 2 * 3_600_000
    assert await multipart.forget_finished_uploads(objects.plane, bucket) == 0
    assert objects.plane.counters.uploads_expired == 1
    await objects.plane.background.settle()
    with pytest.raises(NoSuchUpload):
        await objects.list_parts(bucket, b"key", idle)
    assert any(disk.garbage for disk in world.disks.disks.values()), "its parts are given back"
    await complete(objects, bucket, used, [*parts, CompletedPart(2, more.etag)])
    assert (await objects.head(bucket, b"key")).size == 6000
    await objects.close()


async def test_references_follow_a_part_from_its_row_to_the_object() -> None:
    world, objects, bucket = world_of()
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    upload_id, parts = await uploaded(objects, bucket, [os.urandom(3000)])
    (data_id,) = {f.data_id for disk in world.disks.disks.values() for f in disk.fragments}
    assert {disk.header(f).owner for disk in world.disks.disks.values() for f in disk.fragments} == {name.pack()}
    assert await live_references(world.ring, world.ring, world.ring, name) == {data_id}
    other = object_name(bucket.id, bucket.shard_numbers, b"other")
    assert not await live_references(world.ring, world.ring, world.ring, other)
    await complete(objects, bucket, upload_id, parts)
    assert await live_references(world.ring, world.ring, world.ring, name) == {data_id}
    await objects.delete(bucket, b"key")
    assert not await live_references(world.ring, world.ring, world.ring, name)
    await objects.close()


async def test_a_complete_whose_pages_went_before_its_promise_proposes_nothing() -> None:
    world, objects, bucket = world_of()
    datas = [os.urandom(1000) for _ in range(40)]
    upload_id, parts = await uploaded(objects, bucket, datas)
    name, went = object_name(bucket.id, bucket.shard_numbers, b"key"), {}

    async def sweep(at: RegisterName) -> None:
        assert at.table == Table.UPLOAD  # the pin
        went.update(world.ring.pages)
        world.ring.pages.clear()

    world.ring.interfere = sweep  # type: ignore[method-assign]
    with pytest.raises(DataDamaged):
        await complete(objects, bucket, upload_id, parts)
    assert name not in world.ring.values
    world.ring.pages.update(went)
    await complete(objects, bucket, upload_id, parts)
    assert await got(objects, bucket) == b"".join(datas)
    await objects.close()


async def test_a_complete_puts_its_pages_again_after_each_promise_on_the_object() -> None:
    world, objects, bucket = world_of()
    datas = [os.urandom(1000) for _ in range(40)]
    upload_id, parts = await uploaded(objects, bucket, datas)
    put_page, puts = world.ring.put_page, 0

    async def count(near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        nonlocal puts
        puts += 1
        return await put_page(near, body, name)

    async def refuse(name: RegisterName) -> None:
        if name.table != Table.OBJECT:
            world.ring.interfere = refuse
            return
        assert puts == 4
        await world.ring.settle(name)

    world.ring.put_page, world.ring.interfere = count, refuse  # type: ignore[method-assign]
    await complete(objects, bucket, upload_id, parts)
    assert puts == 6
    assert await got(objects, bucket) == b"".join(datas)
    await objects.close()
