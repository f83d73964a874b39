"""Rows that lie one behind the other in the map, read together: what listings read, over one LMDB cursor.

``rowkey.walk`` finds any rows, also those behind links. Nearly always the rows of a page are one stretch without a
link; then neither their keys nor they
themselves have to be looked at one by one. None where they are not: ``walk`` does it then.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import islice
from typing import Any

from storaged.meta.ports import Stamps
from storaged.meta.storage.heap import REFERENCE_BYTES, stamps_of
from storaged.meta.storage.rowkey import NODE_BYTES, SEGMENT_BYTES, row_key

Cursor = Any
"""``lmdb.Cursor``."""


def columns_at(
    cursor: Cursor, root: int, *, after: bytes, prefix: bytes, limit: int
) -> tuple[list[bytes], list[bytes], bool] | None:
    """Keys and values of the ``limit`` rows under ``root`` with key > ``after`` and the prefix, and whether there are
    more.
    """
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
    return keys, [value for _, value in entries], more


def stamps_at(cursor: Cursor, root: int, *, after: bytes, prefix: bytes, limit: int) -> Stamps | None:
    """The stamps of these rows. The cursor gives buffers: of a row that is not in the heap no more than the stamp is
    touched.
    """
    if not _set(cursor, root, after, prefix):
        return None
    values = list(islice(cursor.iternext(keys=False), limit))
    last, bound, more = bytes(cursor.key()), row_key(root, prefix), False
    if len(values) == limit and last.startswith(bound):
        more = cursor.next() and bytes(cursor.key()).startswith(bound)
    else:
        _set(cursor, root, after, prefix)
        keys = list(map(bytes, islice(cursor.iternext(values=False), limit)))
        del values[bisect_left(keys, True, key=lambda key: not key.startswith(bound)) :]
        last = keys[len(values) - 1] if values else b""
    if min(map(len, values), default=REFERENCE_BYTES) < REFERENCE_BYTES:
        return None  # a link
    stamps, row_bytes = stamps_of(values)
    return Stamps(stamps, len(values), row_bytes, last[NODE_BYTES:], more)


def _set(cursor: Cursor, root: int, after: bytes, prefix: bytes) -> bool:
    """Whether the cursor is where such a stretch may begin."""
    first = max(after + b"\0", prefix)
    return len(first) <= SEGMENT_BYTES and first.startswith(prefix) and bool(cursor.set_range(row_key(root, first)))
