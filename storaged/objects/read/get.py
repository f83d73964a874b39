"""The path of a GET and of a HEAD: the record, the conditions, the range, the bytes.

The record comes from a majority. A small object's sealed bytes lie in the record, or come with it as a copy; they are
opened at once (``HeldStream``), larger ones in memory of a pool if it has room (``LeasedStream``). The bytes of any
other object come from disks, window by window (``VerifiedStream``).
The first window is read and verified before ``get`` returns, so that everything that can go wrong until then is a
proper answer.

Two shells call the same steps. ``get`` and ``head`` run in a task: ``find``, ``_info``, ``_try_open`` or a
``VerifiedStream``. ``try_read`` costs no task: it gets the register's reading by a callback, and goes on with
``try_find``, ``_try_info``, and ``_try_open`` or ``VerifiedStream.try_open``, as long as nothing must be awaited. The
bytes of a record that was opened lately are read at the same time (``guess``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from msgspec import structs

from storaged import trace
from storaged.errors import DataDamaged, ServiceUnavailable, StoragedError
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import (
    NO_READ_CONDITIONS,
    FailedRead,
    ObjectInfo,
    RangeSpec,
    ReadConditions,
    Reading,
    ReadResult,
)
from storaged.objects.code.manifest import sealed_parts_of
from storaged.objects.code.seal import part_key
from storaged.objects.code.versions import Place, info_of, parts_shown, unlock
from storaged.objects.conditions import check_copy_source, check_read
from storaged.objects.encryption import NO_KEY
from storaged.objects.plane import ObjectPlane, OnDamage
from storaged.objects.ports import SealBroken
from storaged.objects.read.borrowed import with_data, with_known_data
from storaged.objects.read.find import Found, find, try_find
from storaged.objects.read.guess import HELD_BYTES_MAX, Guess, try_guess
from storaged.objects.read.span import Span, span_of, span_of_part
from storaged.objects.read.streams import FREE_BYTES_MAX, HeldStream, VerifiedStream, hold_whole, try_hold
from storaged.objects.records import BucketRecord
from storaged.wire import Buffer

READ_AGAIN_MAX = 3
"""A read that misses fragments before its first byte reads the record again: the object may have been replaced
meanwhile.
"""


# --- its metadata, and its bytes when they are here


def _try_info(key: bytes, found: Found) -> ObjectInfo | None:
    """None: the object's parts are listed on pages of their own, which are read each time: they may be 10,000."""
    opened, cached = found.opened, found.cached
    if opened.meta.parts_page:
        return None
    if cached is None:
        return info_of(key, opened, found.version_id, parts_shown(opened, opened.meta.parts), found.lock)
    if cached.info is None or cached.info.version_id != found.version_id:
        cached.info = info_of(key, opened, found.version_id, opened.meta.parts, found.lock)
    return cached.info


async def _info(plane: ObjectPlane, bucket: BucketRecord, key: bytes, found: Found) -> ObjectInfo:
    info = _try_info(key, found)
    if info is not None:
        return info
    opened = found.opened
    context = Place(bucket.id, key).context_of(opened.version)
    parts = await sealed_parts_of(plane.pages, found.name, opened.dek, context, opened.meta)
    if opened.has_customer_key:  # 20 ms for 10,000 parts
        parts = await plane.in_thread(parts_shown, opened, parts)
    return info_of(key, opened, found.version_id, parts, found.lock)


def _unlocked(bucket: BucketRecord, key: bytes, found: Found, customer_key: bytes | None) -> Found:
    """What was found, with the secrets that a customer's key opens. These are never cached: an entry would answer
    requests without the key. ``customer_key``: as of ``head``. Raises InvalidRequest.
    """
    opened = found.opened
    if customer_key is None:
        return Found(found.name, opened, found.version_id, found.copy, None) if opened.has_customer_key else found
    if opened.encryption is None and customer_key == NO_KEY:
        return found
    opened = unlock(Place(bucket.id, key), opened, customer_key)
    return Found(found.name, opened, found.version_id, found.copy, None) if opened.has_customer_key else found


def _sealed_here(found: Found) -> Buffer | None:
    """The sealed bytes of the whole object, when they came with its record."""
    version = found.opened.version
    if len(version.parts) != 1 or version.manifest:
        return None
    part = version.parts[0]
    return part.inline or (found.copy if part.small else None)


def _try_open(plane: ObjectPlane, info: ObjectInfo, wanted: Span, found: Found, sealed: Buffer) -> HeldStream | None:
    """The object as a stream. None: a copy does not open, or there is no room for it. Its replica may lie, and
    ``VerifiedStream`` asks others, and waits for room.
    """
    cached, part = found.cached, found.opened.version.parts[0]
    try:
        stream_key = cached.key if cached is not None else None
        if stream_key is None:
            stream_key = part_key(found.opened.body_dek, part.header, part.data_id, part.number)
            if cached is not None:
                cached.key = stream_key
        if part.size <= FREE_BYTES_MAX:
            held: HeldStream | None = hold_whole(info, wanted, stream_key, part.size, sealed)
        else:
            held = try_hold(plane.get_buffers, info, wanted, stream_key, part.size, sealed)
    except SealBroken:
        return None
    if held is not None:
        plane.counters.gets += 1
        plane.counters.bytes_out += wanted.length
    return held


# --- the shell without a task

_Wanted = tuple[bool, RangeSpec | None]
"""Whether the bytes are wanted, and which of them."""


def try_read(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    want_plain: bool,
    on_read: Callable[[ReadResult], None],
    span: RangeSpec | None = None,
) -> None:
    """See ``api.Objects``."""
    name = object_name(bucket.id, bucket.shard_numbers, key)
    guess = try_guess(plane, name, bucket, key, span) if want_plain else None
    wanted = (want_plain, span)
    on_reading = partial(_on_reading, plane, name, bucket, key, wanted, guess, on_read)
    try:
        plane.registers.try_read(name, want_plain, on_reading)
    except BaseException:  # a mistake of ours: ``get`` meets it again, and ``_on_reading`` does not end the guess
        if guess is not None:
            guess.drop()
        raise


def _on_reading(
    plane: ObjectPlane,
    name: RegisterName,
    bucket: BucketRecord,
    key: bytes,
    wanted: _Wanted,
    guess: Guess | None,
    on_read: Callable[[ReadResult], None],
    reading: Reading | None,
) -> None:
    result: ReadResult = None
    if reading is not None:
        try:
            found = _from_reading(plane, name, bucket, key, wanted, guess, reading)
            if isinstance(found, Guess):
                found.adopt(partial(_on_open, plane, found.stream, reading, on_read))
                return
            if guess is not None:
                guess.drop()
                guess = None
            if isinstance(found, VerifiedStream):
                if found.try_open(partial(_on_open, plane, found, reading, on_read)):
                    return
                found = reading
            result = found
        except StoragedError as error:
            # without the traceback: it holds this frame, which holds the error, and only the collector could free both
            result = error.with_traceback(None)
        except Exception:  # a mistake of ours: ``get`` meets it again, and reports it
            result = None
    if guess is not None:
        guess.drop()
    on_read(result)


def _on_open(
    plane: ObjectPlane,
    stream: VerifiedStream,
    reading: Reading,
    on_read: Callable[[ReadResult], None],
    error: Exception | None,
) -> None:
    if error is None:
        plane.counters.gets += 1
        plane.counters.bytes_out += stream.length
        on_read(stream)
    elif isinstance(error, ServiceUnavailable):  # DataDamaged is one
        on_read(FailedRead(reading, error.with_traceback(None)))
    else:  # it needs a task, or a disk lies
        on_read(reading)


def _from_reading(
    plane: ObjectPlane,
    name: RegisterName,
    bucket: BucketRecord,
    key: bytes,
    wanted: _Wanted,
    guess: Guess | None,
    reading: Reading,
) -> HeldStream | VerifiedStream | Guess | ObjectInfo | Reading:
    """The newest version, or what is known of it; the reading when something must be awaited first. A
    VerifiedStream is not open yet; ``guess`` is returned if it reads that version. Raises NoSuchKey, DataDamaged,
    InvalidRequest, InvalidRange.
    """
    found = try_find(plane, name, bucket, key, reading)
    if found is None:
        return reading
    if found.opened.encryption is not None:
        found = _unlocked(bucket, key, found, NO_KEY)
    info = _try_info(key, found)
    if info is None:
        return reading
    want_plain, spec = wanted
    if not want_plain:
        return info
    on_damage: OnDamage | None = None
    if found.opened.borrowed is not None:
        known = with_known_data(found)
        if known is None:
            return reading
        found, on_damage = known
    if guess is not None and guess.fits(found, info):
        return guess
    span = span_of(spec, info.size)
    sealed = _sealed_here(found)
    if sealed:
        # without the copy: who waits for room must not hold it meanwhile
        return _try_open(plane, info, span, found, sealed) or Reading(reading.value)
    if span.length > HELD_BYTES_MAX:
        return reading
    return VerifiedStream(plane, bucket, found, info, span, on_damage=on_damage)


# --- the shell of a task


async def head(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    *,
    version_id: str = "",
    conditions: ReadConditions = NO_READ_CONDITIONS,
    part_number: int | None = None,
    reading: Reading | None = None,
    customer_key: bytes | None = NO_KEY,
) -> ObjectInfo:
    """See ``api.Objects``."""
    found = await find(plane, bucket, key, version_id, reading=reading)
    found = _unlocked(bucket, key, found, customer_key)
    if conditions != NO_READ_CONDITIONS:
        check_read(conditions, found.opened.meta.etag, found.opened.version.modified_ms)
    info = await _info(plane, bucket, key, found)
    if part_number is not None:
        span_of_part(info, part_number)
    return info


async def get(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    *,
    version_id: str = "",
    conditions: ReadConditions = NO_READ_CONDITIONS,
    span: RangeSpec | None = None,
    part_number: int | None = None,
    as_copy_source: bool = False,
    reading: Reading | None = None,
    failed: ServiceUnavailable | None = None,
    customer_key: bytes = NO_KEY,
) -> HeldStream | VerifiedStream:
    """Opens an object for reading. ``failed``: see ``api.Objects``. Raises as head, and InvalidRange, DataDamaged,
    ServiceUnavailable.
    """
    found = await find(plane, bucket, key, version_id, want_payload=True, reading=reading)
    reading = None
    for attempt in range(READ_AGAIN_MAX):
        found = _unlocked(bucket, key, found, customer_key)
        meta, version = found.opened.meta, found.opened.version
        if conditions != NO_READ_CONDITIONS:
            (check_copy_source if as_copy_source else check_read)(conditions, meta.etag, version.modified_ms)
        info = await _info(plane, bucket, key, found)
        wanted = span_of_part(info, part_number) if part_number is not None else span_of(span, version.size)
        sealed = _sealed_here(found)
        if sealed:
            with trace.span("open"):
                held = _try_open(plane, info, wanted, found, sealed)
            if held is not None:
                return held
            found, sealed = structs.replace(found, copy=None), None  # the wait for room must not hold the copy
        try:
            if failed is not None:
                error, failed = failed, None
                raise error
            whole = found if found.opened.borrowed is None else await with_data(plane, bucket, found)
            stream = VerifiedStream(plane, bucket, whole, info, wanted, as_copy_source=as_copy_source)
            await stream.open()
        except ServiceUnavailable:  # DataDamaged is one
            again = await find(plane, bucket, key, version_id, want_payload=True)
            same = again.opened.version == version and again.opened.borrowed == found.opened.borrowed
            if attempt == READ_AGAIN_MAX - 1 or (same and found.opened.borrowed is None):
                raise
            found = again
        else:
            plane.counters.gets += 1
            return stream
    raise DataDamaged
