"""Stored data as a hostile storage node may return it: segments, records, pages, parts, sealed messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import xxhash

from storaged import sov1, wire
from storaged.errors import DataDamaged
from storaged.fragments import format as segments
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.meta.names import RegisterName, Table, Value
from storaged.objects.code import geometry, manifest
from storaged.objects.code.geometry import PartShape
from storaged.objects.code.versions import decode_record
from storaged.objects.records import (
    ObjectRecord,
    PartEntry,
    Run,
    Version,
    decode_object,
    encode_object,
)
from storaged.sov1 import SealBroken, open_message, seal_message
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target
from tests.property.agreement import finished

NAME = RegisterName(Table.OBJECT, b"S" * 16, 3, b"key")


def segment(data: bytes) -> None:
    """A record whose head is valid lies within its own lengths, so that nothing outside of it is read as a part of it.
    Its message gives a fragment's header, or FormatError. The start of a segment gives a segment's header, or
    FormatError.
    """
    choices = Choices(data)
    seed, raw = 5, choices.rest()
    checked = raw[: segments.HEAD_CHECKED_BYTES].ljust(segments.HEAD_CHECKED_BYTES, b"\0")
    forged = checked + xxhash.xxh3_64_digest(checked, seed + 64) + raw[segments.HEAD_CHECKED_BYTES :]
    head = segments.parse_head(forged, 0, 64, seed)
    if head is not None:
        assert head.record_bytes >= segments.HEAD_BYTES + head.body_bytes + head.payload_bytes
        assert head.payload_start >= segments.HEAD_BYTES + head.body_bytes
        body = segments.parse_body(head, forged, 0, seed)
        if body is not None:
            assert len(body[1]) == 8 * head.cells
        segments.trailer_holds(head, forged[-segments.TRAILER_BYTES :])
    for parse in (segments.parse_fragment, segments.parse_notes, segments.parse_segment_header):
        try:
            found = parse(raw)
        except segments.FormatError:
            continue
        if isinstance(found, FragmentHeader):
            try:
                FragmentId.unpack(found.id)
            except ValueError:
                pass


def part(data: bytes) -> None:
    """The places of an object's parts are in the clear, and anybody may have written them. An entry that passes the
    check can be counted with: its blocks, cells and fragments are as many as the size says, and finding a byte in it
    takes a bounded number of steps."""
    try:
        found = wire.decode(data, PartEntry)
    except msgspec.MsgspecError:
        return
    if geometry.problem_of(found):
        return
    shape = PartShape.of(found)
    assert shape.blocks >= 1
    places = list(_first(shape.locate(max(0, found.size - 5), min(5, found.size)), 10))
    assert all(0 <= place.block < shape.blocks for place in places)
    for run in found.runs:
        block = shape.block(run.first + run.count - 1)
        lengths = [block.fragment_length(run.profile, position) for position in range(run.k + run.m)]
        assert all(length >= 0 for length in lengths)
        assert sum(lengths[: run.k]) == block.sealed_bytes, "the data fragments are not the block"


def _first(items: Any, count: int) -> Any:
    for _, item in zip(range(count), items, strict=False):
        yield item


class _Pages:
    """Pages that a node makes up: the same for every hash."""

    def __init__(self, pages: list[bytes]) -> None:
        self._pages = pages
        self.asked = 0

    async def get_page(self, near: RegisterName, page_hash: bytes) -> bytes:
        self.asked += 1
        return self._pages[self.asked % len(self._pages)]


async def _all(items: Any) -> list[Any]:
    return [item async for item in items]


def record(data: bytes) -> None:
    """The record of a key can be decoded, or it is DataDamaged. Encoded again it decodes to the same record. Code can
    calculate with its parts, and with those of any chain of pages, or gets DataDamaged. A walk along such a chain
    always ends.
    """
    body, _, rest = data.partition(b"||")
    try:
        found = decode_record(Value(1, b"o" * 16, 2, body))
    except DataDamaged:
        return
    if found.versions:
        try:
            again = encode_object(found)
        except ValueError:
            return  # a head that no row can hold: a gateway refuses to write it
        assert decode_object(again) == found
    pages = _Pages(rest.split(b"||"))
    for version in found.versions[:4]:
        try:
            parts = finished(_all(manifest.parts_of(pages, NAME, version)))  # type: ignore[arg-type]
        except DataDamaged:
            continue
        assert all(not geometry.problem_of(each) for each in parts)
    assert pages.asked <= 4 * manifest.PAGES_MAX


def sealed(data: bytes) -> None:
    """A sealed message opens to its plaintext. A changed one, of any length, gives SealBroken."""
    choices = Choices(data)
    at, bit, size = choices.number(65536), choices.number(8), choices.number(9000)
    text, key, context = choices.rest(), b"k" * 32, b"c"
    try:
        open_message(key, "l", context, text)
        raise AssertionError("bytes that nobody sealed open")
    except SealBroken:
        pass
    whole = seal_message(key, "l", context, text * (1 + size // (len(text) + 1)), b"s" * 24)
    at %= len(whole)
    for wrong in (whole[:at] + bytes((whole[at] ^ 1 << bit,)) + whole[at + 1 :], whole[:at], whole + text):
        try:
            open_message(key, "l", context, wrong)
        except SealBroken:
            continue
        assert wrong == whole, "what was changed opens"


_HEAD_OF_RECORD = (
    segments._HEAD_CHECKED.pack(segments.RECORD_MAGIC, 1, 0, 0, 4, 8, 8, 96, 64, 1, 0) + b"abcd" + b"s" * 8
)
ENTRY = PartEntry(1, b"d" * 16, 70_000, b"SOV1\x01\x10\0\0" + b"s" * 24 + b"c" * 32, 8, "2+1", (Run(0, 1, 2, 1, 1),))
SMALL = PartEntry(1, b"d" * 16, 5, b"SOV1\x01\x0c\0\0" + b"s" * 24 + b"c" * 32, 1, "", (), b"x" * 21)
VERSION = Version("v", 1, 70_000, "o" * 64, 1, b"c" * 16, b"l", False, b"w" * 112, b"m", (ENTRY,))
LONG = Version("v", 1, 70_000, "o" * 64, 1, b"c" * 16, b"l", False, b"w" * 112, b"m", (), b"h" * 20)
HEADER = FragmentHeader(FragmentId(b"d" * 16, 0, 2, 1, 0).pack(), NAME.pack(), b"h" * 64, (b"h" * 20,), 4096, 5, 1)
MSGPACK = (
    b"\xc0",
    b"\xc1",
    b"\xc2",
    b"\xc4\x10" + b"x" * 16,
    b"\x90",
    b"\x9f",
    b"\xdc\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\x80",
    b"\xdb\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + b"\0" * 7,
    b"\xa1\xff",
    b"\xcb\x7f\xf8\0\0\0\0\0\0",
    b"\x91" * 1100,
    b"||",
)


TARGETS = (
    Target(
        "segment",
        segment,
        (
            _HEAD_OF_RECORD,
            wire.encode(HEADER),
            segments.encode_notes([segments.Delete(b"i" * 23, (1, 2)), segments.Touch(b"i" * 23, 5)]),
            segments.pack_segment_header(segments.SegmentHeader("d" * 16, 1, 1)),
        ),
        Plant(segments, "align", lambda _: lambda count, to=8: count // to * to),
        (segments.RECORD_MAGIC, b"\x01\0\0\0", b"\0\0\0\x01", b"\xff\xff\xff\xff", *MSGPACK),
        size_max=1024,
    ),
    Target(
        "part",
        part,
        (wire.encode(ENTRY), wire.encode(SMALL)),
        Plant(geometry, "problem_of", lambda _: lambda entry: ""),
        MSGPACK,
        size_max=1024,
        steps=20_000,
        steps_a_byte=400,
    ),
    Target(
        "record",
        record,
        (
            encode_object(ObjectRecord((VERSION,))),
            encode_object(ObjectRecord((LONG,))) + b"||" + wire.encode(manifest.PartsPage((SMALL,), b"h" * 20)),
        ),
        Plant(manifest, "checked", lambda _: lambda entry: entry),
        MSGPACK,
        size_max=3000,
        steps=20_000,
        steps_a_byte=300,
        peak_bytes=2 << 20,
    ),
    Target(
        "sealed",
        sealed,
        (b"\x00\x50\x03\x00\x05hello", b"\x10\x00\x01\x20\x00abc", b"\x00\x00\x00\x00\x00SOV1\x01\x0c\0\0" + b"x" * 80),
        Plant(sov1, "hmac", lambda _: SimpleNamespace(compare_digest=lambda one, other: True)),
        (b"SOV1\x01\x0c\0\0", b"x" * 4096),
        size_max=6000,
        steps=4000,
        peak_bytes=1 << 20,
    ),
)
