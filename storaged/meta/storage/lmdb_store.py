"""One disk's acceptor state: LMDB under a redo log.

Theory of operation
    A batch is durable when it is in the redo log (``meta.storage.redo``). From then on it is read from an *overlay* in
    memory over LMDB, until a *checkpoint* has put it into LMDB: one commit, with LMDB's default, synced flags, for what
    many groups brought within about a second. A page of the tree is written once for all its rows, since a checkpoint
    writes in the order of the keys. A start reads the overlay from the log again.

    ``meta.storage.reader`` has the reads, ``write_queue`` the groups on their way to the log, ``checkpoint`` the thread
    that writes to LMDB, ``state`` what these share. One process owns a store: it holds a flock on ``lock`` while the
    store is open. Pages of manifests are large and rare, and go to LMDB at once.

    The small copy that comes with a row lies in the log beside it. When it is durable here, and before its row can be
    read, the disk's fragment store gets it (``keep_copies``); the fragment store has it appended and synced before a
    checkpoint takes the row from the log (``sync_copies``). A start gives the copies of the log to the fragment store
    before the first checkpoint. So a row never exists without its copy.

    sub-database   key                               value
    rows           rowkey's node || segment          rowvalue's row, or ``heap``'s reference to it;
                                                     a link: check || node (u64 BE)
    heap           number                            rowvalue's row
    nodes          table || scope || shard           check || root node (u64 BE)
                   "next"                            check || the next free node (u64 BE)
    fences         scope                             check || flags (u8) || nonce
    pages          name of the page                  created ms (u64 BE) || the page
    meta           name                              check || value
                   NUL "identity"                    check || store id (16) || starts (u64 BE)
                   NUL "redo"                        check || ``identity.Mark``
                   NUL "heap"                        check || the next free number (u64 BE)
                   NUL "owner"                       check || cluster || NUL || disk

    A checkpoint that finds no room (on the disk, or in LMDB's map) is made again every second. Nothing is lost, since
    the log has it, and everything can be read; no writes are taken until there is room. ``disk_room`` keeps a sound
    disk from that.

    Any other write that fails ends the store's life as a writer: what the disk did with it is unknown, so the store
    stays read-only until it is opened again. For any failure other than lack of space, the owner (``on_failed``) and a
    file beside the store (``failed``) note it, both synced, and the store is never opened again: after a failed sync
    the kernel forgets which pages are dirty (Rebello et al., ATC'20). A disk whose promises are in doubt joins only as
    a new one.

    The *identity* is the store's random id with the number of times it was opened. The *position* is the number of the
    last durable group of its log. The owner keeps both elsewhere and passes them at the next start: a store that is
    missing, another one, or put back to an older state than was kept is refused.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from storaged.disk_health import DiskHealth
from storaged.errors import StoragedError
from storaged.ids import Entropy, system_entropy
from storaged.meta.storage.batch import PackedBatch, pack_batch
from storaged.meta.storage.checkpoint import Checkpointer
from storaged.meta.storage.identity import STORE_ID_BYTES, split_identity, verify_identity
from storaged.meta.storage.opening import UNKNOWN, Known, open_state
from storaged.meta.storage.reader import StoreReader
from storaged.meta.storage.room import look_for_room
from storaged.meta.storage.write_queue import WriteQueue
from storaged.meta.store_ports import Done, MetaStoreStatistics, StoreBatch
from storaged.units import GIB

MAP_BYTES_DEFAULT = 64 * GIB
"""Address space, not disk space: the file is as long as the most that was ever in use at once."""


class LmdbMetaStore(StoreReader):
    """``MetaStore`` on LMDB: the reads of ``StoreReader``, and the writes. Opening blocks for a few milliseconds. Use
    ``open_or_refuse`` for a disk that was in use before.
    """

    def __init__(
        self,
        directory: Path,
        *,
        map_bytes: int = MAP_BYTES_DEFAULT,
        entropy: Entropy = system_entropy,
        direct: bool = True,
        known: Known = UNKNOWN,
        health: DiskHealth | None = None,
    ) -> None:
        """Opens the store, or makes one where there is none. ``direct``: write the log without a thread where the
        system allows it. ``health``: of the disk; the other stores on it share it.

        Raises as ``open_state``.
        """
        state = open_state(
            Path(directory), map_bytes=map_bytes, entropy=entropy, direct=direct, known_before=known, health=health
        )
        super().__init__(state)
        self.hooks = state.hooks
        self._queue = WriteQueue(state)
        self._checkpointer = Checkpointer(state)

    @classmethod
    def open_or_refuse(
        cls,
        directory: Path,
        expected_identity: bytes | None,
        *,
        map_bytes: int = MAP_BYTES_DEFAULT,
        entropy: Entropy = system_entropy,
        known: Known = UNKNOWN,
        health: DiskHealth | None = None,
    ) -> LmdbMetaStore:
        """The store whose ``identity`` was this at its last start; None: of a disk that was never in use.

        Raises DiskForeign when it is missing or another one, DiskRolledBack when it is an older state of itself: of an
        earlier start, or without ``known.position``. It creates and changes nothing then. Raises as the constructor
        does, too.
        """
        if expected_identity is not None:
            verify_identity(Path(directory), expected_identity)
        return cls(directory, map_bytes=map_bytes, entropy=entropy, known=known, health=health)

    @property
    def store_id(self) -> bytes:
        """16 random bytes made with the store."""
        return self.identity[:STORE_ID_BYTES]

    @property
    def starts(self) -> int:
        """How often the store was opened, this time included."""
        return split_identity(self.identity)[1]

    @property
    def position(self) -> int:
        """The number of the last group of the redo log that is durable. It grows as long as the store lives."""
        return self._state.redo.sequence

    def look(self) -> None:
        """Finds out, too, what room rows have (``disk_room``)."""
        super().look()
        look_for_room(self._state)

    @property
    def refusal(self) -> str:
        """Why the store takes no writes, now or for ever; empty while it does."""
        return self._state.reason or self._state.starved

    def statistics(self) -> MetaStoreStatistics:
        with self._begin(self._rows) as transaction:
            rows = transaction.stat(self._rows)["entries"]
        information, page_bytes = self._environment.info(), self._environment.stat()["psize"]
        return MetaStoreStatistics(
            state="read-only" if self.refusal else "ok",
            reason=self.refusal,
            commits=self._queue.commits,
            checkpoints=self._checkpointer.count,
            operations=self._queue.operations,
            largest_group=self._queue.largest_group,
            queued_batches=self._queue.queued,
            rows=rows,
            bytes_used=(information["last_pgno"] + 1) * page_bytes,
            map_bytes=information["map_size"],
            damaged_rows=self.damaged_rows,
        )

    async def commit(self, batch: StoreBatch) -> None:
        """As the port says; an empty batch is a barrier. Raises ValueError for what can't be stored, before it stores
        anything.

        The batch of a cancelled caller stays in the queue and is written.
        """
        future = asyncio.get_running_loop().create_future()
        await self._queue.commit(self.pack(batch, partial(_settle, future)), future)

    async def delete_pages(self, pages: Sequence[tuple[bytes, int]]) -> int:
        future = asyncio.get_running_loop().create_future()
        packed = PackedBatch(partial(_settle, future), stale_pages=pages, operations=len(pages))
        await self._queue.commit(packed, future)
        return packed.deleted

    def pack(self, batch: StoreBatch, on_done: Done) -> PackedBatch:
        """A batch as ``post_packed`` takes it. Raises as ``post``."""
        self._state.refuse_when_unusable()
        return pack_batch(batch, on_done)

    def post(self, batch: StoreBatch, on_done: Done) -> None:
        """As the port says. It does not wait for room: it raises SlowDown when ``QUEUED_BATCHES_MAX`` wait."""
        self._queue.post(self.pack(batch, on_done))

    def post_packed(self, batch: PackedBatch) -> None:
        """As ``post``."""
        self._queue.post(batch)

    def restorable(self) -> Sequence[tuple[bytes, bytes]]:
        """Encoded fragment headers and payloads of the copies that the start found in the log. The disk's fragment
        store may not have them: there is no checkpoint before ``copies_restored``.
        """
        return self._state.restorable

    def copies_restored(self) -> None:
        with self._state.changed:
            self._state.restorable = []
            self._state.changed.notify_all()

    async def checkpoint(self) -> None:
        """When it returns, LMDB has everything acknowledged before, unless the disk has failed."""
        if not self._state.closing:
            await self.start(self._checkpointer.make)

    async def close(self) -> None:
        """Writes what is queued first. Safe to call twice."""
        if self._state.closing:
            return
        self._state.closing = True
        await self._queue.drain()
        self._state.redo.detach()
        self._queue.stop()
        await self._threads.run(self._close)

    def _close(self) -> None:
        state = self._state
        self._queue.join()
        self._checkpointer.close()
        # A later caller finds the store closed, and not a descriptor that belongs to something else by then.
        with self._checkpointer.running, state.lmdb_lock, state.changed:
            state.closed = True
            state.changed.notify_all()
            self._readahead.close()
            self._residency.close()
            self._threads.shutdown(wait=False)
            state.environment.close()
            state.redo.close()
        os.close(state.lock_file)


def _settle(future: asyncio.Future[None], error: StoragedError | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)
