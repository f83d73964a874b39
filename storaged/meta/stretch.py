"""Rows that lie one behind the other in the map, read together: what listings read, over one LMDB cursor.

``rowkey.walk`` finds any rows, also those behind links. Nearly always the rows of a page are one stretch without a link; then neither their keys nor they
themselves have to be looked at one by one. None where they are not: ``walk`` does it then.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from itertools import islice
from typing import Any

from storaged.meta.ports import Stamps
from storaged.meta.rowkey import NODE_BYTES, SEGMENT_BYTES, row_key
from storaged.meta.rowvalue import ROW_BYTES_MIN, STAMP_BYTES

Cursor = Any
"""``lmdb.Cursor``."""

_stamp = struct.Struct(f"{STAMP_BYTES}s").unpack_from

assert ROW_BYTES_MIN > STAMP_BYTES
assert ROW_BYTES_MIN > 2 * 8, "the value of a link is shorter than any row"


def columns_at(cursor: Cursor, root: int, *, after: bytes, prefix: bytes, limit: int) -> tuple[list[bytes], list[bytes], bool] | None:
    """Keys and rows of the ``limit`` rows under ``root`` with key > ``after`` and the prefix, and whether there are more."""
    if not _set(cursor, root, after, prefix):
        return None
    entries = list(islice(cursor.iternext(), limit))
    bound = row_key(root, prefix)
    if entries[-1][0].startswith(bound):
        more = len(entries) == limit and cursor.next() and cursor.key().startswith(bound)
    else:
        more = False
        del entries[bisect_left(entries, True, key=lambda entry: not entry[0].startswith(bound)) :]
    keys = [key[NODE_BYTES:] for key, _ in entries]
    if max(map(len, keys), default=0) > SEGMENT_BYTES:
        return None
    return keys, [row for _, row in entries], more


def stamps_at(cursor: Cursor, root: int, *, after: bytes, prefix: bytes, limit: int) -> Stamps | None:
    """The stamps of these rows. The cursor gives buffers: of 700 bytes a row no more than the stamp is touched."""
    if not _set(cursor, root, after, prefix):
        return None
    rows = list(islice(cursor.iternext(keys=False), limit))
    last, bound, more = bytes(cursor.key()), row_key(root, prefix), False
    if len(rows) == limit and last.startswith(bound):
        more = cursor.next() and bytes(cursor.key()).startswith(bound)
    else:
        _set(cursor, root, after, prefix)
        keys = list(map(bytes, islice(cursor.iternext(values=False), limit)))
        del rows[bisect_left(keys, True, key=lambda key: not key.startswith(bound)) :]
        last = keys[len(rows) - 1] if rows else b""
    sizes = list(map(len, rows))
    if min(sizes, default=ROW_BYTES_MIN) < ROW_BYTES_MIN:
        return None
    return Stamps(b"".join([_stamp(row)[0] for row in rows]), len(rows), sum(sizes), last[NODE_BYTES:], more)


def _set(cursor: Cursor, root: int, after: bytes, prefix: bytes) -> bool:
    """Whether the cursor is where such a stretch may begin."""
    first = max(after + b"\0", prefix)
    return len(first) <= SEGMENT_BYTES and first.startswith(prefix) and bool(cursor.set_range(row_key(root, first)))
