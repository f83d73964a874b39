"""Fences of buckets: set and lifted on a quorum of the replicas of every shard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from storaged.errors import ServiceUnavailable
from storaged.meta.consensus.quorums import View, met_by_all
from storaged.meta.messages import FenceLift, FenceReply, FenceSet
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import Replica
from storaged.meta.transport.calls import Calls


class RingFences:
    """Implements ``ports.Fences``."""

    def __init__(self, calls: Calls, view: Callable[[RegisterName], View]) -> None:
        self._calls = calls
        self._view = view

    async def fence(self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False) -> None:
        """See ``ports.Fences``."""

        def fence(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[FenceReply]]:
            return lambda replica: replica.fence(FenceSet(disk, scope, nonce, final), timeout_s=timeout_s)

        await self._fence_all(scope, shards, fence)

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        """See ``ports.Fences``."""

        def unfence(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[FenceReply]]:
            return lambda replica: replica.unfence(FenceLift(disk, scope, nonce), timeout_s=timeout_s)

        return await self._fence_all(scope, shards, unfence, linger=True)

    async def _fence_all(
        self,
        scope: bytes,
        shards: Sequence[int],
        call: Callable[[str, float], Callable[[Replica], Awaitable[FenceReply]]],
        *,
        linger: bool = False,
    ) -> bool:
        """A fence holds for a disk, for all rows of the scope: each disk is asked once, and every shard needs its
        quorum. With ``linger`` the others are waited for too (those known to be away answer at once); the result says
        whether all disks did it.
        """
        quorums = [self._view(RegisterName(Table.OBJECT, scope, shard, b"")).quorum for shard in shards]
        done = await self._calls.gather(quorums, call, lambda reply: reply.done, self._calls.deadline(), linger=linger)
        if not met_by_all(quorums, done):
            raise ServiceUnavailable(
                "The bucket's fence could not be changed on a majority of every shard's replicas. Retry."
            )
        return len(done) == len({disk for quorum in quorums for disk in quorum.disks})
