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
    assert taken(queue) == [waiting.name] * again
    queue.set(waiting.name, replace(waiting, repairable=True))
    assert taken(queue) == []
    queue.back_off(waiting.name, 0.0, "it failed")
    assert taken(queue, now=1.0) == [waiting.name] * again
    assert taken(queue, now=1e9) == [], "repair tries it now"
    assert taken(queue, now=1.0) == []
    queue.back_off(waiting.name, 0.0, "it failed again")
    assert taken(queue, now=1.0) == [waiting.name] * again


def taken(queue: RepairQueue, now: float = 0.0, limit: int = MAX, looked: bool = False) -> list[bytes]:
    """Takes what is judged again now, and gives it back, ``looked`` at or not."""
    found = queue.take_changed(NOW, now, limit)
    assert queue.judged_again(found if looked else [], [] if looked else found, NOW, now) == (looked and bool(found))
    return found


def waiting_for(disks: str, key: int, spare: int = 0) -> Finding:
    return replace(endangered(key), repairable=False, spare=spare, unheard=tuple(disks))


def test_what_has_the_fewest_spare_fragments_is_judged_again_first_and_in_vain_last(queue: RepairQueue) -> None:
    for key, spare in enumerate((2, 0, 1, 0)):
        queue.set(name(key, 0), waiting_for("ab", key, spare))
    order = [name(key, 0) for key in (1, 3, 2, 0)]
    assert taken(queue) == order
    assert [taken(queue, limit=1, looked=True) for _ in range(6)] == [[one] for one in (*order, *order[:2])]
    queue.set(name(9, 0), waiting_for("b", 9, 2))
    assert taken(queue) == [name(9, 0), *order[2:], *order[:2]], "what is new comes before what was in vain"
    queue.set(name(3, 0), waiting_for("a", 3))
    assert taken(queue)[:2] == [name(3, 0), name(9, 0)], "another finding was not looked at in vain"
    queue.set(name(1, 0), None)
    queue.replace(prefix(0), [waiting_for("a", 2), waiting_for("c", 5)])
    assert taken(queue) == [name(2, 0)]
    queue.replace(prefix(0), [])
    assert taken(queue) == []
    assert len(queue._rejudging) == 0


def test_a_look_costs_what_it_takes_and_not_the_whole_queue() -> None:
    """A hundred thousand findings were sorted twice a second, on the event loop."""
    queue, count = RepairQueue(MaintainLimits()), 20_000

    class Name(bytes):
        """Counts how often names are compared or hashed: each look at a finding does one of these."""

        used = 0

        def __hash__(self) -> int:
            Name.used += 1
            return super().__hash__()

        def __lt__(self, other: bytes) -> bool:
            Name.used += 1
            return super().__lt__(other)

    for key in range(count):
        one = Name(name(key, key % 16))
        queue.set(one, replace(waiting_for("bc", key), name=one))
    for limit, disks in ((MAX, NOW), (MAX, DisksNow(frozenset("d"), frozenset("d"), frozenset()))):
        Name.used = 0
        found = queue.take_changed(disks, 0.0, limit)
        queue.judged_again(found, [], disks, 0.0)
        assert len(found) == (limit if disks is NOW else 0)
        assert Name.used < 100 * limit


def test_what_is_judged_again_and_again_takes_no_more_room(queue: RepairQueue) -> None:
    for _ in range(100):
        for key in range(MAX):
            queue.set(name(key, 0), waiting_for("abc", key))
    assert max(len(heap) for heap in queue._rejudging._heaps.values()) <= 2 * MAX + 65
    assert taken(queue) == [name(key, 0) for key in range(MAX)]


def test_counts_follow_what_comes_and_goes(queue: RepairQueue) -> None:
    part = RegisterName(Table.PART, bytes(16), 0, b"u" * 20).pack()
    lost = replace(endangered(1), lost=True, spare=-1)
    for finding in (endangered(0), lost, replace(endangered(2), spare=-1), replace(endangered(3), name=part)):
        queue.set(finding.name, finding)
    queue.replace(prefix(1), [replace(misplaced(4, 1), outdated=True)])
    counts = queue.below_target, queue.parts_below_target, queue.lost, queue.unreadable, queue.at_risk
    assert (*counts, queue.misplaced, queue.outdated) == (3, 1, 1, 1, 1, 1, 1)
    queue.set(lost.name, replace(lost, lost=False, spare=0))
    assert (queue.lost, queue.unreadable, queue.at_risk) == (0, 1, 2)
    for shard in (0, 1):
        queue.forget(prefix(shard))
    queue.set(part, None)
    counts = queue.below_target, queue.parts_below_target, queue.lost, queue.unreadable, queue.at_risk
    assert (*counts, queue.misplaced, queue.outdated) == (0, 0, 0, 0, 0, 0, 0)


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
