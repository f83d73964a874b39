"""Rows and small values that are durable in the redo log and not yet in LMDB, and how reads merge them. Pure.

An empty row means that the row was deleted.

The event loop adds to an overlay; at a start one thread does. A checkpoint's thread may read it meanwhile: each access
to one of its tables is a single step of the interpreter, and a table never shrinks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice

from storaged.meta.storage.batch import LoggedBatch, PackedBatch
from storaged.meta.store_ports import RowRange


class Table(dict[bytes, bytes]):
    """Rows by key, of one table || scope || shard."""

    __slots__ = ("_ordered",)

    def __init__(self) -> None:
        super().__init__()
        self._ordered: list[bytes] = []

    def ordered(self) -> list[bytes]:
        """The keys in order. They are kept, since a listing reads a table once for every few rows. Event loop only."""
        known = self._ordered
        if len(known) < len(self):  # a dict lists its keys in the order of insertion: the new ones come last
            self._ordered = known = sorted(known + list(self)[len(known) :])
        return known

    def range_of(self, wanted: RowRange) -> tuple[list[bytes], int]:
        """The keys in order, and the index of the first that ``wanted`` may include."""
        keys = self.ordered()
        return keys, max(bisect_right(keys, wanted.after), bisect_left(keys, wanted.prefix))


class Overlay:
    """The newest row and small value of each name in some groups of the log."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Table] = {}
        """By table || scope || shard, then by key."""
        self.others: dict[tuple[bytes, bytes], bytes | None] = {}

    def add(self, batches: Iterable[PackedBatch | LoggedBatch]) -> None:
        rows, others = self.rows, self.others
        for batch in batches:
            for prefix, key, row in batch.rows:
                table = rows.get(prefix)
                if table is None:
                    table = rows[prefix] = Table()
                table[key] = row
            for database, key, value in batch.others:
                others[database, key] = value


def overlay_row(overlays: tuple[Overlay, Overlay], prefix: bytes, key: bytes) -> bytes | None:
    """What has not reached LMDB of a register: its row, or empty when the row was deleted. ``overlays``: the fresh one,
    then the frozen one. In this order no row is missed: what leaves the fresh one is in the frozen one by then, and
    what leaves that one is in LMDB.
    """
    for overlay in overlays:
        table = overlay.rows.get(prefix)
        if table is not None and (row := table.get(key)) is not None:
            return row
    return None


def has_rows(tables: Sequence[Table], wanted: RowRange, *, through: bytes | None) -> bool:
    """Whether ``tables`` have rows of the range, whatever its limit, up to ``through`` (None: to the end)."""
    for table in tables:
        keys, first = table.range_of(wanted)
        if first < len(keys) and keys[first].startswith(wanted.prefix) and (through is None or keys[first] <= through):
            return True
    return False


def merge(
    stored: list[tuple[bytes, bytes]], tables: Sequence[Table], wanted: RowRange
) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    """The range's rows from LMDB (``stored``, up to the range's limit), with the rows of ``tables``, oldest first,
    added or put in their place, and without those that were deleted. Then the last key that was looked at, where there
    may be more rows after it; None where there are none.
    """
    limit = wanted.limit
    # LMDB may have more rows after its last one here, which were not read.
    through = stored[-1][0] if stored and len(stored) >= limit else None
    found = dict(stored)
    gone = False
    for table in tables:
        keys, first = table.range_of(wanted)
        room = limit
        for key in islice(keys, first, None):
            if not key.startswith(wanted.prefix) or (through is not None and key > through):
                break
            row = found[key] = table[key]
            if not row:
                gone = True
                continue
            room -= 1
            if not room:
                through = key
                break
    rows = sorted(found.items())
    if gone or through is not None:
        rows = [entry for entry in rows if entry[1] and (through is None or entry[0] <= through)]
    if len(rows) > limit:
        rows = rows[:limit]
        through = rows[-1][0]
    return rows, through
