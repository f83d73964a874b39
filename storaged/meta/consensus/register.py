"""The consensus on one register: its rules, and what a proposer may conclude. Pure.

CASPaxos (Denis Rystsov, arXiv:1802.07000): a register is a value that changes by compare-and-set, agreed among 2f+1
acceptors of which f may be away. There is no log and no leader. A change is two rounds under one ballot that no other
proposer ever uses:

    prepare(b)   an acceptor promises to refuse everything below b, and reports what it accepted last
    accept(b,v)  v is the change applied to the value with the highest ballot that a majority reported; v is chosen once
                 a majority has it on disk

Two majorities share an acceptor, so a later prepare sees everything that was chosen before. All that can go wrong lies
in the small print. So each of its rules is a switch (``Rules``): a simulation turns it off, and must then find a
history that is not linearizable. Production passes nothing.

A *create* is both rounds in one, for a change that is the same whatever the register holds:

    create(b,v)  an acceptor that has accepted nothing for this register, and promised nothing above b, accepts v with
                 the sequence 1; an acceptor that has accepted something refuses (HELD)

When a majority takes it, this is a change of a register that was never written: each of these acceptors, asked for a
promise, would have promised and had nothing to report. What was chosen before, a majority holds, so a majority refuses.

But a minority that has missed what was chosen may take the create. There it lies under a higher ballot than what was
chosen, and on a lower sequence. A proposer that finds it there carries it on. That is an overwriting, by a change that
did not ask what it overwrites and was not acknowledged yet. It gets the sequence after the value that it overtakes
(rule 14), for the sequences of chosen values must grow. In all other cases they grow by one. A create that was chosen
may be chosen again with a higher sequence. This happens when the proposer that carries it on sees it at one replica
alone, and at another replica a value that lost against it. Where the value below has a history, the create does not
overwrite it (rule 37). ``consensus.overtaking`` has both rules.

The acceptor's answers are in ``consensus.acceptor``, quorums in ``consensus.quorums``. ``consensus.proposer`` and
``consensus.reader`` put these rules in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, unique
from operator import itemgetter

import xxhash
from msgspec import Struct

from storaged.meta.consensus.quorums import Quorum
from storaged.meta.names import Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.wire import encode

COUNTER_MAX = 1 << 62
"""Ballot counters are microseconds since 1970, or more after clocks that ran ahead: this is the year 148000."""

CALL_BYTES = 14
"""An operation id of 16 bytes is 14 random bytes of the call and the number of its attempt (u16 BE). That of a create
is made of its ballot, and has the number 0.
"""

_CREATE = bytes(2)

FLOOR_SEQUENCES = 1 << 16
"""Sequences of floors (``floors``) are multiples of this."""

ATTEMPTS_MAX = 0xFFFF

COUNTER_AHEAD_MAX_US = 3_600_000_000
"""How far a counter may lie ahead of an acceptor's clock, or of its high-water ballot where that is higher. A proposer
believes one replica so far; what is further ahead it believes only of a majority, or not far above that
(``rounds.RESTARTS_US``).
"""


@dataclass(frozen=True)
class Rules:
    """The small print. Every switch is on; only simulations, which show what breaks without a rule, turn one off."""

    sync_before_answer: bool = True
    """1. An accept is durable before it is answered, and no answer reveals it before."""
    promises_survive_restart: bool = True
    """2. After a restart the persisted high-water ballot counts as promised for every register."""
    read_same_ballot: bool = True
    """3. A value is settled when a majority reports it under the same ballot; the newest of differing answers proves
    nothing.
    """
    differing_settled: bool = True
    """4. Where answers differ, a majority accepts the newest, by an identity round, before it is reported."""
    failed_condition_settles: bool = True
    """5. A condition that fails is a read: the value that it judged is settled before the failure is reported."""
    retry_by_lineage: bool = True
    """6. A change is tried again only when no earlier attempt of it can be among the ancestors of the value found."""
    ballots_unique: bool = True
    """8. No two proposers, nor two lives of one, ever use the same ballot."""
    foreign_refused: bool = True
    """9, 11. A disk that is not the one the node had, or is blank or retired, answers nothing."""
    fence_by_epoch: bool = True
    """10. Acceptors refuse requests of a layout epoch before their own, and of steps of a partition before the one that
    they know.
    """
    copies_travel: bool = True
    """12. A record that no majority has confirmed is accepted again only together with the small copy that it names."""
    create_into_nothing: bool = True
    """13. An acceptor that holds anything for a register takes no create there."""
    counters_bounded: bool = True
    """15. An acceptor refuses a counter far ahead of both its clock and what it has promised: one prepare with the
    highest counter would stop it for ever.
    """
    created_follows_overtaken: bool = True
    """14. A created value that is found above another is carried on with the sequence after that one's."""
    far_by_majority: bool = True
    """15. A proposer goes above a counter far ahead of its clock only where a majority names one: a single replica that
    lies would lead it where all others refuse it.
    """
    lone_ballot_does_not_lead: bool = True
    """16. A lone replica does not lead against the others, whatever ballot it reports: where a quorum agrees, its value
    goes on (``PrepareRound.chosen``), or that the register was never written: a record that a single one of three
    replicas has was never acknowledged. In the system table an older value does not lead either (``credible``).
    """
    unproved_set_aside: bool = True
    """17. A value of the system table that no gateway wrote counts only where a majority holds it."""
    values_by_gateways: bool = True
    """18. Acceptors give promises to gateways alone, and take values from them alone."""
    own_ballots: bool = True
    """18. Each node speaks under its own ballots."""
    known_epochs: bool = True
    """19. An acceptor refuses ballots of a layout that its node does not know: they would outlive all ballots of the
    layouts to come.
    """
    fences_reported: bool = True
    """20. A replica that reports a row of a fenced scope says that the scope is fenced."""
    refused_by_all: bool = True
    """21. An attempt is over for good, and may be followed by another, when every replica has refused it for good. A
    replica that has taken it may show it to a proposer that carries it on.
    """
    copies_with_rows: bool = True
    """22. An acceptor writes no row that names a small copy which is not durable on its disk, whatever the round."""
    chosen_by_bit: bool = True
    """23. A record counts as possibly chosen where it was accepted with its copy, whether or not the copy can be read
    now (``copies``).
    """
    older_needs_minority: bool = True
    """24. An older record is proposed again only where no quorum can have chosen a newer one."""
    older_at_once: bool = True
    """25. All that is newer than it counts against it, not only what is one step above it."""
    older_as_new_change: bool = True
    """26. It is proposed as a new change, with the sequence after the highest one seen."""
    errors_no_damage: bool = True
    """27. A copy that can't be read now counts as lost nowhere: the replica says that it can't tell."""
    steps_durable: bool = True
    """28. The step of a partition is durable at an acceptor before it promises or accepts anything in that step."""
    fences_by_step: bool = True
    """31. A disk sets and lifts no fence of a bucket for a caller that does not know the step of its partitions."""
    first_set_may_have_chosen: bool = True
    """29. While there are two sets, what a majority of one of them holds counts as possibly chosen."""
    no_create_while_joint: bool = True
    """30. Nothing is created unasked while there are two sets. Two looks at the first set alone (``looks``), by a
    process that does not know of the second one yet, would miss a create that the new disk alone has taken.
    """
    floors_reported: bool = True
    """32. Where rows of deleted keys were expunged, a missing row reports the floor of its range (``floors``)."""
    creates_above_floors: bool = True
    """33. A create is taken into a missing row only with a sequence above that of the floor."""
    floors_durable: bool = True
    """34. A floor is on disk before it is reported, and before a row goes."""
    floors_when_settled: bool = True
    """35. While a partition has two sets, no floor is set in it, and no row goes."""
    scans_after_fence: bool = True
    """36. Whether a fenced bucket is empty is asked only of replicas that hold its fence. Two of three replicas that
    have no row prove nothing while one of them has no fence yet: it may take, and acknowledge, an accept after that.
    """
    creates_spare_history: bool = True
    """37. A create that is found above a value with a history does not replace that: it is dropped, or applied to it
    (``overtaking``).
    """
    floors_grow: bool = True
    """38. Of two floors of a range the one with the higher ballot has the higher sequence, whatever clocks and delays
    say, and becomes active later (``floors``).
    """
    grounds_before_data: bool = True
    """39. A create that refers to data which is on disks already has a ballot and names a floor from before that
    (``floors``).
    """
    lends_by_nonce: bool = True
    """40. A fence that lends takes changes with its nonce alone, and no creates (``acceptor.fences``)."""


RULES = Rules()


@unique
class Verdict(IntEnum):
    OK = 0
    PREEMPTED = 1
    """A higher ballot was promised."""
    EPOCH = 2
    """The layout of the request is older than this acceptor's, or the step of its partition is."""
    FENCED = 3
    """The scope (a bucket that is being deleted) is fenced."""
    CONFLICT = 4
    """This ballot came with another value before: a proposer broke rule 8, or bits flipped. Refused, and an alarm is
    counted.
    """
    DAMAGED = 5
    """The row's checksum does not hold: what was accepted here is unknown, so this acceptor counts for nothing until a
    newer value replaces the row.
    """
    UNSTORED = 6
    """The small copy that the value names is not durable on this disk: it did not come along, or the disk does not take
    it (it is full). Nothing was accepted.
    """
    HELD = 7
    """For a create: something was accepted here below its ballot. The create was not taken here, and never will be."""
    AHEAD = 8
    """The ballot lies too far ahead of this acceptor's clock: more than an hour."""
    NEWER = 9
    """The layout of the request is newer than any that this acceptor's node knows, or the step of its partition is: the
    node may be about to learn it."""
    FULL = 10
    """The disk has no room for a longer row (``disk_room``). Nothing was accepted."""


def digest_of(value: Value | None) -> bytes:
    """xxh3-64 of the encoded value, 8 bytes; empty for none. It has no cryptographic strength, and nothing that this
    version decides depends on it: reads compare hashes of rows (``rowvalue.hash_of``), or the values. Nodes of version
    0.1.0 look at it in ``ReadReply``.
    """
    return b"" if value is None else xxhash.xxh3_64_digest(encode(value))


# --- quorums ----------------------------------------------------------------------------------------------------------


def settled_ballot(quorum: Quorum, accepted: Mapping[str, Ballot], rules: Rules = RULES) -> Ballot | None:
    """The ballot that a quorum reports (ZERO_BALLOT: never written), None when there is none (rule 3)."""
    if not rules.read_same_ballot:
        return max(accepted.values()) if quorum.met(accepted) else None
    return quorum.agreed(accepted)


def credible(
    quorum: Quorum, reported: Mapping[str, tuple[Ballot, Value | None]]
) -> tuple[Ballot, Value | None, bool] | None:
    """What a change of a register of the system table goes on from when replicas differ: ballot, value, and whether the
    value is settled. ``reported``: what each replica that promised has accepted. None when not all replicas have
    promised. So a replica that lies, or was put back, leads to no older record (rule 16).

    Why it is safe: all replicas have promised, so what may have been chosen below the new ballot was accepted by a
    majority of the first set already, whether that was chosen before there was a second set or later. Its ballot is no
    higher than the one that a majority of that set reports or exceeds, the *reach*: above that nothing was chosen, nor
    can be any more. Whatever was proposed at the reach or above it descends from everything that was chosen (that is
    Paxos), so a change may be based on each value there. The reach of the second set counts too, where it is higher:
    a process that knows already that this set is alone now takes for settled what its majority has.

    A ballot that a majority reports is the reach itself, and was chosen. Else the value with the highest sequence among
    those at the reach and above it is taken, and of two with the same sequence the one with the higher ballot. A lone
    liar chooses its ballot, but has no authenticator of a sequence that no gateway has reached.
    """
    if not all(disk in reported for disk in quorum.disks):
        return None
    settled = quorum.agreed(reported)
    if settled is not None:
        return *settled, True
    ranked = [sorted((reported[disk] for disk in disks), key=itemgetter(0), reverse=True) for disks in quorum.sets]
    likely = ranked[0][: len(ranked[0]) // 2 + 1]
    reach = max(reports[len(reports) // 2][0] for reports in ranked)
    likely += [reported[disk] for disk in quorum.disks[len(ranked[0]) :]]
    likely = [pair for pair in likely if pair[0] >= reach]
    likely.sort(key=lambda pair: pair[0], reverse=True)
    ballot, value = max(likely, key=lambda pair: pair[1].sequence if pair[1] is not None else 0)
    return ballot, value, False


# --- proposer ---------------------------------------------------------------------------------------------------------

NEVER = Value(0, b"", Visibility.TOMBSTONE, b"")
"""What an identity round commits for a register that was never written: sequence 0 means never written, and settled to
be so.
"""


def created(value: Value) -> bool:
    """Whether it may have been accepted by a create. Creates begin one above a floor, or at 1."""
    return value.sequence % FLOOR_SEQUENCES == 1 and value.operation[CALL_BYTES:] == _CREATE


def create_operation(ballot: Ballot) -> bytes:
    """The operation id of the create that has this ballot: no ballot is ever used twice."""
    return xxhash.xxh3_128_digest(encode(ballot))[:CALL_BYTES] + _CREATE


def taken_by_create(ballot: Ballot, value: Value | None) -> bool:
    """Whether a value that was accepted under this ballot was accepted by a create, and by no later round. False also
    for creates of former versions.
    """
    return value is not None and created(value) and value.operation == create_operation(ballot)


def may_create(name: RegisterName) -> bool:
    """Whether the register may be changed without asking what it holds. Only registers of objects may: rule 14 gives a
    created value another sequence, and bodies of system registers, uploads and parts carry authenticators over their
    sequence, or are found by it.
    """
    return name.table == Table.OBJECT


def shown(value: Value | None) -> Value | None:
    """A register's value as its users see it."""
    return None if value is None or value.sequence == 0 else value


class Ballots:
    """The ballots of one proposer: (layout epoch, counter, node, incarnation), never twice the same (rule 8).

    The counter is the wall clock in microseconds, or one more than the highest seen, so that proposers rarely pre-empt
    each other for ever. A clock that stops or jumps costs round trips, never safety. ``incarnation()`` gives 8 random
    bytes for this life of the process. It is called again when the clock was set back by more than acceptors bear (rule
    15): then counters may begin anew below those that were used.
    """

    def __init__(self, node: str, incarnation: Callable[[], bytes], rules: Rules = RULES) -> None:
        self._node = node if rules.ballots_unique else ""
        self._draw = incarnation if rules.ballots_unique else bytes
        self._far_by_majority = rules.far_by_majority
        self._incarnation = self._draw()
        self._last = 0
        self._confirmed = 0

    def next(self, epoch: int, above: int, now_us: int, *, confirmed: bool = False) -> Ballot:
        """A ballot above the counter ``above``, which a replica says is in the way. A counter that no clock near ours
        explains counts only when it is ``confirmed`` by a majority: a single replica that lies must not lead this
        process where all others refuse it.
        """
        limit = now_us + COUNTER_AHEAD_MAX_US
        if above > limit:
            if confirmed or not self._far_by_majority:
                self._confirmed = max(self._confirmed, above)
            elif above > self._confirmed + COUNTER_AHEAD_MAX_US:
                above = 0
        if self._last > limit and self._last > self._confirmed + COUNTER_AHEAD_MAX_US:
            self._incarnation, self._last = self._draw(), 0
        self._last = max(self._last + 1, above + 1, now_us)
        return Ballot(epoch, self._last, self._node, self._incarnation)


@unique
class Standing(IntEnum):
    """What became of the earlier attempts of a change, judged by the value that a new prepare found."""

    CLEAR = 0
    """None of them is in the value's past: the change may be proposed on it."""
    APPLIED = 1
    """The value is one of them."""
    UNKNOWN = 2
    """The value has moved on, possibly from one of them."""


class Lineage(Struct):
    """The attempts of one change, and what can be concluded of them later (rule 6).

    The chosen values of a register form a chain in which ``sequence`` grows; at each sequence there is one value. An
    attempt at sequence s can be an ancestor only of values with a higher sequence. So a value that is not one of our
    attempts, and whose sequence is no higher than that of our lowest attempt, does not descend from us. If it is also
    settled, attempts at its own sequence have lost for good. Not so if a create alone has put it there: a proposer may
    find that create above one of our attempts, and apply it to that (``consensus.overtaking``), until a round follows.

    A create knows no base, and may yet be carried on after anything that has a lower ballot (rule 14). So it is judged
    by the ballot: a value with a lower ballot does not descend from the create, whatever its sequence, and does not end
    the create either.
    """

    call: bytes
    rules: Rules = RULES
    _bases: dict[bytes, Value | None] = {}
    _sequences: dict[bytes, int] = {}
    _count: int = 0
    _created: tuple[bytes, Ballot] | None = None
    _lost: bool = False

    @property
    def open(self) -> bool:
        """Whether some attempt may have been, or may yet be, applied."""
        return bool(self._sequences)

    def attempt(self, base: Value | None, change: Change, above: int = 0) -> Value:
        """The value to be accepted: ``change`` on ``base``, under an operation id of its own. Its sequence is above
        that of ``base`` and ``above``.
        """
        operation = self._next_operation()
        sequence = max(base.sequence if base is not None else 0, above) + 1
        self._bases[operation] = base
        self._sequences[operation] = sequence
        return Value(sequence, operation, change.visibility, change.body, change.payload)

    def restate(self, value: Value | None, above: int, ballot: Ballot) -> Value:
        """What ``value`` says, as a new change with a sequence above ``above`` (rule 26); a tombstone for none. If it
        is one of our attempts, so is the new value. ``ballot``: under which it is proposed.
        """
        if not self.call:  # a settling round has no change of its own; no ballot is ever used twice
            self.call = xxhash.xxh3_128_digest(encode(ballot))[:CALL_BYTES]
        operation, sequence = self._next_operation(), above + 1
        if value is None or value.sequence == 0:
            return Value(sequence, operation, Visibility.TOMBSTONE, b"")
        if not self.rules.older_as_new_change:
            sequence = value.sequence
        if value.operation in self._sequences:
            self._bases[operation] = self._bases[value.operation]
            self._sequences[operation] = sequence
        return Value(sequence, operation, value.visibility, value.body, value.payload)

    def _next_operation(self) -> bytes:
        self._count += 1
        return self.call + self._count.to_bytes(2, "big")

    def create(self, change: Change, ballot: Ballot, floor: int = 0) -> Value:
        """The value to be created: ``change`` on nothing. ``floor``: the sequence of the range's floor."""
        operation = create_operation(ballot)
        self._created = operation, ballot
        self._bases[operation] = None
        self._sequences[operation] = floor + 1
        return Value(floor + 1, operation, change.visibility, change.body, change.payload)

    def create_held(self, everywhere: bool) -> None:
        """A majority has refused the create for good. Where it was taken nevertheless it is not chosen, unless a
        proposer carries it on at another ballot. ``everywhere``: every replica has refused it, and it is over.
        """
        self._lost = True
        if everywhere and self._created is not None:
            self._sequences.pop(self._created[0], None)

    def refused(self, operation: bytes) -> None:
        """Every replica has refused this attempt for good."""
        self._sequences.pop(operation, None)

    def lost_at(self) -> Ballot | None:
        """The ballot of a create that is not chosen at it, and never will be."""
        return self._created[1] if self._created is not None and self._lost else None

    @property
    def exhausted(self) -> bool:
        return self._count >= ATTEMPTS_MAX

    def base_of(self, applied: Value) -> Value | None:
        """The value that an applied attempt was built on."""
        return self._bases[applied.operation]

    def judge(self, found: Value | None, ballot: Ballot, settled: bool) -> Standing:
        """``found`` was accepted at ``ballot``. ``settled``: a majority reported it under that ballot."""
        if not self._sequences or not self.rules.retry_by_lineage:
            return Standing.CLEAR
        if found is not None and found.operation in self._sequences:
            return Standing.APPLIED
        sequence = found.sequence if found is not None else 0
        create, created_at = self._created or (b"", ballot)
        below = ballot < created_at
        if any([sequence > own and not (below and operation == create) for operation, own in self._sequences.items()]):  # noqa: C419
            return Standing.UNKNOWN
        if settled and not taken_by_create(ballot, found):
            self._sequences = {
                operation: own
                for operation, own in self._sequences.items()
                if own != sequence or (below and operation == create)
            }
        return Standing.CLEAR
