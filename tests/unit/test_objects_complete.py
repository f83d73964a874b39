"""Complete by several at once, and what a storage node learns of one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.errors import (
    ConditionalRequestConflict,
    InvalidPart,
    NoSuchKey,
    NoSuchUpload,
    OutcomeUnknown,
    PreconditionFailed,
    ServiceUnavailable,
)
from storaged.meta.names import RegisterName, Table, Value, system_name
from storaged.objects.api import CompletedPart, WriteConditions
from storaged.objects.etags import ANY
from storaged.objects.records import BucketRecord, SealedMeta, SealedPart
from storaged.objects.service import ObjectService
from storaged.objects.system.users import UserSecret, UserService
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.objects.user_records import UserRecord
from storaged.objects.write import multipart
from storaged.objects.write.uploads import CompleteResult
from storaged.sov1 import open_message
from storaged.wire import decode, encode
from tests.unit.test_objects_multipart import complete, stopped_before_done, uploaded, world_of
from tests.unit.test_objects_put_get import got, put
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time


def bare_digest(parts: list[CompletedPart]) -> bytes:
    """What an unkeyed digest of the request is: anybody who guesses the parts can compute it."""
    said: list[Any] = [(part.number, part.etag, sorted(part.checksums.items())) for part in parts]
    return hashlib.sha256(msgspec.msgpack.encode([said, [], "", None])).digest()


def upload_row(world: World) -> tuple[Any, Value, UploadRecord]:
    ((name, value),) = [(name, value) for name, value in world.ring.values.items() if name.table == Table.UPLOAD]
    return name, value, decode(value.body, UploadRecord)


def as_of_old(world: World, parts: list[CompletedPart]) -> None:
    """Gives the upload's row the digest that rows had before it was keyed."""
    name, value, record = upload_row(world)
    assert record.request_digest
    body = encode(msgspec.structs.replace(record, request_digest=bare_digest(parts)))
    world.ring.values[name] = msgspec.structs.replace(value, body=body)


async def completed(
    parts_datas: tuple[bytes, ...] = (b"a" * 1000, b"b"),
) -> tuple[World, ObjectService, BucketRecord, str, list[CompletedPart], Any]:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, list(parts_datas))
    return world, objects, bucket, upload_id, parts, await complete(objects, bucket, upload_id, parts)


async def test_no_row_of_an_upload_holds_a_digest_that_can_be_computed_from_its_content() -> None:
    world, objects, bucket = world_of()
    datas = [b"a" * 1000, b"b"]
    upload_id, parts = await uploaded(objects, bucket, datas, algorithm="SHA256")
    await complete(objects, bucket, upload_id, parts)
    needles = [bare_digest(parts)]
    for data in (*datas, b"".join(datas)):
        for algorithm in ("md5", "sha1", "sha256"):
            raw = hashlib.new(algorithm, data).digest()
            needles += [raw, raw.hex().encode(), base64.b64encode(raw)]
    for name, value in world.ring.values.items():
        assert not any(needle in value.body for needle in needles), name
    await objects.close()


async def test_two_uploads_of_the_same_parts_have_different_digests() -> None:
    found = []
    for _ in range(2):
        world, objects, *_ = await completed()
        found.append(upload_row(world)[2].request_digest)
        await objects.close()
    assert {len(digest) for digest in found} == {33}
    assert {digest[0] for digest in found} == {1}
    assert found[0] != found[1]


async def test_a_bare_digest_from_before_still_recognises_the_request_and_is_keyed_by_that_touch() -> None:
    world, objects, bucket, upload_id, parts, first = await completed()
    keyed = upload_row(world)[2].request_digest
    as_of_old(world, parts)
    with pytest.raises(NoSuchUpload):
        await complete(objects, bucket, upload_id, parts[:1])
    assert await complete(objects, bucket, upload_id, parts) == first
    assert upload_row(world)[2].request_digest == keyed
    assert await complete(objects, bucket, upload_id, parts) == first
    await objects.close()


async def test_housekeeping_keys_the_bare_digests_that_it_meets() -> None:
    world, objects, bucket, upload_id, parts, first = await completed()
    keyed, visibility = upload_row(world)[2].request_digest, upload_row(world)[1].visibility
    as_of_old(world, parts)
    assert await multipart.forget_finished_uploads(objects.plane, bucket) == 0
    assert (upload_row(world)[2].request_digest, upload_row(world)[1].visibility) == (keyed, visibility)
    assert await complete(objects, bucket, upload_id, parts) == first
    await objects.close()


@pytest.mark.parametrize("ending", ["complete", "abort"])
async def test_an_upload_that_was_being_completed_before_is_keyed_when_it_ends(ending: str) -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000])
    await stopped_before_done(world, objects, bucket, upload_id, parts, Table.OBJECT)
    keyed = upload_row(world)[2].request_digest
    as_of_old(world, parts)
    if ending == "complete":
        await complete(objects, bucket, upload_id, parts)
    else:
        await objects.abort(bucket, b"key", upload_id)
    assert upload_row(world)[2].request_digest == keyed
    await objects.close()


@pytest.mark.parametrize("gateways", [1, 4])
async def test_sixteen_equal_completes_at_once_all_give_the_same_answer(gateways: int) -> None:
    world, objects, bucket = world_of()
    others = [objects, *(ObjectService(objects.plane) for _ in range(gateways - 1))]
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b" * 2000, b"c"])
    found = await asyncio.gather(*(complete(others[turn % gateways], bucket, upload_id, parts) for turn in range(16)))
    assert all(answer == found[0] for answer in found)
    assert await got(objects, bucket) == b"a" * 1000 + b"b" * 2000 + b"c"
    assert upload_row(world)[2].state == "done"
    await objects.close()


async def test_sixteen_equal_completes_with_a_condition_that_the_first_makes_false_all_succeed() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000])
    absent = WriteConditions(if_none_match=ANY)
    found = await asyncio.gather(*(complete(objects, bucket, upload_id, parts, conditions=absent) for _ in range(16)))
    assert all(answer == found[0] for answer in found)
    await objects.close()


async def test_sixteen_equal_completes_whose_condition_fails_all_say_so_and_the_upload_stays_open() -> None:
    _, objects, bucket = world_of()
    await put(objects, bucket, b"there")
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000])
    absent = WriteConditions(if_none_match=ANY)
    found = await asyncio.gather(
        *(complete(objects, bucket, upload_id, parts, conditions=absent) for _ in range(16)), return_exceptions=True
    )
    assert {type(answer) for answer in found} == {PreconditionFailed}
    assert (await complete(objects, bucket, upload_id, parts)).size == 1000
    await objects.close()


async def test_of_completes_with_different_parts_one_list_wins_and_the_others_are_refused() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b" * 2000])
    lists = [parts, parts[:1], parts[1:]]
    found = await asyncio.gather(
        *(complete(objects, bucket, upload_id, lists[turn % 3]) for turn in range(12)), return_exceptions=True
    )
    won = [turn % 3 for turn, answer in enumerate(found) if not isinstance(answer, BaseException)]
    assert len(set(won)) == 1
    assert len(won) == 4
    assert {type(answer) for answer in found if isinstance(answer, BaseException)} <= {
        NoSuchUpload,
        ConditionalRequestConflict,
    }
    await objects.close()


async def test_a_complete_that_names_no_part_there_is_refused_for_that_while_another_wins() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000])
    wrong = [CompletedPart(1, "0" * 32)]
    with pytest.raises(InvalidPart):
        await complete(objects, bucket, upload_id, wrong)
    assert (await complete(objects, bucket, upload_id, parts)).size == 1000
    await objects.close()


async def test_a_complete_whose_client_went_away_is_answered_when_it_is_sent_again() -> None:
    _, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b"])
    for turns in range(12):
        first = asyncio.ensure_future(complete(objects, bucket, upload_id, parts))
        for _ in range(turns):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    result = await complete(objects, bucket, upload_id, parts)
    assert result.size == 1001
    assert await complete(objects, bucket, upload_id, parts) == result
    assert await got(objects, bucket) == b"a" * 1000 + b"b"
    await objects.close()


def lp(*fields: bytes) -> bytes:
    """FORMATS.md: every field with its length before it."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


async def test_what_is_sealed_about_an_upload_opens_by_the_labels_and_contexts_that_formats_md_names() -> None:
    world, objects, bucket, _, parts, result = await completed((b"a" * 1000,))
    _, _, record = upload_row(world)
    context = lp(bucket.id, b"key", b"\x00upload", record.upload_id)
    dek = (await objects.plane.keys.bucket_key(bucket.id, bucket.countries)).unwrap(record.wrapped_key, context)
    assert decode(open_message(dek, "sov.meta.v1", context, record.meta), SealedMeta).etag == ""
    assert decode(open_message(dek, "sov.result.v1", context, record.result), CompleteResult).etag == result.etag
    (row,) = [decode(value.body, PartRecord) for name, value in world.ring.values.items() if name.table == Table.PART]
    sealed = open_message(dek, "sov.partmeta.v1", context + lp(row.entry.data_id), row.sealed)
    assert decode(sealed, SealedPart).etag == parts[0].etag
    expand = HKDFExpand(SHA512(), 32, b"sov.request.v1\x00" + context + bare_digest(parts))
    assert record.request_digest == b"\x01" + expand.derive(dek)
    await objects.close()


async def test_a_users_secret_opens_by_the_context_that_formats_md_names() -> None:
    world, objects, _ = world_of()
    keys = objects.plane.keys
    await UserService(objects.plane).add("anna", access_key="AKIAANNA", secret_key="s" * 40)
    name = system_name("user/AKIAANNA")
    record = decode(world.ring.values[name].body, UserRecord)
    packed = b"\x00" + bytes(16) + b"\x00" + b"user/AKIAANNA"
    assert decode(keys.open_secret(record.sealed, (packed, b"secret")), UserSecret).secret_key == "s" * 40
    await objects.close()


@pytest.mark.parametrize("then", ["deleted", "overwritten"])
async def test_a_slow_complete_does_not_bring_back_what_an_equal_one_made_and_a_client_replaced(then: str) -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b"])
    answers = []

    async def meanwhile(name: RegisterName) -> None:
        if name.table != Table.OBJECT:
            world.ring.interfere = meanwhile
            return
        answers.append(await complete(objects, bucket, upload_id, parts))
        if then == "deleted":
            await objects.delete(bucket, b"key")
        else:
            await put(objects, bucket, b"newer")

    world.ring.interfere = meanwhile
    answers.append(await complete(objects, bucket, upload_id, parts))
    assert answers[0] == answers[1]
    if then == "deleted":
        with pytest.raises(NoSuchKey):
            await objects.head(bucket, b"key")
    else:
        assert await got(objects, bucket) == b"newer"
    await objects.close()


async def test_a_complete_that_cannot_be_noted_does_not_say_that_nothing_was_changed() -> None:
    world, objects, bucket = world_of()
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b"])
    change, made = world.ring.change, []

    async def without_majority(name: RegisterName, *what: Any, **how: Any) -> Any:
        if name.table == Table.UPLOAD and made:
            raise ServiceUnavailable("No majority of its replicas answers. Nothing was changed. Retry.")
        made.append(name) if name.table == Table.OBJECT else None
        return await change(name, *what, **how)

    world.ring.change = without_majority  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown, match="Retry"):
        await complete(objects, bucket, upload_id, parts)
    assert await got(objects, bucket) == b"a" * 1000 + b"b"
    world.ring.change = change  # type: ignore[method-assign]
    assert (await complete(objects, bucket, upload_id, parts)).size == 1001
    await objects.close()
