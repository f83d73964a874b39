"""Copying: opened here, sealed anew under a key and a data id of its own, for data belongs to one register."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from storaged.objects.api import (
    NO_READ_CONDITIONS,
    NO_WRITE_CONDITIONS,
    BodyChecks,
    NewMeta,
    ObjectStream,
    PutResult,
    ReadConditions,
    WriteConditions,
)
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.get import get
from storaged.objects.records import BucketRecord
from storaged.objects.write.put import put
from storaged.wire import Buffer


async def copy(
    plane: ObjectPlane,
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
    """Copies a version. ``meta`` None: the source's is kept; ``tags`` None: likewise; no ``algorithm``: the source's
    checksums are computed anew.
    """
    stream = await get(
        plane,
        source_bucket,
        source_key,
        version_id=version_id,
        conditions=source_conditions,
        as_copy_source=True,
    )
    try:
        info = stream.info
        given = meta if meta is not None else NewMeta(info.headers, info.user, info.tags, info.storage_class)
        kept = NewMeta(given.headers, given.user, tags if tags is not None else info.tags, given.storage_class)
        checks = BodyChecks(size=info.size, algorithms=(algorithm,) if algorithm else tuple(info.checksums))
        return await put(plane, bucket, key, body_of(stream), kept, checks, owner=owner, conditions=conditions)
    finally:
        await stream.close()


async def body_of(stream: ObjectStream) -> AsyncIterator[Buffer]:
    """A stream as a body."""
    async for piece in stream.chunks():
        yield piece
