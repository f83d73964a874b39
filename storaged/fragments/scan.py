"""Reading a segment from one end to the other: for replay, rebuild, check and compaction.

What does not parse is a gap. The record after a gap is found by its magic, on a multiple of 8 bytes; it counts only
when its head's checksum holds for that very offset. A sector that the drive can't read makes a gap too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from storaged.fragments.files import SegmentFile
from storaged.fragments.format import (
    ALIGNMENT,
    FRAGMENT,
    HEAD_BYTES,
    MESSAGE_BYTES_MAX,
    PAGE,
    RECORD_MAGIC,
    TRAILER_BYTES,
    Head,
    align,
    cell_holds,
    parse_body,
    parse_head,
    trailer_holds,
    trailer_start,
)
from storaged.lmdb_file import MEDIA_ERRORS
from storaged.units import KIB, MIB

WINDOW_BYTES = 64 * KIB
"""One read fetches the heads of many small records, and is short beside one large payload that is skipped."""


class Found(NamedTuple):
    """A record. ``message`` and ``sums`` are None when its body does not hold."""

    offset: int
    head: Head
    message: memoryview | None
    sums: memoryview | None

    @property
    def end(self) -> int:
        return self.offset + self.head.record_bytes


class Gap(NamedTuple):
    """Bytes that are no record."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class _Window:
    """The part of the file that was read last."""

    def __init__(self, file: SegmentFile) -> None:
        self._file = file
        self._start = 0
        self.data = b""

    def reach(self, offset: int, length: int) -> int:
        """Where ``offset`` is in ``data``, which then holds ``length`` bytes from there unless the file ends before."""
        if offset < self._start or offset + length > self._start + len(self.data):
            self.data = read_tolerant(self._file, offset, max(length, WINDOW_BYTES))
            self._start = offset
        return offset - self._start


def read_tolerant(file: SegmentFile, offset: int, length: int) -> bytes:
    """As ``SegmentFile.read``, with zeros where the drive can't read a page."""
    try:
        return file.read(offset, length)
    except OSError as error:
        if error.errno not in MEDIA_ERRORS:
            raise
    if length <= PAGE:
        return bytes(max(0, min(length, file.size() - offset)))
    half = align(length // 2, PAGE)
    return read_tolerant(file, offset, half) + read_tolerant(file, offset + half, length - half)


def scan(file: SegmentFile, seed: int, start: int, end: int) -> Iterator[Found | Gap]:
    """Everything in ``start .. end``, in order, without reading large payloads."""
    window = _Window(file)
    offset = start
    while offset < end:
        at = window.reach(offset, min(HEAD_BYTES, end - offset))
        head = parse_head(window.data, at, offset, seed)
        if head is None:
            following = _next_record(window, seed, offset + ALIGNMENT, end)
            yield Gap(offset, following - offset)
            offset = following
            continue
        body = None
        if head.message_bytes <= MESSAGE_BYTES_MAX:
            at = window.reach(offset, min(HEAD_BYTES + head.body_bytes, end - offset))
            body = parse_body(head, window.data, at, seed)
        yield Found(offset, head, *(body or (None, None)))
        offset = min(end, offset + head.record_bytes)


def _next_record(window: _Window, seed: int, offset: int, end: int) -> int:
    """The offset of the first record at ``offset`` or after it; ``end`` when there is none."""
    while offset < end:
        at = window.reach(offset, min(WINDOW_BYTES, end - offset))
        limit = len(window.data)
        found = window.data.find(RECORD_MAGIC, at)
        while found >= 0:
            there = offset + found - at
            if there % ALIGNMENT == 0:
                if found + HEAD_BYTES > limit:
                    break
                if parse_head(window.data, found, there, seed) is not None:
                    return there
            found = window.data.find(RECORD_MAGIC, found + 1)
        # A head that straddles the window's end begins in its last bytes.
        step = (limit - at) - HEAD_BYTES
        if step < ALIGNMENT:
            return end
        offset += step // ALIGNMENT * ALIGNMENT
    return end


def whole(file: SegmentFile, found: Found, end: int) -> bool:
    """Whether the record is complete, and everything in it that has a checksum matches it."""
    if found.sums is None or found.end > end:
        return False
    head = found.head
    if head.kind != FRAGMENT:
        return True
    if not trailer_holds(head, read_tolerant(file, found.offset + trailer_start(head), TRAILER_BYTES)):
        return False
    return _cells_hold(file, found.offset + head.payload_start, head, found.sums)


def _cells_hold(file: SegmentFile, payload: int, head: Head, sums: memoryview) -> bool:
    """Reads the payload, which begins at ``payload`` of the file, in pieces of about a MiB."""
    step = max(1, MIB // max(head.cell_bytes, 1))
    for first in range(0, head.cells, step):
        start = first * head.cell_bytes
        length = min(step * head.cell_bytes, head.payload_bytes - start)
        data = memoryview(read_tolerant(file, payload + start, length))
        for cell in range(first, min(first + step, head.cells)):
            begin = (cell - first) * head.cell_bytes
            width = min(head.cell_bytes, length - begin)
            piece = data[begin : begin + width]
            if len(piece) < width or not cell_holds(piece, sums, cell):
                return False
    return True
