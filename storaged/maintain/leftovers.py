"""Deleting the fragments that recoded blocks left behind, some time after, when nobody reads them any more. What a
restart forgets, the sweep of orphans finds.

A block that was recoded for the living disks may since have been recoded back to where it was, on the very disks, under
the very ids. So before the deletion
the register is settled, which ends all earlier promises, and what it names is spared; and only what was not touched or
written since then is deleted
(see ``swap``, which touches after its promise)."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from storaged.errors import PeerError, StoragedError
from storaged.fragments.ports import FragmentId, Health
from storaged.maintain.context import MaintainContext
from storaged.maintain.health import claims
from storaged.maintain.rebuild import Move
from storaged.maintain.walk import Walker, entries_of
from storaged.meta.names import RegisterName
from storaged.objects.records import PartEntry

DROPS_A_ROUND = 100


class _Left(NamedTuple):
    due: float
    owner: RegisterName
    move: Move


class Leavings:
    """A queue in the order of time, at most ``left_max`` long."""

    def __init__(self, context: MaintainContext, walker: Walker) -> None:
        self._context = context
        self._walker = walker
        self._left: deque[_Left] = deque()
        self.deleted = 0

    def __len__(self) -> int:
        return len(self._left)

    def add(self, owner: RegisterName, move: Move) -> None:
        if len(self._left) < self._context.limits.left_max:
            self._left.append(_Left(self._context.clock.monotonic() + self._context.limits.drop_delay_s, owner, move))

    async def drop_due(self) -> None:
        for _ in range(DROPS_A_ROUND):
            if not self._left or self._left[0].due > self._context.clock.monotonic():
                return
            left = self._left.popleft()
            try:
                await self._drop(left.owner, left.move)
            except (StoragedError, KeyError, ValueError, TimeoutError) as error:
                self._context.log(
                    f"what a recoded run of {left.owner.key[:80]!r} left behind is not deleted now, but by the sweep:"
                    f" {error}"
                )

    async def _drop(self, owner: RegisterName, move: Move) -> None:
        old = move.old
        by_disk: dict[str, list[FragmentId]] = {}
        for block in range(move.new.first, move.new.first + move.new.count):
            for position, disk in enumerate(move.old_disks):
                by_disk.setdefault(disk, []).append(FragmentId(move.entry.data_id, block, old.k, old.m, position))
        seen: dict[str, dict[FragmentId, int]] = {}
        for disk, ids in by_disk.items():
            seen[disk] = await self._there(disk, ids)
        value = await self._context.registers.settle(owner)
        entries = [
            entry async for entry in entries_of(self._context, owner, value) if entry.data_id == move.entry.data_id
        ]
        for disk, there in seen.items():
            unclaimed = {
                fragment: created
                for fragment, created in there.items()
                if not self._claimed(owner, entries, fragment, disk)
            }
            if unclaimed:
                async with asyncio.timeout(self._context.limits.call_timeout_s):
                    store = self._context.stores.store(disk)
                    self.deleted += await store.delete(list(unclaimed), created_ms=list(unclaimed.values()))

    async def _there(self, disk: str, ids: list[FragmentId]) -> dict[FragmentId, int]:
        """With the age of each. Nothing when the disk is away: the sweep looks there when it is back."""
        try:
            async with asyncio.timeout(self._context.limits.call_timeout_s):
                stats = await self._context.stores.store(disk).stat(ids)
        except (PeerError, TimeoutError):
            return {}
        return {FragmentId.unpack(stat.id): stat.created_ms for stat in stats if stat.health != Health.MISSING}

    def _claimed(self, owner: RegisterName, entries: list[PartEntry], fragment: FragmentId, disk: str) -> bool:
        countries = self._walker.buckets.countries_of(owner.scope)
        return any(
            claims(entry, fragment, disk, owner.partition, self._context.layouts.at, countries) for entry in entries
        )
