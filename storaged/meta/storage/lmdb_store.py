"""One disk's acceptor state in LMDB, behind a redo log.

Theory of operation
    A batch is durable when it is in the redo log (``meta.storage.redo``). From then on it is read from an *overlay* in
    memory, which lies over LMDB, until a
    *checkpoint* has put it there: one commit of LMDB, with its default, synced flags, for what many groups brought
    within a second or so. It writes a page of the
    tree once that many of them touch, in the order of the keys. A start reads the overlay from the log again.

    Groups are what has arrived: while one is being written the next collects, a lone one never waits. The event loop
    lays a group out and gives it to the kernel, which tells
    it when the group is durable (``storaged.aio``); a thread would have to get the interpreter twice for that, from a
    loop that has other things to do. Where the kernel can't, and
    for pages, which LMDB has to sync, there is one all the same. Readers are short: every get and every slice is a
    snapshot of its own, closed before it returns, so the file never
    grows for one. One process owns a store (``lock`` is flocked for as long as it is open). Pages of manifests are
    large and rare, and go to LMDB at once.

    The small copy that comes with a row lies in the log beside it. The disk's fragment store is told of it when it is
    durable here (``keep_copies``), before anybody reads the row, and has it
    appended and synced before a checkpoint takes the row from the log (``sync_copies``); a start gives the copies in
    the log back before there is a checkpoint. So nothing has a row without its copy.

    sub-database   key                               value
    rows           rowkey's node || segment          rowvalue's row, or ``heap``'s reference to it; a link: check ||
    node (u64 BE)
    heap           number                            rowvalue's row
    nodes          table || scope || shard           check || root node (u64 BE)
                   "next"                            check || the next node to give out (u64 BE)
    fences         scope                             check || final (u8) || nonce
    pages          name of the page                  created ms (u64 BE) || the page
    meta           name                              check || value
                   NUL "identity"                    check || store id (16) || starts (u64 BE)
                   NUL "redo"                        check || ``opening.Mark``
                   NUL "heap"                        check || the next number to give out (u64 BE)

    A write that fails ends the store's life as a writer: what the disk did with it is unknown, so it stays read-only
    until it is opened
    again. A failure that isn't mere lack of space is noted by its owner (``note_failed``) and beside it (``failed``),
    both synced, and then it is never opened again: after a failed sync the
    kernel forgets which pages are dirty (Rebello et al., ATC'20), and a disk whose promises are in doubt joins only as
    a new one.

    The *identity* is the store's random id with the number of times it was opened. The owner keeps it elsewhere and
    hands it in at the next
    start: a store that is missing, another one, or an older copy of itself put back from a snapshot is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import structlog

from storaged.aio import NotTaken
from storaged.durable import Unfinished, replace_file, sync_path
from storaged.errors import DiskForeign, DiskUnusable, SlowDown, StoragedError
from storaged.hashes import is_page
from storaged.ids import Entropy, system_entropy
from storaged.mapped import reach_end
from storaged.meta.names import RegisterName
from storaged.meta.ports import Done, Fence, MetaStoreStatistics, RowDamaged, Slot, Stamps, StoreBatch
from storaged.meta.storage import overlay as pending
from storaged.meta.storage.checkpoint import ROOTS_CACHED_MAX, Applier, apply_pages
from storaged.meta.storage.cursor import columns_at, stamps_at
from storaged.meta.storage.dirty_ranges import Changes
from storaged.meta.storage.heap import rows_of
from storaged.meta.storage.identity import (
    IDENTITY,
    REDO,
    STORE_ID_BYTES,
    SUB_DATABASES,
    Database,
    Mark,
    Transaction,
    compare,
    lacks_space,
    lock,
    read_identity,
    read_mark,
    split_identity,
    unopened,
)
from storaged.meta.storage.lookup import PAGE_AGE_BYTES, StoredRows, page_ages, stored_row
from storaged.meta.storage.overlay import Overlay, Ready
from storaged.meta.storage.readahead import Warmer
from storaged.meta.storage.redo import RedoLog
from storaged.meta.storage.rowkey import walk
from storaged.meta.storage.rowvalue import (
    NAME_PREFIX_BYTES,
    columns_of,
    intact,
    open_small,
    seal_small,
    stamps_in,
    unpack_row,
)
from storaged.units import GIB, MIB

log = structlog.get_logger(__name__)

FAILED_FILE = "failed"

MAP_BYTES_DEFAULT = 64 * GIB
"""Address space, not disk space: the file is as long as what was ever in use at once."""

GROUP_OPERATIONS_MAX = 128
GROUP_BYTES_MAX = MIB
"""More in one write to the log only adds waiting. A single batch may be larger."""

CHECKPOINT_S = 1.0
"""A checkpoint follows the first change within so many seconds, or when half of the log's half is full: it bounds the
memory of the overlay and the time of a start.
"""

QUEUED_BATCHES_MAX = 4096
SLICE_ROWS_MAX = 10_000


class LmdbMetaStore:
    """``MetaStore`` on LMDB. Opening blocks for a few milliseconds; use ``open_or_refuse`` for a disk that was known
    before.
    """

    def __init__(
        self,
        directory: Path,
        *,
        map_bytes: int = MAP_BYTES_DEFAULT,
        entropy: Entropy = system_entropy,
        direct: bool = True,
    ) -> None:
        """Opens the store, or makes one where there is none. ``direct``: the log is written without a thread where that
        can be had.

        Raises DirectoryInUse, DiskForeign (it failed before, or what is there is no store), DiskUnusable (the disk
        refuses).
        """
        self.directory = Path(directory)
        self._reason = ""
        self._closing = False
        self._commits = self._operations = self._largest_group = self._queued = self._damaged = 0
        self._reader_roots: dict[bytes, int] = {}
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Callable[[Exception | None], None]] | None] = (
            queue.SimpleQueue()
        )
        self._arriving: list[Ready] = []
        self._arriving_pages: list[Ready] = []
        self._logging: list[Ready] = []
        """The group that is being written to the log."""
        self._paging: list[Ready] = []
        """The group whose pages are being put into LMDB."""
        self._rows_behind_pages = 0
        """How many with pages, or behind them, change rows as well. What comes after these waits with them: batches are
        applied in their order.
        """
        self._going_on = False
        """``_go_on`` is about to be called."""
        self._told_last = 0
        """Of how many batches the loop was told last, at once."""
        self._drained: asyncio.Future[None] | None = None
        self._log = threading.Condition()
        """Held for a moment by whoever changes what is in which overlay, and how far the redo log is written; told of
        what a checkpoint waits for, and of its end.
        """
        self._writing = threading.Lock()
        """Held by whoever writes to LMDB."""
        self._checkpointing = threading.Lock()
        self._fresh = self._frozen = Overlay()
        """What is durable and not yet in LMDB: what came last, over what a checkpoint is putting there."""
        self.changes = Changes()
        self._fresh_bytes = 0
        self._fresh_since = 0.0
        self._log_full = self._stopping = self._closed = False
        self._restorable: list[tuple[bytes, bytes]] = []
        self._checkpoints = 0
        self.note_failed: Callable[[str], object] = lambda _reason: None
        """Called with the reason in the thread that found a lasting failure, before it is noted beside the environment:
        the owner keeps it on another disk. It must not raise.
        """
        self.sync_copies: Callable[[], None] = _no_copies
        """Called in a thread of this store's: makes all copies durable where they belong that ``keep_copies`` was told
        of. Raises Unfinished when that
        has to wait for a restart: they stay in the log, and the store takes no more."""
        self.keep_copies: Callable[[Sequence[Any]], None] = _nowhere
        """Called on the event loop with what came with copies (``Ready.kept``), when these are durable in the log, and
        before anybody reads their rows. It must not raise.
        """
        self._room = asyncio.Semaphore(QUEUED_BATCHES_MAX)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock_file = lock(self.directory)
        try:
            self._open(map_bytes, entropy, direct)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._writer = threading.Thread(target=self._work, name=f"meta-writer {self.directory.name}", daemon=True)
        self._checkpointer = threading.Thread(
            target=self._keep_checkpoints, name=f"meta-checkpoint {self.directory.name}", daemon=True
        )
        self._writer.start()
        self._checkpointer.start()

    @classmethod
    def open_or_refuse(
        cls,
        directory: Path,
        expected_identity: bytes | None,
        *,
        map_bytes: int = MAP_BYTES_DEFAULT,
        entropy: Entropy = system_entropy,
    ) -> LmdbMetaStore:
        """The store whose ``identity`` was this at its last start, or (None) the one of a disk that was never in use.

        Raises DiskForeign when it is missing, another, or an older copy of itself; nothing is created or changed then.
        Raises as the constructor does, too.
        """
        directory = Path(directory)
        if expected_identity is not None:
            file = directory / "data.mdb"
            if not file.exists():
                raise DiskForeign(f"the metadata store that was in {directory} is gone")
            if not file.stat().st_size:
                raise DiskForeign(f"the metadata store in {directory} is blank, although one was in use there")
            compare(directory, expected_identity)
        return cls(directory, map_bytes=map_bytes, entropy=entropy)

    def _open(self, map_bytes: int, entropy: Entropy, direct: bool) -> None:
        failed = self.directory / FAILED_FILE
        if failed.exists():
            raise DiskForeign(
                f"the metadata store in {self.directory} failed before and is not used again:"
                f" {failed.read_text().strip()}"
            )
        try:
            self._env = lmdb.open(str(self.directory), map_size=map_bytes, max_dbs=len(SUB_DATABASES), max_spare_txns=8)
        except lmdb.Error as error:
            raise unopened(self.directory, error) from None
        try:
            reach_end(self._env, self.directory)
            self._env.reader_check()
            self._databases: dict[bytes, Database] = {name: self._env.open_db(name) for name in SUB_DATABASES}
            self._rows, self._heap = self._databases[b"rows"], self._databases[b"heap"]
            self._applier = Applier(self._databases)
            self._warmer = Warmer(self._env, self._databases)
            self._start(entropy, direct)
        except lmdb.Error as error:
            self._env.close()
            raise unopened(self.directory, error) from None
        except BaseException:
            self._env.close()
            raise

    def _start(self, entropy: Entropy, direct: bool) -> None:
        """Reads the log, then counts the start."""
        meta = self._databases[b"meta"]
        with self._env.begin() as transaction:
            known = read_identity(self.directory, transaction, meta)
            store_id, starts = split_identity(known) if known else (entropy(STORE_ID_BYTES), 0)
            mark = read_mark(self.directory, transaction, meta, starts)
        self.identity = store_id + (starts + 1).to_bytes(8, "big")
        self._redo = RedoLog(self.directory, store_id, mark, direct=direct)
        try:
            for body in self._redo.bodies:
                entries = pending.decode_group(body)
                self._fresh.add(entries)
                self._fresh_bytes += len(body)
                self._restorable.extend(entry.copy for entry in entries if entry.copy is not None)
            self._redo.bodies.clear()
            with self._env.begin(write=True) as transaction:
                transaction.put(IDENTITY, seal_small(IDENTITY, self.identity), db=meta)
                self._put_mark(transaction, mark.applied if mark is not None else 0)
            sync_path(self.directory)
        except msgspec.MsgspecError as error:
            self._redo.close()
            raise DiskForeign(f"the redo log in {self.directory} holds what is no group: {error}") from None
        except BaseException:
            self._redo.close()
            raise

    def _put_mark(self, transaction: Transaction, applied: int, *, closed: bool = False) -> None:
        mark = Mark(applied, self._redo.sequence, split_identity(self.identity)[1], closed)
        transaction.put(REDO, seal_small(REDO, mark.pack()), db=self._databases[b"meta"])

    @property
    def store_id(self) -> bytes:
        """16 random bytes made with the store."""
        return self.identity[:STORE_ID_BYTES]

    # --- reading
    # --------------------------------------------------------------------------------------------------------

    def _begin(self, database: Database, *, buffers: bool = False) -> Transaction:
        try:
            return self._env.begin(db=database, buffers=True) if buffers else self._env.begin(db=database)
        except lmdb.Error as error:
            raise DiskUnusable(f"the metadata store in {self.directory} cannot be read: {error}") from None

    def _root(self, scope_key: bytes) -> int | None:
        root = self._reader_roots.get(scope_key)
        if root is None:
            sealed = self._read(b"nodes", scope_key)
            if sealed is None:
                return None
            root = int.from_bytes(self._opened(scope_key, sealed), "big")
            if len(self._reader_roots) >= ROOTS_CACHED_MAX:
                self._reader_roots.clear()
            self._reader_roots[scope_key] = root
        return root

    def _read(self, database: bytes, key: bytes) -> bytes | None:
        with self._begin(self._databases[database]) as transaction:
            try:
                value: bytes | None = transaction.get(key)
            except lmdb.Error as error:
                raise self._unreadable(error) from None
        return value

    def _unreadable(self, error: lmdb.Error) -> RowDamaged:
        """LMDB met a page that is none: what it held can't be told, as when a check does not hold."""
        self._damaged += 1
        return RowDamaged(f"the metadata store in {self.directory} holds a damaged page: {error}")

    def _opened(self, context: bytes, sealed: bytes) -> bytes:
        try:
            return open_small(context, sealed)
        except RowDamaged:
            self._damaged += 1
            raise

    def get(self, name: RegisterName) -> Slot | None:
        prefix, key = name.prefix, name.key
        row = pending.row_of((self._fresh, self._frozen), prefix, key)
        if row is None:
            root = self._root(prefix)
            if root is None:
                return None
            try:
                with self._begin(self._rows) as transaction:
                    row = stored_row(transaction, self._heap, root, key)
            except lmdb.Error as error:
                raise self._unreadable(error) from None
            except RowDamaged:
                self._damaged += 1
                raise
            if not row:
                return None
        try:
            return unpack_row(name, row)
        except RowDamaged:
            self._damaged += 1
            raise

    def row(self, name: bytes) -> bytes | None:
        prefix, key = name[:NAME_PREFIX_BYTES], name[NAME_PREFIX_BYTES:]
        found = pending.row_of((self._fresh, self._frozen), prefix, key)
        if found is not None:
            return found
        try:
            with self._begin(self._rows) as transaction:
                return self._stored_row(transaction, prefix, key)
        except lmdb.Error as error:
            self._unreadable(error)
            return None

    def rows(self, names: Sequence[bytes]) -> list[bytes | None]:
        parts = [(name[:NAME_PREFIX_BYTES], name[NAME_PREFIX_BYTES:]) for name in names]
        overlays = (self._fresh, self._frozen)
        found: list[bytes | None] = [pending.row_of(overlays, prefix, key) for prefix, key in parts]
        missing = [index for index, row in enumerate(found) if row is None]
        if missing:
            try:
                with self._begin(self._rows) as transaction:
                    for index in missing:
                        found[index] = self._stored_row(transaction, *parts[index])
            except lmdb.Error as error:  # the transaction reads nothing more after a damaged page
                if len(names) > 1:
                    return [self.row(name) for name in names]
                self._unreadable(error)
        return found

    def _stored_row(self, transaction: Transaction, prefix: bytes, key: bytes) -> bytes | None:
        try:
            root = self._root(prefix)
            row = b"" if root is None else stored_row(transaction, self._heap, root, key)
            if not row or intact(prefix, key, row):
                return row
        except RowDamaged:
            pass
        self._damaged += 1
        return None

    def get_fence(self, scope: bytes) -> Fence | None:
        sealed = self._get_small(b"fences", scope)
        return None if sealed is None else Fence(scope, sealed[1:], sealed[0] == 1)

    def get_page(self, page_hash: bytes) -> bytes | None:
        stored = self._read(b"pages", page_hash)
        page = None if stored is None else stored[PAGE_AGE_BYTES:]
        if page is not None and not is_page(page, page_hash):
            self._damaged += 1
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
            raise self._unreadable(error) from None

    def get_meta(self, key: str) -> bytes | None:
        return self._get_small(b"meta", key.encode())

    def _get_small(self, database: bytes, key: bytes) -> bytes | None:
        for overlay in (self._fresh, self._frozen):
            if (database, key) in overlay.others:
                sealed = overlay.others[database, key]
                break
        else:
            sealed = self._read(database, key)
        return None if sealed is None else self._opened(key, sealed)

    def slice(
        self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int
    ) -> list[tuple[bytes, bytes]]:
        if limit > SLICE_ROWS_MAX:
            raise ValueError(
                f"a slice has at most {SLICE_ROWS_MAX} rows, not {limit}: a long reader keeps the file growing"
            )
        name_prefix = RegisterName(table, scope, shard, b"").prefix
        with self._reading(name_prefix) as (transaction, root, tables):
            found = [] if root is None else walk(StoredRows(transaction), root, after=after, prefix=prefix, limit=limit)
            rows = list(
                zip(
                    [key for key, _ in found],
                    rows_of(transaction, self._heap, [value for _, value in found]),
                    strict=True,
                )
            )
        return pending.merged(rows, tables, after=after, prefix=prefix, limit=limit) if tables else rows

    @contextlib.contextmanager
    def _reading(
        self, name_prefix: bytes, *, buffers: bool = False
    ) -> Iterator[tuple[Transaction, int | None, list[pending.Table]]]:
        """A snapshot of the rows, the root of these in it, and what lies over it, oldest first. Raises RowDamaged where
        it meets damage.
        """
        try:
            while True:
                fresh, frozen = self._fresh, self._frozen
                root = self._root(name_prefix)
                with self._begin(self._rows, buffers=buffers) as transaction:
                    if fresh is self._fresh and frozen is self._frozen:  # else LMDB may have more than these lie over
                        tables = [
                            table for overlay in (frozen, fresh) if (table := overlay.rows.get(name_prefix)) is not None
                        ]
                        yield transaction, root, tables
                        return
        except RowDamaged:
            self._damaged += 1
            raise
        except lmdb.Error as error:
            raise self._unreadable(error) from None

    def columns(
        self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int
    ) -> tuple[list[bytes], list[bytes], bool]:
        with self._reading(RegisterName(table, scope, shard, b"").prefix) as (transaction, root, tables):
            found = (
                None
                if root is None
                else columns_at(transaction.cursor(), root, after=after, prefix=prefix, limit=limit)
            )
            if found and not pending.touched(
                tables, after=after, prefix=prefix, through=found[0][-1] if found[2] else None
            ):
                return found[0], rows_of(transaction, self._heap, found[1]), found[2]
        return columns_of(self.slice(table, scope, shard, after=after, prefix=prefix, limit=limit + 1), limit)

    def stamps(self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int) -> Stamps:
        with self._reading(RegisterName(table, scope, shard, b"").prefix, buffers=True) as (transaction, root, tables):
            found = (
                None if root is None else stamps_at(transaction.cursor(), root, after=after, prefix=prefix, limit=limit)
            )
        if found and not pending.touched(
            tables, after=after, prefix=prefix, through=found.last if found.more else None
        ):
            return found
        return stamps_in(
            *columns_of(self.slice(table, scope, shard, after=after, prefix=prefix, limit=limit + 1), limit)
        )

    @property
    def large(self) -> bool:
        return self._warmer.large

    def warm(
        self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int, whole: bool
    ) -> None:
        self._warmer.look(
            RegisterName(table, scope, shard, b"").prefix, after=after, prefix=prefix, limit=limit, whole=whole
        )

    def scopes(self, partition: int | None = None) -> list[tuple[int, bytes, int]]:
        """Raises RowDamaged."""
        keys = {key for overlay in (self._fresh, self._frozen) for key in list(overlay.rows)}
        try:
            with self._begin(self._databases[b"nodes"]) as transaction:
                keys.update(
                    bytes(key)
                    for key in transaction.cursor().iternext(keys=True, values=False)
                    if len(key) == NAME_PREFIX_BYTES
                )
        except lmdb.Error as error:
            raise self._unreadable(error) from None
        found = [(key[0], key[1:17], key[17]) for key in sorted(keys)]
        return (
            found
            if partition is None
            else [entry for entry in found if RegisterName(*entry, b"").partition == partition]
        )

    def statistics(self) -> MetaStoreStatistics:
        with self._begin(self._rows) as transaction:
            rows = transaction.stat(self._rows)["entries"]
        information, page_bytes = self._env.info(), self._env.stat()["psize"]
        return MetaStoreStatistics(
            state="read-only" if self._reason else "ok",
            reason=self._reason,
            commits=self._commits,
            checkpoints=self._checkpoints,
            operations=self._operations,
            largest_group=self._largest_group,
            queued_batches=self._queued,
            rows=rows,
            bytes_used=(information["last_pgno"] + 1) * page_bytes,
            map_bytes=information["map_size"],
            damaged_rows=self._damaged,
        )

    # --- writing
    # --------------------------------------------------------------------------------------------------------

    async def commit(self, batch: StoreBatch) -> None:
        """As the port says; an empty batch is a barrier. Raises ValueError for what can't be stored, before anything
        is.

        A caller that is cancelled leaves its batch in the queue: it is written, and nobody is told.
        """
        future = asyncio.get_running_loop().create_future()
        await self._wait_for(self.ready(batch, partial(_settle, future)), future)

    async def delete_pages(self, pages: Sequence[tuple[bytes, int]]) -> int:
        future = asyncio.get_running_loop().create_future()
        entry = Ready(partial(_settle, future), stale_pages=pages, operations=len(pages))
        await self._wait_for(entry, future)
        return entry.deleted

    async def _wait_for(self, entry: Ready, future: asyncio.Future[None]) -> None:
        async with self._room:
            self._enqueue(entry)
            await future

    def ready(self, batch: StoreBatch, done: Done) -> Ready:
        """A batch as ``post_ready`` takes it. Raises as ``post``."""
        self._refuse_when_unusable()
        return pending.ready(batch, done)

    def post(self, batch: StoreBatch, done: Done) -> None:
        """As the port says. It does not wait for room: beyond ``QUEUED_BATCHES_MAX`` it raises SlowDown."""
        self.post_ready(self.ready(batch, done))

    def post_ready(self, entry: Ready) -> None:
        """As ``post``."""
        if self._queued >= QUEUED_BATCHES_MAX:
            raise SlowDown(f"{self._queued} batches wait for the metadata store in {self.directory}.")
        self._enqueue(entry)

    def _enqueue(self, entry: Ready) -> None:
        """A lone one leaves now: as the one before it was, so that the next turn of the loop is unlikely to bring
        company.
        """
        self._refuse_when_unusable()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._going_on = loop, False
        alone = not self._queued and self._told_last == 1
        self._queued += 1
        behind = (self._paging or self._arriving_pages) and (self._rows_behind_pages or not entry.operations)
        if entry.pages or entry.stale_pages or behind:
            self._arriving_pages.append(entry)
            self._rows_behind_pages += entry.changes_rows
        else:
            self._arriving.append(entry)
        if alone:
            self._go_on()
        else:
            self._go_on_soon()

    def _refuse_when_unusable(self) -> None:
        if self._reason or self._closing:
            raise DiskUnusable(
                f"the metadata store in {self.directory} takes no writes: {self._reason or 'it is being closed'}"
            )

    def _go_on_soon(self) -> None:
        """With everything that this turn of the loop brings: begun with the first of a burst alone, it would have the
        others wait.
        """
        if not self._going_on:
            self._going_on = True
            assert self._loop is not None
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Begins the next group of each kind, unless one is being written."""
        self._going_on = False
        if self._reason:
            left = self._arriving_pages + self._arriving if not self._paging else self._arriving
            self._arriving_pages, self._arriving = self._arriving_pages if self._paging else [], []
            self._deliver(left)
            return
        if self._arriving_pages and not self._paging:
            self._paging, self._arriving_pages = self._arriving_pages, []
            self._call(partial(self._commit_pages, self._paging), self._paged)
        if self._arriving and not self._logging:
            self._log_group(self._next_group())

    def _next_group(self) -> list[Ready]:
        operations = size = count = 0
        for entry in self._arriving:
            operations += entry.operations
            size += entry.size
            if count and (operations > GROUP_OPERATIONS_MAX or size > GROUP_BYTES_MAX):
                break
            count += 1
        group, self._arriving = self._arriving[:count], self._arriving[count:]
        return group

    def _log_group(self, group: list[Ready]) -> None:
        self._logging = group
        try:
            self._begin_group(group)
        except Exception as error:  # a mistake of ours too: nobody may wait for ever
            self._logged(0, error)

    def _begin_group(self, group: list[Ready]) -> None:
        body = pending.encode_group([entry for entry in group if entry.rows or entry.others])
        if len(body) == 1:  # nobody changes anything
            self._logged(0, None)
            return
        with self._log:
            room = self._redo.fits(len(body)) or self._redo.turn()
            if not room:
                self._log_full = True
                self._log.notify_all()
        if not room:  # a checkpoint makes some
            self._logging, self._arriving = [], group + self._arriving
            return
        assert self._loop is not None
        if not self._redo.begin(self._loop, body, partial(self._begun, body)):
            self._write_in_thread(body)

    def _begun(self, body: bytes, error: OSError | None) -> None:
        if isinstance(error, NotTaken):
            self._write_in_thread(body)
        else:
            self._logged(len(body), error)

    def _write_in_thread(self, body: bytes) -> None:
        self._call(partial(self._redo.write, body), partial(self._logged, len(body)))

    def _logged(self, body_bytes: int, error: Exception | None) -> None:
        """The group is durable, or nobody knows what the disk has of it."""
        if error is None and not self._reason and body_bytes:
            try:
                self._show(self._logging, body_bytes)
            except Exception as mistake:
                error = mistake
        if error is not None and not self._reason:  # it is noted on that disk, for which the loop does not wait
            self._call(partial(self._fail, error), partial(self._logged, 0))
            return
        group, self._logging = self._logging, []
        self._deliver(group)
        if self._arriving or self._arriving_pages:
            self._go_on_soon()

    def _show(self, group: list[Ready], body_bytes: int) -> None:
        """From now on it is read. The copies first, each of which somebody asks for who has read its row, and which a
        checkpoint that takes the row has synced.
        """
        copies = [entry.kept for entry in group if entry.kept is not None]
        if copies:
            self.keep_copies(copies)
        with self._log:
            self._redo.wrote(body_bytes)
            if not self._fresh_bytes:
                self._fresh_since = time.monotonic()
                self._log.notify_all()
            self._fresh_bytes += body_bytes
            touched = self.changes.begin([row[:2] for entry in group for row in entry.rows])
            try:
                self._fresh.add(group)
            finally:
                self.changes.end(touched)
            if self._fresh_bytes >= self._redo.half_bytes // 2:
                self._log.notify_all()
        self._commits += 1
        self._count(group)

    def _count(self, group: Sequence[Ready]) -> None:
        operations = sum([entry.operations for entry in group])
        self._operations += operations
        self._largest_group = max(self._largest_group, operations)

    def _paged(self, error: Exception | None) -> None:
        """Pages are in LMDB. What else came with them goes to the log now, and who waits for all that came before,
        behind it.
        """
        group, self._paging = self._paging, []
        if error is None:
            left = [entry for entry in group if entry.changes_rows or not entry.operations]
            self._rows_behind_pages -= sum([entry.changes_rows for entry in left])
            self._arriving.extend(left)
            group = [entry for entry in group if entry.operations and not entry.changes_rows]
            self._count(group)
        self._deliver(group)
        if self._arriving or self._arriving_pages:
            self._go_on_soon()

    def _commit_pages(self, group: Sequence[Ready]) -> None:
        """Raises lmdb.Error."""
        with self._writing, self._env.begin(write=True, db=self._databases[b"pages"]) as transaction:
            apply_pages(transaction, group)

    def _call(self, work: Callable[[], None], then: Callable[[Exception | None], None]) -> None:
        """In the writer thread; ``then(error)`` on the loop. An error is the store's end (``_fail``)."""
        self._calls.put((work, then))

    def _work(self) -> None:
        """The writer thread, until the end mark."""
        while (job := self._calls.get()) is not None:
            work, then = job
            failure: Exception | None = None
            try:
                work()
            except Exception as error:
                self._fail(error)
                failure = error
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it everyone who waited
                self._loop.call_soon_threadsafe(then, failure)

    def _failure(self) -> DiskUnusable:
        return DiskUnusable(f"the metadata store in {self.directory} failed: {self._reason}")

    def _fail(self, error: Exception) -> None:
        """In any thread but the event loop's: it writes to a disk that may not answer."""
        full = lacks_space(self.directory, error)
        with self._log:
            self._reason = (str(error) or type(error).__name__) + (" (no space is left)" if full else "")
            self._log.notify_all()
        if not full and not isinstance(error, Unfinished):
            self.note_failed(self._reason)
            try:
                replace_file(self.directory / FAILED_FILE, self._reason.encode() + b"\n")
            except OSError as refused:
                log.error(
                    "a metadata store can't note on its disk that it failed",
                    directory=str(self.directory),
                    reason=str(refused),
                )
        self._wake()

    def _wake(self) -> None:
        """A checkpoint has ended, or the store has failed: whoever waits is to go on. In any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it everyone who waited
                self._loop.call_soon_threadsafe(self._go_on)

    def _deliver(self, group: Sequence[Ready]) -> None:
        """A store that has failed says so of everything that it had in hand, also of what just went through: nobody
        must rely on a disk like that.
        """
        self._queued -= len(group)
        self._told_last = len(group)
        error = self._failure() if self._reason else None
        for entry in group:
            try:
                entry.done(error)
            except Exception as mistake:  # its neighbours are told all the same
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "telling of a commit failed", "exception": mistake}
                )
        if self._drained is not None and not self._queued and not self._drained.done():
            self._drained.set_result(None)

    # --- checkpoints
    # --------------------------------------------------------------------------------------------------------

    def restorable(self) -> Sequence[tuple[bytes, bytes]]:
        """Encoded fragment headers and payloads of the copies that a start found in the log: the disk's fragment store
        may not have them.
        There is no checkpoint until it is told that they are there (``copies_restored``)."""
        return self._restorable

    def copies_restored(self) -> None:
        with self._log:
            self._restorable = []
            self._log.notify_all()

    async def checkpoint(self) -> None:
        """Everything acknowledged before is in LMDB when it returns, unless the disk has failed."""
        await asyncio.to_thread(self._checkpoint)

    def _keep_checkpoints(self) -> None:
        """The checkpoint thread, until the store is closed."""
        while True:
            with self._log:
                while not self._stopping and (wait_s := self._until_checkpoint()) != 0:
                    self._log.wait(wait_s)
                if self._stopping:
                    break
            self._checkpoint()
        self._checkpoint(last=True)

    def _until_checkpoint(self) -> float | None:
        """Seconds; None: for ever, as far as can be told now."""
        if self._reason or self._restorable or not (self._fresh_bytes or self._log_full):
            return None
        if self._log_full or self._fresh_bytes >= self._redo.half_bytes // 2:
            return 0
        return max(0.0, self._fresh_since + CHECKPOINT_S - time.monotonic())

    def _checkpoint(self, *, last: bool = False) -> None:
        with self._checkpointing:
            with self._log:
                if self._reason or self._restorable or self._closed:
                    return
                self._frozen = self._fresh  # in this order, for whoever reads meanwhile
                self._fresh = Overlay()
                self._fresh_bytes = 0
                self._log_full = False
                sequence = self._redo.sequence
            try:
                self.sync_copies()
                with self._writing, self._env.begin(write=True) as transaction:
                    self._applier.apply(transaction, self._frozen)
                    self._put_mark(transaction, sequence, closed=last)
            except Exception as error:  # a mistake of ours too: nobody may wait for ever
                self._fail(error)
                return
            with self._log:
                self._redo.applied(sequence)
                self._frozen = Overlay()
                self._checkpoints += 1
                self._log.notify_all()
            self._wake()

    async def close(self) -> None:
        """What was queued is written first. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        if self._queued:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        self._redo.detach()
        self._calls.put(None)
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._writer.join()
        with self._log:
            self._stopping = True
            self._log.notify_all()
        self._checkpointer.join()
        with (
            self._checkpointing,
            self._writing,
            self._log,
        ):  # whoever comes late finds it closed, not a descriptor that is somebody else's by now
            self._closed = True
            self._log.notify_all()
            self._warmer.close()
            self._env.close()
            self._redo.close()
        os.close(self._lock_file)


def _no_copies() -> None:
    """No copies come with what is stored here."""


def _nowhere(_copies: Sequence[Any]) -> None:
    raise AssertionError("this store was not told where copies go")


def _settle(future: asyncio.Future[None], error: StoragedError | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)
