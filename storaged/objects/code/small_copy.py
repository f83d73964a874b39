"""Whether what a replica offers is the small copy that a record names. Pure.

Copies travel from replica to replica without keys: a gateway carries one in a settling round, and a disk that was away
fetches one. The record has the copy's hash, so a replica that lies can't have its own bytes carried. Records of version
0.1.0 have none: then the copy must be what its own header says, and its reader finds a false one.
"""

from __future__ import annotations

import msgspec

from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.hashes import is_fragment
from storaged.meta.names import RegisterName, Value
from storaged.objects.records import PartEntry, decode_object
from storaged.wire import Buffer, decode


def is_small_copy(name: RegisterName, value: Value, header: bytes, payload: Buffer) -> bool:
    """``value``: of the register ``name``. ``header``: the copy's encoded fragment header, at any position."""
    try:
        copy = decode(header, FragmentHeader)
        fragment, entry = FragmentId.unpack(copy.id), _entry(value)
    except (msgspec.MsgspecError, ValueError):
        return False
    if entry is None or len(copy.hashes) != 1 or entry.copy_hash not in (b"", copy.hashes[0]):
        return False
    return (
        fragment[:3] == (value.payload, 0, 1)
        and (copy.owner, copy.part_header) == (name.pack(), b"")
        and (copy.cell_bytes, copy.length) == (1 << entry.header[5], len(payload))
        and is_fragment((payload,), copy.hashes[0])
    )


def _entry(value: Value) -> PartEntry | None:
    """Of the copy. Raises msgspec.MsgspecError."""
    record = decode_object(value.body)
    parts = [part for version in record.versions for part in version.parts]
    if record.history is not None and record.history.copied is not None:
        parts.append(record.history.copied)
    return next((part for part in parts if part.small and part.data_id == value.payload and len(part.header) > 5), None)
