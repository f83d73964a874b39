"""Creates among changes of values with a history: whatever is lost, slow or away, nothing that was confirmed is missing
in what a last settling round finds, and nothing is there that has failed, or is there twice.

A value is a row of marks. Changes append a capital letter; from the first one on the value has a history, and must not
be replaced. Creates are small letters: they replace a value without history, and are appended to one with it.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import OutcomeUnknown
from storaged.meta.consensus.change import Shared, Wanted
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import RULES, Ballots, Lineage
from storaged.meta.consensus.states import DONE
from storaged.meta.names import Change, RegisterName, Table, Value
from tests.examples import examples
from tests.property.test_proposer import FIVE, JOINT, ONE_SET, Driver, World


class HasHistory(Exception):
    """Of a create."""


class ProposedAgain(Exception):
    """Of a change that is proposed once."""


def has_history(value: Value | None) -> bool:
    return value is not None and value.body.lower() != value.body


def overtake(_name: RegisterName, create: Value, below: Value) -> Value | None:
    if not has_history(below):
        return create
    return Value(create.sequence, create.operation, create.visibility, below.body + create.body)


class Marks(World):
    def __init__(self, draw: random.Random, quorum: Quorum) -> None:
        super().__init__(draw, quorum, Table.OBJECT, trouble=draw.choice((0.3, 1.0, 3.0)))
        self.drivers_of: dict[bytes, Driver] = {}

    def proposer(self, update: Any, node: str, **options: Any) -> Proposer:
        doubts: Any = lambda _name, _disk, _value: False  # noqa: E731
        shared = Shared(Ballots(node, lambda: b"incarnat"), RULES, self.counts, doubts, overtake=overtake)
        return Proposer(shared, Wanted(self.name, update, **options), Lineage(self.random.randbytes(14)))

    def begin(self, mark: bytes) -> None:
        creates, once, proposed = mark.islower(), self.random.random() < 0.5, False

        def update(value: Value | None) -> Change:
            nonlocal proposed
            if not creates:
                if once and proposed:
                    raise ProposedAgain
                proposed = True
                return Change((value.body if value else b"") + mark)
            if has_history(value):
                raise HasHistory
            return Change(mark)

        machine = self.proposer(update, mark.decode(), thorough=self.random.random() < 0.5)
        create = Change(mark) if creates and self.view.quorum.single else None
        self.drivers_of[mark] = Driver(self, machine, create)
        self.drivers.append(self.drivers_of[mark])


def play(draw: random.Random) -> Marks:
    quorum = draw.choice((ONE_SET, ONE_SET, ONE_SET, FIVE, JOINT))
    world = Marks(draw, quorum)
    if quorum is JOINT:
        world.view, world.steps = View.of(1, JOINT.sets[0]), draw.choice((1, 2))
    marks = [b"%c" % (letter - (32 if draw.random() < 0.5 else 0)) for letter in range(ord("a"), ord("h"))]
    while marks:
        for mark in marks[: draw.randrange(1, 4)]:
            world.begin(mark)
            marks.remove(mark)
        world.play(draw.choice((5, 20, 60, 2_000)))
    world.play()
    return world


@settings(max_examples=examples(300), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_a_create_takes_no_history_away(seed: int) -> None:
    world = play(random.Random(seed))
    settled = world.settled()
    found = settled.body if settled is not None else b""
    for mark, driver in world.drivers_of.items():
        machine = driver.machine
        assert found.count(mark) <= 1, (mark, found)
        if machine.state is DONE and mark.isupper():
            assert mark in found, (mark, found)
        if machine.error is not None and not isinstance(machine.error, OutcomeUnknown):
            assert mark not in found, (mark, found, machine.error)
