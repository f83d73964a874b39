"""Bodies that begin with what a listing prints, so that a replica can send that part alone without understanding it.
Pure.

    offset  bytes  what
    0       1      0xC1, which no msgpack message begins with
    1       1      where the head begins, from offset 0
    2       2      where it ends (u16 BE)
    4              the message; the head lies in it

A body that begins otherwise has no head, and a listing gets all of it. The writer of the body can tell the two apart.
"""

from __future__ import annotations

import struct

HEAD_MARK = 0xC1
LEAD_BYTES = 4

_LEAD = struct.Struct(">BBH")
assert _LEAD.size == LEAD_BYTES


def with_head(message: bytes, start: int, end: int) -> bytes:
    """The body whose head is ``message[start:end]``. Raises ValueError when the head ends too late for the lead."""
    try:
        return _LEAD.pack(HEAD_MARK, LEAD_BYTES + start, LEAD_BYTES + end) + message
    except struct.error:
        raise ValueError(f"a head lies within the first 255 and 65,535 bytes, not at {start}..{end}") from None


def head_of(body: bytes) -> bytes:
    """The head, or the whole body when it has none."""
    if len(body) < LEAD_BYTES or body[0] != HEAD_MARK:
        return body
    _, start, end = _LEAD.unpack_from(body)
    return body[start:end]


def message_of(body: bytes) -> bytes | None:
    """The message of a body with a head; None when it has none."""
    return body[LEAD_BYTES:] if body[:1] == b"\xc1" else None
