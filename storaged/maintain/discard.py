"""A gateway removes fragments that are in the way of repair.

A disk does not let a storage node replace a sound fragment by another one (``fragments.ports``). So a hostile node may
put fragments of its own where repair has to write: a place where a fragment is missing, or one to which a block will be
recoded. Repair then asks a gateway. The gateway deletes the fragment when the survivors of the block agree on other
hashes, or, under another profile than the record's, when computing it from survivors gives other hashes. It deletes
nothing that the survivors confirm, and nothing of data that the record does not have: that belongs to a request that is
under way, or to garbage collection. Where the record names the fragment, so many others have to agree that the block
can't be read from the rest (``moves.are_alone``).

A move that names the fragment may be under way. So the register is settled first, which ends all earlier promises, and
the fragment is deleted only if it was not touched since it was looked at. No record can name it by then: a move is made
only with fragments that the survivors confirm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from storaged.cluster.layout import Profile
from storaged.errors import NoSuchBucket, StoragedError
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.maintain.context import MaintainContext
from storaged.maintain.deletion import delete_unneeded
from storaged.maintain.disuse import Proof
from storaged.maintain.health import BlockPlace, blocks_of
from storaged.maintain.mover import PARTS_A_FRAGMENT, Mover, headers_of
from storaged.maintain.moves import (
    CHANGED,
    LATER,
    MOVED,
    MOVES_A_CALL,
    REFUSED,
    Agreed,
    DiscardAsk,
    FragmentAsk,
    Judged,
    MovesAnswer,
    agreed,
    are_alone,
)
from storaged.maintain.rebuild import CannotRepair
from storaged.maintain.walk import entries_of
from storaged.meta.names import RegisterName, Table

FRAGMENTS_EACH = 100
"""What judging one fragment counts, of an asker's allowance: mostly it takes the reading of a block."""


class Discarder:
    """Shares the allowance of askers, and what it knows of buckets, with the gateway's ``mover``."""

    def __init__(self, context: MaintainContext, mover: Mover) -> None:
        self._context = context
        self._mover = mover
        self.deleted = 0

    async def answer(self, asker: str, ask: DiscardAsk) -> MovesAnswer:
        """``asker``: the node, as its certificate names it."""
        allowance, now = self._mover.allowance, self._context.clock.monotonic
        if not 1 <= len(ask.fragments) <= MOVES_A_CALL:
            allowance.note(asker, refused=True, now=now())
            return MovesAnswer((Judged(REFUSED, f"{len(ask.fragments)} fragments in one call").answer,))
        if problem := allowance.problem(asker, now()):
            return MovesAnswer((Judged(LATER, problem).answer,) * len(ask.fragments))
        allowance.busy.add(asker)
        try:
            await asyncio.sleep(allowance.spend(asker, FRAGMENTS_EACH * len(ask.fragments), now()))
            parts: list[int] = []
            found = [await self._judge(one, parts) for one in ask.fragments]
            allowance.spend(asker, len(parts) // PARTS_A_FRAGMENT, now())
        finally:
            allowance.busy.discard(asker)
        allowance.note(asker, refused=any(judged.code == REFUSED for judged in found), now=now())
        return MovesAnswer(tuple(judged.answer for judged in found))

    async def _judge(self, ask: FragmentAsk, parts: list[int]) -> Judged:
        """``parts`` gets how many entries of parts were read."""
        try:
            name, fragment = RegisterName.unpack(ask.name), FragmentId.unpack(ask.fragment)
        except ValueError as error:
            return Judged(REFUSED, str(error))
        if name.table not in (Table.OBJECT, Table.PART):
            return Judged(REFUSED, "not the register of an object or a part")
        try:
            return await self._discard(name, fragment, ask.disk, parts)
        except NoSuchBucket as error:
            return Judged(CHANGED, error.message)
        except (CannotRepair, StoragedError, KeyError, ValueError, TimeoutError) as error:
            return Judged(LATER, f"it can't be judged now: {error}")

    async def _discard(self, name: RegisterName, fragment: FragmentId, disk: str, parts: list[int]) -> Judged:
        use = _FalseFragment(self._context, self._mover, fragment, disk, parts)
        self.deleted += await delete_unneeded(use.prove, use, {name: (fragment,)})
        return use.judged


class _FalseFragment:
    """``deletion.Use`` of one fragment. The mark is its time; ``judged``: what became of it."""

    def __init__(
        self, context: MaintainContext, mover: Mover, fragment: FragmentId, disk: str, parts: list[int]
    ) -> None:
        self._context = context
        self._mover = mover
        self._disk = disk
        self._store = context.stores.store(disk)
        self._fragment = fragment
        self._parts = parts
        self._created_ms = 0
        self._header: FragmentHeader | None = None
        self.judged = Judged(MOVED)

    async def mark(self, items: Sequence[FragmentId]) -> None:
        async with asyncio.timeout(self._context.limits.call_timeout_s):
            (stat,), (self._header,) = await self._store.stat(items), await self._store.headers(items)
        self._created_ms = stat.created_ms

    def unmark(self, items: Sequence[FragmentId]) -> None:
        pass

    def wait(self, items: Sequence[FragmentId], reason: str) -> None:
        """Used only where there is nothing to delete."""
        self.judged = Judged(MOVED, reason)

    async def prove(self, names: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
        """Settles by a round that this gateway makes itself. Raises as ``Registers.settle``."""
        (name,) = names
        if self._header is None:
            return {name: "it is not there, or damaged"}
        value = await self._context.registers.settle(name)
        await self._mover.find_buckets({name.scope})
        entries = []
        async for entry in entries_of(self._context, name, value, on_unreadable=lambda _error: None):
            self._parts.append(1)
            if entry.data_id == self._fragment.data_id:
                entries.append(entry)
        return {name: Proof(entries, value=value)}

    async def compare(self, owner: RegisterName, items: Sequence[FragmentId], proof: Proof) -> Sequence[FragmentId]:
        self.judged = await self._compared(owner, proof)
        return items if self.judged.code == MOVED else ()

    async def _compared(self, name: RegisterName, proof: Proof) -> Judged:
        """MOVED: it may go."""
        fragment, disk = self._fragment, self._disk
        assert self._header is not None
        if not proof.entries:
            return Judged(CHANGED, "the record does not have this data")
        entry = proof.entries[-1]
        if entry.small or entry.inline:
            return Judged(REFUSED, "what lies beside its record is not in the way of repair")
        countries = self._mover.buckets.countries_of(name.scope)
        places = blocks_of(entry, name.partition, self._context.layouts, countries)
        old = next((where for where in places if where.block == fragment.block), None)
        if old is None:
            return Judged(CHANGED, "the record does not have this block")
        others = await self._mover.headers([old])
        others.pop((disk, fragment), None)  # it has no vote on itself
        survivors = agreed(self._context.layouts.current, old, headers_of(old, others))
        if survivors is None or (name.table == Table.OBJECT and survivors.owner != name.pack()):
            return Judged(LATER, "too few other fragments of its block agree")
        if await self._is_right(old, fragment, self._header, survivors):
            return Judged(REFUSED, "it is what the survivors of its block say")
        in_place = fragment == old.fragment(fragment.position) and old.disks[fragment.position] == disk
        if in_place and not are_alone(old, survivors.positions):
            return Judged(LATER, "the block may as well be what this fragment is of")
        return Judged(MOVED)

    async def delete_unchanged(self, items: Sequence[FragmentId]) -> int:
        async with asyncio.timeout(self._context.limits.call_timeout_s):
            deleted = await self._store.delete(items, created_ms=[self._created_ms])
        self._context.log(
            f"fragment {self._fragment.position} of block {self._fragment.block} on disk {self._disk} was not its"
            " block's own"
        )
        return deleted

    async def _is_right(self, old: BlockPlace, fragment: FragmentId, header: FragmentHeader, survivors: Agreed) -> bool:
        profile = Profile(fragment.k, fragment.m)
        if fragment.position >= profile.n:
            return False
        hashes: Sequence[bytes] = survivors.hashes
        if profile != old.profile:
            _, hashes = await self._mover.rebuilder.as_coded(old, survivors.positions, survivors.hashes, profile)
        new = old._replace(run=msgspec.structs.replace(old.run, k=profile.k, m=profile.m))
        return (
            header.hashes == tuple(hashes)
            and header.owner == survivors.owner
            and header.part_header == old.entry.header
            and header.length == new.shape.fragment_length(profile, fragment.position)
        )
