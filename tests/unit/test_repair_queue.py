"""The queue of findings, where they do not all fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from storaged.maintain.context import MaintainLimits
from storaged.maintain.health import DisksNow, Finding
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


NOW = DisksNow(frozenset("ab"), frozenset("a"), frozenset("a"))


@pytest.mark.parametrize(
    ("judged_by", "again"),
    [
        ({}, False),
        ({"unheard": ("a",)}, True),
        ({"unheard": ("c",)}, False),
        ({"unwritable": ("a",)}, True),
        ({"unwritable": ("b",)}, False),
        ({"no_room": frozenset("a")}, False),
        ({"no_room": frozenset("ab")}, True),
    ],
)
def test_what_was_judged_by_other_disks_is_judged_again(
    queue: RepairQueue, judged_by: dict[str, Any], again: bool
) -> None:
    waiting = replace(endangered(0), repairable=False, **judged_by)
    queue.set(waiting.name, waiting)
    assert queue.judged_before(NOW, 0.0) == [waiting.name] * again
    queue.set(waiting.name, replace(waiting, repairable=True))
    assert queue.judged_before(NOW, 0.0) == []
    queue.back_off(waiting.name, 0.0, "it failed")
    assert queue.judged_before(NOW, 1.0) == [waiting.name] * again


def test_what_was_tried_in_vain_for_another_finding_does_not_count(queue: RepairQueue) -> None:
    found = endangered(0)
    queue.set(found.name, found)
    queue.back_off(found.name, 0.0, "it failed")
    queue.set(found.name, replace(found, no_room=frozenset("a")))
    assert list(queue.due(1.0, recode=False, moves=True)) == []
    assert queue.unrepaired(NOW, "4+2") == {"it failed": 1}
    queue.set(found.name, replace(found, spare=1))
    assert [one.name for one in queue.due(1.0, recode=False, moves=True)] == [found.name]
    assert queue.unrepaired(NOW, "4+2") == {}
