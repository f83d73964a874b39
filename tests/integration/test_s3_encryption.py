"""SSE-S3, SSE-KMS and SSE-C over HTTP: what requests may ask, what answers say, which errors come."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from storaged import errors
from storaged.objects.encryption import CUSTOMER, Encryption
from storaged.s3 import encryption as enc
from storaged.s3.context import Endpoint, Front
from storaged.s3.request import Request
from tests.integration.s3_front import ACCESS, REGION, World, s3_world
from tests.integration.test_s3_fail_closed import call, state
from tests.integration.test_s3_post import policy, post, signed_form

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
KMS_KEY = "61206b65-7972-696e-6727-732069642e2e"
ARN = f"arn:aws:kms:{REGION}:000000000000:key/{KMS_KEY}"
SSE = "x-amz-server-side-encryption"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


def customer(key: bytes, /, prefix: str = f"{SSE}-customer-", **changed: str) -> dict[str, str]:
    """The three headers of a customer's key."""
    digest = base64.b64encode(hashlib.md5(key).digest()).decode()
    found = {"algorithm": "AES256", "key": base64.b64encode(key).decode(), "key-md5": digest} | changed
    return {prefix + name: value for name, value in found.items() if value != "-"}


SOURCE = "x-amz-copy-source-server-side-encryption-customer-"


def parameters(key: bytes, prefix: str = "SSE") -> dict[str, Any]:
    """The same for boto3, which computes the MD5."""
    return {f"{prefix}CustomerAlgorithm": "AES256", f"{prefix}CustomerKey": key}


async def run(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


async def refusal(work: Callable[[], Any]) -> tuple[int, str]:
    """(status, code) of a call that fails."""
    with pytest.raises(ClientError) as failed:
        await run(work)
    found = failed.value.response
    return found["ResponseMetadata"]["HTTPStatusCode"], found["Error"]["Code"]


def header(answer: bytes, name: str) -> str | None:
    found = re.search(rb"(?i)\r\n" + name.encode() + rb": ([^\r]*)\r\n", answer)
    return found[1].decode() if found else None


# --- SSE-S3 and SSE-KMS


@pytest.mark.parametrize("size", [3, 5_000, 300_000])
async def test_an_object_is_sse_s3_unless_asked_otherwise(world: World, size: int) -> None:
    client = world.client()
    for extra in ({}, {"ServerSideEncryption": "AES256"}):
        made = await run(lambda extra=extra: client.put_object(Bucket="bucket", Key="k", Body=b"x" * size, **extra))
        head = await run(lambda: client.head_object(Bucket="bucket", Key="k"))
        for answer in (made, head):
            assert answer["ServerSideEncryption"] == "AES256"
            assert "SSEKMSKeyId" not in answer


@pytest.mark.parametrize(
    "key_id", ["", KMS_KEY, ARN, "alias/aws/s3", f"arn:aws:kms:{REGION}:000000000000:alias/aws/s3"]
)
async def test_sse_kms_takes_the_clusters_key_and_says_so(world: World, key_id: str) -> None:
    client = world.client()
    asked = {"ServerSideEncryption": "aws:kms", **({"SSEKMSKeyId": key_id} if key_id else {})}
    made = await run(lambda: client.put_object(Bucket="bucket", Key="k", Body=b"data", BucketKeyEnabled=True, **asked))
    head = await run(lambda: client.head_object(Bucket="bucket", Key="k"))
    got = await run(lambda: client.get_object(Bucket="bucket", Key="k"))
    copied = await run(lambda: client.copy_object(Bucket="bucket", Key="c", CopySource="bucket/k", **asked))
    for answer in (made, head, got):
        found = answer["ServerSideEncryption"], answer["SSEKMSKeyId"], answer["BucketKeyEnabled"]
        assert found == ("aws:kms", ARN, True)
    assert (copied["ServerSideEncryption"], copied["SSEKMSKeyId"]) == ("aws:kms", ARN)
    assert "BucketKeyEnabled" not in copied
    plain = await run(lambda: client.copy_object(Bucket="bucket", Key="d", CopySource="bucket/k"))
    assert plain["ServerSideEncryption"] == "AES256", "a copy has the encryption of its request, not of its source"


async def test_an_upload_says_its_encryption_at_every_step(world: World) -> None:
    client = world.client()
    made = await run(
        lambda: client.create_multipart_upload(
            Bucket="bucket", Key="k", ServerSideEncryption="aws:kms", ChecksumAlgorithm="CRC32"
        )
    )
    which = {"Bucket": "bucket", "Key": "k", "UploadId": made["UploadId"]}
    part = await run(lambda: client.upload_part(**which, PartNumber=1, Body=b"data"))
    parts = [{"PartNumber": 1, "ETag": part["ETag"], "ChecksumCRC32": part["ChecksumCRC32"]}]
    done = await run(lambda: client.complete_multipart_upload(**which, MultipartUpload={"Parts": parts}))
    head = await run(lambda: client.head_object(Bucket="bucket", Key="k"))
    for answer in (made, part, done, head):
        assert (answer["ServerSideEncryption"], answer["SSEKMSKeyId"]) == ("aws:kms", ARN)


@pytest.mark.parametrize(("kind", "other"), [("aws:kms", "AES256"), ("AES256", "aws:kms")])
async def test_a_part_and_a_complete_may_name_the_encryption_of_their_upload_and_no_other(
    world: World, kind: str, other: str
) -> None:
    client = world.client()
    which = {"Bucket": "bucket", "Key": "k"}
    await run(lambda: client.put_object(Bucket="bucket", Key="source", Body=b"data"))
    made = await run(lambda: client.create_multipart_upload(**which, ServerSideEncryption=kind))
    target = f"/bucket/k?uploadId={made['UploadId']}"
    part = await run(lambda: client.upload_part(**which, UploadId=made["UploadId"], PartNumber=1, Body=b"data"))
    document = f"<Part><PartNumber>1</PartNumber><ETag>{part['ETag']}</ETag></Part>"
    document = f"<CompleteMultipartUpload>{document}</CompleteMultipartUpload>"
    changes = (
        ("PUT", f"{target}&partNumber=1", {}, b"other"),
        ("PUT", f"{target}&partNumber=1", {"x-amz-copy-source": "/bucket/source"}, b""),
        ("POST", target, {}, document.encode()),
    )
    before = state(world)
    for method, at, headers, body in changes:
        assert (await call(world, method, at, headers | {SSE: other}, body))[:2] == (400, "InvalidArgument")
        wrong = {SSE: kind, f"{SSE}-aws-kms-key-id": "other"}
        assert (await call(world, method, at, headers | wrong, body))[0] == 400
    assert state(world) == before
    for method, at, headers, body in changes[1:]:
        assert (await call(world, method, at, headers | {SSE: kind}, body))[0] == 200


async def test_an_encryption_context_is_kept_and_named_to_the_writer(world: World) -> None:
    context = base64.b64encode(b'{"a": "b"}').decode()
    headers = {SSE: "aws:kms", f"{SSE}-context": context}
    status, _, answer = await call(world, "PUT", "/bucket/k", headers, b"data")
    assert (status, header(answer, f"{SSE}-context")) == (200, context)
    assert header((await call(world, "HEAD", "/bucket/k"))[2], f"{SSE}-context") is None


REFUSED: list[tuple[dict[str, str], tuple[int, str]]] = [
    ({SSE: "aws:kms:dsse"}, (501, "NotImplemented")),
    ({SSE: "aes:kms"}, (400, "InvalidArgument")),
    ({SSE: "aws:fsx"}, (400, "InvalidArgument")),
    ({SSE: ""}, (400, "InvalidArgument")),
    ({SSE: "aws:kms", f"{SSE}-aws-kms-key-id": "other"}, (400, "KMS")),
    ({SSE: "aws:kms", f"{SSE}-aws-kms-key-id": ARN.replace(REGION, "eu-de-1")}, (400, "KMS")),
    ({SSE: "aws:kms", f"{SSE}-aws-kms-key-id": ARN.removesuffix(f"key/{KMS_KEY}")}, (400, "KMS")),
    ({SSE: "AES256", f"{SSE}-aws-kms-key-id": ARN}, (400, "InvalidArgument")),
    ({f"{SSE}-aws-kms-key-id": ARN}, (400, "InvalidArgument")),
    ({f"{SSE}-context": "e30="}, (400, "InvalidArgument")),
    ({SSE: "aws:kms", f"{SSE}-context": "{}"}, (400, "InvalidArgument")),
    ({SSE: "aws:kms", f"{SSE}-context": base64.b64encode(b"[]").decode()}, (400, "InvalidArgument")),
    ({SSE: "aws:kms", f"{SSE}-context": base64.b64encode(b'{"a": 1}').decode()}, (400, "InvalidArgument")),
    ({SSE: "aws:kms", f"{SSE}-bucket-key-enabled": "yes"}, (400, "InvalidArgument")),
    ({**customer(KEY), SSE: "AES256"}, (400, "InvalidArgument")),
    ({**customer(KEY), SSE: "aws:kms", f"{SSE}-aws-kms-key-id": ARN}, (400, "InvalidArgument")),
    ({**customer(KEY), f"{SSE}-aws-kms-key-id": ARN}, (400, "InvalidArgument")),
    (customer(KEY, algorithm="-"), (400, "InvalidArgument")),
    (customer(KEY, algorithm=""), (400, "InvalidArgument")),
    (customer(KEY, algorithm="AES128"), (400, "InvalidEncryptionAlgorithmError")),
    (customer(KEY, algorithm="aes256"), (400, "InvalidEncryptionAlgorithmError")),
    (customer(KEY, key="-"), (400, "InvalidArgument")),
    (customer(KEY, key="not base64"), (400, "InvalidArgument")),
    (customer(KEY, key="AAAA"), (400, "InvalidArgument")),
    (customer(KEY[:31]), (400, "InvalidArgument")),
    (customer(KEY + b"x"), (400, "InvalidArgument")),
    (customer(b""), (400, "InvalidArgument")),
    (customer(KEY, **{"key-md5": "-"}), (400, "InvalidArgument")),
    (customer(KEY, **{"key-md5": "AAAAAAAAAAAAAAAAAAAAAA=="}), (400, "InvalidArgument")),
    (customer(KEY, **{"key-md5": hashlib.md5(KEY).hexdigest()}), (400, "InvalidArgument")),
    (customer(KEY, prefix=SOURCE), (501, "NotImplemented")),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "answer"), REFUSED)
async def test_a_wrong_encryption_stores_nothing(
    world: World, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    before = state(world)
    for method, target, body in (("PUT", "/bucket/k", b"data"), ("POST", "/bucket/k?uploads", b"")):
        status, code, text = await call(world, method, target, headers, body)
        code = "KMS" if b"<Code>KMS.NotFoundException</Code>" in text else code
        assert (status, code) == answer
        assert state(world) == before
        assert base64.b64encode(KEY) not in text, "an error must not print a key"


# --- the default of a bucket


def rule(algorithm: str = "", key_id: str = "", *, bucket_key: str = "", blocked: tuple[str, ...] = ()) -> bytes:
    """A document with one rule."""
    default = f"<SSEAlgorithm>{algorithm}</SSEAlgorithm>" if algorithm else ""
    default += f"<KMSMasterKeyID>{key_id}</KMSMasterKeyID>" if key_id else ""
    parts = f"<ApplyServerSideEncryptionByDefault>{default}</ApplyServerSideEncryptionByDefault>" if default else ""
    parts += f"<BucketKeyEnabled>{bucket_key}</BucketKeyEnabled>" if bucket_key else ""
    kinds = "".join(f"<EncryptionType>{kind}</EncryptionType>" for kind in blocked)
    parts += f"<BlockedEncryptionTypes>{kinds}</BlockedEncryptionTypes>" if blocked else ""
    root = "ServerSideEncryptionConfiguration"
    return f"<{root}><Rule>{parts}</Rule></{root}>".encode()


async def test_a_buckets_default_encrypts_what_asks_for_nothing(world: World) -> None:
    client = world.client()
    await run(lambda: client.put_object(Bucket="bucket", Key="before", Body=b"data"))
    sse_s3 = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}, "BucketKeyEnabled": False}]}
    got = await run(lambda: client.get_bucket_encryption(Bucket="bucket"))
    assert got["ServerSideEncryptionConfiguration"] == sse_s3
    by_default = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": KMS_KEY}
    asked = {"Rules": [{"ApplyServerSideEncryptionByDefault": by_default, "BucketKeyEnabled": True}]}
    await run(lambda: client.put_bucket_encryption(Bucket="bucket", ServerSideEncryptionConfiguration=asked))
    got = await run(lambda: client.get_bucket_encryption(Bucket="bucket"))
    assert got["ServerSideEncryptionConfiguration"] == asked
    made = [
        await run(lambda: client.put_object(Bucket="bucket", Key="small", Body=b"data")),
        await run(lambda: client.put_object(Bucket="bucket", Key="large", Body=b"x" * 300_000)),
        await run(lambda: client.copy_object(Bucket="bucket", Key="copy", CopySource="bucket/before")),
        await run(lambda: client.create_multipart_upload(Bucket="bucket", Key="parts")),
        await run(lambda: client.put_object(Bucket="bucket", Key="kms", Body=b"x", ServerSideEncryption="aws:kms")),
    ]
    for answer in made:
        found = answer["ServerSideEncryption"], answer["SSEKMSKeyId"], answer["BucketKeyEnabled"]
        assert found == ("aws:kms", ARN, True)
    document = policy(["starts-with", "$key", ""])
    status, _, headers = await post(world, signed_form(document, {"key": "form"}))
    assert (status, headers[SSE]) == (204, "aws:kms")
    plain = await run(lambda: client.put_object(Bucket="bucket", Key="s3", Body=b"x", ServerSideEncryption="AES256"))
    assert plain["ServerSideEncryption"] == "AES256"
    assert (await run(lambda: client.head_object(Bucket="bucket", Key="before")))["ServerSideEncryption"] == "AES256"
    keyed = await run(lambda: client.put_object(Bucket="bucket", Key="c", Body=b"x", **parameters(KEY)))
    assert "ServerSideEncryption" not in keyed
    await run(lambda: client.delete_bucket_encryption(Bucket="bucket"))
    got = await run(lambda: client.get_bucket_encryption(Bucket="bucket"))
    assert got["ServerSideEncryptionConfiguration"] == sse_s3
    answer = await run(lambda: client.put_object(Bucket="bucket", Key="small", Body=b"data"))
    assert answer["ServerSideEncryption"] == "AES256"


async def test_a_bucket_that_blocks_sse_c_refuses_writes_and_lets_old_objects_be_read(world: World) -> None:
    await call(world, "PUT", "/bucket/old", customer(KEY), b"data")
    blocking = rule("AES256", blocked=("SSE-C",))
    assert (await call(world, "PUT", "/bucket?encryption", body=blocking))[0] == 200
    assert b"<EncryptionType>SSE-C</EncryptionType>" in (await call(world, "GET", "/bucket?encryption"))[2]
    source = {"x-amz-copy-source": "bucket/old", **customer(KEY, prefix=SOURCE)}
    before = state(world)
    for method, target, headers in (
        ("PUT", "/bucket/new", customer(KEY)),
        ("POST", "/bucket/new?uploads", customer(KEY)),
        ("PUT", "/bucket/new", {**source, **customer(OTHER)}),
    ):
        body = b"data" if method == "PUT" and "x-amz-copy-source" not in headers else b""
        assert (await call(world, method, target, headers, body))[:2] == (403, "AccessDenied")
        assert state(world) == before
    assert (await call(world, "GET", "/bucket/old", customer(KEY)))[2].endswith(b"data")
    assert (await call(world, "PUT", "/bucket/new", source))[0] == 200
    # what does not say what is blocked leaves it
    assert (await call(world, "DELETE", "/bucket?encryption"))[0] == 204
    assert b"<EncryptionType>SSE-C</EncryptionType>" in (await call(world, "GET", "/bucket?encryption"))[2]
    assert (await call(world, "PUT", "/bucket?encryption", body=rule("aws:kms")))[0] == 200
    assert (await call(world, "PUT", "/bucket/new", customer(KEY), b"data"))[:2] == (403, "AccessDenied")
    assert (await call(world, "PUT", "/bucket?encryption", body=rule("AES256", blocked=("NONE",))))[0] == 200
    assert (await call(world, "PUT", "/bucket/new", customer(KEY), b"data"))[0] == 200


@pytest.mark.parametrize("legacy", [False, True])
async def test_new_buckets_block_sse_c_unless_they_are_as_they_were(legacy: bool) -> None:
    """AWS has done so since April 2026."""
    async with s3_world(legacy=legacy) as world:
        assert (await call(world, "PUT", "/bucket"))[0] == 200
        answer = await call(world, "GET", "/bucket?encryption")
        not_found = (404, "ServerSideEncryptionConfigurationNotFoundError")
        assert answer[:2] == (not_found if legacy else (200, ""))
        assert (b"<EncryptionType>SSE-C</EncryptionType>" in answer[2]) == (not legacy)
        status, _, _ = await call(world, "PUT", "/bucket/k", customer(KEY), b"data")
        assert status == (200 if legacy else 403)
        assert (await call(world, "PUT", "/bucket?encryption", body=rule("AES256", blocked=("NONE",))))[0] == 200
        assert (await call(world, "PUT", "/bucket/k", customer(KEY), b"data"))[0] == 200


MALFORMED = (400, "MalformedXML")
ROOT = b"ServerSideEncryptionConfiguration"


@pytest.mark.parametrize(
    ("document", "answer"),
    [
        (b"", (400, "MissingRequestBodyError")),
        (b"<Other/>", MALFORMED),
        (b"<%b/>" % ROOT, MALFORMED),
        (b"<%b><Rule/></%b>" % (ROOT, ROOT), MALFORMED),
        (rule("AES256").replace(b"</Rule>", b"</Rule><Rule/>"), MALFORMED),
        (rule("AES256", bucket_key="true").replace(b"</Rule>", b"<Filter/></Rule>"), MALFORMED),
        (rule("AES256", bucket_key="yes"), MALFORMED),
        (rule("AES512"), MALFORMED),
        (rule("aws:fsx"), MALFORMED),
        (rule("aws:kms:dsse"), (501, "NotImplemented")),
        (rule("AES256", KMS_KEY), (400, "InvalidArgument")),
        (rule("aws:kms", "another key"), (400, "KMS")),
        (rule("AES256", blocked=("SSE-S3",)), MALFORMED),
        (rule("AES256", blocked=("NONE", "SSE-C")), MALFORMED),
        (rule("AES256", bucket_key="true").replace(b"<BucketKey", b"<BlockedEncryptionTypes/><BucketKey"), MALFORMED),
        (b"<!DOCTYPE x []>" + rule("AES256"), MALFORMED),
    ],
)
async def test_a_wrong_default_changes_nothing(world: World, document: bytes, answer: tuple[int, str]) -> None:
    before = state(world)
    status, code, text = await call(world, "PUT", "/bucket?encryption", body=document)
    assert (status, "KMS" if b"<Code>KMS.NotFoundException</Code>" in text else code) == answer
    assert state(world) == before


# --- UpdateObjectEncryption


def to_kms(arn: str = ARN, bucket_key: str = "") -> bytes:
    inner = f"<KMSKeyArn>{arn}</KMSKeyArn>" + (
        f"<BucketKeyEnabled>{bucket_key}</BucketKeyEnabled>" if bucket_key else ""
    )
    return f"<ObjectEncryption><SSE-KMS>{inner}</SSE-KMS></ObjectEncryption>".encode()


async def test_the_encryption_of_an_object_is_updated_in_place(world: World) -> None:
    client = world.client()
    made = await run(lambda: client.put_object(Bucket="bucket", Key="k", Body=b"data"))
    before = await run(lambda: client.head_object(Bucket="bucket", Key="k"))
    asked = {"SSEKMS": {"KMSKeyArn": ARN, "BucketKeyEnabled": True}}
    await run(lambda: client.update_object_encryption(Bucket="bucket", Key="k", ObjectEncryption=asked))
    got = await run(lambda: client.get_object(Bucket="bucket", Key="k"))
    assert (got["ServerSideEncryption"], got["SSEKMSKeyId"], got["BucketKeyEnabled"]) == ("aws:kms", ARN, True)
    assert (got["ETag"], got["LastModified"]) == (made["ETag"], before["LastModified"])
    assert await run(got["Body"].read) == b"data"


@pytest.mark.parametrize(
    ("target", "document", "answer"),
    [
        ("/bucket/k", b"<ObjectEncryption><SSE-S3/></ObjectEncryption>", (400, "InvalidRequest")),
        ("/bucket/k", b"<ObjectEncryption/>", (400, "InvalidRequest")),
        ("/bucket/k", b"<Other/>", MALFORMED),
        ("/bucket/k", b"", MALFORMED),
        ("/bucket/k", to_kms(KMS_KEY), (400, "InvalidRequest")),
        ("/bucket/k", to_kms(""), (400, "InvalidRequest")),
        ("/bucket/k", to_kms(ARN.replace(REGION, "eu-de-1")), (400, "KMS")),
        ("/bucket/k", to_kms(bucket_key="yes"), (400, "InvalidRequest")),
        ("/bucket/c", to_kms(), (400, "InvalidRequest")),
        ("/bucket/other", to_kms(), (404, "NoSuchKey")),
    ],
)
async def test_an_update_that_can_not_be_done_changes_nothing(
    world: World, target: str, document: bytes, answer: tuple[int, str]
) -> None:
    await call(world, "PUT", "/bucket/k", body=b"data")
    await call(world, "PUT", "/bucket/c", customer(KEY), body=b"data")
    before = state(world)
    status, code, text = await call(world, "PUT", f"{target}?encryption", body=document)
    assert (status, "KMS" if b"<Code>KMS.NotFoundException</Code>" in text else code) == answer
    assert state(world) == before


@pytest.mark.parametrize("name", [SSE, f"{SSE}-customer-algorithm"])
async def test_a_policy_that_wants_an_encryption_is_asked_before_the_values_are_judged(world: World, name: str) -> None:
    """T, Ceph's s3-tests: AES192 answers 403 where a policy denies it, and 400 elsewhere."""
    condition = {"StringNotEquals": {f"s3:{name}": "AES256"}}
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::bucket/*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [{**statement, "Condition": condition}]})
    code = "InvalidArgument" if name == SSE else "InvalidEncryptionAlgorithmError"
    assert (await call(world, "PUT", "/bucket/k", {name: "AES192"}, b"data"))[:2] == (400, code)
    client = world.client()
    await run(lambda: client.put_bucket_policy(Bucket="bucket", Policy=document))
    before = state(world)
    assert (await call(world, "PUT", "/bucket/k", {name: "AES192"}, b"data"))[:2] == (403, "AccessDenied")
    assert (await call(world, "PUT", "/bucket/k", {}, b"data"))[:2] == (403, "AccessDenied")
    assert state(world) == before
    right = {SSE: "AES256"} if name == SSE else customer(KEY)
    assert (await call(world, "PUT", "/bucket/k", right, b"data"))[0] == 200


# --- SSE-C


@pytest.mark.parametrize("size", [3, 5_000, 300_000])
async def test_an_object_with_a_customers_key_is_read_with_it_alone(world: World, size: int) -> None:
    client, data = world.client(), bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    which = {"Bucket": "bucket", "Key": "k"}
    made = await run(lambda: client.put_object(**which, Body=data, **parameters(KEY)))
    assert made["ETag"] != f'"{hashlib.md5(data).hexdigest()}"'
    for _ in range(2):  # with a cache, too
        got = await run(lambda: client.get_object(**which, **parameters(KEY)))
        assert await run(got["Body"].read) == data
        head = await run(lambda: client.head_object(**which, ChecksumMode="ENABLED", **parameters(KEY)))
        assert head["ChecksumCRC32"] == made["ChecksumCRC32"]
        for answer in (made, got, head):
            assert (answer["SSECustomerAlgorithm"], answer["ETag"]) == ("AES256", made["ETag"])
            assert answer["SSECustomerKeyMD5"] == base64.b64encode(hashlib.md5(KEY).digest()).decode()
            assert "ServerSideEncryption" not in answer
        part = await run(lambda: client.get_object(**which, Range="bytes=1-2", **parameters(KEY)))
        assert await run(part["Body"].read) == data[1:3]
        for wrong in ({}, parameters(OTHER)):
            assert await refusal(lambda wrong=wrong: client.get_object(**which, **wrong)) == (400, "InvalidRequest")
            assert (await refusal(lambda wrong=wrong: client.head_object(**which, **wrong)))[0] == 400
        wanted = {"x-amz-object-attributes": "ETag,Checksum"}
        for headers in ({}, customer(OTHER)):
            answer = await call(world, "GET", "/bucket/k?attributes", {**wanted, **headers})
            assert answer[:2] == (400, "InvalidRequest")
        answer = await call(world, "GET", "/bucket/k?attributes", {**wanted, **customer(KEY)})
        assert made["ChecksumCRC32"].encode() in answer[2]
    (listed,) = (await run(lambda: client.list_objects_v2(Bucket="bucket")))["Contents"]
    assert (listed["ETag"], listed["Size"]) == (made["ETag"], size)
    await run(lambda: client.put_object_tagging(**which, Tagging={"TagSet": [{"Key": "a", "Value": "b"}]}))
    assert (await run(lambda: client.get_object_tagging(**which)))["TagSet"] == [{"Key": "a", "Value": "b"}]
    await run(lambda: client.get_object_acl(**which))
    got = await run(lambda: client.get_object(**which, **parameters(KEY)))
    assert await run(got["Body"].read) == data


async def test_a_key_for_an_object_that_has_none_is_refused(world: World) -> None:
    client = world.client()
    await run(lambda: client.put_object(Bucket="bucket", Key="k", Body=b"data"))
    for name in ("get_object", "head_object"):
        status, _ = await refusal(lambda name=name: getattr(client, name)(Bucket="bucket", Key="k", **parameters(KEY)))
        assert status == 400
    absent = await refusal(lambda: client.get_object(Bucket="bucket", Key="other", **parameters(KEY)))
    assert absent == (404, "NoSuchKey")


@pytest.mark.parametrize("changed", [{"key": "-"}, {"key-md5": "-"}, {"algorithm": "-"}, {"key": "AAAA"}])
async def test_a_read_with_half_a_key_is_refused(world: World, changed: dict[str, str]) -> None:
    await call(world, "PUT", "/bucket/k", customer(KEY), b"data")
    assert (await call(world, "GET", "/bucket/k", customer(KEY, **changed)))[:2] == (400, "InvalidArgument")
    assert (await call(world, "HEAD", "/bucket/k", customer(KEY, **changed)))[0] == 400


async def test_uploads_and_copies_with_keys(world: World) -> None:
    client = world.client()
    which = {"Bucket": "bucket", "Key": "k"}
    made = await run(lambda: client.create_multipart_upload(**which, ChecksumAlgorithm="CRC32", **parameters(KEY)))
    upload = {**which, "UploadId": made["UploadId"]}
    for wrong in ({}, parameters(OTHER)):
        found = await refusal(lambda wrong=wrong: client.upload_part(**upload, PartNumber=1, Body=b"data", **wrong))
        assert found == (400, "InvalidRequest")
    part = await run(lambda: client.upload_part(**upload, PartNumber=1, Body=b"data", **parameters(KEY)))
    target = f"/bucket/k?uploadId={made['UploadId']}"
    assert part["ChecksumCRC32"].encode() in (await call(world, "GET", target, customer(KEY)))[2]
    assert part["ChecksumCRC32"].encode() not in (await call(world, "GET", target))[2]
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"], "ChecksumCRC32": part["ChecksumCRC32"]}]}
    assert await refusal(lambda: client.complete_multipart_upload(**upload, MultipartUpload=parts)) == (
        400,
        "InvalidRequest",
    )
    _, text_key, text_md5 = customer(KEY).values()
    text = {"SSECustomerKey": text_key, "SSECustomerKeyMD5": text_md5}
    done = await run(
        lambda: client.complete_multipart_upload(**upload, MultipartUpload=parts, SSECustomerAlgorithm="AES256", **text)
    )
    for answer in (made, part, done):
        assert "ServerSideEncryption" not in answer
    for answer in (made, part):
        assert answer["SSECustomerAlgorithm"] == "AES256"
    assert await refusal(lambda: client.copy_object(Bucket="bucket", Key="c", CopySource="bucket/k")) == (
        400,
        "InvalidRequest",
    )
    source = parameters(KEY, "CopySourceSSE")
    await run(
        lambda: client.copy_object(Bucket="bucket", Key="c", CopySource="bucket/k", **source, **parameters(OTHER))
    )
    got = await run(lambda: client.get_object(Bucket="bucket", Key="c", **parameters(OTHER)))
    assert await run(got["Body"].read) == b"data"
    # the key of an object is changed by a copy to itself
    await run(
        lambda: client.copy_object(
            Bucket="bucket", Key="c", CopySource="bucket/c", **parameters(OTHER, "CopySourceSSE"), **parameters(KEY)
        )
    )
    got = await run(lambda: client.get_object(Bucket="bucket", Key="c", **parameters(KEY)))
    assert await run(got["Body"].read) == b"data"


async def test_versions_have_keys_of_their_own(world: World) -> None:
    client = world.client()
    enabled = {"Status": "Enabled"}
    await run(lambda: client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration=enabled))
    made = {}
    for key, body in ((KEY, b"one"), (OTHER, b"two"), (None, b"three")):
        new = {"Bucket": "bucket", "Key": "k", "Body": body, **(parameters(key) if key else {})}
        answer = await run(lambda new=new: client.put_object(**new))
        made[body] = (answer["VersionId"], key)
    for body, (version, key) in made.items():
        for tried in (KEY, OTHER, None):
            extra = parameters(tried) if tried else {}
            which = {"Bucket": "bucket", "Key": "k", "VersionId": version, **extra}
            if tried == key:
                got = await run(lambda which=which: client.get_object(**which))
                assert await run(got["Body"].read) == body
            else:
                assert (await refusal(lambda which=which: client.get_object(**which)))[0] == 400


async def test_a_customers_key_in_a_query_is_in_no_log(world: World) -> None:
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in customer(KEY).items())
    assert (await call(world, "PUT", f"/bucket/k?{query}", body=b"data"))[0] == 200
    assert (await call(world, "GET", f"/bucket/k?{query}"))[2].endswith(b"data")
    assert (await call(world, "GET", "/bucket/k"))[0] == 400
    for done in world.done:
        for secret in customer(KEY).values():
            assert secret == "AES256" or quote(secret, safe="") not in done.target


async def test_a_form_encrypts_as_its_fields_say(world: World) -> None:
    for fields, key in ((customer(KEY), KEY), ({SSE: "aws:kms"}, None), ({SSE: "AES256"}, None)):
        document = policy(["starts-with", "$key", ""], *(["starts-with", f"${name}", ""] for name in fields))
        status, _, headers = await post(world, signed_form(document, {"key": "form", **fields}))
        assert status == 204
        assert headers.get(SSE) == fields.get(SSE)
        digest = headers.get(f"{SSE}-customer-key-MD5")
        assert digest == fields.get(f"{SSE}-customer-key-md5")
        read = customer(key) if key else {}
        assert (await call(world, "GET", "/bucket/form", read))[2].endswith(b"data")
    for wrong in (customer(KEY, key="AAAA"), {**customer(KEY), SSE: "AES256"}, {SSE: "aws:kms:dsse"}):
        document = policy(["starts-with", "$key", ""], *(["starts-with", f"${name}", ""] for name in wrong))
        before = state(world)
        assert (await post(world, signed_form(document, {"key": "form", **wrong})))[0] in (400, 501)
        assert state(world) == before


@pytest.mark.parametrize(
    ("remote", "secure", "headers", "taken"),
    [
        ("192.0.2.1", True, {}, True),
        ("192.0.2.1", False, {}, False),
        ("192.0.2.1", False, {"x-forwarded-proto": "https"}, False),
        ("10.1.2.3", False, {"x-forwarded-proto": "https"}, True),
        ("10.1.2.3", False, {"x-forwarded-proto": "http"}, False),
        ("10.1.2.3", False, {}, False),
        ("127.0.0.1", False, {}, True),
        ("::1", False, {}, True),
        ("::ffff:127.0.0.1", False, {}, True),
        ("::ffff:192.0.2.1", False, {}, False),
        ("", False, {}, False),
    ],
)
def test_a_customers_key_comes_over_tls_or_from_this_machine(
    remote: str, secure: bool, headers: dict[str, str], taken: bool
) -> None:
    nothing: Any = None
    front = Front(nothing, nothing, nothing, Endpoint(REGION, proxies=("10.0.0.0/8",)), nothing)
    request = Request("", "PUT", b"/", remote, secure, {**customer(KEY), **headers})
    if taken:
        assert enc.customer_key(front, request) == KEY
        assert base64.b64encode(KEY).decode() not in repr(Encryption(CUSTOMER, customer_key=KEY))
        return
    for ask in (lambda: enc.customer_key(front, request), lambda: enc.asked(front, request, request.headers)):
        with pytest.raises(errors.InvalidRequest, match="secure connection"):
            ask()
