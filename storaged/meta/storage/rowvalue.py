"""The bytes of a row: one register's accepted state, as every replica stores it. Pure.

    offset  bytes  what
    0       1      format version: 1, or for a row that names a small copy 2 or 3
    1       8      check: xxh3-64 (BE) of the row from offset 9 || the key, seeded with the xxh3-64 of
                   table || scope || shard, and one more (mod 2^64) in version 3
    9       1      visibility (0 tombstone, 1 hidden, 2 live)
    10      8      ballot: epoch (u64 BE)
    18      8      ballot: counter (u64 BE)
    26      1      ballot: length of the node's name, n
    27      1      ballot: length of the incarnation, i
    28      n + i  ballot: node's name (UTF-8), incarnation
    28+n+i         the value: msgpack of names.Value

The check covers the register's name, so it finds a row under another key as surely as a row whose bytes changed (LMDB
0.9 checks neither). Equal names, ballots and values give equal bytes, so replicas also compare digests of checks
instead of rows. A check proves nothing about a row that another node sends, because a liar can make a row with a given
check: a reader compares ``hash_of`` the row that it got with what another replica says of its own.

The version of a row that names a copy is the bit ``Slot.copied``: in version 2 the copy was durable on this disk when
the row was accepted, in version 3 it was not. Acceptors write no version 3. A row of version 1 that names a copy is
older than the bit, and counts as accepted with its copy: the program that wrote it may have acknowledged it, and it
wrote such rows also in the place of rows that did have their copies. So nothing older than such a row is taken for the
newest, unless a majority of the replicas has never had it. 1 and 2 differ in nothing else, not even in the check: a row
keeps its check when the programs of its replicas are replaced one after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import xxhash

from storaged import wire
from storaged.hashes import row_hash
from storaged.meta.names import KEY_BYTES_MAX, Ballot, RegisterName, Value
from storaged.meta.storage.row_head import HEAD_MARK, LEAD_BYTES, head_of
from storaged.meta.store_ports import RowDamaged, Slot, Stamps
from storaged.wire import Buffer

ROW_VERSION, COPIED_VERSION, UNCOPIED_VERSION = 1, 2, 3
CHECK_BYTES = 8
NAME_PREFIX_BYTES = 18

STAMP_BYTES = 10
"""Format version, check and visibility of a row: replicas compare digests of stamps instead of rows."""

MASK = 2**64 - 1

_HEAD = struct.Struct(">BQQBB")
_BALLOT = struct.Struct(">QQBB")
_CHECK_AT = 1
_BODY_AT = _CHECK_AT + CHECK_BYTES
_BALLOT_AT = _BODY_AT + 1
ROW_BYTES_MIN = _BODY_AT + _HEAD.size

assert _HEAD.size == 19
assert STAMP_BYTES == _BALLOT_AT
assert ROW_BYTES_MIN == 28

_ALIKE = bytes.maketrans(bytes([COPIED_VERSION]), bytes([ROW_VERSION]))

_LEAD = struct.Struct(">xBH17xB2xBBH")
"""The beginning of a value whose body has a head: array, sequence, header of the operation's id, id and visibility,
header of the body, its lead.
"""

_LEAD_AT = _LEAD.size - LEAD_BYTES
_unpack_lead = _LEAD.unpack_from

_hash = xxhash.xxh3_64_intdigest
_check = xxhash.xxh3_64_digest
_pack_head, _unpack_head = _HEAD.pack, _HEAD.unpack_from


def pack_row(slot: Slot, prefix: bytes = b"") -> bytes:
    """``prefix``: the name's, if the caller has it. Raises ValueError for what no row can hold: a key over 1,041 bytes,
    a scope that isn't 16, a ballot out of range.
    """
    name, ballot, value, copied = slot
    key, (epoch, counter, proposer, incarnation) = name.key, ballot
    if not 1 <= len(key) <= KEY_BYTES_MAX or len(name.scope) != 16:
        raise ValueError(
            f"a register has a scope of 16 bytes and a key of 1 to {KEY_BYTES_MAX}, not {len(name.scope)} and"
            f" {len(key)}"
        )
    node = proposer.encode()
    try:
        head = _pack_head(value.visibility, epoch, counter, len(node), len(incarnation))
        prefix = prefix or name.prefix
    except (struct.error, ValueError) as error:
        raise ValueError(f"a row cannot hold {ballot} of {name}: {error}") from None
    body = b"".join((head, node, incarnation, wire.encode(value)))
    if not value.payload:
        return b"\x01" + _check(body + key, _hash(prefix)) + body
    if copied:
        return b"\x02" + _check(body + key, _hash(prefix)) + body
    return b"\x03" + _check(body + key, _uncopied_seed(_hash(prefix))) + body


def _uncopied_seed(seed: int) -> int:
    return (seed + 1) & MASK


def seed_of(name_prefix: bytes) -> int:
    """The seed of the checks of all rows of one table || scope || shard."""
    return _hash(name_prefix)


def sound_check(seed: int, key: bytes, row: bytes) -> bytes:
    """The row's check, 8 bytes. Empty unless the row is intact and belongs to this key of the seed's table, scope and
    shard.
    """
    check = row[_CHECK_AT:_BODY_AT]
    if _check(row[_BODY_AT:] + key, seed) == check:
        return check if row[0] in (ROW_VERSION, COPIED_VERSION) else b""
    return check if row[:1] == b"\x03" and _check(row[_BODY_AT:] + key, _uncopied_seed(seed)) == check else b""


def accepted_whole(row: bytes) -> bool:
    """Whether an intact row names no copy, or was accepted with it."""
    return row[0] != UNCOPIED_VERSION


def check_of(row: bytes) -> bytes:
    """A row's check, by which nodes of version 0.1.0 compare replicas. Empty for an empty row."""
    return row[_CHECK_AT:_BODY_AT]


def check_number(stamp: Buffer) -> int:
    """The check in a stamp, or in what begins with one, as a number; 0 for nothing."""
    return int.from_bytes(stamp[_CHECK_AT:_BODY_AT], "big")


def hash_of(row: bytes) -> bytes:
    """The cryptographic hash of an intact row's ballot and value, 16 bytes; empty for an empty row. It is the same in
    versions 1 and 2.
    """
    return row_hash(row[_BODY_AT:]) if row else b""


def value_of(row: bytes) -> Value:
    """Of an intact row."""
    return wire.decode(row[ROW_BYTES_MIN + row[26] + row[27] :], Value)


def intact(name_prefix: bytes, key: bytes, row: bytes) -> bool:
    """Whether a row is undamaged and belongs to the register ``name_prefix || key`` (table, scope, shard, then the
    key).
    """
    return bool(sound_check(seed_of(name_prefix), key, row))


def visibility_of(row: bytes) -> int:
    """Of an intact row."""
    return row[_BODY_AT]


def stamps_of(rows: Sequence[bytes]) -> bytes:
    """The stamps of rows, concatenated."""
    return b"".join([row[:STAMP_BYTES] for row in rows])


def digest_of_stamps(stamps: bytes) -> int:
    """The digest by which replicas compare ranges of rows: each reports its own, and gains nothing by a collision. A
    listing also compares hashes of what is sent (``storage.scan``). Versions 1 and 2 give the same: replicas whose
    programs were replaced at different times have the same record in both versions, for as long as nobody writes it
    again.
    """
    versions = stamps[::STAMP_BYTES]
    if COPIED_VERSION not in versions:
        return _hash(stamps)
    alike = bytearray(stamps)
    alike[::STAMP_BYTES] = versions.translate(_ALIKE)
    return _hash(alike)


def stamps_in(keys: Sequence[bytes], rows: Sequence[bytes], more: bool, *, with_keys: bool = False) -> Stamps:
    """The stamps of columns."""
    last = keys[-1] if keys else b""
    return Stamps(stamps_of(rows), len(rows), sum(map(len, rows)), last, more, keys if with_keys else ())


def columns_of(entries: Sequence[tuple[bytes, bytes]], limit: int) -> tuple[list[bytes], list[bytes], bool]:
    """Keys and rows of the first ``limit`` entries, and whether there are more."""
    return [key for key, _ in entries[:limit]], [row for _, row in entries[:limit]], len(entries) > limit


def sound_rows(seed: int, keys: Sequence[bytes], rows: Sequence[bytes]) -> bool:
    """Whether all of these are intact, and none was accepted without its copy."""
    for key, row in zip(keys, rows, strict=True):
        if row[_CHECK_AT:_BODY_AT] != _check(row[_BODY_AT:] + key, seed) or row[0] > COPIED_VERSION or not row[0]:
            return False
    return True


def heads_of(rows: Sequence[bytes]) -> list[bytes]:
    """Of intact rows: each body's head, or the whole body where it has none (``meta.storage.row_head``).

    A head is looked for at its most common offset: after a sequence number below 128, an operation's id of 16 bytes and
    a body of 256 to 65,535 bytes. In other rows the value is decoded.
    """
    heads = []
    for row in rows:
        at = ROW_BYTES_MIN + row[26] + row[27]
        try:
            sequence, operation, body, mark, start, end = _unpack_lead(row, at)
        except struct.error:  # the row is shorter
            mark = 0
        if mark == HEAD_MARK and sequence < 0x80 and operation == 0xC410 and body == 0xC5:
            heads.append(row[at + _LEAD_AT + start : at + _LEAD_AT + end])
        else:
            heads.append(_head_of_row(row))
    return heads


def _head_of_row(row: bytes) -> bytes:
    return head_of(wire.decode(row_parts(row).value, Value).body)


class RowParts(NamedTuple):
    """The parts of an intact row; the value is not decoded. ``ballot`` is comparable for
    equality; ``unpack_ballot`` gives its order.
    """

    visibility: int
    ballot: bytes
    value: bytes


def row_parts(row: bytes) -> RowParts:
    """Of an intact row."""
    end = ROW_BYTES_MIN + row[26] + row[27]
    return RowParts(row[_BODY_AT], row[_BALLOT_AT:end], row[end:])


def unpack_ballot(packed: bytes) -> Ballot:
    """The ``ballot`` of ``RowParts``. Raises ValueError for what is none: a replica that lies may have sent it."""
    try:
        epoch, counter, node_bytes, incarnation_bytes = _BALLOT.unpack_from(packed)
    except struct.error as error:
        raise ValueError(str(error)) from None
    end = _BALLOT.size + node_bytes
    if len(packed) != end + incarnation_bytes:
        raise ValueError(f"a ballot of {len(packed)} bytes")
    return Ballot(epoch, counter, packed[_BALLOT.size : end].decode(), packed[end:])


def unpack_row(name: RegisterName, row: bytes) -> Slot:
    """Raises RowDamaged."""
    key = name.key
    if not intact(name.prefix, key, row):
        raise RowDamaged(f"the row of {name} does not match its check")
    try:
        _, epoch, counter, node_bytes, incarnation_bytes = _unpack_head(row, _BODY_AT)
        node_end = ROW_BYTES_MIN + node_bytes
        end = node_end + incarnation_bytes
        value = wire.decode(row[end:], Value)
        ballot = Ballot(epoch, counter, row[ROW_BYTES_MIN:node_end].decode(), row[node_end:end])
    except (msgspec.MsgspecError, struct.error, UnicodeDecodeError) as error:
        raise RowDamaged(f"the row of {name} holds no value: {error}") from None
    return Slot(name, ballot, value, bool(value.payload) and accepted_whole(row))


def seal_small(context: bytes, body: Buffer) -> bytes:
    """xxh3-64 (BE) of context || body, then the body: the form in which everything other than a row is stored. The
    context is the place where it is stored.
    """
    return _hash(context + bytes(body), len(context)).to_bytes(CHECK_BYTES, "big") + bytes(body)


def open_small(context: bytes, sealed: bytes) -> bytes:
    """Raises RowDamaged."""
    body = sealed[CHECK_BYTES:]
    if len(sealed) < CHECK_BYTES or _hash(context + body, len(context)) != int.from_bytes(sealed[:CHECK_BYTES], "big"):
        raise RowDamaged(f"what is stored under {context!r} does not match its check")
    return body


def seal_number(context: bytes, number: int) -> bytes:
    """``seal_small`` of a u64 (BE)."""
    return seal_small(context, number.to_bytes(8, "big"))


def open_number(context: bytes, sealed: bytes) -> int:
    """Raises RowDamaged."""
    return int.from_bytes(open_small(context, sealed), "big")
