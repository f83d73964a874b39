"""The way out for a key that has lost pages of older versions: an operator removes them from its record.

While a record names a page that no replica has, the versions on it can't be read, listed or deleted, so the bucket
can't be emptied, and nothing that they may refer to is collected. A page is removed only when each replica says that it
lacks it (``PageLost``): a page that a replica which is away may have stays.
"""

from __future__ import annotations

from storaged.errors import InvalidArgument, PageLost
from storaged.meta.names import object_name
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft, levels_of
from storaged.objects.code.version_pages import read_page
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, PageRef
from storaged.objects.write.versioned import change_versions


async def lost_versions(plane: ObjectPlane, bucket: BucketRecord, key: bytes) -> int:
    """How many versions are on pages that are lost. Raises DataDamaged while some replica may have one."""
    return sum(ref.count for ref in await _lost(plane, bucket, key, BucketKeys(plane, bucket)))


async def forget_lost(plane: ObjectPlane, bucket: BucketRecord, key: bytes, count: int) -> None:
    """Removes the lost pages from the record. ``count``: of versions, as ``lost_versions`` said. Raises InvalidArgument
    when it is another one now, and DataDamaged.
    """
    keys = BucketKeys(plane, bucket)
    lost = await _lost(plane, bucket, key, keys)
    found = sum(ref.count for ref in lost)
    if not lost or found != count:
        raise InvalidArgument(f"This key has lost {found} versions, not {count}. Nothing was changed.")
    hashes = {ref.hash for ref in lost}

    def edit(draft: Draft, _ordinal: int) -> bool:
        draft.give_up(hashes)
        return True

    await change_versions(plane, keys, object_name(bucket.id, bucket.shard_numbers, key), edit)


async def _lost(plane: ObjectPlane, bucket: BucketRecord, key: bytes, keys: BucketKeys) -> list[PageRef]:
    """The references to lost pages; what they may refer to is not known. All other pages are on the shelf then."""
    name = object_name(bucket.id, bucket.shard_numbers, key)
    levels = levels_of(decode_record((await plane.registers.read(name)).value))
    waiting, lost = [ref for level in levels for ref in level], []
    while waiting:
        ref = waiting.pop()
        try:
            page = await read_page(plane.pages, name, ref)
        except PageLost:
            lost.append(ref)
            continue
        keys.shelf.put(ref.hash, page)
        waiting += page.refs
    return lost
