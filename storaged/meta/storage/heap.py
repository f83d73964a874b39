"""The heap: rows that are not short lie apart from their keys in LMDB.

Theory of operation
    Keys arrive in any order, so a page of a tree that is ordered by them is two thirds full, and a checkpoint copies a
    page for nearly each row that it puts. With rows of 600 bytes in that tree a row took 980 bytes, and a checkpoint of
    a large store wrote 30 KiB for each. So the tree holds only a reference: the stamp by which replicas compare rows,
    the row's size, and a number. The row itself lies in ``heap`` under this number. Numbers are given in the order in
    which registers were first written, so the pages of the heap fill up one after the other. A row keeps its number
    while it changes. A short row lies in the tree itself; most short rows are what deleted keys leave.

    sub-database   key                   value
    rows           node || segment       a row of up to 127 bytes (longer ones in stores from before there was a heap),
                                         or a reference, which its size identifies:
                                             offset  bytes
                                             0       10     the row's stamp: format version, check, visibility
                                             10      4      bytes of the row (u32 BE)
                                             14      8      the row's number (u64 BE)
    heap           number (u64 BE)       a row

    The next number is stored in ``meta`` too. The end of the heap alone is not enough: after one flipped bit there, or
    a page whose write was lost, numbers that are in use would be given again, and the rows that had them would be lost.

    A reference whose row is missing, or is another row, is returned in place of the row: no check holds for it, so
    every reader that verifies finds the damage.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.rowvalue import ROW_BYTES_MIN, STAMP_BYTES, intact, open_number, seal_number
from storaged.meta.store_ports import RowDamaged
from storaged.wire import Buffer

Cursor = Any
"""``lmdb.Cursor``."""

INLINE_ROW_BYTES_MAX = 127
"""In the tree, with its share of pages that are not full, a row of this size takes as much as a reference and the row
in the heap.
"""

NEXT_NUMBER = b"\0heap"
"""In ``meta``: check || the next free number (u64 BE)."""

NUMBER_BYTES = 8
_NUMBER_AT = STAMP_BYTES + 4
REFERENCE_BYTES = _NUMBER_AT + NUMBER_BYTES
_REFERENCE = struct.Struct(f">{STAMP_BYTES}sI{NUMBER_BYTES}s")
_NOWHERE = bytes(NUMBER_BYTES)

LINK_BYTES = 16
"""The value of a link in ``rows``: its check and a node."""

assert LINK_BYTES < REFERENCE_BYTES < ROW_BYTES_MIN, "sizes tell them apart"
assert _REFERENCE.size == REFERENCE_BYTES


def refer(row: Buffer, number: bytes) -> bytes:
    """The reference to a row in the heap."""
    return _REFERENCE.pack(bytes(row[:STAMP_BYTES]), len(row), number)


def number_in(reference: bytes) -> bytes:
    return reference[_NUMBER_AT:]


def stamps_of(values: Sequence[Buffer]) -> tuple[bytes, int]:
    """The stamps of the rows that these values of ``rows`` are or refer to, concatenated, and the sum of their bytes.
    Does not read the heap.
    """
    if set(map(len, values)) - {REFERENCE_BYTES}:
        values = [value if len(value) == REFERENCE_BYTES else refer(value, _NOWHERE) for value in values]
    parts = list(_REFERENCE.iter_unpack(b"".join(values)))
    return b"".join([stamp for stamp, _, _ in parts]), sum([size for _, size, _ in parts])


def row_of(transaction: Transaction, heap: Database, value: bytes) -> bytes:
    """The row that a value of ``rows`` is or refers to. Raises lmdb.Error."""
    if len(value) != REFERENCE_BYTES:
        return value
    row: bytes = transaction.get(number_in(value), b"", heap)
    return row if row[:STAMP_BYTES] == value[:STAMP_BYTES] else value


def rows_of(transaction: Transaction, heap: Database, values: Sequence[bytes]) -> list[bytes]:
    """As ``row_of`` of each, with one call into LMDB when all of them are intact references."""
    if not set(map(len, values)) - {REFERENCE_BYTES}:
        with transaction.cursor(heap) as cursor:
            rows = [row for _, row in cursor.getmulti([value[_NUMBER_AT:] for value in values])]
        if [row[:STAMP_BYTES] for row in rows] == [value[:STAMP_BYTES] for value in values]:
            return rows
    return [row_of(transaction, heap, value) for value in values]


class Heap:
    """Writes the rows of a store's checkpoints to ``rows`` and ``heap``, one at a time. A transaction that is not
    committed must be the last, since each number is given once.
    """

    def __init__(self, rows: Database, heap: Database, meta: Database) -> None:
        self._rows = rows
        self._heap = heap
        self._meta = meta
        self._next = 0

    def put(self, transaction: Transaction, rows: Sequence[tuple[bytes, bytes, bytes, bytes]]) -> dict[bytes, bytes]:
        """``rows``: (key in ``rows``, table || scope || shard, key, row), no key twice; an empty row deletes. Returns
        what ``rows`` had under these keys: rows and references. Raises lmdb.Error, RowDamaged.
        """
        fresh: list[tuple[bytes, bytes]] = []
        changed: list[tuple[bytes, bytes]] = []
        entries: list[tuple[bytes, bytes]] = []
        with transaction.cursor(self._rows) as tree, transaction.cursor(self._heap) as heap:
            before = dict(tree.getmulti([at for at, *_ in rows]))
            numbers = self._numbers(before, heap, rows)
            following = self._next or self._following(transaction, heap)
            for at, _, _, row in rows:
                number = numbers.get(at)
                if len(row) <= INLINE_ROW_BYTES_MAX:
                    if row:
                        entries.append((at, row))
                    else:
                        transaction.delete(at, db=self._rows)
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
                raise RowDamaged("the heap of rows has numbers that were never given")
        if fresh:
            transaction.put(NEXT_NUMBER, seal_number(NEXT_NUMBER, following), db=self._meta)
        self._next = following
        return before

    def _following(self, transaction: Transaction, heap: Cursor) -> int:
        last = int.from_bytes(heap.key(), "big") if heap.last() else 0
        try:
            noted = open_number(NEXT_NUMBER, transaction.get(NEXT_NUMBER, b"", db=self._meta))
        except RowDamaged:  # or missing: the heap was empty then
            noted = 1
        return max(noted, last + 1)

    @staticmethod
    def _numbers(
        before: Mapping[bytes, bytes], heap: Cursor, rows: Sequence[tuple[bytes, bytes, bytes, bytes]]
    ) -> dict[bytes, bytes]:
        """The numbers, by key in ``rows``, of the rows that are in the heap. A damaged reference may name another key's
        row, and is left out.
        """
        found = {at: number_in(value) for at, value in before.items() if len(value) == REFERENCE_BYTES}
        if found:
            known = dict(heap.getmulti(list(found.values())))
            names = {at: (prefix, key) for at, prefix, key, _ in rows}
            found = {at: number for at, number in found.items() if intact(*names[at], known.get(number, b"\0"))}
        return found
