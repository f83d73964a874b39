"""One S3 request, taken apart without any URL library: keys are bytes, and what was signed is what arrived.

``/b///a/../b%2Bc`` names the bucket ``b`` and the key ``//a/../b+c``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

from msgspec import Struct, field

from storaged import trace
from storaged.errors import InvalidArgument, InvalidURI, KeyTooLongError
from storaged.objects.api import BodyChecks, NewMeta, Principal, Reading, WriteConditions
from storaged.objects.records import BucketRecord
from storaged.s3.http.body import RequestBody
from storaged.s3.reply import Reply

KEY_BYTES_MAX = 1024
PARAMETERS_MAX = 128

ANONYMOUS = Principal(user_id="", display_name="anonymous")


class Target(Struct, frozen=True):
    """``raw_path`` is what canonicalisation begins with; ``pairs`` are the decoded parameters in order, ``query`` the
    first of each name as text.
    """

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
    """(bucket, key); both empty: the service, an empty key: the bucket. Raises InvalidURI, KeyTooLongError."""
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
    """UTF-8 of at most 1,024 bytes. Raises InvalidURI, KeyTooLongError."""
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
    r"\b(X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|Signature|AWSAccessKeyId)=[^&]*", re.IGNORECASE
)


def without_secrets(target: bytes) -> str:
    """For logs: path and query, a hyphen for each value that signs. Names of parameters count as they are decoded, for
    a signature is read so too."""
    path, mark, query = _SECRETS.sub(r"\1=-", target.decode("utf-8", "replace")).partition("?")
    if "%" in query:
        query = "&".join(map(_without_secret, query.split("&")))
    return f"{path}{mark}{query}"


def _without_secret(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    return f"{name}=-" if equals and _SECRETS.match(f"{unquote(name)}=") else parameter


NO_TARGET = Target(b"/", (), {})


class Request(Struct):
    """What handlers get. ``bucket_record`` is set, and belongs to ``who``, wherever a handler works on a bucket that
    must exist.
    """

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
    modern: bool = True
    """HTTP/1.1."""
    document: bytes = b""
    """The body, of an operation that takes a document."""
    _body: RequestBody | None = None
    _bucket_record: BucketRecord | None = None
    asked: tuple[NewMeta, BodyChecks, WriteConditions] | None = None
    """What a PutObject asks for, once that was looked at."""
    reading: Reading | None = None
    """Of the object's record, when it was read before the handler began."""

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
    def resource(self) -> str:
        """As errors name it: the path, without the query."""
        return self.raw_target.partition(b"?")[0].decode("utf-8", "replace")


def origin(request: Request) -> str:
    """``https://host`` as its client names this server; bytes of the host that are not ASCII are percent-encoded. It
    fails for no host, so that an answer can name it once all is done."""
    host = request.headers.get("host", "").encode("utf-8", "surrogateescape")
    return f"{'https' if request.secure else 'http'}://{quote_from_bytes(host, safe=':[]')}"


def version_of(request: Request) -> str:
    """versionId: absent, or ``null`` where there never was versioning. Raises InvalidArgument for an empty one."""
    if not request.query:
        return ""
    version = request.query.get("versionId")
    if version == "":
        raise InvalidArgument("Version id cannot be the empty string", ArgumentName="versionId", ArgumentValue="")
    return version or ""


class RequestDone(Struct):
    """What is known of a request after its answer: for the access log and for metrics. Most of it is read only when
    somebody wants to know.
    """

    request: Request
    reply: Reply
    bytes_in: int
    bytes_out: int
    duration_s: float
    complete: bool
    """The client got all of the answer."""
    trace: trace.Trace | None = None
    """Where the time went, when spans are on."""

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
        """The S3 error's, or empty."""
        return self.reply.code

    @property
    def target(self) -> str:
        """Path and query without signatures."""
        return without_secrets(self.request.raw_target)
