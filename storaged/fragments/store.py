"""The local disk as a fragment store: one writer thread that commits in groups, a few threads that read.

Changes go through the write queue to the writer thread (``writer_thread``). Reads of what is in the page cache are
answered on the event loop (preadv2 with RWF_NOWAIT never blocks); the rest goes to the reading threads. Small copies
that another log keeps durable are appended later (``deferred``); a call that asks for one of them waits until it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from storaged.clock import Clock, SystemClock
from storaged.disk_health import DiskHealth, DiskThreads
from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, PeerRefused, StoragedError
from storaged.fragments.condemned import Condemned
from storaged.fragments.deferred import DeferredCopies
from storaged.fragments.engine import Engine
from storaged.fragments.files import Files, PosixFiles
from storaged.fragments.heads import aged, heads_after, in_log_order
from storaged.fragments.index import Index
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import (
    CELLS_MAX,
    HEADERS_MAX,
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
from storaged.fragments.statistics import FragmentStatistics
from storaged.fragments.write import Write, check_time
from storaged.fragments.write_queue import WriteQueue
from storaged.fragments.writer_thread import WriterThread
from storaged.units import MIB
from storaged.wire import Buffer

T = TypeVar("T")
U = TypeVar("U")

BATCH_IDS_MAX = 10_000
INLINE_IDS_MAX = 256
"""Up to this many lookups (2 us each) run on the event loop, more in a thread."""

INLINE_READ_BYTES_MAX = MIB
"""Up to this many bytes are copied from the page cache and verified on the event loop: a fragment of a block of 3 MiB
takes 0.1 ms, and half of that again to send. A thread costs more: it takes the interpreter from the loop a dozen times.
"""

OnDamage = Callable[[FragmentId, int], None]
"""``on_damage(fragment, cell)``; cell -1 is the head, so all cells."""


class InThread(Protocol):
    """Runs blocking work outside of the event loop, like ``asyncio.to_thread``."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


@dataclass(frozen=True)
class DiskOwner:
    """What the owner of a disk gives its fragment store.

    ``on_damage`` runs on the event loop, once for every cell newly found bad.
    ``failed_before``: why the disk failed for good, as the owner has noted; it is read-only then.
    ``note_failed(reason)``: called in a thread when the disk fails for good; returns whether the owner noted it.
    ``in_thread(work)`` runs the start, which blocks.
    ``health``: of the disk; the other stores on it share it.
    """

    clock: Clock = field(default_factory=SystemClock)
    on_damage: OnDamage | None = None
    failed_before: str = ""
    note_failed: Callable[[str], bool] = lambda _reason: False
    in_thread: InThread = asyncio.to_thread
    health: DiskHealth = field(default_factory=DiskHealth)


class LocalFragmentStore:
    """A FragmentStore in a directory. Open it with :meth:`open`."""

    def __init__(
        self, engine: Engine, report: Report, clock: Clock, loop: asyncio.AbstractEventLoop, health: DiskHealth
    ) -> None:
        self.report = report
        self._health = health
        self._index = engine.index
        self._engine = engine
        self._engine_lock = threading.Lock()
        """Held by the thread that uses the engine."""
        self._loop = loop
        self._queue = WriteQueue(loop, engine.limits.queue_bytes_max, health)
        self._deferred = DeferredCopies(engine, self._engine_lock, loop, self._queue.wake, health)
        self._readers = DiskThreads(health, engine.limits.read_threads, "fragment-read")
        self._condemned = Condemned()
        self._closed = False
        self._writer = WriterThread(engine, self._engine_lock, self._queue, self._deferred, clock, health)

    @classmethod
    async def open(
        cls,
        directory: Path,
        disk_id: str,
        *,
        limits: StoreLimits | None = None,
        files: Files | None = None,
        owner: DiskOwner | None = None,
    ) -> LocalFragmentStore:
        """Recovers what a crash left, and starts the threads.

        Raises DirectoryInUse, DiskForeign, DiskUnusable, IndexDamaged, OperatorError, OSError.
        """
        loop = asyncio.get_running_loop()
        owner = owner or DiskOwner()
        clock = owner.clock

        def report_damage(key: bytes, cell: int) -> None:
            if owner.on_damage is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(owner.on_damage, FragmentId.unpack(key), cell)

        def start() -> tuple[Engine, Report]:
            body = files if files is not None else PosixFiles(directory)
            try:
                index = Index(directory / "index", disk_id)
                try:
                    engine = Engine(body, index, limits or StoreLimits(), now_ms=clock.wall_ms, on_damage=report_damage)
                    engine.state.health = owner.health
                    engine.state.note_failed = owner.note_failed
                    return engine, engine.recover(failed_before=owner.failed_before)
                except BaseException:
                    index.close()
                    raise
            except BaseException:
                body.close()
                raise

        engine, report = await owner.in_thread(start)
        return cls(engine, report, clock, loop, owner.health)

    def look(self) -> None:
        """Finds out how much space is free, and whether the index is in memory. In a thread, again and again: the disk
        may not answer.
        """
        self._engine.state.look()
        self._index.look()

    # --- the port: changes ------------------------------------------------------------------------------------------

    async def write(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        *,
        sync: bool = False,
        check: bytes = b"",
        spare_other: bool = False,
    ) -> None:
        write = Write.of(header, payload, check=check)
        if spare_other:
            write.spare_other = True
            await self._append_deferred([FragmentId.unpack(write.key)])
        self._refuse_when_closed()
        self._condemned.pardon((write.key,))
        await self._queue.acquire(write.payload_bytes)
        try:
            self._refuse_when_closed()
            await self._queue.write(write, sync=sync)
        finally:
            self._queue.release(write.payload_bytes)

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        self._refuse_when_closed()
        await self._pardon(ids)
        await self._append_deferred(ids)
        if not await self._looked_up(functools.partial(self._are_durable, ids)):
            await self._queue.barrier(sync=True)

    def _are_durable(self, ids: Sequence[FragmentId]) -> bool:
        for fragment in ids:
            if self._index.lookup(fragment.pack()) is None:
                raise FragmentMissing(f"the disk does not hold fragment {fragment.pack().hex()}")
        return all(map(self._engine.is_durable, ids))

    async def headers(self, ids: Sequence[FragmentId]) -> list[FragmentHeader | None]:
        self._refuse_when_closed()
        if len(ids) > HEADERS_MAX:
            raise ValueError(f"{len(ids)} headers are more than {HEADERS_MAX} at once")
        await self._pardon(ids)
        await self._append_deferred(ids)
        if not await self._looked_up(lambda: all(map(self._engine.is_durable, ids))):
            await self._queue.barrier(sync=True)
        return await self._in_reader(lambda: [self._sound_header(fragment.pack()) for fragment in ids])

    def _sound_header(self, key: bytes) -> FragmentHeader | None:
        try:
            header = self._engine.reader.header(key)
        except (FragmentMissing, FragmentDamaged):
            return None
        return header if self._stat_one(key).health == Health.OK else None

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        keys = [fragment.pack() for fragment in _bounded(ids)]
        check_time(now_ms)
        self._condemned.pardon(keys)
        await self._in_writer(functools.partial(self._engine.touch, keys, now_ms))
        return await self.stat(ids)

    async def retire(self, entries: Sequence[Retirement]) -> None:
        if len(entries) > RETIREMENTS_MAX:
            raise ValueError(f"{len(entries)} retirements are more than {RETIREMENTS_MAX} at once")
        for entry in entries:
            check_time(entry.due_ms)
        await self._in_writer(functools.partial(self._engine.retire, entries))

    async def unretire(self, data_id: bytes) -> None:
        await self._in_writer(functools.partial(self._engine.unretire, data_id))

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        keys = [fragment.pack() for fragment in _bounded(ids)]
        return await self._in_writer(functools.partial(self._engine.delete, keys, created_ms))

    async def fragments_of(self, data_ids: Sequence[bytes]) -> list[list[FragmentId]]:
        self._refuse_when_closed()
        await self._append_deferred()
        keys = await self._in_reader(lambda: sorted(self._engine.index.keys_of(set(_bounded(data_ids)))))
        found: dict[bytes, list[FragmentId]] = {data_id: [] for data_id in data_ids}
        for key in keys:
            found[key[:16]].append(FragmentId.unpack(key))
        return list(found.values())

    def condemn(self, data_ids: Iterable[bytes]) -> None:
        self._condemned.add(data_ids)

    def pardon(self, data_ids: Iterable[bytes]) -> None:
        self._condemned.pardon(data_ids)

    async def delete_condemned(self, ids: Sequence[FragmentId]) -> int:
        keys = [fragment.pack() for fragment in _bounded(ids)]
        return await self._in_writer(functools.partial(self._engine.delete_condemned, keys, self._condemned))

    async def _pardon(self, ids: Sequence[FragmentId]) -> None:
        """What is on its way out is gone from the index when this returns."""
        if not self._condemned.pardon([fragment.data_id for fragment in ids]):
            await self._queue.barrier()

    # --- the port: reads --------------------------------------------------------------------------------------------

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        cached = self.try_read(fragment, first_cell, count)
        if cached is not None:
            return cached
        await self._append_deferred([fragment])
        self._health.check()
        found = await self._readers.run_short(
            functools.partial(self._engine.reader.read, fragment.pack(), first_cell, count)
        )
        return CellRead(found.header, found.cells, found.whole, found.unread)

    def try_read(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        """As ``read`` when the cells are in the page cache, undamaged and few (INLINE_READ_BYTES_MAX), else None. Never
        waits for the disk. Raises FragmentMissing, DiskUnusable.
        """
        self._refuse_when_closed()
        key = fragment.pack()
        if key in self._deferred or not self._index.in_memory:
            return None
        entry = self._engine.index.lookup(key)
        if entry is None or min(count * entry.cell_bytes, entry.payload_bytes) > INLINE_READ_BYTES_MAX:
            return None
        found = self._engine.reader.try_read(key, entry, first_cell, count)
        return None if found is None else CellRead(found.header, found.cells, found.whole)

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        self._refuse_when_closed()
        await self._append_deferred(ids)
        if len(ids) <= INLINE_IDS_MAX and self._index.in_memory:
            return self._stat(ids)
        return await self._in_reader(self._stat, _bounded(ids))

    def _stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        return [self._stat_one(fragment.pack()) for fragment in ids]

    def _stat_one(self, key: bytes) -> FragmentStat:
        entry = self._engine.index.lookup(key)
        if entry is None:
            return FragmentStat(key, Health.MISSING)
        damaged = (
            self._engine.state.lost  # a sync failed: what the page cache shows need not be on the drive
            or key in self._engine.index.damage
            or entry.segment not in self._engine.log.segments
        )
        return FragmentStat(key, Health.DAMAGED if damaged else Health.OK, entry.payload_bytes, entry.created_ms)

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        return [(entry.data_id, entry.owner) for entry in await self.due(now_ms, (0, b""), limit)]

    async def due(self, now_ms: int, after: tuple[int, bytes], limit: int) -> list[Retirement]:
        self._refuse_when_closed()
        await self._append_deferred()
        return await self._in_reader(self._engine.index.due, now_ms, limit, after)

    async def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        """A fragment whose head is damaged comes with its id, length and age; everything else is empty."""
        while limit > 0:
            self._refuse_when_closed()
            await self._append_deferred()
            page = await self._in_reader(heads_after, self._engine, after, min(limit, 1000))
            if not page:
                return
            for key, header in page:
                if header is not None:
                    yield header
                    limit -= 1
                after = key

    async def aged(self, after: bytes, limit: int, since_ms: int, before_ms: int) -> tuple[list[FragmentHeader], bytes]:
        self._refuse_when_closed()
        await self._append_deferred()
        return await self._in_reader(aged, self._engine, after, limit, since_ms, before_ms)

    async def in_log_order(self, after: bytes, limit: int) -> tuple[list[tuple[FragmentHeader, bytes]], bytes]:
        self._refuse_when_closed()
        await self._append_deferred()
        return await self._in_reader(in_log_order, self._engine, after, limit)

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        self._refuse_when_closed()
        await self._append_deferred([fragment])
        try:
            await self._in_reader(functools.partial(self._engine.reader.verify, fragment.pack(), on_drive=True))
        except (FragmentMissing, FragmentDamaged):
            pass  # the stat says which
        return await self._looked_up(functools.partial(self._stat_one, fragment.pack()))

    async def usage(self) -> Usage:
        return self._engine.usage()

    async def close(self) -> None:
        """Finishes what was asked, then writes a checkpoint. Later calls raise DiskUnusable."""
        if self._closed:
            return
        self._closed = True
        self._deferred.stop()
        self._queue.hand_over()
        self._writer.stop()
        await DiskThreads(self._health, 1, "fragment-close").run(self._shut)

    def _shut(self) -> None:
        self._writer.join()
        self._readers.shutdown(wait=True)
        self._engine.close()

    # --- small copies that another log keeps durable ----------------------------------------------------------------

    def admit(self, write: Write, *, into_reserve: bool = False) -> StoragedError | None:
        """See ``DeferredCopies.admit``. On the event loop, like the next two."""
        return self._deferred.admit(write, into_reserve=into_reserve)

    def withdraw(self, write: Write) -> None:
        """An admitted copy will not be kept."""
        self._deferred.withdraw(write)

    def keep(self, writes: Sequence[Write]) -> None:
        """Takes on admitted copies, which are durable elsewhere until ``sync_apart`` returns."""
        self._condemned.pardon([write.key for write in writes])
        self._deferred.keep(writes)

    def find_copy(self, data_id: bytes) -> FragmentId | None:
        """The whole copy (block 0, k = 1) of a data id, if this disk has one; takes about 3 us."""
        deferred = self._deferred.copies.get(data_id)
        key = deferred.key if deferred is not None else self._engine.index.find_copy(data_id)
        return None if key is None else FragmentId.unpack(key)

    async def locate_copy(self, data_id: bytes) -> FragmentId | None:
        """As ``find_copy``, also when the index is not in memory. Raises DiskUnusable."""
        return await self._looked_up(functools.partial(self.find_copy, data_id))

    def holds_copy(self, data_id: bytes, was_durable: bool) -> bool:
        """See ``payloads.CopyStore``. The caller refers to the copy: it pardons it. While the index is not in memory,
        what was durable counts.
        """
        if not self._condemned.pardon((data_id,)):
            return False
        known = self._engine.holds_copy(data_id, was_durable) if self._index.in_memory else was_durable
        return known or data_id in self._deferred.copies

    def try_read_copy(self, data_id: bytes) -> memoryview | None:
        """The payload of a data id's whole copy, when it is in memory and undamaged, else None. Never waits for the
        disk. Raises DiskUnusable.
        """
        self._refuse_when_closed()
        if (deferred := self._deferred.copies.get(data_id)) is not None:
            payload = deferred.payload
            return payload[0] if len(payload) == 1 else memoryview(b"".join(payload))
        return self._engine.reader.try_read_copy(data_id, INLINE_READ_BYTES_MAX) if self._index.in_memory else None

    def sync_apart(self) -> None:
        """Everything that was appended or kept before the call is durable when it returns, or the disk is read-only and
        what it holds counts as lost. In any thread but the event loop's and the writer's. Raises RestartNeeded when
        what was kept can't be appended before a restart.
        """
        if self._deferred.pending:
            self._writer.drain()
        self._engine.log.sync_apart()

    async def restore(self, copies: Sequence[tuple[FragmentHeader, bytes]]) -> None:
        """Appends and syncs those of these copies that the disk does not have undamaged, also where it is full up to
        its reserve: they were acknowledged.

        Raises DiskUnusable when there is no room at all. Does nothing on a disk that is read-only, whose fragments
        count as lost.
        """
        await self._in_writer(functools.partial(self._restore, copies))

    def _restore(self, copies: Sequence[tuple[FragmentHeader, bytes]]) -> None:
        engine = self._engine
        for header, payload in copies:
            if engine.state.failure:
                return
            try:
                if not engine.reader.verify(header.id):
                    continue
            except (FragmentMissing, FragmentDamaged):
                pass
            error = engine.append([Write.of(header, [payload])], into_reserve=True)[0]
            if error is not None and not engine.state.failure:
                raise error

    async def _append_deferred(self, ids: Sequence[FragmentId] | None = None) -> None:
        """What was kept before, of these ids or at all, is in the index when it returns, or could not be appended."""
        deferred = self._deferred
        if not deferred.empty and (ids is None or deferred.holds_any(fragment.pack() for fragment in ids)):
            await self._queue.barrier()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def statistics(self) -> FragmentStatistics:
        engine, writer = self._engine, self._writer
        return FragmentStatistics(
            usage=engine.usage(),
            segments=len(engine.log.segments),
            groups=writer.groups,
            writes=writer.writes + self._deferred.appended,
            syncs=engine.log.syncs,
            appended_bytes=engine.log.appended_bytes,
            compacted_bytes=engine.compacted_bytes,
            punched_bytes=engine.punched_bytes,
            checkpoints=writer.checkpoint_count,
            overlay_entries=len(engine.index.overlay),
            queued_bytes=self._queue.queued_bytes,
            damaged_fragments=len(engine.index.damage),
            torn_bytes=self.report.torn_bytes,
            gaps=len(self.report.gaps),
        )

    def _refuse_when_closed(self) -> None:
        """And while the disk hangs."""
        if self._closed:
            raise DiskUnusable("the fragment store is closed", state="failed")
        self._health.check()

    async def _looked_up(self, lookup: Callable[[], T]) -> T:
        """Makes a few lookups here, or in a thread when the index is not in memory."""
        return lookup() if self._index.in_memory else await self._in_reader(lookup)

    async def _in_reader(self, function: Callable[..., T], *args: Any) -> T:
        self._health.check()
        return await self._readers.run(functools.partial(function, *args))

    async def _in_writer(self, call: Callable[[], T]) -> T:
        self._refuse_when_closed()
        return await self._queue.call(call)


def _bounded(ids: Sequence[U]) -> Sequence[U]:
    if len(ids) > BATCH_IDS_MAX:
        raise PeerRefused(f"{len(ids)} fragments in one request; at most {BATCH_IDS_MAX}", remote_code="BAD_REQUEST")
    return ids
