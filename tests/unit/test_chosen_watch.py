"""What was seen chosen does not fall back unnoticed."""

from __future__ import annotations

from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import Outcome
from storaged.meta.proposer.chosen import REGISTERS_MAX, ChosenWatch


def name(key: int) -> RegisterName:
    return RegisterName(Table.OBJECT, bytes(16), 0, b"%d" % key)


def value(sequence: int) -> Value:
    return Value(sequence, b"o" * 16, Visibility.LIVE, b"")


def test_sequences_that_grow_are_no_alarm_and_one_that_falls_is() -> None:
    watch = ChosenWatch()
    watch.saw(name(1), Outcome(None, value(1)))
    watch.saw(name(1), Outcome(value(1), value(2)))
    watch.saw(name(1), Outcome(value(7), value(8)))
    watch.saw(name(1), Outcome(None, value(9)))  # a create, which asks nothing
    watch.saw(name(2), Outcome(value(3), value(3)))
    assert watch.falls == 0
    watch.saw(name(1), Outcome(value(8), value(9)))
    assert watch.falls == 1
    assert "from sequence 9 back to 8" in watch.last
    watch.saw(name(1), Outcome(value(9), value(10)))
    assert watch.falls == 1, "one fall is one alarm"


def test_only_so_many_registers_are_remembered() -> None:
    watch = ChosenWatch()
    for key in range(REGISTERS_MAX + 10):
        watch.saw(name(key), Outcome(None, value(5)))
    assert len(watch._sequences) == REGISTERS_MAX
    watch.saw(name(0), Outcome(value(1), value(2)))
    assert watch.falls == 0
    watch.saw(name(REGISTERS_MAX), Outcome(value(1), value(2)))
    assert watch.falls == 1
