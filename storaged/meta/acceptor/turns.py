"""Turns at registers for which several gateway processes compete: the queue at one replica. A hint: safety never
depends on it.

Theory of operation
    A gateway process that has met another proposer asks one replica of the register for a turn, the first that it
    believes to be up (``meta.proposer.contention``). Processes wait in the order of their requests. The one that has
    the turn makes the changes that waited in it, at most for ``hold_ms``, and ends its turn. Then the next gets it.

    A request that waits is answered after ``POLL_S`` at the latest: QUEUED means that its place is kept, and that the
    process should ask again. So a process notices a replica that hangs, however long the queue is. A process that does
    not ask again loses its place.

    A turn that its process neither ends nor renews (by asking for it again) is over after ``LEASE_S``: the process
    died, hangs, or is hostile. It is over after ``RENEWED_MAX_S`` in any case. When a turn took long, the other
    processes of its node wait until all others had theirs. A node whose turns ran out ``RUN_OUT_MAX`` times within
    ``RUN_OUT_S`` gets none for a while, and competes without. A turn that is ended late does not count: its process was
    slow.

    Everything is in memory and bounded. When it is lost, processes ask again. Nothing of it is asked when an acceptor
    judges a ballot, so a wrong turn costs time and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from storaged.errors import InvalidRequest
from storaged.meta.consensus.bounds import check_register
from storaged.meta.messages import TURN_GRANTED, TURN_QUEUED, TURN_REFUSED, Turn, TurnReply
from storaged.meta.names import RegisterName

POLL_S = 0.2
LOST_S = 1.0
"""A process that waits and has not asked for this long has lost its place."""

LEASE_S = 0.6
RENEWED_MAX_S = 1.5
HOLD_S = 0.25
"""How long a process makes changes in one turn. The last one may take longer; the lease allows for it."""

HOLD_LEAST_S = 0.02
CYCLE_S = 2.0
"""Where many processes wait each makes fewer changes in its turn, so that all had theirs after this time."""

REGISTERS_MAX = 1024
WAITING_MAX = 128
"""Processes that wait for one register."""

WAITING_A_NODE_MAX = 16
RUN_OUT_MAX = 6
RUN_OUT_S = 30.0
REFUSED_S = 30.0
RUN_OUTS_MAX = 256
"""Nodes whose turns that ran out are remembered."""

PROCESS_BYTES: Final = 8

OnTurn = Callable[[TurnReply], None]
_Process = tuple[str, bytes]
"""Node and process."""

_REFUSED = TurnReply(TURN_REFUSED)


class _Waiting(Struct):
    """A process in the queue. ``on_answer``: of the request that waits now, None between two."""

    number: int
    on_answer: OnTurn | None
    timer: asyncio.TimerHandle | None
    asked_at: float

    def answer(self, state: int, hold_ms: int = 0, shared: bool = False) -> None:
        if self.timer is not None:
            self.timer.cancel()
        on_answer, self.on_answer, self.timer = self.on_answer, None, None
        if on_answer is not None:
            waited_ms = int((asyncio.get_running_loop().time() - self.asked_at) * 1000)
            on_answer(TurnReply(state, hold_ms, shared, waited_ms))


class _Queue:
    """Of one register. ``holder`` has the turn ``number`` since ``began_at``."""

    __slots__ = ("began_at", "holder", "number", "shared", "timer", "waiting")

    def __init__(self) -> None:
        self.holder: _Process | None = None
        self.number = 0
        self.began_at = 0.0
        self.shared = False
        """Others waited when it was granted."""
        self.timer: asyncio.TimerHandle | None = None
        self.waiting: dict[_Process, _Waiting] = {}


class TurnKeeper:
    """Of one disk's registers. One event loop only."""

    def __init__(self) -> None:
        self._queues: dict[RegisterName, _Queue] = {}
        self._run_out: dict[str, dict[tuple[bytes, RegisterName, int], float]] = {}
        """When turns of a node ran out that were not ended since: by process, register and number."""
        self._refused_until: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._queues)

    async def turn(self, request: Turn, *, timeout_s: float = 10.0) -> TurnReply:
        """``ports.TurnReplica``, for this process."""
        answered: asyncio.Future[TurnReply] = asyncio.get_running_loop().create_future()
        self.ask("", request, lambda reply: None if answered.done() else answered.set_result(reply))
        return await answered

    def ask(self, node: str, request: Turn, on_answer: OnTurn) -> None:
        """``on_answer`` gets the reply, at the latest after ``POLL_S``. Raises InvalidRequest."""
        check_register(request.name)
        if len(request.process) != PROCESS_BYTES or not 0 < request.number < 1 << 62:
            raise InvalidRequest("Not a request for a turn.")
        process = node, request.process
        if request.end and node in self._run_out:
            self._run_out[node].pop((request.process, request.name, request.number), None)
        queue = self._queues.get(request.name)
        if queue is not None:
            self._end_earlier(request, queue, process)
            queue = self._queues.get(request.name)
        if request.end:
            on_answer(TurnReply(TURN_GRANTED))
        elif queue is not None and queue.holder == process:
            on_answer(self._renew(request, queue))
        elif self._may_wait(node, queue):
            if queue is None:
                queue = self._queues[request.name] = _Queue()
            self._wait(request, queue, process, on_answer)
        else:
            on_answer(_REFUSED)

    def _end_earlier(self, request: Turn, queue: _Queue, process: _Process) -> None:
        """Ends what the process had before this request: it has one turn, or waits for one."""
        last = request.number + request.end  # the end of a turn names it
        waiting = queue.waiting.get(process)
        if waiting is not None and waiting.number < last:
            del queue.waiting[process]
            waiting.answer(TURN_REFUSED)
        if queue.holder == process and queue.number < last:
            self._pass_on(request.name, queue)

    def _renew(self, request: Turn, queue: _Queue) -> TurnReply:
        if request.number != queue.number:
            return _REFUSED  # it came late
        loop = asyncio.get_running_loop()
        left_s = queue.began_at + RENEWED_MAX_S - loop.time()
        if queue.timer is not None:
            queue.timer.cancel()
        queue.timer = loop.call_later(max(0.0, min(LEASE_S, left_s)), self._on_run_out, request.name, queue)
        return TurnReply(TURN_GRANTED, self._hold_ms(queue), queue.shared)

    def _may_wait(self, node: str, queue: _Queue | None) -> bool:
        until = self._refused_until.get(node)
        if until is not None:
            if until > asyncio.get_running_loop().time():
                return False
            del self._refused_until[node]
        if queue is None:
            return len(self._queues) < REGISTERS_MAX
        of_node = sum(1 for other, _ in queue.waiting if other == node)
        return len(queue.waiting) < WAITING_MAX and of_node < WAITING_A_NODE_MAX

    def _wait(self, request: Turn, queue: _Queue, process: _Process, on_answer: OnTurn) -> None:
        loop = asyncio.get_running_loop()
        waiting = queue.waiting.get(process)
        if waiting is None:
            waiting = queue.waiting[process] = _Waiting(request.number, None, None, 0.0)
        waiting.answer(TURN_QUEUED)  # its earlier request, sent twice
        waiting.number, waiting.on_answer, waiting.asked_at = request.number, on_answer, loop.time()
        if queue.holder is None:
            self._pass_on(request.name, queue)
        else:
            waiting.timer = loop.call_later(POLL_S, waiting.answer, TURN_QUEUED)

    def _pass_on(self, name: RegisterName, queue: _Queue) -> None:
        """The turn is free: the next process gets it."""
        if queue.timer is not None:
            queue.timer.cancel()
        loop = asyncio.get_running_loop()
        now = loop.time()
        before, queue.holder, queue.timer = queue.holder, None, None
        if before is not None and now - queue.began_at > LEASE_S / 2:
            for process in [process for process in queue.waiting if process[0] == before[0]]:
                queue.waiting[process] = queue.waiting.pop(process)
        while queue.waiting:
            process = next(iter(queue.waiting))
            waiting = queue.waiting.pop(process)
            if waiting.on_answer is None and now - waiting.asked_at > POLL_S + LOST_S:
                continue
            queue.holder, queue.number, queue.began_at = process, waiting.number, now
            queue.shared = bool(queue.waiting) or before not in (None, process)
            queue.timer = loop.call_later(LEASE_S, self._on_run_out, name, queue)
            waiting.answer(TURN_GRANTED, self._hold_ms(queue), queue.shared)
            return
        del self._queues[name]

    def _hold_ms(self, queue: _Queue) -> int:
        hold_s = max(HOLD_LEAST_S, min(HOLD_S, CYCLE_S / (len(queue.waiting) + 1)))
        left_s = queue.began_at + hold_s - asyncio.get_running_loop().time()
        return max(0, int(left_s * 1000))

    def _on_run_out(self, name: RegisterName, queue: _Queue) -> None:
        assert queue.holder is not None
        (node, process_id), now = queue.holder, asyncio.get_running_loop().time()
        found = {turn: at for turn, at in self._run_out.pop(node, {}).items() if at > now - RUN_OUT_S}
        found[process_id, name, queue.number] = now
        self._run_out[node] = found
        while len(self._run_out) > RUN_OUTS_MAX:
            del self._run_out[next(iter(self._run_out))]
        if len(found) >= RUN_OUT_MAX:
            del self._run_out[node]
            self._refused_until[node] = now + REFUSED_S
            for process in [process for process in queue.waiting if process[0] == node]:
                queue.waiting.pop(process).answer(TURN_REFUSED)
        queue.timer = None
        self._pass_on(name, queue)
