"""Connections: aiohttp's HTTP/1.1 parser and writer, with S3's answers to broken HTTP and a bound on their number."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from storaged import trace
from storaged.errors import BadRequest, InternalError, RequestHeaderSectionTooLarge, S3Error
from storaged.s3 import xml

log = logging.getLogger("storaged.s3")

NewId = Callable[[], str]


class Connection(web.RequestHandler):
    """Answers requests that cannot be parsed with S3's error document, and closes: what follows cannot be trusted to be a request."""

    __slots__ = ("_new_id",)

    def __init__(self, manager: web.Server, *, new_id: NewId, **options: object) -> None:
        super().__init__(manager, **options)  # type: ignore[arg-type]
        self._new_id = new_id

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status >= 500:  # the application answers its own failures; this one got past it
            log.error("request failed outside of its handler", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("The answer has begun: there is no place for another.")
        error: S3Error = BadRequest()
        if status >= 500:
            error = InternalError()
        elif isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
            error = RequestHeaderSectionTooLarge()
        request_id = self._new_id()
        body = xml.error_document(error.code, error.message, {}, "/", request_id, "")
        answer = web.Response(
            status=error.status, body=body, content_type="application/xml", headers={"x-amz-request-id": request_id, "Server": "storaged"}
        )
        answer.force_close()
        return answer


class TracedConnection(Connection):
    """Notes when a request's first byte comes (``time.perf_counter_ns``; 0 between requests). Used when spans are on, so that nobody else pays for it."""

    __slots__ = ("heard_ns",)

    def __init__(self, manager: web.Server, *, new_id: NewId, **options: object) -> None:
        super().__init__(manager, new_id=new_id, **options)
        self.heard_ns = 0

    def data_received(self, data: bytes) -> None:
        self.heard_ns = self.heard_ns or time.perf_counter_ns()
        super().data_received(data)


class Connections(web.Server):
    """Makes a Connection for each client, up to ``connections_max``; further ones are closed at once."""

    def __init__(self, handler: Callable[..., object], *, connections_max: int, new_id: NewId, **options: object) -> None:
        super().__init__(handler, **options)  # type: ignore[arg-type]
        self._connections_max = connections_max
        self._options = options
        self._new_id = new_id

    def __call__(self) -> web.RequestHandler:
        kind = TracedConnection if trace.on else Connection
        return kind(self, loop=asyncio.get_running_loop(), new_id=self._new_id, **self._options)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) > self._connections_max:
            transport.abort()
