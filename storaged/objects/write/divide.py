"""Codes what a key keeps whole: bodies in its record, and small copies beside it, from before the layout trusted no
operator alone (``cluster.spread``).

Theory of operation
    A small body is one chunk, and a chunk can't be divided without its key. So storage nodes, which find such bodies in
    their walks, ask a gateway (``maintain.asks``, kind ``divide``). It opens the body, seals it again in chunks that
    suit the profile, and writes it as the coded body of a PUT: durable between promise and accept. The data id, the
    data key, and all that is sealed about the version stay; only the part's entry changes. The change is made only
    while the version has the very parts that were read.

    Two gateways may do this at once, each with another layout and with more or less memory, and each may die anywhere.
    The data id can't change, since the version's sealed fields name it; so all attempts write under the same ids. None
    may spoil what another one has committed. Therefore

    * what is sealed again follows from the body alone (``form_of``): C and the block's borders from the size, the salt
      from the data key and the old header. The profile is a part of each fragment's id. So a fragment's id and the
      body determine its bytes;
    * an attempt deletes nothing itself. What it leaves goes to the garbage lists, and the collector keeps the fragments
      that the record names. The sweep of orphans finds what a gateway that died has left.

    Old copies go to the garbage lists, and stay for readers as long as what was replaced.

    What the record lends to other keys (``write.loans``) gets the coded part in the same change.

    A body with a customer's key (SSE-C) can't be opened here. It stays whole until its client writes it again. So does
    one that the record only lends (``write.loans``), since the key is at the borrower: the last part of an upload that
    was renamed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from storaged.errors import DataDamaged, SlowDown
from storaged.meta.names import Change, RegisterName, Value, Visibility
from storaged.meta.ports import Reading
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.customer import CUSTOMERS
from storaged.objects.code.history import Draft, Entry
from storaged.objects.code.lending import LENT
from storaged.objects.code.manifest import parts_of, renew_pages, with_parts
from storaged.objects.code.version_names import required_name
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import OpenedVersion, Place, decode_record, open_version
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.part_reader import PartReader
from storaged.objects.records import BucketRecord, Loan, PartEntry, Version, sharing_of
from storaged.objects.write.blocks import Form, NewPart
from storaged.objects.write.body import BodyReader
from storaged.objects.write.commit import commit_coded
from storaged.objects.write.retire import origin_of, retire_parts
from storaged.objects.write.versioned import VersionsUpdate
from storaged.objects.write.writer import PartWriter, RunsChanged
from storaged.sov1 import CHUNK_BYTES_MIN, SALT_BYTES, chunk_count, derive_key
from storaged.wire import Buffer

AGAIN_LABEL = "sov.again.v1"
"""Of the salt of a body that is sealed again."""


async def divide(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName) -> str:
    """Codes all that an object's register keeps whole. Returns why some of it stays whole; empty when nothing does.
    Raises SlowDown when others change the key, ServiceUnavailable, DataDamaged.
    """
    reading = await plane.registers.read(name, want_payload=True)
    value, stays = reading.value, ""
    if not plane.layouts.current.spreads or value is None or value.visibility == Visibility.TOMBSTONE:
        return ""
    keys, record = BucketKeys(plane, bucket), decode_record(value)
    lent = {
        part.data_id
        for loan in sharing_of(record).loans
        async for part in parts_of(plane.pages, name, loan)
        if part.small or part.inline
    }
    async for entry in every_entry(plane.pages, name, record):
        parts = [part async for part in parts_of(plane.pages, name, entry.version)]
        lent.difference_update(part.data_id for part in parts)
        whole = [part for part in parts if part.small or part.inline]
        if not whole:
            continue
        opened = open_version(Place(bucket.id, name.key), entry.version, await keys.load(entry.version.bucket_key))
        if opened.locked:
            stays = CUSTOMERS
            continue
        for part in whole:
            parts = await _divide(plane, bucket, keys, name, entry, opened, parts, part, reading)
            entry = entry._replace(version=await with_parts(plane.pages, name, entry.version, parts))
    return stays or (LENT if lent else "")


async def _divide(
    plane: ObjectPlane,
    bucket: BucketRecord,
    keys: BucketKeys,
    name: RegisterName,
    entry: Entry,
    opened: OpenedVersion,
    parts: Sequence[PartEntry],
    part: PartEntry,
    reading: Reading,
) -> list[PartEntry]:
    """Codes one part of a version. Returns the parts that the version has then."""
    plain = await _opened(plane, bucket, name, part, opened.body_dek, reading.payload if part.small else None)
    new = NewPart(bucket, name, opened.body_dek, part.data_id, part.number, form_of(opened.body_dek, part))
    async with PartWriter(plane, new, len(plain)) as writer:
        try:
            await writer.write(BodyReader(_once(plain), len(plain)), lambda _plain: None)
            coded = await _commit(plane, keys, name, entry, parts, part, writer)
        except BaseException:
            plane.background.spawn(writer.discard())
            raise
    if part.small:
        await retire_parts(plane, bucket, name, [part], origin_of(entry.version))
    return [coded if one is part else one for one in parts]


def form_of(dek: bytes, part: PartEntry) -> Form:
    """How a body that lies whole is sealed again: one block of the smallest chunks, which suit every profile.

    It must not depend on anything but the body, nor ever change: another version of the program may have written
    fragments under the same ids. A part of 256 KiB, the largest that is kept whole, has 65 chunks.
    """
    salt = derive_key(dek, AGAIN_LABEL, part.header)[:SALT_BYTES]
    return Form(CHUNK_BYTES_MIN, chunk_count(part.size, CHUNK_BYTES_MIN), salt)


async def _commit(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    entry: Entry,
    parts: Sequence[PartEntry],
    part: PartEntry,
    writer: PartWriter,
) -> PartEntry:
    """Makes the version name the coded part. Returns the part."""
    while True:
        coded = writer.entry()
        version = await with_parts(plane.pages, name, entry.version, [coded if one is part else one for one in parts])
        update = _Divided(entry, version, part, keys)

        async def put_pages(update: _Divided = update, version: Version = version) -> None:
            await renew_pages(plane.pages, name, [page for page in version.pages if page not in entry.version.pages])
            await update.versions.put_pages(plane.pages, name)

        try:
            await commit_coded(plane, keys, name, update, writer, put_pages)
        except RunsChanged:
            continue
        return coded


class _Divided:
    """The update of a register: ``entry`` becomes ``version``, in which ``part`` is coded."""

    def __init__(self, entry: Entry, version: Version, part: PartEntry, keys: BucketKeys) -> None:
        self._entry, self._version, self._part = entry, version, part
        self.versions = VersionsUpdate(keys.shelf, self._edit)

    def __call__(self, value: Value | None) -> Change:
        change = self.versions.update(value)
        assert change is not None
        copies = self._part.small and change.payload == self._part.data_id
        return change._replace(payload=b"") if copies else change

    def _edit(self, draft: Draft, _ordinal: int) -> bool:
        """Raises SlowDown when the version is gone, or has other parts than those that were read."""
        before = self._entry.version
        now = draft.find(required_name(self._entry.name))
        if now is None or (now.ordinal, now.version.parts, now.version.manifest) != (
            self._entry.ordinal,
            before.parts,
            before.manifest,
        ):
            raise SlowDown("Others change this key; what it keeps whole is coded later.")
        after, new = self._version, now.version
        changed = msgspec.structs.replace(new, parts=after.parts, manifest=after.manifest, pages=after.pages)
        draft.replace(now, now._replace(version=changed))
        draft.loans = tuple(_like(loan, before, changed) for loan in draft.loans)
        return True


def _like(loan: Loan, before: Version, after: Version) -> Loan:
    """The loan of a version's data, with the parts that the version has now. Other loans as they are."""
    if loan.manifest:
        if loan.manifest != before.manifest:
            return loan
        others = [page for page in before.pages if page not in loan.pages]
        pages = tuple(page for page in after.pages if page not in others)
        return msgspec.structs.replace(loan, manifest=after.manifest, pages=pages)
    coded = {old.data_id: new for old, new in zip(before.parts, after.parts, strict=False)}
    first, *more = (coded.get(part.data_id, part) for part in loan.parts)
    return msgspec.structs.replace(loan, part=first, more=tuple(more))


async def _opened(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, part: PartEntry, dek: bytes, copy: Buffer | None
) -> bytes:
    """The plaintext of a part. Raises DataDamaged, ServiceUnavailable."""

    async def not_moved(_part: PartEntry) -> None:
        return None

    reader = PartReader(plane, bucket, name, part, dek, copy, not_moved)
    found = bytearray()
    for window in reader.windows(0, part.size, lambda: plane.small_bytes_max):
        out = memoryview(bytearray(window.cells * reader.shape.plain_bytes))
        await reader.read(window, out)
        found += out[: window.plain_bytes]
    if len(found) != part.size:
        raise DataDamaged(f"A part of {part.size} bytes opens to {len(found)}.")
    return bytes(found)


async def _once(plain: Buffer) -> AsyncIterator[Buffer]:
    yield plain
