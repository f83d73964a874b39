"""Creates beside changes that keep a history, deletions, and floors that take the place of deleted rows, in any order.

As ``test_proposer``, with what gateways give the ring: a create that is found above a history is applied to it (rule
37). A value is a text of marks, one of each change; with an ``h`` in front it is a history, which no write replaces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from storaged.errors import OutcomeUnknown
from storaged.meta.consensus.acceptor import Acceptor
from storaged.meta.consensus.change import Shared, Wanted
from storaged.meta.consensus.floors import in_order, may_go, value_of
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import RULES, Ballots, Lineage, Verdict
from storaged.meta.consensus.states import DONE, FAILED, SYNCING, Event
from storaged.meta.messages import AcceptReply, PrepareReply
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.store_ports import Slot
from tests.examples import examples
from tests.property.test_proposer import FIVE, JOINT, NOW_US, ONE_SET, TABLE, Disk, Driver, World

MARKS = b"ABCDEFGHIJKLMNOPQRSTUVW"
PUT, ADD, DELETE, EXPUNGE, SETTLE = "put", "add", "delete", "expunge", "settle"


def is_history(value: Value | None) -> bool:
    return value is not None and value.body.startswith(b"h")


class FloorDisk(Disk):
    """With the floor of its range."""

    def __init__(self) -> None:
        super().__init__()
        self.floor = ZERO_BALLOT

    def _acceptor(self) -> Acceptor:
        if self.accepted != ZERO_BALLOT or self.floor == ZERO_BALLOT:
            return super()._acceptor()
        return Acceptor(self.promised, self.floor, value_of(self.floor), self.epoch, floored=True)

    def answer(self, request: Any, copies: bool) -> PrepareReply | AcceptReply:
        before = self._acceptor()
        reply = super().answer(request, copies)
        if isinstance(reply, PrepareReply):
            return replace(reply, accepted=before.accepted, value=before.value) if before.floored else reply
        if reply.verdict == Verdict.OK or self.verdict is not None:
            return reply
        final = before.refuses_for_good(request.ballot, Verdict(reply.verdict))
        floor = before.value.sequence if before.floored and before.value is not None else 0
        return replace(reply, final=final, floor=floor)


class Histories(World):
    """``longest``: longer histories would need a page, so no create is applied to them."""

    def __init__(self, draw: random.Random, quorum: Quorum) -> None:
        super().__init__(draw, quorum, Table.OBJECT, trouble=draw.choice((0.0, 1.0, 3.0)))
        self.disks = {disk: FloorDisk() for disk in quorum.disks}
        self.longest = draw.choice((2, 4, 99, 99))
        self.expunged = 0

    def overtake(self, _name: RegisterName, create: Value, below: Value) -> Value | None:
        if not is_history(below):
            return create
        return replace(create, body=below.body + create.body) if len(below.body) <= self.longest else None

    def proposer(self, update: Any, node: str, **options: Any) -> Proposer:
        ballots = Ballots(node, lambda: b"incarnat")
        shared = Shared(ballots, RULES, self.counts, overtake=self.overtake)
        lineage = Lineage(self.random.randbytes(14))
        return Proposer(shared, Wanted(self.name, update, **options), lineage)


class Request(Driver):
    """A change of some kind. ``began``, ``ended``: steps of the world."""

    def __init__(self, world: Histories, kind: str, mark: bytes, began: int) -> None:
        self.kind, self.mark, self.began, self.ended = kind, mark, began, 0
        thorough = world.random.random() < 0.5
        settling = kind == SETTLE
        machine = world.proposer(self._update, f"n{mark!r}", thorough=thorough, settling=settling, commit=settling)
        creates = kind == PUT and world.view.quorum.single and world.random.random() < 0.8
        super().__init__(world, machine, Change(mark) if creates else None)

    def _update(self, value: Value | None) -> Change | None:
        body = value.body if value is not None else b""
        if self.kind == DELETE:
            return Change(b"", Visibility.TOMBSTONE) if body else None
        if self.kind == SETTLE:
            return None
        if self.kind == ADD:
            return Change((b"" if is_history(value) else b"h") + body + self.mark)
        return Change(body + self.mark if is_history(value) else self.mark)

    @property
    def done(self) -> bool:
        return self.machine.state is DONE

    @property
    def surely_failed(self) -> bool:
        return self.machine.state is FAILED and not isinstance(self.machine.error, OutcomeUnknown)


class Expunger:
    """As ``maintain.expunger`` and ``meta.acceptor.floors``, one disk after the other."""

    kind = EXPUNGE

    def __init__(self, world: Histories) -> None:
        self.world = world
        self.over = False
        self.wire = ()
        self.ended = 0
        self._ballot = Ballot(world.view.epoch, NOW_US + 1_000_000 + world.random.randrange(4_000_000), "", b"")
        self._work = self._steps()

    def step(self) -> None:
        if self.world.random.random() < 0.02 or not next(self._work, False):
            self.over = True

    def _disks(self) -> list[Any]:
        disks = list(self.world.disks.values())
        self.world.random.shuffle(disks)
        return disks

    def _steps(self) -> Iterator[bool]:
        """Yields True after each step, and False when it goes no further."""
        ballot, world = self._ballot, self.world
        for disk in self._disks():
            yield in_order(ballot, disk.floor)
            disk.promised = max(disk.promised, ballot)
        rows = []
        for disk in self._disks():
            yield True
            rows.append((disk.accepted, disk.value))
        if any(row != rows[0] for row in rows):
            settling = Driver(
                world, world.proposer(lambda _value: None, f"x{ballot}", settling=True, commit=True, thorough=True)
            )
            while not settling.over:
                settling.step()
                yield True
            yield settling.machine.state is DONE and settling.machine.ballot > ballot
        for disk in self._disks():
            yield in_order(ballot, disk.floor)
            disk.floor = max(disk.floor, ballot)
        for disk in self._disks():
            yield True
            if disk.value is not None and may_go(Slot(world.name, disk.accepted, disk.value), ballot):
                disk.promised = max(disk.promised, disk.accepted)
                disk.accepted, disk.value = ZERO_BALLOT, None
                world.expunged += 1


def play(seed: int) -> tuple[Histories, list[Request]]:
    draw = random.Random(seed)
    quorum = draw.choice((ONE_SET, ONE_SET, FIVE, JOINT))
    world = Histories(draw, quorum)
    if quorum is JOINT and draw.random() < 0.7:
        world.view, world.steps = View.of(1, JOINT.sets[0]), draw.choice((1, 2))
    kinds = (PUT, PUT, ADD, DELETE, SETTLE) if quorum is JOINT else (PUT, PUT, ADD, DELETE, DELETE, EXPUNGE, EXPUNGE)
    marks = iter(MARKS[: draw.randrange(4, len(MARKS))])
    requests: list[Request] = []
    active: list[Request | Expunger] = []
    for now in range(6_000):
        mark = next(marks, None) if not active or draw.random() < 0.03 else 0
        if mark is None and not active:
            break
        if mark:
            kind = draw.choice(kinds)
            made = Expunger(world) if kind == EXPUNGE else Request(world, kind, bytes([mark]), now)
            active.append(made)
            requests += [made] if isinstance(made, Request) else []
        if world.steps and draw.random() < 0.01 and world.view.epoch >> 32 < world.steps:
            world.move()
        if active:
            one = draw.choice(active)
            one.step()
            if one.over:
                one.ended = one.ended or now
                if not one.wire or draw.random() < 0.02:
                    active.remove(one)
    for request in requests:
        while not request.over and request.machine.state is not SYNCING:
            request.do(Event.EXPIRE, request.machine.expire)
        request.ended = request.ended or 6_000
    return world, requests


@settings(max_examples=examples(400), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_no_write_replaces_a_history_and_nothing_is_done_twice_or_comes_back(seed: int) -> None:
    check(seed)


def check(seed: int) -> None:
    world, requests = play(seed)
    final = world.settled()
    assert world.seen <= TABLE
    body = final.body if final is not None else b""
    deletions = [one for one in requests if one.kind == DELETE]
    for one in requests:
        count = body.count(one.mark)
        assert count <= 1, "it was done twice"
        assert not (count and one.surely_failed), one.machine.error
        if one.done and any(other.done and other.began > one.ended for other in deletions):
            assert not count, "it was deleted, and came back"
        may_be_deleted = any(not other.surely_failed and other.ended >= one.began for other in deletions)
        if one.kind == ADD and one.done and not may_be_deleted:
            assert count, "it was replaced"


def test_rows_are_expunged_in_these_plays() -> None:
    assert sum(play(seed)[0].expunged > 0 for seed in range(200)) > 10


@pytest.mark.parametrize("seed", [624, 1670])
def test_a_create_that_replaces_what_it_finds_is_noticed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rule 37."""
    monkeypatch.setattr(Histories, "overtake", lambda _self, _name, create, _below: create)
    with pytest.raises(AssertionError, match="it was replaced"):
        check(seed)
