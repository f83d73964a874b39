"""Compares the two homes of a bucket's key: its register in the ring, and this gateway's own copy. Pure.

A wrapped key is committing and bound to its bucket and version, so a forged one does not open. An attacker who writes
registers without keys can still remove a key, put back an older record, or claim that the key was destroyed. So:

* A key that opens in either home is the bucket's key. A register that is missing, does not open, is not authentic or
  lacks a version is damaged, and is written again from what opens.
* "Destroyed" is only believed of an authentic record, and then a copy counts for nothing.
* Damage can't produce two homes with different keys of one version: then no key is released, and nothing is
  overwritten.

An old record, without authenticator, is not damaged if it opens. It is written again with an authenticator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from storaged.keys.bucketkey import (
    ACTIVE,
    DESTROYED,
    BucketEnd,
    BucketKeyRecord,
    UnknownEpoch,
    Vault,
    Versions,
    WrappedBucketKey,
)
from storaged.keys.ports import StoredRegister
from storaged.sov1 import SealBroken
from storaged.wire import decode


class Judged(NamedTuple):
    """``keys``: version -> key in the clear; empty with a ``refusal``. ``versions``: the same, wrapped, as both homes
    should have them.

    ``damage``: what is wrong with the ring's record; empty when nothing is. ``repair_ring``, ``repair_copy``: that home
    should be written. ``ended``: according to an authentic record.
    """

    keys: dict[int, bytes] = {}  # noqa: RUF012 - never changed
    versions: Versions = ()
    refusal: str = ""
    damage: str = ""
    destroyed: bool = False
    repair_ring: bool = False
    repair_copy: bool = False
    ended: BucketEnd | None = None


class _Opened(NamedTuple):
    entries: dict[int, tuple[WrappedBucketKey, bytes]]
    broken: str
    """Why an entry did not open."""
    foreign: bool
    """An entry is wrapped under an epoch that this keyring does not have."""


def judge(vault: Vault, bucket_id: bytes, kept: StoredRegister | None, copy: Versions) -> Judged:
    """``kept``: the register, None when it was never written. ``copy``: this gateway's copy, empty when it has none."""
    name = bucket_id.hex()
    record, damage = _read(bucket_id, kept)
    authentic = record is not None and kept is not None and vault.authentic(record, kept.sequence)
    if record is not None and record.authenticator and not authentic:
        damage = f"The key record of bucket {name} is not authentic."
    if record is not None and record.state == DESTROYED and authentic:
        text = f"The key of bucket {name} is destroyed."
        return Judged(refusal=text, destroyed=True, repair_copy=bool(copy), ended=record.ended)
    if record is not None and record.state != ACTIVE:
        damage = damage or f"The key record of bucket {name} says {record.state!r} and proves nothing."
        record = None
    ring = _open(vault, bucket_id, record.versions if record is not None else ())
    if authentic and ring.foreign:  # the keyring is older than the record, which is not damaged
        return Judged(refusal=f"The key of bucket {name} {ring.broken}.")
    mine = _open(vault, bucket_id, copy)
    damage = damage or (f"The key of bucket {name} {ring.broken}." if ring.broken else "")
    for version in sorted(ring.entries.keys() & mine.entries.keys()):
        if ring.entries[version][1] != mine.entries[version][1]:
            text = f"Version {version} of bucket {name}'s key in the ring is another than this gateway's copy of it."
            return Judged(refusal=text, damage=text)
    if not damage and (lacking := sorted(mine.entries.keys() - ring.entries.keys())):
        damage = f"The key record of bucket {name} lacks version {', '.join(map(str, lacking))}."
    found = mine.entries | ring.entries
    versions = tuple(found[version][0] for version in sorted(found))
    if not found:
        return Judged(
            refusal=damage or f"No key is kept for bucket {name}.",
            damage=damage or f"No key is kept for bucket {name}.",
        )
    return Judged(
        {version: found[version][1] for version in sorted(found)},
        versions,
        damage=damage,
        repair_ring=bool(damage) or not authentic or record is None or record.versions != versions,
        repair_copy=versions != copy and not mine.foreign,
        ended=record.ended if record is not None and authentic else None,
    )


def _read(bucket_id: bytes, kept: StoredRegister | None) -> tuple[BucketKeyRecord | None, str]:
    """The record, or why there is none."""
    name = bucket_id.hex()
    if kept is None or not kept.body:
        return None, f"No key is kept for bucket {name}."
    try:
        record = decode(kept.body, BucketKeyRecord)
    except msgspec.MsgspecError:
        return None, f"The key record of bucket {name} cannot be read."
    if record.bucket_id != bucket_id:
        return None, f"The key record of bucket {name} is that of another."
    return record, ""


def _open(vault: Vault, bucket_id: bytes, entries: Iterable[WrappedBucketKey]) -> _Opened:
    opened: dict[int, tuple[WrappedBucketKey, bytes]] = {}
    broken, foreign = "", False
    for entry in entries:
        try:
            opened[entry.version] = entry, vault.open(bucket_id, entry)
        except UnknownEpoch:
            foreign = True
            newest = f"keyring {vault.keyring_id.hex()} has epochs up to {vault.newest_epoch}"
            broken = f"is wrapped under epoch {entry.epoch}; {newest}"
        except (SealBroken, ValueError, OverflowError):
            broken = f"does not open under keyring {vault.keyring_id.hex()}"
    return _Opened(opened, broken, foreign)
