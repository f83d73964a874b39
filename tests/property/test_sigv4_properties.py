"""Canonicalisation: whatever a client signs, the server arrives at the same bytes."""

from __future__ import annotations

from urllib.parse import quote

import botocore.auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.request import parse_target, split_path
from tests.examples import examples

keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
values = st.text(st.characters(codec="utf-8", min_codepoint=1), max_size=20)


@given(keys)
def test_a_key_survives_its_encoding_and_is_signed_as_the_client_encoded_it(key: str) -> None:
    encoded = quote(key.encode(), safe="/~")
    target = parse_target(b"/bucket/" + encoded.encode())
    assert split_path(target.raw_path, "") == ("bucket", key.encode())
    assert sigv4.canonical_uri(target.raw_path) == "/bucket/" + encoded


@given(st.binary(max_size=60))
def test_the_canonical_path_is_canonical(path: bytes) -> None:
    once = sigv4.canonical_uri(b"/" + path.replace(b"%", b"%25"))
    assert sigv4.canonical_uri(once.encode()) == once


@given(st.dictionaries(values.filter(bool), values, max_size=5))
def test_the_canonical_query_does_not_depend_on_order_or_on_how_it_was_written(parameters: dict[str, str]) -> None:
    strict = [f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in parameters.items()]
    loose = [
        f"{quote(name, safe='')}={quote(value, safe='/~').replace('%20', '+')}"
        for name, value in reversed(parameters.items())
    ]
    first = sigv4.canonical_query(parse_target(b"/?" + "&".join(strict).encode()).pairs)
    second = sigv4.canonical_query(parse_target(b"/?" + "&".join(loose).encode()).pairs)
    by_name = sorted(strict, key=lambda item: item.partition("="))  # "0" before "00", although "0=" sorts after "00="
    assert first == second == "&".join(by_name)


@settings(max_examples=examples(50))
@given(
    keys,
    st.dictionaries(st.text("abcdefgh-", min_size=1, max_size=8), st.text("xyz, =", max_size=10), max_size=3),
    values,
)
def test_what_botocore_signs_verifies(key: str, metadata: dict[str, str], prefix: str) -> None:
    url = "http://127.0.0.1:9000/bucket/" + quote(key.encode(), safe="/~")
    headers = {f"x-amz-meta-{name}": value for name, value in metadata.items()}
    signed = AWSRequest("PUT", url, headers=headers, params={"prefix": prefix} if prefix else {}, data=b"")
    botocore.auth.S3SigV4Auth(Credentials("AK", "secret"), "s3", "eu-fr-1").add_auth(signed)
    prepared = signed.prepare()
    raw = prepared.url.removeprefix("http://127.0.0.1:9000").encode()
    arrived = {
        name.lower(): value if isinstance(value, str) else value.decode() for name, value in prepared.headers.items()
    }
    arrived["host"] = "127.0.0.1:9000"
    target = parse_target(raw)
    claim = sigv4.claim_from_header(arrived["authorization"], arrived)
    payload = sigv4.payload_hash(claim, arrived, target.query)
    sigv4.verify(claim, "secret", "PUT", target.raw_path, target.pairs, arrived, payload)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.integers(1, 50))
def test_signed_chunks_of_any_size_decode_in_pieces_of_any_size(chunks: list[bytes], step: int) -> None:
    import hashlib

    key = sigv4.ChunkKey(b"k" * 32, "20130524T000000Z", "20130524/r/s3/aws4_request", "seed")
    previous, body = "seed", b""
    for chunk in [*chunks, b""]:
        previous = sigv4.chunk_signature(key, previous, hashlib.sha256(chunk).hexdigest())
        body += f"{len(chunk):x};chunk-signature={previous}\r\n".encode() + chunk + b"\r\n"
    decoder = ChunkedDecoder(key, ())
    out = b"".join(
        bytes(data) for start in range(0, len(body), step) for data in decoder.feed(body[start : start + step])
    )
    decoder.finish()
    assert out == b"".join(chunks)
