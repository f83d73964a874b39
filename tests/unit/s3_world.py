"""An S3 front on the in-memory object plane, on a loopback port, with real boto3 in threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]

from storaged.clock import SystemClock
from storaged.s3.app import S3App
from storaged.s3.limits import Limits
from storaged.s3.request import RequestDone
from tests.unit.fake_object_service import FakeBuckets, FakeObjects, FakeUsers

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
        answer = await asyncio.wait_for(reader.read(limit), 10)
        while piece := await asyncio.wait_for(reader.read(limit), 10):
            answer += piece
        writer.close()
        return answer


@asynccontextmanager
async def s3_world(limits: Limits | None = None, domains: tuple[str, ...] = (), tls: Any = None) -> AsyncIterator[World]:
    clock = SystemClock()
    objects = FakeObjects(clock.wall_ms)
    buckets, users = FakeBuckets(objects), FakeUsers()
    await users.add("main", access_key=ACCESS, secret_key=SECRET)
    await users.add("alt", access_key=ACCESS_ALT, secret_key=SECRET_ALT)
    done: list[RequestDone] = []
    app = S3App(
        objects, buckets, users, region=REGION, domains=domains, clock=clock, entropy=os.urandom, limits=limits, on_request=done.append
    )
    port = await app.start("127.0.0.1", 0, ssl=tls)
    try:
        yield World(app, port, objects, buckets, users, done)
    finally:
        await app.close(0.5)
