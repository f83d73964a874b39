"""Copies that move no data: the new version borrows the data of its source (``loans``).

That is possible inside one bucket, and between buckets with the same countries, for a coded object, when the copy wants
the checksums that the source has, and neither of them has SSE-C: no other record may open data under a customer's key.
The data key is wrapped anew, for the copy's bucket, key and version; the metadata and the list field are sealed anew. A
copy inherits the context id, under which its body opens.

The copy of an object that was uploaded in parts has the same parts, and so the same ETag and the same checksums, those
of its parts included. S3 makes one part of it, whose ETag is the MD5 of the whole: that can't be known without reading
the data. S3 says that an ETag identifies content, and need not be an MD5. A client that wants a checksum of the whole
object names the algorithm, and gets it: such a copy moves the data, unless the source has just this checksum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from storaged.errors import DataDamaged
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import NO_READ_CONDITIONS, CopySource, NewMeta, ObjectInfo, PutResult, WriteConditions
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft, Entry
from storaged.objects.code.lending import may_lend
from storaged.objects.code.manifest import manifest_pages, seal_parts, sealed_parts_of
from storaged.objects.code.version_names import required_name
from storaged.objects.code.versions import (
    Place,
    UnsealedVersion,
    access_of,
    check_allowed,
    info_of,
    meta_of,
    record_key,
    seal_version,
    shown,
)
from storaged.objects.conditions import check_copy_source
from storaged.objects.encryption import CUSTOMER, NO_KEY, Encryption
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.borrowed import owner_of, with_data
from storaged.objects.read.find import Found, find
from storaged.objects.records import ACTIVE, BucketRecord, PartEntry, SealedMeta, SealedPart, Version
from storaged.objects.sharing import Borrowed
from storaged.objects.write.blocks import NewPart
from storaged.objects.write.checksums import FULL_OBJECT
from storaged.objects.write.commit import AfterPromise, change_once
from storaged.objects.write.loans import (
    BORROWED_MAX,
    BORROWER_ID_BYTES,
    NotLent,
    Wanted,
    bucket_of_owner,
    introduce,
    with_loan,
)
from storaged.objects.write.outbox import Outgoing
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.put import AddedVersion, NewObject, Write, check_early


class Lendable(NamedTuple):
    """A source whose data a copy may borrow. ``owner``: the register that the data belongs to, of the bucket
    ``owner_bucket``.
    """

    info: ObjectInfo
    found: Found
    owner: RegisterName
    owner_bucket: BucketRecord


async def lendable(
    plane: ObjectPlane,
    source: CopySource,
    bucket: BucketRecord,
    key: bytes,
    algorithm: str,
    encryption: Encryption | None,
) -> Lendable | None:
    """None: the copy needs data of its own. Raises as ``get`` of the source does, and SlowDown when the source is not
    the object that the sender may copy.
    """
    if (source.bucket.id, source.key) == (bucket.id, key) or source.customer_key != NO_KEY:
        return None
    if not may_lend(source.bucket, bucket) or (encryption is not None and encryption.kind == CUSTOMER):
        return None
    found = await find(plane, source.bucket, source.key, source.version_id)
    opened = found.opened
    if opened.has_customer_key or (opened.borrowed is None and not is_coded(opened.version)):
        return None
    info = info_of(source.key, opened, found.version_id, (), found.lock)
    if not has_checksums(info, algorithm):
        return None
    if source.conditions != NO_READ_CONDITIONS:
        check_copy_source(source.conditions, info.etag, info.modified_ms)
    check_allowed(access_of(info), source.allowed)
    owner, owner_bucket = owner_of(source.bucket, found), await bucket_of_owner(plane, source.bucket, opened.borrowed)
    if owner_bucket is None or owner_bucket.state != ACTIVE or not replicas_answer(plane, owner):
        return None
    return Lendable(info, found, owner, owner_bucket)


def has_checksums(info: ObjectInfo, algorithm: str) -> bool:
    """Whether a source has the checksum that a copy asks for: one of the whole object; without an ``algorithm`` any."""
    if not algorithm:
        return bool(info.checksums)
    return tuple(info.checksums) == (algorithm,) and info.checksum_type == FULL_OBJECT


def replicas_answer(plane: ObjectPlane, owner: RegisterName) -> bool:
    """As far as is known. Every replica has to accept the loan (``loans.check_everywhere``): with one away the owner's
    record would be written in vain, and the copy would wait for an answer.
    """
    voting = plane.layouts.partition(owner.partition).voting
    return all(plane.liveness.disk_readable(disk) for disks in voting for disk in disks)


def is_coded(version: Version) -> bool:
    """Whether some of its data is coded, or may be: many parts are on pages, which are not read here."""
    return bool(version.manifest) or any(part.runs and not part.small and not part.inline for part in version.parts)


class Lent(NamedTuple):
    """What a copy of a version borrows, and what it needs to know of it. ``data_ids``, ``pages``: as of ``Wanted``.
    ``parts``: sealed in the version on pages of their own.
    """

    data_ids: tuple[bytes, ...]
    pages: tuple[bytes, ...] = ()
    parts: tuple[SealedPart, ...] = ()


async def lent_of(plane: ObjectPlane, bucket: BucketRecord, key: bytes, found: Found) -> Lent:
    """The data that is sealed in the version ``found`` of a key. A record that names other parts lends nothing. Raises
    NotLent, ServiceUnavailable.
    """
    opened = found.opened
    if not opened.meta.parts_page:
        return Lent(tuple(part.data_id for part in opened.meta.parts) or (opened.version.context_id,))
    hashes: list[bytes] = []
    entries: list[PartEntry] = []
    try:
        context = Place(bucket.id, key).context_of(opened.version)
        sealed = await sealed_parts_of(plane.pages, found.name, opened.dek, context, opened.meta)
        data = await with_data(plane, bucket, found)
        async for page_hash, page in manifest_pages(plane.pages, data.name, data.opened.version):
            hashes.append(page_hash)
            entries += page.parts
    except DataDamaged:
        raise NotLent from None
    if len(sealed) != len(entries) or not all(map(SealedPart.names, sealed, entries)):
        raise NotLent
    return Lent((), tuple(hashes), sealed)


class SealedPages:
    """The pages with the parts of a version that borrows: the list that is sealed in its source, sealed anew."""

    def __init__(self, write: Write, lent: Lent) -> None:
        """``write``: of the borrowing version."""
        self._write = write
        self._parts = lent.parts
        self._pages: dict[bytes, bytes] = {}

    def name_in(self, new: UnsealedVersion, meta: SealedMeta, source: SealedMeta) -> tuple[UnsealedVersion, SealedMeta]:
        """The borrowing version and its metadata, with the parts of the source."""
        if not self._parts:
            return new, msgspec.structs.replace(meta, parts=source.parts, parts_page=b"")
        dek, entropy = self._write.part.dek, self._write.plane.entropy
        context = self._write.place.context(new.version_id, new.context_id)
        self._pages = seal_parts(dek, context, self._parts, entropy)
        hashes = tuple(self._pages)
        new = msgspec.structs.replace(new, pages=hashes)
        return new, msgspec.structs.replace(meta, parts=(), parts_page=hashes[0])

    async def put(self) -> None:
        """To be awaited between the promise and the accept of the version. Raises ServiceUnavailable."""
        for page_hash, body in reversed(self._pages.items()):
            await self._write.plane.pages.put_page(self._write.part.name, body, page_hash)


async def copy_lent(
    plane: ObjectPlane,
    source: CopySource,
    lent: Lendable,
    bucket: BucketRecord,
    key: bytes,
    new: NewMeta,
    owner: str,
    conditions: WriteConditions,
) -> PutResult:
    """Raises NotLent when the copy needs data of its own: nothing was copied. Raises as ``put``."""
    bucket_key = await plane.keys.bucket_key(bucket.id, bucket.countries)
    name, opened = object_name(bucket.id, bucket.shard_numbers, key), lent.found.opened
    plane.room.check(name, bucket.countries)
    data = await lent_of(plane, source.bucket, source.key, lent.found)
    part = NewPart(bucket, name, opened.dek, opened.version.context_id)
    write = Write(plane, Place(bucket.id, key), bucket_key, part, NewObject(new, owner, conditions))
    borrowed, borrower = introduce(plane, lent.owner, lent.owner_bucket, name, plane.entropy(BORROWER_ID_BYTES))
    sealed = SealedPages(write, data)
    await check_early(plane, name, write.place, BucketKeys(plane, bucket), conditions)
    outgoing = await outgoing_of(plane, bucket, name, new.origin) if new.origin is not None else None
    added = _BorrowingVersion(write, lent, sealed, borrowed, outgoing)
    named = required_name(source.version_id) if source.version_id else None
    wanted = Wanted(lent.owner, data.data_ids, named, borrower, data.pages)

    async def commit(check: AfterPromise) -> None:
        async def after_promise() -> None:
            await check()
            await sealed.put()
            await added.before_accept()

        await change_once(plane, added.keys, name, added.update, after_promise)

    await with_loan(plane, lent.owner_bucket, wanted, commit)
    return added.conclude()


class _BorrowingVersion(AddedVersion):
    def __init__(
        self, write: Write, lent: Lendable, sealed: SealedPages, borrowed: Borrowed, outgoing: Outgoing | None
    ) -> None:
        super().__init__(write, _maker(write, lent, sealed), outgoing)
        self._borrowed = borrowed

    def note_added(self, draft: Draft, added: Entry) -> None:
        """Raises NotLent."""
        if len(draft.borrowed) >= BORROWED_MAX:
            raise NotLent
        draft.borrowed[added.ordinal] = self._borrowed


def _maker(write: Write, lent: Lendable, sealed: SealedPages) -> Callable[[str], tuple[Version, PutResult]]:
    def make(version_id: str) -> tuple[Version, PutResult]:
        plane, new, info, source = write.plane, write.new, lent.info, lent.found.opened
        modified_ms, context_id = plane.clock.wall_ms(), write.part.data_id
        unsealed = UnsealedVersion(
            version_id,
            context_id,
            new.owner,
            modified_ms,
            (),
            multipart=source.version.multipart,
            part_count=source.version.part_count,
        )
        dek, encryption, _ = record_key(write.place, context_id, write.part.dek, new.meta.encryption, plane.entropy)
        meta = meta_of(new.meta, info.etag, dict(info.checksums), info.checksum_type, info.size)
        unsealed, meta = sealed.name_in(unsealed, meta, source.meta)
        version = seal_version(write.place, unsealed, write.bucket_key, dek, meta, plane.entropy, encryption)
        return version, PutResult(
            info.etag,
            "",
            info.size,
            info.checksums,
            info.checksum_type,
            modified_ms,
            shown(encryption),
            new.meta.tags,
        )

    return make
