"""One disk as an acceptor: the shell that gives ``consensus.acceptor`` a store, and time to sync.

Theory of operation
    Accepted values are rows of the store, and the store shows only what is synced. While an accept of a register is on
    its way to the disk, every other request for that register waits: a prepare's answer must not miss an accept that
    was not answered yet (rule 1).

    The small copy that comes with an accept is durable with the row that names it, or before it. Where none comes
    along, a row that names one is written only if the copy is durable here already. So each row says that its copy was
    durable on this disk when it was accepted (``Slot.copied``), and promises and reads report it.

    A fence is answered when everything that was judged before it has arrived or failed: that may still wait for its
    copy when the fence is on disk.

    ``high_water`` keeps the high-water ballot on disk above all promises. ``disk_writes`` ends the answers when the
    store refuses a commit. Where a row is not in memory, ``try_`` calls give up, and the others have a thread read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from storaged.clock import Clock, SystemClock
from storaged.cluster.ports import OnReply
from storaged.errors import DiskDamaged, DiskForeign, DiskUnusable, SlowDown, StoragedError
from storaged.meta import messages
from storaged.meta.acceptor.counts import AcceptorCounts, ReplicaStatistics
from storaged.meta.acceptor.disk_writes import DiskWrites
from storaged.meta.acceptor.epochs import META_EPOCH, Epochs, stored_epochs
from storaged.meta.acceptor.fences import Fences
from storaged.meta.acceptor.floors import Floors, stored_floors
from storaged.meta.acceptor.handover import Handover
from storaged.meta.acceptor.high_water import HighWater, stored_high_waters
from storaged.meta.acceptor.pages import DiskPages
from storaged.meta.acceptor.pending_accept import OnAcceptReply, PendingAccept, PendingAccepts, resolve
from storaged.meta.acceptor.room import use_of
from storaged.meta.acceptor.rows import NO_BYTES, DiskRows
from storaged.meta.acceptor.turns import TurnKeeper
from storaged.meta.consensus.acceptor import (
    FIRST_STEP,
    PROMISES_MAX,
    Acceptor,
    AcceptorState,
    judge_accept,
    judge_create,
    judge_prepare,
    needs_high_water,
)
from storaged.meta.consensus.bounds import check_created, check_epoch, check_fence, check_name, check_value
from storaged.meta.consensus.register import RULES, Rules, Verdict
from storaged.meta.messages import AcceptReply, ScanReply, ScanRequest
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table
from storaged.meta.ports import OnAnswer
from storaged.meta.store_ports import Copies, MetaStore, NotInMemory, RowDamaged, Slot, StoreBatch, StoreFull
from storaged.wire import Buffer, Message

OBJECT = int(Table.OBJECT)
META_RETIRED = "retired"


class LocalReplica:
    """The acceptor of one disk of this process. Implements ``ports.LocalTryReplica``; one event loop only. It has more
    than 25 methods, for it has those of the port twice: as calls that wait, and as ``try_`` calls that do not.
    """

    def __init__(
        self,
        disk: str,
        store: MetaStore,
        *,
        copies: Copies | None = None,
        promises_max: int = PROMISES_MAX,
        rules: Rules = RULES,
        clock: Clock | None = None,
    ) -> None:
        """Raises DiskForeign when the store's own record of its promises is damaged (rule 9)."""
        self.disk = disk
        self._store = store
        self._copies = copies
        self._rules = rules
        self._clock = clock if clock is not None else SystemClock()
        self._counts = AcceptorCounts(disk)
        self.turns = TurnKeeper()
        self.turn = self.turns.turn
        self._health, self._room = store.health, store.health.room
        try:
            epoch, retired = (store.get_meta(name) for name in (META_EPOCH, META_RETIRED))
            epochs, high_waters, floors = stored_epochs(store), stored_high_waters(store), stored_floors(store)
        except (RowDamaged, ValueError) as error:  # ValueError: a name that says nothing
            raise DiskDamaged(f"The metadata store of disk {disk} has lost its record of promises: {error}") from None
        of_disk, high_water = int.from_bytes(epoch or b"", "big"), high_waters.pop(0, ZERO_BALLOT)
        known: Any = {"high_waters": high_waters, "epochs": epochs, "floors": floors}
        self.state = AcceptorState(high_water, of_disk, rules, promises_max, **known)
        self.pending = PendingAccepts()
        self._writes = DiskWrites(disk, store)
        if retired and rules.foreign_refused:
            self._writes.fall_silent("retired from the ring")
        self._high_water = HighWater(self.state, self._writes)
        self._epochs = Epochs(self.state, self._writes, rules, of_disk)
        self._fences = Fences(disk, store, self.state, rules)
        self.handover = Handover(disk, store, self._fences, self._writes, self.pending)
        self.floors = Floors(store, self.state, self.pending, self._high_water, self._epochs, self._writes, self._clock)
        self._rows = DiskRows(store, self.state, self._fences, self.pending, self._writes, copies, rules)
        self._pages = DiskPages(store, self._writes, self._clock)

    @classmethod
    def open(cls, disk: str, store: MetaStore, expected_store_id: bytes, **options: Any) -> LocalReplica:
        """Raises DiskForeign when the store is not the one that this node has had under this name (rule 9): its
        promises are unknown.
        """
        if store.store_id != expected_store_id and options.get("rules", RULES).foreign_refused:
            raise DiskForeign(
                f"The metadata store of disk {disk} is {store.store_id.hex()}; {expected_store_id.hex()} was expected."
            )
        return cls(disk, store, **options)

    def statistics(self) -> ReplicaStatistics:
        rows, silent = self._rows, self._writes.silent
        damaged = rows.damaged + self._pages.damaged
        return self._counts.statistics(
            self.state, silent or "ok", len(self.pending), reads=rows.reads, refused=rows.refused, damaged=damaged
        )

    async def close(self) -> None:
        """Answers nothing from now on; returns when what was on its way to the disk has arrived. The store stays
        open.
        """
        if not self._writes.silent:
            self._writes.fall_silent("closed")
        while self._writes.tasks or self.pending.by_name:
            waiting: list[asyncio.Future[Any]] = [*self._writes.tasks, *self.pending.arrivals()]
            await asyncio.wait(waiting)

    async def retire(self) -> None:
        """This disk left the ring for good: it answers nothing any more, also after a restart (rule 11)."""
        await self._writes.durably(StoreBatch(meta={META_RETIRED: b"1"}))
        self._writes.fall_silent("retired from the ring")

    def fail(self, error: Exception) -> None:
        """Falls silent for ever: what the disk holds is uncertain."""
        self._writes.fail(error)

    def silence(self, reason: str) -> None:
        """Answers nothing any more in this process: the disk is not what it was."""
        if not self._writes.silent:
            self._writes.fall_silent(reason)

    async def end_promises(self, epoch: int) -> None:
        """Refuses, now and after a restart, every ballot of up to this epoch, in its step, that was drawn before this
        call. Clocks differ: the caller allows for it. Returns when what was accepted before can be read from the store.
        It costs proposals that are under way a retry, at most.
        """
        self._writes.check_answers()
        await self.floors.end_promises(Ballot(epoch, self._clock.wall_ms() * 1000, "", b""))

    # --- prepare ------------------------------------------------------------------------------------------------------

    async def prepare(self, request: messages.Prepare, *, timeout_s: float = 10.0) -> messages.PrepareReply:
        while True:
            await self._quiet(request.name)
            reply = self.try_prepare(request)
            if reply is not None:
                return reply
            if request.name not in self.pending.by_name:
                await self._rows.bring(request.name)
                await self._raise_for(request.name, request.ballot)

    async def _raise_for(self, name: RegisterName, ballot: Ballot, *, high_water: bool = True) -> None:
        """What must be on disk before this ballot is promised. One too far ahead raises no high-water ballot: it had to
        wait before it was judged, and will be refused.
        """
        await self._epochs.raise_at(name.partition, ballot.epoch)
        if high_water and not self.state.too_far(ballot, self._clock.wall_ms() * 1000):
            await self._high_water.raise_above(ballot)

    def try_prepare(self, request: messages.Prepare) -> messages.PrepareReply | None:
        """None: it has to wait: for the disk, an accept on its way there, a higher high-water ballot or epoch."""
        if self._writes.silent or self._health.hung:
            self._writes.check_answers()
        name, ballot = request.name, request.ballot
        if name in self.pending.by_name:
            return None
        check_name(name, ballot)
        state = self.state
        try:
            slot, acceptor = self._rows.acceptor(name, ballot.epoch)
        except NotInMemory:
            return None
        verdict = judge_prepare(acceptor, ballot, request.nonce, self._rules)
        if verdict is not Verdict.OK:
            self._counts.prepares += 1
            self._counts.refused += 1
            return messages.PrepareReply(verdict, acceptor.lowest, final=acceptor.final, lends=acceptor.lends)
        if ballot.epoch >= FIRST_STEP and self._epochs.behind(name, ballot.epoch):
            return None
        if ballot[:2] >= state.near_high_water and state.near(ballot):
            if state.too_far(ballot, self._clock.wall_ms() * 1000):
                self._counts.prepares += 1
                self._counts.refused += 1
                return messages.PrepareReply(Verdict.AHEAD, acceptor.lowest)
            if needs_high_water(ballot, state.high_water_at(ballot.epoch)):
                return None
            self._high_water.begin_raise(ballot)
        self._counts.prepares += 1
        if ballot != acceptor.accepted:  # otherwise the accepted ballot already forbids lower ones
            state.promise(name, ballot, slot)
        if slot is None:
            return messages.PrepareReply(Verdict.OK, acceptor.lowest, acceptor.accepted, acceptor.value)
        copied = slot.copied or not slot.value.payload
        return messages.PrepareReply(Verdict.OK, acceptor.lowest, slot.ballot, slot.value, copied=copied)

    # --- accept -------------------------------------------------------------------------------------------------------

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float = 10.0
    ) -> messages.AcceptReply:
        answered: asyncio.Future[messages.AcceptReply] = asyncio.get_running_loop().create_future()
        while not self.try_accept(request, body, partial(resolve, answered)):
            await self._quiet(request.name)
            await self._rows.bring(request.name)
            await self._raise_for(request.name, request.ballot, high_water=bool(request.header))
        return await answered

    def try_accept(
        self,
        request: messages.Accept,
        body: Sequence[Buffer],
        on_answer: OnAcceptReply,
        header: bytes = b"",
        *,
        create: bool = False,
    ) -> bool:
        """Judges, and has the disk write. ``on_answer`` gets what ``accept`` returns or raises. What was begun arrives,
        whether or not the caller still waits. ``header``: of the copy for this replica, when the request is one for
        several. ``create``: the request is one, whatever its type.

        False: it has to wait for another accept of this register, the disk, a higher high-water ballot or epoch. Raises
        when nothing was begun: SlowDown when as much is on its way to the disk as may be.
        """
        if self._writes.silent or self._health.hung:
            self._writes.check_answers()
        name, ballot, state = request.name, request.ballot, self.state
        header = header or request.header
        check_name(name, ballot)
        pending = self.pending.by_name.get(name)
        if pending is not None:
            return pending.joined(request, header, on_answer)
        near = ballot[:2] >= state.near_high_water and state.near(ballot)
        if near and state.too_far(ballot, self._clock.wall_ms() * 1000):
            self._counts.refused += 1
            on_answer(messages.AcceptReply(Verdict.AHEAD))
            return True
        if ballot.epoch >= FIRST_STEP and self._epochs.behind(name, ballot.epoch):
            return False
        if near and header and needs_high_water(ballot, state.high_water_at(ballot.epoch)):
            self._high_water.begin_raise(ballot)
            return False
        check_value(request.value)
        create = create or isinstance(request, messages.Create)
        if name.table != OBJECT:
            check_created(name, request.value, create)
        try:
            copied = bool(header) or not request.value.payload or self._rows.has_copy(request)
            acceptor, verdict = (self._judge_create if create else self._judge_accept)(request, copied)
        except NotInMemory:
            return False
        self._counts.accepts += 1
        if verdict is Verdict.OK:
            self._begin_write(request, acceptor, header, body, on_answer, near=near, copied=copied)
        else:
            on_answer(self._refused(verdict, acceptor, name, ballot))
        return True

    def _begin_write(
        self,
        request: messages.Accept,
        acceptor: Acceptor,
        header: bytes,
        body: Sequence[Buffer],
        on_answer: OnAcceptReply,
        *,
        near: bool,
        copied: bool,
    ) -> None:
        """``near``: the ballot lies near the high-water ballot, or above it. ``copied``: as in ``judge_accept``. A
        value that is on disk already is not written again, unless its copy comes with it.
        """
        name, ballot, value = request.name, request.ballot, request.value
        copied = copied and bool(value.payload)
        if ballot == acceptor.accepted and not header:
            on_answer(messages.AcceptReply(Verdict.OK, ballot, copy_synced=copied))
            return
        held = acceptor.value.sequence if acceptor.value and not acceptor.floored else self.state.sequences.get(name, 0)
        if value.sequence < held:
            self._counts.note_fall(name, ballot, held, value.sequence)
        size = len(value.body) + sum(map(len, body))
        self._writes.check_room(size, len(self.pending))
        if not self._room.take(len(value.body)) and self._room.refuses(use_of(request, self._rows.held(name))):
            on_answer(self._refused(Verdict.FULL, acceptor, name, ballot))
            return
        batch = StoreBatch((Slot(name, ballot, value, copied),))
        if near and header:
            self._high_water.begin_raise(ballot)
        elif near and needs_high_water(ballot, self.state.high_water_at(ballot.epoch)):
            self._high_water.add_to(batch, ballot)
        if not self._rules.sync_before_answer:
            self._answer_before_sync(batch, header, body, on_answer)
            return
        pending = PendingAccept(self, name, ballot, request.identity, batch, size, bool(header), on_answer)
        self._write(pending, header, body, request.check)

    def _judge_accept(self, request: messages.Accept, copied: bool) -> tuple[Acceptor, Verdict]:
        name, ballot = request.name, request.ballot
        if not request.identity and self.state.promises.get(name) == ballot:
            acceptor = self.state.of_promised(name, ballot, self._fences.of(name.scope))
        else:
            acceptor = self._rows.acceptor(name, ballot.epoch)[1]
        value, identity = request.value, request.identity
        return acceptor, judge_accept(acceptor, ballot, value, request.nonce, identity, self._rules, copied=copied)

    def _judge_create(self, request: messages.Accept, copied: bool) -> tuple[Acceptor, Verdict]:
        value, nonce, identity = request.value, request.nonce, request.identity
        acceptor = self._rows.acceptor(request.name, request.ballot.epoch)[1]
        return acceptor, judge_create(acceptor, request.ballot, value, nonce, identity, self._rules, copied=copied)

    def _write(self, pending: PendingAccept, header: bytes, body: Sequence[Buffer], check: bytes) -> None:
        self._writes.bytes_in_flight += pending.size
        self.pending.by_name[pending.name] = pending
        try:
            if not header:
                self._store.post(pending.batch, pending.stored)
            elif self._copies is None:
                pending.kept(DiskUnusable(f"Disk {self.disk} keeps no small copies."), None)
            else:
                assert not pending.batch.meta, "a high-water ballot could overtake a higher one"
                settling = pending.identity
                self._copies.keep(header, body, pending.batch, pending.kept, settling=settling, check=check)
        except Exception as error:
            pending.stored(error)

    def _answer_before_sync(
        self, batch: StoreBatch, header: bytes, body: Sequence[Buffer], on_answer: OnAcceptReply
    ) -> None:
        """What simulations do without rule 1."""
        name, ballot, _value, _copied = batch.slots[0]
        self.state.promise(name, ballot)
        on_answer(messages.AcceptReply(Verdict.OK, ballot, copy_synced=bool(header)))
        if header and self._copies is not None:
            self._copies.keep(header, body, batch, lambda _copy, _batch: None)
        else:
            self._writes.start(self._writes.commit(batch))

    def _refused(self, verdict: Verdict, acceptor: Acceptor, name: RegisterName, ballot: Ballot) -> AcceptReply:
        self._counts.refused += 1
        if verdict is Verdict.CONFLICT:
            self._counts.note_conflict(name, ballot)
        floor = acceptor.value.sequence if acceptor.floored and acceptor.value else 0
        for_good = acceptor.refuses_for_good(ballot, verdict)
        return AcceptReply(verdict, acceptor.lowest, for_good, floor=floor, lends=acceptor.lends)

    def on_stored(self, pending: PendingAccept, error: Exception | None) -> None:
        """See ``pending_accept.Owner``. SlowDown, StoreFull: the store has not begun."""
        if error is not None:
            if not isinstance(error, SlowDown | StoreFull):
                self._writes.fail(error)
            self._end(pending)
            failed = DiskUnusable(f"Disk {self.disk} failed unexpectedly.")
            pending.answer(error if isinstance(error, StoragedError) else failed)
            return
        if pending.batch.meta:
            self._high_water.stored(pending.batch)
        self.state.accepted(pending.name, pending.ballot)
        self._end(pending)
        pending.answer(messages.AcceptReply(Verdict.OK, pending.ballot, False, pending.batch.slots[0].copied))

    def on_copy_refused(self, pending: PendingAccept, refusal: StoragedError) -> None:
        """See ``pending_accept.Owner``."""
        self._end(pending)
        self._counts.refused += 1
        pending.answer(messages.AcceptReply(Verdict.UNSTORED, copy_error=refusal.message))

    def _end(self, pending: PendingAccept) -> None:
        self._writes.bytes_in_flight -= pending.size
        self.pending.end(pending)

    async def _quiet(self, name: RegisterName) -> None:
        """Raises when this replica must not answer."""
        await self.pending.quiet(name, self._writes.check_answers)

    # --- reads and scans ----------------------------------------------------------------------------------------------

    async def read(self, request: messages.Read, *, timeout_s: float = 10.0) -> tuple[messages.ReadReply, memoryview]:
        while True:
            await self._quiet(request.name)
            try:
                return await self._rows.read(request)
            except NotInMemory:
                await self._rows.bring(request.name)

    def try_read(self, request: messages.Read) -> tuple[messages.ReadReply, memoryview] | None:
        """As ``read``; None: it has to wait for the disk, or for an accept on its way there."""
        self._writes.check_answers()
        return self._rows.try_read(request)

    def try_rows(self, epoch: int, names: Sequence[bytes]) -> list[bytes | None]:
        """See ``DiskRows``."""
        return self._rows.try_rows(epoch, names)

    def try_row(self, epoch: int, name: bytes) -> bytes | None:
        """See ``DiskRows``."""
        return self._rows.try_row(epoch, name)

    def peek(self, data_id: bytes) -> memoryview | None:
        """A small copy that is in memory."""
        return self._rows.peek(data_id)

    async def scan(self, request: ScanRequest, *, timeout_s: float = 10.0) -> ScanReply:
        return await self._rows.scan(request)

    def try_scan(self, request: ScanRequest) -> ScanReply | None:
        """None: it may have to wait for the disk."""
        return self._rows.try_scan(request)

    # --- without a task -----------------------------------------------------------------------------------------------

    def try_call_shared(self, request: Message, header: bytes, body: Sequence[Buffer], heard: OnAnswer) -> bool:
        """See ``ports.LocalTryReplica``."""
        try:
            if isinstance(request, messages.Accept):
                disk = self.disk
                return self.try_accept(request, body, lambda outcome: heard(disk, outcome, NO_BYTES), header)
            promise = self.try_prepare(request) if isinstance(request, messages.Prepare) else None
            if promise is None:
                return False
        except StoragedError as error:
            heard(self.disk, error, NO_BYTES)
            return True
        heard(self.disk, promise, NO_BYTES)
        return True

    def try_call(
        self, request: Message, then: OnReply, *, body: Sequence[Buffer] = (), timeout_s: float = 10.0
    ) -> bool:
        """See ``ports.TryReplica``: for a proposer in the same process."""
        if not isinstance(request, messages.Read):
            return self.try_call_shared(request, b"", body, lambda _disk, answer, bulk: then(answer, bulk))
        try:
            found: tuple[Any, memoryview] | None = self.try_read(request)
        except StoragedError as error:
            found = error, NO_BYTES
        if found is not None:
            then(*found)
        return found is not None

    # --- pages and fences ---------------------------------------------------------------------------------------------

    async def page_put(self, request: messages.PagePut, *, timeout_s: float = 10.0) -> messages.PageReply:
        return await self._pages.put(request, len(self.pending))

    async def page_get(self, request: messages.PageGet, *, timeout_s: float = 10.0) -> messages.PageReply:
        return await self._pages.get(request)

    async def page_check(self, request: messages.PageCheck, *, timeout_s: float = 10.0) -> messages.PagesMissing:
        return await self._pages.check(request)

    async def fence(self, request: messages.FenceSet, *, timeout_s: float = 10.0) -> messages.FenceReply:
        """In force for every accept that is judged from now on; answered when it is on disk, and with it everything
        accepted before.
        """
        self._writes.check_answers()
        check_fence(request)
        write = await self._fences.when_in_memory(partial(self._fences.set, request))
        if write is None:
            return self._fences.reply(request, done=False)
        await self._writes.durably(*write)
        await self.pending.all_arrived()
        self._fences.arrived(request.scope, request.nonce)
        return messages.FenceReply(True, lends=write[0].fences[0].lends)

    async def unfence(self, request: messages.FenceLift, *, timeout_s: float = 10.0) -> messages.FenceReply:
        """The fence is in force until its lifting is on disk."""
        self._writes.check_answers()
        check_fence(request)
        write = await self._fences.when_in_memory(partial(self._fences.lift, request))
        if not isinstance(write, tuple):
            return self._fences.reply(request, done=bool(write))
        await self._writes.durably(*write)
        return messages.FenceReply(True)

    async def fence_epoch(self, request: messages.EpochFence, *, timeout_s: float = 10.0) -> messages.EpochReply:
        """In force at once; answered when it is on disk, and with it everything accepted and fenced before."""
        self._writes.check_answers()
        check_epoch(request.epoch, request.partition)
        durable = await self._epochs.fence(request)
        await self._writes.all_ended()
        await self.pending.all_arrived()
        return messages.EpochReply(durable)
