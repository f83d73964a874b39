"""The record of a register after moves of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from storaged.cluster.layout import Profile
from storaged.errors import DataDamaged
from storaged.maintain.moves import MoveAsk, apply_move
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import Pages
from storaged.objects.code.history import Draft, Entry, with_draft
from storaged.objects.code.manifest import parts_of, with_parts, write_manifest
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import decode_record
from storaged.objects.records import Loan, PartEntry, PartRecord, encode_object, sharing_of
from storaged.wire import decode, encode

Move = tuple[MoveAsk, Profile]
"""With the profile that its blocks should have."""


async def body_after(
    pages: Pages, name: RegisterName, value: Value | None, moves: Sequence[Move]
) -> tuple[bytes, list[bytes]] | None:
    """The record after all moves, and the pages that it needs and the one before did not, which are durable when this
    returns. None when one of the moves does not apply.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    if name.table != Table.PART:
        return await _versions_after(pages, name, value, moves)
    row = decode(value.body, PartRecord)
    entry: PartEntry | None = row.entry
    for ask, target in moves:
        entry = apply_move(entry, ask, target) if entry is not None else None
    return (encode(msgspec.structs.replace(row, entry=entry)), []) if entry is not None else None


async def _versions_after(
    pages: Pages, name: RegisterName, value: Value, moves: Sequence[Move]
) -> tuple[bytes, list[bytes]] | None:
    """As ``body_after``, of an object. Blocks of older versions and of lent data move, too. Versions that can't be read
    stay as they are; then lent data moves only if a version that was read has it. Data of a version and of a loan must
    have the same places in both, so nothing moves while the pages of a loan can't be read.
    """
    record = decode_record(value)
    left = set(range(len(moves)))
    by_data: dict[bytes, list[tuple[int, Move]]] = {}
    for index, one in enumerate(moves):
        by_data.setdefault(one[0].data_id, []).append((index, one))
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
    return encode_object(draft.record()), [*new_pages, *draft.fresh]


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
