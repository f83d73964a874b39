"""Whether data moves to where the layout in force wants it, and how fast: settings of the whole cluster. Pure.

There are two jobs. ``partitions`` moves the replicas of partitions (``maintain.partition_mover``, in gateways).
``fragments`` moves blocks that are whole, and lie elsewhere than the layout wants them (``maintain.repair``, on storage
nodes). Rebuilding what is lost is no part of either, and has no pace.

A paused job begins nothing. What has begun ends: a partition that is joint reaches one of its two settled states, and
an object's blocks come to their new places. So a pause leaves nothing in between.

The settings are the register ``moves`` of the system partition, signed by the cluster's gateways. A node that has not
read it yet takes both jobs as paused: a restart must not end a pause.
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
JOBS = (PARTITIONS, FRAGMENTS)
PARTITIONS_PER_MIN_MAX = 60_000
BYTES_PER_S_MAX = 1 << 40


class MoveSettings(Message, frozen=True):
    """The register ``moves``. ``revision`` counts the changes.

    ``partitions_per_min``: exchanges of a replica that the gateways together begin in a minute. ``bytes_per_s``: of
    fragments that each storage node moves. 0: no bound. ``signature`` (Ed25519) is by the signing key ``signer`` of the
    cluster's gateways over ``signed_bytes``.
    """

    revision: int = 0
    partitions_paused: bool = False
    fragments_paused: bool = False
    partitions_per_min: int = 0
    bytes_per_s: int = 0
    changed_ms: int = 0
    signer: bytes = b""
    signature: bytes = b""


UNKNOWN = MoveSettings(revision=-1, partitions_paused=True, fragments_paused=True)
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


def signed_bytes(cluster: str, settings: MoveSettings) -> bytes:
    return LABEL + encode(
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
    return settings.partitions_paused if job == PARTITIONS else settings.fragments_paused


def changed(settings: MoveSettings, job: str, now_ms: int, *, paused: bool | None, pace: int | None) -> MoveSettings:
    """The settings that follow, not signed. ``paused``, ``pace``: None leaves it. Raises InvalidArgument."""
    if job not in JOBS:
        raise InvalidArgument(f"there is no job {job!r} that can be paused; there are: {', '.join(JOBS)}")
    most = PARTITIONS_PER_MIN_MAX if job == PARTITIONS else BYTES_PER_S_MAX
    if pace is not None and not 0 <= pace <= most:
        raise InvalidArgument(f"a pace of {job} is from 1 to {most}, or 0 for none")
    found = replace(settings, revision=settings.revision + 1, changed_ms=now_ms, signer=b"", signature=b"")
    if job == PARTITIONS:
        return replace(
            found,
            partitions_paused=settings.partitions_paused if paused is None else paused,
            partitions_per_min=settings.partitions_per_min if pace is None else pace,
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
    }
