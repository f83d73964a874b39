"""The load generator's client: HTTP/1.1 over raw connections, SigV4, every body verified.

It shares no code with the server, and does as little as can be done for each request: on a machine whose cores it shares with the servers under
test, what the client costs is missing from the result.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import cast
from urllib.parse import quote, urlsplit

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
HEAD_BYTES_MAX = 64 * 1024
KEPT_BYTES_MAX = 16 * 1024 * 1024
"""Of an answer that is not compared with what was written: a list page, an error."""

SILENCE_S_MAX = 60.0
"""A connection that neither takes nor gives a byte for so long has failed."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """An S3 endpoint and whose keys to use. Raises ValueError for what is no http URL."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    host: str = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{self.endpoint!r} is not http://HOST:PORT; TLS would measure this client's own decryption")
        object.__setattr__(self, "host", parts.hostname)
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
    """One kept-alive connection; one request at a time. The answer's body has a length or is chunked."""

    def __init__(self) -> None:
        self._raw = bytearray()
        """Of the head, or of a chunked body, what could not be taken yet."""
        self._in_body = False
        self._left = 0
        self._chunked = False
        self._expected: memoryview | None = None
        self._offset = 0
        self._kept: bytearray | None = None
        self._wrong = False
        self._head_only = False
        self.announced = -1
        """The Content-Length of the last answer, HEAD's too; -1 when it had none."""
        self._answer: asyncio.Future[int] | None = None
        self._status = 0
        self._heard_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=2 << 20)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._heard_at = time.monotonic()
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(WrongAnswer(f"the connection broke before the answer was whole: {error or 'closed by the server'}"))

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        if self._answer is None or self._answer.done():
            self.fail("bytes nobody asked for")
            return
        if not self._in_body:
            self._raw += data
            end = self._raw.find(b"\r\n\r\n")
            if end < 0:
                if len(self._raw) > HEAD_BYTES_MAX:
                    self.fail(f"a head of more than {HEAD_BYTES_MAX} bytes")
                return
            head, data = bytes(self._raw[: end + 2]), bytes(self._raw[end + 4 :])
            self._raw.clear()
            if not self._begin_body(head):
                if data:
                    self.data_received(data)
                return
        if self._chunked:
            self._take_chunks(data)
        else:
            self._left -= len(data)
            self._take(data)
            if self._left < 0:
                self.fail("more bytes than announced")
            elif self._left == 0:
                self._finish()

    def _begin_body(self, head: bytes) -> bool:
        """False for 100 Continue, and when the answer has failed."""
        status = _STATUS.match(head)
        if status is None:
            self.fail(f"not HTTP/1.1: {head[:60]!r}")
            return False
        self._status = int(status[1])
        if self._status == 100:
            return False
        length = _LENGTH.search(head)
        self.announced = int(length[1]) if length else -1
        self._chunked = _CHUNKED.search(head) is not None and not self._head_only
        if length is None and not self._chunked and not self._head_only and self._status not in (204, 304):
            self.fail(f"no Content-Length in an answer of status {self._status}")
            return False
        self._left = self.announced if length and not self._head_only and not self._chunked else 0
        self._in_body = True
        return True

    def _take(self, piece: bytes | memoryview) -> None:
        if self._expected is not None and self._status < 300:
            # as bytes: comparing a memoryview looks at one byte at a time, 1.7 s/GiB instead of 0.06
            self._wrong = self._wrong or piece != self._expected[self._offset : self._offset + len(piece)].tobytes()
            self._offset += len(piece)
        elif self._kept is not None and piece:
            if len(self._kept) + len(piece) > KEPT_BYTES_MAX:
                self.fail(f"an answer of more than {KEPT_BYTES_MAX} bytes")
                return
            self._kept += piece

    def _take_chunks(self, data: bytes) -> None:
        """RFC 9112, section 7.1. ``_left`` counts a chunk's bytes and the line end behind them; -1: in the trailer."""
        self._raw += data
        while self._raw:
            if self._left > 0:
                piece = bytes(self._raw[: self._left])
                self._take(piece[: max(0, min(len(piece), self._left - 2))])
                self._left -= len(piece)
                del self._raw[: len(piece)]
                continue
            end = self._raw.find(b"\r\n")
            if end < 0:
                if len(self._raw) > 4096:
                    self.fail("a chunk without a size")
                return
            line = bytes(self._raw[:end])
            del self._raw[: end + 2]
            if self._left < 0:
                if not line:
                    self._finish()
                continue
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                self.fail(f"not a chunk's size: {line[:40]!r}")
                return
            self._left = size + 2 if size else -1

    def _finish(self) -> None:
        self._in_body = False
        self._left = 0
        if self._expected is not None and self._status < 300 and self._offset != len(self._expected):
            self._wrong = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._status)

    def fail(self, why: str) -> None:
        """The request in flight, if there is one, raises WrongAnswer; the connection is of no use any more."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(WrongAnswer(why))
        self.close()

    def silent_s(self, now: float) -> float:
        """How long the request in flight has waited for a byte to move; 0 when there is none."""
        return now - self._heard_at if self._answer is not None and not self._answer.done() else 0.0

    async def request(
        self, head: bytes, body: memoryview | bytes = b"", *, expect: memoryview | None = None, head_only: bool = False
    ) -> bytes:
        """Sends, waits for the whole answer; returns its body when no ``expect``ed bytes were to be compared. Raises WrongAnswer."""
        if self._transport is None or self._transport.is_closing():
            raise WrongAnswer("not connected")
        self._expected, self._offset, self._wrong, self._head_only = expect, 0, False, head_only
        self._kept = bytearray()
        self._answer = asyncio.get_running_loop().create_future()
        self._heard_at = time.monotonic()
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
            raise WrongAnswer(f"status {status}: {bytes(self._kept[:300])!r}")
        if self._wrong:
            raise WrongAnswer(f"the body is not what was written ({self._offset} bytes came)")
        return bytes(self._kept)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(target: Target) -> Connection:
    """Raises OSError."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, target.host, target.port)
    return connection


async def watch_silence(connections: list[Connection], seconds_max: float = SILENCE_S_MAX) -> None:
    """Fails requests on connections where nothing moves; runs until it is cancelled. One look a second costs less than a timer for each request."""
    while True:
        await asyncio.sleep(min(1.0, seconds_max / 4))
        now = time.monotonic()
        for connection in connections:
            if connection.silent_s(now) > seconds_max:
                connection.fail(f"no answer within {seconds_max:g} s")
