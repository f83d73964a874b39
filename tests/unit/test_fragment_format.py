"""The bytes of a segment: the test vector of FORMATS.md, and what is refused."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import xxhash

from storaged.fragments import format as fmt
from storaged.fragments.format import (
    Delete,
    FormatError,
    FormatUnknown,
    RecordWriter,
    Retire,
    SegmentHeader,
    Touch,
    Unretire,
    cell_sums,
    encode_notes,
    pack_segment_header,
    parse_body,
    parse_fragment,
    parse_head,
    parse_notes,
    parse_segment_header,
    segment_seed,
    slices,
    trailer_holds,
    trailer_start,
)
from storaged.fragments.ports import FragmentHeader, FragmentId, encode_copies
from storaged.hashes import fragment_hash
from storaged.wire import encode

DISK = "00112233445566aa"


def vector() -> bytes:
    """A segment with one fragment of two cells, the note that deletes it, and a mark."""
    payload = bytes(range(256)) * 18
    header = FragmentHeader(
        id=FragmentId(bytes(range(16)), 7, 1, 2, 0).pack(), owner=b"owner", part_header=b"\x11" * 64, hashes=(fragment_hash([payload]),),  # noqa: E501
        cell_bytes=4096, length=len(payload), created_ms=1_700_000_000_000,
    )  # fmt: skip
    writer = RecordWriter(fmt.SEGMENT_HEADER_BYTES, segment_seed(DISK, 1), 0)
    writer.fragment(encode(header), cell_sums([memoryview(payload)], 4096), [payload], len(payload), 4096, 1)
    writer.notes(encode_notes([Delete(header.id, (1,)), Retire(b"d" * 16, b"owner", 5)]), 2)
    writer.mark()
    return pack_segment_header(SegmentHeader(DISK, 1, 1_700_000_000_000)) + b"".join(writer.buffers)


def documented() -> bytes:
    """The hex of FORMATS.md, in which ``.. N bytes of payload ..`` replaces the payload."""
    text = (Path(fmt.__file__).parents[1] / "FORMATS.md").read_text()
    block = re.search(r"<!-- segment vector -->\s*```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    found = b""
    for line in block[1].splitlines():
        if line.startswith(".."):
            found += bytes(range(256)) * 18
        else:
            found += bytes.fromhex(line.split("  ")[0])
    return found


def test_notes_of_the_version_before_say_nothing_of_the_origin() -> None:
    old = bytes.fromhex("919403c41064646464646464646464646464646464c4056f776e657205")
    assert parse_notes(old) == (Retire(b"d" * 16, b"owner", 5, b""),)


def test_the_documented_vector_is_what_the_code_writes() -> None:
    assert documented() == vector()


def test_the_documented_vector_is_read_back() -> None:
    data = documented()
    assert parse_segment_header(data) == SegmentHeader(DISK, 1, 1_700_000_000_000)
    seed = segment_seed(DISK, 1)
    head = parse_head(data, 64, 64, seed)
    assert head is not None
    assert (head.kind, head.payload_bytes, head.cell_bytes, head.cells, head.sequence) == (
        fmt.FRAGMENT,
        4608,
        4096,
        2,
        1,
    )
    body = parse_body(head, data, 64, seed)
    assert body is not None
    assert parse_fragment(body[0]).owner == b"owner"
    at = 64 + trailer_start(head)
    assert trailer_holds(head, data[at : at + 16])
    notes = parse_head(data, 64 + head.record_bytes, 64 + head.record_bytes, seed)
    assert notes is not None
    found = parse_body(notes, data, 64 + head.record_bytes, seed)
    assert found is not None
    assert [type(note) for note in parse_notes(found[0])] == [Delete, Retire]


def test_a_head_is_believed_only_on_its_own_disk_segment_and_offset() -> None:
    data = vector()
    seed = segment_seed(DISK, 1)
    assert parse_head(data, 64, 64, seed) is not None
    assert parse_head(data, 64, 72, seed) is None
    assert parse_head(data, 64, 64, segment_seed(DISK, 2)) is None
    assert parse_head(data, 64, 64, segment_seed("00112233445566ab", 1)) is None


def test_a_later_version_is_not_taken_for_damage() -> None:
    raw = bytearray(pack_segment_header(SegmentHeader(DISK, 1, 5)))
    raw[9] = 2
    raw[56:] = xxhash.xxh3_64_digest(bytes(raw[:56]))
    with pytest.raises(FormatUnknown):
        parse_segment_header(raw)
    raw[20] ^= 1
    with pytest.raises(FormatError) as damaged:
        parse_segment_header(raw)
    assert not isinstance(damaged.value, FormatUnknown)
    with pytest.raises(FormatError):
        parse_segment_header(b"SOVSEG")


def test_notes_survive_a_round_trip_and_junk_is_refused() -> None:
    notes = (Delete(b"i" * 23, (1, 2)), Touch(b"i" * 23, 5), Retire(b"d" * 16, b"owner", 9), Unretire(b"d" * 16, ()))
    assert parse_notes(encode_notes(notes)) == notes
    with pytest.raises(FormatError):
        parse_notes(b"\x91\x92\x09\x01")
    with pytest.raises(FormatError):
        parse_fragment(b"\x91\x01")


def test_records_of_all_sizes_lie_dense() -> None:
    rng = random.Random(3)
    writer = RecordWriter(64, 1, 0)
    end = 64
    for length in (4112, fmt.HOLE_BYTES_MIN, 100, fmt.HOLE_BYTES_MIN + 1, 3 * fmt.HOLE_BYTES_MIN, 5):
        payload = rng.randbytes(length)
        message = rng.randbytes(rng.randint(1, 300))
        placed = writer.fragment(message, cell_sums([memoryview(payload)], 4096), [payload], length, 4096, 1)
        assert placed.offset == end
        end = writer.end
        assert placed.record_bytes == end - placed.offset <= RecordWriter.bytes_max(len(message), length, 4096)
    assert len(b"".join(writer.buffers)) == writer.end - 64


def test_slices_cut_any_buffers_at_any_width() -> None:
    rng = random.Random(5)
    data = rng.randbytes(1000)
    for width in (1, 7, 64, 999, 1000, 5000):
        pieces: list[memoryview] = []
        at = 0
        while at < len(data):
            count = rng.randint(1, 300)
            pieces.append(memoryview(data[at : at + count]))
            at += count
        assert [b"".join(piece) for piece in slices(pieces, width)] == [
            data[i : i + width] for i in range(0, 1000, width)
        ]
    assert cell_sums([memoryview(data[:300]), memoryview(data[300:])], 128) == cell_sums([memoryview(data)], 128)


@pytest.mark.parametrize("owner", [b"o", b"o" * 300])
@pytest.mark.parametrize("length", [1, 1 << 15, 1 << 40])
def test_copies_headers_differ_in_their_position_only(owner: bytes, length: int) -> None:
    def header(position: int) -> FragmentHeader:
        return FragmentHeader(
            FragmentId(b"d" * 16, 0, 1, 4, position).pack(), owner, bytes(64), (bytes(16),), 8192, length, 1 << 41
        )

    assert encode_copies(header(0), 5) == [encode(header(position)) for position in range(5)]
