"""AWS Signature Version 4: does the request come from the user it names, unaltered? Pure: time is passed in.

Theory of operation. A client hashes a canonical form of its request (method, path, query, the headers that it names,
hash of the body) and signs the hash with a key derived from its secret for one day, region and service. The server
builds the same form from what arrived and compares. So all code here has one aim: to reach the very bytes that the
client signed, whatever HTTP allows to be done to them on the way.

The signature is in one of three places: the Authorization header, the query of a presigned URL, and, in bodies that are
sent in signed chunks, each chunk. A chunk's signature continues that of the chunk before it, beginning with the
request's own (the seed).

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html,
sigv4-query-string-auth.html, sigv4-streaming.html, sigv4-streaming-trailers.html, sigv4-HTTPPOSTConstructPolicy.html.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote_from_bytes, unquote_to_bytes

from msgspec import Struct

from storaged.errors import (
    AccessDenied,
    AuthorizationHeaderMalformed,
    AuthorizationQueryParametersError,
    InvalidRequest,
    RequestTimeTooSkewed,
    S3Error,
    SignatureDoesNotMatch,
)
from storaged.s3.conditions import parse_http_time

ALGORITHM = "AWS4-HMAC-SHA256"
SERVICE = "s3"
SKEW_MS_MAX = 15 * 60 * 1000
EXPIRES_S_MAX = 7 * 24 * 3600

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
STREAMING_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
STREAMING_SIGNED_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
STREAMING_UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
STREAMING = frozenset({STREAMING_SIGNED, STREAMING_SIGNED_TRAILER, STREAMING_UNSIGNED_TRAILER})

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

_CANONICAL_PATH = re.compile(rb"[A-Za-z0-9\-._~/]*")
_CANONICAL_WORD = re.compile(rb"[A-Za-z0-9\-._~]*")
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMESTAMP = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_STAMP_CHARS = 16
_SECONDS = re.compile(r"-?[0-9]{1,18}")
_SPACES = re.compile(r" {2,}")
_COMPONENTS = frozenset({"Credential", "SignedHeaders", "Signature"})

_CACHED_CHARS_MAX = 1024
"""Longer ones are parsed each time: text of clients without a key must not fill the memory."""

_Claimed = tuple[str, str, str, str, str, tuple[str, ...]]
"""Access key, date, region, service, scope, and the signed headers."""

_BLOCK_BYTES = 64
"""Of SHA-256. HMAC hashes longer keys first; a key of Signature Version 4 has 32 bytes."""
_INNER_PAD = bytes(code ^ 0x36 for code in range(256))
_OUTER_PAD = bytes(code ^ 0x5C for code in range(256))

_SIGNED_PREFIXES = ("x-amz-", "x-storaged-")

Pairs = Sequence[tuple[bytes, bytes]]
"""Query parameters, decoded, in the order they came."""


class Claim(Struct, frozen=True):
    """A request's signature and what it says about it, not yet verified. ``timestamp`` is ``YYYYMMDDTHHMMSSZ``;
    ``expires_s`` is set only in presigned URLs; ``token`` with temporary credentials."""

    access_key: str
    date: str
    region: str
    service: str
    scope: str
    signed_headers: tuple[str, ...]
    signature: str
    timestamp: str
    expires_s: int | None = None
    token: str = ""

    @property
    def presigned(self) -> bool:
        return self.expires_s is not None


class ChunkKey(Struct, frozen=True):
    """What signs the chunks of a body: the day's key, and the seed that they continue."""

    key: bytes
    timestamp: str
    scope: str
    seed: str


# --- reading the claim ------------------------------------------------------------------------------------------------


def claim_from_header(authorization: str, headers: Mapping[str, str]) -> Claim:
    """The claim of an Authorization header. ``headers`` by lower-case name. Raises AuthorizationHeaderMalformed,
    AccessDenied (no date), InvalidRequest (another signing method)."""
    if not authorization.startswith(ALGORITHM):
        raise InvalidRequest(
            "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256."
        )
    before, name, signature = authorization.rpartition("Signature=")
    if name and signature.isalnum() and len(before) <= _CACHED_CHARS_MAX:
        claimed = _claimed_before_signature(before)
    else:
        components = _components(authorization[len(ALGORITHM) :])
        signature = components["Signature"]
        claimed = _claimed(components)
    timestamp = _timestamp_from_headers(headers)
    if timestamp[:8] != claimed[1]:
        raise AuthorizationHeaderMalformed(
            "The authorization header is malformed; the credential's date is not the request's."
        )
    if "host" not in claimed[5]:
        raise AuthorizationHeaderMalformed("The authorization header is malformed; the Host header must be signed.")
    return Claim(*claimed, signature, timestamp)


@lru_cache(maxsize=1024)
def _claimed_before_signature(text: str) -> _Claimed:
    """The text before the signature is the same in all requests of a client on one day that sign the same headers. So
    it is parsed once."""
    return _claimed(_components(f"{text[len(ALGORITHM) :]}Signature=0"))


def _claimed(components: Mapping[str, str]) -> _Claimed:
    access_key, date, region, service = _credential(components["Credential"], AuthorizationHeaderMalformed)
    signed = _signed_headers(components["SignedHeaders"], AuthorizationHeaderMalformed)
    return access_key, date, region, service, _scope(date, region, service), signed


def _signed_headers(text: str, malformed: type[S3Error]) -> tuple[str, ...]:
    """Each name once: a head with the same name thousands of times would be signed, and shown in the error, as a
    hundred million bytes."""
    signed = tuple(text.lower().split(";"))
    if len(set(signed)) != len(signed):
        raise malformed("SignedHeaders names a header twice.")
    return signed


def _scope(date: str, region: str, service: str) -> str:
    return f"{date}/{region}/{service}/aws4_request"


def _components(text: str) -> dict[str, str]:
    """`` Credential=.., SignedHeaders=.., Signature=..`` in any order, each once. It is parsed in one pass, whatever it
    has: this runs before the client is authenticated."""
    found: dict[str, str] = {}
    for item in text.split(",") if text[:1].isspace() else ():
        name, _, value = item.strip().partition("=")
        if not item.strip():
            continue
        if name not in _COMPONENTS or name in found or any(letter.isspace() for letter in value):
            break
        found[name] = value
    else:
        if len(found) == len(_COMPONENTS):
            return found
    raise AuthorizationHeaderMalformed(
        "The authorization header is malformed; it requires three components: Credential, SignedHeaders, and Signature."
    )


def claim_from_query(query: Mapping[str, str]) -> Claim:
    """The claim of a presigned URL. Raises AuthorizationQueryParametersError, AccessDenied."""
    if query.get("X-Amz-Algorithm") != ALGORITHM:
        raise AuthorizationQueryParametersError()
    missing = [
        name
        for name in ("X-Amz-Credential", "X-Amz-Date", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Expires")
        if not query.get(name)
    ]
    if missing:
        raise AuthorizationQueryParametersError(
            "Query-string authentication version 4 requires the X-Amz-Algorithm, X-Amz-Credential, X-Amz-Signature,"
            f" X-Amz-Date, X-Amz-SignedHeaders, and X-Amz-Expires parameters; {missing[0]} is missing."
        )
    access_key, date, region, service = _credential(query["X-Amz-Credential"], AuthorizationQueryParametersError)
    timestamp = query["X-Amz-Date"]
    if not _TIMESTAMP.fullmatch(timestamp):
        raise AuthorizationQueryParametersError(
            "X-Amz-Date must be in the ISO8601 Long Format \"yyyyMMdd'T'HHmmss'Z'\""
        )
    if timestamp[:8] != date:
        raise AuthorizationQueryParametersError("The credential's date is not the one of X-Amz-Date.")
    if not _SECONDS.fullmatch(query["X-Amz-Expires"]):
        raise AuthorizationQueryParametersError("X-Amz-Expires should be a number")
    expires_s = int(query["X-Amz-Expires"])
    if not 0 <= expires_s <= EXPIRES_S_MAX:
        # AccessDenied, as Ceph's conformance tests want it; AWS answers 400.
        raise AccessDenied(f"X-Amz-Expires must be between 0 and a week (in seconds), that is {EXPIRES_S_MAX}")
    if not query["X-Amz-SignedHeaders"].isascii():
        raise AuthorizationQueryParametersError("X-Amz-SignedHeaders should be names of headers")
    signed = _signed_headers(query["X-Amz-SignedHeaders"], AuthorizationQueryParametersError)
    if "host" not in signed:
        raise AuthorizationQueryParametersError("The Host header must be signed.")
    scope = _scope(date, region, service)
    return Claim(access_key, date, region, service, scope, signed, query["X-Amz-Signature"], timestamp, expires_s)


def _credential(text: str, malformed: type[S3Error]) -> tuple[str, str, str, str]:
    """``AKID/20130524/us-east-1/s3/aws4_request``. An access key may contain slashes."""
    fields = text.rsplit("/", 4)
    if (
        len(fields) != 5
        or not fields[0]
        or len(fields[1]) != 8
        or not (fields[1].isascii() and fields[1].isdigit())
        or fields[4] != "aws4_request"
    ):
        raise malformed(
            'The Credential is malformed; expecting "<YOUR-AKID>/YYYYMMDD/REGION/SERVICE/aws4_request".',
        )
    return fields[0], fields[1], fields[2], fields[3]


def _timestamp_from_headers(headers: Mapping[str, str]) -> str:
    stamp = headers.get("x-amz-date", "")
    if _TIMESTAMP.fullmatch(stamp):
        return stamp
    if not stamp and "date" in headers:
        text = headers["date"]
        if _TIMESTAMP.fullmatch(text):
            return text
        found_ms = parse_http_time(text)
        if found_ms is not None:
            return f"{datetime.fromtimestamp(found_ms // 1000, UTC):%Y%m%dT%H%M%SZ}".rjust(_STAMP_CHARS, "0")
    raise AccessDenied("AWS authentication requires a valid Date or x-amz-date header")


def timestamp_ms(timestamp: str) -> int:
    """``20130524T000000Z`` -> milliseconds since 1970. Raises AccessDenied when it is no date."""
    try:
        moment = datetime.strptime(timestamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise AccessDenied("AWS authentication requires a valid Date or x-amz-date header") from None
    return int(moment.timestamp()) * 1000


_timestamp_ms = lru_cache(maxsize=256)(timestamp_ms)


# --- checks before any hashing ----------------------------------------------------------------------------------------


def check_scope(claim: Claim, region: str, services: Collection[str] = (SERVICE,)) -> None:
    """``region`` empty: any region is right, since the signature is verified with the one that it names. Raises
    AuthorizationHeaderMalformed, or its counterpart for presigned URLs, with the Region that would be right."""
    if claim.service in services and region in ("", claim.region):
        return
    malformed = AuthorizationQueryParametersError if claim.presigned else AuthorizationHeaderMalformed
    where = (
        "Error parsing the X-Amz-Credential parameter" if claim.presigned else "The authorization header is malformed"
    )
    if claim.service not in services:
        belongs = '" or "'.join(services)
        raise malformed(f'{where}; incorrect service "{claim.service}". This endpoint belongs to "{belongs}".')
    raise malformed(f"{where}; the region '{claim.region}' is wrong; expecting '{region}'", Region=region)


def check_time(claim: Claim, now_ms: int) -> None:
    """Raises RequestTimeTooSkewed, or AccessDenied for a presigned URL that has expired or is not valid yet."""
    signed_ms = _timestamp_ms(claim.timestamp)
    if claim.expires_s is None:
        if abs(now_ms - signed_ms) > SKEW_MS_MAX:
            raise RequestTimeTooSkewed(
                RequestTime=claim.timestamp, ServerTime=_iso(now_ms), MaxAllowedSkewMilliseconds=str(SKEW_MS_MAX)
            )
        return
    if signed_ms - now_ms > SKEW_MS_MAX:
        raise AccessDenied(
            "Request is not valid yet", **{"X-Amz-Expires": str(claim.expires_s)}, ServerTime=_iso(now_ms)
        )
    if now_ms >= signed_ms + claim.expires_s * 1000:
        raise AccessDenied(
            "Request has expired",
            **{"X-Amz-Expires": str(claim.expires_s)},
            Expires=_iso(signed_ms + claim.expires_s * 1000),
            ServerTime=_iso(now_ms),
        )


def check_signed_headers(claim: Claim, headers: Mapping[str, str]) -> None:
    """Every x-amz-* and x-storaged-* header must be signed, else an intermediary could add some. Raises AccessDenied
    that names the unsigned ones."""
    unsigned = []
    for name in headers.keys() - claim.signed_headers:
        if name.startswith(_SIGNED_PREFIXES) and not (claim.presigned and name == "x-amz-content-sha256"):
            unsigned.append(name)  # noqa: PERF401 - mostly there is none, and a comprehension is a call
    if unsigned:
        raise AccessDenied(
            "There were headers present in the request which were not signed",
            HeadersNotSigned=", ".join(sorted(unsigned)),
        )


def _iso(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def payload_hash(claim: Claim, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    """The canonical request's line for the body: 64 hex digits, UNSIGNED-PAYLOAD or one of STREAMING. Raises
    InvalidRequest."""
    value = headers.get("x-amz-content-sha256", "")
    if value == EMPTY_SHA256:
        return value
    if claim.presigned:
        return value or query.get("X-Amz-Content-Sha256", "") or UNSIGNED_PAYLOAD
    if not value:
        raise InvalidRequest("Missing required header for this request: x-amz-content-sha256")
    if value != UNSIGNED_PAYLOAD and value not in STREAMING and not _HEX_SHA256.fullmatch(value):
        raise InvalidRequest(
            f"x-amz-content-sha256 must be {UNSIGNED_PAYLOAD}, {', '.join(sorted(STREAMING))}, or a valid sha256 value."
        )
    return value


# --- the canonical request --------------------------------------------------------------------------------------------


def canonical_uri(raw_path: bytes) -> str:
    """The path as S3 signs it: percent-encoded once, never normalised (``/a//../b`` stays)."""
    if _CANONICAL_PATH.fullmatch(raw_path):
        return raw_path.decode("ascii")
    return quote_from_bytes(unquote_to_bytes(raw_path), safe="/~")


def _word(value: bytes) -> str:
    return value.decode("ascii") if _CANONICAL_WORD.fullmatch(value) else quote_from_bytes(value, safe="~")


def canonical_query(pairs: Pairs) -> str:
    """Encoded, then sorted by name and value, without the signature itself."""
    if not pairs:
        return ""
    return "&".join(
        f"{name}={value}"
        for name, value in sorted((_word(name), _word(value)) for name, value in pairs if name != b"X-Amz-Signature")
    )


def canonical_headers(signed: Sequence[str], headers: Mapping[str, str]) -> str:
    """``name:value`` lines. Values are trimmed, and runs of spaces become one. A signed header that did not arrive
    counts as empty, so that the signature does not match."""
    text = ""
    for name in signed:
        value = headers.get(name, "").strip(" \t")
        text += f"{name}:{_SPACES.sub(' ', value) if '  ' in value else value}\n"
    return text


def canonical_request(
    method: str, raw_path: bytes, pairs: Pairs, signed: Sequence[str], headers: Mapping[str, str], payload: str
) -> bytes:
    """The bytes whose hash is signed. Header values that are not UTF-8 are surrogate escapes, and are encoded to the
    bytes that arrived."""
    return (
        f"{method}\n{canonical_uri(raw_path)}\n{canonical_query(pairs)}\n"
        f"{canonical_headers(signed, headers)}\n{';'.join(signed)}\n{payload}"
    ).encode("utf-8", "surrogateescape")


def string_to_sign(timestamp: str, scope: str, canonical: bytes) -> str:
    return f"{ALGORITHM}\n{timestamp}\n{scope}\n{hashlib.sha256(canonical).hexdigest()}"


# --- keys and signatures ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def signing_key(secret: str, date: str, region: str, service: str = SERVICE) -> bytes:
    """The key of one secret for one day, region and service. The last 1,024 are cached."""
    key = hmac.digest(b"AWS4" + secret.encode("utf-8", "surrogateescape"), date.encode(), "sha256")
    for step in (region, service, "aws4_request"):
        key = hmac.digest(key, step.encode("utf-8", "surrogateescape"), "sha256")
    return key


def sign(key: bytes, text: str) -> str:
    """HMAC-SHA256 under a key of 32 bytes, in hexadecimal digits."""
    padded_inner, padded_outer = _padded(key)
    inner, outer = padded_inner.copy(), padded_outer.copy()
    inner.update(text.encode("utf-8", "surrogateescape"))
    outer.update(inner.digest())
    return outer.hexdigest()


@lru_cache(maxsize=1024)
def _padded(key: bytes) -> tuple[hashlib._Hash, hashlib._Hash]:
    """SHA-256 of HMAC's two pads of a key (RFC 2104). To go on from these takes half of the time of ``hmac.digest``."""
    block = key.ljust(_BLOCK_BYTES, b"\0")
    return hashlib.sha256(block.translate(_INNER_PAD)), hashlib.sha256(block.translate(_OUTER_PAD))


def same(computed: str, given: str) -> bool:
    """Compares in constant time, whatever the client sent. ``computed`` is ASCII."""
    return given.isascii() and hmac.compare_digest(computed, given)


def verify(
    claim: Claim, secret: str, method: str, raw_path: bytes, pairs: Pairs, headers: Mapping[str, str], payload: str
) -> ChunkKey:
    """Returns what signs a chunked body. Raises SignatureDoesNotMatch with the text that this server signed, so that
    the author of a client can compare."""
    canonical = canonical_request(method, raw_path, pairs, claim.signed_headers, headers, payload)
    text = string_to_sign(claim.timestamp, claim.scope, canonical)
    key = signing_key(secret, claim.date, claim.region, claim.service)
    if not same(sign(key, text), claim.signature):
        raise SignatureDoesNotMatch(
            AWSAccessKeyId=claim.access_key,
            StringToSign=text,
            SignatureProvided=claim.signature,
            CanonicalRequest=canonical.decode("utf-8", "replace"),
        )
    return ChunkKey(key, claim.timestamp, claim.scope, claim.signature)


def chunk_signature(chunk: ChunkKey, previous: str, sha256_hex: str) -> str:
    """The signature of one chunk of a STREAMING-AWS4-HMAC-SHA256-PAYLOAD body. ``previous``: the signature before it.
    ``sha256_hex``: the hash of its data."""
    return sign(
        chunk.key, f"{ALGORITHM}-PAYLOAD\n{chunk.timestamp}\n{chunk.scope}\n{previous}\n{EMPTY_SHA256}\n{sha256_hex}"
    )


def trailer_signature(chunk: ChunkKey, previous: str, trailer: bytes) -> str:
    """The signature of the trailing headers. ``trailer``: ``name:value\\n`` lines."""
    return sign(
        chunk.key,
        f"{ALGORITHM}-TRAILER\n{chunk.timestamp}\n{chunk.scope}\n{previous}\n{hashlib.sha256(trailer).hexdigest()}",
    )


def policy_signature(secret: str, date: str, region: str, policy_base64: str) -> str:
    """The signature of a browser form's policy."""
    return sign(signing_key(secret, date, region), policy_base64)


def policy_credential(text: str) -> tuple[str, str, str, str]:
    """x-amz-credential of a browser form: (access key, date, region, service)."""
    return _credential(text, InvalidRequest)
