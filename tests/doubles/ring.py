"""The ring in one dict: ``Registers``, ``Pages``, ``Scanner`` and ``Fences`` without replicas."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from storaged.cluster.ports import Layouts
from storaged.errors import DiskUnusable, NoSuchBucket, OutcomeUnknown, PageLost, PeerUnreachable, ServiceUnavailable
from storaged.fragments.ports import FragmentHeader
from storaged.hashes import page_hash
from storaged.meta.listing.merge import every_row
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.ports import (
    Grounds,
    HeadPage,
    ListPage,
    OnOutcome,
    Outcome,
    PageQuery,
    Reading,
    ReplicaState,
    Row,
    SmallCopies,
    Unasked,
    Update,
)
from storaged.meta.storage.row_head import head_of
from storaged.meta.storage.scan import common_prefix, list_after_prefix
from storaged.wire import decode
from tests.doubles.disks import Disks


class MemoryRing:
    """``values`` are the registers. Small copies lie on the ``disks`` that the layout names.

    ``interfere`` is called once, between prepare and accept: when it changes the register, the change is pre-empted.
    """

    def __init__(self, layouts: Layouts, disks: Disks) -> None:
        self.layouts = layouts
        self.disks = disks
        self.values: dict[RegisterName, Value] = {}
        self.pages: dict[bytes, bytes] = {}
        self.fences: dict[bytes, tuple[bytes, bool]] = {}
        """Scope -> (nonce, whether it is final)."""
        self.lending: dict[bytes, bytes] = {}
        """Scope -> nonce of those fences that lend."""
        self.replica_away = False
        """``unfence`` does not reach all replicas."""
        self.busy = False
        """``try_change`` takes nothing on."""
        self.again = True
        """What pages of heads say of themselves."""
        self.new_keys = True
        """Coded objects are created without a promise."""
        self.created = 0
        """How many were."""
        self.regardless: list[bool] = []
        """One entry for each change."""
        self.interfere: Callable[[RegisterName], Awaitable[None]] | None = None
        self.rounds: dict[RegisterName, int] = {}
        """Identity rounds: a proposal that began before one is refused."""

    # --- Registers ----------------------------------------------------------------------------------------------------

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        await asyncio.sleep(0)
        value = self.values.get(name)
        payload = self._copy(name, value.payload) if want_payload and value is not None and value.payload else None
        return Reading(value, payload)

    def try_read(self, name: RegisterName, want_payload: bool, on_done: Callable[[Reading | None], None]) -> None:
        task = asyncio.get_running_loop().create_task(self.read(name, want_payload=want_payload))
        task.add_done_callback(lambda done: on_done(done.result()))

    def grounds(self, name: RegisterName) -> Grounds | None:
        return Grounds(Ballot(1, 1, "g", b""), 0) if self.new_keys else None

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
        if regardless and name.table != Table.OBJECT:
            raise ValueError("only an object's register is changed regardless of its value")
        self.regardless.append(regardless)
        if unasked is not None:
            await asyncio.sleep(0)
            if name not in self.values and name not in self.rounds and name.scope not in self.fences:
                self.created += 1
                change = unasked.change
                after = self.values[name] = Value(1, os.urandom(16), change.visibility, change.body, change.payload)
                return Outcome(None, after)
        if ready is not None:
            await asyncio.sleep(0)  # the prepare's answers: what ``ready`` waits for has begun meanwhile
        while True:
            before, rounds = self.values.get(name), self.rounds.get(name, 0)
            change = update(before)
            if regardless and ready is None:  # with a barrier it runs once
                assert change == update(None), "it has to make the same change of every value"
            if change is None:
                return Outcome(before, before)
            if small is not None:
                await self._keep_copies(name, small)
            if ready is not None:
                waiting, ready = ready, None
                await waiting
            interfere, self.interfere = self.interfere, None
            if interfere is not None:
                await interfere(name)
            await asyncio.sleep(0)
            self._check_fence(name.scope, settling_nonce, settles=False)
            if self.values.get(name) == before and self.rounds.get(name, 0) == rounds:
                sequence = (before.sequence if before else 0) + 1
                after = self.values[name] = Value(
                    sequence, os.urandom(16), change.visibility, change.body, change.payload
                )
                return Outcome(before, after)

    def try_change(
        self,
        name: RegisterName,
        update: Update,
        on_outcome: OnOutcome,
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        if self.busy:
            return False
        task = asyncio.get_running_loop().create_task(self.change(name, update, small=small, regardless=regardless))
        task.add_done_callback(lambda done: on_outcome(done.exception() or done.result()))  # type: ignore[arg-type]
        return True

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        await asyncio.sleep(0)
        self._check_fence(name.scope, settling_nonce, settles=True)
        self.rounds[name] = self.rounds.get(name, 0) + 1
        return self.values.get(name)

    def _check_fence(self, scope: bytes, nonce: bytes, *, settles: bool) -> None:
        held, lends = self.fences.get(scope), scope in self.lending
        if held is None or (held[0] == nonce and (settles or lends)):
            return
        if held[0] == nonce:
            raise OutcomeUnknown("its replicas have promised, and refuse the accept")
        raise NoSuchBucket("", **({"final": "true"} if held[1] else {"lends": "true"} if lends else {}))

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        return [
            ReplicaState(disk, "away" if self.disks.disks[disk].down else "current", True)
            for disk in self._replicas(name)
        ]

    async def accepted_everywhere(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool | None:
        if any(self.disks.disks[disk].down for disk in self._replicas(name)):
            return None
        value = self.values.get(name)
        return value is not None and usable(value)

    async def outdated(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool:
        return await self.held_by_quorum(name, usable) is None

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        value = self.values.get(name)
        return value if value is not None and usable(value) else None

    def _replicas(self, name: RegisterName) -> Sequence[str]:
        return self.layouts.current.replicas_of(name.partition)

    async def _keep_copies(self, name: RegisterName, small: SmallCopies) -> None:
        synced = set()
        for disk, (header, payload) in zip(self._replicas(name), small.fragments, strict=True):
            try:
                await self.disks.disks[disk].write(decode(header, FragmentHeader), payload, sync=True)
            except (PeerUnreachable, DiskUnusable):
                continue
            synced.add(disk)
        if not small.enough(frozenset(synced)):
            raise OutcomeUnknown(f"only {sorted(synced)} have their copy")

    def _copy(self, name: RegisterName, data_id: bytes) -> memoryview | None:
        for disk in self._replicas(name):
            store = self.disks.disks[disk]
            if self.disks.disk_readable(disk) and not store.down:
                for fragment in store.fragments:
                    if fragment.data_id == data_id:
                        return memoryview(store.payload(fragment))
        return None

    # --- Pages --------------------------------------------------------------------------------------------------------

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        name = name or page_hash(body)
        self.pages[name] = body
        return name

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        if name not in self.pages:
            raise PageLost
        return self.pages[name]

    # --- Fences -------------------------------------------------------------------------------------------------------

    async def fence(
        self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        held = self.fences.get(scope)
        if held is not None and (nonce != held[0] if held[1] else nonce < held[0] and not final):
            raise ServiceUnavailable("a final fence, or one with a higher nonce, stays")
        self.fences[scope] = (nonce, final or (held is not None and held[1]))
        lent = self.lending.get(scope) == nonce
        self.lending.pop(scope, None)
        if (lends or lent) and not self.fences[scope][1]:
            self.lending[scope] = nonce
        return not self.replica_away

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        held = self.fences.get(scope)
        if held is not None:
            if held[1] or nonce < held[0]:
                raise ServiceUnavailable("a final fence, or one with a higher nonce, stays")
            del self.fences[scope]
            self.lending.pop(scope, None)
        return not self.replica_away

    # --- Scanner ------------------------------------------------------------------------------------------------------

    async def list_page(self, wanted: PageQuery) -> ListPage:
        table, scope, shards, prefix, after, delimiter, limit, hidden, *_ = wanted
        least = Visibility.HIDDEN if hidden else Visibility.LIVE
        found: dict[bytes, Value | None] = {}
        for name, value in self.values.items():
            if (name.table, name.scope) != (table, scope) or name.shard not in shards or value.visibility < least:
                continue
            if name.key > after and name.key.startswith(prefix):
                group = common_prefix(name.key, prefix, delimiter)
                if not group:
                    found[name.key] = value
                elif list_after_prefix(group) > after:
                    found[group] = None
        names = sorted(found)[:limit]
        rows = [Row(name, value) for name in names if (value := found[name]) is not None]
        prefixes = [name for name in names if found[name] is None]
        if not limit or len(found) <= limit:
            return ListPage(tuple(rows), tuple(prefixes), None)
        last = names[-1]
        return ListPage(tuple(rows), tuple(prefixes), list_after_prefix(last) if found[last] is None else last)

    async def list_heads(self, wanted: PageQuery) -> HeadPage:
        page = await self.list_page(wanted)
        heads = [head_of(row.value.body) for row in page.rows]
        return HeadPage([row.key for row in page.rows], heads, page.prefixes, page.next_after, again=self.again)

    async def rows_anywhere(self, wanted: PageQuery, *, everyone: bool = True) -> AsyncIterator[Row]:
        async for row in every_row(self, wanted):
            yield row

    def forget(self, scope: bytes) -> None:
        """Nothing is cached."""
