"""The local disk as a fragment store: one writer thread that commits in groups, a few threads that read.

Every write, delete and sync that arrives while the disk is busy goes into the next group: one vectored write, one
fdatasync if anyone asked to
be durable, one wake-up of the event loop. A lone request waits for nobody. Reads of what is in the page cache are
answered on the
event loop (preadv2 with RWF_NOWAIT never blocks); the rest goes to the reading threads.

A small object's copy is durable elsewhere when it comes (``keep``): the disk's metadata store has it in its own log,
beside the record that names it. So nobody waits for it here. It is
found from then on, and appended with others within a tenth of a second (*later* copies): each group costs the thread,
and the loop whose interpreter it takes, as much as many copies do. Before a copy leaves that
log, ``sync_apart`` has appended and synced it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import lmdb

from storaged.clock import Clock, SystemClock
from storaged.durable import Unfinished
from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, PeerRefused, StoragedError
from storaged.fragments.compact import Compactor
from storaged.fragments.engine import Engine, StoreLimits, Write, check_time
from storaged.fragments.entry import Entry
from storaged.fragments.files import Files, PosixFiles
from storaged.fragments.index import WHOLE_COPY, Checkpoint, Index, Position
from storaged.fragments.ports import (
    CELLS_MAX,
    RETIREMENTS_MAX,
    CellRead,
    FragmentHeader,
    FragmentId,
    FragmentStat,
    Health,
    Retirement,
    Usage,
)
from storaged.fragments.recovery import Report
from storaged.units import GIB, KIB, MIB
from storaged.wire import Buffer

T = TypeVar("T")

BATCH_IDS_MAX = 10_000
INLINE_IDS_MAX = 256
"""So many look-ups (2 us each) are made on the event loop."""

INLINE_READ_BYTES_MAX = MIB
"""So much is copied from the page cache and verified on the event loop: a fragment of a block of 3 MiB takes 0.1 ms,
and half of that again to send. A thread
costs more: it takes the interpreter from the loop a dozen times."""

OVERLAYS_MAX = 4
"""When the overlay has grown to so many times its size while a checkpoint is being written, writes wait for it."""

OnDamage = Callable[[FragmentId, int], None]


class InThread(Protocol):
    """Runs what blocks outside of the event loop: ``asyncio.to_thread``, or what its caller has instead."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


LATER_S = 0.1
LATER_WRITES_MAX = 32
LATER_BYTES_MAX = 512 * KIB
"""Copies that are durable elsewhere are appended so late, or when so many have come."""

SLOW_S = 0.02
SLOW_FOR_S = 10.0
"""When the loop has taken so long to append copies to the page cache, the thread does it for so long."""

SPACE_LOOK_S = 0.1
SPACE_LOOK_PART = 64
"""How much is free is asked so often, and whenever copies have taken such a part of it."""


@dataclass(frozen=True)
class FragmentStatistics:
    """Since the start, but for ``usage``. ``groups`` were served, ``writes`` and ``syncs`` among them; ``cut_bytes``
    and ``gaps`` are of the recovery.
    """

    usage: Usage
    segments: int
    groups: int
    writes: int
    syncs: int
    appended_bytes: int
    compacted_bytes: int
    punched_bytes: int
    checkpoints: int
    overlay_entries: int
    queued_bytes: int
    damaged_fragments: int
    torn_bytes: int
    gaps: int


@dataclass(slots=True)
class _Job:
    """``write`` is appended, or ``call`` is made by the writer thread; ``sync``: its answer waits until the log is
    durable.

    ``token`` is popped once: by the writer thread when it begins, or by the caller when it gives up before that.
    """

    future: asyncio.Future[Any]
    write: Write | None = None
    call: Callable[[], Any] | None = None
    sync: bool = False
    token: list[None] = field(default_factory=lambda: [None])
    served: asyncio.Future[None] | None = None
    """Done when the writer has finished with a job whose caller gave up while it was at it."""
    over: bool = False
    """The writer has finished with it, and the loop knows."""

    def claim(self) -> bool:
        try:
            self.token.pop()
        except IndexError:
            return False
        return True


@dataclass(frozen=True)
class _Committed:
    checkpoint: Checkpoint
    error: BaseException | None


class _Stop:
    pass


class _Appended:
    """Somebody waits until what was kept before is appended."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: Unfinished | None = None

    def tell(self, error: Unfinished | None) -> None:
        self.error = error
        self.event.set()


class LocalFragmentStore:
    """A FragmentStore in a directory. Open it with :meth:`open`."""

    def __init__(self, engine: Engine, report: Report, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self.report = report
        self._engine = engine
        self._index = engine.index
        self._compactor = Compactor(engine)
        self._clock = clock
        self._loop = loop
        self._queue: queue.SimpleQueue[list[_Job] | _Committed | _Appended | _Stop] = queue.SimpleQueue()
        self._arriving: list[_Job] = []
        self._later: dict[bytes, Write] = {}
        """By key: what was kept, until the index has it. The event loop's."""
        self._later_copies: dict[bytes, Write] = {}
        """By data id: the whole copies among them."""
        self._unappended: deque[Write] = deque()
        """What was kept and nobody has begun to append."""
        self._unplaced: list[Write] = []
        """What somebody is appending, and what could not be appended. Theirs who have the engine in hand; a write is
        always in one of the two until the index has it.
        """
        self._unappended_bytes = 0
        """Since the writer thread was last woken for them."""
        self._later_timer: asyncio.TimerHandle | None = None
        self._hands = threading.Lock()
        """Held by whoever does something with the engine."""
        self._slow_until_s = 0.0
        self._space_due_s = 0.0
        self._space_bytes = 0
        self._coming_bytes = 0
        """Of copies that were not refused, and are being made durable elsewhere."""
        self._backlog: deque[_Job] = deque()  # the writer thread's
        self._queued_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._readers = ThreadPoolExecutor(engine.limits.read_threads, thread_name_prefix="fragment-read")
        self._checkpoints = ThreadPoolExecutor(1, thread_name_prefix="fragment-index")
        self._checkpoint: Future[None] | None = None
        self._groups = self._writes = self._checkpoint_count = 0
        self._compact_at: float | None = clock.monotonic() + engine.limits.compact_rest_s
        self._closed = False
        self._over = False
        """Nobody appends any more."""
        self._thread = threading.Thread(target=self._run, name="fragment-write", daemon=True)
        self._thread.start()

    @classmethod
    async def open(
        cls,
        directory: Path,
        disk_id: str,
        *,
        limits: StoreLimits | None = None,
        clock: Clock | None = None,
        on_damage: OnDamage | None = None,
        files: Files | None = None,
        index_bytes_max: int = 64 * GIB,
        failed_before: str = "",
        note_failed: Callable[[str], bool] | None = None,
        in_thread: InThread = asyncio.to_thread,
    ) -> LocalFragmentStore:
        """Recovers what a crash left, and starts the threads.

        ``failed_before``: why the disk failed for good, as its owner knows; it is read-only then.
        ``note_failed(reason)``: called in a thread when it fails for
        good; whether that was noted. ``in_thread(work)`` runs what blocks on the disk.
        ``on_damage(fragment, cell)`` runs on the event loop, once for every cell newly found bad (-1: the head, so all
        of them).
        Raises DirectoryInUse, DiskForeign, IndexDamaged, OperatorError, OSError.
        """
        loop = asyncio.get_running_loop()
        clock = clock or SystemClock()

        def report_damage(key: bytes, cell: int) -> None:
            if on_damage is not None:
                with contextlib.suppress(RuntimeError):  # the loop is gone: nobody is left to be told
                    loop.call_soon_threadsafe(on_damage, FragmentId.unpack(key), cell)

        def start() -> tuple[Engine, Report]:
            body = files if files is not None else PosixFiles(directory)
            try:
                index = Index(directory / "index", disk_id, map_bytes_max=index_bytes_max)
                try:
                    engine = Engine(body, index, limits or StoreLimits(), now_ms=clock.wall_ms, on_damage=report_damage)
                    if note_failed is not None:
                        engine.note_failed = note_failed
                    return engine, engine.recover(failed_before=failed_before)
                except BaseException:
                    index.close()
                    raise
            except BaseException:
                body.close()
                raise

        engine, report = await in_thread(start)
        return cls(engine, report, clock, loop)

    # --- the port
    # -------------------------------------------------------------------------------------------------------------

    async def write(
        self, header: FragmentHeader, payload: Sequence[Buffer], *, sync: bool = False, check: bytes = b""
    ) -> None:
        write = Write.of(header, payload, check=check)
        self._refuse_when_closed()
        await self._take_bytes(write.payload_bytes)
        try:
            self._refuse_when_closed()
            await self._submit(_Job(self._loop.create_future(), write=write, sync=sync))
        finally:
            self._give_bytes(write.payload_bytes)

    def refusal(self, write: Write) -> StoragedError | None:
        """Why ``keep`` may not be told of it, if there is a reason; on the event loop. None: ``keep`` is told of it, or
        ``withdraw``.
        """
        if self._closed:
            return DiskUnusable("the fragment store is closed", state="failed")
        if not write.matches_hash():
            return FragmentDamaged(
                f"the payload of {write.key.hex()} is not what the hashes in its header say; not written"
            )
        engine = self._engine
        if engine.failure or self._space_bytes < write.payload_bytes or self._loop.time() >= self._space_due_s:
            self._space_bytes = 0
            coming = self._coming_bytes + sum([kept.payload_bytes for kept in self._later.values()])
            refusal = engine.refusal(write.payload_bytes + coming)
            if refusal is not None:
                return refusal
            self._space_bytes, self._space_due_s = (
                engine.spare_bytes // SPACE_LOOK_PART,
                self._loop.time() + SPACE_LOOK_S,
            )
        self._space_bytes -= write.payload_bytes
        self._coming_bytes += write.payload_bytes
        return None

    def withdraw(self, write: Write) -> None:
        """It was not refused, and does not come."""
        self._coming_bytes -= write.payload_bytes

    def keep(self, writes: Sequence[Write]) -> None:
        """Takes on copies that are durable elsewhere until ``sync_apart`` returns, and that there was no reason to
        refuse: they are found now, and appended later. On the event loop.
        """
        for write in writes:
            key = write.key
            self._later[key] = write
            if key[16:21] == WHOLE_COPY:
                self._later_copies[key[:16]] = write
            self._unappended_bytes += write.payload_bytes
            self._coming_bytes -= write.payload_bytes
        self._unappended.extend(writes)
        if len(self._unappended) >= LATER_WRITES_MAX or self._unappended_bytes >= LATER_BYTES_MAX:
            if not self._append_here():
                self._append_later()
        elif self._later_timer is None:
            self._later_timer = self._loop.call_later(LATER_S, self._append_later)

    def _append_later(self) -> None:
        """Now."""
        if self._later_timer is not None:
            self._later_timer.cancel()
            self._later_timer = None
        self._unappended_bytes = 0
        self._queue.put([])

    def _append_here(self) -> bool:
        """On the event loop, into the page cache of a disk that has just made a write durable; False: it is for the
        thread, which has the disk in hand, or must wait for it.

        The thread would take as long, and the interpreter from the loop many times. Where a write to the page cache was
        slow, since the kernel has too much to write already,
        the thread does it for a while.
        """
        now = self._loop.time()
        if self._closed or now < self._slow_until_s or not self._hands.acquire(blocking=False):
            return False
        try:
            if self._unplaced or not self._engine.takes(self._unappended):
                return False
            self._appended(self._append_kept())
        finally:
            self._hands.release()
        self._unappended_bytes = 0
        if self._loop.time() - now > SLOW_S:
            self._slow_until_s = now + SLOW_FOR_S
        if self._engine.write_back_due:
            self._queue.put([])  # and for a checkpoint of the index, now and then
        return True

    async def _settle(self, ids: Sequence[FragmentId] | None = None) -> None:
        """Whatever was kept before, of these ids or at all, is in the index when it returns, or
        could not be appended.
        """
        later = self._later
        if later and (ids is None or any(fragment.pack() in later for fragment in ids)):
            await self._submit(_Job(self._loop.create_future()))

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        self._refuse_when_closed()
        await self._settle(ids)
        durable = True
        for fragment in ids:
            entry = self._index.lookup(fragment.pack())
            if entry is None:
                raise FragmentMissing(f"the disk does not hold fragment {fragment.pack().hex()}")
            durable = durable and Position(entry.segment, entry.offset + entry.record_bytes) <= self._engine.synced
        if not durable:
            await self._submit(_Job(self._loop.create_future(), sync=True))

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        at_once = self.peek(fragment, first_cell, count)
        if at_once is not None:
            return at_once
        await self._settle([fragment])
        found = await self._in_reader(self._engine.reader.read, fragment.pack(), first_cell, count)
        assert found is not None
        return CellRead(found.header, found.cells, found.whole)

    def peek(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        """As ``read`` when the cells are in the page cache, whole and few (INLINE_READ_BYTES_MAX), else None; never
        waits for the disk.

        Raises FragmentMissing, DiskUnusable.
        """
        self._refuse_when_closed()
        key = fragment.pack()
        if key in self._later:
            return None
        entry = self._index.lookup(key)
        if entry is None or min(count * entry.cell_bytes, entry.payload_bytes) > INLINE_READ_BYTES_MAX:
            return None
        found = self._engine.reader.read(key, first_cell, count, cached=True)
        return None if found is None else CellRead(found.header, found.cells, found.whole)

    def peek_copy(self, data_id: bytes) -> memoryview | None:
        """The payload of a whole copy (k = 1) of a data id's only block, when it is in the page cache and whole; never
        waits for the disk. Raises DiskUnusable.
        """
        self._refuse_when_closed()
        later = self._later_copies.get(data_id)
        if later is not None:
            return later.payload[0] if len(later.payload) == 1 else memoryview(b"".join(later.payload))
        return self._engine.reader.cached_copy(data_id, INLINE_READ_BYTES_MAX)

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        self._refuse_when_closed()
        await self._settle(ids)
        if len(ids) <= INLINE_IDS_MAX:
            return self._stat(ids)
        return await self._in_reader(self._stat, _bounded(ids))

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        keys = [fragment.pack() for fragment in _bounded(ids)]
        check_time(now_ms)
        await self._call(functools.partial(self._engine.touch, keys, now_ms))
        return await self.stat(ids)

    async def retire(self, entries: Sequence[Retirement]) -> None:
        if len(entries) > RETIREMENTS_MAX:
            raise ValueError(f"{len(entries)} retirements are more than {RETIREMENTS_MAX} at once")
        for entry in entries:
            check_time(entry.due_ms)
        await self._call(functools.partial(self._engine.retire, entries))

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        self._refuse_when_closed()
        await self._settle()
        return await self._in_reader(self._index.due, now_ms, limit)

    async def unretire(self, data_id: bytes) -> None:
        await self._call(functools.partial(self._engine.unretire, data_id))

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        keys = [fragment.pack() for fragment in _bounded(ids)]
        return await self._call(functools.partial(self._engine.delete, keys, created_ms))

    async def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        """A fragment whose head is damaged comes as its id and length, with everything else empty."""
        while limit > 0:
            self._refuse_when_closed()
            await self._settle()
            page = await self._in_reader(self._headers, after, min(limit, 1000))
            if not page:
                return
            for key, header in page:
                if header is not None:
                    yield header
                    limit -= 1
                after = key

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        self._refuse_when_closed()
        await self._settle([fragment])
        key = fragment.pack()
        try:
            await self._in_reader(self._engine.reader.verify, key)
        except (FragmentMissing, FragmentDamaged):
            pass  # stat says which
        return self._stat([fragment])[0]

    async def usage(self) -> Usage:
        return self._engine.usage()

    async def close(self) -> None:
        """Finishes what was asked, then a checkpoint. Later calls raise DiskUnusable."""
        if self._closed:
            return
        self._closed = True
        if self._later_timer is not None:
            self._later_timer.cancel()
        self._hand_over()
        self._queue.put(_Stop())
        await asyncio.to_thread(self._shut)

    # --- beside the port
    # ------------------------------------------------------------------------------------------------------

    async def restore(self, copies: Sequence[tuple[FragmentHeader, bytes]]) -> None:
        """Appends and syncs those of these copies that the disk does not have whole, also where it is full up to its
        reserve: they were acknowledged.

        Raises DiskUnusable when there is no room at all; nothing on a disk that is read-only, whose fragments count as
        lost.
        """
        await self._call(functools.partial(self._restore, copies))

    def _restore(self, copies: Sequence[tuple[FragmentHeader, bytes]]) -> None:
        engine = self._engine
        for header, payload in copies:
            if engine.failure:
                return
            try:
                if not engine.reader.verify(header.id):
                    continue
            except (FragmentMissing, FragmentDamaged):
                pass
            refusal = engine.append([Write.of(header, [payload])], into_reserve=True)[0]
            if refusal is not None and not engine.failure:
                raise refusal

    def sync_apart(self) -> None:
        """Everything that was appended or kept before the call is durable when it returns, or the disk is read-only and
        what it holds counts as lost. In any thread but the
        event loop's and the writer's. Raises Unfinished when what was kept can't be appended before a restart."""
        if self._unappended or self._unplaced:
            appended = _Appended()
            self._queue.put(appended)
            while not appended.event.wait(1.0):
                if self._over or not (self._closed or self._thread.is_alive()):
                    appended.tell(self._unfinished())
            if appended.error is not None:
                raise appended.error
        self._engine.sync_apart()

    def find_copy(self, data_id: bytes) -> FragmentId | None:
        """The whole copy (k = 1) of a data id's only block, if this disk has one; about 3 us."""
        later = self._later_copies.get(data_id)
        key = later.key if later is not None else self._index.find_copy(data_id)
        return None if key is None else FragmentId.unpack(key)

    def statistics(self) -> FragmentStatistics:
        engine = self._engine
        return FragmentStatistics(
            usage=engine.usage(),
            segments=len(engine.segments),
            groups=self._groups,
            writes=self._writes,
            syncs=engine.syncs,
            appended_bytes=engine.appended_bytes,
            compacted_bytes=engine.compacted_bytes,
            punched_bytes=engine.punched_bytes,
            checkpoints=self._checkpoint_count,
            overlay_entries=len(self._index.overlay),
            queued_bytes=self._queued_bytes,
            damaged_fragments=len(self._index.damaged),
            torn_bytes=self.report.torn_bytes,
            gaps=len(self.report.gaps),
        )

    # --- on the event loop
    # ----------------------------------------------------------------------------------------------------

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise DiskUnusable("the fragment store is closed", state="failed")

    async def _in_reader(self, function: Callable[..., T], *args: Any) -> T:
        return await self._loop.run_in_executor(self._readers, functools.partial(function, *args))

    async def _call(self, call: Callable[[], T]) -> T:
        self._refuse_when_closed()
        result: T = await self._submit(_Job(self._loop.create_future(), call=call, sync=True))
        return result

    async def _submit(self, job: _Job) -> Any:
        """A caller that gives up gets its buffers back at once when the writer has not begun with them, else when it
        has finished.
        """
        future = job.future
        self._arrive(job)
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled() and not job.claim() and not job.over:
                job.served = self._loop.create_future()
                await job.served
            raise

    def _arrive(self, job: _Job) -> None:
        self._arriving.append(job)
        if len(self._arriving) == 1:
            self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        """Everything that this turn of the loop brought goes to the writer thread at once. Handed over one by one, the
        first would wake it, it would ask for
        the interpreter and get it in the middle of the burst, and what belongs in one group would be synced in
        several."""
        if self._arriving:
            jobs, self._arriving = self._arriving, []
            self._queue.put(jobs)

    def _resolve(self, answers: list[tuple[_Job, Any]]) -> None:
        for job, answer in answers:
            # a caller that was cancelled in this very turn of the loop has not said yet that it waits for that
            job.over = True
            if job.future.done():
                if job.served is not None and not job.served.done():
                    job.served.set_result(None)
            elif isinstance(answer, BaseException):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    def _appended(self, writes: Sequence[Write]) -> None:
        """The index has them, or the disk has failed: they count as lost there."""
        for write in writes:
            if self._later.get(write.key) is write:
                del self._later[write.key]
            if self._later_copies.get(write.key[:16]) is write:
                del self._later_copies[write.key[:16]]

    async def _take_bytes(self, count: int) -> None:
        if self._waiting or (self._queued_bytes and self._queued_bytes + count > self._engine.limits.queue_bytes_max):
            turn: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((count, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_bytes(count)
                raise
            return
        self._queued_bytes += count

    def _give_bytes(self, count: int) -> None:
        self._queued_bytes -= count
        while self._waiting:
            need, turn = self._waiting[0]
            if not turn.done():
                if self._queued_bytes and self._queued_bytes + need > self._engine.limits.queue_bytes_max:
                    return
                self._queued_bytes += need
                turn.set_result(None)
            self._waiting.popleft()

    def _stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        return [self._stat_one(fragment.pack()) for fragment in ids]

    def _stat_one(self, key: bytes) -> FragmentStat:
        entry: Entry | None = self._index.lookup(key)
        if entry is None:
            return FragmentStat(key, Health.MISSING)
        damaged = key in self._index.damaged or entry.segment not in self._engine.segments
        return FragmentStat(key, Health.DAMAGED if damaged else Health.OK, entry.payload_bytes, entry.created_ms)

    def _headers(self, after: bytes, limit: int) -> list[tuple[bytes, FragmentHeader | None]]:
        page: list[tuple[bytes, FragmentHeader | None]] = []
        for key in self._index.keys(after, limit):
            header = None
            try:
                header = self._engine.reader.header(key)
            except FragmentMissing:
                pass
            except FragmentDamaged:
                entry = self._index.lookup(key)
                if entry is not None:
                    header = FragmentHeader(key, b"", b"", (), entry.cell_bytes, entry.payload_bytes, entry.created_ms)
            page.append((key, header))
        return page

    # --- in the writer thread
    # -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopping = False
        while not stopping:
            jobs, waiting, stopping = self._collect()
            with self._hands:
                kept = bool(self._unappended)
                if kept or self._unplaced:
                    self._tell(self._appended, self._append_kept())
                for appended in waiting:
                    appended.tell(self._unfinished())
                if jobs:
                    self._groups += 1
                    self._serve(jobs)
                if not stopping:
                    self._tend(busy=bool(jobs) or kept)

    def _collect(self) -> tuple[list[_Job], list[_Appended], bool]:
        """What has arrived, up to the bounds of a group; waits for the first, or until there is something to tend."""
        limits = self._engine.limits
        jobs: list[_Job] = []
        waiting: list[_Appended] = []
        size = 0
        timeout = self._rest()
        while len(jobs) < limits.batch_writes_max and size < limits.batch_bytes_max:
            if self._backlog:
                job = self._backlog.popleft()
                if job.claim():
                    jobs.append(job)
                    size += job.write.payload_bytes if job.write is not None else 0
                continue
            try:
                item = self._queue.get(timeout=timeout) if not jobs and timeout != 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, _Stop):
                return jobs, waiting, True
            if isinstance(item, _Committed):
                with self._hands:
                    self._committed(item)
            elif isinstance(item, _Appended):
                waiting.append(item)
            else:
                self._backlog.extend(item)
            timeout = 0
        return jobs, waiting, False

    def _append_kept(self) -> list[Write]:
        """Those of them that are done with. They are acknowledged: the space that is held back for deletions is for
        them, too.
        """
        engine, writes = self._engine, self._unplaced
        while self._unappended:
            writes.append(self._unappended[0])
            self._unappended.popleft()
        left = writes
        if not engine.failure:
            try:
                refusals = engine.append(writes, into_reserve=True, checked=True)
            except Exception as error:
                engine.fail(f"{type(error).__name__}: {error}", lasting=False)
            else:
                self._writes += len(writes)
                left = [write for write, refusal in zip(writes, refusals, strict=True) if refusal is not None]
        self._unplaced = [] if engine.lost else left
        unplaced = set(map(id, self._unplaced))
        return [write for write in writes if id(write) not in unplaced]

    def _unfinished(self) -> Unfinished | None:
        """What ``sync_apart`` raises, if anything."""
        left = len(self._unplaced) + (len(self._unappended) if self._over else 0)
        if not left or self._engine.lost:
            return None
        return Unfinished(
            f"{left} copies that were acknowledged are in no segment yet: {self._engine.failure or 'there is no room'}"
        )

    def _serve(self, jobs: list[_Job]) -> None:
        answers: list[tuple[_Job, Any]] = []
        left = jobs
        try:
            writes = [job for job in jobs if job.write is not None]
            self._writes += len(writes)
            results = self._engine.append([job.write for job in writes if job.write is not None])
            answers.extend(zip(writes, results, strict=True))
            answers.extend(
                (job, _answer(job.call) if job.call is not None else None) for job in jobs if job.write is None
            )
            later = [(job, answer) for job, answer in answers if job.sync and not isinstance(answer, BaseException)]
            if len(later) < len(answers):
                rest = {id(job) for job, _ in later}
                self._tell(self._resolve, [(job, answer) for job, answer in answers if id(job) not in rest])
                left = [job for job, _ in later]
            if later:
                refusal = _answer(self._engine.sync)
                if isinstance(refusal, BaseException):
                    later = [(job, refusal) for job, _ in later]
                self._tell(self._resolve, later)
        except Exception as error:
            # A mistake of ours or a damaged index: nobody may wait for ever, and nothing more may be written on top of
            # it.
            self._engine.fail(f"{type(error).__name__}: {error}", lasting=False)
            self._tell(
                self._resolve, [(job, DiskUnusable(f"the disk failed: {error}", state="failed")) for job in left]
            )

    def _tell(self, whom: Callable[[Any], None], what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(whom, what)

    def _rest(self) -> float | None:
        """Seconds until there is something to tend; None: nothing."""
        engine = self._engine
        if engine.failure:
            return None
        if engine.holes and engine.holes[0].after <= engine.synced:
            return 0
        return None if self._compact_at is None else max(0.0, self._compact_at - self._clock.monotonic())

    def _tend(self, *, busy: bool) -> None:
        """Checkpoints, holes and compaction: a slice of each, smaller when there is other work."""
        engine = self._engine
        if engine.failure:
            return
        try:
            engine.write_back()
            self._tend_checkpoint()
            for _ in range(1 if busy else 16):
                if not engine.punch():
                    break
            now = self._clock.monotonic()
            if self._compact_at is None:
                self._compact_at = now + engine.limits.compact_rest_s if busy else None
            elif now >= self._compact_at:
                pace = engine.limits.compact_step_bytes / engine.limits.compact_bytes_per_s * (4 if busy else 1)
                more = self._compactor.step(engine.limits.compact_step_bytes)
                self._compact_at = now + pace if more else None
        except DiskUnusable:
            pass  # the reason is the engine's, and everyone who writes is told
        except (OSError, lmdb.Error) as error:
            engine.fail(f"{type(error).__name__}: {error}", lasting=False)

    def _tend_checkpoint(self) -> None:
        engine = self._engine
        if self._checkpoint is None and engine.checkpoint_due():
            checkpoint = engine.freeze()
            self._checkpoint = self._checkpoints.submit(engine.commit, checkpoint)
            self._checkpoint.add_done_callback(lambda done: self._queue.put(_Committed(checkpoint, done.exception())))
        elif (
            self._checkpoint is not None and len(self._index.overlay) > OVERLAYS_MAX * engine.limits.overlay_entries_max
        ):
            self._checkpoint.exception()

    def _committed(self, done: _Committed) -> None:
        self._checkpoint = None
        self._checkpoint_count += 1
        if done.error is not None:
            self._engine.fail(f"checkpoint of the fragment index: {done.error}", lasting=False)
            return
        try:
            self._engine.thaw(done.checkpoint)
        except OSError as error:
            self._engine.fail(f"removing a segment: {error}", lasting=False)

    def _shut(self) -> None:
        self._thread.join()
        self._checkpoints.shutdown(wait=True)
        with self._hands:
            if self._unappended or self._unplaced:
                self._tell(self._appended, self._append_kept())
        self._over = True
        late: list[_Job] = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, _Committed):
                self._committed(item)
            elif isinstance(item, list):
                late.extend(job for job in item if job.claim())
            elif isinstance(item, _Appended):
                item.tell(self._unfinished())
        self._tell(self._resolve, [(job, DiskUnusable("the fragment store is closed", state="failed")) for job in late])
        self._readers.shutdown(wait=True)
        self._engine.close()


def _answer(call: Callable[[], Any]) -> Any:
    """Its result, or the error that its caller is to be told."""
    try:
        return call()
    except StoragedError as error:
        return error


def _bounded(ids: Sequence[FragmentId]) -> Sequence[FragmentId]:
    if len(ids) > BATCH_IDS_MAX:
        raise PeerRefused(f"{len(ids)} fragments in one request; at most {BATCH_IDS_MAX}", remote_code="BAD_REQUEST")
    return ids
