"""Chunks of a byte make no other client wait, and a chunk of gigabytes takes no memory: what a client's chunks cost in
one turn of the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from storaged import errors
from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.http import chunks
from storaged.s3.http.body import RequestBody
from storaged.s3.http.chunks import CHUNKS_A_TURN, ChunkReader, TransferChunks
from storaged.s3.http.limits import Limits
from storaged.wire import Buffer

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


def test_what_a_decoder_is_fed_may_end_anywhere() -> None:
    wire = b"5;x=y\r\nhello\r\n1\r\n \r\n0\r\na: b\r\n\r\nGET"
    for cut in range(len(wire) + 1):
        decoder = TransferChunks()
        found = b"".join([*decoder.feed(wire[:cut]), *decoder.feed(wire[cut:])])
        assert (found, decoder.ended, bytes(decoder.rest)) == (b"hello ", True, b"GET")
