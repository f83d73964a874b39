"""Every byte of a segment file, described in FORMATS.md (Segments). Pure.

A segment is a header of 64 bytes, then records, one after the other. A record describes and checks itself:

* The seed of its head's checksum is made of the disk, the segment and the offset. So none of these is ever taken for a
  record: bytes that a client chose, a block that the drive put in the wrong place, the remains of an earlier file.
* Every head carries ``synced_end``: all bytes of this segment before it were durable when the record was written. After
  a crash this distinguishes a torn tail (it lies after every ``synced_end`` and may be cut) from damage (it lies before
  one, so it was acknowledged: it is quarantined, never cut).

The checksums are xxh3-64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): they find damage, not
malice. Malice is found by the reader, who authenticates a cell (it is a sealed chunk), and by repair, which compares
the hashes in fragments' headers (``storaged.hashes``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import xxhash

from storaged.fragments.ports import FragmentHeader
from storaged.units import KIB, MIB
from storaged.wire import Buffer, Message, decode, decoder_of, encode

VERSION = 1
SEGMENT_MAGIC = b"SOVSEG\r\n"
RECORD_MAGIC = b"SOR1"
TRAILER_MAGIC = b"SORE"

FRAGMENT = 1
NOTES = 2
MARK = 3
"""Kinds of record: a fragment; notes about fragments (Note); a ``synced_end`` alone, which is also the filler before an
aligned payload, which earlier versions wrote.
"""

KEY_BYTES = 23
"""Length of a packed FragmentId."""

ID_AT = 3
"""Where a fragment's id begins in its encoded header: after the marks of the array (1 byte) and the byte string (2)."""

ALIGNMENT = 8
PAGE = 4 * KIB
HOLE_BYTES_MIN = 64 * KIB
"""A hole is punched for a dead payload of this size or more. It gives back whole pages, so one page of 17 stays until
compaction. Payloads do not begin on page borders: that would cost each of them as much while it lives.
"""

PAYLOAD_BYTES_MAX = 256 * MIB
MESSAGE_BYTES_MAX = 4 * MIB
SEGMENT_BYTES_MAX = 4096 * MIB - 1
CHECK_MASK = 2**64 - 1
"""Seeds are 64 bits wide."""

_SEGMENT = struct.Struct(">8sHH4x16sQQ8xQ")
HEAD = struct.Struct(">4sBBHIIIIQQQQ")
"""The fields of ``Head`` in the order of the file, the magic first."""
_TRAILER = struct.Struct(">4sIQ")
_CHECK = struct.Struct(">Q")
_HEAD_CHECKED = struct.Struct(HEAD.format[:-1])
SEGMENT_HEADER_BYTES = 64
HEAD_BYTES = 56
HEAD_CHECKED_BYTES = 48
"""The head without its own checksum."""
TRAILER_BYTES = 16
assert _SEGMENT.size == SEGMENT_HEADER_BYTES
assert HEAD.size == HEAD_BYTES
assert _TRAILER.size == TRAILER_BYTES
assert _CHECK.size == 8
assert _HEAD_CHECKED.size == HEAD_CHECKED_BYTES == HEAD_BYTES - _CHECK.size
_ZEROS = bytes(ALIGNMENT)


class FormatError(Exception):
    """Bytes that don't have the format that they should have."""


class FormatUnknown(FormatError):
    """Undamaged bytes of a later version."""


class SegmentHeader(NamedTuple):
    disk_id: str
    number: int
    created_ms: int


class Head(NamedTuple):
    """The fixed part of a record. ``record_bytes``: from its first byte to the next record's first byte."""

    kind: int
    message_bytes: int
    payload_bytes: int
    cell_bytes: int
    record_bytes: int
    synced_end: int
    sequence: int
    body_check: int
    head_check: int

    @property
    def cells(self) -> int:
        return -(-self.payload_bytes // self.cell_bytes) if self.payload_bytes else 0

    @property
    def body_bytes(self) -> int:
        return self.message_bytes + 8 * self.cells

    @property
    def payload_start(self) -> int:
        """Relative to the record."""
        return align(HEAD_BYTES + self.body_bytes)


class Placed(NamedTuple):
    """Where a record was laid. ``offset``: in the segment; ``payload_start``: relative to the record; bytes."""

    offset: int
    record_bytes: int
    payload_start: int


class Delete(Message, frozen=True, tag=1):
    """The fragment was deleted. ``targets``: the segments in which records of it lie; the note is needed as long as one
    of them exists.
    """

    id: bytes
    targets: tuple[int, ...]


class Touch(Message, frozen=True, tag=2):
    """The fragment's age was renewed."""

    id: bytes
    created_ms: int


class Retire(Message, frozen=True, tag=3):
    """The data id is on the garbage list. ``origin``: see ``ports.Retirement``; old records have none."""

    data_id: bytes
    owner: bytes
    due_ms: int
    origin: bytes = b""


class Unretire(Message, frozen=True, tag=4):
    """The data id is not on the garbage list any more. ``targets`` as in Delete, of Retire notes."""

    data_id: bytes
    targets: tuple[int, ...]


Note = Delete | Touch | Retire | Unretire


def align(count: int, to: int = ALIGNMENT) -> int:
    """``count`` rounded up to a multiple of ``to``."""
    return -(-count // to) * to


def segment_seed(disk_id: str, number: int) -> int:
    """The seed of the checksums in one segment, before the offset is added. It does not depend on the segment's header,
    so that a damaged header costs nothing else.
    """
    return xxhash.xxh3_64_intdigest(disk_id.encode() + number.to_bytes(8, "big"))


def pack_segment_header(header: SegmentHeader) -> bytes:
    raw = _SEGMENT.pack(SEGMENT_MAGIC, VERSION, 0, header.disk_id.encode(), header.number, header.created_ms, 0)
    return raw[:-8] + _CHECK.pack(xxhash.xxh3_64_intdigest(raw[:-8]))


def parse_segment_header(data: Buffer) -> SegmentHeader:
    """Raises FormatError when it is short or damaged, FormatUnknown when this program does not know its version."""
    if len(data) < SEGMENT_HEADER_BYTES:
        raise FormatError("the segment's header is cut short")
    raw = bytes(data[:SEGMENT_HEADER_BYTES])
    magic, version, _flags, disk_id, number, created_ms, check = _SEGMENT.unpack(raw)
    if magic != SEGMENT_MAGIC or check != xxhash.xxh3_64_intdigest(raw[:-8]):
        raise FormatError("the segment's header is damaged, or this is no segment")
    if version != VERSION:
        raise FormatUnknown(f"segment format {version} is not known to this version, which writes format {VERSION}")
    return SegmentHeader(disk_id.decode("ascii", "replace"), number, created_ms)


def parse_head(data: Buffer, at: int, offset: int, seed: int) -> Head | None:
    """The head that begins at ``data[at]`` and lies at ``offset`` of its segment; None when no head there
    holds.
    """
    if len(data) < at + HEAD_BYTES:
        return None
    magic, kind, _zero, _flags, message, payload, cell, record, synced, sequence, body, check = HEAD.unpack_from(
        data, at
    )
    if magic != RECORD_MAGIC or check != xxhash.xxh3_64_intdigest(
        data[at : at + HEAD_CHECKED_BYTES], (seed + offset) & CHECK_MASK
    ):
        return None
    head = Head(kind, message, payload, cell, record, synced, sequence, body, check)
    if payload and not cell:
        return None
    trailer = TRAILER_BYTES if kind == FRAGMENT else 0
    if record % ALIGNMENT or record < head.payload_start + align(payload) + trailer:
        return None
    return head


def parse_body(head: Head, data: Buffer, at: int, seed: int) -> tuple[memoryview, memoryview] | None:
    """(message, cell sums) of the record whose head begins at ``data[at]``; None when they are cut short or their
    checksum does not hold.
    """
    body = memoryview(data)[at + HEAD_BYTES : at + HEAD_BYTES + head.body_bytes]
    if len(body) < head.body_bytes or xxhash.xxh3_64_intdigest(body, seed) != head.body_check:
        return None
    return body[: head.message_bytes], body[head.message_bytes :]


def trailer_holds(head: Head, data: Buffer) -> bool:
    """Whether the 16 bytes are this record's trailer."""
    return len(data) == TRAILER_BYTES and _TRAILER.unpack(data) == (TRAILER_MAGIC, head.record_bytes, head.head_check)


def trailer_start(head: Head) -> int:
    """Relative to the record. A record's padding, if any, lies before its trailer."""
    return head.record_bytes - TRAILER_BYTES


def parse_fragment(message: Buffer) -> FragmentHeader:
    """Raises FormatError."""
    try:
        return decode(message, FragmentHeader)
    except msgspec.MsgspecError as error:
        raise FormatError(f"not a fragment's header: {error}") from None


_decode_notes = decoder_of(tuple[Note, ...])


def parse_notes(message: Buffer) -> tuple[Note, ...]:
    """Raises FormatError."""
    try:
        return _decode_notes(message)
    except msgspec.MsgspecError as error:
        raise FormatError(f"not notes: {error}") from None


def encode_notes(notes: Sequence[Note]) -> bytes:
    return encode(tuple(notes))


def slices(payload: Sequence[memoryview], width: int) -> Iterator[list[memoryview]]:
    """The payload in pieces of ``width`` bytes, each as the slices of the buffers in which it lies. Copies nothing."""
    piece: list[memoryview] = []
    missing = width
    for buffer in payload:
        at = 0
        while at < len(buffer):
            part = buffer[at : at + missing]
            piece.append(part)
            at += len(part)
            missing -= len(part)
            if not missing:
                yield piece
                piece, missing = [], width
    if piece:
        yield piece


def cell_sums(payload: Sequence[memoryview], cell_bytes: int) -> bytes:
    """8 bytes a cell: xxh3-64, big-endian."""
    if len(payload) == 1 and len(payload[0]) <= cell_bytes:
        return xxhash.xxh3_64_digest(payload[0])
    sums: list[bytes] = []
    for piece in slices(payload, cell_bytes):
        if len(piece) == 1:
            sums.append(xxhash.xxh3_64_digest(piece[0]))
        else:
            state = xxhash.xxh3_64()
            for part in piece:
                state.update(part)
            sums.append(state.digest())
    return b"".join(sums)


def cell_holds(cell: Buffer, sums: Buffer, index: int) -> bool:
    return xxhash.xxh3_64_digest(cell) == sums[8 * index : 8 * index + 8]


class RecordWriter:
    """Lays records one after the other from ``offset`` of a segment, as a list of buffers for one vectored write."""

    def __init__(self, offset: int, seed: int, synced_end: int) -> None:
        self.start = self.end = offset
        self.buffers: list[Buffer] = []
        self._seed = seed
        self._synced_end = synced_end

    @staticmethod
    def bytes_max(message_bytes: int, payload_bytes: int, cell_bytes: int) -> int:
        """The most bytes that a record of these sizes takes."""
        cells = -(-payload_bytes // cell_bytes) if payload_bytes else 0
        head = HEAD_BYTES + message_bytes + 8 * cells
        return head + -head % ALIGNMENT + payload_bytes + -payload_bytes % ALIGNMENT + TRAILER_BYTES

    def fragment(
        self, message: bytes, sums: bytes, payload: Sequence[Buffer], payload_bytes: int, cell_bytes: int, sequence: int
    ) -> Placed:
        payload_start = HEAD_BYTES + len(message) + len(sums)
        payload_start += -payload_start % ALIGNMENT
        padding = -payload_bytes % ALIGNMENT
        record_bytes = payload_start + payload_bytes + padding + TRAILER_BYTES
        check = self._head(FRAGMENT, message, sums, payload_bytes, cell_bytes, record_bytes, sequence)
        self.buffers += payload
        self.buffers.append(_ZEROS[:padding] + _TRAILER.pack(TRAILER_MAGIC, record_bytes, check))
        return self._placed(record_bytes, payload_start)

    def notes(self, message: bytes, sequence: int) -> Placed:
        record_bytes = align(HEAD_BYTES + len(message))
        self._head(NOTES, message, b"", 0, 0, record_bytes, sequence)
        return self._placed(record_bytes, record_bytes)

    def mark(self, record_bytes: int = HEAD_BYTES) -> None:
        self._head(MARK, b"", b"", 0, 0, record_bytes, 0)
        if record_bytes > HEAD_BYTES:
            self.buffers.append(bytes(record_bytes - HEAD_BYTES))
        self._placed(record_bytes, HEAD_BYTES)

    def _head(
        self,
        kind: int,
        message: bytes,
        sums: bytes,
        payload_bytes: int,
        cell_bytes: int,
        record_bytes: int,
        sequence: int,
    ) -> int:
        body, seed = message + sums, self._seed
        raw = _HEAD_CHECKED.pack(
            RECORD_MAGIC, kind, 0, 0, len(message), payload_bytes, cell_bytes, record_bytes, self._synced_end, sequence,
            xxhash.xxh3_64_intdigest(body, seed),
        )  # fmt: skip
        check = xxhash.xxh3_64_intdigest(raw, (seed + self.end) & CHECK_MASK)
        self.buffers.append(b"".join((raw, _CHECK.pack(check), body, _ZEROS[: -(HEAD_BYTES + len(body)) % ALIGNMENT])))
        return check

    def _placed(self, record_bytes: int, payload_start: int) -> Placed:
        placed = Placed(self.end, record_bytes, payload_start)
        self.end += record_bytes
        return placed
