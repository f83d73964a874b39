"""The cost of a page of a listing: the replicas' part, and the gateway's part, from the frames of the answers to the
XML.

The rows are those of a bucket of 20,000 objects of 4 KiB, sealed under one bucket key. The answers are recorded once.
Nothing waits, so one ``send`` makes a page. Each part is measured for a page that is listed the first time, and for one
that has not changed since it was listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

from benches.micro_world import BUCKET, REGION, OneKey, finished, list_request, three_racks
from storaged.clock import SystemClock
from storaged.cluster.layout import Layout
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionState
from storaged.keys.bucketkey import UnwrappedBucketKey
from storaged.meta.listing.merge import RingScanner
from storaged.meta.messages import ScanReply, ScanRequest
from storaged.meta.names import Ballot, Value, Visibility, object_name
from storaged.meta.storage.scan import DigestCache, scan_store
from storaged.meta.store_ports import MetaStore, Slot
from storaged.objects import listing as objects_listing
from storaged.objects.api import Buckets, Grant, Objects, Users
from storaged.objects.cache.listed_rows import ListedRowCache
from storaged.objects.code.versions import Place, UnsealedVersion, seal_version
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.records import ObjectRecord, PartEntry, Run, SealedMeta, encode_object
from storaged.s3.context import Endpoint, Front
from storaged.s3.ops import listing
from storaged.wire import Buffer, decode, encode

OBJECTS = 20_000


def slots(entropy: Callable[[int], bytes] = os.urandom) -> list[Slot]:
    """The slot of every object of the bucket."""
    key, found = UnwrappedBucketKey(1, bytes(32), entropy), []
    for number in range(OBJECTS):
        name = object_name(BUCKET.id, BUCKET.shard_numbers, b"photos/2026/%08d" % number)
        data_id = entropy(16)
        meta = SealedMeta(
            entropy(16).hex(),
            {"content-type": "binary/octet-stream"},
            checksums={"CRC64NVME": "rosUhgp5mIg="},
            checksum_type="FULL_OBJECT",
            size=4096,
        )
        entry = PartEntry(1, data_id, 4096, entropy(64), 1, "4+2", (Run(0, 1, 1, 2, 1),), small=True)
        new = UnsealedVersion("null", data_id, "a" * 32, 1_700_000_000_000 + 7 * number, (entry,))
        version = seal_version(Place(BUCKET.id, name.key), new, key, bytes(32), meta, entropy)
        value = Value(1, entropy(16), Visibility.LIVE, encode_object(ObjectRecord((version,))), data_id)
        found.append(Slot(name, Ballot(1, 1_700_000_000_000_000 + number, "gateway", b"incarnat"), value, copied=True))
    return found


class Ring:
    """Layouts, replicas and liveness of three nodes with two disks each. They repeat their recorded answers at once."""

    def __init__(self, store: MetaStore) -> None:
        self.store = store
        self.asked: list[ScanRequest] = []
        self.current = three_racks()
        self.partitions = PartitionMap()
        self.keys = OneKey()
        self.scanner = RingScanner(cast(Any, self), cast(Any, self), cast(Any, self), cast(Any, self))
        self.listed_rows = ListedRowCache(ObjectLimits().listed_bytes_max)
        self._known: dict[bytes, bytes] = {}

    def at(self, epoch: int) -> Layout:
        return self.current

    def partition(self, number: int) -> PartitionState:
        return self.partitions.of(number, self.current, self.at)

    def disk_readable(self, disk: str) -> bool:
        return True

    disk_prompt = disk_readable

    def replica(self, disk: str) -> Ring:
        return self

    def try_call(
        self,
        request: ScanRequest,
        on_reply: Callable[[Any, memoryview], None],
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float,
    ) -> bool:
        asked = encode(request)
        self.asked.append(request)
        if asked not in self._known:
            self._known[asked] = encode(scan_store(self.store, request))
        on_reply(decode(self._known[asked], ScanReply), memoryview(b""))
        return True

    async def list_objects(self, grant: Grant, **options: Any) -> Any:
        return await objects_listing.list_objects(cast(ObjectPlane, self), grant.bucket, **options)


class Page:
    """The same page from the middle of the bucket, again and again."""

    def __init__(self, store: MetaStore) -> None:
        self.ring = Ring(store)
        self.request = list_request("list-type=2&start-after=photos/2026/00007000")
        self._front = Front(
            cast(Objects, self.ring), cast(Buckets, None), cast(Users, None), Endpoint(REGION), SystemClock()
        )

    def gateway(self) -> bytes:
        """Makes the XML from the replicas' answers in their frames."""
        self.ring.asked.clear()
        return finished(listing.list_objects_v2(self._front, self.request)).body

    def gateway_at_first(self) -> bytes:
        """The same for a page that was not listed before."""
        self.ring.scanner.forget(BUCKET.id)
        self.ring.listed_rows.clear()
        return self.gateway()

    def replicas(self, digests: DigestCache | None = None) -> int:
        """Does the work of all replicas for the page that was listed last, without receiving and sending. Returns the
        number of rows.
        """
        return sum(
            piece.looked_at
            for request in self.ring.asked
            for piece in scan_store(self.ring.store, request, digests).slices
        )
