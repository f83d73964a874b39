"""A disk with the program's own metadata store: LMDB, redo log, overlay and heap, on files that fail.

Time is virtual, and what the program does in threads runs in lockstep (``lockstep``). The files are real and small, in
memory where the machine has a file system for that.

What the disk does to the program:

* A crash drops what was not synced. Of the group that is on its way to the redo log none, all or some sectors are on
  disk, in any order. Of a checkpoint that is being committed some pages are, but not the page that makes it count.
* A write fails (EIO, after some of its sectors), finds no room (ENOSPC), or is cut short. The store then takes no more
  writes, and after anything other than lack of space it is never opened again.
* The log is small, so that it goes round and waits for checkpoints, and a group may be written by a thread.

Small copies lie in the redo log first, as in the program; every other one counts as large, and is synced in the
fragment store before its record goes to the log. Here a table stands for the fragment store.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storaged.aio import OnDone
from storaged.errors import DiskForeign, DiskUnusable, StoragedError
from storaged.meta.names import RegisterName
from storaged.meta.storage import redo as redo_module
from storaged.meta.storage import write_queue as write_queue_module
from storaged.meta.storage.checkpoint import Applier, Checkpointer
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.opening import open_state
from storaged.meta.storage.reader import SLICE_ROWS_MAX, StoreReader
from storaged.meta.storage.rowvalue import MASK, check_number, intact
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.storage.state import StoreState
from storaged.meta.storage.write_queue import OnWritten, WriteQueue
from storaged.meta.store_ports import Kept, RowRange, StoreBatch
from storaged.wire import Buffer
from tests.doubles.meta_store import MemoryMetaStore
from tests.sim.lockstep import LockstepLock, LockstepThread, LockstepThreads
from tests.sim.payloads import PayloadDisk

if TYPE_CHECKING:
    from tests.sim.cluster import StorageNode, World

TORN_BYTES = 64
"""What is written whole: less than a sector, since nothing relies on sectors."""
PAGE_BYTES = 4096
HALF_PAGES = (4, 8, 40)
"""Sizes of the log's halves. The smallest waits for checkpoints all the time."""
MAP_BYTES = 1 << 26

IN_MEMORY = Path("/dev/shm")
"""Where there is one."""


def directory_for_files() -> tempfile.TemporaryDirectory[str]:
    """Of one run."""
    return tempfile.TemporaryDirectory(
        prefix="storaged-sim-", dir=IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None, ignore_cleanup_errors=True
    )


class _Faults:
    """What the next writes of one disk meet. ``write``: errno of the next log write; -1: it is cut short.
    ``checkpoint``: errno of the next checkpoint.
    """

    def __init__(self, on_failure: Callable[[int], None]) -> None:
        self.write = self.checkpoint = 0
        self.on_failure = on_failure


class _Environment:
    """LMDB's environment; a write transaction has a sync point before it is committed, and one after it."""

    def __init__(self, real: Any, threads: LockstepThreads, faults: _Faults) -> None:
        self._real = real
        self._threads = threads
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def begin(self, *given: Any, write: bool = False, **options: Any) -> Any:
        if not write or self._threads.running is None:
            return self._real.begin(*given, write=write, **options)
        return self._writing(*given, **options)

    @contextmanager
    def _writing(self, *given: Any, **options: Any) -> Iterator[Any]:
        with self._real.begin(*given, write=True, **options) as transaction:
            yield transaction
            self._threads.stop_at("commit")
            if self._faults.checkpoint:
                code, self._faults.checkpoint = self._faults.checkpoint, 0
                self._faults.on_failure(code)
                raise OSError(code, os.strerror(code))
        self._threads.stop_at("committed")


class _VirtualWriter:
    """In place of the writer thread: jobs one after the other, in lockstep."""

    def __init__(self, disk: FileDisk, fail: Callable[[Exception], None], call_on_loop: Callable[..., None]) -> None:
        self._disk = disk
        self._fail = fail
        self._call_on_loop = call_on_loop
        self._jobs: list[tuple[Callable[[], None], OnWritten]] = []
        self._busy = False

    def call(self, work: Callable[[], None], on_written: OnWritten) -> None:
        self._jobs.append((work, on_written))
        if not self._busy:
            self._busy = True
            self._disk.spawn(self._run())

    async def _run(self) -> None:
        while self._jobs:
            work, on_written = self._jobs.pop(0)
            await self._disk.world_sync()
            failure: Exception | None = None
            try:
                await self._disk.in_lockstep(work)
            except Exception as error:
                self._fail(error)
                failure = error
            self._call_on_loop(on_written, failure)
        self._busy = False


class _VirtualCheckpointer(Checkpointer):
    """The program's checkpoints; when they are made, virtual time decides."""

    def __init__(self, state: StoreState, disk: FileDisk) -> None:  # without the thread of the real one
        self.count = 0
        self.running = threading.Lock()
        self.applier = Applier(state.databases)
        self._state = state
        self._stopping = False
        disk.spawn(self._often(disk))

    async def _often(self, disk: FileDisk) -> None:
        state, chance = self._state, disk.world.random
        while not state.reason:
            await asyncio.sleep(0.002 if state.log_full else chance.choice((0.01, 0.05, 0.3)) * chance.random())
            await disk.unless_hung()
            if (state.fresh_bytes or state.log_full) and not state.restorable:
                await disk.in_lockstep(self.make)


class FileStore(LmdbMetaStore):
    """The program's store on virtual time."""

    def __init__(self, disk: FileDisk) -> None:
        with set_aside(redo_module, "HALF_BYTES", disk.half_pages * PAGE_BYTES):
            state = open_state(disk.directory, map_bytes=MAP_BYTES, entropy=disk.world.random.randbytes, direct=False)
        state.lmdb_lock = LockstepLock(disk.threads)  # type: ignore[assignment]
        self.real_environment = state.environment
        state.environment = _Environment(state.environment, disk.threads, disk.faults)
        StoreReader.__init__(self, state)
        self.hooks = state.hooks
        self._disk = disk
        state.redo.try_write = self._try_write  # type: ignore[method-assign]
        virtual = lambda _name, state, call_on_loop: _VirtualWriter(disk, state.fail, call_on_loop)  # noqa: E731
        with set_aside(write_queue_module, "_WriterThread", virtual):
            self._queue = WriteQueue(state)
        self._checkpointer = _VirtualCheckpointer(state, disk)

    def _try_write(self, loop: asyncio.AbstractEventLoop, body: Buffer, on_done: OnDone) -> bool:
        if self._disk.world.random.random() < 0.1:
            return False
        at, pieces = self._state.redo._layout(body)
        self._disk.spawn(self._disk.write_log(self._state.redo._fd, b"".join(map(bytes, pieces)), at, on_done))
        return True

    def damage(self, name: RegisterName) -> bool:
        """Flips one bit of a row that is in LMDB; False when it is not there, or LMDB is being written."""
        state = self._state
        if state.lmdb_lock.held:  # type: ignore[attr-defined]
            return False
        with self.real_environment.begin(write=True) as transaction:
            for database in (self._heap, self._rows):
                with transaction.cursor(database) as cursor:
                    for key, row in cursor:
                        if intact(name.prefix, name.key, row):
                            transaction.put(key, row[:-1] + bytes([row[-1] ^ 1]), db=database)
                            return True
        return False

    def end(self) -> None:
        """Gives up its files without a further write, as a process that dies does. What waits for them ends."""
        state, queue = self._state, self._queue
        left = [*queue._logging, *queue._paging, *queue._arriving_pages, *queue._arriving]
        state.closed = state.closing = True
        self.real_environment.close()
        state.redo.close()
        os.close(state.lock_file)
        for batch in left:
            batch.on_done(DiskUnusable("the process died"))


class LoggedCopies(PlainCopies):
    """Small copies in the group of the record that names them, or before it, as ``node.disks`` has it. ``synced`` has
    what survives a crash now, by data id.
    """

    def __init__(self, disk: FileDisk) -> None:
        life = disk.life

        async def store(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
            content = b"".join(bytes(piece) for piece in body)
            await disk.world_sync()
            if disk.life != life:
                raise DiskUnusable("the process died")
            disk.keep_apart(header, content)

        super().__init__(disk.store, store, disk.payloads.load, holds=disk.payloads.holds)
        self._disk = disk
        disk.store.hooks.keep_copies = disk.keep_copies
        disk.store.hooks.sync_copies = disk.sync_copies

    def keep(
        self,
        header: bytes,
        body: Sequence[Buffer],
        batch: StoreBatch,
        on_done: Kept,
        *,
        settling: bool = False,
        check: bytes = b"",
    ) -> None:
        disk = self._disk
        try:
            record = disk.store.pack(batch, partial(on_done, None))
        except StoragedError as error:
            on_done(None, error)
            return
        if disk.world.random.random() < disk.world.weather.full:
            on_done(DiskUnusable("the disk is full"), None)
            return
        if header[-1] & 1 and not settling:
            super().keep(header, body, batch, on_done)
            return
        content = b"".join(bytes(piece) for piece in body)
        record.copy, record.copy_write = (header, [content]), (header, content)
        record.size += len(header) + len(content)
        disk.store.post_packed(record)


class FileDisk:
    """As ``MemoryDisk`` of ``cluster``."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.life = 0
        self.half_pages = world.random.choice(HALF_PAGES)
        self.hung: asyncio.Event | None = None
        self.threads = LockstepThreads()
        self.faults = _Faults(self._on_failure)
        self.failed = False
        """A write failed for another reason than lack of space."""
        self.payloads = PayloadDisk()
        self._in_fragments: dict[bytes, bytes] = {}
        self._appended: dict[bytes, bytes] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._writing: list[tuple[int, bytes, int]] = []
        """The group on its way: descriptor, bytes, offset."""
        world.directories += 1
        self.directory = Path(world.files()) / f"{name}-{world.directories}"
        self.refused: DiskForeign | None = None
        self.store: Any = None
        self._open()

    # --- one life of the process ------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self.store = FileStore(self)
        except DiskForeign as error:
            if not self.failed:
                self.world.loop.troubles.append(f"a disk that has not failed is refused: {error}")
            self.refused, self.store = error, MemoryMetaStore(entropy=self.world.random.randbytes)
            return
        self._verify_sums()
        for header, payload in self.store.restorable():
            self._in_fragments[header] = bytes(payload)
        self.store.copies_restored()
        self.payloads.synced = dict(self._in_fragments)

    def _verify_sums(self) -> None:
        """The sum of each shard is that of the rows that this start has found."""
        for scope in self.store.scopes():
            prefix = RegisterName(*scope, b"").prefix
            rows = self.store.slice(RowRange(*scope, after=b"", prefix=b"", limit=SLICE_ROWS_MAX))
            if self.store.shard_sum(prefix) != sum(check_number(row) for _, row in rows) & MASK:
                self.world.loop.troubles.append(f"the sum of {len(rows)} rows is another one")

    def copies(self, _life: int, _node: StorageNode) -> PlainCopies:
        """Raises DiskForeign when the store was refused as the process opened it."""
        if self.refused is not None:
            raise self.refused
        return LoggedCopies(self)

    def spawn(self, work: Any) -> None:
        task = self.world.loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def unless_hung(self) -> None:
        while self.hung is not None:
            await self.hung.wait()

    async def world_sync(self) -> None:
        await self.unless_hung()
        await self.world.sync()
        await self.unless_hung()

    async def in_lockstep(self, work: Callable[[], None]) -> None:
        thread = self.threads.start(work)
        while not self.threads.resume(thread):
            await self.world_sync()

    async def write_log(self, fd: int, content: bytes, at: int, on_done: OnDone) -> None:
        writing = fd, content, at
        self._writing.append(writing)
        await self.world_sync()
        self._writing.remove(writing)
        code, self.faults.write = self.faults.write, 0
        self._on_failure(code)
        if not code:
            os.pwrite(fd, content, at)
            on_done(None)
        elif code < 0:
            os.pwrite(fd, content[: self.world.random.randrange(len(content))], at)
            on_done(OSError(errno.EIO, "a write was cut short"))
        else:
            if code == errno.EIO:
                self._tear(fd, content, at)
            on_done(OSError(code, os.strerror(code)))

    @property
    def refusal(self) -> str:
        """Why the store takes no writes."""
        return self.store.refusal

    def _on_failure(self, code: int) -> None:
        self.failed = self.failed or code not in (0, errno.ENOSPC)

    def keep_copies(self, copies: Sequence[tuple[bytes, bytes]]) -> None:
        self._appended.update(copies)
        for header, payload in copies:
            self.payloads.stored(header, payload)

    def keep_apart(self, header: bytes, payload: bytes) -> None:
        """It is synced."""
        self._in_fragments[header] = payload
        self.payloads.stored(header, payload)

    def sync_copies(self) -> None:
        appended = dict(self._appended)
        self.threads.stop_at("copies")
        self._in_fragments.update(appended)

    def give_copy(self, data_id: bytes, content: bytes) -> None:
        """Durably, as a copier would."""
        self._in_fragments.setdefault(data_id, content)
        self.payloads.synced.setdefault(data_id, content)

    # --- its end ----------------------------------------------------------------------------------------------------

    def _tear(self, fd: int, content: bytes, at: int) -> None:
        """Some sectors are on disk."""
        chance = self.world.random
        kept = chance.choice((0.0, 0.0, 1.0, 0.5, 0.9))
        for offset in range(0, len(content), TORN_BYTES):
            if chance.random() < kept:
                os.pwrite(fd, content[offset : offset + TORN_BYTES], at + offset)

    def crash(self) -> None:
        """What was not synced is lost. The store is opened again at once, for the next life; until then it only
        answers those who judge.
        """
        self.life += 1
        for task in tuple(self._tasks):
            task.cancel()
        for writing in self._writing:
            self._tear(*writing)
        self._writing.clear()
        if self.refused is None:
            torn = self._torn_checkpoint() if self.world.random.random() < 0.5 else None
            self.threads.crash()
            self.store.end()
            if torn is not None:
                (self.directory / "data.mdb").write_bytes(torn)
            self._appended.clear()
            self.faults.write = self.faults.checkpoint = 0
            self._open()

    def _torn_checkpoint(self) -> bytes | None:
        """LMDB's file when the power goes during a commit: some of its pages were written, the two that make a commit
        count were not. None: none is under way.
        """
        committing = next((thread for thread in self.threads.alive if thread.at == "commit"), None)
        if committing is None or self.faults.checkpoint:
            return None
        file = self.directory / "data.mdb"
        before = file.read_bytes()
        self._until(committing, "committed")
        after = file.read_bytes()
        pages = [before[at : at + PAGE_BYTES] for at in range(0, len(before), PAGE_BYTES)]
        for number in range(2, len(after) // PAGE_BYTES):
            if self.world.random.random() < 0.5:
                written = after[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
                while len(pages) <= number:
                    pages.append(bytes(PAGE_BYTES))
                pages[number] = written
        return b"".join(pages)

    def _until(self, thread: LockstepThread, point: str) -> None:
        while thread.at != point and not self.threads.resume(thread):
            pass

    def close(self) -> None:
        """At the end of a run."""
        self.threads.crash()
        if self.refused is None:
            self.store.end()


@contextmanager
def set_aside(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
