"""Creates of coded objects, whose fragments a collector may take for orphans while their gateway sleeps (rule 39).

As ``test_creates_and_histories``: the program's proposers against acceptors that are tables, in any order of events.
Here a PUT takes the grounds of a create, writes its fragments, sleeps for as long as it pleases, and creates.
Collectors condemn fragments, have a round made, compare two looks, and delete. Floors take the place of deleted rows.
Clocks are seconds off, which is long here; layouts get newer, and the partition moves. Judged is: what is chosen is
there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.partitions import epoch_of, step_of
from storaged.meta.consensus import floors
from storaged.meta.consensus.change import Shared, Wanted
from storaged.meta.consensus.looks import Held, Look, moved_on
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import RULES, Ballots, Lineage, Rules
from storaged.meta.consensus.states import DONE, RETRYING, SYNCING, Event
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, Table, Value, Visibility
from storaged.meta.ports import Grounds
from storaged.meta.store_ports import Slot
from tests.examples import examples
from tests.property.test_creates_and_histories import FloorDisk
from tests.property.test_proposer import FIVE, JOINT, NOW_US, ONE_SET, TABLE, DataLost, Driver, Refused, World
from tests.sim.workload import Verdicts

PUT, CODED, DELETE, COLLECT, EXPUNGE = "put", "coded", "delete", "collect", "expunge"
KINDS = (PUT, *(CODED,) * 3, *(DELETE,) * 4, *(COLLECT,) * 4, *(EXPUNGE,) * 5)
PROCESSES = 2
SLEEPERS_MAX = 4
STEPS = 2_000
STEP_US = 50_000


class CommonDisk(FloorDisk):
    """``common``: the highest floor that it has promised."""

    def __init__(self) -> None:
        super().__init__()
        self.common = ZERO_BALLOT

    def takes(self, floor: Ballot) -> bool:
        """As ``meta.acceptor.floors``."""
        if floor.epoch < max(self.epoch, self.common.epoch):
            return False
        return floors.in_order(floor, self.floor)


class Orphans(World):
    def __init__(self, draw: random.Random, quorum: Quorum, rules: Rules) -> None:
        super().__init__(draw, quorum, Table.OBJECT, trouble=draw.choice((0.0, 0.3, 1.0)))
        self.disks = {disk: CommonDisk() for disk in quorum.disks}
        self.spread_us = draw.choice((10_000, 1_000_000, 4_000_000, 20_000_000))
        self.passed_us = 0
        self.there: set[bytes] = set()
        """The marks of PUTs whose fragments are on their disks."""
        self.condemned: set[bytes] = set()
        self.processes = [
            Shared(Ballots(f"g{number}", lambda: b"incarnat"), rules, self.counts) for number in range(PROCESSES)
        ]
        self.lost = False
        self.created = self.deleted = self.expunged = 0

    def now_us(self) -> int:
        return NOW_US + self.passed_us + self.random.randrange(self.spread_us)

    def some_view(self) -> View:
        """As a process knows it, perhaps with an older layout."""
        first = epoch_of(step_of(self.view.epoch), 1)
        epoch = self.random.randint(first, self.view.epoch) if self.random.random() < 0.2 else self.view.epoch
        return View.of(epoch, *self.view.quorum.sets)

    def learn(self) -> None:
        """A process has created another key of the range, and was refused by some."""
        known, view = self.random.choice(self.processes).floors, self.view
        for name, disk in self.disks_of(view)[: self.random.choice((1, 3))]:
            known.note(self.name, floors.sequence_of(disk.floor), NOW_US + self.passed_us, name, view.epoch)

    def look(self) -> None:
        """Whether what is chosen is there."""
        rows = {disk: (its.accepted, its.value.body if its.value else b"") for disk, its in self.disks.items()}
        _ballot, body = self.view.quorum.agreed(rows) or (ZERO_BALLOT, b"")
        self.lost = self.lost or (body.isdigit() and body not in self.there)

    def relayout(self) -> None:
        """A newer layout, which moves nothing."""
        self.view = View.of(self.view.epoch + 1, *self.view.quorum.sets)

    def disks_of(self, view: View) -> list[tuple[str, CommonDisk]]:
        found: list[Any] = [(disk, self.disks[disk]) for disk in view.quorum.disks]
        self.random.shuffle(found)
        return found

    def move(self) -> None:
        """Floors that a quorum has are copied to the disk that comes."""
        joint = not self.view.quorum.single
        super().move()
        if joint and self.view.quorum.single:
            first: list[Any] = [self.disks[disk] for disk in JOINT.sets[0]]
            comes: Any = self.disks["d"]
            comes.floor = max(comes.floor, sorted(disk.floor for disk in first)[1])


class Coded(Driver):
    """A PUT of a coded object. ``wire`` and ``over`` as of a driver."""

    def __init__(self, world: Orphans, mark: bytes) -> None:
        self.of, self.world, self.mark, self.wire = world, world, mark, []
        self.shared = world.random.choice(world.processes)
        self.view = world.some_view()
        self.grounds: Grounds | None = None
        self.began = self.written = self.ran = False
        self.wakes = world.random.choice((0.1, 0.01, 0.003))
        if self.view.quorum.single and world.random.random() < 0.9:
            self.grounds = self.shared.grounds(world.name, self.view, world.now_us(), vouched=True)
        wanted = Wanted(world.name, self._update, barrier=True, grounds=self.grounds, thorough=True)
        self.machine = Proposer(self.shared, wanted, Lineage(world.random.randbytes(14)))

    def _update(self, _value: Value | None) -> Change:
        if self.ran:
            raise Refused
        self.ran = True
        return Change(self.mark)

    def step(self) -> None:
        world = self.of
        if not self.written:
            self.written = True
            world.there.add(self.mark)
        elif self.began:
            super().step()
        elif world.random.random() < self.wakes:
            self.began = True
            view = world.random.choice((self.view, world.view))  # of a process that has learned of a newer one, or not
            grounds, checked = self.grounds, self.shared.rules.grounds_before_data
            if grounds is None or not view.quorum.single or (checked and view.epoch != grounds.ballot.epoch):
                self.do(Event.BEGIN, lambda: self.machine.begin(view, world.now_us()))
            else:
                self.do(Event.CREATE, lambda: self.machine.create(view, Change(self.mark), world.now_us()))

    def wait(self, chance: float) -> None:
        world = self.of
        if self.machine.state is SYNCING:
            if self.mark in world.there:
                world.condemned.discard(self.mark)
                self.do(Event.SYNCED, self.machine.synced)
            else:
                self.do(Event.DATA_FAILED, lambda: self.machine.data_failed(DataLost("gone")))
        elif self.machine.state is RETRYING:
            self.do(Event.BEGIN, lambda: self.machine.begin(world.view, world.now_us()))
        else:
            super().wait(chance)


class Steps:
    """Something that is no proposer; ``steps`` yields False where it goes no further."""

    def __init__(self, world: Orphans) -> None:
        self.world = world
        self.over = False
        self.wire: list[Any] = []
        self.view = world.some_view()
        self._work = self.steps()

    def steps(self) -> Iterator[bool]:
        raise NotImplementedError

    def step(self) -> None:
        if not next(self._work, False):
            self.over = True

    def settle(self) -> Iterator[bool]:
        """A round by some gateway."""
        world = self.world
        wanted = Wanted(world.name, lambda _value: None, settling=True, commit=True, thorough=True)
        machine = Proposer(world.random.choice(world.processes), wanted, Lineage(b""))
        settling = Driver(world, machine)
        while not settling.over or (settling.wire and world.random.random() < 0.98):
            settling.step()
            yield True
        self.ballot = machine.ballot if machine.state is DONE else ZERO_BALLOT


class Collector(Steps):
    """As ``maintain.gc``, of one PUT's fragments."""

    def steps(self) -> Iterator[bool]:
        world = self.world
        if not world.there:
            return
        mark = world.random.choice(sorted(world.there))
        world.condemned.add(mark)
        looks = []
        for after in (False, True):
            held = {}
            for disk, its in self.world.disks_of(self.view):
                yield True
                known = its._acceptor()
                held[disk] = Held(known.accepted, known.value)
            looks.append(Look(self.view.quorum, held))
            if not after:
                yield from self.settle()
        found = moved_on(*looks, everywhere=True)
        if found is None or (found.value is not None and found.value.body == mark):
            world.condemned.discard(mark)
            return
        yield True
        if mark in world.condemned:
            world.there.discard(mark)
            world.deleted += 1


class Expunger(Steps):
    """As ``maintain.expunger`` and ``meta.acceptor.floors``, one disk after the other."""

    def steps(self) -> Iterator[bool]:
        world, view = self.world, self.view
        if not view.quorum.single:
            return
        ballot = Ballot(view.epoch, world.now_us() - world.random.randrange(world.spread_us), "", b"")
        for _, disk in world.disks_of(view):
            yield disk.takes(ballot)
            disk.raise_step(ballot.epoch)
            disk.promised, disk.common = max(disk.promised, ballot), max(disk.common, ballot)
        rows = []
        for _, disk in world.disks_of(view):
            yield True
            rows.append((disk.accepted, disk.value))
        if any(row != rows[0] for row in rows):
            yield from self.settle()
            yield self.ballot > ballot
        for _, disk in world.disks_of(view):
            yield disk.takes(ballot) and disk.floor <= ballot
            disk.floor = ballot
        for _, disk in world.disks_of(view):
            yield disk.takes(ballot)
            if disk.value is not None and floors.may_go(Slot(world.name, disk.accepted, disk.value), ballot):
                disk.accepted, disk.value = ZERO_BALLOT, None
                world.expunged += 1


def play(seed: int, rules: Rules = RULES) -> Orphans:
    draw = random.Random(seed)
    quorum = draw.choice((ONE_SET, ONE_SET, ONE_SET, FIVE, JOINT))
    world = Orphans(draw, quorum, rules)
    if quorum is JOINT:
        world.view, world.steps = View.of(1, JOINT.sets[0]), 2
    active: list[Any] = []
    made, together = 0, draw.choice((1, 1, 2, 6))
    for _ in range(STEPS):
        world.passed_us += STEP_US
        awake = [one for one in active if not (isinstance(one, Coded) and one.written and not one.began)]
        if len(awake) < together and len(active) < together + SLEEPERS_MAX and draw.random() < 0.3:
            active.append(_begun(world, draw.choice(KINDS), b"%d" % made))
            made += 1
        if world.steps and draw.random() < 0.003 and step_of(world.view.epoch) < world.steps:
            world.move()
        if draw.random() < 0.0005:
            world.relayout()
        if draw.random() < 0.03:
            world.learn()
        if active:
            one = draw.choice(active)
            one.step()
            world.look()
            if one.over and not (one.wire and draw.random() < 0.98):
                active.remove(one)
                world.created += isinstance(one, Coded) and not one.ran and one.machine.state is DONE
    return world


def _begun(world: Orphans, kind: str, mark: bytes) -> Any:
    if kind == CODED:
        return Coded(world, mark)
    if kind == COLLECT:
        return Collector(world)
    if kind == EXPUNGE:
        return Expunger(world)
    change = Change(b"", Visibility.TOMBSTONE) if kind == DELETE else Change(b"small")
    update = (
        (lambda value: change if value is not None and value.body else None) if kind == DELETE else lambda _: change
    )
    lineage = Lineage(world.random.randbytes(14))
    machine = Proposer(world.random.choice(world.processes), Wanted(world.name, update), lineage)
    return Driver(world, machine, change if kind == PUT and world.view.quorum.single else None)


def lost(world: Orphans) -> bool:
    """Whether the register names, or named, what was gone."""
    final = world.settled()
    body = final.body if final is not None else b""
    return world.lost or (body.isdigit() and body not in world.there)


def run_orphans(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    world, found = play(seed, rules), Verdicts(seed)
    found.done.update(created=world.created, deleted=world.deleted, expunged=world.expunged)
    if lost(world):
        found.violation = "what the register names is gone"
    return found


@settings(max_examples=examples(400), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_what_a_create_names_is_there(seed: int) -> None:
    world = play(seed)
    assert not lost(world)
    assert world.seen <= TABLE


def test_fragments_are_created_and_deleted_and_rows_expunged_in_these_plays() -> None:
    worlds = [play(seed) for seed in range(100)]
    assert sum(world.created for world in worlds) > 5
    assert sum(world.deleted for world in worlds) > 100
    assert sum(world.expunged for world in worlds) > 100


@pytest.mark.parametrize("seed", [1, 50, 143, 146])
def test_a_create_with_grounds_from_after_its_data_is_noticed(seed: int) -> None:
    """Without rule 39."""
    assert lost(play(seed, replace(RULES, grounds_before_data=False)))
    assert not lost(play(seed))
