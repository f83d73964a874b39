"""Departures: the version of a key becomes that of another key of its bucket, and of no second one.

Theory of operation. Two keys are two registers, and no change is one of both. A rename makes three changes:

1. The record of the old key gets a *departure*: the new key, and a random id. That is a compare-and-set of the record
   that has the version, and no other departure (``depart``).
2. The new key gets the version, and its record an *arrival*: the old key, and the same id. This decides: from here on
   the version belongs to the new key.
3. The version of the old key goes, and its departure with it (``finish``).

The arrival stays in the record of the new key until the departure is gone, whatever becomes of the version there.

Between its promise and its accept, the second change looks at the departure (``check_departing``). It accepts nothing
when the departure is marked or gone. Each change that removes the version removes the departure too. While there is
one, the metadata of the version does not change (``make_way``).

*Ending.* A rename that dies after the first change leaves its departure. A request that meets it there, or the walk
(``end_old``), ends it as a loan is ended (``loans``, *Ending*): it marks the departure, settles the register of the new
key, and removes the departure if the mark is still its own. The version goes with it if the new key has the arrival.
The round at the new key ends all promises that were given before it, or brings their accept into its value. A look at
the departure that came after the mark accepts nothing. So no version arrives whose departure was ended without it.

Hence:

* The old key loses the version only when the new key has got it.
* Of several renames of a version one arrives at most. What has arrived never comes back to the old key, also when it is
  replaced, removed or renamed again before its departure has ended.
* Between the second and the third change both records have the version, and a list may show both. Who reads a key whose
  version departs looks at the new key, too (``read.find``), and does not find at the old key what has arrived. So
  readers find the version under one key, until somebody replaces or removes it.

A version that somebody replaces while it departs may arrive nevertheless, if the second change had looked before.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from storaged.errors import AccessDenied, SlowDown, StoragedError
from storaged.meta.names import RegisterName, object_name
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft, Entry
from storaged.objects.code.lending import departure_in, has_arrived
from storaged.objects.code.versions import decode_record
from storaged.objects.pending_events import REMOVED, Origin
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, sharing_of
from storaged.objects.sharing import Arrival, Borrowed, Departure
from storaged.objects.write.loans import FRESH_MS, MARK_BYTES, end_unused, retire_gone
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.versioned import change_versions, unlocked

BUSY_MS = 60_000
"""A departure that is younger, by this gateway's clock, is left to its request. Nothing else depends on it."""
ARRIVALS_MAX = 8
"""In one record. A further rename to its key waits until departures have ended."""
BUSY = "The object is being renamed by another request. Nothing was changed. Please retry."


class Departing(Exception):
    """The key ``name`` is being renamed by another request."""

    def __init__(self, name: RegisterName, departure: Departure) -> None:
        super().__init__(name.key)
        self.name = name
        self.departure = departure


class Changed(Exception):
    """The version is not that of the key any more, or its departure was ended. Nothing has arrived."""


class Seen(NamedTuple):
    """The version of a key, as it was read before it departs."""

    entry: Entry
    borrowed: Borrowed | None

    def is_current(self, draft: Draft) -> bool:
        """Whether the key has this version still. Where its blocks are does not matter."""
        newest = draft.newest
        if newest is None or draft.borrowed.get(newest.ordinal) != self.borrowed:
            return False
        now, then = newest.version, self.entry.version
        there = msgspec.structs.replace(now, parts=then.parts, manifest=then.manifest, pages=then.pages)
        return newest.ordinal == self.entry.ordinal and there == then


async def depart(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, seen: Seen, departure: Departure
) -> None:
    """Raises Changed, Departing, and as ``change_versions``."""

    def edit(draft: Draft, _ordinal: int) -> bool:
        if not seen.is_current(draft):
            raise Changed
        if draft.departure is not None and draft.departure.id != departure.id:
            raise Departing(name, draft.departure)
        draft.departure = departure
        return True

    await change_versions(plane, BucketKeys(plane, bucket), name, edit)


async def check_departing(plane: ObjectPlane, name: RegisterName, departure_id: bytes) -> None:
    """To be awaited between the promise and the accept of the new key. Raises Changed, ServiceUnavailable."""
    found = departure_in((await plane.registers.read(name)).value)
    if found is None or found.id != departure_id or found.ending:
        raise Changed


async def finish(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, departure: Departure, origin: Origin | None = None
) -> None:
    """After the new key has got the version: removes that of the old one, if it has it still. ``origin``: for the
    events of that. Raises as ``delete``.
    """
    await _end(plane, bucket, name, departure, None, arrived=True, origin=origin)
    plane.background.spawn(_try_forget(plane, bucket, departure))


async def end_departure(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, departure_id: bytes) -> None:
    """Ends a departure whose request may have died. Raises StoragedError: then it stays until the next look at it."""
    mark = plane.entropy(MARK_BYTES)
    departure: Departure | None = None

    def edit(draft: Draft, _ordinal: int) -> bool:
        nonlocal departure
        departure = draft.departure
        if departure is None or departure.id != departure_id:
            departure = None
            return False
        draft.departure = msgspec.structs.replace(departure, ending=mark)
        return True

    await change_versions(plane, BucketKeys(plane, bucket), name, edit)
    if departure is None:
        return
    value = await plane.registers.settle(_name(bucket, departure.key))
    arrived = has_arrived(value, departure_id)
    ended = await _end(plane, bucket, name, departure, mark, arrived=arrived, origin=Origin(REMOVED))
    if ended and arrived:
        plane.background.spawn(_try_forget(plane, bucket, departure))


async def _end(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    departure: Departure,
    mark: bytes | None,
    *,
    arrived: bool,
    origin: Origin | None,
) -> bool:
    """``mark``: of the departure; None: whatever it is. Returns whether there was one."""
    outgoing = await outgoing_of(plane, bucket, name, origin) if arrived and origin is not None else None
    found = False

    def edit(draft: Draft, ordinal: int) -> bool:
        nonlocal found
        now = draft.departure
        found = now is not None and now.id == departure.id and mark in (None, now.ending)
        if not found:
            return False
        draft.departure = None
        if arrived and _remove(draft) and outgoing is not None:
            outgoing.begin()
            outgoing.add(draft, ordinal, what="Delete")
        return True

    note = outgoing.note if outgoing is not None else None
    keys = BucketKeys(plane, bucket)
    _, removed = await change_versions(plane, keys, name, edit, unlocked(plane), after_promise=note)
    if outgoing is not None and found:
        outgoing.committed()
    retire_gone(plane, bucket, name, removed)
    return found


def _remove(draft: Draft) -> bool:
    """False: the version was locked since it departed, and stays."""
    entry = draft.null()
    if entry is None:
        return False
    try:
        draft.remove(entry)
    except AccessDenied:
        return False
    return True


# --- the departures of others


def is_busy(plane: ObjectPlane, departure: Departure) -> bool:
    """Whether the request of a departure may well be at work. A time far in the future is of a wrong clock."""
    now_ms = plane.clock.wall_ms()
    return not departure.ending and now_ms - BUSY_MS < departure.since_ms <= now_ms + BUSY_MS


async def make_way(plane: ObjectPlane, bucket: BucketRecord, met: Departing) -> None:
    """For a change that can't be made while a key is being renamed: ends an old departure. Raises SlowDown for a young
    one, and as ``end_departure``.
    """
    if is_busy(plane, met.departure):
        raise SlowDown(BUSY)
    await end_departure(plane, bucket, met.name, met.departure.id)


async def try_end_departure(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, departure_id: bytes) -> None:
    """As ``end_departure``, in the background."""
    try:
        await end_departure(plane, bucket, name, departure_id)
    except StoragedError:
        return  # the next walk asks for a look at it


async def end_old(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, fresh_ms: int = FRESH_MS) -> int:
    """Ends the renames from and to a key that have died, and the loans that nothing uses (``end_unused``). Returns how
    many loans and arrivals its record has afterwards. Raises StoragedError.
    """
    arrivals = await _end_departures(plane, bucket, name, fresh_ms)
    return arrivals + await end_unused(plane, bucket, name, fresh_ms)


async def _end_departures(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, fresh_ms: int) -> int:
    """A lender has none; that is read as everything of it is."""
    sharing = sharing_of(decode_record((await plane.lender_registers.read(name)).value))
    if sharing.departure is not None and _is_old(plane, sharing.departure, fresh_ms):
        await end_departure(plane, bucket, name, sharing.departure.id)
    return await end_arrivals(plane, bucket, name, fresh_ms) if sharing.arrivals else 0


async def try_end_old(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName) -> None:
    """As ``end_old`` for departures and arrivals, in the background, and as soon as they are not busy any more."""
    try:
        await _end_departures(plane, bucket, name, BUSY_MS)
    except StoragedError:
        return  # the next walk asks for a look at it


def _is_old(plane: ObjectPlane, departure: Departure, fresh_ms: int) -> bool:
    now_ms = plane.clock.wall_ms()
    return bool(departure.ending) or not now_ms - fresh_ms < departure.since_ms <= now_ms + FRESH_MS


# --- arrivals


def arrive(draft: Draft, old: bytes, departure_id: bytes) -> None:
    """Adds the arrival to the draft of the new key. Raises Changed while that has too many."""
    if len(draft.arrivals) >= ARRIVALS_MAX:
        raise Changed
    draft.arrivals = (*draft.arrivals, Arrival(departure_id, old))


async def end_arrivals(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, fresh_ms: int = FRESH_MS) -> int:
    """Ends the departures of renames to this key that have died, and forgets the arrivals whose departure is gone.
    Returns how many arrivals are left. Raises StoragedError.
    """

    async def departure_of(arrival: Arrival) -> Departure | None:
        found = departure_in((await plane.registers.read(_name(bucket, arrival.key))).value)
        return found if found is not None and found.id == arrival.id else None

    arrivals = sharing_of(decode_record((await plane.registers.read(name)).value)).arrivals
    left = len(arrivals)
    for arrival in arrivals:
        departure = await departure_of(arrival)
        if departure is not None and _is_old(plane, departure, fresh_ms):
            await end_departure(plane, bucket, _name(bucket, arrival.key), arrival.id)
            departure = await departure_of(arrival)
        if departure is None:
            await _forget(plane, bucket, name, arrival.id)
            left -= 1
    return left


async def _forget(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, departure_id: bytes) -> None:
    """Removes an arrival whose departure is gone: departures never come back. Raises StoragedError."""

    def edit(draft: Draft, _ordinal: int) -> bool:
        before = draft.arrivals
        draft.arrivals = tuple(arrival for arrival in before if arrival.id != departure_id)
        return draft.arrivals != before

    await change_versions(plane, BucketKeys(plane, bucket), name, edit)


async def _try_forget(plane: ObjectPlane, bucket: BucketRecord, gone: Departure) -> None:
    """As ``_forget``, in the background."""
    try:
        await _forget(plane, bucket, _name(bucket, gone.key), gone.id)
    except StoragedError:
        return  # the next walk asks for a look at it


def _name(bucket: BucketRecord, key: bytes) -> RegisterName:
    return object_name(bucket.id, bucket.shard_numbers, key)
