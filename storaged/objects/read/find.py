"""A version of a key: its record from the register, opened with its bucket's key.

``find`` awaits what must be read or fetched. ``try_find`` takes a reading that is there already, and a bucket key that
is in memory. Both use the entry of a record that was opened lately (``ObjectPlane.opened_records``).
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from storaged import trace
from storaged.errors import DataDamaged, MethodNotAllowed, NoSuchKey, NoSuchVersion
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import Reading
from storaged.objects.cache.opened_records import OpenedRecord
from storaged.objects.code.history import Entry, find_entry, newest_in
from storaged.objects.code.lending import borrowed_by, has_arrived
from storaged.objects.code.version_names import required_name
from storaged.objects.code.versions import OpenedVersion, Place, decode_record, open_version
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import NULL_VERSION, BucketRecord, Lock, ObjectRecord, sharing_of
from storaged.objects.sharing import Borrowed, Departure
from storaged.wire import Buffer


class Found(Struct, frozen=True):
    """A version that a read found. ``version_id``: as clients name it; empty in a bucket that never had versioning.
    ``copy``: a small object's sealed bytes, when a replica sent them along. ``cached``: its entry in
    ``ObjectPlane.opened_records``, which keeps what follows from the record.
    """

    name: RegisterName
    opened: OpenedVersion
    version_id: str
    copy: Buffer | None
    cached: OpenedRecord | None
    lock: Lock | None = None


async def find(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    version_id: str,
    *,
    want_payload: bool = False,
    reading: Reading | None = None,
) -> Found:
    """The version of a key, the newest when ``version_id`` is empty. ``reading``: of the key's register, when it was
    just read. Raises NoSuchKey, NoSuchVersion, MethodNotAllowed (it is a delete marker), InvalidArgument,
    DataDamaged, ServiceUnavailable. An object that is being renamed is not found here once its new key has it.
    """
    name = object_name(bucket.id, bucket.shard_numbers, key)
    if reading is None:
        with trace.span("record"):
            reading = await plane.registers.read(name, want_payload=want_payload)
    found = _try_cached(plane, name, bucket, key, version_id, reading)
    if found is not None:
        return found
    record = decode_record(reading.value)
    departure = _departure_of(record, version_id)
    while departure is not None:
        arrived = await _has_arrived(plane, bucket, departure)
        reading = await plane.registers.read(name, want_payload=want_payload)
        record, before = decode_record(reading.value), departure
        departure = _departure_of(record, version_id)
        if departure is None or departure.id != before.id:
            continue  # the new key may have forgotten that it has arrived
        if arrived:
            raise NoSuchVersion(VersionId=version_id) if version_id else NoSuchKey
        break  # it was here when the new key was looked at
    entry = await named_entry(plane, name, record, version_id) if version_id else current_entry(record)
    numbered = entry.version.bucket_key
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries, numbered)
    if bucket_key is None:
        bucket_key = await plane.keys.bucket_key(bucket.id, bucket.countries, numbered)
    borrowed = borrowed_by(record, entry.ordinal)
    found = _open(plane, name, bucket, key, entry, bucket_key, reading, version_id, borrowed)
    if departure is not None:
        plane.opened_records.drop(Place(bucket.id, key))  # it may leave without a change of this record
    return found


def _departure_of(record: ObjectRecord, version_id: str = "") -> Departure | None:
    """Of the version, the current one when ``version_id`` is empty, if it is being renamed (``write.departures``)."""
    named = version_id or (record.versions[0].version_id if record.versions else "")
    return sharing_of(record).departure if named == NULL_VERSION else None


async def _has_arrived(plane: ObjectPlane, bucket: BucketRecord, departure: Departure) -> bool:
    """Whether the new key has what departs. Raises ServiceUnavailable."""
    new = object_name(bucket.id, bucket.shard_numbers, departure.key)
    try:
        return has_arrived((await plane.registers.read(new)).value, departure.id)
    except DataDamaged:
        return False  # nothing can be said of the new key, and this one has the object


def current_entry(record: ObjectRecord) -> Entry:
    """The current version. Raises NoSuchKey."""
    if not record.versions:
        raise NoSuchKey
    entry = newest_in(record)
    if entry.version.delete_marker:
        raise NoSuchKey(DeleteMarker="true", MarkerVersionId=entry.name)
    return entry


async def named_entry(plane: ObjectPlane, name: RegisterName, record: ObjectRecord, version_id: str) -> Entry:
    """A version by its id. Raises NoSuchVersion, MethodNotAllowed, InvalidArgument, DataDamaged."""
    wanted = required_name(version_id)
    entry = await find_entry(plane.pages, name, record, wanted)
    if entry is None:
        raise NoSuchVersion(VersionId=version_id)
    if entry.version.delete_marker:
        raise MethodNotAllowed(
            DeleteMarker="true", MarkerVersionId=version_id, ModifiedMs=str(entry.version.modified_ms)
        )
    return entry


def try_find(
    plane: ObjectPlane, name: RegisterName, bucket: BucketRecord, key: bytes, reading: Reading
) -> Found | None:
    """As ``find``, of the newest version. None: its bucket key must be fetched, or another key looked at."""
    found = _try_cached(plane, name, bucket, key, "", reading)
    if found is not None:
        if found.cached is not None:
            found.cached.steady = True  # not in ``find``: a guess comes to nothing where replicas do not agree at once
        return found
    record = decode_record(reading.value)
    if _departure_of(record) is not None:
        return None
    entry = current_entry(record)
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries, entry.version.bucket_key)
    if bucket_key is None:
        return None
    borrowed = borrowed_by(record, entry.ordinal)
    return _open(plane, name, bucket, key, entry, bucket_key, reading, borrowed=borrowed)


def _try_cached(
    plane: ObjectPlane, name: RegisterName, bucket: BucketRecord, key: bytes, version_id: str, reading: Reading
) -> Found | None:
    """The newest version, when this record was opened lately under the bucket key that is still held."""
    value, payload = reading
    if value is None or version_id:
        return None
    place = Place(bucket.id, key)
    cached = plane.opened_records.get(place, value)
    if cached is None:
        return None
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries, cached.opened.version.bucket_key)
    if bucket_key is not None and bucket_key is cached.bucket_key():
        return Found(name, cached.opened, _shown(plane, bucket, cached.version_id), payload, cached, cached.lock)
    plane.opened_records.drop(place)
    return None


def _shown(plane: ObjectPlane, bucket: BucketRecord, version_id: str) -> str:
    return version_id if not bucket.plain and plane.versioning(bucket) else ""


def _open(
    plane: ObjectPlane,
    name: RegisterName,
    bucket: BucketRecord,
    key: bytes,
    entry: Entry,
    bucket_key: BucketKey,
    reading: Reading,
    version_id: str = "",
    borrowed: Borrowed | None = None,
) -> Found:
    """Opens a version with the key that it names, and caches it when it is the newest. Raises DataDamaged."""
    (value, payload), version, place = reading, entry.version, Place(bucket.id, key)
    opened = open_version(place, version, bucket_key)
    shown = _shown(plane, bucket, entry.name)
    # the sealed fields were read, and are of no further use
    opened = opened._replace(
        version=msgspec.structs.replace(version, listing=b"", wrapped_key=b"", meta=b""), borrowed=borrowed
    )
    if value is None or version_id:
        return Found(name, opened, shown, payload, None, entry.kept.lock)
    cached = OpenedRecord(value, bucket_key, opened, entry.name, entry.kept.lock)
    plane.opened_records.put(place, cached)
    return Found(name, opened, shown, payload, cached, entry.kept.lock)
