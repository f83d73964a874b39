"""One read of one register, up to a settled value: two state machines without I/O, clock or randomness. Pure.

``RowComparison`` is the common case. One replica is asked for its row, the others of a quorum for the hash of theirs:
equal hashes are equal ballots and equal values. The hash is cryptographic, and the reader computes that of the row: a
replica that lies has no other row with the hash of an honest one. When all of them agree the row is settled.

``Reader`` is everything else. All replicas are asked for the value.

* A quorum reports one ballot: the value is settled (rule 3).
* Else the newest value is accepted by a quorum before it is reported (rule 4): an identity round under a ballot of this
  node does it (SETTLING). That costs a round more than to have it accepted at its own ballot. But a ballot is its
  proposer's alone, so that no acceptor has to ask who else may use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum, unique
from typing import Final

from storaged.errors import DataDamaged, ServiceUnavailable
from storaged.meta.consensus.change import Shared
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import Verdict, settled_ballot, shown
from storaged.meta.messages import Read, ReadReply
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value


class RowComparison:
    """The rows of one quorum. ``over``: nothing is to be waited for any more; ``agreed``: and they are all the same."""

    __slots__ = ("_hash", "agreed", "over", "silent")

    def __init__(self, asked: Sequence[str]) -> None:
        """``asked``: the disks of one quorum."""
        self.silent = list(asked)
        """The disks that have not answered."""
        self.over = self.agreed = False
        self._hash: bytes | None = None

    @property
    def answered(self) -> bool:
        """Whether some disk has answered."""
        return self._hash is not None

    def report(self, disk: str, row_hash: bytes | None) -> bool:
        """A disk reports the hash of its row, empty for none; None: it can't. True: the comparison is over."""
        if self.over:
            return False
        if row_hash is None or (self._hash is not None and row_hash != self._hash):
            self.over = True
            return True
        self._hash = row_hash
        self.silent.remove(disk)
        self.over = self.agreed = not self.silent
        return self.over

    def give_up(self) -> None:
        self.over = True


@unique
class ReadState(IntEnum):
    """Where a read is, and what the shell does when the state is entered."""

    NEW = 0
    """Nothing was asked yet: call ``begin``."""
    HEARING = 1
    """Send ``read`` to all disks of ``view``; give each answer to ``replied``."""
    WAITING = 2
    """A quorum has answered, and differs. Wait a moment for the others; then ``waited``."""
    SETTLING = 3
    """Make an identity round (``proposer``, settling), or have a gateway make one: its outcome is the value."""
    STALE = 4
    """The replicas know a later step of the partition, or a newer layout: learn it or pause, then ``begin`` again."""
    DONE = 5
    """``value``."""
    FAILED = 6
    """``error``."""


@unique
class ReadEvent(IntEnum):
    """The calls that may change the state."""

    BEGIN = 0
    REPLIED = 1
    WAITED = 2
    EXPIRE = 3


NEW, HEARING, WAITING, SETTLING, STALE, DONE, FAILED = ReadState

_DIFFER: Final = (SETTLING, FAILED)

READ_TRANSITIONS: Final[Mapping[ReadState, Mapping[ReadEvent, Sequence[ReadState]]]] = {
    NEW: {ReadEvent.BEGIN: (HEARING,)},
    HEARING: {ReadEvent.REPLIED: (WAITING, STALE, DONE, *_DIFFER), ReadEvent.EXPIRE: (FAILED,)},
    WAITING: {ReadEvent.REPLIED: (DONE, *_DIFFER), ReadEvent.WAITED: _DIFFER, ReadEvent.EXPIRE: (FAILED,)},
    SETTLING: {},
    STALE: {ReadEvent.BEGIN: (HEARING,), ReadEvent.EXPIRE: (FAILED,)},
    DONE: {},
    FAILED: {},
}
"""The states that each event may lead to, as long as no rule is broken. The diagram in README.md shows the same."""

NO_COPY: Final = memoryview(b"")


class Reader:
    """One read. ``state`` says what to do next; late answers change nothing.

    It has many attributes: they are the state of the protocol, and what the shell reads of it.
    """

    def __init__(self, shared: Shared, gateway: bool, name: RegisterName, *, want_payload: bool = False) -> None:
        """``gateway``: this node is one. ``want_payload``: the small copies that the values name come with them."""
        self._shared = shared
        self._gateway = gateway
        self._want_payload = want_payload
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
        """What was accepted with its small copy, or needs none."""
        return {disk: reply.accepted for disk, reply in self.replies.items() if reply.copied}

    def _conclude(self, ballot: Ballot) -> bool:
        values = {disk: reply.value for disk, reply in self.replies.items() if reply.accepted == ballot}
        value = next(iter(values.values()))
        if any(other != value for other in values.values()):
            self.differing = ballot
            chosen = self.view.quorum.agreed({disk: (held,) for disk, held in values.items()})
            if chosen is None and self._answered < len(self.view.quorum.disks):
                return self._await_others()
            held = self.view.quorum.agreed({disk: (reply.value,) for disk, reply in self.replies.items()})
            if chosen is None and held is not None:
                return self._bring_together()
            if chosen is None:
                damaged = "Two replicas of this key hold different values under one ballot; neither is believed."
                return self._fail(DataDamaged(damaged))
            (value,) = chosen
        return self._done(value)

    def _await_others(self) -> bool:
        """One of two replicas lies, or is damaged: the third one says which."""
        if self.state is HEARING:
            self.state = WAITING
            return True
        return False

    def _value_at(self, ballot: Ballot) -> Value | None:
        return next((reply.value for reply in self.replies.values() if reply.accepted == ballot), None)

    def waited(self) -> bool:
        return self._bring_together() if self.state is WAITING else False

    def _bring_together(self) -> bool:
        """The replicas differ: the newest value is accepted by a quorum before it is reported."""
        if self.name.table == Table.SYSTEM and not self._gateway:
            return self._fail(
                ServiceUnavailable(
                    "Replicas of the system partition differ. A gateway will bring them together. Retry."
                )
            )
        if not self._shared.rules.differing_settled:
            return self._done(self._value_at(max(reply.accepted for reply in self.replies.values())))
        self.state = SETTLING
        return True

    def expire(self) -> bool:
        """The deadline is over."""
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

    def _done(self, value: Value | None) -> bool:
        self.value = shown(value)
        self.state = DONE
        return True

    def _fail(self, error: Exception) -> bool:
        self.error = error
        self.state = FAILED
        return True
