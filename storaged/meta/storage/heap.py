"""Rows apart from their keys: how a row that is not short lies in LMDB.

Theory of operation
    Keys arrive in any order, so a page of a tree that is ordered by them is two thirds full, and a checkpoint copies a
    page for nearly each row that it puts. With rows of
    600 bytes in that tree a row took 980 bytes, and a checkpoint of a large store wrote 30 KiB for each. So the tree
    has no more of a row than what stands for it where replicas
    compare rows, its size, and a number; the row itself lies in ``heap`` under this number. Numbers are given in the
    order in which registers were first written: the pages of the heap fill
    up one after the other. A row keeps its number while it changes. A short one (most of them are what deleted keys
    leave) lies in the tree itself.

    sub-database   key                   value
    rows           node || segment       a row of up to 127 bytes (longer ones in stores from before there was a heap),
    or a reference, told by its size:
                                             offset  bytes
                                             0       10     the row's stamp: format version, check, visibility
                                             10      4      bytes of the row (u32 BE)
                                             14      8      the row's number (u64 BE)
    heap           number (u64 BE)       a row

    The next number stands in ``meta`` too. The end of the heap alone does not tell it: one flipped bit there, or a page
    whose write was lost, and numbers that others have would
    be given again, to rows that nobody finds then.

    A reference whose row is gone, or is not the one that it stands for, is taken for the row: no check holds for it, so
    it is damage to everyone who verifies.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from storaged.meta.ports import RowDamaged
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.rowvalue import ROW_BYTES_MIN, STAMP_BYTES, intact, open_small, seal_small
from storaged.wire import Buffer

Cursor = Any
"""``lmdb.Cursor``."""

INLINE_ROW_BYTES_MAX = 127
"""With its share of pages that are not full, a row of this size takes as much in the tree as a reference and the row in
the heap.
"""

NEXT_NUMBER = b"\0heap"
"""In ``meta``: check || the next number to give out (u64 BE)."""

NUMBER_BYTES = 8
_NUMBER_AT = STAMP_BYTES + 4
REFERENCE_BYTES = _NUMBER_AT + NUMBER_BYTES
_REFERENCE = struct.Struct(f">{STAMP_BYTES}sI{NUMBER_BYTES}s")
_NOWHERE = bytes(NUMBER_BYTES)

LINK_BYTES = 16
"""The value of a link in ``rows``: its check and a node."""

assert LINK_BYTES < REFERENCE_BYTES < ROW_BYTES_MIN, "each is told by its size"
assert _REFERENCE.size == REFERENCE_BYTES


def refer(row: Buffer, number: bytes) -> bytes:
    """The reference to a row in the heap."""
    return _REFERENCE.pack(bytes(row[:STAMP_BYTES]), len(row), number)


def number_in(reference: bytes) -> bytes:
    return reference[_NUMBER_AT:]


def stamps_of(values: Sequence[Buffer]) -> tuple[bytes, int]:
    """Of the rows that values of ``rows`` are, or stand for: their stamps one behind the other, and their bytes
    together. Nothing is read in the heap.
    """
    if set(map(len, values)) - {REFERENCE_BYTES}:
        values = [value if len(value) == REFERENCE_BYTES else refer(value, _NOWHERE) for value in values]
    parts = list(_REFERENCE.iter_unpack(b"".join(values)))
    return b"".join([stamp for stamp, _, _ in parts]), sum([size for _, size, _ in parts])


def row_of(transaction: Transaction, heap: Database, value: bytes) -> bytes:
    """The row that a value of ``rows`` is, or stands for. Raises lmdb.Error."""
    if len(value) != REFERENCE_BYTES:
        return value
    row: bytes = transaction.get(number_in(value), b"", heap)
    return row if row[:STAMP_BYTES] == value[:STAMP_BYTES] else value


def rows_of(transaction: Transaction, heap: Database, values: Sequence[bytes]) -> list[bytes]:
    """As ``row_of`` of each, with one call into LMDB where all of them are whole in the heap."""
    if not set(map(len, values)) - {REFERENCE_BYTES}:
        with transaction.cursor(heap) as cursor:
            rows = [row for _, row in cursor.getmulti([value[_NUMBER_AT:] for value in values])]
        if [row[:STAMP_BYTES] for row in rows] == [value[:STAMP_BYTES] for value in values]:
            return rows
    return [row_of(transaction, heap, value) for value in values]


class Heap:
    """What a store's checkpoints put into ``rows`` and ``heap``, one at a time. A transaction that is not committed
    must be the last: numbers are given once.
    """

    def __init__(self, rows: Database, heap: Database, meta: Database) -> None:
        self._rows = rows
        self._heap = heap
        self._meta = meta
        self._next = 0

    def put(self, transaction: Transaction, rows: Sequence[tuple[bytes, bytes, bytes, bytes]]) -> None:
        """``rows``: (key in ``rows``, table || scope || shard, key, row), no key twice. Raises
        lmdb.Error, RowDamaged.
        """
        fresh: list[tuple[bytes, bytes]] = []
        changed: list[tuple[bytes, bytes]] = []
        entries: list[tuple[bytes, bytes]] = []
        with transaction.cursor(self._rows) as tree, transaction.cursor(self._heap) as heap:
            numbers = self._numbers(tree, heap, rows)
            following = self._next or self._following(transaction, heap)
            for at, _, _, row in rows:
                number = numbers.get(at)
                if len(row) <= INLINE_ROW_BYTES_MAX:
                    entries.append((at, row))
                    if number is not None:
                        transaction.delete(number, db=self._heap)
                    continue
                if number is None:
                    number = following.to_bytes(NUMBER_BYTES, "big")
                    following += 1
                    fresh.append((number, row))
                else:
                    changed.append((number, row))
                entries.append((at, refer(row, number)))
            tree.putmulti(entries)
            heap.putmulti(changed)
            if heap.putmulti(fresh, append=True)[1] != len(fresh):
                raise RowDamaged("the heap of rows has numbers that nobody was given")
        if fresh:
            transaction.put(
                NEXT_NUMBER, seal_small(NEXT_NUMBER, following.to_bytes(NUMBER_BYTES, "big")), db=self._meta
            )
        self._next = following

    def _following(self, transaction: Transaction, heap: Cursor) -> int:
        last = int.from_bytes(heap.key(), "big") if heap.last() else 0
        try:
            told = int.from_bytes(open_small(NEXT_NUMBER, transaction.get(NEXT_NUMBER, b"", db=self._meta)), "big")
        except RowDamaged:  # or never told: there was nothing yet
            told = 1
        return max(told, last + 1)

    @staticmethod
    def _numbers(tree: Cursor, heap: Cursor, rows: Sequence[tuple[bytes, bytes, bytes, bytes]]) -> dict[bytes, bytes]:
        """By their keys in ``rows``, of those that are in the heap. A reference that is damaged may name somebody
        else's row: it counts for nothing then.
        """
        found = {
            at: number_in(value)
            for at, value in tree.getmulti([at for at, *_ in rows])
            if len(value) == REFERENCE_BYTES
        }
        if found:
            known = dict(heap.getmulti(list(found.values())))
            names = {at: (prefix, key) for at, prefix, key, _ in rows}
            found = {at: number for at, number in found.items() if intact(*names[at], known.get(number, b"\0"))}
        return found
