"""Whether data moves to where the layout in force wants it, and how fast; the same of scrubs and of garbage collection:
settings of the whole cluster. Pure.

There are four jobs. ``partitions`` moves the replicas of partitions (``maintain.partition_mover``, in gateways).
``fragments`` moves blocks that are whole, and lie elsewhere than the layout wants them (``maintain.repair``, on storage
nodes). Rebuilding what is lost is no part of either, and has no pace. ``scrub`` reads and verifies everything
(``maintain.scrub``, on storage nodes). ``collection`` deletes data that is out of use (``maintain.gc``, on storage
nodes).

A paused job begins nothing. What has begun ends: a partition that is joint reaches one of its two settled states, and
an object's blocks come to their new places. So a pause leaves nothing in between. A scrub stops where it is, and
collection after the entries that it judges.

The settings are the register ``moves`` of the system partition, signed by the cluster's gateways. A node that has not
read it yet takes all jobs as paused: a restart must not end a pause.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from storaged.errors import InvalidArgument
from storaged.wire import Message, encode

PATH = "moves"
LABEL = b"sov.moves.v1\0"

PARTITIONS = "partitions"
FRAGMENTS = "fragments"
SCRUB = "scrub"
COLLECTION = "collection"
JOBS = (PARTITIONS, FRAGMENTS, SCRUB, COLLECTION)
PARTITIONS_PER_MIN_MAX = 60_000
COLLECTION_PER_S_MAX = 1_000_000
BYTES_PER_S_MAX = 1 << 40


class MoveSettings(Message, frozen=True):
    """The register ``moves``. ``revision`` counts the changes.

    ``partitions_per_min``: exchanges of a replica that the gateways together begin in a minute. ``bytes_per_s``: of
    fragments that each storage node moves, ``scrub_bytes_per_s``: of those that it verifies. ``collection_per_s``: data
    ids that it judges, of its garbage lists and sweeps. 0: no bound. ``signature`` (Ed25519) is by the signing key
    ``signer`` of the cluster's gateways over ``signed_bytes``.
    """

    revision: int = 0
    partitions_paused: bool = False
    fragments_paused: bool = False
    partitions_per_min: int = 0
    bytes_per_s: int = 0
    changed_ms: int = 0
    signer: bytes = b""
    signature: bytes = b""
    scrub_paused: bool = False
    scrub_bytes_per_s: int = 0
    collection_paused: bool = False
    collection_per_s: int = 0


UNKNOWN = MoveSettings(
    revision=-1, partitions_paused=True, fragments_paused=True, scrub_paused=True, collection_paused=True
)
"""Before the register was read."""


class SignedSettings(Message, frozen=True):
    """What the signature covers, after LABEL."""

    cluster: str
    revision: int
    partitions_paused: bool
    fragments_paused: bool
    partitions_per_min: int
    bytes_per_s: int
    changed_ms: int


class SignedScrub(Message, frozen=True):
    """The signature also covers these, if one of them is set, or one of ``SignedCollection``."""

    paused: bool
    bytes_per_s: int


class SignedCollection(Message, frozen=True):
    """The signature also covers these, if one of them is set."""

    paused: bool
    per_s: int


def signed_bytes(cluster: str, settings: MoveSettings) -> bytes:
    scrub = SignedScrub(settings.scrub_paused, settings.scrub_bytes_per_s)
    collection = SignedCollection(settings.collection_paused, settings.collection_per_s)
    signed = LABEL + _signed_moves(cluster, settings)
    if collection.paused or collection.per_s:
        return signed + encode(scrub) + encode(collection)
    return signed + (encode(scrub) if scrub.paused or scrub.bytes_per_s else b"")


def _signed_moves(cluster: str, settings: MoveSettings) -> bytes:
    return encode(
        SignedSettings(
            cluster,
            settings.revision,
            settings.partitions_paused,
            settings.fragments_paused,
            settings.partitions_per_min,
            settings.bytes_per_s,
            settings.changed_ms,
        )
    )


def is_paused(settings: MoveSettings, job: str) -> bool:
    return {
        PARTITIONS: settings.partitions_paused,
        FRAGMENTS: settings.fragments_paused,
        SCRUB: settings.scrub_paused,
        COLLECTION: settings.collection_paused,
    }[job]


def changed(settings: MoveSettings, job: str, now_ms: int, *, paused: bool | None, pace: int | None) -> MoveSettings:
    """The settings that follow, not signed. ``paused``, ``pace``: None leaves it. Raises InvalidArgument."""
    if job not in JOBS:
        raise InvalidArgument(f"there is no job {job!r} that can be paused; there are: {', '.join(JOBS)}")
    most = {PARTITIONS: PARTITIONS_PER_MIN_MAX, COLLECTION: COLLECTION_PER_S_MAX}.get(job, BYTES_PER_S_MAX)
    if pace is not None and not 0 <= pace <= most:
        raise InvalidArgument(f"a pace of {job} is from 1 to {most}, or 0 for none")
    found = replace(settings, revision=settings.revision + 1, changed_ms=now_ms, signer=b"", signature=b"")
    if job == PARTITIONS:
        return replace(
            found,
            partitions_paused=settings.partitions_paused if paused is None else paused,
            partitions_per_min=settings.partitions_per_min if pace is None else pace,
        )
    if job == SCRUB:
        return replace(
            found,
            scrub_paused=settings.scrub_paused if paused is None else paused,
            scrub_bytes_per_s=settings.scrub_bytes_per_s if pace is None else pace,
        )
    if job == COLLECTION:
        return replace(
            found,
            collection_paused=settings.collection_paused if paused is None else paused,
            collection_per_s=settings.collection_per_s if pace is None else pace,
        )
    return replace(
        found,
        fragments_paused=settings.fragments_paused if paused is None else paused,
        bytes_per_s=settings.bytes_per_s if pace is None else pace,
    )


def document(settings: MoveSettings) -> dict[str, Any]:
    """As in the document of ``storaged status --json``. ``known`` is False while this node has not read them."""
    return {
        "known": settings.revision >= 0,
        PARTITIONS: {"paused": settings.partitions_paused, "per_min": settings.partitions_per_min},
        FRAGMENTS: {"paused": settings.fragments_paused, "bytes_per_s": settings.bytes_per_s},
        SCRUB: {"paused": settings.scrub_paused, "bytes_per_s": settings.scrub_bytes_per_s},
        COLLECTION: {"paused": settings.collection_paused, "per_s": settings.collection_per_s},
    }
