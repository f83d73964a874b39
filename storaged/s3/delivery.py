"""Objects that the server itself puts into a bucket: access logs and inventories.

They are put in the ordinary way, so quotas, encryption, events and locks apply; the permission is what the target's
policy gives to the service (``authorization.service_grant``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Final

from storaged.objects.api import BodyChecks, Grant, NewMeta
from storaged.s3.context import Front
from storaged.s3.encryption import asked
from storaged.s3.origins import origin_of
from storaged.s3.request import Request
from storaged.units import MIB

PIECE_BYTES: Final = 1 * MIB


async def deliver(
    front: Front,
    grant: Grant,
    key: bytes,
    data: bytes,
    content_type: str,
    unique: str,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """``unique``: the id of the request that this is like. ``headers``: what that says of encryption; nothing: as the
    bucket's configuration does. Raises as ``encryption.asked`` and ``Objects.put``.
    """
    target = grant.bucket
    request = Request(unique, "PUT", b"/", "", True, operation="PutObject", _bucket_record=target)
    origin = origin_of(request, "ObjectCreated:Put")
    meta = NewMeta({"content-type": content_type}, encryption=asked(front, request, headers), origin=origin)
    await front.objects.put(grant, key, _body(data), meta, BodyChecks(len(data)), owner=target.owner)


async def _body(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]
