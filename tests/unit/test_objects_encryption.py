"""SSE-C and SSE-KMS on the object plane: who can open what, what is stored, and what is never stored."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from typing import Any

import pytest

from storaged.errors import InvalidRequest, NoSuchKey
from storaged.meta.names import object_name
from storaged.objects.api import (
    BodyChecks,
    CompletedPart,
    CopySource,
    NewMeta,
    ObjectInfo,
    PutResult,
    RangeSpec,
    ReadResult,
)
from storaged.objects.code.customer import ContentKey, unwrap_key, wrap_key
from storaged.objects.code.seal import META_LABEL, part_key
from storaged.objects.code.versions import Place, decode_record, open_version
from storaged.objects.encryption import CUSTOMER, KMS, Encryption
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.objects.write.checksums import checksum_of, multipart_checksum, multipart_etag
from storaged.sov1 import Opener, SealBroken, open_message
from tests.unit.test_objects_put_get import OWNER, bucket_of, pieces
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
WITH_KEY = NewMeta({"content-type": "a/b"}, {"x": "y"}, {"t": "1"}, encryption=Encryption(CUSTOMER, customer_key=KEY))
SIZES = {"inline": 40, "small": 5_000, "coded": 700_000}


def world_of() -> tuple[World, ObjectService, BucketRecord]:
    world = World(part_bytes_min=1000)
    return world, ObjectService(world.plane()), bucket_of(world)


async def put(
    objects: ObjectService, bucket: BucketRecord, data: bytes, meta: NewMeta = WITH_KEY, key: bytes = b"key"
) -> PutResult:
    return await objects.put(bucket, key, pieces(data), meta, BodyChecks(len(data)), owner=OWNER)


async def got(objects: ObjectService, bucket: BucketRecord, key: bytes = b"key", **how: Any) -> bytes:
    stream = await objects.get(bucket, key, **how)
    return b"".join([bytes(piece) async for piece in stream.chunks()])


async def tried(objects: ObjectService, bucket: BucketRecord, want_plain: bool) -> ReadResult:
    found: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
    objects.try_read(bucket, b"key", want_plain, found.set_result)
    return await found


def stored(world: World) -> bytes:
    """All bytes of registers, pages and disks."""
    rows = [value.body for value in world.ring.values.values()]
    kept = [disk.payload(fragment) for disk in world.disks.disks.values() for fragment in disk.fragments]
    return b"".join([*rows, *world.ring.pages.values(), *kept])


# --- reading


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_an_object_opens_with_the_key_that_it_was_stored_with_alone(size: int) -> None:
    world, objects, bucket = world_of()
    data = os.urandom(size)
    result = await put(objects, bucket, data)
    for gateway in (objects, ObjectService(world.plane())):
        for _ in range(2):
            assert await got(gateway, bucket, customer_key=KEY) == data
            for wrong in (b"", OTHER):
                with pytest.raises(InvalidRequest):
                    await gateway.get(bucket, b"key", customer_key=wrong)
                with pytest.raises(InvalidRequest):
                    await gateway.head(bucket, b"key", customer_key=wrong)
        middle = RangeSpec(size // 3, size // 2)
        assert await got(gateway, bucket, customer_key=KEY, span=middle) == data[size // 3 : size // 2 + 1]
        info = await gateway.head(bucket, b"key", customer_key=KEY)
        assert info.checksums == result.checksums == {"CRC64NVME": checksum_of("CRC64NVME", data)}
        assert (info.etag, info.encryption) == (result.etag, Encryption(CUSTOMER))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_nothing_that_is_stored_has_the_key_or_can_be_computed_from_the_content(size: int) -> None:
    world, objects, bucket = world_of()
    data = os.urandom(size)
    result = await put(objects, bucket, data)
    md5, crc = hashlib.md5(data).digest(), checksum_of("CRC64NVME", data)
    assert result.etag != md5.hex()
    # all that the keyring opens: the record, and the fields that a listing prints
    record = decode_record(world.ring.values[object_name(bucket.id, bucket.shard_numbers, b"key")])
    place, bucket_key = Place(bucket.id, b"key"), world.keys.key()
    (version,) = record.versions
    opened = open_version(place, version, bucket_key)
    listed = await objects.list_objects(bucket)
    seen = repr((opened.meta, opened.encryption, bucket_key.open_list(version.listing, place.context_of(version))))
    for secret in (KEY, md5, crc, md5.hex(), base64.b64encode(KEY).decode(), data[:40]):
        for found in (stored(world), seen.encode(), repr(listed).encode()):
            assert (secret.encode() if isinstance(secret, str) else secret) not in found
    (part,) = version.parts
    for dek in (opened.dek, KEY):
        with pytest.raises(SealBroken):
            Opener(part_key(dek, part.header, part.data_id, 1))
    Opener(part_key(_dek(opened, bucket), part.header, part.data_id, 1))


def _dek(opened: Any, bucket: BucketRecord) -> bytes:
    return unwrap_key(KEY, (bucket.id, b"key"), opened.version.context_id, opened.encryption.wrapped)


async def test_a_wrapped_key_is_bound_to_its_object() -> None:
    wrapped = wrap_key(KEY, (b"bucket", b"key"), b"c" * 16, b"d" * 32, os.urandom)
    assert unwrap_key(KEY, (b"bucket", b"key"), b"c" * 16, wrapped) == b"d" * 32
    for place, context_id in (
        ((b"bucket", b"yek"), b"c" * 16),
        ((b"tekcub", b"key"), b"c" * 16),
        ((b"bucket", b"key"), b"C" * 16),
    ):
        with pytest.raises(SealBroken):
            unwrap_key(KEY, place, context_id, wrapped)


async def test_a_sealed_checksum_opens_under_its_algorithm_and_for_its_part_alone() -> None:
    content = ContentKey(b"d" * 32)
    sealed = content.seal({"CRC32": "AAAAAA=="}, b"i" * 16, os.urandom)
    assert content.open(sealed, b"i" * 16) == {"CRC32": "AAAAAA=="}
    for key, names, data_id in (
        (ContentKey(b"D" * 32), sealed, b"i" * 16),
        (content, sealed, b"I" * 16),
        (content, {"CRC32C": sealed["CRC32"]}, b"i" * 16),
        (content, {"CRC32": "no base64"}, b"i" * 16),
        (content, {"CRC32": ""}, b"i" * 16),
    ):
        with pytest.raises(SealBroken):
            key.open(names, data_id)


async def test_what_a_customers_key_opened_is_not_cached() -> None:
    world = World()
    plane = world.plane()
    objects, bucket = ObjectService(plane), bucket_of(world)
    data = os.urandom(5_000)
    await put(objects, bucket, data)
    assert await got(objects, bucket, customer_key=KEY) == data
    assert len(plane.opened_records) == 1
    (cached,) = plane.opened_records._records.values()
    assert cached.opened.locked
    assert (cached.info, cached.key) == (None, None)
    with pytest.raises(InvalidRequest):
        await objects.get(bucket, b"key")
    for want_plain in (True, False):
        assert isinstance(await tried(objects, bucket, want_plain), InvalidRequest)


async def test_an_object_without_a_customers_key_refuses_one() -> None:
    _, objects, bucket = world_of()
    for meta in (NewMeta(), NewMeta(encryption=Encryption(KMS, "arn:of:key"))):
        await put(objects, bucket, b"data", meta)
        for call in (objects.get, objects.head):
            with pytest.raises(InvalidRequest):
                await call(bucket, b"key", customer_key=KEY)
        assert await got(objects, bucket) == b"data"
    with pytest.raises(NoSuchKey):
        await objects.get(bucket, b"other", customer_key=KEY)


async def test_metadata_is_known_and_tags_are_changed_without_the_key() -> None:
    _, objects, bucket = world_of()
    data = os.urandom(5_000)
    result = await put(objects, bucket, data)
    info = await objects.head(bucket, b"key", customer_key=None)
    assert (info.user, info.tags, info.checksums, info.etag) == ({"x": "y"}, {"t": "1"}, {}, result.etag)
    await objects.set_tags(bucket, b"key", {"t": "2"})
    assert (await objects.head(bucket, b"key", customer_key=None)).tags == {"t": "2"}
    assert await got(objects, bucket, customer_key=KEY) == data
    assert (await objects.head(bucket, b"key", customer_key=KEY)).checksums == result.checksums


async def test_a_gateway_of_an_earlier_version_can_not_open_and_so_not_change_such_metadata() -> None:
    world, objects, bucket = world_of()
    place = Place(bucket.id, b"key")
    for meta in (WITH_KEY, NewMeta(encryption=Encryption(KMS, "arn:of:key")), NewMeta()):
        await put(objects, bucket, b"data", meta)
        record = decode_record(world.ring.values[object_name(bucket.id, bucket.shard_numbers, b"key")])
        (version,) = record.versions
        dek = world.keys.key().unwrap(version.wrapped_key, place.context_of(version))
        if meta.encryption is None:
            open_message(dek, META_LABEL, place.context_of(version), version.meta)
            continue
        with pytest.raises(SealBroken):
            open_message(dek, META_LABEL, place.context_of(version), version.meta)


# --- SSE-KMS


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_an_object_keeps_the_name_of_its_encryption(size: int) -> None:
    world, objects, bucket = world_of()
    asked = Encryption(KMS, "arn:of:key", True, "e30=")
    data = os.urandom(size)
    result = await put(objects, bucket, data, NewMeta(encryption=asked))
    assert (result.etag, result.encryption) == (hashlib.md5(data).hexdigest(), asked)
    await objects.set_tags(bucket, b"key", {"t": "2"})
    for gateway in (objects, ObjectService(world.plane())):
        assert await got(gateway, bucket) == data
        assert (await gateway.head(bucket, b"key")).encryption == asked
    read = await tried(objects, bucket, False)
    assert isinstance(read, ObjectInfo)
    assert read.encryption == asked


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_another_encryption_wraps_the_data_key_anew_and_moves_no_data(size: int) -> None:
    world, objects, bucket = world_of()
    data, name = os.urandom(size), object_name(bucket.id, bucket.shard_numbers, b"key")
    made = await put(objects, bucket, data, NewMeta(user={"x": "y"}))
    (before,) = decode_record(world.ring.values[name]).versions
    fragments = {disk: store.fragments for disk, store in world.disks.disks.items()}
    world.keys.newest[bucket.id] = 2
    world.keys.key(2)
    for asked in (Encryption(KMS, "arn:of:key"), Encryption(KMS, "arn:of:key", True)):
        await objects.set_encryption(bucket, b"key", asked)
        (after,) = decode_record(world.ring.values[name]).versions
        assert (after.bucket_key, after.wrapped_key == before.wrapped_key) == (2, False)
        assert (after.parts, after.context_id, after.modified_ms) == (before.parts, before.context_id, made.modified_ms)
        assert {disk: store.fragments for disk, store in world.disks.disks.items()} == fragments
        for gateway in (objects, ObjectService(world.plane())):
            info = await gateway.head(bucket, b"key")
            assert (info.encryption, info.etag, info.checksums) == (asked, made.etag, made.checksums)
            assert info.user == {"x": "y"}
            assert await got(gateway, bucket) == data
    (listed,) = (await objects.list_objects(bucket)).shown
    assert listed.printed.etag == made.etag


async def test_an_object_with_a_customers_key_keeps_its_encryption() -> None:
    world, objects, bucket = world_of()
    await put(objects, bucket, b"data")
    before = dict(world.ring.values)
    with pytest.raises(InvalidRequest):
        await objects.set_encryption(bucket, b"key", Encryption(KMS, "arn:of:key"))
    assert world.ring.values == before
    with pytest.raises(NoSuchKey):
        await objects.set_encryption(bucket, b"other", Encryption(KMS, "arn:of:key"))


# --- uploads


async def uploaded(
    objects: ObjectService, bucket: BucketRecord, datas: list[bytes], algorithm: str = "", key: bytes = KEY
) -> tuple[str, list[CompletedPart]]:
    upload = await objects.create_upload(bucket, b"key", WITH_KEY, owner=OWNER, algorithm=algorithm, checksum_type="")
    assert upload.encryption == Encryption(CUSTOMER)
    parts = []
    for number, data in enumerate(datas, 1):
        result = await objects.put_part(
            bucket, b"key", upload.upload_id, number, pieces(data), BodyChecks(len(data)), customer_key=key
        )
        assert result.etag != hashlib.md5(data).hexdigest()
        parts.append(CompletedPart(number, result.etag, {algorithm: result.checksums[algorithm]} if algorithm else {}))
    return upload.upload_id, parts


async def complete(
    objects: ObjectService, bucket: BucketRecord, upload_id: str, parts: list[CompletedPart], **more: Any
) -> PutResult:
    return await objects.complete(bucket, b"key", upload_id, parts, owner=OWNER, **more)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("algorithm", ["", "CRC32", "SHA256"])
async def test_parts_become_an_object_that_opens_with_the_key_alone(count: int, algorithm: str) -> None:
    world, objects, bucket = world_of()
    datas = [os.urandom(1_000 + 7 * number) for number in range(count)]
    upload_id, parts = await uploaded(objects, bucket, datas, algorithm)
    _, listed, _ = await objects.list_parts(bucket, b"key", upload_id, customer_key=KEY)
    name = algorithm or "CRC64NVME"
    sums = [checksum_of(name, data) for data in datas]
    assert [part.checksum for part in listed] == sums
    _, listed, _ = await objects.list_parts(bucket, b"key", upload_id)
    assert [(part.etag, part.checksum) for part in listed] == [(part.etag, "") for part in parts]
    result = await complete(objects, bucket, upload_id, parts, customer_key=KEY)
    kind = "COMPOSITE" if algorithm else "FULL_OBJECT"
    whole = multipart_checksum(name, kind, [(value, len(data)) for value, data in zip(sums, datas, strict=True)])
    assert (result.checksums, result.checksum_type) == ({name: whole}, kind)
    assert result.etag == multipart_etag([part.etag for part in parts])
    assert await complete(objects, bucket, upload_id, parts, customer_key=KEY) == result
    for gateway in (objects, ObjectService(world.plane())):
        assert await got(gateway, bucket, customer_key=KEY) == b"".join(datas)
        assert await got(gateway, bucket, customer_key=KEY, part_number=2) == datas[1]
        info = await gateway.head(bucket, b"key", customer_key=KEY)
        assert info.checksums == {name: whole}
        assert [part.checksum for part in info.parts] == sums
        info = await gateway.head(bucket, b"key", customer_key=None)
        assert (info.checksums, {part.checksum for part in info.parts}) == ({}, {""})
        with pytest.raises(InvalidRequest):
            await gateway.get(bucket, b"key", part_number=2)
    for data in datas:
        assert hashlib.md5(data).digest() not in stored(world)


async def test_a_part_needs_the_key_of_its_upload() -> None:
    _, objects, bucket = world_of()
    upload_id, _ = await uploaded(objects, bucket, [])
    for key in (b"", OTHER):
        with pytest.raises(InvalidRequest):
            await objects.put_part(bucket, b"key", upload_id, 1, pieces(b"data"), BodyChecks(4), customer_key=key)
    plain = await objects.create_upload(bucket, b"key", NewMeta(), owner=OWNER)
    with pytest.raises(InvalidRequest):
        await objects.put_part(bucket, b"key", plain.upload_id, 1, pieces(b"data"), BodyChecks(4), customer_key=KEY)


async def test_without_a_checksum_algorithm_an_upload_is_completed_without_the_key() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 2_000, b"b"])
    with pytest.raises(InvalidRequest):
        await complete(objects, bucket, upload_id, parts, customer_key=OTHER)
    result = await complete(objects, bucket, upload_id, parts)
    assert (result.checksums, result.encryption) == ({}, Encryption(CUSTOMER))
    assert await complete(objects, bucket, upload_id, parts) == result
    assert await got(objects, bucket, customer_key=KEY) == b"a" * 2_000 + b"b"
    assert (await objects.head(bucket, b"key", customer_key=KEY)).checksums == {}
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 2_000, b"b"], "CRC32")
    for given in (parts, [CompletedPart(part.number, part.etag) for part in parts]):
        with pytest.raises(InvalidRequest):
            await complete(objects, bucket, upload_id, given)
    await complete(objects, bucket, upload_id, parts, customer_key=KEY)


# --- copies


async def test_a_copy_needs_the_sources_key_and_has_its_own_encryption() -> None:
    _, objects, bucket = world_of()
    data = os.urandom(30_000)
    await put(objects, bucket, data)
    source = CopySource(bucket, b"key", customer_key=KEY)
    for wrong in (b"", OTHER):
        with pytest.raises(InvalidRequest):
            await objects.copy(source._replace(customer_key=wrong), bucket, b"copy", owner=OWNER, meta=None)
    await objects.copy(source, bucket, b"copy", owner=OWNER, meta=None)
    assert await got(objects, bucket, b"copy") == data
    info = await objects.head(bucket, b"copy")
    assert (info.encryption, info.etag, info.user) == (None, hashlib.md5(data).hexdigest(), {"x": "y"})
    to_other = Encryption(CUSTOMER, customer_key=OTHER)
    await objects.copy(source, bucket, b"copy", owner=OWNER, meta=NewMeta(), encryption=to_other)
    assert await got(objects, bucket, b"copy", customer_key=OTHER) == data
    await objects.copy(CopySource(bucket, b"copy", customer_key=OTHER), bucket, b"key", owner=OWNER, meta=None)
    assert await got(objects, bucket) == data


async def test_a_part_is_copied_from_and_to_objects_with_keys() -> None:
    _, objects, bucket = world_of()
    data = os.urandom(30_000)
    to_other = Encryption(CUSTOMER, customer_key=OTHER)
    await put(objects, bucket, data, NewMeta(encryption=to_other), b"source")
    upload_id, _ = await uploaded(objects, bucket, [])
    source = CopySource(bucket, b"source", span=RangeSpec(10, 20_009), customer_key=OTHER)
    result = await objects.copy_part(source, bucket, b"key", upload_id, 1, customer_key=KEY)
    await complete(objects, bucket, upload_id, [CompletedPart(1, result.etag)], customer_key=KEY)
    assert await got(objects, bucket, customer_key=KEY) == data[10:20_010]
    for wrong in (b"", KEY):
        with pytest.raises(InvalidRequest):
            await objects.copy_part(source._replace(customer_key=wrong), bucket, b"key", upload_id, 1, customer_key=KEY)
