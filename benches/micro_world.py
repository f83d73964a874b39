"""The world of the micro-benchmarks: one user, one bucket, one object of 4 KiB, one key, three racks. All of it is in
memory, so that a path runs without an event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import uvloop

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.ids import system_entropy
from storaged.keys.bucketkey import UnwrappedBucketKey
from storaged.objects.api import LIST, Grant, ObjectInfo, Principal, PutResult, RangeSpec, ReadResult
from storaged.objects.read.span import Span
from storaged.objects.read.streams import HeldStream
from storaged.objects.records import BucketRecord
from storaged.s3.request import Request, parse_target
from storaged.units import KIB
from storaged.wire import Buffer

T = TypeVar("T")

ACCESS, SECRET, REGION = "MICROACCESSKEY", "micro/secret", "eu-fr-1"
SCOPE = b"bucket of micro."
BUCKET = BucketRecord("bench", SCOPE, "user", 0, "active", 16, REGION)

_CANONICAL, _TEXT, _KEY = bytes(230), bytes(130), bytes(32)


def finished(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("it waits for something")


def signature_floor() -> None:
    """The floor of a signature check: one SHA-256 and one HMAC."""
    hashlib.sha256(_CANONICAL).hexdigest()
    hmac.digest(_KEY, _TEXT, "sha256").hex()


def three_racks() -> Layout:
    """Three nodes with two disks each; the first of each has the register's replica."""
    nodes = tuple(NodeEntry(f"n{rack}", f"FR/par1/{rack}", "127.0.0.1:1", ("storage",)) for rack in "abc")
    disks = tuple(DiskEntry(f"{rack}{number:015}", f"n{rack}", 1) for rack in "abc" for number in range(2))
    return Layout("bench", 1, nodes, disks, tuple(disk.id for disk in disks[::2]))


def list_request(query: str) -> Request:
    """A GET of the bucket by its owner, in the state after admission."""
    request = Request("0", "GET", b"/bench?" + query.encode(), "", False)
    request.target, request.bucket = parse_target(request.raw_target), BUCKET.name
    request._bucket_record = BUCKET
    request._grant = Grant(BUCKET, None, LIST)
    return request


class OneKey:
    """A key service whose buckets have one key."""

    def __init__(self) -> None:
        self.key = UnwrappedBucketKey(1, bytes(32), system_entropy)

    def try_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> UnwrappedBucketKey:
        return self.key

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> UnwrappedBucketKey:
        return self.key


class OneObject:
    """Objects, buckets and users of the S3 front: one of each."""

    def __init__(self) -> None:
        self.plain = os.urandom(4 * KIB)
        self.info = ObjectInfo(
            b"key",
            "null",
            4 * KIB,
            1_700_000_000_000,
            "0" * 32,
            {"content-type": "image/jpeg"},
            {},
            {},
            {},
            "",
            "STANDARD",
            0,
        )
        self.who = Principal("user", "user", ACCESS)

    def fences_seen(self) -> int:
        return 0

    def gone(self, bucket: BucketRecord) -> bool:
        return False

    def try_get(self, name: str) -> BucketRecord | tuple[Principal, str]:
        return BUCKET if name == BUCKET.name else (self.who, SECRET)

    async def head(self, bucket: BucketRecord, key: bytes, **options: object) -> ObjectInfo:
        return self.info

    async def get(self, bucket: BucketRecord, key: bytes, **options: object) -> HeldStream:
        return HeldStream(self.info, Span(0, 4 * KIB, False), self.plain)

    def try_read(
        self,
        bucket: BucketRecord,
        key: bytes,
        want_plain: bool,
        then: Callable[[ReadResult], None],
        span: RangeSpec | None = None,
    ) -> None:
        then(HeldStream(self.info, Span(0, 4 * KIB, False), self.plain) if want_plain else self.info)

    small_bytes_max = 16 * KIB

    def try_put(
        self,
        bucket: BucketRecord,
        key: bytes,
        plain: Buffer,
        meta: object,
        checks: object,
        then: Callable[[PutResult | Exception], None],
        **options: object,
    ) -> bool:
        assert len(plain) == len(self.plain)
        then(PutResult("0" * 32))
        return True


class Side:
    """A thread with its own event loop, so that its CPU time can be measured apart from the caller's."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return await asyncio.wrap_future(done)

    async def cpu_s(self) -> float:
        async def now() -> float:
            return time.thread_time()

        return await self.run(now())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
