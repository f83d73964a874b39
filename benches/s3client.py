"""The load generator's client: HTTP/1.1 over raw connections, SigV4, every body verified.

It shares no code with the server, and does as little as can be done for each request: on a machine whose cores it shares with the servers under
test, what the client costs is missing from the result.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import cast
from urllib.parse import quote, urlsplit

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """An S3 endpoint and whose keys to use."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    host: str = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        object.__setattr__(self, "host", parts.hostname or "127.0.0.1")
        object.__setattr__(self, "port", parts.port or 80)


@lru_cache(maxsize=8)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = ("AWS4" + secret).encode()
    for step in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    return key


def signed_head(target: Target, method: str, path: str, query: str = "", *, sha256: str = EMPTY_SHA256, length: int = 0) -> bytes:
    """A request head signed as AWS documents (Signature Version 4, header form). ``path`` is encoded already, ``query`` canonical already."""
    now = datetime.now(UTC)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    day = stamp[:8]
    host = f"{target.host}:{target.port}"
    canonical = f"{method}\n{path}\n{query}\nhost:{host}\nx-amz-content-sha256:{sha256}\nx-amz-date:{stamp}\n\nhost;x-amz-content-sha256;x-amz-date\n{sha256}"
    scope = f"{day}/{target.region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signature = hmac.digest(_signing_key(target.secret_key, day, target.region), text.encode(), "sha256").hex()
    return (
        f"{method} {path}{'?' + query if query else ''} HTTP/1.1\r\nHost: {host}\r\nx-amz-date: {stamp}\r\nx-amz-content-sha256: {sha256}\r\n"
        f"Authorization: AWS4-HMAC-SHA256 Credential={target.access_key}/{scope}, SignedHeaders=host;x-amz-content-sha256;x-amz-date, "
        f"Signature={signature}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def path_of(bucket: str, key: str) -> str:
    return f"/{bucket}/{quote(key)}" if key else f"/{bucket}"


class WrongAnswer(Exception):
    """The server answered an error, wrong bytes, or nothing."""


class Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = -1
        self._expected: memoryview | None = None
        self._offset = 0
        self._kept: bytearray | None = None
        self._wrong = False
        self._head_only = False
        self._answer: asyncio.Future[int] | None = None
        self._status = 0
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=2 << 20)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(WrongAnswer(f"the connection broke: {error}"))

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = bytes(self._head[: end + 2]), bytes(self._head[end + 4 :])
            self._head.clear()
            self._status = int(head[9:12])
            if self._status == 100:
                self.data_received(data)
                return
            length = _LENGTH.search(head)
            if length is None and self._status not in (204, 304):
                self._fail(f"no Content-Length in an answer of status {self._status}")
                return
            self._left = int(length[1]) if length and not self._head_only else 0
        if data:
            self._left -= len(data)
            if self._expected is not None and self._status < 300:
                self._wrong = self._wrong or data != self._expected[self._offset : self._offset + len(data)]
                self._offset += len(data)
            elif self._kept is not None:
                self._kept += data
        if self._left == 0:
            self._left = -1
            if self._expected is not None and self._status < 300 and self._offset != len(self._expected):
                self._wrong = True
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(self._status)
        elif self._left < 0:
            self._fail("more bytes than announced")

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(WrongAnswer(why))
        if self._transport is not None:
            self._transport.abort()

    async def request(
        self, head: bytes, body: memoryview | bytes = b"", *, expect: memoryview | None = None, head_only: bool = False
    ) -> bytes:
        """Sends, waits for the whole answer; returns its body when no ``expect``ed bytes were to be compared. Raises WrongAnswer."""
        if self._transport is None:
            raise WrongAnswer("not connected")
        self._expected, self._offset, self._wrong, self._head_only = expect, 0, False, head_only
        self._kept = bytearray() if expect is None else None
        self._answer = asyncio.get_running_loop().create_future()
        if len(body) <= 65536:
            self._transport.write(head + body if body else head)
        else:
            self._transport.write(head)
            view = memoryview(body)
            for start in range(0, len(view), 1 << 20):
                await self._writable.wait()
                if self._transport is None or self._answer.done():
                    break
                self._transport.write(view[start : start + (1 << 20)])
        status = await self._answer
        if status >= 300:
            raise WrongAnswer(f"status {status}: {bytes(self._kept or b'')[:300]!r}")
        if self._wrong:
            raise WrongAnswer("the body's bytes are not those that were written")
        return bytes(self._kept or b"")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(target: Target) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, target.host, target.port)
    return connection
