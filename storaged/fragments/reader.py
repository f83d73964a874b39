"""Reading fragments: every cell is verified before it leaves, whichever thread reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from storaged.errors import FragmentDamaged, FragmentMissing
from storaged.fragments.entry import Entry
from storaged.fragments.files import SegmentFile
from storaged.fragments.format import (
    FRAGMENT,
    FormatError,
    cell_holds,
    parse_body,
    parse_fragment,
    parse_head,
    segment_seed,
    whole_payload,
)
from storaged.fragments.index import HEAD_CELL, Index
from storaged.fragments.ports import FragmentHeader
from storaged.units import MIB
from storaged.wire import Buffer

MOVED_RETRIES_MAX = 8
"""How often a fragment may be moved by compaction while it is read, before it is called damaged."""

Segments = Callable[[int], SegmentFile | None]


class Cells(NamedTuple):
    """``bad``: cells that failed, HEAD_CELL is never among them (that raises)."""

    header: FragmentHeader
    cells: tuple[memoryview | None, ...]
    bad: tuple[int, ...]
    whole: memoryview | None = None


class _NotCached(Exception):
    pass


class Reader:
    """Reads what the index names. Usable from any thread."""

    def __init__(self, index: Index, segments: Segments, on_damage: Callable[[bytes, int], None]) -> None:
        """``on_damage(packed id, cell)`` is called from the thread that reads, once for every cell newly found bad."""
        self._index = index
        self._segments = segments
        self._on_damage = on_damage
        self._seeds: dict[int, int] = {}

    def read(self, key: bytes, first: int, count: int, *, cached: bool = False) -> Cells | None:
        """Cells ``first .. first + count - 1``. With ``cached``: None at once when they are not all in memory and
        whole.

        Raises FragmentMissing, FragmentDamaged (its head cannot be read).
        """
        failed: Cells | None = None
        before: Entry | None = None
        for _ in range(MOVED_RETRIES_MAX):
            entry = self._index.lookup(key)
            if entry is None:
                raise FragmentMissing(f"the disk does not hold fragment {key.hex()}")
            if before is not None and before[:2] == entry[:2]:
                break  # it did not move: what failed is damaged
            try:
                found = self._attempt(key, entry, first, count, cached)
            except _NotCached:
                return None
            if found is not None and not found.bad:
                return found
            if cached:
                return None
            failed, before = found, entry
        if failed is None:
            self._report(key, (HEAD_CELL,))
            raise FragmentDamaged(f"the head of fragment {key.hex()} is damaged on the disk")
        self._report(key, failed.bad)
        return failed

    def cached_copy(self, data_id: bytes, bytes_max: int) -> memoryview | None:
        """All of a small object's copy, verified as ``read`` does but for its header's fields, when it is in the page
        cache and whole. None for anything else,
        of which ``read`` says what it is."""
        found = self._index.copy_entry(data_id)
        if found is None:
            return None
        key, entry = found
        file = self._segments(entry.segment)
        count, start = entry.payload_bytes, entry.payload_start
        if file is None or count > bytes_max:
            return None
        try:
            data = file.read_cached(entry.offset, start + count)
        except OSError:
            return None
        if data is None:
            return None
        seed = self._seeds.get(entry.segment)
        if seed is None:
            seed = self._seeds[entry.segment] = segment_seed(self._index.disk_id, entry.segment)
        return whole_payload(data, key, entry.offset, seed, count, entry.cell_bytes, start, entry.sequence)

    def header(self, key: bytes) -> FragmentHeader:
        """Raises as read."""
        found = self.read(key, 0, 0)
        assert found is not None
        return found.header

    def verify(self, key: bytes) -> tuple[int, ...]:
        """Reads all of it, about a MiB at a time; the cells that failed. Raises as read."""
        entry = self._index.lookup(key)
        step = max(1, MIB // max(entry.cell_bytes, 1)) if entry is not None else 1
        bad: list[int] = []
        first, cells = 0, 1
        while first < cells:
            found = self.read(key, first, step)
            assert found is not None
            bad.extend(found.bad)
            cells = -(-found.header.length // found.header.cell_bytes)
            first += step
        return tuple(bad)

    def _report(self, key: bytes, cells: tuple[int, ...]) -> None:
        for cell in cells:
            if self._index.mark_damaged(key, cell):
                self._on_damage(key, cell)

    def _attempt(self, key: bytes, entry: Entry, first: int, count: int, cached: bool) -> Cells | None:
        """None when the head does not hold."""
        file = self._segments(entry.segment)
        if file is None:
            return None
        first = min(first, entry.cells)
        last = min(first + max(count, 0), entry.cells)
        start = min(first * entry.cell_bytes, entry.payload_bytes)
        end = min(last * entry.cell_bytes, entry.payload_bytes)
        payload = entry.offset + entry.payload_start
        fetch = _fetch_cached if cached else _fetch
        try:
            if first == 0:  # head and cells lie together: one read
                data = fetch(file, entry.offset, entry.payload_start + end)
                head_data, cell_data = data, memoryview(data)[entry.payload_start :]
            else:
                head_data = fetch(file, entry.offset, entry.payload_start)
                cell_data = memoryview(fetch(file, payload + start, end - start))
        except FileNotFoundError:
            return None
        except OSError:
            return self._piecewise(key, entry, file, first, last)
        opened = self._open(key, entry, head_data)
        if opened is None:
            return None
        header, sums = opened
        cells: list[memoryview | None] = []
        bad: list[int] = []
        for cell in range(first, last):
            at = cell * entry.cell_bytes - start
            width = min(entry.cell_bytes, end - start - at)
            piece = cell_data[at : at + width]
            if len(piece) == width and cell_holds(piece, sums, cell):
                cells.append(piece)
            else:
                cells.append(None)
                bad.append(cell)
        return Cells(header, tuple(cells), tuple(bad), None if bad else cell_data[: end - start])

    def _piecewise(self, key: bytes, entry: Entry, file: SegmentFile, first: int, last: int) -> Cells | None:
        """The drive could not read some of it: every cell on its own, so that a bad sector costs one cell."""
        try:
            opened = self._open(key, entry, file.read(entry.offset, entry.payload_start))
        except OSError:
            return None
        if opened is None:
            return None
        header, sums = opened
        cells: list[memoryview | None] = []
        for cell in range(first, last):
            start = cell * entry.cell_bytes
            width = min(entry.cell_bytes, entry.payload_bytes - start)
            try:
                piece = memoryview(file.read(entry.offset + entry.payload_start + start, width))
            except OSError:
                piece = memoryview(b"")
            cells.append(piece if len(piece) == width and cell_holds(piece, sums, cell) else None)
        return Cells(header, tuple(cells), tuple(first + i for i, cell in enumerate(cells) if cell is None))

    def _open(self, key: bytes, entry: Entry, data: Buffer) -> tuple[FragmentHeader, memoryview] | None:
        """(header with its current age, cell sums) when the head is this fragment's and holds."""
        seed = segment_seed(self._index.disk_id, entry.segment)
        head = parse_head(data, 0, entry.offset, seed)
        if head is None or head.kind != FRAGMENT or head.sequence != entry.sequence:
            return None
        if (head.payload_bytes, head.cell_bytes, head.payload_start) != (
            entry.payload_bytes,
            entry.cell_bytes,
            entry.payload_start,
        ):
            return None
        body = parse_body(head, data, 0, seed)
        if body is None:
            return None
        try:
            header = parse_fragment(body[0])
        except FormatError:
            return None
        if header.id != key:
            return None
        if header.created_ms != entry.created_ms:
            header = msgspec.structs.replace(header, created_ms=entry.created_ms)
        return header, body[1]


def _fetch(file: SegmentFile, offset: int, length: int) -> Buffer:
    return file.read(offset, length) if length else b""


def _fetch_cached(file: SegmentFile, offset: int, length: int) -> Buffer:
    if not length:
        return b""
    data = file.read_cached(offset, length)
    if data is None:
        raise _NotCached
    return data
