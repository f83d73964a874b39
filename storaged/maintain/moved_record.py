"""The record of a register after moves of its blocks.

A key may have very many versions, and be written all the time. The data of a PUT is in one version of its record alone,
and perhaps in a loan. So once all moves were applied to versions of PUTs, no other version has to be read; and if
others change the record before the moves do, they are applied to the very versions in it as it is then
(``body_again``). Parts of an upload may be in several versions of the record, so for these all versions are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from storaged.cluster.layout import Profile
from storaged.errors import DataDamaged
from storaged.maintain.moves import MoveAsk, apply_move
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Pages
from storaged.objects.code.history import Draft, Entry, PageNeeded, Shelf, with_draft
from storaged.objects.code.manifest import parts_of, renew_pages, with_parts, write_manifest
from storaged.objects.code.version_names import NULL_NAME, VersionName
from storaged.objects.code.version_pages import read_page
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import decode_record
from storaged.objects.records import Loan, PartEntry, encode_object, sharing_of
from storaged.objects.upload_records import PartRecord
from storaged.wire import decode, encode

Move = tuple[MoveAsk, Profile]
"""With the profile that its blocks should have."""


class RecordAfter(NamedTuple):
    """A record after moves. ``pages``: that it needs and the one before did not. ``versions``: that the moves changed,
    if no other version has their data; else empty.
    """

    body: bytes
    pages: Sequence[bytes]
    versions: Sequence[VersionName] = ()


async def body_after(
    pages: Pages, name: RegisterName, value: Value | None, moves: Sequence[Move]
) -> RecordAfter | None:
    """Its pages are durable when this returns. None when one of the moves does not apply."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    if name.table != Table.PART:
        return await _versions_after(pages, name, value, moves)
    row = decode(value.body, PartRecord)
    entry: PartEntry | None = row.entry
    for ask, target in moves:
        entry = apply_move(entry, ask, target) if entry is not None else None
    return RecordAfter(encode(msgspec.structs.replace(row, entry=entry)), ()) if entry is not None else None


def body_again(
    value: Value | None, shelf: Shelf, versions: Sequence[VersionName], moves: Sequence[Move]
) -> tuple[bytes, dict[bytes, bytes]] | None:
    """As ``body_after``, of a later value of the register: moves of ``versions``, as that returned them. The pages are
    those to be put, by their hashes. Raises PageNeeded, DataDamaged.
    """
    draft, by_data, left = Draft(decode_record(value), shelf), _by_data(moves), set(range(len(moves)))
    for name in versions:
        entry = draft.find(name)
        if entry is None:
            return None
        applied = set[int]()
        parts = tuple(_moved(part, by_data, applied) for part in entry.version.parts)
        draft.replace(entry, entry._replace(version=msgspec.structs.replace(entry.version, parts=parts)))
        left -= applied
    if left:
        return None
    draft.loans = tuple(
        msgspec.structs.replace(loan, part=_moved(loan.part, by_data, set())) if loan.part is not None else loan
        for loan in draft.loans
    )
    return encode_object(draft.record()), draft.fresh


class RecordChange:
    """The record after moves, whatever it is when they are made."""

    def __init__(self, seen: Value, after: RecordAfter, moves: Sequence[Move]) -> None:
        self.body = b""
        self._seen = seen
        self._after = after
        self._moves = moves
        self._shelf = Shelf()
        self._fresh: dict[bytes, bytes] = {}

    def update(self, value: Value | None) -> Change | None:
        """None: the moves do not fit any more. Raises PageNeeded, DataDamaged."""
        self.body, self._fresh = self._after.body, {}
        if value is None:
            return None
        if value.sequence != self._seen.sequence:
            again = body_again(value, self._shelf, self._after.versions, self._moves) if self._after.versions else None
            if again is None:
                return None
            self.body, self._fresh = again
        return Change(self.body, value.visibility, value.payload)

    async def load(self, pages: Pages, name: RegisterName, value: Value | None) -> None:
        """Reads the pages that the moves need in this value. Raises DataDamaged."""
        while True:
            try:
                self.update(value)
            except PageNeeded as needed:
                self._shelf.put(needed.ref.hash, await read_page(pages, name, needed.ref))
            else:
                return

    async def put_pages(self, pages: Pages, name: RegisterName) -> None:
        """To be awaited between promise and accept."""
        if self.body == self._after.body:
            await renew_pages(pages, name, self._after.pages)
        for page_hash, body in self._fresh.items():
            await pages.put_page(name, body, page_hash)


def _by_data(moves: Sequence[Move]) -> dict[bytes, list[tuple[int, Move]]]:
    found: dict[bytes, list[tuple[int, Move]]] = {}
    for index, one in enumerate(moves):
        found.setdefault(one[0].data_id, []).append((index, one))
    return found


async def _versions_after(pages: Pages, name: RegisterName, value: Value, moves: Sequence[Move]) -> RecordAfter | None:
    """As ``body_after``, of an object. Blocks of older versions and of lent data move, too. Versions that can't be read
    stay as they are; then lent data moves only if a version that was read has it. Data of a version and of a loan must
    have the same places in both, so nothing moves while the pages of a loan can't be read.
    """
    record = decode_record(value)
    left = set(range(len(moves)))
    by_data = _by_data(moves)
    changed: list[tuple[Entry, Entry]] = []
    applied_to_loans = set[int]()
    new_pages: list[bytes] = []
    unread: list[DataDamaged] = []
    async for entry in every_entry(pages, name, record, on_unreadable=unread.append):
        version, applied = entry.version, set[int]()
        try:
            parts = [_moved(part, by_data, applied) async for part in parts_of(pages, name, version)]
        except DataDamaged as error:
            unread.append(error)
            continue
        if applied:
            left -= applied
            after = await with_parts(pages, name, version, parts)
            changed.append((entry, entry._replace(version=after)))
            new_pages += [page for page in after.pages if page not in version.pages]
            if not left and not any(one.version.multipart for one, _ in changed):
                break
    loans = list[Loan]()
    for loan in sharing_of(record).loans:
        try:
            moved = await _moved_loan(pages, name, loan, by_data, applied_to_loans)
        except DataDamaged:
            return None
        loans.append(moved)
        new_pages += [page for page in moved.pages if page not in loan.pages]
    if left if unread else left - applied_to_loans:
        return None

    def replace_all(draft: Draft) -> Draft:
        for entry, after in changed:
            draft.replace(entry, after)
        draft.loans = tuple(loans)
        return draft

    draft = await with_draft(pages, name, record, replace_all)
    for page_hash, page in draft.fresh.items():
        await pages.put_page(name, page, page_hash)
    versions = [_name_of(entry) for entry, _ in changed]
    alone = not left and not any(entry.version.multipart for entry, _ in changed)
    return RecordAfter(encode_object(draft.record()), [*new_pages, *draft.fresh], versions if alone else ())


def _name_of(entry: Entry) -> VersionName:
    return NULL_NAME if entry.is_null else VersionName(entry.ordinal, entry.version.context_id)


async def _moved_loan(
    pages: Pages,
    name: RegisterName,
    loan: Loan,
    by_data: Mapping[bytes, Sequence[tuple[int, Move]]],
    applied: set[int],
) -> Loan:
    """Its new pages are durable when this returns. Raises DataDamaged."""
    to_this = set[int]()
    parts = [_moved(part, by_data, to_this) async for part in parts_of(pages, name, loan)]
    if not to_this:
        return loan
    applied |= to_this
    after = await write_manifest(pages, name, parts)
    if loan.part is None:
        return msgspec.structs.replace(loan, manifest=after.first, pages=after.pages)
    first, *more = parts
    return msgspec.structs.replace(loan, part=first, more=tuple(more))


def _moved(part: PartEntry, by_data: Mapping[bytes, Sequence[tuple[int, Move]]], applied: set[int]) -> PartEntry:
    """The part after all moves of its data that apply. Adds their numbers to ``applied``."""
    for index, (ask, target) in by_data.get(part.data_id, ()):
        moved = apply_move(part, ask, target)
        if moved is not None:
            part = moved
            applied.add(index)
    return part
