"""An S3 front on the in-memory object plane, on a loopback port, with real boto3 in threads, and clients that send
bytes.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
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
from storaged.s3.app import S3App
from storaged.s3.http.limits import Limits
from storaged.s3.request import RequestDone
from tests.doubles.object_service import FakeBuckets, FakeObjects, FakeUsers
from tests.patience import GUARD_S

REGION = "eu-fr-1"
ACCESS, SECRET = "AKMAIN", "main/secret+key"
ACCESS_ALT, SECRET_ALT = "AKALT", "alt-secret"


@dataclass
class World:
    app: S3App
    port: int
    objects: FakeObjects
    buckets: FakeBuckets
    users: FakeUsers
    done: list[RequestDone] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, access: str = ACCESS, secret: str = SECRET, region: str = REGION, **config: Any) -> Any:
        config.setdefault("s3", {"addressing_style": "path"})
        config.setdefault("retries", {"max_attempts": 1})
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
    limits: Limits | None = None, domains: tuple[str, ...] = (), tls: Any = None, strict_region: bool = False
) -> AsyncIterator[World]:
    clock = SystemClock()
    objects = FakeObjects(clock.wall_ms)
    buckets, users = FakeBuckets(objects), FakeUsers()
    await users.add("main", access_key=ACCESS, secret_key=SECRET)
    await users.add("alt", access_key=ACCESS_ALT, secret_key=SECRET_ALT)
    done: list[RequestDone] = []
    app = S3App(
        objects,
        buckets,
        users,
        region=REGION,
        strict_region=strict_region,
        domains=domains,
        clock=clock,
        entropy=os.urandom,
        limits=limits,
        on_request=done.append,
    )
    port = await app.start("127.0.0.1", 0, ssl=tls)
    try:
        yield World(app, port, objects, buckets, users, done)
    finally:
        await app.close(0.5)


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
    """``try_read`` and ``try_put`` tell when they are let go."""

    def __init__(self, world: World) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._world = world
        world.objects.soon = self.waiting.append

    async def ask(self, method: str, key: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A client whose answer waits to be let go."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._world.port)
        writer.write(signed(self._world, method, f"/bucket/{key}", body=body))
        await until(lambda: len(self.waiting) == 1)
        return reader, writer

    def go(self) -> None:
        self.waiting.pop(0)()
