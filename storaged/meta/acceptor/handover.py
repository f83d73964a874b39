"""What the mover of a partition asks of one disk: its fences, its ranges, and to take over the fences of others.

A replica that comes to a partition is blank, and answers at once: a majority of the replicas from before has to agree
as long as there are two sets. It needs their bucket fences before the new set counts alone: then nothing else keeps a
late PUT out of a deleted bucket (``cluster.partitions`` has the proof).
"""

from __future__ import annotations

from functools import partial

from storaged.errors import DiskUnusable, InvalidRequest
from storaged.meta.acceptor.disk_writes import DiskWrites
from storaged.meta.acceptor.fences import META_LIFTED, Fences
from storaged.meta.acceptor.pending_accept import PendingAccepts
from storaged.meta.consensus.bounds import check_fence
from storaged.meta.messages import (
    FENCES_A_CALL,
    FenceLift,
    FenceReply,
    FencesAsk,
    FenceSet,
    FencesReply,
    FencesTake,
    RangesAsk,
    RangesReply,
    ScopeFence,
)
from storaged.meta.names import RegisterName
from storaged.meta.store_ports import MetaStore, RowDamaged


class Handover:
    """Of one disk. Implements ``ports.Handover``."""

    def __init__(
        self, disk: str, store: MetaStore, fences: Fences, writes: DiskWrites, pending: PendingAccepts
    ) -> None:
        self._disk = disk
        self._store = store
        self._fences = fences
        self._writes = writes
        self._pending = pending

    async def fences(self, request: FencesAsk, *, timeout_s: float = 10.0) -> FencesReply:
        self._writes.check_answers()
        if len(request.after) not in (0, 16):
            raise InvalidRequest("Fences are listed after a scope of 16 bytes.")
        try:
            found = await self._store.read(partial(self._listed, request.after))
        except RowDamaged as error:
            raise DiskUnusable(f"Disk {self._disk} can't tell which buckets are fenced: {error}") from None
        return FencesReply(tuple(found[:FENCES_A_CALL]), len(found) > FENCES_A_CALL)

    def _listed(self, after: bytes) -> list[ScopeFence]:
        """One more than a reply has."""
        store, limit = self._store, FENCES_A_CALL + 1
        lifted = store.meta_names(META_LIFTED, after=META_LIFTED + after.hex() if after else "", limit=limit)
        scopes = {*store.fenced_scopes(after=after, limit=limit)}
        scopes.update(bytes.fromhex(name.removeprefix(META_LIFTED)) for name in lifted)
        return [self._of(scope) for scope in sorted(scopes)[:limit]]

    def _of(self, scope: bytes) -> ScopeFence:
        fence = self._store.get_fence(scope)
        lifted = self._store.get_meta(META_LIFTED + scope.hex()) or b""
        if fence is None:
            return ScopeFence(scope, b"", False, lifted)
        return ScopeFence(scope, fence.nonce, fence.final, lifted, fence.lends)

    async def take_fences(self, request: FencesTake, *, timeout_s: float = 10.0) -> FenceReply:
        """When it returns, this is durable, and so is everything accepted before. A newer value of a scope stays.

        Replicas of a partition are asked for all their fences, also of buckets that have no shard there: of these the
        disk may have a fence, and none of them. So what is doubted takes no fence away that lends, nor does it keep one
        from being set later: one replica alone could have a deleted bucket take writes.
        """
        self._writes.check_answers()
        if len(request.scopes) > FENCES_A_CALL:
            raise InvalidRequest(f"{len(request.scopes)} fences at once; the limit is {FENCES_A_CALL}.")
        for scope in request.scopes:
            present = await self._fences.when_in_memory(partial(self._fences.of, scope.scope))
            doubted = scope.scope in request.doubted
            if doubted and present is not None and present.lends:
                continue
            if scope.lifted and (present is not None or not doubted):
                await self._lift(FenceLift(self._disk, scope.scope, scope.lifted))
            if scope.nonce:
                await self._set(FenceSet(self._disk, scope.scope, scope.nonce, scope.final, lends=scope.lends))
        await self._pending.all_arrived()
        for scope in request.scopes:
            self._fences.arrived(scope.scope, scope.nonce)
        return FenceReply(True)

    async def _lift(self, request: FenceLift) -> None:
        check_fence(request)
        write = await self._fences.when_in_memory(partial(self._fences.lift, request))
        if write is not None and not isinstance(write, bool):
            await self._writes.durably(*write)

    async def _set(self, request: FenceSet) -> None:
        check_fence(request)
        write = await self._fences.when_in_memory(partial(self._fences.set, request))
        if write is not None:
            await self._writes.durably(*write)

    async def ranges(self, request: RangesAsk, *, timeout_s: float = 10.0) -> RangesReply:
        self._writes.check_answers()
        try:
            found = await self._store.read(partial(self._store.scopes, request.partition))
        except RowDamaged as error:
            raise DiskUnusable(f"Disk {self._disk} can't tell which shards it has: {error}") from None
        return RangesReply(tuple(RegisterName(*scope, b"").prefix for scope in found))
