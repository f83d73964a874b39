"""What a key holds when a version is added to it. Pure.

``add_version`` is the rule for PUTs, copies and Completes. ``overtake`` applies it to a create, the write of a key
without versioning that did not look at what it overwrites (``meta.consensus.overtaking``).
"""

from __future__ import annotations

import msgspec

from storaged.errors import AccessDenied, DataDamaged
from storaged.meta.names import RegisterName, Value
from storaged.objects.code.history import Bounds, Draft, Entry, PageNeeded, Shelf, unversioned
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.records import NULL_VERSION, Kept, Lock, Version

_ROOMY = Bounds(versions_max=1 << 30, versions_bytes_max=1 << 30)
"""An overtaken record gets one version more than others have, so that no page has to be written. The next change moves
versions to pages."""


def add_version(draft: Draft, version: Version, ordinal: int, lock: Lock | None, *, versioning: bool) -> Entry:
    """Adds the newest version. Without versioning it takes the place of all, or of the null version where there are
    versions with ids. ``ordinal``, ``lock``: of a version that is kept among others. Raises PageNeeded, AccessDenied,
    DataDamaged.
    """
    if versioning or draft.has_history:
        added = Entry(Kept(ordinal, lock), version)
    else:
        for before in draft.inline:
            draft.remove(before)
        added = unversioned(version)
    draft.add(added)
    return added


def next_ordinal(value: Value | None) -> int:
    """Greater than that of every version which the register holds: it had each when its sequence was one less."""
    return value.sequence + 1 if value is not None else 1


def overtake(_name: RegisterName, create: Value, below: Value) -> Value | None:
    """As ``meta.consensus.change.Shared``: versions, pending events and what is shared (loans, arrivals) of the value
    below stay.

    None: a record can't be read, a page is needed, or a lock may keep the null version. This function has no clock, so
    it takes a retention that is over for one that lasts.
    """
    try:
        record, new = decode_record(below), decode_record(create)
        if record.history is None:
            return create
        if new.history is not None or [version.version_id for version in new.versions] != [NULL_VERSION]:
            return None
        draft = Draft(record, Shelf(), _ROOMY)
        add_version(draft, new.versions[0], next_ordinal(below), None, versioning=False)
        change = record_change(draft.record(), create.payload)
    except (DataDamaged, AccessDenied, PageNeeded):
        return None
    return msgspec.structs.replace(create, visibility=change.visibility, body=change.body)
