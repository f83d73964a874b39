"""PostObject: uploads by browser forms, authorised by a signed policy document (Signature Version 4, or the older form
with HMAC-SHA1)."""

from __future__ import annotations

import base64
import hmac
from collections.abc import AsyncIterator, Mapping
from functools import partial
from urllib.parse import urlencode, urlsplit, urlunsplit

from msgspec.structs import replace

from storaged import errors
from storaged.objects.api import PART_BYTES_MAX, Principal, PutResult
from storaged.s3 import aws_names, xml
from storaged.s3 import headers as h
from storaged.s3.auth import sigv4
from storaged.s3.auth.actions import action_of
from storaged.s3.auth.authenticate import check_expiry
from storaged.s3.auth.form_policy import Policy, check_policy, parse_policy
from storaged.s3.authorization import Ask, permit
from storaged.s3.context import Front, existing_bucket, user_of
from storaged.s3.documents import parse_document
from storaged.s3.encryption import asked, written_headers
from storaged.s3.http.form_data import FormReader, boundary_of
from storaged.s3.lifecycle import stored_expiration
from storaged.s3.locks import asked_lock
from storaged.s3.operation import check_fields, check_form
from storaged.s3.ops.acl import ownership
from storaged.s3.ops.tags import tags_from
from storaged.s3.origins import origin_of
from storaged.s3.reply import CONTROL, TOKEN, Reply, stored_headers, xml_reply
from storaged.s3.request import ANONYMOUS, Request, check_key, origin
from storaged.wire import Buffer


def is_form(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/form-data")


async def post_object(front: Front, request: Request) -> Reply:
    """Reads the form's fields, checks them against its policy, then stores the file as PutObject would."""
    check_form(request.headers)
    form = FormReader(request.body, boundary_of(request.headers["content-type"]))
    await form.read_fields()
    fields = form.fields
    if "key" in fields:
        fields["key"] = fields["key"].replace("${filename}", form.filename)
    policy = await _authorise(front, request, fields)
    request._bucket_record = await existing_bucket(front, request.bucket)
    if not fields.get("key"):
        raise errors.InvalidArgument(
            "Bucket POST must contain a field named 'key'. If it is specified, please check the order of the fields.",
            ArgumentName="key",
        )
    request.key = fields["key"].encode("utf-8", "surrogateescape")
    check_key(request.key)
    headers = _as_headers(fields)
    if "x-amz-copy-source" in headers:
        raise errors.NotImplemented("A form stores its file: it can't copy.", Header="x-amz-copy-source")
    check_fields(headers)
    ask = Ask(action_of("PostObject"), request.bucket_record, request.key, headers=fields | headers)
    request._grant = await permit(front, request, ask)
    owner, acl = await ownership(front, request, headers)
    meta = replace(h.new_meta(headers), acl=acl, lock=asked_lock(headers))
    if "tagging" in fields:
        parse = partial(tags_from, count_max=h.TAGS_PER_OBJECT_MAX)
        document = fields["tagging"].encode("utf-8", "surrogateescape")
        meta = replace(meta, tags=await parse_document(parse, document))
    meta = replace(meta, encryption=asked(front, request, headers), origin=origin_of(request, "ObjectCreated:Post"))
    checks = h.body_checks(headers, None, (), None)
    result = await front.objects.put(request.grant, request.key, _bounded(form, policy), meta, checks, owner=owner)
    reply = _answer(request, fields, result)
    written_headers(result.encryption, headers, reply.headers)
    if not request.bucket_record.plain:
        stored_expiration(front, request, result, reply.headers)
    return reply


async def _authorise(front: Front, request: Request, fields: Mapping[str, str]) -> Policy | None:
    """Sets ``request.who``. Returns the form's policy, which its fields fulfil; None: the form is anonymous."""
    if "policy" not in fields:
        request.who = ANONYMOUS
        return None
    request.who = await _signer(front, fields)
    policy = parse_policy(fields["policy"])
    check_policy(policy, fields, request.bucket, front.clock.wall_ms())
    request.body.admit()
    return policy


async def _signer(front: Front, fields: Mapping[str, str]) -> Principal:
    """The user who signed the form. Raises InvalidArgument (a field is missing), InvalidAccessKeyId, InvalidToken,
    ExpiredToken, SignatureDoesNotMatch."""
    token = fields.get("x-amz-security-token", "")
    if "x-amz-security-token" in fields and not token:
        raise errors.InvalidToken()
    if "x-amz-algorithm" in fields:
        if fields["x-amz-algorithm"] != sigv4.ALGORITHM:
            raise errors.InvalidArgument(
                "X-Amz-Algorithm only supports AWS4-HMAC-SHA256", ArgumentName="x-amz-algorithm"
            )
        _need(fields, "x-amz-credential", "x-amz-signature", "x-amz-date")
        access_key, date, region, service = sigv4.policy_credential(fields["x-amz-credential"])
        if front.endpoint.signed_region not in ("", region) or service != sigv4.SERVICE:
            raise errors.InvalidArgument(
                f"The credential's scope is wrong; expecting {front.endpoint.region}/{sigv4.SERVICE}",
                ArgumentName="x-amz-credential",
            )
        who, secret = await user_of(front, access_key, token)
        computed, given = sigv4.policy_signature(secret, date, region, fields["policy"]), fields["x-amz-signature"]
    else:
        _need(fields, "awsaccesskeyid", "signature")
        who, secret = await user_of(front, fields["awsaccesskeyid"], token)
        digest = hmac.digest(
            secret.encode("utf-8", "surrogateescape"), fields["policy"].encode("utf-8", "surrogateescape"), "sha1"
        )
        computed, given = base64.b64encode(digest).decode(), fields["signature"]
    if not sigv4.same(computed, given):
        raise errors.SignatureDoesNotMatch()
    check_expiry(who, front.clock.wall_ms())
    return who


def _need(fields: Mapping[str, str], *names: str) -> None:
    for name in names:
        if not fields.get(name):
            raise errors.InvalidArgument(f"Bucket POST must contain a field named '{name}'.", ArgumentName=name)


def _is_header(name: str) -> bool:
    return (
        name in h.KEPT_HEADERS
        or name in aws_names.HEADERS
        or name == "content-md5"
        or name.startswith(("x-amz-", aws_names.OWN))
    )


def _as_headers(fields: Mapping[str, str]) -> dict[str, str]:
    """The fields that act as headers: those that are stored, and all that ask for something, so that what a form can't
    do (conditions, for example) is refused. Raises InvalidArgument for values that no header could have."""
    headers = {name: value for name, value in fields.items() if _is_header(name)}
    if fields.get("acl"):
        headers["x-amz-acl"] = fields["acl"]
    for name, value in headers.items():
        if not TOKEN.fullmatch(name) or CONTROL.search(value):
            raise errors.InvalidArgument(
                "Form fields that become headers have a header's name, and no control characters in their value.",
                ArgumentName=name[:100],
            )
    return headers


async def _bounded(form: FormReader, policy: Policy | None) -> AsyncIterator[Buffer]:
    """The file, checked against the policy's content-length-range. Raises EntityTooLarge, EntityTooSmall, before the
    last piece is passed on."""
    size_max = PART_BYTES_MAX if policy is None or policy.size_max is None else min(policy.size_max, PART_BYTES_MAX)
    size_min = policy.size_min if policy else 0
    size = 0
    async for piece in form.file():
        size += len(piece)
        if size > size_max:
            raise errors.EntityTooLarge(ProposedSize=str(size), MaxSizeAllowed=str(size_max))
        yield piece
    if size < size_min:
        raise errors.EntityTooSmall(
            "Your proposed upload is smaller than the minimum allowed size",
            ProposedSize=str(size),
            MinSizeAllowed=str(size_min),
        )


def _answer(request: Request, fields: Mapping[str, str], result: PutResult) -> Reply:
    headers = stored_headers(result)
    key = request.key.decode()
    location = f"{origin(request)}/{request.bucket}/{xml.escape_key(request.key, url=True)}"
    redirect = fields.get("success_action_redirect") or fields.get("redirect") or ""
    if target := _redirect(redirect, urlencode({"bucket": request.bucket, "key": key, "etag": f'"{result.etag}"'})):
        return Reply(303, {**headers, "Location": target})
    headers["Location"] = location
    status = fields.get("success_action_status", "204")
    if status == "201":
        content = (
            f"{xml.element('Location', location)}{xml.element('Bucket', request.bucket)}{xml.element('Key', key)}"
            f"<ETag>&quot;{result.etag}&quot;</ETag>"
        )
        return xml_reply(f"{xml.DECLARATION}<PostResponse>{content}</PostResponse>".encode(), 201, headers)
    return Reply(200 if status == "200" else 204, headers)


def _redirect(url: str, query: str) -> str:
    """``url`` with ``query`` added; empty when it is no web address: the object is stored, and the client gets an
    ordinary answer."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not parts.netloc or CONTROL.search(url):
        return ""
    return urlunsplit(parts._replace(query=f"{parts.query}&{query}" if parts.query else query))
