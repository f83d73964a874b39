"""How far the moves to where the layout in force wants things have come, as two jobs of the whole cluster.

What is done and what is left comes from the records of partitions, and from the walks of storage nodes, not from what
some process has counted. So every gateway shows the same, and none forgets it with a restart. Only the rate is measured
here: over the last minutes, between looks of this process.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from storaged.clock import Clock
from storaged.cluster.layout import PARTITIONS
from storaged.cluster.move_settings import FRAGMENTS, JOBS, UNKNOWN, MoveSettings, is_paused
from storaged.cluster.move_settings import PARTITIONS as PARTITIONS_JOB
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionState, is_settled
from storaged.cluster.ports import Layouts
from storaged.cluster.rpc.faults import plain
from storaged.cluster.succession import GENERATION
from storaged.errors import ServiceUnavailable
from storaged.maintain.job import JobReport
from storaged.maintain.repair_queue import REASON_CHARS_MAX
from storaged.maintain.status import REASONS_MAX, MaintainStatus

WINDOW_S = 300.0
LOOK_S_MIN = 1.0
"""Looks that follow each other faster than this are one."""
CLUSTER = "cluster"
"""The node of these jobs, as ``status`` shows it."""


class Counted(NamedTuple):
    """Of a job. ``total`` is 0 while it is not known."""

    done: int
    total: int

    @property
    def left(self) -> int:
        return self.total - self.done


class PartitionCounts(NamedTuple):
    """``joint``: those under way."""

    counted: Counted
    joint: int


def count_partitions(layouts: Layouts, records: PartitionMap) -> PartitionCounts | None:
    """Those that moved towards the layout in force, and those that have to; None while it is not known where they are.

    A layout that moves nothing may follow meanwhile. So a record counts from the last one on that moved data.
    """
    layout = records.target(layouts.current)
    if not layout.base and layout is layouts.current and not records.steps:
        return PartitionCounts(Counted(0, 0), 0)
    since = layout.epoch // GENERATION * GENERATION
    done = left = joint = 0
    try:
        for number in range(PARTITIONS):
            state: PartitionState = layouts.partition(number)
            if not is_settled(state, layout):
                left += 1
                joint += bool(state.coming)
            elif (record := records.record(number)) is not None and record.layout >= since:
                done += 1
    except ServiceUnavailable:
        return None
    return PartitionCounts(Counted(done, done + left), joint)


def count_objects(statuses: Sequence[MaintainStatus]) -> Counted:
    """Objects and parts with fragments. Those that are below their target count as done: they are repair's."""
    total, left = sum(status.judged for status in statuses), sum(status.misplaced for status in statuses)
    total = max(total, left)  # the first walk of a node has not ended
    return Counted(total - left, total)


def what_is_left(statuses: Sequence[MaintainStatus], profile: str) -> str:
    """What ``status`` says of the objects and parts that are left; empty when it has no more to say. ``profile``: of
    the layout in force.
    """
    outdated = sum(status.outdated for status in statuses)
    found = [f"{outdated} others get profile {profile}"] if outdated else []
    unmoved = sum_of(status.unmoved for status in statuses).most_common(1)
    found += [f"{count} did not move when that was tried: {reason}" for reason, count in unmoved]
    return "; ".join(found)


def sum_of(reasons: Iterable[Sequence[tuple[str, int]]]) -> Counter[str]:
    """Of the reasons of all nodes, which may say anything."""
    found = Counter[str]()
    for some in reasons:
        for reason, count in some[:REASONS_MAX]:
            found[plain(reason, REASON_CHARS_MAX)] += count
    return found


class MoveProgress:
    """Remembers what was left at earlier looks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._looks: dict[str, deque[tuple[float, int]]] = {job: deque() for job in JOBS}

    def jobs(
        self,
        partitions: PartitionCounts | None,
        objects: Counted,
        settings: MoveSettings,
        reason: str,
        left: str = "",
    ) -> list[JobReport]:
        """The jobs that have something left. ``partitions``: None while it is not known. ``reason``: why some partition
        can't move now. ``left``: ``what_is_left``.
        """
        found: list[JobReport] = []
        if partitions is not None:
            under_way = f"; {partitions.joint} are under way" if partitions.joint else ""
            waits = f"; {reason}" if reason else ""
            found = self._job(PARTITIONS_JOB, partitions.counted, settings, "partitions", under_way + waits)
        return found + self._job(FRAGMENTS, objects, settings, "objects", f"; {left}" if left else "")

    def _job(self, job: str, counted: Counted, settings: MoveSettings, unit: str, more: str) -> list[JobReport]:
        """Empty when nothing is left. ``unit`` and ``more`` are for its detail."""
        per_s = self._look(job, counted.left)
        if not counted.left:
            return []
        paused = is_paused(settings, job)
        state = "waiting" if settings is UNKNOWN else "paused" if paused else "running"
        detail = f"{counted.done} of {counted.total} {unit} are where the layout wants them{more}"
        rate = f"{60 * per_s:.0f}/min" if per_s else ""
        eta_s = counted.left / per_s if per_s and not paused else None
        return [JobReport(job, CLUSTER, state, counted.done, counted.total, rate, eta_s, detail)]

    def _look(self, job: str, left: int) -> float:
        """How many a second were done lately; 0 while that is not known, or more has come than was done."""
        now, looks = self._clock.monotonic(), self._looks[job]
        if not left or (looks and left > looks[-1][1]):
            looks.clear()  # another layout, or a walk that found more
        if not looks or now - looks[-1][0] >= LOOK_S_MIN:
            looks.append((now, left))
        while looks[0][0] < now - WINDOW_S:
            looks.popleft()
        since, before = looks[0]
        return (before - left) / (now - since) if now - since >= LOOK_S_MIN else 0.0
