"""Heads are understood from bytes: no rule of Unicode makes one word of another, and a target in absolute form is what
it names.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from storaged.s3.auth import sigv4
from storaged.s3.http.limits import Limits
from tests.integration.s3_front import ACCESS, REGION, SECRET, World, s3_world, signed


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world(Limits(headers_s=0.4, body_idle_s=0.4)) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


@pytest.mark.parametrize(
    "line",
    [
        "Transfer-Encoding: chun\u212aed",  # KELVIN SIGN, whose lower case is k
        "Transfer-Encoding: chunked\u00a0",
        "Transfer-Encoding: chunked\u0085",
        "Content-Length: 5\u00a0",
        "Content-Length: \u0665",
        "Connection: \u212aeep-alive",
        "Connection: close\u3000",
        "Expect: 100-continue\u00a0",
        "Host: h\u00e9",
    ],
)
async def test_a_framing_header_with_a_byte_that_is_not_ascii_is_no_request(world: World, line: str) -> None:
    host = "" if line.startswith("Host") else "Host: h\r\n"
    head = f"PUT /bucket/k HTTP/1.1\r\n{host}{line}\r\n\r\n".encode()
    answer = await world.raw(head + b"0\r\n\r\n" + signed(world, "GET", "/bucket/smuggled"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


async def test_a_signed_request_in_absolute_form_is_answered(world: World) -> None:
    await world.raw(signed(world, "PUT", "/bucket/k", body=b"data").replace(b"Host:", b"Connection: close\r\nHost:", 1))
    request = signed(world, "GET", "/bucket/k").replace(b"GET /", f"GET {world.endpoint}/".encode(), 1)
    answer = await world.raw(request.replace(b"Host:", b"Connection: close\r\nHost:", 1))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\ndata")


@pytest.mark.parametrize(
    "headers", [{"x-amz-meta-a": b"caf\xe9"}, {"content-disposition": b"\xff"}, {"x-amz-meta-a": b"\xed\xa0\x80"}]
)
async def test_metadata_that_is_not_utf_8_can_not_be_given_back_and_is_refused(
    world: World, headers: dict[str, bytes]
) -> None:
    ((name, value),) = headers.items()
    request = signed_raw(world, "PUT", "/bucket/k", {name: value})
    answer = await world.raw(request)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"<Code>InvalidArgument</Code>" in answer
    assert f"<ArgumentName>{name}</ArgumentName>".encode() in answer
    assert not await world.stored()


async def test_metadata_comes_back_byte_for_byte(world: World) -> None:
    value = "caf\u00e9 \u20ac \U0001f600".encode()
    assert (await world.raw(signed_raw(world, "PUT", "/bucket/k", {"x-amz-meta-a": value}))).startswith(
        b"HTTP/1.1 200 "
    )
    answer = await world.raw(signed(world, "HEAD", "/bucket/k").replace(b"Host:", b"Connection: close\r\nHost:", 1))
    assert b"x-amz-meta-a: " + value + b"\r\n" in answer


def signed_raw(world: World, method: str, target: str, headers: dict[str, bytes]) -> bytes:
    """A signed request without a body, whose headers are bytes."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    sent = {
        "host": f"127.0.0.1:{world.port}".encode(),
        "x-amz-content-sha256": sigv4.EMPTY_SHA256.encode(),
        "x-amz-date": now.encode(),
        **headers,
    }
    texts = {name: value.decode("utf-8", "surrogateescape") for name, value in sent.items()}
    names = tuple(sorted(sent))
    scope = f"{now[:8]}/{REGION}/s3/aws4_request"
    canonical = sigv4.canonical_request(method, target.encode(), (), names, texts, sigv4.EMPTY_SHA256)
    signature = sigv4.sign(sigv4.signing_key(SECRET, now[:8], REGION), sigv4.string_to_sign(now, scope, canonical))
    lines = [f"{method} {target} HTTP/1.1".encode(), *(name.encode() + b": " + value for name, value in sent.items())]
    lines.append(
        f"authorization: {sigv4.ALGORITHM} Credential={ACCESS}/{scope}, SignedHeaders={';'.join(names)},"
        f" Signature={signature}".encode()
    )
    return b"\r\n".join([*lines, b"content-length: 0", b"connection: close", b"", b""])


async def test_a_parameter_that_stands_for_a_header_is_ascii_too(world: World) -> None:
    request = signed(world, "PUT", "/bucket/k?x-amz-storage-class=%C5%BFTANDARD", headers={"Connection": "close"})
    assert b"<Code>InvalidArgument</Code>" in await world.raw(request)
