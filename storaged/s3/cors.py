"""Requests from pages of other origins: which rule of a bucket allows one, and the headers that its answer then has.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/cors.html
"""

from __future__ import annotations

from collections.abc import Sequence

from storaged.errors import AccessForbidden, BadRequest, InvalidBucketName, StoragedError
from storaged.objects.configuration.cors import CORS, CorsRule
from storaged.objects.names import bucket_name_possible
from storaged.s3.context import Front
from storaged.s3.reply import Headers, Reply
from storaged.s3.request import Request

METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "HEAD"})
_VARY = "Origin, Access-Control-Request-Headers, Access-Control-Request-Method"
_ASKED_METHOD = "access-control-request-method"
_ASKED_HEADERS = "access-control-request-headers"


def finish(front: Front, request: Request, reply: Reply) -> None:
    """Adds to any answer, also to that of a refused request, what lets a page of another origin read it. Called for
    each request that names its origin. Raises nothing: without the headers, a browser hides the answer from the page.
    """
    if request.method == "OPTIONS" or not request.bucket:
        return
    try:
        record = request._bucket_record or front.buckets.try_get(request.bucket)
        if record is None:
            return
        found = front.buckets.configuration_of(record).get(CORS)
    except StoragedError:
        return
    if found is None:
        return
    headers, origin = request.headers, request.headers["origin"]
    rule = matching(found.rules, origin, headers.get(_ASKED_METHOD, request.method), ())
    if rule is not None:
        reply.headers.update(_allowed(rule, origin))


def matching(rules: Sequence[CorsRule], origin: str, method: str, headers: Sequence[str]) -> CorsRule | None:
    """The first rule that allows the method and all headers (in lower case) to this origin."""
    for rule in rules:
        if (
            method in rule.methods
            and any(_like(wanted, origin) for wanted in rule.origins)
            and (not headers or _allow(rule.headers, headers))
        ):
            return rule
    return None


def _allow(allowed: Sequence[str], names: Sequence[str]) -> bool:
    """Whether all names of headers are allowed. A rule may have two thousand patterns: each is split once."""
    lower = frozenset(text.lower() for text in allowed)
    patterns = [text.partition("*") for text in lower if "*" in text]
    return all(
        name in lower
        or any(
            name.startswith(before) and name.endswith(after) and len(name) >= len(before) + len(after)
            for before, _, after in patterns
        )
        for name in names
    )


def _like(wanted: str, text: str) -> bool:
    """``wanted`` has at most one ``*``."""
    before, star, after = wanted.partition("*")
    if not star:
        return wanted == text
    return len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after)


def _allowed(rule: CorsRule, origin: str) -> Headers:
    everybody = "*" in rule.origins
    found = {
        "Access-Control-Allow-Origin": "*" if everybody else origin,
        "Access-Control-Allow-Methods": ", ".join(rule.methods),
    }
    if rule.expose:
        found["Access-Control-Expose-Headers"] = ", ".join(rule.expose)
    if rule.max_age_s is not None:
        found["Access-Control-Max-Age"] = str(rule.max_age_s)
    if not everybody:
        found["Access-Control-Allow-Credentials"] = "true"
    found["Vary"] = _VARY
    return found


async def preflight(front: Front, request: Request) -> Reply:
    """A browser asks whether a page of another origin may send a request. It is not signed; the answer says no more
    about the bucket than its rules. Raises BadRequest, also for more headers than a request may have, NoSuchBucket,
    AccessForbidden."""
    headers = request.headers
    if "origin" not in headers or _ASKED_METHOD not in headers:
        raise BadRequest("Insufficient information. Origin request header needed.")
    method = headers[_ASKED_METHOD]
    if not bucket_name_possible(request.bucket):
        raise InvalidBucketName(BucketName=request.bucket)
    if method not in METHODS:
        raise BadRequest(f"Invalid Access-Control-Request-Method: {method[:100]}")
    asked = [name.strip().lower() for name in headers.get(_ASKED_HEADERS, "").split(",") if name.strip()]
    if len(asked) > front.endpoint.limits.headers_max:
        # each would be compared with each pattern of a rule, for seconds
        raise BadRequest(f"A request has at most {front.endpoint.limits.headers_max} headers.")
    found = front.buckets.configuration_of(await front.buckets.get(request.bucket)).get(CORS)
    kind = "OBJECT" if request.key else "BUCKET"
    if found is None:
        raise AccessForbidden(Method=method, ResourceType=kind)
    rule = matching(found.rules, headers["origin"], method, asked)
    if rule is None:
        raise AccessForbidden(
            "CORSResponse: This CORS request is not allowed. This is usually because the evalution of Origin, request"
            " method / Access-Control-Request-Method or Access-Control-Request-Headers are not whitelisted by the"
            " resource's CORS spec.",
            Method=method,
            ResourceType=kind,
        )
    answer = _allowed(rule, headers["origin"])
    if asked:
        answer["Access-Control-Allow-Headers"] = ", ".join(asked)
    return Reply(headers=answer)
