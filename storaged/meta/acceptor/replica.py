"""One disk as an acceptor: the shell that gives ``meta.consensus.register``'s tables a store, memory for promises, and
time to sync.

Theory of operation
    Accepted values are rows of the store, and the store shows only what is synced. While an accept of a register is on
    its way to the disk,
    every other request for that register waits: an accept that nobody was told of yet must not be missing from a
    prepare's answer (rule 1).
    The small copy that comes with an accept is durable with the row that names it, or before it: no disk has a record
    without having had its copy,
    but by the exception that ``meta.consensus.proposer`` names.
    A fence is answered when what was judged before it has arrived or failed, for that may still be at its copy when the
    fence is on disk.
    Promises are kept in memory alone, for they change with every prepare and a sync costs a thousand times more than
    the promise. Instead a
    *high-water ballot* above all of them is on disk, written in blocks ahead; after a restart it counts as promised for
    every register (rule 2).
    The table of promises is bounded: what is evicted raises the floor under all registers, which costs somebody a retry
    and nothing else.
    When the store refuses a commit nobody knows what reached the disk. The replica then answers nothing any more (rule
    9).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.ports import OnReply
from storaged.errors import DiskForeign, DiskUnusable, InvalidRequest, SlowDown, StoragedError
from storaged.hashes import is_old
from storaged.meta import messages
from storaged.meta.acceptor.fences import Fences
from storaged.meta.acceptor.pending_accept import AnswerAccept, Writing
from storaged.meta.consensus.bounds import (
    check_created,
    check_epoch,
    check_fence,
    check_name,
    check_page,
    check_pages,
    check_value,
)
from storaged.meta.consensus.register import (
    COUNTER_AHEAD_MAX_US,
    HIGH_WATER_BLOCK_US,
    RULES,
    Acceptor,
    Rules,
    Verdict,
    digest_of,
    floor_of,
    high_water_for,
    judge_accept,
    judge_create,
    judge_prepare,
    judge_read,
    needs_high_water,
)
from storaged.meta.messages import ScanReply, ScanRequest, ShardAsk
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import (
    ZERO_BALLOT,
    Ballot,
    Copies,
    Copy,
    Heard,
    MetaStore,
    RowDamaged,
    Slot,
    StoreBatch,
    StoredPage,
)
from storaged.meta.storage.readahead import THREADS
from storaged.meta.storage.scan import DigestCache, asks_to_read_ahead, read_ahead, scan_store
from storaged.units import MIB
from storaged.wire import Buffer, Message, decode, encode

log = structlog.get_logger(__name__)

PROMISES_MAX = 65_536
"""Prepared and not yet accepted registers at one disk; about 20 MiB when full."""

WRITES_MAX = 4_096
WRITE_BYTES_MAX = 64 * MIB
"""Accepts and pages on their way to one disk, and the bytes of their values, copies and pages. Nothing of this ends
before the disk has answered, whoever still
waits for it: a disk that hangs holds no more than this. Seconds of work for one that doesn't."""

CREATE_AHEAD_US = 60_000_000
"""A create's ballot may lie so far ahead of this node's clock, no more. A settling round ends what was promised before
it, but of a create nobody has heard: that it comes
after all, and is too late, is known by its age alone."""

OBJECT = int(Table.OBJECT)
NO_BYTES = memoryview(b"")
SCOPE_END = 17
"""Of a packed name: the table's byte and the scope's 16."""

PAGES_A_TURN = 16
"""Pages checked between two looks of the loop at other requests."""

META_HIGH_WATER = "high_water"
META_EPOCH = "epoch"
META_RETIRED = "retired"


@dataclass(frozen=True)
class ReplicaStatistics:
    """Counts since the start of the process. ``ballot_conflicts`` is an alarm: it is 0 in a sound cluster."""

    disk: str
    state: str
    promises: int
    accepts_in_flight: int
    prepares: int
    accepts: int
    reads: int
    refused: int
    promises_evicted: int
    rows_damaged: int
    ballot_conflicts: int
    sequence_falls: int
    """Values accepted over one with a higher sequence. A crash may leave a value that was never chosen, so a few say
    nothing; without crashes it is an alarm: somebody puts older records back."""


class LocalReplica:
    """The acceptor of one disk of this process. Implements ``ports.Replica``; one event loop only."""

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
        self._digests = DigestCache()
        self._warming = asyncio.Lock()
        self._copies = copies
        self._promises_max = promises_max
        self._rules = rules
        self._clock = clock if clock is not None else SystemClock()
        self._promises: OrderedDict[RegisterName, Ballot] = OrderedDict()
        self._sequences: dict[RegisterName, int] = {}
        """Of what was accepted here for registers that are promised."""
        self._in_flight: dict[RegisterName, Writing] = {}
        self._bytes_in_flight = 0
        self._fences = Fences(disk, store)
        self._tasks: dict[asyncio.Task[StoragedError | None], None] = {}
        self._raising: asyncio.Task[StoragedError | None] | None = None
        self._counts = dict.fromkeys(
            ("prepares", "accepts", "reads", "refused", "evicted", "damaged", "conflicts", "falls"), 0
        )
        try:
            stored, epoch, retired = (store.get_meta(name) for name in (META_HIGH_WATER, META_EPOCH, META_RETIRED))
        except RowDamaged as error:
            raise DiskForeign(
                f"The metadata store of disk {disk} does not tell what was promised there: {error}"
            ) from None
        self._set_high_water(decode(stored, Ballot) if stored is not None else ZERO_BALLOT)
        self._high_water_issued = self._high_water
        self._floor = floor_of(self._high_water) if rules.promises_survive_restart else ZERO_BALLOT
        self._epoch = self._epoch_durable = int.from_bytes(epoch, "big") if epoch is not None else 0
        self._silent = "retired from the ring" if retired and rules.foreign_refused else ""

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

    @property
    def epoch(self) -> int:
        """The layout epoch below which requests are refused."""
        return self._epoch

    def statistics(self) -> ReplicaStatistics:
        count = self._counts
        return ReplicaStatistics(
            disk=self.disk,
            state=self._silent or "ok",
            promises=len(self._promises),
            accepts_in_flight=len(self._in_flight),
            prepares=count["prepares"],
            accepts=count["accepts"],
            reads=count["reads"],
            refused=count["refused"],
            promises_evicted=count["evicted"],
            rows_damaged=count["damaged"],
            ballot_conflicts=count["conflicts"],
            sequence_falls=count["falls"],
        )

    async def close(self) -> None:
        """Answers nothing from now on; returns when what was on its way to the disk has arrived.
        The store stays open.
        """
        self._silent = self._silent or "closed"
        while self._tasks or self._in_flight:
            waiting: list[asyncio.Future[Any]] = [*self._tasks, *map(self._arrival, self._in_flight)]
            await asyncio.wait(waiting)

    async def retire(self) -> None:
        """This disk left the ring for good: it answers nothing any more, after a restart neither (rule 11)."""
        await self._durably(StoreBatch(meta={META_RETIRED: b"1"}))
        self._silent = "retired from the ring"

    async def end_promises(self, epoch: int) -> None:
        """Refuses, now and after a restart, every ballot of up to this layout epoch that was drawn before this call
        (clocks differ: the caller allows for it);
        returns when what was accepted before can be read from the store. It costs proposals that are under way a retry,
        at most."""
        self._check_answers()
        self._floor = max(self._floor, Ballot(epoch, self._clock.wall_ms() * 1000, "", b""))
        await self._raise_high_water(self._floor)
        await self._all_arrived()

    # --- the three requests of the protocol
    # ----------------------------------------------------------------------------

    async def prepare(self, request: messages.Prepare, *, timeout_s: float = 10.0) -> messages.PrepareReply:
        while True:
            await self._quiet(request.name)
            reply = self.prepare_at_once(request)
            if reply is not None:
                return reply
            if request.name not in self._in_flight:
                await self._raise_high_water(request.ballot)

    def prepare_at_once(self, request: messages.Prepare) -> messages.PrepareReply | None:
        """None: an accept on its way to the disk, or a higher high-water ballot, has to be waited for."""
        self._check_answers()
        name, ballot = request.name, request.ballot
        if name in self._in_flight:
            return None
        check_name(name, ballot)
        slot, acceptor = self._acceptor(name)
        verdict = judge_prepare(acceptor, ballot, request.nonce, self._rules)
        if verdict is not Verdict.OK:
            self._counts["prepares"] += 1
            self._counts["refused"] += 1
            return messages.PrepareReply(
                verdict, acceptor.lowest, final=acceptor.fence is not None and acceptor.fence.final
            )
        if ballot[:2] >= self._near_high_water:
            if self._too_far(ballot):
                self._counts["prepares"] += 1
                self._counts["refused"] += 1
                return messages.PrepareReply(Verdict.AHEAD, acceptor.lowest)
            if needs_high_water(ballot, self._high_water):
                return None
            self._raise_ahead(ballot)
        self._counts["prepares"] += 1
        if (
            ballot != acceptor.accepted
        ):  # else what was accepted binds as the promise would, and an accept is judged by it
            self._remember(name, ballot)
        if slot is None:
            return messages.PrepareReply(Verdict.OK, ballot)
        if ballot != acceptor.accepted:
            self._sequences[name] = slot.value.sequence
        return messages.PrepareReply(Verdict.OK, ballot, slot.ballot, slot.value)

    def _too_far(self, ballot: Ballot) -> bool:
        """Rule 15. Asked of ballots near the high-water ballot or above it, so that others cost nothing."""
        highest = max(self._clock.wall_ms() * 1000, self._high_water.counter) + COUNTER_AHEAD_MAX_US
        return ballot.counter > highest and self._rules.counters_bounded

    def _raise_ahead(self, ballot: Ballot) -> None:
        """Long before a ballot has to wait for it."""
        if self._raising is None:
            self._raising = self._own(self._write_high_water(ballot))

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float = 10.0
    ) -> messages.AcceptReply:
        answered: asyncio.Future[messages.AcceptReply] = asyncio.get_running_loop().create_future()
        while not self.begin_accept(request, body, partial(_resolve, answered)):
            await self._quiet(request.name)
            if request.header:
                await self._raise_high_water(request.ballot)
        return await answered

    def begin_accept(
        self,
        request: messages.Accept,
        body: Sequence[Buffer],
        answer: AnswerAccept,
        header: bytes = b"",
        *,
        create: bool = False,
    ) -> bool:
        """Judges, and lets the disk write; ``answer`` is told what ``accept`` returns or raises. Whoever goes away
        meanwhile, what was begun arrives. ``header``: of the
        copy for this replica, when the request is one for several. ``create``: the request is one, whatever its type.

        False: another accept of this register, or a higher high-water ballot, has to be waited for first. Raises when
        nothing was begun: SlowDown when the disk
        has as much in hand as may be.
        """
        if self._silent:
            self._check_answers()
        name, ballot, value = request.name, request.ballot, request.value
        header = header or request.header
        check_name(name, ballot)
        near = ballot[:2] >= self._near_high_water
        above = near and needs_high_water(ballot, self._high_water)
        writing = self._in_flight.get(name)
        if writing is not None:
            return writing.joined(request, header, answer)
        if near and self._too_far(ballot):
            self._counts["refused"] += 1
            answer(messages.AcceptReply(Verdict.AHEAD))
            return True
        if header and above:
            self._raise_ahead(ballot)
            return False
        self._counts["accepts"] += 1
        check_value(value)
        create = create or isinstance(request, messages.Create)
        if name.table != OBJECT:
            check_created(name, value, create)
        if create:
            acceptor = self._acceptor(name)[1]
            verdict = judge_create(acceptor, ballot, value, request.nonce, request.identity, self._rules)
            if verdict is Verdict.OK and ballot.counter > self._clock.wall_ms() * 1000 + CREATE_AHEAD_US:
                verdict = Verdict.AHEAD
        else:
            acceptor = self._promised_to(name, ballot)
            verdict = judge_accept(acceptor, ballot, value, request.nonce, request.identity, self._rules)
        if verdict is not Verdict.OK:
            answer(self._refused(verdict, acceptor, name, ballot))
            return True
        if ballot == acceptor.accepted and not header:
            answer(messages.AcceptReply(Verdict.OK, ballot))
            return True
        held = acceptor.value.sequence if acceptor.value is not None else self._sequences.get(name, 0)
        if value.sequence < held:
            self._fell(name, ballot, held, value.sequence)
        size = len(value.body) + sum(map(len, body))
        self._check_room(size)
        if header and near:
            self._raise_ahead(ballot)
        batch = StoreBatch((Slot(name, ballot, value),))
        if above:
            batch.meta[META_HIGH_WATER] = encode(self._next_high_water(ballot))
        if not self._rules.sync_before_answer:
            self._remember(name, ballot)
            answer(messages.AcceptReply(Verdict.OK, ballot, copy_synced=bool(header)))
            if header and self._copies is not None:
                self._copies.keep(header, body, batch, lambda _copy, _batch: None)
            else:
                self._own(self._commit(batch))
            return True
        self._bytes_in_flight += size
        writing = self._in_flight[name] = Writing(
            self, name, ballot, request.identity, batch, size, bool(header), answer
        )
        try:
            if not header:
                self._store.post(batch, writing.stored)
            elif self._copies is None:
                writing.kept(DiskUnusable(f"Disk {self.disk} keeps no small copies."), None)
            else:
                assert not above, "a high-water ballot could overtake a higher one"
                self._copies.keep(header, body, batch, writing.kept)
        except Exception as error:
            writing.stored(error)
        return True

    def _check_room(self, size: int) -> None:
        count = len(self._in_flight) + len(self._tasks)
        if count >= WRITES_MAX or (count and self._bytes_in_flight + size > WRITE_BYTES_MAX):
            raise SlowDown(
                f"Disk {self.disk} has not written yet what it was given: {count} writes, {self._bytes_in_flight}"
                " bytes."
            )

    def _fell(self, name: RegisterName, ballot: Ballot, held: int, sequence: int) -> None:
        """It is taken nevertheless: what is here may never have been chosen, and a register whose acceptors refused
        what was would be stuck."""
        self._counts["falls"] += 1
        register = name.pack().hex()
        log.warning(
            "a register's sequence falls",
            disk=self.disk,
            register=register,
            ballot=str(ballot),
            held=held,
            sequence=sequence,
        )

    def _promised_to(self, name: RegisterName, ballot: Ballot) -> Acceptor:
        """A register that is promised to this very ballot has accepted nothing since, and before that something lower:
        the row need not be read again.
        """
        if self._promises.get(name) != ballot:
            return self._acceptor(name)[1]
        return Acceptor(max(ballot, self._floor), ZERO_BALLOT, None, self._epoch, self._fences.of(name.scope))

    def _refused(
        self, verdict: Verdict, acceptor: Acceptor, name: RegisterName, ballot: Ballot
    ) -> messages.AcceptReply:
        self._counts["refused"] += 1
        if verdict is Verdict.CONFLICT:
            self._counts["conflicts"] += 1
            log.error("one ballot with two values", disk=self.disk, ballot=str(ballot), register=name.pack().hex())
        return messages.AcceptReply(verdict, acceptor.lowest, acceptor.fence is not None and acceptor.fence.final)

    def arrived(self, writing: Writing, error: Exception | None) -> None:
        """The row is on disk, or the store refused it and nobody knows what it holds; SlowDown: it had no room for it,
        and has not begun.
        """
        if error is not None:
            if not isinstance(error, SlowDown):
                self._fail(error)
            self._let_go(writing)
            writing.answer(
                error if isinstance(error, StoragedError) else DiskUnusable(f"Disk {self.disk} failed unexpectedly.")
            )
            return
        name, ballot, meta = writing.name, writing.ballot, writing.batch.meta
        if meta:
            self._set_high_water(max(self._high_water, decode(meta[META_HIGH_WATER], Ballot)))
        if self._promises.get(name, ballot) <= ballot:
            self._promises.pop(name, None)
            self._sequences.pop(name, None)
        self._let_go(writing)
        copy_error = writing.copy_error
        writing.answer(messages.AcceptReply(Verdict.OK, ballot, False, writing.copied and not copy_error, copy_error))

    def copy_refused(self, writing: Writing, refusal: StoragedError) -> None:
        """A settling round writes the row even where the copy can't be stored."""
        if writing.identity:
            try:
                self._check_answers()
                writing.copy_error = refusal.message
                self._store.post(writing.batch, writing.stored)
            except Exception as failure:
                self.arrived(writing, failure)
        else:
            self._let_go(writing)
            self._counts["refused"] += 1
            writing.answer(messages.AcceptReply(Verdict.UNSTORED, copy_error=refusal.message))

    async def read(self, request: messages.Read, *, timeout_s: float = 10.0) -> tuple[messages.ReadReply, memoryview]:
        await self._quiet(request.name)
        acceptor, verdict, data_id = self._judge_read(request)
        copy = await self._load(data_id) if data_id else None
        if copy is None:
            return self._read_reply(request, acceptor, verdict, b"", None)
        return self._read_reply(request, acceptor, verdict, data_id, copy.payload, copy.header)

    def read_at_once(self, request: messages.Read) -> tuple[messages.ReadReply, memoryview] | None:
        """The same answer, when neither the disk nor an accept on its way has to be waited for; else None."""
        self._check_answers()
        if request.name in self._in_flight or request.data_id:
            return None
        acceptor, verdict, data_id = self._judge_read(request)
        payload = None
        if data_id:
            payload = self.peek(data_id)
            if payload is None:
                return None
        return self._read_reply(request, acceptor, verdict, data_id, payload)

    def rows_at_once(self, epoch: int, names: Sequence[bytes]) -> list[bytes | None]:
        """Of each packed name the row as it is stored, or empty; None where ``read`` would have to wait, would refuse,
        or has more to say: that the scope is fenced.
        """
        if self._silent or (epoch < self._epoch and self._rules.fence_by_epoch):
            return [None] * len(names)
        self._counts["reads"] += len(names)
        found = self._store.rows(names)
        last, fenced = b"", False
        for index, name in enumerate(names):
            scope = name[1:SCOPE_END]
            if scope != last:
                last, fenced = scope, self._tells_fence(scope)
            if fenced:
                found[index] = None
        if self._in_flight:
            return [
                None if RegisterName.unpack(name) in self._in_flight else row
                for name, row in zip(names, found, strict=True)
            ]
        return found

    def row_at_once(self, epoch: int, name: bytes) -> bytes | None:
        """As ``rows_at_once``, of one name."""
        if self._silent or (epoch < self._epoch and self._rules.fence_by_epoch):
            return None
        self._counts["reads"] += 1
        if self._tells_fence(name[1:SCOPE_END]) or (self._in_flight and RegisterName.unpack(name) in self._in_flight):
            return None
        return self._store.row(name)

    def peek(self, data_id: bytes) -> memoryview | None:
        """A small copy that is in memory."""
        return self._copies.peek(data_id) if self._copies is not None else None

    def ask_here(self, request: Message, header: bytes, body: Sequence[Buffer], heard: Heard) -> bool:
        """See ``ports.HereReplica``."""
        try:
            if isinstance(request, messages.Accept):
                disk = self.disk
                return self.begin_accept(request, body, lambda outcome: heard(disk, outcome, NO_BYTES), header)
            promise = self.prepare_at_once(request) if isinstance(request, messages.Prepare) else None
            if promise is None:
                return False
        except StoragedError as error:
            heard(self.disk, error, NO_BYTES)
            return True
        heard(self.disk, promise, NO_BYTES)
        return True

    def post(self, request: Message, then: OnReply, *, body: Sequence[Buffer] = (), timeout_s: float = 10.0) -> bool:
        """See ``ports.PostingReplica``: for a proposer in the same process."""
        if not isinstance(request, messages.Read):
            return self.ask_here(request, b"", body, lambda _disk, answer, bulk: then(answer, bulk))
        try:
            found: tuple[Any, memoryview] | None = self.read_at_once(request)
        except StoragedError as error:
            found = error, NO_BYTES
        if found is not None:
            then(*found)
        return found is not None

    def _judge_read(self, request: messages.Read) -> tuple[Acceptor, Verdict, bytes]:
        """What is known, whether it may be told, and the data id of the copy to be sent along, or nothing."""
        slot, acceptor = self._acceptor(request.name)
        verdict = judge_read(acceptor, request.epoch, self._rules)
        if verdict is not Verdict.OK:
            return acceptor, verdict, b""
        return (
            acceptor,
            verdict,
            request.data_id or (slot.value.payload if slot is not None and request.want_payload else b""),
        )

    def _read_reply(
        self,
        request: messages.Read,
        acceptor: Acceptor,
        verdict: Verdict,
        data_id: bytes,
        payload: memoryview | None,
        header: bytes = b"",
    ) -> tuple[messages.ReadReply, memoryview]:
        self._counts["reads"] += 1
        if verdict is not Verdict.OK:
            self._counts["refused"] += 1
            return messages.ReadReply(verdict), NO_BYTES
        value = acceptor.value if request.full else None
        digest, fenced = digest_of(acceptor.value), self._tells_fence(request.name.scope)
        if payload is None:
            return messages.ReadReply(verdict, acceptor.accepted, digest, value, fenced=fenced), NO_BYTES
        header = header if request.data_id else b""
        return messages.ReadReply(verdict, acceptor.accepted, digest, value, data_id, header, fenced), payload

    async def scan(self, request: ScanRequest, *, timeout_s: float = 10.0) -> ScanReply:
        self._check_answers()
        if asks := asks_to_read_ahead(self._store, request, self._digests):
            await self._warm(request, asks)
        return self.scan_at_once(request)

    async def _warm(self, request: ScanRequest, asks: Sequence[ShardAsk]) -> None:
        """One thread at a time, for other disks have use for them too; so the turn ends with the thread, whoever has
        given up waiting for it.
        """
        await self._warming.acquire()
        try:
            reading = asyncio.get_running_loop().run_in_executor(THREADS, read_ahead, self._store, request, asks)
        except BaseException:
            self._warming.release()
            raise
        reading.add_done_callback(lambda _: self._warming.release())
        await asyncio.shield(reading)

    def scans_at_once(self, request: ScanRequest) -> bool:
        """Whether ``scan_at_once`` finds in memory what it reads, as far as one can tell."""
        self._check_answers()
        return not asks_to_read_ahead(self._store, request, self._digests)

    def scan_at_once(self, request: ScanRequest) -> ScanReply:
        """Rows as they are on disk: what was answered OK is among them."""
        self._check_answers()
        if request.epoch < self._epoch and self._rules.fence_by_epoch:
            return ScanReply(Verdict.EPOCH)
        try:
            reply = scan_store(self._store, request, self._digests)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        return reply if not self._tells_fence(request.scope) else msgspec.structs.replace(reply, fenced=True)

    # --- pages and fences
    # ----------------------------------------------------------------------------------------------

    async def page_put(self, request: messages.PagePut, *, timeout_s: float = 10.0) -> messages.PageReply:
        self._check_answers()
        check_page(request)
        if is_old(request.page_hash) and (held := self._page(request.page_hash)) is not None and held != request.body:
            raise InvalidRequest(
                "Another page has this name here."
            )  # a liar finds other bytes for a hash of the old kind
        self._check_room(len(request.body))
        await self._durably(
            StoreBatch(pages=[StoredPage(request.page_hash, request.body, self._clock.wall_ms())]),
            size=len(request.body),
        )
        return messages.PageReply()

    async def page_get(self, request: messages.PageGet, *, timeout_s: float = 10.0) -> messages.PageReply:
        self._check_answers()
        return messages.PageReply(self._page(request.page_hash))

    async def page_check(self, request: messages.PageCheck, *, timeout_s: float = 10.0) -> messages.PagesMissing:
        check_pages(request)
        missing = []
        for index, page_hash in enumerate(request.hashes):
            if index % PAGES_A_TURN == 0:
                await asyncio.sleep(0)
                self._check_answers()
            if self._page(page_hash) is None:
                missing.append(page_hash)
        return messages.PagesMissing(tuple(missing))

    def _page(self, page_hash: bytes) -> bytes | None:
        try:
            return self._store.get_page(page_hash)
        except RowDamaged:
            self._counts["damaged"] += 1
            return None

    async def fence(self, request: messages.FenceSet, *, timeout_s: float = 10.0) -> messages.FenceReply:
        """In force for every accept that is judged from now on; answered when it is on disk, and with it everything
        accepted before.
        """
        self._check_answers()
        check_fence(request)
        write = self._fences.set(request)
        if write is None:
            return messages.FenceReply(False)
        await self._durably(*write)
        await self._all_arrived()
        return messages.FenceReply(True)

    async def unfence(self, request: messages.FenceLift, *, timeout_s: float = 10.0) -> messages.FenceReply:
        """In force until the lifting is on disk."""
        self._check_answers()
        check_fence(request)
        write = self._fences.lift(request)
        if isinstance(write, bool):
            return messages.FenceReply(write)
        await self._durably(*write)
        return messages.FenceReply(True)

    async def fence_epoch(self, request: messages.EpochFence, *, timeout_s: float = 10.0) -> messages.EpochReply:
        """In force at once; answered when it is on disk, and with it everything accepted before."""
        self._check_answers()
        check_epoch(request.epoch)
        self._epoch = max(self._epoch, request.epoch)
        epoch = self._epoch
        if epoch > self._epoch_durable:
            await self._durably(StoreBatch(meta={META_EPOCH: epoch.to_bytes(8, "big")}))
            await self._all_arrived()
            self._epoch_durable = max(self._epoch_durable, epoch)
        return messages.EpochReply(self._epoch_durable)

    # --- what is known of a register
    # -----------------------------------------------------------------------------------

    def _acceptor(self, name: RegisterName) -> tuple[Slot | None, Acceptor]:
        promised = max(self._promises.get(name, ZERO_BALLOT), self._floor)
        fence = self._fences.of(name.scope)
        try:
            slot = self._store.get(name)
        except RowDamaged:
            self._counts["damaged"] += 1
            above_all = max(promised, floor_of(self._high_water))
            return None, Acceptor(above_all, ZERO_BALLOT, None, self._epoch, fence, damaged=True)
        if slot is None:
            return None, Acceptor(promised, ZERO_BALLOT, None, self._epoch, fence)
        return slot, Acceptor(promised, slot.ballot, slot.value, self._epoch, fence)

    def _remember(self, name: RegisterName, ballot: Ballot) -> None:
        self._promises[name] = ballot
        self._promises.move_to_end(name)
        if len(self._promises) > self._promises_max:
            evicted_name, evicted = self._promises.popitem(last=False)
            self._sequences.pop(evicted_name, None)
            self._floor = max(self._floor, evicted)
            self._counts["evicted"] += 1

    def _tells_fence(self, scope: bytes) -> bool:
        return self._fences.of(scope) is not None and self._rules.fences_told

    async def _load(self, data_id: bytes) -> Copy | None:
        if self._copies is None:
            return None
        try:
            return await self._copies.load(data_id)
        except StoragedError as error:
            log.warning("small copy not readable", disk=self.disk, data_id=data_id.hex(), reason=error.message)
            return None

    # --- waiting, writing
    # ----------------------------------------------------------------------------------------------

    def _check_answers(self) -> None:
        if self._silent:
            raise DiskUnusable(f"Disk {self.disk} takes no part in the ring: {self._silent}.")

    async def _quiet(self, name: RegisterName) -> None:
        """Returns when no accept of this register is on its way to the disk; raises when this
        replica must not answer.
        """
        self._check_answers()
        while name in self._in_flight:
            await asyncio.wait((self._arrival(name),))
            self._check_answers()

    def _arrival(self, name: RegisterName) -> asyncio.Future[None]:
        """Done when the accept of this register that is on its way has arrived, or failed."""
        writing = self._in_flight[name]
        if writing.arrival is None:
            writing.arrival = asyncio.get_running_loop().create_future()
        return writing.arrival

    def _let_go(self, writing: Writing) -> None:
        """Ends the wait of everybody else for its register."""
        self._bytes_in_flight -= writing.size
        del self._in_flight[writing.name]
        if writing.arrival is not None:
            writing.arrival.set_result(None)

    async def _all_arrived(self) -> None:
        """What was on its way when this was called."""
        if self._in_flight:
            await asyncio.wait(tuple(map(self._arrival, self._in_flight)))

    def _own(self, work: Coroutine[Any, Any, StoragedError | None]) -> asyncio.Task[StoragedError | None]:
        """A task that outlives the request that began it: what is on its way to the disk arrives, whoever still waits
        for it.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    async def _commit(self, batch: StoreBatch) -> StoragedError | None:
        try:
            await self._store.commit(batch)
        except StoragedError as error:
            self._fail(error)
            return error
        except Exception as error:
            self._fail(error)
            raise
        return None

    def _fail(self, error: Exception) -> None:
        if not self._silent:
            expected = isinstance(error, StoragedError)
            reason = error.message if isinstance(error, StoragedError) else f"{type(error).__name__}: {error}"
            self._silent = f"its store refused a write, and what it acknowledged is uncertain ({reason})"
            log.error("replica falls silent", disk=self.disk, reason=reason, exc_info=None if expected else error)

    @staticmethod
    def _raise_if(error: StoragedError | None) -> None:
        if error is not None:
            raise error

    async def _durably(self, batch: StoreBatch, then: Callable[[], None] | None = None, *, size: int = 0) -> None:
        async def write() -> StoragedError | None:
            try:
                error = await self._commit(batch)
            finally:
                self._bytes_in_flight -= size
            if error is None and then is not None:
                then()
            return error

        self._bytes_in_flight += size
        self._raise_if(await asyncio.shield(self._own(write())))

    def _set_high_water(self, ballot: Ballot) -> None:
        self._high_water = ballot
        self._near_high_water = ballot.epoch, ballot.counter - HIGH_WATER_BLOCK_US // 2
        """From this epoch and counter on it is time to write a higher one."""

    async def _raise_high_water(self, ballot: Ballot) -> None:
        """Returns when the high-water ballot on disk lies above ``ballot``; many that wait share one commit."""
        while needs_high_water(ballot, self._high_water):
            if self._raising is None:
                self._raising = self._own(self._write_high_water(ballot))
            self._raise_if(await asyncio.shield(self._raising))

    def _next_high_water(self, ballot: Ballot) -> Ballot:
        """Never lower than one that is already on its way: what is posted to the store keeps its order, and the last
        one stays. A batch that comes with a copy may
        have to wait for that first, in no order with these, and so never carries one (``begin_accept``)."""
        self._high_water_issued = max(self._high_water_issued, high_water_for(ballot))
        return self._high_water_issued

    async def _write_high_water(self, ballot: Ballot) -> StoragedError | None:
        high_water = self._next_high_water(ballot)
        try:
            error = await self._commit(StoreBatch(meta={META_HIGH_WATER: encode(high_water)}))
            if error is None:
                self._set_high_water(max(self._high_water, high_water))
            return error
        finally:
            self._raising = None


def _resolve(answered: asyncio.Future[messages.AcceptReply], outcome: messages.AcceptReply | Exception) -> None:
    if answered.done():
        return  # nobody waits any more
    if isinstance(outcome, Exception):
        answered.set_exception(outcome)
    else:
        answered.set_result(outcome)
