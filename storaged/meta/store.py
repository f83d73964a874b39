"""One disk's acceptor state in LMDB.

Theory of operation
    LMDB runs with its default, synced flags: a commit that returned is on the disk, and readers see nothing before that. One process owns
    an environment (``lock`` is flocked for as long as it is open), and one thread of it writes at a time: the store's own, or the fragment log's (``commit_here``),
    in no order between the two. Commits are grouped by what has arrived: while one is being synced the next collects, a lone one never waits. The results of a whole group reach the event loop in one call.

    Readers are short: every get and every slice is a snapshot of its own, closed before it returns, so the file never grows for one.

    sub-database   key                               value
    rows           rowkey's node || segment          rowvalue's row; a link: check || node (u64 BE)
    nodes          table || scope || shard           check || root node (u64 BE)
                   "next"                            check || the next node to give out (u64 BE)
    fences         scope                             check || final (u8) || nonce
    pages          xxh3-128 of the page              created ms (u64 BE) || the page
    meta           name                              check || value
                   NUL "identity"                    check || store id (16) || starts (u64 BE)

    A commit that fails ends the store's life as a writer: what the disk did with it is unknown, so it stays read-only until it is opened
    again. A failure that isn't mere lack of space is noted beside it (``failed``), and then it is never opened again: after a failed sync the
    kernel forgets which pages are dirty (Rebello et al., ATC'20), and a disk whose promises are in doubt joins only as a new one.

    The *identity* is the store's random id with the number of times it was opened. The owner keeps it elsewhere and hands it in at the next
    start: a store that is missing, another one, or an older copy of itself put back from a snapshot is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import xxhash

from storaged.cluster.layout import SYSTEM_PARTITION, partition_of
from storaged.errors import DirectoryInUse, DiskForeign, DiskUnusable, SlowDown, StoragedError
from storaged.ids import Entropy, system_entropy
from storaged.mapped import reach_end
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import Done, Fence, RowDamaged, Slot, Stamps, StoreBatch
from storaged.meta.rowkey import SEGMENT_BYTES, find, link_key, row_key, split, walk
from storaged.meta.rowvalue import NAME_PREFIX_BYTES, columns_of, open_small, pack_row, seal_small, stamps_in, unpack_row
from storaged.meta.stretch import columns_at, stamps_at
from storaged.units import GIB

MAP_BYTES_DEFAULT = 64 * GIB
"""Address space, not disk space: the file is as long as what was ever in use at once."""

GROUP_OPERATIONS_MAX = 128
"""A commit with its sync costs about 1.2 ms whatever its size, and 128 puts about as much again: more in one commit only adds waiting."""

QUEUED_BATCHES_MAX = 4096
SLICE_ROWS_MAX = 10_000
ROOTS_CACHED_MAX = 65_536

STORE_ID_BYTES = 16
PAGE_AGE_BYTES = 8
_IDENTITY = b"\0identity"
_NEXT_NODE = b"next"
_SUB_DATABASES = (b"rows", b"nodes", b"fences", b"pages", b"meta")
_OUT_OF_SPACE = (lmdb.MapFullError, lmdb.DiskError)

Transaction = Any
Database = Any


@dataclass(frozen=True)
class MetaStoreStatistics:
    """``state``: ok, read-only. ``bytes_used`` of ``map_bytes``; ``largest_group`` in operations; ``damaged_rows`` met since it was opened."""

    state: str
    reason: str
    commits: int
    operations: int
    largest_group: int
    queued_batches: int
    rows: int
    bytes_used: int
    map_bytes: int
    damaged_rows: int


@dataclass(slots=True)
class Ready:
    """One batch on its way: rows still want their node, everything else is ready. ``value`` None deletes."""

    done: Done
    rows: list[tuple[RegisterName, bytes]] = field(default_factory=list)
    others: list[tuple[bytes, bytes, bytes | None]] = field(default_factory=list)
    stale_pages: Sequence[tuple[bytes, int]] = ()
    deleted: int = 0

    @property
    def operations(self) -> int:
        return len(self.rows) + len(self.others) + len(self.stale_pages)


class _Rows:
    """``rowkey.Rows`` over one read transaction."""

    def __init__(self, transaction: Transaction, database: Database) -> None:
        self._transaction = transaction
        self._database = database

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._transaction.get(key, db=self._database)
        return value

    def read(self, first: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        cursor = self._transaction.cursor(db=self._database)
        return list(islice(cursor.iternext(), limit)) if cursor.set_range(first) else []

    def child(self, link: bytes, value: bytes) -> int:
        return int.from_bytes(open_small(link, value), "big")


class LmdbMetaStore:
    """``MetaStore`` on LMDB. Opening blocks for a few milliseconds; use ``open_or_refuse`` for a disk that was known before."""

    def __init__(self, directory: Path, *, map_bytes: int = MAP_BYTES_DEFAULT, entropy: Entropy = system_entropy) -> None:
        """Opens the store, or makes one where there is none.

        Raises DirectoryInUse, DiskForeign (it failed before, or what is there is no store), DiskUnusable (the disk refuses).
        """
        self.directory = Path(directory)
        self._reason = ""
        self._closing = False
        self._commits = self._operations = self._largest_group = self._queued = self._damaged = 0
        self._map_bytes = map_bytes
        self._reader_roots: dict[bytes, int] = {}
        self._writer_roots: dict[bytes, int] = {}
        self._queue: queue.SimpleQueue[list[Ready] | None] = queue.SimpleQueue()
        self._arriving: list[Ready] = []
        self._committing = threading.Lock()
        self._room = asyncio.Semaphore(QUEUED_BATCHES_MAX)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock_file = _lock(self.directory)
        try:
            self._open(map_bytes, entropy)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._writer = threading.Thread(target=self._write, name=f"meta-writer {self.directory.name}", daemon=True)
        self._writer.start()

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

        Raises DiskForeign when it is missing, another, or an older copy of itself; nothing is created or changed then. Raises as the constructor does, too.
        """
        directory = Path(directory)
        if expected_identity is not None:
            file = directory / "data.mdb"
            if not file.exists():
                raise DiskForeign(f"the metadata store that was in {directory} is gone")
            if not file.stat().st_size:
                raise DiskForeign(f"the metadata store in {directory} is blank, although one was in use there")
            _compare(directory, expected_identity)
        return cls(directory, map_bytes=map_bytes, entropy=entropy)

    def _open(self, map_bytes: int, entropy: Entropy) -> None:
        failed = self.directory / "failed"
        if failed.exists():
            raise DiskForeign(f"the metadata store in {self.directory} failed before and is not used again: {failed.read_text().strip()}")
        try:
            self._env = lmdb.open(str(self.directory), map_size=map_bytes, max_dbs=len(_SUB_DATABASES), max_spare_txns=8)
        except lmdb.Error as error:
            raise _unopened(self.directory, error) from None
        try:
            reach_end(self._env, self.directory)
            self._env.reader_check()
            self._databases: dict[bytes, Database] = {name: self._env.open_db(name) for name in _SUB_DATABASES}
            self._rows = self._databases[b"rows"]
            self.identity = self._count_start(entropy)
            _sync_directory(self.directory)
        except lmdb.Error as error:
            self._env.close()
            raise _unopened(self.directory, error) from None
        except BaseException:
            self._env.close()
            raise

    def _count_start(self, entropy: Entropy) -> bytes:
        meta = self._databases[b"meta"]
        with self._env.begin(write=True) as transaction:
            known = _read_identity(self.directory, transaction, meta)
            store_id, starts = (
                (known[:STORE_ID_BYTES], int.from_bytes(known[STORE_ID_BYTES:], "big")) if known else (entropy(STORE_ID_BYTES), 0)
            )
            identity = store_id + (starts + 1).to_bytes(8, "big")
            transaction.put(_IDENTITY, seal_small(_IDENTITY, identity), db=meta)
        return identity

    @property
    def store_id(self) -> bytes:
        """16 random bytes made with the store."""
        return self.identity[:STORE_ID_BYTES]

    # --- reading --------------------------------------------------------------------------------------------------------

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
        root = self._root(name.prefix)
        if root is None:
            return None
        try:
            with self._begin(self._rows) as transaction:
                if len(name.key) <= SEGMENT_BYTES:
                    row = transaction.get(row_key(root, name.key))
                else:
                    key = find(_Rows(transaction, self._rows), root, name.key)
                    row = None if key is None else transaction.get(key)
            return None if row is None else unpack_row(name, row)
        except RowDamaged:
            self._damaged += 1
            raise
        except lmdb.Error as error:
            raise self._unreadable(error) from None

    def get_fence(self, scope: bytes) -> Fence | None:
        sealed = self._get_small(b"fences", scope)
        return None if sealed is None else Fence(scope, sealed[1:], sealed[0] == 1)

    def get_page(self, page_hash: bytes) -> bytes | None:
        stored = self._read(b"pages", page_hash)
        page = None if stored is None else stored[PAGE_AGE_BYTES:]
        if page is not None and xxhash.xxh3_128_digest(page) != page_hash:
            self._damaged += 1
            raise RowDamaged(f"page {page_hash.hex()} does not have its hash")
        return page

    def pages(self, *, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        if limit > SLICE_ROWS_MAX:
            raise ValueError(f"a slice has at most {SLICE_ROWS_MAX} pages, not {limit}: a long reader keeps the file growing")
        try:
            with self._begin(self._databases[b"pages"], buffers=True) as transaction:  # only the first bytes of each page are looked at
                cursor = transaction.cursor()
                found = islice(cursor.iternext(), limit + 1) if cursor.set_range(after) else ()
                ages = [(bytes(key), int.from_bytes(value[:PAGE_AGE_BYTES], "big")) for key, value in found]
        except lmdb.Error as error:
            raise self._unreadable(error) from None
        return [page for page in ages if page[0] > after][:limit]

    def get_meta(self, key: str) -> bytes | None:
        return self._get_small(b"meta", key.encode())

    def _get_small(self, database: bytes, key: bytes) -> bytes | None:
        sealed = self._read(database, key)
        return None if sealed is None else self._opened(key, sealed)

    def slice(self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        if limit > SLICE_ROWS_MAX:
            raise ValueError(f"a slice has at most {SLICE_ROWS_MAX} rows, not {limit}: a long reader keeps the file growing")
        root = self._root(RegisterName(table, scope, shard, b"").pack())
        if root is None:
            return []
        with self._reading() as transaction:
            return walk(_Rows(transaction, self._rows), root, after=after, prefix=prefix, limit=limit)

    @contextlib.contextmanager
    def _reading(self, *, buffers: bool = False) -> Iterator[Transaction]:
        """A snapshot of the rows. Raises RowDamaged where it meets damage."""
        try:
            with self._begin(self._rows, buffers=buffers) as transaction:
                yield transaction
        except RowDamaged:
            self._damaged += 1
            raise
        except lmdb.Error as error:
            raise self._unreadable(error) from None

    def columns(
        self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int
    ) -> tuple[list[bytes], list[bytes], bool]:
        root = self._root(RegisterName(table, scope, shard, b"").pack())
        if root is None:
            return [], [], False
        with self._reading() as transaction:
            found = columns_at(transaction.cursor(), root, after=after, prefix=prefix, limit=limit)
        return found or columns_of(self.slice(table, scope, shard, after=after, prefix=prefix, limit=limit + 1), limit)

    def stamps(self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int) -> Stamps:
        root = self._root(RegisterName(table, scope, shard, b"").pack())
        if root is None:
            return Stamps(b"", 0, 0, b"", False)
        with self._reading(buffers=True) as transaction:
            found = stamps_at(transaction.cursor(), root, after=after, prefix=prefix, limit=limit)
        return found or stamps_in(*self.columns(table, scope, shard, after=after, prefix=prefix, limit=limit))

    def scan(self, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int) -> list[Slot]:
        rows = self.slice(table, scope, shard, after=after, prefix=prefix, limit=limit)
        return [unpack_row(RegisterName(table, scope, shard, key), row) for key, row in rows]

    def scopes(self, partition: int | None = None) -> list[tuple[int, bytes, int]]:
        """Raises RowDamaged."""
        try:
            with self._begin(self._databases[b"nodes"]) as transaction:
                keys = [key for key in transaction.cursor().iternext(keys=True, values=False) if len(key) == NAME_PREFIX_BYTES]
        except lmdb.Error as error:
            raise self._unreadable(error) from None
        found = [(key[0], bytes(key[1:17]), key[17]) for key in keys]
        return found if partition is None else [entry for entry in found if _partition(entry) == partition]

    def statistics(self) -> MetaStoreStatistics:
        with self._begin(self._rows) as transaction:
            rows = transaction.stat(self._rows)["entries"]
        information, page_bytes = self._env.info(), self._env.stat()["psize"]
        return MetaStoreStatistics(
            state="read-only" if self._reason else "ok",
            reason=self._reason,
            commits=self._commits,
            operations=self._operations,
            largest_group=self._largest_group,
            queued_batches=self._queued,
            rows=rows,
            bytes_used=(information["last_pgno"] + 1) * page_bytes,
            map_bytes=information["map_size"],
            damaged_rows=self._damaged,
        )

    # --- writing --------------------------------------------------------------------------------------------------------

    async def commit(self, batch: StoreBatch) -> None:
        """As the port says; an empty batch is a barrier. Raises ValueError for what can't be stored, before anything is.

        A caller that is cancelled leaves its batch in the queue: it is written, and nobody is told.
        """
        future = asyncio.get_running_loop().create_future()
        await self._wait_for(self.ready(batch, partial(_settle, future)), future)

    async def delete_pages(self, pages: Sequence[tuple[bytes, int]]) -> int:
        future = asyncio.get_running_loop().create_future()
        entry = Ready(partial(_settle, future), stale_pages=pages)
        await self._wait_for(entry, future)
        return entry.deleted

    async def _wait_for(self, entry: Ready, future: asyncio.Future[None]) -> None:
        async with self._room:
            self._enqueue(entry)
            await future

    def post(self, batch: StoreBatch, done: Done) -> None:
        """As the port says. It does not wait for room: beyond ``QUEUED_BATCHES_MAX`` it raises SlowDown."""
        if self._queued >= QUEUED_BATCHES_MAX:
            raise SlowDown(f"{self._queued} batches wait for the metadata store in {self.directory}.")
        self._enqueue(self.ready(batch, done))

    def _enqueue(self, entry: Ready) -> None:
        self._refuse_when_unusable()
        loop = asyncio.get_running_loop()
        self._queued += 1
        self._arriving.append(entry)
        if len(self._arriving) == 1 or loop is not self._loop:
            loop.call_soon(self._hand_over)
        self._loop = loop

    def ready(self, batch: StoreBatch, done: Done) -> Ready:
        """A batch as ``commit_here`` takes it. Raises as ``post``."""
        self._refuse_when_unusable()
        return _prepare(batch, done)

    def commit_here(self, group: Sequence[Ready]) -> StoragedError | None:
        """Commits in the caller's thread, which is none of the event loop's; nobody's ``done`` is called. Not ordered with what was posted.

        A disk's other writer thread commits like this the records whose data it has just synced: one thread, one wake-up for both.
        """
        self._commit_group(group, sum(entry.operations for entry in group))
        return self._failure() if self._reason else None

    def _failure(self) -> DiskUnusable:
        return DiskUnusable(f"the metadata store in {self.directory} failed: {self._reason}")

    def _hand_over(self) -> None:
        """Everything that this turn of the loop brought goes to the writer thread at once, so that it is not woken for the first of a burst alone."""
        if self._arriving:
            entries, self._arriving = self._arriving, []
            self._queue.put(entries)

    def _refuse_when_unusable(self) -> None:
        if self._reason or self._closing:
            raise DiskUnusable(f"the metadata store in {self.directory} takes no writes: {self._reason or 'it is being closed'}")

    def _write(self) -> None:
        """The writer thread: one group after the other until the end mark."""
        backlog: deque[Ready] = deque()
        last = False
        while backlog or not last:
            group: list[Ready] = []
            operations = 0
            while operations < GROUP_OPERATIONS_MAX:
                if backlog:
                    entry = backlog.popleft()
                    group.append(entry)
                    operations += entry.operations
                    continue
                try:
                    more = None if last else self._queue.get(block=not group)
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                backlog.extend(more)
            if not group:
                break
            self._commit_group(group, operations)
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it everyone who waited
                self._loop.call_soon_threadsafe(self._deliver, group)

    def _commit_group(self, group: Sequence[Ready], operations: int) -> None:
        with self._committing:
            if self._reason:
                return
            try:
                with self._env.begin(write=True) as transaction:
                    for entry in group:
                        self._apply(transaction, entry)
            except (lmdb.Error, RowDamaged) as error:
                self._fail(error)
                return
            self._commits += 1
            self._operations += operations
            self._largest_group = max(self._largest_group, operations)

    def _fail(self, error: Exception) -> None:
        self._reason = str(error) or type(error).__name__
        if not isinstance(error, _OUT_OF_SPACE):
            with contextlib.suppress(OSError):  # a disk that refuses this too is noticed at its next start
                (self.directory / "failed").write_text(self._reason + "\n")

    def _deliver(self, group: list[Ready]) -> None:
        """A store that has failed says so of everything that it had in hand, also of what just went through: nobody must rely on a disk like that."""
        self._queued -= len(group)
        error = self._failure() if self._reason else None
        for entry in group:
            try:
                entry.done(error)
            except Exception as mistake:  # its neighbours are told all the same
                asyncio.get_running_loop().call_exception_handler({"message": "telling of a commit failed", "exception": mistake})

    def _apply(self, transaction: Transaction, entry: Ready) -> None:
        put, rows = transaction.put, self._rows
        for name, row in entry.rows:
            node, segment = self._writer_root(transaction, name), name.key
            if len(segment) > SEGMENT_BYTES:
                node, segment = self._writer_node(transaction, node, segment)
            put(row_key(node, segment), row, db=rows)
        for database, key, value in entry.others:
            if value is None:
                transaction.delete(key, db=self._databases[database])
            else:
                put(key, value, db=self._databases[database])
        for page_hash, created_ms in entry.stale_pages:
            stored = transaction.get(page_hash, db=self._databases[b"pages"])
            if stored is not None and stored[:PAGE_AGE_BYTES] == created_ms.to_bytes(PAGE_AGE_BYTES, "big"):
                transaction.delete(page_hash, db=self._databases[b"pages"])
                entry.deleted += 1

    def _writer_root(self, transaction: Transaction, name: RegisterName) -> int:
        scope_key = name.prefix
        root = self._writer_roots.get(scope_key)
        if root is None:
            sealed = transaction.get(scope_key, db=self._databases[b"nodes"])
            if sealed is None:
                root = self._new_node(transaction)
                transaction.put(scope_key, seal_small(scope_key, root.to_bytes(8, "big")), db=self._databases[b"nodes"])
            else:
                root = int.from_bytes(open_small(scope_key, sealed), "big")
            if len(self._writer_roots) >= ROOTS_CACHED_MAX:
                self._writer_roots.clear()
            self._writer_roots[scope_key] = root
        return root

    def _writer_node(self, transaction: Transaction, node: int, key: bytes) -> tuple[int, bytes]:
        """The node and segment of a long key; links that are missing are made."""
        links, segment = split(key)
        for part in links:
            link = link_key(node, part)
            sealed = transaction.get(link, db=self._rows)
            if sealed is None:
                node = self._new_node(transaction)
                transaction.put(link, seal_small(link, node.to_bytes(8, "big")), db=self._rows)
            else:
                node = int.from_bytes(open_small(link, sealed), "big")
        return node, segment

    def _new_node(self, transaction: Transaction) -> int:
        nodes = self._databases[b"nodes"]
        sealed = transaction.get(_NEXT_NODE, db=nodes)
        node = 1 if sealed is None else int.from_bytes(open_small(_NEXT_NODE, sealed), "big")
        transaction.put(_NEXT_NODE, seal_small(_NEXT_NODE, (node + 1).to_bytes(8, "big")), db=nodes)
        return node

    async def close(self) -> None:
        """What was queued is written first. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._env.close()
        os.close(self._lock_file)


def _settle(future: asyncio.Future[None], error: StoragedError | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)


def _prepare(batch: StoreBatch, done: Done) -> Ready:
    entry = Ready(done, [(slot.name, pack_row(slot)) for slot in batch.slots])
    others = entry.others
    for fence in batch.fences:
        others.append((b"fences", fence.scope, seal_small(fence.scope, bytes([fence.final]) + fence.nonce)))
    others.extend((b"fences", scope, None) for scope in batch.unfence)
    for page in batch.pages:
        if xxhash.xxh3_128_digest(page.body) != page.page_hash:
            raise ValueError("a page must be stored under its own hash")
        others.append((b"pages", page.page_hash, page.created_ms.to_bytes(PAGE_AGE_BYTES, "big") + page.body))
    for key, value in batch.meta.items():
        if not key or key.startswith("\0"):
            raise ValueError(f"not a name for a small value: {key!r}")
        others.append((b"meta", key.encode(), seal_small(key.encode(), value)))
    return entry


def _partition(entry: tuple[int, bytes, int]) -> int:
    table, scope, shard = entry
    return SYSTEM_PARTITION if table == Table.SYSTEM else partition_of(scope, shard)


def _lock(directory: Path) -> int:
    """Raises DirectoryInUse, DiskUnusable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sync_directory(directory.parent)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskUnusable(f"no metadata store can be opened in {directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DirectoryInUse(f"another process uses the metadata store in {directory}") from None
    return descriptor


def _compare(directory: Path, expected: bytes) -> None:
    """Raises DiskForeign unless the store in ``directory`` is the expected one, no older than it was; reads only."""
    descriptor = _lock(directory)
    try:
        with lmdb.open(str(directory), readonly=True, max_dbs=len(_SUB_DATABASES), create=False) as environment:
            reach_end(environment, directory)
            try:
                meta = environment.open_db(b"meta", create=False)
            except lmdb.NotFoundError:
                raise DiskForeign(f"the metadata store in {directory} is blank, although one was in use there") from None
            with environment.begin() as transaction:
                found = _read_identity(directory, transaction, meta)
    except lmdb.Error as error:
        raise _unopened(directory, error) from None
    finally:
        os.close(descriptor)
    if found is None or found[:STORE_ID_BYTES] != expected[:STORE_ID_BYTES]:
        raise DiskForeign(f"the metadata store in {directory} is another one than was in use there")
    if int.from_bytes(found[STORE_ID_BYTES:], "big") < int.from_bytes(expected[STORE_ID_BYTES:], "big"):
        raise DiskForeign(f"the metadata store in {directory} is an older copy of the one that was in use there")


def _read_identity(directory: Path, transaction: Transaction, meta: Database) -> bytes | None:
    sealed = transaction.get(_IDENTITY, db=meta)
    try:
        return None if sealed is None else open_small(_IDENTITY, sealed)
    except RowDamaged as error:
        raise DiskForeign(f"the metadata store in {directory} does not say which it is: {error}") from None


def _unopened(directory: Path, error: lmdb.Error) -> DiskForeign | DiskUnusable:
    if isinstance(error, lmdb.InvalidError | lmdb.CorruptedError | lmdb.VersionMismatchError | lmdb.PageNotFoundError):
        return DiskForeign(f"what is in {directory} is no metadata store: {error}")
    return DiskUnusable(f"no metadata store can be opened in {directory}: {error}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
