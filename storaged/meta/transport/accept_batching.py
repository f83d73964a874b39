"""Accepts and creates for the disks of one other node, of one turn of the event loop, in one message.

With sixty-four writes in flight a frame for each would cost either end as much as a third of the rest of the work. A
request that has no company leaves at once, by itself.

Theory of operation. The message is the encoded requests one after the other, with their copies one after the other as
its body (``AcceptBatcher``). The node judges each request as if it had come alone, and answers when all are on disk
(``try_accepts``): what arrives together is written in one group of the log, or two.

Some requests can't be begun at once (another accept of that register is on its way), or are not on disk after a while
(one disk of several is slow). For these the answer has None, and each is sent again in a message of its own, for which
the node takes its time. So an accept may come twice; one that is being written is not written again
(``PendingAccept.joined``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from storaged.cluster.ports import Call, EncodedCall, OnAnswer, OnReply, TryCaller
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
"""Requests in one message. The first message of a long turn leaves before the turn ends, and the node works on it
meanwhile.
"""

ALONE_MAX = 2
"""With so few requests on their way, another in this turn of the loop is unlikely, and a request leaves by itself."""

TOGETHER_S = 1.0
"""How long the fast disks of a message wait for the slow ones. This is for a disk that hangs, not for one that is busy:
a busy disk would be asked again and be busier. Most requests that wait here have other replicas.
"""

ENCODED_BYTES_MAX = 64 * KIB
"""Of a request without its copy. A longer one, of a record of very many parts, goes by itself."""

JOINED_COPY_BYTES_MAX = 32 * KIB
"""Of a copy. A larger one goes by itself: here it would be copied once more, and the others would wait for its disk."""

assert TOGETHER_MAX * ENCODED_BYTES_MAX < HEAD_BYTES_MAX // 2, "all of them fit the head of a frame"

ACCEPTS_MAX = 256
"""How many a node takes in one message."""

_Asked = tuple[bool, bytes, EncodedCall, bytes, Sequence[Buffer], OnReply, float]
"""Whether it is a create; the encoded request; the call that sends it by itself, and what goes there; its body; the
callback; and the timeout in seconds.
"""


class AcceptBatcher:
    """Accepts and creates for the disks of one other node."""

    def __init__(self, caller: TryCaller, node: str, alone_max: int = ALONE_MAX) -> None:
        self._call_node = caller.encoded_call(node, "meta.accepts", messages.AcceptsReply, b"", urgent=True)
        self._node = node
        self._alone_max = alone_max
        self._gathered: list[_Asked] = []
        self._out = 0

    def ask(self, asked: _Asked) -> bool:
        """False: nothing was sent, since that would need waiting. Raises ValueError when the request is over a frame's
        limits.
        """
        gathered = self._gathered
        alone = (self._out <= self._alone_max and not gathered) or len(asked[1]) > ENCODED_BYTES_MAX
        if alone or sum(map(len, asked[4])) > JOINED_COPY_BYTES_MAX:
            _create, _encoded, call, rest, body, on_reply, timeout_s = asked
            sent = call(rest, partial(self._on_single_reply, on_reply), body, timeout_s)
            self._out += sent
            return sent
        gathered.append(asked)
        if len(gathered) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        elif len(gathered) >= TOGETHER_MAX:
            self._send()
        return True

    def _on_single_reply(self, on_reply: OnReply, answer: Any, bulk: memoryview) -> None:
        self._out -= 1
        on_reply(answer, bulk)

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return  # a full message has left already
        requests: list[bytes] = [b"\x93\xdc", len(gathered).to_bytes(2, "big")]
        copies: list[Buffer] = []
        sizes, creates, longest_s = [], [], 0.0
        for create, encoded, _call, _rest, body, _on_reply, timeout_s in gathered:
            requests.append(encoded)
            creates.append(create)
            sizes.append(sum(map(len, body)))
            copies += body
            longest_s = max(longest_s, timeout_s)
        requests += encode(sizes), encode(creates)
        joined = (b"".join(copies),) if copies else ()
        self._out += len(gathered)
        if not self._call_node(b"".join(requests), partial(self._on_replies, gathered), joined, longest_s):
            self._on_replies(gathered, self._no_room(), NO_BYTES)

    def _on_replies(
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
        for index, ((_create, _encoded, call, rest, body, on_reply, timeout_s), reply) in enumerate(
            zip(gathered, replies, strict=True)
        ):
            try:
                if reply is not None:
                    on_reply(reply, NO_BYTES)
                elif index in errors:
                    on_reply(faults.from_head(errors[index], self._node), NO_BYTES)
                elif not call(rest, on_reply, body, timeout_s):
                    on_reply(self._no_room(), NO_BYTES)
            except Exception:  # a mistake of one callback: the others are called all the same
                log.exception("a callback of an accept failed", peer=self._node)

    def _no_room(self) -> PeerUnreachable:
        return PeerUnreachable(f"There is no connection to {self._node} with room for more.")


class _MessageAnswers:
    """The answers to the requests of one message."""

    __slots__ = ("_errors", "_left", "_on_answer", "_replies", "_timer")

    def __init__(self, count: int, on_answer: OnAnswer) -> None:
        self._on_answer: OnAnswer | None = on_answer
        self._left = count
        self._replies: list[messages.AcceptReply | None] = [None] * count
        self._errors: dict[int, ErrorHead] = {}
        self._timer = asyncio.get_running_loop().call_later(TOGETHER_S, self._end)

    def add(self, index: int, outcome: messages.AcceptReply | Exception) -> None:
        if self._on_answer is None:
            return  # this request took too long, and was sent again
        if isinstance(outcome, Exception):
            self._errors[index] = faults.to_head(outcome)
        else:
            self._replies[index] = outcome
        self.add_none()

    def add_none(self) -> None:
        """One request can't be begun now."""
        self._left -= 1
        if not self._left:
            self._timer.cancel()
            self._end()

    def _end(self) -> None:
        on_answer, self._on_answer = self._on_answer, None
        if on_answer is not None:
            on_answer(messages.AcceptsReply(self._replies, self._errors))


def try_accepts(
    of: Callable[[str], LocalReplica], gate: Gate, request: messages.Accepts, call: Call, on_answer: OnAnswer
) -> bool:
    """``cluster.ports.TryStart`` of ``meta.accepts``. ``of(disk)`` raises DiskUnusable. Each accept passes the ``gate``
    by itself. Raises InvalidRequest.
    """
    accepts, sizes, creates = request.accepts, request.sizes, request.creates
    count = len(accepts)
    if (
        not 0 < count <= ACCEPTS_MAX
        or not count == len(sizes) == len(creates)
        or min(sizes) < 0
        or sum(sizes) != len(call.body)
    ):
        raise InvalidRequest(f"Accepts are up to {ACCEPTS_MAX}, each with the size of its copy.")
    answers, body, at = _MessageAnswers(count, on_answer), call.body, 0
    for index, accept in enumerate(accepts):
        end = at + sizes[index]
        on_answer = partial(answers.add, index)
        try:
            if verdict := gate.judge(accept, call.peer):
                on_answer(messages.AcceptReply(verdict))
                begun = True
            else:
                begun = of(accept.disk).try_accept(accept, (body[at:end],), on_answer, create=creates[index])
        except StoragedError as error:
            on_answer(error)
        else:
            if not begun:
                answers.add_none()
        at = end
    return True
