"""Reads ranges of a large store in a thread before the event loop reads them: what is not in the page cache comes from
the disk meanwhile, and no other request waits.

LMDB reads through a memory map, and a page that is not in memory blocks the thread that touches it: 0.1 ms on an SSD,
10 ms on a hard disk. A point read touches a handful of pages. A page of a listing touches up to one for each row, since
rows lie in the order in which they were first written (``heap``): a tenth of a second of the event loop when none of
them is in memory. A small store, which as a rule is in memory, is not read ahead.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import lmdb

from storaged.meta.storage.cursor import columns_at
from storaged.meta.storage.heap import number_in, rows_of
from storaged.meta.storage.identity import Database
from storaged.meta.storage.rowvalue import open_number
from storaged.meta.store_ports import RowDamaged, RowRange
from storaged.units import MIB

LARGE_BYTES = 256 * MIB
"""Of LMDB's file, the bytes in use: some 300,000 rows."""

ROWS_A_STEP = 64
"""Read between two checks whether the store is to be closed: a step takes some seconds at most, where each row is a
page of a hard disk.
"""


class Readahead:
    """Of one environment. ``read`` may run in any thread; calls run one at a time."""

    def __init__(self, environment: Any, databases: dict[bytes, Database]) -> None:
        self._environment = environment
        self._rows, self._heap, self._nodes = (databases[name] for name in (b"rows", b"heap", b"nodes"))
        self._page_bytes = environment.stat()["psize"]
        self._lock = threading.Lock()
        self._closed = False
        self.reads = 0

    @property
    def large(self) -> bool:
        """False once closed; a later read raises."""
        with contextlib.suppress(lmdb.Error):
            return bool(self._environment.info()["last_pgno"] * self._page_bytes >= LARGE_BYTES)
        return False

    def read(self, wanted: RowRange, *, whole: bool) -> None:
        """Touches the pages that ``columns`` (``whole``) or ``stamps`` of that range would read. Errors are left to the
        read that follows.
        """
        with self._lock:
            if self._closed:
                return
            self.reads += 1
            name_prefix = wanted.name_prefix
            with contextlib.suppress(lmdb.Error, RowDamaged), self._environment.begin(db=self._rows) as transaction:
                sealed = transaction.get(name_prefix, db=self._nodes)
                if sealed is None:
                    return
                found = columns_at(transaction.cursor(), open_number(name_prefix, sealed), wanted)
                if found is None or not whole:
                    return
                values = sorted(found[1], key=number_in)  # from the heap's beginning to its end
                for start in range(0, len(values), ROWS_A_STEP):
                    if self._closed:
                        return
                    rows_of(transaction, self._heap, values[start : start + ROWS_A_STEP])

    def close(self) -> None:
        """Returns soon, when no read is running. Later reads do nothing."""
        self._closed = True
        with self._lock:
            pass
