"""What the parts of one open store share: its LMDB environment, its redo log, and what LMDB does not have yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import structlog

from storaged.disk_health import DiskHealth
from storaged.disk_states import READ_ONLY
from storaged.durable import RestartNeeded, replace_file
from storaged.errors import DiskUnusable
from storaged.lmdb_file import lacks_space
from storaged.meta.storage.batch import PackedBatch
from storaged.meta.storage.dirty_ranges import DirtyRangeTracker
from storaged.meta.storage.identity import REDO, Database, Mark, Transaction, split_identity
from storaged.meta.storage.overlay import Overlay
from storaged.meta.storage.redo import RedoLog
from storaged.meta.storage.remembered import Remembered
from storaged.meta.storage.rowvalue import seal_small
from storaged.meta.store_ports import StoreFull

log = structlog.get_logger(__name__)

FAILED_FILE = "failed"
METADATA = "metadata"
"""A source of findings in the disk's health."""


def _no_copies() -> None:
    """Nothing to sync: this store has no small copies."""


def _nowhere(_copies: Sequence[Any]) -> None:
    raise AssertionError("this store has no place for copies")


@dataclass
class StoreHooks:
    """What the owner of a store attaches to it after it is open."""

    on_failed: Callable[[str], object] = lambda _reason: None
    """Called with the reason of a lasting failure, in the thread that found it and before the store notes it on its own
    disk: the owner keeps it on another disk. It must not raise.
    """
    keep_copies: Callable[[Sequence[Any]], None] = _nowhere
    """Called on the event loop with ``PackedBatch.copy_write`` of batches, once their copies are durable in the log and
    before their rows can be read. It must not raise.
    """
    sync_copies: Callable[[], None] = _no_copies
    """Called in a thread of the store: makes all copies that ``keep_copies`` was called with durable in the fragment
    store. Raises RestartNeeded when that needs a restart: the copies stay in the log, and the store takes no more
    writes."""


class Pages(NamedTuple):
    """LMDB's file: bytes of pages that nothing uses, bytes by which it may grow, and the size of its map."""

    unused_bytes: int
    left_bytes: int
    map_bytes: int


class StoreState:
    """The shared state of one open store. ``changed`` guards the overlays, their sizes and the position of the redo
    log; it is notified when a checkpoint becomes due and when one has ended. The holder of ``lmdb_lock`` writes to
    LMDB. Take ``lmdb_lock`` before ``changed``.
    """

    def __init__(
        self,
        directory: Path,
        lock_file: int,
        environment: Any,
        databases: dict[bytes, Database],
        redo: RedoLog,
        identity: bytes,
        health: DiskHealth,
    ) -> None:
        self.directory = directory
        self.lock_file = lock_file
        self.environment = environment
        self.databases = databases
        self.redo = redo
        self.identity = identity
        self.health = health
        self.remembered = Remembered()
        self.hooks = StoreHooks()
        self.changed = threading.Condition()
        self.lmdb_lock = threading.Lock()
        self.fresh = self.frozen = Overlay()
        """What is durable and not yet in LMDB: the newest, over what a checkpoint is writing."""
        self.fresh_bytes = 0
        self.fresh_since = 0.0
        self.taken_applied = 0
        """``health.room.taken_bytes`` at the freeze of the state that LMDB has now. It does not have later changes
        yet."""
        with environment.begin() as transaction:
            self.pages = self.pages_of(self.used_pages(transaction))
        """As of the last checkpoint."""
        self.dirty_ranges = DirtyRangeTracker()
        self.log_full = False
        self.sums_wanted: dict[bytes, None] = {}
        """Shards without a sum, of which one was asked for (``meta.storage.sums``)."""
        self.restorable: list[tuple[bytes, bytes]] = []
        """Copies that the start found in the log, until the fragment store has them."""
        self.reason = ""
        """Why the store takes no more writes; empty while it does."""
        self.starved = ""
        """Why LMDB can't take now what the log has: there is no room. No writes are taken until it can."""
        self.closing = self.closed = False
        self.on_progress: Callable[[], None] = lambda: None
        """Called in any thread when a checkpoint has ended or the store has failed."""

    def used_pages(self, transaction: Transaction) -> int:
        """Of LMDB's file. In a transaction that has used the tables: it reads no other pages then."""
        tables = [self.environment.stat(), *(transaction.stat(database) for database in self.databases.values())]
        return sum(table["branch_pages"] + table["leaf_pages"] + table["overflow_pages"] for table in tables)

    def pages_of(self, used: int) -> Pages:
        information, page_bytes = self.environment.info(), self.environment.stat()["psize"]
        pages, map_bytes = information["last_pgno"] + 1, information["map_size"]
        return Pages(max(0, pages - used) * page_bytes, map_bytes - pages * page_bytes, map_bytes)

    def put_mark(self, transaction: Transaction, applied: int, *, closed: bool = False) -> None:
        mark = Mark(applied, self.redo.sequence, split_identity(self.identity)[1], closed)
        transaction.put(REDO, seal_small(REDO, mark.pack()), db=self.databases[b"meta"])

    def show(self, group: Sequence[PackedBatch], body_bytes: int) -> None:
        """Makes a group readable that is durable in the log."""
        with self.changed:
            self.redo.advance(body_bytes)
            if not self.fresh_bytes:
                self.fresh_since = time.monotonic()
                self.changed.notify_all()
            self.fresh_bytes += body_bytes
            if self.remembered.used:
                self.remembered.forget(group)
            touched = self.dirty_ranges.begin([row[:2] for batch in group for row in batch.rows])
            try:
                self.fresh.add(group)
            finally:
                self.dirty_ranges.end(touched)
            if self.fresh_bytes >= self.redo.half_bytes // 2:
                self.changed.notify_all()

    def refuse_when_unusable(self) -> None:
        if self.reason or self.closing:
            raise DiskUnusable(
                f"the metadata store in {self.directory} takes no writes: {self.reason or 'it is being closed'}"
            )
        if self.starved:
            raise self.no_room()

    def no_room(self) -> StoreFull:
        return StoreFull(f"the metadata store in {self.directory} takes no writes: {self.starved}", state="full")

    def starve(self, error: Exception) -> None:
        """A checkpoint found no room. Nothing is lost: it is made again and again, until there is some."""
        with self.changed:
            if not self.starved:
                log.error("a metadata store has no room", directory=str(self.directory), reason=str(error))
            self.starved = f"{error} (no space is left)"
            self.health.note(METADATA, READ_ONLY, f"metadata: {self.starved}")
            self.changed.notify_all()
        self.on_progress()

    def fed(self) -> None:
        """There was room for a checkpoint. The caller holds ``changed``."""
        if self.starved:
            log.info("a metadata store has room again", directory=str(self.directory))
            if not self.reason:
                self.health.clear(METADATA)
        self.starved = ""

    def failure(self) -> DiskUnusable:
        return DiskUnusable(f"the metadata store in {self.directory} failed: {self.reason}")

    def fail(self, error: Exception) -> None:
        """Ends the store's life as a writer. Not on the event loop: it writes to a disk that may not answer."""
        # LMDB gives up when it can't write its first pages, as may happen on a disk that is full.
        full = lacks_space(self.directory, error) or (bool(self.starved) and isinstance(error, lmdb.PanicError))
        with self.changed:
            self.reason = (str(error) or type(error).__name__) + (" (no space is left)" if full else "")
            self.health.note(METADATA, READ_ONLY, f"metadata: {self.reason}")
            self.changed.notify_all()
        if not full and not isinstance(error, RestartNeeded):
            self.hooks.on_failed(self.reason)
            try:
                replace_file(self.directory / FAILED_FILE, self.reason.encode() + b"\n")
            except OSError as refused:
                log.error(
                    "a metadata store can't note on its disk that it failed",
                    directory=str(self.directory),
                    reason=str(refused),
                )
        self.on_progress()
