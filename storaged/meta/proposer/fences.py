"""Fences of buckets: set and lifted on a quorum of the replicas of every shard."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from storaged.errors import ServiceUnavailable
from storaged.meta.consensus.quorums import View, met_by_all
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import FenceLift, FenceReply, FenceSet
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import Replica
from storaged.meta.proposer.ring import Refresher
from storaged.meta.transport.calls import Calls

LIFT_PATIENCE_S = 0.3
"""How long the lifting of a fence waits for the last replicas after a majority. Who loads the record of a bucket that
owes this waits so long, and a load has to do it again: a node that hangs would stop each of them for a time-out.
"""

FenceCall = Callable[[dict[int, int], str, float], Callable[[Replica], Awaitable[FenceReply]]]
"""``call(epochs, disk, timeout_s)``: the call of a replica; ``epochs`` as in ``messages.FenceSet``."""


class RingFences:
    """Implements ``ports.Fences``."""

    def __init__(self, calls: Calls, view: Callable[[RegisterName], View], refresher: Refresher) -> None:
        self._calls = calls
        self._view = view
        self._refresher = refresher

    async def fence(
        self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        """See ``ports.Fences``."""

        def fence(epochs: dict[int, int], disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[FenceReply]]:
            request = FenceSet(disk, scope, nonce, final, epochs, lends)
            return lambda replica: replica.fence(request, timeout_s=timeout_s)

        return await self._fence_all(scope, shards, fence, linger=not final, lends=lends)

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        """See ``ports.Fences``."""

        def unfence(epochs: dict[int, int], disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[FenceReply]]:
            return lambda replica: replica.unfence(FenceLift(disk, scope, nonce, epochs), timeout_s=timeout_s)

        return await self._fence_all(scope, shards, unfence, linger=True, patience_s=LIFT_PATIENCE_S)

    async def _fence_all(
        self,
        scope: bytes,
        shards: Sequence[int],
        call: FenceCall,
        *,
        linger: bool = False,
        patience_s: float = math.inf,
        lends: bool = False,
    ) -> bool:
        """A fence holds for a disk, for all rows of the scope: each disk is asked once, and every shard needs its
        quorum. With ``linger`` the others are waited for too, for so long (those known to be away answer at once); the
        result says whether all disks did it. ``lends``: only replies that say that the fence lends count.

        All of it is for the states that this process knows. Where a disk knows a later one it begins again, unless a
        majority is enough.
        """
        names = [RegisterName(Table.OBJECT, scope, shard, b"") for shard in shards]
        deadline = self._calls.deadline()
        while True:
            views = [self._view(name) for name in names]
            quorums = [view.quorum for view in views]
            epochs: dict[str, dict[int, int]] = defaultdict(dict)
            for name, view in zip(names, views, strict=True):
                for disk in view.quorum.disks:
                    epochs[disk][name.partition] = view.epoch
            verdicts: set[int] = set()
            done = await self._calls.gather(
                quorums,
                partial(_call_at, call, epochs),
                partial(_is_done, verdicts, lends),
                deadline,
                linger=linger,
                patience_s=patience_s,
            )
            met, everywhere = met_by_all(quorums, done), len(done) == len(epochs)
            enough = met and (everywhere or not linger)
            if not enough and Verdict.EPOCH in verdicts and await self._refresh(names, views, deadline):
                continue
            if met:
                return everywhere
            raise ServiceUnavailable(
                "The bucket's fence could not be changed on a majority of every shard's replicas. Retry."
            )

    async def _refresh(self, names: Sequence[RegisterName], views: Sequence[View], deadline: float) -> bool:
        """Whether one of the views is another one now."""
        newer = [
            await self._refresher.refresh(name, view, self._calls.remaining_s(deadline))
            for name, view in zip(names, views, strict=True)
        ]
        return any(newer)


def _call_at(
    call: FenceCall, epochs: Mapping[str, dict[int, int]], disk: str, timeout_s: float
) -> Callable[[Replica], Awaitable[FenceReply]]:
    return call(epochs[disk], disk, timeout_s)


def _is_done(verdicts: set[int], lends: bool, reply: FenceReply) -> bool:
    verdicts.add(reply.verdict)
    return reply.done and (reply.lends or not lends)
