"""What the audit log looks like on disk, entry by entry. No I/O.

A process start begins a chain, whose id is the process's incarnation; a chain lies in one or more files
``audit-ORDINAL-CHAIN-PART.jsonl`` (the ordinal counts the chains of a node, the part the files of a chain), one entry a line::

    {"chain":"<hex>","sequence":7,"time_ms":1767225600000,"kind":"key.release","fields":{...},"previous":"<64 hex>","hash":"<64 hex>"}

``hash`` is SHA-256 over ``sov.audit.v1\\0`` and the line's bytes before ``,"hash":``; ``previous`` is the hash of the entry before. So the bytes as
they lie there are what is hashed, and no canonical form of JSON is needed. Entry 0 (kind ``start``) names the node, its incarnation, and the head of the
chain before it, whose hash is its ``previous``: the chains of a node form one. A file that is full is followed by another, whose first entry has the
kind ``continue``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from storaged.units import KIB
from storaged.wire import Message, encode

ENTRY_LABEL = b"sov.audit.v1\0"
CHECKPOINT_LABEL = b"sov.audit.checkpoint.v1\0"
GENESIS = "0" * 64
"""``previous`` of the very first entry of a node."""

ENTRY_BYTES_MAX: Final = 16 * KIB
_HASH_FIELD = b',"hash":"'
_SUFFIX_BYTES = len(_HASH_FIELD) + 64 + len(b'"}')


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line, decoded."""

    chain: str
    sequence: int
    time_ms: int
    kind: str
    fields: dict[str, Any]
    previous: str
    hash: str


class Predecessor(msgspec.Struct, frozen=True):
    """Of a ``start`` entry: the head of the chain before, and how many unreadable bytes a crash left behind it."""

    chain: str
    sequence: int
    hash: str
    torn_bytes: int


def predecessor_of(entry: Entry) -> Predecessor | None:
    """None for the very first chain. Raises ValueError when the field is malformed."""
    try:
        return msgspec.convert(entry.fields.get("predecessor"), Predecessor | None)
    except msgspec.ValidationError as error:
        raise ValueError(f"the start entry of chain {entry.chain} names its predecessor badly: {error}") from error


class Head(NamedTuple):
    """The last entry of a chain."""

    chain: str
    sequence: int
    hash: str


class Checkpoint(Message, frozen=True):
    """Signed by the key of ``certificate`` (DER) over ``sov.audit.checkpoint.v1\\0`` and the encoding of this message with an empty signature."""

    node: str
    chain: str
    sequence: int
    hash: str
    time_ms: int
    certificate: bytes
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return CHECKPOINT_LABEL + encode(msgspec.structs.replace(self, signature=b""))


def parse_line(line: bytes) -> Entry:
    """An entry whose hash holds. Raises ValueError that says what is wrong with it."""
    if len(line) > ENTRY_BYTES_MAX or not line.endswith(b'"}') or line[-_SUFFIX_BYTES:][: len(_HASH_FIELD)] != _HASH_FIELD:
        raise ValueError("not a whole entry")
    try:
        entry = msgspec.json.decode(line, type=Entry)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an entry: {error}") from error
    if hashlib.sha256(ENTRY_LABEL + line[:-_SUFFIX_BYTES]).hexdigest() != entry.hash:
        raise ValueError(f"entry {entry.sequence} was altered: its hash does not hold")
    return entry


def make_line(chain: str, sequence: int, time_ms: int, kind: str, fields: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    values = {"chain": chain, "sequence": sequence, "time_ms": time_ms, "kind": kind, "fields": fields, "previous": previous}
    body = msgspec.json.encode(values)[:-1]
    digest = hashlib.sha256(ENTRY_LABEL + body).hexdigest()
    line = body + _HASH_FIELD + digest.encode() + b'"}\n'
    if len(line) > ENTRY_BYTES_MAX:
        raise ValueError(f"an audit entry has at most {ENTRY_BYTES_MAX} bytes; this one of kind {kind!r} has {len(line)}")
    return line, digest
