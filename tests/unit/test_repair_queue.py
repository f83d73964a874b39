"""The queue of findings, where they do not all fit."""

from __future__ import annotations

import pytest

from storaged.maintain.context import MaintainLimits
from storaged.maintain.health import Finding
from storaged.maintain.repair_queue import RepairQueue
from storaged.meta.names import RegisterName, Table

MAX = 10


def misplaced(key: int, shard: int = 0) -> Finding:
    return Finding(name(key, shard), 2, True, False, False, 0, True)


def endangered(key: int, shard: int = 0) -> Finding:
    return Finding(name(key, shard), 0, True, False, False, 1)


def name(key: int, shard: int) -> bytes:
    return RegisterName(Table.OBJECT, bytes(16), shard, b"%04d" % key).pack()


def prefix(shard: int) -> bytes:
    return name(0, shard)[:18]


@pytest.fixture
def queue() -> RepairQueue:
    return RepairQueue(MaintainLimits(findings_max=MAX))


def test_what_only_has_to_move_leaves_room_for_what_is_endangered(queue: RepairQueue) -> None:
    queue.replace(prefix(0), [misplaced(key) for key in range(3 * MAX)])
    queue.replace(prefix(1), [endangered(key, 1) for key in range(3)])
    queue.set(name(7, 2), endangered(7, 2))
    due = list(queue.due(0.0, recode=False, moves=True))
    assert sum(not finding.misplaced for finding in due) == queue.at_risk == 4
    assert 0 < sum(finding.misplaced for finding in due) <= MAX


def test_what_does_not_fit_counts_as_what_it_is(queue: RepairQueue) -> None:
    queue.replace(prefix(0), [misplaced(key) for key in range(3 * MAX)])
    assert (queue.below_target, queue.misplaced, queue.overflowed) == (0, 3 * MAX, True)
    queue.set(name(0, 1), misplaced(0, 1))
    queue.replace(prefix(2), [endangered(key, 2) for key in range(2 * MAX)])
    assert (queue.below_target, queue.misplaced) == (2 * MAX, 3 * MAX + 1)
    for shard in range(3):
        queue.replace(prefix(shard), [])
    assert (queue.below_target, queue.misplaced, queue.overflowed) == (0, 0, False)


def test_the_smallest_queue_moves_something() -> None:
    queue = RepairQueue(MaintainLimits(findings_max=1))
    queue.replace(prefix(0), [misplaced(0)])
    assert len(list(queue.due(0.0, recode=False, moves=True))) == 1
