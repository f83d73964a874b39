"""Sending answers: one write for a small one, piece by piece with back-pressure for an object; and what becomes of a body nobody read.

A piece of an object may lie in a pooled buffer that is used again when the next is asked for. So the transport may keep nothing: its high-water mark is 0,
and each piece has gone to the kernel (or through TLS) before the next is taken.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

from aiohttp import web
from aiohttp.http import HttpVersion11

from storaged.clock import Clock
from storaged.errors import DataDamaged, S3Error
from storaged.objects.api import ObjectStream
from storaged.s3 import xml
from storaged.s3.headers import http_time
from storaged.s3.limits import Limits
from storaged.s3.reply import REASONS, XML_TYPE, Reply
from storaged.s3.request import Request
from storaged.units import KIB

log = logging.getLogger("storaged.s3")

JOIN_BYTES_MAX = 64 * KIB
"""Up to here copying head and body together is cheaper than a second system call."""

_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")


class Sent(NamedTuple):
    reply: Reply
    bytes_out: int
    complete: bool
    keep_alive: bool


class Sender:
    """Writes replies of one front to its connections."""

    def __init__(self, limits: Limits, clock: Clock, host_id: str) -> None:
        self._limits = limits
        self._clock = clock
        self._host_id = host_id

    def continuation(self, raw: web.BaseRequest) -> Callable[[], None]:
        def go_on() -> None:
            if raw.transport is not None and not raw.transport.is_closing():
                raw.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

        return go_on

    async def send(self, raw: web.BaseRequest, request: Request, reply: Reply, may_keep: bool) -> Sent:
        """Never raises but for cancellation: a client that has gone is no error of ours."""
        body = request._body
        if body is not None and body.awaited and reply.status < 300:
            body.go_on()  # asked for it and is welcome: some clients insist, even when nothing more was needed of them
        keep = may_keep and self._can_drain(request)
        bytes_out = 0
        complete = False
        try:
            if reply.stream is None:
                head = self._head(raw, request, reply, keep)
                payload = b"" if request.method == "HEAD" or reply.status in (204, 304) else reply.body
                await self._write(raw, head + payload if len(payload) <= JOIN_BYTES_MAX else head)
                if len(payload) > JOIN_BYTES_MAX:
                    await self._write(raw, payload)
                bytes_out = len(payload)
                complete = True
            else:
                reply, bytes_out, complete = await self._send_stream(raw, request, reply, reply.stream, keep)
        except (ConnectionError, TimeoutError):
            pass
        except ValueError:
            log.exception("the answer to %s cannot be sent, request %s", request.operation, request.id)
        if not complete:
            if raw.transport is not None:
                raw.transport.abort()
            return Sent(reply, bytes_out, False, False)
        if body is not None and not body.complete:
            keep = await self._drain(raw, request, keep)
        return Sent(reply, bytes_out, True, keep)

    # --- heads ----------------------------------------------------------------------------------------------------------

    def _head(self, raw: web.BaseRequest, request: Request, reply: Reply, keep: bool) -> bytes:
        lines = [
            f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Unknown')}\r\n"
            f"x-amz-request-id: {request.id}\r\nx-amz-id-2: {self._host_id}\r\n"
            f"Date: {http_time(self._clock.wall_ms() // 1000)}\r\nServer: storaged\r\n"
        ]
        for name, value in reply.headers.items():
            if _CONTROL.search(value):
                raise ValueError(f"control character in the value of {name}")
            lines.append(f"{name}: {value}\r\n")
        if reply.status not in (204, 304):
            length = len(reply.body) if reply.length is None else reply.length
            if length >= 0:
                lines.append(f"Content-Length: {length}\r\n")
        if not keep:
            lines.append("Connection: close\r\n")
        elif raw.version < HttpVersion11:
            lines.append("Connection: keep-alive\r\n")
        lines.append("\r\n")
        return "".join(lines).encode("utf-8", "surrogateescape")

    # --- bodies ---------------------------------------------------------------------------------------------------------

    async def _write(self, raw: web.BaseRequest, data: bytes | bytearray | memoryview) -> None:
        """Raises ConnectionError, and TimeoutError for a client that takes nothing."""
        transport = raw.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("The client has gone.")
        transport.write(data)
        if raw.protocol.writing_paused:
            async with asyncio.timeout(self._limits.send_idle_s):
                await raw.writer.drain()

    async def _send_stream(
        self, raw: web.BaseRequest, request: Request, reply: Reply, stream: ObjectStream, keep: bool
    ) -> tuple[Reply, int, bool]:
        """(the reply, bytes sent, whether it was all). A failure before the first byte becomes a proper answer; a later one breaks the connection, so that
        no client takes a part for the whole."""
        sent = 0
        head = b""
        try:
            head = self._head(raw, request, reply, keep)
            async for piece in stream.chunks():
                if head:
                    if raw.transport is not None:
                        # TLS has copied what it encrypted; with a limit of 0 it would pause at an empty buffer, for ever
                        raw.transport.set_write_buffer_limits(high=1 if request.secure else 0)
                    if len(piece) <= JOIN_BYTES_MAX:
                        await self._write(raw, b"".join((head, piece)))
                    else:
                        await self._write(raw, head)
                        await self._write(raw, piece)
                    head = b""
                else:
                    await self._write(raw, piece)
                sent += len(piece)
            if sent != stream.length:
                raise DataDamaged(f"{sent} of {stream.length} bytes were read")
            if head:
                await self._write(raw, head)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.warning("reading %s broke off after %d bytes, request %s", request.operation, sent, request.id, exc_info=error)
            if not head:
                return reply, sent, False
            failure = self._failure(request, error)
            await self._write(raw, self._head(raw, request, failure, keep) + failure.body)
            return failure, len(failure.body), True
        finally:
            await stream.close()
        return reply, sent, True

    def _failure(self, request: Request, error: Exception) -> Reply:
        shown = error if isinstance(error, S3Error) else DataDamaged()
        body = xml.error_document(shown.code, shown.message, shown.details, request.resource, request.id, self._host_id)
        return Reply(shown.status, {"Content-Type": XML_TYPE}, body, code=shown.code)

    # --- what was not read ------------------------------------------------------------------------------------------------

    def _can_drain(self, request: Request) -> bool:
        """May the connection be kept: is what is left of the body there already, or small?"""
        body = request._body
        if body is None:
            return False
        if body.complete:
            return True
        if body.awaited:
            return False
        return body.length is None or body.length - body.bytes_read <= self._limits.drain_bytes_max

    async def _drain(self, raw: web.BaseRequest, request: Request, keep: bool) -> bool:
        """Reads the rest of a body away after its answer. Closing with unread bytes would reset the connection, and the client might never see the answer."""
        body = request._body
        assert body is not None
        if keep:
            return await body.discard(self._limits.drain_bytes_max, self._limits.linger_s)
        transport = raw.transport
        if transport is not None and transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
        await body.discard(self._limits.linger_bytes_max, self._limits.linger_s)
        return False
