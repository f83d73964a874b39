"""What a signature covers, and documents: their digests, their bounds, and what is answered once they have been acted
on."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator

import botocore.auth  # type: ignore[import-untyped]
import pytest
import pytest_asyncio
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

from storaged.objects.configuration.access import POLICY, PolicyText
from storaged.s3.auth import sigv4
from storaged.s3.request import parse_target
from tests.integration.s3_front import ACCESS, REGION, SECRET, World
from tests.integration.test_s3_fail_closed import call, filled, md5_of, state


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with filled() as world:
        yield world


def signed_to(host: bytes, method: str, target: str, body: bytes) -> bytes:
    """A request with a Host that no client library would send, and a signature of it."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    payload = hashlib.sha256(body).hexdigest()
    headers = {"host": host.decode("utf-8", "surrogateescape"), "x-amz-content-sha256": payload, "x-amz-date": stamp}
    parsed = parse_target(target.encode())
    canonical = sigv4.canonical_request(method, parsed.raw_path, parsed.pairs, sorted(headers), headers, payload)
    scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    signature = sigv4.sign(sigv4.signing_key(SECRET, stamp[:8], REGION), sigv4.string_to_sign(stamp, scope, canonical))
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS}/{scope}, SignedHeaders={';'.join(sorted(headers))},"
        f" Signature={signature}"
    )
    lines = [
        f"{method} {target} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"Authorization: {authorization}",
    ]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + body


# --- signatures


@pytest.mark.parametrize("presigned", [False, True])
@pytest.mark.parametrize(
    "name", ["x-storaged-countries", "X-Storaged-Countries", "x-storaged-anything", "x-amz-meta-a"]
)
async def test_what_an_intermediary_adds_to_a_signed_request_is_refused(
    world: World, name: str, presigned: bool
) -> None:
    before = state(world)
    request = AWSRequest("PUT", f"{world.endpoint}/new")
    auth = botocore.auth.S3SigV4QueryAuth if presigned else botocore.auth.S3SigV4Auth
    auth(Credentials(ACCESS, SECRET), "s3", REGION).add_auth(request)
    lines = [
        f"PUT {request.url.removeprefix(world.endpoint)} HTTP/1.1",
        f"Host: 127.0.0.1:{world.port}",
        "Connection: close",
    ]
    lines += [*(f"{key}: {value}" for key, value in request.headers.items()), "Content-Length: 0"]
    added = "\r\n".join([*lines, f"{name}: FR", "", ""]).encode()
    answer = await world.raw(added)
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert f"<HeadersNotSigned>{name.lower()}</HeadersNotSigned>".encode() in answer
    assert state(world) == before
    assert (await world.raw("\r\n".join([*lines, "", ""]).encode())).startswith(b"HTTP/1.1 200 ")


async def test_countries_that_are_signed_are_taken(world: World) -> None:
    assert (await call(world, "PUT", "/new", {"x-storaged-countries": "FR"}))[0] == 200
    assert (await world.buckets.get("new")).countries == ("FR",)


# --- documents


async def uploaded(world: World) -> tuple[str, bytes]:
    """(target, document) that complete an upload of one part."""
    upload_id = await world.upload_id()
    assert (await call(world, "PUT", f"/bucket/k?partNumber=1&uploadId={upload_id}", body=b"part"))[0] == 200
    etag = hashlib.md5(b"part").hexdigest()
    part = f"<Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part>"
    return f"/bucket/k?uploadId={upload_id}", f"<CompleteMultipartUpload>{part}</CompleteMultipartUpload>".encode()


TAGS = b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>"
PLACE = (
    f"<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>".encode()
)
WRONG_MD5 = {"content-md5": base64.b64encode(bytes(16)).decode()}
WRONG_CRC = {"x-amz-checksum-crc32": base64.b64encode(b"\x00\x00\x00\x01").decode()}

WRONG_DIGESTS = [
    (method, target, body, headers)
    for method, target, body in (
        ("PUT", "/new", PLACE), ("PUT", "/new", b""), ("PUT", "/bucket?tagging", TAGS), ("PUT", "/bucket/k?tagging", TAGS),  # noqa: E501
        ("POST", "/bucket?delete", b"<Delete><Object><Key>k</Key></Object></Delete>"), ("PUT", "/bucket?acl", b"<AccessControlPolicy/>"),  # noqa: E501
        ("PUT", "/bucket/k?acl", b""),
    )
    for headers in (WRONG_MD5, WRONG_CRC)
]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "body", "headers"), WRONG_DIGESTS)
async def test_a_document_that_is_not_what_its_digest_says_changes_nothing(
    world: World, method: str, target: str, body: bytes, headers: dict[str, str]
) -> None:
    before = state(world)
    assert (await call(world, method, target, headers, body))[:2] == (400, "BadDigest")
    assert (await call(world, method, target, {"content-md5": "?"}, body))[:2] == (400, "InvalidDigest")
    assert state(world) == before


async def test_a_list_of_parts_that_is_not_what_its_digest_says_completes_nothing(world: World) -> None:
    target, document = await uploaded(world)
    before = state(world)
    assert (await call(world, "POST", target, WRONG_MD5, document))[:2] == (400, "BadDigest")
    assert state(world) == before
    assert (await call(world, "POST", target, md5_of(document), document))[:2] == (200, "")
    assert (await call(world, "GET", "/bucket/k"))[2].endswith(b"part")


@pytest.mark.parametrize(
    "headers", [{"x-amz-mp-object-size": ""}, {"x-amz-mp-object-size": "4x"}, {"x-amz-checksum-type": ""}]
)
async def test_a_complete_with_an_empty_or_odd_header_completes_nothing(world: World, headers: dict[str, str]) -> None:
    target, document = await uploaded(world)
    before = state(world)
    assert (await call(world, "POST", target, headers, document))[0] == 400
    assert state(world) == before


@pytest.mark.parametrize("value", ["", "bytes=0-", "bytes=-1", "0-1"])
async def test_a_part_is_not_copied_whole_for_want_of_a_range(world: World, value: str) -> None:
    target = (await uploaded(world))[0] + "&partNumber=2"
    before = state(world)
    headers = {"x-amz-copy-source": "/bucket/k", "x-amz-copy-source-range": value}
    assert (await call(world, "PUT", target, headers))[:2] == (400, "InvalidArgument")
    assert state(world) == before


@pytest.mark.parametrize(
    "name",
    ["x-amz-copy-source", "x-amz-acl", "x-amz-meta-a", "x-amz-write-offset-bytes", "x-storaged-countries", "if-match"],
)
async def test_a_form_says_nothing_in_its_headers(world: World, name: str) -> None:
    before = state(world)
    head = (
        "POST /bucket HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: multipart/form-data;"
        f" boundary=b\r\n{name}: x\r\n"
    )
    answer = await world.raw(head.encode() + b"Content-Length: 0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert state(world) == before


@pytest.mark.parametrize("number", ["9" * 5000, "10001", "0", "", "-1", "1.0", "\u0661", "1_0", "0x1"])
async def test_a_part_number_that_is_none_completes_nothing(world: World, number: str) -> None:
    target, _ = await uploaded(world)
    before = state(world)
    document = f"<CompleteMultipartUpload><Part><PartNumber>{number}</PartNumber><ETag>x</ETag></Part></CompleteMultipartUpload>"  # noqa: E501
    assert (await call(world, "POST", target, body=document.encode()))[:2] == (400, "MalformedXML")
    assert state(world) == before


async def test_a_host_that_is_not_ascii_does_not_fail_what_has_been_done(world: World) -> None:
    """The answer names the host: it must not fail once the upload is complete."""
    target, document = await uploaded(world)
    answer = await world.raw(signed_to(b"x\xff", "POST", target, document))
    status = int(answer.split(b" ", 2)[1])
    done = (await call(world, "GET", "/bucket/k"))[2].endswith(b"part")
    assert (status, done) in ((200, True), (400, False))


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("DELETE", "/bucket/k", {}), ("DELETE", "/empty", {}), ("DELETE", "/bucket/k?tagging", {}), ("POST", "/bucket/k?uploads", {}),  # noqa: E501
        ("PUT", "/bucket/copy", {"x-amz-copy-source": "/bucket/k"}),
    ],
)  # fmt: skip
async def test_a_body_where_none_belongs_changes_nothing(
    world: World, method: str, target: str, headers: dict[str, str]
) -> None:
    before = state(world)
    assert (await call(world, method, target, headers, b"<Delete/>"))[:2] == (400, "InvalidRequest")
    assert state(world) == before


@pytest.mark.parametrize("target", ["/bucket?tagging", "/bucket/k?tagging", "/bucket?acl", "/new"])
async def test_a_document_beyond_its_bound_is_refused(world: World, target: str) -> None:
    before = state(world)
    assert (await call(world, "PUT", target, body=b" " * (256 * 1024 + 1)))[:2] == (400, "MaxMessageLengthExceeded")
    assert state(world) == before


async def test_the_owner_on_record_is_printed_and_not_the_requester(world: World) -> None:
    record = await world.buckets.get("bucket")
    await world.buckets.set_owner(record, "f" * 64)
    await world.buckets.configure(
        record, POLICY, lambda _: PolicyText(everybody("s3:GetBucketAcl", "arn:aws:s3:::bucket"))
    )
    status, _, body = await call(world, "GET", "/bucket?acl")
    assert status == 200
    assert body.count(b"<ID>" + b"f" * 64 + b"</ID><DisplayName></DisplayName>") == 2


def everybody(action: str, resource: str) -> str:
    """A policy that allows everybody."""
    statement = {"Effect": "Allow", "Principal": "*", "Action": action, "Resource": resource}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
