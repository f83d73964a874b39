"""Chunks of a byte make no other client wait, and a chunk of gigabytes takes no memory: what a client's chunks cost in
one turn of the event loop.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from storaged.s3.http.chunks import CHUNKS_A_TURN
from storaged.s3.http.limits import Limits
from tests.integration.s3_front import ACCESS, REGION, World, read_head, s3_world, signed
from tests.patience import GUARD_S
from tests.unit.test_s3_chunk_turns import MANY, TINY, chunks_of_each_call


@asynccontextmanager
async def bucket(limits: Limits | None = None) -> AsyncIterator[World]:
    async with s3_world(limits) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


@pytest.mark.parametrize("target", ["/bucket/k", "/bucket"])
async def test_tiny_chunks_of_who_is_not_authenticated_end_the_connection_soon(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits()
    method, kind = (
        ("PUT", "") if target == "/bucket/k" else ("POST", "Content-Type: multipart/form-data; boundary=a\r\n")
    )
    async with bucket(limits) as world:
        with chunks_of_each_call(monkeypatch) as calls:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(
                f"{method} {target} HTTP/1.1\r\nHost: h\r\n{kind}Transfer-Encoding: chunked\r\n\r\n".encode()
                + TINY * 20_000
            )
            head = await read_head(reader)
            assert head.startswith(b"HTTP/1.1 403 " if method == "PUT" else b"HTTP/1.1 400 ")
            await asyncio.wait_for(_ended(reader), GUARD_S)
            writer.close()
    assert sum(calls) <= limits.unauthenticated_chunks + CHUNKS_A_TURN
    assert max(calls, default=0) <= CHUNKS_A_TURN


async def _ended(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(65536):
            pass
    except ConnectionError:
        pass


async def test_tiny_chunks_of_a_signed_request_are_stored_and_what_follows_them_is_answered() -> None:
    async with bucket() as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        plain = b"x" * MANY
        request = signed(world, "PUT", "/bucket/k", body=plain, send_body=False)
        writer.write(
            request.replace(b"Content-Length: %d\r\n" % MANY, b"Transfer-Encoding: chunked\r\n")
            + TINY * MANY
            + b"0\r\n\r\n"
        )
        writer.write(signed(world, "GET", "/bucket/k"))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(MANY) == plain
        writer.close()


async def test_a_chunked_body_that_came_whole_before_its_client_ended_its_side_is_whole() -> None:
    async with bucket() as world:
        request = signed(world, "PUT", "/bucket/k", body=b"hello", send_body=False)
        request = request.replace(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(
            request.replace(b"PUT /bucket/k", b"PUT /bucket/k?partNumber=1&uploadId=none") + b"5\r\nhello\r\n0\r\n\r\n"
        )
        writer.write(signed(world, "HEAD", "/bucket/none"))
        writer.write_eof()
        answers = await asyncio.wait_for(reader.read(), GUARD_S)
        assert answers.count(b"HTTP/1.1 ") == 2
        writer.close()


@pytest.mark.parametrize(
    "payload", ["UNSIGNED-PAYLOAD", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", hashlib.sha256(b"").hexdigest()]
)
async def test_a_trailer_that_is_announced_where_none_can_come_is_refused(payload: str) -> None:
    async with bucket() as world:
        headers = {"x-amz-trailer": "x-amz-checksum-crc32", "x-amz-decoded-content-length": "0"}
        request = signed(world, "PUT", "/bucket/k", headers=headers, payload=payload)
        answer = await world.raw(request.replace(b"Host:", b"Connection: close\r\nHost:", 1))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"x-amz-trailer" in answer
        assert not await world.stored()
