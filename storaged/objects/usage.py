"""The usage of a bucket: counted by listing its versions, a bounded piece at a time."""

from __future__ import annotations

from msgspec import Struct

from storaged.objects.api import Objects
from storaged.objects.records import BucketRecord

PAGES_A_CALL = 20
VERSIONS_A_PAGE = 1000


class Usage(Struct, frozen=True):
    """The usage of a piece of a bucket. ``versions``: all that hold data. ``objects``: the current ones among them.
    ``size_bytes``: without the overhead of coding. ``next_after``: where the next piece begins; None at the end.
    """

    objects: int = 0
    versions: int = 0
    size_bytes: int = 0
    next_after: bytes | None = None


async def usage_after(objects: Objects, bucket: BucketRecord, after: bytes) -> Usage:
    """Counts versions of keys > ``after``, at most PAGES_A_CALL pages of them. Raises as a listing."""
    current = versions = total = 0
    start: bytes | None = after
    for _ in range(PAGES_A_CALL):
        if start is None:
            break
        page = await objects.list_versions(bucket, after=start, limit=VERSIONS_A_PAGE)
        for version in page.versions:
            if not version.delete_marker:
                versions += 1
                current += version.latest
                total += version.size
        start = page.next_after
    return Usage(current, versions, total, start)
