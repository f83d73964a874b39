"""Ranges and parts of empty objects, and of those that are not: GET and HEAD say the same."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from storaged.errors import InvalidRange
from storaged.objects.api import RangeSpec
from storaged.objects.read.span import Span, span_of
from tests.integration.s3_front import World
from tests.integration.test_s3_fail_closed import call, filled

DATA = b"0123456789"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with filled() as world:
        await call(world, "PUT", "/bucket/none")
        await call(world, "PUT", "/bucket/some", body=DATA)
        yield world


def header(answer: bytes, name: bytes) -> bytes | None:
    found = re.search(rb"(?im)^%s: ([^\r]*)\r$" % name, answer.partition(b"\r\n\r\n")[0] + b"\r\n")
    return found[1] if found else None


ANSWERS = [
    ("none", "bytes=0-", 416, None, None), ("none", "bytes=0-0", 416, None, None), ("none", "bytes=5-9", 416, None, None),  # noqa: E501
    ("none", "bytes=-1", 200, None, b""), ("none", "bytes=-9", 200, None, b""), ("none", "bytes=-0", 416, None, None),
    ("none", "bytes=1-0", 200, None, b""), ("none", "lines=0-", 200, None, b""),
    ("some", "bytes=0-", 206, b"bytes 0-9/10", DATA), ("some", "bytes=-3", 206, b"bytes 7-9/10", DATA[-3:]),
    ("some", "bytes=-99", 206, b"bytes 0-9/10", DATA), ("some", "bytes=-0", 416, None, None), ("some", "bytes=10-", 416, None, None),  # noqa: E501
    ("some", "bytes=9-99", 206, b"bytes 9-9/10", DATA[9:]), ("some", "bytes=1-0", 200, None, DATA),
    ("some", f"bytes=9-{'9' * 20}", 206, b"bytes 9-9/10", DATA[9:]), ("some", f"bytes=9-{'9' * 5000}", 206, b"bytes 9-9/10", DATA[9:]),  # noqa: E501
    ("some", f"bytes=-{'9' * 20}", 206, b"bytes 0-9/10", DATA), ("some", f"bytes={'9' * 20}-", 416, None, None),
    ("some", f"bytes={'9' * 20}-1", 200, None, DATA), ("some", f"bytes={'0' * 30}1-{'0' * 30}2", 206, b"bytes 1-2/10", DATA[1:3]),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(("key", "spec", "status", "named", "body"), ANSWERS)
async def test_a_range_is_answered_alike_by_get_and_head(
    world: World, key: str, spec: str, status: int, named: bytes | None, body: bytes | None
) -> None:
    got = (await call(world, "GET", f"/bucket/{key}", {"range": spec}))[2]
    head = (await call(world, "HEAD", f"/bucket/{key}", {"range": spec}))[2]
    for answer in (got, head):
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert status == 416 or header(answer, b"Content-Range") == named
        assert status == 416 or header(answer, b"Content-Length") == b"%d" % len(body or b"")
    assert status == 416 or got.endswith(b"\r\n\r\n" + (body or b""))


@pytest.mark.parametrize(("key", "status", "named"), [("none", 200, None), ("some", 206, b"bytes 0-9/10")])
async def test_the_first_part_of_a_whole_object_is_all_of_it(
    world: World, key: str, status: int, named: bytes | None
) -> None:
    for method in ("GET", "HEAD"):
        answer = (await call(world, method, f"/bucket/{key}?partNumber=1"))[2]
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert header(answer, b"Content-Range") == named
        assert (await call(world, method, f"/bucket/{key}?partNumber=2"))[0] == 416


def test_the_object_plane_agrees() -> None:
    assert span_of(RangeSpec(None, 5), 0) == Span(0, 0, False)
    for spec in (RangeSpec(None, 0), RangeSpec(0, None), RangeSpec(0, 0)):
        with pytest.raises(InvalidRange):
            span_of(spec, 0)
    assert span_of(RangeSpec(None, 5), 3) == Span(0, 3, True)
