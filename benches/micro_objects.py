"""The cost of the object plane for an operation: ``ObjectService`` on registers, disks and keys that answer at once, so
that neither the ring nor HTTP counts.

The sealing is real, under one bucket key. Nothing waits, so one ``send`` runs a call.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any, cast

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from benches.micro_world import BUCKET, OneKey, finished, three_racks
from storaged.clock import SystemClock
from storaged.cluster.layout import Layout
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionState
from storaged.cluster.ports import Layouts
from storaged.ids import system_entropy
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import Outcome, Reading, SmallCopies, Update
from storaged.objects.api import BodyChecks, NewMeta, PutResult
from storaged.objects.plane import ObjectPlane
from storaged.objects.service import ObjectService
from storaged.units import KIB


class _Ports:
    """Registers, layout and liveness of one process."""

    def __init__(self) -> None:
        self.current = three_racks()
        self.partitions = PartitionMap()
        self.values: dict[RegisterName, Value] = {}
        self.copies: dict[bytes, memoryview] = {}

    def at(self, epoch: int) -> Layout:
        return self.current

    def partition(self, number: int) -> PartitionState:
        return self.partitions.of(number, self.current, self.at)

    def disk_writable(self, disk_id: str) -> bool:
        return True

    def disk_prompt(self, disk_id: str) -> bool:
        return True

    def disks_full(self) -> frozenset[str]:
        return frozenset()

    def disk_takes_rows(self, disk_id: str, *, outside_reserve: bool = False) -> bool:
        return True

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        value = self.values.get(name)
        return Reading(value, self.copies.get(value.payload) if want_payload and value is not None else None)

    def try_change(
        self,
        name: RegisterName,
        update: Update,
        then: Callable[[Outcome | Exception], None],
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        before = self.values.get(name)
        change = update(before)
        assert change is not None
        assert small is not None
        replicas = self.current.replicas_of(name.partition)
        assert not small.enough(frozenset(replicas[:1]))
        assert small.enough(frozenset(replicas[:2]))
        self.copies[small.data_id] = memoryview(b"".join(small.fragments[0][1]))
        after = self.values[name] = Value(
            (before.sequence if before else 0) + 1, bytes(16), change.visibility, change.body, change.payload
        )
        then(Outcome(before, after))
        return True


class World:
    """An object plane, and one stored object of 4 KiB under ``b"key"``."""

    def __init__(self) -> None:
        self.ports = ports = _Ports()
        unused: Any = None
        self.objects = ObjectService(
            ObjectPlane(
                registers=cast(Any, ports),
                pages=unused,
                scanner=unused,
                fences=unused,
                stores=unused,
                liveness=cast(Any, ports),
                layouts=cast(Layouts, ports),
                keys=OneKey(),
                clock=SystemClock(),
                entropy=system_entropy,
            )
        )
        self.plain = os.urandom(4 * KIB)
        self.sha256 = hashlib.sha256(self.plain).hexdigest()
        self.numbers = iter(range(10**12))
        self.put(b"key")

    def put(self, key: bytes = b"") -> None:
        checks = BodyChecks(size=len(self.plain), sha256=self.sha256)
        meta = NewMeta({"content-type": "application/octet-stream"})
        key = key or b"photos/2026/%08d.jpg" % next(self.numbers)
        results: list[PutResult | Exception] = []
        assert self.objects.try_put(BUCKET, key, self.plain, meta, checks, results.append, owner="f" * 64)
        assert isinstance(results[0], PutResult)
        if key != b"key":
            self.ports.values.popitem()
            self.ports.copies.popitem()

    def cold_head(self) -> None:
        self.objects.plane.opened_records.clear()
        self.head()

    def cold_get(self) -> None:
        self.objects.plane.opened_records.clear()
        self.get()

    def head(self) -> None:
        assert finished(self.objects.head(BUCKET, b"key")).size == len(self.plain)

    def get(self) -> None:
        assert finished(self.objects.get(BUCKET, b"key")).held == self.plain


def paths() -> list[tuple[str, Callable[[], object], Callable[[], object], str]]:
    """(name, the path, its floor, what the floor is)."""
    world = World()
    info, key, nonce, plain = bytes(120), bytes(32), bytes(12), world.plain
    ready = AESGCM(key)

    def open_message() -> None:
        aead = AESGCM(HKDFExpand(SHA512(), 76, info).derive(key)[:32])
        aead.encrypt(nonce, info, None)

    def native_head() -> None:
        open_message()
        open_message()

    def native_get() -> None:
        native_head()
        AESGCM(HKDFExpand(SHA512(), 76, info).derive(key)[:32]).encrypt(nonce, plain, None)

    def native_open() -> None:
        ready.encrypt(nonce, plain, None)

    def native_put() -> None:
        hashlib.md5(plain, usedforsecurity=False).digest()
        hashlib.sha256(plain).digest()
        system_entropy(132)
        native_get()
        AESGCM(key).encrypt(nonce, info, None)

    return [
        (
            "objects: PUT 4 KiB without ring and HTTP",
            world.put,
            native_put,
            "MD5, SHA-256, three keys derived, four sealings",
        ),
        ("objects: HEAD without ring and HTTP", world.cold_head, native_head, "two keys derived, two openings"),
        ("objects: GET 4 KiB without ring and HTTP", world.cold_get, native_get, "three keys derived, three openings"),
        ("objects: HEAD, opened lately", world.head, lambda: None, "nothing"),
        ("objects: GET 4 KiB, opened lately", world.get, native_open, "one opening"),
    ]
