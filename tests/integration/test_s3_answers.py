"""What AWS answers where its clients depend on it, each with its source.

B: the documentation strings of botocore 1.44.8. U: AWS's user guide, or a page of its API reference. O: somebody's
observation of AWS. T: a conformance suite, here Ceph's s3-tests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from tests.integration.s3_front import ACCESS, ACCESS_ALT, REGION, SECRET_ALT, World, s3_world
from tests.integration.test_s3_fail_closed import call, state

CUSTOMER = "x-amz-server-side-encryption-customer-"
OLD = b"old bytes"
ETAG = hashlib.md5(OLD).hexdigest()
PAST, FUTURE = "Mon, 01 Jan 1994 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        for key, body in (("k", OLD), ("empty", b"")):
            assert (await call(world, "PUT", f"/bucket/{key}", body=body))[0] == 200
        yield world


def field(answer: bytes, name: str) -> str | None:
    """A header of an answer."""
    found = re.search(rb"(?i)\r\n" + name.encode() + rb": ([^\r]*)\r\n", answer)
    return found[1].decode() if found else None


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


# --- listings


@pytest.mark.parametrize("delimiter", ["", "/"])
async def test_a_page_of_list_objects_names_the_next_marker_only_with_a_delimiter(world: World, delimiter: str) -> None:
    """B, ListObjectsOutput: "This element is returned only if you have the delimiter request parameter specified"."""
    await call(world, "PUT", "/bucket/a/b", body=b"x")
    _, _, answer = await call(world, "GET", f"/bucket?max-keys=1{'&delimiter=%2F' if delimiter else ''}")
    assert b"<IsTruncated>true</IsTruncated>" in answer
    assert (b"<NextMarker>" in answer) == bool(delimiter)


async def test_keys_are_encoded_as_in_urls_and_brackets_too(world: World) -> None:
    """B, EncodingType: "test_file(3).png" appears as "test_file%283%29.png"."""
    assert (await call(world, "PUT", "/bucket/test_file%283%29.png", body=b"x"))[0] == 200
    for target in (
        "/bucket?encoding-type=url",
        "/bucket?list-type=2&encoding-type=url",
        "/bucket?versions&encoding-type=url",
    ):
        assert b"<Key>test_file%283%29.png</Key>" in (await call(world, "GET", target))[2], target


# --- conditions of reads


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ({"if-match": ETAG, "if-unmodified-since": PAST}, 200),
        ({"if-match": "other", "if-unmodified-since": FUTURE}, 412),
        ({"if-none-match": ETAG, "if-modified-since": PAST}, 304),
        ({"if-none-match": "other", "if-modified-since": FUTURE}, 200),
        ({"if-modified-since": PAST}, 200),
        ({"if-modified-since": FUTURE}, 200),
        ({"if-unmodified-since": FUTURE}, 200),
    ],
)
async def test_entity_tags_decide_beside_dates(
    world: World, method: str, conditions: dict[str, str], status: int
) -> None:
    """B, GetObject: "If-Match evaluates to true, and If-Unmodified-Since to false: 200"; "If-None-Match evaluates to
    false, and If-Modified-Since to true: 304". O: a date in the future is no If-Modified-Since."""
    assert (await call(world, method, "/bucket/k", conditions))[0] == status


async def test_a_date_is_compared_with_the_object_until_it_lies_in_the_future(world: World) -> None:
    """O."""
    modified = field((await call(world, "HEAD", "/bucket/k"))[2], "last-modified")
    assert modified is not None
    assert (await call(world, "GET", "/bucket/k", {"if-modified-since": modified}))[0] == 304
    assert (await call(world, "GET", "/bucket/k", {"if-unmodified-since": modified}))[0] == 200


@pytest.mark.parametrize(
    ("conditions", "named"),
    [
        ({"if-match": "other", "if-none-match": ETAG}, "If-Match"),
        ({"if-unmodified-since": PAST, "if-none-match": ETAG}, "If-Unmodified-Since"),
        ({"if-none-match": ETAG}, "If-None-Match"),
        ({"if-modified-since": FUTURE}, ""),
        ({"if-modified-since": PAST}, ""),
    ],
)
async def test_a_copy_names_the_condition_of_its_source_that_does_not_hold(
    world: World, conditions: dict[str, str], named: str
) -> None:
    """O."""
    headers = {f"x-amz-copy-source-{name}": value for name, value in conditions.items()}
    status, _, answer = await call(world, "PUT", "/bucket/copy", {"x-amz-copy-source": "bucket/k", **headers})
    assert status == (412 if named else 200)
    assert (f"<Condition>x-amz-copy-source-{named}</Condition>".encode() in answer) == bool(named)


@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ({"if-match": ETAG, "if-unmodified-since": PAST}, 200),
        ({"if-none-match": ETAG, "if-modified-since": PAST}, 412),
    ],
)
async def test_entity_tags_decide_beside_dates_of_a_copys_source(
    world: World, conditions: dict[str, str], status: int
) -> None:
    """B, CopyObject: the first pair copies, the second answers 412."""
    headers = {f"x-amz-copy-source-{name}": value for name, value in conditions.items()}
    assert (await call(world, "PUT", "/bucket/copy", {"x-amz-copy-source": "bucket/k", **headers}))[0] == status


# --- ranges and parts


@pytest.mark.parametrize(
    ("span", "status", "length"), [("bytes=0-", 416, None), ("bytes=0-0", 416, None), ("bytes=-1", 200, "0")]
)
async def test_ranges_of_an_empty_object(world: World, span: str, status: int, length: str | None) -> None:
    """O."""
    for method in ("GET", "HEAD"):
        found, _, answer = await call(world, method, "/bucket/empty", {"range": span})
        assert found == status
        assert length is None or (field(answer, "content-length"), field(answer, "content-range")) == (length, None)


async def test_a_range_that_ends_before_it_begins_is_ignored(world: World) -> None:
    """O. RFC 9110, section 14.1.1, calls it invalid."""
    status, _, answer = await call(world, "GET", "/bucket/k", {"range": "bytes=1-0"})
    assert (status, body_of(answer), field(answer, "content-range")) == (200, OLD, None)


async def test_the_number_of_parts_is_named_with_a_part_number_and_of_multipart_objects_alone(world: World) -> None:
    """B, PartsCount: "returned if you specify partNumber in your request and the object was uploaded as a multipart
    upload". T: no Content-Range of an empty object."""
    client = world.client()

    def upload() -> None:
        made = client.create_multipart_upload(Bucket="bucket", Key="parts")
        part = client.upload_part(Bucket="bucket", Key="parts", UploadId=made["UploadId"], PartNumber=1, Body=OLD)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        client.complete_multipart_upload(Bucket="bucket", Key="parts", UploadId=made["UploadId"], MultipartUpload=parts)

    await asyncio.to_thread(upload)
    for method in ("GET", "HEAD"):
        for target, count in (("parts", None), ("parts?partNumber=1", "1"), ("k?partNumber=1", None)):
            status, _, answer = await call(world, method, f"/bucket/{target}")
            assert field(answer, "x-amz-mp-parts-count") == count, target
            assert status == (206 if "?" in target else 200)
        _, _, answer = await call(world, method, "/bucket/empty?partNumber=1")
        assert field(answer, "content-range") is None


@pytest.mark.parametrize("span", ["bytes=0-9", "bytes=8-9", "bytes=9-9", "bytes=100-200"])
async def test_a_part_beyond_the_source_of_its_copy_is_an_invalid_argument(world: World, span: str) -> None:
    """O: not 416, as a GET of this range; InvalidRequest if no byte of it is there."""
    _, _, answer = await call(world, "POST", "/bucket/parts?uploads")
    upload = re.search(rb"<UploadId>([^<]*)<", answer)
    assert upload is not None
    before = state(world)
    target = f"/bucket/parts?uploadId={upload[1].decode()}&partNumber=1"
    headers = {"x-amz-copy-source": "bucket/k", "x-amz-copy-source-range": span}
    begins_beyond = span in ("bytes=9-9", "bytes=100-200")
    code = "InvalidRequest" if begins_beyond else "InvalidArgument"
    assert (await call(world, "PUT", target, headers))[:2] == (400, code)
    assert state(world) == before


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({}, (400, "InvalidRequest")),
        ({"x-amz-object-attributes": " , "}, (400, "InvalidRequest")),
        ({"x-amz-object-attributes": "ETag,Owner"}, (400, "InvalidArgument")),
        ({"x-amz-object-attributes": "ETag,ObjectSize"}, (200, "")),
    ],
)
async def test_attributes_that_are_not_named_are_not_those_that_do_not_exist(
    world: World, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    """O."""
    assert (await call(world, "GET", "/bucket/k?attributes", headers))[:2] == answer


# --- completing an upload


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({"x-amz-mp-object-size": "8"}, (400, "InvalidRequest")),
        ({"x-amz-checksum-type": "FULL_OBJECT"}, (400, "BadDigest")),
        ({"x-amz-checksum-type": "COMPOSITE", "x-amz-mp-object-size": "9"}, (200, "")),
    ],
)
async def test_a_complete_that_says_another_size_or_checksum_type_is_refused(
    world: World, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    """B, MpuObjectSize: "If there's a mismatch [...] the request fails with an HTTP 400 InvalidRequest error";
    ChecksumType: "an HTTP 400 BadDigest error"."""
    _, _, made = await call(world, "POST", "/bucket/parts?uploads", {"x-amz-checksum-algorithm": "CRC32"})
    found = re.search(rb"<UploadId>([^<]*)<", made)
    assert found is not None
    target = f"/bucket/parts?uploadId={found[1].decode()}"
    _, _, part = await call(world, "PUT", f"{target}&partNumber=1", body=OLD)
    checksum = f"<ChecksumCRC32>{field(part, 'x-amz-checksum-crc32')}</ChecksumCRC32>"
    document = f"<Part><PartNumber>1</PartNumber><ETag>{field(part, 'etag')}</ETag>{checksum}</Part>"
    body = f"<CompleteMultipartUpload>{document}</CompleteMultipartUpload>".encode()
    assert (await call(world, "POST", target, headers, body))[:2] == answer


@pytest.mark.parametrize(
    ("created", "answer"),
    [
        ({"x-amz-checksum-algorithm": "CRC32"}, (400, "InvalidRequest")),
        ({"x-amz-checksum-algorithm": "SHA256", "x-amz-checksum-type": "COMPOSITE"}, (400, "InvalidRequest")),
        ({"x-amz-checksum-algorithm": "CRC32", "x-amz-checksum-type": "FULL_OBJECT"}, (200, "")),
        ({"x-amz-checksum-algorithm": "CRC64NVME"}, (200, "")),
        ({}, (200, "")),
    ],
)
async def test_a_composite_checksum_needs_the_checksums_of_its_parts(
    world: World, created: dict[str, str], answer: tuple[int, str]
) -> None:
    """O: "The upload was created using a sha256 checksum. The complete request must include the checksum for each part.
    It was missing for part 1 in the request." A full object's checksum needs none, and an upload that was created
    without an algorithm (as boto3's create_multipart_upload does by default) has a full object's."""
    _, _, made = await call(world, "POST", "/bucket/parts?uploads", created)
    found = re.search(rb"<UploadId>([^<]*)<", made)
    assert found is not None
    target = f"/bucket/parts?uploadId={found[1].decode()}"
    _, _, part = await call(world, "PUT", f"{target}&partNumber=1", body=OLD)
    document = f"<Part><PartNumber>1</PartNumber><ETag>{field(part, 'etag')}</ETag></Part>"
    before = state(world)
    body = f"<CompleteMultipartUpload>{document}</CompleteMultipartUpload>".encode()
    status, code, whole = await call(world, "POST", target, {}, body)
    assert (status, code) == answer
    if status == 400:
        assert b"It was missing for part 1 in the request." in whole
        assert state(world) == before


# --- buckets


async def test_head_bucket_names_the_region_without_access_too(world: World) -> None:
    """B, HeadBucket: the region is in the answers with the codes 200, 301, 400 and 403."""
    other = world.client(ACCESS_ALT, SECRET_ALT)
    with pytest.raises(ClientError) as refused:
        await asyncio.to_thread(lambda: other.head_bucket(Bucket="bucket"))
    found = refused.value.response["ResponseMetadata"]
    assert (found["HTTPStatusCode"], found["HTTPHeaders"]["x-amz-bucket-region"]) == (403, REGION)
    answer = (await call(world, "HEAD", "/no-such-bucket"))[2]
    assert field(answer, "x-amz-bucket-region") is None


# --- small mistakes, each as AWS was seen to answer


@pytest.mark.parametrize("kind", ["", "list-type=2&", "versions&", "uploads&"])
async def test_an_empty_encoding_of_a_list_is_none(world: World, kind: str) -> None:
    for encoding in ("", "URL", "x"):
        answer = await call(world, "GET", f"/bucket?{kind}encoding-type={encoding}")
        assert answer[:2] == (400, "InvalidArgument"), encoding


async def test_a_marker_that_is_no_upload_id_is_an_invalid_argument(world: World) -> None:
    assert (await call(world, "GET", "/bucket?uploads&key-marker=k&upload-id-marker=x"))[:2] == (400, "InvalidArgument")
    assert (await call(world, "GET", "/bucket?uploads&upload-id-marker=x"))[0] == 200, "it is ignored without a key"


async def test_a_delete_marker_that_is_named_is_no_source_of_a_copy(world: World) -> None:
    enabled = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"
    assert (await call(world, "PUT", "/bucket?versioning", body=enabled))[0] == 200
    marker = field((await call(world, "DELETE", "/bucket/k"))[2], "x-amz-version-id")
    for target in ("/bucket/copy", "/bucket/k"):
        source = {"x-amz-copy-source": f"bucket/k?versionId={marker}"}
        assert (await call(world, "PUT", target, source))[:2] == (400, "InvalidRequest")
    assert (await call(world, "PUT", "/bucket/copy", {"x-amz-copy-source": "bucket/k"}))[:2] == (404, "NoSuchKey")


@pytest.mark.parametrize(
    ("method", "target", "headers", "answer", "facts"),
    [
        ("GET", "/bucket/k?partNumber=2", {}, (416, "InvalidPartNumber"),
         "<ActualPartCount>1</ActualPartCount><PartNumberRequested>2</PartNumberRequested>"),
        ("PUT", "/bucket/k", {"x-amz-storage-class": "OUTPOSTS"}, (400, "InvalidStorageClass"),
         "<StorageClassRequested>OUTPOSTS</StorageClassRequested>"),
        ("GET", "/bucket/k", {f"{CUSTOMER}algorithm": "KMS", f"{CUSTOMER}key": "a", f"{CUSTOMER}key-md5": "b"},
         (400, "InvalidEncryptionAlgorithmError"), "<ArgumentValue>KMS</ArgumentValue>"),
    ],
)  # fmt: skip
async def test_an_error_says_what_was_asked_for(
    world: World, method: str, target: str, headers: dict[str, str], answer: tuple[int, str], facts: str
) -> None:
    status, code, whole = await call(world, method, target, headers)
    assert ((status, code), facts.encode() in whole) == (answer, True)


# --- bounds


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
@pytest.mark.parametrize(("length", "key"), [(1024, "k"), (1025, "k"), (1026, "é")])
async def test_a_key_of_more_than_1024_bytes_is_too_long_for_every_method(
    world: World, method: str, length: int, key: str
) -> None:
    """U, "Naming Amazon S3 objects": at most 1,024 bytes of UTF-8."""
    text = "k" * length if key == "k" else "%C3%A9" * (length // 2)
    status, code, _ = await call(world, method, f"/bucket/{text}", body=b"x" if method == "PUT" else b"")
    too_long = (400, "" if method == "HEAD" else "KeyTooLongError")
    found = {"GET": (404, "NoSuchKey"), "HEAD": (404, ""), "DELETE": (204, ""), "PUT": (200, "")}[method]
    assert (status, code) == (too_long if length > 1024 else found)


def test_the_largest_object_has_all_the_parts_that_an_upload_may_have() -> None:
    """U, "Amazon S3 multipart upload limits": 48.8 TiB, 10,000 parts of 5 GiB."""
    from storaged.objects.api import OBJECT_BYTES_MAX, PART_BYTES_MAX, PARTS_MAX

    assert OBJECT_BYTES_MAX == PARTS_MAX * PART_BYTES_MAX == 10_000 * 5 * 1024**3


# --- tags


def tagged(count: int, root: str = "Tagging") -> bytes:
    tags = "".join(f"<Tag><Key>k{number}</Key><Value>v</Value></Tag>" for number in range(count))
    inner = f"<TagSet>{tags}</TagSet>" if root == "Tagging" else f"<Tags>{tags}</Tags>"
    return f"<{root}>{inner}</{root}>".encode()


@pytest.mark.parametrize(
    ("target", "count", "answer"),
    [
        ("/bucket?tagging", 50, (204, "")),
        ("/bucket?tagging", 51, (400, "InvalidTag")),
        ("/bucket/k?tagging", 10, (200, "")),
        ("/bucket/k?tagging", 11, (400, "InvalidTag")),
    ],
)
async def test_a_bucket_has_at_most_50_tags_and_an_object_10(
    world: World, target: str, count: int, answer: tuple[int, str]
) -> None:
    """U, "Using cost allocation tags": 50; "Object tagging": 10. T: InvalidTag for both."""
    assert (await call(world, "PUT", target, body=tagged(count)))[:2] == answer


async def test_a_bucket_is_created_with_tags(world: World) -> None:
    """B, CreateBucketConfiguration: Tags."""
    client, tags = world.client(), [{"Key": "k0", "Value": "v"}]
    made: dict[str, Any] = {"Bucket": "tagged", "CreateBucketConfiguration": {"Tags": tags}}
    await asyncio.to_thread(lambda: client.create_bucket(**made))
    assert (await asyncio.to_thread(lambda: client.get_bucket_tagging(Bucket="tagged")))["TagSet"] == tags
    for count, answer in ((50, (200, "")), (51, (400, "InvalidTag"))):
        document = tagged(count, "CreateBucketConfiguration")
        assert (await call(world, "PUT", f"/made-{count}", body=document))[:2] == answer
    assert (await call(world, "HEAD", "/made-51"))[0] == 404
    status, code, _ = await call(world, "PUT", "/tagged", body=tagged(2, "CreateBucketConfiguration"))
    assert (status, code) == (409, "BucketAlreadyOwnedByYou"), "tags that are not stored are not ignored"


@pytest.mark.parametrize(
    ("headers", "location", "status"),
    [
        ({}, "", 200),
        ({}, REGION, 200),
        ({}, "us-west-2", 409),
        ({"x-amz-acl": "private"}, "", 200),
        ({"x-amz-acl": "bucket-owner-full-control"}, "", 200),
        ({"x-amz-object-ownership": "BucketOwnerEnforced"}, "", 200),
        ({"x-amz-object-ownership": "ObjectWriter"}, "", 409),
        ({"x-amz-object-ownership": "ObjectWriter", "x-amz-acl": "authenticated-read"}, "", 403),
        ({"x-amz-bucket-object-lock-enabled": "true"}, "", 409),
    ],
)
async def test_one_s_own_bucket_again_is_refused_if_it_is_not_as_it_was_asked_for(
    world: World, headers: dict[str, str], location: str, status: int
) -> None:
    """AWS answers 409 everywhere but in us-east-1, where it sets the access control list anew. Here it is 200 as long
    as nothing that was asked for is passed over."""
    assert (await call(world, "PUT", "/own"))[0] == 200
    before = state(world)
    asked = (
        f"<CreateBucketConfiguration><LocationConstraint>{location}</LocationConstraint></CreateBucketConfiguration>"
    )
    found, code, _ = await call(world, "PUT", "/own", headers, asked.encode() if location else b"")
    assert found == status
    assert status != 409 or code == "BucketAlreadyOwnedByYou"
    assert state(world) == before


async def test_one_s_own_bucket_again_with_another_list_is_refused(world: World) -> None:
    other = (await world.users.lookup(ACCESS_ALT))[0].user_id
    own, listed = {"x-amz-object-ownership": "ObjectWriter"}, {"x-amz-grant-read": f'id="{other}"'}
    taken, refused = (200, ""), (409, "BucketAlreadyOwnedByYou")
    for headers, answer in (
        ({**own, **listed}, taken),
        ({**own, **listed}, taken),
        ({}, taken),
        ({**own, "x-amz-acl": "private"}, refused),
        ({**own, "x-amz-grant-write": f'id="{other}"'}, refused),
    ):
        assert (await call(world, "PUT", "/listed", headers))[:2] == answer, headers


# --- conditions, ownership, and what the other answers are tested by


async def test_a_complete_that_must_create_fails_on_an_object_that_exists_and_can_be_repeated(world: World) -> None:
    """B, CompleteMultipartUpload, IfNoneMatch: 412 when the object exists. The upload stays."""

    def run() -> None:
        client = world.client()
        where = {"Bucket": "bucket", "Key": "k"}
        upload = client.create_multipart_upload(**where)["UploadId"]
        part = client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"new")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        with pytest.raises(ClientError) as refused:
            client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")
        assert refused.value.response["Error"]["Code"] == "PreconditionFailed"
        client.delete_object(**where)
        for _ in range(2):
            client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")

    await asyncio.to_thread(run)


async def test_no_policy_locks_the_owner_out_of_the_policy(world: World) -> None:
    """B, PutBucketPolicy: the owner always may get, put and delete the policy, even when it denies that."""

    def run() -> None:
        client = world.client()
        everything = {"Effect": "Deny", "Principal": "*", "Action": "s3:*"}
        both = ["arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"]
        text = json.dumps({"Version": "2012-10-17", "Statement": [{**everything, "Resource": both}]})
        client.put_bucket_policy(Bucket="bucket", Policy=text)
        with pytest.raises(ClientError, match="AccessDenied"):
            client.get_object(Bucket="bucket", Key="k")
        assert json.loads(client.get_bucket_policy(Bucket="bucket")["Policy"])["Statement"][0]["Effect"] == "Deny"
        client.put_bucket_policy(Bucket="bucket", Policy=text)
        client.delete_bucket_policy(Bucket="bucket")
        client.get_object(Bucket="bucket", Key="k")

    await asyncio.to_thread(run)


async def test_one_s_own_bucket_is_created_again(world: World) -> None:
    """B, CreateBucket: in us-east-1 200; here in every region, as clients expect of other servers than AWS."""
    assert (await call(world, "PUT", "/bucket"))[:2] == (200, "")
    assert await world.stored() == {b"k": OLD, b"empty": b""}


ANSWERS = {
    1: ["integration/test_s3_answers.py::test_a_page_of_list_objects_names_the_next_marker_only_with_a_delimiter"],
    2: ["integration/test_s3_answers.py::test_keys_are_encoded_as_in_urls_and_brackets_too"],
    3: ["s3/test_versions.py::test_a_delete_marker_and_what_reads_of_it_answer"],
    4: ["s3/test_versions.py::test_a_suspended_bucket_has_one_null_version"],
    5: ["s3/test_versions.py::test_a_delete_marker_and_what_reads_of_it_answer"],
    6: ["s3/test_versions.py::test_ids_that_are_none_and_ids_that_are_unknown"],
    7: ["unit/test_s3_authorize.py::test_a_decision_is_as_aws_documents_it"],
    8: ["unit/test_objects_multipart.py::test_a_repeated_complete_gets_the_same_answer_even_after_the_object_is_gone"],
    9: [],  # it may answer early; this server answers when the outcome is known, so there is nothing to pin
    10: [
        "integration/test_s3_answers.py::test_a_complete_that_must_create_fails_on_an_object_that_exists_and_can_be_repeated"
    ],
    11: ["s3/test_versions.py::test_conditions_look_at_the_current_version"],
    12: [
        "integration/test_s3_answers.py::test_entity_tags_decide_beside_dates",
        "integration/test_s3_answers.py::test_entity_tags_decide_beside_dates_of_a_copys_source",
    ],
    13: ["integration/test_s3_answers.py::test_ranges_of_an_empty_object"],
    14: ["integration/test_s3_answers.py::test_a_range_that_ends_before_it_begins_is_ignored"],
    15: [
        "integration/test_s3_answers.py::test_the_number_of_parts_is_named_with_a_part_number_and_of_multipart_objects_alone"
    ],
    16: ["integration/test_s3_answers.py::test_a_part_beyond_the_source_of_its_copy_is_an_invalid_argument"],
    17: ["integration/test_s3_answers.py::test_a_complete_that_says_another_size_or_checksum_type_is_refused"],
    18: [
        "integration/test_s3_encryption.py::test_a_bucket_that_blocks_sse_c_refuses_writes_and_lets_old_objects_be_read"
    ],
    19: ["integration/test_s3_fail_closed.py::test_a_header_that_asks_for_what_is_not_done_changes_nothing"],
    20: [
        "unit/test_objects_lifecycle.py::test_the_earliest_of_several_rules_counts",
        "unit/test_objects_lifecycle.py::test_versions_get_a_marker_then_go_then_the_marker_goes",
        "integration/test_s3_lifecycle.py::test_a_filter_has_one_condition_or_and",
    ],
    21: [
        "integration/test_s3_answers.py::test_no_policy_locks_the_owner_out_of_the_policy",
        "unit/test_s3_authorize.py::test_the_policy_of_another_s_bucket_is_405_when_it_is_allowed_and_403_when_not",
    ],
    22: ["s3/test_object_lock.py::test_the_configuration_of_a_bucket"],
    23: [
        "integration/test_s3_answers.py::test_one_s_own_bucket_is_created_again",
        "integration/test_s3_answers.py::test_head_bucket_names_the_region_without_access_too",
    ],
    24: [
        "integration/test_s3_answers.py::test_a_key_of_more_than_1024_bytes_is_too_long_for_every_method",
        "integration/test_s3_answers.py::test_the_largest_object_has_all_the_parts_that_an_upload_may_have",
    ],
    25: [
        "integration/test_s3_answers.py::test_a_bucket_has_at_most_50_tags_and_an_object_10",
        "integration/test_s3_answers.py::test_a_bucket_is_created_with_tags",
    ],
}
"""The answers of AWS that were looked up for this server, by number, and the tests that pin them."""


@pytest.mark.parametrize("number", ANSWERS)
def test_each_answer_is_pinned_by_tests_that_exist(number: int) -> None:
    for node in ANSWERS[number]:
        file, _, name = node.partition("::")
        text = (Path(__file__).resolve().parents[1] / file).read_text()
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), node
