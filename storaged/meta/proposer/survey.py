"""What each replica of a register holds: snapshots, nothing is settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from storaged.errors import StoragedError
from storaged.meta.consensus.looks import Held, Look, accepted_everywhere, outdated
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import Read, ReadReply
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Value
from storaged.meta.ports import ReplicaState
from storaged.meta.transport.calls import Answers, Calls

AGREEMENT_S = 2.0
"""A replica that has not said by then what it holds counts as away."""

_ReadAnswer = tuple[ReadReply, memoryview]


@dataclass
class _Replies:
    """What the replicas of one register answered, by disk."""

    replies: dict[str, ReadReply] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)

    def state_of(self, disk: str, newest: Ballot) -> str:
        """See ``ports.ReplicaState``."""
        reply = self.replies.get(disk)
        if reply is None:
            return "damaged" if disk in self.damaged else "away"
        if reply.accepted == ZERO_BALLOT:
            return "empty"
        return "current" if reply.accepted == newest else "behind"


class RingSurvey:
    def __init__(self, calls: Calls, view: Callable[[RegisterName], View]) -> None:
        self._calls = calls
        self._view = view

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        """See ``ports.Registers``."""
        view = self._view(name)
        deadline = self._deadline()
        found = await self._ask(view, name, deadline)
        newest = max((reply.accepted for reply in found.replies.values()), default=ZERO_BALLOT)
        value = next((reply.value for reply in found.replies.values() if reply.accepted == newest), None)
        copies: dict[str, ReadReply] = {}
        if value is not None and value.payload:
            copies = (await self._ask(view, name, deadline, value.payload)).replies
        return [
            ReplicaState(disk, found.state_of(disk, newest), disk in copies and bool(copies[disk].payload))
            for disk in view.quorum.disks
        ]

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        """See ``ports.Registers``."""
        view = self._view(name)
        replies = (await self._ask(view, name, self._deadline())).replies
        values = {disk: reply.value for disk, reply in replies.items()}
        return view.quorum.agreed({disk: value for disk, value in values.items() if value and usable(value)})

    async def accepted_everywhere(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool | None:
        """See ``ports.Registers``."""
        return accepted_everywhere(await self.look(name), usable)

    async def outdated(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool:
        """See ``ports.Registers``."""
        return outdated(await self.look(name), usable)

    async def look(self, name: RegisterName) -> Look:
        """What each replica that answers has accepted."""
        view = self._view(name)
        found = await self._ask(view, name, self._deadline())
        replies = found.replies.items()
        held = {disk: Held(reply.accepted, reply.value) for disk, reply in replies}
        fenced = frozenset(disk for disk, reply in replies if reply.fenced)
        final = frozenset(disk for disk, reply in replies if reply.fenced and reply.final)
        lends = frozenset(disk for disk, reply in replies if reply.fenced and reply.lends and not reply.final)
        return Look(view.quorum, held, fenced, final, lends)

    def _deadline(self) -> float:
        return self._calls.clock.monotonic() + min(self._calls.deadline_s, AGREEMENT_S)

    async def _ask(self, view: View, name: RegisterName, deadline: float, data_id: bytes = b"") -> _Replies:
        """Asks every replica for its value, or for the copy of the small object with this data id."""
        found = _Replies()
        answers: Answers[_ReadAnswer] = self._calls.answers()
        for disk in view.quorum.disks:
            request = Read(disk, name, view.epoch, full=not data_id, data_id=data_id)
            answers.ask_read(request, timeout_s=self._calls.timeout_s(deadline))
        while (answer := await answers.next(self._calls.remaining_s(deadline))) is not None:
            disk, reply = answer
            if isinstance(reply, StoragedError):
                continue
            if reply[0].verdict == Verdict.OK:
                found.replies[disk] = reply[0]
            elif reply[0].verdict == Verdict.DAMAGED:
                found.damaged.add(disk)
        return found
