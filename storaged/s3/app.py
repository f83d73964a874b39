"""The S3 front: a listening socket, and the way of a request through it.

parse -> authenticate -> find the operation -> may they? -> the handler -> send -> drain -> tell the observer

Every answer carries x-amz-request-id; errors are S3's documents; what was not expected is an InternalError with nothing
of the inside in it.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

from storaged import errors, trace
from storaged.clock import Clock
from storaged.ids import Entropy
from storaged.objects.api import (
    BodyChecks,
    Buckets,
    NewMeta,
    ObjectInfo,
    Objects,
    ObjectStream,
    PutResult,
    Reading,
    ReadResult,
    Users,
    WriteConditions,
)
from storaged.s3 import bucket_retry, routes, xml
from storaged.s3.auth.authenticate import admit, admit_anonymous, claim_of
from storaged.s3.context import Front, check_owner, existing_bucket
from storaged.s3.headers import INCIDENTAL, wants_checksums
from storaged.s3.http.body import RequestBody
from storaged.s3.http.connection import Connection
from storaged.s3.http.connections import Connections
from storaged.s3.http.grammar import Head, parse_head
from storaged.s3.http.limits import Limits
from storaged.s3.http.listen import BACKLOG, listen
from storaged.s3.http.tls import TlsAcceptor, accept_tls
from storaged.s3.operation import Operation, hear_query, read_body
from storaged.s3.ops.objects import put_asked
from storaged.s3.reply import Reply, object_headers, stored_headers, xml_reply
from storaged.s3.request import Request, RequestDone, parse_target, split_path, virtual_bucket
from storaged.s3.send import Sender, Sent

log = logging.getLogger("storaged.s3")

IDS_DRAWN = 256

_READS = (b"GET /", b"HEAD /")
_READ_HEADERS = INCIDENTAL | {"x-amz-checksum-mode"}
"""With these alone a GET or HEAD asks for a whole object, and perhaps for its checksums. They are what SDKs send."""


ALONE_MAX = 2
"""With so few requests in flight, an answer leaves at once: nobody else's is likely to leave in
this turn of the loop.
"""

ENDING_MAX = 16
"""So many answers leave one behind the other. The first may wake the client, which costs more than to send (30 us where
the processor is virtual); who sends each as it is ready wakes it for each.
"""

STRANGERS_DRAIN_S = 2.0
"""A server that ends waits so long for requests that are not authenticated, such as forms whose fields have not all
come: one of them must not keep it for longer.
"""

_SAYS_NOTHING = {"x-id"}
"""Parameters with the operation's name, which some SDKs send."""


class _Begun(NamedTuple):
    """A request that was authenticated, and found to be allowed."""

    request: Request
    operation: Operation
    started_s: float
    written: Sent | None = None
    """Its answer, of which the client has not taken everything yet."""


@dataclass(frozen=True, slots=True)
class Statistics:
    connections: int
    requests_in_flight: int
    requests_total: int
    refused_total: int
    """Refused with SlowDown, since too many were in flight."""
    unauthenticated: int
    """Connections that have not authenticated."""
    evicted_total: int
    """Of those, closed to make room."""


class S3App:
    """One S3 endpoint. ``domains``: those whose subdomains are buckets (virtual-host style). ``on_request`` is called
    after each answer, and must not block.
    """

    def __init__(
        self,
        objects: Objects,
        buckets: Buckets,
        users: Users,
        *,
        region: str,
        strict_region: bool = False,
        domains: Sequence[str] = (),
        clock: Clock,
        entropy: Entropy,
        limits: Limits | None = None,
        proxies: Sequence[str] = (),
        on_request: Callable[[RequestDone], None] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._front = Front(objects, buckets, users, region, clock, self._limits, strict_region)
        self._domains = tuple(domain.lower().strip(".") for domain in domains)
        self._proxies = tuple(proxies)
        self._clock = clock
        self._entropy = entropy
        self._on_request = on_request
        self._host_id = base64.b64encode(entropy(24)).decode()
        self._sender = Sender(self._limits, clock, self._host_id)
        self._servers: list[asyncio.Server] = []
        self._acceptor: TlsAcceptor | None = None
        self._ending: list[tuple[Connection, _Begun, Reply]] = []
        """Answers that are about to leave."""
        self._connections: Connections | None = None
        self._ssl: ssl.SSLContext | None = None
        self._draining = False
        self._answered = asyncio.Event()
        """Set after each answer while draining."""
        self._ids: list[str] = []
        self._in_flight = 0
        self._requests_total = 0

    async def start(self, host: str, port: int, ssl: ssl.SSLContext | None = None) -> int:
        """Listens; returns the port (``port`` 0: any that is free). Raises PortInUse."""
        listeners = listen(host, port)
        taken = int(listeners[0].getsockname()[1])
        connections = self.open(ssl)
        if ssl is not None:
            self._acceptor = TlsAcceptor(listeners, self.adopt)
            self._acceptor.start()
            return taken
        for listener in listeners:
            self._servers.append(
                await asyncio.get_running_loop().create_server(connections, sock=listener, backlog=BACKLOG)
            )
        return taken

    def open(self, ssl: ssl.SSLContext | None = None) -> Connections:
        """Takes connections that are handed to ``adopt``; does not listen."""
        self._ssl = ssl
        self._connections = Connections(self._converse, self._limits, self._try_begin, self._proxies)
        return self._connections

    async def adopt(self, accepted: socket.socket) -> None:
        """Serves a client's connection that somebody else accepted. After ``close``, and when it broke before its first
        request, it is closed.
        """
        if self._connections is None or self._draining:
            accepted.close()
            return
        if self._ssl is not None:
            await accept_tls(self._connections, accepted, self._ssl, self._limits.handshake_s)
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._connections, accepted)
        except OSError as error:
            log.debug("a connection broke before its first request: %s", error)
            accepted.close()

    async def close(self, drain_s: float) -> None:
        """Stops listening, lets the requests in flight finish for up to ``drain_s`` seconds, then breaks what is left.
        Safe to call twice.
        """
        self._draining = True
        for server in self._servers:
            server.close()
        if self._acceptor is not None:
            self._acceptor.close()
        if self._connections is None:
            return
        for connection in tuple(self._connections.open):
            if connection.idle:
                connection.transport.close()
        ending = asyncio.get_running_loop().call_later(
            min(STRANGERS_DRAIN_S, drain_s), self._connections.unauthenticated.evict_all
        )
        try:
            async with asyncio.timeout(drain_s):
                while self._in_flight:
                    await self._answered.wait()
                    self._answered.clear()
                await self._connections.flushed()
        except TimeoutError:
            if self._in_flight:
                log.warning(
                    "%d requests were still in flight after %.0f s and are broken off", self._in_flight, drain_s
                )
        finally:
            ending.cancel()
        await self._connections.close()
        self._connections = None
        self._servers.clear()

    def statistics(self) -> Statistics:
        connections = self._connections
        if connections is None:
            return Statistics(0, self._in_flight, self._requests_total, 0, 0, 0)
        unauthenticated = connections.unauthenticated.counts()
        return Statistics(
            len(connections.open),
            self._in_flight,
            self._requests_total,
            connections.refused_total,
            unauthenticated.connections,
            unauthenticated.evicted_total,
        )

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
                    found: Head | _Begun | errors.S3Error = (
                        parse_head(raw, limits) if isinstance(raw, bytes) else cast(_Begun, raw)
                    )
                except errors.S3Error as error:
                    found = error
                if not isinstance(found, _Begun):  # that was counted when it was begun, and has kept its place
                    self._came()
                try:
                    request, sent = await self._serve(connection, found)
                finally:
                    self._went(connection)
                # not counted: or strangers could have everybody's places, without a signature, by not sending what they
                # said they would
                keep = sent.keep_alive if not sent.unread else await self._sender.take_rest(connection, request, sent)
        except Exception:
            log.exception("a connection failed outside of its requests' handlers")
            connection.transport.abort()
        finally:
            connection.transport.close()

    def _came(self) -> None:
        self._requests_total += 1
        self._in_flight += 1

    def _went(self, connection: Connection) -> None:
        self._in_flight -= 1
        connection.give_place()
        if self._draining:
            self._answered.set()

    # --- by callbacks
    # -------------------------------------------------------------------------------------------------------

    def _try_begin(self, connection: Connection, raw: bytes, more: int) -> bool:
        """Takes on a GET or HEAD that asks for a whole object and nothing else, and a PUT of a small one, when who
        asks, and the bucket, are in memory. Whatever is
        refused, or not understood, is left to the task, which says why."""
        writes = raw.startswith(b"PUT /")
        if self._draining or trace.on or connection.crowded or not (writes or raw.startswith(_READS)):
            return False
        front = self._front
        try:
            head = parse_head(raw, self._limits)
            length, headers = head.length, head.headers
            if not head.keep_alive or (length is not None and more > length):
                return False
            if not (self._may_be_small(length, headers) if writes else not length and headers.keys() <= _READ_HEADERS):
                return False
            request = self._request_of(connection, head)
            self._locate(request)
            if request.query and request.query.keys() != _SAYS_NOTHING:
                return False
            claim = claim_of(request, front.signed_region)
            known = front.users.try_get(claim.access_key) if claim is not None else None
            bucket = front.buckets.try_get(request.bucket)
            if claim is None or known is None or bucket is None or not request.key:
                return False
            admit(request, claim, *known, self._clock.wall_ms())
            check_owner(bucket, request.who, headers.get("x-amz-expected-bucket-owner"))
            operation, body = routes.find(request.method, request.bucket, request.key, {}, headers), request.body
            asked = put_asked(request, operation.check_headers) if writes else None
            if asked is not None and (asked[1].size is None or asked[1].size > front.objects.small_bytes_max):
                return False
        except Exception:  # the task meets it again
            return False
        request.operation, request._bucket_record = operation.name, bucket
        self._came()
        begun = _Begun(request, operation, self._clock.monotonic())
        if asked is None:
            front.objects.try_read(bucket, request.key, head.method == "GET", partial(self._read, connection, begun))
            return True
        if length != 0:
            connection.open_body(body)
        body.go_on()
        if body.complete:
            self._write(connection, begun, asked)
        else:
            connection.when_whole(body, partial(self._write, connection, begun, asked))
        return True

    def _may_be_small(self, length: int | None, headers: Mapping[str, str]) -> bool:
        """Of a PUT, before it costs anything: no copy, and of a small object, which one in aws-chunked form says in a
        header.
        """
        if "x-amz-copy-source" in headers:
            return False
        return (
            length is not None and length <= self._front.objects.small_bytes_max
        ) or "x-amz-decoded-content-length" in headers

    def _write(self, connection: Connection, begun: _Begun, asked: tuple[NewMeta, BodyChecks, WriteConditions]) -> None:
        """All of the body has come, or no more will."""
        request, (meta, checks, conditions) = begun.request, asked
        plain, then = request.body.try_whole(), partial(self._written, connection, begun)
        try:
            if plain is not None and self._front.objects.try_put(
                request.bucket_record,
                request.key,
                plain,
                meta,
                checks,
                then,
                owner=request.who.user_id,
                conditions=conditions,
            ):
                return
        except Exception:  # the task meets it again
            log.debug("a PUT is left to its connection's task", exc_info=True)
        self._leave(connection, begun)

    def _written(self, connection: Connection, begun: _Begun, told: PutResult | Exception) -> None:
        if isinstance(told, errors.NoSuchBucket) and self._front.buckets.gone(begun.request.bucket_record):
            self._leave(connection, begun)  # nothing was stored; another bucket may have the name now
            return
        reply = (
            self._failure(begun.request, told) if isinstance(told, Exception) else Reply(headers=stored_headers(told))
        )
        self._end_soon(connection, begun, reply)

    def _read(self, connection: Connection, begun: _Begun, found: ReadResult) -> None:
        """Answers what was begun, or leaves the rest to the connection's task."""
        request = begun.request
        if (
            found is None
            or isinstance(found, Reading)
            or (isinstance(found, errors.StoragedError) and not isinstance(found, errors.NoSuchKey))
        ):
            request.reading = found if isinstance(found, Reading) else None
            self._leave(connection, begun)
            return
        try:
            reply = self._reply_of(request, found)
        except Exception as error:
            reply = self._failure(request, error)
        self._end_soon(connection, begun, reply)

    def _leave(self, connection: Connection, begun: _Begun) -> None:
        """To the connection's task, unless its client has gone."""
        if not connection.hand_over(begun):
            self._went(connection)
            # of a server that ends the log must not say 200: nothing was stored
            reply = self.error_reply(begun.request, errors.ServiceUnavailable()) if self._draining else Reply()
            self._observe(begun.request, reply, 0, False, begun.started_s, None)

    def _end_soon(self, connection: Connection, begun: _Begun, reply: Reply) -> None:
        """Sends the answer to what was begun, at the end of this turn of the loop, or with so many others."""
        if self._in_flight <= ALONE_MAX:
            self._end(connection, begun, reply)
            return
        self._ending.append((connection, begun, reply))
        if len(self._ending) == 1:
            asyncio.get_running_loop().call_soon(self._end_all)
        elif len(self._ending) >= ENDING_MAX:
            self._end_all()

    def _end_all(self) -> None:
        ending, self._ending = self._ending, []
        for connection, begun, reply in ending:
            self._end(connection, begun, reply)

    def _end(self, connection: Connection, begun: _Begun, reply: Reply) -> None:
        """Sends the answer to what was begun."""
        request, keep, bytes_out, complete = begun.request, not self._draining, 0, False
        try:
            bytes_out, complete = self._sender.put(connection, request, reply, keep), True
        except ConnectionError:
            connection.transport.abort()
        except Exception:
            log.exception("the answer to %s cannot be sent, request %s", request.operation, request.id)
            connection.transport.abort()
        keep = keep and complete
        if connection.paused and connection.hand_over(
            begun._replace(written=Sent(reply, bytes_out, complete, keep, False))
        ):
            return
        self._went(connection)
        self._observe(request, reply, bytes_out, complete, begun.started_s, None)
        connection.answered(keep=keep)

    def _reply_of(self, request: Request, found: ObjectStream | ObjectInfo | errors.NoSuchKey) -> Reply:
        if isinstance(found, errors.NoSuchKey):
            return self.error_reply(request, found)
        checksums = wants_checksums(request.headers)
        if isinstance(found, ObjectInfo):
            return Reply(200, object_headers(found, checksums=checksums), length=found.size)
        return Reply(200, object_headers(found.info, checksums=checksums), found.held or b"")

    # --- by the connection's task
    # -------------------------------------------------------------------------------------------

    async def _serve(self, connection: Connection, head: Head | _Begun | errors.S3Error) -> tuple[Request, Sent]:
        """Answers one request."""
        started_s = self._clock.monotonic()
        spans = trace.begin(connection.first_byte_ns) if trace.on else None
        if isinstance(head, Head):
            request = self._request_of(connection, head)
            if head.length != 0:
                connection.open_body(request.body)
            reply = await self._answer(request, spans)
            may_keep = head.keep_alive and not self._draining
        elif isinstance(head, _Begun):
            request, operation, started_s, written = head
            if written is not None:
                sent = await self._sender.finish(connection, written)
                self._observe(request, sent.reply, sent.bytes_out, sent.complete, started_s, None)
                return request, sent
            reply = await self._answer(request, None, operation)
            may_keep = not self._draining
        else:
            request = Request(self._new_id(), "", b"/", connection.remote, connection.secure)
            reply, may_keep = self.error_reply(request, head), False
        began_ns = time.perf_counter_ns() if spans is not None else 0
        sent = await self._sender.send(connection, request, reply, may_keep)
        if spans is not None:
            spans.note("reply", began_ns, time.perf_counter_ns())
            connection.first_byte_ns = 0
        self._observe(request, sent.reply, sent.bytes_out, sent.complete, started_s, spans)
        return request, sent

    def _request_of(self, connection: Connection, head: Head) -> Request:
        body = RequestBody(
            connection, head.length, connection.go_on if head.expects else None, self._limits, declared=head.declared
        )
        return Request(
            self._new_id(),
            head.method,
            head.target,
            connection.remote,
            connection.secure,
            head.headers,
            modern=head.modern,
            _body=body,
        )

    def _observe(
        self,
        request: Request,
        reply: Reply,
        bytes_out: int,
        complete: bool,
        started_s: float,
        spans: trace.Trace | None,
    ) -> None:
        if self._on_request is None:
            return
        bytes_in = request._body.bytes_come if request._body is not None else 0
        try:
            self._on_request(
                RequestDone(request, reply, bytes_in, bytes_out, self._clock.monotonic() - started_s, complete, spans)
            )
        except Exception:
            log.exception("the observer of requests failed")

    def _locate(self, request: Request) -> None:
        """Its target, bucket and key. Raises InvalidURI, KeyTooLongError."""
        target = request.target = parse_target(request.raw_target)
        bucket = virtual_bucket(request.headers.get("host", ""), self._domains) if self._domains else ""
        request.bucket, request.key = split_path(target.raw_path, bucket)

    async def _answer(self, request: Request, spans: trace.Trace | None, operation: Operation | None = None) -> Reply:
        """``operation``: of a request that was authenticated and found to be allowed. Never raises but for
        cancellation: every failure has an answer."""
        front = self._front
        try:
            if operation is not None:
                return await bucket_retry.handle(front, request, operation)
            self._locate(request)
            headers, count = request.headers, len(request.target.pairs)
            operation = routes.find(request.method, request.bucket, request.key, request.query, headers, count)
            request.operation = operation.name
            began_ns = time.perf_counter_ns() if spans is not None else 0
            if operation.signed:
                claim = claim_of(request, front.signed_region)
                if claim is None:
                    admit_anonymous(request)
                else:
                    who, secret = front.users.try_get(claim.access_key) or await front.users.lookup(claim.access_key)
                    admit(request, claim, who, secret, self._clock.wall_ms())
                if request.query:
                    hear_query(request)
            if spans is not None:
                signed_ns = time.perf_counter_ns()
                spans.note("sign", began_ns, signed_ns)
            if operation.needs_bucket:
                request._bucket_record = front.buckets.try_get(request.bucket) or await existing_bucket(
                    front, request.bucket
                )
                check_owner(request._bucket_record, request.who, headers.get("x-amz-expected-bucket-owner"))
            if spans is not None:
                spans.note("bucket", signed_ns, time.perf_counter_ns())
            if operation.signed:
                if operation.changes and not request.who.access_key:
                    raise errors.AccessDenied()
                operation.check_headers(headers)
                await read_body(front, request, operation)
            return await bucket_retry.handle(front, request, operation)
        except Exception as error:
            return self._failure(request, error)

    def _failure(self, request: Request, error: Exception) -> Reply:
        """What was not expected is told to the log alone."""
        if isinstance(error, errors.S3Error):
            return self.error_reply(request, error)
        log.error("%s failed, request %s", request.operation, request.id, exc_info=error)
        return self.error_reply(request, errors.InternalError())

    def error_reply(self, request: Request, error: errors.S3Error) -> Reply:
        """The error as S3 says it; for HEAD and 304 in headers alone."""
        if isinstance(error, errors.NotModified):
            etag = error.details.get("ETag", "").strip('"')
            return Reply(304, {"ETag": f'"{etag}"'} if etag else {}, code=error.code)
        body = b""
        if request.method != "HEAD":
            body = xml.error_document(
                error.code, error.message, error.details, request.resource, request.id, self._host_id
            )
        reply = xml_reply(body, error.status)
        reply.code = error.code
        if request.method == "HEAD":
            reply.length = -1
        if "Region" in error.details:
            reply.headers["x-amz-bucket-region"] = error.details["Region"]
        if error.status == 503:
            reply.headers["Retry-After"] = "1"
        return reply
