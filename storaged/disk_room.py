"""The room of one disk: which rows it still takes while it fills up. Pure.

Theory of operation
    A disk without any free space can't even delete: LMDB writes new pages before it frees old ones, and a deletion is
    a record in a log. So a part of each disk is a *reserve* (``limits.reserve_bytes``), and what a write is for decides
    how much of the reserve it leaves free:

    what                                                            leaves free
    fragments and small copies of clients' writes                   all of the reserve
    rows of clients' writes: records, inline bodies, parts          three quarters
    rows and small copies of settling rounds, catch-up and moves;
    delete markers, rows of the system table, manifest pages        half
    deletes, and all that makes no row longer; fences, floors,
    promises; notes of the fragment store, compaction               nothing: they give back more than they take

    Gateways stop a little earlier, at seven eighths (``DiskRoom.few``). So clients get a clear answer before a disk
    has to refuse in the middle of a change, whose outcome may then be unknown.

    Rows take the free pages of LMDB's file first, which deleted rows have left, and new pages after those. Both are
    room. LMDB copies the pages that it changes, and so takes more for a moment: the last half of the reserve has that.
    A memory map that can't grow is a bound as well as the file system is, with a reserve of its own.

    Requests subtract from a number in memory (``take``). A thread of the disk sets it again every second (``look``):
    no write asks the file system.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

UNKNOWN_BYTES = 1 << 62
"""The room before the first look: what is not known refuses nothing."""

ROW_BYTES = 256
"""What a row takes at most besides its value, as a rule: its key, its ballot, and its share of pages."""


class Use(IntEnum):
    """What a write is for."""

    DATA = 0
    ROWS = 1
    SETTLING = 2
    FREEING = 3


_EIGHTHS = (8, 6, 4, 0)
_FEW_EIGHTHS = 7
_AMPLE_PART = 16


class Bound(NamedTuple):
    """``free_bytes``: what rows could take if there were no reserve."""

    free_bytes: int
    reserve_bytes: int

    def left_for(self, use: Use) -> int:
        return self.free_bytes - stays_free(use, self.reserve_bytes)


def reserve_of(total_bytes: int, configured: int | None) -> int:
    """The reserve of a file system of this size. ``configured``: None means a twentieth."""
    return total_bytes // 20 if configured is None else configured


def stays_free(use: Use, reserve_bytes: int) -> int:
    """How much of the reserve a write for ``use`` leaves free."""
    return reserve_bytes * _EIGHTHS[use] // 8


class DiskRoom:
    """What rows may still take on one disk. ``take`` and ``refuses`` are for the event loop, ``look`` for a thread."""

    __slots__ = ("ample", "few", "left_bytes", "reserve_bytes", "settling_bytes", "taken_bytes")

    def __init__(self, reserve_bytes: int | None = None) -> None:
        self.reserve_bytes = reserve_bytes
        """As it is configured (``reserve_of``)."""
        self.left_bytes = UNKNOWN_BYTES
        """For rows of clients' writes; below zero when they have no room."""
        self.settling_bytes = 0
        """For rows of settling rounds, besides."""
        self.taken_bytes = 0
        """By rows since the start."""
        self.few = False
        """Gateways should send no more rows that take room."""
        self.ample = False
        """Rows have room outside of the reserve: free pages that deleted rows have left, which nothing else can use."""

    def take(self, value_bytes: int) -> bool:
        """A row is about to be written. False: ``refuses`` decides whether there is room for it."""
        size = value_bytes + ROW_BYTES
        self.taken_bytes += size
        self.left_bytes -= size
        return self.left_bytes >= 0

    def refuses(self, use: Use) -> bool:
        """Whether rows for ``use`` have no room now."""
        if use is Use.FREEING:
            return False
        return self.left_bytes + (self.settling_bytes if use is Use.SETTLING else 0) < 0

    def look(self, bounds: tuple[Bound, ...], pending_bytes: int) -> None:
        """Sets what is left within all of the bounds. ``pending_bytes``: of rows that were taken and that the bounds do
        not show yet.
        """
        rows = min(bound.left_for(Use.ROWS) for bound in bounds) - pending_bytes
        self.settling_bytes = min(bound.left_for(Use.SETTLING) for bound in bounds) - pending_bytes - rows
        self.left_bytes = rows
        self.ample = all(
            bound.left_for(Use.DATA) - pending_bytes > bound.reserve_bytes // _AMPLE_PART for bound in bounds
        )
        times = 2 if self.few else 1  # so that it does not come and go
        self.few = any(
            bound.left_for(Use.ROWS) - pending_bytes
            < times * (bound.reserve_bytes * _FEW_EIGHTHS // 8 - stays_free(Use.ROWS, bound.reserve_bytes))
            for bound in bounds
        )
