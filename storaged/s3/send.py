"""Sends answers: a small one in one write, an object piece by piece with back-pressure. Drops unread bodies.

A piece of an object may be in a pooled buffer that is reused when the next piece is asked for. So the transport may
keep nothing: each piece has gone to the kernel (or through TLS) before the next is taken (``http.connection``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NamedTuple

from storaged.clock import Clock
from storaged.errors import DataDamaged, S3Error
from storaged.s3 import xml
from storaged.s3.headers import http_time
from storaged.s3.http.body import RequestBody
from storaged.s3.http.connection import Connection
from storaged.s3.http.limits import Limits
from storaged.s3.reply import CONTROL, REASONS, XML_TYPE, Pieces, Reply
from storaged.s3.request import Request
from storaged.units import KIB

log = logging.getLogger("storaged.s3")

JOIN_BYTES_MAX = 64 * KIB
"""Up to this size, joining head and body costs less than a second system call."""

UNKNOWN_BYTES = 1 << 62
"""The length of what a client sends after its last answer."""


class Sent(NamedTuple):
    reply: Reply
    bytes_out: int
    complete: bool
    keep_alive: bool
    unread: bool
    """The client may still be sending its request; see ``drop_rest``."""


def _check_printable(headers: Mapping[str, str]) -> None:
    """Raises ValueError for a control character."""
    for name, value in headers.items():
        if CONTROL.search(value):
            raise ValueError(f"control character in the value of {name}")


class Sender:
    """Writes the answers of one S3 port to its connections."""

    def __init__(self, limits: Limits, clock: Clock, host_id: str) -> None:
        self._limits = limits
        self._clock = clock
        self._host_id = host_id
        self._second = -1
        self._common = ""
        """The header lines that all answers of one second have."""

    def write(self, connection: Connection, request: Request, reply: Reply, keep: bool) -> int:
        """Writes an answer that is no stream. Returns the bytes of its body. Raises ConnectionResetError, ValueError.
        See ``Connection.paused``."""
        data = self._head(request, reply, keep)
        payload = b"" if request.method == "HEAD" or reply.status in (204, 304) else reply.body
        if len(payload) <= JOIN_BYTES_MAX:
            connection.write(data + payload)
        else:
            connection.write(data)
            connection.write(payload)
        return len(payload)

    async def send(self, connection: Connection, request: Request, reply: Reply, may_keep: bool) -> Sent:
        """Raises only CancelledError: a client that has gone is no error of this server."""
        body = request._body
        if body is not None and body.expects_continue and reply.status < 300:
            body.send_continue()  # some clients insist on the interim answer, even when the server needs nothing more
        keep = may_keep and self._can_drain(request)
        bytes_out, complete = 0, False
        try:
            if reply.stream is None:
                bytes_out = self.write(connection, request, reply, keep)
                if connection.paused:
                    await connection.drain()
                complete = True
            else:
                reply, bytes_out, complete = await self._send_stream(connection, request, reply, reply.stream, keep)
        except (ConnectionError, TimeoutError):
            pass
        except ValueError:
            log.exception("the answer to %s cannot be sent, request %s", request.operation, request.id)
        if not complete:
            connection.transport.abort()
        return Sent(reply, bytes_out, complete, keep and complete, complete and (body is None or not body.complete))

    async def finish(self, connection: Connection, sent: Sent) -> Sent:
        """Waits until the client has taken an answer that ``write`` has written. Raises as ``send``."""
        try:
            await connection.drain()
        except (ConnectionError, TimeoutError):
            connection.transport.abort()
            return sent._replace(complete=False, keep_alive=False)
        return sent

    # --- heads --------------------------------------------------------------------------------------------------------

    def _head(self, request: Request, reply: Reply, keep: bool) -> bytes:
        """Raises ValueError for a control character in a header."""
        status, second = reply.status, self._clock.wall_ms() // 1000
        if second != self._second:
            self._second = second
            self._common = f"x-amz-id-2: {self._host_id}\r\nDate: {http_time(second)}\r\nServer: storaged\r\n"
        text = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nx-amz-request-id: {request.id}\r\n{self._common}"
        if headers := reply.headers:
            if not "".join(headers.values()).isprintable():
                _check_printable(headers)
            text += "\r\n".join(map(": ".join, headers.items())) + "\r\n"
        if status not in (204, 304):
            length = len(reply.body) if reply.length is None else reply.length
            if length >= 0:
                text += f"Content-Length: {length}\r\n"
        if not keep:
            text += "Connection: close\r\n"
        elif not request.http11:
            text += "Connection: keep-alive\r\n"
        return (text + "\r\n").encode("utf-8", "surrogateescape")

    # --- bodies -------------------------------------------------------------------------------------------------------

    async def _send_stream(
        self, connection: Connection, request: Request, reply: Reply, stream: Pieces, keep: bool
    ) -> tuple[Reply, int, bool]:
        """(the answer, bytes sent, whether all was sent). A failure before the first byte becomes an error answer. A
        later one breaks the connection, so that no client takes a part for the whole."""
        sent = 0
        head = b""
        try:
            head = self._head(request, reply, keep)
            async for piece in stream.chunks():
                if not head:
                    connection.write(piece)
                elif len(piece) <= JOIN_BYTES_MAX:
                    connection.write(b"".join((head, piece)))
                else:
                    connection.write(head)
                    connection.write(piece)
                head = b""
                if connection.paused:
                    await connection.drain()
                sent += len(piece)
                del piece  # else this view keeps its memory from being reused while the next piece is awaited
            if sent != stream.length:
                raise DataDamaged(f"{sent} of {stream.length} bytes were read")
            if head:
                connection.write(head)
                await connection.drain()
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.warning(
                "reading %s broke off after %d bytes, request %s", request.operation, sent, request.id, exc_info=error
            )
            if not head:
                return reply, sent, False
            failure = self._failure(request, error)
            connection.write(self._head(request, failure, keep) + failure.body)
            await connection.drain()
            return failure, len(failure.body), True
        finally:
            await stream.close()
        return reply, sent, True

    def _failure(self, request: Request, error: Exception) -> Reply:
        shown = error if isinstance(error, S3Error) else DataDamaged()
        body = xml.error_document(shown.code, shown.message, shown.details, request.resource, request.id, self._host_id)
        return Reply(shown.status, {"Content-Type": XML_TYPE}, body, code=shown.code)

    # --- unread bodies ------------------------------------------------------------------------------------------------

    def _can_drain(self, request: Request) -> bool:
        """Whether the connection can be kept: the rest of the body has arrived already, or is small."""
        body = request._body
        if body is None:
            return False
        if body.complete:
            return True
        if body.expects_continue or body.failed:
            return False
        return body.length is None or body.length - body.bytes_received <= self._limits.drain_bytes_max

    async def drop_rest(self, connection: Connection, request: Request, sent: Sent) -> bool:
        """Drops the rest of the body, within bounds. True when the connection can carry another request."""
        if sent.keep_alive:
            return await request.body.discard(self._limits.drain_bytes_max, self._limits.linger_s)
        await self._linger(connection)
        return False

    async def _linger(self, connection: Connection) -> None:
        """Drops what a client still sends after its last answer. Closing a socket with unread bytes resets the
        connection, and the client might not read the answer."""
        connection.write_eof()
        rest = RequestBody(connection, UNKNOWN_BYTES, None, self._limits)
        connection.open_body(rest)
        await rest.discard(self._limits.linger_bytes_max, self._limits.linger_s)
