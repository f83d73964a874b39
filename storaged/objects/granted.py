"""The object plane for the S3 front: each call wants a ``Grant`` in place of a bucket.

A handler that forgot to ask for permission has no grant, and one with a grant for another key, or for another kind of
call, is refused. So no mistake in a handler can read or change what was not granted. Each call is that of
``api.Objects``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from msgspec.structs import replace

from storaged.errors import AccessDenied, MethodNotAllowed, NoSuchKey, NoSuchVersion, S3Error, SlowDown
from storaged.objects.api import (
    AMEND,
    DELETE,
    LIST,
    NO_WRITE_CONDITIONS,
    READ,
    WRITE,
    Body,
    BodyChecks,
    CopySource,
    DeleteResult,
    Grant,
    NewMeta,
    ObjectAccess,
    ObjectInfo,
    Objects,
    ObjectStream,
    PartInfo,
    Principal,
    PutResult,
    RangeSpec,
    ReadResult,
    Renaming,
    UploadInfo,
)
from storaged.objects.code.versions import access_of, check_allowed
from storaged.objects.listing_types import Listing, VersionListing
from storaged.objects.quotas import Quotas
from storaged.objects.records import BucketRecord


def _bucket(grant: Grant, key: bytes | None, access: int) -> BucketRecord:
    """The bucket of a grant that allows this. Raises AccessDenied."""
    if not grant.access & access or grant.key != key:
        raise AccessDenied()
    return grant.bucket


def _judging(grant: Grant, named: dict[str, Any]) -> dict[str, Any]:
    """The named arguments of a write, with the object that the grant is for: a grant that depended on the object is not
    for one that replaced it meanwhile."""
    if grant.found is None:
        return named
    return named | {"conditions": replace(named.get("conditions", NO_WRITE_CONDITIONS), allowed=grant.found)}


LockAudit = Callable[[str, Principal, str, bool, Mapping[str, Any]], AbstractAsyncContextManager[Any]]
"""Audits a change of what keeps a version: the kind of entry, who makes the change, of what, whether it will
surely be refused, and facts. It raises ServiceUnavailable, before anything is changed, when that can't be audited."""


def not_audited(*_: Any) -> AbstractAsyncContextManager[Any]:
    return nullcontext()


class GrantedObjects:
    """``Objects`` for callers with grants. Changes of retention and legal holds, and deletions that bypass governance,
    are audited: there ``who`` is the sender.
    """

    def __init__(self, objects: Objects, quotas: Quotas | None = None, audit: LockAudit = not_audited) -> None:
        self._objects = objects
        self._quotas = quotas
        self._audit = audit
        self.small_bytes_max = objects.small_bytes_max

    async def look(self, bucket: BucketRecord, key: bytes, version_id: str) -> ObjectAccess | None:
        """What a decision about access needs; None when there is no such object. ``look`` and ``look_upload`` need no
        grant: they make one."""
        try:
            return access_of(await self._objects.head(bucket, key, version_id=version_id, customer_key=None))
        except (NoSuchKey, NoSuchVersion, MethodNotAllowed):
            return None  # the last is a delete marker: it has no content

    async def look_upload(self, bucket: BucketRecord, key: bytes, upload_id: str) -> ObjectAccess | None:
        """As ``look``: who initiated an upload, as its owner."""
        found = await self._objects.look_upload(bucket, key, upload_id)
        return ObjectAccess(found.initiator, None, {}) if found is not None else None

    def kms_key(self) -> str:
        """No grant: it says nothing about a bucket."""
        return self._objects.kms_key()

    # --- reading

    async def head(self, grant: Grant, key: bytes, **named: Any) -> ObjectInfo:
        info = await self._objects.head(_bucket(grant, key, READ), key, **named)
        check_allowed(access_of(info), grant.found)
        return info

    async def get(self, grant: Grant, key: bytes, **named: Any) -> ObjectStream:
        stream = await self._objects.get(_bucket(grant, key, READ), key, **named)
        try:
            check_allowed(access_of(stream.info), grant.found)
        except SlowDown:
            await stream.close()
            raise
        return stream

    def try_read(
        self,
        grant: Grant,
        key: bytes,
        want_plain: bool,
        on_read: Callable[[ReadResult], None],
        span: RangeSpec | None = None,
    ) -> None:
        if grant.found is not None:
            on_read(None)
            return
        self._objects.try_read(_bucket(grant, key, READ), key, want_plain, on_read, span)

    # --- writing

    async def put(
        self, grant: Grant, key: bytes, body: Body, meta: NewMeta, checks: BodyChecks, **named: Any
    ) -> PutResult:
        bucket = _bucket(grant, key, WRITE)
        await self._admit(bucket, checks.size)
        result = await self._objects.put(bucket, key, body, meta, checks, **_judging(grant, named))
        if checks.size is None:
            self._add(bucket, result)
        return result

    def try_put(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> bool:
        bucket = _bucket(grant, key, WRITE)
        if grant.found is not None or (self._quotas is not None and self._quotas.limits(bucket)):
            return False
        return self._objects.try_put(bucket, key, *what, **named)

    async def _admit(self, bucket: BucketRecord, size: int | None, objects: int = 1) -> None:
        """Raises QuotaExceeded."""
        if self._quotas is not None and self._quotas.limits(bucket):
            await self._quotas.admit(bucket, size, objects)

    def _add(self, bucket: BucketRecord, result: PutResult, admitted: int = 0) -> None:
        """Counts a write that was admitted before its size was known; ``admitted``: the size that it was counted
        with."""
        if self._quotas is not None and self._quotas.limits(bucket):
            self._quotas.add(bucket, result.size - admitted)

    async def copy(self, source_grant: Grant, source: CopySource, grant: Grant, key: bytes, **named: Any) -> PutResult:
        _bucket(source_grant, source.key, READ)
        bucket, size = _bucket(grant, key, WRITE), None
        source = _allowed(source_grant, source)
        if self._quotas is not None and self._quotas.limits(bucket):
            size = await self._size_of(source)
        await self._admit(bucket, size)
        result = await self._objects.copy(source, bucket, key, **_judging(grant, named))
        self._add(bucket, result, size or 0)
        return result

    async def _size_of(self, source: CopySource) -> int | None:
        """Of a source that is about to be copied: copies that move no data end so soon that many at once would all find
        room. None: the copy itself says what is wrong with it."""
        named: dict[str, Any] = {"version_id": source.version_id, "customer_key": source.customer_key}
        try:
            return (await self._objects.head(source.bucket, source.key, **named)).size
        except S3Error:
            return None

    async def rename(self, source_grant: Grant, removal: Grant, grant: Grant, asked: Renaming) -> PutResult:
        """``removal``: the grant to delete the object of the old key. A quota is not asked: nothing is added."""
        _bucket(source_grant, asked.source, READ)
        _bucket(removal, asked.source, DELETE)
        bucket, allowed = _bucket(grant, asked.key, WRITE), source_grant.found
        if not source_grant.bucket.id == removal.bucket.id == bucket.id:
            raise AccessDenied()
        if removal.found is not None:
            check_allowed(removal.found, allowed)
            allowed = removal.found
        return await self._objects.rename(bucket, asked._replace(source_allowed=allowed, allowed=grant.found))

    async def delete(
        self, grant: Grant, key: bytes, *, who: Principal, bypass_governance: bool = False, **named: Any
    ) -> DeleteResult:
        """Governance is bypassed only when a version does not go without that: such a deletion is audited."""
        bucket, named = _bucket(grant, key, DELETE), _judging(grant, named)
        try:
            return await self._objects.delete(bucket, key, **named)
        except AccessDenied:
            if not bypass_governance:
                raise
        async with self._audited("object.bypass", who, bucket, key, named):
            return await self._objects.delete(bucket, key, bypass_governance=True, **named)

    async def set_tags(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> str:
        return await self._objects.set_tags(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_acl(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> str:
        return await self._objects.set_acl(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_encryption(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> str:
        return await self._objects.set_encryption(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_retention(
        self, grant: Grant, key: bytes, mode: str, until_ms: int, *, who: Principal, **named: Any
    ) -> None:
        bucket, facts = _bucket(grant, key, AMEND), {"mode": mode, "until_ms": until_ms}
        if named.get("bypass_governance"):
            facts["bypass"] = True
        async with self._audited("object.retention", who, bucket, key, named, **facts):
            await self._objects.set_retention(bucket, key, mode, until_ms, allowed=grant.found, **named)

    async def set_hold(self, grant: Grant, key: bytes, hold: bool, *, who: Principal, **named: Any) -> None:
        bucket = _bucket(grant, key, AMEND)
        async with self._audited("object.hold", who, bucket, key, named, hold=hold):
            await self._objects.set_hold(bucket, key, hold, allowed=grant.found, **named)

    def _audited(
        self, kind: str, who: Principal, bucket: BucketRecord, key: bytes, named: Mapping[str, Any], **facts: Any
    ) -> AbstractAsyncContextManager[Any]:
        target = f"object:{bucket.name}/{key.decode('utf-8', 'replace')}"
        facts |= {"bucket": bucket.id.hex(), "version": named.get("version_id", "")}
        return self._audit(kind, who, target, False, facts)

    # --- lists

    async def list_objects(self, grant: Grant, **named: Any) -> Listing:
        return await self._objects.list_objects(_bucket(grant, None, LIST), **named)

    async def list_versions(self, grant: Grant, **named: Any) -> VersionListing:
        return await self._objects.list_versions(_bucket(grant, None, LIST), **named)

    async def list_uploads(
        self, grant: Grant, **named: Any
    ) -> tuple[list[UploadInfo], list[bytes], tuple[bytes, str] | None]:
        return await self._objects.list_uploads(_bucket(grant, None, LIST), **named)

    # --- uploads

    async def create_upload(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> UploadInfo:
        bucket = _bucket(grant, key, WRITE)
        await self._admit(bucket, None)
        return await self._objects.create_upload(bucket, key, *what, **named)

    async def find_upload(self, grant: Grant, key: bytes, upload_id: str) -> UploadInfo | None:
        """None: there is no retention, or it has ended."""
        return await self._objects.look_upload(_bucket(grant, key, WRITE), key, upload_id)

    async def put_part(
        self, grant: Grant, key: bytes, upload_id: str, number: int, body: Body, checks: BodyChecks, **named: Any
    ) -> PutResult:
        bucket = _bucket(grant, key, WRITE)
        await self._admit(bucket, checks.size, 0)
        return await self._objects.put_part(bucket, key, upload_id, number, body, checks, **named)

    async def copy_part(
        self, source_grant: Grant, source: CopySource, grant: Grant, key: bytes, *what: Any, **named: Any
    ) -> PutResult:
        _bucket(source_grant, source.key, READ)
        bucket = _bucket(grant, key, WRITE)
        await self._admit(bucket, None, 0)
        result = await self._objects.copy_part(_allowed(source_grant, source), bucket, key, *what, **named)
        self._add(bucket, result)
        return result

    async def list_parts(
        self, grant: Grant, key: bytes, upload_id: str, **named: Any
    ) -> tuple[UploadInfo, list[PartInfo], int | None]:
        return await self._objects.list_parts(_bucket(grant, key, WRITE), key, upload_id, **named)

    async def complete(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> PutResult:
        return await self._objects.complete(_bucket(grant, key, WRITE), key, *what, **_judging(grant, named))

    async def abort(self, grant: Grant, key: bytes, upload_id: str) -> None:
        await self._objects.abort(_bucket(grant, key, WRITE), key, upload_id)


def _allowed(grant: Grant, source: CopySource) -> CopySource:
    """The source of a copy, in the bucket of its grant, and as it was when access was decided."""
    if source.bucket is not grant.bucket:
        raise AccessDenied()
    return source._replace(allowed=grant.found)
