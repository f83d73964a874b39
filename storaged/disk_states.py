"""The states of a disk as a table: what a disk in each state is used for. Pure.

Theory of operation
    Everything that goes wrong with a disk is a *finding*: its source (which store, which watch), a state of ``STATES``,
    and a reason. The disk's own object collects them (``disk_health.DiskHealth``), and the worst one is what its node
    reports. Other nodes look the report up in the same table. Two findings more come from elsewhere: the layout says
    that a disk drains, and comparison says that it is slow (``outliers``), which no disk can know by itself.

    ``YES``: it is used. ``LAST``: only where the others do not suffice. ``NO``: it is not asked. What a disk is used
    for is the least that all its findings allow (``meet``), so a finding more never makes a disk more trusted.

    A state that is not in the table comes from another version: such a disk is used for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple


class Trust(IntEnum):
    """Whether a disk is used for something."""

    NO = 0
    LAST = 1
    YES = 2


NO, LAST, YES = Trust.NO, Trust.LAST, Trust.YES


class Rights(NamedTuple):
    """``reads``: of fragments and copies. ``writes``: of new fragments. ``votes``: its replica is asked."""

    reads: Trust
    writes: Trust
    votes: Trust


class State(NamedTuple):
    """``problem``: the code under which ``status`` shows it; empty: it is none."""

    rights: Rights
    problem: str = ""


OK, SLOW, FULL, READ_ONLY, HUNG, FAILED = "ok", "slow", "full", "read-only", "hung", "failed"
DRAINING, AWAY, UNREADABLE, CHECKING = "draining", "", "unreadable", "checking"

ALL = Rights(YES, YES, YES)
NONE = Rights(NO, NO, NO)
_NO_WRITES = Rights(YES, NO, YES)

STATES: Mapping[str, State] = {
    OK: State(ALL),
    SLOW: State(Rights(LAST, LAST, LAST), "DISK_SLOW"),
    DRAINING: State(_NO_WRITES),
    FULL: State(_NO_WRITES, "DISK_FULL"),
    READ_ONLY: State(_NO_WRITES, "DISK_READ_ONLY"),
    HUNG: State(NONE, "DISK_HUNG"),
    CHECKING: State(NONE, "DISK_CHECKED"),
    FAILED: State(NONE, "DISK_DOWN"),
    UNREADABLE: State(NONE, "DISK_UNREADABLE"),
    "index-damaged": State(NONE, "INDEX_DAMAGED"),
    "waiting": State(NONE, "DISK_WAITS"),
    "blank": State(NONE, "DISK_BLANK"),
    "rolled-back": State(NONE, "DISK_ROLLED_BACK"),
    "damaged": State(NONE, "DISK_DAMAGED"),
    "foreign": State(NONE, "DISK_FOREIGN"),
    "lost": State(NONE, "DISK_LOST"),
    AWAY: State(NONE),
}
"""From the best to the worst: of several findings the last one here is reported. ``AWAY``: the disk's node does not
answer, or does not have it.
"""

SOUND = frozenset((OK, SLOW, FULL))
"""A disk in one of these states takes part in everything for which it has room."""

UNKNOWN = State(NONE, "DISK_DOWN")
"""Of a state that is not in the table."""

_RANK = {state: rank for rank, state in enumerate(STATES)}

LATE_MS = 500
"""A disk is slow when an operation that a sound disk does in a moment has not ended after this time."""

SLOW_MS = 150
SLOW_TIMES = 10
"""A disk whose usual latency is at least ``SLOW_MS``, and ``SLOW_TIMES`` that of the other disks, is slow. It is well
again below half of that. On a machine that is overloaded all disks are slow, and so none is.
"""

LEFT_OUT_PART = 3
"""At most a third of the disks is left out for being slow. When more seem slow, this process itself is slow."""


class Finding(NamedTuple):
    """``state``: one of ``STATES``. ``reason``: for the operator."""

    state: str = OK
    reason: str = ""


FINE = Finding()


def of(state: str) -> State:
    return STATES.get(state, UNKNOWN)


def worst(findings: Iterable[Finding]) -> Finding:
    """The one that is reported: of a state that is not in the table before all others."""
    return max(findings, key=lambda finding: _RANK.get(finding.state, len(_RANK)), default=FINE)


def outliers(latency_ms: Mapping[str, int], before: frozenset[str] = frozenset()) -> frozenset[str]:
    """The disks that are much slower than the others. ``latency_ms``: of all disks that can be read now. ``before``:
    those that were slow at the last judgement, which need to be well to leave.

    Compared with the median of all; fewer than three disks can't be compared.
    """
    if len(latency_ms) < 3 or max(latency_ms.values()) < SLOW_MS // 2:
        return frozenset()
    usual = sorted(latency_ms.values())[(len(latency_ms) - 1) // 2]
    bound = max(SLOW_MS, SLOW_TIMES * usual)
    return frozenset(disk for disk, took in latency_ms.items() if took >= (bound // 2 if disk in before else bound))


def left_out(doubted: Iterable[str], usable: int) -> frozenset[str]:
    """Which of the disks that seem slow are not used while others suffice: all, or none when they are too many of the
    ``usable`` ones.
    """
    found = frozenset(doubted)
    return found if len(found) <= usable // LEFT_OUT_PART else frozenset()
