"""Threads that run in turn with a virtual loop, so that what they do is the same in every run.

The program makes checkpoints and writes pages in threads. Here such a thread runs only while the loop waits for it. At
a *sync point* it stops, the loop goes on for some virtual time, and then lets it run up to the next one. A crash ends
the thread at the sync point where it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Crashed(BaseException):
    """Raised in the thread: its process died. No handler of the program catches it."""


class LockstepThread:
    """One job. ``resume`` runs it up to its next sync point, or to its end."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._crash = False
        self.at = ""
        """The sync point where it stands."""
        self.over = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self, *, crash: bool = False) -> None:
        self._crash = crash
        self._turn.release()
        self._back.acquire()
        if self.over:
            self._thread.join()

    def stop_at(self, point: str) -> None:
        """In the thread: a sync point."""
        self.at = point
        self._back.release()
        self._turn.acquire()
        if self._crash:
            raise Crashed

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._crash:
                self._work()
        except Crashed:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self._back.release()


class LockstepThreads:
    """Of one store: which of them runs now."""

    def __init__(self) -> None:
        self.running: LockstepThread | None = None
        self.alive: list[LockstepThread] = []

    def start(self, work: Callable[[], None]) -> LockstepThread:
        thread = LockstepThread(work)
        self.alive.append(thread)
        return thread

    def resume(self, thread: LockstepThread, *, crash: bool = False) -> bool:
        """Whether it is over. Raises what it raised."""
        self.running = thread
        try:
            thread.resume(crash=crash)
        finally:
            self.running = None
        if thread.over:
            self.alive.remove(thread)
            if thread.error is not None:
                raise thread.error
        return thread.over

    def stop_at(self, point: str) -> None:
        """No-op on the event loop."""
        if self.running is not None:
            self.running.stop_at(point)

    def crash(self) -> None:
        for thread in tuple(self.alive):
            while not self.resume(thread, crash=True):
                pass


class LockstepLock:
    """A lock between such threads. The loop itself must not need to wait for it."""

    def __init__(self, threads: LockstepThreads) -> None:
        self._threads = threads
        self.held = False

    def __enter__(self) -> None:
        while self.held:
            assert self._threads.running is not None, "the event loop would wait for a thread"
            self._threads.stop_at("lock")
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False
