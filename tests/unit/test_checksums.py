"""The ten checksums of S3: values, what is kept of what came without one, and how parts' become the whole's."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from collections.abc import Callable

import msgspec
import pytest
from awscrt import checksums as crt

from storaged.errors import BadDigest, InvalidPart, InvalidRequest
from storaged.meta.names import Table
from storaged.objects.api import CHECKSUM_ALGORITHMS, BodyChecks, CompletedPart, CopySource, NewMeta
from storaged.objects.records import decode_object
from storaged.objects.upload_records import PartRecord
from storaged.objects.write.checksums import CHECKSUM_BYTES, BodyDigest, checksum_of, digest_of
from storaged.objects.write.uploads import open_upload
from storaged.wire import decode, encode
from tests.unit.test_objects_multipart import OWNER, complete, uploaded, world_of
from tests.unit.test_objects_put_get import pieces

OTHER: dict[str, Callable[[bytes], bytes]] = {
    "CRC32": lambda data: crt.crc32(data).to_bytes(4, "big"),
    "CRC32C": lambda data: crt.crc32c(data).to_bytes(4, "big"),
    "CRC64NVME": lambda data: crt.crc64nvme(data).to_bytes(8, "big"),
    "SHA1": lambda data: hashlib.sha1(data).digest(),
    "SHA256": lambda data: hashlib.sha256(data).digest(),
    "SHA512": lambda data: hashlib.sha512(data).digest(),
    "MD5": lambda data: hashlib.md5(data).digest(),
    "XXHASH64": crt.XXHash.compute_xxhash64,
    "XXHASH3": crt.XXHash.compute_xxhash3_64,
    "XXHASH128": crt.XXHash.compute_xxhash3_128,
}
"""A second implementation where there is one: that of AWS's own SDKs."""


def text(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def nvme(data: bytes) -> dict[str, str]:
    return {"CRC64NVME": text(OTHER["CRC64NVME"](data))}


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [("CRC32", 0xCBF43926), ("CRC32C", 0xE3069283), ("CRC64NVME", 0xAE8B14860A799888)],
)
def test_crcs_have_the_check_values_of_their_catalogue(algorithm: str, value: int) -> None:
    """https://reveng.sourceforge.io/crc-catalogue/all.htm"""
    assert base64.b64decode(checksum_of(algorithm, b"123456789")) == value.to_bytes(CHECKSUM_BYTES[algorithm], "big")


@pytest.mark.parametrize("algorithm", CHECKSUM_ALGORITHMS)
def test_each_algorithm_agrees_with_another_implementation_whole_and_in_pieces(algorithm: str) -> None:
    for size in (0, 1, 16, 17, 240, 241, 1000, 100_003):
        data = os.urandom(size)
        expected = text(OTHER[algorithm](data))
        assert len(base64.b64decode(expected)) == CHECKSUM_BYTES[algorithm]
        checks = BodyChecks(size, checksums={algorithm: expected})
        assert digest_of(data, checks).checksums == {algorithm: expected}
        streamed = BodyDigest(checks)
        for start in range(0, size, 997):
            streamed.update(memoryview(data)[start : start + 997])
        assert streamed.finish().checksums == {algorithm: expected}
        if size:
            with pytest.raises(BadDigest):
                digest_of(data[:-1] + bytes([data[-1] ^ 1]), checks)


@pytest.mark.parametrize("size", [0, 100, 9_000, 50_000])
async def test_what_came_without_a_checksum_gets_crc64nvme_and_copies_keep_it(size: int) -> None:
    _, objects, bucket = world_of()
    data = os.urandom(size)
    put = await objects.put(bucket, b"key", pieces(data), NewMeta(), BodyChecks(size), owner=OWNER)
    assert (put.checksums, put.checksum_type) == (nvme(data), "FULL_OBJECT")
    info = await objects.head(bucket, b"key")
    assert (info.checksums, info.checksum_type) == (nvme(data), "FULL_OBJECT")
    listed = (await objects.list_objects(bucket)).shown[0].printed
    assert (listed.algorithm, listed.checksum_type) == ("CRC64NVME", "FULL_OBJECT")
    copied = await objects.copy(CopySource(bucket, b"key"), bucket, b"copy", owner=OWNER, meta=None)
    assert copied.checksums == nvme(data)
    other = await objects.copy(
        CopySource(bucket, b"key"), bucket, b"other", owner=OWNER, meta=None, algorithm="XXHASH3"
    )
    assert other.checksums == {"XXHASH3": text(OTHER["XXHASH3"](data))}
    await objects.close()


async def test_what_came_with_a_checksum_gets_no_other() -> None:
    _, objects, bucket = world_of()
    for algorithm in CHECKSUM_ALGORITHMS:
        put = await objects.put(
            bucket, b"key", pieces(b"data"), NewMeta(), BodyChecks(4, algorithms=(algorithm,)), owner=OWNER
        )
        assert put.checksums == {algorithm: text(OTHER[algorithm](b"data"))}
    await objects.close()


async def test_an_upload_without_an_algorithm_gets_the_crc64nvme_of_its_whole_from_its_parts() -> None:
    _, objects, bucket = world_of()
    datas = [b"a" * 1234, b"b" * 5000, b"c" * 7]
    upload_id, parts = await uploaded(objects, bucket, datas)
    assert [part.checksums for part in parts] == [nvme(data) for data in datas]
    _, listed, _ = await objects.list_parts(bucket, b"key", upload_id)
    assert [(part.checksum_algorithm, part.checksum) for part in listed] == [
        ("CRC64NVME", nvme(data)["CRC64NVME"]) for data in datas
    ]
    with pytest.raises(BadDigest):
        await complete(objects, bucket, upload_id, parts, checksums=nvme(b"other"))
    with pytest.raises(BadDigest):
        await complete(objects, bucket, upload_id, parts, checksum_type="COMPOSITE")
    with pytest.raises(InvalidRequest):
        await complete(objects, bucket, upload_id, parts, checksums={"CRC32": "AAAAAA=="})
    whole = nvme(b"".join(datas))
    result = await complete(objects, bucket, upload_id, parts, checksums=whole, checksum_type="FULL_OBJECT")
    assert (result.checksums, result.checksum_type) == (whole, "FULL_OBJECT")
    info = await objects.head(bucket, b"key")
    assert (info.checksums, info.checksum_type) == (whole, "FULL_OBJECT")
    assert [part.checksum for part in info.parts] == [nvme(data)["CRC64NVME"] for data in datas]
    await objects.close()


async def test_parts_of_an_upload_without_an_algorithm_may_come_with_any_checksum() -> None:
    _, objects, bucket = world_of()
    upload = await objects.create_upload(bucket, b"key", NewMeta(), owner=OWNER)
    data = b"x" * 2000
    sha = {"SHA256": text(OTHER["SHA256"](data))}
    result = await objects.put_part(bucket, b"key", upload.upload_id, 1, pieces(data), BodyChecks(2000, checksums=sha))
    assert result.checksums == sha, "the answer has the checksum that came"
    done = await complete(objects, bucket, upload.upload_id, [CompletedPart(1, result.etag)])
    assert done.checksums == nvme(data)
    await objects.close()


@pytest.mark.parametrize("algorithm", CHECKSUM_ALGORITHMS)
async def test_parts_of_an_upload_with_an_algorithm_may_have_no_other(algorithm: str) -> None:
    _, objects, bucket = world_of()
    upload = await objects.create_upload(bucket, b"key", NewMeta(), owner=OWNER, algorithm=algorithm)
    other = "SHA1" if algorithm != "SHA1" else "CRC32"
    with pytest.raises(
        InvalidRequest, match=f"expected checksum Type: {algorithm.lower()}, actual checksum Type: {other.lower()}"
    ):
        await objects.put_part(bucket, b"key", upload.upload_id, 1, pieces(b"x"), BodyChecks(1, algorithms=(other,)))
    plain = await objects.put_part(bucket, b"key", upload.upload_id, 1, pieces(b"x"), BodyChecks(1))
    assert plain.checksums == {algorithm: text(OTHER[algorithm](b"x"))}
    with pytest.raises(InvalidPart):
        await complete(
            objects, bucket, upload.upload_id, [CompletedPart(1, plain.etag, {other: plain.checksums[algorithm]})]
        )
    await complete(objects, bucket, upload.upload_id, [CompletedPart(1, plain.etag, plain.checksums)])
    await objects.close()


async def test_an_upload_with_parts_from_before_they_kept_a_checksum_is_completed_without_one() -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b"])
    upload = await open_upload(objects.plane, bucket, b"key", upload_id)
    for name, value in list(world.ring.values.items()):
        if name.table == Table.PART:
            row = decode(value.body, PartRecord)
            bare = msgspec.structs.replace(upload.open_part(row), checksum="")
            sealed = upload.seal_part(objects.plane, row.entry.data_id, bare)
            world.ring.values[name] = msgspec.structs.replace(
                value, body=encode(msgspec.structs.replace(row, sealed=sealed))
            )
    bare_parts = [CompletedPart(part.number, part.etag) for part in parts]
    result = await complete(objects, bucket, upload_id, bare_parts)
    assert (result.checksums, result.checksum_type) == ({}, "")
    assert (await objects.head(bucket, b"key")).checksums == {}
    await objects.close()


async def test_checksums_and_their_algorithm_are_sealed_in_the_record() -> None:
    world, objects, bucket = world_of()
    await objects.put(bucket, b"key", pieces(b"some content"), NewMeta(), BodyChecks(12), owner=OWNER)
    (value,) = [value for name, value in world.ring.values.items() if name.table == Table.OBJECT]
    raw = OTHER["CRC64NVME"](b"some content")
    assert decode_object(value.body).versions[0].size == 12
    for needle in (
        raw,
        raw[::-1],
        raw.hex().encode(),
        text(raw).encode(),
        b"CRC64NVME",
        zlib.crc32(b"some content").to_bytes(4, "big"),
    ):
        assert needle not in value.body
    await objects.close()
