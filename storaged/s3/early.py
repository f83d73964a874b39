"""Answers that begin before their outcome is known, as those of S3: 200, white space while the work goes on, and then
the document, or the error, which clients look for in such answers.

A copy reads and seals its source anew, which takes a while for gigabytes. Clients give up on a connection that is
silent for some seconds: AWS's SDK for C++, and with it PyArrow, after three. What is done within ``SILENT_S`` is
answered as everything else. An early answer has no headers that depend on the outcome.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html («200 OK» in «Response and special errors»)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from storaged.errors import AccessDenied, InternalError, NoSuchKey, S3Error
from storaged.objects.background import cancel_all
from storaged.s3 import xml
from storaged.s3.reply import XML_TYPE, Headers, Reply, xml_reply
from storaged.s3.request import Request

SILENT_S = 1.5
EVERY_S = 1.0

Outcome = tuple[bytes, Headers]
"""The document of an answer, and its headers."""

log = logging.getLogger("storaged.s3")


async def answer(
    request: Request, work: Coroutine[Any, Any, Outcome], early: Headers | None, hides_missing: Callable[[], bool]
) -> Reply:
    """The answer of ``work``. ``early``: the headers of an answer that begins early; None: this one never does.
    ``hides_missing``: whether the sender may not know that a key is missing. Raises what ``work`` raises in time."""
    doing = asyncio.create_task(work)
    try:
        await asyncio.wait([doing], timeout=SILENT_S if early is not None and request.http11 else None)
    except asyncio.CancelledError:
        await cancel_all([doing])
        raise
    if early is None or doing.done():
        body, headers = await doing
        return xml_reply(body, headers=headers)
    reply = Reply(200, {"Content-Type": XML_TYPE, "Transfer-Encoding": "chunked", **early}, length=-1)
    reply.stream = EarlyAnswer(request, doing, reply, hides_missing)
    return reply


class EarlyAnswer:
    """A ``reply.Pieces``: the chunks of the answer. ``length``: of those that were sent so far."""

    def __init__(
        self, request: Request, doing: asyncio.Task[Outcome], reply: Reply, hides_missing: Callable[[], bool]
    ) -> None:
        self._request = request
        self._doing = doing
        self._reply = reply
        self._hides_missing = hides_missing
        self.length = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._chunk(xml.DECLARATION.encode())
        while not self._doing.done():
            await asyncio.wait([self._doing], timeout=EVERY_S)
            if not self._doing.done():
                yield self._chunk(b" ")
        yield self._chunk(self._document().removeprefix(xml.DECLARATION.encode()))
        yield self._chunk(b"")

    async def close(self) -> None:
        await cancel_all([self._doing])

    def _chunk(self, data: bytes) -> bytes:
        framed = b"%x\r\n%b\r\n" % (len(data), data)
        self.length += len(framed)
        return framed

    def _document(self) -> bytes:
        error: S3Error
        try:
            return self._doing.result()[0]
        except S3Error as found:
            error = AccessDenied() if isinstance(found, NoSuchKey) and self._hides_missing() else found
        except Exception:
            log.exception("%s failed, request %s", self._request.operation, self._request.id)
            error = InternalError()
        self._reply.code = error.code
        return xml.error_document(
            error.code, error.message, error.details, self._request.resource, self._request.id, self._request.id
        )
