"""The registers as maintenance sees them: also those of lenders, buckets that were deleted while copies in other
buckets use their data (``system.lenders``).

A lender's fence refuses every change that comes without its nonce, and so all requests of clients. What may change a
lender uses these registers in place of the bare ones: the end of a loan, new places of blocks, and rounds that settle.
They ask for the nonce only when a majority has refused because of such a fence. A caller that has just read the
record of the lender gives it (``of``), and saves the refusal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from storaged.errors import NoSuchBucket
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import (
    Grounds,
    OnOutcome,
    Outcome,
    Reading,
    Registers,
    ReplicaState,
    SmallCopies,
    Unasked,
    Update,
)
from storaged.objects.records import LENDING, BucketRecord

T = TypeVar("T")


class LenderRegisters:
    """Implements ``meta.ports.Registers``. ``registers``: the bare ones. ``find``: a lender by its id; None: the bucket
    is none. ``known``: a lender whose nonce is tried first."""

    def __init__(
        self,
        registers: Callable[[], Registers],
        find: Callable[[bytes], Awaitable[BucketRecord | None]],
        known: BucketRecord | None = None,
    ) -> None:
        self._registers = registers
        self._find = find
        self._known = known

    def of(self, bucket: BucketRecord) -> LenderRegisters:
        """The same, for changes of this bucket, which may be a lender."""
        return LenderRegisters(self._registers, self._find, bucket if bucket.state == LENDING else None)

    async def _unless_lent(self, name: RegisterName, nonce: bytes, call: Callable[[bytes], Awaitable[T]]) -> T:
        """``await call(nonce)``; where the fence of a lender refuses it, once more with the nonce of that."""
        known = self._known
        first = known.nonce if not nonce and known is not None and known.id == name.scope else nonce
        try:
            return await call(first)
        except NoSuchBucket as error:
            if nonce or not error.details.get("lends"):
                raise
            lender = await self._find(name.scope)
            if lender is None or lender.nonce == first:
                raise
            return await call(lender.nonce)

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        registers = self._registers()
        return await self._unless_lent(
            name,
            settling_nonce,
            lambda nonce: registers.read(name, want_payload=want_payload, settling_nonce=nonce),
        )

    def try_read(self, name: RegisterName, want_payload: bool, on_done: Callable[[Reading | None], None]) -> None:
        self._registers().try_read(name, want_payload, on_done)

    def grounds(self, name: RegisterName) -> Grounds | None:
        return self._registers().grounds(name)

    async def change(
        self,
        name: RegisterName,
        update: Update,
        *,
        small: SmallCopies | None = None,
        ready: Awaitable[None] | None = None,
        settling_nonce: bytes = b"",
        regardless: bool = False,
        unasked: Unasked | None = None,
    ) -> Outcome:
        """As ``Registers.change``. ``ready`` has to be a future: one that is not done yet when the change is refused
        still waits for its promise, and is awaited once more. With another awaitable nothing is tried again.
        """
        registers, tried = self._registers(), False

        async def change(nonce: bytes) -> Outcome:
            nonlocal tried
            if tried and ready is not None and (not isinstance(ready, asyncio.Future) or ready.done()):
                raise NoSuchBucket
            tried = True
            return await registers.change(
                name,
                update,
                small=small,
                ready=ready,
                settling_nonce=nonce,
                regardless=regardless,
                unasked=unasked,
            )

        return await self._unless_lent(name, settling_nonce, change)

    def try_change(
        self,
        name: RegisterName,
        update: Update,
        on_outcome: OnOutcome,
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        return self._registers().try_change(name, update, on_outcome, small=small, regardless=regardless)

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        registers = self._registers()
        return await self._unless_lent(name, settling_nonce, lambda nonce: registers.settle(name, settling_nonce=nonce))

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        return await self._registers().agreement(name)

    async def accepted_everywhere(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool | None:
        return await self._registers().accepted_everywhere(name, usable)

    async def outdated(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool:
        return await self._registers().outdated(name, usable)

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        return await self._registers().held_by_quorum(name, usable)
