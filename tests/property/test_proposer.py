"""The proposer as a state machine, against acceptors that are the register's tables and a network that is a list of
messages.

Requests and answers are delivered in any order, lost, or answered by an error; proposers time out, pause and try again.
Every change appends its own mark to the value, so that the value which a last settling round finds shows what became of
each of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.partitions import epoch_of, step_of
from storaged.errors import OutcomeUnknown, StoragedError
from storaged.meta.consensus.acceptor import Acceptor, judge_accept, judge_create, judge_prepare
from storaged.meta.consensus.change import THIRD_REPLICA_TRIES, Fragments, Shared, Wanted
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import ATTEMPTS_MAX, RULES, Ballots, Lineage, Verdict
from storaged.meta.consensus.states import (
    ACCEPTING,
    CARRYING,
    CREATING,
    DONE,
    FAILED,
    GATHERING,
    NEW,
    PREPARING,
    REFRESHING,
    RETRYING,
    SYNCING,
    TRANSITIONS,
    Event,
    State,
)
from storaged.meta.messages import Accept, AcceptReply, Create, Prepare, PrepareReply
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import SmallCopies
from storaged.meta.store_ports import Fence
from tests.examples import examples

NOW_US = 1_700_000_000_000_000
ONE_SET = Quorum(("a", "b", "c"))
FIVE = Quorum(("a", "b", "c", "d", "e"))
JOINT = Quorum(("a", "b", "c"), ("b", "c", "d"))


class Refused(Exception):
    """What an update raises."""


class DataLost(StoragedError):
    pass


class Disk:
    """An acceptor whose disk is always in time."""

    def __init__(self) -> None:
        self.promised = self.accepted = ZERO_BALLOT
        self.epoch = 1
        self.value: Value | None = None
        self.fence: Fence | None = None
        self.damaged = False
        self.verdict: Verdict | None = None
        """What it answers instead of a judgement."""
        self.copies: set[bytes] = set()
        self.copied = True
        """The row was accepted with its copy."""
        self.rotten: set[bytes] = set()
        """Copies that can't be read any more."""

    def _acceptor(self) -> Acceptor:
        return Acceptor(self.promised, self.accepted, self.value, self.epoch, self.fence, self.damaged)

    def answer(self, request: Any, copies: bool) -> PrepareReply | AcceptReply:
        acceptor = self._acceptor()
        if self.verdict is not None:
            return (PrepareReply if isinstance(request, Prepare) else AcceptReply)(self.verdict, acceptor.lowest)
        if isinstance(request, Prepare):
            verdict = judge_prepare(acceptor, request.ballot, request.nonce)
            if verdict is not Verdict.OK:
                return PrepareReply(verdict, acceptor.lowest)
            self.promised = request.ballot
            self.raise_step(request.ballot.epoch)
            return PrepareReply(Verdict.OK, request.ballot, self.accepted, self.value, copied=self.copied)
        payload = request.value.payload
        copied = copies or not payload or payload in self.copies
        judge = judge_create if isinstance(request, Create) else judge_accept
        verdict = judge(acceptor, request.ballot, request.value, request.nonce, request.identity, copied=copied)
        if verdict is not Verdict.OK:
            return AcceptReply(verdict, acceptor.lowest)
        self.raise_step(request.ballot.epoch)
        self.accepted, self.value, self.damaged = request.ballot, request.value, False
        if copies:
            self.copies.add(payload)
            self.rotten.discard(payload)
        return AcceptReply(Verdict.OK, request.ballot, copy_synced=copied and bool(payload))

    def raise_step(self, epoch: int) -> None:
        self.epoch = max(self.epoch, epoch_of(step_of(epoch), 1))


class Driver:
    """One proposer and what is on the wire between it and the disks. Checks every transition against the table."""

    def __init__(self, world: World, machine: Proposer, create: Change | None = None) -> None:
        self.world = world
        self.machine = machine
        self.wire: list[Callable[[], None]] = []
        if create is None:
            self.do(Event.BEGIN, lambda: machine.begin(world.view, NOW_US))
        else:
            self.do(Event.CREATE, lambda: machine.create(world.view, create, world.now_us()))

    @property
    def over(self) -> bool:
        return self.machine.state in (DONE, FAILED)

    def do(self, event: Event, call: Callable[[], bool]) -> None:
        machine = self.machine
        before = machine.state
        entered = call()
        if not entered:
            assert machine.state is before, (before, event, machine.state)
            return
        assert machine.state in TRANSITIONS[before].get(event, ()), (before, event, machine.state)
        self.world.seen.add((before, event, machine.state))
        if machine.state in (CREATING, PREPARING, ACCEPTING):
            self.send()

    def send(self) -> None:
        machine = self.machine
        request, turn, copies = machine.request, machine.turn, bool(machine.fragments)
        for disk in machine.view.quorum.disks:
            self.wire.append(lambda disk=disk: self.arrive(disk, turn, request, copies))  # type: ignore[misc]

    def arrive(self, disk: str, turn: int, request: Any, copies: bool) -> None:
        chance = self.world.random.random()
        reply = None if chance < 0.1 * self.world.trouble else self.world.disks[disk].answer(request, copies)
        if chance > 1 - 0.1 * self.world.trouble:
            reply = None  # it arrived, and the answer is lost
        self.wire.append(lambda: self.reply(disk, turn, request, reply))

    def reply(self, disk: str, turn: int, request: Any, reply: Any) -> None:
        machine = self.machine
        if isinstance(request, Create):
            self.do(Event.CREATED, lambda: machine.created(disk, reply))
        elif isinstance(request, Accept):
            self.do(Event.ACCEPTED, lambda: machine.accepted(turn, disk, reply))
        else:
            self.do(Event.PROMISED, lambda: machine.promised(turn, disk, reply))

    def step(self) -> None:
        """Something happens."""
        chance, machine, state = self.world.random.random(), self.machine, self.machine.state
        if chance < (0.1 if state is CARRYING else 0.01) * self.world.trouble:
            self.do(Event.EXPIRE, machine.expire)
        elif state in (GATHERING, SYNCING, CARRYING, RETRYING, REFRESHING) and (chance < 0.3 or not self.wire):
            self.wait(chance)
        elif chance < (0.1 if state is CREATING else 0.02 if state in (PREPARING, ACCEPTING) else 0.0):
            self.do(Event.ON_SLOW, machine.on_slow)
        elif self.wire:
            self.wire.pop(self.world.random.randrange(len(self.wire)))()
        elif not self.over:
            self.do(Event.EXPIRE, machine.expire)

    def wait(self, chance: float) -> None:
        machine, state = self.machine, self.machine.state
        lost = chance < 0.02 * self.world.trouble
        if state is GATHERING:
            self.do(Event.WAITED, machine.waited)
        elif state is SYNCING and lost:
            self.do(Event.DATA_FAILED, lambda: machine.data_failed(DataLost("gone")))
        elif state is SYNCING:
            self.do(Event.SYNCED, machine.synced)
        elif state is REFRESHING:
            newer = self.world.view != machine.view or self.world.random.random() < 0.5
            self.do(Event.REFRESHED, lambda: machine.refreshed(newer))
        elif state is CARRYING:
            self.do(Event.CARRIED, lambda: machine.carried(self.world.copy_of(machine.carry, chance)))
        elif state is RETRYING:
            self.do(Event.BEGIN, lambda: machine.begin(self.world.view, self.world.now_us()))


class World:
    def __init__(self, draw: random.Random, quorum: Quorum, table: Table, trouble: float = 1.0) -> None:
        self.random = draw
        self.trouble = trouble
        self.view = View.of(1, *quorum.sets)
        self.disks = {disk: Disk() for disk in quorum.disks}
        self.name = RegisterName(table, bytes(16), 0, b"key")
        self.seen: set[tuple[State, Event, State]] = set()
        self.counts = dict.fromkeys(("preempted", "unknown", "unavailable", "identity_rounds"), 0)
        self.drivers: list[Driver] = []
        self.steps = 0
        """How many steps its partition goes at most while it is played."""
        self.rounds = 0
        """Settling rounds of moves."""
        self.rots = 0.0
        """How often a copy is lost."""

    def now_us(self) -> int:
        return NOW_US + self.random.randrange(2_000_000)

    def proposer(self, update: Any, node: str, **options: Any) -> Proposer:
        shared = Shared(Ballots(node, lambda: b"incarnat"), RULES, self.counts, lambda _name, _disk, value: False)
        lineage = Lineage(self.random.randbytes(14))
        return Proposer(shared, Wanted(self.name, update, **options), lineage)

    def copy_of(self, data_id: bytes, chance: float) -> Fragments | None:
        """What a search for a copy brings: the copy, nothing because all say that they have none, or nothing yet."""
        held = [disk for disk in self.disks.values() if data_id in disk.copies]
        if not held:
            return ()
        if chance < 0.1 * min(self.trouble, 1.0) or all(data_id in disk.rotten for disk in held):
            return None
        return [(b"", ())] * 5

    def rot(self) -> None:
        """Copies are lost, or can't be read any more."""
        disk = self.random.choice(list(self.disks.values()))
        (disk.rotten.update if self.random.random() < 0.5 else disk.copies.difference_update)(set(disk.copies))

    def strew(self) -> None:
        """Small records that no quorum has accepted, under one another's ballots; copies of some are lost."""
        for number in range(1, self.random.randrange(1, 6)):
            payload = b"strewn %d" % number
            value = Value(1, payload.ljust(16), Visibility.LIVE, b"%d" % number, payload)
            few = self.random.randrange(1, self.view.quorum.fewest)
            lost = self.random.random() < 0.7
            for disk in self.random.sample(list(self.disks.values()), few):
                disk.promised = disk.accepted = Ballot(1, number, "strewn", b"incarnat")
                disk.value = value
                if not lost:
                    disk.copies.add(payload)

    def move(self) -> None:
        """The register's partition moves one step, from the first set of ``JOINT`` to the second one."""
        first, second = JOINT.sets
        step = step_of(self.view.epoch)
        if step == 0:
            self.view = View.of(epoch_of(1, 1), first, second)
            return
        for disks in JOINT.sets:
            for disk in self.random.sample(disks, self.random.choice((2, 3))):
                self.disks[disk].raise_step(self.view.epoch)
        self.rounds += 1  # a name for each: no two proposers have one ballot
        mover = f"mover {self.rounds}"
        settling = Driver(self, self.proposer(lambda _value: None, mover, settling=True, commit=True, thorough=True))
        while not settling.over:
            settling.step()
        if settling.machine.state is DONE:
            self.view = View.of(epoch_of(2, 1), second)

    def appender(self, mark: bytes, often: float = 0.3) -> Driver:
        """``often``: how often it writes a small object."""
        chance = self.random.random
        small = chance() < often
        keeps = not small and chance() < 0.5  # the copy that the value names, as a change of tags does
        refuses, declines, dislikes = chance() < 0.1, chance() < 0.1, chance() < 3 * self.rots
        data_id = mark.ljust(16)

        def update(value: Value | None) -> Change | None:
            if refuses or (dislikes and value is not None and value.payload):
                raise Refused
            payload = data_id if small else value.payload if keeps and value else b""
            return None if declines else Change((value.body if value else b"") + mark, payload=payload)

        copies = SmallCopies(data_id, [(b"", ())] * 5, lambda disks: len(disks) >= 2) if small else None
        machine = self.proposer(
            update,
            mark.decode(),
            small=copies,
            barrier=self.random.random() < 0.2 + self.rots,
            thorough=self.random.random() < 0.5,
        )
        if self.random.random() < 0.05:
            machine.lineage._count = ATTEMPTS_MAX
        return Driver(self, machine)

    def play(self, steps: int = 2_000) -> None:
        for _ in range(steps):
            if self.rots and self.random.random() < self.rots:
                self.rot()
            if step_of(self.view.epoch) < self.steps and self.random.random() < 0.02:
                self.move()
            alive = [driver for driver in self.drivers if driver.wire or not driver.over]
            if not alive:
                return
            self.random.choice(alive).step()
        for driver in self.drivers:
            while not driver.over and driver.machine.state is not SYNCING:
                driver.do(Event.EXPIRE, driver.machine.expire)

    def settled(self) -> Value | None:
        """What a settling round finds when nothing is in the way, and all copies are back."""
        self.trouble = 0.0
        for disk in self.disks.values():
            disk.verdict, disk.damaged = None, False
            disk.rotten.clear()
            if disk.value is not None and disk.value.payload:
                disk.copies.add(disk.value.payload)
        machine = self.proposer(lambda _value: None, "~", settling=True, commit=True, thorough=True)
        last = Driver(self, machine)
        while not last.over:
            last.step()
        assert machine.state is DONE, machine.error
        assert machine.outcome is not None
        return machine.outcome.after


def play_five_of_the_system(draw: random.Random) -> World:
    return play_appends(draw, FIVE, Table.SYSTEM)


def play_appends(draw: random.Random, quorum: Quorum | None = None, table: Table | None = None) -> World:
    quorum = quorum or draw.choice((ONE_SET, ONE_SET, FIVE, JOINT))
    table = table if table is not None else draw.choice((Table.OBJECT, Table.SYSTEM))
    world = World(draw, quorum, table, trouble=draw.choice((0.0, 1.0, 3.0)))
    world.drivers = [world.appender(bytes([ord("A") + number])) for number in range(draw.randrange(1, 6))]
    if draw.random() < 0.2:
        draw.choice(list(world.disks.values())).verdict = draw.choice(
            (Verdict.EPOCH, Verdict.AHEAD, Verdict.FENCED, Verdict.DAMAGED)
        )
    if draw.random() < 0.2:
        world.drivers.append(
            Driver(world, world.proposer(lambda _value: None, "s", settling=True, commit=True, thorough=True))
        )
    world.play()
    return world


def play_moves(draw: random.Random) -> World:
    """The register moves from one set to another, with changes, creates and lost copies under way."""
    world = World(draw, JOINT, draw.choice((Table.OBJECT, Table.OBJECT, Table.SYSTEM)), draw.choice((0.0, 1.0, 3.0)))
    world.view, world.steps = View.of(1, JOINT.sets[0]), draw.choice((1, 2, 2))
    world.rots = draw.choice((0.0, 0.05, 0.2))
    if draw.random() < 0.4:
        draw.choice(list(world.disks.values())).verdict = Verdict.EPOCH
    world.drivers = [world.appender(bytes([ord("A") + number])) for number in range(draw.randrange(2, 7))]
    if draw.random() < 0.3:
        world.drivers.append(
            Driver(world, world.proposer(lambda _value: None, "s", settling=True, commit=True, thorough=True))
        )
    world.play()
    return world


def play_copies(draw: random.Random) -> World:
    """Small objects, whose copies are lost or can't be read."""
    world = World(draw, draw.choice((ONE_SET, FIVE, JOINT)), Table.OBJECT, trouble=draw.choice((0.0, 1.0, 3.0)))
    world.rots = draw.choice((0.05, 0.2))
    if draw.random() < 0.5:
        world.strew()
    world.drivers = [world.appender(bytes([ord("A") + number]), 0.6) for number in range(draw.randrange(2, 7))]
    if draw.random() < 0.3:
        world.drivers.append(
            Driver(world, world.proposer(lambda _value: None, "s", settling=True, commit=True, thorough=True))
        )
    world.play()
    return world


TABLE = {
    (state, event, after)
    for state, events in TRANSITIONS.items()
    for event, states in events.items()
    for after in states
}
SEEDS_OF_TABLE = 2_500
"""Among so many is every transition."""


@pytest.mark.parametrize("play", [play_appends, play_copies, play_moves])
@settings(max_examples=examples(400), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_the_order_of_events_each_change_is_made_once_or_not_at_all(
    play: Callable[[random.Random], World], seed: int
) -> None:
    world = play(random.Random(seed))
    final = world.settled()
    assert world.seen <= TABLE
    body = final.body if final is not None else b""
    for driver in world.drivers:
        machine = driver.machine
        mark = machine._shared.ballots._node.encode()
        if machine._wanted.settling:
            continue
        if (
            machine.state is DONE
            and machine.outcome is not None
            and machine.outcome.after is not machine.outcome.before
        ):
            before, after = machine.outcome
            assert after is not None
            assert (before.body if before else b"") + mark == after.body
            assert body.startswith(after.body), "what was chosen is an ancestor of all that follows"
            assert body.count(mark) == 1
        elif machine.state is DONE:
            before = machine.outcome.before if machine.outcome else None
            assert body.startswith(before.body if before else b""), "what was reported was settled"
            assert body.count(mark) == 0
        elif isinstance(machine.error, OutcomeUnknown):
            assert body.count(mark) <= 1
        else:
            assert body.count(mark) == 0, (machine.state, machine.error)


def play_creates(draw: random.Random) -> World:
    quorum = draw.choice((ONE_SET, FIVE, JOINT, JOINT))
    world = World(draw, quorum, Table.OBJECT)
    if quorum is JOINT and draw.random() < 0.7:
        world.view, world.steps = View.of(1, JOINT.sets[0]), draw.choice((1, 2))
        if draw.random() < 0.5:
            draw.choice(list(world.disks.values())).verdict = Verdict.EPOCH
    for number in range(draw.randrange(1, 5)):
        change = Change(bytes([ord("A") + number]))
        machine = world.proposer(lambda _value, change=change: change, f"n{number}")
        world.drivers.append(Driver(world, machine, change))
    world.play()
    return world


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(0, 1 << 32))
def test_of_creates_and_overwritings_one_stays_and_what_failed_surely_does_not(seed: int) -> None:
    world = play_creates(random.Random(seed))
    final = world.settled()
    assert world.seen <= TABLE
    body = final.body if final is not None else b""
    certain = [driver.machine for driver in world.drivers if driver.machine.state is FAILED]
    impossible = [machine for machine in certain if not isinstance(machine.error, OutcomeUnknown)]
    assert body not in [machine._wanted.update(None).body for machine in impossible]  # type: ignore[union-attr]
    if any(driver.machine.state is DONE for driver in world.drivers):
        assert body


def test_the_table_holds_what_the_machine_does_and_nothing_else() -> None:
    """The properties above compare what further seeds do with the table, new ones in each run."""
    seen: set[tuple[State, Event, State]] = set()
    for seed in range(10_000):
        if seed > SEEDS_OF_TABLE and seen >= TABLE:
            break
        draw = random.Random(seed)
        world = (play_creates, play_appends, play_five_of_the_system, play_copies, play_moves)[seed % 5](draw)
        if seed % 2:
            world.settled()
        seen |= world.seen
    assert seen - TABLE == set()
    assert TABLE - seen == set()


def test_both_ends_have_no_way_out() -> None:
    assert TRANSITIONS[DONE] == TRANSITIONS[FAILED] == {}
    assert set(TRANSITIONS) == set(State)
    assert all(NEW not in states for events in TRANSITIONS.values() for states in events.values())


def test_a_late_answer_changes_nothing() -> None:
    world = World(random.Random(1), ONE_SET, Table.OBJECT, trouble=0.0)
    driver = Driver(world, world.proposer(lambda _value: Change(b"one"), "n"))
    turn, ballot = driver.machine.turn, Ballot(1, NOW_US, "n", b"incarnat")
    while not driver.over:
        driver.step()
    assert not driver.machine.promised(turn, "c", PrepareReply(Verdict.PREEMPTED, ballot))
    assert not driver.machine.accepted(driver.machine.turn, "c", AcceptReply(Verdict.PREEMPTED, ballot))
    assert driver.machine.state is DONE


def test_an_answer_to_an_earlier_accept_does_not_count_for_a_later_one() -> None:
    world = World(random.Random(1), ONE_SET, Table.OBJECT, trouble=0.0)
    machine = world.proposer(lambda _value: Change(b"one"), "n", thorough=True)

    def promised_by_two() -> int:
        machine.begin(world.view, NOW_US)
        for disk in "ab":
            machine.promised(machine.turn, disk, PrepareReply(Verdict.OK, machine.ballot))
        assert machine.state is ACCEPTING
        return machine.turn

    early, rival = promised_by_two(), Ballot(1, NOW_US + 10, "rival", b"incarnat")
    for disk in "ab":
        machine.accepted(early, disk, AcceptReply(Verdict.PREEMPTED, rival))
    assert machine.state is RETRYING
    late = promised_by_two()
    for disk in "abc":
        assert not machine.accepted(early, disk, AcceptReply(Verdict.OK, machine.ballot))
    assert machine.state is ACCEPTING
    assert [machine.accepted(late, disk, AcceptReply(Verdict.OK, machine.ballot)) for disk in "ab"] == [False, True]


def test_a_create_that_lost_raises_no_sequence_of_what_it_lost_against() -> None:
    """Two replicas hold another's create, which a settling round has accepted again at one of them, above the create
    that only the third has taken.
    """
    world = World(random.Random(1), ONE_SET, Table.OBJECT, trouble=0.0)
    machine = world.proposer(lambda _value: Change(b"own"), "n")
    machine.create(world.view, Change(b"own"), NOW_US)
    assert isinstance(machine.request, Create)
    own, at = machine.request.value, machine.ballot
    rival = Value(1, b"r" * 14 + bytes(2), Visibility.LIVE, b"rival")
    machine.created("a", AcceptReply(Verdict.OK, at))
    for disk in "bc":
        machine.created(disk, AcceptReply(Verdict.HELD, Ballot(1, 5, "rival", b"incarnat")))
    machine.begin(world.view, NOW_US)
    machine.promised(machine.turn, "a", PrepareReply(Verdict.OK, machine.ballot, at, own))
    settled_at = at._replace(counter=at.counter + 1, node="rival")
    machine.promised(machine.turn, "b", PrepareReply(Verdict.OK, machine.ballot, settled_at, rival))
    machine.waited()
    for disk in "ab":
        machine.accepted(machine.turn, disk, AcceptReply(Verdict.OK, machine.ballot))
    assert machine.outcome is not None
    before, after = machine.outcome
    assert before == rival
    assert after is not None
    assert after.sequence == 2


def doubting(liars: str) -> Proposer:
    """A change of a register of the system table: no gateway wrote what these disks report."""
    world = World(random.Random(1), ONE_SET, Table.SYSTEM, trouble=0.0)
    ballots = Ballots("n", lambda: b"incarnat")
    shared = Shared(ballots, RULES, world.counts, lambda _name, disk, value: value is not None and disk in liars)
    machine = Proposer(shared, Wanted(world.name, lambda _value: Change(b"new")), Lineage(b"c" * 14))
    machine.begin(world.view, NOW_US)
    return machine


TRUE = Value(3, b"a gateway's write", Visibility.LIVE, b"true")
LIE = Value(9, b"a liar's own one", Visibility.LIVE, b"lie")


def report(machine: Proposer, disk: str, value: Value, counter: int) -> bool:
    accepted = Ballot(1, counter, "other", b"incarnat")
    return machine.promised(machine.turn, disk, PrepareReply(Verdict.OK, machine.ballot, accepted, value))


def test_what_no_gateway_wrote_does_not_count_where_a_quorum_has_something_else() -> None:
    machine = doubting("a")
    assert not report(machine, "a", LIE, 9)
    assert not report(machine, "b", TRUE, 3)
    assert report(machine, "c", TRUE, 3)
    assert machine.state is ACCEPTING
    assert isinstance(machine.request, Accept)
    assert machine.request.value.sequence == TRUE.sequence + 1


def test_what_no_gateway_wrote_is_written_over_where_a_quorum_has_it() -> None:
    machine = doubting("ab")
    assert not report(machine, "a", LIE, 9)
    assert report(machine, "b", LIE, 9)
    assert machine.state is ACCEPTING
    assert isinstance(machine.request, Accept)
    assert machine.request.value.sequence == LIE.sequence + 1


def test_no_attempt_fails_for_a_doubted_value_before_all_replicas_have_answered() -> None:
    machine = doubting("ab")
    assert not machine.promised(machine.turn, "c", None)
    assert not report(machine, "a", LIE, 9)
    assert report(machine, "b", LIE, 9)
    assert machine.state is ACCEPTING


def test_where_replicas_of_a_system_register_differ_the_lone_higher_ballot_does_not_lead() -> None:
    machine = doubting("")
    older = Value(2, b"what was put bac", Visibility.LIVE, b"older")
    assert not report(machine, "a", TRUE, 5)
    assert report(machine, "b", older, 9)
    assert machine.state is GATHERING
    assert report(machine, "c", older, 4)
    assert machine.state is ACCEPTING
    assert isinstance(machine.request, Accept)
    assert machine.request.value.sequence == TRUE.sequence + 1


@pytest.mark.parametrize("ahead_us", [1, 2 * 3_600_000_000])
def test_a_third_replica_that_refuses_is_asked_again_a_few_times(ahead_us: int) -> None:
    """However far ahead of this process's clock the ballot is that it has promised: the clock may be slow."""
    machine = doubting("")
    for attempt in range(THIRD_REPLICA_TRIES + 1):
        report(machine, "a", TRUE, 3)
        report(machine, "b", LIE, 9)
        assert machine.state is GATHERING
        higher = machine.ballot._replace(counter=machine.ballot.counter + ahead_us, node="rival")
        assert machine.promised(machine.turn, "c", PrepareReply(Verdict.PREEMPTED, higher))
        if attempt < THIRD_REPLICA_TRIES:
            assert machine.state is RETRYING
            machine.begin(machine.view, NOW_US)
    assert machine.state is ACCEPTING
