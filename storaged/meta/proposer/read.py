"""Reads of registers: the part of ``ports.Registers`` that changes nothing by itself.

A read asks the disks of one quorum: one for the row, the others for the hash of theirs (``RowRead``). When they agree
the value is settled, and the read has cost one round trip and no task. When one is slow, away, or does not agree, all
replicas are asked (``ReadShell``), and a value that differs is settled first. ``consensus.reader`` decides both.

A replica does not answer for a row alone where it has more to say: that the scope is fenced. So the first way leads to
nothing there, and reads begin with the second where the last read of the scope met a fence. Data that lenders lend is
read so for as long as there are copies of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec
import structlog

from storaged.cluster.disks_seen import DisksSeen
from storaged.deadlines import Deadlines
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.hashes import ANSWER_HASH_BYTES
from storaged.meta.consensus.change import Fragments
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.reader import (
    DONE,
    FAILED,
    HEARING,
    SETTLING,
    STALE,
    WAITING,
    Reader,
    ReadState,
    RowComparison,
)
from storaged.meta.consensus.register import shown
from storaged.meta.messages import Read, ReadReply
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import Reading
from storaged.meta.proposer.ring import Ring
from storaged.meta.storage.rowvalue import accepted_whole, hash_of, value_of
from storaged.meta.store_ports import Copy
from storaged.meta.transport.calls import NO_BYTES, Answers, Calls
from storaged.meta.transport.read_batching import COPY, HASH, ROW, RowReader
from storaged.wire import Buffer

LAYOUT_PAUSE_S = 0.05
"""Between two tries of a read whose replicas follow a newer layout; drawn at random up to it."""

FENCED_MAX = 4_096
"""Scopes that are known to be fenced."""

IsCopy = Callable[[RegisterName, Value, bytes, Buffer], bool]
"""``is_copy(name, value, header, payload)``: see ``client.RingHooks``."""

CARRY_S = 1.0
"""How long a settling round looks for the copy of an unconfirmed small object; the replica that has it has just
answered.
"""

log = structlog.get_logger(__name__)

_ReadAnswer = tuple[ReadReply, memoryview]


class RowRead:
    """``ask`` once; ``on_done`` is called when it is over. When it takes long it ends without a result, and the disks
    that have not answered come last for a while: else each read would wait for them anew.
    """

    __slots__ = ("_deadlines", "_first", "_on_done", "_suspects", "comparison", "copy", "row")

    comparison: RowComparison

    def __init__(self, on_done: Callable[[RowRead], None], unresponsive: DisksSeen, deadlines: Deadlines) -> None:
        """``on_done`` must not raise."""
        self._on_done = on_done
        self._suspects = unresponsive
        self._deadlines = deadlines
        self._first = ""
        self.row = b""
        """Empty: never written."""
        self.copy = NO_BYTES
        """The small copy that came along, if one did."""

    def ask(
        self, reader: RowReader, view: View, packed: bytes, want_copy: bool, timeout_s: float, limit_s: float
    ) -> None:
        """Of the register with this packed name. It may be over before this returns."""
        asked = view.quorum.prefix(self._suspects.last(view.quorum.disks))
        self._first = asked[0]
        comparison = self.comparison = RowComparison(asked)
        reader.ask(self._first, (COPY if want_copy else ROW) + packed, view.epoch, self._on_row, timeout_s)
        for disk in asked[1:]:
            reader.ask(disk, HASH + packed, view.epoch, partial(self._on_hash, disk), timeout_s)
        if not comparison.over:  # replicas of this process have answered by now
            self._deadlines.begin(self, limit_s)

    def _on_row(self, found: bytes | StoragedError | None, copy: memoryview) -> None:
        if isinstance(found, bytes):
            self.row, self.copy = found, copy
            found = hash_of(found)
        self._on_hash(self._first, found, copy)

    def _on_hash(self, disk: str, found: bytes | StoragedError | None, _copy: memoryview) -> None:
        if isinstance(found, StoragedError):
            if not self.comparison.over:
                self._suspects.saw(disk, found)
            found = None
        elif found is not None and len(found) > ANSWER_HASH_BYTES:  # a node of 0.1.0 sends the row itself
            found = hash_of(found)
        if self.comparison.report(disk, found):
            self._end()

    def on_time(self) -> None:
        """See ``Waiting``."""
        comparison = self.comparison
        if comparison.answered:  # when none has answered, it may be this process that is late
            for disk in comparison.silent:
                self._suspects.add(disk)
        comparison.give_up()
        self._end()

    def stop(self) -> None:
        """Ends it without a call of ``on_done``."""
        self.comparison.give_up()
        self._deadlines.end(self)

    def _end(self) -> None:
        self._deadlines.end(self)
        self._on_done(self)

    def reading(self, want_payload: bool) -> Reading | None:
        """What was found; None: the replicas do not agree, or the copy is missing."""
        if not self.comparison.agreed or (self.row and not accepted_whole(self.row)):
            return None
        try:
            value = shown(value_of(self.row)) if self.row else None
        except (msgspec.MsgspecError, IndexError):  # a node's mistake: others are asked
            return None
        if not want_payload or value is None or not value.payload:
            return Reading(value)
        return Reading(value, self.copy) if len(self.copy) else None


class CopyReader:
    """Small copies, from any replica that has one."""

    def __init__(self, calls: Calls, copy_at: Callable[[bytes, int], bytes], is_copy: IsCopy) -> None:
        """See ``client.RingHooks``."""
        self._calls = calls
        self._copy_at = copy_at
        self._is_copy = is_copy

    async def carry(self, view: View, name: RegisterName, value: Value, deadline: float) -> Fragments | None:
        """The copy that the value names, for each position; None when no replica gives it in time, empty when each has
        said that it has none.
        """
        limit = min(deadline, self._calls.clock.monotonic() + CARRY_S)
        copy, absent = await self._search(view, name, value.payload, set(), limit, value)
        if copy is None:
            return () if absent.issuperset(view.quorum.disks) else None
        return [(self._copy_at(copy.header, index), (copy.payload,)) for index in range(1 + max(view.positions))]

    async def fetch(
        self, view: View, name: RegisterName, data_id: bytes, asked: set[str], deadline: float
    ) -> Copy | None:
        """Asks the replicas one by one; those that were ``asked`` and had none come last. The copy is not verified: its
        reader opens it.
        """
        return (await self._search(view, name, data_id, asked, deadline))[0]

    async def _search(
        self,
        view: View,
        name: RegisterName,
        data_id: bytes,
        asked: set[str],
        deadline: float,
        named_by: Value | None = None,
    ) -> tuple[Copy | None, set[str]]:
        """As ``fetch``, and the disks that have said that they have no whole copy. ``named_by``: only the copy that
        this value names counts.
        """
        absent: set[str] = set()
        calls = self._calls
        order = calls.unresponsive.last(sorted(view.quorum.disks, key=asked.__contains__))
        answers: Answers[_ReadAnswer] = calls.answers()
        while order or answers.pending:
            if order:
                request = Read(order.pop(0), name, view.epoch, full=False, data_id=data_id)
                answers.ask_read(request, timeout_s=calls.timeout_s(deadline))
            remaining_s = calls.remaining_s(deadline)
            if remaining_s <= 0:
                return None, absent
            answer = await answers.next(min(calls.hedge_s, remaining_s) if order else remaining_s)
            if answer is None or isinstance(answer[1], StoragedError):
                continue
            reply, payload = answer[1]
            if reply.payload == data_id and named_by and not self._is_copy(name, named_by, reply.header, payload):
                log.error("the copy of a replica is not what the record says", disk=answer[0], data_id=data_id.hex())
                continue
            if reply.payload == data_id:
                return Copy(reply.header, payload), absent
            if reply.copy_absent:
                absent.add(answer[0])
        return None, absent


class Settle(Protocol):
    def __call__(
        self, name: RegisterName, nonce: bytes, deadline: float, *, commit: bool
    ) -> Coroutine[Any, Any, Value | None]:
        """A settling round; see ``ports.Registers.settle``."""


class ReadShell:
    """Drives one ``Reader``: ``await run()`` once."""

    def __init__(self, ring: Ring, machine: Reader, nonce: bytes, deadline: float, settle: Settle) -> None:
        self.machine = machine
        self._ring = ring
        self._nonce = nonce
        self._deadline = deadline
        self._settle = settle
        self._entered: asyncio.Future[None] | None = None

    async def run(self) -> Value | None:
        """The settled value. Raises as ``ports.Registers.read``."""
        machine, ring = self.machine, self._ring
        machine.begin(ring.view(machine.name))
        while machine.state not in (DONE, FAILED):
            state = machine.state
            if state is HEARING:
                self._ask_values()
                await self._wait(state, self._remaining_s(), machine.expire)
            elif state is WAITING:
                await self._wait(state, min(ring.hedge_s, self._remaining_s()), machine.waited)
            elif state is STALE:
                await self._refresh()
            elif state is SETTLING:
                value = await self._settle(machine.name, self._nonce, self._deadline, commit=False)
                return shown(value)
        if machine.state is FAILED:
            raise machine.take_error()
        return machine.value

    async def _refresh(self) -> None:
        """The replicas know a later step of the partition, or a newer layout, than this node has heard of."""
        machine, ring = self.machine, self._ring
        if self._remaining_s() <= LAYOUT_PAUSE_S:
            machine.expire()
            return
        if not await ring.refresher.refresh(machine.name, machine.view, self._remaining_s()):
            await asyncio.sleep(ring.jitter() * LAYOUT_PAUSE_S)
        machine.begin(ring.view(machine.name))

    def _ask_values(self) -> None:
        machine = self.machine
        on_reply = partial(self._on_reply, machine.turn)
        disks = machine.view.quorum.disks
        self._ring.fanout.read(machine.read, disks, on_reply, timeout_s=self._timeout_s())

    def _timeout_s(self) -> float:
        return max(0.001, min(self._ring.call_timeout_s, self._remaining_s()))

    async def _wait(self, state: ReadState, seconds: float, event: Callable[[], bool]) -> None:
        """Until the machine has left the state; after ``seconds`` the event makes it."""
        if self.machine.state is not state:
            return  # replicas of this process have answered by now
        loop = asyncio.get_running_loop()
        entered = self._entered = loop.create_future()
        timer = loop.call_later(max(0.0, seconds), _resolve, entered)
        try:
            await entered
        finally:
            timer.cancel()
        if self.machine.state is state:
            event()

    def _on_reply(self, turn: int, disk: str, answer: ReadReply | StoragedError, bulk: memoryview) -> None:
        machine = self.machine
        if isinstance(answer, StoragedError):
            self._ring.unresponsive.saw(disk, answer)
        reply = None if isinstance(answer, StoragedError) else answer
        self._did(machine.replied(turn, disk, reply, bulk))
        if disk in machine.doubted:
            self._ring.on_missed(machine.name)

    def _did(self, entered: bool) -> None:
        if entered and self._entered is not None:
            _resolve(self._entered)

    def _remaining_s(self) -> float:
        return self._deadline - self._ring.clock.monotonic()


class RegisterReader:
    """The reads of one client."""

    def __init__(
        self, ring: Ring, rows: RowReader, copies: CopyReader, gateway: bool, deadline_s: float, settle: Settle
    ) -> None:
        self._ring = ring
        self._rows = rows
        self._copies = copies
        self._gateway = gateway
        self._deadline_s = deadline_s
        self._settle = settle
        self._fenced: set[bytes] = set()
        """Scopes of which some replica said so at their last read."""

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        """See ``ports.Registers``."""
        ring = self._ring
        ring.shared.counts["reads"] += 1
        deadline = ring.clock.monotonic() + self._deadline_s
        if name.scope not in self._fenced:
            reading = await self._read_rows(name, want_payload)
            if reading is not None:
                return reading
        machine = Reader(ring.shared, self._gateway, name, want_payload=want_payload)
        try:
            shell = ReadShell(ring, machine, settling_nonce, deadline, self._settle)
            value = await self._unless_it_moved(shell, deadline)
        finally:
            self._note_fenced(name.scope, machine.fenced)
            if machine.differing is not None:
                ring.shared.counts["digest_conflicts"] += 1
                register = name.pack().hex()
                log.error("replicas differ under one ballot", register=register, ballot=str(machine.differing))
        if not want_payload or value is None or not value.payload:
            return Reading(value)
        payload = machine.payloads.get(value.payload)
        if payload is None:
            asked = {disk for disk, reply in machine.replies.items() if reply.value is not None}
            copy = await self._copies.fetch(machine.view, name, value.payload, asked, deadline)
            payload = None if copy is None else copy.payload
        return Reading(value, payload)

    def _note_fenced(self, scope: bytes, fenced: bool) -> None:
        if not fenced:
            self._fenced.discard(scope)
            return
        if len(self._fenced) >= FENCED_MAX:
            self._fenced.clear()
        self._fenced.add(scope)
        self._ring.on_fenced(scope)

    async def _unless_it_moved(self, shell: ReadShell, deadline: float) -> Value | None:
        """The value. Where no quorum answers the replicas may be others by now."""
        try:
            return await shell.run()
        except ServiceUnavailable:
            machine, ring = shell.machine, self._ring
            left_s = deadline - ring.clock.monotonic()
            if left_s <= 0 or not hasattr(machine, "view"):  # without a view it is not known where the replicas are
                raise
            if not await ring.refresher.refresh(machine.name, machine.view, left_s):
                raise
            return await shell.run()

    async def _read_rows(self, name: RegisterName, want_payload: bool) -> Reading | None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        read = self._ask_rows(name, want_payload, lambda _read: _resolve(over))
        try:
            await over
        finally:
            read.stop()
        return read.reading(want_payload)

    def _ask_rows(self, name: RegisterName, want_payload: bool, on_done: Callable[[RowRead], None]) -> RowRead:
        ring = self._ring
        view = ring.view(name)
        read = RowRead(on_done, ring.unresponsive, ring.deadlines)
        read.ask(self._rows, view, name.pack(), want_payload, ring.call_timeout_s, ring.hedge_s)
        return read

    def try_read(self, name: RegisterName, want_payload: bool, on_done: Callable[[Reading | None], None]) -> None:
        """See ``ports.Registers``."""
        if name.scope in self._fenced:
            on_done(None)
            return
        try:
            self._ask_rows(name, want_payload, partial(self._on_rows, want_payload, on_done))
        except StoragedError:  # ``read`` raises it
            on_done(None)

    def _on_rows(self, want_payload: bool, on_done: Callable[[Reading | None], None], read: RowRead) -> None:
        reading = read.reading(want_payload)
        if reading is not None:  # else ``read`` is called next, and counts
            self._ring.shared.counts["reads"] += 1
        on_done(reading)


def _resolve(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)
