"""Garbage collection of pages, of manifests and of older versions, that no record needs any more. It asks no clock.

Theory of operation. A page is immutable and its hash is its name. Each disk sweeps its own pages. With a page it keeps
the page's *owner*: the register of the object whose record names it, or will (gateways tell it). A page is *condemned*
when the disk's own row of the owner does not name it, or when the directory does not name its bucket, of which rows may
have stayed: the disk remembers the page's time, which every put changes. After the time that readers get, the owner's
register is judged (``maintain.disuse``): a look, a round by a gateway, and another look. The page is deleted when the
value of that round does not name it, no upload of the key is open, and no put has changed it since it was condemned;
the deletion compares that in its own transaction. Or when the bucket was deleted for good.

A record needs the pages that it names, and those that its pages name. While one of them can't be read it is not known
which others the record needs: then none of that owner is condemned.

Three kinds of requests propose records with new pages, never by a create. All put these pages, or put them again, on a
majority, after their promise and before their accept:

* A Complete. While its upload is open nothing is deleted. It looks at the upload after its promise and goes no further
  when that has ended.
* A move. It changes a record that exists.
* A change of a key's versions (``objects.write.versioned``). A copy that borrows the data of an object in many parts
  puts the sealed list of these parts (``objects.write.lent_copy``).

So the pages of a record that is chosen later were put on a majority after the record's promise. At each of these
disks: the put came after the condemnation, so the page stays, or is written anew. Or it came before: then the promise
too came before the condemnation, and so before the round, which ends it, or brings the record into the round's value.

A page without an owner was not put here by a gateway of this version: a storage node copied it, which is not believed
in what it says of owners, or a gateway of version 0.1.0 put it. It gets an owner when a row of the disk names it. The
others are deleted when they are old and no row names them before and after the time of readers. A majority that a
proposal relies on does not count them, unless the gateway is of 0.1.0: such a gateway proposes only what it put less
than half that age ago, and the disks that put and accept have in common keep the page, since their rows name it.

For pages with an owner the age only spares work: younger pages are not looked at.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial

from storaged.errors import DataDamaged, StoragedError
from storaged.maintain.asks import NAMES_A_SETTLE
from storaged.maintain.collection_pace import CollectionPace
from storaged.maintain.context import MaintainContext
from storaged.maintain.deletion import delete_unneeded
from storaged.maintain.disuse import Judge, Proof
from storaged.maintain.holds import Holds
from storaged.maintain.walk import row_slices
from storaged.meta.names import RegisterName, Table, Value, Visibility, object_of_upload
from storaged.meta.ports import Pages
from storaged.meta.storage.rowvalue import unpack_row
from storaged.meta.store_ports import MetaStore, RowDamaged, StoreBatch, StoredPage
from storaged.objects.write.references import pages_in

PAGES_A_SLICE = 1000
PAGES_A_LOOK = 10_000
"""Pages without an owner that are looked up in all rows of a disk together, and deleted after that."""
CONDEMNED_MAX = 100_000
"""Pages of one disk that a sweep condemns at most; the next one goes on."""

_Page = tuple[bytes, int]
"""(hash, created ms when it was condemned)."""
_Pages = dict[bytes, int]
"""Hash -> created ms."""
_Condemned = dict[RegisterName | None, _Pages]
"""By owner; None: without one."""


class PageSweep:
    """Sweeps this node's disks. ``run`` is its task."""

    def __init__(
        self, context: MaintainContext, holds: Holds | None = None, pace: CollectionPace | None = None
    ) -> None:
        self._context = context
        self._pace = pace if pace is not None else CollectionPace(context)
        self._holds = holds if holds is not None else Holds(context.clock, context.limits.read_hold_s)
        self._judge = Judge(context)
        self.deleted = 0

    async def run(self) -> None:
        """For ever, a few times a day."""
        while True:
            await asyncio.sleep(self._context.limits.orphan_interval_s)
            await self.once()

    async def once(self) -> int:
        """Sweeps all disks. Waits ``drop_delay_s`` for readers when there is anything to delete. Returns how many pages
        were deleted.
        """
        before = self.deleted
        condemned: dict[str, _Condemned] = {}
        for disk, store in self._context.local_meta.items():
            try:
                found = await self._condemn(store)
            except (StoragedError, RowDamaged) as error:
                self._give_up(disk, f"{type(error).__name__}: {error}")
                continue
            if found:
                condemned[disk] = found
        if condemned:
            await asyncio.sleep(self._context.limits.drop_delay_s)
            try:
                await self._judge.buckets.refresh(self._context)
            except StoragedError as error:
                self._give_up(", ".join(condemned), f"{type(error).__name__}: {error}")
                return 0
        for disk, pages in condemned.items():
            try:
                await self._delete(disk, self._context.local_meta[disk], pages)
            except (StoragedError, RowDamaged, TimeoutError) as error:
                self._give_up(disk, f"{type(error).__name__}: {error}")
        return self.deleted - before

    def _give_up(self, disk: str, reason: str) -> None:
        self._context.log(f"pages of manifests stay on disk {disk} until the next sweep: {reason}")

    # --- condemning ---------------------------------------------------------------------------------------------------

    async def _condemn(self, store: MetaStore) -> _Condemned:
        """Old pages whose owner's row, on this disk, does not name them. Raises RowDamaged, DiskUnusable."""
        oldest = self._context.clock.wall_ms() - self._context.limits.orphan_age_ms
        condemned: _Condemned = {}
        after, count = b"", 0
        while count < CONDEMNED_MAX:
            await self._pace.spend(0)
            pages = await store.read(partial(store.pages, after=after, limit=PAGES_A_SLICE))
            if not pages:
                break
            after = pages[-1][0]
            old = {page: created_ms for page, created_ms in pages if created_ms < oldest}
            for owner, its in (await self._by_owner(store, old)).items():
                named = frozenset() if owner is None else await self._named(store, owner)
                if named is None:
                    continue
                if unnamed := {page: created_ms for page, created_ms in its.items() if page not in named}:
                    condemned.setdefault(owner, {}).update(unnamed)
                    count += len(unnamed)
            await asyncio.sleep(0)
        await self._find_owners(store, condemned.get(None, {}))
        return {owner: its for owner, its in condemned.items() if its}

    async def _by_owner(self, store: MetaStore, pages: _Pages) -> _Condemned:
        found: _Condemned = {}
        hashes = list(pages)
        for page, packed in zip(hashes, await store.read(partial(store.page_owners, hashes)), strict=True):
            found.setdefault(RegisterName.unpack(packed) if packed else None, {})[page] = pages[page]
        return found

    async def _named(self, store: MetaStore, owner: RegisterName) -> frozenset[bytes] | None:
        """None: a page that the record needs can't be read now, so the other pages that it needs are not known."""
        slot = await store.read(partial(store.get, owner))
        if slot is None or slot.value.visibility == Visibility.TOMBSTONE or await self._may_be_gone(owner.scope):
            return frozenset()
        return await self._named_by(store, owner, slot.value)

    async def _may_be_gone(self, scope: bytes) -> bool:
        """Whether the directory does not name the bucket. Then a row may be one from before, which nothing settles any
        more. Fences prove that the bucket is gone, as for data (``_OldPages``).
        """
        try:
            return await self._judge.is_gone(scope)
        except StoragedError:
            return False

    async def _named_by(self, store: MetaStore, name: RegisterName, value: Value) -> frozenset[bytes] | None:
        """As ``_named``."""
        try:
            return await self._pages_of_value(store, name, value)
        except DataDamaged as error:
            self._context.log(f"pages of {name.key[:80]!r} are not looked at: {error}")
            return None

    async def _find_owners(self, store: MetaStore, pages: _Pages) -> None:
        """Gives those of the pages an owner that a row of the disk names, rows of former layouts included, and takes
        them out of ``pages``. Takes all of them out when some row can't be read.
        """
        if not pages:
            return
        unreadable = False
        for table, scope, shard in await store.read(store.scopes):
            if table not in (Table.OBJECT, Table.UPLOAD):
                continue
            async for rows in row_slices(self._context.clock, store, table, scope, shard):
                for key, row in rows:
                    name = RegisterName(table, scope, shard, key)
                    owner = object_of_upload(name) if table == Table.UPLOAD else name
                    named = await self._named_by(store, name, unpack_row(name, row).value)
                    unreadable = unreadable or named is None
                    for page in named or ():
                        if page in pages:
                            await _set_owner(store, page, pages.pop(page), owner)
        if unreadable:
            pages.clear()

    async def _pages_of_value(self, store: MetaStore, name: RegisterName, value: Value) -> frozenset[bytes]:
        """All pages that a value needs; those that the disk lacks are read from others. Raises DataDamaged."""
        try:
            return await _pages_of(_OfDisk(store), value, name)
        except DataDamaged:
            return await _pages_of(self._context.pages, value, name)

    # --- deleting -----------------------------------------------------------------------------------------------------

    async def _delete(self, disk: str, store: MetaStore, condemned: _Condemned) -> None:
        """Raises RowDamaged, StoragedError."""
        await self._delete_ownerless(store, list(condemned.pop(None, {}).items()))
        waiting: Counter[str] = Counter()
        owners = [owner for owner in condemned if owner is not None]
        for start in range(0, len(owners), NAMES_A_SETTLE):
            some = owners[start : start + NAMES_A_SETTLE]
            await self._pace.spend(sum(len(condemned[owner]) for owner in some))
            found = {owner: list(pages.items()) for owner in some if (pages := self._not_held(condemned[owner]))}
            self.deleted += await delete_unneeded(
                self._judge.prove, _OldPages(self._context.pages, store, self._pace, waiting), found
            )
        if waiting:
            reason, _ = waiting.most_common(1)[0]
            self._give_up(disk, f"{waiting.total()} wait: {reason}")

    async def _delete_ownerless(self, store: MetaStore, pages: Sequence[_Page]) -> None:
        """They are looked up in all rows of the disk after the wait for the pace, or for the end of a pause. Raises
        RowDamaged, StoragedError.
        """
        for start in range(0, len(pages), PAGES_A_LOOK):
            some = pages[start : start + PAGES_A_LOOK]
            await self._pace.spend(len(some))
            unneeded = self._not_held(dict(some))
            await self._find_owners(store, unneeded)
            self.deleted += await _delete_pages(store, self._pace, list(unneeded.items()))

    def _not_held(self, pages: _Pages) -> _Pages:
        """Those that no download needs."""
        return {page: created_ms for page, created_ms in pages.items() if not self._holds.keeps(page)}


class _OldPages:
    """``deletion.Use`` of pages with an owner. The mark is the time of each, from when it was condemned."""

    def __init__(self, pages: Pages, store: MetaStore, pace: CollectionPace, waiting: Counter[str]) -> None:
        self._pages = pages
        self._store = store
        self._pace = pace
        self._waiting = waiting

    async def mark(self, items: Sequence[_Page]) -> None:
        pass

    def unmark(self, items: Sequence[_Page]) -> None:
        pass

    def wait(self, items: Sequence[_Page], reason: str) -> None:
        self._waiting[reason] += len(items)

    async def compare(self, owner: RegisterName, items: Sequence[_Page], proof: Proof) -> Sequence[_Page]:
        if proof.gone:
            return items
        if proof.uploads:
            self.wait(items, "an upload of the key is open")
            return ()
        try:
            named = await _pages_of(self._pages, proof.value, owner)
        except DataDamaged as error:
            self.wait(items, error.message)
            return ()
        return [page for page in items if page[0] not in named]

    async def delete_unchanged(self, items: Sequence[_Page]) -> int:
        return await _delete_pages(self._store, self._pace, items)


async def _delete_pages(store: MetaStore, pace: CollectionPace, pages: Sequence[_Page]) -> int:
    """What is left when collection is paused is condemned again by the next sweep."""
    deleted = 0
    for start in range(0, len(pages), PAGES_A_SLICE):
        if pace.paused:
            break
        deleted += await store.health.unless_hung(store.delete_pages(pages[start : start + PAGES_A_SLICE]))
    return deleted


async def _set_owner(store: MetaStore, page: bytes, created_ms: int, owner: RegisterName) -> None:
    try:
        body = await store.read(partial(store.get_page, page))
    except RowDamaged:
        return
    if body is not None:
        await store.commit(StoreBatch(pages=[StoredPage(page, body, created_ms, owner.pack())]))


async def _pages_of(pages: Pages, value: Value | None, name: RegisterName) -> frozenset[bytes]:
    """All pages that a record needs. Raises DataDamaged, also where it does not list them."""
    return frozenset([page async for page in pages_in(pages, name, value, complete=True)])


class _OfDisk:
    """The pages of one disk, as ``meta.ports.Pages``."""

    def __init__(self, store: MetaStore) -> None:
        self._store = store

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        raise NotImplementedError

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        try:
            body = await self._store.read(partial(self._store.get_page, name))
        except RowDamaged:
            body = None
        if body is None:
            raise DataDamaged("This disk lacks a page.")
        return body
