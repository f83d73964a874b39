"""Which data is referred to: garbage collection asks before it deletes, and repair walks these references.

Each fragment names one owner: the register of the *object* that it belongs to, or will belong to. That is so for a part
of an open upload too. A data id is referred to by

* the object's record, in a part of a version or on a page of its manifest; or
* the row of a part of an open or completing upload for that key; or
* the version that a completing upload has pinned.

A part moves from the second place to the third and to the first, never back, and each place is written before the
previous one is cleared. So ``live_references`` looks at the uploads first and at the object last, after a round that
ends all earlier promises on it. A data id that it does not find has no reference, and never gets one: only the request
that drew a data id proposes it, and that request looks again before it proposes a second time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from storaged.errors import DataDamaged, NoSuchBucket
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import Pages, Registers, Scanner
from storaged.objects.code.manifest import checked, parts_of
from storaged.objects.code.versions import decode_record
from storaged.objects.records import PartEntry, PartRecord, UploadRecord, Version, decode_object, decode_version
from storaged.objects.write.uploads import COMPLETING, living_uploads, part_rows
from storaged.wire import decode


def versions_in(record: bytes, table: int) -> tuple[Version, ...]:
    """The versions in a record of the OBJECT or UPLOAD table; they may have a manifest of pages. Raises DataDamaged."""
    if not record:
        return ()
    try:
        if table == Table.OBJECT:
            return decode_object(record).versions
        if table == Table.UPLOAD:
            upload = decode(record, UploadRecord)
            return (decode_version(upload.pinned),) if upload.state == COMPLETING and upload.pinned else ()
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"A record cannot be read: {error}") from None
    return ()


async def parts_in(pages: Pages, near: RegisterName, record: bytes, table: int) -> AsyncIterator[PartEntry]:
    """All parts that a record refers to, including those on pages of manifests. ``near``: the object's register. Raises
    DataDamaged.
    """
    if table == Table.PART and record:
        try:
            yield checked(decode(record, PartRecord).entry)
        except msgspec.MsgspecError as error:
            raise DataDamaged(f"A record cannot be read: {error}") from None
    for version in versions_in(record, table):
        async for part in parts_of(pages, near, version):
            yield part


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
    record = decode_record(value)
    for version in record.versions:
        async for part in parts_of(pages, owner, version):
            found.add(part.data_id)
    return found
