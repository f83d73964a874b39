"""Which data is referred to: garbage collection asks before it deletes, and repair walks these references.

Each fragment names one owner: the register of the *object* that it belongs to, or will belong to. That is so for a part
of an open upload too. A data id is referred to by

* the object's record, in a part of any version, current or older, or on a page of that version's manifest; or
* the object's record, in a loan (``loans``): versions of other keys read this data, and only this record has it; or
* the row of a part of an open or completing upload for that key; or
* the version that a completing upload has pinned.

**This module alone enumerates what a record refers to**: ``versions_in``, ``parts_in`` (data), ``pages_in`` (pages).
Older versions are on pages (``code.history``), so code that looks only at ``ObjectRecord.versions`` loses the others.
All of these ask here: garbage collection (``maintain.disuse``, ``sweep``), the collection of pages (``manifest_gc``),
the walk, repair and rebuild (``walk.entries_of``), moves of blocks (``mover``), the copy of a partition
(``partition_mover``), aborts (``live_references``).

A part moves from the second place to the third and to the first, never back, and each place is written before the
previous one is cleared. So ``live_references`` looks at the uploads first and at the object last, after a round that
ends all earlier promises on it. A data id that it does not find has no reference, and never gets one: only the request
that drew a data id proposes it, and that request looks again before it proposes a second time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import msgspec

from storaged.errors import DataDamaged, NoSuchBucket
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import Pages, Registers, Scanner
from storaged.objects.code.manifest import PAGES_MAX, checked, parts_of
from storaged.objects.code.version_walk import OnUnreadable, every_entry, every_page
from storaged.objects.code.versions import decode_record
from storaged.objects.records import Loan, PartEntry, Version, decode_object, decode_version, shares, sharing_of
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.objects.write.uploads import COMPLETING, living_uploads, part_rows
from storaged.wire import decode


def is_readable(record: bytes, table: int) -> bool:
    """Whether a record of the OBJECT or UPLOAD table is one. What it says of its pages may still be damaged."""
    try:
        decode_object(record) if table == Table.OBJECT else decode(record, UploadRecord)
    except msgspec.MsgspecError:
        return False
    return True


async def versions_in(
    pages: Pages, near: RegisterName, record: bytes, table: int, *, on_unreadable: OnUnreadable | None = None
) -> AsyncIterator[Version]:
    """All versions in a record of the OBJECT or UPLOAD table, those on pages of older versions included. Each may have
    a manifest of pages. ``near``: the object's register. Raises DataDamaged.
    """
    if not record:
        return
    try:
        if table == Table.OBJECT:
            async for entry in every_entry(pages, near, decode_object(record), on_unreadable=on_unreadable):
                yield entry.version
        elif table == Table.UPLOAD:
            upload = decode(record, UploadRecord)
            if upload.state == COMPLETING and upload.pinned:
                yield decode_version(upload.pinned)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"A record cannot be read: {error}") from None


async def parts_in(
    pages: Pages, near: RegisterName, record: bytes, table: int, *, on_unreadable: OnUnreadable | None = None
) -> AsyncIterator[PartEntry]:
    """All parts that a record refers to, including those on pages of manifests and of older versions. ``near``: the
    object's register. Raises DataDamaged.

    ``on_unreadable``: what can be read is enough. So repair keeps all other versions of a key that has lost a page.
    A caller that deletes data because nothing refers to it must not pass this: a page that can't be read may refer
    to the data.
    """
    if table == Table.PART and record:
        try:
            yield checked(decode(record, PartRecord).entry)
        except msgspec.MsgspecError as error:
            raise DataDamaged(f"A record cannot be read: {error}") from None
    loans = _loans_in(record) if table == Table.OBJECT else ()
    lent, paged = _lent_by(loans), {loan.manifest: loan for loan in loans if loan.manifest}
    async for version in versions_in(pages, near, record, table, on_unreadable=on_unreadable):
        try:
            async for part in parts_of(pages, near, version):
                lent.pop(part.data_id, None)
                yield part
            paged.pop(version.manifest, None)
        except DataDamaged as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
    for part in lent.values():
        yield part
    for loan in paged.values():
        try:
            async for part in parts_of(pages, near, loan):
                yield part
        except DataDamaged as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)


def _loans_in(record: bytes) -> tuple[Loan, ...]:
    """What an object's record lends to other keys. Raises DataDamaged."""
    if not shares(record):
        return ()
    try:
        return sharing_of(decode_object(record)).loans
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"A record cannot be read: {error}") from None


def _lent_by(loans: Sequence[Loan]) -> dict[bytes, PartEntry]:
    """The lent parts that are in the record, by data id. Raises DataDamaged."""
    return {part.data_id: checked(part) for loan in loans for part in loan.parts}


async def pages_in(
    pages: Pages,
    name: RegisterName,
    value: Value | None,
    *,
    complete: bool = False,
    on_unreadable: OnUnreadable | None = None,
) -> AsyncIterator[bytes]:
    """The hashes of all pages that a register of objects or uploads needs: those of older versions, and those of the
    manifests of all versions and loans; of each manifest at most as many as one can have. Reads each page of older
    versions once. Raises DataDamaged, if ``complete`` also when a version or a loan does not list its pages.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return
    if name.table == Table.OBJECT:
        for loan in _loans_in(value.body):
            if complete and loan.manifest and loan.manifest not in loan.pages:
                raise DataDamaged(f"The record of {name.key[:80]!r} does not list the pages of what it lends.")
            for page_hash in loan.pages[:PAGES_MAX]:
                yield page_hash
        async for page_hash, page in every_page(pages, name, decode_record(value), on_unreadable=on_unreadable):
            yield page_hash
            for listed in _listed_pages(name, page.versions, complete=complete):
                yield listed
        versions: Sequence[Version] = decode_record(value).versions
    else:
        versions = [version async for version in versions_in(pages, name, value.body, name.table)]
    for listed in _listed_pages(name, versions, complete=complete):
        yield listed


def _listed_pages(name: RegisterName, versions: Iterable[Version], *, complete: bool) -> Iterator[bytes]:
    """As ``pages_in``, of the manifests of these versions."""
    for version in versions:
        if complete and version.manifest and version.manifest not in version.pages:
            raise DataDamaged(f"The record of {name.key[:80]!r} does not list its pages.")
        yield from version.pages[:PAGES_MAX]


async def live_references(
    registers: Registers, scanner: Scanner, pages: Pages, owner: RegisterName, *, uploads: bool = True
) -> set[bytes]:
    """Every data id that the object of ``owner``, or an upload for it, refers to now and after every proposal that is
    under way. A bucket that was deleted for good has none.

    ``uploads`` False: no upload was open for the key when the caller looked, after it had the data ids that it asks
    about. Raises ServiceUnavailable, DataDamaged when the references can't be known: then nothing may be deleted.
    """
    found: set[bytes] = set()
    if uploads:
        async for upload in living_uploads(scanner, owner):
            async for part in parts_in(pages, owner, upload.value.body, Table.UPLOAD):
                found.add(part.data_id)
            async for row in part_rows(scanner, owner.scope, upload.record.upload_id):
                found.add(row.entry.data_id)
    try:
        value = await registers.settle(owner)
    except NoSuchBucket as error:
        if error.details.get("final"):
            return set()
        raise
    if value is not None and value.visibility != Visibility.TOMBSTONE:
        async for part in parts_in(pages, owner, value.body, Table.OBJECT):
            found.add(part.data_id)
    return found
