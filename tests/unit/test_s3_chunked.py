"""aws-chunked bodies: AWS's examples byte by byte, and every way of breaking them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from storaged import errors
from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "sigv4.json").read_text())
CRC = "x-amz-checksum-crc32c"


def chunk_key(case: dict[str, Any]) -> sigv4.ChunkKey:
    key = sigv4.signing_key(VECTORS["secret_key"], "20130524", "us-east-1")
    return sigv4.ChunkKey(key, VECTORS["timestamp"], "20130524/us-east-1/s3/aws4_request", case["seed"])


def body_of(case: dict[str, Any], *, fill: bytes = b"a", trailer_end: bytes = b"\r\n") -> bytes:
    body = b""
    for size, signature in zip(case["sizes"], case["signatures"], strict=True):
        body += f"{size:x};chunk-signature={signature}\r\n".encode() + fill * size
        if size:
            body += b"\r\n"
    if "trailer_name" in case:
        body += f"{case['trailer_name']}:{case['trailer_value']}".encode() + trailer_end
        body += f"x-amz-trailer-signature:{case['trailer_signature']}\r\n".encode()
    return body + b"\r\n"


def decode(decoder: ChunkedDecoder, body: bytes, step: int) -> bytes:
    out = b"".join(
        bytes(data) for start in range(0, len(body), step) for data in decoder.feed(body[start : start + step])
    )
    decoder.finish()
    return out


@pytest.mark.parametrize("step", [1 << 20, 4096, 1000, 7])
def test_the_aws_example_of_signed_chunks_decodes_in_pieces_of_any_size(step: int) -> None:
    case = VECTORS["chunked"]
    assert decode(ChunkedDecoder(chunk_key(case), ()), body_of(case), step) == b"a" * 66560


@pytest.mark.parametrize("trailer_end", [b"\r\n", b"\n", b"\n\r\n"])
def test_the_aws_example_of_a_signed_trailer_decodes_with_each_of_its_line_ends(trailer_end: bytes) -> None:
    case = VECTORS["chunked_trailer"]
    decoder = ChunkedDecoder(chunk_key(case), (CRC,))
    assert decode(decoder, body_of(case, trailer_end=trailer_end), 1000) == b"a" * 66560
    assert decoder.trailing_checksums() == {"CRC32C": case["trailer_value"]}


@pytest.mark.parametrize("step", [1 << 20, 1000])
def test_an_altered_chunk_is_refused_where_it_ends(step: int) -> None:
    case = VECTORS["chunked"]
    decoder, body = ChunkedDecoder(chunk_key(case), ()), body_of(case, fill=b"b")
    with pytest.raises(errors.SignatureDoesNotMatch):
        decode(decoder, body[:66000], step)


def test_chunks_cannot_change_places() -> None:
    case = VECTORS["chunked"]
    swapped = {
        **case,
        "sizes": [1024, 65536, 0],
        "signatures": [case["signatures"][1], case["signatures"][0], case["signatures"][2]],
    }
    with pytest.raises(errors.SignatureDoesNotMatch):
        ChunkedDecoder(chunk_key(case), ()).feed(body_of(swapped))


def test_a_body_cut_anywhere_is_incomplete() -> None:
    case = VECTORS["chunked"]
    body = body_of(case)
    for cut in (0, 10, 100, 65700, len(body) - 100):
        decoder = ChunkedDecoder(chunk_key(case), ())
        decoder.feed(body[:cut])
        with pytest.raises(errors.IncompleteBody):
            decoder.finish()


def test_an_altered_or_missing_trailer_is_refused() -> None:
    case = VECTORS["chunked_trailer"]
    altered = {**case, "trailer_value": "AAAAAA=="}
    with pytest.raises(errors.SignatureDoesNotMatch):
        ChunkedDecoder(chunk_key(case), (CRC,)).feed(body_of(altered))
    plain = {key: value for key, value in case.items() if not key.startswith("trailer")}
    with pytest.raises(errors.MalformedTrailerError):
        ChunkedDecoder(chunk_key(case), (CRC,)).feed(body_of(plain))
    unsigned = body_of(case).replace(b"x-amz-trailer-signature:", b"x-ignored-trailer:")
    with pytest.raises(errors.MalformedTrailerError):
        ChunkedDecoder(chunk_key(case), (CRC,)).feed(unsigned)


def test_unsigned_chunks_pass_at_once_and_end_with_their_trailer() -> None:
    decoder = ChunkedDecoder(None, ("x-amz-checksum-crc32",))
    assert b"".join(map(bytes, decoder.feed(b"5\r\nhel"))) == b"hel"
    assert b"".join(map(bytes, decoder.feed(b"lo\r\n0\r\nx-amz-checksum-crc32:NhCm"))) == b"lo"
    assert decoder.feed(b"hg==\r\n\r\n") == []
    decoder.finish()
    assert decoder.trailing_checksums() == {"CRC32": "NhCmhg=="}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"xyz\r\n", errors.InvalidRequest),
        (b"-1\r\n", errors.InvalidRequest),
        (b"0x5\r\nhello\r\n", errors.InvalidRequest),
        (b"\r\n", errors.InvalidRequest),
        (b"ffffffffffff\r\n", errors.InvalidRequest),
        (b"5\r\nhello!\r\n", errors.InvalidRequest),
        (b"5" + b" " * 2000, errors.InvalidRequest),
        (b"0\r\n\r\nmore", errors.InvalidRequest),
        (b"0\r\nx-amz-checksum-sha1:AAAA\r\n", errors.MalformedTrailerError),
        (b"0\r\nno colon\r\n", errors.MalformedTrailerError),
    ],
)
def test_broken_framing_is_refused(body: bytes, error: type[errors.S3Error]) -> None:
    with pytest.raises(error):
        ChunkedDecoder(None, ()).feed(body)


def test_a_signed_chunk_is_bounded_and_must_be_signed() -> None:
    with pytest.raises(errors.InvalidChunkSizeError):
        ChunkedDecoder(chunk_key(VECTORS["chunked"]), ()).feed(b"140000001;chunk-signature=" + b"0" * 64 + b"\r\n")
    with pytest.raises(errors.SignatureDoesNotMatch):
        ChunkedDecoder(chunk_key(VECTORS["chunked"]), ()).feed(b"5\r\nhello\r\n")


def test_a_hostile_trailer_is_refused_at_once() -> None:
    """An expression with two repetitions that match the same text takes seconds for a line of 1 KiB."""
    began_s = time.thread_time()
    for end in (b"\x01\r\n", b"\t \t\r\r\n", b"a\tb\r\n"):
        decoder = ChunkedDecoder(None, ("x-amz-checksum-crc32",))
        with pytest.raises(errors.MalformedTrailerError):
            decoder.feed(b"0\r\nx-amz-checksum-crc32:" + b" " * 900 + end)
    assert time.thread_time() - began_s < 0.3


def test_white_space_around_a_trailer_s_value_means_nothing() -> None:
    decoder = ChunkedDecoder(None, ("x-amz-checksum-crc32",))
    decoder.feed(b"0\r\nx-amz-checksum-crc32: \t AAAA==\t \r\n\r\n")
    assert decoder.trailing_checksums() == {"CRC32": "AAAA=="}
