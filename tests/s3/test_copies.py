"""Copies as boto3 sees them, over the whole cluster: those between buckets borrow the data of their source, which may
go, with its bucket. What AWS answers otherwise is in the CHANGELOG.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.s3.test_versions import empty, refused

MIB = 1 << 20
META = {"Metadata": {"of": "the source"}, "ContentType": "text/x", "CacheControl": "no-cache", "Tagging": "t=1"}

_numbers = itertools.count()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Any:
    return cluster.boto3(attempts=3)


def buckets(client: Any, *names: str) -> list[str]:
    found = [f"copies-{next(_numbers)}-{name}" for name in names]
    for bucket in found:
        client.create_bucket(Bucket=bucket)
    return found


def upload(client: Any, bucket: str, key: str, parts: list[bytes]) -> None:
    named = {"Bucket": bucket, "Key": key}
    upload_id = client.create_multipart_upload(**named, **META, ChecksumAlgorithm="SHA256")["UploadId"]
    done = []
    for number, part in enumerate(parts, 1):
        made = client.upload_part(**named, UploadId=upload_id, PartNumber=number, Body=part, ChecksumAlgorithm="SHA256")
        done.append({"PartNumber": number, "ETag": made["ETag"], "ChecksumSHA256": made["ChecksumSHA256"]})
    client.complete_multipart_upload(**named, UploadId=upload_id, MultipartUpload={"Parts": done})


def end(client: Any, *names: str) -> None:
    for bucket in names:
        empty(client, bucket)
        client.delete_bucket(Bucket=bucket)


def body(client: Any, bucket: str, key: str, **how: Any) -> bytes:
    found: bytes = client.get_object(Bucket=bucket, Key=key, **how)["Body"].read()
    return found


def shown(client: Any, bucket: str, key: str) -> dict[str, Any]:
    """What HEAD says, but for its times."""
    found: dict[str, Any] = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    return {name: value for name, value in found.items() if name not in ("ResponseMetadata", "LastModified")}


@pytest.mark.parametrize("sizes", [[300_000], [7 * MIB], [5 * MIB, 6 * MIB + 1, 300_000]], ids=["one", "two", "parts"])
def test_a_copy_outlives_the_buckets_that_it_came_through(client: Any, sizes: list[int]) -> None:
    first, second, third = buckets(client, "first", "second", "third")
    parts = [os.urandom(size) for size in sizes]
    data = b"".join(parts)
    if len(parts) > 1:
        upload(client, first, "a", parts)
    else:
        client.put_object(Bucket=first, Key="a", Body=data, **META)
    before = shown(client, first, "a")
    client.copy_object(Bucket=second, Key="b", CopySource={"Bucket": first, "Key": "a"})
    opened = client.create_multipart_upload(Bucket=first, Key="open")["UploadId"]
    client.upload_part(Bucket=first, Key="open", UploadId=opened, PartNumber=1, Body=b"part")
    end(client, first)
    assert refused(client.head_object, Bucket=first, Key="a")[0] == 404
    assert shown(client, second, "b") == before
    assert body(client, second, "b") == data
    assert body(client, second, "b", Range=f"bytes={len(data) // 3}-{len(data) - 2}") == data[len(data) // 3 : -1]
    for number, part in enumerate(parts, 1):
        assert body(client, second, "b", PartNumber=number) == part

    # a deleted bucket lends no more to others: these copies have data of their own, and are in one part
    client.copy_object(Bucket=third, Key="c", CopySource={"Bucket": second, "Key": "b"})
    end(client, second)
    client.create_bucket(Bucket=first)
    assert "Versions" not in client.list_object_versions(Bucket=first)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=first)
    client.copy_object(Bucket=first, Key="a", CopySource={"Bucket": third, "Key": "c"})
    end(client, third)
    assert body(client, first, "a") == data
    after = shown(client, first, "a")
    assert {name for name in after if after[name] != before[name]} == (
        {"ETag", "ChecksumSHA256", "ChecksumType"} if len(parts) > 1 else set()
    )
    assert client.get_object_tagging(Bucket=first, Key="a")["TagSet"] == [{"Key": "t", "Value": "1"}]
    end(client, first)


def test_what_lends_and_what_borrows_is_overwritten_by_any_size(client: Any) -> None:
    lends, borrows = buckets(client, "lends", "borrows")
    old = os.urandom(300_000)
    for key, size in {"tiny": 10, "small": 200_000, "block": MIB, "blocks": 9 * MIB}.items():
        for over, kept in ((lends, borrows), (borrows, lends)):
            client.put_object(Bucket=lends, Key=key, Body=old)
            client.copy_object(Bucket=borrows, Key=key, CopySource={"Bucket": lends, "Key": key})
            new = os.urandom(size)
            client.put_object(Bucket=over, Key=key, Body=new)
            assert body(client, over, key) == new
            assert body(client, kept, key) == old
    data = body(client, lends, "blocks")
    source = {"Bucket": borrows, "Key": "blocks"}
    assert refused(client.copy_object, Bucket=borrows, Key="blocks", CopySource=source)[:2] == (400, "InvalidRequest")
    client.copy_object(Bucket=lends, Key="again", CopySource=source)
    changed = {"MetadataDirective": "REPLACE", "Metadata": {"of": "the copy"}}
    client.copy_object(Bucket=borrows, Key="blocks", CopySource=source, **changed)
    found = client.head_object(Bucket=borrows, Key="blocks")
    assert (found["Metadata"], found["ContentLength"]) == ({"of": "the copy"}, 9 * MIB)
    end(client, lends)
    assert body(client, borrows, "blocks") != data
    end(client, borrows)


def test_a_copy_has_the_lock_the_encryption_and_the_versions_of_its_bucket(client: Any) -> None:
    source, keeps = buckets(client, "source", "keeps")
    locks = f"copies-{next(_numbers)}-locks"
    client.create_bucket(Bucket=locks, ObjectLockEnabledForBucket=True)
    retention = {"Mode": "GOVERNANCE", "Days": 1}
    client.put_object_lock_configuration(
        Bucket=locks, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": retention}}
    )
    client.put_bucket_versioning(Bucket=keeps, VersioningConfiguration={"Status": "Enabled"})
    kms = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}, "BucketKeyEnabled": True}
    client.put_bucket_encryption(Bucket=keeps, ServerSideEncryptionConfiguration={"Rules": [kms]})
    client.put_bucket_versioning(Bucket=source, VersioningConfiguration={"Status": "Enabled"})
    datas = [os.urandom(size) for size in (300_000, 6 * MIB)]
    versions = [client.put_object(Bucket=source, Key="k", Body=data)["VersionId"] for data in datas]
    marker = client.delete_object(Bucket=source, Key="k")["VersionId"]
    named = {"Bucket": source, "Key": "k"}
    for gone, answer in (({}, (404, "NoSuchKey")), ({"VersionId": marker}, (400, "InvalidRequest"))):
        assert refused(client.copy_object, Bucket=keeps, Key="k", CopySource=named | gone)[:2] == answer

    copies = []
    for version in versions:
        made = client.copy_object(Bucket=keeps, Key="k", CopySource=named | {"VersionId": version})
        assert (made["CopySourceVersionId"], made["ServerSideEncryption"]) == (version, "aws:kms")
        copies.append(made["VersionId"])
    locked = client.copy_object(Bucket=locks, Key="k", CopySource=named | {"VersionId": versions[1]})["VersionId"]
    end(client, source)
    for version, data in zip(copies, datas, strict=True):
        assert body(client, keeps, "k", VersionId=version) == data
        found = client.head_object(Bucket=keeps, Key="k", VersionId=version)
        assert (found["ServerSideEncryption"], found["BucketKeyEnabled"]) == ("aws:kms", True)
    end(client, keeps)
    assert client.head_object(Bucket=locks, Key="k")["ObjectLockMode"] == "GOVERNANCE"
    assert refused(client.delete_object, Bucket=locks, Key="k", VersionId=locked)[:2] == (403, "AccessDenied")
    assert body(client, locks, "k") == datas[1]
    client.delete_object(Bucket=locks, Key="k", VersionId=locked, BypassGovernanceRetention=True)
    end(client, locks)
