"""The usage of a bucket: counted by listing its versions, a bounded piece at a time."""

from __future__ import annotations

from msgspec import Struct

from storaged.errors import InvalidArgument, NoSuchUpload
from storaged.objects.api import Objects
from storaged.objects.records import BucketRecord

PAGES_A_CALL = 20
VERSIONS_A_PAGE = 1000


class Usage(Struct, frozen=True):
    """The usage of a piece of a bucket. ``versions``: all that hold data. ``objects``: the current ones among them.
    ``size_bytes``: without the overhead of coding. ``next_after``: the mark at which the next piece begins; None at the
    end.
    """

    objects: int = 0
    versions: int = 0
    size_bytes: int = 0
    next_after: str | None = None


def _mark(key: bytes, version_id: str) -> str:
    return f"{key.hex()}.{version_id}" if version_id else key.hex()


async def usage_after(objects: Objects, bucket: BucketRecord, after: str) -> Usage:
    """Counts the versions after a mark (empty: all), at most PAGES_A_CALL pages of them: a key may have very many.
    Raises InvalidArgument for what is no mark, and as a listing.
    """
    current = versions = total = 0
    hexadecimal, _, version_id = after.partition(".")
    try:
        start: bytes | None = bytes.fromhex(hexadecimal)
    except ValueError:
        raise InvalidArgument("the mark begins with a key, in hex") from None
    for _ in range(PAGES_A_CALL):
        if start is None:
            break
        page = await objects.list_versions(bucket, after=start, after_version=version_id, limit=VERSIONS_A_PAGE)
        for version in page.versions:
            if not version.delete_marker:
                versions += 1
                current += version.latest
                total += version.size
        start, version_id = page.next_after, page.next_version
    return Usage(current, versions, total, None if start is None else _mark(start, version_id))


async def open_uploads(objects: Objects, bucket: BucketRecord) -> tuple[int, int]:
    """The number of the uploads that are open, and the bytes of all their parts. Raises as a listing."""
    count = total = 0
    following: tuple[bytes, str] | None = b"", ""
    while following is not None:
        uploads, _, following = await objects.list_uploads(bucket, after_key=following[0], after_upload=following[1])
        for upload in uploads:
            count += 1
            after: int | None = 0
            while after is not None:
                try:
                    _, parts, after = await objects.list_parts(bucket, upload.key, upload.upload_id, after=after)
                except NoSuchUpload:
                    break  # it has ended meanwhile
                total += sum(part.size for part in parts)
    return count, total
