"""Checkpoints: what the redo log has and LMDB has not, written to LMDB in one commit.

Rows get their node and segment (``meta.storage.rowkey``), small values their sub-database, and the sums of shards
change with the rows (``meta.storage.sums``). Between checkpoints sums that are missing are built. Pages, which are not
logged, are written with ``apply_pages``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import structlog

from storaged.lmdb_file import lacks_space
from storaged.meta.storage.batch import PackedBatch
from storaged.meta.storage.cursor import pack_page, page_age, page_owner
from storaged.meta.storage.heap import Heap
from storaged.meta.storage.identity import Database, Transaction
from storaged.meta.storage.overlay import Overlay
from storaged.meta.storage.rowkey import SEGMENT_BYTES, link_key, row_key, split
from storaged.meta.storage.rowvalue import open_number, seal_number
from storaged.meta.storage.state import StoreState
from storaged.meta.storage.sums import Sums, stored_sum

log = structlog.get_logger(__name__)

ROOTS_CACHED_MAX = 65_536
_NEXT_NODE = b"next"

CHECKPOINT_S = 1.0
"""A checkpoint follows the first change within this time, or when the log's half is half full: it bounds the memory of
the overlay and the time of a start.
"""

RETRY_S = 1.0
"""How long after a checkpoint that found no room it is made again."""


class Checkpointer:
    """The checkpoint thread of one store."""

    def __init__(self, state: StoreState) -> None:
        self.count = 0
        self.running = threading.Lock()
        """Held while a checkpoint is made."""
        self.applier = Applier(state.databases)
        self._state = state
        self._sequence = self._taken = 0
        """Of what is frozen: its last group, and ``health.room.taken_bytes`` then."""
        self._retry_at_s = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"meta-checkpoint {state.directory.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Makes a last checkpoint and returns when it has ended. Blocks."""
        with self._state.changed:
            self._stopping = True
            self._state.changed.notify_all()
        self._thread.join()

    def make(self, *, last: bool = False) -> None:
        """Makes one now, unless the store has failed, or the fragment store does not have the copies of the log yet.
        ``last``: the mark says that the log is empty. Blocks.
        """
        with self.running:
            if self._state.starved:
                self._write_frozen(last=False)
            if not self._state.starved and self._freeze():
                self._write_frozen(last=last)

    def _freeze(self) -> bool:
        state = self._state
        with state.changed:
            if state.reason or state.restorable or state.closed:
                return False
            state.frozen = state.fresh  # in this order, for readers meanwhile
            state.fresh = Overlay()
            state.fresh_bytes = 0
            state.log_full = False
            self._sequence, self._taken = state.redo.sequence, state.health.room.taken_bytes
        return True

    def _write_frozen(self, *, last: bool) -> None:
        """Where there is no room, what is frozen stays so, and this is called again."""
        state = self._state
        token = state.health.begin("a checkpoint of the metadata store", long=True)
        try:
            state.hooks.sync_copies()
            with state.lmdb_lock, state.environment.begin(write=True) as transaction:
                self.applier.apply(transaction, state.frozen)
                state.put_mark(transaction, self._sequence, closed=last)
                used = state.used_pages(transaction)
            pages = state.pages_of(used)
        except Exception as error:  # a bug, too, must leave no caller waiting for ever
            self.applier = Applier(state.databases)
            self._retry_at_s = time.monotonic() + RETRY_S
            if lacks_space(state.directory, error):
                state.starve(error)
            else:
                state.fail(error)
            return
        finally:
            state.health.end(token)
        with state.changed:
            state.redo.mark_applied(self._sequence)
            state.taken_applied, state.pages = self._taken, pages
            state.frozen = Overlay()
            state.fed()
            self.count += 1
            state.changed.notify_all()
        state.on_progress()

    def _run(self) -> None:
        while True:
            with self._state.changed:
                while not self._stopping and (wait_s := self._due_s()) != 0 and not self._state.sums_wanted:
                    self._state.changed.wait(wait_s)
                if self._stopping:
                    break
                without_sum = next(iter(self._state.sums_wanted), b"")
            if wait_s == 0:
                self.make()
            else:
                self._build_sum(without_sum)
        self.make(last=True)

    def _build_sum(self, prefix: bytes) -> None:
        """Goes on with the sum of a shard that has none. One that can't be read stays without."""
        state, done = self._state, True
        with self.running:
            try:
                done = bool(state.reason) or self.applier.build_sum(state, prefix)
            except Exception as error:  # a bug, too, must not end the thread that makes checkpoints
                log.warning("the sum of a shard can't be built", directory=str(state.directory), reason=str(error))
        if done:
            with state.changed:
                state.sums_wanted.pop(prefix, None)

    def _due_s(self) -> float | None:
        """Seconds until the next checkpoint; None: not before something changes."""
        state = self._state
        if state.reason or state.restorable:
            return None
        if state.starved:
            return max(0.0, self._retry_at_s - time.monotonic())
        if not (state.fresh_bytes or state.log_full):
            return None
        if state.log_full or state.fresh_bytes >= state.redo.half_bytes // 2:
            return 0
        return max(0.0, state.fresh_since + CHECKPOINT_S - time.monotonic())


class Applier:
    """Writes overlays to LMDB, one at a time. A transaction that is not committed must be the last, since the roots
    made in it stay cached.
    """

    def __init__(self, databases: dict[bytes, Database]) -> None:
        self._databases = databases
        self._rows = databases[b"rows"]
        self._heap = Heap(self._rows, databases[b"heap"], databases[b"meta"])
        self._roots: dict[bytes, int] = {}
        self._sums = Sums(databases)

    def apply(self, transaction: Transaction, overlay: Overlay) -> None:
        """In the order of the keys, so that rows of one page of the tree copy it once. Raises lmdb.Error,
        RowDamaged.
        """
        rows: list[tuple[bytes, bytes, bytes, bytes]] = []
        fresh: list[bytes] = []
        for prefix in sorted(overlay.rows):
            root = self._root(transaction, prefix, fresh)
            for key, row in sorted(overlay.rows[prefix].items()):
                node, segment = (root, key) if len(key) <= SEGMENT_BYTES else self._node(transaction, root, key)
                rows.append((row_key(node, segment), prefix, key, row))
        self._sums.change(transaction, rows, self._heap.put(transaction, rows), fresh)
        for (database, key), value in overlay.others.items():
            if value is None:
                transaction.delete(key, db=self._databases[database])
            else:
                transaction.put(key, value, db=self._databases[database])

    def _root(self, transaction: Transaction, scope_key: bytes, fresh: list[bytes]) -> int:
        """Makes one where there is none, and adds it to ``fresh``."""
        root = self._roots.get(scope_key)
        if root is None:
            sealed = transaction.get(scope_key, db=self._databases[b"nodes"])
            if sealed is None:
                root = self._new_node(transaction)
                fresh.append(scope_key)
                transaction.put(scope_key, seal_number(scope_key, root), db=self._databases[b"nodes"])
            else:
                root = open_number(scope_key, sealed)
            if len(self._roots) >= ROOTS_CACHED_MAX:
                self._roots.clear()
            self._roots[scope_key] = root
        return root

    def _node(self, transaction: Transaction, node: int, key: bytes) -> tuple[int, bytes]:
        """The node and segment of a long key. Makes links that are missing."""
        links, segment = split(key)
        for part in links:
            link = link_key(node, part)
            sealed = transaction.get(link, db=self._rows)
            if sealed is None:
                node = self._new_node(transaction)
                transaction.put(link, seal_number(link, node), db=self._rows)
            else:
                node = open_number(link, sealed)
        return node, segment

    def _new_node(self, transaction: Transaction) -> int:
        nodes = self._databases[b"nodes"]
        sealed = transaction.get(_NEXT_NODE, db=nodes)
        node = 1 if sealed is None else open_number(_NEXT_NODE, sealed)
        transaction.put(_NEXT_NODE, seal_number(_NEXT_NODE, node + 1), db=nodes)
        return node

    def build_sum(self, state: StoreState, prefix: bytes) -> bool:
        """Reads some more rows of a shard without a sum. True when that is done: the sum is stored, or there is no such
        shard. Raises RowDamaged, lmdb.Error.
        """
        with state.environment.begin(db=self._rows) as transaction:
            sealed = transaction.get(prefix, db=self._databases[b"nodes"])
            if sealed is None or stored_sum(transaction, self._databases[b"nodes"], prefix) is not None:
                return True
            total = self._sums.read_slice(transaction, prefix, open_number(prefix, sealed))
        if total is None:
            return False
        with state.lmdb_lock, state.environment.begin(write=True) as transaction:
            self._sums.note(transaction, prefix, total)
        return True


def apply_pages(transaction: Transaction, batches: Sequence[PackedBatch]) -> None:
    """Puts pages, and deletes and counts stale ones. Raises lmdb.Error."""
    for batch in batches:
        for page in batch.pages:
            held = transaction.get(page.page_hash)
            created_ms, owner = page.created_ms, page.owner
            if held is not None:
                created_ms, owner = max(created_ms, page_age(held) + 1), owner or page_owner(held)
            transaction.put(page.page_hash, pack_page(created_ms, owner, page.body))
        for page_hash, created_ms in batch.stale_pages:
            stored = transaction.get(page_hash)
            if stored is not None and page_age(stored) == created_ms:
                transaction.delete(page_hash)
                batch.deleted += 1
