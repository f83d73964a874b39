"""The website endpoint: buckets as static websites, for browsers.

A request whose host is ``BUCKET.WEBSITE-DOMAIN`` never is a call of the S3 API. It is a GET or HEAD by nobody: a
signature and the query mean nothing, and the one decision about access is asked for the current version of the key, as
of any request without a signature. Errors are HTML.

In AWS's order: redirection of all requests; the rules that look at the key alone; the object (its own redirection, or
its bytes); the redirection of a folder without its slash; the rules that look at the error; the error document; the
error as HTML.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/WebsiteHosting.html
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final
from urllib.parse import quote, quote_from_bytes

from msgspec.structs import replace

from storaged import errors
from storaged.objects.configuration.website import REDIRECT_LOCATION, WEBSITE, RoutingRule, Website
from storaged.objects.records import BucketRecord
from storaged.s3.auth.actions import action_of
from storaged.s3.authorization import Ask, hides_missing, permit
from storaged.s3.context import Front, existing_bucket
from storaged.s3.operation import Operation
from storaged.s3.ops.get import get_object, head_object
from storaged.s3.reply import REASONS, Headers, Reply
from storaged.s3.request import Request, Target, origin, parse_target, split_path

NAME: Final = "Website"
HTML_TYPE: Final = "text/html; charset=utf-8"

_KEY_SAFE: Final = "/~!$&'()*,=:@"
_URL_SAFE: Final = "/~!$&'()*,=:@;?#[]+%"
"""Of what the owner wrote: it may have a query or a fragment."""
_CONDITIONS: Final = ("range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since")


def bucket_of(request: Request, domain: str) -> str | None:
    """The bucket that a request's host names under the website domain (in lower case): empty for the domain itself.
    None: the request is one of the S3 API."""
    host = request.headers.get("host", "").partition(":")[0].lower().rstrip(".")
    if host == domain:
        return ""
    return host.removesuffix(f".{domain}") if host.endswith(f".{domain}") else None


def begin(request: Request, bucket: str) -> Operation:
    """Sets what a request for a website asks for. Its query means nothing. Raises InvalidURI, KeyTooLongError."""
    request.operation, request.bucket = NAME, bucket
    path = parse_target(request.raw_target.partition(b"?")[0]).raw_path
    request.target = Target(path, (), {})
    _, request.key = split_path(path, bucket or "-")
    return SITE


async def _answer(front: Front, request: Request) -> Reply:
    if request.method not in ("GET", "HEAD"):
        raise errors.MethodNotAllowed(Method=request.method, ResourceType="OBJECT")
    for name in ("x-amz-checksum-mode", "x-amz-expected-bucket-owner"):
        request.headers.pop(name, None)
    bucket = request._bucket_record = await existing_bucket(front, request.bucket)
    site = front.buckets.configuration_of(bucket).get(WEBSITE)
    if site is None:
        raise errors.NoSuchWebsiteConfiguration(BucketName=request.bucket)
    if site.redirect_host:
        protocol = site.redirect_protocol or ("https" if request.secure else "http")
        return _redirection(301, f"{protocol}://{site.redirect_host}/{_quoted(request.key)}")
    asked = request.key
    rule = matching(site.rules, asked, 0)
    if rule is not None:
        return _redirection(rule.status, location(rule, asked, request))
    suffix = site.index.encode()
    request.key = asked + suffix if not asked or asked.endswith(b"/") else asked
    try:
        return await _object(front, request, bucket)
    except errors.NotModified:
        raise
    except errors.S3Error as error:
        if not asked.endswith(b"/") and error.status in (403, 404) and await _has(front, request, asked, suffix):
            return _redirection(302, _path(f"{_quoted(asked)}/"))
        rule = matching(site.rules, asked, error.status)
        if rule is not None:
            return _redirection(rule.status, location(rule, asked, request))
        return await _error_document(front, request, site, error)


async def _object(front: Front, request: Request, bucket: BucketRecord) -> Reply:
    """The object as GetObject or HeadObject answers it, or its own redirection. Raises S3 errors."""
    request.reading = request.read_error = None
    request._grant = await permit(front, request, Ask(action_of("GetObject"), bucket, request.key))
    try:
        reply = await (head_object if request.method == "HEAD" else get_object)(front, request)
    except errors.NoSuchKey:
        if hides_missing(front, request):
            raise errors.AccessDenied() from None
        raise
    where = reply.headers.get(REDIRECT_LOCATION)
    if where is None:
        return reply
    if reply.stream is not None:
        await reply.stream.close()
    if reply.release is not None:
        reply.release()
    return _redirection(301, quote(where, safe=_URL_SAFE))


async def _has(front: Front, request: Request, folder: bytes, suffix: bytes) -> bool:
    """Whether everybody may read the index document of a folder."""
    key, bucket = folder + b"/" + suffix, request.bucket_record
    try:
        grant = await permit(front, request, Ask(action_of("GetObject"), bucket, key))
        await front.objects.head(grant, key, customer_key=None)
    except errors.S3Error:
        return False
    return True


async def _error_document(front: Front, request: Request, site: Website, error: errors.S3Error) -> Reply:
    """The owner's page for an error of the request, with the status of the error. Raises the error when there is none,
    or when everybody may not read it."""
    if not site.error or error.status >= 500:
        raise error
    headers = {name: value for name, value in request.headers.items() if name not in _CONDITIONS}
    page = replace(request, key=site.error.encode(), headers=headers)
    try:
        reply = await _object(front, page, request.bucket_record)
    except errors.S3Error:
        raise error from None
    if reply.status == 200:
        reply.status, reply.code = error.status, error.code
        reply.headers["x-amz-error-code"] = error.code
        reply.headers["x-amz-error-message"] = error.message
    return reply


SITE: Final = Operation(NAME, _answer, needs_bucket=False, signed=False)


# --- redirections -----------------------------------------------------------------------------------------------------


def matching(rules: Iterable[RoutingRule], key: bytes, status: int) -> RoutingRule | None:
    """The first rule for a key and the status of an error; 0: the object was not looked for."""
    return next((rule for rule in rules if rule.error == status and key.startswith(rule.prefix.encode())), None)


def location(rule: RoutingRule, key: bytes, request: Request) -> str:
    """Where a rule sends a request. A rule that names no host and no protocol keeps both, whatever proxies make of
    them: its location is a path."""
    if rule.replace_key is not None:
        path = quote(rule.replace_key, safe=_URL_SAFE)
    elif rule.replace_prefix is not None:
        path = quote(rule.replace_prefix, safe=_URL_SAFE) + _quoted(key[len(rule.prefix.encode()) :])
    else:
        path = _quoted(key)
    if not rule.host and not rule.protocol:
        return _path(path)
    protocol, _, host = origin(request).partition("://")
    return f"{rule.protocol or protocol}://{rule.host or host}/{path}"


def _quoted(key: bytes) -> str:
    return quote_from_bytes(key, safe=_KEY_SAFE)


def _path(path: str) -> str:
    """As a location. One that began with two slashes would name a host."""
    return f"/%2F{path[1:]}" if path.startswith("/") else f"/{path}"


def _redirection(status: int, where: str) -> Reply:
    return Reply(status, {"Location": where})


# --- errors -----------------------------------------------------------------------------------------------------------


def error_page(request: Request, error: errors.S3Error, host_id: str) -> Reply:
    """An error as AWS's website endpoint shows it."""
    title = f"{error.status} {REASONS.get(error.status, 'Error')}"
    facts = {"Code": error.code, "Message": error.message} | {
        name: value for name, value in error.details.items() if name in ("BucketName", "Key", "Method", "ResourceType")
    }
    facts |= {"RequestId": request.id, "HostId": host_id}
    lines = "".join(f"<li>{name}: {escape(value)}</li>\n" for name, value in facts.items())
    page = (
        f"<html>\n<head><title>{title}</title></head>\n<body>\n<h1>{title}</h1>\n<ul>\n{lines}</ul>\n<hr/>\n</body>\n"
        "</html>\n"
    )
    headers: Headers = {"Content-Type": HTML_TYPE, "x-amz-error-code": error.code}
    if error.message.isascii() and error.message.isprintable():
        headers["x-amz-error-message"] = error.message
    if error.status == 405:
        headers["Allow"] = "GET, HEAD"
    return Reply(error.status, headers, page.encode("utf-8", "replace"), code=error.code)
