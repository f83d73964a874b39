"""The S3 front: a listening socket, and the way of a request through it.

parse -> authenticate -> find the operation -> may they? -> the handler -> send -> drain -> tell the observer

Every answer carries x-amz-request-id; errors are S3's documents; what was not expected is an InternalError with nothing of the inside in it.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from aiohttp import web
from aiohttp.http import HttpVersion11

from storaged import errors, trace
from storaged.clock import Clock
from storaged.ids import Entropy
from storaged.objects.api import Buckets, Objects, Users
from storaged.s3 import routes, xml
from storaged.s3.auth import authenticate
from storaged.s3.body import RequestBody
from storaged.s3.connection import Connections, TracedConnection
from storaged.s3.context import Front, owned_bucket
from storaged.s3.limits import Limits
from storaged.s3.post import is_form, post_object
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request, lower_headers, parse_target, split_path, virtual_bucket
from storaged.s3.send import Sender

log = logging.getLogger("storaged.s3")

BACKLOG = 1024

_SECRETS = re.compile(r"\b(X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|Signature|AWSAccessKeyId)=[^&]*", re.IGNORECASE)


class RequestDone(NamedTuple):
    """What is known of a request after its answer: for the access log and for metrics. ``code`` is the S3 error's, or empty."""

    request_id: str
    operation: str
    method: str
    raw_target: bytes
    bucket: str
    user_id: str
    access_key: str
    remote: str
    status: int
    code: str
    bytes_in: int
    bytes_out: int
    duration_s: float
    complete: bool
    """The client got all of the answer."""

    @property
    def target(self) -> str:
        """Path and query without signatures."""
        return _SECRETS.sub(r"\1=-", self.raw_target.decode("utf-8", "replace"))

    trace: trace.Trace | None = None
    """Where the time went, when spans are on."""


@dataclass(frozen=True, slots=True)
class Statistics:
    connections: int
    requests_in_flight: int
    requests_total: int
    refused_total: int
    """Refused with SlowDown, since too many were in flight."""


class _Sent:
    """Tells aiohttp that the answer is out already, and whether the connection goes on."""

    __slots__ = ("keep_alive",)

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None: ...

    async def write_eof(self) -> None: ...


_KEEP = cast(web.StreamResponse, _Sent(True))
_CLOSE = cast(web.StreamResponse, _Sent(False))


class S3App:
    """One S3 endpoint. ``domains``: those whose subdomains are buckets (virtual-host style). ``on_request`` is called after each answer, and must not block."""

    def __init__(
        self,
        objects: Objects,
        buckets: Buckets,
        users: Users,
        *,
        region: str,
        domains: Sequence[str] = (),
        clock: Clock,
        entropy: Entropy,
        limits: Limits | None = None,
        on_request: Callable[[RequestDone], None] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._front = Front(objects, buckets, users, region, clock, self._limits)
        self._domains = tuple(domain.lower().strip(".") for domain in domains)
        self._clock = clock
        self._entropy = entropy
        self._on_request = on_request
        self._host_id = base64.b64encode(entropy(24)).decode()
        self._sender = Sender(self._limits, clock, self._host_id)
        self._server: asyncio.Server | None = None
        self._connections: Connections | None = None
        self._ssl: ssl.SSLContext | None = None
        self._busy: dict[object, int] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._in_flight = 0
        self._requests_total = 0
        self._refused_total = 0

    async def start(self, host: str, port: int, ssl: ssl.SSLContext | None = None, reuse_port: bool = False) -> int:
        """Listens; returns the port (``port`` 0: any that is free). Raises PortInUse."""
        connections = self.open(ssl)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                connections, host, port, ssl=ssl, reuse_port=reuse_port, backlog=BACKLOG
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise errors.PortInUse(f"{host}:{port} is already in use by another program.") from None
            raise
        return int(self._server.sockets[0].getsockname()[1])

    def open(self, ssl: ssl.SSLContext | None = None) -> Connections:
        """Takes connections that are handed to ``adopt``; does not listen."""
        limits = self._limits
        self._ssl = ssl
        self._connections = Connections(
            self._handle,
            connections_max=limits.connections_max,
            new_id=self._new_id,
            access_log=None,
            keepalive_timeout=limits.headers_s,
            max_line_size=limits.header_line_bytes_max,
            max_field_size=limits.header_line_bytes_max,
            max_headers=limits.headers_max,
            read_bufsize=limits.read_buffer_bytes,
            lingering_time=0.0,
            auto_decompress=False,
        )
        return self._connections

    async def adopt(self, accepted: socket.socket) -> None:
        """Serves a client's connection that somebody else accepted; after ``close`` it is closed. Raises OSError when it is broken already."""
        if self._connections is None or self._draining:
            accepted.close()
            return
        await asyncio.get_running_loop().connect_accepted_socket(self._connections, accepted, ssl=self._ssl)

    async def close(self, drain_s: float) -> None:
        """Stops listening, lets the requests in flight finish for up to ``drain_s`` seconds, then breaks what is left. Safe to call twice."""
        self._draining = True
        if self._server is not None:
            self._server.close()
        if self._connections is None:
            return
        for connection in self._connections.connections:
            if connection not in self._busy:
                connection.force_close()
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests were still in flight after %.0f s and are broken off", self._in_flight, drain_s)
        await self._connections.shutdown(0.1)
        self._connections = None
        self._server = None

    def statistics(self) -> Statistics:
        open_now = len(self._connections.connections) if self._connections else 0
        return Statistics(open_now, self._in_flight, self._requests_total, self._refused_total)

    def _new_id(self) -> str:
        return self._entropy(8).hex().upper()

    async def _handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        """aiohttp's entry: counts the request in and out, whatever happens to it."""
        connection = raw.protocol
        self._requests_total += 1
        self._in_flight += 1
        self._busy[connection] = 1
        self._idle.clear()
        try:
            return await self._serve(raw)
        finally:
            del self._busy[connection]
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _serve(self, raw: web.BaseRequest) -> web.StreamResponse:
        started_s = self._clock.monotonic()
        spans = trace.begin(getattr(raw.protocol, "heard_ns", 0)) if trace.on else None
        request = Request(
            id=self._new_id(),
            method=raw.method,
            raw_target=raw.raw_path.encode("utf-8", "surrogateescape"),
            remote=raw.remote or "",
            secure=raw.secure,
        )
        reply = await self._answer(raw, request)
        may_keep = raw.keep_alive and not self._draining
        with trace.span("reply"):
            sent = await self._sender.send(raw, request, reply, may_keep)
        if self._on_request is not None:
            self._observe(request, sent.reply, sent.bytes_out, sent.complete, started_s, spans)
        if spans is not None and isinstance(raw.protocol, TracedConnection):
            raw.protocol.heard_ns = 0
        return _KEEP if sent.keep_alive and not self._draining else _CLOSE

    async def _answer(self, raw: web.BaseRequest, request: Request) -> Reply:
        """Never raises but for cancellation: every failure has an answer."""
        try:
            self._receive(raw, request)
            if self._in_flight > self._limits.requests_max:
                self._refused_total += 1
                raise errors.SlowDown()
            return await self._dispatch(request)
        except errors.S3Error as error:
            return self.error_reply(request, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s failed, request %s", request.operation, request.id)
            return self.error_reply(request, errors.InternalError())

    def _receive(self, raw: web.BaseRequest, request: Request) -> None:
        """Takes the request apart; nothing is read of its body."""
        headers = lower_headers(raw.headers, self._limits.header_section_bytes_max)
        request.headers = headers
        length_text = headers.get("content-length", "")
        chunked = "transfer-encoding" in headers
        length = None if chunked else int(length_text) if length_text else 0
        awaited = headers.get("expect", "").lower() == "100-continue" and raw.version >= HttpVersion11
        request._body = RequestBody(
            raw.content,
            length,
            self._sender.continuation(raw) if awaited else None,
            self._limits,
            self._clock,
            declared=bool(length_text) or chunked,
        )
        request.target = parse_target(request.raw_target)
        request.bucket, request.key = split_path(request.target.raw_path, virtual_bucket(headers.get("host", ""), self._domains))

    async def _dispatch(self, request: Request) -> Reply:
        front = self._front
        if request.method == "POST" and request.bucket and not request.key and is_form(request.headers):
            request.operation = "PostObject"
            return await post_object(front, request)
        route = routes.find(request.method, request.bucket, request.key, request.query)
        request.operation = route.operation
        if route.signed:
            with trace.span("sign"):
                await authenticate(request, front.users, front.region, self._clock)
        if route.needs_bucket:
            with trace.span("bucket"):
                owner = request.headers.get("x-amz-expected-bucket-owner", "")
                request._bucket_record = await owned_bucket(front, request.who, request.bucket, owner)
        return await route.handler(front, request)

    def error_reply(self, request: Request, error: errors.S3Error) -> Reply:
        """The error as S3 says it; for HEAD and 304 in headers alone."""
        if isinstance(error, errors.NotModified):
            etag = error.details.get("ETag", "").strip('"')
            return Reply(304, {"ETag": f'"{etag}"'} if etag else {}, code=error.code)
        body = b""
        if request.method != "HEAD":
            body = xml.error_document(error.code, error.message, error.details, request.resource, request.id, self._host_id)
        reply = xml_reply(body, error.status)
        reply.code = error.code
        if request.method == "HEAD":
            reply.length = -1
        if "Region" in error.details:
            reply.headers["x-amz-bucket-region"] = error.details["Region"]
        if error.status == 503:
            reply.headers["Retry-After"] = "1"
        return reply

    def _observe(self, request: Request, reply: Reply, bytes_out: int, complete: bool, started_s: float, spans: trace.Trace | None) -> None:
        assert self._on_request is not None
        try:
            self._on_request(
                RequestDone(
                    request_id=request.id,
                    operation=request.operation,
                    method=request.method,
                    raw_target=request.raw_target,
                    bucket=request.bucket,
                    user_id=request.who.user_id,
                    access_key=request.who.access_key,
                    remote=request.remote,
                    status=reply.status,
                    code=reply.code,
                    bytes_in=request._body.bytes_read if request._body else 0,
                    bytes_out=bytes_out,
                    duration_s=self._clock.monotonic() - started_s,
                    complete=complete,
                    trace=spans,
                )
            )
        except Exception:
            log.exception("the observer of requests failed")
