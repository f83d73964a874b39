"""Whether one disk's fragment store takes writes: its failure, if it has one, and its free space. Both are noted in the
disk's health.

A failure makes the disk read-only. One that *lasts* is noted on the disk, and by the disk's owner on another one, so
that the next start knows it: what such a disk holds counts as lost.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from storaged.disk_health import DiskHealth
from storaged.disk_room import Use, reserve_of, stays_free
from storaged.disk_states import FULL, OK, READ_ONLY
from storaged.errors import DiskUnusable
from storaged.fragments.files import Files, Space
from storaged.fragments.limits import StoreLimits
from storaged.units import MIB, format_size

REFUSED_BYTES_MAX = MIB
"""A disk that refused a write stays full until this much more than its reserve is free, or as much as the write had,
when that is less. Otherwise it would take some writes and refuse others, and the cluster would not know whether to
count on it.
"""


REFUSED_S = 10.0
"""A disk counts as full for this time after a write that found no space, whatever the file system reports as free: a
quota may bound it.
"""

FRAGMENTS, SPACE = "fragments", "space"
"""Sources of findings."""


class DiskState:
    """``health``: of the disk. The owner puts its own there before anything else is called."""

    def __init__(self, files: Files, limits: StoreLimits) -> None:
        self.health = DiskHealth()
        self._files = files
        self._limits = limits
        self._failure = ""
        self._starved = ""
        self.lost = False
        """The failure lasts: what the disk holds counts as lost, now and after a restart."""
        self._failure_noted = True
        self._noting = threading.RLock()
        """Held while a failure that lasts is noted."""
        self.note_failed: Callable[[str], bool] = lambda _reason: False
        """Called with the reason in the thread that found a lasting failure, before the disk itself is marked: the
        owner notes it on another disk. Returns whether it did. Must not raise."""
        self.spare_bytes = 0
        """What fragments could take, when that was looked at last."""
        self._known_space: Space | None = None
        """What ``look`` found last; None before the first."""
        self._reserve_held = False
        self._refused_bytes = 0
        self._refused_until_s = 0.0
        self._refusal = ""

    @property
    def failure(self) -> str:
        """Why the disk is read-only; empty while it is not."""
        return self._failure

    @failure.setter
    def failure(self, reason: str) -> None:
        self._failure = reason
        self._note()

    @property
    def starved(self) -> str:
        """Why the index can't take what is in memory now: there is no room. No fragments are taken until it can."""
        return self._starved

    @starved.setter
    def starved(self, reason: str) -> None:
        self._starved = reason
        self._note()

    def _note(self) -> None:
        if self._failure:
            self.health.note(FRAGMENTS, READ_ONLY, self._failure)
        elif self._starved:
            self.health.note(FRAGMENTS, FULL, self._starved)
        else:
            self.health.clear(FRAGMENTS)

    def fail(self, reason: str, *, lasting: bool = True) -> None:
        """The disk is read-only from now on. ``lasting``: after a restart too, because what it holds may not be on the
        drive.
        """
        if not lasting:
            self.failure = reason
            return
        with self._noting:
            self.failure = reason
            self.lost = True
            noted = self.note_failed(reason)
            self._failure_noted = self._files.mark_failed(reason) or noted

    @property
    def failure_noted(self) -> bool:
        """Whether the next start will know of a failure that lasts. Waits while it is being noted: nothing may count on
        the note before.
        """
        with self._noting:
            return self._failure_noted

    def look(self) -> None:
        """Asks the file system for its free space. In a thread, again and again: it may not answer."""
        self._known_space = self._space()

    def found_no_space(self, error: OSError) -> None:
        """A write was refused for want of space, or of quota, and taken back."""
        self._refusal = os.strerror(error.errno or 0)
        self._refused_until_s = time.monotonic() + REFUSED_S
        self.health.note(SPACE, FULL, self._refusal)

    def unusable(self, space: Space | None = None) -> DiskUnusable:
        """The error for a write that the disk can't take."""
        if self.failure:
            return DiskUnusable(f"the disk is read-only: {self.failure}", state="read-only")
        if self.starved:
            return DiskUnusable(f"the disk is full: {self.starved}", state="full")
        if time.monotonic() < self._refused_until_s:
            return DiskUnusable(f"the disk, or a quota, is full: it refused a write ({self._refusal})", state="full")
        space = space or self._space()
        return DiskUnusable(f"the disk is full up to its reserve: {format_size(space.free)} are free", state="full")

    def refusal(self, count: int, *, into_reserve: bool = False, on_loop: bool = False) -> DiskUnusable | None:
        """Why the disk refuses ``count`` more bytes of fragments now; None when it does not. In any thread.
        ``into_reserve``: as for a settling round (``disk_room``). ``on_loop``: what ``look`` found will do, since the
        event loop must not wait for the disk.
        """
        if self.failure or self.starved:
            return self.unusable()
        space = (self._known_space if on_loop else None) or self._space()
        reserve = self._reserve_bytes(space)
        self.spare_bytes = space.free - reserve
        if space.free - stays_free(Use.SETTLING if into_reserve else Use.DATA, reserve) < count:
            self._refused_bytes = min(count, REFUSED_BYTES_MAX)
            return self.unusable(space)
        return None

    def describe(self) -> tuple[str, int]:
        """(ok, full or read-only; bytes that fragments can take). On the event loop."""
        space = self._known_space or self._space()
        spare = space.free - self._reserve_bytes(space)
        if spare >= self._refused_bytes:
            self._refused_bytes = 0
        refused = time.monotonic() < self._refused_until_s
        full = refused or spare < self._refused_bytes
        if full and self.health.noted(SPACE) is None:
            self.health.note(SPACE, FULL, f"{format_size(max(0, spare))} are free outside of the reserve")
        elif not full:
            self.health.clear(SPACE)
        full = full or bool(self.starved)
        state = READ_ONLY if self.failure else FULL if full else OK
        return state, max(0, spare)

    def hold_note_reserve(self) -> None:
        """Takes the reserve for notes, unless it is held."""
        if not self._reserve_held:
            self._reserve_held = self._files.reserve(self._limits.note_reserve_bytes)

    def release_note_reserve(self) -> bool:
        """Gives the reserve for notes back to the file system. Returns whether it was held."""
        held = self._reserve_held
        if held:
            self._reserve_held = not self._files.reserve(0)
        return held

    def _reserve_bytes(self, space: Space) -> int:
        return reserve_of(space.total, self._limits.reserve_bytes)

    def _space(self) -> Space:
        """What the file system says. One that does not answer any more fails this disk; the process and its other
        disks go on.
        """
        try:
            return self._files.space()
        except OSError as error:
            if not self.failure:
                self.fail(f"its directory does not answer: {error.strerror or error}", lasting=False)
            return Space(0, 0)
