"""The calls that expunge deleted keys: floors at all replicas of a range, and rows that go (``consensus.floors``).

``maintain.expunger`` puts them into their order. No quorum suffices for any of them: each asks all replicas.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from storaged.cluster.partitions import PartitionState
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.meta.consensus.floors import FLOORED_TABLES
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import EXPUNGED_A_CALL, Expunge, ExpungeReply, FloorReply, FloorSet, RangesAsk, RangesReply
from storaged.meta.names import PACKED_HEAD_BYTES, Ballot, RegisterName
from storaged.meta.ports import Floors, HandoverReplica, Replica
from storaged.meta.transport.calls import Answers, Calls

T = TypeVar("T", FloorReply, ExpungeReply)
A = TypeVar("A", RangesReply, ExpungeReply)

CALL_TIMEOUT_S = 10.0
"""A replica may have to wait for what is on its way to its disk, or reads a thousand rows from it."""


class PartitionFloors:
    """Each call raises ServiceUnavailable where a replica does not answer, or refuses."""

    def __init__(self, calls: Calls, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """``timeout_s`` of each call."""
        self._calls = calls
        self._timeout_s = timeout_s

    async def promise(self, state: PartitionState, prefix: bytes, floor: Ballot) -> list[FloorReply]:
        """Has all replicas refuse ballots below ``floor``, durably."""
        return await self._set(state, prefix, floor, active=False)

    async def activate(self, state: PartitionState, prefix: bytes, floor: Ballot) -> None:
        """Has all replicas report ``floor`` for missing rows, durably. They have promised it, and were compared
        since.
        """
        await self._set(state, prefix, floor, active=True)

    async def _set(self, state: PartitionState, prefix: bytes, floor: Ballot, *, active: bool) -> list[FloorReply]:
        async def ask(replica: Floors, disk: str) -> FloorReply:
            return await replica.set_floor(FloorSet(disk, prefix, floor, active), timeout_s=self._timeout_s)

        return list((await self._ask_all(state, ask)).values())

    async def expunge(
        self, state: PartitionState, prefix: bytes, floor: Ballot, after: bytes
    ) -> tuple[int, bytes | None]:
        """Deletes some rows at all replicas. Returns how many at most at one of them, and where to go on; None: that
        was the end.
        """

        async def ask(replica: Floors, disk: str) -> ExpungeReply:
            return await replica.expunge(
                Expunge(disk, prefix, floor, after, EXPUNGED_A_CALL), timeout_s=self._timeout_s
            )

        found = (await self._ask_all(state, ask)).values()
        ends = [reply.through for reply in found if not reply.done]
        if ends and min(ends) <= after:
            raise ServiceUnavailable(f"A disk of partition {state.partition} does not say how far it has come.")
        return max(reply.gone for reply in found), min(ends) if ends else None

    async def ranges(self, state: PartitionState) -> list[bytes]:
        """The prefixes of the ranges that may have a floor, as one replica has them. It may lie: those of other
        partitions do not count.
        """

        async def ask(replica: HandoverReplica, disk: str) -> RangesReply:
            return await replica.handover.ranges(RangesAsk(disk, state.partition), timeout_s=self._timeout_s)

        found = await self._ask_one(state, ask)
        return [prefix for prefix in found.prefixes if _is_range_of(state.partition, prefix)]

    async def count(
        self, state: PartitionState, prefix: bytes, floor: Ballot, after: bytes
    ) -> tuple[int, bytes | None]:
        """As ``expunge``, of what would go at one replica; deletes nothing."""

        async def ask(replica: HandoverReplica, disk: str) -> ExpungeReply:
            request = Expunge(disk, prefix, floor, after, EXPUNGED_A_CALL, count=True)
            reply = await replica.floors.expunge(request, timeout_s=self._timeout_s)
            if reply.verdict != Verdict.OK:
                raise ServiceUnavailable(f"Disk {disk} knows another step of partition {state.partition}.")
            if not reply.done and reply.through <= after:
                raise ServiceUnavailable(f"Disk {disk} does not say how far it has come.")
            return reply

        found = await self._ask_one(state, ask)
        return found.gone, None if found.done else found.through

    async def _ask_one(self, state: PartitionState, call: Callable[[HandoverReplica, str], Awaitable[A]]) -> A:
        """The replicas in turn, until one has answered."""
        last = ServiceUnavailable(f"Partition {state.partition} has no replica.")
        for disk in state.present:
            try:
                return await call(cast(HandoverReplica, self._calls.replicas.replica(disk)), disk)
            except StoragedError as error:
                last = ServiceUnavailable(f"No replica of partition {state.partition} answers: {error}")
        raise last

    async def _ask_all(self, state: PartitionState, call: Callable[[Floors, str], Awaitable[T]]) -> dict[str, T]:
        answers: Answers[T] = self._calls.answers()
        deadline = self._calls.clock.monotonic() + 2 * self._timeout_s
        for disk in state.present:
            answers.ask(disk, _at(disk, call))
        found: dict[str, T] = {}
        reason = "it does not answer"
        while (answer := await answers.next(self._calls.remaining_s(deadline))) is not None:
            disk, reply = answer
            if isinstance(reply, StoragedError):
                reason = reply.message
            elif reply.verdict == Verdict.OK:
                found[disk] = reply
            else:
                reason = next((its.name for its in Verdict if its == reply.verdict), f"verdict {reply.verdict}")
        away = [disk for disk in state.present if disk not in found]
        if away:
            raise ServiceUnavailable(
                f"Partition {state.partition}: deleted keys stay while disk {away[0]} does not take part ({reason})."
            )
        return found


def _is_range_of(partition: int, prefix: bytes) -> bool:
    if len(prefix) != PACKED_HEAD_BYTES or prefix[0] not in FLOORED_TABLES:
        return False
    return RegisterName(prefix[0], prefix[1:17], prefix[17], b"").partition == partition


def _at(disk: str, call: Callable[[Floors, str], Awaitable[T]]) -> Callable[[Replica], Awaitable[T]]:
    async def ask(replica: Replica) -> T:
        return await call(cast(HandoverReplica, replica).floors, disk)

    return ask
