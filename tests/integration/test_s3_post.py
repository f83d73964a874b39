"""Browser forms: what a signed policy allows, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from botocore.exceptions import ClientError

from storaged import errors
from storaged.s3.auth.form_policy import check_policy, parse_policy
from storaged.s3.http.form_data import FormReader, boundary_of
from tests.integration.s3_front import ACCESS, ACCESS_ALT, REGION, SECRET, SECRET_ALT, World, s3_world

BOUNDARY = "x-boundary"
NOW_MS = 1_700_000_000_000
FAR = "2099-12-31T23:59:59Z"
PAST = "2001-01-01T00:00:00Z"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


def encode(document: Any) -> str:
    return base64.b64encode(json.dumps(document).encode()).decode()


def policy(*conditions: Any, expiration: str = FAR) -> dict[str, Any]:
    """A document of fixed dates: some are made when tests are collected, long before they run."""
    return {"expiration": expiration, "conditions": [{"bucket": "bucket"}, *conditions]}


def form(fields: dict[str, str], data: bytes = b"data", filename: str = "dir/name.txt") -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    parts.append(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\nContent-Type:'
        " a/b\r\n\r\n"
    )
    return "".join(parts).encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def signed_form(
    document: dict[str, Any], fields: dict[str, str], data: bytes = b"data", who: tuple[str, str] = (ACCESS, SECRET)
) -> bytes:
    access, secret = who
    encoded = encode(document)
    signature = base64.b64encode(hmac.digest(secret.encode(), encoded.encode(), "sha1")).decode()
    return form({"AWSAccessKeyId": access, "policy": encoded, "signature": signature, **fields}, data)


class _Staying(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


async def post(world: World, body: bytes) -> tuple[int, bytes, Any]:
    def run() -> tuple[int, bytes, Any]:
        request = urllib.request.Request(f"{world.endpoint}/bucket", data=body, method="POST")
        request.add_header("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
        try:
            with urllib.request.build_opener(_Staying).open(request) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    return await asyncio.to_thread(run)


async def stored(world: World, key: bytes) -> bytes | None:
    return (await world.stored()).get(key)


async def test_a_signed_form_stores_its_file_with_what_its_fields_say(world: World) -> None:
    document = policy(
        ["starts-with", "$key", "up/"],
        {"x-amz-meta-a": "1"},
        ["starts-with", "$Content-Type", "text/"],
        ["starts-with", "$tagging", ""],
    )
    tagging = "<Tagging><TagSet><Tag><Key>k</Key><Value>v</Value></Tag></TagSet></Tagging>"
    fields = {
        "key": "up/${filename}",
        "x-amz-meta-a": "1",
        "Content-Type": "text/plain",
        "tagging": tagging,
        "x-ignore-me": "yes",
    }
    data = hashlib.shake_128(b"y").digest(700_000)
    status, body, headers = await post(world, signed_form(document, fields, data))
    assert (status, body) == (204, b"")
    found = await stored(world, b"up/name.txt")
    assert found == data
    info = await world.head("up/name.txt")
    assert (dict(info.user), dict(info.headers), dict(info.tags)) == (
        {"a": "1"},
        {"content-type": "text/plain"},
        {"k": "v"},
    )
    assert headers["ETag"] == f'"{hashlib.md5(data).hexdigest()}"'


async def test_boto3_presigned_posts_work_and_201_names_the_object(world: World) -> None:
    client = world.client()
    answer = client.generate_presigned_post(
        "bucket",
        "k",
        Fields={"success_action_status": "201"},
        Conditions=[{"success_action_status": "201"}, ["content-length-range", 1, 10]],
    )
    status, body, _ = await post(world, form(answer["fields"]))
    assert status == 201
    assert b"<Key>k</Key>" in body
    assert await stored(world, b"k") == b"data"
    status, body, _ = await post(world, form({**answer["fields"], "x-amz-signature": "0" * 64}))
    assert (status, b"SignatureDoesNotMatch" in body) == (403, True)


async def test_policies_of_the_bucket_see_a_form_and_its_signature(world: World) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/bucket-policy-s3-sigv4-conditions.html"""
    statement = {"Principal": {"AWS": "*"}, "Resource": "arn:aws:s3:::bucket/*", "Action": "s3:PutObject"}
    allow = {**statement, "Effect": "Allow", "Condition": {"StringEquals": {"s3:authType": "POST"}}}
    deny = {**statement, "Effect": "Deny", "Condition": {"StringEquals": {"s3:signatureversion": "AWS"}}}
    other = world.client(ACCESS_ALT, SECRET_ALT)

    def prepare() -> dict[str, str]:
        owner = world.client()
        owner.delete_public_access_block(Bucket="bucket")
        document = {"Version": "2012-10-17", "Statement": [allow, deny]}
        owner.put_bucket_policy(Bucket="bucket", Policy=json.dumps(document))
        with pytest.raises(ClientError, match="AccessDenied"):
            other.put_object(Bucket="bucket", Key="k", Body=b"no form")
        fields: dict[str, str] = other.generate_presigned_post("bucket", "k")["fields"]
        return fields

    fields = await asyncio.to_thread(prepare)
    older = signed_form(policy({"key": "k"}), {"key": "k"}, who=(ACCESS_ALT, SECRET_ALT))
    assert (await post(world, older))[0] == 403
    assert await stored(world, b"k") is None
    assert (await post(world, form(fields)))[0] == 204
    assert await stored(world, b"k") == b"data"


async def test_sizes_outside_the_policy_store_nothing(world: World) -> None:
    for data, code in ((b"", b"EntityTooSmall"), (b"12345678901", b"EntityTooLarge")):
        status, body, _ = await post(
            world, signed_form(policy({"key": "k"}, ["content-length-range", 1, 10]), {"key": "k"}, data)
        )
        assert (status, b"<Code>" + code in body) == (400, True)
    assert await stored(world, b"k") is None


@pytest.mark.parametrize(
    ("document", "fields", "status", "code"),
    [
        (policy({"key": "other"}), {"key": "k"}, 403, b"AccessDenied"),
        (policy(["starts-with", "$key", "x"]), {"key": "k"}, 403, b"AccessDenied"),
        (policy({"key": "k"}, expiration=PAST), {"key": "k"}, 403, b"AccessDenied"),
        (policy({"key": "k"}), {"key": "k", "x-amz-meta-a": "1"}, 403, b"AccessDenied"),
        ({**policy({"key": "k"}), "conditions": [{"key": "k"}]}, {"key": "k"}, 403, b"AccessDenied"),
        ({**policy({"key": "k"}), "expiration": "tomorrow"}, {"key": "k"}, 400, b"InvalidPolicyDocument"),
        ({"expiration": "2099-01-01T00:00:00Z"}, {"key": "k"}, 400, b"InvalidPolicyDocument"),
        (policy({"key": "k"}, ["content-length-range", 0]), {"key": "k"}, 400, b"InvalidPolicyDocument"),
        (policy({}), {"key": "k"}, 400, b"InvalidPolicyDocument"),
        (policy(["ends-with", "$key", "k"]), {"key": "k"}, 400, b"InvalidPolicyDocument"),
        (policy(), {}, 400, b"InvalidArgument"),
        (
            policy({"key": "k"}, ["starts-with", "$x-amz-meta-a", ""]),
            {"key": "k", "x-amz-meta-a": "a\nSet-Cookie: b"},
            400,
            b"InvalidArgument",
        ),
        (policy({"key": "k"}, {"x-amz-meta-a: b": "1"}), {"key": "k", "x-amz-meta-a: b": "1"}, 400, b"InvalidArgument"),
        (
            policy({"key": "k"}, {"x-amz-storage-class": "GLACIER"}),
            {"key": "k", "x-amz-storage-class": "GLACIER"},
            400,
            b"InvalidStorageClass",
        ),
        (
            policy({"key": "k"}, {"x-amz-meta-\u00e9": "1"}),
            {"key": "k", "x-amz-meta-\u00e9": "1"},
            400,
            b"InvalidArgument",
        ),
    ],
)
async def test_forms_that_the_policy_does_not_allow_are_refused(
    world: World, document: dict[str, Any], fields: dict[str, str], status: int, code: bytes
) -> None:
    answer, body, _ = await post(world, signed_form(document, fields))
    assert (answer, b"<Code>" + code + b"</Code>" in body) == (status, True)
    assert await stored(world, b"k") is None


async def test_a_form_is_sent_on_to_a_web_address_and_nowhere_else(world: World) -> None:
    for url, status, location in (
        ("https://h/p?a=1", 303, "https://h/p?a=1&bucket=bucket&key=k"),
        ("javascript:x", 204, "/bucket/k"),
        ("http://[", 204, "/bucket/k"),
        ("http://h\r\nX: y", 204, "/bucket/k"),
    ):
        fields = {"key": "k", "success_action_redirect": url}
        answer = await post(world, signed_form(policy({"key": "k"}, {"success_action_redirect": url}), fields))
        assert answer[0] == status
        assert location in answer[2]["Location"]


async def test_forms_without_a_signature_a_file_or_an_end_are_refused(world: World) -> None:
    assert (await post(world, form({"key": "k"})))[0] == 403
    assert (await post(world, form({"key": "k", "policy": encode(policy()), "AWSAccessKeyId": ACCESS})))[0] == 400
    whole = signed_form(policy({"key": "k"}), {"key": "k"})
    for broken in (
        whole[: -len(BOUNDARY) - 8],
        whole[:100],
        b"",
        whole.split(b'name="file"')[0] + b'name="other"\r\n\r\nx\r\n--x-boundary--\r\n',
    ):
        status, body, _ = await post(world, broken)
        assert (status, b"MalformedPOSTRequest" in body) == (400, True)
    assert await stored(world, b"k") is None


def test_a_policy_expires_at_its_very_second() -> None:
    document = {"expiration": "2023-11-14T22:13:20Z", "conditions": [{"bucket": "b"}, {"key": "k"}]}
    found = parse_policy(encode(document))
    check_policy(found, {"key": "k"}, "b", NOW_MS - 1)
    with pytest.raises(errors.AccessDenied, match="expired"):
        check_policy(found, {"key": "k"}, "b", NOW_MS)


@pytest.mark.parametrize("step", [1, 2, 13, 1 << 20])
async def test_a_form_reads_the_same_in_pieces_of_any_size(step: int) -> None:
    data = b"\r\n--x-boundar not yet \r\n--" * 50
    whole = form({"Key": "k", "Empty": ""}, data)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), step):
            yield whole[start : start + step]

    reader = FormReader(pieces(), boundary_of(f'multipart/form-data; boundary="{BOUNDARY}"'))
    await reader.read_fields()
    assert (reader.fields, reader.filename) == ({"key": "k", "empty": ""}, "name.txt")
    assert b"".join([bytes(piece) async for piece in reader.file()]) == data


async def test_fields_before_the_file_are_bounded() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="a"\r\n\r\n'.encode()
        for _ in range(100):
            yield b"x" * 1000

    with pytest.raises(errors.MaxMessageLengthExceeded):
        await FormReader(pieces(), BOUNDARY).read_fields()
