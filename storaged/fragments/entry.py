"""Where a fragment is, and how the index stores that. Pure.

    offset  bytes  the short form                             offset  bytes  the long form
    0       4      segment                                    0       4      segment
    4       4      offset of the record                       4       4      offset of the record
    8       4      P, bytes of the payload                    8       4      R, bytes of the record
    12      2      offset of the payload in it, by 8          12      4      offset of the payload in it
    14      1      log2 of C, the bytes of a cell             16      4      P
    15      6      sequence                                   20      4      C
    21      6      created, ms                                24      8      sequence
                                                              32      8      created, ms
                                                              40      4n     other segments with older records
    27      4      check                                      40+4n   4      check

Nearly all entries have the short form: it has no such segments, and R follows from payload, padding and trailer. Its 31
bytes are no length of the long form. The check is the low half of xxh3-64 over the key and all bytes before it: a
misplaced or flipped entry does not hold. With the fragment's key and LMDB's overhead an entry takes 64 bytes of a page
in the short form, 78 in the long one, which is the only one in indexes of version 1.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import xxhash

from storaged.fragments.format import ALIGNMENT, TRAILER_BYTES, align


class Entry(NamedTuple):
    """Where the record of a fragment is that counts. ``payload_start`` is relative to ``offset``. ``shadows``: other
    segments with older records. Segment 0 does not exist: the entry itself is damaged (BROKEN).
    """

    segment: int
    offset: int
    record_bytes: int
    payload_start: int
    payload_bytes: int
    cell_bytes: int
    sequence: int
    created_ms: int
    shadows: tuple[int, ...] = ()

    @property
    def cells(self) -> int:
        return -(-self.payload_bytes // self.cell_bytes) if self.payload_bytes else 0


BROKEN = Entry(0, 0, 0, 0, 0, 1, 0, 0)

_SHORT = struct.Struct(">IIIHBHIHI")
_LONG = struct.Struct(">6I2Q")
_CHECK = struct.Struct(">I")
_LOW = 0xFFFFFFFF
SHORT_BYTES = _SHORT.size + _CHECK.size
assert (_SHORT.size, _LONG.size) == (27, 40)


def pack_entry(key: bytes, entry: Entry) -> bytes:
    segment, offset, record_bytes, payload_start, payload_bytes, cell_bytes, sequence, created_ms, shadows = entry
    cell_log = max(cell_bytes.bit_length() - 1, 0)
    start = payload_start // ALIGNMENT
    short = (
        not shadows
        and record_bytes == payload_start + align(payload_bytes) + TRAILER_BYTES
        and cell_bytes == 1 << cell_log
        and payload_start == start * ALIGNMENT < 1 << 19
        and sequence < 1 << 48
        and created_ms < 1 << 48
    )
    if short:
        raw = _SHORT.pack(
            segment,
            offset,
            payload_bytes,
            start,
            cell_log,
            sequence >> 32,
            sequence & _LOW,
            created_ms >> 32,
            created_ms & _LOW,
        )
    else:
        raw = _LONG.pack(*entry[:8]) + struct.pack(f">{len(shadows)}I", *shadows)
    return raw + _CHECK.pack(xxhash.xxh3_64_intdigest(key + raw) & _LOW)


def unpack_entry(key: bytes, value: Any) -> Entry:
    """Returns BROKEN when the check does not hold."""
    raw = bytes(value)
    body = raw[:-4]
    if len(raw) < 4 or _CHECK.unpack(raw[-4:])[0] != xxhash.xxh3_64_intdigest(key + body) & _LOW:
        return BROKEN
    if len(raw) == SHORT_BYTES:
        segment, offset, payload_bytes, start, cell_log, sequence, sequence_low, created, created_low = _SHORT.unpack(
            body
        )
        payload_start = start * ALIGNMENT
        return Entry(
            segment,
            offset,
            payload_start + align(payload_bytes) + TRAILER_BYTES,
            payload_start,
            payload_bytes,
            1 << cell_log,
            sequence << 32 | sequence_low,
            created << 32 | created_low,
        )
    if len(body) < _LONG.size or len(body) % 4:
        return BROKEN
    shadows = struct.unpack_from(f">{(len(body) - _LONG.size) // 4}I", body, _LONG.size)
    return Entry._make((*_LONG.unpack_from(body), shadows))
