"""Deletes objects and versions: by compare-and-set of the record."""

from __future__ import annotations

from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import object_name
from storaged.objects.api import NO_WRITE_CONDITIONS, DeleteResult, WriteConditions
from storaged.objects.bucket_keys import BucketKeys, judged
from storaged.objects.code.history import Draft, Entry
from storaged.objects.code.version_names import required_name
from storaged.objects.code.versions import Place
from storaged.objects.conditions import check_write
from storaged.objects.configuration.kinds import ENABLED
from storaged.objects.pending_events import Origin
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import NAMED_VERSION, NULL_VERSION, BucketRecord, Kept, Version
from storaged.objects.write.loans import retire_gone
from storaged.objects.write.outbox import Outgoing
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.versioned import change_versions, unlocked


async def delete(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    *,
    version_id: str = "",
    bypass_governance: bool = False,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
    origin: Origin | None = None,
) -> DeleteResult:
    """Deletes an object or a version; to delete one that does not exist succeeds. Data of a version that goes is put on
    the garbage lists. In a bucket with versioning a delete without ``version_id`` adds a delete marker.
    ``bypass_governance``: see ``code.lock``. ``origin``: for the events of the change. Raises AccessDenied for a
    version that is locked, PreconditionFailed, InvalidArgument, NoSuchKey for a condition on an object that does not
    exist, and SlowDown.
    """
    name = object_name(bucket.id, bucket.shard_numbers, key)
    outgoing = await outgoing_of(plane, bucket, name, origin) if origin is not None else None
    deletion = _Deletion(plane, bucket, Place(bucket.id, key), version_id, conditions, outgoing)
    check, note = unlocked(plane, bypass=bypass_governance), outgoing.note if outgoing is not None else None
    _, removed = await change_versions(plane, deletion.keys, name, deletion.edit, check, after_promise=note)
    if outgoing is not None:
        outgoing.committed()
    retire_gone(plane, bucket, name, removed)
    if not bucket.plain:
        plane.notes.look_soon(bucket, key, plane.clock.wall_ms())
    return deletion.result


def new_marker(bucket: BucketRecord, versioning: str, marker_id: bytes, now_ms: int, ordinal: int) -> Entry:
    """A delete marker, to be added to the versions of a key. ``versioning``: of the bucket."""
    version_id = NAMED_VERSION if versioning == ENABLED else NULL_VERSION
    return Entry(
        Kept(ordinal),
        Version(version_id, now_ms, 0, bucket.owner, 0, marker_id, b"", True, b"", b"", part_count=0),
    )


class _Deletion:
    """``result``: of the last run of ``edit``."""

    def __init__(
        self,
        plane: ObjectPlane,
        bucket: BucketRecord,
        place: Place,
        version_id: str,
        conditions: WriteConditions,
        outgoing: Outgoing | None = None,
    ) -> None:
        self._bucket = bucket
        self._outgoing = outgoing
        self._versioning = plane.versioning(bucket)
        self._place = place
        self._version_id = version_id
        self._name = required_name(version_id) if version_id else None
        self._conditions = conditions
        self.keys = BucketKeys(plane, bucket)
        self._marker_id = plane.entropy(DATA_ID_BYTES)
        self._now_ms = plane.clock.wall_ms()
        self.result = DeleteResult()

    def edit(self, draft: Draft, ordinal: int) -> bool:
        if self._outgoing is not None:
            self._outgoing.begin()
        changed = self._edit(draft, ordinal)
        if self._outgoing is not None and changed:
            marked = self._name is None and self.result.delete_marker
            what = "DeleteMarkerCreated" if marked else "Delete"
            self._outgoing.add(draft, ordinal, what=what, version=self.result.version_id)
        return changed

    def _edit(self, draft: Draft, ordinal: int) -> bool:
        target = draft.find(self._name) if self._name is not None else draft.newest
        self._judge(target)
        if self._name is not None:
            return self._remove(draft, target)
        if not self._versioning and not draft.has_history:
            self.result = DeleteResult(existed=target is not None)
            if target is not None:
                draft.remove(target)
            return target is not None
        return self._mark(draft, target, ordinal)

    def _judge(self, target: Entry | None) -> None:
        conditions, version = self._conditions, target.version if target is not None else None
        if conditions != NO_WRITE_CONDITIONS:
            check_write(conditions, judged(self._place, version, self.keys, conditions))

    def _remove(self, draft: Draft, target: Entry | None) -> bool:
        """Deletes a version for good."""
        shown = self._version_id if self._versioning else ""
        if target is None:
            self.result = DeleteResult(shown)
            return False
        draft.remove(target)
        self.result = DeleteResult(shown, target.version.delete_marker, existed=True)
        return True

    def _mark(self, draft: Draft, target: Entry | None, ordinal: int) -> bool:
        entry = new_marker(self._bucket, self._versioning, self._marker_id, self._now_ms, ordinal)
        draft.add(entry)
        existed = target is not None and not target.version.delete_marker
        self.result = DeleteResult(entry.name, True, existed)
        return True
