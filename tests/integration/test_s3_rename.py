"""RenameObject over HTTP: boto3's requests, permissions, events."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from tests.integration.s3_front import ACCESS, ACCESS_ALT, REGION, SECRET_ALT, World, s3_world

DENIED = (403, "AccessDenied")


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


async def run(work: Callable[[Any], None], world: World) -> None:
    await asyncio.to_thread(work, world.client())


def refused(call: Callable[..., Any], **how: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as error:
        call(**how)
    return error.value.response["ResponseMetadata"]["HTTPStatusCode"], error.value.response["Error"]["Code"]


def keys(client: Any) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket="bucket").get("Contents", [])]


@pytest.mark.parametrize("size", [10, 5_000, 300_000])
async def test_boto3_renames_an_object(world: World, size: int) -> None:
    data = os.urandom(size)

    def work(client: Any) -> None:
        name, new = "old name/ü+%2F", "new/ä"
        client.put_object(
            Bucket="bucket", Key=name, Body=data, Metadata={"a": "b"}, ContentType="text/x", Tagging="t=1",
            ChecksumAlgorithm="SHA256",
        )  # fmt: skip
        before = client.head_object(Bucket="bucket", Key=name, ChecksumMode="ENABLED")
        for source in (quote(name, safe=""), f"/bucket/{quote(new)}"):
            client.rename_object(Bucket="bucket", Key=new, RenameSource=source)
            assert keys(client) == [new]
            name, new = new, name
        after = client.head_object(Bucket="bucket", Key=name, ChecksumMode="ENABLED")
        for answer in (before, after):
            del answer["ResponseMetadata"]
        assert after == before, "its time, too"
        assert client.get_object(Bucket="bucket", Key=name)["Body"].read() == data
        assert client.get_object_tagging(Bucket="bucket", Key=name)["TagSet"] == [{"Key": "t", "Value": "1"}]

    await run(work, world)


async def test_a_multipart_object_keeps_its_parts_and_moves_no_data(world: World) -> None:
    def work(client: Any) -> None:
        datas = [os.urandom(5 << 20), b"end"]
        made = client.create_multipart_upload(Bucket="bucket", Key="a", ChecksumAlgorithm="CRC32")
        how = {"Bucket": "bucket", "Key": "a", "UploadId": made["UploadId"]}
        parts = []
        for number, data in enumerate(datas, 1):
            answer = client.upload_part(PartNumber=number, Body=data, ChecksumAlgorithm="CRC32", **how)
            parts.append({"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": answer["ChecksumCRC32"]})
        client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **how)
        fragments = {disk: set(store.fragments) for disk, store in world.below.disks.disks.items()}
        before = client.head_object(Bucket="bucket", Key="a", ChecksumMode="ENABLED")
        client.rename_object(Bucket="bucket", Key="b", RenameSource="a")
        after = client.head_object(Bucket="bucket", Key="b", ChecksumMode="ENABLED")
        for name in ("ETag", "ChecksumCRC32", "ChecksumType", "LastModified", "ContentLength"):
            assert after[name] == before[name]
        assert client.get_object(Bucket="bucket", Key="b")["Body"].read() == b"".join(datas)
        assert keys(client) == ["b"]
        assert client.get_object(Bucket="bucket", Key="b", PartNumber=2)["Body"].read() == b"end"
        assert client.head_object(Bucket="bucket", Key="b", PartNumber=1)["PartsCount"] == 2
        assert {disk: set(store.fragments) for disk, store in world.below.disks.disks.items()} == fragments

    await run(work, world)


async def test_conditions_and_tokens(world: World) -> None:
    def work(client: Any) -> None:
        client.put_object(Bucket="bucket", Key="a", Body=b"a")
        etag = client.put_object(Bucket="bucket", Key="b", Body=b"b")["ETag"]
        how = {"Bucket": "bucket", "Key": "b", "RenameSource": "a"}
        failed = (412, "PreconditionFailed")
        assert refused(client.rename_object, DestinationIfNoneMatch="*", **how) == failed
        assert refused(client.rename_object, SourceIfMatch=etag, **how) == failed
        assert refused(client.rename_object, DestinationIfMatch='"x"', **how) == failed
        assert keys(client) == ["a", "b"]
        client.rename_object(DestinationIfMatch=etag, ClientToken="once", **how)
        client.rename_object(DestinationIfMatch=etag, ClientToken="once", **how)
        assert keys(client) == ["b"]
        how["RenameSource"] = "c"
        assert refused(client.rename_object, ClientToken="once", **how) == (400, "IdempotencyParameterMismatch")
        assert refused(client.rename_object, **how) == (404, "NoSuchKey")

    await run(work, world)


async def test_a_bucket_with_versioning_has_no_renames(world: World) -> None:
    def work(client: Any) -> None:
        client.put_object(Bucket="bucket", Key="a", Body=b"a")
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        answer = refused(client.rename_object, Bucket="bucket", Key="b", RenameSource="a")
        assert answer == (501, "NotImplemented")
        assert keys(client) == ["a"]

    await run(work, world)


NEEDED = ("s3:GetObject", "s3:DeleteObject", "s3:PutObject")


@pytest.mark.parametrize("missing", [None, *NEEDED])
async def test_another_user_needs_all_of_three_permissions(world: World, missing: str | None) -> None:
    def statement(action: str) -> dict[str, Any]:
        key = "new" if action == "s3:PutObject" else "old"
        resource = f"arn:aws:s3:::bucket/{key}"
        return {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": action, "Resource": resource}

    statements = [statement(action) for action in NEEDED if action != missing]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})

    def work(owner: Any) -> None:
        other = world.client(ACCESS_ALT, SECRET_ALT)
        owner.delete_public_access_block(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="old", Body=b"old")
        how = {"Bucket": "bucket", "Key": "new", "RenameSource": "old"}
        assert refused(other.rename_object, **how) == DENIED
        owner.put_bucket_policy(Bucket="bucket", Policy=policy)
        if missing is not None:
            assert refused(other.rename_object, **how) == DENIED
            assert keys(owner) == ["old"]
            return
        assert refused(other.rename_object, Bucket="bucket", Key="new", RenameSource="none") == DENIED
        other.rename_object(**how)
        assert keys(owner) == ["new"]
        assert refused(other.rename_object, **how) == DENIED, "who may not list does not learn that it is gone"
        owner_id = owner.list_objects_v2(Bucket="bucket", FetchOwner=True)["Contents"][0]["Owner"]["ID"]
        assert owner_id == owner.list_buckets()["Owner"]["ID"], "the owner stays"

    await run(work, world)


async def test_a_stranger_who_may_list_can_send_a_request_again(world: World) -> None:
    """The old key is gone then, and the sender may know that."""
    allow = {"Effect": "Allow", "Principal": {"AWS": "*"}}
    statements = [
        {**allow, "Action": [*NEEDED], "Resource": "arn:aws:s3:::bucket/*"},
        {**allow, "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::bucket"},
    ]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})

    def work(owner: Any) -> None:
        other = world.client(ACCESS_ALT, SECRET_ALT)
        owner.delete_public_access_block(Bucket="bucket")
        owner.put_bucket_policy(Bucket="bucket", Policy=policy)
        owner.put_object(Bucket="bucket", Key="old", Body=b"old")
        how = {"Bucket": "bucket", "Key": "new", "RenameSource": "old"}
        for _ in range(2):
            other.rename_object(ClientToken="once", **how)
        assert refused(other.rename_object, **how) == (404, "NoSuchKey")
        assert keys(owner) == ["new"]

    await run(work, world)


async def test_tags_move_only_for_who_may_read_and_put_them(world: World) -> None:
    """Else who may read the tags of the new key learns those of the old one, or gives the new key tags that others'
    rights depend on."""
    allow = {"Effect": "Allow", "Principal": {"AWS": "*"}}
    statements = [
        {**allow, "Action": [*NEEDED], "Resource": "arn:aws:s3:::bucket/*"},
        {**allow, "Action": "s3:GetObjectTagging", "Resource": ["arn:aws:s3:::bucket/n*"]},
        {**allow, "Action": "s3:PutObjectTagging", "Resource": ["arn:aws:s3:::bucket/next"]},
    ]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})

    def work(owner: Any) -> None:
        other = world.client(ACCESS_ALT, SECRET_ALT)
        owner.delete_public_access_block(Bucket="bucket")
        owner.put_bucket_policy(Bucket="bucket", Policy=policy)
        owner.put_object(Bucket="bucket", Key="old", Body=b"old", Tagging="t=1")
        how = {"Bucket": "bucket", "Key": "new"}
        assert refused(other.rename_object, RenameSource="old", **how) == DENIED
        assert keys(owner) == ["old"]
        owner.delete_object_tagging(Bucket="bucket", Key="old")
        other.rename_object(RenameSource="old", **how)
        owner.put_object_tagging(Bucket="bucket", Key="new", Tagging={"TagSet": [{"Key": "t", "Value": "1"}]})
        assert refused(other.rename_object, Bucket="bucket", Key="other", RenameSource="new") == DENIED
        other.rename_object(Bucket="bucket", Key="next", RenameSource="new")
        assert keys(owner) == ["next"]
        assert owner.get_object_tagging(Bucket="bucket", Key="next")["TagSet"] == [{"Key": "t", "Value": "1"}]
        assert refused(other.rename_object, RenameSource="none", **how) == DENIED

    await run(work, world)


async def test_a_condition_of_the_new_key_counts_for_no_policy_on_the_old_one(world: World) -> None:
    """A policy that lets delete only with If-Match wants the tag of the object that goes."""
    allow = {"Effect": "Allow", "Principal": {"AWS": "*"}, "Resource": "arn:aws:s3:::bucket/*"}
    conditional = {"Action": "s3:DeleteObject", "Condition": {"Null": {"s3:if-match": "false"}}}
    statements = [{**allow, "Action": ["s3:GetObject", "s3:PutObject"]}, {**allow, **conditional}]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})

    def work(owner: Any) -> None:
        other = world.client(ACCESS_ALT, SECRET_ALT)
        owner.delete_public_access_block(Bucket="bucket")
        owner.put_bucket_policy(Bucket="bucket", Policy=policy)
        etag = owner.put_object(Bucket="bucket", Key="old", Body=b"old")["ETag"]
        new = owner.put_object(Bucket="bucket", Key="new", Body=b"new")["ETag"]
        how = {"Bucket": "bucket", "Key": "new", "RenameSource": "old"}
        assert refused(other.rename_object, DestinationIfMatch=new, **how) == DENIED
        other.rename_object(SourceIfMatch=etag, **how)
        assert keys(owner) == ["new"]

    await run(work, world)


async def test_policies_see_how_the_request_was_signed_at_both_keys(world: World) -> None:
    """A policy may deny the older signature, or demand the newer one:
    https://docs.aws.amazon.com/AmazonS3/latest/API/bucket-policy-s3-sigv4-conditions.html
    """
    statement = {"Principal": {"AWS": "*"}, "Resource": "arn:aws:s3:::bucket/*"}
    signed = {"s3:signatureversion": "AWS4-HMAC-SHA256", "s3:authType": "REST-HEADER"}
    allow = {**statement, "Effect": "Allow", "Action": list(NEEDED), "Condition": {"StringEquals": signed}}
    old = {"s3:signatureversion": "AWS"}
    deny = {**statement, "Effect": "Deny", "Action": "s3:*", "Condition": {"StringEquals": old}}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allow, deny]})

    def work(owner: Any) -> None:
        owner.delete_public_access_block(Bucket="bucket")
        owner.put_bucket_policy(Bucket="bucket", Policy=policy)
        owner.put_object(Bucket="bucket", Key="old", Body=b"old")
        world.client(ACCESS_ALT, SECRET_ALT).rename_object(Bucket="bucket", Key="new", RenameSource="old")
        assert keys(owner) == ["new"]

    await run(work, world)
