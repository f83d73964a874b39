"""The query API of IAM and STS: a form in the body of POST /, signed for the service ``iam`` or ``sts``.

A signature of these services covers the hash of the body, which has no header of its own. So the body is read before
the sender is known; it is bounded.
https://docs.aws.amazon.com/IAM/latest/UserGuide/programming.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl

from storaged import errors
from storaged.ids import system_entropy
from storaged.objects.api import Principal
from storaged.s3 import xml
from storaged.s3.auth import sigv4
from storaged.s3.auth.authenticate import check_expiry, claim_of
from storaged.s3.auth.facts import Facts, request_tags, resource_tags
from storaged.s3.auth.identities import require
from storaged.s3.auth.regions import ANY_REGION
from storaged.s3.context import Front, user_of
from storaged.s3.ops.iam import sts
from storaged.s3.ops.iam.actions import ACTIONS, perform
from storaged.s3.ops.iam.call import Call, Entries, Parameters, Result, tags_of
from storaged.s3.reply import Reply
from storaged.s3.request import Request
from storaged.units import KIB

BODY_BYTES_MAX: Final = 256 * KIB
"""A policy of 6,144 characters, each of them escaped, is 18 KiB. What is larger gets the error for that."""
PARAMETERS_MAX: Final = 1000

IAM, STS = "iam", "sts"
NAMESPACES: Final = {
    IAM: "https://iam.amazonaws.com/doc/2010-05-08/",
    STS: "https://sts.amazonaws.com/doc/2011-06-15/",
}
STS_ACTIONS: Final = {
    "AssumeRole": sts.assume_role,
    "GetCallerIdentity": sts.get_caller_identity,
    "GetSessionToken": sts.get_session_token,
}

_AS_HERE: Final[dict[str, type[errors.S3Error]]] = {
    "InvalidAccessKeyId": errors.InvalidClientTokenId,
    "InvalidToken": errors.InvalidClientTokenId,
    "AuthorizationHeaderMalformed": errors.IncompleteSignature,
    "AuthorizationQueryParametersError": errors.IncompleteSignature,
    "RequestTimeTooSkewed": errors.SignatureDoesNotMatch,
}
"""Errors of the S3 port that IAM and STS call otherwise."""


async def query(front: Front, request: Request) -> Reply:
    """Performs one call. Every error that S3 knows becomes the document of IAM."""
    service = IAM
    try:
        body = await request.body.read(BODY_BYTES_MAX)
        service = await _authenticate(front, request, body)
        parameters = _parameters(request, body)
        action = parameters.text("Action", chars_max=128, chars_min=1)
        request.operation = action if action in ACTIONS or action in STS_ACTIONS else request.operation
        if service == STS:
            result = await _sts(front, request, action, parameters)
        else:
            result = await _iam(front, request, action, parameters)
        return _answer(service, action, result, request.id)
    except errors.S3Error as error:
        return _failure(service, error, request.id)


async def _authenticate(front: Front, request: Request, body: bytes) -> str:
    """Sets ``request.who``. Returns the service that the request is signed for. Raises the errors of ``sigv4``."""
    claim = claim_of(request, ANY_REGION, (IAM, STS))
    if claim is None:
        raise errors.MissingAuthenticationToken()
    who, secret = await user_of(front, claim.access_key, claim.token)
    now_ms, digest = front.clock.wall_ms(), hashlib.sha256(body).hexdigest()
    payload = request.headers.get("x-amz-content-sha256", digest)
    if payload != digest and not (payload == sigv4.UNSIGNED_PAYLOAD and request.secure):
        raise errors.SignatureDoesNotMatch()
    sigv4.check_time(claim, now_ms)
    sigv4.verify(claim, secret, request.method, request.target.raw_path, request.target.pairs, request.headers, payload)
    sigv4.check_signed_headers(claim, request.headers)
    check_expiry(who, now_ms)
    request.body.admit()
    request.who = who
    return claim.service


def _parameters(request: Request, body: bytes) -> Parameters:
    """Raises ValidationError."""
    if not request.headers.get("content-type", "").lower().startswith("application/x-www-form-urlencoded"):
        raise errors.ValidationError("The body of a call is a form (application/x-www-form-urlencoded).")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=PARAMETERS_MAX)
    except ValueError:
        raise errors.ValidationError("The body of the call is no form.") from None
    found = dict(pairs)
    if len(found) != len(pairs):
        raise errors.ValidationError("A parameter was given more than once.")
    return Parameters(found)


def _facts(front: Front, request: Request, own: Mapping[str, str]) -> Facts:
    who, now_ms = request.who, front.clock.wall_ms()
    return Facts(request, who.user_id, now_ms, headers=request.headers, found=None, own=own)


async def _iam(front: Front, request: Request, action: str, parameters: Parameters) -> Result:
    who = request.who
    if who.identity is not None and who.identity.temporary and not who.identity.role:
        raise errors.AccessDenied("The credentials of GetSessionToken can't call IAM.")
    policy, account = parameters.found.get("PolicyArn", ""), await front.users.accounts.get(who.user_id)
    own = {"iam:policyarn": policy} if policy else {}
    own |= request_tags(zip(parameters.members("Tags", ".Key"), parameters.members("Tags", ".Value"), strict=False))

    def permit(name: str, arn: str) -> None:
        require(who, name, arn, _facts(front, request, own | resource_tags(tags_of(account, arn))))

    return await perform(
        Call(action, front.users, who.user_id, who.display_name, parameters, front.clock.wall_ms(), permit, who)
    )


async def _sts(front: Front, request: Request, action: str, parameters: Parameters) -> Result:
    run = STS_ACTIONS.get(action)
    if run is None:
        raise errors.InvalidAction(f"Could not find operation {action[:100]} for version 2011-06-15.")

    def facts(own: Mapping[str, str]) -> Facts:
        return _facts(front, request, own)

    who: Principal = request.who
    return await run(sts.StsCall(front.users, who, parameters, front.clock.wall_ms(), system_entropy, facts))


# --- XML --------------------------------------------------------------------------------------------------------------


def _answer(service: str, action: str, result: Result, request_id: str) -> Reply:
    content = "" if result is None else f"<{action}Result>{_fields(result)}</{action}Result>"
    metadata = f"<ResponseMetadata>{xml.element('RequestId', request_id)}</ResponseMetadata>"
    return _reply(service, 200, f"{action}Response", content + metadata, request_id)


def _failure(service: str, error: errors.S3Error, request_id: str) -> Reply:
    known = _AS_HERE.get(error.code)
    code, status = (known.code, known.status) if known is not None else (error.code, error.status)
    message = known.default_message if known is errors.InvalidClientTokenId else error.message
    kind = "Receiver" if status >= 500 else "Sender"
    content = f"{xml.element('Type', kind)}{xml.element('Code', code)}{xml.element('Message', message)}"
    content = f"<Error>{content}</Error>{xml.element('RequestId', request_id)}"
    reply = _reply(service, status, "ErrorResponse", content, request_id)
    reply.code = code
    return reply


def _reply(service: str, status: int, root: str, content: str, request_id: str) -> Reply:
    document = f'{xml.DECLARATION}<{root} xmlns="{NAMESPACES[service]}">{content}</{root}>'
    headers = {"Content-Type": "text/xml", "x-amzn-RequestId": request_id}
    return Reply(status, headers, document.encode("utf-8", "replace"))


def _fields(found: Mapping[str, Any]) -> str:
    return "".join(_field(name, value) for name, value in found.items())


def _field(name: str, value: Any) -> str:
    if isinstance(value, Entries):
        entries = "".join(
            f"<entry>{xml.element('key', key)}{xml.element('value', each)}</entry>" for key, each in value.items()
        )
        return f"<{name}>{entries}</{name}>"
    if isinstance(value, Mapping):
        return f"<{name}>{_fields(value)}</{name}>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"<{name}>{''.join(_field('member', each) for each in value)}</{name}>"
    if isinstance(value, bool):
        return xml.boolean(name, value)
    return xml.element(name, value)
