"""Heads of a disk's fragments, for walks over all of it: in the order of their ids, or as they lie in the log. In a
thread: they are read from the disk.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from storaged.errors import FragmentDamaged, FragmentMissing
from storaged.fragments.engine import Engine
from storaged.fragments.entry import BROKEN
from storaged.fragments.files import SegmentFile
from storaged.fragments.format import (
    ALIGNMENT,
    FRAGMENT,
    SEGMENT_HEADER_BYTES,
    FormatError,
    parse_fragment,
    segment_seed,
)
from storaged.fragments.ports import FragmentHeader
from storaged.fragments.scan import Found, Gap, scan

_PLACE = struct.Struct(">IQ")
"""Segment and offset, from which a walk in the order of the log goes on."""
RECORDS_MAX = 2000
"""Records looked at for one page: a segment may be mostly garbage."""


def heads_after(engine: Engine, after: bytes, limit: int) -> list[tuple[bytes, FragmentHeader | None]]:
    """Of the next ``limit`` fragments; None for one that is gone by now."""
    return _heads(engine, engine.index.keys(after, limit))


def aged(engine: Engine, after: bytes, limit: int, since_ms: int, before_ms: int) -> tuple[list[FragmentHeader], bytes]:
    """As ``ports.NearStore.aged``."""
    keys = engine.index.keys(after, limit)
    entries = engine.index.lookup_all(keys)
    wanted = [
        key
        for key, entry in zip(keys, entries, strict=True)
        if entry is not None and since_ms <= entry.created_ms < before_ms
    ]
    return [header for _, header in _heads(engine, wanted) if header is not None], keys[-1] if keys else b""


def in_log_order(engine: Engine, after: bytes, limit: int) -> tuple[list[tuple[FragmentHeader, bytes]], bytes]:
    """As ``ports.NearStore.in_log_order``: a page lies in one segment. What compaction moves comes again, later in the
    log. Where the log does not parse, the index names what should be there: one page takes only a part of them,
    because each head is a separate read, and a disk whose thread works for a minute counts as hung.
    """
    number, offset = _PLACE.unpack(after) if len(after) == _PLACE.size else (0, 0)
    left = sorted(segment for segment in list(engine.log.segments) if segment >= number)
    if not left:
        return [], b""
    segment, following = left[0], _PLACE.pack(left[0] + 1, 0)
    file = engine.log.segments.get(segment)
    if file is None:
        return [], following
    start = offset if segment == number and offset else SEGMENT_HEADER_BYTES
    page: list[tuple[FragmentHeader, bytes]] = []
    try:
        for count, item in enumerate(_records(engine, segment, file, start)):
            if isinstance(item, Gap) or item.message is None:
                if page:
                    return page, _PLACE.pack(segment, item.offset)
                return _indexed(engine, segment, item, limit)
            if (header := _live(engine, segment, item)) is not None:
                page.append((header, _PLACE.pack(segment, item.end)))
            if len(page) == limit or count == RECORDS_MAX:
                return page, _PLACE.pack(segment, item.end)
    except FileNotFoundError:
        pass  # it was compacted meanwhile
    return page, following


def _records(engine: Engine, segment: int, file: SegmentFile, start: int) -> Iterator[Found | Gap]:
    end = engine.log.end.offset if segment == engine.log.active else file.size()
    return scan(file, segment_seed(engine.index.disk_id, segment), start, end)


def _live(engine: Engine, segment: int, found: Found) -> FragmentHeader | None:
    """The head of a record that the index names; None for notes and garbage."""
    if found.head.kind != FRAGMENT or found.message is None:
        return None
    try:
        header = parse_fragment(found.message)
    except FormatError:
        return None
    entry = engine.index.lookup(header.id)
    if entry is BROKEN:  # which one of its records counts is not known: all are looked at
        return header
    counts = entry is not None and (entry.segment, entry.offset) == (segment, found.offset)
    return header if counts else None


def _indexed(
    engine: Engine, segment: int, gap: Found | Gap, limit: int
) -> tuple[list[tuple[FragmentHeader, bytes]], bytes]:
    """A page of the fragments that lie in the gap by the index."""
    there = sorted(
        (entry.offset, key)
        for key, entry in engine.index.entries()
        if entry.segment == segment and gap.offset <= entry.offset < gap.end
    )
    places = {key: _PLACE.pack(segment, offset + ALIGNMENT) for offset, key in there[:limit]}
    page = [(header, places[key]) for key, header in _heads(engine, list(places)) if header is not None]
    return page, places[there[limit - 1][1]] if len(there) > limit else _PLACE.pack(segment, gap.end)


def _heads(engine: Engine, keys: Sequence[bytes]) -> list[tuple[bytes, FragmentHeader | None]]:
    page: list[tuple[bytes, FragmentHeader | None]] = []
    for key in keys:
        header = None
        try:
            header = engine.reader.header(key)
        except FragmentMissing:
            pass
        except FragmentDamaged:
            entry = engine.index.lookup(key)
            if entry is not None:
                header = FragmentHeader(key, b"", b"", (), entry.cell_bytes, entry.payload_bytes, entry.created_ms)
        page.append((key, header))
    return page
