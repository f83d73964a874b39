"""The object plane as the S3 front, ``maintain`` and ``admin`` see it: ``api.Objects`` as functions of this package."""

from __future__ import annotations

import dataclasses
from functools import partial
from uuid import UUID

from storaged.objects import listing
from storaged.objects.background import Counters
from storaged.objects.plane import ObjectPlane
from storaged.objects.read import get
from storaged.objects.write import complete, copy, delete, locks, metadata, multipart, put, rename, uploads
from storaged.objects.write.blocks import SOON_BYTES_MAX


class ObjectService:
    """Implements ``api.Objects`` (see there for what each call takes and raises): each call is the function of that
    name, with the plane as its first argument.
    """

    def __init__(self, plane: ObjectPlane) -> None:
        self.plane = plane
        self.small_bytes_max = min(plane.small_bytes_max, SOON_BYTES_MAX)
        self.put = partial(put.put, plane)
        self.try_put = partial(put.try_put, plane)
        self.head = partial(get.head, plane)
        self.get = partial(get.get, plane)
        self.try_read = partial(get.try_read, plane)
        self.delete = partial(delete.delete, plane)
        self.copy = partial(copy.copy, plane)
        self.rename = partial(rename.rename, plane)
        self.set_tags = partial(metadata.set_tags, plane)
        self.set_retention = partial(locks.set_retention, plane)
        self.set_hold = partial(locks.set_hold, plane)
        self.set_encryption = partial(metadata.set_encryption, plane)
        self.set_acl = partial(metadata.set_acl, plane)
        self.list_objects = partial(listing.list_objects, plane)
        self.list_versions = partial(listing.list_versions, plane)
        self.create_upload = partial(multipart.create_upload, plane)
        self.look_upload = partial(uploads.look_upload, plane)
        self.put_part = partial(multipart.put_part, plane)
        self.copy_part = partial(multipart.copy_part, plane)
        self.list_parts = partial(multipart.list_parts, plane)
        self.list_uploads = partial(multipart.list_uploads, plane)
        self.complete = partial(complete.complete, plane)
        self.abort = partial(multipart.abort, plane)

    def kms_key(self) -> str:
        """See ``api.Objects``."""
        return str(UUID(bytes=self.plane.keys.keyring_id()))

    def statistics(self) -> Counters:
        """A copy of the counters."""
        return dataclasses.replace(self.plane.counters)

    async def close(self) -> None:
        """Ends background work; requests must have ended before."""
        await self.plane.close()
