"""As ``lending``, with renames (``objects.write.departures``): keys without versioning get the versions of others while
all of them are overwritten, deleted, copied and renamed, and gateways die or fall asleep between any two steps.

Departing, its look between promise and accept, its finish and its end are the program's own. The play checks, besides
what ``lending`` does:

* Each key has a linearizable history. A rename is a PUT of the new key and, if that was or may have been accepted, a
  DELETE of exactly this version of the old one. So nothing else goes, and nothing goes for a rename that failed.
* In the end no departure and no arrival is left, and no version is under two names, however often it was renamed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from storaged.errors import OutcomeUnknown
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName
from storaged.objects.code.history import Draft, newest_in
from storaged.objects.code.lending import borrowed_by
from storaged.objects.code.versions import decode_record
from storaged.objects.records import Version, sharing_of
from storaged.objects.sharing import Borrowed, Borrower, Departure
from storaged.objects.write import versioned
from storaged.objects.write.commit import AfterPromise
from storaged.objects.write.departures import (
    Changed,
    Departing,
    Seen,
    arrive,
    check_departing,
    depart,
    end_old,
    finish,
    make_way,
    try_end_departure,
)
from storaged.objects.write.loans import NotLent, Wanted, with_loan
from tests.sim.cluster import Gateway
from tests.sim.collecting import KEYS, entry_of
from tests.sim.lending import BUCKET, Lending, few
from tests.sim.linear import Kind
from tests.sim.scenario import play_out
from tests.sim.versions import OPERATIONS, VersionsOperation
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

OLD_MS = -(1 << 50)
"""Looks spare no departure because it is young."""


class Renaming(Lending):
    with_versions = b""

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self._renamed: dict[bytes, bytes] = {}
        """By the id of a rename: the context id of its version."""

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self._luck.uniform(0, 0.5))
            key = self._luck.choice(KEYS)
            name, other = self.name(key), self._luck.choice([one for one in KEYS if one != key])
            self.found.operations += 1
            kind = self._luck.random()
            if kind < 0.16:
                await self._note(self._put(gateway, name, null=True))
            elif kind < 0.28:
                await self._note(self._put_small(gateway, name))
            elif kind < 0.34:
                await self._note(self._remove(gateway, name))
            elif kind < 0.42:
                await self._note(self._list(gateway, name))
            elif kind < 0.48:
                await self._note(self._move(gateway, name))
            elif kind < 0.56:
                await self._note(self._copy(gateway, name, other))
            else:
                await self._note(self._rename(gateway, self.name(other), name))

    async def _note(self, work: Any) -> None:
        try:
            await super()._note(work)
        except (Changed, Departing):
            self.found.refused += 1

    async def nap_after_round(self) -> None:
        """Who ends a departure is slow to remove it: so others meet it while it is marked."""
        await self._nap(0.5)

    # --- renames

    async def _rename(self, gateway: Gateway, old: RegisterName, new: RegisterName) -> None:
        """As ``rename``: one attempt."""
        plane, _ = self._tools(gateway)
        record = decode_record((await gateway.client.read(old)).value)
        if not record.versions:
            return
        entry = newest_in(record)
        seen = Seen(entry, borrowed_by(record, entry.ordinal))
        departure = Departure(self._luck.randbytes(16), new.key, 1)
        context_id = entry.version.context_id
        self._renamed[departure.id] = context_id
        removal = VersionsOperation(Kind.DELETE, old.key.decode(), self.moment(), b"?" + context_id)
        await self.sleep(0.05)
        try:
            await depart(plane, BUCKET, old, seen, departure)
            await self._arrive(gateway, old, new, departure.id, seen)
        except (Changed, Departing, NotLent) as error:
            await try_end_departure(plane, BUCKET, old, departure.id)
            if isinstance(error, Departing):
                await make_way(plane, BUCKET, error)
            raise
        except OutcomeUnknown:
            self.history.append(removal)
            self._spawn(try_end_departure(plane, BUCKET, old, departure.id))
            raise
        except BaseException:
            self._spawn(try_end_departure(plane, BUCKET, old, departure.id))
            raise
        self.history.append(removal)
        await self.nap()
        if self._luck.random() < 0.2 and not self._healed:
            return  # the gateway dies
        await finish(plane, BUCKET, old, departure)
        removal.returned = self.moment()
        self.found.done["renames"] += 1

    async def _arrive(
        self, gateway: Gateway, old: RegisterName, new: RegisterName, rename_id: bytes, seen: Seen
    ) -> None:
        plane, _ = self._tools(gateway)
        operation = self._adding(new, rename_id, null=True)

        def arrives(borrowed: Borrowed | None) -> versioned.Edit:
            return self._arrives(new, version, borrowed, old.key, rename_id)

        small = [part for part in seen.entry.version.parts if part.small]

        async def before_accept() -> None:
            await self.nap()
            await check_departing(plane, old, rename_id)
            await self.sleep(0.15)

        if small:
            copies = self._small_copies(new, self._luck, rename_id)
            version = self._version(entry_of(rename_id, {}, small=True), null=True)
            async with self._noted(operation):
                await self._add(gateway, new, version, before_accept, copies, arrives(None))
            return
        if seen.borrowed is None:
            owner, having = old, seen.entry.version
        else:
            lent = await self._lent(gateway, old, seen.borrowed)
            if lent is None:
                raise Changed
            owner, having = self.name(seen.borrowed.key), lent
        data_ids, _, pages = await self._names(gateway, owner, having, None)
        borrowed = Borrowed(owner.key, rename_id)
        version, held = await self._borrowing(rename_id, pages)

        async def commit(check_lent: AfterPromise) -> None:
            async def looks() -> None:
                await check_lent()
                await held.put_all(gateway, new)
                await before_accept()

            async with self._noted(operation):
                await self._add(gateway, new, version, looks, edit=arrives(borrowed))

        wanted = Wanted(owner, data_ids, None, Borrower(rename_id, new.key, 1), pages)
        await with_loan(plane, BUCKET, wanted, commit)

    def _arrives(
        self, name: RegisterName, version: Version, borrowed: Borrowed | None, old: bytes, rename_id: bytes
    ) -> versioned.Edit:
        """As ``rename._Arriving``."""
        adds = self._adds(name, version, borrowed)

        def edit(draft: Draft, ordinal: int) -> bool:
            if draft.departure is not None:
                raise Departing(name, draft.departure)
            arrive(draft, old, rename_id)
            return adds(draft, ordinal)

        return edit

    async def _look_at(self, plane: Any, name: RegisterName) -> None:
        await end_old(plane, BUCKET, name, fresh_ms=OLD_MS)

    # --- the end

    async def _end_all(self, reader: Gateway) -> None:
        await super()._end_all(reader)
        versions: list[bytes] = []
        for key in KEYS:
            record = decode_record((await reader.client.read(self.name(key))).value)
            if sharing_of(record).departure is not None:
                self.complain(f"the departure of {key!r} stays")
            if sharing_of(record).arrivals:
                self.complain(f"an arrival at {key!r} stays")
            if record.versions:
                versions.append(self._first_of(record.versions[0].context_id))
        if len(set(versions)) < len(versions):
            self.complain("a version is under two names")

    def _first_of(self, context_id: bytes) -> bytes:
        """What a version was before all its renames."""
        while context_id in self._renamed:
            context_id = self._renamed[context_id]
        return context_id


def run_renaming(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    with few(seed):
        return play_out(lambda loop: Renaming(seed, loop, rules))  # type: ignore[arg-type,return-value]
