"""One page of a garbage list while it is judged: its entries with their fragments, and the decisions about them.

Three kinds of data need different proofs (``disuse``). *Replaced* data goes after a settled read of its register.
*Parts* go when their upload has ended, and *all other data*: both after a round. Data is condemned before its round.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from storaged.fragments.ports import HEADERS_MAX, OF_UPLOAD, REPLACED, FragmentId, NearStore, Retirement
from storaged.ids import UPLOAD_ID_BYTES
from storaged.maintain.collection_pace import CollectionPace
from storaged.maintain.context import MaintainContext, concurrently
from storaged.maintain.deletion import delete_unneeded
from storaged.maintain.disuse import PAST, Judge, Proof, is_open
from storaged.maintain.sweep import owner_of
from storaged.maintain.walk import is_claimed
from storaged.meta.names import RegisterName

READS_CONCURRENT_MAX = 128
DELETIONS_A_CALL = 2000

Rest = tuple[bytes, bytes | None]
"""Packed name of a register, and the origin of the data. Many data ids share both. None: of every origin.
"""


class Garbage(NamedTuple):
    """An entry of a garbage list with the fragments of its data id on that disk."""

    entry: Retirement
    owner: RegisterName
    fragments: Sequence[FragmentId]

    @property
    def data_id(self) -> bytes:
        return self.entry.data_id

    @property
    def upload_id(self) -> bytes:
        """Empty when the data is of no part, as far as known."""
        return upload_id_of(self.entry)


def upload_id_of(entry: Retirement) -> bytes:
    """Empty when the data is of no part, as far as known."""
    origin = entry.origin
    return origin[1:] if origin[:1] == OF_UPLOAD and len(origin) == 1 + UPLOAD_ID_BYTES else b""


ByOwner = dict[RegisterName, list[Garbage]]


class GarbagePage:
    """``waiting``: of each data id that waits, and why. ``rounds``: registers for which a round was asked."""

    def __init__(
        self, context: MaintainContext, judge: Judge, disk: str, store: NearStore, pace: CollectionPace
    ) -> None:
        self._context = context
        self._judge = judge
        self._disk = disk
        self._store = store
        self._pace = pace
        self.waiting: list[tuple[Rest, str]] = []
        self.deleted = self.kept = self.rounds = 0

    async def collect(self, entries: Sequence[Retirement]) -> None:
        """Raises StoragedError when the disk itself does not answer."""
        replaced: ByOwner = {}
        uncertain: ByOwner = {}
        parts: dict[tuple[RegisterName, bytes], list[Garbage]] = {}
        for garbage in await self._found(entries):
            if garbage.upload_id:
                parts.setdefault((garbage.owner, garbage.upload_id), []).append(garbage)
            else:
                (replaced if garbage.entry.origin == REPLACED else uncertain).setdefault(garbage.owner, []).append(
                    garbage
                )
        gone: ByOwner = {}
        work = (
            self._look_at_upload(owner, upload_id, some, uncertain, gone) for (owner, upload_id), some in parts.items()
        )
        await concurrently(work, READS_CONCURRENT_MAX)
        still_named = _Replaced(self, self._store, uncertain)
        self.deleted += await delete_unneeded(self._judge.read, still_named, replaced)
        self.deleted += await delete_unneeded(_proved_gone, still_named, gone)
        if uncertain:
            self.rounds += len(uncertain)
            self.deleted += await delete_unneeded(self._judge.prove, _Unclaimed(self, self._store), uncertain)

    async def _found(self, entries: Sequence[Retirement]) -> list[Garbage]:
        """The entries with their fragments. Those without any are taken off the list."""
        found = []
        fragments = await self._store.fragments_of([entry.data_id for entry in entries]) if entries else []
        foreign = await self._foreign(dict(zip(entries, fragments, strict=True)))
        for entry, some in zip(entries, fragments, strict=True):
            try:
                owner = owner_of(entry.owner)
            except ValueError as error:
                self._note([entry], str(error))
                continue
            own = [fragment for fragment in some if fragment not in foreign]
            if own:
                found.append(Garbage(entry, owner, own))
            else:
                await self._store.unretire(entry.data_id)
        return found

    async def _foreign(self, found: Mapping[Retirement, Sequence[FragmentId]]) -> set[FragmentId]:
        """The fragments that belong to another register than the entry says, as their headers tell. One whose header
        can't be read goes with the others of its data id.
        """
        ids = [fragment for some in found.values() for fragment in some]
        owners: dict[FragmentId, bytes] = {}
        for start in range(0, len(ids), HEADERS_MAX):
            some = ids[start : start + HEADERS_MAX]
            headers = await self._store.headers(some)
            owners |= {one: header.owner for one, header in zip(some, headers, strict=True) if header is not None}
        foreign: set[FragmentId] = set()
        for entry, fragments in found.items():
            if any(owners.get(fragment, entry.owner) != entry.owner for fragment in fragments):
                foreign |= {fragment for fragment in fragments if owners.get(fragment) != entry.owner}
                self._context.log(
                    f"the garbage list of disk {self._disk} names data {entry.data_id.hex()} of another register: a "
                    "replica has forged a record"
                )
        return foreign

    async def delete(self, items: Iterable[Garbage], delete: Callable[[Sequence[FragmentId]], Awaitable[int]]) -> int:
        """Returns how many were deleted. What is left when collection is paused is judged again later."""
        deleted = 0
        for some in _calls(items):
            if self._pace.paused:
                break
            deleted += await delete(some)
        return deleted

    def _note(self, entries: Iterable[Retirement], reason: str) -> None:
        self.waiting.extend(((entry.owner, entry.origin), reason) for entry in entries)

    def wait(self, some: Iterable[Garbage], reason: str) -> None:
        self._note([garbage.entry for garbage in some], reason)

    async def _look_at_upload(
        self, owner: RegisterName, upload_id: bytes, some: Sequence[Garbage], ended: ByOwner, gone: ByOwner
    ) -> None:
        """Puts parts whose upload has ended under ``ended``, those of a bucket that was deleted under ``gone``."""
        try:
            state = await self._judge.upload_state(owner, upload_id)
        except PAST as error:
            reason = str(error)
        else:
            if not is_open(state):
                ended.setdefault(owner, []).extend(some)
                return
            reason = "its upload is open"
        if await self._judge.is_proved_gone(owner):  # it was open when its bucket was deleted
            gone.setdefault(owner, []).extend(some)
        else:
            self.wait(some, reason)

    async def without_claimed(self, garbage: Garbage, proof: Proof) -> Sequence[Garbage]:
        """The record refers to the data: only fragments that none of its runs places on this disk go. Its entry stays
        on the list until they are gone (``_Unclaimed.delete_unchanged``).
        """
        owner = garbage.owner
        try:
            countries = await self._judge.countries_of(owner.scope)
            unclaimed = [
                fragment
                for fragment in garbage.fragments
                if not is_claimed(self._context, owner, proof.entries, fragment, self._disk, countries)
            ]
        except PAST as error:
            self.wait([garbage], f"where its fragments belong is not known: {error}")
            return ()
        if not unclaimed:
            await self.keep(garbage)
            return ()
        return [garbage._replace(fragments=unclaimed)]

    async def keep(self, garbage: Garbage) -> None:
        self.kept += 1
        await self._store.unretire(garbage.data_id)


async def _proved_gone(owners: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
    return dict.fromkeys(owners, Proof(gone=True))


class _Replaced:
    """``deletion.Use`` of data that a committed change has replaced, and of data of buckets that were deleted. Nothing
    can bring it back, so it needs no mark. ``named`` gets what the record refers to all the same: a move put its old
    places on the list before.
    """

    def __init__(self, page: GarbagePage, store: NearStore, named: ByOwner) -> None:
        self.wait = page.wait
        self._page = page
        self._store = store
        self._named = named

    async def mark(self, items: Sequence[Garbage]) -> None:
        pass

    def unmark(self, items: Sequence[Garbage]) -> None:
        pass

    async def compare(self, owner: RegisterName, items: Sequence[Garbage], proof: Proof) -> Sequence[Garbage]:
        live = {entry.data_id for entry in proof.entries}
        if named := [garbage for garbage in items if garbage.data_id in live]:
            self._named.setdefault(owner, []).extend(named)
        return [garbage for garbage in items if garbage.data_id not in live]

    async def delete_unchanged(self, items: Sequence[Garbage]) -> int:
        return await self._page.delete(items, self._store.delete)


class _Unclaimed:
    """``deletion.Use`` of all other data. The mark is that it is condemned."""

    def __init__(self, page: GarbagePage, store: NearStore) -> None:
        self.wait = page.wait
        self._page = page
        self._store = store
        self._needed: list[tuple[Garbage, frozenset[FragmentId]]] = []
        """The record refers to these, and some of their fragments go: those that are named."""

    async def mark(self, items: Sequence[Garbage]) -> None:
        self._store.condemn([garbage.data_id for garbage in items])

    def unmark(self, items: Sequence[Garbage]) -> None:
        self._store.pardon([garbage.data_id for garbage in items])

    async def compare(self, owner: RegisterName, items: Sequence[Garbage], proof: Proof) -> Sequence[Garbage]:
        return [doomed for garbage in items for doomed in await self._conclude(garbage, proof)]

    async def _conclude(self, garbage: Garbage, proof: Proof) -> Sequence[Garbage]:
        part = bool(garbage.upload_id)
        if garbage.data_id in proof.of_uploads:
            await self._page.keep(garbage)
        elif any(entry.data_id == garbage.data_id for entry in proof.entries):
            unclaimed = await self._page.without_claimed(garbage, proof)
            self._needed += [
                (garbage, frozenset(doomed.fragments))
                for doomed in unclaimed
                if len(doomed.fragments) < len(garbage.fragments)
            ]
            return unclaimed
        elif proof.gone or part or (proof.everywhere and not proof.uploads):
            return [garbage]
        elif proof.everywhere:
            self.wait([garbage], "an upload of its key is open")
        else:
            self.wait([garbage], "a replica of its register is away or lags")
        return ()

    async def delete_unchanged(self, items: Sequence[Garbage]) -> int:
        deleted = await self._page.delete(items, self._store.delete_condemned)
        left = await self._store.fragments_of([garbage.data_id for garbage, _ in self._needed]) if self._needed else []
        for (garbage, doomed), fragments in zip(self._needed, left, strict=True):
            if doomed.isdisjoint(fragments):  # else a later round deletes the others
                await self._page.keep(garbage)
        return deleted


def _calls(items: Iterable[Garbage]) -> Iterable[list[FragmentId]]:
    """The fragments in calls of up to ``DELETIONS_A_CALL``. Those of one data id stay together where they fit: it is
    condemned until a call that deletes some of them. The next round deletes the others.
    """
    some: list[FragmentId] = []
    for garbage in items:
        for start in range(0, len(garbage.fragments), DELETIONS_A_CALL):
            more = garbage.fragments[start : start + DELETIONS_A_CALL]
            if len(some) + len(more) > DELETIONS_A_CALL:
                yield some
                some = []
            some.extend(more)
    if some:
        yield some
