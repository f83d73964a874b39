"""RenameObject, which AWS has for directory buckets: here it is for every bucket without versioning.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_RenameObject.html
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from storaged import errors
from storaged.objects.api import Renaming
from storaged.objects.pending_events import REMOVED
from storaged.s3 import conditions as c
from storaged.s3.auth.actions import action_of
from storaged.s3.authorization import Ask, may_list, permit
from storaged.s3.context import Front
from storaged.s3.ops.copy import with_tags
from storaged.s3.origins import origin_of
from storaged.s3.reply import Reply
from storaged.s3.request import BatchKey, Request, check_key

_SOURCE = "x-amz-rename-source"
_ONCE = "x-amz-client-token"
_FORM = re.compile(r"[!-~]{1,64}")


async def rename_object(front: Front, request: Request) -> Reply:
    headers, bucket = request.headers, request.bucket_record
    source, token = _source(request), headers.get(_ONCE, "")
    if _ONCE in headers and not _FORM.fullmatch(token):
        raise errors.InvalidArgument(
            "A client token has 1 to 64 visible ASCII characters.", ArgumentName=_ONCE, ArgumentValue=token
        )
    asked = Renaming(
        source,
        request.key,
        token,
        c.source_conditions(headers, c.RENAMED_PREFIX),
        c.source_conditions(headers, ""),
        created=origin_of(request, "ObjectCreated:Copy"),
        removed=origin_of(request, REMOVED),
    )
    of_source = _headers_of_source(headers)
    reading = await permit(front, request, Ask(action_of("GetObject"), bucket, source, headers=of_source))
    reading = await with_tags(front, request, reading, source, "")
    removal = await permit(front, request, Ask(action_of("DeleteObject"), bucket, source, headers=of_source))
    try:
        await front.objects.rename(reading, removal, request.grant, asked)
        request.batch = [BatchKey(source, "", 204)]
    except errors.NoSuchKey:
        if not may_list(front, request, Ask(action_of("GetObject"), bucket, source)):
            raise errors.AccessDenied() from None
        raise
    return Reply(200, {})


def _source(request: Request) -> bytes:
    """The key of x-amz-rename-source, which is percent-encoded: the key alone, or ``/BUCKET/KEY``. Raises
    InvalidArgument, InvalidRequest."""
    raw = request.headers.get(_SOURCE, "").encode("utf-8", "surrogateescape")
    source = unquote_to_bytes(raw).removeprefix(b"/" + request.bucket_record.name.encode() + b"/")
    if not source:
        raise errors.InvalidArgument(
            "The header x-amz-rename-source must name the key of the object.",
            ArgumentName=_SOURCE,
            ArgumentValue=raw.decode("utf-8", "replace"),
        )
    check_key(source)
    if source.endswith(b"/") or request.key.endswith(b"/"):
        raise errors.InvalidRequest("RenameObject does not support keys that end with a slash.")
    return source


def _headers_of_source(headers: dict[str, str]) -> dict[str, str]:
    """For policies: If-Match and the like are conditions of the new key, and must not count for the old one."""
    others = {name: value for name, value in headers.items() if name not in c.NAMES}
    own = {name: headers[c.RENAMED_PREFIX + name] for name in c.NAMES if c.RENAMED_PREFIX + name in headers}
    return others | own
