"""The load generator's client: HTTP/1.1 over raw connections, SigV4, every body verified.

It shares no code with the server, and does as little as possible for each request: it uses the same cores as the
servers under test, so its cost reduces the result.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast
from urllib.parse import quote, urlsplit

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
HEAD_BYTES_MAX = 64 * 1024
KEPT_BYTES_MAX = 16 * 1024 * 1024
"""Limit for an answer that is kept and not compared with a body: a list page, an error."""

PIECE_BYTES = 1 << 20
"""How much of a large body the transport gets at a time."""

SILENCE_S_MAX = 60.0
"""A connection without any traffic for this time has failed."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """An S3 endpoint and the keys to use. Raises ValueError for an endpoint that is no URL of a server. The certificate
    of an https server is not checked; the load generator's own decryption counts as client's CPU.
    """

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    host: str = field(init=False)
    port: int = field(init=False)
    secure: bool = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.endpoint!r} is not http://HOST:PORT or https://HOST:PORT")
        object.__setattr__(self, "host", parts.hostname)
        object.__setattr__(self, "secure", parts.scheme == "https")
        object.__setattr__(self, "port", parts.port or (443 if self.secure else 80))


class Signer:
    """Request heads, signed as AWS documents (Signature Version 4, header form). The parts that do not change within a
    second are computed once a second.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._host = f"{target.host}:{target.port}"
        self._second = -1

    def _begin_second(self, second: int) -> None:
        target = self._target
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        scope = f"{stamp[:8]}/{target.region}/s3/aws4_request"
        key = ("AWS4" + target.secret_key).encode()
        for step in (stamp[:8], target.region, "s3", "aws4_request"):
            key = hmac.digest(key, step.encode(), "sha256")
        self._second, self._key = second, key
        self._date = f"\nx-amz-date:{stamp}\n\nhost;x-amz-content-sha256;x-amz-date\n"
        self._text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n"
        self._before = f" HTTP/1.1\r\nHost: {self._host}\r\nx-amz-date: {stamp}\r\nx-amz-content-sha256: "
        self._between = (
            f"\r\nAuthorization: AWS4-HMAC-SHA256 Credential={target.access_key}/{scope}, "
            "SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature="
        )

    def head(
        self,
        method: str,
        path: str,
        query: str = "",
        *,
        sha256: str = EMPTY_SHA256,
        length: int = 0,
        unsigned: str = "",
    ) -> bytes:
        """``path`` is already encoded, ``query`` already canonical. ``sha256`` and ``length`` are the body's.
        ``unsigned``: further header lines, which are not signed.
        """
        second = int(time.time())
        if second != self._second:
            self._begin_second(second)
        canonical = f"{method}\n{path}\n{query}\nhost:{self._host}\nx-amz-content-sha256:{sha256}{self._date}{sha256}"
        text = self._text + hashlib.sha256(canonical.encode()).hexdigest()
        signature = hmac.digest(self._key, text.encode(), "sha256").hex()
        asked = f"{path}?{query}" if query else path
        signed = f"{method} {asked}{self._before}{sha256}{self._between}{signature}"
        return f"{signed}\r\nContent-Length: {length}\r\n{unsigned}\r\n".encode()


def signed_head(
    target: Target, method: str, path: str, query: str = "", *, sha256: str = EMPTY_SHA256, length: int = 0
) -> bytes:
    """One head; see ``Signer.head``."""
    return Signer(target).head(method, path, query, sha256=sha256, length=length)


def path_of(bucket: str, key: str) -> str:
    return f"/{bucket}/{quote(key)}" if key else f"/{bucket}"


class WrongAnswer(Exception):
    """The server answered an error, wrong bytes, or nothing. ``status``: of the answer, where it is an error."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Ask(NamedTuple):
    """One request, and what its answer must be. ``expect``: the body of the answer, compared while it arrives.
    ``check(connection)`` checks the rest of the answer (``kept``, ``announced``), and raises WrongAnswer.
    ``then(kept)``: the next request of the same operation, from the body of this answer; None when it was the last.
    """

    head: bytes
    body: memoryview | bytes = b""
    expect: memoryview | None = None
    head_only: bool = False
    check: Callable[[Connection], None] | None = None
    then: Callable[[bytes], Ask | None] | None = None


Done = Callable[[WrongAnswer | None], None]
"""``done(None)``: the whole answer arrived and was correct."""


class Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time. The answer's body has a length or is chunked."""

    def __init__(self) -> None:
        self._raw = bytearray()
        """Bytes of the head or of a chunked body that are not parsed yet."""
        self._in_body = False
        self._left = 0
        self._chunked = False
        self._ask = _NOTHING
        self._done: Done | None = None
        """The callback of the request in flight; None when there is none."""
        self._offset = 0
        self._wrong = False
        self._status = 0
        self.kept = bytearray()
        """The body of the last answer, if no body was expected or it was an error."""
        self.announced = -1
        """The Content-Length of the last answer, HEAD's too; -1 when it had none."""
        self._heard_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._unsent = memoryview(b"")
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=2 << 20)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._heard_at = time.monotonic()
        self._paused = False
        self._send_on()

    def _send_on(self) -> None:
        while self._unsent and not self._paused and self._transport is not None:
            piece, self._unsent = self._unsent[:PIECE_BYTES], self._unsent[PIECE_BYTES:]
            self._transport.write(piece)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end(WrongAnswer(f"the connection broke before the answer was whole: {error or 'closed by the server'}"))

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        if self._done is None:
            self.fail("bytes without a request")
            return
        if not self._in_body:
            if self._raw:
                self._raw += data
                data = bytes(self._raw)
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._raw = bytearray(data)
                if len(data) > HEAD_BYTES_MAX:
                    self.fail(f"a head of more than {HEAD_BYTES_MAX} bytes")
                return
            if self._raw:
                self._raw.clear()
            head, data = data[: end + 2], data[end + 4 :]
            if not self._begin_body(head):
                if data and self._done is not None:
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
        """Returns False for 100 Continue, and when the answer has failed."""
        ask = self._ask
        status = _STATUS.match(head)
        if status is None:
            self.fail(f"not HTTP/1.1: {head[:60]!r}")
            return False
        self._status = int(status[1])
        if self._status == 100:
            return False
        length = _LENGTH.search(head)
        self.announced = int(length[1]) if length else -1
        self._chunked = length is None and not ask.head_only and _CHUNKED.search(head) is not None
        if length is None and not self._chunked and not ask.head_only and self._status not in (204, 304):
            self.fail(f"no Content-Length in an answer of status {self._status}")
            return False
        self._left = self.announced if length and not ask.head_only else 0
        self._in_body = True
        return True

    def _take(self, piece: bytes | memoryview) -> None:
        expected = self._ask.expect
        if expected is not None and self._status < 300:
            # as bytes: a memoryview is compared byte by byte, which takes 1.7 s/GiB in place of 0.06
            self._wrong = self._wrong or piece != expected[self._offset : self._offset + len(piece)].tobytes()
            self._offset += len(piece)
        elif piece:
            if len(self.kept) + len(piece) > KEPT_BYTES_MAX:
                self.fail(f"an answer of more than {KEPT_BYTES_MAX} bytes")
                return
            self.kept += piece

    def _take_chunks(self, data: bytes) -> None:
        """RFC 9112, section 7.1. ``_left`` counts the bytes of a chunk and its line end; -1 in the trailer."""
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
        """Checks a complete answer."""
        self._in_body = False
        self._left = 0
        ask = self._ask
        if self._status >= 300:
            self._end(WrongAnswer(f"status {self._status}: {bytes(self.kept[:300])!r}", self._status))
        elif self._wrong or (ask.expect is not None and self._offset != len(ask.expect)):
            self._end(WrongAnswer(f"the body is not what was written ({self._offset} bytes came)"))
        elif self._unsent:
            self.fail("answered before the body was sent")
        elif ask.check is None:
            self._end(None)
        else:
            try:
                ask.check(self)
            except WrongAnswer as error:
                self._end(error)
            else:
                self._end(None)

    def _end(self, error: WrongAnswer | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(error)

    def fail(self, why: str) -> None:
        """Ends the request in flight, if there is one, with WrongAnswer. The connection cannot be used any more."""
        self.close()
        self._end(WrongAnswer(why))

    def silent_s(self, now: float) -> float:
        """Seconds since the request in flight sent or received a byte; 0 when there is none."""
        return now - self._heard_at if self._done is not None else 0.0

    def begin(self, ask: Ask, done: Done) -> None:
        """Sends a request. Calls ``done`` once, when the answer is complete or has failed (possibly before this
        returns).
        """
        self._ask, self._done = ask, done
        transport = self._transport
        if transport is None or transport.is_closing():
            self._end(WrongAnswer("not connected"))
            return
        self._offset, self._wrong = 0, False
        if self.kept:
            self.kept.clear()
        self._heard_at = time.monotonic()
        if len(ask.body) <= 65536:
            transport.write(ask.head + ask.body if ask.body else ask.head)
        else:
            transport.write(ask.head)
            self._unsent = memoryview(ask.body)
            self._send_on()

    def following(self) -> Ask | None:
        """The next request of the operation whose answer has just come."""
        then = self._ask.then
        return None if then is None else then(bytes(self.kept))

    async def request(self, head: bytes, *, head_only: bool = False) -> bytes:
        """Sends a request and waits for the whole answer. Returns its body. Raises WrongAnswer."""
        answered: asyncio.Future[WrongAnswer | None] = asyncio.get_running_loop().create_future()
        self.begin(Ask(head, head_only=head_only), lambda error: answered.done() or answered.set_result(error))
        if (error := await answered) is not None:
            raise error
        return bytes(self.kept)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


_NOTHING = Ask(b"")


async def connect(target: Target) -> Connection:
    """Raises OSError."""
    context = _unchecked() if target.secure else None
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, target.host, target.port, ssl=context)
    return connection


@functools.cache
def _unchecked() -> ssl.SSLContext:
    """For servers that this process has started, with a certificate that they have made themselves."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def watch_silence(connections: list[Connection], seconds_max: float = SILENCE_S_MAX) -> None:
    """Fails the requests of connections without traffic. Runs until it is cancelled. One check a second costs less than
    a timer for each request.
    """
    while True:
        await asyncio.sleep(min(1.0, seconds_max / 4))
        now = time.monotonic()
        for connection in connections:
            if connection.silent_s(now) > seconds_max:
                connection.fail(f"no answer within {seconds_max:g} s")
