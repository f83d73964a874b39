"""What the S3 port does not understand, or does not have, changes nothing.

One table over (method, target, headers) -> (status, S3 code, state unchanged)."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from storaged.errors import InvalidArgument, NotImplemented
from storaged.s3 import aws_names
from storaged.s3.operation import adopt_query_headers
from storaged.s3.request import Request, Target
from storaged.s3.routes import OBJECT, SUBRESOURCES
from tests.integration.s3_front import ACCESS, REGION, World, s3_world, signed

OLD = b"old bytes"
ETAG = hashlib.md5(OLD).hexdigest()
PAST, FUTURE = "Mon, 01 Jan 1994 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"


@asynccontextmanager
async def filled() -> AsyncIterator[World]:
    """Two buckets, one of them empty; an object with an upload of the same key."""
    async with s3_world() as world:
        who = (await world.users.lookup(ACCESS))[0]
        for name in ("bucket", "empty"):
            await world.buckets.create(who, name, region=REGION)
        assert (await call(world, "PUT", "/bucket/k", body=OLD))[:2] == (200, "")
        assert (await call(world, "POST", "/bucket/k?uploads"))[:2] == (200, "")
        yield world


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with filled() as world:
        yield world


async def call(
    world: World, method: str, target: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> tuple[int, str, bytes]:
    """(status, S3 code, the whole answer) of one signed request on a connection of its own."""
    request = signed(world, method, target, body=body, headers=headers)
    head, _, rest = request.partition(b"\r\n\r\n")
    answer = await world.raw(head + b"\r\nConnection: close\r\n\r\n" + rest)
    code = re.search(rb"<Code>(\w+)</Code>", answer)
    return int(answer.split(b" ", 2)[1]), code[1].decode() if code else "", answer


def state(world: World) -> Any:
    """All that requests can change, as a value."""
    ring = world.below.ring
    fragments = {disk: store.fragments for disk, store in world.below.disks.disks.items()}
    return dict(ring.values), dict(ring.pages), dict(ring.fences), fragments


def md5_of(body: bytes) -> dict[str, str]:
    return {"content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()}


NO_LISTS = (400, "AccessControlListNotSupported")
NO_LISTS_OWNED = (400, "InvalidBucketAclWithObjectOwnership")

REFUSED_CONDITIONS: list[tuple[str, dict[str, str], tuple[int, str]]] = [
    *[("PUT", {"if-match": value}, (412, "PreconditionFailed")) for value in ('""', "", " ", "W/", 'W/""', '"', f'W/"{ETAG}"', f'"{ETAG}')],  # noqa: E501
    *[("DELETE", {"if-match": value}, (412, "PreconditionFailed")) for value in ('""', "", " ", "W/", 'W/""', '"', f'"{ETAG}" x', '*,"x"')],  # noqa: E501
    *[("PUT", {"if-none-match": value}, (501, "NotImplemented")) for value in ('""', "", "W/*", '*,"x"', '"*"', f'W/"{ETAG}"', f'"{ETAG}', '"x",""')],  # noqa: E501
    *[("PUT", {"if-none-match": value}, (412, "PreconditionFailed")) for value in ("*", f'"{ETAG}"', ETAG, f'"x", "{ETAG}"')],  # noqa: E501
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
    body = b"new" if method == "PUT" and "x-amz-copy-source" not in headers else b""
    assert (await call(world, method, "/bucket/k", headers, body))[:2] == answer
    assert state(world) == before


@pytest.mark.parametrize("value", ["*", f'"{ETAG}"', ETAG, f'"other", "{ETAG}"', f' , "x,y" ,W/"z", {ETAG},'])
async def test_conditions_that_hold_let_writes_and_deletes_through(world: World, value: str) -> None:
    assert (await call(world, "PUT", "/bucket/k", {"if-match": value}, OLD))[0] == 200
    assert (await call(world, "DELETE", "/bucket/k", {"if-match": value}))[0] == 204
    assert (await call(world, "PUT", "/bucket/k", {"if-match": value}, OLD))[:2] == (404, "NoSuchKey")
    assert (await call(world, "PUT", "/bucket/k", {"if-none-match": "*"}, OLD))[0] == 200


async def test_a_write_may_name_the_tag_that_must_not_be_there(world: World) -> None:
    assert (await call(world, "PUT", "/bucket/k", {"if-none-match": '"other"'}, b"new"))[0] == 200
    assert (await call(world, "PUT", "/bucket/k", {"if-none-match": hashlib.md5(b"new").hexdigest()}, OLD))[0] == 412


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
async def test_an_entry_of_delete_objects_whose_condition_fails_is_kept(
    world: World, condition: str, code: str
) -> None:
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


# --- subresources and parameters

NOT_ALLOWED, NOT_THERE, CONFLICT = (405, "MethodNotAllowed"), (501, "NotImplemented"), (400, "InvalidArgument")

REFUSED_TARGETS: list[tuple[str, str, tuple[int, str]]] = [
    *[("DELETE", f"/bucket/k?{name}", NOT_ALLOWED) for name in ("policy", "lifecycle", "acl", "uploads", "retention", "versions")],  # noqa: E501
    *[("DELETE", f"/bucket/k?{name}", NOT_THERE) for name in ("ACL", "Policy", "TAGGING", "uploadID=x", "versionid=null", "%20acl")],  # noqa: E501
    *[("PUT", f"/bucket/k?{name}", NOT_ALLOWED) for name in ("policy", "lifecycle", "versions", "uploads", "delete", "cors", "restore")],  # noqa: E501
    *[("PUT", f"/bucket/k?{name}", NOT_THERE) for name in ("Tagging", "annotation=a", "annotation", "append")],
    *[("PUT", f"/bucket/k?{name}", CONFLICT) for name in ("partNumber=1", "versionId=abc", "prefix=a", "max-keys=1", "id=1")],  # noqa: E501
    ("PUT", "/bucket/k?renameObject", (400, "InvalidRequest")),  # it has no body
    ("PUT", "/bucket/k?renameobject", NOT_THERE),
    ("PUT", "/bucket/k?renameObject&acl", CONFLICT),
    ("PUT", "/bucket/k?renameObject&versionId=null", CONFLICT),
    ("POST", "/bucket/k?renameObject", NOT_ALLOWED),
    ("PUT", "/bucket?renameObject", NOT_ALLOWED),
    ("PUT", "/bucket/k?partnumber=1&uploadId=x", NOT_THERE),
    ("PUT", "/bucket/k?uploadId=x", NOT_ALLOWED),
    ("PUT", "/bucket/k?uploadId=x&partNumber", CONFLICT),
    ("PUT", "/bucket/k?uploadId=x&partNumber=0", CONFLICT),
    ("PUT", "/bucket/k?partNumber=1&uploadId=x&versionId=null", CONFLICT),
    ("DELETE", "/bucket/k?partNumber=1", CONFLICT),
    ("DELETE", "/bucket/k?versionId=null&versionId=null", CONFLICT),
    ("DELETE", "/bucket/k?tagging&acl", CONFLICT),
    ("DELETE", "/bucket/k?versionId", CONFLICT),
    ("DELETE", "/empty?metadataJournalTable", NOT_ALLOWED),
    ("DELETE", "/empty?metadataTable", NOT_THERE),
    ("DELETE", "/empty?metadataAnnotationTable", NOT_ALLOWED),
    ("DELETE", "/empty?session", NOT_ALLOWED),
    ("DELETE", "/empty?Policy", NOT_THERE),
    ("DELETE", "/empty?prefix=a", CONFLICT),
    ("DELETE", "/empty?uploadId=a", NOT_ALLOWED),
    ("DELETE", "/empty?versioning", NOT_ALLOWED),
    ("PUT", "/new?metadataInventoryTable", (404, "NoSuchBucket")),
    ("PUT", "/new?torrent", NOT_ALLOWED),
    ("PUT", "/new?Versioning", NOT_THERE),
    ("POST", "/bucket?metadataConfiguration", NOT_THERE),
    ("POST", "/bucket/k?restore", NOT_THERE),
    ("POST", "/bucket/k?select&select-type=2", NOT_THERE),
    ("POST", "/bucket/k?uploads&uploadId=x", CONFLICT),
    ("GET", "/bucket/k?uploads", NOT_ALLOWED),
    ("GET", "/bucket/k?ACL", NOT_THERE),
    ("GET", "/bucket?acl&policy", CONFLICT),
    ("GET", "/bucket?session", NOT_THERE),
    ("GET", "/?max-directory-buckets=1", NOT_THERE),
]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "answer"), REFUSED_TARGETS)
async def test_a_misplaced_or_missing_subresource_changes_nothing(
    world: World, method: str, target: str, answer: tuple[int, str]
) -> None:
    before = state(world)
    assert (await call(world, method, target, body=b"<Document/>" if method in ("PUT", "POST") else b""))[:2] == answer
    assert state(world) == before


@pytest.mark.parametrize(
    "target", ["/bucket/k?x-id=PutObject", "/bucket/k?foo", "/bucket/k?x-id=PutObject&legalhold=1&a=b"]
)
async def test_parameters_that_aws_does_not_know_are_ignored(world: World, target: str) -> None:
    assert (await call(world, "PUT", target, body=b"new"))[0] == 200
    assert (await call(world, "GET", target))[2].endswith(b"new")
    assert (await call(world, "DELETE", target))[0] == 204
    assert (await call(world, "GET", "/bucket/k"))[0] == 404


MUTATIONS = {
    ("PUT", "bucket", ""), ("DELETE", "bucket", ""), ("PUT", "object", ""), ("DELETE", "object", ""),
    ("PUT", "bucket", "tagging"), ("DELETE", "bucket", "tagging"), ("PUT", "object", "tagging"), ("DELETE", "object", "tagging"),  # noqa: E501
    ("POST", "object", "uploads"), ("PUT", "object", "uploadId"), ("POST", "object", "uploadId"), ("DELETE", "object", "uploadId"),  # noqa: E501
    ("POST", "bucket", "delete"), ("DELETE", "bucket", "encryption"), ("DELETE", "bucket", "lifecycle"),
}  # fmt: skip
"""The rows that may change objects, buckets, tags or uploads, or that wait until all gateways know of it. PUT ?acl
takes what changes nothing."""


def variants(name: str) -> set[str]:
    return {
        name,
        name.upper(),
        name.lower(),
        name.capitalize(),
        name.swapcase(),
        f"{name}%20",
        f"%2F{name}",
        f"{name}%00",
        f"{name}?x",
        f"{name};x=1",
        f"{name}%3D1",
        f"{name}&{name}",
        name + "&acl",
        name + "&uploads",
    }


@pytest.mark.parametrize("name", sorted(SUBRESOURCES))
async def test_no_subresource_changes_anything_but_by_its_own_row(world: World, name: str) -> None:
    """Every known subresource, in every case, by every method, of a bucket and of an object, with a body that is a
    document."""
    before = state(world)
    for variant in sorted(variants(name)):
        for method in ("GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS"):
            for kind, path in (("bucket", "/empty"), ("object", "/bucket/k"), ("bucket", "/new")):
                if variant == name and (method, kind, name) in MUTATIONS:
                    continue
                body = b"<Tagging><TagSet></TagSet></Tagging>" if method in ("PUT", "POST") else b""
                status, _, answer = await call(world, method, f"{path}?{variant}", md5_of(body) if body else {}, body)
                assert state(world) == before, (method, path, variant, answer)
                assert status < 500 or status == 501


# --- headers

REFUSED_HEADERS: list[tuple[str, str, dict[str, str], tuple[int, str]]] = [
    ("PUT", "/bucket/k", {"x-amz-write-offset-bytes": "3"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-write-offset-bytes": "3", "x-amz-server-side-encryption": "AES256"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-website-redirect-location": "a"}, (400, "InvalidRedirectLocation")),
    ("PUT", "/bucket/k", {"x-amz-website-redirect-location": "//" + "a" * 2048}, (400, "InvalidRedirectLocation")),
    ("DELETE", "/bucket/k", {"x-amz-website-redirect-location": "/a"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption-context": "e30=", "x-amz-server-side-encryption": "AES256"}, CONFLICT),  # noqa: E501
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption": "aws:kms:dsse"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption": "aws:fsx"}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption": ""}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption-aws-kms-key-id": "k"}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption-customer-algorithm": "AES256"}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": "k",
                          "x-amz-server-side-encryption-customer-algorithm": "AES256"}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-server-side-encryption-of-tomorrow": "1"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-object-lock-mode": "GOVERNANCE"}, (400, "InvalidArgument")),
    ("PUT", "/bucket/k", {"x-amz-object-lock-event-hold": "ON"}, (400, "InvalidRequest")),
    ("PUT", "/bucket/k", {"x-amz-grant-read": "id=1"}, NO_LISTS),
    ("PUT", "/bucket/k", {"x-amz-acl": ""}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-acl": "public-read"}, NO_LISTS),
    ("PUT", "/bucket/k", {"x-amz-storage-class": ""}, (400, "InvalidStorageClass")),
    ("PUT", "/bucket/k", {"x-amz-storage-class": "EXPRESS_ONEZONE"}, (400, "InvalidStorageClass")),
    ("PUT", "/bucket/k", {"x-amz-storage-class": "standard"}, (400, "InvalidStorageClass")),
    *[(method, target, {"x-amz-storage-class": name, **more}, (400, "InvalidStorageClass")) for name in ("GLACIER", "DEEP_ARCHIVE") for method, target, more in [  # noqa: E501
        ("PUT", "/bucket/k", {}), ("PUT", "/bucket/new", {"x-amz-copy-source": "/bucket/k"}), ("POST", "/bucket/k?uploads", {}),  # noqa: E501
    ]],
    ("PUT", "/bucket/k", {"x-amz-mp-object-size": "3"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-copy-source-range": "bytes=0-1"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-copy-source-if-match": "x"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-metadata-directive": "REPLACE"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-if-match-size": "9"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-rename-source": "/bucket/o"}, NOT_THERE),
    *[("PUT", "/bucket/new?renameObject", {"x-amz-rename-source": source}, answer) for source, answer in [
        ("", CONFLICT), ("none", (404, "NoSuchKey")), ("bucket/k", (404, "NoSuchKey")), ("/bucket/", CONFLICT),
        ("/other/k", (404, "NoSuchKey")), ("k/", (400, "InvalidRequest")), ("new", (400, "InvalidRequest")),
        ("%ff", (400, "InvalidURI")),
    ]],
    ("PUT", "/bucket/new?renameObject", {}, CONFLICT),
    ("PUT", "/bucket/new/?renameObject", {"x-amz-rename-source": "k"}, (400, "InvalidRequest")),
    *[("PUT", "/bucket/new?renameObject", {"x-amz-rename-source": "k", **more}, answer) for more, answer in [
        ({"x-amz-client-token": ""}, CONFLICT), ({"x-amz-client-token": "x" * 65}, CONFLICT),
        ({"x-amz-client-token": "a b"}, CONFLICT), ({"if-match": "*"}, (412, "PreconditionFailed")),
        ({"if-match": '""'}, (412, "PreconditionFailed")), ({"if-none-match": ""}, CONFLICT),
        ({"if-modified-since": PAST}, (412, "PreconditionFailed")), ({"if-modified-since": "x"}, CONFLICT),
        ({"if-unmodified-since": ""}, CONFLICT),
        ({"x-amz-rename-source-if-match": '"x"'}, (412, "PreconditionFailed")),
        ({"x-amz-rename-source-if-none-match": "*"}, (412, "PreconditionFailed")),
        ({"x-amz-rename-source-if-modified-since": FUTURE}, (412, "PreconditionFailed")),
        ({"x-amz-rename-source-if-unmodified-since": PAST}, (412, "PreconditionFailed")),
        ({"x-amz-rename-source-if-modified-since": "x"}, CONFLICT),
        ({"x-amz-rename-source-if-tomorrow": "1"}, NOT_THERE), ({"x-amz-copy-source": "/bucket/k"}, NOT_THERE),
        ({"x-amz-acl": "private"}, NOT_THERE), ({"x-amz-tagging": "a=b"}, NOT_THERE),
        ({"x-amz-meta-a": "b"}, NOT_THERE),
    ]],
    ("PUT", "/bucket/k", {"x-amz-client-token": "t"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-amz-request-payer": ""}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-expected-bucket-owner": ""}, (403, "AccessDenied")),
    ("PUT", "/bucket/k", {"x-storaged-countries": "FR"}, NOT_THERE),
    ("PUT", "/bucket/k", {"x-storaged-anything": "1"}, NOT_THERE),
    ("PUT", "/bucket/k", {"content-range": "bytes 0-2/9"}, NOT_THERE),
    ("DELETE", "/bucket/k", {"x-amz-mfa": "serial 123456"}, NOT_THERE),
    ("DELETE", "/bucket/k", {"x-amz-object-lock-legal-hold": "ON"}, NOT_THERE),
    ("DELETE", "/bucket/k", {"x-amz-copy-source": "/bucket/k"}, NOT_THERE),
    ("DELETE", "/bucket/k", {"x-amz-server-side-encryption": "AES256"}, CONFLICT),
    ("DELETE", "/bucket/k", {"x-amz-meta-a": "b"}, NOT_THERE),
    ("DELETE", "/bucket/k?tagging", {"if-match": f'"{ETAG}"'}, NOT_THERE),
    *[("DELETE", "/bucket/k?versionId=null", {"if-match": tag}, NOT_THERE) for tag in ("*", f'"{ETAG}"', '"other"')],
    ("DELETE", "/empty", {"if-match": "*"}, NOT_THERE),
    ("DELETE", "/empty", {"x-amz-expected-bucket-owner": "somebody"}, (403, "AccessDenied")),
    ("POST", "/bucket/k?uploads", {"if-none-match": "*"}, NOT_THERE),
    ("POST", "/bucket/k?uploads", {"x-amz-website-redirect-location": ""}, (400, "InvalidRedirectLocation")),
    ("PUT", "/new", {"x-amz-bucket-namespace": "account-regional"}, NOT_THERE),
    ("PUT", "/new", {"x-amz-bucket-object-lock-enabled": "yes"}, CONFLICT),
    ("PUT", "/new", {"x-amz-grant-write": "id=1"}, CONFLICT),
    ("PUT", "/new", {"x-amz-acl": "public-read"}, NO_LISTS_OWNED),
    ("PUT", "/new", {"x-storaged-country": "FR"}, NOT_THERE),
    ("PUT", "/new", {"x-storaged-countries": ""}, CONFLICT),
    ("PUT", "/new", {"x-storaged-countries": "FR,"}, CONFLICT),
    ("PUT", "/bucket/k", {"x-amz-sdk-checksum-algorithm": ""}, (400, "InvalidRequest")),
    ("POST", "/bucket/k?uploads", {"x-amz-checksum-algorithm": ""}, (400, "InvalidRequest")),
    ("POST", "/bucket/k?uploads", {"x-amz-checksum-algorithm": "CRC32", "x-amz-checksum-type": ""}, (400, "InvalidRequest")),  # noqa: E501
    ("PUT", "/new", {"x-amz-expected-bucket-owner": "me"}, NOT_THERE),
    ("PUT", "/bucket/k?x-amz-write-offset-bytes=3", {}, NOT_THERE),
    ("PUT", "/bucket/k?X-Amz-Acl=public-read", {}, NO_LISTS),
    ("PUT", "/bucket/k?x-amz-storage-class=STANDARD_IA", {"x-amz-storage-class": "STANDARD"}, CONFLICT),
    ("GET", "/bucket?list-type=2", {"x-amz-optional-object-attributes": "Everything"}, CONFLICT),
    ("GET", "/bucket/k", {"x-amz-server-side-encryption": "AES256"}, (400, "InvalidRequest")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "headers", "answer"), REFUSED_HEADERS)
async def test_a_header_that_asks_for_what_is_not_done_changes_nothing(
    world: World, method: str, target: str, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    before = state(world)
    assert (
        await call(
            world, method, target, headers, b"new" if target.startswith("/bucket/k") and method == "PUT" else b""
        )
    )[:2] == answer
    assert state(world) == before


DOINGS = {
    "PutObject": ("PUT", "/bucket/k", b"new"), "CopyObject": ("PUT", "/bucket/k", b""), "DeleteObject": ("DELETE", "/bucket/k", b""),  # noqa: E501
    "CreateBucket": ("PUT", "/new", b""), "DeleteBucket": ("DELETE", "/empty", b""),
    "CreateMultipartUpload": ("POST", "/bucket/k?uploads", b""), "UploadPart": ("PUT", "/bucket/k?partNumber=1&uploadId=U", b"part"),  # noqa: E501
    "AbortMultipartUpload": ("DELETE", "/bucket/k?uploadId=U", b""),
    "DeleteObjects": ("POST", "/bucket?delete", b"<Delete><Object><Key>k</Key></Object></Delete>"),
    "RenameObject": ("PUT", "/bucket/new?renameObject", b""),
    "PutObjectTagging": ("PUT", "/bucket/k?tagging", b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>"),  # noqa: E501
}  # fmt: skip
"""Requests that change something when nothing is added to them."""


@pytest.mark.parametrize("name", sorted(DOINGS))
async def test_every_header_of_aws_is_honoured_or_refused_by_every_operation_that_changes_something(
    world: World, name: str
) -> None:
    method, target, body = DOINGS[name]
    target = target.replace("U", await world.upload_id()) if "uploadId" in target else target
    own = {"x-amz-copy-source": "/bucket/k", "x-amz-metadata-directive": "REPLACE"} if name == "CopyObject" else {}
    own |= {"x-amz-rename-source": "k"} if name == "RenameObject" else {}
    own |= md5_of(body) if name == "DeleteObjects" else {}
    before = state(world)
    for header in sorted(
        aws_names.HEADERS.keys() - aws_names.honoured(name) - {"content-range", "x-amz-copy-source"}
    ) + [f"{family}tomorrow" for family in aws_names.FAMILIES]:
        status, code, _ = await call(world, method, target, {**own, header: "1"}, body)
        assert (status, code) in {(400, "InvalidArgument"), (400, "InvalidRequest"), NOT_THERE}, header
        assert state(world) == before, header
    assert (await call(world, method, target, {**own, "x-amz-tomorrow": "1", "x-amzn-trace-id": "1"}, body))[0] in (
        200,
        204,
    )
    assert state(world) != before


async def test_what_presigned_urls_say_of_an_object_is_heard(world: World) -> None:
    target = "/bucket/k?x-amz-meta-colour=blue&X-Amz-Storage-Class=GLACIER_IR&x-amz-checksum-crc32=AAAAAA%3D%3D&x-amz-sdk-checksum-algorithm=CRC32"  # noqa: E501
    assert (await call(world, "PUT", target, body=b"new"))[0] == 200, "a checksum there is the one of no body"
    answer = (await call(world, "GET", "/bucket/k"))[2]
    assert b"x-amz-meta-colour: blue\r\n" in answer
    assert b"x-amz-storage-class: GLACIER_IR\r\n" in answer


@pytest.mark.parametrize(
    "query", [{"x-amz-meta-a": "b\r\nc"}, {"x-amz-meta-a\r\nb": "c"}, {"X-Amz-Meta-a b": "c"}, {"x-amz-meta-é": "c"}]
)
def test_no_parameter_becomes_a_header_that_http_does_not_have(query: dict[str, str]) -> None:
    request = Request("", "PUT", b"/", "", False, {}, Target(b"/", (), query))
    with pytest.raises(InvalidArgument):
        adopt_query_headers(request)
    assert request.headers == {}


async def test_headers_without_effect_are_taken(world: World) -> None:
    harmless = {"x-amz-request-payer": "requester", "x-amz-bypass-governance-retention": "true"}
    assert (await call(world, "DELETE", "/bucket/k", harmless))[0] == 204
    assert (await call(world, "GET", "/bucket?list-type=2", {"x-amz-optional-object-attributes": "RestoreStatus"}))[
        0
    ] == 200


def test_of_several_headers_that_are_refused_the_first_by_name_is_named() -> None:
    put = OBJECT[""]["PUT"]
    for headers in (
        {"x-amz-write-offset-bytes": "1", "x-amz-mfa": "1"},
        {"x-amz-mfa": "1", "x-amz-write-offset-bytes": "1"},
    ):
        with pytest.raises(NotImplemented) as caught:
            put.check_headers(headers)
        assert caught.value.details == {"Header": "x-amz-mfa"}
