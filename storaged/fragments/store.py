"""The local disk as a fragment store: one writer thread that commits in groups, a few threads that read.

Every write, delete and sync that arrives while the disk is busy goes into the next group: one vectored write, one fdatasync if anyone asked to
be durable, one wake-up of the event loop. A lone request waits for nobody. Reads of what is in the page cache are answered on the
event loop (preadv2 with RWF_NOWAIT never blocks); the rest goes to the reading threads.

A small object's copy comes with a *companion*, the record that names it, which holds the copy as well. It is appended as everything else is, but not synced: the same
thread hands all companions of the group to ``commit_companions`` (the disk's metadata store), which makes record and copy durable in one write to its own log, and one wake-up
of the event loop tells of both. Before a copy leaves that log, ``sync_apart`` has synced this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from storaged.clock import Clock, SystemClock
from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, PeerRefused, StoragedError
from storaged.fragments.compact import Compactor
from storaged.fragments.engine import Engine, StoreLimits, Write, check_time
from storaged.fragments.entry import Entry
from storaged.fragments.files import Files, PosixFiles
from storaged.fragments.index import Checkpoint, Index, Position
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
from storaged.units import GIB, MIB
from storaged.wire import Buffer

T = TypeVar("T")

BATCH_IDS_MAX = 10_000
INLINE_IDS_MAX = 256
"""So many look-ups (2 us each) are made on the event loop."""

INLINE_READ_BYTES_MAX = MIB
"""So much is copied from the page cache and verified on the event loop: a fragment of a block of 3 MiB takes 0.1 ms, and half of that again to send. A thread
costs more: it takes the interpreter from the loop a dozen times."""

OVERLAYS_MAX = 4
"""When the overlay has grown to so many times its size while a checkpoint is being written, writes wait for it."""

OnDamage = Callable[[FragmentId, int], None]

CommitCompanions = Callable[[Sequence[Any]], StoragedError | None]
"""Called in the writer thread; all are durable when it returns None, and so are the copies that came with them."""

Kept = Callable[[StoragedError | None, StoragedError | None], None]
"""``kept(write, companion)``: why the fragment was not written (its companion was not committed then), and why the companion was not."""


@dataclass(frozen=True)
class FragmentStatistics:
    """Since the start, but for ``usage``. ``groups`` were served, ``writes`` and ``syncs`` among them; ``cut_bytes`` and ``gaps`` are of the recovery."""

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
    """``write`` is appended, or ``call`` is made by the writer thread; ``sync``: its answer waits until the log is durable.

    ``token`` is popped once: by the writer thread when it begins, or by the caller when it gives up before that.
    """

    future: asyncio.Future[Any] | None
    write: Write | None = None
    call: Callable[[], Any] | None = None
    sync: bool = False
    companion: Any = None
    kept: Kept | None = None
    """Instead of the future, when there is a companion."""
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


class LocalFragmentStore:
    """A FragmentStore in a directory. Open it with :meth:`open`."""

    def __init__(self, engine: Engine, report: Report, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self.report = report
        self._engine = engine
        self._index = engine.index
        self._compactor = Compactor(engine)
        self._clock = clock
        self._loop = loop
        self._queue: queue.SimpleQueue[list[_Job] | _Committed | _Stop] = queue.SimpleQueue()
        self._arriving: list[_Job] = []
        self._handing = False
        """``_hand_over`` is about to be called."""
        self._committing = False
        """Copies with companions have been handed over, and no answer to any of them has come back."""
        self._backlog: deque[_Job] = deque()  # the writer thread's
        self._queued_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._readers = ThreadPoolExecutor(engine.limits.read_threads, thread_name_prefix="fragment-read")
        self._checkpoints = ThreadPoolExecutor(1, thread_name_prefix="fragment-index")
        self._checkpoint: Future[None] | None = None
        self._groups = self._writes = self._checkpoint_count = 0
        self._compact_at: float | None = clock.monotonic() + engine.limits.compact_rest_s
        self._closed = False
        self.commit_companions: CommitCompanions = _no_companions
        self._answered_last = 0
        """Of how many requests the loop was told last, at once."""
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
    ) -> LocalFragmentStore:
        """Recovers what a crash left, and starts the threads.

        ``on_damage(fragment, cell)`` runs on the event loop, once for every cell newly found bad (-1: the head, so all of them).
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
                    return engine, engine.recover()
                except BaseException:
                    index.close()
                    raise
            except BaseException:
                body.close()
                raise

        engine, report = await asyncio.to_thread(start)
        return cls(engine, report, clock, loop)

    # --- the port -------------------------------------------------------------------------------------------------------------

    async def write(self, header: FragmentHeader, payload: Sequence[Buffer], *, sync: bool = False) -> None:
        write = Write.of(header, payload)
        self._refuse_when_closed()
        await self._take_bytes(write.payload_bytes)
        try:
            self._refuse_when_closed()
            await self._submit(_Job(self._loop.create_future(), write=write, sync=sync))
        finally:
            self._give_bytes(write.payload_bytes)

    def write_with(self, write: Write, companion: Any, kept: Kept) -> bool:
        """Writes a fragment, and commits its companion, which makes both durable; then ``kept`` is told on the event loop. False: nothing was begun, since it would
        have to wait for room first. Raises DiskUnusable."""
        self._refuse_when_closed()
        count = write.payload_bytes
        if self._waiting or (self._queued_bytes and self._queued_bytes + count > self._engine.limits.queue_bytes_max):
            return False
        # As the one before it was: the next turn of the loop is unlikely to bring company.
        alone = not self._queued_bytes and self._answered_last == 1
        self._queued_bytes += count
        self._arrive(_Job(None, write=write, companion=companion, kept=kept), alone=alone)
        return True

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        self._refuse_when_closed()
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
        found = await self._in_reader(self._engine.reader.read, fragment.pack(), first_cell, count)
        assert found is not None
        return CellRead(found.header, found.cells, found.whole)

    def peek(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        """As ``read`` when the cells are in the page cache, whole and few (INLINE_READ_BYTES_MAX), else None; never waits for the disk.

        Raises FragmentMissing, DiskUnusable.
        """
        self._refuse_when_closed()
        key = fragment.pack()
        entry = self._index.lookup(key)
        if entry is None or min(count * entry.cell_bytes, entry.payload_bytes) > INLINE_READ_BYTES_MAX:
            return None
        found = self._engine.reader.read(key, first_cell, count, cached=True)
        return None if found is None else CellRead(found.header, found.cells, found.whole)

    def peek_copy(self, data_id: bytes) -> memoryview | None:
        """The payload of a whole copy (k = 1) of a data id's only block, when it is in the page cache and whole; never waits for the disk. Raises DiskUnusable."""
        self._refuse_when_closed()
        return self._engine.reader.cached_copy(data_id, INLINE_READ_BYTES_MAX)

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        self._refuse_when_closed()
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
        self._hand_over()
        self._queue.put(_Stop())
        await asyncio.to_thread(self._shut)

    # --- beside the port ------------------------------------------------------------------------------------------------------

    async def restore(self, copies: Sequence[tuple[FragmentHeader, bytes]]) -> None:
        """Appends and syncs those of these copies that the disk does not have whole, also where it is full up to its reserve: they were acknowledged.

        Raises DiskUnusable when there is no room at all; nothing on a disk that is read-only, whose fragments count as lost.
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
        """Everything appended before the call is durable when it returns, or the disk is read-only and what it holds counts as lost. In any thread, also while the
        writer thread waits for the caller."""
        self._engine.sync_apart()

    def find_copy(self, data_id: bytes) -> FragmentId | None:
        """The whole copy (k = 1) of a data id's only block, if this disk has one; about 3 us."""
        key = self._index.find_copy(data_id)
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

    # --- on the event loop ----------------------------------------------------------------------------------------------------

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
        """A caller that gives up gets its buffers back at once when the writer has not begun with them, else when it has finished."""
        future = job.future
        assert future is not None
        self._arrive(job)
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled() and not job.claim() and not job.over:
                job.served = self._loop.create_future()
                await job.served
            raise

    def _arrive(self, job: _Job, *, alone: bool = False) -> None:
        """While copies with companions are being committed, further ones wait for that group's answer: the loop that takes it hands over all that came meanwhile.
        A loop that is busy so makes groups as large as its own turns, whose commit costs little more than that of one; one that is idle takes the answer at
        once. Everything else (bytes of large objects, deletions) goes to the writer thread within this turn of the loop, and takes along what waits; one that
        is ``alone`` goes now."""
        self._arriving.append(job)
        if job.kept is not None and self._committing:
            return
        if alone:
            self._hand_over()
        elif not self._handing:
            self._handing = True
            self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        """Everything that this turn of the loop brought goes to the writer thread at once. Handed over one by one, the first would wake it, it would ask for
        the interpreter and get it in the middle of the burst, and what belongs in one group would be synced in several."""
        self._handing = False
        if self._arriving:
            self._committing = self._committing or any(job.kept is not None for job in self._arriving)
            jobs, self._arriving = self._arriving, []
            self._queue.put(jobs)

    def _resolve(self, answers: list[tuple[_Job, Any]], uncommitted: StoragedError | None) -> None:
        self._answered_last = len(answers)
        for job, answer in answers:
            if job.kept is not None:
                assert job.write is not None
                self._give_bytes(job.write.payload_bytes)
                self._committing = False
                try:
                    job.kept(answer, uncommitted)
                except Exception as error:  # a mistake; its neighbours are told all the same
                    self._loop.call_exception_handler({"message": "telling of a copy failed", "exception": error})
                continue
            assert job.future is not None
            job.over = True  # a caller that was cancelled in this very turn of the loop has not said yet that it waits for that
            if job.future.done():
                if job.served is not None and not job.served.done():
                    job.served.set_result(None)
            elif isinstance(answer, BaseException):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)
        if self._arriving and not self._handing:
            self._handing = True
            self._loop.call_soon(self._hand_over)

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

    # --- in the writer thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopping = False
        while not stopping:
            jobs, stopping = self._collect()
            if jobs:
                self._groups += 1
                self._serve(jobs)
            if not stopping:
                self._tend(busy=bool(jobs))

    def _collect(self) -> tuple[list[_Job], bool]:
        """What has arrived, up to the bounds of a group; waits for the first, or until there is something to tend."""
        limits = self._engine.limits
        jobs: list[_Job] = []
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
                return jobs, True
            if isinstance(item, _Committed):
                self._committed(item)
                timeout = 0
            else:
                self._backlog.extend(item)
        return jobs, False

    def _serve(self, jobs: list[_Job]) -> None:
        answers: list[tuple[_Job, Any]] = []
        left = jobs
        try:
            writes = [job for job in jobs if job.write is not None]
            self._writes += len(writes)
            results = self._engine.append([job.write for job in writes if job.write is not None])
            answers.extend(zip(writes, results, strict=True))
            answers.extend((job, _answer(job.call) if job.call is not None else None) for job in jobs if job.write is None)
            paired = [(job, answer) for job, answer in answers if job.kept is not None and answer is None]
            later = [(job, answer) for job, answer in answers if job.sync and not isinstance(answer, BaseException)]
            if len(paired) + len(later) < len(answers):
                rest = {id(job) for job, _ in (*paired, *later)}
                self._deliver([(job, answer) for job, answer in answers if id(job) not in rest])
                left = [job for job in left if id(job) in rest]
            if later:
                refusal = _answer(self._engine.sync)
                if isinstance(refusal, BaseException):  # copies count as lost there, too
                    later, paired = [(job, refusal) for job, _ in (*later, *paired)], []
                self._deliver(later)
                left = [job for job, _ in paired]
            if paired:
                self._deliver(paired, self.commit_companions([job.companion for job, _ in paired]))
        except Exception as error:
            # A mistake of ours or a damaged index: nobody may wait for ever, and nothing more may be written on top of it.
            self._engine.fail(f"{type(error).__name__}: {error}", lasting=False)
            self._deliver([(job, DiskUnusable(f"the disk failed: {error}", state="failed")) for job in left])

    def _deliver(self, answers: list[tuple[_Job, Any]], uncommitted: StoragedError | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._resolve, answers, uncommitted)

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
        elif self._checkpoint is not None and len(self._index.overlay) > OVERLAYS_MAX * engine.limits.overlay_entries_max:
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
        self._deliver([(job, DiskUnusable("the fragment store is closed", state="failed")) for job in late])
        self._readers.shutdown(wait=True)
        self._engine.close()


def _answer(call: Callable[[], Any]) -> Any:
    """Its result, or the error that its caller is to be told."""
    try:
        return call()
    except StoragedError as error:
        return error


def _no_companions(_companions: Sequence[Any]) -> StoragedError | None:
    return DiskUnusable("this store was not told where companions go", state="failed")


def _bounded(ids: Sequence[FragmentId]) -> Sequence[FragmentId]:
    if len(ids) > BATCH_IDS_MAX:
        raise PeerRefused(f"{len(ids)} fragments in one request; at most {BATCH_IDS_MAX}", remote_code="BAD_REQUEST")
    return ids
