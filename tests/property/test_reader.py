"""A read as a state machine, against replicas that hold what interrupted writes have left.

Answers come in any order, or not at all. What a read reports is what a majority holds, or the newest value, accepted by
a majority before it is reported.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.meta.consensus.change import Shared
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.reader import (
    DONE,
    FAILED,
    HEARING,
    READ_TRANSITIONS,
    SETTLING,
    STALE,
    WAITING,
    Reader,
    ReadEvent,
    ReadState,
    RowComparison,
)
from storaged.meta.consensus.register import RULES, Ballots, Verdict, digest_of
from storaged.meta.messages import ReadReply
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value, Visibility
from tests.examples import examples

QUORUMS = (Quorum(("a", "b", "c")), Quorum(("a", "b", "c", "d", "e")), Quorum(("a", "b", "c"), ("b", "c", "d")))


def made(counter: int, payload: bytes = b"", body: bytes = b"v") -> tuple[Ballot, Value]:
    """What the proposer of this ballot has written; odd ones were created."""
    operation = b"c" * 14 + (bytes(2) if counter % 2 else b"\0\1")
    sequence = 1 if counter % 2 else counter
    return Ballot(1, counter, "n", b"incarnat"), Value(sequence, operation, Visibility.LIVE, body, payload)


class World:
    def __init__(self, draw: random.Random) -> None:
        self.random = draw
        self.quorum = draw.choice(QUORUMS)
        self.trouble = draw.choice((0.0, 0.1, 0.4))
        table = draw.choice((Table.OBJECT, Table.OBJECT, Table.SYSTEM))
        history = [made(counter, b"copy" if draw.random() < 0.3 else b"") for counter in range(1, 5)]
        self.held: dict[str, tuple[Ballot, Value | None]] = {}
        for disk in self.quorum.disks:
            written = draw.randrange(5) if draw.random() < 0.5 else 4
            self.held[disk] = history[written - 1] if written else (ZERO_BALLOT, None)
        self.one_ballot_two_values = draw.random() < 0.05
        if self.one_ballot_two_values:
            self.held[draw.choice(self.quorum.disks)] = made(4, body=b"another value under one ballot")
        self.stale = draw.random() < 0.2
        lying = draw.choice(self.quorum.disks) if table == Table.SYSTEM and draw.random() < 0.3 else ""
        shared = Shared(Ballots("n", lambda: b"incarnat"), RULES, {}, lambda _name, disk, _value: disk == lying)
        self.machine = Reader(shared, draw.random() < 0.8, RegisterName(table, bytes(16), 0, b"key"))
        self.wire: list[Callable[[], None]] = []
        self.seen: set[tuple[ReadState, ReadEvent, ReadState]] = set()

    def do(self, event: ReadEvent, call: Callable[[], bool]) -> None:
        machine = self.machine
        before = machine.state
        if not call():
            assert machine.state is before
            return
        assert machine.state in READ_TRANSITIONS[before].get(event, ()), (before, event, machine.state)
        self.seen.add((before, event, machine.state))
        if machine.state is HEARING:
            for disk in machine.view.quorum.disks:
                self.wire.append(lambda disk=disk, turn=machine.turn: self.read(disk, turn))  # type: ignore[misc]

    def read(self, disk: str, turn: int) -> None:
        ballot, value = self.held[disk]
        reply: ReadReply | None = ReadReply(Verdict.OK, ballot, digest_of(value), value)
        if self.random.random() < self.trouble:
            reply = ReadReply(Verdict.EPOCH) if self.stale and self.random.random() < 0.7 else None
        self.do(ReadEvent.REPLIED, lambda: self.machine.replied(turn, disk, reply))

    def play(self) -> None:
        machine = self.machine
        view = View.of(self.random.choice((1, 1, 1, 2)), *self.quorum.sets)
        self.do(ReadEvent.BEGIN, lambda: machine.begin(view))
        while machine.state not in (DONE, FAILED, SETTLING):
            chance = self.random.random()
            if chance < 0.05 * self.trouble or not (self.wire or machine.state in (WAITING, STALE)):
                self.do(ReadEvent.EXPIRE, machine.expire)
            elif machine.state is WAITING and (chance < 0.4 or not self.wire):
                self.do(ReadEvent.WAITED, machine.waited)
            elif machine.state is STALE and chance < 0.5:
                self.do(ReadEvent.BEGIN, lambda: machine.begin(view))
            elif self.wire:
                self.wire.pop(self.random.randrange(len(self.wire)))()
            elif machine.state is STALE:
                self.do(ReadEvent.EXPIRE, machine.expire)


@settings(max_examples=examples(400), deadline=None)
@given(st.integers(0, 1 << 32))
def test_what_is_reported_is_held_by_a_quorum_and_nothing_chosen_is_missed(seed: int) -> None:
    world = World(random.Random(seed))
    ballots = {disk: ballot for disk, (ballot, _) in world.held.items()}
    chosen = world.quorum.agreed(ballots)
    world.play()
    machine = world.machine
    if machine.state is not DONE or world.one_ballot_two_values:
        return
    if chosen is not None:
        assert chosen == ZERO_BALLOT or (machine.value is not None and machine.value == made_value(world, chosen))
    holders = [disk for disk, (_, value) in world.held.items() if value == machine.value]
    assert world.quorum.met(holders), "what was reported stays"


def made_value(world: World, ballot: Ballot) -> Value | None:
    return next(value for its, value in world.held.values() if its == ballot)


def test_the_table_of_reads_holds_what_the_machine_does_and_nothing_else() -> None:
    seen: set[tuple[ReadState, ReadEvent, ReadState]] = set()
    for seed in range(6_000):
        world = World(random.Random(seed))
        world.play()
        seen |= world.seen
    table = {
        (state, event, after)
        for state, events in READ_TRANSITIONS.items()
        for event, states in events.items()
        for after in states
    }
    assert seen <= table
    assert table - seen == set()


@pytest.mark.parametrize(
    ("table", "gateway", "state"),
    [
        (Table.OBJECT, True, SETTLING),
        (Table.OBJECT, False, SETTLING),
        (Table.SYSTEM, True, SETTLING),
        (Table.SYSTEM, False, FAILED),
    ],
)
def test_a_value_that_no_quorum_holds_is_settled_and_of_the_system_table_by_gateways_alone(
    table: Table, gateway: bool, state: ReadState
) -> None:
    machine = Reader(
        Shared(Ballots("n", lambda: b"incarnat"), RULES, {}), gateway, RegisterName(table, bytes(16), 0, b"key")
    )
    machine.begin(View.of(1, *QUORUMS[0].sets))
    ballot, value = made(2)
    machine.replied(machine.turn, "a", ReadReply(Verdict.OK, ballot, digest_of(value), value))
    machine.replied(machine.turn, "b", ReadReply(Verdict.OK))
    assert machine.waited()
    assert machine.state is state


def test_no_read_fails_for_a_doubted_value_before_all_replicas_have_answered() -> None:
    shared = Shared(Ballots("n", lambda: b"incarnat"), RULES, {}, lambda _name, disk, _value: disk in "ab")
    machine = Reader(shared, True, RegisterName(Table.SYSTEM, bytes(16), 0, b"key"))
    machine.begin(View.of(1, *QUORUMS[0].sets))
    ballot, value = made(2)
    assert not machine.replied(machine.turn, "a", ReadReply(Verdict.OK, ballot, digest_of(value), value))
    assert not machine.replied(machine.turn, "c", None)
    assert machine.replied(machine.turn, "b", ReadReply(Verdict.OK, ballot, digest_of(value), value))
    assert (machine.state, machine.value) == (DONE, value), "nothing better is to be had"


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([b"", b"one", b"two", None])), max_size=6))
def test_rows_agree_when_every_disk_that_was_asked_has_the_same_check(answers: list[tuple[int, bytes | None]]) -> None:
    comparison = RowComparison(("0", "1", "2"))
    heard: dict[str, bytes | None] = {}
    for index, check in answers:
        disk = str(index)
        if disk in heard:
            continue
        heard[disk] = check
        over = comparison.over
        assert comparison.report(disk, check) == (comparison.over and not over)
    if comparison.agreed:
        assert len(heard) == 3
        assert len(set(heard.values())) == 1
        assert None not in heard.values()
    elif len(heard) == 3:
        assert comparison.over
        assert None in heard.values() or len(set(heard.values())) > 1
