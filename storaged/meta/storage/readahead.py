"""Ranges of a large store are read by a thread before the event loop reads them: what is not in the page cache comes
from the disk meanwhile, and nobody else waits.

LMDB reads through a memory map, and a page that is not in memory holds up whoever touches it: 0.1 ms on an SSD, 10 on a
disk that turns. A point read touches
a handful. A page of a listing touches up to one for each row, for rows lie in the order in which they were first
written (``heap``): a tenth of a second of an
event loop, if none of them is in memory. Of a store that is small enough to be there as a rule nothing is read ahead.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lmdb

from storaged.meta.ports import RowDamaged
from storaged.meta.storage.cursor import columns_at
from storaged.meta.storage.heap import number_in, rows_of
from storaged.meta.storage.identity import Database
from storaged.meta.storage.rowvalue import open_small
from storaged.units import MIB

LARGE_BYTES = 256 * MIB
"""Of LMDB's file, those in use: some 300,000 rows."""

ROWS_A_STEP = 64
"""Between two looks whether the store is to be closed: some seconds at most, where each row is a page of a disk that
turns.
"""

THREADS = ThreadPoolExecutor(8, thread_name_prefix="meta-warm")
"""Of all disks of the process, for ``MetaStore.warm``: seconds on a disk that turns. The loop's own threads, six on two
processors, hash bodies and write the audit log.
"""


class Warmer:
    """Of one environment. ``look`` may run in any thread, and one at a time does."""

    def __init__(self, environment: Any, databases: dict[bytes, Database]) -> None:
        self._environment = environment
        self._rows, self._heap, self._nodes = (databases[name] for name in (b"rows", b"heap", b"nodes"))
        self._page_bytes = environment.stat()["psize"]
        self._lock = threading.Lock()
        self._closed = False
        self.looks = 0

    @property
    def large(self) -> bool:
        """Not of one that is closed: who reads it is told."""
        with contextlib.suppress(lmdb.Error):
            return bool(self._environment.info()["last_pgno"] * self._page_bytes >= LARGE_BYTES)
        return False

    def look(self, name_prefix: bytes, *, after: bytes, prefix: bytes, limit: int, whole: bool) -> None:
        """Touches what ``columns`` of that stretch would read, else (not ``whole``) ``stamps``. What can't be read is
        found by who reads it.
        """
        with self._lock:
            if self._closed:
                return
            self.looks += 1
            with contextlib.suppress(lmdb.Error, RowDamaged), self._environment.begin(db=self._rows) as transaction:
                sealed = transaction.get(name_prefix, db=self._nodes)
                if sealed is None:
                    return
                root = int.from_bytes(open_small(name_prefix, sealed), "big")
                found = columns_at(transaction.cursor(), root, after=after, prefix=prefix, limit=limit)
                values = (
                    sorted(found[1], key=number_in) if found is not None and whole else ()
                )  # from the heap's beginning to its end
                for start in range(0, len(values), ROWS_A_STEP):
                    if self._closed:
                        return
                    rows_of(transaction, self._heap, values[start : start + ROWS_A_STEP])

    def close(self) -> None:
        """Returns when nothing is being read, soon; from now on nothing is."""
        self._closed = True
        with self._lock:
            pass
