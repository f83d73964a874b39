"""Chunks of a byte keep nobody waiting, and a chunk of gigabytes takes no memory: what a client's chunks cost in one
turn of the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from storaged import errors
from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.http import chunks
from storaged.s3.http.body import RequestBody
from storaged.s3.http.chunks import CHUNKS_A_TURN, ChunkReader, TransferChunks
from storaged.s3.http.limits import Limits
from storaged.wire import Buffer
from tests.integration.s3_front import ACCESS, REGION, World, read_head, s3_world, signed
from tests.patience import GUARD_S

TINY = b"1\r\nx\r\n"
MANY = 5000
KEY = sigv4.ChunkKey(b"k" * 32, "20130524T000000Z", "20130524/r/s3/aws4_request", "0" * 64)


class Source:
    """A body's connection that has nothing more."""

    held_back = False

    def pause_reading(self) -> None:
        self.held_back = True

    def on_body_done(self, rest: Buffer = b"") -> None:
        self.rest = bytes(rest)

    def on_admitted(self) -> None: ...

    async def wait_for_body(self, body: RequestBody) -> None:
        raise AssertionError("nothing more comes")


@contextmanager
def counted_turns() -> Iterator[list[int]]:
    """How many turns the loop had, while something else ran."""
    turns = [0]

    async def tick() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    task = asyncio.get_running_loop().create_task(tick())
    yield turns
    task.cancel()


@contextmanager
def chunks_of_each_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What each call of a decoder took."""
    found: list[int] = []
    feed = ChunkReader.feed

    def counted(self: ChunkReader, data: Buffer) -> list[Buffer]:
        before = self.chunks
        try:
            return feed(self, data)
        finally:
            found.append(self.chunks - before)

    with monkeypatch.context() as patch:
        patch.setattr(chunks.ChunkReader, "feed", counted)
        yield found


@asynccontextmanager
async def bucket(limits: Limits | None = None) -> AsyncIterator[World]:
    async with s3_world(limits) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


def decoded(decoder: ChunkedDecoder, wire: Iterable[bytes]) -> bytes:
    data = b"".join(bytes(piece) for read in wire for piece in decoder.feed(read))
    decoder.finish()
    return data


# --- turns


@pytest.mark.parametrize("reader", ["whole", "pieces", "discard", "read"])
async def test_others_have_their_turn_between_a_few_chunks_of_the_transfer_coding(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = RequestBody(Source(), None, None, Limits())
    with chunks_of_each_call(monkeypatch) as calls, counted_turns() as turns:
        body.admit()
        body.feed(TINY * MANY + b"0\r\n\r\n")
        if reader == "whole":
            assert bytes(await body.whole()) == b"x" * MANY
        elif reader == "pieces":
            assert b"".join([bytes(piece) async for piece in body]) == b"x" * MANY
        elif reader == "read":
            assert await body.read(MANY) == b"x" * MANY
        else:
            assert await body.discard(1 << 20, 10)
    assert max(calls) <= CHUNKS_A_TURN
    assert turns[0] >= MANY // CHUNKS_A_TURN


@pytest.mark.parametrize("signed_chunks", [False, True])
async def test_others_have_their_turn_between_a_few_chunks_of_aws_chunked(
    signed_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire, previous = b"", KEY.seed
    for data in (b"x",) * MANY + (b"",):
        line = b"%x" % len(data)
        if signed_chunks:
            previous = sigv4.chunk_signature(KEY, previous, hashlib.sha256(data).hexdigest())
            line += b";chunk-signature=" + previous.encode()
        wire += line + b"\r\n" + data + b"\r\n"
    source = Source()
    body = RequestBody(source, len(wire), None, Limits(read_buffer_bytes=1 << 20))
    body.decoder = ChunkedDecoder(KEY if signed_chunks else None, ())
    with chunks_of_each_call(monkeypatch) as calls, counted_turns() as turns:
        body.admit()
        body.feed(wire)
        assert body.try_whole() is None, "too many for one turn: the task reads them"
        assert not body.failed
        assert b"".join([bytes(piece) async for piece in body]) == b"x" * MANY
    assert max(calls) <= CHUNKS_A_TURN
    assert turns[0] >= MANY // CHUNKS_A_TURN


async def test_nothing_of_a_request_that_is_not_authenticated_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    with chunks_of_each_call(monkeypatch) as calls:
        source = Source()
        body = RequestBody(source, None, None, Limits(read_buffer_bytes=1000))
        body.feed(TINY * MANY)
        assert source.held_back
        assert calls == []
        body.admit()
        body.feed(b"0\r\n\r\nGET /")
        assert bytes(await body.whole()) == b"x" * MANY
        assert source.rest == b"GET /"


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


# --- memory


async def test_a_signed_chunk_takes_no_memory_however_large_it_is() -> None:
    size, step = 64 << 20, 65536
    body = RequestBody(Source(), None, None, Limits())
    decoder = body.decoder = ChunkedDecoder(KEY, ())
    decoder.feed(b"%x;chunk-signature=%s\r\n" % (size, b"a" * 64))
    block, taken, peak = bytes(step), 0, 0
    tracemalloc.start()
    try:
        for _ in range(size // step - 1):
            taken += sum(len(piece) for piece in decoder.feed(block))
            peak = max(peak, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert taken == size - step
    assert peak < 4 * step
    with pytest.raises(errors.SignatureDoesNotMatch):
        decoder.feed(block)


async def test_a_body_that_comes_byte_by_byte_is_kept_in_little_more_than_its_bytes() -> None:
    body, size = RequestBody(Source(), 20_000, None, Limits()), 20_000
    tracemalloc.start()
    try:
        for _ in range(size // 2):
            body.feed(b"ab")
        assert tracemalloc.get_traced_memory()[0] < size + 10_000
    finally:
        tracemalloc.stop()
    assert bytes(await body.whole()) == b"ab" * (size // 2)


# --- framing


@pytest.mark.parametrize(
    "wire",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\r\n0\n\r\n",
        b"5\r\nhello\r\n0\r\n\n",
        b"5\r\nhello\r\n0\r\n\r\n\r\n",
        b"5\xa0\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"5\x85\r\nhello\r\n0\r\n\r\n",
        b"\xb2\r\nhi\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_aws_chunked_is_refused_where_it_is_not_exactly_as_documented(wire: bytes) -> None:
    with pytest.raises((errors.InvalidRequest, errors.MalformedTrailerError)):
        ChunkedDecoder(None, ()).feed(wire)


@pytest.mark.parametrize(
    "wire", [b"5\r\nhello\r\n0\r\n", b"5\r\nhello\r\n0\r\n\r", b"5\r\nhello\r\n", b"5\r\nhello\r\n0"]
)
def test_aws_chunked_without_its_last_line_is_incomplete(wire: bytes) -> None:
    decoder = ChunkedDecoder(None, ())
    decoder.feed(wire)
    with pytest.raises(errors.IncompleteBody):
        decoder.finish()


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\r\n", b"\n\r\n\r\n"])
def test_an_unsigned_trailer_may_end_as_aws_and_minio_clients_end_it(end: bytes) -> None:
    decoder = ChunkedDecoder(None, ("x-amz-checksum-crc32",))
    assert (
        decoded(
            decoder, [b"1\r\na\r\n0\r\nx-amz-checksum-crc32:AAAAAA==", *(end[at : at + 1] for at in range(len(end)))]
        )
        == b"a"
    )
    assert decoder.trailing_checksums() == {"CRC32": "AAAAAA=="}


@pytest.mark.parametrize(
    "end",
    [
        b"\n",
        b"\r\n\n",
        b"\n\n",
        b"\n\r\n\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"\n\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n",
        b"\r\n",
    ],
)
def test_a_trailer_that_ends_otherwise_is_refused(end: bytes) -> None:
    with pytest.raises(errors.S3Error):
        decoded(ChunkedDecoder(None, ("x-amz-checksum-crc32",)), [b"0\r\nx-amz-checksum-crc32:AAAAAA==" + end])


def test_nothing_comes_between_the_signature_of_the_trailers_and_the_end() -> None:
    last = sigv4.chunk_signature(KEY, KEY.seed, hashlib.sha256(b"").hexdigest())
    signature = sigv4.trailer_signature(KEY, last, b"")
    decoder = ChunkedDecoder(KEY, ("x-amz-checksum-crc32",))
    with pytest.raises(errors.MalformedTrailerError):
        decoder.feed(
            b"0;chunk-signature=%s\r\nx-amz-trailer-signature:%s\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
            % (last.encode(), signature.encode())
        )


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


def test_what_a_decoder_is_fed_may_end_anywhere() -> None:
    wire = b"5;x=y\r\nhello\r\n1\r\n \r\n0\r\na: b\r\n\r\nGET"
    for cut in range(len(wire) + 1):
        decoder = TransferChunks()
        found = b"".join([*decoder.feed(wire[:cut]), *decoder.feed(wire[cut:])])
        assert (found, decoder.ended, bytes(decoder.rest)) == (b"hello ", True, b"GET")
