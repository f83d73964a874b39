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
from typing import NamedTuple

from storaged import errors, trace
from storaged.clock import Clock
from storaged.ids import Entropy
from storaged.objects.api import Buckets, Objects, Users
from storaged.s3 import routes, xml
from storaged.s3.auth import authenticate
from storaged.s3.body import RequestBody
from storaged.s3.connection import Connection, Connections
from storaged.s3.context import Front, owned_bucket
from storaged.s3.http import Head, parse_head
from storaged.s3.limits import Limits
from storaged.s3.post import is_form, post_object
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request, parse_target, split_path, virtual_bucket
from storaged.s3.send import Sender

log = logging.getLogger("storaged.s3")

BACKLOG = 1024
IDS_DRAWN = 256

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
        self._draining = False
        self._answered = asyncio.Event()
        """Set after each answer while draining."""
        self._ids: list[str] = []
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
        self._ssl = ssl
        self._connections = Connections(self._converse, self._limits)
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
        for connection in self._connections.open:
            if connection.idle:
                connection.transport.close()
        try:
            async with asyncio.timeout(drain_s):
                while self._in_flight:
                    await self._answered.wait()
                    self._answered.clear()
        except TimeoutError:
            log.warning("%d requests were still in flight after %.0f s and are broken off", self._in_flight, drain_s)
        await self._connections.close()
        self._connections = None
        self._server = None

    def statistics(self) -> Statistics:
        open_now = len(self._connections.open) if self._connections else 0
        return Statistics(open_now, self._in_flight, self._requests_total, self._refused_total)

    def _new_id(self) -> str:
        """16 hexadecimal digits. Random bytes are drawn for many at a time: each draw is a system call."""
        if not self._ids:
            drawn = self._entropy(8 * IDS_DRAWN).hex().upper()
            self._ids = [drawn[start : start + 16] for start in range(0, 16 * IDS_DRAWN, 16)]
        return self._ids.pop()

    async def _converse(self, connection: Connection) -> None:
        """The task of one connection: request after request. Counts them in and out, whatever happens to them."""
        limits = self._limits
        try:
            keep = True
            while keep and not self._draining:
                try:
                    raw = await connection.next_head()
                    if raw is None:
                        break
                    found: Head | errors.S3Error = parse_head(raw, limits)
                except errors.S3Error as error:
                    found = error
                self._requests_total += 1
                self._in_flight += 1
                try:
                    keep = await self._serve(connection, found)
                finally:
                    self._in_flight -= 1
                    if self._draining:
                        self._answered.set()
        except Exception:
            log.exception("a connection failed outside of its requests' handlers")
            connection.transport.abort()
        finally:
            connection.transport.close()

    async def _serve(self, connection: Connection, head: Head | errors.S3Error) -> bool:
        """Answers one request; True when the connection can carry another."""
        started_s = self._clock.monotonic()
        spans = trace.begin(connection.heard_ns) if trace.on else None
        if isinstance(head, errors.S3Error):
            request = Request(self._new_id(), "", b"/", connection.remote, connection.secure)
            reply, may_keep = self.error_reply(request, head), False
        else:
            request = Request(
                self._new_id(), head.method, head.target, connection.remote, connection.secure, head.headers, modern=head.modern
            )
            body = request._body = RequestBody(
                connection, head.length, connection.go_on if head.expects else None, self._limits, declared=head.declared
            )
            if not body.complete:
                connection.open_body(body)
            reply = await self._answer(request)
            may_keep = head.keep_alive and not self._draining
        with trace.span("reply"):
            sent = await self._sender.send(connection, request, reply, may_keep)
        if self._on_request is not None:
            self._observe(request, sent.reply, sent.bytes_out, sent.complete, started_s, spans)
        connection.heard_ns = 0
        return sent.keep_alive

    async def _answer(self, request: Request) -> Reply:
        """Never raises but for cancellation: every failure has an answer."""
        try:
            if self._in_flight > self._limits.requests_max:
                self._refused_total += 1
                raise errors.SlowDown()
            request.target = parse_target(request.raw_target)
            bucket = virtual_bucket(request.headers.get("host", ""), self._domains) if self._domains else ""
            request.bucket, request.key = split_path(request.target.raw_path, bucket)
            return await self._dispatch(request)
        except errors.S3Error as error:
            return self.error_reply(request, error)
        except Exception:
            log.exception("%s failed, request %s", request.operation, request.id)
            return self.error_reply(request, errors.InternalError())

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
                    bytes_in=request._body.bytes_come if request._body else 0,
                    bytes_out=bytes_out,
                    duration_s=self._clock.monotonic() - started_s,
                    complete=complete,
                    trace=spans,
                )
            )
        except Exception:
            log.exception("the observer of requests failed")
