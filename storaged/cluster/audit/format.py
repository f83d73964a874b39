"""The format of the audit log on disk. No I/O.

A process start begins a chain, whose id is the process's incarnation. A chain is one or more files
``audit-ORDINAL-CHAIN-PART.jsonl`` (the ordinal counts the chains of a node, the part the files of a chain) with one
entry a line::

    {"chain":"<hex>","sequence":7,"time_ms":1767225600000,"kind":"key.release","actor":"node:gw",
     "target":"bucket-id:<hex>","outcome":"done","fields":{...},"salt":"<32 hex>",
     "previous":"<64 hex>","hash":"<64 hex>"}

``kind`` is the action, ``actor`` who asked for it, ``target`` its object, ``outcome`` one of ``intent``, ``done``,
``refused CODE``, ``failed CODE`` (empty for an event without an actor's operation). ``salt`` is random: witnesses see
the hash, and must not be able to guess the content from it. Entries of versions with protocol 2 have none of the four.

``hash`` is SHA-256 over ``sov.audit.v1\\0`` and the line's bytes before ``,"hash":``; ``previous`` is the hash of the
entry before. So the hash covers the bytes in the file, and needs no canonical form of JSON. Entry 0 (kind ``start``)
names the node, its incarnation, and the head of the chain before it, whose hash is its ``previous``: so the chains of a
node form one chain. A full file is followed by another, whose first entry has the kind ``continue``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from storaged.units import KIB
from storaged.wire import Message, encode

ENTRY_LABEL = b"sov.audit.v1\0"
REGISTER_CHECKPOINT_LABEL = b"sov.audit.checkpoint.v1\0"
CHECKPOINT_LABEL = b"sov.audit.checkpoint.v2\0"
LINK_LABEL = b"sov.audit.link.v1\0"
HASH_BYTES: Final = 32
GENESIS = "0" * 64
"""``previous`` of the very first entry of a node."""

ENTRY_BYTES_MAX: Final = 16 * KIB
_HASH_FIELD = b',"hash":"'
_SUFFIX_BYTES = len(_HASH_FIELD) + 64 + len(b'"}')


INTENT: Final = "intent"
"""Written before the operation. Without a later entry of the same ``operation`` the process ended in between, and the
operation may have been done."""

DONE: Final = "done"
REFUSED: Final = "refused"
"""Followed by the code. A rule refused it, and nothing was changed."""

FAILED: Final = "failed"
"""Followed by the code. It may have been done in part."""


class Event(NamedTuple):
    """What an entry says, without its place in a chain.

    ``actor`` is ``node:NAME`` (a certificate's name), ``unix:UID:NAME`` (a user of the admin socket), ``s3:ACCESSKEY``,
    or ``address:HOST`` (unauthenticated).
    """

    kind: str
    actor: str
    target: str
    outcome: str
    fields: Mapping[str, Any]


def actor_of_peer(peer: str) -> str:
    """The actor for a peer: its certified name, or its network address when it has none (names have neither dots nor
    colons).
    """
    return f"address:{peer}" if "." in peer or ":" in peer else f"node:{peer}"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line, decoded."""

    chain: str
    sequence: int
    time_ms: int
    kind: str
    fields: dict[str, Any]
    previous: str
    hash: str
    actor: str = ""
    target: str = ""
    outcome: str = ""
    salt: str = ""


_decode_entry = msgspec.json.Decoder(Entry).decode  # made here: see ``wire._Decoders``


class Predecessor(msgspec.Struct, frozen=True):
    """In a ``start`` entry: the head of the chain before, and how many unreadable bytes a crash left after it."""

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


class RegisterCheckpoint(Message, frozen=True):
    """The record that versions with protocol 2 put into the registers ``audit/NODE/CHAIN``. The verifier still reads
    it; this version does not write it.

    Signed by the key of ``certificate`` (DER) over ``sov.audit.checkpoint.v1\\0`` and the encoding of this message with
    an empty signature.
    """

    node: str
    chain: str
    sequence: int
    hash: str
    time_ms: int
    certificate: bytes
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return REGISTER_CHECKPOINT_LABEL + encode(msgspec.structs.replace(self, signature=b""))


class Checkpoint(Message, frozen=True):
    """What a node shows its witnesses: the chain's entry ``sequence`` has this hash and this ``time_ms``, and ``link``
    is over the hashes of all entries up to it.

    Signed by the key of ``certificate`` (DER) over ``sov.audit.checkpoint.v2\\0`` and the encoding of this message with
    an empty signature.
    """

    node: str
    chain: str
    sequence: int
    hash: bytes
    link: bytes
    time_ms: int
    certificate: bytes
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return CHECKPOINT_LABEL + encode(msgspec.structs.replace(self, signature=b""))

    def signed_with(self, signature: bytes) -> Checkpoint:
        return msgspec.structs.replace(self, signature=signature)


def first_link(chain: str) -> bytes:
    """The link of a chain before its first entry."""
    return hashlib.sha256(LINK_LABEL + chain.encode()).digest()


def next_link(link: bytes, entry_hash: bytes) -> bytes:
    """The link after one more entry. With it a witness checks that a later checkpoint extends an earlier one, from the
    hashes in between and without the entries.
    """
    return hashlib.sha256(LINK_LABEL + link + entry_hash).digest()


def parse_line(line: bytes) -> Entry:
    """Decodes an entry and checks its hash. Raises ValueError that says what is wrong."""
    if (
        len(line) > ENTRY_BYTES_MAX
        or not line.endswith(b'"}')
        or line[-_SUFFIX_BYTES:][: len(_HASH_FIELD)] != _HASH_FIELD
    ):
        raise ValueError("not a whole entry")
    try:
        entry = _decode_entry(line)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an entry: {error}") from error
    if hashlib.sha256(ENTRY_LABEL + line[:-_SUFFIX_BYTES]).hexdigest() != entry.hash:
        raise ValueError(f"entry {entry.sequence} was altered: its hash does not hold")
    return entry


def make_line(
    chain: str, sequence: int, time_ms: int, event: Event, previous: str, salt: str = ""
) -> tuple[bytes, str]:
    """Encodes an entry: its line, and its hash. Raises ValueError for a line over ENTRY_BYTES_MAX, TypeError for fields
    that are not JSON.
    """
    values = {
        "chain": chain,
        "sequence": sequence,
        "time_ms": time_ms,
        **event._asdict(),
        "salt": salt,
        "previous": previous,
    }
    body = msgspec.json.encode(values)[:-1]
    digest = hashlib.sha256(ENTRY_LABEL + body).hexdigest()
    line = body + _HASH_FIELD + digest.encode() + b'"}\n'
    if len(line) > ENTRY_BYTES_MAX:
        raise ValueError(
            f"an audit entry has at most {ENTRY_BYTES_MAX} bytes; this one of kind {event.kind!r} has {len(line)}"
        )
    return line, digest
