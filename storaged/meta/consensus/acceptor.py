"""The acceptor: its answers as tables, and what it knows besides its rows. Pure.

``judge_prepare``, ``judge_accept``, ``judge_create`` and ``judge_read`` try their rows from top to bottom; the first
that matches answers. They judge an ``Acceptor``: what is known of one register when a request comes.

``AcceptorState`` is what one disk's acceptor knows of all registers: promises, the floor under them, the high-water
ballot, the layout epoch. Accepted values and fences are on disk; the shell (``meta.acceptor``) brings them along.

Theory of operation
    Promises are kept in memory alone. They change with every prepare, and a sync costs a thousand times more than a
    promise. Instead a *high-water ballot* above all of them is on disk, written in blocks ahead. After a restart it
    counts as promised for every register (rule 2): it becomes the floor.

    The table of promises is bounded. What is evicted raises the floor under all registers, which costs some proposer a
    retry and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, NEVER, RULES, Rules, Verdict
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Value
from storaged.meta.store_ports import Fence, Slot

HIGH_WATER_BLOCK_US = 10_000_000
"""How far ahead of the promises the high-water ballot is persisted: one commit in 5 to 10 s of traffic. After a restart
proposers are refused once, before they have caught up with it.
"""

PROMISES_MAX = 65_536
"""Prepared and not yet accepted registers at one disk; about 20 MiB when full."""


class Acceptor(NamedTuple):
    """What an acceptor knows of one register when a request comes. ``promised`` is the highest ballot promised for it
    or for every register; when ``damaged`` it includes the high-water ballot, above anything that the lost row may have
    held. ``value`` is what was accepted at ``accepted``.
    """

    promised: Ballot
    accepted: Ballot
    value: Value | None
    epoch: int
    fence: Fence | None = None
    damaged: bool = False

    @property
    def lowest(self) -> Ballot:
        """The lowest ballot that is not refused."""
        return max(self.promised, self.accepted)

    def refuses_for_good(self, ballot: Ballot, verdict: Verdict) -> bool:
        """Whether nothing was accepted here under a ballot that is refused, nor ever will be: a higher one is promised,
        which binds as long as the disk, and only a lower one was accepted. Or the scope has a final fence.
        """
        if verdict is Verdict.PREEMPTED:
            return self.accepted < ballot < self.promised and not self.damaged
        return self.fence is not None and self.fence.final


def judge_prepare(acceptor: Acceptor, ballot: Ballot, nonce: bytes, rules: Rules = RULES) -> Verdict:
    """``nonce`` of the scope's fence: a settling round has it."""
    if ballot.epoch < acceptor.epoch and rules.fence_by_epoch:
        return Verdict.EPOCH
    if acceptor.fence is not None and acceptor.fence.nonce != nonce:
        return Verdict.FENCED
    if acceptor.damaged:
        return Verdict.DAMAGED
    if ballot < acceptor.lowest:
        return Verdict.PREEMPTED
    return Verdict.OK


def judge_accept(
    acceptor: Acceptor,
    ballot: Ballot,
    value: Value,
    nonce: bytes,
    identity: bool,
    rules: Rules = RULES,
    *,
    copied: bool = True,
) -> Verdict:
    """``identity``: the value is one that was accepted before. ``copied``: the small copy that the value names comes
    along, or is durable on this disk; or the value names none.
    """
    if ballot.epoch < acceptor.epoch and rules.fence_by_epoch:
        return Verdict.EPOCH
    if acceptor.fence is not None and not (identity and acceptor.fence.nonce == nonce):
        return Verdict.FENCED
    if ballot < acceptor.lowest:
        return Verdict.PREEMPTED
    if ballot == acceptor.accepted and value != acceptor.value:
        return Verdict.CONFLICT
    if identity and acceptor.value is not None and not _may_settle(value):
        return Verdict.CONFLICT
    if not copied and ballot != acceptor.accepted and rules.copies_with_rows:
        return Verdict.UNSTORED
    return Verdict.OK


def _may_settle(value: Value) -> bool:
    """What an acceptor can tell of a settling round, which must change no value: nothing was ever written with the
    sequence 0. It can't tell whether the value was accepted somewhere: a replica that lags gets what it never saw. Nor
    does it insist on what it holds of the same operation. Where the two differ its own row may be the wrong one, and
    would never be healed.
    """
    return value.sequence != 0 or value == NEVER


def judge_create(
    acceptor: Acceptor,
    ballot: Ballot,
    value: Value,
    nonce: bytes,
    identity: bool,
    rules: Rules = RULES,
    *,
    copied: bool = True,
) -> Verdict:
    verdict = judge_accept(acceptor, ballot, value, nonce, identity, rules, copied=copied)
    if verdict is not Verdict.OK:
        return verdict
    if acceptor.damaged:
        return Verdict.DAMAGED
    if acceptor.accepted not in (ZERO_BALLOT, ballot) and rules.create_into_nothing:
        return Verdict.HELD
    return Verdict.OK


def judge_read(acceptor: Acceptor, epoch: int, rules: Rules = RULES) -> Verdict:
    if epoch < acceptor.epoch and rules.fence_by_epoch:
        return Verdict.EPOCH
    if acceptor.damaged:
        return Verdict.DAMAGED
    return Verdict.OK


def floor_of(high_water: Ballot) -> Ballot:
    """The lowest ballot with the epoch and counter of ``high_water``: everything promised while that was in force lies
    below it.
    """
    return Ballot(high_water.epoch, high_water.counter, "", b"")


def needs_high_water(ballot: Ballot, high_water: Ballot) -> bool:
    """Whether a promise of ``ballot`` must wait for a higher high-water ballot on disk."""
    return ballot[:2] >= high_water[:2]


def high_water_for(ballot: Ballot) -> Ballot:
    return Ballot(ballot.epoch, ballot.counter + HIGH_WATER_BLOCK_US, "", b"")


class AcceptorState:
    """What one disk's acceptor knows besides its rows and fences."""

    def __init__(self, high_water: Ballot, epoch: int, rules: Rules = RULES, promises_max: int = PROMISES_MAX) -> None:
        """``high_water`` and ``epoch`` as the disk has them."""
        self.promises: OrderedDict[RegisterName, Ballot] = OrderedDict()
        self.sequences: dict[RegisterName, int] = {}
        """Of what was accepted here for registers that are promised."""
        self.floor = floor_of(high_water) if rules.promises_survive_restart else ZERO_BALLOT
        """Promised for every register."""
        self.epoch = epoch
        """Requests of an earlier layout epoch are refused."""
        self.evicted = 0
        """Promises that the floor has replaced."""
        self._rules = rules
        self._promises_max = promises_max
        self._issued = high_water
        self.set_high_water(high_water)

    # --- one register -------------------------------------------------------------------------------------------------

    def of(self, name: RegisterName, slot: Slot | None, fence: Fence | None) -> Acceptor:
        """``slot`` as the disk has it."""
        promised = max(self.promises.get(name, ZERO_BALLOT), self.floor)
        if slot is None:
            return Acceptor(promised, ZERO_BALLOT, None, self.epoch, fence)
        return Acceptor(promised, slot.ballot, slot.value, self.epoch, fence)

    def of_damaged(self, name: RegisterName, fence: Fence | None) -> Acceptor:
        """Of a register whose row can't be read: it may have accepted anything below the high-water ballot."""
        above_all = max(self.promises.get(name, ZERO_BALLOT), self.floor, floor_of(self.high_water))
        return Acceptor(above_all, ZERO_BALLOT, None, self.epoch, fence, damaged=True)

    def of_promised(self, ballot: Ballot, fence: Fence | None) -> Acceptor:
        """Of a register that is promised to this very ballot: it has accepted nothing since, and before that something
        lower, so that its row need not be read again.
        """
        return Acceptor(max(ballot, self.floor), ZERO_BALLOT, None, self.epoch, fence)

    def promise(self, name: RegisterName, ballot: Ballot, slot: Slot | None = None) -> None:
        """``slot``: what the register holds."""
        promises = self.promises
        promises[name] = ballot
        promises.move_to_end(name)
        if len(promises) > self._promises_max:
            evicted_name, evicted = promises.popitem(last=False)
            self.sequences.pop(evicted_name, None)
            self.floor = max(self.floor, evicted)
            self.evicted += 1
        if slot is not None:
            self.sequences[name] = slot.value.sequence

    def accepted(self, name: RegisterName, ballot: Ballot) -> None:
        """The ballot's value is on disk, and binds as the promise did."""
        if self.promises.get(name, ballot) <= ballot:
            self.promises.pop(name, None)
            self.sequences.pop(name, None)

    def end_promises(self, ballot: Ballot) -> None:
        """Lower ballots are refused from now on, for every register."""
        self.floor = max(self.floor, ballot)

    # --- ballots ahead ------------------------------------------------------------------------------------------------

    def set_high_water(self, ballot: Ballot) -> None:
        """It is on disk."""
        self.high_water = ballot
        self.near_high_water = ballot.epoch, ballot.counter - HIGH_WATER_BLOCK_US // 2
        """From this epoch and counter on it is time to write a higher one."""

    def next_high_water(self, ballot: Ballot) -> Ballot:
        """A high-water ballot above this one, to be written. Never lower than one that is already on its way: what is
        posted to the store keeps its order, and the last one stays.
        """
        self._issued = max(self._issued, high_water_for(ballot))
        return self._issued

    def too_far(self, ballot: Ballot, now_us: int) -> bool:
        """Rule 15. Asked for ballots near the high-water ballot or above it, so that others cost nothing."""
        highest = max(now_us, self.high_water.counter) + COUNTER_AHEAD_MAX_US
        return ballot.counter > highest and self._rules.counters_bounded
