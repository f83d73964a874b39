"""Rows of single registers, read at many disks without decoding anything that nothing looks at.

A read asks one replica for its row, as it is stored, and others for the hash of theirs (``rowvalue.hash_of``): equal
hashes are equal ballots and equal values, and the reader computes that of the row itself. All requests of one turn of
the event loop for the disks of one node travel in one message (``ReadBatcher``), and are answered in one: with
sixty-four requests in flight a frame would cost either end more than the row that it carries.

Such a message waits for nothing. None answers a request that would have to wait (an accept on its way to the disk, a
small copy that is not in memory), or that has no answer (a damaged row, a disk that fails, an older layout). It is sent
again in a message of its own, for which the node takes its time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from storaged.cluster.ports import TryCaller
from storaged.errors import DiskUnusable, InvalidRequest, PeerUnreachable, StoragedError
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import ZERO_BALLOT, RegisterName
from storaged.meta.ports import Replica, Replicas
from storaged.meta.storage.rowvalue import NAME_PREFIX_BYTES, check_of, hash_of, pack_row, value_of
from storaged.meta.store_ports import Slot
from storaged.meta.transport.calls import NO_BYTES, TaskPool
from storaged.units import KIB
from storaged.wire import Buffer

CHECK, ROW, COPY, HASH = b"\0", b"\1", b"\2", b"\3"
"""The first byte of a request, before the register's packed name: for the row's check, which only gateways of version
0.1.0 ask for; the row; the row and the copy of the small object that it names; the row's hash. Nodes of 0.1.0 answer a
request for a hash with the row.
"""
_SHORTEST: Final = bytes(1 + NAME_PREFIX_BYTES + 1)
_COPY: Final = COPY[0]
_CHECK: Final = CHECK[0]
_ROW: Final = ROW[0]
_HASH: Final = HASH[0]

READS_MAX = 256
"""Registers in one message."""
READS_BYTES_MAX = 512 * KIB
"""Rows and copies in one answer. Reading them takes two thirds of a millisecond, so an answer delays the node's other
calls no longer than that.
"""

OnRow = Callable[[bytes | StoragedError | None, memoryview], None]
"""``on_row(found, copy)``: the row, its check or its hash; empty when the register was never written here; None when
the replica can't say; or the error of the call. ``copy`` is empty unless it was asked for, and is here. It must not
raise.
"""


def answer_reads(
    replicas: Mapping[str, LocalReplica], request: messages.Reads
) -> tuple[messages.ReadsReply, list[Buffer]]:
    """What a node answers without waiting, and the copies that go along. Raises InvalidRequest."""
    count = sum(map(len, request.asks))
    if len(request.asks) != len(request.disks) or not 0 < count <= (1 if request.wait else READS_MAX):
        raise InvalidRequest(
            f"Reads are for as many disks as they name, and of up to {READS_MAX} registers, or of one that is waited"
            " for."
        )
    found: list[list[bytes | None]] = []
    copies: list[Buffer] = []
    room = READS_BYTES_MAX
    for disk, asks in zip(request.disks, request.asks, strict=True):
        replica = replicas.get(disk)
        rows: list[bytes | None] = [None] * len(asks)
        if replica is not None:
            before = len(copies)
            try:
                rows, room = _rows_of(replica, request.epoch, asks, copies, room)
            except DiskUnusable:  # a read of its rows alone reports it; the other disks of the node answer
                del copies[before:]
        found.append(rows)
    return messages.ReadsReply(found, [len(copy) for copy in copies]), copies


def _rows_of(
    replica: LocalReplica, epoch: int, asks: Sequence[bytes], copies: list[Buffer], room: int
) -> tuple[list[bytes | None], int]:
    """What one disk answers without waiting, and what is left of ``room`` bytes; its copies are appended to ``copies``.
    Raises InvalidRequest, DiskUnusable.
    """
    if len(min(asks, key=len, default=_SHORTEST)) < len(_SHORTEST):
        raise InvalidRequest("Not the name of a register.")
    rows = replica.try_rows(epoch, [ask[1:] for ask in asks])
    for index, (ask, row) in enumerate(zip(asks, rows, strict=True)):
        form = ask[0]
        if not row:
            if form == _COPY and row is not None:
                copies.append(b"")
        elif form == _HASH:
            rows[index] = hash_of(row)
        elif form == _CHECK:
            rows[index] = check_of(row)
        elif room <= 0:
            rows[index] = None  # the others have filled the answer
        elif form == _COPY:
            data_id = value_of(row).payload
            copy = replica.peek(data_id) if data_id else b""
            if copy is None:
                rows[index] = None
            else:
                copies.append(copy)
                room -= len(row) + len(copy)
        else:
            room -= len(row)
    return rows, room


async def answer_read(replica: Replica, request: messages.Reads) -> tuple[messages.ReadsReply, memoryview]:
    """What a node answers to a message with a single request, waiting where it has to. Raises as ``Replica.read``."""
    ask = request.asks[0][0]
    found, copy = await _read_row(replica, request.disks[0], request.epoch, ask)
    return messages.ReadsReply([[found]], [len(copy)] if ask[0] == _COPY and found is not None else []), copy


async def _read_row(replica: Replica, disk: str, epoch: int, ask: bytes) -> tuple[bytes | None, memoryview]:
    name = RegisterName.unpack(ask[1:])
    reply, copy = await replica.read(messages.Read(disk, name, epoch, True, ask[0] == _COPY))
    if reply.verdict != Verdict.OK or reply.fenced:  # ``Reader`` gets to know of the fence
        return None, NO_BYTES
    if reply.value is None:
        return b"" if reply.accepted == ZERO_BALLOT else None, NO_BYTES
    row = pack_row(Slot(name, reply.accepted, reply.value, reply.copied))
    return (hash_of(row) if ask[0] == _HASH else check_of(row) if ask[0] == _CHECK else row), copy


class _Gathered:
    """Requests of one epoch for the disks of one node, while they are gathered."""

    __slots__ = ("by_disk", "count", "epoch", "timeout_s")

    def __init__(self, epoch: int, timeout_s: float) -> None:
        self.epoch = epoch
        self.timeout_s = timeout_s
        self.count = 0
        self.by_disk: dict[str, tuple[list[bytes], list[OnRow]]] = {}


class ReadBatcher:
    """Reads at the disks of one other node. Partitions that have moved equally often are read in one message."""

    def __init__(self, caller: TryCaller, node: str) -> None:
        self._caller = caller
        self._node = node
        self._gathered: dict[int, _Gathered] = {}
        """By epoch."""

    def ask(self, disk: str, ask: bytes, epoch: int, on_row: OnRow, timeout_s: float) -> None:
        """``on_row`` is called later."""
        gathered = self._gathered.get(epoch)
        if gathered is None or gathered.count >= READS_MAX:
            full, alone = gathered, not self._gathered
            gathered = self._gathered[epoch] = _Gathered(epoch, timeout_s)
            if full is not None:
                self._send(full)
            elif alone:
                asyncio.get_running_loop().call_soon(self._send_all)
        gathered.count += 1
        of_disk = gathered.by_disk.get(disk)
        if of_disk is None:
            of_disk = gathered.by_disk[disk] = ([], [])
        of_disk[0].append(ask)
        of_disk[1].append(on_row)

    def _send_all(self) -> None:
        all_gathered, self._gathered = self._gathered, {}
        for gathered in all_gathered.values():
            self._send(gathered)

    def _send(self, gathered: _Gathered) -> None:
        epoch, timeout_s, by_disk = gathered.epoch, gathered.timeout_s, gathered.by_disk
        request = messages.Reads(epoch, list(by_disk), [asks for asks, _ in by_disk.values()])
        self._call(request, partial(self._on_reply, epoch, timeout_s, by_disk), timeout_s)

    def _call(self, request: messages.Reads, on_reply: Callable[[Any, memoryview], None], timeout_s: float) -> None:
        if not self._caller.try_call(
            self._node, "meta.reads", request, messages.ReadsReply, on_reply, timeout_s=timeout_s
        ):
            on_reply(PeerUnreachable(f"There is no connection to {self._node} with room for more."), NO_BYTES)

    def _on_reply(
        self,
        epoch: int,
        timeout_s: float,
        gathered: dict[str, tuple[list[bytes], list[OnRow]]],
        answer: messages.ReadsReply | StoragedError,
        bulk: memoryview,
    ) -> None:
        if isinstance(answer, StoragedError):
            for _asks, callbacks in gathered.values():
                for on_row in callbacks:
                    on_row(answer, NO_BYTES)
            return
        sizes, at = iter(answer.copies), 0
        for index, (disk, (asks, callbacks)) in enumerate(gathered.items()):
            rows = answer.found[index] if index < len(answer.found) else ()
            for on_row in callbacks[len(rows) :]:  # otherwise each of them would wait for its time limit, at every read
                on_row(PeerUnreachable(f"{self._node} leaves out what it was asked for."), NO_BYTES)
            for ask, on_row, row in zip(asks, callbacks, rows, strict=False):
                if row is None:
                    request = messages.Reads(epoch, [disk], [[ask]], True)
                    self._call(request, partial(_on_single_reply, on_row), timeout_s)
                elif ask[0] == _COPY:
                    end = at + max(0, next(sizes, 0))
                    on_row(row, bulk[at:end])
                    at = end
                else:
                    on_row(row, NO_BYTES)


def _on_single_reply(on_row: OnRow, answer: messages.ReadsReply | StoragedError, bulk: memoryview) -> None:
    if isinstance(answer, StoragedError):
        on_row(answer, NO_BYTES)
    else:
        on_row(answer.found[0][0] if answer.found and answer.found[0] else None, bulk)


def _try_row_here(replica: LocalReplica, ask: bytes, epoch: int, on_row: OnRow) -> bool:
    """Asks a replica of this process. False: it would have to wait. Raises DiskUnusable."""
    row = replica.try_row(epoch, ask[1:])
    if row is None:
        return False
    form = ask[0]
    if not row or form == _ROW:
        on_row(row, NO_BYTES)
    elif form == _HASH:
        on_row(hash_of(row), NO_BYTES)
    elif form == _CHECK:
        on_row(check_of(row), NO_BYTES)
    else:
        data_id = value_of(row).payload
        copy = replica.peek(data_id) if data_id else NO_BYTES
        if copy is None:
            return False
        on_row(row, copy)
    return True


class RowReader:
    """Asks replicas for rows, wherever they are."""

    def __init__(self, replicas: Replicas, pool: TaskPool) -> None:
        self._replicas = replicas
        self._pool = pool

    def ask(self, disk: str, ask: bytes, epoch: int, on_row: OnRow, timeout_s: float) -> None:
        """``on_row`` is called once, perhaps before this returns."""
        try:
            replica: Any = self._replicas.replica(disk)
            if isinstance(replica, LocalReplica):
                if _try_row_here(replica, ask, epoch, on_row):
                    return
            else:
                try_ask_row = getattr(replica, "try_ask_row", None)
                if try_ask_row is not None and try_ask_row(ask, epoch, on_row, timeout_s):
                    return
        except StoragedError as error:
            on_row(error, NO_BYTES)
            return
        self._pool.start(_call(replica, disk, epoch, ask, on_row))


async def _call(replica: Replica, disk: str, epoch: int, ask: bytes, on_row: OnRow) -> None:
    found: bytes | StoragedError | None = PeerUnreachable(f"The call to disk {disk} was given up.")
    copy = NO_BYTES
    try:
        found, copy = await _read_row(replica, disk, epoch, ask)
    except StoragedError as error:
        found = error
    finally:
        on_row(found, copy)
