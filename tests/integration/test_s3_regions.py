"""Regions are labels: any is accepted that a signature is right for, unless the configuration says otherwise."""

from __future__ import annotations

import asyncio
import hmac
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import botocore.auth  # type: ignore[import-untyped]
import pytest
import pytest_asyncio
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

from storaged.errors import InvalidLocationConstraint
from storaged.s3.auth import sigv4
from storaged.s3.auth.regions import location_constraint, region_name, region_of_new_bucket
from tests.integration.s3_front import ACCESS, REGION, SECRET, World, ask, s3_world
from tests.integration.test_s3_front import refused
from tests.integration.test_s3_post import encode, form, policy, post

ELSEWHERE = ("us-east-1", "eu-central-1", "garage", "US", "")


@pytest_asyncio.fixture
async def lax() -> AsyncIterator[World]:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


@pytest_asyncio.fixture
async def strict() -> AsyncIterator[World]:
    async with s3_world(strict_region=True) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


def header_signed(world: World, region: str, secret: str = SECRET, said: str = "") -> bytes:
    """A PUT of ``/bucket/key``. ``said``: the region that the header names, when it is not the one
    that was signed for.
    """
    request = AWSRequest("PUT", f"{world.endpoint}/bucket/key", data=b"data")
    botocore.auth.S3SigV4Auth(Credentials(ACCESS, secret), "s3", region).add_auth(request)
    head = [f"{name}: {value}" for name, value in request.headers.items()]
    text = "\r\n".join(
        [
            "PUT /bucket/key HTTP/1.1",
            f"Host: 127.0.0.1:{world.port}",
            *head,
            "Content-Length: 4",
            "Connection: close",
            "",
            "data",
        ]
    )
    return (text.replace(f"/{region}/s3/", f"/{said}/s3/") if said else text).encode()


@pytest.mark.parametrize("region", ELSEWHERE)
async def test_a_signature_of_any_region_is_accepted_where_it_is_right_for_that_region(lax: World, region: str) -> None:
    assert (await ask(lax, header_signed(lax, region))).startswith(b"HTTP/1.1 200")
    assert b"SignatureDoesNotMatch" in await ask(lax, header_signed(lax, region, secret="another"))
    assert b"SignatureDoesNotMatch" in await ask(lax, header_signed(lax, region or "x", said="other-region-1"))


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
async def test_presigned_urls_and_streams_of_any_region_are_accepted(lax: World, region: str) -> None:
    client = lax.client(
        region=region, signature_version="s3v4", s3={"addressing_style": "path", "payload_signing_enabled": True}
    )

    def run() -> None:
        client.put_object(Bucket="bucket", Key="p", Body=b"data")
        url = client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "p"})
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"data"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url.replace(region, "ap-south-1"))
        assert caught.value.code == 403

    await asyncio.to_thread(run)


def form_of(region: str) -> bytes:
    scope = f"{ACCESS}/20991231/{region}/s3/aws4_request"
    fields = {"x-amz-algorithm": "AWS4-HMAC-SHA256", "x-amz-credential": scope, "x-amz-date": "20991231T000000Z"}
    encoded = encode(policy({"key": "k"}, *({name: value} for name, value in fields.items())))
    key = sigv4.signing_key(SECRET, "20991231", region)
    return form(
        {"key": "k", **fields, "policy": encoded, "x-amz-signature": hmac.digest(key, encoded.encode(), "sha256").hex()}
    )


async def test_forms_of_any_region_are_accepted(lax: World) -> None:
    assert (await post(lax, form_of("us-east-1")))[0] == 204


async def test_a_strict_gateway_names_the_region_that_it_wants(strict: World) -> None:
    def run(client: Any) -> None:
        assert refused(client.list_objects_v2, Bucket="bucket") == (400, "AuthorizationHeaderMalformed")
        assert refused(client.create_bucket, Bucket="other") == (400, "AuthorizationHeaderMalformed")

    answer = await ask(strict, header_signed(strict, "us-east-1"))
    assert b"<Code>AuthorizationHeaderMalformed</Code>" in answer
    assert f"<Region>{REGION}</Region>".encode() in answer
    assert f"x-amz-bucket-region: {REGION}".encode() in answer
    assert (await ask(strict, header_signed(strict, REGION))).startswith(b"HTTP/1.1 200")
    status, body, _ = await post(strict, form_of("us-east-1"))
    assert (status, b"InvalidArgument" in body) == (400, True)
    assert (await post(strict, form_of(REGION)))[0] == 204
    own = strict.client()
    answer = await asyncio.to_thread(
        refused, own.create_bucket, Bucket="other", CreateBucketConfiguration={"LocationConstraint": "us-west-2"}
    )
    assert answer == (400, "InvalidLocationConstraint")


@pytest.mark.parametrize(
    ("asked", "located", "headed"),
    [
        (None, REGION, REGION),
        (REGION, REGION, REGION),
        ("us-west-2", "us-west-2", "us-west-2"),
        ("EU", "EU", "eu-west-1"),
        ("us-east-1", None, "us-east-1"),
        ("par1", "par1", "par1"),
    ],
)
async def test_a_bucket_has_the_region_that_it_was_created_in(
    lax: World, asked: str | None, located: str | None, headed: str
) -> None:
    client = lax.client(region="us-east-1")
    more = {"CreateBucketConfiguration": {"LocationConstraint": asked}} if asked else {}

    def run() -> None:
        client.create_bucket(Bucket="other", **more)
        assert client.get_bucket_location(Bucket="other")["LocationConstraint"] == located
        assert client.head_bucket(Bucket="other")["BucketRegion"] == headed
        (listed,) = [
            bucket for bucket in client.list_buckets(BucketRegion=headed)["Buckets"] if bucket["Name"] == "other"
        ]
        assert listed["BucketRegion"] == headed
        client.put_object(Bucket="other", Key="k", Body=b"x")

    await asyncio.to_thread(run)


@pytest.mark.parametrize("constraint", ["Us-West-2", "a" * 64, "eu west", "é", "eu/1", "<x>"])
async def test_a_location_that_can_be_no_region_is_refused(lax: World, constraint: str) -> None:
    client = lax.client()
    answer = await asyncio.to_thread(
        refused, client.create_bucket, Bucket="other", CreateBucketConfiguration={"LocationConstraint": constraint}
    )
    assert answer == (400, "InvalidLocationConstraint")


def test_the_rules_of_regions() -> None:
    assert region_of_new_bucket("", "eu-fr-1", strict=True) == "eu-fr-1"
    assert region_of_new_bucket("eu-fr-1", "eu-fr-1", strict=True) == "eu-fr-1"
    with pytest.raises(InvalidLocationConstraint):
        region_of_new_bucket("EU", "eu-fr-1", strict=True)
    assert (location_constraint("us-east-1"), region_name("us-east-1")) == ("", "us-east-1")


async def test_lists_name_owners_where_they_are_asked_for(lax: World) -> None:
    """As minio's client asks: fetch-owner, and a parameter of its own that AWS does not know, which is ignored."""
    client = lax.client()

    def run() -> None:
        client.put_object(Bucket="bucket", Key="k", Body=b"x")
        owner = client.list_buckets()["Owner"]["ID"]
        (plain,) = client.list_objects_v2(Bucket="bucket")["Contents"]
        assert "Owner" not in plain
        (owned,) = client.list_objects_v2(Bucket="bucket", FetchOwner=True)["Contents"]
        assert owned["Owner"]["ID"] == owner
        assert (owned["ChecksumAlgorithm"], owned["ChecksumType"]) == (["CRC32"], "FULL_OBJECT")

        def also(params: dict[str, Any], **_: Any) -> None:
            params["url"] += "&metadata=true"

        client.meta.events.register("before-call.s3.ListObjectsV2", also)
        (same,) = client.list_objects_v2(Bucket="bucket", FetchOwner=True)["Contents"]
        assert {**same, "ETag": ""} == {**owned, "ETag": ""}

    await asyncio.to_thread(run)
