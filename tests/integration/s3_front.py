"""An S3 front on a loopback port, with real boto3 in threads and clients that send bytes.

The front is on the product's object plane, which is on doubles: a ring in one dict, disks in memory, plain keys.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3  # type: ignore[import-untyped]
import botocore.auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

from storaged.clock import SystemClock
from storaged.errors import DataDamaged
from storaged.node.quotas import quotas_of
from storaged.objects.api import (
    BodyChecks,
    NewMeta,
    ObjectInfo,
    ObjectStream,
    Principal,
    PutResult,
    RangeSpec,
    Reading,
    ReadResult,
)
from storaged.objects.destinations import Destinations
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.quotas import Quotas
from storaged.objects.read.streams import HeldStream
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.users import UserService
from storaged.s3.app import S3App
from storaged.s3.context import AccessLogSettings, Endpoint
from storaged.s3.http.limits import Limits
from storaged.s3.request import RequestDone
from storaged.wire import Buffer
from tests.patience import GUARD_S
from tests.worlds import objects

REGION = "eu-fr-1"
ACCESS, SECRET = "AKMAIN", "main/secret+key"
ACCESS_ALT, SECRET_ALT = "AKALT", "alt-secret"
NO_META = NewMeta()
NO_DELIVERY = AccessLogSettings(interval_s=3600)
"""Tests deliver by themselves."""


class WatchedStream:
    """An opened object; a test sees whether it was ``closed``. It breaks off after ``fail_after`` bytes, or comes in
    pieces of ``piece_bytes``.
    """

    def __init__(self, stream: ObjectStream, fail_after: int | None, piece_bytes: int) -> None:
        self._stream = stream
        self._fail_after = fail_after
        self._piece_bytes = piece_bytes
        self.info, self.first, self.length, self.partial = stream.info, stream.first, stream.length, stream.partial
        self.held = None if fail_after is not None else stream.held
        self.closed = False

    async def chunks(self) -> AsyncIterator[Buffer]:
        if self._piece_bytes:
            whole = b"".join([bytes(piece) async for piece in self._stream.chunks()])
            for at in range(0, len(whole), self._piece_bytes):
                yield whole[at : at + self._piece_bytes]
            return
        left = self.length if self._fail_after is None else self._fail_after
        async for piece in self._stream.chunks():
            if left:
                yield piece[:left]
            if len(piece) > left:
                raise DataDamaged
            left -= len(piece)

    async def close(self) -> None:
        self.closed = True
        await self._stream.close()

    def release(self) -> None:
        self.closed, self.held = True, None
        self._stream.release()


class WatchedObjects(ObjectService):
    """The object plane; a test sees what the front asks it, holds answers back, and breaks streams off."""

    def __init__(self, plane: ObjectPlane) -> None:
        super().__init__(plane)
        self.unwatched = ObjectService(plane)
        self.get, self.try_read, self.try_put = self._get, self._try_read, self._try_put  # type: ignore[assignment]
        self.streams: list[WatchedStream] = []
        self.readings: list[Reading | None] = []
        """What each ``get`` was given."""
        self.read_answers: list[ReadResult] = []
        """What ``try_read`` has answered."""
        self.put_answers: list[PutResult | Exception] = []
        """What ``try_put`` has answered."""
        self.answer: Callable[[Callable[[], None]], object] = lambda tell: tell()
        """When ``try_read`` and ``try_put`` answer."""
        self.busy = False
        """``try_put`` takes nothing on."""
        self.fail_after: int | None = None
        self.piece_bytes = 0
        """Of streams; 0: as they come."""

    async def _get(self, *which: Any, reading: Reading | None = None, **how: Any) -> WatchedStream:
        self.readings.append(reading)
        found = await self.unwatched.get(*which, reading=reading, **how)
        stream = WatchedStream(found, self.fail_after, self.piece_bytes)
        self.streams.append(stream)
        return stream

    def _try_read(
        self,
        bucket: BucketRecord,
        key: bytes,
        want_plain: bool,
        then: Callable[[ReadResult], None],
        span: RangeSpec | None = None,
    ) -> None:
        def answered(found: ReadResult) -> None:
            self.read_answers.append(found)
            then(found)

        def done(found: ReadResult) -> None:
            kept = None if self.fail_after is not None and isinstance(found, HeldStream) else found
            self.answer(lambda: answered(kept))

        self.unwatched.try_read(bucket, key, want_plain, done, span)

    def _try_put(self, *what: Any, **how: Any) -> bool:
        *what_else, then = what

        def answered(found: PutResult | Exception) -> None:
            self.put_answers.append(found)
            then(found)

        def done(found: PutResult | Exception) -> None:
            self.answer(lambda: answered(found))

        return not self.busy and self.unwatched.try_put(*what_else, done, **how)


class WarmBuckets(BucketService):
    """A bucket that was created is in the gateway's memory at once, and so is its key. No other gateway has to hear of
    a change.
    """

    def __init__(self, plane: ObjectPlane) -> None:
        super().__init__(plane)
        self._keys = plane.keys

    async def create(self, who: Principal, name: str, **named: Any) -> BucketRecord:
        made = await super().create(who, name, **named)
        await self._keys.bucket_key(made.id, made.countries)
        return await self.get(name)

    async def known_everywhere(self) -> None:
        return


@dataclass
class World:
    app: S3App
    port: int
    objects: WatchedObjects
    buckets: BucketService
    users: UserService
    quotas: Quotas
    below: objects.World
    """What the object plane is on."""
    done: list[RequestDone] = field(default_factory=list)

    async def put(
        self, key: str, data: bytes, meta: NewMeta = NO_META, *, bucket: str = "bucket", algorithm: str = ""
    ) -> PutResult:
        record = await self.buckets.get(bucket)
        checks = BodyChecks(size=len(data), algorithms=(algorithm,) if algorithm else ())
        return await self.objects.put(record, key.encode(), objects.pieces(data), meta, checks, owner=record.owner)

    async def stored(self, bucket: str = "bucket") -> dict[bytes, bytes]:
        """Key -> content of every object of a bucket."""
        record = await self.buckets.get(bucket)
        keys = (await self.objects.list_objects(record)).keys
        found = {}
        for key in keys:
            stream = await self.objects.unwatched.get(record, key)
            found[key] = b"".join([bytes(piece) async for piece in stream.chunks()])
        return found

    async def delete(self, key: str, *, bucket: str = "bucket") -> None:
        await self.objects.delete(await self.buckets.get(bucket), key.encode())

    async def upload_id(self, bucket: str = "bucket") -> str:
        """Of the first upload."""
        uploads, _, _ = await self.objects.list_uploads(await self.buckets.get(bucket))
        return uploads[0].upload_id

    async def head(self, key: str, *, bucket: str = "bucket") -> ObjectInfo:
        return await self.objects.head(await self.buckets.get(bucket), key.encode())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, access: str = ACCESS, secret: str = SECRET, region: str = REGION, **config: Any) -> Any:
        config.setdefault("s3", {"addressing_style": "path"})
        config.setdefault("retries", {"total_max_attempts": 1})
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=region,
            aws_access_key_id=access,
            aws_secret_access_key=secret,
            config=Config(**config),
        )

    async def raw(self, request: bytes, *, limit: int = 1 << 20) -> bytes:
        """Sends bytes, returns all that comes until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(limit), GUARD_S)
        while piece := await asyncio.wait_for(reader.read(limit), GUARD_S):
            answer += piece
        writer.close()
        return answer


@asynccontextmanager
async def s3_world(
    limits: Limits | None = None,
    domains: tuple[str, ...] = (),
    tls: Any = None,
    strict_region: bool = False,
    legacy: bool = False,
    website_domain: str = "",
    access_logs: AccessLogSettings = NO_DELIVERY,
    destinations: Destinations | None = None,
    far: bool = False,
    small_bytes_max: int = ObjectLimits.small_bytes_max,
) -> AsyncIterator[World]:
    clock = SystemClock()
    kept = ObjectLimits(bucket_cache_s=3600, user_cache_s=3600, small_bytes_max=small_bytes_max)
    below = objects.World(far=far, limits=kept)
    below.clock = clock
    plane = below.plane()
    service, buckets, users = WatchedObjects(plane), WarmBuckets(plane), UserService(plane)
    for name, access, secret in (("main", ACCESS, SECRET), ("alt", ACCESS_ALT, SECRET_ALT)):
        await users.add(name, access_key=access, secret_key=secret)
        await users.lookup(access)
    done: list[RequestDone] = []
    quotas = quotas_of(service, buckets, users, clock)
    app = S3App(
        service,
        buckets,
        users,
        Endpoint(
            REGION,
            legacy_buckets=legacy,
            strict_region=strict_region,
            domains=domains,
            website_domain=website_domain,
            limits=limits or Limits(),
            access_logs=access_logs,
        ),
        clock=clock,
        entropy=os.urandom,
        on_request=done.append,
        destinations=destinations,
        quotas=quotas,
    )
    port = await app.start("127.0.0.1", 0, ssl=tls)
    try:
        yield World(app, port, service, buckets, users, quotas, below, done)
    finally:
        await app.close(0.5)
        await service.close()


def crc32(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


class _Auth(botocore.auth.S3SigV4Auth):  # type: ignore[misc]
    said = ""

    def payload(self, request: AWSRequest) -> str:
        return self.said or str(super().payload(request))


def signed(
    world: World,
    method: str,
    target: str,
    *,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    send_body: bool = True,
    payload: str = "",
) -> bytes:
    """A signed request as bytes; ``headers`` are signed too. ``payload``: what x-amz-content-sha256 says, instead of
    the body's hash.
    """
    request = AWSRequest(method, f"{world.endpoint}{target}", headers=headers or {}, data=body)
    auth = _Auth(Credentials(ACCESS, SECRET), "s3", REGION)
    auth.said = payload
    auth.add_auth(request)
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{world.port}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if method == "PUT" or body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body if send_body else b"")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_S):
        while not holds():  # noqa: ASYNC110 - what is waited for happens on the other side of a socket
            await asyncio.sleep(0.005)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), GUARD_S)


async def ask(world: World, *pieces: bytes) -> bytes:
    """All that is answered to what is sent piece by piece, until the server closes, but for what differs from answer to
    answer. The client's end is closed behind it:
    ``Connection: close`` is for the task."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    for index, piece in enumerate(pieces):
        if index:
            await asyncio.sleep(0.02)
        writer.write(piece)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), GUARD_S)
    writer.close()
    return re.sub(rb"<RequestId>\w+<", b"<RequestId><", re.sub(rb"(x-amz-request-id|Date): [^\r]*\r\n", b"", answer))


def break_off(writer: asyncio.StreamWriter) -> None:
    """As a client does that is killed: with a reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Held:
    """``try_read`` and ``try_put`` answer when a test lets them."""

    def __init__(self, world: World) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._world = world
        world.objects.answer = self.waiting.append

    async def ask(self, method: str, key: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A client whose answer waits to be let go."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._world.port)
        writer.write(signed(self._world, method, f"/bucket/{key}", body=body))
        await until(lambda: len(self.waiting) == 1)
        return reader, writer

    def go(self) -> None:
        self.waiting.pop(0)()
