"""One get, put and delete for every kind of configuration of a bucket, over rows of {parse, check, print}.

A row says what a document of its kind means, and what is wrong with it; the value is stored in the bucket's record
(``objects.configuration``). ``check`` runs inside of the compare-and-set: it sees the other kinds as they are when the
new value is written, so that two requests at once can't make a configuration that contradicts itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from storaged import errors
from storaged.objects.configuration.document import Configuration, Kind
from storaged.s3.context import Front, Handler
from storaged.s3.documents import parse_document
from storaged.s3.reply import XML_TYPE, Reply
from storaged.s3.request import Request
from storaged.wire import Message

T = TypeVar("T", bound=Message)


def _nothing(*_: Any) -> None:
    """Nothing to check."""


def _always(*_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Row(Generic[T]):
    """``parse``: document to value, or None when it asks for what nothing set means; large documents in a thread.
    Raises S3 errors. ``show``: value to the answer's body. ``missing``: the error of a read when nothing is set.
    ``check_put(request, value, configuration)`` and ``check_delete(request, configuration)`` raise S3 errors when the
    other kinds do not allow it. ``verify(front, value)``: what can't be checked there, because it must wait.
    ``put_status``: of the answer to a change. ``shown``: whether a read returns a value.
    ``removed``: what a bucket has after a removal, when that is not the same as what old buckets have.
    """

    kind: Kind[T]
    parse: Callable[[bytes], T | None]
    show: Callable[[T], bytes]
    missing: type[errors.S3Error]
    check_put: Callable[[Request, T, Configuration], None] = _nothing
    check_delete: Callable[[Request, Configuration], None] = _nothing
    verify: Callable[[Front, T], Awaitable[None]] | None = None
    put_status: int = 200
    content_type: str = XML_TYPE
    shown: Callable[[T], bool] = _always
    removed: T | None = None


def getter(row: Row[T]) -> Handler:
    async def get(front: Front, request: Request) -> Reply:
        configuration = await front.buckets.configuration(request.bucket_record)
        value = configuration.get(row.kind)
        if value is None or not row.shown(value):
            raise row.missing(BucketName=request.bucket)
        return Reply(headers={"Content-Type": row.content_type}, body=row.show(value))

    return get


def putter(row: Row[T]) -> Handler:
    async def put(front: Front, request: Request) -> Reply:
        if not request.document.strip():
            raise errors.MissingRequestBodyError()
        value = await parse_document(row.parse, request.document)
        if row.verify is not None and value is not None:
            await row.verify(front, value)

        def change(configuration: Configuration) -> T | None:
            if value is not None:
                row.check_put(request, value, configuration)
            return value

        await front.buckets.configure(request.bucket_record, row.kind, change, who=request.who)
        return Reply(row.put_status)

    return put


def deleter(row: Row[T]) -> Handler:
    async def delete(front: Front, request: Request) -> Reply:
        def change(configuration: Configuration) -> T | None:
            row.check_delete(request, configuration)
            return row.removed if configuration.get(row.kind) is not None else None

        await front.buckets.configure(request.bucket_record, row.kind, change, who=request.who)
        return Reply(204)

    return delete
