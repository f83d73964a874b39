"""The S3 front as boto3 sees it, over loopback, on an object plane in memory."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from storaged.objects.api import CHECKSUM_ALGORITHMS
from storaged.s3.headers import parse_range
from tests.integration.s3_front import ACCESS_ALT, REGION, SECRET_ALT, World, s3_world, until
from tests.unit.test_checksums import OTHER, text

PART = 5 * 1024 * 1024


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world(domains=("s3.localhost",)) as world:
        client = world.client()
        await asyncio.to_thread(
            client.create_bucket, Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        yield world


def refused(call: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"], caught.value.response["Error"]["Code"]


async def test_objects_come_back_with_all_that_was_said_of_them(world: World) -> None:
    client = world.client()
    keys = [
        "plain",
        "a/b c+%?&é\u2603",
        "//a/../b",
        "x" * 1024,
        "line\nfeed",
        "\x01control",
        "a%2Fb",
        "~tilde*(paren)'quote\"",
    ]

    def run() -> None:
        for key in keys:
            client.put_object(
                Bucket="bucket", Key=key, Body=key.encode(), Metadata={"mtime": "1.5", "note": "a b"}, CacheControl="no-cache",  # noqa: E501
                ContentType="text/x", ContentEncoding="gzip", ContentLanguage="fr", ContentDisposition="inline", Tagging="k=v&l=",  # noqa: E501
                StorageClass="STANDARD_IA",
            )  # fmt: skip
            got = client.get_object(Bucket="bucket", Key=key)
            assert got["Body"].read() == key.encode()
            assert got["Metadata"] == {"mtime": "1.5", "note": "a b"}
            assert (got["CacheControl"], got["ContentType"], got["ContentEncoding"]) == ("no-cache", "text/x", "gzip")
            assert (got["ContentLanguage"], got["ContentDisposition"], got["TagCount"], got["StorageClass"]) == (
                "fr",
                "inline",
                2,
                "STANDARD_IA",
            )
            assert got["ETag"] == f'"{hashlib.md5(key.encode()).hexdigest()}"'
            assert got["ServerSideEncryption"] == "AES256"
            assert client.head_object(Bucket="bucket", Key=key)["ContentLength"] == len(key.encode())
        listed = [item["Key"] for item in client.list_objects_v2(Bucket="bucket")["Contents"]]
        assert listed == sorted(keys, key=str.encode)
        assert listed == [item["Key"] for item in client.list_objects(Bucket="bucket")["Contents"]]
        assert listed == [item["Key"] for item in client.list_object_versions(Bucket="bucket")["Versions"]]
        many = [key for key in keys if key.isprintable() or key == "line\nfeed"]  # XML 1.0 cannot name the others
        answer = client.delete_objects(
            Bucket="bucket", Delete={"Objects": [{"Key": key, "VersionId": "null"} for key in many]}
        )
        assert {item["Key"] for item in answer["Deleted"]} == set(many)
        client.delete_object(Bucket="bucket", Key="\x01control", VersionId="null")
        assert client.list_objects_v2(Bucket="bucket")["KeyCount"] == 0

    await asyncio.to_thread(run)


@pytest.mark.parametrize("algorithm", CHECKSUM_ALGORITHMS)
async def test_each_checksum_is_verified_kept_and_given_back(world: World, algorithm: str) -> None:
    client = world.client()
    name = f"Checksum{algorithm}"

    def run() -> None:
        given = {name: text(OTHER[algorithm](b"hello"))} if algorithm == "MD5" else {"ChecksumAlgorithm": algorithm}
        put = client.put_object(Bucket="bucket", Key="k", Body=b"hello", **given)
        assert put[name] == text(OTHER[algorithm](b"hello"))
        head = client.head_object(Bucket="bucket", Key="k", ChecksumMode="ENABLED")
        assert put[name] == head[name]
        assert name not in client.head_object(Bucket="bucket", Key="k")
        assert name not in client.get_object(Bucket="bucket", Key="k", Range="bytes=0-1", ChecksumMode="ENABLED")
        wrong = base64.b64encode(bytes(len(base64.b64decode(put[name])))).decode()
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"other", **{name: wrong}) == (
            400,
            "BadDigest",
        )
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"other", **{name: "bad"}) == (
            400,
            "BadDigest",
        )
        attributes = client.get_object_attributes(
            Bucket="bucket", Key="k", ObjectAttributes=["Checksum", "ETag", "ObjectSize", "StorageClass"]
        )
        assert attributes["Checksum"][name] == put[name]
        assert (attributes["ObjectSize"], attributes["ETag"]) == (5, hashlib.md5(b"hello").hexdigest())

    await asyncio.to_thread(run)


async def test_large_bodies_stream_both_ways_and_are_hashed_off_the_loop(world: World) -> None:
    client = world.client(s3={"addressing_style": "path", "payload_signing_enabled": True})
    body = hashlib.shake_128(b"x").digest(9_000_001)

    def run() -> None:
        client.put_object(Bucket="bucket", Key="big", Body=io.BytesIO(body))
        assert client.get_object(Bucket="bucket", Key="big")["Body"].read() == body
        for spec, first, last in (
            ("bytes=5-9", 5, 9),
            ("bytes=-7", len(body) - 7, len(body) - 1),
            ("bytes=9000000-", 9_000_000, 9_000_000),
        ):
            got = client.get_object(Bucket="bucket", Key="big", Range=spec)
            assert got["Body"].read() == body[first : last + 1]
            assert got["ContentRange"] == f"bytes {first}-{last}/{len(body)}"
        assert client.get_object(Bucket="bucket", Key="big", Range="bytes=0-1,5-6")["ContentLength"] == len(body)
        assert client.head_object(Bucket="bucket", Key="big", Range="bytes=5-9")["ContentLength"] == 5
        assert parse_range("bytes=\u0665-\u0669") is None  # digits, but not HTTP's
        assert refused(client.get_object, Bucket="bucket", Key="big", Range="bytes=9000001-") == (416, "InvalidRange")

    await asyncio.to_thread(run)
    assert all(stream.closed for stream in world.objects.streams)


async def test_reads_and_writes_are_conditional(world: World) -> None:
    client = world.client()

    def run() -> None:
        etag = client.put_object(Bucket="bucket", Key="k", Body=b"1", IfNoneMatch="*")["ETag"]
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"2", IfNoneMatch="*") == (
            412,
            "PreconditionFailed",
        )
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"2", IfMatch='"abc"') == (
            412,
            "PreconditionFailed",
        )
        assert refused(client.put_object, Bucket="bucket", Key="new", Body=b"2", IfMatch='"abc"') == (404, "NoSuchKey")
        assert client.get_object(Bucket="bucket", Key="k", IfMatch=etag)["Body"].read() == b"1"
        assert refused(client.get_object, Bucket="bucket", Key="k", IfNoneMatch=etag)[0] == 304
        assert refused(client.head_object, Bucket="bucket", Key="k", IfNoneMatch=etag)[0] == 304
        assert refused(client.get_object, Bucket="bucket", Key="k", IfMatch='"abc"') == (412, "PreconditionFailed")
        assert refused(client.get_object, Bucket="bucket", Key="k", IfUnmodifiedSince="2001-01-01") == (
            412,
            "PreconditionFailed",
        )
        client.put_object(Bucket="bucket", Key="k", Body=b"3", IfMatch=etag)
        assert refused(client.delete_object, Bucket="bucket", Key="k", IfMatch=etag) == (412, "PreconditionFailed")
        client.delete_object(Bucket="bucket", Key="k")
        client.delete_object(Bucket="bucket", Key="k")

    await asyncio.to_thread(run)


async def test_if_range_takes_the_range_only_of_the_same_object(world: World) -> None:
    client, data = world.client(), b"0123456789" * 10_000  # large enough to be streamed

    def run() -> None:
        etag = client.put_object(Bucket="bucket", Key="k", Body=data)["ETag"]
        seen = []

        def with_if_range(value: str) -> bytes:
            def add(request: Any, **_: Any) -> None:
                request.headers["If-Range"] = value

            client.meta.events.register_first("before-sign.s3.GetObject", add)
            body: bytes = client.get_object(Bucket="bucket", Key="k", Range="bytes=2-3")["Body"].read()
            client.meta.events.unregister("before-sign.s3.GetObject", add)
            seen.append(value)
            return body

        assert with_if_range(etag) == b"23"
        assert with_if_range('"other"') == data
        assert with_if_range("Mon, 01 Jan 2001 00:00:00 GMT") == data

    await asyncio.to_thread(run)
    await until(lambda: all(stream.closed for stream in world.objects.streams))


async def test_multipart_uploads_complete_once_and_answer_twice(world: World) -> None:
    client = world.client()
    parts = [b"a" * PART, b"b" * PART, b"c"]

    def run() -> None:
        upload = client.create_multipart_upload(
            Bucket="bucket", Key="m", ChecksumAlgorithm="SHA256", Metadata={"x": "y"}
        )
        ids = {"Bucket": "bucket", "Key": "m", "UploadId": upload["UploadId"]}
        done = []
        for number, body in enumerate(parts, 1):
            answer = client.upload_part(**ids, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256")
            done.append({"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": answer["ChecksumSHA256"]})
        assert [part["Size"] for part in client.list_parts(**ids, MaxParts=2)["Parts"]] == [PART, PART]
        assert client.list_parts(**ids, PartNumberMarker=2)["Parts"][0]["ETag"] == done[2]["ETag"]
        assert client.list_multipart_uploads(Bucket="bucket")["Uploads"][0]["UploadId"] == upload["UploadId"]
        assert refused(client.complete_multipart_upload, **ids, MultipartUpload={"Parts": done[::-1]}) == (
            400,
            "InvalidPartOrder",
        )
        assert refused(client.complete_multipart_upload, **ids, MultipartUpload={"Parts": []}) == (400, "MalformedXML")
        assert refused(
            client.complete_multipart_upload, **ids, MultipartUpload={"Parts": [{"PartNumber": 7, "ETag": "x"}]}
        ) == (
            400,
            "InvalidPart",
        )
        bare = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in done]
        assert refused(client.complete_multipart_upload, **ids, MultipartUpload={"Parts": bare}) == (
            400,
            "InvalidRequest",
        )
        first = client.complete_multipart_upload(**ids, MultipartUpload={"Parts": done})
        again = client.complete_multipart_upload(**ids, MultipartUpload={"Parts": done})
        digests = b"".join(hashlib.md5(body).digest() for body in parts)
        assert first["ETag"] == again["ETag"] == f'"{hashlib.md5(digests).hexdigest()}-3"'
        assert first["ChecksumType"] == "COMPOSITE"
        assert first["ChecksumSHA256"].endswith("-3")
        got = client.get_object(Bucket="bucket", Key="m", PartNumber=2)
        assert (got["PartsCount"], got["ContentLength"], got["ContentRange"]) == (
            3,
            PART,
            f"bytes {PART}-{2 * PART - 1}/{2 * PART + 1}",
        )
        assert got["ChecksumSHA256"] == done[1]["ChecksumSHA256"]
        assert client.head_object(Bucket="bucket", Key="m", PartNumber=3)["ContentLength"] == 1
        assert refused(client.get_object, Bucket="bucket", Key="m", PartNumber=4)[0] == 416
        head = client.head_object(Bucket="bucket", Key="m", ChecksumMode="ENABLED")
        assert head["ChecksumSHA256"] == first["ChecksumSHA256"]
        found = client.get_object_attributes(
            Bucket="bucket", Key="m", ObjectAttributes=["Checksum", "ObjectParts"], MaxParts=1, PartNumberMarker=1
        )
        bare_checksum = first["ChecksumSHA256"].removesuffix("-3")
        assert found["Checksum"] == {"ChecksumSHA256": bare_checksum, "ChecksumType": "COMPOSITE"}
        page = found["ObjectParts"]
        assert (page["TotalPartsCount"], page["NextPartNumberMarker"], page["IsTruncated"]) == (3, 2, True)
        other = client.create_multipart_upload(Bucket="bucket", Key="m2")["UploadId"]
        client.upload_part_copy(
            Bucket="bucket",
            Key="m2",
            UploadId=other,
            PartNumber=1,
            CopySource={"Bucket": "bucket", "Key": "m"},
            CopySourceRange="bytes=1-4",
        )
        for bad in ("bytes=4-1", "0-1", "bytes=1-"):
            answer = refused(
                client.upload_part_copy, Bucket="bucket", Key="m2", UploadId=other, PartNumber=1,
                CopySource={"Bucket": "bucket", "Key": "m"}, CopySourceRange=bad,
            )  # fmt: skip
            assert answer == (400, "InvalidArgument")
        assert client.list_parts(Bucket="bucket", Key="m2", UploadId=other)["Parts"][0]["Size"] == 4
        client.abort_multipart_upload(Bucket="bucket", Key="m2", UploadId=other)
        assert refused(client.list_parts, Bucket="bucket", Key="m2", UploadId=other) == (404, "NoSuchUpload")
        assert refused(client.upload_part, Bucket="bucket", Key="m2", UploadId=other, PartNumber=10_001, Body=b"") == (
            400,
            "InvalidArgument",
        )

    await asyncio.to_thread(run)


async def test_copies_keep_or_replace_what_the_directives_say(world: World) -> None:
    client = world.client()
    source = {"Bucket": "bucket", "Key": "söurce +%"}

    def run() -> None:
        client.put_object(**source, Body=b"data", Metadata={"a": "1"}, ContentType="text/a", Tagging="t=1")
        client.copy_object(Bucket="bucket", Key="kept", CopySource=source)
        kept = client.head_object(Bucket="bucket", Key="kept")
        assert (kept["Metadata"], kept["ContentType"], kept["TagCount"]) == ({"a": "1"}, "text/a", 1)
        client.copy_object(
            Bucket="bucket",
            Key="new",
            CopySource=source,
            MetadataDirective="REPLACE",
            Metadata={"b": "2"},
            TaggingDirective="REPLACE",
            Tagging="u=2&v=3",
        )
        replaced = client.head_object(Bucket="bucket", Key="new")
        assert (replaced["Metadata"], replaced["ContentType"], replaced["TagCount"]) == (
            {"b": "2"},
            "binary/octet-stream",
            2,
        )
        assert refused(client.copy_object, **source, CopySource=source) == (400, "InvalidRequest")
        client.copy_object(**source, CopySource=source, StorageClass="STANDARD_IA")
        moved = client.head_object(**source)
        assert (moved["StorageClass"], moved["Metadata"]) == ("STANDARD_IA", {"a": "1"})
        client.copy_object(Bucket="bucket", Key="standard", CopySource=source)
        assert "StorageClass" not in client.head_object(Bucket="bucket", Key="standard")
        assert refused(client.copy_object, Bucket="bucket", Key="x", CopySource="bucket/none") == (404, "NoSuchKey")
        assert refused(client.copy_object, Bucket="bucket", Key="x", CopySource="nowhere/none") == (404, "NoSuchBucket")
        assert refused(client.copy_object, Bucket="bucket", Key="x", CopySource=source, CopySourceIfMatch='"no"') == (
            412,
            "PreconditionFailed",
        )
        alt = world.client(ACCESS_ALT, SECRET_ALT)
        alt.create_bucket(Bucket="others")
        assert refused(alt.copy_object, Bucket="others", Key="x", CopySource=source) == (403, "AccessDenied")

    await asyncio.to_thread(run)


async def test_pages_of_listings_fit_together(world: World) -> None:
    client = world.client()
    keys = [f"{folder}/{number}" for folder in ("a", "b+ü", "c") for number in range(5)] + ["top", "z"]

    def run() -> None:
        for key in keys:
            client.put_object(Bucket="bucket", Key=key, Body=b"")
        for size in (1, 2, 3, 1000):
            for name in ("list_objects", "list_objects_v2"):
                pages = client.get_paginator(name).paginate(Bucket="bucket", PaginationConfig={"PageSize": size})
                assert [item["Key"] for page in pages for item in page.get("Contents", [])] == sorted(keys)
                pages = list(
                    client.get_paginator(name).paginate(
                        Bucket="bucket", Delimiter="/", PaginationConfig={"PageSize": size}
                    )
                )
                assert [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])] == [
                    "a/",
                    "b+ü/",
                    "c/",
                ]
                assert [item["Key"] for page in pages for item in page.get("Contents", [])] == ["top", "z"]
            versions = client.get_paginator("list_object_versions").paginate(
                Bucket="bucket", PaginationConfig={"PageSize": size}
            )
            assert [item["Key"] for page in versions for item in page.get("Versions", [])] == sorted(keys)
        after = client.list_objects_v2(Bucket="bucket", StartAfter="c/4", FetchOwner=True)
        assert [item["Key"] for item in after["Contents"]] == ["top", "z"]
        assert after["Contents"][0]["Owner"]["DisplayName"] == "main"
        none = client.list_objects_v2(Bucket="bucket", MaxKeys=0)
        assert (none["IsTruncated"], none["KeyCount"], none["MaxKeys"]) == (False, 0, 0)
        assert client.list_objects_v2(Bucket="bucket", MaxKeys=5000)["MaxKeys"] == 1000
        assert refused(client.list_objects_v2, Bucket="bucket", ContinuationToken="?") == (400, "InvalidArgument")
        assert refused(client.list_objects_v2, Bucket="bucket", MaxKeys=-1) == (400, "InvalidArgument")

    await asyncio.to_thread(run)


async def test_users_see_and_touch_only_what_is_theirs(world: World) -> None:
    main, alt = world.client(), world.client(ACCESS_ALT, SECRET_ALT)
    anonymous = world.client(signature_version=UNSIGNED)

    def run() -> None:
        main.put_object(Bucket="bucket", Key="k", Body=b"")
        assert [bucket["Name"] for bucket in main.list_buckets()["Buckets"]] == ["bucket"]
        assert alt.list_buckets()["Buckets"] == []
        for other in (alt, anonymous):
            assert refused(other.get_object, Bucket="bucket", Key="k") == (403, "AccessDenied")
            assert refused(other.put_object, Bucket="bucket", Key="k", Body=b"x") == (403, "AccessDenied")
            assert refused(other.list_objects_v2, Bucket="bucket") == (403, "AccessDenied")
            assert refused(other.delete_bucket, Bucket="bucket") == (403, "AccessDenied")
            assert refused(other.get_object, Bucket="nowhere", Key="k") == (404, "NoSuchBucket")
        assert refused(anonymous.list_buckets) == (403, "AccessDenied")
        assert refused(alt.create_bucket, Bucket="bucket") == (409, "BucketAlreadyExists")
        assert refused(main.list_objects_v2, Bucket="bucket", ExpectedBucketOwner="somebody") == (403, "AccessDenied")
        assert refused(world.client("AKNONE", "x").list_buckets) == (403, "InvalidAccessKeyId")
        assert refused(world.client("AKMAIN", "wrong").list_buckets) == (403, "SignatureDoesNotMatch")

    await asyncio.to_thread(run)


async def test_presigned_urls_work_until_they_are_touched(world: World) -> None:
    client = world.client(signature_version="s3v4")

    def run() -> None:
        client.put_object(Bucket="bucket", Key="p q", Body=b"data")
        url = client.generate_presigned_url(
            "get_object", {"Bucket": "bucket", "Key": "p q", "ResponseContentType": "text/other"}
        )
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"data"
            assert answer.headers["Content-Type"] == "text/other"
        for altered in (
            url.replace("text%2Fother", "text%2Fhtml"),
            url.replace("Expires=3600", "Expires=7200"),
            url + "&versionId=null",
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(altered)
            assert caught.value.code == 403
        upload = client.generate_presigned_url("put_object", {"Bucket": "bucket", "Key": "up"})
        urllib.request.urlopen(urllib.request.Request(upload, data=b"sent", method="PUT", headers={"Content-Type": ""}))
        assert client.get_object(Bucket="bucket", Key="up")["Body"].read() == b"sent"

    await asyncio.to_thread(run)
    assert all("X-Amz-Signature=-" in done.target for done in world.done if "X-Amz-Signature" in done.target)
    assert any("X-Amz-Signature" in done.target for done in world.done)


async def test_virtual_host_style_names_the_bucket_in_the_host(world: World) -> None:
    client = world.client()
    await asyncio.to_thread(client.put_object, Bucket="bucket", Key="bucket/k", Body=b"v")
    answer = await world.raw(
        f"GET /bucket/k HTTP/1.1\r\nHost: bucket.S3.localhost:{world.port}\r\nConnection: close\r\n\r\n".encode()
    )
    assert b"403 Forbidden" in answer
    assert b"<Code>AccessDenied</Code>" in answer
    assert world.done[-1].bucket == "bucket"
    answer = await world.raw(b"GET /k HTTP/1.1\r\nHost: nowhere.s3.localhost\r\nConnection: close\r\n\r\n")
    assert b"<Code>NoSuchBucket</Code>" in answer


async def test_bucket_names_locations_and_configurations_are_answered_as_aws_does(world: World) -> None:
    client = world.client()

    def run() -> None:
        client.create_bucket(Bucket="bucket")
        names = [
            "ab",
            "a" * 64,
            "under_score",
            "dots..dots",
            "dot.-dash",
            "192.168.1.1",
            "-dash",
            "dash-",
            "xn--a",
            "x-s3alias",
        ]
        client.meta.events.unregister("before-parameter-build.s3")
        for name in names:
            assert refused(client.create_bucket, Bucket=name) == (400, "InvalidBucketName")
        client.create_bucket(Bucket="bucket")

        def narrowed(params: dict[str, Any], **_: Any) -> None:
            params["headers"]["x-storaged-countries"] = "FR, DE"

        client.meta.events.register("before-call.s3.CreateBucket", narrowed)
        assert refused(client.create_bucket, Bucket="bucket") == (
            409,
            "BucketAlreadyOwnedByYou",
        ), "it would not lie there alone"
        client.create_bucket(Bucket="narrow")
        client.create_bucket(Bucket="narrow")
        client.meta.events.unregister("before-call.s3.CreateBucket", narrowed)
        client.create_bucket(Bucket="narrow")
        assert client.get_bucket_location(Bucket="bucket")["LocationConstraint"] == REGION
        assert client.head_bucket(Bucket="bucket")["BucketRegion"] == REGION
        assert "Status" not in client.get_bucket_versioning(Bucket="bucket")
        assert refused(client.get_bucket_cors, Bucket="bucket") == (404, "NoSuchCORSConfiguration")
        assert refused(client.get_bucket_policy, Bucket="bucket") == (404, "NoSuchBucketPolicy")
        assert refused(client.get_bucket_lifecycle_configuration, Bucket="bucket") == (
            404,
            "NoSuchLifecycleConfiguration",
        )
        [rule] = client.get_bucket_encryption(Bucket="bucket")["ServerSideEncryptionConfiguration"]["Rules"]
        assert rule["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}
        assert refused(client.put_bucket_policy, Bucket="bucket", Policy="{}") == (400, "MalformedPolicy")
        assert refused(client.put_bucket_acl, Bucket="bucket", ACL="public-read") == (
            400,
            "AccessControlListNotSupported",
        )
        client.put_bucket_acl(Bucket="bucket", ACL="bucket-owner-full-control")
        assert client.get_bucket_acl(Bucket="bucket")["Grants"][0]["Permission"] == "FULL_CONTROL"
        assert refused(client.get_bucket_tagging, Bucket="bucket") == (404, "NoSuchTagSet")
        client.put_bucket_tagging(Bucket="bucket", Tagging={"TagSet": [{"Key": "a", "Value": "b"}]})
        assert client.get_bucket_tagging(Bucket="bucket")["TagSet"] == [{"Key": "a", "Value": "b"}]
        client.put_object(Bucket="bucket", Key="k", Body=b"")
        assert refused(client.delete_bucket, Bucket="bucket") == (409, "BucketNotEmpty")
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"", ServerSideEncryption="aws:kms:dsse") == (
            501,
            "NotImplemented",
        )
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"", StorageClass="NOPE") == (
            400,
            "InvalidStorageClass",
        )
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"", Metadata={"a": "x" * 2048}) == (
            400,
            "MetadataTooLarge",
        )
        assert refused(client.put_object, Bucket="bucket", Key="k" * 1025, Body=b"") == (400, "KeyTooLongError")
        assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"", ContentMD5="short") == (
            400,
            "InvalidDigest",
        )
        assert refused(client.get_object, Bucket="bucket", Key="k", VersionId="other") == (400, "InvalidArgument")
        assert refused(client.get_object, Bucket="bucket", Key="k", VersionId="A" * 32) == (404, "NoSuchVersion")
        tags = [{"Key": str(number), "Value": ""} for number in range(11)]
        assert refused(client.put_object_tagging, Bucket="bucket", Key="k", Tagging={"TagSet": tags}) == (
            400,
            "InvalidTag",
        )
        client.put_object_tagging(Bucket="bucket", Key="k", Tagging={"TagSet": tags[:10]})
        assert len(client.get_object_tagging(Bucket="bucket", Key="k")["TagSet"]) == 10
        client.delete_object_tagging(Bucket="bucket", Key="k")
        assert client.get_object_tagging(Bucket="bucket", Key="k")["TagSet"] == []
        many = {"Objects": [{"Key": str(number)} for number in range(1001)]}
        assert refused(client.delete_objects, Bucket="bucket", Delete=many) == (400, "MalformedXML")
        answer = client.delete_objects(
            Bucket="bucket", Delete={"Objects": [{"Key": "k"}, {"Key": "x" * 1025}], "Quiet": True}
        )
        assert "Deleted" not in answer
        assert answer["Errors"][0]["Code"] == "KeyTooLongError"
        client.delete_bucket(Bucket="bucket")

    await asyncio.to_thread(run)


async def test_lists_of_buckets_come_in_pages(world: World) -> None:
    client = world.client()

    def run() -> None:
        for name in ("aaa", "bbb"):
            client.create_bucket(Bucket=name)
        first = client.list_buckets(MaxBuckets=2)
        assert [bucket["Name"] for bucket in first["Buckets"]] == ["aaa", "bbb"]
        rest = client.list_buckets(MaxBuckets=2, ContinuationToken=first["ContinuationToken"])
        assert [bucket["Name"] for bucket in rest["Buckets"]] == ["bucket"]
        assert "ContinuationToken" not in rest
        assert [bucket["Name"] for bucket in client.list_buckets(Prefix="b")["Buckets"]] == ["bbb", "bucket"]

    await asyncio.to_thread(run)


async def test_the_source_of_a_copy_may_be_encoded_as_a_query_is(world: World) -> None:
    """As Terraform's ``aws_s3_object_copy`` does, by Go's ``url.QueryEscape``."""
    client = world.client()

    def escaped(params: Any, **_: object) -> None:
        params["headers"]["x-amz-copy-source"] = "bucket%2Fs%C3%B6urce+%2B%25"

    def run() -> None:
        client.put_object(Bucket="bucket", Key="söurce +%", Body=b"data")
        client.meta.events.register("before-call.s3.CopyObject", escaped)
        client.copy_object(Bucket="bucket", Key="copied", CopySource="bucket/it")
        assert client.get_object(Bucket="bucket", Key="copied")["Body"].read() == b"data"

    await asyncio.to_thread(run)


async def test_a_legal_hold_is_shown_once_somebody_spoke_of_it(world: World) -> None:
    """HeadObject's documentation: the header «is not returned if the specified version of this object has never had a
    legal hold applied». Terraform tries to remove one that it did not ask for, and fails."""
    client = world.client()

    def shown(key: str) -> tuple[str | None, str | None]:
        for read in (client.head_object, client.get_object):
            found = read(Bucket="locked", Key=key)
        return found.get("ObjectLockMode"), found.get("ObjectLockLegalHoldStatus")

    def run() -> None:
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        default = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}}
        client.put_object(Bucket="locked", Key="bare", Body=b"x")
        assert shown("bare") == (None, None)
        client.put_object_lock_configuration(Bucket="locked", ObjectLockConfiguration=default)
        client.put_object(Bucket="locked", Key="k", Body=b"x")
        assert shown("k") == ("GOVERNANCE", None)
        client.put_object(Bucket="locked", Key="off", Body=b"x", ObjectLockLegalHoldStatus="OFF")
        assert shown("off") == ("GOVERNANCE", "OFF")
        for key, mode in (("k", "GOVERNANCE"), ("bare", None)):
            for status in ("ON", "OFF"):
                client.put_object_legal_hold(Bucket="locked", Key=key, LegalHold={"Status": status})
                assert shown(key) == (mode, status)
                assert client.get_object_legal_hold(Bucket="locked", Key=key)["LegalHold"]["Status"] == status

    await asyncio.to_thread(run)


@pytest.mark.parametrize("kind", ["analytics", "intelligent_tiering", "metrics"])
async def test_what_can_not_be_configured_is_read_as_never_configured(world: World, kind: str) -> None:
    client = world.client()

    def run() -> None:
        found = getattr(client, f"list_bucket_{kind}_configurations")(Bucket="bucket")
        assert found["IsTruncated"] is False
        for verb in ("get", "delete"):
            call = getattr(client, f"{verb}_bucket_{kind}_configuration")
            assert refused(call, Bucket="bucket", Id="x") == (404, "NoSuchConfiguration")
            assert refused(call, Bucket="nowhere", Id="x") == (404, "NoSuchBucket")

    await asyncio.to_thread(run)
