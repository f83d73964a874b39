"""The health of one disk: everything that is known of it in this process, and the disk's own threads.

Theory of operation
    A disk that hangs answers nothing, and says nothing about it. So every operation that may have to wait for the disk
    is noted while it lasts (``begin``, ``end``), and ``look``, which the owner calls again and again, judges the oldest
    one:

    state   when                                                what follows
    ok      none is older than SLOW_S, or was lately
    slow    one is older, or was within the last WELL_S         nothing of this disk that may block runs on the event
                                                                loop; requests are served
    hung    one is older than HUNG_S, or HUNG_LONG_S            requests are refused at once, so that callers ask others

    What was begun before the disk hung goes on: when it ends, the disk is well again. Its late answers go to the
    callers, which may have stopped waiting.

    The disk's stores, its acceptor and its opener note here what they find wrong (``note``, ``clear``), each under its
    own name. ``finding`` is the worst of all that: the state of ``disk_states`` that the node reports. ``latency_ms``
    is how long operations take lately. Whether that is too slow, other disks' latencies decide, and so other modules
    (``cluster.disk_view``). While it is long, or there is a finding, the disk's watch probes the disk: a disk that
    nothing uses any more would never become well.

    A disk's work that blocks runs in threads of that disk (``DiskThreads``), never in a pool that disks share. They are
    daemons: a process ends although they wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from storaged.disk_room import DiskRoom
from storaged.disk_states import HUNG as HUNG
from storaged.disk_states import LATE_MS, Finding, worst
from storaged.disk_states import OK as OK
from storaged.disk_states import SLOW as SLOW
from storaged.errors import DiskUnusable, SlowDown

T = TypeVar("T")

SLOW_S = 0.1
WELL_S = 10.0
HUNG_S = 5.0
"""Half of the time that callers in other nodes wait for an answer. A sync of a busy hard disk takes a second or two."""

HUNG_LONG_S = 60.0
"""As HUNG_S, of work that takes long on a sound disk: a checkpoint, a scan, compaction, a thousand reads in a row."""

JOBS_MAX = 1024
"""That wait for the threads of a disk: beyond, callers get SlowDown."""

LATENCY_PART = 0.2
"""How much of a disk's latency the newest operation decides: seven slow ones in a row make most of it."""

PROBE_MS = 50
"""A disk whose latency is at least this is probed."""


class DiskHealth:
    """The health of one disk. ``begin`` and ``end`` are for any thread, the rest for one."""

    def __init__(
        self, disk: str = "", *, reserve_bytes: int | None = None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """``reserve_bytes``: as configured (``disk_room``)."""
        self.disk = disk
        self.room = DiskRoom(reserve_bytes)
        self.state = OK
        self.hung = False
        """Whether ``state`` is hung."""
        self.reason = ""
        """Which operation has not ended; empty while the disk is not hung."""
        self.hung_count = 0
        """How often the disk hung since the start."""
        self.longest_s = 0.0
        """Of an operation, since the start."""
        self.on_change: Callable[[DiskHealth, str], None] = lambda _health, _before: None
        """Called by ``look`` with the state before, when that changes or the disk begins to be late."""
        self.given_up = ""
        """The state in which the disk must not be used any more in this process; empty while it may."""
        self.late = False
        """An operation has not ended for LATE_MS: the disk is slower than any sound one."""
        self._findings: dict[str, Finding] = {}
        """By who found it."""
        self._latency: dict[str, tuple[float, float]] = {}
        """Of each kind of operation: the mean of the last ones in seconds, and when the last one ended."""
        self._waiting: dict[asyncio.Future[Any], Callable[[], bool] | None] = {}
        self._now_s = now_s
        self._begun: dict[object, tuple[str, float, bool]] = {}
        """What, since when, and whether it takes long on a sound disk."""
        self._slow_s = -WELL_S
        """When an operation was slow last."""

    def begin(self, what: str, *, long: bool = False) -> object:
        """Notes that an operation begins that may wait for the disk. ``long``: it takes long on a sound disk too.
        Returns what ``end`` takes.
        """
        token = object()
        self._begun[token] = what, self._now_s(), long
        return token

    def end(self, token: object) -> None:
        began = self._begun.pop(token, None)
        if began is None:
            return
        what, began_s, long = began
        if long:
            return
        now_s = self._now_s()
        took_s = now_s - began_s
        mean_s, at_s = self._latency.get(what, _NO_LATENCY)
        if at_s < now_s - WELL_S:
            mean_s = 0.0
        self._latency[what] = mean_s + LATENCY_PART * (took_s - mean_s), now_s
        if took_s >= SLOW_S:
            self._slow_s = now_s
            self.longest_s = max(self.longest_s, took_s)

    def latency_ms(self) -> int:
        """How long short operations take: of the slowest kind, or the age of the oldest one that has not ended."""
        since_s = self._now_s() - WELL_S
        means = [mean_s for mean_s, at_s in list(self._latency.values()) if at_s >= since_s]
        return int(1000 * max(self.oldest_s(), *means, 0.0))

    @property
    def wants_probe(self) -> bool:
        """Whether the disk should be used only to see how it does."""
        return not self.given_up and (self.state == HUNG or self.latency_ms() >= PROBE_MS)

    # --- what others find

    def note(self, source: str, state: str, reason: str) -> None:
        """``source`` found this; it takes the place of what it found before. In any thread."""
        self._findings[source] = Finding(state, reason)

    def clear(self, source: str) -> None:
        """``source`` finds nothing wrong any more."""
        self._findings.pop(source, None)

    def give_up(self, source: str, state: str, reason: str) -> None:
        """As ``note``, of a disk that must not be used any more in this process: as if it hung for ever. In any
        thread.
        """
        self.note(source, state, reason)
        self.given_up = state
        self.reason, self.hung = reason, True

    def noted(self, source: str) -> Finding | None:
        return self._findings.get(source)

    def finding(self) -> Finding:
        """The worst of all; OK where there is none."""
        found = list(self._findings.values())
        if self.hung and not self.given_up:
            found.append(Finding(HUNG, self.reason))
        if self.room.few:
            found.append(Finding("full", "its metadata has no room for more"))
        return worst(found)

    # --- whether it answers

    def oldest_s(self) -> float:
        """The age of the oldest operation that has not ended, but for those that take long anyway."""
        return max(
            (self._now_s() - began_s for _, began_s, long in list(self._begun.values()) if not long), default=0.0
        )

    def look(self) -> None:
        """Judges the disk now."""
        if self.given_up:
            self._change(HUNG)
            return
        now_s, oldest_s = self._now_s(), 0.0
        for what, began_s, long in list(self._begun.values()):
            age_s = now_s - began_s
            if age_s >= (HUNG_LONG_S if long else HUNG_S):
                self.late = True
                self.reason = f"{what} has not ended for {age_s:.0f} s"
                self._change(HUNG)
                return
            if not long:
                oldest_s = max(oldest_s, age_s)
        self.reason = ""
        late = oldest_s * 1000 >= LATE_MS
        if late != self.late:
            self.late = late
            if late:
                self.on_change(self, self.state)
        self._change(SLOW if oldest_s >= SLOW_S or now_s - self._slow_s < WELL_S else OK)

    def check(self) -> None:
        """Raises DiskUnusable when the disk hangs."""
        if self.hung:
            raise self._error()

    def fail_when_hung(self, future: asyncio.Future[Any], may_fail: Callable[[], bool] | None = None) -> None:
        """The future, of the loop that calls ``look``, gets DiskUnusable when the disk begins to hang before it is
        done, and ``may_fail`` returns True then.
        """
        self._waiting[future] = may_fail
        future.add_done_callback(self._waiting.pop)

    async def unless_hung(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. Raises DiskUnusable when the disk begins to hang before that; the work goes on."""
        self.check()
        loop = asyncio.get_running_loop()
        task, hung = loop.create_task(work), loop.create_future()
        self.fail_when_hung(hung)
        try:
            await asyncio.wait((task, hung), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                hung.result()
            return task.result()
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            hung.cancel()

    def _error(self) -> DiskUnusable:
        if self.given_up:
            return DiskUnusable(f"Disk {self.disk} is {self.given_up}: {self.reason}.", state=self.given_up)
        return DiskUnusable(f"Disk {self.disk} hangs: {self.reason}.", state=HUNG)

    def _change(self, state: str) -> None:
        before = self.state
        if state == before:
            return
        self.state, self.hung = state, state == HUNG
        self.hung_count += self.hung
        if self.hung:
            for future, may_fail in list(self._waiting.items()):
                if not future.done() and (may_fail is None or may_fail()):
                    future.set_exception(self._error())
        self.on_change(self, before)


_NO_LATENCY = (0.0, 0.0)


def _settle(outcome: asyncio.Future[Any], ended: Future[Any]) -> None:
    if outcome.done():
        return
    if ended.cancelled():
        outcome.cancel()
    elif (error := ended.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(ended.result())


class DiskThreads(Executor):
    """Up to ``count`` daemon threads of one disk. Each job is noted in the disk's health while it runs: as
    work that may take long, but for ``run_short``.
    """

    def __init__(self, health: DiskHealth, count: int, name: str) -> None:
        self._health = health
        self._count = count
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()
        self._stopped = False

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Raises SlowDown, DiskUnusable."""
        future: Future[T] = Future()
        with self._lock:
            if self._stopped:
                raise DiskUnusable(f"the threads of disk {self._health.disk} have been stopped", state="failed")
            if self._jobs.qsize() >= JOBS_MAX:
                raise SlowDown(f"{JOBS_MAX} reads wait for disk {self._health.disk}.")
            self._jobs.put((future, lambda: function(*args, **kwargs)))
            if self._jobs.qsize() > self._idle and len(self._threads) < self._count:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Begins ``work`` in one of the threads. The future gets its result; DiskUnusable when the disk begins to hang.
        A caller that gives up does not end it. Raises as ``submit``.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        begun = self.submit(work)

        def report(ended: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_settle, outcome, ended)

        self._health.fail_when_hung(outcome)
        outcome.add_done_callback(lambda _: begun.cancel())
        begun.add_done_callback(report)
        return outcome

    async def run(self, work: Callable[[], T]) -> T:
        """The result of ``work`` in one of the threads. Raises as ``start``."""
        return await self.start(work)

    async def run_short(self, work: Callable[[], T]) -> T:
        """As ``run``, of work that takes a moment on a sound disk: it shows early that the disk hangs."""
        health = self._health

        def noted() -> T:
            token = health.begin("a read")
            try:
                return work()
            finally:
                health.end(token)

        return await self.start(noted)

    def is_current(self) -> bool:
        """Whether the caller runs in one of the threads."""
        return threading.current_thread() in self._threads

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._stopped = True
            for _ in self._threads:
                self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
            if job is None:
                return
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            token = self._health.begin("work in a thread", long=True)
            try:
                result = work()
            except BaseException as error:  # raised again where it is awaited
                self._health.end(token)
                future.set_exception(error)
            else:
                self._health.end(token)
                future.set_result(result)
            del future, work, job
