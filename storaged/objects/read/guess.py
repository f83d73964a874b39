"""The bytes of an object, read while its record is read.

Theory of operation. A GET of a coded object has two turns of the network: the record from a majority of its replicas,
then fragments from disks. Where the key's record was opened lately, the second turn does not wait for the first: the
requests for fragments leave together with those for the record, often in the same packets. What they bring is used only
if the record turns out to be the one that was opened, to the last byte. Otherwise it is dropped unseen, and the read
begins anew. So an answer is as new as without this: a data id names the same bytes for ever, whenever they are read.

A wrong guess costs one window. So none is made for a key whose record was another one when it was last looked at, or
whose replicas did not agree at once: then a task reads all of it anew (``OpenedRecordCache.likely``). Damage that a
wrong guess meets is none: the fragments may rightly be gone. So damage is reported once the guess proved right.
"""

from __future__ import annotations

from collections.abc import Callable

from storaged.errors import StoragedError
from storaged.meta.names import RegisterName
from storaged.objects.api import ObjectInfo, RangeSpec
from storaged.objects.cache.opened_records import OpenedRecord
from storaged.objects.code.versions import Place
from storaged.objects.plane import Damage, ObjectPlane, OnDamage
from storaged.objects.read.borrowed import with_known_data
from storaged.objects.read.find import Found
from storaged.objects.read.span import Span, span_of
from storaged.objects.read.streams import VerifiedStream
from storaged.objects.records import BucketRecord
from storaged.units import MIB

HELD_BYTES_MAX = 3 * MIB
"""Longer spans have more than one window."""

OnOpen = Callable[[Exception | None], None]


class _Reports:
    """Damage that is reported later, or never."""

    __slots__ = ("_found", "_plane")

    def __init__(self, plane: ObjectPlane) -> None:
        self._plane = plane
        self._found: list[Damage] | None = []

    def note(self, damage: Damage) -> None:
        if self._found is None:
            self._plane.on_damage(damage)
        else:
            self._found.append(damage)

    def send(self) -> None:
        """Reports what was noted, and from now on at once."""
        noted, self._found = self._found, None
        for damage in noted or ():
            self._plane.on_damage(damage)


class Guess:
    """One guess. Either ``adopt`` or ``drop`` is called, once."""

    __slots__ = ("_cached", "_data", "_error", "_info", "_is_open", "_on_open", "_reports", "stream")

    def __init__(
        self,
        plane: ObjectPlane,
        bucket: BucketRecord,
        cached: OpenedRecord,
        found: Found,
        info: ObjectInfo,
        span: Span,
        on_damage: OnDamage | None = None,
    ) -> None:
        """``cached``: the record's entry. ``on_damage`` gets damage in place of the plane, at once. Raises
        DataDamaged.
        """
        self._cached = cached
        self._data = found.cached
        self._info = info
        self._reports = _Reports(plane)
        self._on_open: OnOpen | None = None
        self._is_open = False
        self._error: Exception | None = None
        self.stream = VerifiedStream(plane, bucket, found, info, span, on_damage=on_damage or self._reports.note)

    def begin(self) -> bool:
        """False: nothing was begun, and nothing is to be dropped. Raises DataDamaged, and then neither."""
        return self.stream.try_open(self._opened)

    def fits(self, found: Found, info: ObjectInfo) -> bool:
        """Whether it reads this version."""
        return found.cached is self._data and info is self._info

    def adopt(self, on_open: OnOpen) -> None:
        """The guess was right. ``on_open`` is called as ``VerifiedStream.try_open`` does it."""
        self._reports.send()
        if self._is_open:
            on_open(self._error)
        else:
            self._on_open = on_open

    def drop(self) -> None:
        """The guess was wrong, or nothing is known."""
        self._cached.steady = False
        self.stream.release()

    def _opened(self, error: Exception | None) -> None:
        self._is_open, self._error = True, error
        on_open, self._on_open = self._on_open, None
        if on_open is not None:
            on_open(error)


def try_guess(
    plane: ObjectPlane, name: RegisterName, bucket: BucketRecord, key: bytes, spec: RangeSpec | None
) -> Guess | None:
    """Begins to read bytes of the newest version of a key, as far as it is known. None: nothing was begun."""
    cached = plane.opened_records.likely(Place(bucket.id, key))
    if cached is None or cached.info is None:
        return None
    info = cached.info
    found = Found(name, cached.opened, info.version_id, None, cached, cached.lock)
    on_damage: OnDamage | None = None
    if cached.opened.borrowed is not None:
        known = with_known_data(found)
        if known is None:
            return None
        found, on_damage = known
    opened = found.opened
    version = opened.version
    if (
        not version.parts
        or version.manifest
        or version.parts[0].small
        or version.parts[0].inline
        or opened.has_customer_key
    ):
        return None
    try:
        bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries, version.bucket_key)
        if bucket_key is None or bucket_key is not cached.bucket_key():
            return None
        span = span_of(spec, info.size)
        if not 0 < span.length <= HELD_BYTES_MAX:
            return None
        guess = Guess(plane, bucket, cached, found, info, span, on_damage)
        return guess if guess.begin() else None
    except StoragedError:  # the read that follows the record's meets it again
        return None
