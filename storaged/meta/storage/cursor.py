"""Rows and pages in LMDB, read within one transaction of their sub-database.

``rowkey.walk`` finds any rows, also those that lie beyond links. Nearly always the rows of a page of a listing lie next
to each other without a link; then ``columns_at`` and ``stamps_at`` read them with one LMDB cursor and without a look at
each key or row. They return None for other rows, which ``walk`` then reads.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import islice
from typing import Any

from storaged.meta.storage.heap import REFERENCE_BYTES, row_of, stamps_of
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.rowkey import NODE_BYTES, SEGMENT_BYTES, find, row_key
from storaged.meta.storage.rowvalue import check_number, open_number
from storaged.meta.store_ports import RowRange, Stamps
from storaged.wire import Buffer

PAGE_AGE_BYTES = 8
"""Each page begins with the time at which it was put last."""

_OWNED = 1 << 63
"""In that time: the length of the owner's name and the name follow, and then the page."""
_OWNER_LENGTH_BYTES = 2

Cursor = Any
"""``lmdb.Cursor``."""


class StoredRows:
    """``rowkey.Rows`` over a transaction of ``rows``."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._transaction.get(key)
        return value

    def read(self, first: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        cursor = self._transaction.cursor()
        return list(islice(cursor.iternext(), limit)) if cursor.set_range(first) else []

    def child(self, link: bytes, value: bytes) -> int:
        return open_number(link, value)


def stored_row(transaction: Transaction, heap: Database, root: int, key: bytes) -> bytes:
    """The row of a key under a root, unverified; empty when there is none. Raises RowDamaged, lmdb.Error."""
    at = row_key(root, key) if len(key) <= SEGMENT_BYTES else find(StoredRows(transaction), root, key)
    return b"" if at is None else row_of(transaction, heap, transaction.get(at, b""))


def check_stored(transaction: Transaction, root: int, key: bytes) -> int:
    """The check of a key's row under a root, as a number; 0 when there is none. Raises RowDamaged, lmdb.Error."""
    at = row_key(root, key) if len(key) <= SEGMENT_BYTES else find(StoredRows(transaction), root, key)
    return 0 if at is None else check_number(transaction.get(at, b""))


def page_ages(transaction: Transaction, after: bytes, limit: int) -> list[tuple[bytes, int]]:
    """As ``MetaStore.pages``. With buffers only the first bytes of each page are touched. Raises lmdb.Error."""
    cursor = transaction.cursor()
    found = islice(cursor.iternext(), limit + 1) if cursor.set_range(after) else ()
    ages = [(bytes(key), page_age(value)) for key, value in found]
    return [page for page in ages if page[0] > after][:limit]


def keys_after(transaction: Transaction, prefix: bytes, after: bytes, limit: int) -> list[bytes]:
    """Up to ``limit`` keys > ``after`` with the prefix, in order. Raises lmdb.Error."""
    cursor = transaction.cursor()
    found: list[bytes] = []
    if limit > 0 and cursor.set_range(max(prefix, after)):
        for key in cursor.iternext(values=False):
            if not key.startswith(prefix) or len(found) >= limit:
                break
            if key > after:
                found.append(bytes(key))
    return found


def pack_page(created_ms: int, owner: bytes, body: bytes) -> bytes:
    """The value of the table of pages."""
    if not owner:
        return created_ms.to_bytes(PAGE_AGE_BYTES, "big") + body
    head = (created_ms | _OWNED).to_bytes(PAGE_AGE_BYTES, "big") + len(owner).to_bytes(_OWNER_LENGTH_BYTES, "big")
    return head + owner + body


def page_age(value: Buffer) -> int:
    """``StoredPage.created_ms``."""
    return int.from_bytes(value[:PAGE_AGE_BYTES], "big") & ~_OWNED


def page_owner(value: Buffer) -> bytes:
    """``StoredPage.owner``, of a value that may be damaged."""
    if not int.from_bytes(value[:PAGE_AGE_BYTES], "big") & _OWNED:
        return b""
    start = PAGE_AGE_BYTES + _OWNER_LENGTH_BYTES
    return bytes(value[start : start + int.from_bytes(value[PAGE_AGE_BYTES:start], "big")])


def page_body(value: bytes) -> bytes:
    owner = page_owner(value)
    return value[PAGE_AGE_BYTES + (_OWNER_LENGTH_BYTES + len(owner) if owner else 0) :]


def columns_at(cursor: Cursor, root: int, wanted: RowRange) -> tuple[list[bytes], list[bytes], bool] | None:
    """Keys and values of the range's rows under ``root``, and whether more follow beyond its limit. None: see the
    module.
    """
    limit = wanted.limit
    if not _set(cursor, root, wanted):
        return None
    entries = list(islice(cursor.iternext(), limit))
    bound = row_key(root, wanted.prefix)
    if entries[-1][0].startswith(bound):
        more = len(entries) == limit and cursor.next() and cursor.key().startswith(bound)
    else:
        more = False
        del entries[bisect_left(entries, True, key=lambda entry: not entry[0].startswith(bound)) :]
    keys = [key[NODE_BYTES:] for key, _ in entries]
    if max(map(len, keys), default=0) > SEGMENT_BYTES:
        return None
    return keys, [value for _, value in entries], more


def stamps_at(cursor: Cursor, root: int, wanted: RowRange, *, with_keys: bool) -> Stamps | None:
    """The stamps of these rows. The cursor yields buffers: only the stamp is touched of a row that is not in the
    heap. None: see the module.
    """
    limit = wanted.limit
    if not _set(cursor, root, wanted):
        return None
    values = list(islice(cursor.iternext(keys=False), limit))
    last, bound, more = bytes(cursor.key()), row_key(root, wanted.prefix), False
    whole = len(values) == limit and last.startswith(bound)
    if whole:
        more = cursor.next() and bytes(cursor.key()).startswith(bound)
    keys: list[bytes] = []
    if with_keys or not whole:
        _set(cursor, root, wanted)
        keys = list(map(bytes, islice(cursor.iternext(values=False), limit)))
    if not whole:
        end = bisect_left(keys, True, key=lambda key: not key.startswith(bound))
        del values[end:], keys[end:]
        last = keys[-1] if keys else b""
    if min(map(len, values), default=REFERENCE_BYTES) < REFERENCE_BYTES:
        return None  # a link
    stamps, row_bytes = stamps_of(values)
    named = [key[NODE_BYTES:] for key in keys] if with_keys else ()
    return Stamps(stamps, len(values), row_bytes, last[NODE_BYTES:], more, named)


def _set(cursor: Cursor, root: int, wanted: RowRange) -> bool:
    """Moves the cursor to the first key of the range. False when there is none, or it can lie beyond a link."""
    first = max(wanted.after + b"\0", wanted.prefix)
    if len(first) > SEGMENT_BYTES or not first.startswith(wanted.prefix):
        return False
    return bool(cursor.set_range(row_key(root, first)))
