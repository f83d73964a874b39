"""Events of a key: they enter its record with the change that they report, and leave it when they are delivered.

Theory of operation. A record has an *outbox*: the key's events that no destination has acknowledged yet, at most
``PENDING_MAX``, oldest first (``History.outbox``). A change of a key adds its events in the compare-and-set that makes
it. So there is an event if and only if the change was committed, whatever process dies at what moment, and the outbox
has the events in the order of the register. When it is full, the change is refused with SlowDown, and nothing is lost.
A deleted key with events stays a hidden row, which no floor and no expunger removes.

A deliverer sends the oldest event of a destination first, and removes it by compare-and-set after the destination has
acknowledged it (``remove``). If it dies in between, another process sends the event again: at least once, with the
same sequencer, which is the sequence of the register at the change.

To find the outboxes, each key with events is noted in a register of its shard (``event_name``): the *pointer*. It is
derived, and may name a key whose outbox is empty. But a key with events is always named:

1. A change notes its key there between its promise and its accept, with a new *stamp* (``note``).
2. A key is removed from the pointer only after a settling round of its register, which began after the stamp was read,
   has found its outbox empty, and only if the stamp is still the same (``forget``).

A settling round ends all promises that were given before it. A change that noted its key before the stamp was read has
its promise ended, and accepts nothing: it begins again, with another promise and another stamp. A change that noted it
later has changed the stamp. So no accept with events can follow the removal of its pointer.

Events are sealed in the record: they have ETags, which storage nodes must not read.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from storaged.errors import DataDamaged, SlowDown
from storaged.meta.names import Change, RegisterName, Value, Visibility, event_name
from storaged.objects.code.history import Draft
from storaged.objects.code.versions import Place, decode_record
from storaged.objects.configuration.notification import NOTIFICATION, Notification
from storaged.objects.pending_events import EventFacts, Origin, PendingEvent, PendingKeys
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import BucketRecord
from storaged.wire import decode, encode

PENDING_MAX = 32
"""Of one key, for all destinations together. A record with this many is 12 KB longer."""
KEYS_MAX = 64
KEYS_BYTES_MAX = 32 * 1024
"""Of one pointer."""
STAMP_BYTES = 8
_TIME_BYTES = 6
ID_BYTES = 16
_LABEL = b"event"

TOO_MANY = (
    "Events of this key, or of many keys, could not be delivered: the destination of the bucket's notifications does"
    " not answer. Nothing was changed. Please retry."
)


def rules_of(plane: ObjectPlane, bucket: BucketRecord) -> Notification | None:
    """None: no event of the bucket goes anywhere. Raises DataDamaged, ServiceUnavailable."""
    if bucket.plain:
        return None
    found = plane.configurations.of(bucket).get(NOTIFICATION)
    return found if found is not None and found.rules else None


class Outgoing:
    """The events of one change of a key."""

    def __init__(
        self,
        plane: ObjectPlane,
        bucket: BucketRecord,
        name: RegisterName,
        rules: Notification,
        origin: Origin,
        key: BucketKey,
    ) -> None:
        """``key``: the bucket's newest."""
        self._plane = plane
        self._bucket = bucket
        self._place = Place(bucket.id, name.key)
        self._name = name
        self._rules = rules
        self._origin = origin
        self._key = key
        self._count = 0
        """Of the events of this run of the change."""

    def begin(self) -> None:
        """A run of the change begins: what an earlier one added counts no more."""
        self._count = 0

    def add(
        self, draft: Draft, sequence: int, *, what: str = "", size: int = 0, etag: str = "", version: str = ""
    ) -> None:
        """Adds the events of a change to its draft. ``what``: the second half of the event's name, if the origin does
        not have it; ``version``: the id that clients see. Raises SlowDown when the outbox is full.
        """
        plane, origin = self._plane, self._origin
        added: list[PendingEvent] = []
        event = f"{origin.name}:{what}" if what else origin.name
        for rule in self._rules.wanting(event, self._place.key):
            facts = EventFacts(
                event,
                rule.destination,
                rule.id,
                sequence,
                plane.clock.wall_ms(),
                size,
                etag,
                version if version != "null" else "",
                origin.requester,
                origin.remote,
                origin.request_id,
                self._count + len(added),
            )
            event_id = plane.entropy(ID_BYTES)
            sealed = self._key.seal_list(encode(facts), _context(self._place, event_id))
            added.append(PendingEvent(event_id, self._key.version, sealed))
        self._count += len(added)
        if added and len(draft.outbox) + len(added) > PENDING_MAX:
            raise SlowDown(TOO_MANY)
        draft.outbox = (*draft.outbox, *added)

    async def note(self) -> None:
        """Notes the key in its pointer, if the change has events. To be awaited between promise and accept. Raises
        SlowDown, ServiceUnavailable.
        """
        if self._count:
            await note(self._plane, self._name)

    def committed(self) -> None:
        """The change is committed: this process delivers its events soon, unless it dies."""
        if self._count:
            self._plane.on_events(self._bucket, self._name)


async def outgoing(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, origin: Origin) -> Outgoing | None:
    """None: no rule of the bucket can want the events of a change. Raises as ``KeyService.bucket_key``."""
    rules = rules_of(plane, bucket)
    if rules is None:
        return None
    return Outgoing(plane, bucket, name, rules, origin, await plane.keys.bucket_key(bucket.id, bucket.countries))


def _context(place: Place, event_id: bytes) -> bytes:
    return pack_context(b"", (place.bucket_id, place.key, _LABEL, event_id))


def open_event(place: Place, event: PendingEvent, key: BucketKey) -> EventFacts:
    """Raises DataDamaged for an event that no gateway wrote for this key."""
    try:
        return decode(key.open_list(event.sealed, _context(place, event.id)), EventFacts)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"An event in the outbox of this key does not open: {error}") from None


# --- pointers


def decode_keys(value: Value | None) -> PendingKeys:
    """Raises DataDamaged: what can't be read is never replaced, or keys that it names would be lost."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return PendingKeys({})
    try:
        return decode(value.body, PendingKeys)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The register of keys with events cannot be read: {error}") from None


def _pointer_change(stamps: Mapping[bytes, bytes]) -> Change:
    if not stamps:
        return Change(b"", Visibility.TOMBSTONE)
    return Change(encode(PendingKeys(dict(stamps))))


def stamped_ms(stamp: bytes) -> int:
    """When a key was noted last."""
    return int.from_bytes(stamp[:_TIME_BYTES], "big")


async def note(plane: ObjectPlane, name: RegisterName) -> None:
    """Notes a key in its pointer, under a new stamp. Raises SlowDown when too many keys have events, and
    ServiceUnavailable.
    """
    stamp = plane.clock.wall_ms().to_bytes(_TIME_BYTES, "big") + plane.entropy(STAMP_BYTES)

    def update(value: Value | None) -> Change:
        found = decode_keys(value)
        stamps = dict(found.stamps)
        if name.key not in stamps and (
            len(stamps) >= KEYS_MAX or sum(map(len, stamps)) + len(name.key) > KEYS_BYTES_MAX
        ):
            raise SlowDown(TOO_MANY)
        stamps[name.key] = stamp
        return _pointer_change(stamps)

    await plane.registers.change(event_name(name), update)


async def forget(plane: ObjectPlane, name: RegisterName, stamp: bytes) -> bool:
    """Removes a key from its pointer, if its outbox is empty. ``stamp``: as the pointer had it, read before this call.
    Returns whether the outbox is empty. Raises ServiceUnavailable, DataDamaged.
    """
    record = decode_record(await plane.registers.settle(name))
    if record.history is not None and record.history.outbox:
        return False

    def update(value: Value | None) -> Change | None:
        stamps = dict(decode_keys(value).stamps)
        if stamps.get(name.key) != stamp:
            return None
        del stamps[name.key]
        return _pointer_change(stamps)

    await plane.registers.change(event_name(name), update)
    return True
