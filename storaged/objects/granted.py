"""The object plane for the S3 front: each call wants a ``Grant`` in place of a bucket.

A handler that forgot to ask for permission has no grant, and one with a grant for another key, or for another kind of
call, is refused. So no mistake in a handler can read or change what was not granted. Each call is that of
``api.Objects``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from storaged.errors import AccessDenied, MethodNotAllowed, NoSuchKey, NoSuchVersion, PreconditionFailed, SlowDown
from storaged.objects.api import (
    AMEND,
    DELETE,
    LIST,
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
    PutResult,
    ReadResult,
    UploadInfo,
)
from storaged.objects.etags import matches_strongly, tag
from storaged.objects.listing_types import Listing, VersionListing
from storaged.objects.quotas import Quotas
from storaged.objects.records import BucketRecord


def _bucket(grant: Grant, key: bytes | None, access: int) -> BucketRecord:
    """The bucket of a grant that allows this. Raises AccessDenied."""
    if not grant.access & access or grant.key != key:
        raise AccessDenied()
    return grant.bucket


def access_of(info: ObjectInfo) -> ObjectAccess:
    return ObjectAccess(info.owner, info.acl, info.tags, info.etag)


def _check_same(grant: Grant, info: ObjectInfo) -> None:
    """A grant that the object's own access gave is for that object, not for one that replaced it meanwhile."""
    if grant.found is not None and access_of(info) != grant.found:
        raise SlowDown("The object changed while access to it was decided. Retry.")


class GrantedObjects:
    """``Objects`` behind grants."""

    def __init__(self, objects: Objects, quotas: Quotas | None = None) -> None:
        self._objects = objects
        self._quotas = quotas
        self.small_bytes_max = objects.small_bytes_max

    async def look(self, bucket: BucketRecord, key: bytes, version_id: str) -> ObjectAccess | None:
        """What a decision about access needs; None when there is no such object. The only call without a grant."""
        try:
            return access_of(await self._objects.head(bucket, key, version_id=version_id, customer_key=None))
        except (NoSuchKey, NoSuchVersion, MethodNotAllowed):
            return None  # the last is a delete marker: it has no content

    def kms_key(self) -> str:
        """No grant: it says nothing about a bucket."""
        return self._objects.kms_key()

    # --- reading

    async def head(self, grant: Grant, key: bytes, **named: Any) -> ObjectInfo:
        info = await self._objects.head(_bucket(grant, key, READ), key, **named)
        _check_same(grant, info)
        return info

    async def get(self, grant: Grant, key: bytes, **named: Any) -> ObjectStream:
        stream = await self._objects.get(_bucket(grant, key, READ), key, **named)
        try:
            _check_same(grant, stream.info)
        except SlowDown:
            await stream.close()
            raise
        return stream

    def try_read(self, grant: Grant, key: bytes, want_plain: bool, on_read: Callable[[ReadResult], None]) -> None:
        if grant.found is not None:
            on_read(None)
            return
        self._objects.try_read(_bucket(grant, key, READ), key, want_plain, on_read)

    # --- writing

    async def put(
        self, grant: Grant, key: bytes, body: Body, meta: NewMeta, checks: BodyChecks, **named: Any
    ) -> PutResult:
        bucket = _bucket(grant, key, WRITE)
        await self._admit(bucket, checks.size)
        return await self._objects.put(bucket, key, body, meta, checks, **named)

    def try_put(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> bool:
        bucket = _bucket(grant, key, WRITE)
        if self._quotas is not None and self._quotas.limits(bucket):
            return False
        return self._objects.try_put(bucket, key, *what, **named)

    async def _admit(self, bucket: BucketRecord, size: int | None, objects: int = 1) -> None:
        """Raises QuotaExceeded."""
        if self._quotas is not None and self._quotas.limits(bucket):
            await self._quotas.admit(bucket, size, objects)

    async def copy(self, source_grant: Grant, source: CopySource, grant: Grant, key: bytes, **named: Any) -> PutResult:
        _bucket(source_grant, source.key, READ)
        bucket = _bucket(grant, key, WRITE)
        await self._admit(bucket, None)
        return await self._objects.copy(_same(source_grant, source), bucket, key, **named)

    async def delete(self, grant: Grant, key: bytes, **named: Any) -> DeleteResult:
        return await self._objects.delete(_bucket(grant, key, DELETE), key, **named)

    async def set_tags(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> str:
        return await self._objects.set_tags(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_acl(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> str:
        return await self._objects.set_acl(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_encryption(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> str:
        return await self._objects.set_encryption(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_retention(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> None:
        await self._objects.set_retention(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

    async def set_hold(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> None:
        await self._objects.set_hold(_bucket(grant, key, AMEND), key, *what, allowed=grant.found, **named)

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
        return await self._objects.copy_part(_same(source_grant, source), bucket, key, *what, **named)

    async def list_parts(
        self, grant: Grant, key: bytes, upload_id: str, **named: Any
    ) -> tuple[UploadInfo, list[PartInfo], int | None]:
        return await self._objects.list_parts(_bucket(grant, key, WRITE), key, upload_id, **named)

    async def complete(self, grant: Grant, key: bytes, *what: Any, **named: Any) -> PutResult:
        return await self._objects.complete(_bucket(grant, key, WRITE), key, *what, **named)

    async def abort(self, grant: Grant, key: bytes, upload_id: str) -> None:
        await self._objects.abort(_bucket(grant, key, WRITE), key, upload_id)


def _same(grant: Grant, source: CopySource) -> CopySource:
    """The source of a copy, in the bucket of its grant, and as it was when access was decided."""
    if source.bucket is not grant.bucket:
        raise AccessDenied()
    if grant.found is None:
        return source
    wanted, etag = source.conditions.if_match, grant.found.etag
    if wanted is not None and not matches_strongly(wanted, etag):
        raise PreconditionFailed(Condition="x-amz-copy-source-If-Match")
    return source._replace(conditions=replace(source.conditions, if_match=tag(etag)))
