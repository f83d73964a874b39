"""Authentication of a request: its signature is checked against the user's secret, and its body is prepared to be
checked."""

from __future__ import annotations

from collections.abc import Collection

from msgspec import structs

from storaged import errors
from storaged.objects.api import Principal
from storaged.s3.auth import sigv4
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.headers import trailing_names
from storaged.s3.request import Request

_WITH_TRAILERS = frozenset({sigv4.STREAMING_SIGNED_TRAILER, sigv4.STREAMING_UNSIGNED_TRAILER})
"""Only these forms of a body can have trailers: in any other one, an announced checksum could not be demanded."""


def claim_of(request: Request, region: str, services: Collection[str] = (sigv4.SERVICE,)) -> sigv4.Claim | None:
    """The signature that a request carries, not yet verified; None: it is not signed. ``region``: of which it must be;
    empty: of any. ``services``: for one of which it must be.

    Raises the S3 errors of ``sigv4``, InvalidRequest (Signature Version 2), InvalidArgument (two signatures, two
    tokens).
    """
    headers, query = request.headers, request.target.query
    authorization = headers.get("authorization", "")
    if query and ("X-Amz-Algorithm" in query or "X-Amz-Signature" in query):
        if authorization:
            raise errors.InvalidArgument(
                "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, Signature query string"
                " parameter or the Authorization header should be specified",
                ArgumentName="Authorization",
            )
        claim = sigv4.claim_from_query(query)
    elif authorization:
        claim = sigv4.claim_from_header(authorization, headers)
    elif "AWSAccessKeyId" in query or "Signature" in query:
        raise errors.InvalidRequest("Signature Version 2 is not supported. Please sign with AWS4-HMAC-SHA256.")
    else:
        return None
    if "x-amz-security-token" in headers or "X-Amz-Security-Token" in query:
        claim = structs.replace(claim, token=_token_of(request))
    sigv4.check_scope(claim, region, services)
    return claim


def _token_of(request: Request) -> str:
    """Raises InvalidArgument, InvalidToken."""
    found = {request.headers.get("x-amz-security-token"), request.target.query.get("X-Amz-Security-Token")} - {None}
    if len(found) > 1:
        raise errors.InvalidArgument("Only one security token is allowed.", ArgumentName="x-amz-security-token")
    token = found.pop()
    if not token:
        raise errors.InvalidToken()
    return token


def admit(request: Request, claim: sigv4.Claim, who: Principal, secret: str, now_ms: int) -> None:
    """Verifies the signature, sets ``request.who``, and prepares the body. Raises the S3 errors of ``sigv4``."""
    headers = request.headers
    sigv4.check_time(claim, now_ms)
    if who.identity is not None:
        check_expiry(who, now_ms)
    payload = sigv4.payload_hash(claim, headers, request.target.query)
    key = sigv4.verify(claim, secret, request.method, request.target.raw_path, request.target.pairs, headers, payload)
    sigv4.check_signed_headers(claim, headers)
    request.body.admit()
    request.who = who
    _prepare_body(request, payload, key)


def check_expiry(who: Principal, now_ms: int) -> None:
    """Raises ExpiredToken."""
    if who.identity is not None and who.identity.temporary and now_ms >= who.identity.expires_ms:
        raise errors.ExpiredToken()


def admit_anonymous(request: Request) -> None:
    """Prepares the body of a request without a signature; what it may do is decided elsewhere. Raises AccessDenied for
    a body that should be signed."""
    _prepare_body(request, request.headers.get("x-amz-content-sha256", ""), None)


def _prepare_body(request: Request, payload: str, key: sigv4.ChunkKey | None) -> None:
    """Sets what the body must be, by x-amz-content-sha256: plain, plain with this hash, or one of the streaming
    forms."""
    if "x-amz-trailer" in request.headers and payload not in _WITH_TRAILERS:
        raise errors.InvalidRequest(
            f"x-amz-trailer goes only with x-amz-content-sha256 {' or '.join(sorted(_WITH_TRAILERS))}."
        )
    if payload not in sigv4.STREAMING:
        if payload not in ("", sigv4.UNSIGNED_PAYLOAD):
            request.body.sha256 = payload
    elif payload == sigv4.STREAMING_UNSIGNED_TRAILER:
        request.body.decoder = ChunkedDecoder(None, trailing_names(request.headers))
    else:
        if key is None:
            raise errors.AccessDenied()
        trailing = trailing_names(request.headers) if payload == sigv4.STREAMING_SIGNED_TRAILER else ()
        request.body.decoder = ChunkedDecoder(key, trailing)
