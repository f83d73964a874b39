"""The reads of ``MetaStore`` over LMDB and the overlays.

Each read is one short snapshot that is closed before it returns, so that the file never grows because of a reader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import lmdb

from storaged.disk_health import DiskHealth, DiskThreads
from storaged.errors import DiskUnusable
from storaged.hashes import is_page
from storaged.lmdb_file import LMDB_DAMAGED, Residency
from storaged.meta.names import RegisterName
from storaged.meta.storage.batch import fence_of
from storaged.meta.storage.checkpoint import ROOTS_CACHED_MAX
from storaged.meta.storage.cursor import (
    StoredRows,
    check_stored,
    columns_at,
    keys_after,
    page_ages,
    page_body,
    page_owner,
    stamps_at,
    stored_row,
)
from storaged.meta.storage.heap import rows_of
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.overlay import Table, has_rows, merge, overlay_row
from storaged.meta.storage.readahead import Readahead
from storaged.meta.storage.remembered import Stored
from storaged.meta.storage.rowkey import walk
from storaged.meta.storage.rowvalue import (
    MASK,
    NAME_PREFIX_BYTES,
    check_number,
    columns_of,
    intact,
    open_number,
    open_small,
    stamps_in,
    unpack_row,
)
from storaged.meta.storage.state import StoreState
from storaged.meta.storage.sums import WANTED_MAX, stored_sum
from storaged.meta.store_ports import Fence, NotInMemory, Place, RowDamaged, RowRange, Slot, Stamps

T = TypeVar("T")

SLICE_ROWS_MAX = 10_000
SUMMED_MAX = 4_096
"""Rows of a shard in the overlays: a sum with more takes too long to find on the event loop."""

THREADS = 4
"""That read one store when LMDB's pages are not all in memory, and close it."""


class StoreReader:
    """Reads of one store. On the event loop, or in one of the disk's threads (``read``, ``start``); ``read_ahead`` in
    any thread. Each may raise DiskUnusable.
    """

    def __init__(self, state: StoreState) -> None:
        self.directory = state.directory
        self.identity = state.identity
        self.dirty_ranges = state.dirty_ranges
        self.damaged_rows = 0
        self._state = state
        self._environment = state.environment
        self._databases = state.databases
        self._rows, self._heap = state.databases[b"rows"], state.databases[b"heap"]
        self._roots: dict[bytes, int] = {}
        self._readahead = Readahead(state.environment, state.databases)
        self._residency = Residency(state.environment, state.directory)
        self._threads = DiskThreads(state.health, THREADS, f"meta-read {state.directory.name}")
        self.in_memory = True
        """Whether reads need no disk, as far as ``look`` knows."""

    @property
    def health(self) -> DiskHealth:
        return self._state.health

    def look(self) -> None:
        """Finds out whether LMDB's pages are in memory. In a thread, again and again: it may read them from the
        disk.
        """
        self._residency.look()
        self.in_memory = self._residency.resident

    async def read(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except NotInMemory:
            self.health.check()
            return await self._threads.run(call)

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        self.health.check()
        return self._threads.start(work)

    async def load(self, missing: NotInMemory) -> None:
        assert missing.place is not None, "use read"
        self.health.check()
        await self._state.remembered.read(missing.place, self._stored, self._threads)

    def _stored(self, place: Place) -> Stored:
        """In a thread: what LMDB has of it."""
        part, key = place
        try:
            if len(part) != NAME_PREFIX_BYTES:
                return self._read(part, key)
            root = self._root(part)
            if root is None:
                return b""
            with self._begin(self._rows) as transaction:
                return stored_row(transaction, self._heap, root, key)
        except RowDamaged as damage:
            return damage
        except lmdb.Error as error:
            return self._damaged_page(error)

    def _waits(self) -> bool:
        """Whether a read of LMDB may have to wait for the disk, and must not: on the event loop."""
        return not (self.in_memory or self._threads.is_current())

    def get(self, name: RegisterName) -> Slot | None:
        prefix, key = name.prefix, name.key
        row = overlay_row((self._state.fresh, self._state.frozen), prefix, key)
        if row is None and not self.in_memory and self._waits():
            row = self._state.remembered.get((prefix, key))
        if row is None:
            root = self._root(prefix)
            if root is None:
                return None
            try:
                with self._begin(self._rows) as transaction:
                    row = stored_row(transaction, self._heap, root, key)
            except lmdb.Error as error:
                raise self._damaged_page(error) from None
            except RowDamaged:
                self.damaged_rows += 1
                raise
        if not row:
            return None
        try:
            return unpack_row(name, row)
        except RowDamaged:
            self.damaged_rows += 1
            raise

    def row(self, name: bytes) -> bytes | None:
        prefix, key = name[:NAME_PREFIX_BYTES], name[NAME_PREFIX_BYTES:]
        found = overlay_row((self._state.fresh, self._state.frozen), prefix, key)
        if found is not None:
            return found
        if not self.in_memory and self._waits():
            return self._remembered_row(prefix, key)
        try:
            with self._begin(self._rows) as transaction:
                return self._stored_row(transaction, prefix, key)
        except lmdb.Error as error:
            self._damaged_page(error)
            return None

    def rows(self, names: Sequence[bytes]) -> list[bytes | None]:
        parts = [(name[:NAME_PREFIX_BYTES], name[NAME_PREFIX_BYTES:]) for name in names]
        overlays = (self._state.fresh, self._state.frozen)
        found: list[bytes | None] = [overlay_row(overlays, prefix, key) for prefix, key in parts]
        missing = [index for index, row in enumerate(found) if row is None]
        if missing and not self.in_memory and self._waits():
            for index in missing:
                found[index] = self._remembered_row(*parts[index])
        elif missing:
            try:
                with self._begin(self._rows) as transaction:
                    for index in missing:
                        found[index] = self._stored_row(transaction, *parts[index])
            except lmdb.Error as error:  # the transaction reads nothing more after a damaged page
                if len(names) > 1:
                    return [self.row(name) for name in names]
                self._damaged_page(error)
        return found

    def get_fence(self, scope: bytes) -> Fence | None:
        sealed = self._get_small(b"fences", scope)
        return None if sealed is None else fence_of(scope, sealed)

    def get_page(self, page_hash: bytes) -> bytes | None:
        stored = self._read(b"pages", page_hash)
        page = None if stored is None else page_body(stored)
        if page is not None and not is_page(page, page_hash):
            self.damaged_rows += 1
            raise RowDamaged(f"page {page_hash.hex()} does not have its hash")
        return page

    def pages(self, *, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        if limit > SLICE_ROWS_MAX:
            raise ValueError(
                f"a slice has at most {SLICE_ROWS_MAX} pages, not {limit}: a long reader keeps the file growing"
            )
        try:
            with self._begin(self._databases[b"pages"], buffers=True) as transaction:
                return page_ages(transaction, after, limit)
        except lmdb.Error as error:
            raise self._damaged_page(error) from None

    def page_owners(self, hashes: Sequence[bytes]) -> list[bytes]:
        try:
            with self._begin(self._databases[b"pages"], buffers=True) as transaction:
                return [page_owner(transaction.get(page_hash, b"")) for page_hash in hashes]
        except lmdb.Error as error:
            raise self._damaged_page(error) from None

    def get_meta(self, key: str) -> bytes | None:
        return self._get_small(b"meta", key.encode())

    def fenced_scopes(self, *, after: bytes, limit: int) -> list[bytes]:
        return self._small_keys(b"fences", b"", after, limit)

    def meta_names(self, prefix: str, *, after: str, limit: int) -> list[str]:
        return [key.decode() for key in self._small_keys(b"meta", prefix.encode(), after.encode(), limit)]

    def slice(self, wanted: RowRange) -> list[tuple[bytes, bytes]]:
        if wanted.limit > SLICE_ROWS_MAX:
            raise ValueError(
                f"a slice has at most {SLICE_ROWS_MAX} rows, not {wanted.limit}: a long reader keeps the file growing"
            )
        rows: list[tuple[bytes, bytes]] = []
        through: bytes | None = wanted.after
        while through is not None and len(rows) < wanted.limit:  # deleted rows may have taken the place of others
            found, through = self._rows_after(wanted._replace(after=through))
            rows = rows + found if rows else found
        return rows[: wanted.limit]

    def _rows_after(self, wanted: RowRange) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """Some of the rows, perhaps none; and where to go on, if there may be more."""
        with self._snapshot(wanted.name_prefix) as (transaction, root, tables):
            found: list[tuple[bytes, bytes]] = []
            if root is not None:
                found = walk(
                    StoredRows(transaction), root, after=wanted.after, prefix=wanted.prefix, limit=wanted.limit
                )
            rows = rows_of(transaction, self._heap, [value for _, value in found])
            entries = list(zip([key for key, _ in found], rows, strict=True))
        if tables:
            return merge(entries, tables, wanted)
        return entries, entries[-1][0] if entries and len(entries) >= wanted.limit else None

    def columns(self, wanted: RowRange) -> tuple[list[bytes], list[bytes], bool]:
        with self._snapshot(wanted.name_prefix) as (transaction, root, tables):
            found = None if root is None else columns_at(transaction.cursor(), root, wanted)
            if found and not has_rows(tables, wanted, through=found[0][-1] if found[2] else None):
                return found[0], rows_of(transaction, self._heap, found[1]), found[2]
        return columns_of(self.slice(wanted._replace(limit=wanted.limit + 1)), wanted.limit)

    def stamps(self, wanted: RowRange, *, with_keys: bool = False) -> Stamps:
        with self._snapshot(wanted.name_prefix, buffers=True) as (transaction, root, tables):
            found = None if root is None else stamps_at(transaction.cursor(), root, wanted, with_keys=with_keys)
        if found and not has_rows(tables, wanted, through=found.last if found.more else None):
            return found
        columns = columns_of(self.slice(wanted._replace(limit=wanted.limit + 1)), wanted.limit)
        return stamps_in(*columns, with_keys=with_keys)

    def shard_sum(self, prefix: bytes) -> int | None:
        state = self._state
        with self._snapshot(prefix) as (transaction, root, tables):
            changed = {key: row for table in tables for key, row in list(table.items())}
            total = 0 if root is None else stored_sum(transaction, self._databases[b"nodes"], prefix)
            if total is not None and len(changed) <= SUMMED_MAX:
                for key, row in changed.items():
                    total += check_number(row) - (0 if root is None else check_stored(transaction, root, key))
                return total & MASK
        if total is None and len(state.sums_wanted) < WANTED_MAX:
            with state.changed:
                state.sums_wanted[prefix] = None
                state.changed.notify_all()
        return None

    @property
    def large(self) -> bool:
        return self._readahead.large and not (self.in_memory and self._residency.looked)

    def read_ahead(self, wanted: RowRange, *, whole: bool) -> None:
        self._readahead.read(wanted, whole=whole)

    def scopes(self, partition: int | None = None) -> list[tuple[int, bytes, int]]:
        """Raises RowDamaged."""
        keys = {key for overlay in (self._state.fresh, self._state.frozen) for key in list(overlay.rows)}
        try:
            with self._begin(self._databases[b"nodes"]) as transaction:
                names = transaction.cursor().iternext(keys=True, values=False)
                keys.update(bytes(key) for key in names if len(key) == NAME_PREFIX_BYTES)
        except lmdb.Error as error:
            raise self._damaged_page(error) from None
        found = [(key[0], key[1:17], key[17]) for key in sorted(keys)]
        if partition is None:
            return found
        return [scope for scope in found if RegisterName(*scope, b"").partition == partition]

    def _remembered_row(self, prefix: bytes, key: bytes) -> bytes | None:
        """None: it is damaged, or not in memory."""
        try:
            row = self._state.remembered.get((prefix, key))
        except (NotInMemory, RowDamaged):
            return None
        return row if not row or intact(prefix, key, row) else None

    def _begin(self, database: Database, *, buffers: bool = False) -> Transaction:
        """Raises NotInMemory, DiskUnusable."""
        if not self.in_memory and self._waits():
            raise NotInMemory
        try:
            return self._environment.begin(db=database, buffers=buffers)
        except lmdb.Error as error:
            raise DiskUnusable(f"the metadata store in {self.directory} cannot be read: {error}") from None

    @contextlib.contextmanager
    def _snapshot(
        self, name_prefix: bytes, *, buffers: bool = False
    ) -> Iterator[tuple[Transaction, int | None, list[Table]]]:
        """A snapshot of the rows, the root of the named shard in it, and the shard's tables of the overlays, oldest
        first. Raises RowDamaged where it meets damage.
        """
        state = self._state
        try:
            while True:
                fresh, frozen = state.fresh, state.frozen
                root = self._root(name_prefix)
                with self._begin(self._rows, buffers=buffers) as transaction:
                    # Otherwise a checkpoint has moved rows meanwhile: these overlays may miss what LMDB has not.
                    if fresh is state.fresh and frozen is state.frozen:
                        found = [overlay.rows.get(name_prefix) for overlay in (frozen, fresh)]
                        yield transaction, root, [table for table in found if table is not None]
                        return
        except RowDamaged:
            self.damaged_rows += 1
            raise
        except lmdb.Error as error:
            raise self._damaged_page(error) from None

    def _root(self, scope_key: bytes) -> int | None:
        root = self._roots.get(scope_key)
        if root is None:
            sealed = self._read(b"nodes", scope_key)
            if sealed is None:
                return None
            try:
                root = open_number(scope_key, sealed)
            except RowDamaged:
                self.damaged_rows += 1
                raise
            if len(self._roots) >= ROOTS_CACHED_MAX:
                self._roots.clear()
            self._roots[scope_key] = root
        return root

    def _stored_row(self, transaction: Transaction, prefix: bytes, key: bytes) -> bytes | None:
        """The row when it is intact; empty when there is none; None when it is damaged."""
        try:
            root = self._root(prefix)
            row = b"" if root is None else stored_row(transaction, self._heap, root, key)
            if not row or intact(prefix, key, row):
                return row
        except RowDamaged:
            pass
        self.damaged_rows += 1
        return None

    def _get_small(self, database: bytes, key: bytes) -> bytes | None:
        for overlay in (self._state.fresh, self._state.frozen):
            if (database, key) in overlay.others:
                sealed = overlay.others[database, key]
                break
        else:
            if not self.in_memory and self._waits():
                sealed = self._state.remembered.get((database, key))
            else:
                sealed = self._read(database, key)
        if sealed is None:
            return None
        try:
            return open_small(key, sealed)
        except RowDamaged:
            self.damaged_rows += 1
            raise

    def _small_keys(self, database: bytes, prefix: bytes, after: bytes, limit: int) -> list[bytes]:
        state = self._state
        while True:
            fresh, frozen = state.fresh, state.frozen
            try:
                with self._begin(self._databases[database]) as transaction:
                    if fresh is not state.fresh or frozen is not state.frozen:
                        continue  # a checkpoint has moved values meanwhile
                    changed = {**frozen.others, **fresh.others}
                    found = {key for (where, key), value in changed.items() if where == database and value is not None}
                    gone = {key for (where, key), value in changed.items() if where == database and value is None}
                    found.update(key for key in keys_after(transaction, prefix, after, limit + len(gone)))
            except lmdb.Error as error:
                raise self._damaged_page(error) from None
            return sorted(key for key in found - gone if key > after and key.startswith(prefix))[:limit]

    def _read(self, database: bytes, key: bytes) -> bytes | None:
        with self._begin(self._databases[database]) as transaction:
            try:
                value: bytes | None = transaction.get(key)
            except lmdb.Error as error:
                raise self._damaged_page(error) from None
        return value

    def _damaged_page(self, error: lmdb.Error) -> RowDamaged:
        """LMDB met a damaged page of its own: what it held is unknown, as when a check does not hold. Raises
        DiskUnusable for an error of the system, which says nothing of what is there.
        """
        if not isinstance(error, LMDB_DAMAGED):
            raise DiskUnusable(f"the metadata store in {self.directory} cannot be read: {error}") from None
        self.damaged_rows += 1
        return RowDamaged(f"the metadata store in {self.directory} holds a damaged page: {error}")
