"""The object plane as the S3 front, ``maintain`` and ``admin`` see it: ``api.Objects`` over the functions of this
package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from storaged.meta.ports import Reading
from storaged.objects import listing
from storaged.objects.api import (
    NO_READ_CONDITIONS,
    NO_WRITE_CONDITIONS,
    Body,
    BodyChecks,
    CompletedPart,
    DeleteResult,
    Listing,
    NewMeta,
    ObjectInfo,
    PartInfo,
    PutResult,
    RangeSpec,
    ReadConditions,
    ReadResult,
    Show,
    UploadInfo,
    VersionListing,
    WriteConditions,
    as_rows,
)
from storaged.objects.background import Counters
from storaged.objects.plane import ObjectPlane
from storaged.objects.read import get
from storaged.objects.read.get import HeldStream, VerifiedStream
from storaged.objects.read.hedging import HedgeDelay
from storaged.objects.records import BucketRecord
from storaged.objects.write import complete, copy, delete, multipart, put
from storaged.wire import Buffer


class ObjectService:
    """Implements ``api.Objects`` (see there for what each call raises)."""

    def __init__(self, plane: ObjectPlane) -> None:
        self.plane = plane
        self.small_bytes_max = plane.limits.small_bytes_max
        self._hedge = HedgeDelay(plane.limits.hedge_floor_s)

    def statistics(self) -> Counters:
        """A copy of the counters."""
        return dataclasses.replace(self.plane.counters)

    async def close(self) -> None:
        """Ends background work; requests must have ended before."""
        await self.plane.close()

    async def put(
        self,
        bucket: BucketRecord,
        key: bytes,
        body: Body,
        meta: NewMeta,
        checks: BodyChecks,
        *,
        owner: str,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> PutResult:
        return await put.put(self.plane, bucket, key, body, meta, checks, owner=owner, conditions=conditions)

    def try_put(
        self,
        bucket: BucketRecord,
        key: bytes,
        plain: Buffer,
        meta: NewMeta,
        checks: BodyChecks,
        then: Callable[[PutResult | Exception], None],
        *,
        owner: str,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> bool:
        return put.try_put(self.plane, bucket, key, plain, meta, checks, then, owner=owner, conditions=conditions)

    async def head(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: ReadConditions = NO_READ_CONDITIONS,
        part_number: int | None = None,
        reading: Reading | None = None,
    ) -> ObjectInfo:
        return await get.head(
            self.plane,
            bucket,
            key,
            version_id=version_id,
            conditions=conditions,
            part_number=part_number,
            reading=reading,
        )

    def try_read(self, bucket: BucketRecord, key: bytes, want_plain: bool, then: Callable[[ReadResult], None]) -> None:
        get.try_read(self.plane, bucket, key, want_plain, then)

    async def get(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: ReadConditions = NO_READ_CONDITIONS,
        span: RangeSpec | None = None,
        part_number: int | None = None,
        reading: Reading | None = None,
    ) -> HeldStream | VerifiedStream:
        return await get.get(
            self.plane,
            self._hedge,
            bucket,
            key,
            version_id=version_id,
            conditions=conditions,
            span=span,
            part_number=part_number,
            reading=reading,
        )

    async def delete(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> DeleteResult:
        return await delete.delete(self.plane, bucket, key, version_id=version_id, conditions=conditions)

    async def copy(
        self,
        source_bucket: BucketRecord,
        source_key: bytes,
        bucket: BucketRecord,
        key: bytes,
        *,
        owner: str,
        version_id: str = "",
        meta: NewMeta | None,
        tags: Mapping[str, str] | None = None,
        algorithm: str = "",
        source_conditions: ReadConditions = NO_READ_CONDITIONS,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> PutResult:
        return await copy.copy(
            self.plane,
            self._hedge,
            source_bucket,
            source_key,
            bucket,
            key,
            owner=owner,
            version_id=version_id,
            meta=meta,
            tags=tags,
            algorithm=algorithm,
            source_conditions=source_conditions,
            conditions=conditions,
        )

    async def set_tags(self, bucket: BucketRecord, key: bytes, tags: Mapping[str, str], *, version_id: str = "") -> str:
        return await delete.set_tags(self.plane, bucket, key, tags, version_id=version_id)

    async def list_objects(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        delimiter: bytes = b"",
        limit: int = 1000,
        show: Show = as_rows,
    ) -> Listing:
        return await listing.list_objects(
            self.plane, bucket, prefix=prefix, after=after, delimiter=delimiter, limit=limit, show=show
        )

    async def list_versions(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        after_version: str = "",
        delimiter: bytes = b"",
        limit: int = 1000,
    ) -> VersionListing:
        return await listing.list_versions(
            self.plane,
            bucket,
            prefix=prefix,
            after=after,
            after_version=after_version,
            delimiter=delimiter,
            limit=limit,
        )

    async def create_upload(
        self,
        bucket: BucketRecord,
        key: bytes,
        meta: NewMeta,
        *,
        owner: str,
        algorithm: str = "",
        checksum_type: str = "",
    ) -> UploadInfo:
        return await multipart.create_upload(
            self.plane, bucket, key, meta, owner=owner, algorithm=algorithm, checksum_type=checksum_type
        )

    async def put_part(
        self, bucket: BucketRecord, key: bytes, upload_id: str, number: int, body: Body, checks: BodyChecks
    ) -> PutResult:
        return await multipart.put_part(self.plane, bucket, key, upload_id, number, body, checks)

    async def copy_part(
        self,
        source_bucket: BucketRecord,
        source_key: bytes,
        span: RangeSpec | None,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        number: int,
        *,
        version_id: str = "",
        source_conditions: ReadConditions = NO_READ_CONDITIONS,
    ) -> PutResult:
        return await multipart.copy_part(
            self.plane,
            self._hedge,
            source_bucket,
            source_key,
            span,
            bucket,
            key,
            upload_id,
            number,
            version_id=version_id,
            source_conditions=source_conditions,
        )

    async def list_parts(
        self, bucket: BucketRecord, key: bytes, upload_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[UploadInfo, list[PartInfo], int | None]:
        return await multipart.list_parts(self.plane, bucket, key, upload_id, after=after, limit=limit)

    async def list_uploads(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after_key: bytes = b"",
        after_upload: str = "",
        delimiter: bytes = b"",
        limit: int = 1000,
    ) -> tuple[list[UploadInfo], list[bytes], tuple[bytes, str] | None]:
        return await multipart.list_uploads(
            self.plane,
            bucket,
            prefix=prefix,
            after_key=after_key,
            after_upload=after_upload,
            delimiter=delimiter,
            limit=limit,
        )

    async def complete(
        self,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        parts: Sequence[CompletedPart],
        *,
        owner: str,
        checksums: Mapping[str, str] | None = None,
        checksum_type: str = "",
        declared_size: int | None = None,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> PutResult:
        return await complete.complete(
            self.plane,
            bucket,
            key,
            upload_id,
            parts,
            owner=owner,
            checksums=checksums,
            checksum_type=checksum_type,
            declared_size=declared_size,
            conditions=conditions,
        )

    async def abort(self, bucket: BucketRecord, key: bytes, upload_id: str) -> None:
        await multipart.abort(self.plane, bucket, key, upload_id)
