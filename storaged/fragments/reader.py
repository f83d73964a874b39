"""Reading fragments: every cell is verified before it leaves, whichever thread reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import xxhash

from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing
from storaged.fragments.damage import HEAD_CELL
from storaged.fragments.entry import Entry
from storaged.fragments.files import SegmentFile
from storaged.fragments.format import (
    ALIGNMENT,
    CHECK_MASK,
    FRAGMENT,
    HEAD,
    HEAD_BYTES,
    HEAD_CHECKED_BYTES,
    ID_AT,
    KEY_BYTES,
    RECORD_MAGIC,
    TRAILER_BYTES,
    FormatError,
    align,
    cell_holds,
    parse_fragment,
    segment_seed,
)
from storaged.fragments.index import Index
from storaged.fragments.ports import FragmentHeader
from storaged.lmdb_file import MEDIA_ERRORS
from storaged.units import MIB
from storaged.wire import Buffer

MOVED_RETRIES_MAX = 8
"""How often compaction may move a fragment while it is read, before the fragment counts as damaged."""


class Cells(NamedTuple):
    """Some cells of one fragment. ``bad``: cells that failed; never HEAD_CELL, which raises. ``whole``: all of them in
    one piece, when none failed. ``unread``: the drive reported an error for one that failed.
    """

    header: FragmentHeader
    cells: tuple[memoryview | None, ...]
    bad: tuple[int, ...]
    whole: memoryview | None = None
    unread: bool = False


class _NotCached(Exception):
    pass


class _HeadUnread(Exception):
    """The drive reported an error for the head of a record."""


class Reader:
    """Reads what the index names. Usable from any thread."""

    def __init__(
        self, index: Index, segments: Mapping[int, SegmentFile], on_damage: Callable[[bytes, int], None]
    ) -> None:
        """``on_damage(packed id, cell)`` is called from the thread that reads, once for every cell newly found bad."""
        self._index = index
        self._segments = segments
        self._on_damage = on_damage
        self._seeds: dict[int, int] = {}

    def read(self, key: bytes, first: int, count: int) -> Cells:
        """Cells ``first .. first + count - 1``, fewer at the end. Raises FragmentMissing, and FragmentDamaged when the
        record's head does not hold, or the drive can't read it (``FragmentDamaged.unread``).
        """
        failed: Cells | None = None
        unread = False
        before: Entry | None = None
        for _ in range(MOVED_RETRIES_MAX):
            entry = self._lookup(key)
            if before is not None and before[:2] == entry[:2]:
                break  # it did not move: what failed is damaged
            try:
                found, unread = self._attempt(key, entry, first, count, _fetch), False
            except _HeadUnread:
                found, unread = None, True
            if found is not None and not found.bad:
                return found
            failed, before = found, entry
        if failed is None:
            self._report(key, (HEAD_CELL,))
            if unread:
                raise FragmentDamaged(f"the drive can't read the head of fragment {key.hex()}", unread="yes")
            raise FragmentDamaged(f"the head of fragment {key.hex()} is damaged on the disk")
        self._report(key, failed.bad)
        return failed

    def try_read(self, key: bytes, entry: Entry, first: int, count: int) -> Cells | None:
        """As ``read`` when all of it is in the page cache and undamaged, else None. ``entry``: the index's, of now."""
        try:
            found = self._attempt(key, entry, first, count, _try_fetch)
        except (_NotCached, _HeadUnread):
            return None
        return None if found is None or found.bad else found

    def try_read_copy(self, data_id: bytes, bytes_max: int) -> memoryview | None:
        """The payload of a data id's whole copy, when it is in the page cache and undamaged. Verified as ``read`` does,
        but for the header's fields. None for anything else; ``read`` finds out why.
        """
        found = self._index.copy_entry(data_id)
        if found is None:
            return None
        key, entry = found
        segment, offset, _, payload_start, payload_bytes, _, _, _, _ = entry
        file = self._segments.get(segment)
        if file is None or payload_bytes > bytes_max:
            return None
        try:
            data = file.try_read(offset, payload_start + payload_bytes)
        except OSError:
            return None
        if data is None:
            return None
        return _whole_payload(data, key, entry, self._seed(segment))

    def _seed(self, segment: int) -> int:
        seed = self._seeds.get(segment)
        if seed is None:
            seed = self._seeds[segment] = segment_seed(self._index.disk_id, segment)
        return seed

    def header(self, key: bytes) -> FragmentHeader:
        """Raises as ``read``."""
        return self.read(key, 0, 0).header

    def verify(self, key: bytes, *, on_drive: bool = False) -> tuple[int, ...]:
        """Reads all of it, about a MiB at a time. Returns the cells that failed. Raises as ``read``. ``on_drive``: what
        the page cache has is dropped first, for it would hide what became of the bytes since.
        """
        entry = self._index.lookup(key)
        if on_drive and entry is not None and (file := self._segments.get(entry.segment)) is not None:
            with contextlib.suppress(OSError):  # the read finds out
                file.drop_cache(entry.offset, entry.record_bytes)
        step = max(1, MIB // max(entry.cell_bytes, 1)) if entry is not None else 1
        bad: list[int] = []
        first, cells = 0, 1
        while first < cells:
            found = self.read(key, first, step)
            bad.extend(found.bad)
            cells = -(-found.header.length // found.header.cell_bytes)
            first += step
        return tuple(bad)

    def _lookup(self, key: bytes) -> Entry:
        entry = self._index.lookup(key)
        if entry is None:
            raise FragmentMissing(f"the disk does not hold fragment {key.hex()}")
        return entry

    def _report(self, key: bytes, cells: tuple[int, ...]) -> None:
        for cell in cells:
            if self._index.damage.add(key, cell):
                self._on_damage(key, cell)

    def _attempt(
        self, key: bytes, entry: Entry, first: int, count: int, fetch: Callable[[SegmentFile, int, int], Buffer]
    ) -> Cells | None:
        """None when the head does not hold. Raises _HeadUnread, DiskUnusable."""
        file = self._segments.get(entry.segment)
        if file is None:
            return None
        there = entry.cells
        first = min(first, there)
        last = min(first + max(count, 0), there)
        start = min(first * entry.cell_bytes, entry.payload_bytes)
        end = min(last * entry.cell_bytes, entry.payload_bytes)
        payload = entry.offset + entry.payload_start
        try:
            if first == 0:  # head and cells lie together: one read
                data = fetch(file, entry.offset, entry.payload_start + end)
                head_data, cell_data = data, memoryview(data)[entry.payload_start :]
            else:
                head_data = fetch(file, entry.offset, entry.payload_start)
                cell_data = memoryview(fetch(file, payload + start, end - start))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in MEDIA_ERRORS:  # it says nothing of the bytes
                raise DiskUnusable(f"fragment {key.hex()} cannot be read now: {error.strerror or error}") from None
            return self._piecewise(key, entry, file, first, last)
        opened = self._open(key, entry, head_data)
        if opened is None:
            return None
        header, sums = opened
        cells: list[memoryview | None] = []
        bad: list[int] = []
        full, length = entry.cell_bytes, end - start
        for cell in range(first, last):
            at = cell * full - start
            width = min(full, length - at)
            piece = cell_data[at : at + width]
            if len(piece) == width and cell_holds(piece, sums, cell):
                cells.append(piece)
            else:
                cells.append(None)
                bad.append(cell)
        return Cells(header, tuple(cells), tuple(bad), None if bad else cell_data[: end - start])

    def _piecewise(self, key: bytes, entry: Entry, file: SegmentFile, first: int, last: int) -> Cells | None:
        """The drive could not read some of it: every cell is read on its own, so that a bad sector costs one cell.
        Raises _HeadUnread.
        """
        try:
            opened = self._open(key, entry, file.read(entry.offset, entry.payload_start))
        except FileNotFoundError:
            return None
        except OSError:
            raise _HeadUnread from None
        if opened is None:
            return None
        header, sums = opened
        cells: list[memoryview | None] = []
        unread = False
        for cell in range(first, last):
            start = cell * entry.cell_bytes
            width = min(entry.cell_bytes, entry.payload_bytes - start)
            try:
                piece = memoryview(file.read(entry.offset + entry.payload_start + start, width))
            except OSError:
                piece, unread = memoryview(b""), True
            cells.append(piece if len(piece) == width and cell_holds(piece, sums, cell) else None)
        bad = tuple(first + i for i, cell in enumerate(cells) if cell is None)
        return Cells(header, tuple(cells), bad, unread=unread)

    def _open(self, key: bytes, entry: Entry, data: Buffer) -> tuple[FragmentHeader, memoryview] | None:
        """(header with its current age, cell sums) when the head is this fragment's and holds."""
        body = _body_of(data, entry, self._seed(entry.segment))
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


def _body_of(data: Buffer, entry: Entry, seed: int) -> tuple[memoryview, memoryview] | None:
    """The message and the cell sums of the record that ``data`` begins with, when it is the fragment's that the entry
    names, and its checksums hold. It checks what ``parse_head`` and ``parse_body`` check, in one pass.
    """
    if len(data) < HEAD_BYTES:
        return None
    _, offset, _, payload_start, payload_bytes, cell_bytes, sequence, _, _ = entry
    magic, kind, _zero, _flags, message, payload, cell, record, _synced, found, body_check, check = HEAD.unpack_from(
        data
    )
    if (
        magic != RECORD_MAGIC
        or kind != FRAGMENT
        or payload != payload_bytes
        or cell != cell_bytes
        or found != sequence
        or (payload and not cell)
    ):
        return None
    view = memoryview(data)
    body_end = HEAD_BYTES + message + (8 * -(-payload // cell) if payload else 0)
    sizes_hold = (
        align(body_end) == payload_start
        and record >= payload_start + align(payload) + TRAILER_BYTES
        and not record % ALIGNMENT
    )
    if not sizes_hold or check != xxhash.xxh3_64_intdigest(view[:HEAD_CHECKED_BYTES], (seed + offset) & CHECK_MASK):
        return None
    body = view[HEAD_BYTES:body_end]
    if len(body) < body_end - HEAD_BYTES or body_check != xxhash.xxh3_64_intdigest(body, seed):
        return None
    return body[:message], body[message:]


def _whole_payload(data: Buffer, key: bytes, entry: Entry, seed: int) -> memoryview | None:
    """The payload of the fragment ``key``, when ``data`` is its record up to the trailer, and record and every cell
    hold.
    """
    body = _body_of(data, entry, seed)
    if body is None or body[0][ID_AT : ID_AT + KEY_BYTES] != key:
        return None
    sums, plain = body[1], memoryview(data)[entry.payload_start :]
    payload, cell = entry.payload_bytes, entry.cell_bytes
    if payload <= cell:
        return plain if xxhash.xxh3_64_digest(plain) == sums else None
    for index, at in enumerate(range(0, payload, cell)):
        if not cell_holds(plain[at : at + cell], sums, index):
            return None
    return plain


def _fetch(file: SegmentFile, offset: int, length: int) -> Buffer:
    return file.read(offset, length) if length else b""


def _try_fetch(file: SegmentFile, offset: int, length: int) -> Buffer:
    if not length:
        return b""
    data = file.try_read(offset, length)
    if data is None:
        raise _NotCached
    return data
