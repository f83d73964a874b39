"""A copy that takes long is answered early: white space keeps its client waiting, and the end says how it went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from storaged.errors import DataDamaged
from storaged.s3 import early
from tests.integration.s3_front import World, s3_world, signed
from tests.integration.test_s3_iam import client as iam_of
from tests.integration.test_s3_iam import made_user, may, refused, with_key
from tests.patience import GUARD_S

BODY = b"data" * 1000


@pytest_asyncio.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Every copy is long."""
    monkeypatch.setattr(early, "SILENT_S", 0.0)
    monkeypatch.setattr(early, "EVERY_S", 0.01)
    async with s3_world() as world:
        for name in ("copy", "copy_part"):
            monkeypatch.setattr(world.objects, name, slow(getattr(world.objects, name)))
        client = world.client()
        await asyncio.to_thread(client.create_bucket, Bucket="bucket")
        await asyncio.to_thread(client.put_object, Bucket="bucket", Key="k", Body=BODY)
        yield world


def slow(work: Any) -> Any:
    async def slowly(*which: Any, **how: Any) -> Any:
        await asyncio.sleep(0.2)
        return await work(*which, **how)

    return slowly


async def test_a_long_copy_is_answered_early_and_the_connection_goes_on(world: World) -> None:
    raw = signed(world, "PUT", "/bucket/copy", headers={"x-amz-copy-source": "/bucket/k"})
    head, _, body = (await world.raw(raw.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))).partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"\r\nTransfer-Encoding: chunked" in head
    assert b"Content-Length" not in head
    assert body.count(b"1\r\n \r\n") > 2
    assert body.endswith(b"\r\n0\r\n\r\n")
    assert await world.stored() == {b"k": BODY, b"copy": BODY}

    def run() -> None:
        client = world.client(max_pool_connections=1)
        for _ in range(3):
            found = client.copy_object(Bucket="bucket", Key="other", CopySource="/bucket/k")
            assert found["CopyObjectResult"]["ETag"] == client.head_object(Bucket="bucket", Key="k")["ETag"]
        upload = client.create_multipart_upload(Bucket="bucket", Key="parts")["UploadId"]
        where = {"Bucket": "bucket", "Key": "parts", "UploadId": upload}
        part = client.upload_part_copy(**where, PartNumber=1, CopySource="/bucket/k")["CopyPartResult"]["ETag"]
        client.complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part}]})
        assert client.get_object(Bucket="bucket", Key="parts")["Body"].read() == BODY

    await asyncio.to_thread(run)


async def test_an_error_of_a_long_copy_comes_in_its_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def damaged(*_: Any, **__: Any) -> None:
        raise DataDamaged

    monkeypatch.setattr(world.objects, "copy", slow(damaged))
    client = world.client(retries={"max_attempts": 0})

    def run() -> str:
        with pytest.raises(ClientError) as failed:
            client.copy_object(Bucket="bucket", Key="copy", CopySource="/bucket/k")
        return str(failed.value.response["Error"]["Code"])

    assert await asyncio.to_thread(run) == "ServiceUnavailable"
    async with asyncio.timeout(GUARD_S):
        while world.done[-1].reply.code != "ServiceUnavailable":  # noqa: ASYNC110 - noted after the last byte
            await asyncio.sleep(0.01)
    assert await world.stored() == {b"k": BODY}


async def test_an_early_error_says_no_more_of_the_target_than_one_in_time(world: World) -> None:
    """A sender who may not list a bucket does not learn that a key is missing."""
    await asyncio.to_thread(world.client().create_bucket, Bucket="target")

    def ask(*listed: str) -> str:
        actions = ["s3:GetObject", "s3:GetObjectTagging", "s3:PutObject"]
        key = made_user(iam_of(world, "iam"), f"u{len(listed)}", may(actions), may("s3:ListBucket", list(listed)))
        copy = with_key(world, "s3", key).copy_object
        return refused(copy, Bucket="target", Key="none", CopySource="/bucket/k", IfMatch='"e"')[1]

    source, target = "arn:aws:s3:::bucket", "arn:aws:s3:::target"
    assert await asyncio.to_thread(ask, source, target) == "NoSuchKey"
    assert await asyncio.to_thread(ask, source) == "AccessDenied"


async def test_in_a_bucket_with_versions_the_answer_waits_for_the_version(world: World) -> None:
    def run() -> None:
        client = world.client()
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        assert client.copy_object(Bucket="bucket", Key="copy", CopySource="/bucket/k")["VersionId"]

    await asyncio.to_thread(run)


async def test_a_client_that_leaves_ends_its_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    async def endless(*_: Any, **__: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(world.objects, "copy", endless)
    raw = signed(world, "PUT", "/bucket/copy", headers={"x-amz-copy-source": "/bucket/k"})
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(raw)
    await reader.readuntil(b"\r\n\r\n")
    assert not ended.is_set()
    writer.transport.abort()
    await asyncio.wait_for(ended.wait(), GUARD_S)
    assert await world.stored() == {b"k": BODY}
