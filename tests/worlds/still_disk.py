"""One disk with the program's own stores, and without a thread or a clock: every step is a call of the test.

The redo log, LMDB under it, the segments and the index are what a node opens (``node.opener``), and so are the queue of
batches, the checkpoints and the small copies on their way from the log to the segments. What the program does in
threads happens here when the test asks for it: ``loop.run``, ``freeze`` and ``write_frozen`` of the metadata store,
``append_copies``, and the steps of ``FragmentHistory``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from storaged.disk_health import DiskHealth
from storaged.fragments.deferred import DeferredCopies
from storaged.fragments.engine import Engine
from storaged.fragments.files import PosixFiles
from storaged.fragments.index import Index
from storaged.fragments.ports import FragmentHeader
from storaged.fragments.recovery import Report
from storaged.fragments.store import LocalFragmentStore
from storaged.fragments.write import Write
from storaged.meta.storage import redo as redo_module
from storaged.meta.storage import write_queue as write_queue_module
from storaged.meta.storage.checkpoint import Applier, Checkpointer
from storaged.meta.storage.identity import verify_identity
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.opening import Known, open_state
from storaged.meta.storage.reader import StoreReader
from storaged.meta.storage.state import StoreState
from storaged.meta.storage.write_queue import OnWritten, WriteQueue
from storaged.meta.store_ports import StoreFull
from storaged.node.disks import DiskCopies
from storaged.wire import decode
from tests.sim.file_disk import set_aside
from tests.worlds.fragment_history import SMALL
from tests.worlds.fragments import DISK

MAP_BYTES = 1 << 24


class StillLoop:
    """In place of an event loop: ``run`` makes the calls that wait, in order. Its time does not move."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self.mistakes: list[dict[str, Any]] = []

    def time(self) -> float:
        return 0.0

    def call_soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        self._waiting.append(lambda: callback(*arguments))

    call_soon_threadsafe = call_soon

    def call_later(self, _delay_s: float, callback: Callable[..., object], *arguments: Any) -> asyncio.TimerHandle:
        """The test decides when that is (``StillDisk.append_copies``)."""
        return cast(asyncio.TimerHandle, _Timer())

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.mistakes.append(context)

    def run(self) -> None:
        with self.running():
            while self._waiting:
                self._waiting.popleft()()

    @contextmanager
    def running(self) -> Iterator[None]:
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(cast(asyncio.AbstractEventLoop, self))
        try:
            yield
        finally:
            asyncio._set_running_loop(before)


class _Timer:
    def cancel(self) -> None:
        """It never comes by itself."""


class _Writer:
    """In place of the writer thread: a job is done when it comes."""

    def __init__(self, _name: str, state: StoreState, call_on_loop: Callable[..., None]) -> None:
        self._state = state
        self._call_on_loop = call_on_loop

    def call(self, work: Callable[[], None], on_written: OnWritten) -> None:
        failure: Exception | None = None
        try:
            work()
        except StoreFull as error:
            failure = error
        except Exception as error:
            self._state.fail(error)
            failure = error
        self._call_on_loop(on_written, failure)

    def stop(self) -> None:
        """There is no thread."""

    join = stop


class _StillCheckpointer(Checkpointer):
    """The program's checkpoints, made in two steps: ``freeze`` and ``write_frozen``."""

    def __init__(self, state: StoreState) -> None:  # without the thread of the real one
        self.count = 0
        self.running = threading.Lock()
        self.applier = Applier(state.databases)
        self._state = state
        self._sequence = self._taken = 0
        self._retry_at_s = 0.0
        self._stopping = False
        self.frozen = False

    def freeze(self) -> None:
        self.frozen = self.frozen or self._freeze()

    def write_frozen(self, *, last: bool = False) -> None:
        if self.frozen:
            self._write_frozen(last=last)
            self.frozen = bool(self._state.starved)

    def close(self) -> None:
        self.write_frozen()
        self.make(last=True)


class StillMeta(LmdbMetaStore):
    """The program's metadata store; the log is written without the kernel's asynchronous calls."""

    def __init__(self, directory: Path, *, loop: StillLoop, half_pages: int, known: Known, entropy: Any) -> None:
        with set_aside(redo_module, "HALF_BYTES", half_pages * redo_module.PAGE_BYTES):
            state = open_state(directory, map_bytes=MAP_BYTES, entropy=entropy, direct=False, known_before=known)
        StoreReader.__init__(self, state)
        self.hooks = state.hooks
        with set_aside(write_queue_module, "_WriterThread", _Writer):
            self._queue = WriteQueue(state)
        self.checkpoints = self._checkpointer = _StillCheckpointer(state)
        self.loop = loop

    @property
    def log_full(self) -> bool:
        return self._state.log_full

    def queued(self) -> int:
        return self._queue.queued

    def shut(self) -> None:
        """As ``close``. The queue is empty."""
        self._state.closing = True
        self._state.redo.detach()
        self._close()

    def end(self) -> None:
        """As a process that dies: nothing more is written."""
        state = self._state
        state.closed = state.closing = True
        self._readahead.close()
        self._residency.close()
        state.environment.close()
        state.redo.close()
        os.close(state.lock_file)


class StillFragments:
    """What a metadata store needs of ``LocalFragmentStore``, over an engine without its thread."""

    def __init__(self, engine: Engine, loop: StillLoop) -> None:
        self._engine = engine
        lock = threading.Lock()
        self._lock = lock
        self.deferred = DeferredCopies(
            engine, lock, cast(asyncio.AbstractEventLoop, loop), lambda: None, engine.state.health
        )
        self.admit, self.withdraw = self.deferred.admit, self.deferred.withdraw

    def keep(self, writes: Sequence[Write]) -> None:
        self.deferred.keep(writes)

    def append(self) -> None:
        """As the writer thread does."""
        with self._lock:
            finished = self.deferred.append()
        self.deferred.on_appended(finished)

    def sync_apart(self) -> None:
        """As ``LocalFragmentStore.sync_apart``."""
        if self.deferred.pending:
            self.append()
            if (error := self.deferred.unfinished(ended=False)) is not None:
                raise error
        self._engine.log.sync_apart()

    def restore(self, copies: Sequence[tuple[FragmentHeader, bytes]]) -> None:
        """As ``LocalFragmentStore.restore``."""
        LocalFragmentStore._restore(cast(LocalFragmentStore, self), copies)
        if not self._engine.state.failure:
            self._engine.log.sync()


class StillDisk:
    """One life of a disk's stores."""

    def __init__(self, directory: Path, *, half_pages: int, known: Known, expected: bytes | None, entropy: Any) -> None:
        """``expected``, ``known``: as the owner's ledger has them. Raises as the stores do when they are opened, and
        as ``restore_copies``.
        """
        self.loop = StillLoop()
        self.damage: list[tuple[bytes, int]] = []
        self._opened: list[Callable[[], object]] = []
        try:
            meta_directory = directory / "meta"
            if expected is not None:
                verify_identity(meta_directory, expected)
            self.meta = StillMeta(meta_directory, loop=self.loop, half_pages=half_pages, known=known, entropy=entropy)
            self._opened.append(self.meta.end)
            self.engine, self.report = self._open_fragments(directory / "fragments")
            self.fragments = StillFragments(self.engine, self.loop)
            copies = [(decode(header, FragmentHeader), payload) for header, payload in self.meta.restorable()]
            if copies:
                self.fragments.restore(copies)
            self.restored = len(copies)
            self.meta.copies_restored()
            self.copies = DiskCopies(self.meta, cast(LocalFragmentStore, self.fragments))
        except BaseException:
            self.end()
            raise

    def _open_fragments(self, directory: Path) -> tuple[Engine, Report]:
        files = PosixFiles(directory)
        self._opened.append(files.close)
        index = Index(directory / "index", DISK, map_bytes_max=MAP_BYTES)
        self._opened.append(index.close)
        engine = Engine(
            files, index, SMALL, now_ms=lambda: 0, on_damage=lambda key, cell: self.damage.append((key, cell))
        )
        engine.state.health = self.meta.health
        report = engine.recover()
        return engine, report

    @property
    def health(self) -> DiskHealth:
        return self.meta.health

    def run(self) -> None:
        self.loop.run()
        assert not self.loop.mistakes, self.loop.mistakes

    def shut(self) -> None:
        """Ends as a node does: the queue is written, and both stores make their last checkpoint."""
        self.run()
        self.fragments.append()
        self.engine.close()
        self.meta.shut()
        self._opened.clear()

    def end(self) -> None:
        """As a process that dies."""
        for close in reversed(self._opened):
            with contextlib.suppress(OSError):  # the power went while it was being closed
                close()
        self._opened.clear()
