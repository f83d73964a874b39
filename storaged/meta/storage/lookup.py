"""Rows and pages in LMDB, each within one read transaction of their sub-database."""

from __future__ import annotations

from itertools import islice

from storaged.meta.storage.heap import row_of
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.rowkey import SEGMENT_BYTES, find, row_key
from storaged.meta.storage.rowvalue import open_small

PAGE_AGE_BYTES = 8
"""Before each page stands when it was put last."""


class StoredRows:
    """``rowkey.Rows``."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._transaction.get(key)
        return value

    def read(self, first: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        cursor = self._transaction.cursor()
        return list(islice(cursor.iternext(), limit)) if cursor.set_range(first) else []

    def child(self, link: bytes, value: bytes) -> int:
        return int.from_bytes(open_small(link, value), "big")


def stored_row(transaction: Transaction, heap: Database, root: int, key: bytes) -> bytes:
    """The row of a key under a root, as it is; empty: there is none. Raises RowDamaged, lmdb.Error."""
    at = row_key(root, key) if len(key) <= SEGMENT_BYTES else find(StoredRows(transaction), root, key)
    return b"" if at is None else row_of(transaction, heap, transaction.get(at, b""))


def page_ages(transaction: Transaction, after: bytes, limit: int) -> list[tuple[bytes, int]]:
    """As ``MetaStore.pages``. With buffers no more than the first bytes of each page are touched. Raises lmdb.Error."""
    cursor = transaction.cursor()
    found = islice(cursor.iternext(), limit + 1) if cursor.set_range(after) else ()
    ages = [(bytes(key), int.from_bytes(value[:PAGE_AGE_BYTES], "big")) for key, value in found]
    return [page for page in ages if page[0] > after][:limit]
