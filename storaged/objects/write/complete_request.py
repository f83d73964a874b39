"""A Complete, as the client sent it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from storaged.errors import InvalidRequest
from storaged.objects.api import CompletedPart, WriteConditions
from storaged.objects.code.customer import ContentKey
from storaged.objects.encryption import NO_KEY
from storaged.objects.pending_events import Origin
from storaged.objects.write.uploads import OpenedUpload


class CompleteRequest(NamedTuple):
    """``origin``: for the events of the change."""

    parts: Sequence[CompletedPart]
    owner: str
    checksums: Mapping[str, str]
    checksum_type: str
    declared_size: int | None
    conditions: WriteConditions
    customer_key: bytes
    origin: Origin | None


def content_of(upload: OpenedUpload, request: CompleteRequest) -> ContentKey | None:
    """The data key of the parts' bodies with SSE-C; None: it is the upload's, or no key was sent. That is enough as
    long as no checksum is asked for. Raises InvalidRequest.
    """
    if request.customer_key != NO_KEY or not upload.has_customer_key:
        return upload.content_key(request.customer_key)
    if upload.record.checksum_algorithm or request.checksums or any(part.checksums for part in request.parts):
        raise InvalidRequest(
            "An upload with a checksum algorithm and a customer's key is completed with this key: the checksums are"
            " encrypted too."
        )
    return None


def request_digest(request: CompleteRequest) -> bytes:
    """SHA-256 of the parts and checksums. It can be computed from content, so it leaves the gateway only keyed
    (``OpenedUpload.keyed``).
    """
    parts = [(part.number, part.etag, sorted(part.checksums.items())) for part in request.parts]
    content = [parts, sorted(request.checksums.items()), request.checksum_type, request.declared_size]
    return hashlib.sha256(msgspec.msgpack.encode(content)).digest()
