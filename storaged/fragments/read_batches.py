"""Reads of cells on one node that travel together.

Theory of operation. A call between two nodes costs about as much as 50 KiB of its reply. A GET reads two of its four
fragments from one node where a cluster has three, and many GETs read from each node. So the reads of one turn of the
event loop travel in one call. The node answers those that need no waiting, and no others, so that no disk delays
another one's cells; the others are asked for again, each in a call of its own. A node of version 0.1.0 does not know
such a call, and gets each read on its own. It is asked again from time to time, since its program may have been
replaced.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from storaged.cluster.ports import TryCaller
from storaged.cluster.rpc.faults import UNKNOWN_METHOD
from storaged.errors import FragmentDamaged, PeerError, PeerRefused
from storaged.fragments.messages import MISSING_CELL, ReadReply, ReadRequest, ReadsReply, ReadsRequest
from storaged.fragments.ports import READS_MAX, CellRead
from storaged.units import KIB
from storaged.wire import encode

log = structlog.get_logger(__name__)

BATCH_BYTES_MAX = 768 * KIB
"""Of the cells that one call reads: two fragments of a window of 24 cells. Larger replies would only come later."""

ASKED_AGAIN_S = 60.0
"""A node that did not know the call gets each read alone for so long."""

OnFound = Callable[[CellRead | PeerError | None], None]
"""Gets the cells; the error; or None: nothing was asked, and ``FragmentStore.read`` must be awaited."""


class _Ask(NamedTuple):
    request: ReadRequest
    on_found: OnFound


class ReadBatcher:
    """Reads of the disks of one node, without tasks."""

    def __init__(self, caller: TryCaller, node: str, timeout_s: float) -> None:
        self._call_one = caller.encoded_call(node, "fragment.read", ReadReply, b"", followed=True)
        self._call_many = caller.encoded_call(node, "fragment.reads", ReadsReply, b"", followed=True)
        self._timeout_s = timeout_s
        self._asks: list[_Ask] = []
        self._bytes = 0
        self._scheduled = False
        self._alone_until = -math.inf
        """Each read travels alone, for the node is of version 0.1.0. In the loop's seconds."""

    def ask(self, request: ReadRequest, cell_bytes: int, on_found: OnFound) -> None:
        """``cell_bytes``: of the cells that are read, at most. ``on_found`` is called once, later."""
        if self._asks and (self._bytes + cell_bytes > BATCH_BYTES_MAX or len(self._asks) >= READS_MAX):
            self._send()
        self._asks.append(_Ask(request, on_found))
        self._bytes += cell_bytes
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._scheduled = False
        self._send()

    def _send(self) -> None:
        asks, self._asks, self._bytes = self._asks, [], 0
        if len(asks) == 1 or asyncio.get_running_loop().time() < self._alone_until:
            for ask in asks:
                self._send_one(ask)
            return
        request = encode(ReadsRequest(tuple([ask.request for ask in asks])))
        if not self._call_many(request, partial(self._on_many, asks), (), self._timeout_s):
            for ask in asks:
                _tell(ask, None)

    def _send_one(self, ask: _Ask) -> None:
        if not self._call_one(encode(ask.request), partial(self._on_one, ask), (), self._timeout_s):
            _tell(ask, None)

    def _on_one(self, ask: _Ask, answer: ReadReply | PeerError, body: memoryview) -> None:
        _tell(ask, answer if isinstance(answer, PeerError) else cells_in(ask.request, answer, body))

    def _on_many(self, asks: Sequence[_Ask], answer: ReadsReply | PeerError, body: memoryview) -> None:
        if isinstance(answer, PeerError):
            if isinstance(answer, PeerRefused) and answer.remote_code == UNKNOWN_METHOD:
                self._alone_until = asyncio.get_running_loop().time() + ASKED_AGAIN_S
                for ask in asks:
                    self._send_one(ask)
            else:
                for ask in asks:
                    _tell(ask, answer)
            return
        at = 0
        for ask, reply in zip(asks, answer.found, strict=False):
            if reply is None:
                self._send_one(ask)
            else:
                begin, at = at, at + sum([length for length in reply.lengths if length > 0])
                _tell(ask, cells_in(ask.request, reply, body[begin:at]))
        for ask in asks[len(answer.found) :]:  # a node that gives fewer answers than it was asked for
            self._send_one(ask)


def _tell(ask: _Ask, found: CellRead | PeerError | None) -> None:
    """Calls back. An exception of one callback must not keep the answers of the other reads back."""
    try:
        ask.on_found(found)
    except Exception:
        log.exception("the callback of a read failed", disk=ask.request.disk)


def cells_in(request: ReadRequest, reply: ReadReply, body: memoryview) -> CellRead | FragmentDamaged:
    """What a node answered. FragmentDamaged: it is the answer to another question."""
    header, lengths, unread = reply.header, reply.lengths, reply.unread
    cells: list[memoryview | None] = []
    at, whole = 0, True
    for length in lengths:
        if length != MISSING_CELL:
            cells.append(body[at : at + length])
            at += length
        else:
            cells.append(None)
            whole = False
    if header.id != request.id or at != len(body):
        return FragmentDamaged(f"disk {request.disk} answered with something other than fragment {request.id.hex()}")
    return CellRead(header, tuple(cells), body if whole else None, unread)
