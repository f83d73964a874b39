"""One disk's writer thread: it commits in groups, and does the disk's background work between them.

Every write, delete and sync that arrives while the disk is busy goes into the next group: one vectored write, one
fdatasync if any of them asked for durability, one wake-up of the event loop. A lone request waits for no other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import lmdb

from storaged.clock import Clock
from storaged.disk_health import DiskHealth, DiskThreads
from storaged.errors import DiskUnusable, StoragedError
from storaged.fragments.compact import Compactor
from storaged.fragments.deferred import DeferredCopies
from storaged.fragments.engine import Engine
from storaged.fragments.write_queue import Committed, Drain, Job, Stop, WriteQueue
from storaged.lmdb_file import lacks_space

OVERLAYS_MAX = 4
"""Writes wait for a checkpoint during which the overlay has grown to this multiple of its size."""

PUNCHES_WHEN_IDLE = 16

RETRY_S = 1.0
"""How long after a checkpoint for which there was no room it is written again."""


class WriterThread:
    """Runs from its construction until ``stop``. Holds the engine lock while it uses the engine."""

    def __init__(
        self,
        engine: Engine,
        engine_lock: threading.Lock,
        jobs: WriteQueue,
        deferred: DeferredCopies,
        clock: Clock,
        health: DiskHealth,
    ) -> None:
        self._engine = engine
        self._engine_lock = engine_lock
        self._queue = jobs
        self._deferred = deferred
        self._clock = clock
        self._compactor = Compactor(engine)
        self._backlog: deque[Job] = deque()
        self._health = health
        self._checkpoints = DiskThreads(health, 1, "fragment-index")
        self._checkpoint: Future[None] | None = None
        self._unwritten = engine.unwritten
        """For which the disk had no room. It is written as soon as there is some, from ``_retry_at`` on."""
        self._retry_at = 0.0
        self._compact_at: float | None = clock.monotonic() + engine.limits.compact_rest_s
        self.groups = self.writes = self.checkpoint_count = 0
        self._stopping = False
        self._ended = False
        """Nothing is appended any more."""
        self.thread = threading.Thread(target=self._run, name="fragment-write", daemon=True)
        self.thread.start()

    # --- from other threads -----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Returns when what was deferred before is appended; not on the event loop. Raises RestartNeeded when it can't
        be before a restart.
        """
        waiting = Drain()
        self._queue.put(waiting)
        while not waiting.event.wait(0 if self._ended else 1.0):  # after its end the thread answers no caller
            if self._ended or not (self._stopping or self.thread.is_alive()):
                waiting.end(self._deferred.unfinished(ended=self._ended))
        if waiting.error is not None:
            raise waiting.error

    def stop(self) -> None:
        """Has the thread end after what is queued now; ``join`` follows."""
        self._stopping = True
        self._queue.put(Stop())

    def join(self) -> None:
        """Waits for the thread and its checkpoint, appends the deferred copies, and refuses jobs that came too late.
        Blocks.
        """
        self.thread.join()
        self._checkpoints.shutdown(wait=True)
        with self._engine_lock:
            if self._deferred.pending:
                self._queue.post(self._deferred.on_appended, self._deferred.append())
        self._ended = True
        late: list[Job] = []
        while (item := self._queue.get(0)) is not None:
            if isinstance(item, Committed):
                self._committed(item)
            elif isinstance(item, list):
                late.extend(job for job in item if job.claim())
            elif isinstance(item, Drain):
                item.end(self._deferred.unfinished(ended=True))
        closed = DiskUnusable("the fragment store is closed", state="failed")
        self._queue.post(self._queue.resolve, [(job, closed) for job in late])

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopping = False
        while not stopping:
            jobs, drains, stopping = self._collect()
            token = self._health.begin("a write or sync of a segment")
            with self._engine_lock:
                had_queued = self._deferred.queued
                if self._deferred.pending:
                    self._queue.post(self._deferred.on_appended, self._deferred.append())
                for drain in drains:
                    drain.end(self._deferred.unfinished(ended=False))
                if jobs:
                    self.groups += 1
                    self._serve(jobs)
                self._health.end(token)
                if not stopping:
                    token = self._health.begin("background work of the fragments", long=True)
                    self._do_background(busy=bool(jobs) or had_queued)
                    self._health.end(token)

    def _collect(self) -> tuple[list[Job], list[Drain], bool]:
        """(jobs up to the bounds of a group, drains, whether to stop). Waits for the first, or until background work is
        due.
        """
        limits = self._engine.limits
        jobs: list[Job] = []
        drains: list[Drain] = []
        size = 0
        timeout_s = self._background_due_s()
        while len(jobs) < limits.batch_writes_max and size < limits.batch_bytes_max:
            if self._backlog:
                job = self._backlog.popleft()
                if job.claim():
                    jobs.append(job)
                    size += job.write.payload_bytes if job.write is not None else 0
                continue
            item = self._queue.get(0 if jobs else timeout_s)
            if item is None:
                break
            if isinstance(item, Stop):
                return jobs, drains, True
            if isinstance(item, Committed):
                token = self._health.begin("removing a segment", long=True)
                with self._engine_lock:
                    self._committed(item)
                self._health.end(token)
            elif isinstance(item, Drain):
                drains.append(item)
            else:
                self._backlog.extend(item)
            timeout_s = 0
        return jobs, drains, False

    def _serve(self, jobs: list[Job]) -> None:
        """Appends and calls, answers those that need no sync, then syncs and answers the others."""
        left = jobs
        try:
            answers = self._answer(jobs)
            synced = [(job, answer) for job, answer in answers if job.sync and not isinstance(answer, BaseException)]
            if len(synced) < len(answers):
                later = {id(job) for job, _ in synced}
                self._queue.post(
                    self._queue.resolve, [(job, answer) for job, answer in answers if id(job) not in later]
                )
                left = [job for job, _ in synced]
            if synced:
                error = _result_or_error(self._engine.log.sync)
                if error is not None:
                    synced = [(job, error) for job, _ in synced]
                self._queue.post(self._queue.resolve, synced)
        except Exception as error:
            # A mistake in this program or a damaged index: no caller may wait for ever, and nothing more may be written
            # on top of it.
            self._engine.state.fail(f"{type(error).__name__}: {error}", lasting=False)
            failed = DiskUnusable(f"the disk failed: {error}", state="failed")
            self._queue.post(self._queue.resolve, [(job, failed) for job in left])

    def _answer(self, jobs: list[Job]) -> list[tuple[Job, Any]]:
        """All writes of a group are appended together; then the calls are made."""
        answers: list[tuple[Job, Any]] = []
        writes = [(job, job.write) for job in jobs if job.write is not None]
        self.writes += len(writes)
        errors = self._engine.append([write for _, write in writes])
        answers.extend((job, error) for (job, _), error in zip(writes, errors, strict=True))
        answers.extend((job, _result_or_error(job.call)) for job in jobs if job.write is None)
        return answers

    # --- background work --------------------------------------------------------------------------------------------

    def _background_due_s(self) -> float | None:
        """Seconds until background work is due; None: there is none."""
        if self._engine.state.failure:
            return None
        if self._engine.can_punch:
            return 0
        due = [
            at for at in (self._compact_at, self._retry_at if self._unwritten is not None else None) if at is not None
        ]
        return max(0.0, min(due) - self._clock.monotonic()) if due else None

    def _do_background(self, *, busy: bool) -> None:
        """Checkpoints, holes and compaction: a slice of each, smaller when clients wait (``busy``)."""
        engine = self._engine
        if engine.state.failure:
            return
        try:
            engine.log.write_back()
            self._begin_checkpoint_if_due()
            for _ in range(1 if busy else PUNCHES_WHEN_IDLE):
                if not engine.punch():
                    break
            now = self._clock.monotonic()
            if self._compact_at is None:
                self._compact_at = now + engine.limits.compact_rest_s if busy else None
            elif now >= self._compact_at:
                pace_s = engine.limits.compact_step_bytes / engine.limits.compact_bytes_per_s * (4 if busy else 1)
                more = self._compactor.step(engine.limits.compact_step_bytes)
                self._compact_at = now + pace_s if more else None
        except DiskUnusable:
            pass  # the engine has the reason, and every writer gets it
        except (OSError, lmdb.Error) as error:
            engine.state.fail(f"{type(error).__name__}: {error}", lasting=False)

    def _begin_checkpoint_if_due(self) -> None:
        """Begins one in its own thread. Waits for one that takes too long."""
        engine = self._engine
        if self._checkpoint is None:
            checkpoint, self._unwritten = self._unwritten, None
            if checkpoint is not None and self._clock.monotonic() < self._retry_at:
                self._unwritten = checkpoint
            elif checkpoint is not None or engine.checkpoint_due():
                checkpoint = checkpoint or engine.freeze()
                self._checkpoint = self._checkpoints.submit(engine.commit, checkpoint)
                self._checkpoint.add_done_callback(
                    lambda done: self._queue.put(Committed(checkpoint, done.exception()))
                )
        elif len(engine.index.overlay) > OVERLAYS_MAX * engine.limits.overlay_entries_max:
            self._checkpoint.exception()  # waits for its end

    def _committed(self, done: Committed) -> None:
        self._checkpoint = None
        self.checkpoint_count += 1
        if done.error is not None and lacks_space(self._engine.index.directory, done.error):
            self._engine.state.starved = f"checkpoint of the fragment index: {done.error}"
            self._unwritten, self._retry_at = done.checkpoint, self._clock.monotonic() + RETRY_S
            return
        self._engine.state.starved = ""
        if done.error is not None:
            self._engine.state.fail(f"checkpoint of the fragment index: {done.error}", lasting=False)
            return
        try:
            self._engine.thaw(done.checkpoint)
        except OSError as error:
            self._engine.state.fail(f"removing a segment: {error}", lasting=False)


def _result_or_error(call: Callable[[], Any] | None) -> Any:
    """The call's result, or the error that its caller gets."""
    try:
        return call() if call is not None else None
    except StoragedError as error:
        return error
