"""One read of one register, up to a settled value: two state machines without I/O, clock or randomness. Pure.

``RowComparison`` is the common case. One replica is asked for its row, the others of a quorum for the check of theirs:
equal checks are equal ballots and equal values under one name. When all of them agree the row is settled.

``Reader`` is everything else. All replicas are asked for the value.

* A quorum reports one ballot: the value is settled (rule 3).
* Else the newest value is accepted by a quorum before it is reported (rule 4). That can be done at its own ballot,
  which needs no promise: REPLAYING. The small copy that it names goes along, for its writer may have reached a single
  replica.
* Where that is refused, or this node may not speak under the ballot of another, an identity round does it: SETTLING.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from storaged.errors import DataDamaged, ServiceUnavailable
from storaged.meta.consensus.change import Fragments, Shared
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import Verdict, created, settled_ballot, shown
from storaged.meta.messages import Accept, AcceptReply, Create, Read, ReadReply
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value


class RowComparison:
    """The rows of one quorum. ``over``: nothing is to be waited for any more; ``agreed``: and they are all the same."""

    __slots__ = ("_check", "agreed", "over", "silent")

    def __init__(self, asked: Sequence[str]) -> None:
        """``asked``: the disks of one quorum."""
        self.silent = list(asked)
        """The disks that have not answered."""
        self.over = self.agreed = False
        self._check: bytes | None = None

    @property
    def answered(self) -> bool:
        """Whether some disk has answered."""
        return self._check is not None

    def report(self, disk: str, check: bytes | None) -> bool:
        """A disk reports the check of its row, empty for none; None: it can't. True: the comparison is over."""
        if self.over:
            return False
        if check is None or (self._check is not None and check != self._check):
            self.over = True
            return True
        self._check = check
        self.silent.remove(disk)
        self.over = self.agreed = not self.silent
        return self.over

    def give_up(self) -> None:
        self.over = True


class ReadState(IntEnum):
    """Where a read is, and what the shell does when the state is entered."""

    NEW = 0
    """Nothing was asked yet: call ``begin``."""
    HEARING = 1
    """Send ``read`` to all disks of ``view``; give each answer to ``replied``."""
    WAITING = 2
    """A quorum has answered, and differs. Wait a moment for the others; then ``waited``."""
    CARRYING = 3
    """Fetch the small copy with the data id ``carry`` from any replica; then ``carried``."""
    REPLAYING = 4
    """Send ``accept`` with ``fragments`` to the disks ``behind``; give each answer to ``accepted``."""
    SETTLING = 5
    """Make an identity round (``proposer``, settling): its outcome is the value."""
    STALE = 6
    """The replicas follow a newer layout: pause, then ``begin`` again."""
    DONE = 7
    """``value``."""
    FAILED = 8
    """``error``."""


class ReadEvent(IntEnum):
    """The calls that may change the state."""

    BEGIN = 0
    REPLIED = 1
    WAITED = 2
    CARRIED = 3
    ACCEPTED = 4
    EXPIRE = 5


NEW, HEARING, WAITING, CARRYING, REPLAYING, SETTLING, STALE, DONE, FAILED = ReadState

_DIFFER: Final = (CARRYING, REPLAYING, SETTLING, FAILED)

READ_TRANSITIONS: Final[Mapping[ReadState, Mapping[ReadEvent, Sequence[ReadState]]]] = {
    NEW: {ReadEvent.BEGIN: (HEARING,)},
    HEARING: {ReadEvent.REPLIED: (WAITING, STALE, DONE, *_DIFFER), ReadEvent.EXPIRE: (FAILED,)},
    WAITING: {ReadEvent.REPLIED: (DONE, *_DIFFER), ReadEvent.WAITED: _DIFFER, ReadEvent.EXPIRE: (FAILED,)},
    CARRYING: {ReadEvent.CARRIED: (REPLAYING, SETTLING)},
    REPLAYING: {ReadEvent.ACCEPTED: (SETTLING, DONE), ReadEvent.EXPIRE: (SETTLING,)},
    SETTLING: {},
    STALE: {ReadEvent.BEGIN: (HEARING,), ReadEvent.EXPIRE: (FAILED,)},
    DONE: {},
    FAILED: {},
}
"""The states that each event may lead to, as long as no rule is broken. The diagram in README.md shows the same."""

NO_COPY: Final = memoryview(b"")


@dataclass(frozen=True)
class Myself:
    """The node that reads. ``gateway``: its certificate says that it is one. Others settle no register of the system
    table, and replay nothing under the ballot of another: replicas refuse that (``meta.authority``)."""

    node: str
    gateway: bool


class Reader:
    """One read. ``state`` says what to do next; late answers change nothing.

    It has many attributes: they are the state of the protocol, and what the shell reads of it.
    """

    def __init__(
        self, shared: Shared, myself: Myself, name: RegisterName, *, want_payload: bool = False, nonce: bytes = b""
    ) -> None:
        """``want_payload``: the small copies that the values name come with them. ``nonce`` of the scope's fence."""
        self._shared = shared
        self._myself = myself
        self._want_payload = want_payload
        self._nonce = nonce
        self.name = name
        self.state = NEW
        self.turn = 0
        self.fenced = False
        """At some replica the scope is fenced."""
        self.replies: dict[str, ReadReply] = {}
        self.payloads: dict[bytes, memoryview] = {}
        """Small copies that came along, by data id."""
        self.doubted: dict[str, ReadReply] = {}
        self.read: Read
        self.accept: Accept
        self.fragments: Fragments = ()
        self.behind: tuple[str, ...] = ()
        self.carry = b""
        self.value: Value | None = None
        self.error: Exception | None = None
        self.differing: Ballot | None = None
        """The ballot under which two replicas hold different values: an alarm."""

    def begin(self, view: View) -> bool:
        self.view = view
        self.replies, self.doubted = {}, {}
        self._failed: set[str] = set()
        self._stale = self._believing = False
        self._answered = 0
        self.turn += 1
        self.read = Read("", self.name, view.epoch, True, self._want_payload)
        self.state = HEARING
        return True

    def replied(self, turn: int, disk: str, reply: ReadReply | None, payload: memoryview = NO_COPY) -> bool:
        """An answer to the read of this turn; None: the call failed."""
        if turn != self.turn or (self.state is not HEARING and self.state is not WAITING):
            return False
        self._answered += 1
        if reply is None or reply.verdict != Verdict.OK or (reply.value is None and reply.accepted != ZERO_BALLOT):
            self._failed.add(disk)
            self._stale = self._stale or (reply is not None and reply.verdict == Verdict.EPOCH)
        else:
            self.fenced = self.fenced or reply.fenced
            if reply.payload:
                self.payloads[reply.payload] = payload
            self._sort_in(disk, reply)
        return self._look()

    def _sort_in(self, disk: str, reply: ReadReply) -> None:
        system = self.name.table == Table.SYSTEM
        if system and not self._believing and self._shared.doubts(self.name, disk, reply.value):
            self.doubted[disk] = reply
        else:
            self.replies[disk] = reply

    def _look(self) -> bool:
        quorum = self.view.quorum
        if self.doubted and quorum.met(self.doubted):
            self.replies |= (
                self.doubted
            )  # nothing better is to be had; the reader of the value says that it can't be used
            self.doubted = {}
            self._believing = True
        everyone = self._answered == len(quorum.disks)
        if quorum.lost({*self._failed, *self.doubted}) and not (self.doubted and not everyone):
            if self._stale:
                self.state = STALE
                return True
            return self._fail(ServiceUnavailable("No majority of the replicas of this key answers. Retry."))
        settled = settled_ballot(quorum, self._accepted(), self._shared.rules)
        if settled is not None:
            return self._conclude(settled)
        if everyone:
            return self._bring_together()
        if self.state is HEARING and quorum.met(self.replies):
            self.state = WAITING
            return True
        return False

    def _accepted(self) -> dict[str, Ballot]:
        return {disk: reply.accepted for disk, reply in self.replies.items()}

    def _conclude(self, ballot: Ballot) -> bool:
        if len({reply.digest for reply in self.replies.values() if reply.accepted == ballot}) > 1:
            self.differing = ballot
            damaged = "Two replicas of this key hold different values under one ballot; neither is believed."
            return self._fail(DataDamaged(damaged))
        return self._done(self._value_at(ballot))

    def _value_at(self, ballot: Ballot) -> Value | None:
        return next((reply.value for reply in self.replies.values() if reply.accepted == ballot), None)

    def waited(self) -> bool:
        return self._bring_together() if self.state is WAITING else False

    def _bring_together(self) -> bool:
        """The replicas differ: the newest value is accepted by a quorum before it is reported."""
        system, rules = self.name.table == Table.SYSTEM, self._shared.rules
        if system and not self._myself.gateway:
            return self._fail(
                ServiceUnavailable(
                    "Replicas of the system partition differ. A gateway will bring them together. Retry."
                )
            )
        if not self._myself.gateway:
            return self._settle()
        self._shared.counts["replays"] += 1
        newest = self._newest = max(reply.accepted for reply in self.replies.values())
        value = self.value = self._value_at(newest)
        if value is None or newest.epoch != self.view.epoch or not self._may_replay(newest, value):
            return self._settle()
        if value.payload and rules.copies_travel:
            self.carry = value.payload
            self.state = CARRYING
            return True
        return self._replay(value, ())

    def _may_replay(self, ballot: Ballot, value: Value) -> bool:
        """A lone replica's lie must not be helped on under its own ballot: of system registers a settling round asks
        all (``register.credible``). A created value is replayed as a create, and replicas refuse those from a node that
        is no gateway."""
        rules, myself = self._shared.rules, self._myself
        if self.name.table == Table.SYSTEM and rules.lone_ballot_does_not_lead:
            return False
        return myself.gateway or (ballot.node == myself.node and not created(value)) or not rules.own_ballots

    def carried(self, fragments: Fragments | None) -> bool:
        """The copy that was asked for; None: no replica gives it now."""
        if self.state is not CARRYING:
            return False
        value = self.value
        return self._settle() if fragments is None or value is None else self._replay(value, fragments)

    def _replay(self, value: Value, fragments: Fragments) -> bool:
        """A created value goes on as a create. A replica that holds something refuses it, and then another ballot is
        needed."""
        rules, newest = self._shared.rules, self._newest
        kind = Create if created(value) and rules.create_into_nothing else Accept
        self.accept = kind("", self.name, newest, value, self._nonce, True)
        self.fragments = fragments
        self._holding = [disk for disk, reply in self.replies.items() if reply.accepted == newest]
        self.behind = tuple(disk for disk in self.view.quorum.disks if disk not in self._holding)
        self._failed = set()
        self.turn += 1
        if not rules.replay_confirmed:
            return self._done(value)
        self.state = REPLAYING
        return True

    def accepted(self, turn: int, disk: str, reply: AcceptReply | None) -> bool:
        """An answer to the accept of this turn; None: the call failed."""
        if turn != self.turn or self.state is not REPLAYING:
            return False
        if reply is None or reply.verdict != Verdict.OK:
            self._failed.add(disk)
            return self._settle() if self.view.quorum.lost(self._failed) else False
        self._holding.append(disk)
        return self._done(self.value) if self.view.quorum.met(self._holding) else False

    def expire(self) -> bool:
        """The deadline is over."""
        if self.state is REPLAYING:
            return self._settle()
        if self.state is STALE:
            return self._fail(
                ServiceUnavailable("The replicas of this key follow a newer layout than this node knows. Retry.")
            )
        if self.state is HEARING or self.state is WAITING:
            return self._fail(ServiceUnavailable("No majority of the replicas of this key answered in time. Retry."))
        return False

    def take_error(self) -> Exception:
        """``error``, once. As with ``Proposer.take_error``, what the replicas reported is freed at once then."""
        error, self.error = self.error, None
        assert error is not None
        return error

    def _settle(self) -> bool:
        self.state = SETTLING
        return True

    def _done(self, value: Value | None) -> bool:
        self.value = shown(value)
        self.state = DONE
        return True

    def _fail(self, error: Exception) -> bool:
        self.error = error
        self.state = FAILED
        return True
