"""The floors of one acceptor on disk, and the rows that go below them (``consensus.floors``).

``floor `` and 36 hexadecimal digits of a range (table || scope || shard): the floor that is active there, a ballot. It
is reported when it is on disk. That ballots below it are refused needs no record of its own: the high-water ballot of
the step lies above it (``high_water``), and counts as promised after a restart.

Rows are judged and their deletion is given to the store in one turn of the event loop. A row with an accept on its way
to the disk stays; an accept that is judged later reaches the store later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial

from storaged.clock import Clock
from storaged.cluster.partitions import step_of
from storaged.errors import DiskUnusable, InvalidRequest, StoragedError
from storaged.meta.acceptor.disk_writes import DiskWrites
from storaged.meta.acceptor.epochs import Epochs
from storaged.meta.acceptor.high_water import HighWater
from storaged.meta.acceptor.pending_accept import PendingAccepts
from storaged.meta.consensus.acceptor import AcceptorState
from storaged.meta.consensus.bounds import check_floor
from storaged.meta.consensus.floors import Range, in_order, may_go, may_go_when_closed
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import (
    EXPUNGED_A_CALL,
    FENCES_A_CALL,
    Expunge,
    ExpungeReply,
    FloorReply,
    FloorsAsk,
    FloorSet,
    FloorsReply,
    FloorsTake,
    RangeFloor,
)
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Visibility
from storaged.meta.storage.rowvalue import unpack_row, visibility_of
from storaged.meta.store_ports import MetaStore, RowDamaged, RowRange, StoreBatch
from storaged.wire import decode, encode

META_FLOOR = "floor "
FLOORS_A_READ = 1_000


def stored_floors(store: MetaStore) -> dict[Range, Ballot]:
    """Raises RowDamaged."""
    found: dict[Range, Ballot] = {}
    after = ""
    while names := store.meta_names(META_FLOOR, after=after, limit=FLOORS_A_READ):
        for name in names:
            range_ = range_of(bytes.fromhex(name.removeprefix(META_FLOOR)))
            found[range_] = decode(store.get_meta(name) or b"", Ballot)
        after = names[-1]
    return found


def range_of(prefix: bytes) -> Range:
    return prefix[0], prefix[1:17], prefix[17]


def prefix_of(range_: Range) -> bytes:
    return RegisterName(*range_, b"").prefix


class Floors:
    """Of one disk. Implements ``ports.Floors``."""

    def __init__(
        self,
        store: MetaStore,
        state: AcceptorState,
        pending: PendingAccepts,
        high_water: HighWater,
        epochs: Epochs,
        writes: DiskWrites,
        clock: Clock,
    ) -> None:
        self._store = store
        self._state = state
        self._pending = pending
        self._high_water = high_water
        self._epochs = epochs
        self._writes = writes
        self._clock = clock
        self._writing = asyncio.Lock()
        self._by_partition: dict[int, set[Range]] = {}
        """The ranges that have a floor: a partition that moves is asked for its own, and a disk may have 100,000."""
        self._list(state.floors)

    def _list(self, ranges: Iterable[Range]) -> None:
        for range_ in ranges:
            self._by_partition.setdefault(RegisterName(*range_, b"").partition, set()).add(range_)

    async def end_promises(self, ballot: Ballot) -> None:
        """Lower ballots of its step are refused from now on, for every register, and after a restart too. Returns when
        what was accepted before can be read from the store.
        """
        self._state.end_promises(ballot)
        await self._high_water.raise_above(self._state.common_at(ballot.epoch))
        await self._pending.all_arrived()

    # --- floors -------------------------------------------------------------------------------------------------------

    async def set_floor(self, request: FloorSet, *, timeout_s: float = 10.0) -> FloorReply:
        self._writes.check_answers()
        check_floor(request.prefix, request.ballot)
        range_, ballot = range_of(request.prefix), request.ballot
        final = await self._is_closed(range_[1])
        verdict = self._judge(range_, ballot)
        if verdict is not Verdict.OK:
            return FloorReply(verdict, self._floor_of(range_), final)
        if request.active:
            if self._state.common_at(ballot.epoch) < ballot:
                raise InvalidRequest("A floor is promised before it is active.")
            async with self._writing:
                verdict = self._judge_order(range_, ballot)
                if ballot < self._floor_of(range_) and self._state.rules.floors_grow:
                    verdict = Verdict.PREEMPTED
                if verdict is Verdict.OK:
                    await self._activate({range_: ballot})
        else:
            await self._epochs.raise_at(RegisterName(*range_, b"").partition, ballot.epoch)
            await self.end_promises(ballot)
            async with self._writing:  # floors that were judged before have arrived
                verdict = self._judge_order(range_, ballot)
        return FloorReply(verdict, self._floor_of(range_), final)

    async def _is_closed(self, scope: bytes) -> bool:
        """Whether the bucket was deleted for good."""
        try:
            fence = await self._store.read(partial(self._store.get_fence, scope))
        except RowDamaged as error:
            raise DiskUnusable(f"Disk {self._writes.disk} can't tell whether a bucket is fenced: {error}") from None
        return fence is not None and fence.final

    def _judge(self, range_: Range, ballot: Ballot) -> Verdict:
        """EPOCH: the partition is in a later step, or it has two sets. AHEAD: the floor lies in the future."""
        state = self._state
        if ballot.epoch < state.epoch_at(RegisterName(*range_, b"")):
            return Verdict.EPOCH
        if step_of(ballot.epoch) % 2 and state.rules.floors_when_settled:
            return Verdict.EPOCH
        return Verdict.AHEAD if state.too_far(ballot, self._clock.wall_ms() * 1000) else Verdict.OK

    def _judge_order(self, range_: Range, ballot: Ballot) -> Verdict:
        """Rule 38. EPOCH: ballots of a later step, or of a newer layout in this step, are promised. PREEMPTED: another
        floor is active, and the higher ballot of the two would not have the higher sequence.
        """
        state = self._state
        if not state.rules.floors_grow:
            return Verdict.OK
        if ballot.epoch < max(state.epoch_at(RegisterName(*range_, b"")), state.common_at(ballot.epoch).epoch):
            return Verdict.EPOCH
        return Verdict.OK if in_order(ballot, self._floor_of(range_)) else Verdict.PREEMPTED

    def _floor_of(self, range_: Range) -> Ballot:
        return self._state.floors.get(range_, ZERO_BALLOT)

    async def _activate(self, floors: dict[Range, Ballot]) -> None:
        """Higher ones that are there stay. In the caller's ``_writing``: a lower one must not be written over a
        higher.
        """
        higher = {range_: ballot for range_, ballot in floors.items() if ballot > self._floor_of(range_)}
        meta = {META_FLOOR + prefix_of(range_).hex(): encode(ballot) for range_, ballot in higher.items()}
        if not self._state.rules.floors_durable:
            self._take(higher)
        elif higher:
            await self._writes.durably(StoreBatch(meta=meta), lambda: self._take(higher))

    def _take(self, floors: dict[Range, Ballot]) -> None:
        self._state.floors.update(floors)
        self._list(floors)

    # --- rows that go -------------------------------------------------------------------------------------------------

    async def expunge(self, request: Expunge, *, timeout_s: float = 10.0) -> ExpungeReply:
        """Rows that may have changed while they were read stay for the next call."""
        self._writes.check_answers()
        check_floor(request.prefix, request.ballot)
        if not 0 < request.limit <= EXPUNGED_A_CALL:
            raise InvalidRequest(f"{request.limit} rows at once; the limit is {EXPUNGED_A_CALL}.")
        range_ = range_of(request.prefix)
        verdict = self._judge(range_, request.ballot)
        if verdict is not Verdict.OK:
            return ExpungeReply(verdict)
        store, prefix = self._store, request.prefix
        closed = await self._is_closed(range_[1])
        wanted = RowRange(*range_, request.after, b"", request.limit)
        count = store.dirty_ranges.count_of(prefix)
        try:
            rows = await store.read(partial(store.slice, wanted))
        except RowDamaged as error:
            raise DiskUnusable(f"Disk {self._writes.disk} can't read these rows: {error}") from None
        through = rows[-1][0] if rows else request.after
        done = len(rows) < request.limit
        changed = store.dirty_ranges.changed_since(
            count, prefix, after=request.after, key_prefix=b"", through=None if done else through
        )
        changed = changed or self._judge_order(range_, request.ballot) is not Verdict.OK
        names = [] if changed else self._that_may_go(range_, rows, request.ballot, closed=closed)
        if names and not request.count:
            if self._judge(range_, request.ballot) is not Verdict.OK or self._floor_of(range_) < request.ballot:
                raise InvalidRequest("Rows go below a floor that is active.")
            await self._delete(names)
        return ExpungeReply(Verdict.OK, len(names), through, done)

    def _that_may_go(
        self, range_: Range, rows: Sequence[tuple[bytes, bytes]], floor: Ballot, *, closed: bool
    ) -> list[RegisterName]:
        goes = may_go_when_closed if closed else may_go
        found = []
        for key, row in rows:
            if not closed and visibility_of(row) != Visibility.TOMBSTONE:
                continue
            name = RegisterName(*range_, key)
            try:
                slot = unpack_row(name, row)
            except RowDamaged:
                continue
            if goes(slot, floor) and name not in self._pending.by_name:
                found.append(name)
        return found

    async def _delete(self, names: Sequence[RegisterName]) -> None:
        """Durable when it returns. Given to the store at once: an accept that is judged later must come after it."""
        deleted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: StoragedError | None) -> None:
            if error is not None:
                self._writes.fail(error)
            if deleted.done():
                return
            if error is None:
                deleted.set_result(None)
            else:
                deleted.set_exception(error)

        self._store.post(StoreBatch(gone=names), done)
        await deleted

    # --- a partition moves --------------------------------------------------------------------------------------------

    async def floors(self, request: FloorsAsk, *, timeout_s: float = 10.0) -> FloorsReply:
        self._writes.check_answers()
        known, ranges = self._state.floors, self._by_partition.get(request.partition, ())
        found = sorted((prefix, known[range_]) for range_ in ranges if (prefix := prefix_of(range_)) > request.after)
        some = tuple(RangeFloor(*one) for one in found[:FENCES_A_CALL])
        return FloorsReply(some, len(found) > FENCES_A_CALL)

    async def take_floors(self, request: FloorsTake, *, timeout_s: float = 10.0) -> FloorReply:
        """Durable when it returns. A range keeps a higher floor."""
        self._writes.check_answers()
        if len(request.floors) > FENCES_A_CALL:
            raise InvalidRequest(f"{len(request.floors)} floors at once; the limit is {FENCES_A_CALL}.")
        taken: dict[Range, Ballot] = {}
        for floor in request.floors:
            check_floor(floor.prefix, floor.ballot)
            range_ = range_of(floor.prefix)
            in_partition = RegisterName(*range_, b"").partition == request.partition
            if not in_partition or step_of(floor.ballot.epoch) >= step_of(request.epoch):
                raise InvalidRequest("Not a floor of an earlier step of this partition.")
            taken[range_] = floor.ballot
        async with self._writing:  # judged after the wait: meanwhile the partition may move on
            if any(request.epoch < self._state.epoch_at(RegisterName(*range_, b"")) for range_ in taken):
                return FloorReply(Verdict.EPOCH)
            await self._activate(taken)
        return FloorReply(Verdict.OK)
