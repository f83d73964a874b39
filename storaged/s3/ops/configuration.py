"""One get, put and delete for every kind of configuration of a bucket, over rows of {parse, check, print}.

A row says what a document of its kind means, and what is wrong with it; the value is stored in the bucket's record
(``objects.configuration``). ``check`` runs inside of the compare-and-set: it sees the other kinds as they are when the
new value is written, so that two requests at once can't make a configuration that contradicts itself.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from storaged import errors
from storaged.objects.configuration.document import Configuration, Kind
from storaged.s3 import xml
from storaged.s3.context import Front, Handler
from storaged.s3.documents import parse_document
from storaged.s3.reply import XML_TYPE, Reply, xml_reply
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


class Named(Protocol):
    @property
    def id(self) -> str: ...


N = TypeVar("N", bound=Named)

CONFIGURATIONS_MAX: Final = 1000
CONFIGURATIONS_A_PAGE: Final = 100
ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class NamedRow(Generic[T, N]):
    """Configurations of which a bucket may have many, each with an id. ``element``: the name of one in documents.
    ``several``: those in a value of the kind, by id; ``make``: the reverse. ``parse``: document to configuration;
    ``content``: the reverse, without its element. ``verify(front, one)``: raises S3 errors for what this gateway can't
    do.
    """

    kind: Kind[T]
    element: str
    several: Callable[[T], Sequence[N]]
    make: Callable[[Sequence[N]], T]
    parse: Callable[[bytes], N]
    content: Callable[[N], str]
    verify: Callable[[Front, N], None] = _nothing

    def stored(self, configuration: Configuration) -> dict[str, N]:
        found = configuration.get(self.kind)
        return {one.id: one for one in self.several(found)} if found is not None else {}

    def made(self, ones: Mapping[str, N]) -> T:
        return self.make([ones[name] for name in sorted(ones)])


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


# --- many of a kind ---------------------------------------------------------------------------------------------------


def _id_of(request: Request) -> str:
    """Raises InvalidArgument."""
    found = request.query.get("id", "")
    if not ID.fullmatch(found):
        raise errors.InvalidArgument(
            "The specified configuration id is invalid.", ArgumentName="id", ArgumentValue=found[:200]
        )
    return found


def named_getter(row: NamedRow[T, N]) -> Handler:
    async def get(front: Front, request: Request) -> Reply:
        wanted = _id_of(request)
        found = row.stored(await front.buckets.configuration(request.bucket_record)).get(wanted)
        if found is None:
            raise errors.NoSuchConfiguration()
        return xml_reply(xml.document(row.element, row.content(found)))

    return get


def lister(row: NamedRow[T, N]) -> Handler:
    async def get_all(front: Front, request: Request) -> Reply:
        token = request.query.get("continuation-token", "")
        after = _after(token)
        found = row.stored(await front.buckets.configuration(request.bucket_record))
        left = [found[name] for name in sorted(found) if name > after]
        page = left[:CONFIGURATIONS_A_PAGE]
        cut = len(left) > len(page)
        following = base64.urlsafe_b64encode(page[-1].id.encode()).decode() if cut else ""
        return xml_reply(
            xml.document(
                f"List{row.element}sResult",
                *(f"<{row.element}>{row.content(one)}</{row.element}>" for one in page),
                xml.boolean("IsTruncated", cut),
                xml.optional("ContinuationToken", token),
                xml.optional("NextContinuationToken", following),
            )
        )

    return get_all


def _after(token: str) -> str:
    """Raises InvalidArgument."""
    try:
        found = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        found = ""
    if token and not ID.fullmatch(found):
        raise errors.InvalidArgument(
            "The continuation token provided is incorrect", ArgumentName="continuation-token", ArgumentValue=token[:200]
        )
    return found


def named_putter(row: NamedRow[T, N]) -> Handler:
    async def put(front: Front, request: Request) -> Reply:
        wanted = _id_of(request)
        if not request.document.strip():
            raise errors.MissingRequestBodyError()
        value = await parse_document(row.parse, request.document)
        if value.id != wanted:
            raise errors.IdMismatch()
        row.verify(front, value)

        def change(configuration: Configuration) -> T:
            found = row.stored(configuration) | {wanted: value}
            if len(found) > CONFIGURATIONS_MAX:
                raise errors.TooManyConfigurations()
            return row.made(found)

        await front.buckets.configure(request.bucket_record, row.kind, change, who=request.who)
        return Reply()

    return put


def named_deleter(row: NamedRow[T, N]) -> Handler:
    """Without any the kind has an entry that is empty: what works by the configurations sees that they are gone."""

    async def delete(front: Front, request: Request) -> Reply:
        wanted = _id_of(request)

        def change(configuration: Configuration) -> T:
            found = row.stored(configuration)
            if found.pop(wanted, None) is None:
                raise errors.NoSuchConfiguration()
            return row.made(found)

        await front.buckets.configure(request.bucket_record, row.kind, change, who=request.who)
        return Reply(204)

    return delete
