"""The program's own object plane in a process of the simulation: over the simulated ring, without fragment stores, with
keys of ``MemoryKeys``. All its randomness follows from the seed, so that a seed plays the same in every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from storaged.errors import DiskUnusable, NoSuchBucket
from storaged.hashes import page_hash
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import RegisterName
from storaged.objects.configuration.document import Configuration
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.records import BucketRecord
from tests.doubles.keys import MemoryKeys
from tests.sim.cluster import Gateway, World
from tests.sim.listing import Everybody

Made = TypeVar("Made")

CACHE_S = 0.15
"""Gateways use records of buckets that are so old."""


class Lives(Generic[Made]):
    """One object for each life of a gateway, made when it is first needed."""

    def __init__(self, make: Callable[[Gateway], Made]) -> None:
        self._make = make
        self._made: dict[tuple[Gateway, int], Made] = {}

    def of(self, gateway: Gateway) -> Made:
        place = gateway, gateway.life
        if place not in self._made:
            self._made[place] = self._make(gateway)
        return self._made[place]


def keys_for(seed: int, *buckets: bytes) -> MemoryKeys:
    """With a key for each bucket of these ids."""
    keys = MemoryKeys(random.Random(f"keys {seed}").randbytes)
    keys.newest = dict.fromkeys(buckets, 1)
    return keys


class NoFragments:
    """In place of fragment stores: they do not answer reads, and what is put on their garbage lists is dropped."""

    def store(self, disk: str) -> NoFragments:
        return self

    async def read(self, fragment: Any, row: int, count: int) -> Any:
        raise DiskUnusable

    async def retire(self, entries: Sequence[Any]) -> None:
        pass


def make_plane(
    world: World,
    gateway: Gateway,
    keys: MemoryKeys,
    *,
    registers: Any = None,
    limits: ObjectLimits | None = None,
    agreed_ms: Callable[[], int | None] | None = None,
    on_fenced: Callable[[bytes], None] = lambda scope: None,
) -> ObjectPlane:
    """``registers``: in place of the gateway's own. ``on_fenced``: called with a bucket in which a listing has met a
    fence."""
    everybody: Any = Everybody()
    stores: Any = NoFragments()
    scanner = RingScanner(
        gateway.layouts,
        gateway.directory,
        gateway.client,
        everybody,
        ScanSettings(timeout_s=0.3, hedge_s=0.02),
        on_fenced=on_fenced,
    )
    return ObjectPlane(
        registers=gateway.client if registers is None else registers,
        pages=gateway.client,
        scanner=scanner,
        fences=gateway.client,
        stores=stores,
        liveness=everybody,
        layouts=gateway.layouts,
        keys=keys,
        clock=gateway.clock,
        entropy=world.random.randbytes,
        limits=limits if limits is not None else ObjectLimits(),
        agreed_ms=agreed_ms,
    )


class HasBuckets(Protocol):
    """A play."""

    chance: random.Random

    def bucket_of(self, name: str, plane: ObjectPlane) -> BucketRecord:
        """As it is now. Raises NoSuchBucket."""


class KnownBuckets:
    """The buckets, as one gateway knows them: ``system.buckets.BucketService``."""

    def __init__(self, play: HasBuckets, plane: ObjectPlane, names: Sequence[str]) -> None:
        self._play = play
        self._plane = plane
        self._names = names
        self._known: dict[str, tuple[float, BucketRecord]] = {}

    def try_get(self, name: str) -> BucketRecord | None:
        read_s, record = self._known.get(name, (-1.0, None))
        return record if read_s + CACHE_S >= self._plane.clock.monotonic() else None

    async def get(self, name: str) -> BucketRecord:
        found = self.try_get(name)
        if found is None:
            read_s = self._plane.clock.monotonic()
            found = self._play.bucket_of(name, self._plane)
            await asyncio.sleep(self._play.chance.uniform(0, 0.02))
            self._known[name] = read_s, found
        return found

    def configuration_of(self, record: BucketRecord) -> Configuration:
        return self._plane.configurations.of(record)

    async def every_bucket(self) -> list[BucketRecord]:
        found = []
        for name in self._names:
            with contextlib.suppress(NoSuchBucket):
                found.append(self._play.bucket_of(name, self._plane))
        return found


class NotedPages:
    """Pages of a gateway. Those that it puts are noted, for the judge."""

    def __init__(self, client: Any, noted: dict[bytes, bytes]) -> None:
        self._client = client
        self._noted = noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        self._noted[name or page_hash(body)] = body
        made: bytes = await self._client.put_page(near, body, name)
        return made
