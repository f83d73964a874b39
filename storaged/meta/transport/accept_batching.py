"""Accepts and creates for the disks of one other node, of one turn of the event loop, in one message: with sixty-four
writes in flight a frame for each would cost either
end as much as a third of the rest. One that has no company leaves at once, by itself.

Theory of operation. The message is the encoded requests one behind the other, with their copies one behind the other as
its body (``AcceptBatcher``). The node judges each as if it
had come alone, and answers when all are on disk (``try_accepts``): what arrives together is written in one group of
the log, or two. What can't be begun at once (another
accept of that register is on its way), or is not on disk after a while, since one disk of several is slow, is told as
None: it is asked again in a message of its own, for which
the node takes its time. So an accept may come twice; one that is being written is not written again
(``accepting.Writing.joined``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from storaged.cluster.ports import Call, EncodedCall, OnOutcome, OnReply, TryCaller
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.framing import HEAD_BYTES_MAX, ErrorHead
from storaged.errors import InvalidRequest, PeerUnreachable, StoragedError
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.authority import Gate
from storaged.meta.transport.calls import NO_BYTES
from storaged.units import KIB
from storaged.wire import Buffer, encode

log = structlog.get_logger(__name__)

TOGETHER_MAX = 16
"""Requests in one message. The first of a long turn so leave before it ends, and the node works on them meanwhile."""

ALONE_MAX = 2
"""With so few on their way another in this turn of the loop is unlikely, and one leaves by itself."""

TOGETHER_S = 1.0
"""So long the fast ones wait for the slow: for a disk that hangs, not for one that is busy, which would be asked again
and be busier. Most that wait here have other replicas.
"""

ENCODED_BYTES_MAX = 64 * KIB
"""Of a request without its copy: a longer one, of a record of very many parts, goes by itself."""

assert TOGETHER_MAX * ENCODED_BYTES_MAX < HEAD_BYTES_MAX // 2, "all of them fit the head of a frame"

ACCEPTS_MAX = 256
"""What a node takes in one message."""

_Asked = tuple[bool, bytes, EncodedCall, bytes, Sequence[Buffer], OnReply, float]
"""Whether it is a create; the encoded request; the line on which it goes by itself, and what goes there; its body; who
is told; and in how many seconds.
"""


class AcceptBatcher:
    """What is to be accepted by the disks of one other node."""

    def __init__(self, poster: TryCaller, node: str, alone_max: int = ALONE_MAX) -> None:
        self._line = poster.encoded_call(node, "meta.accepts", messages.AcceptsReply, b"", urgent=True)
        self._node = node
        self._alone_max = alone_max
        self._gathered: list[_Asked] = []
        self._out = 0

    def ask(self, asked: _Asked) -> bool:
        """False: nothing was asked, since that would need waiting. Raises ValueError when the request is over a frame's
        limits.
        """
        gathered = self._gathered
        if (self._out <= self._alone_max and not gathered) or len(asked[1]) > ENCODED_BYTES_MAX:
            _create, _encoded, line, rest, body, then, timeout_s = asked
            sent = line(rest, partial(self._heard_one, then), body, timeout_s)
            self._out += sent
            return sent
        gathered.append(asked)
        if len(gathered) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        elif len(gathered) >= TOGETHER_MAX:
            self._send()
        return True

    def _heard_one(self, then: OnReply, answer: Any, bulk: memoryview) -> None:
        self._out -= 1
        then(answer, bulk)

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return  # they have left already
        requests: list[bytes] = [b"\x93\xdc", len(gathered).to_bytes(2, "big")]
        copies: list[Buffer] = []
        sizes, creates, longest_s = [], [], 0.0
        for create, encoded, _line, _rest, body, _then, timeout_s in gathered:
            requests.append(encoded)
            creates.append(create)
            sizes.append(sum(map(len, body)))
            copies += body
            longest_s = max(longest_s, timeout_s)
        requests += encode(sizes), encode(creates)
        joined = (b"".join(copies),) if copies else ()
        self._out += len(gathered)
        if not self._line(b"".join(requests), partial(self._heard, gathered), joined, longest_s):
            self._heard(gathered, self._no_room(), NO_BYTES)

    def _heard(
        self, gathered: Sequence[_Asked], answer: messages.AcceptsReply | StoragedError, _bulk: memoryview
    ) -> None:
        count = len(gathered)
        self._out -= count
        errors: Mapping[int, ErrorHead] = {}
        if isinstance(answer, StoragedError):
            replies: Sequence[Any] = [answer] * count
        elif len(answer.replies) != count:
            replies = [
                faults.refused(faults.BAD_REPLY, f"{self._node} answers {len(answer.replies)} of {count} accepts.")
            ] * count
        else:
            replies, errors = answer.replies, answer.errors
        for index, ((_create, _encoded, line, rest, body, then, timeout_s), reply) in enumerate(
            zip(gathered, replies, strict=True)
        ):
            try:
                if reply is not None:
                    then(reply, NO_BYTES)
                elif index in errors:
                    then(faults.from_head(errors[index], self._node), NO_BYTES)
                elif not line(rest, then, body, timeout_s):
                    then(self._no_room(), NO_BYTES)
            except Exception:  # a mistake of whoever asked: the others are told all the same
                log.exception("telling of an accept failed", peer=self._node)

    def _no_room(self) -> PeerUnreachable:
        return PeerUnreachable(f"There is no connection to {self._node} with room for more.")


class _Answering:
    """Which of a message's requests have been answered."""

    __slots__ = ("_answer", "_errors", "_left", "_replies", "_timer")

    def __init__(self, count: int, answer: OnOutcome) -> None:
        self._answer: OnOutcome | None = answer
        self._left = count
        self._replies: list[messages.AcceptReply | None] = [None] * count
        self._errors: dict[int, ErrorHead] = {}
        self._timer = asyncio.get_running_loop().call_later(TOGETHER_S, self._end)

    def heard(self, index: int, outcome: messages.AcceptReply | Exception) -> None:
        if self._answer is None:
            return  # this one took too long, and was asked again
        if isinstance(outcome, Exception):
            self._errors[index] = faults.to_head(outcome)
        else:
            self._replies[index] = outcome
        self.none()

    def none(self) -> None:
        """It can't be begun now."""
        self._left -= 1
        if not self._left:
            self._timer.cancel()
            self._end()

    def _end(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(messages.AcceptsReply(self._replies, self._errors))


def try_accepts(
    of: Callable[[str], LocalReplica], gate: Gate, request: messages.Accepts, call: Call, answer: OnOutcome
) -> bool:
    """``ports.TryStart`` of ``meta.transport.accept_batching``. ``of(disk)`` raises DiskUnusable; each accept passes
    the ``gate`` by itself. Raises InvalidRequest."""
    accepts, sizes, creates = request.accepts, request.sizes, request.creates
    count = len(accepts)
    if (
        not 0 < count <= ACCEPTS_MAX
        or not count == len(sizes) == len(creates)
        or min(sizes) < 0
        or sum(sizes) != len(call.body)
    ):
        raise InvalidRequest(f"Accepts are up to {ACCEPTS_MAX}, each with the size of its copy.")
    answering, body, at = _Answering(count, answer), call.body, 0
    for index, accept in enumerate(accepts):
        end = at + sizes[index]
        told = partial(answering.heard, index)
        try:
            if verdict := gate.accept(accept, call.peer, create=creates[index]):
                told(messages.AcceptReply(verdict))
                begun = True
            else:
                begun = of(accept.disk).try_accept(accept, (body[at:end],), told, create=creates[index])
        except StoragedError as error:
            told(error)
        else:
            if not begun:
                answering.none()
        at = end
    return True
