"""The acceptor: its answers as tables, and what it knows besides its rows. Pure.

``judge_prepare``, ``judge_accept``, ``judge_create`` and ``judge_read`` try their rows from top to bottom; the first
that matches answers. They judge an ``Acceptor``: what is known of one register when a request comes.

``AcceptorState`` is what one disk's acceptor knows of all registers: promises, the *common promise* of each step, the
high-water ballots, the epochs. Accepted values and fences are on disk; the shell (``meta.acceptor``) brings them along.

Theory of operation
    Promises are kept in memory alone. They change with every prepare, and a sync costs a thousand times more than a
    promise. Instead a *high-water ballot* above all of them is on disk, written in blocks ahead. After a restart it
    counts as promised for every register (rule 2): it becomes the common promise.

    The table of promises is bounded. What is evicted raises the common promise, which costs some proposer a retry and
    nothing else.

    When a partition moves (``cluster.partitions``) each of its steps has higher ballots than all earlier ones. An
    acceptor keeps an epoch for each partition that has moved, and refuses lower steps (EPOCH). The epoch is durable
    before anything is promised or accepted in its step. Therefore common promises and high-water ballots are kept for
    each step: a ballot is compared with those of its own step alone. What was promised in a later step of its partition
    refuses it by the epoch, and what was promised in another step of another partition does not concern it. With one
    common promise for all steps a partition that has moved would stop all others when the disk's node starts again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final, NamedTuple

from storaged.cluster.partitions import STEP_SHIFT, step_of
from storaged.meta.consensus.floors import Range, value_of
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, NEVER, RULES, Rules, Verdict
from storaged.meta.names import PACKED_HEAD_BYTES, ZERO_BALLOT, Ballot, RegisterName, Value
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
    held. ``value`` is what was accepted at ``accepted``. ``floored``: there is no row, and the range's floor counts
    in its place (``floors``).
    """

    promised: Ballot
    accepted: Ballot
    value: Value | None
    epoch: int
    fence: Fence | None = None
    damaged: bool = False
    floored: bool = False

    @property
    def final(self) -> bool:
        """Whether the scope's fence stays for ever."""
        return self.fence is not None and self.fence.final

    @property
    def lends(self) -> bool:
        """Whether the scope's fence is one that lends."""
        return self.fence is not None and self.fence.lends

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
        return self.final


def judge_prepare(acceptor: Acceptor, ballot: Ballot, nonce: bytes, rules: Rules = RULES) -> Verdict:
    """``nonce`` of the scope's fence: a settling round has it, and a change that a fence that lends lets pass."""
    if ballot.epoch < acceptor.epoch and rules.fence_by_epoch:
        return Verdict.EPOCH
    if acceptor.fence is not None and not _passes(acceptor.fence, nonce, True, rules):
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
    if acceptor.fence is not None and not _passes(acceptor.fence, nonce, identity, rules):
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


def _passes(fence: Fence, nonce: bytes, settles: bool, rules: Rules) -> bool:
    """Whether a fence lets a request with this nonce pass. ``settles``: it changes no value, as far as it says."""
    if fence.lends and not rules.lends_by_nonce:
        return True
    return fence.nonce == nonce and (settles or fence.lends)


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
    """No fence lets a create pass, whatever its nonce: what has the nonce changes rows that are there."""
    verdict = judge_accept(acceptor, ballot, value, nonce, identity, rules, copied=copied)
    if verdict is not Verdict.OK:
        return verdict
    if acceptor.fence is not None and not _passes(acceptor.fence, b"", False, rules):
        return Verdict.FENCED
    if acceptor.damaged:
        return Verdict.DAMAGED
    if acceptor.accepted not in (ZERO_BALLOT, ballot) and rules.create_into_nothing:
        return Verdict.OK if acceptor.floored and _begins_above(acceptor, value, rules) else Verdict.HELD
    return Verdict.OK


def _begins_above(acceptor: Acceptor, value: Value, rules: Rules) -> bool:
    """Whether a create comes from a proposer that knew the floor."""
    assert acceptor.value is not None
    return value.sequence > acceptor.value.sequence or not rules.creates_above_floors


def judge_read(acceptor: Acceptor, epoch: int, rules: Rules = RULES) -> Verdict:
    if epoch < acceptor.epoch and rules.fence_by_epoch:
        return Verdict.EPOCH
    if acceptor.damaged:
        return Verdict.DAMAGED
    return Verdict.OK


def lowest_of(high_water: Ballot) -> Ballot:
    """The lowest ballot with the epoch and counter of ``high_water``: everything promised while that was in force lies
    below it.
    """
    return Ballot(high_water.epoch, high_water.counter, "", b"")


def needs_high_water(ballot: Ballot, high_water: Ballot) -> bool:
    """Whether a promise of ``ballot`` must wait for a higher high-water ballot on disk."""
    return ballot[:2] >= high_water[:2]


def high_water_for(ballot: Ballot) -> Ballot:
    return Ballot(ballot.epoch, ballot.counter + HIGH_WATER_BLOCK_US, "", b"")


FIRST_STEP: Final = 1 << STEP_SHIFT
"""Epochs below it are those of partitions that never moved."""

PARTITIONS_KNOWN_MAX = 4_096
"""Scopes and shards whose partition is remembered, in a cluster where partitions have moved."""


class StepPromise:
    """The common promise and the high-water ballot of one step, for all partitions of a disk. See ``AcceptorState``."""

    __slots__ = ("common", "high_water", "issued", "near")

    def __init__(self, high_water: Ballot, *, promised: bool) -> None:
        """``promised``: everything below the high-water ballot counts as promised."""
        self.common = lowest_of(high_water) if promised else ZERO_BALLOT
        self.issued = high_water
        self.set_high_water(high_water)

    def set_high_water(self, ballot: Ballot) -> None:
        self.high_water = ballot
        self.near = ballot.epoch, ballot.counter - HIGH_WATER_BLOCK_US // 2


class AcceptorState:
    """What one disk's acceptor knows besides its rows and fences.

    Attributes without ``_at`` in their names are those of partitions that never moved: step 0.
    """

    def __init__(
        self,
        high_water: Ballot,
        epoch: int,
        rules: Rules = RULES,
        promises_max: int = PROMISES_MAX,
        *,
        high_waters: Mapping[int, Ballot] | None = None,
        epochs: Mapping[int, int] | None = None,
        floors: Mapping[Range, Ballot] | None = None,
    ) -> None:
        """As the disk has them: ``high_water`` and ``epoch``; ``high_waters`` by step, and ``epochs`` by partition, of
        partitions that have moved; ``floors`` by range.
        """
        self.rules = rules
        self.floors: dict[Range, Ballot] = {**(floors or {})}
        """Of ranges whose deleted keys were expunged: what a missing row reports."""
        self.promises: OrderedDict[RegisterName, Ballot] = OrderedDict()
        self.sequences: dict[RegisterName, int] = {}
        """Of what was accepted here for registers that are promised."""
        self.epoch = epoch
        """Requests of an earlier layout epoch are refused."""
        self.epochs: dict[int, int] = {}
        """By partition: requests with a lower epoch are refused. Of partitions that have moved; the layout's part is 0,
        unless the disk's own epoch is higher."""
        self.evicted = 0
        """Promises that the common one has replaced."""
        self._promises_max = promises_max
        self._partitions: dict[tuple[bytes, int] | bytes, int] = {}
        """By scope and shard, or by the beginning of a packed name."""
        self._steps = {0: StepPromise(high_water, promised=rules.promises_survive_restart)}
        for step, ballot in (high_waters or {}).items():
            self._steps[step] = StepPromise(ballot, promised=rules.promises_survive_restart)
        self.common = self._steps[0].common
        """Promised for every register."""
        self.near_high_water = self._steps[0].near
        """From this epoch and counter on it is time to write a higher one."""
        for partition, its in (epochs or {}).items():
            self.raise_epoch_at(partition, its)

    # --- epochs -------------------------------------------------------------------------------------------------------

    def epoch_at(self, name: RegisterName) -> int:
        """Below it requests for this register are refused."""
        return self.epochs.get(self.partition_of(name), self.epoch) if self.epochs else self.epoch

    def partition_of(self, name: RegisterName) -> int:
        """``name.partition``, remembered."""
        table, scope, shard, _key = name
        if not table:
            return name.partition
        found = self._partitions.get((scope, shard))
        return self._remember((scope, shard), name) if found is None else found

    def epoch_at_packed(self, packed: bytes) -> int:
        """``epoch_at``, of a packed name: nothing is unpacked for each row that is read."""
        where = packed[:PACKED_HEAD_BYTES]
        found = self._partitions.get(where)
        if found is None:
            found = self._remember(where, RegisterName(packed[0], packed[1:17], packed[17], b""))
        return self.epochs.get(found, self.epoch)

    def _remember(self, where: tuple[bytes, int] | bytes, name: RegisterName) -> int:
        if len(self._partitions) >= PARTITIONS_KNOWN_MAX:
            self._partitions.clear()
        found = self._partitions[where] = name.partition
        return found

    def raise_epoch(self, epoch: int) -> None:
        """Of the disk: in force for all partitions."""
        self.epoch = max(self.epoch, epoch)
        for partition, its in self.epochs.items():
            self.epochs[partition] = max(its, self.epoch)

    def raise_epoch_at(self, partition: int, epoch: int) -> None:
        """Only the step counts: within one step the layouts have the same replicas."""
        if epoch >= FIRST_STEP:
            fence = step_of(epoch) << STEP_SHIFT
            self.epochs[partition] = max(self.epochs.get(partition, self.epoch), fence)

    # --- one register -------------------------------------------------------------------------------------------------

    def of(self, name: RegisterName, slot: Slot | None, fence: Fence | None, epoch: int) -> Acceptor:
        """``slot`` as the disk has it. ``epoch`` of the request."""
        promised = max(self.promises.get(name, ZERO_BALLOT), self.common_at(epoch))
        if slot is None:
            floor = self.floors.get(name[:3]) if self.floors else None
            if floor is not None and self.rules.floors_reported:
                return Acceptor(promised, floor, value_of(floor), self.epoch_at(name), fence, floored=True)
            return Acceptor(promised, ZERO_BALLOT, None, self.epoch_at(name), fence)
        return Acceptor(promised, slot.ballot, slot.value, self.epoch_at(name), fence)

    def of_damaged(self, name: RegisterName, fence: Fence | None, epoch: int) -> Acceptor:
        """Of a register whose row can't be read: it may have accepted anything below the high-water ballot of the
        request's step. Had it accepted anything in a later step, the epoch would refuse the request.
        """
        high_water = lowest_of(self.high_water_at(epoch))
        above_all = max(self.promises.get(name, ZERO_BALLOT), self.common_at(epoch), high_water)
        return Acceptor(above_all, ZERO_BALLOT, None, self.epoch_at(name), fence, damaged=True)

    def of_promised(self, name: RegisterName, ballot: Ballot, fence: Fence | None) -> Acceptor:
        """Of a register that is promised to this very ballot: it has accepted nothing since, and before that something
        lower, so that its row need not be read again.
        """
        return Acceptor(max(ballot, self.common_at(ballot.epoch)), ZERO_BALLOT, None, self.epoch_at(name), fence)

    def promise(self, name: RegisterName, ballot: Ballot, slot: Slot | None = None) -> None:
        """``slot``: what the register holds."""
        promises = self.promises
        promises[name] = ballot
        promises.move_to_end(name)
        if len(promises) > self._promises_max:
            evicted_name, evicted = promises.popitem(last=False)
            self.sequences.pop(evicted_name, None)
            self._raise_common(evicted)
            self.evicted += 1
        if slot is not None:
            self.sequences[name] = slot.value.sequence

    def accepted(self, name: RegisterName, ballot: Ballot) -> None:
        """The ballot's value is on disk, and binds as the promise did."""
        if self.promises.get(name, ballot) <= ballot:
            self.promises.pop(name, None)
            self.sequences.pop(name, None)

    def end_promises(self, ballot: Ballot) -> None:
        """Lower ballots of its step are refused from now on, for every register."""
        self._raise_common(ballot)

    # --- the common promise, and ballots ahead ------------------------------------------------------------------------

    def common_at(self, epoch: int) -> Ballot:
        """What is promised for every register in the step of this epoch."""
        if epoch < FIRST_STEP:
            return self.common
        found = self._steps.get(epoch >> STEP_SHIFT)
        return ZERO_BALLOT if found is None else found.common

    def high_water_at(self, epoch: int) -> Ballot:
        """As it is on disk, of the step of this epoch."""
        found = self._steps.get(epoch >> STEP_SHIFT)
        return ZERO_BALLOT if found is None else found.high_water

    def near(self, ballot: Ballot) -> bool:
        """Whether a ballot of at least ``near_high_water`` is near the high-water ballot of its step, or above it."""
        found = self._steps.get(ballot.epoch >> STEP_SHIFT)
        return found is None or ballot[:2] >= found.near

    def set_high_water(self, ballot: Ballot) -> None:
        """It is on disk. Lower ones than the one known change nothing."""
        step = self._step(ballot.epoch)
        if ballot > step.high_water:
            step.set_high_water(ballot)
            if ballot.epoch < FIRST_STEP:
                self.near_high_water = step.near

    def next_high_water(self, ballot: Ballot) -> Ballot:
        """A high-water ballot above this one, to be written. Never lower than one that is already on its way: what is
        posted to the store keeps its order, and the last one stays.
        """
        step = self._step(ballot.epoch)
        step.issued = max(step.issued, high_water_for(ballot))
        return step.issued

    def too_far(self, ballot: Ballot, now_us: int) -> bool:
        """Rule 15. Asked for ballots near the high-water ballot or above it, so that others cost nothing."""
        counter = max(step.high_water.counter for step in self._steps.values())
        return ballot.counter > max(now_us, counter) + COUNTER_AHEAD_MAX_US and self.rules.counters_bounded

    def _step(self, epoch: int) -> StepPromise:
        found = self._steps.get(epoch >> STEP_SHIFT)
        if found is None:
            found = self._steps[epoch >> STEP_SHIFT] = StepPromise(ZERO_BALLOT, promised=False)
        return found

    def _raise_common(self, ballot: Ballot) -> None:
        step = self._step(ballot.epoch)
        step.common = max(step.common, ballot)
        if ballot.epoch < FIRST_STEP:
            self.common = step.common
