"""Rows of registers as one acceptor's disk has them: what reads and scans report of them.

Reads see only what is synced. What a read would have to wait for (an accept on its way to the disk, a small copy that
is not in memory) makes the ``try_`` methods return None; the awaitable ones wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import msgspec
import structlog

from storaged.errors import InvalidRequest, StoragedError
from storaged.meta.acceptor.disk_writes import DiskWrites
from storaged.meta.acceptor.fences import Fences
from storaged.meta.acceptor.pending_accept import PendingAccepts
from storaged.meta.consensus.acceptor import Acceptor, AcceptorState, judge_read
from storaged.meta.consensus.register import Rules, Verdict, digest_of
from storaged.meta.messages import Accept, Read, ReadReply, ScanReply, ScanRequest, ShardAsk
from storaged.meta.names import RegisterName, Value
from storaged.meta.storage.scan import DigestCache, asks_to_read_ahead, read_ahead, scan_store
from storaged.meta.store_ports import Copies, Copy, MetaStore, NotInMemory, RowDamaged, Slot

NO_BYTES = memoryview(b"")
SCOPE_END = 17
"""Of a packed name: the table's byte and the scope's 16."""

log = structlog.get_logger(__name__)


class DiskRows:
    """``reads``, ``refused`` and ``damaged`` count since the start."""

    def __init__(
        self,
        store: MetaStore,
        state: AcceptorState,
        fences: Fences,
        pending: PendingAccepts,
        writes: DiskWrites,
        copies: Copies | None,
        rules: Rules,
    ) -> None:
        self.reads = self.refused = self.damaged = 0
        self._store = store
        self._state = state
        self._fences = fences
        self._pending = pending
        self._writes = writes
        self._copies = copies
        self._rules = rules
        self._digests = DigestCache()
        self._reading_ahead = asyncio.Lock()

    def acceptor(self, name: RegisterName, epoch: int) -> tuple[Slot | None, Acceptor]:
        """The row of a register, and what is known of it. ``epoch`` of the request."""
        fence = self._fences.of(name.scope)
        try:
            slot = self._store.get(name)
        except RowDamaged:
            self.damaged += 1
            return None, self._state.of_damaged(name, fence, epoch)
        return slot, self._state.of(name, slot, fence, epoch)

    def held(self, name: RegisterName) -> Value | None:
        """What the register holds here, when that is in memory and undamaged."""
        try:
            slot = self._store.get(name)
        except (RowDamaged, NotInMemory):
            return None
        return None if slot is None else slot.value

    async def bring(self, name: RegisterName) -> None:
        """Returns when the row and the fence of a register are in memory. Raises DiskUnusable, SlowDown."""
        while True:
            try:
                self._fences.of(name.scope)
                self._store.get(name)
            except NotInMemory as missing:
                await self._store.load(missing)
            except RowDamaged:
                return
            else:
                return

    async def bring_fence(self, scope: bytes) -> None:
        """As ``bring``, of a fence."""
        await self._fences.when_in_memory(partial(self._fences.of, scope))

    def has_copy(self, request: Accept) -> bool:
        """Whether the copy that the value names is durable here already."""
        payload, copies = request.value.payload, self._copies
        if copies is None:
            return False
        slot, _acceptor = self.acceptor(request.name, request.ballot.epoch)
        was_durable = slot is not None and slot.copied and slot.value.payload == payload
        return copies.holds(payload, was_durable=was_durable)

    # --- reads --------------------------------------------------------------------------------------------------------

    async def read(self, request: Read) -> tuple[ReadReply, memoryview]:
        """No accept of this register is on its way. Raises NotInMemory."""
        slot, acceptor, verdict, data_id = self._judge(request)
        if not data_id:
            return self._reply(request, slot, acceptor, verdict, b"", None)
        copy, absent = await self._load(data_id)
        if copy is None:
            return self._reply(request, slot, acceptor, verdict, b"", None, absent=absent)
        return self._reply(request, slot, acceptor, verdict, data_id, copy.payload, copy.header)

    def try_read(self, request: Read) -> tuple[ReadReply, memoryview] | None:
        if request.name in self._pending.by_name or request.data_id:
            return None
        try:
            slot, acceptor, verdict, data_id = self._judge(request)
        except NotInMemory:
            return None
        payload = None
        if data_id:
            payload = self.peek(data_id)
            if payload is None:
                return None
        return self._reply(request, slot, acceptor, verdict, data_id, payload)

    def try_rows(self, epoch: int, names: Sequence[bytes]) -> list[bytes | None]:
        """Of each packed name the row as it is stored, or empty. None where ``read`` would have to wait, would refuse,
        or has more to say: that the scope is fenced.
        """
        if self._writes.silent or (epoch < self._state.epoch and self._rules.fence_by_epoch):
            return [None] * len(names)
        self.reads += len(names)
        found = self._store.rows(names)
        if self._state.epochs and self._rules.fence_by_epoch:
            for index, name in enumerate(names):
                if epoch < self._state.epoch_at_packed(name):
                    found[index] = None
        last, fenced = b"", False
        for index, name in enumerate(names):
            scope = name[1:SCOPE_END]
            if scope != last:
                last, fenced = scope, self._may_be_fenced(scope)
            if fenced:
                found[index] = None
        pending = self._pending.by_name
        if pending:
            return [
                None if RegisterName.unpack(name) in pending else row for name, row in zip(names, found, strict=True)
            ]
        return found

    def try_row(self, epoch: int, name: bytes) -> bytes | None:
        """As ``try_rows``, of one name."""
        if self._writes.silent or (epoch < self._state.epoch and self._rules.fence_by_epoch):
            return None
        if self._state.epochs and epoch < self._state.epoch_at_packed(name) and self._rules.fence_by_epoch:
            return None
        self.reads += 1
        pending = self._pending.by_name
        try:
            if self._reports_fence(name[1:SCOPE_END]) or (pending and RegisterName.unpack(name) in pending):
                return None
        except NotInMemory:
            return None
        return self._store.row(name)

    def peek(self, data_id: bytes) -> memoryview | None:
        """A small copy that is in memory."""
        return self._copies.peek(data_id) if self._copies is not None else None

    def _judge(self, request: Read) -> tuple[Slot | None, Acceptor, Verdict, bytes]:
        """What is known, whether it may be reported, and the data id of the copy to be sent along, or nothing."""
        slot, acceptor = self.acceptor(request.name, request.epoch)
        verdict = judge_read(acceptor, request.epoch, self._rules)
        if verdict is not Verdict.OK:
            return slot, acceptor, verdict, b""
        named = slot.value.payload if slot is not None and request.want_payload else b""
        return slot, acceptor, verdict, request.data_id or named

    def _reply(
        self,
        request: Read,
        slot: Slot | None,
        acceptor: Acceptor,
        verdict: Verdict,
        data_id: bytes,
        payload: memoryview | None,
        header: bytes = b"",
        *,
        absent: bool = False,
    ) -> tuple[ReadReply, memoryview]:
        self.reads += 1
        if verdict is not Verdict.OK:
            self.refused += 1
            return ReadReply(verdict), NO_BYTES
        value = acceptor.value if request.full else None
        digest, fence = digest_of(acceptor.value), self._fences.of(request.name.scope)
        fenced = fence is not None and self._rules.fences_reported
        found = ReadReply(
            verdict,
            acceptor.accepted,
            digest,
            value,
            data_id if payload is not None else b"",
            header if payload is not None and request.data_id else b"",
            fenced,
            slot is None or slot.copied or not slot.value.payload,
            copy_absent=absent,
            final=fenced and fence is not None and fence.final,
            lends=fenced and fence is not None and fence.lends,
        )
        return found, payload if payload is not None else NO_BYTES

    def _reports_fence(self, scope: bytes) -> bool:
        return self._fences.of(scope) is not None and self._rules.fences_reported

    def _may_be_fenced(self, scope: bytes) -> bool:
        """Whether ``read`` may have to report a fence."""
        try:
            return self._reports_fence(scope)
        except NotInMemory:
            return True

    async def _load(self, data_id: bytes) -> tuple[Copy | None, bool]:
        """The copy; without one, whether this disk has none that is whole: a read that failed does not say so."""
        if self._copies is None:
            return None, True
        try:
            copy = await self._copies.load(data_id)
        except StoragedError as error:
            log.warning("small copy not readable", disk=self._writes.disk, data_id=data_id.hex(), reason=error.message)
            return None, not self._rules.errors_no_damage
        return copy, copy is None

    # --- scans --------------------------------------------------------------------------------------------------------

    async def scan(self, request: ScanRequest) -> ScanReply:
        self._writes.check_answers()
        if asks := asks_to_read_ahead(self._store, request, self._digests):
            await self._read_ahead(request, asks)
        try:
            return self.scan_now(request)
        except NotInMemory:
            return await self._scan_in_thread(request)

    def try_scan(self, request: ScanRequest) -> ScanReply | None:
        """None: it may have to wait for the disk, as far as one can tell."""
        self._writes.check_answers()
        if asks_to_read_ahead(self._store, request, self._digests):
            return None
        try:
            return self.scan_now(request)
        except NotInMemory:
            return None

    async def _read_ahead(self, request: ScanRequest, asks: Sequence[ShardAsk]) -> None:
        """Uses one thread per disk: other disks need threads too. The lock is held until the thread ends, even if the
        caller is cancelled.
        """
        await self._reading_ahead.acquire()
        try:
            reading = self._store.start(partial(read_ahead, self._store, request, asks))
        except BaseException:
            self._reading_ahead.release()
            raise
        reading.add_done_callback(lambda _: self._reading_ahead.release())
        await asyncio.shield(reading)

    async def _scan_in_thread(self, request: ScanRequest) -> ScanReply:
        """One at a time. Without the cache, which belongs to the event loop."""
        await self.bring_fence(request.scope)
        if self._lacks_fence(request):
            return ScanReply(Verdict.FENCED)
        async with self._reading_ahead:
            found = await self._store.start(partial(self._scan, request, None))
        self._writes.check_answers()
        return self._with_fence(found, request)

    def scan_now(self, request: ScanRequest) -> ScanReply:
        """Rows as they are on disk: what was answered OK is among them."""
        self._writes.check_answers()
        if self._is_old(request):
            return ScanReply(Verdict.EPOCH)
        if self._lacks_fence(request):
            return ScanReply(Verdict.FENCED)
        return self._with_fence(self._scan(request, self._digests), request)

    def _is_old(self, request: ScanRequest) -> bool:
        """Whether one of its shards is in a later step than the asker knows. The answers to the others would be right,
        but who asks refreshes what it knows, and asks again.
        """
        state = self._state
        if not self._rules.fence_by_epoch:
            return False
        if not state.epochs:
            return request.epoch < state.epoch
        shards = [(ask, RegisterName(request.table, request.scope, ask.shard, b"")) for ask in request.shards]
        return any((ask.epoch or request.epoch) < state.epoch_at(name) for ask, name in shards)

    def _lacks_fence(self, request: ScanRequest) -> bool:
        """Whether the asker counts on a fence that is not in force here, or only in part: an accept that was judged
        before it may still be on its way, and be acknowledged after the scan.
        """
        return (
            bool(request.fence)
            and self._rules.scans_after_fence
            and not self._fences.holds(request.scope, request.fence)
        )

    def _scan(self, request: ScanRequest, digests: DigestCache | None) -> ScanReply:
        try:
            return scan_store(self._store, request, digests)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    def _with_fence(self, reply: ScanReply, request: ScanRequest) -> ScanReply:
        return reply if not self._reports_fence(request.scope) else msgspec.structs.replace(reply, fenced=True)
