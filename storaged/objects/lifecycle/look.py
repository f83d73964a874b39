"""A look at one key: what is due of it goes, by one compare-and-set that judges everything again.

Theory of operation. A look reads the record and finds what seems to be due (``find``). Then it changes the record, and
the update judges each of these versions once more, by the record that it is about to change: its age, its tags and
size, its successor and how many versions are newer, its lock. It judges by the rules and the versioning of the bucket,
from a record of the bucket that was read at most ``bucket_cache_s`` ago (``Judge``), and by a time on which a majority
of the storage nodes agrees (``plane.agreed_ms``). So nothing that changed since the index, or since the look began,
lets a version go early.

Noncurrent versions go before a delete marker that they leave alone, in the same change. A version that a lock keeps
stays, and is looked at again when its retention ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from storaged.errors import AccessDenied, NoSuchBucket, ServiceUnavailable, SlowDown
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import RegisterName, object_name
from storaged.objects.bucket_keys import BucketKeys, with_keys
from storaged.objects.code.history import Draft, Entry, entries_on, newest_in
from storaged.objects.code.lifecycle import Rules, Subject, current_due, due_day, marker_due, noncurrent_due, rules_of
from storaged.objects.code.lock import check_removal
from storaged.objects.code.version_names import NULL_NAME, VersionName
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import Place, decode_record, open_version
from storaged.objects.configuration.kinds import VERSIONING
from storaged.objects.pending_events import EXPIRED, Origin
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, Lock, ObjectRecord
from storaged.objects.write.delete import new_marker
from storaged.objects.write.loans import retire_gone
from storaged.objects.write.outbox import PENDING_MAX, Outgoing
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.versioned import Gone, change_versions

VERSIONS_A_LOOK = 100
"""Noncurrent versions that one change deletes at most; the next change takes the others."""
VERSIONS_WITH_EVENTS = 8
"""The same where each of them makes an event: the outbox of a key has room for 32."""
ROOM_S = 5.0
ROOM_WAITS = 20
"""How long, and in how many steps, a look that has filled the outbox waits until events are delivered."""
ATTEMPTS_MAX = 10
EXPIRY = Origin(EXPIRED)

T = TypeVar("T")


class Stale(Exception):
    """The record of the bucket has to be read again."""


class KnownBuckets(Protocol):
    """``api.Buckets``: what a look asks of it."""

    def try_get(self, name: str) -> BucketRecord | None: ...

    async def get(self, name: str) -> BucketRecord: ...


class Judge:
    """By what looks at keys of one bucket judge: its rules as they are now, and a time that is agreed."""

    def __init__(self, plane: ObjectPlane, buckets: KnownBuckets, bucket: BucketRecord) -> None:
        self._plane = plane
        self._buckets = buckets
        self._bucket = bucket
        self.day_ms = plane.limits.lifecycle_day_ms

    async def renew(self) -> None:
        """Raises NoSuchBucket."""
        if (await self._buckets.get(self._bucket.name)).id != self._bucket.id:
            raise NoSuchBucket(BucketName=self._bucket.name)

    def bucket_read(self) -> BucketRecord:
        """A record of the bucket, perhaps an older one."""
        return self._buckets.try_get(self._bucket.name) or self._bucket

    def bucket(self) -> BucketRecord:
        """The bucket's record, at most ``bucket_cache_s`` old. Raises Stale."""
        record = self._buckets.try_get(self._bucket.name)
        if record is None or record.id != self._bucket.id:
            raise Stale
        return record

    def rules(self) -> Rules:
        """Raises Stale, DataDamaged."""
        return self._plane.configurations.of(self.bucket()).derive(rules_of)

    def versioning(self) -> str:
        found = self._plane.configurations.of(self.bucket()).get(VERSIONING)
        return found.status if found is not None else ""

    def now_ms(self) -> int:
        """Raises ServiceUnavailable while no time is agreed."""
        now_ms = self._plane.now_agreed_ms()
        if now_ms is None:
            raise ServiceUnavailable("The storage nodes' clocks are not known yet, so nothing expires.")
        return now_ms

    def today(self) -> int:
        return self.now_ms() // self.day_ms

    async def fresh(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns once the bucket's record is new enough."""
        for _ in range(ATTEMPTS_MAX):
            try:
                return attempt()
            except Stale:
                await self.renew()
        raise SlowDown("The record of the bucket is out of date again and again; lifecycle goes on later.")


@dataclass
class Found:
    """What seems to be due of a key: the ``current`` version, the delete ``marker`` that is the last version, these
    ``noncurrent`` versions, and ``more``. ``later``: the days on which something else will be. ``locked``: versions
    that would be due.
    """

    current: bool = False
    marker: bool = False
    noncurrent: list[VersionName] = field(default_factory=list)
    more: bool = False
    later: list[int] = field(default_factory=list)
    locked: int = 0

    @property
    def due(self) -> bool:
        return self.current or self.marker or bool(self.noncurrent)

    def first_day(self, today: int) -> int | None:
        """When the key has to be looked at; None: never, as far as the record says."""
        return today if self.due else min(self.later, default=None)


@dataclass
class Looked:
    """What a look did. ``early``: nothing was due."""

    expired: int = 0
    noncurrent: int = 0
    markers: int = 0
    locked: int = 0
    early: int = 0

    def add(self, other: Looked) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def _name_of(entry: Entry) -> VersionName:
    return NULL_NAME if entry.is_null else VersionName(entry.ordinal, entry.version.context_id)


def _subject(place: Place, keys: BucketKeys, entry: Entry) -> Subject:
    """Its tags raise KeyNeeded, DataDamaged."""
    version = entry.version
    return Subject(
        place.key,
        version.size,
        version.modified_ms,
        lambda: open_version(place, version, keys.known(version.bucket_key)).meta.tags,
    )


def _unlocked_day(lock: Lock | None, now_ms: int, day_ms: int) -> int | None:
    """When a locked version may go; 0: now; None: it has a legal hold."""
    if lock is None or (not lock.hold and lock.until_ms <= now_ms):
        return 0
    return None if lock.hold else due_day(lock.until_ms, 0, day_ms)


class _Finder:
    """Looks at the versions of a key, the newest first."""

    def __init__(self, place: Place, keys: BucketKeys, judge: Judge, rules: Rules) -> None:
        self._place = place
        self._keys = keys
        self._judge = judge
        self._rules = rules
        self._now_ms = judge.now_ms()
        self._today = self._now_ms // judge.day_ms
        self._newer = -1
        self._successor: Entry | None = None
        self.found = Found()

    def see(self, entry: Entry) -> None:
        """Raises KeyNeeded."""
        subject, day_ms = _subject(self._place, self._keys, entry), self._judge.day_ms
        is_marker = entry.version.delete_marker
        if self._successor is not None:
            since_ms = self._successor.version.modified_ms
            due = noncurrent_due(self._rules, subject, since_ms, self._newer, is_marker=is_marker, day_ms=day_ms)
            if due is not None:
                self._see_noncurrent(entry, due.day)
        elif not is_marker:
            due = current_due(self._rules, subject, day_ms)
            if due is not None and due.day <= self._today:
                self.found.current = True
            elif due is not None:
                self.found.later.append(due.day)
        self._successor = entry
        self._newer += 1

    def _see_noncurrent(self, entry: Entry, day: int) -> None:
        found = self.found
        if day > self._today:
            found.later.append(day)
            return
        unlocked = _unlocked_day(entry.kept.lock, self._now_ms, self._judge.day_ms)
        if unlocked is None or unlocked > self._today:
            found.locked += 1
            found.later += [unlocked] if unlocked is not None else []
        else:
            found.noncurrent.append(_name_of(entry))
            found.more = len(found.noncurrent) >= VERSIONS_A_LOOK

    def see_last(self, entry: Entry) -> None:
        """It is the only version of its key."""
        due = marker_due(self._rules, self._place.key, entry.version.modified_ms, self._judge.day_ms)
        if due is None or not entry.version.delete_marker:
            return
        if due.day <= self._today:
            self.found.marker = True
        else:
            self.found.later.append(due.day)


async def find(
    plane: ObjectPlane, judge: Judge, bucket: BucketRecord, key: bytes, record: ObjectRecord, keys: BucketKeys
) -> Found:
    """What seems to be due of a record. Raises DataDamaged, ServiceUnavailable, NoSuchBucket."""
    if not record.versions:
        return Found()
    rules = await judge.fresh(judge.rules)
    finder = _Finder(Place(bucket.id, key), keys, judge, rules)
    history = record.history
    if history is None or not rules.noncurrent:
        newest = newest_in(record)
        await with_keys(keys, lambda: finder.see(newest))
    else:
        name = object_name(bucket.id, bucket.shard_numbers, key)
        async for entry in every_entry(plane.pages, name, record):
            await with_keys(keys, lambda entry=entry: finder.see(entry))  # type: ignore[misc]
            if finder.found.more:
                break
    if len(record.versions) == 1 and (history is None or not any(history.levels)):
        finder.see_last(newest_in(record))
    return finder.found


async def look_at(plane: ObjectPlane, judge: Judge, bucket: BucketRecord, key: bytes) -> Looked:
    """Deletes what is due of a key, and notes when it has to be looked at again. Raises DataDamaged,
    ServiceUnavailable, SlowDown, NoSuchBucket; then the key has to be looked at again.
    """
    name, total = object_name(bucket.id, bucket.shard_numbers, key), Looked()
    plane.counters.lifecycle_looks += 1
    more = True
    while more:
        keys = BucketKeys(plane, bucket)
        record = await _record_of(plane, name, waits=ROOM_WAITS if total.noncurrent else 0)
        found = await find(plane, judge, bucket, key, record, keys)
        total.locked += found.locked
        if not found.due:
            total.early += total == Looked()
            _note(plane, bucket, key, found.later)
            break
        outgoing = await outgoing_of(plane, judge.bucket_read(), name, EXPIRY)
        if outgoing is not None:
            del found.noncurrent[VERSIONS_WITH_EVENTS:]
        expiry = _Expiry(plane, judge, bucket, key, found, keys, outgoing)
        removed = await expiry.carry_out()
        retire_gone(plane, bucket, name, removed)
        total.add(expiry.done)
        more = (found.more or outgoing is not None) and expiry.done.noncurrent > 0
        _note(plane, bucket, key, found.later + expiry.later)
    counters = plane.counters
    counters.lifecycle_expired += total.expired
    counters.lifecycle_noncurrent += total.noncurrent
    counters.lifecycle_markers += total.markers
    return total


async def _record_of(plane: ObjectPlane, name: RegisterName, *, waits: int) -> ObjectRecord:
    """The record of a key; after ``waits`` also while its outbox has no room for the events of another change."""
    while True:
        record = decode_record((await plane.registers.read(name)).value)
        pending = len(record.history.outbox) if record.history is not None else 0
        if not waits or pending + VERSIONS_WITH_EVENTS <= PENDING_MAX:
            return record
        waits -= 1
        await asyncio.sleep(ROOM_S / ROOM_WAITS)


def _note(plane: ObjectPlane, bucket: BucketRecord, key: bytes, later: list[int]) -> None:
    if later:
        plane.notes.add(bucket, key, min(later))


class _Expiry:
    """One change of a record: deletes of ``found`` what is due. ``done``, ``later``: of the last run of ``edit``."""

    def __init__(
        self,
        plane: ObjectPlane,
        judge: Judge,
        bucket: BucketRecord,
        key: bytes,
        found: Found,
        keys: BucketKeys,
        outgoing: Outgoing | None,
    ) -> None:
        """``outgoing``: the events of the change."""
        self._plane = plane
        self._outgoing = outgoing
        self._judge = judge
        self._place = Place(bucket.id, key)
        self._name = object_name(bucket.id, bucket.shard_numbers, key)
        self._found = found
        self._keys = keys
        self._marker_id = plane.entropy(DATA_ID_BYTES)
        self.done = Looked()
        self.later: list[int] = []

    async def carry_out(self) -> Gone:
        """Returns the versions that were removed. Raises as ``look_at``."""
        note = self._outgoing.note if self._outgoing is not None else None
        for _ in range(ATTEMPTS_MAX):
            try:
                _, removed = await change_versions(
                    self._plane, self._keys, self._name, self._edit, self._check_lock, after_promise=note
                )
            except Stale:
                await self._judge.renew()
            else:
                if self._outgoing is not None:
                    self._outgoing.committed()
                return removed
        raise SlowDown("The record of the bucket is out of date again and again; lifecycle goes on later.")

    def _check_lock(self, entry: Entry) -> None:
        check_removal(entry.kept.lock, self._judge.now_ms(), bypass=False)

    def _edit(self, draft: Draft, ordinal: int) -> bool:
        self.done, self.later = Looked(), []
        if self._outgoing is not None:
            self._outgoing.begin()
        rules, now_ms = self._judge.rules(), self._judge.now_ms()
        today = now_ms // self._judge.day_ms
        # The oldest first: so how many are newer than the others does not change.
        for name in reversed(self._found.noncurrent):
            self._remove_noncurrent(draft, name, rules, today, ordinal)
        if self._found.current:
            self._expire_current(draft, rules, today, now_ms, ordinal)
        self._remove_last(draft, rules, today, ordinal)
        return bool(self.done.expired or self.done.noncurrent or self.done.markers)

    def _tell(self, draft: Draft, ordinal: int, what: str, entry: Entry) -> None:
        """Adds the event of a version that went, or of a marker that came. Raises SlowDown."""
        if self._outgoing is not None:
            self._outgoing.add(draft, ordinal, what=what, version=entry.name)

    def _try_remove(self, draft: Draft, entry: Entry) -> bool:
        try:
            draft.remove(entry)
        except AccessDenied:
            self.done.locked += 1
            day = _unlocked_day(entry.kept.lock, self._judge.now_ms(), self._judge.day_ms)
            self.later += [day] if day is not None else []
            return False
        return True

    def _remove_noncurrent(self, draft: Draft, name: VersionName, rules: Rules, today: int, ordinal: int) -> None:
        entry = draft.find(name)
        place = successor_of(draft, entry.ordinal) if entry is not None else None
        if entry is None or place is None:
            return  # it is gone, or it is the current version now
        successor, newer = place
        due = noncurrent_due(
            rules,
            _subject(self._place, self._keys, entry),
            successor.version.modified_ms,
            newer - 1,
            is_marker=entry.version.delete_marker,
            day_ms=self._judge.day_ms,
        )
        if due is not None and due.day <= today:
            if self._try_remove(draft, entry):
                self.done.noncurrent += 1
                self._tell(draft, ordinal, "Delete", entry)
        elif due is not None:
            self.later.append(due.day)

    def _expire_current(self, draft: Draft, rules: Rules, today: int, now_ms: int, ordinal: int) -> None:
        newest = draft.newest
        if newest is None or newest.version.delete_marker:
            return
        due = current_due(rules, _subject(self._place, self._keys, newest), self._judge.day_ms)
        if due is None:
            return
        if due.day > today:
            self.later.append(due.day)
            return
        bucket, versioning = self._judge.bucket(), self._judge.versioning()
        if not versioning and not draft.has_history:
            if self._try_remove(draft, newest):
                self.done.expired += 1
                self._tell(draft, ordinal, "Delete", newest)
            return
        marker = new_marker(bucket, versioning, self._marker_id, now_ms, ordinal)
        before = draft.null() if marker.is_null else None
        if before is not None and not self._try_remove(draft, before):
            return
        draft.add(marker)
        self.done.expired += 1
        self._tell(draft, ordinal, "DeleteMarkerCreated", marker)
        self.later.append(due_day(now_ms, 0, self._judge.day_ms))

    def _remove_last(self, draft: Draft, rules: Rules, today: int, ordinal: int) -> None:
        """A delete marker that is the last version of its key."""
        entries, pages, _ = draft.layers()
        if len(entries) != 1 or pages or not entries[0].version.delete_marker or self.done.expired:
            return
        due = marker_due(rules, self._place.key, entries[0].version.modified_ms, self._judge.day_ms)
        if due is not None and due.day <= today:
            last = entries[0]
            if self._try_remove(draft, last):
                self.done.markers += 1
                self._tell(draft, ordinal, "Delete", last)
        elif due is not None:
            self.later.append(due.day)


def successor_of(draft: Draft, ordinal: int) -> tuple[Entry, int] | None:
    """The version that came after the one with this ordinal, and how many are newer than it; None: it is the newest.
    Raises PageNeeded.
    """
    entries, refs, shelf = draft.layers()
    newer = [entry for entry in entries if entry.ordinal > ordinal]
    count, nearest = len(newer), newer[-1] if newer else None
    between = None
    while refs:
        inside = None
        for ref in refs:
            if ref.oldest > ordinal:
                count, between = count + ref.count, ref
            elif ref.newest >= ordinal:
                inside = ref
                break
        if inside is None:
            break
        page = shelf.page(inside)
        on_page = [entry for entry in entries_on(page) if entry.ordinal > ordinal]
        if on_page:
            count, nearest, between = count + len(on_page), on_page[-1], None
        refs = list(page.refs)
    while between is not None:
        page = shelf.page(between)
        if page.refs:
            between = page.refs[-1]
        else:
            nearest, between = entries_on(page)[-1], None
    return (nearest, count) if nearest is not None else None
