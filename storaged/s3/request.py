"""One S3 request, parsed without any URL library: keys are bytes, and the signed text is the text that arrived.

``/b///a/../b%2Bc`` names the bucket ``b`` and the key ``//a/../b+c``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

from msgspec import Struct, field

from storaged import trace
from storaged.errors import InvalidArgument, InvalidURI, KeyTooLongError, ServiceUnavailable
from storaged.objects.api import BodyChecks, Grant, NewMeta, Principal, Reading, WriteConditions
from storaged.objects.records import BucketRecord
from storaged.s3.http.body import RequestBody
from storaged.s3.reply import Reply

KEY_BYTES_MAX = 1024
PARAMETERS_MAX = 128

ANONYMOUS = Principal(user_id="", display_name="anonymous")


class Target(Struct, frozen=True):
    """A request's target. ``raw_path``: as it arrived, for the signature. ``pairs``: all parameters, decoded, in order.
    ``query``: the first of each name, as text."""

    raw_path: bytes
    pairs: Sequence[tuple[bytes, bytes]]
    query: dict[str, str]


def parse_target(target: bytes) -> Target:
    """Raises InvalidURI for absolute forms, too many parameters, and parameters that are not UTF-8."""
    raw_path, _, raw_query = target.partition(b"?")
    if not raw_path.startswith(b"/"):
        raise InvalidURI()
    if not raw_query:
        return Target(raw_path, (), {})
    items = raw_query.split(b"&")
    if len(items) > PARAMETERS_MAX:
        raise InvalidURI(f"The URI has more than {PARAMETERS_MAX} query parameters.")
    pairs = []
    query: dict[str, str] = {}
    try:
        for item in items:
            if not item:
                continue
            name, _, value = item.partition(b"=")
            pair = _unquote_plus(name), _unquote_plus(value)
            pairs.append(pair)
            query.setdefault(pair[0].decode(), pair[1].decode())
    except UnicodeDecodeError:
        raise InvalidURI() from None
    return Target(raw_path, pairs, query)


def _unquote_plus(text: bytes) -> bytes:
    if b"+" in text:
        text = text.replace(b"+", b" ")
    return unquote_to_bytes(text) if b"%" in text else text


def split_path(raw_path: bytes, virtual_bucket: str) -> tuple[str, bytes]:
    """(bucket, key). Without a bucket the target is the service, without a key it is the bucket. Raises InvalidURI,
    KeyTooLongError."""
    path = unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path
    if virtual_bucket:
        bucket, key = virtual_bucket, path[1:]
    else:
        bucket_bytes, _, key = path[1:].partition(b"/")
        try:
            bucket = bucket_bytes.decode()
        except UnicodeDecodeError:
            raise InvalidURI() from None
    check_key(key)
    return bucket, key


def check_key(key: bytes) -> None:
    """A key is UTF-8 of at most 1,024 bytes. Raises InvalidURI, KeyTooLongError."""
    if len(key) > KEY_BYTES_MAX:
        raise KeyTooLongError(Size=str(len(key)), MaxSizeAllowed=str(KEY_BYTES_MAX))
    if not key.isascii():
        try:
            key.decode()
        except UnicodeDecodeError:
            raise InvalidURI() from None


def virtual_bucket(host: str, domains: Sequence[str]) -> str:
    """``photos.s3.example.eu:9000`` under the domain ``s3.example.eu`` -> ``photos``; empty for path style."""
    name = host.partition(":")[0].lower()
    for domain in domains:
        if name.endswith(domain) and name[: -len(domain)].endswith("."):
            return name[: -len(domain) - 1]
    return ""


_SECRETS = re.compile(
    r"\b(X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|Signature|AWSAccessKeyId"
    r"|X-Amz-(?:Copy-Source-)?Server-Side-Encryption-Customer-Key(?:-MD5)?)=[^&]*",
    re.IGNORECASE,
)


def without_secrets(target: bytes) -> str:
    """Path and query for logs, with a hyphen for each value that signs, or is a customer's key. Names of parameters are
    compared decoded, because signatures are read so too."""
    path, mark, query = _SECRETS.sub(r"\1=-", target.decode("utf-8", "replace")).partition("?")
    if "%" in query:
        query = "&".join(map(_without_secret, query.split("&")))
    return f"{path}{mark}{query}"


def _without_secret(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    return f"{name}=-" if equals and _SECRETS.match(f"{unquote(name)}=") else parameter


NO_TARGET = Target(b"/", (), {})


class BatchKey(NamedTuple):
    """``version``: that the request names, or that was made; empty: none. ``code``: of an error, or empty."""

    key: bytes
    version: str
    status: int
    code: str = ""


class Request(Struct):
    """What handlers get. ``bucket_record`` is set if the operation needs a bucket, and then ``grant`` says what ``who``
    may do."""

    id: str
    method: str
    raw_target: bytes
    remote: str
    secure: bool
    headers: dict[str, str] = field(default_factory=dict)
    target: Target = NO_TARGET
    bucket: str = ""
    key: bytes = b""
    who: Principal = ANONYMOUS
    operation: str = "Unknown"
    http11: bool = True
    """The version is HTTP/1.1, not 1.0."""
    document: bytes = b""
    """The body, for an operation that takes a document."""
    _body: RequestBody | None = None
    _bucket_record: BucketRecord | None = None
    _grant: Grant | None = None
    put_arguments: tuple[NewMeta, BodyChecks, WriteConditions] | None = None
    """What a PutObject asks for, once its headers were parsed."""
    new_owner: str = ""
    """Of the object that a PutObject makes, once its headers were parsed."""
    reading: Reading | None = None
    """The object's record, if it was read before the handler began."""
    read_error: ServiceUnavailable | None = None
    """Why its bytes could not be read then (``FailedRead``)."""
    batch: list[BatchKey] | None = None
    """The keys that it deletes beside its own (``log_lines.lines_of``), for the access log."""

    @property
    def query(self) -> dict[str, str]:
        return self.target.query

    @property
    def body(self) -> RequestBody:
        assert self._body is not None
        return self._body

    @property
    def bucket_record(self) -> BucketRecord:
        assert self._bucket_record is not None
        return self._bucket_record

    @property
    def grant(self) -> Grant:
        assert self._grant is not None
        return self._grant

    @property
    def resource(self) -> str:
        """The path without the query, as errors name it."""
        return self.raw_target.partition(b"?")[0].decode("utf-8", "replace")


def origin(request: Request) -> str:
    """``https://host`` as the client names this server. Bytes of the host that are not ASCII are percent-encoded, so
    that it never fails: an answer can name it when all is done."""
    host = request.headers.get("host", "").encode("utf-8", "surrogateescape")
    return f"{'https' if request.secure else 'http'}://{quote_from_bytes(host, safe=':[]')}"


def has_no_parameters(request: Request) -> bool:
    """``x-id``, which some SDKs send, only repeats the operation's name."""
    query = request.target.query
    return not query or query.keys() == {"x-id"}


def version_of(request: Request) -> str:
    """versionId: empty when absent, and ``null`` where there never was versioning. Raises InvalidArgument for an empty
    one."""
    if not request.query:
        return ""
    version = request.query.get("versionId")
    if version == "":
        raise InvalidArgument("Version id cannot be the empty string", ArgumentName="versionId", ArgumentValue="")
    return version or ""


class RequestDone(Struct):
    """A request after its answer, for the access log and for metrics. Most properties are computed only when they are
    read."""

    request: Request
    reply: Reply
    bytes_in: int
    bytes_out: int
    duration_s: float
    complete: bool
    """The client got all of the answer."""
    trace: trace.Trace | None = None
    """The times of its steps, when spans are on."""

    @property
    def request_id(self) -> str:
        return self.request.id

    @property
    def operation(self) -> str:
        return self.request.operation

    @property
    def method(self) -> str:
        return self.request.method

    @property
    def bucket(self) -> str:
        return self.request.bucket

    @property
    def access_key(self) -> str:
        return self.request.who.access_key

    @property
    def remote(self) -> str:
        return self.request.remote

    @property
    def status(self) -> int:
        return self.reply.status

    @property
    def code(self) -> str:
        """The S3 error's code, or empty."""
        return self.reply.code

    @property
    def target(self) -> str:
        """Path and query without signatures."""
        return without_secrets(self.request.raw_target)
