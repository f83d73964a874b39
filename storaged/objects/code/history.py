"""The versions of a key: the newest in its record, older ones on pages. Pure.

Theory of operation. Every version has an *ordinal*: the sequence of the register when it was added, which grows with
every change. So ordinals order the versions of a key, newest first, and no clock does. A record has the newest
versions. When it has more than ``VERSIONS_MAX``, or too many bytes, the oldest of them go to a *leaf*: an immutable
page, named by its hash, on the replicas of the register. The record refers to leaves (level 0). When it refers to more
than ``REFS_MAX`` pages of a level, the oldest ``BRANCH_REFS`` of them go to a *branch*, a page of references, to which
it refers at the next level. All versions of a level are older than those of the level below:

    record    versions | level 0: leaf, leaf, ... | level 1: branch, branch, ... | level 2: ...
               newest                                                                    oldest

So to add a version needs no page but those that it makes: most often none, and at most one a level. To find, change or
remove a version by its ordinal reads one page a level, and writes those pages anew. A page never changes, so a reader
of the record can read all of it (``code.version_walk``).

New pages are durable on a majority between the promise and the accept of the record that names them
(``objects.write.versioned``). ``objects.write.references`` enumerates what a record refers to: nothing else may.

The null version is the only one that may have small copies (``Value.payload``): versions with ids are kept in the
record or coded. So a key has at most one version with copies, and what is true of the copies of a record without
versioning is true here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple, TypeVar

from storaged.errors import DataDamaged
from storaged.hashes import page_hash
from storaged.meta.names import RegisterName
from storaged.meta.ports import Pages
from storaged.objects.code.lock import check_removal
from storaged.objects.code.version_names import NULL_NAME, VersionName, version_name
from storaged.objects.code.version_pages import read_page, weight, without_lost
from storaged.objects.pending_events import PendingEvent
from storaged.objects.records import (
    NULL_VERSION,
    History,
    Kept,
    ObjectRecord,
    PageRef,
    PartEntry,
    Sharing,
    SharingRecord,
    Version,
    VersionsPage,
    sharing_of,
)
from storaged.objects.sharing import Borrowed
from storaged.units import KIB
from storaged.wire import encode

T = TypeVar("T")

LEVELS_MAX = 8
"""More is damage: with the bounds below, eight levels hold more versions than a register has sequences."""


class Bounds(NamedTuple):
    """Of a record. A PUT writes the versions in it anew, so they are few."""

    versions_max: int = 16
    versions_bytes_max: int = 16 * KIB
    leaf_versions: int = 12
    refs_max: int = 40
    branch_refs: int = 32


BOUNDS = Bounds()


class Entry(NamedTuple):
    """A version, and what the record keeps beside it."""

    kept: Kept
    version: Version

    @property
    def ordinal(self) -> int:
        return self.kept.ordinal

    @property
    def is_null(self) -> bool:
        return self.version.version_id == NULL_VERSION

    @property
    def name(self) -> str:
        """The version id that clients see."""
        return version_name(self.kept, self.version)


_UNVERSIONED = Kept(0)
"""Of the null version of a record without history."""


def entries_in(record: ObjectRecord) -> list[Entry]:
    """The versions in the record itself, newest first."""
    kept = record.history.kept if record.history is not None else (_UNVERSIONED,) * len(record.versions)
    return list(map(Entry, kept, record.versions))


def unversioned(version: Version) -> Entry:
    """The only version of a record without history."""
    return Entry(_UNVERSIONED, version)


def newest_in(record: ObjectRecord) -> Entry:
    """Of a record that has a version."""
    kept = record.history.kept[0] if record.history is not None else _UNVERSIONED
    return Entry(kept, record.versions[0])


def entries_on(page: VersionsPage) -> list[Entry]:
    return list(map(Entry, page.kept, page.versions))


def levels_of(record: ObjectRecord) -> tuple[tuple[PageRef, ...], ...]:
    return record.history.levels if record.history is not None else ()


async def find_entry(pages: Pages, near: RegisterName, record: ObjectRecord, name: VersionName) -> Entry | None:
    """The version of this name; None: there is none. Reads a page a level. Raises DataDamaged."""
    return await with_draft(pages, near, record, lambda draft: draft.find(name))


async def with_draft(pages: Pages, near: RegisterName, record: ObjectRecord, work: Callable[[Draft], T]) -> T:
    """What ``work`` returns for a draft of the record; it runs again, on a new one, for each page that must be read.
    Raises DataDamaged, and what it raises.
    """
    shelf = Shelf()
    while True:
        try:
            return work(Draft(record, shelf))
        except PageNeeded as needed:
            shelf.put(needed.ref.hash, await read_page(pages, near, needed.ref))


# --- changes


class PageNeeded(Exception):
    """A change needs a page that is not on its shelf. It runs again when the page is there."""

    def __init__(self, ref: PageRef) -> None:
        super().__init__(ref.hash)
        self.ref = ref


class Shelf:
    """Pages that were read, by hash. They never change."""

    def __init__(self) -> None:
        self._pages: dict[bytes, VersionsPage] = {}

    def page(self, ref: PageRef) -> VersionsPage:
        """Raises PageNeeded."""
        page = self._pages.get(ref.hash)
        if page is None:
            raise PageNeeded(ref)
        return page

    def put(self, page_hash: bytes, page: VersionsPage) -> None:
        self._pages[page_hash] = page


Edit = Callable[[Entry], "Entry | None"]
"""What a version becomes; None: it goes."""


CheckRemoval = Callable[[Entry], None]
"""Raises AccessDenied for a version that must not be removed."""


def never_locked(entry: Entry) -> None:
    """For a change that knows no time: no lock ever ends."""
    check_removal(entry.kept.lock, 0, bypass=False)


class Draft:
    """The versions of a key while a change is made.

    ``has_history``: the record had one, of versions. ``outbox``: that of the record, to be assigned anew. ``fresh``:
    the new pages that the changed record refers to, by hash, each after those that it refers to. ``removed``: the
    versions that went, with their data. ``loans``, ``borrowed``, ``departure``, ``arrivals``: as in
    ``records.Sharing``, to be changed by the edit. ``returned``: what the versions that went had borrowed.

    Methods that look at older versions raise PageNeeded, and DataDamaged.
    """

    def __init__(
        self, record: ObjectRecord, shelf: Shelf, bounds: Bounds = BOUNDS, check: CheckRemoval = never_locked
    ) -> None:
        """``check`` is called with each version that is to go."""
        history = record.history
        self._check = check
        self._entries = entries_in(record)
        self._levels = [list(level) for level in levels_of(record)]
        self._null_at = history.null_at if history is not None else -1
        self._copied: PartEntry | None = history.copied if history is not None else None
        self._shelf = shelf
        self._bounds = bounds
        self.has_history = history is not None and not history.is_unversioned
        self.outbox: tuple[PendingEvent, ...] = history.outbox if history is not None else ()
        self.fresh: dict[bytes, bytes] = {}
        self.removed: list[Version] = []
        sharing = sharing_of(record)
        self.loans, self.departure, self.arrivals = sharing.loans, sharing.departure, sharing.arrivals
        self.borrowed = dict(sharing.borrowed)
        self.returned: list[Borrowed] = []

    # --- reading

    @property
    def inline(self) -> list[Entry]:
        """The versions in the record itself: all, in a record without history."""
        return list(self._entries)

    @property
    def newest(self) -> Entry | None:
        return self._entries[0] if self._entries else None

    def find(self, name: VersionName) -> Entry | None:
        """None: there is no such version."""
        if name == NULL_NAME:
            return self.null()
        found = self._at(name.ordinal)
        return (
            found if found is not None and not found.is_null and found.version.context_id == name.context_id else None
        )

    def null(self) -> Entry | None:
        """The null version."""
        for entry in self._entries:
            if entry.is_null:
                return entry
        return self._at(self._null_at) if self._null_at >= 0 else None

    def made_of(self, context_id: bytes, above: int) -> Entry | None:
        """The version with this context id, if its ordinal is more than ``above``."""
        for entry in self._entries:
            if entry.version.context_id == context_id:
                return entry
        waiting = [ref for level in reversed(self._levels) for ref in reversed(level)]
        while waiting:
            ref = waiting.pop()
            if ref.newest <= above:
                return None
            page = self._shelf.page(ref)
            waiting += reversed(page.refs)
            for entry in entries_on(page):
                if entry.version.context_id == context_id:
                    return entry
        return None

    def _at(self, ordinal: int) -> Entry | None:
        for entry in self._entries:
            if entry.ordinal == ordinal:
                return entry
        refs: Sequence[PageRef] = self._refs()
        while refs:
            ref = next((one for one in refs if one.oldest <= ordinal <= one.newest), None)
            if ref is None:
                return None
            page = self._shelf.page(ref)
            for entry in entries_on(page):
                if entry.ordinal == ordinal:
                    return entry
            refs = page.refs
        return None

    def layers(self) -> tuple[list[Entry], list[PageRef], Shelf]:
        """The versions in the record, then the pages with older ones, newest first; and the pages that were read."""
        return self._entries, [ref for level in self._levels for ref in level], self._shelf

    # --- changing

    def add(self, entry: Entry) -> None:
        """Adds the newest version. A new null version takes the place of the one that is there."""
        if entry.is_null:
            before = self.null()
            if before is not None:
                self.remove(before)
        self._entries.insert(0, entry)
        self._spill()

    def remove(self, entry: Entry) -> None:
        """Raises AccessDenied for a version that is locked."""
        self._check(entry)
        self._edit(entry, lambda _entry: None)
        self.removed.append(entry.version)
        self._give_back(entry.ordinal)
        if entry.is_null:
            self._forget_null()
        self._refill()

    def _forget_null(self) -> None:
        """The null version has gone, and its departure goes with it."""
        self._null_at, self._copied, self.departure = -1, None, None

    def _give_back(self, ordinal: int) -> None:
        borrowed = self.borrowed.pop(ordinal, None)
        if borrowed is not None:
            self.returned.append(borrowed)

    def replace(self, entry: Entry, by: Entry) -> None:
        """``by`` has the same ordinal and the same data."""
        self._edit(entry, lambda _entry: by)
        if self._copied is not None and entry.is_null:
            self._copied = _small_part(by.version)

    def _edit(self, entry: Entry, edit: Edit) -> None:
        for index, one in enumerate(self._entries):
            if one.ordinal == entry.ordinal:
                after = edit(one)
                self._entries[index : index + 1] = [after] if after is not None else []
                return
        for level in self._levels:
            if self._edit_under(level, entry.ordinal, edit):
                return
        raise DataDamaged("A version of this key is not where its record has it.")

    def _edit_under(self, refs: list[PageRef], ordinal: int, edit: Edit) -> bool:
        """Edits a version on a page that ``refs`` refer to, and makes them refer to what is new. False: it is on none
        of them.
        """
        for index, ref in enumerate(refs):
            if not ref.oldest <= ordinal <= ref.newest:
                continue
            page = self._shelf.page(ref)
            entries, under = entries_on(page), list(page.refs)
            if under:
                if not self._edit_under(under, ordinal, edit):
                    return False
            else:
                at = next((at for at, entry in enumerate(entries) if entry.ordinal == ordinal), None)
                if at is None:
                    return False
                after = edit(entries[at])
                entries[at : at + 1] = [after] if after is not None else []
            self.fresh.pop(ref.hash, None)
            refs[index : index + 1] = [self._new_page(entries, under)] if entries or under else []
            return True
        return False

    def _new_page(self, entries: Sequence[Entry], refs: Sequence[PageRef]) -> PageRef:
        page = VersionsPage(
            tuple(entry.version for entry in entries), tuple(entry.kept for entry in entries), tuple(refs)
        )
        body = encode(page)
        name = page_hash(body)
        self._shelf.put(name, page)
        self.fresh[name] = body
        if refs:
            return PageRef(name, refs[0].newest, refs[-1].oldest, sum(ref.count for ref in refs))
        return PageRef(name, entries[0].ordinal, entries[-1].ordinal, len(entries))

    def _spill(self) -> None:
        bounds = self._bounds
        while len(self._entries) > 1 and (
            len(self._entries) > bounds.versions_max
            or sum(weight(entry.version) for entry in self._entries) > bounds.versions_bytes_max
        ):
            count = min(bounds.leaf_versions, len(self._entries) - 1)
            going = self._entries[-count:]
            del self._entries[-count:]
            self._note_spilled(going)
            self._refer(0, self._new_page(going, ()))

    def _note_spilled(self, going: Sequence[Entry]) -> None:
        for entry in going:
            if entry.is_null:
                self._null_at, self._copied = entry.ordinal, _small_part(entry.version)

    def _refer(self, level: int, ref: PageRef) -> None:
        """Puts the newest reference on a level, and the oldest ones of a full level on a branch."""
        if level == len(self._levels):
            self._levels.append([])
        refs = self._levels[level]
        refs.insert(0, ref)
        if len(refs) > self._bounds.refs_max:
            going = refs[-self._bounds.branch_refs :]
            del refs[-self._bounds.branch_refs :]
            self._refer(level + 1, self._new_page((), going))

    def _refill(self) -> None:
        """A record has its newest version. Takes the newest leaf into the record, when nothing else is in it."""
        while not self._entries:
            level = next((level for level in self._levels if level), None)
            if level is None:
                return
            self._take_newest(level)

    def _take_newest(self, refs: list[PageRef]) -> None:
        ref = refs[0]
        page = self._shelf.page(ref)
        self.fresh.pop(ref.hash, None)
        if not page.refs:
            self._entries = entries_on(page)
            if any(entry.is_null for entry in self._entries):
                self._null_at, self._copied = -1, None
            del refs[0]
            return
        under = list(page.refs)
        self._take_newest(under)
        refs[0:1] = [self._new_page((), under)] if under else []

    def give_up(self, lost: Set[bytes]) -> None:
        """Lets go of pages that are lost, with their versions."""
        self._levels = [without_lost(level, lost, self._shelf.page, self._new_page) for level in self._levels]
        if self._null_at >= 0 and self._at(self._null_at) is None:
            if self._copied is not None:  # the fields that are known, so that its small copies go with it
                null_version = Version(NULL_VERSION, 0, 0, "", 0, b"", b"", False, b"", b"", (self._copied,))
                self.removed.append(null_version)
            self._forget_null()
        for ordinal in [one for one in self.borrowed if self._at(one) is None]:
            self._give_back(ordinal)
        self._refill()

    def _refs(self) -> list[PageRef]:
        return [ref for level in self._levels for ref in level]

    # --- the end

    def record(self) -> ObjectRecord:
        entries = self._entries
        while self._levels and not self._levels[-1]:
            self._levels.pop()
        shares = bool(self.loans or self.borrowed or self.departure or self.arrivals)
        if not self.outbox and not shares:
            if not entries:
                return ObjectRecord(())
            if not self._levels and [entry.kept for entry in entries] == [_UNVERSIONED] and entries[0].is_null:
                return ObjectRecord((entries[0].version,))
        kept, levels = tuple(entry.kept for entry in entries), tuple(map(tuple, self._levels))
        history = History(kept, levels, self._null_at, self._copied, self.outbox)
        versions = tuple(entry.version for entry in entries)
        sharing = Sharing(self.loans, self.borrowed, self.departure, self.arrivals)
        return SharingRecord(versions, history, sharing) if shares else ObjectRecord(versions, history)


def _small_part(version: Version) -> PartEntry | None:
    return next((part for part in version.parts if part.small), None)
