"""From the head of a request to its answer: the steps, and the two shells that call them.

Theory of operation. The steps are functions: ``locate``, the records, ``admit_request``
(``admission``), then the operation itself, then ``Sender``. Two shells call them in this order:

* ``try_begin``, a callback of the event loop, costs no task. It goes on as long as nothing must be read and the
  operation has an ``Attempt``. The attempt ends in ``_on_reply``, which sends the answer.
* ``serve`` runs in the connection's task. It takes a request wherever the callback left it: an ``Exchange`` says how
  far that is. So a head is parsed once, and no step is repeated.

A step that refuses a request raises an S3 error, which is the answer. The callback leaves the sending of such an answer
to the task, which can wait for the rest of the body. An attempt that fails in a way that no one foresaw is left to the
task as well: the operation's handler then says what is wrong.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable
from functools import partial

from msgspec import Struct

from storaged import errors, trace
from storaged.clock import Clock
from storaged.ids import Entropy
from storaged.s3 import bucket_retry, website, xml
from storaged.s3.access_logs import AccessLogs
from storaged.s3.admission import admit_request, complete_grant, load_records, locate, try_records
from storaged.s3.auth.sigv4 import Claim
from storaged.s3.authorization import hides_missing
from storaged.s3.context import Front
from storaged.s3.cors import finish
from storaged.s3.http.body import RequestBody
from storaged.s3.http.connection import Connection
from storaged.s3.http.grammar import parse_head
from storaged.s3.log_lines import Spoken
from storaged.s3.operation import Attempt, Operation, read_body
from storaged.s3.reply import MARKER_DETAILS, Reply, marker_headers, xml_reply
from storaged.s3.request import Request, RequestDone
from storaged.s3.send import Sender, Sent

log = logging.getLogger("storaged.s3")

IDS_DRAWN = 256

ALONE_MAX = 2
"""With so few requests in flight an answer leaves at once: no other one is likely to leave in this turn of the loop."""

BATCH_MAX = 16
"""Up to this many answers leave together. The first one may wake the client, which costs more than to send (30 us on a
virtual processor); a server that sends each answer when it is ready wakes the client for each.
"""


class Exchange(Struct):
    """A request on a connection, and how far it has come."""

    connection: Connection
    request: Request
    body: RequestBody | None
    """The request's; None when its head was refused."""
    started_s: float
    keep_alive: bool = True
    """The client wants to send further requests."""
    body_opened: bool = False
    operation: Operation | None = None
    """Set once the request was located."""
    claim: Claim | None = None
    admitted: bool = False
    reply: Reply | None = None
    """The answer, when it is known already."""
    sent: Sent | None = None
    """The answer was written, and the client has not taken all of it."""


class Responder:
    """Answers the requests of one S3 endpoint. ``on_request``: see ``S3App``."""

    def __init__(
        self,
        front: Front,
        entropy: Entropy,
        on_request: Callable[[RequestDone], None] | None,
        access_logs: AccessLogs,
    ) -> None:
        self._front = front
        self._clock: Clock = front.clock
        self._signed_region = front.endpoint.signed_region
        self._domains = tuple(domain.lower().strip(".") for domain in front.endpoint.domains)
        self._websites = front.endpoint.website_domain.lower().strip(".")
        self._entropy = entropy
        self._on_request = on_request
        self._access_logs = access_logs
        self._host_id = base64.b64encode(entropy(24)).decode()
        self._sender = Sender(front.endpoint.limits, front.clock, self._host_id)
        self._batch: list[tuple[Exchange, Reply]] = []
        """Answers that are about to leave."""
        self._ids: list[str] = []
        self._answered = asyncio.Event()
        """Set after each answer while draining."""
        self.draining = False
        """The endpoint closes: connections end after their answer."""
        self.in_flight = 0
        self.requests_total = 0

    async def wait_idle(self) -> None:
        """Returns when no request is in flight; ``draining`` is set before."""
        while self.in_flight:
            await self._answered.wait()
            self._answered.clear()

    def _new_id(self) -> str:
        """16 hexadecimal digits. Random bytes are drawn for many at a time: each draw is a system call."""
        if not self._ids:
            drawn = self._entropy(8 * IDS_DRAWN).hex().upper()
            self._ids = [drawn[start : start + 16] for start in range(0, 16 * IDS_DRAWN, 16)]
        return self._ids.pop()

    # --- begin and end of an exchange

    def _exchange_of(self, connection: Connection, raw: bytes | errors.S3Error) -> Exchange:
        """``raw``: the bytes before the empty line that ends a head, or why they can't be one."""
        self.requests_total += 1
        self.in_flight += 1
        limits, started_s = self._front.endpoint.limits, self._clock.monotonic()
        try:
            if isinstance(raw, errors.S3Error):
                raise raw
            head = parse_head(raw, limits)
        except errors.S3Error as error:
            request = Request(self._new_id(), "", b"/", connection.remote, connection.secure)
            return Exchange(connection, request, None, started_s, False, reply=self._error_reply(request, error))
        go_on = connection.send_continue if head.expects_continue else None
        body = RequestBody(connection, head.length, go_on, limits, declared=head.declared)
        request = Request(
            self._new_id(),
            head.method,
            head.target,
            connection.remote,
            connection.secure,
            head.headers,
            http11=head.http11,
            _body=body,
        )
        return Exchange(connection, request, body, started_s, head.keep_alive)

    def _end(self, connection: Connection) -> None:
        self.in_flight -= 1
        connection.release_place()
        if self.draining:
            self._answered.set()

    def _observe(
        self, exchange: Exchange, reply: Reply, bytes_out: int, complete: bool, spans: trace.Trace | None = None
    ) -> None:
        request, duration_s = exchange.request, self._clock.monotonic() - exchange.started_s
        bytes_in = request._body.bytes_received if request._body is not None else 0
        done = RequestDone(request, reply, bytes_in, bytes_out, duration_s, complete, spans)
        bucket = request._bucket_record
        try:
            if self._on_request is not None:
                self._on_request(done)
            if bucket is not None and not bucket.plain and self._access_logs.wants(bucket):
                self._access_logs.note(done, bucket, self._spoken(exchange.connection))
        except Exception:
            log.exception("an observer of requests failed")

    def _spoken(self, connection: Connection) -> Spoken:
        cipher = connection.transport.get_extra_info("cipher") if connection.secure else None
        return Spoken(self._host_id) if cipher is None else Spoken(self._host_id, cipher[0], cipher[1])

    def _open_body(self, exchange: Exchange) -> None:
        body = exchange.body
        if not exchange.body_opened and body is not None and body.length != 0:
            exchange.connection.open_body(body)
        exchange.body_opened = True

    # --- the shell without a task

    def try_begin(self, connection: Connection, raw: bytes, more: int) -> bool:
        """See ``Connections``. False: the task takes the head as well. With spans on it takes all, for spans belong to
        tasks."""
        if self.draining or trace.on or raw[:2] in (b"", b"\r\n"):
            return False
        exchange = self._exchange_of(connection, raw)
        attempt = self._try_admit(exchange, more)
        body = exchange.body
        if attempt is None or body is None:
            self._leave(exchange)
            return True
        if body.length != 0:
            self._open_body(exchange)
        if "expect" in exchange.request.headers:
            body.send_continue()
        if body.complete:
            self._perform(exchange, attempt)
        else:
            connection.when_whole(body, partial(self._perform, exchange, attempt))
        return True

    def _try_admit(self, exchange: Exchange, more: int) -> Attempt | None:
        """Admits a request whose operation can be tried, when all records are in memory. ``more``: bytes that came
        after its head."""
        front, request, body = self._front, exchange.request, exchange.body
        if body is None:
            return None
        try:
            operation, claim = locate(request, self._domains, self._signed_region, self._websites)
            exchange.operation, exchange.claim, attempt = operation, claim, operation.attempt
            if attempt is None or claim is None or not exchange.keep_alive or exchange.connection.crowded:
                return None
            if (body.length is not None and more > body.length) or not attempt.suits(front, request):
                return None
            records = try_records(front, request, operation, claim)
            if records is None:
                return None
            admit_request(front, request, operation, claim, records)
            exchange.admitted = True
            if request._grant is None:
                return None
            if attempt.prepare is not None and not attempt.prepare(front, request):
                return None
            large = body.length is not None and body.length > front.endpoint.limits.read_buffer_bytes
            if large and body.bounded and not exchange.connection.take_memory(body.length or 0):
                return None
            return attempt
        except Exception as error:
            exchange.reply = self._failure(request, error)
            return None

    def _perform(self, exchange: Exchange, attempt: Attempt) -> None:
        """All of the body has come, or no more will."""
        try:
            if attempt.begin(self._front, exchange.request, partial(self._on_reply, exchange)):
                return
        except errors.S3Error as error:
            exchange.reply = self._error_reply(exchange.request, error)
        except Exception:  # the handler meets it again
            log.debug("a request is left to its connection's task", exc_info=True)
        self._leave(exchange)

    def _on_reply(self, exchange: Exchange, reply: Reply | Exception | None) -> None:
        if reply is None:
            self._leave(exchange)
            return
        if isinstance(reply, Exception):
            reply = self._failure(exchange.request, reply)
        if "origin" in exchange.request.headers:
            finish(self._front, exchange.request, reply)
        if self.in_flight <= ALONE_MAX:
            self._send(exchange, reply)
            return
        self._batch.append((exchange, reply))
        if len(self._batch) == 1:
            asyncio.get_running_loop().call_soon(self._send_batch)
        elif len(self._batch) >= BATCH_MAX:
            self._send_batch()

    def _send_batch(self) -> None:
        batch, self._batch = self._batch, []
        for exchange, reply in batch:
            self._send(exchange, reply)

    def _send(self, exchange: Exchange, reply: Reply) -> None:
        request, connection = exchange.request, exchange.connection
        keep, bytes_out, complete = not self.draining, 0, False
        try:
            bytes_out, complete = self._sender.write(connection, request, reply, keep), True
        except ConnectionError:
            connection.transport.abort()
        except Exception:
            log.exception("the answer to %s cannot be sent, request %s", request.operation, request.id)
            connection.transport.abort()
        keep = keep and complete
        if connection.paused:
            exchange.sent = Sent(reply, bytes_out, complete, keep, False)
            if connection.hand_over(exchange):
                return
        if reply.release is not None:
            reply.release()
        self._end(connection)
        self._observe(exchange, reply, bytes_out, complete)
        connection.answered(keep=keep)

    def _leave(self, exchange: Exchange) -> None:
        """The connection's task goes on, unless the client has gone."""
        if not exchange.connection.hand_over(exchange):
            self._end(exchange.connection)
            # when the server ends, the log must not say 200: nothing was stored
            reply = self._error_reply(exchange.request, errors.ServiceUnavailable()) if self.draining else Reply()
            self._observe(exchange, reply, 0, False)

    # --- the shell of the connection's task

    async def converse(self, connection: Connection) -> None:
        """The task of one connection: request after request. Counts them in and out, whatever happens to them."""
        try:
            keep = True
            while keep and not self.draining:
                try:
                    found = await connection.next_head()
                except errors.S3Error as error:
                    found = error
                if found is None:
                    break
                if isinstance(found, Exchange):
                    exchange = found
                else:
                    assert isinstance(found, bytes | errors.S3Error)
                    exchange = self._exchange_of(connection, found)
                try:
                    sent = await self.serve(exchange)
                finally:
                    self._end(connection)
                # no longer in flight: clients without a signature could occupy all places by not sending their bodies
                keep = sent.keep_alive
                if sent.unread:
                    keep = await self._sender.drop_rest(connection, exchange.request, sent)
                del found, exchange, sent  # a connection that waits for its next request must not hold its last answer
        except Exception:
            log.exception("a connection failed outside of its requests' handlers")
            connection.transport.abort()
        finally:
            connection.close()

    async def serve(self, exchange: Exchange) -> Sent:
        """Answers one request, from where it is."""
        connection, request = exchange.connection, exchange.request
        if exchange.sent is not None:
            try:
                sent = await self._sender.finish(connection, exchange.sent)
            finally:
                if exchange.sent.reply.release is not None:
                    exchange.sent.reply.release()
            self._observe(exchange, sent.reply, sent.bytes_out, sent.complete)
            return sent
        spans = trace.start(connection.first_byte_ns) if trace.on else None
        self._open_body(exchange)
        reply = exchange.reply or await self._answer(exchange, spans)
        if "origin" in request.headers:
            finish(self._front, request, reply)
        began_ns = time.perf_counter_ns() if spans is not None else 0
        try:
            sent = await self._sender.send(connection, request, reply, exchange.keep_alive and not self.draining)
        finally:
            if reply.release is not None:
                reply.release()
        if spans is not None:
            spans.note("reply", began_ns, time.perf_counter_ns())
            connection.first_byte_ns = 0
        self._observe(exchange, sent.reply, sent.bytes_out, sent.complete, spans)
        return sent

    async def _answer(self, exchange: Exchange, spans: trace.Trace | None) -> Reply:
        """Never raises but for cancellation: every failure has an answer."""
        front, request = self._front, exchange.request
        try:
            operation, claim = exchange.operation, exchange.claim
            if operation is None:
                operation, claim = locate(request, self._domains, self._signed_region, self._websites)
            if not exchange.admitted:
                began_ns = time.perf_counter_ns() if spans is not None else 0
                records = try_records(front, request, operation, claim)
                if records is None:
                    records = await load_records(front, request, operation, claim)
                read_ns = time.perf_counter_ns() if spans is not None else 0
                admit_request(front, request, operation, claim, records)
                if spans is not None:
                    spans.note("bucket", began_ns, read_ns)
                    spans.note("sign", read_ns, time.perf_counter_ns())
                if request._grant is None:
                    await complete_grant(front, request, operation)
                if operation.signed:
                    await read_body(front, request, operation)
            elif request._grant is None:
                await complete_grant(front, request, operation)
            return await bucket_retry.handle(front, request, operation)
        except Exception as error:
            return self._failure(request, error)

    # --- errors

    def _failure(self, request: Request, error: Exception) -> Reply:
        """The answer to an error. One that was not expected is described in the log alone."""
        if isinstance(error, errors.NoSuchKey) and hides_missing(self._front, request):
            error = errors.AccessDenied()
        if isinstance(error, errors.S3Error):
            return self._error_reply(request, error)
        log.error("%s failed, request %s", request.operation, request.id, exc_info=error)
        return self._error_reply(request, errors.InternalError())

    def _error_reply(self, request: Request, error: errors.S3Error) -> Reply:
        """The error as S3 says it; for HEAD and 304 in headers alone."""
        if isinstance(error, errors.NotModified):
            etag = error.details.get("ETag", "").strip('"')
            return Reply(304, {"ETag": f'"{etag}"'} if etag else {}, code=error.code)
        if request.operation == website.NAME:
            return website.error_page(request, error, self._host_id)
        body = b""
        if request.method != "HEAD":
            facts = {name: value for name, value in error.details.items() if name not in MARKER_DETAILS}
            body = xml.error_document(error.code, error.message, facts, request.resource, request.id, self._host_id)
        reply = xml_reply(body, error.status)
        reply.code = error.code
        if request.method == "HEAD":
            reply.length = -1
        marker_headers(error, reply.headers)
        if "Region" in error.details:
            reply.headers["x-amz-bucket-region"] = error.details["Region"]
        if error.status == 503:
            reply.headers["Retry-After"] = "1"
        return reply
