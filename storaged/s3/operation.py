"""An operation of S3 as a value: its name, its handler, what it accepts; and the checks that every request passes
before the handler.

Theory of operation. ``aws_names`` lists the names that AWS documents, ``routes`` has the table of operations. A request
that changes something must not use a documented name that its operation does not accept. Its client means something by
that name, and to ignore it would do something else than was asked: an append would become an overwrite. So it is
refused before the handler begins, with nothing changed. Names that AWS does not document are ignored, as AWS does: SDKs
add ``x-id``, applications add their own. Requests that only read ignore names that they do not accept, except those
that they could not obey (a customer's key).

A body is of one kind: none, a document that is read whole and verified here, or a stream that the handler reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from msgspec import Struct

from storaged.errors import InvalidArgument, InvalidRequest, NotImplemented, S3Error
from storaged.s3 import aws_names, encryption
from storaged.s3 import headers as h
from storaged.s3.auth.actions import action_of
from storaged.s3.conditions import unsupported
from storaged.s3.context import Front, Handler
from storaged.s3.documents import read_document
from storaged.s3.http.grammar import must_be_ascii
from storaged.s3.reply import TOKEN, Reply, checked_header
from storaged.s3.request import Request
from storaged.units import KIB

UNEXPECTED_BODY_BYTES_MAX = 64 * KIB
"""How much of a body that an operation does not accept is read to see whether there is one."""

_EXPECTED_OWNER = "x-amz-expected-bucket-owner"
_INERT = h.INCIDENTAL | {"expect"}
"""Headers that every operation accepts, and whose values need no check."""
_NOT_ACCEPTED = {"versionId": "a version-id", "partNumber": "partNumber without uploadId"}
"""AWS's words."""
_OF_UPLOAD = frozenset({"UploadPart", "UploadPartCopy", "CompleteMultipartUpload"})
"""Operations that may name the encryption of their upload once more, as Ceph's conformance tests do
(``encryption.check_of_upload``)."""
_WATCHED = ("x-amz-", aws_names.OWN)


class NoBody(NamedTuple):
    """The operation accepts no body. One that changes something refuses any; a read ignores it."""


class Document(NamedTuple):
    """The body is read whole before the handler, into ``Request.document``, and verified against Content-MD5 and
    checksums.

    ``bytes_max``: MaxMessageLengthExceeded beyond it. ``digest_required``: a Content-MD5 or a checksum must be there.
    ``of_object``: x-amz-checksum-* are the object's checksums, not the document's.
    """

    bytes_max: int
    digest_required: bool = False
    of_object: bool = False


class Stream(NamedTuple):
    """An object's bytes, which the object plane reads and verifies."""


Body = NoBody | Document | Stream
NO_BODY = NoBody()
STREAM = Stream()


OnReply = Callable[[Reply | Exception | None], None]
"""Called once, on the event loop: with the reply; with the error that is the answer; or with None: the operation's
handler must be awaited. It does not raise."""


class Attempt(Struct, frozen=True):
    """How an operation is performed without a task, when it can be.

    ``suits``: whether the head of a request allows it; asked first, of a request that is not authenticated.
    ``prepare``: looks at an admitted request before its body is read. False: the handler must be awaited. Raises S3
    errors, which are the answer. ``begin``: performs it, once the body has arrived; ``on_reply`` may be called before
    this returns. False: nothing was begun, and the handler must be awaited. Raises S3 errors, which are the answer.
    """

    suits: Callable[[Front, Request], bool]
    prepare: Callable[[Front, Request], bool] | None
    begin: Callable[[Front, Request, OnReply], bool]


@dataclass(frozen=True)
class Operation:
    """One row of ``routes``.

    ``name``: AWS's, for logs and metrics. ``changes``: it is not a read. ``needs_bucket``: the bucket must exist and
    belong to the requester before the handler runs. ``signed``: the request is authenticated before the handler runs.
    ``copy``: the operation instead, when the request has x-amz-copy-source; ``unnamed``: when it has no ``id``.
    ``attempt``: the operation without a task.
    ``answer``: what an operation that is not there always answers, for deploy/S3.md; empty: it is done.
    """

    name: str
    handler: Handler
    body: Body = NO_BODY
    changes: bool = False
    needs_bucket: bool = True
    signed: bool = True
    copy: Operation | None = None
    attempt: Attempt | None = None
    answer: str = ""
    unnamed: Operation | None = None

    @cached_property
    def headers(self) -> frozenset[str]:
        """The headers that this operation accepts, and those that mean nothing to any operation."""
        taken = aws_names.honoured(self.name) | h.ORDINARY
        return taken if self.needs_bucket else taken - {_EXPECTED_OWNER}

    @cached_property
    def access(self) -> int:
        """The calls of the object plane that it makes: see ``Grant``."""
        return action_of(self.name).access

    @cached_property
    def parameters(self) -> frozenset[str]:
        return aws_names.parameters(self.name)

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """``headers`` by lower-case name. Raises NotImplemented, InvalidArgument, InvalidRequest for a header that the
        operation does not accept."""
        if headers.keys() <= _INERT:
            return
        # so that the error does not depend on the order in which headers came
        for name in sorted(headers.keys() - self.headers):
            if name.startswith(_WATCHED) or name in aws_names.HEADERS:
                refused = self._refusal(name, headers)
                if refused is not None:
                    raise refused
        if self.changes:
            _check_values(headers)

    def check_parameters(self, query: Mapping[str, str], count: int) -> None:
        """``count``: the number of parameters, with repeated names. Raises InvalidArgument."""
        if not self.changes:
            return
        for name in query:
            if name in aws_names.PARAMETERS and name not in self.parameters:
                what = _NOT_ACCEPTED.get(name, f"the parameter {name}")
                raise InvalidArgument(
                    f"This operation does not accept {what}.", ArgumentName=name, ArgumentValue=query[name]
                )
        if count != len(query):
            raise InvalidArgument("A query parameter was given more than once.")

    def _refusal(self, name: str, headers: Mapping[str, str]) -> S3Error | None:
        """The error for a header that the operation does not accept; None: the header may be ignored."""
        row = aws_names.HEADERS.get(name)
        if name.startswith(aws_names.OWN):
            return unsupported(name)
        if not self.changes:
            return self._refusal_of_read(name, row, headers)
        if name == "content-range" and self.name not in ("PutObject", "PostObject"):
            return None
        if name.startswith(aws_names.META):
            return None if self.name in aws_names.METADATA else unsupported(name)
        if row is None:
            return unsupported(name) if name.startswith(aws_names.FAMILIES) else None
        if name in encryption.OF_UPLOAD and self.name in _OF_UPLOAD:
            return None
        if name == encryption.SSE:
            return InvalidArgument(
                f"{name} header is not supported for this operation.", ArgumentName=name, ArgumentValue=headers[name]
            )
        if self.name not in row.operations or not row.refusal:
            return unsupported(name)
        if name.startswith(aws_names.LOCK):
            return InvalidRequest(row.refusal)
        return NotImplemented(row.refusal, Header=name)

    def _refusal_of_read(self, name: str, row: aws_names.Name | None, headers: Mapping[str, str]) -> S3Error | None:
        if row is not None and row.refusal and self.name in row.operations:
            return NotImplemented(row.refusal, Header=name)
        if self.name in ("GetObject", "HeadObject") and name.startswith(encryption.SSE):
            return InvalidRequest(f"{name} header is not supported for this operation.")
        return None


def _check_values(headers: Mapping[str, str]) -> None:
    """Checks the values of headers that are accepted by name. Raises InvalidArgument, NotImplemented."""
    encryption.check(headers)
    h.check_acl(headers)
    if headers.get("x-amz-request-payer", "requester") != "requester":
        raise InvalidArgument(ArgumentName="x-amz-request-payer", ArgumentValue=headers["x-amz-request-payer"])


async def _no_handler(front: Front, request: Request) -> Reply:
    raise AssertionError("a form is answered by its own handler")


_FORM = Operation("PostObject", _no_handler, STREAM, changes=True, needs_bucket=False)


_FORM_HEADERS = Operation("", _no_handler, STREAM, changes=True, needs_bucket=False)
"""A form's requests are in its fields: its HTTP headers mean nothing."""


def check_form(headers: Mapping[str, str]) -> None:
    """Checks the HTTP headers of a browser form. Raises as ``Operation.check_headers``."""
    _FORM_HEADERS.check_headers(headers)


def check_fields(fields: Mapping[str, str]) -> None:
    """Checks the fields of a browser form that act as headers. Raises as ``Operation.check_headers``."""
    _FORM.check_headers(fields)


def adopt_query_headers(request: Request) -> None:
    """Treats x-amz-* parameters of the query as headers, as AWS does: presigned URLs have them. Raises
    InvalidArgument."""
    headers = request.headers
    for name, value in request.query.items():
        lower = name.lower()
        if not lower.startswith(_WATCHED) or lower in aws_names.SIGNATURE or lower in aws_names.IGNORED_IN_QUERY:
            continue
        if headers.get(lower, value) != value or not TOKEN.fullmatch(lower):
            raise InvalidArgument("A header and a query parameter contradict each other.", ArgumentName=name[:100])
        if not value.isascii() and must_be_ascii(lower):
            raise InvalidArgument("The value of this parameter must be ASCII.", ArgumentName=name[:100])
        headers[lower] = checked_header(name[:100], value)


async def read_body(front: Front, request: Request, operation: Operation) -> None:
    """Reads the body of an operation that does not stream it. Raises MaxMessageLengthExceeded, BadDigest,
    InvalidDigest, InvalidRequest."""
    kind = operation.body
    if isinstance(kind, Document):
        request.document = await read_document(
            request,
            required=kind.digest_required,
            bytes_max=min(kind.bytes_max, front.endpoint.limits.xml_bytes_max),
            of_object=kind.of_object,
        )
    elif (
        isinstance(kind, NoBody)
        and operation.changes
        and request.body.length != 0
        and await request.body.read(UNEXPECTED_BODY_BYTES_MAX)
    ):
        raise InvalidRequest("The request included a body. Requests of this type must not include a non-empty body.")
