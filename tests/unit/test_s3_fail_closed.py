"""What the S3 port does not understand, or does not have, changes nothing.

One table over (method, target, headers) -> (status, S3 code, state unchanged)."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.unit.s3_world import ACCESS, REGION, World, s3_world, signed

OLD = b"old bytes"
ETAG = hashlib.md5(OLD).hexdigest()
PAST, FUTURE = "Mon, 01 Jan 1994 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        who = (await world.users.lookup(ACCESS))[0]
        for name in ("bucket", "empty"):
            await world.buckets.create(who, name, region=REGION)
        assert (await call(world, "PUT", "/bucket/k", body=OLD))[:2] == (200, "")
        assert (await call(world, "POST", "/bucket/k?uploads"))[:2] == (200, "")
        yield world


async def call(world: World, method: str, target: str, headers: dict[str, str] | None = None, body: bytes = b"") -> tuple[int, str, bytes]:
    """(status, S3 code, the whole answer) of one signed request on a connection of its own."""
    request = signed(world, method, target, body=body, headers=headers)
    head, _, rest = request.partition(b"\r\n\r\n")
    answer = await world.raw(head + b"\r\nConnection: close\r\n\r\n" + rest)
    code = re.search(rb"<Code>(\w+)</Code>", answer)
    return int(answer.split(b" ", 2)[1]), code[1].decode() if code else "", answer


def state(world: World) -> Any:
    """All that requests can change, as a value."""
    objects = {
        bucket: {key: (stored.info, stored.data) for key, stored in found.items()} for bucket, found in world.objects.objects.items()
    }
    uploads = {upload_id: (upload.info, dict(upload.parts), upload.done) for upload_id, upload in world.objects.uploads.items()}
    return objects, uploads, dict(world.buckets.by_name), {name: dict(tags) for name, tags in world.buckets.tags.items()}


def md5_of(body: bytes) -> dict[str, str]:
    return {"content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()}


REFUSED_CONDITIONS: list[tuple[str, dict[str, str], tuple[int, str]]] = [
    *[("PUT", {"if-match": value}, (412, "PreconditionFailed")) for value in ('""', "", " ", "W/", 'W/""', '"', f'W/"{ETAG}"', f'"{ETAG}')],
    *[("DELETE", {"if-match": value}, (412, "PreconditionFailed")) for value in ('""', "", " ", "W/", 'W/""', '"', f'"{ETAG}" x', '*,"x"')],
    *[("PUT", {"if-none-match": value}, (501, "NotImplemented")) for value in ('""', "", "W/*", '*,"x"', '"*"', '"other"', f'"{ETAG}"')],
    ("PUT", {"if-none-match": "*"}, (412, "PreconditionFailed")),
    ("PUT", {"if-match": f'"{ETAG}"', "if-unmodified-since": PAST}, (501, "NotImplemented")),
    ("PUT", {"if-match": f'"{ETAG}"', "if-none-match": "*"}, (412, "PreconditionFailed")),
    ("PUT", {"if-unmodified-since": FUTURE}, (501, "NotImplemented")),
    ("PUT", {"if-modified-since": PAST}, (501, "NotImplemented")),
    ("DELETE", {"if-none-match": "*"}, (501, "NotImplemented")),
    ("DELETE", {"if-none-match": '"other"'}, (501, "NotImplemented")),
    ("DELETE", {"if-unmodified-since": PAST}, (501, "NotImplemented")),
    ("DELETE", {"if-unmodified-since": FUTURE}, (501, "NotImplemented")),
    ("DELETE", {"if-modified-since": PAST}, (501, "NotImplemented")),
    ("DELETE", {"x-amz-if-match-size": ""}, (400, "InvalidArgument")),
    ("DELETE", {"x-amz-if-match-size": "9" * 5000}, (400, "InvalidArgument")),
    ("DELETE", {"x-amz-if-match-size": "1"}, (412, "PreconditionFailed")),
    ("DELETE", {"x-amz-if-match-last-modified-time": ""}, (400, "InvalidArgument")),
    ("DELETE", {"x-amz-if-match-last-modified-time": "soon"}, (400, "InvalidArgument")),
    ("DELETE", {"x-amz-if-match-last-modified-time": PAST}, (412, "PreconditionFailed")),
    *[
        ("PUT", {"x-amz-copy-source": "bucket/k", "x-amz-metadata-directive": "REPLACE", **condition}, answer)
        for condition, answer in (
            ({"x-amz-copy-source-if-match": ""}, (412, "PreconditionFailed")),
            ({"x-amz-copy-source-if-match": f'W/"{ETAG}"'}, (412, "PreconditionFailed")),
            ({"x-amz-copy-source-if-none-match": ""}, (400, "InvalidArgument")),
            ({"x-amz-copy-source-if-none-match": '*,"x"'}, (400, "InvalidArgument")),
            ({"x-amz-copy-source-if-none-match": f'"x", W/"{ETAG}"'}, (412, "PreconditionFailed")),
            ({"x-amz-copy-source-if-unmodified-since": "yesterday"}, (400, "InvalidArgument")),
            ({"x-amz-copy-source-if-unmodified-since": PAST}, (412, "PreconditionFailed")),
            ({"x-amz-copy-source-if-modified-since": ""}, (400, "InvalidArgument")),
            ({"if-none-match": "*"}, (412, "PreconditionFailed")),
            ({"if-match": '""'}, (412, "PreconditionFailed")),
            ({"if-unmodified-since": FUTURE}, (501, "NotImplemented")),
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("method", "headers", "answer"), REFUSED_CONDITIONS)
async def test_a_condition_that_does_not_hold_or_cannot_be_read_changes_nothing(
    world: World, method: str, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    before = state(world)
    assert (await call(world, method, "/bucket/k", headers, b"new" if method == "PUT" else b""))[:2] == answer
    assert state(world) == before


@pytest.mark.parametrize("value", ["*", f'"{ETAG}"', ETAG, f'"other", "{ETAG}"', f' , "x,y" ,W/"z", {ETAG},'])
async def test_conditions_that_hold_let_writes_and_deletes_through(world: World, value: str) -> None:
    assert (await call(world, "PUT", "/bucket/k", {"if-match": value}, OLD))[0] == 200
    assert (await call(world, "DELETE", "/bucket/k", {"if-match": value}))[0] == 204
    assert (await call(world, "PUT", "/bucket/k", {"if-match": value}, OLD))[:2] == (404, "NoSuchKey")
    assert (await call(world, "PUT", "/bucket/k", {"if-none-match": "*"}, OLD))[0] == 200


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ('<ETag>""</ETag>', "PreconditionFailed"),
        ("<ETag></ETag>", "PreconditionFailed"),
        ("<ETag>W/</ETag>", "PreconditionFailed"),
        ("<ETag>*,x</ETag>", "PreconditionFailed"),
        ("<Size></Size>", "InvalidArgument"),
        (f"<Size>{'9' * 5000}</Size>", "InvalidArgument"),
        ("<Size>1</Size>", "PreconditionFailed"),
        ("<LastModifiedTime></LastModifiedTime>", "InvalidArgument"),
        ("<VersionId></VersionId>", "InvalidArgument"),
    ],
)
async def test_an_entry_of_delete_objects_whose_condition_fails_is_kept(world: World, condition: str, code: str) -> None:
    before = state(world)
    body = f"<Delete><Object><Key>k</Key>{condition}</Object></Delete>".encode()
    status, found, _ = await call(world, "POST", "/bucket?delete", md5_of(body), body)
    assert (status, found) == (200, code)
    assert state(world) == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if-match": ""}, 412),
        ({"if-match": '""'}, 412),
        ({"if-match": f'W/"{ETAG}"'}, 412),
        ({"if-match": f'"x",{ETAG}', "if-unmodified-since": PAST}, 200),
        ({"if-none-match": f'W/"{ETAG}"'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": ""}, 200),
        ({"if-none-match": '"other"', "if-modified-since": FUTURE}, 200),
        ({"if-modified-since": "no date"}, 200),
        ({"if-unmodified-since": PAST}, 412),
    ],
)
async def test_reads_judge_conditions_as_rfc_9110_does(world: World, headers: dict[str, str], status: int) -> None:
    assert (await call(world, "GET", "/bucket/k", headers))[0] == status
    assert (await call(world, "HEAD", "/bucket/k", headers))[0] == status
