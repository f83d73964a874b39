"""What a gateway tidies: deletions left half done, and rows of uploads that ended long ago."""

from __future__ import annotations

import msgspec
import pytest

from storaged.errors import NoSuchBucket
from storaged.meta.names import Table
from storaged.node.housekeeping import tidy
from storaged.objects.api import NewMeta
from tests.unit.test_objects_buckets import ANNE, world_of

DAY_MS = 86_400_000


async def test_a_half_done_deletion_is_finished_and_old_uploads_are_forgotten() -> None:
    world, objects, buckets = world_of()
    left = await buckets.create(ANNE, "left", region="eu-fr-1")
    await buckets._step(left, msgspec.structs.replace(left, state="deleting", nonce=b"n" * 16))
    kept = await buckets.create(ANNE, "kept", region="eu-fr-1")
    upload = await objects.create_upload(kept, b"key", NewMeta(), owner=ANNE.user_id)
    await objects.abort(kept, b"key", upload.upload_id)
    await objects.plane.background.settle()
    assert await tidy(objects.plane, buckets) == 0
    with pytest.raises(NoSuchBucket):
        await buckets.get("left")
    world.clock.wall += 2 * DAY_MS
    assert await tidy(objects.plane, buckets) == 1
    rows = [value for name, value in world.ring.values.items() if name.table == Table.UPLOAD]
    assert [value.visibility for value in rows] == [0]
    await objects.close()
