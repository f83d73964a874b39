"""Who asks: the signature checked against the user's secret, and the body told what it must prove."""

from __future__ import annotations

from storaged import errors
from storaged.clock import Clock
from storaged.objects.api import Users
from storaged.s3 import sigv4
from storaged.s3.chunked import ChunkedDecoder
from storaged.s3.headers import trailing_names
from storaged.s3.request import ANONYMOUS, Request


async def authenticate(request: Request, users: Users, region: str, clock: Clock) -> None:
    """Sets ``request.who`` and prepares ``request.body``. A request without any signature is anonymous; what it may do is decided elsewhere.

    Raises the S3 errors of ``sigv4``, InvalidAccessKeyId, InvalidRequest (Signature Version 2, two signatures), InvalidToken.
    """
    headers, query = request.headers, request.query
    authorization = headers.get("authorization", "")
    if "X-Amz-Algorithm" in query or "X-Amz-Signature" in query:
        if authorization:
            raise errors.InvalidArgument(
                "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, Signature query string parameter or the Authorization header should be specified",
                ArgumentName="Authorization",
            )
        claim = sigv4.claim_from_query(query)
    elif authorization:
        claim = sigv4.claim_from_header(authorization, headers)
    elif "AWSAccessKeyId" in query or "Signature" in query:
        raise errors.InvalidRequest("Signature Version 2 is not supported. Please sign with AWS4-HMAC-SHA256.")
    else:
        request.who = ANONYMOUS
        _prepare_body(request, headers.get("x-amz-content-sha256", ""), None)
        return
    if "x-amz-security-token" in headers or "X-Amz-Security-Token" in query:
        raise errors.InvalidToken()
    sigv4.check_scope(claim, region)
    who, secret = users.at_hand(claim.access_key) or await users.lookup(claim.access_key)
    sigv4.check_time(claim, clock.wall_ms())
    payload = sigv4.payload_hash(claim, headers, query)
    key = sigv4.verify(claim, secret, request.method, request.target.raw_path, request.target.pairs, headers, payload)
    sigv4.check_signed_headers(claim, headers)
    request.who = who
    _prepare_body(request, payload, key)


def _prepare_body(request: Request, payload: str, key: sigv4.ChunkKey | None) -> None:
    """What the body must be, from x-amz-content-sha256: plain, plain with this hash, or one of the streaming forms."""
    if payload == sigv4.STREAMING_UNSIGNED_TRAILER:
        request.body.decoder = ChunkedDecoder(None, trailing_names(request.headers))
    elif payload in sigv4.STREAMING:
        if key is None:
            raise errors.AccessDenied()
        trailing = trailing_names(request.headers) if payload == sigv4.STREAMING_SIGNED_TRAILER else ()
        request.body.decoder = ChunkedDecoder(key, trailing)
    elif payload not in ("", sigv4.UNSIGNED_PAYLOAD):
        request.body.sha256 = payload
