"""Sizes of copies: an object has up to 10,000 parts of 5 GiB, and one copy reads at most 5 GiB of it. No data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.errors import InvalidArgument, InvalidRequest
from storaged.objects.api import (
    OBJECT_BYTES_MAX,
    PART_BYTES_MAX,
    PARTS_MAX,
    BodyChecks,
    CopySource,
    ObjectInfo,
    PutResult,
    RangeSpec,
)
from storaged.objects.read.span import span_of
from storaged.objects.write import copy, multipart
from storaged.s3.headers import parse_copy_range


class Source:
    """An opened object of which a range is read."""

    def __init__(self, size: int, span: RangeSpec | None) -> None:
        self.info = ObjectInfo(b"k", "", size, 0, "e", {}, {}, {}, {}, "", "STANDARD", 0)
        self.length = span_of(span, size).length
        self.closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        yield b""

    async def close(self) -> None:
        self.closed = True


def opened(monkeypatch: pytest.MonkeyPatch, size: int) -> tuple[list[Source], list[int | None]]:
    """The sources that are opened, and the sizes that are written."""
    sources: list[Source] = []
    written: list[int | None] = []

    async def get(_plane: Any, _bucket: Any, _key: bytes, *, span: RangeSpec | None, **_: Any) -> Source:
        sources.append(Source(size, span))
        return sources[-1]

    async def stored(*arguments: Any, **_: Any) -> PutResult:
        written.append(next(its for its in arguments if isinstance(its, BodyChecks)).size)
        return PutResult("e")

    monkeypatch.setattr(copy, "get", get)
    monkeypatch.setattr(copy, "put", stored)
    monkeypatch.setattr(multipart, "put_part", stored)
    return sources, written


async def copied_part(text: str) -> None:
    source = CopySource(None, b"k", span=parse_copy_range(text))  # type: ignore[arg-type]
    await multipart.copy_part(None, source, None, b"to", "upload", 1)  # type: ignore[arg-type]


async def test_the_largest_object_is_copied_in_parts_of_5_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, written = opened(monkeypatch, OBJECT_BYTES_MAX)
    for number in (1, 2, PARTS_MAX):
        first = (number - 1) * PART_BYTES_MAX
        await copied_part(f"bytes={first}-{first + PART_BYTES_MAX - 1}")
    await copied_part(f"bytes={OBJECT_BYTES_MAX - 1}-{OBJECT_BYTES_MAX - 1}")
    assert written == [PART_BYTES_MAX] * 3 + [1]
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("first", [0, 7 * PART_BYTES_MAX])
async def test_a_range_of_more_than_5_gib_is_refused(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    sources, written = opened(monkeypatch, OBJECT_BYTES_MAX)
    with pytest.raises(InvalidRequest, match="5368709120"):
        await copied_part(f"bytes={first}-{first + PART_BYTES_MAX}")
    assert written == []
    assert sources[0].closed


async def test_a_range_beyond_the_object_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _, written = opened(monkeypatch, OBJECT_BYTES_MAX)
    with pytest.raises(InvalidArgument, match=str(OBJECT_BYTES_MAX)):
        await copied_part(f"bytes={OBJECT_BYTES_MAX - 5}-{OBJECT_BYTES_MAX}")
    assert written == []


@pytest.mark.parametrize("size", [PART_BYTES_MAX, PART_BYTES_MAX + 1])
async def test_copy_object_takes_5_gib(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html"""
    _, written = opened(monkeypatch, size)
    one, other = SimpleNamespace(id=b"one", countries=("FR",)), SimpleNamespace(id=b"other", countries=("DE",))
    buckets: Any = one, other  # nothing is lent between them
    no_plane: Any = None
    copying = copy.copy(no_plane, CopySource(buckets[0], b"k"), buckets[1], b"to", owner="o", meta=None)
    if size == PART_BYTES_MAX:
        await copying
        assert written == [PART_BYTES_MAX]
        return
    with pytest.raises(InvalidRequest, match="5368709120"):
        await copying
    assert written == []
