"""An object plane on doubles: a ring in one dict, faulty disks in memory, real cryptography with plain keys."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator

from storaged.clock import Clock
from storaged.cluster.layout import Layout
from storaged.objects.api import NO_WRITE_CONDITIONS, BodyChecks, NewMeta, PutResult, RangeSpec, WriteConditions
from storaged.objects.plane import Damage, ObjectLimits, ObjectPlane
from storaged.objects.records import BucketRecord, PartEntry, decode_object
from storaged.objects.service import ObjectService
from storaged.wire import Buffer
from tests.doubles.clock import LoopClock
from tests.doubles.disks import Disks
from tests.doubles.keys import MemoryKeys
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.doubles.ring import MemoryRing

OWNER = "f" * 64

FAST = ObjectLimits(late_grace_s=0.02, write_timeout_s=0.3, sync_timeout_s=0.3, read_timeout_s=0.3, hedge_floor_s=0.02)
"""Timeouts that a test can wait for."""


class World:
    """The doubles, and planes on them, each a gateway.

    ``near``: the disks are of the gateway's own node. ``far``: of others, which can be asked without a task.
    ``changes``: to the ``limits``.
    """

    def __init__(
        self,
        layout: Layout | None = None,
        *,
        near: bool = False,
        far: bool = False,
        limits: ObjectLimits = FAST,
        **changes: object,
    ) -> None:
        self.layouts = KnownLayouts(layout or layout_of())
        self.disks = Disks(self.layouts.current, near=near, far=far)
        self.ring = MemoryRing(self.layouts, self.disks)
        self.keys = MemoryKeys()
        self.clock: Clock = LoopClock()
        self.damage: list[Damage] = []
        self.limits = dataclasses.replace(limits, **changes)  # type: ignore[arg-type]

    def plane(self) -> ObjectPlane:
        ring = self.ring
        return ObjectPlane(
            registers=ring,
            pages=ring,
            scanner=ring,
            fences=ring,
            stores=self.disks,
            liveness=self.disks,
            layouts=self.layouts,
            keys=self.keys,
            clock=self.clock,
            entropy=os.urandom,
            limits=self.limits,
            on_damage=self.damage.append,
        )


def bucket_of(world: World) -> BucketRecord:
    """A bucket with a key, as it is after it was created."""
    bucket = BucketRecord("b", b"B" * 16, OWNER, 1, "active", 16, "eu-fr-1")
    world.keys.newest[bucket.id] = 1
    return bucket


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[Buffer]:
    """A body whose pieces are overwritten when the next is asked for, as the port allows."""
    for at in range(0, len(data), size):
        piece = bytearray(data[at : at + size])
        yield piece
        piece[:] = b"\xee" * len(piece)


async def put(
    objects: ObjectService,
    bucket: BucketRecord,
    data: bytes | AsyncIterator[Buffer],
    *,
    key: bytes = b"key",
    sized: bool = True,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
) -> PutResult:
    """``sized``: its size is declared. One that comes as an iterator has none."""
    checks = BodyChecks(size=len(data) if isinstance(data, bytes) and sized else None)
    body = pieces(data) if isinstance(data, bytes) else data
    return await objects.put(bucket, key, body, NewMeta(), checks, owner=OWNER, conditions=conditions)


async def got(
    objects: ObjectService, bucket: BucketRecord, *, key: bytes = b"key", span: RangeSpec | None = None
) -> bytes:
    stream = await objects.get(bucket, key, span=span)
    data = b"".join([bytes(piece) async for piece in stream.chunks()])
    assert len(data) == stream.length
    return data


def entry_of(world: World) -> PartEntry:
    """The only part of the object ``key``."""
    (value,) = [value for name, value in world.ring.values.items() if name.key == b"key"]
    return decode_object(value.body).versions[0].parts[0]
