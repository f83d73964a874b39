"""Small copies that another log keeps durable: they are found at once, and appended to the segments later.

Theory of operation. A small object's copy comes here (``keep``) when the disk's metadata store has it in its redo log,
beside the record that names it. So no caller waits for the segments. Copies are appended together, within a tenth of a
second: each group costs the writer thread, and the loop whose interpreter it takes, as much as many copies do. Before a
copy leaves the redo log, ``LocalFragmentStore.sync_apart`` has appended and synced it.

A copy is in the queue, then among the unplaced, until the index has it. It is appended on the event loop when that
waits for no disk, else in the writer thread. Both hold the engine lock while they do so.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from storaged.disk_health import OK, DiskHealth
from storaged.disk_health import SLOW_S as UNANSWERED_S
from storaged.durable import NoRoom, RestartNeeded
from storaged.errors import DiskUnusable, StoragedError
from storaged.fragments.engine import Engine
from storaged.fragments.index import WHOLE_COPY
from storaged.fragments.write import Write
from storaged.units import KIB

DEFER_S = 0.1
DEFER_WRITES_MAX = 32
DEFER_BYTES_MAX = 512 * KIB
"""Copies are appended after ``DEFER_S``, or as soon as there are so many of them or so many bytes."""

SLOW_S = 0.02
SLOW_FOR_S = 10.0
"""When the loop took ``SLOW_S`` to append copies to the page cache, the thread does it for ``SLOW_FOR_S``."""

SPACE_LOOK_S = 0.1
SPACE_LOOK_PART = 64
"""The file system is asked for its free space every ``SPACE_LOOK_S``, and when copies have taken a 64th of it since."""


class DeferredCopies:
    """Used on the event loop, but for ``append``, ``pending``, ``queued`` and ``unfinished``."""

    def __init__(
        self,
        engine: Engine,
        engine_lock: threading.Lock,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
        health: DiskHealth,
    ) -> None:
        self._engine = engine
        self._engine_lock = engine_lock
        self._loop = loop
        self._wake = wake
        self._health = health
        self._by_key: dict[bytes, Write] = {}
        """What was kept, until the index has it."""
        self.copies: dict[bytes, Write] = {}
        """The whole copies (block 0, k = 1) among them, by data id."""
        self._queue: deque[Write] = deque()
        """What was kept, until an append begins."""
        self._unplaced: list[Write] = []
        """What is being appended, and what could not be. Guarded by the engine lock."""
        self.appended = 0
        """Copies appended since the start. Guarded by the engine lock."""
        self._bytes_since_append = 0
        self._timer: asyncio.TimerHandle | None = None
        self._slow_until_s = 0.0
        self._space_due_s = 0.0
        self._space_bytes = 0
        """What may still be admitted before the free space is looked at again."""
        self._coming_bytes = 0
        """Of copies that were admitted, and are being made durable elsewhere."""
        self._stopped = False

    # --- admitting and keeping --------------------------------------------------------------------------------------

    def admit(self, write: Write, *, into_reserve: bool = False) -> StoragedError | None:
        """The error when the copy may not be kept. None: its space is reserved; ``keep`` or ``withdraw`` follows.
        ``into_reserve``: as in ``DiskState.refusal``.
        """
        if self._stopped:
            return DiskUnusable("the fragment store is closed", state="failed")
        if (mismatch := write.mismatch()) is not None:
            return mismatch
        state = self._engine.state
        if state.failure or self._space_bytes < write.payload_bytes or self._loop.time() >= self._space_due_s:
            self._space_bytes = 0
            coming = self._coming_bytes + sum([kept.payload_bytes for kept in self._by_key.values()])
            refusal = state.refusal(write.payload_bytes + coming, into_reserve=into_reserve, on_loop=True)
            if refusal is not None:
                return refusal
            self._space_bytes = max(write.payload_bytes, state.spare_bytes // SPACE_LOOK_PART)
            self._space_due_s = self._loop.time() + SPACE_LOOK_S
        self._space_bytes -= write.payload_bytes
        self._coming_bytes += write.payload_bytes
        return None

    def withdraw(self, write: Write) -> None:
        """Gives back the space of an admitted copy that will not be kept."""
        self._coming_bytes -= write.payload_bytes

    def keep(self, writes: Sequence[Write]) -> None:
        """Takes on admitted copies, which are durable elsewhere until ``sync_apart`` returns. They are found from now
        on.
        """
        for write in writes:
            key = write.key
            self._by_key[key] = write
            if key[16:21] == WHOLE_COPY:
                self.copies[key[:16]] = write
            self._bytes_since_append += write.payload_bytes
            self._coming_bytes -= write.payload_bytes
        self._queue.extend(writes)
        if len(self._queue) >= DEFER_WRITES_MAX or self._bytes_since_append >= DEFER_BYTES_MAX:
            if not self._try_append():
                self.append_in_thread()
        elif self._timer is None:
            self._timer = self._loop.call_later(DEFER_S, self.append_in_thread)

    def append_in_thread(self) -> None:
        """Wakes the writer thread, which appends what is queued."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._bytes_since_append = 0
        self._wake()

    def stop(self) -> None:
        """Admits nothing more. What is kept is appended by the thread that closes the store."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    # --- finding ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_key

    def holds_any(self, keys: Iterable[bytes]) -> bool:
        return bool(self._by_key) and any(key in self._by_key for key in keys)

    @property
    def empty(self) -> bool:
        return not self._by_key

    # --- appending --------------------------------------------------------------------------------------------------

    def _try_append(self) -> bool:
        """Appends on the event loop, into the page cache of a disk that has just made a write durable. False when the
        thread must do it: it holds the lock, or the disk may have to be waited for.

        The thread would take as long, and the interpreter from the loop many times. When a write to the page cache was
        slow, because the kernel has too much to write already, the thread does it for a while.
        """
        now = self._loop.time()
        if self._stopped or now < self._slow_until_s or self._health.state != OK or not self._engine.index.in_memory:
            return False
        if self._health.oldest_s() >= UNANSWERED_S or not self._engine_lock.acquire(blocking=False):
            return False
        try:
            if self._unplaced or not self._engine.can_append_now(self._queue):
                return False
            self.on_appended(self.append())
        finally:
            self._engine_lock.release()
        self._bytes_since_append = 0
        if self._loop.time() - now > SLOW_S:
            self._slow_until_s = now + SLOW_FOR_S
        if self._engine.log.write_back_due:
            self._wake()  # the thread writes back, and begins a checkpoint of the index when one is due
        return True

    @property
    def pending(self) -> bool:
        """Whether a copy is not in the index yet, or could not be appended. From any thread."""
        return bool(self._queue or self._unplaced)

    @property
    def queued(self) -> bool:
        """Whether ``append`` would have a new copy to append. From any thread."""
        return bool(self._queue)

    def append(self) -> list[Write]:
        """Appends what was kept. Returns the copies that are finished: the index has them, or the disk failed and they
        count as lost there. The caller holds the engine lock; ``on_appended`` follows on the loop.

        They were acknowledged, so they may take the space that is held back for deletions.
        """
        engine, writes = self._engine, self._unplaced
        while self._queue:  # in this order: a copy is always in one of the two
            writes.append(self._queue[0])
            self._queue.popleft()
        left = writes
        if not engine.state.failure:
            try:
                errors = engine.append(writes, into_reserve=True, checked=True)
            except Exception as error:
                engine.state.fail(f"{type(error).__name__}: {error}", lasting=False)
            else:
                self.appended += len(writes)
                left = [write for write, error in zip(writes, errors, strict=True) if error is not None]
        self._unplaced = [] if engine.state.lost else left
        unplaced = set(map(id, self._unplaced))
        return [write for write in writes if id(write) not in unplaced]

    def on_appended(self, writes: Sequence[Write]) -> None:
        """These are finished: a later copy of the same fragment may have taken their place here."""
        for write in writes:
            if self._by_key.get(write.key) is write:
                del self._by_key[write.key]
            if self.copies.get(write.key[:16]) is write:
                del self.copies[write.key[:16]]

    def unfinished(self, *, ended: bool) -> RestartNeeded | None:
        """The error for a caller that waits until all is appended, when some can't be before a restart, or before
        there is room (NoRoom). From any thread. ``ended``: nothing is appended any more.
        """
        left = len(self._unplaced) + (len(self._queue) if ended else 0)
        if not left or self._engine.state.lost:
            return None
        reason = self._engine.state.failure
        error = RestartNeeded if reason or ended else NoRoom
        return error(f"{left} copies that were acknowledged are in no segment yet: {reason or 'there is no room'}")
