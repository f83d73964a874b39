"""Copies. A copy of a coded object moves no data, inside of a bucket and between buckets with the same countries
(``lent_copy``). In all other cases the source is opened and sealed anew, under a key and a data id of its own: data
belongs to one register.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

from storaged.errors import InvalidRequest, SlowDown
from storaged.objects.api import (
    NO_WRITE_CONDITIONS,
    PART_BYTES_MAX,
    BodyChecks,
    CopySource,
    NewMeta,
    ObjectInfo,
    ObjectStream,
    PutResult,
    WriteConditions,
)
from storaged.objects.code.versions import access_of, check_allowed
from storaged.objects.configuration.access import Acl
from storaged.objects.configuration.website import REDIRECT_LOCATION
from storaged.objects.encryption import Encryption
from storaged.objects.pending_events import Origin
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.get import get
from storaged.objects.records import BucketRecord, Lock
from storaged.objects.write.lent_copy import copy_lent, lendable
from storaged.objects.write.loans import NotLent
from storaged.objects.write.put import put
from storaged.wire import Buffer


async def copy(
    plane: ObjectPlane,
    source: CopySource,
    bucket: BucketRecord,
    key: bytes,
    *,
    owner: str,
    meta: NewMeta | None,
    tags: Mapping[str, str] | None = None,
    acl: Acl | None = None,
    algorithm: str = "",
    encryption: Encryption | None = None,
    lock: Lock | None = None,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
    origin: Origin | None = None,
) -> PutResult:
    """Copies a version. ``meta`` None keeps the source's metadata; so does ``tags`` None with its tags. Without an
    ``algorithm``, the source's checksums are computed anew. ``encryption``: of the copy, whatever the source's is; that
    in ``meta`` does not count. Access, locks, the storage class and the redirection of a website are never copied:
    ``acl``, ``lock`` and those in ``meta`` are the new object's. Raises as ``get`` and ``put``.
    """

    def kept_of(info: ObjectInfo) -> NewMeta:
        headers = {name: value for name, value in info.headers.items() if name != REDIRECT_LOCATION}
        given = meta if meta is not None else NewMeta(headers, info.user, info.tags)
        given_tags = tags if tags is not None else info.tags
        return NewMeta(given.headers, given.user, given_tags, given.storage_class, encryption, acl, lock, origin)

    lent = await lendable(plane, source, bucket, key, algorithm, encryption)
    if lent is not None:
        check_size(lent.info.size)
        with contextlib.suppress(NotLent):
            return await copy_lent(plane, source, lent, bucket, key, kept_of(lent.info), owner, conditions)
    stream = await open_source(plane, source)
    try:
        info = stream.info
        check_size(info.size)
        kept = kept_of(info)
        checks = BodyChecks(size=info.size, algorithms=(algorithm,) if algorithm else tuple(info.checksums))
        return await put(plane, bucket, key, body_of(stream), kept, checks, owner=owner, conditions=conditions)
    finally:
        await stream.close()


def check_size(size: int) -> None:
    """One copy reads at most what one PUT writes: larger objects are copied in parts. Raises InvalidRequest."""
    if size > PART_BYTES_MAX:
        raise InvalidRequest(
            f"The specified copy source is larger than the maximum allowable size for a copy source: {PART_BYTES_MAX}"
        )


async def open_source(plane: ObjectPlane, source: CopySource) -> ObjectStream:
    """The source of a copy, opened. Raises as ``get``, and SlowDown for another object than may be copied."""
    stream = await get(
        plane,
        source.bucket,
        source.key,
        version_id=source.version_id,
        conditions=source.conditions,
        span=source.span,
        as_copy_source=True,
        customer_key=source.customer_key,
    )
    try:
        check_allowed(access_of(stream.info), source.allowed)
    except SlowDown:
        await stream.close()
        raise
    return stream


async def body_of(stream: ObjectStream) -> AsyncIterator[Buffer]:
    """A stream as a body."""
    async for piece in stream.chunks():
        yield piece
